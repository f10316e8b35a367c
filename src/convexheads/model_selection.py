"""Estimators that choose beta themselves: a path over beta, judged on validation data, then a tight refit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state
from torch import Tensor

from convexheads import distributed, memory
from convexheads.checkpoint import Checkpoint, Checkpoints, fingerprint_array
from convexheads.errors import InputError, describe
from convexheads.estimators import ConvexHeadClassifier, ConvexHeadRegressor, on_device, problem_fingerprint
from convexheads.inputs import as_tokens, shown
from convexheads.path import CRITERIA, DEFAULT_RATIOS, ENDS, Path, PathStep, check_ratios, walk_path
from convexheads.problem import Problem, Rows
from convexheads.subspace import beta_max
from convexheads.targets import encode_targets
from convexheads.types import Factors


class RowSubset:
    """Some rows of tokens that stay where they are: a memory map, or anything with a shape and row slicing."""

    def __init__(self, source: Any, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.shape = (len(rows), *source.shape[1:])
        self.dtype = getattr(source, "dtype", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.rows[index]]


def take_rows(X: Any, rows: np.ndarray) -> Any:
    """Rows of tokens in any container that the estimators accept; stores and memory maps are not read."""
    if hasattr(X, "subset"):  # a token store
        return X.subset(rows)
    if hasattr(X, "iloc"):
        return X.iloc[rows]
    if isinstance(X, torch.Tensor):
        return X[torch.from_numpy(rows).to(X.device)]
    if isinstance(X, np.ndarray) and not isinstance(X, np.memmap):
        return X[rows]
    if hasattr(X, "shape") and hasattr(X, "__getitem__"):
        return RowSubset(X, rows)
    return np.asarray(X)[rows]


def split_seed(random_state: Any) -> int:
    """The seed that an estimator with a path derives from its ``random_state``, for its split and its fits."""
    return int(check_random_state(random_state).randint(2**31 - 1))


def validation_split(
    n: int, fraction: float, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (training, validation), both ascending.

    Parameters
    ----------
    n : number of samples.
    fraction : share of the samples for validation, in (0, 1).
    seed : the split is a function of it.
    labels : (n,) classes: every class gives its share, and keeps at least one sample for training. None: drawn
        from all samples alike.

    Raises
    ------
    InputError
        For another fraction, or if nothing would be left on one side.
    """
    good = isinstance(fraction, (float, int, np.floating)) and not isinstance(fraction, bool)
    if not good or not 0 < fraction < 1:
        raise InputError("validation: " + describe(repr(fraction), "a share in (0, 1)"))
    order = np.random.default_rng(seed).permutation(n)
    groups = np.zeros(n, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1].reshape(-1)
    # The k-th of a class's samples in random order stands at k / count: taking all those up to one height gives every
    # class its share, and the total too. The first one of each class is never taken.
    place = np.empty(n)
    for group in range(int(groups.max()) + 1):
        own = order[groups[order] == group]
        place[own] = np.append(np.inf, np.arange(len(own) - 1) + 0.5) / len(own)
    candidates = order[np.isfinite(place[order])]
    taken = candidates[np.argsort(place[candidates], kind="stable")][: max(1, round(fraction * n))]
    if not len(taken) or len(taken) == n:
        raise InputError(
            "validation: "
            + describe(
                f"n_samples = {n} with too few a class to set any aside",
                "at least two samples of some class",
                "Give validation_data=(X_val, y_val) to fit, or use the estimator without CV.",
            )
        )
    chosen = np.zeros(n, bool)
    chosen[taken] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class _PathEstimator:
    """What both estimators with a path share: ``fit``, and the state of the refitted best estimator."""

    _base: type
    # Chosen by the path, hence no parameters of these estimators.
    beta: float | None = None
    beta_ratio: float = 1.0

    def _fit_path(
        self, X: Any, y: Any, sample_weight: Any, validation_data: Any, checkpoint: str | FilePath | Checkpoints | None
    ) -> Any:
        ratios = check_ratios(self.beta_ratios)  # type: ignore[attr-defined]
        params = {k: v for k, v in self.get_params(deep=False).items() if k not in EXTRA}  # type: ignore[attr-defined]
        # One seed for everything: a RandomState would draw other gates for the path than for the refit.
        params["random_state"] = split_seed(params["random_state"])
        base = self._base(**clone_values(params))
        base._check_parameters()
        path_tol = self._checked("path_tol", 0.0)
        patience = self.patience  # type: ignore[attr-defined]
        if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
            raise InputError("patience: " + describe(repr(patience), "an integer >= 1, or None for the whole path"))
        for name, known in (("criterion", CRITERIA), ("path_until", ENDS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: " + describe(repr(getattr(self, name)), "one of " + ", ".join(known)))
        targets, weights, loss = base.encode(X, y, sample_weight)
        given = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y).shape
        hard = loss == "cross_entropy" and (len(given) == targets.ndim - 1 or given[-1] == 1)
        X_fit, parts = X, None
        if validation_data is None:
            labels = targets.argmax(-1) if hard and targets.ndim == 2 else None
            seed = params["random_state"]
            train, held = validation_split(len(targets), self.validation, seed, labels)  # type: ignore[attr-defined]
            X_fit, X_val = take_rows(X, train), take_rows(X, held)
            parts = (targets[train], normalised(weights[train]))
            validation = (targets[held], normalised(weights[held]))
        else:
            X_val, y_val = pair(validation_data)
            shape = tuple(int(size) for size in as_tokens(X_val).shape)
            base._check_tokens(shape)
            rows = shape[:1] if base.pooling is not None else shape[:2]
            values = encode_targets(y_val, loss, targets.shape[-1], rows, getattr(base, "classes_", None))
            validation = (values, np.full(len(values), 1.0 / len(values)))
        fitted = parts or (targets, weights)
        path = self._walk(base, X_fit, fitted, X_val, validation, loss, hard, ratios, path_tol, checkpoint)
        del X_fit, X_val, parts, fitted, validation
        self._refit(base, path, X, y, sample_weight, checkpoint)
        return self

    def _walk(
        self,
        base: Any,
        X_fit: Any,
        fitted: tuple[np.ndarray, np.ndarray],
        X_val: Any,
        validation: tuple[np.ndarray, np.ndarray],
        loss: str,
        hard: bool,
        ratios: tuple[float, ...],
        tol: float,
        checkpoint: str | FilePath | Checkpoints | None,
    ) -> Path:
        """The path on the training part; the branches' views are fitted on this part alone."""
        problem, branches = base._build(X_fit, *fitted, loss)
        kept, done = None, None
        if checkpoint is not None:
            kept = Checkpoint(
                Checkpoints.of(checkpoint).of_path(),
                lambda: {
                    **problem_fingerprint(X_fit, *fitted, problem, branches),
                    "validation": fingerprint_array(validation[0]),
                    "beta_ratios": list(ratios),
                    "path_tol": tol,
                    "path_until": self.path_until,  # type: ignore[attr-defined]
                },
                problem.world,
            )
            found = kept.load()
            if found is not None:
                done = [PathStep(**step) for step in found[1]["steps"]], on_device(found[0], problem.device)
        held: list[Rows] = []
        for branch in branches:
            held.append(as_tokens(X_val) if branch.view is None else shown(branch.view, X_val))
        judge = Problem(
            problem.components,
            held,
            problem.own_loss,
            torch.as_tensor(validation[0]),
            torch.as_tensor(validation[1]),
            1.0,
            problem.fit_intercept,
            problem.dtype,
            problem.device,
            problem.cache_bytes // 4,
        )
        largest = beta_max(problem)
        return walk_path(
            problem,
            largest,
            # Every worker judges all validation samples; they go by the first one's numbers.
            lambda factors: pair(problem.world.agree(judged(judge, factors, loss, hard))),
            ratios=ratios,
            tol=max(tol, float(base.tol)),
            patience=self.patience,  # type: ignore[attr-defined]
            solver=base.solver,
            max_iter=int(base.max_iter),
            max_rank=None if base.max_rank is None else int(base.max_rank),
            random_state=base.random_state,
            progress=step_printer(self.verbose),  # type: ignore[attr-defined]
            solver_options=base.solver_options,
            done=done,
            keep=None if kept is None else lambda steps, factors: keep_path(kept, steps, factors),
            criterion=self.criterion,  # type: ignore[attr-defined]
            until=self.path_until,  # type: ignore[attr-defined]
        )

    def _refit(
        self, base: Any, path: Path, X: Any, y: Any, sample_weight: Any, checkpoint: str | FilePath | Checkpoints | None
    ) -> None:
        best = clone(base).set_params(beta_ratio=path.best_ratio)
        try:
            best.fit(X, y, sample_weight, init=path.factors, checkpoint=checkpoint)
        except InputError as error:
            # A view whose size depends on the data, such as PCA to a share of the variance, may have another one on
            # all of the training set: then there is nothing to start from.
            if not str(error).startswith("init: "):
                raise
            best.fit(X, y, sample_weight, checkpoint=checkpoint)
        self.best_estimator_ = best
        self.best_beta_ratio_ = path.best_ratio
        self.path_ = [step.as_dict() for step in path.steps]
        params = best.get_params(deep=False)
        # From here on this object is the refitted estimator: every method works on its state.
        self.__dict__.update({name: value for name, value in vars(best).items() if name not in params})

    def _checked(self, name: str, low: float) -> float:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low < value < np.inf:
            raise InputError(f"{name}: " + describe(repr(value), f"a number > {low:g}"))
        return float(value)

    def save(self, path: str | FilePath) -> None:
        """Write the refitted best estimator, as its ``save`` does; ``convexheads.load`` gives that estimator."""
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        self.best_estimator_.save(path)


EXTRA = ("beta_ratios", "validation", "path_tol", "path_until", "patience", "criterion")


def clone_values(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters for another estimator: transforms inside are cloned, so that nobody fits the user's objects."""
    return {name: clone(value, safe=False) for name, value in params.items()}


def normalised(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to one."""
    total = weights.sum()
    if not total > 0:
        raise InputError("sample_weight: " + describe("only zeros in one part of the split", "a positive sum in both"))
    return weights / total


def pair(validation_data: Any) -> tuple[Any, Any]:
    """(X_val, y_val), or InputError."""
    if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
        got = f"a {type(validation_data).__name__}"
        raise InputError("validation_data: " + describe(got, "a pair (X_val, y_val), or None"))
    return validation_data[0], validation_data[1]


def judged(judge: Problem, factors: Factors, loss: str, hard: bool) -> tuple[float, float]:
    """(score, loss) on a problem of validation samples: accuracy, R^2, or minus the loss for soft labels."""
    outputs: Tensor = judge.forward(factors).double()
    value = judge.loss.value(outputs, judge.targets, judge.weights)
    if loss == "squared":
        truth = judge.targets.reshape(-1, judge.outputs).cpu().numpy()
        predicted = outputs.reshape(-1, judge.outputs).cpu().numpy()
        weights = judge.weights.repeat_interleave(len(truth) // judge.n).cpu().numpy()
        # R^2 of a single sample is not defined.
        return (float(r2_score(truth, predicted, sample_weight=weights)) if len(truth) > 1 else -value), value
    if not hard:
        return -value, value
    hits = (outputs.argmax(-1) == judge.targets.argmax(-1)).double().reshape(judge.n, -1).mean(1)
    return float(hits @ judge.weights), value


def keep_path(kept: Checkpoint, steps: Sequence[PathStep], factors: Factors) -> None:
    """Write the steps of a path so far to its checkpoint, if it is time."""
    if kept.due:
        kept.save(factors, {"steps": [step.as_dict() for step in steps]})


def step_printer(verbose: int) -> Callable[[PathStep], None] | None:
    """A line for every finished step of a path, or None."""
    if not verbose or not distributed.current().first:
        return None

    def show(step: PathStep) -> None:
        print(
            f"path  beta {step.beta:.4g} ({step.beta_ratio:g} beta_max)  validation score {step.score:.4f}  "
            f"loss {step.loss:.4f}  gap {step.gap:.1e}  units {step.rank}  {step.seconds:.1f} s",
            flush=True,
        )

    return show


class ConvexHeadClassifierCV(_PathEstimator, ConvexHeadClassifier):
    """:class:`~convexheads.ConvexHeadClassifier` with beta chosen on validation data.

    Heads are fitted along descending shares of beta_max, each started from the one before, and judged on a part of
    the training set that is held out (or on data given to ``fit``); then the best share is fitted to the whole
    training set to ``tol``. Afterwards this object predicts, certifies, exports and saves as that last fit. With
    activation ``relu`` the gated heads are judged, and the last fit is converted.

    Parameters
    ----------
    beta_ratios : betas to try, as shares of beta_max.
    validation : share of the training set that is held out for the choice, class by class, seeded by
        ``random_state``.
    path_tol : relative duality gap of the fits on the path.
    path_until : "gap": these fits end there. "validation": or where two looks in a row find neither the validation
        score higher by 0.005 than before nor the loss lower by 0.5%: for large tokens, where the gap lags far behind.
    patience : stop the path once ``criterion`` has been worse than the best so far for this many betas in a row; None:
        try all.
    criterion : "score" chooses the beta of the highest score (see ``path_``), "loss" that of the lowest validation
        loss, which still tells betas apart where a few samples decide between the scores.
    head, activation, ... : as in :class:`~convexheads.ConvexHeadClassifier`, without ``beta`` and ``beta_ratio``.

    Attributes
    ----------
    best_beta_ratio_ : the share of beta_max that was chosen; ``beta_`` is this share of the full training set's
        ``beta_max_``.
    path_ : one dict a beta tried: ``beta``, ``beta_ratio``, ``score`` (validation accuracy; minus the validation loss
        for soft or several labels), ``loss`` (on validation data), ``objective``, ``gap`` (relative), ``rank``,
        ``seconds``.
    best_estimator_ : the refitted ConvexHeadClassifier.
    certificate_, blocks_, classes_, ... : those of ``best_estimator_``.
    """

    _base = ConvexHeadClassifier

    def __init__(
        self,
        head: Any = "self_attention",
        activation: str = "linear",
        gates: Any = 16,
        grid: tuple[int, int] | None = None,
        n_blocks: int = 4,
        pooling: str | None = "mean",
        fit_intercept: bool = True,
        tol: float = 1e-3,
        max_iter: int = 2000,
        max_rank: int | None = None,
        solver: str = "factored",
        random_state: Any = 0,
        device: str | None = None,
        dtype: str = "float32",
        verbose: int = 0,
        loss: str = "auto",
        label_smoothing: float = 0.0,
        class_weight: Any = None,
        relu_bound: str = "gated",
        memory_limit: int | str | None = None,
        beta_ratios: Any = DEFAULT_RATIOS,
        validation: float = 0.2,
        path_tol: float = 1e-2,
        path_until: str = "gap",
        patience: int | None = 2,
        criterion: str = "score",
        solver_options: dict[str, Any] | None = None,
    ) -> None:
        self.head = head
        self.activation = activation
        self.gates = gates
        self.grid = grid
        self.n_blocks = n_blocks
        self.pooling = pooling
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.max_rank = max_rank
        self.solver = solver
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.relu_bound = relu_bound
        self.memory_limit = memory_limit
        self.beta_ratios = beta_ratios
        self.validation = validation
        self.path_tol = path_tol
        self.path_until = path_until
        self.patience = patience
        self.criterion = criterion
        self.solver_options = solver_options

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        validation_data: Any = None,
        checkpoint: str | FilePath | Checkpoints | None = None,
    ) -> ConvexHeadClassifierCV:
        """Choose beta and fit.

        Parameters
        ----------
        X, y, sample_weight : as in :meth:`ConvexHeadClassifier.fit`.
        validation_data : (X_val, y_val) to choose beta on; all of X is trained on then. None: a share of X.
        checkpoint : as in :meth:`ConvexHeadClassifier.fit`. The path has a file of its own beside it, with ``.path``
            appended to the name, which is written between its fits.

        Raises
        ------
        InputError
            For tokens, labels, weights or parameters that cannot be used.

        Warns
        -----
        NotConvergedWarning
            If the refit stops above ``tol``.
        """
        with memory.limited(self.memory_limit):
            return self._fit_path(X, y, sample_weight, validation_data, checkpoint)


class ConvexHeadRegressorCV(_PathEstimator, ConvexHeadRegressor):
    """:class:`~convexheads.ConvexHeadRegressor` with beta chosen on validation data by R^2.

    Parameters and attributes as in :class:`ConvexHeadClassifierCV`; ``path_`` holds R^2 as ``score``.
    """

    _base = ConvexHeadRegressor

    def __init__(
        self,
        head: Any = "self_attention",
        activation: str = "linear",
        gates: Any = 16,
        grid: tuple[int, int] | None = None,
        n_blocks: int = 4,
        pooling: str | None = "mean",
        fit_intercept: bool = True,
        tol: float = 1e-3,
        max_iter: int = 2000,
        max_rank: int | None = None,
        solver: str = "factored",
        random_state: Any = 0,
        device: str | None = None,
        dtype: str = "float32",
        verbose: int = 0,
        relu_bound: str = "gated",
        memory_limit: int | str | None = None,
        beta_ratios: Any = DEFAULT_RATIOS,
        validation: float = 0.2,
        path_tol: float = 1e-2,
        path_until: str = "gap",
        patience: int | None = 2,
        criterion: str = "score",
        solver_options: dict[str, Any] | None = None,
    ) -> None:
        self.head = head
        self.activation = activation
        self.gates = gates
        self.grid = grid
        self.n_blocks = n_blocks
        self.pooling = pooling
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.max_rank = max_rank
        self.solver = solver
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.relu_bound = relu_bound
        self.memory_limit = memory_limit
        self.beta_ratios = beta_ratios
        self.validation = validation
        self.path_tol = path_tol
        self.path_until = path_until
        self.patience = patience
        self.criterion = criterion
        self.solver_options = solver_options

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        validation_data: Any = None,
        checkpoint: str | FilePath | Checkpoints | None = None,
    ) -> ConvexHeadRegressorCV:
        """Choose beta and fit; see :meth:`ConvexHeadClassifierCV.fit`."""
        with memory.limited(self.memory_limit):
            return self._fit_path(X, y, sample_weight, validation_data, checkpoint)
