"""Newton steps along the singular pairs above beta: what they bring back, and that solves end with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract_cases import HEADS, NUCLEAR, Case, float32_problem, make_setting, random_units
from convexheads.certificate import dual_point
from convexheads.memory import Budget
from convexheads.problem import Problem
from convexheads.solvers import correction, factored, solver_function
from convexheads.solvers.correction import ACCURACY, Correction, corrected
from convexheads.subspace import BlockSubspace, SingularPair, rough_beta_max
from convexheads.types import Factors

every_case = pytest.mark.parametrize("case", NUCLEAR, ids=str)
LAST = (Case("self_attention", s=4, d=4, c=5), Case("linear", s=4, d=4, c=5))
every_head = pytest.mark.parametrize("heads", [*HEADS, LAST], ids=lambda heads: "+".join(map(str, heads)))


def settled(problem: Problem, most: int = 6) -> Factors:
    """Factors near enough to an optimum for few singular values to be above beta."""
    return solver_function("factored")(problem, tol=1e-9, max_iter=most, prove=False).factors.to(problem.dtype)


def above(problem: Problem, O: Tensor) -> list[SingularPair]:
    L = dual_point(problem, O)
    return BlockSubspace(problem, torch.Generator().manual_seed(0)).top_pairs(L, 6, 12)[1]


def excesses(problem: Problem, O: Tensor, pairs: list[SingularPair]) -> Tensor:
    """U^T (A_g^* L) V - beta w I of the pairs of every block, at outputs O, in one vector."""
    L = dual_point(problem, O)
    found = []
    for k, component in enumerate(problem.components):
        for gate in [] if component.ridge else problem.gates_of(k):
            own = [pair for pair in pairs if (pair.component, pair.gate) == (k, gate)]
            if own:
                u, v = torch.stack([pair.u for pair in own]), torch.stack([pair.v for pair in own])
                corner = u.double() @ problem.gamma(L, k, gate) @ v.double().mT
                corner.diagonal().sub_(problem.penalty_weight(component))
                found.append(corner.flatten())
    return torch.cat(found)


def prepared(heads: tuple[Case, ...], loss: str) -> tuple[Problem, Factors, list[SingularPair]]:
    problem = make_setting(*(replace(head, loss=loss, n=200) for head in heads)).problem
    problem = problem.with_beta(0.3 * rough_beta_max(problem))
    factors = settled(problem)
    pairs = above(problem, problem.forward(factors))
    assert pairs
    return problem, factors, pairs


@every_head
def test_of_a_quadratic_loss_all_of_the_excess_goes(heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    problem, factors, pairs = prepared(heads, "squared")
    O = problem.forward(factors)
    before = excesses(problem, O, pairs)
    after = excesses(problem, problem.forward(corrected(problem, factors, O, pairs)), pairs)
    assert float(after.norm()) <= 1.5 * ACCURACY * float(before.norm())
    monkeypatch.setattr(correction, "ACCURACY", 1e-9)
    monkeypatch.setattr(correction, "STEPS", 200)
    P = problem.forward(corrected(problem, factors, O, pairs))
    assert float(excesses(problem, P, pairs).norm()) <= 1e-7 * float(before.norm())
    if problem.fit_intercept:
        slope = dual_point(problem, P).reshape(-1, problem.outputs).sum(0)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0.0, atol=1e-8)


@every_head
@pytest.mark.parametrize("loss", ["cross_entropy", "multilabel_logistic"])
def test_of_other_losses_nearly_all_goes(heads: tuple[Case, ...], loss: str) -> None:
    problem, factors, pairs = prepared(heads, loss)
    before = excesses(problem, problem.forward(factors), pairs)
    after = excesses(problem, problem.forward(corrected(problem, factors, problem.forward(factors), pairs)), pairs)
    assert float(after.norm()) <= 0.5 * float(before.norm())


@every_case
def test_the_equations_are_symmetric_and_positive(case: Case) -> None:
    problem = make_setting(replace(case, loss="cross_entropy", c=4, n=20), beta=1e-3).problem
    O = problem.forward(random_units(problem, 1))
    pairs = above(problem, O)
    equations = Correction(problem, O, pairs)
    generator = torch.Generator().manual_seed(1)
    masks = [torch.ones_like(E) if m is None else m for E, m in zip(equations.excess, equations.masks, strict=True)]
    inside = torch.cat([*(mask.flatten() for mask in masks), torch.ones(len(equations.inverse))])
    x, y = (inside * torch.randn(len(inside), generator=generator, dtype=O.dtype) for _ in range(2))
    assert len(x)
    assert float(x @ equations.apply(y)) == pytest.approx(float(equations.apply(x) @ y), rel=1e-8)
    assert float(x @ equations.apply(x)) > 0.0


@every_head
def test_chunks_add_up_whether_features_are_kept_or_not(
    heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, factors, pairs = prepared(heads, "cross_entropy")
    O = problem.forward(factors)
    whole = problem.forward(corrected(problem, factors, O, pairs))
    monkeypatch.setattr(Problem, "pass_rows", lambda self, *args, **kwargs: 7)
    torch.testing.assert_close(problem.forward(corrected(problem, factors, O, pairs)), whole, rtol=1e-8, atol=1e-9)
    monkeypatch.setattr(Budget, "roomy", property(lambda self: False))
    assert Correction(problem, O, pairs).kept is None
    torch.testing.assert_close(problem.forward(corrected(problem, factors, O, pairs)), whole, rtol=1e-8, atol=1e-9)


def test_small_units_are_left_out_for_no_more_than_is_allowed() -> None:
    problem, factors, pairs = prepared(HEADS[0], "cross_entropy")
    O = problem.forward(factors)
    whole = corrected(problem, factors, O, pairs)
    drop = 1e-2 * problem.value(whole)
    fewer = corrected(problem, factors, O, pairs, drop)
    assert 0 < fewer.n_units < whole.n_units
    assert problem.value(fewer) <= problem.value(whole) + drop


def test_of_many_pairs_the_largest_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, factors, pairs = prepared(HEADS[1], "squared")
    monkeypatch.setattr(correction, "MOST_PAIRS", 2)
    equations = Correction(problem, problem.forward(factors), pairs)
    weights = [problem.penalty_weight(component) for component in problem.components]
    largest = sorted((pair.sigma / weights[pair.component] for pair in pairs), reverse=True)
    assert len(pairs) > 2
    taken = [
        float(value) / weight + 1.0
        for E, weight in zip(equations.excess, weights, strict=True)
        for value in E.diagonal()
    ]
    assert sorted(taken, reverse=True) == pytest.approx(largest[:2])


def classified(activation: str) -> Problem:
    """Self-attention on few samples in float32, at a tenth of beta_max."""
    problem = float32_problem(Case("self_attention", activation, s=5, d=6, c=8, n=300, loss="cross_entropy"))
    return problem.with_beta(0.1 * rough_beta_max(problem))


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_a_solve_ends_with_it(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def solve() -> tuple[int, list[float]]:
        problem = classified(activation)
        solution = solver_function("factored")(problem, tol=1e-3)
        assert solution.converged
        assert solution.certificate.certified
        return solution.n_iter, list(solution.history.gap)

    taken, gaps = solve()
    assert len(gaps) > 1
    # The last gap is that of the same iterate as the one before.
    assert gaps[-1] < 0.6 * gaps[-2]
    assert gaps[-2] > 1e-3
    monkeypatch.setattr(factored.Factored, "correctable", lambda self, target: 0.0)
    without, _ = solve()
    assert taken < without


def test_a_correction_of_no_use_is_not_tried_again_at_the_same_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    closed = factored.Factored.correct

    def watch(self: factored.Factored, seen: factored.Look, target: float) -> factored.Look | None:
        if target < seen.bound.relative_gap <= self.correctable(target):
            tried.append(seen.bound.relative_gap)
        return closed(self, seen, target)

    monkeypatch.setattr(factored.Factored, "correct", watch)
    # What comes back is what went in.
    monkeypatch.setattr(factored, "corrected", lambda problem, factors, O, pairs, drop: factors)
    problem = classified("linear")
    solution = solver_function("factored")(problem, tol=1e-3)
    assert solution.converged
    assert len(tried) == 1


def test_no_more_units_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = classified("linear")
    full = solver_function("factored")(problem, tol=1e-3).factors.n_units
    seen: list[int] = []
    refit = factored.Factored.refit

    def watch(self: factored.Factored, factors: Factors, dtype: torch.dtype) -> tuple[Factors, Tensor]:
        seen.append(factors.n_units)
        return refit(self, factors, dtype)

    monkeypatch.setattr(factored.Factored, "refit", watch)
    solver_function("factored")(problem, tol=1e-3, max_rank=full)
    assert seen
    assert max(seen) <= full
