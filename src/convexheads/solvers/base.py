"""What a solver returns, and the registry of solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from convexheads.certificate import Certificate
from convexheads.errors import InputError, describe
from convexheads.types import Factors, History


@dataclass
class Solution:
    """Factors, the certificate they were given, and how they were found.

    ``converged`` says whether the relative gap reached the tolerance; ``message`` says why the solver stopped and,
    if it stopped early, what to change. ``stats`` holds solver-specific counts.
    """

    factors: Factors
    certificate: Certificate
    history: History
    n_iter: int
    converged: bool
    message: str
    stats: dict[str, Any] = field(default_factory=dict)


Solver = Callable[..., Solution]
SOLVERS: dict[str, Solver] = {}


def register(name: str) -> Callable[[Solver], Solver]:
    """Make a solver known by ``name``; this also enrols it in the contract tests.

    A solver is called as ``solver(problem, tol=, max_iter=, max_rank=, random_state=, init=, progress=, prove=,
    resumed=)`` and returns a :class:`Solution`. It may prove more than ``prove`` asks for, never less. ``resumed`` says
    that ``init`` is where a solve of the same problem stopped; ``progress`` gets a dict with ``iteration``,
    ``objective``, ``gap``, ``rank``, ``seconds`` and ``factors``.
    """

    def add(solver: Solver) -> Solver:
        SOLVERS[name] = solver
        return solver

    return add


def solver_function(name: str) -> Solver:
    """The solver registered under ``name``; raises InputError for an unknown one."""
    if not isinstance(name, str) or name not in SOLVERS:
        raise InputError("solver: " + describe(repr(name), "one of " + ", ".join(sorted(SOLVERS))))
    return SOLVERS[name]
