"""How far from the global optimum a head is: ours, or a network that someone else trained.

Any units of a linear or gated head have outputs, outputs have a gradient of the loss, and this gradient, scaled to
feasibility, is a dual point: its value bounds every network of the family from below, whatever the number of units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from convexheads import memory
from convexheads.certificate import Certificate, certify_factors
from convexheads.errors import DataError, InputError, describe
from convexheads.gates import ACTIVATIONS
from convexheads.heads import Branch, ConvexHead, group_form, make_branch
from convexheads.inputs import TokenRows, as_tokens, shown
from convexheads.losses import make_loss
from convexheads.operator import Component, split_rows
from convexheads.problem import Problem, Rows
from convexheads.targets import encode_targets
from convexheads.types import Factors, Units

KEYS = ("u", "v", "gate", "gates", "intercept")
CACHE_BYTES = 2**30
"""Memory for float64 statistics of the tokens; beyond it they are computed again for every pass."""


def certify(
    trained: Any,
    X: Any,
    y: Any,
    beta: float | None = None,
    loss: str | None = None,
    *,
    sample_weight: Any = None,
    classes: Any = None,
    head: str | None = None,
    activation: str = "linear",
    grid: tuple[int, int] | None = None,
    n_blocks: int = 4,
    pooling: str | None = "mean",
    device: Any = None,
) -> Certificate:
    """Bound how far a trained head is from the global optimum of its training problem.

    The primal value is the network's own objective on (X, y): the loss, plus (beta/2) (||u||^2 + ||v||^2) summed
    over its units as they are. The dual value bounds this objective from below for every head of the family (same
    gates, any number of units, any weights), so ``gap`` is at least the true suboptimality.

    Parameters
    ----------
    trained : a fitted estimator of this package (one with ``activation="relu"`` stands for its gated
        program, which is what is certified); a :class:`~convexheads.heads.ConvexHead`, trained further or not; or
        a dict of weights for ``head`` and ``activation``: ``u`` (m, *u_shape) and ``v`` (m, k, c) as in the table of
        heads, ``v`` also (m, c) where k = 1; for gated heads ``gates`` (P, *u_shape) and ``gate`` (m,), the gate of
        each unit; optionally ``intercept`` (c,). For block_fno each of u, v, gates and gate is a sequence with one
        entry a block. For linear, ``v`` is W (d, c) and there is no u.
    X : tokens (n, s, d) of the training set, before the views that estimators and modules carry in themselves.
    y : labels as in fit.
    beta : weight decay of the training objective; None: the one stored in the estimator or module.
    loss : ``cross_entropy``, ``multilabel_logistic`` or ``squared``; None: the estimator's, else cross_entropy.
    sample_weight : (n,) non-negative, or None.
    classes : (c,) the class of each output, where they cannot be read off y. Default: the estimator's; else the sorted
        labels where all c occur, else y holds the numbers of the outputs.
    head, activation, grid, n_blocks, pooling : of weights given as a dict; as in the estimators.
    device : None (CPU) or a torch device.

    Returns
    -------
    Certificate
        In float64; ``certified`` is True where its bound is proved.

    Raises
    ------
    InputError
        For weights that are not finite or of wrong shapes, tokens or labels that do not fit them, a beta that is not
        positive, or a ReLU without gates, whose optimum is not a convex program.

    Notes
    -----
    A ReLU network can be compared with the gated network of its own patterns: ``activation="gated_relu"``,
    ``gates`` = its u, ``gate`` = 0, 1, ..., m - 1.
    """
    smoothing, class_weight = 0.0, None
    if hasattr(trained, "_factors") or hasattr(trained, "__sklearn_is_fitted__"):
        check_is_fitted(trained)
        beta = trained.beta_ if beta is None else beta
        loss = trained.loss_ if loss is None else loss
        classes = getattr(trained, "classes_", None) if classes is None else classes
        smoothing = getattr(trained, "label_smoothing", 0.0)
        class_weight = getattr(trained, "class_weight", None)
        branches, factors = trained._branches, trained._factors
        components = [c for index, branch in enumerate(branches) for c in branch.components(index)]
        tokens = [_view_rows(X, branch) for branch in branches]
    elif isinstance(trained, ConvexHead):
        beta = trained.beta if beta is None else beta
        branches, factors = trained.resolved_branches(), _on_cpu(trained.factors())
        if any(branch.activation == "relu" for branch in branches):
            raise _no_program("a module of ReLU units")
        for branch in branches:
            branch.gates = [None if gates is None else gates.cpu() for gates in branch.gates]
        components = [c for index, branch in enumerate(branches) for c in branch.components(index)]
        tokens = [_module_rows(X, view) for view in trained.views]
    elif isinstance(trained, Mapping):
        if head is None:
            raise InputError("head: " + describe("None", "the name of the head that the weights belong to"))
        rows = as_tokens(X)
        tokens = [rows]
        shape = (int(rows.shape[1]), int(rows.shape[2]))
        branch, components, factors = _from_weights(trained, shape, head, activation, grid, n_blocks, pooling)
        branches = [branch]
    else:
        raise InputError(
            "trained: "
            + describe(
                f"a {type(trained).__name__}",
                "a fitted estimator, a ConvexHead module, or a dict of weights with head=",
                "Give the weights of another network as a dict with the keys u and v.",
            )
        )
    for branch, own in zip(branches, tokens, strict=True):
        _check_tokens(branch, own)
    _check_finite(factors)
    _check_units(components, factors)
    beta = _check_beta(beta)
    loss = "cross_entropy" if loss is None else loss
    make_loss(loss)  # an unknown name is told before the labels are looked at
    n, outputs, pooled = int(tokens[0].shape[0]), branches[0].outputs, branches[0].pooled
    targets = encode_targets(y, loss, outputs, (n,) if pooled else (n, int(tokens[0].shape[1])), classes)
    weights = _weights(sample_weight, class_weight, y, n)
    if smoothing:
        spread = smoothing / outputs if loss == "cross_entropy" else smoothing / 2
        targets = (1 - smoothing) * targets + spread
    problem = Problem(
        components,
        tokens,
        make_loss(loss),
        torch.as_tensor(targets),
        torch.as_tensor(weights),
        beta,
        factors.intercept is not None,
        torch.float64,
        "cpu" if device is None else device,
        min(CACHE_BYTES, memory.current().cache),
    )
    for component in problem.components:
        if component.gates is not None:
            component.gates = component.gates.to(problem.device)
    return certify_factors(problem, _to(factors, problem.device), network=True)


# Tokens ---------------------------------------------------------------------------------------------------


def _view_rows(X: Any, branch: Branch) -> Rows:
    return as_tokens(X) if branch.view is None else shown(branch.view, X)


def _module_rows(X: Any, view: nn.Module) -> Rows:
    """Tokens as a module's view shows them, in float64."""
    tokens = as_tokens(X)
    if isinstance(view, nn.Identity):
        return tokens
    view = copy.deepcopy(view).cpu().double().eval()
    step = max(1, 2**24 // (int(tokens.shape[1]) * int(tokens.shape[2])))
    try:
        with torch.no_grad():
            parts = split_rows(int(tokens.shape[0]), step)
            return memory.current().gathered(parts, lambda rows: view(tokens[rows].double()))
    except (RuntimeError, IndexError) as error:
        got = f"tokens of shape {tuple(tokens.shape[1:])}, which the module's view cannot take ({error})"
        raise InputError("X: " + describe(got, "the tokens that the module was made for")) from error


def _check_tokens(branch: Branch, rows: Rows | Tensor | TokenRows) -> None:
    s, d = int(rows.shape[1]), int(rows.shape[2])
    if (s, d) != (branch.tokens, branch.features):
        raise InputError(
            "X: "
            + describe(
                f"{s} tokens of {d} features",
                f"{branch.tokens} tokens of {branch.features} features, as this head was fitted on",
                "Use tokens of the same backbone, token choice and transforms as in fit.",
            )
        )


# Weights --------------------------------------------------------------------------------------------------


def _check_beta(beta: Any) -> float:
    if isinstance(beta, bool) or not isinstance(beta, Real) or not math.isfinite(beta) or beta <= 0:
        raise InputError(
            "beta: " + describe(repr(beta), "a positive number", "Give the weight decay of the training objective.")
        )
    return float(beta)


def _weights(sample_weight: Any, class_weight: Any, y: Any, n: int) -> np.ndarray:
    """Sample weights (n,) that sum to one."""
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        got = f"weights of shape {weights.shape}"
        raise InputError("sample_weight: " + describe(got, f"({n},) finite, not negative, with a positive sum"))
    if class_weight is not None:
        weights = weights * compute_sample_weight(class_weight, np.asarray(y))
    return weights / weights.sum()


def _tensor(value: Any, name: str) -> Tensor:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return torch.from_numpy(np.array(array, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: " + describe(f"a {type(value).__name__}", "an array of numbers")) from error


def _from_weights(
    weights: Mapping[str, Any],
    shape: tuple[int, int],
    head: str,
    activation: str,
    grid: tuple[int, int] | None,
    n_blocks: int,
    pooling: str | None,
) -> tuple[Branch, list[Component], Factors]:
    """Branch, components in the plain form of the definition, and factors of weights given by name."""
    unknown = sorted(set(weights) - set(KEYS))
    if unknown:
        raise InputError("weights: " + describe(f"the keys {unknown}", f"some of {list(KEYS)}"))
    if weights.get("v") is None:
        raise InputError(
            "weights: " + describe(f"the keys {sorted(weights)}", "at least v, and u unless head='linear'")
        )
    if isinstance(activation, str) and activation == "relu":
        raise _no_program("'relu'")
    if pooling not in ("mean", None):
        raise InputError("pooling: " + describe(repr(pooling), "'mean', or None for token-level outputs"))
    blocks = head == "block_fno"
    outputs = _count_outputs(weights["v"], n_blocks if blocks else None)
    # Gates are checked by the branch itself; linear activation has none.
    if activation != "linear" and weights.get("gates") is None:
        if activation == "gated_relu":
            raise InputError("gates: " + describe("none", "the gates (P, *u_shape) of the gated units"))
    elif activation == "linear" and (weights.get("gates") is not None or weights.get("gate") is not None):
        raise InputError("activation: " + describe("'linear' with gates", "'gated_relu'", "Or leave the gates out."))
    gates: Any = 1 if weights.get("gates") is None else _listed(weights["gates"], blocks)
    options = {"head": head, "activation": activation, "gates": gates, "grid": grid, "n_blocks": n_blocks}
    branch = make_branch(options, shape, outputs, pooling is not None, np.random.default_rng(0))
    components = []
    # The plain form, not a reduction: weights found by training need not be of the reduced shape.
    form = group_form(branch.architecture)
    for component in branch.components(0):
        components.append(component if form.ridge else replace(component, form=form))
    units = [
        _units(weights, component, index if len(components) > 1 else None) for index, component in enumerate(components)
    ]
    intercept = weights.get("intercept")
    if intercept is not None:
        intercept = _tensor(intercept, "intercept")
        if intercept.shape != (outputs,):
            raise InputError("intercept: " + describe(f"shape {tuple(intercept.shape)}", f"({outputs},)"))
    return branch, components, Factors(units, intercept)


def factors_of_weights(weights: Mapping[str, Any], branch: Branch) -> Factors:
    """Weights by name, as for :func:`certify`, as the factors that solvers of this branch start from.

    Raises
    ------
    InputError
        For weights of wrong shapes or with NaN, or gates other than the branch's own.
    """
    if branch.activation != "linear" and weights.get("gates") is None:
        groups = [gates.numpy() for gates in branch.gates if gates is not None]
        weights = {**weights, "gates": groups if branch.head == "block_fno" else groups[0]}
    shape, pooling = (branch.tokens, branch.features), "mean" if branch.pooled else None
    given, _, factors = _from_weights(
        weights, shape, branch.head, branch.activation, branch.grid, branch.n_blocks, pooling
    )
    _check_finite(factors)
    if given.outputs != branch.outputs:
        raise InputError("v: " + describe(f"{given.outputs} outputs", f"{branch.outputs}, one for each class"))
    check_same_gates([given], [branch])
    units = [
        Units(None if each.u is None else component.form.reduce(each.u), each.v, each.gate)
        for component, each in zip(branch.components(0), factors.units, strict=True)
    ]
    return Factors(units, factors.intercept)


def check_same_gates(given: Sequence[Branch], wanted: Sequence[Branch]) -> None:
    """Raise InputError unless both have the same gates: units mean nothing under other masks."""
    for first, second in zip(given, wanted, strict=True):
        for a, b in zip(first.gates, second.gates, strict=True):
            if a is None or b is None:
                same = a is b
            else:
                same = a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
            if not same:
                raise InputError(
                    "init: "
                    + describe(
                        "units with other gates than this head has",
                        "the same gates",
                        "Give them with gates=, or use the random_state that they were drawn with.",
                    )
                )


def read_weights(path: str | Path) -> dict[str, Any]:
    """Weights by name from a safetensors file, or a state dict saved by torch (.pt, .pth); runs no code from it.

    Names may share a prefix, such as ``head.u`` and ``head.v``, which is taken off.

    Raises
    ------
    DataError
        If the file is missing, damaged or holds something else.
    """
    path = Path(path)
    expected = "a safetensors file, or a state dict saved by torch.save, with tensors u and v"
    try:
        if path.suffix in (".pt", ".pth"):
            held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            held = load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: " + describe("no such file", expected)) from error
    except Exception as error:  # what a file that is neither of them raises depends on its bytes
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: " + describe(f"a file that cannot be read ({reason})", expected)) from error
    if not isinstance(held, Mapping) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise DataError(f"{path}: " + describe(f"a {type(held).__name__} of other things than tensors", expected))
    prefixes = {str(name).rpartition(".")[0] for name in held}
    return {str(name).rpartition(".")[2] if len(prefixes) == 1 else str(name): held[name] for name in held}


def _no_program(got: str) -> InputError:
    return InputError(
        "activation: "
        + describe(
            f"{got}, whose optimum is not a convex program of this form",
            f"one of {', '.join(ACTIVATIONS)}",
            "Compare with the gated network of its own patterns: gates = its u; or fit with activation='relu', "
            "which brackets the optimum.",
        )
    )


def _listed(gates: Any, blocks: bool) -> list:
    groups = list(gates) if blocks else [gates]
    found = [list(_tensor(group, "gates").numpy()) for group in groups]
    return found if blocks and len(found) > 1 else found[0]


def _count_outputs(v: Any, blocks: int | None) -> int:
    if blocks is None:
        shape = _tensor(v, "v").shape
        if len(shape) < 2:
            raise InputError("v: " + describe(f"shape {tuple(shape)}", "(m, k, c), or (m, c) where k = 1"))
        return int(shape[-1])
    if not isinstance(v, (Sequence, np.ndarray, Tensor)) or len(v) != blocks:
        got = f"{len(v) if hasattr(v, '__len__') else 'no'} entries"
        raise InputError("v: " + describe(got, f"one array for each of the {blocks} blocks (n_blocks)"))
    return sum(_count_outputs(part, None) for part in v)


def _units(weights: Mapping[str, Any], component: Component, group: int | None) -> Units:
    def part(name: str) -> Any:
        value = weights.get(name)
        if value is None:
            return None
        if group is None:
            # A single block comes as a sequence of one.
            return value[0] if component.head == "block_fno" else value
        if not hasattr(value, "__len__") or len(value) <= group:
            raise InputError(f"{name}: " + describe("too few entries", "one array for each block"))
        return value[group]

    form = component.form
    k, c = form.value_width, component.width
    v = _tensor(part("v"), "v")
    if form.ridge:
        if part("u") is not None:
            raise InputError("u: " + describe("an array", "none: the linear head has only v = W (d, c)"))
        v = v[None] if v.ndim == 2 else v
        if v.shape != (1, k, c):
            raise InputError("v: " + describe(f"shape {tuple(v.shape)}", f"W of shape ({k}, {c})"))
        return Units(None, v)
    given = part("u")
    if given is None:
        raise InputError("u: " + describe("none", f"mixing weights (m, *{form.u_shape})"))
    u = _tensor(given, "u")
    m = len(u) if u.ndim else 0
    if u.ndim < 2 or tuple(u.shape[1:]) not in (form.u_shape, (component.p,)):
        got = f"shape {tuple(u.shape)}"
        raise InputError("u: " + describe(got, f"(m, {', '.join(map(str, form.u_shape))}) for head={component.head!r}"))
    if v.ndim == 2 and k == 1:
        v = v[:, None]
    if tuple(v.shape) != (m, k, c):
        raise InputError(
            "v: " + describe(f"shape {tuple(v.shape)}", f"({m}, {k}, {c}), one value weight for each of the {m} units")
        )
    u = u.reshape(m, *form.u_shape)
    if component.gates is None:
        return Units(u, v)
    given = part("gate")
    if given is None:
        raise InputError("gate: " + describe("none", f"the gate of each unit: {m} integers below {component.n_gates}"))
    gate = _tensor(given, "gate")
    good = tuple(gate.shape) == (m,) and bool((gate == gate.round()).all())
    if not good or (m and not 0 <= float(gate.min()) <= float(gate.max()) < component.n_gates):
        raise InputError(
            "gate: "
            + describe(
                f"shape {tuple(gate.shape)}" if tuple(gate.shape) != (m,) else f"values {gate.tolist()[:8]}",
                f"({m},) integers from 0 to {component.n_gates - 1}, the gate of each unit",
            )
        )
    # Units are kept in the order of their gates throughout the package.
    gate, order = torch.sort(gate.long(), stable=True)
    return Units(u[order], v[order], gate)


def _check_finite(factors: Factors) -> None:
    names = [name for units in factors.units for name in (["v"] if units.u is None else ["u", "v"])]
    names += [] if factors.intercept is None else ["intercept"]
    for name, tensor in zip(names, factors.tensors(), strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name}: "
                + describe(
                    f"{int((~torch.isfinite(tensor)).sum())} weights that are NaN or infinite",
                    "finite weights",
                    "The training diverged: lower its learning rate.",
                )
            )


def _check_units(components: list[Component], factors: Factors) -> None:
    for component, units in zip(components, factors.units, strict=True):
        expected = (component.form.value_width, component.width)
        if tuple(units.v.shape[1:]) != expected:
            raise InputError("v: " + describe(f"shape {tuple(units.v.shape)}", f"(m, {expected[0]}, {expected[1]})"))


def _on_cpu(factors: Factors) -> Factors:
    return _to(factors, torch.device("cpu"))


def _to(factors: Factors, device: torch.device) -> Factors:
    def move(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(device)

    return Factors([Units(move(u.u), move(u.v), move(u.gate)) for u in factors.units], move(factors.intercept))
