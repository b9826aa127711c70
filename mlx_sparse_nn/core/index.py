"""Loops over the index arrays of patterns: by C++ where its library has been built, else by NumPy.

The results are the same bit for bit. Nothing here compiles: making a pattern waits for nobody.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends.build import built_index


class Native:
    """The library of ``cpu/index.cpp``. All arrays are contiguous and int32.

    Args:
        path: Where it lies.

    Raises:
        OSError: It cannot be loaded.
    """

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))

        def function(name: str, result: type | None, *arguments: type) -> Any:
            found = library[name]
            found.argtypes, found.restype = arguments, result
            return found

        flag, array, size = ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64
        self.in_range = function("in_range", flag, array, size, size)
        self.narrow = function("narrow", flag, array, size, array)
        self.rises = function("rises", flag, array, size, size)
        self.ascends = function("ascends", flag, array, array, size)
        self.rows_of = function("rows_of", None, array, size, array)
        self.transpose = function("transpose", None, *[array] * 2, *[size] * 2, *[array] * 3)
        self.sort_rows = function("sort_rows", None, *[array] * 3, *[size] * 3, *[array] * 3)


@cache
def native() -> Native | None:
    """Return the library if it has been built. Who builds it clears this cache."""
    try:
        path = built_index()
        return None if path is None else Native(path)
    except OSError:
        return None


def in_range(indices: np.ndarray, limit: int) -> bool:
    """Return whether all indices lie in ``[0, limit)``."""
    if (library := native()) and _is_int32(indices):
        return library.in_range(indices.ctypes.data, indices.size, limit)
    return not indices.size or bool(indices.min() >= 0 and indices.max() < limit)


def narrow(indices: np.ndarray) -> np.ndarray | None:
    """Return a copy of int64 indices as int32, or None if one is negative or does not fit."""
    if (library := native()) and indices.flags.c_contiguous:
        out = np.empty(indices.shape, np.int32)
        fits = library.narrow(indices.ctypes.data, indices.size, out.ctypes.data)
        return out if fits else None
    fits = not indices.size or (indices.min() >= 0 and indices.max() < 2**31)
    return indices.astype(np.int32) if fits else None


def rises(indptr: np.ndarray, n: int) -> bool:
    """Return whether ``indptr`` begins with 0, never decreases, and ends with ``n``."""
    if (library := native()) and _is_int32(indptr):
        return library.rises(indptr.ctypes.data, indptr.size - 1, n)
    return bool(indptr[0] == 0 and indptr[-1] == n and np.all(indptr[1:] >= indptr[:-1]))


def ascends(indptr: np.ndarray, indices: np.ndarray) -> bool:
    """Return whether the indices of every row ascend, and none repeats."""
    if library := native():
        return library.ascends(indptr.ctypes.data, indices.ctypes.data, indptr.size - 1)
    larger = indices[1:] > indices[:-1]
    starts = indptr[(indptr > 0) & (indptr < indices.size)]
    larger[starts - 1] = True
    return bool(larger.all())


def rows_of(indptr: np.ndarray) -> np.ndarray:
    """Return the row of each stored entry, ``(n,)`` int32."""
    if library := native():
        rows = np.empty(indptr[-1], np.int32)
        library.rows_of(indptr.ctypes.data, indptr.size - 1, rows.ctypes.data)
        return rows
    return np.repeat(np.arange(indptr.size - 1, dtype=np.int32), np.diff(indptr))


def transpose(
    indptr: np.ndarray, indices: np.ndarray, n_cols: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``indptr`` and ``indices`` of the transpose, and where its entries lie here.

    Entries of one column keep their order.
    """
    if library := native():
        out = _sorted(indices.size, n_cols)
        addresses = [array.ctypes.data for array in (indptr, indices, *out)]
        library.transpose(*addresses[:2], indptr.size - 1, n_cols, *addresses[2:])
        return out
    return _sort_rows(indices, rows_of(indptr), n_cols)


def sort_rows(
    rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int], places: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``indptr`` and ``indices`` of entries, and the place that each came from.

    Entries of one row keep their order.

    Args:
        rows, cols: ``(n,)`` int32, in range.
        shape: ``(n_rows, n_cols)``.
        places: ``(n,)`` int32, where each entry comes from; by default, 0 to n - 1.
    """
    if library := native():
        out = _sorted(rows.size, shape[0])
        addresses = [None if a is None else a.ctypes.data for a in (rows, cols, places, *out)]
        library.sort_rows(*addresses[:3], rows.size, *shape, *addresses[3:])
        return out
    indptr, cols, order = _sort_rows(rows, cols, shape[0])
    return indptr, cols, order if places is None else places[order]


def sort_coordinates(
    rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the same as :func:`sort_rows`, with the columns of each row sorted."""
    starts, rows, places = sort_rows(cols, rows, shape[::-1])
    return sort_rows(rows, rows_of(starts), shape, places)


def share(indices: np.ndarray) -> np.ndarray:
    """Return a copy of int32 indices that lies in the memory of an MLX array.

    :func:`on_device` gives that array. On CUDA the copy lies on the host alone, lest each side
    drags the memory to itself.
    """
    if mx.cuda.is_available():
        return indices.copy()
    return np.asarray(mx.array(np.ascontiguousarray(indices)))


def on_device(indices: np.ndarray) -> mx.array:
    """Return int32 indices as an MLX array: without a copy, if they came from :func:`share`."""
    owner = indices.base.obj if isinstance(indices.base, memoryview) else None
    if isinstance(owner, mx.array) and owner.shape == indices.shape:
        # A handle of its own: what is written by it, as by `a[0] = 1`, gets memory of its own.
        return owner[:]
    return mx.array(indices)


def _sorted(n: int, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(n_rows + 1, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)


def _sort_rows(
    rows: np.ndarray, cols: np.ndarray, n_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # NumPy sorts 16 bits by radix, ten times as fast as 32: first by the low ones, then the high.
    order = np.argsort(rows.astype(np.uint16), kind="stable")
    if n_rows > 2**16:
        order = order[np.argsort((rows >> 16).astype(np.uint16)[order], kind="stable")]
    ends = np.cumsum(np.bincount(rows, minlength=n_rows))
    indptr = np.concatenate([[0], ends]).astype(np.int32)
    return indptr, cols[order], order.astype(np.int32)


def _is_int32(indices: np.ndarray) -> bool:
    return indices.dtype == np.int32 and indices.flags.c_contiguous
