"""From a gated solution to a ReLU network with the same outputs on the training data, and on from there.

Two problems on the same tokens appear here. ``program`` is the convex one with fixed gates; ``network`` has the same
components in their rectified form, where every unit is masked by its own sign: its objective is that of the ReLU
network, which is not convex.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from convexheads.architectures import Architecture
from convexheads.certificate import refit_intercept
from convexheads.errors import InputError, describe
from convexheads.problem import Problem
from convexheads.relu.arrangement import MOST_CELLS, ZERO, enumerate_cells
from convexheads.relu.cones import MOST_ENTRIES, closed_form, cone_rows, decompose, interior_direction
from convexheads.solvers.lbfgs import LBFGS
from convexheads.types import Factors, Units

MOST_ENUMERATED = 5_000_000
"""Most entries of the matrix of pre-activations from which patterns are enumerated."""
NEGLIGIBLE = 1e-12
"""Units whose ||u|| ||v|| is below this share of the largest one are left out of a conversion: rounding made them."""


def preactivations(form: Architecture, X: Tensor) -> np.ndarray:
    """H (N, p) in float64 with H u = hidden(X, u) for all samples, flattened: X (n, s, d)."""
    p = math.prod(form.u_shape)
    basis = torch.eye(p, dtype=torch.float64, device=X.device).view(p, *form.u_shape)
    return form.hidden(X.double(), basis).flatten(2).transpose(1, 2).reshape(-1, p).cpu().numpy()


def enumerate_gates(form: Architecture, X: Tensor, most: int = MOST_CELLS) -> Tensor:
    """One gate (P, *u_shape) for every pattern that a weight can have on tokens X (n, s, d).

    Patterns with a pre-activation of zero are left out: they belong to the border of others, and a ReLU does not tell
    the two apart there.

    Raises
    ------
    InputError
        For tokens with too many pre-activations, or more than ``most`` patterns.
    """
    entries = len(X) * form.hidden(X[:1].double(), torch.zeros(1, *form.u_shape).to(X).double()).numel()
    entries *= math.prod(form.u_shape)
    if entries > MOST_ENUMERATED:
        raise InputError(
            "gates: "
            + describe(
                f"'all' for pre-activations with {entries} coefficients",
                f"at most {MOST_ENUMERATED}",
                "Give a number of gates: patterns are then sampled, and no lower bound for the ReLU network follows.",
            )
        )
    H = preactivations(form, X)
    gates = []
    for point in enumerate_cells(H, most):
        centre = interior_direction(cone_rows(H, point))
        gates.append(point / np.linalg.norm(point) if centre is None else centre)
    return torch.from_numpy(np.stack(gates)).view(-1, *form.u_shape)


def dense_preactivations(network: Problem, k: int) -> np.ndarray | None:
    """H of component ``k`` where it is small enough to work with as a matrix, else None."""
    component = network.components[k]
    X = network.tokens_of(component.branch, slice(0, 1))[..., component.inputs]
    hidden = component.form.hidden(X, torch.zeros(1, *component.form.u_shape).to(X)).numel()
    if network.n * hidden * component.p > MOST_ENTRIES:
        return None
    return preactivations(
        component.form, network.tokens_of(component.branch, slice(0, network.n))[..., component.inputs]
    )


def check_cones(program: Problem, network: Problem) -> None:
    """Raise InputError where a gate of a rectified component has a cone without interior.

    Then units with its mask are no differences of ReLU units of this pattern.
    """
    for k, component in enumerate(network.components):
        gates = program.components[k].gates
        if not component.form.rectified or gates is None:
            continue
        H = dense_preactivations(network, k)
        for g, gate in enumerate(gates.flatten(1)):
            if H is not None:
                good = interior_direction(cone_rows(H, gate.cpu().numpy())) is not None
            else:
                good = bool(gate.any())
            if not good:
                raise InputError(
                    "gates: "
                    + describe(
                        f"gate {g}, which has pre-activations of zero that no weight with its mask moves off zero",
                        "gates of patterns that some weight has without any zero",
                        "Draw gates at random (a number of gates), or enumerate the patterns (gates='all').",
                    )
                )


def convert(program: Problem, network: Problem, factors: Factors) -> Factors:
    """The ReLU network with the outputs of ``factors`` on the training data: two units for one, or one where u's own
    pattern is that of its gate.

    Cones small enough to be a matrix are decomposed at least cost, others in closed form; see
    :mod:`convexheads.relu.cones`. Units are balanced: ||u|| = ||v||.
    """
    units = []
    for k, (component, own) in enumerate(zip(network.components, factors.units, strict=True)):
        if not component.form.rectified:
            units.append(own)
            continue
        units.append(_convert_units(program, network, k, own.to(torch.float64)))
    return Factors(units, factors.intercept).to(torch.float64)


def _convert_units(program: Problem, network: Problem, k: int, units: Units) -> Units:
    gates = program.components[k].gates
    assert units.u is not None
    assert units.gate is not None
    assert gates is not None
    H = dense_preactivations(network, k)
    if not len(units.v):
        pairs = []
    elif H is None:
        pairs = _closed_pairs(network, k, units, gates)
    else:
        pairs = _cheapest_pairs(H, units, gates)
    found_u = [torch.from_numpy(part) for pair in pairs for part in pair]
    found_v = [sign * v for v in units.v for sign in (1.0, -1.0)]
    u = torch.stack(found_u).to(units.v.device).view(-1, *units.u.shape[1:]) if found_u else units.u
    v = torch.stack(found_v) if found_v else units.v
    return balance(Units(u, v))


def _cheapest_pairs(H: np.ndarray, units: Units, gates: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    assert units.u is not None
    assert units.gate is not None
    cones: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    pairs = []
    for u, g in zip(units.u.flatten(1).cpu().numpy(), units.gate.tolist(), strict=True):
        if g not in cones:
            R = cone_rows(H, gates[g].flatten().cpu().numpy())
            centre = interior_direction(R)
            assert centre is not None, "check_cones saw to it"
            cones[g] = (R, centre)
        pairs.append(decompose(cones[g][0], u, cones[g][1]))
    return pairs


def _closed_pairs(network: Problem, k: int, units: Units, gates: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs by the closed form, with pre-activations of a few samples at a time."""
    assert units.u is not None
    assert units.gate is not None
    component = network.components[k]
    own = gates[units.gate.to(gates.device)].to(units.v.device, torch.float64)
    least = torch.full((len(units.v),), math.inf, dtype=torch.float64, device=units.v.device)
    largest = -least
    for start in range(0, network.n, step := network.chunk_rows(4 * len(units.v), True)):
        X = network.tokens_of(component.branch, slice(start, start + step))[..., component.inputs].double()
        a = component.form.hidden(X, units.u).flatten(2)
        b = component.form.hidden(X, own).flatten(2)
        # Pre-activations of zero tokens are zero for every weight: they say nothing.
        zero = (a.abs() <= ZERO * a.abs().amax()) & (b.abs() <= ZERO * b.abs().amax())
        ratio = a / b
        least = torch.minimum(least, ratio.masked_fill(zero, math.inf).amin((0, 2)))
        largest = torch.maximum(largest, ratio.masked_fill(zero, -math.inf).amax((0, 2)))
    if not bool((torch.isfinite(least) & torch.isfinite(largest)).all()):
        raise InputError(
            "gates: "
            + describe(
                "a gate with a pre-activation of zero",
                "gates without",
                "Draw gates at random (a number of gates).",
            )
        )
    rows = zip(least.tolist(), largest.tolist(), units.u.flatten(1), own.flatten(1), strict=True)
    return [closed_form(np.array([low, high]), u.cpu().numpy(), h.cpu().numpy()) for low, high, u, h in rows]


