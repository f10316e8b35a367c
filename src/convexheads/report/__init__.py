"""One HTML file a run: comparison, certificates, spectra, energies, gap over time, versions and settings.

The file is self-contained: figures are inside it, it loads nothing from anywhere and runs no scripts. It needs
jinja2 and matplotlib (``pip install 'convexheads[report]'``), which are imported when a report is written.
"""

from __future__ import annotations

import base64
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from convexheads.errors import DataError, InputError, describe, require
from convexheads.explain import figures, gate_sparsity, latent_energies, spectra
from convexheads.explain.fitted import Fitted
from convexheads.tokens.files import write_atomic

COLUMNS: dict[str, str] = {
    "head": "head",
    "activation": "activation",
    "beta": "beta",
    "beta_ratio": "beta / beta_max",
    "rank": "heads",
    "objective": "objective",
    "relative_gap": "relative gap",
    "validation": "validation",
    "top1": "top-1",
    "top5": "top-5",
    "seconds": "seconds",
    "certified": "certified",
}
"""Columns of the comparison, by key of a row, in order; other keys of the rows follow under their own names."""
PACKAGES = ("convexheads", "torch", "numpy", "scipy", "scikit-learn", "safetensors")
MISSING = "–"


def write_report(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    estimators: Mapping[str, Any] | None = None,
    title: str = "Convex heads",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run, atomically.

    Parameters
    ----------
    path : file to write, such as ``report.html``; its folder must exist.
    rows : one dict a fitted head with any of the keys ``head``, ``activation``, ``beta``, ``rank``, ``objective``,
        ``relative_gap``, ``top1`` and ``top5`` (accuracies in [0, 1]), ``seconds``, ``certified``; further keys become
        further columns, as far as their values are numbers or text. What a row lacks is shown as a dash.
    estimators : name -> fitted estimator (or pipeline that ends in one), each shown with its certificate, spectrum,
        latent energies and course of the fit.
    title : heading of the report.
    settings : what else the reader should know: data set, backbone, command; shown as a table.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    MissingExtraError
        Without jinja2 or matplotlib.
    InputError
        If rows are no dicts, or an estimator is not one of this package.
    DataError
        If the file cannot be written; an older file at ``path`` stays as it was.
    """
    path = Path(path)
    page = render_report(rows, estimators, title, settings)
    try:
        write_atomic(path, page.encode())
    except OSError as error:
        raise DataError(f"{path}: could not be written ({error.strerror or error})") from error
    return path


def render_report(
    rows: Sequence[Mapping[str, Any]],
    estimators: Mapping[str, Any] | None = None,
    title: str = "Convex heads",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The report as HTML; parameters and errors as for :func:`write_report`."""
    jinja2 = require("jinja2", "report")
    if isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("rows: " + describe(type(rows).__name__, "a list of dicts, one a fitted head"))
    heads = {str(name): Fitted(model) for name, model in (estimators or {}).items()}
    rows = [_plain(row) for row in rows]
    found = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in COLUMNS if key in found] + [key for key in found if key not in COLUMNS]
    template = resources.files("convexheads.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    history = {name: head.estimator.history_ for name, head in heads.items() if head.estimator.history_["seconds"]}
    page: str = environment.from_string(template).render(
        title=title,
        columns=[COLUMNS.get(key, str(key).replace("_", " ")) for key in keys],
        rows=[[cell(key, row.get(key)) for key in keys] for row in rows],
        numeric=[any(isinstance(row.get(key), (int, float)) for row in rows) for key in keys],
        curves=_svg(figures.history_figure(history)) if history else None,
        sections=[_section(name, head) for name, head in heads.items()],
        settings=[(str(key), str(value)) for key, value in (settings or {}).items()],
        versions=_versions(),
    )
    return page


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a table can show of a row; without a gap there is nothing to be certified."""
    found = {}
    for key, value in row.items():
        value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
        if isinstance(value, (str, int, float)) and value != "":
            found[str(key)] = value
    if found.get("relative_gap") is None and "relative_gap" in row:
        found.pop("certified", None)
    return found


def cell(key: str, value: Any) -> str:
    """How a value of a column is written: accuracies in percent, small numbers in powers of ten."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if key in ("validation", "top1", "top5"):
        return f"{100 * value:.2f} %"
    if key == "seconds":
        return f"{value:.1f}"
    if key == "relative_gap":
        return f"{value:.1e}"
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def _section(name: str, head: Fitted) -> dict[str, Any]:
    estimator = head.estimator
    certificate = estimator.certificate_
    sigma = certificate.sigma_max
    blocks = [block for block in spectra(estimator) if block.rank]
    gates = gate_sparsity(estimator)
    energies = latent_energies(estimator)
    facts = [
        ("objective (primal)", f"{certificate.primal:.8g}"),
        ("lower bound (dual)", f"{certificate.dual:.8g}"),
        ("gap", f"{certificate.gap:.3e}"),
        ("relative gap", f"{certificate.relative_gap:.3e}"),
        ("proved", "yes" if certificate.certified else "no: the bound on sigma_max is an estimate"),
        ("beta", f"{certificate.beta:.6g} ({certificate.beta / estimator.beta_max_:.4g} of beta_max)")
        if estimator.beta_max_ > 0
        else ("beta", f"{certificate.beta:.6g}"),
        ("sigma_max", f"{sigma.lower:.8g} to {sigma.upper:.8g} ({sigma.method})"),
        ("loss", estimator.loss_.replace("_", " ")),
        ("heads", str(sum(block.rank for block in blocks))),
        ("gates in use", ", ".join(f"{each.active} of {len(each.shares)}" for each in gates) or "no gates"),
        ("iterations", str(estimator.n_iter_)),
        ("stopped", estimator.message_),
    ]
    return {
        "name": name,
        "facts": facts,
        "spectrum": _svg(figures.spectrum_figure(estimator)),
        "blocks": [
            (
                str(block),
                str(block.rank),
                f"{block.effective_rank:.1f}",
                f"{block.nuclear_norm:.4g}",
                MISSING if block.share is None else f"{100 * block.share:.1f} %",
            )
            for block in blocks
        ],
        "energies": _svg(figures.energies_figure(energies)),
        "hidden_energies": max(0, len(energies) - figures.MAX_PANELS),
        "parameters": [(key, _short(value)) for key, value in sorted(estimator.get_params(deep=False).items())],
    }


def _short(value: Any, limit: int = 400) -> str:
    """repr on one line, cut where an array of gates would fill pages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _svg(figure: Any) -> str:
    data = figures.figure_bytes(figure, "svg", dpi=110)
    return "data:image/svg+xml;base64," + base64.b64encode(data).decode()


def _versions() -> list[tuple[str, str]]:
    found = [("python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "not installed as a package"))
    return found
