"""Block FNO: B independent FNOs; block b reads channel group b (d / B) and writes output group b (c / B)."""

from __future__ import annotations

from typing import Any

from convexheads.architectures.base import Architecture, register
from convexheads.architectures.fno import FNO
from convexheads.errors import InputError, describe


@register
class BlockFNO(FNO):
    """The maps of :class:`FNO`, on contiguous groups of channels and outputs."""

    name = "block_fno"
    options = ("grid", "n_blocks")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for size, what in ((self.features, "features d"), (self.outputs, "outputs c")):
            if self.n_blocks < 1 or size % self.n_blocks:
                raise InputError(
                    "n_blocks: "
                    + describe(
                        f"{self.n_blocks} with {size} {what}",
                        f"a number of blocks >= 1 that divides the {what}",
                        "Choose another n_blocks, or project the tokens to a number of features it divides.",
                    )
                )
        self._group = (self.features // self.n_blocks, self.outputs // self.n_blocks)

    @property
    def u_shape(self) -> tuple[int, ...]:
        return (self.tokens * self._group[0],)

    @property
    def groups(self) -> list[tuple[slice, slice]]:
        d, c = self._group
        return [(slice(b * d, b * d + d), slice(b * c, b * c + c)) for b in range(self.n_blocks)]

    def form(self, activation: str) -> Architecture:
        # Inside one group this is an FNO of the group's sizes, with all of its reductions.
        return FNO(self.tokens, *self._group, self.pooled, self.grid).form(activation)
