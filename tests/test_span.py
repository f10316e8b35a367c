"""The program restricted to what units span: its value, gradient and Hessian, and solves that use it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract_cases import HEADS, NUCLEAR, SMALL, Case, float32_problem, make_setting, random_units
from convexheads.certificate import dual_point
from convexheads.memory import ROOMY, Budget, FileRows
from convexheads.problem import Problem
from convexheads.solvers import factored, solver_function, span
from convexheads.solvers.differences import kept_parts
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.span import Span, positive_factor, span_work, with_coupled
from convexheads.subspace import OutsidePairs, OutsideSubspace
from convexheads.types import Factors

every_case = pytest.mark.parametrize("case", NUCLEAR, ids=str)
LAST = (Case("self_attention", pooled=False, s=4, d=4, c=5),)
every_head = pytest.mark.parametrize("heads", [*HEADS, LAST], ids=lambda heads: "+".join(map(str, heads)))


def outside_of(problem: Problem, factors: Factors, most: int = 2) -> dict[tuple[int, int | None], OutsidePairs]:
    L = dual_point(problem, problem.forward(factors)).to(problem.dtype)
    pairs = OutsideSubspace(problem, torch.Generator().manual_seed(0)).pairs(L, factors, most, 3)
    return with_coupled(problem, L, factors, pairs, 1, None)


def span_of(problem: Problem, factors: Factors, low: torch.dtype | None = None) -> Span:
    outside = outside_of(problem, factors)
    return Span(problem, factors, problem.forward(factors), outside, low, torch.Generator().manual_seed(0))


def moved(found: Span, size: float = 0.3) -> Tensor:
    x = found.first()
    return x + size * torch.randn(len(x), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.dtype)


@every_case
def test_it_starts_at_the_units(case: Case) -> None:
    for loss in ("squared", "cross_entropy"):
        problem = make_setting(replace(case, loss=loss, c=4, n=20)).problem
        factors = random_units(problem, 1)
        found = span_of(problem, factors)
        x = found.first()
        torch.testing.assert_close(found.factors(x).flat(), factors.flat(), rtol=1e-9, atol=1e-9)
        value, _ = found.evaluate(x)
        assert value == pytest.approx(problem.value(factors), rel=1e-9)


@every_head
@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "multilabel_logistic"])
def test_values_and_gradients_are_those_of_the_problem(heads: tuple[Case, ...], loss: str) -> None:
    problem = make_setting(*(replace(head, loss=loss, n=30) for head in heads), beta=0.05).problem
    found = span_of(problem, random_units(problem, 2))
    x = moved(found)
    value, gradient = found.evaluate(x)
    assert value == pytest.approx(problem.value(found.factors(x)), rel=1e-9)
    exact = torch.zeros_like(x)
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = 1e-5
        exact[i] = (problem.value(found.factors(x + step)) - problem.value(found.factors(x - step))) / 2e-5
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
    # The gradients in S are corners of Gamma.
    L = dual_point(problem, problem.forward(found.factors(x)))
    for block, G in zip(found.blocks, found.gradients_S, strict=True):
        units = found.start.units[block.component]
        gate = None if units.gate is None else int(units.gate[block.own[0]])
        corner = block.left @ problem.gamma(L, block.component, gate) @ block.right.mT
        torch.testing.assert_close(G, corner, rtol=1e-7, atol=1e-8)
    largest = max(
        float(torch.linalg.svdvals(G)[0]) / block.damping
        for G, block in zip(found.gradients_S, found.blocks, strict=True)
    )
    assert found.excess() == pytest.approx(largest - 1.0)


def classified(heads: tuple[Case, ...]) -> tuple[Problem, Factors]:
    """A problem of few samples, and factors of it."""
    problem = make_setting(*(replace(head, n=30, loss="cross_entropy") for head in heads)).problem
    return problem, random_units(problem, 2)


def assert_same(whole: Span, parts: Span) -> None:
    x = moved(whole)
    for one, other in zip(whole.evaluate(x), parts.evaluate(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole.apply(x[None]), parts.apply(x[None]), rtol=1e-6, atol=1e-8)


@every_head
def test_chunks_add_up(heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    problem, factors = classified(heads)
    whole = span_of(problem, factors)
    monkeypatch.setattr(Problem, "pass_rows", lambda self, *args, **kwargs: 7)
    assert_same(whole, span_of(problem, factors))


@every_head
def test_features_in_a_file_are_those_in_memory(heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    problem, factors = classified(heads)
    whole = span_of(problem, factors)
    problem.budget, problem.cache_bytes = Budget.of(ROOMY), 1
    monkeypatch.setattr(Budget, "chunk", lambda self, fixed: 3000)
    parts = span_of(problem, factors)
    assert all(isinstance(each.rows, FileRows) for each in parts.kept)
    assert len(list(kept_parts(problem, parts.kept, parts.rows_each))) > 1
    assert_same(whole, parts)


@pytest.mark.parametrize("most", [3000, 8])
@every_head
def test_the_inverse_is_symmetric_and_positive(
    heads: tuple[Case, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span, "MOST_DIRECTIONS", most)
    for loss in ("squared", "cross_entropy"):
        problem = make_setting(*(replace(head, loss=loss, n=60) for head in heads)).problem
        found = span_of(problem, random_units(problem, 2))
        if most == 8:
            assert 0 < len(found.chosen) < sum(len(block.numbers) for block in found.blocks)
        matrix = found.apply(torch.eye(len(found.first()), dtype=torch.float64))
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-7, atol=1e-7 * float(matrix.abs().max()))
        flat = int(loss == "cross_entropy" and problem.fit_intercept)
        assert bool((torch.linalg.eigvalsh(matrix)[flat:] > 0).all())


def directions(found: Span) -> Tensor:
    """The directions (r, s) as vectors of variables."""
    rows = []
    for block in found.blocks:
        for number in block.numbers.tolist():
            r, s = divmod(number, block.k)
            x = torch.zeros_like(found.first())
            dA, dB = found.split(x)[0][found.blocks.index(block)]
            if s < block.m:
                dA[s, r] = block.on_left[r, s]
            if r < block.m:
                dB[r, s] = block.on_right[r, s]
            rows.append(x)
    return torch.stack(rows)


@pytest.mark.parametrize("curved", [True, False])
def test_the_hessian_is_that_of_the_program(curved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an optimum of the squared loss, from many samples; and without the loss, decay and coupling alone."""
    monkeypatch.setattr(span, "DAMPING", 0.01)
    monkeypatch.setattr(span, "SAMPLED", 10**6)
    case = Case("mixer", "gated_relu", s=4, d=3, c=3, n=4000, gates=2)
    problem = make_setting(case, beta=0.02, uniform=True).problem
    problem.targets = problem.forward(random_units(problem, 2))
    factors = solver_function("factored")(problem, tol=1e-10).factors
    L = dual_point(problem, problem.forward(factors))
    outside = OutsideSubspace(problem, torch.Generator().manual_seed(0)).pairs(L, factors, 1, 60)
    if not curved:
        sampled = Span._sampled
        monkeypatch.setattr(Span, "_sampled", lambda self, *args: 0.0 * sampled(self, *args))
    found = Span(problem, factors, problem.forward(factors), outside, None, torch.Generator().manual_seed(0))
    x, every = found.first(), directions(found)
    torch.testing.assert_close(every @ every.mT, torch.eye(len(every)).double(), rtol=0, atol=1e-9)
    assert len(every) > 10
    if curved:
        hessian = torch.stack(
            [
                (found.evaluate(x + 1e-5 * unit)[1] - found.evaluate(x - 1e-5 * unit)[1]) / 2e-5
                for unit in torch.eye(len(x), dtype=torch.float64)
            ]
        )
        c = problem.outputs
        hessian = hessian[:-c, :-c] - hessian[:-c, -c:] @ torch.linalg.solve(hessian[-c:, -c:], hessian[-c:, :-c])
        exact = every[:, :-c] @ hessian @ every[:, :-c].mT
    else:
        exact = problem.beta * torch.eye(len(every)).double()
        for block, G in zip(range(len(found.blocks)), found.slope, strict=True):
            pairs = [found.split(row)[0][block] for row in every]
            coupled = torch.stack([torch.stack([(dA @ G * dB).sum() for _, dB in pairs]) for dA, _ in pairs])
            exact += coupled + coupled.mT
    model = found.factor @ found.factor.mT - 0.01 * problem.beta * torch.eye(len(every)).double()
    assert float((model - exact).norm()) < (0.1 if curved else 0.01) * float(exact.norm())


