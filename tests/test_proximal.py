"""Blocks that are vectors: adjoints of all gates at once, and the proximal steps that programs of them start from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from contract_cases import Case, make_setting, random_units
from convexheads import ConvexHeadRegressor
from convexheads.architectures import architecture_class
from convexheads.certificate import penalty, refit_intercept
from convexheads.memory import Budget
from convexheads.problem import Problem
from convexheads.solvers import proximal
from convexheads.solvers.base import solver_function
from convexheads.solvers.proximal import VectorBlocks, has_vector_blocks, proximal_start
from convexheads.solvers.units import no_units
from convexheads.subspace import beta_max
from convexheads.types import Factors

VECTORS = [
    Case("mlp", "gated_relu", s=1, c=1, n=60, d=5, gates=6),
    Case("mlp", "gated_relu", s=1, c=1, n=60, d=5, gates=6, intercept=False),
    Case("mlp", "gated_relu", s=3, c=1, n=60, d=5, gates=6),
    Case("mlp", "gated_relu", s=1, c=1, n=60, d=5, gates=6, loss="multilabel_logistic"),
    Case("mlp", "linear", c=1, n=60),
    Case("fno", "linear", c=1, n=60),
    Case("block_fno", "linear", c=2, n=60, n_blocks=2),
]
every_vector = pytest.mark.parametrize("case", VECTORS, ids=str)


def vector_problem(case: Case, ratio: float) -> Problem:
    """A program with targets that its head can partly fit, at a share of its beta_max."""
    setting = make_setting(case)
    found = setting.problem
    signal = found.forward(random_units(found, 1, scale=1.0))
    if case.loss == "squared":
        found.targets += 2.0 * signal
    else:
        found.targets = torch.sigmoid(signal)
    return found.with_beta(ratio * beta_max(found))


def empty(problem: Problem) -> Factors:
    return Factors([no_units(units) for units in random_units(problem).units], problem.null_outputs()[1])


def objective(problem: Problem, factors: Factors) -> float:
    """Of the convex program, at the best intercept."""
    refitted, O = refit_intercept(problem, factors)
    return problem.loss.value(O, problem.targets, problem.weights) + penalty(problem, refitted)


@pytest.mark.parametrize("outputs", [1, 7])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_joint_adjoints_are_those_of_every_gate(outputs: int, tokens: int, dtype: torch.dtype) -> None:
    case = Case("mlp", "gated_relu", s=tokens, c=outputs, n=40, d=3, gates=4)
    # float64 statistics are kept for iterations in float64 only, and formed afresh otherwise.
    found = make_setting(case).problem.in_dtype(dtype)
    assert found.components[0].form.joint
    L = torch.randn(40, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [found.gamma(L, 0, gate) for gate in range(4)]
    for size in (2**20, 50):
        found.budget = Budget(workspace=size)
        gates, gammas = zip(*found.gammas(L, 0), strict=True)
        assert list(gates) == [0, 1, 2, 3]
        torch.testing.assert_close(torch.stack(gammas), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_one_token_and_uneven_units() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 1, 5, generator=generator, dtype=torch.float64)
    gates = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    plain = architecture_class("mlp")(1, 5, 2)
    short = plain.form("gated_relu")
    assert type(short) is not type(plain)
    for gate in ([0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 2, 3], [1, 1, 1, 3, 3], [0, 1, 2, 2]):
        index = torch.tensor(gate)
        u = torch.randn(len(gate), 5, generator=generator, dtype=torch.float64)
        expected = plain.unit_features(plain.prepare(X, gates), u, index)
        torch.testing.assert_close(short.unit_features(short.prepare(X, gates), u, index), expected)


def test_what_has_vector_blocks() -> None:
    assert all(has_vector_blocks(make_setting(case).problem) for case in VECTORS)
    others = [Case("mlp", "gated_relu", c=2), Case("mlp", "gated_relu", pooled=False, c=1), Case("linear", c=1)]
    assert not any(has_vector_blocks(make_setting(case).problem) for case in [*others, Case("mixer", c=1)])


@every_vector
def test_vectors_and_factors(case: Case) -> None:
    found = make_setting(case).problem
    blocks = VectorBlocks(found)
    factors = random_units(found, 2)
    x = blocks.vector(factors)
    bare = found.forward(replace(factors, intercept=None))
    torch.testing.assert_close(blocks.forward(x), bare, rtol=1e-12, atol=1e-12)
    balanced = blocks.balanced(x, factors.intercept)
    torch.testing.assert_close(found.forward(balanced), found.forward(factors), rtol=1e-12, atol=1e-12)
    # Of vectors the nuclear norm is the Euclidean one, and balanced units have no more weight decay.
    expected = float((blocks.penalties * blocks.norms(x)).sum())
    assert penalty(found, factors) == pytest.approx(expected, rel=1e-10)
    assert found.weight_decay(balanced) == pytest.approx(expected, rel=1e-10)
    # The adjoint of the outputs in x.
    L = torch.randn(bare.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert float(blocks.adjoint(L) @ x) == pytest.approx(float((L * bare).sum()), rel=1e-10)


@every_vector
@pytest.mark.parametrize("ratio", [0.5, 0.1])
def test_steps_arrive_near_the_optimum(case: Case, ratio: float) -> None:
    found = vector_problem(case, ratio)
    reached = proximal_start(found, empty(found))
    best = solver_function("fista")(found, tol=1e-8, max_iter=20_000)
    assert best.converged
    value = objective(found, reached)
    assert best.certificate.dual <= value
    assert value - best.certificate.primal <= 0.01 * (found.null_loss() - best.certificate.primal)
    # From the optimum the steps lead nowhere.
    again = objective(found, proximal_start(found, best.factors))
    assert again == pytest.approx(best.certificate.primal, rel=1e-7)


@every_vector
def test_above_beta_max_every_block_is_zero(case: Case) -> None:
    found = vector_problem(case, 1.001)
    assert proximal_start(found, empty(found)).n_units == 0
    solution = solver_function("factored")(found, tol=1e-6)
    assert solution.converged
    assert solution.certificate.primal == pytest.approx(found.null_loss(), rel=1e-6)


@pytest.mark.parametrize("case", VECTORS[:4], ids=str)
def test_solvers_agree_on_vectors(case: Case) -> None:
    found = vector_problem(case, 0.05)
    solutions = [solver_function(name)(found, tol=1e-7, max_iter=20_000) for name in ("factored", "fista")]
    for solution in solutions:
        assert solution.converged
        assert solution.certificate.certified
    values = [solution.certificate.primal for solution in solutions]
    assert values[0] == pytest.approx(values[1], rel=2e-7)


@pytest.mark.parametrize("scales", [(1.0, 1e-3), (1e-3, 1.0), (1.0, 1.0)])
def test_sums_of_vectors(scales: tuple[float, float]) -> None:
    """A branch of small tokens has no block in use, and nothing minds."""
    heads = (replace(VECTORS[0], n=80), replace(VECTORS[2], n=80))
    found = make_setting(*heads).problem
    for tokens, scale in zip(found.tokens, scales, strict=True):
        tokens *= scale
    found = found.with_beta(0.1 * beta_max(found))
    assert has_vector_blocks(found)
    solutions = [solver_function(name)(found, tol=1e-7, max_iter=20_000) for name in ("factored", "fista")]
    assert all(solution.converged for solution in solutions)
    assert solutions[0].certificate.primal == pytest.approx(solutions[1].certificate.primal, rel=2e-7)


def test_targets_of_zero() -> None:
    found = make_setting(VECTORS[0]).problem
    found.targets.zero_()
    solution = solver_function("factored")(found.with_beta(0.1), tol=1e-6)
    assert solution.converged
    assert solution.certificate.primal == pytest.approx(0.0, abs=1e-12)


def test_a_warm_start_of_vectors() -> None:
    found = vector_problem(replace(VECTORS[0], n=1200), 0.1)
    solve = solver_function("factored")
    first = solve(found, tol=1e-5)
    next_ = solve(found.with_beta(0.5 * found.beta), tol=1e-5, init=first.factors)
    assert first.converged
    assert next_.converged
    assert next_.certificate.primal < first.certificate.primal


def test_bad_conditioning_ends_at_the_gap_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the steps have hardly moved, the factored iterations do the work."""
    monkeypatch.setattr(proximal, "STEPS", 3)
    found = vector_problem(replace(VECTORS[0], intercept=False), 0.02)
    found.tokens[0] *= torch.logspace(0, -3, 5, dtype=torch.float64)
    found.forget()
    solution = solver_function("factored")(found, tol=1e-6)
    assert solution.converged
    assert solution.certificate.certified


def test_a_regressor_of_one_output_in_float32() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4000, 12))
    y = np.maximum(X @ rng.standard_normal(12), 0) + 0.1 * rng.standard_normal(4000)
    head = ConvexHeadRegressor("mlp", activation="gated_relu", gates=20, beta_ratio=0.05, tol=1e-4, random_state=0)
    head.fit(X, y)
    assert head.certificate_.certified
    assert head.certificate_.relative_gap <= 1e-4
    exact = ConvexHeadRegressor(
        "mlp", activation="gated_relu", gates=20, beta_ratio=0.05, tol=1e-6, dtype="float64", random_state=0
    ).fit(X, y)
    assert head.certificate_.primal == pytest.approx(exact.certificate_.primal, rel=1e-4)
