"""Kronecker-factored preconditioner for the factored objective.

The Gauss-Newton matrix of f( sum_j T(u_j) v_j ) is approximated by one block for v and one for u of every
component (in the spirit of K-FAC: Martens and Grosse 2015):

* v: (sum_i a_i T_i T_i^T) (x) (mean Hessian of the loss) + beta w I, exact up to the independence of T and Hessian;
* u: the second moment of per-sample gradients, with residuals drawn so that their second moment is the Hessian;
  in full where it is small, else as left (x) right / trace over u seen as a matrix.

Each is inverted exactly through eigenvectors, damping included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convexheads.memory import WORKSPACE
from convexheads.operator import split_rows
from convexheads.problem import Problem
from convexheads.types import Factors, Units

FULL_SIZE = 768
GROUP_SIZE = 1024
SAMPLES = 1024
"""Samples that moments are taken over."""
MOST_SAMPLES = 4096
"""The same where they cost little: gradients of ``CHEAP_NUMBERS`` at most in all."""
CHEAP_NUMBERS = 2**23
COMBINATIONS = 3
"""Random combinations of the rows of a sample's gradient that stand for all of them."""
ROWS_PER_COLUMN = 6
"""Such combinations that a Kronecker factor of u is estimated from, per column: more cost time and change little ..."""
CHEAP_ROWS = 2**20
"""... but where gradients of more samples hold no more numbers than this, they are taken."""