@every_head
def test_solving_ends_at_the_restricted_optimum(heads: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(*(replace(head, n=1500, loss="cross_entropy") for head in heads), beta=0.003).problem
    near = solver_function("factored")(problem, tol=3e-2).factors.to(torch.float64)
    # Not as near as a solve may come by luck.
    start = near.like(0.97 * near.flat())
    outside = outside_of(problem, start)
    found = Span(problem, start, problem.forward(start), outside, None, torch.Generator().manual_seed(0))
    optimiser = LBFGS(found.evaluate, found.first(), 1e-14)
    for _ in range(500):
        if not optimiser.step():
            break
    before, least = problem.value(start), problem.value(found.factors(optimiser.x))
    few = problem.value(found.solve(1e-6, 1e-14))
    assert least <= few + 1e-9
    assert few - least < 0.3 * (before - least) + 1e-9
    # It ends as soon as little is left.
    steps = 0
    step = LBFGS.step

    def counted(self: LBFGS) -> bool:
        nonlocal steps
        steps += 1
        return step(self)

    monkeypatch.setattr(LBFGS, "step", counted)
    found.solve(10.0, 1e-14)
    assert steps == 1


@every_head
def test_low_precision_costs_a_share_of_the_change(heads: tuple[Case, ...]) -> None:
    problem = float32_problem(*(replace(head, n=200, loss="cross_entropy") for head in heads))
    factors = random_units(problem, 2).to(torch.float32)
    exact, rough = span_of(problem, factors), span_of(problem, factors, torch.bfloat16)
    start = exact.first()
    value, slope = rough.evaluate(start)
    exact_value, exact_slope = exact.evaluate(start)
    assert value == pytest.approx(exact_value, rel=1e-6)
    torch.testing.assert_close(slope, exact_slope, rtol=1e-4, atol=1e-5)
    for size in (0.1, 0.01):
        x = moved(exact, size)
        there, gradient = exact.evaluate(x)
        rough_there, rough_gradient = rough.evaluate(x)
        change = float((gradient - exact_slope).norm())
        assert 0 < float((rough_gradient - gradient).norm()) < 0.02 * change
        assert rough_there == pytest.approx(there, abs=0.02 * abs(there - exact_value) + 1e-5 * abs(there))


@pytest.mark.parametrize("head", ["self_attention", "mixer"])
def test_coupled_directions_are_what_gamma_couples_most(head: str) -> None:
    problem = make_setting(Case(head, s=8, d=6, c=8, n=40)).problem
    factors = random_units(problem, 3)
    L = dual_point(problem, problem.forward(factors))
    pairs = OutsideSubspace(problem, torch.Generator().manual_seed(0)).pairs(L, factors, 2, 3)
    found = with_coupled(problem, L, factors, pairs, 2, None)[0, None]
    assert len(found.sigma) == 4
    assert torch.equal(found.left[:2], pairs[0, None].left)
    assert bool((found.sigma[2:] == 0).all())
    gamma, units = problem.gamma(L, 0, None), factors.units[0]
    assert units.u is not None
    P, Q = (torch.linalg.qr(t.flatten(1).mT).Q for t in (units.u, units.v))
    for vectors, side, held, own in (
        (found.left, gamma @ Q, P, pairs[0, None].left),
        (found.right, gamma.mT @ P, Q, pairs[0, None].right),
    ):
        basis = torch.linalg.qr(torch.cat([held, own.mT], 1)).Q
        rest = side - basis @ (basis.mT @ side)
        exact = torch.linalg.svd(rest).U[:, :2]
        torch.testing.assert_close((exact.mT @ vectors[2:].mT).abs(), torch.eye(2).double(), rtol=0, atol=1e-6)


def test_where_there_is_none() -> None:
    problem = make_setting(Case("self_attention", c=3)).problem
    (component,) = problem.components
    room = min(component.p, component.q)
    assert span_work(problem, random_units(problem, 2), 1, None) == 2 * 3 * component.q
    assert span_work(problem, random_units(problem, 2), 100, None) == 2 * 6 * component.q
    assert span_work(problem, random_units(problem, 0), 5, None) == float("inf")
    # More units than a block has singular values.
    assert span_work(problem, random_units(problem, room), 5, None) == 2 * room * component.q
    assert span_work(problem, random_units(problem, room + 1), 5, None) == float("inf")
    with_ridge = make_setting(Case("self_attention", c=3), Case("linear", c=3)).problem
    assert span_work(with_ridge, random_units(with_ridge, 2), 5, None) == float("inf")
    problem.cache_bytes = 10
    assert span_work(problem, random_units(problem, 2), 5, None) == float("inf")
    limited = make_setting(Case("self_attention", c=3)).problem
    limited.budget = Budget(2**20, 2**20, 2**16)
    assert span_work(limited, random_units(limited, 2), 5, None) == float("inf")


def test_rounding_does_not_keep_a_hessian_from_being_factorised() -> None:
    Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q.double()
    for least in (0.1, -1e-7, -1e-3):
        matrix = (Q * torch.tensor([1e2, 10.0, 1.0, 0.5, least]).double()) @ Q.mT
        factor = positive_factor(matrix)
        assert float((factor @ factor.mT - matrix).norm()) <= (1e-9 if least > 0 else 3e-4 - 50.0 * least)
    with pytest.raises(torch.linalg.LinAlgError):
        positive_factor(torch.full((2, 2), float("nan")))


def test_blocks_have_their_own_units() -> None:
    problem = make_setting(Case("self_attention", "gated_relu", c=3)).problem
    (units,) = random_units(problem, 2).units
    assert units.of_block(1).tolist() == [2, 3]
    (plain,) = random_units(make_setting(Case("self_attention", c=3)).problem, 2).units
    assert plain.of_block(None).tolist() == [0, 1]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Polishes on the smallest of problems, too: the gaps where they were tried."""
    monkeypatch.setattr(factored, "POLISH_WORK", 0.0)
    monkeypatch.setattr(factored, "POLISHED", 1e6)
    gaps: list[float] = []
    solve = Span.solve

    def counted(self: Span, tol: float, noise: float) -> Factors:
        gaps.append(tol)
        return solve(self, tol, noise)

    monkeypatch.setattr(Span, "solve", counted)
    return gaps


@pytest.mark.parametrize("case", [case for case in SMALL if case.head != "linear"], ids=str)
def test_solves_end_at_the_same_optimum(case: Case, everywhere: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for loss in ("squared", "cross_entropy"):
        problem = make_setting(replace(case, loss=loss, n=60, c=2), beta=0.02).problem
        everywhere.clear()
        with_it = solver_function("factored")(problem, tol=1e-6)
        assert everywhere or case.head not in ("self_attention", "mixer")
        with monkeypatch.context() as patch:
            patch.setattr(factored, "POLISH_WORK", float("inf"))
            everywhere.clear()
            without = solver_function("factored")(problem, tol=1e-6)
        assert not everywhere
        assert with_it.converged
        assert with_it.certificate.certified
        assert with_it.certificate.primal == pytest.approx(without.certificate.primal, rel=2e-6)


def test_it_takes_fewer_iterations(everywhere: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(Case("self_attention", s=5, d=8, c=10, n=1200, loss="cross_entropy"), beta=0.005).problem
    with_it = solver_function("factored")(problem, tol=1e-5)
    assert 0 < len(everywhere) <= 10
    monkeypatch.setattr(factored, "POLISH_WORK", float("inf"))
    without = solver_function("factored")(problem, tol=1e-5)
    assert with_it.converged
    assert without.converged
    assert with_it.n_iter < 0.8 * without.n_iter


def test_far_from_the_optimum_the_span_is_left_alone(everywhere: list[float]) -> None:
    """However loose the tolerance."""
    problem = make_setting(Case("self_attention", n=60, c=2), beta=0.02).problem
    factors = solver_function("factored")(problem, tol=0.5, prove=False).factors
    near, far = (
        factored.Factored(problem, tol, 100, None, 0, None, prove=False).polishable(factors, tol) for tol in (1e-9, 0.5)
    )
    assert 0 < near < far == factored.POLISHED_FROM < 0.5


def test_a_polish_that_makes_things_worse_is_not_taken(
    everywhere: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_setting(Case("self_attention", n=60, c=2), beta=0.02).problem
    expected = solver_function("factored")(problem, tol=1e-6).certificate.primal
    monkeypatch.setattr(Span, "solve", lambda self, tol, noise: self.factors(2.0 * self.first()))
    found = solver_function("factored")(problem, tol=1e-6)
    assert found.converged
    assert found.certificate.primal == pytest.approx(expected, rel=2e-6)


def test_jumps_go_down_only() -> None:
    b = torch.ones(3, dtype=torch.float64)
    optimiser = LBFGS(lambda x: (float(0.5 * x @ x - b @ x), x - b), torch.zeros_like(b), 1e-12)
    assert not optimiser.jump(-b)
    assert torch.equal(optimiser.x, torch.zeros_like(b))
    assert optimiser.jump(0.5 * b)
    assert optimiser.value == pytest.approx(0.125 * 3 - 0.5 * 3)
    assert torch.equal(optimiser.gradient, -0.5 * b)
    # What came before is no part of the steadied iterate.
    assert torch.equal(optimiser.steadied()[0], 0.5 * b)
    assert optimiser.step()
