"""Images with labels, from folders, Parquet files, arrays, archives and scikit-learn.

Nothing here runs code from the data: no pickles are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convexheads.errors import DataError, InputError, describe, require
from convexheads.tokens.files import canonical, full_disk_as_data_error, sha256_file

CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
CIFAR100_MD5 = "03b5dce01913d631647c71ecec9e9cb8"

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"])

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_SPLIT_ORDER = ("train", "val", "test")
_HOLDOUT = "Give --holdout 0.2 to set a fifth of the images aside as the test split"


class Reader(Protocol):
    """Images of one kind of source, by number."""

    kind: str

    def __len__(self) -> int: ...

    def read(self, row: int) -> Any:
        """The image as PIL opens it, in any mode."""

    def where(self, row: int) -> str:
        """What to call image ``row`` in a message."""

    def content(self, rows: NDArray[np.int64]) -> str:
        """Hash of the images' content, the same wherever they lie."""


class ImageSource:
    """Images in a fixed order, with labels if there are any; :func:`load_dataset` makes one.

    Attributes
    ----------
    name : short name of the source.
    split : "train", "val", "test", or None for all images.
    labels : int64 array (n,), or None.
    class_names : names of the classes in the order of the labels, or None.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        *,
        name: str,
        split: str | None,
        rows: NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        class_names: list[str] | None,
        options: dict[str, Any],
    ) -> None:
        self.name = name
        self.split = split
        self.labels = labels
        self.class_names = class_names
        self._readers = list(readers)
        self._starts = np.concatenate([[0], np.cumsum([len(reader) for reader in readers])]).astype(np.int64)
        self._rows = rows
        self._options = options

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        split = f", split {self.split}" if self.split else ""
        return f"ImageSource({self.name!r}{split}: {len(self)} images{classes})"

    def image(self, index: int) -> Any:
        """Image ``index`` as a PIL image in RGB, upright.

        Raises
        ------
        InputError
            If there is no such image.
        DataError
            If it cannot be read, naming the file or row.
        """
        reader, row = self._find(index)
        try:
            return _to_rgb(reader.read(row))
        except DataError:
            raise
        except Exception as error:
            # Broken files make Pillow raise errors of nearly every type.
            reason = str(error) or type(error).__name__
            raise DataError(f"{reader.where(row)}: cannot read the image ({reason}). Repair or remove it") from error

    def where(self, index: int) -> str:
        """File or row that image ``index`` comes from."""
        reader, row = self._find(index)
        return reader.where(row)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of images and labels, from their content; where they lie does not matter."""
        contents, kinds = [], []
        for number, reader in enumerate(self._readers):
            start, stop = self._starts[number], self._starts[number + 1]
            rows = self._rows[(self._rows >= start) & (self._rows < stop)] - start
            if len(rows):
                contents.append(reader.content(rows))
                kinds.append(reader.kind)
        order = hashlib.sha256(self._rows.astype("<i8").tobytes()).hexdigest()
        labels = None if self.labels is None else hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        return {
            "kind": "+".join(sorted(set(kinds))),
            "split": self.split,
            "images": len(self),
            "content": hashlib.sha256("".join(contents).encode()).hexdigest(),
            "order": order,
            "labels": labels,
            "classes": hashlib.sha256(canonical(self.class_names)).hexdigest(),
            **self._options,
        }

    def _find(self, index: int) -> tuple[Reader, int]:
        if not 0 <= index < len(self):
            raise InputError(describe(f"image {index}", f"0 to {len(self) - 1}"))
        row = int(self._rows[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._readers[number], row - int(self._starts[number])


@dataclass
class _Part:
    """One split of a source: some rows of a reader, and the labels of all its rows."""

    reader: Reader
    labels: NDArray[np.int64] | None
    rows: NDArray[np.int64]


@dataclass
class _Source:
    name: str
    parts: dict[str | None, _Part]
    class_names: list[str] | None
    options: dict[str, Any] = field(default_factory=dict)


def load_dataset(
    source: str | Path,
    split: str | None = None,
    *,
    limit: int | None = None,
    indices: ArrayLike | None = None,
    seed: int = 0,
    holdout: float | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    labels: str | Path | None = None,
) -> ImageSource:
    """Images and labels of a data set.

    Parameters
    ----------
    source : one of

        * ``"digits"``: scikit-learn's 1797 handwritten digits, 8 x 8 grey pixels; 80% train, 20% test;
        * ``"cifar100"``: CIFAR-100, downloaded once into a cache folder (:func:`download_cifar100`);
        * a folder of images: one subfolder a class, or train/ test/ (val/) with one subfolder a class in
          each; a folder with nothing but images has no labels;
        * a folder of Parquet files as Hugging Face keeps data sets (``train-*.parquet``, ...), or one such
          file;
        * an ``.npz`` file with images ("x", "images", "X" or "data": uint8, (n, h, w, 3), (n, h, w, 1) or
          (n, h, w)) and labels ("y" or "labels"), or with "x_train", "y_train", "x_test", ...; an
          ``.npy`` file with images; a folder with train.npz, test.npz;
        * ``cifar-100-binary.tar.gz``, the archive of CIFAR-100.
    split : "train", "val" or "test"; None or "all": every image.
    limit : keep so many images: the first ones of a seeded permutation, in their original order. A smaller
        limit gives a subset of a larger one's images.
    indices : keep these rows of the split, in this order; not together with ``limit``.
    seed : of the permutation behind ``limit`` and ``holdout``.
    holdout : share of the images, between 0 and 1, that make the test split of a source without splits;
        the same share of each class.
    label_column, image_column : columns of Parquet files; None: found by their type and name.
    labels : an ``.npy`` file with the labels of an ``.npy`` or ``.npz`` file of images.

    Raises
    ------
    InputError
        If an option cannot be used, or there is no such split.
    DataError
        If files are missing, unreadable or do not fit together.
    MissingExtraError
        If a package is missing: pip install 'convexheads[datasets]'.
    """
    found = _open(source, holdout, seed, label_column, image_column, labels)
    wanted = None if split in (None, "all") else _SPLIT_NAMES.get(str(split))
    if split not in (None, "all") and wanted not in found.parts:
        there = [name for name in found.parts if name is not None]
        expected = f"one of {', '.join(there)}" if there else "no split: the source has none"
        raise InputError(f"{found.name}: {describe(f'split {split!r}', expected, '' if there else _HOLDOUT)}")
    return _choose(found, wanted, limit, indices, seed)


def load_splits(
    source: str | Path,
    *,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    holdout: float | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    labels: str | Path | None = None,
) -> dict[str, ImageSource]:
    """Every split of a data set: "train", "val", "test" as there are, or "all" for one without splits.

    Parameters and errors as for :func:`load_dataset`; ``limit`` may also give a number a split.

    Raises
    ------
    InputError
        Also if ``limit`` names a split that is not there.
    """
    found = _open(source, holdout, seed, label_column, image_column, labels)
    limits = dict(limit) if isinstance(limit, Mapping) else {name or "all": limit for name in found.parts}
    names = {name or "all": name for name in found.parts}
    unknown = [name for name in limits if name not in names]
    if unknown:
        raise InputError(describe(f"a limit for {', '.join(unknown)}", f"splits that are there: {', '.join(names)}"))
    return {shown: _choose(found, name, limits.get(shown), None, seed) for shown, name in names.items()}


def cache_folder() -> Path:
    """Where downloads are kept: $CONVEXHEADS_CACHE, or "convexheads" in the user's cache folder."""
    own = os.environ.get("CONVEXHEADS_CACHE")
    if own:
        return Path(own)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA")
        return Path(base or Path.home() / "AppData" / "Local") / "convexheads" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convexheads"


def download_cifar100(
    folder: str | Path | None = None, url: str = CIFAR100_URL, md5: str = CIFAR100_MD5, progress: bool = True
) -> Path:
    """Path of the CIFAR-100 archive (binary version, 169 MB), downloaded unless it is there already.

    Parameters
    ----------
    folder : where to keep it; None: :func:`cache_folder`.
    url : address of the archive; ``file://`` works too.
    md5 : its MD5 sum, by which the publisher identifies it.
    progress : show a bar on standard error.

    Raises
    ------
    DataError
        If it cannot be downloaded, the disk is full, or the sum is another.
    """
    folder = cache_folder() if folder is None else Path(folder)
    target = folder / url.rsplit("/", 1)[-1]
    by_hand = f"Or download {url} by other means and give its path as the source"
    if target.is_file() and _md5(target) == md5:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".download.")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}). Set CONVEXHEADS_CACHE") from error
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            full_disk_as_data_error(folder, "Free 170 MB and try again"),
        ):
            _fetch(url, file, progress)
            file.flush()
            os.fsync(file.fileno())
        got = _md5(Path(temporary))
        if got != md5:
            raise DataError(f"{url}: {describe(f'a file with MD5 {got}', md5, f'Try again. {by_hand}')}")
        os.replace(temporary, target)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"{url}: cannot be downloaded ({error}). Check the connection and try again. {by_hand}"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return target


