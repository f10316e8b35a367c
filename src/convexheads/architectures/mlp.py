"""Two-layer perceptron on every token: f(X) = sum_j (X w1_j) w2_j^T; u = w1 in R^d, v = w2 in R^c."""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads.architectures.base import Architecture, GatedVectorForm, Stats, VectorForm, register


class _Perceptron(Architecture):
    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.features,)

    @property
    def value_width(self) -> int:
        return 1

    @property
    def workspace(self) -> int:
        return 1 if self.pooled else 2 * self.tokens


class PooledLinearMLP(_Perceptron, VectorForm):
    """The mean over rows of X w1 w2^T is (xbar^T w1) w2^T, with xbar the mean token."""

    name = "mlp"
    outer_gradients = True

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return (X.mean(1),)

    def outer_gradient(self, stats: Stats, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return stats[0], cotangent


class PooledGatedMLP(_Perceptron, GatedVectorForm):
    """The mean over rows of diag(M) X w1 w2^T is (xbar_g^T w1) w2^T, xbar_g the mean of the selected tokens."""

    name = "mlp"
    joint = True

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        assert gates is not None
        masks = MLP(self.tokens, self.features, self.outputs).masks(X, gates)
        return (masks.to(X.dtype) @ X / self.tokens,)

    def joint_adjoint(self, stats: Stats, L: Tensor) -> Tensor:
        selected = stats[0]
        return (selected.flatten(1).mT @ L).view(*selected.shape[1:], -1)


class SingleTokenGatedMLP(_Perceptron):
    """One token a sample: masks are kept beside x instead of a masked copy of x for every gate.

    All units take one product then, and what is kept is P + d numbers a sample instead of P d.
    """

    name = "mlp"
    joint = True

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        assert gates is not None
        masks = MLP(self.tokens, self.features, self.outputs).masks(X, gates)
        return (X[:, 0], masks[..., 0].to(X.dtype))

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        x, masks = stats
        H, P = x @ u.mT, masks.shape[1]
        each = len(gate) // P
        if torch.equal(gate, torch.arange(P, device=gate.device).repeat_interleave(each)):
            # As many units for every gate: the masks serve as they are.
            return (H.view(-1, P, each) * masks[..., None]).view(-1, len(gate), 1)
        return (H * masks.index_select(1, gate))[..., None]

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        x, masks = stats
        assert gate is not None
        return (x[:, rows] * masks[:, gate, None])[..., None]

    def joint_adjoint(self, stats: Stats, L: Tensor) -> Tensor:
        x, masks = stats
        n, (P, d, c) = len(x), (masks.shape[1], x.shape[1], L.shape[1])
        if c > d:
            # The masks go to the smaller factor.
            return ((masks[..., None] * x[:, None]).view(n, P * d).mT @ L).view(P, d, c)
        masked = (masks[..., None] * L[:, None]).view(n, P * c)
        return (x.mT @ masked).view(d, P, c).transpose(0, 1)


@register
class MLP(_Perceptron):
    """The definition: hidden = X w1 (s), values = hidden."""

    name = "mlp"
    reductions = {("linear", True): PooledLinearMLP, ("gated_relu", True): PooledGatedMLP}

    def form(self, activation: str) -> Architecture:
        if self.pooled and self.tokens == 1 and activation == "gated_relu":
            return SingleTokenGatedMLP(self.tokens, self.features, self.outputs)
        return super().form(activation)

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        return (X @ u.mT).mT

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return H[..., None]
