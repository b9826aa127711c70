"""The product on CUDA of blocks of 8 in 16 bits: which, and its tile.

Chosen from shapes and from the sizes of the layout, on the host. The kernel is ``spmm_small``.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, launch_spmm, prepare
from mlx_sparse_nn.core.layout import Side

BLOCK_SIZE = 8


def takes(side: Side, block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether a product with a side goes by this kernel.

    It walks the columns in order, and so must the blocks.
    """
    if block_size != BLOCK_SIZE or dtype == mx.float32 or side.perm is not None:
        return False
    if n_x < tuned.SMALL_LEAST_ROWS or not side.is_in_order:
        return False
    low, high = tuned.SMALL_DENSITY[_is_many(n_x)]
    places = side.n_block_rows * side.n_block_cols
    if not low * places <= side.n_blocks <= high * places:
        return False
    return cuda_tiles.architecture() == tuned.HOPPER and _fills(n_x, side.n_block_rows)


def _is_many(n_x: int) -> bool:
    return n_x > tuned.SMALL_FEW_ROWS


@lru_cache(4096)
def _fills(n_x: int, n_block_rows: int) -> bool:
    """Return whether many rows of x keep a GPU busy to the end: few are split by columns."""
    if not _is_many(n_x):
        return True
    tile = tuned.SMALL_TILES[True]
    panels, row_tiles = -(-n_block_rows // (2 * tile.warps)), -(-n_x // tile.rows)
    shares = max(1, min(row_tiles, tuned.MULTIPROCESSORS // panels))
    rounds = -(-row_tiles // shares) * -(-panels * shares // tuned.MULTIPROCESSORS)
    return panels * row_tiles >= tuned.SMALL_FILLED * rounds * tuned.MULTIPROCESSORS


def product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Return the product with a side of the matrix; arguments as in ``cuda._product``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    sizes = n_x, n_matrices, n_out, x.shape[-1]
    launched = _launch(x.dtype, inside, bias is not None, *sizes)
    return launch_spmm(launched, data, side, x, n_out, bias)


@lru_cache(4096)
def _launch(
    dtype: mx.Dtype, inside: int, has_bias: bool, n_x: int, n_matrices: int, n_out: int, n_in: int
) -> KernelLaunch:
    """Return the launch of these sizes: of the columns in parts, where few rows leave room."""
    tile = tuned.SMALL_TILES[_is_many(n_x)]
    threads, filling = 32 * (tile.warps + 4), tuned.MULTIPROCESSORS
    panels, row_tiles = -(-n_out // (2 * tile.warps * BLOCK_SIZE)), -(-n_x // tile.rows)
    shares = max(1, min(row_tiles, filling // (panels * n_matrices)))
    splits = max(1, min(filling // (panels * shares * n_matrices), n_in // (4 * tile.depth)))
    shared_memory = tile.stages * tile.rows * tile.depth * dtype.size + 1024
    template = {"INSIDE": inside, "ROWS": tile.rows, "WARPS": tile.warps, "DEPTH": tile.depth}
    template |= {"STAGES": tile.stages, "BIAS": int(has_bias)}
    grid = (panels * splits * threads, shares, n_matrices)
    kernel = Kernel("spmm_small", template, grid, threads, shared_memory, splits=splits)
    return prepare("cuda", "spmm", kernel, dtype, T=dtype)
