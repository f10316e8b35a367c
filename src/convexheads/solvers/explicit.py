"""The objective of few samples by the explicit features of every basis vector of u.

Where samples are few and u is small, an evaluation is not its multiplications but the calls that ask for them. With
the features T(e_j) of the basis vectors of u's space as one matrix K (p, k rows), those of any units are u K, and
value and gradient take five products and little beside them, whatever the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convexheads.problem import Problem
from convexheads.types import Factors

MOST_NUMBERS = 2**18
"""Numbers of K up to which it is used: as many as a processor's core has in its own cache."""


def suits_explicit(problem: Problem) -> bool:
    """Whether all K of the head's components are small, and each has one gate at most."""
    rows = problem.targets[..., 0].numel()
    numbers = sum(rows * component.form.value_width * component.p for component in problem.components)
    forms = [component.form for component in problem.components]
    linear = not any(form.ridge or form.rectified for form in forms) and all(c.n_gates == 1 for c in problem.components)
    return linear and problem.budget.limit is None and problem.world.every(numbers <= MOST_NUMBERS)


@dataclass(frozen=True)
class _Part:
    """The explicit features ``K`` (p, k rows) of one component, feature by feature.

    ``u`` (units, p) and ``v`` (units k, c) lie in these places of the vector of all variables.
    """

    K: Tensor
    outputs: slice
    u: slice
    v: slice
    u_shape: tuple[int, int]
    v_shape: tuple[int, int]


class ExplicitObjective:
    """x -> (value, gradient) of the factored objective, both as :meth:`Problem.flat_value_and_gradient` has them.

    Parameters
    ----------
    problem : a program that :func:`suits_explicit`.
    shapes : factors of the shapes and the dtype that the variables are one vector of.
    """

    def __init__(self, problem: Problem, shapes: Factors) -> None:
        self.problem, self.shapes = problem, shapes
        dtype = shapes.tensors()[0].dtype
        self.targets, self.weights = problem.targets_of(slice(0, problem.n), dtype)
        self.rows = self.targets[..., 0].numel()
        self.parts, start = [], 0
        every = problem.stats_of(slice(0, problem.local), dtype)
        for component, stats, units in zip(problem.components, every, shapes.units, strict=True):
            m, p, k = len(units.v), component.p, component.form.value_width
            T = component.form.basis_features(stats, slice(0, p), None if component.gates is None else 0)
            # In this order products leave everything where the next one, or the gradient, has it.
            K = T.reshape(self.rows, p, k).permute(1, 2, 0).reshape(p, k * self.rows)
            middle, end = start + m * p, start + m * p + units.v.numel()
            u, v = slice(start, middle), slice(middle, end)
            self.parts.append(_Part(K, component.outputs, u, v, (m, p), (m * k, component.width)))
            start = end
        self.intercept = None if shapes.intercept is None else slice(start, start + problem.outputs)

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        problem, gradient = self.problem, torch.empty_like(x)
        O = x.new_zeros(problem.outputs) if self.intercept is None else x[self.intercept]
        O = O.expand(self.rows, -1).clone()
        held = []
        for part in self.parts:
            u, v = x[part.u].view(part.u_shape), x[part.v].view(part.v_shape)
            T = (u @ part.K).view(len(v), self.rows)
            O[:, part.outputs].addmm_(T.mT, v)
            held.append((T, v))
        value, L = problem.own_loss.value_and_gradient(O.view(self.targets.shape), self.targets, self.weights)
        L = L.view(self.rows, problem.outputs)
        if self.intercept is not None:
            torch.sum(L, 0, out=gradient[self.intercept])
        for part, (T, v) in zip(self.parts, held, strict=True):
            own = L[:, part.outputs]
            torch.mm(T, own, out=gradient[part.v].view(part.v_shape))
            moved = (v @ own.mT).view(part.u_shape[0], part.K.shape[1])
            torch.mm(moved, part.K.mT, out=gradient[part.u].view(part.u_shape))
        value, gradient = problem.summed(value, gradient)
        return value + problem.flat_decay(self.shapes, x, gradient), gradient
