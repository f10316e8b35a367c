"""What people train on frozen tokens today: softmax attention, attentive probe, MLP, linear probe, nearest neighbours.

None of them is certified. Their hyper-parameters are chosen on the validation rows they are given, stage by stage,
and the chosen ones are then fitted to all rows: the same data for choice and fit as for heads with beta chosen by
validation. To add a baseline: subclass :class:`Baseline`, or :class:`TorchBaseline` for a module, and decorate it
with :func:`register`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from convexheads import memory
from convexheads.errors import InputError, describe
from convexheads.inputs import TokenRows, as_tokens
from convexheads.operator import split_rows

BASELINES: dict[str, type[Baseline]] = {}
Tokens = Tensor | TokenRows
Settings = dict[str, Any]
CHUNK = 1024
"""Samples of which scores are computed at a time."""


def register(cls: type[Baseline]) -> type[Baseline]:
    """Make a baseline known by its ``name``; this also enrols it in the tests."""
    BASELINES[cls.name] = cls
    return cls


def make_baseline(name: str, random_state: int = 0, device: str | torch.device | None = None) -> Baseline:
    """The baseline registered under ``name``; raises InputError for an unknown one."""
    if not isinstance(name, str) or name not in BASELINES:
        raise InputError("baseline: " + describe(repr(name), "one of " + ", ".join(sorted(BASELINES))))
    return BASELINES[name](random_state, device)


class Baseline(ABC):
    """A classifier of tokens that chooses its own hyper-parameters.

    Parameters
    ----------
    random_state : seed of weights and mini-batches.
    device : None (CPU) or a torch device, for baselines that use one.

    Attributes
    ----------
    settings : the hyper-parameters chosen.
    validation : accuracy on the validation rows with them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """What a table calls it."""
    stages: ClassVar[tuple[dict[str, tuple], ...]]
    """Hyper-parameters with the values tried: all combinations of a stage, at the choices of the stages before; a later
    stage's hyper-parameters have their first value until it is reached."""

    def __init__(self, random_state: int = 0, device: str | torch.device | None = None) -> None:
        self.random_state, self.device = random_state, device
        self.settings: Settings = {}
        self.validation = -math.inf

    @abstractmethod
    def train(self, X: Tokens, labels: np.ndarray, rows: np.ndarray, settings: Settings) -> Any:
        """A model fitted to some rows."""

    @abstractmethod
    def evaluate(self, model: Any, X: Tokens, rows: np.ndarray) -> np.ndarray:
        """Scores (rows, c) by a fitted model; the largest is the prediction."""

    def fit(self, X: Any, labels: Any, train: np.ndarray, held: np.ndarray) -> Baseline:
        """Choose hyper-parameters by training on rows ``train`` and measuring on rows ``held``, then fit to all rows.

        Parameters
        ----------
        X : tokens (n, s, d), or (n, d) taken as one token.
        labels : (n,) integers from 0 to c - 1; every class occurs among the rows ``train``.
        train, held : row numbers, such as those of a validation split.

        Raises
        ------
        InputError
            For labels that are not such integers, or rows that are empty or overlap.
        """
        tokens = as_tokens(X)
        labels = _checked(labels, int(tokens.shape[0]), train, held)
        self.settings = {name: values[0] for stage in self.stages for name, values in stage.items()}
        tried: dict[tuple, float] = {}
        for stage in self.stages:
            for values in itertools.product(*stage.values()):
                settings = {**self.settings, **dict(zip(stage, values, strict=True))}
                key = tuple(settings.values())
                if key not in tried:
                    model = self.train(tokens, labels, train, settings)
                    found = self.evaluate(model, tokens, held).argmax(1)
                    tried[key] = float((found == labels[held]).mean())
            names = list(self.settings)
            # The first of equal ones: dictionaries keep their order.
            best = max(tried, key=lambda key: tried[key])
            self.settings, self.validation = dict(zip(names, best, strict=True)), tried[best]
        self.model = self.train(tokens, labels, np.arange(len(labels)), self.settings)
        return self

    def scores(self, X: Any) -> np.ndarray:
        """Scores (n, c) of tokens of the shape they were fitted on."""
        tokens = as_tokens(X)
        return self.evaluate(self.model, tokens, np.arange(int(tokens.shape[0])))


