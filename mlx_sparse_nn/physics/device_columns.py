"""Columns of a Krylov basis in plain MLX, of complex64 on a GPU: several products at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.transforms import transforming

_WIDTH = 1024  # elements of a panel
_LARGE = 1 << 18  # elements of a column; see is_large
_PIECES = 8  # in which large columns are combined


class DeviceColumns:
    """Preallocated columns of ``(dim,)``, as ``(panels, size, width)``.

    A product with all of them is a batch of small ones, added up in the end. A GPU may round the
    factors of a float32 matmul to 11 bits (TF32), but not where the second one is a vector. What a
    column is corrected by is nearly 0: there it does not matter. Elsewhere the factors are split.

    Args:
        dim: Length of a column.
        size: Number of columns.
        dtype: float32 or complex64.

    Attributes:
        at_once: Most products to :meth:`run`.
    """

    def __init__(self, dim: int, size: int, dtype: mx.Dtype):
        self.dim, self.dtype = dim, dtype
        self.large = is_large(dim)
        self.at_once = 4 if self.large else 8
        self.width = min(_WIDTH, -(-dim // 32) * 32)
        self.panels = -(-dim // self.width)
        self.vectors = mx.zeros((self.panels, size, self.width), dtype)
        mx.eval(self.vectors)

    def column(self, j: int) -> mx.array:
        """Return column j, ``(dim,)``."""
        return self._flat(self.vectors[:, j])

    def columns(self, count: int) -> mx.array:
        """Return the first columns, ``(dim, count)``, and forget all."""
        columns = self.vectors[:, :count].swapaxes(0, 1).reshape(count, -1)[:, : self.dim].T
        mx.eval(columns)
        del self.vectors
        return columns

    def write(self, j: int, x: mx.array) -> None:
        """Make column j of ``(dim,)``."""
        self._put(j, self._cut(x.astype(self.dtype)))

    def scale(self, j: int, factor: float) -> None:
        self._put(j, self.vectors[:, j : j + 1] * factor)

    def recur(self, j: int, y: mx.array, before: np.ndarray) -> tuple[float, float]:
        """Subtract from a product what it has of column j and of those that it is known to have.

        The rest becomes column ``j + 1``. See ``HostColumns.recur``.
        """
        y = self._cut(y) - self._known(before)
        alpha, norm, rest = _rest(y, self.vectors[:, j : j + 1])
        mx.eval(alpha, norm)
        self._put(j + 1, rest)
        return float(alpha), float(norm)

    def run(self, H: Any, j: int, before: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Multiply column j by H, and the rest of the product, normalised, and so on.

        The rests follow the column.

        Args:
            H: The Hamiltonian.
            j: The last column.
            before: ``(j,)``, the coefficients of the columns before in its product.
            steps: Number of products.

        Returns:
            The coefficient of each column in its product, and the norms of the rests. What follows
            a norm of 0 is no number.
        """
        x, known = mx.contiguous(self.vectors[:, j : j + 1]), self._known(before)
        alphas, norms, rests = [], [], []
        for _ in range(steps):
            product = (H @ self._flat(x)).astype(self.dtype)
            alpha, norm, rest = _rest(self._cut(product) - known, x)
            known, x = norm * x, rest / norm
            begin(x, alpha)  # while the host goes on
            if self.large and rests:
                mx.eval(rests[-1])  # little is under way at once
            alphas.append(alpha)
            norms.append(norm)
            rests.append(x)
        numbers = np.array(mx.stack(alphas + norms)).astype(np.float64)
        del known
        self._put(j + 1, mx.concatenate(rests, axis=1))
        return numbers[:steps], numbers[steps:]

    def orthogonalise(self, j: int) -> float:
        """Subtract from column j its part in the columns before it, and return its norm."""
        rest = self.vectors[:, j : j + 1]
        if j:
            overlaps = self._overlaps(j, rest).astype(self.dtype)
            rest = rest - overlaps @ self.vectors[:, :j]
        norm = mx.sqrt(_dot(rest, rest))
        mx.eval(norm, rest)
        if j:
            self._put(j, rest)
        return float(norm)

    def finish(self, j: int) -> float:
        """Make column j and the one before it orthogonal to all before them.

        Returns:
            The norm of column j.
        """
        self.orthogonalise(j - 1)
        return self.orthogonalise(j)

    def overlaps(self, count: int, first: int, last: int) -> np.ndarray:
        """Return the products of the first columns, conjugated, with columns ``first`` to ``last``.

        ``(count, last - first)``. A matmul may add a thousand terms one after another; this, 32.
        """
        wide = np.complex128 if self.dtype == mx.complex64 else np.float64
        products = []
        for j in range(first, last):
            terms = mx.conjugate(self.vectors[:, :count]) * self.vectors[:, j : j + 1]
            sums = terms.reshape(self.panels, count, -1, 32).sum(axis=3).sum(axis=2)
            if self.large:
                mx.eval(sums)  # little is under way at once
            products.append(sums)
        found = np.array(mx.stack(products, axis=2)).astype(wide)  # (panels, count, last - first)
        return found.sum(axis=0)

    def distances(self, count: int, factors: np.ndarray) -> np.ndarray:
        """Return the norms of columns ``count`` to ``2 * count`` less ``factors`` times the first.

        ``(count,)``.
        """
        norms = []
        for j in range(count):
            x, y = (self.vectors[:, i : i + 1] for i in (j, count + j))
            rest = y - float(factors[j]) * x
            norms.append(mx.sqrt(_dot(rest, rest)))
            if self.large:
                mx.eval(norms[-1])
        return np.array(mx.stack(norms)).astype(np.float64)

    def combine(self, first: int, coefficients: np.ndarray) -> None:
        """Replace m columns from ``first`` on by p combinations of them, coefficients ``(m, p)``.

        The column after them follows.
        """
        m, p = coefficients.shape
        for panels in self._pieces():
            combined = self._combined(panels, first, coefficients)
            mx.eval(combined)
            self.vectors[panels, first : first + p] = combined  # in place, as in _put
            (mx.eval if self.large else begin)(self.vectors)
        if p < m and first + m < self.vectors.shape[1]:
            self._put(first + p, mx.contiguous(self.vectors[:, first + m : first + m + 1]))

    def _pieces(self) -> list[slice]:
        """Return the panels that are combined at once: where vectors are large, some of them."""
        step = -(-self.panels // _PIECES) if self.large else self.panels
        return [slice(start, start + step) for start in range(0, self.panels, step)]

    def _combined(self, panels: slice, first: int, coefficients: np.ndarray) -> mx.array:
        """Return p combinations of m columns, ``(panels, p, width)``; coefficients ``(m, p)``."""
        factors = mx.array(np.ascontiguousarray(coefficients.T)).astype(self.dtype)
        return _product(factors, self.vectors[panels, first : first + len(coefficients)])

    def _put(self, j: int, x: mx.array) -> None:
        """Write columns from j on, ``(panels, count, width)``."""
        mx.eval(x)
        self.vectors[:, j : j + x.shape[1]] = x  # in place, where nothing under way reads them
        (mx.eval if self.large else begin)(self.vectors)

    def _cut(self, x: mx.array) -> mx.array:
        """Return ``(dim,)`` as ``(panels, 1, width)``."""
        padding = self.panels * self.width - self.dim
        return (mx.pad(x, (0, padding)) if padding else x).reshape(-1, 1, self.width)

    def _flat(self, x: mx.array) -> mx.array:
        x = x.reshape(-1)
        return x if x.size == self.dim else x[: self.dim]

    def _known(self, before: np.ndarray) -> mx.array:
        """Return the sum of the first columns times coefficients, ``(panels, 1, width)``, or 0."""
        if not before.any():
            return mx.array(0.0, dtype=self.dtype)
        first = int(np.argmax(before != 0))
        parts = []
        for panels in self._pieces():
            parts.append(self._combined(panels, first, before[first:, None]))
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def _overlaps(self, count: int, x: mx.array) -> mx.array:
        """Return the products of the first columns, conjugated, with ``(panels, 1, width)``.

        ``(1, count)``, in float32.
        """
        products = self.vectors[:, :count] @ mx.conjugate(x).swapaxes(1, 2)
        return mx.conjugate(_sum(products.swapaxes(0, 2)))


def is_large(dim: int) -> bool:
    """Return whether memory counts more than launches."""
    return dim > _LARGE


def begin(*arrays: mx.array) -> None:
    """Let the device begin to compute; where MLX traces, it has to end as well."""
    (mx.eval if transforming() else mx.async_eval)(*arrays)


def _rest(y: mx.array, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return the coefficient of x in y, which is real, the norm of the rest of y, and the rest."""
    alpha = _dot(x, y)
    rest = y - alpha * x
    return alpha, mx.sqrt(_dot(rest, rest)), rest


def _dot(x: mx.array, y: mx.array) -> mx.array:
    """Return the real part of the product of two columns."""
    if x.dtype == mx.complex64:
        return _sum(mx.real(mx.conjugate(x) * y).sum(axis=(1, 2)))
    return _sum((x @ y.swapaxes(1, 2)).reshape(-1))


def _sum(terms: mx.array) -> mx.array:
    """Return the sum over the last axis, in two stages where it is long."""
    n = terms.shape[-1]
    if n > 32 and n % 32 == 0:
        terms = terms.reshape(*terms.shape[:-1], -1, 32).sum(axis=-1)
    return terms.sum(axis=-1)


def _product(a: mx.array, b: mx.array) -> mx.array:
    """Return ``a @ b`` right to float32, with factors of 11 bits.

    What these leave of each is multiplied too, but with one another.
    """
    if a.dtype == mx.complex64:
        (ar, ai), (br, bi) = ((mx.real(x), mx.imag(x)) for x in (a, b))
        real, imaginary = _product(ar, br) - _product(ai, bi), _product(ar, bi) + _product(ai, br)
        return real + mx.array(1j) * imaginary
    a_high, b_high = _high(a), _high(b)
    return a_high @ b_high + (a_high @ (b - b_high) + (a - a_high) @ b_high)


def _high(x: mx.array) -> mx.array:
    """Return float32 numbers cut off after 11 bits: a TF32 keeps all of them."""
    return mx.view(mx.view(x, mx.uint32) & 0xFFFFE000, mx.float32)
