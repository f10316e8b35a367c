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
from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy.optimize import nnls
from torch import Tensor

from convexheads.architectures import Stats
from convexheads.certificate import (
    Certificate,
    DualPoint,
    certify_refitted,
    dual_point,
    penalty,
    rescaled_bound,
)
from convexheads.evaluation import Evaluation
from convexheads.memory import suited_heap
from convexheads.problem import Problem
from convexheads.products import fast_products
from convexheads.solvers.base import Solution, register
from convexheads.solvers.correction import corrected
from convexheads.solvers.differences import Differences, fits
from convexheads.solvers.explicit import ExplicitObjective, suits_explicit
from convexheads.solvers.lbfgs import IMAGES, LBFGS, MEMORY, Evaluate
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.solvers.span import Span, span_work, with_coupled
from convexheads.solvers.starts import FEW_UNITS, WARMUP_SAMPLES, first_guess, second_guess
from convexheads.solvers.units import (
    Placement,
    canonical,
    join_units,
    largest,
    pair_units,
    placements,
    principal_units,
    spanned,
    turned,
    turned_rows,
    unit_sizes,
)
from convexheads.solvers.warmup import lowered
from convexheads.subspace import PAIRS, ROUNDS, BlockSubspace, OutsidePairs, OutsideSubspace, SingularPair
from convexheads.types import Factors, History, Interval, Units

REBUILD, FIRST_REBUILD, FEW_REBUILD = 30, 25, 20
"""Iterations between two preconditioners, of which the first, made at a rough start, lasts less, and least of few
samples, ..."""
NEARLY, REBUILD_NEARLY = 2.0, 45
"""... and where the gap is at most this many times the tolerance: the last one has too few iterations to repay it."""
SOON = 0.3
"""Relative gap from which a preconditioner that is due has a part of its own for soft directions, ..."""
SETTLING, NEAR = 3e-3, 0.1
"""... or decrease of the objective in ten iterations, as a share of it, from which there is one with it at once: the
gap may wait for them; fewer iterations tell where the gap is small, too; if worth it ..."""
SOFT_WORK = 7e9
"""... because an evaluation takes this many multiplications, about, ..."""
OUTSIDE, OUTSIDE_ROUNDS = 20, 2
"""... with so many singular pairs of a block outside its units, from so many rounds of subspace iteration."""
DIFFERENCE_NOISE = 3e-6
"""Error of an objective by products of differences, as a share of it: a rise by less is accepted where the slope along
the step falls."""
STRUGGLE = 3
"""Evaluations of an iteration above which such products have a new reference."""
LOW_SEARCH = 2e-3
"""Precision of a relative gap from which singular values may be searched for by products in low precision."""
STALL_FULL, STALL_IDLE = 1e-2, 2e-4
"""Decrease in ten iterations, as a share of the gap, below which units are added: all units in use, or not."""
SETTLED = 0.5
"""Decrease in ten iterations, as a share of the gap, below which directions outside the units' span are added."""
SPANNED = 0.9
"""Share of a direction's norm within the units' span from which it is not outside."""
TRIMMED, TRIMMED_FALL = 1e-2, 1.0
"""Shares of the gap, and of the fall of the objective in ten iterations, in the smallest units that are dropped, ..."""
SHRINKING, LEAST_SHRINKING = 5.0, 0.05
"""... where units count for little whose singular value is below beta w by this many times the relative gap, and at
least by this share, ..."""
WORTH_TRIMMING = 0.8
"""... if they are so many that at most this share of the units is left."""
TRIMS = 3
"""Attempts at dropping units, ever fewer of them, where that costs the objective more than it has fallen."""
PATIENCE, FEW_PATIENCE = 2, 6
"""A check comes after this many times the shortest interval even if the gap is unlikely to have closed; of few samples,
where it takes longer than an evaluation, after this many."""
FIRST_CHECK = 10
"""Iterations from a first guess to the first check."""
TARGET, EXACT_TARGET, EXACT_NOISE = 0.94, 0.987, 2e-6
"""Share of the tolerance that the gap must be estimated below before a proof is tried; the second one, less so much in
all, where all singular values are found: then nothing but rounding makes a proof differ."""
ROUGH = 0.1
"""Precision of an estimate as a share of the gap at the one before."""
CONVERGED = 0.2
"""Growth of the largest singular value in a round of its search, as a share of that precision, that ends the search."""
SURE, SURE_ROUNDS = 0.03, 24
"""The same where the tolerance seems to be reached, and the most rounds then: a proof takes longer than all of them."""
POLISHED = 1.4
"""The program restricted to the units' span is solved where the gap is at most this many times its target for each time
that an evaluation takes longer than one in the span, ..."""
POLISHED_AT_ONCE, POLISHED_AGAIN = 0.4, 0.8
"""... and at most these shares of what it was the time before, where that was just now, and after iterations, ..."""
POLISHED_FROM = 0.2
"""... but at no larger gap, whatever the target: iterations lower the objective by more in that time; ..."""
POLISH_WORK = 1e9
"""... if it takes this many multiplications, about: with ..."""
POLISH_PAIRS, POLISH_COUPLED = 10, 5
"""... so many singular pairs outside of a block's units, and so many directions outside that are coupled with these."""
LEFT, FEW_LEFT, MANY_SAMPLES = 0.105, 0.3, 5000
"""Share of the gap that is left by corrections along the singular pairs above beta, before it is known; the second one
where all singular values are found, so that one correction does what it can do, and samples are fewer than the last
number: there a correction takes as long as ten iterations; ..."""
CORRECTIONS, STEP_LEFT = 5, 0.5
"""... and so many of them at most, which go on while each of those that remain needs leave no less than this."""
PUSHED = 0.13
"""Share of the gap that corrections push into the sizes of units; they move large units, too, where the gap would stay
too large for that."""
LARGE, FEWER, OVERDONE = 0.05, 3.0, 0.5
"""These are units of at least this share of the largest one; of so many times that share from then on where what the
gap would be without its excess has grown, and is above this share of the target."""
SURPLUS = 3.0
"""Growth of the penalty beyond what the equations of a correction know, as a share of the gap that is asked for, from
which the correction counts it, and moves large units, too: without, no other one comes to the target from there."""
CORRECTION_SPARED = 0.005
"""Share of the tolerance, of the objective, in the smallest units that a correction leaves out: what that does to the
dual point is of first order, and would have to be corrected in turn."""
SPARED = (0.1, 0.02)
"""Shares of the tolerance, of the objective, in the smallest units that a solution may do without ..."""
ROOM = 0.75
"""... of which the first is tried where the gap is below this share of what is asked for, or far above, ..."""
SLACK = 1.05
"""... and the factor by which the gap may rise for it."""
FREE = 1e-5
"""Share of the tolerance that the gradient of the intercept may be left with between proofs."""
FLOAT32_GAP, ROUNDED = 5e-4, 1e-7
"""Gaps that matter down to this are estimated in float32, where the intercept's gradient is rounding below that."""
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


