"""Extremes over the rows of a sparse matrix, implicit zeros included, and what reductions share."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import algebra
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.transforms import of_mapped, tracing, transforming

Axis: TypeAlias = "int | tuple[int, ...] | None"


def check_axis(owner: str, axis: Any) -> int | None:
    """Return an axis as None, 0 or 1, or raise."""
    if axis is None or (isinstance(axis, tuple) and sorted(n % 2 for n in axis) == [0, 1]):
        return None
    axis = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis
    if isinstance(axis, bool) or axis not in (-2, -1, 0, 1):
        raise ValueError(f"[{owner}] axis must be None, 0 or 1, got {axis!r}")
    return int(axis) % 2


def keep(out: mx.array, axis: int | None, keepdims: bool) -> mx.array:
    """Return a reduction, with the axes that it lost as ones if ``keepdims``."""
    if not keepdims:
        return out
    return out.reshape(1, 1) if axis is None else mx.expand_dims(out, axis)


class Rows(NamedTuple):
    """Rows whose extremes are asked for.

    Attributes:
        data: ``(nnz, ...)`` stored values, of scalars; further axes are of what ``mx.vmap`` maps.
        pattern: Which of them make up each row: canonical.
        n_empty: ``(n_rows,)``, how many places of each row store nothing.
        places: ``(nnz,)``, where each value lies in its row.
        first_empty: ``(n_rows,)``, the first place of each row that stores nothing, or its end.
        size: Places in a row.
    """

    data: mx.array
    pattern: CSRPattern
    n_empty: np.ndarray
    places: np.ndarray
    first_empty: np.ndarray
    size: int


def places(pattern: CSRPattern, as_one: bool) -> tuple:
    """Return what :class:`Rows` says of places: of the rows of a canonical pattern, or of all of
    them as one row."""
    return _as_one(pattern) if as_one else (pattern, *_by_rows(pattern))


@algebra.kept
def _by_rows(pattern: CSRPattern) -> tuple:
    return _describe(pattern, pattern.indices, pattern.shape[1])


@algebra.kept
def _as_one(pattern: CSRPattern) -> tuple:
    n = pattern.n_blocks  # a row of stored values alone: all places may be too many
    row = CSRPattern([0, n], np.arange(n), (1, n))
    return row, *_describe(row, pattern.places, pattern.shape[0] * pattern.shape[1])


def _describe(pattern: CSRPattern, places: np.ndarray, size: int) -> tuple:
    lengths = np.diff(pattern.indptr)
    number = np.arange(places.size) - np.repeat(pattern.indptr[:-1], lengths)  # in its row
    first_empty = lengths.astype(np.int64)
    moved = np.flatnonzero(places != number)
    np.minimum.at(first_empty, pattern.row_indices[moved], number[moved])
    return size - lengths.astype(np.int64), places, first_empty, size


def extreme(owner: str, rows: Rows, largest: bool) -> mx.array:
    """Return the largest or smallest value of each row, ``(n_rows, ...)``.

    The gradient goes to all places that have it, in equal shares, as MLX's does.

    Args:
        owner: Name shown in the error message.
        rows: The rows.
        largest: Or the smallest.

    Raises:
        TypeError: The values are complex.
        ValueError: There are no places.
    """
    _check_order(owner, rows)
    if not rows.n_empty.size:
        return mx.zeros((0, *rows.data.shape[1:]), rows.data.dtype)
    pattern = rows.pattern
    of_rows, _ = algebra.gathers(pattern)
    n_empty = _of_each(rows, rows.n_empty.astype(np.float32))

    def shares(data: mx.array) -> mx.array:
        """Return the part that each value has in the extreme of its row."""
        found = _values(rows._replace(data=data), largest)
        equal = (of_rows(found) == data) | mx.isnan(data)
        count = algebra.sum_rows(pattern)(equal.astype(mx.float32))
        count = count + mx.where(found == 0, n_empty, 0)
        return (equal / of_rows(mx.maximum(count, 1))).astype(data.dtype)

    if not transforming():
        return _values(rows, largest)
    if tracing.graph == "exported":  # a file holds no function with rules: a zero brings the slope
        still = mx.stop_gradient(rows.data)
        found = _values(rows._replace(data=still), largest)
        if not mx.issubdtype(still.dtype, mx.floating):
            return found
        zero = mx.where(mx.isinf(still), mx.zeros((), still.dtype), rows.data - still)
        return found + algebra.sum_rows(pattern)(mx.stop_gradient(shares(still)) * zero)
    function: Any = mx.custom_function(
        lambda data: _values(rows._replace(data=mx.stop_gradient(data)), largest)
    )

    # Shares are of the values without a derivative: MLX has none of the operations behind them.
    @function.vjp
    def vjp(primal: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return mx.stop_gradient(shares(mx.stop_gradient(primal))) * of_rows(cotangent)

    @function.jvp
    def jvp(primal: mx.array, tangent: mx.array) -> mx.array:
        return algebra.sum_rows(pattern)(
            mx.stop_gradient(shares(mx.stop_gradient(primal))) * tangent
        )

    # Not MLX's own rule, which maps what the function computes and forgets its derivatives.
    @function.vmap
    @of_mapped
    def vmap(data: mx.array, axis: int) -> tuple[mx.array, int]:
        mapped = rows._replace(data=mx.moveaxis(data, axis, -1))
        return extreme(owner, mapped, largest), data.ndim - 1

    return function(rows.data)


def place_of_extreme(owner: str, rows: Rows, largest: bool) -> mx.array:
    """Return the first place of the largest or smallest value of each row, ``(n_rows,)``.

    uint32, or int64 where a row has too many places.

    Args:
        owner, rows, largest: As of :func:`extreme`.

    Raises:
        TypeError, ValueError: As of :func:`extreme`.
    """
    _check_order(owner, rows)
    rows = rows._replace(data=mx.stop_gradient(rows.data))
    dtype = mx.uint32 if rows.size < 2**32 else mx.int64
    if not rows.n_empty.size:
        return mx.zeros(0, dtype)
    to_rows, _ = algebra.gathers(rows.pattern)
    found = _values(rows, largest)
    equal = (to_rows(found) == rows.data) | mx.isnan(rows.data)
    nnz = rows.data.size
    first = mx.full(found.shape, nnz, mx.uint32)  # the stored value, or none: in order of places
    if nnz:
        candidates = mx.where(equal, mx.arange(nnz, dtype=mx.uint32), nnz)
        first = first.at[to_rows.index].minimum(candidates)
    first = mx.array(np.append(rows.places, rows.size)).astype(dtype)[first]
    empty = mx.array(rows.first_empty).astype(dtype)
    return mx.where((found == 0) & _has_empty(rows), mx.minimum(first, empty), first)


def _check_order(owner: str, rows: Rows) -> None:
    if rows.data.dtype == mx.complex64:
        raise TypeError(f"[{owner}] complex numbers have no order; use abs(A)")
    if not rows.size:
        raise ValueError(f"[{owner}] a matrix without places has no such value")


def _values(rows: Rows, largest: bool) -> mx.array:
    """Return the extremes, without a derivative."""
    stored = _extreme_stored(rows.data, rows.pattern, largest)
    choose, zero = mx.maximum if largest else mx.minimum, mx.zeros((), rows.data.dtype)
    return mx.where(_has_empty(rows), choose(stored, zero), stored)


def _has_empty(rows: Rows) -> mx.array:
    return _of_each(rows, (rows.n_empty > 0).astype(np.uint8)) > 0


def _of_each(rows: Rows, numbers: np.ndarray) -> mx.array:
    """Return numbers ``(n_rows,)`` of the rows, to stand beside their extremes."""
    return mx.array(numbers.reshape(-1, *(1 for _ in rows.data.shape[1:])))


def largest_stored(data: mx.array, pattern: CSRPattern) -> mx.array:
    """Return the largest stored value of each row, without a derivative; -inf of an empty one."""
    return _extreme_stored(data, pattern, largest=True)


def _extreme_stored(data: mx.array, pattern: CSRPattern, largest: bool) -> mx.array:
    out = mx.full((pattern.shape[0], *data.shape[1:]), _least(data.dtype, largest), data.dtype)
    if not data.size:
        return out
    place = out.at[algebra.gathers(pattern)[0].index]
    out = place.maximum(data) if largest else place.minimum(data)
    if not mx.issubdtype(data.dtype, mx.floating):
        return out
    n_nans = algebra.sum_rows(pattern)(mx.isnan(data).astype(mx.float32))
    return mx.where(n_nans > 0, mx.array(np.nan, data.dtype), out)


def _least(dtype: mx.Dtype, largest: bool) -> float | int | bool:
    """Return what every value of a dtype is at least, or at most."""
    if dtype == mx.bool_:
        return not largest
    if mx.issubdtype(dtype, mx.floating):
        return -np.inf if largest else np.inf
    limits = mx.iinfo(dtype)
    return limits.min if largest else limits.max
