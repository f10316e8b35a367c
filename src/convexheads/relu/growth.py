"""Out of local minima of a ReLU network: units are added along which the objective falls.

With L the gradient of the loss at the outputs, a small unit (u, v) lowers the objective if
-<L, A(u, v)> > beta w ||u|| ||v||. A network without such units would be globally optimal; but to find them is not a
convex problem, and the search here is a local one: that it finds none proves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexheads.certificate import dual_point
from convexheads.operator import Component
from convexheads.problem import Problem
from convexheads.relu.network import refine
from convexheads.types import Factors, Units

STARTS = 16
"""Random starts of the search."""
ALTERNATIONS = 15
"""Rounds of the search, one step in v and one in u each."""
DISTINCT = 0.999
"""Cosine above which two weights u that were found are one."""


def extend(network: Problem, factors: Factors, steps: int = 1000, tol: float = 1e-7, rounds: int = 5) -> Factors:
    """A ReLU network whose objective is no higher: units are added where they help, and all weights refined.

    At most ``rounds`` times, as long as the objective falls by more than ``tol`` of itself; ``steps`` and ``tol`` are
    also those of :func:`~convexheads.relu.network.refine`.
    """
    generator = torch.Generator().manual_seed(0)
    value = network.value(factors, torch.float64)
    for _ in range(rounds):
        fresh = descending_units(network, factors, generator)
        if not any(len(units.v) for units in fresh):
            break
        units = [_joined(own, new) for own, new in zip(factors.units, fresh, strict=True)]
        found = refine(network, Factors(units, factors.intercept), steps, tol)
        reached = network.value(found, torch.float64)
        if not reached < value - tol * abs(value):
            break
        factors, value = found, reached
    return factors


def descending_units(network: Problem, factors: Factors, generator: torch.Generator) -> list[Units]:
    """Small new units along which the objective falls, steepest first; none for components that are not rectified.

    By alternating maximisation over unit balls of u and v from random starts.
    """
    L = dual_point(network, network.forward(factors, network.dtype))
    units = [_random_units(component, L, generator) for component in network.components]
    for _ in range(ALTERNATIONS):
        units = [
            Units(each.u, _unit_size(image.v)) for each, image in zip(units, _images(network, L, units), strict=True)
        ]
        images = _images(network, L, units)
        units = [
            Units(None if image.u is None else _unit_size(image.u), each.v)
            for each, image in zip(units, images, strict=True)
        ]
    found = []
    for k, (own, each, image) in enumerate(zip(factors.units, units, _images(network, L, units), strict=True)):
        slope = (image.v * each.v).flatten(1).sum(1)
        steep = slope > network.penalty_weight(network.components[k]) * (1 + 1e-6)
        # A tenth of the mean size of the units that there are.
        size = 0.1 * float(own.v.square().sum()) / len(own.v) if len(own.v) else 0.1
        order = torch.nonzero(steep).flatten()
        found.append(_distinct(each, order[slope[order].argsort(descending=True)].tolist(), size**0.5))
    return found


def _random_units(component: Component, L: Tensor, generator: torch.Generator) -> Units:
    m = STARTS if component.form.rectified else 0
    v = L.new_zeros(m, component.form.value_width, component.width)
    if component.ridge:
        return Units(None, v)
    u = torch.randn(m, *component.form.u_shape, generator=generator, dtype=torch.float64)
    return Units(_unit_size(u.to(L.device, L.dtype)), v)


def _images(network: Problem, L: Tensor, units: list[Units]) -> list[Units]:
    """The directions of steepest descent of <L, A(u, v)> in u and in v, for every unit."""
    return network.adjoint(-L, units, lambda component: component.form.rectified)


def _unit_size(t: Tensor) -> Tensor:
    norms = t.flatten(1).norm(dim=1).clamp_min(torch.finfo(t.dtype).tiny)
    return t / norms.view(-1, *[1] * (t.ndim - 1))


def _distinct(units: Units, order: list[int], size: float) -> Units:
    """Those in ``order`` whose u differ, with norms ``size``, in float64."""
    if units.u is None:
        return Units(None, units.v.double())
    kept: list[int] = []
    for i in order:
        if all(float((units.u[i] * units.u[j]).sum()) < DISTINCT for j in kept):
            kept.append(i)
    return Units(size * units.u[kept].double(), size * units.v[kept].double())


def _joined(own: Units, new: Units) -> Units:
    if own.u is None or new.u is None or not len(new.v):
        return own
    return Units(torch.cat([own.u, new.u]), torch.cat([own.v, new.v]))
