"""The curvature pairs, the direction and the steadied iterate of L-BFGS."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contract_cases import Case, make_setting, random_units
from convexheads.certificate import Certificate
from convexheads.solvers.factored import SEARCH_PATIENCE, Factored, Search
from convexheads.solvers.lbfgs import LBFGS, STEADY, CurvaturePairs
from convexheads.subspace import BlockSubspace, SingularPair
from convexheads.types import Interval


def quadratic(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A positive definite matrix with eigenvalues from 1 to 100, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, 2, size, dtype=torch.float64)
    return Q @ (values[:, None] * Q.mT), torch.randn(size, generator=generator, dtype=torch.float64)


def minimiser(A: Tensor, b: Tensor, memory: int) -> LBFGS:
    return LBFGS(lambda x: (float(0.5 * x @ A @ x - b @ x), A @ x - b), torch.zeros_like(b), 1e-15, memory)


def two_loops(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor, inverse: Tensor) -> Tensor:
    """Algorithm 7.4 of Nocedal and Wright, as it stands there."""
    q = gradient.clone()
    alphas = []
    for s, y in reversed(pairs):
        alphas.append(float(s @ q) / float(s @ y))
        q -= alphas[-1] * y
    quotients = [float(s @ y) / float(y @ inverse @ y) for s, y in pairs[-5:]]
    r = inverse @ q * math.prod(quotients) ** (1 / len(quotients))
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r += s * (alpha - float(y @ r) / float(s @ y))
    return -r


@pytest.mark.parametrize("memory", [3, 8, 40])
def test_direction_is_that_of_the_two_loops(memory: int) -> None:
    A, b = quadratic(12, 0)
    inverse = torch.diag(1.0 / A.diagonal())
    optimiser = minimiser(A, b, memory)
    optimiser.set_inverse(lambda vectors: vectors @ inverse)
    for _ in range(15):
        assert optimiser.step()
        pairs = list(optimiser.pairs)
        assert len(pairs) <= memory
        expected = two_loops(pairs, optimiser.gradient, inverse)
        torch.testing.assert_close(optimiser.direction(), expected, rtol=1e-8, atol=1e-12 * float(expected.norm()))


def test_a_quadratic_is_solved() -> None:
    A, b = quadratic(20, 1)
    optimiser = minimiser(A, b, 20)
    for _ in range(60):
        if not optimiser.step():
            break
    torch.testing.assert_close(optimiser.x, torch.linalg.solve(A, b), rtol=1e-5, atol=1e-7)


def test_the_steadied_iterate_has_the_least_gradient_of_all_combinations() -> None:
    A, b = quadratic(15, 2)
    optimiser = minimiser(A, b, 10)
    for _ in range(9):
        optimiser.step()
    x, gradient = optimiser.steadied()
    # A quadratic's gradient is affine: that of the combination is the combination of gradients.
    torch.testing.assert_close(gradient, A @ x - b, rtol=1e-9, atol=1e-10)
    recent = torch.stack([g for _, g in optimiser.recent])
    assert len(recent) == STEADY
    shares = torch.randn(200, STEADY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares /= shares.sum(1, keepdim=True)
    assert float(gradient.norm()) <= float((shares @ recent).norm(dim=1).min())
    assert float(gradient.norm()) <= float(optimiser.gradient.norm())


def test_pairs_under_a_rotation_give_the_rotated_direction() -> None:
    A, b = quadratic(10, 3)
    optimiser = minimiser(A, b, 6)
    for _ in range(8):
        optimiser.step()
    Q = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).Q
    turned = optimiser.pairs.mapped(lambda vectors: vectors @ Q.mT)
    assert len(turned) == len(optimiser.pairs)
    assert not turned.imaged
    turned.apply(torch.clone)
    g = optimiser.gradient
    scale = optimiser.pairs.scale
    assert turned.scale == pytest.approx(scale, rel=1e-9)
    expected = Q @ optimiser.pairs.direction(g, g, scale)
    torch.testing.assert_close(turned.direction(Q @ g, Q @ g, scale), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("images", [1, 30, 2**20])
def test_another_preconditioner_gives_the_direction_of_the_two_loops(images: int) -> None:
    A, b = quadratic(12, 5)
    optimiser = LBFGS(lambda x: (float(0.5 * x @ A @ x - b @ x), A @ x - b), torch.zeros_like(b), 1e-15, 6, images)
    for step in range(12):
        if step in (0, 4, 9):
            inverse = torch.diag(1.0 / A.diagonal() ** (1 + step))
            optimiser.set_inverse(lambda vectors, inverse=inverse: vectors @ inverse)  # type: ignore[misc]
        assert optimiser.step()
        expected = two_loops(list(optimiser.pairs), optimiser.gradient, inverse)
        torch.testing.assert_close(optimiser.direction(), expected, rtol=1e-7, atol=1e-10 * float(expected.norm()))


def test_a_step_applies_the_preconditioner_once() -> None:
    A, b = quadratic(12, 5)
    applied = 0

    def inverse(vectors: Tensor) -> Tensor:
        nonlocal applied
        applied += len(vectors)
        return vectors / A.diagonal()

    optimiser = LBFGS(lambda x: (float(0.5 * x @ A @ x - b @ x), A @ x - b), torch.zeros_like(b), 1e-15)
    optimiser.set_inverse(inverse)
    for _ in range(8):
        assert optimiser.step()
    # Once at the start, once at every iterate: the image of y is the difference of two gradients' images.
    assert applied == 9
    # Another one is applied to the gradient and to every y.
    optimiser.set_inverse(inverse)
    optimiser.direction()
    assert applied == 9 + 1 + 8
    # Who takes over knows the images.
    other = LBFGS(optimiser.evaluate, optimiser.x, 1e-15)
    other.inherit(optimiser)
    torch.testing.assert_close(other.direction(), optimiser.direction())
    assert applied == 9 + 1 + 8 + 1


def test_pairs_without_curvature_are_dropped_by_a_map() -> None:
    like = torch.zeros(4, dtype=torch.float64)
    pairs = CurvaturePairs(like, 5)
    for k in range(3):
        unit = torch.zeros(4, dtype=torch.float64)
        unit[k] = 1.0
        pairs.append(unit, 2.0 * unit, 2.0 * unit)
    # The first coordinate is dropped, and the pair that moves nothing else with it.
    kept = pairs.mapped(lambda vectors: vectors[:, 1:])
    assert len(kept) == 2
    assert all(float(s @ y) == 2.0 for s, y in kept)


def test_pairs_whose_images_are_rounding_leave_the_scale_alone() -> None:
    y = torch.tensor([1.0, 2.0])
    pairs = CurvaturePairs(y, 4)
    pairs.append(y, y, -1e-9 * y)
    assert pairs.scale == 1.0
    pairs.append(y, y, 0.25 * y)
    assert pairs.scale == pytest.approx(4.0)
    assert bool(torch.isfinite(pairs.direction(y, 0.25 * y, pairs.scale)).all())


def test_an_image_that_is_rounding_is_taken_anew() -> None:
    applied: list[Tensor] = []

    def inverse(rows: Tensor) -> Tensor:
        applied.append(rows)
        # The image of the second gradient seems to be that of the first.
        return torch.ones_like(rows) if len(applied) < 3 else 0.5 * rows

    optimiser = LBFGS(lambda x: (0.5 * float(x @ x), x.clone()), torch.tensor([3.0, 4.0]), 0.0)
    optimiser.set_inverse(inverse)
    assert optimiser.step()
    assert len(applied) == 3
    ((s, y),) = optimiser.pairs
    torch.testing.assert_close(applied[-1][0], y)
    assert optimiser.pairs.scale == pytest.approx(float(s @ y) / float(0.5 * y @ y))


def test_the_oldest_pair_goes() -> None:
    pairs = CurvaturePairs(torch.zeros(1), 3)
    for k in range(1, 6):
        pairs.append(torch.tensor([float(k)]), torch.ones(1), torch.ones(1))
    assert [float(s) for s, _ in pairs] == [3.0, 4.0, 5.0]
    pairs.clear()
    assert len(pairs) == 0


def test_a_gap_that_float32_cannot_close_goes_on_in_float64() -> None:
    problem = make_setting(Case("mixer", "gated_relu")).problem.in_dtype(torch.float32)
    state = Factored(problem, 1e-6, 10, None, 0, None)
    optimiser, _ = state.optimiser(random_units(problem), torch.float32)
    exact, _ = state.optimiser(random_units(problem), torch.float64)

    def checked(iteration: int, gap: float) -> Certificate:
        state.n_iter = iteration
        return Certificate(1.0, 1.0 - gap, gap, gap, Interval(0.0, 0.0, "estimate", False), False, 1.0, 1.0)

    # A large gap is not the noise's, however long it lasts; below, it has its time from the last smaller one.
    assert not state.exhausted(optimiser, checked(0, 1e-2))
    assert not state.exhausted(optimiser, checked(10 * SEARCH_PATIENCE, 1e-2))
    start = 20 * SEARCH_PATIENCE
    assert not state.exhausted(optimiser, checked(start, 2e-6))
    assert not state.exhausted(optimiser, checked(start + SEARCH_PATIENCE - 1, 1.9e-6))
    assert state.exhausted(optimiser, checked(start + SEARCH_PATIENCE, 1.9e-6))
    assert not state.exhausted(exact, checked(start + SEARCH_PATIENCE, 1.9e-6))
    assert not state.exhausted(optimiser, checked(start + SEARCH_PATIENCE, 1.0e-6))


def test_step_sizes_of_pairs_that_are_copies() -> None:
    """Pairs that are all but the same leave their curvatures indefinite by rounding: sizes there are all the same."""
    problem = make_setting(Case("mlp", loss="cross_entropy"), beta=0.01).problem.in_dtype(torch.float32)
    factors = random_units(problem).to(torch.float32)
    state = Factored(problem, 1e-3, 10, None, 0, None)
    u, v = torch.ones(4) / 2.0, torch.ones(2) / 2.0**0.5
    pairs = [SingularPair(0, None, 0.5, u * (1 + 1e-8 * k), v) for k in range(12)]
    sizes = state._step_sizes(pairs, problem.forward(factors))
    assert len(sizes) == 12
    assert min(sizes) >= 0.0
    assert all(size == size for size in sizes)


def test_the_start_is_evaluated_when_it_is_asked_for() -> None:
    A, b = quadratic(5, 2)
    calls: list[Tensor] = []

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        calls.append(x)
        return float(0.5 * x @ A @ x - b @ x), A @ x - b

    optimiser = LBFGS(evaluate, torch.zeros_like(b), 1e-15)
    assert not calls
    place, gradient = optimiser.steadied()
    assert torch.equal(place, torch.zeros_like(b))
    assert torch.equal(gradient, -b)
    assert optimiser.value == 0.0
    assert len(calls) == optimiser.n_evaluations == 1
    assert optimiser.step()
    assert len(calls) == optimiser.n_evaluations > 1


def test_an_estimate_gives_up_only_above_the_gap_that_it_was_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(Case("self_attention", n=60, s=5, d=5, c=6, loss="cross_entropy"), beta=0.002).problem
    monkeypatch.setattr(BlockSubspace, "work", lambda self, size, rounds: (2, 1))
    rounds: list[int] = []
    original = BlockSubspace._apply

    def watched(self: BlockSubspace, *args: object, **options: object) -> object:
        rounds.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(BlockSubspace, "_apply", watched)
    factors = random_units(problem)
    found = {}
    for most in (0.0, 1e9, float("inf")):
        rounds.clear()
        state = Factored(problem, 1e-6, 10, None, 0, None)
        gap = state.estimate(factors, Search(state.tol, size=1, most=most)).bound.relative_gap
        found[most] = gap, len(rounds)
    assert found[1e9] == found[float("inf")]
    gap, taken = found[0.0]
    assert taken == 1 < found[1e9][1]
    assert 0.0 < gap <= found[1e9][0]
