"""Networks trained as practitioners train them: AdamW on mini-batches, or full-batch L-BFGS.

Both minimise the network's objective, f(outputs) + (beta/2) sum_h w_h (||u||^2 + ||v||^2), over the units themselves:
a non-convex problem, with no promise to reach its global optimum. They work for every activation, true ReLU included,
because the problem supplies the gradient; a certificate exists for linear and gated ReLU units only.

The weight decay of AdamW (Loshchilov and Hutter 2019) is decoupled: it shrinks weights by a share of the step beside
the adaptive update, so that its fixed points solve grad f / sqrt(second moment) = -decay * weights, whose objective
nobody knows. Here the gradient of the weight decay is part of the gradient and the decoupled decay is 0: stationary
points are those of the objective above, and can be compared with the convex program's optimum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from convexheads.certificate import Certificate, certify_factors
from convexheads.errors import InputError, describe
from convexheads.problem import Problem
from convexheads.solvers.base import Solution, register
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.starts import random_factors
from convexheads.solvers.units import filled, largest
from convexheads.solvers.warmup import batches, minibatches
from convexheads.types import Factors, History

UNITS = 64
"""Units of each channel group where nothing else is asked for; shared by its gates."""
WINDOW, LEAST_DECREASE = 20, 1e-9
"""L-BFGS ends when this many iterations together decrease the objective by less than this share of it."""

Watch = Callable[[int, Factors], bool]
"""Called with the number of iterations done and the units; True ends the training."""


@dataclass(frozen=True)
class TrainingOptions:
    """Options of every solver that trains a network.

    Attributes
    ----------
    units : units in each channel group; with gates, in each gate. None: 64 shared by the gates, no more than p or q.
    seeds : networks that are trained from different random units; number i is seeded by random_state + i.
    checks : certificates along each training, the last one at its end; more of them give a curve.
    """

    units: int | None = None
    seeds: int = 1
    checks: int = 1

    def __post_init__(self) -> None:
        if self.units is not None:
            _check_count("units", self.units)
        _check_count("seeds", self.seeds)
        _check_count("checks", self.checks)


@dataclass(frozen=True)
class AdamWOptions(TrainingOptions):
    """Options of ``adamw``.

    Attributes
    ----------
    learning_rates : each is tried with each seed; the lowest training objective wins.
    epochs : passes over the samples; ``max_iter`` bounds them.
    batch_size : samples a step.
    """

    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2)
    epochs: int = 50
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("epochs", self.epochs)
        _check_count("batch_size", self.batch_size)
        rates = self.learning_rates
        good = isinstance(rates, Sequence) and not isinstance(rates, str) and len(rates) > 0
        if not good or not all(_is_positive(rate) for rate in rates):
            raise InputError("learning_rates: " + describe(repr(rates), "a sequence of positive numbers"))


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name}: " + describe(repr(value), "an integer >= 1"))


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


@dataclass
class Run:
    """One network trained from one start.

    Attributes
    ----------
    factors : the units as training left them, neither balanced nor pruned.
    certificate : of these very units; None where training diverged.
    seed, learning_rate : what told this run from others; seeds are counted from 0, no learning rate for L-BFGS.
    n_iter : epochs of AdamW, iterations of L-BFGS.
    seconds : of training, checks excluded.
    message : why training ended.
    history : objective, relative gap, seconds of training and units, at each check.
    """

    factors: Factors
    certificate: Certificate | None
    seed: int
    n_iter: int
    seconds: float
    message: str
    history: History
    learning_rate: float | None = None

    @property
    def objective(self) -> float:
        return math.inf if self.certificate is None else self.certificate.primal

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without units."""
        certificate = self.certificate
        return {
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "objective": None if certificate is None else certificate.primal,
            "relative_gap": None if certificate is None else certificate.relative_gap,
            "dual": None if certificate is None else certificate.dual,
            "n_iter": self.n_iter,
            "seconds": self.seconds,
            "message": self.message,
            "history": self.history.as_dict(),
        }


