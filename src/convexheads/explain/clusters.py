"""Tokens grouped by the classifier that the head applies to them: its implicit clustering.

Two tokens belong together when their effective classifiers Phi_p point the same way (cosine distance). Tokens whose
gate rows agree have the same classifier and always share a cluster. With linear activation all tokens of an image
share one classifier; clusters over several images remain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from convexheads.errors import InputError, describe
from convexheads.explain.classifiers import effective_classifiers
from convexheads.explain.fitted import Fitted

SAME = 1e-12
"""Cosine distances up to this are rounding: the vectors are taken as one."""
PAIRS = 2000
"""Most vectors of which all pairs are compared; silhouettes of more are taken on a sample of that many."""


@dataclass(frozen=True)
class TokenClusters:
    """A clustering of tokens.

    Attributes
    ----------
    labels : integers from 0, the largest cluster first; (s,) for one sample, (n, s) for several.
    sizes : number of tokens of each cluster.
    silhouette : mean silhouette coefficient under cosine distance, in [-1, 1]; None with a single cluster or with
        every token in its own.
    distinct : number of distinct directions among the classifiers, an upper limit of the number of clusters.
    method : ``agglomerative`` or ``kmeans``.
    """

    labels: np.ndarray
    sizes: list[int]
    silhouette: float | None
    distinct: int
    method: str

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return len(self.sizes)


def cluster_tokens(
    estimator: Any,
    X: Any,
    n_clusters: int | None = None,
    *,
    branch: int | None = None,
    max_clusters: int = 8,
    method: str = "kmeans",
    random_state: int = 0,
) -> TokenClusters:
    """Cluster the tokens of one sample, or of several together, by their effective classifiers.

    Parameters
    ----------
    estimator : fitted estimator with self_attention, mlp or linear heads, or a pipeline that ends in one.
    X : tokens (s, d) of one sample, or (n, s, d) of several, as for ``predict``.
    n_clusters : number of clusters; None: the one from 2 to ``max_clusters`` with the largest silhouette coefficient.
    branch : which head of a sum of heads; see :func:`~convexheads.explain.classifiers.token_classifiers`.
    max_clusters, method, random_state : see :func:`cluster_directions`.

    Raises
    ------
    InputError
        For heads whose tokens have no classifier, tokens that do not fit, or more clusters than there are distinct
        classifiers.
    """
    phi = effective_classifiers(estimator, X, branch)
    n, s = phi.shape[:2]
    found = cluster_directions(
        phi.reshape(n * s, -1),
        n_clusters,
        max_clusters=max_clusters,
        method=method,
        random_state=random_state,
    )
    labels = found.labels if getattr(X, "ndim", None) == 2 else found.labels.reshape(n, s)
    return TokenClusters(labels, found.sizes, found.silhouette, found.distinct, found.method)


def cluster_directions(
    vectors: ArrayLike,
    n_clusters: int | None = None,
    *,
    max_clusters: int = 8,
    method: str = "kmeans",
    random_state: int = 0,
) -> TokenClusters:
    """Cluster vectors (N, k) by cosine distance 1 - cos; vectors of zeros are at distance 1 of all others.

    Parameters
    ----------
    n_clusters : number of clusters, at most the number of distinct directions; None: by silhouette, or a single
        cluster where there is only one direction.
    max_clusters : largest number tried where ``n_clusters`` is None.
    method : ``kmeans`` on vectors of length one, whose clusters are of comparable size; or ``agglomerative`` with
        average linkage, which parts single outliers first and holds all N^2 distances in memory.
    random_state : seed of k-means.

    Raises
    ------
    InputError
        For vectors that are no finite matrix, or options that cannot be used.
    """
    V = np.asarray(vectors, dtype=np.float64)
    if V.ndim != 2 or not V.size or not np.isfinite(V).all():
        raise InputError("vectors: " + describe(f"shape {V.shape}", "a matrix (N, k) of finite numbers, not empty"))
    if method not in ("kmeans", "agglomerative"):
        raise InputError("method: " + describe(repr(method), "'kmeans' or 'agglomerative'"))
    for name, value in (("n_clusters", n_clusters), ("max_clusters", max_clusters)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
        if not whole and not (name == "n_clusters" and value is None):
            raise InputError(f"{name}: " + describe(repr(value), "a number >= 1"))
    norms = np.linalg.norm(V, axis=1, keepdims=True)
    V = np.divide(V, norms, out=np.zeros_like(V), where=norms > 0)
    first = _directions(V)
    distinct = int(first.max()) + 1
    if n_clusters is not None and n_clusters > distinct:
        raise InputError(
            "n_clusters: "
            + describe(
                n_clusters,
                f"at most {distinct}, the number of distinct classifiers",
                "Linear activation gives all tokens of a sample the same one; more gates give more.",
            )
        )
    split = _hierarchy(V, first) if method == "agglomerative" else _spheres(V, random_state)
    if n_clusters is not None:
        labels = split(int(n_clusters))
        return _clusters(labels, _silhouette(V, labels, random_state), distinct, method)
    best: tuple[float, np.ndarray] | None = None
    for count in range(2, min(max_clusters, distinct, len(V) - 1) + 1):
        labels = split(count)
        score = _silhouette(V, labels, random_state)
        if score is not None and (best is None or score > best[0] + 1e-12):
            best = (score, labels)
    if best is None:
        return _clusters(np.zeros(len(V), dtype=np.int64), None, distinct, method)
    return _clusters(best[1], best[0], distinct, method)


def _directions(V: np.ndarray) -> np.ndarray:
    """Number of the direction of each row of unit length, from 0; rows within ``SAME`` of each other share one."""
    rows, inverse = np.unique(V, axis=0, return_inverse=True)
    number = np.arange(len(rows))
    if len(rows) <= PAIRS:
        near = 1.0 - rows @ rows.T <= SAME
        np.fill_diagonal(near, True)  # a row of zeros
        number = np.unique(near.argmax(1), return_inverse=True)[1]
    return number[inverse.reshape(-1)]


def _hierarchy(V: np.ndarray, direction: np.ndarray) -> Any:
    """count -> labels, by average linkage on cosine distances."""
    if len(V) == 1:
        return lambda count: np.zeros(1, dtype=np.int64)
    distances = np.clip(1.0 - V @ V.T, 0.0, 2.0)
    # Rounding must not part tokens that have the same classifier.
    distances[direction[:, None] == direction[None, :]] = 0.0
    tree = linkage(squareform(0.5 * (distances + distances.T), checks=False), "average")
    return lambda count: fcluster(tree, count, "maxclust").astype(np.int64) - 1


def _spheres(V: np.ndarray, random_state: int) -> Any:
    """count -> labels, by k-means on the sphere."""
    return lambda count: KMeans(count, n_init=10, random_state=random_state).fit_predict(V).astype(np.int64)


def _silhouette(V: np.ndarray, labels: np.ndarray, random_state: int) -> float | None:
    if not 1 < len(np.unique(labels)) < len(V):
        return None
    if len(V) > PAIRS:
        chosen = np.random.default_rng(random_state).permutation(len(V))[:PAIRS]
        V, labels = V[chosen], labels[chosen]
        if not 1 < len(np.unique(labels)) < len(V):
            return None
    distances = np.clip(1.0 - V @ V.T, 0.0, 2.0)
    np.fill_diagonal(distances, 0.0)
    return float(silhouette_score(distances, labels, metric="precomputed"))


def _clusters(labels: np.ndarray, silhouette: float | None, distinct: int, method: str) -> TokenClusters:
    """With clusters numbered by size, those of equal size in the order in which tokens show them."""
    values, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    number = np.empty(len(values), dtype=np.int64)
    number[order] = np.arange(len(values))
    relabelled = number[np.searchsorted(values, labels)]
    return TokenClusters(relabelled, counts[order].tolist(), silhouette, distinct, method)


@dataclass(frozen=True)
class PlantedClusters:
    """Samples whose tokens come in known clusters, each with a linear classifier of its own.

    Attributes
    ----------
    X : (n, s, d) tokens: ``n_clusters`` features near the centre of the cluster, ``content`` features that are
        standard normal, one nuisance feature, a constant 1.
    y : (n,) classes.
    clusters : (n, s) the cluster of each token.
    classifiers : (n_clusters, content, n_classes): y is the class with the largest sum over tokens of the content
        times the classifier of the token's cluster.
    """

    X: np.ndarray
    y: np.ndarray
    clusters: np.ndarray
    classifiers: np.ndarray


def planted_clusters(
    n_samples: int = 400,
    n_tokens: int = 12,
    n_clusters: int = 2,
    n_classes: int = 3,
    *,
    content: int = 2,
    separation: float = 1.0,
    nuisance: float = 2.0,
    noise: float = 0.2,
    random_state: int = 0,
    draw: int = 0,
) -> PlantedClusters:
    """Data on which a head has to find clusters of tokens that are not the ones that stand out.

    The label depends on which cluster a token belongs to; most of the variance between tokens is in a nuisance
    feature, which takes the values +-``nuisance`` whatever the cluster: k-means on the tokens splits them by it.

    Parameters
    ----------
    n_samples, n_tokens, n_clusters, n_classes : n, s, number of clusters, c.
    content : number of features that the classifiers read.
    separation : distance of the cluster centres from their mean.
    nuisance : size of the nuisance feature.
    noise : standard deviation around centres and around the values of the nuisance.
    random_state : seed of the classifiers.
    draw : seed of the samples: same ``random_state`` and another ``draw`` gives a test set.

    Raises
    ------
    InputError
        For fewer than two clusters or classes, or a size below 1.
    """
    sizes = {"n_samples": n_samples, "n_tokens": n_tokens, "content": content}
    for name, value, least in [(k, v, 1) for k, v in sizes.items()] + [
        ("n_clusters", n_clusters, 2),
        ("n_classes", n_classes, 2),
    ]:
        if value < least:
            raise InputError(f"{name}: " + describe(value, f"at least {least}"))
    classifiers = np.random.default_rng(random_state).standard_normal((n_clusters, content, n_classes))
    # Nothing can be read without the clusters: the classifiers cancel in the mean over clusters.
    classifiers -= classifiers.mean(0)
    rng = np.random.default_rng([random_state, draw])
    clusters = rng.integers(0, n_clusters, (n_samples, n_tokens))
    centres = (np.eye(n_clusters) - 1.0 / n_clusters) * separation * (n_clusters / (n_clusters - 1)) ** 0.5
    latent = centres[clusters] + noise * rng.standard_normal((n_samples, n_tokens, n_clusters))
    read = rng.standard_normal((n_samples, n_tokens, content))
    lure = nuisance * rng.choice([-1.0, 1.0], (n_samples, n_tokens, 1))
    lure += noise * rng.standard_normal(lure.shape)
    y = np.einsum("nsa,nsac->nc", read, classifiers[clusters]).argmax(1)
    X = np.concatenate([latent, read, lure, np.ones((n_samples, n_tokens, 1))], 2)
    return PlantedClusters(X, y, clusters, classifiers)


@dataclass(frozen=True)
class Recovery:
    """Agreement with known clusters as adjusted Rand index: 1 for the same clusters, about 0 for chance.

    ``classifiers`` is that of k-means on effective classifiers scaled to length one, ``tokens`` that of k-means on
    the tokens that the head reads.
    """

    classifiers: float
    tokens: float


def cluster_recovery(
    estimator: Any,
    X: Any,
    clusters: ArrayLike,
    *,
    branch: int | None = None,
    random_state: int = 0,
) -> Recovery:
    """How well clustering tokens by their classifiers finds known clusters, and how well k-means on tokens does.

    Parameters
    ----------
    X : tokens (n, s, d), clustered together into as many clusters as ``clusters`` has.
    clusters : (n, s) the known cluster of each token.
    branch, random_state : as for :func:`cluster_tokens`.

    Raises
    ------
    InputError
        As :func:`cluster_tokens`, and for ``clusters`` of another shape.
    """
    truth = np.asarray(clusters)
    fitted = Fitted(estimator)
    rows = fitted.tokens(X)
    if truth.shape != tuple(rows.shape[:2]):
        raise InputError("clusters: " + describe(f"shape {truth.shape}", f"{tuple(rows.shape[:2])}, one a token"))
    count = len(np.unique(truth))
    own = cluster_tokens(estimator, X, count, branch=branch, random_state=random_state)
    index = 0 if branch is None else fitted.check_branch(branch)
    tokens = np.concatenate([part.numpy() for part in fitted.view(rows, index)])
    raw = KMeans(count, n_init=10, random_state=random_state).fit_predict(tokens.reshape(-1, tokens.shape[-1]))
    flat = truth.reshape(-1)
    return Recovery(float(adjusted_rand_score(flat, own.labels.reshape(-1))), float(adjusted_rand_score(flat, raw)))
