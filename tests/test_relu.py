"""ReLU heads: all patterns, cones and their decompositions, conversion, and bounds on the global optimum.

``python -m pytest tests/test_relu.py -s -k table -m "slow or not slow"`` prints the brackets of all tiny problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from contract_cases import DEFINITIONS, make_targets
from convexheads import ConvexHeadClassifier, ConvexHeadClassifierCV, ConvexHeadRegressor, certify, load
from convexheads.architectures import ARCHITECTURES, architecture_class
from convexheads.cli import main
from convexheads.errors import InputError, MissingExtraError
from convexheads.heads import Branch, ConvexHead, export_onnx
from convexheads.losses import LOSSES, make_loss
from convexheads.problem import Problem
from convexheads.relu import (
    cone_bound,
    convert,
    cover_bound,
    enumerate_cells,
    enumerate_gates,
    extend,
    find_bracket,
    refine,
)
from convexheads.relu import network as network_module
from convexheads.relu.arrangement import distinct_rows, unit_rows
from convexheads.relu.bracket import Bracket
from convexheads.relu.cones import closed_form, cone_rows, decompose, facets, interior_direction
from convexheads.relu.growth import descending_units
from convexheads.relu.network import own_signs, preactivations
from convexheads.relu.relaxation import CONJUGATES
from convexheads.solvers import Solution, solver_function
from convexheads.subspace import beta_max
from convexheads.types import Factors, Units

Array = np.ndarray

# Arrangements ----------------------------------------------------------------------------------------------


def brute_force(A: Array) -> set[tuple[bool, ...]]:
    """Signs of all cells of distinct unit rows A (N, r), one linear program a sign vector."""
    found = set()
    for signs in product([-1.0, 1.0], repeat=len(A)):
        R = np.array(signs)[:, None] * A
        bounds = [(-1.0, 1.0)] * A.shape[1] + [(None, 1.0)]
        margin = linprog(
            np.append(np.zeros(A.shape[1]), -1.0),
            np.column_stack([-R, np.ones(len(A))]),
            np.zeros(len(A)),
            bounds=bounds,
        )
        if -margin.fun > 1e-8:
            found.add(tuple(sign > 0 for sign in signs))
    return found


def hyperplanes(H: Array) -> Array:
    A = unit_rows(H)
    return A[distinct_rows(A, either_sign=True)]


def signs_of(points: Array, A: Array) -> set[tuple[bool, ...]]:
    return {tuple(row) for row in (points @ A.T > 0).tolist()}


@pytest.mark.parametrize(("n", "r"), [(1, 1), (1, 3), (2, 2), (5, 2), (6, 3), (8, 3), (7, 4), (6, 5), (4, 6)])
def test_general_position_attains_cover_s_count(n: int, r: int) -> None:
    H = np.random.default_rng(n + r).normal(size=(n, r))
    points = enumerate_cells(H)
    assert len(points) == cover_bound(n, r)
    assert signs_of(points, hyperplanes(H)) == brute_force(hyperplanes(H))


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=25)
def test_degenerate_arrangements_against_brute_force(seed: int, n: int, r: int) -> None:
    """Small integers: zero rows, repeated and opposite rows, many hyperplanes through one line, low rank."""
    H = np.random.default_rng(seed).integers(-1, 2, size=(n, r)).astype(float)
    A = hyperplanes(H)
    points = enumerate_cells(H)
    found = signs_of(points, A)
    assert len(found) == len(points)
    if len(A):
        assert found == brute_force(A)
        assert len(found) <= cover_bound(len(A), int(np.linalg.matrix_rank(A)))


@pytest.mark.parametrize("head", ["self_attention", "mixer", "fno", "mlp"])
def test_no_weight_has_a_pattern_that_was_not_enumerated(head: str) -> None:
    rng = np.random.default_rng(0)
    form = architecture_class(head)(2, 2, 2).form("relu")
    X = torch.from_numpy(rng.normal(size=(2, 2, 2)))
    gates = enumerate_gates(form, X)
    H = preactivations(form, X)
    masks = form.masks(X, gates).flatten(2).transpose(0, 1).flatten(1)
    assert len({tuple(row) for row in masks.tolist()}) == len(gates)
    A = hyperplanes(H)
    known = signs_of(gates.flatten(1).numpy(), A)
    assert len(known) == len(gates) <= cover_bound(len(A), int(np.linalg.matrix_rank(A)))
    drawn = signs_of(rng.normal(size=(200_000, H.shape[1])), A)
    assert drawn <= known
    assert len(drawn) > 0.8 * len(known)  # the sample is dense enough to say something


def test_too_many_patterns() -> None:
    with pytest.raises(InputError, match="more than 50 patterns for gates='all'"):
        enumerate_cells(np.random.default_rng(0).normal(size=(20, 3)), most=50)
    form = architecture_class("mixer")(9, 4, 2).form("relu")
    with pytest.raises(InputError, match="pre-activations with 29160000 coefficients"):
        enumerate_gates(form, torch.randn(10_000, 9, 4))


# Cones -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=50)
def test_decompositions(seed: int, n: int, p: int) -> None:
    rng = np.random.default_rng(seed)
    H, gate, u = rng.normal(size=(n, p)), rng.normal(size=p), rng.normal(size=p)
    R = cone_rows(H, gate)
    centre = interior_direction(R)
    assert centre is not None
    assert (R @ centre).min() >= (R @ gate).min() / np.linalg.norm(gate) - 1e-9  # no direction is farther inside
    ratio = (H @ u) / (H @ gate)
    pairs = [decompose(R, u, centre), closed_form(np.array([ratio.min(), ratio.max()]), u, gate)]
    for plus, minus in pairs:
        size = max(np.linalg.norm(plus), 1.0)
        np.testing.assert_allclose(plus - minus, u, atol=1e-12 * size)
        assert min((R @ plus).min(), (R @ minus).min()) > -1e-10 * size
    cost = [float(np.linalg.norm(plus) + np.linalg.norm(minus)) for plus, minus in pairs]
    assert np.linalg.norm(u) * (1 - 1e-12) <= cost[0] <= cost[1] * (1 + 1e-8)


def test_decompositions_are_the_cheapest() -> None:
    """Against a second-order cone program."""
    rng = np.random.default_rng(5)
    for n, p in [(3, 2), (6, 3), (12, 4), (20, 5)]:
        H, gate, u = rng.normal(size=(n, p)), rng.normal(size=p), rng.normal(size=p)
        R = cone_rows(H, gate)
        centre = interior_direction(R)
        assert centre is not None
        plus, minus = decompose(R, u, centre)
        w = cvxpy.Variable(p)
        program = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm(w) + cvxpy.norm(w - u)), [R @ w >= 0, R @ (w - u) >= 0])
        program.solve(solver=cvxpy.CLARABEL)
        assert np.linalg.norm(plus) + np.linalg.norm(minus) == pytest.approx(program.value, rel=1e-3)


def test_a_member_of_the_cone_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    H, u = rng.normal(size=(6, 3)), rng.normal(size=3)
    R = cone_rows(H, u)
    centre = interior_direction(R)
    assert centre is not None
    plus, minus = decompose(R, u, centre)
    np.testing.assert_allclose(plus, u, atol=1e-10)
    np.testing.assert_allclose(minus, 0.0, atol=1e-10)


def test_facets() -> None:
    square = np.array([[1.0, 0, 1], [-1.0, 0, 1], [0, 1.0, 1], [0, -1.0, 1]]) / math.sqrt(2)
    inside = square.mean(0, keepdims=True) / np.linalg.norm(square.mean(0))
    found = facets(np.vstack([inside, square]))
    assert {tuple(row) for row in found} == {tuple(row) for row in square}


def test_a_cone_without_interior() -> None:
    H = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    # The mask of (0, 1) asks for u_0 >= 0 and -u_0 >= 0.
    assert interior_direction(cone_rows(H, np.array([0.0, 1.0]))) is None
    assert interior_direction(cone_rows(H, np.array([0.1, 1.0]))) is not None


# Problems --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A ReLU head on random tokens (n, s, d) with c outputs, small enough for all of its patterns."""

    head: str
    loss: str
    n: int
    s: int = 2
    d: int = 2
    c: int = 2
    pooled: bool = True
    intercept: bool = True
    grid: tuple[int, int] | None = None
    ratio: float = 0.2
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(
            [self.head, self.loss, "pooled" if self.pooled else "tokens", "b" if self.intercept else "0"]
            + ([] if self.grid is None else ["2d"])
            + [f"{self.n}x{self.s}x{self.d}", f"{self.ratio:g}"]
        )


