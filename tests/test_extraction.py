"""Extraction: right tokens, the same bytes however often it was stopped, and never stale ones."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convexheads.commands import extract as command
from convexheads.datasets import ImageSource, load_dataset
from convexheads.errors import DataError, InputError
from convexheads.tokens import TokenStore, extraction
from convexheads.tokens.extraction import extract


class Tiny:
    """A network of one layer: 4 patches of 4 x 4 pixels, their mean as a CLS token."""

    name = "tiny"
    grid = (2, 2)
    layout = {"cls": (0, 1), "patch": (1, 5)}
    width = 6
    device = torch.device("cpu")

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(6, 3, 4, 4, generator=generator) * scale
        self.seed = seed
        self.resolution = 8
        self.batches: list[int] = []

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"class": "Tiny", "weights": self.seed, "layer": None}

    @property
    def transform_fingerprint(self) -> dict[str, Any]:
        return {"resolution": self.resolution, "mean": (0.5, 0.5, 0.5)}

    def preprocess(self, image: Any) -> torch.Tensor:
        pixels = np.asarray(image.resize((8, 8)), np.float32) / 255 - 0.5
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def tokens(self, batch: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(batch))
        patches = torch.conv2d(batch, self.weight, stride=4).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


@pytest.fixture
def images() -> ImageSource:
    return load_dataset("digits", "test", limit=50)


def direct(images: ImageSource, model: Tiny) -> np.ndarray:
    batch = torch.stack([model.preprocess(images.image(i)) for i in range(len(images))])
    return model.tokens(batch).numpy()


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


QUIET: dict[str, Any] = {"progress": False, "batch_size": 4, "shard_rows": 16}


# -- what is written ------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_network(tmp_path: Path, images: ImageSource) -> None:
    model = Tiny()
    done = extract(images, model, tmp_path / "s", dtype="float32", **QUIET)
    store = done.store
    assert store.shape == (50, 5, 6)
    assert np.allclose(np.asarray(store), direct(images, Tiny()), atol=1e-6)
    assert images.labels is not None
    assert store.labels is not None
    assert store.labels.tolist() == images.labels.tolist()
    assert store.class_names == [str(digit) for digit in range(10)]
    assert store.layout == model.layout
    assert store.select("patch").grid == (2, 2)
    assert store.split == "test"
    assert (done.images, done.resumed_from, done.reused) == (50, 0, False)
    assert done.images_per_second > 0
    assert model.batches == [4] * 12 + [2]
    assert [shard["rows"] for shard in store.manifest["shards"]] == [16, 16, 16, 2]
    assert store.manifest["backbone"] == model.fingerprint
    assert store.manifest["dataset"] == images.fingerprint
    assert str(tmp_path) not in (tmp_path / "s" / "manifest.json").read_text()
    assert sorted(files(tmp_path / "s")) == [
        "labels.npy",
        "manifest.json",
        *[f"tokens-0000{i}.bin" for i in range(4)],
    ]
    store.verify()


@pytest.mark.parametrize(
    ("tokens", "columns", "grid"),
    [
        ("cls", [0], None),
        ("patch", [1, 2, 3, 4], (2, 2)),
        (["patch", "cls"], [0, 1, 2, 3, 4], None),
    ],
)
def test_choice_of_tokens(
    tmp_path: Path, images: ImageSource, tokens: Any, columns: list[int], grid: tuple[int, int] | None
) -> None:
    store = extract(images, Tiny(), tmp_path / "s", tokens=tokens, dtype="float32", **QUIET).store
    assert np.allclose(np.asarray(store), direct(images, Tiny())[:, columns], atol=1e-6)
    assert store.grid == grid


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types(tmp_path: Path, images: ImageSource, dtype: str) -> None:
    full = np.asarray(extract(images, Tiny(), tmp_path / "a", dtype="float32", **QUIET).store)
    small = np.asarray(extract(images, Tiny(), tmp_path / "b", dtype=dtype, **QUIET).store)
    assert np.array_equal(small, torch.from_numpy(full).to(getattr(torch, dtype)).float().numpy())


def test_images_without_labels(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    store = extract(load_dataset(tmp_path), Tiny(), tmp_path / "tokens", **QUIET).store
    assert store.labels is None
    assert store.class_names is None
    with pytest.raises(DataError, match="tokens without labels"):
        store.require_labels()


# -- options that cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "registers"}, "'registers'; expected 'all' or some of cls, patch"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"batch_size": 0}, "at least 1"),
        ({"shard_rows": 0}, "at least 1"),
    ],
)
def test_bad_options(tmp_path: Path, images: ImageSource, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract(images, Tiny(), tmp_path / "s", **(QUIET | options))
    assert not (tmp_path / "s").exists()


def test_tokens_that_do_not_fit_are_not_stored(tmp_path: Path, images: ImageSource) -> None:
    with pytest.raises(InputError, match=r"tokens of images 0 to 3: .* fit into float16.*bfloat16"):
        extract(images, Tiny(scale=1e6), tmp_path / "s", **QUIET)
    with pytest.raises(InputError, match="NaN or infinite"):
        extract(images, Tiny(scale=float("nan")), tmp_path / "n", **QUIET)
    store = extract(images, Tiny(scale=1e6), tmp_path / "b", dtype="bfloat16", **QUIET).store
    assert np.abs(np.asarray(store)).max() > 65504


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pets" / "ant"
    folder.mkdir(parents=True)
    for number in range(9):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "6.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"6\.png: cannot read the image"):
        extract(load_dataset(tmp_path / "pets"), Tiny(), tmp_path / "s", **QUIET)
    with pytest.raises(DataError, match="has not finished"):
        TokenStore.open(tmp_path / "s")
    # A repaired image makes other data: what was done is not reused without being told to.
    (folder / "6.png").unlink()
    with pytest.raises(DataError, match=r"other options .*dataset\."):
        extract(load_dataset(tmp_path / "pets"), Tiny(), tmp_path / "s", **QUIET)
    assert len(extract(load_dataset(tmp_path / "pets"), Tiny(), tmp_path / "s", overwrite=True, **QUIET).store) == 8


# -- no stale tokens ------------------------------------------------------------------------------------


def test_a_finished_store_is_reused(tmp_path: Path, images: ImageSource) -> None:
    extract(images, Tiny(), tmp_path / "s", **QUIET)
    before = files(tmp_path / "s")
    model = Tiny()
    again = extract(images, model, tmp_path / "s", **(QUIET | {"batch_size": 8}))
    assert again.reused
    assert model.batches == []
    assert files(tmp_path / "s") == before


def changed() -> dict[str, tuple[dict[str, Any], str]]:
    other = Tiny()
    other.resolution = 9
    return {
        "tokens": ({"tokens": "patch"}, r"tokens: \['cls', 'patch'\] there, \['patch'\] asked for"),
        "dtype": ({"dtype": "float32"}, "dtype: 'float16' there, 'float32' asked for"),
        "weights": ({"backbone": Tiny(seed=1)}, r"backbone\.weights: 0 there, 1 asked for"),
        "resolution": ({"backbone": other}, r"transform\.resolution: 8 there, 9 asked for"),
        "split": ({"split": "other"}, "split: 'test' there, 'other' asked for"),
        "limit": ({"dataset": load_dataset("digits", "test", limit=49)}, r"dataset\.limit: 50 there, 49 asked"),
        "images": ({"dataset": load_dataset("digits", "train", limit=50)}, r"dataset\.content"),
    }


@pytest.mark.parametrize("name", list(changed()))
@pytest.mark.parametrize("finished", [True, False])
def test_changed_options_are_refused(tmp_path: Path, images: ImageSource, name: str, finished: bool) -> None:
    out = tmp_path / "s"
    if finished:
        extract(images, Tiny(), out, **QUIET)
    else:
        interrupt(images, out, after=5)
    before = files(out)
    options, message = changed()[name]
    arguments = {"dataset": images, "backbone": Tiny(), "out": out} | QUIET | options
    with pytest.raises(DataError, match=rf"holds tokens made with other options \(.*{message}.*--overwrite"):
        extract(**arguments)
    assert files(out) == before
    replaced = extract(**arguments, overwrite=True).store
    replaced.verify()
    assert not (out / "progress.json").exists()
    assert extract(**arguments).reused


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"shard_rows": 8}])
def test_unfinished_work_is_continued_in_the_same_batches(
    tmp_path: Path, images: ImageSource, options: dict[str, int]
) -> None:
    interrupt(images, tmp_path / "s", after=5)
    with pytest.raises(DataError, match=rf"run\.{next(iter(options))}: \d+ there, 8 asked for"):
        extract(images, Tiny(), tmp_path / "s", **(QUIET | options))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, images: ImageSource) -> None:
    (tmp_path / "holiday.jpg").write_text("precious")
    with pytest.raises(DataError, match=r"a folder with files in it \(holiday\.jpg"):
        extract(images, Tiny(), tmp_path, **QUIET)
    extract(images, Tiny(), tmp_path, overwrite=True, **QUIET)
    assert (tmp_path / "holiday.jpg").read_text() == "precious"


def test_a_damaged_store_is_not_reused(tmp_path: Path, images: ImageSource) -> None:
    extract(images, Tiny(), tmp_path / "s", **QUIET)
    good = files(tmp_path / "s")
    shard = tmp_path / "s" / "tokens-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"tokens-00002\.bin.*--overwrite"):
        extract(images, Tiny(), tmp_path / "s", **QUIET)
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    with pytest.raises(DataError, match="cannot read the manifest"):
        extract(images, Tiny(), tmp_path / "s", **QUIET)
    extract(images, Tiny(), tmp_path / "s", overwrite=True, **QUIET)
    assert files(tmp_path / "s") == good


# -- stopping and going on ------------------------------------------------------------------------------


class Stopping(Tiny):
    """Stops after some batches, in the way it is told to."""

    def __init__(self, after: int, how: BaseException) -> None:
        super().__init__()
        self.after, self.how = after, how

    def tokens(self, batch: torch.Tensor) -> torch.Tensor:
        if len(self.batches) == self.after:
            raise self.how
        return super().tokens(batch)


def interrupt(images: ImageSource, out: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(images, Stopping(after, KeyboardInterrupt()), out, **QUIET)


@pytest.fixture
def clean(tmp_path: Path, images: ImageSource) -> dict[str, str]:
    """The files of an extraction that nothing has stopped."""
    extract(images, Tiny(), tmp_path / "clean", **QUIET)
    return files(tmp_path / "clean")


@pytest.mark.parametrize("after", range(13))
def test_interrupted_anywhere(tmp_path: Path, images: ImageSource, clean: dict[str, str], after: int) -> None:
    out = tmp_path / "s"
    interrupt(images, out, after)
    with pytest.raises(DataError, match="has not finished"):
        TokenStore.open(out)
    model = Tiny()
    done = extract(images, model, out, **QUIET)
    assert done.resumed_from == 4 * after
    assert sum(model.batches) == 50 - 4 * after
    assert files(out) == clean


def test_stopped_between_every_two_steps(
    tmp_path: Path, images: ImageSource, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file operation is in turn the last one before a crash; each time another run goes on."""
    out = tmp_path / "s"

    class Crash(BaseException):
        pass

    operations = 0
    allowed = 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations > allowed:
                raise Crash
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(extraction, "_write_all", counted(extraction._write_all))
        for allowed in range(1, 400):  # noqa: B007 - read in `call`
            operations = 0
            try:
                extract(images, Tiny(), out, checkpoint_seconds=0, **QUIET)
            except Crash:
                continue
            break
    assert allowed > 10
    assert files(out) == clean


