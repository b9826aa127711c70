"""The products of quantized blocks on CUDA: which kernel, and how it is shared.

Values are computed from packed ones on their way to the tensor cores. With so many rows of x that
this pays no more, a kernel writes them all to device memory first, and they are multiplied as those
of other blocks are.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, prepare
from mlx_sparse_nn.core.layout import Side
from mlx_sparse_nn.core.quantized import bits_of

NAME = "cuda"
Matrix = tuple[mx.array, mx.array, mx.array]  # packed, scales, biases


def takes_packed(n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether a kernel multiplies packed values by ``n_x`` rows of x."""
    most = tuned.CUDA_FEW_ROWS if dtype == mx.float32 else tuned.CUDA_QUANTIZED_ROWS
    return n_x <= most


def product(
    matrix: Matrix, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Return the product of packed values with a side of the matrix, ``(..., N, n_out)``.

    Args:
        matrix: Packed values, scales and biases.
        side: The matrix, or its transpose.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``.
        n_out: Rows of the side, in scalars.
        inside: How many columns of the last block-column lie in the matrix.
        bias: ``(n_out,)``, or None.
    """
    packed, scales, _ = matrix
    shape, block_size = x.shape, packed.shape[-2]
    launched = _of_packed(
        x.dtype,
        (bits_of(packed), block_size // scales.shape[-1], block_size, inside),
        (shape[-2], n_out, shape[0] if len(shape) == 3 else 1),
        side.perm is not None,
        bias is not None,
    )
    perm = side.indices if side.perm is None else side.perm
    arrays = [*matrix, side.indptr, side.indices, perm, x, x if bias is None else bias]
    return launched(arrays, (*shape[:-1], n_out))


def dequantize(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """Return the values of blocks ``(..., n_blocks, B, B)``, of the dtype of the scales."""
    block_size = packed.shape[-2]
    sizes = bits_of(packed), block_size // scales.shape[-1], block_size
    shape = (*packed.shape[:-1], block_size)
    launched = _of_blocks(scales.dtype, *sizes, packed.size // packed.shape[-1])
    return launched([packed, scales, biases], shape)


@lru_cache(4096)
def _of_packed(
    dtype: mx.Dtype,
    blocks: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    transposed: bool,
    has_bias: bool,
) -> KernelLaunch:
    """Return the launch of these sizes, kept: to choose takes longer than to launch."""
    (bits, group_size, block_size, inside), (n_x, n_out, n_matrices) = blocks, sizes
    if n_x <= tuned.CUDA_FEW_ROWS and (dtype == mx.float32 or not transposed):
        name, tile = "qspmm_few", tuned.FEW_QUANTIZED_STRIP
        tile = tile if n_x <= tile.rows else tile._replace(rows=2 * tile.rows)
        shared_memory = 4 * tile.warps * tile.rows * (tile.strip + 5)
        template = {"DEPTH": tile.steps}
    else:
        name, tile = "qspmm_rows", _tile(block_size, n_x)
        sums = 4 * tile.warps * tile.rows * (tile.strip + 4)
        shared_memory = max(sums, 64 * tile.warps * tile.rows * tile.steps)
        template = {"STAGES": tile.steps}
    template |= {"STRIP": tile.strip, "ROWS": tile.rows, "WARPS": tile.warps}
    threads = 32 * tile.warps
    grid = (n_out // tile.strip * threads, -(-n_x // tile.rows), n_matrices)
    kernel = Kernel(name, template, grid, threads, shared_memory)
    options = {"BITS": bits, "GROUP_SIZE": group_size, "B": block_size, "INSIDE": inside}
    options |= {"TRANSPOSED": int(transposed), "BIAS": int(has_bias)}
    return prepare(NAME, "qspmm", kernel, dtype, T=dtype, **options)


def _tile(block_size: int, n_x: int) -> tuned.QuantizedStrip:
    """Return the thread block of ``qspmm_rows``."""
    rows = next(rows for rows in tuned.QUANTIZED_STRIPS if n_x <= rows)
    tile = tuned.QUANTIZED_STRIPS[rows]
    if block_size % tile.strip:
        tile = tile._replace(strip=32)
    large = cuda_tiles.architecture() in tuned.LARGE_SHARED_MEMORY
    return tile if large else tile._replace(warps=min(4, tile.warps))


@lru_cache(4096)
def _of_blocks(
    dtype: mx.Dtype, bits: int, group_size: int, block_size: int, n_rows: int
) -> KernelLaunch:
    """Return the launch that dequantizes so many stored rows."""
    turns, threads = tuned.CUDA_DEQUANTIZED_TURNS, block_size * max(1, 256 // block_size)
    template = {"BITS": bits, "GROUP_SIZE": group_size, "B": block_size}
    template |= {"THREADS": threads, "TURNS": turns}
    grid = (-(-n_rows * block_size // (8 * threads * turns)) * threads, 1, 1)
    return prepare(
        NAME, "dequantize", Kernel("dequantize", template, grid, threads), dtype, T=dtype
    )
