"""The memory limit: how it is given, what it bounds, and that it changes no result."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from contract_cases import Case, float32_problem
from convexheads import ConvexHeadClassifier, memory, problem, products
from convexheads.errors import DataError, InputError
from convexheads.inputs import TokenRows, own_rows, shown, without_last
from convexheads.operator import split_rows
from convexheads.tokens.store import TokenStore
from convexheads.tokens.transforms import PCATokens

MB = 10**6


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("4GB", 4 * 10**9),
        ("4GiB", 4 * 2**30),
        ("1.5g", 3 * 2**29),
        (" 512 MiB ", 512 * 2**20),
        (10**8, 10**8),
        ("100000000", 10**8),
        (None, None),
    ],
)
def test_bytes(given: object, expected: int | None) -> None:
    assert memory.parse_bytes(given) == expected


@pytest.mark.parametrize("given", ["4 apples", "GB", "-4GB", 0, "1MB", True, [4], float("nan"), "1e9"])
def test_bad_bytes(given: object) -> None:
    with pytest.raises(InputError, match="memory_limit: got"):
        memory.parse_bytes(given)
    with pytest.raises(InputError, match="memory_limit: got"):
        ConvexHeadClassifier(memory_limit=given).fit(np.zeros((4, 1, 2)), [0, 1, 0, 1])


def test_a_limit_too_small_for_the_outputs_is_told() -> None:
    X = np.zeros((60, 1, 40), np.float32)
    targets = np.tile(np.eye(60), (1, 500)) / 500
    with pytest.raises(InputError, match=r"memory_limit: got .*; expected at least .* for the outputs of 60 samples"):
        ConvexHeadClassifier("mlp", memory_limit="16MiB", label_smoothing=0.0).fit(X, targets)


def test_budgets_are_nested_and_left() -> None:
    outside = memory.current()
    with memory.limited("32MB") as inner:
        assert memory.current() is inner
        assert inner.limit == 32 * MB
        assert inner.cache + 8 * inner.workspace + inner.reading < 32 * MB
        with memory.limited(None):
            assert memory.current() is inner
    assert memory.current() is outside


@pytest.mark.parametrize("mapped", [1, memory.MAPPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.bfloat16])
def test_rows_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mapped: int) -> None:
    """Whether they are mapped or copied."""
    monkeypatch.setattr(memory, "MAPPED", mapped)
    values = (torch.randn(20, 3, 2, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    rows = memory.FileRows((20, 3, 2), dtype, tmp_path)
    # Rows may come in another dtype.
    rows.write(8, values[8:].double())
    rows.write(0, values[:8])
    assert torch.equal(rows[0:20], values)
    assert torch.equal(rows[5:9], values[5:9])
    assert torch.equal(rows[7:3], values[7:3])
    index = torch.tensor([3, 4, 5, 1, 1, 19, 0])
    assert torch.equal(rows[index], values[index])
    assert torch.equal(rows[index.numpy()], values[index])
    assert rows[torch.tensor([], dtype=torch.long)].shape == (0, 3, 2)
    # It has no name, so that nothing is left behind however the process ends.
    assert list(tmp_path.iterdir()) == []
    short = memory.FileRows((20, 3, 2), dtype, tmp_path)
    short.write(0, values[:4])
    with pytest.raises(DataError, match="ends before row"):
        short[2:10]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 5, 8))
    y = (X[:, :, 0] * X[:, :, 1]).mean(1) > 0
    return TokenStore.write(tmp_path / "store", X, y.astype(int), dtype="float32", shard_rows=64)


@pytest.mark.skipif(sys.platform != "linux", reason="pages of a map are given back on Linux only")
def test_many_rows_of_a_file_are_mapped_and_given_back(tmp_path: Path) -> None:
    size = 2 * memory.MAPPED
    rows = memory.FileRows((12, size // 4), torch.float32, tmp_path)
    for start in range(12):
        rows.write(start, torch.full((1, size // 4), float(start)))
    before = memory.resident_memory()
    assert before is not None
    for start in range(0, 12, 2):
        part = rows[start : start + 2]
        assert part.sum(1).tolist() == [size // 4 * start, size // 4 * (start + 1)]
        assert rows[torch.tensor([start, start + 1])].data_ptr() == part.data_ptr()
        # One run of 2 * size bytes at a time, and what the system maps around it.
        assert memory.resident_memory() - before <= 3.5 * size
    assert rows[torch.tensor([3, 1])][:, 0].tolist() == [3, 1]


def test_small_limits_leave_the_library_of_rough_products_alone() -> None:
    """It keeps code and buffers for every shape of a product: more than all else of a small fit."""
    seen: list[bool] = []
    for limit, allowed in ((None, True), (memory.ROOMY, True), (memory.ROOMY - 1, False)):
        with memory.limited(limit):
            assert memory.current().roomy is allowed
            seen.append(isinstance(products.rough_products(torch.device("cpu")), contextlib.nullcontext))
    can = products.low_precision(torch.device("cpu")) is not None and products._setting() is not None
    assert seen == [not can, not can, True]


def test_a_limit_with_room_for_everything_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1500, 6, 8)).astype(np.float32)
    y = (X[:, :, 0] * X[:, :, 1]).mean(1) > 0
    options = {"beta_ratio": 0.1, "tol": 1e-4}
    free = ConvexHeadClassifier("self_attention", **options).fit(X, y)
    limited = ConvexHeadClassifier("self_attention", memory_limit=memory.ROOMY, **options).fit(X, y)
    assert limited.n_iter_ == free.n_iter_
    assert limited.certificate_.primal == pytest.approx(free.certificate_.primal, rel=1e-6)


def test_transformed_tokens_in_a_file_are_those_in_memory(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    view = PCATokens(3, whiten=True).fit(store)
    expected = torch.from_numpy(view.transform(store))
    assert isinstance(shown(view, store), torch.Tensor)
    monkeypatch.setattr(memory, "_CURRENT", memory.ContextVar("test", default=memory.Budget(None, 1000, 2**13, 2**12)))
    for room, kind in ((10**15, "TransformedTokens"), (0, "FileRows")):
        monkeypatch.setattr(memory, "ROOM_LEFT", room)
        tokens = shown(view, store)
        assert isinstance(tokens, TokenRows)
        assert type(tokens.source).__name__ == kind
        assert torch.allclose(tokens[3:90], expected[3:90], atol=1e-6)
        part = own_rows(tokens, slice(50, 120))
        assert part.shape == (70, 3, 5)[:1] + expected.shape[1:]
        assert torch.allclose(part[np.array([0, 69, 4])], expected[[50, 119, 54]], atol=1e-6)
        assert torch.allclose(without_last(tokens)[0:7], expected[:7, :, :-1], atol=1e-6)


@pytest.mark.parametrize("room", [0, 10**15])
@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_results_do_not_depend_on_where_statistics_are(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, activation: str, room: int
) -> None:
    options = {"activation": activation, "gates": 3, "beta_ratio": 0.1, "tol": 1e-7}
    inside = ConvexHeadClassifier("mixer", **options).fit(np.asarray(store), store.labels)
    monkeypatch.setattr(memory, "ROOM_LEFT", room)
    monkeypatch.setattr(memory, "CACHE_BYTES", 100)
    assert memory.Budget.of(32 * MB).cache == 100
    outside = ConvexHeadClassifier("mixer", memory_limit="32MB", **options).fit(store, store.labels)
    assert outside.certificate_.primal == pytest.approx(inside.certificate_.primal, rel=1e-6)
    assert np.allclose(outside.decision_function(store), inside.decision_function(np.asarray(store)), atol=1e-3)


def test_statistics_are_kept_in_files_only_where_there_is_room(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    original = problem.Problem._cached_stats

    def watched(self: problem.Problem, dtype: torch.dtype) -> object:
        found = original(self, dtype)
        kept.append("computed again" if found is None else type(found[0][0]).__name__)
        return found

    monkeypatch.setattr(problem.Problem, "_cached_stats", watched)
    monkeypatch.setattr(memory, "CACHE_BYTES", 100)
    for room, expected in ((0, "FileRows"), (10**15, "computed again")):
        monkeypatch.setattr(memory, "ROOM_LEFT", room)
        ConvexHeadClassifier("mixer", memory_limit="32MB", beta_ratio=0.3).fit(store, store.labels)
        assert set(kept) == {expected}
        kept.clear()


def test_small_statistics_stay_in_memory_where_large_ones_do_not() -> None:
    """Mini-batches of scattered samples read a file a row at a time: one file less is half of the time."""
    found = float32_problem(Case("self_attention", n=200, s=6, d=8))
    found.budget, found.cache_bytes = memory.Budget.of(memory.ROOMY), 200 * 8 * 4
    (kinds,) = [[type(t).__name__ for t in stats] for stats in found._cached_stats(torch.float32) or []]
    assert kinds == ["Tensor", "FileRows"]
    found.cache_bytes -= 1
    found.forget()
    (kinds,) = [[type(t).__name__ for t in stats] for stats in found._cached_stats(torch.float32) or []]
    assert kinds == ["FileRows", "FileRows"]


@pytest.mark.parametrize(
    ("limit", "fixed", "kernels"),
    [
        (32 * MB, 0, 0),
        (64 * MB, 0, 6),
        (64 * MB, 20 * MB, 0),
        (128 * MB, 0, 41),
        (128 * MB, 34 * MB, 22),
        (999 * MB, 0, 188),
    ],
)
def test_a_third_of_a_limit_at_most_is_for_products_of_few_shapes(limit: int, fixed: int, kernels: int) -> None:
    budget = memory.Budget.of(limit)
    assert budget.kernels(fixed) == kernels
    assert (kernels * memory.KERNEL + memory.TRIAL) * (kernels > 0) <= (limit - fixed) / 3
    assert memory.Budget.of(None).kernels(0) is memory.Budget.of(memory.ROOMY).kernels(0) is None


def test_of_statistics_of_the_same_size_no_more_stay_in_memory_than_fit() -> None:
    found = float32_problem(Case("mixer", n=200, s=6, d=8), Case("mixer", n=200, s=6, d=8, weight=2.0))
    whole = found._cached_stats(torch.float32) or []
    sizes = [t.numel() * t.element_size() for stats in whole for t in stats if isinstance(t, torch.Tensor)]
    assert len(set(sizes)) == 1 < len(sizes)
    found.budget, found.cache_bytes = memory.Budget.of(memory.ROOMY), sizes[0] * 3 // 2
    found.forget()
    kinds = [type(t).__name__ for stats in found._cached_stats(torch.float32) or [] for t in stats]
    assert sorted(kinds) == ["FileRows"] * (len(sizes) - 1) + ["Tensor"]


@pytest.mark.skipif(memory.library_memory() is None, reason="the system does not tell what its pages are of")
def test_pages_of_libraries(tmp_path: Path) -> None:
    before, resident = memory.library_memory(), memory.resident_memory()
    assert before is not None
    assert resident is not None
    assert MB < before < resident

    def grown(name: str) -> int:
        (tmp_path / name).write_bytes(bytes(8 * MB))
        pages = np.memmap(tmp_path / name, np.uint8, "r")
        assert not pages.any()
        found = memory.library_memory()
        assert found is not None
        return found - before

    # Whatever else is read on the way is little.
    assert abs(grown("tokens.bin")) < 2 * MB
    assert abs(grown("tokens.so.bin")) < 2 * MB
    assert 6 * MB < grown("libkernels.so.7") < 10 * MB
    # A name that is no text stands in the way of nothing.
    odd = tmp_path / os.fsdecode(b"odd\xff.so")
    odd.write_bytes(bytes(8 * MB))
    pages = np.memmap(odd, np.uint8, "r")
    assert not pages.any()
    assert memory.library_memory() >= before + 6 * MB


def printed_by(*command: str, **environment: str) -> str:
    """What Python prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FIT = """
import json, sys, time
import numpy as np
from convexheads import ConvexHeadClassifier, memory
from convexheads.tokens.store import TokenStore

limit, folder = (None if sys.argv[1] == "none" else sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
options = dict(beta_ratio=0.1)
# What is imported and compiled on the way is no part of a fit.
ConvexHeadClassifier("mixer", **options).fit(rng.normal(size=(60, 4, 3)), np.arange(60) % 3)
store = TokenStore.open(folder)
tokens = store if limit else np.asarray(store)
before, begin = memory.resident_memory(), time.process_time()
model = ConvexHeadClassifier("mixer", memory_limit=limit, **options).fit(tokens, store.labels)
print(json.dumps({
    "added": memory.peak_memory() - before,
    "seconds": time.process_time() - begin,
    "objective": model.certificate_.primal,
    "dual": model.certificate_.dual,
}))
"""