# -- choosing the kind of source ------------------------------------------------------------------------


def _open(
    source: str | Path,
    holdout: float | None,
    seed: int,
    label_column: str | None,
    image_column: str | None,
    labels: str | Path | None,
) -> _Source:
    require("PIL", "datasets")
    found = _find(source, label_column, image_column, labels)
    if label_column is not None:
        found.options["label_column"] = label_column
    if holdout is not None:
        _hold_out(found, holdout, seed)
        found.options |= {"holdout": holdout, "seed": seed}
    return found


def _choose(found: _Source, split: str | None, limit: int | None, indices: ArrayLike | None, seed: int) -> ImageSource:
    """Some images of one split, or of all of them."""
    options = dict(found.options)
    parts = [found.parts[split]] if split in found.parts else list(found.parts.values())
    readers, rows, label_list = _join(parts)
    if len(rows) == 0:
        raise DataError(f"{found.name}: {describe('no image', 'at least one')}")
    if indices is not None:
        if limit is not None:
            raise InputError(describe("both limit and indices", "one of the two"))
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or not chosen.size:
            raise InputError(describe(f"indices of shape {chosen.shape}", "a list of row numbers"))
        if chosen.min() < 0 or chosen.max() >= len(rows):
            raise InputError(describe(f"indices {chosen.min()} to {chosen.max()}", f"0 to {len(rows) - 1}"))
        chosen = chosen.astype(np.int64)
    elif limit is not None:
        if limit < 1:
            raise InputError(describe(f"limit {limit}", "at least 1 image"))
        chosen = np.sort(_permutation(len(rows), seed)[:limit])
        options |= {"limit": limit, "seed": seed} if limit < len(rows) else {}
    else:
        chosen = np.arange(len(rows))
    return ImageSource(
        readers,
        name=found.name,
        split=split,
        rows=rows[chosen],
        labels=None if label_list is None else label_list[chosen],
        class_names=found.class_names,
        options=options,
    )


