"""Products through oneDNN: as exact as those of float32, only where they are worth it, and nothing is left changed."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import convexheads.problem
from contract_cases import SMALL, Case, float32_problem, random_units
from convexheads import memory, products
from convexheads.evaluation import Evaluation, Sums
from convexheads.problem import Problem, take_rows
from convexheads.products import (
    WORTH,
    add_moment,
    aligned_product,
    column_squares,
    fast_products,
    from_lower,
    narrow_product,
    onednn_gains,
    rough_products,
)
from convexheads.solvers import warmup
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.types import Factors, Units

can_be_set = pytest.mark.skipif(products._setting() is None, reason="this torch cannot be told oneDNN's precision")


@pytest.mark.parametrize("shape", [(700, 33, 660), (64, 660, 100), (100, 5000, 33), (1, 300, 300)])
def test_products_have_the_precision_of_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    batch = torch.randn(50, 20, 33, generator=generator), torch.randn(50, 33, 33, generator=generator)
    with fast_products():
        found = [a @ b, (b.mT @ a.mT).mT, batch[0] @ batch[1]]
    for got, exact in zip(found, [a.double() @ b.double()] * 2 + [batch[0].double() @ batch[1].double()], strict=True):
        assert float((got - exact).norm()) <= products.EXACT * float(exact.norm())


@can_be_set
def test_the_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    before = products._setting().fp32_precision

    def fails() -> None:
        with fast_products():
            assert products._setting().fp32_precision == "bf16"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert products._setting().fp32_precision == before


@can_be_set
def test_small_products_and_inexact_machines_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = products._setting().fp32_precision
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    with fast_products(WORTH - 1):
        assert products._setting().fp32_precision == before
    monkeypatch.setattr(products, "onednn_gains", lambda: False)
    with fast_products():
        assert products._setting().fp32_precision == before


@can_be_set
def test_a_precision_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    setting = products._setting()
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        with fast_products():
            assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before


@can_be_set
def test_a_machine_that_rounds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products come out with the precision of bfloat16, as tiles give them, they are not used."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "_intel", lambda: False)
    honest = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != torch.float32:
            return honest(a, b)
        return honest(a.bfloat16().float(), b.bfloat16().float())

    onednn_gains.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not onednn_gains()
    onednn_gains.cache_clear()


@can_be_set
def test_intel_processors_keep_to_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has their widest vectors, too."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for intel in (True, False):
        monkeypatch.setattr(products, "_intel", lambda intel=intel: intel)
        tried: list[bool] = []
        monkeypatch.setattr(products, "_through_onednn", lambda tried=tried: tried.append(True) or nullcontext())
        onednn_gains.cache_clear()
        assert onednn_gains() != intel
        assert bool(tried) != intel
    onednn_gains.cache_clear()


SOME = [
    case for case in SMALL if case.head in ("self_attention", "mixer") and case.pooled and case.activation == "linear"
]
assert len({case.head for case in SOME}) == 2


def test_low_precision_is_only_for_devices_with_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(products, "_intel", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert products.low_precision(cpu) is None
    expected = torch.bfloat16 if torch.backends.mkldnn.is_available() else None
    # Intel's 512-bit vectors multiply bfloat16 at half the speed of float32.
    for unit, intel, found in (
        ("amx_bf16", False, expected),
        ("amx_bf16", True, expected),
        ("avx512_bf16", False, expected),
        ("avx512_bf16", True, None),
    ):
        monkeypatch.setattr(products, "_intel", lambda intel=intel: intel)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {unit: True}, raising=False)
        assert products.low_precision(cpu) is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert products.low_precision(cpu) is None
    assert products.low_precision(torch.device("mps")) is None


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_a_gradient_in_low_precision_is_near_the_exact_one(case: Case, loss: str) -> None:
    problem = float32_problem(replace(case, n=200, loss=loss))
    low = problem.in_low_precision(torch.bfloat16)
    assert low.low is torch.bfloat16
    factors = random_units(problem).to(torch.float32)
    value, gradient = problem.flat_value_and_gradient(factors, factors.flat())
    rough_value, rough = low.flat_value_and_gradient(factors, factors.flat())
    assert rough.dtype == torch.float32
    assert 0 < float((rough - gradient).norm()) < 0.02 * float(gradient.norm())
    assert rough_value == pytest.approx(value, rel=5e-3)
    # What is no gradient is untouched, and full precision comes back.
    assert torch.equal(low.forward(factors), problem.forward(factors))
    problem.forget(torch.bfloat16)
    assert set(problem._cache) == {torch.float32}
    torch.testing.assert_close(problem.flat_value_and_gradient(factors, factors.flat())[1], gradient)


def test_chunks_are_larger_and_minibatches_whole_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = float32_problem(replace(SOME[0], n=200))
    low = problem.in_low_precision(torch.bfloat16)
    assert low.low is torch.bfloat16
    assert low.pass_rows(torch.bfloat16, 3) == int(2.5 * problem.pass_rows(torch.float32, 3))
    factors = random_units(problem).to(torch.float32)
    parts: list[int] = []
    monkeypatch.setattr(Evaluation, "add", lambda self, stats, targets, weights: parts.append(len(targets)) or 0.0)
    monkeypatch.setattr(convexheads.problem, "LEAST_LOW_ROWS", 1)
    monkeypatch.setattr(convexheads.problem, "FEWEST_ROWS", 1)
    low.chunk_rows = lambda *args, **kwargs: 2  # type: ignore[method-assign]
    list(warmup.minibatches(low, factors, factors.flat(), 4, torch.Generator().manual_seed(0)))
    whole, left = divmod(problem.n, 4)
    assert parts == [4] * whole + [left] * (left > 0)


def test_temporaries_of_a_chunk_are_blocks_whose_pages_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = float32_problem(replace(SOME[0], n=200))
    assert problem.wide_products
    width = max(component.form.workspace for component in problem.components)
    few, many = 1, memory.MOST_MAPPED // (width * 400)
    for dtype, least in (
        (torch.float32, convexheads.problem.LEAST_ROWS),
        (torch.bfloat16, convexheads.problem.LEAST_LOW_ROWS),
    ):
        assert problem.pass_rows(dtype, few) >= least
        rows = problem.pass_rows(dtype, many)
        assert convexheads.problem.FEWEST_ROWS <= rows < least
        if rows > convexheads.problem.FEWEST_ROWS:
            assert rows * width * many * dtype.itemsize < memory.MOST_MAPPED


def test_sums_keep_the_layout_of_their_parts_and_write_to_none_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    into, other = torch.zeros(3, 2, 4), torch.ones(5)
    parts = [torch.randn(4, 2, 3, generator=generator).permute(2, 1, 0) for _ in range(4)]
    before = [part.clone() for part in parts]
    sums = Sums()
    for part in parts:
        sums.add(into, part)
    sums.add(into[:2], parts[0][:2].to(torch.bfloat16))
    sums.add(into[:2], parts[1][:2].to(torch.bfloat16))
    sums.add(other, torch.ones(5))
    assert not bool(into.any())
    held = sums._held[into.data_ptr(), into.shape][1]
    assert held.stride() == parts[0].stride()
    assert held.dtype == into.dtype
    sums.close()
    expected = sum(before)
    expected[:2] += parts[0][:2].bfloat16().float() + parts[1][:2].bfloat16().float()
    torch.testing.assert_close(into, expected)
    assert other.tolist() == [2.0] * 5
    assert all(torch.equal(part, was) for part, was in zip(parts, before, strict=True))
    sums.close()
    torch.testing.assert_close(into, expected)


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([4, 0, 4]), torch.tensor([], dtype=torch.long)])
def test_rows_are_those_of_indexing(index: slice | torch.Tensor) -> None:
    rows = torch.arange(30.0).view(5, 3, 2)
    assert torch.equal(take_rows(rows, index), rows[index])
    assert take_rows(rows.numpy(), slice(1, 3)).shape == (2, 3, 2)


def test_low_precision_is_left_out_where_it_cannot_be() -> None:
    """Fourier transforms, the small products of gated forms, a memory limit, or no room for the statistics twice."""
    for case in (Case("fno", n=50), Case("self_attention", "gated_relu", n=50), Case("mixer", "gated_relu", n=50)):
        other = float32_problem(case)
        assert other.in_low_precision(torch.bfloat16) is other
    problem = float32_problem(Case("self_attention", n=50))
    assert problem.in_low_precision(None) is problem
    with memory.limited("64MB"):
        limited = float32_problem(Case("self_attention", n=50))
    assert limited.in_low_precision(torch.bfloat16) is limited
    held = 50 * (4 + 4 * 4)
    for numbers, there in ((6 * held, True), (6 * held - 1, False)):
        problem = float32_problem(Case("self_attention", n=50))
        problem.cache_bytes = numbers
        assert (problem.in_low_precision(torch.bfloat16).low is not None) == there


@can_be_set
def test_rough_products_only_with_units_for_them_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, setting = torch.device("cpu"), products._setting()
    before = setting.fp32_precision
    for there, expected in ((None, before), (torch.bfloat16, "bf16")):
        monkeypatch.setattr(products, "low_precision", lambda device, there=there: there)
        with rough_products(cpu):
            assert setting.fp32_precision == expected
        assert setting.fp32_precision == before
    setting.fp32_precision = "ieee"
    try:
        with rough_products(cpu):
            assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision = before
    with rough_products(torch.device("cuda")):
        assert setting.fp32_precision == before


@can_be_set
def test_statistics_are_never_rough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preconditioner may be the first to ask for them, and objectives come from what is kept."""
    monkeypatch.setattr(products, "low_precision", lambda device: torch.bfloat16)
    problem = float32_problem(replace(SOME[0], n=50))
    seen: list[str] = []
    fresh, combine = Problem._fresh_stats, Problem.combine

    def watched(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append(f"{name} {products._setting().fp32_precision}")
            return original(*args)

        return call

    monkeypatch.setattr(Problem, "_fresh_stats", watched("statistics", fresh))
    monkeypatch.setattr(Problem, "combine", watched("moments", combine))
    before = products._setting().fp32_precision
    Preconditioner(problem, random_units(problem).to(torch.float32), torch.Generator().manual_seed(0))
    assert set(seen) == {f"statistics {before}", "moments bf16"}


@pytest.mark.parametrize("columns", [1, products.PANEL, 2 * products.PANEL + 3])
def test_a_second_moment_is_that_of_its_lower_triangle(columns: int) -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for rows in (0, 5, 30)]
    moment = torch.zeros(columns, columns, dtype=torch.float64)
    for part in parts:
        add_moment(moment, part)
    whole = torch.cat(parts)
    exact = whole.mT @ whole
    # What eigendecompositions read.
    torch.testing.assert_close(torch.linalg.eigvalsh(moment), torch.linalg.eigvalsh(exact), rtol=1e-9, atol=1e-9)
    beyond = moment[: products.PANEL, products.PANEL :]
    assert not beyond.any()
    # What is above the diagonal is not read, and written over.
    moment[: products.PANEL, products.PANEL :] = torch.nan
    found = from_lower(moment)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    assert found.data_ptr() == moment.data_ptr()


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (2 * products.PANEL + 3, 7), (4, 9, 6)])
def test_squared_norms_of_columns(shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = torch.linalg.vector_norm(rows, dim=-2).square()
    torch.testing.assert_close(column_squares(rows), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 16, 17, 825])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_aligned_products_start_at_multiples(
    columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((9, 5), (columns, 5)))
    plain = aligned_product(a, b.mT)
    assert plain.is_contiguous()
    monkeypatch.setattr(products, "WORTH_ALIGNING", 0)
    found = aligned_product(a, b.mT)
    assert found.shape == (9, columns)
    assert found.stride(1) == 1
    assert found.stride(0) * found.element_size() % products.ALIGNED == 0
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("worth", ["WORTH_ALIGNING", "WORTH_SWAPPING"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_are_the_same_with_products_laid_out_otherwise(
    case: Case, worth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = float32_problem(replace(case, n=30))
    factors = random_units(problem, 3).to(torch.float32)
    value, gradient = problem.value_and_gradient(factors)
    monkeypatch.setattr(products, worth, 0)
    otherwise, found = problem.value_and_gradient(factors)
    assert otherwise == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(found.flat(), gradient.flat(), rtol=1e-4, atol=1e-5 * float(gradient.flat().abs().max()))


@pytest.mark.parametrize("columns", [0, 1, 4, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("inner", [5, 8])
def test_products_of_few_columns(
    columns: int, dtype: torch.dtype, intel: bool, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((9, inner), (columns, inner)))
    plain = narrow_product(a, b.mT)
    assert torch.equal(plain, a @ b.mT)
    monkeypatch.setattr(products, "WORTH_SWAPPING", 0)
    monkeypatch.setattr(products, "INNER", 2)
    monkeypatch.setattr(products, "_intel", lambda: intel)
    found = narrow_product(a, b.mT)
    # As a product leaves it: a loss takes sums along rows.
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain)


@can_be_set
def test_products_of_few_columns_are_left_to_onednn_where_it_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORTH_SWAPPING", 0)
    monkeypatch.setattr(products, "_intel", lambda: False)
    shapes: list[torch.Size] = []
    taken = torch.Tensor.__matmul__

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append(a.shape)
        return taken(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    a, b = torch.ones(9, 5), torch.ones(5, 2)
    narrow_product(a, b)
    with products._through_onednn():
        narrow_product(a, b)
        narrow_product(a.double(), b.double())
    assert [tuple(shape) for shape in shapes] == [(2, 5), (9, 5), (2, 5)]


@pytest.mark.parametrize(("rows", "inner", "split"), [(4, 4, True), (4, 3, False), (5, 4, False)])
def test_long_rows_go_by_parts_on_intel_where_they_are_few(
    rows: int, inner: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORTH_SWAPPING": 0, "INNER": 2, "FEW_ROWS": 4, "_intel": lambda: True}.items():
        monkeypatch.setattr(products, name, value)
    taken: list[torch.Size] = []

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        taken.append(a.shape)
        return a @ b

    monkeypatch.setattr(products, "_by_inner", watched)
    narrow_product(torch.ones(rows, inner), torch.ones(inner, 2))
    assert bool(taken) == split


def test_a_processor_without_a_name_is_not_taken_for_one_of_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    products._intel.cache_clear()
    try:
        assert not products._intel()
    finally:
        products._intel.cache_clear()


@can_be_set
def test_of_few_shapes_those_that_come_first_go_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_KEPT", {})
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    inside = []
    for key, shapes in (("a", 3), ("b", 0), ("c", 2), ("d", 1), ("a", 0), ("c", 2)):
        with products.repeated_products(key, shapes, 5):
            inside.append(products._in_force(torch.float32))
    assert inside == [True, False, True, False, True, True]
    monkeypatch.setattr(products, "onednn_gains", lambda: False)
    with products.repeated_products("a", 3, 5):
        assert not products._in_force(torch.float32)


@can_be_set
@pytest.mark.parametrize(("limit", "expected"), [("40MB", set()), ("200MB", {32}), (None, set())])
def test_whole_chunks_of_limited_fits_go_through_onednn(
    limit: str | None, expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations repeat products of the same shapes, but for the chunk that is left over."""
    monkeypatch.setattr(products, "_KEPT", {})
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    monkeypatch.setattr(convexheads.evaluation, "BLOCK_GAIN", 0.0)
    monkeypatch.setattr(Problem, "pass_rows", lambda *args: 32)
    taken: list[tuple[int, bool]] = []
    own = Evaluation.add

    def watched(self: Evaluation, stats: Any, targets: torch.Tensor, *rest: Any) -> float:
        taken.append((len(targets), products._in_force(torch.float32)))
        return own(self, stats, targets, *rest)

    monkeypatch.setattr(Evaluation, "add", watched)
    with memory.limited(limit):
        problem = float32_problem(Case("self_attention", n=70, s=6, d=8))
        factors = random_units(problem, 3).to(torch.float32)
        # No room for a pass of any other number of units is asked for.
        problem.forward(random_units(problem, 5))
        assert not products._KEPT
        found = problem.value_and_gradient(factors)[1]
    assert [count for count, _ in taken] == [32, 32, 6]
    assert {count for count, fast in taken if fast} == expected
    exact = problem.in_dtype(torch.float64).value_and_gradient(factors.to(torch.float64))[1]
    torch.testing.assert_close(found.flat().double(), exact.flat(), rtol=1e-4, atol=1e-5)


@can_be_set
def test_whole_blocks_of_limited_fits_go_through_onednn_whatever_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_KEPT", {})
    monkeypatch.setattr(products, "onednn_gains", lambda: True)
    monkeypatch.setattr(Problem, "pass_rows", lambda *args: 32)
    with memory.limited("200MB"):
        problem = float32_problem(Case("self_attention", n=70, s=6, d=8))
        for units in (30, 50):
            problem.forward(random_units(problem, units))
            problem.value_and_gradient(random_units(problem, units).to(torch.float32))
    # Of whole chunks, and of the one that is left over.
    assert sorted(count for count, _ in products._KEPT) == [6, 32]
    assert set(products._KEPT.values()) == {convexheads.evaluation.BLOCK_SHAPES}


@pytest.mark.parametrize("workspace", [1, 2**21])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gamma_in_parts_is_gamma(case: Case, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over samples go on in the layout in which products leave them, for some rows or all of them."""
    problem = float32_problem(replace(case, n=40))
    L = torch.randn(problem.targets.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    whole = [gamma for k in range(len(problem.components)) for _, gamma in problem.gammas(L, k)]
    monkeypatch.setattr(convexheads.problem, "GAMMA_WORKSPACE", workspace)
    monkeypatch.setattr(convexheads.problem, "GAMMA_SAMPLES", 1)
    problem.budget = replace(problem.budget, workspace=1)
    parts = [gamma for k in range(len(problem.components)) for _, gamma in problem.gammas(L, k)]
    assert len(parts) == len(whole) > 0
    for part, gamma in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, gamma, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 7, 40, 41])
def test_samples_in_files_are_read_a_few_at_a_time(n: int) -> None:
    problem = float32_problem(Case("self_attention", n=n, s=6, d=8))
    whole = warmup.shuffled(problem, torch.float32, torch.Generator().manual_seed(0))
    problem.forget()
    problem.budget, problem.cache_bytes = memory.Budget.of(memory.ROOMY), 0
    found = warmup.shuffled(problem, torch.float32, torch.Generator().manual_seed(0))
    assert problem.in_files(torch.float32)
    assert sorted(whole.tolist()) == sorted(found.tolist()) == list(range(n))
    full = [run for run in found.tolist() if run % warmup.RUN == 0 and run + warmup.RUN <= n]
    places = {sample: place for place, sample in enumerate(found.tolist())}
    assert all(places[first + i] == places[first] + i for first in full for i in range(warmup.RUN))
    if n == 40:
        assert any(b != a + 1 for a, b in zip(whole.tolist()[::4], whole.tolist()[1::4], strict=True))
        assert found.tolist() != list(range(n))


@pytest.mark.parametrize(("limit", "parts", "expected"), [("64MB", 10**9, 5), ("64MB", 1, 0), (None, 10**9, 0)])
def test_minibatches_give_back_what_they_have_read(
    limit: str | None, parts: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit of 24,000 samples of 64 x 128 under 128 MB took 117 to 164 MB, and most of it were holes."""
    given: list[int] = []
    monkeypatch.setattr(memory, "trim", lambda: given.append(1))
    monkeypatch.setattr(memory, "CROWDED", -1.0)
    monkeypatch.setattr(warmup, "TRIMMED", parts)
    with memory.limited(limit):
        problem = float32_problem(Case("mixer", n=40, s=6, d=8))
    factors = random_units(problem, 3).to(torch.float32)
    problem.stats_of(slice(0, 1), torch.float32)
    given.clear()
    steps = warmup.minibatches(problem, factors, factors.flat(), 8, torch.Generator().manual_seed(0))
    assert len(list(steps)) == 5
    assert len(given) == expected


@pytest.mark.parametrize(("n", "size"), [(40, 8), (41, 8), (7, 8), (10_000, 768)])
def test_minibatches_are_even(n: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = float32_problem(Case("linear", n=n))
    factors = random_units(problem).to(torch.float32)
    taken: list[int] = []
    own = Problem.own_samples

    def watched(self: Problem, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(len(index))
        return own(self, index)

    monkeypatch.setattr(Problem, "own_samples", watched)
    list(warmup.minibatches(problem, factors, factors.flat(), size, torch.Generator().manual_seed(0)))
    assert sum(taken) == n
    assert len(taken) == warmup.batches(n, size)
    assert max(taken) <= min(size, min(taken) + 1)


def test_momentum_is_quasi_hyperbolic(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = float32_problem(replace(SOME[0], n=40))
    start = random_units(problem).to(torch.float32)
    x = start.flat()
    given = [torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    monkeypatch.setattr(warmup, "BATCH", 10)
    monkeypatch.setattr(warmup, "minibatches", lambda *args: iter(given))
    found = warmup.adam_epochs(problem, start, 0.5, 1, torch.Generator()).flat()
    # By sums over all gradients so far, whose weights add up to one.
    moved = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(1, 5):
        gradients = torch.stack(given[:t]).double()
        ages = torch.arange(t - 1, -1, -1, dtype=torch.float64)
        mean, square = (
            (decay**ages / (decay**ages).sum()) @ values
            for decay, values in ((warmup.MOMENTUM, gradients), (warmup.SQUARES, gradients.square()))
        )
        towards = (1.0 - warmup.LAST) * mean + warmup.LAST * gradients[-1]
        moved += (1.0 - (t - 1) / 4) * towards / square.sqrt()
    # Every variable has a step size of its own, of which the first step tells.
    monkeypatch.setattr(warmup, "minibatches", lambda *args: iter(given[:1]))
    rates = (x - warmup.adam_epochs(problem, start, 0.5, 1, torch.Generator()).flat()).abs()
    assert float(rates.min()) > 0.0
    torch.testing.assert_close((x - found).double(), rates * moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("large", "epochs", "size"), [(True, 20, 8), (True, 19, 4), (False, 20, 4)])
def test_minibatches_are_larger_where_there_are_many_of_large_products(
    monkeypatch: pytest.MonkeyPatch, low: bool, large: bool, epochs: int, size: int
) -> None:
    problem = float32_problem(replace(SOME[0], n=40))
    monkeypatch.setattr(warmup, "BATCH", 4)
    monkeypatch.setattr(warmup, "LARGE_BATCH", 8)
    monkeypatch.setattr(warmup, "LARGE_STEPS", 20 * problem.n / 8)
    monkeypatch.setattr(warmup, "lowered", lambda own, factors: own.in_low_precision(torch.bfloat16 if low else None))
    monkeypatch.setattr(warmup, "LARGE_WORK", 0.0 if large else math.inf)
    sizes: set[int] = set()
    take = Problem.stats_of

    def watched(self: Problem, index: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(index, torch.Tensor):
            sizes.add(len(index))
        return take(self, index, *args, **kwargs)

    monkeypatch.setattr(Problem, "stats_of", watched)
    start = random_units(problem).to(torch.float32)
    before = problem.value(start)
    sizes.clear()
    found = warmup.adam_epochs(problem, start, 0.5, epochs, torch.Generator().manual_seed(0))
    assert max(sizes) == size
    assert problem.value(found) < before


def test_products_are_large_where_all_of_a_great_evaluation_in_float32_is_and_memory_is_not_tight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("self_attention", n=40, loss="cross_entropy")
    problem = float32_problem(case)
    factors = random_units(problem).to(torch.float32)
    work = problem.n * problem.gradient_work(factors)
    for least, found in ((work, True), (work + 1, False)):
        monkeypatch.setattr(warmup, "LARGE_WORK", least)
        assert warmup.in_large_products(problem, factors) == found
    monkeypatch.setattr(warmup, "LARGE_WORK", 0.0)
    assert not warmup.in_large_products(problem.in_dtype(torch.float64), factors)
    gated = float32_problem(replace(case, activation="gated_relu"))
    assert not warmup.in_large_products(gated, random_units(gated).to(torch.float32))
    problem.budget = memory.Budget.of(memory.ROOMY - 1)
    assert not warmup.in_large_products(problem, factors)


def with_small_unit(problem: Problem) -> Factors:
    """Two units, rotated into three whose third principal one is next to nothing."""
    whole = random_units(problem, 3).to(torch.float32)
    units = whole.units[0]
    assert units.u is not None
    sizes = torch.tensor([1.0, 1.0, 1e-3])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    u, v = ((turn @ (sizes[:, None] * t.flatten(1))).view(t.shape) for t in (units.u, units.v))
    return Factors([Units(u, v, units.gate)], whole.intercept)


def test_warmups_drop_the_smallest_principal_units_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = float32_problem(Case("self_attention", n=40))
    start = with_small_unit(problem)
    x = start.flat()
    still = torch.zeros_like(x)
    second = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    shapes, left, first, squares = warmup.pruned(problem, start, x, still, second)
    assert [len(units.v) for units in shapes.units] == [2]
    assert len(left) == len(first) == len(squares) == len(shapes.flat())
    torch.testing.assert_close(problem.forward(shapes.like(left)), problem.forward(start), rtol=1e-2, atol=1e-4)
    assert bool((squares >= 0).all())
    # Rows of the map have norm one: no mean square of a new entry is above those that it is mixed of.
    assert float(squares.max()) <= float(second.max()) * (1 + 1e-5)
    # What the mean gradient says grows is kept, however small.
    assert [len(units.v) for units in warmup.pruned(problem, start, x, -x, second)[0].units] == [3]
    monkeypatch.setattr(warmup, "minibatches", lambda *args: iter([torch.zeros_like(args[2])]))
    for epochs, units in ((1, 3), (2, 2), (5, 2)):
        found = warmup.adam_epochs(problem, start, 0.5, epochs, torch.Generator())
        assert found.n_units == units


def test_ridge_branches_do_not_cost_units_in_warmups() -> None:
    problem = float32_problem(Case("linear", n=40))
    attention = float32_problem(Case("self_attention", n=40))
    both = attention.with_components([*attention.components, *problem.components])
    small = with_small_unit(attention)
    ridge = random_units(problem).to(torch.float32).units[0]
    start = Factors([small.units[0], Units(None, 1e4 * torch.ones_like(ridge.v))], small.intercept)
    x = start.flat()
    shapes, left, *_ = warmup.pruned(both, start, x, torch.zeros_like(x), torch.ones_like(x))
    assert [len(units.v) for units in shapes.units] == [2, 1]
    torch.testing.assert_close(shapes.like(left).units[1].v, start.units[1].v)
