"""How much memory a fit may use, how much it did, and arrays that stay in a temporary file.

A limit counts what a computation adds to the process: the interpreter and torch themselves, and arrays that the caller
holds, are there before. Within it every reader and every pass over the samples takes its share from :func:`current`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexheads.errors import DataError, InputError, describe

CACHE_BYTES = 3 * 2**30
WORKSPACE = 2**19
READ_BYTES = 64 * 2**20
DEVICE_WORKSPACE = 2**26
"""Most elements of the largest temporary on an accelerator, which is idle most of the time on the parts that suit a
processor's cache."""
LIBRARIES = 8 * 10**6
"""Bytes of code, tables and buffers of the libraries that a fit loads on its way, about ..."""
SMALLEST = 2 * LIBRARIES
"""... those below which a limit is refused ..."""
LARGE_LIBRARIES = 96 * 10**6
"""Bytes of their code and buffers for large blocks, at most; for smaller ones no more than the blocks themselves."""
KERNELS = 400 * 10**6
"""Bytes of the code and buffers that oneDNN keeps for the shapes of all products of one fit, about, ..."""
ROOMY = 10**9
"""... and those from which a limit has room for them."""
SOME_ROOM, MOST_KERNELS = 64 * 10**6, 128 * 10**6
"""From the first of these limits on a third of what is left is for products of a few shapes, but no more than the
second: ..."""
TRIAL, KERNEL = 15 * 10**6, 600_000
"""... so many bytes for a trial of its precision, and for each shape."""
KEEPING = 64 * 10**6
"""Limit from which freed pages are kept within a fit: some MB of them are in holes; ..."""
SINGLE, AT_END = 16, 8
"""... below, blocks above the first share of it are mapped by themselves, and no more than the second one stays free at
the heap's end."""
HOLES = 12
"""One part in so many of a limit is left to holes between blocks."""
TRIM_CHUNKS, CROWDED = 64, 0.6
"""Chunks after which freed memory goes back to the system, where it is limited, and more than this share resident."""
MAPPED = 2 * 2**20
"""Bytes of consecutive rows of a file from which they are mapped: the system maps pages of up to this size."""
ROOM_LEFT = 2**30
"""Bytes that a temporary file leaves free on its disk."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's settings (mallopt(3)): the free bytes from which the end of the heap is given back, and ..."""
MOST_MAPPED = 32 * 2**20
"""... the size from which a block is mapped by itself; this is the largest that is taken."""
MOST_KEPT = 2**31 - 1

_SHARED_LIBRARY = re.compile(r"\.so(\.\d+)*$")
_UNITS = {"": 1, "B": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate("KMGT", 1)
    for suffix, base in (("", 1024), ("B", 1000), ("IB", 1024))
}


def parse_bytes(value: Any, name: str = "memory_limit") -> int | None:
    """Bytes of ``4GB``, ``512MiB``, ``2G``, a number of bytes, or None.

    ``KB``, ``MB``, ``GB``, ``TB`` are powers of 1000; ``KiB`` ... and ``K``, ``M``, ``G``, ``T`` powers of 1024.

    Raises
    ------
    InputError
        For anything else, or less than 16 MB.
    """
    if value is None:
        return None
    expected = f"a number of bytes of at least {SMALLEST}, text such as '4GB' or '512MiB', or None"
    found = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2].upper() in _UNITS:
            found = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(value, Real) and not isinstance(value, bool):
        found = float(value)
    if found is None or not SMALLEST <= found < 2**62:
        raise InputError(f"{name}: " + describe(repr(value), expected))
    return int(found)


def readable(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'GiB' else 0}f} {unit}"
    return f"{count / 1024:.0f} KiB"


# Measuring ------------------------------------------------------------------------------------------------


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        # What getrusage tells on Linux includes the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def device_peak() -> int | None:
    """Largest memory of this process on a GPU so far, in bytes; None if it has used none."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def resident_memory() -> int | None:
    """Resident memory of this process now, in bytes; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def library_memory() -> int | None:
    """Resident pages of shared libraries' files, in bytes; None where the system does not tell (only Linux does).

    Code is read where a function is called for the first time, some 20 MB in the first fit of a process. The system
    drops such pages where memory is short.
    """
    total, counted = 0, False
    try:
        # Line by line: all of it is some MB, which would count as what is measured here.
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                words = line.split(maxsplit=5)
                if not words[0].endswith(":"):
                    # The first line of a mapping: addresses, rights, offset, device, inode and the file, if any.
                    counted = len(words) == 6 and _SHARED_LIBRARY.search(words[5].rstrip()) is not None
                elif counted and words[0] == "Rss:":
                    total += 1024 * int(words[1])
    except OSError:
        return None
    return total


