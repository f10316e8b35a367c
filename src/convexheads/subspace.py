"""Leading singular pairs of all blocks at once, matrix-free, and beta_max.

Block Krylov iteration with the adjoint applied from both sides, from the span of the units there are; every value is a
Rayleigh quotient, hence a lower bound of the true one: good for steering a solver, never for a claim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexheads.problem import Problem
from convexheads.spectral import largest_singular_value, leading_pairs, principal_axes
from convexheads.types import Factors, Units

DENSE_WORK = 2e10
"""Floating-point operations up to which beta_max forms every Gamma in float64, to full accuracy."""
ROUNDS = 12
"""Rounds that a search takes at most as a rule."""
PAIRS = 6
"""Singular pairs of a block that an estimate of the gap converges."""
KNOWN_PAIRS = 16
"""The same where all singular values are found at once."""
DENSE_SIZE = 256
"""Largest min(p, q) for which all singular values of Gamma are cheaper than a search."""
IN_USE = 3e-4
"""Share of the largest unit of a block below which a unit is on its way in or out, and spans nothing."""


@dataclass(frozen=True)
class SingularPair:
    """sigma, u (p,) and v (q,) with Gamma_g v = sigma u, of a component's gate."""

    component: int
    gate: int | None
    sigma: float
    u: Tensor
    v: Tensor


def principal_in_use(units: Units, gate: int | None) -> tuple[Tensor, Tensor]:
    """The principal units (r, p) and (r, q) of one block that are in use, in float64; none where it has no units."""
    assert units.u is not None
    own = units.of_block(gate)
    u, v = units.u[own].flatten(1).double(), units.v[own].flatten(1).double()
    if not len(u):
        return u, v
    _, axes = principal_axes(u, v, IN_USE)
    return axes.mT @ u, axes.mT @ v


