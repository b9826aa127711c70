"""CSRArray: stored values on a CSRPattern, with SciPy's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeGuard

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import algebra, draw, edges, index, indexing, ops, reductions
from mlx_sparse_nn.core.checks import (
    ArrayLike,
    check_block_dtype,
    check_data,
    check_indices,
    check_number,
    check_range,
    check_shape,
)
from mlx_sparse_nn.core.elementwise import Elementwise
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.core.transforms import defer_to
from mlx_sparse_nn.core.value_maps import Gather, SumOfRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class CSRArray(Elementwise):
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

    @property
    def indptr(self) -> np.ndarray:
        """Where each row, or block-row, begins: read-only int32 on the host."""
        return self.pattern.indptr

    @property
    def indices(self) -> np.ndarray:
        """The column, or block-column, of each stored value or block: read-only int32."""
        return self.pattern.indices

    @property
    def nbytes(self) -> int:
        """Bytes of the stored values and their indices."""
        return self.data.nbytes + self.indptr.nbytes + self.indices.nbytes

    def todense(self) -> mx.array:
        """Return the dense ``(n_rows, n_cols)`` array; repeated entries add up.

        Raises:
            ValueError: It is larger than the memory of the machine.
        """
        return ops.todense(self.data, self.pattern.layout)

    def toarray(self) -> mx.array:
        """Return :meth:`todense`."""
        return self.todense()

    def copy(self) -> CSRArray:
        """Return an array of the same values. Neither changes when the other's ``data`` does."""
        return CSRArray(self.data[:], self.pattern)

    def transpose(self) -> CSRArray:
        """Return ``A.T``."""
        return self.T

    def dot(self, other: Any) -> Any:
        """Return ``A @ other``, or ``A * other`` of a scalar."""
        return self * other if _is_scalar(other) else self @ other

    def eval(self) -> CSRArray:
        """Evaluate the values, and return the array: ``mx.eval(A)`` does not see into it."""
        mx.eval(self.data)
        return self

    def plot(self, ax: Axes | None = None, *, cmap: str = "Blues") -> Axes:
        """Draw the matrix on matplotlib's axes, to scale, and return them; values shade it.

        Args:
            ax: Where to draw; by default new axes.
            cmap: Name of a colour map, light for what is not stored.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: ``ax`` has no axes of matplotlib.
        """
        values = self._cleared
        values = mx.abs(values) if self.dtype == mx.complex64 else values
        return draw.plot(self.pattern, ax, cmap=cmap, values=values)

    def spy(self, width: int = 64) -> str:
        """Return the pattern drawn in characters; see :meth:`CSRPattern.spy`."""
        return self.pattern.spy(width)

    def _repr_svg_(self) -> str:
        return self.pattern._repr_svg_()

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

    def map_values(self, function: Callable[[mx.array], mx.array]) -> CSRArray:
        """Return a matrix of what ``function``, which takes 0 to 0, makes of the values.

        Values of one place are added up first.
        """
        array = self.canonical()
        data, inside = array.data, array._inside
        if inside is None:
            return CSRArray(function(data), array.pattern)
        # Ones outside: a slope that is infinite at 0 would make their gradients nan.
        out = function(mx.where(inside, data, mx.ones((), data.dtype)))
        return CSRArray(mx.where(inside, out, mx.zeros((), out.dtype)), array.pattern)

    def power(self, n: float) -> CSRArray:
        """Return each value to the power ``n``, a number above 0: ``A ** n``.

        Raises:
            TypeError: ``n`` is not a number.
            ValueError: It is not above 0: then what is not stored would not be 0.
        """
        check_number("CSRArray.power", "n", n)
        if not n > 0:
            raise ValueError(f"[CSRArray.power] n must be above 0, got {n}; use A.todense() ** n")
        return self.map_values(lambda data: data**n)

    __pow__ = power

    def conj(self) -> CSRArray:
        """Return the complex conjugate."""
        is_complex = self.dtype == mx.complex64
        return CSRArray(mx.conjugate(self.data), self.pattern) if is_complex else self

    @property
    def real(self) -> CSRArray:
        """The real part."""
        is_complex = self.dtype == mx.complex64
        return CSRArray(mx.real(self.data), self.pattern) if is_complex else self

    @property
    def imag(self) -> CSRArray:
        """The imaginary part; zeros, where values are real."""
        is_complex = self.dtype == mx.complex64
        data = mx.imag(self.data) if is_complex else mx.zeros_like(self.data)
        return CSRArray(data, self.pattern)

    def sum(self, axis: int | None = None, *, keepdims: bool = False) -> mx.array:
        """Sum all values, or over rows (``axis=0``, ``(n_cols,)``) or columns (``axis=1``).

        Integers and bools have the dtype that ``mx.sum`` gives them.
        """
        axis = reductions.check_axis("CSRArray.sum", axis)
        return reductions.keep(self._sum(axis), axis, keepdims)

    def _sum(self, axis: int | None) -> mx.array:
        dtype = mx.zeros(1, self.dtype).sum().dtype
        if axis is None:
            # MLX 0.32.4 may never return from the sum of an empty array that NumPy made.
            return self._cleared.sum() if self.nnz else mx.zeros((), dtype)
        if not mx.issubdtype(dtype, mx.inexact):  # which have no products
            scalar = self.tocsr()
            places = (scalar.pattern.indices, scalar.pattern.row_indices)[axis]
            sums = mx.zeros(self.shape[1 - axis], dtype)
            return sums.at[mx.array(places)].add(scalar.data.astype(dtype)) if self.nnz else sums
        if axis == 0:
            return mx.ones(self.shape[0], self.dtype) @ self
        return self @ mx.ones(self.shape[1], self.dtype)

    def mean(self, axis: int | None = None, *, keepdims: bool = False) -> mx.array:
        """Return means over all places, or over rows (``axis=0``) or columns; as :meth:`sum`."""
        axis = reductions.check_axis("CSRArray.mean", axis)
        count = self.shape[0] * self.shape[1] if axis is None else self.shape[axis]
        is_wide = self.dtype in (mx.float32, mx.float64, mx.complex64)
        array = self if is_wide else self.astype(mx.float32)
        dtype = self.dtype if mx.issubdtype(self.dtype, mx.inexact) else mx.float32
        return (array.sum(axis, keepdims=keepdims) / count).astype(dtype)

    def max(self, axis: int | None = None, *, keepdims: bool = False) -> mx.array:
        """Return the largest value of all, of each column (``axis=0``) or of each row.

        What is not stored counts as 0. A gradient goes in equal shares to all that have it.

        Raises:
            TypeError: The values are complex.
            ValueError: The matrix is empty, or ``axis`` is none of its own.
        """
        return self._extreme("CSRArray.max", axis, keepdims, largest=True)

    def min(self, axis: int | None = None, *, keepdims: bool = False) -> mx.array:
        """Return the smallest value of all, of each column or of each row; as :meth:`max`."""
        return self._extreme("CSRArray.min", axis, keepdims, largest=False)

    def _extreme(self, owner: str, axis: int | None, keepdims: bool, largest: bool) -> mx.array:
        axis = reductions.check_axis(owner, axis)
        array = self.tocsr().canonical()
        if axis is None:
            array = array.reshape((1, self.shape[0] * self.shape[1]))
        elif axis == 0:
            array = array.T
        out = reductions.extreme(owner, array.data, array.pattern, largest)
        return reductions.keep(out if axis is not None else out.squeeze(0), axis, keepdims)

    def count_nonzero(self, axis: int | None = None) -> mx.array:
        """Count values that are not 0: all, in each column (``axis=0``) or in each row."""
        axis = reductions.check_axis("CSRArray.count_nonzero", axis)
        return self.map_values(lambda data: data != 0).astype(mx.int32).sum(axis)

    def reshape(self, shape: tuple[int, int]) -> CSRArray:
        """Return the matrix of another shape that has the same numbers, row by row.

        Raises:
            ValueError: It has another number of places, or one of over 2**31 - 1 rows or columns.
        """
        shape = check_shape("CSRArray.reshape", shape)
        if shape[0] * shape[1] != self.shape[0] * self.shape[1]:
            raise ValueError(f"[CSRArray.reshape] cannot make shape {shape} of {self.shape}")
        array = self.tocsr().canonical()
        pattern = CSRPattern.from_places(array.pattern.places, shape)
        return CSRArray(array.data, pattern)

    def trace(self, k: int = 0) -> mx.array:
        """Return the sum of a diagonal; ``k`` as in :meth:`diagonal`."""
        return self.diagonal(k).sum() if min(self.shape) else mx.zeros((), self.dtype)

    def tril(self, k: int = 0) -> CSRArray:
        """Return what lies on the ``k``-th diagonal or below it."""
        return self._where(lambda row, col: col - row <= check_offset("CSRArray.tril", k))

    def triu(self, k: int = 0) -> CSRArray:
        """Return what lies on the ``k``-th diagonal or above it."""
        return self._where(lambda row, col: col - row >= check_offset("CSRArray.triu", k))

    def _where(self, keeps: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> CSRArray:
        """Return the values in places that a function of their rows and columns keeps."""
        array = self.tocsr()
        rows, cols = array.pattern.row_indices, array.pattern.indices
        kept = keeps(rows, cols)
        places = np.flatnonzero(kept)
        indptr = np.concatenate([[0], np.cumsum(kept)])[array.pattern.indptr]
        pattern = CSRPattern(indptr, cols[places], self.shape)
        return CSRArray(Gather(places, rows.size)(array.data), pattern)

    def diagonal(self, k: int = 0) -> mx.array:
        """Return a diagonal: the main one, the ``k``-th above it, or the ``-k``-th below it.

        Repeated entries add up.
        """
        k = check_offset("CSRArray.diagonal", k)
        first = max(0, -k)  # row
        length = max(0, min(self.shape[0] - first, self.shape[1] - max(0, k)))
        array = self.tocsr()
        rows, cols = array.pattern.row_indices, array.pattern.indices
        stored = np.flatnonzero(cols - rows == k)
        counts = np.bincount(rows[stored] - first, minlength=length)
        return SumOfRuns(stored, np.cumsum(counts) - counts, rows.size)(array.data)

    def __getitem__(self, key: Any) -> Any:
        """Return an entry, or some rows and columns.

        ``A[i, j]`` is a number. ``A[i]``, ``A[a:b]``, ``A[rows]``, ``A[:, j]``, ``A[rows, a:b]``
        and a mask of rows or columns give a CSRArray, always of two axes. Two arrays, or a mask of
        the shape of this matrix, give the entries at these places as a dense array.

        Raises:
            IndexError: An index is out of range, or none.
        """
        if hasattr(key, "shape") and len(key.shape) == 2:
            mask = np.array(key)
            if mask.dtype != bool or mask.shape != self.shape:
                raise IndexError(
                    f"[A[...]] a mask must be bool and of shape {self.shape}, got {mask.dtype} of "
                    f"shape {mask.shape}"
                )
            key = np.nonzero(mask)
        rows, cols = indexing.split(key, self.shape)
        if not isinstance(rows, slice) and not isinstance(cols, slice):
            return self._entries(*indexing.pairs(rows, cols))
        array = self.tocsr()._rows(rows)
        is_all = isinstance(cols, slice) and cols == slice(None)
        return array if is_all else array.T._rows(cols).T

    def _entries(self, rows: np.ndarray, cols: np.ndarray) -> mx.array:
        array = self.tocsr().canonical()
        gather = indexing.entries(array.pattern, rows.reshape(-1), cols.reshape(-1))
        data = mx.concatenate([array.data, mx.zeros(1, self.dtype)])
        return gather(data).reshape(rows.shape)

    def _rows(self, rows: int | slice | np.ndarray) -> CSRArray:
        """Return some rows, of scalars."""
        if isinstance(rows, slice):
            if rows == slice(None):
                return self
            rows = np.arange(self.shape[0])[rows]
        pattern, gather = indexing.take_rows(self.pattern, np.atleast_1d(rows).reshape(-1))
        return CSRArray(gather(self.data), pattern)

    def __matmul__(self, x: Any) -> Any:
        """Multiply by a dense vector or matrix, or by a sparse matrix, which gives a sparse one."""
        if not is_sparse(x):
            return _matmul("A @ x", self, x)
        if x.shape[0] != self.shape[1]:
            raise ValueError(f"[A @ B] A is {self.shape}, B is {x.shape}: inner sizes differ")
        a, b = _of_one_block_size(self, x)
        return CSRArray(*algebra.matmul(a.data, a.pattern, b.data, b.pattern))

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        x = _dense("x @ A", x, self.dtype)
        if x.shape[-1:] != self.shape[:1]:
            raise ValueError(
                f"[x @ A] x has shape {x.shape}, A is {self.shape}: inner sizes differ"
            )
        return ops.spmm_t(self.data, self.pattern, x)

    def __add__(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> Any:
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

    def __sub__(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> Any:
        """Subtract what can be added."""
        if is_sparse(other):
            a, b = _alike("A - B", self, other)
            dtype = mx.result_type(a.data, b.data)
            if dtype == mx.bool_:
                raise TypeError("[A - B] bool has no difference; cast one by astype")
            return a + -b.astype(dtype)  # unsigned values are promoted before they are negated
        if _is_scalar(other):
            return self + other
        return self.todense() - _fitting("A - D", self, other)

    def __rsub__(self, other: ArrayLike | complex | np.generic) -> Any:
        if _is_scalar(other):
            return -self + other
        return _fitting("D - A", self, other) - self.todense()

    def __mul__(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> CSRArray:
        """Multiply by a scalar, or elementwise: :meth:`multiply`. A matrix product is ``A @ x``."""
        if _is_scalar(other):
            return CSRArray(self.data * _weak(other), self.pattern)
        return self.multiply(other)

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex | np.generic) -> CSRArray:
        """Divide by a scalar; or elementwise by a dense array, as :meth:`multiply` multiplies."""
        if is_sparse(other):
            raise TypeError("[A / B] has no value where B stores nothing; divide by B.todense()")
        if _is_scalar(other):
            return CSRArray(self.data / _weak(other), self.pattern)
        divisor = self._values_of("A / D", other)
        if (inside := self._inside) is not None:
            divisor = mx.where(inside, divisor, mx.ones((), divisor.dtype))
        return CSRArray(self._cleared / divisor, self.pattern)

    def multiply(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> CSRArray:
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
        return CSRArray(self._cleared * self._values_of("A.multiply", other), self.pattern)

    @property
    def _inside(self) -> mx.array | None:
        """Which values lie in the matrix; None if all do."""
        layout = self.pattern.layout
        if not layout.has_edges:
            return None
        return edges.clear(layout, mx.ones(self.data.shape, mx.int8)) > 0

    @property
    def _cleared(self) -> mx.array:
        """The values, zeros outside of the matrix: there may be anything."""
        return edges.clear(self.pattern.layout, self.data)

    def _values_of(self, owner: str, other: object) -> mx.array:
        """Return a dense array, broadcast to this shape, where this matrix stores values."""
        return algebra.values_at(self.pattern, _fitting(owner, self, other))

    def __neg__(self) -> CSRArray:
        return CSRArray(-self.data, self.pattern)

    def __pos__(self) -> CSRArray:
        return self

    def __eq__(self, other: object) -> bool:
        raise _no_comparison()

    def __ne__(self, other: object) -> bool:
        raise _no_comparison()

    __hash__ = object.__hash__

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


# What describes the layout of a CSRArray, and has no meaning for coordinates.
_OF_CSR_ALONE = ("indptr", "indices", "pattern", "block_size")


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
        self._shape = check_shape("COOArray", shape)
        self._row = _coordinates("row", row, self.shape[0])
        self._col = _coordinates("col", col, self.shape[1])
        lengths = {"data": self.data.shape, "row": self.row.shape, "col": self.col.shape}
        if len(set(lengths.values())) > 1 or self.data.ndim != 1:
            raise ValueError(f"[COOArray] data, row and col must be of one length, got {lengths}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_rows, n_cols)``."""
        return self._shape

    @property
    def row(self) -> np.ndarray:
        """Row of each stored value: read-only int32."""
        return self._row

    @property
    def col(self) -> np.ndarray:
        """Column of each stored value: read-only int32."""
        return self._col

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
        if self.data.shape != self.row.shape:
            shapes = f"{self.data.shape}, the coordinates need {self.row.shape}"
            raise ValueError(f"[COOArray] data has shape {shapes}")
        if canonical:
            merged = algebra.merge(self.row, self.col, self.shape)
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

    def toarray(self) -> mx.array:
        """Return :meth:`todense`."""
        return self.todense()

    def transpose(self) -> COOArray:
        """Return ``A.T``."""
        return self.T

    def eval(self) -> COOArray:
        """Evaluate the values, and return the array: ``mx.eval(A)`` does not see into it."""
        mx.eval(self.data)
        return self

    def astype(self, dtype: mx.Dtype) -> COOArray:
        """Return a copy whose values are cast to ``dtype``."""
        return COOArray(self.data.astype(dtype), self.row, self.col, self.shape)

    def __getattr__(self, name: str) -> Any:
        """Return what a CSRArray has by this name: ``max``, ``multiply``, ``diagonal``, ..."""
        if name[0] == "_" or name in _OF_CSR_ALONE or not hasattr(CSRArray, name):
            raise AttributeError(f"'COOArray' object has no attribute {name!r}")
        return getattr(self.tocsr(canonical=False), name)

    def __getitem__(self, key: Any) -> Any:
        return self.tocsr(canonical=False)[key]

    def __abs__(self) -> CSRArray:
        return abs(self.tocsr(canonical=False))

    def __pow__(self, n: float) -> CSRArray:
        return self.tocsr(canonical=False) ** n

    def __matmul__(self, x: Any) -> Any:
        return self.tocsr(canonical=False) @ x

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        return x @ self.tocsr(canonical=False)

    def __add__(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> Any:
        return self.tocsr(canonical=False) + other

    __radd__ = __add__

    def __sub__(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> Any:
        return self.tocsr(canonical=False) - other

    def __rsub__(self, other: ArrayLike | complex | np.generic) -> Any:
        return other - self.tocsr(canonical=False)

    def __mul__(self, other: CSRArray | COOArray | ArrayLike | complex | np.generic) -> Any:
        return self.tocsr(canonical=False) * other

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex | np.generic) -> CSRArray:
        return self.tocsr(canonical=False) / other

    def __neg__(self) -> COOArray:
        return COOArray(-self.data, self.row, self.col, self.shape)

    def __pos__(self) -> COOArray:
        return self

    def __eq__(self, other: object) -> bool:
        raise _no_comparison()

    def __ne__(self, other: object) -> bool:
        raise _no_comparison()

    __hash__ = object.__hash__

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
    x = _dense(owner, x, A.dtype)
    inner = x.shape[-1 if x.ndim == 1 else -2] if x.ndim else None
    if inner != A.shape[1]:
        raise ValueError(f"[{owner}] A is {A.shape}, x has shape {x.shape}: inner sizes differ")
    if x.ndim == 1:
        return ops.spmm(A.data, A.pattern, x)
    return ops.spmm(A.data, A.pattern, x.swapaxes(-1, -2)).swapaxes(-1, -2)


def _coordinates(name: str, values: ArrayLike, size: int) -> np.ndarray:
    indices = check_indices("COOArray", name, values)
    check_range("COOArray", name, indices, size)
    indices.flags.writeable = False
    return indices


def check_offset(owner: str, k: int) -> int:
    """Return the number of a diagonal, or raise."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"[{owner}] k must be an integer, got {k!r}")
    return int(k)


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


def _fitting(owner: str, a: CSRArray, x: object) -> mx.array:
    """Return a dense array that broadcasts to the shape of ``a``, or raise."""
    x = _dense(owner, x, a.dtype)
    shape = (1,) * (2 - x.ndim) + tuple(x.shape)
    if len(shape) == 2 and all(n in (1, size) for n, size in zip(shape, a.shape, strict=True)):
        return x.reshape(shape)
    raise ValueError(
        f"[{owner}] A is {a.shape}, and shape {tuple(x.shape)} does not broadcast to it"
    )


def _dense(operation: str, x: object, dtype: mx.Dtype) -> mx.array:
    """Return an operand beside values of ``dtype``: numbers of Python and NumPy keep float64."""
    if isinstance(x, mx.array):
        return x
    if isinstance(x, np.ndarray | list | tuple):
        keeps = dtype == mx.float64 and np.asarray(x).dtype == np.float64
        return check_data(operation, x, dtype=mx.float64 if keeps else None)
    raise TypeError(f"[{operation}] x must be a dense array, got {_describe(x)}")


def _describe(x: object) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")


def _no_comparison() -> TypeError:
    return TypeError(
        "[A == B] sparse arrays have no elementwise ==, which is true nearly everywhere; compare "
        "(A - B).count_nonzero() with 0, A.data == b for stored values, or A is B"
    )


def _truth(array: CSRArray | COOArray) -> bool:
    if array.shape != (1, 1):
        raise ValueError("The truth value of an array with more than one element is ambiguous.")
    return bool(array.nnz)