TINY = [
    *(
        Tiny(head, loss, n, d=d)
        for head, n, d in [("self_attention", 2, 2), ("mixer", 3, 2), ("fno", 5, 1), ("block_fno", 4, 2), ("mlp", 6, 2)]
        for loss in ("squared", "cross_entropy")
    ),
    Tiny("mlp", "multilabel_logistic", 4, 2, 3),
    Tiny("mlp", "squared", 4, 2, 2, pooled=False, intercept=False),
    Tiny("mixer", "squared", 5, 2, 1, pooled=False),
    Tiny("fno", "cross_entropy", 2, 4, 1, grid=(2, 2), intercept=False),
    Tiny("self_attention", "squared", 3, 2, 2, intercept=False, ratio=0.1),
    Tiny("mlp", "cross_entropy", 8, 1, 3, c=3, ratio=0.1, seed=1),
]
FAST = [TINY[7], TINY[9], TINY[10], TINY[11]]


@dataclass
class Setting:
    program: Problem
    network: Problem
    branch: Branch
    X: Array

    def solve(self, tol: float = 1e-7) -> Solution:
        return solver_function("factored")(self.program, tol=tol, max_iter=3000, max_rank=None, random_state=0)


def make(case: Tiny, gates: int | None = None) -> Setting:
    """Program and network of a case: with all patterns, or with this number of random gates."""
    rng = np.random.default_rng(case.seed)
    blocks = 2 if case.head == "block_fno" else 1
    X = rng.normal(size=(case.n, case.s, case.d))
    plain = architecture_class(case.head)(case.s, case.d, case.c, case.pooled, case.grid, blocks)
    form, found = plain.form("relu"), []
    for inputs, _ in plain.groups:
        if gates is None:
            found.append(enumerate_gates(form, torch.from_numpy(X[..., inputs])))
        else:
            found.append(torch.from_numpy(rng.normal(size=(gates, *form.u_shape))))
    branch = Branch(
        case.head, "relu", case.s, case.d, case.c, case.pooled, case.grid, blocks, list[torch.Tensor | None](found)
    )
    shape = (case.n, case.c) if case.pooled else (case.n, case.s, case.c)
    targets = make_targets(case.loss, shape, rng)
    if case.loss == "cross_entropy":
        targets = np.eye(case.c)[np.arange(case.n) % case.c] if case.pooled else targets
    program = Problem(
        branch.components(0),
        [torch.from_numpy(X)],
        make_loss(case.loss),
        torch.from_numpy(targets),
        torch.full((case.n,), 1.0 / case.n, dtype=torch.float64),
        1.0,
        case.intercept,
        torch.float64,
    )
    # A few random gates may shut out all of so few tokens: then beta_max is zero, and any beta will do.
    program = program.with_beta(case.ratio * (beta_max(program) or 1.0))
    return Setting(program, program.with_components(branch.network().components(0)), branch, X)


