"""Benchmarks: the independent check against the certificate and known optima, and every benchmark at tiny sizes."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import convexheads.evaluation
from convexheads import ConvexHeadClassifier
from convexheads.bench import BENCHMARKS, common, conic, gated_mlp, scaling
from convexheads.bench.common import Ratio, Result, Settings, Timing, TokenSource, curve, seconds_to, threads, timed
from convexheads.bench.independent import Solution, Task, beta_max, check, outputs, ridge_gradient
from convexheads.bench.logistic import real_features
from convexheads.bench.problems import make_task, our_problem, our_solution, patch_tokens, synthetic_tokens
from convexheads.certificate import certify_factors
from convexheads.cli import main
from convexheads.commands import bench as bench_command
from convexheads.solvers import solver_function
from convexheads.solvers.factored import largest_product
from convexheads.subspace import beta_max as our_beta_max
from convexheads.tokens import TokenStore

HEADS = [("self_attention", None), ("self_attention", 2), ("mlp", None), ("mlp", 3), ("mixer", None), ("mixer", 2)]
heads = pytest.mark.parametrize(("head", "gates"), HEADS)


def small_task(head: str, gates: int | None, fit_intercept: bool = True) -> Task:
    X, labels = synthetic_tokens(30, 4, 4, 3, seed=1)
    return make_task(head, X.astype(np.float64), labels, 0.1, gates, fit_intercept, seed=2)


def missing(name: str) -> list[str]:
    return [package for package in import_module(BENCHMARKS[name]).PACKAGES if find_spec(package) is None]


# The independent check ---------------------------------------------------------------------------------------


@heads
def test_the_check_agrees_with_the_certificate(head: str, gates: int | None) -> None:
    for fit_intercept in (True, False):
        task = small_task(head, gates, fit_intercept)
        problem = our_problem(task, torch.float64)
        assert beta_max(replace(task, beta=1.0)) == pytest.approx(our_beta_max(problem.with_beta(1.0)), rel=1e-9)
        # Two iterations from a random start as well as a solution.
        for tol, iterations in ((1.0, 2), (1e-6, 2000)):
            solution = solver_function("factored")(problem, tol=1e-6, max_iter=iterations)
            network = certify_factors(problem, solution.factors, network=True)
            found = check(task, our_solution(problem, solution.factors))
            assert found.objective == pytest.approx(network.primal, rel=1e-9)
            assert found.dual == pytest.approx(network.dual, rel=1e-6)
            assert -1e-12 <= found.relative_gap <= tol


@heads
def test_the_outputs_are_those_of_the_head(head: str, gates: int | None) -> None:
    task = small_task(head, gates)
    problem = our_problem(task, torch.float64)
    factors = solver_function("factored")(problem, tol=0.1).factors
    own = our_solution(problem, factors)
    assert own.intercept is not None
    np.testing.assert_allclose(outputs(task, own) + own.intercept, problem.forward(factors).numpy(), atol=1e-10)


@heads
def test_every_dual_bounds_the_optimum(head: str, gates: int | None) -> None:
    """Whatever the solution, its lower bound is below the best objective and its objective above."""
    task = small_task(head, gates)
    problem = our_problem(task, torch.float64)
    optimum = solver_function("factored")(problem, tol=1e-8).certificate
    best = our_solution(problem, solver_function("factored")(problem, tol=1e-8).factors)
    rng = np.random.default_rng(0)
    for scale in (0.0, 0.5, 1.0, 3.0):
        u = [scale * each + 0.1 * rng.standard_normal(each.shape) for each in best.u]
        found = check(task, Solution(u, best.v, best.intercept))
        assert found.dual <= optimum.primal * (1 + 1e-12)
        assert found.objective >= optimum.dual * (1 - 1e-12)
        assert found.relative_gap > 0


def test_the_check_of_a_squared_loss() -> None:
    task = gated_mlp.make_problem(60, 4, 3, seed=0)
    task = replace(task, beta=0.1 * beta_max(task))
    problem = our_problem(task, torch.float64)
    solution = solver_function("factored")(problem, tol=1e-7)
    found = check(task, our_solution(problem, solution.factors))
    assert found.objective == pytest.approx(solution.certificate.primal, rel=1e-8)
    assert 0 <= found.relative_gap <= 1e-7
    # At beta_max and above nothing but zero is optimal.
    zero = Solution([np.zeros((0, 4))] * 3, [np.zeros((0, 1))] * 3)
    assert check(replace(task, beta=1.001 * beta_max(task)), zero).relative_gap <= 1e-12
    assert check(replace(task, beta=0.9 * beta_max(task)), zero).relative_gap > 1e-4


def test_the_gradient_of_softmax_regression() -> None:
    rng = np.random.default_rng(0)
    X, labels = rng.standard_normal((40, 5)), np.arange(40) % 3
    W, b, D = rng.standard_normal((5, 3)), rng.standard_normal(3), rng.standard_normal((5, 3))
    Y = np.eye(3)[labels]
    value, norm = ridge_gradient(X, Y, W, b, 0.1)
    step = 1e-6
    slopes = [
        (ridge_gradient(X, Y, W + step * E, b, 0.1)[0] - ridge_gradient(X, Y, W - step * E, b, 0.1)[0]) / (2 * step)
        for E in np.eye(15).reshape(15, 5, 3)
    ]
    slopes += [
        (ridge_gradient(X, Y, W, b + step * e, 0.1)[0] - ridge_gradient(X, Y, W, b - step * e, 0.1)[0]) / (2 * step)
        for e in np.eye(3)
    ]
    assert norm == pytest.approx(np.linalg.norm(slopes), rel=1e-6)
    assert ridge_gradient(X, Y, W + 1e-3 * D, b, 0.1)[0] != value
    head = ConvexHeadClassifier("linear", beta=0.1, tol=1e-10).fit(X, labels)
    assert head.intercept_ is not None
    assert ridge_gradient(X, Y, head.blocks_[0].Z, head.intercept_, 0.1)[1] < 1e-5


# What the benchmarks share -----------------------------------------------------------------------------------


def test_time_to_a_gap() -> None:
    found = {"objective": [3.0, 2.0, 1.0], "gap": [1e-1, 1e-2, 1e-4], "seconds": [1.0, 2.0, 4.0]}
    assert seconds_to(found, 1e-1) == 1.0
    assert seconds_to(found, 1e-3) == pytest.approx(3.0)
    assert seconds_to(found, 1e-5) is None
    assert seconds_to({**found, "gap": [float("inf"), 1e-2, 1e-4]}, 1e-1) == 2.0
    assert curve(found)["gap"] == found["gap"]


def test_ratios_say_whether_their_target_is_met() -> None:
    assert Ratio("a / b", 4.0, 3.0).met
    assert not Ratio("a / b", 2.0, 3.0).met
    assert Ratio("exponent", 1.0, 1.05, at_least=False).met
    assert Ratio("a / b", 2.0).met is None
    assert str(Ratio("a / b", 2.0, 3.0)) == "a / b: 2 (target: at least 3, missed)"
    assert str(Ratio("a / b", 2.0, bound=True)) == "a / b: > 2"


def test_runs_are_repeated_and_threads_restored() -> None:
    calls: list[int] = []
    timing, last = timed(lambda: calls.append(1) or len(calls), 1)
    assert (len(timing.runs), last) == (1, 1)
    # A median of three runs as brief as these would say little.
    timing, last = timed(lambda: calls.append(1) or len(calls), 3)
    assert (len(timing.runs), last) == (common.MOST_RUNS, 1 + common.MOST_RUNS)
    assert len(timed(lambda: time.sleep(0.7), 2)[0].runs) == 3
    seen: list[int] = []
    timing, last = timed(
        lambda: calls.append(1) or len(calls), 1, lambda result: (seen.append(result), time.sleep(0.1))
    )
    assert seen == [last]
    assert timing.median < 0.1
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_operations_of_an_evaluation_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the samples and twice the units are four times the products with v; of whole blocks twice."""
    sizes = scaling.Sizes(64, 4, 4, 3, 4)
    for gain, factor in ((0.0, 2), (1e9, 1)):
        monkeypatch.setattr(convexheads.evaluation, "BLOCK_GAIN", gain)
        counted = []
        for each in (sizes, replace(sizes, n=128), replace(sizes, n=128, m=8)):
            timing, operations = scaling.measure_evaluation(our_problem(each.task(0)), each.m, scaling.Settings())
            counted.append(operations)
            assert len(timing.runs) >= scaling.SMALLEST_REPEATS
        # Blocks are made of units, and gradients of units of blocks, once a pass.
        once = (0, 0, 0) if factor == 2 else tuple(3 * 2 * m * 16 * 12 for m in (4, 4, 8))
        samples = [found - own for found, own in zip(counted, once, strict=True)]
        assert samples[1] == 2 * samples[0] > 0
        assert samples[2] == factor * samples[1]


