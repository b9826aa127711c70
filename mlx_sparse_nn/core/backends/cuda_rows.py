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


def takes_shares(block_size: int, n_x: int, dtype: mx.Dtype, transposed: bool) -> bool:
    """Return whether thread blocks share the blocks of a block-row.

    Of few rows of x it does for a transpose, by which their own kernel does not multiply.
    """
    if n_x > tuned.SHARED_ROWS.get(block_size, 0) or dtype == mx.float32:
        return False
    return (transposed or n_x > tuned.CUDA_FEW_ROWS) and cuda_tiles.architecture() == tuned.HOPPER


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


def has_long_rows(side: Side, block_size: int) -> bool:
    """Return whether the mean block-row is so long that half of it keeps a thread block busy."""
    return side.n_blocks * block_size >= tuned.LONG_ROW * side.n_block_rows


def shares(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    transposed: bool,
    long_rows: bool,
) -> Kernel:
    """Return the kernel in which thread blocks share the blocks of a block-row.

    There are as many as it takes to fill the GPU, as long as they have not too many sums, and 2
    where block-rows are long and fill it once by themselves. A thread block has as many stages as
    leave room for a second one on its multiprocessor, or as fit where thread blocks do not fill the
    GPU.
    """
    rows = 64 if n_x <= 64 else 128
    threads = 256 if rows == 64 else 384
    groups = n_out // block_size * -(-n_x // rows) * n_matrices
    filling = tuned.BLOCKS_TO_FILL_GPU
    most = min(tuned.MAX_SPLITS, max(1, tuned.SPLIT_SUMS // (rows * block_size)))
    splits = 1
    while 2 * splits <= most and 2 * groups * splits <= filling:
        splits *= 2
    if splits == 1 and long_rows and groups <= filling:
        splits = 2
    idle = groups * splits < filling
    stage = (rows + block_size) * 128
    stages = (tuned.SHARED_OF_ONE if idle else tuned.SHARED_OF_TWO) // stage
    stages = min(tuned.MAX_SHARED_STAGES, stages)
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows}
    template |= {"STAGES": stages, "TRANSPOSED": int(transposed)}
    grid = (n_out // block_size * splits * threads, -(-n_x // rows), n_matrices)
    return Kernel("spmm_shares", template, grid, threads, stages * stage + 1024, splits=splits)


def slices(
    n_x: int, n_matrices: int, block_size: int, inside: int, n_out: int, transposed: bool
) -> Kernel:
    """Return the kernel in which thread blocks share the columns of a panel of 256 outputs.

    There are 4 of them where that fills no more than half of the GPU, and else 2.
    """
    rows, ring = (64, 4096) if n_x <= 64 else (128, 2048)
    stages, threads = 4 if rows == 64 else 3, 640
    panels, tiles = -(-n_out // 256), -(-n_x // rows)
    splits = 4 if 8 * panels * tiles * n_matrices <= tuned.BLOCKS_TO_FILL_GPU else 2
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows}
    template |= {"STAGES": stages, "RING": ring, "TRANSPOSED": int(transposed)}
    shared_memory = stages * rows * 256 + 16 * ring * 2
    grid = (panels * splits * threads, tiles, n_matrices)
    return Kernel("spmm_slices", template, grid, threads, shared_memory, splits=splits)
