"""Newton steps along the singular pairs above beta and in large units: what they do, and that solves end with them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contract_cases import HEADS, NUCLEAR, Case, float32_problem, make_setting, random_units
from convexheads.bench.problems import make_task, our_problem
from convexheads.certificate import dual_point
from convexheads.memory import Budget
from convexheads.problem import Problem
from convexheads.solvers import correction, factored, solver_function
from convexheads.solvers.correction import ACCURACY, Block, Correction, corrected
from convexheads.solvers.units import canonical, join_units, no_units
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


def with_large_units(case: Case, seed: int = 1) -> tuple[Problem, Correction]:
    problem = make_setting(replace(case, c=4, n=20), beta=1e-3).problem
    factors = random_units(problem, seed)
    O = problem.forward(factors)
    return problem, Correction(problem, O, above(problem, O), factors)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "multilabel_logistic"])
@every_case
def test_the_equations_are_symmetric_and_positive(case: Case, loss: str) -> None:
    problem, equations = with_large_units(replace(case, loss=loss))
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(len(equations.right), generator=generator, dtype=problem.dtype) for _ in range(2))
    assert len(x)
    assert float(x @ equations.apply(y)) == pytest.approx(float(equations.apply(x) @ y), rel=1e-8)
    assert float(x @ equations.apply(x)) > 0.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_numbers_of_a_block_are_the_adjoint_of_its_matrix(symmetric: bool) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    block = Block.of(slice(3, 8), 1.0, like.expand(5) if symmetric else None, like)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(block.size, generator=generator, dtype=torch.float64)
    F = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    S = block.matrix(y)
    assert block.size == (15 if symmetric else 25)
    torch.testing.assert_close(S.square().sum(), y.square().sum())
    torch.testing.assert_close(block.numbers(F) @ y, (F * S).sum((1, 2)))
    assert not symmetric or torch.equal(S, S.mT)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "multilabel_logistic"])
@every_case
def test_few_samples_are_preconditioned_by_the_very_hessian(
    case: Case, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "DAMPING", 0.0)
    problem, equations = with_large_units(replace(case, loss=loss))
    every = torch.eye(len(equations.right), dtype=problem.dtype)
    hessian = torch.stack([equations.apply(each) for each in every])
    found = equations.factor @ equations.factor.mT
    # No more than a millionth of its largest entry is added to the diagonal.
    torch.testing.assert_close(found, hessian, rtol=0.0, atol=4e-6 * float(hessian.diagonal().max()))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "multilabel_logistic"])
@pytest.mark.parametrize("each", [1, 8, 64])
def test_many_samples_are_preconditioned_by_some_of_their_gradients(
    loss: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "ROWS_EACH", each)
    monkeypatch.setattr(correction, "ROWS_EXACT", 0)
    problem = make_setting(Case("self_attention", loss=loss, s=4, d=4, c=5, n=3000), beta=1e-3).problem
    factors = random_units(problem, 2)
    O = problem.forward(factors)
    equations = Correction(problem, O, above(problem, O)[:3])
    every = torch.eye(len(equations.right), dtype=problem.dtype)
    hessian = torch.stack([equations.apply(one) for one in every])
    seen = equations.factor @ equations.factor.mT
    assert float((seen - hessian).norm()) <= 5.0 / each**0.5 * float(hessian.norm())


def test_a_chunk_may_have_none_of_the_samples_that_gradients_are_taken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "ROWS_EACH", 1)
    monkeypatch.setattr(correction, "ROWS_EXACT", 0)
    problem = make_setting(Case("self_attention", loss="cross_entropy", s=4, d=4, c=5, n=900), beta=1e-3).problem
    factors = random_units(problem, 2)
    O = problem.forward(factors)
    pairs = above(problem, O)[:3]
    whole = Correction(problem, O, pairs, factors, 0.5)
    monkeypatch.setattr(Problem, "pass_rows", lambda self, *args, **kwargs: 4)
    parts = Correction(problem, O, pairs, factors, 0.5)
    torch.testing.assert_close(parts.factor, whole.factor)
    torch.testing.assert_close(parts.right, whole.right)


@every_head
def test_of_a_quadratic_loss_large_units_get_the_size_that_suits_them(
    heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "ACCURACY", 1e-9)
    monkeypatch.setattr(correction, "STEPS", 500)
    problem, factors, _ = prepared(heads, "squared")
    O = problem.forward(factors)
    equations = Correction(problem, O, [], factors, 0.05)
    assert 0 < sum(map(len, (own.v for own in equations.vectors))) <= factors.n_units
    before = equations.right.norm()
    P = problem.forward(corrected(problem, factors, O, [], moving=True, large=0.05))
    after = Correction(problem, P, [], factors, 0.05).right
    assert float(before) > 0.0
    assert float(after.norm()) <= 1e-6 * float(before)
    # Newton's step of the objective: a small part of it lowers that, with the trace of S for the nuclear norm.
    small = equations.step(1e-4 * equations.solve())
    units = [
        old if old.u is None else join_units(old, new) for old, new in zip(factors.units, small.units, strict=True)
    ]
    intercept = None if factors.intercept is None else factors.intercept + small.intercept
    whole = problem.value(canonical(problem, factors, 0.0)[0])
    assert problem.value(canonical(problem, Factors(units, intercept), 0.0)[0]) < whole


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


def test_a_step_has_no_shift_that_the_loss_does_not_see() -> None:
    problem, factors, pairs = prepared(HEADS[0], "cross_entropy")
    assert problem.fit_intercept
    assert problem.loss.shift_free
    O = problem.forward(factors)
    equations = Correction(problem, O, pairs, factors, 0.05)
    b = equations.solve()[-problem.outputs :]
    assert float(b.norm()) > 0.0
    assert abs(float(b.sum())) <= 1e-12 * float(b.norm())


def test_small_units_are_left_out_for_no_more_than_is_allowed() -> None:
    problem, factors, pairs = prepared(HEADS[0], "cross_entropy")
    O = problem.forward(factors)
    whole = corrected(problem, factors, O, pairs)
    drop = 1e-2 * problem.value(whole)
    fewer = corrected(problem, factors, O, pairs, drop)
    assert 0 < fewer.n_units < whole.n_units
    assert problem.value(fewer) <= problem.value(whole) + drop


@pytest.mark.parametrize("held", [None, torch.tensor([2.0, 0.5, 0.1, 1.0], dtype=torch.float64)])
def test_the_surplus_of_a_block_and_its_proximal_operator(held: Tensor | None) -> None:
    like = torch.zeros(1, dtype=torch.float64)
    block = Block.of(slice(2, 6), 0.7, held, like)
    generator = torch.Generator().manual_seed(3)
    t, seen = 0.3, []
    for size in (0.05, 0.5, 3.0):
        y = size * torch.randn(block.size, generator=generator, dtype=torch.float64)
        S = block.matrix(y)
        whole, sign = (S, 1.0) if held is None else (S + held.diag(), -1.0)
        growth = 0.7 * float(torch.linalg.matrix_norm(whole, "nuc") + sign * whole.trace())
        assert block.surplus(y) == pytest.approx(growth, abs=1e-12)
        z = block.shrunk(y, t)
        least = t * block.surplus(z) + 0.5 * float((z - y).square().sum())
        seen.append(least)
        # It is strictly convex, so that no point near it is better.
        for step in (1e-3, 1e-1, 1.0):
            other = z + step * torch.randn(block.size, generator=generator, dtype=torch.float64)
            assert t * block.surplus(other) + 0.5 * float((other - y).square().sum()) > least
    assert seen[-1] > 0.0
    feasible = -(S @ S.mT) if held is None else 0.1 * torch.eye(4, dtype=torch.float64)
    numbers = block.numbers(feasible)
    assert block.surplus(numbers) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(block.shrunk(numbers, t), numbers)


@every_head
def test_where_the_penalty_would_grow_the_step_counts_it(
    heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least of a convex objective: the same as the equations' where these have no surplus."""
    problem, factors, pairs = prepared(heads, "squared")
    for name, value in (("ACCURACY", 1e-7), ("STEPS", 200), ("PROXIMAL_STEPS", 100)):
        monkeypatch.setattr(correction, name, value)
    monkeypatch.setattr(correction, "SPLITTING_STEPS", 5000)
    monkeypatch.setattr(correction, "SPLITTING_ACCURACY", 1e-12)
    equations = Correction(problem, problem.forward(factors), pairs, factors, 0.05)

    def objective(y: Tensor) -> float:
        return float(0.5 * y @ equations.apply(y) - equations.right @ y) + equations.surplus(y)

    y, plain = equations.minimise(), equations.solve()
    assert objective(y) < 0.0
    assert objective(y) <= objective(plain) + 1e-9 * abs(objective(y))
    generator = torch.Generator().manual_seed(4)
    size = float(y.norm()) / math.sqrt(len(y))
    for step in (1e-3, 1e-2, 1e-1):
        change = torch.randn(len(y), generator=generator, dtype=y.dtype)
        assert objective(y + step * size * change) >= objective(y) * (1.0 - 1e-6)
    if equations.surplus(plain) <= 1e-12 * abs(objective(y)):
        assert objective(y) == pytest.approx(objective(plain), rel=1e-5)


