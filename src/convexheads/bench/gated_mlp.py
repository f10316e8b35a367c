"""pyscnn's R-FISTA on the convex gated ReLU MLP with one output, against the factored solver.

With one output the nuclear norm of a block z_g in R^d is its Euclidean norm, so that the group-l1 program of Mishkin,
Sahiner and Pilanci (2022) and ours are the same:

    min (1/2n) ||sum_g diag(1[X h_g > 0]) X z_g - y||^2 + beta sum_g ||z_g||.

The peer has no duality gap; it is stopped after the fewest iterations whose weights have the gap asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from convexheads.bench.common import Curve, Ratio, Result, Settings, Timing, curve, missed, row, timed, warm_up
from convexheads.bench.independent import Check, Solution, Task, beta_max, check
from convexheads.errors import InputError, describe, require
from convexheads.estimators import ConvexHeadRegressor

PACKAGES = ("scnn",)

GAP = 1e-4
TARGET = 3.0
BETA_RATIOS = (0.05, 0.01)
MOST_ITERATIONS = 4096


def make_problem(n: int, d: int, gates: int, seed: int) -> Task:
    """A planted ReLU network of five units with a tenth of noise; X (n, 1, d) exact in float32."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(np.float32)
    X[:, -1] = 1.0
    y = np.maximum(X @ rng.standard_normal((d, 5)) / np.sqrt(d), 0) @ rng.standard_normal(5)
    y = (y - y.mean()) / y.std() + 0.1 * rng.standard_normal(n)
    H = rng.standard_normal((gates, d))
    if (np.abs(X.astype(np.float64) @ H.T) == 0).any():
        # The peer's gates are strict, ours are not: they agree where no pre-activation is zero.
        raise InputError(describe("gates with a pre-activation of zero", "another --seed"))
    y = y.astype(np.float32).astype(np.float64)
    return Task("mlp", X[:, None], y[:, None], 1.0, "squared", H, fit_intercept=False)


def run_peer(task: Task, iterations: int) -> tuple[float, Solution]:
    """Seconds of R-FISTA by its own clock, and its weights in the order of the task's gates."""
    optimize = require("scnn.optimize", "bench")
    models, metrics = require("scnn.models", "bench"), require("scnn.metrics", "bench")
    solvers, regularizers = require("scnn.solvers", "bench"), require("scnn.regularizers", "bench")
    assert task.gates is not None
    model = models.ConvexGatedReLU(task.gates.T.copy())
    # No stop by the norm of the gradient: the gap decides.
    solver = solvers.RFISTA(model, max_iters=iterations, tol=0.0)
    with _quietly():
        model, met = optimize.optimize_model(
            model,
            solver,
            metrics.Metrics(),
            task.X[:, 0],
            task.Y[:, 0].astype(np.float32),
            regularizer=regularizers.NeuronGL1(task.beta),
            return_convex=True,
            unitize_data=False,
            dtype="float32",
        )
    weights = np.asarray(model.parameters[0][0], np.float64)
    # Gates with equal patterns are merged and the others sorted: find each again.
    order = [int(np.argmin(np.square(task.gates - gate).sum(1))) for gate in np.asarray(model.G).T]
    z = np.zeros(task.gates.shape)
    z[order] = weights
    norms = np.linalg.norm(z, axis=1)[:, None]
    root = np.sqrt(norms)
    u = np.divide(z, root, out=np.zeros_like(z), where=norms > 0)
    return float(met.time[-1]), Solution(list(u[:, None]), list(root[:, None]))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the peer's warning that its iterations are used up, and without a trace in numpy's and torch's state."""
    level, disabled = logging.root.level, logging.root.manager.disable
    state, dtype = np.random.get_state(), torch.get_default_dtype()  # noqa: NPY002
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.disable(disabled)
        logging.root.setLevel(level)
        np.random.set_state(state)  # noqa: NPY002
        torch.set_default_dtype(dtype)


def fewest_iterations(task: Task, gap: float, most: int) -> tuple[int | None, Curve]:
    """The fewest iterations of the peer with this gap, by bisection, and its curve over all that were tried."""
    tried: dict[int, tuple[float, Check]] = {}

    def arrives(iterations: int) -> bool:
        seconds, solution = run_peer(task, iterations)
        tried[iterations] = seconds, check(task, solution)
        return tried[iterations][1].relative_gap <= gap

    low, high = 0, 8
    while not arrives(high):
        low, high = high, 2 * high
        if high > most:
            return None, _curve(tried)
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if arrives(middle):
            high = middle
        else:
            low = middle
    return high, _curve(tried)


def _curve(tried: dict[int, tuple[float, Check]]) -> Curve:
    points = [tried[k] for k in sorted(tried)]
    return {
        "objective": [found.objective for _, found in points],
        "gap": [found.relative_gap for _, found in points],
        "seconds": [seconds for seconds, _ in points],
    }


def run(settings: Settings) -> Result:
    """Both solvers to a gap of 1e-4, at two shares of beta_max."""
    warm_up()
    result = Result("gated-mlp")
    n, d, gates = (300, 6, 5) if settings.quick else (10_000, 33, 50)
    base = make_problem(n, d, gates, settings.seed)
    largest = beta_max(base)
    for ratio in BETA_RATIOS:
        task = replace(base, beta=ratio * largest)
        name = f"n = {n}, d = {d}, P = {gates}, beta = {ratio:g} beta_max"
        settings.say(f"gated-mlp: R-FISTA, {name} ...")
        iterations, course = fewest_iterations(task, GAP, MOST_ITERATIONS)
        result.curves[name] = {"R-FISTA": course}
        theirs = None
        if iterations is not None:
            theirs = _peer(task, name, iterations, result, settings)
        else:
            result.rows.append(row(name, "R-FISTA", None, None, note=f"not there after {MOST_ITERATIONS} iterations"))
        settings.say(f"gated-mlp: ours, {name} ...")
        ours = _ours(task, name, result, settings)
        if theirs is not None:
            target = None if settings.quick else TARGET
            result.ratios.append(Ratio(f"gated MLP, {name}: R-FISTA / ours to {GAP:g}", theirs / ours, target))
    result.notes.append("R-FISTA: the seconds of its metrics, without preparing data; ours: the whole fit with proof.")
    return result


def _peer(task: Task, name: str, iterations: int, result: Result, settings: Settings) -> float:
    clock: list[float] = []

    def once() -> Solution:
        seconds, solution = run_peer(task, iterations)
        clock.append(seconds)
        return solution

    _, solution = timed(once, settings.repeats)
    timing = Timing(tuple(clock))
    result.rows.append(row(name, "R-FISTA", timing, check(task, solution), iterations=iterations))
    return timing.median


def _ours(task: Task, name: str, result: Result, settings: Settings) -> float:
    assert task.gates is not None
    gates = list(task.gates)

    def fit() -> Any:
        options: dict[str, Any] = {
            "activation": "gated_relu",
            "gates": gates,
            "fit_intercept": False,
            "random_state": settings.seed,
        }
        return ConvexHeadRegressor("mlp", beta=task.beta, tol=GAP, **options).fit(task.X, task.Y[:, 0])

    timing, head = timed(fit, settings.repeats)
    reached = check(task, Solution([b.u for b in head.blocks_], [b.v for b in head.blocks_]))
    result.rows.append(row(name, "ours", timing, reached, note=missed(reached, GAP), iterations=head.n_iter_))
    result.curves[name]["ours"] = curve(head.history_, reached, timing.median)
    return timing.median
