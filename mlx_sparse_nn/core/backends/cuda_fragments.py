"""The products of float32 blocks by TF32, and of sizes between the powers of two, on Hopper: from
when on ``spmm_fragments`` and ``sddmm_fragments`` are faster, and their tiles.

Chosen from shapes, on the host.
"""

from __future__ import annotations

from typing import Any

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, power_of_two, round_up
from mlx_sparse_nn.core.layout import Layout

WIDTHS = (16, 24, 32, 48, 64, 96, 128)  # columns of products in fragments.h
REGISTERS = 72, 216  # of a thread that copies, and of one that multiplies


def takes(block_size: int, n_x: int, itemsize: int) -> bool:
    """Return whether ``spmm_fragments`` is faster than the other kernels of blocks with tiles."""
    least = tuned.FRAGMENT_ROWS.get((itemsize, block_size))
    return least is not None and n_x >= least and cuda_tiles.architecture() == tuned.HOPPER


def takes_gradients(block_size: int, n_x: int, itemsize: int) -> bool:
    """Return whether ``sddmm_fragments`` is faster than the other kernels of weight gradients."""
    least = tuned.GRADIENT_FRAGMENT_ROWS.get((itemsize, block_size))
    return least is not None and n_x >= least and cuda_tiles.architecture() == tuned.HOPPER


def gradients(layout: Layout, n_x: int, itemsize: int, n_matrices: int) -> tuple[Kernel, int]:
    """Return ``sddmm_fragments``, and in how many parts the rows go."""
    block_size, side = layout.block_size, layout.rows
    group, chunk, threads = 256 // block_size, 16 // itemsize, 512 if itemsize == 4 else 384
    stage = 32_768 + 128 * chunk * cuda_tiles.stride(block_size // chunk, itemsize == 4)
    raw = (2 if block_size > 64 else 3) if itemsize == 4 else 0
    stages = min(6, (tuned.MAX_SHARED - 2048) // stage - raw)
    template = {"B": block_size, "STAGES": stages, "RAW": raw}
    width, shared_memory = side.n_block_rows * -(-side.longest_row // group), stage * (stages + raw)
    grid = (width * threads, 1, n_matrices)
    kernel = Kernel("sddmm_fragments", template, grid, threads, shared_memory + 1024)
    taken = sum(g.n_block_rows * -(-g.longest // group) for g in side.groups)
    return kernel, _splits(taken * n_matrices, n_x)


def _splits(thread_blocks: int, n_x: int) -> int:
    """Return in how many parts the rows go: some, where that many thread blocks fill no GPU twice.

    Then those with few blocks of a short block-row even out the others.
    """
    if thread_blocks >= 1.5 * tuned.BLOCKS_TO_FILL_GPU:
        return 1
    return max(1, min(max(2, tuned.BLOCKS_TO_FILL_GPU // thread_blocks), n_x // 512))


def ends_evenly(layout: Layout, itemsize: int) -> bool:
    """Return whether rows of x and y end at multiples of 16 bytes.

    Then these kernels need no zeros behind them.
    """
    return all(size * itemsize % 16 == 0 for size in layout.shape)


def cropped(*sizes: Any) -> Kernel:
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
    """Return ``spmm_fragments``: some warpgroups for each block-row, or for a part of one."""
    n_block_rows = -(-n_out // block_size)
    tiles, warpgroups, splits = _tile(n_x, n_block_rows * n_matrices, block_size)
    rows, threads = 64 * tiles * warpgroups, 128 * (warpgroups + 1)
    width = next(width for width in WIDTHS if width >= block_size)
    stage = stage_bytes(rows, block_size, width, itemsize, transposed)
    stages = min(6, (tuned.MAX_SHARED - 2048) // stage)
    given, taken = REGISTERS if rows > 128 else (0, 0)
    template = {"B": block_size, "WIDTH": width, "INSIDE": inside, "CROPPED": int(cropped)}
    template |= {"OUTSIDE": n_block_rows * block_size - n_out, "WARPGROUPS": warpgroups}
    template |= {"TILES": tiles, "STAGES": stages}
    template |= {"TRANSPOSED": int(transposed), "GIVEN": given, "TAKEN": taken}
    shares = all_tiles = -(-n_x // rows)
    if even and splits == 1:
        shares = _shares(all_tiles, n_block_rows * n_matrices)
    grid = (n_block_rows * splits * threads, shares, n_matrices)
    return Kernel("spmm_fragments", template, grid, threads, stages * stage + 1024, splits=splits)


def _tile(n_x: int, block_rows: int, block_size: int) -> tuple[int, int, int]:
    """Return tiles of 64 rows of a warpgroup, warpgroups, and thread blocks that share them.

    To add up their sums takes longer than it saves, but for a tile of 64 rows.
    """
    if n_x <= 64:
        return 1, 1, min(4, power_of_two(tuned.BLOCKS_TO_FILL_GPU // block_rows))
    if n_x <= 128:
        return 1, 2, 1
    fills = -(-n_x // 512) * block_rows >= tuned.BLOCKS_TO_FILL_GPU
    registers = 4 * (block_size // 2 + 16)  # of a thread, for sums and x
    return (4 if n_x > 256 and fills and registers <= 160 else 2), 2, 1


def _shares(tiles: int, block_rows: int) -> int:
    """Return how many thread blocks share the tiles of a block-row, for full rounds of them.

    Each costs some 0.15 of a tile: 4 tiles each take 87 us where one each takes 98.
    """

    def cost(shares: int) -> float:
        rounds = -(-block_rows * shares // tuned.MULTIPROCESSORS)
        return rounds * (-(-tiles // shares) + 0.15)

    return min(range(1, min(tiles, 64) + 1), key=cost)


def stage_bytes(rows: int, block_size: int, width: int, itemsize: int, transposed: bool) -> int:
    """Return the bytes of a stage of ``spmm_fragments``."""
    if transposed and itemsize == 2:
        return 128 * (rows + round_up(width, 64))
    raw = round_up(32 * (block_size + 4) * 4, 1024) if transposed else 0
    return 128 * (rows + width) + raw