def _checked(labels: Any, n: int, train: np.ndarray, held: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        got = f"labels of shape {labels.shape} and type {labels.dtype}"
        raise InputError("labels: " + describe(got, f"({n},) integers from 0 to c - 1"))
    if not len(train) or not len(held) or len(np.intersect1d(train, held)):
        got = f"{len(train)} rows to train on and {len(held)} to choose by"
        raise InputError("train, held: " + describe(got, "row numbers in both, and none in common"))
    missing = np.setdiff1d(np.arange(labels.max() + 1), labels[train])
    if len(missing) or labels.max() < 1:
        got = f"class {missing[0]} without a sample" if len(missing) else "one class"
        raise InputError("labels: " + describe(got, "at least 2 classes, each among the rows to train on"))
    return labels


def take(X: Tokens, rows: np.ndarray) -> Tensor:
    """Rows of tokens (rows, s, d), read where they lie on disk."""
    return torch.as_tensor(X[torch.from_numpy(rows) if isinstance(X, Tensor) else rows])


# On the mean token ----------------------------------------------------------------------------------------


def mean_tokens(X: Tokens, rows: np.ndarray) -> np.ndarray:
    """Mean token of some samples, (rows, d) in float64."""
    parts = split_rows(len(rows), CHUNK)
    return memory.current().gathered(parts, lambda part: take(X, rows[part]).double().mean(1)).numpy()


@register
class LogisticRegression(Baseline):
    """scikit-learn's logistic regression on the standardised mean token: the linear probe."""

    name = "logistic_regression"
    title = "logistic regression"
    stages = ({"C": (0.01, 0.1, 1.0, 10.0)},)

    def train(self, X: Tokens, labels: np.ndarray, rows: np.ndarray, settings: Settings) -> Any:
        from sklearn import linear_model
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), linear_model.LogisticRegression(C=settings["C"], max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.fit(mean_tokens(X, rows), labels[rows])

    def evaluate(self, model: Any, X: Tokens, rows: np.ndarray) -> np.ndarray:
        found = model.decision_function(mean_tokens(X, rows))
        # Two classes: one column.
        return np.stack([-found, found], 1) if found.ndim == 1 else found


@register
class NearestNeighbors(Baseline):
    """scikit-learn's k nearest neighbours of the mean token by cosine, votes weighted by inverse distance."""

    name = "nearest_neighbors"
    title = "nearest neighbours"
    stages = ({"k": (20, 1, 5, 10, 50)},)

    def train(self, X: Tokens, labels: np.ndarray, rows: np.ndarray, settings: Settings) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        k = min(settings["k"], len(rows))
        model = KNeighborsClassifier(k, metric="cosine", weights="distance")
        return model.fit(mean_tokens(X, rows), labels[rows]), labels[rows]

    def evaluate(self, model: Any, X: Tokens, rows: np.ndarray) -> np.ndarray:
        from sklearn.metrics.pairwise import cosine_similarity

        classifier, labels = model
        mean = mean_tokens(X, rows)
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], classifier.classes_)
        found = []
        for part in np.array_split(mean, max(1, math.ceil(len(mean) / CHUNK))):
            similar = cosine_similarity(part, classifier._fit_X[order])
            # Classes without a vote are ranked by their nearest sample, or ties would count as hits among the top 5.
            nearest = np.maximum.reduceat(similar, starts, axis=1)
            found.append(classifier.predict_proba(part) + 1e-6 * nearest)
        return np.concatenate(found)


# Modules --------------------------------------------------------------------------------------------------


