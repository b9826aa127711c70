"""The Krylov basis of an eigensolver, and random vectors."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends.choose import choose_columns
from mlx_sparse_nn.physics.device_columns import DeviceColumns
from mlx_sparse_nn.physics.host_columns import HostColumns
from mlx_sparse_nn.physics.kernel_columns import KernelColumns
from mlx_sparse_nn.physics.precision import epsilon, largest_part

# Powers of the rounding to which the products of columns may grow: in general, and with vectors
# from former spaces, which only have to stay out of this one.
_LOSS, _LOSS_TO_KEPT = 0.75, 0.4


class Krylov:
    """An orthonormal basis that grows by products with H, and H projected on it.

    Lanczos' recurrence gives each column from the two before it. In exact arithmetic it is
    orthogonal to all others; rounding spoils that, slowly at first. The recurrence of that loss is
    known (Simon 1984) and costs next to nothing, so a column is orthogonalised against all others
    only where the loss would exceed a limit, and the next one with it. Up to the root of the
    rounding, the projected matrix is right to rounding; below it, so are combinations of columns.

    H. Simon, Mathematics of Computation 42 (1984) 115.

    Args:
        dim: Length of the vectors.
        size: Most columns.
        dtype: float32, float64 or complex64.
        room: Columns to have room for in the end, when the basis is no longer needed.

    Attributes:
        filled: Number of columns.
        epsilon: Rounding of the dtype.
        at_once: Products that :meth:`grow` takes before the host looks at what they gave.
        projected: ``(size, size)`` NumPy array, H in the basis. Real, since the coefficients of the
            recurrence are.
    """

    def __init__(self, dim: int, size: int, dtype: mx.Dtype, room: int = 0):
        self.dim, self.size, self.dtype = dim, size, dtype
        of_rest = 1 if size == dim else 0
        self.columns = _columns(dim, max(size + of_rest, room), dtype)
        self.filled = 0
        self.projected = np.zeros((size, size))
        self._losses = np.eye(size + 1)  # estimated products of columns with one another
        self._left_out = np.zeros(size + 1)  # by the projected matrix of H times a column, norms
        self.at_once = self.columns.at_once if isinstance(self.columns, DeviceColumns) else 1
        self._again = False  # whether the next column is orthogonalised too
        self.epsilon = epsilon(dtype)

    def begin(self, states: mx.array, energies: np.ndarray) -> None:
        """Make the first columns of eigenvectors of H, ``(dim, k)``, with energies ``(k,)``."""
        for j in range(states.shape[1]):
            self.columns.write(j, states[:, j])
        self.filled = energies.size
        self.projected[: self.filled, : self.filled] = np.diag(energies)
        self._left_out[: self.filled] = self.epsilon**0.75 * np.abs(energies).max()

    def extend(self, x: mx.array) -> None:
        """Make the next column of the part of ``(dim,)`` that is not in the basis."""
        self.columns.write(self.filled, x)
        norm = self._orthogonalise(math.inf)
        self.columns.scale(self.filled, 1 / norm)
        self.filled += 1

    def multiply(self, H: Any) -> float:
        """Multiply the last column by H, and store the projection of the product.

        Returns:
            The norm of the rest of the product: 0 if that is only rounding.
        """
        j = self.filled - 1
        product = (H @ self.columns.column(j)).astype(self.dtype)
        alpha, norm = self.columns.recur(j, product, self.projected[j, :j])
        lost = self._note(alpha, norm)
        if lost or self._again:
            norm = self._orthogonalise(norm)
            self._again = lost and not self._again
        if norm <= self._rounding():
            return 0.0
        self.columns.scale(self.filled, 1 / norm)
        return norm

    def append(self, norm: float) -> None:
        """Make the next column of what :meth:`multiply` left, and its norm."""
        j = self.filled
        self.projected[j, j - 1] = self.projected[j - 1, j] = norm
        self.filled += 1

    def grow(self, H: Any, steps: int) -> tuple[int, float]:
        """Multiply and append up to ``steps`` times, while there is room.

        Returns:
            The number of products, and the norm of the last rest: if it is 0, it is no column.
        """
        products, norm = 0, 1.0
        while products < steps and norm > 0 and (self.filled < self.size or self.size == self.dim):
            count = min(steps - products, self.at_once, self.size - self.filled)
            if count > 1 and not self._again and isinstance(self.columns, DeviceColumns):
                norm = self._run(self.columns, H, count)
            else:
                count, norm = 1, self.multiply(H)
            products += count
            if norm > 0:
                self.append(norm)
        return products, norm

    def _run(self, columns: DeviceColumns, H: Any, steps: int) -> float:
        """Multiply several times before the host looks, and forget what went too far.

        Returns:
            The norm of the last rest, as of :meth:`multiply`.
        """
        j = self.filled - 1
        alphas, norms = columns.run(H, j, self.projected[j, :j], steps)
        for step in range(steps):
            norm = float(norms[step])
            lost = self._note(float(alphas[step]), norm)
            if lost or step == steps - 1 or not norm > self._rounding():
                break
            self.append(norm)
        self.at_once = max(2, step + 1) if lost else min(self.at_once + 1, columns.at_once)
        # The recurrence goes on from the last two columns: both are made orthogonal.
        factor = columns.finish(self.filled)
        self._forget_losses(self.filled - 1)
        factor = self._orthogonalise(1.0, factor)
        if not norm * factor > self._rounding():
            return 0.0
        columns.scale(self.filled, 1 / factor)
        return norm * factor

    def ritz(self, done: int, first: int = 0, sign: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the eigenvalues, ``(m,)``, and eigenvectors, as columns, of the projected H.

        Args:
            done: Number of columns that have been multiplied by H.
            first: The first column taken, so that m is ``done - first``.
            sign: -1 for the negative of H.
        """
        return np.linalg.eigh(sign * self.projected[first:done, first:done])

    def border(self, norm: float, done: int, first: int) -> np.ndarray:
        """Return what H gives the column after ``done`` of each of those before, from ``first`` on.

        ``norm`` is that of the last rest: where it is 0, there is no such column.
        """
        return self.projected[done, first:done] if norm > 0 else np.zeros(done - first)

    def separating(self, first: int) -> np.ndarray:
        """Return the combinations of all columns, ``(filled, filled)``, that take out of those from
        ``first`` on what they have of those before."""
        change = np.eye(self.filled)
        if 0 < first < self.filled:
            overlaps = self.columns.overlaps(first, first, self.filled)
            change = change.astype(overlaps.dtype)
            change[:first, first:] = -overlaps
        return change

    def restart(
        self,
        values: np.ndarray,
        vectors: np.ndarray,
        *,
        first: int = 0,
        border: np.ndarray | None = None,
        left_out: np.ndarray | float = 0.0,
    ) -> None:
        """Keep Ritz vectors in place of the columns that they are made of, from ``first`` on.

        Args:
            values: ``(p,)`` Ritz values.
            vectors: ``(m, p)``, their vectors in the m columns.
            first: The first of the m columns.
            border: ``(p,)``, the products of the vectors with H times the column after the m, which
                is kept. By default it is not.
            left_out: Norms of what the projected matrix leaves out of H times the vectors.
        """
        p, last = vectors.shape[1], first + vectors.shape[0]
        if isinstance(self.columns, KernelColumns):
            self.columns.combine(first, vectors, border)
        else:
            self.columns.combine(first, vectors)
        self.filled = first + p
        change = np.zeros((last, first + p), vectors.dtype)
        change[:first, :first] = np.eye(first)
        change[first:, first:] = vectors
        self.projected[first:] = self.projected[:, first:] = 0
        self.projected[first : first + p, first : first + p] = np.diag(values)
        if border is not None:
            self.projected[first + p, first : first + p] = border
            self.projected[first : first + p, first + p] = border
            change = np.pad(change, ((0, 1), (0, 1)))
            change[-1, -1] = 1
            self.filled += 1
        rows, n = change.shape
        losses = change.conj().T @ self._losses[:rows, :rows] @ change
        self._losses[:n, :n] = losses.real
        self._left_out[first : first + p] = left_out
        self._left_out[first + p :] = 0

    def _orthogonalise(self, norm: float, found: float | None = None) -> float:
        """Subtract from what will be the next column, of this norm, its part in the basis.

        Again, as long as that takes half of it away, since once leaves what rounding adds; or as
        long as what the basis lacks in orthogonality leaves too much.

        Returns:
            The norm of the rest.
        """
        j = self.filled
        among = np.abs(self._losses[:j, :j] - np.eye(j)).max(initial=0.0)
        own = min(1.0, np.abs(self._losses[j, :j]).max(initial=0.0)) if norm < math.inf else 1.0
        for _ in range(5):
            before, norm = norm, self.columns.orthogonalise(j) if found is None else found
            found = None
            own = own * among + self.epsilon
            if norm >= before / 2 and own <= 10 * self.epsilon:
                break
        self._forget_losses(j)
        return norm

    def _forget_losses(self, j: int) -> None:
        """Note that column j is orthogonal to those before it."""
        self._losses[j, :j] = self._losses[:j, j] = self.epsilon

    def _rounding(self) -> float:
        """Return the norm of a rest that may be rounding alone."""
        return 10 * self.epsilon * float(np.abs(self.projected[: self.filled, : self.filled]).max())

    def _note(self, alpha: float, norm: float) -> bool:
        """Note the coefficient of the last column in its product, and the norm of the rest.

        Estimate the products of the rest, normalised, with all columns.

        Returns:
            Whether one of them is so large that the projected matrix would not be right.
        """
        n = self.filled
        self.projected[n - 1, n - 1] = alpha
        T = self.projected[:n, :n]
        rounding = self.epsilon * float(np.abs(T).max())
        losses = T @ self._losses[:n, n - 1] - self._losses[:n, :n] @ T[:, n - 1]
        losses += np.copysign(rounding + self._left_out[:n], losses)
        losses[-1] = rounding  # it has just been subtracted
        losses /= max(norm, rounding) or 1.0
        self._losses[n, :n] = self._losses[:n, n] = losses
        powers = np.where(self._left_out[:n] > 0, _LOSS_TO_KEPT, _LOSS)
        is_whole = self.size == self.dim  # all eigenvectors, of a small H: each has to be right
        return is_whole or bool((np.abs(losses) > self.epsilon**powers).any())


def columns_of_basis(dim: int, k: int) -> int:
    """Return how many columns a basis for k levels has before it restarts.

    With 40 and more, a GPU had a third of the restarts, but NumPy's LAPACK takes threads for such
    a projected matrix, which then wait for the next one on all cores of the host.
    """
    return min(dim, 20 + 2 * k)


def vectors_of_search(k: int, dtype: mx.Dtype) -> int:
    """Return how many vectors a search for k levels holds at its peak, if they are large.

    As tests measure; on a GPU, some are under way.
    """
    return (35 if _on_host(dtype) else 40) + 5 * k


def _columns(dim: int, size: int, dtype: mx.Dtype) -> HostColumns | DeviceColumns:
    if _on_host(dtype):
        return HostColumns(dim, size, dtype)
    backend = choose_columns(size, dtype)
    return KernelColumns(dim, size, backend) if backend else DeviceColumns(dim, size, dtype)


def _on_host(dtype: mx.Dtype) -> bool:
    return dtype == mx.float64 or mx.default_device().type == mx.cpu


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
    """Return a vector over its largest part, whose square then cannot overflow."""
    return v / float(largest_part(v))
