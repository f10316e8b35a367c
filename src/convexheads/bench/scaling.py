"""Cost of the factored solver against the sizes of the problem, and how much of the machine it uses.

An evaluation is one objective with its gradient, the step of every method on the factors; its floating-point
operations are counted by torch and set against a square matrix product on the same threads. A fit is a whole solve to
a proved gap of 1e-3. Tokens are synthetic: their number is what is measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from convexheads.bench.common import Ratio, Result, Settings, Timing, missed, row, threads, timed, warm_up
from convexheads.bench.independent import Task, check
from convexheads.bench.problems import make_task, our_problem, our_solution, synthetic_tokens
from convexheads.problem import Problem
from convexheads.products import fast_products
from convexheads.solvers import Solution, solver_function
from convexheads.solvers.factored import largest_product
from convexheads.solvers.starts import random_factors
from convexheads.types import Factors

PACKAGES = ()

GAP = 1e-3
BETA_RATIO = 0.05
LARGEST_EXPONENT = 1.05
FROM = 5000
"""Samples from which the exponent of the cost in n is taken."""
SMALLEST_REPEATS = 5


@dataclass(frozen=True)
class Sizes:
    """Samples, tokens, features (constant included), classes, units (a gate), and gates (None: linear)."""

    n: int = 10_000
    s: int = 16
    d: int = 17
    c: int = 20
    m: int = 20
    P: int | None = None

    def __str__(self) -> str:
        gates = "" if self.P is None else f", P = {self.P}"
        return f"n = {self.n}, s = {self.s}, d = {self.d}, c = {self.c}, m = {self.m}{gates}"

    def task(self, seed: int) -> Task:
        """Self-attention on synthetic tokens."""
        X, labels = synthetic_tokens(self.n, self.s, self.d, self.c, seed)
        return make_task("self_attention", X, labels, BETA_RATIO, self.P, seed=seed)


def axes(quick: bool) -> dict[str, list[Sizes]]:
    """For each size that is varied, the problems."""
    if quick:
        base = Sizes(80, 4, 4, 3, 4)
        gated = replace(base, P=2)
        return {
            "n": [replace(base, n=n) for n in (60, 120)],
            "s": [replace(gated, s=s) for s in (2, 4)],
            "d": [replace(base, d=d) for d in (3, 5)],
            "m": [replace(base, m=m) for m in (2, 4)],
            "P": [replace(gated, P=P) for P in (1, 2)],
        }
    base, gated = Sizes(), Sizes(n=2000, m=8, P=4)
    return {
        "n": [replace(base, n=n) for n in (1000, 2000, 5000, 10_000, 20_000, 50_000)],
        # Without gates the tokens are gone after one pass: s costs nothing.
        "s": [replace(gated, s=s) for s in (9, 16, 36, 64)],
        "d": [replace(base, d=d) for d in (9, 17, 33, 49)],
        "m": [replace(base, m=m) for m in (5, 10, 20, 40, 80)],
        "P": [replace(gated, P=P) for P in (1, 2, 4, 8, 16)],
    }


def run(settings: Settings) -> Result:
    """Cost against n, s, d, m, P and threads."""
    warm_up()
    result = Result("scaling")
    peak = matrix_product_peak(512 if settings.quick else 2048)
    result.notes.append(f"matrix product, float32, {settings.threads} threads: {peak / 1e9:.1f} GFlop/s")
    result.lines["Seconds an evaluation"] = {}
    for axis, problems in axes(settings.quick).items():
        costs = []
        for sizes in problems:
            settings.say(f"scaling: {axis}, {sizes} ...")
            costs.append(_evaluation(sizes, axis, peak, result, settings))
        result.lines["Seconds an evaluation"][axis] = ([float(getattr(each, axis)) for each in problems], costs)
    _fits(axes(settings.quick)["n"], result, settings)
    _threads(settings, result)
    return result


def matrix_product_peak(size: int) -> float:
    """Floating-point operations a second of the fastest of some square products, taken as the solver takes its own."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    with fast_products(size**3):
        timing, _ = timed(lambda: a @ b, 8)
    return 2.0 * size**3 / min(timing.runs)


