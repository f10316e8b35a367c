"""The objective's gradient with the digits of float32 from matrix products of bfloat16, by differences from a point.

Rounding the factors of a product to eight bits spoils it by a share of the product. Near an optimum that share is
larger than the gradient that is left. But iterates move little there: at a *reference* everything is computed exactly,
and elsewhere only what has changed since then, so that the share is one of the change. With T linear in u, outputs
O = T(u) v + b, residuals L, gradients dv and du of the loss, and subscript 0 for the reference,

    O - O_0     = T(u - u_0) v + T(u_0) (v - v_0) + b - b_0
    dv - dv_0   = T(u - u_0)^T L + T(u_0)^T (L - L_0)
    du - du_0   = T^*( (L - L_0) v^T + L_0 (v - v_0)^T ).

Of every product one factor is a difference. Features T(u_0) and residuals L_0 are kept; the first differences of
outputs and of residuals are sums in float32. A new reference is taken where the gradient has changed by many times what
is left of it. The solver asks for one, too, where its line search struggles: an objective by differences is off by a
share of the change, which may be more than a step gains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexheads.architectures import by_feature
from convexheads.evaluation import Evaluation, Sums
from convexheads.memory import FileRows
from convexheads.operator import split_rows
from convexheads.problem import Problem, take_rows, write_rows
from convexheads.solvers.units import Placement
from convexheads.types import Factors, Units

FAR = 4.0
"""Change of the gradient since the reference, over the gradient, from which there is a new one."""


def fits(problem: Problem, shapes: Factors, low: torch.dtype) -> bool:
    """Whether there is room for features of so many units in precision ``low``."""
    return room_for(problem, features_size(problem, shapes.units, low))


def features_size(problem: Problem, units: Sequence[Units], dtype: torch.dtype) -> int:
    """Bytes of the features of so many units of every component."""
    numbers = sum(len(u.v) * c.form.value_width for u, c in zip(units, problem.components, strict=True))
    return numbers * problem.targets[..., 0].numel() * dtype.itemsize


def kept_folder(problem: Problem, size: int) -> Path | None:
    """Where a file of ``size`` bytes of features goes, if memory is limited to fewer; None: they stay in memory."""
    if size <= problem.cache_bytes or problem.budget.limit is None:
        return None
    return problem.file_folder(size)


def room_for(problem: Problem, size: int) -> bool:
    """Whether features of ``size`` bytes take no more memory than statistics may, or go to a file."""
    return size <= problem.cache_bytes or kept_folder(problem, size) is not None


class Kept:
    """Features of all samples, in low precision and in the layout in which they come.

    In a temporary file, if there is a ``folder`` for it.
    """

    def __init__(self, n: int, like: Tensor, low: torch.dtype, folder: Path | None = None) -> None:
        self.transposed = by_feature(like)
        like = like.mT if self.transposed else like
        shape = (n, *like.shape[1:])
        self.rows: Any = FileRows(shape, low, folder) if folder else torch.empty(shape, dtype=low, device=like.device)

    def write(self, index: slice, T: Tensor) -> None:
        write_rows(self.rows, index, T.mT if self.transposed else T)

    def read(self, index: slice) -> Tensor:
        """Features of consecutive rows, no copy if they are in memory."""
        rows = self.rows[index]
        return rows.mT if self.transposed else rows

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of one sample, or of one of its tokens."""
        return math.prod(self.rows.shape[1:]) * self.rows.dtype.itemsize

    def take(self, index: Tensor) -> Tensor:
        """A copy of some samples."""
        rows = take_rows(self.rows, index)
        return rows.mT if self.transposed else rows