def _find(source: str | Path, label_column: str | None, image_column: str | None, labels: str | Path | None) -> _Source:
    if source == "digits":
        found = _digits()
    elif source == "cifar100":
        found = _cifar100(download_cifar100(), label_column)
    else:
        path = Path(source)
        if not path.exists():
            raise DataError(f"{source}: {describe('no such file or folder', 'a folder, a file, digits or cifar100')}")
        name = path.name.lower()
        parquet = _parquet_files(path)
        if parquet:
            return _parquet(path, parquet, label_column, image_column)
        arrays = _array_files(path)
        if arrays:
            found = _arrays(path, arrays, None if labels is None else Path(labels))
            labels = None
        elif name.endswith((".tar.gz", ".tgz", ".tar")):
            found = _cifar100(path, label_column)
        elif path.is_dir():
            found = _folder(path)
        else:
            expected = "a folder of images or Parquet files, .parquet, .npz, .npy or cifar-100-binary.tar.gz"
            raise DataError(f"{path}: {describe('a file of unknown kind', expected)}")
    if labels is not None:
        raise InputError(f"{source}: {describe('a file of labels', 'one only with .npy and .npz images')}")
    takes_column = source == "cifar100" or str(source).lower().endswith((".tar.gz", ".tgz", ".tar"))
    if image_column is not None or (label_column is not None and not takes_column):
        raise InputError(f"{source}: {describe('the name of a column', 'one only with Parquet files')}")
    return found


