"""``convexheads extract``: images -> token stores on disk."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from convexheads.errors import InputError, describe

HELP = "run images through a frozen backbone and store their tokens on disk"

_DESCRIPTION = """\
Run every image of a data set through a frozen, pre-trained vision transformer and store the tokens.
Heads are then fitted to the stored tokens, as often as you like, without the images.

The command can be stopped at any time (Ctrl-C, kill, power) and started again: it goes on where it was
and ends with the same bytes. Tokens made with other options are never reused."""

_EPILOG = """\
examples:
  # scikit-learn's digits through the packaged DINOv2 at 98 x 98 pixels (7 x 7 patches)
  convexheads extract --data digits --out tokens/digits --resolution 98

  # your own images, one folder a class, a fifth of them set aside for testing
  convexheads extract --data photos/ --out tokens/photos --resolution 224 --holdout 0.2

  # CIFAR-100 as Parquet files, 10,000 training and 2,500 test images
  convexheads extract --data cifar100/ --out tokens/cifar100 --resolution 98 --limit train=10000,test=2500

  # another backbone, its patch tokens only, from the block before the last
  convexheads extract --data photos/ --out tokens/photos-b --backbone timm:vit_base_patch16_224 \\
      --tokens patch --layer -2

  # two processes, which share the images
  torchrun --nproc-per-node=2 -m convexheads extract --data photos/ --out tokens/photos

