"""The products of large graphs on CUDA: scalars (B = 1) at any places.

What helps is derived from the index arrays, once for each pattern: tiles of like work, and
diagonals. Small graphs, and those whose arrays are tracers, go by ``cuda_scalars``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import (
    MAX_THREADS,
    Kernel,
    KernelLaunch,
    power_of_two,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Layout, Side, row_of_block
from mlx_sparse_nn.core.transforms import tracing

NAME = "cuda"
MAX_SAMPLED = MAX_THREADS // 4  # stored values: up to 16 threads have four together


class Tiles(NamedTuple):
    """How a matrix is shared out: whole rows, in order, and long rows in pieces.

    Attributes:
        tiles: ``(n_tiles, 6)`` int32: first row, rows, first value, values; and of the last row, if
            it is long and its values are not among these, first piece and end of its pieces.
        pieces: ``(n_pieces, 2)`` int32: first value, values; None where no row is long.
    """

    tiles: mx.array
    pieces: mx.array | None


class Sharing(NamedTuple):
    """How the threads of ``spmm_columns`` share the columns of x.

    Attributes:
        group: Threads that take a stored value together.
        vec: Columns that each loads at once.
        chunks: How many times.
    """

    group: int
    vec: int
    chunks: int


class Diagonals(NamedTuple):
    """The columns of a matrix whose values lie on few diagonals.

    Attributes:
        ahead: ``(D,)`` int32, column less row of each diagonal, ascending.
        codes: ``(n_blocks,)`` uint8, the diagonal of each value; None where a byte cannot tell.
    """

    ahead: mx.array
    codes: mx.array | None


def takes(side: Side, block_size: int, n_x: int) -> bool:
    """Return whether a matrix is a large graph, and x is to lie by columns.

    It is not where x lies in the cache, so that few rows of it are not worth a transposed copy; nor
    where values lie on few diagonals, and neighbouring rows ask for neighbouring places of few
    rows of x.
    """
    if block_size > 1 or not _is_large(side) or side.n_blocks > MAX_SAMPLED:
        return False
    if side.n_block_cols < tuned.NARROW_COLUMNS and 1 < n_x < tuned.COLUMNS_OF_NARROW:
        return False
    return n_x >= tuned.COLUMNS_OF_SCALARS or diagonals(side) is None


def takes_streaming(side: Side, block_size: int, n_x: int) -> bool:
    """Return whether one thread adds up each row: short rows of scalars times one row of x."""
    is_vector = block_size * n_x == 1 and side.perm is None
    return is_vector and side.longest_row <= tuned.MAX_STREAMED_ROW


def stream(data: mx.array, side: Side, x: mx.array, n_out: int, bias: mx.array | None) -> mx.array:
    """Return the product with one row of x, ``(..., 1, n_out)``, of which a thread has each output.

    Args:
        data: Stored values.
        side: The matrix.
        x: ``(1, n_cols)`` or ``(V, 1, n_cols)``.
        n_out: Rows of the side.
        bias: ``(n_out,)``, or None.
    """
    few = diagonals(side)
    n_matrices = x.shape[0] if x.ndim == 3 else 1
    cols, ahead = side.indices, side.indices
    if few is not None and few.codes is not None:
        cols, ahead = few.codes, few.ahead
    by_codes = cols is not side.indices
    launched = _streaming(x.dtype, n_matrices, n_out, by_codes, bias is not None)
    arrays = [data, side.indptr, cols, ahead, x, x if bias is None else bias]
    return launched(arrays, (*x.shape[:-1], n_out))


@lru_cache(4096)
def _streaming(
    dtype: mx.Dtype, n_matrices: int, n_out: int, by_diagonals: bool, has_bias: bool
) -> KernelLaunch:
    template = {"ROWS": 64, "HELD": 1664, "DIAGONALS": int(by_diagonals), "BIAS": int(has_bias)}
    kernel = Kernel("spmm_stream", template, (round_up(n_out, 64), 1, n_matrices), 64)
    index = mx.uint8 if by_diagonals else mx.int32
    return prepare(NAME, "spmm", kernel, dtype, T=dtype, INDEX=index)


def _is_large(side: Side) -> bool:
    """Return whether it pays to look at the index arrays, which must be no tracers for that."""
    return side.is_constant and side.n_blocks >= tuned.GRAPH_VALUES


def diagonals(side: Side) -> Diagonals | None:
    """Return the diagonals of a large matrix of scalars, or None where they are many.

    They are found once for each side: that takes as long as some products.
    """
    size = side.n_block_rows + side.n_block_cols
    return side.keep(_diagonals) if _is_large(side) and size < 2**31 else None


def _diagonals(side: Side) -> Diagonals | None:
    n_rows = side.n_block_rows
    places = side.indices - row_of_block(side).view(mx.int32) + n_rows
    is_stored = mx.zeros(n_rows + side.n_block_cols, mx.bool_)
    is_stored[places] = True
    # Once for each pattern: of its indices, which are constants.
    stored = np.flatnonzero(np.array(is_stored))
    if stored.size > tuned.MAX_DIAGONALS:
        return None
    ahead = mx.array((stored - n_rows).astype(np.int32))
    if stored.size > 256:
        return Diagonals(ahead, None)
    codes = np.zeros(is_stored.size, np.uint8)
    codes[stored] = np.arange(stored.size)
    return Diagonals(ahead, mx.array(codes)[places])


def cut(indptr: np.ndarray, sizes: tuned.GraphTile) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of :class:`Tiles`.

    A row counts as ``sizes.row`` items, and each of its values as one. The rows that begin within
    the same ``sizes.items`` are a tile: so it has ``items / row`` rows at most, and fewer values
    than items before its last row. A row of more values than a piece is long, and ends its tile.

    Args:
        indptr: ``(n_rows + 1,)``.
        sizes: Of a tile.
    """
    tile, weight, piece = sizes
    lengths = np.diff(indptr.astype(np.int64))
    is_long = lengths > piece
    items = np.where(is_long, tile, lengths) + weight
    tile_of = (np.cumsum(items) - items) // tile
    first = np.flatnonzero(np.diff(tile_of, prepend=-1))
    last = np.append(first[1:], lengths.size) - 1
    long_rows = np.flatnonzero(is_long)
    ends = np.cumsum(-(-lengths[long_rows] // piece))
    n_pieces = np.diff(ends, prepend=0)
    within = np.arange(n_pieces.sum()) - np.repeat(ends - n_pieces, n_pieces)
    left = np.repeat(lengths[long_rows], n_pieces) - within * piece
    begins = np.repeat(indptr[long_rows], n_pieces) + within * piece
    pieces = np.stack([begins, np.minimum(piece, left)], axis=1)
    of_last = np.zeros((2, lengths.size), np.int64)
    of_last[:, long_rows] = ends - n_pieces, ends
    stop = np.where(is_long[last], indptr[last], indptr[last + 1])
    columns = [first, last + 1 - first, indptr[first], stop - indptr[first], *of_last[:, last]]
    return np.stack(columns, axis=1).astype(np.int32), pieces.astype(np.int32)


def _for_gathering(side: Side) -> Tiles:
    return _cut_side(side, tuned.GATHERED_TILE)


def _for_columns(side: Side) -> Tiles:
    return _cut_side(side, tuned.COLUMNS_TILE)


def _cut_side(side: Side, sizes: tuned.GraphTile) -> Tiles:
    # Once for each pattern: of its indices, which are constants.
    tiles, pieces = cut(np.array(side.indptr), sizes)
    return Tiles(mx.array(tiles), mx.array(pieces) if pieces.size else None)


def is_gathered(n_x: int) -> bool:
    """Return whether products with so few columns of x go through shared memory."""
    return n_x <= tuned.GATHERED_COLUMNS


def share(n_x: int, itemsize: int) -> Sharing:
    """Return how threads share ``n_x`` columns of x: as many for a value as there are, up to 32."""
    group, widest = min(32, power_of_two(n_x)), 16 // itemsize
    vec = 1
    while vec < widest and n_x % (2 * vec) == 0 and group * vec < n_x:
        vec *= 2
    chunks = min(4, power_of_two(-(-n_x // (group * vec))))
    return Sharing(group, vec, chunks)


def product(data: mx.array, side: Side, x: mx.array, n_out: int, bias: mx.array | None) -> mx.array:
    """Return the product with a side of a large graph, ``(..., N, n_out)``.

    Args:
        data: Stored values.
        side: The matrix, or its transpose.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``.
        n_out: Rows of the side.
        bias: ``(n_out,)``, or None.
    """
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    tiles, pieces = side.keep(_for_gathering if is_gathered(n_x) else _for_columns)
    n_pieces = 0 if pieces is None else pieces.shape[0]
    sizes = n_x, n_matrices, tiles.shape[0], n_pieces, side.perm is not None, bias is not None
    of_rows, of_pieces = _launches(x.dtype, *sizes)
    x = x.swapaxes(-1, -2)
    unread = side.indptr
    perm = unread if side.perm is None else side.perm
    arrays = [data, side.indptr, side.indices, perm, x, unread if bias is None else bias]
    partial = unread
    if of_pieces is not None and pieces is not None:
        if tracing.graph is None:
            # MLX copies what has gaps before each launch, and for each input of it.
            arrays[4] = mx.contiguous(x)
        partial = of_pieces([*arrays, unread, pieces], (*x.shape[:-2], n_pieces, n_x))
    return of_rows([*arrays, partial, tiles], (*x.shape[:-2], n_out, n_x)).swapaxes(-1, -2)


@lru_cache(4096)
def _launches(
    dtype: mx.Dtype,
    n_x: int,
    n_matrices: int,
    n_tiles: int,
    n_pieces: int,
    transposed: bool,
    has_bias: bool,
) -> tuple[KernelLaunch, KernelLaunch | None]:
    group, vec, chunks = share(n_x, dtype.size)
    by_columns = {"GROUP": group, "VEC": vec, "CHUNKS": chunks}
    others = -(-n_x // (group * vec * chunks)), n_matrices
    sizes = tuned.GATHERED_TILE if is_gathered(n_x) else tuned.COLUMNS_TILE
    template = {"N": n_x} if is_gathered(n_x) else by_columns
    template |= {"HELD": sizes.items + sizes.piece, "BIAS": int(has_bias)}
    template |= {"TRANSPOSED": int(transposed)}
    name = "spmm_gathered" if is_gathered(n_x) else "spmm_columns"
    kernel = Kernel(name, template, (n_tiles * 256, *others), 256)
    of_rows = prepare(NAME, "spmm_of_tiles", kernel, dtype, T=dtype)
    if not n_pieces:
        return of_rows, None
    template = by_columns | {"PIECE": sizes.piece, "TRANSPOSED": int(transposed)}
    kernel = Kernel("spmm_pieces", template, (n_pieces * 256, *others), 256)
    return of_rows, prepare(NAME, "spmm_of_tiles", kernel, mx.float32, T=dtype)


def sample(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return the products of rows of y and x at the stored places of a large graph.

    Args:
        layout: Layout of the pattern.
        y: ``(N, n_rows)`` or ``(V, N, n_rows)``.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``.
    """
    n_x, n_matrices, side = x.shape[-2], x.shape[0] if x.ndim == 3 else 1, layout.rows
    launched = _sampling(x.dtype, n_x, n_matrices, side.n_blocks)
    y, x, rows = y.swapaxes(-1, -2), x.swapaxes(-1, -2), side.row_of_block.view(mx.int32)
    return launched([y, x, rows, side.indices], (*x.shape[:-2], side.n_blocks))


@lru_cache(4096)
def _sampling(dtype: mx.Dtype, n_x: int, n_matrices: int, n_blocks: int) -> KernelLaunch:
    vec = 1
    while vec < 16 // dtype.size and n_x % (2 * vec) == 0:
        vec *= 2
    group = min(16, power_of_two(-(-n_x // vec)))
    template = {"GROUP": group, "VEC": vec, "AT_ONCE": 4}
    grid = (-(-n_blocks // (256 // group * 4)) * 256, 1, n_matrices)
    kernel = Kernel("sddmm_places", template, grid, 256)
    return prepare(NAME, "sddmm_places", kernel, dtype, T=dtype)
