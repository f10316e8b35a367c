"""Fourier neural operator: f(X) = sum_j circ(X) w1_j w2_j^T, a circular convolution over tokens by FFT.

u = w1 in R^{s d}, entry k * d + a for shift k (row-major over the grid) and channel a; v = w2 in R^c.
circ(X)[t, k * d + a] = X[t - k, a] with indices modulo s, or modulo (h, w) on a grid.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from convexheads.architectures.base import Architecture, GatedVectorForm, Stats, VectorForm, register


class PooledLinearFNO(VectorForm):
    """The mean over tokens sees the sum of all shifts only: B(w, v) = s^{1/2} (xbar^T w) v^T with w in R^d."""

    name = "fno"
    options: ClassVar[tuple[str, ...]] = ("grid",)

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.features,)

    @property
    def workspace(self) -> int:
        return 1

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        return (X.mean(1) * self.tokens**0.5,)

    def lift(self, u: Tensor) -> Tensor:
        # The same filter at every shift, scaled to keep the norm.
        return u.repeat(1, self.tokens) * self.tokens**-0.5

    def reduce(self, u: Tensor) -> Tensor:
        return u.reshape(len(u), self.tokens, -1).sum(1) * self.tokens**-0.5


class PooledGatedFNO(GatedVectorForm):
    """The mean over t of M[t] X[t - k, a] is a cross-correlation of mask and tokens: one vector in R^{sd} a gate."""

    name = "fno"
    options: ClassVar[tuple[str, ...]] = ("grid",)

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.tokens * self.features,)

    @property
    def u_matrix(self) -> tuple[int, int]:
        return self.tokens, self.features

    @property
    def workspace(self) -> int:
        return self.tokens

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        assert gates is not None
        plain = FNO(self.tokens, self.features, self.outputs, True, self.grid)
        masks = plain.masks(X, gates).to(X.dtype)
        # sum_t M[t] X[t - k] has the spectrum M^ conj(X^).
        product = plain.spectrum(masks.mT)[..., :, None] * plain.spectrum(X).conj()[..., None, :]
        correlation = plain.from_spectrum(product.flatten(2)).view(X.shape[0], self.tokens, len(gates), -1)
        return (correlation.transpose(1, 2).flatten(2) / self.tokens,)


@register
class FNO(Architecture):
    """The definition: hidden = circ(X) w1 (s), values = hidden."""

    name = "fno"
    options: ClassVar[tuple[str, ...]] = ("grid",)
    reductions = {("linear", True): PooledLinearFNO, ("gated_relu", True): PooledGatedFNO}

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.tokens * self.features,)

    @property
    def value_width(self) -> int:
        return 1

    @property
    def _grid(self) -> tuple[int, ...]:
        return (self.tokens,) if self.grid is None else self.grid

    def spectrum(self, tokens: Tensor) -> Tensor:
        """Real FFT over the token axes: (batch, s, d) -> (batch, frequencies, d), frequencies flattened."""
        axes = tuple(range(1, 1 + len(self._grid)))
        return torch.fft.rfftn(tokens.reshape(-1, *self._grid, tokens.shape[-1]), dim=axes).flatten(1, len(axes))

    def from_spectrum(self, spectrum: Tensor) -> Tensor:
        """Inverse of :meth:`spectrum`: (batch, frequencies, d) -> (batch, s, d)."""
        half = (*self._grid[:-1], self._grid[-1] // 2 + 1)
        axes = tuple(range(1, 1 + len(self._grid)))
        whole = spectrum.reshape(len(spectrum), *half, spectrum.shape[-1])
        return torch.fft.irfftn(whole, s=self._grid, dim=axes).flatten(1, len(axes))

    def _shifted(self, device: torch.device) -> Tensor:
        """(s, s) indices with roll(X, k)[t] = X[shifted[t, k]], on the grid."""
        place = torch.cartesian_prod(*[torch.arange(n, device=device) for n in self._grid]).view(self.tokens, -1)
        sizes = torch.tensor(self._grid, device=device)
        moved = (place[:, None] - place[None, :]) % sizes
        strides = torch.tensor([*self._grid[1:], 1], device=device)
        return (moved * strides).sum(-1)

    def _hidden_by_matrix(self, X: Tensor, u: Tensor) -> Tensor:
        """The same without FFT, as one product with the circulant of every filter: for exported graphs."""
        s, d = self.tokens, X.shape[-1]
        # w[k] meets X[q] in output t where t - k = q, that is k = t - q.
        filters = u.reshape(-1, s, d)[:, self._shifted(X.device)]
        return (X.flatten(1) @ filters.reshape(-1, s * d).mT).view(X.shape[0], -1, s)

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self._hidden_by_matrix(X, u)
        filters = u.reshape(-1, self.tokens, X.shape[-1])
        # Convolution theorem: one product over channels for every frequency.
        product = self.spectrum(X).transpose(0, 1) @ self.spectrum(filters).permute(1, 2, 0)
        return self.from_spectrum(product.transpose(0, 1)).mT

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        return H[..., None]

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        X = stats[0]
        index = torch.arange(self.u_shape[0], device=X.device)[rows]
        k, a = index // X.shape[-1], index % X.shape[-1]
        T = X[:, self._shifted(X.device)[:, k], a]
        if gate is not None:
            T = T * stats[1][:, gate, :, None]
        return (T.mean(1) if self.pooled else T)[..., None]
