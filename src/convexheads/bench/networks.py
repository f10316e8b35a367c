"""Networks as practitioners train them, and FISTA with a dense SVD, against the factored solver: CIFAR-100 tokens.

Every row is one problem: patch tokens on whitened principal components, cross-entropy, at a share of beta_max. L-BFGS
has history 20 and a random start; AdamW trains for 30 epochs with each learning rate of a grid. Both are run with the
gradient that torch's automatic differentiation gives, as a network is trained, and with the gradients of our own
solver, so that only the methods differ (AdamW by automatic differentiation at the best rate only: its steps are the
same). FISTA works on the dense blocks. Clocks stand still while a method that has no certificate of its own is
checked, and the quotients count our time to the same checked gap: a row of its own has the time with the proof.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from convexheads.bench.common import (
    Curve,
    Ratio,
    Result,
    Settings,
    Timing,
    curve,
    missed,
    row,
    seconds_to,
    timed,
    warm_up,
)
from convexheads.bench.independent import Task, check
from convexheads.bench.problems import make_task, our_problem, our_solution, patch_tokens, synthetic_tokens
from convexheads.errors import InputError
from convexheads.problem import Problem
from convexheads.products import fast_products
from convexheads.solvers import Solution, solver_function
from convexheads.solvers.lbfgs import LBFGS
from convexheads.solvers.training import Recorder, import_optimiser, starting_units
from convexheads.types import Factors

PACKAGES = ()

GAP = 1e-3
EPOCHS = 30
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
HISTORY = 20
"""Curvature pairs of plain L-BFGS."""
LIMIT = 300.0
"""Seconds after which L-BFGS and FISTA are stopped at their next check."""
MOST_ITERATIONS = 5000
CHECKS = 24
LBFGS_TARGET = 4.5
"""Times that plain L-BFGS takes longer than ours, for linear self-attention at the first beta."""
ADAMW_TARGET = 0.4
"""Ours takes 2.5 times one run of AdamW at most, its sweep not counted."""


@dataclass(frozen=True)
class Case:
    """A row: head, principal components, samples (None: all), share of beta_max, units (a gate), gates."""

    head: str
    features: int
    samples: int | None
    beta_ratio: float
    units: int
    gates: int | None = None

    def name(self, n: int) -> str:
        gated = "linear" if self.gates is None else f"gated, P = {self.gates}"
        return f"{self.head}, {gated}, {self.features} features, n = {n}, beta = {self.beta_ratio:g} beta_max"


CASES = (
    Case("self_attention", 32, None, 0.034, 20),
    Case("self_attention", 32, None, 0.017, 32),
    Case("mixer", 32, None, 0.0177, 24),
    Case("mlp", 32, None, 0.0165, 33),
    Case("self_attention", 16, 5000, 0.05, 12, 4),
    Case("self_attention", 16, 5000, 0.05, 4, 16),
    Case("self_attention", 16, 5000, 0.05, 2, 64),
    Case("mixer", 16, 5000, 0.05, 12, 4),
)
QUICK = (Case("self_attention", 4, 80, 0.1, 6), Case("mlp", 4, 80, 0.1, 4, 2))


def tasks(settings: Settings) -> Iterator[tuple[Case, Task]]:
    """The problems, on the tokens given or on synthetic ones of the same sizes."""
    tokens: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for case in QUICK if settings.quick else CASES:
        if case.features not in tokens:
            if settings.tokens is not None and not settings.quick:
                tokens[case.features] = patch_tokens(settings.tokens, case.features), settings.tokens.labels
            else:
                n, s, c = (80, 4, 4) if settings.quick else (10_000, 49, 100)
                tokens[case.features] = synthetic_tokens(n, s, case.features + 1, c, settings.seed)
        X, labels = tokens[case.features]
        yield case, make_task(case.head, X[: case.samples], labels[: case.samples], case.beta_ratio, case.gates)


def run(settings: Settings) -> Result:
    """All methods on all rows."""
    warm_up()
    result = Result("networks")
    if settings.tokens is None:
        result.notes.append("networks: synthetic tokens of the sizes of CIFAR-100's in place of real ones (--tokens)")
    for case, task in tasks(settings):
        name = case.name(len(task.X))
        result.curves[name] = {}
        first = len(result.rows)
        ours = _ours(task, name, result, settings)
        for gradient in GRADIENTS:
            _lbfgs(task, case, name, gradient, ours, result, settings)
        _adamw(task, case, name, ours, result, settings)
        _fista(task, name, result, settings)
        _above_bound(result.rows[first:])
    return result


def _above_bound(rows: list[dict[str, Any]]) -> None:
    """Put into each row by what share its objective is at most above the optimum: above the best lower bound of all."""
    bound = max(each["dual"] for each in rows if each["dual"] is not None)
    for each in rows:
        each["above_bound"] = None if each["objective"] is None else each["objective"] / bound - 1.0


def _ours(task: Task, name: str, result: Result, settings: Settings) -> float:
    settings.say(f"networks: ours, {name} ...")
    solver = solver_function("factored")
    seconds = []
    for prove, method in ((True, "ours"), (False, "ours, without the proof")):

        def solve(prove: bool = prove) -> Solution:
            return solver(our_problem(task), tol=GAP, random_state=settings.seed, prove=prove)

        timing, solution = timed(solve, settings.repeats)
        reached = check(task, our_solution(our_problem(task), solution.factors))
        there = reached.relative_gap <= GAP
        more = {"to_gap": timing.median if there else None, "units": solution.factors.n_units}
        result.rows.append(row(name, method, timing, reached, note=missed(reached, GAP), **more))
        result.curves[name][method] = curve(solution.history.as_dict(), reached, timing.median)
        seconds.append(timing.median if there else math.inf)
    # The others prove nothing: where the independent check has found the gap closed, the time without the proof counts.
    return min(seconds)


def _lbfgs(task: Task, case: Case, name: str, gradient: str, ours: float, result: Result, settings: Settings) -> None:
    method = f"L-BFGS, history {HISTORY}, {gradient}"
    settings.say(f"networks: {method}, {name} ...")
    problem = our_problem(task)
    factors, history, seconds = plain_lbfgs(problem, case.units, settings.seed, LIMIT, GRADIENTS[gradient])
    reached = check(task, our_solution(problem, factors))
    found = curve(history)
    there = seconds_to(found, GAP)
    more = {"to_gap": there, "units": factors.n_units}
    result.rows.append(row(name, method, Timing((seconds,)), reached, **more))
    result.rows[-1]["note"] = "" if there is not None else "did not arrive at the gap"
    result.curves[name][method] = found
    # One that never arrives took at least as long as it ran.
    quotient = (seconds if there is None else there) / ours
    target = LBFGS_TARGET if case == CASES[0] and gradient == "autograd" else None
    result.ratios.append(Ratio(f"networks, {name}: {method} / ours to {GAP:g}", quotient, target, bound=there is None))


Evaluation = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def objective_on(problem: Problem, factors: Factors, index: slice | torch.Tensor) -> torch.Tensor:
    """The network's objective estimated on some samples, for torch to differentiate."""
    stats = problem.stats_of(index, problem.dtype)
    targets, weights = problem.targets_of(index, problem.dtype)
    features = [c.features(s, u) for c, s, u in zip(problem.components, stats, factors.units, strict=True)]
    losses = problem.loss.entry_value(problem.combine(factors, features, targets.shape[:-1]), targets)
    decay = sum(
        problem.penalty_weight(component) * t.square().sum()
        for component, units in zip(problem.components, factors.units, strict=True)
        for t in units.tensors()
    )
    return losses.reshape(len(targets), -1).sum(1) @ weights * (problem.n / len(targets)) + 0.5 * decay


