"""The three products as Metal kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import few_rows, launch, scalars
from mlx_sparse_nn.core.backends.launch import (
    Kernel,
    lanes_per_row,
    launch_sddmm,
    launch_spmm,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Layout, Side

NAME = "metal"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops


def is_available() -> bool:
    """Return whether MLX has a Metal GPU."""
    return mx.metal.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product: for all that kernels can do."""
    return launch.takes(layout, n_x, dtype, n_matrices, bits)


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    return _product(data, layout.rows, x, layout.full_shape[0], layout.inside[1], bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    return _product(data, layout.cols, y, layout.full_shape[1], layout.inside[0], None)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    kernel = _sampling_kernel(layout, n_matrices)
    # Few groups and many rows: split the rows, so that the whole GPU has work, and sum in order.
    groups = kernel.grid[0] // kernel.threads * n_matrices
    n_splits = max(1, min(tuned.METAL_GRADIENT_GROUPS // groups, n_x // tuned.METAL_ROWS_PER_SPLIT))
    return launch_sddmm(NAME, kernel, layout, y, x, n_splits)


def _sampling_kernel(layout: Layout, n_matrices: int) -> Kernel:
    """Choose the kernel of ``sddmm``: by tiles of at most 64 x 64, or by scalars."""
    block_size, side = layout.block_size, layout.rows
    if block_size in tuned.TILED_BLOCKS:
        tile = min(block_size, 64)
        threads = 32 if tile == 8 else 128
        width = side.n_blocks * (block_size // tile) ** 2 * threads
        template = {"B": block_size, "SIDE": tile}
        return Kernel("sddmm_tiles", template, (width, 1, n_matrices), threads)
    lanes, threads = lanes_per_row(side, block_size), tuned.GROUP_THREADS
    width = round_up(layout.full_shape[0] * lanes, threads)
    return Kernel("sddmm_csr", {"B": block_size, "LANES": lanes}, (width, 1, n_matrices), threads)


def _product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Launch the kernel of a product with a side of the matrix.

    Of the last block-column, as many columns as ``inside`` says lie in the matrix.
    """
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block_size = data.shape[-1] if data.ndim > 2 else 1
    if block_size >= tuned.METAL_SMALLEST_FEW and n_x <= tuned.METAL_FEW_ROWS:
        return few_rows.product(NAME, data, side, x, n_out, inside, bias)
    if block_size not in tuned.TILED_BLOCKS:
        return scalars.product(NAME, data, side, x, n_out, inside, bias)
    kernel = _by_tiles(block_size, n_x, n_out, n_matrices)
    options = {
        "T": x.dtype,
        "B": block_size,
        "INSIDE": inside,
        "TRANSPOSED": int(side.perm is not None),
        "BIAS": int(bias is not None),
    }
    launched = prepare(NAME, "spmm", kernel, x.dtype, **options)
    return launch_spmm(launched, data, side, x, n_out, bias)


def _by_tiles(block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Return the kernel of blocks and many rows of x, by 8 x 8 products of simdgroups."""
    rows = 16 if n_x <= 16 else 32 if n_x <= 32 or block_size == 128 else 64
    threads = 64 if block_size == 8 else 128
    grid = (n_out // block_size * threads, -(-n_x // rows), n_matrices)
    return Kernel("spmm_tiles", {"ROWS": rows}, grid, threads)
