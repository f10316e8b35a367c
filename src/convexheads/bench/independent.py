"""Objective and duality gap from the definition, in numpy and float64, without any code of the solvers.

    f(O) + (beta / 2) sum_j (||u_j||^2 + ||v_j||^2),   O = sum_j mean_tokens values(X, M o hidden(X, u_j)) v_j + b

is evaluated on the tokens themselves. The gap comes from the dual point L = gradient of f at O with the best
intercept, scaled until sigma_max(A_g^* L) <= beta for every gate g: see the certificate's module for the theory. Only
what the benchmarks use is here: pooled outputs; self-attention and MLP, linear or gated; the linear mixer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax, xlogy

CHUNK = 2**24
"""Numbers in the largest temporary."""


@dataclass(frozen=True)
class Task:
    """A training problem as raw data.

    Attributes
    ----------
    head : ``self_attention``, ``mixer`` or ``mlp``; pooled by the mean over tokens.
    X, Y : tokens (n, s, d) and targets (n, c): one-hot rows for cross-entropy.
    beta : weight decay.
    loss : ``cross_entropy`` or ``squared`` (one half of the squared distance), averaged over samples.
    gates : (P, *shape of u), or None for linear activation.
    fit_intercept : whether a free intercept is added.
    """

    head: str
    X: np.ndarray
    Y: np.ndarray
    beta: float
    loss: str = "cross_entropy"
    gates: np.ndarray | None = None
    fit_intercept: bool = True

    @property
    def n_gates(self) -> int:
        return 1 if self.gates is None else len(self.gates)

    def gate(self, g: int) -> np.ndarray | None:
        return None if self.gates is None else np.asarray(self.gates[g], np.float64)


@dataclass(frozen=True)
class Solution:
    """Units of each gate: u (r, p) and v (r, q), with q = k c; and the intercept (c,) or None."""

    u: Sequence[np.ndarray]
    v: Sequence[np.ndarray]
    intercept: np.ndarray | None = None


@dataclass(frozen=True)
class Check:
    """What a solution is worth: its objective, a lower bound on every solution's, and the gap between them."""

    objective: float
    dual: float

    @property
    def relative_gap(self) -> float:
        return (self.objective - self.dual) / self.objective


@dataclass(frozen=True)
class _Head:
    """The maps of one head for a few samples X (n, s, d) and one gate (None: linear).

    ``features(X, u, gate)``: pooled unit features (n, k) of one unit. ``gamma(X, L, gate)``: A^* L as a matrix (p, q),
    or a smaller one with the same singular values. ``size(s, d)``: numbers a sample of its temporaries.
    """

    features: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
    gamma: Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
    size: Callable[[int, int], int]


