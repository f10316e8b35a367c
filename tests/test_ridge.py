"""Heads of ridge branches only: the gap that the gradient tells, the dual at the gradient itself, both precisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from contract_cases import Case, make_setting, make_targets, random_units
from convexheads.bench.independent import ridge_gradient
from convexheads.certificate import DualPoint, bound_sigma, certify_factors, dual_value, refit_intercept, unscaled_value
from convexheads.losses import LOSSES, make_loss
from convexheads.problem import Problem
from convexheads.solvers.factored import RIDGE_PATIENCE, solve_factored

every_loss = pytest.mark.parametrize("loss", sorted(LOSSES))
LINEAR = Case("linear", loss="cross_entropy", n=60, s=1, d=9, c=4)


def linear_problem(**changes: Any) -> Problem:
    return make_setting(replace(LINEAR, **changes), beta=1e-2, uniform=True).problem


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_the_certified_gap_is_that_of_the_gradient(tol: float) -> None:
    problem = linear_problem()
    solution = solve_factored(problem, tol=tol)
    assert solution.converged
    assert solution.certificate.certified
    X, Y = problem.tokens_of(0, slice(0, 60))[:, 0].numpy(), problem.targets.numpy()
    W, b = solution.factors.units[0].v[0].numpy(), solution.factors.intercept
    assert b is not None
    value, norm = ridge_gradient(X, Y, W, b.numpy(), problem.beta)
    assert solution.certificate.primal == pytest.approx(value, rel=1e-12)
    # A search along the ray may close a part of it.
    assert 0.5 <= solution.certificate.gap / (norm**2 / (2 * problem.beta)) <= 1.001
    exact = solve_factored(problem, tol=1e-12).certificate.primal
    assert exact - 1e-12 <= value <= exact + solution.certificate.gap + 1e-12
    assert solution.history.gap[-1] == pytest.approx(solution.certificate.relative_gap, rel=0.5)


@every_loss
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_float32_goes_on_in_float64_where_its_noise_begins(loss: str, intercept: bool, pooled: bool) -> None:
    case = Case("linear", loss=loss, intercept=intercept, pooled=pooled, n=50, s=3, d=6, c=3)
    problem = make_setting(case, beta=1e-2).problem
    exact = solve_factored(problem, tol=1e-12)
    mixed = solve_factored(problem.in_dtype(torch.float32), tol=1e-12)
    assert exact.converged
    assert mixed.converged
    assert mixed.certificate.certified
    assert mixed.n_iter <= exact.n_iter + 4 * RIDGE_PATIENCE
    assert mixed.certificate.primal == pytest.approx(exact.certificate.primal, rel=1e-11)


@every_loss
@pytest.mark.parametrize("heads", [(Case("mixer"),), (Case("linear"),), (Case("mlp"), Case("linear"))], ids=str)
def test_the_dual_at_the_gradient_is_that_of_the_conjugate(heads: tuple[Case, ...], loss: str) -> None:
    problem = make_setting(*(replace(case, loss=loss) for case in heads)).problem
    for scale in (0.05, 0.5, 2.0):
        refitted, O = refit_intercept(problem, random_units(problem, scale=scale))
        point = DualPoint.at(problem, O)
        _, ridge = bound_sigma(problem, point.L)
        targets, weights = problem.targets, problem.weights
        assert point.loss == pytest.approx(problem.loss.value(O, targets, weights), rel=1e-12)
        conjugate = problem.loss.conjugate(point.L, targets, weights)
        assert point.inner - point.loss == pytest.approx(conjugate, rel=1e-9, abs=1e-12)
        for upper in (0.2, 0.9, 1.0, 1.5):
            searched, _ = dual_value(problem, point.L, upper, ridge, 60)
            value, alpha = dual_value(problem, point.L, upper, ridge, 60, point)
            assert 0 <= alpha <= upper
            assert value == pytest.approx(searched, rel=1e-6, abs=1e-9)
            primal = problem.value(refitted, torch.float64)
            unscaled = unscaled_value(point, upper, ridge, primal)
            if unscaled is not None:
                # A search would close a tenth of the gap at most.
                assert upper >= 1
                assert unscaled <= searched + 1e-9
                assert primal - unscaled <= (primal - searched) / 0.9 + 1e-9


@every_loss
def test_the_best_constant_has_a_closed_form(loss: str) -> None:
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(make_targets(loss, (9, 3), rng))
    weights = torch.from_numpy(rng.dirichlet(np.ones(9)))
    found = make_loss(loss)
    b = found.best_constant(weights @ targets)
    assert b is not None
    O = b.expand(9, 3)
    assert float(found.gradient(O, targets, weights).sum(0).abs().max()) < 1e-14


@pytest.mark.parametrize("loss", ["cross_entropy", "multilabel_logistic"])
def test_without_a_best_constant_newton_takes_over(loss: str) -> None:
    problem = make_setting(replace(LINEAR, loss=loss)).problem
    targets = problem.targets.clone()
    targets[:, 1] = 0.0
    if loss == "cross_entropy":
        targets /= targets.sum(1, keepdim=True)
    assert problem.loss.best_constant(problem.weights @ targets) is None
    rare = Problem(problem.components, problem.tokens, problem.loss, targets, problem.weights, dtype=torch.float64)
    O, b = rare.null_outputs()
    assert b is not None
    assert bool(torch.isfinite(b).all())
    assert float(rare.loss.gradient(O, targets, rare.weights).sum(0).abs().max()) < 1e-10


def test_the_empty_head_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear_problem()
    calls = []
    original = Problem.best_intercept
    monkeypatch.setattr(Problem, "best_intercept", lambda *args: (calls.append(1), original(*args))[1])
    first, b = problem.null_outputs()
    again, _ = problem.with_beta(3.0).in_dtype(torch.float32).null_outputs()
    assert len(calls) == 1
    assert torch.equal(first, again)
    assert problem.null_loss() == problem.loss.value(first, problem.targets, problem.weights)
    # Other samples are another problem.
    _, other = linear_problem(seed=1).null_outputs()
    assert len(calls) == 2
    assert b is not None
    assert other is not None
    assert not torch.equal(b, other)


def test_a_coarse_intercept_is_near_enough() -> None:
    problem = linear_problem()
    _, O = refit_intercept(problem, random_units(problem))
    for accuracy in (1e-3, 1e-6):
        b = problem.best_intercept(O + 1.0 + torch.arange(4.0), None, accuracy)
        L = problem.loss.gradient(O + 1.0 + torch.arange(4.0) + b, problem.targets, problem.weights)
        assert float(L.sum(0).abs().max()) <= accuracy


def test_a_path_step_without_proof_says_so() -> None:
    solution = solve_factored(linear_problem(), tol=1e-4, prove=False)
    assert solution.converged
    assert not solution.certificate.certified
    proved = certify_factors(linear_problem(), solution.factors)
    assert proved.certified
    assert proved.relative_gap <= 1.5e-4
