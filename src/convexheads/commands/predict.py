"""``convexheads predict``: labels and probabilities of stored tokens by a saved head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convexheads.commands import common
from convexheads.errors import InputError, describe

KEPT = "no predictions were written"

_DESCRIPTION = """\
Apply a saved head to the tokens of a store: one line a sample with the most likely label, its probability
and the five most likely labels. Where the store has labels, accuracies are printed too."""

_EPILOG = """\
examples:
  convexheads predict head.safetensors tokens/photos/test --out predictions.csv
  convexheads predict head.safetensors tokens/new --json - | less
  convexheads predict head.safetensors tokens/huge --memory-limit 1GB --out predictions.csv

columns of the CSV file:
  row, label, probability, name (where the store names its classes), top1 ... top5, probability1 ..., and
  true (where the store has labels)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("model", metavar="MODEL", help="file that `convexheads fit` has saved")
    parser.add_argument(
        "store", metavar="STORE", help="token store, a folder with test/ in it, or an .npz file with X (and y)"
    )
    parser.add_argument("--out", "--csv", dest="csv", metavar="FILE", help="write predictions as CSV, - for stdout")
    parser.add_argument("--json", metavar="FILE", help="write accuracies and predictions as JSON, - for stdout")
    parser.add_argument("--device", metavar="NAME", help="cpu (default), auto, cuda, ...")
    common.add_memory_limit(parser, "the prediction")
    parser.add_argument("--threads", type=common.count, metavar="N", help="processor threads (default: all)")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr")


def is_model(path: str) -> bool:
    """Whether a file was written by ``convexheads fit``; False for one that holds plain weights, or cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            return "convexheads" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_model(path: str, tokens: common.Tokens) -> Any:
    """A saved classifier, checked against the tokens it will be given.

    Raises
    ------
    DataError
        If the file is missing, damaged or no model of ours.
    InputError
        If the tokens have other sizes than those it was fitted on, or it is no classifier.
    """
    from convexheads import load

    model = load(path)
    expected, got = (model.n_tokens_in_, model.n_features_in_), tokens.shape[1:]
    if got != expected:
        raise InputError(
            f"{path}: "
            + describe(
                f"{got[0]} tokens of {got[1]} features in {tokens.path}",
                f"{expected[0]} tokens of {expected[1]} features, as this model was fitted on",
                "Extract them with the same backbone, resolution and --tokens.",
            )
        )
    if not hasattr(model, "classes_") or model.pooling is None:
        raise InputError(f"{path}: " + describe(f"a {type(model).__name__}", "a classifier with one label a sample"))
    return model


def run(args: argparse.Namespace) -> int:
    """Predict, print accuracies, write the files asked for.

    Raises
    ------
    ConvexHeadsError
        If the model or the tokens cannot be used, or do not belong together.
    """
    import numpy as np

    from convexheads.memory import limited

    output = common.Output(args.json, args.csv)
    tokens = common.open_tokens(args.store, "test")
    model = load_model(args.model, tokens)
    model.device = args.device
    common.set_threads(args.threads)
    watch = common.Stopwatch()
    if args.memory_limit is not None:
        model.memory_limit = args.memory_limit
    with limited(model.memory_limit):
        probabilities = model.predict_proba(tokens.X)
    seconds = watch.seconds
    classes = np.asarray(model.classes_)
    k = min(5, len(classes))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    rows = []
    for i, top in enumerate(best):
        row: dict[str, Any] = {"row": i, "label": classes[top[0]], "probability": probabilities[i, top[0]]}
        if tokens.class_names is not None:
            label = row["label"]
            row["name"] = tokens.class_names[label] if 0 <= label < len(tokens.class_names) else None
        row |= {f"top{rank + 1}": classes[j] for rank, j in enumerate(top)}
        row |= {f"probability{rank + 1}": probabilities[i, j] for rank, j in enumerate(top)}
        if tokens.labels is not None:
            row["true"] = tokens.labels[i]
        rows.append({key: value.item() if hasattr(value, "item") else value for key, value in row.items()})
    top1 = top5 = None
    if tokens.labels is not None:
        index = common.class_index(classes, tokens.labels)
        top1, top5 = common.topk(probabilities, index, 1), common.topk(probabilities, index, k)
        unknown = int((index < 0).sum())
        if unknown:
            common.progress(f"{unknown} samples have labels that the model does not know; they count as wrong")
    output.print(f"{len(rows)} samples, {len(classes)} classes, {seconds:.1f} s")
    if top1 is not None:
        output.print(f"top-1 {common.percent(top1)}  top-{k} {common.percent(top5)}")
    else:
        output.print("no labels in the store: accuracies are not known")
    if args.csv not in (None, "-"):
        output.print(f"predictions written to {Path(args.csv)}")
    result = {
        "model": args.model,
        "tokens": tokens.summary(),
        "top1": top1,
        "top5": top5,
        "samples": len(rows),
        "seconds": seconds,
        "predictions": rows,
    }
    output.write(result, rows)
    return 0
