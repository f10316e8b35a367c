"""The estimators: scikit-learn's own checks, every kind of input and target, and what two fits must share."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import convexheads
from convexheads import ConvexHeadClassifier, ConvexHeadRegressor, estimators, memory
from convexheads.certificate import certify_factors
from convexheads.errors import InputError, NotConvergedWarning
from convexheads.tokens.store import TokenStore
from convexheads.tokens.transforms import MeanToken, PCATokens, StandardizeTokens

Model = ConvexHeadClassifier | ConvexHeadRegressor

# --------------------------------------------------------------------------------------------------
# scikit-learn's checks


@pytest.mark.parametrize(
    "estimator",
    [
        ConvexHeadClassifier(),
        ConvexHeadRegressor(),
        ConvexHeadClassifier(head="mlp", activation="gated_relu", gates=4),
        ConvexHeadClassifier(head="linear", solver="fista"),
        ConvexHeadRegressor(head=["linear", "mlp"], solver="fista"),
        ConvexHeadClassifier(head="mlp", solver="lbfgs"),
        ConvexHeadRegressor(head="linear", solver="adamw", solver_options={"learning_rates": (0.1,), "epochs": 20}),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore::convexheads.errors.NotConvergedWarning")
def test_scikit_learn_checks(estimator: Model) -> None:
    results = check_estimator(estimator, on_skip=None)
    assert len(results) > 50
    # What scikit-learn leaves out must be for want of another package, not of ours.
    skipped = {result["check_name"]: str(result["exception"]) for result in results if result["status"] == "skipped"}
    for name, reason in skipped.items():
        assert "pandas is not installed" in reason or "SCIPY_ARRAY_API" in reason, f"{name}: {reason}"


def test_scores_on_plain_vectors() -> None:
    """The tag poor_score of the mixing heads switches scikit-learn's thresholds off: here they are, nonetheless."""
    X, y = make_blobs(n_samples=300, random_state=0)
    X = StandardScaler().fit_transform(X)
    for head in ("self_attention", "mlp", "linear"):
        assert ConvexHeadClassifier(head=head).fit(X, y).score(X, y) > 0.83


def test_parameters_are_those_of_the_documentation() -> None:
    """Names, order and defaults that other people's code relies on."""
    expected = {
        "head": "self_attention",
        "activation": "linear",
        "gates": 16,
        "grid": None,
        "n_blocks": 4,
        "pooling": "mean",
        "beta": None,
        "beta_ratio": 0.02,
        "fit_intercept": True,
        "tol": 1e-3,
        "max_iter": 2000,
        "max_rank": None,
        "solver": "factored",
        "random_state": 0,
        "device": None,
        "dtype": "float32",
        "verbose": 0,
    }
    for cls in (ConvexHeadClassifier, ConvexHeadRegressor):
        found = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        assert {name: found[name] for name in expected} == expected
        assert list(found)[: len(expected)] == list(expected)
        assert all(f"{name} :" in inspect.getdoc(ConvexHeadClassifier) for name in found)
    assert {"ConvexHeadClassifier", "ConvexHeadRegressor", "certify", "load"} <= set(convexheads.__all__)


# --------------------------------------------------------------------------------------------------
# Data


