"""Which latent dimensions a head uses: energies of the blocks Z over the indices that carry a meaning.

In the index conventions of the convex programs:

* self-attention: ||Z^{(k,l)}||_F over (k, l): how much the correlation G[k, l] of features k (mixed by W1) and l
  (read by W2) matters, (d, d);
* mixer: ||Z[(t, q), :]|| over token pairs: output token t reading input token q, (s, s);
* FNO: ||Z[(k, :), :]||_F over the shifts k of the convolution, and the same of its discrete Fourier transform over
  shifts (unitary, so both have the same sum of squares), on the grid where there is one;
* MLP and linear: ||Z[a, :]|| over input features, (d,).

The sum of squares of all energies is ||Z||_F^2. Energies of several gates combine as a root of summed squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexheads.errors import InputError, describe
from convexheads.explain.fitted import Fitted
from convexheads.heads import Block, Branch

KINDS = {
    "self_attention": "feature pairs",
    "mixer": "token pairs",
    "fno": "shifts",
    "block_fno": "shifts",
    "mlp": "features",
    "linear": "features",
}


@dataclass(frozen=True)
class LatentEnergies:
    """Energies of one block, or of all gates of one channel group together.

    Attributes
    ----------
    branch, head, group : which channel group of which head.
    gate : number of the gate, or None for all gates together.
    kind : ``feature pairs``, ``token pairs``, ``shifts`` or ``features``: what the axes of ``values`` count.
    values : (d, d), (s, s), (s,) or (h, w), (d,): non-negative.
    frequencies : FNO only: energies over frequencies, of the shape of ``values``, frequency 0 first; else None.
    """

    branch: int
    head: str
    group: int
    gate: int | None
    kind: str
    values: np.ndarray
    frequencies: np.ndarray | None = None

    def __str__(self) -> str:
        group = f", group {self.group}" if self.head == "block_fno" else ""
        gate = "" if self.gate is None else f", gate {self.gate}"
        return f"{self.head}{group}{gate}"

    def top(self, count: int = 10) -> list[tuple[tuple[int, ...], float]]:
        """The largest entries as (index, share of the sum of squares), largest first."""
        squares = self.values**2
        total = float(squares.sum())
        order = np.argsort(-squares, axis=None, kind="stable")[:count]
        places = np.unravel_index(order, squares.shape)
        return [
            (tuple(int(i) for i in place), float(squares[place] / total) if total > 0 else 0.0)
            for place in zip(*places, strict=True)
        ]


def latent_energies(estimator: Any, per_gate: bool = False) -> list[LatentEnergies]:
    """Latent energies of every channel group of every head.

    Parameters
    ----------
    estimator : fitted estimator, or a pipeline that ends in one. Features are those that the branch sees, after its
        view and the steps of the pipeline.
    per_gate : one entry a gate; default: the gates of a channel group together.

    Raises
    ------
    InputError
        For something that is no fitted head, or a head of another package, whose indices are not known here.
    """
    fitted = Fitted(estimator)
    found = []
    for index, branch in enumerate(fitted.branches):
        for group in range(len(branch.gates)):
            each = [block_energies(block, branch) for block in fitted.blocks_of(index, group)]
            found += each if per_gate else [combine(each)]
    return found


def combine(energies: Sequence[LatentEnergies]) -> LatentEnergies:
    """The energies of several gates of one channel group together: root of summed squares."""
    if not energies:
        raise InputError("energies: " + describe("an empty list", "at least one block's energies"))
    first = energies[0]
    values = np.sqrt(sum(each.values**2 for each in energies))
    frequencies = None
    if first.frequencies is not None:
        frequencies = np.sqrt(sum(each.frequencies**2 for each in energies if each.frequencies is not None))
    return LatentEnergies(first.branch, first.head, first.group, None, first.kind, values, frequencies)


def block_energies(block: Block, branch: Branch) -> LatentEnergies:
    """Energies of one block of ``branch``, without forming Z.

    Canonical units are orthogonal: sum_r u_r v_r^T has rows of squared norm sum_r sigma_r u_r[.]^2.
    """
    kind = KINDS.get(block.head)
    if kind is None:
        raise InputError("head: " + describe(repr(block.head), "one of " + ", ".join(sorted(KINDS))))
    r, s, d = len(block.u), branch.tokens, branch.features
    sizes = block.singular_values[:, None]
    frequencies = None
    if kind == "feature pairs":
        # sum_{a,b} (sum_r u_r[a,k] v_r[l,b])^2, as a product of the units' inner products for each k and each l.
        u, v = block.u.reshape(r, d, d), block.v.reshape(r, d, block.v.shape[1] // d)
        left = np.einsum("rak,qak->krq", u, u, optimize=True).reshape(d, -1)
        right = np.einsum("rlb,qlb->lrq", v, v, optimize=True).reshape(d, -1)
        squares = left @ right.T
    elif kind == "token pairs":
        squares = (sizes * block.u**2).sum(0).reshape(s, s)
    elif kind == "shifts":
        grid = (s,) if branch.grid is None else branch.grid
        filters = block.u.reshape(r, *grid, block.u.shape[1] // s)
        axes = tuple(range(1, 1 + len(grid)))
        weights = block.singular_values.reshape(r, *[1] * (len(grid) + 1))
        squares = (weights * filters**2).sum((0, -1))
        spectrum = np.fft.fftn(filters, axes=axes, norm="ortho")
        frequencies = np.sqrt((weights * np.abs(spectrum) ** 2).sum((0, -1)))
    else:
        squares = (sizes * block.u**2).sum(0)
    values = np.sqrt(np.maximum(squares, 0.0))
    return LatentEnergies(block.branch, block.head, block.group, block.gate_index, kind, values, frequencies)
