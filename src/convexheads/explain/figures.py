"""Figures of a fitted head: spectra, energies, clusters and evidence over an image, the course of a fit.

They need matplotlib (``pip install 'convexheads[plots]'``), which is imported when the first figure is drawn. Every
function returns a ``matplotlib.figure.Figure`` that belongs to no window and no global state; :func:`save_figure`
writes it. Colours are told apart with any colour vision: those of Okabe and Ito for categories, cividis for
sizes, orange against purple for signs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from convexheads.errors import DataError, InputError, describe, require
from convexheads.explain.fitted import Fitted
from convexheads.explain.latent import LatentEnergies, latent_energies
from convexheads.explain.spectra import BlockSpectrum, gate_sparsity, spectra, truncation_curve
from convexheads.tokens.files import write_atomic

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito 2008; the yellow late, because it is faint on white."""
SIZES = "cividis"
SIGNS = "PuOr"
FORMATS = ("png", "svg", "pdf")
MAX_PANELS = 12
NO_GAP = 1e-8
"""Relative gaps below this are drawn there: they are rounding."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure of ``width`` x ``height`` inches.

    Raises
    ------
    MissingExtraError
        Without matplotlib.
    """
    figure = require("matplotlib.figure", "plots").Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def figure_bytes(figure: Any, format: str = "png", dpi: int = 150) -> bytes:
    """A figure as the bytes of a ``png``, ``svg`` or ``pdf`` file; equal figures give equal bytes."""
    if format not in FORMATS:
        raise InputError("format: " + describe(repr(format), "one of " + ", ".join(FORMATS)))
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[format]
    with require("matplotlib", "plots").rc_context({"svg.hashsalt": "convexheads"}):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def save_figure(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure atomically; the name's ending, .png, .svg or .pdf, decides the format.

    Raises
    ------
    InputError
        For another ending.
    DataError
        If the file cannot be written.
    """
    path = Path(path)
    data = figure_bytes(figure, path.suffix[1:].lower(), dpi)
    try:
        write_atomic(path, data)
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error.strerror or error})") from error
    return path


def spectrum_figure(estimator: Any, title: str | None = None) -> Any:
    """Sizes of the heads of every block, use of the gates (where there are any), and the tail after truncation.

    Parameters
    ----------
    estimator : fitted estimator, or a pipeline that ends in one.
    title : above the figure; None: the number of heads.
    """
    fitted = Fitted(estimator)
    blocks = [block for block in spectra(estimator) if block.rank]
    gates = gate_sparsity(estimator)
    cost = truncation_curve(estimator)
    panels = 1 + bool(gates) + (len(cost) > 1)
    figure = new_figure(4.0 * panels, 3.4)
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    _draw_spectrum(axes.pop(0), blocks)
    if gates:
        _draw_gates(axes.pop(0), gates)
    if axes:
        _draw_cost(axes.pop(0), cost, fitted.estimator.certificate_.primal)
    total = sum(block.rank for block in blocks)
    figure.suptitle(title or f"{total} head{'s' * (total != 1)} in {len(blocks)} block{'s' * (len(blocks) != 1)}")
    return figure


def _draw_spectrum(axis: Any, blocks: Sequence[BlockSpectrum]) -> None:
    axis.set(xlabel="head, by size within its block", ylabel="singular value", title="Sizes of the heads")
    if not blocks:
        _say(axis, "no heads: beta is at or above beta_max")
        return
    few = len(blocks) <= len(PALETTE)
    for i, block in enumerate(sorted(blocks, key=lambda block: -block.nuclear_norm)):
        colour = PALETTE[i] if few else _map(SIZES)(i / (len(blocks) - 1))
        values = block.singular_values[: block.rank]
        label = str(block) if few else None
        axis.plot(np.arange(1, block.rank + 1), values, "o-", color=colour, ms=3, lw=1, label=label)
    axis.set_yscale("log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if few and len(blocks) > 1:
        axis.legend(fontsize=7, frameon=False)
    elif not few:
        _note(axis, f"{len(blocks)} blocks, dark: largest", where=(0.97, 0.96), align="right")
    _tidy(axis)


def _draw_gates(axis: Any, gates: Sequence[Any]) -> None:
    single = len(gates) == 1
    place, ticks, names = 0.0, [], []
    for i, group in enumerate(gates):
        order = np.argsort(-group.shares, kind="stable")
        # A few gates have the colours of their blocks, which are sorted in the same way.
        few = single and len(order) <= len(PALETTE)
        axis.bar(
            place + np.arange(len(order)),
            group.shares[order],
            width=0.8,
            color=PALETTE[: len(order)] if few else PALETTE[i % len(PALETTE)],
        )
        if not single:
            ticks.append(place + (len(order) - 1) / 2)
            names.append(str(group.group) if gates[0].head == gates[-1].head else group.head)
        elif len(order) <= 12:
            ticks, names = list(range(len(order))), [str(g) for g in order]
        place += len(order) + 1
    what = "gate, by share" if single else "channel group" if gates[0].head == gates[-1].head else "head"
    axis.set(xlabel=what, ylabel="share of the nuclear norm", title="Use of the gates")
    axis.set_ylim(0, 1.12 * max(float(group.shares.max()) for group in gates) or 1.0)
    axis.set_xticks(ticks, names)
    active, every = sum(g.active for g in gates), sum(len(g.shares) for g in gates)
    _note(axis, f"{active} of {every} gates in use", where=(0.97, 0.99), align="right")
    _tidy(axis)


def _draw_cost(axis: Any, cost: np.ndarray, objective: float) -> None:
    share = cost / objective if objective > 0 else cost
    axis.plot(np.arange(len(cost)), 100 * share, color=PALETTE[0], lw=1.5)
    axis.set(
        xlabel="heads kept, largest first", ylabel="beta x tail, % of the objective", title="What truncation costs"
    )
    axis.set_ylim(0, None)
    axis.set_xlim(0, None)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axis)


def energies_figure(source: Any, title: str | None = None, names: Sequence[str] | None = None) -> Any:
    """Latent energies of every channel group; see :mod:`convexheads.explain.latent`.

    Parameters
    ----------
    source : fitted estimator, a pipeline that ends in one, or a list of :class:`LatentEnergies`. The first 12 entries
        are drawn.
    title : above the figure.
    names : names of the features (d,) or tokens (s,) on the axes; used up to 40 of them.
    """
    listed = isinstance(source, (list, tuple)) and all(isinstance(each, LatentEnergies) for each in source)
    energies: list[LatentEnergies] = list(source) if listed else latent_energies(source)
    if not energies:
        raise InputError("source: " + describe("an empty list", "a fitted estimator or latent energies"))
    panels: list[tuple[str, LatentEnergies]] = []
    for each in energies[:MAX_PANELS]:
        panels.append(("values", each))
        if each.frequencies is not None:
            panels.append(("frequencies", each))
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = new_figure(max(4.2 * columns, 5.0), 3.8 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for axis, (what, each) in zip(axes, panels, strict=False):
        _draw_energies(figure, axis, each, what, names)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure


_LABELS = {
    "feature pairs": ("feature l (value)", "feature k (mixed)"),
    "token pairs": ("input token q", "output token t"),
}


def _draw_energies(figure: Any, axis: Any, each: LatentEnergies, what: str, names: Sequence[str] | None) -> None:
    values = each.values if what == "values" else each.frequencies
    assert values is not None
    kind = each.kind if what == "values" else "frequencies"
    axis.set_title(f"{each}: {kind}")
    if not values.any():
        _note(axis, "no heads", where=(0.97, 0.96), align="right")
    if values.ndim == 1:
        place = np.arange(len(values))
        if each.kind == "shifts":
            # Signed shifts and frequencies around zero.
            values, place = np.fft.fftshift(values), place - len(values) // 2
        axis.bar(place, values, width=0.8, color=PALETTE[0])
        axis.set(xlabel={"shifts": "shift", "frequencies": "frequency", "features": "feature"}[kind], ylabel="energy")
        if each.kind != "shifts":
            _name(axis.xaxis, names, len(values))
        axis.set_ylim(0, 1.05 * values.max() or 1.0)
        if names is None:
            axis.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axis)
        return
    extent = None
    if each.kind == "shifts":
        h, w = values.shape
        values = np.fft.fftshift(values)
        extent = (-(w // 2) - 0.5, w - w // 2 - 0.5, h - h // 2 - 0.5, -(h // 2) - 0.5)
        axis.set(xlabel=f"{kind[:-1] if kind == 'shifts' else 'frequency'}, across", ylabel="down")
    else:
        axis.set(xlabel=_LABELS[each.kind][0], ylabel=_LABELS[each.kind][1])
        _name(axis.xaxis, names, values.shape[1])
        _name(axis.yaxis, names, values.shape[0])
    image = axis.imshow(values, cmap=SIZES, vmin=0, extent=extent, interpolation="nearest")
    if extent is not None or names is None:
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axis, shrink=0.85)
    bar.set_label("energy")


def _name(side: Any, names: Sequence[str] | None, count: int) -> None:
    if names is not None and len(names) == count <= 40:
        side.set_ticks(np.arange(count), [str(name) for name in names], fontsize=6)
        if side.axis_name == "x":
            for label in side.get_ticklabels():
                label.set_rotation(90)


def on_grid(values: ArrayLike, grid: tuple[int, int], start: int | None = None) -> np.ndarray:
    """Values of tokens (s, ...) as a map (h, w, ...) of the h * w patches.

    Parameters
    ----------
    values : one entry a token.
    grid : (h, w) of the patches.
    start : number of the first patch token; None: the patches are the last h * w tokens, after any CLS token.

    Raises
    ------
    InputError
        If there are fewer tokens than patches.
    """
    array = np.asarray(values)
    h, w = (int(size) for size in grid)
    first = len(array) - h * w if start is None else int(start)
    if first < 0 or first + h * w > len(array):
        raise InputError("grid: " + describe(f"{h} x {w} patches", f"at most {len(array)}, the number of tokens"))
    return array[first : first + h * w].reshape(h, w, *array.shape[1:])


def _pictures(images: Any, count: int) -> list[np.ndarray | None]:
    """Images as float arrays (H, W, 3) in [0, 1], or None for each sample without one."""
    if images is None:
        return [None] * count
    found: list[np.ndarray | None] = []
    for image in images:
        if image is None:
            found.append(None)
            continue
        array = np.asarray(image)
        if array.ndim == 2:
            array = np.repeat(array[..., None], 3, 2)
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype.kind not in "fiub":
            raise InputError("images: " + describe(f"shape {array.shape}", "(H, W), (H, W, 1) or (H, W, 3)"))
        array = np.repeat(array, 3, 2) if array.shape[2] == 1 else array[..., :3]
        scale = 255.0 if array.dtype.kind in "iu" else 1.0
        found.append(np.clip(array.astype(np.float64) / scale, 0.0, 1.0))
    if len(found) != count:
        raise InputError("images: " + describe(len(found), f"{count}, one a sample"))
    return found


def _layout(count: int, maps: int, pictures: bool, per_row: int, height: float) -> tuple[Any, list[list[Any]]]:
    """A figure with, for each sample, an axis for its picture (if any) and ``maps`` more; ``height`` inches a row."""
    wide = maps + pictures
    across = max(1, min(per_row, count))
    down = -(-count // across)
    figure = new_figure(1.75 * wide * across + 0.4, height * down + 0.2)
    axes = np.asarray(figure.subplots(down, wide * across, squeeze=False))
    for axis in axes.reshape(-1):
        axis.set_xticks([])
        axis.set_yticks([])
    flat = [axes[i // across, (i % across) * wide : (i % across + 1) * wide] for i in range(down * across)]
    for spare in flat[count:]:
        for axis in spare:
            axis.set_axis_off()
    return figure, [list(row) for row in flat[:count]]


def _under(
    axis: Any, picture: np.ndarray | None, grid: tuple[int, int], faint: float = 0.0
) -> tuple[float, float, float, float]:
    """Draw a picture in grey, the paler the more ``faint``, for a map to lie over; returns the extent they share."""
    h, w = grid
    extent = (-0.5, w - 0.5, h - 0.5, -0.5)
    if picture is not None:
        grey = faint + (1.0 - faint) * (picture @ np.array([0.299, 0.587, 0.114]))
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    return extent


def clusters_figure(
    labels: ArrayLike,
    grid: tuple[int, int],
    images: Sequence[Any] | None = None,
    *,
    titles: Sequence[str] | None = None,
    start: int | None = None,
    title: str | None = None,
) -> Any:
    """Clusters of tokens over their images: each image, and beside it its patches in the colour of their cluster.

    Parameters
    ----------
    labels : (n, s) or (s,) clusters from 0, as of :func:`~convexheads.explain.cluster_tokens`.
    grid : (h, w) of the patches.
    images : n arrays or PIL images, (H, W) or (H, W, 3), uint8 or in [0, 1], or None; cropped as the backbone saw them.
    titles : one line a sample.
    start : number of the first patch token; None: the last h * w tokens are the patches.
    title : above the figure.

    Raises
    ------
    InputError
        If sizes do not fit together.
    """
    each = np.atleast_2d(np.asarray(labels))
    pictures = _pictures(images, len(each))
    shown = any(picture is not None for picture in pictures)
    figure, axes = _layout(len(each), 1, shown, 4 if shown else 8, 2.05)
    count = int(each.max()) + 1
    colours = require("matplotlib.colors", "plots").ListedColormap(
        [PALETTE[i] if i < len(PALETTE) else _map("viridis")(i / count) for i in range(count)]
    )
    for i, (row, picture, own) in enumerate(zip(each, pictures, axes, strict=True)):
        if shown and picture is not None:
            own[0].imshow(picture, interpolation="nearest")
        elif shown:
            own[0].set_axis_off()
        tiles = on_grid(row, grid, start)
        axis = own[-1]
        extent = _under(axis, picture, grid, faint=0.4)
        axis.imshow(
            tiles,
            cmap=colours,
            vmin=-0.5,
            vmax=count - 0.5,
            extent=extent,
            interpolation="nearest",
            alpha=0.7 if picture is not None else 1.0,
        )
        _borders(axis, tiles)
        if titles is not None:
            own[0].set_title(titles[i], fontsize=8, loc="left")
        axis.set_xlabel(f"{len(np.unique(row))} cluster{'s' * (len(np.unique(row)) != 1)}", fontsize=7)
    if title:
        figure.suptitle(title)
    return figure


def _borders(axis: Any, tiles: np.ndarray) -> None:
    """Lines between neighbouring patches of different clusters."""
    down, across = np.nonzero(tiles[:, 1:] != tiles[:, :-1])
    axis.vlines(across + 0.5, down - 0.5, down + 0.5, color="white", lw=1.2)
    down, across = np.nonzero(tiles[1:] != tiles[:-1])
    axis.hlines(down + 0.5, across - 0.5, across + 0.5, color="white", lw=1.2)


def evidence_figure(
    evidence: Sequence[ArrayLike] | ArrayLike,
    grid: tuple[int, int],
    images: Sequence[Any] | None = None,
    *,
    names: Sequence[Sequence[str]] | None = None,
    titles: Sequence[str] | None = None,
    start: int | None = None,
    title: str | None = None,
) -> Any:
    """Class evidence of tokens over their images: which patches speak for a class (orange), which against (purple).

    The maps of one sample share one colour scale, centred at zero, whose end is written below, beside the mean over all
    tokens, those beside the patches among them.

    Parameters
    ----------
    evidence : (n, s, m): evidence of each token for m classes, such as columns of
        :func:`~convexheads.explain.token_contributions`; (n, s) for one class.
    grid, images, titles, start, title : as for :func:`clusters_figure`.
    names : for each sample the names of its m classes.

    Raises
    ------
    InputError
        If sizes do not fit together.
    """
    values = np.asarray(evidence, dtype=np.float64)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3:
        raise InputError("evidence: " + describe(f"shape {values.shape}", "(n, s, m) or (n, s)"))
    pictures = _pictures(images, len(values))
    shown = any(picture is not None for picture in pictures)
    maps = values.shape[2]
    figure, axes = _layout(len(values), maps, shown, max(1, 8 // (maps + shown)), 2.2)
    for i, (one, picture, own) in enumerate(zip(values, pictures, axes, strict=True)):
        if shown and picture is not None:
            own[0].imshow(picture, interpolation="nearest")
        elif shown:
            own[0].set_axis_off()
        tiles = on_grid(one, grid, start)
        limit = float(np.abs(tiles).max()) or 1.0
        for j, axis in enumerate(own[-maps:]):
            # Pale, because dark means much evidence here.
            extent = _under(axis, picture, grid, faint=0.6)
            axis.imshow(
                tiles[..., j],
                cmap=f"{SIGNS}_r",
                vmin=-limit,
                vmax=limit,
                extent=extent,
                interpolation="nearest",
                alpha=0.8 if picture is not None else 1.0,
            )
            name = "" if names is None else f"{names[i][j]}\n"
            axis.set_xlabel(f"{name}mean {one[:, j].mean():+.2f}, scale ±{limit:.2f}", fontsize=7)
        if titles is not None:
            own[0].set_title(titles[i], fontsize=8, loc="left")
    if title:
        figure.suptitle(title)
    return figure


def history_figure(
    histories: Mapping[str, Any] | Any, title: str | None = None, tol: float | None = None, log_time: bool = False
) -> Any:
    """Objective and relative duality gap against seconds, at each check of the fit.

    Parameters
    ----------
    histories : ``history_`` of an estimator, an estimator, or several of either by name; a list under one name is
        drawn in one colour, such as the seeds of one learning rate.
    title : above the figure.
    tol : relative gap at which fitting stopped, drawn as a line; None: none.
    log_time : seconds on a logarithmic axis.
    """
    if not isinstance(histories, Mapping) or "objective" in histories:
        histories = {"": histories}
    figure = new_figure(8.2 if len(histories) == 1 else 10.0, 3.4)
    left, right = figure.subplots(1, 2)
    for i, (name, several) in enumerate(histories.items()):
        style = {"color": PALETTE[i % len(PALETTE)], "ls": ("-", "--", ":", "-.")[i // len(PALETTE) % 4], "lw": 1.3}
        for place, history in enumerate(several if isinstance(several, (list, tuple)) else [several]):
            if not isinstance(history, Mapping):
                history = Fitted(history).estimator.history_
            seconds = np.asarray(history["seconds"], dtype=np.float64)
            gap = np.asarray(history["gap"], dtype=np.float64)
            left.plot(seconds, history["objective"], marker="o", ms=2.5, **style)
            good = np.isfinite(gap)
            label = None if place else name or None
            right.plot(seconds[good], np.maximum(gap[good], NO_GAP), marker="o", ms=2.5, label=label, **style)
    left.set(xlabel="seconds", ylabel="objective", title="Objective")
    right.set(xlabel="seconds", ylabel="gap / objective", title="Relative duality gap", yscale="log")
    if tol is not None:
        right.axhline(tol, color="0.4", lw=0.8, ls="--")
        right.annotate("tol", (1.0, tol), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom")
    for axis in (left, right):
        if log_time:
            axis.set_xscale("log")
        else:
            axis.set_xlim(0, None)
        _tidy(axis)
    if any(histories):
        figure.legend(*right.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right upper")
    if title:
        figure.suptitle(title)
    return figure


def _map(name: str) -> Any:
    return require("matplotlib", "plots").colormaps[name]


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _note(axis: Any, text: str, where: tuple[float, float], align: str) -> None:
    axis.text(*where, text, ha=align, va="top", transform=axis.transAxes, fontsize=7, color="0.3")


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.title.set_fontsize(10)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
