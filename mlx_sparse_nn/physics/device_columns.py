"""Columns of a Krylov basis in MLX, on a GPU: several products before the host looks at one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

_LARGE = 1 << 18  # elements of a vector beyond which memory counts more than launches
_WIDTH = 1024  # terms of a sum that one group of threads adds


class DeviceColumns:
    """Columns of ``(dim,)``: groups of them, ``(g, dim)``, and the last ones each alone.

    A GPU may round the factors of a float32 matmul to 10 bits (TF32), but not those of ``*``. So
    sums of columns are products element by element, of one group at a time: each takes a copy of
    the group. What is in flight takes memory too; where vectors are large, that is kept short.

    Args:
        dim: Length of a column.
        dtype: float32 or complex64.
    """

    def __init__(self, dim: int, dtype: mx.Dtype):
        self.dim, self.dtype = dim, dtype
        self.large = dim > _LARGE
        self.group = 4 if self.large else 8  # columns
        self.groups: list[mx.array] = []
        self.loose: list[mx.array] = []

    def column(self, j: int) -> mx.array:
        """Return column j, ``(dim,)``."""
        for group in self.groups:
            if j < len(group):
                return group[j]
            j -= len(group)
        return self.loose[j]

    def columns(self, count: int) -> mx.array:
        """Return the first columns, ``(dim, count)``, and forget all."""
        self.forget(count)
        columns = mx.concatenate([part for _, part in self._parts()]).T
        self.groups, self.loose = [], []
        return columns

    def write(self, j: int, x: mx.array) -> None:
        """Make column j, after which there is none any more, of ``(dim,)``."""
        self.forget(j)
        self.loose.append(x.astype(self.dtype))

    def scale(self, j: int, factor: float) -> None:
        self.loose[j - self._grouped()] *= factor

    def recur(self, j: int, y: mx.array, before: np.ndarray) -> tuple[float, float]:
        """Subtract from a product what it has of column j and of those that it is known to have.

        The rest becomes column ``j + 1``. See ``HostColumns.recur``.
        """
        alpha, norm, rest = _rest(y - self.combination(before), self.column(j))
        mx.eval(alpha, norm, rest)
        self.write(j + 1, rest)
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
        x, known = self.column(j), self.combination(before)
        alphas, norms = [], []
        self.forget(j + 1)
        for _ in range(steps):
            alpha, norm, rest = _rest((H @ x).astype(self.dtype) - known, x)
            known, x = norm * x, rest / norm
            mx.async_eval(x, alpha)  # the device begins while the host goes on
            if self.large:
                mx.eval(self.loose[-1])  # the one before
            alphas.append(alpha)
            norms.append(norm)
            self.loose.append(x)
        numbers = np.array(mx.stack(alphas + norms)).astype(np.float64)
        return numbers[:steps], numbers[steps:]

    def orthogonalise(self, j: int) -> float:
        """Subtract from column j, one of the last two, its part in those before it.

        Returns:
            Its norm.
        """
        while len(self.loose) >= self.group + 2:
            self.groups.append(mx.stack(self.loose[:self.group]))
            del self.loose[:self.group]
        at = j - self._grouped()
        rest = self.loose[at]
        rest = rest - self.combination(self._overlaps(j, rest))
        norm = mx.sqrt(_sum(mx.abs(rest).square()))
        mx.eval(norm, rest, self.groups)
        self.loose[at] = rest
        return float(norm)

    def overlaps(self, count: int, first: int, last: int) -> np.ndarray:
        """Return the products of the first columns, conjugated, with columns ``first`` to ``last``.

        ``(count, last - first)``.
        """
        products = [np.array(self._overlaps(count, self.column(j))) for j in range(first, last)]
        wide = np.complex128 if self.dtype == mx.complex64 else np.float64
        return np.stack(products, axis=1).astype(wide)

    def distances(self, count: int, factors: np.ndarray) -> np.ndarray:
        """Return the norms of columns ``count`` to ``2 * count`` less ``factors`` times the first.

        ``(count,)``.
        """
        norms = []
        for j in range(count):
            difference = self.column(count + j) - float(factors[j]) * self.column(j)
            norms.append(float(mx.sqrt(_sum(mx.abs(difference).square()))))
        return np.array(norms)

    def combine(self, first: int, coefficients: np.ndarray) -> None:
        """Replace m columns from ``first`` on by p combinations of them, coefficients ``(m, p)``.

        Columns after them follow.
        """
        m, p = coefficients.shape
        padded = np.pad(coefficients, ((first, 0), (0, 0)))
        new = []
        for start in range(0, p, self.group):
            columns = []
            for c in padded.T[start : start + self.group]:
                columns.append(self.combination(c))
                mx.async_eval(columns[-1])
            new.append(mx.stack(columns))
            mx.eval(new[-1])
        after = [self.column(j) for j in range(first + m, self._grouped() + len(self.loose))]
        self.forget(first)
        new = [loose[None] for loose in self.loose] + new
        self.groups, self.loose = self.groups + new, after

    def combination(self, coefficients: np.ndarray | mx.array) -> mx.array:
        """Return a combination of the first m columns, ``(dim,)``; coefficients ``(m,)``.

        If they are all 0, it is the number 0.
        """
        total = mx.array(0, dtype=self.dtype)
        for j, part in self._parts():
            c = coefficients[j : j + len(part)]
            if not c.size or (isinstance(c, np.ndarray) and not c.any()):
                continue
            c = mx.array(c).astype(self.dtype)
            total = total + (c[:, None] * part[: c.size]).sum(axis=0)
            if self.large:
                mx.eval(total)
        return total

    def _grouped(self) -> int:
        return sum(len(group) for group in self.groups)

    def _parts(self) -> list[tuple[int, mx.array]]:
        """Return all columns, ``(g, dim)``, each with the number of its first."""
        parts, j = [], 0
        for part in [*self.groups, *(column[None] for column in self.loose)]:
            parts.append((j, part))
            j += len(part)
        return parts

    def forget(self, count: int) -> None:
        """Forget all but the first columns."""
        self.loose = self.loose[: max(0, count - self._grouped())]
        groups, self.groups = self.groups, []
        for group in groups:
            if count > 0:
                self.groups.append(group[:count] if count < len(group) else group)
            count -= len(group)

    def _overlaps(self, count: int, x: mx.array) -> mx.array:
        """Return the products of the first columns, conjugated, with ``(dim,)``, as ``(count,)``."""
        products = []
        for j, part in self._parts():
            if j < count:
                products.append(_sum(mx.conjugate(part[: count - j]) * x))
                if self.large:
                    mx.eval(products[-1])
        return mx.concatenate(products) if products else mx.zeros(0, dtype=self.dtype)


def _rest(y: mx.array, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return the coefficient of x in y, which is real, the norm of the rest of y, and the rest."""
    alpha = mx.real(_sum(mx.conjugate(x) * y))
    rest = y - alpha * x
    return alpha, mx.sqrt(_sum(mx.abs(rest).square())), rest


def _sum(terms: mx.array) -> mx.array:
    """Return the sums of ``(..., dim)`` over the last axis, in two stages."""
    dim = terms.shape[-1]
    if dim <= _WIDTH:
        return terms.sum(axis=-1)
    if dim % _WIDTH:
        terms = mx.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, -dim % _WIDTH)])
    return terms.reshape(*terms.shape[:-1], -1, _WIDTH).sum(axis=-1).sum(axis=-1)
