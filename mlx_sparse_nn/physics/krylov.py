"""A Krylov basis and the random vectors that start it, as both solvers use them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.precision import epsilon, pairwise_sum

_PANEL = 256  # elements that one product may add one after another


class Krylov:
    """An orthonormal basis that grows by products with H, and H projected on it.

    The vectors are stored as ``(panels, size, width)``: each is cut into panels, so that a product
    with all of them is a batch of small products. A small product adds few terms one after another;
    the batch is summed pairwise. Columns that are not filled yet are zero, so that shapes never
    change.

    Args:
        dim: Length of the vectors.
        size: Most columns.
        dtype: float32, float64 or complex64.

    Attributes:
        filled: Number of columns.
        projected: ``(size, size)`` NumPy array, H in the basis; its lower triangle is right.
    """

    def __init__(self, dim: int, size: int, dtype: mx.Dtype):
        self.dim, self.size, self.dtype = dim, size, dtype
        self.width = min(dim, _PANEL)
        self.filled = 0
        self.vectors = mx.zeros((-(-dim // self.width), size, self.width), dtype)
        host = np.complex128 if dtype == mx.complex64 else np.float64
        self.projected = np.zeros((size, size), host)
        # A GPU may round the factors of a float32 matmul to 10 bits (TF32), but not those of `*`.
        self._by_matmul = mx.default_device().type == mx.cpu or dtype == mx.float64

    def orthogonalise(self, x: mx.array) -> tuple[mx.array, np.ndarray, float]:
        """Subtract from ``(dim,)`` its part in the basis.

        Returns:
            The rest, ``(panels, 1, width)``, the coefficients of what was subtracted, ``(size,)``,
            and the norm of the rest.
        """
        length = self.vectors.shape[0] * self.width
        rest = mx.pad(x, (0, length - self.dim)).reshape(-1, 1, self.width)
        total = mx.zeros(self.size, self.dtype)
        for _ in range(2):  # "twice is enough": once leaves what rounding adds
            if self._by_matmul:
                parts = mx.conjugate(rest) @ self.vectors.swapaxes(1, 2)
                c = mx.conjugate(pairwise_sum(parts)).reshape(-1)
                rest = rest - c[None] @ self.vectors
            else:
                c = pairwise_sum((mx.conjugate(self.vectors) * rest).sum(axis=2))
                rest = rest - (c[:, None] * self.vectors).sum(axis=1, keepdims=True)
            total = total + c
        norm = mx.sqrt(pairwise_sum(mx.abs(rest).square().sum(axis=(1, 2))))
        mx.eval(rest, total, norm)
        return rest, np.array(total), float(norm)

    def append(self, rest: mx.array, norm: float) -> None:
        """Make the next column of what :meth:`orthogonalise` left, and its norm."""
        self.vectors[:, self.filled : self.filled + 1] = rest * (1 / norm)
        self.filled += 1

    def extend(self, x: mx.array) -> None:
        """Make the next column of the part of ``(dim,)`` that is not in the basis."""
        rest, _, norm = self.orthogonalise(x)
        self.append(rest, norm)

    def multiply(self, H: Any, column: int) -> tuple[mx.array, float]:
        """Multiply a column by H, and store the projection of the product.

        Returns:
            The rest of the product, as of :meth:`orthogonalise`, and its norm: 0 if the rest is
            only rounding.
        """
        x = self.vectors[:, column].reshape(-1)[: self.dim]
        rest, coefficients, norm = self.orthogonalise((H @ x).astype(self.dtype))
        self.projected[:, column] = coefficients
        scale = float(max(np.linalg.norm(coefficients), np.abs(self.projected).max()))
        return rest, 0.0 if norm <= 30 * epsilon(self.dtype) * scale else norm

    def ritz(self, done: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the eigenvalues, ``(done,)``, and eigenvectors, as columns, of the projected H.

        ``done`` columns have been multiplied by H.
        """
        return np.linalg.eigh(self.projected[:done, :done])  # reads the lower triangle

    def combine(self, coefficients: np.ndarray) -> list[mx.array]:
        """Return p combinations of the first m columns, ``(dim,)``; coefficients ``(m, p)``."""
        return [self._combination(c).reshape(-1)[: self.dim] for c in coefficients.T]

    def restart(self, values: np.ndarray, vectors: np.ndarray) -> None:
        """Replace the columns by Ritz vectors, and keep those not multiplied by H yet.

        Args:
            values: ``(kept,)`` Ritz values.
            vectors: ``(done, kept)``, coefficients of the Ritz vectors.
        """
        done, kept = vectors.shape
        waiting = self.vectors[:, done : self.filled]
        columns = [self._combination(c) for c in vectors.T] + [waiting]
        border = self.projected[done : self.filled, :done] @ vectors
        self.filled += kept - done
        self.vectors = mx.pad(
            mx.concatenate(columns, axis=1), [(0, 0), (0, self.size - self.filled), (0, 0)]
        )
        mx.eval(self.vectors)
        self.projected[:] = 0
        self.projected[:kept, :kept] = np.diag(values)
        self.projected[kept : self.filled, :kept] = border

    def _combination(self, c: np.ndarray) -> mx.array:
        """Return a combination of the first columns, ``(panels, 1, width)``."""
        row = mx.array(np.pad(c, (0, self.size - c.size)), dtype=self.dtype)
        if self._by_matmul:
            return row[None] @ self.vectors
        return (row[:, None] * self.vectors).sum(axis=1, keepdims=True)


class Normals:
    """Vectors of ``(dim,)`` normal numbers, a new one at each call."""

    def __init__(self, dim: int, dtype: mx.Dtype, seed: int):
        self.dim, self.dtype, self.key = dim, dtype, mx.random.key(seed)

    def __call__(self) -> mx.array:
        self.key, *keys = mx.random.split(self.key, 3)
        real, imaginary = (mx.random.normal((self.dim,), key=key) for key in keys)
        if self.dtype == mx.complex64:
            return real + imaginary * mx.array(1j)
        return real.astype(self.dtype)


def scaled(v: mx.array) -> mx.array:
    """Return a vector over its largest magnitude, whose square then cannot overflow."""
    return v / float(mx.abs(v).max())
