"""The products of blocks whose weights go to the registers of Hopper's tensor cores: float32, and
sizes that ``spmm_wgmma`` does not take. When, and by which tile.

Chosen from shapes, on the host.
"""

from __future__ import annotations

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, round_up
from mlx_sparse_nn.core.layout import Layout


def takes(block_size: int, n_x: int, itemsize: int) -> bool:
    """Return whether ``spmm_fragments`` is faster than the other kernels of blocks with tiles."""
    least = tuned.FRAGMENT_ROWS.get((itemsize, block_size))
    return least is not None and n_x >= least and cuda_tiles.architecture() == tuned.HOPPER


def takes_edges(layout: Layout, n_x: int, itemsize: int) -> bool:
    """Return whether ``spmm_fragments`` multiplies x and y that end with the matrix.

    They must end at multiples of 16 bytes.
    """
    whole = all(size * itemsize % 16 == 0 for size in layout.shape)
    return whole and takes(layout.block_size, n_x, itemsize)


def cropped(*sizes: int) -> Kernel:
    """Return :func:`product` of x and y that end with the matrix."""
    return product(*sizes, cropped=True)


def product(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    itemsize: int,
    transposed: bool,
    even: bool,
    cropped: bool = False,
) -> Kernel:
    """Return ``spmm_fragments``: one thread block of two warpgroups for each block-row."""
    n_block_rows, filling = -(-n_out // block_size), tuned.BLOCKS_TO_FILL_GPU
    across = 1 if block_size <= 64 else 2  # warpgroups over the outputs
    rows = 256
    w_rows = 128 // itemsize if transposed else round_up(block_size, 16)
    chunks = block_size * itemsize // 16 if transposed else 8
    w_stride = 16 * cuda_tiles.stride(chunks, transposed and itemsize == 4)
    stage = rows * 128 + round_up(w_rows * w_stride, 1024)
    stages = min(6, (tuned.MAX_SHARED - 2048) // stage)
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows, "WGS_N": 2 // across}
    template |= {"WGS_O": across, "STAGES": stages, "TRANSPOSED": int(transposed)}
    template |= {"CROPPED": int(cropped), "OUTSIDE": n_block_rows * block_size - n_out}
    tiles = -(-n_x // rows)
    shares = max(-(-tiles // 8), -(-filling // (n_block_rows * n_matrices))) if even else tiles
    grid = (n_block_rows * 384, min(tiles, shares), n_matrices)
    return Kernel("spmm_fragments", template, grid, 384, stages * stage + 1024)
