"""Estimators in the scikit-learn manner: a thin face over problem, solver, certificate and heads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.metrics import r2_score
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, _get_feature_names, check_is_fitted, column_or_1d

from convexheads import distributed, memory
from convexheads.architectures import architecture_class
from convexheads.certification import check_same_gates, factors_of_weights
from convexheads.checkpoint import Checkpoint, Checkpoints, fingerprint_array, fingerprint_tokens
from convexheads.errors import InputError, NotConvergedWarning, describe, require
from convexheads.heads import Block, Branch, ConvexHead, canonical_blocks, make_branch
from convexheads.inputs import TokenRows, as_tokens, own_rows, shown
from convexheads.losses import make_loss
from convexheads.operator import split_rows
from convexheads.problem import Problem, Rows
from convexheads.relu import Bracket, check_cones, enumerate_gates, find_bracket
from convexheads.solvers import Solution, solver_function
from convexheads.solvers.polish import polish
from convexheads.subspace import beta_max, branch_scale
from convexheads.types import Factors, Units

DTYPES = {"float32": torch.float32, "float64": torch.float64}
RELU_BOUNDS = ("gated", "cones")
SMALL_PROBLEM = 500_000
"""Numbers in the tokens, counted for every gate, below which a tol below ``COARSE`` is iterated in float64."""
LEAST_PROBLEM = 5_000
"""The same below which iterations run in float64 whatever ``tol`` is."""
COARSE = 1e-4
TINY_PROBLEM = 5_000
"""Numbers in the tokens below which a solution within ``tol`` is polished to rounding."""


def resolve_device(device: str | torch.device | None) -> torch.device:
    """``None`` is the CPU; ``"auto"`` the first accelerator that torch finds."""
    if device is None:
        return torch.device("cpu")
    device = distributed.local_device(device)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "None, 'auto' or a torch device such as 'cuda'"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError("device: " + describe(repr(device), expected)) from error
    try:
        # Certificates need float64, which some accelerators (mps) do not have.
        torch.empty(1, dtype=torch.float64, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        got = f"{device!r}, which cannot be used here ({reason})"
        fix = "'auto' takes an accelerator where there is one."
        raise InputError("device: " + describe(got, expected, fix)) from error
    return found


def random_generator(random_state: Any) -> np.random.RandomState:
    """The generator of a ``random_state`` in scikit-learn's sense."""
    try:
        return check_random_state(random_state)
    except ValueError as error:
        raise InputError(
            "random_state: " + describe(repr(random_state), "None, an integer >= 0 or a numpy.random.RandomState")
        ) from error


