"""Trained networks against optima that an interior-point solver found: reached with enough units, never undercut."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convexheads import ConvexHeadClassifier, ConvexHeadRegressor, certify
from convexheads.certificate import Certificate
from convexheads.errors import NotConvergedWarning
from convexheads.networks import HeadNetwork, train_network
from convexheads.targets import encode_targets

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
# Every head once, with both activations, losses, outputs and with and without intercept among them.
FEW = [
    path
    for path in FIXTURES
    if path.stem
    in (
        "self_attention-linear-cross_entropy-pooled-intercept",
        "mixer-gated_relu-squared-tokens",
        "fno-linear-squared-tokens-intercept",
        "fno2d-gated_relu-cross_entropy-pooled",
        "block_fno-linear-cross_entropy-pooled",
        "mlp-gated_relu-squared-pooled-intercept",
    )
]
SEEDS = 20
ROUNDING = 1e-7
"""The fixtures' optima are good to this."""


def some_then_all(paths: list[Path]) -> Any:
    """The few in every run, the others in the slow one."""
    return [pytest.param(p, id=p.stem, marks=() if p in FEW else pytest.mark.slow) for p in paths]


def read(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known["grid"] = None if known["grid"] is None else tuple(known["grid"])
    known["X"], known["y"] = np.asarray(known["X"]), np.asarray(known["y"])
    return known


def trained(known: dict[str, Any], solver: str, max_iter: int, seed: int, **options: Any) -> Any:
    """An estimator whose network was trained on a fixture."""
    names = ("head", "activation", "grid", "pooling", "beta", "fit_intercept")
    parameters = {name: known[name] for name in names}
    parameters |= {name: known[name] for name in ("gates", "n_blocks") if known[name] is not None}
    cls = ConvexHeadClassifier if known["loss"] == "cross_entropy" else ConvexHeadRegressor
    model = cls(**parameters, solver=solver, max_iter=max_iter, random_state=seed, solver_options=options, tol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return model.fit(known["X"], known["y"])


@pytest.mark.parametrize("path", some_then_all(FIXTURES))
def test_networks_with_enough_units_reach_the_optimum_and_none_undercuts_it(path: Path) -> None:
    known = read(path)
    optimum = known["optimal_value"]
    # One gate at least needs as many units as the largest rank; the others get the same.
    model = trained(known, "lbfgs", 3000, 0, units=max(known["ranks"]), seeds=SEEDS)
    objectives = [run["objective"] for run in model.runs_]
    assert len(objectives) == SEEDS
    assert min(objectives) <= optimum * (1 + 1e-3)
    assert min(objectives) >= optimum * (1 - ROUNDING)
    for run in model.runs_:
        assert run["dual"] <= optimum * (1 + ROUNDING)


def test_too_few_units_leave_a_gap_that_the_certificate_shows() -> None:
    known = read(next(p for p in FIXTURES if p.stem == "self_attention-linear-cross_entropy-pooled-intercept"))
    assert sum(known["ranks"]) > 1
    model = trained(known, "lbfgs", 3000, 0, units=1, seeds=SEEDS)
    for run in model.runs_:
        true = run["objective"] - known["optimal_value"]
        assert true > 1e-3 * known["optimal_value"]
        assert run["relative_gap"] * run["objective"] >= true


@pytest.mark.parametrize("intercept", [True, False])
def test_adamw_has_the_fixed_points_of_the_objective(intercept: bool) -> None:
    """Explicit weight decay: many full-batch epochs end at the convex optimum, where decoupled decay does not."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 3, 4)), np.arange(20) % 2
    convex = ConvexHeadClassifier("mlp", beta_ratio=0.2, fit_intercept=intercept, tol=1e-6).fit(X, y)
    options = {"learning_rates": (0.05,), "epochs": 400, "batch_size": 20, "units": 4}
    network = ConvexHeadClassifier(
        "mlp", beta=convex.beta_, fit_intercept=intercept, solver="adamw", solver_options=options, tol=1e-3
    ).fit(X, y)
    assert network.certificate_.relative_gap <= 1e-3
    assert network.certificate_.primal <= convex.certificate_.primal * (1 + 1e-3)
    assert network.certificate_.primal >= convex.certificate_.dual
    # A network stays as it was trained: nothing is balanced, pruned or polished.
    assert network._factors.n_units == 4
    assert (network.intercept_ is None) == (not intercept)


def sound(certificate: Certificate, optimum: float) -> bool:
    """Whether a certificate claims no more than is true."""
    slack = ROUNDING * abs(optimum)
    return certificate.gap >= certificate.primal - optimum - slack and certificate.dual <= optimum + slack


def check_stopped_networks(path: Path, count: int) -> None:
    """Networks of either kind stopped at random times: every certificate against the fixture's optimum."""
    known = read(path)
    rng = np.random.default_rng(len(path.stem))
    for seed in range(count):
        units, steps = int(rng.integers(1, 5)), int(rng.integers(1, 60))
        if seed % 2:
            model = trained(known, "lbfgs", steps, seed, units=units)
        else:
            rate = float(10 ** rng.uniform(-3, -0.5))
            model = trained(known, "adamw", steps, seed, units=units, learning_rates=(rate,), batch_size=4)
        assert model.certificate_.certified
        assert sound(model.certificate_, known["optimal_value"]), (path.stem, seed)
        loss = known["loss"]
        again = certify(model.to_module(torch.float64), known["X"], known["y"], loss=loss)
        assert again.primal == pytest.approx(model.certificate_.primal, rel=1e-12)
        assert sound(again, known["optimal_value"]), (path.stem, seed)


@pytest.mark.parametrize("path", FEW, ids=lambda path: path.stem)
def test_certificates_of_stopped_networks_are_sound(path: Path) -> None:
    check_stopped_networks(path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_no_violation_in_540_stopped_networks(path: Path) -> None:
    assert len(FIXTURES) * 9 >= 540
    check_stopped_networks(path, 9)


def test_a_network_trained_by_plain_torch_code() -> None:
    """A module that knows nothing of this package, its weights by name, and the fit that goes on from them."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 5, 4)), np.arange(40) % 3
    torch.manual_seed(0)
    query = torch.nn.Parameter(0.3 * torch.randn(6, 4, 4, dtype=torch.float64))
    value = torch.nn.Parameter(0.3 * torch.randn(6, 4, 3, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    tokens, labels, beta = torch.from_numpy(X), torch.from_numpy(y), 0.1

    def objective() -> torch.Tensor:
        scores = torch.einsum("nsa,hab,ntb->nhst", tokens, query, tokens)
        logits = torch.einsum("nhst,ntb,hbc->nc", scores, tokens, value) / tokens.shape[1] + bias
        decay = 0.5 * beta * (query.square().sum() + value.square().sum())
        return torch.nn.functional.cross_entropy(logits, labels) + decay

    optimiser = torch.optim.Adam([query, value, bias], lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        optimiser.step()
    weights = {"u": query, "v": value, "intercept": bias}
    found = certify(weights, X, y, beta, head="self_attention")
    assert found.primal == pytest.approx(float(objective().detach()), rel=1e-12)
    optimal = ConvexHeadClassifier("self_attention", beta=beta, tol=1e-6).fit(X, y, init=weights)
    assert optimal.certificate_.relative_gap <= 1e-6
    assert found.dual <= optimal.certificate_.primal < found.primal
    assert found.gap >= found.primal - optimal.certificate_.primal


@pytest.mark.parametrize(
    ("head", "activation"),
    [("mixer", "linear"), ("fno", "linear"), ("mlp", "gated_relu"), ("block_fno", "gated_relu"), ("fno", "gated_relu")],
)
def test_fits_go_on_from_modules_and_from_weights(head: str, activation: str) -> None:
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(24, 4, 4)), np.arange(24) % 4
    network = HeadNetwork(head, 4, 4, 4, 5, activation, gates=2, n_blocks=2)
    beta = 0.03
    targets = encode_targets(y, "cross_entropy", 4, (24,))
    reached = train_network(network, X, targets, beta, max_iter=15)
    options: dict[str, Any] = {"head": head, "activation": activation, "n_blocks": 2, "beta": beta}
    if activation == "gated_relu":
        groups = [list(group.gates.numpy()) for group in network.groups()]
        options["gates"] = groups if len(groups) > 1 else groups[0]
    certificate = certify(network, X, y, beta)
    assert certificate.primal == pytest.approx(reached, rel=1e-12)
    model = ConvexHeadClassifier(**options, tol=1e-5).fit(X, y, init=network)
    assert certificate.dual <= model.certificate_.primal < reached
    # Weights of the definition, before any reduction by pooling.
    blocks = model.blocks_
    grouped: dict[str, list] = {"u": [], "v": [], "gate": []}
    for group in sorted({block.group for block in blocks}):
        own = [block for block in blocks if block.group == group]
        width = 4 // (2 if head == "block_fno" else 1)
        shape = network.resolved_branches()[0].architecture.value_width
        grouped["u"].append(np.concatenate([block.u for block in own]))
        grouped["v"].append(np.concatenate([block.v for block in own]).reshape(-1, shape, width))
        grouped["gate"].append(np.concatenate([np.full(len(b.u), b.gate_index or 0) for b in own]))
    listed = head == "block_fno"
    weights: dict[str, Any] = {key: parts if listed else parts[0] for key, parts in grouped.items()}
    if activation == "linear":
        del weights["gate"]
    weights["intercept"] = model.intercept_
    again = ConvexHeadClassifier(**options, tol=1e-5, max_iter=5).fit(X, y, init=weights)
    assert again.certificate_.primal == pytest.approx(model.certificate_.primal, rel=1e-5)