def largest_product(problem: Problem) -> float:
    """Multiplications of the product of unit features and values, about; none where oneDNN's memory is not free."""
    if not problem.budget.roomy:
        return 0.0
    return problem.local * max(FEW_UNITS * c.form.value_width * c.width for c in problem.components)


def curvature_pairs(problem: Problem, x: Tensor) -> int:
    """Curvature pairs that L-BFGS keeps: fewer where they would take more than a twentieth of the memory limit."""
    limit, vectors = problem.budget.limit, 3  # s, y and the image of y
    return MEMORY if limit is None else max(4, min(MEMORY, limit // (20 * vectors * x.numel() * x.element_size())))


def length(vector: Tensor) -> float:
    """The Euclidean norm, without what Tensor.norm does before it gets there."""
    return float(torch.linalg.vector_norm(vector))


def known_fall(values: list[float]) -> float:
    """The decrease of the objective in the last ten iterations, or in as many as are known."""
    return values[-11:][0] - values[-1] if values else 0.0


def recent_fall(values: list[float]) -> float:
    """The decrease of the objective in the last ten iterations; infinite after fewer."""
    return known_fall(values) if len(values) > 10 else math.inf


def at_most(count: int, pairs: list[SingularPair]) -> list[SingularPair]:
    """The pairs of every block with the largest singular values, in descending order."""
    pairs = sorted(pairs, key=lambda pair: -pair.sigma)
    blocks = [(pair.component, pair.gate) for pair in pairs]
    return [pair for i, pair in enumerate(pairs) if blocks[:i].count(blocks[i]) < count]


@dataclass
class Schedule:
    """When the gap is looked at next: once iterations have cost as much, and no later than ``patience`` times that.

    Gap and gradient fall together, so that a gap is foreseen from the last one found and from the gradients' norms.
    ``target`` is the relative gap at which a proof is tried, ``goal`` the one at which a check is of use: there the
    program may be solved in the units' span, too.
    """

    target: float
    patience: int = PATIENCE
    goal: float = 0.0
    earliest: int = 0
    latest: int = 0
    gap: float = math.inf
    norm: float = 0.0

    def due(self, iteration: int, norm: float, margin: float) -> bool:
        """Whether a check is overdue, or the gap is foreseen to be at most ``margin`` times its goal."""
        likely = norm * self.gap <= margin * self.goal * self.norm
        return iteration >= self.latest or (likely and iteration >= self.earliest)

    def checked(self, iteration: int, spacing: int, gap: float, norm: float, polishable: float) -> None:
        """A check has found the gap at a gradient of this norm; the next one is worth it ``spacing`` later.

        ``polishable`` is the gap at which the program is solved in the units' span.
        """
        self.goal = max(self.target, polishable)
        self.earliest, self.latest = iteration + spacing, iteration + self.patience * spacing
        self.gap, self.norm = gap, norm

    def ask_for_more(self, tol: float, estimated: float, proved: float) -> None:
        """A proof has failed: the estimate was too low, by a factor that the next one allows for."""
        short = estimated / proved
        self.target = max(0.2 * self.target, 0.9 * min(self.target, estimated, tol * short))


@dataclass(frozen=True)
class Search:
    """How singular values are searched for, for an estimate of the gap.

    Attributes
    ----------
    precision : relative gap that matters.
    size : singular pairs of a block that converge.
    growth : of the largest singular value in a round, as a share of ``precision``, that ends the search.
    rounds : the most rounds.
    most : of a relative gap above it an estimate may say no more than that.
    low : precision that factors of products may be rounded to.
    """

    precision: float
    size: int = PAIRS
    growth: float = CONVERGED
    rounds: int = ROUNDS
    most: float = math.inf
    low: torch.dtype | None = None


@dataclass
class Look:
    """An estimate of the gap: singular pairs above beta, whether a closer one would find the same, and the outputs.

    These are the outputs of the ``refitted`` factors: with the best intercept, in float64. ``slack`` is what the gap
    would be if no singular value were above beta: it is zero where those of units are beta.
    """

    bound: Certificate
    pairs: list[SingularPair]
    sure: bool
    outputs: Tensor
    refitted: Factors
    slack: float


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
        # Where there are few samples units are few, and iterations cheap beside checks.
        few = problem.n < WARMUP_SAMPLES
        self.patience = FEW_PATIENCE if few else PATIENCE
        self.first_rebuild = FEW_REBUILD if few else FIRST_REBUILD
        # Whether units that shrink may be dropped early, and whether any were dropped.
        self.trusting, self.trimmed = not few, False
        self.least_gap, self.least_at = math.inf, 0
        # The gap and the iteration of the last solve in the units' span.
        self.polished_at, self.polished_in = math.inf, -1
        # The precision of products of differences, where they are worth it, and what takes them.
        self.low: torch.dtype | None = None
        self.differences: Differences | None = None
        self.subspace = BlockSubspace(problem, self.generator)
        self.beyond = OutsideSubspace(problem, self.generator)
        # The gap follows from the gradient where nothing but ridge branches is left.
        self.ridge_only = all(component.ridge for component in problem.components)
        # The gap at which a proof is tried, and by which factor it may rise for fewer units.
        exact = self.subspace.exact(PAIRS, ROUNDS)
        self.target = max(TARGET * tol, EXACT_TARGET * tol - EXACT_NOISE) if exact else TARGET * tol
        self.slack = 1.0 if exact else SLACK
        # The share of the largest unit from which corrections move units, and that of the gap that they leave.
        self.large = LARGE
        self.left = FEW_LEFT if exact and problem.n < MANY_SAMPLES else LEFT

    # Estimates between proofs -----------------------------------------------------------------------------

    def estimate(self, factors: Factors, search: Search | None = None) -> Look:
        """Gap with singular values from below (never a claim), and the singular pairs above beta.

        ``search`` : default: as close as the tolerance asks for.
        """
        search = Search(self.tol) if search is None else search
        return self.measure(*self.refit(factors, self.exact_dtype(search.precision)), search)

    def exact_dtype(self, precision: float) -> torch.dtype:
        """What the outputs of an estimate are taken in where a relative gap of ``precision`` matters."""
        # Targets of a squared loss may lie far from zero, where float32 has few digits left for residuals.
        exact = precision < FLOAT32_GAP or self.problem.loss.constant_curvature
        return torch.float64 if exact else self.problem.dtype

    def measure(self, refitted: Factors, O: Tensor, search: Search) -> Look:
        """:meth:`estimate` of what :meth:`refit` has returned."""
        problem = self.problem
        point = DualPoint.at(problem, O)
        primal = point.loss + penalty(problem, refitted)

        def bound(sigma: float, ridge: float) -> Certificate:
            interval = Interval(sigma, sigma, "estimate", False)
            return rescaled_bound(problem, point, interval, ridge, primal, refitted.intercept, 5)

        def hopeless(sigma: float, ridge: float) -> bool:
            return bound(sigma, ridge).relative_gap > search.most

        limit = None if math.isinf(search.most) else hopeless
        sigma, pairs, ridge = self.subspace.top_pairs(
            point.L.to(problem.dtype),
            search.size,
            search.rounds,
            search.growth * search.precision,
            limit,
            search.low,
            refitted,
        )
        slack = primal - (point.loss - point.inner - ridge)
        return Look(bound(sigma, ridge), pairs, False, O, refitted, slack)

    def look(self, factors: Factors, gap: float) -> Look:
        """An estimate as precise as a relative gap of about ``gap`` asks for."""
        rough = max(self.tol, min(0.1, ROUGH * gap))
        refitted, O = self.refit(factors, self.exact_dtype(rough))
        low = self.low if rough >= LOW_SEARCH else None
        seen = self.measure(refitted, O, Search(rough, low=low))
        return replace(seen, sure=rough == self.tol and self.subspace.exact(PAIRS, ROUNDS))

    def close_look(self, factors: Factors, most: float = math.inf) -> Look:
        """An estimate that another one would hardly change; of a relative gap above ``most`` it may say no more."""
        refitted, O = self.refit(factors.to(self.problem.dtype), self.exact_dtype(self.tol))
        search = Search(self.tol, growth=SURE, rounds=SURE_ROUNDS, most=most)
        return replace(self.measure(refitted, O, search), sure=True)

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
        if bound.gap < (1.0 if self.ridge_only else 0.9) * self.least_gap:
            self.least_gap, self.least_at = bound.gap, self.n_iter
        if not self.ridge_only and bound.relative_gap > NOISY:
            return False
        return self.n_iter - self.least_at >= (RIDGE_PATIENCE if self.ridge_only else SEARCH_PATIENCE)

    def refit(self, factors: Factors, dtype: torch.dtype) -> tuple[Factors, Tensor]:
        """Factors in float64 with the intercept solved for, and their outputs in ``dtype``."""
        problem = self.problem
        O = problem.forward(factors, factors.tensors()[0].dtype).to(dtype)
        factors = factors.to(torch.float64)
        if factors.intercept is None:
            return factors, O
        bare = O - factors.intercept.to(dtype)
        accuracy = max(FREE * self.tol, ROUNDED if dtype == torch.float32 else 0.0)
        b = problem.best_intercept(bare, factors.intercept, accuracy)
        return Factors(factors.units, b.double()), bare + b

    def polishable(self, factors: Factors, target: float) -> float:
        """The largest relative gap at which the program is solved in the units' span; zero where it is not."""
        problem = self.problem
        iteration = problem.gradient_work(factors)
        if problem.n * iteration < POLISH_WORK:
            return 0.0
        restricted = span_work(problem, factors, POLISH_PAIRS + POLISH_COUPLED, self.low)
        if not problem.world.every(math.isfinite(restricted)):
            return 0.0
        again = POLISHED_AT_ONCE if self.n_iter == self.polished_in else POLISHED_AGAIN
        return min(POLISHED * iteration / restricted * target, again * self.polished_at, POLISHED_FROM)

    def polish(self, optimiser: LBFGS, factors: Factors, seen: Look, target: float) -> bool:
        """Solve the program in the span of ``factors`` and of some directions outside, near enough to an optimum.

        The optimiser goes on from there. False where the gap is still too large, or has hardly fallen since the last
        time, where iterations cost little, or where nothing better was found.
        """
        problem, gap = self.problem, seen.bound.relative_gap
        if not target < gap <= self.polishable(factors, target):
            return False
        self.polished_at, self.polished_in = gap, self.n_iter
        L = dual_point(problem, seen.outputs).to(optimiser.x.dtype)
        outside = self.beyond.pairs(L, factors, POLISH_PAIRS, OUTSIDE_ROUNDS, self.low)
        outside = with_coupled(problem, L, factors, outside, POLISH_COUPLED, self.low)
        span = Span(problem, seen.refitted.to(L.dtype), seen.outputs, outside, self.low, self.generator)
        return optimiser.jump(span.solve(target, optimiser.noise).flat())

    def correctable(self, target: float) -> float:
        """The largest relative gap from which corrections are likely to come to ``target``; zero without them."""
        return 0.0 if self.ridge_only else target / self.left

    def correct(self, seen: Look, target: float) -> Look | None:
        """A look at factors of a gap of at most ``target``, found by Newton steps along the pairs above beta.

        None where none were found: iterations know nothing of those that were tried.
        """
        gap = first = seen.bound.relative_gap
        if not target < first <= self.correctable(target):
            return None
        allowed = target * abs(seen.bound.primal)
        turn = False
        for remaining in reversed(range(CORRECTIONS)):
            # What is left when nothing is above beta any more: by then it has grown by a share of what was above.
            turn = not turn and self.large <= 1.0 and seen.slack + PUSHED * seen.bound.gap > allowed
            movable = any(units.u is not None and len(units.v) for units in seen.refitted.units)
            if not seen.pairs and not (turn and movable):
                break
            spare, most = CORRECTION_SPARED * allowed, SURPLUS * allowed
            factors = corrected(self.problem, seen.refitted, seen.outputs, seen.pairs, spare, self.large, turn, most)
            if self.max_rank is not None:
                factors = largest(factors, self.max_rank)
            found = self.close_look(factors)
            if found.bound.relative_gap <= target:
                return found
            if turn and found.slack > max(seen.slack, OVERDONE * allowed):
                # Some of these units have changed their sign: they are not large.
                self.large, turn = FEWER * self.large, False
                continue
            seen, gap = found, min(gap, found.bound.relative_gap)
            if seen.bound.relative_gap * STEP_LEFT**remaining > target:
                break
        # One attempt says less than all that have come before.
        self.left = math.sqrt(self.left * gap / first)
        return None

    # Units ------------------------------------------------------------------------------------------------

    def add_units(self, factors: Factors, pairs: list[SingularPair], O: Tensor) -> Factors:
        """Append singular pairs above beta as units, at the sizes that a quadratic model gives them together.

        Left to the factored objective alone, a unit near zero grows by a factor sigma / beta an iteration only. The
        model is min over t >= 0 of sum_i (beta w - sigma_i) t_i + (1/2) t^T Q t with Q the loss curvature between
        the pairs' outputs, at the outputs ``O`` of the head.
        """
        problem = self.problem
        dtype = factors.tensors()[0].dtype
        sizes = self._step_sizes(pairs, O.to(dtype))
        units = []
        for k, (component, old) in enumerate(zip(problem.components, factors.units, strict=True)):
            own = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if pair.component == k and size > 0]
            if old.u is None or not own:
                units.append(old)
                continue
            new = pair_units(component, [pair for pair, _ in own], old.v)
            assert new.u is not None
            root = torch.tensor([math.sqrt(size) for _, size in own], dtype=dtype, device=problem.device)
            # -L is the descent direction: the unit is -u v^T.
            u, v = (t * root.view(-1, *[1] * (t.ndim - 1)) for t in (-new.u, new.v))
            units.append(join_units(old, Units(u, v, new.gate)))
        return Factors(units, factors.intercept)

    def _step_sizes(self, pairs: list[SingularPair], O: Tensor) -> list[float]:
        problem, dtype = self.problem, O.dtype
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
        O = torch.zeros(shape, dtype=dtype, device=self.problem.device)
        units = pair_units(component, [pair], O)
        rows = component.forward(component.features(stats[pair.component], units), units.v)
        O[..., component.outputs] = rows.view(*shape[:-1], component.width)
        return O

    def worth_softening(self, factors: Factors, bound: Certificate | None, values: list[float], due: bool) -> bool:
        """Whether soft directions get a part of their own: near an optimum, and where iterations are expensive.

        ``values`` are the last objectives. Where a preconditioner is ``due`` in any case, it may have one earlier. A
        small gap alone may be luck: while the objective falls fast, units are no singular vectors.
        """
        if bound is None:
            return False
        fall = known_fall(values) if bound.relative_gap <= NEAR else recent_fall(values)
        if fall > SETTLING * abs(bound.primal) and not (due and bound.relative_gap <= SOON):
            return False
        return self.problem.n * self.problem.gradient_work(factors) >= SOFT_WORK

    def preconditioner(self, factors: Factors, gap: float | None) -> Preconditioner:
        """For iterations from ``factors``; where the relative ``gap`` is known, with a part for soft directions."""
        if gap is None:
            return Preconditioner(self.problem, factors, self.generator)
        return Preconditioner(self.problem, factors, self.generator, self.outside(factors), gap)

    def outside(self, factors: Factors) -> dict[tuple[int, int | None], OutsidePairs]:
        """Singular pairs of A_g^* L outside the span of every block's units, at the gradient L of the loss."""
        problem = self.problem
        O = problem.forward(factors)
        L = problem.loss.gradient(O, *problem.targets_of(slice(0, problem.n), problem.dtype))
        return self.beyond.pairs(L, factors, OUTSIDE, OUTSIDE_ROUNDS, self.low)

    # The solve --------------------------------------------------------------------------------------------

    def optimiser(
        self, factors: Factors, dtype: torch.dtype, placement: Placement | None = None
    ) -> tuple[LBFGS, Factors]:
        """An optimiser that starts from ``factors``, and their shapes.

        ``placement`` has the units that the last one had among them: then its reference is kept.
        """
        factors = factors.to(dtype)
        evaluate: Evaluate
        noise = 2e-7 if dtype == torch.float32 else 1e-14
        known, self.differences = self.differences, None
        if self.low is not None and dtype == torch.float32 and not self.whole(factors) and self.fitting(factors):
            if known is None or placement is None:
                self.differences = Differences(self.problem, factors, self.low)
            else:
                known.extend(placement, factors)
                self.differences, known = known, None
            evaluate, noise = self.differences, DIFFERENCE_NOISE
        elif suits_explicit(self.problem):
            evaluate = ExplicitObjective(self.problem, factors)
        else:
            evaluate = partial(self.problem.flat_value_and_gradient, factors)
        if known is not None:
            known.release()
        x = factors.flat()
        images = IMAGES if self.problem.budget.roomy else len(x)
        return LBFGS(evaluate, x, noise, curvature_pairs(self.problem, x), images), factors

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

    def solve(self, init: Factors | None, resumed: bool) -> Solution:
        """Iterate from a first guess, or from ``init``: where a solve of this very problem was if ``resumed``."""
        problem = self.problem
        if init is not None and resumed:
            return self.run(init.to(problem.dtype))
        if init is None:
            return self.run(first_guess(problem, self.max_rank, self.generator), cold=True)
        found = second_guess(problem, init, self.max_rank, self.generator)
        if found is not None:
            return self.run(found)
        return self.run(init.to(problem.dtype), warm=True)

    def run(self, factors: Factors, warm: bool = False, cold: bool = False) -> Solution:
        """Iterate from ``factors``: a solution of another beta (warm), a first guess (cold), or neither."""
        problem = self.problem
        if self.max_rank is not None:
            factors = largest(factors, self.max_rank)
        low = lowered(problem, factors).low
        if problem.world.every(low is not None):
            self.low = low
        optimiser, shapes = self.optimiser(factors, problem.dtype)
        schedule = Schedule(self.target, self.patience)
        if cold:
            # The gap of a first guess says nothing.
            spacing = self.spacing(shapes)
            schedule.earliest = schedule.latest = max(spacing, min(FIRST_CHECK, PATIENCE * spacing))
        built_at = -REBUILD
        values: list[float] = []
        stalls, stalled, soft, failed = 0, False, False, False
        bound: Certificate | None = None
        message = f"max_iter = {self.max_iter} was reached"
        while True:
            # The steadied gradient is smaller by a small factor: far away there is no need to look.
            due = self.ridge_only or schedule.due(self.n_iter, length(optimiser.gradient), HOPEFUL)
            if due:
                x, gradient = optimiser.steadied()
                if self.ridge_only:
                    bound = self.foreseen(optimiser.value, shapes.like(gradient))
                    due = bound.relative_gap <= schedule.target or self.n_iter % RIDGE_REPORTS == 0
                else:
                    due = schedule.due(self.n_iter, length(gradient), LIKELY)
            if due:
                current = shapes.like(x)
                seen: Look | None = None
                if not self.ridge_only:
                    seen = self.look(current, schedule.gap)
                    bound = seen.bound
                assert bound is not None
                self.report(bound.primal, bound.relative_gap, current)
                better: Look | None = None
                while seen is not None:
                    better = self.correct(seen, schedule.target)
                    if better is not None:
                        self.report(better.bound.primal, better.bound.relative_gap, better.refitted)
                        break
                    if not self.polish(optimiser, current, seen, schedule.target):
                        break
                    current, gradient = shapes.like(optimiser.x), optimiser.gradient
                    seen = self.close_look(current)
                    bound = seen.bound
                    self.report(bound.primal, bound.relative_gap, current)
                closed = bound if better is None else better.bound
                if closed.relative_gap <= schedule.target:
                    looked = seen if better is None else better
                    found = current if looked is None else looked.refitted
                    if looked is None and not self.proves:
                        # A proof solves for the intercept itself.
                        found, _ = self.refit(current, self.exact_dtype(self.tol))
                    slim, closed = self.slim(found, closed, schedule.target, looked is None or looked.sure)
                    if closed.relative_gap <= self.slack * schedule.target:
                        solution = self.finish(slim, closed, "the relative gap reached tol")
                        if solution.converged:
                            return solution
                        schedule.ask_for_more(self.tol, closed.relative_gap, solution.certificate.relative_gap)
                    if better is None:
                        # What has been proved since is the better bound.
                        bound = closed
                # A warm start of another beta lacks the units that this beta calls for.
                missing = warm and self.n_iter == 0
                grown = False
                if seen is not None:
                    fall = 0.0 if stalled else recent_fall(values)
                    seen.bound = bound
                    optimiser, shapes, grown = self.adapt(
                        optimiser, shapes, current, shapes.like(gradient), seen, fall, missing
                    )
                stalled = False
                if grown:
                    values.clear()
                    gradient = optimiser.gradient
                spacing = 0 if self.ridge_only else self.spacing(shapes)
                reach = max(self.polishable(shapes, schedule.target), self.correctable(schedule.target))
                schedule.checked(self.n_iter, spacing, bound.relative_gap, length(gradient), reach)
            if self.n_iter >= self.max_iter:
                break
            near = bound is not None and bound.relative_gap <= NEARLY * self.tol
            lasting = REBUILD_NEARLY if near else REBUILD if built_at else self.first_rebuild
            due = optimiser.inverse is None or self.n_iter - built_at >= lasting
            if not soft and self.worth_softening(shapes, bound, values, due):
                soft = due = True
            if due:
                optimiser.inverse = None  # its memory goes first
                gap = bound.relative_gap if bound is not None and soft else None
                optimiser.set_inverse(self.preconditioner(shapes.like(optimiser.x), gap).apply)
                built_at = self.n_iter
            evaluations = optimiser.n_evaluations
            moved = optimiser.step()
            values.append(optimiser.value)
            self.n_iter += 1
            if self.differences is not None and (not moved or optimiser.n_evaluations - evaluations > STRUGGLE):
                # Rounding may be to blame; but not if nothing was found from a new reference either.
                if not moved and failed:
                    self.leave_low()
                failed = not moved
                optimiser, moved = self.renewed(optimiser, shapes), True
            else:
                failed = False
            if moved and not self.exhausted(optimiser, bound):
                continue
            stalls, stalled = stalls + 1, True
            schedule.latest, built_at = self.n_iter, -REBUILD
            if optimiser.x.dtype == torch.float32:
                # float32 has no more digits to give: go on in float64.
                self.leave_low()
                self.problem = self.problem.in_dtype(torch.float64)
                self.subspace.problem = self.beyond.problem = self.problem
                optimiser, shapes = self.optimiser(shapes.like(optimiser.x), torch.float64)
            elif stalls > 5:
                message = "no further decrease could be found in float64"
                break
        last, O = self.refit(shapes.like(optimiser.steadied()[0]), self.exact_dtype(self.tol))
        bound = self.measure(last, O, Search(self.tol)).bound
        return self.finish(*self.slim(last, bound, max(schedule.target, bound.relative_gap), True), message)

    def renewed(self, optimiser: LBFGS, shapes: Factors) -> LBFGS:
        """An optimiser that evaluates anew where this one is, with all that it knows."""
        fresh, _ = self.optimiser(shapes.like(optimiser.x), optimiser.x.dtype)
        fresh.inherit(optimiser)
        return fresh

    def free_low(self) -> None:
        """Free what products in low precision need: if they go on, it is made again."""
        if self.differences is not None:
            self.differences.release()
        if self.low is not None:
            self.problem.forget(self.low)

    def leave_low(self) -> None:
        """Take products in low precision no more."""
        self.free_low()
        self.low = None

    def whole(self, factors: Factors) -> bool:
        """Whether every component's block is evaluated as a whole, rather than units in low precision."""
        assert self.low is not None
        return Evaluation(self.problem, factors, low=self.low).whole

    def fitting(self, factors: Factors) -> bool:
        """Whether every worker has room for differences from these factors."""
        assert self.low is not None
        return self.problem.world.every(fits(self.problem, factors, self.low))

    def adapt(
        self,
        optimiser: LBFGS,
        shapes: Factors,
        factors: Factors,
        gradient: Factors,
        seen: Look,
        fall: float,
        missing: bool,
    ) -> tuple[LBFGS, Factors, bool]:
        """An optimiser for as many units as are called for, with their shapes, and whether there are more.

        ``fall`` is the decrease of the objective in the last ten iterations; ``missing`` says that units are known to
        be.
        """
        grown = None
        if seen.pairs and (missing or fall < self.stall(factors, seen.bound)):
            grown = self.grow(factors, seen)
        elif fall < SETTLED * seen.bound.gap:
            smaller = self.trim(optimiser, factors, gradient, seen.bound, fall)
            if smaller is not None:
                optimiser, shapes = smaller
                factors = shapes.like(optimiser.x)
            grown = self.widen(factors, seen)
        if grown is None:
            return optimiser, shapes, False
        # What was dropped may have come back: no more than once.
        self.trusting = self.trusting and not self.trimmed
        return *self.enlarge(optimiser, factors, grown, seen.outputs), True

    def spacing(self, factors: Factors) -> int:
        """Iterations until the next check at the earliest, so that they cost as much as it does.

        By a count of multiplications, not by the clock: a solution must be a function of its inputs.
        """
        problem = self.problem
        iteration = problem.gradient_work(factors)
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

    def grow(self, factors: Factors, seen: Look) -> Factors | None:
        """More units, up to half as many again, along the singular vectors that lie above beta."""
        room = LARGEST_GROWTH
        if self.max_rank is not None:
            factors, _ = canonical(self.problem, factors, 1e-3 * self.tol * seen.bound.primal)
            room = min(room, self.max_rank - factors.n_units)
        size = self.room(factors)
        pairs = self.estimate(factors, Search(self.tol, size=size)).pairs
        # Pairs that are hardly above beta cost units and close nothing.
        least = self.problem.beta * (1.0 + 0.1 * self.tol)
        wanted = [p for p in pairs if p.sigma > least * self.problem.components[p.component].weight]
        wanted = [p for p in wanted if not self.full(factors, p)]
        wanted = at_most(size, wanted)[: max(0, room)]
        return self.add_units(factors, wanted, seen.outputs) if wanted else None

    def widen(self, factors: Factors, seen: Look) -> Factors | None:
        """More units along those pairs above beta that the units in use do not span.

        They would grow from next to nothing, and until then keep the gap open however good the objective is.
        """
        used, _ = canonical(self.problem, factors, IDLE * seen.bound.gap)
        outside = [p for p in seen.pairs if not self.full(factors, p) and spanned(used, p) < SPANNED]
        outside = at_most(self.room(factors), outside)
        if self.max_rank is not None:
            outside = outside[: max(0, self.max_rank - factors.n_units)]
        return self.add_units(factors, outside, seen.outputs) if outside else None

    def enlarge(self, old: LBFGS, before: Factors, after: Factors, O: Tensor) -> tuple[LBFGS, Factors]:
        """An optimiser for more units, that keeps what is known of the old ones: pairs, preconditioner, reference.

        New units have a preconditioner of their own, at the outputs ``O`` of the head.
        """
        kept = [len(new.v) >= len(was.v) for new, was in zip(after.units, before.units, strict=True)]
        if not all(kept) or self.max_rank is not None:
            return self.optimiser(after, old.x.dtype)
        there, new = placements(before, after)
        optimiser, shapes = self.optimiser(after, old.x.dtype, there)
        if len(old.pairs):
            optimiser.pairs = old.pairs.mapped(there.put)
        inverse = old.inverse
        if inverse is not None:
            fresh = Preconditioner(self.problem, new.part.to(old.x.dtype), self.generator, outputs=O).apply
            optimiser.set_inverse(lambda rows: there.put(inverse(there.take(rows))) + new.put(fresh(new.take(rows))))
        return optimiser, shapes

    def trim(
        self, optimiser: LBFGS, factors: Factors, gradient: Factors, bound: Certificate, fall: float
    ) -> tuple[LBFGS, Factors] | None:
        """An optimiser without the units that together carry next to nothing; None where there are few of them.

        Units are first turned into principal ones, by an orthogonal map that keeps curvature pairs valid, and the
        preconditioner. What is dropped costs no more than ten iterations gain: far from an optimum the gap is many
        times what is left to gain, and units that come back throw it back.
        """
        certain = max(SHRINKING * bound.relative_gap, LEAST_SHRINKING) if self.trusting else math.inf
        spare = min(TRIMMED * bound.gap, TRIMMED_FALL * fall)
        for _ in range(TRIMS):
            maps = principal_units(self.problem, factors, gradient, spare, certain)
            kept = sum(len(own) for own in maps if own is not None)
            total = sum(own.shape[1] for own in maps if own is not None)
            if not total or kept > WORTH_TRIMMING * total:
                return None
            left = turned(factors, maps)
            if self.costs_little(optimiser.value, factors, left, TRIMMED_FALL * fall):
                break
            # A gap that is large beside the objective says little about what units are for.
            spare, certain = 0.1 * spare, math.inf
        else:
            return None
        self.trimmed = True
        smaller, shapes = self.optimiser(left, optimiser.x.dtype)
        if len(optimiser.pairs):
            smaller.pairs = optimiser.pairs.mapped(lambda vectors: turned_rows(vectors, factors, maps))
        inverse = optimiser.inverse
        if inverse is not None:
            back = [None if own is None else own.mT for own in maps]
            smaller.set_inverse(lambda rows: turned_rows(inverse(turned_rows(rows, shapes, back)), factors, maps))
        return smaller, shapes

    def costs_little(self, best: float, before: Factors, after: Factors, most: float) -> bool:
        """Whether the objective ``after`` units change is at most ``most`` above ``best``, or above that ``before``."""
        value = self.problem.value(after)
        return value <= best + most or value <= self.problem.value(before) + most

    def finish(self, factors: Factors, bound: Certificate, message: str) -> Solution:
        """The solution, with its certificate, from what :meth:`slim` has returned."""
        self.n_proofs += 1
        certificate = bound
        self.free_low()
        if self.proves:
            # A fit under a limit is often at its peak here: in the outputs' and Gamma's float64.
            self.problem.budget.trim()
            factors, certificate = certify_refitted(self.problem, factors)
        return Solution(
            factors,
            certificate,
            self.history,
            self.n_iter,
            certificate.relative_gap <= self.tol,
            message,
            {"proofs": self.n_proofs},
        )

    def slim(self, factors: Factors, bound: Certificate, target: float, sure: bool) -> tuple[Factors, Certificate]:
        """Factors without as many of the smallest units as a gap of ``target`` allows, and a close estimate of theirs.

        The gap is of first order in what is left out, the objective of second: as much is left out as keeps the gap.
        ``bound`` is the estimate with all units. Unless it is ``sure``, the gap that comes back may be above the
        target. Factors come back in float64, and with the intercept solved for where that of ``factors`` is.
        """

        allowed = min(max(target / SLACK, SLACK * bound.relative_gap), self.slack * target)
        whole = factors.to(torch.float64)
        shares: tuple[float, ...] = (*SPARED, 0.05 * self.tol)
        if ROOM * target < bound.relative_gap < target:
            shares = shares[1:]
        for share in shares:
            slim, _ = canonical(self.problem, whole, share * self.tol * abs(bound.primal))
            if slim.n_units == factors.n_units:
                break
            close = self.close_look(slim, allowed)
            if close.bound.relative_gap <= allowed:
                return close.refitted, close.bound
            if not sure:
                close = self.close_look(factors)
                bound, sure = close.bound, True
                if bound.relative_gap > self.slack * target:
                    return close.refitted, bound
                allowed = max(allowed, self.slack * min(target, bound.relative_gap))
        # Only what carries nothing at all.
        none, _ = canonical(self.problem, whole, 0.0)
        if not sure:
            close = self.close_look(none)
            return close.refitted, close.bound
        return none, bound


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
    # Without the bookkeeping for derivatives that nothing takes here, a call takes an eighth less time. A fit of few
    # samples has no large temporaries, and takes less than giving pages back.
    with torch.inference_mode(), suited_heap(problem.n >= WARMUP_SAMPLES), fast_products(largest_product(problem)):
        state = Factored(problem, tol, max_iter, max_rank, random_state, progress, prove)
        solution = state.solve(init, resumed)
    # What was made in that mode can never be differentiated.
    return replace(solution, factors=solution.factors.clone())
