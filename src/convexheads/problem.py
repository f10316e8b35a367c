"""The convex program and its factored form: operators + loss + beta (+ intercept).

    minimise  f( sum_g A_g(Z_g) + 1 b^T ) + beta sum_g w_g ||Z_g||_*  (+ (beta w / 2) ||W||_F^2 for ridge branches)

and, with Z_g = sum_r u_r v_r^T, the network's weight-decay objective

    f( ... ) + (beta / 2) sum_g w_g sum_r (||u_r||^2 + ||v_r||^2)

which has the same minimum as soon as there are enough units.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from convexheads import memory
from convexheads.architectures import Stats
from convexheads.distributed import ALONE, World
from convexheads.errors import InputError, describe
from convexheads.evaluation import ALIVE, Evaluation, Sums, pull_units
from convexheads.losses import Loss, SharedLoss
from convexheads.operator import Component, split_rows
from convexheads.types import Factors, Units


class Rows(Protocol):
    """Tokens of one branch: rows can be sliced or indexed by an integer array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


LEAST_ROWS, LEAST_LOW_ROWS, FEWEST_ROWS = 1024, 5120, 256
"""Samples a chunk at least of heads whose evaluation is products: of numbers of four bytes, and of fewer. Only the
last is sure where temporaries of so many would be blocks that are mapped anew each time."""
LOW_ROWS = 2.5
"""Elsewhere a chunk of numbers of fewer bytes has so many times as many."""
MOST_ROWS = 8192
GAMMA_WORKSPACE = 2**21  # the same where Gamma is formed: wide products take more to be fast
GAMMA_SAMPLES = 256  # samples a chunk there

ROUNDING = 1e-13
"""Largest sum of a dual point that is taken for rounding."""
INTERCEPT_STEPS, LEAST_STEP = 60, 1e-8
"""Newton steps for an intercept at most, and the least share of one ..."""
CHORD = 0.2
"""... by one Hessian as long as each leaves no more than this share of the gradient."""
NEGLIGIBLE = 1e-28
"""Share of the mean squared target that an objective is rounding below: a multiple of eps squared."""


