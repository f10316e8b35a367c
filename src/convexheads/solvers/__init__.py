"""Solvers by name. Importing this package registers all of them."""

from convexheads.solvers import factored, fista
from convexheads.solvers.base import SOLVERS, Solution, register, solver_function

__all__ = ["SOLVERS", "Solution", "factored", "fista", "register", "solver_function"]