def kept_parts(problem: Problem, kept: Sequence[Kept], rows_each: int = 1) -> Iterator[slice]:
    """The samples in parts whose features, of ``rows_each`` tokens, are taken at once: all, if they are in memory.

    There are no temporaries but of the size of the outputs then, and one product is faster than many.
    """
    step = max(1, problem.local)
    if any(isinstance(each.rows, FileRows) for each in kept):
        sample = rows_each * sum(each.row_bytes for each in kept)
        step = max(1, problem.budget.chunk(problem.fixed_bytes) // (4 * sample))
    return split_rows(problem.local, step)


class Differences:
    """The objective and its gradient at vectors of variables.

    Parameters
    ----------
    problem : of pooled heads whose evaluation is products.
    shapes : shapes of the variables.
    low : precision of the products of differences.

    Attributes
    ----------
    exact, rough : evaluations of either kind so far.
    stale : whether the next one is exact.
    """

    def __init__(self, problem: Problem, shapes: Factors, low: torch.dtype) -> None:
        self.problem, self.shapes, self.low = problem, shapes, low
        self.exact = self.rough = 0
        self.reference: Tensor
        self.base: Tensor
        self.release()

    def extend(self, placement: Placement, shapes: Factors) -> None:
        """Go on with more units, of which ``placement`` has the old ones: at the reference the new ones are zero."""
        self.shapes = shapes
        if not self.stale:
            self.reference = placement.put(self.reference[None])[0]
            self.base = placement.put(self.base[None])[0]

    def release(self) -> None:
        """Free what is kept of the reference; the next evaluation is exact."""
        self.stale = True
        self.features: list[Kept] = []
        self.reference = self.base = self.outputs = self.residuals = torch.empty(0)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """The objective at ``x``, and its gradient."""
        problem = self.problem
        if self.stale or problem.low_stats(self.low) is None:
            self.release()
            value, gradient = problem.summed(*self._refer(x))
            self.reference, self.base = x, gradient.clone()
            self.stale, self.exact = False, self.exact + 1
            return value + problem.flat_decay(self.shapes, x, gradient), gradient
        value, change = problem.summed(*self._differ(x))
        self.rough += 1
        gradient = self.base + change
        value += problem.flat_decay(self.shapes, x, gradient)
        self.stale = float(change.norm()) > FAR * float(gradient.norm())
        return value, gradient

    def _refer(self, x: Tensor) -> tuple[float, Tensor]:
        """Loss and its gradient of the samples here at ``x``, which becomes the reference."""
        problem, factors, flat, total = self.problem, self.shapes.like(x), torch.zeros_like(x), 0.0
        evaluation = Evaluation(problem, factors, self.shapes.like(flat), by_units=True)
        kept: list[Kept] = []
        folder = kept_folder(problem, features_size(problem, self.shapes.units, self.low))
        self.outputs = torch.empty(problem.targets.shape, dtype=x.dtype, device=x.device)
        self.residuals = torch.empty_like(self.outputs)
        for index, stats in problem.chunks(x.dtype, max(1, factors.n_units)):

            def keep(features: list[Tensor], O: Tensor, L: Tensor, index: slice = index) -> None:
                if not kept:
                    kept.extend(Kept(problem.local, T, self.low, folder) for T in features)
                for each, T in zip(kept, features, strict=True):
                    each.write(index, T)
                self.outputs[index], self.residuals[index] = O, L

            total += evaluation.add(stats, *problem.targets_of(index, x.dtype), keep)
        evaluation.close()
        self.features = kept
        return total, flat

    def _differ(self, x: Tensor) -> tuple[float, Tensor]:
        """Loss of the samples here at ``x``, and the change of its gradient since the reference."""
        problem, low, flat = self.problem, self.low, torch.zeros_like(x)
        change, sums, total = self.shapes.like(flat), Sums(), 0.0
        moved = self.shapes.like(x - self.reference)
        steps = [units.to(low) for units in moved.units]
        values = [units.v.to(low) for units in self.shapes.like(x).units]
        both = [torch.cat([v, step.v], 2) for v, step in zip(values, steps, strict=True)]
        # Units that have come since the reference follow those that there are features of, and were zero.
        parts_kept = list(kept_parts(problem, self.features))
        O = self.outputs.clone() if moved.intercept is None else self.outputs + moved.intercept
        for index in problem.budget.passing(parts_kept):
            for component, each, step in zip(problem.components, self.features, steps, strict=True):
                T_0 = each.read(index)
                O[index, component.outputs] += component.forward(T_0, step.v[: T_0.shape[1]])
        moves = torch.empty(O.shape, dtype=low, device=O.device)
        for index, stats in problem.chunks(low, max(1, moved.n_units)):
            targets, weights = problem.targets_of(index, x.dtype)
            own, L_0 = O[index], self.residuals[index]
            parts = [
                component.features_and_pullback(each, step)
                for component, each, step in zip(problem.components, stats, steps, strict=True)
            ]
            for component, (T, pull), v in zip(problem.components, parts, values, strict=True):
                if pull is not None:
                    own[:, component.outputs] += component.forward(T, v)
            loss, L = problem.own_loss.value_and_gradient(own, targets, weights)
            total += loss
            difference = L - L_0
            if change.intercept is not None:
                change.intercept += difference.sum(0)
            moves[index] = difference
            L, both_L = L.to(low), (moves[index], L_0.to(low))
            for component, v, (T, pull), g in zip(problem.components, both, parts, change.units, strict=True):
                if pull is None or g.u is None:
                    continue
                sums.add(g.v, component.adjoint_v(T, L[:, component.outputs]))
                cotangent = torch.cat([each[:, component.outputs] for each in both_L], 1)
                sums.add(g.u, pull(component.adjoint_features(T, v, cotangent)))
        for index in problem.budget.passing(parts_kept):
            for component, each, g in zip(problem.components, self.features, change.units, strict=True):
                T_0 = each.read(index)
                sums.add(g.v[: T_0.shape[1]], component.adjoint_v(T_0, moves[index, component.outputs]))
        sums.close()
        return total, flat
