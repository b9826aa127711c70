"""The one rule: which backend computes a product."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx

from mlx_sparse_nn.core.backends import cpu, cuda, dense, metal, plain
from mlx_sparse_nn.core.layout import Layout

# By kind of device, the first one that is available and takes a product computes it.
GPU = (dense, metal, cuda, plain)
CPU = (dense, cpu, plain)


def choose(
    op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int = 1, bits: int = 0
) -> ModuleType:
    """Return the backend that computes a product on MLX's default device.

    It is asked anew at each call, and depends on nothing but its arguments, that device, and
    whether MLX is tracing a function that may not hold a kernel: ``mx.vmap``, which cannot map a
    launched one, or ``mx.export_function``, whose file cannot hold those of a CPU.

    Args:
        op: ``"spmm"``, ``"spmm_t"``, ``"sddmm"``, ``"qspmm"`` or ``"qspmm_t"``.
        layout: Layout of the pattern.
        n_x: Rows of x, for each matrix.
        dtype: Of all operands.
        n_matrices: Matrices that share the pattern.
        bits: Of the integers of quantized blocks.
    """
    on_gpu = mx.default_device().type is mx.gpu  # "==" of these enums takes longer
    for backend in GPU if on_gpu else CPU:
        if backend.is_available() and backend.takes(op, layout, n_x, dtype, n_matrices, bits):
            return backend
    raise AssertionError("plain MLX takes every product")
