"""Settings shared by all tests: the number of threads, and property tests without deadlines."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# torch reads OMP_NUM_THREADS only at import, and not on every platform; a test run that was told to use one
# thread must use one.
if os.environ.get("OMP_NUM_THREADS", "").isdigit():
    torch.set_num_threads(max(1, int(os.environ["OMP_NUM_THREADS"])))

# Shared machines stall: a deadline on one example would fail tests that are right.
settings.register_profile(
    "convexheads",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("convexheads")
