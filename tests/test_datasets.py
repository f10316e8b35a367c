"""Data sets: every kind of source, splits, subsets, identities and what is said of bad files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convexheads import datasets
from convexheads.datasets import download_cifar100, load_dataset, load_splits
from convexheads.errors import DataError, InputError, MissingExtraError

RNG = np.random.default_rng(0)


def picture(number: int, size: tuple[int, int] = (6, 5)) -> Image.Image:
    """A small image whose pixels all have the value ``number``."""
    return Image.new("RGB", size, (number, number, number))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def value(source: datasets.ImageSource, index: int) -> int:
    return int(np.asarray(source.image(index))[0, 0, 0])


def class_folder(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            picture(first).save(root / name / f"{first:03d}.png")
            first += 1
    return root


class Evil:
    """Unpickling this would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


# -- digits ---------------------------------------------------------------------------------------------


def test_digits_split_is_stratified_and_fixed() -> None:
    train, test, every = (load_dataset("digits", split) for split in ("train", "test", None))
    assert (len(train), len(test), len(every)) == (1438, 359, 1797)
    assert train.class_names == [str(digit) for digit in range(10)]
    assert train.labels is not None
    assert test.labels is not None
    assert every.labels is not None
    share = np.bincount(test.labels) / np.bincount(every.labels)
    assert np.abs(share - 0.2).max() < 0.005
    assert test.labels[:8].tolist() == load_dataset("digits", "test").labels[:8].tolist()
    assert train.image(3).mode == "RGB"
    assert train.image(3).size == (8, 8)
    # The two splits are made of different images, all of them.
    seen = {np.asarray(source.image(i)).tobytes() for source in (train, test) for i in range(len(source))}
    assert len(seen) == len({np.asarray(every.image(i)).tobytes() for i in range(len(every))})
    # The split must be the same for ever: stores and published figures depend on it.
    assert hashlib.sha256(train.labels.astype("<i8").tobytes()).hexdigest().startswith("d1d5ec737911a7c3")


def test_fingerprint_is_json_and_depends_on_the_choice() -> None:
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    few, more = load_dataset("digits", "train", limit=20), load_dataset("digits", "train", limit=21)
    chosen = load_dataset("digits", "train", indices=[4, 2])
    turned = load_dataset("digits", "train", indices=[2, 4])
    prints = [json.dumps(item.fingerprint, sort_keys=True) for item in (train, test, few, more, chosen, turned)]
    assert len(set(prints)) == len(prints)
    assert load_dataset("digits", "train", limit=20).fingerprint == few.fingerprint
    # A limit beyond the data is no limit.
    assert load_dataset("digits", "train", limit=10_000).fingerprint == train.fingerprint


