"""The three products as CUDA kernels; names, arguments and results as in ``reference``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core import reference
from mlx_sparse_nn.core.kernels import (
    GROUP,
    TILED,
    Launch,
    lanes_per_row,
    launch,
    launch_sddmm,
    launch_spmm,
    longest_row,
    prepare,
)
from mlx_sparse_nn.core.layout import Half, Layout

_FEW = 16  # rows of x up to which a product is bound by reading the stored values
_SHORT = 64  # values in a row up to which one thread adds them up
_FILLING = 128  # thread blocks that keep a large GPU busy

# Tiles of spmm_tiles by block size: ROWS, WARPS_N, WARPS_O, DEPTH, STAGES; for many rows, where a
# thread block may have 160 KB of shared memory, and for up to 64 rows or 48 KB.
_MANY_TILES = {
    8: (256, 8, 1, 64, 3),
    16: (256, 8, 1, 64, 3),
    32: (256, 8, 1, 64, 3),
    64: (128, 4, 1, 64, 3),
    128: (128, 2, 4, 64, 3),
}
_SOME_TILES = {
    8: (128, 4, 1, 32, 4),
    16: (64, 4, 1, 32, 4),
    32: (64, 4, 1, 32, 4),
    64: (64, 2, 2, 32, 4),
    128: (64, 2, 4, 32, 4),
}
_LARGE_SHARED_MEMORY = ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103")
# Tiles of sddmm_tiles: GROUP, WARPS_I, WARPS_K, DEPTH, STAGES.
_GRAD_TILES = {
    16: (8, 1, 4, 64, 3),
    32: (4, 1, 4, 32, 4),
    64: (2, 2, 2, 64, 3),
    128: (1, 2, 4, 32, 4),
}
_WGMMA = ("sm_90", (64, 128))  # the architecture and the block sizes of Hopper's own kernels
_WGMMA_STAGES = {64: 5, 128: 4}


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
    n, n_batch = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block, half = layout.block_size, layout.rows
    if block in _GRAD_TILES and x.dtype != mx.float32:
        name, group, threads, shared_memory, template = _grad_tiles(block)
        width = (half["indptr"].size - 1) * -(-longest_row(half) // group)
        return launch(
            name,
            "sddmm",
            [y, x, half["indptr"], half["indices"], half["indptr"]],
            {"T": x.dtype, **template},
            (*x.shape[:-2], *layout.data_shape),
            x.dtype,
            (width * threads, 1, n_batch),
            threads,
            shared_memory,
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
    return x.shape[-2] > _FEW and x.dtype == mx.float32 and data.ndim > 2 and data.shape[-1] >= 8


class _Tiling(NamedTuple):
    """A kernel of ``spmm`` and how it is launched."""

    name: str
    template: dict[str, Any]
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int = 0


def _product(
    data: mx.array, half: Half, x: mx.array, n_out: int, bias: mx.array | None, transposed: bool
) -> mx.array:
    shape, dtype = x.shape, x.dtype
    n, n_batch = shape[-2], shape[0] if len(shape) == 3 else 1
    block = data.shape[-1] if data.ndim > 2 else 1
    if block in TILED and dtype != mx.float32:
        even = n > _FEW and _is_even(half)
        choice = _tiling, n, n_batch, block, n_out, transposed, even
    elif block == 1 and n == 1 and not transposed and longest_row(half) <= _SHORT:
        choice = _streaming, n_batch, n_out
    else:
        choice = _by_scalars, n, n_batch, block, n_out, transposed, lanes_per_row(half, block)
    launch = _prepared(dtype, bias is not None, *choice)
    return launch_spmm(launch, data, half, x, n_out, bias, transposed)


@lru_cache(4096)
def _prepared(dtype: mx.Dtype, has_bias: bool, choose: Callable[..., _Tiling], *sizes) -> Launch:
    """Return what ``choose`` says of these sizes, kept: to choose takes longer than to launch."""
    name, template, grid, threads, shared_memory = choose(*sizes)
    template = {"T": dtype, **template, "BIAS": int(has_bias)}
    return prepare(name, "spmm", template, dtype, grid, threads, shared_memory)


def _streaming(n_batch: int, n_out: int) -> _Tiling:
    """Return the kernel of one row of x and short rows of scalars."""
    grid = (-(-n_out // 64) * 64, 1, n_batch)
    return _Tiling("spmm_stream", {"ROWS": 64, "HELD": 1664}, grid, 64)


def _by_scalars(
    n: int, n_batch: int, block: int, n_out: int, transposed: bool, lanes: int
) -> _Tiling:
    """Return the kernel of all else, which reads blocks by scalars."""
    rows = 1 if n == 1 else 4
    grid = (-(-n_out * lanes // GROUP) * GROUP, -(-n // rows), n_batch)
    template = {"B": block, "ROWS": rows, "LANES": lanes, "TRANSPOSED": int(transposed)}
    return _Tiling("spmm_csr", template, grid, GROUP)


def _is_even(half: Half) -> bool:
    """Return whether no block-row is more than twice as long as the mean."""
    return longest_row(half) * (half["indptr"].size - 1) <= 2 * half["indices"].size


def _tiling(n: int, n_batch: int, block: int, n_out: int, transposed: bool, even: bool) -> _Tiling:
    """Return the kernel of 16-bit blocks: few rows, many on Hopper, or many."""
    n_block_rows = n_out // block
    if n <= _FEW and not transposed:
        # Enough thread blocks to fill the GPU: strips of 16 outputs, and 8 warps along k.
        strip = min(16, block)
        grid = (n_out // strip * 256, -(-n // 16), n_batch)
        return _Tiling("spmm_few", {"B": block, "STRIP": strip, "WARPS": 8}, grid, 256)
    architecture, block_sizes = _WGMMA
    if n > 64 and block in block_sizes and _architecture() == architecture:
        rows = 256 if n_block_rows * -(-n // 256) * n_batch >= _FILLING else 128
        stages, threads = _WGMMA_STAGES[block], 2 * rows
        name, template = "spmm_wgmma", {"WARPGROUPS": rows // 64}
        shared_memory = stages * (rows + block) * 128 + 1024
    else:
        many = n > 64 and _architecture() in _LARGE_SHARED_MEMORY
        rows, warps_n, warps_o, depth, stages = (_MANY_TILES if many else _SOME_TILES)[block]
        threads = 32 * warps_n * warps_o
        name, template = "spmm_tiles", {"WARPS_N": warps_n, "WARPS_O": warps_o, "DEPTH": depth}
        shared_memory = 2 * stages * (rows + block) * depth
    # A thread block takes up to 8 tiles of rows, fewer where that would leave the GPU idle, and one
    # where some block-row would keep it busy much longer than others.
    tiles = -(-n // rows)
    shares = max(-(-tiles // 8), -(-_FILLING // (n_block_rows * n_batch))) if even else tiles
    shares = min(tiles, shares)
    template |= {"B": block, "ROWS": rows, "STAGES": stages, "TRANSPOSED": int(transposed)}
    return _Tiling(
        name, template, (n_block_rows * threads, shares, n_batch), threads, shared_memory
    )


@cache
def _grad_tiles(block: int) -> tuple[str, int, int, int, dict[str, int]]:
    """Return a kernel of ``sddmm``: its name, GROUP, threads, shared memory and template."""
    architecture, block_sizes = _WGMMA
    if block in block_sizes and _architecture() == architecture:
        group, stages = 256 // block, 4
        template = {"B": block, "WARPGROUPS": 2, "GROUP": group, "STAGES": stages}
        return "sddmm_wgmma", group, 256, stages * (1 + group) * block * 128 + 1024, template
    group, warps_i, warps_k, depth, stages = _GRAD_TILES[block]
    template = {"B": block, "GROUP": group, "WARPS_I": warps_i, "WARPS_K": warps_k}
    template |= {"DEPTH": depth, "STAGES": stages}
    shared_memory = 2 * block * stages * depth * (1 + group)
    return "sddmm_tiles", group, 32 * warps_i * warps_k, shared_memory, template


@cache
def _architecture() -> str:
    """Return the GPU's architecture, such as ``sm_90``."""
    return str(mx.device_info(mx.Device(mx.gpu, 0))["architecture"])
