"""Products of differences: exact at their reference, near it elsewhere, and solves by them end where others do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from contract_cases import Case, float32_problem, random_units
from convexheads.memory import ROOMY, Budget, FileRows
from convexheads.problem import Problem
from convexheads.solvers import differences, factored, solver_function, warmup
from convexheads.solvers.differences import Differences, fits, kept_parts
from convexheads.solvers.units import join_units, placements
from convexheads.subspace import BlockSubspace
from convexheads.types import Factors

LOW = torch.bfloat16
ONE = [(Case("self_attention"),), (Case("mixer"),)]
HEADS = [*ONE, (Case("self_attention"), Case("mixer", weight=2.0)), (Case("mixer", intercept=False),)]
LOSSES = ["squared", "cross_entropy", "multilabel_logistic"]


def problem_of(heads: tuple[Case, ...], loss: str = "cross_entropy", n: int = 200, beta: float = 0.02) -> Problem:
    return float32_problem(*(replace(head, n=n, loss=loss) for head in heads), beta=beta)


def start(problem: Problem) -> tuple[Factors, torch.Tensor, torch.Tensor]:
    """Random factors, their variables, and a random move of these."""
    shapes = random_units(problem).to(torch.float32)
    x = shapes.flat()
    return shapes, x, torch.randn(len(x), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "+".join(map(str, heads)))
def test_errors_are_a_share_of_the_change(heads: tuple[Case, ...], loss: str) -> None:
    problem = problem_of(heads, loss)
    shapes, x, move = start(problem)
    evaluate = Differences(problem, shapes, LOW)
    value, gradient = evaluate(x)
    exact_value, exact = problem.flat_value_and_gradient(shapes, x)
    assert value == exact_value
    assert torch.equal(gradient, exact)
    for size in (0.1, 0.01, 0.001):
        evaluate.stale = False
        y = x + size * move
        value, gradient = evaluate(y)
        there_value, there = problem.flat_value_and_gradient(shapes, y)
        assert 0 < float((gradient - there).norm()) < 0.01 * float((there - exact).norm())
        assert value == pytest.approx(there_value, abs=0.005 * size * float(exact.norm() * move.norm()))
    assert evaluate.rough == 3


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "+".join(map(str, heads)))
def test_more_units_are_zero_at_the_reference(heads: tuple[Case, ...]) -> None:
    """A reference serves units that came later: no exact evaluation, and errors are a share of the change from it."""
    problem = problem_of(heads)
    shapes, x, move = start(problem)
    evaluate = Differences(problem, shapes, LOW)
    evaluate(x)
    more = random_units(problem, 2, seed=4).to(torch.float32)
    joined = [join_units(old, new) for old, new in zip(shapes.units, more.units, strict=True)]
    larger = Factors(joined, shapes.intercept)
    old, _ = placements(shapes, larger)
    evaluate.extend(old, larger)
    evaluate.stale = False
    base = old.put(x[None])[0]
    value, there = evaluate(base)
    exact_value, exact = problem.flat_value_and_gradient(larger, base)
    assert value == pytest.approx(exact_value, rel=1e-6)
    torch.testing.assert_close(there, exact, rtol=1e-4, atol=1e-5 * float(exact.norm()))
    for size in (0.1, 0.01):
        evaluate.stale = False
        y = base + size * (larger.flat() - base) + old.put(size * move[None])[0]
        _, there = evaluate(y)
        _, expected = problem.flat_value_and_gradient(larger, y)
        assert 0 < float((there - expected).norm()) < 0.01 * float((expected - exact).norm())
    assert evaluate.exact == 1


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(ONE[0])
    shapes, x, move = start(problem)
    whole = Differences(problem, shapes, LOW)
    whole(x)
    _, expected = whole(x + 0.01 * move)
    monkeypatch.setattr(Problem, "pass_rows", lambda self, dtype, *args, **kwargs: 7 if dtype == LOW else 11)
    parts = Differences(problem, shapes, LOW)
    parts(x)
    torch.testing.assert_close(parts(x + 0.01 * move)[1], expected, rtol=1e-3, atol=1e-4)
    assert (parts.exact, parts.rough) == (1, 1)


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "+".join(map(str, heads)))
def test_statistics_and_features_in_files_are_those_in_memory(
    heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(heads)
    shapes, x, move = start(problem)
    whole = Differences(problem, shapes, LOW)
    expected = [whole(x), whole(x + 0.01 * move)]
    problem.forget()
    problem.budget, problem.cache_bytes = Budget.of(ROOMY), 1
    monkeypatch.setattr(Budget, "chunk", lambda self, fixed: 3000)
    evaluate = Differences(problem, shapes, LOW)
    found = [evaluate(x), evaluate(x + 0.01 * move)]
    assert (evaluate.exact, evaluate.rough) == (1, 1)
    assert all(isinstance(each.rows, FileRows) for each in evaluate.features)
    assert len(list(kept_parts(problem, evaluate.features))) > 1
    assert all(isinstance(t, FileRows) for dtype in (LOW, torch.float32) for s in problem._cache[dtype] for t in s)
    for (value, gradient), (there, exact) in zip(found, expected, strict=True):
        assert value == pytest.approx(there, rel=1e-5)
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4)


def test_a_new_reference_where_the_gradient_has_changed_by_far_more_than_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = problem_of(ONE[0])
    shapes, x, move = start(problem)
    evaluate = Differences(problem, shapes, LOW)
    evaluate(x)
    evaluate(x + 1e-3 * move)
    assert not evaluate.stale
    monkeypatch.setattr(differences, "FAR", 0.0)
    evaluate(x + 1e-3 * move)
    assert evaluate.stale
    value, gradient = evaluate(x + move)
    assert (evaluate.exact, evaluate.rough, evaluate.stale) == (2, 2, False)
    exact_value, exact = problem.flat_value_and_gradient(shapes, x + move)
    assert value == exact_value
    assert torch.equal(gradient, exact)


def test_what_was_freed_is_made_again_or_done_without() -> None:
    problem = problem_of(ONE[1])
    shapes, x, move = start(problem)
    evaluate = Differences(problem, shapes, LOW)
    evaluate(x)
    evaluate.release()
    problem.forget(LOW)
    assert LOW not in problem._cache
    evaluate(x)
    evaluate(x + 0.01 * move)
    assert (evaluate.exact, evaluate.rough) == (2, 1)
    problem.forget(LOW)
    evaluate(x + 0.01 * move)
    # Statistics in low precision come from exact ones, and so are the same.
    assert (evaluate.exact, evaluate.rough) == (2, 2)
    problem.forget(LOW)
    problem.cache_bytes = 1
    value, gradient = evaluate(x + 0.01 * move)
    assert (evaluate.exact, evaluate.rough) == (3, 2)
    exact_value, exact = problem.flat_value_and_gradient(shapes, x + 0.01 * move)
    assert value == exact_value
    assert torch.equal(gradient, exact)


def test_features_are_only_kept_where_there_is_room() -> None:
    problem = problem_of(ONE[0], n=50)
    shapes, _, _ = start(problem)
    numbers = 50 * len(shapes.units[0].v) * problem.components[0].form.value_width
    for room, there in ((2 * numbers, True), (2 * numbers - 1, False)):
        problem.cache_bytes = room
        assert fits(problem, shapes, LOW) == there


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[Differences]:
    """Low precision on any device and for any size; all the differences that solves then make."""
    monkeypatch.setattr(warmup, "LARGE_WORK", 0.0)
    monkeypatch.setattr(warmup, "low_precision", lambda device: LOW)
    made: list[Differences] = []
    original = Differences.__init__

    def watched(self: Differences, *args: Any) -> None:
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(Differences, "__init__", watched)
    return made


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "+".join(map(str, heads)))
def test_solves_end_where_others_do(
    heads: tuple[Case, ...], loss: str, everywhere: list[Differences], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(heads, loss, 300)
    found = solver_function("factored")(problem, tol=1e-4)
    assert found.converged
    assert found.certificate.certified
    # Most evaluations were not exact, and nothing is left behind.
    assert sum(each.rough for each in everywhere) > 2 * sum(each.exact for each in everywhere)
    assert LOW not in problem._cache
    assert not any(each.features for each in everywhere)
    everywhere.clear()
    monkeypatch.setattr(warmup, "low_precision", lambda device: None)
    full = solver_function("factored")(problem, tol=1e-4)
    assert not everywhere
    assert found.certificate.primal == pytest.approx(full.certificate.primal, rel=2e-4)
    assert found.n_iter < 2 * full.n_iter + 20


def test_a_tolerance_beyond_float32_is_reached_in_float64(everywhere: list[Differences]) -> None:
    problem = problem_of(ONE[0], n=60, beta=0.1)
    found = solver_function("factored")(problem, tol=1e-9)
    assert everywhere
    assert found.converged
    assert found.certificate.relative_gap <= 1e-9


def test_a_line_search_that_struggles_gets_a_new_reference(
    everywhere: list[Differences], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that finds nothing at the reference itself goes on without differences."""
    problem = problem_of(ONE[0], n=300)
    first = solver_function("factored")(problem, tol=1e-3, random_state=1)
    usual = len(everywhere)
    everywhere.clear()
    monkeypatch.setattr(factored, "STRUGGLE", 0)
    again = solver_function("factored")(problem, tol=1e-3, random_state=1)
    assert again.converged
    assert len(everywhere) >= again.n_iter > usual
    assert again.certificate.primal == pytest.approx(first.certificate.primal, rel=2e-3)
    everywhere.clear()
    monkeypatch.setattr(factored, "STRUGGLE", 3)
    step = factored.LBFGS.step

    def stuck(self: factored.LBFGS) -> bool:
        return step(self) if not isinstance(self.evaluate, Differences) else bool(self.gradient is None)

    monkeypatch.setattr(factored.LBFGS, "step", stuck)
    found = solver_function("factored")(problem, tol=1e-3, random_state=1)
    assert found.converged
    assert sum(each.rough for each in everywhere) == 0
    assert len(everywhere) == 2