def test_limit_takes_nested_subsets_in_order() -> None:
    every = load_dataset("digits", "train")
    few, more = load_dataset("digits", "train", limit=30), load_dataset("digits", "train", limit=60)
    assert len(few) == 30
    assert set(few._rows) < set(more._rows) < set(every._rows)
    assert (np.diff(few._rows) > 0).all()
    assert set(load_dataset("digits", "train", limit=30, seed=1)._rows) != set(few._rows)
    picked = load_dataset("digits", "train", indices=[5, 3])
    assert np.asarray(picked.image(0)).tolist() == np.asarray(every.image(5)).tolist()
    assert picked.labels is not None
    assert picked.labels.tolist() == [every.labels[5], every.labels[3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "at least 1"),
        ({"limit": 3, "indices": [0]}, "one of the two"),
        ({"indices": [9999]}, "0 to 1437"),
        ({"indices": [[1]]}, "list of row numbers"),
        ({"holdout": 0.5}, "has the splits"),
        ({"label_column": "fine_label"}, "only with Parquet"),
        ({"labels": "y.npy"}, "only with .npy"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_dataset("digits", "train", **options)  # type: ignore[arg-type]


def test_unknown_split_and_image_number() -> None:
    with pytest.raises(InputError, match=r"split 'dev'; expected one of train, test"):
        load_dataset("digits", "dev")
    with pytest.raises(InputError, match="0 to 358"):
        load_dataset("digits", "test").image(359)


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises((MissingExtraError, ModuleNotFoundError), match="PIL"):
        load_dataset("digits")


# -- folders of images ----------------------------------------------------------------------------------


def test_folder_of_classes(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "pets", {"dog": 2, "ant": 3})
    (root / "ant" / "deeper").mkdir()
    picture(99).save(root / "ant" / "deeper" / "a.JPG", "JPEG")
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    picture(1).save(root / ".cache" / "hidden.png")
    source = load_dataset(root)
    assert source.name == "pets"
    assert source.split is None
    assert source.class_names == ["ant", "dog"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert [value(source, i) for i in range(6)] == [2, 3, 4, 99, 0, 1]
    assert list(load_splits(root)) == ["all"]


def test_folder_with_splits_shares_class_numbers(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    class_folder(root / "train", {"ant": 1, "cat": 1, "dog": 1})
    class_folder(root / "Validation", {"cat": 1}, 10)
    class_folder(root / "test", {"dog": 1, "cat": 1}, 20)
    parts = load_splits(root)
    assert list(parts) == ["train", "val", "test"]
    assert [list(part.labels) for part in parts.values() if part.labels is not None] == [[0, 1, 2], [1], [1, 2]]
    every = load_dataset(root)
    assert [value(every, i) for i in range(6)] == [0, 1, 2, 10, 21, 20]
    assert load_dataset(root, "validation").split == "val"


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    source = load_dataset(tmp_path)
    assert len(source) == 3
    assert source.labels is None
    assert source.class_names is None
    assert source.fingerprint["labels"] is None


def test_holdout_splits_each_class(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "pets", {"ant": 10, "cat": 5})
    parts = load_splits(root, holdout=0.2)
    assert {name: np.bincount(part.labels).tolist() for name, part in parts.items()} == {
        "train": [8, 4],
        "test": [2, 1],
    }
    seen = [value(part, i) for part in parts.values() for i in range(len(part))]
    assert sorted(seen) == list(range(15))
    with pytest.raises(InputError, match="between 0 and 1"):
        load_dataset(root, "train", holdout=1.5)
    with pytest.raises(InputError, match="--holdout"):
        load_dataset(root, "test")


def test_limits_by_split(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "pets", {"ant": 10, "cat": 5})
    parts = load_splits(root, holdout=0.2, limit={"train": 6})
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "test": 3}
    with pytest.raises(InputError, match="val"):
        load_splits(root, holdout=0.2, limit={"val": 6})


def test_folder_identity_is_its_content(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "one" / "pets", {"ant": 2, "cat": 2})
    copy = Path(shutil.copytree(root, tmp_path / "two" / "animals"))
    before = load_dataset(root).fingerprint
    assert load_dataset(copy).fingerprint == before
    picture(200).save(copy / "cat" / "002.png")
    assert load_dataset(copy).fingerprint != before
    # Only what is used counts.
    assert load_dataset(copy, indices=[0, 1]).fingerprint == load_dataset(root, indices=[0, 1]).fingerprint


def test_modes_and_orientation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    red = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(tmp_path / "a" / "0.jpg", exif=exif)
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "a" / "1.png")
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(tmp_path / "a" / "2.png")
    Image.new("L", (2, 2), 7).save(tmp_path / "a" / "3.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "a" / "4.png")
    Image.new("P", (2, 2), 3).save(tmp_path / "a" / "5.gif")
    source = load_dataset(tmp_path)
    assert source.image(0).size == (2, 4)
    assert [source.image(i).mode for i in range(6)] == ["RGB"] * 6
    assert source.image(2).getpixel((0, 0)) == (156, 156, 156)
    assert source.image(3).getpixel((0, 0)) == (7, 7, 7)
    assert source.image(4).getpixel((0, 0)) == (255, 255, 255)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "pets", {"ant": 1})
    whole = Image.fromarray(RNG.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    whole.save(root / "ant" / "b.png")
    data = (root / "ant" / "b.png").read_bytes()
    (root / "ant" / "b.png").write_bytes(data[: len(data) // 2])
    (root / "ant" / "c.jpg").write_bytes(b"no image at all")
    (root / "ant" / "d.png").write_bytes(b"")
    source = load_dataset(root)
    for index, name in [(1, "b.png"), (2, "c.jpg"), (3, "d.png")]:
        with pytest.raises(DataError, match=rf"{name}: cannot read the image .* Repair or remove it"):
            source.image(index)
    os.unlink(root / "ant" / "c.jpg")
    with pytest.raises(DataError, match=r"c\.jpg"):
        source.image(2)
    with pytest.raises(DataError, match=r"c\.jpg"):
        _ = source.fingerprint


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="a folder without images"):
        load_dataset(tmp_path / "empty")
    mixed = class_folder(tmp_path / "mixed", {"ant": 1})
    picture(0).save(mixed / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png.*beside folders"):
        load_dataset(mixed)
    class_folder(tmp_path / "twice" / "val", {"ant": 1})
    class_folder(tmp_path / "twice" / "validation", {"ant": 1})
    with pytest.raises(DataError, match="two folders for the split val"):
        load_dataset(tmp_path / "twice")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind"):
        load_dataset(tmp_path / "file.txt")


# -- Parquet --------------------------------------------------------------------------------------------


def parquet(
    path: Path,
    numbers: list[int],
    columns: dict[str, list[object]],
    features: dict[str, object] | None = None,
    image: str = "img",
    plain: bool = False,
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = [png(number) if number >= 0 else None for number in numbers]
    table = pa.table({image: cells if plain else [{"bytes": cell, "path": None} for cell in cells], **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def test_parquet_folder(tmp_path: Path) -> None:
    features = {
        "img": {"_type": "Image"},
        "fine_label": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
        "coarse_label": {"_type": "ClassLabel", "names": ["x", "y"]},
    }
    labels = {"fine_label": [0, 1, 0, 1, 1], "coarse_label": [1, 0, 1, 0, 0]}
    parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2, 3, 4], dict(labels), features)
    parquet(tmp_path / "train-00001-of-00002.parquet", [5, 6, 7, 8, 9], dict(labels), features)
    parquet(tmp_path / "test-00000-of-00001.parquet", [10, 11, 12, 13, 14], dict(labels), features)
    parts = load_splits(tmp_path)
    assert {name: len(part) for name, part in parts.items()} == {"train": 10, "test": 5}
    train = parts["train"]
    assert train.class_names == ["a", "b", "c"]
    assert train.labels is not None
    assert train.labels.tolist() == labels["fine_label"] * 2
    assert [value(train, i) for i in (9, 0, 4, 5, 2)] == [9, 0, 4, 5, 2]
    assert train.where(7).endswith("train-00001-of-00002.parquet row 2")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: value(train, i), list(range(10)) * 3)) == list(range(10)) * 3
    coarse = load_dataset(tmp_path, "train", label_column="coarse_label")
    assert coarse.class_names == ["x", "y"]
    assert coarse.fingerprint != train.fingerprint
    every = load_dataset(tmp_path)
    assert [value(every, i) for i in (0, 9, 10, 14)] == [0, 9, 10, 14]
    copy = tmp_path / "copy" / "data"
    copy.mkdir(parents=True)
    for file in tmp_path.glob("*.parquet"):
        shutil.copy(file, copy)
    assert load_dataset(copy.parent, "train").fingerprint == train.fingerprint
    one = load_dataset(tmp_path / "test-00000-of-00001.parquet")
    assert value(one, 1) == 11


def test_parquet_without_metadata(tmp_path: Path) -> None:
    parquet(tmp_path / "part.parquet", [3, 4, 5, 6], {"label": ["dog", "ant", "dog", "cat"]}, image="x", plain=True)
    source = load_dataset(tmp_path)
    assert source.class_names == ["ant", "cat", "dog"]
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 2, 1]
    assert value(source, 3) == 6
    parquet(tmp_path / "none" / "a.parquet", [3, 4], {"size": [1.5, 2.5]})
    assert load_dataset(tmp_path / "none").labels is None


def test_parquet_faults(tmp_path: Path) -> None:
    parquet(tmp_path / "a" / "x.parquet", [1, -1], {"label": [0, 1]})
    with pytest.raises(DataError, match=r"x\.parquet row 1: got no image bytes"):
        load_dataset(tmp_path / "a").image(1)
    with pytest.raises(InputError, match=r"column 'nope'; expected one of \['img', 'label'\]"):
        load_dataset(tmp_path / "a", label_column="nope")
    parquet(tmp_path / "b" / "x.parquet", [1, 2], {"label": [0, None]})
    with pytest.raises(DataError, match="1 rows without a value in 'label'"):
        load_dataset(tmp_path / "b")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"a": [1], "label": [0]}), tmp_path / "c" / "x.parquet")
    with pytest.raises(DataError, match="without images"):
        load_dataset(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes((tmp_path / "a" / "x.parquet").read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_dataset(tmp_path / "d")
    parquet(tmp_path / "e" / "train.parquet", [1], {"label": [0]})
    parquet(tmp_path / "e" / "other.parquet", [1], {"label": [0]})
    with pytest.raises(DataError, match="beside files of splits"):
        load_dataset(tmp_path / "e")


# -- arrays ---------------------------------------------------------------------------------------------


def test_npz_and_npy(tmp_path: Path) -> None:
    x = RNG.integers(0, 255, (6, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1, 2, 0, 1, 2]))
    source = load_dataset(tmp_path / "a.npz")
    assert source.name == "a"
    assert source.class_names == ["0", "1", "2"]
    assert (np.asarray(source.image(4)) == x[4]).all()
    np.save(tmp_path / "b.npy", x[..., 0])
    np.save(tmp_path / "y.npy", np.array(["u", "v", "u", "u", "v", "v"]))
    grey = load_dataset(tmp_path / "b.npy", labels=tmp_path / "y.npy")
    assert grey.class_names == ["u", "v"]
    assert (np.asarray(grey.image(2))[..., 1] == x[2, ..., 0]).all()
    assert load_dataset(tmp_path / "b.npy").labels is None
    np.savez(tmp_path / "k.npz", x_train=x[:4], y_train=np.arange(4)[:, None], x_test=x[4:], y_test=np.array([0, 1]))
    parts = load_splits(tmp_path / "k.npz")
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "test": 2}
    assert (np.asarray(parts["test"].image(1)) == x[5]).all()
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "train.npz", images=x, labels=np.zeros(6, int), class_names=np.array(["only"]))
    np.savez(folder / "test.npz", images=x[:2], labels=np.zeros(2, int))
    assert load_dataset(folder, "test").class_names == ["only"]


