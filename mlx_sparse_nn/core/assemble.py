"""Sparse arrays of others, or of diagonals: SciPy's functions, by its names and arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import algebra, reductions
from mlx_sparse_nn.core.arrays import COOArray, CSRArray, check_offset, is_sparse
from mlx_sparse_nn.core.checks import (
    ArrayLike,
    check_data,
    check_density,
    check_matrix,
    check_seed,
    check_shape,
    check_size,
)
from mlx_sparse_nn.core.construct import from_dense
from mlx_sparse_nn.core.derivatives import promoted
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.sparse import SparseArray, check_dtype, conversion
from mlx_sparse_nn.core.vector import SparseVector

Sparse = CSRArray | COOArray | SparseVector


def eye(m: int, n: int | None = None, k: int = 0, dtype: mx.Dtype = mx.float32) -> CSRArray:
    """Return ones on a diagonal: ``eye(n)`` is the identity.

    Args:
        m, n: The shape; ``n`` is ``m`` by default.
        k: The diagonal: above the main one, or below it if negative.
        dtype: Of the values.

    Raises:
        TypeError, ValueError: An argument is no integer, or a size is negative.

    Example:
        >>> eye(2).todense()
        array([[1, 0],
               [0, 1]], dtype=float32)
    """
    check_dtype("eye", dtype)
    shape = check_size("eye", "m", m), check_size("eye", "n", m if n is None else n)
    k = check_offset("eye", k)
    rows = np.arange(max(0, -k), max(0, min(shape[0], shape[1] - k)), dtype=np.int32)
    return _of_entries(mx.ones(rows.size, dtype), rows, rows + k, shape)


def diags(
    diagonals: Sequence[ArrayLike] | ArrayLike,
    offsets: Sequence[int] | int = 0,
    shape: tuple[int, int] | None = None,
    dtype: mx.Dtype | None = None,
) -> CSRArray:
    """Return a matrix of diagonals.

    Args:
        diagonals: The values of each, from its first row and column on; or those of one. With
            ``shape``, a diagonal of one value is repeated. They have gradients.
        offsets: Which diagonal each is: 0 is the main one, those above it are positive.
        shape: By default square, and as large as the first diagonal needs.
        dtype: By default that to which the diagonals are promoted.

    Raises:
        TypeError: An argument has another type.
        ValueError: Lengths do not fit, or a diagonal comes twice.

    Example:
        >>> diags([[1.0, 2.0], [3.0]], [0, 1]).todense()
        array([[1, 3],
               [0, 2]], dtype=float32)
    """
    check_dtype("diags", dtype)
    for name, value in (("diagonals", diagonals), ("offsets", offsets)):
        is_one = name == "offsets" and isinstance(value, int | np.integer)
        if not is_one and (not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0):
            raise TypeError(f"[diags] {name} must be a sequence, got {type(value).__name__}")
    if isinstance(offsets, int | np.integer):
        alone = len(diagonals) == 1 and hasattr(diagonals[0], "__len__")
        diagonals, offsets = (diagonals if alone else [diagonals]), [int(offsets)]
    values = [mx.flatten(check_data("diags", d, "a diagonal", dtype)) for d in diagonals]
    offsets = [check_offset("diags", k) for k in offsets]
    if len(values) != len(offsets) or not values:
        raise ValueError(
            f"[diags] offsets must be as many as diagonals, got {len(offsets)} and {len(values)}"
        )
    if len(set(offsets)) < len(offsets):
        raise ValueError(f"[diags] offsets must differ, got {offsets}")
    side = values[0].size + abs(offsets[0])
    n_rows, n_cols = check_shape("diags", (side, side) if shape is None else shape)
    rows, cols = [], []
    for i, k in enumerate(offsets):
        first_row, first_col = max(0, -k), max(0, k)
        length = min(n_rows - first_row, n_cols - first_col)
        if length < 0:
            raise ValueError(f"[diags] there is no diagonal {k} in a matrix of {n_rows} x {n_cols}")
        if values[i].size != length:
            if values[i].size != 1 or shape is None:
                raise ValueError(
                    f"[diags] diagonal {k} of a matrix of {n_rows} x {n_cols} has {length} values, "
                    f"got {values[i].size}"
                )
            values[i] = mx.broadcast_to(values[i], (length,))
        rows.append(np.arange(length, dtype=np.int32) + first_row)
        cols.append(np.arange(length, dtype=np.int32) + first_col)
    data = mx.concatenate([v.astype(mx.result_type(*values)) for v in values])
    data = data if dtype is None else data.astype(dtype)
    return _of_entries(data, np.concatenate(rows), np.concatenate(cols), (n_rows, n_cols))


def kron(A: Sparse | ArrayLike, B: Sparse | ArrayLike) -> CSRArray:
    """Return the Kronecker product: each value of A times B, in its place.

    Example:
        >>> kron(eye(2), [[1.0, 2.0]]).todense()
        array([[1, 2, 0, 0],
               [0, 0, 1, 2]], dtype=float32)
    """
    a, b = (x.tocsr() for x in _matrices("kron", [A, B]))
    shape = check_shape("kron", (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))
    data = mx.flatten(a.data[:, None] * b.data[None, :])
    rows, cols = (
        (np.multiply.outer(of_a, size) + of_b).reshape(-1)
        for of_a, of_b, size in (
            (a.pattern.row_indices[:, None], b.pattern.row_indices[None, :], b.shape[0]),
            (a.pattern.indices[:, None], b.pattern.indices[None, :], b.shape[1]),
        )
    )
    return _of_entries(data, rows.astype(np.int32), cols.astype(np.int32), shape)


def kronsum(A: Sparse | ArrayLike, B: Sparse | ArrayLike) -> CSRArray:
    """Return the Kronecker sum of two square matrices: ``kron(I, A) + kron(B, I)``.

    Raises:
        ValueError: One is not square.
    """
    a, b = (x.tocsr() for x in _matrices("kronsum", [A, B]))
    for x in (a, b):
        if x.shape[0] != x.shape[1]:
            raise ValueError(f"[kronsum] takes square matrices, got shape {x.shape}")
    return kron(eye(b.shape[0], dtype=a.dtype), a) + kron(b, eye(a.shape[0], dtype=b.dtype))


def vstack(arrays: Sequence[Sparse | ArrayLike]) -> CSRArray:
    """Return matrices below one another.

    They keep their blocks if all have one size of blocks, which divides the rows of all but the
    last.

    Raises:
        ValueError: There are none, or they have different numbers of columns.
    """
    return _stack("vstack", arrays, axis=0)


def hstack(arrays: Sequence[Sparse | ArrayLike]) -> CSRArray:
    """Return matrices beside one another; blocks as in :func:`vstack`.

    Raises:
        ValueError: There are none, or they have different numbers of rows.
    """
    return _stack("hstack", arrays, axis=1)


def block_diag(arrays: Sequence[Sparse | ArrayLike]) -> CSRArray:
    """Return matrices one behind the other, zeros beside them; blocks as in :func:`vstack`.

    Raises:
        ValueError: There are none.
    """
    return _stack("block_diag", arrays, axis=None)


def random(
    m: int,
    n: int,
    density: float = 0.01,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> CSRArray:
    """Return a matrix of values drawn from [0, 1) in places drawn at random.

    ``patterns.random`` draws blocks instead, as many in each row.

    Args:
        m, n: The shape.
        density: Which part of the places has a value, in [0, 1]; their number is rounded.
        dtype: Of the values, a floating one.
        seed: Of the places and the values.

    Raises:
        TypeError, ValueError: An argument is not as said.
    """
    shape = check_size("random", "m", m), check_size("random", "n", n)
    if density:
        check_density("random", density)
    check_dtype("random", dtype)
    if not mx.issubdtype(dtype, mx.floating):
        raise TypeError(f"[random] dtype must be floating, got {dtype}")
    seed = check_seed("random", seed)
    n_places, rng = shape[0] * shape[1], np.random.default_rng(seed)
    count = round(density * n_places)
    places = np.sort(rng.choice(n_places, count, replace=False, shuffle=False)) if count else []
    pattern = CSRPattern.from_places(np.asarray(places, np.int64), shape)
    return CSRArray(
        mx.random.uniform(shape=(count,), key=mx.random.key(seed)).astype(dtype), pattern
    )


def softmax(A: Sparse) -> CSRArray:
    """Return the softmax of each row over its stored values: the weights of attention on a graph.

    A row that stores nothing stays empty. Differentiable to any order.

    Raises:
        TypeError: ``A`` is not a sparse array of real floating numbers.

    Example:
        >>> softmax(csr_array(([0.0, 0.0, 1.0], [0, 2, 1], [0, 2, 3]), (2, 3))).data
        array([0.5, 0.5, 1], dtype=float32)
    """
    array = _matrices("softmax", [A])[0].tocsr().canonical()
    if not mx.issubdtype(array.dtype, mx.floating):
        raise TypeError(f"[softmax] A must hold real floating numbers, got {array.dtype}")
    if not array.nnz:
        return array
    pattern, data = array.pattern, array.data.astype(mx.float32)
    of_rows, _ = algebra.gathers(pattern)
    largest = reductions.largest_stored(mx.stop_gradient(data), pattern)
    weights = mx.exp(data - of_rows(largest))
    weights = weights / of_rows(algebra.sum_rows(pattern)(weights))
    return CSRArray(weights.astype(array.dtype), pattern)


def issparse(x: object) -> bool:
    """Return whether ``x`` is a sparse array of this package."""
    return isinstance(x, SparseArray)


def _stack(owner: str, arrays: Sequence[Any], axis: int | None) -> CSRArray:
    if not isinstance(arrays, Iterable):
        raise TypeError(f"[{owner}] arrays must be a sequence, got {type(arrays).__name__}")
    csr = _matrices(owner, list(arrays))
    if not csr:
        raise ValueError(f"[{owner}] takes at least one array")
    if axis is not None and len({a.shape[1 - axis] for a in csr}) > 1:
        name = ("columns", "rows")[axis]
        raise ValueError(f"[{owner}] numbers of {name} differ: {[a.shape for a in csr]}")
    block_size = csr[0].block_size
    moved = (0, 1) if axis is None else (axis,)
    if any(a.block_size != block_size for a in csr) or any(
        a.shape[i] % block_size for a in csr[:-1] for i in moved
    ):
        csr, block_size = [a.tocsr() for a in csr], 1
    sizes = [tuple(a.shape[i] if i in moved else 0 for i in (0, 1)) for a in csr]
    ends = list(accumulate(sizes, lambda a, b: (a[0] + b[0], a[1] + b[1])))
    shape = tuple(ends[-1][i] if i in moved else csr[0].shape[i] for i in (0, 1))
    shape = check_shape(owner, shape)
    rows, cols = [], []
    for a, size, end in zip(csr, sizes, ends, strict=True):
        rows.append(a.pattern.row_indices + (end[0] - size[0]) // block_size)
        cols.append(a.pattern.indices + (end[1] - size[1]) // block_size)
    dtype = mx.result_type(*(a.data for a in csr))
    data = mx.concatenate([promoted(a.data, dtype) for a in csr])
    return _of_entries(data, np.concatenate(rows), np.concatenate(cols), shape, block_size)


def _of_entries(
    data: mx.array,
    rows: np.ndarray,
    cols: np.ndarray,
    shape: tuple[int, int],
    block_size: int = 1,
) -> CSRArray:
    """Return the canonical array of entries; those of one place add up."""
    merged = algebra.merge(rows.astype(np.int32), cols.astype(np.int32), shape, block_size)
    return CSRArray(merged.sums(data), merged.pattern)


def _matrices(owner: str, arrays: Sequence[Any]) -> list[CSRArray]:
    """Return arrays as CSR, vectors as rows. NumPy's float64 stays float64 beside such arrays."""
    dtypes = [x.dtype for x in arrays if isinstance(x, SparseArray | mx.array)]
    return [_matrix(owner, x, mx.float64 in dtypes) for x in arrays]


def _matrix(owner: str, x: Any, is_wide: bool) -> CSRArray:
    if isinstance(x, SparseVector):
        return x[None]
    if is_sparse(x):
        return x if isinstance(x, CSRArray) else x.tocsr()
    if hasattr(x, "tocsr"):
        raise TypeError(
            f"[{owner}] takes arrays of this package, got {type(x).__name__}; {conversion(x)} "
            "makes one of it"
        )
    if x is None:
        raise TypeError(f"[{owner}] an array must be sparse or dense, got None")
    keeps = is_wide and not isinstance(x, mx.array) and np.asarray(x).dtype == np.float64
    x = check_data(owner, x, "an array", mx.float64 if keeps else None)
    check_matrix(owner, "an array", x)
    return from_dense(x)
