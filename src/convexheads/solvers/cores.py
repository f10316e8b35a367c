"""The soft directions of the factored objective: a coarse space beside the blocks of the preconditioner.

In the Hessian of the factored objective the factors of a unit are coupled by Gamma = A_g^* L. At an optimum

    Gamma b_r = -beta a_r,   Gamma^T a_r = -beta b_r      for the units Z_g = sum_r sigma_r a_r b_r^T,

and of the other singular values of Gamma many lie just below beta. Where u moves along a left and v along the right
vector of such a pair, decay and coupling cancel, and of the curvature only that of the loss is left, which for small
units is far below beta. Blocks for u and v alone see beta there, so that these directions are left for last: the
objective hardly feels them, but the duality gap does.

With sigma_r = 0 for ``outside`` pairs, which no unit has yet, every pair (r, s), not both outside, gives one direction

    delta Z ~ a_r b_s^T:   delta u_s = sqrt(sigma_s / (sigma_r + sigma_s)) a_r,
                           delta v_r = sqrt(sigma_r / (sigma_r + sigma_s)) b_s,

all orthonormal. In their span the Hessian is (sigma_r + sigma_s) times that of the loss in Z, estimated from samples,
plus beta [[1, -g], [-g, 1]] for (r, s) and (s, r), where g = 1, or the pair's singular value over beta. The softest
directions are solved for with all their couplings; everything orthogonal to them stays with the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads.distributed import World
from convexheads.operator import Component
from convexheads.problem import Problem, take_rows
from convexheads.products import add_moment, column_squares, from_lower, rough_products
from convexheads.spectral import principal_axes
from convexheads.subspace import IN_USE, OutsidePairs
from convexheads.types import Factors, Units

MOST_UNITS = 64
"""Units of a block whose directions are looked at: the smallest ones in use."""
SOUND = 1e-3
"""Share of a principal unit's norm that must be outside the span of larger ones."""
MOST_DIRECTIONS = 600
"""Directions of a block that are solved for: the softest ones ..."""
SOFT = 1.0
"""... with a curvature of the loss below this share of beta w."""
ROWS_PER_DIRECTION = 2
"""Sampled gradients there must be for each of them."""
ROW_NUMBERS = 2**24
"""Numbers in all the sampled gradients of a block."""
DAMPING = 0.02
"""Least share of beta w that is added to their Hessian: what the estimate cannot tell apart from zero ..."""
CAUTION = 0.3
"""... or this multiple of the relative gap: far from an optimum units are no singular vectors yet."""
NEARLY_ONE = 0.99
"""The most that a singular value outside the units counts for, as a share of beta w: above it lies no minimum."""


def orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span the first of ``rows`` as they go on, and the triangular L >= 0 with rows = L Q."""
    Q, R = torch.linalg.qr(rows.mT)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    return (Q * sign).mT, (R * sign[:, None]).mT


def pair_weights(size: Tensor, outside: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For pairs (r, s) of units of these sizes (m,) and of ``outside`` singular values (K,): matrices (m + K, m + K).

    Shares of the direction in u and in v, the root of sigma_r + sigma_s, and the coupling g with (s, r).
    """
    every = torch.cat([size, size.new_zeros(len(outside))])
    together = (every[:, None] + every).clamp_min(torch.finfo(every.dtype).tiny)
    coupling = torch.cat([torch.ones_like(size), (outside.double() / damping).clamp_max(NEARLY_ONE)])
    coupling = torch.minimum(coupling[:, None], coupling)
    return (every / together).sqrt(), (every[:, None] / together).sqrt(), together.sqrt(), coupling


