"""Token stores: a folder with a manifest and memory-mapped shards of tokens.

Layout of the folder::

    manifest.json        what the tokens are, and the hash of every other file
    tokens-00000.bin     rows one after the other, little-endian, C order, no header
    tokens-00001.bin     ...
    labels.npy           int64, one a row; absent when the images have no labels

Nothing in it is pickled: opening a store never runs code from it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convexheads.errors import DataError, InputError, describe
from convexheads.memory import release_pages
from convexheads.tokens.files import (
    digest,
    full_disk_as_data_error,
    read_json,
    sha256_file,
    temporary_name,
    write_atomic,
    write_json,
)

FORMAT = "convexheads-tokens"
VERSION = 1
MANIFEST = "manifest.json"
JOURNAL = "progress.json"
LABELS = "labels.npy"

# bfloat16 has no numpy type: its bits are kept in unsigned 16-bit integers.
STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}
ROLES = ("cls", "registers", "patch")

_SHARD_NAME = re.compile(r"tokens-\d{5}\.bin")
_SHARD_BYTES = 128 << 20
_AGAIN = "Extract the tokens again into another folder, or with --overwrite"

# What the key is made of: two stores with the same key hold the same tokens.
KEY_FIELDS = (
    "format",
    "version",
    "dtype",
    "layout",
    "grid",
    "tokens",
    "split",
    "backbone",
    "transform",
    "dataset",
)


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"tokens-{index:05d}.bin"


def default_shard_rows(row_bytes: int) -> int:
    """Number of rows a shard has by default: about 128 MiB of tokens."""
    return max(1, _SHARD_BYTES // max(1, row_bytes))


def store_key(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides what the tokens are (``KEY_FIELDS``)."""
    return digest({name: manifest[name] for name in KEY_FIELDS})


