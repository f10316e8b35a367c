"""``convexheads explain``: what a fitted head says, in figures and numbers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from convexheads.commands import common
from convexheads.errors import InputError, describe

HELP = "draw the spectrum, latent dimensions, token clusters and evidence of a fitted head"

_DESCRIPTION = """\
Explain a fitted head. Without a token store: how many heads the data support and how large they are, which latent
dimensions they use, and how the fit went. With one: how the tokens of some of its images cluster by the linear
classifier that the head applies to them, and which tokens speak for a class or against it. With the images that
the tokens were made from, these maps lie over the images."""

_EPILOG = """\
examples:
  convexheads explain runs/digits/model.safetensors --out runs/digits/explained
  convexheads explain model.safetensors tokens/digits/test --out explained --images digits
  convexheads explain model.safetensors tokens/cifar100 --out explained --images cifar100/ --samples 12

what is written to the folder --out:
  spectrum.png      sizes of the heads of each block, use of the gates, tail after truncation
  energies.png      energies of the latent dimensions
  history.png       objective and certified gap against time
  clusters.png      with a store: clusters of tokens (self_attention and mlp heads)
  evidence.png      with a store: what each token adds to the logits of the predicted and the true class
  explanation.json  all of it as numbers"""

KEPT = "figures that are finished are whole and stay in the folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="file that `convexheads fit` has saved")
    parser.add_argument(
        "store",
        nargs="?",
        metavar="STORE",
        help="token store, a folder with test/ in it, or an .npz file with X; without it there are no maps of tokens",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the figures; it is made if needed")
    common.add_output(parser, "the explanation", csv_too=False)
    parser.add_argument(
        "--samples", type=common.count, default=6, metavar="N", help="images to explain (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images (default: %(default)s)")
    parser.add_argument(
        "--clusters",
        type=common.count,
        metavar="K",
        help="clusters of tokens in each image (default: the best number by silhouette)",
    )
    parser.add_argument(
        "--branch",
        type=int,
        metavar="B",
        help="which head of a sum of heads, from 0 (default: clusters of the first that classifies tokens, "
        "evidence of the whole sum)",
    )
    parser.add_argument("--threads", type=common.count, metavar="N", help="processor threads (default: all)")
    images = parser.add_argument_group("images", "the ones that the tokens were extracted from, to draw the maps over")
    images.add_argument(
        "--images",
        metavar="SOURCE",
        help="digits, cifar100, a folder, Parquet files, ...: what was given to extract as --data",
    )
    images.add_argument("--holdout", type=common.share, metavar="SHARE", help="as given to extract")
    images.add_argument("--label-column", metavar="NAME", help="as given to extract")
    images.add_argument("--image-column", metavar="NAME", help="as given to extract")
    images.add_argument("--labels", metavar="FILE", help="as given to extract")


def run(args: argparse.Namespace) -> int:
    """Do what the parsed options say; returns 0.

    Raises
    ------
    ConvexHeadsError
        If a file, folder or option cannot be used, or matplotlib is missing; the message is one line.
    """
    from convexheads import load
    from convexheads.errors import require
    from convexheads.explain import figures

    if args.images is not None and args.store is None:
        raise InputError("--images: " + describe("images without tokens", "STORE, the tokens made from these images"))
    require("matplotlib", "plots")
    output = common.Output(args.json)
    common.set_threads(args.threads)
    model = load(args.model)
    tokens = None if args.store is None else _fitting(common.open_tokens(args.store, "test"), model, args.model)
    out = Path(args.out)
    common.writable(out / "explanation.json")

    explanation = {"model": args.model, **_model(model)}
    written = [
        figures.save_figure(figures.spectrum_figure(model), out / "spectrum.png"),
        figures.save_figure(figures.energies_figure(model), out / "energies.png"),
        figures.save_figure(figures.history_figure(model, tol=float(model.tol)), out / "history.png"),
    ]
    notes: list[str] = []
    if tokens is not None:
        explanation["tokens"] = tokens.summary()
        explanation["samples"], drawn = _samples(args, model, tokens, out, notes)
        written += drawn
    explanation["notes"] = notes
    common.save(out / "explanation.json", common.as_json(explanation))
    _print(output, explanation, [*written, out / "explanation.json"])
    output.write(explanation)
    return 0


def _model(model: Any) -> dict[str, Any]:
    """The explanation of the head itself, as plain numbers."""
    from convexheads.explain import gate_sparsity, latent_energies, spectra, truncation_curve

    energies = []
    for each in latent_energies(model):
        frequencies = None if each.frequencies is None else each.frequencies.tolist()
        energies.append(
            {
                "branch": each.branch,
                "head": each.head,
                "group": each.group,
                "kind": each.kind,
                "values": each.values.tolist(),
                "frequencies": frequencies,
                "top": [{"index": list(place), "share": share} for place, share in each.top()],
            }
        )
    return {
        "head": model.head if isinstance(model.head, str) else [branch.head for branch in model._branches],
        "activation": model.activation,
        "rank": model.rank_,
        "certificate": model.certificate_.as_dict(),
        "spectra": [block.as_dict() for block in spectra(model)],
        "gates": [each.as_dict() for each in gate_sparsity(model)],
        "truncation": truncation_curve(model).tolist(),
        "energies": energies,
    }


def _fitting(tokens: common.Tokens, model: Any, path: str) -> common.Tokens:
    """The tokens of every image that the model was fitted on: all of them, or those of one role."""
    expected, got = (model.n_tokens_in_, model.n_features_in_), tokens.shape[1:]
    if got == expected:
        return tokens
    for role, (first, last) in (tokens.layout or {}).items():
        if (last - first, got[1]) == expected:
            chosen = tokens.X.select(role)
            return replace(tokens, X=chosen, layout=dict(chosen.layout), grid=tokens.grid if role == "patch" else None)
    raise InputError(
        f"{path}: "
        + describe(
            f"{got[0]} tokens of {got[1]} features in {tokens.path}",
            f"{expected[0]} tokens of {expected[1]} features, as this model was fitted on",
            "Give tokens of the same backbone, resolution and choice of tokens.",
        )
    )


def _samples(
    args: argparse.Namespace, model: Any, tokens: common.Tokens, out: Path, notes: list[str]
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Clusters and evidence of some images: (numbers, files written)."""
    import numpy as np

    from convexheads.explain import cluster_tokens, figures, token_contributions
    from convexheads.explain.classifiers import OWN

    n = tokens.shape[0]
    count = min(args.samples, n)
    chosen = np.sort(np.random.default_rng(args.seed).permutation(n)[:count])
    X = np.asarray(tokens.X[chosen]).reshape(count, *tokens.shape[1:])
    contributions = token_contributions(model, X, args.branch)
    intercept = model.intercept_
    logits = contributions.mean(1) + (0.0 if intercept is None else intercept)
    named = _names(model, tokens)
    order = np.argsort(-logits, axis=1, kind="stable")
    true = _columns(model, tokens, chosen)
    # Where there is no true class, or it is the predicted one, the runner-up is the more telling second map.
    shown = []
    for i, ranked in enumerate(order.tolist()):
        second = true[i] if true[i] not in (None, ranked[0]) else ranked[min(1, len(ranked) - 1)]
        shown.append(list(dict.fromkeys([ranked[0], second])))
    heads = [branch.head for branch in model._branches]
    own = [b for b in (range(len(heads)) if args.branch is None else [args.branch]) if heads[b] in OWN]
    found = [cluster_tokens(model, x, args.clusters, branch=own[0]) for x in X] if own else None
    if found is None:
        notes.append(f"no clusters: the tokens of a {heads[args.branch or 0]} head have no classifier of their own")
    samples: list[dict[str, Any]] = []
    for i, row in enumerate(chosen):
        sample: dict[str, Any] = {"row": int(row), "logits": logits[i].tolist(), "predicted": named[shown[i][0]]}
        sample["true"] = None if (column := true[i]) is None else named[column]
        sample["evidence"] = {named[j]: contributions[i, :, j].tolist() for j in shown[i]}
        if found is not None:
            sample["clusters"] = {
                "labels": found[i].labels.tolist(),
                "sizes": found[i].sizes,
                "silhouette": found[i].silhouette,
                "distinct_classifiers": found[i].distinct,
            }
        samples.append(sample)
    written: list[Path] = []
    pictures = None if args.images is None else _images(args, tokens, chosen)
    titles = [_title(sample) for sample in samples]
    grid, start = _grid(tokens, contributions.shape[1])
    if grid is None:
        notes.append("no evidence map: the tokens of the head are not the patches of a grid")
    else:
        maps = np.stack([contributions[i][:, columns] for i, columns in enumerate(shown)])
        labels = [[f"{named[j]}: logit {logits[i, j]:+.2f}" for j in columns] for i, columns in enumerate(shown)]
        figure = figures.evidence_figure(maps, grid, pictures, names=labels, titles=titles, start=start)
        written.append(figures.save_figure(figure, out / "evidence.png"))
    if found is not None:
        grid, start = _grid(tokens, len(found[0].labels))
        if grid is None:
            notes.append("no cluster map: the tokens of the head are not the patches of a grid")
        else:
            figure = figures.clusters_figure(
                np.stack([each.labels for each in found]), grid, pictures, titles=titles, start=start
            )
            written.append(figures.save_figure(figure, out / "clusters.png"))
    return samples, written