def differentiated(problem: Problem, shapes: Factors) -> Evaluation:
    """The objective and its gradient as torch has them: the head on all samples, and automatic differentiation."""

    def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        x = x.detach().requires_grad_()
        value = objective_on(problem, shapes.like(x), slice(0, problem.local))
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient

    return evaluate


def explicit(problem: Problem, shapes: Factors) -> Evaluation:
    """The same by the products that our solver takes."""
    return lambda x: problem.flat_value_and_gradient(shapes, x)


GRADIENTS: dict[str, Callable[[Problem, Factors], Evaluation]] = {
    "autograd": differentiated,
    "our evaluations": explicit,
}


def plain_lbfgs(
    problem: Problem,
    units: int,
    seed: int,
    limit: float,
    objective: Callable[[Problem, Factors], Evaluation] = differentiated,
) -> tuple[Factors, dict, float]:
    """L-BFGS from a random start until its gap is closed, it stands still or its time is over.

    Returns the units, the history and the seconds of training, checks excluded.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = starting_units(problem, [units], generator, None, None)
    recorder = Recorder(problem, GAP, MOST_ITERATIONS, CHECKS, None)
    with fast_products() if objective is explicit else contextlib.nullcontext():
        optimiser = LBFGS(objective(problem, shapes), shapes.flat(), 2e-7, HISTORY)
        failures = iteration = 0
        while failures < 2 and iteration < MOST_ITERATIONS and recorder.seconds < limit:
            failures = 0 if optimiser.step() else failures + 1
            iteration += 1
            if recorder(iteration, shapes.like(optimiser.x)):
                break
    run = recorder.finish(shapes.like(optimiser.x), "", seed)
    return run.factors, run.history.as_dict(), run.history.seconds[-1]


def _adamw(task: Task, case: Case, name: str, ours: float, result: Result, settings: Settings) -> None:
    epochs, rates = (2, LEARNING_RATES[-2:]) if settings.quick else (EPOCHS, LEARNING_RATES)
    durations = {}
    for rate in rates:
        settings.say(f"networks: AdamW {rate:g}, {name} ...")
        problem = our_problem(task)
        options = {"learning_rates": (rate,), "epochs": epochs, "units": case.units}
        try:
            solution = solver_function("adamw")(problem, tol=GAP, random_state=settings.seed, options=options)
        except InputError as error:
            # The only run has diverged.
            result.rows.append(row(name, f"AdamW, learning rate {rate:g}", None, None, note=str(error)))
            continue
        (course,) = solution.stats["runs"]
        reached = check(task, our_solution(problem, solution.factors))
        found = curve(course["history"])
        more = {"to_gap": seconds_to(found, GAP), "units": case.units}
        timing = Timing((course["seconds"],))
        result.rows.append(row(name, f"AdamW, learning rate {rate:g}", timing, reached, **more))
        result.curves[name][f"AdamW, learning rate {rate:g}"] = found
        durations[reached.objective] = rate, timing.median
    if not durations:
        return
    rate, seconds = durations[min(durations)]
    settings.say(f"networks: AdamW {rate:g}, autograd, {name} ...")
    problem = our_problem(task)
    timing, factors = timed(lambda: plain_adamw(problem, case.units, settings.seed, rate, epochs), settings.repeats)
    reached = check(task, our_solution(problem, factors))
    more = {"to_gap": None, "units": case.units}
    result.rows.append(row(name, f"AdamW, learning rate {rate:g}, autograd", timing, reached, **more))
    for gradient, taken in (("autograd", timing.median), ("our evaluations", seconds)):
        what = f"networks, {name}: {epochs} epochs of AdamW, {gradient} (the best rate, {rate:g}) / ours to {GAP:g}"
        target = None if settings.quick or gradient != "autograd" else ADAMW_TARGET
        result.ratios.append(Ratio(what, taken / ours, target))


def plain_adamw(problem: Problem, units: int, seed: int, rate: float, epochs: int, batch_size: int = 256) -> Factors:
    """AdamW with cosine decay on shuffled mini-batches, gradients by automatic differentiation: a usual training loop.

    The steps are those of the solver ``adamw``: the same start, batches and weight decay, which is in the gradient.
    """
    import_optimiser()
    generator = torch.Generator().manual_seed(seed)
    start = starting_units(problem, [units], generator, None, None)
    x = start.flat().clone().requires_grad_()
    optimiser = torch.optim.AdamW([x], lr=rate, weight_decay=0.0)
    steps = epochs * math.ceil(problem.n / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for index in torch.randperm(problem.n, generator=generator).split(batch_size):
            optimiser.zero_grad()
            objective_on(problem, start.like(x), index).backward()
            optimiser.step()
            schedule.step()
    return start.like(x.detach())


class _OutOfTime(Exception):
    pass


def _fista(task: Task, name: str, result: Result, settings: Settings) -> None:
    settings.say(f"networks: FISTA, {name} ...")
    problem = our_problem(task, torch.float64)
    seen: Curve = {"objective": [], "gap": [], "seconds": []}
    last: list[Factors] = []
    start = time.perf_counter()

    def watch(state: dict) -> None:
        for key in seen:
            seen[key].append(state[key])
        last[:] = [state["factors"]]
        if state["gap"] > GAP and time.perf_counter() - start > LIMIT:
            raise _OutOfTime

    try:
        last[:] = [solver_function("fista")(problem, tol=GAP, max_iter=20_000, progress=watch).factors]
    except _OutOfTime:
        pass
    except InputError as error:
        # Its dense matrices would not fit.
        result.rows.append(row(name, "FISTA, dense SVD", None, None, note=str(error)))
        return
    seconds = time.perf_counter() - start
    reached = check(task, our_solution(problem, last[0]))
    more = {"to_gap": seconds_to(seen, GAP), "units": last[0].n_units}
    result.rows.append(row(name, "FISTA, dense SVD", Timing((seconds,)), reached, **more))
    result.curves[name]["FISTA"] = seen