def without_intercept(moment: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The moment of the first ``n`` columns once the intercept, the others, gives way; its drift, and its inverse.

    The first is written over that in ``moment``.
    """
    inverse = torch.linalg.pinv(moment[n:, n:].double(), hermitian=True, rtol=1e-5).to(moment.dtype)
    drift = moment[:n, n:] @ inverse
    return moment[:n, :n].addmm_(drift, moment[n:, :n], alpha=-1.0), drift, inverse


def with_decay(curvature: Tensor, damping: Tensor, coupling: Tensor, mirrored: Tensor, caution: float) -> Tensor:
    """The Hessian along directions from the curvature of the loss there: with weight decay, and the coupling by Gamma.

    ``damping`` is beta w of each, ``mirrored`` the number of (s, r) for each (r, s), ``caution`` a share of beta w that
    is added. It is written over ``curvature``, which is symmetric but for rounding: factorisations read half of it.
    """
    each = torch.arange(len(curvature), device=curvature.device)
    curvature[each, each] += (1.0 + caution) * damping
    curvature[each, mirrored] -= damping * coupling
    return curvature


def with_a_unit(matrices: Tensor, m: int) -> Tensor:
    """The entries (r, s) of square matrices (..., k, k) where r or s is one of the ``m`` units, which come first."""
    return torch.cat([matrices[..., :m, :].flatten(-2), matrices[..., m:, :m].flatten(-2)], -1)


def moment_of(parts: list[Tensor], columns: Tensor, like: Tensor, world: World) -> Tensor:
    """The second moment of some columns of sampled gradients, ``parts`` (rows, D), over all workers; may be rough."""
    # A worker may have none of the samples.
    moment = like.new_zeros(len(columns), len(columns))
    with rough_products(like.device):
        for each in parts:
            add_moment(moment, each if len(columns) == each.shape[1] else each[:, columns])
    return from_lower(world.sum(moment))


class Core:
    """The soft directions of one block.

    Parameters
    ----------
    component, gate : the block.
    units : units of the component, in the dtype of the iterations; ``own`` are the numbers of the block's.
    damping : beta w.
    outside : singular pairs of the block's Gamma outside the span of its units.
    gap : relative duality gap, about.
    """

    def __init__(
        self,
        component: Component,
        gate: int | None,
        units: Units,
        own: Tensor,
        damping: float,
        outside: OutsidePairs,
        gap: float,
    ) -> None:
        assert units.u is not None
        self.component, self.own, self.damping = component, own, damping
        self.caution = max(DAMPING, CAUTION * gap)
        dtype = units.v.dtype
        u, v = units.u[own].flatten(1).double(), units.v[own].flatten(1).double()
        size, axes = principal_axes(u, v, IN_USE)
        left, onto_left = orthonormal(axes.mT @ u)
        right, onto_right = orthonormal(axes.mT @ v)
        # Where units are far from balanced their axes may be next to parallel on one side.
        sound = torch.minimum(onto_left.diagonal(), onto_right.diagonal()) > SOUND * size.sqrt()
        count = int(sound.cumprod(0).sum())
        kept = slice(max(0, count - MOST_UNITS), count)
        # Features of the left vectors are combinations of those of the units.
        combine = torch.linalg.solve_triangular(onto_left[:count, :count], axes[:, :count].mT, upper=False)
        self.combine = combine[kept].to(dtype)
        spare = outside.sigma.new_zeros(len(outside.sigma))
        # A direction of descent is minus a singular pair.
        self.left = torch.cat([left[kept], -outside.left.double()]).to(dtype)
        self.right = torch.cat([right[kept], outside.right.double()]).to(dtype)
        self.axes = torch.cat([axes[:, kept], spare.expand(len(axes), -1)], 1).to(dtype)
        self.held = held = len(size[kept])
        self.extra = Units(
            self.left[held:].view(-1, *component.form.u_shape),
            units.v.new_zeros(len(spare), *units.v.shape[1:]),
            None if gate is None else torch.full((len(spare),), gate, device=units.v.device),
        )
        *weights, self.coupling = pair_weights(size[kept], outside.sigma, damping)
        self.on_left, self.on_right, self.scale = (each.to(dtype) for each in weights)
        numbers = torch.arange(self.side**2, device=units.v.device)
        self.candidates = with_a_unit(numbers.view(self.side, self.side), held)
        self.sampled: list[Tensor] = []

    @property
    def side(self) -> int:
        """Pairs (r, s) are numbered r * side + s."""
        return len(self.left)

    def add(self, T: Tensor, extra: Tensor, E: Tensor, weights: Tensor) -> None:
        """Take in sampled gradients.

        Parameters
        ----------
        T, extra : features (rows, m, k) of all units of the component, and of the outside left vectors.
        E : residuals (rows, outputs) with the Hessian of the loss for second moment.
        weights : (rows,).
        """
        features = torch.cat([self.combine @ T[:, self.own], extra], 1)
        own = E[:, self.component.outputs]
        values = (own @ self.right.view(self.side, *self.extra.v.shape[1:]).flatten(0, 1).mT).view(
            len(E), self.side, -1
        )
        gradients = (features @ values.mT).mul_(self.scale)
        self.sampled.append(torch.cat([with_a_unit(gradients, self.held), E], 1).mul_(weights.sqrt()[:, None]))

    def finish(self, world: World, rows: int, outputs: int, centred: bool) -> None:
        """Choose the directions, and factorise their Hessian; ``rows`` gradients of all workers were taken in."""
        parts, total = self.sampled, len(self.candidates)
        del self.sampled
        # A worker may have none of the samples.
        squares = self.left.new_zeros(total + outputs)
        for each in parts:
            squares += column_squares(each)
        curvature = self.left.new_full((self.side**2,), torch.inf)
        curvature[self.candidates] = world.sum(squares)[:total]
        # Both of (r, s) and (s, r), or neither.
        square = curvature.view(self.side, self.side)
        softest = torch.minimum(square, square.mT).flatten()[self.candidates]
        count = int((softest < SOFT * self.damping).sum())
        most = min(MOST_DIRECTIONS, max(0, rows // ROWS_PER_DIRECTION - outputs))
        if count > most:
            least = softest.sort().values[most]
            chosen = softest < least
        else:
            chosen = softest < SOFT * self.damping
        self.chosen = self.candidates[chosen]
        n = len(self.chosen)
        every = torch.cat([chosen.nonzero()[:, 0], torch.arange(total, total + outputs, device=chosen.device)])
        moment = moment_of(parts, every, self.left, world).double()
        hessian, drift, _ = without_intercept(moment, n) if centred else (moment[:n, :n], None, None)
        self.drift = None if drift is None else drift.to(squares.dtype)
        place = torch.full((self.side**2,), -1, device=self.chosen.device)
        place[self.chosen] = torch.arange(n, device=self.chosen.device)
        other = place.view(self.side, self.side).mT.flatten()[self.chosen]
        damping = hessian.new_full((n,), self.damping)
        hessian = with_decay(hessian, damping, self.coupling.flatten()[self.chosen], other, self.caution)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).to(squares.dtype)

    def parts(self, du: Tensor, dv: Tensor) -> Tensor:
        """Components along the chosen directions of vectors with parts du (r, m, p), dv (r, m, q): (r, directions)."""
        on_left = self.left @ (self.axes.mT @ du[:, self.own]).mT
        on_right = (self.axes.mT @ dv[:, self.own]) @ self.right.mT
        return (self.on_left * on_left + self.on_right * on_right).flatten(1)[:, self.chosen]

    def add_along(self, numbers: Tensor, du: Tensor, dv: Tensor) -> None:
        """Add to du and dv the directions times ``numbers`` (r, directions)."""
        z = numbers.new_zeros(len(numbers), self.side**2)
        z[:, self.chosen] = numbers
        z = z.view(-1, self.side, self.side)
        du[:, self.own] += self.axes @ ((self.on_left * z).mT @ self.left)
        dv[:, self.own] += self.axes @ ((self.on_right * z) @ self.right)


class Cores:
    """The soft directions of all blocks: what is along them is taken from a vector, solved for, and given back.

    Parameters
    ----------
    outside : pairs outside the units of every block, by (component, gate).
    gap : relative duality gap, about.
    samples : samples that gradients may be taken of, over all workers; ``rows`` of outputs each.
    """

    def __init__(
        self,
        problem: Problem,
        factors: Factors,
        outside: dict[tuple[int, int | None], OutsidePairs],
        gap: float,
        samples: int,
        rows: int,
    ) -> None:
        self.problem, self.factors = problem, factors
        self.blocks: list[tuple[int, Core]] = []
        for (k, gate), pairs in outside.items():
            units, component = factors.units[k], problem.components[k]
            own = units.of_block(gate)
            if len(own):
                damping = problem.penalty_weight(component)
                self.blocks.append((k, Core(component, gate, units, own, damping, pairs, gap)))
        widest = max((len(core.candidates) for _, core in self.blocks), default=0) + problem.outputs
        # Every how many samples suffice.
        self.stride = max(1, -(-samples * rows * widest // ROW_NUMBERS))
        self.rows = -(-samples // self.stride) * rows

    def add(self, index: Tensor, features: list[Tensor], stats: list, E: Tensor, weights: Tensor, rows: int) -> None:
        """Take in the samples ``index`` of a chunk, with the units' features and the residuals of its rows."""
        if not len(index):
            return
        every = (index[:, None] * rows + torch.arange(rows, device=index.device)).flatten()
        E, weights = E[every], weights[every] * self.stride
        for k, core in self.blocks:
            thin = tuple(take_rows(t, index) for t in stats[k])
            core.add(features[k][every], core.component.features(thin, core.extra), E, weights)

    def finish(self, centred: bool) -> None:
        for _, core in self.blocks:
            core.finish(self.problem.world, self.rows, self.problem.outputs, centred)

    def _split(self, vectors: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Views (r, m, p), (r, m, q) of each component, and of the intercept (r, c)."""
        found, start, r = [], 0, len(vectors)
        for component, units in zip(self.problem.components, self.factors.units, strict=True):
            m = len(units.v)
            sizes = [0 if units.u is None else m * component.p, m * component.q]
            u, v = vectors[:, start : start + sum(sizes)].split(sizes, 1)
            start += sum(sizes)
            found.append((u.view(r, m, component.p) if sizes[0] else u, v.view(r, m, component.q)))
        return found, vectors[:, start:]

    def take(self, vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``vectors`` without their parts along the directions, and what is solved for these."""
        rest = vectors.clone()
        parts, intercept = self._split(rest)
        if self.problem.loss.shift_free and intercept.shape[1]:
            intercept = intercept - intercept.mean(1, keepdim=True)
        solved = []
        for k, core in self.blocks:
            along = core.parts(*parts[k])
            core.add_along(-along, *parts[k])
            if core.drift is not None:
                along = along - intercept @ core.drift.mT
            solved.append(along @ core.inverse)
        return rest, solved

    def give(self, found: Tensor, solved: list[Tensor]) -> Tensor:
        """``found`` with ``solved`` in the place of whatever it has along the directions."""
        parts, intercept = self._split(found)
        for (k, core), along in zip(self.blocks, solved, strict=True):
            core.add_along(along - core.parts(*parts[k]), *parts[k])
            if core.drift is not None:
                moved = along @ core.drift
                if self.problem.loss.shift_free:
                    moved = moved - moved.mean(1, keepdim=True)
                intercept -= moved
        return found