@pytest.mark.skipif(memory.resident_memory() is None, reason="the system does not tell the memory of a process")
def test_a_store_of_three_times_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6000, 64, 128)).astype(np.float16)
    y = X[:, :, :4].mean(1).argmax(1)
    TokenStore.write(tmp_path / "store", X, y, shard_rows=2000)
    size = sum(file.stat().st_size for file in (tmp_path / "store").iterdir())
    assert size >= 3 * 32 * MB
    del X
    script = tmp_path / "fit.py"
    script.write_text(FIT)

    def run(limit: str) -> dict[str, float]:
        # One thread: two that wait for each other on a busy machine count as working.
        return json.loads(printed_by(str(script), limit, str(tmp_path / "store"), OMP_NUM_THREADS="1"))

    limited, free = run("32MB"), run("none")
    assert limited["added"] <= 32 * MB
    assert limited["objective"] == pytest.approx(free["objective"], rel=1e-3)
    assert max(limited["dual"], free["dual"]) <= min(limited["objective"], free["objective"])
    # Processor time: other processes do not count. What it costs is smaller chunks, and no products in low precision.
    assert limited["seconds"] <= 2.0 * free["seconds"]

    # A command is the first fit of its process: that reads code of libraries, which is told apart.
    options = ["--head", "mixer", "--beta-ratio", "0.1", "--threads", "1", "--memory-limit", "32MB", "--quiet"]
    files = ["--out", str(tmp_path / "mixer.safetensors"), "--json", str(tmp_path / "result.json")]
    printed = printed_by("-m", "convexheads", "fit", str(tmp_path / "store"), *options, *files)
    used = json.loads((tmp_path / "result.json").read_text())["memory"]
    added = used["peak"] - used["before"]
    assert f"{memory.readable(added)} of it for the fit" in printed
    if used["libraries"] is not None:
        assert f"with {memory.readable(used['libraries'])} of libraries' code (limit" in printed
        assert 0 < used["libraries"] < added
        # How many pages of them are read differs from run to run.
        assert added - used["libraries"] <= 1.05 * 32 * MB