def encode(tokens: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Tokens as they are stored.

    Parameters
    ----------
    tokens : float32 array of any shape.
    dtype : "float16", "bfloat16" or "float32".

    Raises
    ------
    InputError
        If a value is not finite, or does not fit into ``dtype`` (float16 ends at 65504).
    """
    tokens = np.asarray(tokens, np.float32)
    if not np.isfinite(tokens).all():
        bad = int((~np.isfinite(tokens)).sum())
        raise InputError(describe(f"{bad} token values that are NaN or infinite", "finite tokens"))
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(tokens).view(np.uint32)
        # Round to nearest, ties to even, as hardware does.
        stored: NDArray[Any] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        if ((stored & 0x7F80) == 0x7F80).any():
            raise InputError(_overflow(tokens, dtype))
        return stored
    with np.errstate(over="ignore"):
        stored = tokens.astype(STORED_DTYPES[dtype])
    if dtype == "float16" and not np.isfinite(stored).all():
        raise InputError(_overflow(tokens, dtype))
    return stored


def decode_into(out: NDArray[np.float32], stored: NDArray[Any], dtype: str) -> None:
    """Write stored tokens into a float32 array of the same shape."""
    if dtype == "bfloat16":
        np.left_shift(stored.astype(np.uint32), 16, out=out.view(np.uint32))
    else:
        out[...] = stored


def _overflow(tokens: NDArray[np.float32], dtype: str) -> str:
    largest = float(np.abs(tokens).max())
    other = "bfloat16 or float32" if dtype == "float16" else "float32"
    return describe(f"a token value of size {largest:.4g}", f"values that fit into {dtype}", f"Use --dtype {other}")


def check_dtype(dtype: str) -> str:
    """``dtype`` if tokens can be stored so, else InputError."""
    if dtype not in STORED_DTYPES:
        raise InputError(describe(f"dtype {dtype!r}", f"one of {', '.join(STORED_DTYPES)}"))
    return dtype


def parse_roles(roles: str | Sequence[str], layout: Mapping[str, Sequence[int]]) -> list[str]:
    """The roles asked for, in the order in which their tokens lie.

    Parameters
    ----------
    roles : "all", one role, several separated by commas, or a sequence of roles.
    layout : role -> [start, stop) in the token axis.

    Raises
    ------
    InputError
        If a role is not in the layout, or none is asked for.
    """
    names = [part.strip() for part in roles.split(",")] if isinstance(roles, str) else list(roles)
    present = sorted(layout, key=lambda role: layout[role][0])
    if names == ["all"]:
        return present
    unknown = [name for name in names if name not in layout]
    if unknown or not names:
        got = f"tokens {', '.join(map(repr, unknown))}" if unknown else "no token role"
        raise InputError(describe(got, f"'all' or some of {', '.join(present)}, the tokens there are"))
    return [role for role in present if role in names]


def select_layout(
    roles: Sequence[str], layout: Mapping[str, Sequence[int]]
) -> tuple[dict[str, list[int]], list[tuple[int, int]]]:
    """The layout of the chosen tokens alone, and the ranges of the token axis that hold them."""
    chosen: dict[str, list[int]] = {}
    ranges: list[tuple[int, int]] = []
    position = 0
    for role in roles:
        start, stop = layout[role]
        chosen[role] = [position, position + stop - start]
        position += stop - start
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return chosen, ranges


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class TokenStore:
    """Tokens on disk, read as float32 arrays without loading what is not asked for.

    Made by :meth:`open` or :meth:`write`. ``store[i]`` is (s, d); ``store[i:j]``, ``store[[3, 1, 4]]`` and
    ``store[mask]`` are (k, s, d); ``np.asarray(store)`` is everything, (n, s, d): all float32. Rows may be
    asked for in any order, across shards; only their bytes are read.

    ``select`` and ``subset`` give views with the same interface that read the same files.

    Attributes
    ----------
    path : folder of the store.
    manifest : content of manifest.json, of the whole store also for a view.
    shape : (n, s, d): images, tokens, features.
    labels : int64 array (n,), or None when the images have no labels.
    class_names : names of the classes, in the order of the labels, or None.
    layout : role -> (start, stop) in the token axis; roles are "cls", "registers" and "patch".
    grid : (h, w) when the tokens are exactly the h * w patches, row by row; None otherwise. The patches
        of any store: ``store.select("patch")``.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        labels: NDArray[np.int64] | None,
        rows: NDArray[np.int64] | None = None,
        roles: Sequence[str] | None = None,
        maps: dict[int, NDArray[Any]] | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._all_labels = labels
        self._rows = rows
        self._roles = parse_roles("all" if roles is None else roles, manifest["layout"])
        # Views share the memory maps of the store they come from.
        self._maps: dict[int, NDArray[Any]] = {} if maps is None else maps
        counts = [shard["rows"] for shard in manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        chosen, self._ranges = select_layout(self._roles, manifest["layout"])
        self.layout: dict[str, tuple[int, int]] = {role: (a, b) for role, (a, b) in chosen.items()}
        n, _, width = manifest["shape"]
        tokens = sum(stop - start for start, stop in self._ranges)
        self.shape: tuple[int, int, int] = (n if rows is None else len(rows), tokens, width)

    # -- making one ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open a store and check that its files are there and have the right sizes.

        Raises
        ------
        DataError
            If there is no store, its manifest is damaged, or a file is missing or has another size. (The
            content of the shards is checked by :meth:`verify`.)
        """
        path = Path(path)
        manifest = _read_manifest(path)
        n, s, d = manifest["shape"]
        row_bytes = s * d * STORED_DTYPES[manifest["dtype"]].itemsize
        for shard in manifest["shards"]:
            _check_size(path / shard["file"], shard["rows"] * row_bytes)
        labels = None
        if manifest["labels"] is not None:
            file = path / LABELS
            try:
                labels = np.load(file, allow_pickle=False)
            except FileNotFoundError as error:
                raise DataError(f"{file}: missing; the manifest lists it. {_AGAIN}") from error
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{file}: cannot read the labels ({error}). {_AGAIN}") from error
            if labels.shape != (n,) or labels.dtype != np.int64:
                got = f"labels of shape {labels.shape} and type {labels.dtype}"
                raise DataError(f"{file}: {describe(got, f'({n},) and int64', _AGAIN)}")
        return cls(path, manifest, labels)

    @classmethod
    def write(
        cls,
        path: str | Path,
        tokens: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        class_names: Sequence[str] | None = None,
        layout: Mapping[str, Sequence[int]] | None = None,
        grid: tuple[int, int] | None = None,
        dtype: str = "float16",
        name: str = "arrays",
        split: str | None = None,
        shard_rows: int | None = None,
        overwrite: bool = False,
    ) -> TokenStore:
        """Write tokens that are in memory as a store.

        Parameters
        ----------
        path : folder to make; it must be new or empty, unless ``overwrite``.
        tokens : (n, s, d) finite numbers, or (n, d) for one token an image.
        labels : (n,) integers >= 0, or None.
        class_names : one name a class, or None.
        layout : role -> [start, stop) covering the s tokens; None: all are patches.
        grid : (h, w) of the patches, h * w of them; None: not known.
        dtype : "float16" (default), "bfloat16" or "float32".
        name : what to call the data in the manifest.
        split : name of the split, such as "train", or None.
        shard_rows : rows a shard; None: about 128 MiB.
        overwrite : replace the store that is there.

        Raises
        ------
        InputError
            If shapes do not fit together or a value does not fit into ``dtype``.
        DataError
            If the folder is not empty, or cannot be written.
        """
        path = Path(path)
        check_dtype(dtype)
        array = np.asarray(tokens)
        if array.ndim == 2:
            array = array[:, None, :]
        if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "fiu":
            got = f"tokens of shape {np.shape(tokens)} and type {array.dtype}"
            raise InputError(describe(got, "real numbers of shape (n, s, d), none of them 0"))
        n, s, d = array.shape
        label_array = None if labels is None else check_labels(labels, n, class_names)
        full_layout = {"patch": [0, s]} if layout is None else {role: list(layout[role]) for role in layout}
        check_layout(full_layout, s, grid, InputError)
        stored = encode(array.astype(np.float32, copy=False), dtype)
        content = digest([sha256_bytes(stored), None if label_array is None else sha256_bytes(label_array)])
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "shape": [n, s, d],
            "dtype": dtype,
            "layout": full_layout,
            "grid": None if grid is None else list(grid),
            "tokens": "all",
            "split": split,
            "backbone": None,
            "transform": None,
            "dataset": {"kind": "arrays", "name": name, "content": content},
            "class_names": None if class_names is None else [str(item) for item in class_names],
        }
        prepare_folder(path, overwrite)
        rows = shard_rows or default_shard_rows(stored[0].nbytes)
        shards = []
        with full_disk_as_data_error(path, "Free some space and write the store again"):
            for index, start in enumerate(range(0, n, rows)):
                data = stored[start : start + rows].tobytes()
                write_atomic(path / shard_name(index), data)
                shards.append(shard_entry(index, min(rows, n - start), sha256_bytes(data)))
            finish(path, manifest, shards, label_array)
        return cls.open(path)

    # -- what it is ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        n, s, d = self.shape
        grid = f", grid {self.grid[0]}x{self.grid[1]}" if self.grid else ""
        return f"TokenStore({str(self.path)!r}: {n} images x {s} tokens x {d} features{grid})"

    @property
    def ndim(self) -> int:
        """3: images, tokens, features."""
        return 3

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """Type of the arrays read from the store: float32."""
        return np.dtype(np.float32)

    @property
    def stored_dtype(self) -> str:
        """Type on disk: "float16", "bfloat16" or "float32"."""
        return str(self.manifest["dtype"])

    @property
    def key(self) -> str:
        """Hash of all that decides the tokens of the whole store (also for a view)."""
        return str(self.manifest["key"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of exactly these tokens: the store's key, and the view's rows and roles."""
        rows = None if self._rows is None else sha256_bytes(self._rows.astype("<i8"))
        return {"key": self.key, "roles": list(self._roles), "rows": rows, "shape": list(self.shape)}

    @property
    def split(self) -> str | None:
        """Name of the split that the images come from, or None."""
        value: str | None = self.manifest["split"]
        return value

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the labels, or None."""
        names: list[str] | None = self.manifest["class_names"]
        return None if names is None else list(names)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels of the rows, int64 (n,), or None when the images have none."""
        if self._all_labels is None or self._rows is None:
            return self._all_labels
        return self._all_labels[self._rows]

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) when the tokens are exactly the patches of an h x w grid, row by row; else None."""
        grid = self.manifest["grid"]
        return (int(grid[0]), int(grid[1])) if grid is not None and self._roles == ["patch"] else None

    def require_labels(self) -> NDArray[np.int64]:
        """The labels, or DataError when the images have none."""
        labels = self.labels
        if labels is None:
            raise DataError(
                f"{self.path}: "
                + describe(
                    "tokens without labels",
                    "one label an image",
                    "Extract them from images in one folder a class, or give --label-column or --labels",
                )
            )
        return labels

    # -- views --------------------------------------------------------------------------------------

    def select(self, roles: str | Sequence[str]) -> TokenStore:
        """A view of some tokens of every image.

        Parameters
        ----------
        roles : "cls", "registers", "patch", several of them ("cls,patch" or a list), or "all".

        Raises
        ------
        InputError
            If the store has no such tokens.
        """
        chosen = parse_roles(roles, self.layout)
        return TokenStore(self.path, self.manifest, self._all_labels, self._rows, chosen, self._maps)

    def subset(self, indices: ArrayLike | slice) -> TokenStore:
        """A view of some rows: integers (negative ones count from the end), a mask (n,) or a slice.

        Raises
        ------
        InputError
            If an index is out of range or the mask has another length.
        """
        rows = self._resolve(indices)
        base = rows if self._rows is None else self._rows[rows]
        return TokenStore(self.path, self.manifest, self._all_labels, base, self._roles, self._maps)

    # -- reading ------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        if isinstance(index, tuple):
            head, rest = (index[0], index[1:]) if index else (slice(None), ())
            if head is Ellipsis or head is None:
                raise InputError(describe(f"index {index!r}", "rows first, such as store[i:j]"))
            if not isinstance(head, (int, np.integer)):
                rest = (slice(None), *rest)
            return self[head][rest]
        if isinstance(index, (int, np.integer)) and not isinstance(index, (bool, np.bool_)):
            position = int(index) + len(self) if index < 0 else int(index)
            if not 0 <= position < len(self):
                # IndexError, not one of ours: it ends Python's iteration protocol.
                raise IndexError(describe(f"row {int(index)}", f"one of {len(self)} rows"))
            return self._read(np.array([position]))[0]
        return self._read(self._resolve(index))

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self), 64):
            yield from self._read(np.arange(start, min(start + 64, len(self))))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("tokens are read from disk and converted to float32: a copy cannot be avoided")
        array = self._read(np.arange(len(self)))
        return array if dtype is None else array.astype(dtype, copy=False)

    def verify(self) -> None:
        """Read every file and compare it with its hash.

        Raises
        ------
        DataError
            Naming the first file that differs from what was written.
        """
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
            if sha256_file(file) != shard["sha256"]:
                raise DataError(f"{file}: corrupt: its SHA-256 is not that of the manifest. {_AGAIN}")
        labels = self.manifest["labels"]
        if labels is not None and sha256_file(self.path / LABELS) != labels["sha256"]:
            raise DataError(f"{self.path / LABELS}: corrupt: its SHA-256 is not that of the manifest. {_AGAIN}")

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps would be pickled as full arrays; the other process opens its own.
        return {**self.__dict__, "_maps": {}}

    def _resolve(self, index: Any) -> NDArray[np.int64]:
        n = len(self)
        if isinstance(index, slice):
            return np.arange(n, dtype=np.int64)[index]
        array = np.asarray(index)
        if array.ndim == 1 and array.size == 0:
            return np.empty(0, np.int64)
        if array.ndim == 1 and array.dtype == bool:
            if len(array) != n:
                raise InputError(describe(f"a mask of length {len(array)}", f"length {n}, one entry a row"))
            return np.flatnonzero(array)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            got = f"an index of shape {array.shape} and type {array.dtype}"
            raise InputError(describe(got, "a slice, a list of row numbers or a mask"))
        rows = array.astype(np.int64)
        rows = np.where(rows < 0, rows + n, rows)
        if rows.min() < 0 or rows.max() >= n:
            bad = array[(rows < 0) | (rows >= n)][0]
            raise InputError(describe(f"row {bad}", f"one of {n} rows"))
        return rows

    def _map(self, shard: int) -> NDArray[Any]:
        if shard not in self._maps:
            entry = self.manifest["shards"][shard]
            _, s, d = self.manifest["shape"]
            file = self.path / entry["file"]
            try:
                self._maps[shard] = np.memmap(
                    file, STORED_DTYPES[self.manifest["dtype"]], mode="r", shape=(entry["rows"], s, d)
                )
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: cannot be read any more ({error}). {_AGAIN}") from error
        return self._maps[shard]

    def _read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the view, float32 (k, s, d)."""
        base = rows if self._rows is None else self._rows[rows]
        out = np.empty((len(base), *self.shape[1:]), np.float32)
        shards = np.searchsorted(self._starts, base, side="right") - 1
        for shard in np.unique(shards):
            positions = np.flatnonzero(shards == shard)
            local = base[positions] - self._starts[shard]
            source = _as_slice(local)
            target = _as_slice(positions)
            column = 0
            for start, stop in self._ranges:
                # Slices are read straight from the map; scattered rows are gathered in the stored type.
                block = self._map(int(shard))[source, start:stop]
                width = stop - start
                if isinstance(target, slice):
                    decode_into(out[target, column : column + width], block, self.stored_dtype)
                else:
                    decoded = np.empty(block.shape, np.float32)
                    decode_into(decoded, block, self.stored_dtype)
                    out[target, column : column + width] = decoded
                column += width
            release_pages(self._map(int(shard)))
        return out


def open_splits(path: str | Path) -> dict[str, TokenStore]:
    """The stores under a folder, by split: what ``convexheads extract`` has written there.

    Parameters
    ----------
    path : a folder with one store a split (train, val, test), or one store.

    Returns
    -------
    dict
        Split -> store; for a single store, its split, or "all" when it has none.

    Raises
    ------
    DataError
        If there is no store, or one of them cannot be opened.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and path.is_dir():
        stores = sorted(child.parent for name in (MANIFEST, JOURNAL) for child in path.glob(f"*/{name}"))
        if stores:
            return {folder.name: TokenStore.open(folder) for folder in dict.fromkeys(stores)}
    store = TokenStore.open(path)
    return {store.split or "all": store}


# -- pieces shared with the extraction ------------------------------------------------------------------


def sha256_bytes(data: bytes | NDArray[Any]) -> str:
    """SHA-256 (hexadecimal) of bytes, or of an array's content in C order."""
    import hashlib

    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).data).hexdigest()


