"""``mlx.nn.Linear``: what a dense layer takes, whatever the density."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from benchmarks.peers import Task, on_mlx
from benchmarks.workloads import Arrays, Call, Layer, Workload

RUNTIME = on_mlx
PACKAGES = on_mlx.PACKAGES


def describe() -> dict[str, str]:
    """Name the BLAS."""
    return {"blas": on_mlx.blas()} if mx.default_device().type == mx.cpu else {}


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task of a layer."""
    if isinstance(w, Call):
        if not isinstance(w.operands, Layer):
            return None
        return on_mlx.calls(nn.Linear(w.operands.features, w.operands.features), arrays)
    if not isinstance(w, Layer):
        return None
    module = nn.Linear(w.features, w.features, bias=False)

    def hold(weight):
        module.weight = weight
        return module

    # Its gradient has all places.
    stored = lambda gradient: gradient[arrays["weight"] != 0]  # noqa: E731
    return on_mlx.layer(w, arrays, hold, arrays["weight"], stored)