def _attention_features(X: np.ndarray, u: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    d = X.shape[2]
    W = u.reshape(d, d)
    if gate is None:
        # mean_p x_p^T W (X^T X): the products of (X W X^T) X in their cheaper order.
        return ((X.mean(1) @ W)[:, None] @ (X.swapaxes(1, 2) @ X))[:, 0]
    H = X @ W @ X.swapaxes(1, 2)
    return ((H * _attention_mask(X, gate)).mean(1)[:, None] @ X)[:, 0]


def _attention_mask(X: np.ndarray, gate: np.ndarray) -> np.ndarray:
    return X @ gate @ X.swapaxes(1, 2) >= 0


def _attention_gamma(X: np.ndarray, L: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    n, s, d = X.shape
    if gate is None:
        T = X.mean(1)[:, :, None, None] * (X.swapaxes(1, 2) @ X)[:, None]
    else:
        selected = _attention_mask(X, gate).swapaxes(1, 2).astype(np.float64) @ X / s
        pairs = (X[:, :, :, None] * X[:, :, None, :]).reshape(n, s, d * d)
        T = selected.swapaxes(1, 2) @ pairs
    return (T.reshape(n, -1).T @ L).reshape(d * d, -1)


def _mlp_features(X: np.ndarray, u: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    return _selected_mean(X, gate) @ u[:, None]


def _mlp_gamma(X: np.ndarray, L: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    return _selected_mean(X, gate).T @ L


def _selected_mean(X: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    return X.mean(1) if gate is None else (X * (X @ gate >= 0)[..., None]).mean(1)


def _mixer_features(X: np.ndarray, u: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    s = X.shape[1]
    W = u.reshape(s, s)
    if gate is None:
        return (W.mean(0) @ X).reshape(len(X), -1)
    return ((W @ X) * (gate @ X >= 0)).mean(1)


def _mixer_gamma(X: np.ndarray, L: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    n, s, _ = X.shape
    if gate is None:
        # A^* L [(t, q), (l, b)] = sum_i X_i[q, l] L_i[b] / s for every t: s equal bands, of norm sqrt(s) times one.
        return (X.reshape(n, -1).T @ L).reshape(s, -1) / math.sqrt(s)
    T = (gate @ X >= 0)[:, :, None] * X[:, None] / s
    return (T.reshape(n, -1).T @ L).reshape(s * s, -1)


_HEADS = {
    "self_attention": _Head(_attention_features, _attention_gamma, lambda s, d: max(d**3, s * (s + d * d))),
    "mlp": _Head(_mlp_features, _mlp_gamma, lambda s, d: s * d),
    "mixer": _Head(_mixer_features, _mixer_gamma, lambda s, d: s * s * d),
}


def check(task: Task, solution: Solution) -> Check:
    """Objective of a solution and a proved-in-principle lower bound from its own dual point.

    The largest singular value comes from a dense eigenvalue solver; 1e-9 of it is added for its rounding.
    """
    bare = outputs(task, solution)
    b = np.zeros(task.Y.shape[1]) if solution.intercept is None else np.asarray(solution.intercept, np.float64)
    squares = sum(float(np.sum(np.square(part, dtype=np.float64))) for part in (*solution.u, *solution.v))
    objective = _loss(task, bare + b) + 0.5 * task.beta * squares
    best = best_intercept(task, bare) if task.fit_intercept else b
    L = _gradient(task, bare + best)
    sigma = max(largest_singular_value(gamma(task, L, g)) for g in range(task.n_gates)) * (1 + 1e-9)
    # What rounding leaves of sum_i L_i = 0 costs at most its product with the best intercept.
    rest = float(np.linalg.norm(L.sum(0))) * (2 * float(np.linalg.norm(best)) + 1) if task.fit_intercept else 0.0
    return Check(objective, _best_on_ray(task, L, task.beta / sigma if sigma > 0 else math.inf, rest))


def outputs(task: Task, solution: Solution) -> np.ndarray:
    """Outputs (n, c) without intercept."""
    head = _HEADS[task.head]
    n, c = task.Y.shape
    O = np.zeros((n, c))
    for rows, X in _chunks(task, head):
        for g, (us, vs) in enumerate(zip(solution.u, solution.v, strict=True)):
            for u, v in zip(us, vs, strict=True):
                O[rows] += head.features(X, np.asarray(u, np.float64), task.gate(g)) @ np.asarray(v).reshape(-1, c)
    return O


def gamma(task: Task, L: np.ndarray, g: int) -> np.ndarray:
    """A_g^* L for a dual point L (n, c): (p, q), or a matrix with the same singular values."""
    head = _HEADS[task.head]
    return np.sum([head.gamma(X, L[rows], task.gate(g)) for rows, X in _chunks(task, head)], axis=0)


def beta_max(task: Task) -> float:
    """The smallest beta at which no unit is worth its weight decay."""
    O = np.zeros(task.Y.shape)
    L = _gradient(task, O + best_intercept(task, O) if task.fit_intercept else O)
    return max(largest_singular_value(gamma(task, L, g)) for g in range(task.n_gates))


def largest_singular_value(matrix: np.ndarray) -> float:
    """By the smaller Gram matrix, whose largest eigenvalue is known to rounding."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(small @ small.T)[-1])))


def best_intercept(task: Task, O: np.ndarray) -> np.ndarray:
    """The b (c,) that minimises the loss of O + b."""
    if task.loss == "squared":
        return (task.Y - O).mean(0)
    b, n = np.zeros(O.shape[1]), len(O)
    value = _loss(task, O)
    for _ in range(50):
        p = softmax(O + b, axis=1)
        slope = (p - task.Y).mean(0)
        if np.abs(slope).max() < 1e-15:
            break
        step = np.linalg.pinv(np.diag(p.mean(0)) - p.T @ p / n, rcond=1e-12, hermitian=True) @ slope
        trials = [(_loss(task, O + b - scale * step), scale) for scale in (1.0, 0.25, 0.05)]
        lowest, scale = min(trials)
        if lowest > value * (1 + 1e-15):
            break
        b, value = b - scale * step, lowest
    return b


def ridge_gradient(X: np.ndarray, Y: np.ndarray, W: np.ndarray, b: np.ndarray, beta: float) -> tuple[float, float]:
    """Objective of softmax regression, mean loss + (beta/2) ||W||_F^2, and the Euclidean norm of its gradient.

    X (n, d), one-hot Y (n, c), W (d, c), b (c,).
    """
    X, W = X.astype(np.float64), W.astype(np.float64)
    O = X @ W + b
    value = float((logsumexp(O, axis=1) - (Y * O).sum(1)).mean()) + 0.5 * beta * float((W * W).sum())
    L = (softmax(O, axis=1) - Y) / len(Y)
    return value, math.hypot(float(np.linalg.norm(X.T @ L + beta * W)), float(np.linalg.norm(L.sum(0))))


def _chunks(task: Task, head: _Head) -> Iterator[tuple[slice, np.ndarray]]:
    n, s, d = task.X.shape
    step = max(1, CHUNK // head.size(s, d))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, np.asarray(task.X[rows], np.float64)


def _loss(task: Task, O: np.ndarray) -> float:
    if task.loss == "squared":
        return 0.5 * float(np.square(O - task.Y).sum(1).mean())
    return float((logsumexp(O, axis=1) - (task.Y * O).sum(1)).mean())


def _gradient(task: Task, O: np.ndarray) -> np.ndarray:
    return ((O if task.loss == "squared" else softmax(O, axis=1)) - task.Y) / len(O)


def _best_on_ray(task: Task, L: np.ndarray, feasible: float, rest: float) -> float:
    """The largest dual value -f*(alpha L) over the feasible alpha."""
    G, Y = L * len(L), task.Y
    top = min(feasible, 2.0)
    if task.loss == "cross_entropy":
        # r = alpha g + y must stay a distribution: with one-hot y only the entry of the label can fall below zero.
        top = min(top, (1 - 1e-12) / max(1e-300, float(-(G * Y).sum(1).min())))

    def value(alpha: float) -> float:
        if task.loss == "squared":
            conjugate = 0.5 * alpha**2 * float(np.square(G).sum(1).mean()) + alpha * float((G * Y).sum(1).mean())
        else:
            r = np.maximum(alpha * G + Y, 0)
            r /= r.sum(1, keepdims=True)
            conjugate = float(xlogy(r, r).sum(1).mean())
        return -conjugate - alpha * rest

    found = minimize_scalar(lambda alpha: -value(alpha), bounds=(0.0, top), method="bounded", options={"xatol": 1e-9})
    return max(value(top), value(float(found.x)), value(0.0))
