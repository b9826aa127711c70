"""The search for the lowest levels of a Hamiltonian, in one Krylov space after another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.checks import check_hermitian, check_memory
from mlx_sparse_nn.physics.krylov import (
    Krylov,
    Normals,
    columns_of_basis,
    scaled,
    vectors_of_search,
)
from mlx_sparse_nn.physics.precision import work_dtype
from mlx_sparse_nn.physics.units import Scaled

_SURE = 0.01  # see Search._find


@dataclass(frozen=True)
class Levels:
    """What a search found; see ``LanczosResult``.

    Attributes:
        complaint: What has not been reached, or "".
    """

    energies: mx.array
    states: mx.array
    residuals: mx.array
    products: int
    complaint: str


@dataclass(frozen=True)
class Search:
    """A search for ``k`` levels.

    Attributes:
        owner: The public function, for errors.
        k: Number of levels.
        sign: 1 for the lowest levels, -1 for the highest.
        tol: Residual to reach, relative to the largest energy found.
        max_iter: Most products.
        seed: Of random vectors.
    """

    owner: str
    k: int
    sign: int
    tol: float
    max_iter: int
    seed: int

    def run(self, H: Any, v0: mx.array | None, precise: bool = False) -> Levels:
        """Find the levels of H.

        Args:
            H: Any Hamiltonian.
            v0: ``(dim,)``, to begin with, or None.
            precise: Whether states are to be as right as their dtype allows.
        """
        dim, dtype = H.shape[0], work_dtype(H, v0)
        vectors = vectors_of_search(self.k, dtype)
        check_memory(self.owner, f"{vectors} vectors of {dim}", vectors * dim * dtype.size)
        with device_of(dtype):
            normals = Normals(dim, dtype, self.seed)
            H = check_hermitian(self.owner, H, normals)
            size = columns_of_basis(dim, self.k)
            basis = Krylov(dim, size, dtype, room=2 * self.k)
            basis.extend(normals() if v0 is None else scaled(v0).astype(dtype))
            tol = min(self.tol, basis.epsilon**0.8) if precise else self.tol
            products, scale, finished = self._find(H, tol, basis, normals)
            energies, residuals = eigenpairs(H, self.k, basis.columns)
            real = mx.float64 if dtype == mx.float64 else mx.float32
            return Levels(
                H.to_own(mx.array(energies, dtype=real)),
                basis.columns.columns(self.k),
                H.to_own(mx.array(residuals, dtype=real)),
                products,
                self._complaint(float(residuals.max()), scale, finished, 2.0**H.exponent),
            )

    def _find(
        self, H: Scaled, tol: float, basis: Krylov, normals: Normals
    ) -> tuple[int, float, bool]:
        """Leave the lowest k Ritz vectors of ``sign * H`` in the first columns of the basis.

        A Krylov space of one vector has each level once. So when k levels have converged they are
        kept, and another space grows from a random vector in their complement: if it has a level
        below the highest of the k, that was missed, and takes the place of the highest; and so on.

        Had the last space missed a level that is lower by d than its lowest Ritz value, the
        residual of this would be at least d times the ratio of what its start has of both: Ritz
        vectors are polynomials of H times the start, and one grows below its Ritz values. That
        ratio of two normal numbers is below 1/100 in 0.6% of cases.

        Returns:
            The number of products, the largest energy found, and whether nothing is left to do.
        """
        k, sign, max_iter = self.k, self.sign, self.max_iter
        kept = kept_errors = np.zeros(0)  # levels of former spaces, in the first columns
        products, scale, pace = 0, 0.0, _Pace()
        while True:
            steps, norm = basis.grow(H, min(max(pace.steps, basis.at_once), max_iter - products))
            products += steps
            first, done = kept.size, basis.filled - (norm > 0)
            values, vectors = basis.ritz(done, first, sign)
            border = basis.border(norm, done, first) @ vectors
            scale = max(scale, float(np.abs(values).max()))

            levels = np.concatenate([kept, values])
            errors = np.concatenate([kept_errors, np.abs(border)])
            lowest = np.argsort(levels, kind="stable")[:k]
            worst = errors[lowest].max() if lowest.size == k else math.inf
            goal = 0.5 * tol * scale
            finished = done == basis.dim or (k == 1 and worst <= goal)
            if first == k:
                above = values[0] - kept.max() + 30 * basis.epsilon * scale
                if above >= 0:  # as it seems, no level is missing
                    worst, goal = errors[k], max(goal / 10, _SURE * above)
                    finished = finished or worst <= goal
            if finished or products == max_iter or worst <= goal or norm == 0:
                kept, kept_errors = levels[lowest], errors[lowest]
                new = lowest[lowest >= first]
                basis.restart(sign * levels[new], vectors[:, new - first], first=first)
                order = np.where(lowest < first, lowest, first + np.cumsum(lowest >= first) - 1)
                basis.restart(sign * kept, basis.separating(first)[:, order], left_out=kept_errors)
                if finished or products == max_iter:
                    return products, scale, finished
                basis.extend(normals())
                pace = _Pace()
                continue
            pace.update(products, worst, goal)
            if basis.filled == basis.size < basis.dim:
                wanted = max(1, k - first)
                count = wanted + (values.size - wanted) // 4
                basis.restart(
                    sign * values[:count], vectors[:, :count], first=first, border=border[:count]
                )

    def _complaint(self, worst: float, scale: float, finished: bool, unit: float) -> str:
        if worst > self.tol * scale:
            asked = f"{self.tol:.2g} * {scale * unit:.4g} = {self.tol * scale * unit:.2g}"
            return f"the largest residual is {worst * unit:.2g}, tol asks for {asked}"
        return "" if finished else "the search for missed levels has not come to its end"


def device_of(dtype: mx.Dtype) -> Any:
    """Return the context in which a dtype is computed: MLX has float64 on the CPU alone."""
    return mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device())


def eigenpairs(H: Any, k: int, columns: Any) -> tuple[np.ndarray, np.ndarray]:
    """Make of the first k columns eigenvectors of H in their span, orthonormal.

    Returns:
        Energies, ascending, and the norms of ``H x - E x``, of the states themselves: ``(k,)``
        float64.
    """
    for i in range(k):
        columns.write(k + i, H @ columns.column(i))
    overlaps, elements = (columns.overlaps(k, first, first + k) for first in (0, k))
    inverse = np.linalg.inv(np.linalg.cholesky(overlaps)).conj().T  # makes the states orthonormal
    projected = inverse.conj().T @ elements @ inverse
    energies, vectors = np.linalg.eigh((projected + projected.conj().T) / 2)
    for first in (0, k):
        columns.combine(first, inverse @ vectors)
    return energies, columns.distances(k, energies)


def next_level(H: Scaled, sign: int, basis: Krylov, normals: Normals, max_iter: int) -> float:
    """Return the lowest level of ``sign * H``, times ``sign``, in the complement of a basis.

    It is right to a tenth of its distance to the highest level of the basis, or to 1e-3 of the
    rounding's root.
    """
    k = basis.filled
    highest = (sign * np.diag(basis.projected)[:k]).max()
    basis.extend(normals())
    products = 0
    while True:
        steps, norm = basis.grow(H, 4)
        products += steps
        done = basis.filled - (norm > 0)
        values, vectors = basis.ritz(done, k, sign)
        border = basis.border(norm, done, k) @ vectors
        error, rounding = abs(border[0]), 30 * basis.epsilon * np.abs(values).max()
        if error <= max(0.1 * (values[0] - highest), rounding) or products >= max_iter:
            return sign * (values[0] - error)
        if basis.filled == basis.size < basis.dim:
            count = (values.size + 1) // 2
            basis.restart(sign * values[:count], vectors[:, :count], first=k, border=border[:count])


class _Pace:
    """How many products to take before the host looks at the levels again.

    Attributes:
        steps: Half of what convergence takes if the error goes on to fall as it did, 1 to 8.
    """

    def __init__(self):
        self.steps = 8
        self._last: tuple[int, float] | None = None  # number of products, logarithm of the error

    def update(self, products: int, error: float, goal: float) -> None:
        """Set ``steps`` after ``products`` products in all have led to an error."""
        if error > 0 and math.isfinite(error):
            logarithm, self.steps = math.log(error), 8
            if self._last is not None and logarithm < self._last[1]:
                rate = (self._last[1] - logarithm) / (products - self._last[0])
                left = (logarithm - math.log(goal)) / rate if goal > 0 else 8
                self.steps = int(min(max(left / 2, 1), 8))
            self._last = products, logarithm
