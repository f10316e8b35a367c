"""A Newton step along the singular pairs that keep a dual point from being feasible.

The gap is of first order in the distance from an optimum, the objective of second: late in a solve a few singular
values of A_g^* L lie above beta w, for which the whole dual point is scaled down, while the objective has next to
nothing left to gain. With the singular vectors U and V of a block that lie above, Z + U^T S V brings these values back
to beta w, to first order, if

    <A(U^T D V), H A(U^T S V)> = <D, beta w I - diag(sigma)>   for every D,

with H the Hessian of the loss and the intercept eliminated. There are few numbers in S: they are solved for by
conjugate gradients, at the features of a few vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convexheads.problem import Problem
from convexheads.solvers.units import canonical, join_units, pair_units
from convexheads.subspace import SingularPair
from convexheads.types import Factors, Units

MOST_PAIRS = 48
"""Pairs of all blocks at most: those furthest above beta w."""
STEPS, ACCURACY = 20, 0.1
"""Conjugate gradients at most, and the share of the excess above beta w that they may leave."""


class Correction:
    """The equations at outputs ``O`` of a head, for the singular ``pairs`` of A_g^* L there that lie above beta w.

    Variables are the entries of S, of every component as one matrix that is zero between pairs of different gates.
    """

    def __init__(self, problem: Problem, O: Tensor, pairs: list[SingularPair]) -> None:
        self.problem, self.O = problem, O
        weights = [problem.penalty_weight(component) for component in problem.components]
        pairs = sorted(pairs, key=lambda pair: -pair.sigma / weights[pair.component])[:MOST_PAIRS]
        self.units: list[Units] = []
        self.excess: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        for k, component in enumerate(problem.components):
            own = [pair for pair in pairs if pair.component == k]
            units = pair_units(component, own, O)
            self.units.append(units)
            self.excess.append(O.new_tensor([pair.sigma - weights[k] for pair in own]).diag())
            self.masks.append(None if units.gate is None else units.gate[:, None] == units.gate)
        self.sizes = [len(E) ** 2 for E in self.excess]
        numbers = sum(len(E) * c.form.value_width for E, c in zip(self.excess, problem.components, strict=True))
        size = numbers * problem.targets[..., 0].numel() * O.dtype.itemsize
        self.kept: list[tuple[slice, list[Tensor]]] | None = None
        if problem.world.every(problem.budget.roomy and problem.has_room(size)):
            self.kept = list(self._features())
        self.inverse = O.new_zeros(0, 0)
        if problem.fit_intercept:
            hessian = problem.own_loss.mean_hessian(O, *problem.targets_of(slice(0, problem.n), O.dtype))
            self.inverse = torch.linalg.pinv(problem.world.sum(hessian), hermitian=True, rtol=1e-5)

    def _features(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """The features of all pairs' left vectors, chunk by chunk."""
        for index, stats in self.problem.chunks(self.O.dtype, max(1, sum(map(len, self.excess)))):
            yield index, [c.features(s, u) for c, s, u in zip(self.problem.components, stats, self.units, strict=True)]

    @property
    def features(self) -> Iterator[tuple[slice, list[Tensor]]]:
        return self._features() if self.kept is None else iter(self.kept)

    def step(self, y: Tensor) -> Factors:
        """Units whose outputs are those of the step, the left vectors with S V beside them, and its intercept."""
        *parts, b = y.split([*self.sizes, len(self.inverse)])
        units = [
            Units(own.u, (S.view_as(E) @ own.v.flatten(1)).view_as(own.v) if len(E) else own.v, own.gate)
            for S, E, own in zip(parts, self.excess, self.units, strict=True)
        ]
        return Factors(units, b if self.problem.fit_intercept else None)

    def apply(self, y: Tensor) -> Tensor:
        """The left-hand side of the equations, for the intercept, too; in one pass over the features."""
        problem = self.problem
        step = self.step(y)
        total: list[Tensor] = []
        for index, features in self.features:
            O, (targets, weights) = self.O[index], problem.targets_of(index, self.O.dtype)
            M = problem.combine(step, features, O.shape[:-1])
            H = problem.own_loss.hessian_product(O, targets, weights, M).reshape(-1, problem.outputs)
            parts = [
                component.adjoint_v(T, H[:, component.outputs]).flatten(1) @ units.v.flatten(1).mT
                for component, T, units in zip(problem.components, features, self.units, strict=True)
            ]
            parts.append(H.sum(0)[: len(self.inverse)])
            total = [old + new for old, new in zip(total, parts, strict=True)] if total else parts
        *blocks, slope = total
        masked = [F if mask is None else F * mask for F, mask in zip(blocks, self.masks, strict=True)]
        return problem.world.sum(torch.cat([*(F.flatten() for F in masked), slope]))

    def solve(self) -> Tensor:
        """The entries of S and the step of the intercept, by preconditioned conjugate gradients.

        The intercept has the inverse of its own block, S a multiple of the identity, for which the first direction
        tells how stiff it is.
        """
        residual = torch.cat([*(-E.flatten() for E in self.excess), self.O.new_zeros(len(self.inverse))])
        y, direction = torch.zeros_like(residual), residual
        image = self.apply(direction)
        size, curvature = float(residual @ residual), float(direction @ image)
        if not curvature > 0.0:
            return y
        scale = size / curvature
        size, direction, image = scale * size, scale * direction, scale * image
        curvature *= scale * scale
        enough = ACCURACY**2 * size
        for _ in range(STEPS):
            t = size / curvature
            y, residual = y + t * direction, residual - t * image
            inner, outer = residual.split([sum(self.sizes), len(self.inverse)])
            turned = torch.cat([scale * inner, self.inverse @ outer])
            before, size = size, float(residual @ turned)
            if not size > enough:
                break
            direction = turned + (size / before) * direction
            image = self.apply(direction)
            curvature = float(direction @ image)
            if not curvature > 0.0:
                break
        return y


def corrected(problem: Problem, factors: Factors, O: Tensor, pairs: list[SingularPair], drop: float = 0.0) -> Factors:
    """``factors`` after the step: balanced units, a few more of them, in float64.

    ``pairs`` are those of A_g^* L above beta w at the outputs ``O`` of the factors. The smallest units are left out
    where that costs the objective no more than ``drop``.
    """
    equations = Correction(problem, O.to(problem.dtype), pairs)
    step, whole = equations.step(equations.solve()).to(torch.float64), factors.to(torch.float64)
    units = [
        old if old.u is None or not len(new.v) else join_units(old, new)
        for old, new in zip(whole.units, step.units, strict=True)
    ]
    b = None if whole.intercept is None or step.intercept is None else whole.intercept + step.intercept
    return canonical(problem, Factors(units, b), drop)[0]
