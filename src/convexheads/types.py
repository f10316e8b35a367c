"""Small value types shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A number known to lie between two bounds.

    ``lower`` is attained by a vector that was found; ``upper`` is what ``method`` vouches for.
    ``proved`` is True only where ``upper`` holds for certain, not merely with high probability.
    """

    lower: float
    upper: float
    method: str
    proved: bool

    def __post_init__(self) -> None:
        if not self.lower <= self.upper:
            raise ValueError(f"an interval needs lower <= upper; got [{self.lower}, {self.upper}]")


@dataclass(frozen=True)
class BlockShape:
    """Name and size of one block Z = sum_r u_r v_r^T of the convex program (p = dim u, q = dim v)."""

    branch: int
    head: str
    group: int
    gate: int | None
    p: int
    q: int

    def __str__(self) -> str:
        gate = "" if self.gate is None else f", gate {self.gate}"
        return f"branch {self.branch} ({self.head}), group {self.group}{gate}: {self.p} x {self.q}"


@dataclass
class Units:
    """The units of one component (a branch's channel group): all of its gates together.

    ``u`` (m, *u_shape), or None for a ridge branch; ``v`` (m, k, c) with k the width of the unit's
    features and c the outputs that the component writes; ``gate`` (m,) says which gate a unit belongs to,
    in ascending order, or None where there is no gate.
    """

    u: Tensor | None
    v: Tensor
    gate: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [self.v] if self.u is None else [self.u, self.v]

    def of_block(self, gate: int | None) -> Tensor:
        """Numbers of the units of one block: of this gate, or all of them where there is no gate."""
        every = torch.arange(len(self.v), device=self.v.device)
        return every if self.gate is None else every[self.gate == gate]

    def to(self, dtype: torch.dtype) -> Units:
        return Units(None if self.u is None else self.u.to(dtype), self.v.to(dtype), self.gate)

    def clone(self) -> Units:
        """A copy that shares no memory with this one."""
        u, gate = (None if t is None else t.clone() for t in (self.u, self.gate))
        return Units(u, self.v.clone(), gate)


@dataclass
class Factors:
    """Everything that is optimised: the units of every component and the intercept (c,) or None."""

    units: list[Units]
    intercept: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        found = [t for units in self.units for t in units.tensors()]
        return found if self.intercept is None else [*found, self.intercept]

    def flat(self) -> Tensor:
        """All variables as one vector."""
        return torch.cat([t.reshape(-1) for t in self.tensors()])

    def like(self, vector: Tensor) -> Factors:
        """The variables held in ``vector``, in this object's shapes (views, no copy)."""
        # Without what Tensor.split does before it gets there.
        parts = iter(torch.split_with_sizes(vector, [t.numel() for t in self.tensors()]))

        def take(shape: Tensor) -> Tensor:
            return next(parts).view(shape.shape)

        units = [Units(None if each.u is None else take(each.u), take(each.v), each.gate) for each in self.units]
        return Factors(units, None if self.intercept is None else take(self.intercept))

    def to(self, dtype: torch.dtype) -> Factors:
        intercept = None if self.intercept is None else self.intercept.to(dtype)
        return Factors([each.to(dtype) for each in self.units], intercept)

    def clone(self) -> Factors:
        """A copy that shares no memory with this one."""
        intercept = None if self.intercept is None else self.intercept.clone()
        return Factors([each.clone() for each in self.units], intercept)

    @property
    def n_units(self) -> int:
        return sum(each.v.shape[0] for each in self.units if each.u is not None)


@dataclass
class History:
    """What a solver saw: one entry a check."""

    objective: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)

    def append(self, objective: float, gap: float, seconds: float, rank: int) -> None:
        self.objective.append(objective)
        self.gap.append(gap)
        self.seconds.append(seconds)
        self.rank.append(rank)

    def as_dict(self) -> dict[str, list]:
        return {
            "objective": list(self.objective),
            "gap": list(self.gap),
            "seconds": list(self.seconds),
            "rank": list(self.rank),
        }
