"""The default solver: works on the factors u, v and certifies through the convex program.

Too few units are the only way in which the factored objective can stall above the optimum (Haeffele and Vidal
2015): then some block has a singular value of A_g^* L above beta w_g, and its singular vectors are units that
decrease the objective. The solver alternates preconditioned L-BFGS on the factors with a check of the gap that
finds such vectors, adds them, and stops at a proved gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from scipy.optimize import nnls
from torch import Tensor

from convexheads.architectures import Stats
from convexheads.certificate import (
    Certificate,
    DualPoint,
    certify_refitted,
    penalty,
    refit_intercept,
    rescaled_bound,
)
from convexheads.problem import Problem
from convexheads.products import fast_products
from convexheads.solvers.base import Solution, register
from convexheads.solvers.lbfgs import LBFGS, MEMORY, Apply
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.solvers.proximal import has_vector_blocks, proximal_start
from convexheads.solvers.warmup import BATCH, adam_epochs
from convexheads.spectral import balanced_factors
from convexheads.subspace import BlockSubspace, SingularPair
from convexheads.types import Factors, History, Interval, Units

REBUILD = 30
"""Iterations between two preconditioners."""
WARMUP_SAMPLES = 1000
"""Samples from which epochs of Adam come first; below, whole-batch iterations cost as little."""
WARMUP_WORK = 2e8
"""Floating-point operations of one evaluation up to which whole-batch iterations cost as little, too."""
LEAST_EPOCHS = 8
"""Epochs of the warm-up from other factors, and the fewest from none; the most are 16 ..."""
WARMUP_STEPS = 400
"""... for about so many mini-batches ..."""
MOST_STAGES = 3
"""... once more, with twice the units, as long as nearly all are in use, and so many times at most."""
STALL_FULL, STALL_IDLE = 1e-2, 2e-4
"""Decrease in ten iterations, as a share of the gap, below which units are added: all units in use, or not."""
SETTLED = 0.5
"""Decrease in ten iterations, as a share of the gap, below which directions outside the units' span are added."""
SPANNED = 0.9
"""Share of a direction's norm within the units' span from which it is not outside."""
TRIMMED = 1e-2
"""Share of the gap in the smallest units that are dropped, if they are many ..."""
WORTH_TRIMMING = 0.8
"""... so that at most this share of the units is left."""
PATIENCE = 2
"""A check comes after this many times the shortest interval even if the gap is unlikely to have closed."""
FIRST_CHECK = 10
"""Iterations from a first guess to the first check."""
TARGET = 0.94
"""Share of the tolerance that the gap must be estimated below before a proof is tried."""
ROUGH = 0.1
"""Precision of an estimate as a share of the gap at the one before."""
FREE = 1e-5
"""Share of the tolerance that the gradient of the intercept may be left with between proofs."""
LIKELY = 1.2
"""A check comes where the gap, foreseen in proportion to the gradient, is at most this many times its target."""
HOPEFUL = 5.0
"""The same for the gradient of the last iterate, before it is steadied."""
RIDGE_REPORTS = 5
"""Iterations between two entries of the history of a head of ridge branches only, whose gap needs no search."""
NOISY = 1e-4
"""Relative gap below which the noise of float32 may keep the gap of other heads from closing ..."""
SEARCH_PATIENCE = 60
"""... and iterations without a smaller one after which they go on in float64."""
RIDGE_PATIENCE = 30
"""Iterations without a smaller gap after which such a head goes on in float64."""
IDLE = 1e-2
"""Units are idle if together they carry less than this share of the gap."""
COLLAPSED = 1e-9
"""Share of the largest unit below which a unit is out of use."""
LARGEST_GROWTH = 96
PAIRS = 6
"""Singular pairs of a block that an estimate converges."""
FEW_UNITS = 24
"""Units of a component that a solve without epochs of Adam starts with, or all there can be."""
FIRST_UNITS = 40
"""Units of a component to start with elsewhere, over all gates."""
MANY_UNITS = 128
"""Units over all gates up to which each gate has at least 8."""
SPARE = 0.01
"""Share of the nuclear norm, in the smallest units, that is dropped after the first epochs ..."""
SATURATED = 0.9
"""... and as many units again are added if more than this share of them is left."""


def start_scale(problem: Problem, units: int) -> float:
    """Typical ||u_j|| at the optimum: beta sum ||u_j||^2 is a fair part of the loss at zero."""
    loss = problem.null_loss()
    return math.sqrt(0.3 * max(loss, 1e-12) / (problem.beta * max(1, units)))


