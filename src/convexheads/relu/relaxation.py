"""A lower bound for ReLU networks that keeps the cones, as far as a convex program can.

Dual of the ReLU program over all patterns D, with cones K_D = {u : R_D u >= 0} and Gamma_D = A_D^* L:

    max_L  -f*(L)   s.t.   ||Gamma_D^T u|| <= beta w ||u||  for every u in K_D

The gated program's dual asks this of every u, that is, sigma_max(Gamma_D) <= beta w. Here it is asked of the
doubly non-negative relaxation of the cone (Shor's relaxation with products of the cone's rows): it holds as soon as

    Gamma_D Gamma_D^T + R_D^T N R_D <= (beta w)^2 I      for a symmetric N >= 0 entrywise,

because (R_D u)^T N (R_D u) >= 0 on the cone. By a Schur complement this is linear in (L, N): a semidefinite program.
For cones with at most four faces the relaxation is exact, since doubly non-negative matrices of that order are
completely positive (Diananda 1962; Maxfield and Minc 1962); then the bound is that of the copositive program of
Sahiner, Ergen, Pauly and Pilanci, Vector-output ReLU neural network problems are copositive programs, ICLR 2021.

What is reported does not rest on the conic solver: its L and N are made feasible and evaluated in float64, with the
matrix inequality proved by Cholesky factorisations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexheads.certificate import Certificate, dual_point, rescaled_bound
from convexheads.errors import InputError, describe, require
from convexheads.losses import Loss
from convexheads.operator import Component
from convexheads.problem import Problem
from convexheads.relu.cones import cone_rows, facets
from convexheads.relu.network import dense_preactivations
from convexheads.spectral import largest_eigenvalue, largest_singular_value
from convexheads.types import Factors, Interval

MOST_UNKNOWNS = 200_000
"""Entries of L, times those of one Gamma, up to which the semidefinite program is set up."""
ROUNDS = 30
"""Most semidefinite programs that are solved, each with the constraints that the one before violated."""
BATCH = 48
"""Most constraints that are added at a time."""


@dataclass(frozen=True)
class LowerBound:
    """A dual value: no ReLU network is below it, where the constraints stand for all patterns.

    Attributes
    ----------
    value : the bound.
    proved : whether it is proved, not estimated.
    theta : bounds on max ||Gamma_D^T u|| / w over unit vectors u of the cones, before L was scaled to feasibility.
    """

    value: float
    proved: bool
    theta: Interval


@dataclass
class _Block:
    """A constraint of the dual: features T (rows, p, k) of the pattern, faces R (faces, p) or None, beta w, outputs."""

    T: np.ndarray
    R: np.ndarray | None
    bound: float
    outputs: slice

    def gamma(self, L: np.ndarray) -> Tensor:
        """Gamma = A^* L (p, k c) for L (rows, outputs)."""
        part = L[:, self.outputs]
        return torch.from_numpy(np.concatenate([self.T[:, :, l].T @ part for l in range(self.T.shape[2])], 1))

    def scale(self, L: np.ndarray, N: np.ndarray | None) -> Interval:
        """Bounds on theta with ||Gamma^T u|| <= theta ||u|| for u in the cone, proved from N where there is one."""
        gamma = self.gamma(L)
        plain = largest_singular_value(gamma)
        if N is None or self.R is None:
            return plain
        R, positive = torch.from_numpy(self.R), torch.from_numpy(np.maximum(N, 0.0))
        product = R.mT @ positive @ R
        size = float(gamma.square().sum() + (R.abs().mT @ positive @ R.abs()).norm())
        # Rows of R are known to rounding: a member of the cone may miss a face by that much.
        slack = 1e-13 * float(positive.sum())
        found = largest_eigenvalue(
            gamma @ gamma.mT + product + slack * torch.eye(len(product)), size, max(*gamma.shape, len(R))
        )
        theta = math.nextafter(math.sqrt(max(found.upper, 0.0)), math.inf)
        if not theta < plain.upper:
            return plain
        return Interval(min(theta, math.sqrt(max(found.lower, 0.0))), theta, found.method, True)


def cone_bound(program: Problem, network: Problem, factors: Factors, certificate: Certificate) -> LowerBound:
    """A lower bound on every ReLU network, where the gates of ``program`` are all patterns.

    Parameters
    ----------
    program, network : the gated program, and the same components rectified.
    factors, certificate : solution of ``program``, from which the constraints are chosen, and its certificate.

    Returns
    -------
    LowerBound
        Never below ``certificate.dual``, the gated program's own bound, which is returned where the conic solver fails.

    Raises
    ------
    MissingExtraError
        Without the packages of the extra ``relu``.
    InputError
        For programs too large for a semidefinite program.
    """
    conic = require("cvxpy", "relu")
    blocks, ridges = _blocks(program, network)
    L = dual_point(program, program.forward(factors.to(torch.float64), torch.float64))
    shape = L.shape
    point = L.reshape(-1, program.outputs).cpu().numpy()
    active = _most_violated(blocks, point, 0.9, set())
    best = LowerBound(certificate.dual, certificate.certified, certificate.sigma_max)
    for _ in range(ROUNDS):
        found = _solve(conic, program, blocks, ridges, sorted(active))
        if found is None:
            break
        point, multipliers = found
        inside = _into_domain(program, torch.from_numpy(point).to(program.device).view(shape))
        point = inside.reshape(-1, program.outputs).cpu().numpy()
        bound = _evaluate(program, blocks, multipliers, ridges, inside, factors)
        best = max(best, bound, key=lambda each: each.value)
        added = _most_violated(blocks, point, 1.0 + 1e-7, active)
        if not added:
            break
        active |= added
    return best


def _blocks(program: Problem, network: Problem) -> tuple[list[_Block], list[tuple[np.ndarray, float, slice]]]:
    """The dual's constraints, and (features, weight of the penalty, outputs) of the ridge branches."""
    blocks, ridges = [], []
    rows = program.targets[..., 0].numel()
    for k, (component, rectified) in enumerate(zip(program.components, network.components, strict=True)):
        bound = program.penalty_weight(component)
        entries = rows * component.width * component.p * component.q if not component.ridge else 0
        H = dense_preactivations(network, k) if rectified.form.rectified else None
        if entries > MOST_UNKNOWNS or (rectified.form.rectified and H is None):
            raise InputError(
                "relu_bound: "
                + describe(
                    f"'cones' for {rows} output rows and blocks of {component.p} x {component.q}",
                    f"rows x outputs x p x q of at most {MOST_UNKNOWNS}",
                    "Use relu_bound='gated'.",
                )
            )
        if component.ridge:
            ridges.append((_features(program, component, None)[:, 0], bound, component.outputs))
            continue
        for g in program.gates_of(k):
            R = None
            if H is not None and g is not None and component.gates is not None:
                R = facets(cone_rows(H, component.gates[g].flatten().cpu().numpy()))
            blocks.append(_Block(_features(program, component, g), R, bound, component.outputs))
    return blocks, ridges


