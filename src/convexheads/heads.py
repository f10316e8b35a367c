"""From factors to networks: branches, canonical heads, torch modules.

Z_g = sum_r sigma_r a_r b_r^T (SVD) gives the units u_r = sqrt(sigma_r) a_r, v_r = sqrt(sigma_r) b_r: a network
with rank(Z_g) units, balanced, that attains the convex optimum. Its units are mutually orthogonal and sorted, hence
canonical up to ties and signs: they can be ranked, drawn and pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from convexheads.architectures import architecture_class
from convexheads.architectures.base import Architecture
from convexheads.architectures.relu import ReluForm
from convexheads.errors import InputError, describe, require
from convexheads.gates import ACTIVATIONS, resolve_gates
from convexheads.operator import Component
from convexheads.spectral import balanced_factors
from convexheads.types import Factors, Units

HEAD_OPTIONS = ("head", "activation", "gates", "grid", "n_blocks", "weight", "view")


class View(Protocol):
    """What a branch may do to the tokens before it reads them: a fitted transform."""

    def transform(self, X: Any) -> np.ndarray: ...

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Module: ...


@dataclass
class Branch:
    """One head of a sum of heads, on tokens (s, d) of its own view, with its gates drawn.

    ``weight`` multiplies beta for this branch. ``gates`` holds, for each channel group, (P, *u_shape) or None. For
    activation ``relu`` they are the patterns of the gated program that stands for the ReLU units; without them, as in
    :meth:`network`, the units are ReLUs themselves.
    """

    head: str
    activation: str
    tokens: int
    features: int
    outputs: int
    pooled: bool
    grid: tuple[int, int] | None
    n_blocks: int
    gates: list[Tensor | None]
    weight: float = 1.0
    view: View | None = None

    @property
    def architecture(self) -> Architecture:
        """The plain architecture of this branch."""
        return architecture_class(self.head)(
            self.tokens, self.features, self.outputs, self.pooled, self.grid, self.n_blocks
        )

    def components(self, index: int) -> list[Component]:
        """Its channel groups, as branch number ``index`` of a problem."""
        architecture = self.architecture
        relu = self.activation == "relu" and not architecture.ridge
        if relu and self.gates[0] is None:
            form: Architecture = ReluForm(group_form(architecture))
        else:
            form = architecture.form("gated_relu" if relu else self.activation)
        return [
            Component(index, group, form, gates, inputs, outputs, self.weight, self.head)
            for group, ((inputs, outputs), gates) in enumerate(zip(architecture.groups, self.gates, strict=True))
        ]

    def network(self) -> Branch:
        """The branch as the network has it: ReLU units without gates, the branch itself for other activations."""
        return replace(self, gates=[None] * len(self.gates)) if self.activation == "relu" else self

    def config(self) -> dict[str, Any]:
        """What rebuilds the branch, without gates and view; plain JSON values."""
        return {
            "head": self.head,
            "activation": self.activation,
            "tokens": self.tokens,
            "features": self.features,
            "outputs": self.outputs,
            "pooled": self.pooled,
            "grid": None if self.grid is None else list(self.grid),
            "n_blocks": self.n_blocks,
            "weight": self.weight,
        }


def make_branch(
    options: dict[str, Any],
    shape: tuple[int, int],
    outputs: int,
    pooled: bool,
    rng: np.random.Generator,
) -> Branch:
    """A branch from its options (keys of ``HEAD_OPTIONS``), checked against tokens of shape (s, d).

    Raises
    ------
    InputError
        For unknown keys, heads or activations, a grid that does not match s, blocks that do not divide d or c,
        options that the head does not have, or a weight that is not positive.
    """
    unknown = sorted(set(options) - set(HEAD_OPTIONS))
    if unknown:
        raise InputError("head: " + describe(f"unknown options {unknown}", f"some of {list(HEAD_OPTIONS)}"))
    cls = architecture_class(options["head"])
    activation = options.get("activation", "linear")
    if not isinstance(activation, str) or activation not in (*ACTIVATIONS, "relu"):
        raise InputError("activation: " + describe(repr(activation), "one of " + ", ".join((*ACTIVATIONS, "relu"))))
    if cls.ridge:
        activation = "linear"
    grid = options.get("grid") if "grid" in cls.options else None
    if grid is not None:
        grid = _pair(grid)
    n_blocks = options.get("n_blocks", 1) if "n_blocks" in cls.options else 1
    if isinstance(n_blocks, bool) or not isinstance(n_blocks, (int, np.integer)):
        raise InputError("n_blocks: " + describe(repr(n_blocks), "an integer >= 1"))
    weight = options.get("weight")
    if weight is not None and not (isinstance(weight, Real) and 0 < float(weight) < np.inf):
        raise InputError("weight: " + describe(repr(weight), "a positive number, or None to choose it"))
    architecture = cls(shape[0], shape[1], outputs, pooled, grid, int(n_blocks))
    gates = resolve_gates(options.get("gates", 16), architecture, activation, rng)
    return Branch(
        options["head"],
        activation,
        shape[0],
        shape[1],
        outputs,
        pooled,
        grid,
        int(n_blocks),
        gates,
        1.0 if weight is None else float(weight),
        options.get("view"),
    )


def _pair(grid: Any) -> tuple[int, int]:
    try:
        h, w = grid
    except (TypeError, ValueError) as error:
        raise InputError("grid: " + describe(repr(grid), "a pair of integers (h, w), or None")) from error
    if not all(isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1 for size in (h, w)):
        raise InputError("grid: " + describe(repr(grid), "a pair of integers (h, w) >= 1, or None"))
    return int(h), int(w)


@dataclass(frozen=True)
class Block:
    """One block Z = sum_r u_r v_r^T of the solution in canonical form.

    Attributes
    ----------
    branch, head, group, gate_index : which branch, head, channel group and gate (None where there is none).
    u : (r, p) mixing weights of the plain architecture, flattened.
    v : (r, q) value weights, flattened.
    gate : the gate's weight, of u's shape, or None.
    singular_values : (r,), descending; ||u_r||^2 = ||v_r||^2 = sigma_r.

    A ridge block (linear head) is written in the same way, as the SVD of its weight matrix W (d, c).
    """

    branch: int
    head: str
    group: int
    gate_index: int | None
    u: np.ndarray
    v: np.ndarray
    gate: np.ndarray | None
    singular_values: np.ndarray

    @property
    def Z(self) -> np.ndarray:
        """The block as a matrix (p, q)."""
        return self.u.T @ self.v


def canonical_blocks(components: Sequence[Component], factors: Factors) -> list[Block]:
    """The blocks of a solution, in the order branch, channel group, gate."""
    blocks = []
    for component, units in zip(components, factors.units, strict=True):
        if units.u is None:
            W = units.v[0].double()
            A, sigma, Bt = torch.linalg.svd(W, full_matrices=False)
            kept = sigma > 1e-12 * max(float(sigma[0]), 1e-300) if len(sigma) else sigma > 0
            root = sigma[kept].sqrt()
            u, v = (A[:, kept] * root).mT, Bt[kept] * root[:, None]
            blocks.append(_block(component, None, u, v, sigma[kept]))
            continue
        for g in [None] if component.gates is None else range(len(component.gates)):
            own = slice(None) if g is None or units.gate is None else units.gate == g
            u, v = component.form.lift(units.u[own].double()).flatten(1), units.v[own].double().flatten(1)
            if len(u):
                u, v, sigma = balanced_factors(u, v)
            else:
                sigma = u.new_zeros(0)
            blocks.append(_block(component, g, u, v, sigma))
    return blocks


def _block(component: Component, g: int | None, u: Tensor, v: Tensor, sigma: Tensor) -> Block:
    gate = None if g is None or component.gates is None else component.gates[g].cpu().numpy()
    return Block(
        component.branch,
        component.head,
        component.group,
        g,
        u.cpu().numpy(),
        v.cpu().numpy(),
        gate,
        sigma.cpu().numpy(),
    )


class HeadUnits(nn.Module):
    """The units of one channel group of a branch, as a module: tokens (n, s, d) -> (n[, s], c of the group).

    ``u`` (m, *u_shape) and ``v`` (m, k, c) are parameters, ``gates`` (P, *u_shape) a buffer in float64, because a
    mask is a sign and must not depend on rounding. Gated units are evaluated from the definition, and so are ReLU
    units, which have no gates.
    """

    gates: Tensor | None

    def __init__(self, component: Component, architecture: Architecture, units: Units, dtype: torch.dtype) -> None:
        super().__init__()
        gated = component.gates is not None
        self.form = group_form(architecture) if gated else component.form
        self.start, self.stop = component.inputs.start, component.inputs.stop
        self.outputs = component.outputs
        self.width = component.width
        self.u = None if units.u is None else nn.Parameter(units.u.detach().to(dtype).clone())
        self.v = nn.Parameter(units.v.detach().to(dtype).clone())
        self.register_buffer("gates", None if component.gates is None else component.gates.clone())
        self.gate = None if units.gate is None else units.gate.tolist()

    def forward(self, X: Tensor) -> Tensor:
        rows = X.shape[:1] if self.form.pooled else X.shape[:2]
        if self.v.shape[0] == 0:
            return X.new_zeros((*rows, self.width))
        stats = self.form.prepare(X[..., self.start : self.stop], self.gates)
        gate = None if self.gate is None else torch.tensor(self.gate, device=X.device)
        T = self.form.unit_features(stats, self.u, gate)  # type: ignore[arg-type]
        return T.flatten(-2) @ self.v.flatten(0, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> HeadUnits:
        # .half() or .float() on the module must not round the gates; a device without float64 has to.
        exact = self.gates
        super()._apply(fn, recurse)
        if exact is not None and self.gates is not None and self.gates.device.type != "mps":
            self.gates = exact.to(self.gates.device)
        return self


def group_form(architecture: Architecture) -> Architecture:
    """The plain form of one channel group."""
    return architecture.form("")


class ConvexHead(nn.Module):
    """A head as an ordinary module: tokens (n, s, d) -> logits (n, c), or (n, s, c) for token-level outputs.

    Its weights are the canonical heads of the convex program; ``branches[b].groups[k].u`` and ``.v`` hold them.
    """

    intercept: nn.Parameter | None

    def __init__(
        self,
        branches: Sequence[Branch],
        factors: Factors,
        dtype: torch.dtype = torch.float32,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        self.configs = [branch.config() for branch in branches]
        self.beta = beta
        self.outputs = branches[0].outputs
        self.views = nn.ModuleList(
            nn.Identity() if branch.view is None else branch.view.to_module(dtype) for branch in branches
        )
        parts = iter(factors.units)
        self.branches = nn.ModuleList()
        for index, branch in enumerate(branches):
            architecture = branch.architecture
            self.branches.append(
                nn.ModuleList(HeadUnits(c, architecture, next(parts), dtype) for c in branch.components(index))
            )
        if factors.intercept is None:
            self.register_parameter("intercept", None)
        else:
            self.intercept = nn.Parameter(factors.intercept.detach().to(dtype).clone())

    def forward(self, X: Tensor) -> Tensor:
        total: Tensor | None = None
        for view, groups in zip(self.views, self.branches, strict=True):
            tokens = view(X)
            # Groups write consecutive outputs: concatenating them is the whole branch.
            part = torch.cat([group(tokens) for group in groups], -1)  # type: ignore[attr-defined]
            total = part if total is None else total + part
        assert total is not None
        return total if self.intercept is None else total + self.intercept

    def factors(self) -> Factors:
        """The weights as factors, detached."""
        units = []
        for group in self.groups():
            gate = None if group.gate is None else torch.tensor(group.gate, device=group.v.device)
            units.append(Units(None if group.u is None else group.u.detach(), group.v.detach(), gate))
        return Factors(units, None if self.intercept is None else self.intercept.detach())

    def groups(self) -> Iterator[HeadUnits]:
        """All channel groups of all branches, in order."""
        for branch in self.branches.children():
            for group in branch.children():
                assert isinstance(group, HeadUnits)
                yield group

    def resolved_branches(self) -> list[Branch]:
        """The branches this module was built from, without their views (those stay modules)."""
        found = []
        for config, groups in zip(self.configs, self.branches, strict=True):
            grid = None if config["grid"] is None else tuple(config["grid"])
            assert isinstance(groups, nn.ModuleList)
            gates = [group.gates for group in groups if isinstance(group, HeadUnits)]
            found.append(Branch(**{**config, "grid": grid}, gates=gates))
        return found

    def export_onnx(self, path: str | Path, tokens: tuple[int, int]) -> None:
        """Write the module as an ONNX file with a free batch size.

        Parameters
        ----------
        path : file to write.
        tokens : (s, d) of the tokens it will be given.

        Raises
        ------
        MissingExtraError
            Without the packages of the extra ``onnx``.
        """
        export_onnx(self, path, (*tokens,))


def export_onnx(module: nn.Module, path: str | Path, shape: tuple[int, ...]) -> None:
    """Export any module of one batched input of sample shape ``shape`` to ONNX, atomically."""
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    from convexheads.tokens.files import write_atomic

    example = torch.zeros((2, *shape), dtype=next(module.parameters()).dtype)
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["input"],
        output_names=["logits"],
        verbose=False,
    )
    if program is None:
        raise InputError("the exporter returned no program")
    write_atomic(Path(path), program.model_proto.SerializeToString())


def attach(backbone: nn.Module, head: nn.Module) -> nn.Sequential:
    """Images to logits: a backbone module that returns tokens (n, s, d), then the head."""
    return nn.Sequential(backbone, head)
