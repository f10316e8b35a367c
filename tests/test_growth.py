"""How many units the factored solver works with: growth, trimming and the stages of its warm-up."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from contract_cases import Case, float32_problem, make_setting, random_units
from convexheads import ConvexHeadClassifier
from convexheads.certificate import Certificate, certify_factors, dual_point
from convexheads.errors import InputError
from convexheads.problem import Problem
from convexheads.solvers import factored, preconditioner, starts
from convexheads.solvers.base import solver_function
from convexheads.solvers.factored import PAIRS, Factored, Look, Search
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.solvers.starts import along_pairs, first_guess, random_factors, resize, second_guess
from convexheads.solvers.units import join_units, largest, placements, principal_units, turned, turned_rows
from convexheads.subspace import BlockSubspace, beta_max, rough_beta_max
from convexheads.types import Factors, Units


def problem(ratio: float, n: int = 120, d: int = 20, c: int = 18) -> Problem:
    """Squared loss on targets with noise in every direction, so that small betas call for many units."""
    found = make_setting(Case("self_attention", "linear", s=3, d=d, c=c, n=n)).problem
    generator = torch.Generator().manual_seed(1)
    found.targets = torch.randn(found.targets.shape, generator=generator, dtype=torch.float64)
    return found.with_beta(ratio * beta_max(found))


def solver(found: Problem, tol: float = 1e-3) -> Factored:
    return Factored(found, tol, 500, None, 0, None)


def test_all_ritz_pairs_above_beta_are_found_and_are_directions_of_descent() -> None:
    found = problem(0.05)
    L = found.null_gradient()
    (component,) = found.components
    bound = found.penalty_weight(component)
    _, pairs, _ = BlockSubspace(found, torch.Generator().manual_seed(0)).top_pairs(L, PAIRS, 12, 1e-6)
    assert len(pairs) > PAIRS
    gamma = found.gamma(L, 0, None)
    for pair in pairs:
        value = float(pair.u @ gamma @ pair.v)
        assert value > bound
        assert abs(value - pair.sigma) < 1e-8 * pair.sigma
        assert abs(float(pair.u.norm()) - 1) < 1e-8
        assert abs(float(pair.v.norm()) - 1) < 1e-8


def test_a_search_from_the_units_next_to_an_optimum_has_little_left_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problem(0.05)
    factors = solver_function("factored")(found, tol=1e-4).factors
    L = dual_point(found, found.forward(factors))
    exact = float(torch.linalg.matrix_norm(found.gamma(L, 0, None), 2)) / found.components[0].weight
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    products: list[int] = []
    original = BlockSubspace._apply

    def watched(self: BlockSubspace, searches: list, *args: object, **options: object) -> object:
        products.append(len(searches))
        return original(self, searches, *args, **options)

    monkeypatch.setattr(BlockSubspace, "_apply", watched)

    def search(known: Factors | None, rounds: int) -> tuple[float, int]:
        products.clear()
        subspace = BlockSubspace(found, torch.Generator().manual_seed(0))
        return subspace.top_pairs(L, 2, rounds, 1e-5, factors=known)[0], len(products)

    from_units, few = search(factors, 24)
    from_nothing, many = search(None, 24)
    assert from_units <= exact * (1 + 1e-9)
    assert from_units == pytest.approx(exact, rel=1e-5)
    assert from_nothing <= exact * (1 + 1e-9)
    assert few < 0.7 * many
    # A single product tells three digits.
    assert search(factors, 1) == (pytest.approx(exact, rel=1e-3), 1)


@pytest.mark.parametrize(
    "case", [Case("mlp", d=4, c=2), Case("mixer", s=2, d=3, c=2), Case("self_attention", d=2, c=6)]
)
def test_a_search_ends_where_its_basis_is_the_whole_space(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_setting(case).problem
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    L = found.null_gradient()
    for factors in (None, random_units(found)):
        subspace = BlockSubspace(found, torch.Generator().manual_seed(0))
        for _ in range(2):
            sigma, _, _ = subspace.top_pairs(L, PAIRS, 50, 0.0, factors=factors)
            exact = max(
                float(torch.linalg.matrix_norm(gamma, 2)) / component.weight
                for k, component in enumerate(found.components)
                for _, gamma in found.gammas(L, k)
            )
            assert sigma == pytest.approx(exact, rel=1e-9)


def test_growth_adds_many_units_at_once_where_many_are_missing() -> None:
    found = problem(0.05)
    state = solver(found)
    start = random_factors(found, [24], state.generator, torch.float64)
    grown = state.widen(start, state.look(start, 1e-2))
    assert grown is not None
    added = grown.n_units - start.n_units
    assert PAIRS < added <= state.room(start) == 12


def flat_like(factors: Factors, u: torch.Tensor, v: torch.Tensor) -> Factors:
    (units,) = factors.units
    return Factors([Units(u.view_as(units.u), v.view_as(units.v))], factors.intercept)


def test_small_units_are_trimmed_only_where_they_do_not_grow() -> None:
    found = problem(0.3)
    (component,) = found.components
    m, p, q = 6, component.p, component.q
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(p, m, generator=generator, dtype=torch.float64)).Q.mT
    v = torch.linalg.qr(torch.randn(q, m, generator=generator, dtype=torch.float64)).Q.mT
    size = torch.tensor([3.0, 2.0, 1.0, 1e-3, 2e-3, 3e-3], dtype=torch.float64)[:, None]
    empty = random_factors(found, [m], generator, torch.float64)
    factors = flat_like(empty, size * u, size * v)
    spare = 1e-4 * found.penalty_weight(component)
    # All small units shrink: the gradient points along them.
    (rows,) = principal_units(found, factors, flat_like(empty, size * u, size * v), spare, math.inf)
    assert rows is not None
    assert len(rows) == 3
    # The smallest one grows.
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    (rows,) = principal_units(found, factors, flat_like(empty, sign * size * u, sign * size * v), spare, math.inf)
    assert rows is not None
    assert len(rows) == 4
    assert float(rows[:, 3].abs().max()) > 0.999
    assert float(rows[:, 4:].abs().max()) < 1e-6


@pytest.mark.parametrize(("excess", "kept"), [(0.02, 4), (0.06, 3), (1.0, 3)])
def test_a_unit_that_shrinks_for_certain_counts_for_little(excess: float, kept: int) -> None:
    """Of singular value (1 - excess) beta w; ten times as large as what could be spared."""
    found = problem(0.3)
    (component,) = found.components
    weight, p, q = found.penalty_weight(component), component.p, component.q
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(p, 4, generator=generator, dtype=torch.float64)).Q.mT
    v = torch.linalg.qr(torch.randn(q, 4, generator=generator, dtype=torch.float64)).Q.mT
    size = torch.tensor([3.0, 2.0, 1.0, 1e-2], dtype=torch.float64)[:, None]
    empty = random_factors(found, [4], generator, torch.float64)
    factors = flat_like(empty, size * u, size * v)
    share = weight * torch.tensor([0.0, 0.0, 0.0, excess], dtype=torch.float64)[:, None]
    gradient = flat_like(empty, share * size * u, share * size * v)
    spare = 0.1 * weight * 1e-4
    (rows,) = principal_units(found, factors, gradient, spare, 0.05)
    assert rows is not None
    assert len(rows) == kept


@pytest.mark.parametrize("sure", [False, True])
def test_slim_factors_are_looked_at_closely_however_rough_the_bound(
    sure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound far below the truth: what is not sure is measured again, and comes back above the target."""
    found = problem(0.3)
    state = Factored(found, 1e-3, 100, None, 0, None)
    factors = random_factors(found, [6], torch.Generator().manual_seed(1), torch.float64)
    true = state.estimate(factors).bound
    assert true.relative_gap > 0.01
    low = dataclasses.replace(true, relative_gap=5e-4)
    looks: list[float] = []
    original = Factored.measure

    def watched(self: Factored, refitted: Factors, O: torch.Tensor, search: Search) -> object:
        looks.append(search.growth)
        return original(self, refitted, O, search)

    monkeypatch.setattr(Factored, "measure", watched)
    slim, bound = state.slim(factors, low, 9.4e-4, sure)
    assert slim.n_units == 6
    # What is sure, and loses nothing, is not looked at again.
    assert looks == ([] if sure else [factored.SURE])
    assert bound.relative_gap == pytest.approx(5e-4 if sure else true.relative_gap, rel=1e-3)


