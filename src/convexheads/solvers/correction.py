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

from convexheads.architectures import Stats
from convexheads.problem import Problem
from convexheads.solvers.differences import room_for
from convexheads.solvers.units import canonical, join_units
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
            shape = (component.form.value_width, component.width)
            sides = [[pair.u for pair in own], [pair.v for pair in own]]
            u, v = (torch.stack(side).to(O.dtype) if own else O.new_zeros(0, 1) for side in sides)
            gate = mask = None
            if component.gates is not None:
                gate = torch.tensor([pair.gate for pair in own], dtype=torch.long, device=problem.device)
                mask = gate[:, None] == gate
            u_part = None if component.ridge else u.reshape(-1, *component.form.u_shape)
            self.units.append(Units(u_part, v.reshape(-1, *shape), gate))
            self.excess.append(O.new_tensor([pair.sigma - weights[k] for pair in own]).diag())
            self.masks.append(mask)
        self.targets, self.weights = problem.targets_of(slice(0, problem.n), O.dtype)
        self.sizes = [len(E) ** 2 for E in self.excess]
        numbers = sum(len(E) * c.form.value_width for E, c in zip(self.excess, problem.components, strict=True))
        size = numbers * problem.targets[..., 0].numel() * O.dtype.itemsize
        self.kept: list[tuple[slice, list[Tensor]]] | None = None
        if problem.world.every(problem.budget.roomy and room_for(problem, size)):
            self.kept = list(self._features())
        self.inverse: Tensor | None = None
        if problem.fit_intercept:
            hessian = problem.world.sum(problem.own_loss.mean_hessian(O, self.targets, self.weights))
            self.inverse = torch.linalg.pinv(hessian, hermitian=True, rtol=1e-6)

    def _features(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """The features of all pairs' left vectors, chunk by chunk."""

        def of(stats: list[Stats]) -> list[Tensor]:
            return [c.features(s, u) for c, s, u in zip(self.problem.components, stats, self.units, strict=True)]

        for index, stats in self.problem.chunks(self.O.dtype, max(1, sum(map(len, self.excess)))):
            yield index, of(stats)

    @property
    def features(self) -> Iterator[tuple[slice, list[Tensor]]]:
        return self._features() if self.kept is None else iter(self.kept)

    def _matrices(self, x: Tensor) -> list[Tensor]:
        """S of every component."""
        parts = zip(x.split(self.sizes), self.excess, strict=True)
        return [part.view_as(E) for part, E in parts]

    def values(self, x: Tensor) -> list[Units]:
        """Units whose outputs are those of the step: the left vectors, with S V beside them."""
        moved = [
            (S @ units.v.flatten(1)).view_as(units.v) if len(S) else units.v
            for S, units in zip(self._matrices(x), self.units, strict=True)
        ]
        return [Units(units.u, v, units.gate) for units, v in zip(self.units, moved, strict=True)]

    def curved(self, M: Tensor) -> Tensor:
        """H M, for outputs M without the intercept's part."""
        return self.problem.own_loss.hessian_product(self.O, self.targets, self.weights, M)

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the step adds to the outputs, and to the intercept, which gives way to it."""
        step = Factors(self.values(x), None)
        parts = [self.problem.combine(step, T, self.O[index].shape[:-1]) for index, T in self.features]
        M = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.inverse is None:
            return M, None
        slope = self.problem.world.sum(self.curved(M).reshape(-1, self.problem.outputs).sum(0))
        b = -(self.inverse @ slope)
        return M + b, b

    def apply(self, x: Tensor) -> Tensor:
        """The left-hand side of the equations."""
        H = self.curved(self.moved(x)[0])
        found: list[Tensor] | None = None
        for index, features in self.features:
            rows = H[index].reshape(-1, self.problem.outputs)
            parts = [
                (component.adjoint_v(T, rows[:, component.outputs]).flatten(1) @ units.v.flatten(1).mT)
                for component, T, units in zip(self.problem.components, features, self.units, strict=True)
            ]
            found = parts if found is None else [a + b for a, b in zip(found, parts, strict=True)]
        assert found is not None
        found = self.problem.world.sum_all(found)
        masked = [F if mask is None else F * mask for F, mask in zip(found, self.masks, strict=True)]
        return torch.cat([F.flatten() for F in masked])

    def solve(self) -> Tensor:
        """The entries of S, by conjugate gradients."""
        residual = -torch.cat([E.flatten() for E in self.excess])
        x, direction = torch.zeros_like(residual), residual
        size = first = float(residual @ residual)
        for _ in range(STEPS):
            image = self.apply(direction)
            curvature = float(direction @ image)
            if not curvature > 0.0:
                break
            t = size / curvature
            x = x + t * direction
            residual = residual - t * image
            before, size = size, float(residual @ residual)
            if not size > ACCURACY**2 * first:
                break
            direction = residual + (size / before) * direction
        return x


def corrected(problem: Problem, factors: Factors, O: Tensor, pairs: list[SingularPair]) -> Factors:
    """``factors`` after the step: balanced units, a few more of them, in float64.

    ``pairs`` are those of A_g^* L above beta w at the outputs ``O`` of the factors.
    """
    equations = Correction(problem, O.to(problem.dtype), pairs)
    x = equations.solve()
    whole = factors.to(torch.float64)
    units = [
        old if old.u is None or not len(own.v) else join_units(old, own.to(torch.float64))
        for old, own in zip(whole.units, equations.values(x), strict=True)
    ]
    _, b = equations.moved(x)
    intercept = whole.intercept if whole.intercept is None or b is None else whole.intercept + b.double()
    return canonical(problem, Factors(units, intercept), 0.0)[0]
