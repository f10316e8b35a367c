"""Where a long fit has got to, in a file: a run that was stopped goes on from it, with any number of workers.

One safetensors file with a JSON header, written whole or not at all by the first worker, at most once in a while. The
header says which problem the factors belong to; those of another problem are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from convexheads.distributed import World
from convexheads.errors import ConvexHeadsError, DataError, InputError, describe
from convexheads.inputs import as_tokens
from convexheads.tokens.files import write_atomic
from convexheads.types import Factors, Units

KEY = "convexheads-checkpoint"
FORMAT = 1
SECONDS = 60.0
CLOSE = 1e-6
"""Relative difference up to which numbers of a problem, such as beta, are those of the same problem: another number of
workers rounds them otherwise."""


def fingerprint_array(array: np.ndarray) -> str:
    """SHA-256 (hexadecimal) of an array's type, shape and content."""
    sha = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def fingerprint_tokens(X: Any) -> Any:
    """What identifies tokens: the fingerprint of a store, else a hash of all rows, read in parts."""
    found = getattr(X, "fingerprint", None)
    if found is not None:
        return found
    tokens = as_tokens(X, check=False)
    n, *rest = (int(size) for size in tokens.shape)
    sha = hashlib.sha256(f"{n} {rest}".encode())
    step = max(1, 2**20 // math.prod(rest))
    for start in range(0, n, step):
        sha.update(tokens[start : start + step].double().cpu().contiguous().numpy().data)
    return sha.hexdigest()


class Checkpoints:
    """Where the checkpoints of a fit are, and how often they are written: the file itself, and that of its path.

    Parameters
    ----------
    path : file of the fit.
    seconds : least time between two writings.
    """

    def __init__(self, path: str | Path, seconds: float = SECONDS) -> None:
        self.path, self.seconds = Path(path), seconds

    @classmethod
    def of(cls, given: str | Path | Checkpoints) -> Checkpoints:
        """What users pass as ``checkpoint``."""
        return given if isinstance(given, Checkpoints) else cls(given)

    def of_path(self) -> Checkpoints:
        """Those of the fits along a path that come before the fit."""
        return Checkpoints(self.path.with_name(f"{self.path.name}.path"), self.seconds)

    def remove(self) -> None:
        """Remove the files: the fit is done and saved."""
        for path in (self.path, self.of_path().path):
            path.unlink(missing_ok=True)


class Checkpoint:
    """The file of one fit.

    Parameters
    ----------
    where : the file, and how often it is written.
    problem : gives what identifies the problem, as plain JSON; called by the first worker only, when it is needed.
        Numbers in it may differ by rounding.
    world : the workers of the fit.
    """

    def __init__(self, where: Checkpoints, problem: Callable[[], dict[str, Any]], world: World) -> None:
        self.path, self.world, self.seconds = where.path, world, where.seconds
        self._describe = problem
        self._problem: dict[str, Any] | None = None
        self._saved = time.monotonic()

    @property
    def problem(self) -> dict[str, Any]:
        """What identifies the problem, as it is read back from JSON."""
        if self._problem is None:
            self._problem = json.loads(json.dumps(self._describe()))
        return self._problem

    def save(self, factors: Factors, state: Mapping[str, Any]) -> None:
        """Write factors and a few numbers of the moment; on the first worker only.

        Raises
        ------
        DataError
            If the file cannot be written.
        """
        if not self.world.first:
            return
        arrays = {}
        for k, units in enumerate(factors.units):
            for name in ("u", "v", "gate"):
                tensor = getattr(units, name)
                if tensor is not None:
                    arrays[f"units.{k}.{name}"] = tensor.detach().cpu().contiguous().numpy()
        if factors.intercept is not None:
            arrays["intercept"] = factors.intercept.detach().cpu().numpy()
        header = {"format": FORMAT, "problem": self.problem, "state": dict(state), "components": len(factors.units)}
        try:
            write_atomic(self.path, serialise(arrays, metadata={KEY: json.dumps(header)}))
        except OSError as error:
            fix = "Choose another place for the checkpoint"
            raise DataError(f"{self.path}: could not be written ({error.strerror or error}). {fix}") from error
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._saved >= self.seconds

    def progress(self, state: Mapping[str, Any]) -> None:
        """What solvers call at every check: writes the factors if the last writing is long enough ago."""
        if self.due:
            self.save(state["factors"], {name: state[name] for name in ("iteration", "objective", "gap", "rank")})

    def load(self) -> tuple[Factors, dict[str, Any]] | None:
        """Factors and numbers of the moment when they were written; None where there is no file.

        The first worker reads the file and shares it.

        Raises
        ------
        DataError
            If the file is damaged.
        InputError
            If it belongs to another problem.
        """
        arrays: dict[str, torch.Tensor] = {}
        note: dict[str, Any] = {"kind": None}
        if self.world.first and self.path.exists():
            try:
                header, arrays = self._read()
                shapes = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in arrays.items()}
                note = {"kind": "", "header": header, "shapes": shapes}
            except ConvexHeadsError as error:
                note = {"kind": type(error).__name__, "message": str(error)}
        note = self.world.agree(note)
        if note["kind"] is None:
            return None
        if note["kind"]:
            raise (InputError if note["kind"] == "InputError" else DataError)(note["message"])
        for name, (shape, dtype) in note["shapes"].items():
            own = arrays[name] if self.world.first else torch.zeros(shape, dtype=getattr(torch, dtype))
            arrays[name] = self.world.sum(own)
        units = [
            Units(arrays.get(f"units.{k}.u"), arrays[f"units.{k}.v"], arrays.get(f"units.{k}.gate"))
            for k in range(note["header"]["components"])
        ]
        return Factors(units, arrays.get("intercept")), note["header"]["state"]

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        try:
            with safe_open(str(self.path), framework="pt") as opened:
                header = json.loads((opened.metadata() or {})[KEY])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            there, version, _ = header["problem"], header["format"], dict(header["state"])
            parts = [f"units.{k}.v" in arrays for k in range(header["components"])]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}: "
                + describe(f"a file that is no checkpoint or damaged ({error})", "one of a fit", "Remove it.")
            ) from error
        if version != FORMAT or not all(parts):
            raise DataError(f"{self.path}: " + describe("a checkpoint of another version", f"{FORMAT}", "Remove it."))
        different = list(differences(there, self.problem))
        if different:
            raise InputError(
                "checkpoint: "
                + describe(
                    f"{self.path}, which belongs to another problem ({'; '.join(different[:4])})",
                    "a checkpoint of the same tokens, labels, head and beta",
                    "Remove it to start anew, or name another file.",
                )
            )
        return header, arrays


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two JSON values; floats within rounding are alike."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in dict.fromkeys([*there, *here])
            for line in differences(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{name}[{index}]")]
    if isinstance(there, float) and isinstance(here, float):
        alike = abs(there - here) <= CLOSE * max(abs(there), abs(here))
    else:
        alike = there == here
    return [] if alike else [f"{name}: {_short(there)} there, {_short(here)} here"]


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 20 else text[:17] + "..."
