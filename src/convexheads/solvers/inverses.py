"""Inverses of approximate curvature matrices, applied to gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WELL_DAMPED = 16.0
"""Multiples of the rounding of a moment's trace from which damping is likely to make it positive definite."""


def by_group(maps: Sequence[Callable[[Tensor], Tensor]], sizes: list[int], matrix: Tensor) -> Tensor:
    """Each of ``maps`` on its own rows, ``sizes`` of them one after the other, of ``matrix`` (..., D, c)."""
    if len(maps) == 1:
        return maps[0](matrix)
    return torch.cat([each(part) for each, part in zip(maps, matrix.split(sizes, -2), strict=True)], -2)


class KroneckerInverse:
    """(left (x) right + damping I)^{-1} for symmetric positive semidefinite left (a, a), right (b, b)."""

    def __init__(self, left: Tensor, right: Tensor, damping: float) -> None:
        self.left_values, self.left_vectors = torch.linalg.eigh(left)
        self.right_values, self.right_vectors = torch.linalg.eigh(right)
        outer = self.left_values.clamp_min(0)[:, None] * self.right_values.clamp_min(0)[None, :]
        self.scale = 1.0 / (outer + damping)

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply to ``matrix`` (r, a, b)."""
        # Products of two matrices are called with less ado than those of one with a batch.
        one = len(matrix) == 1
        inner = (self.left_vectors.mT @ (matrix[0] if one else matrix) @ self.right_vectors).mul_(self.scale)
        found = self.left_vectors @ (inner @ self.right_vectors.mT)
        return found[None] if one else found


class DampedInverse:
    """(moment + damping I)^{-1} from its Cholesky factor: an eighth of the work of eigenvalues."""

    def __init__(self, factor: Tensor) -> None:
        self.inverse = torch.cholesky_inverse(factor)

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply to ``matrix`` (r, a, 1)."""
        return (matrix[..., 0] @ self.inverse)[..., None]


def damped_inverse(moment: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """(moment + damping I)^{-1} applied to (r, a, 1), for a symmetric moment (a, a), semidefinite but for rounding.

    By eigenvalues, none of them negative, where rounding may leave nothing of ``damping``.
    """
    # The trace bounds the largest eigenvalue.
    if damping >= WELL_DAMPED * torch.finfo(moment.dtype).eps * float(moment.trace()):
        damped = moment.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return DampedInverse(factor)
    return KroneckerInverse(moment, moment.new_ones(1, 1), damping)


class OutputwiseInverse:
    """The inverse where every output b has a moment of its own, M_b = sum_i h_ib t_i t_i^T + damping I.

    The samples that an output is uncertain of are few and alike, so that a Kronecker product, which has the mean
    moment for all outputs, is off by factors of ten in both directions. Here the ``heavy`` rows t_i, of largest
    curvature h_ib, are exact, and the rest is taken by the diagonal of its moment in bases that all outputs share
    (Woodbury's formula). Couplings between outputs are left out, but for the one that softmax always has: a common
    shift of all outputs changes nothing, so that of a shift of v the damping is all the curvature there is.

    Parameters
    ----------
    bases : orthonormal columns (D_g, D_g) of each group of features; D = sum of D_g.
    heavy : heavy rows in these bases times the roots of their curvature, (c, r, D): exact across groups, too. They are
        written over.
    rest : diagonal of the moment of all other rows in these bases, (D, c).
    damping : added to every eigenvalue.
    shift_free : whether the loss does not see a common shift of all outputs.
    """

    def __init__(self, bases: list[Tensor], heavy: Tensor, rest: Tensor, damping: float, shift_free: bool) -> None:
        self.onto = [basis.mT.matmul for basis in bases]
        self.back = [basis.matmul for basis in bases]
        self.sizes = [len(basis) for basis in bases]
        self.damping, self.shift_free = damping, shift_free
        self.root = (rest.clamp_min(0) + damping).rsqrt()
        scaled = heavy.mul_(self.root.mT[:, None])
        inner = scaled @ scaled.mT
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        # (I + K^T K)^{-1} = I - K^T (I + K K^T)^{-1} K; the Cholesky factor of what is inverted is taken into K. By its
        # inverse: triangular solves of so wide a right side take several times as long as a product.
        unit = torch.eye(scaled.shape[1], dtype=scaled.dtype, device=scaled.device)
        self.heavy = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), unit, upper=False) @ scaled

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply to ``matrix`` (k, D, c)."""
        shift = matrix.mean(-1, keepdim=True) if self.shift_free else None
        inner = by_group(self.onto, self.sizes, matrix if shift is None else matrix - shift)
        inner *= self.root
        if self.heavy.shape[1]:
            columns = inner.permute(2, 1, 0)
            inner -= ((self.heavy @ columns).mT @ self.heavy).permute(1, 2, 0)
        inner *= self.root
        found = by_group(self.back, self.sizes, inner)
        if shift is None:
            return found
        return found.sub_(found.mean(-1, keepdim=True)).add_(shift, alpha=1.0 / self.damping)