class Recorder:
    """Watches one training: certifies at checks, keeps its clock still meanwhile, ends it at the tolerance.

    Checks are spaced geometrically, because the objective falls fastest at first.
    """

    def __init__(
        self, problem: Problem, tol: float, total: int, checks: int, progress: Callable[[dict], None] | None
    ) -> None:
        self.problem, self.tol, self.progress = problem, tol, progress
        self.due = {round(total ** (k / (checks - 1))) for k in range(checks - 1)} if checks > 1 else set()
        self.history = History()
        self.certificate: Certificate | None = None
        self.checked = self.iteration = 0
        self.diverged = False
        self.start, self.excluded = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.excluded

    def __call__(self, iteration: int, factors: Factors) -> bool:
        """Check if one is due; True where training should end."""
        self.iteration = iteration
        self.diverged = not bool(torch.isfinite(factors.flat()).all())
        return self.diverged or (iteration in self.due and self.check(factors))

    def check(self, factors: Factors) -> bool:
        """Certify the units as they are; True where their gap is within the tolerance."""
        since, seconds = time.perf_counter(), self.seconds
        self.checked = self.iteration
        self.certificate = found = certify_factors(self.problem, factors, network=True)
        self.history.append(found.primal, found.relative_gap, seconds, factors.n_units)
        if self.progress is not None:
            self.progress(
                {
                    "iteration": self.iteration,
                    "objective": found.primal,
                    "gap": found.relative_gap,
                    "rank": factors.n_units,
                    "seconds": seconds,
                }
            )
        self.excluded += time.perf_counter() - since
        return found.relative_gap <= self.tol

    def finish(self, factors: Factors, message: str, seed: int, learning_rate: float | None = None) -> Run:
        """The run, with a certificate of its last units."""
        seconds = self.seconds
        if self.diverged:
            return Run(factors, None, seed, self.iteration, seconds, "diverged", self.history, learning_rate)
        if self.certificate is None or self.checked != self.iteration:
            self.check(factors)
        return Run(factors, self.certificate, seed, self.iteration, seconds, message, self.history, learning_rate)


def unit_counts(problem: Problem, units: int | None) -> list[int]:
    """Units a gate of each component: ``units``, or by default 64 shared by the gates, no more than p or q."""
    if units is not None:
        return [1 if component.ridge else units for component in problem.components]
    return [1 if c.ridge else max(1, min(math.ceil(UNITS / c.n_gates), c.p, c.q)) for c in problem.components]


def starting_units(
    problem: Problem, counts: Sequence[int], generator: torch.Generator, init: Factors | None, max_rank: int | None
) -> Factors:
    """Small random units, ``counts`` a gate; where ``init`` has fewer in a component, random ones fill it up."""
    start = random_factors(problem, list(counts), generator, problem.dtype)
    if init is not None:
        init = init.to(problem.dtype)
        units = [
            filled(old, new, len(new.v) - len(old.v), generator)
            for old, new in zip(init.units, start.units, strict=True)
        ]
        # Only training moves the intercept from here on.
        start = Factors(units, start.intercept if init.intercept is None else init.intercept)
    return start if max_rank is None else largest(start, max_rank)


