"""What a solver returns, and the registry of solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from convexheads.certificate import Certificate
from convexheads.errors import InputError, describe
from convexheads.problem import Problem
from convexheads.types import Factors, History


@dataclass
class Solution:
    """Factors, the certificate they were given, and how they were found.

    ``converged`` says whether the relative gap reached the tolerance; ``message`` says why the solver stopped and,
    if it stopped early, what to change. ``advice`` tells what to do about a gap above the tolerance; ``stats`` holds
    what a solver has to say beyond that.
    """

    factors: Factors
    certificate: Certificate
    history: History
    n_iter: int
    converged: bool
    message: str
    stats: dict[str, Any] = field(default_factory=dict)
    advice: str = "Raise max_iter, raise tol, choose a larger beta, or leave max_rank at None"


@dataclass(frozen=True)
class Solver:
    """A registered solver; calling it solves.

    Attributes
    ----------
    name, solve : its name and function.
    promises_tol : False for baselines on the non-convex network, which end where training ends: their solutions are
        certified as well, but need not reach the tolerance.
    options : dataclass of the solver's own options, whose values it checks; None where there are none.
    """

    name: str
    solve: Callable[..., Solution]
    promises_tol: bool = True
    options: type | None = None

    def parse(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The solver's options by name, checked.

        Raises
        ------
        InputError
            For an unknown option, which names the known ones, or a value that cannot be used.
        """
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise InputError("solver_options: " + describe(f"a {type(given).__name__}", "a dict of options, or None"))
        known = [] if self.options is None else [each.name for each in fields(self.options)]
        unknown = sorted(str(name) for name in given if name not in known)
        if unknown:
            allowed = "some of " + ", ".join(known) if known else f"none: {self.name!r} has no options"
            raise InputError("solver_options: " + describe(f"{', '.join(unknown)} for solver={self.name!r}", allowed))
        if self.options is None:
            return {}
        checked = self.options(**given)
        return {name: getattr(checked, name) for name in given}

    def __call__(self, problem: Problem, *, options: Mapping[str, Any] | None = None, **common: Any) -> Solution:
        """Solve ``problem``; ``common`` as in :func:`register`, ``options`` those of this solver."""
        return self.solve(problem, **common, **self.parse(options))


SOLVERS: dict[str, Solver] = {}


def register(
    name: str, promises_tol: bool = True, options: type | None = None
) -> Callable[[Callable[..., Solution]], Callable[..., Solution]]:
    """Make a solver known by ``name``; this also enrols it in the contract tests.

    A solver is called as ``solver(problem, tol=, max_iter=, max_rank=, random_state=, init=, progress=, prove=,
    resumed=)``, with its own ``options`` beside, and returns a :class:`Solution`. It may prove more than ``prove`` asks
    for, never less. ``resumed`` says that ``init`` is where a solve of the same problem stopped; ``progress`` gets a
    dict with ``iteration``, ``objective``, ``gap``, ``rank``, ``seconds`` and ``factors``.
    """

    def add(solve: Callable[..., Solution]) -> Callable[..., Solution]:
        SOLVERS[name] = Solver(name, solve, promises_tol, options)
        return solve

    return add


def solver_function(name: str) -> Solver:
    """The solver registered under ``name``; raises InputError for an unknown one."""
    if not isinstance(name, str) or name not in SOLVERS:
        raise InputError("solver: " + describe(repr(name), "one of " + ", ".join(sorted(SOLVERS))))
    return SOLVERS[name]
