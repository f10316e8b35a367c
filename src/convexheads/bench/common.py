"""What the benchmarks share: settings, timing, rows, ratios and curves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from convexheads.bench.independent import Check
from convexheads.estimators import ConvexHeadClassifier
from convexheads.solvers.training import import_optimiser

T = TypeVar("T")
Curve = dict[str, list[float]]
"""``objective``, ``gap`` (relative) and ``seconds`` at each check of a method."""

ENOUGH = 60.0
"""Seconds of measured work after which a run is not repeated any more."""
BRIEF, MOST_RUNS = 2.0, 25
"""Seconds of measured work up to which it is repeated in any case where a median is wanted, and the most runs for that:
three runs of a tenth of a second say little."""


@dataclass(frozen=True)
class TokenSource:
    """Tokens of images, all roles, with one label an image.

    Attributes
    ----------
    X : (n, s, d), or a store of this shape.
    labels : (n,).
    layout : role -> (start, stop) in the token axis, or None where it is not known.
    """

    X: Any
    labels: np.ndarray
    layout: Mapping[str, tuple[int, int]] | None


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes
    ----------
    quick : tiny sizes, for tests: seconds instead of minutes.
    threads : processor threads of every method.
    repeats : runs of which the median is taken; fewer where they take more than a minute together, and more where they
        take less than two seconds.
    seed : of all data and starting points.
    tokens : real tokens, or None for synthetic ones of the same sizes.
    say : gets a line whenever a method starts.
    """

    quick: bool = False
    threads: int = 1
    repeats: int = 3
    seed: int = 0
    tokens: TokenSource | None = None
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


@dataclass(frozen=True)
class Ratio:
    """A quotient of medians that has a target.

    Attributes
    ----------
    what : what is divided by what, or what the number is.
    value : the quotient.
    target : what it should be, or None where there is no target.
    at_least : whether the target is a lower bound; else an upper one.
    bound : True where the other method did not arrive in its time, so that the true quotient is larger.
    """

    what: str
    value: float
    target: float | None = None
    at_least: bool = True
    bound: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        text = f"{self.what}: {'> ' if self.bound else ''}{self.value:.3g}"
        if self.target is None:
            return text
        side = "at least" if self.at_least else "at most"
        return f"{text} (target: {side} {self.target:g}, {'met' if self.met else 'missed'})"

    def as_row(self) -> dict[str, Any]:
        """For CSV."""
        return {
            "what": self.what,
            "value": self.value,
            "bound": self.bound,
            "target": self.target,
            "at_least": self.at_least,
            "met": self.met,
        }


@dataclass
class Result:
    """What a benchmark measured.

    Attributes
    ----------
    name : of the benchmark.
    rows : one a measurement, with the keys of :func:`row`.
    ratios : the quotients that targets speak of.
    curves : problem -> method -> curve, drawn as gap and objective against time.
    lines : title -> name -> (x, y), drawn on logarithmic axes: costs against sizes.
    notes : what a reader of the numbers must know, such as synthetic data.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self) -> list[dict[str, Any]]:
        """The rows, all with the same keys."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        return [{key: row.get(key, "") for key in keys} for row in self.rows]

    def curve_table(self) -> list[dict[str, Any]]:
        """One row a point of a curve."""
        return [
            {"problem": problem, "method": method, "seconds": t, "objective": value, "relative_gap": gap}
            for problem, methods in self.curves.items()
            for method, curve in methods.items()
            for t, value, gap in zip(curve["seconds"], curve["objective"], curve["gap"], strict=True)
        ]


def row(problem: str, method: str, timing: Timing | None, check: Check | None, **more: Any) -> dict[str, Any]:
    """A measurement: seconds (median, fastest, slowest, number of runs), and what was reached, computed anew."""
    return {
        "problem": problem,
        "method": method,
        "seconds": None if timing is None else timing.median,
        "fastest": None if timing is None else min(timing.runs),
        "slowest": None if timing is None else max(timing.runs),
        "runs": 0 if timing is None else len(timing.runs),
        "objective": None if check is None else check.objective,
        "dual": None if check is None else check.dual,
        "relative_gap": None if check is None else check.relative_gap,
        "note": "",
        **more,
    }


def missed(reached: Check, gap: float) -> str:
    """A note where a solution has not, by a hundredth of it, the relative gap that was asked for; else nothing."""
    return "not at the gap asked for" if reached.relative_gap > 1.01 * gap else ""


def timed(
    function: Callable[[], T], repeats: int, after: Callable[[T], object] = lambda result: None
) -> tuple[Timing, T]:
    """Run repeatedly, until ``repeats`` or until a minute is spent; returns the seconds and the last result.

    Where it is to be repeated at all, what is brief is run more often. ``after`` is given the result of each run, on
    no clock.
    """
    runs: list[float] = []
    while True:
        start = time.perf_counter()
        result = function()
        runs.append(time.perf_counter() - start)
        after(result)
        spent = sum(runs)
        brief = repeats > 1 and spent < BRIEF and len(runs) < MOST_RUNS
        if spent >= ENOUGH or (len(runs) >= repeats and not brief):
            return Timing(tuple(runs)), result


@cache
def warm_up() -> None:
    """Let torch and scikit-learn import what they import at first use: seconds that no run should count."""
    X, labels = np.random.default_rng(0).standard_normal((40, 2, 3)), np.arange(40) % 2
    for head in ("mlp", "linear"):
        ConvexHeadClassifier(head, beta_ratio=0.5, tol=0.1).fit(X, labels)
    import_optimiser()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch and all linear algebra libraries that are loaded use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(limits=count):
            yield
    finally:
        torch.set_num_threads(before)


def curve(history: Mapping[str, Sequence[float]], check: Check | None = None, seconds: float | None = None) -> Curve:
    """The course of a solve; with ``check``, its last point is what was computed anew, at ``seconds``."""
    found = {key: list(history[key]) for key in ("objective", "gap", "seconds")}
    if check is not None and seconds is not None:
        found["objective"].append(check.objective)
        found["gap"].append(check.relative_gap)
        found["seconds"].append(seconds)
    return found


def seconds_to(found: Curve, gap: float) -> float | None:
    """Seconds at which a curve first has this relative gap, linear between checks in the logarithm of the gap.

    None where it never does.
    """
    points = list(zip(found["seconds"], found["gap"], strict=True))
    for place, (t, reached) in enumerate(points):
        if reached > gap:
            continue
        if place == 0 or reached <= 0:
            return t
        before, above = points[place - 1]
        if not np.isfinite(above):
            return t
        share = float(np.log(above / gap) / np.log(above / reached)) if above > reached else 1.0
        return before + share * (t - before)
    return None