def balance(units: Units) -> Units:
    """Rectified units with ||u|| = ||v||, which is their least weight decay; those that carry nothing are dropped."""
    assert units.u is not None
    left, right = units.u.flatten(1).norm(dim=1), units.v.flatten(1).norm(dim=1)
    kept = left * right > NEGLIGIBLE * (left * right).amax() if len(left) else left > 0
    u, v, left, right = units.u[kept], units.v[kept], left[kept], right[kept]
    root = (right / left).sqrt()
    return Units(u * root.view(-1, *[1] * (u.ndim - 1)), v / root.view(-1, 1, 1))


def refine(network: Problem, factors: Factors, steps: int = 1000, tol: float = 1e-7) -> Factors:
    """A ReLU network whose objective is no higher, by full-batch L-BFGS on all of its weights from the given ones.

    Restarted where it comes to a halt, because a ReLU has kinks that curvature pairs do not see. In the dtype of
    ``network``; the result is compared in float64. Ends after ``steps``, or where 50 of them together lower the
    objective by less than ``tol`` of itself.
    """
    start = factors.to(network.dtype)
    if not start.flat().numel():
        return factors

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        value, gradient = network.value_and_gradient(start.like(x))
        return value, gradient.flat()

    optimiser = LBFGS(evaluate, start.flat(), 2e-7 if network.dtype == torch.float32 else 1e-14)
    failures, since, reference = 0, 0, optimiser.value
    for _ in range(steps):
        failures = 0 if optimiser.step() else failures + 1
        since += 1
        if failures > 1:
            break
        if since == 50:
            if reference - optimiser.value <= tol * abs(reference):
                break
            since, reference = 0, optimiser.value
    found = start.like(optimiser.x.clone()).to(torch.float64)
    found = replace(
        found,
        units=[
            balance(units) if component.form.rectified else units
            for component, units in zip(network.components, found.units, strict=True)
        ],
    )
    found, _ = refit_intercept(network, found)
    better = network.value(found, torch.float64) < network.value(factors, torch.float64)
    return found if better else factors


def own_signs(network: Problem, factors: Factors) -> Factors:
    """The units of a gated solution read as ReLU units: other outputs, but none of the cost of a decomposition."""
    units = [
        balance(Units(own.u, own.v)) if component.form.rectified else own
        for component, own in zip(network.components, factors.to(torch.float64).units, strict=True)
    ]
    return refit_intercept(network, Factors(units, factors.intercept))[0]
