"""``mx.block_masked_mm``: a dense weight and a mask of its blocks of 32 or 64."""

from __future__ import annotations

import mlx.core as mx

from benchmarks.peers import Task, on_mlx
from benchmarks.workloads import Arrays, Layer, Workload

RUNTIME = on_mlx
PACKAGES = on_mlx.PACKAGES


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task of a layer of its block sizes; on the CPU it takes float32 alone."""
    if not isinstance(w, Layer) or w.block_size not in (32, 64):
        return None
    if w.dtype != "float32" and mx.default_device().type == mx.cpu:
        return None
    mask = mx.array(arrays["mask"].T.copy())

    def hold(weight):
        return lambda x: mx.block_masked_mm(x, weight.T, w.block_size, mask_rhs=mask)

    stored = lambda gradient: gradient[arrays["weight"] != 0]  # noqa: E731
    return on_mlx.layer(w, arrays, hold, arrays["weight"], stored)
