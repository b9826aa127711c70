"""Rows, columns and entries of a sparse matrix by their index: places on the host, values by maps.

Patterns here are of scalars. Indices are read on the host, so an array of indices cannot be one
that MLX traces.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.value_maps import Gather

OWNER = "A[...]"


def split(key: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Return what a key asks of rows and of columns: an int, a slice, or an int64 array.

    Raises:
        IndexError: There are more than two, or one is out of range or no index.
    """
    key = key if isinstance(key, tuple) else (key,)
    if Ellipsis in [k for k in key if k is Ellipsis]:
        at = [k is Ellipsis for k in key].index(True)
        key = key[:at] + (slice(None),) * (3 - len(key)) + key[at + 1 :]
    if len(key) > 2:
        raise IndexError(f"[{OWNER}] a matrix has two axes, got {len(key)} indices")
    rows, cols = (*key, slice(None), slice(None))[:2]
    return _normal(rows, shape[0], "row"), _normal(cols, shape[1], "column")


def _normal(key: Any, size: int, axis: str) -> Any:
    if isinstance(key, slice):
        return key
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        index = int(key)
        if not -size <= index < size:
            raise IndexError(f"[{OWNER}] {axis} {index} is outside a matrix of {size} {axis}s")
        return index % size
    array = np.array(key) if isinstance(key, mx.array) else np.asarray(key)
    if array.size == 0:
        return np.zeros(array.shape, np.int64)
    if array.dtype == bool:
        if array.shape != (size,):
            raise IndexError(
                f"[{OWNER}] a mask of {axis}s must have shape ({size},), got {array.shape}"
            )
        return np.flatnonzero(array)
    if array.dtype.kind not in "iu":
        raise IndexError(
            f"[{OWNER}] indices are integers, slices, arrays of integers or masks, got {key!r}"
        )
    wide = array.astype(np.int64)
    outside = (wide < (0 if array.dtype.kind == "u" else -size)) | (wide >= size)
    if outside.any():
        worst = array[outside].flat[0]
        raise IndexError(f"[{OWNER}] {axis} {worst} is outside a matrix of {size} {axis}s")
    return np.where(wide < 0, wide + size, wide)


def pairs(rows: Any, cols: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of rows and columns, of one shape.

    Raises:
        IndexError: Their shapes do not broadcast.
    """
    try:
        rows, cols = np.broadcast_arrays(rows, cols)
    except ValueError:
        shapes = f"{np.shape(rows)} and {np.shape(cols)}"
        raise IndexError(f"[{OWNER}] indices of shapes {shapes} do not broadcast") from None
    return rows, cols


def take_rows(pattern: CSRPattern, rows: np.ndarray) -> tuple[CSRPattern, Gather]:
    """Return the pattern of some rows, which may repeat, and the map to its values."""
    lengths = np.diff(pattern.indptr)[rows]
    ends = np.cumsum(lengths)
    places = np.repeat(pattern.indptr[rows] - (ends - lengths), lengths) + np.arange(lengths.sum())
    indptr = np.concatenate([[0], ends])
    taken = CSRPattern(indptr, pattern.indices[places], (rows.size, pattern.shape[1]))
    return taken, Gather(places, pattern.n_blocks)


def entries(pattern: CSRPattern, rows: np.ndarray, cols: np.ndarray) -> Gather:
    """Return the map from the values of a canonical pattern, and a zero behind them, to entries.

    Args:
        pattern: The pattern.
        rows, cols: Indices of one shape, flat.
    """
    wanted = rows * np.int64(pattern.shape[1]) + cols
    at = np.searchsorted(pattern.places, wanted)
    at = np.where(at < pattern.n_blocks, at, 0)
    stored = pattern.places[at] == wanted if pattern.n_blocks else np.zeros(wanted.shape, bool)
    return Gather(np.where(stored, at, pattern.n_blocks), pattern.n_blocks + 1)
