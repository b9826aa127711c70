"""Lanczos' recurrence of three terms: all that an evolution needs of a Krylov space.

A step is as right as the recurrence is, whether or not rounding leaves its vectors orthogonal:
nothing is orthogonalised again, and one product with H goes with five passes over a vector.

States are flat rows of real numbers, ``(length,)``: a complex state is its ``(dim, 2)`` parts, and
the recurrence of a Hermitian matrix has real coefficients. On a CPU they are NumPy's, with BLAS;
on a GPU MLX's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import COOArray, CSRArray
from mlx_sparse_nn.core.transforms import transforming
from mlx_sparse_nn.physics.parameters import detached, parameters
from mlx_sparse_nn.physics.precision import identity, pairwise_sum
from mlx_sparse_nn.physics.units import Scaled

_MOST = 1024  # dimension of an H whose spectrum may take the place of steps: half a second
Row = Any  # (length,): a NumPy array on a CPU, an MLX array on a GPU


class Product:
    """``H @ x`` of flat rows.

    Args:
        H: ``(dim, dim)`` in its own unit.
        is_complex: Whether rows are complex states.
        dtype: float32 or float64: of the rows.
        on_host: Whether rows are NumPy's.
    """

    def __init__(self, H: Scaled, is_complex: bool, dtype: mx.Dtype, on_host: bool):
        self.H, self.is_complex, self.dtype, self.on_host = H, is_complex, dtype, on_host
        self.dim = H.shape[0]
        self.epsilon = 2.0**-52 if dtype == mx.float64 else 2.0**-23
        self.length = 2 * self.dim if is_complex else self.dim
        known = bool(parameters(H.H)[0])  # this package knows that it multiplies matrices too
        self.may_be_stored = on_host and known and self.dim <= _MOST
        # A real matrix multiplies both parts in one product of half the work, and in float64,
        # which MLX has no complex numbers of.
        stores = isinstance(H.H, CSRArray | COOArray | mx.array)
        is_real = not mx.issubdtype(H.dtype, mx.complexfloating)
        self.in_pairs = is_complex and is_real and (stores or dtype == mx.float64)

    def of(self, H: Scaled) -> Product:
        """Return the product with another H."""
        return Product(H, self.is_complex, self.dtype, self.on_host)

    def __call__(self, row: Row) -> Row:
        """Return the product with one row."""
        return self.to_row(self.H @ self.to_states(row))

    def to_states(self, row: Row) -> mx.array:
        """Return a row as what H multiplies: ``(dim,)``, or ``(dim, 2)`` parts."""
        if self.in_pairs:
            row = row.reshape(self.dim, 2)
        x = mx.array(row, dtype=self.dtype) if self.on_host else row
        return x if self.in_pairs or not self.is_complex else to_complex(x)

    def to_columns(self, rows: Sequence[Row]) -> mx.array:
        """Return K rows as a matrix that H multiplies: ``(dim, K)``, or ``(dim, 2 K)`` parts."""
        states = mx.stack([self.to_states(row) for row in rows], axis=1)
        return states.reshape(self.dim, -1)

    def to_row(self, x: mx.array) -> Row:
        """Return ``(dim,)`` or ``(dim, 2)`` parts as a row."""
        if self.is_complex and not self.in_pairs:
            x = mx.view(x.astype(mx.complex64), mx.float32)
        if x.dtype != self.dtype:
            x = x.astype(self.dtype)
        return (np.asarray(x) if self.on_host else x).reshape(-1)

    def from_array(self, x: mx.array) -> Row:
        """Return a state ``(dim,)`` as a row."""
        if self.is_complex:
            x = mx.view(x.astype(mx.complex64), mx.float32)
        x = x.astype(self.dtype)
        return np.array(x) if self.on_host else x

    def to_array(self, row: Row) -> mx.array:
        """Return a row as a state, ``(dim,)``."""
        x = mx.array(row, dtype=self.dtype) if self.on_host else row
        return to_complex(x) if self.is_complex else x

    def scaled(self, row: Row, amplitude: complex) -> Row:
        """Return a row times a number, whose real part counts if rows are real."""
        if not self.is_complex:
            return row * amplitude.real
        if not self.on_host:
            return mx.view(to_complex(row) * amplitude, mx.float32)
        return (row.view(np.result_type(row, np.complex64)) * amplitude).view(row.dtype)


def to_complex(x: mx.array) -> mx.array:
    """Return the parts of complex numbers, ``(2 n,)``, as these, ``(n,)`` complex64."""
    return mx.view(x.astype(mx.float32), mx.complex64)


class Recurrence:
    """Vectors v_j and numbers with ``H v_j = b_j v_{j-1} + a_j v_j + b_{j+1} v_{j+1}``.

    Args:
        product: Multiplies rows by H.
        size: Most vectors.

    Attributes:
        a: The diagonal of H in the Krylov space, a number for each vector that was multiplied.
        b: As many numbers next to the diagonal; the last one is the norm of what the space leaves
            out, 0 if that is only rounding.
    """

    def __init__(self, product: Product, size: int):
        self.product, self.size = product, size
        self.a: list[float] = []
        self.b: list[float] = []
        self._scale = 0.0  # the largest of them
        self.epsilon = product.epsilon

    @property
    def done(self) -> int:
        """How many vectors have been multiplied."""
        return len(self.a)

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the eigenvalues of H in the space, ascending, its eigenvectors as columns, and
        their overlaps with what the recurrence began with."""
        # eigh reads the lower triangle
        values, vectors = np.linalg.eigh(np.diag(self.a) + np.diag(self.b[:-1], -1))
        return values, vectors, vectors[0]

    def start(self, row: Row) -> None:
        """Begin anew with a row of norm 1."""
        raise NotImplementedError

    def grow(self, count: int) -> None:
        """Multiply vectors until ``count`` are done, or what is left out is only rounding."""
        raise NotImplementedError

    def combine(self, amplitudes: np.ndarray) -> list[Row]:
        """Return combinations of the first vectors, K rows, by amplitudes ``(K, done)``."""
        raise NotImplementedError

    def _append(self, a: float, b: float) -> bool:
        """Note the coefficients of a product; return whether anything was left out."""
        self.a.append(a)
        self._scale = max(self._scale, abs(a), b)
        self.b.append(0.0 if b <= 30 * self.epsilon * self._scale else b)
        return self.b[-1] > 0


