"""The three products as CUDA kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import (
    cuda_boxes,
    cuda_float,
    cuda_fragments,
    cuda_gradients,
    cuda_graphs,
    cuda_odd,
    cuda_quantized,
    cuda_rows,
    cuda_scalars,
    cuda_small,
    cuda_tiles,
    launch,
    scalars,
)
from mlx_sparse_nn.core.backends.launch import (
    Kernel,
    KernelLaunch,
    launch_sddmm,
    launch_spmm,
    prepare,
)
from mlx_sparse_nn.core.layout import Layout, Side

NAME = "cuda"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops
TAKES_AXES = True  # of size 1 before a single row of x


def is_available() -> bool:
    """Return whether MLX has a CUDA GPU."""
    return mx.cuda.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product.

    There is none for large blocks without tiles and many rows of x, in float32 or for a weight
    gradient: MLX's own batched products are made for these. Quantized blocks have kernels of their
    own, or are multiplied as others once they are dequantized.
    """
    block_size = layout.block_size
    by_scalars = dtype != mx.float32 and op != "sddmm"
    large = block_size >= 8 and n_x > tuned.CUDA_FEW_ROWS
    if large and not by_scalars and not cuda_tiles.has_tiles(block_size, n_x, dtype):
        sizes = block_size, n_x, dtype
        if bits or not (cuda_float.takes(*sizes) or cuda_odd.takes(*sizes)):
            return False
    return launch.takes(layout, n_x, dtype, n_matrices)


def takes_edges(op: str, layout: Layout, x: mx.array) -> bool:
    """Return whether a product takes x, and y or bias, without zeros behind the matrix."""
    if _has_any_size(op, layout, x):
        return True
    block_size, n_x, itemsize = layout.block_size, x.shape[-2], x.itemsize
    if not cuda_tiles.has_tiles(block_size, n_x, x.dtype):
        return False
    if not cuda_fragments.ends_evenly(layout, itemsize):
        return False
    if op != "sddmm":
        return cuda_fragments.takes(block_size, n_x, itemsize)
    fits = cuda_fragments.takes_gradients(block_size, n_x, itemsize)
    return fits and not cuda_scalars.is_skewed(layout.rows)


def _has_any_size(op: str, layout: Layout, x: mx.array) -> bool:
    """Return whether a kernel of odd block sizes, or of true float32, computes a product."""
    block_size, n_x, dtype = layout.block_size, x.shape[-2], x.dtype
    if cuda_odd.takes(block_size, n_x, dtype):
        return True
    if not cuda_float.takes(block_size, n_x, dtype):
        return False
    return op != "sddmm" or not cuda_scalars.is_skewed(layout.rows)


