"""The products by scalars on CUDA: where x lies by columns, and which kernel.

Scalars are the blocks of B = 1, and those of every size that has no tiles.
"""

from __future__ import annotations

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import Kernel, lanes_per_row, power_of_two, round_up
from mlx_sparse_nn.core.layout import Layout, Side


def takes_columns(n_x: int, block_size: int, n_cols: int) -> bool:
    """Return whether scalars read x by columns.

    Where x is narrow, its lines stay in the cache, and few rows are not worth the transposes.
    """
    if block_size >= 8:
        return n_x >= tuned.COLUMNS_OF_BLOCKS
    is_narrow = n_cols < tuned.NARROW_COLUMNS
    return n_x >= (tuned.COLUMNS_OF_NARROW if is_narrow else tuned.COLUMNS_OF_SCALARS)


def gradients(layout: Layout, n_x: int, n_matrices: int) -> tuple[Kernel, int]:
    """Return the kernel of weight gradients by scalars, and in how many parts the rows go."""
    block_size, side, threads = layout.block_size, layout.rows, tuned.GROUP_THREADS
    by_columns = block_size < 8 and takes_columns(n_x, block_size, layout.full_shape[1])
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


def is_skewed(side: Side) -> bool:
    """Return whether a long block-row would leave most of a large grid of tiles empty.

    Each block-row has as many thread blocks as the longest one.
    """
    groups = side.n_block_rows * side.longest_row
    return groups > max(tuned.MAX_EMPTY_GROUPS, 16 * side.n_blocks)
