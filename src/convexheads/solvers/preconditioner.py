"""Block-diagonal preconditioner for the factored objective.

The Gauss-Newton matrix of f( sum_j T(u_j) v_j + b ) is approximated by one block for v and one for u of every
component (in the spirit of K-FAC: Martens and Grosse 2015):

* v, after the intercept b is eliminated: (sum_i a_i t_i t_i^T) (x) (mean Hessian of the loss) + beta w I, which is
  exact for losses of constant curvature; for others, where there are many rows t_i of features, one moment an output,
  in which the rows that matter most are exact (:class:`OutputwiseInverse`);
* u: the second moment of per-sample gradients, with residuals drawn so that their second moment is the Hessian;
  in full where it is small, else as left (x) right / trace over u seen as a matrix.

Rows t_i of features count from their mean, weighted by curvature, where there is an intercept: tokens with a constant
entry make features that are all but collinear with it, and blocks that know nothing of each other would take each
for as stiff as both are together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from convexheads.architectures import Stats
from convexheads.distributed import World
from convexheads.memory import WORKSPACE
from convexheads.operator import split_rows
from convexheads.problem import Problem, take_rows
from convexheads.products import add_moment, column_squares, rough_products
from convexheads.solvers.cores import Cores
from convexheads.solvers.inverses import KroneckerInverse, OutputwiseInverse, by_group, damped_inverse
from convexheads.subspace import OutsidePairs
from convexheads.types import Factors, Units

FULL_SIZE, FEW_FULL_SIZE = 1024, 512
"""Numbers of a component's u up to which its moment is taken in full; the second one where there are few rows of
features, so that its eigendecomposition would take longer than all iterations."""
GROUP_SIZE = 1024
SAMPLES = 1024
"""Samples that moments are taken over."""
MOST_SAMPLES = 4096
"""The same where they cost little: gradients of ``CHEAP_NUMBERS`` at most in all ..."""
CHEAP_NUMBERS = 2**23
CHEAP_WORK = 25 * 10**8
"""... and more where moments of the features take no more multiplications than this ..."""
MOST_OUTPUTS = 2**24
"""... and their outputs are no more numbers than this."""
LEAST_COUNTED = 16
"""Units that a chunk has room for at least where memory is limited, however few there are."""
FEW_ROWS = 1000
"""Rows of features below which all outputs have the mean moment: with so few an iteration is all overhead."""
HEAVY = 64
"""Rows of an output's moment that are exact ..."""
HEAVY_NUMBERS = 2**25
"""... and the most numbers that those of all outputs hold."""
COMBINATIONS = 3
"""Random combinations of the rows of a sample's gradient that stand for all of them."""
ROWS_PER_COLUMN = 6
"""Such combinations that a Kronecker factor of u is estimated from, per column: more cost time and change little ..."""
CHEAP_ROWS = 2**20
"""... but where gradients of more samples hold no more numbers than this, they are taken."""


