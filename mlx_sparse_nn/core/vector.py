"""SparseVector: what ``A[i]`` and ``A[:, j]`` are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import ArrayLike
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.reductions import Axis
from mlx_sparse_nn.core.sparse import SparseArray, dense, is_dense, is_scalar
from mlx_sparse_nn.core.transforms import defer_to


class SparseVector(SparseArray):
    """A sparse array of one axis: a row or a column of a matrix.

    It computes as the matrix of one row that it is made of. In ``mx.grad``, its values are those of
    the matrix that it was taken from; or ``CSRArray(values, v.pattern)[0]`` makes it of others.

    Args:
        row: ``(1, n)``, a CSRArray of scalars.

    Raises:
        TypeError: It is none.

    Example:
        >>> A = csr_array([[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
        >>> A[0] @ mx.array([1.0, 1.0, 1.0])
        array(5, dtype=float32)
    """

    def __init__(self, row: Any):
        defer_to(SparseArray)
        pattern = getattr(row, "pattern", None)
        if not isinstance(pattern, CSRPattern) or (pattern.shape[0], pattern.block_size) != (1, 1):
            raise TypeError(
                f"[SparseVector] row must be a CSRArray of one row of scalars, got {row!r}; "
                "use A[i]"
            )
        self._row = row

    @property
    def _data(self) -> mx.array:
        return self._row.data

    @_data.setter
    def _data(self, data: mx.array) -> None:
        self._row = self._row._with(data)

    @property
    def _needed(self) -> tuple[tuple[int, ...], str]:
        return self.pattern.data_shape, "pattern needs"

    @property
    def pattern(self) -> CSRPattern:
        """The pattern of the matrix of one row."""
        return self._row.pattern

    @property
    def shape(self) -> tuple[int]:
        """``(n,)``."""
        return (self.pattern.shape[1],)

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.pattern.nnz

    @property
    def indices(self) -> np.ndarray:
        """The place of each stored value: read-only int32 on the host."""
        return self.pattern.indices

    @property
    def coords(self) -> tuple[np.ndarray]:
        """``(indices,)``."""
        return (self.indices,)

    @property
    def T(self) -> SparseVector:
        """The vector itself."""
        return self

    def todense(self) -> mx.array:
        """Return the dense ``(n,)`` array; repeated entries add up."""
        return mx.flatten(self._row.todense())

    def canonical(self) -> SparseVector:
        """Return the same vector with its places sorted, and none repeated."""
        return SparseVector(self._row.canonical())

    def map_values(self, function: Callable[[mx.array], mx.array]) -> SparseVector:
        """Return a vector of what ``function``, which takes 0 to 0, makes of the values."""
        return SparseVector(self._row.map_values(function))

    def power(self, n: float) -> SparseVector:
        """Return each value to the power ``n``, a number above 0: ``v ** n``."""
        return SparseVector(self._row.power(n))

    __pow__ = power

    def sum(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Sum all values."""
        return self._reduced("sum", axis, keepdims)

    def mean(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Return the mean over all places."""
        return self._reduced("mean", axis, keepdims)

    def max(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Return the largest value; what is not stored counts as 0."""
        return self._reduced("max", axis, keepdims)

    def min(self, axis: Axis = None, *, keepdims: bool = False) -> mx.array:
        """Return the smallest value; as :meth:`max`."""
        return self._reduced("min", axis, keepdims)

    def argmax(self, axis: Axis = None) -> mx.array:
        """Return the first place of the largest value, uint32."""
        return self._reduced("argmax", axis)

    def argmin(self, axis: Axis = None) -> mx.array:
        """Return the first place of the smallest value, uint32."""
        return self._reduced("argmin", axis)

    def count_nonzero(self, axis: Axis = None) -> mx.array:
        """Count values that are not 0."""
        return self._reduced("count_nonzero", axis)

    def _reduced(self, name: str, axis: Axis, keepdims: bool = False) -> mx.array:
        axis = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis
        if axis not in (None, 0, -1) or isinstance(axis, bool):
            raise ValueError(f"[SparseVector.{name}] axis must be None or 0, got {axis!r}")
        out = getattr(self._row, name)(None)
        return out.reshape(1) if keepdims else out

    def nonzero(self) -> tuple[np.ndarray]:
        """Return the places of values that are not 0, on the host."""
        return (self._row.nonzero()[1],)

    def reshape(self, *shape: Any) -> Any:
        """Return a matrix or vector of the same numbers; one size may be -1."""
        return self._row.reshape(*shape)

    def maximum(self, other: Any) -> Any:
        """Return the larger of both in each place; as :meth:`CSRArray.maximum`."""
        return self._back(self._row.maximum(_row_of(other)), other)

    def minimum(self, other: Any) -> Any:
        """Return the smaller of both in each place; as :meth:`CSRArray.maximum`."""
        return self._back(self._row.minimum(_row_of(other)), other)

    def multiply(self, other: Any) -> Any:
        """Multiply elementwise, by what broadcasts with this vector.

        A matrix, dense or sparse, gives a sparse matrix.
        """
        return self._back(self._row.multiply(_row_of(other)), other)

    def __getitem__(self, key: Any) -> Any:
        """Return an entry, a vector of some entries, or by None the matrix of one row.

        Raises:
            IndexError: An index is out of range, or none.
        """
        if key is None:
            return self._row.copy()
        if isinstance(key, tuple):
            kept = tuple(k for k in key if k is not Ellipsis)
            if len(kept) > 1:
                raise IndexError(f"[A[...]] a vector has one axis, got {len(kept)} indices")
            key = kept[0] if kept else slice(None)
        key = slice(None) if key is Ellipsis else key
        return self._row[0, key]

    def __iter__(self) -> Iterator[mx.array]:
        """Yield the numbers of all places."""
        return iter(self.todense())

    def __matmul__(self, x: Any) -> Any:
        """Multiply by a dense array ``(n,)`` or ``(..., n, p)``, a sparse vector or a matrix."""
        if isinstance(x, SparseVector):
            return (self._row @ x._row.T).todense().reshape(())
        if isinstance(x, SparseArray):
            return SparseVector(self._row @ x)
        out = self._row @ x
        return out.squeeze(-1 if out.ndim == 1 else -2)

    def __rmatmul__(self, x: Any) -> Any:
        if isinstance(x, SparseArray):  # a matrix
            return SparseVector((x @ self._row.T).T)  # pyright: ignore[reportOperatorIssue]
        return (x @ self._row.T).squeeze(-1)

    def __add__(self, other: Any) -> Any:
        return self._added(other, self._row.__add__, lambda x: self.todense() + x)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._added(other, self._row.__sub__, lambda x: self.todense() - x)

    def __rsub__(self, other: Any) -> Any:
        return self._added(other, self._row.__rsub__, lambda x: x - self.todense())

    def _added(self, other: Any, sparse: Callable, by_dense: Callable) -> Any:
        if is_dense(other) and not is_scalar(other):
            return by_dense(dense("v + x", other, self.dtype))
        if isinstance(other, SparseArray) and not isinstance(other, SparseVector):
            raise ValueError(f"[v + A] v is {self.shape}, A is {other.shape}: shapes differ")
        return SparseVector(sparse(_row_of(other)))

    def __mul__(self, other: Any) -> Any:
        """Multiply by a scalar, or elementwise: :meth:`multiply`."""
        return self._back(self._row * _row_of(other), other)

    __rmul__ = __mul__

    def __truediv__(self, other: ArrayLike | complex | np.generic) -> Any:
        """Divide by a scalar; or elementwise by a dense array."""
        return self._back(self._row / _row_of(other), other)

    def _compare(self, compare: Callable, other: Any) -> Any:
        return self._back(self._row._compare(compare, _row_of(other)), other)

    def _with(self, data: mx.array) -> SparseVector:
        return SparseVector(self._row._with(data))

    def _back(self, out: Any, other: Any) -> Any:
        """Return a vector, unless the other operand has made a matrix of it."""
        n_axes = other.ndim if hasattr(other, "ndim") else np.ndim(other)
        if out is NotImplemented or n_axes > 1:
            return out
        return SparseVector(out) if isinstance(out, SparseArray) else mx.flatten(out)


def _row_of(x: Any) -> Any:
    """Return an operand as it stands beside a matrix of one row."""
    return x._row if isinstance(x, SparseVector) else x
