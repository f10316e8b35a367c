"""Images -> tokens on disk: resumable, checked, and as fast as the forward pass.

While an extraction runs, its folder holds ``progress.json`` (what is being made, and how many rows are
safely on disk) and the shard being filled, ``tokens-NNNNN.bin.part``. Batches start at multiples of the
batch size whatever was done before, so an extraction that was killed and started again computes the
same batches and ends with the same bytes. The manifest is written last; without it nothing opens the
folder as a store.

Several workers (see :mod:`convexheads.distributed`) take whole shards each. A shard is then an extraction of its own
in a folder ``part-NNNNN``, so that any number of workers, one included, can go on with what others have begun; the
finished shards are moved into place, and are the same files as those of one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from convexheads import distributed
from convexheads.distributed import World
from convexheads.errors import DataError, InputError, describe
from convexheads.tokens.files import canonical, full_disk_as_data_error, read_json, sync_folder, write_json
from convexheads.tokens.store import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    STORED_DTYPES,
    VERSION,
    TokenStore,
    check_dtype,
    check_labels,
    default_shard_rows,
    encode,
    finish,
    parse_roles,
    prepare_folder,
    select_layout,
    shard_entry,
    shard_name,
    store_key,
)

_CHECKPOINT_SECONDS = 5.0
_PART_NAME = re.compile(r"part-\d{5}")


class Images(Protocol):
    """What is extracted from; ``load_dataset`` gives such an object."""

    name: str
    split: str | None
    labels: NDArray[np.int64] | None
    class_names: list[str] | None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the images and labels."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Any:
        """Image ``index`` as a PIL image in RGB."""


class TokenModel(Protocol):
    """What is extracted with; ``load_backbone`` gives such an object."""

    name: str
    width: int
    grid: tuple[int, int] | None
    layout: dict[str, tuple[int, int]]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the weights, the layer and the library class."""

    @property
    def transform_fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of what is done to an image before the network."""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""

    def preprocess(self, image: Any) -> torch.Tensor:
        """An image as a float32 tensor (3, height, width)."""

    def tokens(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch of images as tokens (n, s, d)."""


@dataclass(frozen=True)
class Extraction:
    """What an extraction did.

    Attributes
    ----------
    store : the finished store.
    seconds : wall-clock seconds spent on images in this run.
    images : number of images run through the network in this run.
    resumed_from : rows that an earlier, interrupted run had already done.
    reused : True when the finished store was already there and nothing was computed.
    """

    store: TokenStore
    seconds: float
    images: int
    resumed_from: int
    reused: bool

    @property
    def images_per_second(self) -> float:
        """Rate of this run, or 0 when nothing was computed."""
        return self.images / self.seconds if self.images and self.seconds > 0 else 0.0


