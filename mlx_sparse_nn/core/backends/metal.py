"""The three products as Metal kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core.backends import launch
from mlx_sparse_nn.core.backends.launch import (
    GROUP,
    TILED,
    lanes_per_row,
    launch_sddmm,
    launch_spmm,
    longest_row,
    power_of_two,
    prepare,
)
from mlx_sparse_nn.core.layout import Half, Layout

NAME = "metal"
_FEW = 8  # rows of x up to which a product is bound by reading the stored values


def is_available() -> bool:
    """Return whether MLX has a Metal GPU."""
    return mx.metal.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int) -> bool:
    """Return whether there is a kernel for a product."""
    return launch.takes(layout, n_x, dtype, n_matrices)


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    return _product(data, layout.rows, x, layout.shape[0], bias, transposed=False)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    return _product(data, layout.cols, y, layout.shape[1], None, transposed=True)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    n, n_batch = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block, half = layout.block_size, layout.rows
    if block in TILED:
        side = min(block, 64)
        width = half["indices"].size * (block // side) ** 2
        threads = 32 if side == 8 else 128
        name, template = "sddmm_tiles", {"B": block, "SIDE": side}
    else:
        lanes = min(32, lanes_per_row(half, block))
        width = -(-layout.shape[0] * lanes // GROUP)
        threads = GROUP
        name, template = "sddmm_csr", {"B": block, "LANES": lanes}
    # Few groups and many rows: split the rows, so that the whole GPU has work, and sum in order.
    splits = max(1, min(256 // (width * n_batch), n // 256))
    return launch_sddmm(NAME, name, template, y, x, layout, width * threads, threads, splits)


def _product(
    data: mx.array, half: Half, x: mx.array, n_out: int, bias: mx.array | None, transposed: bool
) -> mx.array:
    n, n_batch = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block = data.shape[-1] if data.ndim > 2 else 1
    template = {
        "T": x.dtype,
        "B": block,
        "TRANSPOSED": int(transposed),
        "BIAS": int(bias is not None),
    }
    if block not in TILED:
        rows = 1 if n == 1 else 4
        lanes = lanes_per_row(half, block)
        name, threads = "spmm_csr", GROUP
        template |= {"ROWS": rows, "LANES": lanes}
        groups = -(-n_out * lanes // GROUP)
    elif n <= _FEW:
        rows = 1 << (n - 1).bit_length()
        simdgroups = _simdgroups(half)
        name, threads = "spmm_few", 32 * simdgroups
        template |= {"ROWS": rows, "GROUPS": simdgroups}
        groups = n_out // min(block, 16)
    else:
        rows = 16 if n <= 16 else 32 if n <= 32 or block == 128 else 64
        name, threads = "spmm_tiles", 64 if block == 8 else 128
        template |= {"ROWS": rows}
        groups = n_out // block
    grid = (groups * threads, -(-n // rows), n_batch)
    prepared = prepare(NAME, name, "spmm", template, x.dtype, grid, threads)
    return launch_spmm(prepared, data, half, x, n_out, bias, transposed)


def _simdgroups(half: Half) -> int:
    """Simdgroups that share a block-row: one for every four blocks of the longest, 8 at most."""
    return min(8, power_of_two(-(-longest_row(half) // 4)))
