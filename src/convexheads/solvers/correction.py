"""A Newton step along the singular pairs that keep a dual point from being feasible, and in the sizes of large units.

The gap is of first order in the distance from an optimum, the objective of second: late in a solve a few singular
values of A_g^* L lie above beta w, for which the whole dual point is scaled down, while the objective has next to
nothing left to gain. With the singular vectors U and V of a block that lie above, Z + U^T S V brings these values back
to beta w, to first order, if

    <A(U^T D V), H A(U^T S V)> = <D, beta w I - diag(sigma)>   for every D,

with H the Hessian of the loss and the intercept eliminated. What is left of the gap then is beta w ||Z_g||_* + <Z_g,
A_g^* L>: units that are too large, or too small, for their singular value. With the left and right vectors A and B of
a block's large units, Z + A^T S B has the nuclear norm of Z plus the trace of S for every small symmetric S, and

    <A(A^T D B), H A(A^T S B)> = -<D, beta w I + A (A_g^* L) B^T>   for every symmetric D

is Newton's step of the objective itself. (An S that is not symmetric turns units, where the norm has curvature; small
units would change their sign.) Both together are a few hundred numbers. They are solved for by conjugate gradients at
the features of a few vectors, preconditioned by their Hessian as sampled gradients have it.

The equations know the nuclear norm where -S of pairs, and the sizes of units plus S, are positive semidefinite: there
it is the trace. Where many singular values lie next to beta w, S of pairs may be far from that, and the sizes that it
adds then exceed all that was to be gained. What the norm grows by beyond the trace is convex in S: with it the step is

    argmin over y of (1/2) <y, H y> - <right, y> + beta w sum_g (||S_g||_* + tr S_g),

for units of sizes D_g instead with ||D_g + S_g||_* - tr(D_g + S_g): a small convex program, solved by proximal Newton
steps (Lee, Sun and Saunders 2014) in the metric of the sampled Hessian, each of them by the alternating direction
method of multipliers (Boyd et al. 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convexheads.architectures import Stats
from convexheads.architectures.base import gate_groups
from convexheads.evaluation import Evaluation
from convexheads.operator import split_rows
from convexheads.problem import Problem
from convexheads.products import add_moment, from_lower
from convexheads.solvers.span import positive_factor
from convexheads.solvers.units import canonical, join_units, no_units, pair_units, pick
from convexheads.subspace import SingularPair
from convexheads.types import Factors, Units

MOST_PAIRS = 48
"""Pairs of all blocks at most: those furthest above beta w; ..."""
MOST_NUMBERS = 1024
"""... and of these, and then of the large units, no more than make so many numbers; fewer where memory is limited."""
NOTHING = 1e-6
"""Share of the largest unit below which one has no direction."""
STEPS, ACCURACY = 20, 0.1
"""Conjugate gradients at most, and the share of the right-hand side that they may leave."""
ROWS_EACH, ROWS_EXACT = 8, 2**14
"""Sampled gradients for each number, that the preconditioner is made of; where these, or so many in all, are one for
every output of every sample, it is the Hessian itself."""
PROXIMAL_STEPS, SPLITTING_STEPS, SPLITTING_ACCURACY = 8, 200, 1e-3
"""Proximal Newton steps at most, or until one lowers the objective by no more than ``ACCURACY`` of what the best one
has; each of so many steps of the alternating direction method at most, or until one changes the numbers by no more than
the last share."""
DAMPING = 1e-3
"""Share of its diagonal that is added to it: pairs and units may be nearly the same."""


@dataclass
class Block:
    """Rows of a component between which S may have entries: the pairs of one gate, or its large units.

    Attributes
    ----------
    rows : their place among those of the component, k of them.
    upper : for large units the places of the entries on and above the diagonal in a row-major (k, k); None for pairs,
        all of whose entries are numbers.
    scale : entry of S for a number of one, for large units: so that numbers have the norm of S.
    damping : beta w.
    held : D (k,), the sizes of large units; None for pairs.
    """

    rows: slice
    upper: Tensor | None
    scale: Tensor | None
    damping: float
    held: Tensor | None

    @classmethod
    def of(cls, rows: slice, damping: float, held: Tensor | None, like: Tensor) -> Block:
        """The block of these rows: of pairs, or of units of the sizes ``held``."""
        if held is None:
            return cls(rows, None, None, damping, None)
        k = rows.stop - rows.start
        i, j = torch.triu_indices(k, k, device=like.device)
        scale = torch.where(i == j, 1.0, math.sqrt(0.5)).to(like.dtype)
        return cls(rows, i * k + j, scale, damping, held.to(like.dtype))

    @property
    def target(self) -> float:
        """What the diagonal of U (A_g^* L) V^T ought to be."""
        return self.damping if self.held is None else -self.damping

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return (self.rows.stop - self.rows.start) ** 2 if self.upper is None else len(self.upper)

    def matrix(self, numbers: Tensor) -> Tensor:
        """S (k, k)."""
        k = self.rows.stop - self.rows.start
        if self.upper is None or self.scale is None:
            return numbers.view(k, k)
        S = numbers.new_zeros(k * k)
        S[self.upper] = numbers * self.scale
        S = S.view(k, k)
        return S + S.triu(1).mT

    def numbers(self, F: Tensor) -> Tensor:
        """The adjoint of :meth:`matrix`, of matrices (..., k, k): (..., numbers)."""
        if self.upper is None or self.scale is None:
            return F.flatten(-2)
        # On the diagonal this counts twice what the factor of a half takes back.
        return (F + F.mT).flatten(-2)[..., self.upper] * torch.where(self.scale == 1.0, 0.5, self.scale)

    def surplus(self, numbers: Tensor) -> float:
        """By how much the nuclear norm grows beyond the trace, times beta w: never negative."""
        S = self.matrix(numbers)
        if self.held is None:
            return self.damping * max(0.0, float(torch.linalg.svdvals(S).sum() + S.trace()))
        return -2.0 * self.damping * float(torch.linalg.eigvalsh(S + self.held.diag()).clamp_max(0.0).sum())

    def shrunk(self, numbers: Tensor, t: float) -> Tensor:
        """The proximal operator of ``t`` times the surplus."""
        S, t = self.matrix(numbers), t * self.damping
        if self.held is None:
            left, sigma, right = torch.linalg.svd(S - t * torch.eye(len(S), dtype=S.dtype, device=S.device))
            return ((left * (sigma - t).clamp_min(0.0)) @ right).flatten()
        D = self.held.diag()
        size, axes = torch.linalg.eigh(S + D)
        # What is negative counts twice.
        size = size.clamp_min(0.0) + (size + 2.0 * t).clamp_max(0.0)
        return self.numbers((axes * size) @ axes.mT - D)


class Correction:
    """The equations at outputs ``O`` of a head, for the singular ``pairs`` of A_g^* L there that lie above beta w.

    Parameters
    ----------
    factors : the head, where its large units are to move, too: ...
    large : ... those of at least this share of the largest one.
    """

    def __init__(
        self,
        problem: Problem,
        O: Tensor,
        pairs: list[SingularPair],
        factors: Factors | None = None,
        large: float = 0.0,
    ) -> None:
        self.problem, self.O = problem, O
        limit = problem.budget.limit
        most = MOST_NUMBERS if limit is None else min(MOST_NUMBERS, math.isqrt(limit // 128))
        # Of every component the vectors on the left and on the right, and the blocks of S between them.
        self.vectors, self.blocks = _chosen(problem, O, pairs, factors, large, most)
        self.every = [block for blocks in self.blocks for block in blocks]
        self.sizes = [block.size for block in self.every]
        self.free = problem.outputs if problem.fit_intercept else 0
        self.rows_each = problem.targets.shape[1:-1].numel()
        # Then features are of use for the sampled Hessian only.
        self.whole = Evaluation(problem, Factors(self.vectors)).whole
        width = sum(len(own.v) * c.form.value_width for own, c in zip(self.vectors, problem.components, strict=True))
        size = width * problem.targets[..., 0].numel() * O.dtype.itemsize
        self.kept: list[tuple[slice, list[Tensor]]] | None = None
        if not self.whole and problem.world.every(problem.budget.roomy and problem.has_room(size)):
            self.kept = list(self.features)
        self._prepare()

    def _features(self, stats: list[Stats]) -> list[Tensor]:
        """The features of all left vectors on a chunk of samples."""
        return [c.features(s, own) for c, s, own in zip(self.problem.components, stats, self.vectors, strict=True)]

    @property
    def _rows(self) -> int:
        """Samples a chunk of features."""
        return self.problem.pass_rows(self.O.dtype, max(1, sum(len(own.v) for own in self.vectors)))

    @property
    def features(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Chunk by chunk, kept or made anew."""
        if self.kept is not None:
            yield from self.kept
            return
        for index, stats in self.problem.chunks(self.O.dtype, rows=self._rows):
            yield index, self._features(stats)

    def step(self, y: Tensor) -> Factors:
        """Units whose outputs are those of the step, the left vectors with S V beside them, and its intercept."""
        *parts, b = y.split([*self.sizes, self.free])
        numbers = iter(parts)
        units = []
        for own, blocks in zip(self.vectors, self.blocks, strict=True):
            v = torch.zeros_like(own.v).flatten(1)
            for block in blocks:
                torch.mm(block.matrix(next(numbers)), own.v[block.rows].flatten(1), out=v[block.rows])
            units.append(Units(own.u, v.view_as(own.v), own.gate))
        return Factors(units, b if self.free else None)

    def _inner(self, features: list[Tensor], rows: Tensor) -> Tensor:
        """For rows R of outputs the numbers of U (A_g^* R) V^T of all blocks, and the intercept's sum: one vector."""
        left = [
            c.adjoint_v(T, rows[:, c.outputs]) if blocks else own.v
            for c, T, own, blocks in zip(self.problem.components, features, self.vectors, self.blocks, strict=True)
        ]
        return self._numbers(left, rows.sum(0))

    def _numbers(self, left: list[Tensor], sums: Tensor) -> Tensor:
        """The same from U (A_g^* R) of every component, (vectors, k, c), and the sums of the rows."""
        found = []
        for each, own, blocks in zip(left, self.vectors, self.blocks, strict=True):
            rows, right = each.flatten(1), own.v.flatten(1)
            found += [block.numbers(rows[block.rows] @ right[block.rows].mT) for block in blocks]
        return torch.cat([*found, sums[: self.free]])

    def _pass(self, rows_of: Callable[[slice, Tensor | None], Tensor], step: Factors | None = None) -> Tensor:
        """:meth:`_inner` of the rows that ``rows_of`` has for a chunk and the outputs of a ``step`` there, if any."""
        problem = self.problem
        factors = Factors(self.vectors) if step is None else step
        sums = self.O.new_zeros(problem.outputs)
        into = [Units(None, torch.zeros_like(own.v), own.gate) for own in self.vectors]
        evaluation = Evaluation(problem, factors, Factors(into, sums))
        for index, stats in problem.chunks(self.O.dtype, rows=evaluation.rows(self.O.dtype)):
            parts = evaluation.parts(stats)
            M = None if step is None else evaluation.outputs(parts, self.O[index].shape[:-1])
            evaluation.pull(parts, rows_of(index, M).reshape(-1, problem.outputs))
        evaluation.close()
        return self._numbers([units.v for units in into], sums)

    def _prepare(self) -> None:
        """The right-hand side, and the factor of the preconditioner, in one pass over the features or over blocks."""
        problem = self.problem
        count = sum(self.sizes) + self.free
        moment = self.O.new_zeros(count, count)
        total = self.O.new_zeros(count)
        draws = _Draws(problem, count, self.rows_each)
        if self.whole:
            total = self._pass(lambda index, M: self._residuals(index))
            for place, noise in draws.parts(problem.local, self._rows):
                features = self._features(problem.stats_of(place, self.O.dtype))
                self._add_sampled(moment, features, place, slice(None), noise, draws.share)
        else:
            for index, features in self.features:
                total += self._inner(features, self._residuals(index).reshape(-1, problem.outputs))
                within, noise = draws.of(index)
                self._add_sampled(moment, features, index, within, noise, draws.share)
        # The intercept is at its best already.
        self.right = self._targets() - problem.world.sum(total)
        self.right[count - self.free :] = 0.0
        moment = from_lower(problem.world.sum(moment))
        damping = DAMPING * moment.diagonal() + 1e-6 * moment.diagonal().max() + 1e-30
        moment.diagonal().add_(damping)
        self.factor = positive_factor(moment)

    def _residuals(self, index: slice) -> Tensor:
        """The gradient of the loss with respect to the outputs of some samples."""
        targets, weights = self.problem.targets_of(index, self.O.dtype)
        return self.problem.own_loss.value_and_gradient(self.O[index], targets, weights)[1]

    def _add_sampled(
        self,
        moment: Tensor,
        features: list[Tensor],
        index: slice | Tensor,
        place: Tensor | slice,
        noise: Tensor,
        share: float,
    ) -> None:
        """Add the sampled gradients of a chunk ``index`` of samples, at their ``place`` in it, to the moment."""
        targets, weights = self.problem.targets_of(index, self.O.dtype)
        O, targets, weights = self.O[index][place], targets[place], weights[place]
        # One sample after the other, each with all of its draws.
        E = self.problem.own_loss.hessian_root_product(O.unsqueeze(1), targets.unsqueeze(1), noise.to(O))
        E = E * (weights * share).sqrt().view(-1, *[1] * (E.ndim - 1))
        add_moment(moment, self._gradients(features, place, E))

    def _gradients(self, features: list[Tensor], place: Tensor | slice, E: Tensor) -> Tensor:
        """Gradients of <E, outputs> of some samples with respect to every number: (rows, numbers).

        E (samples, draws, c), or (samples, draws, s, c) for an output of every token.
        """
        found = []
        rows = E.reshape(-1, E.shape[-1])
        for component, T, vectors, blocks in zip(
            self.problem.components, features, self.vectors, self.blocks, strict=True
        ):
            if not blocks:
                continue
            own = T.reshape(-1, 1, self.rows_each, *T.shape[1:])[place]
            right = vectors.v.transpose(0, 1).flatten(0, 1)
            values = (rows[:, component.outputs] @ right.mT).view(
                *E.shape[:2], self.rows_each, component.form.value_width, len(vectors.v)
            )
            found += [
                block.numbers(own[..., block.rows, :] @ values[..., block.rows]).flatten(0, 2) for block in blocks
            ]
        return torch.cat([*found, rows[:, : self.free]], 1)

    def _targets(self) -> Tensor:
        """The numbers of what U (A_g^* L) V^T ought to be, and zeros for the intercept."""
        found = [
            block.numbers(self.O.new_full((block.rows.stop - block.rows.start,), block.target).diag())
            for block in self.every
        ]
        return torch.cat([*found, self.O.new_zeros(self.free)])

    def apply(self, y: Tensor) -> Tensor:
        """The left-hand side of the equations, for the intercept, too; in one pass over the features or over blocks."""
        problem = self.problem
        step = self.step(y)
        if self.kept is None:
            return problem.world.sum(self._pass(self._curved, step))
        total = torch.zeros_like(y)
        for index, features in self.kept:
            M = problem.combine(step, features, self.O[index].shape[:-1])
            total += self._inner(features, self._curved(index, M).reshape(-1, problem.outputs))
        return problem.world.sum(total)

    def _curved(self, index: slice, M: Tensor | None) -> Tensor:
        """The Hessian of the loss times moves M of the outputs of some samples."""
        assert M is not None
        targets, weights = self.problem.targets_of(index, self.O.dtype)
        return self.problem.own_loss.hessian_product(self.O[index], targets, weights, M)

    def solve(self) -> Tensor:
        """The numbers of the step and its intercept, by preconditioned conjugate gradients."""
        residual, y = self.right, torch.zeros_like(self.right)
        direction = turned = self._turned(residual)
        size = float(residual @ turned)
        enough = ACCURACY**2 * size
        for _ in range(STEPS):
            if not size > enough:
                break
            image = self.apply(direction)
            curvature = float(direction @ image)
            if not curvature > 0.0:
                break
            t = size / curvature
            y, residual = y + t * direction, residual - t * image
            turned = self._turned(residual)
            before, size = size, float(residual @ turned)
            direction = turned + (size / before) * direction
        return y

    def _parts(self, y: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Every block with its numbers."""
        return zip(self.every, y[: sum(self.sizes)].split(self.sizes), strict=True)

    def surplus(self, y: Tensor) -> float:
        """By how much more than the equations know the penalty grows."""
        return sum(block.surplus(numbers) for block, numbers in self._parts(y))

    def likely_surplus(self) -> float:
        """That of the step which the sampled Hessian alone leads to."""
        return self.surplus(self._turned(self.right))

    def minimise(self) -> Tensor:
        """The numbers of the step with the surplus counted, and its intercept."""
        y, gradient = torch.zeros_like(self.right), -self.right
        M = self.factor @ self.factor.mT
        surplus = first = 0.0
        for _ in range(PROXIMAL_STEPS):
            there = self._proximal(y, M @ y - gradient, M)
            direction = there - y
            fall = surplus - self.surplus(there) - float(gradient @ direction)
            first = max(first, fall)
            if not fall > ACCURACY * first:
                break
            image = self.apply(direction)
            curvature = float(direction @ image)
            # The surplus, which is convex, is at most what lies between both ends.
            t = fall / curvature if fall < curvature else 1.0
            y, gradient = y + t * direction, gradient + t * image
            surplus = self.surplus(y)
        return y

    def _proximal(self, start: Tensor, linear: Tensor, M: Tensor) -> Tensor:
        """argmin over y of (1/2) <y, M y> - <linear, y> + surplus(y)."""
        count = sum(self.sizes)
        # One weight a block: what is shrunk are singular values of all of it. The intercept has no part in that.
        weights = [float(own.mean()) for own in M.diagonal()[:count].split(self.sizes)]
        rho = torch.cat([M.new_full((size,), weight) for size, weight in zip(self.sizes, weights, strict=True)])
        K, right = M.clone(), linear.clone()
        K.diagonal()[:count].add_(rho)
        factor = positive_factor(K)
        y, z, dual = start, start[:count], torch.zeros_like(rho)
        for _ in range(SPLITTING_STEPS):
            right[:count] = linear[:count] + rho * (z - dual)
            y = self._turned(right, factor)
            before, shifted = z, y[:count] + dual
            parts = zip(self._parts(shifted), weights, strict=True)
            z = torch.cat([block.shrunk(numbers, 1.0 / weight) for (block, numbers), weight in parts])
            dual = shifted - z
            if float((y[:count] - z).norm() + (z - before).norm()) <= SPLITTING_ACCURACY * float(z.norm()):
                break
        return torch.cat([z, y[count:]])

    def _turned(self, residual: Tensor, factor: Tensor | None = None) -> Tensor:
        found = torch.cholesky_solve(residual[:, None], self.factor if factor is None else factor)[:, 0]
        if self.free and self.problem.loss.shift_free:
            # What the loss does not see is rounding, of which next to no curvature makes any number.
            b = found[len(found) - self.free :]
            b -= b.mean()
        return found


class _Draws:
    """Which samples gradients are taken of, and with which noise: some, all once, or all with every output by itself.

    ``share`` is what each counts.
    """

    def __init__(self, problem: Problem, count: int, rows_each: int) -> None:
        rows, wanted = problem.n * rows_each, ROWS_EACH * count
        self.exact = rows * problem.outputs <= max(wanted, ROWS_EXACT)
        draws = problem.outputs if self.exact else min(problem.outputs, -(-wanted // rows))
        self.stride = 1 if self.exact else max(1, rows // wanted)
        self.share = 1.0 if self.exact else self.stride / draws
        shape = problem.targets.shape[1:]
        if self.exact:
            # Every output by itself, for all tokens: another token's is orthogonal in any case.
            unit = torch.eye(shape[-1], dtype=problem.dtype)
            self.each = unit.view(len(unit), *[1] * (len(shape) - 1), len(unit)).expand(len(unit), *shape)
        else:
            sample = torch.arange(0, problem.n, self.stride)
            self.own, place = problem.own_samples(sample)
            # Not of the solver's own: its iterations are the same whether corrections were tried or not.
            generator = torch.Generator().manual_seed(0)
            self.noise = torch.randn((len(sample), draws, *shape), generator=generator, dtype=problem.dtype)[place]

    def of(self, index: slice) -> tuple[Tensor | slice, Tensor]:
        """Samples of a chunk, numbered within it, and their noise (samples, draws, ...)."""
        if self.exact:
            return slice(None), self._noise(index)
        first, last = torch.searchsorted(self.own, torch.tensor([index.start, index.stop])).tolist()
        within = self.own[first:last] - index.start if self.stride > 1 else slice(None)
        return within, self._noise(slice(first, last))

    def parts(self, local: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of these samples, ``step`` at a time, and their noise."""
        own = torch.arange(local) if self.exact else self.own
        for part in split_rows(len(own), step):
            yield own[part], self._noise(part)

    def _noise(self, part: slice) -> Tensor:
        """That of a part of these samples."""
        if self.exact:
            return self.each.expand(part.stop - part.start, *self.each.shape)
        return self.noise[part]


def _chosen(
    problem: Problem, O: Tensor, pairs: list[SingularPair], factors: Factors | None, share: float, most: int
) -> tuple[list[Units], list[list[Block]]]:
    """The pairs furthest above beta w, and the largest units, as many as make no more than ``most`` numbers.

    Vectors of every component, in order of their gates, and their blocks.
    """
    weights = [problem.penalty_weight(component) for component in problem.components]
    pairs = sorted(pairs, key=lambda pair: -pair.sigma / weights[pair.component])[:MOST_PAIRS]
    count = 0
    taken: dict[tuple[int, int | None], int] = {}
    for i, pair in enumerate(pairs):
        there = taken.get((pair.component, pair.gate), 0)
        # A matrix of one more row has so many more entries.
        count += 2 * there + 1
        if i and count > most:
            pairs = pairs[:i]
            count -= 2 * there + 1
            break
        taken[pair.component, pair.gate] = there + 1
    large, held = _large_units(problem, factors, weights, share, most - count)
    vectors, blocks = [], []
    for k, (component, weight) in enumerate(zip(problem.components, weights, strict=True)):
        units = pair_units(component, [pair for pair in pairs if pair.component == k], O)
        symmetric = torch.arange(len(units.v) + len(held[k]), device=O.device) >= len(units.v)
        sizes = torch.cat([held[k].new_zeros(len(units.v)), held[k]])
        units = _appended(units, large[k].to(O.dtype))
        if units.gate is None:
            groups = [(own, bool(symmetric[own.start])) for _, own in gate_groups(symmetric.long())]
        else:
            order = (2 * units.gate + symmetric).argsort(stable=True)
            units, sizes = pick(units, order), sizes[order]
            assert units.gate is not None
            key = 2 * units.gate + symmetric[order]
            groups = [(own, bool(which % 2)) for which, own in gate_groups(key)]
        vectors.append(units)
        blocks.append([Block.of(own, weight, sizes[own] if of_units else None, O) for own, of_units in groups])
    return vectors, blocks


def _appended(first: Units, second: Units) -> Units:
    """Units one after the other, whatever their gates."""
    if first.u is None or second.u is None:
        return first
    gate = None if first.gate is None or second.gate is None else torch.cat([first.gate, second.gate])
    return Units(torch.cat([first.u, second.u]), torch.cat([first.v, second.v]), gate)


def _large_units(
    problem: Problem, factors: Factors | None, weights: list[float], share: float, room: int
) -> tuple[list[Units], list[Tensor]]:
    """Vectors of length one of the largest principal units of every component, and their sizes; none of no factors."""
    if factors is None:
        none = [pair_units(component, [], problem.weights) for component in problem.components]
        return none, [units.v.new_zeros(0) for units in none]
    whole = canonical(problem, factors.to(torch.float64), 0.0)[0]
    # Balanced: both sides have the root of the singular value for their length.
    sizes = [
        units.v.flatten(1).square().sum(1) if units.u is not None else units.v.new_zeros(0) for units in whole.units
    ]
    every = torch.cat([size * weight for size, weight in zip(sizes, weights, strict=True)])
    owner = [(k, i) for k, own in enumerate(sizes) for i in range(len(own))]
    chosen: list[list[int]] = [[] for _ in sizes]
    taken: dict[tuple[int, int], int] = {}
    for place in every.argsort(descending=True).tolist():
        k, i = owner[place]
        gate = whole.units[k].gate
        key = k, -1 if gate is None else int(gate[i])
        room -= taken.get(key, 0) + 1
        if room < 0 or not float(every[place]) >= max(share, NOTHING) * float(every.max()):
            break
        taken[key] = taken.get(key, 0) + 1
        chosen[k].append(i)
    found, held = [], []
    for own, units, size in zip(chosen, whole.units, sizes, strict=True):
        held.append(size[sorted(own)])
        if units.u is None:
            found.append(no_units(units))
            continue
        picked = pick(units, torch.tensor(sorted(own), dtype=torch.long, device=units.v.device))
        assert picked.u is not None
        root = held[-1].sqrt()
        u, v = (t / root.view(-1, *[1] * (t.ndim - 1)) for t in (picked.u, picked.v))
        found.append(Units(u, v, picked.gate))
    return found, held


def corrected(
    problem: Problem,
    factors: Factors,
    O: Tensor,
    pairs: list[SingularPair],
    drop: float = 0.0,
    large: float = 0.0,
    moving: bool = False,
    most: float = math.inf,
) -> Factors:
    """``factors`` after the step: balanced units, a few more of them, in float64.

    ``pairs`` are those of A_g^* L above beta w at the outputs ``O`` of the factors. Units of at least ``large`` of the
    largest one move, too, if they are ``moving``. Where the penalty would grow by more than ``most`` beyond what the
    equations know, the step is one that counts it, and such units move in any case.
    The smallest units are left out where that costs the objective no more than ``drop``.
    """
    O = O.to(problem.dtype)
    equations = Correction(problem, O, pairs, factors if moving else None, large)
    y = None if equations.likely_surplus() > most else equations.solve()
    if y is None or equations.surplus(y) > most:
        if not moving:
            equations = Correction(problem, O, pairs, factors, large)
        y = equations.minimise()
    step, whole = equations.step(y).to(torch.float64), factors.to(torch.float64)
    units = [
        old if old.u is None or not len(new.v) else join_units(old, new)
        for old, new in zip(whole.units, step.units, strict=True)
    ]
    b = None if whole.intercept is None or step.intercept is None else whole.intercept + step.intercept
    return canonical(problem, Factors(units, b), drop)[0]