class BlockSubspace:
    """Block Krylov search on all blocks at once; remembers its vectors, so that the next dual point starts there.

    The Krylov space of Gamma Gamma^T is kept whole (with full reorthogonalisation), which needs far fewer adjoints
    than plain subspace iteration where singular values cluster at beta, as they do at an optimum. There one belongs to
    every unit, next to its own vectors: from the span of all of them a search has little left to find.
    """

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem, self.generator = problem, generator
        self.top: dict[tuple[int, int | None], Tensor] = {}

    def top_pairs(
        self,
        L: Tensor,
        size: int = 4,
        rounds: int = 6,
        tol: float = 1e-4,
        hopeless: Callable[[float, float], bool] | None = None,
        low: torch.dtype | None = None,
        factors: Factors | None = None,
    ) -> tuple[float, list[SingularPair], float]:
        """Leading singular pairs of every Gamma_g = A_g^* L, from below.

        Returns max_g sigma_g / w_g, the pairs with sigma > beta w_g, and the ridge branches' sum ||A_h^* L||_F^2 / (2
        beta w_h). Stops when sigma grows by less than ``tol`` relative, and after the first or second round where
        ``hopeless``, of these two numbers, says that they are too large. ``low`` is the precision that factors of
        products may be rounded to: then values have three digits, and may be too large. At the dual point of some
        ``factors`` most of the vectors sought lie in the span of their units, next to an optimum.
        """
        problem = self.problem
        if self._forms(size, rounds):
            return self._dense_pairs(L, size, rounds, tol, factors)
        searches = [
            self._search(k, gate, size, L.dtype, factors)
            for k, component in enumerate(problem.components)
            if not component.ridge
            for gate in problem.gates_of(k)
        ]
        previous, best, ridge = 0.0, 0.0, 0.0
        for step in range(rounds):
            if step:
                images, _ = self._apply(searches, L, ridge, low, left=True, with_ridge=False)
                for search, image in zip(searches, images, strict=True):
                    search.extend_left(image)
                if all(search.exhausted for search in searches):
                    break
            images, ridge = self._apply(searches, L, ridge, low, left=False, with_ridge=step == 0)
            for search, image in zip(searches, images, strict=True):
                search.extend_right(image)
            best = max((float(s.sigma[0]) / problem.components[s.component].weight for s in searches), default=0.0)
            if best <= previous * (1 + tol):
                break
            # It takes half as long as a round, and later ones add next to nothing.
            if step < 2 and hopeless is not None and hopeless(best, ridge):
                break
            previous = best
        pairs = []
        for search in searches:
            self.top[search.key] = search.kept()
            pairs += search.pairs_above(problem.penalty_weight(problem.components[search.component]))
        return best, pairs, ridge

    def _search(self, k: int, gate: int | None, size: int, dtype: torch.dtype, factors: Factors | None) -> _BlockSearch:
        """A search in one block, from the span of its units and from what the last one has found."""
        component = self.problem.components[k]
        spanned = torch.zeros(0, component.p, dtype=dtype, device=self.problem.device)
        if factors is not None:
            u, _ = principal_in_use(factors.units[k], gate)
            spanned = torch.linalg.qr(u.mT).Q.mT.to(dtype)
        known = self.top.get((k, gate))
        known = None if known is None else known.to(dtype)
        return _BlockSearch(k, gate, (component.p, component.q), size, spanned, known, self.generator)

    def _forms(self, size: int, rounds: int) -> bool:
        """Whether forming every Gamma is cheaper than a search without them; few take more than the usual rounds."""
        forming, searching = self.work(size, min(rounds, ROUNDS))
        return forming <= searching

    def exact(self, size: int, rounds: int) -> bool:
        """Whether :meth:`top_pairs` takes all singular values of explicit matrices, so that nothing converges."""
        nuclear = [component for component in self.problem.components if not component.ridge]
        return self._forms(size, rounds) and all(min(c.p, c.q) <= DENSE_SIZE for c in nuclear)

    def work(self, size: int, rounds: int) -> tuple[int, int]:
        """Multiplications a sample, about, of forming every Gamma and of a matrix-free search."""
        parts = [c for c in self.problem.components if not c.ridge]
        forming = sum(c.p * c.q * c.n_gates for c in parts)
        # A search is 2 * rounds thin products with everything a unit touches; thin products run at a fraction of the
        # speed of wide ones.
        searching = sum(2 * rounds * size * c.n_gates * 4 * (c.form.unit_work + c.q) for c in parts)
        return forming, searching

    def _dense_pairs(
        self, L: Tensor, size: int, rounds: int, tol: float, factors: Factors | None
    ) -> tuple[float, list[SingularPair], float]:
        """The same from explicit matrices, one block at a time."""
        problem = self.problem
        best, ridge = 0.0, 0.0
        pairs: list[SingularPair] = []
        for k, component in enumerate(problem.components):
            bound = problem.penalty_weight(component)
            for g, gamma in problem.gammas(L, k, L.dtype):
                if component.ridge:
                    ridge += float(gamma.double().square().sum()) / (2 * bound)
                    continue
                if min(gamma.shape) <= DENSE_SIZE:
                    sigma, left, right = leading_pairs(gamma, min(max(size, KNOWN_PAIRS), *gamma.shape))
                    leading = enumerate(sigma.tolist())
                    pairs += [SingularPair(k, g, s, left[:, i], right[:, i]) for i, s in leading if s > bound]
                else:
                    search = self._search(k, g, size, L.dtype, factors)
                    search.run(gamma, rounds, tol)
                    sigma = search.sigma
                    self.top[search.key] = search.kept()
                    pairs += search.pairs_above(bound)
                best = max(best, float(sigma[0]) / component.weight)
        return best, pairs, ridge

    def _apply(
        self,
        searches: list[_BlockSearch],
        L: Tensor,
        ridge: float,
        low: torch.dtype | None,
        left: bool,
        with_ridge: bool,
    ) -> tuple[list[Tensor], float]:
        """Gamma v (left) or Gamma^T u of every search's newest vectors, in one pass over the samples."""
        problem, dtype = self.problem, L.dtype
        units: list[Units] = []
        for k, component in enumerate(problem.components):
            shape = (component.form.value_width, component.width)
            if component.ridge:
                units.append(Units(None, torch.zeros(int(with_ridge), *shape, dtype=dtype, device=L.device)))
                continue
            own = [search for search in searches if search.component == k]
            rows = torch.cat([search.newest(left) for search in own])
            # Of the other side only the number is asked for.
            other = rows.new_zeros(len(rows), component.p if left else component.q)
            u, v = (other, rows) if left else (rows, other)
            gate = None
            if component.gates is not None:
                gate = torch.cat([torch.full((len(s.newest(left)),), s.gate or 0, device=L.device) for s in own])
            units.append(Units(u.view(-1, *component.form.u_shape), v.view(-1, *shape), gate))
        images = problem.adjoint(L, units, sides="left" if left else "right", low=low)
        if with_ridge:
            ridge = sum(
                float(image.v.double().square().sum()) / (2 * problem.penalty_weight(component))
                for component, image in zip(problem.components, images, strict=True)
                if component.ridge
            )
        found: list[Tensor] = []
        for k, image in enumerate(images):
            own = [search for search in searches if search.component == k]
            if own and image.u is not None:
                part = image.u if left else image.v
                found += part.flatten(1).split([len(search.newest(left)) for search in own])
        return found, ridge


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without what they have in the span of the orthonormal rows ``basis``; twice, for once leaves rounding."""
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    return rows


def _orthonormal(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows that span what ``rows`` have outside the span of ``basis``."""
    return torch.linalg.qr(_without(rows, basis).mT).Q.mT