def test_what_is_looked_at_closely_is_as_a_proof_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values that cluster next to beta converge slowly: an estimate too low costs a proof that fails."""
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    found = problem(0.3, n=400)
    factors = solver_function("factored")(found, tol=1e-9, max_iter=40, random_state=0, prove=False).factors
    rough = solver(found).estimate(factors).bound
    state = solver(found)
    slim, close = state.slim(factors, rough, 2.0 * rough.relative_gap, False)
    proved = certify_factors(found, slim).relative_gap
    assert close.relative_gap == pytest.approx(proved, abs=0.03 * state.tol)


def test_slim_factors_lose_what_carries_next_to_nothing() -> None:
    """Random units of next to no size beside those of an optimum go; the gap that comes back is theirs."""
    found = problem(0.3)
    solution = solver_function("factored")(found, tol=1e-5)
    (units,) = solution.factors.units
    generator = torch.Generator().manual_seed(2)
    tiny = Units(
        torch.cat([units.u, 1e-4 * torch.randn(units.u.shape, generator=generator, dtype=torch.float64)]),
        torch.cat([units.v, 1e-4 * torch.randn(units.v.shape, generator=generator, dtype=torch.float64)]),
    )
    state = Factored(found, 1e-3, 100, None, 0, None)
    more = Factors([tiny], solution.factors.intercept)
    bound = state.estimate(more).bound
    slim, close = state.slim(more, bound, 9.4e-4, False)
    assert slim.n_units <= len(units.v) < len(tiny.v)
    assert close.relative_gap <= 9.4e-4
    assert close.relative_gap == pytest.approx(certify_factors(found, slim).relative_gap, abs=3e-5)


@pytest.mark.parametrize("gap_of_all", [9.45e-4, 9.8e-4])
def test_what_may_go_never_takes_the_gap_beyond_what_is_accepted(
    gap_of_all: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All units are within the target and its slack, fewer are not: then all of them come back."""
    found = problem(0.3)
    state = Factored(found, 1e-3, 100, None, 0, None, prove=False)
    factors = random_factors(found, [6], torch.Generator().manual_seed(1), torch.float64)
    (units,) = factors.units
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-6], dtype=torch.float64)[:, None, None]
    factors = Factors([Units(units.u * scale, units.v * scale)], factors.intercept)
    look = state.estimate(factors)
    true = look.bound

    def measure(self: Factored, refitted: Factors, *rest: object) -> Look:
        gap = gap_of_all if refitted.n_units == 6 else 1.02e-3
        return dataclasses.replace(look, bound=dataclasses.replace(true, relative_gap=gap), pairs=[], refitted=refitted)

    monkeypatch.setattr(Factored, "measure", measure)
    rough = dataclasses.replace(true, relative_gap=9.39e-4)
    slim, bound = state.slim(factors, rough, 9.4e-4, False)
    assert slim.n_units == 6
    assert bound.relative_gap == gap_of_all <= factored.SLACK * 9.4e-4


