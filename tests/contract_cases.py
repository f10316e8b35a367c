"""What the contract suite compares with: every head from its definition in numpy, and problems of every kind.

The definitions below share no code with the library and avoid every shortcut: explicit circulant matrices, explicit
s x s attention, one unit and one sample at a time. A newly registered head, loss or solver is enrolled by itself;
``test_everything_registered_is_enrolled`` says what has to be written here for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from convexheads.architectures import ARCHITECTURES
from convexheads.gates import ACTIVATIONS
from convexheads.heads import Branch, make_branch
from convexheads.losses import make_loss
from convexheads.problem import Problem
from convexheads.types import Factors, Units

Array = np.ndarray
Grid = tuple[int, int] | None

# --------------------------------------------------------------------------------------------------
# Definitions: one unit on one sample, X (s, d), u, v (k, c), gate of u's shape or None -> (s, c)


def masked(pre: Callable[[Array], Array], u: Array, gate: Array | None) -> Array:
    hidden = pre(u)
    return hidden if gate is None else hidden * (pre(gate) >= 0)


def self_attention(X: Array, u: Array, v: Array, gate: Array | None, grid: Grid) -> Array:
    return masked(lambda W: X @ W @ X.T, u, gate) @ X @ v


def mixer(X: Array, u: Array, v: Array, gate: Array | None, grid: Grid) -> Array:
    return masked(lambda W: W @ X, u, gate) @ v


def circulant(X: Array, grid: Grid) -> Array:
    """circ(X) = [X, roll(X, 1), ...] of (s, s d); with two-dimensional shifts on a grid."""
    s, d = X.shape
    if grid is None:
        return np.hstack([np.roll(X, k, axis=0) for k in range(s)])
    image = X.reshape(*grid, d)
    shifts = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    return np.hstack([np.roll(image, shift, axis=(0, 1)).reshape(s, d) for shift in shifts])


def fno(X: Array, u: Array, v: Array, gate: Array | None, grid: Grid) -> Array:
    circ = circulant(X, grid)
    return np.outer(masked(lambda w: circ @ w, u, gate), v[0])


def mlp(X: Array, u: Array, v: Array, gate: Array | None, grid: Grid) -> Array:
    return np.outer(masked(lambda w: X @ w, u, gate), v[0])


def linear(X: Array, u: Array, v: Array, gate: Array | None, grid: Grid) -> Array:
    return X @ v


# block_fno is one fno a channel group; what belongs to a group is checked by test_channel_groups.
DEFINITIONS = {
    "self_attention": self_attention,
    "mixer": mixer,
    "fno": fno,
    "block_fno": fno,
    "mlp": mlp,
    "linear": linear,
}


def reference_outputs(
    branches: list[Branch], tokens: list[Array], units: list[list[Units]], intercept: Array | None
) -> Array:
    """Outputs (n[, s], c) of a sum of heads, from the definitions; ``units`` in the plain form, a list a branch."""
    n, c = len(tokens[0]), branches[0].outputs
    found = []
    for i in range(n):
        total: Any = 0.0
        for branch, X, groups in zip(branches, tokens, units, strict=True):
            rows = np.zeros((X.shape[1], c))
            # Contiguous channel groups: group b of B reads features and writes outputs number b.
            width, share = X.shape[2] // len(groups), c // len(groups)
            for b, each in enumerate(groups):
                part = X[i, :, b * width : (b + 1) * width]
                for r in range(len(each.v)):
                    gate = None
                    if each.gate is not None:
                        gate = branch.gates[b][int(each.gate[r])].numpy()
                    u = None if each.u is None else each.u[r].numpy()
                    rows[:, b * share : (b + 1) * share] += DEFINITIONS[branch.head](
                        part, u, each.v[r].numpy(), gate, branch.grid
                    )
            total = total + (rows.mean(0) if branch.pooled else rows)
        found.append(total if intercept is None else total + intercept)
    return np.stack(found)


# --------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Case:
    """One head on random tokens of shape (n, s, d) with c outputs."""

    head: str
    activation: str = "linear"
    pooled: bool = True
    grid: Grid = None
    n_blocks: int = 1
    loss: str = "squared"
    intercept: bool = True
    n: int = 7
    s: int = 6
    d: int = 4
    c: int = 2
    gates: int = 3
    seed: int = 0
    weight: float = 1.0

    def __str__(self) -> str:
        parts = [self.head, self.activation, "pooled" if self.pooled else "tokens"]
        if self.grid is not None:
            parts.append(f"{self.grid[0]}x{self.grid[1]}")
        if self.s == 1:
            parts.append("one-token")
        if self.c == 1:
            parts.append("one-output")
        if self.loss != "squared":
            parts.append(self.loss)
        return "-".join(parts)

    def options(self) -> dict[str, Any]:
        return {
            "head": self.head,
            "activation": self.activation,
            "gates": self.gates,
            "grid": self.grid,
            "n_blocks": self.n_blocks,
        }


def cases(**changes: Any) -> Iterator[Case]:
    """Every registered head with every activation, output and token neighbourhood that it has."""
    for name, cls in ARCHITECTURES.items():
        for activation in ("linear",) if cls.ridge else ACTIVATIONS:
            for pooled in (True, False):
                for grid in (None, (2, 3)) if "grid" in cls.options else (None,):
                    blocks = 2 if "n_blocks" in cls.options else 1
                    yield replace(Case(name, activation, pooled, grid, blocks), **changes)


CASES = [
    *cases(),
    Case("mlp", "gated_relu", s=1, d=5),  # a form of its own
]
SMALL = [case for case in CASES if case.pooled and case.grid is None]
"""One case a head and activation."""
NUCLEAR = [case for case in CASES if case.head != "linear"]
"""Cases whose blocks have a nuclear norm."""
HEADS = [
    (Case("self_attention", s=4, d=4, c=5),),
    (Case("mixer", "gated_relu", s=4, d=4, c=5, gates=2),),
    (Case("self_attention", s=4, d=4, c=5), Case("mlp", "gated_relu", s=4, d=5, c=5, weight=2.0)),
    (Case("mixer", s=4, d=4, c=5, intercept=False),),
]
"""Single heads, linear and gated, and a sum of heads."""


def make_targets(loss: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Random targets that a loss accepts: distributions, real numbers, or labels in [0, 1]."""
    if loss == "cross_entropy":
        return rng.dirichlet(np.full(shape[-1], 0.7), shape[:-1])
    if loss == "multilabel_logistic":
        soft, hard = rng.uniform(size=shape), rng.integers(0, 2, shape)
        return np.where(rng.uniform(size=shape) < 0.5, soft, hard)
    return rng.normal(size=shape)


