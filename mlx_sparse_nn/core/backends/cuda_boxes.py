"""Products of large blocks and many rows of x on Hopper: ``spmm_boxes``, and its tile.

Chosen from shapes and from the sizes of the layout, on the host.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel
from mlx_sparse_nn.core.layout import Side

MAP = 32  # integers of a map of boxes; see boxes.h


def takes(
    side: Side, n_x: int, n_matrices: int, block_size: int, inside: int, dtype: mx.Dtype
) -> bool:
    """Return whether there is so much to multiply that boxes are worth their maps.

    A box is a part of whole blocks: none may reach past the matrix. Tiles must fill so much of
    the rounds of thread blocks.
    """
    if block_size not in tuned.BOX_STAGES or dtype == mx.float32 or inside < block_size:
        return False
    stored = side.n_blocks * block_size**2
    if stored * n_x * n_matrices < tuned.BOX_PRODUCTS:
        return False
    from_density, filled = tuned.BOXES_FROM[block_size]
    if stored < from_density * side.n_block_rows * side.n_block_cols * block_size**2:
        return False
    rows, width = _rows(block_size), side.n_block_rows * n_matrices
    rounds = -(-width * -(-n_x // rows) // tuned.MULTIPROCESSORS)
    fills = width * n_x >= filled * rounds * tuned.MULTIPROCESSORS * rows
    return fills and cuda_tiles.architecture() == tuned.HOPPER


def boxes(
    n_x: int, n_matrices: int, block_size: int, n_out: int, transposed: bool, even: bool
) -> Kernel:
    """Return the kernel, in thread blocks enough to fill a GPU.

    A thread block takes up to 8 tiles of rows, and one where block-rows are not ``even``.
    """
    rows, stages, threads = _rows(block_size), tuned.BOX_STAGES[block_size], 384
    width, tiles = n_out // block_size, -(-n_x // rows)
    shares = max(-(-tiles // 8), -(-tuned.BLOCKS_TO_FILL_GPU // (width * n_matrices)))
    shares = min(tiles, shares) if even else tiles
    template = {"B": block_size, "STAGES": stages, "TRANSPOSED": int(transposed)}
    grid = (width * threads, shares, n_matrices)
    shared_memory = stages * (rows + block_size) * 128 + 1024
    scratch = 2 * MAP * width * shares * n_matrices
    return Kernel("spmm_boxes", template, grid, threads, shared_memory, scratch)


def _rows(block_size: int) -> int:
    """Return the rows of x of a tile, which has 32,768 sums: half a multiprocessor's registers."""
    return 32_768 // block_size
