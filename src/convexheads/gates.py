"""Gates: the fixed 0/1 masks of gated ReLU units.

A gate is a weight h of u's shape; its mask is 1[hidden(X, h) >= 0]. Because the mask is a function of the tokens,
the same gates can be replayed on new data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexheads.architectures import Architecture
from convexheads.errors import InputError, describe

ACTIVATIONS = ("linear", "gated_relu")
"""Activations of the convex programs; ``relu`` is reached from ``gated_relu``, see :mod:`convexheads.relu`."""


def draw_gates(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> Tensor:
    """``count`` independent standard normal gates (count, *shape), float64.

    A mask depends on the direction of its gate only, and this direction is uniform on the sphere.
    """
    return torch.from_numpy(rng.standard_normal((count, *shape)))


def resolve_gates(
    gates: int | Sequence, architecture: Architecture, activation: str, rng: np.random.Generator
) -> list[Tensor | None]:
    """Gates of every channel group: one (P, *u_shape) float64 tensor a group, or None for linear activation.

    Parameters
    ----------
    gates : number of random gates a group, or the gates: a sequence of arrays of u's shape; with several channel
        groups, one such sequence a group.

    Raises
    ------
    InputError
        For a count below one, or gates of a wrong number, shape or with NaN.
    """
    n_groups = len(architecture.groups)
    if activation == "linear":
        return [None] * n_groups
    shape = architecture.u_shape
    if isinstance(gates, (int, np.integer)) and not isinstance(gates, bool):
        if gates < 1:
            raise InputError("gates: " + describe(gates, "a number of gates >= 1, or a sequence of gates"))
        return [draw_gates(shape, int(gates), rng) for _ in range(n_groups)]
    if isinstance(gates, (str, bytes)) or not hasattr(gates, "__len__"):
        raise InputError("gates: " + describe(repr(gates), "an integer or a sequence of arrays of u's shape"))
    given: Any = gates
    grouped = given if n_groups > 1 else [given]
    if len(grouped) != n_groups:
        raise InputError(
            "gates: "
            + describe(
                f"gates for {len(grouped)} channel groups",
                f"one sequence of gates for each of the {n_groups} channel groups",
            )
        )
    resolved: list[Tensor | None] = []
    for group in grouped:
        try:
            if any(np.iscomplexobj(gate) for gate in group):
                raise ValueError("complex numbers")
            found = np.stack([np.asarray(gate, dtype=np.float64) for gate in group])
        except (TypeError, ValueError) as error:
            raise InputError(
                "gates: " + describe(f"gates that cannot be stacked ({error})", f"arrays of shape {shape}")
            ) from error
        if found.shape[1:] != shape:
            raise InputError(
                "gates: "
                + describe(
                    f"gates of shape {found.shape[1:]}",
                    f"u's shape {shape} for this head on X",
                    "See the table of heads for the shape of u.",
                )
            )
        if not np.isfinite(found).all():
            raise InputError("gates: " + describe("NaN or infinite entries", "finite gates"))
        resolved.append(torch.from_numpy(found))
    return resolved