FIRST_FIT = """
import sys
import numpy as np
from convexheads import ConvexHeadClassifier, memory
from convexheads.errors import InputError

rng = np.random.default_rng(0)
X, y = rng.normal(size=(2000, 4, 28)).astype(np.float32), np.arange(2000) % 80
before = memory.resident_memory()
head = ConvexHeadClassifier("self_attention", memory_limit=sys.argv[1], beta_ratio=0.5, tol=0.02)
try:
    head.fit(X, y)
    print("added", memory.peak_memory() - before)
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(memory.resident_memory() is None, reason="the system does not tell the memory of a process")
def test_the_least_limit_is_kept_by_the_first_fit_of_a_process() -> None:
    """Where blocks are large it loads more code of libraries than the outputs and blocks of a small limit leave."""

    def run(limit: str) -> str:
        return printed_by("-W", "ignore", "-c", FIRST_FIT, limit)

    # Outputs of 2,000 x 80, and Gamma of 784 x 2,240 with its Gram matrix and factor.
    fixed = 64 * 2000 * 80 + 8 * (3 * 784 * 2240 + 2 * 784**2)
    least = memory.least_limit(fixed)
    assert "memory_limit: got" in run(str(least - 1))
    words = run(str(least)).split()
    assert words[0] == "added"
    # How many pages of libraries are read differs from run to run.
    assert int(words[1]) <= 1.05 * least


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 8), (torch.float64, 25)])
def test_gamma_takes_as_many_samples_at_a_time_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int
) -> None:
    """Heads without gates form no masks: room for these would leave 40 samples, and 50 passes."""
    taken: list[int] = []
    passing = memory.Budget.passing

    def counted(self: memory.Budget, parts: Iterable[slice]) -> Iterator[slice]:
        for part in passing(self, parts):
            taken.append(part.stop - part.start)
            yield part

    with memory.limited("32MB"):
        own = float32_problem(Case("self_attention", n=2000, s=64, d=32, c=4, loss="cross_entropy"))
        L = own.null_gradient()
        whole = own.gamma(L.to(dtype), 0, None, dtype)
        monkeypatch.setattr(memory.Budget, "passing", counted)
        again = own.gamma(L.to(dtype), 0, None, dtype)
    assert sum(taken) == own.n
    assert len(taken) <= most
    assert torch.equal(whole, again)
    free = float32_problem(Case("self_attention", n=2000, s=64, d=32, c=4, loss="cross_entropy"))
    torch.testing.assert_close(again, free.gamma(L.to(dtype), 0, None, dtype), rtol=1e-3, atol=1e-6)


def test_shares_of_an_accelerator() -> None:
    """Half of what is free for statistics, and chunks that are larger than a processor's, if there is room."""
    cpu = memory.Budget()
    assert cpu.on(torch.device("cpu")) is cpu
    large, small = cpu.sharing(80 * 2**30), cpu.sharing(2**26)
    assert (large.cache, large.workspace) == (40 * 2**30, memory.DEVICE_WORKSPACE)
    assert (small.cache, small.workspace) == (2**25, cpu.workspace)
    limited = memory.Budget.of(2**30)
    assert limited.on(torch.device("cuda")) is limited