def group_size(problem: Problem, columns: int) -> int:
    """Largest side of the moment matrices of so many columns; smaller where memory is limited."""
    limit = problem.budget.limit
    if limit is None:
        return GROUP_SIZE
    # One matrix with its eigenvectors, and the moments, eigenvectors and scales of all groups together.
    return max(16, min(GROUP_SIZE, isqrt(limit // 256), limit // (128 * max(1, columns))))


def feature_groups(problem: Problem, units: Units) -> list[int]:
    """Groups of whole units whose stacked features stay small enough for an eigendecomposition: columns of each."""
    m, k = units.v.shape[:2]
    per = max(1, group_size(problem, m * k) // k)
    # As even as can be: the work is that of the largest one. Without units it has no columns.
    count = max(1, -(-m // per))
    return [k * (m * (i + 1) // count - m * i // count) for i in range(count)]


def sample_count(problem: Problem, factors: Factors) -> int:
    """Samples that moments are taken over."""
    numbers = max((units.u.numel() for units in factors.units if units.u is not None), default=1)
    count = min(MOST_SAMPLES, max(SAMPLES, CHEAP_NUMBERS // max(1, numbers)))
    work = sum(size * size for units in factors.units for size in feature_groups(problem, units))
    outputs = problem.targets[:1].numel()
    limit = problem.budget.limit
    most = MOST_OUTPUTS if limit is None else min(MOST_OUTPUTS, limit // 64)
    return min(problem.n, max(count, min(CHEAP_WORK // max(1, work), most // outputs)))


@dataclass
class Samples:
    """The samples that moments are taken over: those of this worker, out of ``count`` of all workers.

    ``index`` are their numbers here, ``place`` their places among all of them; with targets, weights that sum to one
    over all workers, and white noise of the shape of the targets. ``outputs`` are those of the head, where they are not
    of the units at hand alone.
    """

    index: Tensor
    place: Tensor
    count: int
    targets: Tensor
    weights: Tensor
    noise: Tensor
    outputs: Tensor | None

    @property
    def rows(self) -> int:
        """Rows of outputs a sample."""
        return self.targets.shape[1:-1].numel()

    @property
    def few(self) -> bool:
        """Whether they have few rows of features, of all workers."""
        return self.count * self.rows < FEW_ROWS


class Preconditioner:
    """Inverse of the approximate Gauss-Newton matrix at given factors; applied to whole gradients.

    Parameters
    ----------
    outside : pairs outside the units of every block, near an optimum: then the directions that are soft there have
        their own part (:mod:`convexheads.solvers.cores`). Without memory for it they have none.
    gap : relative duality gap there, about.
    outputs : of the whole head, where ``factors`` are only some of its units: then the intercept is left to the
        preconditioner of the others, but for giving way to these.
    """

    def __init__(
        self,
        problem: Problem,
        factors: Factors,
        generator: torch.Generator,
        outside: dict[tuple[int, int | None], OutsidePairs] | None = None,
        gap: float = 0.0,
        outputs: Tensor | None = None,
    ) -> None:
        self.problem = problem
        dtype = factors.tensors()[0].dtype
        count = sample_count(problem, factors)
        sample = torch.arange(problem.n)
        if count < problem.n:
            sample = torch.randperm(problem.n, generator=generator)[:count].sort().values
        index, place = problem.own_samples(sample)
        Y, a = problem.targets_of(index, dtype)
        total = problem.world.sum(a.sum()).clamp_min(torch.finfo(dtype).tiny)
        # Drawn for the samples of all workers, so that each sample has the same noise wherever it is.
        noise = torch.randn(len(sample), *problem.targets.shape[1:], generator=generator, dtype=dtype)[place]
        there = None if outputs is None else take_rows(outputs, index).to(dtype)
        with torch.no_grad():
            samples = Samples(index, place, len(sample), Y, a / total, noise.to(problem.device), there)
            self._build(problem, factors, samples, dtype, generator, outside, gap)

    def _build(
        self,
        problem: Problem,
        factors: Factors,
        samples: Samples,
        dtype: torch.dtype,
        generator: torch.Generator,
        outside: dict[tuple[int, int | None], OutsidePairs] | None,
        gap: float,
    ) -> None:
        # Beside the features there are weighted copies of them, and copies of statistics beside those of few units.
        counted = factors.n_units if problem.budget.roomy else 2 * max(LEAST_COUNTED, factors.n_units)
        step = problem.pass_rows(dtype, max(1, counted))
        centred = factors.intercept is not None
        self.v_blocks = [VBlocks(problem, k, units, centred) for k, units in enumerate(factors.units)]
        self.u_blocks = [
            None if units.u is None or not len(units.u) else UBlocks(problem, k, units, samples, generator)
            for k, units in enumerate(factors.units)
        ]
        hessian = torch.zeros(problem.outputs, problem.outputs, dtype=dtype, device=problem.device)
        # Where little memory is allowed there is none for the heavy rows.
        free = problem.budget.roomy and not samples.few
        self.cores = Cores(problem, factors, outside, gap, samples.count, samples.rows) if outside and free else None
        outputwise = free and not problem.loss.constant_curvature
        curvatures = []
        for part in split_rows(len(samples.index), step):
            # Never rough: statistics may be kept, and objectives come from them.
            stats = problem.stats_of(samples.index[part], dtype)
            with rough_products(problem.device):
                O, targets, weights = self._add(problem, factors, samples, part, stats)
                hessian += problem.own_loss.mean_hessian(O, targets, weights)
            if outputwise:
                curvature = problem.own_loss.entry_curvature(O, targets).reshape(-1, problem.outputs)
                curvatures.append(curvature * weights.repeat_interleave(samples.rows)[:, None])
        hessian = problem.world.sum(hessian)
        for blocks in self.v_blocks:
            blocks.share(problem.world)
        if outputwise:
            self._outputwise(problem, factors, samples, torch.cat(curvatures), step)
        else:
            for blocks in self.v_blocks:
                blocks.finish(hessian / samples.rows)
        self.u_sizes = [0 if units.u is None else units.u.numel() for units in factors.units]
        for u_blocks, component in zip(self.u_blocks, problem.components, strict=True):
            if u_blocks is not None:
                u_blocks.share(problem.world)
                u_blocks.finish(problem.penalty_weight(component))
        if self.cores is not None:
            self.cores.finish(centred)
        self.intercept_inverse: Tensor | None = None
        if centred:
            self.evenly = torch.full_like(hessian[:, :1], 1.0 / problem.outputs)
            alone = samples.outputs is None
            self.intercept_inverse = (
                torch.linalg.pinv(hessian, hermitian=True, rtol=1e-5) if alone else torch.zeros_like(hessian)
            )

    def _add(
        self, problem: Problem, factors: Factors, samples: Samples, part: slice, stats: list[Stats]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take in the moments of some of the samples; their outputs, targets and weights."""
        targets, weights, place = samples.targets[part], samples.weights[part], samples.place[part]
        features = [c.features(s, u) for c, s, u in zip(problem.components, stats, factors.units, strict=True)]
        if samples.outputs is None:
            O = problem.combine(factors, features, targets.shape[:-1])
        else:
            O = samples.outputs[part]
        row_weights = weights.repeat_interleave(samples.rows)
        for T, blocks in zip(features, self.v_blocks, strict=True):
            blocks.add(T.flatten(1), row_weights)
        E = problem.loss.hessian_root_product(O, targets, samples.noise[part]).reshape(len(O), -1, problem.outputs)
        if self.cores is not None:
            chosen = (place % self.cores.stride == 0).nonzero()[:, 0].to(E.device)
            self.cores.add(chosen, features, stats, E.flatten(0, 1), row_weights, samples.rows)
        for u_blocks, stat, component, units in zip(
            self.u_blocks, stats, problem.components, factors.units, strict=True
        ):
            if u_blocks is None:
                continue
            if u_blocks.stride == 1:
                u_blocks.add(stat, units, E[..., component.outputs], weights, place)
                continue
            chosen = (place % u_blocks.stride == 0).nonzero()[:, 0]
            there = chosen.to(E.device)
            thin = tuple(take_rows(t, there) for t in stat)
            u_blocks.add(thin, units, take_rows(E, there)[..., component.outputs], weights[there], place[chosen])
        return O, targets, weights

    def _outputwise(self, problem: Problem, factors: Factors, samples: Samples, curvature: Tensor, step: int) -> None:
        """Second pass over the samples: moments of the v blocks output by output."""
        columns = sum(blocks.columns for blocks in self.v_blocks)
        count = min(HEAVY, HEAVY_NUMBERS // max(1, problem.outputs * columns))
        heavy = HeavyRows(curvature, min(count, samples.count * samples.rows), problem.world)
        for blocks in self.v_blocks:
            blocks.start_outputs(heavy)
        start = 0
        for part in split_rows(len(samples.index), step):
            stats = problem.stats_of(samples.index[part], curvature.dtype)
            rows = slice(start, start + samples.rows * (part.stop - part.start))
            with rough_products(problem.device):
                for component, stat, units, blocks in zip(
                    problem.components, stats, factors.units, self.v_blocks, strict=True
                ):
                    T = component.features(stat, units).flatten(1)
                    blocks.add_outputs(T, rows, curvature, heavy)
            start = rows.stop
        total = problem.world.sum(curvature.sum(0))
        for blocks in self.v_blocks:
            blocks.finish_outputs(problem.world, heavy, total)

    def apply(self, vectors: Tensor) -> Tensor:
        """Approximate inverse times each row of ``vectors`` (r, number of variables), in the order of Factors.flat."""
        if self.cores is None:
            return self._apply_blocks(vectors)
        rest, solved = self.cores.take(vectors)
        return self.cores.give(self._apply_blocks(rest), solved)

    def _apply_blocks(self, vectors: Tensor) -> Tensor:
        intercept = moved = None
        if self.intercept_inverse is not None:
            intercept = vectors[:, -len(self.intercept_inverse) :]
            moved = intercept @ self.intercept_inverse
            if self.problem.loss.shift_free:
                # A common shift of the intercept changes nothing: there must be none.
                intercept = intercept - self._shift(intercept)
        found, start = [], 0
        for u_size, v_blocks, u_blocks in zip(self.u_sizes, self.v_blocks, self.u_blocks, strict=True):
            middle, end = start + u_size, start + u_size + v_blocks.numbers
            if u_blocks is not None:
                found.append(u_blocks.apply(vectors[:, start:middle]))
            own, shift = v_blocks.apply(vectors[:, middle:end], intercept)
            found.append(own)
            if moved is not None:
                moved[:, v_blocks.component.outputs] -= shift
            start = end
        if moved is not None:
            if self.problem.loss.shift_free:
                moved -= self._shift(moved)
            found.append(moved)
        return torch.cat(found, 1)

    def _shift(self, intercepts: Tensor) -> Tensor:
        """The mean of each row (r, c): by a product, which is called with a third of the ado of a mean."""
        return intercepts @ self.evenly


class HeavyRows:
    """The rows of largest curvature of every output, over all workers.

    Parameters
    ----------
    curvature : of the rows of this worker, (rows, c).
    count : how many are wanted of an output.

    Attributes
    ----------
    root : root of the curvature of those that are here, (c, count), zero where they are not.
    """

    def __init__(self, curvature: Tensor, count: int, world: World) -> None:
        outputs = curvature.shape[1]
        held = min(count, len(curvature))
        values, rows = curvature.topk(held, 0)
        gathered = values.new_full((world.size, count, outputs), 0.0)
        gathered[world.rank, :held] = values
        order = world.sum(gathered).flatten(0, 1).sort(stable=True, dim=0, descending=True).indices[:count]
        local = order - world.rank * count
        slot, output = ((local >= 0) & (local < held)).nonzero().unbind(1)
        local = local[slot, output]
        self.count, self.outputs = count, outputs
        self.root = values.new_zeros(outputs, count)
        self.root[output, slot] = values[local, output].sqrt()
        self._row, by_row = rows[local, output].sort()
        self._place = output[by_row], slot[by_row]

    def among(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of consecutive rows those that are heavy, counted from the first one, with their outputs and slots."""
        bounds = torch.tensor([rows.start, rows.stop], device=self._row.device)
        first, last = torch.searchsorted(self._row, bounds).tolist()
        output, slot = self._place
        return self._row[first:last] - rows.start, output[first:last], slot[first:last]


class VBlocks:
    """The v part of the preconditioner for one component, over groups of units."""

    def __init__(self, problem: Problem, k: int, units: Units, centred: bool) -> None:
        self.component, self.centred = problem.components[k], centred
        self.damping = problem.penalty_weight(self.component)
        self.shift_free = problem.loss.shift_free and self.component.width == problem.outputs
        self.sizes = feature_groups(problem, units)
        self.columns, self.numbers = sum(self.sizes), units.v.numel()
        self.moments = [units.v.new_zeros(size, size) for size in self.sizes]
        self.mean: Tensor | None = None
        # Sum of the weighted rows, and of the weights.
        self.first = units.v.new_zeros(self.columns)
        self.total = units.v.new_zeros(())

    def add(self, T: Tensor, weights: Tensor) -> None:
        """Take in rows of features T (rows, D) with their weights (rows,)."""
        root = weights.sqrt()[:, None]
        for moment, block in zip(self.moments, T.split(self.sizes, 1), strict=True):
            add_moment(moment, block * root)
        self.first += weights @ T
        self.total += weights.sum()

    def share(self, world: World) -> None:
        """Take in the moments of the other workers' samples."""
        *self.moments, self.first, self.total = world.sum_all([*self.moments, self.first, self.total])

    def finish(self, hessian: Tensor) -> None:
        """The inverse with the mean Hessian for every row: exact for losses of constant curvature."""
        curvature = hessian[self.component.outputs, self.component.outputs]
        mean = self.first / self.total
        if self.centred:
            self.mean = mean[:, None].expand(-1, self.component.width)
            for moment, own in zip(self.moments, mean.split(self.sizes), strict=True):
                moment.addr_(own, own, alpha=-float(self.total))
        groups = [KroneckerInverse(moment, curvature, self.damping) for moment in self.moments]
        self.inverse: Callable[[Tensor], Tensor] = partial(by_group, groups, self.sizes)
        del self.moments

    def start_outputs(self, heavy: HeavyRows) -> None:
        """Begin the second pass, in the eigenbases of the mean moments."""
        self.bases = [torch.linalg.eigh(moment).eigenvectors for moment in self.moments]
        del self.moments
        like, c = self.first, self.component.width
        self.heavy = like.new_zeros(c, heavy.count, self.columns)
        self.means, self.squares = like.new_zeros(self.columns, c), like.new_zeros(self.columns, c)

    def add_outputs(self, T: Tensor, rows: slice, curvature: Tensor, heavy: HeavyRows) -> None:
        """Take in rows of features T (rows, D) of which ``curvature[rows]`` are the curvatures (rows, c)."""
        own = self.component.outputs
        weights = curvature[rows, own]
        chosen, output, slot = heavy.among(rows)
        inside = (output >= own.start) & (output < own.stop)
        chosen, output, slot = chosen[inside], output[inside] - own.start, slot[inside]
        turned = by_group([basis.mT.matmul for basis in self.bases], self.sizes, T.mT)
        self.means += turned @ weights
        self.squares += turned.square() @ weights
        self.heavy[output, slot] = turned[:, chosen].mT

    def finish_outputs(self, world: World, heavy: HeavyRows, total: Tensor) -> None:
        """The inverse for a loss whose curvature differs from row to row; ``total`` curvature of all rows (c,)."""
        total = total[self.component.outputs].clamp_min(torch.finfo(total.dtype).tiny)
        root = heavy.root[self.component.outputs]
        mean, square = world.sum_all([self.means, self.squares])
        mean = mean / total if self.centred else torch.zeros_like(mean)
        # In place: these are the largest arrays of all, and fresh pages cost more than what is done with them.
        rows = world.sum(self.heavy.sub_(mean.mT[:, None]).mul_(root[..., None]))
        rest = square - total * mean.square() - column_squares(rows).mT
        # One for all groups: heavy rows couple them.
        self.inverse = OutputwiseInverse(self.bases, rows, rest, self.damping, self.shift_free)
        self.mean = by_group([basis.matmul for basis in self.bases], self.sizes, mean) if self.centred else None
        del self.bases, self.heavy, self.means, self.squares

    def apply(self, vectors: Tensor, intercept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inverse times each row of ``vectors`` (r, D c), and how the intercept has to give way to it: (r, c).

        ``intercept`` (r, outputs) is the intercept's part of the same rows.
        """
        own = vectors.view(len(vectors), -1, self.component.width)
        if self.mean is not None and intercept is not None:
            own = own - self.mean * intercept[:, None, self.component.outputs]
        found = self.inverse(own)
        shift = found.new_zeros(()) if self.mean is None else (self.mean * found).sum(1)
        return found.flatten(1), shift


class UBlocks:
    """The u part of the preconditioner for one component, over groups of units.

    With G (a, b m) the gradient of one sample in a group's u, the Kronecker factors are the means of G G^T and of
    G^T G. Where G is an outer product both are exact and cost no more than a few products. Elsewhere the latter is
    taken from a few combinations r^T G with random signs r, for which E[r r^T] is the identity: the rows of one
    sample resemble each other, so that more samples tell more than more of their rows.
    """

    def __init__(self, problem: Problem, k: int, units: Units, samples: Samples, generator: torch.Generator) -> None:
        self.component = problem.components[k]
        self.elements = max(16 * WORKSPACE, problem.budget.workspace)
        if problem.budget.limit is not None:
            # Features are held as well as the copies of u.
            self.elements = (
                problem.budget.workspace
                * self.component.p
                // max(self.component.p, self.component.form.workspace, self.component.form.value_width)
            )
        assert units.u is not None
        m, p = len(units.u), self.component.p
        self.numbers = max(1, m * p)
        a, b = self.component.form.u_matrix
        self.shape = (a, b)
        most = group_size(problem, m * b)
        self.full = m * p <= min(FEW_FULL_SIZE if samples.few else FULL_SIZE, most)
        per = max(1, m) if self.full else max(1, most // b)
        self.groups = [slice(i, min(i + per, m)) for i in range(0, m, per)]
        like = units.u
        if self.full:
            self.left = [like.new_zeros(m * p, m * p)]
            self.right = [like.new_ones(1, 1)]
        else:
            self.left = [like.new_zeros(a, a) for _ in self.groups]
            self.right = [like.new_zeros(b * (g.stop - g.start), b * (g.stop - g.start)) for g in self.groups]
        count = min(COMBINATIONS, a)
        columns = max(len(right) for right in self.right)
        self.outer = self.component.form.outer_gradients and not self.full
        if self.outer:
            enough = CHEAP_WORK // sum(len(right) ** 2 for right in self.right)
        else:
            enough = max(64, ROWS_PER_COLUMN * columns // count, CHEAP_ROWS // self.numbers)
        # Every how many samples suffice.
        self.stride = max(1, samples.count // enough)
        # Drawn for all samples, as noise is.
        shape = (samples.count, count, a)
        self.signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)

    def add(self, stats: tuple[Tensor, ...], units: Units, E: Tensor, weights: Tensor, place: Tensor) -> None:
        """Add the second moments of these samples' gradients; residuals E (samples, s, c)."""
        form, v, gate, u = self.component.form, units.v, units.gate, units.u
        assert u is not None
        values = v.flatten(0, 1).mT
        if self.outer:
            x, w = form.outer_gradient(stats, (E @ values).view(len(E), *v.shape[:2]))
            self._add_outer(x, w, weights)
            return
        signs = self.signs[place.cpu()].to(E.device, E.dtype)
        rows = max(1, self.elements // u.numel())
        for i in range(0, len(E), rows):
            part = tuple(t[i : i + rows] for t in stats)
            G = form.sample_gradients(part, u, gate, E[i : i + rows] @ values)
            G = G * weights[i : i + rows].sqrt().view(-1, *[1] * (G.ndim - 1))
            if self.full:
                flat = G.flatten(1)
                self.left[0] += flat.mT @ flat
                continue
            a, b = self.shape
            G = G.view(len(G), -1, a, b)
            for group, left, right in zip(self.groups, self.left, self.right, strict=True):
                own = G[:, group].transpose(1, 2).flatten(2)
                wide = own.transpose(0, 1).flatten(1)
                add_moment(left, wide.mT)
                tall = (signs[i : i + rows] @ own).flatten(0, 1)
                add_moment(right, tall / signs.shape[1] ** 0.5)

    def _add_outer(self, x: Tensor, w: Tensor, weights: Tensor) -> None:
        """The same for gradients x w_j^T: x (samples, a), w (samples, m, b)."""
        sizes = (weights * x.square().sum(1)).sqrt()
        for group, left, right in zip(self.groups, self.left, self.right, strict=True):
            own = w[:, group].flatten(1)
            add_moment(left, x * (weights * own.square().sum(1)).sqrt()[:, None])
            add_moment(right, own * sizes[:, None])

    def share(self, world: World) -> None:
        """Take in the moments of the other workers' samples."""
        if self.full:
            self.left = world.sum_all(self.left)
            return
        whole = world.sum_all([*self.left, *self.right])
        self.left, self.right = whole[: len(self.left)], whole[len(self.left) :]

    def finish(self, damping: float) -> None:
        """The inverses of all groups."""
        self.inverses: list[Callable[[Tensor], Tensor]] = []
        for left, right in zip(self.left, self.right, strict=True):
            if self.full:
                self.inverses.append(damped_inverse(left * self.stride, damping))
                continue
            right = right / right.trace().clamp_min(torch.finfo(right.dtype).tiny)
            self.inverses.append(KroneckerInverse(left * self.stride, right, damping))
        del self.left, self.right, self.signs

    def apply(self, vectors: Tensor) -> Tensor:
        """The inverse times each row of ``vectors`` (r, m p)."""
        if self.full:
            return self.inverses[0](vectors[:, :, None])[..., 0]
        a, b = self.shape
        count = len(vectors)
        found = []
        for group, inverse in zip(self.groups, self.inverses, strict=True):
            own = vectors[:, group.start * a * b : group.stop * a * b].view(count, -1, a, b).transpose(1, 2).flatten(2)
            found.append(inverse(own).view(count, a, -1, b).transpose(1, 2).flatten(1))
        return found[0] if len(found) == 1 else torch.cat(found, 1)
