"""Transforms: one contract for every registered transform, then the mathematics of each one."""

from __future__ import annotations

import doctest
import io
import json
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from convexheads.errors import InputError
from convexheads.tokens import transforms
from convexheads.tokens.transforms import (
    TRANSFORMS,
    AppendConstant,
    ChainTransforms,
    ConcatenateFeatures,
    MeanToken,
    PCATokens,
    PoolGrid,
    PowerNormalizeTokens,
    ScaleTokens,
    SelectTokens,
    StandardizeTokens,
    TokenTransform,
    from_state,
)

GRID = (3, 4)
TOKENS, FEATURES = 12, 6

# At least one entry for every registered class: a new transform joins the contract by one line here.
EXAMPLES: dict[str, Callable[[], TokenTransform]] = {
    "StandardizeTokens": StandardizeTokens,
    "StandardizeTokens mean only": lambda: StandardizeTokens(with_std=False),
    "PCATokens": lambda: PCATokens(4),
    "PCATokens whiten": lambda: PCATokens(3, whiten=True),
    "PCATokens exponent": lambda: PCATokens(0.9, whiten=0.25),
    "ScaleTokens": lambda: ScaleTokens(1 / 3),
    "AppendConstant": lambda: AppendConstant(0.1),
    "PoolGrid": lambda: PoolGrid(GRID, (2, 2)),
    "PoolGrid uneven": lambda: PoolGrid(GRID, (2, 3)),
    "MeanToken": MeanToken,
    "SelectTokens one": lambda: SelectTokens(0),
    "SelectTokens list": lambda: SelectTokens([3, -1, 0]),
    "SelectTokens array": lambda: SelectTokens(np.array([2, 5])),
    "SelectTokens slice": lambda: SelectTokens(slice(None, -2, 3)),
    "SelectTokens pair": lambda: SelectTokens((1, None)),
    "PowerNormalizeTokens": PowerNormalizeTokens,
    "PowerNormalizeTokens newton": lambda: PowerNormalizeTokens(0.01, method="newton"),
    "PowerNormalizeTokens cubic": lambda: PowerNormalizeTokens(exponent=-1 / 3),
    "ConcatenateFeatures": lambda: ConcatenateFeatures(
        [SelectTokens(0), ChainTransforms([SelectTokens((1, None)), MeanToken()])]
    ),
    "ChainTransforms": lambda: ChainTransforms(
        [StandardizeTokens(), PCATokens(4, whiten=0.25), PowerNormalizeTokens(), AppendConstant()]
    ),
    "ChainTransforms affine": lambda: ChainTransforms(
        [StandardizeTokens(), PCATokens(4), ScaleTokens(0.5), AppendConstant(2.0)]
    ),
}
every = pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES.keys())


