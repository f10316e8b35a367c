"""The preconditioner: inverses against dense ones, and exactness where the approximation leaves nothing out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from contract_cases import Case, cases, float32_problem, make_setting, random_units
from convexheads import memory
from convexheads.distributed import ALONE
from convexheads.problem import Problem
from convexheads.solvers import preconditioner as module
from convexheads.solvers.inverses import (
    WELL_DAMPED,
    DampedInverse,
    KroneckerInverse,
    OutputwiseInverse,
    damped_inverse,
)
from convexheads.solvers.preconditioner import LEAST_COUNTED, HeavyRows, Preconditioner
from convexheads.solvers.starts import random_factors
from convexheads.types import Factors, Units

CASES = list(cases())
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def preconditioner(problem: Problem, factors: Factors) -> Preconditioner:
    return Preconditioner(problem, factors, torch.Generator().manual_seed(0))


def test_kronecker_inverse() -> None:
    A, B = normal(4, 9), normal(3, 8, seed=1)
    left, right = A @ A.mT, B @ B.mT
    dense = torch.linalg.inv(torch.kron(left, right) + 0.3 * torch.eye(12, dtype=torch.float64))
    G = normal(2, 4, 3, seed=2)
    torch.testing.assert_close(KroneckerInverse(left, right, 0.3)(G).flatten(1), G.flatten(1) @ dense)


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 1, 3]], ids=str)
@pytest.mark.parametrize("count", [0, 3, 11])
def test_outputwise_inverse(count: int, sizes: list[int]) -> None:
    """Heavy rows are exact, also across groups, the rest counts by its diagonal: one dense matrix an output."""
    D, c = 5, 4
    bases = [torch.linalg.qr(normal(size, size, seed=size)).Q for size in sizes]
    heavy, rest = normal(c, count, D, seed=1), normal(D, c, seed=2).square()
    inverse = OutputwiseInverse(bases, heavy.clone(), rest, 0.2, shift_free=False)
    G = normal(3, D, c, seed=3)
    basis = torch.block_diag(*bases)
    for b in range(c):
        inner = heavy[b].mT @ heavy[b] + torch.diag(rest[:, b] + 0.2)
        dense = torch.linalg.inv(basis @ inner @ basis.mT)
        torch.testing.assert_close(inverse(G)[..., b], G[..., b] @ dense)


def test_a_common_shift_meets_the_damping_alone() -> None:
    inverse = OutputwiseInverse([torch.eye(5).double()], normal(4, 3, 5), normal(5, 4).square(), 0.2, shift_free=True)
    G = normal(2, 5, 1).expand(-1, -1, 4)
    torch.testing.assert_close(inverse(G), G / 0.2)
    # What has no shift gets none.
    H = normal(2, 5, 4, seed=1)
    H = H - H.mean(-1, keepdim=True)
    torch.testing.assert_close(inverse(H).mean(-1), torch.zeros(2, 5, dtype=torch.float64))


def test_heavy_rows_couple_groups_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every row heavy nothing is left to a basis, so that groups make no difference."""
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    problem = make_setting(Case("self_attention", loss="multilabel_logistic", n=9)).problem
    factors = random_units(problem)
    (units,) = factors.units
    assert len(units.v) > 1
    gradient = normal(2, len(factors.flat()))
    size = units.v[0].numel()
    v_part = slice(units.u.numel(), units.u.numel() + len(units.v) * size)
    found = []
    for groups in (1, len(units.v)):
        monkeypatch.setattr(module, "GROUP_SIZE", units.v.shape[1] * len(units.v) // groups)
        assert len(module.feature_groups(problem, units)) == groups
        found.append(preconditioner(problem, factors).apply(gradient)[:, v_part])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_a_component_may_have_no_units(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit of a head may have been dropped: then only the intercept is left to move."""
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    problem = make_setting(Case("self_attention", loss=loss, c=3)).problem
    some = random_units(problem)
    assert some.intercept is not None
    (units,) = some.units
    assert units.u is not None
    none = Factors([Units(units.u[:0], units.v[:0], units.gate)], some.intercept)
    found = preconditioner(problem, none).apply(normal(2, 3))
    assert found.shape == (2, 3)
    assert bool(torch.isfinite(found).all())
    assert float(found.norm()) > 0


@pytest.mark.parametrize("loss", ["squared", "multilabel_logistic"])
@pytest.mark.parametrize("pooled", [True, False])
def test_a_linear_head_is_inverted_exactly(loss: str, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, outputs that do not couple, every row heavy: the Hessian itself, intercept included."""
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    monkeypatch.setattr(module, "HEAVY", 64)
    problem = make_setting(Case("linear", loss=loss, pooled=pooled, n=9, c=3), beta=0.05).problem
    factors = random_units(problem)
    x = factors.flat()

    def gradient(at: Tensor) -> Tensor:
        return problem.flat_value_and_gradient(factors, at)[1]

    step = 1e-5
    basis = torch.eye(len(x), dtype=torch.float64)
    hessian = torch.stack([(gradient(x + step * e) - gradient(x - step * e)) / (2 * step) for e in basis])
    found = preconditioner(problem, factors).apply(hessian)
    torch.testing.assert_close(found, basis, rtol=0, atol=1e-6)


@every_case
@pytest.mark.parametrize("few", [0, 1000])
def test_it_is_symmetric_and_positive(case: Case, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", few)
    for loss in ("squared", "cross_entropy", "multilabel_logistic"):
        if loss == "cross_entropy" and case.c == 1:
            continue
        problem = make_setting(replace(case, loss=loss)).problem
        factors = random_units(problem)
        size = len(factors.flat())
        matrix = preconditioner(problem, factors).apply(torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-8, atol=1e-8 * float(matrix.abs().max()))
        values = torch.linalg.eigvalsh(matrix)
        # Softmax does not see a common shift of the intercept.
        flat = int(loss == "cross_entropy" and factors.intercept is not None)
        assert bool((values[flat:] > 0).all())
        assert float(values[:flat].abs().sum()) <= 1e-8 * float(values[-1])


@every_case
def test_gradients_of_samples_add_up(case: Case) -> None:
    problem = make_setting(case).problem
    factors = random_units(problem)
    for component, units in zip(problem.components, factors.units, strict=True):
        if units.u is None:
            continue
        stats = component.stats(problem.tokens_of(component.branch, slice(0, problem.n)), torch.float64)
        cotangent = normal(*component.form.unit_features(stats, units.u, units.gate).shape)
        found = component.form.sample_gradients(stats, units.u, units.gate, cotangent)
        for chosen in (slice(None), *(slice(i, i + 1) for i in range(problem.n))):
            some = torch.zeros_like(cotangent)
            some[chosen] = cotangent[chosen]
            _, pull = component.form.features_and_pullback(stats, units.u, units.gate)
            torch.testing.assert_close(found[chosen].sum(0), pull(some))


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_heavy_rows(count: int) -> None:
    curvature = normal(9, 3).square()
    heavy = HeavyRows(curvature, count, ALONE)
    assert heavy.root.shape == (3, count)
    seen = torch.zeros_like(heavy.root)
    for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
        chosen, output, slot = heavy.among(rows)
        seen[output, slot] = curvature[rows][chosen, output]
    torch.testing.assert_close(seen, curvature.sort(0, descending=True).values[:count].mT)
    torch.testing.assert_close(heavy.root, seen.sqrt())


class HalfWorld:
    """A worker of two whose other half is known: sums are those of both."""

    size = 2

    def __init__(self, rank: int, halves: list[Tensor], count: int) -> None:
        self.rank = rank
        self.whole = torch.stack([half.topk(min(count, len(half)), 0).values for half in halves])

    def sum(self, tensor: Tensor) -> Tensor:
        assert torch.equal(tensor[self.rank], self.whole[self.rank])
        assert not bool(tensor[1 - self.rank].any())
        return self.whole


def test_heavy_rows_of_two_workers_are_those_of_one() -> None:
    curvature, count = normal(12, 3).square(), 4
    halves = [curvature[:5], curvature[5:]]
    roots = [HeavyRows(half, count, HalfWorld(rank, halves, count)).root for rank, half in enumerate(halves)]  # type: ignore[arg-type]
    assert bool(((roots[0] == 0) | (roots[1] == 0)).all())
    torch.testing.assert_close(sum(roots), HeavyRows(curvature, count, ALONE).root)


def test_few_units_take_no_larger_chunks_than_many_where_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of what is kept of the samples take most of a chunk then."""
    problem = make_setting(Case("self_attention", n=40)).problem
    problem.budget = memory.Budget.of(10**8)
    factors = random_units(problem)
    (units,) = factors.units
    assert units.u is not None
    alone = Factors([Units(units.u[:1], units.v[:1])], factors.intercept)
    asked: list[int] = []
    own = Problem.pass_rows

    def watched(self: Problem, dtype: torch.dtype, n_units: int, cached: bool = True) -> int:
        asked.append(n_units)
        return own(self, dtype, n_units, cached)

    monkeypatch.setattr(Problem, "pass_rows", watched)
    preconditioner(problem, alone)
    assert asked[0] == 2 * LEAST_COUNTED


@pytest.mark.parametrize(("n", "full"), [(200, False), (1200, True)])
def test_of_few_samples_only_small_moments_are_taken_in_full(n: int, full: bool) -> None:
    problem = float32_problem(Case("self_attention", n=n, s=4, d=7, c=9))
    factors = random_factors(problem, [20], torch.Generator().manual_seed(0), torch.float32)
    (blocks,) = preconditioner(problem, factors).u_blocks
    assert blocks is not None
    assert module.FEW_FULL_SIZE < blocks.numbers <= module.FULL_SIZE
    assert blocks.full == full


@pytest.mark.parametrize(("damping", "kind"), [(1e-2, DampedInverse), (1e-9, KroneckerInverse)])
def test_the_inverse_of_a_full_moment(damping: float, kind: type) -> None:
    """By Cholesky's factor where damping is above the rounding of the moment, by eigenvalues elsewhere."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 30, generator=generator)
    moment = rows.mT @ rows / 40
    inverse = damped_inverse(moment, damping)
    assert isinstance(inverse, kind)
    vectors = torch.randn(3, 30, 1, generator=generator)
    exact = torch.linalg.solve(moment.double() + damping * torch.eye(30), vectors.double())
    torch.testing.assert_close(inverse(vectors).double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_a_moment_of_low_rank_needs_its_damping() -> None:
    """Cholesky's factor exists as soon as damping is above rounding, however few rows there are."""
    rows = 1e3 * torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    moment = rows.mT @ rows
    damping = 1.01 * WELL_DAMPED * torch.finfo(torch.float32).eps * float(moment.trace())
    found = damped_inverse(moment, damping)(torch.eye(200)[..., None])[..., 0]
    assert bool(torch.linalg.eigvalsh(found.double()).min() > 0)


def test_rounding_that_leaves_no_factor_ends_in_eigenvalues() -> None:
    """Where damping is above the rounding of the trace and yet too little; none of them counts as negative."""
    moment = torch.diag(torch.tensor([1.0, -0.5]))
    inverse = damped_inverse(moment, 0.1)
    assert isinstance(inverse, KroneckerInverse)
    torch.testing.assert_close(inverse(torch.ones(1, 2, 1))[0, :, 0], torch.tensor([1 / 1.1, 10.0]))