def _names(model: Any, tokens: common.Tokens) -> list[str]:
    """A name for every output."""
    classes = getattr(model, "classes_", None)
    if classes is None:
        return [f"output {j}" for j in range(model._branches[0].outputs)]
    names = tokens.class_names
    if names is not None and classes.dtype.kind in "iu" and classes.min() >= 0 and classes.max() < len(names):
        return [names[int(label)] for label in classes]
    return [str(label) for label in classes]


def _columns(model: Any, tokens: common.Tokens, rows: Any) -> list[int | None]:
    """The output of the true class of each row, or None where it is not known."""
    classes = getattr(model, "classes_", None)
    if classes is None or tokens.labels is None:
        return [None] * len(rows)
    return [None if place < 0 else int(place) for place in common.class_index(classes, tokens.labels[rows])]


def _title(sample: dict[str, Any]) -> str:
    if sample["true"] is None:
        return f"row {sample['row']}: {sample['predicted']}"
    if sample["true"] == sample["predicted"]:
        return f"{sample['true']} (right)"
    return f"{sample['true']}, taken for {sample['predicted']}"


def _grid(tokens: common.Tokens, count: int) -> tuple[tuple[int, int] | None, int | None]:
    """Grid of the patches and number of the first one, for ``count`` tokens after a view; None where unknown."""
    if tokens.grid is None:
        return None, None
    h, w = tokens.grid
    if count == tokens.shape[1]:
        return (h, w), 0 if tokens.layout is None else tokens.layout["patch"][0]
    # A view that leaves as many tokens as there are patches has left the patches.
    return ((h, w), 0) if count == h * w else (None, None)