def tokens(n: int = 17, s: int = TOKENS, d: int = FEATURES, seed: int = 0) -> np.ndarray:
    """Correlated tokens with unequal variances and means, float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, s, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


class Rows:
    """The least that a container of tokens must be; counts what it hands out."""

    def __init__(self, X: np.ndarray) -> None:
        self._X = X
        self.shape = X.shape
        self.largest = 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        block = self._X[rows]
        self.largest = max(self.largest, len(block))
        return block


# --------------------------------------------------------------------------------------------------
# The contract


def test_every_registered_transform_is_in_the_contract() -> None:
    assert {name.split()[0] for name in EXAMPLES} == set(TRANSFORMS)
    assert set(TRANSFORMS) <= set(transforms.__all__)


@every
def test_clone_and_repr(make: Callable[[], TokenTransform]) -> None:
    transform = make()
    copy = clone(transform)
    assert type(copy) is type(transform)
    assert repr(copy) == repr(transform)
    X = tokens()
    fitted = transform.fit(X)
    assert fitted is transform
    with pytest.raises(NotFittedError):
        clone(fitted).transform(X)
    np.testing.assert_array_equal(clone(fitted).fit(X).transform(X), fitted.transform(X))


@every
def test_types_and_shapes(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    transform = make().fit(X)
    result = transform.transform(X)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float64
    assert result.shape == (len(X), *transform.output_shape(TOKENS))
    assert transform.n_features_in_ == FEATURES
    assert transform.n_tokens_in_ == TOKENS
    for dtype in (np.float32, np.float16):
        assert make().fit(X.astype(dtype)).transform(X.astype(dtype)).dtype == np.float32
    np.testing.assert_array_equal(make().fit_transform(X, np.zeros(len(X))), result)


@every
def test_containers_agree(make: Callable[[], TokenTransform], tmp_path) -> None:
    X = tokens().astype(np.float32)
    expected = make().fit(X).transform(X)
    mapped = np.memmap(tmp_path / "tokens.bin", np.float32, "w+", shape=X.shape)
    mapped[:] = X
    mapped.flush()
    read_only = np.memmap(tmp_path / "tokens.bin", np.float32, "r", shape=X.shape)
    others = [read_only, torch.from_numpy(X).requires_grad_(), Rows(X), X.tolist(), np.asfortranarray(X)]
    for other in others:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = make().fit(other).transform(other)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@every
def test_input_is_not_changed(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    before = X.copy()
    transform = make().fit(X)
    transform.transform(X)[:] = 7.0
    transform.view(X)[:3][:] = 7.0
    np.testing.assert_array_equal(X, before)


@every
def test_chunk_size_does_not_matter(make: Callable[[], TokenTransform], monkeypatch) -> None:
    X = tokens(n=23) + 100.0
    whole = make().fit(X).transform(X)
    for rows in (1, 5, 22):
        monkeypatch.setattr(TokenTransform, "chunk_bytes", rows * 8 * TOKENS * FEATURES)
        source = Rows(X)
        chunked = make().fit(source)
        np.testing.assert_allclose(chunked.transform(X), whole, rtol=1e-9, atol=1e-9)
        chunked.transform(source)
        assert source.largest <= rows


@every
def test_view_reads_rows(make: Callable[[], TokenTransform]) -> None:
    X = tokens().astype(np.float32)
    transform = make().fit(X)
    expected = transform.transform(X)
    view = transform.view(X)
    assert view.shape == expected.shape
    assert len(view) == len(X)
    assert view.dtype == expected.dtype
    for rows in (slice(3, 9), np.array([5, 1, 1]), np.arange(len(X)) % 3 == 0):
        np.testing.assert_allclose(view[rows], expected[rows], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(view), expected)
    assert np.asarray(view, np.float64).dtype == np.float64


@every
def test_module_gives_the_same(make: Callable[[], TokenTransform]) -> None:
    X = tokens().astype(np.float32)
    transform = make().fit(X)
    expected = transform.transform(X)
    module = transform.to_module()
    assert not module.training
    x = torch.from_numpy(X)
    result = module(x)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    exact = transform.to_module(torch.float64)(x.double())
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact, transform.transform(X.astype(np.float64)), rtol=1e-12, atol=1e-12)
    assert not list(module.parameters())
    other = transform.to_module()
    other.load_state_dict(module.state_dict())


@every
def test_module_is_scripted_and_traced(make: Callable[[], TokenTransform]) -> None:
    X = tokens().astype(np.float32)
    module = make().fit(X).to_module()
    x = torch.from_numpy(X)
    with warnings.catch_warnings():
        # torch announces the successors of these entry points.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(module)
        traced = torch.jit.trace(module, x[:2])
        memory = io.BytesIO()
        torch.jit.save(scripted, memory)
        memory.seek(0)
        loaded = torch.jit.load(memory)
    for compiled in (scripted, traced, loaded):
        assert torch.allclose(compiled(x), module(x), atol=1e-6)


@every
def test_module_in_onnx(make: Callable[[], TokenTransform]) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    X = tokens().astype(np.float32)
    transform = make().fit(X)
    if "eigh" in str(transform.get_params(deep=True).values()):
        pytest.skip("ONNX has no eigenvalue operator: that is what method='newton' is for")
    memory = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            transform.to_module(),
            (torch.from_numpy(X[:2]),),
            memory,
            input_names=["tokens"],
            dynamic_axes={"tokens": {0: "n"}},
            dynamo=False,
        )
    session = runtime.InferenceSession(memory.getvalue(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"tokens": X})
    np.testing.assert_allclose(result, transform.transform(X), rtol=1e-5, atol=1e-5)


@every
def test_state_round_trip_is_exact(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    transform = make().fit(X)
    config, arrays = transform.state()
    config = json.loads(json.dumps(config, allow_nan=False))
    assert config["class"] == type(transform).__name__
    again = from_state(config, {name: array.copy() for name, array in arrays.items()})
    assert type(again) is type(transform)
    np.testing.assert_array_equal(again.transform(X), transform.transform(X))
    assert again.state()[0] == transform.state()[0]
    # The copy is a complete estimator: it can be cloned and fitted again.
    np.testing.assert_array_equal(clone(again).fit(X).transform(X), transform.transform(X))
    for array in arrays.values():
        array += 1.0  # arrays are copies
    np.testing.assert_array_equal(again.transform(X), transform.transform(X))


@every
def test_pickled_by_scikit_learn_tools(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    transform = make().fit(X)
    again = pickle.loads(pickle.dumps(transform))
    np.testing.assert_array_equal(again.transform(X), transform.transform(X))


@every
def test_not_fitted(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    for use in (
        lambda t: t.transform(X),
        lambda t: t.view(X),
        lambda t: t.to_module(),
        lambda t: t.state(),
        lambda t: t.affine(),
    ):
        with pytest.raises(NotFittedError):
            use(make())


BAD_TOKENS = {
    "nan": (lambda X: np.where(np.arange(len(X))[:, None, None] == 11, np.nan, X), r"NaN .*sample 11\b"),
    "inf": (lambda X: np.where(np.arange(len(X))[:, None, None] >= 3, np.inf, X), r"infinity .*sample 3\b"),
    "no samples": (lambda X: X[:0], r"empty tokens of shape \(0, 12, 6\)"),
    "no tokens": (lambda X: X[:, :0], "empty tokens"),
    "no features": (lambda X: X[:, :, :0], "empty tokens"),
    "rank 1": (lambda X: X[0, 0], r"1 dimensions.*Reshape your data"),
    "rank 4": (lambda X: X.reshape(-1, 3, 4, FEATURES), r"4 dimensions.*reshape\(n, h \* w, d\)"),
    "complex": (lambda X: X + 0j, "complex"),
    "complex tensor": (lambda X: torch.from_numpy(X + 0j), "complex"),
    "words": (lambda X: X.astype(str), "type <U"),
    "objects": (lambda X: np.full(X.shape, {}), "type object"),
    "ragged": (lambda X: [[[1.0]], [[1.0], [2.0]]], "different lengths"),
}


@every
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens(make: Callable[[], TokenTransform], case: str) -> None:
    damage, message = BAD_TOKENS[case]
    X = tokens()
    with pytest.raises(InputError, match=message) as told:
        make().fit_transform(damage(X))
    assert "expected" in str(told.value)
    fitted = make().fit(X)
    with pytest.raises(InputError, match=message):
        fitted.transform(damage(X))


@every
def test_wrong_number_of_features(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    with pytest.raises(InputError, match=r"got tokens of 5 features; expected 6 features.*fit"):
        make().fit(X).transform(X[:, :, :5])


@every
def test_a_failed_fit_is_no_fit(make: Callable[[], TokenTransform]) -> None:
    transform = make()
    X = tokens()
    if type(transform)._fit is not TokenTransform._fit:
        with pytest.raises(InputError):
            transform.fit(X[0, 0])
    with pytest.raises(NotFittedError):
        transform.transform(X)


def test_a_sparse_matrix_is_named() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(InputError, match="sparse"):
        StandardizeTokens().fit(sparse.eye(3))


def test_a_container_that_contradicts_itself() -> None:
    class Liar(Rows):
        def __getitem__(self, rows: slice) -> np.ndarray:
            return super().__getitem__(rows)[:, :3]

    with pytest.raises(InputError, match="disagree"):
        StandardizeTokens().fit(Liar(tokens()))


def test_data_frame_is_one_token() -> None:
    pandas = pytest.importorskip("pandas")
    X = tokens()[:, 0]
    np.testing.assert_allclose(
        StandardizeTokens().fit_transform(pandas.DataFrame(X)), StandardizeTokens().fit_transform(X)
    )


def test_views_of_views_keep_memory_bounded(monkeypatch) -> None:
    monkeypatch.setattr(TokenTransform, "chunk_bytes", 2 * 8 * TOKENS * FEATURES)
    source = Rows(tokens(n=20))
    chain = ChainTransforms([MeanToken(), StandardizeTokens(), PCATokens(2)]).fit(source)
    chain.transform(source)
    assert source.largest == 2  # though a chunk would hold 24 of the mean tokens


def test_docstring_examples() -> None:
    assert doctest.testmod(transforms).failed == 0


# --------------------------------------------------------------------------------------------------
# Each transform


def test_standardize_is_the_scaler_over_all_tokens() -> None:
    X = tokens()
    expected = StandardScaler().fit_transform(X.reshape(-1, FEATURES)).reshape(X.shape)
    np.testing.assert_allclose(StandardizeTokens().fit_transform(X), expected, rtol=1e-11, atol=1e-11)
    only_mean = StandardizeTokens(with_std=False).fit_transform(X)
    np.testing.assert_allclose(only_mean, X - X.mean((0, 1)), atol=1e-12)
    only_scale = StandardizeTokens(with_mean=False).fit_transform(X)
    np.testing.assert_allclose(only_scale, X / X.std((0, 1)), atol=1e-12)


def test_standardize_is_stable_and_leaves_constants(monkeypatch) -> None:
    monkeypatch.setattr(TokenTransform, "chunk_bytes", 5 * 8 * TOKENS * FEATURES)
    noise = tokens(n=40)
    X = 1e9 + noise
    X[:, :, 2] = 0.1  # whose float64 mean is not exactly 0.1
    transform = StandardizeTokens().fit(X)
    assert transform.scale_[2] == 1.0
    others = np.arange(FEATURES) != 2
    np.testing.assert_allclose(transform.scale_[others], noise.std((0, 1))[others], rtol=1e-6)
    np.testing.assert_allclose(transform.transform(X)[:, :, 2], 0.0, atol=1e-15)


@pytest.mark.parametrize(("whiten", "exponent"), [(False, 0.0), (True, 0.5), (0.25, 0.25), (1, 1.0)])
def test_pca(whiten: bool | float, exponent: float) -> None:
    X = tokens()
    k = 4
    rows = X.reshape(-1, FEATURES)
    reference = PCA(k).fit(rows)
    transform = PCATokens(k, whiten=whiten).fit(X)
    N = len(rows)
    variance = reference.explained_variance_ * (N - 1) / N
    np.testing.assert_allclose(transform.explained_variance_, variance, rtol=1e-10)
    np.testing.assert_allclose(transform.explained_variance_ratio_, reference.explained_variance_ratio_, rtol=1e-10)
    components = transform.components_
    np.testing.assert_allclose(components @ components.T, np.eye(k), atol=1e-12)
    assert (components[np.arange(k), np.abs(components).argmax(1)] > 0).all()
    signs = np.sign((components * reference.components_).sum(1))
    expected = reference.transform(rows) * signs * variance**-exponent
    result = transform.transform(X).reshape(-1, k)
    np.testing.assert_allclose(result, expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(result.var(0), variance ** (1 - 2 * exponent), rtol=1e-9)


def test_pca_number_of_components() -> None:
    X = tokens()
    ratio = PCATokens().fit(X).explained_variance_ratio_
    assert len(ratio) == FEATURES
    for share in (0.3, 0.8, 0.999999999):
        k = PCATokens(share).fit(X).n_components_
        assert ratio[:k].sum() >= share - 1e-12
        assert ratio[: k - 1].sum() < share
    assert PCATokens().fit(X[:1, :4]).n_components_ == 4
    for bad in (0, 7, -1, 1.5, True, "mle", float("nan")):
        with pytest.raises(InputError, match="n_components"):
            PCATokens(bad).fit(X)
    with pytest.raises(InputError, match="from 1 to 4"):
        PCATokens(5).fit(X[:1, :4])
    for bad in ("yes", float("inf"), None):
        with pytest.raises(InputError, match="whiten"):
            PCATokens(whiten=bad).fit(X)


def test_pca_does_not_blow_up_what_is_not_there() -> None:
    X = tokens()
    X[:, :, 3] = 2 * X[:, :, 1] - X[:, :, 0]
    for data in (X, X.astype(np.float32)):
        result = PCATokens(whiten=True).fit_transform(data)
        np.testing.assert_allclose(result[:, :, :-1].std((0, 1)), 1.0, rtol=1e-4)
        assert np.abs(result[:, :, -1]).max() < 1e-4
    constant = np.full((3, 2, 4), 5.0)
    np.testing.assert_array_equal(PCATokens(2, whiten=True).fit_transform(constant), np.zeros((3, 2, 2)))


def test_pca_signs_do_not_depend_on_the_order_of_samples() -> None:
    X = tokens(n=50)
    first, second = PCATokens().fit(X), PCATokens().fit(X[::-1])
    np.testing.assert_allclose(first.components_, second.components_, atol=1e-9)


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_pool_is_adaptive_average_pooling(h: int, w: int, data: st.DataObject) -> None:
    to = (data.draw(st.integers(1, h)), data.draw(st.integers(1, w)))
    X = np.random.default_rng(h * 10 + w).normal(size=(2, h * w, 3))
    images = torch.from_numpy(X).reshape(2, h, w, 3).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.adaptive_avg_pool2d(images, to)
    expected = pooled.permute(0, 2, 3, 1).reshape(2, -1, 3).numpy()
    np.testing.assert_allclose(PoolGrid((h, w), to).fit_transform(X), expected, atol=1e-12)


def test_pool_errors() -> None:
    X = tokens()
    with pytest.raises(InputError, match=r"12 tokens a sample; expected 9 for grid=\(3, 3\)"):
        PoolGrid((3, 3)).fit(X)
    with pytest.raises(InputError, match="not larger"):
        PoolGrid(GRID, (4, 1)).fit(X)
    for bad in (3, (3,), (3, 0), (3.0, 4), "34"):
        with pytest.raises(InputError, match="pair"):
            PoolGrid(bad).fit(X)
    with pytest.raises(InputError, match="tokens a sample"):
        PoolGrid(GRID).fit(X).transform(X[:, 1:])


def test_constant_scale_and_mean() -> None:
    X = tokens()
    result = AppendConstant(0.5).fit_transform(X)
    np.testing.assert_array_equal(result[:, :, :-1], X)
    np.testing.assert_array_equal(result[:, :, -1], np.full((len(X), TOKENS), 0.5))
    np.testing.assert_array_equal(ScaleTokens(0.25).fit_transform(X), 0.25 * X)
    np.testing.assert_allclose(MeanToken().fit_transform(X), X.mean(1, keepdims=True), atol=1e-15)
    for bad in (ScaleTokens("2"), ScaleTokens(float("nan")), AppendConstant(None), AppendConstant(np.inf)):
        with pytest.raises(InputError, match="finite number"):
            bad.fit(X)


@pytest.mark.parametrize(
    ("choice", "index"),
    [
        (0, [0]),
        (-1, [-1]),
        ([2, 0, 2], [2, 0, 2]),
        (np.array([-2]), [-2]),
        (slice(None), slice(None)),
        (slice(1, 9, 4), slice(1, 9, 4)),
        ((1, None), slice(1, None)),
        ((None, 3), slice(3)),
        ((-4, -1), slice(-4, -1)),
        ((5, 100), slice(5, None)),
    ],
)
def test_select(choice, index) -> None:
    X = tokens()
    transform = SelectTokens(choice).fit(X)
    np.testing.assert_array_equal(transform.transform(X), X[:, index])
    # The choice is relative to the sample at hand: another resolution has another number of tokens.
    longer = tokens(s=20)
    if isinstance(choice, tuple):
        index = slice(*choice)
    np.testing.assert_array_equal(transform.transform(longer), longer[:, index])


def test_select_errors() -> None:
    X = tokens()
    for bad in (12, -13, [0, 12], (5, 5), slice(20, 30)):
        with pytest.raises(InputError, match="samples of 12 tokens"):
            SelectTokens(bad).fit(X)
    for bad in (1.0, "cls", [], [[0, 1]], (1, 2, 3), slice(None, None, -1), slice(0.5), None, [True, False]):
        with pytest.raises(InputError, match="an index, a list of indices"):
            SelectTokens(bad).fit(X)


def power_reference(X: np.ndarray, eps: float, exponent: float) -> np.ndarray:
    out = np.empty_like(X)
    for i, x in enumerate(X):
        values, vectors = np.linalg.eigh(x.T @ x / len(x) + eps * np.eye(x.shape[1]))
        out[i] = x @ (vectors * values**exponent) @ vectors.T
    return out


@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25, -0.125])
@pytest.mark.parametrize(("s", "d"), [(12, 6), (4, 6), (1, 6), (5, 1)])
def test_power_normalisation(method: str, exponent: float, s: int, d: int) -> None:
    X = tokens(s=s, d=d)
    transform = PowerNormalizeTokens(exponent=exponent, method=method).fit(X)
    assert transform.eps_ == pytest.approx(1e-3 * np.mean(X**2))
    result = transform.transform(X)
    np.testing.assert_allclose(result, power_reference(X, transform.eps_, exponent), rtol=1e-7, atol=1e-9)
    # The number of tokens may differ from that of fit: G is an average over tokens.
    doubled = np.concatenate([X, X], axis=1)
    np.testing.assert_allclose(transform.transform(doubled)[:, :s], result, rtol=1e-7, atol=1e-9)


def test_power_normalisation_is_the_square_root_of_the_covariance() -> None:
    X = tokens(n=5, s=60)
    Y = PowerNormalizeTokens(1e-9).fit_transform(X)
    root = np.einsum("nsd,nse->nde", Y, Y) / X.shape[1]
    covariance = np.einsum("nsd,nse->nde", X, X) / X.shape[1]
    np.testing.assert_allclose(root @ root, covariance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("exponent", "ratio"), [(-1.0, 1e7), (-0.5, 1e7), (-0.25, 1e9), (-0.125, 1e9)])
def test_newton_is_as_accurate_as_documented(exponent: float, ratio: float) -> None:
    rng = np.random.default_rng(3)
    s, d = 64, 24
    left, right = (np.linalg.qr(rng.normal(size=(size, d)))[0] for size in (s, d))
    values = np.logspace(0, -np.log10(ratio) - 1, d)  # of G, down to below eps
    X = (np.sqrt(s) * (left * np.sqrt(values)) @ right.T)[None]
    eps = np.linalg.norm(values) / ratio
    exact = PowerNormalizeTokens(eps, exponent=exponent).fit_transform(X)
    newton = PowerNormalizeTokens(eps, exponent=exponent, method="newton").fit_transform(X)
    assert np.abs(newton - exact).max() <= 1e-8 * np.abs(exact).max()


def test_power_normalisation_is_differentiable_by_newton() -> None:
    X = tokens(n=2, s=5, d=3)
    module = PowerNormalizeTokens(0.1, method="newton", iterations=20).fit(X).to_module(torch.float64)
    assert torch.autograd.gradcheck(module, torch.from_numpy(X).requires_grad_())


def test_power_errors() -> None:
    X = tokens()
    for bad, message in (
        (PowerNormalizeTokens(0.0), "eps=0.0"),
        (PowerNormalizeTokens(-1.0), "eps=-1.0"),
        (PowerNormalizeTokens(relative_eps=0), "relative_eps"),
        (PowerNormalizeTokens(exponent=None), "exponent"),
        (PowerNormalizeTokens(exponent=-1 / 3, method="newton"), "method='eigh' for other"),
        (PowerNormalizeTokens(method="svd"), "'eigh' or 'newton'"),
        (PowerNormalizeTokens(method="newton", iterations=0), "iterations"),
    ):
        with pytest.raises(InputError, match=message):
            bad.fit(X)
    with pytest.raises(InputError, match="mean square 0"):
        PowerNormalizeTokens().fit(np.zeros((3, 2, 2)))
    assert PowerNormalizeTokens(0.1).fit_transform(np.zeros((3, 2, 2))).max() == 0.0


def test_concatenate_cls_and_mean() -> None:
    X = tokens()
    views = ConcatenateFeatures([SelectTokens(0), ChainTransforms([SelectTokens((1, None)), MeanToken()])])
    expected = np.concatenate([X[:, :1], X[:, 1:].mean(1, keepdims=True)], axis=2)
    np.testing.assert_allclose(views.fit_transform(X), expected, atol=1e-14)
    with pytest.raises(InputError, match=r"views with \[1, 12\] tokens"):
        ConcatenateFeatures([SelectTokens(0), ScaleTokens()]).fit(X)


def test_chain_is_one_after_the_other() -> None:
    X = tokens()
    Y = X
    for one in (StandardizeTokens(), PoolGrid(GRID, (2, 2)), PCATokens(3, whiten=True)):
        Y = one.fit_transform(Y)
    members = [StandardizeTokens(), PoolGrid(GRID, (2, 2)), PCATokens(3, whiten=True)]
    chain = ChainTransforms(members)
    np.testing.assert_allclose(chain.fit_transform(X), Y, atol=1e-10)
    assert not hasattr(members[0], "mean_")  # members given are templates


@pytest.mark.parametrize("cls", [ChainTransforms, ConcatenateFeatures])
def test_composition_errors(cls) -> None:
    X = tokens()
    for bad in ([], None, [3], ScaleTokens(), [StandardScaler()]):
        with pytest.raises(InputError, match="non-empty list of token transforms"):
            cls(bad).fit(X)
    with pytest.raises(InputError, match="n_components"):
        cls([PCATokens(99)]).fit(X)


def test_composition_parameters() -> None:
    chain = ChainTransforms([StandardizeTokens(), PCATokens(2)])
    assert chain.get_params()["1__n_components"] == 2
    chain.set_params(**{"1__n_components": 4, "0": ScaleTokens(2.0)})
    assert chain.transforms[1].n_components == 4
    assert isinstance(chain.transforms[0], ScaleTokens)
    chain.set_params(transforms=[MeanToken()])
    assert len(chain.transforms) == 1
    with pytest.raises(ValueError, match="Invalid parameter"):
        chain.set_params(unknown=1)


# --------------------------------------------------------------------------------------------------
# Affine maps and folding

AFFINE = {
    "standardize": StandardizeTokens,
    "pca": lambda: PCATokens(4, whiten=0.25),
    "scale": lambda: ScaleTokens(0.3),
    "append": lambda: AppendConstant(1.5),
    "chain": EXAMPLES["ChainTransforms affine"],
    "concatenate": lambda: ConcatenateFeatures([PCATokens(2), AppendConstant()]),
    "nested": lambda: ChainTransforms([ChainTransforms([StandardizeTokens(), PCATokens(2)]), AppendConstant()]),
}


@pytest.mark.parametrize("make", AFFINE.values(), ids=AFFINE.keys())
def test_affine_map_is_the_transform(make: Callable[[], TokenTransform]) -> None:
    X = tokens()
    transform = make().fit(X)
    matrix, offset = transform.affine()
    assert matrix.shape == (FEATURES, transform.output_shape(TOKENS)[1])
    assert offset.shape == matrix.shape[1:]
    np.testing.assert_allclose(X @ matrix + offset, transform.transform(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "one",
    [PoolGrid(GRID), MeanToken(), SelectTokens(0), PowerNormalizeTokens()],
    ids=lambda t: type(t).__name__,
)
def test_what_is_not_affine_says_so(one: TokenTransform) -> None:
    X = tokens()
    with pytest.raises(InputError, match="not an affine map"):
        clone(one).fit(X).affine()
    with pytest.raises(InputError, match=type(one).__name__):
        ChainTransforms([StandardizeTokens(), one]).fit(X).affine()


def test_folding_leaves_one_product_a_run() -> None:
    X = tokens().astype(np.float32)
    x = torch.from_numpy(X)
    affine = EXAMPLES["ChainTransforms affine"]().fit(X)
    assert set(affine.to_module(fold=True).state_dict()) == {"matrix", "offset"}
    mixed = EXAMPLES["ChainTransforms"]().fit(X)
    folded = mixed.to_module(fold=True)
    assert len(folded) == 3  # two affine members, the power, the constant
    for chain in (affine, mixed):
        np.testing.assert_allclose(chain.to_module(fold=True)(x), chain.transform(X), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Saved states that cannot be used, scikit-learn's tools, shapes


def test_damaged_states() -> None:
    X = tokens()
    config, arrays = PCATokens(3).fit(X).state()
    with pytest.raises(InputError, match="one of AppendConstant"):
        from_state({**config, "class": "PCA"}, arrays)
    with pytest.raises(InputError, match="the state of None"):
        from_state([], arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="incomplete state of PCATokens"):
        from_state({"class": "PCATokens"}, arrays)
    with pytest.raises(InputError, match="incomplete"):
        from_state({**config, "params": {"components": 3}}, arrays)
    for damaged in (
        {},
        {**arrays, "extra": np.zeros(1)},
        {**arrays, "mean_": np.zeros(FEATURES - 1)},
    ):
        with pytest.raises(InputError, match="damaged"):
            from_state(config, damaged)
    config, arrays = EXAMPLES["ChainTransforms"]().fit(X).state()
    with pytest.raises(InputError, match="incomplete"):
        from_state(config, {**arrays, "9.mean_": np.zeros(2)})


class PooledLogistic(ClassifierMixin, BaseEstimator):
    """A classifier of tokens (n, s, d), for scikit-learn's own tools."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> PooledLogistic:
        self.model_ = LogisticRegression().fit(X.reshape(len(X), -1), y)
        self.classes_ = self.model_.classes_
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.model_.predict(X.reshape(len(X), -1))