def test_array_faults(tmp_path: Path) -> None:
    x = RNG.integers(0, 255, (3, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "float.npz", x=x / 255)
    with pytest.raises(DataError, match=r"float64; expected uint8 .* convert to uint8"):
        load_dataset(tmp_path / "float.npz")
    np.savez(tmp_path / "first.npz", x=x.transpose(0, 3, 1, 2))
    with pytest.raises(DataError, match="channels last"):
        load_dataset(tmp_path / "first.npz")
    np.savez(tmp_path / "count.npz", x=x, y=[0, 1])
    with pytest.raises(DataError, match=r"shape \(2,\) for 3 images"):
        load_dataset(tmp_path / "count.npz")
    np.savez(tmp_path / "names.npz", a=x)
    with pytest.raises(DataError, match="arrays named a"):
        load_dataset(tmp_path / "names.npz")
    np.savez(tmp_path / "few.npz", x=x, y=[0, 1, 2], class_names=["a"])
    with pytest.raises(DataError, match="1 class names"):
        load_dataset(tmp_path / "few.npz")
    np.savez(tmp_path / "nan.npz", x=x, y=[0, 1, np.nan])
    with pytest.raises(DataError, match="labels of type float64"):
        load_dataset(tmp_path / "nan.npz")
    np.save(tmp_path / "empty.npy", x[:0])
    with pytest.raises(DataError, match="at least one image"):
        load_dataset(tmp_path / "empty.npy")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "count.npz").read_bytes()[:50])
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(tmp_path / "cut.npz")
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match="no such file"):
        load_dataset(tmp_path / "x.npy", labels=tmp_path / "none.npy")


