"""Losses: value, gradient, curvature and convex conjugate.

A loss is f(O) = sum_i a_i l(o_i, y_i) over samples i with weights a_i >= 0 that sum to one. Outputs ``O`` and
targets ``Y`` have shape (n, c), or (n, s, c) for token-level outputs, whose tokens are summed within a sample;
weights ``a`` have shape (n,). ``L`` denotes a dual point of the shape of ``O``; L = gradient(O) is the one that
certificates start from, and L_i / a_i the argument of the conjugate l* of one sample.

To add a loss: subclass :class:`Loss`, fill in the per-entry methods, decorate it with :func:`register`; the
contract tests then check the gradient, the curvature and Fenchel-Young by themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from convexheads.distributed import World
from convexheads.errors import InputError, describe

LOSSES: dict[str, type[Loss]] = {}
PART = 2**19
"""Numbers that the conjugate is taken of at a time: its temporaries would be several times as large as the outputs."""


def register(cls: type[Loss]) -> type[Loss]:
    """Make a loss known by its ``name``; this also enrols it in the contract tests."""
    LOSSES[cls.name] = cls
    return cls


def make_loss(name: str) -> Loss:
    """The loss registered under ``name``; raises InputError for an unknown one."""
    if not isinstance(name, str) or name not in LOSSES:
        raise InputError("loss: " + describe(repr(name), "one of " + ", ".join(sorted(LOSSES))))
    return LOSSES[name]()


def _expand(weights: Tensor, outputs: Tensor) -> Tensor:
    return weights.to(outputs.dtype).reshape(-1, *[1] * (outputs.ndim - 1))


def _weighted_sum(entries: Tensor, weights: Tensor) -> float:
    """sum_i a_i of the entries (n,) or (n, s), in float64."""
    exact = entries.double()
    return float((exact if exact.ndim == 1 else exact.flatten(1).sum(1)) @ weights.double())


def _weighted_parts(L: Tensor, Y: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Samples whose weight is not zero, with targets and weights, in parts whose temporaries stay small."""
    step = max(1, PART // max(1, L[:1].numel()))
    for own, y, w in zip(L.split(step), Y.split(step), a.split(step), strict=True):
        used = w > 0
        if not bool(used.all()):
            own, y, w = own[used], y[used], w[used]
        if len(w):
            yield own, y, w


class Loss(ABC):
    """A convex loss of the outputs of one token or one pooled sample, weighted and summed."""

    name: str
    constant_curvature: bool = False
    """True if the Hessian of l is the same everywhere."""
    shift_free: bool = False
    """True if l(o + t 1) = l(o) for every t, up to a multiple of t."""

    @abstractmethod
    def entry_value(self, O: Tensor, Y: Tensor) -> Tensor:
        """l(o, y), shape of ``O`` without the last axis."""

    @abstractmethod
    def entry_gradient(self, O: Tensor, Y: Tensor) -> Tensor:
        """Gradient of l with respect to o, shape of ``O``."""

    @abstractmethod
    def entry_hessian_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        """Hessian of l at o times ``D``, shape of ``O``."""

    @abstractmethod
    def hessian_root_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        """R D with R R^T the Hessian of l at o, shape of ``O``: turns white noise into Hessian noise."""

    @abstractmethod
    def mean_hessian(self, O: Tensor, Y: Tensor, a: Tensor) -> Tensor:
        """sum_i a_i of the Hessians (c, c), over tokens too: what preconditioners use."""

    @abstractmethod
    def entry_curvature(self, O: Tensor, Y: Tensor) -> Tensor:
        """Diagonal of the Hessian of l at o, shape of ``O``."""

    @abstractmethod
    def entry_conjugate(self, G: Tensor, Y: Tensor) -> Tensor:
        """l*(g) = sup_o <g, o> - l(o, y), shape of ``G`` without the last axis; g in the domain."""

    @abstractmethod
    def entry_max_scale(self, G: Tensor, Y: Tensor) -> Tensor:
        """Largest alpha such that alpha g stays in the domain of l* (infinite where unbounded)."""

    def entry_project(self, G: Tensor, Y: Tensor) -> Tensor:
        """``G`` with rounding errors outside the domain of l* removed."""
        return G

    def value(self, O: Tensor, Y: Tensor, a: Tensor) -> float:
        """f(O), summed in float64 whatever the dtype of ``O``."""
        return _weighted_sum(self.entry_value(O, Y), a)

    def gradient(self, O: Tensor, Y: Tensor, a: Tensor) -> Tensor:
        """Gradient of f, shape of ``O``."""
        return self.entry_gradient(O, Y) * _expand(a, O)

    def value_and_gradient(self, O: Tensor, Y: Tensor, a: Tensor) -> tuple[float, Tensor]:
        """f(O) and its gradient; losses whose value and gradient have work in common do it once."""
        return self.value(O, Y, a), self.gradient(O, Y, a)

    def best_constant(self, mean: Tensor) -> Tensor | None:
        """The b (c,) that minimises f(1 b^T) for targets of weighted mean ``mean`` (c,).

        None where no finite b does, or where a loss has no closed form to start from.
        """
        return None

    def hessian_product(self, O: Tensor, Y: Tensor, a: Tensor, D: Tensor) -> Tensor:
        """Hessian of f at ``O`` times ``D``, shape of ``O``."""
        return self.entry_hessian_product(O, Y, D) * _expand(a, O)

    def conjugate(self, L: Tensor, Y: Tensor, a: Tensor, scale: float = 1.0) -> float:
        """f*(scale L), with f*(L) = sum_i a_i l*(L_i / a_i); samples of weight zero must have L_i = 0."""
        return sum((self._conjugate(scale * own, *rest) for own, *rest in _weighted_parts(L, Y, a)), 0.0)

    def _conjugate(self, L: Tensor, Y: Tensor, a: Tensor) -> float:
        G = self.entry_project(L / _expand(a, L), Y)
        return _weighted_sum(self.entry_conjugate(G, Y), a)

    def max_scale(self, L: Tensor, Y: Tensor, a: Tensor) -> float:
        """Largest alpha with alpha L in the domain of f*."""
        parts = _weighted_parts(L, Y, a)
        return min(float(self.entry_max_scale(own / _expand(w, own), y).min()) for own, y, w in parts)


@register
class CrossEntropy(Loss):
    """Softmax cross-entropy with target distributions: l(o, t) = logsumexp(o) - <t, o>.

    A hard label is the distribution with all its mass on one class; label smoothing and mixup give soft ones.
    l*(g) = sum_k r_k log r_k with r = g + t in the simplex.
    """

    name = "cross_entropy"
    shift_free = True

    def entry_value(self, O: Tensor, Y: Tensor) -> Tensor:
        # Targets sum to one: this is logsumexp(o) - <t, o> without its cancellation.
        return -torch.linalg.vecdot(Y, torch.log_softmax(O, -1))

    def entry_gradient(self, O: Tensor, Y: Tensor) -> Tensor:
        return torch.softmax(O, -1) - Y

    def value_and_gradient(self, O: Tensor, Y: Tensor, a: Tensor) -> tuple[float, Tensor]:
        log_p = torch.log_softmax(O, -1)
        value = -_weighted_sum(torch.linalg.vecdot(Y, log_p), a)
        return value, log_p.exp_().sub_(Y).mul_(_expand(a, O))

    def best_constant(self, mean: Tensor) -> Tensor | None:
        return mean.log() if bool((mean > 0).all()) else None

    def entry_hessian_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        p = torch.softmax(O, -1)
        return p * (D - (p * D).sum(-1, keepdim=True))

    def hessian_root_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        # R = diag(sqrt p) - p sqrt(p)^T, because R R^T = diag(p) - p p^T for p in the simplex.
        p = torch.softmax(O, -1)
        root = p.sqrt()
        return root * D - p * (root * D).sum(-1, keepdim=True)

    def entry_curvature(self, O: Tensor, Y: Tensor) -> Tensor:
        p = torch.softmax(O, -1)
        return p * (1 - p)

    def mean_hessian(self, O: Tensor, Y: Tensor, a: Tensor) -> Tensor:
        p = torch.softmax(O, -1)
        weighted = (p * _expand(a, O)).reshape(-1, O.shape[-1])
        return torch.diag(weighted.sum(0)) - weighted.mT @ p.reshape(-1, O.shape[-1])

    def entry_conjugate(self, G: Tensor, Y: Tensor) -> Tensor:
        r = (G + Y).clamp_min(0.0)
        return torch.special.xlogy(r, r).sum(-1)

    def entry_max_scale(self, G: Tensor, Y: Tensor) -> Tensor:
        # r = alpha g + t >= 0 binds only where g < 0.
        bound = torch.where(G < 0, -Y / G.clamp_max(-torch.finfo(G.dtype).tiny), torch.inf)
        return bound.amin(-1).reshape(len(G), -1).amin(1)

    def entry_project(self, G: Tensor, Y: Tensor) -> Tensor:
        # softmax sums to one up to rounding only: keep r = g + t in the simplex.
        r = (G + Y).clamp_min(0.0)
        return r / r.sum(-1, keepdim=True) - Y


@register
class Squared(Loss):
    """Half the squared distance: l(o, y) = (1/2) ||o - y||^2, l*(g) = (1/2) ||g||^2 + <g, y>."""

    name = "squared"
    constant_curvature = True

    def entry_value(self, O: Tensor, Y: Tensor) -> Tensor:
        return 0.5 * (O - Y).square().sum(-1)

    def entry_gradient(self, O: Tensor, Y: Tensor) -> Tensor:
        return O - Y

    def entry_hessian_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        return D

    def hessian_root_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        return D

    def entry_curvature(self, O: Tensor, Y: Tensor) -> Tensor:
        return torch.ones_like(O)

    def mean_hessian(self, O: Tensor, Y: Tensor, a: Tensor) -> Tensor:
        tokens = O[0, ..., 0].numel()
        total = float(a.double().sum()) * tokens
        return total * torch.eye(O.shape[-1], dtype=O.dtype, device=O.device)

    def best_constant(self, mean: Tensor) -> Tensor | None:
        return mean

    def entry_conjugate(self, G: Tensor, Y: Tensor) -> Tensor:
        return (0.5 * G * G + G * Y).sum(-1)

    def entry_max_scale(self, G: Tensor, Y: Tensor) -> Tensor:
        return torch.full((len(G),), torch.inf, dtype=G.dtype, device=G.device)


@register
class MultiLabelLogistic(Loss):
    """One logistic loss a class, for labels that may hold together: y in [0, 1]^c.

    l(o, y) = sum_k log(1 + exp(o_k)) - y_k o_k; l*(g) = sum_k r_k log r_k + (1 - r_k) log(1 - r_k) with
    r = g + y in [0, 1].
    """

    name = "multilabel_logistic"

    def entry_value(self, O: Tensor, Y: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(O) - Y * O).sum(-1)

    def entry_gradient(self, O: Tensor, Y: Tensor) -> Tensor:
        return torch.sigmoid(O) - Y

    def entry_hessian_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        p = torch.sigmoid(O)
        return p * (1 - p) * D

    def hessian_root_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        p = torch.sigmoid(O)
        return (p * (1 - p)).sqrt() * D

    def entry_curvature(self, O: Tensor, Y: Tensor) -> Tensor:
        p = torch.sigmoid(O)
        return p * (1 - p)

    def mean_hessian(self, O: Tensor, Y: Tensor, a: Tensor) -> Tensor:
        p = torch.sigmoid(O)
        return torch.diag((p * (1 - p) * _expand(a, O)).reshape(-1, O.shape[-1]).sum(0))

    def best_constant(self, mean: Tensor) -> Tensor | None:
        return mean.logit() if bool(((mean > 0) & (mean < 1)).all()) else None

    def entry_conjugate(self, G: Tensor, Y: Tensor) -> Tensor:
        r = (G + Y).clamp(0.0, 1.0)
        return (torch.special.xlogy(r, r) + torch.special.xlogy(1 - r, 1 - r)).sum(-1)

    def entry_max_scale(self, G: Tensor, Y: Tensor) -> Tensor:
        tiny = torch.finfo(G.dtype).tiny
        below = torch.where(G < 0, -Y / G.clamp_max(-tiny), torch.inf)
        above = torch.where(G > 0, (1 - Y) / G.clamp_min(tiny), torch.inf)
        return torch.minimum(below, above).reshape(len(G), -1).amin(1)

    def entry_project(self, G: Tensor, Y: Tensor) -> Tensor:
        return (G + Y).clamp(0.0, 1.0) - Y


class SharedLoss(Loss):
    """A loss of samples that are spread over workers: what is summed over samples is summed over all of them.

    Every worker must ask for the same totals in the same order, each for its own samples.
    """

    def __init__(self, own: Loss, world: World) -> None:
        self.name, self.own, self.world = own.name, own, world
        self.constant_curvature, self.shift_free = own.constant_curvature, own.shift_free

    def entry_value(self, O: Tensor, Y: Tensor) -> Tensor:
        return self.own.entry_value(O, Y)

    def entry_gradient(self, O: Tensor, Y: Tensor) -> Tensor:
        return self.own.entry_gradient(O, Y)

    def entry_hessian_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        return self.own.entry_hessian_product(O, Y, D)

    def hessian_root_product(self, O: Tensor, Y: Tensor, D: Tensor) -> Tensor:
        return self.own.hessian_root_product(O, Y, D)

    def entry_curvature(self, O: Tensor, Y: Tensor) -> Tensor:
        return self.own.entry_curvature(O, Y)

    def entry_conjugate(self, G: Tensor, Y: Tensor) -> Tensor:
        return self.own.entry_conjugate(G, Y)

    def entry_max_scale(self, G: Tensor, Y: Tensor) -> Tensor:
        return self.own.entry_max_scale(G, Y)

    def entry_project(self, G: Tensor, Y: Tensor) -> Tensor:
        return self.own.entry_project(G, Y)

    def best_constant(self, mean: Tensor) -> Tensor | None:
        return self.own.best_constant(mean)

    def mean_hessian(self, O: Tensor, Y: Tensor, a: Tensor) -> Tensor:
        return self.world.sum(self.own.mean_hessian(O, Y, a))

    def value(self, O: Tensor, Y: Tensor, a: Tensor) -> float:
        return self.world.total(self.own.value(O, Y, a))

    def value_and_gradient(self, O: Tensor, Y: Tensor, a: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.own.value_and_gradient(O, Y, a)
        return self.world.total(value), gradient

    def conjugate(self, L: Tensor, Y: Tensor, a: Tensor, scale: float = 1.0) -> float:
        return self.world.total(self.own.conjugate(L, Y, a, scale))

    def max_scale(self, L: Tensor, Y: Tensor, a: Tensor) -> float:
        # A worker whose samples all have weight zero has nothing to say.
        own = self.own.max_scale(L, Y, a) if bool((a > 0).any()) else float("inf")
        return float(self.world.least(torch.tensor([own], dtype=torch.float64))[0])
