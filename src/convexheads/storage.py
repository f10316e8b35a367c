"""Estimators on disk: one safetensors file with a JSON header; loading runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from convexheads import estimators
from convexheads.certificate import Certificate
from convexheads.errors import DataError, InputError, describe
from convexheads.heads import Branch
from convexheads.relu import Bracket
from convexheads.tokens import transforms
from convexheads.tokens.files import write_atomic
from convexheads.types import Factors, Units

FORMAT = 1
KEY = "convexheads"
CHECKSUM = "sha256"
FITTED = ("beta_", "beta_max_", "n_iter_", "history_", "message_", "loss_", "n_features_in_", "n_tokens_in_")
CLASSES = {"ConvexHeadClassifier", "ConvexHeadRegressor"}
"""Names of the estimators that a file may name."""


def _file(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            "path: " + describe(type(path).__name__, "the path of a model file, or of the folder it is in")
        )
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def _plain(value: Any, name: str) -> Any:
    """A parameter as JSON; arrays and transforms are stored with the fitted state, not here."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, name) for v in value]}
    if isinstance(value, list):
        return [_plain(v, name) for v in value]
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, slice):
        return {"slice": [_plain(v, name) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, transforms.TokenTransform) and not hasattr(value, "n_features_in_"):
        # A view among the parameters is cloned before it is fitted: the fitted one is with its branch.
        params = value.get_params(deep=False)
        return {"unfitted": type(value).__name__, "params": {k: _plain(v, name) for k, v in params.items()}}
    if isinstance(value, transforms.TokenTransform):
        config, arrays = value.state()
        return {"transform": config, "arrays": {k: _plain(v, name) for k, v in arrays.items()}}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, name), _plain(v, name)] for k, v in value.items()]}
    if hasattr(value, "tolist"):
        return {"array": np.asarray(value).tolist(), "dtype": str(np.asarray(value).dtype)}
    raise InputError(
        f"{name}: "
        + describe(f"a {type(value).__name__}, which has no JSON form", "numbers, strings, arrays or transforms")
    )


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_restore(v) for v in value["tuple"])
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "slice" in value:
        return slice(*(_restore(v) for v in value["slice"]))
    if "unfitted" in value:
        return transforms.TRANSFORMS[value["unfitted"]](**{k: _restore(v) for k, v in value["params"].items()})
    if "transform" in value:
        return transforms.from_state(value["transform"], {k: _restore(v) for k, v in value["arrays"].items()})
    return {_restore(k): _restore(v) for k, v in value["dict"]}


def save_estimator(estimator: Any, path: str | Path) -> None:
    """Write a fitted estimator; see :meth:`ConvexHeadClassifier.save`."""
    arrays: dict[str, np.ndarray] = {}
    branches = []
    for b, branch in enumerate(estimator._branches):
        config = branch.config()
        for g, gates in enumerate(branch.gates):
            if gates is not None:
                arrays[f"branches.{b}.groups.{g}.gates"] = gates.numpy()
        config["n_groups"] = len(branch.gates)
        config["view"] = None
        if branch.view is not None:
            if not hasattr(branch.view, "state"):
                raise InputError("view: " + describe(type(branch.view).__name__, "a transform of convexheads.tokens"))
            view, held = branch.view.state()
            config["view"] = view
            arrays |= {f"branches.{b}.view.{name}": np.asarray(array) for name, array in held.items()}
        branches.append(config)
    for k, units in enumerate(estimator._factors.units):
        for name in ("u", "v", "gate"):
            tensor = getattr(units, name)
            if tensor is not None:
                arrays[f"units.{k}.{name}"] = tensor.numpy()
    if estimator._factors.intercept is not None:
        arrays["intercept"] = estimator._factors.intercept.numpy()
    if estimator._network is not None:
        arrays |= _network_arrays(estimator._network)
    header = {
        "format": FORMAT,
        "class": type(estimator).__name__,
        "params": {name: _plain(v, name) for name, v in estimator.get_params(deep=False).items()},
        "fitted": {name: getattr(estimator, name) for name in FITTED},
        "certificate": estimator.certificate_.as_dict(),
        "branches": branches,
        "n_components": len(estimator._factors.units),
        "bracket": None if estimator.bracket_ is None else estimator.bracket_.as_dict(),
        "precision": str(estimator._precision).removeprefix("torch."),
    }
    for name in ("classes_", "feature_names_in_"):
        if hasattr(estimator, name):
            values = getattr(estimator, name)
            header[name] = {"values": values.tolist(), "dtype": "O" if values.dtype.kind == "O" else values.dtype.str}
    for name in ("_indicator", "_flat_target"):
        if hasattr(estimator, name):
            header[name] = bool(getattr(estimator, name))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    target = _file(path)
    header[CHECKSUM] = _checksum(header, contiguous)
    try:
        write_atomic(target, serialise(contiguous, metadata={KEY: json.dumps(header)}))
    except OSError as error:
        raise DataError(f"{target}: could not be written ({error.strerror or error})") from error


