"""The problems of the benchmarks: tokens, real or synthetic, and the same task for our solvers and for the check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from convexheads.bench.common import TokenSource
from convexheads.bench.independent import Solution, Task, beta_max
from convexheads.heads import make_branch
from convexheads.losses import make_loss
from convexheads.problem import Problem
from convexheads.tokens.transforms import AppendConstant, ChainTransforms, PCATokens, ScaleTokens, SelectTokens
from convexheads.types import Factors


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Labels of any kind as rows (n, c), classes in sorted order."""
    classes, index = np.unique(labels, return_inverse=True)
    return np.eye(len(classes))[index]


def synthetic_tokens(n: int, s: int, d: int, c: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, s, d) of about unit norm, the last feature constant, and labels (n,) in c classes.

    A class has a mean of its own in every token, and features of its own that vary together.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % c
    means = 0.15 * rng.standard_normal((c, s, d - 1))
    shapes = np.eye(d - 1) + 0.3 * rng.standard_normal((c, d - 1, d - 1)) / np.sqrt(d)
    X = np.empty((n, s, d), np.float32)
    X[..., -1] = 1.0
    for k in range(c):
        own = labels == k
        noise = rng.standard_normal((int(own.sum()), s, d - 1)) + rng.standard_normal((int(own.sum()), 1, d - 1))
        X[own, :, :-1] = means[k] + noise @ shapes[k] / np.sqrt(2)
    return X / np.float32(np.sqrt(d)), labels


def patch_tokens(source: TokenSource, features: int) -> np.ndarray:
    """Patch tokens on whitened principal components with a constant, over sqrt(features): (n, s, features + 1)."""
    patch = [] if source.layout is None else [SelectTokens(tuple(source.layout.get("patch", (0, source.X.shape[1]))))]
    steps = [PCATokens(features, whiten=True), AppendConstant(), ScaleTokens(features**-0.5)]
    chain = ChainTransforms([*patch, *steps])
    return np.asarray(chain.fit(source.X).transform(source.X), np.float32)


def make_task(
    head: str,
    X: np.ndarray,
    labels: np.ndarray,
    beta_ratio: float,
    gates: int | None = None,
    fit_intercept: bool = True,
    seed: int = 0,
) -> Task:
    """Classification by cross-entropy at a share of beta_max, with ``gates`` random gates or linear activation."""
    drawn = None
    if gates is not None:
        s, d = X.shape[1:]
        shapes = {"self_attention": (d, d), "mixer": (s, s), "mlp": (d,)}
        drawn = np.random.default_rng(seed).standard_normal((gates, *shapes[head]))
    task = Task(head, X, one_hot(labels), 1.0, gates=drawn, fit_intercept=fit_intercept)
    return replace(task, beta=beta_ratio * beta_max(task))


def our_problem(task: Task, dtype: torch.dtype = torch.float32) -> Problem:
    """The task as the solvers take it; nothing of it has been computed yet."""
    n, s, d = task.X.shape
    options: dict[str, Any] = {"head": task.head, "activation": "linear" if task.gates is None else "gated_relu"}
    if task.gates is not None:
        options["gates"] = list(task.gates)
    branch = make_branch(options, (s, d), task.Y.shape[1], True, np.random.default_rng(0))
    return Problem(
        branch.components(0),
        [torch.from_numpy(np.ascontiguousarray(task.X))],
        make_loss(task.loss),
        torch.from_numpy(task.Y),
        torch.full((n,), 1.0 / n, dtype=torch.float64),
        task.beta,
        task.fit_intercept,
        dtype,
    )


def our_solution(problem: Problem, factors: Factors) -> Solution:
    """Factors as plain arrays, in the shapes of the definition."""
    (component,), (units,) = problem.components, factors.units
    assert units.u is not None
    u = component.form.lift(units.u.double()).flatten(1).numpy()
    v = units.v.double().flatten(1).numpy()
    own = [np.ones(len(u), bool)] if units.gate is None else [units.gate.numpy() == g for g in range(component.n_gates)]
    intercept = None if factors.intercept is None else factors.intercept.double().numpy()
    return Solution([u[each] for each in own], [v[each] for each in own], intercept)