def test_predictions_keep_no_holes_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over many chunks gives pages back as fits do, and finds what one without a limit finds."""
    X = np.random.default_rng(0).standard_normal((600, 2, 3)).astype(np.float32)
    head = ConvexHeadClassifier("mixer", beta_ratio=0.3, memory_limit="32MB").fit(X, X[:, 0, 0] > 0)
    trims: list[int] = []
    monkeypatch.setattr(memory, "trim", lambda: trims.append(1))
    monkeypatch.setattr(memory, "CROWDED", -1.0)
    monkeypatch.setattr("convexheads.estimators.split_rows", lambda total, step: split_rows(total, 2))
    limited = head.logits(X)
    assert len(trims) == 300 // memory.TRIM_CHUNKS > 0
    np.testing.assert_allclose(limited, head.set_params(memory_limit=None).logits(X), rtol=1e-6, atol=1e-7)
    assert len(trims) == 300 // memory.TRIM_CHUNKS > 0


@pytest.mark.parametrize(("held", "expected"), [(59, 0), (61, 1), (None, 1)])
def test_pages_are_given_back_near_the_limit_only(
    held: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or where the system does not tell what is resident; never without a limit."""
    trims: list[int] = []
    monkeypatch.setattr(memory, "trim", lambda: trims.append(1))
    with memory.limited(100 * MB) as budget:
        before = budget.before
        assert before is None or before > 0
        now = None if held is None else (before or 0) + held * MB
        monkeypatch.setattr(memory, "resident_memory", lambda: now)
        memory.current().trim()
    assert len(trims) == (1 if before is None else expected)
    memory.Budget().trim()
    assert len(trims) == (1 if before is None else expected)


