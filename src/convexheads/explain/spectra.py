"""How many heads the data support: spectra of the blocks, the gates in use, and what truncation costs.

The singular values of a block Z_g are the sizes of its canonical heads. With Z = Z_k + T, T the part that truncation
to the k largest heads removes and |T| = sum_g w_g ||T_g||_* its tail:

* the penalty falls by exactly beta |T|;
* the training loss rises by at least beta |T|, and by beta |T| to first order, because at the optimum every head's
  correlation with the gradient of the loss is exactly beta w_g times its size;
* so the objective changes at second order only. It rises by at most
  (sigma_max - beta) |T| + sum_i a_i D(o_i - A(T)(X_i), o_i), with sigma_max the upper end in the certificate (beta at
  the optimum, where the bound is exact), a_i the sample weights, and D the Bregman divergence of the loss at the
  outputs o_i, which does not depend on the labels: for cross-entropy that between the predicted distributions.

beta |T| itself bounds neither rise from above: a head that carries much of the fit at a small beta costs more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from convexheads.errors import InputError, describe
from convexheads.explain.fitted import Fitted
from convexheads.heads import Branch, ConvexHead
from convexheads.losses import make_loss
from convexheads.operator import Component
from convexheads.spectral import balanced_factors
from convexheads.types import Factors, Units


@dataclass(frozen=True)
class BlockSpectrum:
    """The spectrum of one block Z of the solution.

    Attributes
    ----------
    branch, head, group, gate : which block; ``gate`` is None where there is none.
    singular_values : (r,) descending.
    rank : number of singular values above the tolerance.
    effective_rank : exp of the entropy of the normalised singular values (Roy and Vetterli 2007): r for r equal
        values, near 1 where one dominates, 0 for an empty block.
    nuclear_norm : sum of the singular values.
    share : its share in the sum of nuclear norms over all blocks; None for a ridge branch (linear head).
    penalty : what the block adds to the objective: beta w ||Z||_*, or (beta / 2) w ||Z||_F^2 for ridge.
    """

    branch: int
    head: str
    group: int
    gate: int | None
    singular_values: np.ndarray
    rank: int
    effective_rank: float
    nuclear_norm: float
    share: float | None
    penalty: float

    def __str__(self) -> str:
        group = f", group {self.group}" if self.head == "block_fno" else ""
        gate = "" if self.gate is None else f", gate {self.gate}"
        return f"{self.head}{group}{gate}"

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**self.__dict__, "singular_values": self.singular_values.tolist()}


@dataclass(frozen=True)
class GateSparsity:
    """How a channel group spreads over its gates: the group penalty leaves many of them empty.

    Attributes
    ----------
    branch, head, group : which channel group.
    shares : (P,) share of each gate in the group's nuclear norm; all zero for an empty group.
    active : number of gates with a head above the tolerance.
    effective : exp of the entropy of the shares: the number of gates that an equal split would need.
    """

    branch: int
    head: str
    group: int
    shares: np.ndarray
    active: int
    effective: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**self.__dict__, "shares": self.shares.tolist()}


def effective_number(sizes: ArrayLike) -> float:
    """exp of the entropy of non-negative sizes taken as shares; 0 where all are zero."""
    values = np.asarray(sizes, dtype=np.float64)
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def spectra(estimator: Any, tol: float = 1e-6) -> list[BlockSpectrum]:
    """Spectrum of every block, in the order of ``blocks_``.

    Parameters
    ----------
    estimator : fitted estimator, or a pipeline that ends in one.
    tol : singular values up to ``tol`` times the largest of all blocks do not count as heads.

    Raises
    ------
    InputError
        For something that is no fitted head, or a negative ``tol``.
    """
    if not tol >= 0:
        raise InputError("tol: " + describe(repr(tol), "a number >= 0"))
    fitted = Fitted(estimator)
    ridge = [branch.architecture.ridge for branch in fitted.branches]
    largest = max((float(b.singular_values.max(initial=0.0)) for b in fitted.blocks), default=0.0)
    total = sum(float(b.singular_values.sum()) for b in fitted.blocks if not ridge[b.branch])
    found = []
    for block in fitted.blocks:
        values = block.singular_values
        nuclear = float(values.sum())
        weight = fitted.beta * fitted.branches[block.branch].weight
        plain = ridge[block.branch]
        found.append(
            BlockSpectrum(
                block.branch,
                block.head,
                block.group,
                block.gate_index,
                values,
                int((values > tol * largest).sum()),
                effective_number(values),
                nuclear,
                None if plain else (nuclear / total if total > 0 else 0.0),
                weight * (0.5 * float(values @ values) if plain else nuclear),
            )
        )
    return found


def gate_sparsity(estimator: Any, tol: float = 1e-6) -> list[GateSparsity]:
    """Use of the gates, one entry a channel group of a gated branch; empty for linear activation.

    Parameters and errors as for :func:`spectra`.
    """
    groups: dict[tuple[int, int], list[BlockSpectrum]] = {}
    for block in spectra(estimator, tol):
        if block.gate is not None:
            groups.setdefault((block.branch, block.group), []).append(block)
    found = []
    for (branch, group), blocks in groups.items():
        norms = np.array([block.nuclear_norm for block in blocks])
        total = norms.sum()
        found.append(
            GateSparsity(
                branch,
                blocks[0].head,
                group,
                norms / total if total > 0 else norms,
                sum(block.rank > 0 for block in blocks),
                effective_number(norms),
            )
        )
    return found


@dataclass(frozen=True)
class Truncation:
    """A head cut down to its largest units; see the top of this file for the bounds.

    Attributes
    ----------
    factors : the units kept, of every component, and the intercept.
    kept, removed : number of units.
    tail : sum of w_g sigma over the units removed.
    first_order : beta * tail: the fall of the penalty, the rise of the training loss to first order, and its least
        possible rise.
    objective_rise : the objective rises by at most this on the tokens given; None where none were given.
    branches : the heads that ``factors`` belong to.
    """

    factors: Factors
    kept: int
    removed: int
    tail: float
    first_order: float
    objective_rise: float | None
    branches: list[Branch] = field(repr=False)
    beta: float = field(repr=False)
    dtype: torch.dtype = field(repr=False)

    def module(self, dtype: torch.dtype | None = None) -> ConvexHead:
        """The truncated head as a module, (n, s, d) -> logits; ``dtype`` defaults to that of ``to_module``."""
        return ConvexHead(self.branches, self.factors, self.dtype if dtype is None else dtype, self.beta).eval()


def truncation_curve(estimator: Any) -> np.ndarray:
    """beta * tail (see :class:`Truncation`) after keeping the k largest heads, for k = 0, ..., rank: (rank + 1,)."""
    fitted = Fitted(estimator)
    parts = [
        branch.weight * block.singular_values
        for block in fitted.blocks
        if not (branch := fitted.branches[block.branch]).architecture.ridge
    ]
    sizes = np.sort(np.concatenate([*parts, np.zeros(0)]))
    return fitted.beta * np.concatenate([[0.0], np.cumsum(sizes)])[::-1]


def truncate(estimator: Any, heads: int, X: Any = None, sample_weight: ArrayLike | None = None) -> Truncation:
    """Keep the ``heads`` largest units, over all blocks, by their part w_g sigma of the penalty.

    Ridge branches (linear heads) have no units and stay whole; the intercept stays as it is.

    Parameters
    ----------
    estimator : fitted estimator, or a pipeline that ends in one.
    heads : number of units to keep, from 0 to ``rank_``; more than there are keeps all.
    X : the training tokens (n, s, d), for ``objective_rise``; None leaves it out.
    sample_weight : (n,) the weights of the fit, if there were any; class weights belong into them.

    Raises
    ------
    InputError
        For a negative number of heads, tokens that do not fit, or weights that do not match them.
    """
    if isinstance(heads, bool) or not isinstance(heads, (int, np.integer)) or heads < 0:
        raise InputError("heads: " + describe(repr(heads), "a number of units >= 0"))
    fitted = Fitted(estimator)
    parts = [(component, _canonical(units, component)) for component, units in fitted.components()]
    sizes = [component.weight * sigma for component, (_, sigma) in parts]
    order = torch.cat([*sizes, torch.zeros(0, dtype=torch.float64)]).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[: int(heads)]] = True
    kept, cut, tail, place = [], [], 0.0, 0
    for (component, (units, _)), size in zip(parts, sizes, strict=True):
        if units.u is None:
            kept.append(units)
            continue
        own = chosen[place : place + len(size)]
        place += len(size)
        kept.append(_some(units, own))
        cut.append((component, _some(units, ~own)))
        tail += float(size[~own].sum())
    rise = None
    if X is not None:
        estimator = fitted.estimator
        excess = max(0.0, estimator.certificate_.sigma_max.upper - fitted.beta)
        rise = excess * tail + _divergence(fitted, cut, X, sample_weight)
    count = int(chosen.sum())
    return Truncation(
        Factors(kept, fitted.factors.intercept),
        count,
        len(order) - count,
        tail,
        fitted.beta * tail,
        rise,
        fitted.branches,
        fitted.beta,
        torch.float64 if fitted.estimator.dtype == "float64" else torch.float32,
    )


def _canonical(units: Units, component: Component) -> tuple[Units, Tensor]:
    """The units of a component as canonical heads, in the form's own space, and their singular values."""
    if units.u is None:
        return units, torch.zeros(0, dtype=torch.float64)
    us, vs, sigmas, gates = [], [], [], []
    for g in range(component.n_gates):
        own = slice(None) if units.gate is None else units.gate == g
        u, v = units.u[own].double().flatten(1), units.v[own].double().flatten(1)
        sigma = u.new_zeros(0)
        if len(u):
            u, v, sigma = balanced_factors(u, v)
        us.append(u)
        vs.append(v)
        sigmas.append(sigma)
        gates.append(torch.full((len(u),), g))
    u = torch.cat(us).view(-1, *units.u.shape[1:])
    v = torch.cat(vs).view(-1, *units.v.shape[1:])
    return Units(u, v, None if units.gate is None else torch.cat(gates)), torch.cat(sigmas)


