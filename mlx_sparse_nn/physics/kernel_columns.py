"""Columns of a Krylov basis on a GPU, by kernels: few launches a product, one wait for several."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends import columns
from mlx_sparse_nn.physics.device_columns import DeviceColumns, begin


class Last(NamedTuple):
    """One of the last columns, which is not in the basis yet.

    Attributes:
        vector: ``(panels, 1, width)``: the column is ``factor`` times this.
        factor: A number that the host knows.
        squares: Parts of the square of the vector's norm, on the device.
    """

    vector: mx.array
    factor: float
    squares: mx.array


class KernelColumns(DeviceColumns):
    """The same as ``DeviceColumns``, in float32, by kernels of CUDA or Metal.

    MLX writes a column in place only where nothing under way reads the basis, so the last columns
    stay apart until the host has waited. The rest of a product is normalised by the next product,
    on the device.

    Args:
        dim: Length of a column.
        size: Number of columns, at most ``columns.MOST_COLUMNS``.
        backend: Whose kernels: ``"cuda"`` or ``"metal"``.
    """

    def __init__(self, dim: int, size: int, backend: str):
        super().__init__(dim, size, mx.float32)
        self.backend = backend
        self._last: dict[int, Last] = {}
        self._one = mx.array([1.0, 0.0, 0.0])  # squares of what is normalised
        self._is_read = False  # whether something under way may read the basis
        self._finished: tuple[int, float] | None = None  # a column, and what `finish` returns
        self._known: mx.array | None = None  # of the product of the column after combinations

    def column(self, j: int) -> mx.array:
        return self._flat(self._normal(j))

    def columns(self, count: int) -> mx.array:
        self._settle()
        return super().columns(count)

    def write(self, j: int, x: mx.array) -> None:
        self._last[j] = Last(mx.contiguous(self._cut(x.astype(self.dtype))), 1.0, self._one)

    def scale(self, j: int, factor: float) -> None:
        last = self._take(j)
        self._last[j] = last._replace(factor=last.factor * factor)

    def recur(self, j: int, y: mx.array, before: np.ndarray) -> tuple[float, float]:
        self._normal(j)  # as it was multiplied
        w, squares, known = self._start(j, before)
        rest, _, squares, numbers = self._step(self._cut(y), w, known, squares)
        self._last[j + 1] = Last(rest, 1.0, squares)
        square = squares.sum()
        self._wait(rest, square)
        alpha, _ = _two(numbers)
        return alpha, _root(square)

    def run(self, H: Any, j: int, before: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        w, squares, known = self._start(j, before)
        xs, numbers = [], []
        for _ in range(steps):
            product = self._cut((H @ self._flat(w)).astype(self.dtype))
            w, known, squares, alpha_norm = self._step(product, w, known, squares)
            xs.append(known)
            numbers.append(alpha_norm)
        del product
        self._last |= {j + i: Last(x, 1.0, self._one) for i, x in enumerate(xs)}
        self._last[j + steps] = Last(w, 1.0, squares)
        self._make_orthogonal(j + steps)  # in most cases, what the host would say to do next
        rest = self._last[j + steps]
        square, square_after = squares.sum(), rest.squares.sum()
        self._wait(rest.vector, square, square_after)
        pairs = np.array([_two(pair) for pair in numbers])
        norms = np.append(pairs[1:, 1], _root(square))
        factor = 1 / norms[-1] if norms[-1] else math.inf
        self._last[j + steps] = rest._replace(factor=factor)
        self._finished = j + steps, _root(square_after) * factor
        return pairs[:, 0], norms

    def finish(self, j: int) -> float:
        if self._finished is None or self._finished[0] != j:
            self._last = {i: last for i, last in self._last.items() if i <= j}
            self._make_orthogonal(j)
            return self._norm(j)
        return self._finished[1]

    def orthogonalise(self, j: int) -> float:
        vector, factor, _ = self._take(j)
        self._settle(j)
        self._is_read = True
        vector, _, squares, _ = columns.without(self.backend, self.vectors, j, vector, vector)
        self._last[j] = Last(vector, factor, squares)
        return self._norm(j)

    def overlaps(self, count: int, first: int, last: int) -> np.ndarray:
        self._settle()
        self._is_read = True
        return super().overlaps(count, first, last)

    def distances(self, count: int, factors: np.ndarray) -> np.ndarray:
        self._settle()
        self._is_read = True
        return super().distances(count, factors)

    def combine(
        self, first: int, coefficients: np.ndarray, border: np.ndarray | None = None
    ) -> None:
        """Replace m columns from ``first`` on, as ``DeviceColumns`` does.

        Args:
            first: The first of them.
            coefficients: ``(m, p)``.
            border: ``(p,)``, of the new columns in the product of the one after them, if that is
                to be multiplied next: a factor less to bring to the device, for which it waits.
        """
        m, p = coefficients.shape
        after = None
        if p < m and first + m < self.vectors.shape[1]:
            after = self._take(first + m)
        self._settle(first + m)
        self._known = None
        if p:
            rows = [coefficients.T] if border is None else [coefficients.T, [coefficients @ border]]
            factors = mx.array(np.concatenate(rows).astype(np.float32))
            self._is_read = True
            combined = columns.combine(self.backend, self.vectors, first, factors)
            known = None if border is None else mx.contiguous(combined[:, p:])
            arrays = [combined] if known is None else [combined[:, :p], known]
            self._wait(*arrays, *(last.vector for last in self._last.values()))
            self.vectors[:, first : first + p] = arrays[0]  # in place
            self._known = known
        self._last = {} if after is None else {first + p: after}

    def _take(self, j: int) -> Last:
        """Return column j apart from the basis."""
        self._finished = None
        if j not in self._last:
            self._is_read = True
            self._last[j] = Last(mx.contiguous(self.vectors[:, j : j + 1]), 1.0, self._one)
        return self._last[j]

    def _normal(self, j: int) -> mx.array:
        """Return column j apart from the basis, as it is."""
        vector, factor, _ = self._take(j)
        if factor != 1:
            vector = vector * factor
            self._last[j] = Last(vector, 1.0, self._one)
        return vector

    def _start(self, j: int, before: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return column j times its norm, the square of this, and what is known of its product
        over the norm."""
        vector, factor, squares = self._take(j)
        (places,) = np.nonzero(before)
        if not places.size:
            known = mx.zeros_like(vector)
        elif places[0] == j - 1:
            known, known_factor = self._normal(j - 1), float(before[j - 1]) * factor
            if abs(known_factor - 1) > 1e-6:
                known = known * known_factor
        elif self._known is not None:
            known, self._known = self._known * factor, None
        else:
            self._settle(j)
            self._is_read = True
            factors = mx.array(before[None, places[0] :] * factor, dtype=mx.float32)
            known = columns.combine(self.backend, self.vectors, int(places[0]), factors)
        return vector, squares, known

    def _step(self, y: mx.array, w: mx.array, known: mx.array, squares: mx.array) -> columns.Four:
        dots = columns.recur_dot(self.backend, y, w, known, squares)
        return columns.recur_rest(self.backend, y, w, known, squares, dots)

    def _make_orthogonal(self, j: int) -> None:
        """Make columns ``j - 1`` and j orthogonal to those before them."""
        before, (vector, factor, _) = self._normal(j - 1), self._take(j)
        self._settle(j - 1)
        self._is_read = True
        x, z, of_x, of_z = columns.without(self.backend, self.vectors, j - 1, before, vector)
        self._last[j - 1] = Last(x, 1.0, of_x)
        self._last[j] = Last(z, factor, of_z)

    def _norm(self, j: int) -> float:
        """Return the norm of column j, which has squares."""
        vector, factor, squares = self._last[j]
        square = squares.sum()
        self._wait(vector, square)
        return _root(square) * factor

    def _settle(self, end: int | None = None) -> None:
        """Write the last columns, those before ``end``, into the basis."""
        ready = [j for j in self._last if end is None or j < end]
        if ready and self._is_read:
            self._wait(*(last.vector for last in self._last.values()))
        for j in ready:
            x = self._normal(j)
            del self._last[j]
            self.vectors[:, j : j + 1] = x  # in place

    def _wait(self, *arrays: mx.array) -> None:
        """Wait until they are computed, and nothing under way reads the basis.

        MLX on CUDA may let go of what it has read a little later; then it copies a basis instead of
        writing in place, which costs a small one nothing.
        """
        if self.large:
            begin(self.vectors, *arrays)
            mx.synchronize()
        else:
            mx.eval(self.vectors, *arrays)
        self._is_read = False


def _root(square: mx.array) -> float:
    return math.sqrt(float(square))


def _two(numbers: mx.array) -> tuple[float, float]:
    """Return both of ``(2,)``."""
    first, second = np.array(numbers)
    return float(first), float(second)
