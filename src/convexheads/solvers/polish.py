"""From a tolerance to rounding: what a tiny problem can afford.

At the right rank the factored objective is smooth and, next to a solution, as well behaved as the convex program, so
that plain L-BFGS on the units found reaches the limits of float64 in some hundred evaluations. The result then no
longer depends on where a solver started: weights equal repeated rows, whatever the order of the rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convexheads.certificate import certify_factors, refit_intercept
from convexheads.problem import Problem
from convexheads.solvers.base import Solution
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.units import canonical

STEPS = 1000
PATIENCE = 60
"""Steps without a smaller gradient after which what is left is taken for rounding."""


def polish(problem: Problem, solution: Solution, steps: int = STEPS) -> Solution:
    """A solution of the same problem whose gradient is rounding, or the given one where that is no worse.

    Parameters
    ----------
    problem, solution : the program and a solution near its optimum, whose units are all kept.
    steps : most L-BFGS iterations.
    """
    problem = problem.in_dtype(torch.float64)
    factors = solution.factors.to(torch.float64)

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        return problem.flat_value_and_gradient(factors, x)

    optimiser = LBFGS(evaluate, factors.flat(), 1e-14)
    decay = factors.like(torch.zeros_like(optimiser.x))
    problem.add_decay(factors, decay)
    rounding = 1e-14 * float(decay.flat().norm())
    smallest, since, failures = float(optimiser.gradient.norm()), 0, 0
    for _ in range(steps):
        if smallest <= rounding or (since > PATIENCE and smallest <= 1e6 * rounding):
            break
        failures = 0 if optimiser.step() else failures + 1
        if failures > 1:
            break
        since += 1
        size = float(optimiser.gradient.norm())
        if size < 0.9 * smallest:
            smallest, since = size, 0
    slim, _ = canonical(problem, factors.like(optimiser.x), 0.0)
    slim, _ = refit_intercept(problem, slim)
    certificate = certify_factors(problem, slim)
    if not certificate.gap <= solution.certificate.gap:
        return solution
    return replace(solution, factors=slim, certificate=certificate)
