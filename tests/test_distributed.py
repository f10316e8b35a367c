"""Several processes on one program: the same results as one, a lost worker noticed, work taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convexheads import ConvexHeadClassifier, distributed
from convexheads.cli import main
from convexheads.distributed import ALONE, World
from convexheads.errors import InputError
from convexheads.tokens.store import TokenStore

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def torchrun(workers: int, *command: str, wait: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a command line of Python on several workers of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=wait, env=environment)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(301, 6, 9))
    y = (X[:, :, 0] * X[:, :, 1]).mean(1) + 0.2 * rng.normal(size=301) > 0
    folder = tmp_path_factory.mktemp("tokens") / "train"
    TokenStore.write(folder, X, y.astype(int), dtype="float32", shard_rows=64)
    return folder


HEAD = ["--head", "mlp", "--activation", "gated_relu", "--gates", "3", "--pca", "5", "--whiten", "--append-constant"]


def options(store: Path, out: Path, *more: str) -> list[str]:
    return ["fit", str(store), "--out", str(out), *HEAD, "--tol", "1e-7", "--threads", "1", *more]


UNTIL = ["--path-until", "validation"]


def one_process(store: Path, out: Path, *more: str) -> dict[str, Any]:
    result = out.with_suffix(".json")
    assert main(options(store, out, "--quiet", "--json", str(result), *more)) == 0
    return json.loads(result.read_text())


@pytest.mark.parametrize(
    "beta", [["--beta-ratio", "0.05"], ["--beta-ratios", "0.3,0.1"], ["--beta-ratios", "0.3,0.1", *UNTIL]]
)
def test_two_workers_end_at_the_objective_of_one(store: Path, tmp_path: Path, beta: list[str]) -> None:
    alone = one_process(store, tmp_path / "one.safetensors", *beta)
    out, result = tmp_path / "two.safetensors", tmp_path / "two.json"
    done = torchrun(2, "-m", "convexheads", *options(store, out, *beta, "--json", str(result)))
    assert done.returncode == 0, done.stderr
    shared = json.loads(result.read_text())
    assert shared["workers"] == 2
    assert shared["certificate"]["certified"]
    for number in ("primal", "dual", "beta"):
        assert shared["certificate"][number] == pytest.approx(alone["certificate"][number], rel=1e-6)
    assert shared["train_accuracy"] == alone["train_accuracy"]
    assert shared["rank"] == alone["rank"]
    # The first worker alone prints, and the checkpoint goes with the fit.
    assert done.stdout.count("lower bound") == 1
    assert sorted(file.name for file in tmp_path.glob("two*")) == ["two.json", "two.safetensors"]


def by_one_and_two(source: str, store: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Certificates of a fit by a script that changes the library first, on one worker and on two."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    found = []
    for workers in (1, 2):
        out, result = tmp_path / f"{workers}.safetensors", tmp_path / f"{workers}.json"
        head = ["--head", "self_attention", "--pca", "5", "--beta-ratio", "0.02", "--tol", "1e-6", "--threads", "1"]
        done = torchrun(workers, str(script), "fit", str(store), "--out", str(out), *head, "--json", str(result))
        assert done.returncode == 0, done.stderr
        found.append(json.loads(result.read_text())["certificate"])
    return found


SOFT = """
import sys
from convexheads.cli import main
from convexheads.solvers import cores, factored, preconditioner

preconditioner.FEW_ROWS, cores.ROWS_PER_DIRECTION = 0, 1
factored.SOFT_WORK, factored.NEAR = 0.0, 1.0
used, finish = [], cores.Cores.finish
cores.Cores.finish = lambda self, centred: (used.append(len(self.blocks)), finish(self, centred))
code = main(sys.argv[1:])
sys.exit(code or (0 if any(used) else 99))
"""


def test_soft_directions_of_two_workers_are_those_of_one(store: Path, tmp_path: Path) -> None:
    """Small problems have no part for them: here they are made to."""
    found = by_one_and_two(SOFT, store, tmp_path)
    assert found[1]["certified"]
    for number in ("primal", "dual", "beta"):
        assert found[1][number] == pytest.approx(found[0][number], rel=1e-6)


POLISHED = """
import sys
from convexheads.cli import main
from convexheads.solvers import factored, span

factored.POLISH_WORK, factored.POLISHED = 0.0, 1e6
used, solve = [], span.Span.solve
span.Span.solve = lambda self, tol, noise: (used.append(self), solve(self, tol, noise))[1]
code = main(sys.argv[1:])
sys.exit(code or (0 if used else 99))
"""


def test_the_program_in_the_span_of_units_of_two_workers_is_that_of_one(store: Path, tmp_path: Path) -> None:
    """Small problems are not solved there: here they are made to."""
    found = by_one_and_two(POLISHED, store, tmp_path)
    assert found[1]["certified"]
    for number in ("primal", "dual", "beta"):
        assert found[1][number] == pytest.approx(found[0][number], rel=1e-6)


DIFFERENCES = """
import sys
import torch
from convexheads import estimators
from convexheads.cli import main
from convexheads.solvers import differences, warmup

estimators.SMALL_PROBLEM, warmup.LARGE_WORK = 0, 0.0
warmup.low_precision = lambda device: torch.bfloat16
used, call = [], differences.Differences.__call__

def counted(self, x):
    used.append(not self.stale)
    return call(self, x)

