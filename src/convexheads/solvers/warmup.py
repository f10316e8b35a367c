"""A few epochs of Adam on mini-batches: the cheap way to the neighbourhood of the optimum on large data.

Step sizes are a fixed share of the weights' size expected at the optimum, so that nothing needs tuning: with
beta sum_j ||u_j||^2 a fair part of the loss at zero, ||u_j|| is known up to a small factor beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from convexheads.problem import Problem, Sums
from convexheads.products import low_precision
from convexheads.types import Factors

BATCH, LARGE_BATCH, LARGE_STEPS = 512, 1024, 200
"""Samples of a mini-batch; more in low precision, where a mini-batch costs half as much besides its products as they
cost, if there are so many steps: noise is the limit then, not their number."""
LOW_WORK = 1e9
"""Multiplications of an evaluation from which those far from the optimum are worth rounding their factors."""
SHARE, LARGE_SHARE = 0.15, 0.2
"""Step size as a share of the expected root mean square of an entry, for mini-batches of either size."""
INTERCEPT_RATE = 0.01
"""Step size of the intercept's entries."""


def lowered(problem: Problem, factors: Factors) -> Problem:
    """The problem with products in low precision, where the device has units for them and that is worth it."""
    if problem.dtype != torch.float32 or problem.n * problem.gradient_work(factors) < LOW_WORK:
        return problem
    return problem.in_low_precision(low_precision(problem.device))


def minibatches(
    problem: Problem, shapes: Factors, x: Tensor, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """One epoch: the objective's gradient at ``x`` on each shuffled mini-batch of ``size`` samples, one vector.

    Its mean over an epoch is the full gradient. ``x`` (variables in the ``shapes`` of factors) may change in between.
    """
    dtype, variables = x.dtype, shapes.like(x)
    order = torch.randperm(problem.n, generator=generator).to(problem.device)
    # Temporaries that stay in the cache are several times faster than those of a whole batch.
    most = problem.pass_rows(problem.low or dtype, max(1, variables.n_units))
    for index in order.split(size):
        flat = torch.zeros_like(x)
        gradient, sums = shapes.like(flat), Sums()
        for part in problem.own_samples(index)[0].split(most):
            stats = problem.stats_of(part, problem.low or dtype)
            targets, weights = problem.targets_of(part, dtype)
            problem.chunk_gradient(variables, stats, targets, weights * (problem.n / len(index)), gradient, sums)
        sums.close()
        flat = problem.summed(0.0, flat)[1]
        problem.add_decay(variables, shapes.like(flat))
        yield flat


def adam_epochs(
    problem: Problem,
    factors: Factors,
    norm: float,
    epochs: int,
    generator: torch.Generator,
) -> Factors:
    """Adam with cosine decay and explicit weight decay (Kingma and Ba 2015); returns new factors.

    ``norm`` is the one that a unit of a component of weight 1 is expected to have.
    """
    problem = lowered(problem, factors)
    many = epochs * problem.n >= LARGE_STEPS * LARGE_BATCH
    large = problem.world.every(many and problem.low is not None)
    batch, share = (LARGE_BATCH, LARGE_SHARE) if large else (BATCH, SHARE)
    x = factors.flat()
    # As vectors: a step takes few operations, however many tensors there are.
    rates = torch.empty_like(x)
    own = factors.like(rates)
    for component, units in zip(problem.components, own.units, strict=True):
        size = share * norm / math.sqrt(component.weight)
        if units.u is not None:
            units.u.fill_(size / math.sqrt(component.p))
        units.v.fill_(size / math.sqrt(component.q))
    if own.intercept is not None:
        own.intercept.fill_(INTERCEPT_RATE)
    first, second, root = torch.zeros_like(x), torch.zeros_like(x), torch.empty_like(x)
    steps = epochs * math.ceil(problem.n / batch)
    step = 0
    for _ in range(epochs):
        for gradient in minibatches(problem, factors, x, batch, generator):
            step += 1
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            # The correction of the second moment, a number, is taken into the step.
            correction = math.sqrt(1 - 0.999**step)
            torch.sqrt(second, out=root).add_(1e-12 * correction).div_(rates)
            x.addcdiv_(first, root, value=-decay * correction / (1 - 0.9**step))
    return factors.like(x)
