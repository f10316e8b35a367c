"""What an architecture is: two maps, a registry, and the evaluation that follows from them.

Every head is a sum of units, each bilinear in a mixing weight u and a value weight v:

    f(X) = sum_j values(X, M o hidden(X, u_j)) v_j

``hidden`` is linear in u, ``values`` linear in its second argument, M a 0/1 mask or absent, and v_j in R^{k x c}
acts on the last axis. Everything else (gates, gradients, adjoints, solver, certificate, module) is generic.

A *form* evaluates the unit features M o hidden -> values for one activation and pooling. The architecture
itself is the plain form, straight from the definition; ``reductions`` names cheaper forms with the same outputs
and the same norms (THEORY: lossless pooling reductions), which tests hold against the plain one.

Shapes: n samples, s tokens, d features, c outputs, m units, P gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from convexheads.errors import InputError, describe
from convexheads.products import add_product, narrow_product

Stats = tuple[Tensor, ...]
Pullback = Callable[[Tensor], Tensor]
"""Cotangent of unit features -> cotangent of the mixing weights (m, *u_shape)."""

NARROW = 16
"""Columns below which a product takes about as long as one of so many."""

ARCHITECTURES: dict[str, type[Architecture]] = {}


def register(cls: type[Architecture]) -> type[Architecture]:
    """Make an architecture known by its ``name``; this also enrols it in the contract tests."""
    ARCHITECTURES[cls.name] = cls
    return cls


def architecture_class(name: str) -> type[Architecture]:
    """The architecture registered under ``name``; raises InputError for an unknown one."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError("head: " + describe(repr(name), "one of " + ", ".join(sorted(ARCHITECTURES))))
    return ARCHITECTURES[name]


def by_feature(T: Tensor) -> bool:
    """Whether unit features (n, m, k) lie in memory as (n, k, m): to copy them would cost as much as products."""
    return T.stride(1) == 1 and T.stride(2) == T.shape[1] and not T.is_contiguous()


def outer_sum(T: Tensor, L: Tensor, total: Tensor | None) -> Tensor:
    """sum_i T_i (x) L_i, added to ``total``: (r, k, c) from features T (n, r, k), or (n, s, r, k), and rows L of them.

    ``total`` is what this has returned for features that lie in memory like these.
    """
    # As they come, and L first: libraries copy a transposed first factor, and L is the smaller one.
    turned = T.ndim == 3 and by_feature(T)
    T = T.mT if turned else T
    a, b = T.shape[-2:]
    T = T.reshape(-1, a * b)
    order = (2, 1, 0) if turned else (1, 2, 0)
    if total is None:
        return (L.mT @ T).view(-1, a, b).permute(order)
    add_product(total.permute((2, 1, 0) if turned else (2, 0, 1)).view(-1, a * b), L.mT, T)
    return total


def features_by_gate(selected: Tensor, u: Tensor, gate: Tensor) -> Tensor:
    """<selected[:, gate_j], u_j> for every unit: (n, m, 1) from selected (n, P, p), u (m, p), gate (m,) ascending.

    One product a gate costs P times less than one masked product for all units.
    """
    return torch.cat([selected[:, g] @ u[own].mT for g, own in gate_groups(gate)], 1)[..., None]


def features_by_gate_adjoint(selected: Tensor, cotangent: Tensor, gate: Tensor) -> Tensor:
    """The adjoint of :func:`features_by_gate` in u: (m, p) from a cotangent (n, m, 1)."""
    return torch.cat([cotangent[:, own, 0].mT @ selected[:, g] for g, own in gate_groups(gate)])


def gated_forms(selected: Tensor, u: Tensor, gate: Tensor, X: Tensor) -> Tensor:
    """selected[g_j]_r^T u_j x_r for every row r and unit j: (n, r, m).

    selected (n, P, r, a), u (m, a, k), gate (m,) ascending, X (n, r, k) with rows x_r.
    """
    n, r, width = X.shape
    parts = []
    for g, own in gate_groups(gate):
        # One large product for all units of a gate, then dot products with what the gate selects.
        images = X.reshape(n * r, width) @ u[own].reshape(-1, width).mT
        parts.append((images.view(n, r, -1, u.shape[1]) @ selected[:, g, :, :, None])[..., 0])
    return torch.cat(parts, 2)


