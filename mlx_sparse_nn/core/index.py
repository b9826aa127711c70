"""Loops over the index arrays of patterns: by C++ where its library has been built, else by NumPy.

The results are the same bit for bit. Nothing here compiles: making a pattern waits for nobody.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends.build import built_index

# Of entries: where each row starts, the column of each, and the place that each came from.
Sorted: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray]"
# indptr and indices.
Csr: TypeAlias = "tuple[np.ndarray, np.ndarray]"


class Memory(Protocol):
    """What makes MLX arrays without copies: the binding of C++."""

    def indices(self, n: int) -> mx.array: ...
    def unsigned(self, indices: mx.array) -> mx.array: ...


_memory: Memory | None = None  # where C++ is loaded


class Places(NamedTuple):
    """The places of a canonical pattern, each of one or more entries.

    Attributes:
        indptr, indices: Of the pattern.
        starts: Where the entries of each place begin.
    """

    indptr: np.ndarray
    indices: np.ndarray
    starts: np.ndarray


class Native:
    """The library of ``cpu/index.cpp``, by the names of this module. Arrays are contiguous, int32.

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
        out, entries = [array] * 4, [array, array, size, size, size]
        self._in_range = function("in_range", flag, array, size, size)
        self._copy_in_range = function("copy_in_range", flag, array, size, size, array)
        self._narrow = function("narrow", flag, array, size, size, array)
        self._rises = function("rises", flag, array, size, size)
        self._ascends = function("ascends", flag, array, array, size)
        self._rows_of = function("rows_of", None, array, size, array)
        self._room_for = function("room_for", size, size)
        self._transpose = function("transpose", None, array, array, size, size, *out)
        self._sort_rows = function("sort_rows", None, *entries, *out)
        self._unite = function("unite", size, *[array] * 4, size, *out)
        self._n_pairs = function("n_pairs", size, array, size, array)
        self._room_for_places = function("room_for_places", size, size, size, size)
        operands = [array, array, size, array, array]
        self._multiply = function("multiply", size, *operands, size, size, *[array] * 3)
        self._pairs = function("pairs", None, *operands, *[array] * 6)
        self._sort_coordinates = function("sort_coordinates", None, *entries, *out, array)

    def in_range(self, indices: np.ndarray, limit: int) -> bool:
        return self._in_range(_address(indices), indices.size, limit)

    def copy_in_range(self, indices: np.ndarray, limit: int) -> np.ndarray | None:
        out = empty(indices.size)
        copy = self._copy_in_range if indices.dtype == np.int32 else self._narrow
        return out if copy(_address(indices), indices.size, limit, _address(out)) else None

    def rises(self, indptr: np.ndarray, n: int) -> bool:
        return self._rises(_address(indptr), indptr.size - 1, n)

    def ascends(self, indptr: np.ndarray, indices: np.ndarray) -> bool:
        return self._ascends(_address(indptr), _address(indices), indptr.size - 1)

    def rows_of(self, indptr: np.ndarray) -> np.ndarray:
        rows = np.empty(indptr[-1], np.int32)
        self._rows_of(_address(indptr), indptr.size - 1, _address(rows))
        return rows

    def transpose(self, indptr: np.ndarray, indices: np.ndarray, n_cols: int) -> Sorted:
        out, room = self._empty(indices.size, n_cols)
        arrays, n_rows = map(_address, (indptr, indices)), indptr.size - 1
        self._transpose(*arrays, n_rows, n_cols, *map(_address, (*out, room)))
        return out

    def sort_rows(self, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> Sorted:
        out, room = self._empty(rows.size, shape[0])
        arrays = map(_address, (rows, cols))
        self._sort_rows(*arrays, rows.size, *shape, *map(_address, (*out, room)))
        return out

    def sort_coordinates(
        self, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]
    ) -> Sorted:
        out, room = self._empty(rows.size, shape[0])
        first = np.empty(shape[1] + 1, np.int32)
        arrays = map(_address, (rows, cols))
        self._sort_coordinates(*arrays, rows.size, *shape, *map(_address, (*out, room, first)))
        return out

    def unite(self, a: Csr, b: Csr) -> tuple[Places, np.ndarray]:
        n_rows, n = a[0].size - 1, a[1].size + b[1].size
        indptr = np.empty(n_rows + 1, np.int32)
        indices, order, starts = (np.empty(n, np.int32) for _ in range(3))
        operands = map(_address, (*a, *b))
        out = map(_address, (indptr, indices, order, starts))
        found = self._unite(*operands, n_rows, *out)
        return Places(indptr, indices[:found].copy(), starts[:found].copy()), order

    def n_pairs(self, a: Csr, b: Csr) -> int:
        return self._n_pairs(_address(a[1]), a[1].size, _address(b[0]))

    def multiply(self, a: Csr, b: Csr, n_cols: int, most: int) -> Csr:
        indptr, indices = np.empty(a[0].size, np.int32), np.empty(most, np.int32)
        n_inner = b[0].size - 1
        room = np.empty(self._room_for_places(n_inner, n_cols, b[1].size), np.uint64)
        operands = *map(_address, a), a[0].size - 1, *map(_address, b), n_inner, n_cols
        found = self._multiply(*operands, *map(_address, (indptr, indices, room)))
        return indptr, share(indices[:found])

    def pairs(
        self, a: Csr, b: Csr, c: Csr, n_cols: int, n: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = c[1].size + 1, n, n, n_cols
        starts, of_a, of_b, place_of = (np.empty(size, np.int32) for size in sizes)
        operands = *map(_address, a), a[0].size - 1, *map(_address, b), *map(_address, c)
        self._pairs(*operands, *map(_address, (starts, of_a, of_b, place_of)))
        return starts, of_a, of_b

    def _empty(self, n: int, n_rows: int) -> tuple[Sorted, np.ndarray]:
        """Return the arrays of n sorted entries, and what sorting them takes besides."""
        out = empty(n_rows + 1), empty(n), empty(n)
        return out, np.empty(self._room_for(n), np.int64)


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
    if (library := native()) and indices.dtype == np.int32:
        return library.in_range(indices, limit)
    return not indices.size or bool(indices.min() >= 0 and indices.max() < limit)


def copy_in_range(indices: np.ndarray, limit: int = 2**31) -> np.ndarray | None:
    """Return a copy of int32 or int64 indices as int32, in memory that :func:`on_device` shares;
    or None if one of them is not in ``[0, limit)``."""
    if (library := native()) and indices.flags.c_contiguous:
        return library.copy_in_range(indices, min(limit, 2**31))
    copied = share(indices) if indices.dtype == np.int32 else indices.copy()
    if not in_range(copied, min(limit, 2**31)):
        return None
    return copied if copied.dtype == np.int32 else copied.astype(np.int32)


def rises(indptr: np.ndarray, n: int) -> bool:
    """Return whether ``indptr`` begins with 0, never decreases, and ends with ``n``."""
    if library := native():
        return library.rises(indptr, n)
    return bool(indptr[0] == 0 and indptr[-1] == n and np.all(indptr[1:] >= indptr[:-1]))


def ascends(indptr: np.ndarray, indices: np.ndarray) -> bool:
    """Return whether the indices of every row ascend, and none repeats."""
    if library := native():
        return library.ascends(indptr, indices)
    larger = indices[1:] > indices[:-1]
    starts = indptr[(indptr > 0) & (indptr < indices.size)]
    larger[starts - 1] = True
    return bool(larger.all())


def rows_of(indptr: np.ndarray) -> np.ndarray:
    """Return the row of each stored entry, ``(n,)`` int32."""
    if library := native():
        return library.rows_of(indptr)
    return np.repeat(np.arange(indptr.size - 1, dtype=np.int32), np.diff(indptr))


def transpose(indptr: np.ndarray, indices: np.ndarray, n_cols: int) -> Sorted:
    """Return the transpose of a CSR. Entries of one column keep their order."""
    if library := native():
        return library.transpose(indptr, indices, n_cols)
    return _sort_rows(indices, rows_of(indptr), n_cols)


def sort_rows(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> Sorted:
    """Return the CSR of entries ``(n,)`` int32 in range. Those of one row keep their order."""
    if library := native():
        return library.sort_rows(rows, cols, shape)
    return _sort_rows(rows, cols, shape[0])


def sort_coordinates(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> Sorted:
    """Return the same with the columns of each row sorted. Equal ones keep their order."""
    if library := native():
        return library.sort_coordinates(rows, cols, shape)
    by_column = _order(cols, shape[1])
    indptr, indices, order = _sort_rows(rows[by_column], cols[by_column], shape[0])
    return indptr, indices, by_column[order].astype(np.int32)


def merge(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> tuple[Places, np.ndarray]:
    """Return the places of entries ``(n,)`` int32, and the order of entries by their places."""
    indptr, indices, order = sort_coordinates(rows, cols, shape)
    if ascends(indptr, indices):
        return Places(indptr, indices, np.arange(rows.size, dtype=np.int32)), order
    rows = rows_of(indptr)
    first = np.concatenate([[True], (np.diff(rows) != 0) | (np.diff(indices) != 0)])
    indptr = np.concatenate([[0], np.cumsum(first)]).astype(np.int32)[indptr]
    return Places(indptr, indices[first], np.flatnonzero(first).astype(np.int32)), order


def unite(a: Csr, b: Csr, n_cols: int) -> tuple[Places, np.ndarray]:
    """Return what either of two CSR patterns stores, and the order of their entries, those of ``b``
    behind those of ``a``, by place."""
    if (library := native()) and ascends(*a) and ascends(*b):
        return library.unite(a, b)
    rows = np.concatenate([rows_of(a[0]), rows_of(b[0])])
    return merge(rows, np.concatenate([a[1], b[1]]), (a[0].size - 1, n_cols))


def n_pairs(a: Csr, b: Csr) -> int:
    """Return how many products of stored values a product of two CSR patterns takes."""
    if library := native():
        return library.n_pairs(a, b)
    return int(np.diff(b[0])[a[1]].sum(dtype=np.int64))


def multiply(a: Csr, b: Csr, n_cols: int, most: int) -> Csr:
    """Return the places of the product of two CSR patterns, canonical.

    Args:
        a, b: The patterns.
        n_cols: Columns of ``b``.
        most: The number of pairs, of :func:`n_pairs`, below 2**31.
    """
    if library := native():
        return library.multiply(a, b, n_cols, most)
    of_a, of_b = _pairs_by_row(a, b)
    places, _ = merge(rows_of(a[0])[of_a], b[1][of_b], (a[0].size - 1, n_cols))
    return places.indptr, places.indices


def pairs(a: Csr, b: Csr, c: Csr, n_cols: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of entries of two CSR patterns that add up to the places of their product.

    Args:
        a, b: The patterns.
        c: Their product, of :func:`multiply`.
        n_cols: Columns of ``b``.
        n: The number of pairs.

    Returns:
        Where those of each place begin, and the end of all; and the entries of ``a`` and of ``b``.
    """
    if library := native():
        return library.pairs(a, b, c, n_cols, n)
    of_a, of_b = _pairs_by_row(a, b)
    places, order = merge(rows_of(a[0])[of_a], b[1][of_b], (a[0].size - 1, n_cols))
    return np.append(places.starts, n).astype(np.int32), of_a[order], of_b[order]


def _pairs_by_row(a: Csr, b: Csr) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(b[0])[a[1]]
    ends = np.cumsum(lengths)
    of_a = np.repeat(np.arange(a[1].size, dtype=np.int32), lengths)
    of_b = np.arange(of_a.size) + np.repeat(b[0][a[1]] - (ends - lengths), lengths)
    return of_a, of_b.astype(np.int32)


def share_by(memory: Memory) -> None:
    """Let arrays that are made here lie in the memory of MLX arrays."""
    global _memory
    _memory = memory


def empty(n: int) -> np.ndarray:
    """Return ``(n,)`` int32 that nobody has written yet; as of :func:`share`, where C++ can."""
    if _memory is None or mx.cuda.is_available():
        return np.empty(n, np.int32)
    return np.asarray(_memory.indices(n))


def share(indices: np.ndarray) -> np.ndarray:
    """Return a copy of int32 indices that lies in the memory of an MLX array.

    :func:`on_device` gives that array. On CUDA the copy lies on the host alone, lest each side
    drags the memory to itself.
    """
    if mx.cuda.is_available():
        return indices.copy()
    return np.asarray(mx.array(np.ascontiguousarray(indices)))


def locked(indices: np.ndarray) -> np.ndarray:
    """Return the same memory as an array that cannot be written to, nor be made writable."""
    if isinstance(indices.base, memoryview):
        return np.asarray(indices.base.toreadonly())
    indices.flags.writeable = False
    return indices.view()


def on_device(indices: np.ndarray) -> mx.array:
    """Return int32 indices as an MLX array: without a copy, if they came from :func:`share`."""
    owner = _owner(indices)
    # A handle of its own: what is written by it, as by `a[0] = 1`, gets memory of its own.
    return mx.array(indices) if owner is None else owner[:]


def unsigned_on_device(indices: np.ndarray) -> mx.array:
    """Return the same of integers that are not negative as uint32, by which MLX gathers faster."""
    owner = _owner(indices)
    if owner is None or _memory is None:
        return mx.array(indices.astype(np.uint32))
    return _memory.unsigned(owner)


def _owner(indices: np.ndarray) -> mx.array | None:
    """Return the MLX array of int32 in whose memory indices lie, if there is one."""
    owner = indices.base.obj if isinstance(indices.base, memoryview) else None
    if not isinstance(owner, mx.array) or owner.dtype != mx.int32:
        return None
    return owner if owner.shape == indices.shape else None


def _sort_rows(rows: np.ndarray, cols: np.ndarray, n_rows: int) -> Sorted:
    order = _order(rows, n_rows)
    ends = np.cumsum(np.bincount(rows, minlength=n_rows))
    indptr = np.concatenate([[0], ends]).astype(np.int32)
    return indptr, cols[order], order.astype(np.int32)


def _order(keys: np.ndarray, n_keys: int) -> np.ndarray:
    """Return the stable order of keys in ``[0, n_keys)``.

    NumPy sorts 16 bits by radix, ten times as fast as 32: first by the low ones, then the high.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if n_keys > 2**16:
        order = order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
