"""``convexheads demo``: images to certified heads, compared, without any input."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convexheads.commands import common, compare, extract
from convexheads.errors import MissingExtraError

KEPT = "what is done is kept: started again, it does not extract the tokens anew"

RESOLUTION = 98
GATES = 4
FEATURES = 16
RATIOS = "0.1,0.03,0.01"

_DESCRIPTION = f"""\
The whole path at once, on scikit-learn's 1,797 images of handwritten digits: extract their tokens through
the packaged DINOv2 at {RESOLUTION} x {RESOLUTION} pixels ({RESOLUTION // 14} x {RESOLUTION // 14} patches), fit \
every head to a certified optimum, print the comparison,
write it as JSON, CSV and HTML, and export the best head as a torch module and as ONNX. A few minutes on two
cores. To be quick it uses {FEATURES} principal components and {GATES} gates, and tries the shares
{RATIOS} of beta_max."""

_EPILOG = """\
examples:
  convexheads demo
  convexheads demo --out runs/first --gates 8

what is written to the folder --out:
  tokens/train, tokens/test   token stores, used again by the next demo
  compare.json, compare.csv   the table, and how beta was chosen
  report.html                 the same with certificates, spectra and figures
  best.safetensors            the best head: convexheads.load("best.safetensors").to_module()
  best.onnx                   the same for other programs: tokens in, logits out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="where everything is written (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", metavar="N", help="use fewer images: N of each split, or such as train=200,test=100 (default: all)"
    )
    parser.add_argument(
        "--gates", type=common.count, default=GATES, metavar="P", help="gates of gated_relu (default: %(default)s)"
    )
    parser.add_argument(
        "--heads",
        type=compare.names_of_heads,
        metavar="NAME,...",
        help="only some heads, as for `convexheads compare` (default: all)",
    )
    parser.add_argument(
        "--tol", type=common.positive, default=1e-3, help="certified relative gap (default: %(default)g)"
    )
    parser.add_argument("--threads", type=common.count, metavar="N", help="processor threads (default: all)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Extract, compare, report, export.

    Raises
    ------
    ConvexHeadsError
        If a folder cannot be used or a package is missing; the message is one line.
    """
    out = Path(args.out)
    files = {"json": out / "compare.json", "csv": out / "compare.csv"}
    output = common.Output(str(files["json"]), str(files["csv"]))
    watch = common.Stopwatch()

    output.print(f"1. tokens: digits through DINOv2 ViT-S/14 at {RESOLUTION} px")
    store = out / ("tokens" if args.limit is None else f"tokens-{args.limit.replace('=', '-').replace(',', '-')}")
    extracting = ["--data", "digits", "--resolution", str(RESOLUTION), "--out", str(store)]
    extracting += ["--limit", args.limit] if args.limit else []
    extracting += ["--quiet"] if args.quiet else []
    common.set_threads(args.threads)
    status = extract.run(parsed(extract, extracting))
    if status:
        return status

    output.print(f"2. heads, {args.gates} gates each; beta chosen from the shares {RATIOS} of beta_max")
    options = [
        str(store),
        "--pca",
        str(FEATURES),
        "--gates",
        str(args.gates),
        "--beta-ratios",
        RATIOS,
        "--tol",
        str(args.tol),
    ]
    options += ["--heads", ",".join(args.heads)] if args.heads else []
    options += ["--quiet"] if args.quiet else []
    comparing = parsed(compare, options)
    train, test = common.open_train_test(comparing)
    result = compare.compare(comparing, train, test, output)

    best = result.best()
    written = [str(file) for file in files.values()]
    written += export(best.model, out, train.shape[1:])
    written += report(result, out)
    values = best.values
    output.print(f"3. best on validation: {values['head']} ({values['activation']}), {values['rank']} units")
    output.print("   " + "\n   ".join(written))
    output.print(f"{watch.seconds:.0f} s in all")
    return 0


def parsed(module: Any, arguments: list[str]) -> argparse.Namespace:
    """Options of another command, as its own parser reads them."""
    from convexheads.cli import Parser

    parser = Parser(prog=f"convexheads {module.__name__.rpartition('.')[2]}")
    module.add_arguments(parser)
    args: argparse.Namespace = parser.parse_args(arguments)
    return args


def export(model: Any, out: Path, tokens: tuple[int, int]) -> list[str]:
    """The best head as a model file and, where the packages are there, as ONNX."""
    model.save(out / "best.safetensors")
    written = [str(out / "best.safetensors")]
    try:
        model.to_module().export_onnx(out / "best.onnx", tokens)
        written.append(str(out / "best.onnx"))
    except MissingExtraError as error:
        written.append(f"no ONNX file: {error}")
    return written


def report(result: compare.Comparison, out: Path) -> list[str]:
    """The HTML report, where the packages are there."""
    from convexheads.report import write_report

    rows = []
    for row in result.table():
        rows.append({key: value for key, value in row.items() if key in REPORTED})
    models = {f"{row.values['head']} {row.values['activation']}": row.model for row in result.rows if row.model}
    settings = {
        "tokens": f"{result.settings['train']['path']}, {result.settings['test']['path']}",
        "preprocessing": result.settings["preprocessing"],
        "tol": result.settings["tol"],
        "gates": result.settings["gates"],
        "seed": result.settings["seed"],
    }
    try:
        path = write_report(out / "report.html", rows, models, "Heads on digits", settings)
    except MissingExtraError as error:
        return [f"no report: {error}"]
    return [str(path)]


REPORTED = (
    "head",
    "activation",
    "beta",
    "rank",
    "objective",
    "relative_gap",
    "top1",
    "top5",
    "seconds",
    "certified",
    "validation",
)