what is written:
  OUT/train, OUT/test, ... one store a split (OUT/all for data without splits), each with a manifest.json
  that records the images, weights, layer, preprocessing, resolution, type and token choice, with hashes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="digits; cifar100 (downloaded once); a folder with one subfolder of images a class, or with "
        "such folders under train/ and test/; a folder of Hugging Face .parquet files; an .npz or .npy file "
        "of images",
    )
    data.add_argument(
        "--split",
        default="all",
        metavar="NAME",
        help="which part of the data: train, val, test or all (default: all, each to its own folder)",
    )
    data.add_argument(
        "--limit",
        metavar="N",
        help="use only N images of each split, drawn at random but always the same ones; "
        "for different numbers: train=10000,test=2500 (default: all images)",
    )
    data.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="for data without splits: set this share of each class aside as the test split, such as 0.2",
    )
    data.add_argument("--label-column", metavar="NAME", help="column of the labels in .parquet files (default: found)")
    data.add_argument("--image-column", metavar="NAME", help="column of the images in .parquet files (default: found)")
    data.add_argument("--labels", metavar="FILE", help=".npy file with the labels of an .npy file of images")

    model = parser.add_argument_group("backbone")
    model.add_argument(
        "--backbone",
        default="dinov2_vits14",
        metavar="NAME",
        help="dinov2_vits14 (default; packaged, needs no download), timm:NAME for any timm model, "
        "hf:NAME or a folder for any transformers vision model",
    )
    model.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side of the square image that the backbone sees; more patches and more time with more pixels; "
        "a multiple of the patch size (default: the backbone's own, 224 for dinov2_vits14)",
    )
    model.add_argument(
        "--layer",
        type=int,
        metavar="K",
        help="take the tokens after block K: 0 is the first, -1 the last, before the final norm "
        "(default: after the last block and the final norm)",
    )
    model.add_argument("--checkpoint", metavar="FILE", help="file with weights to use instead of those of the name")
    model.add_argument(
        "--device", default="auto", help="auto (default: an accelerator if there is one), cpu, cuda, mps"
    )
    model.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images a forward pass (default: %(default)s)"
    )

    store = parser.add_argument_group("store")
    store.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write: one folder a split is made in it"
    )
    store.add_argument(
        "--tokens",
        default="all",
        metavar="ROLES",
        help="which tokens to keep: all (default), cls, registers, patch, or several: cls,patch",
    )
    store.add_argument(
        "--dtype",
        default="float16",
        choices=["float16", "bfloat16", "float32"],
        help="type on disk (default: %(default)s)",
    )
    store.add_argument("--overwrite", action="store_true", help="replace other tokens that are in the folder")
    store.add_argument("--json", action="store_true", help="print the summary as JSON, for other programs")
    store.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Do what the parsed options say.

    Returns
    -------
    int
        0 when every store is finished, 130 when stopped by Ctrl-C.

    Raises
    ------
    ConvexHeadsError
        If an option, the data or a folder cannot be used; the message is one line.
    """
    from convexheads.datasets import load_dataset, load_splits

    options = {"holdout": args.holdout, "label_column": args.label_column}
    options |= {"image_column": args.image_column, "labels": args.labels}
    limits = _limits(args.limit)
    every = limits.pop("", None)
    # All splits are opened before anything is computed: a wrong option is told at once.
    if args.split == "all":
        datasets = load_splits(args.data, limit=limits or every, **options)
    else:
        # The other splits' limits do no harm: the same options with another --split stay valid.
        limit = limits.get(args.split, every)
        datasets = {args.split: load_dataset(args.data, args.split, limit=limit, **options)}
    out = Path(args.out)

    from convexheads.backbones import load_backbone
    from convexheads.distributed import local_device
    from convexheads.tokens.extraction import extract

    backbone = load_backbone(
        args.backbone, args.resolution, args.layer, local_device(args.device), checkpoint=args.checkpoint
    )
    summaries: list[dict[str, Any]] = []
    for split, dataset in datasets.items():
        try:
            done = extract(
                dataset,
                backbone,
                out / split,
                tokens=args.tokens,
                dtype=args.dtype,
                batch_size=args.batch_size,
                overwrite=args.overwrite,
                progress=not args.quiet,
            )
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on where {out / split} is now", file=sys.stderr)
            return 130
        store = done.store
        summaries.append(
            {
                "split": split,
                "path": str(store.path),
                "shape": list(store.shape),
                "layout": {role: list(span) for role, span in store.layout.items()},
                "grid": store.manifest["grid"],
                "dtype": store.stored_dtype,
                "labels": store.labels is not None,
                "classes": len(store.class_names) if store.class_names else None,
                "bytes": sum(file.stat().st_size for file in store.path.iterdir()),
                "key": store.key,
                "images_computed": done.images,
                "resumed_from": done.resumed_from,
                "reused": done.reused,
                "seconds": round(done.seconds, 3),
                "images_per_second": round(done.images_per_second, 2),
            }
        )
    if args.json:
        settings = {"data": str(args.data), "backbone": backbone.name, "resolution": backbone.resolution}
        print(json.dumps({**settings, "layer": backbone.layer, "stores": summaries}, indent=1))
    else:
        _print(summaries, backbone)
    return 0


def _limits(text: str | None) -> dict[str, int]:
    """Split -> limit; "" stands for every split."""
    limits: dict[str, int] = {}
    for item in (text or "").split(",") if text else []:
        name, equals, number = (part.strip() for part in item.rpartition("="))
        if name not in ("", "all", "train", "val", "test"):
            raise InputError(describe(f"--limit for {name!r}", "train, val or test"))
        repeated = name in limits or (limits and ("" in limits or not name))
        if not number.isdigit() or int(number) < 1 or (equals and not name) or repeated:
            raise InputError(describe(f"--limit {text}", "a number of images, or such as train=10000,test=2500"))
        limits[name] = int(number)
    return limits


def _print(summaries: list[dict[str, Any]], backbone: Any) -> None:
    layer = "final layer" if backbone.layer is None else f"block {backbone.layer}"
    print(f"{backbone.name} at {backbone.resolution} px, {layer}")
    for item in summaries:
        n, s, d = item["shape"]
        parts = [f"{b - a} {role}" for role, (a, b) in item["layout"].items()]
        grid = f" ({item['grid'][0]} x {item['grid'][1]})" if item["grid"] else ""
        labels = f"{item['classes']} classes" if item["labels"] else "no labels"
        if item["reused"]:
            how = "already there, reused"
        else:
            how = f"{item['images_computed']} images in {item['seconds']:.0f} s"
            how += f", {item['images_per_second']:.1f} images/s"
            how += f", {item['resumed_from']} were done before" if item["resumed_from"] else ""
        tokens = f"{s} tokens ({' + '.join(parts)}{grid}) x {d}"
        size = f"{item['bytes'] / 1e6:.0f} MB {item['dtype']}"
        print(f"  {item['path']}: {n} images x {tokens}, {labels}, {size}; {how}")
