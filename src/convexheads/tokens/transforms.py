"""Transforms of tokens in the scikit-learn manner: fitted on the training split, exported with the head.

A transform maps tokens ``(n, s, d)`` to tokens ``(n, s', d')``, sample by sample. The mathematics of each
one is written once, as a ``torch.nn.Module``; :meth:`TokenTransform.transform` runs that module in float64
over chunks of rows, and :meth:`TokenTransform.to_module` hands it out for the exported network, so what is
fitted and what is deployed cannot drift apart.

The objective of a head is a function of the tokens that it is given: nothing here is applied unless the
user puts it before the head. Transforms that act on each token as ``x @ matrix + offset`` say so
(:meth:`TokenTransform.affine`), and a chain of them can be folded into one matrix product.

>>> import numpy as np
>>> X = np.random.default_rng(0).normal(size=(20, 9, 6))
>>> view = ChainTransforms([PCATokens(4, whiten=True), AppendConstant()])
>>> view.fit_transform(X).shape
(20, 9, 5)
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ..distributed import World
from ..distributed import current as current_world
from ..errors import InputError, describe
from ..memory import current as current_budget
from . import modules

__all__ = [
    "TRANSFORMS",
    "AppendConstant",
    "ChainTransforms",
    "ConcatenateFeatures",
    "MeanToken",
    "PCATokens",
    "PoolGrid",
    "PowerNormalizeTokens",
    "ScaleTokens",
    "SelectTokens",
    "StandardizeTokens",
    "TokenTransform",
    "TransformedTokens",
    "from_state",
    "register",
]


# --------------------------------------------------------------------------------------------------
# Reading tokens


class _Tokens:
    """Rows of any accepted container, checked and in float64, read a chunk at a time.

    ``shape`` is ``(n, s, d)``; an ``(n, d)`` container has ``s = 1``. ``dtype`` is the dtype of results:
    float64 for float64 input, float32 for everything else.
    """

    def __init__(self, X: Any, chunk_bytes: int) -> None:
        if hasattr(X, "toarray"):
            raise InputError(describe("a sparse matrix", "dense tokens (n, s, d)", "Pass X.toarray()."))
        if hasattr(X, "iloc"):  # a data frame, whose [] selects columns
            X = X.to_numpy()
        if not hasattr(X, "shape") or not hasattr(X, "__getitem__"):
            X = _as_array(X)
        shape = tuple(int(size) for size in X.shape)
        self._check_rank(shape)
        self.container = X
        self.shape = (shape[0], *((1, shape[1]) if len(shape) == 2 else shape[1:]))
        if 0 in shape:
            raise InputError(
                describe(
                    f"empty tokens of shape {shape}",
                    "at least one sample, one token and one feature (n, s, d)",
                    "Check how the tokens were selected.",
                )
            )
        self.dtype = np.dtype(np.float64 if _is_double(getattr(X, "dtype", None)) else np.float32)
        chunk_bytes = min(int(chunk_bytes), current_budget().reading)
        self.rows_per_chunk = max(1, chunk_bytes // (8 * self.shape[1] * self.shape[2]))
        if isinstance(X, TransformedTokens):
            # What a view reads may be far larger than what it shows, as for the mean of many tokens.
            self.rows_per_chunk = min(self.rows_per_chunk, X.rows_per_chunk)

    @staticmethod
    def _check_rank(shape: tuple[int, ...]) -> None:
        if len(shape) in (2, 3):
            return
        if len(shape) == 4:
            fix = "Flatten the grid of tokens: X.reshape(n, h * w, d)."
        elif len(shape) == 1:
            fix = "Reshape your data: X.reshape(1, -1) if it is one sample of d features."
        else:
            fix = "Reshape your data to samples, tokens, features."
        raise InputError(
            describe(f"an array of {len(shape)} dimensions, shape {shape}", "tokens (n, s, d) or (n, d)", fix)
        )

    def rows(self, key: slice | np.ndarray) -> np.ndarray:
        """The samples that `key` selects as a finite float64 array (rows, s, d)."""
        block = self.container._rows64(key) if isinstance(self.container, TransformedTokens) else self.container[key]
        if isinstance(block, Tensor):
            if block.is_complex():
                raise _not_numbers(str(block.dtype))
            block = block.detach().to("cpu", torch.float64).numpy()
        # Always a copy: what a module returns may be a view of it, and the user's array must not change.
        block = np.array(_as_array(block), dtype=np.float64, order="C")
        if block.ndim == 2:
            block = block[:, None, :]
        if block.shape[1:] != self.shape[1:]:
            raise InputError(
                describe(
                    f"rows of shape {block.shape[1:]}",
                    f"rows of shape {self.shape[1:]}, as X.shape says",
                    "Row slicing and .shape of the container disagree.",
                )
            )
        if not np.isfinite(block).all():
            self._raise_not_finite(block, key)
        return block

    def _raise_not_finite(self, block: np.ndarray, key: slice | np.ndarray) -> None:
        bad = ~np.isfinite(block)
        first = int(np.flatnonzero(bad.any(axis=(1, 2)))[0])
        numbers_of_rows = np.arange(self.shape[0])[key]
        what = "NaN" if np.isnan(block[bad]).any() else "infinity"
        raise InputError(
            describe(
                f"tokens that contain {what} (first in sample {int(numbers_of_rows[first])})",
                "finite numbers",
                "Drop or repair these samples; half-precision tokens overflow above 65504.",
            )
        )

    def chunks(self) -> Iterator[np.ndarray]:
        """This worker's samples in order, as float64 blocks (rows, s, d); all of them where it is alone."""
        own = current_world().rows(self.shape[0])
        for start in range(own.start, own.stop, self.rows_per_chunk):
            yield self.rows(slice(start, min(start + self.rows_per_chunk, own.stop)))


