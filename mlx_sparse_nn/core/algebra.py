"""Sums and products of two sparse matrices: their patterns, and how values go from one to another.

Patterns are found once on the host for each pair, and kept while both are alive. Values follow by
MLX operations, and are differentiable to any order. All patterns here are of one block size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import derivatives, edges, index, ops
from mlx_sparse_nn.core.backends import choose
from mlx_sparse_nn.core.checks import INT32_MAX
from mlx_sparse_nn.core.pattern import CSRPattern, grid_of
from mlx_sparse_nn.core.transforms import tracing
from mlx_sparse_nn.core.value_maps import Gather, SumOfRuns

Plan = TypeVar("Plan")


def kept(make: Callable[..., Plan]) -> Callable[..., Plan]:
    """Keep what a function of one or two patterns gives, as long as they are alive.

    What it gives must not refer to them. They are told apart by identity: to hash their indices
    takes a good part of the time of a product.
    """
    plans: dict[tuple[int, ...], tuple[list[weakref.ref], Plan]] = {}

    @wraps(make)
    def plan(*patterns: CSRPattern) -> Plan:
        key = tuple(map(id, patterns))
        if key not in plans:
            alive = [weakref.ref(p, lambda _: plans.pop(key, None)) for p in patterns]
            plans[key] = alive, make(*patterns)
        return plans[key][1]

    return plan


class Merged:
    """Entries by their places: a canonical pattern, where those of one place add up.

    Attributes:
        pattern: The pattern.
        sums: The map from the values of the entries to those of the pattern.
    """

    def __init__(
        self, places: index.Places, order: np.ndarray, shape: tuple[int, int], block_size: int
    ):
        self.pattern = CSRPattern._of(places.indptr, places.indices, shape, block_size)
        n = order.size
        unique = places.starts.size == n
        self.sums = Gather(order, n) if unique else SumOfRuns(order, places.starts, n)


def merge(
    rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int], block_size: int = 1
) -> Merged:
    """Merge entries.

    Args:
        rows, cols: ``(n,)`` int32, the block-row and block-column of each.
        shape: ``(n_rows, n_cols)`` in scalars.
        block_size: Side of the blocks.
    """
    places, order = index.merge(rows, cols, grid_of(shape, block_size))
    return Merged(places, order, shape, block_size)


@kept
def canonical(pattern: CSRPattern) -> Merged:
    """Return the canonical pattern of one that is not."""
    return merge(pattern.row_indices, pattern.indices, pattern.shape, pattern.block_size)


@kept
def transposition(pattern: CSRPattern) -> Gather:
    """Return the map from stored values to those of the transpose."""
    return Gather(pattern.transpose_perm, pattern.n_blocks)


class Scalars(NamedTuple):
    """The pattern of the scalars of blocks, and the map to them from all values of the blocks."""

    pattern: CSRPattern
    values: Callable[[mx.array], mx.array]


@kept
def scalars(pattern: CSRPattern) -> Scalars:
    """Return the scalars of blocks that lie in the matrix, rows in stored order."""
    # Value (j, r, c) of block-row R comes before (j + 1, r, c): sort by row, keep the rest.
    block_size, shape = pattern.block_size, pattern.shape
    within = np.arange(block_size, dtype=np.int32)
    row = pattern.row_indices[:, None, None] * block_size + within[:, None]
    col = pattern.indices[:, None, None] * block_size + within
    row, col = (np.broadcast_to(a, pattern.data_shape).reshape(-1) for a in (row, col))
    inside = np.flatnonzero((row < shape[0]) & (col < shape[1]))
    indptr, indices, order = index.sort_rows(row[inside], col[inside], shape)
    return Scalars(CSRPattern._of(indptr, indices, shape), Gather(inside[order], row.size))


@kept
def gathers(pattern: CSRPattern) -> tuple[Gather, Gather]:
    """Return the maps from what each block-row, and each block-column, has to the stored blocks."""
    n_block_rows, n_block_cols = pattern.grid
    return Gather(pattern.row_indices, n_block_rows), Gather(pattern.indices, n_block_cols)


@kept
def sum_rows(pattern: CSRPattern) -> SumOfRuns:
    """Return the map from stored values of scalars to their sums over each row."""
    return SumOfRuns(None, pattern.indptr[:-1], pattern.n_blocks)


def values_at(pattern: CSRPattern, dense: mx.array) -> mx.array:
    """Return what a dense array has where a pattern stores values, to broadcast to them.

    Args:
        pattern: Of shape ``(n_rows, n_cols)``.
        dense: ``(n_rows, n_cols)``, ``(n_rows, 1)``, ``(1, n_cols)`` or ``(1, 1)``.
    """
    if dense.size == 1 and dense.shape != pattern.shape:
        return dense.reshape(())
    if dense.shape == pattern.shape:
        return derivatives.sample(pattern.layout, dense[None]).squeeze(0)
    axis = 0 if dense.shape[1] == 1 else 1
    gather, block_size = gathers(pattern)[axis], pattern.block_size
    if block_size == 1:
        return gather(mx.flatten(dense))
    whole = edges.pad(mx.flatten(dense), pattern.grid[axis] * block_size)
    return mx.expand_dims(gather(whole.reshape(pattern.grid[axis], block_size)), 2 - axis)


@kept
def _union(a: CSRPattern, b: CSRPattern) -> Merged:
    places, order = index.unite((a.indptr, a.indices), (b.indptr, b.indices), a.grid[1])
    return Merged(places, order, a.shape, a.block_size)


def add(
    a: mx.array, a_pattern: CSRPattern, b: mx.array, b_pattern: CSRPattern
) -> tuple[mx.array, CSRPattern]:
    """Return the sum of two matrices of one shape, on the union of their patterns."""
    dtype = mx.result_type(a, b)
    a, b = (derivatives.promoted(v, dtype) for v in (a, b))
    if a_pattern == b_pattern:
        return a + b, a_pattern
    union = _union(a_pattern, b_pattern)
    return union.sums(mx.concatenate([a, b])), union.pattern


class Union(NamedTuple):
    """What either of two canonical patterns stores: maps from values with a zero behind them."""

    pattern: CSRPattern
    of_a: Gather
    of_b: Gather


@kept
def _spread_union(a: CSRPattern, b: CSRPattern) -> Union:
    places, order = index.unite((a.indptr, a.indices), (b.indptr, b.indices), a.grid[1])
    pattern = CSRPattern._of(places.indptr, places.indices, a.shape, a.block_size)
    place = np.repeat(np.arange(pattern.n_blocks), np.diff(np.append(places.starts, order.size)))
    in_a = order < a.n_blocks
    of_a, of_b = (np.full(pattern.n_blocks, p.n_blocks) for p in (a, b))
    of_a[place[in_a]] = order[in_a]
    of_b[place[~in_a]] = order[~in_a] - a.n_blocks
    return Union(pattern, Gather(of_a, a.n_blocks + 1), Gather(of_b, b.n_blocks + 1))


def map_union(
    function: Callable[[mx.array, mx.array], mx.array],
    a: mx.array,
    a_pattern: CSRPattern,
    b: mx.array,
    b_pattern: CSRPattern,
) -> tuple[mx.array, CSRPattern]:
    """Return what a function, which takes two zeros to zero, makes of two matrices of one shape and
    canonical patterns."""
    if a_pattern == b_pattern:
        return function(a, b), a_pattern
    union = _spread_union(a_pattern, b_pattern)
    a, b = (mx.concatenate([v, mx.zeros((1, *v.shape[1:]), v.dtype)]) for v in (a, b))
    return function(union.of_a(a), union.of_b(b)), union.pattern


class Intersection(NamedTuple):
    """What two canonical patterns both store."""

    pattern: CSRPattern
    of_a: Gather
    of_b: Gather


@kept
def _intersection(a: CSRPattern, b: CSRPattern) -> Intersection:
    places, in_a, in_b = np.intersect1d(a.places, b.places, assume_unique=True, return_indices=True)
    pattern = CSRPattern.from_places(places, a.shape, a.block_size)
    return Intersection(pattern, Gather(in_a, a.n_blocks), Gather(in_b, b.n_blocks))


def multiply(
    a: mx.array, a_pattern: CSRPattern, b: mx.array, b_pattern: CSRPattern
) -> tuple[mx.array, CSRPattern]:
    """Return the elementwise product of two matrices of one shape and canonical patterns."""
    if a_pattern == b_pattern:
        return a * b, a_pattern
    both = _intersection(a_pattern, b_pattern)
    return both.of_a(a) * both.of_b(b), both.pattern


@kept
def _product(a: CSRPattern, b: CSRPattern) -> CSRPattern:
    """Return the pattern of what a product may store."""
    operands = (a.indptr, a.indices), (b.indptr, b.indices)
    if (n_pairs := index.n_pairs(*operands)) > INT32_MAX:
        raise ValueError(
            f"[A @ B] takes {n_pairs} products of stored values, more than 2**31 - 1; multiply by "
            "some rows of A at a time"
        )
    indptr, indices = index.multiply(*operands, b.grid[1], n_pairs)
    return CSRPattern._of(indptr, indices, (a.shape[0], b.shape[1]), a.block_size)


class Pairs(NamedTuple):
    """The products of an entry of a and an entry of b that make up ``a @ b``.

    Attributes:
        of_a: From the values of a to those of the pairs, by place; of_b likewise.
        rows: ``(n_places, n_entries of a)``: the pairs of each place, by their entries of a.
        sums: From the pairs to the places.
    """

    of_a: Gather
    of_b: Gather
    rows: CSRPattern
    sums: SumOfRuns


@kept
def _pairs(a: CSRPattern, b: CSRPattern) -> Pairs:
    c = _product(a, b)
    operands = (a.indptr, a.indices), (b.indptr, b.indices)
    n_pairs = index.n_pairs(*operands)
    starts, of_a, of_b = index.pairs(*operands, (c.indptr, c.indices), b.grid[1], n_pairs)
    rows = CSRPattern._of(starts, of_a, (c.n_blocks, a.n_blocks))
    sums = SumOfRuns(None, starts[:-1], n_pairs)
    return Pairs(Gather(of_a, a.n_blocks), Gather(of_b, b.n_blocks), rows, sums)


def matmul(
    a: mx.array, a_pattern: CSRPattern, b: mx.array, b_pattern: CSRPattern
) -> tuple[mx.array, CSRPattern]:
    """Return the product of two matrices, on the pattern of what may be stored in it.

    16-bit values are multiplied and added up in float32.
    """
    pattern, dtype = _product(a_pattern, b_pattern), mx.result_type(a, b)
    wide = mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype
    a = derivatives.promoted(edges.clear(a_pattern.layout, a), wide)
    b = derivatives.promoted(edges.clear(b_pattern.layout, b), wide)
    if pattern.n_blocks and choose.takes_spgemm(wide):
        layouts = a_pattern.layout, b_pattern.layout, pattern.layout
        out = derivatives.spgemm(2, layouts, a[None], b[None]).squeeze(0)
    else:
        out = _multiply_pairs(_pairs(a_pattern, b_pattern), a, b)
    return out.astype(dtype), pattern


def _multiply_pairs(pairs: Pairs, a: mx.array, b: mx.array) -> mx.array:
    """Return the values of a product by MLX operations: on every device, for every dtype."""
    # Traced for every shape, only constants are stored values of a product.
    is_open = tracing.graph == "shapeless"
    if a.ndim == 1 and mx.issubdtype(a.dtype, mx.inexact) and not is_open:
        return ops.spmm(pairs.of_b(b), pairs.rows, a)
    return pairs.sums(_products(pairs.of_a(a), pairs.of_b(b)))


def _products(a: mx.array, b: mx.array) -> mx.array:
    """Return the products of values ``(n,)``, or of blocks ``(n, B, B)``."""
    if a.ndim == 1:
        return a * b
    if mx.issubdtype(mx.result_type(a, b), mx.inexact):
        return a @ b
    return (a[..., None] * b[:, None]).sum(axis=2)  # MLX has no products of integers
