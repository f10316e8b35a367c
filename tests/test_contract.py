"""One contract for every registered architecture, activation, loss and solver; enrolment is by registration."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from contract_cases import (
    CASES,
    DEFINITIONS,
    SMALL,
    TARGETS,
    Case,
    Setting,
    circulant,
    make_setting,
    make_targets,
    plain_units,
    random_units,
    reference_outputs,
)
from convexheads import ConvexHeadClassifier, ConvexHeadRegressor, load, losses
from convexheads.architectures import ARCHITECTURES
from convexheads.certificate import bound_sigma, certify_factors, dual_point, penalty, refit_intercept
from convexheads.errors import InputError
from convexheads.gates import ACTIVATIONS
from convexheads.heads import ConvexHead, attach, canonical_blocks, export_onnx
from convexheads.losses import LOSSES, make_loss
from convexheads.problem import Problem
from convexheads.solvers import SOLVERS, Solution, fista, solver_function
from convexheads.solvers.polish import polish
from convexheads.subspace import beta_max, branch_scale
from convexheads.types import Factors, Units

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_head = pytest.mark.parametrize("case", SMALL, ids=str)
every_loss = pytest.mark.parametrize("name", sorted(LOSSES))
every_solver = pytest.mark.parametrize("solver", sorted(SOLVERS))
# Baselines train the non-convex network: what they return is certified, but need not be optimal.
OPTIMAL = sorted(name for name, solver in SOLVERS.items() if solver.promises_tol)
optimal_solver = pytest.mark.parametrize("solver", OPTIMAL)
baseline = pytest.mark.parametrize("solver", sorted(set(SOLVERS) - set(OPTIMAL)))


def sum_name(heads: Any) -> str:
    """A readable test id for a sum of heads."""
    return "+".join(map(str, heads)) if isinstance(heads, tuple) else str(heads)


# A sum of two attention-like branches with gates, and one of a nuclear and a ridge branch on other tokens.
SUMS = [
    (Case("self_attention", weight=2.5), Case("mlp", "gated_relu", weight=0.4), Case("linear", s=1, d=5, weight=3.0)),
    (Case("fno", "gated_relu", False, (2, 3)), Case("linear", pooled=False, weight=0.2)),
]
SETTINGS = [(case,) for case in CASES] + SUMS
every_setting = pytest.mark.parametrize("heads", SETTINGS, ids=sum_name)


def close(a: Any, b: Any, tol: float = 1e-10) -> None:
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol * max(1.0, float(np.abs(b).max(initial=0.0))))


def test_everything_registered_is_enrolled() -> None:
    assert set(DEFINITIONS) == set(ARCHITECTURES), "write the definition of a new head in contract_cases.py"
    assert set(TARGETS) == set(LOSSES), "say in contract_cases.py which targets a new loss takes"
    assert {case.head for case in CASES} == set(ARCHITECTURES)
    assert {case.activation for case in CASES} == set(ACTIVATIONS)
    assert len(FIXTURES) == 60


# --------------------------------------------------------------------------------------------------
# Architectures


def random_like(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_form(case: Case) -> Any:
    """The plain form of one channel group of the head."""
    return ARCHITECTURES[case.head](case.s, case.d, case.c, case.pooled, case.grid, case.n_blocks).form("")


with_hidden = pytest.mark.parametrize("case", [c for c in CASES if not ARCHITECTURES[c.head].ridge], ids=str)


@with_hidden
def test_hidden_and_values_are_linear(case: Case) -> None:
    form = plain_form(case)
    X = random_like((3, case.s, form.features), 0)
    u, w = random_like((2, 4, *form.u_shape), 1)
    close(form.hidden(X, 2.0 * u - 3.0 * w), 2.0 * form.hidden(X, u) - 3.0 * form.hidden(X, w))
    H = form.hidden(X, u)
    K = random_like(tuple(H.shape), 2)
    close(form.values(X, H - 2.0 * K), form.values(X, H) - 2.0 * form.values(X, K))


@every_setting
def test_outputs_are_bilinear_in_u_and_v(heads: tuple[Case, ...]) -> None:
    problem = make_setting(*heads).problem
    a, b = random_units(problem, seed=1), random_units(problem, seed=2)
    free = Factors(a.units), Factors(b.units)

    def outputs(us: Factors, vs: Factors) -> Tensor:
        units = [Units(x.u, y.v, x.gate) for x, y in zip(us.units, vs.units, strict=True)]
        return problem.forward(Factors(units))

    def mix(x: Factors, y: Factors, s: float, t: float) -> Factors:
        return x.like(s * x.flat() + t * y.flat())

    close(outputs(free[0], mix(*free, 2.0, -3.0)), 2.0 * outputs(free[0], free[0]) - 3.0 * outputs(free[0], free[1]))
    if all(each.u is not None for each in a.units):
        close(
            outputs(mix(*free, 2.0, -3.0), free[0]), 2.0 * outputs(free[0], free[0]) - 3.0 * outputs(free[1], free[0])
        )


@every_setting
def test_outputs_follow_the_definition(heads: tuple[Case, ...]) -> None:
    setting = make_setting(*heads)
    factors = random_units(setting.problem)
    assert factors.intercept is not None
    expected = reference_outputs(
        setting.branches, setting.tokens, plain_units(setting, factors), factors.intercept.numpy()
    )
    close(setting.problem.forward(factors), expected)
    single = make_setting(*heads)
    single.problem.cache_bytes = 0
    close(single.problem.forward(factors, cached=False), expected)
    close(single.problem.forward(factors.to(torch.float32), torch.float32), expected, 2e-5)


@every_case
def test_reduced_forms_equal_the_plain_form(case: Case) -> None:
    setting = make_setting(case)
    problem = setting.problem
    plain = Problem(
        [replace(component, form=plain_form(case)) for component in problem.components],
        problem.tokens,
        problem.loss,
        problem.targets,
        problem.weights,
        problem.beta,
        problem.fit_intercept,
        torch.float64,
    )
    factors = random_units(problem)
    lifted = Factors(plain_units(setting, factors)[0], factors.intercept)
    close(plain.forward(lifted), problem.forward(factors))
    assert plain.weight_decay(lifted) == pytest.approx(problem.weight_decay(factors), rel=1e-12)
    assert penalty(plain, lifted) == pytest.approx(penalty(problem, factors), rel=1e-10)
    # Any plain weights, not only lifted ones, have reduced ones of the same outputs and no larger norms.
    wild = random_units(plain, seed=2)
    reduced_units = [
        Units(None if each.u is None else component.form.reduce(each.u), each.v, each.gate)
        for component, each in zip(problem.components, wild.units, strict=True)
    ]
    reduced_wild = Factors(reduced_units, wild.intercept)
    close(problem.forward(reduced_wild), plain.forward(wild))
    assert problem.weight_decay(reduced_wild) <= plain.weight_decay(wild) * (1 + 1e-12)
    for component, each in zip(problem.components, factors.units, strict=True):
        if each.u is not None:
            close(component.form.reduce(component.form.lift(each.u)), each.u)
    L = random_like(tuple(problem.targets.shape), 3)
    for k in range(len(problem.components)):
        for gate in problem.gates_of(k):
            reduced = np.linalg.svd(problem.gamma(L, k, gate).numpy(), compute_uv=False)
            full = np.linalg.svd(plain.gamma(L, k, gate).numpy(), compute_uv=False)
            width = max(len(reduced), len(full))
            close(np.pad(reduced, (0, width - len(reduced))), np.pad(full, (0, width - len(full))))
    assert beta_max(plain) == pytest.approx(beta_max(problem), rel=1e-10)


@every_case
def test_channel_groups(case: Case) -> None:
    components = make_setting(case).problem.components
    assert len(components) == case.n_blocks
    for b, component in enumerate(components):
        for found, size in ((component.inputs, case.d), (component.outputs, case.c)):
            step = size // case.n_blocks
            assert (found.start, found.stop) == (b * step, (b + 1) * step)


@every_setting
def test_the_adjoint(heads: tuple[Case, ...]) -> None:
    """<A(Z), L> = <Z, A^* L>, by the dense Gamma and by the products with u and v."""
    problem = make_setting(*heads).problem
    factors = replace(random_units(problem), intercept=None)
    L = random_like(tuple(problem.targets.shape), 3)
    expected = float((problem.forward(factors) * L).sum())
    applied = problem.adjoint(L, factors.units)
    total = 0.0
    for k, (units, image) in enumerate(zip(factors.units, applied, strict=True)):
        for gate in problem.gates_of(k):
            gamma = problem.gamma(L, k, gate)
            if units.u is None:
                total += float((gamma * units.v[0]).sum())
                close(image.v[0], gamma)
                continue
            own = slice(None) if gate is None else units.gate == gate
            u, v = units.u[own].flatten(1), units.v[own].flatten(1)
            total += float((gamma * (u.mT @ v)).sum())
            close(image.v[own].flatten(1), u @ gamma)
            close(image.u[own].flatten(1), v @ gamma.mT)
    assert total == pytest.approx(expected, rel=1e-10)
    for side in ("left", "right"):
        for units, image, both in zip(
            factors.units, problem.adjoint(L, factors.units, sides=side), applied, strict=True
        ):
            if units.u is None:
                close(image.v, both.v)
                continue
            close(image.u, both.u if side == "left" else 0 * both.u)
            close(image.v, both.v if side == "right" else 0 * both.v)


@every_setting
def test_gradient_by_finite_differences(heads: tuple[Case, ...]) -> None:
    for loss in sorted(LOSSES) if len(heads) == 1 and heads[0] in SMALL else ["squared"]:
        problem = make_setting(replace(heads[0], loss=loss), *heads[1:]).problem
        factors = random_units(problem)
        value, gradient = problem.value_and_gradient(factors)
        assert value == pytest.approx(problem.value(factors), rel=1e-12)
        x, g = factors.flat(), gradient.flat()
        for seed in range(3):
            direction = random_like(tuple(x.shape), seed)
            step = 1e-5
            ahead = problem.value(factors.like(x + step * direction))
            behind = problem.value(factors.like(x - step * direction))
            assert (ahead - behind) / (2 * step) == pytest.approx(float(g @ direction), rel=1e-6, abs=1e-8)


def test_an_empty_component_has_a_gradient() -> None:
    problem = make_setting(*SUMS[0]).problem
    factors = random_units(problem)
    first = factors.units[0]
    assert first.u is not None
    empty = Factors([Units(first.u[:0], first.v[:0], None), *factors.units[1:]], factors.intercept)
    value, gradient = problem.value_and_gradient(empty)
    assert value == pytest.approx(problem.value(empty), rel=1e-12)
    assert gradient.units[0].v.shape == first.v[:0].shape
    assert float(gradient.units[1].v.abs().max()) > 0


def test_circulant_is_the_matrix_of_the_definition() -> None:
    X = np.arange(6.0).reshape(3, 2)
    expected = [[0, 1, 4, 5, 2, 3], [2, 3, 0, 1, 4, 5], [4, 5, 2, 3, 0, 1]]
    np.testing.assert_array_equal(circulant(X, None), expected)
    np.testing.assert_array_equal(circulant(X, (1, 3)), expected)
    np.testing.assert_array_equal(circulant(X, (3, 1)), expected)


@given(
    head=st.sampled_from(sorted(ARCHITECTURES)),
    activation=st.sampled_from(ACTIVATIONS),
    pooled=st.booleans(),
    h=st.integers(1, 3),
    w=st.integers(1, 4),
    flat=st.booleans(),
    blocks=st.integers(1, 3),
    d=st.integers(1, 3),
    c=st.integers(1, 3),
    n=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shape_follows_the_definition(
    head: str, activation: str, pooled: bool, h: int, w: int, flat: bool, blocks: int, d: int, c: int, n: int, seed: int
) -> None:
    blocks = blocks if "n_blocks" in ARCHITECTURES[head].options else 1
    case = Case(
        head, activation, pooled, None if flat else (h, w), blocks,
        n=n, s=h * w, d=d * blocks, c=c * blocks, gates=2, seed=seed,
    )  # fmt: skip
    setting = make_setting(case)
    factors = random_units(setting.problem)
    assert factors.intercept is not None
    close(
        setting.problem.forward(factors),
        reference_outputs(setting.branches, setting.tokens, plain_units(setting, factors), factors.intercept.numpy()),
    )


# --------------------------------------------------------------------------------------------------
# Gates


def gated(case: Case) -> bool:
    return case.activation != "linear" and not ARCHITECTURES[case.head].ridge


every_gated = pytest.mark.parametrize("case", [case for case in CASES if gated(case)], ids=str)


@every_gated
def test_masks_are_the_signs_of_the_definition(case: Case) -> None:
    setting = make_setting(case)
    for component, gates in zip(setting.problem.components, setting.branches[0].gates, strict=True):
        assert gates is not None
        X = torch.from_numpy(np.random.default_rng(9).normal(size=(4, case.s, case.d)))[..., component.inputs]
        masks = plain_form(case).masks(X, gates)
        for i, P in np.ndindex(len(X), len(gates)):
            tokens, h = X[i].numpy(), gates[P].numpy()
            pre = {
                "self_attention": lambda x, h: x @ h @ x.T,
                "mixer": lambda x, h: h @ x,
                "fno": lambda x, h: circulant(x, case.grid) @ h,
                "block_fno": lambda x, h: circulant(x, case.grid) @ h,
                "mlp": lambda x, h: x @ h,
            }[case.head](tokens, h)
            np.testing.assert_array_equal(masks[i, P].numpy(), pre >= 0)


@every_gated
def test_gates_replay_on_new_data(case: Case) -> None:
    """The module carries the gates: on tokens never seen it computes the definition with the same masks."""
    setting = make_setting(case)
    factors = random_units(setting.problem)
    X = np.random.default_rng(5).normal(size=(3, case.s, case.d))
    expected = reference_outputs(setting.branches, [X], plain_units(setting, factors), factors.intercept.numpy())
    module = ConvexHead(setting.branches, factors, torch.float64)
    close(module(torch.from_numpy(X)).detach(), expected)
    # Rounding the weights must not round the gates.
    half = ConvexHead(setting.branches, factors, torch.float64).float()
    for group, gates in zip(half.groups(), setting.branches[0].gates, strict=True):
        assert group.gates.dtype == torch.float64
        np.testing.assert_array_equal(group.gates.numpy(), gates.numpy())


@every_gated
def test_given_gates_and_drawn_gates_are_the_same_thing(case: Case) -> None:
    rng = np.random.default_rng(2)
    X = rng.normal(size=(12, case.s, case.d))
    y = rng.normal(size=(12, case.c) if case.pooled else (12, case.s, case.c))
    options = {**case.options(), "pooling": "mean" if case.pooled else None, "beta_ratio": 0.3}
    drawn = ConvexHeadRegressor(**options).fit(X, y)
    shared = [gates.numpy() for gates in drawn._branches[0].gates]
    given_gates = shared if case.n_blocks > 1 else shared[0]
    again = ConvexHeadRegressor(**{**options, "gates": given_gates}).fit(X, y)
    close(again.predict(X), drawn.predict(X), 1e-8)
    assert again.beta_max_ == drawn.beta_max_
    assert [len(gates) for gates in shared] == [case.gates] * case.n_blocks
    other = ConvexHeadRegressor(**{**options, "random_state": 1}).fit(X, y)
    assert not np.array_equal(other._branches[0].gates[0].numpy(), shared[0])


def test_a_gate_depends_on_its_direction_only() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(10, 3, 2)), rng.normal(size=10)
    gates = rng.normal(size=(2, 2, 2))
    small = ConvexHeadRegressor(activation="gated_relu", gates=gates, beta=0.05).fit(X, y)
    large = ConvexHeadRegressor(activation="gated_relu", gates=1e3 * gates, beta=0.05).fit(X, y)
    close(large.predict(X), small.predict(X), 1e-8)


# --------------------------------------------------------------------------------------------------
# Losses


def loss_data(name: str, n: int = 5, c: int = 3, tokens: bool = False) -> tuple[Any, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(4)
    shape = (n, 4, c) if tokens else (n, c)
    a = rng.uniform(0.1, 1.0, n)
    return (
        make_loss(name),
        torch.from_numpy(2.0 * rng.normal(size=shape)),
        torch.from_numpy(make_targets(name, shape, rng)),
        torch.from_numpy(a / a.sum()),
    )


every_output = pytest.mark.parametrize("tokens", [False, True], ids=["pooled", "tokens"])


@every_loss
@every_output
def test_loss_derivatives(name: str, tokens: bool) -> None:
    loss, O, Y, a = loss_data(name, tokens=tokens)
    entries = loss.entry_value(O, Y)
    assert entries.shape == O.shape[:-1]
    assert loss.value(O, Y, a) == pytest.approx(float((a * entries.reshape(len(O), -1).sum(1)).sum()), rel=1e-12)

    together, gradient = loss.value_and_gradient(O, Y, a)
    assert together == pytest.approx(loss.value(O, Y, a), rel=1e-12)
    close(gradient, loss.gradient(O, Y, a))

    def value(x: Tensor) -> Tensor:
        return (a * loss.entry_value(x, Y).reshape(len(x), -1).sum(1)).sum()

    close(loss.gradient(O, Y, a), torch.autograd.functional.jacobian(value, O))
    D = random_like(tuple(O.shape), 1)
    _, product = torch.autograd.functional.hvp(value, O, D)
    close(loss.hessian_product(O, Y, a, D), product)
    E = random_like(tuple(O.shape), 2)
    # R R^T = H for one sample's Hessian: <R^T E, R^T E'> cannot be had, but R applied to all unit vectors can.
    c = O.shape[-1]
    basis = torch.eye(c, dtype=torch.float64)
    columns = [loss.hessian_root_product(O, Y, basis[j].expand_as(O)) for j in range(c)]
    root = torch.stack(columns, -1)
    close((root @ root.mT @ E[..., None])[..., 0], loss.entry_hessian_product(O, Y, E))
    hessians = torch.stack([loss.entry_hessian_product(O, Y, basis[j].expand_as(O)) for j in range(c)], -1)
    weights = a.view(-1, *[1] * (hessians.ndim - 1))
    close(loss.mean_hessian(O, Y, a), (weights * hessians).reshape(-1, c, c).sum(0))
    close(loss.entry_curvature(O, Y), hessians.diagonal(dim1=-2, dim2=-1))
    flat = hessians.reshape(-1, c, c)
    assert loss.constant_curvature == bool(torch.allclose(flat, flat[:1].expand_as(flat)))
    assert loss.shift_free == bool(flat.sum(-1).abs().max() < 1e-12)


@every_loss
@every_output
def test_fenchel_young(name: str, tokens: bool) -> None:
    loss, O, Y, a = loss_data(name, tokens=tokens)
    L = loss.gradient(O, Y, a)
    equality = float((L * O).sum())
    assert loss.value(O, Y, a) + loss.conjugate(L, Y, a) == pytest.approx(equality, rel=1e-10)
    for seed in range(20):
        other = O + random_like(tuple(O.shape), seed) * 10.0 ** (seed % 4 - 2)
        slack = loss.value(other, Y, a) + loss.conjugate(L, Y, a) - float((L * other).sum())
        assert slack >= -1e-12
    # Shrunk dual points stay in the domain, and the inequality holds for them too, strictly somewhere.
    slacks = [
        loss.value(O, Y, a) + loss.conjugate(alpha * L, Y, a) - alpha * equality for alpha in (0.0, 0.3, 0.7, 0.95)
    ]
    assert min(slacks) >= -1e-12
    assert max(slacks) > 1e-3


@pytest.mark.parametrize("part", [1, 7, 16])
@every_loss
@every_output
def test_the_conjugate_in_parts_is_the_conjugate(
    name: str, tokens: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, O, Y, a = loss_data(name, tokens=tokens)
    a[1:3] = 0.0
    L = loss.gradient(O, Y, a)
    whole, most = loss.conjugate(0.7 * L, Y, a), loss.max_scale(L, Y, a)
    monkeypatch.setattr(losses, "PART", part)
    assert loss.conjugate(L, Y, a, 0.7) == pytest.approx(whole, rel=1e-13)
    assert loss.max_scale(L, Y, a) == most


@every_loss
def test_the_domain_of_the_conjugate(name: str) -> None:
    """Up to max_scale the conjugate is a finite supremum; beyond, <L, o> - l(o) grows without bound."""
    loss, O, Y, a = loss_data(name)
    Y = Y.clone()
    if name == "cross_entropy":
        Y[0] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    scales = []
    for i in range(len(O)):
        # One sample at a time: each has a border of its own.
        y, one = Y[i : i + 1], torch.ones(1, dtype=torch.float64)
        L = loss.gradient(O[i : i + 1], y, one)
        largest = loss.max_scale(L, y, one)
        scales.append(largest)
        if not math.isfinite(largest):
            assert name == "squared"
            assert math.isfinite(loss.conjugate(100.0 * L, y, one))
            continue
        assert largest >= 1.0 - 1e-12
        border = loss.conjugate(largest * L, y, one)
        assert border == pytest.approx(loss.conjugate((1 - 1e-9) * largest * L, y, one), abs=1e-6)
        # Ascent on <alpha L, o> - l(o) beyond the border: an optimiser runs away; before it, it does not.
        before = 0.99 * largest * L
        assert sup_along(loss, before, y, one) == pytest.approx(loss.conjugate(before, y, one), abs=1e-3)
        assert sup_along(loss, 1.05 * largest * L, y, one) > border + 1.0
    L = loss.gradient(O, Y, a)
    assert loss.max_scale(L, Y, a) == pytest.approx(min(scales), rel=1e-12)


def sup_along(loss: Any, L: Tensor, Y: Tensor, a: Tensor) -> float:
    """sup_o <L, o> - f(o) over a box of radius 3000, by L-BFGS from zero."""
    o = torch.zeros_like(L, requires_grad=True)
    best = -math.inf
    optimiser = torch.optim.LBFGS([o], lr=1.0, max_iter=400, line_search_fn="strong_wolfe", tolerance_change=0.0)

    def closure() -> Tensor:
        nonlocal best
        optimiser.zero_grad()
        entries = (a * loss.entry_value(o, Y).reshape(len(o), -1).sum(1)).sum()
        value = entries - (L * o).sum()
        best = max(best, -float(value.detach()))
        value.backward()
        return value

    optimiser.step(closure)
    return best


@every_loss
def test_samples_of_weight_zero_do_not_count(name: str) -> None:
    loss, O, Y, a = loss_data(name)
    a = a.clone()
    a[1] = 0.0
    kept = torch.tensor([0, 2, 3, 4])
    L = loss.gradient(O, Y, a)
    assert float(L[1].abs().max()) == 0.0
    assert loss.conjugate(L, Y, a) == pytest.approx(loss.conjugate(L[kept], Y[kept], a[kept]), rel=1e-12)
    assert loss.max_scale(L, Y, a) == loss.max_scale(L[kept], Y[kept], a[kept])


@every_loss
@every_output
def test_the_best_intercept(name: str, tokens: bool) -> None:
    case = Case("mlp", pooled=not tokens, loss=name)
    problem = make_setting(case).problem
    O = random_like(tuple(problem.targets.shape), 0)
    b = problem.best_intercept(O)
    L = problem.loss.gradient(O + b, problem.targets, problem.weights)
    assert float(L.reshape(-1, case.c).sum(0).abs().max()) < 1e-12
    best = problem.loss.value(O + b, problem.targets, problem.weights)
    for seed in range(5):
        moved = b + 0.1 * random_like((case.c,), seed)
        assert problem.loss.value(O + moved, problem.targets, problem.weights) >= best - 1e-12


def counted_hessians(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for every mean Hessian from now on."""
    hessians: list[int] = []
    original = type(problem.loss).mean_hessian
    monkeypatch.setattr(
        type(problem.loss), "mean_hessian", lambda *args: (hessians.append(1), original(*args))[1], raising=True
    )
    return hessians


