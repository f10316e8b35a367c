"""Preconditioned L-BFGS on the factored objective.

Limited-memory BFGS (Nocedal and Wright 2006, algorithm 7.4) whose initial inverse Hessian is a preconditioner,
scaled by s'y / y'H0 y. A step is accepted by sufficient decrease up to the noise of the objective (the
approximate Wolfe idea of Hager and Zhang 2005), so that float32 products do not stall it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[float, Tensor]]
MEMORY = 60


class LBFGS:
    """Minimiser that is advanced one iteration at a time.

    Parameters
    ----------
    evaluate : x -> (value, gradient).
    x : start.
    noise : relative error of a value; increases below it are accepted.
    """

    def __init__(self, evaluate: Evaluate, x: Tensor, noise: float, memory: int = MEMORY) -> None:
        self.evaluate, self.x, self.noise = evaluate, x, noise
        self.value, self.gradient = evaluate(x)
        self.n_evaluations = 1
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)
        self.inverse: Callable[[Tensor], Tensor] | None = None

    def set_inverse(self, inverse: Callable[[Tensor], Tensor]) -> None:
        """Use another initial inverse Hessian; curvature pairs are kept."""
        self.inverse = inverse

    def _precondition(self, vector: Tensor) -> Tensor:
        return vector if self.inverse is None else self.inverse(vector)

    def direction(self) -> Tensor:
        q = self.gradient.clone()
        weights = []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * float(s @ q)
            q.sub_(y, alpha=alpha)
            weights.append(alpha)
        r = self._precondition(q)
        if self.pairs:
            s, y, rho = self.pairs[-1]
            r = r * (1.0 / (rho * max(float(y @ self._precondition(y)), 1e-300)))
        elif self.inverse is None:
            r = r / max(1.0, float(self.gradient.norm()))
        for (s, y, rho), alpha in zip(self.pairs, reversed(weights), strict=True):
            r.add_(s, alpha=alpha - rho * float(y @ r))
        return -r

    def step(self) -> bool:
        """One iteration; False if no decrease could be found (the precision of the dtype is exhausted)."""
        direction = self.direction()
        slope = float(self.gradient @ direction)
        if not slope < 0:
            self.pairs.clear()
            direction = -self._precondition(self.gradient)
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
        curvature = float(s @ y)
        if curvature > 1e-10 * float(s.norm() * y.norm()):
            self.pairs.append((s, y, 1.0 / curvature))
        moved = bool(torch.any(s != 0))
        self.x, self.value, self.gradient = x, value, gradient
        return moved