class KeptRows(Protocol):
    """Rows of a statistic of all samples: a tensor, or a temporary file."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


Buffers = defaultdict[tuple[int, int], memory.Buffer]
"""Of every statistic of every component what its rows are read into."""


def pass_buffers() -> Buffers:
    """Those of one pass, which allocates each once."""
    return defaultdict(memory.Buffer)


def _held_bytes(cache: Mapping[Any, Sequence[Sequence[Any]] | None]) -> int:
    """Bytes of the statistics of a cache that are in memory."""
    tensors = [t for whole in cache.values() for stats in whole or [] for t in stats if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def write_rows(into: Any, index: slice, rows: Tensor) -> None:
    """``into[index] = rows``, of any dtype, for a tensor or a temporary file."""
    if isinstance(into, memory.FileRows):
        into.write(index.start, rows)
    else:
        into[index] = rows


def take_rows(source: Any, index: slice | Tensor, buffer: memory.Buffer | None = None) -> Tensor:
    """``source[index]``: a tensor itself where that is all of it, else by the kernel that copies whole rows.

    For rows by number it is several times faster. Rows of a file are read into the ``buffer``, if there is one.
    """
    if isinstance(source, memory.FileRows):
        return source.read(index, buffer)
    if isinstance(source, Tensor):
        if isinstance(index, Tensor):
            return source.index_select(0, index.to(source.device))
        if index == slice(0, len(source)):
            return source
    return source[index]


def positive(beta: float) -> float:
    """A weight decay that the program is bounded with; InputError if it is none.

    Zero is what a share of beta_max comes to where no head is better than none: constant targets, dead gates.
    """
    if not (math.isfinite(beta) and beta > 0):
        fix = "A share of beta_max is zero where targets are constant or gates shut all tokens out: give beta itself."
        raise InputError("beta: " + describe(repr(float(beta)), "a positive number", fix))
    return float(beta)


class Problem:
    """A convex program on given tokens.

    Parameters
    ----------
    components : channel groups of all branches, in order.
    tokens : for each branch, its tokens (n, s, d): anything that slices into arrays or tensors.
    loss, targets, weights : the loss, its targets (shape of the outputs) and sample weights (n,) that sum to one.
    beta : weight decay.
    fit_intercept : whether an unpenalised intercept in R^c is added to every output row.
    dtype : dtype of the iterations; certificates use float64 whatever this is.
    cache_bytes : most bytes of statistics of the samples that are kept in memory; more are kept in a temporary file,
        or computed again where there is no room for one. None: what the memory limit in force leaves to them.
    world : the workers that the samples are spread over. Tokens, targets and weights are those of this worker's
        samples, in the order of the workers; weights sum to one over all of them. Outputs and dual points are local,
        all that is summed over samples is summed over the workers too.

    Attributes
    ----------
    n, local, start : samples in all, samples here, and number of the first one here.
    negligible : objectives below this are zero: what is left of constant targets, say.
    own_loss : the loss without the other workers' samples: for parts of the samples.
    low : dtype of the factors of matrix products in the objective's gradient; None: that of the variables.

    Raises
    ------
    InputError : where beta is not a positive number.
    """

    def __init__(
        self,
        components: list[Component],
        tokens: list[Rows],
        loss: Loss,
        targets: Tensor,
        weights: Tensor,
        beta: float = 1.0,
        fit_intercept: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_bytes: int | None = None,
        world: World = ALONE,
    ) -> None:
        self.tokens, self.world = tokens, world
        self.own_loss: Loss = loss
        self.loss: Loss = loss if world.size == 1 else SharedLoss(loss, world)
        self.device = torch.device(device)
        self.components = [component.to(self.device) for component in components]
        self.targets = targets.to(self.device, torch.float64)
        self.weights = weights.to(self.device, torch.float64)
        self.beta, self.fit_intercept, self.dtype = positive(beta), fit_intercept, dtype
        self.low: torch.dtype | None = None
        self.local = len(self.targets)
        self.n = round(world.total(self.local))
        self.start = world.rows(self.n).start
        size = self.targets.reshape(self.local, -1).square().sum(1) @ self.weights
        self.negligible = max(1e-300, NEGLIGIBLE * world.total(float(size)))
        self.budget = memory.current().on(self.device)
        self.cache_bytes = self.budget.cache if cache_bytes is None else cache_bytes
        self.spill = self.device.type == "cpu"
        self._cache: dict[torch.dtype, list[tuple[KeptRows, ...]] | None] = {}
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._stats_bytes: int | None = None
        self._null: dict[str, Tensor] = {}  # of the empty head, which no beta and no component changes

    @property
    def outputs(self) -> int:
        return self.targets.shape[-1]

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no chunk makes smaller, about: of the size of the outputs, or of one block."""
        # Targets, outputs, dual point, and a few temporaries of their size, in float64.
        outputs = 8 * 8 * self.targets.numel()
        # A block's Gamma and its Gram matrix with its factor; the Krylov search holds less.
        blocks = [(max(1, c.p), c.q) for c in self.components if not c.ridge]
        return outputs + max((8 * (3 * p * q + 2 * min(p, q) ** 2) for p, q in blocks), default=0)

    @property
    def wide_products(self) -> bool:
        """Whether evaluations are large products throughout."""
        return all(c.form.products_only for c in self.components)

    def with_beta(self, beta: float) -> Problem:
        """The same program at another beta, sharing tokens and cached statistics."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        other.beta = positive(beta)
        return other

    def with_components(self, components: list[Component]) -> Problem:
        """Other components on the same tokens, targets and beta; statistics are not shared."""
        other = self.with_beta(self.beta)
        other.components, other._cache = [component.to(self.device) for component in components], {}
        other._stats_bytes = None
        return other

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        """The same program with iterations in another dtype, sharing tokens and caches."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        other.dtype = dtype
        return other

    def in_low_precision(self, low: torch.dtype | None) -> Problem:
        """The same program with the matrix products of its gradient in ``low`` precision, and sums in full precision.

        The same object where ``low`` is None, where a head takes more than products, or where memory has no room for
        its statistics in low precision as well.
        """
        whole = None
        if low is not None and self.wide_products and self.budget.roomy:
            whole = self.low_stats(low)
        if whole is None:
            return self
        other = self.in_dtype(self.dtype)
        other.low = low
        return other

    def low_stats(self, low: torch.dtype) -> list[tuple[KeptRows, ...]] | None:
        """Statistics rounded to ``low`` precision from those that are kept; None where there is no room for both."""
        if low not in self._cache:
            whole = self._cached_stats(self.dtype)
            if whole is None or not all(t.dtype.is_floating_point for stats in whole for t in stats):
                return None
            like = [tuple(t[:1].to(low) for t in stats) for stats in whole]
            spill = self.budget.limit is not None or any(isinstance(t, memory.FileRows) for s in whole for t in s)
            found = self._kept_rows(like, spill)
            if found is None:
                return None
            step = self.chunk_rows(dtype=self.dtype)
            self._fill(found, step, lambda index: self.stats_of(index, self.dtype))
            self._cache[low] = found
        return self._cache[low]

    def gradient_work(self, factors: Factors) -> int:
        """Multiplications a sample that the objective's gradient takes, about."""
        return sum(len(units.v) * c.gradient_work for c, units in zip(self.components, factors.units, strict=True))

    def penalty_weight(self, component: Component) -> float:
        return self.beta * component.weight

    # Tokens and statistics --------------------------------------------------------------------------------

    def tokens_of(self, branch: int, index: slice | Tensor) -> Tensor:
        """Tokens (rows, s, d) of a branch, on the problem's device."""
        source = self.tokens[branch]
        part = source[index if isinstance(index, slice) or isinstance(source, Tensor) else index.cpu().numpy()]
        return torch.as_tensor(part).to(self.device)

    def _fresh_stats(self, index: slice | Tensor, dtype: torch.dtype) -> list[Stats]:
        tokens: dict[int, Tensor] = {}
        found = []
        for component in self.components:
            if component.branch not in tokens:
                tokens[component.branch] = self.tokens_of(component.branch, index)
            found.append(component.stats(tokens[component.branch], dtype))
        return found

    def _cached_stats(self, dtype: torch.dtype) -> list[tuple[KeptRows, ...]] | None:
        """Statistics of all samples, in memory or in a temporary file; None where there is no room for either."""
        if dtype not in self._cache:
            step = min(self.chunk_rows(fresh=True, dtype=dtype), self.local)
            first = self._fresh_stats(slice(0, step), dtype)
            self._cache[dtype] = whole = self._kept_rows(first, self.spill)
            if whole is not None:
                self._fill(whole, step, lambda index: self._fresh_stats(index, dtype))
        return self._cache[dtype]

    def _fill(self, rows: list[tuple[Any, ...]], step: int, stats_of: Callable[[slice], list[Stats]]) -> None:
        """Write the statistics of all samples into ``rows``, of any dtype, ``step`` samples at a time."""
        for index in self.passing(step):
            for target, stats in zip(rows, stats_of(index), strict=True):
                for into, part in zip(target, stats, strict=True):
                    write_rows(into, index, part)

    def _kept_rows(self, like: list[Stats], spill: bool) -> list[tuple[Any, ...]] | None:
        """Empty rows for statistics of all samples: the smallest in memory, those that ``spill`` in temporary files.

        None where not all fit into memory, and they may not spill or there is no room for files.
        """
        sizes = [math.prod(t.shape[1:]) * t.element_size() * self.local for stats in like for t in stats]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        totals = itertools.accumulate(sizes[i] for i in order)
        spilled = {i for i, total in zip(order, totals, strict=True) if not self.has_room(total)}
        folder = self.file_folder(sum(sizes)) if spilled and spill else None
        if spilled and folder is None:
            return None
        numbers = itertools.count()

        def rows(t: Tensor) -> Any:
            shape = (self.local, *t.shape[1:])
            if next(numbers) in spilled and folder is not None:
                return memory.FileRows(shape, t.dtype, folder)
            return torch.empty(shape, dtype=t.dtype, device=t.device)

        return [tuple(rows(t) for t in stats) for stats in like]

    def has_room(self, size: int) -> bool:
        """Whether ``size`` bytes fit into memory beside the statistics that are kept."""
        return size <= self.cache_bytes - _held_bytes(self._cache)

    def file_folder(self, size: int) -> Path | None:
        """A folder with room for a temporary file of ``size`` bytes; None where there is none, or no use for one."""
        near = next(filter(None, map(memory.folder_of, self.tokens)), None)
        return memory.roomy_folder(near, size) if self.spill else None

    def forget(self, dtype: torch.dtype | None = None) -> None:
        """Free the cached statistics, or only those of one dtype."""
        if dtype is None:
            self._cache.clear()
        else:
            self._cache.pop(dtype, None)

    def chunk_rows(self, n_units: int = 32, fresh: bool = False, dtype: torch.dtype = torch.float32) -> int:
        """Samples a chunk, so that the temporaries of ``n_units`` units stay small.

        ``fresh`` where the chunk's statistics are computed too: every gate needs room for its own.
        """
        work, own = self._workspace(n_units)
        suited = min(MOST_ROWS, max(memory.WORKSPACE, self.budget.workspace) // max(1, work, own * fresh))
        if self.budget.limit is None:
            return max(16, suited)
        return max(1, min(suited, self._most_rows(n_units, fresh, dtype)))

    def _workspace(self, n_units: int) -> tuple[int, int]:
        """Numbers of a sample in a temporary of ``n_units`` units, and in what is computed of it for all gates."""
        work = max(component.form.workspace for component in self.components) * n_units
        gated = [c for c in self.components if c.gates is not None]
        return work, max((c.form.tokens * (c.form.tokens + c.form.features) * c.n_gates for c in gated), default=0)

    def _most_rows(self, n_units: int, fresh: bool, dtype: torch.dtype) -> int:
        """Samples a chunk that there is memory for, where it is limited."""
        work, own = self._workspace(n_units)
        # What is read of a sample counts as well, however few the units.
        read = self.stats_bytes * dtype.itemsize // 4
        if fresh:
            read += 3 * dtype.itemsize * sum(c.form.tokens * c.form.features for c in self.components)
        held = ALIVE * (work + own * fresh) * dtype.itemsize + read
        return max(1, self.budget.chunk(self.fixed_bytes + _held_bytes(self._cache)) // held)

    @property
    def stats_bytes(self) -> int:
        """Bytes of the statistics of one sample in float32."""
        if self._stats_bytes is None:
            stats = self._fresh_stats(slice(0, 1), torch.float32)
            self._stats_bytes = sum(t.numel() * t.element_size() for each in stats for t in each)
        return self._stats_bytes

    def pass_rows(self, dtype: torch.dtype, n_units: int, cached: bool = True) -> int:
        """Samples a chunk of a pass with ``n_units`` units, whether it reads their statistics or computes them.

        More where numbers take half of the bytes: what a chunk costs besides products counts more there. And products
        of few rows are slow, however many their columns.
        """
        fresh = not cached or self._cached_stats(dtype) is None
        rows = self.chunk_rows(n_units, fresh, dtype)
        low = dtype.itemsize < 4
        least = 0
        if self.wide_products:
            bytes_each = self._workspace(n_units)[0] * dtype.itemsize
            lasting = (memory.MOST_MAPPED - 1) // max(1, bytes_each)
            least = max(FEWEST_ROWS, min(LEAST_LOW_ROWS if low else LEAST_ROWS, lasting))
        rows = max(int(LOW_ROWS * rows) if low else rows, least)
        return rows if self.budget.limit is None else min(rows, self._most_rows(n_units, fresh, dtype))

    def stats_of(
        self, index: slice | Tensor, dtype: torch.dtype, cached: bool = True, buffers: Buffers | None = None
    ) -> list[Stats]:
        """Statistics of some samples for every component.

        With the ``buffers`` of a pass those that are read from files are there until the next chunk is.
        """
        whole = self._cached_stats(dtype) if cached else None
        if whole is None:
            return self._fresh_stats(index, dtype)
        if buffers is None:
            return [tuple(take_rows(t, index) for t in stats) for stats in whole]
        return [
            tuple(take_rows(t, index, buffers[k, place]) for place, t in enumerate(stats))
            for k, stats in enumerate(whole)
        ]

    def in_files(self, dtype: torch.dtype) -> bool:
        """Whether statistics of the samples here are in temporary files."""
        whole = self._cached_stats(dtype)
        return whole is not None and any(isinstance(t, memory.FileRows) for stats in whole for t in stats)

    def targets_of(self, index: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Targets and sample weights of some samples."""
        if dtype not in self._cast:
            self._cast[dtype] = (self.targets.to(dtype), self.weights.to(dtype))
        targets, weights = self._cast[dtype]
        return take_rows(targets, index), take_rows(weights, index)

    def own_samples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of samples numbered over all workers, those of this one: numbered from its first one; and their places."""
        if self.world.size == 1:
            return index, torch.arange(len(index), device=index.device)
        place = ((index >= self.start) & (index < self.start + self.local)).nonzero()[:, 0]
        return index[place] - self.start, place

    def chunks(
        self, dtype: torch.dtype, n_units: int = 32, cached: bool = True, rows: int | None = None
    ) -> Iterator[tuple[slice, list[Stats]]]:
        """Chunks of ``rows`` samples with their statistics; None: as many as suit a pass with ``n_units`` units.

        The statistics of one chunk are gone when the next one comes.
        """
        buffers = pass_buffers()
        for index in self.passing(self.pass_rows(dtype, n_units, cached) if rows is None else rows):
            yield index, self.stats_of(index, dtype, cached, buffers)
        for stats in self._cache.get(dtype) or []:
            for t in stats:
                if isinstance(t, memory.FileRows):
                    t.release()

    def passing(self, step: int) -> Iterator[slice]:
        """The parts of a pass over the samples here, ``step`` at a time."""
        yield from self.budget.passing(split_rows(self.local, step))
        self.budget.trim()

    # Forward ----------------------------------------------------------------------------------------------

    def combine(self, factors: Factors, features: list[Tensor], rows_shape: torch.Size) -> Tensor:
        """Outputs from the unit features of every component."""
        parts = zip(self.components, features, factors.units, strict=True)
        return self.assemble([c.forward(T, units.v) for c, T, units in parts], factors.intercept, rows_shape)

    def assemble(self, parts: list[Tensor], intercept: Tensor | None, rows_shape: torch.Size) -> Tensor:
        """Outputs from those of every component, (rows, width) each."""
        if len(parts) == 1:
            O = parts[0]
        else:
            O = parts[0].new_zeros(len(parts[0]), self.outputs)
            for component, part in zip(self.components, parts, strict=True):
                O[:, component.outputs] += part
        if self.low is not None:
            O = O.to(self.dtype)
        if intercept is not None:
            O = O + intercept
        return O.view(*rows_shape, self.outputs)

    @torch.no_grad()
    def forward(self, factors: Factors, dtype: torch.dtype | None = None, cached: bool = True) -> Tensor:
        """Outputs O (shape of the targets) on all samples."""
        dtype = self.dtype if dtype is None else dtype
        factors = factors.to(dtype)
        O = torch.empty(self.targets.shape, dtype=dtype, device=self.device)
        evaluation = Evaluation(self, factors)
        rows = evaluation.rows(dtype, cached)
        fast = evaluation.products(rows, learns=False)
        for index, stats in self.chunks(dtype, cached=cached, rows=rows):
            with fast(index.stop - index.start):
                O[index] = evaluation.outputs(evaluation.parts(stats), O[index].shape[:-1])
        return O

    # Objective --------------------------------------------------------------------------------------------

    def weight_decay(self, factors: Factors) -> float:
        """(beta/2) sum_h w_h (||u||^2 + ||v||^2), summed in float64."""
        total = 0.0
        for component, units in zip(self.components, factors.units, strict=True):
            squares = sum(float(t.double().square().sum()) for t in units.tensors())
            total += 0.5 * self.penalty_weight(component) * squares
        return total

    @torch.no_grad()
    def value(self, factors: Factors, dtype: torch.dtype | None = None) -> float:
        """The network's objective: loss + weight decay."""
        dtype = self.dtype if dtype is None else dtype
        O = self.forward(factors, dtype)
        return self.loss.value(O, *self.targets_of(slice(0, self.n), dtype)) + self.weight_decay(factors)

    def add_decay(self, factors: Factors, gradient: Factors) -> None:
        """Add the gradient of the weight decay."""
        for component, units, g in zip(self.components, factors.units, gradient.units, strict=True):
            for t, into in zip(units.tensors(), g.tensors(), strict=True):
                into.add_(t, alpha=self.penalty_weight(component))

    def value_and_gradient(self, factors: Factors) -> tuple[float, Factors]:
        """The network's objective and its gradient with respect to every variable."""
        value, gradient = self.flat_value_and_gradient(factors, factors.flat())
        return value, factors.like(gradient)

    @torch.no_grad()
    def flat_value_and_gradient(self, shapes: Factors, x: Tensor) -> tuple[float, Tensor]:
        """The same at the variables ``x``, one vector of the ``shapes`` of factors; the gradient is one as well."""
        flat, total = torch.zeros_like(x), 0.0
        evaluation = Evaluation(self, shapes.like(x), shapes.like(flat), self.low)
        kept = self.low or x.dtype
        rows = evaluation.rows(kept)
        fast = evaluation.products(rows)
        for index, stats in self.chunks(kept, rows=rows):
            with fast(index.stop - index.start):
                total += evaluation.add(stats, *self.targets_of(index, x.dtype))
        evaluation.close()
        total, flat = self.summed(total, flat)
        return total + self.flat_decay(shapes, x, flat), flat

    def flat_decay(self, shapes: Factors, x: Tensor, gradient: Tensor) -> float:
        """The weight decay of the variables ``x``, summed in float64; its gradient is added to ``gradient``."""
        total, start = 0.0, 0
        for component, units in zip(self.components, shapes.units, strict=True):
            weight, size = self.penalty_weight(component), sum(t.numel() for t in units.tensors())
            own = x[start : start + size]
            gradient[start : start + size].add_(own, alpha=weight)
            exact = own.double()
            total += 0.5 * weight * float(exact @ exact)
            start += size
        return total

    def summed(self, value: float, gradient: Tensor) -> tuple[float, Tensor]:
        """A value and a gradient, one vector, summed over the workers."""
        if self.world.size == 1:
            return value, gradient
        held = torch.tensor([value], dtype=torch.float64, device=gradient.device)
        whole, total = self.world.sum_all([gradient, held])
        return float(total[0]), whole

    # Intercept --------------------------------------------------------------------------------------------

    def best_intercept(self, O: Tensor, start: Tensor | None = None, accuracy: float | None = None) -> Tensor:
        """The b in R^c that minimises f(O + 1 b^T), by Newton's method with step halving.

        O (n, c) or (n, s, c) outputs without intercept. Flat directions (softmax does not see a common shift) are
        left alone. Ends where no entry of the gradient with respect to b, sum_i L_i, is above ``accuracy``; None: where
        it is rounding, and another step no longer halves it.
        """
        targets, weights = self.targets_of(slice(0, self.n), O.dtype)
        axes = tuple(range(O.ndim - 1))

        def evaluate(b: Tensor) -> tuple[float, Tensor]:
            value, L = self.loss.value_and_gradient(O + b, targets, weights)
            return value, self.world.sum(L.sum(axes))

        b = torch.zeros(self.outputs, dtype=O.dtype, device=O.device) if start is None else start.to(O.dtype)
        value, gradient = evaluate(b)
        best, slack = math.inf, 4.5 * torch.finfo(O.dtype).eps
        inverse, fresh = None, False
        for _ in range(INTERCEPT_STEPS):
            size = float(gradient.abs().max())
            done = size < ROUNDING and size >= 0.5 * best if accuracy is None else size <= accuracy
            if size == 0.0 or done:
                break
            # The start is next to the minimiser as a rule: a Hessian serves as long as it brings the gradient down.
            if inverse is None or size > CHORD * best:
                inverse, fresh = self._newton_inverse(self.loss.mean_hessian(O + b, targets, weights)), True
            best = min(best, size)
            step = inverse @ gradient
            scale = 1.0
            while scale >= (LEAST_STEP if fresh else 1.0):
                trial = b - scale * step
                new, slope = evaluate(trial)
                if new <= value + slack * abs(value):
                    b, value, gradient, fresh = trial, new, slope, False
                    break
                scale *= 0.5
            else:
                if fresh:
                    break
                inverse = None
        return b

    def _newton_inverse(self, hessian: Tensor) -> Tensor:
        """The inverse of an intercept's Hessian (c, c), without its flat directions."""
        exact = hessian.double()
        if self.loss.shift_free:
            # A common shift is flat: as the rounding of float32 has it, its inverse would be a jump along it.
            exact = exact + exact.diagonal().mean()
        return torch.linalg.pinv(exact, hermitian=True, rtol=1e-12).to(hessian.dtype)

    def null_outputs(self) -> tuple[Tensor, Tensor | None]:
        """Outputs O_0 of the empty head, and its intercept: zero, or the best constant."""
        O = torch.zeros(self.targets.shape, dtype=torch.float64, device=self.device)
        if not self.fit_intercept:
            return O, None
        if "intercept" not in self._null:
            self._null["intercept"] = self.best_intercept(O, *self._best_constant())
        b = self._null["intercept"]
        return O + b, b

    def _best_constant(self) -> tuple[Tensor | None, float | None]:
        """The best constant in closed form, where there is one, and how far Newton goes from there."""
        rows = self.targets.reshape(self.local, -1, self.outputs)
        sums = self.world.sum(torch.cat([self.weights @ rows.sum(1), self.weights.sum()[None]]))
        found = self.loss.best_constant(sums[:-1] / (sums[-1] * rows.shape[1]))
        return found, None if found is None else ROUNDING

    def null_loss(self) -> float:
        """The loss of the empty head."""
        if "loss" not in self._null:
            O, _ = self.null_outputs()
            value = self.loss.value(O, *self.targets_of(slice(0, self.n), torch.float64))
            self._null["loss"] = torch.tensor(value, dtype=torch.float64)
        return float(self._null["loss"])

    def null_gradient(self) -> Tensor:
        """The gradient of the loss at the empty head's outputs, of their shape; zero where it is rounding.

        A weight decay taken from rounding would be none.
        """
        O, _ = self.null_outputs()
        targets, weights = self.targets_of(slice(0, self.n), torch.float64)
        L = self.loss.gradient(O, targets, weights)
        size = (O.abs() + targets.abs()).reshape(self.local, -1).sum(1) @ weights
        noise = 8.0 * torch.finfo(torch.float64).eps
        total, rounding = self.world.sum(torch.stack([L.abs().sum(), noise * size]))
        return torch.zeros_like(L) if total <= rounding else L

    # Adjoints ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def adjoint(
        self,
        L: Tensor,
        units: list[Units],
        only: Callable[[Component], bool] = lambda component: True,
        sides: Literal["both", "left", "right"] = "both",
        low: torch.dtype | None = None,
    ) -> list[Units]:
        """For every unit (u, v): (Gamma v, Gamma^T u), the adjoint applied to both of its factors.

        ``sides`` "left" asks for Gamma v only and "right" for Gamma^T u only: the others are zero then, but for ridge
        branches, and their products are saved. Components not in ``only`` get zeros. ``low`` is the precision that
        factors of products are rounded to, if statistics can be; sums have that of L.
        """
        dtype = L.dtype
        found = [
            Units(None if each.u is None else torch.zeros_like(each.u), torch.zeros_like(each.v), each.gate)
            for each in units
        ]
        count = max(1, sum(each.v.shape[0] for each in units))
        if low is not None and self.in_low_precision(low) is not self:
            dtype, L, units = low, L.to(low), [each.to(low) for each in units]
        sums = Sums()
        for index, stats in self.chunks(dtype, count):
            rows = L[index].reshape(-1, self.outputs)
            for component, stat, each, into in zip(self.components, stats, units, found, strict=True):
                if not only(component) or not len(each.v):
                    continue
                if sides == "right" or each.u is None:
                    sums.add(into.v, component.adjoint_v(component.features(stat, each), rows[:, component.outputs]))
                    continue
                if sides == "both":
                    part = component.features_and_pullback(stat, each)
                    pull_units(component, each, *part, rows[:, component.outputs], into, sums)
                elif into.u is not None:
                    sums.add(into.u, component.adjoint_u(stat, each, rows[:, component.outputs]))
        sums.close()
        return self._summed_units(found)

    def _summed_units(self, units: Sequence[Units]) -> list[Units]:
        whole = iter(self.world.sum_all([t for each in units for t in each.tensors()]))
        return [Units(None if each.u is None else next(whole), next(whole), each.gate) for each in units]

    @torch.no_grad()
    def gamma(self, L: Tensor, k: int, gate: int | None, dtype: torch.dtype = torch.float64) -> Tensor:
        """Gamma_g = A_g^* L of component ``k`` and ``gate``, formed explicitly: (p, q), or (k, c) for ridge."""
        component = self.components[k]
        if component.ridge:
            return self._ridge_gamma(L, k, dtype)
        p = component.p
        size = component.form.adjoint_size
        # Enough samples for the products to be large ones, then as many rows of Gamma at a time as fit.
        workspace = self._gamma_workspace()
        if self.budget.limit is None:
            step = max(16, min(16 * self._gate_rows(1, dtype), GAMMA_SAMPLES))
            step = max(step, min(4096, int(workspace / size)))
        else:
            # What is summed up takes two copies of a chunk's.
            units = max(4, math.ceil(2 * size / (ALIVE * component.form.workspace)))
            step = max(1, min(self._gate_rows(units, dtype), max(16, int(workspace / size))))
        unit = component.form.row_step
        bands = max(1, math.ceil(step * size / workspace))
        band = math.ceil(p / (bands * unit)) * unit
        total = torch.empty(p, component.q, dtype=dtype, device=self.device)
        for rows in split_rows(p, band):
            part: Tensor | None = None
            for index, stats, g in self._gate_stats(k, gate, dtype, step):
                own = L[index].to(dtype).reshape(-1, self.outputs)[:, component.outputs]
                part = component.form.distinct_adjoint(stats, own, g, rows, part)
            assert part is not None
            found = component.form.spread(part)
            total[rows].view(found.shape).copy_(found)
        return self.world.sum(total)

    def gammas(self, L: Tensor, k: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int | None, Tensor]]:
        """Every gate of component ``k`` with its :meth:`gamma`; in one pass where the form shares the gates' work."""
        component = self.components[k]
        if not component.form.joint or component.n_gates * component.p * component.q > self._gamma_workspace():
            for gate in self.gates_of(k):
                yield gate, self.gamma(L, k, gate, dtype)
            return
        yield from enumerate(self._joint_gammas(L, k, dtype))

    def _gamma_workspace(self) -> int:
        own = 2 * self.budget.workspace
        return max(GAMMA_WORKSPACE, own) if self.budget.limit is None else own

    @torch.no_grad()
    def _joint_gammas(self, L: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """Gamma_g of all gates: (P, p, q)."""
        component = self.components[k]
        total = torch.zeros(component.n_gates, component.p, component.q, dtype=dtype, device=self.device)
        kept = self._gate_cache(dtype) is not None
        # Tokens that every gate selects from are formed with the statistics; what is left takes the smaller factor.
        numbers = component.n_gates * (min(component.p, component.width) if kept else component.p)
        step = max(1, self.budget.workspace // numbers)
        if self.budget.limit is not None:
            step = min(step, self._gate_rows(4, dtype))
        for index, stats, _ in self._gate_stats(k, None, dtype, step):
            own = L[index].to(dtype).reshape(-1, self.outputs)[:, component.outputs]
            total += component.form.joint_adjoint(stats, own)
        return self.world.sum(total)

    def _gate_stats(
        self, k: int, gate: int | None, dtype: torch.dtype, step: int
    ) -> Iterator[tuple[slice, Stats, int | None]]:
        """Statistics of one component for one of its gates, chunk by chunk, with the gate's index in them."""
        component = self.components[k]
        single = component.only_gate(gate)
        cached, buffers = self._gate_cache(dtype), pass_buffers()
        for index in self.passing(step):
            if cached is not None:
                yield index, tuple(take_rows(t, index, buffers[k, place]) for place, t in enumerate(cached[k])), gate
            else:
                yield index, single.stats(self.tokens_of(component.branch, index), dtype), None if gate is None else 0

    def _gate_cache(self, dtype: torch.dtype) -> list[tuple[KeptRows, ...]] | None:
        """The statistics that Gamma is formed from, in the dtype of the iterations; None where they are made anew."""
        return self._cached_stats(dtype) if dtype == self.dtype else None

    def _gate_rows(self, n_units: int, dtype: torch.dtype) -> int:
        """Samples that the statistics of a chunk may be taken of, beside temporaries of so many units."""
        return self.chunk_rows(n_units, self._gate_cache(dtype) is None, dtype)

    def _ridge_gamma(self, L: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        component = self.components[k]
        total = torch.zeros(component.form.value_width, component.width, dtype=dtype, device=self.device)
        units = Units(None, total.new_empty(1, component.form.value_width, component.width))
        for index, stats, _ in self._gate_stats(k, None, dtype, self._gate_rows(4, dtype)):
            own = L[index].to(dtype).reshape(-1, self.outputs)[:, component.outputs]
            total += component.adjoint_v(component.features(stats, units), own)[0]
        return self.world.sum(total)

    def gates_of(self, k: int) -> list[int | None]:
        """The gate indices of component ``k``: [None] where there is no gate."""
        component = self.components[k]
        return [None] if component.gates is None else list(range(len(component.gates)))
