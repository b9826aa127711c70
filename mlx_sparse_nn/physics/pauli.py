"""PauliSum: a sum of Pauli strings with real coefficients, as a linear map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Number
from operator import mul, truediv
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import CSRArray, is_sparse
from mlx_sparse_nn.core.checks import INT32_MAX, ArrayLike, check_data, check_size
from mlx_sparse_nn.core.derivatives import promoted
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.pauli import PauliTerms, parts, pauli_diagonal, pauli_product
from mlx_sparse_nn.core.transforms import defer_to, traces_every_shape, transforming
from mlx_sparse_nn.core.value_maps import Gather
from mlx_sparse_nn.physics.checks import (
    check_dtype,
    check_memory,
    check_number,
    check_one_shape,
    check_scalar,
    check_total,
)
from mlx_sparse_nn.physics.precision import identity
from mlx_sparse_nn.physics.strings import String, count_y, letters_of, merged, sites_of

_MAX_QUBITS = 30  # the length of an axis of MLX is an int32


class PauliSum:
    """A sum of Pauli strings with real coefficients, as a linear map. :func:`pauli_sum` makes it.

    It stores a coefficient for each string and the diagonal, ``2**n`` numbers, if it has one. The
    product is differentiable to any order in the state, and in the coefficients if they came as MLX
    arrays. It works in ``vmap`` and ``compile``, on any device.

    ``H + K``, ``H - K``, ``-H``, ``c * H`` and ``H / c`` are a PauliSum again, for real numbers c
    and scalars of MLX. Unless a transform is running, they raise where the energies overflow
    ``dtype``, or vanish in it. Operators cannot be compared, but pickled and copied.

    Attributes:
        n_qubits: Number of sites.
        coefficients: ``(n_strings,)``, in the order of :attr:`strings`, in units of energy.
    """

    # Makes NumPy leave `x @ H` and `2 * H` to the reflected operators below.
    __array_ufunc__ = None

    def __init__(self, *arguments: Any):
        raise TypeError("[PauliSum] is made by pauli_sum(terms, n_qubits), not by its class")

    @classmethod
    def _of(
        cls, n_qubits: int, masks: Sequence[String], coefficients: mx.array, dtype: mx.Dtype
    ) -> PauliSum:
        """Return the operator of these strings, each of them once, and diagonal ones first."""
        operator = cls.__new__(cls)
        operator._set(n_qubits, masks, coefficients, dtype)
        return operator

    def _set(
        self, n_qubits: int, masks: Sequence[String], coefficients: mx.array, dtype: mx.Dtype
    ) -> None:
        self.n_qubits = n_qubits
        self.coefficients = coefficients
        self._masks = tuple(masks)
        self._dtype = dtype
        self._prepare()

    def _prepare(self) -> None:
        """Make what the product reads: all of it lazy."""
        defer_to(PauliSum)
        check_one_shape(type(self).__name__, "coefficients", self.coefficients)
        n_still = sum(not x for x, _ in self._masks)
        self._moving = PauliTerms(
            self.n_qubits,
            tuple(x for x, _ in self._masks[n_still:]),
            tuple(z for _, z in self._masks[n_still:]),
        )
        still, moving = mx.split(self.coefficients, [n_still])
        # Y = i X Z, so that m of them have a factor of i^m.
        factors = [(1, 1j, -1, -1j)[count_y(string) % 4] for string in self._masks[n_still:]]
        if set(factors) - {1}:
            if not set(factors) <= {1, -1}:
                moving = promoted(moving, mx.complex64)
            moving = moving * mx.array(factors, moving.dtype)
        self._moving_coefficients = moving
        self._diagonal = None
        if n_still:
            signs = tuple(z for _, z in self._masks[:n_still])
            self._diagonal = pauli_diagonal(self.n_qubits, signs, still, still.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """``(2**n_qubits, 2**n_qubits)``."""
        return (1 << self.n_qubits, 1 << self.n_qubits)

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> mx.Dtype:
        return self._dtype

    @property
    def strings(self) -> list[tuple[str, tuple[int, ...]]]:
        """The letters and the sites of every string, such as ``("ZZ", (0, 1))``."""
        return [(letters_of(string), sites_of(string)) for string in self._masks]

    @property
    def T(self) -> PauliSum:
        """The transpose: Y, which is imaginary, becomes -Y."""
        odd = [count_y(string) % 2 for string in self._masks]
        if not any(odd):
            return self
        signs = mx.array([1.0 - 2.0 * is_odd for is_odd in odd], dtype=self.coefficients.dtype)
        transposed = self._scaled(self.coefficients * signs)
        transposed._diagonal = self._diagonal
        return transposed

    @property
    def H(self) -> PauliSum:
        """The conjugate transpose, which is this operator itself."""
        return self

    def conj(self) -> PauliSum:
        """Return the complex conjugate, which is the transpose."""
        return self.T

    def diagonal(self) -> mx.array:
        """Return the diagonal, ``(2**n_qubits,)`` of ``dtype``."""
        if self._diagonal is None:
            return mx.zeros(self.shape[0], self._dtype)
        if traces_every_shape():  # MLX would trace how it was made
            check_one_shape("PauliSum.diagonal", "coefficients", self._diagonal)
            mx.eval(self._diagonal)
        return self._diagonal.astype(self._dtype)

    def todense(self) -> mx.array:
        """Return the matrix, ``(2**n_qubits, 2**n_qubits)`` of ``dtype``.

        Raises:
            ValueError: It is larger than the memory of this machine.
        """
        n_bytes = 3 * self.shape[0] ** 2 * max(4, self._dtype.size)
        check_memory("PauliSum.todense", f"n_qubits {self.n_qubits}", n_bytes)
        return self.T._apply(identity(self.shape[0], self._dtype))

    def tocsr(self) -> CSRArray:
        """Return the matrix as a sparse array, differentiable in the coefficients.

        It is canonical. What is stored depends on the strings alone: all places that one of them
        reaches, and the diagonal if one of them is diagonal, zeros included.

        Raises:
            ValueError: It has more values than fit 32-bit indices or the memory of this machine.
        """
        owner, n_rows = "PauliSum.tocsr", self.shape[0]
        by_flip: dict[int, list[int]] = {0: []} if self._diagonal is not None else {}
        for t, flip in enumerate(self._moving.flips):
            by_flip.setdefault(flip, []).append(t)
        nnz = n_rows * len(by_flip)
        if nnz > INT32_MAX:
            raise ValueError(f"[{owner}] {nnz} stored values do not fit 32-bit indices")
        # Values and indices; sorting and gathering hold each twice, as measured.
        n_bytes = nnz * 2 * (max(4, self._dtype.size) + 4)
        check_memory(owner, f"n_qubits {self.n_qubits}", n_bytes)

        values = [] if self._diagonal is None else [self._diagonal]  # of each column, by flip
        coefficients = parts(self._moving_coefficients)
        for flip, strings in by_flip.items():
            if flip:
                signs = tuple(self._moving.signs[t] for t in strings)
                c = mx.concatenate([coefficients[t] for t in strings])
                values.append(pauli_diagonal(self.n_qubits, signs, c, c.dtype))
        columns, places = _sorted_flips(n_rows, list(by_flip))
        indptr = np.arange(n_rows + 1, dtype=np.int32) * np.int32(len(by_flip))
        pattern = CSRPattern._of(indptr, columns.reshape(-1), self.shape)
        if not values:
            return CSRArray(mx.zeros(0, self._dtype), pattern)
        every = mx.concatenate([promoted(v, self._dtype) for v in values])
        return CSRArray(Gather(places.reshape(-1), nnz)(every), pattern)

    def __matmul__(self, x: ArrayLike) -> mx.array:
        """Return ``H @ x``.

        Args:
            x: ``(2**n,)``, ``(2**n, p)`` or any ``(..., 2**n, p)``.

        Returns:
            An array of the shape of ``x`` and the promoted dtype. 16-bit types are computed in
            float32.
        """
        x = self._operand("H @ x", x)
        inner = x.shape[-1 if x.ndim == 1 else -2] if x.ndim else None
        if inner != self.shape[1]:
            raise ValueError(
                f"[H @ x] H is {self.shape}, x has shape {x.shape}: inner sizes differ"
            )
        if x.ndim == 1:
            return self._apply(x)
        return self._apply(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def __rmatmul__(self, x: ArrayLike) -> mx.array:
        """Return ``x @ H`` of ``(..., 2**n)``."""
        x = self._operand("x @ H", x)
        if x.shape[-1:] != self.shape[:1]:
            raise ValueError(
                f"[x @ H] x has shape {x.shape}, H is {self.shape}: inner sizes differ"
            )
        return self.T._apply(x)

    def __add__(self, other: PauliSum | float) -> PauliSum:
        """Add another operator; or 0, as ``sum`` does."""
        return self._plus("H + K", other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: PauliSum | float) -> PauliSum:
        return self._plus("H - K", other, -1.0)

    def __rsub__(self, other: float) -> PauliSum:
        return (-self)._plus("K - H", other, 1.0)

    def __mul__(self, factor: float | mx.array) -> PauliSum:
        """Multiply by a real number. The product with a state is ``H @ psi``."""
        factor = self._factor("c * H", factor)
        self._check_multiple("c * H", factor, mul)
        return self._scaled(self.coefficients * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | mx.array) -> PauliSum:
        divisor = self._factor("H / c", divisor)
        if (not isinstance(divisor, mx.array) or not transforming()) and float(divisor) == 0:
            raise ValueError("[H / c] c must not be 0")
        self._check_multiple("H / c", divisor, truediv)
        return self._scaled(self.coefficients / divisor)

    def __neg__(self) -> PauliSum:
        return self._scaled(-self.coefficients)

    def __pos__(self) -> PauliSum:
        return self

    def __eq__(self, other: object) -> bool:
        raise TypeError("[H == K] operators are not compared; compare H.todense() or H.strings")

    def __ne__(self, other: object) -> bool:
        raise TypeError("[H != K] operators are not compared; compare H.todense() or H.strings")

    __hash__ = object.__hash__

    def __len__(self) -> int:
        """The number of strings."""
        return len(self._masks)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for letters in map(letters_of, self._masks):
            name = letters or "constant"
            counts[name] = counts.get(name, 0) + 1
        kinds = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:9])
        more = ", ..." if len(counts) > 9 else ""
        strings = "1 string" if len(self) == 1 else f"{len(self)} strings"
        sites = "1 site" if self.n_qubits == 1 else f"{self.n_qubits} sites"
        return (
            f"PauliSum({self.shape[0]} x {self.shape[1]}, {self.dtype}, {strings} on {sites}"
            f"{': ' * bool(kinds)}{kinds}{more})"
        )

    def __copy__(self) -> PauliSum:
        return self._with_arrays(self._arrays())

    def __deepcopy__(self, memo: dict) -> PauliSum:
        return self._with_arrays([array[...] for array in self._arrays()])

    def __getstate__(self) -> dict[str, Any]:
        """Return what is not lazy, with names of dtypes, and NumPy arrays: MLX rounds float64."""
        made = ("_moving", "_moving_coefficients", "_diagonal")
        state = {name: value for name, value in vars(self).items() if name not in made}
        arrays = {name: np.array(v) for name, v in state.items() if isinstance(v, mx.array)}
        return state | arrays | {"_dtype": str(self._dtype).rpartition(".")[2]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                dtype = mx.float64 if value.dtype == np.float64 else mx.float32
                value = mx.array(value, dtype=dtype)
            setattr(self, name, value)
        self._dtype = getattr(mx, state["_dtype"])
        self._prepare()

    def _arrays(self) -> list[mx.array]:
        """Return the arrays that the operator depends on."""
        return [self.coefficients]

    def _with_arrays(self, arrays: Sequence[mx.array]) -> PauliSum:
        """Return the same operator of other arrays."""
        return PauliSum._of(self.n_qubits, self._masks, arrays[0], self._dtype)

    def _scaled(self, coefficients: mx.array) -> PauliSum:
        return PauliSum._of(self.n_qubits, self._masks, coefficients, self._dtype)

    def _apply(self, x: mx.array) -> mx.array:
        """Return the product with ``(..., 2**n)``."""
        dtype = mx.result_type(mx.zeros(0, self._dtype), x)
        x = promoted(x, mx.result_type(mx.zeros(0, dtype), mx.float32))
        return pauli_product(self._moving, self._moving_coefficients, self._diagonal, x).astype(
            dtype
        )

    def _operand(self, operation: str, x: Any) -> mx.array:
        if isinstance(x, PauliSum):
            raise TypeError(f"[{operation}] x is an operator; apply one after the other to a state")
        if is_sparse(x):
            raise TypeError(f"[{operation}] x is a sparse array; use H.tocsr() in place of H")
        x = check_data(operation, x, name="x")
        check_one_shape(operation, "x", x)
        return x

    def _plus(self, operation: str, other: Any, sign: float) -> PauliSum:
        """Return the sum with ``sign`` times another operator, or with the number 0."""
        if isinstance(other, Number) and other == 0:
            return self
        if not isinstance(other, PauliSum):
            raise TypeError(
                f"[{operation}] K must be a PauliSum or an IsingOperator, got "
                f'{type(other).__name__}; a constant is pauli_sum({{"": [(c,)]}}, n_qubits), and '
                "arrays add up with H.todense() or H.tocsr()"
            )
        if other.n_qubits != self.n_qubits:
            raise ValueError(
                f"[{operation}] operators must have equally many sites, got {self.n_qubits} and "
                f"{other.n_qubits}"
            )
        dtype = mx.result_type(*(mx.zeros(0, a.dtype) for a in (self, other)))
        if mx.float64 in (self.dtype, other.dtype) and dtype != mx.float64:
            raise ValueError(
                f"[{operation}] operators are {self.dtype} and {other.dtype}, and MLX has no "
                "complex type of float64"
            )
        terms = [
            (string, value)
            for summand, factor in ((self, 1.0), (other, sign))
            for string, value in zip(
                summand._masks, parts(factor * summand.coefficients), strict=True
            )
        ]
        if not transforming():
            totals: dict[String, float] = {}
            for summand, factor in ((self, 1.0), (other, sign)):
                for string, value in zip(summand._masks, summand._numbers(), strict=True):
                    totals[string] = totals.get(string, 0.0) + factor * value
            check_total(operation, list(totals.values()), dtype)
        return PauliSum._of(self.n_qubits, *merged(terms, coefficient_dtype(dtype)), dtype)

    def _factor(self, operation: str, factor: Any) -> float | mx.array:
        """Return a real number, or raise: any other would not leave H Hermitian, or not an H."""
        is_number = isinstance(factor, Number)
        is_array = isinstance(factor, mx.array | np.ndarray)
        if not is_number and not (is_array and factor.ndim == 0):
            got = f"shape {factor.shape}" if is_array else type(factor).__name__
            raise TypeError(
                f"[{operation}] c must be a real number, got {got}; the product with a state is "
                "H @ psi"
            )
        factor = check_scalar(operation, "c", factor, self.coefficients.dtype)
        if isinstance(factor, float):
            check_total(operation, [factor], self.coefficients.dtype)
        elif not transforming():
            check_number(operation, "c", factor)
        return factor

    def _numbers(self) -> list[float]:
        """Return the coefficients, evaluated."""
        return np.array(self.coefficients).tolist()

    def _check_multiple(
        self, operation: str, factor: float | mx.array, of: Callable[[float, float], float]
    ) -> None:
        """Raise unless the energies of a multiple fit ``dtype``, where they are known."""
        if transforming():
            return
        factor, least = float(factor), math.ulp(0.0)  # which a product of nonzero numbers is not
        numbers = [abs(of(c, factor)) for c in self._numbers() if c and factor]
        check_total(operation, [max(number, least) for number in numbers], self._dtype)


def check_operator_size(owner: str, n_qubits: int, dtype: mx.Dtype) -> int:
    """Return a number of sites whose states MLX and the memory of this machine can hold."""
    check_dtype(owner, dtype)
    n_qubits = check_size(owner, "n_qubits", n_qubits, minimum=1)
    if n_qubits > _MAX_QUBITS:
        raise ValueError(
            f"[{owner}] n_qubits {n_qubits} needs 2**{n_qubits} amplitudes of {dtype.size} "
            f"bytes; at most 2**{_MAX_QUBITS} fit an axis of MLX"
        )
    # The diagonal, a state, its product, and one state in between.
    n_bytes = (1 << n_qubits) * 4 * max(coefficient_dtype(dtype).size, dtype.size)
    check_memory(owner, f"n_qubits {n_qubits}", n_bytes)
    return n_qubits


def coefficient_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Return the dtype of the coefficients of an operator."""
    return mx.float64 if dtype == mx.float64 else mx.float32


def _sorted_flips(n_rows: int, flips: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns ``row ^ flip`` of every row in ascending order, ``(n_rows, n_flips)``, and
    where each lies among the columns of all flips, one flip after another. Both are int32."""
    columns = np.empty((n_rows, len(flips)), dtype=np.int32)
    places = np.empty_like(columns)
    chunk = 1 << 14  # rows at a time: sorting takes int64, of few rows then
    for start in range(0, n_rows, chunk):
        rows = np.arange(start, min(start + chunk, n_rows), dtype=np.int32)
        unsorted = rows[:, None] ^ np.array(flips, dtype=np.int32)
        order = np.argsort(unsorted, axis=1)
        part = np.s_[start : start + rows.size]
        columns[part] = np.take_along_axis(unsorted, order, axis=1)
        places[part] = order * n_rows + columns[part]
    return columns, places
