"""Two-layer perceptron on every token: f(X) = sum_j (X w1_j) w2_j^T; u = w1 in R^d, v = w2 in R^c."""

from __future__ import annotations

from torch import Tensor

from convexheads.architectures.base import Architecture, Stats, features_by_gate, register


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


class PooledLinearMLP(_Perceptron):
    """The mean over rows of X w1 w2^T is (xbar^T w1) w2^T, with xbar the mean token."""

    name = "mlp"

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return (X.mean(1),)

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        return (stats[0] @ u.mT)[..., None]


class PooledGatedMLP(_Perceptron):
    """The mean over rows of diag(M) X w1 w2^T is (xbar_g^T w1) w2^T, xbar_g the mean of the selected tokens."""

    name = "mlp"

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        assert gates is not None
        masks = MLP(self.tokens, self.features, self.outputs).masks(X, gates)
        return (masks.to(X.dtype) @ X / self.tokens,)

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return features_by_gate(stats[0], u, gate)

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        return stats[0][:, gate, rows, None]


@register
class MLP(_Perceptron):
    """The definition: hidden = X w1 (s), values = hidden."""

    name = "mlp"
    reductions = {("linear", True): PooledLinearMLP, ("gated_relu", True): PooledGatedMLP}

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        return (X @ u.mT).mT

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return H[..., None]