def gated_forms_adjoint(selected: Tensor, cotangent: Tensor, gate: Tensor, X: Tensor) -> Tensor:
    """The adjoint of :func:`gated_forms` in u: sum of cotangent[r, j] selected[g_j]_r x_r^T, (m, a, k)."""
    n, r, width = X.shape
    rows = X.reshape(n * r, width)
    parts = []
    for g, own in gate_groups(gate):
        weighted = cotangent[..., own, None] * selected[:, g, :, None]
        parts.append((weighted.reshape(n * r, -1).mT @ rows).view(-1, selected.shape[-1], width))
    return torch.cat(parts)


def _ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of one of inference mode, which can take part in no derivative."""
    return tensor.clone() if tensor.is_inference() else tensor


def gate_groups(gate: Tensor) -> Iterator[tuple[int, slice]]:
    """Each gate with the slice of its units; gate (m,) ascending."""
    index, counts = torch.unique_consecutive(gate, return_counts=True)
    start = 0
    for g, count in zip(index.tolist(), counts.tolist(), strict=True):
        yield g, slice(start, start + count)
        start += count


class Architecture:
    """Base of all heads, and their plain form.

    Parameters
    ----------
    tokens, features, outputs : sizes s, d and c.
    pooled : True if the s output rows are averaged.
    grid : (h, w) with h * w = s, for heads that know token neighbourhoods; None for a sequence.
    n_blocks : number of channel groups, for heads that split channels.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    """Which of ``grid`` and ``n_blocks`` this head uses; giving another one is an error."""
    ridge: ClassVar[bool] = False
    """True for a head without mixing weights: penalty (beta/2) ||v||_F^2 instead of a nuclear norm."""
    reductions: ClassVar[dict[tuple[str, bool], type[Architecture]]] = {}
    """(activation, pooled) -> a cheaper form with the same outputs and norms."""
    joint: ClassVar[bool] = False
    """True for a form with :meth:`joint_adjoint`: what its gates select shares most of the work."""
    outer_gradients: ClassVar[bool] = False
    """True for a form with :meth:`outer_gradient`: a sample's gradient in u_j, seen as ``u_matrix``, has rank one."""
    products_only: ClassVar[bool] = False
    """True for a form whose evaluation is large matrix products throughout, which low precision makes faster."""
    spaced_cotangents: ClassVar[bool] = False
    """True for a form whose pullback is as fast where a cotangent's samples lie apart in memory."""
    rectified: ClassVar[bool] = False
    """True for the form of ReLU units, each masked by its own sign: positively homogeneous in u, not linear."""

    def __init__(
        self,
        tokens: int,
        features: int,
        outputs: int,
        pooled: bool = True,
        grid: tuple[int, int] | None = None,
        n_blocks: int = 1,
    ) -> None:
        self.tokens, self.features, self.outputs = tokens, features, outputs
        self.pooled, self.grid, self.n_blocks = pooled, grid, n_blocks
        if grid is not None and grid[0] * grid[1] != tokens:
            raise InputError(
                "grid: "
                + describe(
                    f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]} tokens",
                    f"h * w = s = {tokens}, the number of tokens of X",
                    "Pass grid=None for a one-dimensional sequence.",
                )
            )

    @property
    def u_shape(self) -> tuple[int, ...]:
        """Shape of one mixing weight."""
        raise NotImplementedError

    @property
    def value_width(self) -> int:
        """k, the number of features of one unit that v acts on."""
        raise NotImplementedError

    @property
    def workspace(self) -> int:
        """Numbers held at once for one unit and one sample; decides how many samples are taken at a time."""
        return self.tokens * (self.tokens + self.features)

    @property
    def unit_work(self) -> int:
        """Multiplications that the features of one unit take on one sample, about: steers choices of method."""
        p = prod(self.u_shape)
        return max(p, self.workspace)

    @property
    def u_matrix(self) -> tuple[int, int]:
        """Sizes (a, b) with a * b = p in which u is seen as a matrix by Kronecker-factored preconditioners."""
        shape = self.u_shape
        return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)

    @property
    def groups(self) -> list[tuple[slice, slice]]:
        """(input channels, outputs) of each independent channel group; one group unless overridden."""
        return [(slice(0, self.features), slice(0, self.outputs))]

    def hidden(self, X: Tensor, u: Tensor) -> Tensor:
        """pre(X, u) for every sample and unit: X (n, s, d), u (m, *u_shape) -> (n, m, *hidden shape)."""
        raise NotImplementedError

    def values(self, X: Tensor, H: Tensor) -> Tensor:
        """What v acts on: X (n, s, d), H (n, m, *hidden shape) -> (n, m, s, k)."""
        raise NotImplementedError

    def form(self, activation: str) -> Architecture:
        """The cheapest form for this activation; the same object where there is no reduction."""
        reduced = self.reductions.get((activation, self.pooled))
        if reduced is None:
            return self
        return reduced(self.tokens, self.features, self.outputs, self.pooled, self.grid, self.n_blocks)

    def masks(self, X: Tensor, gates: Tensor) -> Tensor:
        """1[hidden(X, h) >= 0] for each gate h: (n, P, *hidden shape), boolean.

        Evaluated in float64: a sign that depends on rounding would give the network another mask than the
        certificate.
        """
        return self.hidden(X.double(), gates.double()) >= 0

    def prepare(self, X: Tensor, gates: Tensor | None) -> Stats:
        """Per-sample tensors (first axis n) that ``unit_features`` needs; computed once, kept if they fit."""
        return (X,) if gates is None else (X, self.masks(X, gates))

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        """Features that v acts on, linear in u (of a rectified form: in |u| only).

        u (m, *u_shape), gate (m,) the gate of each unit -> (n, m, k) pooled, (n, s, m, k) token-level; pooled ones
        may lie in memory feature by feature (:func:`by_feature`), and then a cotangent of them comes that way, too.
        """
        H = self.hidden(stats[0], u)
        if gate is not None:
            H = H * stats[1][:, gate]
        T = self.values(stats[0], H)
        return T.mean(2) if self.pooled else T.transpose(1, 2)

    def features_and_pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> tuple[Tensor, Pullback]:
        """``unit_features``, and the adjoint of their derivative in u: a cotangent of their shape -> one of u's shape.

        By :meth:`pullback`, else by automatic differentiation.
        """
        pull = self.pullback(stats, u, gate)
        if pull is not None:
            return self.unit_features(stats, u, gate), pull
        with torch.inference_mode(False), torch.enable_grad():
            variable = _ordinary(u).detach().requires_grad_()
            index = None if gate is None else _ordinary(gate)
            T = self.unit_features(tuple(map(_ordinary, stats)), variable, index)

        def differentiated(cotangent: Tensor) -> Tensor:
            with torch.inference_mode(False):
                return torch.autograd.grad(T, variable, cotangent)[0]

        return T.detach(), differentiated

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback | None:
        """The adjoint of the derivative of ``unit_features`` in u without any features of u; None where there is none.

        Override in pooled forms where explicit products are cheaper than automatic differentiation.
        """
        return None

    def sample_gradients(self, stats: Stats, u: Tensor, gate: Tensor | None, cotangent: Tensor) -> Tensor:
        """Every sample's own gradient of <unit features, cotangent> in u: (n, m, *u_shape).

        ``cotangent`` has the entries of the unit features. Override where there is a cheaper way.
        """

        if self.outer_gradients:
            x, w = self.outer_gradient(stats, cotangent.reshape(len(cotangent), len(u), -1))
            return (x[:, None, :, None] * w[:, :, None]).view(len(x), *u.shape)
        index = None if gate is None else _ordinary(gate)

        def features(stat: Stats, weights: Tensor) -> Tensor:
            return self.unit_features(tuple(t[None] for t in stat), weights, index)[0]

        with torch.inference_mode(False):
            # One copy of u a sample: the gradient with respect to the copies is that of every sample by itself.
            copies = _ordinary(u).expand(len(stats[0]), *u.shape).detach().requires_grad_()
            with torch.enable_grad():
                T = torch.vmap(features)(tuple(map(_ordinary, stats)), copies)
            (found,) = torch.autograd.grad(T, copies, cotangent.view(T.shape))
        return found

    def outer_gradient(self, stats: Stats, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, a) and w (n, m, b): :meth:`sample_gradients` of unit j is x w_j^T where ``outer_gradients`` says so."""
        raise NotImplementedError

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        """``unit_features`` of the unit vectors e_rows of u's space: override where that is cheaper."""
        p = prod(self.u_shape)
        start, stop, _ = rows.indices(p)
        basis = torch.zeros(stop - start, p, dtype=stats[0].dtype, device=stats[0].device)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        index = None if gate is None else torch.full((stop - start,), gate, device=basis.device)
        return self.unit_features(stats, basis.view(-1, *self.u_shape), index)

    @property
    def row_step(self) -> int:
        """How many rows of u's space :meth:`distinct_features` takes together: slices are multiples of it."""
        return 1

    @property
    def distinct_width(self) -> float:
        """Numbers of :meth:`distinct_features` for each row of u's space, on average."""
        return self.value_width

    def distinct_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        """``basis_features`` without what repeats in them: (n, r, k) pooled, (n, s, r, k) token-level, r, k smaller."""
        return self.basis_features(stats, rows, gate)

    @property
    def adjoint_size(self) -> float:
        """Numbers that :meth:`distinct_adjoint` holds for each sample where it is asked for all rows of u's space."""
        p = prod(self.u_shape)
        return p * self.distinct_width * (1 if self.pooled else self.tokens)

    def distinct_adjoint(self, stats: Stats, L: Tensor, gate: int | None, rows: slice, total: Tensor | None) -> Tensor:
        """sum_i T_i (x) L_i of the distinct features T and rows L (n, c) or (n s, c), added to ``total``: (r, k, c)."""
        return outer_sum(self.distinct_features(stats, rows, gate), L, total)

    def spread(self, adjoint: Tensor) -> Tensor:
        """What :meth:`distinct_adjoint` sums up -> (rows, k, c), the same for each of ``basis_features``."""
        return adjoint

    @property
    def block_work(self) -> float:
        """Multiplications a sample that :meth:`block_outputs` and its adjoint take, about; infinite without them."""
        return math.inf

    @property
    def block_workspace(self) -> int:
        """Numbers that these hold at once for one sample."""
        return self.outputs

    def block_weights(self, Z: Tensor) -> Tensor:
        """A block Z (p, k, c) as :meth:`block_outputs` takes it."""
        raise NotImplementedError

    def block_stats(self, stats: Stats) -> Stats:
        """What :meth:`block_outputs` and :meth:`block_adjoint` take of a chunk's statistics."""
        return stats

    def block_outputs(self, stats: Stats, weights: Tensor) -> Tensor:
        """A(Z) = sum_e T(e) Z[e] over the unit vectors e of u's space: (n, c); pooled forms without gates only.

        Override it, and ``block_work``, where it and its adjoint are a few products.
        """
        raise NotImplementedError

    def block_adjoint(self, stats: Stats, L: Tensor, total: Tensor | None) -> Tensor:
        """:meth:`distinct_adjoint` for all rows of u's space, from :meth:`block_stats`."""
        return self.distinct_adjoint(stats, L, None, slice(0, prod(self.u_shape)), total)

    def joint_adjoint(self, stats: Stats, L: Tensor) -> Tensor:
        """Gamma_g[e] = sum_i T_i(e)^T L_i of all gates at once, L (n, c) -> (P, p, k c); only where ``joint``."""
        raise NotImplementedError

    def lift(self, u: Tensor) -> Tensor:
        """Mixing weights (m, *u_shape) of this form -> those of the plain form, same outputs and norms."""
        return u

    def reduce(self, u: Tensor) -> Tensor:
        """Adjoint of :meth:`lift`: mixing weights (m, *plain u_shape) -> those of this form, same outputs.

        Norms do not grow, because ``lift`` is an isometry.
        """
        return u


