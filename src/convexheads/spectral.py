"""Largest singular values: found by Lanczos, bounded from above by a proof.

A Lanczos value is a lower bound. What makes it a certificate is the Cholesky factor of tau^2 I - Gamma Gamma^T: if
it exists, every singular value of Gamma is below tau. Rounding is accounted for: with k = min(p, q) and
l = max(p, q), the computed Gram matrix differs from the exact one by at most gamma_l ||Gamma||_F^2 in the 2-norm
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.5), and a Cholesky factorisation that runs to
completion proves lambda_min >= -gamma_{k+1} / (1 - gamma_{k+1}) trace (Rump, Verification of positive
definiteness, BIT 46, 2006), where gamma_j = j eps / (1 - j eps).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexheads.types import Interval

EPS = torch.finfo(torch.float64).eps
PROOF_SIZE = 10_000
"""Largest min(p, q) for which the Cholesky proof is made: up to three matrices of that side, 2.4 GB, beside Gamma."""
BAND = 2**24
"""Entries of Gamma that are scaled at once: Gamma itself may be much larger than its Gram matrix."""


def _gamma(j: int) -> float:
    return j * EPS / (1.0 - j * EPS)


def _gram(gamma: Tensor, exponent: int) -> tuple[Tensor, float]:
    """The smaller Gram matrix of 2^-exponent Gamma, and its squared Frobenius norm; formed in bands, without a copy."""
    wide = gamma if gamma.shape[0] <= gamma.shape[1] else gamma.mT
    gram = torch.zeros(len(wide), len(wide), dtype=gamma.dtype, device=gamma.device)
    frobenius = 0.0
    for band in wide.split(max(1, BAND // len(wide)), 1):
        scaled = band * 2.0**-exponent
        gram.addmm_(scaled, scaled.mT)
        frobenius += float(scaled.square().sum())
    return gram, frobenius


def proves_bound(gamma: Tensor, tau: float) -> bool:
    """True if every singular value of ``gamma`` (p, q), float64, is proved to be below ``tau``."""
    if not (0.0 < tau < math.inf and bool(torch.isfinite(gamma).all())):
        return False
    exponent = _exponent(max(tau, float(gamma.abs().max())))
    gram, frobenius = _gram(gamma, exponent)
    return _proves(gram, max(gamma.shape), frobenius, tau * 2.0**-exponent)


def _exponent(size: float) -> int:
    """The power of two next to ``size``: divided by it, squares neither overflow nor underflow, and nothing rounds."""
    return max(-1000, min(1000, math.frexp(size)[1]))


def _slack(S: Tensor, rounding: float, bound: float) -> float:
    """What rounding may add to the smallest eigenvalue of bound I - S: that of S itself, and of the Cholesky factor."""
    trace = float((bound - S.diagonal()).clamp_min(0).sum())
    return rounding + 2.0 * _gamma(len(S) + 2) * trace + 4 * EPS * bound


def _proves(gram: Tensor, inner: int, frobenius: float, tau: float) -> bool:
    return _below(gram, 2.0 * _gamma(inner) * frobenius, tau**2)


def _below(S: Tensor, rounding: float, bound: float) -> bool:
    """True if all eigenvalues of S, symmetric and known to ``rounding`` in the 2-norm, are proved below ``bound``."""
    shifted = -S
    diagonal = shifted.diagonal()
    diagonal += bound
    diagonal -= _slack(S, rounding, bound)
    if S.device.type != "cpu":
        return _has_factor(shifted)
    info = torch.zeros((), dtype=torch.int32)
    # The factor takes the place of the matrix, which is symmetric: by columns, as LAPACK wants it.
    torch.linalg.cholesky_ex(shifted.mT, out=(shifted.mT, info))
    return int(info) == 0


def _has_factor(S: Tensor) -> bool:
    """True if S, symmetric, has a Cholesky factor that leaves no more than rounding of it, however it was found.

    What :func:`_slack` allows, 2 gamma_{k+2} tr S, holds for the order of operations of LAPACK. Libraries of
    accelerators may take inverses of blocks instead, so that there the residual S - L L^T is looked at: with the
    rounding of its product, at most gamma_k ||L||_F^2, it has to stay below the same.
    """
    L, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        return False
    left = (S - L @ L.mT).norm() + _gamma(len(S) + 2) * L.square().sum()
    return bool(1.01 * left <= 2.0 * _gamma(len(S) + 2) * S.diagonal().sum())


def largest_singular_value(gamma: Tensor) -> Interval:
    """Bounds on the largest singular value of a matrix (p, q), taken in float64.

    Proved where min(p, q) <= ``PROOF_SIZE``; the upper end is then at most about 1e-9 relative above the lower one
    (more where Gamma has a flat spectrum). Beyond, it is the randomised Lanczos bound of :func:`lanczos_bound`.
    """
    gamma = gamma.double()
    peak = float(gamma.abs().max()) if gamma.numel() else 0.0
    if peak == 0.0:
        return Interval(0.0, 0.0, "zero matrix", True)
    if not math.isfinite(peak):
        raise ValueError("NaN or infinity in a matrix whose singular values are to be bounded")
    exponent = _exponent(peak)
    found = _scaled_bounds(gamma, exponent)
    # Exact but below the normal numbers, where the next number up makes good for it.
    upper = math.nextafter(found.upper * 2.0**exponent, math.inf)
    return Interval(min(found.lower * 2.0**exponent, upper), upper, found.method, found.proved)


def largest_eigenvalue(S: Tensor, size: float, inner: int) -> Interval:
    """Proved bounds on the largest eigenvalue of a symmetric matrix (k, k), float64, or on 0 where that is larger.

    S was computed from products with sums of at most ``inner`` terms; ``size`` bounds the Frobenius norm of the same
    products of absolute values, from which the rounding in S follows.
    """
    rounding = 8.0 * _gamma(2 * max(inner, len(S)) + 4) * size
    lower = max(0.0, float(torch.linalg.eigvalsh(S)[-1]))
    step = max(1e-12 * lower, 4.0 * rounding, torch.finfo(torch.float64).tiny)
    while step < math.inf:
        if _below(S, rounding, lower + step):
            return Interval(lower, lower + step, "cholesky", True)
        step *= 4.0
    raise ValueError("NaN or infinity in a matrix whose eigenvalues are to be bounded")


def _scaled_bounds(gamma: Tensor, exponent: int) -> Interval:
    """Bounds on the largest singular value of 2^-exponent Gamma."""
    if min(gamma.shape) == 1:
        # A vector: its norm, to rounding.
        norm = float((gamma * 2.0**-exponent).norm())
        slack = _gamma(gamma.numel() + 4)
        return Interval(norm * (1.0 - slack), norm * (1.0 + slack), "norm", True)
    if min(gamma.shape) > PROOF_SIZE:
        return lanczos_bound(gamma * 2.0**-exponent)
    gram, frobenius = _gram(gamma, exponent)
    lower, _ = _top_eigenvalue(gram)
    lower = math.sqrt(max(lower, 0.0)) * (1 - 4 * EPS)
    # Below what rounding takes off no factor exists, and every attempt costs one.
    taken = _slack(gram, 2.0 * _gamma(max(gamma.shape)) * frobenius, lower**2) / (2.0 * lower**2) if lower > 0 else 0.0
    step = 1e-12 + 1.01 * taken
    while step < 1.0:
        tau = lower * (1.0 + step)
        if _proves(gram, max(gamma.shape), frobenius, tau):
            return Interval(min(lower, tau), tau, "cholesky", True)
        step *= 4.0
    # Always true: the Frobenius norm bounds the 2-norm; its own rounding is covered by the factor.
    return Interval(lower, math.sqrt(frobenius) * (1 + _gamma(gamma.numel())), "frobenius", True)


def _top_eigenvalue(gram: Tensor) -> tuple[float, Tensor]:
    """Largest eigenvalue of a symmetric positive semidefinite matrix, as a Rayleigh quotient, and its vector."""
    if len(gram) <= 512:
        values, vectors = torch.linalg.eigh(gram)
        return float(values[-1]), vectors[:, -1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), generator=generator, dtype=torch.float64).to(gram.device)
    values, vectors = lanczos(lambda v: gram @ v, start, steps=min(len(gram), 120), tol=1e-13)
    return float(values[-1]), vectors[:, -1]


def lanczos(apply, start: Tensor, steps: int, tol: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Lanczos with full reorthogonalisation on a symmetric operator.

    Returns Ritz values in ascending order and the matching vectors (size, steps taken); stops when the residual of
    the top pair is below ``tol`` times its value.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(steps):
        w = apply(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        Q = torch.stack(basis, 1)
        w = w - Q @ (Q.mT @ w)
        w = w - Q @ (Q.mT @ w)
        norm = float(w.norm())
        T = torch.diag(torch.tensor(diagonal, dtype=start.dtype))
        if off:
            side = torch.tensor(off, dtype=start.dtype)
            T = T + torch.diag(side, 1) + torch.diag(side, -1)
        if step % 5 == 4 or step == steps - 1 or norm < 1e-14:
            values, S = torch.linalg.eigh(T)
            top = max(float(values[-1]), 1e-300)
            if norm * abs(float(S[-1, -1])) <= tol * top or step == steps - 1 or norm < 1e-14 * top:
                return values.to(start.device), Q @ S.to(start.device)
        off.append(norm)
        basis.append(w / norm)
    raise AssertionError("the last step returns")


def lanczos_bound(gamma: Tensor, failure: float = 1e-10, steps: int = 200) -> Interval:
    """Probabilistic bounds from a randomised start (Kuczynski and Wozniakowski 1992, theorem 4.2).

    After k steps from a uniform random start, P[lambda_1 > theta / (1 - e)] <= 1.648 sqrt(size) exp(-sqrt(e)(2k-1)).
    The bound assumes exact arithmetic and is labelled as not proved.
    """
    wide = gamma if gamma.shape[0] <= gamma.shape[1] else gamma.mT
    size = wide.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=gamma.dtype).to(gamma.device)
    values, vectors = lanczos(lambda v: wide @ (wide.mT @ v), start, steps=steps, tol=0.0)
    taken = vectors.shape[1]
    e = (math.log(1.648 * math.sqrt(size) / failure) / (2 * taken - 1)) ** 2
    lower = math.sqrt(max(float(values[-1]), 0.0))
    upper = lower / math.sqrt(1 - e) if e < 1 else float(gamma.norm())
    return Interval(lower, upper, f"lanczos, fails with probability {failure:g}", False)


def balanced_factors(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical factors of Z = sum_r u_r v_r^T: orthogonal, balanced, sorted by singular value.

    u (m, p), v (m, q) -> u (r, p), v (r, q), singular values (r,) with r = min(m, p, q), such that
    ||u_r||^2 = ||v_r||^2 = sigma_r. Never forms Z: QR of both factors, then an SVD of size m.
    """
    Qu, Ru = torch.linalg.qr(u.mT)
    Qv, Rv = torch.linalg.qr(v.mT)
    A, sigma, Bt = torch.linalg.svd(Ru @ Rv.mT, full_matrices=False)
    root = sigma.sqrt()
    return (Qu @ (A * root)).mT, (Qv @ (Bt.mT * root)).mT, sigma


