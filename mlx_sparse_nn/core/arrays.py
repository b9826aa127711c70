"""CSRArray: stored values on a CSRPattern, with SciPy's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import algebra, draw, edges, index, indexing, ops, reductions
from mlx_sparse_nn.core.checks import (
    ArrayLike,
    check_data,
    check_indices,
    check_number,
    check_range,
    check_shape,
)
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.core.reductions import Axis
from mlx_sparse_nn.core.sparse import (
    SparseArray,
    check_comparison,
    dense,
    host,
    is_dense,
    is_scalar,
    of_zero,
    symbol_of,
    weak,
)
from mlx_sparse_nn.core.transforms import defer_to
from mlx_sparse_nn.core.value_maps import Gather, SumOfRuns
from mlx_sparse_nn.core.vector import SparseVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class CSRArray(SparseArray):
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

    def __init__(self, data: ArrayLike, pattern: CSRPattern):
        defer_to(SparseArray)
        check_pattern("CSRArray", pattern)
        data = check_data("CSRArray", data)
        self._pattern = pattern
        self.data = data

    @property
    def pattern(self) -> CSRPattern:
        """Where the values lie."""
        return self._pattern

    @property
    def _needed(self) -> tuple[tuple[int, ...], str]:
        return self._pattern.data_shape, "pattern needs"

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_rows, n_cols)``."""
        return self.pattern.shape

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
    def T(self) -> CSRArray:
        """The transpose, on the cached transposed pattern."""
        data = algebra.transposition(self.pattern)(self.data)
        return CSRArray(data.swapaxes(1, 2) if data.ndim == 3 else data, self.pattern.T)

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
        if self.block_size == 1:
            return self
        scalars = algebra.scalars(self.pattern)
        return CSRArray(scalars.values(mx.flatten(self.data)), scalars.pattern)

    def tocoo(self) -> COOArray:
        """Return the same matrix as coordinates, rows in order."""
        scalar = self.tocsr()
        return COOArray(
            scalar.data[:], scalar.pattern.row_indices, scalar.pattern.indices, self.shape
        )

    def _with(self, data: mx.array) -> CSRArray:
        return CSRArray(data, self.pattern)

    def canonical(self) -> CSRArray:
        """Return the same matrix with the columns of each row sorted, and none repeated."""
        if self.pattern.is_canonical:
            return self.copy()
        merged = algebra.canonical(self.pattern)
        return CSRArray(merged.sums(self.data), merged.pattern)

    def map_values(self, function: Callable[[mx.array], mx.array]) -> CSRArray:
        """Return a matrix of what ``function``, which takes 0 to 0, makes of the values.

        Values of one place are added up first.
        """
        if not callable(function):
            raise TypeError(
                f"[A.map_values] function must be callable, got {type(function).__name__}"
            )
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

    def sum(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
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
            array = self.tocsr() if axis == 1 else self.tocsr().T
            return algebra.sum_rows(array.pattern)(array.data.astype(dtype))
        if axis == 0:
            return mx.ones(self.shape[0], self.dtype) @ self
        return self @ mx.ones(self.shape[1], self.dtype)

    def mean(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Return means over all places, or over rows (``axis=0``) or columns; as :meth:`sum`."""
        axis = reductions.check_axis("CSRArray.mean", axis)
        count = self.shape[0] * self.shape[1] if axis is None else self.shape[axis]
        is_wide = self.dtype in (mx.float32, mx.float64, mx.complex64)
        array = self if is_wide else self.astype(mx.float32)
        dtype = self.dtype if mx.issubdtype(self.dtype, mx.inexact) else mx.float32
        return (array.sum(axis, keepdims=keepdims) / count).astype(dtype)

    def max(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Return the largest value of all, of each column (``axis=0``) or of each row.

        What is not stored counts as 0. A gradient goes in equal shares to all that have it.

        Raises:
            TypeError: The values are complex.
            ValueError: The matrix is empty, or ``axis`` is none of its own.
        """
        return self._extreme("CSRArray.max", axis, keepdims, largest=True)

    def min(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Return the smallest value of all, of each column or of each row; as :meth:`max`."""
        return self._extreme("CSRArray.min", axis, keepdims, largest=False)

    def _extreme(self, owner: str, axis: Axis, keepdims: bool, largest: bool) -> mx.array:
        rows, axis = self._rows_along(owner, axis)
        out = reductions.extreme(owner, rows, largest)
        return reductions.keep(out if axis is not None else out.squeeze(0), axis, keepdims)

    def argmax(self, axis: Axis = None) -> mx.array:
        """Return the first place of the largest value: of all, row by row, or in each column
        (``axis=0``) or row; integers.

        Raises:
            TypeError: The values are complex.
            ValueError: The matrix is empty, or ``axis`` is none of its own.
        """
        return self._place_of_extreme("CSRArray.argmax", axis, largest=True)

    def argmin(self, axis: Axis = None) -> mx.array:
        """Return the first place of the smallest value; as :meth:`argmax`."""
        return self._place_of_extreme("CSRArray.argmin", axis, largest=False)

    def _place_of_extreme(self, owner: str, axis: Axis, largest: bool) -> mx.array:
        rows, axis = self._rows_along(owner, axis)
        out = reductions.place_of_extreme(owner, rows, largest)
        return out if axis is not None else out.squeeze(0)

    def _rows_along(self, owner: str, axis: Axis) -> tuple[reductions.Rows, int | None]:
        """Return the rows that a reduction reduces: of the transpose, or all as one."""
        axis = reductions.check_axis(owner, axis)
        array = self.tocsr().canonical()
        array = array.T if axis == 0 else array
        return reductions.Rows(array.data, *reductions.places(array.pattern, axis is None)), axis

    def count_nonzero(self, axis: Axis = None) -> mx.array:
        """Count values that are not 0: all, in each column (``axis=0``) or in each row."""
        axis = reductions.check_axis("CSRArray.count_nonzero", axis)
        return self.map_values(lambda data: data != 0).astype(mx.int32).sum(axis)

    def nonzero(self) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and columns of values that are not 0, row by row, on the host.

        Raises:
            TypeError: MLX traces the values.
        """
        array = self.tocsr().canonical()
        stored = np.flatnonzero(host("A.nonzero", array.data != 0))
        return array.pattern.row_indices[stored], array.pattern.indices[stored]

    def maximum(self, other: Operand) -> Any:
        """Return the larger of both in each place.

        Args:
            other: A sparse array of this shape, or a number that is not above 0; or a dense array,
                which gives a dense one.

        Raises:
            TypeError: The result would not be 0 where nothing is stored.
        """
        return self._larger("A.maximum", mx.maximum, max, other)

    def minimum(self, other: Operand) -> Any:
        """Return the smaller of both in each place: ``other`` is not below 0 if it is a number."""
        return self._larger("A.minimum", mx.minimum, min, other)

    def _larger(self, owner: str, function: Callable, of_numbers: Callable, other: Any) -> Any:
        if is_sparse(other):
            a, b = (array.canonical() for array in _alike(owner, self, other))
            return CSRArray(*algebra.map_union(function, a.data, a.pattern, b.data, b.pattern))
        if not is_scalar(other):
            return function(self.todense(), _fitting(owner, self, other))
        if of_zero(owner, of_numbers, other) != 0:
            raise TypeError(
                f"[{owner}] {other} stands in every place that is not stored: use "
                f"mx.{owner.removeprefix('A.')}(A.todense(), {other})"
            )
        return self.map_values(lambda data: function(data, weak(other)))

    def _compare(self, compare: Callable, other: Any) -> Any:
        if is_sparse(other):
            check_comparison(compare, compare(0, 0))
            a, b = (array.canonical() for array in _alike(symbol_of(compare), self, other))
            return CSRArray(*algebra.map_union(compare, a.data, a.pattern, b.data, b.pattern))
        if is_scalar(other):
            check_comparison(compare, of_zero(symbol_of(compare), compare, other))
            return self.map_values(lambda data: compare(data, weak(other)))
        if is_dense(other) or hasattr(other, "tocsr"):
            return compare(self.todense(), _fitting(symbol_of(compare), self, other))
        return NotImplemented

    def reshape(self, *shape: Any) -> Any:
        """Return the matrix of another shape that has the same numbers, row by row.

        Args:
            shape: ``(m, n)`` or ``m, n``, of which one may be -1; of one size, a SparseVector.

        Raises:
            ValueError: It has another number of places, or one of over 2**31 - 1 rows or columns.
        """
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        sizes = indexing.new_shape("CSRArray.reshape", wanted, self.shape)
        array = self.tocsr().canonical()
        matrix = sizes if len(sizes) == 2 else (1, *sizes)
        out = CSRArray(array.data, CSRPattern.from_places(array.pattern.places, matrix))
        return out if len(sizes) == 2 else SparseVector(out)

    def trace(self, k: int = 0) -> mx.array:
        """Return the sum of a diagonal; ``k`` as in :meth:`diagonal`."""
        return self.diagonal(k).sum() if min(self.shape) else mx.zeros((), self.dtype)

    def tril(self, k: int = 0) -> CSRArray:
        """Return what lies on the ``k``-th diagonal or below it."""
        k = check_offset("CSRArray.tril", k)
        return self._where(lambda row, col: col - row <= k)

    def triu(self, k: int = 0) -> CSRArray:
        """Return what lies on the ``k``-th diagonal or above it."""
        k = check_offset("CSRArray.triu", k)
        return self._where(lambda row, col: col - row >= k)

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

        ``A[i, j]`` is a number. ``A[i]``, ``A[i, a:b]``, ``A[:, j]``, ``A[i, cols]`` and
        ``A[rows, j]`` are a SparseVector. ``A[a:b]``, ``A[rows]``, ``A[rows, a:b]`` and a mask of
        rows or columns give a CSRArray. Two arrays, or a mask of the shape of this matrix, dense or
        sparse, give the entries at these places as a dense array.

        Raises:
            IndexError: An index is out of range, or none.
            TypeError: MLX traces it.
        """
        if getattr(key, "ndim", 0) == 2:
            key = indexing.places_of_mask(key, self.shape)
        rows, cols = indexing.split(key, self.shape)
        n_numbers = isinstance(rows, int) + isinstance(cols, int)
        if n_numbers == 2 or not any(isinstance(key, int | slice) for key in (rows, cols)):
            return self._entries(*indexing.pairs(rows, cols))
        if isinstance(rows, int):
            return SparseVector(self.tocsr()._rows(rows)._columns(cols))
        if isinstance(cols, int):
            return SparseVector(self.tocsr().T._rows(cols)._columns(rows))
        part = self.tocsr()._rows(rows)._columns(cols)
        return part.copy() if part is self else part

    def _columns(self, cols: slice | np.ndarray) -> CSRArray:
        """Return some columns, of scalars."""
        return self if indexing.is_all(cols) else self.T._rows(cols).T

    def _entries(self, rows: np.ndarray, cols: np.ndarray) -> mx.array:
        array = self.tocsr().canonical()
        gather = indexing.entries(array.pattern, rows.reshape(-1), cols.reshape(-1))
        data = mx.concatenate([array.data, mx.zeros(1, self.dtype)])
        return gather(data).reshape(rows.shape)

    def _rows(self, rows: int | slice | np.ndarray) -> CSRArray:
        """Return some rows, of scalars."""
        if indexing.is_all(rows):
            return self
        if isinstance(rows, slice):
            rows = np.arange(self.shape[0])[rows]
        pattern, gather = indexing.take_rows(self.pattern, np.atleast_1d(rows).reshape(-1))
        return CSRArray(gather(self.data), pattern)

    def __matmul__(self, x: Any) -> Any:
        """Multiply by a dense vector or matrix, or by a sparse matrix, which gives a sparse one."""
        if isinstance(x, SparseVector):
            return NotImplemented  # which it multiplies from the right
        if not is_sparse(x):
            return _matmul("A @ x", self, x)
        if x.shape[0] != self.shape[1]:
            raise ValueError(f"[A @ B] A is {self.shape}, B is {x.shape}: inner sizes differ")
        a, b = _of_one_block_size(self, x)
        return CSRArray(*algebra.matmul(a.data, a.pattern, b.data, b.pattern))

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        x = dense("x @ A", x, self.dtype)
        if x.shape[-1:] != self.shape[:1]:
            raise ValueError(
                f"[x @ A] x has shape {x.shape}, A is {self.shape}: inner sizes differ"
            )
        if not mx.issubdtype(mx.result_type(self.data, x), mx.inexact):
            return _multiply_integers(self.T, x.swapaxes(0, -1)).swapaxes(0, -1)
        return ops.spmm_t(self.data, self.pattern, x)

    def __add__(self, other: Operand) -> Any:
        """Add a sparse matrix; or a dense one, which gives a dense one; or 0, as ``sum`` does."""
        if is_sparse(other):
            a, b = _alike("A + B", self, other)
            return CSRArray(*algebra.add(a.data, a.pattern, b.data, b.pattern))
        if isinstance(other, SparseVector):
            raise ValueError(f"[A + v] A is {self.shape}, v is {other.shape}: shapes differ")
        if is_scalar(other):
            if isinstance(other, Number) and other == 0:
                return self.copy()
            raise TypeError(
                "[A + s] a sparse matrix plus a scalar is dense; use A.todense() + s, or "
                "CSRArray(A.data + s, A.pattern) for the stored values alone"
            )
        return self.todense() + _fitting("A + D", self, other)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Any:
        """Subtract what can be added."""
        if is_sparse(other):
            a, b = _alike("A - B", self, other)
            dtype = mx.result_type(a.data, b.data)
            if dtype == mx.bool_:
                raise TypeError("[A - B] bool has no difference; cast one by astype")
            return a + -b.astype(dtype)  # unsigned values are promoted before they are negated
        if is_scalar(other):
            return self + other
        return self.todense() - _fitting("A - D", self, other)

    def __rsub__(self, other: ArrayLike | complex | np.generic) -> Any:
        if is_scalar(other):
            return -self + other
        return _fitting("D - A", self, other) - self.todense()

    def __mul__(self, other: Operand) -> CSRArray:
        """Multiply by a scalar, or elementwise: :meth:`multiply`. A matrix product is ``A @ x``."""
        if is_scalar(other):
            return CSRArray(self.data * weak(other), self.pattern)
        return self.multiply(other)

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex | np.generic) -> CSRArray:
        """Divide by a scalar; or elementwise by a dense array, as :meth:`multiply` multiplies."""
        if is_sparse(other):
            raise TypeError("[A / B] has no value where B stores nothing; divide by B.todense()")
        if is_scalar(other):
            return CSRArray(self.data / weak(other), self.pattern)
        divisor = self._values_of("A / D", other)
        if (inside := self._inside) is not None:
            divisor = mx.where(inside, divisor, mx.ones((), divisor.dtype))
        return CSRArray(self._cleared / divisor, self.pattern)

    def multiply(self, other: Operand) -> CSRArray:
        """Multiply elementwise, by what broadcasts to the shape of this matrix.

        Args:
            other: A sparse or dense matrix of this shape; ``(n_rows, 1)``, a number for each row;
                ``(1, n_cols)`` or ``(n_cols,)``, one for each column; or a scalar. A matrix of one
                row or column is repeated, too.

        Returns:
            Of a sparse ``other``, what both store; otherwise the pattern of this matrix.
        """
        if is_scalar(other):
            return self * other
        if isinstance(other, SparseVector):
            other = other[None]
        if not is_sparse(other):
            other = dense("A.multiply", other, self.dtype)
            shape = _broadcast("A.multiply", self.shape, other.shape)
            array = self._spread(shape)
            return CSRArray(array._cleared * array._values_of("A.multiply", other), array.pattern)
        other = other.tocsr() if isinstance(other, COOArray) else other
        shape = _broadcast("A.multiply", self.shape, other.shape)
        a, b = _alike("A.multiply", self._spread(shape), other._spread(shape))
        a, b = a.canonical(), b.canonical()
        return CSRArray(*algebra.multiply(a.data, a.pattern, b.data, b.pattern))

    def _spread(self, shape: tuple[int, int]) -> CSRArray:
        """Return the matrix with its one row or column repeated, where ``shape`` has more."""
        if self.shape == shape:
            return self
        array = self.tocsr()
        if array.shape[0] != shape[0]:
            array = array._rows(np.zeros(shape[0], np.int64))
        return array if array.shape[1] == shape[1] else array.T._spread((shape[1], shape[0])).T

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

    def __iter__(self) -> Iterator[SparseVector]:
        """Yield the rows."""
        array = self.tocsr()
        return (array[i] for i in range(self.shape[0]))

    @property
    def _blocks(self) -> str:
        return f", block_size={self.block_size}" if self.block_size > 1 else ""


# What describes the layout of a CSRArray, and has no meaning for coordinates.
_OF_CSR_ALONE = ("indptr", "indices", "pattern", "block_size")


class COOArray(SparseArray):
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

    def __init__(self, data: ArrayLike, row: ArrayLike, col: ArrayLike, shape: tuple[int, int]):
        defer_to(SparseArray)
        self._data = check_data("COOArray", data)
        self._shape = check_shape("COOArray", shape)
        self._row = _coordinates("row", row, self.shape[0])
        self._col = _coordinates("col", col, self.shape[1])
        lengths = {"data": self._data.shape, "row": self.row.shape, "col": self.col.shape}
        if len(set(lengths.values())) > 1 or self._data.ndim != 1:
            raise ValueError(f"[COOArray] data, row and col must be of one length, got {lengths}")

    @property
    def _needed(self) -> tuple[tuple[int, ...], str]:
        return self._row.shape, "coordinates need"

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
    def coords(self) -> tuple[np.ndarray, np.ndarray]:
        """``(row, col)``."""
        return self.row, self.col

    @property
    def nnz(self) -> int:
        """Number of stored values, repeated ones included."""
        return self.row.size

    @property
    def T(self) -> COOArray:
        """The transpose."""
        return COOArray(self.data, self.col, self.row, (self.shape[1], self.shape[0]))

    def tocsr(self, canonical: bool = True) -> CSRArray:
        """Return the same matrix with its rows grouped.

        Args:
            canonical: Also sort the columns of each row and add up repeated entries.
        """
        if canonical:
            merged = algebra.merge(self.row, self.col, self.shape)
            return CSRArray(merged.sums(self.data), merged.pattern)
        indptr, indices, order = index.sort_rows(self.row, self.col, self.shape)
        pattern = CSRPattern._of(indptr, indices, self.shape)
        return CSRArray(Gather(order, self.nnz)(self.data), pattern)

    def tocoo(self) -> COOArray:
        """Return the array itself."""
        return self

    def todense(self) -> mx.array:
        """Return the dense ``(n_rows, n_cols)`` array; repeated entries add up."""
        return self._csr.todense()

    def map_values(self, function: Callable[[mx.array], mx.array]) -> CSRArray:
        """Return what :meth:`CSRArray.map_values` does."""
        return self._csr.map_values(function)

    def _with(self, data: mx.array) -> COOArray:
        return COOArray(data, self.row, self.col, self.shape)

    def _compare(self, compare: Callable, other: Any) -> Any:
        return self._csr._compare(compare, other)

    @property
    def _csr(self) -> CSRArray:
        """What computes."""
        return self.tocsr(canonical=False)

    def __getattr__(self, name: str) -> Any:
        """Return what a CSRArray has by this name: ``max``, ``multiply``, ``diagonal``, ..."""
        if name[0] == "_" or name in _OF_CSR_ALONE or not hasattr(CSRArray, name):
            return super().__getattr__(name)
        return getattr(self._csr, name)

    def __getitem__(self, key: Any) -> Any:
        return self._csr[key]

    def __iter__(self) -> Iterator[SparseVector]:
        """Yield the rows."""
        return iter(self._csr)

    def __pow__(self, n: float) -> CSRArray:
        return self._csr**n

    def __matmul__(self, x: Any) -> Any:
        return self._csr @ x

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        return x @ self._csr

    def __add__(self, other: Operand) -> Any:
        return self._csr + other

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Any:
        return self._csr - other

    def __rsub__(self, other: ArrayLike | complex | np.generic) -> Any:
        return other - self._csr

    def __mul__(self, other: Operand) -> Any:
        return self._csr * other

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex | np.generic) -> CSRArray:
        return self._csr / other


# What stands beside a sparse matrix in a sum or an elementwise product.
Operand: TypeAlias = "CSRArray | COOArray | SparseVector | ArrayLike | complex | np.generic"


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
    x = dense(owner, x, A.dtype)
    inner = x.shape[-1 if x.ndim == 1 else -2] if x.ndim else None
    if inner != A.shape[1]:
        raise ValueError(f"[{owner}] A is {A.shape}, x has shape {x.shape}: inner sizes differ")
    if not mx.issubdtype(mx.result_type(A.data, x), mx.inexact):
        if x.ndim == 1:
            return _multiply_integers(A, x)
        return _multiply_integers(A, x.swapaxes(0, -2)).swapaxes(0, -2)
    if x.ndim == 1:
        return ops.spmm(A.data, A.pattern, x)
    return ops.spmm(A.data, A.pattern, x.swapaxes(-1, -2)).swapaxes(-1, -2)


def _multiply_integers(A: CSRArray, x: mx.array) -> mx.array:
    """Return the product ``(n_rows, ...)`` with ``x (n_cols, ...)`` of integers or bools."""
    array, dtype = A.tocsr(), mx.result_type(A.data, x)
    _, of_columns = algebra.gathers(array.pattern)
    values = array.data.reshape(array.nnz, *[1] * (x.ndim - 1)).astype(dtype)
    return algebra.sum_rows(array.pattern)(values * of_columns(x.astype(dtype)))


def _coordinates(name: str, values: ArrayLike, size: int) -> np.ndarray:
    indices = check_indices("COOArray", name, values)
    check_range("COOArray", name, indices, size)
    return index.locked(indices)


def check_offset(owner: str, k: int) -> int:
    """Return the number of a diagonal, or raise."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"[{owner}] k must be an integer, got {k!r}")
    return int(k)


def is_sparse(x: object) -> TypeGuard[CSRArray | COOArray]:
    """Return whether ``x`` is a sparse matrix of this package."""
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


def _fitting(owner: str, a: CSRArray, x: object) -> mx.array:
    """Return a dense array that broadcasts to the shape of ``a``, or raise."""
    x = dense(owner, x, a.dtype)
    shape = (1,) * (2 - x.ndim) + tuple(x.shape)
    if len(shape) == 2 and all(n in (1, size) for n, size in zip(shape, a.shape, strict=True)):
        return x.reshape(shape)
    raise ValueError(
        f"[{owner}] A is {a.shape}, and shape {tuple(x.shape)} does not broadcast to it"
    )


def _broadcast(owner: str, a: tuple[int, int], b: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape to which two shapes broadcast, that of a matrix, or raise."""
    wide = (1,) * (2 - len(b)) + tuple(b)
    if len(wide) == 2 and all(1 in (n, m) or n == m for n, m in zip(a, wide, strict=True)):
        n_rows, n_cols = (m if n == 1 else n for n, m in zip(a, wide, strict=True))
        return n_rows, n_cols
    raise ValueError(f"[{owner}] A is {a}, and shape {tuple(b)} does not broadcast to it")
