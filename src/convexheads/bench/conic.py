"""Conic solvers on the dense lifted program of linear self-attention, against the factored solver.

CVXPY hands   min (1/n) sum_i l(T_i Z + b, y_i) + beta ||Z||_*   to Clarabel and SCS, growing Z in R^{d^2 x d c} until
neither is done within a minute; from the last size that one of them solves on, class by class. Our solver stops at
the gap that each of them has reached.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexheads.bench.common import Ratio, Result, Settings, Timing, curve, missed, row, timed, warm_up
from convexheads.bench.independent import Check, Solution, Task, check
from convexheads.bench.problems import make_task
from convexheads.errors import NotConvergedWarning, require
from convexheads.estimators import ConvexHeadClassifier

PACKAGES = ("cvxpy", "clarabel", "scs")

MINUTE = 60.0
TARGET = 500.0
BETA_RATIO = 0.1
LEAST_TOL = 1e-9
"""Gaps below this are not asked of our solver: they are rounding."""
PEERS: dict[str, tuple[str, str]] = {"SCS": ("SCS", "time_limit_secs"), "Clarabel": ("CLARABEL", "time_limit")}
"""Name -> CVXPY's name for it, and its option for a time limit in seconds."""


@dataclass(frozen=True)
class Lifted:
    """The dense program: features T (n, d^2 d) with columns ((a, k), l), one-hot targets, beta."""

    task: Task

    def solve(self, peer: str, limit: float) -> tuple[float, Solution | None]:
        """Seconds that the conic solver itself reports, without CVXPY's own, and its solution if it found one."""
        cp = require("cvxpy", "bench")
        task = self.task
        n, _, d = task.X.shape
        c = task.Y.shape[1]
        X = task.X.astype(np.float64)
        T = (X.mean(1)[:, :, None, None] * (X.swapaxes(1, 2) @ X)[:, None]).reshape(n, -1)
        Z, b = cp.Variable((d * d, d * c)), cp.Variable(c)
        O = T @ cp.reshape(Z, (d**3, c), order="C") + np.ones((n, 1)) @ cp.reshape(b, (1, c), order="C")
        loss = (cp.sum(cp.log_sum_exp(O, axis=1)) - cp.sum(cp.multiply(task.Y, O))) / n
        program = cp.Problem(cp.Minimize(loss + task.beta * cp.normNuc(Z)))
        solver, option = PEERS[peer]
        with warnings.catch_warnings():
            # An inaccurate solution is told by its gap.
            warnings.simplefilter("ignore")
            try:
                program.solve(solver=solver, **{option: limit})
            except cp.error.SolverError:
                return limit, None
        if Z.value is None or program.status not in ("optimal", "optimal_inaccurate"):
            return limit, None
        stats = program.solver_stats
        return float(stats.solve_time or 0.0) + float(stats.setup_time or 0.0), factored(Z.value, b.value)


def factored(Z: np.ndarray, b: np.ndarray) -> Solution:
    """A dense Z as balanced units, which have the weight decay ||Z||_*."""
    U, sigma, Vh = np.linalg.svd(Z, full_matrices=False)
    root = np.sqrt(sigma)[:, None]
    return Solution([U.T * root], [Vh * root], b)


def sizes(quick: bool) -> Iterator[tuple[int, int, int]]:
    """Samples, features and classes of ever larger programs."""
    if quick:
        yield from ((20, 2, 2), (20, 2, 3))
        return
    for d in range(3, 20):
        yield 200, d, max(2, 2 * d - 2)


