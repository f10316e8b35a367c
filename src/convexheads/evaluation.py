"""Outputs, loss and gradient of a head at some factors, chunk by chunk of samples.

Each component takes the cheaper of two ways. By its units: the features T_i(u_j) of every sample and unit, and a
cotangent of the same size on the way back. Or by its block Z = sum_j u_j v_j^T as a whole, in which outputs are linear:
A(Z) and Gamma = A^* L are one large product a chunk each, however many units there are, and the gradients in u_j and
v_j follow from Gamma v_j and Gamma^T u_j when the pass is over. Where outputs are few that takes fewer
multiplications, and hardly any memory a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convexheads import products
from convexheads.architectures import Pullback, Stats
from convexheads.operator import Component
from convexheads.types import Factors, Units

if TYPE_CHECKING:
    from convexheads.problem import Problem

ALIVE = 5
"""Temporaries of a chunk of samples that are held at once, of the size of all units' features."""
BLOCK_GAIN, LOW_GAIN = 1.5, 0.4
"""Multiplications by whole blocks, one large product a chunk, that take as long as one by units; the second one where
factors of the units' products may be rounded."""
BLOCK_NUMBERS = 2**21
"""Numbers of statistics in a chunk for whole blocks, at most: they are read twice, the second time from the cache."""
BLOCK_SHAPES, UNIT_SHAPES = 3, 7
"""Shapes of the products that a component takes by its whole block, or by its units."""


class Sums:
    """Sums of what the chunks of a pass add to the same tensors, in the layout in which products leave it.

    To turn every part over and write it to where it belongs takes up to a tenth of an evaluation.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.Size], tuple[Tensor, Tensor, bool]] = {}

    def add(self, into: Tensor, part: Tensor) -> None:
        """Add ``part``, of any precision, to ``into`` as soon as the pass is over."""
        key = into.data_ptr(), into.shape
        if key not in self._held:
            # It may be a view of what others hold: only sums are written to.
            self._held[key] = into, part, False
            return
        _, total, own = self._held[key]
        if own:
            total += part
        else:
            self._held[key] = into, total.to(into.dtype) + part, True

    def close(self) -> None:
        """The pass is over."""
        for into, total, _ in self._held.values():
            into += total
        self._held.clear()


def by_block(component: Component, units: Units, gain: float) -> bool:
    """Whether a component's block as a whole is cheaper than its units; ``gain`` such products take as long as one."""
    if units.u is None or component.gates is not None:
        return False
    return component.form.block_work <= gain * len(units.v) * component.gradient_work


class _ByUnits:
    """A component by its units; its part of a chunk is their features and the map from a cotangent of them to u's."""

    def __init__(self, component: Component, units: Units, into: Units | None, sums: Sums) -> None:
        self.component, self.units, self.into, self.sums = component, units, into, sums

    def part(self, stats: Stats) -> tuple[Tensor, Pullback | None]:
        if self.into is None or self.into.u is None:
            return self.component.features(stats, self.units), None
        return self.component.features_and_pullback(stats, self.units)

    def outputs(self, part: tuple[Tensor, Pullback | None]) -> Tensor:
        return self.component.forward(part[0], self.units.v)

    def pull(self, part: tuple[Tensor, Pullback | None], L: Tensor) -> None:
        assert self.into is not None
        pull_units(self.component, self.units, *part, L, self.into, self.sums)

    def close(self) -> None:
        """Sums are closed together."""


class _ByBlock:
    """A component by its block as a whole; its part of a chunk is what that takes of the statistics."""

    def __init__(self, component: Component, units: Units, into: Units | None, low: torch.dtype | None) -> None:
        assert units.u is not None
        self.component, self.units, self.into, self.low = component, units, into, low
        self.form = component.form
        # Before the chunks: made among the first one's temporaries, it would keep their pages resident.
        Z = units.u.flatten(1).mT @ units.v.flatten(1)
        weights = self.form.block_weights(Z.view(component.p, self.form.value_width, component.width))
        self.weights = weights if low is None else weights.to(low)
        self.total: Tensor | None = None

    def part(self, stats: Stats) -> Stats:
        return self.form.block_stats(stats)

    def outputs(self, part: Stats) -> Tensor:
        return self.form.block_outputs(part, self.weights)

    def pull(self, part: Stats, L: Tensor) -> None:
        if self.low is None:
            self.total = self.form.block_adjoint(part, L, self.total)
        else:
            # Sums of many chunks take more digits than products.
            found = self.form.block_adjoint(part, L, None).to(self.units.v.dtype)
            self.total = found if self.total is None else self.total.add_(found)

    def close(self) -> None:
        into, u = self.into, self.units.u
        if self.total is None or into is None or u is None:
            return
        gamma = self.form.spread(self.total).reshape(self.component.p, self.component.q)
        into.v += (u.flatten(1) @ gamma).view_as(into.v)
        if into.u is not None:
            into.u += (self.units.v.flatten(1) @ gamma.mT).view_as(into.u)
        self.total = None


