"""Extremes over the rows of a sparse matrix, implicit zeros included, and what reductions share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import algebra
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.transforms import transforming


def check_axis(owner: str, axis: Any) -> int | None:
    """Return an axis as None, 0 or 1, or raise."""
    if axis is None:
        return None
    if isinstance(axis, bool) or axis not in (-2, -1, 0, 1):
        raise ValueError(f"[{owner}] axis must be None, 0 or 1, got {axis!r}")
    return int(axis) % 2


def keep(out: mx.array, axis: int | None, keepdims: bool) -> mx.array:
    """Return a reduction, with the axes that it lost as ones if ``keepdims``."""
    if not keepdims:
        return out
    return out.reshape(1, 1) if axis is None else mx.expand_dims(out, axis)


def extreme(owner: str, data: mx.array, pattern: CSRPattern, largest: bool) -> mx.array:
    """Return the largest or smallest value of each row, ``(n_rows,)``.

    The gradient goes to all places that have it, in equal shares, as MLX's does.

    Args:
        owner: Name shown in the error message.
        data: ``(nnz,)`` values.
        pattern: A canonical one, of scalars.
        largest: Or the smallest.

    Raises:
        TypeError: The values are complex.
        ValueError: There are no columns.
    """
    if data.dtype == mx.complex64:
        raise TypeError(f"[{owner}] complex numbers have no order; use abs(A)")
    if not pattern.shape[1] or not pattern.shape[0]:
        raise ValueError(f"[{owner}] a matrix of shape {pattern.shape} has no such value")
    of_rows, _ = algebra.gathers(pattern)
    n_zeros = mx.array((pattern.shape[1] - np.diff(pattern.indptr)).astype(np.int32))

    def values(data: mx.array) -> mx.array:
        """Return the extremes, without a derivative."""
        choose = mx.maximum if largest else mx.minimum
        stored = _extreme_stored(data, pattern, largest)
        return mx.where(n_zeros > 0, choose(stored, mx.zeros((), data.dtype)), stored)

    def shares(data: mx.array) -> mx.array:
        """Return the part that each value has in the extreme of its row."""
        found = values(data)
        equal = (of_rows(found) == data) | mx.isnan(data)
        count = algebra.sum_rows(pattern)(equal.astype(mx.float32))
        count = count + mx.where(found == 0, n_zeros, 0)
        return (equal / of_rows(mx.maximum(count, 1))).astype(data.dtype)

    if not transforming():
        return values(data)
    function: Any = mx.custom_function(lambda data: values(mx.stop_gradient(data)))

    @function.vjp
    def vjp(primal: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return mx.stop_gradient(shares(primal)) * of_rows(cotangent)

    @function.jvp
    def jvp(primal: mx.array, tangent: mx.array) -> mx.array:
        return algebra.sum_rows(pattern)(mx.stop_gradient(shares(primal)) * tangent)

    return function(data)


def largest_stored(data: mx.array, pattern: CSRPattern) -> mx.array:
    """Return the largest stored value of each row, without a derivative; -inf of an empty one."""
    return _extreme_stored(data, pattern, largest=True)


def _extreme_stored(data: mx.array, pattern: CSRPattern, largest: bool) -> mx.array:
    out = mx.full(pattern.shape[0], _least(data.dtype, largest), data.dtype)
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
