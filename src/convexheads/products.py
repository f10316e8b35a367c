"""Matrix products in float32 on processors where torch's default library for them leaves speed unused.

Torch hands float32 products on a CPU to its BLAS, and, where lower precision is allowed, to oneDNN. On x86
processors with 512-bit vectors but without bfloat16 tiles oneDNN has nothing lower to offer and computes in float32
all the same, with the widest vectors there are, where MKL takes half of them on processors of other makers than Intel:
twice the speed. Whether it does is not guessed but tried, once a process, on the products themselves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from convexheads.memory import current as current_budget

PANEL = 256
"""Rows of a second moment that a product has at a time: what lies above the diagonal beyond them is not formed."""
ALIGNED, WORTH_ALIGNING = 64, 2**18
"""Bytes at multiples of which the rows of a product start, where it has so many numbers at least. MKL takes up to twice
as long to write others, on processors with 256-bit vectors."""
EXACT = 2e-6
"""Largest relative error of a product that is one of float32; a product of bfloat16 has about 2e-3."""
NARROW = {torch.float32: 15, torch.float64: 32}
"""Columns of a second factor up to which ..."""
WORTH_SWAPPING = 2**14
"""... and numbers of the first one from which a product is not left to torch's BLAS as it is."""
INNER, FEW_ROWS = 512, 384
"""On Intel's processors: columns of a first factor that go into one of several products, which are then summed, and its
rows up to which that gains. MKL has two threads share such a product in a way that takes longer than one."""
SHAPES = ((300, 660, 100), (64, 64, 64), (37, 1500, 33))
WORTH = 2_000_000
"""Multiplications from which a product gains; calling oneDNN takes some microseconds longer."""


def _capabilities() -> dict[str, Any]:
    """What torch knows of the processor: nothing, where it does not tell."""
    found = getattr(torch.cpu, "get_capabilities", None)
    return {} if found is None else found()


@functools.cache
def _intel() -> bool:
    """Whether this is a processor of Intel's, as far as torch can tell."""
    return str(_capabilities().get("cpu_name", "")).startswith("Intel")


def low_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device has units that multiply matrices of it at least twice as fast as of float32; or None.

    These are the tiles of x86 processors (AMX), dot products of 512-bit vectors (AVX512_BF16), but for those of Intel's
    processors, which take twice as long as in float32, and the tensor cores of GPUs (compute capability 8 and above).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else None
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    has = _capabilities()
    vectors = has.get("avx512_bf16", False) and not _intel()
    return torch.bfloat16 if has.get("amx_bf16", False) or vectors else None


def _setting() -> Any:
    """What torch is told the precision of oneDNN's products through; None where it cannot be (torch before 2.9)."""
    found = getattr(torch.backends.mkldnn, "matmul", None)
    return found if hasattr(found, "fp32_precision") else None


def _in_force(dtype: torch.dtype) -> bool:
    """Whether torch hands products of this dtype to oneDNN now."""
    setting = _setting()
    return dtype == torch.float32 and setting is not None and setting.fp32_precision == "bf16"


