"""Certificates of optimality: factors + problem -> primal, dual and gap, in float64. Knows no solver.

Dual of the convex program, with f*(L) = sup_O <L, O> - f(O):

    max_L  -f*(L) - sum_ridge ||A_h^* L||_F^2 / (2 beta w_h)
    s.t.   sigma_max(A_g^* L) <= beta w_g for every block g,   sum_i L_i = 0 where an intercept is free.

From any factors take L = gradient of f at their outputs, scale it by the alpha that makes it feasible and its
value largest, and report gap = primal - dual >= primal - optimum >= 0.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from convexheads.problem import Problem
from convexheads.spectral import largest_singular_value, nuclear_norm
from convexheads.types import Factors, Interval

UNSCALED = 0.1
"""Share of the gap that a search along the ray must be able to close to be worth its passes over the samples."""


@dataclass(frozen=True)
class Certificate:
    """How far a solution is at most from the global optimum.

    Attributes
    ----------
    primal : objective of the solution.
    dual : value of a feasible dual point: no solution of the program, hence no network, can be below it.
    gap, relative_gap : primal - dual, and gap / primal.
    sigma_max : bounds on max_g sigma_max(A_g^* L) / w_g at L = gradient of the loss; at the optimum it is beta.
    certified : True only where the upper end of ``sigma_max`` is proved, not estimated.
    beta : the weight decay of the program.
    alpha : the factor that scaled L to feasibility.
    """

    primal: float
    dual: float
    gap: float
    relative_gap: float
    sigma_max: Interval
    certified: bool
    beta: float
    alpha: float

    def as_dict(self) -> dict:
        """Plain numbers for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Certificate:
        return cls(**{**values, "sigma_max": Interval(**values["sigma_max"])})


def penalty(problem: Problem, factors: Factors) -> float:
    """beta sum_g w_g ||Z_g||_* + (beta / 2) sum_ridge w_h ||W||_F^2, in float64."""
    total = 0.0
    for component, units in zip(problem.components, factors.units, strict=True):
        weight = problem.penalty_weight(component)
        if units.u is None:
            total += 0.5 * weight * float(units.v.double().square().sum())
            continue
        u, v = units.u.double().flatten(1), units.v.double().flatten(1)
        if units.gate is None:
            total += weight * nuclear_norm(u, v)
            continue
        for g in range(component.n_gates):
            own = units.gate == g
            total += weight * nuclear_norm(u[own], v[own])
    return total


@dataclass(frozen=True)
class DualPoint:
    """L = gradient of f at outputs O, of their shape; with f(O) and <L, O>, which give f*(L) = <L, O> - f(O) exactly.

    That is Fenchel and Young's equality: it saves a pass over the conjugates of the samples.
    """

    L: Tensor
    loss: float
    inner: float

    @classmethod
    def at(cls, problem: Problem, O: Tensor) -> DualPoint:
        """The dual point of outputs O."""
        targets, weights = problem.targets_of(slice(0, problem.n), O.dtype)
        loss, L = problem.loss.value_and_gradient(O, targets, weights)
        return cls(L, loss, problem.world.total(float(L.reshape(-1).double() @ O.reshape(-1).double())))


def dual_value(
    problem: Problem, L: Tensor, upper: float, ridge: float, evaluations: int = 25, known: DualPoint | None = None
) -> tuple[float, float]:
    """Largest value of the dual on the ray alpha L: (value, alpha).

    ``upper`` bounds the feasible alpha of the nuclear blocks, ``ridge`` is sum_h ||A_h^* L||_F^2 / (2 beta w_h).
    Every alpha gives a valid bound; more ``evaluations`` give a better one. ``known`` is what is known of L where it is
    the gradient at some outputs.
    """
    targets, weights = problem.targets_of(slice(0, problem.n), L.dtype)

    def value(alpha: float) -> float:
        return -problem.loss.conjugate(L, targets, weights, alpha) - alpha**2 * ridge

    # Concave along the ray, of slope -<L, O> - 2 ridge at alpha = 1, where L is in the domain of the conjugate.
    if known is not None and upper <= 1.0 and -known.inner - 2.0 * ridge >= 0:
        return (known.loss - known.inner - ridge, 1.0) if upper == 1.0 else (value(max(0.0, upper)), max(0.0, upper))
    # Stay inside the domain of the conjugate: on its border rounding could step outside.
    upper = min(upper, problem.loss.max_scale(L, targets, weights) * (1 - 1e-12), 2.0)
    upper = max(upper, 0.0)

    # Still rising next to the end means that the end is best, as it is near an optimum.
    last = value(upper)
    if last >= value(upper * (1 - 1e-4)):
        return last, upper
    found = minimize_scalar(
        lambda alpha: -value(alpha),
        bounds=(0.0, upper),
        method="bounded",
        options={"xatol": 1e-7, "maxiter": evaluations},
    )
    candidates = [(value(alpha), alpha) for alpha in {0.0, min(1.0, upper), float(found.x)}]
    return max([*candidates, (last, upper)])


