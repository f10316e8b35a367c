"""The same results on a GPU as on the processor: every head, loss and solver; skipped where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contract_cases import CASES, SMALL, Case, make_setting, random_units
from convexheads import ConvexHeadClassifier, ConvexHeadClassifierCV, ConvexHeadRegressor, load
from convexheads.architectures import ARCHITECTURES
from convexheads.certificate import certify_factors
from convexheads.cli import main
from convexheads.estimators import on_device
from convexheads.losses import LOSSES
from convexheads.problem import Problem
from convexheads.products import low_precision
from convexheads.solvers import SOLVERS, solver_function
from convexheads.solvers.preconditioner import Preconditioner
from convexheads.spectral import largest_singular_value, proves_bound
from convexheads.subspace import beta_max
from convexheads.tokens.store import TokenStore
from convexheads.types import Factors
from test_distributed import HEAD, torchrun

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

GPU = torch.device("cuda")
SUM = (Case("self_attention", weight=2.5), Case("mlp", "gated_relu", weight=0.4), Case("linear", s=1, d=5, weight=3.0))
SETTINGS = [*((case,) for case in CASES), SUM]
every_setting = pytest.mark.parametrize("heads", SETTINGS, ids=lambda heads: "+".join(map(str, heads)))


def on_gpu(problem: Problem) -> Problem:
    """The same problem there."""
    return Problem(
        problem.components,
        problem.tokens,
        problem.own_loss,
        problem.targets,
        problem.weights,
        problem.beta,
        problem.fit_intercept,
        problem.dtype,
        GPU,
    )


def close(a: Tensor, b: Tensor, tol: float) -> None:
    assert a.is_cuda
    torch.testing.assert_close(a.cpu().double(), b.double(), rtol=tol, atol=tol * max(1e-12, float(b.abs().max())))


@every_setting
def test_evaluations(heads: tuple[Case, ...]) -> None:
    here = make_setting(*heads).problem
    there = on_gpu(here)
    factors = random_units(here)
    moved = on_device(factors, GPU)
    for dtype, tol in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        a, b = here.in_dtype(dtype), there.in_dtype(dtype)
        x, y = (f.to(dtype) for f in (factors, moved))
        close(b.forward(y), a.forward(x), tol)
        value, gradient = a.value_and_gradient(x)
        found, same = b.value_and_gradient(y)
        assert found == pytest.approx(value, rel=tol)
        close(same.flat(), gradient.flat(), tol)
        L = torch.randn(here.targets.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for k in range(len(here.components)):
            for (_, one), (_, other) in zip(a.gammas(L, k), b.gammas(L.to(GPU), k), strict=True):
                close(other, one, tol)
    assert beta_max(there) == pytest.approx(beta_max(here), rel=1e-9)
    certificates = [certify_factors(here, factors), certify_factors(there, moved)]
    assert certificates[1].primal == pytest.approx(certificates[0].primal, rel=1e-10)
    assert certificates[1].dual == pytest.approx(certificates[0].dual, rel=1e-6, abs=1e-9)
    assert certificates[1].certified == certificates[0].certified


@pytest.mark.parametrize("solver", sorted(name for name, solver in SOLVERS.items() if solver.promises_tol))
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_solvers(case: Case, loss: str, solver: str) -> None:
    here = make_setting(replace(case, loss=loss, n=20), beta=0.05).problem
    solve = solver_function(solver)
    # fista takes small steps only; a coarser gap tells as much.
    tol = 1e-4 if solver == "fista" else 1e-6
    a, b = (solve(problem, tol=tol, max_iter=5000) for problem in (here, on_gpu(here)))
    assert b.converged
    assert b.certificate.certified
    assert b.certificate.primal == pytest.approx(a.certificate.primal, rel=2 * tol)


@pytest.mark.parametrize(
    ("head", "activation"),
    [*((h, a) for h in sorted(ARCHITECTURES) for a in ("linear", "gated_relu")), ("mlp", "relu")],
)
def test_estimators(head: str, activation: str) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 6, 4)), np.arange(60) % 4
    options: dict[str, Any] = {"activation": activation, "gates": 3, "n_blocks": 2, "tol": 1e-5, "beta_ratio": 0.1}
    here = ConvexHeadClassifier(head, **options).fit(X, y)
    there = ConvexHeadClassifier(head, device="cuda", **options).fit(X, y)
    assert there.certificate_.certified
    assert there.certificate_.primal == pytest.approx(here.certificate_.primal, rel=2e-5)
    if activation != "relu":  # whose networks are found by a local search
        np.testing.assert_allclose(there.predict_proba(X), here.predict_proba(X), atol=1e-2)
    assert not any(parameter.is_cuda for parameter in there.to_module().parameters())
    auto = ConvexHeadClassifier(head, device="auto", **options).fit(torch.from_numpy(X), y)
    assert auto.certificate_.primal == pytest.approx(there.certificate_.primal, rel=1e-9)


def planted(n: int, s: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, s, d)).astype(np.float32)
    W = rng.standard_normal((d, d, classes)).astype(np.float32)
    scores = np.einsum("nsa,nsb,abc->nc", X, X, W, optimize=True)
    scores += 0.5 * scores.std() * rng.standard_normal(scores.shape).astype(np.float32)
    return X, scores.argmax(1)


@pytest.mark.parametrize("head", ["self_attention", "mixer", "fno", "mlp"])
@pytest.mark.parametrize("squared", [False, True], ids=["cross_entropy", "squared"])
def test_float32_with_low_precision_far_from_the_optimum(head: str, squared: bool) -> None:
    """Large enough for bfloat16 products, every part of the preconditioner, and units to be trimmed and added."""
    X, y = planted(6000, 16, 12, 10)
    assert low_precision(GPU) in (None, torch.bfloat16)
    estimator: Any = ConvexHeadRegressor if squared else ConvexHeadClassifier
    targets = np.eye(10)[y] if squared else y
    there = estimator(head, device="cuda", beta_ratio=0.02, tol=1e-3).fit(X, targets)
    assert there.certificate_.certified
    assert there.certificate_.relative_gap <= 1e-3
    # An independent look at what was found, on the processor.
    here = estimator(head, beta_ratio=0.02, tol=1e-3).fit(X, targets, init=there)
    assert here.certificate_.primal == pytest.approx(there.certificate_.primal, rel=1e-3)


def test_preconditioner() -> None:
    """Drawn samples and signs are the same, so that the result is to rounding."""
    case = Case("self_attention", loss="cross_entropy", n=1500, c=5, d=6)
    here = make_setting(case).problem
    factors, gradient = random_units(here, 8), random_units(here, 8, seed=3)
    found = []
    for problem, place in ((here, torch.device("cpu")), (on_gpu(here), GPU)):
        at = on_device(factors, place)
        generator = torch.Generator().manual_seed(0)
        preconditioner = Preconditioner(problem, at, generator)
        found.append(preconditioner.apply(on_device(gradient, place).flat()[None])[0])
    close(found[1], found[0].cpu(), 1e-2 if low_precision(torch.device("cpu")) else 1e-6)


def test_path() -> None:
    X, y = planted(400, 6, 5, 4)
    options: dict[str, Any] = {"beta_ratios": (0.3, 0.1, 0.03), "validation": 0.25, "tol": 1e-4}
    here = ConvexHeadClassifierCV("self_attention", **options).fit(X, y)
    there = ConvexHeadClassifierCV("self_attention", device="cuda", **options).fit(X, y)
    assert there.best_beta_ratio_ == here.best_beta_ratio_
    assert there.certificate_.primal == pytest.approx(here.certificate_.primal, rel=2e-4)


def test_proof() -> None:
    """The factor that a GPU finds proves what that of the processor does, and nothing that is false."""
    generator = torch.Generator().manual_seed(0)
    for p, q in ((30, 80), (700, 700), (2000, 1500)):
        gamma = torch.randn(p, q, generator=generator, dtype=torch.float64)
        sigma = float(torch.linalg.matrix_norm(gamma, 2))
        found = largest_singular_value(gamma.to(GPU))
        assert found.proved
        assert found.method == "cholesky"
        assert found.lower <= sigma * (1 + 1e-12) <= found.upper * (1 + 2e-12)
        assert found.upper <= found.lower * (1 + 1e-8)
        assert proves_bound(gamma.to(GPU), sigma * (1 + 1e-7))
        assert not proves_bound(gamma.to(GPU), sigma * (1 - 1e-10))


def test_larger_chunks_than_a_processor_takes() -> None:
    problem = make_setting(Case("mixer", n=50)).problem
    there = on_gpu(problem)
    free, _ = torch.cuda.mem_get_info()
    assert there.budget.cache >= free // 4
    assert there.budget.workspace > problem.budget.workspace
    assert there.chunk_rows(64) >= problem.chunk_rows(64)


def test_statistics_without_room() -> None:
    """Statistics that do not fit are computed again from the tokens, chunk by chunk."""
    heads = (Case("self_attention", n=40),)
    here = make_setting(*heads).problem
    there = on_gpu(here)
    there.cache_bytes = 0
    factors = random_units(here)
    close(there.forward(on_device(factors, GPU)), here.forward(factors), 1e-11)
    assert there._cached_stats(there.dtype) is None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    X, y = planted(300, 6, 9, 3)
    folder = tmp_path_factory.mktemp("tokens") / "train"
    TokenStore.write(folder, X, y, dtype="float16", shard_rows=64)
    return folder


def command(store: Path, out: Path, *more: str) -> list[str]:
    return ["fit", str(store), "--out", str(out), *HEAD, "--beta-ratio", "0.1", "--tol", "1e-6", *more]


def test_commands(store: Path, tmp_path: Path) -> None:
    primals = []
    for device in ("cpu", "cuda"):
        out, result = tmp_path / f"{device}.safetensors", tmp_path / f"{device}.json"
        assert main(command(store, out, "--device", device, "--quiet", "--json", str(result))) == 0
        primals.append(json.loads(result.read_text())["certificate"]["primal"])
        assert load(out) is not None
    assert primals[1] == pytest.approx(primals[0], rel=1e-6)
    memory = json.loads((tmp_path / "cuda.json").read_text())["memory"]
    assert memory["device_peak"] > 0
    limited = tmp_path / "limited.json"
    more = ["--device", "cuda", "--memory-limit", "32MB", "--quiet", "--json", str(limited)]
    assert main(command(store, tmp_path / "limited.safetensors", *more)) == 0
    assert json.loads(limited.read_text())["certificate"]["primal"] == pytest.approx(primals[0], rel=1e-6)
    predicted = tmp_path / "predicted.csv"
    model = str(tmp_path / "cuda.safetensors")
    assert main(["predict", model, str(store), "--device", "cuda", "--out", str(predicted)]) == 0
    assert predicted.stat().st_size > 0


def test_workers_share_a_gpu(store: Path, tmp_path: Path) -> None:
    """More workers than GPUs: NCCL takes no two on one, so that they talk through the processor."""
    workers = torch.cuda.device_count() + 1
    result, alone = tmp_path / "many.json", tmp_path / "one.json"
    assert main(command(store, tmp_path / "one.safetensors", "--device", "cuda", "--quiet", "--json", str(alone))) == 0
    more = ["--device", "cuda", "--json", str(result)]
    done = torchrun(workers, "-m", "convexheads", *command(store, tmp_path / "many.safetensors", *more))
    assert done.returncode == 0, done.stderr
    primal, expected = (json.loads(file.read_text())["certificate"]["primal"] for file in (result, alone))
    assert primal == pytest.approx(expected, rel=1e-6)


NCCL = """
import torch
from convexheads import distributed