def _is_cropped(op: str, layout: Layout, x: mx.array) -> bool:
    """Return whether :func:`_cropped` computes a product."""
    return _has_any_size(op, layout, x) or (layout.has_edges and takes_edges(op, layout, x))


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``.

    Where :func:`takes_edges` says so, x, y and bias have the sizes of the matrix.
    """
    if _is_cropped("spmm", layout, x):
        return _cropped(data, layout.rows, x, layout.shape[0], layout.inside, bias)
    return _product(data, layout.rows, x, layout.full_shape[0], layout.inside[1], bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    if _is_cropped("spmm_t", layout, y):
        last, inside = layout.inside
        return _cropped(data, layout.cols, y, layout.shape[1], (inside, last), None)
    return _product(data, layout.cols, y, layout.full_shape[1], layout.inside[0], None)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    if _has_any_size("sddmm", layout, x):
        if size := cuda_odd.padded_size(layout.block_size, n_x, x.dtype):
            y, x = (cuda_odd.resize_features(a, layout.block_size, size) for a in (y, x))
            padded = sddmm(layout.resized(size), y, x)
            return cuda_odd.resize_blocks(padded, layout.block_size)
        kernel, n_splits = cuda_float.gradients(layout, n_x, n_matrices)
        return launch_sddmm(NAME, kernel, layout, y, x, n_splits)
    if cuda_graphs.takes(layout.rows, layout.block_size, n_x):
        return cuda_graphs.sample(layout, y, x)
    if not cuda_tiles.has_tiles(layout.block_size, n_x, x.dtype) or cuda_scalars.is_skewed(
        layout.rows
    ):
        kernel, n_splits = cuda_scalars.gradients(layout, n_x, n_matrices)
    elif cuda_fragments.takes_gradients(layout.block_size, n_x, x.itemsize):
        kernel, n_splits = cuda_fragments.gradients(layout, n_x, x.itemsize, n_matrices)
    elif cuda_gradients.takes_panels(layout, n_x):
        kernel, n_splits = cuda_gradients.panels(layout, n_x, n_matrices)
    else:
        kernel = cuda_gradients.tiles(layout, x.itemsize, n_matrices)
        launched = prepare(NAME, "sddmm", kernel, x.dtype, T=x.dtype)
        side = layout.rows
        arrays = [y, x, side.indptr, side.indices, side.indptr]  # the last one is not read
        return launched(arrays, (*x.shape[:-2], *layout.data_shape))
    by_columns = kernel.template.get("WIDTH", 1) > 1
    return launch_sddmm(NAME, kernel, layout, y, x, n_splits, by_columns)


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks; see ``plain.qspmm``."""
    matrix, n_out, inside = (packed, scales, biases), layout.full_shape[0], layout.inside[1]
    return _quantized_product(matrix, layout.rows, x, n_out, inside, bias)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, layout: Layout, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks; see ``plain.qspmm_t``."""
    matrix, n_out, inside = (packed, scales, biases), layout.full_shape[1], layout.inside[0]
    return _quantized_product(matrix, layout.cols, y, n_out, inside, None)


def _quantized_product(
    matrix: tuple[mx.array, mx.array, mx.array],
    side: Side,
    x: mx.array,
    n_out: int,
    inside: int,
    bias: mx.array | None,
) -> mx.array:
    """Launch a kernel of packed values, or dequantize them and launch that of ``_product``."""
    if cuda_quantized.takes_packed(x.shape[-2], x.dtype):
        return cuda_quantized.product(matrix, side, x, n_out, inside, bias)
    return _product(cuda_quantized.dequantize(*matrix), side, x, n_out, inside, bias)


def _cropped(
    data: mx.array,
    side: Side,
    x: mx.array,
    n_out: int,
    inside: tuple[int, int],
    bias: mx.array | None,
) -> mx.array:
    """Launch the kernel of a product of x and y that end with the matrix.

    ``inside`` says how many rows and columns of the last blocks lie in it.
    """
    n_x, n_matrices, dtype = x.shape[-2], x.shape[0] if x.ndim == 3 else 1, x.dtype
    block_size = data.shape[-1]
    if size := cuda_odd.padded_size(block_size, n_x, dtype):
        last, cols = inside
        data = cuda_odd.resize_blocks(data, size)
        x = cuda_odd.resize_features(x, block_size, size)
        bias = None if bias is None else cuda_odd.resize_features(bias, block_size, size)
        cols = size if cols == block_size else cols
        y = _product(data, side, x, side.n_block_rows * size, cols, bias)
        return cuda_odd.resize_features(y, size, block_size, last)
    transposed = side.perm is not None
    sizes = n_x, n_matrices, block_size, inside, side.n_block_rows, transposed
    if cuda_float.takes(block_size, n_x, dtype):
        choice = cuda_float.product, *sizes
    else:
        sizes = n_x, n_matrices, block_size, inside[1], n_out, dtype.size, transposed
        choice = cuda_fragments.cropped, *sizes, cuda_tiles.is_even(side)
    return launch_spmm(_prepared(dtype, bias is not None, *choice), data, side, x, n_out, bias)


def _product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Launch the kernel of a product with a side of the matrix.

    Of the last block-column, as many columns as ``inside`` says lie in the matrix.
    """
    shape, dtype, transposed = x.shape, x.dtype, side.perm is not None
    n_x, n_matrices = shape[-2], shape[0] if len(shape) == 3 else 1
    block_size = data.shape[-1] if data.ndim > 2 else 1
    some = n_x, n_matrices, block_size, inside, n_out, transposed
    if cuda_small.takes(side, block_size, n_x, dtype):
        return cuda_small.product(data, side, x, n_out, inside, bias)
    if cuda_rows.takes_slices(side, block_size, n_x, n_out, shape[-1], dtype):
        choice = cuda_rows.slices, *some
    elif cuda_rows.takes_shares(block_size, n_x, dtype, transposed, side.n_block_rows):
        choice = cuda_rows.shares, *some, side.n_blocks, side.longest_row
    elif cuda_boxes.takes(side, n_x, n_matrices, block_size, inside, dtype):
        even = cuda_tiles.is_even(side)
        choice = cuda_boxes.boxes, n_x, n_matrices, block_size, n_out, transposed, even
    elif cuda_tiles.has_tiles(block_size, n_x, dtype):
        even = n_x > tuned.CUDA_FEW_ROWS and cuda_tiles.is_even(side)
        panels = n_x > tuned.CUDA_FEW_ROWS and cuda_tiles.takes_panels(
            side, block_size, n_out, shape[-1], dtype.size, n_x * n_matrices
        )
        sizes = n_x, n_matrices, block_size, inside, n_out
        choice = cuda_tiles.by_tensor_cores, *sizes, dtype.size, transposed, even, panels
        if not panels and cuda_fragments.takes(block_size, n_x, dtype.size):
            choice = cuda_fragments.product, *sizes, dtype.size, transposed, even
    elif cuda_graphs.takes(side, block_size, n_x):
        return cuda_graphs.product(data, side, x, n_out, bias)
    elif cuda_graphs.takes_streaming(side, block_size, n_x):
        return cuda_graphs.stream(data, side, x, n_out, bias)
    else:
        by_columns = cuda_scalars.takes_columns(n_x, block_size, shape[-1])
        return scalars.product(NAME, data, side, x, n_out, inside, bias, by_columns)
    launched = _prepared(dtype, bias is not None, *choice)
    return launch_spmm(launched, data, side, x, n_out, bias)


@lru_cache(4096)
def _prepared(
    dtype: mx.Dtype, has_bias: bool, choose_kernel: Callable[..., Kernel], *sizes: Any
) -> KernelLaunch:
    """Return what ``choose_kernel`` says of these sizes, kept: that takes longer than to launch."""
    return prepare(NAME, "spmm", choose_kernel(*sizes), dtype, T=dtype, BIAS=int(has_bias))
