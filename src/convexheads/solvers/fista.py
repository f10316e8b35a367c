"""The reference solver: accelerated proximal gradient on the dense blocks Z_g.

FISTA (Beck and Teboulle 2009) with backtracking and adaptive restart (O'Donoghue and Candes 2015); the proximal map
of a nuclear norm is soft-thresholding of the singular values. It shares nothing with the factored solver but the
problem and the certificate, and is meant for small sizes: it holds the dense feature matrix of every block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from convexheads.certificate import (
    Certificate,
    DualPoint,
    certify_factors,
    refit_intercept,
    rescaled_bound,
)
from convexheads.errors import InputError, describe
from convexheads.operator import split_rows
from convexheads.problem import Problem
from convexheads.solvers.base import Solution, register
from convexheads.types import Factors, History, Interval, Units

SIZE_LIMIT = 60_000_000
"""Most numbers in the dense feature matrices (0.5 GB in float64)."""
CHECK_EVERY = 25
NOISE = 1e-12
"""Differences of the loss below this fraction of it are rounding."""


def dense_size(problem: Problem) -> int:
    """Numbers in the dense feature matrices of all blocks."""
    rows = problem.targets.numel() // problem.outputs
    return sum(rows * max(1, c.p) * c.form.value_width * c.n_gates for c in problem.components)


class DenseComponent:
    """All blocks of one component as one matrix: A(Z) = F Z with F (rows, P p k) and Z (P, p, k c).

    The columns of a gate are divided by the spectral norm of its part of F, so that one step size suits all blocks,
    and centred where there is an intercept, so that the intercept decouples. In these variables the block's penalty
    is ``weights`` (P,) times its nuclear norm, or ``weights`` / 2 times its squared norm for ridge.
    """

    def __init__(self, problem: Problem, k: int) -> None:
        self.component = component = problem.components[k]
        self.ridge, self.outputs = component.ridge, component.outputs
        self.gates, self.p = component.n_gates, max(1, component.p)
        self.width, self.c = component.form.value_width, component.width
        self.F = self._features(problem, k)
        self.mean: Tensor | None = None
        if problem.fit_intercept:
            tokens = len(self.F) // problem.n
            share = problem.weights.repeat_interleave(tokens) / tokens
            self.mean = share @ self.F
            self.F -= self.mean
        scale = []
        for part in self.F.split(self.p * self.width, 1):
            size = _spectral_norm(part)
            scale.append(1.0 / size if size > 0 else 1.0)
            part *= scale[-1]
        self.scale = self.F.new_tensor(scale)
        weight = problem.penalty_weight(component)
        self.weights = weight * (self.scale.square() if self.ridge else self.scale)

    def _features(self, problem: Problem, k: int) -> Tensor:
        component = self.component
        columns = self.p * self.width
        rows = problem.targets.numel() // problem.outputs
        per = rows // problem.n
        F = torch.empty(rows, self.gates * columns, dtype=torch.float64, device=problem.device)
        step = max(1, 2**23 // (self.p * max(1, component.form.workspace)))
        for index in split_rows(problem.n, step):
            stats = problem.stats_of(index, torch.float64, cached=False)[k]
            into = F[index.start * per : index.stop * per]
            if self.ridge:
                into[:] = component.features(stats, Units(None, F.new_empty(1, self.width, self.c))).flatten(1)
                continue
            for g in range(self.gates):
                gate = None if component.gates is None else g
                T = component.form.basis_features(stats, slice(0, self.p), gate)
                into[:, g * columns : (g + 1) * columns] = T.reshape(len(into), columns)
        return F

    def zeros(self) -> Tensor:
        return self.F.new_zeros(self.gates, self.p, self.width * self.c)

    def forward(self, Z: Tensor) -> Tensor:
        """F Z: (rows, c of this component)."""
        return self.F @ Z.view(-1, self.c)

    def adjoint(self, L: Tensor) -> Tensor:
        """F^T L for L (rows, all outputs), of Z's shape."""
        return (self.F.mT @ L[:, self.outputs]).view(self.gates, self.p, -1)

    def prox(self, Z: Tensor, step: float) -> tuple[Tensor, float]:
        """The proximal map of ``step`` times the penalty at Z, and the penalty of the result."""
        if self.ridge:
            Z = Z / (1.0 + step * float(self.weights))
            return Z, self.penalty(Z)
        U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
        sigma = (sigma - step * self.weights[:, None]).clamp_min(0.0)
        return (U * sigma[:, None]) @ Vh, float((sigma.sum(1) * self.weights).sum())

    def penalty(self, Z: Tensor) -> float:
        if self.ridge:
            return 0.5 * float(self.weights) * float(Z.square().sum())
        return float((torch.linalg.svdvals(Z).sum(1) * self.weights).sum())

    def units(self, Z: Tensor) -> Units:
        """Z as units u_r v_r^T, balanced and sorted within each gate; singular values of rounding size are dropped."""
        shape = (self.width, self.c)
        Z = Z * self.scale[:, None, None]
        if self.ridge:
            return Units(None, Z.view(1, *shape))
        U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
        kept = sigma > 1e-14 * max(Z.shape[1:]) * sigma.max()
        root = (sigma * kept).sqrt()
        u = (U * root[:, None]).mT[kept].view(-1, *self.component.form.u_shape)
        v = (root[..., None] * Vh)[kept].view(-1, *shape)
        gate = None if self.component.gates is None else kept.nonzero()[:, 0]
        return Units(u, v, gate)

    def dense(self, units: Units) -> Tensor:
        """The inverse of :meth:`units`."""
        if units.u is None:
            Z = units.v.double().reshape(1, 1, -1)
        else:
            Z = self.zeros()
            gate = torch.zeros(len(units.v), dtype=torch.long) if units.gate is None else units.gate
            outer = units.u.double().flatten(1)[:, :, None] * units.v.double().flatten(1)[:, None]
            Z.index_add_(0, gate.to(Z.device), outer.to(Z.device))
        return Z.to(self.F.device) / self.scale[:, None, None]

    def shift(self, Z: Tensor) -> Tensor:
        """What centring moved from the outputs into the intercept: mean^T Z, (c of this component,)."""
        assert self.mean is not None
        return self.mean @ (Z * self.scale[:, None, None]).view(-1, self.c)


