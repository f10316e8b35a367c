"""Accelerated proximal gradient steps where blocks are vectors: a start for the factored iterations.

With one output and one value feature (q = k c = 1) a block Z_g is a vector z_g in R^p and its nuclear norm is the
Euclidean one, so that the program is a group lasso,

    min_{z, b}  f( sum_g A_g(z_g) + 1 b ) + beta sum_g w_g ||z_g||.

Its proximal map shortens every block, or puts it to zero: few steps tell which blocks are in use, where the factored
iterations see them shrink for long. FISTA (Beck and Teboulle 2009) with restarts (O'Donoghue and Candes 2015) and step
lengths that follow the local curvature, the intercept at its optimum throughout. An iteration is one pass for outputs
and one for the adjoint, because the outputs of extrapolated blocks are extrapolated outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexheads.certificate import dual_point
from convexheads.problem import Problem
from convexheads.types import Factors, Units

STEPS = 50
"""Most iterations: what is badly conditioned is better left to the factored iterations."""
SETTLED = 1e-3
"""Share of the first step's length at which the steps end."""
RELAXED, RAISED = 0.95, 1.25
"""Factors on the curvature from one iteration to the next, and where it proves too small."""
ROUNDING = 1e-12
"""Relative error of a value of the loss."""


def has_vector_blocks(problem: Problem) -> bool:
    """Whether every block is a vector, and all gates of a component share their work."""
    return all(
        not component.ridge and component.q == 1 and (component.gates is None or component.form.joint)
        for component in problem.components
    )


class VectorBlocks:
    """z_g of all components and gates, one after the other, as one vector x (D,).

    Attributes
    ----------
    block : (D,) the number of the block that an entry belongs to.
    penalties : (blocks,) beta w of every block.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        lengths = torch.tensor([c.p for c in problem.components for _ in range(c.n_gates)], device=problem.device)
        self.block = torch.arange(len(lengths), device=problem.device).repeat_interleave(lengths)
        penalties = [problem.penalty_weight(c) for c in problem.components for _ in range(c.n_gates)]
        self.penalties = torch.tensor(penalties, dtype=problem.dtype, device=problem.device)
        self.shapes = [(c.n_gates, *c.form.u_shape) for c in problem.components]

    def norms(self, x: Tensor) -> Tensor:
        """||z_g|| of every block."""
        return x.new_zeros(len(self.penalties)).index_add_(0, self.block, x * x).sqrt()

    def shrunk(self, x: Tensor, step: float) -> Tensor:
        """The proximal map of ``step`` times the penalty: every block shortened by step beta w, or zero."""
        kept = 1.0 - step * self.penalties / self.norms(x).clamp_min(torch.finfo(x.dtype).tiny)
        return x * kept.clamp_min(0.0)[self.block]

    def units(self, x: Tensor, v: Tensor) -> list[Units]:
        """One unit for every block with v (blocks,) above zero: u from x."""
        found = []
        parts = x.split([math.prod(shape) for shape in self.shapes])
        values = v.split([shape[0] for shape in self.shapes])
        for component, part, shape, own in zip(self.problem.components, parts, self.shapes, values, strict=True):
            used = own.nonzero()[:, 0]
            gate = None if component.gates is None else used
            found.append(Units(part.view(shape)[used], own[used].view(-1, 1, 1), gate))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Outputs without intercept, shape of the targets, in float64."""
        units = self.units(x, self.norms(x).gt(0).to(x.dtype))
        return self.problem.forward(Factors(units), x.dtype).double()

    def adjoint(self, L: Tensor) -> Tensor:
        """A^* L of all blocks, (D,)."""
        problem = self.problem
        found = [g for k in range(len(self.shapes)) for _, g in problem.gammas(L.to(problem.dtype), k, problem.dtype)]
        return torch.cat([gamma.flatten() for gamma in found])

    def balanced(self, x: Tensor, b: Tensor | None) -> Factors:
        """One unit a block that is not zero, with ||u|| = ||v||."""
        root = self.norms(x).sqrt()
        scaled = x / root.clamp_min(torch.finfo(x.dtype).tiny)[self.block]
        return Factors(self.units(scaled, root), None if b is None else b.to(x.dtype))

    def vector(self, factors: Factors) -> Tensor:
        """x of any factors: z_g = sum_j u_j v_j over the units of gate g."""
        parts = []
        for units, shape in zip(factors.units, self.shapes, strict=True):
            assert units.u is not None
            gate = units.gate
            if gate is None:
                gate = torch.zeros(len(units.v), dtype=torch.long, device=units.v.device)
            products = units.u.flatten(1) * units.v.flatten(1)
            parts.append(products.new_zeros(shape[0], products.shape[1]).index_add_(0, gate, products).flatten())
        return torch.cat(parts).to(self.problem.dtype)


