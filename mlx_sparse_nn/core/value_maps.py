"""Linear maps of stored values: gathers, and sums of runs, to any order of derivative.

Where values go is known on the host. MLX's own gather has no second derivative, and on a GPU its
gradient adds up in any order; the transposes here are products with a sparse matrix of ones, whose
order of sums is fixed.

Values are ``(n,)``, or ``(n, B, B)`` of blocks, which move as wholes.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import derivatives, ops
from mlx_sparse_nn.core.pattern import CSRPattern


class Gather:
    """The map to ``values[places]``: places may repeat, and need not name all values.

    Args:
        places: ``(m,)`` integers in ``[0, n)``.
        n: How many values there are.
    """

    def __init__(self, places: np.ndarray, n: int):
        self.places = places
        self.n = n

    def __call__(self, values: mx.array) -> mx.array:
        """Return ``values[places]``, ``(m, ...)``."""
        if not self.places.size:
            return mx.zeros((0, *values.shape[1:]), values.dtype)
        return derivatives.linear(_gather, _scatter, self, values[None]).squeeze(0)

    @cached_property
    def index(self) -> mx.array:
        return mx.array(self.places.astype(np.uint32))

    @cached_property
    def selector(self) -> CSRPattern:
        """The matrix ``(m, n)`` that has a one in each row."""
        starts = np.arange(self.places.size + 1, dtype=np.int32)
        places = self.places.astype(np.int32)
        return CSRPattern._of(starts, places, (self.places.size, self.n))

    @cached_property
    def inverse(self) -> mx.array | None:
        """Where each value goes, if each goes to one place."""
        if self.places.size != self.n or np.any(np.bincount(self.places, minlength=self.n) != 1):
            return None
        inverse = np.empty(self.n, np.uint32)
        inverse[self.places] = np.arange(self.n, dtype=np.uint32)
        return mx.array(inverse)


def _gather(by: Gather, values: mx.array) -> mx.array:
    """Return ``values (V, n, ...)`` at the places, ``(V, m, ...)``."""
    return _take(values, by.index)


def _scatter(by: Gather, values: mx.array) -> mx.array:
    """Return sums ``(V, n, ...)`` of ``values (V, m, ...)`` at each place."""
    if by.inverse is not None:
        return _take(values, by.inverse)
    return _multiply_by_ones(by.selector.T, values)


def _take(values: mx.array, index: mx.array) -> mx.array:
    if values.ndim == 2:  # of single elements, take_along_axis is ten times faster on the CPU
        return mx.take_along_axis(values, index[None], axis=1)
    return mx.take(values, index, axis=1)


class SumOfRuns:
    """The map to sums of runs of ``values[order]``.

    Args:
        order: ``(m,)`` integers in ``[0, n)``, or None for all values as they are.
        starts: ``(k,)`` ascending: where each run begins.
        n: How many values there are.
    """

    def __init__(self, order: np.ndarray | None, starts: np.ndarray, n: int):
        order = np.arange(n, dtype=np.int32) if order is None else order
        self.n = n
        # Not checked again: who makes a map knows where values lie.
        indptr = np.append(starts, order.size).astype(np.int32)
        self.selector = CSRPattern._of(indptr, order.astype(np.int32), (starts.size, n))

    def __call__(self, values: mx.array) -> mx.array:
        """Return the sums, ``(k, ...)``; 16-bit values add up in float32."""
        return _multiply_by_ones(self.selector, values[None]).squeeze(0)


def _multiply_by_ones(selector: CSRPattern, values: mx.array) -> mx.array:
    """Return the product ``(V, k, ...)`` of a pattern ``(k, n)`` of ones and values."""
    rows = mx.moveaxis(mx.flatten(values, 2) if values.ndim > 2 else values[..., None], 1, -1)
    if mx.issubdtype(values.dtype, mx.inexact):
        out = ops.spmm(mx.ones(selector.n_blocks, values.dtype), selector, rows)
    else:
        out = _sum_integers(selector, rows)
    shape = values.shape[0], selector.shape[0], *values.shape[2:]
    return mx.moveaxis(out, -1, 1).reshape(shape)


def _sum_integers(selector: CSRPattern, values: mx.array) -> mx.array:
    """Return ``values (..., n)`` times the transpose of the pattern: integers have no products.

    Sums of runs are differences of running sums, which wrap around as the sums themselves do.
    """
    dtype = mx.int32 if values.dtype == mx.bool_ else values.dtype
    out = mx.zeros((*values.shape[:-1], selector.shape[0]), dtype)
    if selector.n_blocks and values.size:
        indptr = mx.array(selector.indptr)
        running = mx.cumsum(values[..., mx.array(selector.indices)].astype(dtype), axis=-1)
        running = mx.concatenate([mx.zeros((*values.shape[:-1], 1), dtype), running], axis=-1)
        out = running[..., indptr[1:]] - running[..., indptr[:-1]]
    return out > 0 if values.dtype == mx.bool_ else out