def extract(
    dataset: Images,
    backbone: TokenModel,
    out: str | Path,
    *,
    tokens: str | Sequence[str] = "all",
    split: str | None = None,
    dtype: str = "float16",
    batch_size: int = 32,
    shard_rows: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    checkpoint_seconds: float = _CHECKPOINT_SECONDS,
) -> Extraction:
    """Run every image of a dataset through a backbone and store the tokens.

    Started again after it was stopped in any way, it goes on where it was and ends with the same bytes.
    Where the finished store is already there, it is returned as it is. Tokens that were made with any
    other option are never reused.

    Parameters
    ----------
    dataset : images, as ``load_dataset`` gives them.
    backbone : network, as ``load_backbone`` gives it.
    out : folder of the store.
    tokens : "all", or the roles to keep: "cls", "registers", "patch", or several of them.
    split : name of the split to record; None: that of the dataset.
    dtype : "float16" (default), "bfloat16" or "float32".
    batch_size : images a forward pass.
    shard_rows : rows a file, rounded up to whole batches; None: about 128 MiB.
    workers : threads that read and resize images while the network runs; None: 2 on a processor, up to
        8 with an accelerator.
    overwrite : replace whatever tokens the folder holds; an unfinished extraction of the very same tokens
        is continued all the same.
    progress : show a bar with rate and remaining time on standard error.
    checkpoint_seconds : how often the rows done are made durable, in seconds. A crash of the whole
        machine loses at most this much work.

    Raises
    ------
    InputError
        If an option cannot be used, or tokens are not finite or do not fit into ``dtype``.
    DataError
        If the folder holds other tokens, the disk is full, or an image cannot be read.
    """
    out = Path(out)
    if batch_size < 1 or (shard_rows is not None and shard_rows < 1):
        raise InputError(describe(f"batch_size={batch_size}, shard_rows={shard_rows}", "numbers of at least 1"))
    n = len(dataset)
    if n == 0:
        raise DataError(f"{dataset.name}: {describe('no image', 'at least one')}")
    manifest, ranges = _plan(dataset, backbone, tokens, split, dtype)
    labels = None if dataset.labels is None else check_labels(dataset.labels, n, dataset.class_names)
    _, s, d = manifest["shape"]
    row_bytes = s * d * STORED_DTYPES[dtype].itemsize
    rows = shard_rows or default_shard_rows(row_bytes)
    rows = -(-rows // batch_size) * batch_size
    settings = {"batch_size": batch_size, "shard_rows": rows, "device": backbone.device.type}

    if not overwrite and (out / MANIFEST).exists():
        _refuse_other_tokens(out, read_json(out / MANIFEST, "manifest of the token store", _again(out)), manifest)
        store = TokenStore.open(out)
        (out / JOURNAL).unlink(missing_ok=True)
        return Extraction(store, 0.0, 0, 0, reused=True)

    def start(folder: Path, plan: dict[str, Any], replace: bool) -> _Writer:
        return _Writer.start(folder, plan, settings, row_bytes, replace, checkpoint_seconds)

    def work(part: Images, writer: _Writer, needed: int) -> None:
        with full_disk_as_data_error(out, _room(out, needed * row_bytes)):
            _run(part, backbone, writer, ranges, dtype, batch_size, workers, progress)

    world = distributed.current()
    started = time.perf_counter()
    if world.size > 1 or (not (out / MANIFEST).exists() and _part_folders(out)):
        with _only_one(out) if world.first else contextlib.nullcontext():
            resumed_from = _extract_parts(dataset, out, manifest, rows, overwrite, world, start, work)
            seconds = time.perf_counter() - started
            if world.first:
                _join_parts(out, manifest, -(-n // rows), labels)
            world.barrier()
        return Extraction(TokenStore.open(out), seconds, n - resumed_from, resumed_from, reused=False)
    with _only_one(out):
        writer = start(out, manifest, overwrite)
        resumed_from = writer.rows
        work(dataset, writer, n - resumed_from)
        seconds = time.perf_counter() - started
        with full_disk_as_data_error(out, _room(out, 0)):
            finish(out, manifest, writer.shards, labels)
        (out / JOURNAL).unlink()
    return Extraction(TokenStore.open(out), seconds, n - resumed_from, resumed_from, reused=False)


# Several workers ------------------------------------------------------------------------------------------


class _Span:
    """Consecutive images of a dataset."""

    def __init__(self, source: Images, start: int, stop: int) -> None:
        self.name, self.split, self.class_names = source.name, source.split, source.class_names
        self.labels: NDArray[np.int64] | None = None
        self.source, self.start, self.stop = source, start, stop

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the whole dataset: the span follows from the shard."""
        return self.source.fingerprint

    def __len__(self) -> int:
        return self.stop - self.start

    def image(self, index: int) -> Any:
        """Image ``index`` of the span."""
        return self.source.image(self.start + index)


def _part_folders(out: Path) -> list[Path]:
    """The folders of shards that are, or were, extracted on their own."""
    if not out.is_dir():
        return []
    return sorted(entry for entry in out.iterdir() if _PART_NAME.fullmatch(entry.name) and entry.is_dir())


def _part_folder(out: Path, index: int) -> Path:
    return out / f"part-{index:05d}"


def _extract_parts(
    dataset: Images,
    out: Path,
    manifest: dict[str, Any],
    rows: int,
    overwrite: bool,
    world: World,
    start: Callable[[Path, dict[str, Any], bool], _Writer],
    work: Callable[[Images, _Writer, int], None],
) -> int:
    """Every worker extracts its shards, each in a folder of its own; returns the rows that had been done before."""
    n, *rest = manifest["shape"]
    if world.first:
        if (out / JOURNAL).exists() and not (out / MANIFEST).exists():
            _split_journal(out)
        elif not _part_folders(out) or (out / MANIFEST).exists():
            prepare_folder(out, overwrite)
    world.barrier()
    before = 0
    for index in range(world.rank, -(-n // rows), world.size):
        part = _Span(dataset, index * rows, min(n, (index + 1) * rows))
        folder = _part_folder(out, index)
        with _only_one(folder):
            writer = start(folder, {**manifest, "shape": [len(part), *rest]}, overwrite)
            before += writer.rows
            if writer.rows < len(part):
                work(part, writer, len(part) - writer.rows)
            writer.close()
    return round(world.total(before))


def _split_journal(out: Path) -> None:
    """Turn what one process has begun into parts: each shard gets its folder and its record."""
    journal = read_json(out / JOURNAL, "journal of an unfinished extraction", _again(out))
    try:
        n, *rest = journal["plan"]["shape"]
        rows, shards, part = journal["settings"]["shard_rows"], journal["shards"], journal["part"]
        for index in range(len(shards) + 1):
            length = min(n, (index + 1) * rows) - index * rows
            if length <= 0:
                break
            folder = _part_folder(out, index)
            folder.mkdir(exist_ok=True)
            plan = {**journal["plan"], "shape": [length, *rest]}
            done = index < len(shards)
            own = {
                **journal,
                "plan": plan,
                "key": store_key(plan),
                "shards": [shard_entry(0, shards[index]["rows"], shards[index]["sha256"])] if done else [],
                "part": {"rows": 0, "sha256": hashlib.sha256().hexdigest()} if done else part,
            }
            write_json(folder / JOURNAL, own)
            ending = "" if done else ".part"
            file = out / f"{shard_name(index)}{ending}"
            if file.exists():
                os.replace(file, folder / f"{shard_name(0)}{ending}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{out / JOURNAL}: the journal is damaged ({error!r}). {_again(out)}") from error
    (out / JOURNAL).unlink()


def _join_parts(out: Path, manifest: dict[str, Any], count: int, labels: NDArray[np.int64] | None) -> None:
    """Move the finished shards into place and make the folder a store."""
    shards = []
    for index in range(count):
        folder = _part_folder(out, index)
        (entry,) = read_json(folder / JOURNAL, "record of a shard", _again(out))["shards"]
        shards.append(shard_entry(index, entry["rows"], entry["sha256"]))
        file = folder / shard_name(0)
        # Stopped while joining: this one is in its place already.
        if file.exists():
            os.replace(file, out / shard_name(index))
    sync_folder(out)
    with full_disk_as_data_error(out, _room(out, 0)):
        finish(out, manifest, shards, labels)
    for folder in _part_folders(out):
        for file in folder.iterdir():
            if file.name == JOURNAL or file.name.startswith(shard_name(0)):
                file.unlink()
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def _plan(
    dataset: Images, backbone: TokenModel, tokens: str | Sequence[str], split: str | None, dtype: str
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The manifest but for shards and labels, and the ranges of the token axis that are kept."""
    check_dtype(dtype)
    roles = parse_roles(tokens, backbone.layout)
    layout, ranges = select_layout(roles, backbone.layout)
    grid = list(backbone.grid) if backbone.grid is not None and "patch" in layout else None
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "shape": [len(dataset), sum(stop - start for start, stop in ranges), backbone.width],
        "dtype": dtype,
        "layout": layout,
        "grid": grid,
        "tokens": roles,
        "split": split if split is not None else dataset.split,
        "backbone": backbone.fingerprint,
        "transform": backbone.transform_fingerprint,
        "dataset": dataset.fingerprint,
        "class_names": dataset.class_names,
    }
    # As it will be read back: tuples become lists.
    return json.loads(canonical(manifest)), ranges


def _run(
    dataset: Images,
    backbone: TokenModel,
    writer: _Writer,
    ranges: list[tuple[int, int]],
    dtype: str,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> None:
    from tqdm import tqdm

    n = len(dataset)
    bar = tqdm(
        total=n,
        initial=writer.rows,
        desc=f"{dataset.name} {dataset.split or ''}".strip(),
        unit="image",
        file=sys.stderr,
        disable=not progress,
        # A log file gets a line now and then, a terminal a bar that moves.
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
    if workers is None:
        workers = 2 if backbone.device.type == "cpu" else max(2, min(8, os.cpu_count() or 2))
    try:
        # Closed at once when the loop is left: no thread reads on after an error.
        batches = _batches(dataset, backbone, writer.rows, batch_size, max(1, workers))
        with bar, contextlib.closing(batches):
            for batch in batches:
                out = backbone.tokens(batch)
                kept = out if len(ranges) == 1 and ranges[0] == (0, out.shape[1]) else None
                if kept is None:
                    kept = torch.cat([out[:, start:stop] for start, stop in ranges], dim=1)
                try:
                    stored = encode(kept.float().cpu().numpy(), dtype)
                except InputError as error:
                    first = writer.rows + getattr(dataset, "start", 0)
                    raise InputError(f"tokens of images {first} to {first + len(batch) - 1}: {error}") from error
                writer.append(stored)
                bar.update(len(batch))
    except BaseException:
        # Stopped by an error or by Ctrl-C: what was computed is kept for the next run. If even this cannot
        # be written (the disk is full), the last record still holds.
        with contextlib.suppress(OSError):
            writer.checkpoint()
        raise
    finally:
        writer.close()


def _batches(
    dataset: Images, backbone: TokenModel, start: int, batch_size: int, workers: int
) -> Generator[torch.Tensor]:
    """Batches from row ``start`` on, prepared by threads a few batches ahead of their use."""

    def prepare(first: int) -> torch.Tensor:
        rows = range(first, min(first + batch_size, len(dataset)))
        return torch.stack([backbone.preprocess(dataset.image(row)) for row in rows])

    firsts = iter(range(start, len(dataset), batch_size))
    pending: deque[Future[torch.Tensor]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        for first in firsts:
            pending.append(pool.submit(prepare, first))
            # One batch more than there are threads: none waits, and memory stays bounded.
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """Appends rows to shards; what ``checkpoint`` has recorded survives a crash of the machine."""

    def __init__(
        self,
        out: Path,
        key: str,
        plan: dict[str, Any],
        settings: dict[str, Any],
        row_bytes: int,
        seconds: float,
    ) -> None:
        self._out = out
        self._journal: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "plan": plan,
            "settings": settings,
        }
        self._row_bytes = row_bytes
        self._shard_rows: int = settings["shard_rows"]
        self._total: int = plan["shape"][0]
        self._seconds = seconds
        self.shards: list[dict[str, Any]] = []
        # Rows of the open shard and their hash: one attribute, so that an interrupt never splits them.
        self._part: tuple[int, Any] = (0, hashlib.sha256())
        self._file: Any = None
        self._saved = time.monotonic()

    @classmethod
    def start(
        cls,
        out: Path,
        manifest: dict[str, Any],
        settings: dict[str, Any],
        row_bytes: int,
        overwrite: bool,
        seconds: float,
    ) -> _Writer:
        """A writer that goes on from what an earlier run has left, or begins anew."""
        journal_file = out / JOURNAL

        def new() -> _Writer:
            return cls(out, store_key(manifest), manifest, settings, row_bytes, seconds)

        writer = new()
        resumed = False
        if journal_file.exists() and not (out / MANIFEST).exists():
            try:
                writer._resume(read_json(journal_file, "journal of an unfinished extraction", _again(out)))
                resumed = True
            except DataError:
                # An extraction that replaces other tokens goes on too when it is stopped; only what has
                # other options, or cannot be read, is replaced.
                if not overwrite:
                    raise
                writer = new()
        if not resumed:
            prepare_folder(out, overwrite)
        with full_disk_as_data_error(out, _room(out, writer._total * row_bytes)):
            writer._check_room()
            # The record comes first: tokens without one would be taken for someone else's files.
            writer.checkpoint()
            writer._open()
        return writer

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return sum(shard["rows"] for shard in self.shards) + self._part[0]

    def append(self, stored: NDArray[Any]) -> None:
        """Add the rows of one batch, and close the shard when it is full."""
        data = np.ascontiguousarray(stored).data.cast("B")
        _write_all(self._file, data)
        rows, sha = self._part[0] + len(stored), self._part[1].copy()
        sha.update(data)
        self._part = (rows, sha)
        if rows == self._shard_rows or self.rows == self._total:
            self._close_shard()
        elif time.monotonic() - self._saved >= self._seconds:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make the rows written so far durable and record them."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        rows, sha = self._part
        part = {"rows": rows, "sha256": sha.hexdigest()}
        write_json(self._out / JOURNAL, {**self._journal, "shards": self.shards, "part": part})
        self._saved = time.monotonic()

    def close(self) -> None:
        """Close the open file, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part_file(self) -> Path:
        return self._out / f"{shard_name(len(self.shards))}.part"

    def _open(self) -> None:
        if self.rows < self._total:
            mode = "r+b" if self._part_file().exists() else "w+b"
            self._file = open(self._part_file(), mode, buffering=0)  # noqa: SIM115 - closed by close()
            # Rows beyond those recorded may be incomplete: they are computed again.
            self._file.truncate(self._part[0] * self._row_bytes)
            self._file.seek(self._part[0] * self._row_bytes)

    def _close_shard(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        rows, sha = self._part
        os.replace(self._part_file(), self._part_file().with_suffix(""))
        sync_folder(self._out)
        self.shards.append(shard_entry(len(self.shards), rows, sha.hexdigest()))
        self._part = (0, hashlib.sha256())
        self.checkpoint()
        self._open()

    def _resume(self, journal: dict[str, Any]) -> None:
        """Take over what the journal says is done; DataError if it is of other tokens or damaged."""
        try:
            if journal["format"] != FORMAT or journal["version"] != VERSION:
                raise ValueError("another version")
            _refuse_other_tokens(self._out, journal["plan"], self._journal["plan"])
            _refuse_other_tokens(self._out, {"run": journal["settings"]}, {"run": self._journal["settings"]})
            self._take_over(journal)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self._out / JOURNAL}: the journal is damaged ({error!r}). {_again(self._out)}"
            ) from error

    def _take_over(self, journal: dict[str, Any]) -> None:
        for index, shard in enumerate(journal["shards"]):
            file = self._out / shard_name(index)
            if not file.exists() or file.stat().st_size != shard["rows"] * self._row_bytes:
                # Someone removed or damaged it: go on from there, as if the rest had not been done.
                journal = {**journal, "part": {"rows": 0}}
                break
            self.shards.append(shard_entry(index, shard["rows"], shard["sha256"]))
        part, final = self._part_file(), self._part_file().with_suffix("")
        if not part.exists() and final.exists():
            # Stopped between the renaming of a full shard and its record.
            os.replace(final, part)
        rows = journal["part"]["rows"]
        size = rows * self._row_bytes
        if rows and part.exists() and part.stat().st_size >= size:
            sha = hashlib.sha256()
            with open(part, "rb") as stream:
                left = size
                while left > 0 and (block := stream.read(min(1 << 20, left))):
                    sha.update(block)
                    left -= len(block)
            if sha.hexdigest() == journal["part"]["sha256"]:
                self._part = (rows, sha)

    def _check_room(self) -> None:
        """Refuse at once what cannot fit, instead of after hours."""
        needed = (self._total - self.rows) * self._row_bytes
        free = shutil.disk_usage(self._out).free
        if free < needed:
            raise DataError(
                f"{self._out}: "
                + describe(
                    f"{_size(free)} free",
                    f"{_size(needed)} for the tokens",
                    "Free some space, choose another folder, keep fewer tokens (--tokens cls) or use --limit",
                )
            )


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        written = file.write(data)
        data = data[written:]


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _room(out: Path, needed: int) -> str:
    return (
        f"Nothing that was done is lost: free some space ({_size(needed)} are needed in all) and run "
        "the same command again, it goes on where it stopped"
    )


def _again(out: Path) -> str:
    return f"Use another folder, or --overwrite to replace what is in {out}"


def _refuse_other_tokens(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """DataError that names the options which differ, if any does."""
    stored, wanted = dict(_flatten(there)), dict(_flatten(asked))
    # A manifest also lists its shards and labels, which follow from the rest.
    names = [name for name in wanted if stored.get(name) != wanted[name]]
    names += [name for name in stored if name not in wanted and name.split(".")[0] in asked]
    if not names:
        return
    shown = "; ".join(
        f"{name}: {_short(stored.get(name))} there, {_short(wanted.get(name))} asked for" for name in names[:4]
    )
    more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
    raise DataError(f"{out} holds tokens made with other options ({shown}{more}). {_again(out)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keep two processes from filling the same folder; the lock goes with the process that holds it."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{out}: cannot make the folder ({error.strerror or error}). Choose another") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise DataError(f"{out}: another process is extracting tokens into it. Wait for it, or stop it") from error
    except OSError:
        # Some network file systems have no locks; the extraction itself needs none.
        pass
    try:
        yield
    finally:
        os.close(folder)
