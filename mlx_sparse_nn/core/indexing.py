"""Rows, columns and entries of a sparse matrix by their index: places on the host, values by maps.

Patterns here are of scalars. Indices are read on the host, so an array of indices cannot be one
that MLX traces.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_size
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.sparse import SparseArray, host
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
    rows, cols = _normal(rows, shape[0], "row"), _normal(cols, shape[1], "column")
    for index, other in ((rows, cols), (cols, rows)):
        if isinstance(other, int | slice) and isinstance(index, np.ndarray) and index.ndim != 1:
            raise IndexError(
                f"[{OWNER}] indices of rows or columns have one axis, got shape {index.shape}"
            )
    return rows, cols


def _normal(key: Any, size: int, axis: str) -> Any:
    if isinstance(key, slice):
        return key
    if isinstance(key, mx.array | np.ndarray) and key.ndim == 0:
        number = host(OWNER, key) if isinstance(key, mx.array) else key
        key = int(number) if number.dtype.kind in "iu" else key
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        index = int(key)
        if not -size <= index < size:
            raise IndexError(f"[{OWNER}] {axis} {index} is outside a matrix of {size} {axis}s")
        return index % size
    key = key.todense() if isinstance(key, SparseArray) else key
    array = host(OWNER, key) if isinstance(key, mx.array) else np.asarray(key)
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


def is_all(key: Any) -> bool:
    """Return whether a key asks for all rows or columns as they are."""
    return isinstance(key, slice) and key == slice(None)


def places_of_mask(mask: Any, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns where a mask, dense or sparse, of a matrix of this shape is true.

    Raises:
        IndexError: It is not bool, or of another shape.
        TypeError: MLX traces it.
    """
    is_mask = isinstance(mask, SparseArray) or mask.dtype in (mx.bool_, np.bool_)
    if not is_mask:
        raise IndexError(
            f"[{OWNER}] indices of rows or columns have one axis, and a mask must be bool; got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    if tuple(mask.shape) != shape or mask.dtype not in (mx.bool_, np.bool_):
        raise IndexError(
            f"[{OWNER}] a mask must be bool and of shape {shape}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if isinstance(mask, SparseArray):
        array: Any = mask
        return array.nonzero()
    rows, cols = np.nonzero(host(OWNER, mask) if isinstance(mask, mx.array) else np.asarray(mask))
    return rows, cols


def new_shape(owner: str, wanted: Any, shape: tuple[int, int]) -> tuple[int, ...]:
    """Return one or two sizes as numbers, where one may be -1, for as many places as ``shape`` has.

    Raises:
        TypeError, ValueError: They are none.
    """
    sizes = [check_size(owner, "a size", n, minimum=-1) for n in wanted]
    if len(sizes) not in (1, 2) or sizes.count(-1) > 1:
        raise ValueError(
            f"[{owner}] shape must be one or two sizes, of which one may be -1, got {wanted}"
        )
    n_places = shape[0] * shape[1]
    if -1 in sizes:
        others = -math.prod(sizes)
        sizes[sizes.index(-1)] = n_places // others if others else 0
    if math.prod(sizes) != n_places:
        raise ValueError(f"[{owner}] cannot make shape {tuple(wanted)} of {shape}")
    return tuple(check_size(owner, "a size", n) for n in sizes)


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
    wanted = rows.astype(np.int64) * pattern.shape[1] + cols
    at = np.searchsorted(pattern.places, wanted)
    at = np.where(at < pattern.n_blocks, at, 0)
    stored = pattern.places[at] == wanted if pattern.n_blocks else np.zeros(wanted.shape, bool)
    return Gather(np.where(stored, at, pattern.n_blocks), pattern.n_blocks + 1)