def test_pipeline_and_grid_search() -> None:
    X = tokens(n=40)
    y = np.arange(40) % 2
    X[y == 1, :, 0] += 3.0
    pipeline = Pipeline(
        [
            ("scale", StandardizeTokens()),
            ("views", ChainTransforms([PCATokens(2), MeanToken()])),
            ("head", PooledLogistic()),
        ]
    )
    search = GridSearchCV(pipeline, {"views__0__n_components": [1, 4], "scale__with_std": [True, False]}, cv=2)
    search.fit(X, y)
    assert search.best_score_ > 0.7
    chosen = search.best_params_["views__0__n_components"]
    assert search.best_estimator_["views"].transforms_[0].n_components_ == chosen


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["3d", "2d"]), st.integers(1, 4))
def test_any_shape(n: int, s: int, d: int, rank: str, rows: int) -> None:
    X = np.random.default_rng(n + 10 * s + 100 * d).normal(size=(n, s, d)) + 1.0
    if rank == "2d":
        X, s = X[:, 0], 1
    three = X.reshape(n, s, d)
    for transform in (
        StandardizeTokens(),
        PCATokens(whiten=True),
        AppendConstant(),
        PowerNormalizeTokens(),
        PowerNormalizeTokens(method="newton"),
        MeanToken(),
        SelectTokens((0, None)),
        PoolGrid((s, 1)),
        ConcatenateFeatures([ScaleTokens(), AppendConstant()]),
        ChainTransforms([StandardizeTokens(), AppendConstant(), PowerNormalizeTokens(0.1)]),
    ):
        result = transform.fit_transform(X)
        assert result.shape == (n, *transform.output_shape(s))
        assert np.isfinite(result).all()
        np.testing.assert_array_equal(result, transform.transform(three))
        module = transform.to_module(torch.float64)(torch.from_numpy(three))
        np.testing.assert_allclose(module, result, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(transform.view(X)[:rows], result[:rows], rtol=1e-9, atol=1e-9)