def _in_order(parts: dict[str | None, _Part]) -> dict[str | None, _Part]:
    return {name: parts[name] for name in (None, *_SPLIT_ORDER) if name in parts}


def _join(parts: Sequence[_Part]) -> tuple[list[Reader], NDArray[np.int64], NDArray[np.int64] | None]:
    """Parts one after the other: readers, rows over all readers, labels of these rows."""
    readers: list[Reader] = []
    rows, labels = [], []
    for part in parts:
        known = [number for number, reader in enumerate(readers) if reader is part.reader]
        if not known:
            readers.append(part.reader)
        number = known[0] if known else len(readers) - 1
        rows.append(part.rows + sum(len(reader) for reader in readers[:number]))
        if part.labels is not None:
            labels.append(part.labels[part.rows])
    # Labels of some splits only are of no use for all of them together.
    return readers, np.concatenate(rows), np.concatenate(labels) if len(labels) == len(parts) else None


def _permutation(n: int, seed: int) -> NDArray[np.int64]:
    """A permutation that is the same with every release of numpy: by the hash of seed and number."""
    keys = [hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8] for number in range(n)]
    return np.argsort(np.frombuffer(b"".join(keys), ">u8"), kind="stable").astype(np.int64)


def _hold_out(found: _Source, share: float, seed: int) -> None:
    if list(found.parts) != [None]:
        there = ", ".join(str(name) for name in found.parts)
        raise InputError(f"{found.name}: {describe('holdout', f'none: the source has the splits {there}')}")
    if not 0 < share < 1:
        raise InputError(describe(f"holdout {share}", "a share between 0 and 1, such as 0.2"))
    part = found.parts.pop(None)
    order = part.rows[_permutation(len(part.rows), seed)]
    groups = np.zeros(len(order), np.int64) if part.labels is None else part.labels[order]
    test = np.concatenate(
        [members[: round(share * len(members))] for members in (order[groups == g] for g in np.unique(groups))]
    )
    if len(test) in (0, len(order)):
        raise InputError(describe(f"holdout {share} of {len(order)} images", "at least one image in either split"))
    train = np.setdiff1d(order, test)
    found.parts = {
        "train": _Part(part.reader, part.labels, train),
        "test": _Part(part.reader, part.labels, np.sort(test)),
    }


