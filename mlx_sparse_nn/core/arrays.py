"""CSRArray: stored values on a CSRPattern, with SciPy's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Number
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import algebra, edges, index, ops
from mlx_sparse_nn.core.checks import (
    ArrayLike,
    check_block_dtype,
    check_data,
    check_indices,
    check_range,
    check_shape,
)
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.core.transforms import defer_to
from mlx_sparse_nn.core.value_maps import Gather, SumOfRuns


class CSRArray:
    """A sparse matrix: an MLX array of stored values on a fixed :class:`CSRPattern`.

    The values may be tracers: a CSRArray can be built and used inside functions that MLX
    differentiates, maps or compiles.

    Args:
        data: ``(nnz,)``, or ``(n_blocks, B, B)`` for a pattern of blocks.
        pattern: Where they lie.

    Raises:
        TypeError: ``data`` is not numeric, or is complex blocks, or ``pattern`` is not a
            CSRPattern.
        ValueError: ``data`` does not have the shape that the pattern needs.

    Example:
        >>> A = csr_array(([4.0, 5.0, 6.0], [0, 2, 1], [0, 2, 3]), shape=(2, 3))
        >>> A @ mx.array([1.0, 1.0, 1.0])
        array([9, 6], dtype=float32)
    """

    # NumPy then leaves `x @ A` and `2 * A` to the reflected operators below.
    __array_ufunc__ = None

    def __init__(self, data: ArrayLike, pattern: CSRPattern):
        defer_to(CSRArray)
        check_pattern("CSRArray", pattern)
        data = check_data("CSRArray", data)
        if tuple(data.shape) != pattern.data_shape:
            raise ValueError(
                f"[CSRArray] data has shape {data.shape}, the pattern needs {pattern.data_shape}"
            )
        check_block_dtype("CSRArray", data.dtype, pattern.block_size)
        self.data = data
        self.pattern = pattern

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_rows, n_cols)``."""
        return self.pattern.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nnz(self) -> int:
        """Number of stored values that lie in the matrix."""
        return self.pattern.nnz

    @property
    def density(self) -> float:
        """Stored fraction of the matrix."""
        return self.pattern.density

    @property
    def block_size(self) -> int:
        return self.pattern.block_size

    @property
    def dtype(self) -> mx.Dtype:
        return self.data.dtype

    @property
    def T(self) -> CSRArray:
        """The transpose, on the cached transposed pattern."""
        data = Gather(self.pattern.transpose_perm, self.pattern.n_blocks)(self.data)
        return CSRArray(data.swapaxes(1, 2) if data.ndim == 3 else data, self.pattern.T)

    @property
    def H(self) -> CSRArray:
        """The conjugate transpose."""
        transposed = self.T
        if self.dtype == mx.complex64:
            transposed.data = mx.conjugate(transposed.data)
        return transposed

    def todense(self) -> mx.array:
        """Return the dense ``(n_rows, n_cols)`` array; repeated entries add up."""
        return ops.todense(self.data, self.pattern.layout)

    def tocsr(self) -> CSRArray:
        """Return the same matrix with ``block_size`` 1, rows kept in stored order."""
        block_size = self.block_size
        if block_size == 1:
            return self
        # Value (j, r, c) of block-row R comes before (j + 1, r, c): sort by row, keep the rest.
        within = np.arange(block_size, dtype=np.int32)
        row = self.pattern.row_indices[:, None, None] * block_size + within[:, None]
        col = self.pattern.indices[:, None, None] * block_size + within
        row, col = (np.broadcast_to(a, self.pattern.data_shape).reshape(-1) for a in (row, col))
        data = self.data.reshape(-1)
        if self.nnz < data.size:
            inside = np.flatnonzero((row < self.shape[0]) & (col < self.shape[1]))
            row, col, data = row[inside], col[inside], Gather(inside, data.size)(data)
        indptr, indices, order = index.sort_rows(row, col, self.shape)
        return CSRArray(
            Gather(order, order.size)(data), CSRPattern._of(indptr, indices, self.shape)
        )

    def tocoo(self) -> COOArray:
        """Return the same matrix as coordinates, rows in order."""
        scalar = self.tocsr()
        return COOArray(scalar.data, scalar.pattern.row_indices, scalar.pattern.indices, self.shape)

    def astype(self, dtype: mx.Dtype) -> CSRArray:
        """Return a copy whose values are cast to ``dtype``."""
        return CSRArray(self.data.astype(dtype), self.pattern)

    def canonical(self) -> CSRArray:
        """Return the same matrix with the columns of each row sorted, and none repeated."""
        if self.pattern.is_canonical:
            return self
        merged = algebra.canonical(self.pattern)
        return CSRArray(merged.sums(self.data), merged.pattern)

    def sum(self, axis: int | None = None) -> mx.array:
        """Sum all values, or over rows (``axis=0``, ``(n_cols,)``) or columns (``axis=1``).

        Integers and bools have the dtype that ``mx.sum`` gives them.
        """
        dtype = mx.zeros(1, self.dtype).sum().dtype
        if axis is None:
            # MLX 0.32.4 may never return from the sum of an empty array that NumPy made.
            data = edges.clear(self.pattern.layout, self.data)
            return data.sum() if self.nnz else mx.zeros((), dtype)
        if isinstance(axis, bool) or axis not in (-2, -1, 0, 1):
            raise ValueError(f"[CSRArray.sum] axis must be None, 0 or 1, got {axis!r}")
        if not mx.issubdtype(dtype, mx.inexact):  # which have no products
            scalar = self.tocsr()
            places = (scalar.pattern.indices, scalar.pattern.row_indices)[axis % 2]
            sums = mx.zeros(self.shape[1 - axis % 2], dtype)
            return sums.at[mx.array(places)].add(scalar.data.astype(dtype)) if self.nnz else sums
        if axis % 2 == 0:
            return mx.ones(self.shape[0], self.dtype) @ self
        return self @ mx.ones(self.shape[1], self.dtype)

    def diagonal(self) -> mx.array:
        """Return the main diagonal, ``(min(n_rows, n_cols),)``; repeated entries add up."""
        pattern, block_size, length = self.pattern, self.block_size, min(self.shape)
        stored = np.flatnonzero(pattern.row_indices == pattern.indices)
        places = (stored[:, None] * block_size + np.arange(block_size)) * block_size + np.arange(
            block_size
        )
        rows = (pattern.indices[stored, None] * block_size + np.arange(block_size)).reshape(-1)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=length)[:length]
        order = places.reshape(-1)[order[: counts.sum()]]  # what lies outside comes last
        return SumOfRuns(order, np.cumsum(counts) - counts, self.data.size)(self.data.reshape(-1))

    def __matmul__(self, x: Any) -> Any:
        """Multiply by a dense vector or matrix, or by a sparse matrix, which gives a sparse one."""
        if not is_sparse(x):
            return _matmul("A @ x", self, x)
        if x.shape[0] != self.shape[1]:
            raise ValueError(f"[A @ B] A is {self.shape}, B is {x.shape}: inner sizes differ")
        a, b = _of_one_block_size(self, x)
        return CSRArray(*algebra.matmul(a.data, a.pattern, b.data, b.pattern))

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        x = _dense("x @ A", x)
        if x.shape[-1:] != self.shape[:1]:
            raise ValueError(
                f"[x @ A] x has shape {x.shape}, A is {self.shape}: inner sizes differ"
            )
        return ops.spmm_t(self.data, self.pattern, x)

    def __add__(self, other: CSRArray | COOArray | ArrayLike | complex) -> Any:
        """Add a sparse matrix; or a dense one, which gives a dense one; or 0, as ``sum`` does."""
        if is_sparse(other):
            a, b = _alike("A + B", self, other)
            return CSRArray(*algebra.add(a.data, a.pattern, b.data, b.pattern))
        if _is_scalar(other):
            if isinstance(other, Number) and other == 0:
                return self
            raise TypeError(
                "[A + s] a sparse matrix plus a scalar is dense; use A.todense() + s, or "
                "CSRArray(A.data + s, A.pattern) for the stored values alone"
            )
        return self.todense() + _fitting("A + D", self, other)

    __radd__ = __add__

    def __sub__(self, other: CSRArray | COOArray | ArrayLike | complex) -> Any:
        """Subtract what can be added."""
        return self + (-_operand("A - B", other))

    def __rsub__(self, other: ArrayLike | complex) -> Any:
        return -self + other

    def __mul__(self, other: CSRArray | COOArray | ArrayLike | complex) -> CSRArray:
        """Multiply by a scalar, or elementwise: :meth:`multiply`. A matrix product is ``A @ x``."""
        if _is_scalar(other):
            return CSRArray(self.data * _weak(other), self.pattern)
        return self.multiply(other)

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex) -> CSRArray:
        """Divide by a scalar; or elementwise by a dense array, as :meth:`multiply` multiplies."""
        if is_sparse(other):
            raise TypeError("[A / B] has no value where B stores nothing; divide by B.todense()")
        if _is_scalar(other):
            return CSRArray(self.data / _weak(other), self.pattern)
        return CSRArray(self.data / self._values_of("A / D", other), self.pattern)

    def multiply(self, other: CSRArray | COOArray | ArrayLike | complex) -> CSRArray:
        """Multiply elementwise, by what broadcasts to the shape of this matrix.

        Args:
            other: A sparse or dense matrix of this shape; ``(n_rows, 1)``, a number for each row;
                ``(1, n_cols)`` or ``(n_cols,)``, one for each column; or a scalar.

        Returns:
            Of a sparse ``other``, what both store; otherwise the pattern of this matrix.
        """
        if _is_scalar(other):
            return self * other
        if is_sparse(other) and other.shape == self.shape:
            a, b = (array.canonical() for array in _alike("A.multiply", self, other))
            return CSRArray(*algebra.multiply(a.data, a.pattern, b.data, b.pattern))
        if is_sparse(other):
            other = other.todense()  # a row or column
        return CSRArray(self.data * self._values_of("A.multiply", other), self.pattern)

    def _values_of(self, owner: str, other: object) -> mx.array:
        """Return a dense array, broadcast to this shape, where this matrix stores values."""
        return algebra.values_at(self.pattern, _fitting(owner, self, other))

    def __neg__(self) -> CSRArray:
        return CSRArray(-self.data, self.pattern)

    def __pos__(self) -> CSRArray:
        return self

    def __len__(self) -> int:
        raise TypeError("sparse array length is ambiguous; use nnz or shape[0]")

    def __bool__(self) -> bool:
        return _truth(self)

    def __iter__(self) -> Iterator[CSRArray]:
        """Yield the rows, each a CSRArray of shape ``(1, n_cols)``."""
        scalar = self.tocsr()
        for start, stop in zip(scalar.pattern.indptr[:-1], scalar.pattern.indptr[1:], strict=True):
            indices = scalar.pattern.indices[start:stop]
            pattern = CSRPattern([0, indices.size], indices, (1, self.shape[1]))
            yield CSRArray(scalar.data[int(start) : int(stop)], pattern)

    def __repr__(self) -> str:
        blocks = f", block_size={self.block_size}" if self.block_size > 1 else ""
        return (
            f"CSRArray({self.shape[0]} x {self.shape[1]}, {self.dtype}{blocks}, "
            f"{self.nnz} stored values, density {self.density:.3g})"
        )