def group_size(problem: Problem, columns: int) -> int:
    """Largest side of the moment matrices of so many columns; smaller where memory is limited."""
    limit = problem.budget.limit
    if limit is None:
        return GROUP_SIZE
    # One matrix with its eigenvectors, and the moments, eigenvectors and scales of all groups together.
    return max(16, min(GROUP_SIZE, math.isqrt(limit // 256), limit // (96 * max(1, columns))))


class KroneckerInverse:
    """(left (x) right + damping I)^{-1} for symmetric positive semidefinite left (a, a), right (b, b)."""

    def __init__(self, left: Tensor, right: Tensor, damping: float) -> None:
        self.left_values, self.left_vectors = torch.linalg.eigh(left)
        self.right_values, self.right_vectors = torch.linalg.eigh(right)
        outer = self.left_values.clamp_min(0)[:, None] * self.right_values.clamp_min(0)[None, :]
        self.scale = 1.0 / (outer + damping)

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply to ``matrix`` (..., a, b)."""
        inner = self.left_vectors.mT @ matrix @ self.right_vectors
        return self.left_vectors @ (inner * self.scale) @ self.right_vectors.mT


@dataclass
class Samples:
    """The samples that moments are taken over: those of this worker, out of ``count`` of all workers.

    ``index`` are their numbers here, ``place`` their places among all of them; with targets, weights that sum to one
    over all workers, and white noise of the shape of the targets.
    """

    index: Tensor
    place: Tensor
    count: int
    targets: Tensor
    weights: Tensor
    noise: Tensor


class Preconditioner:
    """Inverse of the approximate Gauss-Newton matrix at given factors; applied to whole gradients."""

    def __init__(self, problem: Problem, factors: Factors, generator: torch.Generator) -> None:
        self.problem = problem
        dtype = factors.tensors()[0].dtype
        sample = self._sample(problem, factors, generator)
        index, place = problem.own_samples(sample)
        Y, a = problem.targets_of(index, dtype)
        total = problem.world.sum(a.sum()).clamp_min(torch.finfo(dtype).tiny)
        a = a / total
        # Drawn for the samples of all workers, so that each sample has the same noise wherever it is.
        noise = torch.randn(len(sample), *problem.targets.shape[1:], generator=generator, dtype=dtype)[place]
        with torch.no_grad():
            samples = Samples(index, place, len(sample), Y, a, noise.to(problem.device))
            self._build(problem, factors, samples, dtype, generator)

    @staticmethod
    def _sample(problem: Problem, factors: Factors, generator: torch.Generator) -> Tensor:
        numbers = max((units.u.numel() for units in factors.units if units.u is not None), default=1)
        count = min(MOST_SAMPLES, max(SAMPLES, CHEAP_NUMBERS // max(1, numbers)))
        if problem.n <= count:
            return torch.arange(problem.n)
        return torch.randperm(problem.n, generator=generator)[:count].sort().values

    def _build(
        self,
        problem: Problem,
        factors: Factors,
        samples: Samples,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        step = problem.chunk_rows(max(1, factors.n_units))
        feature_moments = [
            [torch.zeros(size, size, dtype=dtype, device=problem.device) for size in self._v_sizes(units)]
            for units in factors.units
        ]
        hessian = torch.zeros(problem.outputs, problem.outputs, dtype=dtype, device=problem.device)
        u_blocks = [
            None if units.u is None or not len(units.u) else UBlocks(problem, k, units, samples.count, generator)
            for k, units in enumerate(factors.units)
        ]
        rows_per_sample = samples.targets[..., 0].numel() // max(1, len(samples.targets))
        strides = [1 if blocks is None else blocks.stride for blocks in u_blocks]
        for part in split_rows(len(samples.index), step):
            stats = problem.stats_of(samples.index[part], dtype)
            targets, weights = samples.targets[part], samples.weights[part]
            features = [c.features(s, u) for c, s, u in zip(problem.components, stats, factors.units, strict=True)]
            O = problem.combine(factors, features, targets.shape[:-1])
            row_weights = weights.repeat_interleave(rows_per_sample)
            hessian += problem.own_loss.mean_hessian(O, targets, weights)
            for k, T in enumerate(features):
                for moment, block in zip(
                    feature_moments[k], T.flatten(1).split(self._v_sizes(factors.units[k]), 1), strict=True
                ):
                    moment += block.mT @ (block * row_weights[:, None])
            E = problem.loss.hessian_root_product(O, targets, samples.noise[part]).reshape(len(O), -1, problem.outputs)
            for blocks, stride, stat, component, units in zip(
                u_blocks, strides, stats, problem.components, factors.units, strict=True
            ):
                if blocks is not None:
                    chosen = (samples.place[part] % stride == 0).nonzero()[:, 0].to(E.device)
                    thin = tuple(t[chosen] for t in stat)
                    signs = blocks.signs[samples.place[part][chosen.cpu()]].to(E.device, dtype)
                    blocks.add(thin, units, E[chosen][..., component.outputs], weights[chosen] * stride, signs)
        hessian = problem.world.sum(hessian) / rows_per_sample
        feature_moments = [problem.world.sum_all(moments) for moments in feature_moments]
        self.v_inverses = []
        for component, moments in zip(problem.components, feature_moments, strict=True):
            curvature = hessian[component.outputs, component.outputs]
            damping = problem.penalty_weight(component)
            self.v_inverses.append([KroneckerInverse(moment, curvature, damping) for moment in moments])
        self.u_blocks = u_blocks
        self.v_shapes = [units.v.shape for units in factors.units]
        self.u_sizes = [0 if units.u is None else units.u.numel() for units in factors.units]
        for blocks, component in zip(u_blocks, problem.components, strict=True):
            if blocks is not None:
                blocks.share(problem)
                blocks.finish(problem.penalty_weight(component))
        self.intercept_inverse = None
        if factors.intercept is not None:
            full = hessian * rows_per_sample
            self.intercept_inverse = torch.linalg.pinv(full, hermitian=True, rtol=1e-5)

    def _v_sizes(self, units: Units) -> list[int]:
        """Groups of whole units whose stacked features stay small enough for an eigendecomposition."""
        m, k = units.v.shape[:2]
        per = max(1, group_size(self.problem, m * k) // k)
        return [k * min(per, m - i) for i in range(0, m, per)]

    def apply(self, vectors: Tensor) -> Tensor:
        """Approximate inverse times each row of ``vectors`` (r, number of variables), in the order of Factors.flat."""
        found = torch.empty_like(vectors)
        start = 0

        def take(size: int) -> tuple[Tensor, Tensor]:
            nonlocal start
            part = slice(start, start + size)
            start += size
            return vectors[:, part], found[:, part]

        for shape, u_size, inverses, blocks in zip(
            self.v_shapes, self.u_sizes, self.v_inverses, self.u_blocks, strict=True
        ):
            if u_size:
                given, into = take(u_size)
                if blocks is not None:
                    blocks.apply(given, into)
            for inverse in inverses:
                given, into = take(len(inverse.left_values) * shape[-1])
                into.copy_(inverse(given.view(len(given), -1, shape[-1])).flatten(1))
        if self.intercept_inverse is not None:
            given, into = take(len(self.intercept_inverse))
            into.copy_(given @ self.intercept_inverse)
        return found


class UBlocks:
    """The u part of the preconditioner for one component, over groups of units.

    With G (a, b m) the gradient of one sample in a group's u, the Kronecker factors are the means of G G^T and of
    G^T G. The latter is taken from a few combinations r^T G with random signs r, for which E[r r^T] is the identity:
    the rows of one sample resemble each other, so that more samples tell more than more of their rows.
    """

    def __init__(self, problem: Problem, k: int, units: Units, samples: int, generator: torch.Generator) -> None:
        self.component = problem.components[k]
        self.elements = 16 * WORKSPACE
        if problem.budget.limit is not None:
            # Features are held as well as the copies of u.
            self.elements = (
                problem.budget.workspace
                * self.component.p
                // max(self.component.p, self.component.form.workspace, self.component.form.value_width)
            )
        assert units.u is not None
        m, p = len(units.u), self.component.p
        self.numbers = max(1, m * p)
        a, b = self.component.form.u_matrix
        self.shape = (a, b)
        most = group_size(problem, m * b)
        self.full = m * p <= min(FULL_SIZE, most)
        per = max(1, m) if self.full else max(1, most // b)
        self.groups = [slice(i, min(i + per, m)) for i in range(0, m, per)]
        like = units.u
        if self.full:
            self.left = [like.new_zeros(m * p, m * p)]
            self.right = [like.new_ones(1, 1)]
        else:
            self.left = [like.new_zeros(a, a) for _ in self.groups]
            self.right = [like.new_zeros(b * (g.stop - g.start), b * (g.stop - g.start)) for g in self.groups]
        count = min(COMBINATIONS, a)
        # Every how many samples suffice.
        columns = max(len(right) for right in self.right)
        rows = max(64, ROWS_PER_COLUMN * columns // count, CHEAP_ROWS // self.numbers)
        self.stride = 1 if self.full else max(1, samples // rows)
        # Drawn for all samples, as noise is.
        self.signs = torch.randint(0, 2, (samples, count, a), generator=generator, dtype=torch.int8).mul_(2).sub_(1)

    def add(self, stats: tuple[Tensor, ...], units: Units, E: Tensor, weights: Tensor, signs: Tensor) -> None:
        """Add the second moments of these samples' gradients; residuals E (samples, s, c), signs (samples, r, a)."""
        form, v, gate, u0 = self.component.form, units.v, units.gate, units.u
        assert u0 is not None

        def features(stat: tuple[Tensor, ...], u: Tensor) -> Tensor:
            return form.unit_features(tuple(t[None] for t in stat), u, gate)[0]

        rows = max(1, self.elements // u0.numel())
        for i in range(0, len(E), rows):
            part = tuple(t[i : i + rows] for t in stats)
            # One copy of u a sample: the gradient with respect to the copies is that of every sample by itself.
            copies = u0.expand(len(part[0]), *u0.shape).detach().requires_grad_()
            with torch.enable_grad():
                T = torch.vmap(features)(part, copies)
            cotangent = (E[i : i + rows] @ v.flatten(0, 1).mT).view_as(T)
            (G,) = torch.autograd.grad(T, copies, cotangent)
            G = G * weights[i : i + rows].sqrt().view(-1, *[1] * (G.ndim - 1))
            if self.full:
                flat = G.flatten(1)
                self.left[0] += flat.mT @ flat
                continue
            a, b = self.shape
            G = G.view(len(G), -1, a, b)
            for group, left, right in zip(self.groups, self.left, self.right, strict=True):
                own = G[:, group].transpose(1, 2).flatten(2)
                wide = own.transpose(0, 1).flatten(1)
                left += wide @ wide.mT
                tall = (signs[i : i + rows] @ own).flatten(0, 1)
                right += tall.mT @ (tall / signs.shape[1])

    def share(self, problem: Problem) -> None:
        """Take the moments of the other workers' samples in."""
        whole = problem.world.sum_all([*self.left, *self.right]) if not self.full else []
        if self.full:
            self.left = problem.world.sum_all(self.left)
        else:
            self.left, self.right = whole[: len(self.left)], whole[len(self.left) :]

    def finish(self, damping: float) -> None:
        self.inverses = []
        for left, right in zip(self.left, self.right, strict=True):
            if not self.full:
                right = right / right.trace().clamp_min(torch.finfo(right.dtype).tiny)
            self.inverses.append(KroneckerInverse(left, right, damping))
        del self.left, self.right

    def apply(self, vectors: Tensor, into: Tensor) -> None:
        """Write the inverse times each row of ``vectors`` (r, m p) to ``into``."""
        if self.full:
            into.copy_(self.inverses[0](vectors[:, :, None])[..., 0])
            return
        a, b = self.shape
        count = len(vectors)
        for group, inverse in zip(self.groups, self.inverses, strict=True):
            part = slice(group.start * a * b, group.stop * a * b)
            own = vectors[:, part].view(count, -1, a, b).transpose(1, 2).flatten(2)
            solved = inverse(own).view(count, a, -1, b).transpose(1, 2)
            into[:, part].view(solved.shape).copy_(solved)