def shard_entry(index: int, rows: int, sha256: str) -> dict[str, Any]:
    """What the manifest says of one shard."""
    return {"file": shard_name(index), "rows": rows, "sha256": sha256}


def check_labels(labels: ArrayLike, n: int, class_names: Sequence[str] | None) -> NDArray[np.int64]:
    """Labels as int64 (n,), or InputError."""
    array = np.asarray(labels)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        got = f"labels of shape {array.shape} and type {array.dtype}"
        raise InputError(describe(got, f"{n} integers, one a row"))
    if array.min() < 0:
        raise InputError(describe(f"label {array.min()}", "labels from 0"))
    if class_names is not None and array.max() >= len(class_names):
        raise InputError(describe(f"label {array.max()}", f"labels below {len(class_names)}, the class names given"))
    return array.astype(np.int64)


def check_layout(layout: Any, s: int, grid: Any, error: type[InputError] | type[DataError]) -> None:
    """Raise ``error`` unless the roles cover the s tokens without overlap and the grid fits the patches."""
    if not isinstance(layout, dict) or not layout or any(role not in ROLES for role in layout):
        raise error(describe(f"layout {layout!r}", f"token ranges for some of {', '.join(ROLES)}"))
    position = 0
    for span in sorted(layout.values()):
        if len(span) != 2 or span[0] != position or span[1] <= span[0]:
            raise error(describe(f"layout {layout!r}", f"ranges that cover the {s} tokens without overlap"))
        position = span[1]
    if position != s:
        raise error(describe(f"layout {layout!r}", f"ranges that cover the {s} tokens without overlap"))
    if grid is not None:
        start, stop = layout.get("patch", (0, 0))
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != stop - start:
            raise error(describe(f"grid {tuple(grid)}", f"(h, w) with h * w = {stop - start}, the number of patches"))


