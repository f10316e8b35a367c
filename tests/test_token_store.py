"""Token stores: what is written is read back, in any order and part; damage is found and named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils import _safe_indexing

from convexheads.errors import DataError, InputError
from convexheads.tokens import TokenStore, open_splits
from convexheads.tokens.store import decode_into, encode

RNG = np.random.default_rng(0)
X = RNG.standard_normal((11, 7, 5)).astype(np.float16).astype(np.float32)
Y = np.arange(11) % 3
LAYOUT = {"cls": [0, 1], "registers": [1, 3], "patch": [3, 7]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    path = tmp_path_factory.mktemp("stores") / "store"
    names = ["a", "b", "c"]
    return TokenStore.write(path, X, Y, class_names=names, layout=LAYOUT, grid=(2, 2), shard_rows=4, split="train")


def fresh(path: Path, **options: Any) -> TokenStore:
    options = {"layout": LAYOUT, "grid": (2, 2), "shard_rows": 4} | options
    return TokenStore.write(path, X, Y, **options)


def edit(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


# -- reading --------------------------------------------------------------------------------------------


def test_round_trip(store: TokenStore) -> None:
    assert store.shape == (11, 7, 5)
    assert len(store) == 11
    assert store.ndim == 3
    assert store.dtype == np.float32
    assert store.stored_dtype == "float16"
    assert store.split == "train"
    assert store.class_names == ["a", "b", "c"]
    assert store.labels is not None
    assert store.labels.dtype == np.int64
    assert store.labels.tolist() == Y.tolist()
    assert store.layout == {"cls": (0, 1), "registers": (1, 3), "patch": (3, 7)}
    assert store.grid is None
    assert np.array_equal(np.asarray(store), X)
    assert np.asarray(store).dtype == np.float32
    assert np.asarray(store, np.float64).dtype == np.float64
    assert sorted(file.name for file in store.path.iterdir()) == [
        "labels.npy",
        "manifest.json",
        "tokens-00000.bin",
        "tokens-00001.bin",
        "tokens-00002.bin",
    ]
    store.verify()
    assert "11 images x 7 tokens x 5" in repr(store)


INDICES = [
    0,
    -1,
    np.int64(5),
    slice(None),
    slice(3, 9),
    slice(None, None, -2),
    slice(4, 4),
    [5],
    [10, 0, 5, 5, -11],
    [],
    np.array([3, 4, 5, 6]),
    np.array([8, 9, 10], np.uint8),
    np.arange(11) % 2 == 0,
    np.zeros(11, bool),
    (slice(2, 6), 1),
    (3, slice(0, 2)),
    ([1, 9], slice(None), 2),
    (slice(None), slice(1, 3), [0, 4]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_numpys(store: TokenStore, index: Any) -> None:
    # numpy takes an empty list for floats.
    want = X[:0] if isinstance(index, list) and not index else X[index]
    got = store[index]
    assert got.dtype == np.float32
    assert np.array_equal(got, want)


@pytest.mark.parametrize("index", [11, -12, [0, 11], np.zeros(3, bool), 1.5, "a", [[1]], (...,), (None, 1)], ids=str)
def test_wrong_indices(store: TokenStore, index: Any) -> None:
    with pytest.raises((InputError, IndexError), match=r"got .*; expected"):
        store[index]


@given(rows=st.lists(st.integers(-11, 10), max_size=15), roles=st.lists(st.sampled_from(list(LAYOUT)), min_size=1))
def test_views_compose(rows: list[int], roles: list[str], store: TokenStore) -> None:
    columns = [i for role in LAYOUT if role in roles for i in range(*LAYOUT[role])]
    base = np.asarray(rows, int)
    want = X[base][:, columns]
    view = store.select(roles).subset(rows)
    assert view.shape == want.shape
    assert np.array_equal(np.asarray(view), want)
    assert np.array_equal(np.asarray(store.subset(rows).select(roles)), want)
    assert view.labels is not None
    assert view.labels.tolist() == Y[base].tolist()
    assert (view.grid == (2, 2)) == (set(roles) == {"patch"})
    spans = [view.layout[role] for role in LAYOUT if role in roles]
    assert [stop - start for start, stop in spans] == [np.ptp(LAYOUT[role]) for role in LAYOUT if role in roles]
    assert np.array_equal(np.asarray(view.subset(slice(None, None, 2))), want[::2])


def test_selecting(store: TokenStore) -> None:
    patches = store.select("patch")
    assert patches.shape == (11, 4, 5)
    assert patches.grid == (2, 2)
    assert patches.layout == {"patch": (0, 4)}
    assert store.select("patch, cls").layout == {"cls": (0, 1), "patch": (1, 5)}
    assert store.select("all").shape == store.shape
    assert patches.select("patch").shape == patches.shape
    with pytest.raises(InputError, match="'cls'; expected 'all' or some of patch"):
        patches.select("cls")
    with pytest.raises(InputError, match="no token role"):
        store.select([])
    with pytest.raises(InputError, match="mask of length 3"):
        store.subset([True, False, True])


def test_identity_of_views(store: TokenStore) -> None:
    views = [
        store,
        store.select("cls"),
        store.subset([0, 1]),
        store.subset([1, 0]),
        store.select("cls").subset([0, 1]),
    ]
    assert len({json.dumps(view.fingerprint, sort_keys=True) for view in views}) == len(views)
    assert store.subset([0, 1]).fingerprint == store.subset(slice(2)).fingerprint


def test_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    store = fresh(tmp_path / "s")
    (store.path / "tokens-00001.bin").unlink()
    assert np.array_equal(store[[0, 10, 3]], X[[0, 10, 3]])
    with pytest.raises(DataError, match=r"tokens-00001\.bin: cannot be read any more"):
        store[5]


def test_pickle_and_iteration(store: TokenStore) -> None:
    view = store.select("patch").subset([4, 2])
    view[0]
    data = pickle.dumps(view)
    assert len(data) < 4000
    assert np.array_equal(np.asarray(pickle.loads(data)), X[[4, 2], 3:])
    assert np.array_equal(np.stack(list(store)), X)


def test_scikit_learn_can_split_it(store: TokenStore) -> None:
    assert np.array_equal(_safe_indexing(store, np.array([2, 7])), X[[2, 7]])
    assert np.array_equal(_safe_indexing(store, [2, 7]), X[[2, 7]])


def test_store_without_labels(tmp_path: Path, store: TokenStore) -> None:
    bare = TokenStore.write(tmp_path / "s", X)
    assert bare.labels is None
    assert bare.layout == {"patch": (0, 7)}
    assert bare.grid is None
    assert bare.subset([1]).labels is None
    with pytest.raises(DataError, match="tokens without labels; expected one label an image"):
        bare.require_labels()
    assert store.require_labels().tolist() == Y.tolist()


def test_one_token_an_image(tmp_path: Path) -> None:
    assert TokenStore.write(tmp_path / "s", X[:, 0], Y).shape == (11, 1, 5)


# -- types on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_round_as_torch_does(tmp_path: Path, dtype: str) -> None:
    x = (RNG.standard_normal((9, 4, 6)) * 10.0 ** RNG.integers(-9, 4, (9, 4, 6))).astype(np.float32)
    store = TokenStore.write(tmp_path / "s", x, dtype=dtype, shard_rows=2)
    want = torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(store[:], want)
    assert np.array_equal(store[[7, 1, 4]], want[[7, 1, 4]])
    assert store.stored_dtype == dtype


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_is_torchs(values: list[float]) -> None:
    x = np.array(values, np.float32)
    want = torch.from_numpy(x).bfloat16().float().numpy()
    if np.isinf(want).any():
        with pytest.raises(InputError, match="--dtype float32"):
            encode(x, "bfloat16")
        return
    out = np.empty_like(x)
    decode_into(out, encode(x, "bfloat16"), "bfloat16")
    assert np.array_equal(out, want)


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"size 1e\+05; expected values that fit into float16.*bfloat16"):
        TokenStore.write(tmp_path / "a", X * 0 + 1e5)
    with pytest.raises(InputError, match="2 token values that are NaN or infinite"):
        TokenStore.write(tmp_path / "b", [[[1.0, np.nan, np.inf]]])
    with pytest.raises(InputError, match="dtype 'int8'; expected one of float16, bfloat16, float32"):
        TokenStore.write(tmp_path / "c", X, dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": np.zeros((3, 0, 2))}, r"shape \(3, 0, 2\)"),
        ({"tokens": np.zeros(3)}, r"shape \(n, s, d\)"),
        ({"tokens": np.array([["a"]])}, "real numbers"),
        ({"labels": Y[:5]}, "11 integers, one a row"),
        ({"labels": Y - 1}, "labels from 0"),
        ({"labels": Y.astype(float)}, "11 integers"),
        ({"labels": Y, "class_names": ["a"]}, "below 1, the class names"),
        ({"grid": (2, 3)}, r"h \* w = 7"),
        ({"layout": {"cls": (0, 1), "patch": (2, 7)}}, "cover the 7 tokens"),
        ({"layout": {"cls": (0, 1)}}, "cover the 7 tokens"),
        ({"layout": {"word": (0, 7)}}, "some of cls, registers, patch"),
    ],
)
def test_bad_arrays(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenStore.write(tmp_path / "s", **({"tokens": X} | options))


# -- folders --------------------------------------------------------------------------------------------


def test_same_tokens_same_bytes(tmp_path: Path) -> None:
    one, two = fresh(tmp_path / "one"), fresh(tmp_path / "two")
    for file in one.path.iterdir():
        assert file.read_bytes() == (two.path / file.name).read_bytes()
    assert one.key != fresh(tmp_path / "three", dtype="float32").key


def test_overwriting(tmp_path: Path) -> None:
    fresh(tmp_path / "s", shard_rows=1)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="with files in it"):
        fresh(tmp_path / "s")
    store = TokenStore.write(tmp_path / "s", X[:4], overwrite=True)
    assert len(store) == 4
    assert sorted(file.name for file in store.path.iterdir()) == ["manifest.json", "notes.txt", "tokens-00000.bin"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot make the folder"):
        fresh(tmp_path / "file")


def test_open_splits(tmp_path: Path) -> None:
    fresh(tmp_path / "d" / "train", split="train")
    fresh(tmp_path / "d" / "test", split="test")
    assert {name: store.split for name, store in open_splits(tmp_path / "d").items()} == {
        "train": "train",
        "test": "test",
    }
    assert list(open_splits(tmp_path / "d" / "test")) == ["test"]
    assert list(open_splits(fresh(tmp_path / "one").path)) == ["all"]
    with pytest.raises(DataError, match=r"holds the stores test, train\. Open one of them"):
        TokenStore.open(tmp_path / "d")
    with pytest.raises(DataError, match="no such folder"):
        open_splits(tmp_path / "nowhere")
    (tmp_path / "d" / "train" / "manifest.json").rename(tmp_path / "d" / "train" / "progress.json")
    with pytest.raises(DataError, match="has not finished"):
        open_splits(tmp_path / "d")


# -- damage ---------------------------------------------------------------------------------------------


def test_missing_folder_manifest_and_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder. Make one with `convexheads extract"):
        TokenStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no token store"):
        TokenStore.open(tmp_path / "empty")
    (tmp_path / "empty" / "progress.json").write_text("{}")
    with pytest.raises(DataError, match=r"has not finished. Run the same"):
        TokenStore.open(tmp_path / "empty")


@pytest.mark.parametrize("keep", [0, 1, 100, 400])
def test_truncated_manifest(tmp_path: Path, keep: int) -> None:
    path = fresh(tmp_path / "s").path
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"manifest\.json: cannot read the manifest .* --overwrite"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "expected format 'convexheads-tokens'"),
        ({"version": 99}, "version 99 of the format; expected version 1"),
        ({"shape": [11, 7]}, "damaged"),
        ({"shape": [11, 7, "5"]}, "damaged"),
        ({"shape": None}, "damaged"),
        ({"dtype": "float64"}, "damaged"),
        ({"layout": {"patch": [0, 3]}}, "damaged"),
        ({"grid": [9, 9]}, "damaged"),
        ({"shards": []}, "do not add up"),
        ({"shards": [{"file": "../../secret", "rows": 11, "sha256": ""}]}, "damaged"),
        ({"shards": [{"file": "tokens-00000.bin"}]}, "damaged .*rows"),
        ({"split": "test"}, "has been edited"),
        ({"dataset": {}}, "has been edited"),
    ],
)
def test_edited_manifest(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = fresh(tmp_path / "s").path
    edit(path, **changes)
    with pytest.raises(DataError, match=message):
        TokenStore.open(path)


def test_manifest_without_an_entry(tmp_path: Path) -> None:
    path = fresh(tmp_path / "s").path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["backbone"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no entry 'backbone'"):
        TokenStore.open(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="a JSON object"):
        TokenStore.open(path)


def test_damaged_shards(tmp_path: Path) -> None:
    path = fresh(tmp_path / "s").path
    shard = path / "tokens-00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"tokens-00001\.bin: got {len(data) - 1} bytes; expected {len(data)} bytes"):
        TokenStore.open(path)
    shard.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    store = TokenStore.open(path)
    with pytest.raises(DataError, match=r"tokens-00001\.bin: corrupt.*--overwrite"):
        store.verify()
    shard.unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.bin: missing"):
        TokenStore.open(path)


def test_damaged_labels(tmp_path: Path) -> None:
    path = fresh(tmp_path / "s").path
    labels = path / "labels.npy"
    np.save(labels, Y[::-1].astype(np.int64))
    with pytest.raises(DataError, match=r"labels\.npy: corrupt"):
        TokenStore.open(path).verify()
    np.save(labels, Y[:3])
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        TokenStore.open(path)
    labels.write_bytes(b"")
    with pytest.raises(DataError, match="cannot read the labels"):
        TokenStore.open(path)
    labels.unlink()
    with pytest.raises(DataError, match=r"labels\.npy: missing"):
        TokenStore.open(path)


def test_opening_runs_no_code(tmp_path: Path) -> None:
    path = fresh(tmp_path / "s").path
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.mkdir, (str(trap),)

    bad = np.empty(11, object)
    bad[:] = Evil()
    np.save(path / "labels.npy", bad, allow_pickle=True)
    with pytest.raises(DataError, match="cannot read the labels"):
        TokenStore.open(path)
    (path / "labels.npy").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="cannot read the labels"):
        TokenStore.open(path)
    assert not trap.exists()
