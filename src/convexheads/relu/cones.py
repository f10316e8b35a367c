"""Cones of weights that share a ReLU pattern, and the decomposition of any weight into two members of one.

With pre-activations H u (N rows) and a pattern of signs s in {-1, 1}^N, the cone is K = {u : R u >= 0}, R = diag(s) H.
Where K has an interior every u is u+ - u- with u+ and u- in K, so that a gated unit becomes two ReLU units with the
same outputs (Mishkin, Sahiner and Pilanci, Fast convex optimization for two-layer ReLU networks, ICML 2022).

The cheapest pair has the least ||u+|| + ||u-||, which is what its two units cost beside the same ||v||. With
u- = u+ - u this is convex in u+, subject to R u+ >= max(0, R u). It is solved by reweighting: the minimum of
||u+||^2 / a + ||u-||^2 / b, with a and b the norms of the pair before, is the point of this polyhedron next to a share
a / (a + b) of u. That is a least-distance problem, solved by non-negative least squares (Lawson and Hanson, Solving
least squares problems, 1974, chapter 23), and no step raises the cost.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from convexheads.relu.arrangement import Array, distinct_rows, unit_rows

MOST_ENTRIES = 200_000
"""Entries of R up to which cones are treated as a matrix; above it only the closed form is used."""


def cone_rows(H: Array, gate: Array) -> Array:
    """R (rows, p): the distinct unit normals of the cone of ``gate`` (p,), which lies in it. Rows H (N, p).

    A pre-activation of exactly zero counts as positive, as in masks.
    """
    A = unit_rows(H)
    R = np.where(A @ gate >= 0, 1.0, -1.0)[:, None] * A
    return R[distinct_rows(R, either_sign=False)]


def least_distance(R: Array, b: Array) -> Array | None:
    """The shortest z with R z >= b, or None where there is none: R (N, p), b (N,)."""
    if not len(R) or b.max(initial=0.0) <= 0:
        return np.zeros(R.shape[1])
    target = np.zeros(R.shape[1] + 1)
    target[-1] = 1.0
    matrix = np.vstack([R.T, b])
    try:
        dual, _ = nnls(matrix, target)
    except RuntimeError:  # its limit of iterations
        return None
    residual = matrix @ dual - target
    # The residual of an infeasible problem vanishes.
    if not np.linalg.norm(residual) > 1e-10:
        return None
    return -residual[:-1] / residual[-1]


def interior_direction(R: Array) -> Array | None:
    """The unit vector in the cone {u : R u >= 0} that is farthest from its faces, or None where there is no interior.

    R (N, p) has unit rows. None is also returned for cones so thin that no margin above 1e-9 was found.
    """
    if not len(R):
        return np.eye(1, R.shape[1])[0]
    found = least_distance(R, np.ones(len(R)))
    if found is None:
        return None
    direction = found / np.linalg.norm(found)
    return direction if (R @ direction).min() > 1e-9 else None


def facets(R: Array) -> Array:
    """The rows of R (N, p) that are needed: {u : R u >= 0} is the same without the others.

    By Farkas' lemma a row is redundant exactly if it is a non-negative combination of the others.
    """
    kept = list(range(len(R)))
    for row in range(len(R)):
        others = [k for k in kept if k != row]
        if others and nnls(R[others].T, R[row])[1] < 1e-9:
            kept = others
    return R[kept]


def decompose(R: Array, u: Array, interior: Array, rounds: int = 20) -> tuple[Array, Array]:
    """u+ and u- (p,) in the cone {w : R w >= 0} with u = u+ - u-, at least cost ||u+|| + ||u-||.

    ``interior`` is a direction inside the cone; it makes up for rounding, and is the way out where a least-distance
    problem is not solved. ``rounds`` reweightings at most, fewer where the cost falls by less than 1e-6 of itself.
    """
    if not len(R) or not u.any():
        return u, np.zeros_like(u)
    # Either of the two may be zero: the reweighting would only come near to it.
    pairs = [_nearest_pair(R, u, interior, share) for share in (1.0, 0.0, 0.5)]
    best = min(pairs, key=_cost)
    pair = pairs[-1]
    for _ in range(rounds):
        plus, minus = (float(np.linalg.norm(part)) for part in pair)
        pair, before = _nearest_pair(R, u, interior, plus / (plus + minus)), pair
        best = min(best, pair, key=_cost)
        if _cost(before) - _cost(pair) < 1e-6 * _cost(before):
            break
    return best


def _cost(pair: tuple[Array, Array]) -> float:
    return float(np.linalg.norm(pair[0]) + np.linalg.norm(pair[1]))


def _nearest_pair(R: Array, u: Array, interior: Array, share: float) -> tuple[Array, Array]:
    """The pair whose u+ is next to ``share`` times u."""
    size = np.linalg.norm(u)
    needed = (np.maximum(R @ u, 0.0) - share * (R @ u)) / size
    z = least_distance(R, needed)
    z = np.zeros_like(u) if z is None else z
    z = z + max(0.0, float(((needed - R @ z) / (R @ interior)).max())) * interior
    return share * u + size * z, (share - 1.0) * u + size * z


def closed_form(ratios: Array, u: Array, interior: Array) -> tuple[Array, Array]:
    """The same with u+ = u + t h, u- = t h or u+ = t h, u- = t h - u, whichever is shorter, each with its smallest t.

    ``ratios`` = (least, largest) of (R u) / (R h) over the rows, with h = ``interior``: u + t h is in the cone for
    t >= -least, and t h - u for t >= largest.
    """
    least, largest = ratios
    plus, minus = max(0.0, -float(least)), max(0.0, float(largest))
    pairs = [(u + plus * interior, plus * interior), (minus * interior, minus * interior - u)]
    return min(pairs, key=_cost)