@contextlib.contextmanager
def _through_onednn() -> Iterator[None]:
    setting = _setting()
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def onednn_gains() -> bool:
    """Whether products that torch hands to oneDNN have the precision of float32 here, and take less time than MKL's."""
    if (
        _setting() is None
        or _intel()
        or not torch.backends.mkldnn.is_available()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in SHAPES:
        a = torch.randn(4, rows, inner, generator=generator)
        b = torch.randn(4, inner, columns, generator=generator)
        with _through_onednn():
            found = [a[0] @ b[0], a[0].mT.contiguous().mT @ b[0], a @ b]
        exact = [a[0].double() @ b[0].double()] * 2 + [a.double() @ b.double()]
        if any(float((x - y).norm()) > EXACT * float(y.norm()) for x, y in zip(found, exact, strict=True)):
            return False
    return True


def _where(worth: bool) -> contextlib.AbstractContextManager[None]:
    """:func:`_through_onednn` where that is worth it and the caller has set no precision; else nothing."""
    setting = _setting()
    free = worth and setting is not None and setting.fp32_precision == "none"
    return _through_onednn() if free else contextlib.nullcontext()


def fast_products(multiplications: float = WORTH) -> contextlib.AbstractContextManager[None]:
    """In this block float32 products on the CPU run through oneDNN where that is as exact, and worth it.

    ``multiplications`` is the size of a typical product of the block. A precision that the caller has set is kept.
    """
    return _where(multiplications >= WORTH and onednn_gains())


_KEPT: dict[Hashable, int] = {}
"""What products were taken of through oneDNN where it may keep few shapes, in this process, and how many shapes."""


def repeated_products(key: Hashable, shapes: int, most: int) -> contextlib.AbstractContextManager[None]:
    """:func:`fast_products` for products, known by ``key`` and of so many ``shapes``, that are taken again and again.

    Only the first ones of a process, that make ``most`` shapes together: oneDNN keeps code and buffers for each. None
    that are not known yet if ``shapes`` is 0.
    """
    if key not in _KEPT and (not shapes or sum(_KEPT.values()) + shapes > most):
        return contextlib.nullcontext()
    if not onednn_gains():
        return contextlib.nullcontext()
    _KEPT.setdefault(key, shapes)
    return _where(True)


def rough_products(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """In this block float32 products may take operands rounded to bfloat16, where :func:`low_precision` is it.

    Sums stay in float32, so that a second moment stays positive semidefinite: for estimates from samples, whose own
    errors are far larger. A precision that the caller has set is kept. Where little memory is allowed they stay with
    torch's BLAS: oneDNN keeps code and buffers for every shape of a product.
    """
    return _where(device.type == "cpu" and current_budget().roomy and low_precision(device) is not None)


def _by_inner(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as the sum of the products of INNER columns of ``a`` with as many rows of ``b``, taken at once."""
    count = a.shape[1] // INNER
    split = count * INNER
    parts = a[:, :split].unflatten(1, (count, INNER)).transpose(0, 1) @ b[:split].unflatten(0, (count, INNER))
    total = parts.sum(0)
    return total if split == a.shape[1] else total.addmm_(a[:, split:], b[split:])


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, otherwise than torch's BLAS has it by itself where ``b`` has few columns.

    The other way round: on AMD's processors MKL takes up to five times as long. On Intel's the product as it is is the
    fastest, but for few long rows. oneDNN takes all of them in about the same time.
    """
    columns = b.shape[1]
    if (
        # A graph that is exported is for any number of rows.
        torch.compiler.is_compiling()
        or columns > NARROW.get(a.dtype, 0)
        or a.numel() < WORTH_SWAPPING
        or a.device.type != "cpu"
        or _in_force(a.dtype)
    ):
        return a @ b
    if not _intel():
        return (b.mT @ a.mT).mT.contiguous()
    return _by_inner(a, b) if len(a) <= FEW_ROWS and a.shape[1] >= 2 * INNER else a @ b


def aligned_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices; rows of a large result are aligned, with a few unused columns between them (it is a view)."""
    # A graph that is exported is for any number of rows.
    if torch.compiler.is_compiling():
        return a @ b
    columns = b.shape[1]
    spare = -columns % (ALIGNED // b.element_size())
    if not spare or len(a) * columns < WORTH_ALIGNING or a.device.type != "cpu":
        return a @ b
    return (a @ torch.nn.functional.pad(b, (0, spare)))[:, :columns]


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b of matrices; torch counts the operations of this call, and not those of ``addmm_``."""
    torch.addmm(into, a, b, out=into)


def add_moment(into: Tensor, rows: Tensor) -> None:
    """Add rows^T rows, of ``rows`` (n, D), to the lower triangle of ``into`` (D, D); above it lies anything.

    Three quarters of the products that the whole takes, or fewer: eigendecompositions read no more than this half.
    """
    for start in range(0, len(into), PANEL):
        stop = min(len(into), start + PANEL)
        into[start:stop, :stop].addmm_(rows[:, start:stop].mT, rows[:, :stop])


def from_lower(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle, in the memory of that: new pages would take longer than all else."""
    for start in range(0, len(lower), PANEL):
        stop = min(len(lower), start + PANEL)
        lower[:start, start:stop] = lower[start:stop, :start].mT
        block = lower[start:stop, start:stop]
        block.copy_(torch.tril(block) + torch.tril(block, -1).mT)
    return lower


def column_squares(rows: Tensor) -> Tensor:
    """Squared norms of the columns of matrices (..., n, D): (..., D).

    In parts that stay in the cache: torch's norm along any axis but the last takes up to ten times as long.
    """
    if rows.ndim > 2:
        return torch.stack([column_squares(each) for each in rows])
    total = rows.new_zeros(rows.shape[1])
    for part in rows.split(PANEL):
        total += part.square().sum(0)
    return total
