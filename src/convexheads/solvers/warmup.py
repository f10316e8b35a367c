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

from convexheads.evaluation import Evaluation
from convexheads.problem import Problem, pass_buffers
from convexheads.products import low_precision
from convexheads.solvers.units import no_units, principal_units, turned, turned_rows
from convexheads.types import Factors

BATCH, LARGE_BATCH, LARGE_STEPS = 512, 1024, 200
"""Samples of a mini-batch; more where evaluations are large products, if there are so many steps: noise is the limit
then, not their number, and a mini-batch costs half as much besides its products as they cost."""
LARGE_WORK = 1e9
"""Multiplications from which an evaluation is a large one: worth mini-batches like these, and rounded factors."""
SHARE, LARGE_SHARE = 0.2, 0.25
"""Step size as a share of the expected root mean square of an entry, for mini-batches of either size; it falls to zero
in proportion to the steps that are left."""
MOMENTUM, LAST, SQUARES = 0.95, 0.1, 0.95
"""How much a step keeps of the mean gradient, the share of the last gradient beside that mean, and how much it keeps of
the mean square."""
INTERCEPT_RATE = 0.01
"""Step size of the intercept's entries."""
RUN = 8
"""Consecutive samples that are in a mini-batch together where they are read from files."""
TRIMMED = 4
"""Freed memory goes back to the system when one part in so many of a memory limit has been read."""
PRUNED_AT, PRUNED = 0.5, 0.01
"""After this share of the epochs the smallest units go, which together have this share of the weight decay."""


def in_large_products(problem: Problem, factors: Factors) -> bool:
    """Whether an evaluation at so many units is large float32 products throughout, with memory for what they take."""
    large = problem.n * problem.gradient_work(factors) >= LARGE_WORK
    return large and problem.wide_products and problem.dtype == torch.float32 and problem.budget.roomy


def lowered(problem: Problem, factors: Factors) -> Problem:
    """The problem with products in low precision, where the device has units for them and that is worth it."""
    if not in_large_products(problem, factors):
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
    order = shuffled(problem, problem.low or dtype, generator).to(problem.device)
    most = Evaluation(problem, variables, low=problem.low).rows(problem.low or dtype)
    read, buffers = 0, pass_buffers()
    # Even ones: the gradient of the few samples that are left over would be all noise.
    for index in order.tensor_split(batches(problem.n, size)):
        flat = torch.zeros_like(x)
        # Where blocks are taken as a whole they are those of the variables as they are now.
        evaluation = Evaluation(problem, variables, shapes.like(flat), problem.low)
        fast, own = evaluation.products(most), problem.own_samples(index)[0]
        # Temporaries that stay in the cache are several times faster than those of a whole batch.
        for part in own.tensor_split(max(1, math.ceil(len(own) / most))) if evaluation.whole else own.split(most):
            stats = problem.stats_of(part, problem.low or dtype, buffers=buffers)
            targets, weights = problem.targets_of(part, dtype)
            weights = weights * (problem.n / len(index))
            with fast(len(part)):
                evaluation.add(stats, targets, weights)
        evaluation.close()
        if problem.budget.limit is not None:
            read += len(index) * problem.stats_bytes
            if TRIMMED * read >= problem.budget.limit:
                # What was read leaves holes that hold no more than a part of what is read next.
                problem.budget.trim()
                read = 0
        flat = problem.summed(0.0, flat)[1]
        problem.add_decay(variables, shapes.like(flat))
        yield flat


def shuffled(problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The numbers of all samples at random; in runs of a few where what is kept of them in ``dtype`` is in files.

    To read a sample by itself takes about as long as what is computed of it.
    """
    run = 1 if problem.world.every(not problem.in_files(dtype)) else RUN
    starts = run * torch.randperm(math.ceil(problem.n / run), generator=generator)
    order = (starts[:, None] + torch.arange(run)).flatten()
    return order[order < problem.n]


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
    large = epochs * problem.n >= LARGE_STEPS * LARGE_BATCH and in_large_products(problem, factors)
    problem = lowered(problem, factors)
    batch, share = (LARGE_BATCH, LARGE_SHARE) if large else (BATCH, SHARE)
    # As vectors: a step takes few operations, however many tensors there are.
    x = factors.flat()
    rates = step_sizes(problem, factors, share * norm)
    first, second, root = torch.zeros_like(x), torch.zeros_like(x), torch.empty_like(x)
    steps = epochs * batches(problem.n, batch)
    step = 0
    for epoch in range(epochs):
        if epoch and epoch == round(PRUNED_AT * epochs):
            factors, x, first, second = pruned(problem, factors, x, first, second)
            rates, root = step_sizes(problem, factors, share * norm), torch.empty_like(x)
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


def step_sizes(problem: Problem, shapes: Factors, size: float) -> Tensor:
    """Step sizes of all variables, one vector: ``size`` is that of a whole unit of a component of weight 1."""
    rates = torch.empty_like(shapes.flat())
    own = shapes.like(rates)
    for component, units in zip(problem.components, own.units, strict=True):
        each = size / math.sqrt(component.weight)
        if units.u is not None:
            units.u.fill_(each / math.sqrt(component.p))
        units.v.fill_(each / math.sqrt(component.q))
    if own.intercept is not None:
        own.intercept.fill_(INTERCEPT_RATE)
    return rates


def pruned(
    problem: Problem, shapes: Factors, x: Tensor, first: Tensor, second: Tensor
) -> tuple[Factors, Tensor, Tensor, Tensor]:
    """Shapes and variables without the smallest principal units, and the moments of what is left.

    Mini-batches then take less, and most of these units are on their way out. A rotation of units mixes entries: mean
    squares are mixed as those of independent entries are.
    """
    units = shapes.like(x)
    decay = problem.weight_decay(Factors([no_units(each) if each.u is None else each for each in units.units]))
    maps = principal_units(problem, units, shapes.like(first), PRUNED * decay, math.inf)
    squares = [None if rows is None else rows.square() for rows in maps]
    x, first = turned_rows(torch.stack([x, first]), shapes, maps)
    return turned(units, maps), x, first, turned_rows(second[None], shapes, squares)[0]