def release_pages(array: Any) -> None:
    """Give back the resident pages of a numpy memory map of a file, which stays in the system's cache.

    Pages of a map count as memory of the process until the system runs short, so that a pass over a store would seem
    to take as much as the store, and would where memory is limited from outside.
    """
    mapped = getattr(array, "_mmap", None)
    # In mode "c" the pages are the only place where changes are. Only Linux drops pages at once.
    if mapped is None or getattr(array, "mode", "c") == "c" or sys.platform != "linux":
        return
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def trim() -> None:
    """Give the pages of freed blocks back to the system, where the C library keeps them for itself (glibc).

    The blocks of a pass over many small chunks leave holes that the next pass does not fill: without this the process
    grows to several times of what it holds.
    """
    if _TRIM is not None:
        _TRIM(0)


@contextlib.contextmanager
def suited_heap(large: bool = True) -> Iterator[None]:
    """Within it the C library (glibc) treats the pages of freed blocks as suits passes over chunks of samples.

    By itself it gives pages back whenever some megabytes are free at the end of its heap, and maps every larger block
    anew: the system then clears as many pages as the temporaries of all chunks have. Therefore pages are kept where
    temporaries are ``large``. A small limit has no room for that, nor for what the library keeps by itself, which
    grows to twice the largest block that was ever freed: there both sizes are shares of the limit.
    """
    budget = current()
    limit, mapped = budget.limit, budget.lasting
    if limit is not None and limit < KEEPING:
        kept = limit // AT_END
    else:
        kept = MOST_KEPT if large else 0
    setting = _library("mallopt") if kept else None
    if setting is None:
        yield
        return
    # Neither can be read: what is left behind is the most that the library arrives at by itself.
    setting(M_MMAP_THRESHOLD, mapped)
    setting(M_TRIM_THRESHOLD, kept)
    try:
        yield
    finally:
        setting(M_MMAP_THRESHOLD, MOST_MAPPED)
        setting(M_TRIM_THRESHOLD, 2 * MOST_MAPPED)
        trim()


