"""MLP-mixer: f(X) = sum_j (W1_j X) W2_j; u = W1 in R^{s x s} mixes tokens, v = W2 in R^{d x c} features."""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads.architectures.base import (
    NARROW,
    Architecture,
    Pullback,
    Stats,
    gated_forms,
    gated_forms_adjoint,
    outer_sum,
    register,
)
from convexheads.products import narrow_product


class PooledLinearMixer(Architecture):
    """The mean over rows only sees the mean row of W1: B(u, v) = s^{-1/2} u X W2 with u in R^s."""

    name = "mixer"
    products_only = True

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.tokens,)

    @property
    def value_width(self) -> int:
        return self.features

    @property
    def workspace(self) -> int:
        return self.features

    @property
    def unit_work(self) -> int:
        return self.tokens * self.features

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        # Features before tokens: one product for all samples and features at once.
        return (X.mT.contiguous(),)

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        return (stats[0] @ (u.mT * self.tokens**-0.5)).mT

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback:
        columns = stats[0].flatten(0, 1)
        return lambda cotangent: (cotangent.mT.reshape(len(columns), -1).mT @ columns) * self.tokens**-0.5

    def sample_gradients(self, stats: Stats, u: Tensor, gate: Tensor | None, cotangent: Tensor) -> Tensor:
        return (cotangent.view(len(stats[0]), len(u), -1) @ stats[0]) * self.tokens**-0.5

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        return stats[0][:, :, rows].mT * self.tokens**-0.5

    def distinct_adjoint(self, stats: Stats, L: Tensor, gate: int | None, rows: slice, total: Tensor | None) -> Tensor:
        # Of the tokens as they are: scaled, they would be one more copy.
        return outer_sum(stats[0][:, :, rows].mT, L * self.tokens**-0.5, total)

    @property
    def block_work(self) -> float:
        return 2 * self.tokens * self.features * max(self.outputs, NARROW)

    def block_weights(self, Z: Tensor) -> Tensor:
        return Z.transpose(0, 1).flatten(0, 1) * self.tokens**-0.5

    def block_outputs(self, stats: Stats, weights: Tensor) -> Tensor:
        return narrow_product(stats[0].flatten(1), weights)

    def lift(self, u: Tensor) -> Tensor:
        # W1 with all rows equal to u / sqrt(s): same norm, and the mean over rows is s^{-1/2} u X.
        return (u * self.tokens**-0.5)[:, None, :].expand(-1, self.tokens, -1)

    def reduce(self, u: Tensor) -> Tensor:
        return u.sum(1) * self.tokens**-0.5


class _Square(Architecture):
    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.tokens, self.tokens)

    @property
    def value_width(self) -> int:
        return self.features

    @property
    def workspace(self) -> int:
        return self.tokens * self.features

    @property
    def unit_work(self) -> int:
        return self.tokens**2 * self.features


class PooledGatedMixer(_Square):
    """s^{-1} sum_t M[t, l] (W1 X)[t, l], feature by feature: M_l^T W1 X_l with columns M_l and X_l."""

    name = "mixer"

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        assert gates is not None
        masks = Mixer(self.tokens, self.features, self.outputs).masks(X, gates).to(X.dtype)
        return X.mT.contiguous(), masks.mT.contiguous() / self.tokens

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        columns, selected = stats
        return gated_forms(selected, u, gate, columns).mT

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback:
        assert gate is not None
        columns, selected = stats
        return lambda cotangent: gated_forms_adjoint(selected, cotangent.mT, gate, columns)

    @property
    def row_step(self) -> int:
        return self.tokens

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        columns, selected = stats
        t = slice(rows.start // self.tokens, rows.stop // self.tokens)
        # Contiguous factors: the product of two transposed ones would be copied once more.
        X, own = columns.mT.contiguous(), selected[:, gate, :, t].mT.contiguous()
        return (own[:, :, None] * X[:, None]).flatten(1, 2)


@register
class Mixer(_Square):
    """The definition: hidden = W1 X (s x d), values = hidden."""

    name = "mixer"
    reductions = {("linear", True): PooledLinearMixer, ("gated_relu", True): PooledGatedMixer}

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        m, s = u.shape[0], self.tokens
        return (u.reshape(m * s, s) @ X).view(X.shape[0], m, s, self.features)

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return H

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        X = stats[0]
        index = torch.arange(self.tokens**2, device=X.device)[rows]
        t, q = index // self.tokens, index % self.tokens
        row = X[:, q] if gate is None else X[:, q] * stats[1][:, gate][:, t]
        if self.pooled:
            return row / self.tokens
        T = torch.zeros(len(X), self.tokens, len(index), self.features, dtype=X.dtype, device=X.device)
        T[:, t, torch.arange(len(index), device=X.device)] = row
        return T