def _label_ids(columns: Sequence[NDArray[Any]], where: str) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Labels of several splits as numbers from 0, and the class names they share."""
    joined = np.concatenate([np.asarray(column).ravel() for column in columns])
    if joined.dtype.kind in "iub" and joined.size and int(joined.min()) >= 0 and int(joined.max()) < 1_000_000:
        names = [str(number) for number in range(int(joined.max()) + 1)]
        return [np.asarray(column).ravel().astype(np.int64) for column in columns], names
    if joined.dtype.kind not in "iubUO" or any(value is None for value in joined):
        got = f"labels of type {joined.dtype}, or missing ones"
        raise DataError(f"{where}: {describe(got, 'one whole number or name an image')}")
    values, ids = np.unique(joined.astype(str) if joined.dtype.kind == "O" else joined, return_inverse=True)
    bounds = np.cumsum([len(column) for column in columns])[:-1]
    return np.split(ids.astype(np.int64), bounds), [str(value) for value in values]


# -- scikit-learn's digits ------------------------------------------------------------------------------


def _digits() -> _Source:
    from sklearn.datasets import load_digits

    data = load_digits()
    # 17 grey levels, 0 to 16, spread over 0 to 255.
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    reader = _ArrayReader(pixels, "digits", kind="digits")
    part = _Part(reader, data.target.astype(np.int64), np.arange(len(pixels)))
    found = _Source("digits", {None: part}, [str(digit) for digit in range(10)])
    _hold_out(found, 0.2, 0)
    return found


# -- folders of images ----------------------------------------------------------------------------------


class _FolderReader:
    kind = "folder"

    def __init__(self, root: Path, files: list[str]) -> None:
        self._root = root
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, row: int) -> Any:
        from PIL import Image

        with Image.open(self._root / self._files[row]) as image:
            image.load()
            return image

    def where(self, row: int) -> str:
        return str(self._root / self._files[row])

    def content(self, rows: NDArray[np.int64]) -> str:
        names = [self._files[row] for row in rows]
        try:
            with ThreadPoolExecutor(4) as pool:
                sums = list(pool.map(lambda name: sha256_file(self._root / name), names))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Repair or remove it") from error
        return hashlib.sha256(canonical(list(zip(names, sums, strict=True)))).hexdigest()


def _subfolders(path: Path) -> list[Path]:
    return sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))


def _images_in(path: Path) -> list[str]:
    """Images directly in a folder."""
    return sorted(
        item.name
        for item in path.iterdir()
        if item.suffix.lower() in IMAGE_SUFFIXES and not item.name.startswith(".") and item.is_file()
    )


def _images_below(path: Path) -> list[str]:
    """Images in a folder or any folder under it, as relative paths."""
    found = []
    for folder, inside, files in os.walk(path, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in files:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.append((Path(folder) / name).relative_to(path).as_posix())
    return sorted(found)


def _folder(path: Path) -> _Source:
    try:
        folders = _subfolders(path)
        named = [folder for folder in folders if folder.name.lower() in _SPLIT_NAMES]
        if named and len(named) == len(folders):
            roots: dict[str | None, Path] = {}
            for folder in named:
                name = _SPLIT_NAMES[folder.name.lower()]
                if name in roots:
                    raise DataError(f"{path}: {describe(f'two folders for the split {name}', 'one')}")
                roots[name] = folder
        else:
            roots = {None: path}
        listed = {split: _classes(root) for split, root in roots.items()}
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions") from error
    names = sorted({str(item) for classes in listed.values() for item in classes if item is not None})
    parts: dict[str | None, _Part] = {}
    for split, classes in listed.items():
        files = [file for members in classes.values() for file in members]
        labels = None
        if None not in classes:
            ids = {item: number for number, item in enumerate(names)}
            labels = np.array([ids[str(item)] for item, members in classes.items() for _ in members], np.int64)
        parts[split] = _Part(_FolderReader(roots[split], files), labels, np.arange(len(files)))
    return _Source(path.resolve().name, _in_order(parts), names or None)


def _classes(root: Path) -> dict[str | None, list[str]]:
    """Class name -> relative paths of its images; one class None for a folder without classes."""
    loose = _images_in(root)
    classes: dict[str | None, list[str]] = {}
    for folder in _subfolders(root):
        members = [f"{folder.name}/{file}" for file in _images_below(folder)]
        if members:
            classes[folder.name] = members
    if loose and classes:
        got = f"images ({loose[0]}, ...) beside folders of images ({next(iter(classes))}, ...)"
        expected = "one folder a class, or images alone"
        raise DataError(f"{root}: {describe(got, expected, 'Move or remove the images that have no class')}")
    if loose:
        return {None: loose}
    if not classes:
        expected = "images (" + " ".join(sorted(IMAGE_SUFFIXES)) + ") in one folder a class"
        raise DataError(f"{root}: {describe('a folder without images', expected)}")
    return classes


# -- Parquet files as Hugging Face keeps them -----------------------------------------------------------


class _ParquetReader:
    kind = "parquet"

    def __init__(self, files: list[Path], column: str) -> None:
        self._files = files
        self._column = column
        self._groups: list[tuple[int, int]] = []
        starts = [0]
        for number, file in enumerate(files):
            metadata = _parquet_file(file).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        self._starts = np.array(starts)
        # A few row groups are kept: images are asked for in order, by two or three threads.
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, row: int) -> Any:
        from PIL import Image

        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._group(number)[row - int(self._starts[number])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise DataError(f"{self.where(row)}: {describe('no image bytes', 'an image', 'Remove the row')}")
        image = Image.open(io.BytesIO(data))
        image.load()
        return image

    def where(self, row: int) -> str:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        file = self._groups[number][0]
        first = min(i for i, (other, _) in enumerate(self._groups) if other == file)
        return f"{self._files[file]} row {row - int(self._starts[first])}"

    def content(self, rows: NDArray[np.int64]) -> str:
        sums = [sha256_file(file) for file in self._files]
        return hashlib.sha256(canonical([self._column, sums])).hexdigest()

    def _group(self, number: int) -> Any:
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
            file, group = self._groups[number]
            pyarrow = require("pyarrow", "datasets")
            try:
                table = _parquet_file(self._files[file]).read_row_group(group, columns=[self._column])
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(
                    f"{self._files[file]}: cannot read row group {group} ({error}). Download it again"
                ) from error
            column = table.column(0).combine_chunks()
            self._cache[number] = column
            while len(self._cache) > 3:
                self._cache.popitem(last=False)
            return column


def _parquet_file(file: Path) -> Any:
    pyarrow = require("pyarrow", "datasets")
    parquet = require("pyarrow.parquet", "datasets")
    try:
        return parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}). Download it again") from error


def _split_of(name: str) -> str | None:
    """Split that a file name begins with, such as train-00000-of-00005.parquet."""
    head = name.lower().split(".")[0].split("-")[0].split("_")[0]
    return _SPLIT_NAMES.get(head)


def _parquet_files(path: Path) -> dict[str | None, list[Path]]:
    """Parquet files by split, or nothing."""
    if path.is_file():
        return {_split_of(path.name): [path]} if path.suffix.lower() == ".parquet" else {}
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file.name), []).append(file)
    if not files:
        for folder in _subfolders(path):
            inside = sorted(folder.glob("*.parquet"))
            if inside and folder.name.lower() in _SPLIT_NAMES:
                found.setdefault(_SPLIT_NAMES[folder.name.lower()], []).extend(inside)
    if None in found and len(found) > 1:
        got = f"{found[None][0].name} beside files of splits"
        raise DataError(f"{path}: {describe(got, 'names such as train-*.parquet, test-*.parquet')}")
    return found


def _parquet(
    path: Path, files: dict[str | None, list[Path]], label_column: str | None, image_column: str | None
) -> _Source:
    pyarrow = require("pyarrow", "datasets")
    first = next(iter(files.values()))[0]
    schema = _parquet_file(first).schema_arrow
    features: dict[str, Any] = {}
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    image = image_column or _image_column(schema, features, path)
    label = label_column or _label_column(schema, features)
    for column in (image, label):
        if column is not None and column not in schema.names:
            raise InputError(f"{path}: {describe(f'column {column!r}', f'one of {schema.names}')}")
    raw: dict[str | None, NDArray[Any]] = {}
    parts: dict[str | None, _Part] = {}
    for split, members in files.items():
        reader = _ParquetReader(members, image)
        parts[split] = _Part(reader, None, np.arange(len(reader)))
        if label is not None:
            columns = []
            for file in members:
                try:
                    columns.append(_parquet_file(file).read(columns=[label]).column(0))
                except (OSError, pyarrow.ArrowException) as error:
                    raise DataError(f"{file}: cannot read the column {label!r} ({error}). Download it again") from error
            nulls = sum(column.null_count for column in columns)
            if nulls:
                got = f"{nulls} rows without a value in {label!r}"
                raise DataError(f"{path}: {describe(got, 'a label in every row', 'Choose another --label-column')}")
            raw[split] = np.concatenate([np.asarray(column.to_pylist()) for column in columns])
    class_names = None
    if raw:
        ids, class_names = _label_ids(list(raw.values()), f"{path}, column {label!r}")
        for split, values in zip(raw, ids, strict=True):
            parts[split].labels = values
        feature = features.get(str(label))
        named = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(named, list) and len(named) >= len(class_names) and next(iter(raw.values())).dtype.kind in "iu":
            class_names = [str(name) for name in named]
    return _Source(path.resolve().name.removesuffix(".parquet"), _in_order(parts), class_names)


def _image_column(schema: Any, features: dict[str, Any], path: Path) -> str:
    for name, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "Image" and name in schema.names:
            return name
    for item in schema:
        kind = str(item.type)
        if kind.startswith("struct<") and "bytes: binary" in kind.replace("large_binary", "binary"):
            return str(item.name)
    for item in schema:
        if str(item.type) in ("binary", "large_binary"):
            return str(item.name)
    got = f"columns {schema.names} without images"
    raise DataError(f"{path}: {describe(got, 'a column of encoded images', 'Give --image-column')}")


def _label_column(schema: Any, features: dict[str, Any]) -> str | None:
    for name in ("label", "labels", "fine_label", "class", "target", "y"):
        if name in schema.names:
            return name
    for name, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names:
            return name
    return None


# -- arrays ---------------------------------------------------------------------------------------------


class _ArrayReader:
    def __init__(self, pixels: NDArray[np.uint8], where: str, kind: str = "arrays") -> None:
        self.kind = kind
        self._pixels = pixels
        self._where = where

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, row: int) -> Any:
        from PIL import Image

        pixels = np.ascontiguousarray(self._pixels[row])
        return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)

    def where(self, row: int) -> str:
        return f"{self._where} row {row}"

    def content(self, rows: NDArray[np.int64]) -> str:
        sha = hashlib.sha256(canonical(list(self._pixels.shape[1:])))
        for start in range(0, len(rows), 1024):
            sha.update(np.ascontiguousarray(self._pixels[rows[start : start + 1024]]).data)
        return sha.hexdigest()


def _array_files(path: Path) -> dict[str | None, Path]:
    """Array files by split, or nothing."""
    if path.is_file():
        return {None: path} if path.suffix.lower() in (".npy", ".npz") else {}
    found: dict[str | None, Path] = {}
    for file in sorted(path.glob("*.npz")):
        if file.stem.lower() in _SPLIT_NAMES:
            found[_SPLIT_NAMES[file.stem.lower()]] = file
    return found


def _load_array(file: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False, mmap_mode="r" if file.suffix.lower() == ".npy" else None)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{file}: cannot be read as an array ({error}). "
            "Save it with numpy.save or numpy.savez, without Python objects in it"
        ) from error


def _arrays(path: Path, files: dict[str | None, Path], label_file: Path | None) -> _Source:
    pixels: dict[str | None, tuple[NDArray[Any], Path]] = {}
    raw: dict[str | None, NDArray[Any]] = {}
    class_names: list[str] | None = None
    for split, file in files.items():
        loaded = _load_array(file)
        if not hasattr(loaded, "files"):
            pixels[split] = (loaded, file)
            continue
        with loaded:
            try:
                content = {key: loaded[key] for key in loaded.files}
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"{file}: cannot be read ({error}). Save it again with numpy.savez") from error
        if "class_names" in content:
            class_names = [str(name) for name in content["class_names"]]
        groups: dict[str | None, str] = {split: ""}
        if split is None:
            named = {name: f"_{name}" for name in _SPLIT_NAMES if any(f"{x}_{name}" in content for x in "xX")}
            groups = {_SPLIT_NAMES[name]: suffix for name, suffix in named.items()} or groups
        for group, suffix in groups.items():
            images = next(
                (f"{key}{suffix}" for key in ("x", "images", "X", "data") if f"{key}{suffix}" in content),
                None,
            )
            if images is None:
                got = f"arrays named {', '.join(content) or 'nothing'}"
                raise DataError(f"{file}: {describe(got, 'images named x, images, X or data')}")
            pixels[group] = (content[images], file)
            labels = next((f"{key}{suffix}" for key in ("y", "labels") if f"{key}{suffix}" in content), None)
            if labels is not None:
                raw[group] = content[labels]
    if label_file is not None:
        if len(pixels) != 1:
            raise InputError(
                f"{path}: {describe('a file of labels for several splits', 'labels inside the .npz files')}"
            )
        if not label_file.exists():
            raise DataError(f"{label_file}: {describe('no such file', 'an .npy file with one label an image')}")
        raw = {next(iter(pixels)): _load_array(label_file)}
    parts: dict[str | None, _Part] = {}
    for split, (array, file) in pixels.items():
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3)):
            got = f"images of shape {array.shape} and type {array.dtype}"
            fix = "Scale to 0 ... 255, convert to uint8 and put the channels last"
            raise DataError(f"{file}: {describe(got, 'uint8 of shape (n, h, w, 3), (n, h, w, 1) or (n, h, w)', fix)}")
        if 0 in array.shape:
            raise DataError(f"{file}: {describe(f'images of shape {array.shape}', 'at least one image and pixel')}")
        parts[split] = _Part(_ArrayReader(array, str(file)), None, np.arange(len(array)))
        if split in raw:
            flat = np.asarray(raw[split])
            # Keras keeps labels as a column.
            flat = flat[:, 0] if flat.ndim == 2 and flat.shape[1] == 1 else flat
            if flat.shape != (len(array),):
                got = f"labels of shape {flat.shape} for {len(array)} images"
                raise DataError(f"{file}: {describe(got, 'one label an image')}")
            raw[split] = flat
    if raw:
        ids, names = _label_ids(list(raw.values()), str(path))
        for split, values in zip(raw, ids, strict=True):
            parts[split].labels = values
        if class_names is not None and len(class_names) < len(names):
            raise DataError(f"{path}: {describe(f'{len(class_names)} class names', f'{len(names)}, one a class')}")
        class_names = class_names or names
    return _Source(path.resolve().stem, _in_order(parts), class_names)


# -- CIFAR-100 ------------------------------------------------------------------------------------------


def _cifar100(archive: Path, label_column: str | None) -> _Source:
    """CIFAR-100 from its binary archive: records of two label bytes and 3072 bytes of pixels."""
    column = label_column or "fine_label"
    if column not in ("fine_label", "coarse_label"):
        raise InputError(f"cifar100: {describe(f'column {column!r}', 'fine_label or coarse_label')}")
    wanted = {"train.bin": b"", "test.bin": b"", f"{column}_names.txt": b""}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if name in wanted and member.isfile():
                    # Read into memory: nothing is unpacked, so no path of the archive is ever used.
                    file = tar.extractfile(member)
                    wanted[name] = file.read() if file is not None else b""
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{archive}: cannot be read as an archive ({error}). Download {CIFAR100_URL} again") from error
    names = [line for line in wanted[f"{column}_names.txt"].decode().split() if line]
    parts: dict[str | None, _Part] = {}
    for split in ("train", "test"):
        data = np.frombuffer(wanted[f"{split}.bin"], np.uint8)
        if not len(data) or len(data) % 3074 or not names:
            got = f"{split}.bin of {len(data)} bytes and {len(names)} class names"
            expected = "records of 3074 bytes and class names, as in cifar-100-binary.tar.gz"
            raise DataError(f"{archive}: {describe(got, expected, f'Download {CIFAR100_URL} again')}")
        records = data.reshape(-1, 3074)
        pixels = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = records[:, 1 if column == "fine_label" else 0].astype(np.int64)
        if labels.max() >= len(names):
            raise DataError(f"{archive}: {describe(f'label {labels.max()}', f'below {len(names)}, the class names')}")
        reader = _ArrayReader(pixels, f"{archive}:{split}.bin", kind="cifar100")
        parts[split] = _Part(reader, labels, np.arange(len(labels)))
    return _Source("cifar100", parts, names)


def _fetch(url: str, file: Any, progress: bool) -> None:
    from tqdm import tqdm

    if not url.startswith(("https://", "http://", "file://")):
        raise ValueError(f"not an address: {url}")
    request = urllib.request.Request(url, headers={"User-Agent": "convexheads"})
    with urllib.request.urlopen(request, timeout=60) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm(total=total, desc="cifar100", unit="B", unit_scale=True, disable=not progress) as bar:
            while block := response.read(1 << 18):
                file.write(block)
                bar.update(len(block))


def _md5(file: Path) -> str:
    # The publisher gives no better sum.
    md5 = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            md5.update(block)
    return md5.hexdigest()


# -- small things ---------------------------------------------------------------------------------------


def _to_rgb(image: Any) -> Any:
    """A PIL image in RGB, turned upright as its EXIF orientation says."""
    from PIL import Image, ImageOps

    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit grey values at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
