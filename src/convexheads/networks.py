"""Heads as trainable networks: every head with linear, gated ReLU or true ReLU units, and plain training of them.

The certified heads come from a convex program; these are the non-convex networks that it is equivalent to (linear,
gated ReLU), or bounds (ReLU): m units with weights u, v of their own, trained from random starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexheads.errors import InputError, describe
from convexheads.heads import Branch, ConvexHead, make_branch
from convexheads.inputs import as_tokens
from convexheads.losses import make_loss
from convexheads.problem import Problem, Rows
from convexheads.solvers.training import Watch, train_adamw, train_lbfgs
from convexheads.types import Factors, Units

ACTIVATIONS = ("linear", "gated_relu", "relu")
METHODS = ("adamw", "lbfgs")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class HeadNetwork(ConvexHead):
    """m units of one head as a network to be trained: tokens (n, s, d) -> outputs (n, c), or (n, s, c).

    Parameters
    ----------
    head : name of a registered head.
    tokens, features, outputs : s, d and c.
    units : m, in each channel group; with gates, m in each gate.
    activation : ``linear``, ``gated_relu`` (fixed masks 1[hidden(X, h) >= 0]), or ``relu`` (the unit's own mask
        1[hidden(X, u) >= 0]).
    gates, grid, n_blocks : as in :class:`~convexheads.ConvexHeadClassifier`.
    pooled : True averages the s output rows, False gives one output a token.
    fit_intercept : whether there is an unpenalised intercept (c,), zero at the start.
    random_state : seed of gates and weights; weights are normal with variance 1 / p for u, 1 / q for v.
    dtype : ``float32`` or ``float64``.

    ``branches[0][g].u`` (m, *u_shape) and ``.v`` (m, k, c) are the parameters of channel group g. Linear pooled heads
    have u in the reduced shape of the lossless pooling reductions.

    Raises
    ------
    InputError
        For unknown names, or sizes that do not fit the head.
    """

    def __init__(
        self,
        head: str,
        tokens: int,
        features: int,
        outputs: int,
        units: int,
        activation: str = "relu",
        *,
        gates: int | Sequence = 16,
        grid: tuple[int, int] | None = None,
        n_blocks: int = 4,
        pooled: bool = True,
        fit_intercept: bool = True,
        random_state: int = 0,
        dtype: str = "float64",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise InputError("activation: " + describe(repr(activation), "one of " + ", ".join(ACTIVATIONS)))
        if isinstance(units, bool) or not isinstance(units, (int, np.integer)) or units < 1:
            raise InputError("units: " + describe(repr(units), "an integer >= 1"))
        if dtype not in DTYPES:
            raise InputError("dtype: " + describe(repr(dtype), "one of " + ", ".join(DTYPES)))
        options = {"head": head, "gates": gates, "grid": grid, "n_blocks": n_blocks}
        # A ReLU unit has no gate but itself.
        options["activation"] = "gated_relu" if activation == "gated_relu" else "linear"
        rng = np.random.default_rng(random_state)
        branch = make_branch(options, (tokens, features), outputs, pooled, rng)
        if activation == "relu" and not branch.architecture.ridge:
            branch = replace(branch, activation="relu")
        super().__init__([branch], random_network(branch, int(units), fit_intercept, random_state), DTYPES[dtype])

    def objective(
        self, X: Tensor, targets: Tensor, beta: float, loss: str = "cross_entropy", weights: Tensor | None = None
    ) -> Tensor:
        """Loss plus weight decay, (beta/2) of the squares of all u and v, as a scalar to differentiate.

        Parameters
        ----------
        X : tokens (n, s, d).
        targets : of the outputs' shape: distributions over classes, numbers, or labels in [0, 1], as the loss takes
            them.
        beta : weight decay.
        loss : ``cross_entropy``, ``squared`` or ``multilabel_logistic``.
        weights : sample weights (n,) that sum to one; None: 1/n each.
        """
        O = self(X)
        entries = make_loss(loss).entry_value(O, targets.to(O.dtype)).reshape(len(O), -1).sum(1)
        data = entries.mean() if weights is None else (entries * weights.to(O.dtype)).sum()
        return data + 0.5 * beta * self.squares()

    def squares(self) -> Tensor:
        """Sum of the squares of all weights but the intercept."""
        tensors = [t for group in self.groups() for t in (group.u, group.v) if t is not None]
        return torch.stack([t.square().sum() for t in tensors]).sum()


def random_network(branch: Branch, units: int, fit_intercept: bool, seed: int) -> Factors:
    """Random units of a branch, ``units`` a gate: u with variance 1 / p, v with variance 1 / q; float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, *shape: int) -> Tensor:
        size = int(np.prod(shape))
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64) / size**0.5

    found = []
    for component in branch.components(0):
        k, c = component.form.value_width, component.width
        if component.ridge:
            found.append(Units(None, draw(1, k, c)))
            continue
        m = units * component.n_gates
        gate = None if component.gates is None else torch.arange(component.n_gates).repeat_interleave(units)
        found.append(Units(draw(m, *component.form.u_shape), draw(m, k, c), gate))
    return Factors(found, torch.zeros(branch.outputs, dtype=torch.float64) if fit_intercept else None)


