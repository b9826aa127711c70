"""The three products as CUDA kernels; names, arguments and results as in ``reference``."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import reference
from mlx_sparse_nn.core.kernels import (
    GROUP,
    TILED,
    lanes_per_row,
    launch,
    launch_sddmm,
    launch_spmm,
    longest_row,
)
from mlx_sparse_nn.core.layout import Half, Layout

_FEW = 16  # rows of x up to which a product is bound by reading the stored values
_SHORT = 64  # values in a row up to which one thread adds them up

# Tiles of spmm_tiles by block size: ROWS, WARPS_N, WARPS_O, DEPTH, STAGES; for many rows and for up
# to 64.
_MANY_TILES = {
    8: (256, 8, 1, 64, 3),
    16: (256, 8, 1, 64, 3),
    32: (256, 8, 1, 64, 3),
    64: (128, 4, 1, 64, 3),
    128: (128, 2, 4, 64, 3),
}
_SOME_TILES = {
    8: (64, 4, 1, 32, 4),
    16: (64, 4, 1, 32, 4),
    32: (64, 4, 1, 32, 4),
    64: (64, 2, 2, 32, 4),
    128: (64, 2, 4, 32, 4),
}
# Tiles of sddmm_tiles: GROUP, WARPS_I, WARPS_K, DEPTH, STAGES.
_GRAD_TILES = {
    16: (8, 1, 4, 32, 4),
    32: (4, 1, 4, 32, 4),
    64: (2, 2, 2, 64, 3),
    128: (1, 2, 4, 32, 4),
}


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``reference.spmm``."""
    if _by_mlx(data, x):
        return reference.spmm(data, layout, x, bias)
    return _product(data, layout.rows, x, layout.shape[0], bias, transposed=False)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``reference.spmm_t``."""
    if _by_mlx(data, y):
        return reference.spmm_t(data, layout, y)
    return _product(data, layout.cols, y, layout.shape[1], None, transposed=True)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``reference.sddmm``."""
    (n_batch, n, _), block, half = x.shape, layout.block_size, layout.rows
    if block in _GRAD_TILES and x.dtype != mx.float32:
        group, warps_i, warps_k, depth, stages = _GRAD_TILES[block]
        width = (half["indptr"].size - 1) * -(-longest_row(half) // group)
        threads = 32 * warps_i * warps_k
        return launch(
            "sddmm_tiles",
            "sddmm",
            [y, x, half["indptr"], half["indices"], half["indptr"]],
            {
                "T": x.dtype,
                "B": block,
                "GROUP": group,
                "WARPS_I": warps_i,
                "WARPS_K": warps_k,
                "DEPTH": depth,
                "STAGES": stages,
            },
            (n_batch, *layout.data_shape),
            x.dtype,
            (width * threads, 1, n_batch),
            threads,
            2 * block * max(stages * depth * (1 + group), block * group + 8),
        )
    if block >= 8 and n > _FEW:
        return reference.sddmm(layout, y, x)
    lanes = min(32, lanes_per_row(half, block))
    width = -(-layout.shape[0] * lanes // GROUP)
    splits = max(1, min(1024 // (width * n_batch), n // 64))
    template = {"B": block, "LANES": lanes}
    return launch_sddmm("sddmm_csr", template, y, x, layout, width * GROUP, GROUP, splits)


def _by_mlx(data: mx.array, x: mx.array) -> bool:
    """Whether plain MLX computes a product: float32 blocks and many rows, so that its own setting
    decides on TF32."""
    return x.dtype == mx.float32 and data.ndim == 4 and data.shape[-1] >= 8 and x.shape[1] > _FEW


def _product(
    data: mx.array, half: Half, x: mx.array, n_out: int, bias: mx.array | None, transposed: bool
) -> mx.array:
    (n_batch, n, _), block = x.shape, 1 if data.ndim == 2 else data.shape[-1]
    flags = {"TRANSPOSED": int(transposed), "BIAS": int(bias is not None)}
    template = {"T": x.dtype, "B": block}
    shared_memory = 0
    if block in TILED and x.dtype != mx.float32:
        if n <= _FEW and block >= 32 and not transposed:
            # Enough thread blocks to fill the GPU: strips of 16 outputs, and 8 warps along k.
            name, rows, threads, groups = "spmm_few", 16, 256, n_out // 16
            template |= {"STRIP": 16, "WARPS": 8, "BIAS": flags["BIAS"]}
        else:
            tiles = _MANY_TILES if n > 64 else _SOME_TILES
            rows, warps_n, warps_o, depth, stages = tiles[block]
            name, threads, groups = "spmm_tiles", 32 * warps_n * warps_o, n_out // block
            shared_memory = 2 * max(stages * (rows + block) * depth, rows * (block + 8))
            template |= {"ROWS": rows, "WARPS_N": warps_n, "WARPS_O": warps_o}
            template |= {"DEPTH": depth, "STAGES": stages, **flags}
    elif block == 1 and n == 1 and not transposed and longest_row(half) <= _SHORT:
        name, rows, threads, groups = "spmm_stream", 1, 128, -(-n_out // 128)
        template = {"T": x.dtype, "BIAS": flags["BIAS"]}
    else:
        rows, lanes = 1 if n == 1 else 4, lanes_per_row(half, block)
        name, threads, groups = "spmm_csr", GROUP, -(-n_out * lanes // GROUP)
        template |= {"ROWS": rows, "LANES": lanes, **flags}
    grid = (groups * threads, -(-n // rows), n_batch)
    return launch_spmm(
        name, template, data, half, x, n_out, bias, transposed, grid, threads, shared_memory
    )
