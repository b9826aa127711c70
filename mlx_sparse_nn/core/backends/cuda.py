"""The three products as CUDA kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache, lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import launch, scalars
from mlx_sparse_nn.core.backends.launch import (
    Kernel,
    KernelLaunch,
    lanes_per_row,
    launch_sddmm,
    launch_spmm,
    power_of_two,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Layout, Side

NAME = "cuda"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops


def is_available() -> bool:
    """Return whether MLX has a CUDA GPU."""
    return mx.cuda.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product.

    There is none for large blocks without tiles and many rows of x, in float32 or for a weight
    gradient: MLX's own batched products are made for these. Nor for quantized blocks yet.
    """
    block_size = layout.block_size
    by_scalars = dtype != mx.float32 and op != "sddmm"
    large = block_size >= 8 and n_x > tuned.CUDA_FEW_ROWS
    if bits or (large and not by_scalars and not has_tiles(block_size, n_x, dtype)):
        return False
    return launch.takes(layout, n_x, dtype, n_matrices)


def has_tiles(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether tensor cores multiply such blocks.

    They do of 16 bits, and of float32 with many rows of x where MLX's own products are TF32 too.
    """
    if block_size % 8 or block_size > tuned.MAX_TILED_BLOCK:
        return False
    return dtype != mx.float32 or (n_x > tuned.CUDA_FEW_ROWS and _allows_tf32())


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    return _product(data, layout.rows, x, layout.full_shape[0], layout.inside[1], bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    return _product(data, layout.cols, y, layout.full_shape[1], layout.inside[0], None)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    if not has_tiles(layout.block_size, n_x, x.dtype) or _is_skewed(layout.rows):
        kernel, n_splits = _gradient_by_scalars(layout, n_x, n_matrices)
    elif x.dtype != mx.float32 and _takes_gradient_panels(layout, n_x):
        kernel, n_splits = _gradient_panels(layout, n_x, n_matrices)
    else:
        kernel = _gradient_tiles(layout, x.itemsize, n_matrices)
        launched = prepare(NAME, "sddmm", kernel, x.dtype, T=x.dtype)
        side = layout.rows
        arrays = [y, x, side.indptr, side.indices, side.indptr]  # the last one is not read
        return launched(arrays, (*x.shape[:-2], *layout.data_shape))
    by_columns = kernel.template.get("WIDTH", 1) > 1
    return launch_sddmm(NAME, kernel, layout, y, x, n_splits, by_columns)


def _product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Launch the kernel of a product with a side of the matrix.

    Of the last block-column, as many columns as ``inside`` says lie in the matrix.
    """
    shape, dtype, transposed = x.shape, x.dtype, side.perm is not None
    n_x, n_matrices = shape[-2], shape[0] if len(shape) == 3 else 1
    block_size = data.shape[-1] if data.ndim > 2 else 1
    if has_tiles(block_size, n_x, dtype):
        even = n_x > tuned.CUDA_FEW_ROWS and _is_even(side)
        panels = n_x > tuned.CUDA_FEW_ROWS and dtype != mx.float32
        panels = panels and _takes_panels(side, block_size, n_out, shape[-1])
        sizes = n_x, n_matrices, block_size, inside, n_out
        choice = _by_tensor_cores, *sizes, dtype.size, transposed, even, panels
    elif _takes_streaming(side, block_size, n_x):
        choice = _streaming, n_matrices, n_out
    else:
        by_columns = _takes_columns(n_x, block_size, shape[-1])
        return scalars.product(NAME, data, side, x, n_out, inside, bias, by_columns)
    launched = _prepared(dtype, bias is not None, *choice)
    return launch_spmm(launched, data, side, x, n_out, bias)


@lru_cache(4096)
def _prepared(
    dtype: mx.Dtype, has_bias: bool, choose_kernel: Callable[..., Kernel], *sizes: int
) -> KernelLaunch:
    """Return what ``choose_kernel`` says of these sizes, kept: that takes longer than to launch."""
    return prepare(NAME, "spmm", choose_kernel(*sizes), dtype, T=dtype, BIAS=int(has_bias))


def _takes_columns(n_x: int, block_size: int, n_cols: int) -> bool:
    """Return whether scalars read x by columns.

    Where x is narrow, its lines stay in the cache, and few rows are not worth the transposes.
    """
    if block_size >= 8:
        return n_x >= tuned.COLUMNS_OF_BLOCKS
    is_narrow = n_cols < tuned.NARROW_COLUMNS
    return n_x >= (tuned.COLUMNS_OF_NARROW if is_narrow else tuned.COLUMNS_OF_SCALARS)


def _takes_streaming(side: Side, block_size: int, n_x: int) -> bool:
    """Return whether one thread adds up each row: short rows of scalars times one row of x."""
    is_vector = block_size * n_x == 1 and side.perm is None
    return is_vector and side.longest_row <= tuned.MAX_STREAMED_ROW


def _streaming(n_matrices: int, n_out: int) -> Kernel:
    """Return the kernel of one row of x and short rows of scalars."""
    grid = (round_up(n_out, 64), 1, n_matrices)
    return Kernel("spmm_stream", {"ROWS": 64, "HELD": 1664}, grid, 64)


@cache
def _allows_tf32() -> bool:
    """Return MLX's setting of TF32, which it reads once, by C's ``atoi``."""
    number = re.match(r"\s*[+-]?\d+", os.environ.get("MLX_ENABLE_TF32", "1"))
    return number is not None and int(number[0]) != 0


def _is_even(side: Side) -> bool:
    """Return whether no block-row is more than twice as long as the mean."""
    return side.longest_row * side.n_block_rows <= 2 * side.n_blocks


def _takes_panels(side: Side, block_size: int, n_out: int, n_in: int) -> bool:
    """Return whether so much of the matrix is stored that x is read by panels of outputs.

    They walk the columns in order, and so must the blocks.
    """
    least = tuned.PANEL_DENSITY.get(block_size)
    if least is None or n_in > tuned.MAX_PANEL_COLUMNS or not side.is_in_order:
        return False
    return side.n_blocks * block_size**2 >= least * n_out * n_in


def _by_tensor_cores(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    itemsize: int,
    transposed: bool,
    even: bool,
    panels: bool,
) -> Kernel:
    """Return the kernel of blocks by tensor cores: few rows of x, many on Hopper, or many."""
    n_block_rows, filling = n_out // block_size, tuned.BLOCKS_TO_FILL_GPU
    if n_x <= tuned.CUDA_FEW_ROWS and not transposed and block_size in tuned.TILED_BLOCKS:
        # Enough thread blocks to fill the GPU: strips of 16 outputs, and 8 warps along k.
        grid = (n_out // min(16, block_size) * 256, -(-n_x // 16), n_matrices)
        return Kernel("spmm_few", {"B": block_size, "INSIDE": inside}, grid, 256)
    hopper, width = _architecture() == tuned.HOPPER, n_block_rows
    if hopper and panels and -(-n_out // 256) * -(-n_x // 128) * n_matrices >= filling:
        rows, stages, threads, width = 128, 4, 640, -(-n_out // 256)
        name, template = "spmm_panels", {}
        shared_memory = stages * 32_768 + 65_536 + 1024
    elif hopper and n_x > 64 and itemsize == 2 and block_size in tuned.WGMMA_STAGES:
        rows = 256 if n_block_rows * -(-n_x // 256) * n_matrices >= filling else 128
        stages, threads = tuned.WGMMA_STAGES[block_size][rows], 384
        name, template = "spmm_wgmma", {"ROWS": rows}
        shared_memory = stages * (rows + block_size) * 128 + 1024
    else:
        many = n_x > 64 and _architecture() in tuned.LARGE_SHARED_MEMORY
        tile = _tile(block_size, many)
        rows, stages, threads = tile.rows, tile.stages, 32 * tile.warps_n * tile.warps_o
        depth = 2 * tile.depth // itemsize
        name = "spmm_tiles"
        template = {"WARPS_N": tile.warps_n, "WARPS_O": tile.warps_o, "DEPTH": depth}
        template["ROWS"] = rows
        chunks, w_rows = (block_size, depth) if transposed else (depth, block_size)
        w_tile = w_rows * _stride(chunks * itemsize // 16, transposed and itemsize == 4)
        shared_memory = stages * (rows * depth * itemsize + 16 * w_tile)
    # A thread block takes up to 8 tiles of rows, fewer where that would leave the GPU idle, and one
    # where some block-row would keep it busy much longer than others.
    tiles = -(-n_x // rows)
    shares = max(-(-tiles // 8), -(-filling // (width * n_matrices))) if even else tiles
    shares = min(tiles, shares)
    template |= {"B": block_size, "INSIDE": inside, "STAGES": stages}
    template["TRANSPOSED"] = int(transposed)
    return Kernel(name, template, (width * threads, shares, n_matrices), threads, shared_memory)


def _tile(block_size: int, many: bool) -> tuned.Tile:
    """Return the tile of a thread block; depths are those of 16 bits."""
    tiles = tuned.MANY_ROWS_TILES if many else tuned.SOME_ROWS_TILES
    if block_size in tiles:
        return tiles[block_size]
    if block_size < 64:
        depth = 64 if many and block_size < 32 else 32
        return tuned.Tile(256, 8, 1, depth, 3) if many else tuned.Tile(64, 4, 1, 32, 4)
    warps = 2 if block_size % 16 == 0 else 1
    return tuned.Tile(128, 4, warps, 64, 3) if many else tuned.Tile(64, 2, warps, 32, 4)


def _stride(chunks: int, by_columns: bool) -> int:
    """Return the chunks of 16 bytes from one row of a tile to the next; see ``copies.h``."""
    if by_columns:
        return chunks + (6 - chunks % 4) % 4
    return chunks if chunks & (chunks - 1) == 0 else chunks | 1


def _gradient_by_scalars(layout: Layout, n_x: int, n_matrices: int) -> tuple[Kernel, int]:
    """Return the kernel of weight gradients by scalars, and in how many parts the rows go."""
    block_size, side, threads = layout.block_size, layout.rows, tuned.GROUP_THREADS
    by_columns = block_size < 8 and _takes_columns(n_x, block_size, layout.full_shape[1])
    columns = min(8, power_of_two(n_x)) if by_columns else 1
    lanes = min(32 // columns, lanes_per_row(side, block_size))
    piece = max(1, max(tuned.MIN_PIECE, tuned.MAX_ROUNDS * lanes) // block_size)
    width = round_up(layout.full_shape[0] * lanes * columns, threads)
    if is_long := side.longest_row > piece:
        width += round_up(-(-side.n_blocks // piece) * block_size * 32, threads)
    groups = width // threads * n_matrices
    n_splits = max(1, min(tuned.CUDA_GRADIENT_GROUPS // groups, n_x // tuned.CUDA_ROWS_PER_SPLIT))
    template = {"B": block_size, "LANES": lanes, "WIDTH": columns}
    template |= {"PIECE": piece if is_long else 1, "LONG": int(is_long)}
    return Kernel("sddmm_csr", template, (width, 1, n_matrices), threads), n_splits


def _is_skewed(side: Side) -> bool:
    """Return whether a long block-row would leave most of a large grid of tiles empty.

    Each block-row has as many thread blocks as the longest one.
    """
    groups = side.n_block_rows * side.longest_row
    return groups > max(tuned.MAX_EMPTY_GROUPS, 16 * side.n_blocks)


def _takes_gradient_panels(layout: Layout, n_x: int) -> bool:
    """Return whether blocks are small, so that their gradients share the columns of y and of x.

    No block may be stored twice.
    """
    small = layout.block_size in tuned.GRADIENT_PANELS and n_x >= tuned.GRADIENT_PANEL_ROWS
    if not small or not layout.rows.is_in_order:
        return False
    columns = layout.full_shape[1] // layout.block_size
    return 8 * columns <= tuned.GRADIENT_PANEL_SHARED and _architecture() == tuned.HOPPER


def _gradient_panels(layout: Layout, n_x: int, n_matrices: int) -> tuple[Kernel, int]:
    """Return ``sddmm_panels``, in thread blocks enough to fill a GPU, and the parts of the rows."""
    block_size, side, filling = layout.block_size, layout.rows, tuned.BLOCKS_TO_FILL_GPU
    panel_rows = 256 // block_size
    panels = -(-side.n_block_rows // panel_rows)
    shares = -(-_most_blocks(side, panel_rows) // (32_768 // block_size**2))
    n_splits = filling // (panels * shares * n_matrices)
    n_splits = max(1, min(n_splits, n_x // tuned.GRADIENT_PANEL_ROWS))
    shares = max(shares, filling // (panels * n_splits * n_matrices))
    shared_memory = tuned.GRADIENT_PANEL_SHARED
    template = {"B": block_size, "SHARED": shared_memory}
    grid = (panels * shares * 640, 1, n_matrices)
    return Kernel("sddmm_panels", template, grid, 640, shared_memory), n_splits


def _most_blocks(side: Side, n_block_rows: int) -> int:
    """Return the most blocks that any ``n_block_rows`` block-rows have together."""
    total = 0
    for group in reversed(side.groups):
        taken = min(group.n_block_rows, n_block_rows)
        total, n_block_rows = total + taken * group.longest, n_block_rows - taken
    return total


def _gradient_tiles(layout: Layout, itemsize: int, n_matrices: int) -> Kernel:
    """Return the kernel of weight gradients of blocks by tensor cores."""
    side = layout.rows
    group, kernel = _gradient_tile(layout.block_size, itemsize)
    width = side.n_block_rows * -(-side.longest_row // group)
    return kernel._replace(grid=(width * kernel.threads, 1, n_matrices))


@cache
def _gradient_tile(block_size: int, itemsize: int) -> tuple[int, Kernel]:
    """Return the blocks that a thread block of ``sddmm`` takes, and the kernel, without a grid."""
    hopper = itemsize == 2 and _architecture() == tuned.HOPPER
    if hopper and block_size in tuned.WGMMA_STAGES:
        group, stages = 256 // block_size, tuned.WGMMA_STAGES[block_size][256]
        template = {"B": block_size, "STAGES": stages}
        shared_memory = stages * (1 + group) * block_size * 128 + 1024
        return group, Kernel("sddmm_wgmma", template, (0, 1, 1), 384, shared_memory)
    tile = tuned.GRADIENT_TILES.get(block_size) or _between_tiles(block_size)
    depth = 2 * tile.depth // itemsize
    template = {"B": block_size, "GROUP": tile.group, "WARPS_I": tile.warps_i}
    template |= {"WARPS_K": tile.warps_k, "DEPTH": depth, "STAGES": tile.stages}
    strides = (
        _stride(width * itemsize // 16, itemsize == 4)
        for width in (block_size, block_size * tile.group)
    )
    shared_memory = tile.stages * depth * 16 * sum(strides)
    threads = 32 * tile.warps_i * tile.warps_k
    return tile.group, Kernel("sddmm_tiles", template, (0, 1, 1), threads, shared_memory)


def _between_tiles(block_size: int) -> tuned.GradientTile:
    """Return the tile of a block size that has none of its own: warps side by side over blocks."""
    group = max(1, 96 // block_size)
    if (group * block_size) % 16:
        group += 1
    width = group * block_size
    return tuned.GradientTile(group, 1, width // (32 if width % 32 == 0 else 16), 32, 4)


@cache
def _architecture() -> str:
    """Return the GPU's architecture, such as ``sm_90``."""
    return str(mx.device_info(mx.Device(mx.gpu, 0))["architecture"])