@every_loss
@pytest.mark.parametrize("shift", [1e-3, 30.0])
def test_the_best_intercept_needs_few_hessians(name: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One near the minimiser; from far away as many as it takes."""
    case = Case("mlp", n=50, c=3, loss=name)
    problem = make_setting(case).problem
    O = random_like(tuple(problem.targets.shape), 0)
    best = problem.best_intercept(O)
    hessians = counted_hessians(problem, monkeypatch)
    start = best + shift * random_like((case.c,), 1)
    b = problem.best_intercept(O, start, 1e-9)
    assert float(problem.loss.gradient(O + b, problem.targets, problem.weights).sum(0).abs().max()) <= 1e-9
    assert 1 <= len(hessians) <= (1 if shift < 1 else 40)


@every_loss
def test_the_best_intercept_in_float32_does_not_move_along_flat_directions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding leaves a flat direction an eigenvalue, whose inverse is a jump along it."""
    case = Case("mlp", n=200, c=17, loss=name)
    problem = make_setting(case).problem
    O = random_like(tuple(problem.targets.shape), 0).float()
    start = problem.best_intercept(O.double()) + 0.03 * random_like((case.c,), 1)
    hessians = counted_hessians(problem, monkeypatch)
    b = problem.best_intercept(O, start, 1e-6)
    assert b.dtype == torch.float32
    assert len(hessians) <= 2
    assert float((b - start).mean().abs()) < (1e-5 if problem.loss.shift_free else 0.03)
    exact = problem.loss.gradient((O + b).double(), problem.targets, problem.weights)
    assert float(exact.sum(0).abs().max()) < 1e-5


# --------------------------------------------------------------------------------------------------
# Solvers and certificates

LOSS_CASES = [replace(Case("self_attention", "gated_relu"), loss=loss, intercept=i) for loss in LOSSES for i in (0, 1)]


def solve(problem: Problem, solver: str, tol: float = 1e-4, **options: Any) -> Solution:
    return solver_function(solver)(problem, tol=tol, max_iter=5000, **options)


def regularised(heads: tuple[Case, ...], ratio: float = 0.1) -> Setting:
    """The setting at beta = ratio * beta_max."""
    setting = make_setting(*heads)
    setting.problem = setting.problem.with_beta(ratio * beta_max(setting.problem))
    return setting


@optimal_solver
@pytest.mark.parametrize("heads", [*SETTINGS, *((case,) for case in LOSS_CASES)], ids=sum_name)
def test_solutions_are_certified(heads: tuple[Case, ...], solver: str) -> None:
    setting = regularised(heads)
    problem = setting.problem
    solution = solve(problem, solver)
    certificate = solution.certificate
    assert solution.converged, solution.message
    assert 0.0 <= certificate.relative_gap <= 1e-4
    assert certificate.certified
    assert certificate.gap == certificate.primal - certificate.dual
    assert certificate.sigma_max.lower <= certificate.sigma_max.upper
    assert certificate.beta == problem.beta
    again = certify_factors(problem, solution.factors)
    assert again.certified
    assert again.primal == pytest.approx(certificate.primal, rel=1e-12)
    assert again.dual == pytest.approx(certificate.dual, rel=1e-10)
    # The network: the units' weight decay is the nuclear norm, so the network attains the convex optimum.
    assert problem.value(solution.factors, torch.float64) == pytest.approx(certificate.primal, rel=1e-9)
    assert problem.weight_decay(solution.factors) == pytest.approx(penalty(problem, solution.factors), rel=1e-9)
    for units in solution.factors.units:
        if units.u is not None:
            close(units.u.flatten(1).norm(dim=1), units.v.flatten(1).norm(dim=1), 1e-8)
    record = solution.history
    assert len(record.objective) == len(record.gap) == len(record.seconds) == len(record.rank) > 0
    # The best intercept: sum_i L_i = 0.
    O = problem.forward(solution.factors, torch.float64)
    if problem.fit_intercept:
        assert float(dual_point(problem, O).reshape(-1, problem.outputs).sum(0).abs().max()) < 1e-10
    # In their own outputs the definitions agree, so that the certificate is about the head itself.
    factors = solution.factors
    intercept = None if factors.intercept is None else factors.intercept.numpy()
    close(O, reference_outputs(setting.branches, setting.tokens, plain_units(setting, factors), intercept), 1e-9)


@every_head
def test_solvers_agree(case: Case) -> None:
    problem = regularised((case,)).problem
    found = [solve(problem, solver, 1e-7) for solver in OPTIMAL]
    for solution in found[1:]:
        assert solution.certificate.primal == pytest.approx(found[0].certificate.primal, rel=1e-7)
        # Outputs are unique by strict convexity of the squared loss, even where Z is not.
        close(problem.forward(solution.factors, torch.float64), problem.forward(found[0].factors, torch.float64), 1e-3)


@every_solver
def test_solutions_are_a_function_of_random_state(solver: str) -> None:
    problem = regularised((Case("mixer", "gated_relu", False),)).problem
    a, b = (solve(problem, solver, random_state=3) for _ in range(2))
    assert a.n_iter == b.n_iter
    assert torch.equal(a.factors.flat(), b.factors.flat())


@every_solver
def test_an_interrupted_solve_says_so(solver: str) -> None:
    problem = regularised((Case("self_attention", "gated_relu", False),), 0.01).problem
    solution = solver_function(solver)(problem, tol=1e-9, max_iter=3)
    assert not solution.converged
    assert "max_iter" in solution.message
    assert solution.certificate.relative_gap > 1e-9
    assert solution.certificate.certified


@optimal_solver
def test_solvers_take_a_start(solver: str) -> None:
    problem = regularised((Case("mixer", "gated_relu", loss="cross_entropy"),)).problem
    first = solve(problem, solver, 1e-6)
    near = problem.with_beta(0.97 * problem.beta)
    warm, cold = solve(near, solver, 1e-6, init=first.factors), solve(near, solver, 1e-6)
    assert warm.converged
    assert warm.certificate.primal == pytest.approx(cold.certificate.primal, rel=2e-6)
    assert warm.n_iter <= cold.n_iter
    steps: list[dict] = []
    again = solve(problem, solver, 1e-4, init=first.factors, progress=steps.append)
    assert again.converged
    assert set(steps[0]) >= {"iteration", "objective", "gap", "rank", "seconds"}


@optimal_solver
def test_max_rank_is_kept(solver: str) -> None:
    problem = regularised((Case("self_attention", "gated_relu", False),), 0.02).problem
    free = solve(problem, solver)
    assert free.factors.n_units > 2
    bound = solver_function(solver)(problem, tol=1e-4, max_iter=300, max_rank=2)
    assert bound.factors.n_units <= 2
    assert bound.certificate.primal > free.certificate.primal
    assert bound.certificate.dual <= free.certificate.primal


@optimal_solver
@every_head
def test_at_beta_max_the_head_is_empty(case: Case, solver: str) -> None:
    problem = make_setting(replace(case, loss="cross_entropy")).problem
    if ARCHITECTURES[case.head].ridge:
        return  # a ridge branch shrinks but never vanishes: its scale is tested with the sums of heads
    above = solve(problem.with_beta(1.001 * beta_max(problem)), solver, 1e-6)
    assert above.converged
    assert above.certificate.primal == pytest.approx(problem.null_loss(), rel=1e-6)
    # Half of the penalty at least is loss of optimality: it is bounded by the gap.
    far = solve(problem.with_beta(2.0 * beta_max(problem)), solver, 1e-6)
    assert penalty(problem, far.factors) <= 2e-6 * problem.null_loss()
    below = solve(problem.with_beta(0.8 * beta_max(problem)), solver, 1e-6)
    assert below.certificate.primal < problem.null_loss() * (1 - 1e-4)
    assert below.factors.n_units > 0


@baseline
@pytest.mark.parametrize("heads", SETTINGS, ids=sum_name)
def test_trained_networks_are_certified_as_they_are(heads: tuple[Case, ...], solver: str) -> None:
    problem = regularised(heads).problem
    best = solve(problem, "factored", 1e-7).certificate
    found = solver_function(solver)(problem, tol=1e-3, max_iter=30, random_state=1)
    certificate = found.certificate
    assert certificate.certified
    assert certificate == certify_factors(problem, found.factors, network=True)
    assert certificate.primal == pytest.approx(problem.value(found.factors, torch.float64), rel=1e-12)
    assert found.converged == (certificate.relative_gap <= 1e-3)
    assert certificate.primal < problem.null_loss()
    # No network beats the optimum, and no dual value exceeds it.
    assert certificate.primal >= best.dual * (1 - 1e-12)
    assert certificate.dual <= best.primal * (1 + 1e-12)
    assert found.history.objective[-1] == certificate.primal
    assert "init=" in found.advice


@baseline
def test_training_goes_on_from_a_start(solver: str) -> None:
    problem = regularised((Case("mixer", "gated_relu", loss="cross_entropy"),)).problem
    first = solve(problem, "factored", 1e-6)
    steps: list[dict] = []
    options = {"units": 1, "checks": 3}
    found = solver_function(solver)(
        problem, tol=1e-4, max_iter=5, init=first.factors, progress=steps.append, options=options
    )
    assert found.certificate.primal < 1.02 * first.certificate.primal
    assert set(steps[0]) >= {"iteration", "objective", "gap", "rank", "seconds"}
    # A start without units is filled up.
    empty = first.factors.like(first.factors.flat())
    empty.units = [Units(u.u[:0], u.v[:0], u.gate[:0]) for u in empty.units]
    assert solver_function(solver)(problem, max_iter=5, init=empty, options=options).factors.n_units == 3


@baseline
def test_networks_keep_max_rank(solver: str) -> None:
    problem = regularised((Case("self_attention", "gated_relu", False),), 0.02).problem
    assert solver_function(solver)(problem, max_iter=3, max_rank=2).factors.n_units == 2


def optimum(problem: Problem) -> float:
    """The optimal value to about 1e-12."""
    solution = solve(problem, "fista", 1e-6)
    assert solution.converged
    return polish(problem, solution).certificate.primal


@pytest.mark.parametrize("heads", [*((case,) for case in SMALL), *((c,) for c in LOSS_CASES), *SUMS], ids=sum_name)
def test_certificates_of_any_factors_are_sound(heads: tuple[Case, ...]) -> None:
    """gap >= primal - optimum and dual <= optimum, wherever the factors came from."""
    problem = regularised(heads).problem
    best = optimum(problem)
    for seed, scale in enumerate((0.0, 0.01, 0.1, 0.5, 2.0)):
        factors = random_units(problem, 2, seed, scale)
        for network in (False, True):
            certificate = certify_factors(problem, factors, network)
            assert certificate.certified
            assert certificate.dual <= best * (1 + 1e-10)
            assert certificate.primal >= best * (1 - 1e-10)
            assert certificate.gap >= certificate.primal - best - 1e-10 * best
        assert certificate.primal == pytest.approx(problem.value(factors, torch.float64), rel=1e-12)
    near = solve(problem, "factored", 1e-2).factors
    for size in (0.0, 1e-3, 1e-2, 1e-1):
        moved = near.like(near.flat() * (1 + size * random_like(tuple(near.flat().shape), 0)))
        certificate = certify_factors(problem, moved)
        assert certificate.dual <= best * (1 + 1e-10)
        assert certificate.gap >= certificate.primal - best - 1e-10 * best


@pytest.mark.parametrize("heads", [*((case,) for case in SMALL), *((c,) for c in LOSS_CASES), *SUMS], ids=sum_name)
def test_the_dual_point_is_feasible(heads: tuple[Case, ...]) -> None:
    """sigma_max is what numpy finds, alpha L keeps every block below beta w, and the dual is its value."""
    problem = regularised(heads).problem
    ridge_blocks = [k for k, component in enumerate(problem.components) if component.ridge]
    near = solve(problem, "factored", 1e-2).factors
    for factors in (near, random_units(problem), random_units(problem, scale=0.05)):
        certificate = certify_factors(problem, factors)
        _, O = refit_intercept(problem, factors)
        L = dual_point(problem, O)
        sigma, ridge = bound_sigma(problem, L)
        assert certificate.sigma_max == sigma
        assert sigma.proved
        values = {
            (k, gate): np.linalg.norm(problem.gamma(L, k, gate).numpy(), 2) / component.weight
            for k, component in enumerate(problem.components)
            for gate in problem.gates_of(k)
            if k not in ridge_blocks
        }
        largest = max(values.values(), default=0.0)
        assert sigma.lower <= largest * (1 + 1e-12)
        assert largest <= sigma.upper <= largest * (1 + 1e-9)
        assert certificate.alpha * largest <= problem.beta
        assert certificate.alpha >= 0
        expected = sum(
            float(problem.gamma(L, k, None).square().sum()) / (2 * problem.beta * problem.components[k].weight)
            for k in ridge_blocks
        )
        assert ridge == pytest.approx(expected, rel=1e-12)
        scaled = certificate.alpha * L
        assert problem.loss.max_scale(scaled, problem.targets, problem.weights) >= 1.0
        dual = -problem.loss.conjugate(scaled, problem.targets, problem.weights) - certificate.alpha**2 * ridge
        assert certificate.dual == pytest.approx(dual, rel=1e-10, abs=1e-12)
        if problem.fit_intercept:
            assert float(L.reshape(-1, problem.outputs).sum(0).abs().max()) < 1e-12
        # No other point of the ray that is feasible has a larger value.
        for alpha in np.linspace(0.0, 1.0, 11) * min(1.0, problem.beta / max(largest, 1e-300)):
            other = -problem.loss.conjugate(alpha * L, problem.targets, problem.weights) - alpha**2 * ridge
            assert other <= certificate.dual + 1e-9 * certificate.primal


def test_fista_refuses_what_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_setting(Case("self_attention")).problem
    monkeypatch.setattr(fista, "SIZE_LIMIT", fista.dense_size(problem) - 1)
    with pytest.raises(InputError, match=r"'fista' for a problem whose .* hold .* numbers.*Use solver='factored'"):
        solve(problem, "fista")
    monkeypatch.setattr(fista, "SIZE_LIMIT", fista.dense_size(problem))
    assert solve(problem.with_beta(beta_max(problem)), "fista").converged


# --------------------------------------------------------------------------------------------------
# The network and the convex program


@pytest.mark.parametrize(
    ("heads", "loss"),
    [((case,), loss) for case in SMALL for loss in ("squared", "cross_entropy")] + [(SUMS[0], "cross_entropy")],
    ids=sum_name,
)
def test_trained_networks_never_beat_the_dual(heads: tuple[Case, ...], loss: str) -> None:
    """Plain torch, from random starts, with more units than the optimum has: never below the dual, and down to it."""
    setting = regularised((replace(heads[0], loss=loss), *heads[1:]), 0.2)
    problem = setting.problem
    solution = solve(problem, "fista", 1e-6)
    X = torch.from_numpy(setting.tokens[0])
    views = [torch.from_numpy(tokens) for tokens in setting.tokens]
    reached = []
    for seed in range(3):
        start = random_units(problem, 4, seed, 0.3)
        module = ConvexHead(setting.branches, start, torch.float64)
        # Every branch reads its own tokens: hand them out in place of the branch's view.
        module.views = nn.ModuleList(Given(tokens) for tokens in views)
        optimiser = torch.optim.LBFGS(
            module.parameters(), lr=1.0, max_iter=400, history_size=20, line_search_fn="strong_wolfe"
        )

        def objective(module: ConvexHead = module) -> Tensor:
            O = module(X)
            entries = problem.loss.entry_value(O, problem.targets).reshape(len(O), -1).sum(1)
            decay: Any = 0.0
            for group, component in zip(module.groups(), problem.components, strict=True):
                for weight in (group.u, group.v):
                    if weight is not None:
                        decay = decay + 0.5 * problem.beta * component.weight * weight.square().sum()
            return (problem.weights * entries).sum() + decay

        def closure(optimiser: Any = optimiser, objective: Any = objective) -> Tensor:
            optimiser.zero_grad()
            value = objective()
            value.backward()
            assert float(value.detach()) >= solution.certificate.dual * (1 - 1e-12)
            return value

        optimiser.step(closure)
        reached.append(float(objective().detach()))
        own = certify_factors(problem, module.factors(), network=True)
        assert own.primal == pytest.approx(reached[-1], rel=1e-9)
        assert own.gap >= reached[-1] - solution.certificate.primal - 1e-9
    assert min(reached) <= solution.certificate.primal * (1 + 1e-3)


class Given(nn.Module):
    """Returns its tokens whatever it is given."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, X: Tensor) -> Tensor:
        return self.tokens


@every_case
def test_canonical_blocks(case: Case) -> None:
    """Balanced, sorted, orthogonal units of the plain form, which rebuild Z and the outputs."""
    setting = make_setting(case)
    factors = random_units(setting.problem, 3)
    blocks = canonical_blocks(setting.problem.components, factors)
    plain = plain_units(setting, factors)[0]
    order = [(k, gate) for k in range(len(plain)) for gate in setting.problem.gates_of(k)]
    assert [(block.group, block.gate_index) for block in blocks] == order
    for block, (k, gate) in zip(blocks, order, strict=True):
        units = plain[k]
        own = slice(None) if gate is None else (units.gate == gate).numpy()
        v = units.v.numpy()[own]
        if units.u is None:
            Z = v[0]
        else:
            u = units.u.numpy()[own]
            Z = u.reshape(len(u), -1).T @ v.reshape(len(v), -1)
            gates = setting.branches[0].gates[k]
            if gate is None:
                assert block.gate is None
            else:
                np.testing.assert_array_equal(block.gate, gates[gate].numpy())
        close(block.Z, Z)
        sigma = block.singular_values
        np.testing.assert_array_equal(sigma, np.sort(sigma)[::-1])
        close(sigma, np.linalg.svd(Z, compute_uv=False)[: len(sigma)])
        close(block.u @ block.u.T, np.diag(sigma))
        close(block.v @ block.v.T, np.diag(sigma))


# --------------------------------------------------------------------------------------------------
# Fixtures: optimal values found by a conic solver


@optimal_solver
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixture(path: Path, solver: str) -> None:
    known = json.loads(path.read_text())
    classifier = known["loss"] == "cross_entropy"
    options = {name: known[name] for name in ("head", "activation", "grid", "pooling", "beta", "fit_intercept")}
    if known["n_blocks"] is not None:
        options["n_blocks"] = known["n_blocks"]
    if known["gates"] is not None:
        options["gates"] = known["gates"]
    model = (ConvexHeadClassifier if classifier else ConvexHeadRegressor)(**options, solver=solver, tol=1e-6)
    model.fit(np.array(known["X"]), np.array(known["y"]))
    certificate = model.certificate_
    assert certificate.certified
    assert certificate.primal == pytest.approx(known["optimal_value"], rel=1e-7)
    assert certificate.dual <= known["optimal_value"] * (1 + 1e-7)
    assert model.beta_max_ == pytest.approx(known["beta_max"], rel=1e-9)
    assert model.beta_ == known["beta"]
    # The blocks of these problems are unique: the conic solver and both of ours find the same ones.
    norms = [float(block.singular_values.sum()) for block in model.blocks_]
    np.testing.assert_allclose(norms, known["nuclear_norms"], rtol=1e-3, atol=2e-4)
    ranks = [int((block.singular_values > 1e-4 * max(norms)).sum()) for block in model.blocks_]
    assert ranks == known["ranks"]
    if known["intercept"] is not None:
        np.testing.assert_allclose(centred(model), np.array(known["intercept"]) - shift(known, classifier), atol=2e-3)


def centred(model: Any) -> np.ndarray:
    """The intercept; for a classifier without the common shift that softmax does not see."""
    b = model.intercept_
    return b - b.mean() if isinstance(model, ConvexHeadClassifier) else b


def shift(known: dict[str, Any], classifier: bool) -> float:
    return float(np.mean(known["intercept"])) if classifier else 0.0


# --------------------------------------------------------------------------------------------------
# Sample weights and sums of heads


def estimator_data(case: Case, n: int = 15, classes: int = 4) -> tuple[Any, np.ndarray, np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(case.seed + 11)
    X = rng.normal(size=(n, case.s, case.d))
    shape = (n,) if case.pooled else (n, case.s)
    y = rng.integers(0, classes, shape)
    y.reshape(-1)[:classes] = range(classes)
    return X, y, rng.normal(size=(*shape, 4)), {**case.options(), "pooling": "mean" if case.pooled else None}


@pytest.mark.parametrize("case", [*SMALL, Case("mixer", "gated_relu", False)], ids=str)
def test_sample_weights_are_repeated_rows(case: Case) -> None:
    X, y, Y, options = estimator_data(case)
    weights = np.random.default_rng(1).integers(0, 4, len(X))
    weights[:4] = [1, 2, 1, 3]  # every class keeps a sample
    again = np.repeat(np.arange(len(X)), weights)
    for model, target in ((ConvexHeadClassifier(**options), y), (ConvexHeadRegressor(**options), Y)):
        weighted = model.set_params(beta_ratio=0.1).fit(X, target, sample_weight=weights)
        beta, outputs = weighted.beta_, weighted.predict_proba(X) if target is y else weighted.predict(X)
        repeated = model.fit(X[again], target[again])
        assert repeated.beta_ == pytest.approx(beta, rel=1e-10)
        close(repeated.predict_proba(X) if target is y else repeated.predict(X), outputs, 1e-6)


@optimal_solver
def test_sums_of_heads(solver: str) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 6, 4)), rng.integers(0, 3, 20)
    heads = ["self_attention", {"head": "mlp", "activation": "gated_relu", "gates": 2}, {"head": "linear"}]
    model = ConvexHeadClassifier(head=heads, tol=1e-6, solver=solver).fit(X, y)
    targets, weights, loss = model.encode(X, y)
    problem, branches = model._build(X, targets, weights, loss)
    problem = problem.with_beta(model.beta_)
    # The objective is that of the sum: loss of the summed outputs plus the weighted penalties of all branches.
    parts = [[Units(u.u if u.u is None else c.form.lift(u.u), u.v, u.gate)]
             for c, u in zip(problem.components, model._factors.units, strict=True)]  # fmt: skip
    O = reference_outputs(branches, [X] * 3, parts, model.intercept_)
    close(model.decision_function(X), O, 1e-9)
    expected = problem.loss.value(torch.from_numpy(O), problem.targets, problem.weights)
    for block in model.blocks_:
        sigma, weight = block.singular_values, model.beta_ * branches[block.branch].weight
        expected += weight * (0.5 * (sigma**2).sum() if block.head == "linear" else sigma.sum())
    assert model.certificate_.primal == pytest.approx(expected, rel=1e-9)
    assert model.certificate_.certified
    # Automatic weights: alone, every branch would have the same beta_max.
    scales = [branch_scale(problem, b) / branch.weight for b, branch in enumerate(branches)]
    assert branches[0].weight == 1.0
    assert scales == pytest.approx([scales[0]] * 3, rel=1e-9)
    assert model.beta_max_ == pytest.approx(scales[0], rel=1e-9)
    assert {block.branch for block in model.blocks_ if len(block.singular_values)} == {0, 1, 2}
    # The sum is at least as good as each branch alone at the same penalty.
    for index, head in enumerate(heads):
        options = head if isinstance(head, dict) else {"head": head}
        options = {**options, "weight": branches[index].weight}
        if options.get("activation") == "gated_relu":
            options["gates"] = branches[index].gates[0].numpy()
        alone = ConvexHeadClassifier(head=[options], beta=model.beta_, tol=1e-6, solver=solver).fit(X, y)
        assert alone.certificate_.primal >= model.certificate_.dual


def test_given_branch_weights_are_kept() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 6, 4)), rng.integers(0, 3, 20)
    heads = [{"head": "mlp", "weight": 2.0}, {"head": "linear", "weight": 0.5}]
    model = ConvexHeadClassifier(head=heads).fit(X, y)
    assert [branch.weight for branch in model._branches] == [2.0, 0.5]


# --------------------------------------------------------------------------------------------------
# Modules


@every_case
def test_modules_and_files_give_the_same_outputs(case: Case, tmp_path: Path) -> None:
    X, y, Y, options = estimator_data(case)
    for model, target in ((ConvexHeadClassifier(**options), y), (ConvexHeadRegressor(**options), Y)):
        model.set_params(beta_ratio=0.3).fit(X, target)
        outputs = model.logits(X) if target is y else model.predict(X)
        with torch.no_grad():
            close(model.to_module(torch.float64)(torch.from_numpy(X)), outputs, 1e-10)
            single = model.to_module()
            assert next(single.parameters()).dtype == torch.float32
            close(single(torch.from_numpy(X).float()), outputs, 1e-5)
            rebuilt = model.to_module(torch.float64)
            rebuilt.load_state_dict(model.to_module(torch.float64).state_dict())
            close(rebuilt(torch.from_numpy(X)), outputs, 1e-10)
        path = tmp_path / "model.safetensors"
        model.save(path)
        again = load(path)
        assert type(again) is type(model)
        assert again.certificate_ == model.certificate_
        assert (again.beta_, again.beta_max_, again.n_iter_) == (model.beta_, model.beta_max_, model.n_iter_)
        assert again.history_ == model.history_
        assert again.rank_ == model.rank_
        np.testing.assert_array_equal(again.predict(X), model.predict(X))
        if target is y:
            np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
            np.testing.assert_array_equal(again.classes_, model.classes_)
        for a, b in zip(again.blocks_, model.blocks_, strict=True):
            np.testing.assert_array_equal(a.u, b.u)
            np.testing.assert_array_equal(a.v, b.v)
            assert (a.head, a.group, a.gate_index) == (b.head, b.group, b.gate_index)
        assert {k: str(v) for k, v in again.get_params().items()} == {k: str(v) for k, v in model.get_params().items()}
        again.save(tmp_path / "again.safetensors")
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@every_case
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:FutureWarning")
def test_exported_modules(case: Case, tmp_path: Path) -> None:
    """ONNX with a free batch size, and torch.jit.trace, both on a batch other than the traced one."""
    setting = make_setting(replace(case, c=4 if case.n_blocks > 1 else 3))
    module = ConvexHead(setting.branches, random_units(setting.problem), torch.float32).eval()
    X = torch.randn(5, case.s, case.d, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(X).numpy()
        traced = torch.jit.trace(module, X[:2])
        close(traced(X), expected, 1e-5)
    module.export_onnx(tmp_path / "head.onnx", (case.s, case.d))
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": X.numpy()})
    close(logits, expected, 1e-4)
    (one,) = session.run(["logits"], {"input": X[:1].numpy()})
    close(one, expected[:1], 1e-4)


class Patches(nn.Module):
    """A backbone of one layer: images (n, 3, 8, 8) -> tokens (n, 4, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).mT


def test_attach_a_head_to_a_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Patches().eval()
    images = torch.randn(24, 3, 8, 8)
    with torch.no_grad():
        tokens = backbone(images).numpy()
    y = np.arange(24) % 3
    model = ConvexHeadClassifier(head=["self_attention", "fno"], grid=(2, 2), activation="gated_relu", gates=2)
    head = model.fit(tokens, y).to_module()
    whole = attach(backbone, head).eval()
    with torch.no_grad():
        logits = whole(images).numpy()
    close(logits, model.logits(tokens), 1e-5)
    np.testing.assert_array_equal(model.classes_[logits.argmax(1)], model.predict(tokens))
    assert [name for name, _ in whole.named_children()] == ["0", "1"]
    export_onnx(whole, tmp_path / "whole.onnx", (3, 8, 8))
    session = onnxruntime.InferenceSession(str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"input": images[:7].numpy()})
    close(exported, logits[:7], 1e-4)


def test_an_empty_head_is_a_module_too(tmp_path: Path) -> None:
    X, y, _, options = estimator_data(Case("mixer", "gated_relu"))
    model = ConvexHeadClassifier(**options, beta_ratio=1.5).fit(X, y)
    assert model.rank_ == 0
    share = np.bincount(y) / len(y)
    close(model.predict_proba(X), np.tile(share, (len(X), 1)), 1e-9)
    module = model.to_module()
    close(module(torch.from_numpy(X).float()).detach(), np.tile(model.intercept_, (len(X), 1)), 1e-6)
    module.export_onnx(tmp_path / "empty.onnx", X.shape[1:])
    session = onnxruntime.InferenceSession(str(tmp_path / "empty.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": X[:3].astype(np.float32)})
    close(logits, np.tile(model.intercept_, (3, 1)), 1e-5)
    model.save(tmp_path / "empty.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "empty.safetensors").logits(X), model.logits(X))
