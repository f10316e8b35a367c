"""The report: self-contained, well-formed HTML with everything in it, escaped and written whole or not at all."""

from __future__ import annotations

import base64
import importlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convexheads import ConvexHeadClassifier
from convexheads.errors import DataError, InputError, MissingExtraError
from convexheads.report import MISSING, cell, render_report, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps tables, pictures, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        for name in ("src", "href"):
            if values.get(name):
                self.sources.append(values[name])
        if tag == "img":
            self.alts.append(values["alt"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def heads() -> dict[str, ConvexHeadClassifier]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 4, 3))
    y = np.digitize(X[:, 0, 0], [-0.5, 0.5])
    common: dict[str, Any] = {"beta_ratio": 0.2, "gates": 3}
    return {
        "gated attention": ConvexHeadClassifier(activation="gated_relu", **common).fit(X, y),
        "fno <2-D>": ConvexHeadClassifier(head="fno", grid=(2, 2), **common).fit(X, y),
        "linear": ConvexHeadClassifier(head="linear", **common).fit(X, y),
    }


def row(name: str, model: ConvexHeadClassifier) -> dict[str, Any]:
    return {
        "head": name,
        "activation": model.activation,
        "beta": model.beta_,
        "rank": np.int64(model.rank_),
        "objective": model.certificate_.primal,
        "relative_gap": model.certificate_.relative_gap,
        "top1": np.float64(0.75),
        "top5": 1.0,
        "seconds": 1.234,
        "certified": model.certificate_.certified,
        "path": [{"beta": 1.0}],
    }


def test_report(tmp_path: Path) -> None:
    fitted = heads()
    rows = [row(name, model) for name, model in fitted.items()]
    rows.append({"head": "logistic regression", "relative_gap": None, "certified": False, "top1": 0.5, "C": 0.1})
    path = write_report(
        tmp_path / "report.html", rows, fitted, title="Heads & <tails>", settings={"data": "made up", "n": 40}
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "Heads & <tails>" in page.words
    # Nothing is loaded from anywhere: every picture is inside.
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not re.findall(r"url\(|@import", text)
    assert len(page.sources) == 1 + 2 * len(fitted)
    assert all(page.alts)
    for source in page.sources:
        picture = base64.b64decode(source.partition(",")[2])
        assert b"<svg" in picture
    comparison = page.tables[0]
    names = "head, activation, beta, heads, objective, relative gap, top-1, top-5, seconds, certified, C"
    assert comparison[0] == names.split(", ")
    assert len(comparison) == 5
    assert comparison[2][0] == "fno <2-D>"
    assert comparison[1][6:10] == ["75.00 %", "100.00 %", "1.2", "yes"]
    assert comparison[4][1:6] == [MISSING] * 5
    assert comparison[4][9:] == [MISSING, "0.1"]
    facts = dict(page.tables[1])
    certificate = fitted["gated attention"].certificate_
    assert facts["objective (primal)"] == f"{certificate.primal:.8g}"
    assert facts["proved"] == "yes"
    assert facts["gates in use"].endswith("of 3")
    versions = dict(page.tables[-1])
    assert {"python", "convexheads", "torch", "numpy", "data", "n"} <= set(versions)
    assert versions["n"] == "40"
    # Nothing of this machine is in it, and equal input gives equal bytes.
    assert str(tmp_path) not in text
    assert render_report(rows, fitted, "Heads & <tails>", {"data": "made up", "n": 40}) == text


def test_report_of_nothing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "empty.html", []).read_text(encoding="utf-8"))
    assert page.sources == []
    assert any("No heads" in words for words in page.words)


def test_cells() -> None:
    assert cell("top1", 0.12345) == "12.35 %"
    assert cell("relative_gap", 1.234e-4) == "1.2e-04"
    assert cell("rank", 12) == "12"
    assert cell("beta", 0.00012345678) == "0.00012346"
    assert cell("certified", False) == "no"
    assert cell("beta", None) == cell("beta", float("nan")) == MISSING


def test_errors_leave_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path / "report.html", [])
    old = path.read_bytes()
    with pytest.raises(InputError, match="rows"):
        write_report(path, {"head": "mlp"})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fitted convex head"):
        write_report(path, [], {"a": object()})
    with pytest.raises(DataError, match="could not be written"):
        write_report(tmp_path / "missing" / "report.html", [])
    real = importlib.import_module
    names = ("jinja2", "matplotlib")

    def missing(name: str, *args: Any) -> Any:
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(name=name.partition(".")[0])
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"convexheads\[report\]"):
        write_report(path, [])
    assert path.read_bytes() == old
