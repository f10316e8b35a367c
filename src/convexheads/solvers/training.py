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
from dataclasses import dataclass, field

import torch

from convexheads.problem import Problem
from convexheads.solvers.factored import join_units, largest, pick_gates, random_factors
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.warmup import minibatches
from convexheads.types import Factors, History, Units

UNITS = 64
"""Units of each channel group where nothing else is asked for; shared by its gates."""
WINDOW, LEAST_DECREASE = 20, 1e-9
"""L-BFGS ends when this many iterations together decrease the objective by less than this share of it."""

Watch = Callable[[int, Factors], bool]
"""Called with the number of iterations done and the units; True ends the training."""


@dataclass
class Run:
    """One network trained from one start.

    Attributes
    ----------
    factors : the units as training left them, neither balanced nor pruned.
    objective : loss plus weight decay of these units, in float64; infinite where training diverged.
    seed, learning_rate : what told this run from others; no learning rate for L-BFGS.
    n_iter : epochs of AdamW, iterations of L-BFGS.
    seconds : of training, checks excluded.
    message : why training ended.
    history : objective, relative gap (NaN without certificate), seconds of training and units, at each check.
    """

    factors: Factors
    objective: float
    seed: int
    n_iter: int
    seconds: float
    message: str
    learning_rate: float | None = None
    history: History = field(default_factory=History)


class Stopwatch:
    """Seconds of training: stands still during checks."""

    def __init__(self) -> None:
        self.start, self.paused = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.paused

    def exclude(self, since: float) -> None:
        """Take out the time since ``since`` (a value of ``time.perf_counter``)."""
        self.paused += time.perf_counter() - since


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
        units = [_filled(old, new, generator) for old, new in zip(init.units, start.units, strict=True)]
        # Only training moves the intercept from here on.
        start = Factors(units, start.intercept if init.intercept is None else init.intercept)
    return start if max_rank is None else largest(start, max_rank)


def _filled(old: Units, new: Units, generator: torch.Generator) -> Units:
    room = len(new.v) - len(old.v)
    if old.u is None or new.u is None or room <= 0:
        return old
    chosen = torch.randperm(len(new.v), generator=generator)[:room].sort().values.to(new.v.device)
    return join_units(old, Units(new.u[chosen], new.v[chosen], pick_gates(new.gate, chosen)))


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
    batch_size : samples a step.
    watch : called after every epoch.

    Returns
    -------
    The trained units and the number of epochs done. The decay is the objective's own: see the module.
    """
    variables = start.like(start.flat().clone())
    tensors = variables.tensors()
    optimiser = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=0.0)
    steps = epochs * math.ceil(problem.n / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(1, epochs + 1):
        for gradient in minibatches(problem, variables, batch_size, generator):
            for tensor, slope in zip(tensors, gradient.tensors(), strict=True):
                tensor.grad = slope
            optimiser.step()
            schedule.step()
        if watch is not None and watch(epoch, variables):
            return variables, epoch
    return variables, epochs


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
        value, gradient = problem.value_and_gradient(shapes.like(x))
        return value, gradient.flat()

    noise = 2e-7 if shapes.tensors()[0].dtype == torch.float32 else 1e-14
    optimiser = LBFGS(evaluate, shapes.flat(), noise)
    values, failures = [optimiser.value], 0
    for iteration in range(1, max_iter + 1):
        failures = 0 if optimiser.step() else failures + 1
        values.append(optimiser.value)
        if watch is not None and watch(iteration, shapes.like(optimiser.x)):
            return shapes.like(optimiser.x), iteration, "the relative gap reached tol"
        if failures > 1:
            return shapes.like(optimiser.x), iteration, "no further decrease could be found"
        still = len(values) > WINDOW and values[-1 - WINDOW] - values[-1] <= LEAST_DECREASE * abs(values[-1])
        if still:
            return shapes.like(optimiser.x), iteration, "the objective stands still"
    return shapes.like(optimiser.x), max_iter, f"max_iter = {max_iter} was reached"
