"""Tokens as users have them: arrays, memory maps, tensors, token stores. Checked, never copied without need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_array

from convexheads.errors import InputError, describe
from convexheads.memory import FileRows, current, folder_of, release_pages, roomy_folder

_EXPECTED = "tokens (n, s, d): samples, tokens, features; or (n, d) for one token a sample"


class TokenRows:
    """Rows of tokens (n, s, d) that are read on demand from something sliceable.

    Parameters
    ----------
    source : what has a shape (n, s, d) or (n, d) and row slicing.
    check : whether all rows are read once to see that they are finite.
    """

    def __init__(self, source: Any, check: bool = True) -> None:
        self.source = source
        shape = tuple(int(size) for size in source.shape)
        self.shape = shape if len(shape) == 3 else (shape[0], 1, shape[1])
        self.dtype = getattr(source, "dtype", None)
        step = self.rows_per_chunk
        for start in range(0, self.shape[0] if check else 0, step):
            check_finite(self[start : start + step], start)

    @property
    def rows_per_chunk(self) -> int:
        """How many rows to read at once so that memory stays bounded."""
        return max(1, current().reading // (8 * self.shape[1] * self.shape[2]))

    def part(self, rows: slice) -> TokenRows:
        """Consecutive rows, as rows of their own."""
        start, stop, _ = rows.indices(self.shape[0])
        return TokenRows(_Run(self, start, stop), check=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        read = self.source[index]
        if isinstance(read, torch.Tensor):
            part = read
        else:
            array = np.ascontiguousarray(np.asarray(read))
            # A tensor must not share the memory of a map.
            mapped = isinstance(self.source, np.memmap)
            part = torch.from_numpy(array.copy() if mapped or not array.flags.writeable else array)
            release_pages(self.source)
        if part.dtype not in (torch.float32, torch.float64):
            part = part.float()
        return part if part.ndim == 3 else part[:, None]


class _Run:
    """Rows ``start`` to ``stop`` of other rows."""

    def __init__(self, source: TokenRows, start: int, stop: int) -> None:
        self.source, self.start = source, start
        self.shape, self.dtype = (stop - start, *source.shape[1:]), source.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.shape[0])
            return self.source[slice(self.start + start, self.start + stop, step)]
        return self.source[np.asarray(index) + self.start]


def own_rows(tokens: torch.Tensor | TokenRows, rows: slice) -> torch.Tensor | TokenRows:
    """Consecutive samples of tokens, not read."""
    return tokens[rows] if isinstance(tokens, torch.Tensor) else tokens.part(rows)


def shown(view: Any, X: Any) -> torch.Tensor | TokenRows:
    """Tokens X as a fitted transform shows them.

    They are held in memory where they fit into the memory that is left to them, else in a temporary file beside the
    tokens, and evaluated whenever they are read where there is no room for one.
    """
    if not hasattr(view, "view"):
        return as_tokens(view.transform(X))
    seen = view.view(X)
    dtype = torch.float64 if seen.dtype == np.float64 else torch.float32
    needed = int(np.prod(seen.shape)) * dtype.itemsize
    if needed <= current().cache:
        return as_tokens(np.asarray(seen))
    folder = roomy_folder(folder_of(X), needed)
    if folder is None:
        return TokenRows(seen)
    kept = FileRows(seen.shape, dtype, folder)
    for start in range(0, seen.shape[0], seen.rows_per_chunk):
        part = torch.from_numpy(seen[start : start + seen.rows_per_chunk])
        check_finite(part, start)
        kept.write(start, part)
    return TokenRows(kept, check=False)


class _Features:
    """The first ``count`` features of other rows."""

    def __init__(self, source: TokenRows, count: int) -> None:
        self.source, self.count = source, count
        self.shape, self.dtype = (*source.shape[:2], count), source.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source[index][..., : self.count]


def without_last(X: Any) -> Any:
    """Tokens without their last feature."""
    if isinstance(X, TokenRows):
        return TokenRows(_Features(X, X.shape[2] - 1), check=False)
    return X[..., :-1]


def check_finite(part: torch.Tensor, start: int = 0) -> None:
    """Raise InputError if tokens contain NaN or infinity, naming the first sample."""
    if bool(torch.isfinite(part.sum())):
        return
    bad = ~torch.isfinite(part).flatten(1).all(1)
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    kind = "NaN" if bool(torch.isnan(part[row]).any()) else "infinity (inf)"
    raise InputError(
        "X: "
        + describe(
            f"{kind} in the tokens of sample {start + row} ({int(bad.sum())} such samples in this part)",
            "finite tokens",
            "Remove these samples, or look for an overflow in float16 extraction.",
        )
    )


def as_tokens(X: Any, keep_lazy: bool = True, check: bool = True) -> torch.Tensor | TokenRows:
    """Tokens (n, s, d) from what users pass; (n, d) becomes one token a sample.

    In-memory arrays become a tensor that shares their memory (float32 and float64 are kept, all else becomes
    float64); memory maps and token stores stay on disk as :class:`TokenRows`. ``check=False`` does not read them to
    look for NaN, where that has been done before.

    Raises
    ------
    InputError
        For another number of dimensions, an empty axis, or tokens that are not finite real numbers.
    """
    if isinstance(X, TokenRows):
        return X
    if keep_lazy and (isinstance(X, np.memmap) or _is_store(X)):
        _check_shape(tuple(X.shape))
        return TokenRows(X, check)
    if isinstance(X, torch.Tensor):
        _check_shape(tuple(X.shape))
        tensor = X.detach()
        if tensor.is_complex():
            raise InputError("X: " + describe("complex numbers", "real tokens"))
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        check_finite(tensor)
    else:
        if _is_store(X):
            X = np.asarray(X)
        array = _as_array(X)
        array = np.ascontiguousarray(array)
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        check_finite(tensor)
    return tensor if tensor.ndim == 3 else tensor[:, None]


def _as_array(X: Any) -> np.ndarray:
    """A float32 or float64 array of what numpy can make one of."""
    if isinstance(X, np.ndarray):
        _check_shape(X.shape)
    if hasattr(X, "tocsr"):
        raise InputError("X: " + describe("sparse data", "a dense array of tokens", "Convert it with X.toarray()."))
    try:
        array = check_array(
            X, allow_nd=True, dtype=[np.float64, np.float32], ensure_2d=False, ensure_min_samples=0,
            ensure_min_features=0, ensure_all_finite=False,
        )  # fmt: skip
    except ValueError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError("X: " + describe(f"something that is no array of numbers ({reason})", _EXPECTED)) from error
    _check_shape(array.shape)
    return array


def _is_store(X: Any) -> bool:
    # A token store or a lazy view: an object with a shape and row slicing that is no array of its own.
    return (
        hasattr(X, "shape")
        and hasattr(X, "__getitem__")
        and not isinstance(X, (np.ndarray, torch.Tensor))
        and not hasattr(X, "iloc")
        and not hasattr(X, "__dataframe__")
        and not hasattr(X, "tocsr")
        and not hasattr(X, "__array_interface__")
        and not hasattr(X, "__array_namespace__")
        and not hasattr(X, "__array_function__")
        and len(getattr(X, "shape", ())) in (2, 3)
    )


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3):
        raise InputError(
            "X: "
            + describe(
                f"{len(shape)} dimensions, shape {tuple(shape)}",
                _EXPECTED,
                "Reshape your data; a single sample is X[None].",
            )
        )
    if 0 in shape:
        names = ("sample", "feature") if len(shape) == 2 else ("sample", "token", "feature")
        empty = names[shape.index(0)]
        raise InputError(
            "X: " + describe(f"0 {empty}(s) (shape={shape}) while a minimum of 1 is required", f"at least one {empty}")
        )
