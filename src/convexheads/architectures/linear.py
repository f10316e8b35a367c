"""Linear head with ridge penalty, the baseline: f(X) = X W, penalty (beta/2) ||W||_F^2; no mixing weight."""

from __future__ import annotations

from torch import Tensor

from convexheads.architectures.base import Architecture, Stats, register


@register
class Linear(Architecture):
    """One unit whose features are the tokens themselves (their mean where pooled)."""

    name = "linear"
    ridge = True

    @property
    def u_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def value_width(self) -> int:
        return self.features

    @property
    def workspace(self) -> int:
        return self.features if self.pooled else self.tokens * self.features

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return (X.mean(1),) if self.pooled else (X,)

    def unit_features(self, stats: Stats, u: Tensor | None, gate: Tensor | None) -> Tensor:
        return stats[0].unsqueeze(-2)
