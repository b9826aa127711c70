"""The products of quantized blocks on CUDA: which kernel, and how it is shared.

Up to some number of rows of x, values are dequantized in the registers of a product. For more, a
kernel writes all blocks to device memory first, and they are multiplied as any others.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, prepare
from mlx_sparse_nn.core.layout import Side
from mlx_sparse_nn.core.quantized import bits_of

NAME = "cuda"
Matrix = tuple[mx.array, mx.array, mx.array]


def takes_packed(x: mx.array) -> bool:
    """Return whether a kernel multiplies packed values by ``x (..., N, n_cols)``."""
    n_x = x.shape[-2]
    return n_x <= tuned.CUDA_FEW_ROWS or (x.dtype != mx.float32 and n_x <= tuned.CUDA_PACKED_ROWS)


def product(
    matrix: Matrix, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Return the product with a side of the matrix, ``(..., N, n_out)``.

    Args:
        matrix: Packed values, scales and biases.
        side: The matrix, or its transpose.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``.
        n_out: Rows of the side, in scalars.
        inside: How many columns of the last block-column lie in the matrix.
        bias: ``(n_out,)``, or None.
    """
    packed, scales, _ = matrix
    shape, transposed = x.shape, side.perm is not None
    launched = _of_packed(
        x.dtype,
        (bits_of(packed), packed.shape[-2] // scales.shape[-1], packed.shape[-2], inside),
        (shape[-2], n_out, shape[0] if len(shape) == 3 else 1),
        transposed,
        bias is not None,
    )
    perm = side.indices if side.perm is None else side.perm
    arrays = [*matrix, side.indptr, side.indices, perm, x, x if bias is None else bias]
    return launched(arrays, (*shape[:-1], n_out))


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
    strip, rows, warps, depth = shares(block_size, n_x, n_out, n_matrices, transposed)
    template = {"STRIP": strip, "ROWS": rows, "WARPS": warps, "DEPTH": depth}
    template |= {"BITS": bits, "GROUP_SIZE": group_size, "B": block_size, "INSIDE": inside}
    template |= {"TRANSPOSED": int(transposed), "BIAS": int(has_bias)}
    grid = (n_out // strip * 32 * warps, -(-n_x // rows), n_matrices)
    name = "qspmm_few" if by_integers(n_x, dtype, transposed) else "qspmm_rows"
    kernel = Kernel(name, template, grid, 32 * warps, 4 * warps * rows * (strip + 5))
    return prepare(NAME, "qspmm", kernel, dtype, T=dtype)


def by_integers(n_x: int, dtype: mx.Dtype, transposed: bool) -> bool:
    """Return whether tensor cores multiply the integers, and sums are scaled."""
    return n_x <= 16 and (dtype == mx.float32 or not transposed)


def shares(
    block_size: int, n_x: int, n_out: int, n_matrices: int, transposed: bool
) -> tuple[int, int, int, int]:
    """Return outputs, rows of x and warps of a thread block, and the pieces that a warp loads."""
    rows = min(64, -(-n_x // 8) * 8)
    if rows > 16:
        rows = 32 if rows <= 32 else 64
    strip = 64 if rows == 64 and block_size % 64 == 0 else 32
    if rows <= 16:
        return strip, rows, 16, 2
    return strip, rows, 8, 1


def dequantize(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """Return the values of blocks ``(..., n_blocks, B, B)``, of the dtype of the scales."""
    block_size = packed.shape[-2]
    sizes = bits_of(packed), block_size // scales.shape[-1], block_size
    shape = (*packed.shape[:-1], block_size)
    launched = _of_blocks(scales.dtype, *sizes, packed.size // packed.shape[-1])
    return launched([packed, scales, biases], shape)


@lru_cache(4096)
def _of_blocks(
    dtype: mx.Dtype, bits: int, group_size: int, block_size: int, n_rows: int
) -> KernelLaunch:
    turns = 2
    template = {"BITS": bits, "GROUP_SIZE": group_size, "B": block_size, "TURNS": turns}
    grid = (-(-n_rows * block_size // (2048 * turns)) * 256, 1, 1)
    return prepare(NAME, "dequantize", Kernel("dequantize", template, grid, 256), dtype, T=dtype)
