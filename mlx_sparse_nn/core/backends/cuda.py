"""The three products as CUDA kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core.backends import launch
from mlx_sparse_nn.core.backends.launch import (
    GROUP,
    TILED,
    Launch,
    lanes_per_row,
    launch_sddmm,
    launch_spmm,
    longest_row,
    prepare,
)
from mlx_sparse_nn.core.layout import Half, Layout, buckets, in_order

NAME = "cuda"
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
_HOPPER = "sm_90"  # the architecture of the kernels below
_WGMMA_STAGES = {64: {256: 5, 128: 8}, 128: {256: 4, 128: 6}}  # by block size and rows of a tile
_PANEL_DENSITY = {16: 0.025, 32: 0.15}  # from which spmm_panels is the faster one
_PANEL_COLUMNS = 2**20
_GRAD_PANELS = (16, 32)  # block sizes of sddmm_panels
_GRAD_SHARED = 204_800
_GRAD_ROWS = 256  # rows of x for which it pays to find the blocks of a panel


def is_available() -> bool:
    """Return whether MLX has a CUDA GPU."""
    return mx.cuda.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int) -> bool:
    """Return whether there is a kernel for a product.

    There is none for blocks of 8 and more and many rows of x, unless by tensor cores: MLX's own
    batched products are made for these, and follow its own setting of TF32.
    """
    block_size = layout.block_size
    by_tensor_cores = dtype != mx.float32 and (op != "sddmm" or block_size in _GRAD_TILES)
    if block_size >= 8 and n_x > _FEW and not by_tensor_cores:
        return False
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
    if block in _GRAD_TILES and x.dtype != mx.float32:
        if _takes_grad_panels(layout, n):
            return _grad_panels(layout, y, x, n, n_batch)
        name, group, threads, shared_memory, template = _grad_tiles(block)
        width = (half["indptr"].size - 1) * -(-longest_row(half) // group)
        template, grid = {"T": x.dtype, **template}, (width * threads, 1, n_batch)
        product = prepare(NAME, name, "sddmm", template, x.dtype, grid, threads, shared_memory)
        arrays = [y, x, half["indptr"], half["indices"], half["indptr"]]
        return product(arrays, (*x.shape[:-2], *layout.data_shape))
    lanes = min(32, lanes_per_row(half, block))
    width = -(-layout.shape[0] * lanes // GROUP)
    splits = max(1, min(1024 // (width * n_batch), n // 64))
    template = {"B": block, "LANES": lanes}
    return launch_sddmm(NAME, "sddmm_csr", template, y, x, layout, width * GROUP, GROUP, splits)


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
        panels = n > _FEW and _takes_panels(half, block, n_out, shape[-1])
        choice = _tiling, n, n_batch, block, n_out, transposed, even, panels
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
    return prepare(NAME, name, "spmm", template, dtype, grid, threads, shared_memory)


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


def _takes_panels(half: Half, block: int, n_out: int, n_in: int) -> bool:
    """Return whether so much of the matrix is stored that x is read by panels of outputs.

    They walk the columns in order, and so must the blocks.
    """
    if block not in _PANEL_DENSITY or n_in > _PANEL_COLUMNS or not in_order(half):
        return False
    return half["indices"].size * block**2 >= _PANEL_DENSITY[block] * n_out * n_in


def _tiling(
    n: int, n_batch: int, block: int, n_out: int, transposed: bool, even: bool, panels: bool
) -> _Tiling:
    """Return the kernel of 16-bit blocks: few rows, many on Hopper, or many."""
    n_block_rows = n_out // block
    if n <= _FEW and not transposed:
        # Enough thread blocks to fill the GPU: strips of 16 outputs, and 8 warps along k.
        strip = min(16, block)
        grid = (n_out // strip * 256, -(-n // 16), n_batch)
        return _Tiling("spmm_few", {"B": block}, grid, 256)
    hopper, width = _architecture() == _HOPPER, n_block_rows
    if hopper and panels and -(-n_out // 256) * -(-n // 128) * n_batch >= _FILLING:
        rows, stages, threads, width = 128, 4, 640, -(-n_out // 256)
        name, template = "spmm_panels", {}
        shared_memory = stages * 32_768 + 65_536 + 1024
    elif hopper and n > 64 and block in _WGMMA_STAGES:
        rows = 256 if n_block_rows * -(-n // 256) * n_batch >= _FILLING else 128
        stages, threads = _WGMMA_STAGES[block][rows], 384
        name, template = "spmm_wgmma", {"ROWS": rows}
        shared_memory = stages * (rows + block) * 128 + 1024
    else:
        many = n > 64 and _architecture() in _LARGE_SHARED_MEMORY
        rows, warps_n, warps_o, depth, stages = (_MANY_TILES if many else _SOME_TILES)[block]
        threads = 32 * warps_n * warps_o
        name, template = "spmm_tiles", {"WARPS_N": warps_n, "WARPS_O": warps_o, "DEPTH": depth}
        template["ROWS"] = rows
        shared_memory = 2 * stages * (rows + block) * depth
    # A thread block takes up to 8 tiles of rows, fewer where that would leave the GPU idle, and one
    # where some block-row would keep it busy much longer than others.
    tiles = -(-n // rows)
    shares = max(-(-tiles // 8), -(-_FILLING // (width * n_batch))) if even else tiles
    shares = min(tiles, shares)
    template |= {"B": block, "STAGES": stages, "TRANSPOSED": int(transposed)}
    return _Tiling(name, template, (width * threads, shares, n_batch), threads, shared_memory)


def _takes_grad_panels(layout: Layout, n: int) -> bool:
    """Return whether blocks are small, so that their gradients share the columns of y and of x.

    No block may be stored twice.
    """
    if layout.block_size not in _GRAD_PANELS or n < _GRAD_ROWS or not in_order(layout.rows):
        return False
    columns = layout.shape[1] // layout.block_size
    return 8 * columns <= _GRAD_SHARED and _architecture() == _HOPPER


def _grad_panels(layout: Layout, y: mx.array, x: mx.array, n: int, n_batch: int) -> mx.array:
    """Launch ``sddmm_panels`` in about as many thread blocks as keep a large GPU busy."""
    block, half = layout.block_size, layout.rows
    panel = 256 // block
    panels = -(-(half["indptr"].size - 1) // panel)
    shares = -(-_most_blocks(half, panel) // (32_768 // block**2))
    splits = max(1, min(_FILLING // (panels * shares * n_batch), n // _GRAD_ROWS))
    shares = max(shares, _FILLING // (panels * splits * n_batch))
    template = {"B": block, "SHARED": _GRAD_SHARED}
    width = panels * shares * 640
    return launch_sddmm(
        NAME, "sddmm_panels", template, y, x, layout, width, 640, splits, _GRAD_SHARED
    )


def _most_blocks(half: Half, n_rows: int) -> int:
    """Return how many blocks ``n_rows`` block-rows have together at most."""
    total = 0
    for rows, width, _ in reversed(list(buckets(half))):
        taken = min(rows, n_rows)
        total, n_rows = total + taken * width, n_rows - taken
    return total


@cache
def _grad_tiles(block: int) -> tuple[str, int, int, int, dict[str, int]]:
    """Return a kernel of ``sddmm``: its name, GROUP, threads, shared memory and template."""
    if block in _WGMMA_STAGES and _architecture() == _HOPPER:
        group, stages = 256 // block, _WGMMA_STAGES[block][256]
        template = {"B": block, "STAGES": stages}
        return "sddmm_wgmma", group, 384, stages * (1 + group) * block * 128 + 1024, template
    group, warps_i, warps_k, depth, stages = _GRAD_TILES[block]
    template = {"B": block, "GROUP": group, "WARPS_I": warps_i, "WARPS_K": warps_k}
    template |= {"DEPTH": depth, "STAGES": stages}
    shared_memory = 2 * block * stages * depth * (1 + group)
    return "sddmm_tiles", group, 32 * warps_i * warps_k, shared_memory, template


@cache
def _architecture() -> str:
    """Return the GPU's architecture, such as ``sm_90``."""
    return str(mx.device_info(mx.Device(mx.gpu, 0))["architecture"])
