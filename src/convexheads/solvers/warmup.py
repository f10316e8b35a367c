"""A few epochs on mini-batches: the cheap way to the neighbourhood of the optimum on large data.

By Adam with quasi-hyperbolic momentum (Kingma and Ba 2015; QHAdam, Ma and Yarats 2019): a step goes along the mean of
many gradients, in which the last one counts more than its turn.

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
SHARE, LARGE_SHARE = 0.2, 0.25
"""Step size as a share of the expected root mean square of an entry, for mini-batches of either size; it falls to zero
in proportion to the steps that are left."""
MOMENTUM, LAST, SQUARES = 0.95, 0.1, 0.95
"""How much a step keeps of the mean gradient, the share of the last gradient beside that mean, and how much it keeps of
the mean square."""
INTERCEPT_RATE = 0.01
"""Step size of the intercept's entries."""


def lowered(problem: Problem, factors: Factors) -> Problem:
    """The problem with products in low precision, where the device has units for them and that is worth it."""
    if problem.dtype != torch.float32 or problem.n * problem.gradient_work(factors) < LOW_WORK:
        return problem
    return problem.in_low_precision(low_precision(problem.device))


def batches(n: int, size: int) -> int:
    """Mini-batches an epoch of ``n`` samples, of at most ``size`` each."""
    return math.ceil(n / size)


def minibatches(
    problem: Problem, shapes: Factors, x: Tensor, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """One epoch: the objective's gradient at ``x``, one vector, on each mini-batch of about ``size`` samples.

    Their mean over an epoch is the full gradient, about. ``x`` (variables in the ``shapes`` of factors) may change in
    between.
    """
    dtype, variables = x.dtype, shapes.like(x)
    order = torch.randperm(problem.n, generator=generator).to(problem.device)
    # Temporaries that stay in the cache are several times faster than those of a whole batch.
    most = problem.pass_rows(problem.low or dtype, max(1, variables.n_units))
    # Even ones: the gradient of the few samples that are left over would be all noise.
    for index in order.tensor_split(batches(problem.n, size)):
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
    """Epochs of Adam with quasi-hyperbolic momentum on the objective, weight decay included; returns new factors.

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
    steps = epochs * batches(problem.n, batch)
    step = 0
    for _ in range(epochs):
        for gradient in minibatches(problem, factors, x, batch, generator):
            decay = 1.0 - step / steps
            step += 1
            first.lerp_(gradient, 1.0 - MOMENTUM)
            second.mul_(SQUARES).addcmul_(gradient, gradient, value=1.0 - SQUARES)
            # The corrections of both moments, which begin at zero, are taken into the step.
            correction = math.sqrt(1.0 - SQUARES**step)
            torch.sqrt(second, out=root).add_(1e-12 * correction).div_(rates)
            x.addcdiv_(first, root, value=-decay * correction * (1.0 - LAST) / (1.0 - MOMENTUM**step))
            x.addcdiv_(gradient, root, value=-decay * correction * LAST)
    return factors.like(x)
