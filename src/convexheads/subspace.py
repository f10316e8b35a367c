"""Leading singular pairs of all blocks at once, matrix-free, and beta_max.

Subspace iteration with the adjoint applied from both sides; every value is a Rayleigh quotient, hence a lower bound
of the true one: good for steering a solver, never for a claim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convexheads.problem import Problem
from convexheads.spectral import largest_singular_value
from convexheads.types import Units

DENSE_WORK = 3e11
"""Floating-point operations up to which beta_max forms every Gamma."""


@dataclass(frozen=True)
class SingularPair:
    """sigma, u (p,) and v (q,) with Gamma_g v = sigma u, of a component's gate."""

    component: int
    gate: int | None
    sigma: float
    u: Tensor
    v: Tensor


class BlockSubspace:
    """Subspace iteration that remembers its vectors, so that the next dual point starts from them."""

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        self.problem, self.generator = problem, generator
        self.top: dict[tuple[int, int | None], Tensor] = {}

    def top_pairs(
        self, L: Tensor, size: int = 4, rounds: int = 6, tol: float = 1e-4
    ) -> tuple[float, list[SingularPair], float]:
        """Leading singular pairs of every Gamma_g = A_g^* L, from below.

        Returns max_g sigma_g / w_g, the pairs with sigma > beta w_g, and the ridge branches'
        sum ||A_h^* L||_F^2 / (2 beta w_h). Stops when sigma grows by less than ``tol`` relative.
        """
        problem = self.problem
        dtype = L.dtype
        units, owners = [], []
        for k, component in enumerate(problem.components):
            if component.ridge:
                shape = (1, component.form.value_width, component.width)
                units.append(Units(None, torch.zeros(shape, dtype=dtype, device=problem.device)))
                owners.append([])
                continue
            width = min(size, component.p, component.q)
            starts = []
            for g in problem.gates_of(k):
                v = self.top.get((k, g))
                fresh = torch.randn(component.q, width, generator=self.generator, dtype=torch.float64)
                fresh = fresh.to(problem.device, dtype)
                v = fresh if v is None else torch.cat([v.to(dtype), fresh], 1)[:, :width]
                starts.append(torch.linalg.qr(v).Q.mT)
            m = width * component.n_gates
            gate = None
            if component.gates is not None:
                gate = torch.arange(component.n_gates, device=problem.device).repeat_interleave(width)
            v = torch.cat(starts).view(m, component.form.value_width, component.width)
            u = torch.zeros(m, *component.form.u_shape, dtype=dtype, device=problem.device)
            units.append(Units(u, v, gate))
            owners.append([width] * component.n_gates)
        previous = 0.0
        for _ in range(rounds):
            self._orthonormal_u(units, owners, problem.adjoint(L, units))
            back = problem.adjoint(L, units)
            sigma, pairs = self._rayleigh(units, owners, back)
            if sigma <= previous * (1 + tol):
                break
            previous = sigma
        ridge = sum(
            float(b.v.double().square().sum()) / (2 * problem.penalty_weight(c))
            for c, b in zip(problem.components, back, strict=True)
            if c.ridge
        )
        return sigma, pairs, ridge

    def _orthonormal_u(self, units: list[Units], owners: list[list[int]], applied: list[Units]) -> None:
        for each, sizes, image in zip(units, owners, applied, strict=True):
            if each.u is None or image.u is None:
                continue
            blocks = image.u.flatten(1).split(sizes)
            each.u = torch.cat([torch.linalg.qr(b.mT).Q.mT for b in blocks]).view_as(each.u)

    def _rayleigh(
        self, units: list[Units], owners: list[list[int]], back: list[Units]
    ) -> tuple[float, list[SingularPair]]:
        """Singular values within the subspaces; rotates the units to them."""
        best, pairs = 0.0, []
        for k, (component, each, sizes, image) in enumerate(
            zip(self.problem.components, units, owners, back, strict=True)
        ):
            if each.u is None:
                continue
            new_u, new_v = [], []
            for g, (u, gv) in enumerate(
                zip(each.u.flatten(1).split(sizes), image.v.flatten(1).split(sizes), strict=True)
            ):
                # Rows of gv are Gamma^T u_i: gv = A diag(sigma) B^T gives singular pairs (A^T u, B).
                A, sigma, Bt = torch.linalg.svd(gv, full_matrices=False)
                gate = None if component.gates is None else g
                left = A.mT @ u
                self.top[k, gate] = Bt.mT
                best = max(best, float(sigma[0]) / component.weight)
                bound = self.problem.penalty_weight(component)
                pairs += [SingularPair(k, gate, s, left[i], Bt[i]) for i, s in enumerate(sigma.tolist()) if s > bound]
                new_u.append(left)
                new_v.append(Bt)
            each.u = torch.cat(new_u).view_as(each.u)
            each.v = torch.cat(new_v).view_as(each.v)
        return best, pairs


def beta_max(problem: Problem) -> float:
    """Smallest beta for which the empty head is optimal: max_g sigma_max(A_g^* grad f(O_0)) / w_g.

    A head of ridge branches only has no such beta; then the beta is returned at which the outputs of its first-order
    solution W = -A^* grad f(O_0) / beta have a root mean square of one, which scales in the same way.
    """
    O, _ = problem.null_outputs()
    targets, weights = problem.targets_of(slice(0, problem.n), torch.float64)
    L = problem.loss.gradient(O, targets, weights)
    nuclear = [k for k, component in enumerate(problem.components) if not component.ridge]
    if not nuclear:
        return max(ridge_scale(problem, L, k) / c.weight for k, c in enumerate(problem.components))
    work = sum(
        2.0 * problem.n * problem.components[k].p * problem.components[k].q * problem.components[k].n_gates
        for k in nuclear
    )
    if work <= DENSE_WORK:
        return max(block_scale(problem, L, k) / problem.components[k].weight for k in nuclear)
    search = BlockSubspace(problem, torch.Generator().manual_seed(0))
    return search.top_pairs(L.to(problem.dtype), size=6, rounds=60, tol=1e-6)[0]


def branch_scale(problem: Problem, branch: int) -> float:
    """beta_max of one branch alone at weight one, the ridge scale for a ridge branch."""
    O, _ = problem.null_outputs()
    L = problem.loss.gradient(O, *problem.targets_of(slice(0, problem.n), torch.float64))
    own = [k for k, component in enumerate(problem.components) if component.branch == branch]
    return max((ridge_scale if problem.components[k].ridge else block_scale)(problem, L, k) for k in own)


def block_scale(problem: Problem, L: Tensor, k: int) -> float:
    """max_g sigma_max(A_g^* L) of one component."""
    return max(largest_singular_value(problem.gamma(L, k, g)).lower for g in problem.gates_of(k))


def ridge_scale(problem: Problem, L: Tensor, k: int) -> float:
    """Root mean square of A A^* L, the outputs of a unit gradient step of a ridge component."""
    component = problem.components[k]
    gradient = problem.gamma(L, k, None)
    total, count = 0.0, 0
    for _, stats in problem.chunks(problem.dtype, 1):
        step = Units(None, gradient[None].to(problem.dtype))
        rows = component.forward(component.features(stats[k], step), step.v)
        total += float(rows.double().square().sum())
        count += rows.numel()
    return (total / max(1, count)) ** 0.5