def _spectral_norm(F: Tensor, steps: int = 30) -> float:
    """Spectral norm by the power method, from below; only steers step sizes."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(F.shape[1], generator=generator, dtype=torch.float64).to(F.device)
    for _ in range(steps):
        v = F.mT @ (F @ (v / v.norm()))
        if not float(v.norm()) > 0:
            return 0.0
    return math.sqrt(float(v.norm()))


class Fista:
    """State of one solve: a point is a list of one Z a component, and the centred intercept last."""

    def __init__(self, problem: Problem, progress: Callable[[dict], None] | None) -> None:
        self.problem, self.progress = problem, progress
        self.start = time.perf_counter()
        self.components = [DenseComponent(problem, k) for k in range(len(problem.components))]
        self.targets, self.weights = problem.targets_of(slice(0, problem.n), torch.float64)
        # The intercept's column of ones, scaled like the others.
        self.one = (problem.targets.numel() // problem.outputs) ** -0.5
        self.history = History()
        self.n_iter = self.n_proofs = self.n_restarts = 0

    # Points -----------------------------------------------------------------------------------------------

    def point(self, factors: Factors | None) -> list[Tensor]:
        """The factors as a point; from zero with the best constant where there are none."""
        problem = self.problem
        if factors is None:
            x, b = [c.zeros() for c in self.components], problem.null_outputs()[1]
        else:
            x = [c.dense(units) for c, units in zip(self.components, factors.units, strict=True)]
            b = factors.intercept
        if problem.fit_intercept:
            start = torch.zeros(problem.outputs, dtype=torch.float64) if b is None else b.double().clone()
            b = start.to(problem.device)
            for c, Z in zip(self.components, x, strict=True):
                b[c.outputs] += c.shift(Z)
            x.append(b / self.one)
        return x

    def factors(self, x: list[Tensor]) -> Factors:
        units = [c.units(Z) for c, Z in zip(self.components, x, strict=False)]
        if not self.problem.fit_intercept:
            return Factors(units)
        b = x[-1] * self.one
        for c, Z in zip(self.components, x, strict=False):
            b[c.outputs] -= c.shift(Z)
        return Factors(units, b)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Outputs, of the shape of the targets."""
        O = self.targets.new_zeros(self.targets.shape).view(-1, self.problem.outputs)
        for c, Z in zip(self.components, x, strict=False):
            O[:, c.outputs] += c.forward(Z)
        if self.problem.fit_intercept:
            O += x[-1] * self.one
        return O.view_as(self.targets)

    def adjoint(self, L: Tensor) -> list[Tensor]:
        rows = L.reshape(-1, self.problem.outputs)
        found = [c.adjoint(rows) for c in self.components]
        return [*found, rows.sum(0) * self.one] if self.problem.fit_intercept else found

    def prox(self, x: list[Tensor], step: float) -> tuple[list[Tensor], float]:
        found, penalty = [], 0.0
        for c, Z in zip(self.components, x, strict=False):
            Z, value = c.prox(Z, step)
            found.append(Z)
            penalty += value
        return ([*found, x[-1]] if self.problem.fit_intercept else found), penalty

    # Smooth part ------------------------------------------------------------------------------------------

    def loss(self, O: Tensor) -> float:
        return self.problem.loss.value(O, self.targets, self.weights)

    def gradient(self, O: Tensor) -> Tensor:
        return self.problem.loss.gradient(O, self.targets, self.weights)

    def first_step(self, O: Tensor, G: list[Tensor]) -> float:
        """Inverse curvature along the gradient; backtracking takes it from there."""
        move = self.forward(G)
        curvature = _dot([move], [self.problem.loss.hessian_product(O, self.targets, self.weights, move)])
        size = _dot(G, G)
        return size / curvature if curvature > 0 and size > 0 else 1.0

    # Checks -----------------------------------------------------------------------------------------------

    def estimate(self, x: list[Tensor], O: Tensor, penalty: float) -> Certificate:
        """The gap by the dense Gamma of every block; like the proof, but for the bound on sigma_max."""
        problem = self.problem
        b = None
        if problem.fit_intercept:
            b = problem.best_intercept(O)
            O = O + b
        point = DualPoint.at(problem, O)
        sigma, ridge = 0.0, 0.0
        for c, Z in zip(self.components, self.adjoint(point.L), strict=False):
            weight = problem.penalty_weight(c.component)
            Z = Z / c.scale[:, None, None]
            if c.ridge:
                ridge += float(Z.square().sum()) / (2.0 * weight)
            else:
                sigma = max(sigma, float(torch.linalg.matrix_norm(Z, 2).max()) / c.component.weight)
        primal = point.loss + penalty
        found = rescaled_bound(problem, point, Interval(sigma, sigma, "estimate", False), ridge, primal, b)
        seconds = time.perf_counter() - self.start
        rank = sum(
            int((torch.linalg.svdvals(Z) > 1e-12 * Z.abs().max()).sum())
            for c, Z in zip(self.components, x, strict=False)
            if not c.ridge
        )
        self.history.append(found.primal, found.relative_gap, seconds, rank)
        if self.progress is not None:
            self.progress(
                {
                    "iteration": self.n_iter,
                    "objective": found.primal,
                    "gap": found.relative_gap,
                    "rank": rank,
                    "seconds": seconds,
                    "factors": self.factors(x),
                }
            )
        return found

    def finish(self, x: list[Tensor], tol: float, max_rank: int | None, message: str) -> Solution:
        factors, _ = refit_intercept(self.problem, largest_units(self.factors(x), max_rank))
        certificate = certify_factors(self.problem, factors)
        self.n_proofs += 1
        return Solution(
            factors,
            certificate,
            self.history,
            self.n_iter,
            certificate.relative_gap <= tol,
            message,
            {"proofs": self.n_proofs, "restarts": self.n_restarts},
        )

    # The solve --------------------------------------------------------------------------------------------

    def run(self, init: Factors | None, tol: float, max_iter: int, max_rank: int | None) -> Solution:
        x = self.point(init)
        O = self.forward(x)
        penalty = sum(c.penalty(Z) for c, Z in zip(self.components, x, strict=False))
        last, last_O = x, O
        momentum = 1.0
        step = 0.0
        target = 0.8 * tol
        check_at = 0
        message = f"max_iter = {max_iter} reached"
        while True:
            if self.n_iter >= check_at:
                bound = self.estimate(x, O, penalty)
                if bound.relative_gap <= target:
                    solution = self.finish(x, tol, max_rank, "the relative gap reached tol")
                    # With max_rank the proof may fail for good: more iterations would not add units.
                    if solution.converged or max_rank is not None:
                        return solution
                    target *= 0.7
                check_at = self.n_iter + CHECK_EVERY
            if self.n_iter >= max_iter:
                break
            grown = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum**2))
            ahead = (momentum - 1.0) / grown
            y = [a + ahead * (a - b) for a, b in zip(x, last, strict=True)]
            O_y = O + ahead * (O - last_O)
            L = self.gradient(O_y)
            G = self.adjoint(L)
            if step == 0.0:
                step = self.first_step(O_y, G)
            value = self.loss(O_y)
            while True:
                new, new_penalty = self.prox([a - step * g for a, g in zip(y, G, strict=True)], step)
                new_O = self.forward(new)
                if self._majorised(y, O_y, L, value, new, new_O, step):
                    break
                step *= 0.5
            self.n_iter += 1
            moved = [a - b for a, b in zip(new, x, strict=True)]
            uphill = sum(float(((a - b) * m).sum()) for a, b, m in zip(y, new, moved, strict=True)) > 0
            still = all(bool((m == 0).all()) for m in moved)
            last, last_O = x, O
            x, O, penalty = new, new_O, new_penalty
            momentum = grown
            if uphill or still:
                if still and ahead == 0.0:
                    message = "no further decrease could be found in float64"
                    break
                # The momentum points uphill: drop it, and see whether a longer step has become possible.
                last, last_O, momentum = x, O, 1.0
                step *= 1.5
                self.n_restarts += 1
        return self.finish(x, tol, max_rank, message)

    def _majorised(
        self,
        y: list[Tensor],
        O_y: Tensor,
        L: Tensor,
        value: float,
        new: list[Tensor],
        new_O: Tensor,
        step: float,
    ) -> bool:
        """Whether the quadratic model of this step size lies above the loss at the new point."""
        move = [a - b for a, b in zip(new, y, strict=True)]
        size = _dot(move, move)
        change = new_O - O_y
        slope = float((L * change).sum())
        if abs(slope) > NOISE * max(abs(value), 1e-300) / 1e-3:
            return self.loss(new_O) - value - slope <= size / (2.0 * step)
        # Values cannot tell any more; gradients can.
        return float(((self.gradient(new_O) - L) * change).sum()) <= size / step


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((s * t).sum()) for s, t in zip(a, b, strict=True))