def network_problem(
    network: ConvexHead, X: Any, targets: Any, beta: float, loss: str = "cross_entropy", weights: Any = None
) -> Problem:
    """The training problem of a network on tokens X (n, s, d), in the network's dtype and on its device.

    ``targets`` and ``weights`` as in :meth:`HeadNetwork.objective`, arrays or tensors.
    """
    weight = next(network.parameters())
    rows = torch.as_tensor(as_tokens(X)[:]).to(weight)
    with torch.no_grad():
        tokens: list[Rows] = [view(rows) for view in network.views]
    n = len(rows)
    branches = network.resolved_branches()
    return Problem(
        [component for index, branch in enumerate(branches) for component in branch.components(index)],
        tokens,
        make_loss(loss),
        torch.as_tensor(targets),
        torch.full((n,), 1.0 / n, dtype=torch.float64) if weights is None else torch.as_tensor(weights),
        beta,
        network.intercept is not None,
        weight.dtype,
        weight.device,
    )


def write_factors(network: ConvexHead, factors: Factors) -> None:
    """Overwrite the parameters of a network by units of the same shapes and gates."""
    with torch.no_grad():
        for group, units in zip(network.groups(), factors.units, strict=True):
            if group.u is not None and units.u is not None:
                group.u.copy_(units.u)
            group.v.copy_(units.v)
        if network.intercept is not None and factors.intercept is not None:
            network.intercept.copy_(factors.intercept)


def train_network(
    network: ConvexHead,
    X: Any,
    targets: Any,
    beta: float,
    loss: str = "cross_entropy",
    weights: Any = None,
    *,
    method: str = "lbfgs",
    max_iter: int = 2000,
    learning_rate: float = 3e-3,
    batch_size: int = 256,
    random_state: int = 0,
    watch: Watch | None = None,
) -> float:
    """Train a network of any activation in place, from the weights it has.

    Parameters
    ----------
    network : a :class:`HeadNetwork`, or any module of this package's heads.
    X, targets, beta, loss, weights : as in :meth:`HeadNetwork.objective`; arrays or tensors.
    method : ``lbfgs`` (full batch) or ``adamw`` (mini-batches, cosine schedule, weight decay in the gradient).
    max_iter : most iterations of L-BFGS, or epochs of AdamW.
    learning_rate, batch_size, random_state : of AdamW; the seed is that of its mini-batches.
    watch : called after every iteration or epoch with its number and the units; True ends the training.

    Returns
    -------
    The objective reached, in float64.

    Raises
    ------
    InputError
        For an unknown method, or data that do not fit the network.
    """
    if method not in METHODS:
        raise InputError("method: " + describe(repr(method), "one of " + ", ".join(METHODS)))
    problem = network_problem(network, X, targets, beta, loss, weights)
    if method == "lbfgs":
        factors = train_lbfgs(problem, network.factors(), max_iter, watch)[0]
    else:
        generator = torch.Generator().manual_seed(random_state)
        factors = train_adamw(problem, network.factors(), learning_rate, max_iter, generator, batch_size, watch)[0]
    write_factors(network, factors)
    return problem.value(factors, torch.float64)
