"""The products on CUDA through the dense matrix: one kernel writes it, and MLX multiplies.

So no product takes much longer than the dense layer's, whatever the blocks: where blocks are small
and much of the matrix is stored, a dense product's tensor cores are faster than kernels that look
for every value. The weight gradient is a dense one, of which a kernel takes the stored places.

The dense matrix lives as long as the product that reads it. Its size is bounded.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_small, cuda_tiles, launch
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, prepare, round_up
from mlx_sparse_nn.core.layout import Layout

NAME = "cuda-dense"
TAKES_EDGES = True
_FOLDER = "cuda"


def is_available() -> bool:
    """Return whether MLX has a CUDA GPU."""
    return mx.cuda.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether a product is faster through the dense matrix than by stored blocks."""
    if n_x < tuned.DENSE_LEAST_ROWS or bits or not launch.takes(layout, n_x, dtype, n_matrices):
        return False
    (n_rows, n_cols), block_size = layout.full_shape, layout.block_size
    size = n_rows * n_cols
    if size * dtype.size * n_matrices > tuned.DENSE_BYTES or not _has_strips(layout):
        return False
    least = _least_density(op, block_size, dtype, n_x, cuda_tiles.allows_tf32())
    if layout.data_shape[0] * block_size**2 < least * size or not layout.rows.is_in_order:
        return False
    return op != "spmm" or not cuda_small.takes(layout.rows, block_size, n_x, dtype)


def _has_strips(layout: Layout) -> bool:
    """Return whether rows are long enough for a thread block to write, and so few that all fit."""
    n_rows, n_cols = layout.full_shape
    few_enough = n_rows <= launch.MAX_THREADS // tuned.GROUP_THREADS
    return few_enough and n_cols * min(layout.block_size, 16) >= tuned.DENSE_LEAST_STRIP


@lru_cache(4096)
def _least_density(op: str, block_size: int, dtype: mx.Dtype, n_x: int, tf32: bool) -> float:
    """Return the share of stored values from which a product is dense."""
    kind = "16 bits" if dtype.size == 2 else "tf32" if tf32 else "float32"
    rules = tuned.DENSE_FROM[kind]["sddmm" if op == "sddmm" else "spmm"]
    rule = rules.get(block_size) or rules[_kind_of_blocks(op, block_size, dtype)]
    return rule.density + rule.per_row / n_x


def _kind_of_blocks(op: str, block_size: int, dtype: mx.Dtype) -> str:
    """Return what multiplies stored blocks: tiles, of odd sizes too, scalars, or plain MLX."""
    if 8 <= block_size <= tuned.MAX_TILED_BLOCK:
        return "odd" if block_size % 8 else "tiles"
    if block_size < 8 or (dtype.size == 2 and op != "sddmm"):
        return "scalars"
    return "large"


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    matrix = expand(layout, data).swapaxes(-1, -2)
    if bias is None:
        return x @ matrix
    if x.ndim == 2:
        return mx.addmm(bias, x, matrix)
    # MLX (0.32.4) rounds a batched addmm twice on CUDA.
    return mx.stack([mx.addmm(bias, x[v], matrix[v]) for v in range(x.shape[0])])


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    return y @ expand(layout, data)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    return sample(layout, y.swapaxes(-1, -2) @ x)


def expand(layout: Layout, data: mx.array) -> mx.array:
    """Return the dense matrix ``(n_rows, n_cols)`` or ``(V, n_rows, n_cols)`` of stored values."""
    lead = data.shape[: data.ndim - len(layout.data_shape)]
    launched, sizes = _expansion(layout.shape, layout.block_size, data.dtype, *lead)
    side = layout.rows
    return launched([data, side.indptr, side.indices, sizes], (*lead, *layout.shape))


def sample(layout: Layout, matrix: mx.array) -> mx.array:
    """Return the values of a dense matrix at the stored places, zeros where they lie outside."""
    side, lead = layout.rows, matrix.shape[:-2]
    launched, sizes = _sampling(layout.shape, layout.block_size, matrix.dtype, side.n_blocks, *lead)
    return launched([matrix, side.indptr, side.indices, sizes], (*lead, *layout.data_shape))


@lru_cache(4096)
def _expansion(
    shape: tuple[int, int], block_size: int, dtype: mx.Dtype, n_matrices: int = 1
) -> tuple[KernelLaunch, mx.array]:
    """Return the launch that writes a dense matrix, and the sizes that it takes."""
    (n_rows, n_cols), threads = shape, tuned.GROUP_THREADS
    held = tuned.DENSE_STRIP_BYTES // dtype.size  # elements
    width = min(held, round_up(n_cols, 16 // dtype.size))
    height = _height(block_size, held // width)
    strips = -(-n_rows // block_size) * -(-block_size // height)
    grid = (strips * threads, -(-n_cols // width), n_matrices)
    template = {"B": block_size, "HEIGHT": height}
    kernel = Kernel("expand", template, grid, threads, tuned.DENSE_STRIP_BYTES)
    launched = prepare(_FOLDER, "expand", kernel, dtype, T=dtype)
    return launched, _on_device(n_rows, n_cols, width)


@lru_cache(4096)
def _sampling(
    shape: tuple[int, int], block_size: int, dtype: mx.Dtype, n_blocks: int, n_matrices: int = 1
) -> tuple[KernelLaunch, mx.array]:
    """Return the launch that takes the stored places of a dense matrix, and the sizes."""
    height, threads = _height(block_size, 16), tuned.GROUP_THREADS
    strips = -(-shape[0] // block_size) * -(-block_size // height)
    values = n_blocks * block_size**2 // strips  # of a group, if it takes all of a strip
    shares = max(1, min(values // (4 * threads), tuned.DENSE_SAMPLING_GROUPS // strips))
    grid = (strips * threads, shares, n_matrices)
    kernel = Kernel("sample", {"B": block_size, "HEIGHT": height}, grid, threads)
    launched = prepare(_FOLDER, "sample", kernel, dtype, T=dtype)
    return launched, _on_device(*shape)


def _on_device(*sizes: int) -> mx.array:
    """Return sizes for a kernel. MLX (0.32.4) leaves arrays of up to 8 bytes in the host's memory,
    from which a kernel reads them for 10 microseconds."""
    return mx.array([*sizes, 0, 0], dtype=mx.int32)


def _height(block_size: int, most: int) -> int:
    """Return the rows of each strip of a block: at most ``most``, and as even as can be."""
    strips = -(-block_size // max(1, most))
    return -(-block_size // strips)
