"""Solvers by name. Importing this package registers all of them."""

from convexheads.solvers import factored, fista, training
from convexheads.solvers.base import SOLVERS, Solution, Solver, register, solver_function

__all__ = ["SOLVERS", "Solution", "Solver", "factored", "fista", "register", "solver_function", "training"]
