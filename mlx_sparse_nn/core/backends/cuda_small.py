"""The products on CUDA of blocks of 8 and 12: which, and their tile.

By sizes on the host. The kernel is ``spmm_small``.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles, launch
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, launch_spmm, prepare
from mlx_sparse_nn.core.layout import Layout, Side


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether a product goes by these kernels: of small blocks that leave much unstored."""
    if layout.block_size not in tuned.SMALL_DENSITY or n_x <= tuned.CUDA_FEW_ROWS:
        return False
    if op == "sddmm":
        return takes_gradients(layout, n_x, dtype)
    side, (n_rows, n_cols) = layout.rows, layout.full_shape
    if op == "spmm_t":
        side, n_rows, n_cols = layout.cols, n_cols, n_rows
    return takes_side(side, layout.block_size, n_x, dtype, n_rows, n_cols)


def takes_side(
    side: Side, block_size: int, n_x: int, dtype: mx.Dtype, n_out: int, n_in: int
) -> bool:
    """Return the same of a product with a side: its columns are walked in order."""
    most = tuned.SMALL_DENSITY.get(block_size)
    if most is None or n_x <= tuned.CUDA_FEW_ROWS or not side.is_in_order:
        return False
    if n_in * dtype.size % 16 or (dtype == mx.float32 and not _takes_float32(block_size)):
        return False
    sparse_enough = side.n_blocks * block_size**2 <= most * n_out * n_in
    return sparse_enough and cuda_tiles.architecture() == tuned.HOPPER


def _takes_float32(block_size: int) -> bool:
    return block_size == 8 and cuda_tiles.allows_tf32()


def takes_gradients(layout: Layout, n_x: int, dtype: mx.Dtype) -> bool:
    """Return the same of a weight gradient, which is dense for more rows of x."""
    n_rows, n_cols = layout.full_shape
    if n_x > tuned.SMALL_GRADIENT_ROWS or dtype == mx.float32 or n_rows % 8:
        return False
    return takes_side(layout.rows, layout.block_size, n_x, dtype, n_rows, n_cols)


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
    threads, filling = 32 * (tile.warps + 4), tuned.BLOCKS_TO_FILL_GPU
    depth = 2 * tile.depth // dtype.size
    panels, row_tiles = -(-n_out // (2 * tile.warps * block_size)), -(-n_x // tile.rows)
    shares = max(1, min(row_tiles, filling // (panels * n_matrices)))
    splits = max(1, min(filling // (panels * shares * n_matrices), n_in // (4 * depth)))
    out = dtype if splits == 1 else mx.float32
    stride = 16 * cuda_tiles.stride(depth * dtype.size // 16, False)
    shared_memory = tile.stages * tile.rows * stride + 1024
    template = {"B": block_size, "INSIDE": inside, "ROWS": tile.rows, "WARPS": tile.warps}
    template |= {"DEPTH": depth, "STAGES": tile.stages}
    template |= {"TRANSPOSED": int(transposed), "BIAS": int(has_bias)}
    grid = (panels * splits * threads, shares, n_matrices)
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
    tile, threads = tuned.SMALL_GRADIENT_TILES[block_size], 512
    sides = tile.rows * block_size, tile.columns * block_size
    strides = (16 * cuda_tiles.stride(size // 8, False) for size in sides)
    shared_memory = tile.stages * tile.depth * sum(strides)
    template = {"B": block_size, "ROWS": tile.rows, "COLS": tile.columns, "SLOTS": tile.slots}
    template |= {"DEPTH": tile.depth, "STAGES": tile.stages}
    grid = (-(-shape[0] // sides[0]) * threads, -(-shape[1] // sides[1]), n_matrices)
    kernel = Kernel("sddmm_small", template, grid, threads, shared_memory)
    return prepare("cuda", "sddmm", kernel, dtype, T=dtype)