def _features(program: Problem, component: Component, gate: int | None) -> np.ndarray:
    """Features of the unit vectors of u's space: (rows, p, k); a ridge branch has the single unit."""
    single = component.only_gate(gate)
    stats = single.stats(program.tokens_of(component.branch, slice(0, program.n)), torch.float64)
    rows = slice(0, max(1, component.p))
    T = single.form.basis_features(stats, rows, None if gate is None else 0)
    return T.reshape(-1, *T.shape[-2:]).cpu().numpy()


def _most_violated(blocks: list[_Block], L: np.ndarray, threshold: float, known: set[int]) -> set[int]:
    """The blocks, not ``known``, with sigma_max(Gamma) above ``threshold`` times its bound: at most ``BATCH``."""
    ratios = {i: float(torch.linalg.matrix_norm(block.gamma(L), 2)) / block.bound for i, block in enumerate(blocks)}
    above = [i for i, ratio in ratios.items() if i not in known and ratio > threshold]
    return set(sorted(above, key=lambda i: -ratios[i])[:BATCH])


# The semidefinite program ---------------------------------------------------------------------------------


def _squared(conic: Any, G: Any, Y: np.ndarray, a: np.ndarray) -> Any:
    return conic.sum(conic.multiply(a, 0.5 * conic.square(G) + conic.multiply(G, Y)))


def _cross_entropy(conic: Any, G: Any, Y: np.ndarray, a: np.ndarray) -> Any:
    return -conic.sum(conic.multiply(a, conic.entr(G + Y)))


def _logistic(conic: Any, G: Any, Y: np.ndarray, a: np.ndarray) -> Any:
    return -conic.sum(conic.multiply(a, conic.entr(G + Y) + conic.entr(1 - G - Y)))


CONJUGATES: dict[str, Callable[..., Any]] = {
    "squared": _squared,
    "cross_entropy": _cross_entropy,
    "multilabel_logistic": _logistic,
}
"""f* of every loss for the conic solver: G = L / a, targets Y and weights a spread to its shape (rows, c)."""