def principal_axes(u: Tensor, v: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Sizes (r,) and axes (m, r) of the principal units of u (m, p) and v (m, q), the largest first; in float64.

    Balanced units have the same axes on both sides: axes^T u and axes^T v are orthogonal then, of squared norms
    ``sizes``. Units below the share ``least`` of the largest one are left out.
    """
    u, v = u.double(), v.double()
    size, axes = torch.linalg.eigh(0.5 * (u @ u.mT + v @ v.mT))
    size, axes = size.flip(0), axes.flip(1)
    count = min(int((size > least * size[0]).sum()), u.shape[1], v.shape[1])
    return size[:count], axes[:, :count]


def leading_pairs(gamma: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (count,) of gamma (p, q), with left (p, count) and right (q, count) vectors.

    From the eigenvectors of the smaller Gram matrix, several times faster than an SVD: next to the largest value the
    squares lose nothing.
    """
    if gamma.shape[0] > gamma.shape[1]:
        sigma, right, left = leading_pairs(gamma.mT, count)
        return sigma, left, right
    left = torch.linalg.eigh(gamma @ gamma.mT).eigenvectors[:, -count:].flip(1)
    right = gamma.mT @ left
    sigma = right.norm(dim=0)
    return sigma, left, right / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)


def nuclear_norm(u: Tensor, v: Tensor) -> float:
    """||sum_r u_r v_r^T||_* from the factors (m, p) and (m, q); never more than their weight decay."""
    if not len(u):
        return 0.0
    Ru = torch.linalg.qr(u.mT, mode="r").R
    Rv = torch.linalg.qr(v.mT, mode="r").R
    return float(torch.linalg.svdvals(Ru @ Rv.mT).sum())
