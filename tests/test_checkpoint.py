"""Checkpoints: a fit and a path that were stopped go on, and what belongs elsewhere or is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convexheads import ConvexHeadClassifier, ConvexHeadClassifierCV, model_selection
from convexheads.checkpoint import KEY, Checkpoint, Checkpoints
from convexheads.errors import DataError, InputError

OPTIONS: dict[str, Any] = {"head": "mixer", "beta": 0.02, "tol": 1e-4}


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(60, 4, 5))
    return X, (X[:, :, 0].mean(1) > 0).astype(int) + (X[:, 1, 2] > 0)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The checkpoint of a fit."""
    path = tmp_path / "fit.checkpoint"
    ConvexHeadClassifier(**OPTIONS).fit(*data(), checkpoint=path)
    assert path.exists()
    return path


def test_a_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.checkpoint"
    options = OPTIONS | {"tol": 1e-6, "beta": 0.002}
    whole = ConvexHeadClassifier(**options).fit(*data())
    original, seen = Checkpoint.progress, []

    def stopped(self: Checkpoint, state: Any) -> None:
        original(self, state)
        seen.append(state["iteration"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "progress", stopped)
        with pytest.raises(KeyboardInterrupt):
            ConvexHeadClassifier(**options).fit(*data(), checkpoint=Checkpoints(path, 0.0))
    before = path.read_bytes()
    again = ConvexHeadClassifier(**options).fit(*data(), checkpoint=path)
    assert again.certificate_.relative_gap <= 1e-6
    assert again.certificate_.primal == pytest.approx(whole.certificate_.primal, rel=1e-6)
    assert again.history_["objective"][0] < whole.history_["objective"][0]
    assert path.read_bytes() != before
    Checkpoints(path).remove()
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"X": data(1)[0]}, "tokens"),
        ({"X": data()[0] + 1e-9}, "tokens"),
        ({"y": data(1)[1]}, "targets"),
        ({"sample_weight": np.linspace(1, 2, 60)}, "sample_weight"),
        ({"beta": 0.021}, "beta"),
        ({"head": "self_attention"}, "head"),
        ({"activation": "gated_relu"}, "activation"),
        ({"label_smoothing": 0.1}, "targets"),
        ({"fit_intercept": False}, "intercept"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_another_problem_is_refused(kept: Path, change: dict[str, Any], what: str) -> None:
    X, y = data()
    given = {"X": X, "y": y, "sample_weight": None}
    given |= {name: value for name, value in change.items() if name in given}
    options = {name: value for name, value in change.items() if name not in given}
    before = kept.read_bytes()
    with pytest.raises(InputError, match="belongs to another problem") as caught:
        ConvexHeadClassifier(**(OPTIONS | options)).fit(**given, checkpoint=kept)
    assert what in str(caught.value)
    assert "Remove it to start anew" in str(caught.value)
    assert kept.read_bytes() == before


def test_what_does_not_change_the_problem_is_taken(kept: Path) -> None:
    model = ConvexHeadClassifier(**(OPTIONS | {"tol": 1e-6, "max_iter": 3000})).fit(*data(), checkpoint=kept)
    assert model.certificate_.relative_gap <= 1e-6


def rewritten(path: Path, change: Any) -> None:
    """Write a checkpoint anew with ``change(header, arrays)``."""
    with safe_open(str(path), framework="np") as opened:
        header = json.loads(opened.metadata()[KEY])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(header, arrays)
    save_file(arrays, path, metadata={KEY: json.dumps(header)})


DAMAGE: dict[str, Any] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "other weights": lambda path: save_file({"u": np.zeros(3)}, path),
    "no json": lambda path: save_file({"u": np.zeros(3)}, path, metadata={KEY: "{"}),
    "a list": lambda path: save_file({"u": np.zeros(3)}, path, metadata={KEY: "[1, 2]"}),
    "no state": lambda path: rewritten(path, lambda header, arrays: header.pop("state")),
    "no problem": lambda path: rewritten(path, lambda header, arrays: header.pop("problem")),
    "no units": lambda path: rewritten(path, lambda header, arrays: arrays.pop("units.0.v")),
    "another version": lambda path: rewritten(path, lambda header, arrays: header.update(format=99)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused(kept: Path, kind: str) -> None:
    DAMAGE[kind](kept)
    before = kept.read_bytes()
    with pytest.raises(DataError, match=r"fit\.checkpoint: got .*Remove it"):
        ConvexHeadClassifier(**OPTIONS).fit(*data(), checkpoint=kept)
    assert kept.read_bytes() == before


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        ConvexHeadClassifier(**OPTIONS).fit(*data(), checkpoint=tmp_path / "file" / "fit.checkpoint")


def test_a_path_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"head": "mixer", "beta_ratios": (0.5, 0.2, 0.1, 0.05), "tol": 1e-4, "patience": None}
    whole = ConvexHeadClassifierCV(**options).fit(*data())
    judged, walked = model_selection.judged, []

    def counted(stop: int) -> Any:
        def judge(*arguments: Any) -> Any:
            if len(walked) == stop:
                raise KeyboardInterrupt
            walked.append(1)
            return judged(*arguments)

        return judge

    where = Checkpoints(tmp_path / "path", 0.0)
    monkeypatch.setattr(model_selection, "judged", counted(2))
    with pytest.raises(KeyboardInterrupt):
        ConvexHeadClassifierCV(**options).fit(*data(), checkpoint=where)
    assert where.of_path().path.exists()
    monkeypatch.setattr(model_selection, "judged", counted(-1))
    again = ConvexHeadClassifierCV(**options).fit(*data(), checkpoint=where)
    assert len(walked) == 4, "steps that were done are not walked again"
    assert [step["beta_ratio"] for step in again.path_] == [step["beta_ratio"] for step in whole.path_]
    for mine, other in zip(again.path_, whole.path_, strict=True):
        assert mine["score"] == pytest.approx(other["score"], abs=0.1)
        assert mine["objective"] == pytest.approx(other["objective"], rel=2e-2)
    assert again.beta_ == pytest.approx(whole.beta_, rel=1e-6)
    assert again.certificate_.primal == pytest.approx(whole.certificate_.primal, rel=1e-4)
    with pytest.raises(InputError, match="belongs to another problem"):
        ConvexHeadClassifierCV(**(options | {"beta_ratios": (0.5, 0.1)})).fit(*data(), checkpoint=where)
    where.remove()
    assert list(tmp_path.iterdir()) == []