@dataclass(frozen=True)
class OutsidePairs:
    """Approximate leading singular pairs of (I - P) Gamma (I - Q), P and Q the projections on a block's units in use.

    ``left`` (K, p) and ``right`` (K, q) with orthonormal rows, ``sigma`` (K,) in descending order.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor


class OutsideSubspace:
    """Subspace iteration for :class:`OutsidePairs` of all blocks at once; remembers where it was."""

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem, self.generator = problem, generator
        self.right: dict[tuple[int, int | None], Tensor] = {}

    def pairs(
        self, L: Tensor, factors: Factors, most: int, rounds: int, low: torch.dtype | None = None
    ) -> dict[tuple[int, int | None], OutsidePairs]:
        """At most ``most`` pairs of every block, and not more than it has units; from a dual point L.

        ``rounds`` passes over the samples for each side, one more for blocks that are new. ``low`` is the precision
        that factors of products may be rounded to.
        """
        problem = self.problem
        blocks = []
        for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
            for gate in problem.gates_of(k) if units.u is not None else ():
                u, v = (side.to(L.dtype) for side in principal_in_use(units, gate))
                if not len(u):
                    continue
                room = min(component.p, component.q) - len(u)
                blocks.append(_Outside(k, gate, u, v, min(most, len(u), room)))
        known = [self.right.get(block.key) for block in blocks]
        for block, right in zip(blocks, known, strict=True):
            block.start(right, self.generator)
        wide = [block for block in blocks if block.count]
        for _ in range(rounds + any(right is None for right in known)):
            if not wide:
                break
            for left in (True, False):
                images = problem.adjoint(L, self._units(wide, L), sides="left" if left else "right", low=low)
                for k, image in enumerate(images):
                    there = [block for block in wide if block.k == k]
                    side = image.u if left else image.v
                    if not there or side is None:
                        continue
                    for block, part in zip(there, side.flatten(1).split([b.count for b in there]), strict=True):
                        block.take(part, left)
        self.right = {block.key: block.right for block in blocks}
        return {block.key: block.found() for block in blocks}

    def _units(self, blocks: list[_Outside], L: Tensor) -> list[Units]:
        units = []
        for k, component in enumerate(self.problem.components):
            shape = (component.form.value_width, component.width)
            own = [block for block in blocks if block.k == k]
            if component.ridge or not own:
                empty = None if component.ridge else L.new_zeros(0, *component.form.u_shape)
                none = None if component.gates is None else torch.zeros(0, dtype=torch.long, device=L.device)
                units.append(Units(empty, L.new_zeros(0, *shape), none))
                continue
            gate = None
            if component.gates is not None:
                gate = torch.cat([torch.full((b.count,), b.gate or 0, device=L.device) for b in own])
            u = torch.cat([block.left for block in own]).view(-1, *component.form.u_shape)
            units.append(Units(u, torch.cat([block.right for block in own]).view(-1, *shape), gate))
        return units


class _Outside:
    """One block of :class:`OutsideSubspace`: ``count`` vectors on either side, orthogonal to its units u, v."""

    def __init__(self, k: int, gate: int | None, u: Tensor, v: Tensor, count: int) -> None:
        self.k, self.gate, self.count = k, gate, count
        self.key = (k, gate)
        self.u, self.v = (torch.linalg.qr(t.mT).Q.mT for t in (u, v))
        self.left, self.sigma = u.new_zeros(count, u.shape[1]), u.new_zeros(count)

    def start(self, known: Tensor | None, generator: torch.Generator) -> None:
        like = self.v
        fresh = torch.randn(self.count, like.shape[1], generator=generator, dtype=torch.float64).to(
            like.device, like.dtype
        )
        rows = fresh if known is None else torch.cat([known.to(like.dtype), fresh])[: self.count]
        self.right = _orthonormal(rows, self.v)

    def take(self, image: Tensor, left: bool) -> None:
        """Gamma of the right vectors (rows), or Gamma^T of the left ones; these make the next ones."""
        if left:
            self.left = _orthonormal(image, self.u)
            return
        # Rows are (Gamma^T left_i)^T = sum_j B_ij right_j: a singular value decomposition of what was found.
        A, self.sigma, right = torch.linalg.svd(_without(image, self.v), full_matrices=False)
        self.left, self.right = A.mT @ self.left, right

    def found(self) -> OutsidePairs:
        return OutsidePairs(self.left, self.right, self.sigma)


class _BlockSearch:
    """Rayleigh-Ritz in a growing left basis of one block: orthonormal rows U (r, p), and their images under Gamma^T.

    The basis starts from ``spanned`` (m, p), orthonormal rows, and from what is ``known`` (k, p) of others, or random
    ones. Where nothing is spanned, its spans are those of block Krylov iteration.
    """

    def __init__(
        self,
        component: int,
        gate: int | None,
        shape: tuple[int, int],
        size: int,
        spanned: Tensor,
        known: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.component, self.gate = component, gate
        self.p, self.q = shape
        self.size = min(size, *shape)
        self.spanned = len(spanned)
        count = min(self.size, self.p - self.spanned)
        if known is None:
            others = torch.randn(count, self.p, generator=generator, dtype=torch.float64).to(
                spanned.device, spanned.dtype
            )
        else:
            # Most of them are units themselves: what is left of these comes last.
            others = torch.linalg.svd(_without(known, spanned), full_matrices=False).Vh[:count]
        self.new_u = torch.cat([spanned, _orthonormal(others, spanned)])
        self.U, self.images = self.new_u[:0], self.new_u.new_zeros(0, self.q, dtype=torch.float64)
        self.exhausted = False

    @property
    def key(self) -> tuple[int, int | None]:
        return self.component, self.gate

    def newest(self, left: bool) -> Tensor:
        """The vectors that are multiplied next: right ones for a ``left`` image, and the other way round."""
        return self.new_v if left else self.new_u

    def extend_right(self, image: Tensor) -> None:
        """Take Gamma^T new_u (rows): Ritz values, and the right vectors of the leading ones."""
        self.U, self.images = torch.cat([self.U, self.new_u]), torch.cat([self.images, image.double()])
        # Rows of images are (Gamma^T u_i)^T, so that images = A diag(sigma) B^T gives pairs (A^T U, B). By the Gram
        # matrix, many times faster than a singular value decomposition; in float64 leading values lose nothing.
        squares, axes = torch.linalg.eigh(self.images @ self.images.mT)
        self.sigma = squares.flip(0).clamp_min(0.0).sqrt()
        self.axes = axes.flip(1)
        self.new_v = self.right(min(self.size, self.q))

    def extend_left(self, image: Tensor) -> None:
        """Take Gamma new_v (rows) into the left basis."""
        self.new_u = _orthonormal(image[: self.p - len(self.U)], self.U)
        self.exhausted = not len(self.new_u)

    def left(self, count: int) -> Tensor:
        """The first left Ritz vectors (count, p)."""
        return self.axes[:, :count].to(self.U.dtype).mT @ self.U

    def right(self, count: int) -> Tensor:
        """The first right Ritz vectors (count, q)."""
        scale = self.sigma[:count, None].clamp_min(torch.finfo(torch.float32).tiny)
        return ((self.axes[:, :count].mT @ self.images) / scale).to(self.U.dtype)

    def run(self, gamma: Tensor, rounds: int, tol: float) -> None:
        """The whole search on an explicit matrix."""
        previous = 0.0
        for step in range(rounds):
            if step:
                self.extend_left(self.new_v @ gamma.mT)
                if self.exhausted:
                    break
            self.extend_right(self.new_u @ gamma)
            if float(self.sigma[0]) <= previous * (1 + tol):
                break
            previous = float(self.sigma[0])

    def kept(self) -> Tensor:
        """Left vectors that the next search starts from."""
        return self.left(self.spanned + self.size)

    def pairs_above(self, bound: float) -> list[SingularPair]:
        """All Ritz pairs above ``bound``: those that have not converged are directions of descent all the same."""
        count = min(int((self.sigma > bound).sum()), self.q)
        left, right = self.left(count), self.right(count)
        return [
            SingularPair(self.component, self.gate, float(self.sigma[i]), left[i].clone(), right[i].clone())
            for i in range(count)
        ]


def beta_max(problem: Problem) -> float:
    """Smallest beta for which the empty head is optimal: max_g sigma_max(A_g^* grad f(O_0)) / w_g.

    A head of ridge branches only has no such beta; then that of :func:`ridge_scale` is returned, which scales with
    tokens and loss as a ridge penalty does.
    """
    nuclear = [k for k, component in enumerate(problem.components) if not component.ridge]
    if not nuclear:
        return max(ridge_scale(problem, k) / c.weight for k, c in enumerate(problem.components))
    L = problem.null_gradient()
    work = sum(
        2.0 * problem.n * problem.components[k].p * problem.components[k].q * problem.components[k].n_gates
        for k in nuclear
    )
    if work <= DENSE_WORK:
        return max(block_scale(problem, L, k) / problem.components[k].weight for k in nuclear)
    return _searched_scale(problem, L, size=6, rounds=30, tol=1e-7)


def rough_beta_max(problem: Problem) -> float:
    """:func:`beta_max` of the nuclear branches, within some percent and in a few passes over the samples."""
    return _searched_scale(problem, problem.null_gradient(), size=2, rounds=3, tol=0.05)


def _searched_scale(problem: Problem, L: Tensor, size: int, rounds: int, tol: float) -> float:
    """max_g sigma_max(A_g^* L) / w_g by a search, from below."""
    search = BlockSubspace(problem, torch.Generator().manual_seed(0))
    return search.top_pairs(L.to(problem.dtype), size, rounds, tol)[0]


def branch_scale(problem: Problem, branch: int) -> float:
    """beta_max of one branch alone at weight one, the ridge scale for a ridge branch."""
    L = problem.null_gradient()
    own = [k for k, component in enumerate(problem.components) if component.branch == branch]
    return max(ridge_scale(problem, k) if problem.components[k].ridge else block_scale(problem, L, k) for k in own)


def block_scale(problem: Problem, L: Tensor, k: int) -> float:
    """max_g sigma_max(A_g^* L) of one component."""
    return max(largest_singular_value(gamma).lower for _, gamma in problem.gammas(L, k))


def ridge_scale(problem: Problem, k: int) -> float:
    """Ten times the mean eigenvalue of the loss curvature in the weights of a ridge component, at the empty head.

    A ridge head is never empty; at this beta an average direction of its features keeps about a tenth of its
    unpenalised size, which is as near to the empty head as beta_max brings the others. With an intercept the features
    count from their mean.
    """
    component = problem.components[k]
    O, _ = problem.null_outputs()
    targets, weights = problem.targets_of(slice(0, problem.n), torch.float64)
    hessian = problem.loss.mean_hessian(O, targets, weights)[component.outputs, component.outputs]
    width = component.form.value_width
    empty = Units(None, torch.zeros(1, width, component.width, dtype=problem.dtype, device=problem.device))
    first = torch.zeros(width, dtype=torch.float64, device=problem.device)
    second = torch.zeros_like(first)
    count = 0.0
    for index, stats in problem.chunks(problem.dtype, 1):
        features = component.features(stats[k], empty)[:, 0].double()
        rows = weights[index].repeat_interleave(len(features) // max(1, len(weights[index])))
        first += rows @ features
        second += rows @ features.square()
        count += float(rows.sum())
    first, second = problem.world.sum_all([first, second])
    count = problem.world.total(count)
    variance = second / count - (first / count).square() * float(problem.fit_intercept)
    # mean_hessian sums over output tokens, as the second moments do: take the mean of one of them.
    return max(0.0, 10.0 * float(variance.mean() * hessian.diagonal().mean()))
