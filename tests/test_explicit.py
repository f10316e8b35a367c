"""The objective by explicit features: value and gradient of the problem's own, wherever it is used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract_cases import CASES, Case, make_setting, random_units
from convexheads import memory
from convexheads.architectures import ARCHITECTURES
from convexheads.problem import Problem
from convexheads.solvers import explicit, solver_function
from convexheads.solvers.explicit import ExplicitObjective, suits_explicit
from convexheads.types import Factors, Units

LINEAR = [replace(c, gates=1) for c in CASES if not ARCHITECTURES[c.head].ridge and c.activation != "relu"]
SUMS = [
    (Case("self_attention", s=4, d=4, c=5), Case("mixer", s=4, d=4, c=5, weight=2.0)),
    (Case("block_fno", n_blocks=2), Case("mlp", "gated_relu", gates=1, weight=2.0)),
]
LOSSES = ["squared", "cross_entropy", "multilabel_logistic"]


def agrees(problem: Problem, shapes: Factors) -> None:
    x = shapes.flat()
    value, gradient = ExplicitObjective(problem, shapes)(x)
    expected, there = problem.flat_value_and_gradient(shapes, x)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, there, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [*((case,) for case in LINEAR), *SUMS], ids=lambda heads: "+".join(map(str, heads)))
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_are_those_of_the_problem(heads: tuple[Case, ...], loss: str) -> None:
    for intercept in (True, False):
        problem = make_setting(*(replace(head, loss=loss, intercept=intercept) for head in heads)).problem
        assert suits_explicit(problem)
        agrees(problem, random_units(problem, 3))


def test_a_component_may_have_no_units() -> None:
    problem = make_setting(*SUMS[0]).problem
    some = random_units(problem, 2)
    none = Units(some.units[0].u[:0], some.units[0].v[:0])
    agrees(problem, Factors([none, some.units[1]], some.intercept))
    agrees(problem, Factors([none, Units(some.units[1].u[:0], some.units[1].v[:0])], some.intercept))


@pytest.mark.parametrize(
    "heads",
    [(Case("mlp", "gated_relu", gates=2),), (Case("linear"),), (Case("mixer"), Case("linear"))],
    ids=lambda heads: "+".join(map(str, heads)),
)
def test_several_gates_and_ridge_branches_have_none(heads: tuple[Case, ...]) -> None:
    assert not suits_explicit(make_setting(*heads).problem)


def test_features_of_many_samples_are_not_made_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(Case("self_attention", n=30)).problem
    rows, p, k = 30, 16, 4
    monkeypatch.setattr(explicit, "MOST_NUMBERS", rows * p * k)
    assert suits_explicit(problem)
    monkeypatch.setattr(explicit, "MOST_NUMBERS", rows * p * k - 1)
    assert not suits_explicit(problem)


def test_nor_under_a_memory_limit() -> None:
    with memory.limited("64MB"):
        assert not suits_explicit(make_setting(Case("self_attention")).problem)


@pytest.mark.parametrize("case", [Case("self_attention", n=40, loss="cross_entropy"), Case("mixer", n=40)], ids=str)
def test_solves_end_where_others_do(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(case, beta=0.02).problem.in_dtype(torch.float32)
    solve = solver_function("factored")
    used = []
    call = ExplicitObjective.__call__
    monkeypatch.setattr(ExplicitObjective, "__call__", lambda self, x: used.append(x) or call(self, x))
    found = solve(problem, tol=1e-5)
    assert used
    monkeypatch.setattr(explicit, "MOST_NUMBERS", 0)
    other = solve(problem, tol=1e-5)
    assert found.converged
    assert other.converged
    assert found.certificate.primal == pytest.approx(other.certificate.primal, rel=2e-5)
