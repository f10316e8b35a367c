"""Explanations against their definitions: spectra, truncation, energies, classifiers, clusters, figures, command."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline

from convexheads import ConvexHeadClassifier, ConvexHeadRegressor
from convexheads.commands import explain as command
from convexheads.errors import InputError, MissingExtraError
from convexheads.explain import (
    cluster_directions,
    cluster_recovery,
    cluster_tokens,
    effective_classifiers,
    figures,
    gate_sparsity,
    latent_energies,
    planted_clusters,
    spectra,
    token_classifiers,
    token_contributions,
    truncate,
    truncation_curve,
)
from convexheads.tokens import TokenStore
from convexheads.tokens.transforms import AppendConstant, ChainTransforms, PCATokens, SelectTokens

N, S, D, C = 40, 6, 4, 4
HEADS = [
    ("self_attention", "linear"),
    ("self_attention", "gated_relu"),
    ("mixer", "linear"),
    ("mixer", "gated_relu"),
    ("fno", "linear"),
    ("fno", "gated_relu"),
    ("fno2d", "gated_relu"),
    ("block_fno", "gated_relu"),
    ("mlp", "linear"),
    ("mlp", "gated_relu"),
    ("linear", "linear"),
]
OWN = [pair for pair in HEADS if pair[0] in ("self_attention", "mlp", "linear")]


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, S, D))
    # Second-order structure, so that every head has something to find.
    y = np.digitize(X[:, 0, 0] + (X[:, :, 1] * X[:, :, 2]).mean(1), [-0.8, 0.0, 0.8])
    return X, y


@functools.cache
def fitted(head: str, activation: str, pooling: str | None = "mean", kind: str = "classifier") -> Any:
    """A fitted float64 estimator; ``fno2d`` is an FNO on a 2 x 3 grid."""
    X, y = data()
    options: dict[str, Any] = {
        "head": "fno" if head == "fno2d" else head,
        "activation": activation,
        "gates": 3,
        "grid": (2, 3) if head == "fno2d" else None,
        "n_blocks": 2,
        "pooling": pooling,
        "beta_ratio": 0.1,
        "tol": 1e-6,
        "dtype": "float64",
    }
    if pooling is None:
        y = np.repeat(y[:, None], S, 1)
    if kind == "regressor":
        target = np.stack([X[:, 0, 0] * X[:, 1, 1], X.mean((1, 2)), X[:, 2, 3], X[:, 0, 1]], 1)
        return ConvexHeadRegressor(**options).fit(X, target)
    return ConvexHeadClassifier(**options).fit(X, y)


# Spectra and truncation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "activation"), HEADS)
def test_spectra(head: str, activation: str) -> None:
    model = fitted(head, activation)
    found = spectra(model)
    assert len(found) == len(model.blocks_)
    for spectrum, block in zip(found, model.blocks_, strict=True):
        values = np.linalg.svd(block.Z, compute_uv=False)[: len(block.u)]
        np.testing.assert_allclose(spectrum.singular_values, values, atol=1e-12)
        assert spectrum.nuclear_norm == pytest.approx(values.sum())
        assert 0 <= spectrum.effective_rank <= len(values) + 1e-9
        assert head.split("2")[0] in str(spectrum)
    # What the blocks add is what is in the objective beside the loss.
    X, y = data()
    logits = model.decision_function(X)
    loss = -(logits[np.arange(N), y] - np.log(np.exp(logits).sum(1))).mean()
    assert loss + sum(each.penalty for each in found) == pytest.approx(model.certificate_.primal, rel=1e-8)
    if head == "linear":
        assert found[0].share is None
    else:
        assert sum(each.share for each in found) == pytest.approx(1.0)
    json.dumps([each.as_dict() for each in found])


def test_effective_rank_of_known_spectra() -> None:
    from convexheads.explain.spectra import effective_number

    assert effective_number([2.0, 2.0, 2.0]) == pytest.approx(3.0)
    assert effective_number([1.0, 0.0]) == pytest.approx(1.0)
    assert effective_number([]) == effective_number([0.0, 0.0]) == 0.0


def test_gate_sparsity() -> None:
    (found,) = gate_sparsity(fitted("mlp", "gated_relu"))
    assert found.shares.shape == (3,)
    assert found.shares.sum() == pytest.approx(1.0)
    assert 1 <= found.effective <= found.active <= 3
    assert len(gate_sparsity(fitted("block_fno", "gated_relu"))) == 2
    assert gate_sparsity(fitted("mlp", "linear")) == []


def objective(model: Any, factors: Any) -> tuple[float, float]:
    """(loss, penalty) of factors of a classifier on its training data, from the definition."""
    from convexheads.heads import ConvexHead, canonical_blocks

    X, y = data()
    with torch.no_grad():
        logits = ConvexHead(model._branches, factors, torch.float64)(torch.from_numpy(X)).numpy()
    loss = -(logits[np.arange(N), y] - np.log(np.exp(logits).sum(1))).mean()
    components = [c for index, branch in enumerate(model._branches) for c in branch.components(index)]
    blocks = canonical_blocks(components, factors)
    return float(loss), float(model.beta_ * sum(block.singular_values.sum() for block in blocks))


@pytest.mark.parametrize(("head", "activation"), [pair for pair in HEADS if pair[0] != "linear"])
def test_truncation_keeps_the_largest_and_its_bounds_hold(head: str, activation: str) -> None:
    model = fitted(head, activation)
    X, _ = data()
    sizes = np.sort(np.concatenate([block.singular_values for block in model.blocks_]))[::-1]
    curve = truncation_curve(model)
    assert curve.shape == (len(sizes) + 1,)
    assert curve[-1] == 0.0
    loss, penalty = objective(model, model._factors)
    for heads in range(len(sizes) + 1):
        cut = truncate(model, heads, X)
        assert (cut.kept, cut.removed) == (heads, len(sizes) - heads)
        assert cut.tail == pytest.approx(sizes[heads:].sum(), abs=1e-12)
        assert cut.first_order == pytest.approx(curve[heads], abs=1e-12)
        new_loss, new_penalty = objective(model, cut.factors)
        kept = np.concatenate([np.zeros(0), sizes[:heads]])
        assert new_penalty == pytest.approx(model.beta_ * kept.sum(), abs=1e-10)
        # The penalty falls by beta |T| exactly; the loss rises by at least that (up to the gap), so that the objective
        # rises, and by no more than the bound.
        assert penalty - new_penalty == pytest.approx(cut.first_order, abs=1e-10)
        rise = new_loss + new_penalty - loss - penalty
        assert rise >= -model.certificate_.gap - 1e-12
        assert cut.objective_rise is not None
        assert rise <= cut.objective_rise + 1e-10
        # At the optimum the bound is exact.
        assert rise == pytest.approx(cut.objective_rise, rel=1e-2, abs=10 * model.certificate_.gap)
    whole = truncate(model, 10**6).module()
    with torch.no_grad():
        np.testing.assert_allclose(whole(torch.from_numpy(X)).numpy(), model.decision_function(X), atol=1e-9)


def test_the_rise_of_the_loss_is_beta_times_the_tail_to_first_order() -> None:
    # Shrinking the smallest head by a factor 1 - t removes t of its size; the loss rises by beta t sigma + O(t^2).
    from convexheads.types import Factors, Units

    model = fitted("self_attention", "linear")
    loss, _ = objective(model, model._factors)
    block = model.blocks_[0]
    sigma = block.singular_values[-1]
    errors = []
    for t in (0.2, 0.1, 0.05):
        scale = np.ones(len(block.u))
        scale[-1] = (1 - t) ** 0.5
        u, v = (torch.from_numpy(each * scale[:, None]) for each in (block.u, block.v))
        units = Units(u.view(-1, D, D), v.view(-1, D, C))
        new, _ = objective(model, Factors([units], model._factors.intercept))
        errors.append(abs((new - loss) / (model.beta_ * t * sigma) - 1))
    assert errors[-1] < 0.05
    assert errors[0] > errors[1] > errors[2]


def test_truncation_of_sums_and_regressors() -> None:
    X, y = data()
    view = ChainTransforms([PCATokens(3), AppendConstant()])
    model = ConvexHeadClassifier(head=[{"head": "mlp", "view": view}, "linear"], beta_ratio=0.05).fit(X, y)
    cut = truncate(model, 0, X, sample_weight=np.ones(N))
    assert cut.kept == 0
    # The ridge branch stays whole.
    logits = model.intercept_ + X.mean(1) @ model.blocks_[1].Z
    np.testing.assert_allclose(cut.module()(torch.from_numpy(X).float()).detach().numpy(), logits, atol=1e-5)
    regressor = fitted("mlp", "linear", kind="regressor")
    residual = X.mean(1) @ (regressor.blocks_[0].u[1:].T @ regressor.blocks_[0].v[1:])
    expected = 0.5 * (residual**2).sum(1).mean()
    assert truncate(regressor, 1, X).objective_rise == pytest.approx(expected, rel=1e-4)
    assert truncate(fitted("self_attention", "gated_relu", None), 2, X).objective_rise > 0
    for bad in (-1, 1.5, True):
        with pytest.raises(InputError, match="heads"):
            truncate(model, bad)
    with pytest.raises(InputError, match="sample_weight"):
        truncate(model, 1, X, sample_weight=np.ones(3))


def test_only_fitted_heads_are_explained() -> None:
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        spectra(ConvexHeadClassifier())
    with pytest.raises(InputError, match="got PCATokens"):
        spectra(PCATokens(2))
    with pytest.raises(InputError, match="tol"):
        spectra(fitted("mlp", "linear"), tol=-1)


# Latent energies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "activation"), HEADS)
def test_energies_against_the_blocks(head: str, activation: str) -> None:
    model = fitted(head, activation)
    found = latent_energies(model, per_gate=True)
    assert len(found) == len(model.blocks_)
    for each, block in zip(found, model.blocks_, strict=True):
        Z = block.Z
        if head == "self_attention":
            expected = np.sqrt((Z.reshape(D, D, D, C) ** 2).sum((0, 3)))
        elif head == "mixer":
            expected = np.linalg.norm(Z, axis=1).reshape(S, S)
        elif head in ("mlp", "linear"):
            expected = np.linalg.norm(Z, axis=1)
        else:
            shape = (2, 3) if head == "fno2d" else (S,)
            filters = Z.reshape(*shape, -1)
            expected = np.sqrt((filters**2).sum(-1))
            axes = tuple(range(len(shape)))
            spectrum = np.fft.fftn(filters, axes=axes, norm="ortho")
            np.testing.assert_allclose(each.frequencies, np.sqrt((np.abs(spectrum) ** 2).sum(-1)), atol=1e-10)
            assert (each.frequencies**2).sum() == pytest.approx((Z**2).sum(), abs=1e-12)
        np.testing.assert_allclose(each.values, expected, atol=1e-7)
        assert (each.values**2).sum() == pytest.approx((Z**2).sum(), abs=1e-12)
    together = latent_energies(model)
    assert len(together) == (2 if head == "block_fno" else 1)
    total = sum((each.values**2).sum() for each in found)
    assert sum((each.values**2).sum() for each in together) == pytest.approx(total)
    place, share = together[0].top(1)[0]
    assert together[0].values[place] == together[0].values.max()
    assert 0 < share <= 1


def test_energies_find_the_features_that_matter() -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((300, 5, 4))
    y = (X[:, :, 1] * X[:, :, 3]).mean(1) > 0
    X = np.concatenate([X, np.ones((300, 5, 1))], 2)
    model = ConvexHeadClassifier(beta_ratio=0.2).fit(X, y)
    places = [place for place, _ in latent_energies(model)[0].top(2)]
    # With a constant feature, the covariance of features 1 and 3 is read from G at these places.
    assert set(places) == {(1, 3), (3, 1)}


# Effective classifiers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "activation"), OWN)
@pytest.mark.parametrize("pooling", ["mean", None])
def test_classifiers_give_the_outputs(head: str, activation: str, pooling: str | None) -> None:
    model = fitted(head, activation, pooling)
    X, _ = data()
    phi = effective_classifiers(model, X)
    assert phi.shape == (N, S, D, C)
    rows = np.einsum("npd,npdc->npc", X, phi)
    outputs = (rows.mean(1) if pooling else rows) + model.intercept_
    np.testing.assert_allclose(outputs, model.decision_function(X), atol=1e-6)
    np.testing.assert_allclose(token_contributions(model, X), rows, atol=1e-10)
    one = token_classifiers(model, X[3])
    np.testing.assert_allclose(one.phi, phi[3], atol=1e-12)
    np.testing.assert_allclose(one.evidence, rows[3], atol=1e-12)


def test_classifiers_by_the_formula() -> None:
    model = fitted("self_attention", "gated_relu")
    x = data()[0][0]
    expected = np.zeros((S, D, C))
    for block in model.blocks_:
        M = (x @ block.gate @ x.T >= 0).astype(float)
        G = np.einsum("pq,qk,ql->pkl", M, x, x)
        expected += np.einsum("pkl,aklb->pab", G, block.Z.reshape(D, D, D, C))
    np.testing.assert_allclose(token_classifiers(model, x).phi, expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
@pytest.mark.parametrize(("head", "activation"), HEADS)
def test_contributions_add_up(head: str, activation: str, kind: str) -> None:
    model = fitted(head, activation, kind=kind)
    X, _ = data()
    found = token_contributions(model, X[:9])
    assert found.shape == (9, S, C)
    outputs = model.decision_function(X[:9]) if kind == "classifier" else model.predict(X[:9])
    np.testing.assert_allclose(found.mean(1) + model.intercept_, outputs, atol=1e-6)
    np.testing.assert_allclose(token_contributions(model, X[2])[0], found[2], atol=1e-12)


def test_contribution_of_a_mixer_token_is_what_it_alone_gives() -> None:
    model = fitted("mixer", "linear")
    X, _ = data()
    alone = np.zeros((S, S, D))
    alone[np.arange(S), np.arange(S)] = X[0]
    expected = S * (model.decision_function(alone) - model.intercept_)
    np.testing.assert_allclose(token_contributions(model, X[0])[0], expected, atol=1e-9)


@pytest.mark.parametrize("head", ["mixer", "fno", "block_fno"])
def test_mixing_heads_have_no_classifiers(head: str) -> None:
    model = fitted(head, "gated_relu")
    with pytest.raises(InputError, match=f"got '{head}'.*expected a head among.*token_contributions"):
        token_classifiers(model, data()[0][0])
    with pytest.raises(InputError, match="token_contributions"):
        cluster_tokens(model, data()[0][0])


def test_tokens_with_equal_gate_rows_share_their_classifier_exactly() -> None:
    X, _ = data()
    X = X.copy()
    X[0, 4] = 2.5 * X[0, 1]  # the same signs against everything
    for head in ("self_attention", "mlp"):
        found = token_classifiers(fitted(head, "gated_relu"), X[0])
        assert found.pattern[4] == found.pattern[1]
        assert (found.phi[4] == found.phi[1]).all()
        for i in range(S):
            same = found.pattern == found.pattern[i]
            assert (found.phi[same] == found.phi[i]).all()
        assert found.pattern[0] == 0
        assert 1 < found.pattern.max() + 1 < S
        labels = cluster_tokens(fitted(head, "gated_relu"), X[0], 2).labels
        assert all(len(set(labels[found.pattern == value])) == 1 for value in found.pattern)
    found = token_classifiers(fitted("self_attention", "linear"), X[0])
    assert (found.pattern == 0).all()
    assert (found.phi == found.phi[0]).all()


def test_sums_of_heads_views_and_pipelines() -> None:
    X, y = data()
    plain = ConvexHeadClassifier(
        head=["self_attention", "linear"], activation="gated_relu", gates=2, beta_ratio=0.05, dtype="float64"
    ).fit(X, y)
    rows = np.einsum("npd,npdc->npc", X, effective_classifiers(plain, X))
    np.testing.assert_allclose(rows.mean(1) + plain.intercept_, plain.decision_function(X), atol=1e-6)
    parts = [token_contributions(plain, X, branch) for branch in (0, -1)]
    np.testing.assert_allclose(sum(parts), token_contributions(plain, X), atol=1e-12)
    with pytest.raises(InputError, match="branch: got 2"):
        token_classifiers(plain, X[0], 2)

    view = ChainTransforms([PCATokens(3), AppendConstant()])
    sees = [{"head": "mlp", "view": view}, {"head": "linear", "view": SelectTokens(slice(1, None))}]
    viewed = ConvexHeadClassifier(head=sees, beta_ratio=0.05).fit(X, y)
    assert token_classifiers(viewed, X[0], 0).phi.shape == (S, 4, C)
    assert token_classifiers(viewed, X[0], 1).phi.shape == (S - 1, D, C)
    with pytest.raises(InputError, match="views of their own"):
        token_classifiers(viewed, X[0])
    with pytest.raises(InputError, match="on 5, 6 tokens"):
        token_contributions(viewed, X)
    total = sum(token_contributions(viewed, X, branch).mean(1) for branch in (0, 1))
    np.testing.assert_allclose(total + viewed.intercept_, viewed.decision_function(X), atol=1e-5)

    piped = make_pipeline(PCATokens(3), AppendConstant(), ConvexHeadClassifier(head="mlp", beta_ratio=0.05)).fit(X, y)
    assert spectra(piped)[0].rank > 0
    found = token_contributions(piped, X).mean(1) + piped[-1].intercept_
    np.testing.assert_allclose(found, piped.decision_function(X), atol=1e-5)


def test_wrong_tokens_are_told() -> None:
    X, _ = data()
    model = fitted("mlp", "gated_relu")
    with pytest.raises(InputError, match="one sample"):
        token_classifiers(model, X[:2])
    with pytest.raises(InputError, match="tokens a sample"):
        token_contributions(model, X[:, :3])
    with pytest.raises(InputError, match="features"):
        token_contributions(model, X[..., :3])


# Clusters -----------------------------------------------------------------------------------------------------


def directions(counts: tuple[int, ...], noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(len(counts)), counts)
    centres = np.linalg.qr(rng.standard_normal((8, len(counts))))[0].T
    lengths = np.exp(rng.standard_normal((len(truth), 1)))  # cosine distance must not see these
    return lengths * (centres[truth] + noise * rng.standard_normal((len(truth), 8))), truth


@pytest.mark.parametrize("method", ["agglomerative", "kmeans"])
def test_clusters_of_directions(method: str) -> None:
    V, truth = directions((9, 30, 12))
    for count in (3, None):
        found = cluster_directions(V, count, method=method)
        assert found.n_clusters == 3
        assert found.sizes == [30, 12, 9]
        # Numbered by size.
        np.testing.assert_array_equal(found.labels, np.array([2, 0, 1])[truth])
        assert found.silhouette > 0.9
        assert found.method == method


def test_clusters_at_the_edges() -> None:
    same = np.ones((5, 3)) * np.arange(1, 6)[:, None]
    found = cluster_directions(same)
    assert (found.n_clusters, found.silhouette, found.distinct) == (1, None, 1)
    with pytest.raises(InputError, match="at most 1, the number of distinct"):
        cluster_directions(same, 2)
    assert cluster_directions(np.ones((1, 3))).labels.tolist() == [0]
    assert cluster_directions(np.zeros((4, 3))).n_clusters == 1
    mixed = cluster_directions(np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), 2)
    assert mixed.labels.tolist() == [0, 1, 1, 0]
    for bad in ({"n_clusters": 0}, {"max_clusters": 0}, {"method": "best"}, {"n_clusters": True}):
        with pytest.raises(InputError, match=next(iter(bad))):
            cluster_directions(same, **bad)
    for wrong in (np.ones(3), np.full((2, 2), np.nan), np.ones((0, 2))):
        with pytest.raises(InputError, match="vectors"):
            cluster_directions(wrong)


def test_planted_clusters_are_found_by_classifiers_and_not_by_tokens() -> None:
    train, test = planted_clusters(), planted_clusters(60, draw=1)
    assert train.X.shape == (400, 12, 6)
    np.testing.assert_array_equal(train.classifiers, test.classifiers)
    model = ConvexHeadClassifier(head="mlp", activation="gated_relu", gates=16, beta_ratio=0.05, tol=1e-2)
    model.fit(train.X, train.y)
    assert model.score(test.X, test.y) > 0.75
    found = cluster_recovery(model, test.X, test.clusters)
    assert found.classifiers > 0.7
    assert abs(found.tokens) < 0.1
    chosen = cluster_tokens(model, test.X)
    assert chosen.labels.shape == (60, 12)
    assert chosen.n_clusters == 2
    with pytest.raises(InputError, match="clusters: got shape"):
        cluster_recovery(model, test.X, test.clusters[:, :3])
    with pytest.raises(InputError, match="n_clusters"):
        planted_clusters(n_clusters=1)


# Figures ------------------------------------------------------------------------------------------------------


def drawn(figure: Any) -> bytes:
    data = figures.figure_bytes(figure, dpi=40)
    assert data.startswith(b"\x89PNG")
    return data


@pytest.mark.parametrize(("head", "activation"), HEADS)
def test_figures_of_every_head(head: str, activation: str) -> None:
    model = fitted(head, activation)
    drawn(figures.spectrum_figure(model))
    drawn(figures.energies_figure(model, names=[str(i) for i in range(D)]))
    drawn(figures.history_figure(model, tol=1e-3))


@pytest.mark.parametrize("head", ["self_attention", "mixer", "fno", "block_fno", "mlp"])
def test_an_empty_head(head: str) -> None:
    X, y = data()
    model = ConvexHeadClassifier(head=head, activation="gated_relu", gates=2, n_blocks=2, beta_ratio=2.0).fit(X, y)
    assert sum(each.rank for each in spectra(model)) == 0
    assert all(each.active == 0 for each in gate_sparsity(model))
    assert all((each.values == 0).all() for each in latent_energies(model))
    assert (token_contributions(model, X) == 0).all()
    assert truncate(model, 3, X).objective_rise == 0
    drawn(figures.spectrum_figure(model))
    drawn(figures.energies_figure(model))


def test_figures_of_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 7))
    images = [rng.integers(0, 255, (12, 18, 3), dtype=np.uint8), rng.random((12, 18))]
    same = {"titles": ["one", "two"], "title": "both"}
    drawn(figures.clusters_figure(labels, (2, 3), images, **same))
    drawn(figures.clusters_figure(labels[0], (2, 3)))
    drawn(figures.clusters_figure(np.arange(12), (3, 4), [None]))
    evidence = rng.standard_normal((2, 7, 2))
    drawn(figures.evidence_figure(evidence, (2, 3), images, names=[["a", "b"], ["b", "a"]], **same))
    drawn(figures.evidence_figure(np.zeros((1, 6)), (2, 3)))
    drawn(figures.history_figure({"a": {"objective": [2, 1], "gap": [0.1, 0.0], "seconds": [0, 1]}}))
    course = {"objective": [2, 1], "gap": [0.1, float("inf")], "seconds": [0.1, 1]}
    several = figures.history_figure({"one": course, "seeds": [course, course]}, tol=0.01, log_time=True)
    objective, gaps = several.axes
    assert [line.get_color() for line in objective.lines[1:]] == [figures.PALETTE[1]] * 2
    assert [text.get_text() for text in several.legends[0].texts] == ["one", "seeds"]
    assert gaps.get_xscale() == "log"
    drawn(several)
    with pytest.raises(InputError, match="grid: got 3 x 3"):
        figures.clusters_figure(labels, (3, 3))
    with pytest.raises(InputError, match="images: got 2"):
        figures.clusters_figure(labels[0], (2, 3), images)
    with pytest.raises(InputError, match="images: got shape"):
        figures.clusters_figure(labels[0], (2, 3), [np.zeros((2, 2, 7))])
    with pytest.raises(InputError, match="evidence"):
        figures.evidence_figure(np.zeros(6), (2, 3))
    with pytest.raises(InputError, match="empty list"):
        figures.energies_figure([])
    figure = figures.clusters_figure(labels, (2, 3))
    for name in ("a.png", "a.svg", "a.pdf"):
        first = figures.save_figure(figure, tmp_path / name).read_bytes()
        assert figures.save_figure(figure, tmp_path / name).read_bytes() == first
    with pytest.raises(InputError, match="format"):
        figures.save_figure(figure, tmp_path / "a.gif")


def test_patches_lie_where_the_layout_says() -> None:
    np.testing.assert_array_equal(figures.on_grid(np.arange(7), (2, 3)), [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(figures.on_grid(np.arange(7), (2, 3), 0), [[0, 1, 2], [3, 4, 5]])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name="matplotlib")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"convexheads\[plots\]"):
        figures.history_figure(fitted("mlp", "linear"))


# The command --------------------------------------------------------------------------------------------------


def explain(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(words)))


def test_command_without_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted("mixer", "gated_relu").save(tmp_path / "model.safetensors")
    assert explain(str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out")) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "spectrum.png",
        "energies.png",
        "history.png",
        "explanation.json",
    }
    found = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert found["rank"] == fitted("mixer", "gated_relu").rank_
    assert "samples" not in found
    assert "above the global optimum" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["self_attention", "mixer"])
def test_command_with_tokens(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    X, y = data()
    cls = X.mean(1, keepdims=True)
    tokens = np.concatenate([cls, X], 1)
    TokenStore.write(
        tmp_path / "tokens" / "test",
        tokens,
        y,
        class_names=["a", "b", "c", "d"],
        layout={"cls": [0, 1], "patch": [1, S + 1]},
        grid=(2, 3),
        dtype="float32",
        split="test",
    )
    model = ConvexHeadClassifier(head=head, activation="gated_relu", gates=3, beta_ratio=0.1).fit(X, y)
    model.save(tmp_path / "model.safetensors")
    out = tmp_path / "out"
    words = [str(tmp_path / "model.safetensors"), str(tmp_path / "tokens"), "--out", str(out), "--samples", "3"]
    assert explain(*words, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "explanation.json").read_text())
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        logits = model.decision_function(X[sample["row"]][None])[0]
        np.testing.assert_allclose(sample["logits"], logits, atol=1e-4)
        assert sample["predicted"] == "abcd"[logits.argmax()]
        assert sample["true"] == "abcd"[y[sample["row"]]]
        mean = np.mean(sample["evidence"][sample["predicted"]])
        assert mean + model.intercept_[logits.argmax()] == pytest.approx(logits.max(), abs=1e-4)
        assert ("clusters" in sample) == (head == "self_attention")
    assert (out / "evidence.png").exists()
    assert (out / "clusters.png").exists() == (head == "self_attention")
    assert bool(found["notes"]) == (head == "mixer")


def test_command_over_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convexheads.datasets import load_dataset

    source = load_dataset("digits", "test", limit=30)
    pixels = np.stack([np.asarray(source.image(i).convert("L")) for i in range(30)]).astype(float) / 255
    tokens = pixels.reshape(30, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(30, 16, 4)
    store = TokenStore.write(tmp_path / "store", tokens, source.labels, grid=(4, 4), dtype="float32", split="test")
    model = ConvexHeadClassifier(head="mlp", activation="gated_relu", gates=4, beta_ratio=0.1).fit(store, store.labels)
    model.save(tmp_path / "model.safetensors")
    words = [str(tmp_path / "model.safetensors"), str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="not those of"):
        explain(*words, "--images", "digits")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    from convexheads.tokens.store import store_key

    manifest["dataset"] = source.fingerprint
    manifest["transform"] = {"resolution": 14, "fit": "crop", "crop": 1.0, "interpolation": "bicubic"}
    manifest["key"] = store_key(manifest)
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    assert explain(*words, "--images", "digits", "--samples", "4", "--clusters", "2") == 0
    assert "clusters.png" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert all(len(sample["clusters"]["sizes"]) == 2 for sample in found["samples"])
    with pytest.raises(InputError, match="expected STORE"):
        explain(words[0], "--out", words[3], "--images", "digits")


def test_command_on_wrong_tokens(tmp_path: Path) -> None:
    X, y = data()
    fitted("mlp", "linear").save(tmp_path / "model.safetensors")
    np.savez(tmp_path / "other.npz", X=X[:, :2], y=y)
    with pytest.raises(InputError, match="2 tokens of 4 features"):
        explain(str(tmp_path / "model.safetensors"), str(tmp_path / "other.npz"), "--out", str(tmp_path))
    np.savez(tmp_path / "same.npz", X=X, y=y)
    explain(str(tmp_path / "model.safetensors"), str(tmp_path / "same.npz"), "--out", str(tmp_path / "out"))
    notes = json.loads((tmp_path / "out" / "explanation.json").read_text())["notes"]
    assert notes == [
        "no evidence map: the tokens of the head are not the patches of a grid",
        "no cluster map: the tokens of the head are not the patches of a grid",
    ]