class _ConvexHeadEstimator(BaseEstimator):
    """What the classifier and the regressor share. Parameters are documented there."""

    _loss_name: str

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.target_tags.multi_output = True
        return tags

    # Building the problem ---------------------------------------------------------------------------------

    def _head_options(self) -> list[dict[str, Any]]:
        heads = self.head if isinstance(self.head, (list, tuple)) else [self.head]
        if not heads:
            raise InputError("head: " + describe("an empty list", "at least one head"))
        common = {
            "activation": self.activation,
            "gates": self.gates,
            "grid": self.grid,
            "n_blocks": self.n_blocks,
        }
        found = []
        for head in heads:
            if isinstance(head, str):
                found.append({**common, "head": head})
            elif isinstance(head, Mapping):
                if "head" not in head:
                    raise InputError("head: " + describe(f"options {dict(head)}", "a key 'head' with the head's name"))
                for name in ("grid", "n_blocks"):
                    if head.get(name) is not None and name not in architecture_class(head["head"]).options:
                        raise InputError(
                            "head: "
                            + describe(
                                f"the option {name!r} for the head {head['head']!r}, which has no use for it",
                                f"options of {head['head']!r} only",
                                f"Leave {name!r} out.",
                            )
                        )
                found.append({**common, **head})
            else:
                raise InputError(
                    "head: " + describe(repr(head), "a name, a dict of options with the key 'head', or a list of them")
                )
        return found

    def _check_parameters(self) -> None:
        def number(name: str, *, above: float = 0.0, below: float = math.inf, none: bool = False) -> None:
            value = getattr(self, name)
            if value is None and none:
                return
            good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not good or not above < value < below:
                top = "" if below == math.inf else f" and < {below:g}"
                extra = ", or None" if none else ""
                raise InputError(f"{name}: " + describe(repr(value), f"a number > {above:g}{top}{extra}"))

        def count(name: str, *, none: bool = False) -> None:
            value = getattr(self, name)
            if value is None and none:
                return
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: " + describe(repr(value), "an integer >= 1" + (", or None" if none else "")))

        if not isinstance(self.relu_bound, str) or self.relu_bound not in RELU_BOUNDS:
            raise InputError("relu_bound: " + describe(repr(self.relu_bound), "'gated' or 'cones'"))
        number("beta", none=True)
        number("beta_ratio")
        number("tol")
        count("max_iter")
        count("max_rank", none=True)
        if self.pooling is not None and not (isinstance(self.pooling, str) and self.pooling == "mean"):
            raise InputError("pooling: " + describe(repr(self.pooling), "'mean', or None for token-level outputs"))
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise InputError("dtype: " + describe(repr(self.dtype), "'float32' or 'float64'"))
        if not isinstance(self.fit_intercept, (bool, np.bool_)):
            raise InputError("fit_intercept: " + describe(repr(self.fit_intercept), "True or False"))
        memory.parse_bytes(self.memory_limit)
        solver_function(self.solver).parse(self.solver_options)
        random_generator(self.random_state)
        resolve_device(self.device)

    def _build(self, X: Any, targets: np.ndarray, weights: np.ndarray, loss: str) -> tuple[Problem, list[Branch]]:
        """The problem for checked targets (n[, s], c) and sample weights (n,) that sum to one; beta is left at 1.

        It holds this worker's samples where several share the fit.
        """
        world = distributed.current()
        own_samples = world.rows(len(targets))
        tokens = as_tokens(X, check=False)
        if world.size > 1:
            tokens = own_rows(tokens, own_samples)
        if isinstance(tokens, TokenRows):
            tokens = TokenRows(tokens)  # reads them all once
        rng = np.random.default_rng(random_generator(self.random_state).randint(2**31 - 1))
        branches: list[Branch] = []
        rows: list[Rows] = []
        auto_weight = []
        for options in self._head_options():
            options = dict(options)
            view = options.get("view")
            own: torch.Tensor | TokenRows = tokens
            if view is not None:
                if not hasattr(view, "get_params") or not hasattr(view, "transform"):
                    raise InputError(
                        "view: " + describe(type(view).__name__, "a transform, such as those of convexheads.tokens")
                    )
                view = clone(view).fit(X)
                own = shown(view, X if world.size == 1 else tokens)
                options["view"] = view
            auto_weight.append(options.get("weight") is None)
            shape = (int(own.shape[1]), int(own.shape[2]))
            pooled = self.pooling is not None
            if _is_all(options.get("gates")) and options.get("activation") != "linear":
                options["gates"] = _all_gates(options, shape, targets.shape[-1], pooled, own)
            branches.append(make_branch(options, shape, targets.shape[-1], pooled, rng))
            rows.append(own)
        components = [c for index, branch in enumerate(branches) for c in branch.components(index)]
        size = max(len(targets) * int(np.prod(own.shape[1:])) for own in rows)
        size *= max(component.n_gates for component in components)
        # What float32 can tell: the gap of ridge branches is their gradient's, that of others a small difference.
        finest = 1e-10 if all(component.ridge for component in components) else 1e-6
        least = LEAST_PROBLEM if self.tol >= COARSE else SMALL_PROBLEM
        dtype = DTYPES[self.dtype] if size > least and self.tol >= finest else torch.float64
        problem = Problem(
            components,
            rows,
            make_loss(loss),
            torch.as_tensor(targets[own_samples]),
            torch.as_tensor(weights[own_samples]),
            1.0,
            bool(self.fit_intercept),
            dtype,
            resolve_device(self.device),
            world=world,
        )
        check_memory(problem)
        if len(branches) > 1 and any(auto_weight):
            self._balance(problem, branches, auto_weight)
        return problem, branches

    @staticmethod
    def _balance(problem: Problem, branches: list[Branch], auto: list[bool]) -> None:
        """Weights that give every branch the same beta_max, so that none is starved; the first branch has weight 1."""
        scales = [branch_scale(problem, index) for index in range(len(branches))]
        first = scales[0] if scales[0] > 0 else 1.0
        for index, (branch, scale) in enumerate(zip(branches, scales, strict=True)):
            if auto[index] and scale > 0:
                branch.weight = scale / first
                for component in problem.components:
                    if component.branch == index:
                        component.weight = branch.weight

    def _fit_problem(
        self,
        X: Any,
        targets: np.ndarray,
        weights: np.ndarray,
        loss: str,
        init: Any,
        checkpoint: str | Path | Checkpoints | None = None,
    ) -> Any:
        self._check_parameters()
        covered = self._covers_all_patterns()
        problem, branches = self._build(X, targets, weights, loss)
        network = None
        if any(branch.activation == "relu" for branch in branches):
            components = [c for index, branch in enumerate(branches) for c in branch.network().components(index)]
            network = problem.with_components(components)
            check_cones(problem, network)
        self.beta_max_ = beta_max(problem)
        beta = self.beta if self.beta is not None else self.beta_ratio * self.beta_max_
        # beta_max = 0 means that the tokens carry no signal: any beta gives the empty head.
        problem = problem.with_beta(float(beta) if beta > 0 else float(self.beta_ratio))
        seed = int(random_generator(self.random_state).randint(2**31 - 1))
        show = _printer(self.verbose)
        start, resumed, watch = initial_factors(init, branches), False, show
        kept = None
        if checkpoint is not None:
            kept = Checkpoint(
                Checkpoints.of(checkpoint),
                lambda: problem_fingerprint(X, targets, weights, problem, branches),
                problem.world,
            )
            found = kept.load()
            if found is not None:
                start, resumed = initial_factors(on_device(found[0], problem.device), branches), True
                if self.verbose:
                    print(f"goes on from {kept.path}: iteration {found[1]['iteration']}, gap {found[1]['gap']:.2e}")
            watch = _both(show, kept.progress)
        solver = solver_function(self.solver)
        solution = solver(
            problem,
            tol=float(self.tol),
            max_iter=int(self.max_iter),
            max_rank=None if self.max_rank is None else int(self.max_rank),
            random_state=seed,
            init=start,
            progress=watch,
            resumed=resumed,
            options=self.solver_options,
        )
        if kept is not None:
            gap = solution.certificate.relative_gap
            state = {"iteration": solution.n_iter, "objective": solution.certificate.primal, "gap": gap}
            kept.save(solution.factors, {**state, "rank": solution.factors.n_units})
        size = problem.n * max(int(np.prod(t.shape[1:])) for t in problem.tokens)
        # A trained network stays as training left it.
        if size <= TINY_PROBLEM and solution.converged and solver.promises_tol:
            solution = polish(problem, solution)
        self._network: Factors | None = None
        self.bracket_: Bracket | None = None
        if network is not None:
            units, self.bracket_ = find_bracket(
                problem,
                network.with_beta(problem.beta),
                solution.factors,
                solution.certificate,
                covers_all_patterns=covered,
                bound=self.relu_bound,
                steps=int(self.max_iter),
                tol=min(1e-6, 1e-3 * float(self.tol)),
            )
            self._network = on_device(units, "cpu")
        self._keep(problem, branches, solution, loss)
        if not solution.converged:
            warnings.warn(not_converged(solution, float(self.tol)), NotConvergedWarning, stacklevel=3)
        return self

    def _covers_all_patterns(self) -> bool:
        """Whether every ReLU head was asked to have the gates of all patterns."""
        heads = [options for options in self._head_options() if options["activation"] == "relu"]
        heads = [options for options in heads if not architecture_class(options["head"]).ridge]
        covered = all(_is_all(options["gates"]) for options in heads)
        if heads and self.relu_bound == "cones" and not covered:
            raise InputError(
                "relu_bound: "
                + describe(
                    "'cones' with sampled or given gates, for which no lower bound holds",
                    "gates='all' beside it",
                    "That enumerates all patterns, which takes tiny data; or use relu_bound='gated'.",
                )
            )
        if heads and self.relu_bound == "cones":
            require("cvxpy", "relu")
        return covered

    def _keep(self, problem: Problem, branches: list[Branch], solution: Solution, loss: str) -> None:
        self.loss_ = loss
        self.beta_ = problem.beta
        self.certificate_ = solution.certificate
        # A start that is found to be optimal counts, too: scikit-learn asks for at least one.
        self.n_iter_ = max(1, solution.n_iter)
        self.history_ = solution.history.as_dict()
        self.message_ = solution.message
        self.runs_ = solution.stats.get("runs", [])
        self._branches = branches
        self._factors = Factors(
            [units.to(torch.float64) for units in solution.factors.units], solution.factors.intercept
        ).to(torch.float64)
        self._factors = on_device(self._factors, "cpu")
        for branch in branches:
            branch.gates = [None if g is None else g.cpu() for g in branch.gates]
        # A problem small enough to be solved in float64 is evaluated in it, too.
        self._precision = problem.dtype

    # Fitted attributes ------------------------------------------------------------------------------------

    @property
    def blocks_(self) -> list[Block]:
        """One block a (branch, channel group, gate), in that order of nesting, in canonical form."""
        check_is_fitted(self)
        components = [c for index, branch in enumerate(self._branches) for c in branch.components(index)]
        return canonical_blocks(components, self._factors)

    @property
    def rank_(self) -> int:
        """Total number of units."""
        return sum(len(block.singular_values) for block in self.blocks_)

    @property
    def intercept_(self) -> np.ndarray | None:
        """The intercept (c,), or None: that of the head that predicts."""
        check_is_fitted(self)
        intercept = (self._factors if self._network is None else self._network).intercept
        return None if intercept is None else intercept.numpy().copy()

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_factors")

    def to_module(self, dtype: torch.dtype | None = None) -> ConvexHead:
        """The head as a torch.nn.Module: (n, s, d) -> logits (n, c), or (n, s, c), of a classifier; predictions of a
        regressor. With activation ``relu`` it is the ReLU network, not the gated head of ``blocks_``.

        Parameters
        ----------
        dtype : dtype of the weights; default: the estimator's ``dtype``.
        """
        check_is_fitted(self)
        branches, factors = self._branches, self._factors
        if self._network is not None:
            branches, factors = [branch.network() for branch in branches], self._network
        return ConvexHead(branches, factors, DTYPES[self.dtype] if dtype is None else dtype, self.beta_).eval()

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs (n[, s], c) in chunks of samples."""
        check_is_fitted(self)
        self._check_columns(X)
        with memory.limited(self.memory_limit) as budget:
            tokens = as_tokens(X)
        self._check_tokens(tuple(tokens.shape))
        module = self.to_module(self._precision).to(resolve_device(self.device))
        weight = next(module.parameters())
        n_units = (self._factors if self._network is None else self._network).n_units
        entries = int(np.prod(tokens.shape[1:])) * max(1, n_units)
        step = max(16 if budget.limit is None else 1, min(1024, 32 * budget.workspace // entries))
        with torch.no_grad():
            return budget.gathered(
                split_rows(int(tokens.shape[0]), step),
                lambda rows: module(tokens[rows].to(weight.device, weight.dtype)).double().cpu(),
            ).numpy()

    def _check_tokens(self, shape: tuple[int, ...]) -> None:
        if shape[2] != self.n_features_in_:
            raise InputError(
                f"X has {shape[2]} features, but {type(self).__name__} is expecting {self.n_features_in_} features as "
                "input. Give the tokens the same transforms as in fit"
            )
        if shape[1] != self.n_tokens_in_:
            raise InputError(
                "X: "
                + describe(
                    f"{shape[1]} tokens a sample",
                    f"{self.n_tokens_in_} as in fit",
                    "Extract with the same resolution and token choice.",
                )
            )

    def _check_columns(self, X: Any) -> None:
        names = _get_feature_names(X)
        fitted = getattr(self, "feature_names_in_", None)
        if names is None and fitted is None:
            return
        from sklearn.utils.validation import _check_feature_names

        _check_feature_names(self, X, reset=False)

    def _remember_input(self, X: Any) -> tuple[int, ...]:
        from sklearn.utils.validation import _check_feature_names

        _check_feature_names(self, X, reset=True)
        # Tokens on disk are looked through when the problem is built.
        tokens = as_tokens(X, check=False)
        shape = tuple(int(size) for size in tokens.shape)
        self.n_features_in_ = shape[2]
        self.n_tokens_in_ = shape[1]
        return shape

    def _sample_weights(self, sample_weight: Any, X: Any, n: int, extra: np.ndarray | None = None) -> np.ndarray:
        """Weights (n,) that sum to one."""
        if sample_weight is None:
            weights = np.ones(n)
        else:
            try:
                weights = _check_sample_weight(
                    sample_weight, np.empty((n, 1)), dtype=np.float64, ensure_non_negative=True
                )
            except ValueError as error:
                reason = str(error).rstrip(".!")
                raise InputError(
                    "sample_weight: " + describe(f"unusable weights ({reason})", f"({n},) finite weights >= 0")
                ) from error
        if extra is not None:
            weights = weights * extra
        if not weights.sum() > 0:
            raise InputError(
                "sample_weight: " + describe("weights that are all zero, class weights included", "a positive sum")
            )
        return weights / weights.sum()

    # Saving -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one file: safetensors with a JSON header, no pickle, atomically.

        Raises
        ------
        InputError
            If the estimator is not fitted or has a view that cannot describe itself.
        DataError
            If the file cannot be written; an older file at ``path`` stays as it was.
        """
        from convexheads.storage import save_estimator

        check_is_fitted(self)
        save_estimator(self, path)


