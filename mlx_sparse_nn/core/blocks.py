"""Blocks by their place in the matrix: cut out of it, moved, and put back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import edges
from mlx_sparse_nn.core.layout import Layout, Side
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern


def split_blocks(weight: mx.array, block_size: int) -> mx.array:
    """Return a matrix seen as blocks ``(R, C, B, B)``: a view, unless it ends within blocks.

    These are filled up with zeros. ``split_blocks(weight, B)[rows, cols]`` copies the chosen blocks
    alone.
    """
    weight = edges.pad_matrix(weight, block_size)
    n_rows, n_cols = weight.shape
    shape = (n_rows // block_size, block_size, n_cols // block_size, block_size)
    return weight.reshape(shape).swapaxes(1, 2)


def blocks_of(weight: mx.array, pattern: CSRPattern) -> mx.array:
    """Return the values ``pattern.data_shape`` that a dense matrix has in the stored blocks."""
    places = mx.array(pattern.row_indices), mx.array(pattern.indices)
    return split_blocks(weight, pattern.block_size)[places].reshape(pattern.data_shape)


def block_sources(owner: str, old: CSRPattern, new: CSRPattern) -> np.ndarray:
    """Return where ``old`` stores each block of ``new``, ``(new.n_blocks,)`` int64; -1 if nowhere.

    Raises:
        TypeError: ``new`` is not a CSRPattern.
        ValueError: Shapes or block sizes differ, or a pattern repeats a block.
    """
    check_pattern(owner, new)
    if (new.shape, new.block_size) != (old.shape, old.block_size):
        raise ValueError(
            f"[{owner}] pattern has shape {new.shape} and block_size {new.block_size}, "
            f"expected {old.shape} and {old.block_size}"
        )
    old.check_unique(owner)
    new.check_unique(owner)
    _, in_old, in_new = np.intersect1d(
        old.places, new.places, assume_unique=True, return_indices=True
    )
    source = np.full(new.n_blocks, -1, dtype=np.int64)
    source[in_new] = in_old
    return source


def move_blocks(blocks: mx.array, source: np.ndarray) -> mx.array:
    """Return ``blocks[source]`` along the first axis, with zeros where ``source`` is -1."""
    zero = mx.zeros((1, *blocks.shape[1:]), blocks.dtype)
    place = np.where(source < 0, blocks.shape[0], source).astype(np.int32)
    return mx.concatenate([blocks, zero])[mx.array(place)]


def todense(layout: Layout, data: mx.array) -> mx.array:
    """Return the dense ``(V, n_rows, n_cols)`` matrices; repeated entries add up in float32."""
    if data.dtype == mx.complex64 and mx.default_device().type is mx.gpu:  # it adds none in place
        real, imaginary = (todense(layout, part) for part in (mx.real(data), mx.imag(data)))
        return real + imaginary * mx.array(1j)
    (n_rows, n_cols), block_size, n_matrices = layout.full_shape, layout.block_size, data.shape[0]
    shape = (n_matrices, n_rows // block_size, n_cols // block_size, block_size, block_size)
    wide = mx.float32 if data.dtype in (mx.float16, mx.bfloat16) else data.dtype
    blocks = mx.zeros(shape, wide)
    if data.size:
        values = data.astype(wide).reshape(*data.shape[:2], block_size, block_size)
        blocks = blocks.at[_places(layout.rows)].add(values)
    dense = blocks.swapaxes(2, 3).reshape(n_matrices, n_rows, n_cols)
    return dense[:, : layout.shape[0], : layout.shape[1]].astype(data.dtype)


def sample(layout: Layout, dense: mx.array) -> mx.array:
    """Return the values of ``dense (V, n_rows, n_cols)`` at the stored places: :func:`todense`'s
    transpose, of shape ``(V, n_blocks)`` or ``(V, n_blocks, B, B)``."""
    (n_rows, n_cols), block_size, n_matrices = layout.full_shape, layout.block_size, dense.shape[0]
    shape = (n_matrices, *layout.data_shape)
    if 0 in shape:
        return mx.zeros(shape, dense.dtype)
    for axis, missing in ((1, n_rows - dense.shape[1]), (2, n_cols - dense.shape[2])):
        if missing:  # not by mx.pad, whose shape MLX cannot tell where it traces for every shape
            shape_of_zeros = [missing if i == axis else n for i, n in enumerate(dense.shape)]
            dense = mx.concatenate([dense, mx.zeros(shape_of_zeros, dense.dtype)], axis=axis)
    blocks = dense.reshape(
        n_matrices, n_rows // block_size, block_size, n_cols // block_size, block_size
    )
    return blocks.swapaxes(2, 3)[_places(layout.rows)].reshape(shape)


def _places(side: Side) -> tuple:
    """Return the index of the stored blocks in ``(V, R, C, ...)``."""
    return slice(None), side.row_of_block, side.indices
