"""Singular values: never bounded below what they are, proved only where a proof was made."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convexheads import spectral
from convexheads.spectral import (
    balanced_factors,
    lanczos,
    lanczos_bound,
    largest_eigenvalue,
    largest_singular_value,
    leading_pairs,
    nuclear_norm,
    proves_bound,
)
from convexheads.types import Interval


def matrix(p: int, q: int, spectrum: np.ndarray, seed: int = 0) -> Tensor:
    """A matrix (p, q) with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    k = len(spectrum)
    U = np.linalg.qr(rng.normal(size=(p, k)))[0]
    V = np.linalg.qr(rng.normal(size=(q, k)))[0]
    return torch.from_numpy((U * spectrum) @ V.T)


def true_sigma(gamma: Tensor) -> float:
    """numpy's largest singular value, of the matrix scaled so that it neither overflows nor underflows."""
    array = gamma.double().numpy()
    size = np.abs(array).max(initial=0.0)
    if size == 0.0:
        return 0.0
    factor = 2.0 ** np.floor(np.log2(size))
    return float(np.linalg.norm(array / factor, 2) * factor)


@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(-30, 30))
def test_largest_eigenvalue(seed: int, k: int, exponent: float) -> None:
    """Against 50 digits; S = A A^T - B B^T, whose parts nearly cancel for some seeds."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(k, k + 2)) * 2.0**exponent
    B = A * (1 - 1e-9) if seed % 3 == 0 else rng.normal(size=(k, k)) * 2.0**exponent
    S = A @ A.T - B @ B.T
    size = float(np.linalg.norm(np.abs(A) @ np.abs(A.T) + np.abs(B) @ np.abs(B.T)))
    found = largest_eigenvalue(torch.from_numpy((S + S.T) / 2), size, k + 2)
    with mpmath.workdps(50):
        exact = [mpmath.matrix(M.tolist()) for M in (A, B)]
        true = max(mpmath.eigsy(exact[0] * exact[0].T - exact[1] * exact[1].T, eigvals_only=True))
        assert found.proved
        assert found.upper >= max(true, 0)
    assert found.upper <= found.lower * (1 + 1e-9) + 1e-11 * size


SPECTRA = {
    "random": lambda k: np.sort(np.random.default_rng(1).uniform(0.1, 1.0, k))[::-1],
    "rank one": lambda k: np.r_[1.0, np.zeros(k - 1)],
    "flat": np.ones,
    "clustered": lambda k: 1.0 - 1e-12 * np.arange(k),
    "two equal": lambda k: np.r_[1.0, 1.0, np.full(k - 2, 0.5)] if k > 1 else np.ones(1),
    "nearly two equal": lambda k: np.r_[1.0, 1.0 - 1e-10, np.zeros(k - 2)] if k > 1 else np.ones(1),
    "decaying": lambda k: 10.0 ** -np.linspace(0, 14, k),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (5, 5), (40, 90), (90, 40), (700, 600)], ids=str)
def test_largest_singular_value(name: str, shape: tuple[int, int]) -> None:
    gamma = matrix(*shape, SPECTRA[name](min(shape)))
    sigma = true_sigma(gamma)
    found = largest_singular_value(gamma)
    assert found.proved
    assert found.method == ("cholesky" if min(shape) > 1 else "norm")
    assert found.upper >= sigma
    assert found.lower <= sigma * (1 + 1e-12)
    # Tight: a fraction of the gap that anybody asks for, even where hundreds of singular values are equal.
    assert found.upper <= sigma * (1 + 1e-8)
    assert found.lower >= sigma * (1 - 1e-8)
    assert largest_singular_value(gamma.mT).upper == pytest.approx(found.upper, rel=1e-8)


@given(
    p=st.integers(1, 12),
    q=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    log_scale=st.sampled_from([-320, -300, -200, -160, -40, 0, 40, 150, 160, 300]),
    zeros=st.floats(0.0, 1.0),
    integers=st.booleans(),
)
def test_bounds_hold_at_any_scale(p: int, q: int, seed: int, log_scale: int, zeros: float, integers: bool) -> None:
    """Squares of these entries overflow and underflow; the bounds must not notice."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-2, 3, (p, q)).astype(float) if integers else rng.normal(size=(p, q))
    array[rng.uniform(size=(p, q)) < zeros] = 0.0
    gamma = torch.from_numpy(array * 10.0**log_scale)
    sigma = true_sigma(gamma)
    found = largest_singular_value(gamma)
    assert found.proved
    assert found.upper >= sigma * (1 - 1e-15)
    assert (found.upper == 0.0) == (not bool((gamma != 0).any()))
    if sigma > 1e-290:  # below, numbers themselves have few digits
        assert found.upper <= sigma * (1 + 1e-8)
        assert found.lower <= sigma * (1 + 1e-12)
        assert proves_bound(gamma, sigma * (1 + 1e-8))
        assert not proves_bound(gamma, sigma * (1 - 1e-10))


