"""Preconditioned L-BFGS on the factored objective.

Limited-memory BFGS (Nocedal and Wright 2006, algorithm 7.4) whose initial inverse Hessian is a preconditioner,
scaled by s'y / y'H0 y. A step is accepted by sufficient decrease up to the noise of the objective (the
approximate Wolfe idea of Hager and Zhang 2005), so that float32 products do not stall it.

The two loops over the pairs are triangular solves with the products s_i'y_j (Byrd, Nocedal and Schnabel 1994), so
that a direction takes four matrix-vector products instead of four vector operations a pair.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.linalg.lapack import dtrtrs
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
"""A linear map of each row of a matrix (r, number of variables)."""
Evaluate = Callable[[Tensor], tuple[float, Tensor]]
MEMORY = 24
LEAST_CURVATURE = 1e-10
"""s'y as a share of ||s|| ||y|| below which a pair is left out."""
RESCALE = 5
"""New pairs after which the scale of the initial inverse Hessian is taken anew: it costs as much as applying it."""
STEADY = 4
"""Last iterates that are combined to the one of least gradient."""


class CurvaturePairs:
    """The last steps s and changes of gradient y, as rows of two matrices, with the products s_i'y_j for i <= j.

    Rows are reused in turn; ``order`` has them from the oldest to the newest, as ``products`` are.

    Parameters
    ----------
    like : a vector of the variables' shape, dtype and device.
    most : pairs that are kept.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self.most = most
        self.S = like.new_empty(0, len(like))
        self.Y = like.new_empty(0, len(like))
        # In the order of Fortran, as LAPACK wants it.
        self.products = np.zeros((most, most), order="F")
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs (s, y), oldest first."""
        return ((self.S[k], self.Y[k]) for k in self.order)

    def clear(self) -> None:
        self.order = []

    def _free_row(self) -> int:
        if len(self.order) == self.most:
            self.products[:-1, :-1] = self.products[1:, 1:].copy()
            return self.order.pop(0)
        row = len(self.order)
        if row == len(self.S):
            more = self.S.new_empty(min(self.most, max(8, 2 * row)) - row, self.S.shape[1])
            self.S, self.Y = torch.cat([self.S, more]), torch.cat([self.Y, more])
        return row

    def append(self, s: Tensor, y: Tensor) -> None:
        """Add a pair with s'y > 0; the oldest goes where there are too many."""
        row = self._free_row()
        self.S[row], self.Y[row] = s, y
        self.order.append(row)
        held = len(self.order)
        self.products[:held, held - 1] = self._by_age(self.S[:held] @ y)

    def _by_age(self, numbers: Tensor) -> np.ndarray:
        """Numbers of the rows, those of the oldest pair first, in float64."""
        return numbers.double().cpu().numpy()[self.order]

    def _by_row(self, numbers: np.ndarray) -> Tensor:
        """The inverse of :meth:`_by_age`, in the variables' dtype."""
        placed = np.empty(len(numbers))
        placed[self.order] = numbers
        return torch.from_numpy(placed).to(self.S.device, self.S.dtype)

    def mapped(self, transform: Apply) -> CurvaturePairs:
        """The pairs under a linear map of the variables that keeps inner products of gradients and steps."""
        S, Y = transform(self.S[self.order]), transform(self.Y[self.order])
        curved = (S * Y).sum(1) > LEAST_CURVATURE * S.norm(dim=1) * Y.norm(dim=1)
        found = CurvaturePairs(S[0], self.most)
        found.S, found.Y = S[curved], Y[curved]
        held = len(found.S)
        found.order = list(range(held))
        found.products[:held, :held] = (found.S @ found.Y.mT).double().cpu().numpy()
        return found

    def scale(self, inverse: Apply) -> float:
        """s'y / y'H0 y of the newest pair, for an initial inverse Hessian H0: how much too small it is there."""
        newest = self.Y[self.order[-1]]
        last = len(self.order) - 1
        return float(self.products[last, last]) / max(float(newest @ inverse(newest[None])[0]), 1e-300)

    def direction(self, gradient: Tensor, inverse: Apply, scale: float) -> Tensor:
        """Minus the inverse Hessian times ``gradient``, from ``scale`` times the initial one ``inverse``."""
        held = len(self.order)
        S, Y = self.S[:held], self.Y[:held]
        upper = self.products[:held, :held]
        # LAPACK reads the upper triangle only.
        alpha = dtrtrs(upper, self._by_age(S @ gradient))[0]
        r = inverse(torch.addmv(gradient, Y.mT, self._by_row(alpha), alpha=-1)[None])[0] * scale
        # s_i'y_i (alpha_i - delta_i) = y_i'(r + sum of delta_j s_j over the older pairs j).
        right = upper.diagonal() * alpha - self._by_age(Y @ r)
        return r.addmv_(S.mT, self._by_row(dtrtrs(upper, right, trans=1)[0])).neg_()


