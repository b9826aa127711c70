"""Functions that make sparse arrays: from triplets, from dense arrays, from and to SciPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import COOArray, CSRArray, is_sparse
from mlx_sparse_nn.core.blocks import split_blocks
from mlx_sparse_nn.core.checks import (
    INT32_MAX,
    ArrayLike,
    check_block_dtype,
    check_data,
    check_indices,
    check_matrix,
    check_shape,
    check_size,
)
from mlx_sparse_nn.core.edges import pad_matrix
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.sparse import SparseArray, check_dtype
from mlx_sparse_nn.core.vector import SparseVector

if TYPE_CHECKING:
    import scipy.sparse


_FORMS = "(data, indices, indptr), (data, (row, col)), a dense matrix, a sparse array or a shape"


def coo_array(
    arg: Any, shape: tuple[int, int] | None = None, dtype: mx.Dtype | None = None
) -> COOArray:
    """Make a sparse array of coordinates: ``coo_array((data, (row, col)), shape=(m, n))``.

    Args:
        arg: Stored values ``(nnz,)`` and their coordinates, two ``(nnz,)`` integer arrays; or what
            else :func:`csr_array` takes.
        shape: ``(n_rows, n_cols)``; by default as small as the coordinates allow.
        dtype: Of the values.

    Raises:
        TypeError: ``data`` is not numeric or the coordinates are not integers.
        ValueError: Lengths differ or a coordinate is out of range.
    """
    owner = "coo_array"
    check_dtype(owner, dtype)
    if not _is_coordinates(arg):
        return _csr(owner, arg, shape, dtype).tocoo()
    data, coordinates = arg
    row, col = _unpack(owner, "(row, col)", coordinates, 2)
    row, col = (check_indices(owner, name, a) for name, a in (("row", row), ("col", col)))
    if shape is None:
        shape = int(row.max(initial=-1)) + 1, int(col.max(initial=-1)) + 1
    return COOArray(check_data(owner, data, "data", dtype), row, col, shape)


def csr_array(
    arg: Any,
    shape: tuple[int, int] | None = None,
    dtype: mx.Dtype | None = None,
    *,
    canonical: bool = False,
) -> CSRArray:
    """Make a sparse array of scalars, as SciPy's ``csr_array``.

    Args:
        arg: ``(data, indices, indptr)``: stored values ``(nnz,)``, their columns ``(nnz,)``, and
            row starts ``(n_rows + 1,)``; or ``(data, (row, col))``, of which equal coordinates add
            up; or a dense matrix; or a sparse array of this package or of SciPy; or a shape
            ``(m, n)``, which gives an empty matrix.
        shape: ``(n_rows, n_cols)``; by default as small as the indices allow.
        dtype: Of the values. Without it, float64 of NumPy becomes float32, as by ``mx.array``;
            ``mx.float64`` keeps it, on the CPU.
        canonical: Sort the columns of each row and add up repeated entries. Products are right
            either way.

    Raises:
        TypeError: ``data`` is not numeric or the indices are not integers.
        ValueError: The indices do not describe a matrix of that shape.

    Example:
        >>> csr_array([[0.0, 2.0], [0.0, 0.0]])
        CSRArray(2 x 2, mlx.core.float32, 1 stored values, density 0.25)
    """
    check_dtype("csr_array", dtype)
    array = _csr("csr_array", arg, shape, dtype)
    return array.canonical() if canonical else array


def _csr(owner: str, arg: Any, shape: Any, dtype: mx.Dtype | None) -> CSRArray:
    """Return what :func:`csr_array` takes as CSR of scalars."""
    if _is_coordinates(arg):
        return coo_array(arg, shape, dtype).tocsr()
    if isinstance(arg, tuple) and len(arg) == 2:
        n_rows, n_cols = check_shape(owner, arg)
        if n_rows == INT32_MAX:
            raise ValueError(f"[{owner}] n_rows must be below 2**31 - 1: there is an end for each")
        pattern = CSRPattern(np.zeros(n_rows + 1, np.int32), [], (n_rows, n_cols))
        return CSRArray(mx.zeros(0, mx.float32 if dtype is None else dtype), pattern)
    if isinstance(arg, tuple):
        data, indices, indptr = _unpack(owner, _FORMS, arg, 3)
        if shape is None:
            indices = check_indices(owner, "indices", indices)
            shape = len(indptr) - 1, int(indices.max(initial=-1)) + 1
        return CSRArray(check_data(owner, data, "data", dtype), CSRPattern(indptr, indices, shape))
    arg = from_scipy(arg, dtype) if _is_scipy(arg) else arg
    arg = arg[None] if isinstance(arg, SparseVector) else arg
    if is_sparse(arg):
        array = arg.tocsr()
        array = array if dtype is None else array.astype(dtype)
    elif isinstance(arg, mx.array | np.ndarray | list):
        values = check_data(owner, arg, "a dense matrix", dtype)
        if values.ndim == 1:
            raise ValueError(
                f"[{owner}] makes matrices, got shape {values.shape}; {owner}([x])[0] is a sparse "
                "vector"
            )
        array = from_dense(values)
    else:
        raise TypeError(f"[{owner}] takes {_FORMS}, got {type(arg).__name__}")
    if shape is not None and array.shape != check_shape(owner, shape):
        raise ValueError(f"[{owner}] shape is {tuple(shape)}, but the matrix has {array.shape}")
    return array


def bsr_array(
    arg: tuple[ArrayLike, ArrayLike, ArrayLike],
    shape: tuple[int, int],
    dtype: mx.Dtype | None = None,
) -> CSRArray:
    """Make a block-sparse array: ``bsr_array((blocks, indices, indptr), shape=(m, n))``.

    Args:
        arg: Stored blocks ``(n_blocks, B, B)``, their block-columns ``(n_blocks,)``, and starts of
            the block-rows ``(n_block_rows + 1,)``, as SciPy lays them out.
        shape: ``(n_rows, n_cols)`` in scalars. Unlike in SciPy, the last blocks may reach past it.
        dtype: Of the values.

    Raises:
        TypeError: ``blocks`` is complex or not numeric, or the indices are not integers.
        ValueError: The blocks are not square, or the indices do not describe such a matrix.
    """
    check_dtype("bsr_array", dtype)
    blocks, indices, indptr = _unpack("bsr_array", "(blocks, indices, indptr)", arg, 3)
    blocks = check_data("bsr_array", blocks, "blocks", dtype)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[1] == 0:
        raise ValueError(f"[bsr_array] blocks must be (n_blocks, B, B), got shape {blocks.shape}")
    block_size = blocks.shape[1]
    check_block_dtype("bsr_array", blocks.dtype, block_size)
    data = blocks.reshape(-1) if block_size == 1 else blocks
    return CSRArray(data, CSRPattern(indptr, indices, shape, block_size))


def from_dense(w: ArrayLike, block_size: int = 1) -> CSRArray:
    """Make a sparse array of the blocks of ``w`` that hold a nonzero.

    Where the blocks lie is read on the host, so ``w`` cannot be an array that MLX traces.

    Args:
        w: ``(n_rows, n_cols)``.
        block_size: Side of the blocks.

    Raises:
        TypeError: ``w`` is not numeric, or complex and ``block_size`` is not 1.
        ValueError: ``w`` is not a matrix.
    """
    w = check_data("from_dense", w, "w")
    check_matrix("from_dense", "w", w)
    block_size = check_size("from_dense", "block_size", block_size, minimum=1)
    check_block_dtype("from_dense", w.dtype, block_size)
    shape, w = check_shape("from_dense", w.shape), pad_matrix(w, block_size)
    blocks = split_blocks(w, block_size)
    places = np.flatnonzero(np.array((blocks != 0).any(axis=(2, 3))))
    pattern = CSRPattern.from_places(places, shape, block_size)
    if block_size == 1:
        # Single elements: take_along_axis is ten times faster on the CPU than an index.
        return CSRArray(mx.take_along_axis(w.reshape(-1), mx.array(places), axis=0), pattern)
    # By lines of blocks, which lie in one piece: twice as fast as by blocks.
    n_lines = w.shape[1] // block_size
    lines = pattern.row_indices[:, None].astype(np.int64) * block_size + np.arange(block_size)
    lines = lines * n_lines + pattern.indices[:, None]
    data = w.reshape(-1, block_size)[mx.array(lines)]
    return CSRArray(data, pattern)


def from_scipy(array: Any, dtype: mx.Dtype | None = None) -> CSRArray | COOArray | SparseVector:
    """Make a sparse array of one of SciPy: csr, bsr and coo as stored, others by their ``tocsr``;
    of one axis, a SparseVector.

    SciPy's bsr has whole blocks alone. For others, convert with ``.tocsr()`` there, and go on with
    ``from_dense(A.todense(), block_size)`` here.

    Args:
        array: The SciPy array.
        dtype: Of the values. By default as ``mx.array`` has them: float64 becomes float32 and
            complex128 complex64, integers and bools stay what they are.

    Raises:
        TypeError: It is none of SciPy's, or of complex blocks.
        ValueError: The blocks are not square, or indices do not fit 32 bits.
    """
    check_dtype("from_scipy", dtype)
    if not _is_scipy(array):
        raise TypeError(
            f"[from_scipy] takes a sparse array of SciPy, got {type(array).__name__}; "
            "use from_dense"
        )
    if array.ndim == 1:
        row = array.tocoo().reshape(1, -1)
        return SparseVector(csr_array((row.data, (row.row, row.col)), row.shape, dtype))
    if array.format == "bsr":
        return bsr_array((array.data, array.indices, array.indptr), array.shape, dtype)
    if array.format == "coo":
        return coo_array((array.data, (array.row, array.col)), array.shape, dtype)
    array = array.tocsr()
    return csr_array((array.data, array.indices, array.indptr), array.shape, dtype)


def to_scipy(
    array: CSRArray | COOArray | SparseVector,
) -> scipy.sparse.csr_array | scipy.sparse.bsr_array | scipy.sparse.coo_array:
    """Return a SciPy array of the same format: csr, bsr (``block_size > 1``) or coo, which a vector
    becomes too.

    NumPy has no bfloat16, and SciPy no float16: such values become float32.

    Raises:
        TypeError: ``array`` is not a sparse array of this package.
        ValueError: Its last blocks reach past the matrix, which SciPy's bsr cannot hold.
    """
    import scipy.sparse

    if not isinstance(array, SparseArray):
        raise TypeError(f"[to_scipy] takes a CSRArray or COOArray, got {type(array).__name__}")
    is_16_bits = array.dtype in (mx.float16, mx.bfloat16)
    data = np.array(array.data.astype(mx.float32) if is_16_bits else array.data)
    if isinstance(array, COOArray | SparseVector):
        return scipy.sparse.coo_array((data, array.coords), shape=array.shape)
    parts = (data, array.pattern.indices.copy(), array.pattern.indptr.copy())
    if array.block_size > 1:
        if array.pattern.layout.has_edges:
            raise ValueError(
                f"[to_scipy] SciPy's bsr holds whole blocks, and block_size {array.block_size} "
                f"does not divide the shape {array.shape}; use to_scipy(A.tocsr())"
            )
        return scipy.sparse.bsr_array(parts, shape=array.shape)
    return scipy.sparse.csr_array(parts, shape=array.shape)


def _is_scipy(arg: Any) -> bool:
    is_ours = isinstance(arg, SparseArray)
    return not is_ours and hasattr(arg, "format") and hasattr(arg, "tocsr")


def _is_coordinates(arg: Any) -> bool:
    """Return whether ``arg`` is ``(data, (row, col))``."""
    return isinstance(arg, tuple) and len(arg) == 2 and isinstance(arg[1], tuple | list)


def _unpack(owner: str, form: str, arg: Any, length: int) -> tuple:
    if not isinstance(arg, tuple | list) or len(arg) != length:
        raise TypeError(f"[{owner}] takes {form}, got {type(arg).__name__}")
    return tuple(arg)
