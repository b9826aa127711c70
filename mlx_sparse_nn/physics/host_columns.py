"""Columns of a Krylov basis in NumPy, on the CPU: by BLAS, piece by piece of their length."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

_PIECE = 1 << 15  # elements: what a loop works on stays in the cache; sums of pieces are float64
_DTYPES = {mx.float32: np.float32, mx.float64: np.float64, mx.complex64: np.complex64}


class HostColumns:
    """Preallocated columns of ``(dim,)``, each contiguous.

    Args:
        dim: Length of a column.
        size: Number of columns.
        dtype: float32, float64 or complex64.
    """

    def __init__(self, dim: int, size: int, dtype: mx.Dtype):
        self.dtype = dtype
        self.rows = np.empty((size, dim), _DTYPES[dtype])
        self.pieces = [slice(start, start + _PIECE) for start in range(0, dim, _PIECE)]

    def column(self, j: int) -> mx.array:
        """Return column j, ``(dim,)``, copied."""
        return mx.array(self.rows[j], dtype=self.dtype)

    def columns(self, count: int) -> mx.array:
        """Return the first columns, ``(dim, count)``."""
        return mx.array(self.rows[:count], dtype=self.dtype).T

    def write(self, j: int, x: mx.array) -> None:
        """Make column j of ``(dim,)``."""
        self.rows[j] = np.array(x, copy=False)

    def scale(self, j: int, factor: float) -> None:
        self.rows[j] *= factor

    def recur(self, j: int, y: mx.array, before: np.ndarray) -> tuple[float, float]:
        """Subtract from a product what it has of column j and of those that it is known to have.

        The rest becomes column ``j + 1``.

        Args:
            j: The column that was multiplied.
            y: ``(dim,)``, the product.
            before: ``(j,)``, the coefficients of the columns before.

        Returns:
            The coefficient of column j, which is real, and the norm of the rest.
        """
        product, column, rest = np.array(y, copy=False), self.rows[j], self.rows[j + 1]
        number = self.rows.dtype.type
        first = int(np.argmax(before != 0)) if before.any() else j
        coefficients = before[first:].astype(number)
        alpha = square = 0.0
        for p in self.pieces:
            known = rest[p]
            if coefficients.size > 1:
                np.dot(coefficients, self.rows[first:j, p], out=known)
                np.subtract(product[p], known, out=known)
            elif coefficients.size:
                np.multiply(self.rows[first, p], coefficients[0], out=known)
                np.subtract(product[p], known, out=known)
            else:
                known[:] = product[p]
            alpha += np.vdot(column[p], known).real.item()
        for p in self.pieces:
            rest[p] -= number(alpha) * column[p]
            square += np.vdot(rest[p], rest[p]).real.item()
        return alpha, math.sqrt(square)

    def orthogonalise(self, j: int) -> float:
        """Subtract from column j its part in the columns before it, and return its norm."""
        others, column, square = self.rows[:j], self.rows[j], 0.0
        overlaps = sum(others[:, p] @ column[p].conj() for p in self.pieces)
        factors = np.conj(overlaps)
        for p in self.pieces:
            column[p] -= factors @ others[:, p]
            square += np.vdot(column[p], column[p]).real.item()
        return math.sqrt(square)

    def overlaps(self, count: int, first: int, last: int) -> np.ndarray:
        """Return the products of the first columns, conjugated, with columns ``first`` to ``last``.

        ``(count, last - first)``, in float64: BLAS may add thousands of terms one after another.
        """
        wide = np.result_type(self.rows, np.float64)
        total = np.zeros((count, last - first), wide)
        for p in self.pieces:
            left, right = (
                self.rows[some, p].astype(wide) for some in (slice(count), slice(first, last))
            )
            total += left.conj() @ right.T
        return total

    def distances(self, count: int, factors: np.ndarray) -> np.ndarray:
        """Return the norms of columns ``count`` to ``2 * count`` less ``factors`` times the first.

        ``(count,)``, summed in float64.
        """
        squares = np.zeros(count)
        factors = factors.astype(self.rows.dtype)[:, None]
        for p in self.pieces:
            part = self.rows[count : 2 * count, p] - factors * self.rows[:count, p]
            squares += np.square(np.abs(part)).sum(axis=1)
        return np.sqrt(squares)

    def combine(self, first: int, coefficients: np.ndarray) -> None:
        """Replace m columns from ``first`` on by p combinations of them, coefficients ``(m, p)``.

        The column after them follows.
        """
        m, p = coefficients.shape
        factors = coefficients.T.astype(self.rows.dtype)
        for piece in self.pieces:
            self.rows[first : first + p, piece] = factors @ self.rows[first : first + m, piece]
        if p < m and first + m < len(self.rows):
            self.rows[first + p] = self.rows[first + m]

    def combination(self, coefficients: np.ndarray) -> mx.array:
        """Return a combination of the first m columns, ``(dim,)``; coefficients ``(m,)``."""
        total = coefficients.astype(self.rows.dtype) @ self.rows[: coefficients.size]
        return mx.array(total, dtype=self.dtype)