def test_exact_singular_values() -> None:
    """Where sigma is a whole number it can be compared without numpy's rounding."""
    for k in (1, 3, 64):
        identity = torch.eye(k, dtype=torch.float64)
        assert largest_singular_value(identity).upper >= 1.0
        assert not proves_bound(identity, 1.0)
        assert not proves_bound(identity, math.nextafter(1.0, 0.0))
        assert proves_bound(identity, 1.0 + 1e-9)
        ones = torch.ones(k, k, dtype=torch.float64)
        assert largest_singular_value(ones).upper >= k
        assert not proves_bound(ones, float(k))
        hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        assert largest_singular_value(hadamard).upper >= math.sqrt(2.0)


def test_zero_and_empty_matrices() -> None:
    for gamma in (torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(1, 1, dtype=torch.float64)):
        assert largest_singular_value(gamma) == Interval(0.0, 0.0, "zero matrix", True)
    assert not proves_bound(torch.zeros(3, 4, dtype=torch.float64), 0.0)
    assert proves_bound(torch.zeros(3, 4, dtype=torch.float64), 1e-300)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_bound(value: float) -> None:
    gamma = torch.ones(3, 4, dtype=torch.float64)
    gamma[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        largest_singular_value(gamma)
    assert not proves_bound(gamma, 100.0)
    assert not proves_bound(torch.ones(2, 2, dtype=torch.float64), math.nan)
    assert not proves_bound(torch.ones(2, 2, dtype=torch.float64), -3.0)
    assert not proves_bound(torch.ones(2, 2, dtype=torch.float64), math.inf)


@pytest.mark.parametrize("shape", [(20, 20), (30, 80), (300, 100), (600, 600)], ids=str)
@pytest.mark.parametrize("name", ["random", "flat", "clustered", "rank one"])
def test_the_proof_refuses_what_is_false(name: str, shape: tuple[int, int]) -> None:
    gamma = matrix(*shape, SPECTRA[name](min(shape)))
    sigma = true_sigma(gamma)
    for below in (1e-12, 1e-10, 1e-6, 0.1, 0.9):
        assert not proves_bound(gamma, sigma * (1 - below))
    # Nor may rounding let it through on the border itself.
    assert not proves_bound(gamma, sigma * (1 - 1e-14))
    assert proves_bound(gamma, sigma * (1 + 1e-7))


@pytest.mark.parametrize("k", [1, 40, 300])
def test_a_factor_from_elsewhere_is_checked_by_its_residual(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for matrices on accelerators: a factor that leaves more than rounding proves nothing."""
    root = matrix(k, k, np.linspace(0.1, 1.0, k))
    S = root @ root.mT
    S = 0.5 * (S + S.mT)
    assert spectral._has_factor(S)
    assert spectral._has_factor(S - (0.01 - 1e-6) * torch.eye(k, dtype=torch.float64)) or k == 1
    assert not spectral._has_factor(S - 1.1 * torch.eye(k, dtype=torch.float64))
    factorise = torch.linalg.cholesky_ex

    def spoiled(share: float) -> Any:
        def found(S: Tensor) -> Any:
            L, info = factorise(S)
            L[-1, 0] += share * L[0, 0]
            return L, info

        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", spoiled(1e-10))
    assert not spectral._has_factor(S)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", spoiled(math.nan))
    assert not spectral._has_factor(S)


def test_float32_matrices_are_bounded_in_float64() -> None:
    gamma = matrix(30, 20, SPECTRA["random"](20)).float()
    found = largest_singular_value(gamma)
    assert found.upper >= true_sigma(gamma)
    assert found.upper <= true_sigma(gamma) * (1 + 1e-9)


def test_where_no_proof_is_made_none_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    gamma = matrix(60, 80, SPECTRA["random"](60))
    assert largest_singular_value(gamma).proved
    monkeypatch.setattr(spectral, "PROOF_SIZE", 59)
    found = largest_singular_value(gamma)
    assert not found.proved
    assert "probability" in found.method
    assert found.lower <= true_sigma(gamma) * (1 + 1e-12)
    assert found.upper >= true_sigma(gamma)
    monkeypatch.setattr(spectral, "PROOF_SIZE", 60)
    assert largest_singular_value(gamma).proved
    # Where Cholesky never succeeds, the Frobenius norm is what remains: true, and called by its name.
    monkeypatch.setattr(spectral, "_proves", lambda *args: False)
    last = largest_singular_value(gamma)
    assert last.method == "frobenius"
    assert last.proved
    assert last.upper == pytest.approx(float(gamma.norm()), rel=1e-9)
    assert last.upper >= float(np.linalg.norm(gamma.numpy()))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(300, 400), (500, 350)], ids=str)
def test_lanczos_bound(name: str, shape: tuple[int, int]) -> None:
    gamma = matrix(*shape, SPECTRA[name](min(shape)))
    sigma = true_sigma(gamma)
    found = lanczos_bound(gamma)
    assert not found.proved
    assert found.method.startswith("lanczos")
    assert found.lower <= sigma * (1 + 1e-12)
    assert found.upper >= sigma * (1 - 1e-13)
    if name in ("random", "decaying", "two equal"):
        assert found.lower >= sigma * (1 - 1e-3)
    # A bound that fails less often is wider; one after more steps is tighter.
    assert lanczos_bound(gamma, failure=1e-20).upper >= found.upper
    if name == "random":
        assert lanczos_bound(gamma, steps=40).upper >= found.upper


@pytest.mark.parametrize("size", [1, 2, 5, 80])
def test_lanczos_finds_the_top_pair(size: int) -> None:
    S = matrix(size, size, SPECTRA["random"](size))
    S = S @ S.mT
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = lanczos(lambda v: S @ v, start, steps=size, tol=1e-12)
    expected, _ = torch.linalg.eigh(S)
    assert float(values[-1]) == pytest.approx(float(expected[-1]), rel=1e-9)
    assert bool((values[1:] >= values[:-1]).all())
    top = vectors[:, -1]
    assert float(top.norm()) == pytest.approx(1.0, rel=1e-9)
    assert float((S @ top - values[-1] * top).norm()) <= 1e-5
    gram = vectors.mT @ vectors
    assert float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) < 1e-9


@given(m=st.integers(1, 8), p=st.integers(1, 6), q=st.integers(1, 6), rank=st.integers(1, 8), seed=st.integers(0, 999))
def test_balanced_factors(m: int, p: int, q: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(m, min(m, rank))) @ rng.normal(size=(min(m, rank), m))
    u, v = torch.from_numpy(mix @ rng.normal(size=(m, p))), torch.from_numpy(rng.normal(size=(m, q)))
    a, b, sigma = balanced_factors(u, v)
    Z = (u.mT @ v).numpy()
    size = max(1.0, float(np.linalg.norm(Z, 2)))
    r = min(m, p, q)
    assert a.shape == (r, p)
    assert b.shape == (r, q)
    np.testing.assert_allclose((a.mT @ b).numpy(), Z, atol=1e-12 * size)
    np.testing.assert_allclose(sigma.numpy(), np.linalg.svd(Z, compute_uv=False)[:r], atol=1e-12 * size)
    np.testing.assert_allclose((a @ a.mT).numpy(), np.diag(sigma.numpy()), atol=1e-12 * size)
    np.testing.assert_allclose((b @ b.mT).numpy(), np.diag(sigma.numpy()), atol=1e-12 * size)
    norm = nuclear_norm(u, v)
    assert norm == pytest.approx(float(np.linalg.norm(Z, "nuc")), abs=1e-11 * size)
    # The nuclear norm is the least weight decay of all factors; balanced ones attain it.
    assert norm <= 0.5 * float(u.square().sum() + v.square().sum()) * (1 + 1e-12)
    assert 0.5 * float(a.square().sum() + b.square().sum()) == pytest.approx(norm, abs=1e-11 * size)


def test_no_units_have_norm_zero() -> None:
    assert nuclear_norm(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64)) == 0.0


def test_intervals_are_ordered() -> None:
    Interval(1.0, 1.0, "exact", True)
    for lower, upper in ((2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="lower <= upper"):
            Interval(lower, upper, "wrong", True)


@pytest.mark.parametrize("shape", [(40, 133), (133, 40), (64, 64)])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], size: float) -> None:
    gamma = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * size
    kept = gamma.clone()
    whole = largest_singular_value(gamma)
    monkeypatch.setattr(spectral, "BAND", 7 * min(shape))
    banded = largest_singular_value(gamma)
    assert torch.equal(gamma, kept)
    assert banded.proved
    assert banded.method == whole.method == "cholesky"
    exact = float(torch.linalg.svdvals(gamma / size)[0]) * size
    for found in (whole, banded):
        assert found.lower <= exact * (1 + 1e-13)
        assert exact <= found.upper <= exact * (1 + 1e-9)
    assert not proves_bound(gamma, exact * (1 - 1e-12))


@pytest.mark.slow
def test_the_largest_size_that_is_proved() -> None:
    k, sigma = spectral.PROOF_SIZE, 3.0
    generator = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(k, generator=generator, dtype=torch.float64), dim=0)
    v = torch.nn.functional.normalize(torch.randn(k, generator=generator, dtype=torch.float64), dim=0)
    # A diagonal of at most 1 on the complement of u and v keeps sigma the largest singular value.
    gamma = torch.diag(torch.linspace(0, 1, k, dtype=torch.float64))
    gamma -= torch.outer(u, u @ gamma)
    gamma -= torch.outer(gamma @ v, v)
    gamma += sigma * torch.outer(u, v)
    found = largest_singular_value(gamma)
    assert found.proved
    assert found.method == "cholesky"
    assert found.lower <= sigma * (1 + 1e-12)
    assert sigma <= found.upper <= sigma * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e-308, 1e200])
@pytest.mark.parametrize("length", [1, 2, 33, 5000])
def test_the_norm_of_a_vector_is_proved(length: int, scale: float) -> None:
    entries = np.random.default_rng(length).standard_normal(length) * scale
    exact = mpmath.sqrt(mpmath.fsum(mpmath.mpf(float(x)) ** 2 for x in entries))
    for shape in ((length, 1), (1, length)):
        found = largest_singular_value(torch.from_numpy(entries).view(shape))
        assert found.proved
        assert found.lower <= exact <= found.upper
        assert found.upper <= found.lower * (1 + 1e-11) + 1e-320


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 8), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_pairs_are_those_of_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    most = min(shape)
    gamma = matrix(*shape, np.linspace(2.0, 1.0, most) if most > 1 else np.ones(1), seed=3).to(dtype)
    count = min(4, most)
    sigma, left, right = leading_pairs(gamma, count)
    accuracy = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(sigma, torch.linalg.svdvals(gamma)[:count], rtol=accuracy, atol=0)
    torch.testing.assert_close(gamma @ right, left * sigma, rtol=0, atol=10 * accuracy)
    for vectors in (left, right):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count, dtype=dtype), rtol=0, atol=10 * accuracy)


def test_leading_pairs_of_a_matrix_of_small_rank_are_finite() -> None:
    sigma, left, right = leading_pairs(matrix(6, 9, np.array([3.0]), seed=1), 3)
    assert float(sigma[0]) == pytest.approx(3.0)
    assert float(sigma[1:].abs().max()) < 1e-7
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    sigma, _, right = leading_pairs(torch.zeros(3, 4), 2)
    assert not sigma.any()
    assert not right.any()