def _is_double(dtype: Any) -> bool:
    if isinstance(dtype, torch.dtype):
        return dtype == torch.float64
    try:
        return dtype is not None and np.dtype(dtype) == np.float64
    except TypeError:
        return False


def _not_numbers(dtype: str) -> InputError:
    return InputError(describe(f"tokens of type {dtype}", "real numbers", "Convert the tokens to float32 or float64."))


def _as_array(X: Any) -> np.ndarray:
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise InputError(
            describe("rows of different lengths", "an array of tokens (n, s, d)", "Pad or crop the samples.")
        ) from error
    if array.dtype.kind not in "fiub":
        try:
            if array.dtype.kind != "O":
                raise TypeError
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise _not_numbers(str(array.dtype)) from error
    return array


class TransformedTokens:
    """The tokens of `X` as a transform shows them, evaluated when rows are read: nothing is stored.

    Parameters
    ----------
    transform : a fitted transform.
    X : tokens (n, s, d) in any container that :meth:`TokenTransform.transform` takes.

    Attributes
    ----------
    shape : (n, s', d')
    dtype : float64 if X is float64, else float32
    rows_per_chunk : how many rows to read at once so that memory stays bounded

    ``view[rows]`` with a slice, or a 1-D array of indices or booleans that X itself understands, gives a
    numpy array (rows, s', d'); ``numpy.asarray(view)`` evaluates everything.
    """

    def __init__(self, transform: TokenTransform, X: Any) -> None:
        source = transform._source(X)
        self.shape = (source.shape[0], *transform.output_shape(source.shape[1]))
        self.dtype = source.dtype
        self.rows_per_chunk = source.rows_per_chunk
        self._source = source
        self._module = transform._module(torch.float64).eval()

    def __len__(self) -> int:
        return self.shape[0]

    def _rows64(self, rows: slice | np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._module(torch.from_numpy(self._source.rows(rows))).numpy()

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self._rows64(rows).astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        n, step = self.shape[0], self.rows_per_chunk
        out = np.empty(self.shape, self.dtype)
        for start in range(0, n, step):
            out[start : start + step] = self._rows64(slice(start, min(start + step, n)))
        return out if dtype is None else out.astype(dtype, copy=False)


# --------------------------------------------------------------------------------------------------
# The base class, its registry, and saving

TRANSFORMS: dict[str, type[TokenTransform]] = {}
"""Every transform by class name; the contract tests and :func:`from_state` go by it."""

_Class = TypeVar("_Class", bound="type[TokenTransform]")


def register(cls: _Class) -> _Class:
    """Class decorator: enter a :class:`TokenTransform` into :data:`TRANSFORMS`."""
    TRANSFORMS[cls.__name__] = cls
    return cls


class TokenTransform(TransformerMixin, BaseEstimator):
    """What all transforms share: chunked reading, checks, the module, saving.

    A subclass supplies ``_fit(source)``, ``output_shape(tokens)``, ``_module(dtype)`` and, where it learns
    something, the names of its fitted numbers and the shapes of its fitted arrays.

    Attributes
    ----------
    chunk_bytes : bytes of float64 tokens read at once, 64 MiB; assign another number to
        ``TokenTransform.chunk_bytes`` to change it. Results do not depend on it beyond rounding.
    n_features_in_, n_tokens_in_ : d and s of the tokens seen by `fit`.
    """

    chunk_bytes: ClassVar[int] = 64 * 2**20
    _numbers: ClassVar[tuple[str, ...]] = ()

    n_features_in_: int
    n_tokens_in_: int

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    # -- to be supplied

    def _fit(self, source: _Tokens) -> None:
        """Check the parameters and learn from the tokens; `n_features_in_` is known by now."""

    def output_shape(self, tokens: int) -> tuple[int, int]:
        """(s', d') of the result for samples of `tokens` tokens.

        Raises
        ------
        InputError
            If the transform cannot take that number of tokens.
        """
        raise NotImplementedError

    def _module(self, dtype: torch.dtype) -> nn.Module:
        raise NotImplementedError

    def _array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the fitted arrays, from the fitted numbers."""
        return {}

    # -- shared

    def _source(self, X: Any) -> _Tokens:
        check_is_fitted(self, "n_features_in_")
        source = _Tokens(X, self.chunk_bytes)
        if source.shape[2] != self.n_features_in_:
            raise InputError(
                describe(
                    f"tokens of {source.shape[2]} features",
                    f"{self.n_features_in_} features, as {type(self).__name__} was fitted on",
                    "Use tokens of the same backbone and the same transforms as in fit.",
                )
            )
        return source

    def fit(self, X: Any, y: Any = None) -> Any:
        """Learn from the tokens of the training split.

        Parameters
        ----------
        X : (n, s, d) or (n, d), which is taken as one token. A numpy array, a memory map, a torch tensor,
            or any object with ``.shape`` and row slicing, such as a token store. It is read in chunks of
            rows, at most a few times, and never held as a whole.
        y : ignored.

        Raises
        ------
        InputError
            If X is empty, not finite, or of a wrong rank, or a parameter cannot be used.
        """
        source = _Tokens(X, self.chunk_bytes)
        self.n_features_in_ = source.shape[2]
        self.n_tokens_in_ = source.shape[1]
        try:
            self._fit(source)
            self.output_shape(self.n_tokens_in_)
        except BaseException:
            # A transform whose fit failed must not pass for a fitted one.
            del self.n_features_in_, self.n_tokens_in_
            raise
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The transformed tokens (n, s', d'), float32, or float64 if X is float64.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        InputError
            If X is empty, not finite, of a wrong rank, or does not have the features seen by `fit`.
        """
        return np.asarray(self.view(X))

    def view(self, X: Any) -> TransformedTokens:
        """The same as `transform`, evaluated only where rows are read (for X larger than memory)."""
        return TransformedTokens(self, X)

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The fitted transform as a ``torch.nn.Module`` on tensors (n, s, d), its numbers as buffers.

        It can be scripted, traced, and exported to ONNX (:class:`PowerNormalizeTokens` needs
        ``method="newton"`` for the last), and agrees with `transform` to 1e-5 for tokens of ordinary
        scale. `dtype` is the type of the buffers.
        """
        check_is_fitted(self, "n_features_in_")
        return self._module(dtype).eval()

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """``(matrix, offset)`` with ``transform(x) = x @ matrix + offset`` for every token x.

        Returns
        -------
        matrix : (d, d') float64
        offset : (d',) float64

        Raises
        ------
        InputError
            If the transform is not an affine map of each token.
        """
        check_is_fitted(self, "n_features_in_")
        raise InputError(
            describe(
                f"{type(self).__name__}, which is not an affine map of each token",
                "StandardizeTokens, PCATokens, ScaleTokens, AppendConstant or a chain of them",
                "Use to_module() for this one.",
            )
        )

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Everything needed to rebuild the fitted transform: ``(config, arrays)``.

        `config` holds only what JSON can; `arrays` are copies, by name. :func:`from_state` is the inverse,
        exact to the last bit.
        """
        check_is_fitted(self, "n_features_in_")
        names = ("n_features_in_", "n_tokens_in_", *self._numbers)
        config = {
            "class": type(self).__name__,
            "params": {key: _encode(value) for key, value in self._own_params().items()},
            "fitted": {name: _encode(getattr(self, name)) for name in names},
        }
        return config, {name: np.array(getattr(self, name)) for name in self._array_shapes()}

    def _own_params(self) -> dict[str, Any]:
        return self.get_params(deep=False)

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TokenTransform:
        new = cls(**{key: _decode(value) for key, value in config["params"].items()})
        fitted = config["fitted"]
        for name in ("n_features_in_", "n_tokens_in_", *cls._numbers):
            setattr(new, name, _decode(fitted[name]))
        shapes = new._array_shapes()
        got = {name: np.shape(array) for name, array in arrays.items()}
        if got != shapes:
            raise InputError(
                describe(
                    f"arrays {got} for {cls.__name__}",
                    f"arrays {shapes}",
                    "The state is damaged or belongs to another transform: save it again.",
                )
            )
        for name in shapes:
            setattr(new, name, np.array(arrays[name]))
        return new


def from_state(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TokenTransform:
    """Rebuild a fitted transform from what :meth:`TokenTransform.state` gave.

    Raises
    ------
    InputError
        If the class is unknown, an entry is missing, or an array has another shape than it must have.
    """
    name = config.get("class") if isinstance(config, Mapping) else None
    if name not in TRANSFORMS:
        raise InputError(
            describe(
                f"the state of {name!r}",
                f"one of {', '.join(sorted(TRANSFORMS))}",
                "Update the package, or register the class before loading.",
            )
        )
    try:
        return TRANSFORMS[name]._from_state(config, arrays)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            describe(
                f"an incomplete state of {name} ({type(error).__name__}: {error})",
                "config and arrays as state() gives them",
                "The state is damaged: save it again.",
            )
        ) from error


def _encode(value: Any) -> Any:
    """Parameters and fitted numbers as JSON; tuples and slices are marked, so that they come back."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(part) for part in value]}
    if isinstance(value, list):
        return [_encode(part) for part in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and list(value) == ["slice"]:
        return slice(*value["slice"])
    if isinstance(value, dict) and list(value) == ["tuple"]:
        return tuple(_decode(part) for part in value["tuple"])
    if isinstance(value, list):
        return [_decode(part) for part in value]
    return value


def _buffer(value: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(np.asarray(value, np.float64)).to(dtype).clone()


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _finite_number(value: Any, name: str, expected: str, *, positive: bool = False) -> float:
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and np.isfinite(float(value))
    if not good or (positive and float(value) <= 0):
        raise InputError(describe(f"{name}={value!r}", expected, f"Set {name} accordingly."))
    return float(value)


# --------------------------------------------------------------------------------------------------
# Affine maps of each token


class _Moments:
    """Mean and sums of squared deviations over chunks, in float64.

    The pairwise update of Chan, Golub & LeVeque (1983): each chunk is centred at its own mean before it
    is squared, so a large common offset costs no digits, whatever the chunk size.
    """

    def __init__(self, features: int, *, full: bool) -> None:
        self.full = full
        self.count = 0
        self.mean = np.zeros(features)
        self.scatter = np.zeros((features, features) if full else features)

    def update(self, rows: np.ndarray) -> None:
        """Add rows (N, d)."""
        count = len(rows)
        mean = rows.mean(axis=0)
        centred = rows - mean
        delta = mean - self.mean
        weight = self.count * count / (self.count + count)
        if self.full:
            self.scatter += centred.T @ centred + weight * np.outer(delta, delta)
        else:
            self.scatter += np.einsum("nd,nd->d", centred, centred) + weight * delta**2
        self.mean += delta * (count / (self.count + count))
        self.count += count

    def share(self, world: World) -> None:
        """Take the rows of the other workers in."""
        if world.size == 1:
            return
        count, own = self.count, self.mean
        self.count = round(world.total(count))
        self.mean = world.sum(torch.from_numpy(own * (count / self.count))).numpy()
        delta = own - self.mean
        spread = count * (np.outer(delta, delta) if self.full else delta**2)
        self.scatter = world.sum(torch.from_numpy(self.scatter + spread)).numpy()


@register
class StandardizeTokens(TokenTransform):
    """Every feature to mean 0 and standard deviation 1 over the samples and tokens of the training split.

    Parameters
    ----------
    with_mean : subtract the mean, default True.
    with_std : divide by the standard deviation (of the population), default True. A feature that is
        constant over the training split is divided by 1.

    Attributes
    ----------
    mean_, scale_ : (d,) float64, what is subtracted and what is divided by.
    """

    mean_: np.ndarray
    scale_: np.ndarray

    def __init__(self, *, with_mean: bool = True, with_std: bool = True) -> None:
        self.with_mean = with_mean
        self.with_std = with_std

    def _fit(self, source: _Tokens) -> None:
        d = source.shape[2]
        moments = _Moments(d, full=False)
        low, high = np.full(d, np.inf), np.full(d, -np.inf)
        for block in source.chunks():
            rows = block.reshape(-1, d)
            moments.update(rows)
            np.minimum(low, rows.min(axis=0), out=low)
            np.maximum(high, rows.max(axis=0), out=high)
        world = current_world()
        moments.share(world)
        low, high = world.least(torch.from_numpy(low)).numpy(), -world.least(torch.from_numpy(-high)).numpy()
        deviation = np.sqrt(moments.scatter / moments.count)
        # Rounding can leave a tiny deviation on a constant feature; its range is exactly zero.
        deviation[(low == high) | (deviation == 0)] = 1.0
        self.mean_ = moments.mean if self.with_mean else np.zeros(d)
        self.scale_ = deviation if self.with_std else np.ones(d)

    def output_shape(self, tokens: int) -> tuple[int, int]:
        return tokens, self.n_features_in_

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return modules.Standardize(_buffer(self.mean_, dtype), _buffer(self.scale_, dtype))

    def _array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"mean_": (self.n_features_in_,), "scale_": (self.n_features_in_,)}

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "n_features_in_")
        return np.diag(1.0 / self.scale_), -self.mean_ / self.scale_


@register
class PCATokens(TokenTransform):
    """Principal components of the features, over all tokens of the training split.

    Parameters
    ----------
    n_components : number of components k; None keeps all d; a float in (0, 1) keeps the fewest that explain
        that share of the variance.
    whiten : how the components are scaled: False not at all, True by 1 / standard deviation, and a float
        e by ``variance ** -e`` (so True is 0.5; 0.25 is the milder scaling that suits second-order
        features). A component without variance (below 1e-12 of the largest) is left unscaled.

    Attributes
    ----------
    mean_ : (d,)
    components_ : (k, d), orthonormal rows, largest variance first; the entry of largest magnitude of each
        row is positive.
    explained_variance_ : (k,), of the population.
    explained_variance_ratio_ : (k,), as shares of the total.
    scale_ : (k,), what the components are multiplied by.
    n_components_ : k
    """

    _numbers = ("n_components_",)

    mean_: np.ndarray
    components_: np.ndarray
    explained_variance_: np.ndarray
    explained_variance_ratio_: np.ndarray
    scale_: np.ndarray
    n_components_: int

    def __init__(self, n_components: int | float | None = None, *, whiten: bool | float = False) -> None:
        self.n_components = n_components
        self.whiten = whiten

    def _exponent(self) -> float:
        if isinstance(self.whiten, (bool, np.bool_)):
            return 0.5 if self.whiten else 0.0
        return _finite_number(self.whiten, "whiten", "True, False or an exponent such as 0.25")

    def _count(self, ratio: np.ndarray, limit: int) -> int:
        k = self.n_components
        if k is None:
            return limit
        if _is_integer(k) and 1 <= k <= limit:
            return int(k)
        if isinstance(k, numbers.Real) and 0 < float(k) < 1:
            return min(limit, int(np.searchsorted(np.cumsum(ratio), float(k))) + 1)
        raise InputError(
            describe(
                f"n_components={k!r}",
                f"None, an integer from 1 to {limit} (the smaller of the features and the tokens of the "
                "training split), or a share of the variance in (0, 1)",
                "Lower n_components or fit on more tokens.",
            )
        )

    def _fit(self, source: _Tokens) -> None:
        exponent = self._exponent()
        d = source.shape[2]
        limit = min(d, source.shape[0] * source.shape[1])
        if not isinstance(self.n_components, float):
            self._count(np.empty(0), limit)  # a wrong number is told before the data are read
        moments = _Moments(d, full=True)
        for block in source.chunks():
            moments.update(block.reshape(-1, d))
        moments.share(current_world())
        values, vectors = np.linalg.eigh(moments.scatter / moments.count)
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        total = values.sum()
        ratio = values / total if total > 0 else np.zeros(d)
        k = self._count(ratio, limit)
        components = np.ascontiguousarray(vectors[:, :k].T)
        size = np.abs(components)
        # The first entry within rounding of the largest, so that ties do not make the sign a coin toss.
        pivot = np.argmax(size >= (1 - 1e-6) * size.max(axis=1, keepdims=True), axis=1)
        components *= np.where(components[np.arange(k), pivot] < 0, -1.0, 1.0)[:, None]
        variance = values[:k].copy()
        scale = np.ones(k)
        has_variance = variance > 1e-12 * values[0]
        scale[has_variance] = variance[has_variance] ** -exponent
        self.n_components_ = k
        self.mean_ = moments.mean
        self.components_ = components
        self.explained_variance_ = variance
        self.explained_variance_ratio_ = ratio[:k].copy()
        self.scale_ = scale

    def output_shape(self, tokens: int) -> tuple[int, int]:
        return tokens, self.n_components_

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return modules.Project(_buffer(self.mean_, dtype), _buffer(self.components_.T * self.scale_, dtype))

    def _array_shapes(self) -> dict[str, tuple[int, ...]]:
        d, k = self.n_features_in_, self.n_components_
        return {
            "mean_": (d,),
            "components_": (k, d),
            "explained_variance_": (k,),
            "explained_variance_ratio_": (k,),
            "scale_": (k,),
        }

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "n_features_in_")
        matrix = self.components_.T * self.scale_
        return matrix, -self.mean_ @ matrix


@register
class ScaleTokens(TokenTransform):
    """All tokens times one number, such as ``1 / sqrt(d)``.

    Parameters
    ----------
    factor : a finite number, default 1.0.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def _fit(self, source: _Tokens) -> None:
        _finite_number(self.factor, "factor", "a finite number")

    def output_shape(self, tokens: int) -> tuple[int, int]:
        return tokens, self.n_features_in_

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return modules.Scale(float(self.factor))

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "n_features_in_")
        d = self.n_features_in_
        return float(self.factor) * np.eye(d), np.zeros(d)


@register
class AppendConstant(TokenTransform):
    """One more feature, equal to `value` on every token.

    With it, a self-attention head contains first- and second-order statistics of the tokens beside the
    third-order ones: the constant turns factors of the products into ones.

    Parameters
    ----------
    value : a finite number, default 1.0.
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def _fit(self, source: _Tokens) -> None:
        _finite_number(self.value, "value", "a finite number")

    def output_shape(self, tokens: int) -> tuple[int, int]:
        return tokens, self.n_features_in_ + 1

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return modules.Append(float(self.value))

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "n_features_in_")
        d = self.n_features_in_
        offset = np.zeros(d + 1)
        offset[d] = float(self.value)
        return np.eye(d, d + 1), offset


# --------------------------------------------------------------------------------------------------
# Maps over the tokens of a sample


def _averages(size: int, to: int) -> np.ndarray:
    """Averaging of `size` cells into `to` windows, (to, size); windows as in adaptive average pooling."""
    weights = np.zeros((to, size))
    for row in range(to):
        start, stop = row * size // to, -(-(row + 1) * size // to)
        weights[row, start:stop] = 1.0 / (stop - start)
    return weights


@register
class PoolGrid(TokenTransform):
    """Average pooling of a grid of tokens to a smaller grid.

    Where the sizes do not divide, windows overlap as in ``torch.nn.AdaptiveAvgPool2d``: window i of m over
    h cells is ``[floor(i h / m), ceil((i + 1) h / m))``.

    Parameters
    ----------
    grid : (h, w), tokens row by row, s = h * w. Drop CLS and registers first (:class:`SelectTokens`).
    to : (h', w'), not larger than `grid`; default (1, 1).
    """

    def __init__(self, grid: tuple[int, int], to: tuple[int, int] = (1, 1)) -> None:
        self.grid = grid
        self.to = to

    def _pair(self, value: Any, name: str) -> tuple[int, int]:
        good = isinstance(value, (tuple, list)) and len(value) == 2
        if not good or not all(_is_integer(size) and size >= 1 for size in value):
            raise InputError(
                describe(f"{name}={value!r}", "a pair (rows, columns) of positive integers", f"Set {name}.")
            )
        return int(value[0]), int(value[1])

    def _fit(self, source: _Tokens) -> None:
        grid, to = self._pair(self.grid, "grid"), self._pair(self.to, "to")
        if to[0] > grid[0] or to[1] > grid[1]:
            raise InputError(
                describe(f"to={to} for grid={grid}", "a grid that is not larger in any direction", "Lower `to`.")
            )

    def output_shape(self, tokens: int) -> tuple[int, int]:
        if tokens != self.grid[0] * self.grid[1]:
            raise InputError(
                describe(
                    f"{tokens} tokens a sample",
                    f"{self.grid[0] * self.grid[1]} for grid={tuple(self.grid)}",
                    "Set grid to the patch grid and drop CLS and register tokens with SelectTokens.",
                )
            )
        return self.to[0] * self.to[1], self.n_features_in_

    def _module(self, dtype: torch.dtype) -> nn.Module:
        (h, w), (to_h, to_w) = self.grid, self.to
        return modules.MixTokens(_buffer(np.kron(_averages(h, to_h), _averages(w, to_w)), dtype))


@register
class MeanToken(TokenTransform):
    """The mean over the tokens of each sample: (n, s, d) to (n, 1, d)."""

    def output_shape(self, tokens: int) -> tuple[int, int]:
        return 1, self.n_features_in_

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return modules.Mean()


@register
class SelectTokens(TokenTransform):
    """Some tokens of each sample, such as the CLS row, or all but it.

    Parameters
    ----------
    tokens : an index (``0``: the first token, CLS in most backbones), a list or 1-D array of indices, a
        ``slice`` with a positive step, or a pair ``(start, stop)``, a tuple, which stands for
        ``slice(start, stop)``; ``(1, None)`` is everything but the first token. Negative numbers count
        from the end.
    """

    def __init__(self, tokens: int | Sequence[int] | np.ndarray | slice | tuple[int | None, int | None]) -> None:
        self.tokens = tokens

    def _bad(self) -> InputError:
        return InputError(
            describe(
                f"tokens={self.tokens!r}",
                "an index, a list of indices, a slice with a positive step, or a pair (start, stop)",
                "Set tokens accordingly.",
            )
        )

    def _choice(self) -> slice | np.ndarray:
        choice = self.tokens
        if isinstance(choice, tuple):
            if len(choice) != 2:
                raise self._bad()
            choice = slice(*choice)
        if isinstance(choice, slice):
            parts = (choice.start, choice.stop, choice.step)
            if not all(part is None or _is_integer(part) for part in parts):
                raise self._bad()
            if choice.step is not None and choice.step < 1:
                raise self._bad()
            return choice
        indices = np.atleast_1d(np.asarray(choice))
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
            raise self._bad()
        return indices.astype(np.int64)

    def _fit(self, source: _Tokens) -> None:
        self._choice()

    def output_shape(self, tokens: int) -> tuple[int, int]:
        choice = self._choice()
        if isinstance(choice, slice):
            count = len(range(*choice.indices(tokens)))
            if count:
                return count, self.n_features_in_
        elif choice.min() >= -tokens and choice.max() < tokens:
            return len(choice), self.n_features_in_
        raise InputError(
            describe(
                f"tokens={self.tokens!r} for samples of {tokens} tokens",
                f"indices from 0 to {tokens - 1} (or counted from the end), at least one",
                "Choose among the tokens that the samples have.",
            )
        )

    def _module(self, dtype: torch.dtype) -> nn.Module:
        choice = self._choice()
        if isinstance(choice, slice):
            stop = None if choice.stop is None else int(choice.stop)
            return modules.Slice(int(choice.start or 0), stop, int(choice.step or 1))
        return modules.Index(torch.from_numpy(choice.copy()))


# --------------------------------------------------------------------------------------------------
# Matrix power normalisation


@register
class PowerNormalizeTokens(TokenTransform):
    """Matrix power normalisation of each sample: X to ``X (X^T X / s + eps I) ** exponent``.

    With the exponent -1/4 the token covariance that a self-attention head sees, G = X^T X / s, becomes its
    square root, up to eps: the normalisation that covariance pooling needs (Lin & Maji, Improved bilinear
    pooling with CNNs, 2017; Li et al., Is second-order information helpful, 2017), inside the convex program.

    Parameters
    ----------
    eps : added to every eigenvalue of G, in the units of G; a positive number, or None:
        ``relative_eps`` times the mean eigenvalue of G over the training split (its mean trace / d).
    relative_eps : used when eps is None, default 1e-3.
    exponent : of the matrix power, default -0.25. Any finite number for "eigh"; -1, -1/2, -1/4 or -1/8
        for "newton".
    method : "eigh" (default), exact to rounding; or "newton", matrix products only, for ONNX, which has no
        eigenvalue operator: the coupled Newton iteration for the inverse p-th root (Iannazzo 2006; Higham,
        Functions of Matrices, 2008, section 7.3). Both run in float64 inside, on whichever of G (d, d) and
        X X^T / s (s, s) was smaller in fit; both give the same result.
    iterations : of "newton", default 30: enough to agree with "eigh" to 1e-8 of the largest entry as long
        as ``norm(G) / eps`` stays below 1e7 (1e9 for the exponents -1/4 and -1/8). The default eps keeps
        that ratio below ``1000 d`` for samples of average energy.

    Attributes
    ----------
    eps_ : the eps in use.
    """

    _numbers = ("eps_",)

    eps_: float

    def __init__(
        self,
        eps: float | None = None,
        *,
        relative_eps: float = 1e-3,
        exponent: float = -0.25,
        method: str = "eigh",
        iterations: int = 30,
    ) -> None:
        self.eps = eps
        self.relative_eps = relative_eps
        self.exponent = exponent
        self.method = method
        self.iterations = iterations

    def _fit(self, source: _Tokens) -> None:
        _finite_number(self.exponent, "exponent", "a finite number")
        if self.method not in ("eigh", "newton"):
            raise InputError(describe(f"method={self.method!r}", "'eigh' or 'newton'", "Choose one."))
        if self.method == "newton":
            if self.exponent not in (-1, -1 / 2, -1 / 4, -1 / 8):
                raise InputError(
                    describe(
                        f"exponent={self.exponent!r} with method='newton'",
                        "-1, -1/2, -1/4 or -1/8",
                        "Use method='eigh' for other exponents.",
                    )
                )
            if not _is_integer(self.iterations) or self.iterations < 1:
                raise InputError(
                    describe(f"iterations={self.iterations!r}", "a positive integer", "The default is 30.")
                )
        if self.eps is not None:
            self.eps_ = _finite_number(self.eps, "eps", "a positive number, or None", positive=True)
            return
        relative = _finite_number(self.relative_eps, "relative_eps", "a positive number", positive=True)
        n, s, d = source.shape
        # trace(X^T X / s) / d of a sample is the mean square of its entries.
        energy = current_world().total(sum(float(np.vdot(block, block)) for block in source.chunks())) / (n * s * d)
        if not 0 < relative * energy < np.inf:
            raise InputError(
                describe(
                    f"tokens of mean square {energy:g}",
                    "a positive finite mean square",
                    "Drop samples without content, scale the tokens, or give eps.",
                )
            )
        self.eps_ = relative * energy

    def output_shape(self, tokens: int) -> tuple[int, int]:
        return tokens, self.n_features_in_

    def _module(self, dtype: torch.dtype) -> nn.Module:
        # X f(X^T X) = f(X X^T) X: the smaller of the two matrices is enough.
        by_tokens = self.n_tokens_in_ < self.n_features_in_
        if self.method == "newton":
            halvings = round(np.log2(-1.0 / self.exponent))
            return modules.PowerByNewton(self.eps_, int(halvings), int(self.iterations), by_tokens)
        return modules.PowerByEigenvalues(self.eps_, float(self.exponent), by_tokens)


# --------------------------------------------------------------------------------------------------
# Compositions


class _Composition(TokenTransform):
    """A list of transforms; parameters of the i-th are reached as ``"i__name"`` (for grid search)."""

    transforms: Sequence[TokenTransform]
    transforms_: list[TokenTransform]

    def _check_list(self) -> None:
        try:
            given = list(self.transforms)
        except TypeError:
            given = []
        if not given or not all(isinstance(one, TokenTransform) for one in given):
            raise InputError(
                describe(
                    f"transforms={self.transforms!r}",
                    "a non-empty list of token transforms",
                    f"For instance {type(self).__name__}([SelectTokens(0)]).",
                )
            )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters, with those of the members under their position when `deep`."""
        params = {"transforms": self.transforms}
        if deep and isinstance(self.transforms, (list, tuple)):
            for index, one in enumerate(self.transforms):
                if not isinstance(one, TokenTransform):
                    continue
                params[str(index)] = one
                for key, value in one.get_params(deep=True).items():
                    params[f"{index}__{key}"] = value
        return params

    def set_params(self, **params: Any) -> Any:
        """Set `transforms`, a member by its position, or a parameter of a member as ``"0__name"``."""
        if "transforms" in params:
            self.transforms = params.pop("transforms")
        members = list(self.transforms)
        for index in range(len(members)):
            if str(index) in params:
                members[index] = params.pop(str(index))
                self.transforms = members
        if params:
            super().set_params(**params)
        return self

    def _own_params(self) -> dict[str, Any]:
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        config, arrays = super().state()
        config["transforms"] = []
        for index, one in enumerate(self.transforms_):
            child, child_arrays = one.state()
            config["transforms"].append(child)
            arrays.update({f"{index}.{name}": array for name, array in child_arrays.items()})
        return config, arrays

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> TokenTransform:
        parts: list[dict[str, np.ndarray]] = [{} for _ in config["transforms"]]
        for name, array in arrays.items():
            index, _, rest = name.partition(".")
            if not index.isdigit() or int(index) >= len(parts):
                raise KeyError(f"no member for array {name!r}")
            parts[int(index)][rest] = array
        fitted = [from_state(child, part) for child, part in zip(config["transforms"], parts, strict=True)]
        params = {key: _decode(value) for key, value in config["params"].items()}
        new: Any = cls([clone(one) for one in fitted], **params)
        new.transforms_ = fitted
        for name in ("n_features_in_", "n_tokens_in_"):
            setattr(new, name, config["fitted"][name])
        return new


@register
class ConcatenateFeatures(_Composition):
    """Several views of the same samples side by side, along the features.

    Parameters
    ----------
    transforms : list of transforms, each fitted on the tokens given; all must leave equally many tokens.
        CLS and mean patch, (n, 1, 2 d): ``ConcatenateFeatures([SelectTokens(0),
        ChainTransforms([SelectTokens((1, None)), MeanToken()])])``.

    Attributes
    ----------
    transforms_ : the fitted transforms; those given are left as they were.
    """

    def __init__(self, transforms: Sequence[TokenTransform]) -> None:
        self.transforms = transforms

    def _fit(self, source: _Tokens) -> None:
        self._check_list()
        self.transforms_ = [clone(one) for one in self.transforms]
        for one in self.transforms_:
            one.fit(source.container)

    def output_shape(self, tokens: int) -> tuple[int, int]:
        shapes = [one.output_shape(tokens) for one in self.transforms_]
        counts = [count for count, _ in shapes]
        if len(set(counts)) > 1:
            raise InputError(
                describe(
                    f"views with {counts} tokens",
                    "the same number of tokens in every view",
                    "Pool or select the tokens of the longer ones, for instance with MeanToken.",
                )
            )
        return counts[0], sum(features for _, features in shapes)

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return modules.Concatenate([one._module(dtype) for one in self.transforms_])

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "n_features_in_")
        parts = [one.affine() for one in self.transforms_]
        return np.hstack([matrix for matrix, _ in parts]), np.hstack([offset for _, offset in parts])


def _compose(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    matrix, offset = parts[0]
    for next_matrix, next_offset in parts[1:]:
        matrix, offset = matrix @ next_matrix, offset @ next_matrix + next_offset
    return matrix, offset


@register
class ChainTransforms(_Composition):
    """Transforms one after the other, as one transform.

    The same as a scikit-learn ``Pipeline`` of them, except that no intermediate result is ever stored, and
    that the chain has a module, a state and, where all members have one, an affine map.

    Parameters
    ----------
    transforms : list of transforms, first one first.

    Attributes
    ----------
    transforms_ : the fitted transforms; those given are left as they were.
    """

    def __init__(self, transforms: Sequence[TokenTransform]) -> None:
        self.transforms = transforms

    def _fit(self, source: _Tokens) -> None:
        self._check_list()
        self.transforms_ = [clone(one) for one in self.transforms]
        current: Any = source.container
        for one in self.transforms_:
            current = one.fit(current).view(current)

    def output_shape(self, tokens: int) -> tuple[int, int]:
        features = self.n_features_in_
        for one in self.transforms_:
            tokens, features = one.output_shape(tokens)
        return tokens, features

    def _module(self, dtype: torch.dtype) -> nn.Module:
        return nn.Sequential(*[one._module(dtype) for one in self.transforms_])

    def to_module(self, dtype: torch.dtype = torch.float32, *, fold: bool = False) -> nn.Module:
        """The chain as a module; see :meth:`TokenTransform.to_module`.

        fold : merge each run of affine members into one matrix product and one offset. That is the
            fastest form; in float32 it loses digits when means are large beside the deviations, since
            the mean is then subtracted after the product and not before it.
        """
        check_is_fitted(self, "n_features_in_")
        if not fold:
            return super().to_module(dtype)
        members: list[nn.Module] = []
        run: list[tuple[np.ndarray, np.ndarray]] = []

        def close_run() -> None:
            if run:
                matrix, offset = _compose(run)
                members.append(modules.Affine(_buffer(matrix, dtype), _buffer(offset, dtype)))
                run.clear()

        for one in self.transforms_:
            try:
                run.append(one.affine())
            except InputError:
                close_run()
                members.append(one._module(dtype))
        close_run()
        return (members[0] if len(members) == 1 else nn.Sequential(*members)).eval()

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self, "n_features_in_")
        return _compose([one.affine() for one in self.transforms_])
