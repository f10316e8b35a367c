"""Self-attention without softmax: f(X) = sum_j (X W1_j X^T) X W2_j (the paper's equation for one head).

u = W1 in R^{d x d} holds query times key, v = W2 in R^{d x c} value times output.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from convexheads.architectures.base import (
    NARROW,
    Architecture,
    Pullback,
    Stats,
    by_feature,
    gated_forms,
    gated_forms_adjoint,
    register,
)
from convexheads.products import add_product, aligned_product


@cache
def _symmetric_places(width: int, device: torch.device) -> Tensor:
    """Numbers of the entries of a symmetric matrix among those of its upper triangle, row by row: (width, width)."""
    # Of use in any mode, wherever it is first asked for.
    with torch.inference_mode(False):
        k, l = torch.triu_indices(width, width, device=device)
        place = torch.empty(width, width, dtype=torch.long, device=device)
        place[k, l] = place[l, k] = torch.arange(len(k), device=device)
    return place


@cache
def _both_places(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of the entries (k, l), k <= l, of a matrix the numbers of (k, l) and (l, k), row by row, and what each counts."""
    with torch.inference_mode(False):
        k, l = torch.triu_indices(width, width, device=device)
        return k * width + l, l * width + k, torch.where(k == l, 0.5, 1.0)


class _Square(Architecture):
    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.features, self.features)

    @property
    def value_width(self) -> int:
        return self.features


class _Pooled(_Square):
    """Pooled forms: T(e_{a k})[l] is symmetric in (k, l), so that half of it says all."""

    @property
    def row_step(self) -> int:
        return self.features

    @property
    def distinct_width(self) -> float:
        return (self.features + 1) / 2

    def spread(self, adjoint: Tensor) -> Tensor:
        return adjoint[:, _symmetric_places(self.features, adjoint.device)].flatten(0, 1)