class VectorForm(Architecture):
    """Pooled form whose statistics are one vector x a sample: T(u) = <x, u>, and A(Z) = x^T Z."""

    @property
    def value_width(self) -> int:
        return 1

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        return (stats[0] @ u.mT)[..., None]

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback:
        return lambda cotangent: cotangent[..., 0].mT @ stats[0]

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        return stats[0][:, rows, None]

    @property
    def block_work(self) -> float:
        return 2 * prod(self.u_shape) * max(self.outputs, NARROW)

    def block_weights(self, Z: Tensor) -> Tensor:
        return Z[:, 0]

    def block_outputs(self, stats: Stats, weights: Tensor) -> Tensor:
        return narrow_product(stats[0], weights)


class GatedVectorForm(Architecture):
    """Pooled form whose statistics are one vector a sample and gate, (n, P, p): T(u_j) = <x_{g_j}, u_j>."""

    @property
    def value_width(self) -> int:
        return 1

    def unit_features(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return features_by_gate(stats[0], u, gate)

    def pullback(self, stats: Stats, u: Tensor, gate: Tensor | None) -> Pullback:
        assert gate is not None
        return lambda cotangent: features_by_gate_adjoint(stats[0], cotangent, gate)

    def basis_features(self, stats: Stats, rows: slice, gate: int | None) -> Tensor:
        return stats[0][:, gate, rows, None]
