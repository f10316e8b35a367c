"""What the commands share: reading tokens, preprocessing options, progress on stderr, JSON and CSV."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convexheads.errors import DataError, InputError, describe

HEADS = ("self_attention", "mixer", "fno", "block_fno", "mlp", "linear")
ACTIVATIONS = ("linear", "gated_relu")
SOLVERS = ("factored", "fista", "adamw", "lbfgs")
BASELINES = ("logistic_regression", "nearest_neighbors", "mlp_gelu", "attentive_probe", "softmax_attention")


# Numbers on the command line ------------------------------------------------------------------------------


def positive(text: str) -> float:
    """A positive finite number (for argparse)."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}; expected a positive number")
    return value


def count(text: str) -> int:
    """An integer of at least 1 (for argparse)."""
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected an integer of at least 1")
    return int(text)


def bytes_option(text: str) -> int | None:
    """A number of bytes such as 4GB (for argparse)."""
    from convexheads.memory import parse_bytes

    try:
        return parse_bytes(int(text) if text.isdigit() else text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_limit: ")) from error


def share(text: str) -> float:
    """A share between 0 and 1, both excluded (for argparse)."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; expected a share between 0 and 1, such as 0.2")
    return value


def ratios(text: str) -> tuple[float, ...]:
    """Positive numbers separated by commas (for argparse)."""
    try:
        return tuple(positive(part) for part in text.split(","))
    except ValueError as error:
        got = f"got {text!r}; expected positive numbers such as 0.3,0.1,0.03"
        raise argparse.ArgumentTypeError(got) from error


def ratio_or_auto(text: str) -> float | None:
    """A positive number, or None for ``auto`` (for argparse)."""
    if text == "auto":
        return None
    try:
        return positive(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a positive number or auto") from error


def scale_or_auto(text: str) -> float | str:
    """A positive number or ``auto`` (for argparse)."""
    return "auto" if text == "auto" else positive(text)


def grid_option(text: str) -> str | tuple[int, int] | None:
    """``auto``, ``none``, or a grid such as 7x7 (for argparse)."""
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected auto, none, or rows x columns such as 7x7")
    return int(parts[0]), int(parts[1])


def gates_option(text: str) -> int | str:
    """A number of gates, or ``all`` (for argparse)."""
    return "all" if text == "all" else count(text)


# Tokens ---------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Tokens as the commands take them: a store on disk, or arrays of an .npz file.

    Attributes
    ----------
    X : tokens (n, s, d): a store, or an array.
    labels : (n,) or None; class_names : names in the order of the labels, or None.
    layout : role -> (start, stop) in the token axis, or None where it is not known.
    grid : (h, w) of the patches, or None.
    path : where they come from.
    """

    X: Any
    labels: Any
    class_names: list[str] | None
    layout: dict[str, tuple[int, int]] | None
    grid: tuple[int, int] | None
    path: Path
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, s, d)."""
        shape = tuple(int(size) for size in self.X.shape)
        return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])

    def require_labels(self) -> Any:
        """The labels, or DataError where there are none."""
        if self.labels is None:
            raise DataError(
                f"{self.path}: "
                + describe(
                    "tokens without labels",
                    "one label an image",
                    "Extract them from images in one folder a class, or put an array y beside X into the .npz file.",
                )
            )
        return self.labels

    def summary(self) -> dict[str, Any]:
        """What identifies the tokens, for JSON."""
        return {"path": str(self.path), "shape": list(self.shape), **self.fingerprint}

    def choose(self, roles: str) -> tuple[list[int] | tuple[int, int] | None, tuple[int, int] | None]:
        """What :class:`SelectTokens` needs to keep the tokens of ``roles`` (None: all), and the grid of those kept."""
        from convexheads.tokens.store import parse_roles, select_layout

        if self.layout is None:
            if roles not in ("all", "patch"):
                got = f"--tokens {roles} for {self.path}, which does not say which tokens are which"
                raise InputError(describe(got, "--tokens all", "Use a token store for such a choice."))
            return None, self.grid
        names = parse_roles(roles, self.layout)
        grid = self.grid if names == ["patch"] else None
        _, ranges = select_layout(names, self.layout)
        if sum(stop - start for start, stop in ranges) == self.shape[1]:
            return None, grid
        if len(ranges) == 1:
            return ranges[0], grid
        return [index for start, stop in ranges for index in range(start, stop)], grid


def open_tokens(path: str | Path, split: str | None = None) -> Tokens:
    """Tokens of a store, of one split in a folder of stores, or of an .npz file with X and perhaps y.

    Parameters
    ----------
    split : which store is taken from a folder that holds several.

    Raises
    ------
    DataError
        If there are no tokens, or a file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return _open_npz(path)
    if path.is_dir() and split is not None and not (path / "manifest.json").exists() and (path / split).is_dir():
        path = path / split
    from convexheads.tokens.store import TokenStore

    store = TokenStore.open(path)
    grid = store.manifest["grid"]
    return Tokens(
        store,
        store.labels,
        store.class_names,
        dict(store.layout),
        None if grid is None else (int(grid[0]), int(grid[1])),
        path,
        {"key": store.key},
    )