def test_a_start_near_the_optimum_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problem(0.3)
    monkeypatch.setattr(starts, "WARMUP_WORK", 0.0)
    monkeypatch.setattr(starts, "WARMUP_SAMPLES", 100)
    generator = torch.Generator().manual_seed(0)
    near = solver_function("factored")(found, tol=1e-4).factors
    assert second_guess(found, near, None, generator) is None
    far = Factors([Units(units.u * 0.1, units.v) for units in near.units if units.u is not None], near.intercept)
    better = second_guess(found, far, None, generator)
    assert better is not None
    assert found.value_and_gradient(better)[0] < found.value_and_gradient(far)[0]


def test_a_start_whose_units_are_all_in_use_is_doubled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a large beta to a small one there may be many times as many units."""
    monkeypatch.setattr(starts, "WARMUP_WORK", 0.0)
    monkeypatch.setattr(starts, "WARMUP_SAMPLES", 100)
    found = problem(0.02)
    few = largest(solver_function("factored")(found, tol=1e-2).factors, 4)

    def guess(max_rank: int | None = None) -> int:
        better = second_guess(found, few, max_rank, torch.Generator().manual_seed(0))
        assert better is not None
        return better.n_units

    assert few.n_units == 4
    assert guess() > 8
    assert guess(9) <= 9
    # Without room for more units the epochs are not repeated.
    epochs: list[int] = []
    adam = starts.adam_epochs
    with monkeypatch.context() as patch:
        patch.setattr(starts, "adam_epochs", lambda *args: (epochs.append(1), adam(*args))[1])
        guess(4)
    assert len(epochs) == 1
    monkeypatch.setattr(starts, "MOST_STAGES", 1)
    assert guess() <= 8


def test_units_that_are_all_in_use_are_doubled() -> None:
    found = problem(0.02)
    generator = torch.Generator().manual_seed(0)
    factors = random_factors(found, [8], generator, torch.float64)
    larger, saturated = resize(found, factors, [8], None, generator)
    assert saturated
    assert larger.n_units == 16
    (units,) = factors.units
    assert units.u is not None
    share = torch.where(torch.arange(8) < 4, 1.0, 1e-3).double()
    idle = Factors([Units(units.u * share[:, None, None], units.v * share[:, None, None])], factors.intercept)
    smaller, saturated = resize(found, idle, [8], None, generator)
    assert not saturated
    assert smaller.n_units < 8


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "multilabel_logistic"])
def test_rough_estimates_are_those_of_float64(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 where that is enough, for a squared loss never; the gap is the same either way."""
    found = make_setting(Case("self_attention", loss=loss, n=80, c=3), beta=0.02).problem.in_dtype(torch.float32)
    state = Factored(found, 1e-3, 100, None, 0, None)
    factors = random_units(found).to(torch.float32)
    dtypes = []
    refit = Factored.refit

    def watched(self: Factored, factors: Factors, dtype: torch.dtype) -> tuple[Factors, torch.Tensor]:
        dtypes.append(dtype)
        return refit(self, factors, dtype)

    monkeypatch.setattr(Factored, "refit", watched)
    rough = state.estimate(factors, Search(1e-2)).bound
    exact = state.estimate(factors, Search(1e-4)).bound
    assert dtypes == [torch.float64 if loss == "squared" else torch.float32, torch.float64]
    assert rough.primal == pytest.approx(exact.primal, rel=1e-5)
    assert rough.relative_gap == pytest.approx(exact.relative_gap, rel=1e-3)


