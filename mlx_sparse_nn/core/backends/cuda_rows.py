"""The products of 16-bit blocks with some rows of x on Hopper, by thread blocks that share rows.

A grid of one thread block a block-row leaves much of the GPU idle there. Chosen from shapes and
from the sizes of the layout, on the host.

A second kernel adds up the sums of several thread blocks. A cluster of them would do it at once,
but MLX (0.32.4) keeps CUDA graphs by their nodes alone, and CUDA replays one wrongly where a kernel
takes the place of one of another cluster size.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel
from mlx_sparse_nn.core.layout import Side


def takes_shares(
    block_size: int, n_x: int, dtype: mx.Dtype, transposed: bool, n_block_rows: int
) -> bool:
    """Return whether thread blocks share the blocks of a block-row.

    Of few rows of x it does for a transpose, by which their own kernel does not multiply.
    """
    if n_x > tuned.SHARED_ROWS.get(block_size, 0) or dtype == mx.float32:
        return False
    if cuda_tiles.architecture() != tuned.HOPPER:
        return False
    if n_x <= tuned.CUDA_FEW_ROWS:
        return transposed
    if block_size <= 32 and n_x <= 64:
        return n_block_rows <= 2 * tuned.MULTIPROCESSORS  # of more, other kernels have smaller ones
    # Of tiles of 256 rows, which others have, enough must be empty.
    return block_size != 64 or n_x <= 128 or 0 < n_x % 256 <= tuned.SHARED_OF_256


def takes_slices(
    side: Side, block_size: int, n_x: int, n_out: int, n_in: int, dtype: mx.Dtype
) -> bool:
    """Return whether so much of the matrix is stored that thread blocks share a panel's columns.

    The panel's warps walk them in order, and so must the blocks.
    """
    if block_size != tuned.SLICED_BLOCK or n_x > tuned.SLICED_ROWS or dtype == mx.float32:
        return False
    if n_x <= tuned.CUDA_FEW_ROWS or side.n_blocks * block_size**2 < tuned.SLICED * n_out * n_in:
        return False
    return side.is_in_order and cuda_tiles.architecture() == tuned.HOPPER


def shares(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    transposed: bool,
    n_blocks: int,
    longest_row: int,
) -> Kernel:
    """Return the kernel in which thread blocks share the blocks of a block-row.

    Their tile and number are those of the least time by :class:`tuned.SharesCost`. A thread block
    has as many stages as leave room for a second one on its multiprocessor, or as fit where thread
    blocks do not fill the GPU.
    """
    n_block_rows, cost, processors = n_out // block_size, tuned.SHARES_COST, tuned.MULTIPROCESSORS
    mean, longest = (k * block_size / 64 for k in (n_blocks / n_block_rows, longest_row))

    def groups_of(rows: int, splits: int) -> int:
        return n_block_rows * -(-n_x // rows) * n_matrices * splits

    def microseconds(tile: tuple[int, int]) -> float:
        rows, splits = tile
        groups, stage = groups_of(rows, splits), (rows + block_size) * 128
        took = -(-groups // (2 * processors)) * (cost.round + cost.stage * longest / splits)
        took += -(-groups // processors) * cost.byte * stage * mean / splits
        if splits == 1:
            return took
        return took + cost.second + cost.sum * splits * n_x * n_out * n_matrices

    tiles = [(rows, splits) for rows in (64, 128)[: 1 + (n_x > 64)] for splits in tuned.SHARES]
    rows, splits = min(tiles, key=microseconds)
    threads, stage = 256 if rows == 64 else 384, (rows + block_size) * 128
    idle = groups_of(rows, splits) < tuned.BLOCKS_TO_FILL_GPU
    stages = (tuned.SHARED_OF_ONE if idle else tuned.SHARED_OF_TWO) // stage
    stages = min(tuned.MAX_SHARED_STAGES, stages)
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows}
    template |= {"STAGES": stages, "TRANSPOSED": int(transposed)}
    grid = (n_block_rows * splits * threads, -(-n_x // rows), n_matrices)
    return Kernel("spmm_shares", template, grid, threads, stages * stage + 1024, splits=splits)


def slices(
    n_x: int, n_matrices: int, block_size: int, inside: int, n_out: int, transposed: bool
) -> Kernel:
    """Return the kernel in which thread blocks share the columns of a panel of 256 outputs.

    There are as many of them as fill the GPU once, 2 at least and 8 at most.
    """
    rows, ring = (64, 4096) if n_x <= 64 else (128, 2048)
    stages, threads = 4 if rows == 64 else 3, 640
    panels, tiles = -(-n_out // 256), -(-n_x // rows)
    groups, splits = panels * tiles * n_matrices, 2
    while splits < 8 and 2 * groups * splits <= tuned.BLOCKS_TO_FILL_GPU:
        splits *= 2
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows}
    template |= {"STAGES": stages, "RING": ring, "TRANSPOSED": int(transposed)}
    shared_memory = stages * rows * 256 + 16 * ring * 2
    grid = (panels * splits * threads, tiles, n_matrices)
    return Kernel("spmm_slices", template, grid, threads, shared_memory, splits=splits)
