"""Networks of every activation against the definitions, and plain training of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contract_cases import DEFINITIONS
from convexheads import certify
from convexheads.architectures import ARCHITECTURES
from convexheads.errors import InputError
from convexheads.losses import LOSSES
from convexheads.networks import ACTIVATIONS, METHODS, HeadNetwork, network_problem, train_network

HEADS = sorted(name for name, cls in ARCHITECTURES.items() if not cls.ridge)
N, S, D, C = 9, 6, 4, 2


def data(seed: int = 0, pooled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (N, C) if pooled else (N, S, C)
    return rng.normal(size=(N, S, D)), rng.normal(size=shape)


def network(head: str, activation: str = "relu", units: int = 3, **options: object) -> HeadNetwork:
    options = {"n_blocks": 2, "gates": 2, **options}
    return HeadNetwork(head, S, D, C, units, activation, **options)  # type: ignore[arg-type]


def objective(net: HeadNetwork, X: np.ndarray, Y: np.ndarray) -> float:
    """At beta = 0.05, squared loss."""
    with torch.no_grad():
        return float(net.objective(torch.from_numpy(X), torch.from_numpy(Y), 0.05, "squared"))


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_relu_networks_follow_the_definition(head: str, pooled: bool) -> None:
    """A ReLU unit is a gated unit whose gate is its own weight."""
    X, _ = data()
    net = network(head, pooled=pooled)
    groups = list(net.groups())
    expected = np.zeros((N, S, C))
    for b, group in enumerate(groups):
        wide, share = D // len(groups), C // len(groups)
        for i in range(N):
            for u, v in zip(group.u.detach().numpy(), group.v.detach().numpy(), strict=True):
                part = X[i, :, b * wide : (b + 1) * wide]
                expected[i, :, b * share : (b + 1) * share] += DEFINITIONS[head](part, u, v, u, None)
    found = net(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(found, expected.mean(1) if pooled else expected, atol=1e-10)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head", [*HEADS, "linear"])
def test_objective_and_gradient_are_those_of_the_problem(head: str, activation: str, loss: str) -> None:
    """What torch differentiates through the module is what the solvers' own adjoints give."""
    X, _ = data()
    rng = np.random.default_rng(1)
    targets, weights = rng.dirichlet(np.ones(C), N), rng.dirichlet(np.ones(N))
    net = network(head, activation)
    beta = 0.3
    value = net.objective(torch.from_numpy(X), torch.from_numpy(targets), beta, loss, torch.from_numpy(weights))
    value.backward()
    problem = network_problem(net, X, targets, beta, loss, weights)
    expected, gradient = problem.value_and_gradient(net.factors())
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    own = [t.grad for g in net.groups() for t in (g.u, g.v) if t is not None]
    for found, wanted in zip([*own, net.intercept.grad], gradient.tensors(), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_lowers_the_objective(activation: str, method: str) -> None:
    X, Y = data()
    net = network("self_attention", activation)
    before = objective(net, X, Y)
    steps: list[int] = []
    after = train_network(
        net, X, Y, 0.05, "squared", method=method, max_iter=40, batch_size=4,
        watch=lambda iteration, factors: bool(steps.append(iteration)),
    )  # fmt: skip
    assert after < 0.9 * before
    assert steps == list(range(1, len(steps) + 1))
    # The weights in the module are the trained ones.
    assert objective(net, X, Y) == pytest.approx(after)


def test_lbfgs_ends_at_a_stationary_point_of_the_objective() -> None:
    X, Y = data()
    net = network("mlp", "linear", units=4)
    train_network(net, X, Y, 0.05, "squared")
    net.objective(torch.from_numpy(X), torch.from_numpy(Y), 0.05, "squared").backward()
    assert max(float(p.grad.abs().max()) for p in net.parameters()) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation: got 'gelu'"),
        ({"units": 0}, "units: got 0"),
        ({"units": True}, "units: got True"),
        ({"dtype": "float16"}, "dtype: got 'float16'"),
        ({"head": "softmax"}, "head: got 'softmax'"),
        ({"head": "fno", "grid": (2, 2)}, "grid: got"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(**{"head": "mlp", **options})


def test_an_unknown_method() -> None:
    X, Y = data()
    with pytest.raises(InputError, match="method: got 'sgd'"):
        train_network(network("mlp"), X, Y, 0.1, "squared", method="sgd")


def test_a_relu_network_has_no_certificate() -> None:
    X, _ = data()
    with pytest.raises(InputError, match="ReLU units, whose optimum is not a convex program"):
        certify(network("mlp"), X, np.arange(N) % C, 0.1)