differences.Differences.__call__ = counted
code = main(sys.argv[1:])
sys.exit(code or (0 if any(used) else 99))
"""


def test_products_of_differences_on_two_workers_end_where_those_on_one_do(store: Path, tmp_path: Path) -> None:
    """Small problems have none: here they are made to. Rounding differs, so that objectives agree to the gap."""
    found = by_one_and_two(DIFFERENCES, store, tmp_path)
    assert found[1]["certified"]
    assert found[1]["primal"] == pytest.approx(found[0]["primal"], rel=1e-6)


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from convexheads import distributed
from convexheads.cli import main

# torchrun tells the other workers to stop as soon as it sees that one has ended: the error has to be told all the same.
told = distributed._Workers.first_to_say
distributed._Workers.first_to_say = lambda *args: time.sleep(2.0) or told(*args)

def stop(checkpoint):
    while not checkpoint.exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    threading.Thread(target=stop, args=(Path(sys.argv[1]),), daemon=True).start()
sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_worker_ends_the_run_and_one_process_goes_on(store: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    out, checkpoint = tmp_path / "head.safetensors", tmp_path / "head.safetensors.checkpoint"
    begin = time.monotonic()
    # A tolerance that no fit reaches keeps it running until the worker is gone.
    endless = ["--beta-ratio", "0.05", "--tol", "1e-15", "--max-iter", "1000000", "--checkpoint-seconds", "0"]
    done = torchrun(2, str(script), str(checkpoint), *options(store, out), *endless)
    assert time.monotonic() - begin < 60
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("convexheads: error:")]
    assert len(said) == 1
    assert "worker was lost" in said[0]
    assert "Start the same command again" in said[0]
    assert not out.exists()
    resumed = one_process(store, out, "--beta-ratio", "0.05")
    fresh = one_process(store, tmp_path / "fresh.safetensors", "--beta-ratio", "0.05")
    assert resumed["certificate"]["primal"] == pytest.approx(fresh["certificate"]["primal"], rel=1e-6)
    assert not checkpoint.exists()


def test_other_commands_are_refused(store: Path) -> None:
    done = torchrun(2, "-m", "convexheads", "compare", "--train", str(store), "--test", str(store))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("convexheads: error:")]
    assert said == ["convexheads: error: got compare under torchrun; expected one process, or one of extract, fit"]


EXTRACTION = """
import sys
import numpy as np, torch
from convexheads import distributed
from convexheads.datasets import load_dataset
from convexheads.tokens.extraction import extract

class Tiny:
    name, grid, layout, width = "tiny", (2, 2), {"patch": (0, 4)}, 6
    device = torch.device("cpu")
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fingerprint = {"class": "Tiny"}
    transform_fingerprint = {"resolution": 8}
    left = int(sys.argv[2])

    def preprocess(self, image):
        pixels = np.asarray(image.resize((8, 8)), np.float32) / 255 - 0.5
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def tokens(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return torch.conv2d(batch, self.weight, stride=4).flatten(2).transpose(1, 2)

options = dict(batch_size=4, shard_rows=16, progress=False, checkpoint_seconds=0.0)
try:
    with distributed.joined() as world:
        done = extract(load_dataset("digits", "test", limit=90), Tiny(), sys.argv[1], **options)
        if world.first:
            print(world.size, done.images, done.resumed_from)
except KeyboardInterrupt:
    sys.exit(1)
"""


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_extraction_by_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "extract.py"
    script.write_text(EXTRACTION)

    def one(out: str, batches: int = 10**6) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path / out), str(batches)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert one("alone").stdout.split() == ["1", "90", "0"]
    expected = content(tmp_path / "alone")
    assert len([name for name in expected if name.endswith(".bin")]) == 6

    done = torchrun(2, str(script), str(tmp_path / "both"), str(10**6))
    assert done.stdout.split() == ["2", "90", "0"], done.stderr
    assert content(tmp_path / "both") == expected

    # Begun by one process (6 batches of 4: one shard and a half), gone on with by two, finished by one.
    assert one("mixed", 6).returncode == 1
    assert torchrun(2, str(script), str(tmp_path / "mixed"), "4").returncode != 0
    last = one("mixed")
    assert last.stdout.split()[0] == "1", last.stderr
    assert int(last.stdout.split()[2]) >= 24 + 16
    assert content(tmp_path / "mixed") == expected


class Second(World):
    """The second of three workers, whose messages go nowhere."""

    rank, size = 1, 3


def test_shares_cover_all_samples() -> None:
    world = Second()
    covered: list[int] = []
    for rank in range(3):
        world.rank = rank
        covered += range(*world.rows(10).indices(10))
    assert covered == list(range(10))
    with pytest.raises(InputError, match="2 samples for 3 workers"):
        world.rows(2)


def test_alone() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert ALONE.sum(tensor) is tensor
    assert ALONE.total(2.5) == 2.5
    assert ALONE.agree({"a": [1]}) == {"a": [1]}
    assert ALONE.first
    assert not distributed.launched()
    with distributed.joined() as world:
        assert world is ALONE
        assert distributed.current() is ALONE


def test_fista_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 2, 3)), np.arange(30) % 2
    model = ConvexHeadClassifier("mlp", solver="fista", beta_ratio=0.1)
    monkeypatch.setattr(distributed, "_CURRENT", Second())
    with pytest.raises(InputError, match="'fista' for 3 workers; expected one process"):
        model.fit(X, y)


class Slow:
    """An operation that is done after some looks, and that must not be waited for before."""

    def __init__(self, looks: int) -> None:
        self.looks, self.waits = looks, 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self, limit: Any) -> None:
        assert self.looks < 0
        self.waits += 1


def test_operations_on_a_gpu_are_not_waited_for_with_a_time_limit() -> None:
    workers, work = object.__new__(distributed._Workers), Slow(5)
    workers._finish(work, on_gpu=True)
    assert work.waits == 1