def with_more(factors: Factors, size: float) -> Factors:
    """Three more units of every component, random ones of this size: one of the first gate, two of the last."""
    generator = torch.Generator().manual_seed(5)
    units = []
    for old in factors.units:
        if old.u is None:
            units.append(old)
            continue
        gate = None if old.gate is None else torch.tensor([0, int(old.gate[-1]), int(old.gate[-1])])
        u, v = (size * torch.randn(3, *t.shape[1:], generator=generator, dtype=t.dtype) for t in old.tensors())
        units.append(join_units(old, Units(u, v, gate)))
    return Factors(units, factors.intercept)


def three_branches(activation: str) -> Problem:
    return make_setting(Case("mixer", activation, n=10), Case("linear", n=10), Case("self_attention", n=10)).problem


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_vectors_of_fewer_units_are_padded(activation: str) -> None:
    """Where new units are zero, the variables of all of them are those of the old ones, padded."""
    before = random_units(three_branches(activation))
    after = with_more(before, 0.0)
    assert len(after.flat()) > len(before.flat())
    vectors = torch.stack([before.flat(), -2.0 * before.flat()])
    expected = torch.stack([after.flat(), -2.0 * after.flat()])
    assert torch.equal(placements(before, after)[0].put(vectors), expected)


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_old_and_new_units_make_up_all(activation: str) -> None:
    before = random_units(three_branches(activation))
    after = with_more(before, 1.0)
    old, new = placements(before, after)
    x = torch.stack([after.flat(), torch.arange(len(after.flat())).double()])
    assert torch.equal(old.take(x)[0], before.flat())
    assert torch.equal(new.take(x)[0], new.part.flat())
    assert new.part.n_units == after.n_units - before.n_units
    # The intercept is with both of them.
    assert after.intercept is not None
    size = len(after.intercept)
    whole = old.put(old.take(x)) + new.put(new.take(x))
    assert torch.equal(whole[:, :-size], x[:, :-size])
    assert torch.equal(whole[:, -size:], 2.0 * x[:, -size:])
    for placement in (old, new):
        y = torch.arange(len(placement.part.flat())).double()[None]
        torch.testing.assert_close(placement.put(y) @ x.mT, y @ placement.take(x).mT)


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_a_preconditioner_goes_on_with_more_units(activation: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that are there already keep theirs, and new ones get what they would have next to these, uncoupled."""
    monkeypatch.setattr(preconditioner, "FEW_ROWS", few)
    found = three_branches(activation)
    state = solver(found)
    before = random_units(found)
    after = with_more(before, 0.5)
    optimiser, _ = state.optimiser(before, torch.float64)
    known = state.preconditioner(before, None)
    optimiser.set_inverse(known.apply)
    larger, shapes = state.enlarge(optimiser, before, after, found.forward(after))
    assert larger.inverse is not None
    assert shapes.n_units == after.n_units
    each = torch.eye(len(after.flat()), dtype=torch.float64)
    matrix = larger.inverse(each)
    torch.testing.assert_close(matrix, matrix.mT, rtol=1e-8, atol=1e-8 * float(matrix.abs().max()))
    # Softmax does not see a common shift of the intercept; there is none of a squared loss.
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    old, new = placements(before, after)
    assert after.intercept is not None
    size = len(after.intercept)
    held = old.take(old.take(matrix).mT).mT[:-size, :-size]
    kept = known.apply(torch.eye(len(before.flat()), dtype=torch.float64))[:-size, :-size]
    torch.testing.assert_close(held, kept)
    # Features of a component do not depend on its other units, nor does the curvature of a squared loss.
    alone = Preconditioner(found, new.part, torch.Generator().manual_seed(0), outputs=found.forward(after))
    own = alone.apply(torch.eye(len(new.part.flat()), dtype=torch.float64))[:-size, :-size]
    fresh = new.take(new.take(matrix).mT).mT[:-size, :-size]
    assert float((fresh - own).norm()) < 0.5 * float(own.norm())
    # Old and new ones are coupled by the intercept alone.
    between = old.take(new.take(matrix).mT).mT[:-size, :-size]
    assert not bool(between.any())


def transposed(maps: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if rows is None else rows.mT for rows in maps]


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_vectors_are_turned_where_no_unit_is_left(activation: str) -> None:
    """There and back, as preconditioner and curvature pairs are when all units of a component are dropped."""
    found = make_setting(Case("mixer", activation, n=10), Case("self_attention", n=10)).problem
    factors = random_units(found, 3)
    maps = [torch.zeros(0, len(units.v), dtype=torch.float64) for units in factors.units]
    smaller = turned(factors, list(maps))
    assert smaller.n_units == 0
    assert factors.intercept is not None
    rows = torch.stack([factors.flat(), 2.0 * factors.flat()])
    there = turned_rows(rows, factors, list(maps))
    assert torch.equal(there, torch.stack([factors.intercept, 2.0 * factors.intercept]))
    back = turned_rows(there, smaller, transposed(list(maps)))
    size = len(factors.intercept)
    assert back.shape == rows.shape
    assert torch.equal(back[:, -size:], there)
    assert not bool(back[:, :-size].any())


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_vectors_are_turned_back_by_the_transposed_maps(activation: str) -> None:
    found = make_setting(Case("mixer", activation, n=10), Case("linear", n=10), Case("self_attention", n=10)).problem
    factors = random_units(found, 3)
    maps = principal_units(found, factors, random_units(found, 3, seed=2), math.inf, math.inf)
    kept = sum(len(rows) for rows in maps if rows is not None)
    assert 0 < kept < factors.n_units
    smaller = turned(factors, maps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, len(factors.flat()), generator=generator, dtype=torch.float64)
    y = torch.randn(2, len(smaller.flat()), generator=generator, dtype=torch.float64)
    there, back = turned_rows(x, factors, maps), turned_rows(y, smaller, transposed(maps))
    torch.testing.assert_close(there @ y.mT, x @ back.mT)
    # Orthonormal rows: there and back again is nothing.
    torch.testing.assert_close(turned_rows(back, factors, maps), y)


def trimming(found: Problem) -> tuple[Factored, LBFGS, Factors, Certificate]:
    """A solve at an optimum with six units of no size beside its own, and its gap."""
    solution = solver_function("factored")(found, tol=1e-3)
    (units,) = solution.factors.units
    assert units.u is not None
    generator = torch.Generator().manual_seed(2)
    tiny = [1e-5 * torch.randn(6, *t.shape[1:], generator=generator, dtype=torch.float64) for t in units.tensors()]
    factors = Factors([Units(torch.cat([units.u, tiny[0]]), torch.cat([units.v, tiny[1]]))], solution.factors.intercept)
    state = solver(found)
    optimiser, _ = state.optimiser(factors, torch.float64)
    return state, optimiser, factors, state.estimate(factors).bound


def test_a_preconditioner_goes_on_without_the_units_that_were_dropped() -> None:
    found = problem(0.5)
    state, optimiser, factors, bound = trimming(found)
    weights = torch.rand(len(factors.flat()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimiser.set_inverse(lambda rows: rows * weights)
    gradient = factors.like(optimiser.gradient)
    trimmed = state.trim(optimiser, factors, gradient, bound, math.inf)
    assert trimmed is not None
    smaller, shapes = trimmed
    assert shapes.n_units <= factors.n_units - 6
    assert smaller.inverse is not None
    each = torch.eye(len(smaller.x), dtype=torch.float64)
    matrix = smaller.inverse(each)
    torch.testing.assert_close(matrix, matrix.mT)
    maps = principal_units(found, factors, gradient, factored.TRIMMED * bound.gap, math.inf)
    back = turned_rows(each, shapes, transposed(maps))
    torch.testing.assert_close(matrix, turned_rows(back * weights, factors, maps))


def test_what_is_dropped_costs_no_more_than_ten_iterations_gain() -> None:
    found = problem(0.5)
    state, optimiser, factors, bound = trimming(found)
    gradient = factors.like(optimiser.gradient)
    assert state.trim(optimiser, factors, gradient, bound, 1e-14 * bound.primal) is None
    assert state.trim(optimiser, factors, gradient, bound, bound.gap) is not None


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    """A share of beta_max is zero where targets are constant: with one output, softmax always is."""
    found = make_setting(Case("self_attention", "linear", loss="cross_entropy", c=1, n=30)).problem
    assert beta_max(found) < 1e-12
    with pytest.raises(InputError, match=r"beta: got .*; expected a positive number"):
        found.with_beta(beta)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_gap_that_seems_closed_is_looked_at_closely(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However rough the checks before, what a solve without proof ends with is next to what a proof finds."""
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    case = Case("self_attention", n=120, s=5, d=6, c=8, loss="cross_entropy", seed=seed)
    found = make_setting(case, beta=0.004).problem
    looks: list[float] = []
    original = Factored.measure

    def rougher(self: Factored, refitted: Factors, O: torch.Tensor, search: Search) -> object:
        looks.append(search.growth)
        if search.growth == factored.CONVERGED:
            search = dataclasses.replace(search, growth=1e9)
        return original(self, refitted, O, search)

    monkeypatch.setattr(Factored, "measure", rougher)
    solution = solver_function("factored")(found, tol=1e-3, prove=False, random_state=seed)
    assert solution.converged
    assert {factored.CONVERGED, factored.SURE} == set(looks)
    assert looks[-1] == factored.SURE
    assert certify_factors(found, solution.factors).relative_gap <= 1.05e-3


@pytest.mark.parametrize("seed", [0, 2])
def test_units_that_are_dropped_early_do_not_come_and_go_for_ever(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once some have come back only those of no size are dropped; without that it takes 1,000 iterations or more."""
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    monkeypatch.setattr(factored, "WARMUP_SAMPLES", 0)
    case = Case("self_attention", n=120, s=5, d=6, c=8, loss="cross_entropy", seed=seed)
    found = make_setting(case, beta=0.004).problem
    solution = solver_function("factored")(found, tol=1e-3, prove=False, random_state=seed)
    assert solution.converged
    assert solution.n_iter < 500


def test_without_a_proof_nothing_is_formed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("self_attention", n=120, s=5, d=6, c=8, loss="cross_entropy")
    found = make_setting(case, beta=0.004).problem.in_dtype(torch.float32)
    dtypes: set[torch.dtype] = set()
    original = Problem._fresh_stats

    def watched(self: Problem, index: slice | torch.Tensor, dtype: torch.dtype) -> object:
        dtypes.add(dtype)
        return original(self, index, dtype)

    monkeypatch.setattr(Problem, "_fresh_stats", watched)
    solution = solver_function("factored")(found, tol=1e-3, prove=False)
    assert solution.converged
    assert dtypes == {torch.float32}
    assert solution.factors.tensors()[0].dtype == torch.float64
    # The intercept is next to the best one, and the estimate to the exact gap.
    exact = certify_factors(found, solution.factors)
    network = certify_factors(found, solution.factors, network=True)
    assert exact.relative_gap <= 1.05e-3
    assert network.primal == pytest.approx(found.value(solution.factors, torch.float64), rel=1e-6)
    assert solution.certificate.primal == pytest.approx(exact.primal, rel=1e-6)


def test_what_is_exact_is_not_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit matrices leave nothing to converge, but a rough look may have been in float32."""
    found = make_setting(Case("self_attention", n=60, c=4, loss="cross_entropy"), beta=0.01).problem
    state = Factored(found, 1e-3, 100, None, 0, None)
    factors = random_units(found)
    # Gaps before call for a precision of 1e-3 and of 1e-1.
    assert state.look(factors, 1e-3).sure
    assert not state.look(factors, 1.0).sure
    monkeypatch.setattr(BlockSubspace, "exact", lambda self, size, rounds: False)
    assert not state.look(factors, 1e-3).sure


@pytest.mark.parametrize("large", [False, True])
def test_epochs_are_more_the_smaller_beta_is(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = float32_problem(Case("self_attention", n=3000, s=4, d=5, loss="cross_entropy"))
    start = random_factors(found, [4], torch.Generator().manual_seed(0), torch.float32)
    scale = rough_beta_max(found)
    assert scale == pytest.approx(beta_max(found), rel=0.05)

    def epochs(ratio: float) -> int:
        there = found.with_beta(ratio * scale)
        return starts.warmup_epochs(there, start, starts.usual_share(there))

    monkeypatch.setattr(starts, "in_large_products", lambda problem, factors: large)
    each = [epochs(ratio) for ratio in (0.99, 0.3, 0.15, 0.001)]
    assert starts.LEAST_EPOCHS <= each[0] < each[1] < each[2] <= each[3]
    assert each[3] == (starts.MOST_LARGE_EPOCHS if large else starts.MOST_EPOCHS)


def test_solves_start_with_more_units_the_smaller_beta_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = float32_problem(Case("self_attention", n=3000, s=4, d=8, c=64, loss="cross_entropy"))
    scale = beta_max(found)
    seen: list[int] = []

    def epochs(problem: Problem, factors: Factors, *others: object) -> Factors:
        seen.append(factors.n_units)
        return factors

    monkeypatch.setattr(starts, "adam_epochs", epochs)
    monkeypatch.setattr(starts, "quick", lambda problem, counts: False)
    monkeypatch.setattr(starts, "MOST_STAGES", 1)
    for ratio in (0.5, starts.USUAL_RATIO, 0.024, 0.001):
        starts.first_guess(found.with_beta(ratio * scale), None, torch.Generator().manual_seed(0))
    assert seen[0] == seen[1] == starts.FEWER_UNITS
    assert seen[1] < seen[2] < seen[3] == starts.FIRST_UNITS


def test_a_head_whose_tokens_say_nothing_starts_without_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "rough_beta_max", lambda problem: 0.0)
    found = float32_problem(Case("self_attention", n=3000, s=4, d=5, loss="cross_entropy"))
    assert starts.usual_share(found) == math.inf


@pytest.mark.parametrize("patience", [2, 4])
def test_units_are_not_dropped_for_more_than_they_are_worth(patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted all but exactly, a head has a gap near one for long: a share of it is no measure of what units carry."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(500, 9, 12, generator=generator, dtype=torch.float64)
    W = torch.randn(12, 12, 10, generator=generator, dtype=torch.float64)
    scores = torch.einsum("nsa,nsb,abc->nc", X, X, W)
    labels = (scores + 0.5 * scores.std() * torch.randn(500, 10, generator=generator, dtype=torch.float64)).argmax(1)
    monkeypatch.setattr(factored, "FEW_PATIENCE", patience)
    for seed in range(2):
        head = ConvexHeadClassifier("mlp", activation="gated_relu", gates=3, beta_ratio=0.01, random_state=seed)
        head.fit(X, labels)
        assert head.certificate_.certified
        assert head.certificate_.relative_gap <= head.tol
        assert head.n_iter_ < 500


@pytest.mark.parametrize("case", [Case("self_attention", "linear"), Case("mixer", "gated_relu"), Case("mlp", "linear")])
def test_units_start_along_the_singular_pairs_of_the_gradient_at_the_empty_head(case: Case) -> None:
    found = make_setting(case).problem
    generator = torch.Generator().manual_seed(0)
    start = random_factors(found, [2] * len(found.components), generator, torch.float64)
    # Without random parts.
    for units in start.units:
        for t in units.tensors():
            t.zero_()
    L = found.null_gradient()
    after = along_pairs(found, start, L)
    for k, new in enumerate(after.units):
        assert new.u is not None
        for gate, gamma in found.gammas(L, k):
            _, sigma, right = torch.linalg.svd(gamma, full_matrices=False)
            own = new.of_block(gate)
            u, v = new.u[own].flatten(1), new.v[own].flatten(1)
            assert bool((u.norm(dim=1) > 0).all())
            for j in range(len(own)):
                # A step of descent: -u v^T is along the singular pair.
                assert float(u[j] @ gamma @ v[j]) == pytest.approx(-float(sigma[j] * u[j].norm() * v[j].norm()))
                assert abs(float(v[j] @ right[j])) == pytest.approx(float(v[j].norm()))
                assert float(u[j].norm()) == pytest.approx(float(v[j].norm()))


@pytest.mark.parametrize("ratio", [0.5, 0.1, 1e-3, 1e-5])
def test_no_start_is_above_the_empty_head(ratio: float) -> None:
    found = make_setting(Case("self_attention", "linear")).problem
    found = found.with_beta(ratio * beta_max(found))
    assert found.value(first_guess(found, None, torch.Generator().manual_seed(0))) < 1.05 * found.null_loss()


def test_no_pairs_where_gamma_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_setting(Case("self_attention", "linear")).problem
    start = random_factors(found, [3], torch.Generator().manual_seed(0), torch.float64)
    monkeypatch.setattr(BlockSubspace, "exact", lambda self, size, rounds: False)
    L = found.null_gradient()
    assert torch.equal(along_pairs(found, start.clone(), L).flat(), start.flat())
    monkeypatch.undo()
    assert not torch.equal(along_pairs(found, start.clone(), L).flat(), start.flat())


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_a_proof_is_tried_nearer_to_the_tolerance_where_estimates_are_exact(
    tol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_setting(Case("self_attention", "linear")).problem
    state = solver(found, tol)
    assert state.slack == 1.0
    assert 0.94 * tol <= state.target <= 0.987 * tol
    solution = solver_function("factored")(found, tol=tol)
    assert solution.converged
    assert solution.stats["proofs"] == 1
    monkeypatch.setattr(BlockSubspace, "exact", lambda self, size, rounds: False)
    assert solver(found, tol).target == pytest.approx(0.94 * tol)


@pytest.mark.parametrize("case", [Case("self_attention", "linear"), Case("fno", "gated_relu"), Case("mixer", "relu")])
def test_solutions_can_be_differentiated(case: Case) -> None:
    """Iterations run without what derivatives need; what comes out must not."""
    found = make_setting(case).problem
    solution = solver_function("factored")(found, tol=1e-2)
    assert not any(t.is_inference() for t in solution.factors.tensors())
    u = solution.factors.flat().requires_grad_()
    u.square().sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(u.grad, 2 * solution.factors.flat())