def _some(units: Units, rows: Tensor) -> Units:
    assert units.u is not None
    return Units(units.u[rows], units.v[rows], None if units.gate is None else units.gate[rows])


def _divergence(fitted: Fitted, cut: list[tuple[Component, Units]], X: Any, sample_weight: Any) -> float:
    """sum_i a_i D(o_i - A(T)(X_i), o_i) for the units T in ``cut``, in float64."""
    rows = fitted.tokens(X)
    n = int(rows.shape[0])
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise InputError(
            "sample_weight: " + describe(f"shape {weights.shape}", f"({n},) non-negative numbers, one a sample of X")
        )
    first = fitted.branches[0]
    shape = (n, first.outputs) if first.pooled else (n, first.tokens, first.outputs)
    outputs, move = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    if fitted.factors.intercept is not None:
        outputs += fitted.factors.intercept
    for index in range(len(fitted.branches)):
        done = 0
        for tokens in fitted.view(rows, index):
            part = slice(done, done + len(tokens))
            _add(outputs[part], fitted.components(), index, tokens)
            _add(move[part], cut, index, tokens)
            done += len(tokens)
    loss = make_loss(fitted.estimator.loss_)
    # Any labels do: the loss is linear in them but for a constant.
    labels = torch.full_like(outputs, 1.0 / first.outputs)
    slope = (loss.entry_gradient(outputs, labels) * move).sum(-1)
    each = loss.entry_value(outputs - move, labels) - loss.entry_value(outputs, labels) + slope
    return float(torch.from_numpy(weights / weights.sum()) @ each.reshape(n, -1).sum(1))


def _add(into: Tensor, parts: Iterable[tuple[Component, Units]], branch: int, tokens: Tensor) -> None:
    """Add the outputs of those units that belong to ``branch``, for tokens (k, s, d) of its view."""
    for component, units in parts:
        if component.branch == branch and len(units.v):
            units = units.to(torch.float64)
            T = component.features(component.stats(tokens, torch.float64), units)
            into[..., component.outputs] += component.forward(T, units.v).view(*into.shape[:-1], -1)
