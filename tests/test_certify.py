"""Certificates of trained heads: sound for any weights, against optima that an interior-point solver found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contract_cases import DEFINITIONS
from convexheads import ConvexHeadClassifier, ConvexHeadRegressor, certify
from convexheads.errors import InputError
from convexheads.tokens.transforms import ChainTransforms, PCATokens, StandardizeTokens

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
HARD = [path for path in FIXTURES if "cross_entropy-pooled-intercept" in path.name]
every_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)

# The optima of the fixtures are good to this.
ACCURACY = 1e-6


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values["grid"] = None if values["grid"] is None else tuple(values["grid"])
    values["blocks"] = (values["n_blocks"] or 1) if values["head"] == "block_fno" else 1
    return values


def options(fixture: dict[str, Any]) -> dict[str, Any]:
    """How a fixture's head is described to ``certify``."""
    found = {key: fixture[key] for key in ("head", "activation", "grid", "pooling")}
    return {**found, "n_blocks": fixture["n_blocks"] or 4}


def outputs_of(fixture: dict[str, Any]) -> int:
    y = np.asarray(fixture["y"])
    return int(y.max()) + 1 if fixture["loss"] == "cross_entropy" and y.ndim == 1 else y.shape[-1]


def random_weights(fixture: dict[str, Any], seed: int, units: int = 3, scale: float = 0.3) -> dict[str, Any]:
    """Random weights of the plain architecture, unsorted by gate."""
    rng = np.random.default_rng(seed)
    X, c, blocks = np.asarray(fixture["X"]), outputs_of(fixture), fixture["blocks"]
    _, s, d = X.shape
    u_shape = {"self_attention": (d, d), "mixer": (s, s), "mlp": (d,)}.get(fixture["head"], (s * d // blocks,))
    k = d if fixture["head"] in ("self_attention", "mixer") else 1
    parts: dict[str, list] = {"u": [], "v": [], "gate": []}
    for _ in range(blocks):
        parts["u"].append(scale * rng.normal(size=(units, *u_shape)))
        parts["v"].append(scale * rng.normal(size=(units, k, c // blocks)))
        parts["gate"].append(rng.integers(0, gates_of(fixture, 0).shape[0], units) if fixture["gates"] else None)
    weights: dict[str, Any] = parts if fixture["head"] == "block_fno" else {key: v[0] for key, v in parts.items()}
    if fixture["gates"]:
        weights["gates"] = fixture["gates"]
    else:
        del weights["gate"]
    if fixture["fit_intercept"]:
        weights["intercept"] = rng.normal(size=c)
    return weights


def gates_of(fixture: dict[str, Any], block: int) -> np.ndarray:
    gates = fixture["gates"]
    return np.asarray(gates[block] if fixture["head"] == "block_fno" else gates, dtype=float)


def objective(fixture: dict[str, Any], weights: dict[str, Any], beta: float) -> float:
    """The network's objective from the definitions, sample by sample: shares no code with the library."""
    X, y, c, blocks = np.asarray(fixture["X"]), np.asarray(fixture["y"]), outputs_of(fixture), fixture["blocks"]
    wide, share = X.shape[2] // blocks, c // blocks
    listed = fixture["head"] == "block_fno"
    total = decay = 0.0
    for sample, target in zip(X, y, strict=True):
        rows = np.zeros((X.shape[1], c))
        for b in range(blocks):
            u, v = (weights[key][b] if listed else weights[key] for key in ("u", "v"))
            gate = weights.get("gate")
            for r in range(len(u)):
                h = None if gate is None else gates_of(fixture, b)[int((gate[b] if listed else gate)[r])]
                part = sample[:, b * wide : (b + 1) * wide]
                unit = DEFINITIONS[fixture["head"]](part, np.asarray(u[r]), np.asarray(v[r]), h, fixture["grid"])
                rows[:, b * share : (b + 1) * share] += unit
        out = rows.mean(0) if fixture["pooling"] == "mean" else rows
        out = out + np.asarray(weights.get("intercept", 0.0))
        if fixture["loss"] == "squared":
            total += 0.5 * np.sum((out - target) ** 2)
        else:
            t = np.eye(c)[int(target)] if np.ndim(target) == 0 else np.asarray(target)
            total += np.log(np.exp(out).sum()) - t @ out
    for key in ("u", "v"):
        for part in weights[key] if listed else [weights[key]]:
            decay += np.sum(np.square(np.asarray(part)))
    return float(total / len(X) + 0.5 * beta * decay)


@every_fixture
def test_certificate_is_sound_for_random_weights(path: Path) -> None:
    fixture = read(path)
    beta, optimum = fixture["beta"], fixture["optimal_value"]
    for seed in range(3):
        weights = random_weights(fixture, seed, scale=(0.05, 0.3, 1.0)[seed])
        found = certify(weights, fixture["X"], fixture["y"], beta, fixture["loss"], **options(fixture))
        assert found.primal == pytest.approx(objective(fixture, weights, beta), rel=1e-9)
        assert found.dual <= optimum + ACCURACY * (1 + abs(optimum))
        assert found.gap >= found.primal - optimum - ACCURACY * (1 + abs(optimum))
        assert found.certified
        assert found.beta == beta


@every_fixture
def test_certificate_is_tight_at_the_optimum(path: Path) -> None:
    """A fitted estimator, its module, and its weights by name all get the certificate of the fit."""
    fixture = read(path)
    cls = ConvexHeadClassifier if fixture["loss"] == "cross_entropy" else ConvexHeadRegressor
    model = cls(
        head=fixture["head"],
        activation=fixture["activation"],
        gates=[np.asarray(g) for g in fixture["gates"]] if fixture["gates"] else 16,
        grid=fixture["grid"],
        n_blocks=fixture["n_blocks"] or 4,
        pooling=fixture["pooling"],
        beta=fixture["beta"],
        fit_intercept=fixture["fit_intercept"],
        tol=1e-5,
        dtype="float64",
    ).fit(np.asarray(fixture["X"]), np.asarray(fixture["y"]))
    loss = fixture["loss"]
    for found in (
        certify(model, fixture["X"], fixture["y"]),
        certify(model.to_module(torch.float64), fixture["X"], fixture["y"], loss=loss),
        certify(by_name(model, fixture), fixture["X"], fixture["y"], fixture["beta"], loss, **options(fixture)),
    ):
        assert found.primal == pytest.approx(fixture["optimal_value"], rel=2e-5)
        assert -1e-12 <= found.gap <= 2e-5 * found.primal
        assert found.gap >= found.primal - fixture["optimal_value"] - ACCURACY


def by_name(model: Any, fixture: dict[str, Any]) -> dict[str, Any]:
    """A fitted head as plain weights, from its canonical blocks."""
    blocks, grouped = model.blocks_, fixture["blocks"]
    X, c = np.asarray(fixture["X"]), outputs_of(fixture)
    k = X.shape[2] if fixture["head"] in ("self_attention", "mixer") else 1
    parts: dict[str, list] = {"u": [], "v": [], "gate": []}
    for group in range(grouped):
        own = [block for block in blocks if block.group == group]
        parts["u"].append(np.concatenate([block.u for block in own]))
        parts["v"].append(np.concatenate([block.v.reshape(len(block.v), k, c // grouped) for block in own]))
        parts["gate"].append(np.concatenate([np.full(len(block.u), block.gate_index or 0) for block in own]))
    weights: dict[str, Any] = parts if fixture["head"] == "block_fno" else {key: v[0] for key, v in parts.items()}
    if fixture["gates"]:
        weights["gates"] = fixture["gates"]
    else:
        del weights["gate"]
    return weights if model.intercept_ is None else {**weights, "intercept": model.intercept_}


@pytest.mark.parametrize("path", HARD, ids=lambda path: path.stem)
def test_training_with_sgd_closes_the_gap_from_above(path: Path) -> None:
    """A module trained further by gradient descent from random weights: a valid certificate at every step."""
    fixture = read(path)
    X, y = torch.tensor(fixture["X"], dtype=torch.float64), torch.tensor(fixture["y"])
    model = ConvexHeadClassifier(
        head=fixture["head"],
        activation=fixture["activation"],
        gates=[np.asarray(g) for g in fixture["gates"]] if fixture["gates"] else 16,
        grid=fixture["grid"],
        n_blocks=fixture["n_blocks"] or 4,
        beta=fixture["beta"],
    ).fit(X, y)
    module = model.to_module(torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.5)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    decayed = [p for name, p in module.named_parameters() if name != "intercept"]
    gaps = []
    for step in range(301):
        loss = torch.nn.functional.cross_entropy(module(X), y)
        loss = loss + 0.5 * fixture["beta"] * sum(p.square().sum() for p in decayed)
        if step % 100 == 0:
            found = certify(module, X, y)
            assert found.primal == pytest.approx(float(loss.detach()), rel=1e-9)
            assert found.gap >= found.primal - fixture["optimal_value"] - ACCURACY
            gaps.append(found.gap)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert gaps[-1] < 0.2 * gaps[0]


# Tokens, labels and weights ----------------------------------------------------------------------------------


def data(n: int = 30, s: int = 4, d: int = 5, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return rng.normal(size=(n, s, d)) + y[:, None, None] * rng.normal(size=(s, d)), y


@pytest.mark.parametrize(
    "y_of",
    [
        lambda y: y,
        lambda y: y + 7,
        lambda y: np.array(["a", "b", "c"])[y],
        lambda y: torch.from_numpy(y),
        lambda y: np.eye(3)[y] * 0.9 + 0.1 / 3,
    ],
    ids=["from 0", "from 7", "strings", "tensor", "soft"],
)
def test_labels_are_encoded_as_in_the_estimator(y_of: Any) -> None:
    X, y = data()
    model = ConvexHeadClassifier(head="mlp", beta_ratio=0.1).fit(X, y_of(y))
    found = certify(model, X, y_of(y))
    assert found.primal == pytest.approx(model.certificate_.primal, rel=1e-9)
    assert found.dual == pytest.approx(model.certificate_.dual, rel=1e-6)


def test_several_labels_a_sample() -> None:
    X, y = data()
    Y = np.stack([y == 0, y > 0], 1).astype(int)
    model = ConvexHeadClassifier(head="mlp", beta_ratio=0.1).fit(X, Y)
    assert certify(model, X, Y).primal == pytest.approx(model.certificate_.primal, rel=1e-9)


def test_label_smoothing_class_weights_and_sample_weights_of_the_estimator_count() -> None:
    X, y = data(31)
    weights = np.random.default_rng(1).uniform(0.1, 2, len(y))
    model = ConvexHeadClassifier(head="mlp", beta_ratio=0.1, label_smoothing=0.1, class_weight="balanced")
    model.fit(X, y, weights)
    found = certify(model, X, y, sample_weight=weights)
    assert found.primal == pytest.approx(model.certificate_.primal, rel=1e-9)
    assert certify(model, X, y).primal != pytest.approx(found.primal, rel=1e-6)


def test_a_part_of_the_classes_is_enough_where_the_classes_are_known() -> None:
    X, y = data()
    model = ConvexHeadClassifier(head="mlp", beta_ratio=0.1).fit(X, y + 5)
    few = y < 2
    assert certify(model, X[few], y[few] + 5).primal > 0
    # A module does not know the classes: numbers of the outputs are taken as such, other labels need `classes`.
    module = model.to_module()
    expected = certify(module, X[few], y[few]).primal
    assert certify(module, X[few], y[few] + 5, classes=[5, 6, 7]).primal == expected
    with pytest.raises(InputError, match="classes="):
        certify(module, X[few], y[few] + 5)
    with pytest.raises(InputError, match="does not know"):
        certify(model, X, y + 6)


def test_views_are_applied() -> None:
    X, y = data()
    view = ChainTransforms([StandardizeTokens(), PCATokens(3, whiten=True)])
    model = ConvexHeadClassifier(head=[{"head": "self_attention", "view": view}, "linear"], beta_ratio=0.1).fit(X, y)
    for trained in (model, model.to_module(torch.float64)):
        found = certify(trained, X, y)
        assert found.primal == pytest.approx(model.certificate_.primal, rel=1e-7)
        assert found.relative_gap <= 2e-3


def test_a_smaller_beta_than_that_of_the_fit_shows_a_gap() -> None:
    X, y = data()
    model = ConvexHeadClassifier(head="mlp", beta_ratio=0.2).fit(X, y)
    assert certify(model, X, y, beta=model.beta_ / 10).relative_gap > 0.1


def test_a_linear_head_by_name() -> None:
    X, y = data()
    model = ConvexHeadClassifier(head="linear", beta=0.01, tol=1e-6).fit(X, y)
    (block,) = model.blocks_
    found = certify({"v": block.Z, "intercept": model.intercept_}, X, y, 0.01, head="linear")
    assert found.primal == pytest.approx(model.certificate_.primal, rel=1e-9)
    assert found.relative_gap < 1e-5


def test_a_relu_network_against_the_gated_network_of_its_own_patterns() -> None:
    """The ReLU network's outputs are those of gated units whose gates are its own weights."""
    X, y = data()
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
    found = certify({"u": u, "v": v, "gates": u, "gate": np.arange(6)}, X, y, 0.01, head="mlp", activation="gated_relu")
    out = np.maximum(X @ u.T, 0).mean(1) @ v
    loss = np.mean(np.log(np.exp(out).sum(1)) - out[np.arange(len(y)), y])
    assert found.primal == pytest.approx(loss + 0.005 * (np.sum(u**2) + np.sum(v**2)), rel=1e-9)


@given(st.integers(0, 10_000), st.sampled_from(["self_attention", "mixer", "fno", "mlp"]), st.floats(1e-3, 1.0))
def test_no_other_weights_beat_the_dual(seed: int, head: str, beta: float) -> None:
    """The dual value of one set of weights bounds the objective of every other one from below."""
    X, y = data(12, 3, 4, 3, seed % 7)
    fixture = {
        "X": X, "y": y, "head": head, "gates": None, "grid": None, "pooling": "mean", "loss": "cross_entropy",
        "blocks": 1, "fit_intercept": True,
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    first, second = (
        random_weights(fixture, seed + i, int(rng.integers(1, 6)), 10 ** rng.uniform(-2, 0)) for i in (0, 1)
    )
    one, two = (certify(weights, X, y, beta, head=head) for weights in (first, second))
    assert one.dual <= two.primal * (1 + 1e-12)
    assert two.dual <= one.primal * (1 + 1e-12)


# Bad input ---------------------------------------------------------------------------------------------------

X, Y = data()
GOOD = {"u": np.ones((2, 5)), "v": np.ones((2, 3))}
GATED = {**GOOD, "gates": np.ones((4, 5)), "gate": [0, 3]}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({**GOOD, "u": np.full((2, 5), np.nan)}, {}, "u: got 10 weights that are NaN or infinite"),
        ({**GOOD, "v": np.full((2, 3), np.inf)}, {}, "v: got 6 weights that are NaN"),
        ({**GOOD, "intercept": [0, np.nan, 0]}, {}, "intercept: got 1 weights that are NaN"),
        ({**GOOD, "intercept": [0, 0]}, {}, r"intercept: got shape \(2,\)"),
        ({**GOOD, "u": np.ones((2, 4))}, {}, r"u: got shape \(2, 4\); expected \(m, 5\)"),
        ({**GOOD, "v": np.ones((3, 3))}, {}, r"v: got shape \(3, 1, 3\); expected \(2, 1, 3\)"),
        ({**GOOD, "v": np.ones(3)}, {}, r"v: got shape \(3,\)"),
        ({**GOOD, "v": np.ones((2, 4))}, {}, None),  # an output that no label has
        ({**GOOD, "u": "text"}, {}, "u: got a str"),
        ({"v": np.ones((2, 3))}, {}, "u: got none"),
        ({"u": np.ones((2, 5))}, {}, "weights: got the keys"),
        ({**GOOD, "w": 1}, {}, r"weights: got the keys \['w'\]"),
        (GOOD, {"head": None}, "head: got None"),
        (GOOD, {"head": "softmax"}, "head: got 'softmax'"),
        (GOOD, {"activation": "relu"}, "activation: got 'relu'"),
        (GOOD, {"activation": "gated_relu"}, "gates: got none"),
        (GATED, {}, "activation: got 'linear' with gates"),
        ({**GATED, "gate": [0, 4]}, {"activation": "gated_relu"}, "gate: got values"),
        ({**GATED, "gate": [0.5, 1]}, {"activation": "gated_relu"}, "gate: got values"),
        ({**GATED, "gate": [0]}, {"activation": "gated_relu"}, r"gate: got shape \(1,\)"),
        ({**GOOD, "gates": GATED["gates"]}, {"activation": "gated_relu"}, "gate: got none"),
        ({**GATED, "gates": np.ones((4, 6))}, {"activation": "gated_relu"}, "gates: got gates of shape"),
        (GOOD, {"beta": None}, "beta: got None"),
        (GOOD, {"beta": 0}, "beta: got 0"),
        (GOOD, {"beta": -1.0}, "beta: got -1.0"),
        (GOOD, {"beta": np.nan}, "beta: got nan"),
        (GOOD, {"loss": "hinge"}, "loss: got 'hinge'"),
        (GOOD, {"pooling": "max"}, "pooling: got 'max'"),
        (GOOD, {"y": Y[:-1]}, "y: got 29 labels"),
        (GOOD, {"y": np.where(Y == 0, np.nan, Y)}, "y: got NaN"),
        (GOOD, {"y": Y * 5}, None),
        (GOOD, {"y": Y % 2 + 2}, "classes="),
        (GOOD, {"X": np.where(X > 2, np.nan, X)}, "X: got NaN"),
        (GOOD, {"sample_weight": -np.ones(30)}, "sample_weight: got"),
        (GOOD, {"sample_weight": np.ones(29)}, "sample_weight: got"),
        (np.ones(3), {}, "trained: got a ndarray"),
        ({"u": [np.ones((2, 12))], "v": [np.ones((2, 3))]}, {"head": "block_fno"}, "v: got 1 entries"),
        (GOOD, {"head": "linear"}, "u: got an array"),
        ({"v": np.ones((4, 3))}, {"head": "linear"}, r"v: got shape \(1, 4, 3\)"),
    ],
)
def test_bad_input(weights: Any, changes: dict[str, Any], message: str | None) -> None:
    given_ = {"X": X, "y": Y, "beta": 0.1, "head": "mlp", **changes}
    if message is None:
        assert certify(weights, given_.pop("X"), given_.pop("y"), **given_).gap > 0
        return
    with pytest.raises(InputError, match=message):
        certify(weights, given_.pop("X"), given_.pop("y"), **given_)


def test_tokens_of_another_shape() -> None:
    model = ConvexHeadClassifier(head="mlp", beta_ratio=0.1).fit(X, Y)
    for trained in (model, model.to_module()):
        with pytest.raises(InputError, match="4 tokens of 4 features; expected 4 tokens of 5 features"):
            certify(trained, X[..., :4], Y)


def test_an_estimator_that_is_not_fitted() -> None:
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        certify(ConvexHeadClassifier(), X, Y)