def test_evaluations_and_the_peak_are_measured_as_the_solver_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[float] = []
    inside = [False]

    @contextlib.contextmanager
    def spy(multiplications: float) -> Iterator[None]:
        entered.append(multiplications)
        inside[0] = True
        yield
        inside[0] = False

    def spied(function: Callable[[], object], repeats: int) -> tuple[Timing, object]:
        assert inside[0]
        return timed(function, repeats)

    monkeypatch.setattr(scaling, "fast_products", spy)
    monkeypatch.setattr(scaling, "timed", spied)
    problem = our_problem(scaling.Sizes(64, 4, 4, 3, 4).task(0))
    scaling.measure_evaluation(problem, 4, scaling.Settings())
    assert scaling.matrix_product_peak(64) > 0
    assert entered == [largest_product(problem), 64**3]


def test_real_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X, labels = rng.standard_normal((12, 5, 6)).astype(np.float32), np.arange(12) % 3
    TokenStore.write(tmp_path / "train", X, labels, layout={"cls": [0, 1], "patch": [1, 5]}, grid=(2, 2), split="train")
    source = bench_command._tokens(str(tmp_path))
    assert isinstance(source, TokenSource)
    cls, both = real_features(source)
    X = X.astype(np.float16).astype(np.float32)  # what stores keep
    np.testing.assert_array_equal(cls, X[:, 0])
    np.testing.assert_allclose(both, np.concatenate([X[:, 0], X[:, 1:].mean(1)], 1), rtol=1e-5)
    patches = patch_tokens(source, 3)
    assert patches.shape == (12, 4, 4)
    np.testing.assert_allclose(patches[..., -1], 3**-0.5, rtol=1e-6)