class HostRecurrence(Recurrence):
    """Rows of one NumPy array, made once and used by all steps."""

    def __init__(self, product: Product, size: int):
        super().__init__(product, size)
        dtype = np.float64 if product.dtype == mx.float64 else np.float32
        self.vectors = np.empty((size + 1, product.length), dtype)
        self.rest = np.empty(product.length, dtype)

    def start(self, row: Row) -> None:
        self.a, self.b, self._scale = [], [], 0.0
        self.vectors[0] = row

    def grow(self, count: int) -> None:
        while self.done < count:
            j, rest, first = self.done, self.rest, max(0, self.done - 1)
            product = self.product(self.vectors[j])
            a = np.dot(self.vectors[j], product)
            known = np.array([*self.b[first:j], a], rest.dtype)  # (b_j, a_j)
            np.dot(known, self.vectors[first : j + 1], out=rest)
            np.subtract(product, rest, out=rest)
            b = math.sqrt(np.dot(rest, rest))
            if not self._append(float(a), float(b)):
                return
            np.multiply(rest, rest.dtype.type(1 / b), out=self.vectors[j + 1])

    def combine(self, amplitudes: np.ndarray) -> list[Row]:
        vectors = self.vectors[: self.done]
        if not self.product.is_complex:
            return list(np.real(amplitudes).astype(vectors.dtype) @ vectors)
        if vectors.dtype == np.float64:
            vectors = vectors.view(np.complex128)
        else:
            vectors = vectors.view(np.complex64)
        states = amplitudes.astype(vectors.dtype) @ vectors
        return list(states.view(self.vectors.dtype))


