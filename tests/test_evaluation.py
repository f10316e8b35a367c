"""Outputs and gradients by whole blocks: those by units, whatever the head, the chunks and the precision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import convexheads.evaluation
from contract_cases import CASES, Case, float32_problem, make_setting, random_units
from convexheads import memory
from convexheads.evaluation import LOW_GAIN, Evaluation, by_block
from convexheads.operator import split_rows
from convexheads.problem import Problem
from convexheads.solvers import solver_function
from convexheads.solvers.correction import Correction
from convexheads.solvers.warmup import minibatches
from convexheads.subspace import BlockSubspace
from convexheads.types import Factors, Units

WHOLE = [case for case in CASES if case.pooled and case.activation == "linear" and case.head != "linear"]
SUMS = [
    (Case("self_attention", s=4, d=4, c=3), Case("mixer", s=5, d=3, c=3)),
    (Case("mixer", s=4, d=4, c=3), Case("linear", s=4, d=4, c=3)),
    (Case("mlp", s=4, d=4, c=3), Case("self_attention", activation="gated_relu", s=4, d=4, c=3)),
]
every_head = pytest.mark.parametrize(
    "heads", [*((case,) for case in WHOLE), *SUMS], ids=lambda h: "+".join(map(str, h))
)


def evaluated(
    problem: Problem, factors: Factors, step: int, **options: object
) -> tuple[Evaluation, Tensor, float, Tensor]:
    """An evaluation after a pass in chunks of so many samples: outputs, loss, and the gradient."""
    flat = torch.zeros_like(factors.flat())
    found = Evaluation(problem, factors, factors.like(flat), **options)  # type: ignore[arg-type]
    dtype = found.low or flat.dtype
    O, loss = [], 0.0
    for index in split_rows(problem.local, step):
        stats = problem.stats_of(index, dtype)
        targets, weights = problem.targets_of(index, flat.dtype)
        O.append(found.outputs(found.parts(stats), targets.shape[:-1]))
        loss += found.add(stats, targets, weights)
    found.close()
    return found, torch.cat(O), loss, flat


@pytest.fixture(autouse=True)
def always_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every component that can, however few its units."""
    monkeypatch.setattr(convexheads.evaluation, "BLOCK_GAIN", math.inf)
    monkeypatch.setattr(convexheads.evaluation, "LOW_GAIN", math.inf)


def test_every_pooled_linear_form_with_units_has_the_way_by_blocks() -> None:
    assert {case.head for case in WHOLE} == {"self_attention", "mixer", "fno", "block_fno", "mlp"}