def largest_units(factors: Factors, max_rank: int | None) -> Factors:
    """The ``max_rank`` units of largest norm over all blocks; all of them for None."""
    if max_rank is None or factors.n_units <= max_rank:
        return factors
    sizes = torch.cat([each.v.flatten(1).norm(dim=1) for each in factors.units if each.u is not None])
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.argsort(descending=True)[:max_rank]] = True
    parts = iter(kept.split([len(each.v) for each in factors.units if each.u is not None]))
    units = []
    for each in factors.units:
        if each.u is None:
            units.append(each)
            continue
        own = next(parts)
        units.append(Units(each.u[own], each.v[own], None if each.gate is None else each.gate[own]))
    return Factors(units, factors.intercept)


@register("fista")
def solve_fista(
    problem: Problem,
    tol: float = 1e-3,
    max_iter: int = 2000,
    max_rank: int | None = None,
    random_state: int = 0,
    init: Factors | None = None,
    progress: Callable[[dict], None] | None = None,
    prove: bool = True,
    resumed: bool = False,
) -> Solution:
    """Minimise by accelerated proximal gradient on the dense blocks, in float64, with certified gap.

    Parameters
    ----------
    problem : the program, beta included.
    tol : relative duality gap (gap / primal) at which to stop.
    max_iter : proximal steps in all.
    max_rank : largest number of units; the convex program has no such limit, so the smallest units of its optimum are
        dropped and the certificate says what that cost.
    random_state : not used: the method draws nothing.
    init : factors to start from; default: the empty head.
    progress : called with a dict at every check.
    resumed : makes no difference: every solve goes on from ``init``.

    Raises
    ------
    InputError
        If the dense feature matrices would hold more than ``SIZE_LIMIT`` numbers, or several workers share the fit.
    """
    if problem.world.size > 1:
        raise InputError(
            "solver: " + describe(f"'fista' for {problem.world.size} workers", "one process", "Use solver='factored'.")
        )
    size = dense_size(problem)
    if size > SIZE_LIMIT:
        raise InputError(
            "solver: "
            + describe(
                f"'fista' for a problem whose dense feature matrices hold {size:.2g} numbers",
                f"at most {SIZE_LIMIT:.2g}",
                "Use solver='factored', which never forms them.",
            )
        )
    return Fista(problem.in_dtype(torch.float64), progress).run(init, tol, max_iter, max_rank)