def test_arrays_run_no_code(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    bad = np.empty(1, object)
    bad[0] = Evil(trap)
    np.save(tmp_path / "evil.npy", bad, allow_pickle=True)
    np.savez(tmp_path / "evil.npz", x=bad)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Evil(trap)))
    for name in ("evil.npy", "evil.npz", "pickle.npy"):
        with pytest.raises(DataError, match="cannot be read"):
            load_dataset(tmp_path / name)
    assert not trap.exists()


# -- CIFAR-100 ------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "site" / "cifar-100-binary.tar.gz"
    path.parent.mkdir()

    def records(count: int, first: int) -> bytes:
        rows = np.zeros((count, 3074), np.uint8)
        rows[:, 0] = np.arange(count) % 2
        rows[:, 1] = np.arange(count) % 3
        rows[:, 2 : 2 + 1024] = (first + np.arange(count))[:, None]
        rows[:, 2 + 1024 : 2 + 2048] = 1
        rows[0, 2 + 5] = 77
        return rows.tobytes()

    with tarfile.open(path, "w:gz") as tar:
        for name, data in {
            "cifar-100-binary/train.bin": records(7, 0),
            "cifar-100-binary/test.bin": records(4, 100),
            "cifar-100-binary/fine_label_names.txt": b"apple\nbear\ncup\n\n",
            "cifar-100-binary/coarse_label_names.txt": b"fruit\nanimal\n",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_cifar100_archive(archive: Path) -> None:
    parts = load_splits(archive)
    assert {name: len(part) for name, part in parts.items()} == {"train": 7, "test": 4}
    train = parts["train"]
    assert train.class_names == ["apple", "bear", "cup"]
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    pixels = np.asarray(train.image(3))
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].tolist() == [3, 1, 0]
    # Rows of the image lie one after the other.
    assert np.asarray(train.image(0))[0, 5, 0] == 77
    coarse = load_dataset(archive, "test", label_column="coarse_label")
    assert coarse.class_names == ["fruit", "animal"]
    with pytest.raises(InputError, match="fine_label or coarse_label"):
        load_dataset(archive, label_column="label")