# Losses whose targets `make_targets` knows.
TARGETS = ("cross_entropy", "multilabel_logistic", "squared")


@dataclass
class Setting:
    """A problem with everything that went into it."""

    problem: Problem
    branches: list[Branch]
    tokens: list[Array]


def make_setting(*heads: Case, beta: float = 0.1, uniform: bool = False) -> Setting:
    """The problem of a case, or of a sum of cases on the same samples (the first decides on loss and outputs)."""
    first = heads[0]
    rng = np.random.default_rng(first.seed)
    branches, tokens = [], []
    for case in heads:
        options = {**case.options(), "weight": case.weight}
        branches.append(make_branch(options, (case.s, case.d), first.c, first.pooled, rng))
        tokens.append(rng.normal(size=(first.n, case.s, case.d)))
    shape = (first.n, first.c) if first.pooled else (first.n, first.s, first.c)
    targets = make_targets(first.loss, shape, rng)
    weights = np.ones(first.n) if uniform else rng.uniform(0.2, 1.0, first.n)
    problem = Problem(
        [c for index, branch in enumerate(branches) for c in branch.components(index)],
        [torch.from_numpy(X) for X in tokens],
        make_loss(first.loss),
        torch.from_numpy(targets),
        torch.from_numpy(weights / weights.sum()),
        beta,
        first.intercept,
        torch.float64,
    )
    return Setting(problem, branches, tokens)


def float32_problem(*heads: Case, beta: float = 0.02) -> Problem:
    """The problem of :func:`make_setting` with iterations in float32."""
    return make_setting(*heads, beta=beta).problem.in_dtype(torch.float32)


def random_units(problem: Problem, count: int = 2, seed: int = 1, scale: float = 0.5) -> Factors:
    """Random units, ``count`` a gate, in the form that the problem works in."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    units = []
    for component in problem.components:
        k, c = component.form.value_width, component.width
        if component.ridge:
            units.append(Units(None, draw(1, k, c)))
            continue
        m = count * component.n_gates
        gate = None if component.gates is None else torch.arange(component.n_gates).repeat_interleave(count)
        units.append(Units(draw(m, *component.form.u_shape), draw(m, k, c), gate))
    return Factors(units, draw(problem.outputs) if problem.fit_intercept else None)


def plain_units(setting: Setting, factors: Factors) -> list[list[Units]]:
    """The units of every branch's channel groups, lifted to the plain form that the definitions take."""
    lifted = [
        Units(None if each.u is None else component.form.lift(each.u), each.v, each.gate)
        for component, each in zip(setting.problem.components, factors.units, strict=True)
    ]
    parts = iter(lifted)
    return [[next(parts) for _ in branch.gates] for branch in setting.branches]
