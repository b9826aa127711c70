"""The products of quantized blocks on CUDA: which kernel, and how it is shared.

Values are computed from packed ones on their way to the tensor cores. With so many rows of x that
this pays no more, a kernel writes them all to device memory first, and they are multiplied as those
of other blocks.
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


def takes_packed(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether a kernel multiplies packed values by ``n_x`` rows of x."""
    if n_x <= tuned.CUDA_FEW_ROWS:
        return True
    if dtype == mx.float32:
        return False
    return n_x <= tuned.CUDA_QUANTIZED_ROWS or (
        _suits_warpgroups(block_size) and n_x <= tuned.CUDA_QUANTIZED_MANY_ROWS
    )


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
        cuda_tiles.is_even(side),
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
    even: bool,
) -> KernelLaunch:
    """Return the launch of these sizes, kept: to choose takes longer than to launch."""
    (bits, group_size, block_size, inside), (n_x, n_out, n_matrices) = blocks, sizes
    if n_x <= tuned.CUDA_FEW_ROWS and (dtype == mx.float32 or not transposed):
        kernel = _few(block_size, n_x, n_out, n_matrices, transposed)
    elif n_x <= tuned.CUDA_QUANTIZED_ROWS or not _suits_warpgroups(block_size):
        kernel = _some(block_size, n_x, n_out, n_matrices)
    else:
        kernel = _many(block_size, n_x, n_out, n_matrices, even)
    options = {"BITS": bits, "GROUP_SIZE": group_size, "B": block_size, "INSIDE": inside}
    options |= {"TRANSPOSED": int(transposed), "BIAS": int(has_bias)}
    return prepare(NAME, "qspmm", kernel, dtype, T=dtype, **options)


def _few(block_size: int, n_x: int, n_out: int, n_matrices: int, transposed: bool) -> Kernel:
    """Return the kernel of few rows of x: its factors are the integers as they are."""
    rows = 8 if n_x <= 8 else 16
    strip = 32 if transposed or block_size % 64 or rows == 16 else 64
    return _by_strips("qspmm_few", strip, rows, 16, {"DEPTH": 2}, n_x, n_out, n_matrices)


def _some(block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Return the kernel of some rows of x: it computes values in registers."""
    rows = next(rows for rows in (8, 16, 32, 64) if n_x <= rows or rows == 64)
    strip = 64 if block_size % 64 == 0 else 32
    warps = 4 if rows == 64 else 8
    return _by_strips("qspmm_rows", strip, rows, warps, {"DEPTH": 1}, n_x, n_out, n_matrices)


def _by_strips(
    name: str,
    strip: int,
    rows: int,
    warps: int,
    template: dict[str, int],
    n_x: int,
    n_out: int,
    n_matrices: int,
) -> Kernel:
    """Return a kernel whose thread blocks have ``strip`` outputs and ``rows`` rows of x."""
    grid = (n_out // strip * 32 * warps, -(-n_x // rows), n_matrices)
    template = template | {"STRIP": strip, "ROWS": rows, "WARPS": warps}
    return Kernel(name, template, grid, 32 * warps, 4 * warps * rows * (strip + 5))


def _many(block_size: int, n_x: int, n_out: int, n_matrices: int, even: bool) -> Kernel:
    """Return the kernel of many rows of x, by warpgroups."""
    n_block_rows, filling = n_out // block_size, tuned.BLOCKS_TO_FILL_GPU
    rows, warpgroups, stages = 128, 2, 6
    tiles = -(-n_x // rows)
    shares = max(-(-tiles // 8), -(-filling // (n_block_rows * n_matrices))) if even else tiles
    shares = min(tiles, shares)
    threads = 128 * (warpgroups + 1)
    template = {"ROWS": rows, "WARPGROUPS": warpgroups, "STAGES": stages}
    grid = (n_block_rows * threads, shares, n_matrices)
    shared_memory = stages * (rows + block_size) * 128 + 1024
    return Kernel("qspmm_wgmma", template, grid, threads, shared_memory)


def _suits_warpgroups(block_size: int) -> bool:
    return block_size in tuned.WGMMA_STAGES and cuda_tiles.architecture() == tuned.HOPPER


@lru_cache(4096)
def _of_blocks(
    dtype: mx.Dtype, bits: int, group_size: int, block_size: int, n_rows: int
) -> KernelLaunch:
    """Return the launch that dequantizes so many stored rows."""
    turns, threads = tuned.CUDA_DEQUANTIZED_TURNS, block_size * max(1, 256 // block_size)
    template = {"BITS": bits, "GROUP_SIZE": group_size, "B": block_size}
    template |= {"THREADS": threads, "TURNS": turns}
    grid = (-(-n_rows * block_size // (8 * threads * turns)) * threads, 1, 1)
    return prepare(NAME, "dequantize", Kernel("dequantize", template, grid, threads), dtype, T=dtype)
