"""mlx_sparse_nn where it finds no kernels: its products in plain MLX, as without a compiler."""

from __future__ import annotations

from benchmarks.peers import Task, ours
from benchmarks.peers.ours import PACKAGES, RUNTIME, describe
from benchmarks.workloads import Array, Arrays, Call, Ising, Layer, Workload
from mlx_sparse_nn.core.backends import choose, plain

__all__ = ["PACKAGES", "RUNTIME", "describe", "prepare"]

MAX_FEATURES = 2048  # beyond, it takes minutes

choose.CPU = (plain,)


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task of products, but of large layers."""
    if isinstance(w, Call | Array | Ising) or (isinstance(w, Layer) and w.features <= MAX_FEATURES):
        return ours.prepare(w, arrays)
    return None
