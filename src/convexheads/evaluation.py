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
from typing import TYPE_CHECKING

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
BLOCK_GAIN = 1.5
"""Multiplications by whole blocks, one large product a chunk, that take as long as one by units."""
BLOCK_NUMBERS = 2**21
"""Numbers of statistics in a chunk for whole blocks, at most: they are read twice, the second time from the cache."""
BLOCK_SHAPES = 3
"""Shapes of the products that a component takes by its whole block."""

Part = tuple[Tensor, Pullback | None]
"""Unit features of a component on a chunk, and the map from a cotangent of them to that of u."""


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


def by_block(component: Component, units: Units, gain: float = BLOCK_GAIN) -> bool:
    """Whether a component's block as a whole is cheaper than its units, of which there are so many."""
    if units.u is None or component.gates is not None:
        return False
    return component.form.block_work <= gain * len(units.v) * component.gradient_work


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
        self.units = factors.units if low is None else [units.to(low) for units in factors.units]
        self.weights: list[Tensor | None] = [
            None if by_units or not by_block(component, units) else self._block_weights(component, units)
            for component, units in zip(problem.components, factors.units, strict=True)
        ]
        self.totals: list[Tensor | None] = [None] * len(self.weights)
        self.sums = Sums()

    def _block_weights(self, component: Component, units: Units) -> Tensor:
        assert units.u is not None
        Z = units.u.flatten(1).mT @ units.v.flatten(1)
        weights = component.form.block_weights(Z.view(component.p, component.form.value_width, component.width))
        return weights if self.low is None else weights.to(self.low)

    @property
    def whole(self) -> bool:
        """Whether every component takes its block as a whole."""
        return all(weights is not None for weights in self.weights)

    @property
    def n_units(self) -> int:
        """Units whose features take as much room for a sample as all temporaries of the pass."""
        # What blocks hold is counted in full, features once of several times that they are held.
        largest = max(component.form.workspace for component in self.problem.components)
        units, numbers = 0, 0.0
        for component, own, weights in zip(self.problem.components, self.units, self.weights, strict=True):
            if weights is None:
                units += len(own.v)
            else:
                numbers += component.form.block_workspace
        return max(1, units + math.ceil(numbers / (ALIVE * largest)))

    def rows(self, dtype: torch.dtype, cached: bool = True) -> int:
        """Samples a chunk, whose statistics in ``dtype`` are read or computed."""
        rows = self.problem.pass_rows(dtype, self.n_units, cached)
        if all(weights is None for weights in self.weights):
            return rows
        # Blocks of memory that the system maps anew each time would take longer than the products.
        most = min(4 * BLOCK_NUMBERS, self.problem.budget.lasting - 1)
        return max(1, min(rows, most // self.problem.stats_bytes))

    def products(self, rows: int | None = None, learns: bool = True) -> Callable[[int], AbstractContextManager[None]]:
        """What products of chunks, given their numbers of samples, are taken in where memory is limited.

        ``rows`` : samples of a whole chunk. Where it is not in use ``learns`` says whether evaluations like this one
        are worth what is kept of their products.
        """
        problem = self.problem
        if not self.whole:
            shapes = {} if learns else {"shapes": 0}
            return problem.repeated_products(self.factors, rows, **shapes)
        most = problem.budget.kernels(problem.fixed_bytes)
        dtype = self.factors.tensors()[0].dtype
        if not most or dtype != torch.float32 or self.low is not None or problem.device.type != "cpu":
            return lambda count: nullcontext()
        forms = tuple((c.form.name, c.form.u_shape, c.q) for c in problem.components)
        shapes_each = BLOCK_SHAPES * len(forms)
        return lambda count: products.repeated_products(("blocks", count, forms), shapes_each, most)

    def outputs(self, stats: Sequence[Stats], rows_shape: torch.Size) -> Tensor:
        """Outputs of a chunk of samples: (*rows_shape, c)."""
        return self._forward(stats, rows_shape, [None] * len(self.weights))

    def _forward(self, stats: Sequence[Stats], rows_shape: torch.Size, parts: Sequence[Part | None]) -> Tensor:
        """The same; ``parts`` are those of components by their units, where they are at hand."""
        problem = self.problem
        found: list[Tensor] = []
        for component, each, units, weights, part in zip(
            problem.components, stats, self.units, self.weights, parts, strict=True
        ):
            if weights is not None:
                found.append(component.form.block_outputs(each, weights))
            else:
                T = component.features(each, units) if part is None else part[0]
                found.append(component.forward(T, units.v))
        return problem.assemble(found, self.factors.intercept, rows_shape)

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
        O = self._forward(stats, targets.shape[:-1], parts)
        loss, L = self.problem.own_loss.value_and_gradient(O, targets, weights)
        if keep is not None:
            keep([part[0] for part in parts if part is not None], O, L)
        self.pull(stats, parts, L.reshape(-1, self.problem.outputs))
        return loss

    def parts(self, stats: Sequence[Stats]) -> list[Part | None]:
        """What a chunk's gradient takes of the components by their units; None for the others."""
        assert self.into is not None
        found: list[Part | None] = []
        for component, each, units, weights, into in zip(
            self.problem.components, stats, self.units, self.weights, self.into.units, strict=True
        ):
            if weights is not None:
                found.append(None)
            elif into.u is None:
                found.append((component.features(each, units), None))
            else:
                found.append(component.features_and_pullback(each, units))
        return found

    def pull(self, stats: Sequence[Stats], parts: Sequence[Part | None], L: Tensor) -> None:
        """Take the adjoint at rows L (rows, c) of a chunk."""
        assert self.into is not None
        if self.into.intercept is not None:
            self.into.intercept += L.sum(0)
        L = L if self.low is None else L.to(self.low)
        for k, (component, each, units, part, into) in enumerate(
            zip(self.problem.components, stats, self.units, parts, self.into.units, strict=True)
        ):
            own = L[:, component.outputs]
            if part is not None:
                pull_units(component, units, *part, own, into, self.sums)
                continue
            form, every, total = component.form, slice(0, component.p), self.totals[k]
            if self.low is None:
                self.totals[k] = form.distinct_adjoint(each, own, None, every, total)
            else:
                # Sums of many chunks take more digits than products.
                found = form.distinct_adjoint(each, own, None, every, None).to(self.factors.tensors()[0].dtype)
                self.totals[k] = found if total is None else total.add_(found)

    def close(self) -> None:
        """The pass is over: gradients are added to where they are asked for."""
        assert self.into is not None
        self.sums.close()
        for component, units, into, total in zip(
            self.problem.components, self.factors.units, self.into.units, self.totals, strict=True
        ):
            if total is None or units.u is None:
                continue
            gamma = component.form.spread(total).reshape(component.p, component.q)
            into.v.flatten(1).addmm_(units.u.flatten(1), gamma)
            if into.u is not None:
                into.u.flatten(1).addmm_(units.v.flatten(1), gamma.mT)
        self.totals = [None] * len(self.totals)


def pull_units(
    component: Component, units: Units, T: Tensor, pull: Pullback | None, L: Tensor, into: Units, sums: Sums
) -> None:
    """Add the adjoint of one component at rows L of its outputs, applied to both factors of its units."""
    sums.add(into.v, component.adjoint_v(T, L))
    if pull is not None and into.u is not None:
        sums.add(into.u, pull(component.adjoint_features(T, units.v, L)))
