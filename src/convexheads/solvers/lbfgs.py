"""Preconditioned L-BFGS on the factored objective.

Limited-memory BFGS whose initial inverse Hessian is a preconditioner H0, scaled by s'y / y'H0 y, in the compact form of
Byrd, Nocedal and Schnabel (1994, theorem 2.2): with the images H0 y kept beside the steps s, a direction takes one
application of H0 and two products with all of them, and the scale takes nothing. A step is accepted by sufficient
decrease up to the noise of the objective (the approximate Wolfe idea of Hager and Zhang 2005), so that float32 products
do not stall it.
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
IMAGES = 2**22
"""Numbers of the vectors that an initial inverse Hessian is applied to at once."""
SCALED = 5
"""Newest pairs that the scale of the initial inverse Hessian is taken from."""
STEADY = 4
"""Last iterates that are combined to the one of least gradient."""


class CurvaturePairs:
    """The last steps s and changes of gradient y, with the images H0 y and the products that a direction needs.

    Rows are reused in turn; ``order`` has them from the oldest to the newest, as products are.

    Parameters
    ----------
    like : a vector of the variables' shape, dtype and device.
    most : pairs that are kept.

    Attributes
    ----------
    moves : (rows, 2, number of variables), s and H0 y of each pair side by side, so that one product reads both.
    products : s_i'y_j for i <= j.
    inner : y_i'H0 y_j.
    imaged : whether images and ``inner`` are there for the H0 in use; if not, :meth:`apply` takes them.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self.most = most
        self.moves = like.new_empty(0, 2, len(like))
        self.Y = like.new_empty(0, len(like))
        # In the order of Fortran, as LAPACK wants it.
        self.products = np.zeros((most, most), order="F")
        self.inner = np.zeros((most, most))
        self.imaged = True
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs (s, y), oldest first."""
        return ((self.moves[k, 0], self.Y[k]) for k in self.order)

    def clear(self) -> None:
        self.order = []

    def _free_row(self) -> int:
        if len(self.order) == self.most:
            for products in (self.products, self.inner):
                products[:-1, :-1] = products[1:, 1:].copy()
            return self.order.pop(0)
        row = len(self.order)
        if row == len(self.Y):
            more = min(self.most, max(8, 2 * row)) - row
            self.moves = torch.cat([self.moves, self.moves.new_empty(more, *self.moves.shape[1:])])
            self.Y = torch.cat([self.Y, self.Y.new_empty(more, self.Y.shape[1])])
        return row

    def append(self, s: Tensor, y: Tensor, image: Tensor) -> None:
        """Add a pair with s'y > 0 and the image H0 y; the oldest goes where there are too many."""
        row = self._free_row()
        torch.stack([s, image], out=self.moves[row])
        self.Y[row] = y
        self.order.append(row)
        held = len(self.order)
        new = self._along(y)
        self.products[:held, held - 1] = new[:, 0]
        self.inner[:held, held - 1] = self.inner[held - 1, :held] = new[:, 1]

    def _along(self, vector: Tensor) -> np.ndarray:
        """Products of s and of H0 y with a vector, (pairs, 2), those of the oldest pair first, in float64."""
        found = self.moves[: len(self.order)].flatten(0, 1) @ vector
        return found.cpu().double().numpy().reshape(-1, 2)[self.order]

    def mapped(self, transform: Apply) -> CurvaturePairs:
        """The pairs under a linear map of the variables that keeps inner products of gradients and steps.

        Without images.
        """
        S, Y = transform(self.moves[self.order, 0]), transform(self.Y[self.order])
        curved = (S * Y).sum(1) > LEAST_CURVATURE * S.norm(dim=1) * Y.norm(dim=1)
        found = CurvaturePairs(S[0], self.most)
        S, found.Y = S[curved], Y[curved]
        found.moves = torch.stack([S, torch.zeros_like(S)], 1)
        held = len(S)
        found.order = list(range(held))
        found.products[:held, :held] = (S @ found.Y.mT).cpu().double().numpy()
        found.imaged = False
        return found

    def apply(self, inverse: Apply, numbers: int = IMAGES) -> None:
        """Take the images of another H0, which is applied to vectors of so many ``numbers`` at once."""
        self.imaged = True
        held = len(self.order)
        step = max(1, numbers // self.Y.shape[1])
        for start in range(0, held, step):
            rows = slice(start, min(start + step, held))
            self.moves[rows, 1] = inverse(self.Y[rows])
        inner = self.moves[:held, 1] @ self.Y[:held].mT
        self.inner[:held, :held] = (0.5 * (inner + inner.mT)).cpu().double().numpy()[np.ix_(self.order, self.order)]

    @property
    def scale(self) -> float:
        """s'y / y'H0 y, how much too small H0 is: the geometric mean of the newest pairs, as single ones jump."""
        recent = slice(max(0, len(self.order) - SCALED), len(self.order))
        curved, guessed = self.products.diagonal()[recent].tolist(), self.inner.diagonal()[recent].tolist()
        # Rounding may leave nothing of a small y in its image.
        logs = [math.log(a / b) for a, b in zip(curved, guessed, strict=True) if b > 0.0]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    def direction(self, gradient: Tensor, image: Tensor, scale: float) -> Tensor:
        """Minus the inverse Hessian times ``gradient``, from ``scale`` H0; ``image`` is H0 times the gradient."""
        held = len(self.order)
        along = self._along(gradient)
        upper = self.products[:held, :held]
        # LAPACK reads the upper triangle only.
        alpha = dtrtrs(upper, along[:, 0])[0]
        right = upper.diagonal() * alpha + scale * (self.inner[:held, :held] @ alpha - along[:, 1])
        shares = np.empty((held, 2))
        shares[self.order, 0], shares[self.order, 1] = dtrtrs(upper, right, trans=1)[0], -scale * alpha
        own = torch.from_numpy(shares.reshape(-1)).to(image.device, image.dtype)
        return torch.addmv(image, self.moves[:held].flatten(0, 1).mT, own, beta=-scale, alpha=-1.0)


class LBFGS:
    """Minimiser that is advanced one iteration at a time.

    Parameters
    ----------
    evaluate : x -> (value, gradient).
    x : start.
    noise : relative error of a value; increases below it are accepted.
    memory : curvature pairs that are kept.
    images : numbers of the vectors that a new initial inverse Hessian is applied to at once.
    """

    def __init__(self, evaluate: Evaluate, x: Tensor, noise: float, memory: int = MEMORY, images: int = IMAGES) -> None:
        self.evaluate, self.x, self.noise = evaluate, x, noise
        self.n_evaluations = 0
        self._here: tuple[float, Tensor] | None = None
        self.pairs = CurvaturePairs(x, memory)
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=STEADY)
        self.inverse: Apply | None = None
        self.images = images
        self._image: Tensor | None = None

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
        self.inverse, self._image, self.pairs.imaged = inverse, None, not len(self.pairs)

    def inherit(self, other: LBFGS) -> None:
        """Know what another optimiser of the same variables knows of their curvature."""
        self.pairs, self.inverse = other.pairs, other.inverse

    def _applied(self, vector: Tensor) -> Tensor:
        return vector if self.inverse is None else self.inverse(vector[None])[0]

    @property
    def image(self) -> Tensor:
        """The initial inverse Hessian times the gradient at ``x``."""
        if self._image is None:
            self._image = self._applied(self.gradient)
        return self._image

    def direction(self) -> Tensor:
        if not len(self.pairs):
            return self.steepest()
        if not self.pairs.imaged:
            self.pairs.apply(self.inverse or torch.clone, self.images)
        return self.pairs.direction(self.gradient, self.image, self.pairs.scale)

    def steepest(self) -> Tensor:
        """The direction without curvature pairs."""
        if self.inverse is None:
            return self.gradient / -max(1.0, float(self.gradient.norm()))
        return -self.image

    def steadied(self) -> tuple[Tensor, Tensor]:
        """The affine combination of the last iterates with the least gradient, and that gradient.

        Gradients are combined as the iterates are: exact to first order, and iterates are near each other where it
        matters. The duality gap is of first order in the gradient, which goes up and down along the iterates of
        L-BFGS while the objective falls; the least combination is steady (Anderson 1965; minimal residual smoothing,
        Zhou and Walker 1994).
        """
        self._evaluated()
        places, gradients = (torch.stack(list(part)) for part in zip(*self.recent, strict=True))
        exact = gradients.double()
        gram = (exact @ exact.mT).cpu().numpy()
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
            x = torch.add(self.x, direction, alpha=t)
            value, gradient = self.evaluate(x)
            self.n_evaluations += 1
            if value <= self.value + 1e-4 * t * slope:
                return self._accept(x, value, gradient)
            new_slope = float(gradient @ direction)
            if value <= self.value + self.noise * abs(self.value) and abs(new_slope) <= 0.9 * abs(slope):
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
        size, curvature, change = float(s @ s), float(s @ y), float(y @ y)
        before = self._image
        self.x, self._here, self._image = x, (value, gradient), None
        if curvature > LEAST_CURVATURE * math.sqrt(size * change):
            # What the next direction needs says what became of y.
            image = self._applied(y) if before is None else self.image - before
            least = LEAST_CURVATURE * math.sqrt(change * float(image @ image))
            if before is not None and not float(y @ image) > least:
                # A difference that is rounding: better anew.
                image = self._applied(y)
            self.pairs.append(s, y, image)
        self.recent.append((x, gradient))
        return size > 0 or bool(torch.any(s != 0))
