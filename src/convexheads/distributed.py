"""Several processes on one program: shares of the samples, sums over all of them, and the loss of a process noticed.

Every process (worker) runs the same code on its own consecutive samples. What depends on all samples is summed over the
workers, so that every decision is taken on the same numbers by all of them; random numbers are drawn alike everywhere.
A worker that waits for the others looks for their signs of life: one that is slow is waited for, one that is gone or
silent ends the run.

Workers are started by ``torchrun``, which sets the variables that :func:`start` reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from convexheads.errors import ConvexHeadsError, InputError, describe

BEAT_SECONDS = 2.0
"""How often a worker shows that it is alive."""
SILENCE_SECONDS = 30.0
"""Silence after which a worker is taken for lost."""
LOOK_SECONDS = 4.0
"""How long a worker waits for the others before it looks for their signs of life."""
_NEVER = timedelta(days=30)


class LostWorkerError(ConvexHeadsError):
    """Another process of the run has ended, or shows no sign of life."""


class World:
    """All the workers of a run, seen from one of them; this one is alone.

    Attributes
    ----------
    rank, size : number of this worker, from 0, and of all of them.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this worker is the one that writes files and prints."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """This worker's share of ``n`` consecutive samples; shares differ by one at most.

        Raises
        ------
        InputError
            If there are fewer samples than workers.
        """
        if n < self.size:
            raise InputError(describe(f"{n} samples for {self.size} workers", "at least one sample a worker"))
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all workers, added in float64; of the same dtype."""
        return tensor

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Several sums at once: one message instead of many."""
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = self.sum(torch.cat([t.reshape(-1).to(torch.float64) for t in tensors]))
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def total(self, value: float) -> float:
        """The sum of a number over all workers."""
        return value

    def every(self, here: bool) -> bool:
        """Whether something holds for every worker."""
        return self.total(0.0 if here else 1.0) == 0.0

    def least(self, tensor: Tensor) -> Tensor:
        """The smallest value over all workers, entry by entry."""
        return tensor

    def agree(self, value: Any) -> Any:
        """The first worker's value (plain JSON), for all."""
        return value

    def barrier(self) -> None:
        """Wait until every worker is here."""
        self.total(0.0)

    def first_to_say(self, message: str) -> bool:
        """True for one worker only, so that an error that all of them meet is told once."""
        return True


ALONE = World()
_CURRENT: World = ALONE


def current() -> World:
    """The world that fits are spread over; of one worker unless :func:`joined` is in force."""
    return _CURRENT