def planted(n: int, d: int, c: int, seed: int) -> Task:
    """Random tokens of ``d`` features whose label is what a planted head says, but every class occurs."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 8, d))
    W = rng.standard_normal((d, d, c))
    scores = np.einsum("na,nkl,akc,l->nc", X.mean(1), X.swapaxes(1, 2) @ X, W, rng.standard_normal(d))
    labels = np.where(np.arange(n) < 2 * c, np.arange(n) % c, scores.argmax(1))
    return make_task("self_attention", X, labels, BETA_RATIO)


@dataclass(frozen=True)
class Compared:
    """A program that some peers have solved within a minute: their seconds, and ours at the gap of each."""

    name: str
    seconds: dict[str, tuple[float, float]]


def run(settings: Settings) -> Result:
    """Grow the program until no conic solver is done within a minute; the largest one, to a class."""
    warm_up()
    result = Result("conic")
    alive = list(PEERS)
    largest: tuple[int, int, int] | None = None
    last: Compared | None = None
    for size in sizes(settings.quick):
        compared = _compare(size, alive, result, settings)
        alive = list(compared.seconds)
        if not alive:
            break
        largest, last = size, compared
    if not alive and largest is not None and last is not None:
        # The largest program that takes a minute lies between the last two sizes.
        (n, d, c), alive = largest, list(last.seconds)
        while alive:
            c += 1
            compared = _compare((n, d, c), alive, result, settings)
            alive = list(compared.seconds)
            last = compared if alive else last
    if last is not None:
        fastest = min(last.seconds, key=lambda peer: last.seconds[peer][0])
        for peer, (theirs, ours) in last.seconds.items():
            target = TARGET if peer == fastest and not settings.quick else None
            result.ratios.append(Ratio(f"conic, {last.name}: {peer} / ours at its gap", theirs / ours, target))
    result.notes.append("Conic solvers: the seconds that they report; ours: the whole fit, proof included.")
    return result


def _compare(size: tuple[int, int, int], peers: list[str], result: Result, settings: Settings) -> Compared:
    """Rows of all on a program of n samples, d features and c classes."""
    n, d, c = size
    task = planted(n, d, c, settings.seed)
    compared = Compared(f"{d * d} x {d * c}, n = {n}", {})
    result.curves[compared.name] = {}
    for peer in peers:
        settings.say(f"conic: {peer} on {compared.name}, and ours to its gap after each run ...")
        ours = Ours(task, settings)
        timing = _timed_peer(Lifted(task), peer, settings.repeats, ours.follow)
        if ours.peers is None:
            result.rows.append(row(compared.name, peer, timing, None, note=f"no solution within {MINUTE:g} s"))
            continue
        result.rows.append(row(compared.name, peer, timing, ours.peers, tol=None, rank=None))
        result.curves[compared.name][peer] = _point(ours.peers, timing.median)
        ours.record(compared.name, peer, result)
        if timing.median <= MINUTE:
            compared.seconds[peer] = timing.median, ours.timing.median
    return compared


def _timed_peer(program: Lifted, peer: str, repeats: int, follow: Callable[[Solution | None], None]) -> Timing:
    """Runs as in :func:`timed`, by the solver's own clock; ``follow`` is given what each of them has found."""
    clock: list[float] = []

    def once() -> Solution | None:
        seconds, solution = program.solve(peer, 1.2 * MINUTE)
        clock.append(seconds)
        return solution

    timed(once, repeats, follow)
    return Timing(tuple(clock))


class Ours:
    """Our fits to the gap of a peer, some after each of its runs.

    A fit takes a tenth of a second, so that all of them in a row would tell how fast the machine is just then.

    Attributes
    ----------
    peers : what the peer has reached, the same in every run; None where it has found no solution.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings = task, settings
        self.timings: list[Timing] = []
        self.peers: Check | None = None
        self.head: Any = None

    @property
    def timing(self) -> Timing:
        return Timing(tuple(seconds for timing in self.timings for seconds in timing.runs))

    @property
    def tol(self) -> float:
        """The gap that is asked for."""
        assert self.peers is not None
        return min(0.5, max(LEAST_TOL, self.peers.relative_gap))

    def follow(self, solution: Solution | None) -> None:
        """Fit, repeatedly, after each of the first ``repeats`` runs of the peer that have found a solution."""
        if solution is None or len(self.timings) == self.settings.repeats:
            return
        self.peers = self.peers or check(self.task, solution)
        timing, self.head = timed(self._fit, self.settings.repeats)
        self.timings.append(timing)

    def _fit(self) -> ConvexHeadClassifier:
        head = ConvexHeadClassifier(
            "self_attention", beta=self.task.beta, tol=self.tol, random_state=self.settings.seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            return head.fit(self.task.X, self.task.Y.argmax(1))

    def record(self, name: str, peer: str, result: Result) -> None:
        """The row and the curve of the fits."""
        (block,) = self.head.blocks_
        reached = check(self.task, Solution([block.u], [block.v], self.head.intercept_))
        method, note = f"ours, gap of {peer}", missed(reached, self.tol)
        result.rows.append(row(name, method, self.timing, reached, note=note, tol=self.tol, rank=self.head.rank_))
        result.curves[name][method] = curve(self.head.history_, reached, self.timing.median)


def _point(reached: Check, seconds: float) -> dict[str, list[float]]:
    return {"objective": [reached.objective], "gap": [reached.relative_gap], "seconds": [seconds]}
