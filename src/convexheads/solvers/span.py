"""The program restricted to what units span: a polish near the optimum.

With orthonormal rows P_g (k, p) that span the left factors u of a block's units and some singular vectors of
Gamma_g = A_g^* L outside of them, and Q_g (k, q) for the right ones, the restricted program is

    min  f( sum_g A_g(P_g^T S_g Q_g) + 1 b^T ) + beta sum_g w_g ||S_g||_*,    S_g = A_g^T B_g in R^{k x k}.

Near an optimum nearly all of what keeps the duality gap open lies in there, and here it costs little:

* The features T(P) of the basis are computed once. An evaluation is one product with them for the outputs, and one for
  the gradient with respect to S Q, however much the features of units cost.
* There are few enough variables for a Hessian with all their couplings, blocks included. In the basis in which S is
  diagonal at the start, of singular values sigma, directions (r, s) move S_rs (see :mod:`convexheads.solvers.cores`);
  their Hessian is that of the loss, estimated from sampled gradients, plus decay and coupling.

A dozen iterations of L-BFGS with it as the initial Hessian do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexheads.evaluation import Sums
from convexheads.operator import split_rows
from convexheads.problem import Problem, take_rows
from convexheads.products import column_squares, rough_products
from convexheads.solvers.cores import (
    DAMPING,
    moment_of,
    orthonormal,
    pair_weights,
    with_a_unit,
    with_decay,
    without_intercept,
)
from convexheads.solvers.differences import Kept, features_size, kept_folder, kept_parts, room_for
from convexheads.solvers.lbfgs import LBFGS
from convexheads.subspace import OutsidePairs
from convexheads.types import Factors, Units

MOST_DIRECTIONS = 2000
"""Directions whose Hessian has all couplings: those of least curvature of the loss; others have its diagonal. Fewer
where memory is limited."""
SAMPLED = 5000
"""Sampled gradients that the Hessian is estimated from ..."""
SAMPLED_NUMBERS = 2**26
"""... and the most numbers in all of them, fewer where memory is limited."""
STEPS = 12
"""Iterations at most ..."""
ENOUGH = 0.3
"""... or until what is left in the span keeps the gap open by this share of the tolerance."""


class Block:
    """Basis and directions of one block.

    Parameters
    ----------
    units : of its component; ``own`` are the numbers of the block's.
    outside : singular pairs of its Gamma outside the span of its units.
    damping : beta w.
    """

    def __init__(self, component: int, units: Units, own: Tensor, outside: OutsidePairs, damping: float) -> None:
        assert units.u is not None
        self.component, self.own, self.damping = component, own, damping
        u, v = units.u[own].flatten(1).double(), units.v[own].flatten(1).double()
        size, axes = torch.linalg.eigh(0.5 * (u @ u.mT + v @ v.mT))
        size, axes = size.flip(0).clamp_min(0.0), axes.flip(1)
        # A direction of descent is minus a singular pair.
        left, onto_left = orthonormal(torch.cat([axes.mT @ u, -outside.left.double()]))
        right, onto_right = orthonormal(torch.cat([axes.mT @ v, outside.right.double()]))
        dtype, m, k = units.v.dtype, len(own), len(left)
        self.m, self.k = m, k
        self.axes, self.left, self.right = axes.to(dtype), left.to(dtype), right.to(dtype)
        self.A, self.B = onto_left[:m].to(dtype), onto_right[:m].to(dtype)
        weights = [each.to(dtype) for each in pair_weights(size, outside.sigma, damping)]
        self.on_left, self.on_right, scale, coupling = weights
        # Numbers r * k + s of the directions: none where neither has a unit.
        numbers = torch.arange(k * k, device=own.device).view(k, k)
        self.numbers = with_a_unit(numbers, m)
        self.scale = scale.flatten()[self.numbers]
        self.coupling = coupling.flatten()[self.numbers]
        place = torch.empty(k * k, dtype=torch.long, device=own.device)
        place[self.numbers] = torch.arange(len(self.numbers), device=own.device)
        self.mirrored = place[numbers.mT.flatten()[self.numbers]]

    def gradients(self, T: Tensor, values: Tensor) -> Tensor:
        """Gradients of <E, outputs> along the directions, but for their scale: (rows, directions).

        T (rows, k, width) features of the basis, ``values`` (rows, width, k) the residuals E times the right vectors.
        """
        return with_a_unit(T @ values, self.m)


class Span:
    """The restricted program, and its Hessian at the start.

    Parameters
    ----------
    problem : of nuclear branches only.
    factors : the start; no block has more units than its smaller side.
    O : outputs there, of the shape of the targets.
    outside : pairs outside the units of every block that has any.
    low : precision of products of which one factor is a difference from the start, or None.
    generator : of the samples for the Hessian, and their noise.
    """

    def __init__(
        self,
        problem: Problem,
        factors: Factors,
        O: Tensor,
        outside: dict[tuple[int, int | None], OutsidePairs],
        low: torch.dtype | None,
        generator: torch.Generator,
    ) -> None:
        self.problem, self.start, self.low = problem, factors, low
        dtype = factors.tensors()[0].dtype
        self.blocks = [
            Block(k, factors.units[k], own, pairs, problem.penalty_weight(problem.components[k]))
            for (k, gate), pairs in outside.items()
            if len(own := factors.units[k].of_block(gate))
        ]
        self.rows_each = problem.targets.shape[1:-1].numel()
        self.O = O.to(dtype)
        targets, weights = problem.targets_of(slice(0, problem.n), dtype)
        self.L = problem.loss.gradient(self.O, targets, weights)
        self.basis = [self._basis(k) for k in range(len(problem.components))]
        self.kept: list[Kept] = []
        self.S = [block.A.mT @ block.B for block in self.blocks]
        self.slope = self._features()
        self.slope_b = problem.world.sum(self.L.reshape(-1, problem.outputs).sum(0))
        self.gradients_S: list[Tensor] = []
        self._hessian(generator)

    def _of(self, k: int) -> list[Block]:
        """The blocks of a component, in order of their gates."""
        return [block for block in self.blocks if block.component == k]

    def _basis(self, k: int) -> Units:
        """The left vectors of a component's blocks as units, in order of their gates; of no value."""
        component, units = self.problem.components[k], self.start.units[k]
        own = self._of(k)
        left = torch.cat([units.v.new_zeros(0, component.p), *(block.left for block in own)])
        values = left.new_zeros(len(left), component.form.value_width, component.width)
        gate = None
        if units.gate is not None:
            gates = [units.gate.new_full((block.k,), int(units.gate[block.own[0]])) for block in own]
            gate = torch.cat([units.gate[:0], *gates])
        return Units(left.view(-1, *component.form.u_shape), values, gate)

    def _rows(self, index: slice) -> slice:
        """Rows of outputs of some samples."""
        return slice(index.start * self.rows_each, index.stop * self.rows_each)

    def _features(self) -> list[Tensor]:
        """Keep the features of the basis; the gradient of the loss with respect to every S at the start."""
        problem, dtype = self.problem, self.O.dtype
        totals = [torch.zeros_like(units.v) for units in self.basis]
        sums = Sums()
        folder = kept_folder(problem, features_size(problem, self.basis, self.low or dtype))
        for index, stats in problem.chunks(dtype, sum(len(units.v) for units in self.basis)):
            rows, L = self._rows(index), self.L[index].reshape(-1, problem.outputs)
            for k, (component, units, stat) in enumerate(zip(problem.components, self.basis, stats, strict=True)):
                T = component.features(stat, units)
                if len(self.kept) == k:
                    self.kept.append(Kept(problem.local * self.rows_each, T, self.low or dtype, folder))
                self.kept[k].write(rows, T)
                sums.add(totals[k], component.adjoint_v(T, L[:, component.outputs]))
        sums.close()
        return problem.world.sum_all(self._onto_right(totals))

    def _onto_right(self, moments: list[Tensor]) -> list[Tensor]:
        """For every block the gradient with respect to S from that with respect to S Q of its component."""
        parts: list[Tensor] = []
        for k, moment in enumerate(moments):
            own = self._of(k)
            pieces = moment.flatten(1).split([block.k for block in own]) if own else ()
            parts += [piece @ block.right.mT for piece, block in zip(pieces, own, strict=True)]
        return parts

    # Variables --------------------------------------------------------------------------------------------

    def first(self) -> Tensor:
        """The start as one vector: A and B of every block, and the intercept."""
        parts = [t.flatten() for block in self.blocks for t in (block.A, block.B)]
        return torch.cat(parts if self.start.intercept is None else [*parts, self.start.intercept.to(parts[0].dtype)])

    def split(self, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Views of the variables: A and B (m, k) of every block, and the intercept (c,), empty where there is none."""
        found, start = [], 0
        for block in self.blocks:
            size = block.m * block.k
            A, B = x[start : start + 2 * size].view(2, block.m, block.k)
            found.append((A, B))
            start += 2 * size
        return found, x[start:]

    def factors(self, x: Tensor) -> Factors:
        """The units that the variables stand for: as many as at the start, in the same order."""
        pairs, intercept = self.split(x)
        start = self.start.flat()
        units = self.start.like(start).units
        for block, (A, B) in zip(self.blocks, pairs, strict=True):
            into = units[block.component]
            assert into.u is not None
            into.u[block.own] = (block.axes @ (A @ block.left)).view(-1, *into.u.shape[1:])
            into.v[block.own] = (block.axes @ (B @ block.right)).view(-1, *into.v.shape[1:])
        return Factors(units, None if self.start.intercept is None else intercept.clone())

    # Evaluation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[float, Tensor]:
        """The objective at ``x``, and its gradient."""
        problem, dtype = self.problem, x.dtype
        low = self.low or dtype
        pairs, intercept = self.split(x)
        moves = [(A.mT @ B - S) @ b.right for (A, B), S, b in zip(pairs, self.S, self.blocks, strict=True)]
        values = []
        for k, units in enumerate(self.basis):
            own = [move for move, block in zip(moves, self.blocks, strict=True) if block.component == k]
            values.append(torch.cat([units.v.flatten(1)[:0], *own]).view(units.v.shape).to(low))
        drift = None if self.start.intercept is None else intercept - self.start.intercept.to(dtype)
        total, slope_b = 0.0, x.new_zeros(problem.outputs)
        found = [torch.zeros_like(value, dtype=dtype) for value in values]
        for part in problem.budget.passing(kept_parts(problem, self.kept, self.rows_each)):
            T = [kept.read(self._rows(part)) for kept in self.kept]
            there = self.O[part]
            O = there.reshape(-1, problem.outputs)
            O = O.clone() if drift is None else O + drift
            for component, each, value in zip(problem.components, T, values, strict=True):
                O[:, component.outputs] += component.forward(each, value)
            loss, L = problem.own_loss.value_and_gradient(O.view(there.shape), *problem.targets_of(part, dtype))
            total += loss
            change = (L - self.L[part]).reshape(-1, problem.outputs)
            slope_b += change.sum(0)
            change = change.to(low)
            for component, each, into in zip(problem.components, T, found, strict=True):
                into += component.adjoint_v(each, change[:, component.outputs])
        value = torch.tensor(total, dtype=torch.float64, device=x.device)
        *moved, slope_b, value = problem.world.sum_all([*self._onto_right(found), slope_b, value])
        self.gradients_S = [old + new for old, new in zip(self.slope, moved, strict=True)]
        gradient = torch.empty_like(x)
        into_pairs, into_b = self.split(gradient)
        for block, (A, B), (dA, dB), G in zip(self.blocks, pairs, into_pairs, self.gradients_S, strict=True):
            dA.copy_(B @ G.mT + block.damping * A)
            dB.copy_(A @ G + block.damping * B)
        if drift is not None:
            into_b.copy_(self.slope_b + slope_b)
        return float(value) + self.decay(x), gradient

    def decay(self, x: Tensor) -> float:
        """(beta/2) sum_g w_g (||A_g||^2 + ||B_g||^2), which is that of the units."""
        pairs, _ = self.split(x)
        squares = (float(A.double().square().sum() + B.double().square().sum()) for A, B in pairs)
        return sum(0.5 * block.damping * each for block, each in zip(self.blocks, squares, strict=True))

    def excess(self) -> float:
        """By what share the largest singular value of the last gradients in S is above beta w."""
        return max(
            float(torch.linalg.matrix_norm(G, 2)) / block.damping - 1.0
            for G, block in zip(self.gradients_S, self.blocks, strict=True)
        )

    # Hessian ----------------------------------------------------------------------------------------------

    def _hessian(self, generator: torch.Generator) -> None:
        problem, dtype = self.problem, self.O.dtype
        centred = self.start.intercept is not None
        scale = torch.cat([block.scale for block in self.blocks])
        sizes = [len(block.numbers) for block in self.blocks]
        total = len(scale)
        limit = problem.budget.limit
        numbers = SAMPLED_NUMBERS if limit is None else min(SAMPLED_NUMBERS, limit // 64)
        most = MOST_DIRECTIONS if limit is None else min(MOST_DIRECTIONS, math.isqrt(limit // 128))
        count = min(problem.n, -(-min(SAMPLED, numbers // total) // self.rows_each))
        sample = torch.randperm(problem.n, generator=generator)[:count].sort().values
        index, place = problem.own_samples(sample)
        noise = torch.randn(count, *problem.targets.shape[1:], generator=generator, dtype=dtype)[place]
        parts = []
        squares = torch.zeros(total + problem.outputs, dtype=dtype, device=problem.device)
        for part in split_rows(len(index), problem.pass_rows(dtype, max(block.k for block in self.blocks))):
            parts.append(self._sampled(index[part], noise[part].to(problem.device), problem.n / count))
            squares += column_squares(parts[-1])
        damping = torch.cat([scale.new_full((n,), b.damping) for n, b in zip(sizes, self.blocks, strict=True)])
        curvature = problem.world.sum(squares)[:total] * scale.square()
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        mirrored = torch.cat([block.mirrored + start for block, start in zip(self.blocks, starts, strict=True)])
        chosen = torch.arange(total, device=problem.device)
        if total > most:
            # Both of (r, s) and (s, r), or neither.
            softest = torch.minimum(curvature / damping, (curvature / damping)[mirrored])
            chosen = (softest < softest.sort().values[most]).nonzero()[:, 0]
        every = torch.cat([chosen, torch.arange(total, total + problem.outputs, device=problem.device)])
        n = len(chosen)
        moment = moment_of(parts, every, scale, problem.world)
        moment[:n] *= scale[chosen, None]
        moment[:, :n] *= scale[chosen]
        hessian = moment[:n, :n]
        self.drift: Tensor | None = None
        self.intercept_inverse: Tensor | None = None
        if centred:
            hessian, self.drift, self.intercept_inverse = without_intercept(moment, n)
        place_of = torch.full((total,), -1, device=problem.device)
        place_of[chosen] = torch.arange(n, device=problem.device)
        coupling = torch.cat([block.coupling for block in self.blocks])
        hessian = with_decay(hessian, damping[chosen], coupling[chosen], place_of[mirrored[chosen]], DAMPING)
        self.factor, self.chosen = positive_factor(hessian), chosen
        self.diagonal = 1.0 / (curvature + damping)

    def _sampled(self, index: Tensor, noise: Tensor, share: float) -> Tensor:
        """Gradients of some samples along all directions, but for their scale, and along the intercept."""
        problem, dtype = self.problem, self.O.dtype
        targets, weights = problem.targets_of(index, dtype)
        E = problem.loss.hessian_root_product(take_rows(self.O, index), targets, noise)
        E = E.reshape(-1, problem.outputs) * (weights * share).sqrt().repeat_interleave(self.rows_each)[:, None]
        rows = (index[:, None] * self.rows_each + torch.arange(self.rows_each, device=index.device)).flatten()
        found = []
        with rough_products(problem.device):
            for k, component in enumerate(problem.components):
                T, own, start = self.kept[k].take(rows).to(dtype), E[:, component.outputs], 0
                for block in self._of(k):
                    width = component.form.value_width
                    right = block.right.view(block.k, width, component.width).transpose(0, 1).flatten(0, 1)
                    values = (own @ right.mT).view(-1, width, block.k)
                    found.append(block.gradients(T[:, start : start + block.k], values))
                    start += block.k
        return torch.cat([*found, E], 1)

    def apply(self, vectors: Tensor) -> Tensor:
        """Approximate inverse Hessian times each row of ``vectors`` (r, number of variables)."""
        return torch.stack([self._apply(vector) for vector in vectors])

    def _apply(self, vector: Tensor) -> Tensor:
        pairs, intercept = self.split(vector)
        along, across = [], []
        for block, (dA, dB) in zip(self.blocks, pairs, strict=True):
            # Along a direction (r, s), and along what is orthogonal to it and changes S by nothing.
            on_left, on_right = dA.new_zeros(block.k, block.k), dA.new_zeros(block.k, block.k)
            on_left[:, : block.m], on_right[: block.m] = dA.mT, dB
            along.append((block.on_left * on_left + block.on_right * on_right).flatten()[block.numbers])
            across.append((block.on_right * on_left - block.on_left * on_right) / block.damping)
        numbers = torch.cat(along)
        right = numbers[self.chosen]
        shift_free = self.problem.loss.shift_free
        if self.drift is not None:
            intercept = intercept - intercept.mean() if shift_free else intercept
            right = right - self.drift @ intercept
        solved = torch.cholesky_solve(right[:, None], self.factor)[:, 0]
        numbers = numbers * self.diagonal
        numbers[self.chosen] = solved
        found = torch.empty_like(vector)
        into, into_b = self.split(found)
        pieces = numbers.split([len(block.numbers) for block in self.blocks])
        for block, (dA, dB), piece, rest in zip(self.blocks, into, pieces, across, strict=True):
            z = piece.new_zeros(block.k**2)
            z[block.numbers] = piece
            z = z.view(block.k, block.k)
            dA.copy_((block.on_left * z + block.on_right * rest)[:, : block.m].mT)
            dB.copy_((block.on_right * z - block.on_left * rest)[: block.m])
        if self.drift is not None and self.intercept_inverse is not None:
            moved = self.intercept_inverse @ intercept - self.drift.mT @ solved
            into_b.copy_(moved - moved.mean() if shift_free else moved)
        return found

    def solve(self, tol: float, noise: float) -> Factors:
        """Units that all but solve the restricted program; ``noise`` is the relative error of an objective."""
        optimiser = LBFGS(self.evaluate, self.first(), noise)
        optimiser.set_inverse(self.apply)
        for _ in range(STEPS):
            if not optimiser.step():
                break
            # The dual point is scaled by so much; its value changes by -<L, O> times that, which is the penalty.
            if self.excess() * 2.0 * self.decay(optimiser.x) <= ENOUGH * tol * optimiser.value:
                break
        return self.factors(optimiser.steadied()[0])


def with_coupled(
    problem: Problem,
    L: Tensor,
    factors: Factors,
    outside: dict[tuple[int, int | None], OutsidePairs],
    most: int,
    low: torch.dtype | None,
) -> dict[tuple[int, int | None], OutsidePairs]:
    """The pairs, and at most ``most`` directions of every block that Gamma couples with those of its units.

    Of (I - P) Gamma Q^T and P Gamma (I - Q), with P and Q the projections on the units and the pairs, these are the
    leading singular vectors outside. At an optimum both are zero. A coupling epsilon takes a singular value beta to
    sqrt(beta^2 + epsilon^2), and is largest for the smallest units, which gradients hardly show.
    """
    units, places = [], {}
    for k, each in enumerate(factors.units):
        assert each.u is not None
        u, v = torch.zeros_like(each.u), torch.zeros_like(each.v)
        for gate in problem.gates_of(k):
            own = each.of_block(gate)
            if len(own):
                left, right = (orthonormal(t[own].flatten(1).double())[0].to(L.dtype) for t in (each.u, each.v))
                u[own], v[own] = left.view(u[own].shape), right.view(v[own].shape)
                places[k, gate] = own
        units.append(Units(u, v, each.gate))
    images = problem.adjoint(L, units, low=low)
    found = {}
    for (k, gate), own in places.items():
        pairs, each, image = outside[k, gate], units[k], images[k]
        assert each.u is not None
        assert image.u is not None
        # Of the pairs some may be units that are next to nothing.
        room = min(problem.components[k].p, problem.components[k].q) - len(own)
        kept = min(len(pairs.sigma), room)
        count = min(most, len(own), room - kept)
        lefts, rights, sigma = pairs.left[:kept], pairs.right[:kept], pairs.sigma[:kept]
        left = _leading(image.u[own].flatten(1), [each.u[own].flatten(1), lefts], count)
        right = _leading(image.v[own].flatten(1), [each.v[own].flatten(1), rights], count)
        # They are no pairs: nothing is known of what Gamma couples them with.
        found[k, gate] = OutsidePairs(
            torch.cat([lefts, left]), torch.cat([rights, right]), torch.cat([sigma, sigma.new_zeros(count)])
        )
    return found


def _leading(images: Tensor, bases: list[Tensor], count: int) -> Tensor:
    """The leading right singular vectors (count, q) of images (m, q) without what is in the span of the bases."""
    basis = orthonormal(torch.cat(bases).double())[0]
    rest = images.double()
    rest = rest - (rest @ basis.mT) @ basis
    return torch.linalg.svd(rest, full_matrices=False).Vh[:count].to(images.dtype)


def positive_factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that is positive definite but for rounding: its diagonal grows until it is."""
    largest = float(matrix.diagonal().max())
    for power in range(-6, 1):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        matrix = matrix + 10.0**power * largest * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.cholesky(matrix)


def span_work(problem: Problem, factors: Factors, more: int, low: torch.dtype | None) -> float:
    """Multiplications a sample of an evaluation, with at most ``more`` directions a block beside its units, about.

    Infinite where there is no restricted program, or no memory for it.
    """
    if not problem.budget.roomy or any(component.ridge for component in problem.components):
        return math.inf
    work = numbers = 0
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        for gate in problem.gates_of(k):
            m, room = len(units.of_block(gate)), min(component.p, component.q)
            if m > room:
                return math.inf
            # There are no more pairs outside, and no more coupled directions, than units.
            side = m + min(more, 2 * m, room - m)
            work += 2 * side * component.q
            numbers += side * component.form.value_width
    size = numbers * problem.targets[..., 0].numel() * (low or factors.tensors()[0].dtype).itemsize
    return work if work and room_for(problem, size) else math.inf