def _network_arrays(network: Factors) -> dict[str, np.ndarray]:
    """The weights of a ReLU network, by name."""
    found = {}
    for k, units in enumerate(network.units):
        for name in ("u", "v", "gate"):
            tensor = getattr(units, name)
            if tensor is not None:
                found[f"network.{k}.{name}"] = tensor.numpy()
    if network.intercept is not None:
        found["network.intercept"] = network.intercept.numpy()
    return found


def load_estimator(path: str | Path) -> Any:
    """Read an estimator; see :func:`convexheads.load`."""
    file = _file(path)
    if not file.exists():
        raise DataError(
            f"{file}: " + describe("no such file", "a model written by save", "Check the path, or fit and save one.")
        )
    try:
        with safe_open(str(file), framework="np") as opened:
            header = json.loads((opened.metadata() or {})[KEY])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{file}: "
            + describe(
                f"a file that is truncated or no convexheads model ({_reason(error)})",
                "a model written by save",
                "Save it again.",
            )
        ) from error
    kind = (header.get("format"), header.get("class")) if isinstance(header, dict) else (None, None)
    if kind[0] != FORMAT or kind[1] not in CLASSES:
        raise DataError(
            f"{file}: "
            + describe(
                f"format {kind[0]} of class {kind[1]!r}",
                f"format {FORMAT} of {sorted(CLASSES)}",
                "It was written by another version.",
            )
        )
    if header.pop(CHECKSUM, None) != _checksum(header, arrays):
        raise DataError(
            f"{file}: "
            + describe(
                "content that does not match its checksum", "the bytes that save wrote", "Copy or save it again."
            )
        )
    try:
        return _rebuild(header, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: "
            + describe(f"a model whose parts do not fit ({_reason(error)})", "a whole model", "Save it again.")
        ) from error


def _read_network(arrays: Mapping[str, np.ndarray], count: int, branches: list[Branch]) -> Factors:
    import torch

    def tensor(name: str) -> Any:
        found = arrays.get(name)
        return None if found is None else torch.from_numpy(found.copy())

    units = [Units(*(tensor(f"network.{k}.{name}") for name in ("u", "v", "gate"))) for k in range(count)]
    factors = estimators.initial_factors(
        Factors(units, tensor("network.intercept")), [branch.network() for branch in branches]
    )
    assert factors is not None
    return factors


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of everything in a file."""
    sha = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _reason(error: Exception) -> str:
    # The text of a KeyError is the bare key.
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _rebuild(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    import torch

    params = {name: _restore(value) for name, value in header["params"].items()}
    estimator = getattr(estimators, header["class"])(**params)
    for name in FITTED:
        setattr(estimator, name, header["fitted"][name])
    estimator.certificate_ = Certificate.from_dict(header["certificate"])
    branches = []
    for b, config in enumerate(header["branches"]):
        config = dict(config)
        gates = []
        for g in range(config.pop("n_groups")):
            found = arrays.get(f"branches.{b}.groups.{g}.gates")
            gates.append(None if found is None else torch.from_numpy(found.copy()))
        view = config.pop("view")
        if view is not None:
            prefix = f"branches.{b}.view."
            held = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
            view = transforms.from_state(view, held)
        grid = None if config["grid"] is None else tuple(config["grid"])
        branches.append(Branch(**{**config, "grid": grid}, gates=gates, view=view))
    units = []
    for k in range(header["n_components"]):
        u, v, gate = arrays.get(f"units.{k}.u"), arrays[f"units.{k}.v"], arrays.get(f"units.{k}.gate")
        units.append(
            Units(
                None if u is None else torch.from_numpy(u.copy()),
                torch.from_numpy(v.copy()),
                None if gate is None else torch.from_numpy(gate.copy()),
            )
        )
    intercept = arrays.get("intercept")
    estimator._precision = estimators.DTYPES[header["precision"]]
    estimator._branches = branches
    factors = Factors(units, None if intercept is None else torch.from_numpy(intercept.copy()))
    # Raises where units and heads do not belong together.
    estimator._factors = estimators.initial_factors(factors, branches)
    # Files written before there were ReLU heads have no such entry.
    bracket = header.get("bracket")
    estimator.bracket_ = None if bracket is None else Bracket(**bracket)
    estimator._network = None if bracket is None else _read_network(arrays, header["n_components"], branches)
    for name in ("classes_", "feature_names_in_"):
        if name in header:
            setattr(estimator, name, np.array(header[name]["values"], dtype=header[name]["dtype"]))
    for name in ("_indicator", "_flat_target"):
        if name in header:
            setattr(estimator, name, header[name])
    return estimator
