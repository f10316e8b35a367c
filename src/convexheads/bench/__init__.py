"""Benchmarks: other programs and this library on the same problems, in one run, on the same threads.

One file a benchmark, each with a function ``run(settings)`` that returns a :class:`~convexheads.bench.common.Result`.
What a method reached is computed again by :mod:`convexheads.bench.independent`, in numpy and from the definition.
"""

from __future__ import annotations

BENCHMARKS: dict[str, str] = {
    "conic": "convexheads.bench.conic",
    "gated-mlp": "convexheads.bench.gated_mlp",
    "logistic": "convexheads.bench.logistic",
    "networks": "convexheads.bench.networks",
    "scaling": "convexheads.bench.scaling",
}
"""Name -> module with ``run(settings)`` and ``PACKAGES``, the optional packages that it needs."""
