"""Fourier neural operator: f(X) = sum_j circ(X) w1_j w2_j^T, a circular convolution over tokens by FFT.

u = w1 in R^{s d}, entry k * d + a for shift k (row-major over the grid) and channel a; v = w2 in R^c.
circ(X)[t, k * d + a] = X[t - k, a] with indices modulo s, or modulo (h, w) on a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads.architectures.base import Architecture, Stats, register


class PooledLinearFNO(Architecture):
    """The mean over tokens sees the sum of all shifts only: B(w, v) = s^{1/2} (xbar^T w) v^T with w in R^d."""

    name = "fno"
    options = ("grid",)

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.features,)

    @property
    def value_width(self) -> int:
        return 1

    @property
    def workspace(self) -> int:
        return 1

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return (X.mean(1) * self.tokens**0.5,)

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        return (stats[0] @ u.mT)[..., None]

    def lift(self, u: Tensor) -> Tensor:
        # The same filter at every shift, scaled to keep the norm.
        return u.repeat(1, self.tokens) * self.tokens**-0.5


@register
class FNO(Architecture):
    """The definition: hidden = circ(X) w1 (s), values = hidden."""

    name = "fno"
    options = ("grid",)
    reductions = {("linear", True): PooledLinearFNO}

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.tokens * self.features,)

    @property
    def value_width(self) -> int:
        return 1

    @property
    def _grid(self) -> tuple[int, ...]:
        return (self.tokens,) if self.grid is None else self.grid

    def _spectrum(self, tokens: Tensor) -> Tensor:
        """Real FFT over the token axis of (batch, s, d) -> (frequencies, batch, d), frequencies flattened."""
        axes = tuple(range(1, 1 + len(self._grid)))
        spectrum = torch.fft.rfftn(tokens.reshape(-1, *self._grid, tokens.shape[-1]), dim=axes)
        return spectrum.flatten(1, len(self._grid)).transpose(0, 1)

    @property
    def workspace(self) -> int:
        return 4 * self.tokens

    @property
    def u_matrix(self) -> tuple[int, int]:
        return self.tokens, self.u_shape[0] // self.tokens

    def _hidden_by_matrix(self, X: Tensor, u: Tensor) -> Tensor:
        """The same without FFT, as one product with the circulant of every filter: for exported graphs."""
        s, d = self.tokens, X.shape[-1]
        position = torch.arange(s, device=X.device).view(self._grid)
        axes = tuple(range(len(self._grid)))
        # shifted[t, q] = k such that token q is token t shifted by k: roll(X, k)[t] = X[q].
        shifted = torch.stack(
            [
                torch.roll(position.flip(axes), tuple(i + 1 for i in where), axes).flatten()
                for where in torch.cartesian_prod(*[torch.arange(n) for n in self._grid]).view(s, -1).tolist()
            ]
        )
        filters = u.reshape(-1, s, d)[:, shifted]
        return (X.flatten(1) @ filters.reshape(-1, s * d).mT).view(len(X), -1, s)

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self._hidden_by_matrix(X, u)
        filters = u.reshape(-1, self.tokens, X.shape[-1])
        # Convolution theorem: one product over channels for every frequency.
        product = self._spectrum(X) @ self._spectrum(filters).transpose(1, 2)
        half = (*self._grid[:-1], self._grid[-1] // 2 + 1)
        product = product.permute(1, 2, 0).reshape(len(X), -1, *half)
        axes = tuple(range(2, 2 + len(self._grid)))
        return torch.fft.irfftn(product, s=self._grid, dim=axes).flatten(2)

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return H[..., None]