class PooledLinearSelfAttention(_Pooled):
    """Mean over rows of (X W1 X^T) X W2 = xbar^T W1 G W2, with xbar the mean token and G = X^T X."""

    name = "self_attention"
    outer_gradients = True
    products_only = True
    spaced_cotangents = True

    @property
    def workspace(self) -> int:
        return self.features

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return X.mean(1), X.mT @ X

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        # Batched products of narrow matrices are slow: rows are as long as they can be, of m or of d entries. G is
        # symmetric.
        mean, gram = stats
        m, d = u.shape[0], self.features
        if m > d:
            mixed = aligned_product(mean, u.permute(1, 2, 0).reshape(d, d * m)).view(-1, d, m)
            return (gram @ mixed).mT
        return aligned_product(mean, u.transpose(0, 1).reshape(d, m * d)).view(-1, m, d) @ gram

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback:
        mean, gram = stats
        m, d = u.shape[0], self.features

        def pull(cotangent: Tensor) -> Tensor:
            # As it comes: to turn a cotangent over would cost up to twice the product.
            if by_feature(cotangent):
                return (mean.mT @ (gram @ cotangent.mT).view(-1, d * m)).view(d, d, m).permute(2, 0, 1)
            return (mean.mT @ (cotangent @ gram).view(-1, m * d)).view(d, m, d).transpose(0, 1)

        return pull

    def outer_gradient(self, stats: Stats, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        mean, gram = stats
        return mean, cotangent @ gram

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        mean, gram = stats
        index = torch.arange(self.features**2, device=mean.device)[rows]
        a, k = index // self.features, index % self.features
        return mean[:, a, None] * gram[:, k]

    def distinct_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        mean, gram = stats
        return mean[:, _whole_rows(rows, self.features), None] * self._half(gram)[:, None]

    def _half(self, gram: Tensor) -> Tensor:
        """The upper triangles (n, d (d + 1) / 2) of symmetric matrices (n, d, d), row by row."""
        return torch.cat([gram[:, k, k:] for k in range(self.features)], -1)

    @property
    def adjoint_size(self) -> float:
        return self.features * (self.distinct_width + self.outputs)

    def distinct_adjoint(self, stats: Stats, L: Tensor, gate: int | None, rows: slice, total: Tensor | None) -> Tensor:
        mean, gram = stats
        return self.block_adjoint((mean[:, _whole_rows(rows, self.features)], self._half(gram)), L, total)

    def block_adjoint(self, stats: Stats, L: Tensor, total: Tensor | None) -> Tensor:
        # One wide product G^T (xbar (x) L) instead of a narrow one with all of xbar (x) G: (k, r, c).
        mean, half = stats
        own = (mean[:, :, None] * L[:, None]).flatten(1)
        if total is None:
            return (half.mT @ own).view(half.shape[1], -1, L.shape[1])
        add_product(total.view(half.shape[1], -1), half.mT, own)
        return total

    def spread(self, adjoint: Tensor) -> Tensor:
        # (d (d + 1) / 2, rows of W1, c): by whole rows, which is faster than by any other index.
        d = self.features
        place = _symmetric_places(d, adjoint.device).flatten()
        every = adjoint.flatten(1).index_select(0, place).view(d * d, *adjoint.shape[1:])
        return every.transpose(0, 1).reshape(-1, d, adjoint.shape[2])

    @property
    def block_work(self) -> float:
        d = self.features
        return d * (d + 1) * max(d * self.outputs, NARROW)

    @property
    def block_workspace(self) -> int:
        d = self.features
        return d * (d + 1) // 2 + 3 * d * self.outputs

    def block_weights(self, Z: Tensor) -> Tensor:
        # xbar^T Z G, with what G has twice in one place: (d (d + 1) / 2, d c).
        d = self.features
        own = Z.reshape(d, d * d, -1).transpose(0, 1).flatten(1)
        upper, lower, share = _both_places(d, Z.device)
        both = own.index_select(0, upper).add_(own.index_select(0, lower))
        return both.mul_(share.to(Z.dtype)[:, None])

    def block_stats(self, stats: Stats) -> Stats:
        mean, gram = stats
        return mean, self._half(gram)

    def block_outputs(self, stats: Stats, weights: Tensor) -> Tensor:
        mean, half = stats
        return (mean[:, None] @ (half @ weights).view(len(mean), self.features, -1))[:, 0]


class PooledGatedSelfAttention(_Pooled):
    """1^T (M o X W1 X^T) X = sum_q ((M^T X)_q^T W1 x_q) x_q^T with M^T X computed once a gate."""

    name = "self_attention"

    @property
    def workspace(self) -> int:
        return self.tokens * self.features

    @property
    def unit_work(self) -> int:
        return self.tokens * self.features**2

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        assert gates is not None
        plain = SelfAttention(self.tokens, self.features, self.outputs)
        masks = plain.masks(X, gates).to(X.dtype)
        return X, masks.mT @ X[:, None] / self.tokens

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        X, selected = stats
        return gated_forms(selected, u, gate, X).mT @ X

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback:
        assert gate is not None
        X, selected = stats
        return lambda cotangent: gated_forms_adjoint(selected, X @ cotangent.mT, gate, X)

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        X, selected = stats
        index = torch.arange(self.features**2, device=X.device)[rows]
        a, k = index // self.features, index % self.features
        pairs = selected[:, gate][:, :, a] * X[:, :, k]
        return pairs.mT @ X

    def distinct_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        X, selected = stats
        d = self.features
        pairs = X.new_empty(*X.shape[:2], d * (d + 1) // 2)
        # Slice by slice: to gather by an index costs more than all of the products.
        for k, part in enumerate(pairs.split(list(range(d, 0, -1)), -1)):
            torch.mul(X[:, :, k, None], X[:, :, k:], out=part)
        return selected[:, gate, :, _whole_rows(rows, self.features)].mT @ pairs


def _whole_rows(rows: slice, width: int) -> slice:
    """The rows of W1 that a slice of its entries, row by row, consists of."""
    return slice(rows.start // width, rows.stop // width)


@register
class SelfAttention(_Square):
    """The definition: hidden = X W1 X^T (s x s), values = hidden X (s x d)."""

    name = "self_attention"
    reductions = {
        ("linear", True): PooledLinearSelfAttention,
        ("gated_relu", True): PooledGatedSelfAttention,
    }

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        return X[:, None] @ u @ X[:, None].mT

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return H @ X[:, None]