@every_head
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_blocks_give_what_units_give(heads: tuple[Case, ...], step: int) -> None:
    problem = make_setting(*heads).problem
    factors = random_units(problem, 5)
    units, O, loss, gradient = evaluated(problem, factors, step, by_units=True)
    blocks, P, same, flat = evaluated(problem, factors, step)
    assert not units.whole
    assert blocks.whole == (len(heads) == 1 or heads is SUMS[0])
    torch.testing.assert_close(P, O, rtol=1e-11, atol=1e-12)
    assert same == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(flat, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_the_whole_pass_of_a_problem_is_its_objective(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(case).problem
    factors = random_units(problem, 5)
    value, gradient = problem.value_and_gradient(factors)
    batches = list(minibatches(problem, factors, factors.flat(), problem.n, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(batches[0], gradient.flat(), rtol=1e-9, atol=1e-11)
    monkeypatch.setattr(convexheads.evaluation, "BLOCK_GAIN", 0.0)
    same, other = problem.value_and_gradient(factors)
    assert value == pytest.approx(same, rel=1e-12)
    torch.testing.assert_close(gradient.flat(), other.flat(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(problem.forward(factors), evaluated(problem, factors, 9)[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_rounded_factors_of_products(case: Case) -> None:
    """Sums over chunks keep the digits of float32."""
    problem = float32_problem(case)
    factors = random_units(problem, 5).to(torch.float32)
    exact = evaluated(problem, factors, 3)
    problem.low_stats(torch.bfloat16)
    low = problem.in_dtype(torch.float32)
    low.low = torch.bfloat16
    rough = evaluated(low, factors, 3, low=torch.bfloat16)
    assert rough[0].whole
    assert rough[3].dtype == torch.float32
    assert 0.0 < float((rough[3] - exact[3]).norm()) <= 0.03 * float(exact[3].norm())
    assert rough[2] == pytest.approx(exact[2], rel=1e-2)


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_gradients_in_values_alone(case: Case) -> None:
    """Units without u, as corrections ask for them."""
    problem = make_setting(case).problem
    factors = random_units(problem, 5)
    every = evaluated(problem, factors, 1000)[3]
    into = Factors([Units(None, torch.zeros_like(units.v)) for units in factors.units])
    for by_units in (True, False):
        for units in into.units:
            units.v.zero_()
        found = Evaluation(problem, factors, into, by_units=by_units)
        for index, stats in problem.chunks(torch.float64):
            found.add(stats, *problem.targets_of(index, torch.float64))
        found.close()
        for own, units in zip(into.units, factors.like(every).units, strict=True):
            torch.testing.assert_close(own.v, units.v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("outputs", [2, 60])
def test_which_way_is_taken(outputs: int) -> None:
    """Blocks where units are many beside what a block takes; never with gates, of ridge branches, or without units."""
    problem = make_setting(Case("mixer", n=20, s=8, d=8, c=outputs)).problem
    (component,) = problem.components
    enough = math.ceil(component.form.block_work / (1.5 * component.gradient_work))
    assert 1 < enough < 20
    for count, expected in ((enough - 1, False), (enough, True), (100, True)):
        assert by_block(component, random_units(problem, count).units[0], 1.5) == expected
    assert not by_block(component, random_units(problem, enough).units[0], LOW_GAIN)
    assert not by_block(component, Units(None, torch.zeros(1, 8, component.width)), math.inf)
    for case in (Case("mixer", activation="gated_relu"), Case("self_attention", pooled=False)):
        problem = make_setting(case).problem
        assert not by_block(problem.components[0], random_units(problem, 9).units[0], 1e9)


def test_chunks_are_bounded_by_what_is_read() -> None:
    problem = float32_problem(Case("mixer", n=50, s=6, d=8))
    factors = random_units(problem, 50).to(torch.float32)
    rows = Evaluation(problem, factors).rows(torch.float32)
    assert 1 < rows <= 4 * convexheads.evaluation.BLOCK_NUMBERS // problem.stats_bytes
    with memory.limited("16MB"):
        small = float32_problem(Case("mixer", n=50, s=6, d=8))
    found = Evaluation(small, factors).rows(torch.float32)
    assert found * small.stats_bytes <= 2 * small.budget.lasting == 2 * 10**6


@every_head
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_corrections_have_the_same_equations(
    heads: tuple[Case, ...], loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the features of their vectors, kept or not, and by blocks, where only sampled rows take features."""
    problem = make_setting(*(replace(case, loss=loss, n=60) for case in heads)).problem
    factors = solver_function("factored")(problem, tol=1e-9, max_iter=4, prove=False).factors.to(problem.dtype)
    O = problem.forward(factors)
    L = problem.loss.gradient(O, *problem.targets_of(slice(0, problem.n), problem.dtype))
    problem = problem.with_beta(0.3 * problem.beta)
    pairs = BlockSubspace(problem, torch.Generator().manual_seed(0)).top_pairs(L, 6, 12)[1]
    assert pairs
    found = []
    for gain, kept in ((math.inf, True), (0.0, True), (0.0, False)):
        monkeypatch.setattr(convexheads.evaluation, "BLOCK_GAIN", gain)
        problem.cache_bytes = 10**9 if kept else 0
        equations = Correction(problem, O, pairs, factors)
        assert equations.whole == (gain > 0 and heads is not SUMS[2])
        assert (equations.kept is None) == (equations.whole or not kept)
        y = torch.linspace(-1, 1, len(equations.right), dtype=problem.dtype)
        found.append((equations.right, equations.factor, equations.apply(y)))
    for other in found[1:]:
        for mine, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, same, rtol=1e-8, atol=1e-9 * float(same.abs().max()))
