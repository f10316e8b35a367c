"""Products through oneDNN: as exact as those of float32, only where they are worth it, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch

from convexheads import products
from convexheads.products import WORTH, exact_through_onednn, fast_products

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
    monkeypatch.setattr(products, "exact_through_onednn", lambda: True)
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
    monkeypatch.setattr(products, "exact_through_onednn", lambda: True)
    with fast_products(WORTH - 1):
        assert products._setting().fp32_precision == before
    monkeypatch.setattr(products, "exact_through_onednn", lambda: False)
    with fast_products():
        assert products._setting().fp32_precision == before


@can_be_set
def test_a_precision_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "exact_through_onednn", lambda: True)
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
    honest = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype != torch.float32:
            return honest(a, b)
        return honest(a.bfloat16().float(), b.bfloat16().float())

    exact_through_onednn.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not exact_through_onednn()
    exact_through_onednn.cache_clear()
