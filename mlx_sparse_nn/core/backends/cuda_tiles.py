"""The products of blocks by CUDA's tensor cores: which kernel, and its tile.

Chosen from shapes and from the sizes of the layout, on the host.
"""

from __future__ import annotations

import os
import re
from functools import cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import Kernel
from mlx_sparse_nn.core.layout import Side


def has_tiles(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether tensor cores multiply such blocks.

    They do of 16 bits, and of float32 with many rows of x where MLX's own products are TF32 too.
    """
    if block_size % 8 or block_size > tuned.MAX_TILED_BLOCK:
        return False
    return dtype != mx.float32 or (n_x > tuned.CUDA_FEW_ROWS and allows_tf32())


def is_even(side: Side) -> bool:
    """Return whether no block-row is more than twice as long as the mean."""
    return side.longest_row * side.n_block_rows <= 2 * side.n_blocks


def takes_panels(
    side: Side, block_size: int, n_out: int, n_in: int, itemsize: int, n_rows: int
) -> bool:
    """Return whether so much of the matrix is stored that x is read by panels of outputs.

    They walk the columns in order, and so must the blocks. ``n_rows`` rows of x, of all matrices,
    must be enough for them to fill much of a GPU.
    """
    small = itemsize == 2 and block_size == 16
    filling = tuned.PANEL_GROUPS if small else tuned.BLOCKS_TO_FILL_GPU
    if n_rows <= 128 or -(-n_out // 256) * -(-n_rows // 128) < filling:
        return False
    densities = tuned.PANEL_DENSITY if itemsize == 2 else tuned.FLOAT_PANEL_DENSITY
    least = densities.get(block_size)
    if least is None or n_in > tuned.MAX_PANEL_COLUMNS or not side.is_in_order:
        return False
    return side.n_blocks * block_size**2 >= least * n_out * n_in


def by_tensor_cores(
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
    hopper, width = architecture() == tuned.HOPPER, n_block_rows
    if hopper and panels:
        rows, threads, width = 128, 640, -(-n_out // 256)
        name, template = "spmm_panels", {}
        stages, ring = (3, 98_304) if transposed and itemsize == 4 else (4, 65_536)
        shared_memory = stages * 32_768 + ring + 1024
    elif hopper and n_x > 64 and itemsize == 2 and block_size in tuned.WGMMA_STAGES:
        rows = 256 if n_block_rows * -(-n_x // 256) * n_matrices >= filling else 128
        stages, threads = tuned.WGMMA_STAGES[block_size][rows], 384
        name, template = "spmm_wgmma", {"ROWS": rows}
        shared_memory = stages * (rows + block_size) * 128 + 1024
    else:
        many = n_x > 64 and architecture() in tuned.LARGE_SHARED_MEMORY
        tile = _tile(block_size, many)
        rows, stages, threads = tile.rows, tile.stages, 32 * tile.warps_n * tile.warps_o
        depth = 2 * tile.depth // itemsize
        name = "spmm_tiles"
        template = {"WARPS_N": tile.warps_n, "WARPS_O": tile.warps_o, "DEPTH": depth}
        template["ROWS"] = rows
        chunks, w_rows = (block_size, depth) if transposed else (depth, block_size)
        w_tile = w_rows * stride(chunks * itemsize // 16, transposed and itemsize == 4)
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


def stride(chunks: int, by_columns: bool) -> int:
    """Return the chunks of 16 bytes from one row of a tile to the next; see ``copies.h``."""
    if by_columns:
        return chunks + (6 - chunks % 4) % 4
    return chunks if chunks & (chunks - 1) == 0 else chunks | 1


@cache
def allows_tf32() -> bool:
    """Return MLX's setting of TF32, which it reads once, by C's ``atoi``."""
    number = re.match(r"\s*[+-]?\d+", os.environ.get("MLX_ENABLE_TF32", "1"))
    return number is not None and int(number[0]) != 0


@cache
def architecture() -> str:
    """Return the GPU's architecture, such as ``sm_90``."""
    return str(mx.device_info(mx.Device(mx.gpu, 0))["architecture"])