class COOArray:
    """A sparse matrix as coordinates, to build a :class:`CSRArray` from.

    Whatever it is asked to compute, its :meth:`tocsr` computes, and gives a CSRArray.

    Args:
        data: ``(nnz,)`` stored values.
        row: ``(nnz,)`` integers in ``[0, n_rows)``.
        col: ``(nnz,)`` integers in ``[0, n_cols)``.
        shape: ``(n_rows, n_cols)``.

    Raises:
        TypeError: ``data`` is not numeric or the coordinates are not integers.
        ValueError: Lengths differ or a coordinate is out of range.
    """

    __array_ufunc__ = None

    def __init__(self, data: ArrayLike, row: ArrayLike, col: ArrayLike, shape: tuple[int, int]):
        defer_to(COOArray)
        self.data = check_data("COOArray", data)
        self.shape = check_shape("COOArray", shape)
        self.row = _coordinates("row", row, self.shape[0])
        self.col = _coordinates("col", col, self.shape[1])
        lengths = {"data": self.data.shape, "row": self.row.shape, "col": self.col.shape}
        if len(set(lengths.values())) > 1 or self.data.ndim != 1:
            raise ValueError(f"[COOArray] data, row and col must be of one length, got {lengths}")

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nnz(self) -> int:
        """Number of stored values, repeated ones included."""
        return self.row.size

    @property
    def density(self) -> float:
        """Stored fraction of the matrix."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def dtype(self) -> mx.Dtype:
        return self.data.dtype

    def tocsr(self, canonical: bool = True) -> CSRArray:
        """Return the same matrix with its rows grouped.

        Args:
            canonical: Also sort the columns of each row and add up repeated entries.
        """
        if canonical:
            merged = algebra.Merged(self.row, self.col, self.shape)
            return CSRArray(merged.sums(self.data), merged.pattern)
        indptr, indices, order = index.sort_rows(self.row, self.col, self.shape)
        pattern = CSRPattern._of(indptr, indices, self.shape)
        return CSRArray(Gather(order, self.nnz)(self.data), pattern)

    def todense(self) -> mx.array:
        """Return the dense ``(n_rows, n_cols)`` array; repeated entries add up."""
        return self.tocsr(canonical=False).todense()

    @property
    def T(self) -> COOArray:
        """The transpose."""
        return COOArray(self.data, self.col, self.row, (self.shape[1], self.shape[0]))

    @property
    def H(self) -> COOArray:
        """The conjugate transpose."""
        data = mx.conjugate(self.data) if self.dtype == mx.complex64 else self.data
        return COOArray(data, self.col, self.row, (self.shape[1], self.shape[0]))

    def tocoo(self) -> COOArray:
        """Return the array itself."""
        return self

    def astype(self, dtype: mx.Dtype) -> COOArray:
        """Return a copy whose values are cast to ``dtype``."""
        return COOArray(self.data.astype(dtype), self.row, self.col, self.shape)

    def sum(self, axis: int | None = None) -> mx.array:
        """See :meth:`CSRArray.sum`."""
        return self.tocsr(canonical=False).sum(axis)

    def diagonal(self) -> mx.array:
        """See :meth:`CSRArray.diagonal`."""
        return self.tocsr(canonical=False).diagonal()

    def multiply(self, other: CSRArray | COOArray | ArrayLike | complex) -> CSRArray:
        """See :meth:`CSRArray.multiply`."""
        return self.tocsr(canonical=False).multiply(other)

    def __matmul__(self, x: Any) -> Any:
        return self.tocsr(canonical=False) @ x

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        return x @ self.tocsr(canonical=False)

    def __add__(self, other: CSRArray | COOArray | ArrayLike | complex) -> Any:
        return self.tocsr(canonical=False) + other

    __radd__ = __add__

    def __sub__(self, other: CSRArray | COOArray | ArrayLike | complex) -> Any:
        return self.tocsr(canonical=False) - other

    def __rsub__(self, other: ArrayLike | complex) -> Any:
        return other - self.tocsr(canonical=False)

    def __mul__(self, other: CSRArray | COOArray | ArrayLike | complex) -> Any:
        return self.tocsr(canonical=False) * other

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex) -> CSRArray:
        return self.tocsr(canonical=False) / other

    def __neg__(self) -> COOArray:
        return COOArray(-self.data, self.row, self.col, self.shape)

    def __pos__(self) -> COOArray:
        return self

    def __len__(self) -> int:
        raise TypeError("sparse array length is ambiguous; use nnz or shape[0]")

    def __bool__(self) -> bool:
        return _truth(self)

    def __iter__(self) -> Iterator[CSRArray]:
        """Yield the rows, each a CSRArray of shape ``(1, n_cols)``."""
        return iter(self.tocsr(canonical=False))

    def __repr__(self) -> str:
        return (
            f"COOArray({self.shape[0]} x {self.shape[1]}, {self.dtype}, "
            f"{self.nnz} stored values, density {self.density:.3g})"
        )


def csr_matmul(A: CSRArray, x: ArrayLike) -> mx.array:
    """Multiply a sparse matrix by a dense array, as ``A @ x``.

    Args:
        A: ``(n_rows, n_cols)``.
        x: ``(n_cols,)``, ``(n_cols, p)`` or any ``(..., n_cols, p)``.

    Returns:
        ``(n_rows,)``, ``(n_rows, p)`` or ``(..., n_rows, p)`` of the promoted dtype.

    Raises:
        TypeError: ``A`` is not a CSRArray, ``x`` is sparse, or the dtypes have no product.
        ValueError: The inner dimensions differ or ``x`` is a scalar.
    """
    if not isinstance(A, CSRArray):
        raise TypeError(f"[csr_matmul] A must be a CSRArray, got {type(A).__name__}")
    return _matmul("csr_matmul", A, x)


def _matmul(owner: str, A: CSRArray, x: ArrayLike) -> mx.array:
    x = _dense(owner, x)
    inner = x.shape[-1 if x.ndim == 1 else -2] if x.ndim else None
    if inner != A.shape[1]:
        raise ValueError(f"[{owner}] A is {A.shape}, x has shape {x.shape}: inner sizes differ")
    if x.ndim == 1:
        return ops.spmm(A.data, A.pattern, x)
    return ops.spmm(A.data, A.pattern, x.swapaxes(-1, -2)).swapaxes(-1, -2)


def _coordinates(name: str, values: ArrayLike, size: int) -> np.ndarray:
    indices = check_indices("COOArray", name, values)
    check_range("COOArray", name, indices, size)
    return indices


def is_sparse(x: object) -> TypeGuard[CSRArray | COOArray]:
    """Return whether ``x`` is a sparse array of this package."""
    return isinstance(x, CSRArray | COOArray)


def _of_one_block_size(a: CSRArray | COOArray, b: CSRArray | COOArray) -> tuple[CSRArray, CSRArray]:
    """Return both as CSR with the same size of blocks: scalars, unless they share one."""
    a, b = (array.tocsr() if isinstance(array, COOArray) else array for array in (a, b))
    return (a, b) if a.block_size == b.block_size else (a.tocsr(), b.tocsr())


def _alike(owner: str, a: CSRArray | COOArray, b: CSRArray | COOArray) -> tuple[CSRArray, CSRArray]:
    """Return both as :func:`_of_one_block_size` does, or raise where shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"[{owner}] A is {a.shape}, B is {b.shape}: shapes differ")
    return _of_one_block_size(a, b)