def initial_units(problem: Problem, max_rank: int | None) -> list[int]:
    """Units a gate for each component: all there can be, or a first guess."""
    found = []
    for component in problem.components:
        full = 1 if component.ridge else min(component.p, component.q)
        first = FEW_UNITS if problem.n < WARMUP_SAMPLES else FIRST_UNITS
        count = min(full, max(1, first // component.n_gates, min(8, MANY_UNITS // component.n_gates)))
        found.append(count if max_rank is None else min(count, max(1, max_rank // component.n_gates)))
    return found


def largest_product(problem: Problem) -> float:
    """Multiplications of the product of unit features and values, about; none where oneDNN's memory is not free."""
    if problem.budget.limit is not None:
        return 0.0
    return problem.local * max(FEW_UNITS * c.form.value_width * c.width for c in problem.components)


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


def canonical(problem: Problem, factors: Factors, drop: float) -> tuple[Factors, list[Tensor]]:
    """Balanced, orthogonal units of every block; the smallest are dropped.

    ``drop`` bounds beta w sum of the singular values dropped over all blocks: the objective rises by less, to second
    order, because at the optimum the loss falls by as much as the penalty rises.
    """
    parts = []
    tails: list[tuple[float, int, int]] = []
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        if units.u is None:
            continue
        for g in problem.gates_of(k):
            own = slice(None) if units.gate is None else units.gate == g
            u, v = units.u[own].double().flatten(1), units.v[own].double().flatten(1)
            if not len(u):
                continue
            u, v, sigma = balanced_factors(u, v)
            parts.append((k, g, u, v, sigma))
            weight = problem.penalty_weight(component)
            tails += [(weight * float(s), len(parts) - 1, r) for r, s in enumerate(sigma)]
    keep = [len(part[4]) for part in parts]
    spent = 0.0
    for cost, which, rank in sorted(tails):
        spent += cost
        if spent > drop and cost > 0:
            break
        keep[which] = min(keep[which], rank)
    found: list[Units] = []
    spectra: list[Tensor] = []
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        if units.u is None:
            found.append(units)
            continue
        own_parts = [(part, keep[i]) for i, part in enumerate(parts) if part[0] == k]
        shape_v = (component.form.value_width, component.width)
        us = [part[2][:r].view(-1, *component.form.u_shape) for part, r in own_parts]
        vs = [part[3][:r].view(-1, *shape_v) for part, r in own_parts]
        gates = [torch.full((r,), part[1], device=problem.device) for part, r in own_parts if part[1] is not None]
        dtype = units.v.dtype
        empty_u = units.u.new_zeros(0, *component.form.u_shape)
        u = torch.cat(us).to(dtype) if us else empty_u
        v = torch.cat(vs).to(dtype) if vs else units.v.new_zeros(0, *shape_v)
        gate = None
        if component.gates is not None:
            gate = torch.cat(gates) if gates else torch.zeros(0, dtype=torch.long, device=problem.device)
        found.append(Units(u, v, gate))
        spectra += [part[4][:r] for part, r in own_parts]
    return Factors(found, factors.intercept), spectra


def principal_units(problem: Problem, factors: Factors, gradient: Factors, spare: float) -> list[Tensor | None]:
    """For every component the map (kept, m) with orthonormal rows from its units to the principal ones that are kept.

    Within a block (U, V) -> (R U, R V) changes nothing for orthogonal R. With R from U U^T + V V^T the units are
    orthogonal once they are balanced, and the smallest can go: those dropped carry less than ``spare`` in all, and
    none of them grows along minus the ``gradient``.
    """
    found: list[Tensor | None] = []
    parts: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for k, units in enumerate(factors.units):
        found.append(None)
        if units.u is None:
            continue
        weight = problem.penalty_weight(problem.components[k])
        for g in problem.gates_of(k):
            own = torch.arange(len(units.v)) if units.gate is None else units.gate.eq(g or 0).nonzero()[:, 0]
            u, v = units.u[own].flatten(1).double(), units.v[own].flatten(1).double()
            size, vectors = torch.linalg.eigh(0.5 * (u @ u.mT + v @ v.mT))
            slopes = gradient.units[k]
            assert slopes.u is not None
            against = u @ slopes.u[own].flatten(1).double().mT + v @ slopes.v[own].flatten(1).double().mT
            growing = (vectors.mT @ against * vectors.mT).sum(1) < 0
            # What grows is no candidate, however small.
            parts.append((k, own, torch.where(growing, math.inf, weight * size), vectors.mT))
    sizes = torch.cat([part[2] for part in parts]) if parts else torch.zeros(0)
    ordered, _ = sizes.clamp_min(0).sort()
    n_dropped = int((ordered.cumsum(0) <= spare).sum())
    least = float(ordered[n_dropped]) if n_dropped < len(ordered) else math.inf
    for k, units in enumerate(factors.units):
        if units.u is None:
            continue
        rows = []
        for _, own, size, vectors in (part for part in parts if part[0] == k):
            kept = vectors[size >= least]
            row = kept.new_zeros(len(kept), len(units.v))
            row[:, own] = kept
            rows.append(row)
        found[k] = torch.cat(rows).to(units.v.dtype)
    return found


def turned(factors: Factors, maps: list[Tensor | None]) -> Factors:
    """Factors, or a vector of their shape, under the maps of :func:`principal_units`."""
    units = []
    for old, rows in zip(factors.units, maps, strict=True):
        if old.u is None or rows is None:
            units.append(old)
            continue
        gate = old.gate
        if gate is not None:
            gate = gate[rows.abs().argmax(1)] if rows.numel() else gate[:0]
        u = (rows @ old.u.flatten(1)).view(len(rows), *old.u.shape[1:])
        v = (rows @ old.v.flatten(1)).view(len(rows), *old.v.shape[1:])
        units.append(Units(u, v, gate))
    return Factors(units, factors.intercept)


def turned_rows(vectors: Tensor, factors: Factors, maps: list[Tensor | None]) -> Tensor:
    """Each row of ``vectors`` (r, number of variables), of the shape of ``factors``, under the same maps."""
    found = []
    start = 0
    for units, rows in zip(factors.units, maps, strict=True):
        for t in units.tensors():
            part = vectors[:, start : start + t.numel()]
            start += t.numel()
            found.append(part if rows is None else (rows @ part.view(len(vectors), len(t), -1)).flatten(1))
    return torch.cat([*found, vectors[:, start:]], 1)


def pick_gates(gate: Tensor | None, index: Tensor) -> Tensor | None:
    """The gates of some units, or None where there are no gates."""
    return None if gate is None else gate[index]


def no_units(units: Units) -> Units:
    """None of these units."""
    return Units(None if units.u is None else units.u[:0], units.v[:0], pick_gates(units.gate, torch.arange(0)))


def join_units(first: Units, second: Units) -> Units:
    """The units of both, in order of their gates."""
    assert first.u is not None
    assert second.u is not None
    u, v = torch.cat([first.u, second.u]), torch.cat([first.v, second.v])
    if first.gate is None or second.gate is None:
        return Units(u, v)
    gate, order = torch.sort(torch.cat([first.gate, second.gate]), stable=True)
    return Units(u[order], v[order], gate)


def padding(before: Factors, after: Factors) -> Apply:
    """The map of vectors of the shape of ``before`` to that of ``after``, with zeros where units are new.

    New units follow the old ones of their gate.
    """
    numbers = before.like(torch.arange(1.0, len(before.flat()) + 1, dtype=torch.float64))
    units = []
    for old, new in zip(numbers.units, after.units, strict=True):
        extra = len(new.v) - len(old.v)
        if old.u is None or new.u is None or not extra:
            units.append(old)
            continue
        gate = None
        if old.gate is not None and new.gate is not None:
            spare = new.gate.bincount() - old.gate.bincount(minlength=int(new.gate.max()) + 1)
            gate = torch.arange(len(spare), device=spare.device).repeat_interleave(spare)
        zeros = Units(old.u.new_zeros(extra, *old.u.shape[1:]), old.v.new_zeros(extra, *old.v.shape[1:]), gate)
        units.append(join_units(old, zeros))
    source = Factors(units, numbers.intercept).flat().long()
    place = source.nonzero()[:, 0].to(before.units[0].v.device)
    source = source[place.to(source.device)].to(place.device) - 1

    def pad(vectors: Tensor) -> Tensor:
        found = vectors.new_zeros(len(vectors), len(after.flat()))
        found[:, place] = vectors[:, source]
        return found

    return pad


def unit_sizes(units: Units) -> Tensor:
    """||u|| ||v|| of every unit: (m,), none for ridge branches."""
    if units.u is None:
        return units.v.new_zeros(0)
    return units.u.flatten(1).norm(dim=1) * units.v.flatten(1).norm(dim=1)


def largest(factors: Factors, count: int) -> Factors:
    """The ``count`` units of largest ||u|| ||v||, in their order; ridge branches are kept."""
    sizes = [unit_sizes(units) for units in factors.units]
    if sum(map(len, sizes)) <= count:
        return factors
    least = torch.cat(sizes).topk(count).values[-1]
    found = []
    for units, size in zip(factors.units, sizes, strict=True):
        if units.u is None:
            found.append(units)
            continue
        kept = (size >= least).nonzero()[:, 0]
        found.append(Units(units.u[kept], units.v[kept], pick_gates(units.gate, kept)))
    return Factors(found, factors.intercept)


def spanned(factors: Factors, pair: SingularPair) -> float:
    """Norm of the part of the pair's left vector that lies in the span of its block's units."""
    units = factors.units[pair.component]
    assert units.u is not None
    own = slice(None) if units.gate is None else units.gate == pair.gate
    basis = torch.linalg.qr(units.u[own].flatten(1).double().mT).Q
    return float((basis.mT @ pair.u.double()).norm())


def curvature_pairs(problem: Problem, x: Tensor) -> int:
    """Curvature pairs that L-BFGS keeps: fewer where they would take more than a sixteenth of the memory limit."""
    limit = problem.budget.limit
    return MEMORY if limit is None else max(4, min(MEMORY, limit // (32 * x.numel() * x.element_size())))


class Factored:
    """State of one solve."""

    def __init__(
        self,
        problem: Problem,
        tol: float,
        max_iter: int,
        max_rank: int | None,
        random_state: int,
        progress: Callable[[dict], None] | None,
        prove: bool = True,
    ) -> None:
        self.proves = prove
        self.problem, self.tol, self.max_iter, self.max_rank = problem, tol, max_iter, max_rank
        self.generator = torch.Generator().manual_seed(random_state)
        self.progress = progress
        self.history = History()
        self.start = time.perf_counter()
        self.n_iter = 0
        self.n_proofs = 0
        self.least_gap, self.least_at = math.inf, 0
        self.subspace = BlockSubspace(problem, self.generator)

    # Estimates between proofs -----------------------------------------------------------------------------

    def estimate(
        self, factors: Factors, size: int = PAIRS, rounds: int = 12, precision: float | None = None
    ) -> tuple[Certificate, list[SingularPair]]:
        """Gap with singular values from below (never a claim), and the singular pairs above beta.

        ``precision`` is the relative gap that matters; default: the tolerance.
        """
        problem = self.problem
        refitted, O = self.refit(factors)
        point = DualPoint.at(problem, O)
        primal = point.loss + penalty(problem, refitted)
        tol = 0.03 * (self.tol if precision is None else precision)
        sigma, pairs, ridge = self.subspace.top_pairs(point.L.to(problem.dtype), size, rounds, tol)
        bound = rescaled_bound(
            problem, point, Interval(sigma, sigma, "estimate", False), ridge, primal, refitted.intercept, 5
        )
        return bound, pairs

    def foreseen(self, primal: float, gradient: Factors) -> Certificate:
        """For a head of ridge branches only what :meth:`estimate` would find, from the gradient alone.

        At the best intercept the gap is sum_h ||gradient_h||^2 / (2 beta w_h) exactly, and L-BFGS keeps next to it.
        """
        problem = self.problem
        gap = sum(
            float(units.v.double().square().sum()) / (2.0 * problem.penalty_weight(component))
            for component, units in zip(problem.components, gradient.units, strict=True)
        )
        relative = gap / primal if primal > problem.negligible else 0.0
        none = Interval(0.0, 0.0, "estimate", False)
        return Certificate(primal, primal - gap, gap, relative, none, False, problem.beta, 1.0)

    def exhausted(self, optimiser: LBFGS, bound: Certificate | None) -> bool:
        """Whether the gap ``bound`` has not fallen any more in float32: its noise is larger then."""
        if bound is None or optimiser.x.dtype != torch.float32:
            return False
        searched = any(not component.ridge for component in self.problem.components)
        if bound.gap < (0.9 if searched else 1.0) * self.least_gap:
            self.least_gap, self.least_at = bound.gap, self.n_iter
        if searched and bound.relative_gap > NOISY:
            return False
        return self.n_iter - self.least_at >= (SEARCH_PATIENCE if searched else RIDGE_PATIENCE)

    def refit(self, factors: Factors) -> tuple[Factors, Tensor]:
        """Intercept solved for outputs in the iteration's dtype."""
        problem = self.problem
        O = problem.forward(factors, factors.tensors()[0].dtype).double()
        factors = factors.to(torch.float64)
        if factors.intercept is None:
            return factors, O
        bare = O - factors.intercept
        b = problem.best_intercept(bare, factors.intercept, FREE * self.tol)
        return Factors(factors.units, b), bare + b

    # Units ------------------------------------------------------------------------------------------------

    def add_units(self, factors: Factors, pairs: list[SingularPair]) -> Factors:
        """Append singular pairs above beta as units, at the sizes that a quadratic model gives them together.

        Left to the factored objective alone, a unit near zero grows by a factor sigma / beta an iteration only. The
        model is min over t >= 0 of sum_i (beta w - sigma_i) t_i + (1/2) t^T Q t with Q the loss curvature between
        the pairs' outputs.
        """
        problem = self.problem
        dtype = factors.tensors()[0].dtype
        sizes = self._step_sizes(factors, pairs)
        units = []
        for k, (component, old) in enumerate(zip(problem.components, factors.units, strict=True)):
            own = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if pair.component == k and size > 0]
            if old.u is None or not own:
                units.append(old)
                continue
            root = torch.tensor([math.sqrt(size) for _, size in own], dtype=dtype, device=problem.device)
            # -L is the descent direction: the unit is -u v^T.
            u = -torch.stack([pair.u for pair, _ in own]).to(dtype) * root[:, None]
            v = torch.stack([pair.v for pair, _ in own]).to(dtype) * root[:, None]
            gate = None
            if component.gates is not None:
                gate = torch.tensor([pair.gate for pair, _ in own], device=problem.device)
            shape_v = (component.form.value_width, component.width)
            units.append(join_units(old, Units(u.view(-1, *component.form.u_shape), v.view(-1, *shape_v), gate)))
        return Factors(units, factors.intercept)

    def _step_sizes(self, factors: Factors, pairs: list[SingularPair]) -> list[float]:
        problem = self.problem
        dtype = factors.tensors()[0].dtype
        O = problem.forward(factors, dtype)
        Q = torch.zeros(len(pairs), len(pairs), dtype=torch.float64, device=problem.device)
        # A pair takes its features and a copy of the outputs.
        width = math.ceil(problem.outputs / min(c.form.workspace for c in problem.components))
        for index, stats in problem.chunks(dtype, len(pairs) * (1 + width)):
            targets, weights = problem.targets_of(index, dtype)
            moves = torch.stack([self._pair_outputs(pair, stats, targets.shape, dtype) for pair in pairs])
            curved = torch.stack([problem.loss.hessian_product(O[index], targets, weights, move) for move in moves])
            Q += (moves.flatten(1) @ curved.flatten(1).mT).double()
        Q = problem.world.sum(Q)
        Q = 0.5 * (Q + Q.mT)
        Q += torch.diag(1e-4 * Q.diagonal() + 1e-30)
        excess = torch.tensor(
            [pair.sigma - problem.penalty_weight(problem.components[pair.component]) for pair in pairs],
            dtype=torch.float64,
        )
        # By eigenvalues: pairs that are all but copies of each other leave Q indefinite by the noise of float32.
        values, vectors = torch.linalg.eigh(Q.cpu())
        root = values.clamp_min(1e-6 * float(values[-1])).clamp_min(1e-30).sqrt()
        factor, right = root[:, None] * vectors.mT, (vectors.mT @ excess) / root
        return nnls(factor.numpy(), right.numpy())[0].tolist()

    def _pair_outputs(self, pair: SingularPair, stats: list[Stats], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """What a pair adds to the outputs of some samples, of their shape."""
        component = self.problem.components[pair.component]
        u = pair.u.to(dtype).view(1, *component.form.u_shape)
        v = pair.v.to(dtype).view(1, component.form.value_width, component.width)
        gate = None if pair.gate is None else torch.tensor([pair.gate], device=self.problem.device)
        O = torch.zeros(shape, dtype=dtype, device=self.problem.device)
        rows = component.forward(component.features(stats[pair.component], Units(u, v, gate)), v)
        O[..., component.outputs] = rows.view(*shape[:-1], component.width)
        return O

    # The solve --------------------------------------------------------------------------------------------

    def optimiser(self, factors: Factors, dtype: torch.dtype) -> tuple[LBFGS, Factors]:
        factors = factors.to(dtype)

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            return self.problem.flat_value_and_gradient(factors, x)

        noise = 2e-7 if dtype == torch.float32 else 1e-14
        x = factors.flat()
        return LBFGS(evaluate, x, noise, curvature_pairs(self.problem, x)), factors

    def report(self, objective: float, gap: float, factors: Factors) -> None:
        seconds, rank = time.perf_counter() - self.start, factors.n_units
        self.history.append(objective, gap, seconds, rank)
        if self.progress is not None:
            self.progress(
                {
                    "iteration": self.n_iter,
                    "objective": objective,
                    "gap": gap,
                    "rank": rank,
                    "seconds": seconds,
                    "factors": factors,
                }
            )

    def run(self, factors: Factors, warm: bool = False, cold: bool = False) -> Solution:
        """Iterate from ``factors``: a solution of another beta (warm), a first guess (cold), or neither."""
        problem = self.problem
        if self.max_rank is not None:
            factors = largest(factors, self.max_rank)
        optimiser, shapes = self.optimiser(factors, problem.dtype)
        target = TARGET * self.tol
        # The gap of a first guess says nothing.
        spacing = self.spacing(shapes)
        earliest = latest = max(spacing, min(FIRST_CHECK, PATIENCE * spacing)) if cold else 0
        built_at = -REBUILD
        ridge_only = all(component.ridge for component in problem.components)
        last_gap, last_norm = math.inf, 0.0
        values: list[float] = []
        stalls, stalled = 0, False
        checked: Certificate | None = None
        message = f"max_iter = {self.max_iter} was reached"
        while True:
            x, gradient = optimiser.x, optimiser.gradient
            norm = float(gradient.norm())
            # The steadied gradient is smaller by a small factor: far away there is no need to look.
            hopeful = norm * last_gap <= HOPEFUL * target * last_norm and self.n_iter >= earliest
            if ridge_only or self.n_iter >= latest or hopeful:
                x, gradient = optimiser.steadied()
                norm = float(gradient.norm())
            # With ridge branches only the gap follows from the gradient.
            foreseen = self.foreseen(optimiser.value, shapes.like(gradient)) if ridge_only else None
            if foreseen is not None:
                due = foreseen.relative_gap <= target or self.n_iter % RIDGE_REPORTS == 0
            else:
                near = norm * last_gap <= LIKELY * target * last_norm
                due = self.n_iter >= latest or (near and self.n_iter >= earliest)
            if due:
                current = shapes.like(x)
                rough = max(self.tol, min(0.1, ROUGH * last_gap))
                bound, pairs = self.estimate(current, precision=rough) if foreseen is None else (foreseen, [])
                checked = bound
                self.report(bound.primal, bound.relative_gap, current)
                if bound.relative_gap <= target:
                    solution = self.finish(current, "the relative gap reached tol", bound)
                    if solution.converged:
                        return solution
                    # The estimate was too low, by this factor: ask for that much more before the next proof.
                    short = bound.relative_gap / solution.certificate.relative_gap
                    target = max(0.2 * target, 0.9 * min(target, bound.relative_gap, self.tol * short))
                fall = values[-11] - values[-1] if len(values) > 10 else math.inf
                fall, stalled = 0.0 if stalled else fall, False
                grown = None
                # A warm start of another beta lacks the units that this beta calls for.
                if pairs and ((warm and self.n_iter == 0) or fall < self.stall(current, bound)):
                    grown = self.grow(current, bound)
                elif fall < SETTLED * bound.gap:
                    spare = TRIMMED * bound.gap
                    smaller = self.trim(optimiser, current, shapes.like(gradient), spare)
                    if smaller is not None:
                        optimiser, shapes = smaller
                        current, built_at = shapes.like(optimiser.x), -REBUILD
                    grown = self.widen(current, bound, pairs)
                if grown is not None:
                    optimiser, shapes = self.enlarge(optimiser, current, grown)
                    built_at, norm = -REBUILD, float(optimiser.gradient.norm())
                    values.clear()
                earliest = self.n_iter if ridge_only else self.n_iter + self.spacing(shapes)
                latest = self.n_iter + PATIENCE * self.spacing(shapes)
                last_gap, last_norm = bound.relative_gap, norm
            if self.n_iter >= self.max_iter:
                break
            if self.n_iter - built_at >= REBUILD:
                optimiser.inverse = None  # its memory goes first
                inverse = Preconditioner(self.problem, shapes.like(optimiser.x), self.generator)
                optimiser.set_inverse(inverse.apply)
                built_at = self.n_iter
            moved = optimiser.step()
            values.append(optimiser.value)
            self.n_iter += 1
            if moved and not self.exhausted(optimiser, foreseen if ridge_only else checked):
                continue
            stalls, stalled = stalls + 1, True
            latest, built_at = self.n_iter, -REBUILD
            if optimiser.x.dtype == torch.float32:
                # float32 has no more digits to give: go on in float64.
                self.problem = self.problem.in_dtype(torch.float64)
                self.subspace.problem = self.problem
                optimiser, shapes = self.optimiser(shapes.like(optimiser.x), torch.float64)
            elif stalls > 5:
                message = "no further decrease could be found in float64"
                break
        return self.finish(shapes.like(optimiser.steadied()[0]), message)

    def first_guess(self, counts: list[int]) -> Factors:
        """Random units, brought near the optimum by epochs of Adam where there are many samples."""
        problem = self.problem
        start = random_factors(problem, counts, self.generator, problem.dtype)
        if not bool(problem.null_gradient().any()):
            # Constant targets: the empty head is exact, and what units would start with only has to shrink.
            return Factors([units if units.u is None else no_units(units) for units in start.units], start.intercept)
        if quick(problem, counts) or not start.n_units:
            return self.vector_guess(Factors([no_units(units) for units in start.units], start.intercept)) or start
        norm = start_scale(problem, start.n_units)

        def scale(k: int) -> float:
            return norm / math.sqrt(problem.components[k].weight)

        epochs = min(16, max(LEAST_EPOCHS, round(WARMUP_STEPS * BATCH / problem.n)))
        for _ in range(MOST_STAGES):
            found = adam_epochs(problem, start, scale, epochs, self.generator)
            start, saturated = self.resize(found, counts)
            if not saturated:
                break
            counts = [2 * count for count in counts]
        return start

    def vector_guess(self, start: Factors) -> Factors | None:
        """Where blocks are vectors, those that proximal steps arrive at; None elsewhere and for the empty head."""
        if self.max_rank is not None or not has_vector_blocks(self.problem):
            return None
        found = proximal_start(self.problem, start)
        return found if found.n_units else None

    def second_guess(self, init: Factors) -> Factors | None:
        """A warm start with as many small random units again, brought near the optimum in the same way.

        None if that is no better than the start itself.
        """
        problem = self.problem
        init = init.to(problem.dtype)
        counts = [
            0 if units.u is None else max(4, math.ceil(len(units.v) / c.n_gates))
            for c, units in zip(problem.components, init.units, strict=True)
        ]
        found = self.vector_guess(init) if quick(problem, counts) else None
        if found is not None:
            return found
        fresh = random_factors(problem, [max(1, n) for n in counts], self.generator, problem.dtype)
        units = []
        for component, old, new in zip(problem.components, init.units, fresh.units, strict=True):
            room = min(component.p, component.q) * component.n_gates - len(old.v)
            if self.max_rank is not None:
                room = min(room, self.max_rank - init.n_units)
            if old.u is None or new.u is None or room <= 0:
                units.append(old)
                continue
            chosen = torch.randperm(len(new.v), generator=self.generator)[:room].sort().values.to(problem.device)
            units.append(join_units(old, Units(new.u[chosen], new.v[chosen], pick_gates(new.gate, chosen))))
        start = Factors(units, init.intercept)
        norm = 0.5 * start_scale(problem, max(1, start.n_units))
        found = adam_epochs(
            problem,
            start,
            lambda k: norm / math.sqrt(problem.components[k].weight),
            LEAST_EPOCHS,
            self.generator,
        )
        # Epochs leave the neighbourhood of an optimum that the start is already in.
        return found if problem.value_and_gradient(found)[0] < problem.value_and_gradient(init)[0] else None

    def resize(self, factors: Factors, counts: list[int]) -> tuple[Factors, bool]:
        """Drop the units that carry next to nothing, and add small random ones; whether nearly all were in use.

        Then as many again are added.
        """
        problem = self.problem
        total = sum(float(b.double().sum()) for b in canonical(problem, factors, 0.0)[1])
        weight = max(problem.penalty_weight(c) for c in problem.components)
        slim, _ = canonical(problem, factors, SPARE * weight * total)
        fresh = random_factors(problem, counts, self.generator, problem.dtype)
        units = []
        doubled = False
        for component, small, full, new in zip(problem.components, slim.units, factors.units, fresh.units, strict=True):
            if small.u is None or full.u is None or new.u is None:
                units.append(small)
                continue
            room = min(component.p, component.q) * component.n_gates - len(small.v)
            if self.max_rank is not None:
                room = min(room, self.max_rank - slim.n_units)
            # A margin of a third over the units in use: with too few, the factored objective stalls.
            saturated = len(small.v) > SATURATED * len(full.v)
            extra = max(0, min(room, len(new.v), len(full.v) if saturated else len(small.v) // 6))
            doubled = doubled or (saturated and extra > 0)
            chosen = torch.randperm(len(new.v), generator=self.generator)[:extra].to(problem.device)
            units.append(join_units(small, Units(new.u[chosen], new.v[chosen], pick_gates(new.gate, chosen))))
        return Factors(units, factors.intercept), doubled

    def spacing(self, factors: Factors) -> int:
        """Iterations until the next check at the earliest, so that they cost as much as it does.

        By a count of multiplications, not by the clock: a solution must be a function of its inputs.
        """
        problem = self.problem
        unit = [3 * c.form.unit_work + 6 * c.q for c in problem.components]
        iteration = sum(len(units.v) * work for units, work in zip(factors.units, unit, strict=True))
        forming, searching = self.subspace.work(PAIRS, 6)
        # Losses, conjugates and the intercept's Newton steps, entry by entry.
        check = min(forming, searching) + 2000 * problem.outputs
        return max(5, min(40, math.ceil(check / max(1, iteration))))

    def stall(self, factors: Factors, bound: Certificate) -> float:
        """Decrease of the objective in ten iterations below which more units are called for.

        With every unit in use the gap may never close, so the answer comes early; while some are idle, a slow decrease
        is only the lag of the gap behind the objective.
        """
        used, _ = canonical(self.problem, factors, IDLE * bound.gap)
        return (STALL_FULL if used.n_units >= 0.95 * factors.n_units else STALL_IDLE) * bound.gap

    def full(self, factors: Factors, pair: SingularPair) -> bool:
        """Whether the pair's block has all the units there can be: then no stall is possible."""
        component, units = self.problem.components[pair.component], factors.units[pair.component]
        size = unit_sizes(units)
        # Units that have shrunk to nothing count for nothing.
        used = size > COLLAPSED * size.max() if len(size) else size > 0
        if units.gate is not None and pair.gate is not None:
            used = used & units.gate.eq(pair.gate)
        return int(used.sum()) >= min(component.p, component.q)

    def room(self, factors: Factors) -> int:
        """Units that a block may get at once: half as many as it has on average, or as many as are looked for."""
        return max(
            PAIRS,
            *(
                math.ceil(len(units.v) / component.n_gates / 2)
                for component, units in zip(self.problem.components, factors.units, strict=True)
            ),
        )

    def grow(self, factors: Factors, bound: Certificate) -> Factors | None:
        """More units, up to half as many again, along the singular vectors that lie above beta."""
        room = LARGEST_GROWTH
        if self.max_rank is not None:
            factors, _ = canonical(self.problem, factors, 1e-3 * self.tol * bound.primal)
            room = min(room, self.max_rank - factors.n_units)
        _, pairs = self.estimate(factors, size=self.room(factors))
        # Pairs that are hardly above beta cost units and close nothing.
        least = self.problem.beta * (1.0 + 0.1 * self.tol)
        wanted = [p for p in pairs if p.sigma > least * self.problem.components[p.component].weight]
        wanted = [p for p in wanted if not self.full(factors, p)]
        wanted = sorted(wanted, key=lambda pair: -pair.sigma)[: max(0, room)]
        return self.add_units(factors, wanted) if wanted else None

    def widen(self, factors: Factors, bound: Certificate, pairs: list[SingularPair]) -> Factors | None:
        """More units along those pairs above beta that the units in use do not span.

        They would grow from next to nothing, and until then keep the gap open however good the objective is.
        """
        used, _ = canonical(self.problem, factors, IDLE * bound.gap)
        outside = [p for p in pairs if not self.full(factors, p) and spanned(used, p) < SPANNED]
        outside.sort(key=lambda pair: -pair.sigma)
        room = self.room(factors)
        blocks = [(pair.component, pair.gate) for pair in outside]
        outside = [pair for i, pair in enumerate(outside) if blocks[:i].count(blocks[i]) < room]
        if self.max_rank is not None:
            outside = outside[: max(0, self.max_rank - factors.n_units)]
        return self.add_units(factors, outside) if outside else None

    def enlarge(self, old: LBFGS, before: Factors, after: Factors) -> tuple[LBFGS, Factors]:
        """An optimiser for more units that keeps the curvature pairs of the old ones."""
        optimiser, shapes = self.optimiser(after, old.x.dtype)
        kept = [len(new.v) >= len(was.v) for new, was in zip(after.units, before.units, strict=True)]
        if all(kept) and self.max_rank is None and len(old.pairs):
            optimiser.pairs = old.pairs.mapped(padding(before, after))
        return optimiser, shapes

    def trim(self, optimiser: LBFGS, factors: Factors, gradient: Factors, spare: float) -> tuple[LBFGS, Factors] | None:
        """An optimiser without the units that together carry less than ``spare``; None where there are few of them.

        Units are first turned into principal ones, by an orthogonal map that keeps curvature pairs valid.
        """
        maps = principal_units(self.problem, factors, gradient, spare)
        kept = sum(len(own) for own in maps if own is not None)
        total = sum(own.shape[1] for own in maps if own is not None)
        if not total or kept > WORTH_TRIMMING * total:
            return None
        smaller, shapes = self.optimiser(turned(factors, maps), optimiser.x.dtype)
        if len(optimiser.pairs):
            smaller.pairs = optimiser.pairs.mapped(lambda vectors: turned_rows(vectors, factors, maps))
        return smaller, shapes

    def finish(self, factors: Factors, message: str, bound: Certificate | None = None) -> Solution:
        """The certified solution without its smallest units; ``bound`` is the estimate with all of them, if known."""
        problem = self.problem
        self.n_proofs += 1
        if bound is None and factors.n_units:
            bound, _ = self.estimate(factors)
        if factors.n_units:
            assert bound is not None
            factors, bound = self.slim(factors, bound)
        if self.proves:
            factors, certificate = certify_refitted(problem, factors)
        else:
            factors, _ = refit_intercept(problem, factors)
            certificate = self.estimate(factors.to(problem.dtype))[0] if bound is None else bound
        return Solution(
            factors,
            certificate,
            self.history,
            self.n_iter,
            certificate.relative_gap <= self.tol,
            message,
            {"proofs": self.n_proofs},
        )

    def slim(self, factors: Factors, bound: Certificate) -> tuple[Factors, Certificate]:
        """Factors without as many of the smallest units as the gap ``bound`` allows, with an estimate of their gap.

        The gap is of first order in what is left out, the objective of second: as much is left out as keeps the gap.
        """
        for share in (0.02 * self.tol, 0.05 * self.tol**2, 0.0):
            slim, _ = canonical(self.problem, factors.to(torch.float64), share * abs(bound.primal))
            if slim.n_units == factors.n_units:
                return slim, bound
            certificate, _ = self.estimate(slim.to(self.problem.dtype))
            if certificate.relative_gap <= max(0.9 * self.tol, 1.05 * bound.relative_gap):
                break
        return slim, certificate


@register("factored")
def solve_factored(
    problem: Problem,
    tol: float = 1e-3,
    max_iter: int = 2000,
    max_rank: int | None = None,
    random_state: int = 0,
    init: Factors | None = None,
    progress: Callable[[dict], None] | None = None,
    prove: bool = True,
    resumed: bool = False,
) -> Solution:
    """Minimise by preconditioned L-BFGS on the factors, with certified gap.

    Parameters
    ----------
    problem : the program, beta included.
    tol : relative duality gap (gap / primal) at which to stop.
    max_iter : iterations of L-BFGS in all.
    max_rank : largest number of units, None for no limit beyond the mathematics.
    random_state : seed; the result is a function of it.
    init : factors to start from, such as those of a larger beta or of a trained network.
    progress : called with a dict at every check; its ``factors`` are those of the moment.
    prove : False ends with an estimated gap, not certified, and saves the time of the proof: for the steps of a path.
    resumed : whether ``init`` is where a solve of this very problem was: then no new units are tried first.
    """
    with fast_products(largest_product(problem)):
        state = Factored(problem, tol, max_iter, max_rank, random_state, progress, prove)
        if init is not None and resumed:
            return state.run(init.to(problem.dtype))
        if init is None:
            return state.run(state.first_guess(initial_units(problem, max_rank)), cold=True)
        if problem.n >= WARMUP_SAMPLES and any(not component.ridge for component in problem.components):
            found = state.second_guess(init)
            if found is not None:
                return state.run(found)
        return state.run(init.to(problem.dtype), warm=True)