def _is_all(gates: Any) -> bool:
    return isinstance(gates, str) and gates == "all"


def _all_gates(
    options: dict[str, Any], shape: tuple[int, int], outputs: int, pooled: bool, tokens: torch.Tensor | TokenRows
) -> list[Any] | int:
    """Gates of all patterns on these tokens, as ``gates`` takes them; ridge heads have none."""
    probe = make_branch({**options, "activation": "relu", "gates": 1}, shape, outputs, pooled, np.random.default_rng(0))
    components = probe.network().components(0)
    if components[0].ridge:
        return 1
    X = tokens[0 : tokens.shape[0]]
    found = [enumerate_gates(component.form, X[..., component.inputs]) for component in components]
    return found if len(found) > 1 else list(found[0])


def check_memory(problem: Problem) -> None:
    """Raise InputError if what no chunk can make smaller does not fit into the memory limit."""
    limit = problem.budget.limit
    if limit is None:
        return
    needed = memory.least_limit(problem.fixed_bytes)
    if needed > limit:
        largest = max(((c.p, c.q) for c in problem.components if not c.ridge), default=(0, 0))
        raise InputError(
            "memory_limit: "
            + describe(
                memory.readable(limit),
                f"at least {memory.readable(needed)}: for the outputs of {problem.local} samples and a block of "
                f"{largest[0]} x {largest[1]}",
                "Raise it, spread the fit over several workers, or reduce the features.",
            )
        )