def _is_scalar(x: object) -> bool:
    """Return whether ``x`` is a number, or an array of no axes."""
    return isinstance(x, Number) or (hasattr(x, "dtype") and getattr(x, "ndim", 1) == 0)


def _weak(x: Any) -> Any:
    """Return a scalar so that NumPy's dtype does not decide that of the result."""
    return x.item() if isinstance(x, np.generic | np.ndarray) else x


def _operand(owner: str, x: Any) -> Any:
    """Return what has a negative: numbers and arrays as they are, lists as an array."""
    return x if is_sparse(x) or _is_scalar(x) else _dense(owner, x)


def _fitting(owner: str, a: CSRArray, x: object) -> mx.array:
    """Return a dense array that broadcasts to the shape of ``a``, or raise."""
    x = _dense(owner, x)
    shape = (1,) * (2 - x.ndim) + tuple(x.shape)
    if len(shape) == 2 and all(n in (1, size) for n, size in zip(shape, a.shape, strict=True)):
        return x.reshape(shape)
    raise ValueError(
        f"[{owner}] A is {a.shape}, and shape {tuple(x.shape)} does not broadcast to it"
    )


def _dense(operation: str, x: object) -> mx.array:
    if isinstance(x, mx.array):
        return x
    if isinstance(x, np.ndarray | list | tuple):
        return check_data(operation, x)
    raise TypeError(f"[{operation}] x must be a dense array, got {_describe(x)}")


def _describe(x: object) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")


def _truth(array: CSRArray | COOArray) -> bool:
    if array.shape != (1, 1):
        raise ValueError("The truth value of an array with more than one element is ambiguous.")
    return bool(array.nnz)