def _images(args: argparse.Namespace, tokens: common.Tokens, rows: Any) -> list[Any]:
    """The images of these rows, cropped and scaled as the backbone saw them; arrays (H, W, 3) in [0, 1]."""
    import numpy as np

    from convexheads.backbones.base import Transform
    from convexheads.datasets import load_dataset

    manifest = getattr(tokens.X, "manifest", None)
    if manifest is None:
        raise InputError("--images: " + describe(f"images for the arrays of {tokens.path}", "images for a token store"))
    made = manifest["dataset"]
    source = load_dataset(
        args.images,
        manifest["split"],
        limit=made.get("limit"),
        seed=made.get("seed", 0),
        holdout=args.holdout,
        label_column=args.label_column,
        image_column=args.image_column,
        labels=args.labels,
    )
    own = source.fingerprint
    if any(own[key] != made.get(key) for key in ("content", "order", "images")):
        raise InputError(
            f"--images {args.images}: "
            + describe(
                f"{len(source)} images that are not those of {tokens.path}",
                "the images that these tokens were extracted from",
                "Give the same source and options as to extract.",
            )
        )
    seen = manifest["transform"]
    transform = None
    if seen is not None:
        same = {key: seen[key] for key in ("resolution", "interpolation", "fit", "crop") if key in seen}
        transform = Transform(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **same)
    found = []
    for row in rows:
        image = source.image(int(row))
        found.append(np.asarray(image) if transform is None else transform(image).permute(1, 2, 0).numpy())
    return found


def _print(output: common.Output, explanation: dict[str, Any], written: list[Path]) -> None:
    certificate = explanation["certificate"]
    blocks = [block for block in explanation["spectra"] if block["rank"]]
    largest = max(blocks, key=lambda block: block["nuclear_norm"], default=None)
    heads, many = explanation["rank"], len(blocks)
    output.print(
        f"{heads} head{'s' * (heads != 1)} in {many} block{'s' * (many != 1)}; objective {certificate['primal']:.5g}, "
        f"at most {100 * certificate['relative_gap']:.2g} % above the global optimum"
    )
    if explanation["activation"] == "relu":
        output.print("  all of this is of the gated program; the ReLU network that predicts was made of it")
    if largest is not None:
        output.print(f"  largest block: rank {largest['rank']}, effective rank {largest['effective_rank']:.1f}")
    for each in explanation["gates"]:
        output.print(f"  gates in use: {each['active']} of {len(each['shares'])}, effectively {each['effective']:.1f}")
    for each in explanation["energies"]:
        first = each["top"][0]
        place = ", ".join(map(str, first["index"]))
        output.print(f"  {each['head']} {each['kind']}: {100 * first['share']:.1f} % of the energy at ({place})")
    for note in explanation["notes"]:
        output.print(f"  {note}")
    for path in written:
        output.print(f"wrote {path}")