def unscaled_value(known: DualPoint, upper: float, ridge: float, primal: float) -> float | None:
    """Value of the dual at alpha = 1, where no other alpha can close more than a part of the gap; else None.

    The ridge terms make the dual strongly concave along the ray: with slope t at alpha = 1 and curvature -2 ridge or
    below, it rises by at most t^2 / (4 ridge).
    """
    value = known.loss - known.inner - ridge
    slope = -known.inner - 2.0 * ridge
    if upper < 1.0 or not slope**2 <= 4.0 * ridge * UNSCALED * (primal - value):
        return None
    return value


def rescaled_bound(
    problem: Problem,
    L: Tensor | DualPoint,
    sigma: Interval,
    ridge: float,
    primal: float,
    intercept: Tensor | None,
    evaluations: int = 25,
) -> Certificate:
    """The certificate from a dual point and a bound on its largest singular value."""
    known, L = (L, L.L) if isinstance(L, DualPoint) else (None, L)
    upper = problem.beta / sigma.upper if sigma.upper > 0 else math.inf
    unscaled = None if known is None else unscaled_value(known, upper, ridge, primal)
    if unscaled is None:
        value, alpha = dual_value(problem, L, upper, ridge, evaluations, known)
    else:
        value, alpha = unscaled, 1.0
    if intercept is not None:
        # What rounding leaves of sum_i L_i = 0 costs at most its product with the best intercept.
        rest = float(problem.world.sum(L.reshape(-1, problem.outputs).sum(0)).norm())
        value -= alpha * rest * (2.0 * float(intercept.norm()) + 1.0)
    # Next to the optimum rounding could put the dual above the primal; a smaller lower bound is as true.
    value = min(value, primal)
    gap = primal - value
    tiny = problem.negligible
    relative = gap / primal if primal > tiny else (0.0 if gap <= tiny else math.inf)
    return Certificate(primal, value, gap, relative, sigma, sigma.proved, problem.beta, alpha)


def dual_point(problem: Problem, O: Tensor) -> Tensor:
    """L = gradient of the loss at outputs O, shape of O."""
    return DualPoint.at(problem, O).L


def bound_sigma(problem: Problem, L: Tensor) -> tuple[Interval, float]:
    """Bounds on max_g sigma_max(A_g^* L) / w_g, and the ridge branches' sum ||A_h^* L||_F^2 / (2 beta w_h)."""
    lower, upper, ridge = 0.0, 0.0, 0.0
    methods: set[str] = set()
    proved = True
    for k, component in enumerate(problem.components):
        for _, gamma in problem.gammas(L, k):
            if component.ridge:
                ridge += float(gamma.square().sum()) / (2.0 * problem.penalty_weight(component))
                continue
            found = largest_singular_value(gamma)
            lower = max(lower, found.lower / component.weight)
            upper = max(upper, found.upper / component.weight)
            methods.add(found.method)
            proved = proved and found.proved
    return Interval(lower, upper, ", ".join(sorted(methods)) or "no nuclear block", proved), ridge


def refit_intercept(problem: Problem, factors: Factors) -> tuple[Factors, Tensor]:
    """Factors with the intercept solved to optimality, and their outputs, both in float64."""
    factors = factors.to(torch.float64)
    O = problem.forward(factors, torch.float64, cached=problem.dtype == torch.float64)
    if factors.intercept is None:
        return factors, O
    bare = O - factors.intercept
    b = problem.best_intercept(bare, factors.intercept)
    return replace(factors, intercept=b), bare + b


def certify_factors(problem: Problem, factors: Factors, network: bool = False) -> Certificate:
    """Certificate of factors for a problem.

    Parameters
    ----------
    network : False takes the convex program's objective (nuclear norms) as primal, True the weight decay of the
        units as they are: then the gap is that of the network itself, with its own intercept.

    The dual point always comes from outputs with the best intercept, as sum_i L_i = 0 demands.
    """
    factors = factors.to(torch.float64)
    refitted, O = refit_intercept(problem, factors)
    targets, weights = problem.targets_of(slice(0, problem.n), torch.float64)
    point = DualPoint.at(problem, O)
    if network:
        primal = problem.value(factors, torch.float64)
    elif factors.intercept is None or refitted.intercept is None:
        primal = point.loss + penalty(problem, factors)
    else:
        shift = O - refitted.intercept + factors.intercept
        primal = problem.loss.value(shift, targets, weights) + penalty(problem, factors)
    sigma, ridge = bound_sigma(problem, point.L)
    return rescaled_bound(problem, point, sigma, ridge, primal, refitted.intercept)


def certify_refitted(problem: Problem, factors: Factors) -> tuple[Factors, Certificate]:
    """Factors with the intercept solved to optimality, and their certificate in the convex program."""
    refitted, O = refit_intercept(problem, factors)
    point = DualPoint.at(problem, O)
    primal = point.loss + penalty(problem, refitted)
    sigma, ridge = bound_sigma(problem, point.L)
    return refitted, rescaled_bound(problem, point, sigma, ridge, primal, refitted.intercept)
