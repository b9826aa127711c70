"""What all sparse arrays share, and the rules about what stands beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Number
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import ArrayLike, check_array, check_block_dtype, check_data
from mlx_sparse_nn.core.elementwise import Elementwise

# Names of SciPy that are not there, and what to do instead.
_INSTEAD = {
    "asformat": "use tocsr() or tocoo()",
    "conjugate": "it is called conj",
    "coords": "A.nonzero() or A.tocoo() has rows and columns",
    "eliminate_zeros": "patterns are fixed; csr_array(A.todense()) stores what is not 0",
    "format": "isinstance tells a CSRArray, which has its block_size, from a COOArray",
    "getcol": "use A[:, [j]]",
    "getnnz": "use A.nnz or A.count_nonzero(axis)",
    "getrow": "use A[[i]]",
    "has_canonical_format": "use A.pattern.is_canonical",
    "has_sorted_indices": "use A.pattern.is_canonical",
    "nanmax": "use A.map_values(mx.nan_to_num).max()",
    "nanmin": "use A.map_values(mx.nan_to_num).min()",
    "resize": "patterns are fixed; take a part, A[:m, :n], or use vstack and hstack",
    "setdiag": "patterns are fixed; add diags(d - A.diagonal())",
    "size": "use A.nnz",
    "sort_indices": "use A.canonical()",
    "sorted_indices": "use A.canonical()",
    "sum_duplicates": "use A.canonical()",
    "tobsr": "use from_dense(A.todense(), block_size)",
    "tocsc": "A.T has the columns of A as rows",
    "todia": "use tocsr()",
    "todok": "use tocsr()",
    "tolil": "use tocsr()",
}
_SYMBOLS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


class SparseArray(Elementwise):
    """The base of all sparse arrays: stored values, ``data``, in fixed places.

    Who derives from it says what ``shape``, ``nnz``, ``T`` and ``todense()`` are, and how the same
    places get other values.
    """

    # NumPy then leaves `x @ A` and `2 * A` to the reflected operators.
    __array_ufunc__ = None

    @property
    def data(self) -> mx.array:
        """The stored values. Others of the same shape may be assigned, tracers as well.

        Raises:
            TypeError: What is assigned is no mx.array, or is complex blocks.
            ValueError: It has another shape.
        """
        self._check_shape(self._data)  # `data += x` may have given it another one
        return self._data

    @data.setter
    def data(self, data: mx.array) -> None:
        owner = type(self).__name__
        check_array(owner, "data", data)
        self._check_shape(data)
        check_block_dtype(owner, data.dtype, data.shape[-1] if data.ndim == 3 else 1)
        self._data = data

    def _check_shape(self, data: mx.array) -> None:
        """Raise unless values have the shape of the places: what is native reads by that alone."""
        needed, places = self._needed
        if data.shape != needed:
            raise ValueError(
                f"[{type(self).__name__}] data has shape {data.shape}, the {places} {needed}"
            )

    @property
    def _needed(self) -> tuple[tuple[int, ...], str]:
        """The shape of the values, and who needs it."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        raise NotImplementedError

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        raise NotImplementedError

    @property
    def T(self) -> Any:
        """The transpose."""
        raise NotImplementedError

    def todense(self) -> mx.array:
        """Return the dense array."""
        raise NotImplementedError

    def _with(self, data: mx.array) -> Any:
        """Return an array of other values in the same places."""
        raise NotImplementedError

    def _compare(self, compare: Callable, other: Any) -> Any:
        """Return where ``compare(self, other)`` is true."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.data.dtype

    @property
    def density(self) -> float:
        """Stored fraction of the places."""
        return self.nnz / max(1, int(np.prod(self.shape, dtype=np.int64)))

    @property
    def H(self) -> Any:
        """The conjugate transpose."""
        return self.T.conj()

    def toarray(self) -> mx.array:
        """Return :meth:`todense`."""
        return self.todense()

    def transpose(self, axes: tuple[int, ...] | None = None) -> Any:
        """Return ``A.T``.

        Raises:
            ValueError: ``axes`` is not None, nor all axes in reverse: ``(1, 0)``.
        """
        reverse = tuple(range(self.ndim))[::-1]
        if axes is not None and (not isinstance(axes, tuple | list) or tuple(axes) != reverse):
            raise ValueError(f"[A.transpose] axes must be None or {reverse}, got {axes!r}")
        return self.T

    def dot(self, other: Any) -> Any:
        """Return ``A @ other``, or ``A * other`` of a scalar."""
        array: Any = self
        return array * other if is_scalar(other) else array @ other

    def eval(self) -> Any:
        """Evaluate the values, and return the array: ``mx.eval(A)`` does not see into it."""
        mx.eval(self.data)
        return self

    def astype(self, dtype: mx.Dtype) -> Any:
        """Return a copy whose values are cast to ``dtype``.

        Raises:
            TypeError: It is no dtype of MLX.
        """
        check_dtype("A.astype", dtype)
        return self._with(self.data.astype(dtype))

    def copy(self) -> Any:
        """Return an array of the same values. Neither changes when the other's ``data`` does."""
        return self._with(self.data[:])

    def conj(self) -> Any:
        """Return the complex conjugate."""
        return self._with(mx.conjugate(self.data)) if self.dtype == mx.complex64 else self.copy()

    @property
    def real(self) -> Any:
        """The real part."""
        return self._with(mx.real(self.data)) if self.dtype == mx.complex64 else self

    @property
    def imag(self) -> Any:
        """The imaginary part; zeros, where values are real."""
        is_complex = self.dtype == mx.complex64
        return self._with(mx.imag(self.data) if is_complex else mx.zeros_like(self.data))

    def __neg__(self) -> Any:
        return self._with(-self.data)

    def __pos__(self) -> Any:
        return self.copy()

    def __eq__(self, other: object) -> Any:
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compare(operator.ne, other)

    def __lt__(self, other: Any) -> Any:
        return self._compare(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._compare(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._compare(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._compare(operator.ge, other)

    __hash__ = object.__hash__

    def __len__(self) -> int:
        raise TypeError("sparse array length is ambiguous; use nnz or shape[0]")

    def __bool__(self) -> bool:
        if any(size != 1 for size in self.shape):
            raise ValueError("The truth value of an array with more than one element is ambiguous.")
        return bool(self.nnz)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError(
            f"[A[...] = x] a {type(self).__name__} cannot be written to: its places are fixed, and "
            "values may be traced. Add an array, as A + csr_array((x, (rows, cols)), A.shape), or "
            "replace A.data"
        )

    def __getattr__(self, name: str) -> Any:
        instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return (
            f"{type(self).__name__}({shape}, {self.dtype}{self._blocks}, {self.nnz} stored values, "
            f"density {self.density:.3g})"
        )

    @property
    def _blocks(self) -> str:
        """What ``repr`` says of blocks."""
        return ""


def check_dtype(owner: str, dtype: mx.Dtype | None) -> None:
    """Raise unless ``dtype`` is one of MLX, or None."""
    if dtype is not None and not isinstance(dtype, mx.Dtype):
        raise TypeError(
            f"[{owner}] dtype must be one of MLX, as mx.float32 or mx.bool_, got {dtype!r}"
        )


def is_scalar(x: object) -> TypeGuard[Any]:
    """Return whether ``x`` is a number, or an array of no axes."""
    return isinstance(x, Number) or (hasattr(x, "dtype") and getattr(x, "ndim", 1) == 0)


def weak(x: Any) -> Any:
    """Return a scalar so that NumPy's dtype does not decide that of the result."""
    return x.item() if isinstance(x, np.generic | np.ndarray) else x


def is_dense(x: object) -> TypeGuard[ArrayLike]:
    """Return whether ``x`` is a dense array, or a list that may be one."""
    return isinstance(x, mx.array | np.ndarray | list | tuple)


def dense(operation: str, x: object, dtype: mx.Dtype) -> mx.array:
    """Return an operand beside values of ``dtype``: numbers of Python and NumPy keep float64.

    Raises:
        TypeError: It is no dense array.
    """
    if isinstance(x, mx.array):
        return x
    if is_dense(x):
        keeps = dtype == mx.float64 and np.asarray(x).dtype == np.float64
        return check_data(operation, x, dtype=mx.float64 if keeps else None)
    hint = f"; {conversion(x)} makes it one of this package" if hasattr(x, "tocsr") else ""
    hint = "; a scalar goes by A * x" if is_scalar(x) else hint
    raise TypeError(f"[{operation}] x must be a dense array, got {_describe(x)}{hint}")


def conversion(x: Any) -> str:
    """Return what makes a sparse array of this package of an object with ``tocsr``: one of SciPy,
    which has a format, or an operator."""
    return "from_scipy(x)" if hasattr(x, "format") else "x.tocsr()"


def of_zero(symbol: str, function: Callable, s: Any) -> Any:
    """Return ``function(0, s)``, which says whether what is not stored stays zero, or raise.

    Args:
        symbol: What errors call the function.
        function: A function of two numbers.
        s: A scalar. Its value decides about the pattern.

    Raises:
        TypeError: MLX traces it.
    """
    try:
        return function(0, s.item() if hasattr(s, "item") else s)
    except (RuntimeError, ValueError) as error:
        raise TypeError(
            f"[{symbol}] a number that MLX traces cannot decide which places are stored; compare "
            "A.data"
        ) from error


def check_comparison(compare: Callable, result: Any) -> None:
    """Raise if a comparison is true where nothing is stored: ``result`` says so."""
    if result:
        symbol = _SYMBOLS[compare]
        hint = "compare (A - B).count_nonzero() with 0, or " if compare is operator.eq else ""
        raise TypeError(
            f"[A {symbol} B] sparse arrays have no {symbol} that is true where nothing is stored, "
            f"nearly everywhere; {hint}use A.todense() {symbol} B, or A.data {symbol} b for stored "
            "values"
        )


def symbol_of(compare: Callable) -> str:
    """Return a comparison as errors write it."""
    return f"A {_SYMBOLS[compare]} B"


def host(operation: str, x: mx.array) -> np.ndarray:
    """Return the values of an array on the host, where they decide about places.

    Raises:
        TypeError: MLX traces it, and it has none.
    """
    try:
        return np.array(x)
    except (RuntimeError, ValueError) as error:
        raise TypeError(
            f"[{operation}] places depend on these values, which MLX traces: they have to be "
            "numbers, outside of mx.compile and mx.vmap"
        ) from error


def _describe(x: object) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")
