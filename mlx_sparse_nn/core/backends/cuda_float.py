"""The products in true float32, by CUDA cores: which kernel, and its tile.

Chosen from shapes and from the sizes of the layout, on the host.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, power_of_two, round_up
from mlx_sparse_nn.core.layout import Layout


def takes(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether CUDA cores multiply such blocks: where TF32 is not allowed, or tensor cores
    have no tiles."""
    if dtype != mx.float32 or n_x <= tuned.CUDA_FEW_ROWS:
        return False
    is_block = 8 <= block_size <= tuned.MAX_TILED_BLOCK
    return is_block and not cuda_tiles.has_tiles(block_size, n_x, dtype)


def product(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: tuple[int, int],
    n_block_rows: int,
    transposed: bool,
) -> Kernel:
    """Return the kernel of blocks of float32, in thread blocks enough to fill a GPU."""
    tile = _tile(block_size, n_x, n_block_rows * n_matrices)
    return spmm_kernel(n_x, n_matrices, block_size, inside, n_block_rows, transposed, tile)


def spmm_kernel(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: tuple[int, int],
    n_block_rows: int,
    transposed: bool,
    tile: tuned.FloatTile,
) -> Kernel:
    """Return ``spmm_float`` by thread blocks of a tile."""
    rows, width, held, outputs, slices, depth, stages = tile
    stride = (depth // 4 | 1) * 4
    w_tile = depth * width if transposed else width * stride
    floats = stages * (rows * stride + w_tile)
    if slices > 1:
        floats = max(floats, slices * rows * (width + 4))
    threads = round_up(rows // held * (width // outputs) * slices, 32)
    template = {"B": block_size, "INSIDE": inside[1], "LAST": inside[0]}
    template |= {"ROWS": rows, "WIDTH": width}
    template |= {"TN": held, "TO": outputs, "SLICES": slices, "DEPTH": depth, "STAGES": stages}
    template["TRANSPOSED"] = int(transposed)
    grid = n_block_rows * -(-block_size // width) * threads, -(-n_x // rows), n_matrices
    return Kernel("spmm_float", template, grid, threads, 4 * floats)


def _tile(block_size: int, n_x: int, n_groups: int) -> tuned.FloatTile:
    """Return the tile of a thread block: a large one, if there are enough of them to fill a GPU."""
    outputs = _held(block_size)
    width = round_up(block_size, outputs)
    rows, slices = 256 if width <= 32 else 128, max(1, 4 * outputs // width)
    threads = rows // 8 * (width // outputs) * slices
    if n_x >= rows and n_groups * -(-n_x // rows) * threads >= tuned.FLOAT_THREADS:
        depth, stages = (16, 3) if slices == 1 else (32, 2)
        return tuned.FloatTile(rows, width, 8, outputs, slices, depth, stages)
    # Some rows: the depth is shared among up to 256 threads, and blocks among thread blocks.
    strips = 1 if block_size <= 40 else -(-block_size // 32)
    width = round_up(-(-block_size // strips), outputs)
    rows = 32 if n_x <= 32 else 64
    held = 4 if rows == 32 or width == outputs else 8
    lanes = rows // held * (width // outputs)
    slices = min(16, power_of_two(256 // lanes + 1) // 2)
    return tuned.FloatTile(rows, width, held, outputs, slices, 64, 3)


def _held(block_size: int) -> int:
    """Return how many outputs of a block a thread holds: 8, unless many would be none of it."""
    return 8 if 8 * round_up(block_size, 8) <= 9 * block_size else 4


def gradients(layout: Layout, n_x: int, n_matrices: int) -> tuple[Kernel, int]:
    """Return the kernel of weight gradients, and in how many parts the rows go."""
    block_size, side = layout.block_size, layout.rows
    tile = _gradient_tile(block_size)
    groups = side.n_block_rows * -(-side.longest_row // tile.group)
    n_splits = max(1, min(2 * tuned.BLOCKS_TO_FILL_GPU // (groups * n_matrices), n_x // 256))
    return sddmm_kernel(block_size, groups, n_matrices, tile), n_splits


def sddmm_kernel(
    block_size: int, n_groups: int, n_matrices: int, tile: tuned.FloatGradientTile
) -> Kernel:
    """Return ``sddmm_float`` by thread blocks of a tile."""
    group, rows, cols, slices, depth, stages = tile
    height, width = round_up(block_size, rows), group * round_up(block_size, 4)
    floats = stages * depth * (height + width)
    if slices > 1:
        floats = max(floats, slices * height * (width + 4))
    threads = round_up(height // rows * (width // cols) * slices, 32)
    template = {"B": block_size, "GROUP": group, "TI": rows, "TK": cols}
    template |= {"SLICES": slices, "DEPTH": depth, "STAGES": stages}
    return Kernel("sddmm_float", template, (n_groups * threads, 1, n_matrices), threads, 4 * floats)


@cache
def _gradient_tile(block_size: int) -> tuned.FloatGradientTile:
    """Return the tile of a thread block of weight gradients."""
    rows = _held(block_size)
    padded = round_up(block_size, 4)
    group = max(1, 256 // padded) if block_size <= 32 else max(1, 128 // padded)
    if padded % 8:
        group += group % 2
    threads = round_up(block_size, rows) // rows * (group * padded // 8)
    slices = 4 if threads <= 32 else 2 if threads <= 64 else 1
    return tuned.FloatGradientTile(group, rows, 8, slices, 16, 3)
