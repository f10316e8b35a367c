"""One component of a head, bound to its gates: factors and tokens -> outputs and adjoints.

A component is one channel group of one branch; its blocks Z_g are one a gate. With T(u) the unit features
(linear in u) the component computes A(Z) = sum_j T(u_j) v_j, and its adjoint at a dual point L is, block by block,
Gamma_g = A_g^* L in R^{p x q}, Gamma_g[e, (l, b)] = sum_i T_i(e)[l] L_i[b].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from convexheads.architectures import Architecture, Pullback, Stats, by_feature
from convexheads.products import aligned_product, narrow_product
from convexheads.types import BlockShape, Units

WORTH_TURNING, WIDER = 2**14, 4
"""A cotangent of so many numbers is copied to be the first factor of a product with so many times as many."""


@dataclass
class Component:
    """A channel group of a branch.

    ``form`` evaluates the unit features; ``gates`` (P, *u_shape) or None; ``inputs`` and ``outputs`` are the slices
    of channels read and outputs written; ``weight`` multiplies beta; ``head`` names the branch's head.
    """

    branch: int
    group: int
    form: Architecture
    gates: Tensor | None
    inputs: slice
    outputs: slice
    weight: float = 1.0
    head: str = ""

    @property
    def ridge(self) -> bool:
        return self.form.ridge

    @property
    def n_gates(self) -> int:
        return 1 if self.gates is None else len(self.gates)

    @property
    def width(self) -> int:
        """Number of outputs written."""
        return self.outputs.stop - self.outputs.start

    @property
    def p(self) -> int:
        return prod(self.form.u_shape)

    @property
    def q(self) -> int:
        return self.form.value_width * self.width

    @property
    def gradient_work(self) -> int:
        """Multiplications a sample and unit that the objective's gradient takes, about."""
        return 3 * self.form.unit_work + 6 * self.q

    def to(self, device: torch.device) -> Component:
        """This component with its gates on a device."""
        return self if self.gates is None else replace(self, gates=self.gates.to(device))

    def only_gate(self, gate: int | None) -> Component:
        """This component with a single one of its gates."""
        if gate is None or self.gates is None:
            return self
        return replace(self, gates=self.gates[gate : gate + 1])

    def blocks(self) -> list[BlockShape]:
        gates: list[int | None] = [None] if self.gates is None else list(range(len(self.gates)))
        return [BlockShape(self.branch, self.head or self.form.name, self.group, g, self.p, self.q) for g in gates]

    def stats(self, X: Tensor, dtype: torch.dtype) -> Stats:
        """What the form keeps of tokens X (n, s, d); floating-point parts in ``dtype``.

        Masks are taken in float64 from the tokens as given; see :meth:`Architecture.masks`.
        """
        return self.form.prepare(X[..., self.inputs].to(dtype), self.gates)

    def features(self, stats: Stats, units: Units) -> Tensor:
        """T(u): (rows, m, k), with samples and output tokens flattened into rows."""
        if not len(units.v):
            rows = len(stats[0]) * (1 if self.form.pooled else self.form.tokens)
            return units.v.new_zeros(rows, 0, self.form.value_width)
        T = self.form.unit_features(stats, units.u, units.gate)  # type: ignore[arg-type]
        return T.reshape(-1, *T.shape[-2:])

    def features_and_pullback(self, stats: Stats, units: Units) -> tuple[Tensor, Pullback | None]:
        """:meth:`features`, and the map from a cotangent of them to that of u; None where there is no u."""
        if units.u is None or not len(units.v):
            return self.features(stats, units), None
        T, pull = self.form.features_and_pullback(stats, units.u, units.gate)
        return T.reshape(-1, *T.shape[-2:]), lambda cotangent: pull(cotangent.reshape(T.shape))

    def adjoint_u(self, stats: Stats, units: Units, L: Tensor) -> Tensor:
        """Gradient of <L, A> with respect to u, at the units' v: of their shape (m, *u_shape)."""
        assert units.u is not None
        T: Tensor | None = None
        pull = self.form.pullback(stats, units.u, units.gate)
        if pull is None:
            T, pull = self.features_and_pullback(stats, units)
            assert pull is not None
        return pull(self.adjoint_features(T, units.v, L))

    def forward(self, T: Tensor, v: Tensor) -> Tensor:
        """sum_j T(u_j) v_j: (rows, c) of this component's outputs."""
        if by_feature(T):
            return narrow_product(T.mT.flatten(1), v.transpose(0, 1).flatten(0, 1))
        return narrow_product(T.flatten(1), v.flatten(0, 1))

    def adjoint_v(self, T: Tensor, L: Tensor) -> Tensor:
        """Gradient of <L, A> with respect to v: (m, k, c)."""
        # L first: libraries copy a transposed first factor, and L is the smaller one. Their own copies take longer.
        worth = L.numel() >= WORTH_TURNING and T.numel() >= WIDER * L.numel()
        turned = L.mT.contiguous() if worth else L.mT
        if by_feature(T):
            return (turned @ T.mT.flatten(1)).mT.view(T.shape[2], T.shape[1], L.shape[1]).transpose(0, 1)
        return (turned @ T.flatten(1)).mT.view(T.shape[1], T.shape[2], L.shape[1])

    def adjoint_features(self, T: Tensor | None, v: Tensor, L: Tensor) -> Tensor:
        """Gradient of <L, A> with respect to the features T: (rows, m, k), in the layout of T if it is at hand."""
        product = aligned_product if self.form.spaced_cotangents else torch.matmul
        if T is not None and by_feature(T):
            return product(L, v.transpose(0, 1).flatten(0, 1).mT).view(len(L), v.shape[1], v.shape[0]).mT
        return product(L, v.flatten(0, 1).mT).view(len(L), v.shape[0], v.shape[1])


def split_rows(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover range(total)."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
