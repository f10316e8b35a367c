"""Operations on units that leave the outputs as they are, or nearly: what solvers drop, join, turn and choose."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexheads.problem import Component, Problem
from convexheads.spectral import balanced_factors
from convexheads.subspace import SingularPair
from convexheads.types import Factors, Units

FADING = 0.05
"""Share of what a unit carries that counts, when small ones are dropped, where it shrinks for certain."""


def canonical(problem: Problem, factors: Factors, drop: float) -> tuple[Factors, list[Tensor]]:
    """Balanced, orthogonal units of every block; the smallest are dropped.

    ``drop`` bounds beta w sum of the singular values dropped over all blocks: the objective rises by less, to second
    order, because at the optimum the loss falls by as much as the penalty rises.
    """
    parts = []
    tails: list[tuple[float, int, int]] = []
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        if units.u is None:
            continue
        for g in problem.gates_of(k):
            own = slice(None) if units.gate is None else units.gate == g
            u, v = units.u[own].double().flatten(1), units.v[own].double().flatten(1)
            if not len(u):
                continue
            u, v, sigma = balanced_factors(u, v)
            parts.append((k, g, u, v, sigma))
            weight = problem.penalty_weight(component)
            tails += [(weight * float(s), len(parts) - 1, r) for r, s in enumerate(sigma)]
    keep = [len(part[4]) for part in parts]
    spent = 0.0
    for cost, which, rank in sorted(tails):
        spent += cost
        if spent > drop and cost > 0:
            break
        keep[which] = min(keep[which], rank)
    found: list[Units] = []
    spectra: list[Tensor] = []
    for k, (component, units) in enumerate(zip(problem.components, factors.units, strict=True)):
        if units.u is None:
            found.append(units)
            continue
        own_parts = [(part, keep[i]) for i, part in enumerate(parts) if part[0] == k]
        shape_v = (component.form.value_width, component.width)
        us = [part[2][:r].view(-1, *component.form.u_shape) for part, r in own_parts]
        vs = [part[3][:r].view(-1, *shape_v) for part, r in own_parts]
        gates = [torch.full((r,), part[1], device=problem.device) for part, r in own_parts if part[1] is not None]
        dtype = units.v.dtype
        empty_u = units.u.new_zeros(0, *component.form.u_shape)
        u = torch.cat(us).to(dtype) if us else empty_u
        v = torch.cat(vs).to(dtype) if vs else units.v.new_zeros(0, *shape_v)
        gate = None
        if component.gates is not None:
            gate = torch.cat(gates) if gates else torch.zeros(0, dtype=torch.long, device=problem.device)
        found.append(Units(u, v, gate))
        spectra += [part[4][:r] for part, r in own_parts]
    return Factors(found, factors.intercept), spectra


def principal_units(
    problem: Problem, factors: Factors, gradient: Factors, spare: float, shrinking: float
) -> list[Tensor | None]:
    """For every component the map (kept, m) with orthonormal rows from its units to the principal ones that are kept.

    Within a block (U, V) -> (R U, R V) changes nothing for orthogonal R. With R from U U^T + V V^T the units are
    orthogonal once they are balanced, and the smallest can go: those dropped carry less than ``spare`` in all, and
    none of them grows along minus the ``gradient``. A unit that is small because it is on its way out counts for
    little: at an optimum a_r^T (A^* L) b_r is -beta w for the unit vectors of every unit that stays, and here it is
    nearer to zero by more than the share ``shrinking``.
    """
    found: list[Tensor | None] = []
    parts: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for k, units in enumerate(factors.units):
        found.append(None)
        if units.u is None:
            continue
        weight = problem.penalty_weight(problem.components[k])
        for g in problem.gates_of(k):
            own = units.of_block(g)
            u, v = units.u[own].flatten(1).double(), units.v[own].flatten(1).double()
            size, vectors = torch.linalg.eigh(0.5 * (u @ u.mT + v @ v.mT))
            slopes = gradient.units[k]
            assert slopes.u is not None
            against = u @ slopes.u[own].flatten(1).double().mT + v @ slopes.v[own].flatten(1).double().mT
            slope = (vectors.mT @ against * vectors.mT).sum(1)
            cost = weight * size
            # The slope is 2 cost (1 - sigma / (beta w)) with sigma = -a_r^T (A^* L) b_r.
            cost = torch.where(slope > 2.0 * shrinking * cost, FADING * cost, cost)
            # What grows is no candidate, however small.
            parts.append((k, own, torch.where(slope < 0, math.inf, cost), vectors.mT))
    sizes = torch.cat([part[2] for part in parts]) if parts else torch.zeros(0)
    ordered, _ = sizes.clamp_min(0).sort()
    n_dropped = int((ordered.cumsum(0) <= spare).sum())
    least = float(ordered[n_dropped]) if n_dropped < len(ordered) else math.inf
    for k, units in enumerate(factors.units):
        if units.u is None:
            continue
        rows = []
        for _, own, size, vectors in (part for part in parts if part[0] == k):
            kept = vectors[size >= least]
            row = kept.new_zeros(len(kept), len(units.v))
            row[:, own] = kept
            rows.append(row)
        found[k] = torch.cat(rows).to(units.v.dtype)
    return found


def turned(factors: Factors, maps: list[Tensor | None]) -> Factors:
    """Factors, or a vector of their shape, under the maps of :func:`principal_units`."""
    units = []
    for old, rows in zip(factors.units, maps, strict=True):
        if old.u is None or rows is None:
            units.append(old)
            continue
        gate = old.gate
        if gate is not None:
            gate = gate[rows.abs().argmax(1)] if rows.numel() else gate[:0]
        u = (rows @ old.u.flatten(1)).view(len(rows), *old.u.shape[1:])
        v = (rows @ old.v.flatten(1)).view(len(rows), *old.v.shape[1:])
        units.append(Units(u, v, gate))
    return Factors(units, factors.intercept)


def turned_rows(vectors: Tensor, factors: Factors, maps: list[Tensor | None]) -> Tensor:
    """Each row of ``vectors`` (r, number of variables), of the shape of ``factors``, under the same maps.

    With the turned factors and the transposed maps it takes them back: to what is orthogonal to the units dropped.
    """
    found = []
    start = 0
    for units, rows in zip(factors.units, maps, strict=True):
        for t in units.tensors():
            part = vectors[:, start : start + t.numel()]
            start += t.numel()
            if rows is not None:
                # Sizes in full: there may be no units.
                part = (rows @ part.view(len(vectors), len(t), math.prod(t.shape[1:]))).flatten(1)
            found.append(part)
    return torch.cat([*found, vectors[:, start:]], 1)


class Placement:
    """Where some of the units of a head are among all of them, for vectors of variables.

    Parameters
    ----------
    part, whole : factors of the shapes of these units, and of all.
    places : for every component, the places (m,) of the former among the latter.
    """

    def __init__(self, part: Factors, whole: Factors, places: list[Tensor]) -> None:
        self.part = part
        self._sizes = len(part.flat()), len(whole.flat())
        self._blocks: list[tuple[slice, slice, int, Tensor]] = []
        start = end = 0
        for place, own, every in zip(places, part.units, whole.units, strict=True):
            for s, t in zip(own.tensors(), every.tensors(), strict=True):
                after = start + s.numel(), end + t.numel()
                self._blocks.append((slice(start, after[0]), slice(end, after[1]), len(t), place))
                start, end = after
        self._tails = start, end

    def put(self, vectors: Tensor) -> Tensor:
        """Each row of ``vectors``, of the shape of the part, with zeros for all other units; same intercept."""
        found = vectors.new_zeros(len(vectors), self._sizes[1])
        for own, every, count, place in self._blocks:
            if len(place):
                found[:, every].view(len(vectors), count, -1)[:, place] = vectors[:, own].view(
                    len(vectors), len(place), -1
                )
        found[:, self._tails[1] :] = vectors[:, self._tails[0] :]
        return found

    def take(self, vectors: Tensor) -> Tensor:
        """The transposed map: what each row has for these units, and its intercept."""
        found = vectors.new_empty(len(vectors), self._sizes[0])
        for own, every, count, place in self._blocks:
            if len(place):
                found[:, own] = vectors[:, every].view(len(vectors), count, -1)[:, place].flatten(1)
        found[:, self._tails[0] :] = vectors[:, self._tails[1] :]
        return found


def placements(before: Factors, after: Factors) -> tuple[Placement, Placement]:
    """Where the units of ``before`` are among those of ``after``, and where those are that are new.

    New units follow the old ones of their gate.
    """
    old = [_old_places(was, now) for was, now in zip(before.units, after.units, strict=True)]
    new, units = [], []
    for place, now in zip(old, after.units, strict=True):
        fresh = torch.ones(len(now.v), dtype=torch.bool, device=place.device)
        fresh[place] = False
        new.append(fresh.nonzero()[:, 0])
        # A ridge branch has no units: it is with the old ones.
        units.append(no_units(now) if now.u is None else pick(now, new[-1]))
    return Placement(before, after, old), Placement(Factors(units, after.intercept), after, new)


def _old_places(old: Units, new: Units) -> Tensor:
    """Where the old units are among all, if new ones follow the old ones of their gate."""
    number = torch.arange(len(old.v), device=old.v.device)
    if old.gate is None or new.gate is None:
        return number
    first = torch.searchsorted(old.gate, old.gate)
    return torch.searchsorted(new.gate, old.gate) + number - first


def pick_gates(gate: Tensor | None, index: Tensor) -> Tensor | None:
    """The gates of some units, or None where there are no gates."""
    return None if gate is None else gate[index]


def pick(units: Units, index: Tensor) -> Units:
    """Some units of a component that is no ridge branch."""
    assert units.u is not None
    return Units(units.u[index], units.v[index], pick_gates(units.gate, index))


def pair_units(component: Component, pairs: list[SingularPair], like: Tensor) -> Units:
    """The singular vectors of some pairs of a component, as units of the dtype and on the device of ``like``."""

    def stacked(sides: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        rows = torch.stack(sides).to(like.dtype) if sides else like.new_zeros(0)
        return rows.view(len(sides), *shape)

    gate = None
    if component.gates is not None:
        gate = torch.tensor([pair.gate for pair in pairs], dtype=torch.long, device=like.device)
    u = None if component.ridge else stacked([pair.u for pair in pairs], component.form.u_shape)
    return Units(u, stacked([pair.v for pair in pairs], (component.form.value_width, component.width)), gate)


def no_units(units: Units) -> Units:
    """None of these units."""
    return Units(None if units.u is None else units.u[:0], units.v[:0], pick_gates(units.gate, torch.arange(0)))


def join_units(first: Units, second: Units) -> Units:
    """The units of both, in order of their gates."""
    assert first.u is not None
    assert second.u is not None
    u, v = torch.cat([first.u, second.u]), torch.cat([first.v, second.v])
    if first.gate is None or second.gate is None:
        return Units(u, v)
    gate, order = torch.sort(torch.cat([first.gate, second.gate]), stable=True)
    return Units(u[order], v[order], gate)


def filled(old: Units, new: Units, room: int, generator: torch.Generator) -> Units:
    """Units, and at most ``room`` of the ``new`` ones, drawn at random."""
    if old.u is None or room <= 0:
        return old
    chosen = torch.randperm(len(new.v), generator=generator)[:room].sort().values
    return join_units(old, pick(new, chosen.to(new.v.device)))


def unit_sizes(units: Units) -> Tensor:
    """||u|| ||v|| of every unit: (m,), none for ridge branches."""
    if units.u is None:
        return units.v.new_zeros(0)
    return units.u.flatten(1).norm(dim=1) * units.v.flatten(1).norm(dim=1)


def largest(factors: Factors, count: int) -> Factors:
    """The ``count`` units of largest ||u|| ||v||, in their order; ridge branches are kept."""
    sizes = [unit_sizes(units) for units in factors.units]
    if sum(map(len, sizes)) <= count:
        return factors
    least = torch.cat(sizes).topk(count).values[-1]
    found = []
    for units, size in zip(factors.units, sizes, strict=True):
        if units.u is None:
            found.append(units)
            continue
        kept = (size >= least).nonzero()[:, 0]
        found.append(pick(units, kept))
    return Factors(found, factors.intercept)


def spanned(factors: Factors, pair: SingularPair) -> float:
    """Norm of the part of the pair's left vector that lies in the span of its block's units."""
    units = factors.units[pair.component]
    assert units.u is not None
    own = slice(None) if units.gate is None else units.gate == pair.gate
    basis = torch.linalg.qr(units.u[own].flatten(1).double().mT).Q
    return float((basis.mT @ pair.u.double()).norm())