def on_device(factors: Factors, device: torch.device | str) -> Factors:
    """The factors, detached, on a device."""
    units = [
        Units(
            None if u.u is None else u.u.detach().to(device),
            u.v.detach().to(device),
            None if u.gate is None else u.gate.to(device),
        )
        for u in factors.units
    ]
    return Factors(units, None if factors.intercept is None else factors.intercept.detach().to(device))


def initial_factors(init: Any, branches: list[Branch]) -> Factors | None:
    """Factors to start from, out of a fitted estimator, a module, or weights by name of the same heads."""
    if init is None:
        return None
    if isinstance(init, Mapping):
        if len(branches) != 1:
            got = f"weights by name for {len(branches)} heads"
            raise InputError("init: " + describe(got, "a fitted estimator or a module, for a sum of heads"))
        return factors_of_weights(init, branches[0])
    factors = init if isinstance(init, Factors) else getattr(init, "_factors", None)
    if factors is None and isinstance(init, ConvexHead):
        factors = init.factors()
    if factors is None:
        expected = "a fitted estimator, a ConvexHead module, or a dict of weights u and v"
        raise InputError("init: " + describe(type(init).__name__, expected))
    shapes = [(c.form.u_shape, (c.form.value_width, c.width)) for i, b in enumerate(branches) for c in b.components(i)]
    given = [(() if u.u is None else tuple(u.u.shape[1:]), tuple(u.v.shape[1:])) for u in factors.units]
    if shapes == given:
        _check_gates_of(
            factors,
            [c.n_gates if c.gates is not None else None for i, b in enumerate(branches) for c in b.components(i)],
        )
    if shapes != given:
        raise InputError(
            "init: " + describe(f"units of shapes {given}", f"{shapes}, the same heads on the same tokens")
        )
    own = init.resolved_branches() if isinstance(init, ConvexHead) else getattr(init, "_branches", None)
    if own is not None:
        check_same_gates(own, branches)
    return factors