def random_network(network: Problem, m: int, seed: int, scale: float = 0.7) -> Factors:
    """m random ReLU units a channel group."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    units = [Units(draw(m, *c.form.u_shape), draw(m, c.form.value_width, c.width)) for c in network.components]
    return Factors(units, draw(network.outputs) if network.fit_intercept else None)


def objective(case: Tiny, setting: Setting, factors: Factors) -> float:
    """The ReLU network's objective from the definitions, sample by sample: a unit's own weight is its gate."""
    total, width, share = [], case.d // len(factors.units), case.c // len(factors.units)
    for X in setting.X:
        rows = np.zeros((case.s, case.c))
        for b, units in enumerate(factors.units):
            assert units.u is not None
            part = X[:, b * width : (b + 1) * width]
            for u, v in zip(units.u.numpy(), units.v.numpy(), strict=True):
                rows[:, b * share : (b + 1) * share] += DEFINITIONS[case.head](part, u, v, u, case.grid)
        out = rows.mean(0) if case.pooled else rows
        total.append(out if factors.intercept is None else out + factors.intercept.numpy())
    O, Y = np.stack(total), setting.program.targets.numpy()
    if case.loss == "squared":
        entries = 0.5 * np.square(O - Y).sum(-1)
    elif case.loss == "cross_entropy":
        entries = np.log(np.exp(O).sum(-1)) - (Y * O).sum(-1)
    else:
        entries = (np.log1p(np.exp(O)) - Y * O).sum(-1)
    weights = sum(float(t.square().sum()) for units in factors.units for t in units.tensors())
    return float(entries.sum()) / case.n + 0.5 * setting.program.beta * weights


every_fast = pytest.mark.parametrize("case", FAST, ids=str)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_the_network_s_objective_follows_the_definition(case: Tiny) -> None:
    setting = make(case, gates=2)
    factors = random_network(setting.network, 3, 1)
    assert setting.network.value(factors) == pytest.approx(objective(case, setting, factors), rel=1e-12)
    value, gradient = setting.network.value_and_gradient(factors)
    assert value == pytest.approx(objective(case, setting, factors), rel=1e-12)
    x = factors.flat()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    step = 1e-6
    ahead, behind = (setting.network.value(factors.like(x + t * direction)) for t in (step, -step))
    assert float(gradient.flat() @ direction) == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("dense", [True, False], ids=["least cost", "closed form"])
@pytest.mark.parametrize("gates", [None, 5], ids=["all patterns", "sampled"])
@pytest.mark.parametrize("case", [*TINY[:10:2], TINY[11]], ids=str)
def test_the_converted_network_has_the_gated_outputs(
    case: Tiny, gates: int | None, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make(case, gates)
    solution = setting.solve(1e-4)
    if not dense:
        monkeypatch.setattr(network_module, "MOST_ENTRIES", 0)
    found = convert(setting.program, setting.network, solution.factors)
    expected = setting.program.forward(solution.factors, torch.float64)
    assert solution.factors.n_units > 0
    assert float((setting.network.forward(found) - expected).abs().max()) < 1e-6
    assert found.n_units <= 2 * solution.factors.n_units
    assert setting.network.value(found) >= solution.certificate.dual
    for units in found.units:  # balanced, which is the least weight decay
        assert units.u is not None
        torch.testing.assert_close(units.u.flatten(1).norm(dim=1), units.v.flatten(1).norm(dim=1))


def trained(setting: Setting, seeds: int, m: int = 8) -> float:
    """The best objective of networks trained from random starts."""
    values = []
    for seed in range(seeds):
        start = random_network(setting.network, m, seed, 0.3 + 0.7 * (seed % 3) / 2)
        values.append(setting.network.value(refine(setting.network, start, 400)))
    return min(values)


@dataclass
class Row:
    case: Tiny
    bracket: Bracket
    trained: float

    @property
    def best(self) -> float:
        return min(self.bracket.upper, self.trained)

    def widths(self) -> tuple[float, float]:
        """Relative widths of the bracket without and with the cones, against the best network known."""
        return 1 - self.bracket.gated / self.best, 1 - self.bracket.lower / self.best


@cache
def measure(case: Tiny, seeds: int) -> Row:
    setting = make(case)
    solution = setting.solve()
    _, bracket = find_bracket(
        setting.program,
        setting.network,
        solution.factors,
        solution.certificate,
        covers_all_patterns=True,
        bound="cones",
    )
    return Row(case, bracket, trained(setting, seeds))


def check(row: Row) -> None:
    bracket = row.bracket
    assert bracket.proved
    assert bracket.gated <= bracket.lower <= row.best * (1 + 1e-9)
    assert bracket.upper <= bracket.converted
    # What the bracket reports is the unclipped bound, up to rounding.
    assert bracket.relative_width >= 0
    assert row.widths()[1] <= row.widths()[0] + 1e-12


@every_fast
def test_brackets_hold(case: Tiny) -> None:
    row = measure(case, 4)
    check(row)
    assert row.widths()[1] < 0.05


SEEDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY, ids=str)
def test_brackets_hold_against_many_seeds(case: Tiny) -> None:
    check(measure(case, SEEDS))


@pytest.mark.slow
def test_table_of_brackets() -> None:
    rows = [measure(case, SEEDS) for case in TINY]
    print(f"\n{'problem':48} patterns  gated     cones     network   trained   width without  with")
    for row in rows:
        check(row)
        without, with_cones = row.widths()
        b = row.bracket
        print(
            f"{row.case!s:48} {b.n_patterns:8d}  {b.gated:.6f}  {b.lower:.6f}  {b.upper:.6f}  {row.trained:.6f}  "
            f"{without:12.2%}  {with_cones:.2e}"
        )
    assert len(rows) >= 12
    assert {row.case.head for row in rows} == {name for name, cls in ARCHITECTURES.items() if not cls.ridge}
    medians = np.median([row.widths() for row in rows], axis=0)
    print(f"median widths: {medians[0]:.2%} without, {medians[1]:.2e} with the cones")
    assert medians[1] <= 0.05


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
@settings(max_examples=60)
def test_no_network_is_below_the_bound(seed: int, scale: float) -> None:
    setting, bound = _bounded()
    factors = random_network(setting.network, 1 + seed % 6, seed, scale)
    assert setting.network.value(factors) >= bound
    assert setting.network.value(refine(setting.network, factors, 30)) >= bound * (1 - 1e-12)


_HELD: list[tuple[Setting, float]] = []


def _bounded() -> tuple[Setting, float]:
    if not _HELD:
        setting = make(Tiny("fno", "cross_entropy", 5, 2, 1))
        solution = setting.solve()
        bound = cone_bound(setting.program, setting.network, solution.factors, solution.certificate)
        assert bound.proved
        assert bound.value > solution.certificate.dual * 1.01
        _HELD.append((setting, bound.value))
    return _HELD[0]


def test_refinement_only_falls() -> None:
    setting = make(TINY[8])
    factors = random_network(setting.network, 4, 0)
    found = refine(setting.network, factors, 100)
    assert setting.network.value(found) < setting.network.value(factors)
    again = refine(setting.network, found, 100)
    assert setting.network.value(again) <= setting.network.value(found)
    solution = setting.solve(1e-4)
    reread = own_signs(setting.network, solution.factors)
    assert sum(len(units.v) for units in reread.units) <= solution.factors.n_units


def test_units_are_added_where_they_help() -> None:
    """From no unit at all to the optimum, which the cones bound from below."""
    setting, bound = _bounded()
    network = setting.network
    _, intercept = network.null_outputs()
    empty = [
        Units(torch.zeros(0, *c.form.u_shape).double(), torch.zeros(0, 1, c.width).double()) for c in network.components
    ]
    start = Factors(empty, intercept)
    found = extend(network, start)
    assert network.value(found) < network.value(start)
    assert network.value(found) == pytest.approx(bound, rel=1e-3)
    # Every unit that was added is a direction of descent by itself.
    (fresh,) = descending_units(network, start, torch.Generator().manual_seed(1))
    assert fresh.u is not None
    assert len(fresh.v) > 0
    for u, v in zip(fresh.u, fresh.v, strict=True):
        tiny = Factors([Units(1e-3 * u[None], 1e-3 * v[None])], intercept)
        assert network.value(tiny) < network.value(start)


def test_every_loss_has_a_conic_form() -> None:
    assert set(CONJUGATES) == set(LOSSES)


def test_a_branch_with_signs_of_weight_in_a_sum() -> None:
    """Ridge and linear branches beside the ReLU head, weights of branches, samples of weight zero."""
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(6, 2, 2)), rng.normal(size=(6, 2))
    weights = np.array([1.0, 2, 0, 1, 1, 3])
    heads = [{"head": "mlp", "activation": "relu", "gates": "all"}, "linear", {"head": "mixer", "activation": "linear"}]
    model = ConvexHeadRegressor(heads, beta_ratio=0.3, relu_bound="cones", tol=1e-6).fit(X, Y, weights)
    bracket = model.bracket_
    assert bracket is not None
    assert bracket.gated <= bracket.lower <= bracket.upper
    assert bracket.relative_width < 0.05
    module = model.to_module(torch.float64)
    loss = 0.5 * np.square(module(torch.from_numpy(X)).detach().numpy() - Y).sum(1) @ (weights / weights.sum())
    decay = 0.0
    for branch, groups in zip(model._branches, module.branches, strict=True):
        parameters = [p for group in groups for p in group.parameters()]
        decay += 0.5 * model.beta_ * branch.weight * sum(float(p.detach().square().sum()) for p in parameters)
    assert loss + decay == pytest.approx(bracket.upper, rel=1e-9)


# Estimators ------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X8, Y8 = RNG.normal(size=(12, 3, 2)), np.arange(12) % 2


def tiny_data() -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(6, 2, 2)), np.array([0, 1, 0, 1, 1, 0])


def heads() -> Iterator[Any]:
    yield from (name for name, cls in ARCHITECTURES.items() if not cls.ridge)
    yield ["mlp", "linear", {"head": "mixer", "activation": "gated_relu", "gates": 3}]


@pytest.mark.parametrize("head", list(heads()), ids=str)
@pytest.mark.parametrize("pooling", ["mean", None], ids=["pooled", "tokens"])
def test_predictions_are_those_of_the_relu_network(head: Any, pooling: str | None, tmp_path: Path) -> None:
    y = Y8 if pooling else np.add.outer(Y8, np.arange(3)) % 2
    model = ConvexHeadClassifier(
        head, "relu", gates=3, n_blocks=2, pooling=pooling, beta_ratio=0.2, tol=1e-2, max_iter=200
    )
    model.fit(X8, y)
    bracket = model.bracket_
    assert bracket is not None
    assert not bracket.covers_all_patterns
    assert bracket.relative_width == math.inf
    assert "no lower bound        for the ReLU network" in str(bracket)
    assert bracket.upper <= bracket.converted
    module = model.to_module(torch.float64)
    assert isinstance(module, ConvexHead)
    logits = model.logits(X8)
    np.testing.assert_allclose(module(torch.from_numpy(X8)).detach().numpy(), logits, atol=1e-10)
    # The unit's own sign is its mask: units are positively homogeneous in u, and only positively.
    with torch.no_grad():
        for group in module.groups():
            if group.u is not None and group.gates is None and group.form.rectified:
                group.u.mul_(4.0)
                group.v.mul_(0.25)
    np.testing.assert_allclose(module(torch.from_numpy(X8)).detach().numpy(), logits, atol=1e-10)
    # The upper bound is the objective of this very network.
    factors = model.to_module(torch.float64).factors()
    components = [c for i, branch in enumerate(model._branches) for c in branch.network().components(i)]
    targets = torch.from_numpy(np.eye(2)[y])
    weights = torch.full((12,), 1 / 12, dtype=torch.float64)
    tokens = [torch.from_numpy(X8)] * len(model._branches)
    problem = Problem(components, tokens, make_loss("cross_entropy"), targets, weights, model.beta_)  # type: ignore[arg-type]
    assert problem.value(factors, torch.float64) == pytest.approx(bracket.upper, rel=1e-9)

    model.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.bracket_ == bracket
    np.testing.assert_array_equal(loaded.logits(X8), logits)
    assert [block.gate_index for block in loaded.blocks_] == [block.gate_index for block in model.blocks_]


def test_all_patterns_in_the_estimator() -> None:
    X, y = tiny_data()
    model = ConvexHeadClassifier("mlp", "relu", gates="all", relu_bound="cones", beta_ratio=0.2).fit(X, y)
    bracket = model.bracket_
    assert bracket is not None
    assert bracket.covers_all_patterns
    assert bracket.n_patterns == cover_bound(12, 2)
    assert 0 <= bracket.relative_width < 0.05
    assert bracket.gated == pytest.approx(model.certificate_.dual)
    gated = ConvexHeadClassifier("mlp", "relu", gates="all", beta_ratio=0.2).fit(X, y).bracket_
    assert gated is not None
    assert gated.lower == gated.gated < bracket.lower
    # The enumerated gates are at hand for the gated network, too.
    program = ConvexHeadClassifier("mlp", "gated_relu", gates="all", beta_ratio=0.2).fit(X, y)
    assert program.certificate_.primal == pytest.approx(model.certificate_.primal, rel=1e-6)
    assert program.bracket_ is None


def test_blocks_of_a_channel_group_are_enumerated_apart() -> None:
    X, y = tiny_data()
    model = ConvexHeadClassifier("block_fno", "relu", gates="all", n_blocks=2, beta_ratio=0.2).fit(X[:4], y[:4])
    assert model.bracket_ is not None
    assert model.bracket_.covers_all_patterns
    assert model.bracket_.n_patterns == 2 * cover_bound(8, 2)


def test_a_ridge_head_has_no_relu() -> None:
    model = ConvexHeadClassifier("linear", "relu", gates="all").fit(X8, Y8)
    assert model.bracket_ is None
    np.testing.assert_allclose(model.logits(X8), ConvexHeadClassifier("linear").fit(X8, Y8).logits(X8), atol=1e-6)


def test_a_path_over_beta() -> None:
    model = ConvexHeadClassifierCV("mlp", "relu", gates=4, beta_ratios=(0.3, 0.1)).fit(X8, Y8)
    assert model.bracket_ is not None
    np.testing.assert_array_equal(model.predict(X8), model.best_estimator_.predict(X8))
    X, y = tiny_data()
    chosen = ConvexHeadClassifierCV("mlp", "relu", gates="all", beta_ratios=(0.3, 0.1)).fit(X, y)
    assert chosen.bracket_ is not None
    assert chosen.bracket_.covers_all_patterns


def test_certify_takes_the_gated_program_or_refuses() -> None:
    model = ConvexHeadClassifier("mlp", "relu", gates=4, beta_ratio=0.1).fit(X8, Y8)
    assert certify(model, X8, Y8).dual == pytest.approx(model.certificate_.dual, rel=1e-6)
    with pytest.raises(InputError, match="activation: got a module of ReLU units"):
        certify(model.to_module(), X8, Y8)


def test_a_network_is_no_start_for_gated_units() -> None:
    model = ConvexHeadClassifier("mlp", "relu", gates=4, beta_ratio=0.1).fit(X8, Y8)
    with pytest.raises(InputError, match="init: got units without gates"):
        ConvexHeadClassifier("mlp", "gated_relu", gates=4).fit(X8, Y8, init=model.to_module())
    with pytest.raises(InputError, match="init: got units of 4 gates"):
        ConvexHeadClassifier("mlp", "gated_relu", gates=1).fit(X8, Y8, init=model)


def test_export(tmp_path: Path) -> None:
    import onnxruntime

    model = ConvexHeadClassifier("fno", "relu", gates=4, beta_ratio=0.2, tol=1e-2).fit(X8, Y8)
    export_onnx(model.to_module(), tmp_path / "head.onnx", X8.shape[1:])
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"))
    (found,) = session.run(None, {"input": X8.astype(np.float32)})
    np.testing.assert_allclose(found, model.logits(X8), atol=1e-4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    X, y = tiny_data()
    np.savez(tmp_path / "tokens.npz", X=X, y=y)
    arguments = ["fit", str(tmp_path / "tokens.npz"), "--head", "mlp", "--activation", "relu", "--gates", "all"]
    arguments += ["--relu-bound", "cones", "--beta-ratio", "0.2", "--out", str(tmp_path / "m.safetensors"), "--quiet"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "ReLU network found" in shown
    assert "all 24 patterns" in shown


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cvxpy", None)
    X, y = tiny_data()
    with pytest.raises(MissingExtraError, match=r"pip install 'convexheads\[relu\]'"):
        ConvexHeadClassifier("mlp", "relu", gates="all", relu_bound="cones").fit(X, y)


def test_a_failing_conic_solver_leaves_the_gated_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise cvxpy.error.SolverError("no")

    monkeypatch.setattr(cvxpy.Problem, "solve", fail)
    setting = make(TINY[8])
    solution = setting.solve(1e-4)
    bound = cone_bound(setting.program, setting.network, solution.factors, solution.certificate)
    assert bound.value == solution.certificate.dual


def test_gates_without_interior_are_refused() -> None:
    X = np.stack([np.eye(2)[:1], -np.eye(2)[:1], np.eye(2)[1:], np.ones((1, 2))])
    with pytest.raises(InputError, match="gates: got gate 1, which has pre-activations of zero"):
        ConvexHeadClassifier("mlp", "relu", gates=[[0.5, 1.0], [0.0, 1.0]]).fit(X, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (tiny_data()[0], {"beta_ratio": 1.5}),  # the empty head
        (tiny_data()[0], {"beta_ratio": 1.5, "fit_intercept": False}),
        (0.0 * tiny_data()[0], {"beta_ratio": 0.1}),  # one pattern: nothing depends on a weight
        (tiny_data()[0][[0, 0, 1, 1, 2, 2]] * np.array([1, -1, 1, 0, 1, 2.0])[:, None, None], {"beta_ratio": 0.1}),
    ],
    ids=["empty", "empty without intercept", "zero tokens", "repeated, opposite and zero tokens"],
)
def test_degenerate_problems(tokens: Array, options: dict[str, Any]) -> None:
    y = tiny_data()[1]
    model = ConvexHeadClassifier("mlp", "relu", gates="all", relu_bound="cones", **options).fit(tokens, y)
    assert model.bracket_ is not None
    assert 0 <= model.bracket_.relative_width < 1e-3
    assert model.logits(tokens).shape == (6, 2)
