"""``convexheads compare``: all heads on the same tokens, each at a certified optimum."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convexheads.commands import common
from convexheads.errors import InputError, NotConvergedWarning, describe

KEPT = "the rows above are in the files given by --json and --csv"

DEFAULTS = common.Preprocessing("patch", False, 32, True, False, True, "auto")
CURVE_RATES, CURVE_SEEDS, CURVE_CHECKS = (1e-3, 3e-3, 1e-2, 3e-2), 3, 12
"""Learning rates and seeds of --networks, and certificates along each training where curves are drawn."""
SUM = "linear on CLS and mean + self_attention"
COLUMNS = ("head", "activation", "beta", "units", "objective", "gap", "top-1", "top-5", "seconds")
_WIDTHS = (20, 10, 9, 5, 10, 10, 6, 6, 7)

_DESCRIPTION = """\
Fit every head to the training tokens and measure it on the test tokens. All heads see the same tokens: by
default the patch tokens, projected to 32 whitened principal components, with a constant 1 appended, scaled to
about unit norm. For each head beta is chosen on a part of the training set, never on the test set; then the
head is fitted to the whole training set until its relative duality gap is proved to be below --tol.

units     number of units of the fitted head (its rank)
objective training objective: cross-entropy plus weight decay
gap       certified relative gap: the objective is at most this share above the global optimum
seconds   choice of beta or of other hyper-parameters, and fit together

Baselines of common practice follow, with hyper-parameters chosen on the same part of the training set; they
have no certificate. With --networks, every head's own network is trained by AdamW, too, at the same beta from
several learning rates and seeds: the same objective, without a promise, certified where training stopped."""

_EPILOG = """\
examples:
  # what `convexheads extract` has written: a folder with train/ and test/ in it
  convexheads compare tokens/photos

  # some heads only, at a fixed share of beta_max, with files for other programs
  convexheads compare tokens/photos --heads self_attention,mlp,linear --beta-ratio 0.02 \\
      --json compare.json --csv compare.csv

  # the same network by AdamW against the convex program: a row each, and curves of objective and gap over time
  convexheads compare tokens/photos --heads self_attention --activations linear --beta-ratio 0.03 --networks \\
      --learning-rates 0.001,0.003,0.01,0.03 --seeds 3 --curves curves.svg

  # one more row: a linear head on all features of CLS and mean token, plus self-attention on patches whose
  # second-order statistics are power normalised
  convexheads compare tokens/photos --sum"""


@dataclass
class Row:
    """One line of the comparison: numbers for tables, and the fitted estimator (None for baselines and networks)."""

    values: dict[str, Any]
    model: Any = None


@dataclass
class Comparison:
    """All rows, and what they were made with."""

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        from convexheads.memory import peak_memory

        return {**self.settings, "rows": self.table(), "peak_memory_bytes": peak_memory()}

    def table(self) -> list[dict[str, Any]]:
        """The numbers of all rows."""
        return [row.values for row in self.rows]

    def best(self) -> Row:
        """The certified row with the best validation score; the test set has no say in it.

        Raises
        ------
        InputError
            If no row has a validation score.
        """
        rows = [row for row in self.rows if row.model is not None and row.values["validation"] is not None]
        if not rows:
            raise InputError(describe("no row with a validation score", "at least one head with beta chosen by path"))
        return max(rows, key=lambda row: row.values["validation"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "store", nargs="?", metavar="STORE", help="folder with train/ and test/ in it, as extract writes it"
    )
    parser.add_argument("--train", metavar="STORE", help="training tokens, where they lie elsewhere (or an .npz file)")
    parser.add_argument("--test", metavar="STORE", help="test tokens, where they lie elsewhere (or an .npz file)")
    common.add_output(parser, "the table")
    add_rows(parser)
    add_networks(parser)
    common.add_preprocessing(parser, DEFAULTS)
    common.add_validation(parser, "0.3,0.1,0.05,0.025,0.0125,0.006,0.003", 1)
    common.add_computation(parser)


def add_rows(parser: argparse.ArgumentParser, gates: int = 16) -> None:
    """Options that say which heads are compared."""
    group = parser.add_argument_group("heads")
    group.add_argument(
        "--heads",
        type=names_of_heads,
        metavar="NAME,NAME,...",
        help=f"some of {', '.join(common.HEADS)} (default: all)",
    )
    group.add_argument(
        "--baselines",
        type=_names_of_baselines,
        metavar="NAME,...",
        help=f"some of {', '.join(common.BASELINES)}, or none (default: all, or none beside --heads)",
    )
    group.add_argument(
        "--activations",
        type=_names_of_activations,
        default=common.ACTIVATIONS,
        metavar="NAME,...",
        help="linear, gated_relu (default: both)",
    )
    group.add_argument(
        "--gates", type=common.count, default=gates, metavar="P", help="gates of gated_relu (default: %(default)s)"
    )
    group.add_argument(
        "--grid",
        type=common.grid_option,
        default="auto",
        metavar="HxW",
        help="of the tokens, for fno and block_fno; auto: that of the store; none: one-dimensional (default: auto)",
    )
    group.add_argument(
        "--n-blocks",
        type=common.count,
        metavar="B",
        help="block_fno: channel groups (default: the largest of 4 and 2 that divides features and classes; the "
        "constant feature is left out where it stands in the way)",
    )
    group.add_argument("--sum", action="store_true", help=f"one more row: {SUM} on power-normalised patches")
    group.add_argument(
        "--beta-ratio",
        type=common.ratio_or_auto,
        metavar="R",
        help="one share of beta_max for all heads; auto: chosen by validation, head by head (default)",
    )


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Options of the networks that are trained beside the convex programs."""
    group = parser.add_argument_group("networks", "the non-convex network of each head, trained by AdamW")
    group.add_argument("--networks", action="store_true", help="a row for every head, learning rate and seed")
    common.add_training(group, CURVE_RATES, CURVE_SEEDS)
    group.add_argument(
        "--curves",
        metavar="FILE",
        help="draw objective and certified gap over time of networks and convex solver: .svg, .png or .pdf",
    )