def _check_gates_of(factors: Factors, counts: list[int | None]) -> None:
    """Raise InputError unless every unit's gate is one of the component's, or there are none on both sides."""
    for units, count in zip(factors.units, counts, strict=True):
        gate = units.gate
        highest = -1 if gate is None or not len(gate) else int(gate.max())
        if (gate is None) != (count is None) or highest >= (count or 1):
            got = "units without gates" if gate is None else f"units of {highest + 1} gates"
            expected = "none" if count is None else f"at most {count}, the same heads with the same gates"
            raise InputError("init: " + describe(got, expected))


def not_converged(solution: Solution, tol: float) -> str:
    """The warning of a fit that stopped early: the gap it reached, and what to change."""
    certificate = solution.certificate
    return (
        f"the fit stopped at a relative gap of {certificate.relative_gap:.2e}, above tol = {tol:g} "
        f"({solution.message}). The objective is at most {certificate.gap:.2e} above the global optimum. "
        f"{solution.advice}"
    )


def problem_fingerprint(
    X: Any, targets: np.ndarray, weights: np.ndarray, problem: Problem, branches: list[Branch]
) -> dict[str, Any]:
    """What identifies a fit's problem, for its checkpoint: tokens, targets and weights of all samples, heads, beta."""
    heads = []
    for branch in branches:
        gates = [None if g is None else fingerprint_array(g.cpu().numpy()) for g in branch.gates]
        view = branch.view
        # The parameters, not what was learned: that may differ by rounding.
        shown_by = view.__repr__(N_CHAR_MAX=10**6) if isinstance(view, BaseEstimator) else type(view).__name__
        heads.append({**branch.config(), "gates": gates, "view": shown_by})
    return {
        "tokens": fingerprint_tokens(X),
        "targets": fingerprint_array(targets),
        "sample_weight": fingerprint_array(weights),
        "heads": heads,
        "loss": problem.own_loss.name,
        "fit_intercept": problem.fit_intercept,
        "beta": float(problem.beta),
    }


def _both(first: Callable[[dict], None] | None, second: Callable[[dict], None]) -> Callable[[dict], None]:
    def call(state: dict) -> None:
        if first is not None:
            first(state)
        second(state)

    return call


def _printer(verbose: int) -> Callable[[dict], None] | None:
    if not verbose or not distributed.current().first:
        return None

    def show(state: dict) -> None:
        print(
            f"iteration {state['iteration']:5d}  objective {state['objective']:.6f}  gap {state['gap']:.2e}  "
            f"units {state['rank']:4d}  {state['seconds']:7.1f} s",
            flush=True,
        )

    return show


