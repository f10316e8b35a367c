"""Figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convexheads.bench.common import Result
from convexheads.explain.figures import PALETTE, history_figure, new_figure


def figures(result: Result) -> dict[str, Any]:
    """One figure a problem with curves, and one for all costs against sizes: ending of the file's name -> figure."""
    found = {}
    for place, (problem, curves) in enumerate(result.curves.items(), 1):
        ending = "" if len(result.curves) == 1 else f"-{place}"
        found[ending] = history_figure(curves, f"{result.name}: {problem}", log_time=True)
    if result.lines:
        found["-costs"] = cost_figure(result.lines)
    return found


def cost_figure(lines: Mapping[str, Mapping[str, tuple[list[float], list[float]]]]) -> Any:
    """Seconds against sizes on logarithmic axes, a panel a title; a line of a size is drawn over its smallest value."""
    figure = new_figure(3.6 * len(lines), 3.4)
    for axis, (title, drawn) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for place, (name, (sizes, seconds)) in enumerate(drawn.items()):
            relative = [size / sizes[0] for size in sizes]
            label = f"{name}, from {sizes[0]:g}"
            axis.loglog(relative, seconds, "o-", color=PALETTE[place % len(PALETTE)], ms=3, lw=1.2, label=label)
        axis.set(xlabel="size over its smallest", ylabel="seconds", title=title)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
