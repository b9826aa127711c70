"""The weight gradients of CUDA: which kernel, and its tile.

Chosen from shapes and from the sizes of the layout, on the host.
"""

from __future__ import annotations

from functools import cache

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel
from mlx_sparse_nn.core.layout import Layout, Side


def takes_panels(layout: Layout, n_x: int) -> bool:
    """Return whether blocks are small, so that their gradients share the columns of y and of x.

    No block may be stored twice.
    """
    small = layout.block_size in tuned.GRADIENT_PANELS and n_x >= tuned.GRADIENT_PANEL_ROWS
    if not small or not layout.rows.is_in_order:
        return False
    columns = layout.full_shape[1] // layout.block_size
    return 8 * columns <= tuned.GRADIENT_PANEL_SHARED and cuda_tiles.architecture() == tuned.HOPPER


def panels(layout: Layout, n_x: int, n_matrices: int) -> tuple[Kernel, int]:
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


def tiles(layout: Layout, itemsize: int, n_matrices: int) -> Kernel:
    """Return the kernel of weight gradients of blocks by tensor cores."""
    side = layout.rows
    group, kernel = _tile(layout.block_size, itemsize)
    width = side.n_block_rows * -(-side.longest_row // group)
    return kernel._replace(grid=(width * kernel.threads, 1, n_matrices))


@cache
def _tile(block_size: int, itemsize: int) -> tuple[int, Kernel]:
    """Return the blocks that a thread block of ``sddmm`` takes, and the kernel, without a grid."""
    hopper = itemsize == 2 and cuda_tiles.architecture() == tuned.HOPPER
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
        cuda_tiles.stride(width * itemsize // 16, itemsize == 4)
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