def _open_npz(path: Path) -> Tokens:
    import zipfile

    import numpy as np

    if path.suffix != ".npz":
        raise DataError(f"{path}: " + describe(f"a {path.suffix or 'nameless'} file", "a token store or an .npz file"))
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an .npz file ({error}). Write it again with numpy.savez") from error
    if "X" not in held:
        raise DataError(f"{path}: " + describe(f"the arrays {sorted(held)}", "tokens X (n, s, d), and labels y (n,)"))
    X, y = held["X"], held.get("y")
    if X.ndim not in (2, 3) or 0 in X.shape or X.dtype.kind not in "fiu":
        got = f"X of shape {X.shape} and type {X.dtype}"
        raise DataError(f"{path}: " + describe(got, "real numbers of shape (n, s, d) or (n, d), none of them 0"))
    if y is not None and (y.shape != X.shape[:1] or y.dtype.kind not in "iubU"):
        got = f"y of shape {y.shape} and type {y.dtype}"
        raise DataError(f"{path}: " + describe(got, f"({len(X)},) whole numbers or strings, one class a sample"))
    return Tokens(X, y, None, None, None, path)


def open_train_test(args: argparse.Namespace) -> tuple[Tokens, Tokens]:
    """Training and test tokens of ``STORE``, or of --train and --test."""
    if args.store is not None:
        folder = Path(args.store)
        found = {}
        for split, given in (("train", args.train), ("test", args.test)):
            found[split] = given or folder / split
        if args.train is None or args.test is None:
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder. Make one with `convexheads extract --out {folder}`")
            missing = [s for s in ("train", "test") if found[s] == folder / s and not found[s].is_dir()]
            if missing:
                raise DataError(
                    f"{folder}: "
                    + describe(
                        f"a folder without {' and '.join(missing)}",
                        "train/ and test/ in it, as extract writes them",
                        "Extract with --holdout 0.2, or give the stores with --train and --test.",
                    )
                )
    elif args.train and args.test:
        found = {"train": args.train, "test": args.test}
    else:
        raise InputError(describe("no tokens", "a folder with train/ and test/, or both --train and --test"))
    train, test = open_tokens(found["train"]), open_tokens(found["test"])
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{test.path}: "
            + describe(
                f"{test.shape[1]} tokens of {test.shape[2]} features",
                f"{train.shape[1]} of {train.shape[2]}, as in {train.path}",
                "Extract both with the same options.",
            )
        )
    return train, test