def _start(problem: Problem, m: int, seed: int) -> Factors:
    return random_factors(problem, [m], torch.Generator().manual_seed(seed), problem.dtype)


def measure_evaluation(problem: Problem, m: int, settings: Settings) -> tuple[Timing, float]:
    """Seconds of one objective with gradient at m units a gate, and its floating-point operations."""
    factors = _start(problem, m, settings.seed)
    with fast_products(largest_product(problem)):
        # The first one fills the caches.
        with FlopCounterMode(display=False):
            problem.value_and_gradient(factors)
        with FlopCounterMode(display=False) as counter:
            problem.value_and_gradient(factors)
        timing, _ = timed(lambda: problem.value_and_gradient(factors), max(SMALLEST_REPEATS, settings.repeats))
    return timing, float(counter.get_total_flops())


def _evaluation(sizes: Sizes, axis: str, peak: float, result: Result, settings: Settings) -> float:
    timing, operations = measure_evaluation(our_problem(sizes.task(settings.seed)), sizes.m, settings)
    speed = operations / timing.median
    more = {"axis": axis, "gflops": speed / 1e9, "share_of_peak": speed / peak, "threads": settings.threads}
    result.rows.append(row(str(sizes), "evaluation", timing, None, **more))
    return timing.median


def _fit(task: Task, settings: Settings) -> tuple[Timing, Solution]:
    solver = solver_function("factored")
    return timed(lambda: solver(our_problem(task), tol=GAP, random_state=settings.seed), settings.repeats)


def _fits(problems: list[Sizes], result: Result, settings: Settings) -> None:
    seconds = []
    for sizes in problems:
        settings.say(f"scaling: fit, {sizes} ...")
        task = sizes.task(settings.seed)
        timing, solution = _fit(task, settings)
        reached = check(task, our_solution(our_problem(task), solution.factors))
        more = {"axis": "n", "threads": settings.threads, "note": missed(reached, GAP)}
        result.rows.append(row(str(sizes), f"fit to {GAP:g}", timing, reached, **more))
        seconds.append(timing.median)
    counts = [float(sizes.n) for sizes in problems]
    result.lines[f"Seconds to a gap of {GAP:g}"] = {"n": (counts, seconds)}
    kept = [place for place, n in enumerate(counts) if settings.quick or n >= FROM]
    slope = np.polyfit(np.log([counts[i] for i in kept]), np.log([seconds[i] for i in kept]), 1)[0]
    target = None if settings.quick else LARGEST_EXPONENT
    what = f"scaling, n from {counts[kept[0]]:g} to {counts[kept[-1]]:g}: exponent of the seconds to {GAP:g} in n"
    result.ratios.append(Ratio(what, float(slope), target, at_least=False))


def _threads(settings: Settings, result: Result) -> None:
    """The same problem on 1, 2, 4, ... threads, as many as this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sizes = axes(settings.quick)["n"][-3 if not settings.quick else -1]
    task = sizes.task(settings.seed)
    counts = [2**k for k in range(available.bit_length()) if 2**k <= available]
    evaluations, fits = [], []
    for count in counts:
        settings.say(f"scaling: {count} threads, {sizes} ...")
        with threads(count):
            peak = matrix_product_peak(512 if settings.quick else 2048)
            timing, operations = measure_evaluation(our_problem(task), sizes.m, settings)
            speed = operations / timing.median
            more = {"axis": "threads", "gflops": speed / 1e9, "share_of_peak": speed / peak, "threads": count}
            result.rows.append(row(str(sizes), "evaluation", timing, None, **more))
            evaluations.append(timing.median)
            own, solution = _fit(task, settings)
            reached = check(task, our_solution(our_problem(task), solution.factors))
            more = {"axis": "threads", "threads": count}
            result.rows.append(row(str(sizes), f"fit to {GAP:g}", own, reached, **more))
            fits.append(own.median)
    x = [float(count) for count in counts]
    result.lines["Seconds on threads"] = {"evaluation": (x, evaluations), "fit": (x, fits)}