@pytest.mark.parametrize("index", [slice(2, 9), torch.tensor([7, 8, 1, 30, 31, 32]), slice(0, 40, 3), slice(4, 4)])
def test_reads_of_a_pass_share_their_memory(index: slice | torch.Tensor, tmp_path: Path) -> None:
    rows = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    kept = memory.FileRows((40, 3, 5), torch.float32, tmp_path)
    kept.write(0, rows)
    buffer = memory.Buffer()
    first = kept.read(slice(0, 20), buffer)
    assert torch.equal(first, rows[:20])
    found = kept.read(index, buffer)
    assert torch.equal(found, rows[index])
    assert not found.numel() or found.data_ptr() == first.data_ptr()
    # Without one every read has its own.
    again = kept[index]
    kept.read(slice(20, 40), buffer)
    assert torch.equal(again, rows[index])


def test_pages_are_kept_within_a_fit_of_many_samples_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small limit no more of them than it has room for; nothing where the library has no such setting."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_library", lambda name: lambda *args: calls.append(args))
    X = np.random.default_rng(0).standard_normal((1200, 2, 3)).astype(np.float32)
    y = X[:, 0, 0] > 0
    kept = [(memory.M_MMAP_THRESHOLD, memory.MOST_MAPPED), (memory.M_TRIM_THRESHOLD, memory.MOST_KEPT)]
    left = [(memory.M_MMAP_THRESHOLD, memory.MOST_MAPPED), (memory.M_TRIM_THRESHOLD, 2 * memory.MOST_MAPPED)]
    ConvexHeadClassifier("mixer", beta_ratio=0.3).fit(X, y)
    assert calls == kept + left
    calls.clear()
    ConvexHeadClassifier("mixer", beta_ratio=0.3).fit(X[:900], y[:900])
    assert not calls
    ConvexHeadClassifier("mixer", beta_ratio=0.3, memory_limit=memory.KEEPING).fit(X, y)
    assert calls == kept + left
    calls.clear()
    ConvexHeadClassifier("mixer", beta_ratio=0.3, memory_limit="32MB").fit(X[:900], y[:900])
    assert calls == [(memory.M_MMAP_THRESHOLD, 2 * MB), (memory.M_TRIM_THRESHOLD, 4 * MB), *left]
    calls.clear()
    with pytest.raises(KeyboardInterrupt), memory.suited_heap():
        raise KeyboardInterrupt
    assert calls == kept + left
    monkeypatch.setattr(memory, "_library", lambda name: None)
    with memory.suited_heap():
        assert calls == kept + left


@pytest.mark.skipif(memory._library("mallopt") is None, reason="another C library")
def test_the_c_library_takes_these_settings() -> None:
    setting = memory._library("mallopt")
    assert setting(memory.M_MMAP_THRESHOLD, memory.SMALLEST // memory.SINGLE) == 1
    assert setting(memory.M_MMAP_THRESHOLD, memory.MOST_MAPPED) == 1
    assert setting(memory.M_TRIM_THRESHOLD, 2 * memory.MOST_MAPPED) == 1
