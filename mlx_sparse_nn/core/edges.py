"""Edge blocks: those of the last block-row and block-column, which may reach past the matrix.

Backends multiply whole blocks. So operands get zeros where they end before the blocks do, results
lose what lies there, and a weight is cleared there before anything sums over it: it may hold
whatever a file or a user wrote, a nan included.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core.layout import Layout, Side
from mlx_sparse_nn.core.quantized import bits_of


def pad(a: mx.array, size: int) -> mx.array:
    """Return ``a (..., n)`` with zeros behind it, ``(..., size)``."""
    missing = size - a.shape[-1]
    return mx.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a


def pad_matrix(a: mx.array, block_size: int) -> mx.array:
    """Return a matrix with zeros behind and below it, so that ``block_size`` divides its shape."""
    missing = [(0, -size % block_size) for size in a.shape]
    return mx.pad(a, missing) if any(after for _, after in missing) else a


def clear_cols(layout: Layout, data: mx.array) -> mx.array:
    """Return values ``(..., n_blocks, B, B)`` with zeros behind the last column of the matrix."""
    inside = _n_inside(layout, 1)
    if inside == layout.block_size:
        return data
    return _clear(data, layout.rows.keep(_is_last_col), inside)


def clear_rows(layout: Layout, data: mx.array) -> mx.array:
    """Return values ``(..., n_blocks, B, n)`` with zeros below the last row of the matrix."""
    inside = _n_inside(layout, 0)
    if inside == layout.block_size:
        return data
    is_last = layout.rows.keep(_is_last_row)
    return _clear(data.swapaxes(-1, -2), is_last, inside).swapaxes(-1, -2)


def clear(layout: Layout, data: mx.array) -> mx.array:
    """Return values with zeros wherever they lie outside the matrix."""
    return clear_rows(layout, clear_cols(layout, data))


def clear_quantized_cols(
    layout: Layout, packed: mx.array, scales: mx.array, biases: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return quantized blocks that are finite behind the last column of the matrix.

    The group in which the matrix ends keeps its scale and bias, with zeros for integers.
    """
    inside, block_size = _n_inside(layout, 1), layout.block_size
    if inside == block_size:
        return packed, scales, biases
    is_last = layout.rows.keep(_is_last_col)
    groups = -(-inside * scales.shape[-1] // block_size)
    scales, biases = (_clear(a, is_last, groups) for a in (scales, biases))
    kept = [min(32, max(0, inside * bits_of(packed) - 32 * i)) for i in range(packed.shape[-1])]
    bits = mx.array([2**n - 1 for n in kept], mx.uint32)
    return mx.where(is_last[:, None, None], packed & bits, packed), scales, biases


def clear_quantized_rows(
    layout: Layout, packed: mx.array, scales: mx.array, biases: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return quantized blocks that are zeros below the last row of the matrix."""
    return packed, clear_rows(layout, scales), clear_rows(layout, biases)


def _n_inside(layout: Layout, axis: int) -> int:
    """Return how much of the last block lies in the matrix, along an axis."""
    return layout.block_size - layout.full_shape[axis] + layout.shape[axis]


def _clear(data: mx.array, is_last: mx.array, inside: int) -> mx.array:
    """Return ``data (..., n_blocks, m, n)`` with zeros from column ``inside`` on in last blocks."""
    outside = is_last[:, None, None] & (mx.arange(data.shape[-1]) >= inside)
    return mx.where(outside, mx.zeros((), data.dtype), data)


def _is_last_col(side: Side) -> mx.array:
    return side.indices == side.n_block_cols - 1


def _is_last_row(side: Side) -> mx.array:
    return side.row_of_block == side.n_block_rows - 1