def planted(n: int = 40, s: int = 6, d: int = 4, c: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose class shifts the mean token and the covariance: float32 values, so that no container rounds."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % c
    scale, mean = rng.uniform(0.5, 1.5, (c, d)), rng.normal(size=(c, d))
    X = rng.normal(size=(n, s, d)) * scale[y][:, None] + 0.5 * mean[y][:, None]
    return X.astype(np.float32).astype(np.float16).astype(np.float64), y


def same(a: Any, b: Any, tol: float = 1e-7) -> None:
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def test_fitted_attributes() -> None:
    X, y = planted()
    model = ConvexHeadClassifier(activation="gated_relu", gates=3, random_state=1).fit(X, y)
    n, s, d = X.shape
    assert (model.n_features_in_, model.n_tokens_in_) == (d, s)
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.beta_ == pytest.approx(0.02 * model.beta_max_)
    assert model.intercept_.shape == (3,)
    assert model.n_iter_ >= 1
    assert {len(model.history_[key]) for key in ("objective", "gap", "seconds", "rank")} == {len(model.history_["gap"])}
    certificate = model.certificate_
    assert certificate.certified
    assert 0 <= certificate.relative_gap <= 1e-3
    assert certificate.gap == certificate.primal - certificate.dual
    assert certificate.beta == model.beta_
    assert certificate.sigma_max.lower <= certificate.sigma_max.upper
    assert isinstance(certificate.sigma_max.method, str)
    assert len(model.blocks_) == 3
    assert model.rank_ == sum(len(block.singular_values) for block in model.blocks_) > 0
    for block in model.blocks_:
        r = len(block.singular_values)
        assert block.u.shape == (r, d * d)
        assert block.v.shape == (r, d * 3)
        assert block.gate.shape == (d, d)
    assert model.predict(X).shape == (n,)
    assert model.predict_proba(X).shape == model.decision_function(X).shape == model.logits(X).shape == (n, 3)
    same(model.predict_proba(X).sum(1), 1.0)
    np.testing.assert_array_equal(model.predict(X), model.decision_function(X).argmax(1))
    assert model.score(X, y) == accuracy_score(y, model.predict(X)) > 0.9
    unfitted = clone(model)
    for name in ("blocks_", "rank_", "intercept_"):
        with pytest.raises(NotFittedError):
            getattr(unfitted, name)
    bare = ConvexHeadClassifier(fit_intercept=False).fit(X, y)
    assert bare.intercept_ is None


def test_two_classes() -> None:
    X, y = planted(c=2)
    model = ConvexHeadClassifier().fit(X, y)
    assert model.decision_function(X).shape == model.logits(X).shape == (len(X), 2)
    # On vectors, scikit-learn's convention for two classes holds.
    flat = ConvexHeadClassifier(head="mlp").fit(X[:, 0], y)
    margin, logits = flat.decision_function(X[:, 0]), flat.logits(X[:, 0])
    assert margin.shape == (len(X),)
    same(margin, logits[:, 1] - logits[:, 0])
    np.testing.assert_array_equal(flat.predict(X[:, 0]), (margin > 0).astype(int))


def test_vectors_are_one_token() -> None:
    X, y = planted(s=1)
    for head in ("self_attention", "mixer", "fno", "mlp", "linear"):
        flat, tokens = ConvexHeadClassifier(head=head).fit(X[:, 0], y), ConvexHeadClassifier(head=head).fit(X, y)
        same(flat.predict_proba(X[:, 0]), tokens.predict_proba(X))
        same(flat.predict_proba(X), tokens.predict_proba(X[:, 0]))
        assert (flat.n_tokens_in_, flat.n_features_in_) == (1, X.shape[2])


def test_data_frames() -> None:
    """Column names are remembered and compared; a pyarrow table is what every environment of the tests has."""
    X, y = planted(s=1)

    def frame(names: str) -> pa.Table:
        return pa.table({name: X[:, 0, i] for i, name in enumerate(names)})

    model = ConvexHeadClassifier(head="mlp").fit(frame("abcd"), y)
    assert list(model.feature_names_in_) == list("abcd")
    plain = ConvexHeadClassifier(head="mlp").fit(X[:, 0], y)
    same(model.predict_proba(frame("abcd")), plain.predict_proba(X[:, 0]))
    assert not hasattr(plain, "feature_names_in_")
    with pytest.raises(ValueError, match="feature names should match those that were passed during fit"):
        model.predict(frame("abdc"))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(X[:, 0])


def containers(X: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same tokens in everything that the estimators read."""
    file = np.lib.format.open_memmap(folder / "X.npy", "w+", np.float32, X.shape)
    file[:] = X
    file.flush()
    wide = np.zeros((len(X), X.shape[1], 2 * X.shape[2]))
    wide[..., ::2] = X
    return {
        "float32": X.astype(np.float32),
        "float16": X.astype(np.float16),
        "fortran order": np.asfortranarray(X),
        "strided": wide[..., ::2],
        "reversed": X[::-1][::-1],
        "read-only": read_only(X),
        "list": X.tolist(),
        "memory map": np.load(folder / "X.npy", mmap_mode="r"),
        "tensor": torch.from_numpy(X),
        "float16 tensor": torch.from_numpy(X).half(),
        "tensor with gradient": torch.from_numpy(X).requires_grad_(),
        "token store": TokenStore.write(folder / "store", X, dtype="float16"),
        "token store of float32": TokenStore.write(folder / "store32", X, dtype="float32"),
        "rows of a token store": TokenStore.write(
            folder / "twice", np.concatenate([X, X + 1]), dtype="float32", shard_rows=7
        ).subset(slice(0, len(X))),
    }


def read_only(X: np.ndarray) -> np.ndarray:
    X = X.copy()
    X.flags.writeable = False
    return X


def test_containers(tmp_path: Path) -> None:
    X, y = planted(n=15, s=4)
    before = X.copy()
    for head in ("self_attention", "linear"):
        plain = ConvexHeadClassifier(head=head).fit(X, y)
        expected = plain.predict_proba(X)
        (tmp_path / head).mkdir()
        for name, given in containers(X, tmp_path / head).items():
            model = ConvexHeadClassifier(head=head).fit(given, y)
            np.testing.assert_allclose(model.predict_proba(given), expected, rtol=1e-6, atol=1e-8, err_msg=name)
            np.testing.assert_allclose(plain.predict_proba(given), expected, rtol=1e-12, err_msg=name)
            assert model.beta_max_ == pytest.approx(plain.beta_max_, rel=1e-9), name
            np.testing.assert_array_equal(model.predict(given), plain.predict(X))
    np.testing.assert_array_equal(X, before)


def test_integer_tokens_and_labels_as_tensors() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.integers(-3, 4, (20, 3, 4)), np.arange(20) % 2
    model = ConvexHeadClassifier(head="mixer").fit(X, torch.from_numpy(y))
    same(model.predict_proba(X), ConvexHeadClassifier(head="mixer").fit(X.astype(float), y).predict_proba(X), 1e-6)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that do not fit into one chunk, or not into the cache, give the same fit and the same predictions."""
    X, y = planted(n=40)
    options: dict[str, Any] = {"activation": "gated_relu", "gates": 2, "beta_ratio": 0.1}
    whole = ConvexHeadClassifier(**options).fit(X, y)
    monkeypatch.setattr(memory, "current", lambda: memory.Budget(workspace=16))
    chunked = ConvexHeadClassifier(**options).fit(X, y)
    same(chunked.predict_proba(X), whole.predict_proba(X), 1e-6)
    same(whole.predict_proba(X[:1]), whole.predict_proba(X)[:1], 1e-12)


# --------------------------------------------------------------------------------------------------
# Labels


def test_labels_of_any_kind() -> None:
    X, y = planted()
    plain = ConvexHeadClassifier().fit(X, y)
    names = np.array(["cat", "dog", "eel"])
    for labels in (names, names.astype(object), np.array([-5, 0, 9]), np.array([0.5, 1.5, 2.5]) * 2):
        model = ConvexHeadClassifier().fit(X, labels[y])
        np.testing.assert_array_equal(model.classes_, labels)
        np.testing.assert_array_equal(model.predict(X), labels[plain.predict(X)])
        same(model.predict_proba(X), plain.predict_proba(X))
        assert model.score(X, labels[y]) == plain.score(X, y)
    boolean = ConvexHeadClassifier().fit(X, y > 0)
    assert boolean.predict(X).dtype == bool
    listed = ConvexHeadClassifier().fit(X, list(names[y]))
    np.testing.assert_array_equal(listed.predict(X), names[plain.predict(X)])


def test_soft_labels() -> None:
    X, y = planted()
    hard = ConvexHeadClassifier().fit(X, y)
    soft = ConvexHeadClassifier(loss="cross_entropy").fit(X, np.eye(3)[y])
    same(soft.predict_proba(X), hard.predict_proba(X), 1e-6)
    assert soft.loss_ == "cross_entropy"
    mixed = np.random.default_rng(0).dirichlet(np.ones(3), len(X))
    model = ConvexHeadClassifier().fit(X, mixed)
    assert model.loss_ == "cross_entropy"
    # With an intercept, the mean prediction is the mean label.
    same(model.predict_proba(X).mean(0), mixed.mean(0), 1e-6)


def test_label_smoothing_is_soft_labels() -> None:
    X, y = planted()
    smooth = ConvexHeadClassifier(label_smoothing=0.1).fit(X, y)
    soft = ConvexHeadClassifier().fit(X, 0.9 * np.eye(3)[y] + 0.1 / 3)
    same(smooth.predict_proba(X), soft.predict_proba(X), 1e-6)
    assert smooth.certificate_.primal == pytest.approx(soft.certificate_.primal, rel=1e-9)
    assert smooth.predict_proba(X).max() < ConvexHeadClassifier().fit(X, y).predict_proba(X).max()


def test_class_weight_is_sample_weight() -> None:
    X, y = planted()
    y = np.minimum(y, 1)
    given = {0: 3.0, 1: 0.5}
    counts = np.bincount(y)
    for class_weight, each in ((given, [3.0, 0.5]), ("balanced", len(y) / (2 * counts))):
        a = ConvexHeadClassifier(class_weight=class_weight).fit(X, y)
        b = ConvexHeadClassifier().fit(X, y, sample_weight=np.asarray(each)[y])
        same(a.predict_proba(X), b.predict_proba(X), 1e-6)
    w = np.random.default_rng(0).uniform(0.5, 1.5, len(y))
    both = ConvexHeadClassifier(class_weight=given).fit(X, y, sample_weight=w)
    product = ConvexHeadClassifier().fit(X, y, sample_weight=w * np.array([3.0, 0.5])[y])
    same(both.predict_proba(X), product.predict_proba(X), 1e-6)


def test_the_scale_of_sample_weights_does_not_matter() -> None:
    X, y = planted()
    w = np.random.default_rng(0).uniform(0.5, 1.5, len(y))
    a, b = (ConvexHeadRegressor(head="mlp").fit(X, X[:, 0, 0], sample_weight=scale * w) for scale in (1.0, 100.0))
    same(a.predict(X), b.predict(X), 1e-7)


def test_several_labels_a_sample() -> None:
    X, y = planted()
    Y = np.stack([y == 0, y > 0, np.arange(len(y)) % 4 < 2], 1).astype(int)
    model = ConvexHeadClassifier(fit_intercept=True).fit(X, Y)
    assert model.loss_ == "multilabel_logistic"
    predicted, probability = model.predict(X), model.predict_proba(X)
    assert predicted.shape == probability.shape == Y.shape
    assert set(np.unique(predicted)) <= {0, 1}
    np.testing.assert_array_equal(predicted, (probability > 0.5).astype(int))
    same(probability, 1 / (1 + np.exp(-model.decision_function(X))))
    same(probability.mean(0), Y.mean(0), 1e-6)
    assert (predicted[:, :2] == Y[:, :2]).mean() > 0.9
    # A matrix with one 1 a row is a matrix of labels all the same; loss= overrides what is taken for granted.
    one = np.eye(3, dtype=int)[y]
    assert ConvexHeadClassifier().fit(X, one).loss_ == "multilabel_logistic"
    assert ConvexHeadClassifier(loss="cross_entropy").fit(X, one).loss_ == "cross_entropy"
    smooth = ConvexHeadClassifier(label_smoothing=0.2).fit(X, Y)
    soft = ConvexHeadClassifier(loss="multilabel_logistic").fit(X, 0.8 * Y + 0.1)
    same(smooth.predict_proba(X), soft.predict_proba(X), 1e-6)


def test_labels_of_tokens() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(15, 5, 4))
    y = np.array(["no", "yes"])[(X[..., 0] > 0).astype(int)]
    for head in ("mlp", "fno", "mixer", "self_attention", "linear"):
        model = ConvexHeadClassifier(head=head, pooling=None, beta_ratio=0.1).fit(X, y)
        assert model.predict(X).shape == y.shape
        assert model.predict_proba(X).shape == model.decision_function(X).shape == (15, 5, 2)
        assert model.score(X, y) == pytest.approx(np.mean(model.predict(X) == y))
        w = rng.uniform(size=15)
        hits = (model.predict(X) == y).mean(1)
        assert model.score(X, y, sample_weight=w) == pytest.approx((w * hits).sum() / w.sum())
        if head in ("mlp", "linear"):  # the token's own features decide, which these two heads see
            assert model.score(X, y) > 0.8
    soft = ConvexHeadClassifier("mlp", pooling=None, beta_ratio=0.1).fit(X, 0.9 * np.eye(2)[(y == "yes") * 1] + 0.05)
    assert soft.predict_proba(X).shape == (15, 5, 2)


# --------------------------------------------------------------------------------------------------
# Regression


def test_targets_of_the_regressor() -> None:
    X, _ = planted()
    rng = np.random.default_rng(1)
    y = X.mean(1) @ rng.normal(size=4) + 2.0
    flat = ConvexHeadRegressor(head="linear", beta_ratio=1e-4).fit(X, y)
    assert flat.predict(X).shape == y.shape
    assert flat.score(X, y) == pytest.approx(r2_score(y, flat.predict(X)))
    assert flat.score(X, y) > 0.99
    column = ConvexHeadRegressor(head="linear", beta_ratio=1e-4).fit(X, y[:, None])
    assert column.predict(X).shape == (len(X), 1)
    same(column.predict(X)[:, 0], flat.predict(X))
    many = ConvexHeadRegressor(head="linear", beta=1e-3).fit(X, np.stack([y, -y], 1))
    alone = ConvexHeadRegressor(head="linear", beta=1e-3).fit(X, y)
    same(many.predict(X), np.stack([alone.predict(X), -alone.predict(X)], 1), 1e-6)
    Y = X[..., :2] * 2.0 + 1.0
    tokens = ConvexHeadRegressor(head="mlp", pooling=None).fit(X, Y)
    assert tokens.predict(X).shape == Y.shape
    assert tokens.score(X, Y) > 0.95
    w = rng.uniform(size=len(X))
    expected = r2_score(Y.reshape(-1, 2), tokens.predict(X).reshape(-1, 2), sample_weight=np.repeat(w, X.shape[1]))
    assert tokens.score(X, Y, sample_weight=w) == pytest.approx(expected)
    integer = ConvexHeadRegressor(head="mlp").fit(X, np.arange(len(X)))
    assert integer.predict(X).dtype == np.float64


def test_ridge_regression_has_a_closed_form() -> None:
    """The linear head at a given beta is ridge regression on the mean token: no hidden scaling of X, y or beta."""
    X, _ = planted()
    rng = np.random.default_rng(1)
    y, w, beta = rng.normal(size=(len(X), 2)), rng.uniform(0.5, 1.5, len(X)), 0.3
    a = w / w.sum()
    features = X.mean(1)
    fx, fy = features - a @ features, y - a @ y
    W = np.linalg.solve(fx.T @ (a[:, None] * fx) + beta * np.eye(4), fx.T @ (a[:, None] * fy))
    expected = features @ W + a @ y - (a @ features) @ W
    for solver in ("factored", "fista"):
        model = ConvexHeadRegressor(head="linear", beta=beta, solver=solver, tol=1e-8).fit(X, y, sample_weight=w)
        same(model.predict(X), expected, 1e-6)
        residual = 0.5 * (a * ((expected - y) ** 2).sum(1)).sum() + 0.5 * beta * (W**2).sum()
        assert model.certificate_.primal == pytest.approx(residual, rel=1e-8)
        same(model.blocks_[0].Z, W, 1e-6)


# --------------------------------------------------------------------------------------------------
# scikit-learn's tools


def test_pipelines() -> None:
    X, y = planted()
    steps = [("scale", StandardizeTokens()), ("pca", PCATokens(3)), ("head", ConvexHeadClassifier(beta_ratio=0.1))]
    pipeline = Pipeline(steps).fit(X, y)
    by_hand = ConvexHeadClassifier(beta_ratio=0.1).fit(pipeline[:-1].transform(X), y)
    same(pipeline.predict_proba(X), by_hand.predict_proba(pipeline[:-1].transform(X)))
    assert pipeline.score(X, y) > 0.8
    ours_after_theirs = make_pipeline(
        FunctionTransformer(lambda X: X.reshape(len(X), -1)), StandardScaler(), ConvexHeadClassifier(head="mlp")
    )
    assert ours_after_theirs.fit(X, y).score(X, y) > 0.8


def test_grid_search_and_cross_validation() -> None:
    X, y = planted(n=45)
    model = ConvexHeadClassifier(head="mlp")
    search = GridSearchCV(model, {"beta_ratio": [0.01, 0.1, 0.9], "head": ["mlp", "linear"]}, cv=3).fit(X, y)
    assert search.best_score_ == max(search.cv_results_["mean_test_score"])
    assert search.best_estimator_.get_params()["beta_ratio"] == search.best_params_["beta_ratio"]
    assert search.score(X, y) > 0.8
    assert len(cross_val_score(model, X, y, cv=3)) == 3
    scores = cross_val_score(ConvexHeadRegressor(head="linear"), X, X[:, 0, 0], cv=3, scoring="r2")
    assert np.isfinite(scores).all()


def test_clones_and_parameters() -> None:
    gates = np.random.default_rng(0).normal(size=(2, 4))
    model = ConvexHeadClassifier(head=["linear", {"head": "mlp", "activation": "gated_relu", "gates": gates}])
    X, y = planted()
    copy = clone(model)
    same(copy.fit(X, y).predict_proba(X), clone(copy).fit(X, y).predict_proba(X))
    assert "ConvexHeadClassifier" in repr(model)
    assert model.set_params(beta_ratio=0.5).get_params()["beta_ratio"] == 0.5
    assert not hasattr(model, "certificate_")


@pytest.mark.parametrize("solver", ["factored", "fista"])
def test_fits_are_a_function_of_random_state(solver: str) -> None:
    """Bit by bit, whatever random_state is given as; another one draws other gates."""
    X, y = planted(n=200, s=9)  # not tiny: nothing is polished here
    options: dict[str, Any] = {"activation": "gated_relu", "gates": 3, "solver": solver, "beta_ratio": 0.1}
    a, b = (ConvexHeadClassifier(**options, random_state=7).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(a.predict_proba(X), b.predict_proba(X))
    assert a.certificate_ == b.certificate_
    assert a.n_iter_ == b.n_iter_
    c, d = (ConvexHeadClassifier(**options, random_state=np.random.RandomState(7)).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(c.predict_proba(X), d.predict_proba(X))
    other = ConvexHeadClassifier(**options, random_state=8).fit(X, y)
    assert not np.array_equal(other.blocks_[0].gate, a.blocks_[0].gate)
    ConvexHeadClassifier(**options, random_state=None).fit(X, y)


def test_starting_from_another_fit() -> None:
    X, y = planted(n=60)
    first = ConvexHeadClassifier(beta=0.02).fit(X, y)
    for init in (first, first.to_module(torch.float64), first._factors):
        again = ConvexHeadClassifier(beta=0.02).fit(X, y, init=init)
        same(again.predict_proba(X), first.predict_proba(X), 1e-4)
        assert again.n_iter_ <= first.n_iter_
    with pytest.raises(InputError, match="init: got str; expected a fitted estimator, a ConvexHead module"):
        ConvexHeadClassifier().fit(X, y, init="zero")
    with pytest.raises(InputError, match="the same heads on the same tokens"):
        ConvexHeadClassifier(head="mlp").fit(X, y, init=first)


# --------------------------------------------------------------------------------------------------
# Stopping, precision, views


def test_stopping_early_warns_with_the_gap_and_a_remedy() -> None:
    X, y = planted()
    with pytest.warns(NotConvergedWarning) as caught:
        model = ConvexHeadClassifier(max_iter=2, tol=1e-6).fit(X, y)
    message = str(caught[0].message)
    assert issubclass(NotConvergedWarning, ConvergenceWarning)
    assert f"relative gap of {model.certificate_.relative_gap:.2e}, above tol = 1e-06" in message
    assert "max_iter = 2" in message
    assert "Raise max_iter" in message
    assert Path(caught[0].filename).name == Path(__file__).name  # the user's line
    assert model.certificate_.relative_gap > 1e-6
    assert model.predict(X).shape == y.shape


@pytest.mark.parametrize("head", ["self_attention", "mlp"])
@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_float32_iterations_reach_the_same_optimum(head: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = planted(n=80)
    options: dict[str, Any] = {"head": head, "activation": activation, "gates": 3, "beta_ratio": 0.05}
    exact = ConvexHeadClassifier(**options, tol=1e-6, dtype="float64").fit(X, y)
    monkeypatch.setattr(estimators, "LEAST_PROBLEM", 0)
    monkeypatch.setattr(estimators, "TINY_PROBLEM", 0)
    model = ConvexHeadClassifier(**options, dtype="float32").fit(X.astype(np.float32), y)
    assert model._precision == torch.float32
    assert model.certificate_.certified
    assert model.certificate_.relative_gap <= 1e-3
    assert model.certificate_.dual <= exact.certificate_.primal * (1 + 1e-9)
    assert model.certificate_.primal >= exact.certificate_.dual * (1 - 1e-9)
    assert np.abs(model.predict_proba(X) - exact.predict_proba(X)).max() < 0.05
    logits = model.to_module()(torch.from_numpy(X).float()).detach().numpy()
    np.testing.assert_array_equal(logits, model.logits(X))
    # The certificate is of the factors as they are stored: anybody can make it again, in float64.
    targets, weights, loss = model.encode(X.astype(np.float32), y)
    problem, _ = model._build(X.astype(np.float32), targets, weights, loss)
    again = certify_factors(problem.with_beta(model.beta_), model._factors)
    assert again.primal == pytest.approx(model.certificate_.primal, rel=1e-12)
    assert again.dual == pytest.approx(model.certificate_.dual, rel=1e-9)


def test_tiny_problems_are_solved_to_rounding() -> None:
    X, y = planted(n=20)
    model = ConvexHeadClassifier(beta_ratio=0.1, tol=1e-2).fit(X, y)
    assert model.certificate_.relative_gap < 1e-9
    order = np.random.default_rng(0).permutation(len(X))
    shuffled = ConvexHeadClassifier(beta_ratio=0.1, tol=1e-2).fit(X[order], y[order])
    same(shuffled.predict_proba(X), model.predict_proba(X), 1e-8)


def test_views() -> None:
    """A branch may read its own view of the tokens; the module and the file carry the view."""
    X, y = planted()
    heads = [{"head": "linear", "view": MeanToken()}, {"head": "self_attention", "view": PCATokens(2)}]
    model = ConvexHeadClassifier(head=heads, beta_ratio=0.1).fit(X, y)
    assert [(b.tokens, b.features) for b in model._branches] == [(1, 4), (6, 2)]
    same(model.to_module(torch.float64)(torch.from_numpy(X)).detach(), model.logits(X), 1e-6)
    same(model.to_module()(torch.from_numpy(X).float()).detach(), model.logits(X), 1e-4)
    # The same by hand: the projected tokens as a problem of their own.
    alone = ConvexHeadClassifier(head=[heads[1]], beta_ratio=0.1).fit(X, y)
    projected = ConvexHeadClassifier(beta_ratio=0.1).fit(PCATokens(2).fit(X).transform(X), y)
    same(alone.predict_proba(X), projected.predict_proba(PCATokens(2).fit(X).transform(X)), 1e-5)
    assert not hasattr(heads[1]["view"], "components_")  # the user's object is cloned, not fitted


def test_views_are_saved(tmp_path: Path) -> None:
    X, y = planted()
    heads = [{"head": "linear", "view": MeanToken()}, {"head": "self_attention", "view": PCATokens(2), "weight": 2.0}]
    model = ConvexHeadClassifier(head=heads, beta_ratio=0.1, class_weight={0: 2.0, 1: 1.0, 2: 1.0}).fit(X, y)
    model.save(tmp_path / "model")
    again = convexheads.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert again.class_weight == model.class_weight
    same(clone(again).fit(X, y).predict_proba(X), model.predict_proba(X), 1e-5)


@pytest.mark.parametrize(
    "labels", [np.array(["a", "bb", "ccc"]), np.array(["a", "b", "c"], object), np.array([1.5, 2.5, 3.5]) * 2]
)
def test_saved_classes(labels: np.ndarray, tmp_path: Path) -> None:
    X, y = planted()
    model = ConvexHeadClassifier(head="mlp").fit(X, labels[y])
    model.save(tmp_path / "model.safetensors")
    again = convexheads.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.classes_, model.classes_)
    assert again.classes_.dtype == model.classes_.dtype
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_saving_again_replaces_and_failing_keeps(tmp_path: Path) -> None:
    X, y = planted()
    path = tmp_path / "model.safetensors"
    first, second = ConvexHeadClassifier(head="mlp").fit(X, y), ConvexHeadRegressor(head="linear").fit(X, y)
    first.save(path)
    second.save(path)
    assert isinstance(convexheads.load(path), ConvexHeadRegressor)
    second.save(str(path))
    first.save(tmp_path)  # a folder: model.safetensors inside
    assert isinstance(convexheads.load(tmp_path), ConvexHeadClassifier)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_verbose_prints_the_gap(capsys: pytest.CaptureFixture[str]) -> None:
    X, y = planted()
    ConvexHeadClassifier(verbose=1).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all("objective" in line and "gap" in line and "units" in line for line in lines)
    ConvexHeadClassifier().fit(X, y)
    assert capsys.readouterr().out == ""


def test_devices() -> None:
    X, y = planted()
    results = [ConvexHeadClassifier(device=device).fit(X, y).predict_proba(X) for device in (None, "cpu", "auto")]
    same(results[1], results[0], 1e-7)
    same(results[2], results[0], 1e-4)


def test_constant_targets_give_an_empty_head() -> None:
    X, _ = planted()
    for head in ("self_attention", "fno", "linear"):
        model = ConvexHeadRegressor(head=head, activation="gated_relu").fit(X, np.full(len(X), 3.0))
        same(model.predict(X), 3.0)
        assert model.certificate_.gap == pytest.approx(0.0, abs=1e-12)
        if head != "linear":  # a ridge head never is quite empty: its reference scale is another one
            assert model.beta_max_ == 0.0
            assert model.rank_ == 0
    zero = ConvexHeadClassifier().fit(np.zeros((6, 2, 3)), np.arange(6) % 3)
    same(zero.predict_proba(np.zeros((1, 2, 3))), 1 / 3)