class TorchBaseline(Baseline):
    """A module trained by AdamW with decoupled weight decay, a cosine schedule and cross-entropy."""

    stages = (
        {"learning_rate": (1e-3, 3e-3, 1e-2), "weight_decay": (1e-2, 0.3)},
        {"epochs": (10, 30)},
    )
    batch_size: ClassVar[int] = 256

    @abstractmethod
    def build(self, features: int, classes: int) -> nn.Module:
        """The untrained module: standardised tokens (n, s, d) -> logits (n, c)."""

    def train(self, X: Tokens, labels: np.ndarray, rows: np.ndarray, settings: Settings) -> nn.Module:
        device = torch.device("cpu" if self.device is None else self.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.random_state)
            body = self.build(int(X.shape[2]), int(labels.max()) + 1)
        module = nn.Sequential(Standardize(*moments(X, rows)), body).to(device).train()
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        steps = settings["epochs"] * math.ceil(len(rows) / self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        shuffle = np.random.default_rng(self.random_state)
        for _ in range(settings["epochs"]):
            order = shuffle.permutation(rows)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                logits = module(take(X, batch).to(device, torch.float32))
                loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch]).long().to(device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        return module.eval()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, X: Tokens, rows: np.ndarray) -> np.ndarray:
        device = next(model.parameters()).device

        def outputs(part: slice) -> Tensor:
            return model(take(X, rows[part]).to(device, torch.float32)).double().cpu()

        return memory.current().gathered(split_rows(len(rows), CHUNK), outputs).numpy()


def moments(X: Tokens, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d,) of the features over samples and tokens."""
    total, squares, count = torch.zeros(X.shape[2]).double(), torch.zeros(X.shape[2]).double(), 0
    for i in range(0, len(rows), CHUNK):
        part = take(X, rows[i : i + CHUNK]).double().flatten(0, 1)
        total, squares, count = total + part.sum(0), squares + part.square().sum(0), count + len(part)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0.0).sqrt()


class Standardize(nn.Module):
    """Every feature to mean 0 and deviation 1; constant ones are only centred."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean.float())
        constant = deviation <= 1e-6 * mean.abs().clamp_min(1e-30)
        self.register_buffer("scale", torch.where(constant, 1.0, 1.0 / deviation).float())

    def forward(self, X: Tensor) -> Tensor:
        return (X - self.mean) * self.scale


@register
class MLPProbe(TorchBaseline):
    """One hidden layer of 256 GELU units on the mean token."""

    name = "mlp_gelu"
    title = "MLP with GELU"
    width: ClassVar[int] = 256

    def build(self, features: int, classes: int) -> nn.Module:
        return nn.Sequential(MeanToken(), nn.Linear(features, self.width), nn.GELU(), nn.Linear(self.width, classes))


class MeanToken(nn.Module):
    """(n, s, d) -> (n, d)."""

    def forward(self, X: Tensor) -> Tensor:
        return X.mean(1)


@register
class AttentiveProbe(TorchBaseline):
    """One learned query that attends over the tokens, then a linear classifier (Bardes et al. 2024, V-JEPA)."""

    name = "attentive_probe"
    title = "attentive probe"
    width: ClassVar[int] = 64
    heads: ClassVar[int] = 4

    def build(self, features: int, classes: int) -> nn.Module:
        return CrossAttention(features, classes, self.width, self.heads)


class CrossAttention(nn.Module):
    """Softmax cross-attention from one learned query, layer norm, linear classifier."""

    def __init__(self, features: int, classes: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, kdim=features, vdim=features, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, X: Tensor) -> Tensor:
        pooled = self.attention(self.query.expand(len(X), -1, -1), X, X, need_weights=False)[0][:, 0]
        return self.classifier(self.norm(pooled))


@register
class SoftmaxAttention(TorchBaseline):
    """Multi-head softmax self-attention over the tokens, mean over tokens, linear classifier (Vaswani et al. 2017)."""

    name = "softmax_attention"
    title = "softmax attention"
    width: ClassVar[int] = 64
    heads: ClassVar[int] = 4

    def build(self, features: int, classes: int) -> nn.Module:
        return SelfAttention(features, classes, self.width, self.heads)


class SelfAttention(nn.Module):
    """Embedding, softmax self-attention with a residual connection, layer norm, mean token, linear classifier."""

    def __init__(self, features: int, classes: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, X: Tensor) -> Tensor:
        E = self.embedding(X)
        mixed = E + self.attention(E, E, E, need_weights=False)[0]
        return self.classifier(self.norm(mixed).mean(1))