def test_many_singular_values_next_to_beta_keep_no_correction_from_its_gap() -> None:
    """Without the surplus such a step led from 3e-3 to 1.6e-2."""
    X = np.random.default_rng(0).normal(size=(2000, 64, 12))
    problem = our_problem(make_task("self_attention", X, X[:, :, :4].mean(1).argmax(1), 0.1))
    state = factored.Factored(problem, 1e-4, 100, None, 0, None, False)
    seen = state.close_look(solver_function("factored")(problem, tol=1e-9, max_iter=10, prove=False).factors)
    allowed = 0.3 * seen.bound.gap
    assert Correction(problem, seen.outputs.to(problem.dtype), seen.pairs).likely_surplus() > 3.0 * allowed
    gaps = {}
    for most in (math.inf, 3.0 * allowed):
        moved = corrected(problem, seen.refitted, seen.outputs, seen.pairs, large=0.05, most=most)
        gaps[most] = state.close_look(moved).bound.relative_gap
    assert gaps[3.0 * allowed] < 0.3 * seen.bound.relative_gap
    assert gaps[3.0 * allowed] < 0.4 * gaps[math.inf]


def test_of_many_pairs_the_largest_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, factors, pairs = prepared(HEADS[1], "squared")
    monkeypatch.setattr(correction, "MOST_PAIRS", 2)
    equations = Correction(problem, problem.forward(factors), pairs)
    weights = [problem.penalty_weight(component) for component in problem.components]
    largest = sorted(pairs, key=lambda pair: -pair.sigma / weights[pair.component])[:2]
    assert len(pairs) > 2
    taken = [u for own in equations.vectors for u in own.v.flatten(1)]
    assert sorted(map(float, (v.sum() for v in taken))) == pytest.approx(sorted(float(p.v.sum()) for p in largest))