def train_adamw(
    problem: Problem,
    start: Factors,
    learning_rate: float,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 256,
    watch: Watch | None = None,
) -> tuple[Factors, int]:
    """AdamW on shuffled mini-batches, the learning rate falling to zero along half a cosine.

    Parameters
    ----------
    problem, start : the objective, and the units to start from.
    learning_rate : the first one, of every weight and the intercept.
    epochs : passes over the samples.
    generator : of the shuffles.
    batch_size : samples a step at most; steps have even shares of them.
    watch : called after every epoch.

    Returns
    -------
    The trained units and the number of epochs done. The decay is the objective's own: see the module.
    """
    x = start.flat()
    variables = start.like(x)
    tensors = variables.tensors()
    optimiser = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=0.0)
    steps = epochs * batches(problem.n, batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(1, epochs + 1):
        for gradient in minibatches(problem, start, x, batch_size, generator):
            for tensor, slope in zip(tensors, start.like(gradient).tensors(), strict=True):
                tensor.grad = slope
            optimiser.step()
            schedule.step()
        if watch is not None and watch(epoch, variables):
            return variables, epoch
    return variables, epochs


def import_optimiser() -> None:
    """Let torch import what it imports at the first step of any optimiser: seconds that no training should count."""
    tensor = torch.zeros(1)
    tensor.grad = torch.zeros(1)
    torch.optim.AdamW([tensor]).step()


def train_lbfgs(
    problem: Problem, start: Factors, max_iter: int, watch: Watch | None = None
) -> tuple[Factors, int, str]:
    """Full-batch L-BFGS until the objective stands still.

    Returns
    -------
    The trained units, the number of iterations done, and why it ended.
    """
    shapes = start.like(start.flat())

    def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        return problem.flat_value_and_gradient(shapes, x)

    noise = 2e-7 if shapes.tensors()[0].dtype == torch.float32 else 1e-14
    optimiser = LBFGS(evaluate, shapes.flat(), noise)
    values, failures = [optimiser.value], 0
    for iteration in range(1, max_iter + 1):
        failures = 0 if optimiser.step() else failures + 1
        values.append(optimiser.value)
        if watch is not None and watch(iteration, shapes.like(optimiser.x)):
            return shapes.like(optimiser.x), iteration, "the relative gap reached tol"
        still = len(values) > WINDOW and values[-1 - WINDOW] - values[-1] <= LEAST_DECREASE * abs(values[-1])
        if failures > 1 or still:
            message = "no further decrease could be found" if failures > 1 else "the objective stands still"
            # Of the last iterates, between which the objective no longer decides, the combination of least gradient.
            return shapes.like(optimiser.steadied()[0]), iteration, message
    return shapes.like(optimiser.x), max_iter, f"max_iter = {max_iter} was reached"


# Solvers --------------------------------------------------------------------------------------------------

ADVICE = "The network is not convex: fit(X, y, init=this estimator) with solver='factored' goes on to the optimum"


def best_run(problem: Problem, runs: list[Run], tol: float, what: str) -> Solution:
    """The run of the lowest objective as a solution that speaks of all of them."""
    best = min(runs, key=lambda run: run.objective)
    if best.certificate is None:
        raise InputError(
            "learning_rates: "
            + describe(
                f"trainings that all diverged ({', '.join(sorted({f'{run.learning_rate:g}' for run in runs}))})",
                "at least one that stays finite",
                "Lower the learning rates, or scale the tokens down.",
            )
        )
    rate = "" if best.learning_rate is None else f"learning rate {best.learning_rate:g}, "
    number = f"the lowest of {len(runs)} trainings, " if len(runs) > 1 else ""
    return Solution(
        best.factors.to(torch.float64),
        best.certificate,
        best.history,
        best.n_iter,
        best.certificate.relative_gap <= tol,
        f"{what}: {number}{rate}seed {best.seed}; {best.message}",
        {"runs": [run.as_dict() for run in runs]},
        ADVICE,
    )


@register("adamw", promises_tol=False, options=AdamWOptions)
def solve_adamw(
    problem: Problem,
    tol: float = 1e-3,
    max_iter: int = 2000,
    max_rank: int | None = None,
    random_state: int = 0,
    init: Factors | None = None,
    progress: Callable[[dict], None] | None = None,
    prove: bool = True,
    resumed: bool = False,
    **options: Any,
) -> Solution:
    """Train networks by AdamW from several seeds and learning rates; the lowest training objective wins.

    Parameters
    ----------
    problem, random_state : the program whose network is trained, and the first seed.
    tol : relative gap at which a training ends at a check, and below which the solution counts as converged.
    max_iter : most epochs of each training.
    max_rank : most units in all.
    init : units to start from; where they are fewer than ``units``, small random ones fill them up.
    progress : called with a dict at every check.
    prove : certificates are always proved.
    resumed : makes no difference: ``init`` is where training starts in any case.
    options : see :class:`AdamWOptions`.

    The solution is the network as training left it, certified as it is: see the module on its weight decay.
    """
    chosen = AdamWOptions(**options)
    counts = unit_counts(problem, chosen.units)
    epochs = min(chosen.epochs, max_iter)
    message = f"{epochs} epochs were done"
    if epochs < chosen.epochs:
        message = f"max_iter = {max_iter} was reached before {chosen.epochs} epochs"
    import_optimiser()
    runs = []
    for rate in chosen.learning_rates:
        for seed in range(chosen.seeds):
            generator = torch.Generator().manual_seed(random_state + seed)
            start = starting_units(problem, counts, generator, init, max_rank)
            recorder = Recorder(problem, tol, epochs, chosen.checks, progress)
            found, done = train_adamw(problem, start, float(rate), epochs, generator, chosen.batch_size, recorder)
            reason = message if done == epochs else f"the relative gap reached tol after {done} epochs"
            runs.append(recorder.finish(found, reason, seed, float(rate)))
    return best_run(problem, runs, tol, "AdamW")


@register("lbfgs", promises_tol=False, options=TrainingOptions)
def solve_lbfgs(
    problem: Problem,
    tol: float = 1e-3,
    max_iter: int = 2000,
    max_rank: int | None = None,
    random_state: int = 0,
    init: Factors | None = None,
    progress: Callable[[dict], None] | None = None,
    prove: bool = True,
    resumed: bool = False,
    **options: Any,
) -> Solution:
    """Train networks by full-batch L-BFGS from several seeds; the lowest training objective wins.

    Parameters as in :func:`solve_adamw`, ``max_iter`` being iterations; options: see :class:`TrainingOptions`. Unlike
    ``factored`` it adds no units: with too few it ends in a local minimum, which the certificate shows.
    """
    chosen = TrainingOptions(**options)
    counts = unit_counts(problem, chosen.units)
    runs = []
    for seed in range(chosen.seeds):
        generator = torch.Generator().manual_seed(random_state + seed)
        start = starting_units(problem, counts, generator, init, max_rank)
        recorder = Recorder(problem, tol, max_iter, chosen.checks, progress)
        found, _, message = train_lbfgs(problem, start, max_iter, recorder)
        runs.append(recorder.finish(found, message, seed))
    return best_run(problem, runs, tol, "L-BFGS")
