"""scikit-learn's LogisticRegression and the linear head: the same convex program, to the same gradient norm.

Both minimise  mean cross-entropy + (beta/2) ||W||_F^2  with a free intercept, C = 1 / (n beta). Its duality gap at the
best intercept is ||gradient||^2 / (2 beta), which turns the gradient norm that scikit-learn reaches into the gap that
our solver is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from convexheads.bench.common import Curve, Ratio, Result, Settings, TokenSource, curve, row, timed, warm_up
from convexheads.bench.independent import ridge_gradient
from convexheads.bench.problems import one_hot
from convexheads.estimators import ConvexHeadClassifier

PACKAGES = ()

TARGET = 1.5
BETA = 1e-3
"""On standardised features."""
TOLERANCES = (1e-4, 1e-6)
"""Of scikit-learn: its default, some tenths of a percent from the optimum, and one that is as good as at it."""


def synthetic_features(n: int, d: int, c: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) of a decaying spectrum with a mean a class, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % c
    mixing = rng.standard_normal((d, d)) / (1.0 + np.arange(d))[:, None]
    return (rng.standard_normal((n, d)) + 0.3 * rng.standard_normal((c, d))[labels]) @ mixing, labels


def real_features(source: TokenSource) -> list[np.ndarray]:
    """The mean token, and CLS beside it where there is one: (n, d) and (n, 2 d)."""
    layout = dict(source.layout or {})
    start, stop = layout.get("patch", (0, int(source.X.shape[1])))
    # Stores keep half precision, in which no mean should be taken.
    parts = [np.asarray(source.X[i : i + 512], np.float32) for i in range(0, len(source.labels), 512)]
    mean = np.concatenate([part[:, start:stop].mean(1) for part in parts])
    if "cls" not in layout:
        return [mean]
    cls = np.concatenate([part[:, layout["cls"][0]] for part in parts])
    return [cls, np.concatenate([cls, mean], 1)]


def run(settings: Settings) -> Result:
    """Time to scikit-learn's gradient norm, for each number of features and either dtype of its iterations."""
    warm_up()
    result = Result("logistic")
    if settings.quick:
        problems = [synthetic_features(200, 8, 4, settings.seed)]
    elif settings.tokens is not None:
        problems = [(X, settings.tokens.labels) for X in real_features(settings.tokens)]
    else:
        problems = [synthetic_features(10_000, d, 100, settings.seed) for d in (384, 768)]
        result.notes.append("logistic: synthetic features in place of tokens (--tokens)")
    for X, labels in problems:
        _compare(StandardScaler().fit_transform(X), np.unique(labels, return_inverse=True)[1], result, settings)
    return result


def _compare(X: np.ndarray, labels: np.ndarray, result: Result, settings: Settings) -> None:
    X32, Y = X.astype(np.float32), one_hot(labels)
    # Both see the same numbers, whatever the dtype of the iterations.
    X = X32.astype(np.float64)
    name = _name(X, Y)
    for tol in TOLERANCES:
        quotients = [
            _quotient(dtype, data, X, Y, labels, tol, result, settings)
            for dtype, data in (("float32", X32), ("float64", X))
        ]
        # The faster of the two is the peer; the other is told without a target.
        least = min(quotients)
        for dtype, quotient in zip(("float32", "float64"), quotients, strict=True):
            target = TARGET if quotient == least and not settings.quick else None
            what = f"logistic, {name}: scikit-learn, {dtype}, tol {tol:g} / ours at its gradient norm"
            result.ratios.append(Ratio(what, quotient, target))


def _quotient(
    dtype: str,
    data: np.ndarray,
    X: np.ndarray,
    Y: np.ndarray,
    labels: np.ndarray,
    tol: float,
    result: Result,
    settings: Settings,
) -> float:
    """Seconds of scikit-learn on ``data`` over ours to its gradient norm; both rows go into the result."""
    name, peer = _name(X, Y), f"scikit-learn, {dtype}, tol {tol:g}"

    def values(W: np.ndarray, b: np.ndarray) -> dict[str, float]:
        value, norm = ridge_gradient(X, Y, W, b, BETA)
        return {"objective": value, "relative_gap": norm**2 / (2 * BETA * value), "gradient_norm": norm}

    settings.say(f"logistic: {peer}, {name} ...")
    timing, model = timed(partial(_fit_peer, data, labels, tol), settings.repeats)
    theirs = values(model.coef_.T, model.intercept_)
    result.rows.append(row(name, peer, timing, None, iterations=int(model.n_iter_[0])) | theirs)
    settings.say(f"logistic: ours, {name}, to a gradient norm of {theirs['gradient_norm']:.1e} ...")
    gap = max(1e-12, theirs["relative_gap"])
    own, head = timed(partial(_fit_ours, X.astype(np.float32), labels, gap, settings.seed), settings.repeats)
    ours, method = values(head.blocks_[0].Z, head.intercept_), f"ours, to that of {dtype}, tol {tol:g}"
    result.rows.append(row(name, method, own, None, iterations=head.n_iter_) | ours)
    curves = result.curves.setdefault(name, {})
    curves[peer] = _last(theirs, timing.median)
    curves[method] = _course(head.history_, ours, own.median)
    if ours["gradient_norm"] > 1.01 * theirs["gradient_norm"]:
        result.rows[-1]["note"] = "not at the gradient norm asked for"
    return timing.median / own.median


def _last(reached: Mapping[str, float], seconds: float) -> Curve:
    """The one point of a method that tells nothing of its course."""
    return {"objective": [reached["objective"]], "gap": [reached["relative_gap"]], "seconds": [seconds]}


def _course(history: Mapping[str, Sequence[float]], reached: Mapping[str, float], seconds: float) -> Curve:
    """The course of a solve, with what was computed anew as its last point."""
    before, end = curve(history), _last(reached, seconds)
    return {key: before[key] + end[key] for key in end}


def _name(X: np.ndarray, Y: np.ndarray) -> str:
    return f"n = {len(X)}, d = {X.shape[1]}, c = {Y.shape[1]}"


def _fit_peer(X: np.ndarray, labels: np.ndarray, tol: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0 / (len(X) * BETA), tol=tol, max_iter=10_000).fit(X, labels)


def _fit_ours(X: np.ndarray, labels: np.ndarray, tol: float, seed: int) -> Any:
    return ConvexHeadClassifier("linear", beta=BETA, tol=tol, random_state=seed).fit(X, labels)