# Peers -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(missing("gated-mlp")), reason="pyscnn is not installed")
def test_the_peer_on_the_gated_mlp_minimises_the_same_objective() -> None:
    task = gated_mlp.make_problem(100, 5, 4, seed=0)
    task = replace(task, beta=0.1 * beta_max(task))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    _, solution = gated_mlp.run_peer(task, 2000)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    found = check(task, solution)
    assert found.relative_gap < 1e-5
    problem = our_problem(task, torch.float64)
    assert found.objective == pytest.approx(solver_function("factored")(problem, tol=1e-8).certificate.primal, rel=1e-5)


# The command -------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if missing(name):
        pytest.skip(f"not installed: {', '.join(missing(name))}")
    arguments = ["bench", "--only", name, "--quick", "--repeats", "1", "--quiet", "--out", str(tmp_path)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows, ratios = read(tmp_path / f"{name}.csv"), read(tmp_path / "ratios.csv")
    assert rows
    assert ratios
    assert all(float(ratio["value"]) > 0 or name == "scaling" for ratio in ratios)
    assert all(ratio["what"] in out for ratio in ratios)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(report["benchmarks"][name]["rows"]) == len(rows)
    assert report["versions"]["torch"]
    CHECKS[name](rows)
    assert list(tmp_path.glob(f"{name}*.svg"))


def same_optimum(rows: list[dict[str, str]], tol: float) -> None:
    """Objectives of one problem, of all methods that have closed their gap, agree as far as the gaps say."""
    for problem in {row["problem"] for row in rows}:
        own = [row for row in rows if row["problem"] == problem and row["relative_gap"]]
        closed = [float(row["objective"]) for row in own if float(row["relative_gap"]) <= tol]
        assert len(closed) >= 2
        assert max(closed) <= min(closed) * (1 + 2 * tol)
        assert all(float(row["relative_gap"]) <= tol for row in own if row["method"].startswith("ours"))


def check_scaling(rows: list[dict[str, str]]) -> None:
    assert {row["axis"] for row in rows} == {"n", "s", "d", "m", "P", "threads"}
    assert all(0 < float(row["share_of_peak"]) < 1 for row in rows if row["method"] == "evaluation")
    fits = [row for row in rows if row["method"].startswith("fit")]
    assert fits
    assert all(float(row["relative_gap"]) <= scaling.GAP for row in fits)


def check_networks(rows: list[dict[str, str]]) -> None:
    same_optimum(rows, 1e-3)
    for row in rows:
        # The best bound of all is at least as good as a method's own.
        assert 0 <= float(row["above_bound"]) <= float(row["objective"]) / float(row["dual"]) - 1 + 1e-12


CHECKS: dict[str, Callable[[list[dict[str, str]]], None]] = {
    "conic": lambda rows: same_optimum(rows, 1e-3),
    "gated-mlp": lambda rows: same_optimum(rows, gated_mlp.GAP),
    "logistic": lambda rows: same_optimum(rows, 1e-3),
    "networks": check_networks,
    "scaling": check_scaling,
}


def test_conic_programs_grow_to_the_largest_one_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each peer takes seconds in proportion to the entries of Z; the second is out first."""
    seen = []

    def compare(size: tuple[int, int, int], peers: list[str], result: Result, settings: Settings) -> conic.Compared:
        _, d, c = size
        taken = {"SCS": d**3 * c / 250.0, "Clarabel": d**3 * c / 50.0}
        seen.append((d, c, tuple(peers)))
        return conic.Compared(f"{d}, {c}", {peer: (taken[peer], 0.1) for peer in peers if taken[peer] <= conic.MINUTE})

    monkeypatch.setattr(conic, "_compare", compare)
    result = conic.run(Settings())
    both, one = ("SCS", "Clarabel"), ("SCS",)
    assert seen[:5] == [(3, 4, both), (4, 6, both), (5, 8, both), (6, 10, both), (7, 12, both)]
    assert seen[5:] == [(8, 14, one), (9, 16, one), (10, 18, one), *((9, c, one) for c in range(17, 22))]
    (ratio,) = result.ratios
    assert ratio.what.startswith("conic, 9, 20: SCS")
    assert ratio.value == pytest.approx(9**3 * 20 / 250.0 / 0.1)
    assert ratio.target == conic.TARGET


def test_brief_conic_runs_are_followed_by_no_more_fits_than_others() -> None:
    """Each is followed by seconds of fits, and there may be many."""
    task = conic.planted(20, 2, 2, 0)
    ours = conic.Ours(task, Settings(repeats=2))
    ours._fit = lambda: calls.append(1)  # type: ignore[assignment,method-assign,return-value]
    calls: list[int] = []
    ours.follow(None)
    assert ours.peers is None
    for _ in range(4):
        ours.follow(conic.factored(np.zeros((4, 4)), np.zeros(2)))
    assert ours.peers is not None
    assert len(ours.timing.runs) == len(calls) == 2 * common.MOST_RUNS


def test_the_names_of_the_command_are_those_of_the_package() -> None:
    assert tuple(BENCHMARKS) == bench_command.NAMES


def test_a_missing_package_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scnn", None)
    assert main(["bench", "--only", "logistic,gated-mlp", "--quick", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "convexheads[bench]" in err
    assert "'scnn'" in err
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "got speed; expected some of conic"),
        (["--threads", "0"], "expected an integer of at least 1"),
        (["--only", "networks", "--tokens", "nowhere"], "nowhere"),
    ],
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_a_coarse_tolerance_is_met() -> None:
    """What is left out of a solution must not open the gap again, however much the tolerance seems to allow."""
    task = small_task("mlp", 3)
    solution = solver_function("factored")(our_problem(task, torch.float64), tol=0.3)
    assert solution.converged
    assert solution.certificate.relative_gap <= 0.3
