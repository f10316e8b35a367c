"""Baselines: one contract for every registered one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convexheads.baselines import BASELINES, make_baseline, moments
from convexheads.commands import common
from convexheads.errors import InputError

every_baseline = pytest.mark.parametrize("name", sorted(BASELINES))
TRAIN, HELD = np.arange(0, 180), np.arange(180, 240)


def data(n: int = 240, s: int = 5, d: int = 6, c: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A shift of the mean token tells the class; the last feature is constant."""
    y = np.arange(n) % c
    X = np.random.default_rng(seed).normal(size=(n, s, d)) + 1.5 * np.eye(c, d)[y][:, None]
    X[..., -1] = 1.0
    return X, y


def test_the_command_knows_all_of_them() -> None:
    assert set(common.BASELINES) == set(BASELINES)


@every_baseline
def test_baselines_learn_and_are_reproducible(name: str) -> None:
    X, y = data()
    first = make_baseline(name, random_state=1).fit(X, y, TRAIN, HELD)
    new, truth = data(seed=1)
    scores = first.scores(new)
    assert scores.shape == (240, 4)
    assert (scores.argmax(1) == truth).mean() > 0.9
    tried = {key: values for stage in first.stages for key, values in stage.items()}
    assert set(first.settings) == set(tried)
    assert all(first.settings[key] in values for key, values in tried.items())
    again = make_baseline(name, random_state=1).fit(X, y, TRAIN, HELD)
    np.testing.assert_array_equal(again.scores(new), scores)
    assert (again.settings, again.validation) == (first.settings, first.validation)


@every_baseline
def test_choices_are_made_on_the_held_rows_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial trains on `train` and is measured on `held`; only the last training sees all rows."""
    X, y = data()
    cls = BASELINES[name]
    trained, measured, usual = [], [], cls.evaluate
    fast = cls.train

    def train(self, X, labels, rows, settings):  # type: ignore[no-untyped-def]
        trained.append(rows)
        return fast(self, X, labels, rows, {**settings, **({"epochs": 1} if "epochs" in settings else {})})

    def evaluate(self, model, X, rows):  # type: ignore[no-untyped-def]
        measured.append(rows)
        return usual(self, model, X, rows)

    monkeypatch.setattr(cls, "train", train)
    monkeypatch.setattr(cls, "evaluate", evaluate)
    fitted = make_baseline(name).fit(X, y, TRAIN, HELD)
    assert len(trained) == len(measured) + 1 > 1
    assert all(rows is TRAIN for rows in trained[:-1])
    assert all(rows is HELD for rows in measured)
    assert len(trained[-1]) == 240
    assert 0.5 < fitted.validation <= 1.0


def test_nearest_neighbors_rank_classes_without_a_vote() -> None:
    X, y = data()
    fitted = make_baseline("nearest_neighbors").fit(X, y, TRAIN, HELD)
    fitted.model = fitted.train(torch.from_numpy(X), y, TRAIN, {"k": 1})
    scores = fitted.scores(X[HELD])
    assert all(len(set(row)) == 4 for row in scores.tolist())


def test_two_classes_and_plain_vectors() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    X = rng.normal(size=(60, 3)) + 3.0 * y[:, None]
    for name in BASELINES:
        fitted = make_baseline(name).fit(X, y, np.arange(40), np.arange(40, 60))
        assert fitted.scores(X).shape == (60, 2)
        assert (fitted.scores(X).argmax(1) == y).mean() > 0.9


def test_moments_are_those_of_numpy() -> None:
    X, _ = data(2100)
    mean, deviation = moments(torch.from_numpy(X), np.arange(0, 2100, 2))
    np.testing.assert_allclose(mean, X[::2].mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(deviation, X[::2].std((0, 1)), atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(240, int)}, "labels: got one class"),
        ({"labels": np.where(np.arange(240) < 200, 0, 1)}, "labels: got class 1 without a sample"),
        ({"labels": np.arange(239) % 4}, r"labels: got labels of shape \(239,\)"),
        ({"labels": np.arange(240) % 4 + 0.5}, "labels: got labels of shape"),
        ({"labels": np.arange(240) % 4 - 1}, "labels: got labels of shape"),
        ({"held": np.arange(0)}, "train, held: got 180 rows to train on and 0"),
        ({"held": np.arange(170, 240)}, "train, held: got"),
        ({"X": np.full((240, 5, 6), np.nan)}, "X: got NaN"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    X, y = data()
    given = {"X": X, "labels": y, "train": TRAIN, "held": HELD, **changes}
    with pytest.raises(InputError, match=message):
        make_baseline("logistic_regression").fit(**given)


def test_an_unknown_baseline() -> None:
    with pytest.raises(InputError, match="baseline: got 'svm'; expected one of"):
        make_baseline("svm")