class ConvexHeadClassifier(ClassifierMixin, _ConvexHeadEstimator):
    """A head on frozen tokens, trained as a convex program to certified global optimality.

    Parameters
    ----------
    head : ``self_attention``, ``mixer``, ``fno``, ``block_fno``, ``mlp`` or ``linear``; or a list of heads, whose sum
        is fitted: names, or dicts with the key ``head`` and any of ``activation``, ``gates``, ``grid``, ``n_blocks``,
        ``weight`` (multiplies beta for this branch; None: chosen so that every branch has the same beta_max) and
        ``view`` (a transform that is fitted with the branch and gives it its own tokens).
    activation : ``linear``, ``gated_relu``, or ``relu``: the program of ``gated_relu``, whose solution is converted
        into a ReLU network and refined; this network predicts, and ``bracket_`` bounds its global optimum.
    gates : number of random gates, or the gates: a sequence of arrays of u's shape (block_fno: one a block), or
        ``all``: one for every pattern that a ReLU unit can have on the training set, for tiny data only.
    grid : (h, w) with h * w = s: two-dimensional shifts for FNO heads; None: one-dimensional.
    n_blocks : block_fno only: number of channel groups; divides d and c.
    pooling : ``mean`` over tokens, or None for token-level outputs and labels (n, s).
    beta : weight decay (beta/2) (||u||^2 + ||v||^2); None: ``beta_ratio`` times ``beta_max_``.
    beta_ratio : used where ``beta`` is None.
    fit_intercept : whether to fit an unpenalised intercept.
    tol : relative duality gap (gap / primal) at which fitting stops; tiny problems are then solved to rounding, which
        costs nothing there and makes the result independent of the order of the samples.
    max_iter : most iterations of the solver.
    max_rank : most units in all, or None.
    solver : ``factored``, or ``fista`` (dense, the reference for small sizes); or, as baselines that train the
        non-convex network and need not reach ``tol``, ``adamw`` (``max_iter`` then bounds its epochs) or ``lbfgs``.
    random_state : seed of gates and starting point.
    device : None (CPU), ``auto`` or a torch device.
    dtype : of iterations and module, ``float32`` or ``float64``; certificates always use float64.
    verbose : 1 prints a line at every check of the gap.
    loss : ``auto``, ``cross_entropy`` or ``multilabel_logistic``; auto takes the second for 0/1 indicators (n, c).
    label_smoothing : share in [0, 1) of every label's mass that is spread over all classes.
    class_weight : None, ``balanced`` or a dict from class to weight; multiplies the sample weights.
    solver_options : dict of options of the solver, or None. ``adamw``: ``learning_rates``, ``epochs``,
        ``batch_size``, ``units``, ``seeds``, ``checks``; ``lbfgs``: ``units``, ``seeds``, ``checks``; see
        :class:`~convexheads.solvers.training.AdamWOptions`. The other solvers have none.
    relu_bound : with ``activation="relu"``: ``gated`` takes the gated program as lower bound; ``cones`` (with
        ``gates="all"`` and the extra ``relu``) a tighter one, by a semidefinite program.
    memory_limit : bytes, or text such as ``"4GB"``, that a fit may add to the memory of the process; None: no limit,
        but 3 GiB for what is kept of each sample. Tokens given as an array are the caller's and do not count; memory
        maps and token stores are read in parts. What does not fit goes to a temporary file beside the tokens.

    Attributes
    ----------
    certificate_ : :class:`~convexheads.certificate.Certificate` of the fit; with activation ``relu`` of the gated
        program, as are ``blocks_`` and ``rank_``.
    bracket_ : :class:`~convexheads.relu.Bracket` of the ReLU network's global optimum, None for other activations.
    beta_, beta_max_ : the weight decay used, and the smallest one with an empty head.
    classes_, n_features_in_, n_tokens_in_ : c class labels, d and s.
    intercept_ : (c,) or None.
    n_iter_, history_ : iterations (at least 1), and objective, gap, seconds and rank at every check.
    blocks_, rank_ : canonical heads, and their number.
    runs_ : with ``adamw`` and ``lbfgs``, one dict a trained network: learning rate, seed, objective, gaps, seconds and
        history; not saved.
    """

    def __init__(
        self,
        head: Any = "self_attention",
        activation: str = "linear",
        gates: Any = 16,
        grid: tuple[int, int] | None = None,
        n_blocks: int = 4,
        pooling: str | None = "mean",
        beta: float | None = None,
        beta_ratio: float = 0.02,
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
        solver_options: dict[str, Any] | None = None,
        relu_bound: str = "gated",
        memory_limit: int | str | None = None,
    ) -> None:
        self.head = head
        self.activation = activation
        self.gates = gates
        self.grid = grid
        self.n_blocks = n_blocks
        self.pooling = pooling
        self.beta = beta
        self.beta_ratio = beta_ratio
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
        self.solver_options = solver_options
        self.relu_bound = relu_bound
        self.memory_limit = memory_limit

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # scikit-learn's checks ask for scores that suit vectors; on a single token, a head that mixes tokens is a
        # cubic in it (self-attention) or much the same as mlp, and the scores are what they are.
        tags.classifier_tags.poor_score = self.head not in ("linear", "mlp")
        return tags

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        init: Any = None,
        checkpoint: str | Path | Checkpoints | None = None,
    ) -> ConvexHeadClassifier:
        """Fit to tokens X (n, s, d), or (n, d) taken as one token.

        Parameters
        ----------
        y : class labels (n,), or (n, s) where ``pooling`` is None; soft labels (n, c) whose rows sum to one; or 0/1
            indicators (n, c) for several labels a sample.
        sample_weight : (n,) non-negative, or None.
        init : fitted estimator, module, or dict of weights by name (see :func:`~convexheads.certify`) of the same
            heads and gates to start from; None: random units.
        checkpoint : file that the factors are written to once a minute, and at the end; where it is there already, the
            fit goes on from it. None: no such file.

        Inside ``with convexheads.distributed.joined():`` the samples are spread over the workers that torchrun has
        started; each of them is given all of X and y, and reads its own part of X.

        Raises
        ------
        InputError
            For tokens, labels, weights or parameters that cannot be used, or a checkpoint of another problem; the
            message says what to do.

        Warns
        -----
        NotConvergedWarning
            If the gap reached is above ``tol``.
        """
        with memory.limited(self.memory_limit):
            targets, weights, loss = self.encode(X, y, sample_weight)
            return self._fit_problem(X, targets, weights, loss, init, checkpoint)

    def encode(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[np.ndarray, np.ndarray, str]:
        """Targets (n[, s], c), sample weights (n,) that sum to one, and the loss; sets ``classes_``."""
        if y is None:
            raise InputError("y: requires y to be passed, but the target y is None. Give one label a sample")
        shape = self._remember_input(X)
        y = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            raise InputError("y: " + describe("NaN or infinity (inf)", "one finite label for every sample"))
        if y.ndim == 0 or len(y) != shape[0]:
            got = f"{len(y)} labels" if y.ndim else f"one label, {y.item()!r}"
            raise InputError("y: " + describe(got, f"n = {shape[0]}, one for every sample of X"))
        smoothing = self.label_smoothing
        if not isinstance(smoothing, Real) or isinstance(smoothing, bool) or not 0 <= smoothing < 1:
            raise InputError("label_smoothing: " + describe(repr(self.label_smoothing), "a number in [0, 1)"))
        targets, loss, per_sample = self._targets(y, shape)
        extra = None
        if self.class_weight is not None:
            if per_sample is None:
                raise InputError("class_weight: " + describe("soft or several labels", "one hard label a sample"))
            extra = self._class_weights(per_sample)
        weights = self._sample_weights(sample_weight, X, shape[0], extra)
        if self.label_smoothing:
            eps, c = float(self.label_smoothing), targets.shape[-1]
            targets = (1 - eps) * targets + (eps / c if loss == "cross_entropy" else eps / 2)
        return targets, weights, loss

    def _class_weights(self, per_sample: np.ndarray) -> np.ndarray:
        """The weight of every sample's class (n,)."""
        try:
            weights = compute_sample_weight(self.class_weight, self.classes_[per_sample])
        except ValueError as error:
            raise InputError(
                "class_weight: "
                + describe(
                    f"{self.class_weight!r} ({error})",
                    f"None, 'balanced' or a dict from classes to weights, classes among {self.classes_.tolist()}",
                )
            ) from error
        if not np.isfinite(weights).all() or weights.min() < 0:
            raise InputError("class_weight: " + describe(repr(self.class_weight), "finite weights >= 0"))
        return weights

    def _targets(self, y: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str, np.ndarray | None]:
        if not isinstance(self.loss, str) or self.loss not in ("auto", "cross_entropy", "multilabel_logistic"):
            raise InputError("loss: " + describe(repr(self.loss), "'auto', 'cross_entropy' or 'multilabel_logistic'"))
        token_level = self.pooling is None
        label_ndim = 2 if token_level else 1
        if not token_level and y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        self._indicator = False
        if y.ndim == label_ndim and self.loss != "multilabel_logistic":
            if token_level and y.shape[1] != shape[1]:
                raise InputError("y: " + describe(f"{y.shape[1]} labels a sample", f"s = {shape[1]}, one a token"))
            try:
                check_classification_targets(y.reshape(-1))
            except ValueError as error:
                raise InputError(
                    "y: "
                    + describe(
                        str(error).partition(". ")[0],
                        "class labels: integers, strings or booleans, all of one kind",
                        "Use ConvexHeadRegressor for numbers to predict.",
                    )
                ) from error
            encoder = LabelEncoder().fit(y.reshape(-1))
            self.classes_ = encoder.classes_
            if len(self.classes_) < 2:
                raise InputError(
                    "y: "
                    + describe(
                        f"one class ({self.classes_.tolist()[0]!r})",
                        "at least 2 classes",
                        "The classifier needs samples of every class that it should tell apart.",
                    )
                )
            index = encoder.transform(y.reshape(-1)).reshape(y.shape)
            return np.eye(len(self.classes_))[index], "cross_entropy", index if label_ndim == 1 else None
        wanted = (
            f"labels {'(n, s)' if token_level else '(n,)'}, or soft labels or 0/1 indicators "
            f"{'(n, s, c)' if token_level else '(n, c)'} with values in [0, 1]"
        )
        if y.ndim != label_ndim + 1 or y.dtype.kind not in "fiub" or 0 in y.shape:
            raise InputError(
                "y: " + describe(f"shape {y.shape} of dtype {y.dtype} for pooling={self.pooling!r}", wanted)
            )
        if token_level and y.shape[1] != shape[1]:
            raise InputError("y: " + describe(f"{y.shape[1]} labels a sample", f"s = {shape[1]}, one a token"))
        values = y.astype(np.float64)
        if values.min() < 0 or values.max() > 1:
            raise InputError(
                "y: " + describe(f"shape {y.shape} with values in [{values.min():g}, {values.max():g}]", wanted)
            )
        self.classes_ = np.arange(y.shape[-1])
        indicator = type_of_target(y.reshape(-1, y.shape[-1])) == "multilabel-indicator"
        sums = np.allclose(values.sum(-1), 1.0, atol=1e-6)
        loss = self.loss
        if loss == "auto":
            loss = "cross_entropy" if sums and not indicator else "multilabel_logistic"
        if loss == "cross_entropy":
            if not sums:
                raise InputError("y: " + describe("soft labels whose rows do not sum to one", "rows that sum to one"))
            values = values / values.sum(-1, keepdims=True)
        self._indicator = loss == "multilabel_logistic"
        return values, loss, None

    def logits(self, X: Any) -> np.ndarray:
        """Logits (n, c), or (n, s, c) for token-level outputs: what ``to_module()`` computes."""
        return self._outputs(X)

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n, c), or (n, s, c) for token-level outputs.

        For two exclusive classes and plain features X (n, d), which is scikit-learn's own ground, it is (n,), the
        second class's logit minus the first's, as scikit-learn expects of a binary classifier; tokens (n, s, d) always
        give all columns, and ``logits`` does so for any X.
        """
        logits = self._outputs(X)
        if logits.shape[1:] == (2,) and not self._indicator and len(np.shape(X)) == 2:
            return logits[:, 1] - logits[:, 0]
        return logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, of the shape of ``decision_function``."""
        logits = torch.from_numpy(self._outputs(X))
        return (torch.sigmoid(logits) if self._indicator else torch.softmax(logits, -1)).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Predicted labels (n,), or (n, s) for token-level outputs; indicators (n, c) for several labels."""
        logits = self._outputs(X)
        if self._indicator:
            return (logits > 0).astype(int)
        return self.classes_[logits.argmax(-1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Mean accuracy on labels (n,), or (n, s) counted token by token."""
        if self.pooling is None:
            hits = (self.predict(X) == np.asarray(y)).mean(1)
            return float(np.average(hits, weights=sample_weight))
        return float(super().score(X, y, sample_weight))