class DeviceRecurrence(Recurrence):
    """MLX arrays; nothing is evaluated before a number is needed."""

    def start(self, row: Row) -> None:
        self.a, self.b, self._scale = [], [], 0.0
        # While a rule runs, MLX keeps all that a row was made of: the steps before.
        self.vectors = detached([row]) if transforming() else [row]

    def grow(self, count: int) -> None:
        numbers = []
        last_b = self.b[-1] if self.done else 0.0
        for j in range(self.done, count):
            rest = self.product(self.vectors[j])
            a = (self.vectors[j] * rest).sum()
            rest = rest - a * self.vectors[j]
            if j:
                rest = rest - last_b * self.vectors[j - 1]
            b = mx.sqrt(rest.square().sum())
            self.vectors.append(rest * mx.where(b > 0, 1 / b, 0.0))
            numbers.append(mx.stack([a, b]))
            last_b = b
        if numbers:
            mx.eval(self.vectors)
            for a, b in np.array(mx.stack(numbers), dtype=np.float64):
                if not self._append(float(a), float(b)):
                    return

    def combine(self, amplitudes: np.ndarray) -> list[Row]:
        return [self._combination(row) for row in amplitudes]

    def _combination(self, amplitudes: np.ndarray) -> mx.array:
        if self.product.is_complex:
            vectors = [to_complex(v) for v in self.vectors[: self.done]]
            out = sum(complex(c) * v for c, v in zip(amplitudes, vectors, strict=True))
            return mx.view(out, mx.float32)
        vectors = self.vectors[: self.done]
        return mx.array(0.0) + sum(
            float(c) * v for c, v in zip(np.real(amplitudes), vectors, strict=True)
        )


class Spectrum(Recurrence):
    """All of a small H instead: its spectrum, in float64. Its vectors are the unit vectors."""

    def __init__(self, product: Product):
        super().__init__(product, product.dim)
        columns = product.H @ identity(product.dim, product.H.dtype)
        is_complex = columns.dtype == mx.complex64
        matrix = np.array(columns.astype(mx.complex64 if is_complex else product.dtype))
        self.values, self.columns = np.linalg.eigh(
            matrix.astype(np.complex128 if is_complex else np.float64)
        )
        self.a, self.b = [0.0] * product.dim, [0.0] * product.dim

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.values, self.columns, self.columns.conj().T @ self._numbers(self.row)

    def start(self, row: Row) -> None:
        self.row = row

    def grow(self, count: int) -> None:
        pass

    def combine(self, amplitudes: np.ndarray) -> list[Row]:
        real = np.float64 if self.product.dtype == mx.float64 else np.float32
        if not self.product.is_complex:
            return list(np.real(amplitudes).astype(real))
        parts = np.ascontiguousarray(amplitudes, dtype=np.complex128).view(np.float64)
        return list(parts.astype(real))

    def _numbers(self, row: Row) -> np.ndarray:
        row = np.asarray(row, dtype=np.float64)
        return row.view(np.complex128) if self.product.is_complex else row


def recurrence(product: Product, size: int) -> Recurrence:
    """Return an empty recurrence where the rows of ``product`` are."""
    return (HostRecurrence if product.on_host else DeviceRecurrence)(product, size)


def normalised(row: Row) -> tuple[Row, float]:
    """Return a row over its norm, and that norm; its squares must not overflow."""
    if isinstance(row, np.ndarray):
        norm = float(np.sqrt(np.square(row).sum()))  # NumPy sums in pairs
        return row * row.dtype.type(1 / norm), norm
    norm = float(mx.sqrt(pairwise_sum(row.square())))
    return row * (1 / norm), norm
