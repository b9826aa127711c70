"""``mlx.nn.Linear``: what a dense layer takes, whatever the density."""

from __future__ import annotations

import mlx.nn as nn

from benchmarks.peers import Task, mlx_common
from benchmarks.peers.mlx_common import active_memory, peak_memory, ready, reset_peak, start
from benchmarks.workloads import Arrays, Layer, Workload

PACKAGES = ("mlx", "mlx-cpu", "numpy")
__all__ = ["PACKAGES", "active_memory", "peak_memory", "prepare", "ready", "reset_peak", "start"]


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task of a layer."""
    if not isinstance(w, Layer):
        return None
    module = nn.Linear(w.features, w.features, bias=False)

    def apply(weight, x):
        module.weight = weight
        return module(x)

    # Its gradient has all places.
    stored = lambda gradient: gradient[arrays["weight"] != 0]  # noqa: E731
    return mlx_common.layer(w, arrays, apply, arrays["weight"], stored)