distributed.launched = lambda: True
with distributed.joined() as world:
    device = torch.device(distributed.local_device("cuda"))
    mine = torch.full((1000, 1000), float(world.rank + 1), device=device)
    assert world._nccl
    for _ in range(50):
        whole = world.sum(mine)
    assert whole.is_cuda and whole.dtype == torch.float32
    assert bool((whole == world.size * (world.size + 1) / 2).all())
    assert float(world.least(mine)[0, 0]) == 1.0
    one, two = world.sum_all([mine, mine.double()[:3]])
    assert one.dtype == torch.float32 and two.dtype == torch.float64 and two.is_cuda
    assert world.agree({"rank": 0}) == {"rank": 0}
    print("summed over", world.size)
"""


def test_nccl(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(NCCL)
    workers = torch.cuda.device_count()
    done = torchrun(workers, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"summed over {workers}") == workers


def test_regression() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 5, 4))
    y = np.einsum("nsa,nsb->n", X[..., :2], X[..., 2:])
    models = [ConvexHeadRegressor("self_attention", device=device, tol=1e-6).fit(X, y) for device in ("cpu", "cuda")]
    assert models[1].certificate_.primal == pytest.approx(models[0].certificate_.primal, rel=2e-6)


def test_factors_come_back_to_the_processor() -> None:
    X, y = planted(60, 4, 3, 3)
    model = ConvexHeadClassifier("mlp", activation="relu", gates=4, device="cuda").fit(X, y)
    held: Factors = model._factors
    assert not any(t.is_cuda for t in held.tensors())
    assert not any(t.is_cuda for t in model._network.tensors())