def test_without_room_for_features_products_are_exact(
    everywhere: list[Differences], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factored, "fits", lambda *args: False)
    problem = problem_of(ONE[0], n=60)
    assert solver_function("factored")(problem, tol=1e-3).converged
    assert not everywhere


def test_a_warm_start_goes_by_differences_at_once(everywhere: list[Differences]) -> None:
    problem = problem_of(ONE[0], n=300)
    first = solver_function("factored")(problem, tol=1e-4)
    everywhere.clear()
    again = solver_function("factored")(problem.with_beta(0.5 * problem.beta), tol=1e-4, init=first.factors)
    assert again.converged
    assert everywhere[0].exact > 0


@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "+".join(map(str, heads)))
def test_adjoints_in_low_precision_have_three_digits(heads: tuple[Case, ...], sides: Any) -> None:
    problem = problem_of(heads)
    units = random_units(problem).to(torch.float32).units
    L = problem.null_gradient().float()
    exact = problem.adjoint(L, units, sides=sides)
    rough = problem.adjoint(L, units, sides=sides, low=LOW)
    for one, other in zip(exact, rough, strict=True):
        for s, t in zip(one.tensors(), other.tensors(), strict=True):
            assert t.dtype == torch.float32
            assert float((t - s).norm()) <= 0.01 * float(s.norm())
    assert any(not torch.equal(one.v, other.v) or sides == "left" for one, other in zip(exact, rough, strict=True))
    # Where statistics cannot be rounded nothing is.
    problem.forget(LOW)
    problem.cache_bytes = 1
    again = problem.adjoint(L, units, sides=sides, low=LOW)
    for one, other in zip(exact, again, strict=True):
        for s, t in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(t, s)


def test_only_rough_looks_search_in_low_precision(
    everywhere: list[Differences], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at what is returned: of the precisions asked for there is one from which on products are rounded."""
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    asked: list[tuple[float, bool]] = []
    original = factored.Factored.measure

    def watched(self: factored.Factored, refitted: Factors, O: torch.Tensor, search: factored.Search) -> object:
        asked.append((search.precision, search.low is not None))
        return original(self, refitted, O, search)

    monkeypatch.setattr(factored.Factored, "measure", watched)
    problem = problem_of(ONE[0], n=300)
    found = solver_function("factored")(problem, tol=1e-4)
    assert found.converged
    assert {low for precision, low in asked if precision < factored.LOW_SEARCH} == {False}
    assert {low for precision, low in asked if precision >= factored.LOW_SEARCH} == {True}
    assert not asked[-1][1]
