"""Where the factored solver starts: small random units, brought near the optimum before whole-batch iterations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexheads.problem import Component, Problem
from convexheads.solvers.proximal import has_vector_blocks, proximal_start
from convexheads.solvers.units import canonical, filled
from convexheads.solvers.warmup import BATCH, adam_epochs, in_large_products
from convexheads.spectral import leading_pairs
from convexheads.subspace import PAIRS, ROUNDS, BlockSubspace, rough_beta_max
from convexheads.types import Factors, Units

WARMUP_SAMPLES = 1000
"""Samples from which epochs of Adam come first; below, whole-batch iterations cost as little."""
WARMUP_WORK = 2e8
"""Floating-point operations of one evaluation up to which whole-batch iterations cost as little, too."""
WARM_EPOCHS = 8
"""Epochs of the warm-up from other factors."""
LEAST_EPOCHS, MOST_EPOCHS = 4, 24
"""The fewest epochs from none, and the most ..."""
WARMUP_STEPS, USUAL_RATIO, STEPS_POWER = 320, 0.034, -0.56
"""... for so many mini-batches at this share of beta_max, times this power of the quotient at others: what is left is
noise of mini-batches, which is larger for more units, and more are in use at a smaller beta; ..."""
MOST_LARGE_EPOCHS, LARGE_WARMUP_STEPS = 40, 480
"""... or, where evaluations are large products, so many instead: an epoch costs less than an iteration; ..."""
MOST_STAGES = 3
"""... once more, with twice the units, as long as nearly all are in use, and so many times at most."""
FEW_UNITS = 20
"""Units of a component that a solve without epochs of Adam starts with, or all there can be."""
LEADING = 0.6
"""Norm that such a unit has along the leading singular pair, as a share of the one expected at an optimum, and less
along others, in proportion to the root of the singular value."""
FIRST_UNITS, FEWER_UNITS, UNITS_POWER = 40, 32, -1 / 3
"""Units of a component to start with elsewhere, over all gates: where epochs come first, no more than so many at
``USUAL_RATIO`` and larger shares of beta_max, and in proportion to this power of the share at smaller ones, if there is
one gate."""
MANY_UNITS = 128
"""Units over all gates up to which each gate has at least 8."""
SPARE = 0.003
"""Share of the nuclear norm, in the smallest units, that is dropped after the first epochs ..."""
SATURATED = 0.9
"""... and as many units again are added if more than this share of them is left."""


def start_scale(problem: Problem, units: int) -> float:
    """Typical ||u_j|| at the optimum: beta sum ||u_j||^2 is a fair part of the loss at zero."""
    loss = problem.null_loss()
    return math.sqrt(0.3 * max(loss, 1e-12) / (problem.beta * max(1, units)))


def initial_units(problem: Problem, max_rank: int | None, most: int = FIRST_UNITS) -> list[int]:
    """Units a gate for each component: all there can be, or a first guess, ``most`` where there is one gate."""
    found = []
    for component in problem.components:
        full = 1 if component.ridge else min(component.p, component.q)
        if problem.n < WARMUP_SAMPLES:
            first = FEW_UNITS
        else:
            # Gates share units out; each needs some to spare.
            first = min(FIRST_UNITS, most) if component.n_gates == 1 else FIRST_UNITS
        count = min(full, max(1, first // component.n_gates, min(8, MANY_UNITS // component.n_gates)))
        found.append(count if max_rank is None else min(count, max(1, max_rank // component.n_gates)))
    return found


def quick(problem: Problem, counts: list[int]) -> bool:
    """Whether a whole-batch evaluation costs little more than one on a mini-batch; ``counts`` units a gate."""
    work = sum(
        6.0 * problem.n * count * c.n_gates * (c.form.unit_work + c.q)
        for count, c in zip(counts, problem.components, strict=True)
    )
    return problem.n < WARMUP_SAMPLES or work <= WARMUP_WORK


def random_factors(problem: Problem, counts: list[int], generator: torch.Generator, dtype: torch.dtype) -> Factors:
    """Small random units, scaled so that no setting depends on the scale of tokens or beta."""
    total = sum(n * c.n_gates for n, c in zip(counts, problem.components, strict=True) if not c.ridge)
    norm = 0.18 * start_scale(problem, total)
    units = []
    for count, component in zip(counts, problem.components, strict=True):
        k, c = component.form.value_width, component.width
        if component.ridge:
            units.append(Units(None, torch.zeros(1, k, c, dtype=dtype, device=problem.device)))
            continue
        m = count * component.n_gates
        scale = norm / math.sqrt(component.weight)
        u = torch.randn(m, *component.form.u_shape, generator=generator, dtype=torch.float64)
        v = torch.randn(m, k, c, generator=generator, dtype=torch.float64)
        gate = None
        if component.gates is not None:
            gate = torch.arange(component.n_gates, device=problem.device).repeat_interleave(count)
        units.append(
            Units(
                (u * (scale / math.sqrt(component.p))).to(problem.device, dtype),
                (v * (scale / math.sqrt(component.q))).to(problem.device, dtype),
                gate,
            )
        )
    _, b = problem.null_outputs()
    return Factors(units, None if b is None else b.to(dtype))


def first_guess(problem: Problem, max_rank: int | None, generator: torch.Generator) -> Factors:
    """Random units, brought near the optimum by epochs of Adam where there are many samples."""
    empty = random_factors(problem, [0] * len(problem.components), generator, problem.dtype)
    L = problem.null_gradient()
    if not bool(L.any()):
        # Constant targets: the empty head is exact, and what units would start with only has to shrink.
        return empty
    counts = initial_units(problem, max_rank)
    if quick(problem, counts) or all(component.ridge for component in problem.components):
        start = random_factors(problem, counts, generator, problem.dtype)
        return vector_guess(problem, empty, max_rank) or along_pairs(problem, start, L)
    share = usual_share(problem)
    counts = initial_units(problem, max_rank, round(FEWER_UNITS * min(1.0, share) ** UNITS_POWER))
    start = random_factors(problem, counts, generator, problem.dtype)
    norm = start_scale(problem, start.n_units)
    epochs = warmup_epochs(problem, start, share)
    for _ in range(MOST_STAGES):
        found = adam_epochs(problem, start, norm, epochs, generator)
        start, saturated = resize(problem, found, counts, max_rank, generator)
        if not saturated:
            break
        counts = [2 * count for count in counts]
    return start


def along_pairs(problem: Problem, start: Factors, L: Tensor) -> Factors:
    """Random units, to which the leading singular pairs of A_g^* L are added, one to each; L as of the empty head.

    At the optimum units are singular vectors as well. Where beta says little about their size, because the loss falls
    near zero, they get no larger than a quadratic model of the objective allows them together, and random parts no
    larger in proportion. Where Gamma is small only: elsewhere pairs cost iterations.
    """
    if not BlockSubspace(problem, torch.Generator()).exact(PAIRS, ROUNDS):
        return start
    rounded = L.to(problem.dtype)
    leading = Factors(start.like(torch.zeros_like(start.flat())).units)
    largest = 0.0
    for k, (component, units) in enumerate(zip(problem.components, leading.units, strict=True)):
        for gate, gamma in () if component.ridge else problem.gammas(rounded, k, problem.dtype):
            own = units.of_block(gate)
            if not len(own):
                continue
            sigma, left, right = leading_pairs(gamma, len(own))
            sizes = sigma.sqrt() / component.weight
            largest = max(largest, float(sigma[0]) / component.weight)
            assert units.u is not None
            # -L is the direction of descent.
            units.u[own] = -(left * sizes).mT.reshape(-1, *units.u.shape[1:])
            units.v[own] = (right * sizes).mT.reshape(-1, *units.v.shape[1:])
    if not largest > 0.0:
        return start
    norm = LEADING * start_scale(problem, start.n_units) / math.sqrt(largest)
    root = math.sqrt(best_share(problem, leading, norm * norm, L))
    if not root > 0.0:
        return start
    for units, pairs in zip(start.units, leading.units, strict=True):
        for into, part in zip(units.tensors(), pairs.tensors(), strict=True):
            into.mul_(root).add_(part, alpha=norm * root)
    return start


def best_share(problem: Problem, factors: Factors, scale: float, L: Tensor) -> float:
    """The t in [0, 1] that minimises a quadratic model of the objective at the blocks t ``scale`` Z of ``factors``.

    The model is that of the loss at the empty head, where its gradient is L.
    """
    O, _ = problem.null_outputs()
    targets, weights = problem.targets_of(slice(0, problem.n), O.dtype)
    moved = scale * problem.forward(factors).to(O.dtype)
    slope = float((L * moved).sum())
    curvature = float((problem.loss.hessian_product(O, targets, weights, moved) * moved).sum())
    slope, curvature = problem.world.total(slope), problem.world.total(curvature)
    descent = -slope - scale * problem.weight_decay(factors)
    return min(1.0, max(0.0, descent / curvature)) if curvature > 0.0 else 0.0


def usual_share(problem: Problem) -> float:
    """beta / (``USUAL_RATIO`` beta_max), about."""
    scale = rough_beta_max(problem)
    return problem.beta / (USUAL_RATIO * scale) if scale > 0 else math.inf


def warmup_epochs(problem: Problem, start: Factors, share: float) -> int:
    """Epochs of Adam from small random units; ``share`` is beta / (``USUAL_RATIO`` beta_max)."""
    steps, most = WARMUP_STEPS, MOST_EPOCHS
    # On accelerators mini-batches take about as long as all samples at once.
    if problem.device.type == "cpu" and in_large_products(problem, start):
        steps, most = LARGE_WARMUP_STEPS, MOST_LARGE_EPOCHS
    return min(most, max(LEAST_EPOCHS, round(steps * share**STEPS_POWER * BATCH / problem.n)))


def vector_guess(problem: Problem, start: Factors, max_rank: int | None) -> Factors | None:
    """Where blocks are vectors, those that proximal steps arrive at; None elsewhere and for the empty head."""
    if max_rank is not None or not has_vector_blocks(problem):
        return None
    found = proximal_start(problem, start)
    return found if found.n_units else None


def second_guess(problem: Problem, init: Factors, max_rank: int | None, generator: torch.Generator) -> Factors | None:
    """A warm start with as many small random units again, brought near the optimum in the same way.

    Once more, with twice the units, as long as nearly all are in use and there is room for more.
    None if that is no better than the start itself, or not worth trying.
    """
    if problem.n < WARMUP_SAMPLES or all(component.ridge for component in problem.components):
        return None
    init = init.to(problem.dtype)
    found = vector_guess(problem, init, max_rank) if quick(problem, as_many(problem, init)) else None
    if found is not None:
        return found
    found = init
    for stage in range(MOST_STAGES):
        start = doubled(problem, found, max_rank, generator)
        if stage and start.n_units == found.n_units:
            break
        norm = 0.5 * start_scale(problem, max(1, start.n_units))
        found = slim(problem, adam_epochs(problem, start, norm, WARM_EPOCHS, generator))
        if found.n_units <= SATURATED * start.n_units:
            break
    # Epochs leave the neighbourhood of an optimum that the start is already in.
    return found if problem.value_and_gradient(found)[0] < problem.value_and_gradient(init)[0] else None


def as_many(problem: Problem, factors: Factors) -> list[int]:
    """Units a gate that each component has, but at least four."""
    return [
        0 if units.u is None else max(4, math.ceil(len(units.v) / c.n_gates))
        for c, units in zip(problem.components, factors.units, strict=True)
    ]


def doubled(problem: Problem, factors: Factors, max_rank: int | None, generator: torch.Generator) -> Factors:
    """Factors with as many small random units again."""
    counts = [max(1, count) for count in as_many(problem, factors)]
    fresh = random_factors(problem, counts, generator, problem.dtype)
    units = [
        filled(old, new, vacant(component, old, factors.n_units, max_rank), generator)
        for component, old, new in zip(problem.components, factors.units, fresh.units, strict=True)
    ]
    return Factors(units, factors.intercept)


def vacant(component: Component, units: Units, total: int, max_rank: int | None) -> int:
    """Units that a component may still get, of which it has ``units`` and all components together ``total``."""
    room = min(component.p, component.q) * component.n_gates - len(units.v)
    return room if max_rank is None else min(room, max_rank - total)


def slim(problem: Problem, factors: Factors) -> Factors:
    """Factors without the smallest units, which together carry next to nothing."""
    total = sum(float(b.double().sum()) for b in canonical(problem, factors, 0.0)[1])
    weight = max(problem.penalty_weight(c) for c in problem.components)
    return canonical(problem, factors, SPARE * weight * total)[0]


def resize(
    problem: Problem, factors: Factors, counts: list[int], max_rank: int | None, generator: torch.Generator
) -> tuple[Factors, bool]:
    """Drop the units that carry next to nothing, and add small random ones; whether nearly all were in use.

    Then as many again are added.
    """
    slimmed = slim(problem, factors)
    fresh = random_factors(problem, counts, generator, problem.dtype)
    units = []
    doubled = False
    for component, small, new in zip(problem.components, slimmed.units, fresh.units, strict=True):
        # A margin over the units in use: with too few, the factored objective stalls.
        saturated = len(small.v) > SATURATED * len(new.v)
        room = min(
            vacant(component, small, slimmed.n_units, max_rank),
            len(new.v) if saturated else len(small.v) // 6,
        )
        units.append(filled(small, new, room, generator))
        doubled = doubled or (saturated and len(units[-1].v) > len(small.v))
    return Factors(units, factors.intercept), doubled
