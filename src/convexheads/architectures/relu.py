"""True ReLU units over any head: the mask is the unit's own sign pattern, so features are not linear in u."""

from __future__ import annotations

from torch import Tensor

from convexheads.architectures.base import Architecture, Stats
from convexheads.errors import InputError, describe


class ReluForm(Architecture):
    """T(u) = values(X, M o hidden(X, u)) with M = 1[hidden(X, u) >= 0], from the plain form of one channel group.

    Outputs, gradients and weight decay of a network follow as for other forms. Adjoints over u's whole space do not
    exist, hence no certificate either: see THEORY on gated networks, which bound ReLU networks.
    """

    rectified = True

    def __init__(self, plain: Architecture) -> None:
        super().__init__(plain.tokens, plain.features, plain.outputs, plain.pooled, plain.grid, plain.n_blocks)
        self.plain = plain
        self.name = plain.name  # type: ignore[misc]

    @property
    def u_shape(self) -> tuple[int, ...]:
        return self.plain.u_shape

    @property
    def value_width(self) -> int:
        return self.plain.value_width

    @property
    def workspace(self) -> int:
        # Pre-activations are formed token by token, even where other activations have a pooled shortcut.
        return max(self.plain.workspace, self.tokens)

    @property
    def unit_work(self) -> int:
        return self.plain.unit_work

    @property
    def u_matrix(self) -> tuple[int, int]:
        return self.plain.u_matrix

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        return self.plain.hidden(X, u)

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return self.plain.values(X, H)

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return (X,)

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        T = self.values(stats[0], self.hidden(stats[0], u).relu())
        return T.mean(2) if self.pooled else T.transpose(1, 2)

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        raise InputError(
            "activation: "
            + describe(
                "'relu', whose units are not linear in u",
                "'linear' or 'gated_relu' for a certificate",
                "Give the network's own patterns as gates to bound it by the gated program.",
            )
        )
