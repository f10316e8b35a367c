"""The cells of a central hyperplane arrangement: all ReLU patterns that a weight can have on given rows.

A row a of a matrix stands for the hyperplane {u : a^T u = 0}; a cell is a maximal open cone that no hyperplane meets,
and on it the signs of all rows are constant. By deletion and restriction: the hyperplane number k cuts exactly those
cells of the first k - 1 into two whose trace on it is a cell of the restricted arrangement, which has one dimension
less. No linear program is needed, and every cell comes with a point inside it.

Numbers of cells: Cover, Geometrical and statistical properties of systems of linear inequalities, 1965; Zaslavsky,
Facing up to arrangements, 1975.
"""

from __future__ import annotations

from math import comb

import numpy as np
from scipy.spatial.distance import cdist

from convexheads.errors import InputError, describe

ZERO = 1e-12
"""Rows shorter than this share of the longest one are zero: nothing depends on their sign."""
PARALLEL = 1e-9
"""Unit normals nearer than this are one hyperplane: a cell between two of them would be all rounding."""
MOST_CELLS = 5000
"""Default of the most cells that are enumerated."""
MOST_ROWS = 4000
"""Most hyperplanes that are compared with each other."""

Array = np.ndarray


def cover_bound(n_rows: int, rank: int) -> int:
    """2 sum_{k < rank} C(n_rows - 1, k): most cells of n_rows hyperplanes through the origin in rank dimensions.

    Attained in general position, that is, where any ``rank`` rows are independent.
    """
    if n_rows < 1 or rank < 1:
        return 1
    return 2 * sum(comb(n_rows - 1, k) for k in range(rank))


def unit_rows(H: Array) -> Array:
    """The rows of H (N, p) that are not zero, as unit vectors."""
    norms = np.linalg.norm(H, axis=1)
    kept = norms > ZERO * norms.max(initial=0.0)
    return H[kept] / norms[kept, None]


def distinct_rows(A: Array, *, either_sign: bool) -> Array:
    """Indices of the first of every set of equal unit vectors; with ``either_sign`` of parallel ones."""
    if not len(A):
        return np.zeros(0, dtype=np.int64)
    same = cdist(A, A) < PARALLEL
    if either_sign:
        same |= cdist(A, -A) < PARALLEL
    return np.flatnonzero(same.argmax(1) == np.arange(len(A)))


def enumerate_cells(H: Array, most: int = MOST_CELLS) -> Array:
    """One interior point of every cell of the arrangement of rows H (N, p): (cells, p).

    Zero rows are left out, parallel ones count once. The points are not centred: see
    :func:`convexheads.relu.cones.interior_direction`.

    Raises
    ------
    InputError
        For more than ``most`` cells, or more than ``MOST_ROWS`` distinct rows.
    """
    A = unit_rows(np.asarray(H, dtype=np.float64))
    if len(A) > MOST_ROWS:
        raise _too_many(f"{len(A)} pre-activations that are not zero", f"at most {MOST_ROWS}")
    A = A[distinct_rows(A, either_sign=True)]
    if not len(A):
        return np.eye(1, H.shape[1])
    _, sigma, Vt = np.linalg.svd(A, full_matrices=False)
    basis = Vt[sigma > 1e-10 * sigma[0]]
    _, points = _cells(A @ basis.T, most)
    return points @ basis


def _too_many(got: str, expected: str) -> InputError:
    fix = "Give a number of gates: patterns are then sampled, and no lower bound for the ReLU network follows."
    return InputError("gates: " + describe(f"{got} for gates='all'", expected, fix))


def _cells(A: Array, most: int) -> tuple[Array, Array]:
    """Signs (cells, N), True for positive, and interior points (cells, r), of distinct unit rows A (N, r)."""
    r = A.shape[1]
    signs, points = np.zeros((1, 0), dtype=bool), np.zeros((1, r))
    for k, normal in enumerate(A):
        traces = _traces(A[:k], normal, most)
        # A cell's key is its sign vector; those with a trace on the new hyperplane are cut by it.
        cut = {key.tobytes(): point for key, point in zip(traces @ A[:k].T > 0, traces, strict=True)}
        whole = np.array([key.tobytes() not in cut for key in signs], dtype=bool)
        on = np.stack([cut[key.tobytes()] for key in signs[~whole]]) if not whole.all() else traces[:0]
        step = _clearance(A[:k], on, normal)[:, None] * normal
        keys = [np.column_stack([signs[whole], points[whole] @ normal > 0])]
        keys += [np.column_stack([signs[~whole], np.full(len(on), side)]) for side in (True, False)]
        signs = np.concatenate(keys)
        points = np.concatenate([points[whole], on + step, on - step])
        if len(signs) > most:
            raise _too_many(f"more than {most} patterns", f"at most {most}")
    return signs, points


def _traces(A: Array, normal: Array, most: int) -> Array:
    """Interior points (cells, r) of the cells that rows A have on the hyperplane of ``normal``."""
    if len(normal) == 1:
        return np.zeros((1, 1))
    # An orthonormal basis of the hyperplane: the last columns of a complete QR factor.
    basis = np.linalg.qr(normal[:, None], mode="complete")[0][:, 1:]
    restricted = A @ basis
    restricted = restricted / np.linalg.norm(restricted, axis=1, keepdims=True)
    _, points = _cells(restricted[distinct_rows(restricted, either_sign=True)], most)
    return points @ basis.T


def _clearance(A: Array, points: Array, normal: Array) -> Array:
    """Half the way that every point can go along ``normal`` before it meets a hyperplane of A; 1 if there is none."""
    if not len(A) or not len(points):
        return np.ones(len(points))
    speed = np.abs(A @ normal)
    with np.errstate(divide="ignore"):
        ways = np.abs(points @ A.T) / speed
    return 0.5 * np.minimum(ways.min(1), 2.0)
