"""What explanations read from a fitted estimator: its blocks, its branches and the tokens that a branch sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from convexheads.errors import InputError, describe
from convexheads.heads import Block, Branch
from convexheads.inputs import TokenRows, as_tokens
from convexheads.operator import Component, split_rows
from convexheads.types import Factors, Units

CHUNK = 64
"""Samples that are read and transformed at a time."""


class Fitted:
    """A fitted head, with the transforms before it if it is the last step of a scikit-learn pipeline.

    Parameters
    ----------
    model : a fitted ``ConvexHeadClassifier`` or ``ConvexHeadRegressor``, or a fitted pipeline that ends in one.

    Attributes
    ----------
    estimator : the head itself.
    branches : its heads, in order.
    blocks : its blocks Z in canonical form.

    Raises
    ------
    InputError
        For anything else.
    sklearn.exceptions.NotFittedError
        Before ``fit``.
    """

    def __init__(self, model: Any) -> None:
        steps = getattr(model, "steps", None)
        self.estimator: Any = steps[-1][1] if steps else model
        self._before: Any = model[:-1] if steps and len(steps) > 1 else None
        if isinstance(self.estimator, type) or not hasattr(type(self.estimator), "blocks_"):
            raise InputError(
                "estimator: " + describe(type(model).__name__, "a fitted convex head, or a pipeline that ends in one")
            )
        check_is_fitted(self.estimator)
        self.branches: list[Branch] = self.estimator._branches
        self.factors: Factors = self.estimator._factors
        self.blocks: list[Block] = self.estimator.blocks_

    @property
    def beta(self) -> float:
        """Weight decay of the fit."""
        return float(self.estimator.beta_)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the estimator predicts."""
        default = torch.float32 if self.estimator.dtype == "float32" else torch.float64
        return getattr(self.estimator, "_precision", default)

    def components(self) -> Iterator[tuple[Component, Units]]:
        """Every channel group of every branch, with its units."""
        found = [c for index, branch in enumerate(self.branches) for c in branch.components(index)]
        yield from zip(found, self.factors.units, strict=True)

    def blocks_of(self, branch: int, group: int) -> list[Block]:
        """The blocks of one channel group, one a gate."""
        return [block for block in self.blocks if (block.branch, block.group) == (branch, group)]

    def check_branch(self, branch: int) -> int:
        """``branch`` counted from 0, or InputError where there is none of that number."""
        count = len(self.branches)
        if isinstance(branch, bool) or not isinstance(branch, (int, np.integer)) or not -count <= branch < count:
            raise InputError(
                "branch: " + describe(repr(branch), f"a number from 0 to {count - 1}, one of {count} heads of the sum")
            )
        return int(branch) % count

    def tokens(self, X: Any) -> Tensor | TokenRows:
        """Tokens (n, s, d) as the head is given them, after the steps of the pipeline; (s, d) is one sample."""
        if getattr(X, "ndim", None) == 2:
            X = X[None]
        if self._before is not None:
            X = self._before.transform(X)
        rows = as_tokens(X)
        self.estimator._check_tokens(tuple(int(size) for size in rows.shape))
        return rows

    def view(self, rows: Tensor | TokenRows, branch: int) -> Iterator[Tensor]:
        """Tokens (k, s', d') of consecutive samples as branch number ``branch`` reads them, float64.

        They are rounded to the dtype of the estimator's predictions, so that masks come out as there.
        """
        view = self.branches[branch].view
        for index in split_rows(int(rows.shape[0]), CHUNK):
            part = rows[index].cpu().to(self.dtype)
            if view is not None:
                part = torch.as_tensor(np.asarray(view.transform(part.numpy()))).to(self.dtype)
            yield part.double()