def test_replacing_is_resumed_too(tmp_path: Path, images: ImageSource, clean: dict[str, str]) -> None:
    out = tmp_path / "s"
    extract(images, Tiny(seed=1), out, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        extract(images, Stopping(5, KeyboardInterrupt()), out, overwrite=True, **QUIET)
    assert extract(images, Tiny(), out, overwrite=True, **QUIET).resumed_from == 20
    assert files(out) == clean
    # Finished tokens are made anew when that is asked for.
    assert extract(images, Tiny(), out, overwrite=True, **QUIET).images == 50
    assert files(out) == clean


def test_damaged_work_is_done_again(tmp_path: Path, images: ImageSource, clean: dict[str, str]) -> None:
    out = tmp_path / "s"
    interrupt(images, out, after=10)
    part = out / "tokens-00002.bin.part"
    data = part.read_bytes()
    part.write_bytes(bytes(len(data)))
    done = extract(images, Tiny(), out, **QUIET)
    assert done.resumed_from == 32
    assert files(out) == clean
    for name, rows in {"tokens-00001.bin": 16, "tokens-00002.bin.part": 32}.items():
        extract(images, Tiny(), out, overwrite=True, **QUIET)
        out2 = tmp_path / name
        interrupt(images, out2, after=10)
        (out2 / name).unlink()
        assert extract(images, Tiny(), out2, **QUIET).resumed_from == rows
        assert files(out2) == clean
    interrupt(images, tmp_path / "j", after=10)
    journal = tmp_path / "j" / "progress.json"
    journal.write_text(journal.read_text()[:-30])
    with pytest.raises(DataError, match="cannot read the journal"):
        extract(images, Tiny(), tmp_path / "j", **QUIET)
    journal.write_text(json.dumps({"format": "convexheads-tokens", "version": 1}))
    with pytest.raises(DataError, match="journal is damaged"):
        extract(images, Tiny(), tmp_path / "j", **QUIET)


def test_full_disk(tmp_path: Path, images: ImageSource, clean: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    written = 0

    def write(file: Any, data: memoryview) -> None:
        nonlocal written
        # The disk takes a part of the batch before it is full.
        file.write(data[: len(data) // 2])
        if written == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(data[len(data) // 2 :])
        written += 1

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_write_all", write)
        with pytest.raises(DataError, match=r"the disk is full .* run the same command again"):
            extract(images, Tiny(), out, **QUIET)
    assert extract(images, Tiny(), out, **QUIET).resumed_from == 24
    assert files(out) == clean


def test_too_small_a_disk_is_told_at_once(tmp_path: Path, images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(extraction.shutil, "disk_usage", lambda path: usage)
    model = Tiny()
    with pytest.raises(DataError, match=r"0\.1 kB free; expected 3\.0 kB for the tokens"):
        extract(images, model, tmp_path / "s", **QUIET)
    assert model.batches == []


SCRIPT = textwrap.dedent(
    """
    import sys, time
    import torch
    torch.set_num_threads(1)
    from test_extraction import QUIET, Tiny
    from convexheads.datasets import load_dataset
    from convexheads.tokens.extraction import extract

    class Slow(Tiny):
        def tokens(self, batch):
            time.sleep(0.01)
            return super().tokens(batch)

    images = load_dataset("digits", "train", limit=400)
    print("ready", flush=True)
    extract(images, Slow(), sys.argv[1], checkpoint_seconds=0.02, **QUIET)
    print("done", flush=True)
    """
)


def start(out: Path) -> subprocess.Popen[str]:
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_and_started_again(tmp_path: Path) -> None:
    images = load_dataset("digits", "train", limit=400)
    extract(images, Tiny(), tmp_path / "clean", **QUIET)
    out = tmp_path / "s"
    rows = 0
    for _ in range(2):
        process = start(out)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while recorded(out) < rows + 50 and time.monotonic() < deadline:
            time.sleep(0.005)
        # While it is at work, another process keeps off.
        with pytest.raises(DataError, match="another process is extracting"):
            extract(images, Tiny(), out, **QUIET)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert not (out / "manifest.json").exists()
        assert rows + 50 <= recorded(out) < 400
        rows = recorded(out)
    assert extract(images, Tiny(), out, **QUIET).resumed_from == rows
    assert files(out) == files(tmp_path / "clean")


def recorded(out: Path) -> int:
    """Rows that the journal says are done."""
    if not (out / "progress.json").exists():
        return 0
    journal = json.loads((out / "progress.json").read_text())
    return sum(shard["rows"] for shard in journal["shards"]) + int(journal["part"]["rows"])


# -- the command ----------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="convexheads extract")
    command.add_arguments(parser)
    return command.run(parser.parse_args([*arguments, "--quiet"]))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "convexheads extract --data digits --out tokens/digits --resolution 98" in text
    assert "goes on where it was" in text


def test_command_with_the_packaged_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    out = tmp_path / "digits"
    call = ["--data", "digits", "--out", str(out), "--resolution", "28", "--limit", "train=6,test=3", "--device", "cpu"]
    assert run(*call, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert [(item["split"], item["shape"], item["grid"]) for item in summary["stores"]] == [
        ("train", [6, 5, 384], [2, 2]),
        ("test", [3, 5, 384], [2, 2]),
    ]
    assert TokenStore.open(out / "train").layout == {"cls": (0, 1), "patch": (1, 5)}
    assert run(*call) == 0
    assert capsys.readouterr().out.count("already there, reused") == 2
    with pytest.raises(DataError, match="layer: None there, 11 asked for"):
        run(*call, "--layer", "-1")
    assert run(*call, "--split", "test", "--tokens", "patch", "--overwrite") == 0
    assert "3 images x 4 tokens (4 patch (2 x 2)) x 384, 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no such file or folder"),
        (["--data", "digits", "--split", "val"], "split 'val'"),
        (["--data", "digits", "--limit", "many"], "--limit many"),
        (["--data", "digits", "--limit", "train=5,train=6"], "--limit train=5,train=6"),
        (["--data", "digits", "--limit", "5,test=6"], "--limit 5,test=6"),
        (["--data", "digits", "--limit", "val=5"], "val"),
        (["--data", "digits", "--limit", "trian=5"], "--limit for 'trian'"),
        (["--data", "digits", "--holdout", "0.5"], "has the splits"),
        (["--data", "digits", "--label-column", "label"], "only with Parquet"),
        (["--data", "digits", "--backbone", "what:ever"], "backbone 'what:ever'"),
        (["--data", "digits", "--resolution", "100"], "multiple of its patch size"),
        (["--data", "digits", "--device", "toaster"], "device 'toaster'"),
    ],
)
def test_command_with_bad_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises((InputError, DataError)) as caught:
        run(*arguments, "--out", str(tmp_path / "s"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_command_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbones = pytest.importorskip("convexheads.backbones")
    model: Any = Stopping(1, KeyboardInterrupt())
    model.layer = None
    monkeypatch.setattr(backbones, "load_backbone", lambda *arguments, **options: model)
    call = ["--data", "digits", "--split", "test", "--limit", "50", "--out", str(tmp_path), "--batch-size", "8"]
    assert run(*call) == 130
    assert "the same command goes on" in capsys.readouterr().err
    model.after = -1
    assert run(*call) == 0
    assert "8 were done before" in capsys.readouterr().out
