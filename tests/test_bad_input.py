"""Bad input through the public interface: each case raises the right error, which says what to do about it.

``python -m pytest tests/test_bad_input.py -s -k table`` prints all messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import NotFittedError

from convexheads import ConvexHeadClassifier, ConvexHeadRegressor, load
from convexheads.errors import ConvexHeadsError, DataError, InputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6, 4))
Y = RNG.normal(size=(12, 2))
y = np.arange(12) % 3
SOFT = RNG.dirichlet(np.ones(3), 12)


def fit(tokens: Any = X, labels: Any = y, sample_weight: Any = None, **options: Any) -> None:
    ConvexHeadClassifier(**options).fit(tokens, labels, sample_weight)


def regress(tokens: Any = X, labels: Any = Y, sample_weight: Any = None, **options: Any) -> None:
    ConvexHeadRegressor(**options).fit(tokens, labels, sample_weight)


def gated(gates: Any, **options: Any) -> None:
    fit(activation="gated_relu", gates=gates, **options)


def put(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    array = np.array(array, dtype=float)
    array[index] = value
    return array


def fitted() -> ConvexHeadClassifier:
    return ConvexHeadClassifier(head="mlp").fit(X, y)


def saved(folder: Path) -> Path:
    fitted().save(folder / "model.safetensors")
    return folder / "model.safetensors"


def rewritten(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = saved(folder)
    path.write_bytes(change(path.read_bytes()))
    return path


def other_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A model file with its own header changed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    ours = json.loads(header["__metadata__"]["convexheads"])
    change(ours)
    header["__metadata__"]["convexheads"] = json.dumps(ours)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# name: (call, parts of the message). The call takes a scratch folder; unless said below, an InputError follows.
Case = tuple[Callable[[Path], object], tuple[str, ...]]
CASES: dict[str, Case] = {
    # Tokens
    "NaN in the tokens": (
        lambda tmp: fit(put(X, (3, 1, 1), np.nan)),
        ("X: got NaN in the tokens of sample 3", "expected finite tokens", "Remove these samples"),
    ),
    "infinite tokens": (
        lambda tmp: fit(put(X, (3, 1, 1), -np.inf)),
        ("X: got infinity (inf) in the tokens of sample 3", "overflow in float16"),
    ),
    "NaN in a tensor": (
        lambda tmp: fit(torch.from_numpy(put(X, 5, np.nan))),
        ("X: got NaN in the tokens of sample 5",),
    ),
    "NaN in a memory map": (
        lambda tmp: fit(memory_map(tmp, put(X, 7, np.nan))),
        ("X: got NaN in the tokens of sample 7",),
    ),
    "float16 overflow": (
        lambda tmp: fit(np.where(X > 1, np.inf, X).astype(np.float16)),
        ("X: got infinity (inf)", "look for an overflow in float16 extraction"),
    ),
    "no samples": (lambda tmp: fit(X[:0], y[:0]), ("X: got 0 sample(s)", "expected at least one sample")),
    "no tokens": (lambda tmp: fit(X[:, :0]), ("X: got 0 token(s)", "expected at least one token")),
    "no features": (lambda tmp: fit(X[..., :0]), ("X: got 0 feature(s)", "expected at least one feature")),
    "tokens of one dimension": (
        lambda tmp: fit(X[:, 0, 0]),
        ("X: got 1 dimensions, shape (12,)", "expected tokens (n, s, d)", "Reshape your data"),
    ),
    "tokens of four dimensions": (
        lambda tmp: fit(X[None]),
        ("X: got 4 dimensions, shape (1, 12, 6, 4)", "or (n, d) for one token a sample"),
    ),
    "complex tokens": (lambda tmp: fit(X + 1j), ("X: got", "Complex data not supported", "expected tokens (n, s, d)")),
    "complex tensor": (lambda tmp: fit(torch.from_numpy(X + 1j)), ("X: got complex numbers", "expected real tokens")),
    "words for tokens": (
        lambda tmp: fit([["a", "b"]] * 12),
        ("X: got something that is no array of numbers", "could not convert string to float"),
    ),
    "ragged tokens": (lambda tmp: fit([[1.0, 2.0], [1.0]], [0, 1]), ("X: got something that is no array of numbers",)),
    "None for tokens": (lambda tmp: fit(None), ("X: got 0 dimensions", "expected tokens (n, s, d)")),
    "sparse tokens": (
        lambda tmp: fit(sparse.csr_array(X[:, 0])),
        ("X: got sparse data", "Convert it with X.toarray()"),
    ),
    # ReLU heads
    "cones without all patterns": (
        lambda tmp: fit(head="mlp", activation="relu", relu_bound="cones"),
        ("relu_bound: got 'cones' with sampled or given gates", "expected gates='all'", "relu_bound='gated'"),
    ),
    "an unknown bound": (
        lambda tmp: fit(head="mlp", activation="relu", relu_bound="tight"),
        ("relu_bound: got 'tight'", "expected 'gated' or 'cones'"),
    ),
    "too many patterns": (
        lambda tmp: fit(activation="relu", gates="all"),
        ("gates: got more than 5000 patterns for gates='all'", "Give a number of gates", "no lower bound"),
    ),
    "a word for the gates of a ReLU": (
        lambda tmp: fit(activation="relu", gates="some"),
        ("gates: got 'some'", "an integer or a sequence of arrays of u's shape"),
    ),
    "a gate whose mask is all border": (
        lambda tmp: fit(head="mlp", activation="relu", gates=np.zeros((1, 4))),
        ("gates: got gate 0, which has pre-activations of zero", "Draw gates at random"),
    ),
    # Labels
    "one class": (
        lambda tmp: fit(labels=np.zeros(12, int)),
        ("y: got one class (0)", "expected at least 2 classes", "needs samples of every class"),
    ),
    "labels missing": (lambda tmp: fit(labels=None), ("y: requires y to be passed", "Give one label a sample")),
    "too few labels": (lambda tmp: fit(labels=y[:-1]), ("y: got 11 labels", "expected n = 12")),
    "one number for labels": (lambda tmp: fit(labels=3), ("y: got one label, 3", "expected n = 12")),
    "NaN label": (lambda tmp: fit(labels=put(y, 2, np.nan)), ("y: got NaN or infinity", "expected one finite label")),
    "a label missing": (
        lambda tmp: fit(labels=np.array([None, "a"] * 6, object)),
        ("y: got Unknown label type", "expected class labels"),
    ),
    "mixed labels": (
        lambda tmp: fit(labels=np.array([1, "a"] * 6, object)),
        ("y: got Unknown label type", "all of one kind"),
    ),
    "numbers to predict for a classifier": (
        lambda tmp: fit(labels=Y[:, 0]),
        ("y: got Unknown label type: continuous", "expected class labels", "Use ConvexHeadRegressor"),
    ),
    "two columns of labels": (
        lambda tmp: fit(labels=np.stack([y, y], 1)),
        ("y: got shape (12, 2) with values in [0, 2]", "expected labels (n,), or soft labels"),
    ),
    "soft labels that do not sum to one": (
        lambda tmp: fit(labels=0.5 * SOFT, loss="cross_entropy"),
        ("y: got soft labels whose rows do not sum to one", "expected rows that sum to one"),
    ),
    "negative soft labels": (
        lambda tmp: fit(labels=SOFT - 0.5),
        ("y: got shape (12, 3) with values in [-", "with values in [0, 1]"),
    ),
    "labels of three dimensions": (
        lambda tmp: fit(labels=np.zeros((12, 2, 2))),
        ("y: got shape (12, 2, 2) of dtype float64 for pooling='mean'", "expected labels (n,)"),
    ),
    "labels without columns": (lambda tmp: fit(labels=np.zeros((12, 0))), ("y: got shape (12, 0)", "expected labels")),
    "token labels of another length": (
        lambda tmp: fit(labels=np.zeros((12, 5), int), pooling=None),
        ("y: got 5 labels a sample", "expected s = 6, one a token"),
    ),
    "soft token labels of another length": (
        lambda tmp: fit(labels=np.full((12, 5, 2), 0.5), pooling=None),
        ("y: got 5 labels a sample", "expected s = 6, one a token"),
    ),
    "sample labels for token outputs": (
        lambda tmp: fit(pooling=None),
        ("y: got shape (12,) of dtype int64 for pooling=None", "expected labels (n, s)"),
    ),
    "hard labels for several labels a sample": (
        lambda tmp: fit(loss="multilabel_logistic"),
        ("y: got shape (12,)", "0/1 indicators (n, c)"),
    ),
    "NaN target": (lambda tmp: regress(labels=put(Y, 0, np.nan)), ("y: got NaN or infinity", "expected finite values")),
    "complex targets": (lambda tmp: regress(labels=Y + 1j), ("y: got complex values", "expected real values")),
    "words for targets": (
        lambda tmp: regress(labels=["a", "b", "c"] * 4),
        ("y: got dtype <U1", "expected numbers", "Use ConvexHeadClassifier"),
    ),
    "targets missing": (lambda tmp: regress(labels=None), ("y: requires y to be passed", "Give one value a sample")),
    "too few targets": (lambda tmp: regress(labels=Y[:5]), ("y: got 5 targets", "expected n = 12")),
    "targets without columns": (lambda tmp: regress(labels=Y[:, :0]), ("y: got shape (12, 0)", "at least one value")),
    "token targets for pooled outputs": (
        lambda tmp: regress(labels=X),
        ("y: got shape (12, 6, 4)", "expected (n,) or (n, c) for pooling='mean'"),
    ),
    "pooled targets for token outputs": (
        lambda tmp: regress(pooling=None),
        ("y: got shape (12, 2)", "expected (n, s, c) with s = 6 for pooling=None"),
    ),
    # Weights
    "negative weights": (
        lambda tmp: fit(sample_weight=-np.ones(12)),
        ("sample_weight: got", "Negative values", "expected (12,) finite weights >= 0"),
    ),
    "weights all zero": (
        lambda tmp: fit(sample_weight=np.zeros(12)),
        ("sample_weight: got", "at least one non-zero", "expected (12,)"),
    ),
    "weights of another length": (
        lambda tmp: regress(sample_weight=np.ones(11)),
        ("sample_weight: got", "(11,)", "expected (12,) finite weights"),
    ),
    "NaN weight": (lambda tmp: fit(sample_weight=put(np.ones(12), 3, np.nan)), ("sample_weight: got", "contains NaN")),
    "a word for weights": (lambda tmp: fit(sample_weight="balanced"), ("sample_weight: got", "'balanced'")),
    "class and sample weights that leave nothing": (
        lambda tmp: fit(sample_weight=(y == 0) * 1.0, class_weight={0: 0.0, 1: 1.0, 2: 1.0}),
        ("sample_weight: got weights that are all zero, class weights included", "expected a positive sum"),
    ),
    "unknown class_weight": (
        lambda tmp: fit(class_weight="equal"),
        ("class_weight: got 'equal'", "expected None, 'balanced' or a dict"),
    ),
    "class_weight of unknown classes": (
        lambda tmp: fit(class_weight={7: 1.0}),
        ("class_weight: got {7: 1.0}", "classes among [0, 1, 2]"),
    ),
    "negative class_weight": (
        lambda tmp: fit(class_weight={0: -1.0}),
        ("class_weight: got {0: -1.0}", "expected finite weights >= 0"),
    ),
    "class_weight with soft labels": (
        lambda tmp: fit(labels=SOFT, class_weight="balanced"),
        ("class_weight: got soft or several labels", "expected one hard label a sample"),
    ),
    # Heads
    "unknown head": (
        lambda tmp: fit(head="attention"),
        ("head: got 'attention'", "expected one of block_fno, fno, linear, mixer, mlp, self_attention"),
    ),
    "no head": (lambda tmp: fit(head=[]), ("head: got an empty list", "expected at least one head")),
    "a number for a head": (lambda tmp: fit(head=3), ("head: got 3", "expected a name, a dict of options")),
    "head options without a head": (
        lambda tmp: fit(head=[{"weight": 1.0}]),
        ("head: got options {'weight': 1.0}", "expected a key 'head'"),
    ),
    "misspelt head option": (
        lambda tmp: fit(head=[{"head": "mlp", "wieght": 1.0}]),
        ("head: got unknown options ['wieght']", "expected some of", "'weight'"),
    ),
    "option of another head": (
        lambda tmp: fit(head=[{"head": "mlp", "grid": (2, 3)}]),
        ("head: got the option 'grid' for the head 'mlp'", "Leave 'grid' out"),
    ),
    "negative branch weight": (
        lambda tmp: fit(head=[{"head": "mlp", "weight": -1.0}, "linear"]),
        ("weight: got -1.0", "expected a positive number"),
    ),
    "a number for a view": (
        lambda tmp: fit(head=[{"head": "mlp", "view": 3}]),
        ("view: got int", "expected a transform"),
    ),
    "unknown activation": (
        lambda tmp: fit(activation="gelu"),
        ("activation: got 'gelu'", "expected one of linear, gated_relu"),
    ),
    "grid of another number of tokens": (
        lambda tmp: fit(head="fno", grid=(2, 2)),
        ("grid: got 2 x 2 = 4 tokens", "expected h * w = s = 6", "Pass grid=None"),
    ),
    "a number for a grid": (lambda tmp: fit(head="fno", grid=6), ("grid: got 6", "expected a pair of integers (h, w)")),
    "grid of three sizes": (lambda tmp: fit(head="fno", grid=(1, 2, 3)), ("grid: got (1, 2, 3)", "a pair of integers")),
    "grid of fractions": (lambda tmp: fit(head="fno", grid=(2.5, 2.4)), ("grid: got (2.5, 2.4)", "a pair of integers")),
    "negative grid": (lambda tmp: fit(head="fno", grid=(-2, -3)), ("grid: got (-2, -3)", "(h, w) >= 1")),
    "n_blocks that do not divide d": (
        lambda tmp: fit(head="block_fno", n_blocks=3),
        ("n_blocks: got 3 with 4 features d", "that divides the features d", "Choose another n_blocks"),
    ),
    "n_blocks that do not divide c": (
        lambda tmp: fit(head="block_fno", n_blocks=4),
        ("n_blocks: got 4 with 3 outputs c", "that divides the outputs c"),
    ),
    "no blocks": (lambda tmp: fit(head="block_fno", n_blocks=0), ("n_blocks: got 0", "a number of blocks >= 1")),
    "n_blocks of 1.5": (lambda tmp: fit(head="block_fno", n_blocks=1.5), ("n_blocks: got 1.5", "an integer >= 1")),
    # Gates
    "no gates": (lambda tmp: gated(0), ("gates: got 0", "expected a number of gates >= 1")),
    "an empty list of gates": (lambda tmp: gated([]), ("gates: got", "need at least one", "arrays of shape (4, 4)")),
    "a word for gates": (lambda tmp: gated("many"), ("gates: got 'many'", "an integer or a sequence of arrays")),
    "gates of 2.5": (lambda tmp: gated(2.5), ("gates: got 2.5", "an integer or a sequence of arrays")),
    "gates of a wrong shape": (
        lambda tmp: gated(np.ones((2, 4, 5))),
        ("gates: got gates of shape (4, 5)", "expected u's shape (4, 4)"),
    ),
    "gates of another head": (
        lambda tmp: gated(np.ones((2, 4)), head="mixer"),
        ("gates of shape (4,)", "shape (6, 6)"),
    ),
    "gates of two shapes": (
        lambda tmp: gated([np.ones((4, 4)), np.ones((4, 3))]),
        ("gates: got gates that cannot be stacked", "arrays of shape (4, 4)"),
    ),
    "NaN gates": (lambda tmp: gated(np.full((2, 4, 4), np.nan)), ("gates: got NaN", "expected finite gates")),
    "complex gates": (lambda tmp: gated(1j * np.ones((2, 4, 4))), ("gates: got", "complex numbers")),
    "gates of one channel group for two": (
        lambda tmp: gated(np.ones((1, 3, 12)), head="block_fno", n_blocks=2, labels=np.arange(12) % 4),
        ("gates: got gates for 1 channel groups", "one sequence of gates for each of the 2 channel groups"),
    ),
    # Parameters
    "negative beta": (lambda tmp: fit(beta=-1), ("beta: got -1", "expected a number > 0, or None")),
    "beta of zero": (lambda tmp: fit(beta=0.0), ("beta: got 0.0", "expected a number > 0")),
    "NaN beta": (lambda tmp: fit(beta=np.nan), ("beta: got nan", "expected a number > 0")),
    "a word for beta": (lambda tmp: fit(beta="0.1"), ("beta: got '0.1'", "expected a number > 0")),
    "beta_ratio of zero": (lambda tmp: fit(beta_ratio=0), ("beta_ratio: got 0", "expected a number > 0")),
    "tol of zero": (lambda tmp: fit(tol=0), ("tol: got 0", "expected a number > 0")),
    "infinite tol": (lambda tmp: fit(tol=np.inf), ("tol: got inf", "expected a number > 0")),
    "max_iter of zero": (lambda tmp: fit(max_iter=0), ("max_iter: got 0", "expected an integer >= 1")),
    "max_iter of 2.5": (lambda tmp: fit(max_iter=2.5), ("max_iter: got 2.5", "expected an integer >= 1")),
    "max_rank of zero": (lambda tmp: fit(max_rank=0), ("max_rank: got 0", "expected an integer >= 1, or None")),
    "unknown solver": (lambda tmp: fit(solver="sgd"), ("solver: got 'sgd'", "expected one of", "factored", "fista")),
    "unknown loss": (lambda tmp: fit(loss="hinge"), ("loss: got 'hinge'", "expected 'auto', 'cross_entropy'")),
    "unknown pooling": (lambda tmp: fit(pooling="max"), ("pooling: got 'max'", "expected 'mean', or None")),
    "unknown dtype": (lambda tmp: fit(dtype="float16"), ("dtype: got 'float16'", "expected 'float32' or 'float64'")),
    "unknown device": (lambda tmp: fit(device="gpu"), ("device: got 'gpu'", "expected None, 'auto' or a torch device")),
    "unknown random_state": (
        lambda tmp: fit(random_state="seed"),
        ("random_state: got 'seed'", "expected None, an integer >= 0"),
    ),
    "a word for fit_intercept": (lambda tmp: fit(fit_intercept="no"), ("fit_intercept: got 'no'", "True or False")),
    "label_smoothing of one": (
        lambda tmp: fit(label_smoothing=1.0),
        ("label_smoothing: got 1.0", "expected a number in [0, 1)"),
    ),
    "a list where a name belongs": (lambda tmp: fit(solver=["fista"]), ("solver: got ['fista']", "expected one of")),
    "a problem too large for fista": (
        lambda tmp: fit(
            np.zeros((30, 90, 6)), np.arange(2700).reshape(30, 90) % 3, pooling=None, head="mixer", solver="fista"
        ),
        ("solver: got 'fista' for a problem whose dense feature matrices hold", "Use solver='factored'"),
    ),
    # Options of solvers
    "options of a solver that has none": (
        lambda tmp: fit(solver_options={"epochs": 3}),
        ("solver_options: got epochs for solver='factored'", "expected none"),
    ),
    "unknown option of a solver": (
        lambda tmp: fit(solver="adamw", solver_options={"lr": 1e-3, "epochs": 3}),
        ("solver_options: got lr for solver='adamw'", "expected some of units, seeds, checks, learning_rates, epochs"),
    ),
    "options that are no dict": (
        lambda tmp: fit(solver="lbfgs", solver_options=[("units", 3)]),
        ("solver_options: got a list", "expected a dict of options, or None"),
    ),
    "no units": (lambda tmp: fit(solver="lbfgs", solver_options={"units": 0}), ("units: got 0", "an integer >= 1")),
    "half a seed": (lambda tmp: fit(solver="lbfgs", solver_options={"seeds": 0.5}), ("seeds: got 0.5", ">= 1")),
    "no learning rates": (
        lambda tmp: fit(solver="adamw", solver_options={"learning_rates": ()}),
        ("learning_rates: got ()", "a sequence of positive numbers"),
    ),
    "a learning rate alone": (
        lambda tmp: fit(solver="adamw", solver_options={"learning_rates": 0.1}),
        ("learning_rates: got 0.1", "a sequence of positive numbers"),
    ),
    "a negative learning rate": (
        lambda tmp: fit(solver="adamw", solver_options={"learning_rates": (0.1, -0.1)}),
        ("learning_rates: got (0.1, -0.1)", "a sequence of positive numbers"),
    ),
    "learning rates that all diverge": (
        lambda tmp: fit(head="mlp", solver="adamw", solver_options={"learning_rates": (1e200,), "epochs": 5}),
        ("learning_rates: got trainings that all diverged (1e+200)", "Lower the learning rates"),
    ),
    # Fitted models
    "a sample of other tokens": (
        lambda tmp: fitted().predict(X[:, :5]),
        ("X: got 5 tokens a sample", "expected 6 as in fit", "the same resolution and token choice"),
    ),
    "a sample of other features": (
        lambda tmp: fitted().predict_proba(X[..., :3]),
        ("X has 3 features", "is expecting 4 features", "the same transforms as in fit"),
    ),
    "a single sample": (lambda tmp: fitted().predict(X[0, 0]), ("X: got 1 dimensions", "a single sample is X[None]")),
    "NaN to predict from": (lambda tmp: fitted().predict(put(X, 0, np.nan)), ("X: got NaN in the tokens of sample 0",)),
    "not fitted": (lambda tmp: ConvexHeadClassifier().predict(X), ("not fitted yet", "Call 'fit'")),
    "not fitted, saved": (lambda tmp: ConvexHeadRegressor().save(tmp / "model"), ("not fitted yet", "Call 'fit'")),
    "not fitted, made a module": (lambda tmp: ConvexHeadClassifier().to_module(), ("not fitted yet", "Call 'fit'")),
    "a start that is none": (
        lambda tmp: ConvexHeadClassifier().fit(X, y, init=0),
        ("init: got int", "expected a fitted estimator, a ConvexHead module"),
    ),
    "a start with other gates": (
        lambda tmp: ConvexHeadClassifier(head="mlp", activation="gated_relu", gates=2, random_state=1).fit(
            X, y, init=ConvexHeadClassifier(head="mlp", activation="gated_relu", gates=2).fit(X, y)
        ),
        ("init: got units with other gates", "expected the same gates", "random_state"),
    ),
    "a start from weights of other classes": (
        lambda tmp: ConvexHeadClassifier(head="mlp").fit(X, y, init={"u": np.ones((2, 4)), "v": np.ones((2, 5))}),
        ("v: got 5 outputs", "expected 3, one for each class"),
    ),
    "a start from weights with NaN": (
        lambda tmp: ConvexHeadClassifier(head="mlp").fit(
            X, y, init={"u": np.full((2, 4), np.nan), "v": np.ones((2, 3))}
        ),
        ("u: got 8 weights that are NaN or infinite", "lower its learning rate"),
    ),
    "weights for a sum of heads": (
        lambda tmp: ConvexHeadClassifier(head=["mlp", "linear"]).fit(X, y, init={"v": np.ones((2, 3))}),
        ("init: got weights by name for 2 heads", "a fitted estimator or a module"),
    ),
    "a start of another head": (
        lambda tmp: ConvexHeadClassifier(head="mixer").fit(X, y, init=fitted()),
        ("init: got units of shapes", "the same heads on the same tokens"),
    ),
    # Files
    "missing model": (
        lambda tmp: load(tmp / "none.safetensors"),
        ("none.safetensors: got no such file", "expected a model written by save", "Check the path"),
    ),
    "folder without a model": (lambda tmp: load(tmp), ("model.safetensors: got no such file", "Check the path")),
    "a number for a path": (lambda tmp: load(3), ("path: got int", "expected the path of a model file")),
    "empty model": (
        lambda tmp: load(rewritten(tmp, lambda data: b"")),
        ("got a file that is truncated or no convexheads model", "Save it again"),
    ),
    "truncated model": (
        lambda tmp: load(rewritten(tmp, lambda data: data[:-7])),
        ("got a file that is truncated or no convexheads model", "Save it again"),
    ),
    "model cut in its header": (
        lambda tmp: load(rewritten(tmp, lambda data: data[:60])),
        ("got a file that is truncated or no convexheads model",),
    ),
    "a text file for a model": (
        lambda tmp: load(rewritten(tmp, lambda data: b"head: mlp\n" * 50)),
        ("got a file that is truncated or no convexheads model",),
    ),
    "a flipped bit in the weights": (
        lambda tmp: load(rewritten(tmp, lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])),
        ("got content that does not match its checksum", "Copy or save it again"),
    ),
    "a changed parameter in the file": (
        lambda tmp: load(rewritten(tmp, lambda data: other_header(data, lambda ours: ours.update(beta_=1.0)))),
        ("got content that does not match its checksum",),
    ),
    "model of another version": (
        lambda tmp: load(rewritten(tmp, lambda data: other_header(data, lambda ours: ours.update(format=99)))),
        ("got format 99", "expected format 1", "written by another version"),
    ),
    "model of a foreign class": (
        lambda tmp: load(
            rewritten(tmp, lambda data: other_header(data, lambda ours: ours.update({"class": "os.system"})))
        ),
        ("of class 'os.system'", "expected format 1 of", "ConvexHeadClassifier"),
    ),
    "tensors of somebody else": (
        lambda tmp: load(rewritten(tmp, lambda data: data.replace(b'"convexheads"', b'"anotherhead"'))),
        ("got a file that is truncated or no convexheads model", "'convexheads' is missing"),
    ),
    "a folder that is not there": (
        lambda tmp: fitted().save(tmp / "no" / "model.safetensors"),
        ("model.safetensors: could not be written", "No such file or directory"),
    ),
}
OTHER_ERRORS: dict[str, type[Exception]] = {
    "not fitted": NotFittedError,
    "not fitted, saved": NotFittedError,
    "not fitted, made a module": NotFittedError,
    **{
        name: DataError
        for name in CASES
        if ("model" in name and "made" not in name)
        or name in ("a flipped bit in the weights", "a changed parameter in the file", "tensors of somebody else",
                    "a folder that is not there")
    },
}  # fmt: skip


def memory_map(folder: Path, tokens: np.ndarray) -> np.ndarray:
    np.save(folder / "X.npy", tokens)
    return np.load(folder / "X.npy", mmap_mode="r")


def message_of(name: str, folder: Path) -> str:
    """The message of a case, after checking its class and that it is one line."""
    call, _ = CASES[name]
    expected = OTHER_ERRORS.get(name, InputError)
    with pytest.raises(expected) as caught:
        call(folder)
    if expected is not NotFittedError:
        assert isinstance(caught.value, ConvexHeadsError)
        assert isinstance(caught.value, ValueError if expected is InputError else OSError)
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path) -> None:
    message = message_of(name, tmp_path)
    for part in CASES[name][1]:
        assert part in message
    assert "\n" not in message
    assert len(message) < 500
    # Got, expected: but for what scikit-learn's checks or the operating system word themselves.
    if not any(words in message for words in ("is not fitted", "X has", "requires y", "could not be written")):
        assert "got " in message
        assert "; expected " in message


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 100
    assert sum(error is DataError for error in OTHER_ERRORS.values()) >= 10


def test_the_table(tmp_path: Path) -> None:
    """All cases and their messages, for people: shown with ``-s``. Few of them may share a message."""
    found = {}
    for number, name in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        found[name] = message_of(name, folder).replace(f"{folder}/", "")
    width = max(map(len, found))
    print("", *(f"{name:{width}}  {message}" for name, message in found.items()), sep="\n")
    assert len(set(found.values())) > 0.85 * len(CASES)


def test_bad_input_leaves_the_estimator_unfitted() -> None:
    model = ConvexHeadClassifier(solver="sgd")
    with pytest.raises(InputError):
        model.fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_a_failed_fit_does_not_touch_the_data() -> None:
    tokens, labels = X.copy(), y.copy()
    with pytest.raises(InputError):
        fit(tokens, labels, beta=-1)
    np.testing.assert_array_equal(tokens, X)
    np.testing.assert_array_equal(labels, y)