def test_no_more_numbers_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, factors, pairs = prepared(HEADS[1], "squared")
    O = problem.forward(factors)
    every = Correction(problem, O, pairs, factors)
    for most in (1, 7, sum(every.sizes) - 1):
        monkeypatch.setattr(correction, "MOST_NUMBERS", most)
        fewer = Correction(problem, O, pairs, factors)
        assert 0 < sum(fewer.sizes) <= most
    # One more row does not fit.
    assert sum(fewer.sizes) >= sum(every.sizes) / 2


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
    monkeypatch.setattr(factored, "corrected", lambda problem, factors, *rest: factors)
    problem = classified("linear")
    solution = solver_function("factored")(problem, tol=1e-3)
    assert solution.converged
    assert len(tried) == 1


def test_units_move_where_they_would_keep_the_gap_open() -> None:
    """Pairs above beta alone push what is left of the gap into the sizes of units, which then keep it open."""
    problem = classified("linear")
    state = factored.Factored(problem, 1e-5, 100, None, 0, None, False)
    factors = solver_function("factored")(problem, tol=2e-3, prove=False).factors
    gaps = {}
    for moving in (False, True):
        seen = state.close_look(factors)
        for step in range(6):
            assert seen.pairs
            each = moving and step % 2 == 0
            moved = corrected(problem, seen.refitted, seen.outputs, seen.pairs, large=0.1, moving=each)
            seen = state.close_look(moved)
        gaps[moving] = seen.bound.relative_gap
    assert gaps[True] < 0.6 * gaps[False]


@pytest.mark.parametrize("free", [False, True])
def test_without_pairs_and_units_there_is_nothing_to_correct(free: bool) -> None:
    """A ridge branch far from its optimum beside an empty head keeps the gap open."""
    problem = float32_problem(Case("self_attention", n=60, intercept=free), Case("linear", n=60, intercept=free))
    problem = problem.with_beta(10.0 * rough_beta_max(problem))
    state = factored.Factored(problem, 1e-6, 100, None, 0, None, False)
    state.left = 1e-12
    every = random_units(problem)
    units = [no_units(own) if own.u is not None else own for own in every.units]
    seen = state.close_look(Factors(units, every.intercept))
    assert seen.slack > 0.0
    assert not seen.pairs
    assert state.correct(seen, 1e-6) is None


def test_units_that_change_their_sign_are_not_moved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from an optimum steps are longer than small units are."""
    problem = classified("linear")
    factors = solver_function("factored")(problem, tol=1e-2, prove=False).factors
    monkeypatch.setattr(factored, "LARGE", 0.01)
    state = factored.Factored(problem, 1e-5, 100, None, 0, None, False)
    state.left = 1e-9
    seen = state.close_look(factors)
    used: list[float] = []
    starts: list[Factors] = []
    closed = factored.corrected

    def watch(*args: Any) -> Factors:
        starts.append(args[1])
        *rest, large, moving, _ = args
        used.append(large if moving else math.inf)
        return closed(*rest, large, moving)

    monkeypatch.setattr(factored, "corrected", watch)
    state.correct(seen, 1e-4)
    assert used[0] == 0.01
    assert state.large > 0.01
    assert used[1] in (state.large, 0.03)
    # What went wrong was not gone on from.
    assert starts[1] is starts[0]
    # What is hoped for next time lies between what was, and what this attempt has left.
    assert 1e-9 < state.left <= math.sqrt(1e-9)


def test_slack_is_the_gap_without_what_is_above_beta() -> None:
    problem = classified("linear")
    state = factored.Factored(problem, 1e-5, 100, None, 0, None, False)
    near = solver_function("factored")(problem, tol=1e-9, prove=False).factors
    seen = state.close_look(near)
    assert abs(seen.slack) <= 1e-6 * seen.bound.primal
    far = solver_function("factored")(problem, tol=1e-9, max_iter=10, prove=False).factors
    seen = state.close_look(far)
    L = dual_point(problem, seen.outputs.double())
    targets, weights = problem.targets_of(slice(0, problem.n), torch.float64)
    dual = -problem.loss.conjugate(L, targets, weights)
    assert seen.slack == pytest.approx(seen.bound.primal - dual, abs=1e-5 * seen.bound.primal)


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