class ConvexHeadRegressor(RegressorMixin, _ConvexHeadEstimator):
    """As :class:`ConvexHeadClassifier`, with the squared loss (1/2n) sum of squared residuals.

    ``fit`` takes y (n,), (n, c), or (n, s, c) where ``pooling`` is None; ``predict`` returns the same shape.
    """

    def __init__(
        self,
        head: Any = "self_attention",
        activation: str = "linear",
        gates: Any = 16,
        grid: tuple[int, int] | None = None,
        n_blocks: int = 4,
        pooling: str | None = "mean",
        beta: float | None = None,
        beta_ratio: float = 0.02,
        fit_intercept: bool = True,
        tol: float = 1e-3,
        max_iter: int = 2000,
        max_rank: int | None = None,
        solver: str = "factored",
        random_state: Any = 0,
        device: str | None = None,
        dtype: str = "float32",
        verbose: int = 0,
        solver_options: dict[str, Any] | None = None,
        relu_bound: str = "gated",
        memory_limit: int | str | None = None,
    ) -> None:
        self.head = head
        self.activation = activation
        self.gates = gates
        self.grid = grid
        self.n_blocks = n_blocks
        self.pooling = pooling
        self.beta = beta
        self.beta_ratio = beta_ratio
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.max_rank = max_rank
        self.solver = solver
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose
        self.solver_options = solver_options
        self.relu_bound = relu_bound
        self.memory_limit = memory_limit

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        init: Any = None,
        checkpoint: str | Path | Checkpoints | None = None,
    ) -> ConvexHeadRegressor:
        """Fit to tokens X (n, s, d), or (n, d) taken as one token; see the class for y.

        ``sample_weight``, ``init`` and ``checkpoint`` are as in :meth:`ConvexHeadClassifier.fit`.
        """
        with memory.limited(self.memory_limit):
            targets, weights, loss = self.encode(X, y, sample_weight)
            return self._fit_problem(X, targets, weights, loss, init, checkpoint)

    def encode(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[np.ndarray, np.ndarray, str]:
        """Targets (n[, s], c), sample weights (n,) that sum to one, and the loss."""
        if y is None:
            raise InputError("y: requires y to be passed, but the target y is None. Give one value a sample")
        shape = self._remember_input(X)
        y = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
        if np.iscomplexobj(y):
            raise InputError("y: " + describe("complex values", "real values"))
        try:
            values = y.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                "y: " + describe(f"dtype {y.dtype}", "numbers", "Use ConvexHeadClassifier for labels.")
            ) from error
        if not np.isfinite(values).all():
            raise InputError("y: " + describe("NaN or infinity (inf)", "finite values"))
        if y.ndim == 0 or len(y) != shape[0]:
            got = f"{len(y)} targets" if y.ndim else f"one target, {y.item()!r}"
            raise InputError("y: " + describe(got, f"n = {shape[0]}, one for every sample of X"))
        if 0 in y.shape:
            raise InputError("y: " + describe(f"shape {y.shape}", "at least one value a sample"))
        token_level = self.pooling is None
        if token_level and (y.ndim != 3 or y.shape[1] != shape[1]):
            raise InputError("y: " + describe(f"shape {y.shape}", f"(n, s, c) with s = {shape[1]} for pooling=None"))
        if not token_level and y.ndim not in (1, 2):
            raise InputError("y: " + describe(f"shape {y.shape}", "(n,) or (n, c) for pooling='mean'"))
        self._flat_target = y.ndim == 1
        weights = self._sample_weights(sample_weight, X, shape[0])
        return values[:, None] if self._flat_target else values, weights, "squared"

    def predict(self, X: Any) -> np.ndarray:
        """Predictions, of the shape of y in fit: what ``to_module()`` computes, without the last axis for y (n,)."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat_target else outputs

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Coefficient of determination R^2; token-level outputs count every token."""
        predicted, truth = self.predict(X), np.asarray(y)
        if truth.ndim == 3:
            if sample_weight is not None:
                sample_weight = np.repeat(sample_weight, truth.shape[1])
            truth, predicted = truth.reshape(-1, truth.shape[-1]), predicted.reshape(-1, truth.shape[-1])
        return float(r2_score(truth, predicted, sample_weight=sample_weight))


def load(path: str | Path) -> ConvexHeadClassifier | ConvexHeadRegressor:
    """Read an estimator written by ``save``; runs no code from the file.

    Raises
    ------
    DataError
        If the file is missing, truncated or not one of ours.
    """
    from convexheads.storage import load_estimator

    return load_estimator(path)
