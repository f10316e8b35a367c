"""Soft directions: what they are, that their Hessian is the right one, and that solves end where they did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from contract_cases import NUCLEAR, SMALL, Case, make_setting, random_units
from convexheads.problem import Problem
from convexheads.solvers import cores, factored, preconditioner, solver_function
from convexheads.solvers.cores import Core, Cores
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.subspace import OutsidePairs, OutsideSubspace
from convexheads.types import Factors, Units

every_case = pytest.mark.parametrize("case", NUCLEAR, ids=str)


def outside(problem: Problem, factors: Factors, rounds: int = 3) -> dict[tuple[int, int | None], OutsidePairs]:
    O = problem.forward(factors)
    L = problem.loss.gradient(O, *problem.targets_of(slice(0, problem.n), problem.dtype))
    return OutsideSubspace(problem, torch.Generator().manual_seed(0)).pairs(L, factors, 20, rounds)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions on the smallest of problems, too."""
    monkeypatch.setattr(preconditioner, "FEW_ROWS", 0)
    monkeypatch.setattr(cores, "ROWS_PER_DIRECTION", 1)
    monkeypatch.setattr(factored, "SOFT_WORK", 0.0)
    monkeypatch.setattr(factored, "NEAR", 1.0)


@every_case
def test_outside_pairs_are_singular_pairs_beside_the_units(case: Case) -> None:
    problem = make_setting(replace(case, n=12)).problem
    factors = random_units(problem)
    L = problem.loss.gradient(problem.forward(factors), *problem.targets_of(slice(0, problem.n), torch.float64))
    for (k, gate), pairs in outside(problem, factors, rounds=60).items():
        units = factors.units[k]
        assert units.u is not None
        own = slice(None) if units.gate is None else units.gate == gate
        u, v = units.u[own].flatten(1), units.v[own].flatten(1)
        assert len(pairs.sigma) == min(20, len(u), max(0, min(u.shape[1], v.shape[1]) - len(u)))
        P, Q = (torch.linalg.qr(t.mT).Q for t in (u, v))
        gamma = problem.gamma(L, k, gate)
        rest = gamma - P @ (P.mT @ gamma)
        rest = rest - (rest @ Q) @ Q.mT
        exact = torch.linalg.svdvals(rest)[: len(pairs.sigma)]
        torch.testing.assert_close(pairs.sigma, exact, rtol=0.05, atol=1e-9 * float(gamma.norm()))
        torch.testing.assert_close(
            rest @ pairs.right.mT,
            (pairs.left * pairs.sigma[:, None]).mT,
            rtol=0,
            atol=0.1 * float(exact.max()) if len(exact) else 0,
        )