def _library(name: str) -> Any:
    """A function of the C library that only glibc has; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # another C library
        return None


_TRIM = _library("malloc_trim")


# The limit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What one fit may hold.

    Attributes
    ----------
    limit : bytes in all, or None.
    cache : bytes of per-sample statistics, or of transformed tokens, that are kept in memory.
    workspace : elements of the largest temporary of a chunk of samples.
    reading : bytes of float64 tokens that are read at once.
    before : bytes that were resident when the limit came into force; None where that is not known.
    """

    limit: int | None = None
    cache: int = CACHE_BYTES
    workspace: int = WORKSPACE
    reading: int = READ_BYTES
    before: int | None = None

    @classmethod
    def of(cls, limit: int | None) -> Budget:
        """The shares of a limit."""
        if limit is None:
            return cls()
        # A part is left to what is small, and to holes between blocks.
        share = max(limit // 4, (limit - LIBRARIES - _for_kernels(limit, 0)) * 3 // 4)
        # A pass holds a handful of temporaries of `workspace` elements, and reading three copies of `reading` bytes.
        return cls(
            limit,
            min(CACHE_BYTES, share // 6),
            max(2**13, min(WORKSPACE, share // 128)),
            max(2**16, min(READ_BYTES, share // 32)),
        )

    @property
    def roomy(self) -> bool:
        """Whether there is room for oneDNN, which keeps compiled code and a scratchpad for every shape of a product."""
        return self.limit is None or self.limit >= ROOMY

    @property
    def lasting(self) -> int:
        """Bytes of a block of memory from which it is mapped anew each time; see :func:`suited_heap`."""
        return MOST_MAPPED if self.limit is None or self.limit >= KEEPING else self.limit // SINGLE

    def kernels(self, fixed: int) -> int | None:
        """Shapes of products that there is room for in oneDNN, beside ``fixed`` bytes; None: as many as there are."""
        if self.limit is None or self.limit >= ROOMY:
            return None
        return max(0, _for_kernels(self.limit, fixed) - TRIAL) // KERNEL

    def chunk(self, fixed: int) -> int:
        """With a limit, bytes of all that a chunk of samples takes, beside ``fixed`` that nothing makes smaller."""
        assert self.limit is not None
        # Where blocks come to lie differs from run to run, and with it how much of what is free stays resident.
        taken = self.limit // HOLES + LIBRARIES + _for_kernels(self.limit, fixed) + fixed
        return max(self.limit // 16, (self.limit - taken) // 3)

    def on(self, device: torch.device) -> Budget:
        """The shares of a computation on a device: without a limit, on an accelerator, from what is free there."""
        if device.type != "cuda" or self.limit is not None:
            return self
        free, _ = torch.cuda.mem_get_info(device)
        return self.sharing(free)

    def passing(self, parts: Iterable[slice]) -> Iterator[slice]:
        """The parts of a pass over samples; with a limit pages are given back after every few of them."""
        for done, part in enumerate(parts, 1):
            yield part
            if done % TRIM_CHUNKS == 0:
                self.trim()

    def trim(self) -> None:
        """Give freed pages back where there is a limit and resident memory comes near it.

        The system clears pages anew when they are used again: that takes up to a tenth of a fit.
        """
        if self.limit is None:
            return
        now = None if self.before is None else resident_memory()
        if now is None or self.before is None or now - self.before > CROWDED * self.limit:
            trim()

    def gathered(self, parts: Iterable[slice], rows: Callable[[slice], Tensor]) -> Tensor:
        """What ``rows`` gives for the parts of a pass, at least one and consecutive from 0 on, in one tensor.

        In one piece from the start: small ones that are kept would keep the pages of what lies between them, too.
        """
        every = list(parts)
        first = rows(every[0])
        found = first.new_empty(every[-1].stop, *first.shape[1:])
        found[every[0]] = first
        for part in self.passing(every[1:]):
            found[part] = rows(part)
        return found

    def sharing(self, free: int) -> Budget:
        """The same with the statistics and temporaries that suit an accelerator with so many free bytes."""
        return replace(self, cache=free // 2, workspace=max(self.workspace, min(DEVICE_WORKSPACE, free // 256)))


def _for_kernels(limit: int, fixed: int) -> int:
    """Bytes of a limit that oneDNN may take, beside ``fixed`` ones."""
    if limit >= ROOMY:
        return KERNELS
    room = min((limit - LIBRARIES - fixed) // 3, MOST_KERNELS)
    return room if limit >= SOME_ROOM and room > TRIAL else 0


def least_limit(fixed: int) -> int:
    """The least limit that a computation keeps to which holds ``fixed`` bytes that no chunk makes smaller."""
    return LIBRARIES + fixed + min(LARGE_LIBRARIES, fixed)


_CURRENT: ContextVar[Budget] = ContextVar("budget", default=Budget())  # noqa: B039 - frozen


def current() -> Budget:
    """The budget in force."""
    return _CURRENT.get()


@contextlib.contextmanager
def limited(limit: Any) -> Iterator[Budget]:
    """Put a limit in force, as :func:`parse_bytes` takes it; None leaves what is in force."""
    found = parse_bytes(limit)
    budget = current() if found is None else replace(Budget.of(found), before=resident_memory())
    token = _CURRENT.set(budget)
    try:
        yield budget
    finally:
        _CURRENT.reset(token)


# Temporary files ------------------------------------------------------------------------------------------


def folder_of(source: Any) -> Path | None:
    """The folder of the file or store that tokens come from, where temporary files are best put; None if unknown."""
    for _ in range(8):
        path = getattr(source, "path", None) or getattr(source, "filename", None)
        if isinstance(path, (str, Path)):
            return Path(path).resolve().parent
        inner = getattr(source, "source", None)
        if inner is None:
            return None
        source = inner
    return None


def roomy_folder(near: Path | None, needed: int) -> Path | None:
    """A folder with room for a temporary file of ``needed`` bytes: ``near``, or the system's; None if neither has."""
    for folder in (near, Path(tempfile.gettempdir())):
        if folder is None or not os.access(folder, os.W_OK):
            continue
        if shutil.disk_usage(folder).free >= needed + ROOM_LEFT:
            return folder
    return None


class Buffer:
    """Memory that the reads of one pass share: what has been read is there until the next read.

    A block of its own for every read would be new pages for most, which take longer than the read itself.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of any content."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(shape)


class FileRows:
    """Rows of an array in a temporary file without a name.

    The file is gone as soon as the process is, however it ends. ``rows[i:j]`` and ``rows[index]`` are tensors. Many
    consecutive rows are in the memory of a map of the file, no copy: a product reads the system's cache at about the
    speed of memory, where copies into buffers take twice as long as the product. The pages of one read are given back
    at the next.

    Parameters
    ----------
    shape : (n, ...).
    dtype : of the tensors.
    folder : where the file is.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> None:
        self.shape, self.dtype, self.folder = tuple(shape), dtype, folder
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._map: mmap.mmap | None = None
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as this
        except OSError as error:
            raise DataError(f"{folder}: cannot make a temporary file ({error.strerror or error})") from error

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.shape[0] * self._row_bytes

    def write(self, start: int, rows: Tensor) -> None:
        """Rows ``start``, ``start + 1``, ..., of any dtype."""
        # Not through the map: a full disk would end the process there.
        data = _bytes_of(rows.detach().to("cpu", self.dtype).contiguous())
        self._file.seek(start * self._row_bytes)
        try:
            while len(data):
                data = data[self._file.write(data) :]
        except OSError as error:
            fix = f"free {readable(self.nbytes)}, or raise the memory limit"
            raise DataError(f"{self.folder}: a temporary file cannot be written ({error.strerror}); {fix}") from error

    def __getitem__(self, index: Any) -> Tensor:
        return self.read(index)

    def read(self, index: Any, buffer: Buffer | None = None) -> Tensor:
        """Rows ``index``: in a ``buffer``, unless they are mapped or there is none."""
        self.release()
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._run(start, max(start, stop), buffer)
            index = np.arange(start, stop, step)
        rows = np.asarray(index.cpu() if isinstance(index, Tensor) else index, dtype=np.int64)
        # Runs of consecutive rows are read at once.
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1])
        if len(rows) and len(firsts) == 1:
            return self._run(int(rows[0]), int(rows[-1]) + 1, buffer)
        out = self._empty(len(rows), buffer)
        if len(rows):
            size, into = self._row_bytes, _bytes_of(out)
            ends = [*(firsts[1:] * size).tolist(), len(into)]
            # Nothing but the read itself: it takes less than one view of a tensor.
            for first, last, start in zip((firsts * size).tolist(), ends, (rows[firsts] * size).tolist(), strict=True):
                self._fill(into[first:last], start)
        return out

    def _run(self, start: int, stop: int, buffer: Buffer | None) -> Tensor:
        """Consecutive rows: mapped if they are many."""
        size = (stop - start) * self._row_bytes
        if size >= MAPPED and sys.platform == "linux":
            return self._mapped(start * self._row_bytes, size).view(stop - start, *self.shape[1:])
        out = self._empty(stop - start, buffer)
        self._fill(_bytes_of(out), start * self._row_bytes)
        return out

    def _empty(self, count: int, buffer: Buffer | None) -> Tensor:
        shape = count, *self.shape[1:]
        return torch.empty(shape, dtype=self.dtype) if buffer is None else buffer.rows(shape, self.dtype)

    def _fill(self, buffer: memoryview, start: int) -> None:
        """Read bytes from ``start`` on."""
        while len(buffer):
            self._file.seek(start)
            count = self._file.readinto(buffer)
            if not count:
                raise self._short(start // self._row_bytes)
            buffer, start = buffer[count:], start + count

    def _mapped(self, start: int, size: int) -> Tensor:
        """Bytes of the file as one vector."""
        if self._map is None:
            if os.fstat(self._file.fileno()).st_size < self.nbytes:
                raise self._short(len(self))
            self._map = mmap.mmap(self._file.fileno(), self.nbytes)
        first = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, start + size - first)
        return torch.frombuffer(self._map, dtype=self.dtype, count=size // self.dtype.itemsize, offset=start)

    def release(self) -> None:
        """Give back the pages of the last read."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _short(self, row: int) -> DataError:
        return DataError(f"{self.folder}: a temporary file ends before row {row}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, of whatever dtype: numpy does not know all."""
    return tensor.view(-1).view(torch.uint8).numpy().data