def names_of_heads(text: str) -> tuple[str, ...]:
    """Heads separated by commas (for argparse)."""
    return _names(text, common.HEADS)


def _names_of_baselines(text: str) -> tuple[str, ...]:
    return () if text == "none" else _names(text, common.BASELINES)


def _names_of_activations(text: str) -> tuple[str, ...]:
    return _names(text, common.ACTIVATIONS)


def _names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected some of {', '.join(known)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Compare, print, write.

    Raises
    ------
    ConvexHeadsError
        If the tokens or an option cannot be used; the message is one line.
    """
    output = common.Output(args.json, args.csv)
    train, test = common.open_train_test(args)
    compare(args, train, test, output)
    return 0


def compare(args: argparse.Namespace, train: common.Tokens, test: common.Tokens, output: common.Output) -> Comparison:
    """The comparison that the options ask for; rows are printed and written as they are finished."""
    import numpy as np

    preprocessing = common.Preprocessing.from_args(args)
    y = np.asarray(train.require_labels())
    test.require_labels()
    common.set_threads(args.threads)
    if args.sum and train.layout is None:
        raise InputError(describe(f"--sum for {train.path}", "token stores, which say which tokens are which"))
    if args.curves and not args.networks:
        raise InputError(describe("--curves without --networks", "--networks beside it"))
    common.check_figure("--curves", args.curves)
    settings = {
        "train": train.summary(),
        "test": test.summary(),
        "preprocessing": preprocessing.as_dict(),
        "tol": args.tol,
        "seed": args.seed,
        "gates": args.gates,
        "beta_ratio": args.beta_ratio,
        "beta_ratios": None if args.beta_ratio else list(args.beta_ratios),
        "validation": args.validation,
        "path_tol": args.path_tol,
        "path_until": args.path_until,
        "patience": args.patience,
        "criterion": args.criterion,
    }
    run_ = _Run(args, preprocessing, train, test, y, output, Comparison(settings))
    return run_.all()


class _Run:
    """One comparison under way."""

    def __init__(
        self,
        args: argparse.Namespace,
        preprocessing: common.Preprocessing,
        train: common.Tokens,
        test: common.Tokens,
        y: Any,
        output: common.Output,
        result: Comparison,
    ) -> None:
        import numpy as np

        from convexheads import memory
        from convexheads.inputs import shown

        self.args, self.train, self.test, self.y = args, train, test, y
        self.output, self.result = output, result
        self.heads = common.HEADS if args.heads is None else args.heads
        self.baselines = args.baselines
        if self.baselines is None:
            self.baselines = common.BASELINES if args.heads is None else ()
        self.curves: dict[str, dict[str, list]] = {}
        self.append_constant = preprocessing.append_constant
        self.classes = np.unique(y)
        self.index = common.class_index(self.classes, test.labels)
        watch = common.Stopwatch()
        self.view, grid = preprocessing.chain(train)
        self.grid = grid if args.grid == "auto" else args.grid
        # Common to all heads, hence fitted and applied once; attached to the fitted heads afterwards.
        self.X, self.X_test = train.X, test.X
        if self.view is not None:
            with memory.limited(args.memory_limit):
                self.view.fit(train.X)
                self.X, self.X_test = shown(self.view, train.X), shown(self.view, test.X)
        n, s, d = train.shape if self.view is None else self.X.shape
        output.print(
            f"{n} training and {test.shape[0]} test samples, {len(self.classes)} classes; "
            f"{preprocessing}: {s} tokens of {d} features"
        )
        common.progress(f"tokens prepared in {watch.seconds:.1f} s", args.quiet)

    def all(self) -> Comparison:
        """Every row, in order."""
        self.output.print(line(COLUMNS))
        for head in self.heads:
            for activation in ("linear",) if head == "linear" else self.args.activations:
                self._head(head, activation)
        for name in self.baselines:
            self._baseline(name)
        if self.args.sum:
            self._sum()
        self._draw()
        self._footer()
        self.output.write(self.result.as_dict(), self.result.table())
        return self.result

    def _head(self, head: str, activation: str) -> None:
        """One head on the common tokens."""
        from convexheads.inputs import without_last

        options: dict[str, Any] = {"activation": activation, "gates": self.args.gates}
        X, X_test, view = self.X, self.X_test, self.view
        extra: dict[str, Any] = {"gates": self.args.gates if activation != "linear" else None}
        if head in ("fno", "block_fno"):
            options["grid"] = extra["grid"] = self.grid
        if head == "block_fno":
            blocks, constant = self._blocks(int(X.shape[2]))
            options["n_blocks"] = extra["n_blocks"] = blocks
            extra["constant"] = constant and self.append_constant
            if self.append_constant and not constant:
                X, X_test = without_last(X), without_last(X_test)
                view = without_constant(view)
        self._fit(head, {"head": head, **options}, X, X_test, extra, view)

    def _blocks(self, d: int) -> tuple[int, bool]:
        """Number of channel groups of block_fno, and whether the constant feature stays."""
        given, classes = self.args.n_blocks, len(self.classes)
        choices = (4, 2) if given is None else (given,)
        for constant in (True, False) if self.append_constant else (True,):
            features = d if constant else d - 1
            for blocks in choices:
                if features % blocks == 0 and classes % blocks == 0:
                    return blocks, constant
        # A number that was given and does not divide is an error, which the head explains.
        return given or 1, True

    def _sum(self) -> None:
        """Linear on CLS and mean, self-attention on power-normalised patches, under one convex program."""
        from convexheads.tokens import transforms as t

        assert self.train.layout is not None
        patch = t.SelectTokens(tuple(self.train.layout.get("patch", (0, self.train.shape[1]))))
        mean = t.ChainTransforms([patch, t.MeanToken()])
        first: Any = mean
        if "cls" in self.train.layout:
            first = t.ConcatenateFeatures([t.SelectTokens(tuple(self.train.layout["cls"])), mean])
        components = min(self.args.pca or 32, self.train.shape[2])
        second = t.ChainTransforms(
            [patch, t.PCATokens(components, whiten=0.25), t.PowerNormalizeTokens(), t.AppendConstant()]
        )
        heads = [
            {"head": "linear", "view": t.ChainTransforms([first, t.StandardizeTokens()])},
            {"head": "self_attention", "view": second},
        ]
        self._fit(SUM, {"head": heads}, self.train.X, self.test.X, {"gates": None}, None)

    def _fit(self, name: str, options: dict[str, Any], X: Any, X_test: Any, extra: dict[str, Any], view: Any) -> None:
        """Choose beta, fit, measure, print."""
        from convexheads import ConvexHeadClassifier, ConvexHeadClassifierCV

        args = self.args
        activation = options.get("activation", "linear")
        common.progress(f"{name} ({activation}) ...", args.quiet)
        options |= {
            "tol": args.tol,
            "max_iter": args.max_iter,
            "random_state": args.seed,
            "device": args.device,
            "dtype": args.dtype,
            "memory_limit": args.memory_limit,
        }
        watch = common.Stopwatch()
        model: Any
        if args.beta_ratio is None:
            model = ConvexHeadClassifierCV(
                **options,
                beta_ratios=args.beta_ratios,
                validation=args.validation,
                path_tol=args.path_tol,
                path_until=args.path_until,
                patience=args.patience,
                criterion=args.criterion,
                verbose=0 if args.quiet else 1,
            )
        else:
            model = ConvexHeadClassifier(**options, beta_ratio=args.beta_ratio)
        with common.prints_to_stderr(), warnings.catch_warnings():
            # The table shows a gap above tol by itself.
            warnings.simplefilter("ignore", NotConvergedWarning)
            model.fit(X, self.y)
        seconds = watch.seconds
        path = getattr(model, "path_", None)
        chosen = getattr(model, "best_beta_ratio_", args.beta_ratio)
        if path is not None:
            common.hint_at_the_edge(path, chosen, args.beta_ratios, args.quiet)
        best = getattr(model, "best_estimator_", model)
        values = self._values(best, name, activation, X_test)
        values |= {
            "beta_ratio": chosen,
            "validation": None if path is None else max(step["score"] for step in path),
            "seconds": seconds,
            "fit_seconds": best.history_["seconds"][-1] if best.history_["seconds"] else None,
            **extra,
            "path": path,
        }
        self._add(Row(values, best))
        if args.networks and name in common.HEADS and name != "linear":
            self._networks(name, options, best, X, X_test)
        if view is not None:
            attach_view(best, view)

    def _networks(self, name: str, options: dict[str, Any], convex: Any, X: Any, X_test: Any) -> None:
        """The head's network, trained by AdamW at the beta and with the gates of the fitted convex head."""
        from convexheads import ConvexHeadClassifier

        args = self.args
        training = common.training_options(args)
        rates, seeds = training.pop("learning_rates", CURVE_RATES), training.pop("seeds", CURVE_SEEDS)
        training["checks"] = CURVE_CHECKS if args.curves else 1
        activation = options["activation"]
        gates = common.fixed_gates(convex) if activation == "gated_relu" else options["gates"]
        options = {**options, "gates": gates, "beta": convex.beta_}
        curves: dict[str, list] = {"convex": [self._course(options, convex, X)]}
        for rate in rates:
            for seed in range(args.seed, args.seed + seeds):
                common.progress(f"{name} ({activation}) by AdamW, learning rate {rate:g}, seed {seed} ...", args.quiet)
                model = ConvexHeadClassifier(
                    **{**options, "random_state": seed},
                    solver="adamw",
                    solver_options={**training, "learning_rates": (rate,)},
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", NotConvergedWarning)
                    model.fit(X, self.y)
                (run_,) = model.runs_
                values = self._values(model, f"AdamW {rate:g} seed {seed}", activation, X_test)
                values |= {
                    "network_of": name,
                    "learning_rate": rate,
                    "network_seed": seed,
                    "seconds": run_["seconds"],
                    "fit_seconds": run_["seconds"],
                    "rank": model.history_["rank"][-1],
                    "history": model.history_,
                }
                self._add(Row(values))
                curves.setdefault(f"AdamW, learning rate {rate:g}", []).append(model.history_)
        self.curves[f"{name}-{activation}"] = curves

    def _course(self, options: dict[str, Any], convex: Any, X: Any) -> dict[str, list]:
        """History of the convex solver from a cold start, ending in the proved gap; before it, gaps are estimates."""
        from convexheads import ConvexHeadClassifier

        if self.args.beta_ratio is None and self.args.curves:
            # The fit in the table began where the path over beta had ended.
            common.progress("the convex solver from a cold start ...", self.args.quiet)
            convex = ConvexHeadClassifier(**options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotConvergedWarning)
                convex.fit(X, self.y)
        course = {key: list(values) for key, values in convex.history_.items()}
        course["objective"].append(convex.certificate_.primal)
        course["gap"].append(convex.certificate_.relative_gap)
        course["seconds"].append(course["seconds"][-1])
        course["rank"].append(convex.rank_)
        return course

    def _draw(self) -> None:
        """The curves of every head, a file a head where there are several."""
        if not self.args.curves:
            return
        from convexheads.explain.figures import history_figure, save_figure

        path = Path(self.args.curves)
        for name, curves in self.curves.items():
            file = path if len(self.curves) == 1 else path.with_stem(f"{path.stem}-{name}")
            save_figure(history_figure(curves, name.replace("-", ", "), self.args.tol, log_time=True), file)
            self.output.print(f"curves of {name}: {file}")

    def _values(self, best: Any, name: str, activation: str, X_test: Any) -> dict[str, Any]:
        """The numbers of a fitted estimator that all rows have."""
        certificate = best.certificate_
        scores = best.predict_proba(X_test)
        return {
            "head": name,
            "activation": activation,
            "beta": best.beta_,
            "beta_ratio": None,
            "rank": best.rank_,
            "objective": certificate.primal,
            "relative_gap": certificate.relative_gap,
            "certified": certificate.certified,
            "converged": certificate.relative_gap <= self.args.tol,
            "validation": None,
            "top1": common.topk(scores, self.index, 1),
            "top5": common.topk(scores, self.index, 5),
            "seconds": None,
            "fit_seconds": None,
            "gates": None,
            "n_blocks": None,
        }

    def _baseline(self, name: str) -> None:
        """A baseline of common practice, its hyper-parameters chosen on the same split."""
        import numpy as np

        from convexheads.baselines import make_baseline
        from convexheads.model_selection import split_seed, validation_split

        baseline = make_baseline(name, self.args.seed, self.args.device)
        common.progress(f"{baseline.title} ...", self.args.quiet)
        watch = common.Stopwatch()
        labels = np.searchsorted(self.classes, self.y)
        train, held = validation_split(len(labels), self.args.validation, split_seed(self.args.seed), labels)
        baseline.fit(self.X, labels, train, held)
        seconds = watch.seconds
        scores = baseline.scores(self.X_test)
        values = dict.fromkeys(("beta", "beta_ratio", "rank", "objective", "relative_gap", "fit_seconds"))
        values |= {
            "head": baseline.title,
            "activation": "",
            "certified": False,
            "converged": None,
            "validation": baseline.validation,
            "top1": common.topk(scores, self.index, 1),
            "top5": common.topk(scores, self.index, 5),
            "seconds": seconds,
            "gates": None,
            "n_blocks": None,
            "settings": baseline.settings,
        }
        self._add(Row(values))

    def _add(self, row: Row) -> None:
        self.result.rows.append(row)
        self.output.print(line(formatted(row.values)))
        self.output.write(self.result.as_dict(), self.result.table(), last=False)

    def _footer(self) -> None:
        rows = self.result.table()
        if any(row["converged"] is False for row in rows):
            networks = ", or the training of a network ended" if self.args.networks else ""
            self.output.print(f"!  above --tol {self.args.tol:g} when --max-iter was reached{networks}")
        if any(row["relative_gap"] is not None and not row["certified"] for row in rows):
            self.output.print("?  the bound behind this gap is an estimate, not a proof")
        if any(row["relative_gap"] is None for row in rows):
            self.output.print(
                "-  baseline, not certified; its hyper-parameters were chosen on the same part of the training set"
            )
        if any(row.get("n_blocks") for row in rows):
            blocks = next(row for row in rows if row.get("n_blocks"))
            left = "" if blocks["constant"] or not self.append_constant else ", the constant feature left out"
            self.output.print(f"block_fno: {blocks['n_blocks']} blocks{left}")
        used = common.memory_line(common.memory_used(None, self.args.memory_limit))
        if used is not None:
            self.output.print(used)


def without_constant(view: Any) -> Any:
    """The fitted chain without its step that appends the constant."""
    from sklearn.base import clone

    from convexheads.tokens.transforms import AppendConstant, ChainTransforms

    kept = [step for step in view.transforms_ if not isinstance(step, AppendConstant)]
    if not kept:
        return None
    found = ChainTransforms([clone(step) for step in kept])
    found.transforms_ = []
    past = False
    for step in view.transforms_:
        if isinstance(step, AppendConstant):
            past = True
            continue
        if past:
            # What follows the constant learns nothing from the tokens but their number of features.
            fitted, step = step, clone(step)
            step.n_features_in_, step.n_tokens_in_ = fitted.n_features_in_ - 1, fitted.n_tokens_in_
        found.transforms_.append(step)
    found.n_features_in_, found.n_tokens_in_ = view.n_features_in_, view.n_tokens_in_
    return found


def attach_view(model: Any, view: Any) -> None:
    """Make a fitted transform, through which the tokens were given, part of an estimator of one head."""
    from sklearn.base import clone

    model._branches[0].view = view
    model.head = {"head": model.head, "view": clone(view)}
    model.n_tokens_in_, model.n_features_in_ = view.n_tokens_in_, view.n_features_in_


def line(cells: Sequence[str]) -> str:
    """One line of the table."""
    shown = [cells[0].ljust(_WIDTHS[0]), cells[1].ljust(_WIDTHS[1])]
    shown += [cell.rjust(width) for cell, width in zip(cells[2:], _WIDTHS[2:], strict=True)]
    return " ".join(shown).rstrip()


def formatted(values: dict[str, Any]) -> list[str]:
    """The cells of a row of numbers."""
    gap = values["relative_gap"]
    shown = "-"
    if gap is not None:
        mark = "!" if not values["converged"] else "" if values["certified"] else "?"
        shown = f"{gap:.1e}{mark}"
    return [
        values["head"],
        values["activation"],
        "-" if values["beta"] is None else f"{values['beta']:.2e}",
        "-" if values["rank"] is None else str(values["rank"]),
        "-" if values["objective"] is None else f"{values['objective']:.5f}",
        shown,
        f"{100 * values['top1']:.1f}",
        f"{100 * values['top5']:.1f}",
        f"{values['seconds']:.1f}",
    ]