def prepare_folder(path: Path, overwrite: bool) -> None:
    """Make the folder, empty of a store's files.

    Raises
    ------
    DataError
        If it cannot be made, or has files in it and ``overwrite`` is not set. Files that no store writes
        are never removed.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        present = sorted(entry.name for entry in path.iterdir() if not _left_behind(entry))
    except OSError as error:
        raise DataError(f"{path}: cannot make the folder ({error.strerror or error}). Choose another") from error
    if present and not overwrite:
        raise DataError(
            f"{path}: "
            + describe(
                f"a folder with files in it ({present[0]}, ...)",
                "a new folder",
                "Choose another folder, or overwrite",
            )
        )
    # The manifest goes first: without it the rest is no store, so a crash in between leaves no half of one.
    for name in sorted(present, key=lambda item: item != MANIFEST):
        if name in (MANIFEST, JOURNAL, LABELS) or _SHARD_NAME.fullmatch(name.removesuffix(".part")):
            (path / name).unlink()


def _left_behind(file: Path) -> bool:
    """Remove a file that a process was writing when it was killed; True if it was one."""
    known = (MANIFEST, JOURNAL, LABELS)
    if file.name not in map(temporary_name, known) and not (
        file.name.endswith(".tmp") and _SHARD_NAME.fullmatch(file.name[1:-4])
    ):
        return False
    file.unlink()
    return True


def finish(
    path: Path, manifest: dict[str, Any], shards: list[dict[str, Any]], labels: NDArray[np.int64] | None
) -> None:
    """Write labels and manifest beside the finished shards; the manifest makes the folder a store."""
    entry = None
    if labels is not None:
        data = npy_bytes(labels)
        write_atomic(path / LABELS, data)
        entry = {"file": LABELS, "sha256": sha256_bytes(data)}
    write_json(path / MANIFEST, {**manifest, "key": store_key(manifest), "shards": shards, "labels": entry})


def _as_slice(index: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """A run of consecutive numbers as a slice, which needs no copy; anything else as it is."""
    if len(index) and (len(index) == 1 or (np.diff(index) == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: missing; the manifest lists it. {_AGAIN}") from error
    if size != expected:
        raise DataError(f"{file}: {describe(f'{size} bytes', f'{expected} bytes', _AGAIN)}")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        if not path.exists():
            raise DataError(f"{path}: no such folder. Make one with `convexheads extract --out {path}`")
        if (path / JOURNAL).exists():
            raise DataError(
                f"{path}: the extraction has not finished. Run the same `convexheads extract` command again: "
                "it goes on where it stopped"
            )
        inside = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST}")) if path.is_dir() else []
        if inside:
            raise DataError(
                f"{path}: holds the stores {', '.join(inside)}. Open one of them, such as {path / inside[0]}"
            )
        raise DataError(f"{path}: no token store (no {MANIFEST} in it). Make one with `convexheads extract`")
    manifest = read_json(file, "manifest of the token store", _AGAIN)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{file}: {describe(repr(manifest.get('format')), f'format {FORMAT!r}', _AGAIN)}")
    if manifest.get("version") != VERSION:
        got = f"version {manifest.get('version')!r} of the format"
        raise DataError(
            f"{file}: {describe(got, f'version {VERSION}', 'Use the release of this package that wrote it')}"
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, InputError, DataError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: the manifest is damaged ({what}). {_AGAIN}") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    shape = manifest["shape"]
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"shape {shape!r}")
    check_dtype(manifest["dtype"])
    check_layout(manifest["layout"], shape[1], manifest["grid"], DataError)
    for shard in manifest["shards"]:
        # A name with a folder in it would read outside the store.
        if not _SHARD_NAME.fullmatch(shard["file"]) or type(shard["rows"]) is not int or shard["rows"] < 1:
            raise ValueError(f"shard {shard!r}")
        if not isinstance(shard["sha256"], str):
            raise ValueError(f"shard {shard!r}")
    if sum(shard["rows"] for shard in manifest["shards"]) != shape[0]:
        raise ValueError("the shards' rows do not add up to the number of images")
    if manifest["labels"] is not None and not isinstance(manifest["labels"]["sha256"], str):
        raise ValueError("labels")
    if manifest["key"] != store_key(manifest):
        raise ValueError("the key is not that of the entries: the manifest has been edited")