def test_cifar100_download(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    url, md5 = archive.as_uri(), hashlib.md5(archive.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"MD5 .*; expected 03b5dce0.*give its path as the source"):
        download_cifar100(cache, url, progress=False)
    assert list(cache.iterdir()) == []
    target = download_cifar100(cache, url, md5, progress=False)
    assert target.read_bytes() == archive.read_bytes()
    archive.unlink()
    assert download_cifar100(cache, url, md5, progress=False) == target
    target.write_bytes(b"cut off")
    with pytest.raises(DataError, match="cannot be downloaded"):
        download_cifar100(cache, url, md5, progress=False)
    with pytest.raises(DataError, match="not an address"):
        download_cifar100(cache, "ftp:/x", md5, progress=False)
    assert [file.name for file in cache.iterdir()] == [target.name]
    monkeypatch.setenv("CONVEXHEADS_CACHE", str(tmp_path / "own"))
    assert datasets.cache_folder() == tmp_path / "own"


def test_cifar100_by_name_uses_the_download(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "download_cifar100", lambda: archive)
    assert len(load_dataset("cifar100", "test", label_column="fine_label")) == 4


def test_cifar100_faults(archive: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read as an archive"):
        load_dataset(cut)
    # The version with pickles is refused, not read.
    trap = tmp_path / "trap"
    python = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(python, "w:gz") as tar:
        data = pickle.dumps(Evil(trap))
        info = tarfile.TarInfo("cifar-100-python/train")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"as in cifar-100-binary\.tar\.gz"):
        load_dataset(python)
    assert not trap.exists()
