"""Labels as targets of a loss, for classes that are already known: validation labels, labels to certify on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from convexheads.errors import InputError, describe


def encode_targets(
    y: Any, loss: str, outputs: int, rows: tuple[int, ...], classes: np.ndarray | None = None
) -> np.ndarray:
    """Targets of the shape of the outputs, float64.

    Parameters
    ----------
    y : for ``cross_entropy`` class labels of shape ``rows``, or soft labels (*rows, c) that sum to one; for
        ``multilabel_logistic`` values in [0, 1] of shape (*rows, c); for ``squared`` numbers of shape (*rows, c), or
        of shape ``rows`` where c = 1.
    loss : name of the loss.
    outputs : c.
    rows : (n,), or (n, s) for token-level outputs.
    classes : (c,) the class of each output. None: the sorted labels where all c classes occur in y, else y must
        hold integers from 0 to c - 1, the numbers of the outputs.

    Raises
    ------
    InputError
        For labels of another shape, unknown labels, NaN, or values outside their range.
    """
    y = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if y.ndim > 0 and len(y) != rows[0]:
        raise InputError("y: " + describe(f"{len(y)} labels", f"n = {rows[0]}, one for every sample of X"))
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise InputError("y: " + describe("NaN or infinity (inf)", "one finite label for every sample"))
    if loss == "cross_entropy" and y.shape == rows:
        return np.eye(outputs)[_class_index(y, outputs, classes)]
    if loss == "squared" and outputs == 1 and y.shape == rows:
        y = y[..., None]
    if y.shape != (*rows, outputs) or y.dtype.kind not in "fiub":
        labels = f"class labels {rows} or " if loss == "cross_entropy" else ""
        got = f"shape {y.shape} of dtype {y.dtype}"
        raise InputError("y: " + describe(got, f"{labels}numbers of shape {(*rows, outputs)} for {loss}"))
    values = y.astype(np.float64)
    if loss == "squared":
        return values
    if values.min() < 0 or values.max() > 1:
        raise InputError("y: " + describe(f"values in [{values.min():g}, {values.max():g}]", "values in [0, 1]"))
    if loss == "cross_entropy":
        sums = values.sum(-1, keepdims=True)
        if not np.allclose(sums, 1.0, atol=1e-6):
            raise InputError("y: " + describe("soft labels whose rows do not sum to one", "rows that sum to one"))
        values = values / sums
    return values


def _class_index(y: np.ndarray, outputs: int, classes: np.ndarray | None) -> np.ndarray:
    """The output that belongs to every label."""
    found = np.unique(y)
    if classes is None:
        if len(found) == outputs:
            return np.searchsorted(found, y)
        if found.dtype.kind in "iu" and found[0] >= 0 and found[-1] < outputs:
            return y.astype(np.int64)
        raise InputError(
            "y: "
            + describe(
                f"{len(found)} classes, from {found[0]!r} to {found[-1]!r}",
                f"the {outputs} classes of the head's outputs, or integers from 0 to {outputs - 1}",
                "Pass classes=, the class of each output in order.",
            )
        )
    classes = np.asarray(classes)
    if classes.shape != (outputs,):
        got = f"{classes.shape[0] if classes.ndim else 0} classes"
        raise InputError("classes: " + describe(got, f"{outputs}, one for each output of the head"))
    order = np.argsort(classes)
    try:
        place = np.searchsorted(classes[order], found).clip(max=outputs - 1)
        known = classes[order][place] == found
    except TypeError:  # numbers against strings
        known = np.zeros(len(found), bool)
    if not np.all(known):
        unknown = found[~np.broadcast_to(known, found.shape)]
        raise InputError(
            "y: "
            + describe(
                f"the label {unknown[0]!r}, which the head does not know",
                f"labels among its {outputs} classes ({classes[0]!r}, {classes[1 % outputs]!r}, ...)",
                "Use the labels that the head was fitted with.",
            )
        )
    return order[np.searchsorted(classes[order], y)]