class LBFGS:
    """Minimiser that is advanced one iteration at a time.

    Parameters
    ----------
    evaluate : x -> (value, gradient).
    x : start.
    noise : relative error of a value; increases below it are accepted.
    memory : curvature pairs that are kept.
    rescale : new pairs after which the scale of the initial inverse Hessian is taken anew.
    """

    def __init__(
        self, evaluate: Evaluate, x: Tensor, noise: float, memory: int = MEMORY, rescale: int = RESCALE
    ) -> None:
        self.evaluate, self.x, self.noise = evaluate, x, noise
        self.n_evaluations = 0
        self._here: tuple[float, Tensor] | None = None
        self.pairs = CurvaturePairs(x, memory)
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=STEADY)
        self.inverse: Apply | None = None
        self.rescale, self.scale, self.scaled = rescale, 1.0, 0

    def _evaluated(self) -> tuple[float, Tensor]:
        # At the start only when it is asked for: it may be taken over by another optimiser at once.
        if self._here is None:
            self._here = self.evaluate(self.x)
            self.n_evaluations += 1
            self.recent.append((self.x, self._here[1]))
        return self._here

    @property
    def value(self) -> float:
        """The objective at ``x``."""
        return self._evaluated()[0]

    @property
    def gradient(self) -> Tensor:
        """Its gradient there."""
        return self._evaluated()[1]

    def set_inverse(self, inverse: Apply) -> None:
        """Use another initial inverse Hessian; curvature pairs are kept."""
        self.inverse, self.scaled = inverse, 0

    def direction(self) -> Tensor:
        if not len(self.pairs):
            return self.steepest()
        inverse = self.inverse or torch.clone
        if self.scaled % self.rescale == 0:
            self.scale = self.pairs.scale(inverse)
        self.scaled += 1
        return self.pairs.direction(self.gradient, inverse, self.scale)

    def steepest(self) -> Tensor:
        """The direction without curvature pairs."""
        if self.inverse is None:
            return self.gradient / -max(1.0, float(self.gradient.norm()))
        return -self.inverse(self.gradient[None])[0]

    def steadied(self) -> tuple[Tensor, Tensor]:
        """The affine combination of the last iterates with the least gradient, and that gradient.

        Gradients are combined as the iterates are: exact to first order, and iterates are near each other where it
        matters. The duality gap is of first order in the gradient, which goes up and down along the iterates of
        L-BFGS while the objective falls; the least combination is steady (Anderson 1965; minimal residual smoothing,
        Zhou and Walker 1994).
        """
        self._evaluated()
        places, gradients = (torch.stack(list(part)) for part in zip(*self.recent, strict=True))
        gram = (gradients.double() @ gradients.double().mT).cpu().numpy()
        gram += 1e-10 * np.trace(gram) * np.eye(len(gram))
        if not np.trace(gram) > 0:
            return self.x, self.gradient
        solved = np.linalg.solve(gram, np.ones(len(gram)))
        share = places.new_tensor(solved / solved.sum())
        return share @ places, share @ gradients

    def step(self) -> bool:
        """One iteration; False if no decrease could be found (the precision of the dtype is exhausted)."""
        direction = self.direction()
        slope = float(self.gradient @ direction)
        if not slope < 0:
            self.pairs.clear()
            direction = self.steepest()
            slope = float(self.gradient @ direction)
            if not slope < 0:
                return False
        t = 1.0
        for _ in range(12):
            x = self.x + t * direction
            value, gradient = self.evaluate(x)
            self.n_evaluations += 1
            new_slope = float(gradient @ direction)
            if value <= self.value + 1e-4 * t * slope or (
                value <= self.value + self.noise * abs(self.value) and abs(new_slope) <= 0.9 * abs(slope)
            ):
                return self._accept(x, value, gradient)
            t *= self._shrink(t, value, slope, new_slope)
        self.pairs.clear()
        return False

    def jump(self, x: Tensor) -> bool:
        """Go on from ``x``, which something else has found, unless the objective is larger there."""
        value, gradient = self.evaluate(x)
        self.n_evaluations += 1
        if value > self.value + self.noise * abs(self.value):
            return False
        self.recent.clear()
        self._accept(x, value, gradient)
        return True

    def _shrink(self, t: float, value: float, slope: float, new_slope: float) -> float:
        # Minimiser of the cubic through both values and slopes, kept away from the ends.
        if value != value or new_slope != new_slope:
            return 0.1
        d1 = slope + new_slope - 3.0 * (value - self.value) / t
        square = d1 * d1 - slope * new_slope
        if square <= 0:
            return 0.3
        d2 = square**0.5
        bottom = new_slope - slope + 2.0 * d2
        if bottom == 0:
            return 0.3
        return min(0.7, max(0.1, 1.0 - (new_slope + d2 - d1) / bottom))

    def _accept(self, x: Tensor, value: float, gradient: Tensor) -> bool:
        s, y = x - self.x, gradient - self.gradient
        size, curvature = float(s @ s), float(s @ y)
        if curvature > LEAST_CURVATURE * math.sqrt(size * float(y @ y)):
            self.pairs.append(s, y)
        self.x, self._here = x, (value, gradient)
        self.recent.append((x, gradient))
        return size > 0 or bool(torch.any(s != 0))