@every_case
def test_the_preconditioner_stays_symmetric_and_positive(case: Case, everywhere: None) -> None:
    for loss in ("squared", "cross_entropy"):
        if loss == "cross_entropy" and case.c == 1:
            continue
        problem = make_setting(replace(case, loss=loss, n=40)).problem
        factors = random_units(problem)
        found = Preconditioner(problem, factors, torch.Generator().manual_seed(0), outside(problem, factors), gap=0.1)
        assert found.cores is not None
        eye = torch.eye(len(factors.flat()), dtype=torch.float64)
        matrix = found.apply(eye)
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-7, atol=1e-7 * float(matrix.abs().max()))
        values = torch.linalg.eigvalsh(matrix)
        flat = int(loss == "cross_entropy" and factors.intercept is not None)
        assert bool((values[flat:] > 0).all())
        for k, core in found.cores.blocks:
            # Directions are orthonormal: what is added along them is found again, and nothing else.
            zeros = torch.zeros(len(core.chosen), len(eye), dtype=torch.float64)
            parts, _ = found.cores._split(zeros)
            core.add_along(torch.eye(len(core.chosen), dtype=torch.float64), *parts[k])
            expected = torch.eye(len(core.chosen), dtype=torch.float64)
            torch.testing.assert_close(zeros @ zeros.mT, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(core.parts(*parts[k]), expected, rtol=0, atol=1e-9)


def balanced(problem: Problem, sizes: list[float]) -> tuple[Factors, Tensor, Tensor]:
    """Balanced orthogonal units of these sizes, with the orthonormal vectors (r, p), (r, q) that they lie along."""
    (component,) = problem.components
    rng = np.random.default_rng(3)
    m = len(sizes)
    A = torch.from_numpy(np.linalg.qr(rng.normal(size=(component.p, m)))[0].T.copy())
    B = torch.from_numpy(np.linalg.qr(rng.normal(size=(component.q, m)))[0].T.copy())
    root = torch.tensor(sizes, dtype=torch.float64).sqrt()[:, None]
    like = random_units(problem, m)
    (units,) = like.units
    assert units.u is not None
    return Factors([Units((root * A).view_as(units.u), (root * B).view_as(units.v))], like.intercept), A, B


def test_decay_and_coupling_are_those_of_the_factored_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without curvature of the loss the Hessian is beta I with Gamma between u and v: here with a Gamma of choice."""
    monkeypatch.setattr(cores, "DAMPING", 0.0)
    problem = make_setting(Case("self_attention", d=4, c=3, n=30), beta=0.7).problem
    (component,), beta = problem.components, problem.beta
    factors, A, B = balanced(problem, [3.0, 1.0, 0.2])
    rng = np.random.default_rng(4)

    def beside(basis: Tensor) -> Tensor:
        rows = torch.from_numpy(rng.normal(size=(2, basis.shape[1])))
        return torch.linalg.qr((rows - (rows @ basis.mT) @ basis).mT).Q.mT

    left, right, sigma = beside(A), beside(B), torch.tensor([0.9, 0.6], dtype=torch.float64) * beta
    gamma = -beta * A.mT @ B + (left.mT * sigma) @ right
    core = Core(component, None, factors.units[0], torch.arange(3), beta, OutsidePairs(left, right, sigma), gap=0.0)
    rows, k, c = 60, component.form.value_width, problem.outputs
    nothing = torch.zeros(rows, c, dtype=torch.float64)
    core.add(
        torch.randn(rows, 3, k).double(),
        torch.randn(rows, 2, k).double(),
        nothing,
        torch.full((rows,), 1.0 / rows).double(),
    )
    with pytest.raises(torch.linalg.LinAlgError):
        # Without damping the softest directions have no curvature at all.
        core.finish(problem.world, rows, c, centred=False)
    monkeypatch.setattr(cores, "DAMPING", 0.01)
    core = Core(component, None, factors.units[0], torch.arange(3), beta, OutsidePairs(left, right, sigma), gap=0.0)
    core.add(
        torch.randn(rows, 3, k).double(),
        torch.randn(rows, 2, k).double(),
        nothing,
        torch.full((rows,), 1.0 / rows).double(),
    )
    core.finish(problem.world, rows, c, centred=False)
    n = len(core.chosen)
    assert n == 5 * 5 - 2 * 2
    du, dv = torch.zeros(n, 3, component.p).double(), torch.zeros(n, 3, component.q).double()
    core.add_along(torch.eye(n, dtype=torch.float64), du, dv)
    coupled = torch.einsum("imp,pq,jmq->ij", du, gamma, dv)
    exact = beta * torch.eye(n).double() + coupled + coupled.mT
    model = torch.linalg.inv(core.inverse) - 0.01 * beta * torch.eye(n).double()
    torch.testing.assert_close(model, exact, rtol=0, atol=1e-8)


def test_the_curvature_of_the_loss_is_estimated_from_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared loss: with many samples the Hessian in the directions is that of the objective, to sampling error."""
    monkeypatch.setattr(cores, "SOFT", float("inf"))
    problem = make_setting(Case("mixer", s=4, d=3, c=2, n=4000, intercept=True), beta=0.02, uniform=True).problem
    factors, *_ = balanced(problem, [0.6, 0.2])
    found = Preconditioner(problem, factors, torch.Generator().manual_seed(0), outside(problem, factors), gap=0.0)
    assert found.cores is not None
    ((_, core),) = found.cores.blocks
    n, x = len(core.chosen), factors.flat()
    assert n > 4
    directions = torch.zeros(n, len(x), dtype=torch.float64)
    parts, _ = found.cores._split(directions)
    core.add_along(torch.eye(n, dtype=torch.float64), *parts[0])
    # The loss alone, linearised in the outputs: Gauss-Newton, with the intercept eliminated.
    step = 1e-5

    def outputs(at: Tensor) -> Tensor:
        moved = factors.like(at)
        return problem.forward(Factors(moved.units, None)).flatten()

    moves = torch.stack([(outputs(x + step * d) - outputs(x - step * d)) / (2 * step) for d in directions])
    moves = moves.view(n, problem.n, -1)
    moves = moves - moves.mean(1, keepdim=True)
    exact = torch.einsum("inc,jnc->ij", moves, moves) / problem.n
    model = torch.linalg.inv(core.inverse) - cores.DAMPING * problem.beta * torch.eye(n).double()
    place = {int(pair): i for i, pair in enumerate(core.chosen)}
    for pair, i in place.items():
        model[i, i] -= problem.beta
        model[i, place[pair % core.side * core.side + pair // core.side]] += problem.beta * float(
            core.coupling.flatten()[pair]
        )
    assert float((model - exact).norm()) < 0.15 * float(exact.norm())


@pytest.mark.parametrize("case", [case for case in SMALL if case.head != "linear"], ids=str)
def test_solves_end_at_the_same_optimum(case: Case, everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    used = 0
    build = Cores.finish

    def counted(self: Cores, centred: bool) -> None:
        nonlocal used
        used += 1
        build(self, centred)

    monkeypatch.setattr(Cores, "finish", counted)
    for loss in ("squared", "cross_entropy"):
        problem = make_setting(replace(case, loss=loss, n=60, c=2), beta=0.02).problem
        used = 0
        with_them = solver_function("factored")(problem, tol=1e-6)
        # Elsewhere the gap may be closed at the first check.
        assert used > 0 or case.head not in ("self_attention", "mixer")
        with monkeypatch.context() as patch:
            patch.setattr(factored, "SOFT_WORK", float("inf"))
            used = 0
            without = solver_function("factored")(problem, tol=1e-6)
        assert used == 0
        assert with_them.converged
        assert with_them.certificate.certified
        assert with_them.certificate.primal == pytest.approx(without.certificate.primal, rel=2e-6)


def test_far_from_an_optimum_and_on_cheap_problems_there_are_none() -> None:
    problem = make_setting(Case("self_attention", n=30), beta=0.02).problem
    state = factored.Factored(problem, 1e-3, 10, None, 0, None)
    factors = random_units(problem)
    bound = state.estimate(factors).bound
    assert not state.worth_softening(factors, None, [], False)
    assert not state.worth_softening(factors, replace(bound, relative_gap=0.01), [], False)
    assert state.preconditioner(factors, None).cores is None


def test_they_come_near_an_optimum_or_where_the_objective_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, "SOFT_WORK", 0.0)
    problem = make_setting(Case("self_attention", n=30), beta=0.02).problem
    state = factored.Factored(problem, 1e-3, 10, None, 0, None)
    factors = random_units(problem)
    bound = state.estimate(factors).bound
    fall = factored.SETTLING * bound.primal
    fast, slow = ([bound.primal - each * k / 10 for k in range(11)] for each in (2.0 * fall, 0.5 * fall))
    far, near = replace(bound, relative_gap=0.5), replace(bound, relative_gap=0.05)
    assert not state.worth_softening(factors, far, fast, False)
    assert not state.worth_softening(factors, far, [], False)
    assert not state.worth_softening(factors, far, slow[:10], False)
    assert state.worth_softening(factors, far, slow, False)
    # A small gap tells while few values are known, but not against them.
    assert state.worth_softening(factors, near, [], False)
    assert state.worth_softening(factors, near, slow[:5], False)
    assert not state.worth_softening(factors, near, fast, False)
    assert not state.worth_softening(factors, near, fast[:10], False)
    # Where a preconditioner is due in any case, sooner.
    soon = replace(bound, relative_gap=0.25)
    assert not state.worth_softening(factors, soon, fast, False)
    assert state.worth_softening(factors, soon, fast, True)
    assert not state.worth_softening(factors, far, fast, True)