class ProximalSteps:
    """FISTA on the blocks of one problem, the intercept at its optimum throughout."""

    def __init__(self, problem: Problem, intercept: Tensor | None) -> None:
        self.problem, self.b = problem, intercept
        self.blocks = VectorBlocks(problem)
        self.targets, self.weights = problem.targets_of(slice(0, problem.n), torch.float64)
        self.curvature = 0.0

    def centred(self, O: Tensor) -> Tensor:
        """Outputs with the best intercept, which is kept."""
        if not self.problem.fit_intercept:
            return O
        self.b = self.problem.best_intercept(O, self.b)
        return O + self.b

    def value(self, O: Tensor) -> float:
        """The loss at outputs without intercept."""
        return self.problem.loss.value(self.centred(O), self.targets, self.weights)

    def first_curvature(self, centre: Tensor, gradient: Tensor) -> float:
        """The curvature along the gradient: a guess at the largest one, from below."""
        moved = self.blocks.forward(gradient)
        image = self.problem.loss.hessian_product(centre, self.targets, self.weights, moved)
        return float(self.blocks.adjoint(image).norm() / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny))

    def step(self, y: Tensor, O: Tensor) -> tuple[Tensor, Tensor] | None:
        """One proximal step from blocks y with outputs O: blocks and outputs; None where the loss is flat.

        The loss may rise above its tangent by curvature / 2 times the squared length of the step. It is compared in
        terms of outputs, in float64, where nothing is lost to the rounding of the gradient.
        """
        centre = self.centred(O)
        L = dual_point(self.problem, centre)
        value = self.problem.loss.value(centre, self.targets, self.weights)
        gradient = self.blocks.adjoint(L)
        self.curvature = RELAXED * (self.curvature or self.first_curvature(centre, gradient))
        if not self.curvature > 0.0:
            return None
        while True:
            new = self.blocks.shrunk(y - gradient / self.curvature, 1.0 / self.curvature)
            moved = self.blocks.forward(new)
            rise = self.value(moved) - value - self.problem.world.total(float((L * (moved - O)).sum()))
            allowed = 0.5 * self.curvature * float((new - y).double().square().sum())
            if not rise > allowed + ROUNDING * abs(value):
                return new, moved
            self.curvature *= RAISED

    def run(self, x: Tensor) -> Factors:
        """At most ``STEPS`` steps from blocks x; balanced units."""
        y, momentum, longest = x, 1.0, 0.0
        Ox = Oy = self.blocks.forward(x)
        for _ in range(STEPS):
            found = self.step(y, Oy)
            if found is None:
                break
            new, O = found
            if float((y - new) @ (new - x)) > 0:
                momentum = 1.0
            length = float((new - y).norm()) * self.curvature
            grown = 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum * momentum))
            ahead = (momentum - 1.0) / grown
            y, Oy = new + ahead * (new - x), O + ahead * (O - Ox)
            x, Ox, momentum, longest = new, O, grown, max(longest, length)
            if length <= SETTLED * longest:
                break
        self.centred(Ox)
        return self.blocks.balanced(x, self.b)


def proximal_start(problem: Problem, start: Factors) -> Factors:
    """Blocks near the optimum, one balanced unit for each that is not zero; from ``start`` with or without units.

    ``problem`` must have vector blocks: see :func:`has_vector_blocks`.
    """
    steps = ProximalSteps(problem, start.intercept)
    return steps.run(steps.blocks.vector(start))