def _solve(
    conic: Any,
    program: Problem,
    blocks: list[_Block],
    ridges: list[tuple[np.ndarray, float, slice]],
    active: list[int],
) -> tuple[np.ndarray, dict[int, np.ndarray]] | None:
    """L (rows, c) and the multipliers N of the active blocks; None where the conic solver fails."""
    Y = program.targets.reshape(-1, program.outputs).cpu().numpy()
    weights = program.weights.cpu().numpy()
    used = np.maximum(weights, 0.0)[:, None] * np.ones((1, len(Y) // len(weights)))
    a = used.reshape(-1, 1) * np.ones((1, program.outputs))
    G = conic.Variable(Y.shape)
    L = conic.multiply(a, G)
    objective = CONJUGATES[program.loss.name](conic, G, Y, a)
    constraints = [conic.sum(L, axis=0) == 0] if program.fit_intercept else []
    if program.loss.name == "cross_entropy":
        constraints.append(conic.sum(G, axis=1) == 0)
    for features, bound, outputs in ridges:
        objective = objective + conic.sum_squares(features.T @ L[:, outputs]) / (2 * bound)
    multipliers: dict[int, Any] = {}
    for i in active:
        block = blocks[i]
        part = L[:, block.outputs]
        gamma = conic.hstack([block.T[:, :, l].T @ part for l in range(block.T.shape[2])]) / block.bound
        corner: Any = np.eye(gamma.shape[0])
        if block.R is not None and len(block.R) > 1:
            multipliers[i] = conic.Variable((len(block.R),) * 2, symmetric=True)
            constraints += [multipliers[i] >= 0, conic.diag(multipliers[i]) == 0]
            corner = corner - block.R.T @ multipliers[i] @ block.R
        whole = conic.bmat([[corner, gamma], [gamma.T, np.eye(gamma.shape[1])]])
        constraints.append((whole + whole.T) / 2 >> 0)
    problem = conic.Problem(conic.Minimize(objective), constraints)
    for solver in (conic.CLARABEL, conic.SCS):
        try:
            with warnings.catch_warnings():
                # "May be inaccurate": what is reported is evaluated anew.
                warnings.simplefilter("ignore")
                problem.solve(solver=solver)
        except (conic.error.SolverError, ValueError, ArithmeticError):
            continue
        if G.value is not None and np.isfinite(G.value).all():
            N = {i: blocks[i].bound ** 2 * np.maximum(N.value, 0.0) for i, N in multipliers.items()}
            return a * G.value, N
    return None


# What is proved -------------------------------------------------------------------------------------------


def _into_domain(program: Problem, L: Tensor) -> Tensor:
    """L moved into the domain of the conjugate, with sum_i L_i = 0 where an intercept is free.

    Towards the dual point of the empty head, which is inside, by the least share of a ladder that suffices.
    """
    targets, weights = program.targets_of(slice(0, program.n), torch.float64)
    a = weights.view(-1, *[1] * (L.ndim - 1)).expand_as(L)
    if program.loss.name == "cross_entropy":
        L = L - L.mean(-1, keepdim=True)
    if program.fit_intercept:
        L = L - a * (L.reshape(-1, program.outputs).sum(0) / a.reshape(-1, program.outputs).sum(0))
    centre = dual_point(program, program.null_outputs()[0])
    for share in (0.0, *(10.0**k for k in range(-14, 1))):
        moved = centre + (1.0 - share) * (L - centre)
        if _is_inside(program.loss, moved, targets, weights):
            return moved
    return centre


def _is_inside(loss: Loss, L: Tensor, targets: Tensor, weights: Tensor) -> bool:
    used = weights > 0
    G = L[used] / weights[used].view(-1, *[1] * (L.ndim - 1))
    return float((loss.entry_project(G, targets[used]) - G).abs().max()) <= 1e-14


def _evaluate(
    program: Problem,
    blocks: list[_Block],
    multipliers: dict[int, np.ndarray],
    ridges: list[tuple[np.ndarray, float, slice]],
    L: Tensor,
    factors: Factors,
) -> LowerBound:
    """The dual value on the ray of L, with every constraint proved."""
    point = L.reshape(-1, program.outputs).cpu().numpy()
    lower, upper, proved = 0.0, 0.0, True
    methods: set[str] = set()
    for i, block in enumerate(blocks):
        found = block.scale(point, multipliers.get(i))
        weight = block.bound / program.beta
        lower, upper = max(lower, found.lower / weight), max(upper, found.upper / weight)
        proved = proved and found.proved
        if found.upper > 0:
            methods.add(found.method)
    ridge = sum(float(np.square(T.T @ point[:, outputs]).sum()) / (2 * bound) for T, bound, outputs in ridges)
    sigma = Interval(lower, upper, ", ".join(sorted(methods)), proved)
    bound = rescaled_bound(program, L, sigma, ridge, math.inf, factors.intercept)
    return LowerBound(bound.dual, bound.certified, sigma)