def launched() -> bool:
    """Whether this process was started as one of several workers."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


def local_device(name: str | torch.device) -> str | torch.device:
    """``name``, with ``auto`` and ``cuda`` meaning this worker's own accelerator where there are several."""
    if name in ("auto", "cuda") and launched() and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return name


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the other workers that ``torchrun`` has started: fits inside are spread over all of them.

    All workers must do the same things in the same order, on processors and library versions of the same kind. Started
    alone, a process stays alone.

    Raises
    ------
    LostWorkerError
        If the others do not show up, and, from whatever waits for them, when one is gone.
    """
    global _CURRENT
    if not launched():
        yield ALONE
        return
    world = _Workers()
    _CURRENT = world
    try:
        yield world
        world.barrier()
    finally:
        _CURRENT = ALONE
        world.close()


class _Workers(World):
    """The workers of a run started by torchrun, over gloo between processors and NCCL between GPUs."""

    def __init__(self) -> None:
        import torch.distributed as dist

        patience = timedelta(seconds=SILENCE_SECONDS)
        try:
            store, self.rank, self.size = next(dist.rendezvous("env://", timeout=patience))
            store.set_timeout(patience)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            # How long an operation may take is decided by signs of life, not by the clock.
            dist.init_process_group(
                backend, store=dist.PrefixStore("work", store), rank=self.rank, world_size=self.size, timeout=_NEVER
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise LostWorkerError(f"the workers of this run did not find each other ({reason})") from error
        self._dist, self._store = dist, dist.PrefixStore("life", store)
        self._stop = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._lost = False
        self._beat(0)
        threading.Thread(target=self._live, name="signs of life", daemon=True).start()
        self._previous = signal.signal(signal.SIGTERM, self._terminated) if _in_main_thread() else None
        self._nccl = self.every(self._has_own_accelerator())

    def _has_own_accelerator(self) -> bool:
        """NCCL takes no two workers on one GPU."""
        if not (torch.cuda.is_available() and self._dist.is_nccl_available()):
            return False
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) <= torch.cuda.device_count()

    # Signs of life ----------------------------------------------------------------------------------------

    def _beat(self, count: int) -> None:
        self._store.set(f"worker {self.rank}", str(count))

    def _live(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:  # the machine that keeps the record is gone: waiting workers notice
                return

    def _look(self) -> None:
        """Raise if a worker has shown no sign of life for too long."""
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            try:
                sign = self._store.get(f"worker {rank}")
            except RuntimeError as error:
                raise self._gone("the process that keeps the workers' record is gone") from error
            if self._seen.get(rank, (None, 0.0))[0] != sign:
                self._seen[rank] = (sign, now)
            elif now - self._seen[rank][1] > SILENCE_SECONDS:
                raise self._gone(f"no sign of life from worker {rank} for {SILENCE_SECONDS:.0f} s")

    def _gone(self, what: str) -> LostWorkerError:
        self._lost = True
        return LostWorkerError(
            f"a worker was lost ({what}). Start the same command again, with any number of workers: it goes on from "
            "what was saved"
        )

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if self._lost:  # on its way out already, with an error to tell
            return
        raise self._gone("this worker was told to stop, as torchrun does when another one has ended")

    def _finish(self, work: Any, on_gpu: bool) -> None:
        """Wait for an operation as long as the other workers live."""
        begin = time.monotonic()
        while True:
            if on_gpu and not work.is_completed():
                # A wait for NCCL that ends by its time limit would break the connections off.
                time.sleep(1e-4)
            elif self._waited(work, begin):
                return
            if time.monotonic() - begin > LOOK_SECONDS:
                begin = time.monotonic()
                self._look()

    def _waited(self, work: Any, begin: float) -> bool:
        """Wait some seconds for an operation; whether it is done."""
        try:
            work.wait(timedelta(seconds=LOOK_SECONDS))
        except RuntimeError as error:
            if work.is_completed() or time.monotonic() - begin < 0.5 * LOOK_SECONDS:
                raise self._gone("the connection to it was closed") from error
            return False
        return bool(work.is_completed())

    def _run(self, operation: Any, tensor: Tensor, **options: Any) -> None:
        try:
            work = operation(tensor, async_op=True, **options)
        except RuntimeError as error:
            raise self._gone("the connection to it was closed") from error
        self._finish(work, tensor.is_cuda)

    # Operations -------------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, self._dist.ReduceOp.SUM)

    def least(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, self._dist.ReduceOp.MIN)

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        # Devices without float64, and those that no backend serves, go through the processor.
        where = tensor.device if tensor.is_cuda and self._nccl else torch.device("cpu")
        whole = tensor.detach().to(where).to(torch.float64).contiguous().clone()
        self._run(self._dist.all_reduce, whole, op=how)
        return whole.to(tensor.dtype).to(tensor.device)

    def total(self, value: float) -> float:
        return float(self.sum(torch.tensor([value], dtype=torch.float64))[0])

    def agree(self, value: Any) -> Any:
        data = json.dumps(value).encode() if self.first else b""
        size = int(self.total(float(len(data))))
        held = torch.zeros(size, dtype=torch.uint8)
        if self.first:
            held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._run(self._dist.broadcast, held, src=0)
        return json.loads(bytes(held.tolist()))

    def first_to_say(self, message: str) -> bool:
        key = "lost" if self._lost else hashlib.sha256(message.encode()).hexdigest()
        try:
            return int(self._store.add(f"said {key}", 1)) == 1
        except RuntimeError:
            return True

    def close(self) -> None:
        """Leave the run."""
        self._stop.set()
        if self._lost:
            # torchrun is about to tell this worker to stop, which must not end it before it has told why.
            return
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        self._dist.destroy_process_group()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