class Evaluation:
    """A pass over chunks of samples at some factors.

    Parameters
    ----------
    problem, factors : what is evaluated, and where.
    into : factors that gradients of the loss are added to when the pass is over; None: outputs are all that is asked
        for. Units without u get those in v only.
    low : precision of the statistics and of the factors of products; sums are in that of ``factors``.
    by_units : whether every component takes the way by its units.
    """

    def __init__(
        self,
        problem: Problem,
        factors: Factors,
        into: Factors | None = None,
        low: torch.dtype | None = None,
        by_units: bool = False,
    ) -> None:
        self.problem, self.factors, self.into, self.low = problem, factors, into, low
        self.sums = Sums()
        wanted: list[Units | None] = [None] * len(factors.units) if into is None else list(into.units)
        self.ways: list[_ByUnits | _ByBlock] = []
        for component, units, own in zip(problem.components, factors.units, wanted, strict=True):
            if by_units or not by_block(component, units, BLOCK_GAIN if low is None else LOW_GAIN):
                self.ways.append(_ByUnits(component, units if low is None else units.to(low), own, self.sums))
            else:
                self.ways.append(_ByBlock(component, units, own, low))

    @property
    def whole(self) -> bool:
        """Whether every component that has units takes its block as a whole."""
        return all(isinstance(way, _ByBlock) or not len(way.units.v) for way in self.ways)

    def rows(self, dtype: torch.dtype, cached: bool = True) -> int:
        """Samples a chunk, whose statistics in ``dtype`` are read or computed."""
        problem = self.problem
        blocks = [way.form.block_workspace for way in self.ways if isinstance(way, _ByBlock)]
        units = sum(len(way.units.v) for way in self.ways if isinstance(way, _ByUnits))
        # What blocks hold is counted in full, features once of several times that they are held.
        largest = max(component.form.workspace for component in problem.components)
        rows = problem.pass_rows(dtype, max(1, units + math.ceil(sum(blocks) / (ALIVE * largest))), cached)
        if not blocks or problem.device.type != "cpu":
            return rows
        most = min(4 * BLOCK_NUMBERS, 2 * problem.budget.lasting)
        return max(1, min(rows, most // problem.stats_bytes))

    def products(self, rows: int, learns: bool = True) -> Callable[[int], AbstractContextManager[None]]:
        """What products of chunks, given their numbers of samples, are taken in where memory is limited.

        Those of the units of whole chunks, of ``rows`` samples, are of the same shapes whenever there are as many
        units; those of whole blocks whenever a chunk is as large. ``learns`` says whether evaluations like this one
        are worth what is kept of their products, if these go by units and are not in use yet.
        """
        problem = self.problem
        most = problem.budget.kernels(problem.fixed_bytes)
        float32 = self.factors.tensors()[0].dtype == torch.float32
        if not most or not (self.whole or problem.wide_products) or not float32 or problem.device.type != "cpu":
            return lambda count: nullcontext()
        parts = zip(problem.components, self.factors.units, strict=True)
        key = tuple((c.form.name, c.form.u_shape, c.q, None if self.whole else len(own.v)) for c, own in parts)
        each = BLOCK_SHAPES if self.whole else UNIT_SHAPES if learns else 0

        def of(count: int) -> AbstractContextManager[None]:
            if count != rows and not self.whole:
                return nullcontext()
            return products.repeated_products((count, key), each * len(key), most)

        return of

    def parts(self, stats: Sequence[Stats]) -> list[Any]:
        """What every component takes of a chunk of samples."""
        return [way.part(each) for way, each in zip(self.ways, stats, strict=True)]

    def outputs(self, parts: Sequence[Any], rows_shape: torch.Size) -> Tensor:
        """Outputs of a chunk of samples: (*rows_shape, c)."""
        found = [way.outputs(part) for way, part in zip(self.ways, parts, strict=True)]
        return self.problem.assemble(found, self.factors.intercept, rows_shape)

    def pull(self, parts: Sequence[Any], L: Tensor) -> None:
        """Take the adjoint at rows L (rows, c) of a chunk."""
        assert self.into is not None
        if self.into.intercept is not None:
            self.into.intercept += L.sum(0)
        L = L if self.low is None else L.to(self.low)
        for component, way, part in zip(self.problem.components, self.ways, parts, strict=True):
            way.pull(part, L[:, component.outputs])

    def add(
        self,
        stats: Sequence[Stats],
        targets: Tensor,
        weights: Tensor,
        keep: Callable[[list[Tensor], Tensor, Tensor], None] | None = None,
    ) -> float:
        """Take the gradient of the loss of a chunk of samples; returns their loss.

        ``keep`` is shown the unit features of every component, where all go by their units, the outputs, and the
        gradient of the loss with respect to these.
        """
        parts = self.parts(stats)
        O = self.outputs(parts, targets.shape[:-1])
        loss, L = self.problem.own_loss.value_and_gradient(O, targets, weights)
        if keep is not None:
            keep([T for T, _ in parts], O, L)
        self.pull(parts, L.reshape(-1, self.problem.outputs))
        return loss

    def close(self) -> None:
        """The pass is over: gradients are added to where they are asked for."""
        self.sums.close()
        for way in self.ways:
            way.close()


def pull_units(
    component: Component, units: Units, T: Tensor, pull: Pullback | None, L: Tensor, into: Units, sums: Sums
) -> None:
    """Add the adjoint of one component at rows L of its outputs, applied to both factors of its units."""
    sums.add(into.v, component.adjoint_v(T, L))
    if pull is not None and into.u is not None:
        sums.add(into.u, pull(component.adjoint_features(T, units.v, L)))
