"""The default solver: works on the factors u, v and certifies through the convex program.

Too few units are the only way in which the factored objective can stall above the optimum (Haeffele and Vidal
2015): then some block has a singular value of A_g^* L above beta w_g, and its singular vectors are units that
decrease the objective. The solver alternates preconditioned L-BFGS on the factors with a check of the gap that
finds such vectors, adds them, and stops at a proved gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from convexheads.certificate import (
    Certificate,
    certify_factors,
    dual_point,
    penalty,
    refit_intercept,
    rescaled_bound,
)
from convexheads.problem import Problem
from convexheads.solvers.base import Solution, register
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.spectral import balanced_factors
from convexheads.subspace import BlockSubspace, SingularPair
from convexheads.types import Factors, History, Interval, Units

REBUILD = 20
"""Iterations between two preconditioners."""


def start_scale(problem: Problem, units: int) -> float:
    """Typical ||u_j|| at the optimum: beta sum ||u_j||^2 is a fair part of the loss at zero."""
    loss = problem.null_loss()
    return math.sqrt(0.3 * max(loss, 1e-12) / (problem.beta * max(1, units)))


def initial_units(problem: Problem, max_rank: int | None) -> list[int]:
    """Units a gate for each component: all of them where that is cheap, else a first guess."""
    found = []
    for component in problem.components:
        full = 1 if component.ridge else min(component.p, component.q)
        if full * component.n_gates * problem.n * component.form.workspace <= 4e6:
            count = full
        else:
            count = min(full, max(4, 32 // component.n_gates))
        found.append(count if max_rank is None else min(count, max(1, max_rank // component.n_gates)))
    return found


def random_factors(problem: Problem, counts: list[int], generator: torch.Generator, dtype: torch.dtype) -> Factors:
    """Small random units, scaled so that no setting depends on the scale of tokens or beta."""
    total = sum(n * c.n_gates for n, c in zip(counts, problem.components, strict=True) if not c.ridge)
    norm = 0.18 * start_scale(problem, total)
    units = []
    for count, component in zip(counts, problem.components, strict=True):
        k, c = component.form.value_width, component.width
        if component.ridge:
            units.append(Units(None, torch.zeros(1, k, c, dtype=dtype, device=problem.device)))
            continue
        m = count * component.n_gates
        scale = norm / math.sqrt(component.weight)
        u = torch.randn(m, *component.form.u_shape, generator=generator, dtype=torch.float64)
        v = torch.randn(m, k, c, generator=generator, dtype=torch.float64)
        gate = None
        if component.gates is not None:
            gate = torch.arange(component.n_gates, device=problem.device).repeat_interleave(count)
        units.append(
            Units(
                (u * (scale / math.sqrt(component.p))).to(problem.device, dtype),
                (v * (scale / math.sqrt(component.q))).to(problem.device, dtype),
                gate,
            )
        )
    _, b = problem.null_outputs()
    return Factors(units, None if b is None else b.to(dtype))


def canonical(problem: Problem, factors: Factors, drop: float) -> tuple[Factors, list[Tensor]]:
    """Balanced, orthogonal units of every block; the smallest are dropped.

    ``drop`` bounds beta w sum of the singular values dropped over all blocks: the objective rises by less, to second
    order, because at the optimum the loss falls by as much as the penalty rises.
    """
    parts = []
    tails: list[tuple[float, int, int]] = []
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        if units.u is None:
            continue
        for g in problem.gates_of(k):
            own = slice(None) if units.gate is None else units.gate == g
            u, v = units.u[own].double().flatten(1), units.v[own].double().flatten(1)
            if not len(u):
                continue
            u, v, sigma = balanced_factors(u, v)
            parts.append((k, g, u, v, sigma))
            weight = problem.penalty_weight(component)
            tails += [(weight * float(s), len(parts) - 1, r) for r, s in enumerate(sigma)]
    keep = [len(part[4]) for part in parts]
    spent = 0.0
    for cost, which, rank in sorted(tails):
        spent += cost
        if spent > drop and cost > 0:
            break
        keep[which] = min(keep[which], rank)
    found: list[Units] = []
    spectra: list[Tensor] = []
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        if units.u is None:
            found.append(units)
            continue
        own_parts = [(part, keep[i]) for i, part in enumerate(parts) if part[0] == k]
        shape_v = (component.form.value_width, component.width)
        us = [part[2][:r].view(-1, *component.form.u_shape) for part, r in own_parts]
        vs = [part[3][:r].view(-1, *shape_v) for part, r in own_parts]
        gates = [torch.full((r,), part[1], device=problem.device) for part, r in own_parts if part[1] is not None]
        dtype = units.v.dtype
        empty_u = units.u.new_zeros(0, *component.form.u_shape)
        u = torch.cat(us).to(dtype) if us else empty_u
        v = torch.cat(vs).to(dtype) if vs else units.v.new_zeros(0, *shape_v)
        gate = None
        if component.gates is not None:
            gate = torch.cat(gates) if gates else torch.zeros(0, dtype=torch.long, device=problem.device)
        found.append(Units(u, v, gate))
        spectra += [part[4][:r] for part, r in own_parts]
    return Factors(found, factors.intercept), spectra


class Factored:
    """State of one solve."""

    def __init__(
        self,
        problem: Problem,
        tol: float,
        max_iter: int,
        max_rank: int | None,
        random_state: int,
        progress: Callable[[dict], None] | None,
    ) -> None:
        self.problem, self.tol, self.max_iter, self.max_rank = problem, tol, max_iter, max_rank
        self.generator = torch.Generator().manual_seed(random_state)
        self.progress = progress
        self.history = History()
        self.start = time.perf_counter()
        self.n_iter = 0
        self.n_proofs = 0
        self.subspace = BlockSubspace(problem, self.generator)

    # Estimates between proofs -----------------------------------------------------------------------------

    def estimate(self, factors: Factors, subspace: int = 4, rounds: int = 6) -> tuple[Certificate, list[SingularPair]]:
        """Gap with singular values from below (never a claim), and the singular pairs above beta."""
        problem = self.problem
        refitted, O = self.refit(factors)
        targets, weights = problem.targets_of(slice(0, problem.n), torch.float64)
        primal = problem.loss.value(O, targets, weights) + penalty(problem, refitted)
        L = dual_point(problem, O)
        sigma, pairs, ridge = self.subspace.top_pairs(L.to(problem.dtype), subspace, rounds)
        bound = rescaled_bound(
            problem, O, L, Interval(sigma, sigma, "estimate", False), ridge, primal, refitted.intercept
        )
        return bound, pairs

    def refit(self, factors: Factors) -> tuple[Factors, Tensor]:
        """Intercept solved for outputs in the iteration's dtype."""
        problem = self.problem
        O = problem.forward(factors, factors.tensors()[0].dtype).double()
        factors = factors.to(torch.float64)
        if factors.intercept is None:
            return factors, O
        bare = O - factors.intercept
        b = problem.best_intercept(bare, factors.intercept)
        return Factors(factors.units, b), bare + b

    # Units ------------------------------------------------------------------------------------------------

    def add_units(self, factors: Factors, pairs: list[SingularPair]) -> Factors:
        """Append singular pairs above beta as units, with the step of a one-dimensional Newton model each."""
        problem = self.problem
        dtype = factors.tensors()[0].dtype
        targets, weights = problem.targets_of(slice(0, problem.n), dtype)
        O = problem.forward(factors, dtype)
        units = []
        for k, (component, old) in enumerate(zip(problem.components, factors.units, strict=True)):
            own = [pair for pair in pairs if pair.component == k]
            if old.u is None or not own:
                units.append(old)
                continue
            u = torch.stack([pair.u for pair in own]).to(dtype).view(-1, *component.form.u_shape)
            v = torch.stack([pair.v for pair in own]).to(dtype)
            v = v.view(-1, component.form.value_width, component.width)
            gate = None
            if component.gates is not None:
                gate = torch.tensor([pair.gate for pair in own], device=problem.device)
            sizes = []
            for i, pair in enumerate(own):
                single = Units(u[i : i + 1], v[i : i + 1], None if gate is None else gate[i : i + 1])
                move = self._component_outputs(k, single, dtype)
                curvature = float((move * problem.loss.hessian_product(O, targets, weights, move)).sum())
                excess = pair.sigma - problem.penalty_weight(component)
                sizes.append(excess / max(curvature, 1e-30) / len(own))
            root = torch.tensor(sizes, dtype=dtype, device=problem.device).sqrt()
            # -L is the descent direction: the unit is -u v^T.
            new_u = -u * root.view(-1, *[1] * (u.ndim - 1))
            new_v = v * root.view(-1, 1, 1)
            merged_u, merged_v = torch.cat([old.u, new_u]), torch.cat([old.v, new_v])
            merged_gate = None
            if gate is not None and old.gate is not None:
                merged_gate, order = torch.sort(torch.cat([old.gate, gate]), stable=True)
                merged_u, merged_v = merged_u[order], merged_v[order]
            units.append(Units(merged_u, merged_v, merged_gate))
        return Factors(units, factors.intercept)

    def _component_outputs(self, k: int, units: Units, dtype: torch.dtype) -> Tensor:
        problem, component = self.problem, self.problem.components[k]
        O = torch.zeros(problem.targets.shape, dtype=dtype, device=problem.device)
        for index, stats in problem.chunks(dtype, 1):
            rows = component.forward(component.features(stats[k], units), units.v)
            O[index][..., component.outputs] = rows.view(*O[index].shape[:-1], component.width)
        return O

    # The solve --------------------------------------------------------------------------------------------

    def optimiser(self, factors: Factors, dtype: torch.dtype) -> tuple[LBFGS, Factors]:
        factors = factors.to(dtype)

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            value, gradient = self.problem.value_and_gradient(factors.like(x))
            return value, gradient.flat()

        noise = 2e-7 if dtype == torch.float32 else 1e-14
        return LBFGS(evaluate, factors.flat(), noise), factors

    def report(self, objective: float, gap: float, rank: int) -> None:
        seconds = time.perf_counter() - self.start
        self.history.append(objective, gap, seconds, rank)
        if self.progress is not None:
            self.progress(
                {
                    "iteration": self.n_iter,
                    "objective": objective,
                    "gap": gap,
                    "rank": rank,
                    "seconds": seconds,
                }
            )

    def run(self, factors: Factors) -> Solution:
        problem, dtype = self.problem, self.problem.dtype
        optimiser, shapes = self.optimiser(factors, dtype)
        target = 0.8 * self.tol
        check_at, seconds_checking, since = 0, 0.0, time.perf_counter()
        last_built = -REBUILD
        stalls = 0
        message = f"max_iter = {self.max_iter} reached"
        while True:
            current = shapes.like(optimiser.x)
            moved = True
            if self.n_iter >= check_at:
                began = time.perf_counter()
                bound, pairs = self.estimate(current)
                slim, _ = canonical(problem, current, 0.0)
                self.report(bound.primal, bound.relative_gap, slim.n_units)
                if bound.relative_gap <= target:
                    solution = self.prove(current)
                    if solution is not None:
                        return solution
                    target *= 0.7
                seconds_checking = time.perf_counter() - began
                since = time.perf_counter()
                check_at = self.n_iter + 5
                grown = self.grow(current, pairs, bound)
                if grown is not None:
                    optimiser, shapes = self.optimiser(grown, optimiser.x.dtype)
                    last_built = -REBUILD
            if self.n_iter >= self.max_iter:
                break
            if self.n_iter - last_built >= REBUILD:
                inverse = Preconditioner(problem, shapes.like(optimiser.x), self.generator)
                like = shapes
                optimiser.set_inverse(lambda g, inverse=inverse, like=like: inverse.apply(like.like(g)).flat())
                last_built = self.n_iter
            moved = optimiser.step()
            self.n_iter += 1
            if check_at <= self.n_iter and time.perf_counter() - since < 1.5 * seconds_checking:
                check_at = self.n_iter + 1
            if not moved:
                stalls += 1
                if optimiser.x.dtype == torch.float32:
                    # float32 has no more digits to give: go on in float64.
                    problem = self.problem = problem.in_dtype(torch.float64)
                    optimiser, shapes = self.optimiser(shapes.like(optimiser.x), torch.float64)
                    last_built = -REBUILD
                elif stalls > 3:
                    message = "no further decrease could be found in float64"
                    break
                else:
                    last_built = -REBUILD
                check_at = self.n_iter
        return self.finish(shapes.like(optimiser.x), message)

    def grow(self, factors: Factors, pairs: list[SingularPair], bound: Certificate) -> Factors | None:
        """More units where singular vectors lie above beta and the present units are all in use."""
        if not pairs:
            return None
        slim, _ = canonical(self.problem, factors, 1e-4 * self.tol * bound.primal)
        wanted = []
        for k, (component, full, small) in enumerate(
            zip(self.problem.components, factors.units, slim.units, strict=True)
        ):
            for g in self.problem.gates_of(k):
                own = [p for p in pairs if p.component == k and p.gate == g]
                if not own:
                    continue
                used = len(small.v) if g is None else int((small.gate == g).sum())
                room = min(component.p, component.q) - used
                if self.max_rank is not None:
                    room = min(room, self.max_rank - slim.n_units)
                if used >= (len(full.v) if g is None else int((full.gate == g).sum())) and room > 0:
                    wanted += own[:room]
        if not wanted:
            return None
        return self.add_units(factors, wanted)

    def prove(self, factors: Factors) -> Solution | None:
        """The certified solution if the proof confirms the tolerance, else None."""
        self.n_proofs += 1
        found = self.finish(factors, "the relative gap reached tol")
        return found if found.converged else None

    def finish(self, factors: Factors, message: str) -> Solution:
        problem = self.problem
        value = problem.value(factors)
        slim, _ = canonical(problem, factors.to(torch.float64), 0.02 * self.tol * abs(value))
        slim, _ = refit_intercept(problem, slim)
        certificate = certify_factors(problem, slim)
        return Solution(
            slim,
            certificate,
            self.history,
            self.n_iter,
            certificate.relative_gap <= self.tol,
            message,
            {"proofs": self.n_proofs},
        )


@register("factored")
def solve_factored(
    problem: Problem,
    tol: float = 1e-3,
    max_iter: int = 2000,
    max_rank: int | None = None,
    random_state: int = 0,
    init: Factors | None = None,
    progress: Callable[[dict], None] | None = None,
) -> Solution:
    """Minimise by preconditioned L-BFGS on the factors, with certified gap.

    Parameters
    ----------
    problem : the program, beta included.
    tol : relative duality gap (gap / primal) at which to stop.
    max_iter : iterations of L-BFGS in all.
    max_rank : largest number of units, None for no limit beyond the mathematics.
    random_state : seed; the result is a function of it.
    init : factors to start from, such as those of a larger beta or of a trained network.
    progress : called with a dict at every check.
    """
    state = Factored(problem, tol, max_iter, max_rank, random_state, progress)
    if init is None:
        init = random_factors(problem, initial_units(problem, max_rank), state.generator, problem.dtype)
    return state.run(init)