# Preprocessing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """What is done to the tokens before the head, in this order; part of the saved model."""

    tokens: str = "patch"
    standardize: bool = False
    pca: int | None = None
    whiten: bool | float = False
    power_normalize: bool = False
    append_constant: bool = False
    scale: float | str | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Preprocessing:
        """From the options of :func:`add_preprocessing`."""
        whiten: bool | float = bool(args.whiten)
        if args.whiten_exponent is not None:
            whiten = args.whiten_exponent
        if whiten is not False and args.pca is None:
            raise InputError(describe("--whiten without --pca", "--pca K beside it", "Or use --standardize."))
        return cls(
            args.tokens,
            args.standardize,
            args.pca,
            whiten,
            args.power_normalize,
            args.append_constant,
            args.scale,
        )

    def transforms(self, tokens: Tokens) -> tuple[list[Any], tuple[int, int] | None]:
        """The steps as unfitted transforms, and the grid of the tokens that they keep."""
        from convexheads.tokens import transforms as t

        chosen, grid = tokens.choose(self.tokens)
        steps: list[Any] = [] if chosen is None else [t.SelectTokens(chosen)]
        features = tokens.shape[2]
        if self.standardize:
            steps.append(t.StandardizeTokens())
        if self.pca is not None:
            if self.pca > features:
                raise InputError(describe(f"--pca {self.pca}", f"at most {features}, the features of {tokens.path}"))
            steps.append(t.PCATokens(self.pca, whiten=self.whiten))
            features = self.pca
        if self.power_normalize:
            steps.append(t.PowerNormalizeTokens())
        if self.append_constant:
            steps.append(t.AppendConstant())
            features += 1
        if self.scale is not None:
            # A whitened token of d features has a norm of about sqrt(d).
            steps.append(t.ScaleTokens(features**-0.5 if self.scale == "auto" else float(self.scale)))
        return steps, grid

    def chain(self, tokens: Tokens) -> tuple[Any, tuple[int, int] | None]:
        """One transform for all steps, or None where there is none; and the grid."""
        from convexheads.tokens.transforms import ChainTransforms

        steps, grid = self.transforms(tokens)
        return (ChainTransforms(steps) if steps else None), grid

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        whiten = "" if self.whiten is False else ", whitened" if self.whiten is True else f", scaled by {self.whiten:g}"
        parts = [f"{self.tokens} tokens"]
        parts += ["standardised"] if self.standardize else []
        parts += [f"PCA to {self.pca}{whiten}"] if self.pca is not None else []
        parts += ["power normalised"] if self.power_normalize else []
        parts += ["constant 1 appended"] if self.append_constant else []
        parts += [f"scaled by {self.scale}"] if self.scale is not None else []
        return " -> ".join(parts)


def add_preprocessing(parser: argparse.ArgumentParser, defaults: Preprocessing) -> None:
    """Declare the options of :class:`Preprocessing` with these defaults."""
    group = parser.add_argument_group(
        "tokens", "what the head sees of the tokens; fitted on the training set, applied in this order"
    )
    group.add_argument(
        "--tokens",
        default=defaults.tokens,
        metavar="ROLES",
        help="which tokens: patch, cls, registers, several (cls,patch) or all (default: %(default)s)",
    )
    flag = argparse.BooleanOptionalAction
    group.add_argument(
        "--standardize", action=flag, default=defaults.standardize, help="every feature to mean 0 and deviation 1"
    )
    group.add_argument(
        "--pca",
        type=_pca,
        default=defaults.pca,
        metavar="K",
        help="project the features to K principal components, or none"
        + (" (default: %(default)s)" if defaults.pca else ""),
    )
    group.add_argument("--whiten", action=flag, default=defaults.whiten, help="scale the components to deviation 1")
    group.add_argument(
        "--whiten-exponent",
        type=positive,
        metavar="E",
        help="scale each component by variance**-E instead; 0.25 suits --power-normalize",
    )
    group.add_argument(
        "--power-normalize",
        action=flag,
        default=defaults.power_normalize,
        help="replace each image's tokens X by X (X^T X / s)^(-1/4): second-order features by their square root",
    )
    group.add_argument(
        "--append-constant", action=flag, default=defaults.append_constant, help="one more feature, equal to 1"
    )
    group.add_argument(
        "--scale",
        type=scale_or_auto,
        default=defaults.scale,
        metavar="FACTOR",
        help="multiply everything by a number; auto: 1/sqrt(features)"
        + (" (default: %(default)s)" if defaults.scale else ""),
    )


def _pca(text: str) -> int | None:
    return None if text == "none" else count(text)


# Settings of the computation ------------------------------------------------------------------------------


def add_computation(parser: argparse.ArgumentParser, *, tol: float = 1e-3) -> None:
    """Options of the solver and of the machine that all fitting commands have."""
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--tol",
        type=positive,
        default=tol,
        metavar="GAP",
        help="relative duality gap at which a fit stops: at most this share above the optimum (default: %(default)g)",
    )
    group.add_argument(
        "--max-iter", type=count, default=2000, metavar="N", help="most iterations of a fit (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of gates, starting points and splits (default: %(default)s)"
    )
    group.add_argument("--device", metavar="NAME", help="cpu (default), auto, cuda, ...")
    group.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="of iterations and model; certificates always use float64 (default: %(default)s)",
    )
    add_memory_limit(group, "a fit")
    group.add_argument("--threads", type=count, metavar="N", help="processor threads (default: all)")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def add_memory_limit(parser: argparse._ActionsContainer, work: str) -> None:
    """Declare ``--memory-limit`` for what ``work`` names."""
    parser.add_argument(
        "--memory-limit",
        type=bytes_option,
        metavar="BYTES",
        help=f"what {work} may add to the memory of the process, such as 4GB; more goes to a temporary file beside the "
        "tokens (default: no limit)",
    )


