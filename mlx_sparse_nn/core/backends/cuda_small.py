"""The products on CUDA of small blocks in 16 bits, by tiles put together in shared memory.

Which products, and the tile, by sizes on the host. The kernel is ``spmm_small``.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles, launch
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, launch_spmm, prepare
from mlx_sparse_nn.core.layout import Layout, Side


def takes(side: Side, block_size: int, n_x: int, dtype: mx.Dtype, n_out: int, n_in: int) -> bool:
    """Return whether a product goes by such tiles: of small blocks that do not fill the matrix.

    They walk the columns in order, and so must the blocks.
    """
    most = tuned.SMALL_DENSITY.get(block_size)
    if most is None or n_x <= tuned.CUDA_FEW_ROWS or not side.is_in_order:
        return False
    if (dtype == mx.float32 and not cuda_tiles.allows_tf32()) or n_in * dtype.size % 16:
        return False
    sparse_enough = side.n_blocks * block_size**2 <= most * n_out * n_in
    return sparse_enough and cuda_tiles.architecture() == tuned.HOPPER


def takes_gradients(layout: Layout, n_x: int, dtype: mx.Dtype) -> bool:
    """Return the same of a weight gradient."""
    few = n_x <= tuned.SMALL_GRADIENT_ROWS and layout.full_shape[0] * dtype.size % 16 == 0
    return few and takes(layout.rows, layout.block_size, n_x, dtype, *layout.full_shape)


def product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Return the product with a side of the matrix; arguments as in ``cuda._product``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    blocks = data.shape[-1], inside, side.perm is not None, bias is not None
    launched, splits, summed = _launches(x.dtype, blocks, n_x, n_matrices, n_out, x.shape[-1])
    if summed is None:
        return launch_spmm(launched, data, side, x, n_out, bias)
    shape = (*x.shape[:-1], n_out)
    perm = side.indices if side.perm is None else side.perm
    arrays = [data, side.indptr, side.indices, perm, x, x if bias is None else bias]
    partial = launched(arrays, (splits, n_matrices * n_x * n_out))
    return summed([partial], shape)


@lru_cache(4096)
def _launches(
    dtype: mx.Dtype,
    blocks: tuple[int, int, bool, bool],
    n_x: int,
    n_matrices: int,
    n_out: int,
    n_in: int,
) -> tuple[KernelLaunch, int, KernelLaunch | None]:
    """Return the launch of these sizes, in how many parts its columns go, and that of their sum."""
    block_size, inside, transposed, has_bias = blocks
    tile = tuned.SMALL_TILES[block_size][0 if n_x > tuned.SMALL_FEW_ROWS else 1]
    threads = 32 * (tile.warps_n * tile.warps_o + 4)
    panels, row_tiles = -(-n_out // tile.panel), -(-n_x // tile.rows)
    depth = 2 * tile.depth // dtype.size
    stages = -(-n_in // depth)
    splits = min(tuned.BLOCKS_TO_FILL_GPU // (panels * row_tiles * n_matrices), stages // 4)
    splits = max(1, splits)
    out = dtype if splits == 1 else mx.float32
    chunk, by_columns = 16 // dtype.size, transposed and dtype.size == 4
    x_stride = 16 * cuda_tiles.stride(depth // chunk, False)
    w_stride = 16 * cuda_tiles.stride((tile.panel if transposed else depth) // chunk, by_columns)
    w_rows = depth if transposed else tile.panel
    shared_memory = tile.stages * (tile.rows * x_stride + w_rows * w_stride) + 1024
    template = {"B": block_size, "INSIDE": inside, "ROWS": tile.rows, "PANEL": tile.panel}
    template |= {"WARPS_N": tile.warps_n, "WARPS_O": tile.warps_o, "DEPTH": depth}
    template |= {"STAGES": tile.stages, "TRANSPOSED": int(transposed), "BIAS": int(has_bias)}
    grid = (panels * splits * threads, row_tiles, n_matrices)
    kernel = Kernel("spmm_small", template, grid, threads, shared_memory)
    launched = prepare("cuda", "spmm", kernel, out, T=dtype, OUT=out)
    if splits == 1:
        return launched, 1, None
    threads = tuned.GROUP_THREADS
    size = launch.round_up(n_matrices * n_x * n_out, threads)
    summed = Kernel("sum_splits", {}, (size, 1, 1), threads)
    return launched, splits, prepare("cuda", "sum", summed, dtype, T=dtype)


def gradients(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return the weight gradient, as ``cuda.sddmm``."""
    n_matrices, side = x.shape[0] if x.ndim == 3 else 1, layout.rows
    launched = _gradient_launch(x.dtype, layout.block_size, layout.full_shape, n_matrices)
    arrays = [y, x, side.indptr, side.indices, side.indptr]  # the last one is not read
    return launched(arrays, (*x.shape[:-2], *layout.data_shape))


@lru_cache(4096)
def _gradient_launch(
    dtype: mx.Dtype, block_size: int, shape: tuple[int, int], n_matrices: int
) -> KernelLaunch:
    tile = tuned.SMALL_GRADIENT_TILES[block_size]
    threads = 32 * tile.warps_i * tile.warps_k
    itemsize, by_columns = dtype.size, dtype.size == 4
    depth = 2 * tile.depth // itemsize
    sides = (tile.rows * itemsize // 16, tile.columns * itemsize // 16)
    strides = (cuda_tiles.stride(chunks, by_columns) for chunks in sides)
    shared_memory = tile.stages * depth * 16 * sum(strides)
    shared_memory = max(shared_memory, itemsize * tile.rows * (tile.columns + 8))
    template = {"B": block_size, "TILE_I": tile.rows, "TILE_K": tile.columns}
    template |= {"WARPS_I": tile.warps_i, "WARPS_K": tile.warps_k}
    template |= {"DEPTH": depth, "STAGES": tile.stages}
    grid = (-(-shape[0] // tile.rows) * threads, -(-shape[1] // tile.columns), n_matrices)
    kernel = Kernel("sddmm_small", template, grid, threads, shared_memory)
    return prepare("cuda", "sddmm", kernel, dtype, T=dtype)
