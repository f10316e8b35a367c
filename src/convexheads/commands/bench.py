"""``convexheads bench``: other programs and this library on the same problems, in one run."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexheads.commands import common
from convexheads.errors import require

if TYPE_CHECKING:
    from convexheads.bench.common import Result

KEPT = "the benchmarks that were finished are in the folder --out"

NAMES = ("conic", "gated-mlp", "logistic", "networks", "scaling")
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "cvxpy", "clarabel", "scs", "pyscnn")
COLUMNS = ("method", "seconds", "objective", "gap", "note")
_WIDTHS = (36, 10, 12, 9)

_DESCRIPTION = """\
Run other programs and this library on the same problems, on the same threads, and print seconds and ratios of
medians. Every objective and gap in the tables is computed again, in numpy and from the definition.

conic      CVXPY with Clarabel and SCS on the dense lifted program, growing until neither is done in a minute
gated-mlp  pyscnn's R-FISTA on the gated ReLU MLP with one output, to a gap of 1e-4
logistic   scikit-learn's LogisticRegression and the linear head, to the same gradient norm
networks   AdamW over learning rates, L-BFGS, and FISTA with a dense SVD, on patch tokens, to a gap of 1e-3
scaling    cost against samples, tokens, features, units, gates and threads; share of the matrix product's speed

Times mean something on a machine that does nothing else."""

_EPILOG = """\
examples:
  # everything: hours
  convexheads bench

  # seconds, to see that it runs
  convexheads bench --quick

  # some of it, on one thread, on real tokens
  convexheads bench --only logistic,networks --threads 1 --tokens tokens/cifar100

what is written to the folder --out, for each benchmark NAME:
  NAME.csv          one row a method and problem
  NAME-curves.csv   objective and gap against seconds
  NAME*.svg         the same drawn
  ratios.csv        quotients of medians beside their targets
  bench.json        everything, and the versions and machine that it was measured with"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--only", type=_names, default=NAMES, metavar="NAME,...", help=f"some of {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds, and times that say nothing")
    parser.add_argument(
        "--tokens", metavar="STORE", help="tokens for logistic and networks: a store, or a folder with train/ in it"
    )
    parser.add_argument(
        "--out", default="runs/bench", metavar="FOLDER", help="where everything is written (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=common.count,
        default=3,
        metavar="N",
        help="runs a median is taken of, more of brief ones (default: %(default)s)",
    )
    parser.add_argument("--threads", type=common.count, default=1, metavar="N", help="of every method (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of data, gates and starting points (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks, print tables and ratios, write files.

    Raises
    ------
    ConvexHeadsError
        If a package is missing, or the tokens or the folder cannot be used; the message is one line.
    """
    from convexheads.bench import BENCHMARKS
    from convexheads.bench.common import Settings, threads

    out = Path(args.out)
    output = common.Output(str(out / "bench.json"), str(out / "ratios.csv"))
    modules = {name: import_module(BENCHMARKS[name]) for name in args.only}
    # Told before hours of work.
    for package in dict.fromkeys(p for module in modules.values() for p in (*module.PACKAGES, "matplotlib.figure")):
        require(package, "bench")
    settings = Settings(
        quick=args.quick,
        threads=args.threads,
        repeats=args.repeats,
        seed=args.seed,
        tokens=None if args.tokens is None else _tokens(args.tokens),
        say=lambda line: common.progress(line, args.quiet),
    )
    report: dict[str, Any] = {**_environment(args), "benchmarks": {}}
    ratios: list[dict[str, Any]] = []
    for name, module in modules.items():
        with threads(settings.threads):
            result = module.run(settings)
        _print(result, output)
        ratios += [ratio.as_row() for ratio in result.ratios]
        report["benchmarks"][name] = {"rows": result.table(), "notes": result.notes, "lines": result.lines}
        _write(result, out)
        output.write({**report, "ratios": ratios}, ratios)
    output.print(f"written to {out}")
    return 0


def _tokens(path: str) -> Any:
    import numpy as np

    from convexheads.bench.common import TokenSource

    found = common.open_tokens(path, "train")
    return TokenSource(found.X, np.asarray(found.require_labels()), found.layout)


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    """What a time depends on."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "quick": args.quick,
        "threads": args.threads,
        "repeats": args.repeats,
        "seed": args.seed,
        "tokens": args.tokens,
        "versions": versions,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
    }


def _print(result: Result, output: common.Output) -> None:
    output.print(f"\n{result.name}")
    for note in result.notes:
        output.print(f"  {note}")
    problem = None
    for row in result.table():
        if row["problem"] != problem:
            problem = row["problem"]
            output.print(f"\n  {problem}")
            output.print("    " + _line(COLUMNS))
        output.print("    " + _line(_cells(row)))
    output.print()
    for ratio in result.ratios:
        output.print(f"  {ratio}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(value: Any, style: str) -> str:
        return format(value, style) if isinstance(value, float) else "-"

    note = str(row["note"])
    if isinstance(row.get("share_of_peak"), float):
        note = f"{row['gflops']:.1f} GFlop/s, {100 * row['share_of_peak']:.0f}% of the matrix product  {note}".rstrip()
    cells = (shown(row["seconds"], ".4g"), shown(row["objective"], ".8g"), shown(row["relative_gap"], ".1e"), note)
    return str(row["method"]), *cells


def _line(cells: tuple[str, ...]) -> str:
    first, *middle, note = cells
    numbers = [cell.rjust(width) for cell, width in zip(middle, _WIDTHS[1:], strict=True)]
    return " ".join([first.ljust(_WIDTHS[0]), *numbers, " " + note]).rstrip()


def _write(result: Result, out: Path) -> None:
    from convexheads.bench.figures import figures
    from convexheads.explain.figures import save_figure

    common.save(out / f"{result.name}.csv", common.as_csv(result.table()))
    if result.curves:
        common.save(out / f"{result.name}-curves.csv", common.as_csv(result.curve_table()))
    for ending, figure in figures(result).items():
        save_figure(figure, out / f"{result.name}{ending}.svg")