TRAINING = ("learning_rates", "epochs", "batch_size", "units", "seeds")
"""Options of :func:`add_training`."""


def add_training(group: Any, learning_rates: Sequence[float] | None = None, seeds: int | None = None) -> None:
    """Options of networks that are trained by AdamW or L-BFGS; the defaults given are only told, not set."""
    rates = ",".join(f"{rate:g}" for rate in learning_rates or (1e-3, 3e-3, 1e-2, 3e-2))
    group.add_argument(
        "--learning-rates", type=ratios, metavar="R,R,...", help=f"of AdamW, each tried (default: {rates})"
    )
    group.add_argument("--epochs", type=count, metavar="N", help="of AdamW (default: 50)")
    group.add_argument("--batch-size", type=count, metavar="N", help="of AdamW, in samples (default: 256)")
    group.add_argument(
        "--units",
        type=count,
        metavar="M",
        help="of a network; with gates, of each gate (default: 64, shared by gates)",
    )
    group.add_argument(
        "--seeds", type=count, metavar="N", help=f"networks trained from different starts (default: {seeds or 1})"
    )


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_training` that were given, for ``solver_options``."""
    return {name: getattr(args, name) for name in TRAINING if getattr(args, name) is not None}


def fixed_gates(model: Any) -> list:
    """The gates of a fitted head as the parameter that gives another head the same ones."""
    groups = [list(gates.numpy()) for gates in model._branches[0].gates]
    return groups if len(groups) > 1 else groups[0]


def add_validation(parser: argparse.ArgumentParser, ratios_default: str, patience: int) -> None:
    """Options of the path over beta."""
    group = parser.add_argument_group("choice of beta")
    group.add_argument(
        "--validation",
        type=share,
        default=0.2,
        metavar="SHARE",
        help="part of the training set that the choice is made on (default: %(default)s)",
    )
    group.add_argument(
        "--beta-ratios",
        type=ratios,
        default=ratios(ratios_default),
        metavar="R,R,...",
        help=f"betas that are tried, as shares of beta_max (default: {ratios_default})",
    )
    group.add_argument(
        "--path-tol",
        type=positive,
        default=1e-2,
        metavar="GAP",
        help="relative duality gap of these fits (default: %(default)g)",
    )
    group.add_argument(
        "--path-until",
        choices=("gap", "validation"),
        default="gap",
        help="these fits end at that gap, or also where the validation data see no more improvement "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--patience",
        type=count,
        default=patience,
        metavar="N",
        help="stop trying smaller betas after N in a row that are worse than the best (default: %(default)s)",
    )
    group.add_argument(
        "--criterion",
        choices=("score", "loss"),
        default="score",
        help="the best beta has the highest accuracy (score) or the lowest loss on validation (default: %(default)s)",
    )


def memory_used(before: int | None, limit: int | None, code: int | None = None) -> dict[str, int | None]:
    """Bytes of memory for a result: the largest so far, what was held ``before`` the work, the limit, and GPUs'.

    ``code`` : what libraries held of it before the work; ``libraries`` in the result is what they have read since.
    """
    from convexheads.memory import device_peak, library_memory, peak_memory

    # First, because to look takes memory, too.
    peak = peak_memory()
    now = None if code is None else library_memory()
    return {
        "peak": peak,
        "before": before,
        "libraries": None if now is None or code is None else max(0, now - code),
        "limit": limit,
        "device_peak": device_peak(),
    }


def memory_line(used: dict[str, int | None]) -> str | None:
    """The same in words; None where the system does not tell."""
    from convexheads.memory import readable

    peak, before, limit = used["peak"], used["before"], used["limit"]
    if peak is None:
        return None
    line = f"peak memory     {readable(peak)}"
    if before is not None:
        line += f", {readable(max(0, peak - before))} of it for the fit"
        if used["libraries"] is not None:
            line += f" with {readable(used['libraries'])} of libraries' code"
    line += f" (limit {readable(limit)})" if limit is not None else ""
    device = used["device_peak"]
    return line + (f"; {readable(device)} on the GPU" if device is not None else "")


def set_threads(threads: int | None) -> None:
    """Number of threads of torch; None leaves it."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


# Output ---------------------------------------------------------------------------------------------------


def progress(line: str, quiet: bool = False) -> None:
    """One line on stderr."""
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def hint_at_the_edge(path: Sequence[dict[str, Any]] | None, chosen: float, tried: Sequence[float], quiet: bool) -> None:
    """Say so where the smallest beta that was tried is the one that was chosen: a smaller one may be better."""
    if path and len(tried) > 1 and chosen == min(tried):
        progress("the smallest beta tried was the best on validation: --beta-ratios can try smaller ones", quiet)


@contextlib.contextmanager
def prints_to_stderr() -> Iterator[None]:
    """What estimators print goes to stderr: stdout belongs to the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def add_output(parser: argparse.ArgumentParser, what: str, *, csv_too: bool = True) -> None:
    """Options for machine-readable output."""
    parser.add_argument("--json", metavar="FILE", help=f"write {what} as JSON to FILE, - for standard output")
    if csv_too:
        parser.add_argument("--csv", metavar="FILE", help=f"write {what} as CSV to FILE, - for standard output")


class Output:
    """Where results go: text for people, and JSON and CSV files, which are written whole each time.

    Text goes to standard output, or to stderr where standard output is asked for by ``--json -`` or ``--csv -``.
    """

    def __init__(self, json_file: str | None, csv_file: str | None = None) -> None:
        if json_file == "-" and csv_file == "-":
            raise InputError(describe("--json - and --csv -", "at most one of them on standard output"))
        self.json_file, self.csv_file = json_file, csv_file
        for file in (json_file, csv_file):
            if file not in (None, "-"):
                writable(Path(str(file)))
        self.text = sys.stderr if "-" in (json_file, csv_file) else sys.stdout

    def print(self, line: str = "") -> None:
        """A line for people."""
        print(line, file=self.text, flush=True)

    def write(self, result: Any, rows: Sequence[dict[str, Any]] = (), last: bool = True) -> None:
        """Write ``result`` as JSON and ``rows`` as CSV; standard output only when it is the ``last`` time."""
        for file, data in ((self.json_file, as_json(result)), (self.csv_file, as_csv(rows))):
            if file is None or (file == "-" and not last):
                continue
            if file == "-":
                print(data, end="", flush=True)
            else:
                save(Path(file), data)


def as_json(value: Any) -> str:
    """Indented JSON; NaN and infinities, which JSON has not, become null."""
    return json.dumps(_jsonable(value), indent=1) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy numbers and arrays
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the keys of the first one as header; values that are no plain numbers or text are left out."""
    if not rows:
        return ""
    names = [key for key, value in rows[0].items() if value is None or isinstance(value, (str, int, float))]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def writable(path: Path) -> None:
    """Make the folder of a file that will be written; told before the work, not after it.

    Raises
    ------
    DataError
        If the folder cannot be made or written, or the path is a folder.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot make the folder ({error.strerror or error}). Choose another") from error
    if path.is_dir():
        raise DataError(f"{path}: " + describe("a folder", "the name of a file to write"))
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder}: this folder cannot be written. Choose another")


def check_figure(option: str, file: str | None) -> None:
    """Tell before the work that a figure cannot be written; None is fine."""
    if file is None:
        return
    if Path(file).suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"{option}: " + describe(repr(file), "a file name that ends in .svg, .png or .pdf"))
    writable(Path(file))


def save(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    from convexheads.tokens.files import write_atomic

    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error.strerror or error})") from error


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def topk(scores: Any, index: Any, k: int) -> float:
    """Share of rows whose true class ``index`` (n,) is among the k largest of ``scores`` (n, c); ties count as hits."""
    import numpy as np

    index = np.asarray(index)
    known = index >= 0
    own = np.take_along_axis(np.asarray(scores), np.where(known, index, 0)[:, None], 1)
    return float((((scores > own).sum(1) < k) & known).mean())


def class_index(classes: Any, labels: Any) -> Any:
    """Position of every label in ``classes``, -1 where it is not among them."""
    import numpy as np

    place = {value: index for index, value in enumerate(np.asarray(classes).tolist())}
    return np.array([place.get(value, -1) for value in np.asarray(labels).tolist()])


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
