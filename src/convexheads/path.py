"""A path of fits from large to small beta, each started from the one before, judged on validation data.

One problem serves the whole path: only beta changes, so tokens and cached statistics are shared, and the solution
at one beta is a good start for the next. The path is walked at a loose tolerance, because all it has to tell is
which beta generalises best; the winner is refitted tightly by whoever asked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from convexheads.errors import InputError, describe
from convexheads.problem import Problem
from convexheads.solvers import Solution, solver_function
from convexheads.types import Factors, Units

DEFAULT_RATIOS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
CRITERIA = ("score", "loss")
"""What the best step of a path has: the highest validation score, or the lowest validation loss."""
ENDS = ("gap", "validation")
"""Where the fit of a step ends: at a duality gap, or where the validation data see no more improvement, too."""
IMPROVED, LOOKS = 5e-3, 2
"""Rise of the score, or fall of the loss as a share of it, that counts as one, and looks in a row without it that end
a fit."""


@dataclass(frozen=True)
class PathStep:
    """One beta of a path.

    Attributes
    ----------
    beta, beta_ratio : weight decay, and its share of beta_max.
    score : validation score, higher is better.
    loss : validation loss.
    objective, gap, rank : training objective, relative duality gap and number of units of the fit.
    seconds : wall-clock time of the fit and its evaluation.
    """

    beta: float
    beta_ratio: float
    score: float
    loss: float
    objective: float
    gap: float
    rank: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass
class Path:
    """The steps of a path in the order in which they were walked, and the factors of the best one by ``criterion``."""

    criterion: str = "score"
    steps: list[PathStep] = field(default_factory=list)
    best: int = 0
    factors: Factors | None = None
    stopped_early: bool = False
    below: int = 0

    def add(self, step: PathStep, factors: Factors) -> None:
        """Take in the next step; ``below`` counts those since one as good as the best by the criterion."""
        self.steps.append(step)
        if self.factors is None or self.merits(step) > self.merits(self.steps[self.best]):
            self.best, self.factors = len(self.steps) - 1, factors
        self.below = self.below + 1 if self.merits(step)[0] < self.merits(self.steps[self.best])[0] else 0

    def merits(self, step: PathStep) -> tuple[float, float]:
        """What steps are compared by, higher is better: the criterion, then the other one."""
        return (step.score, -step.loss) if self.criterion == "score" else (-step.loss, step.score)

    @property
    def best_ratio(self) -> float:
        """beta / beta_max of the best step."""
        return self.steps[self.best].beta_ratio


def check_ratios(ratios: Any) -> tuple[float, ...]:
    """The ratios as floats in descending order.

    Raises
    ------
    InputError
        Unless they are a non-empty sequence of positive finite numbers.
    """
    expected = "a sequence of positive numbers such as (0.3, 0.1, 0.05)"
    try:
        found = tuple(float(ratio) for ratio in ratios)
    except (TypeError, ValueError) as error:
        raise InputError("beta_ratios: " + describe(repr(ratios), expected)) from error
    if not found or not all(0 < ratio < float("inf") for ratio in found):
        raise InputError("beta_ratios: " + describe(repr(ratios), expected))
    return tuple(sorted(set(found), reverse=True))


def empty_factors(problem: Problem) -> Factors:
    """No unit at all, a ridge branch of zeros, and the best intercept: the solution at beta_max."""
    units = []
    for component in problem.components:
        rows = 1 if component.ridge else 0
        v = torch.zeros(rows, component.form.value_width, component.width, dtype=problem.dtype, device=problem.device)
        if component.ridge:
            units.append(Units(None, v))
            continue
        gate = None if component.gates is None else torch.zeros(0, dtype=torch.long, device=problem.device)
        units.append(Units(v.new_zeros(0, *component.form.u_shape), v, gate))
    _, intercept = problem.null_outputs()
    return Factors(units, None if intercept is None else intercept.to(problem.dtype))


def rank_of(factors: Factors) -> int:
    """Number of units; a ridge branch counts the rank of its weight matrix, as in the estimators."""
    ridge = [int(torch.linalg.matrix_rank(units.v[0].double())) for units in factors.units if units.u is None]
    return factors.n_units + sum(ridge)


class Settled(Exception):
    """Ends a fit: see :class:`Watch`."""


class Watch:
    """Ends the fit that it is the progress of, by :class:`Settled`, where validation data see no more improvement.

    The duality gap may lag far behind: it is open as long as a single direction that is missing would lower the
    objective, however little. Fits whose validation loss rises, because beta is too small, end as well.

    Parameters
    ----------
    evaluate : as of :func:`walk_path`.

    Attributes
    ----------
    state : the last look, a dict as the solver gives it.
    """

    def __init__(self, evaluate: Callable[[Factors], tuple[float, float]]) -> None:
        self.evaluate = evaluate
        self.state: dict[str, Any] = {"iteration": -1}
        self.score, self.loss = -math.inf, math.inf
        self.idle = 0

    def __call__(self, state: dict[str, Any]) -> None:
        # Several looks at one iteration are at what the solver tries there. Trained networks are not shown.
        again, self.state = state["iteration"] == self.state["iteration"], state
        if again or "factors" not in state:
            return
        score, loss = self.evaluate(state["factors"])
        better = score > self.score + IMPROVED or loss < self.loss - IMPROVED * abs(self.loss)
        self.idle = 0 if better else self.idle + 1
        self.score, self.loss = max(score, self.score), min(loss, self.loss)
        if self.idle >= LOOKS:
            raise Settled


def walk_path(
    problem: Problem,
    beta_max: float,
    evaluate: Callable[[Factors], tuple[float, float]],
    *,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    tol: float = 1e-2,
    patience: int | None = 2,
    solver: str = "factored",
    max_iter: int = 2000,
    max_rank: int | None = None,
    random_state: int = 0,
    progress: Callable[[PathStep], None] | None = None,
    solver_options: Mapping[str, Any] | None = None,
    done: tuple[Sequence[PathStep], Factors] | None = None,
    keep: Callable[[Sequence[PathStep], Factors], None] | None = None,
    criterion: str = "score",
    until: str = "gap",
) -> Path:
    """Fit at every ratio of ``beta_max`` in descending order and keep the best on validation data.

    Parameters
    ----------
    problem : the program; its own beta is not used.
    beta_max : what the ratios are shares of; where it is 0 (tokens without signal) the ratios are taken as betas.
    evaluate : factors -> (validation score, higher is better; validation loss).
    ratios : betas as shares of ``beta_max``, in any order.
    tol : relative duality gap of the fits on the path.
    patience : stop once the criterion has been worse than the best so far for this many betas in a row; None: walk to
        the end.
    solver, max_iter, max_rank, random_state, solver_options : as in the estimators.
    progress : called with every finished step.
    done : steps of the same path that an earlier run has made, and the factors of the last one: it goes on from there.
    keep : called after every step with the steps so far and the factors of the last one.
    criterion : what the best step has: "score", the highest score, or "loss", the lowest validation loss.
    until : "gap": every fit ends at ``tol``. "validation": or where two looks in a row find neither the score higher by
        0.005 than before in this fit nor the loss lower by 0.5%. Fits by ``lbfgs`` and ``adamw`` end as they do.

    Of equal scores the lower validation loss wins and of equal losses the higher score, then the larger beta.
    """
    solve = solver_function(solver)
    path = Path(criterion)
    # The solution at beta_max, from which the first beta is reached with few units.
    start = empty_factors(problem)
    for step in done[0] if done is not None else ():
        # Of the steps before the last one only the numbers are left: the last factors stand in for the best.
        path.add(step, done[1] if done is not None else start)
    if done is not None:
        start = done[1]
    every = check_ratios(ratios)
    for ratio in every[len(path.steps) :]:
        if patience is not None and path.below >= patience:
            path.stopped_early = True
            break
        began = time.perf_counter()
        beta = ratio * beta_max if beta_max > 0 else ratio
        watch = Watch(evaluate) if until == "validation" else None
        try:
            solution: Solution = solve(
                problem.with_beta(beta),
                tol=tol,
                max_iter=max_iter,
                max_rank=max_rank,
                random_state=random_state,
                init=start,
                prove=False,
                options=solver_options,
                progress=watch,
            )
            factors = solution.factors
            objective, gap = solution.certificate.primal, solution.certificate.relative_gap
        except Settled:
            assert watch is not None
            # What was made within the solver can never be differentiated.
            factors = watch.state["factors"].clone()
            objective, gap = watch.state["objective"], watch.state["gap"]
        score, loss = evaluate(factors)
        seconds = time.perf_counter() - began
        step = PathStep(beta, ratio, score, loss, objective, gap, rank_of(factors), seconds)
        start = factors
        path.add(step, factors)
        if progress is not None:
            progress(step)
        if keep is not None:
            keep(path.steps, start)
    return path
