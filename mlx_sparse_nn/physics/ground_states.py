"""The lowest eigenvalues and eigenvectors of a Hamiltonian, by Lanczos' method."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_seed, check_size
from mlx_sparse_nn.physics.checks import (
    check_basis_memory,
    check_hamiltonian,
    check_hermitian,
    check_state,
    check_tol,
)
from mlx_sparse_nn.physics.krylov import Krylov, Normals, scaled
from mlx_sparse_nn.physics.host_columns import HostColumns
from mlx_sparse_nn.physics.precision import epsilon, work_dtype
from mlx_sparse_nn.physics.units import Scaled

_MIN_BASIS = 20  # columns, and two for each level
_SURE = 0.01  # of the distance to a level above: see _solve


@dataclass(frozen=True)
class LanczosResult:
    """What :func:`lanczos` found.

    Attributes:
        energies: ``(k,)`` Rayleigh quotients of the states, in ascending order.
        states: ``(dim, k)`` orthonormal columns.
        residuals: ``(k,)`` norms of ``H x - E x``, computed from the states themselves. H has an
            eigenvalue within that distance of E.
        iterations: Number of products with H, without those that check the result.
        converged: Whether every residual is at most ``tol`` times the largest energy found.
    """

    energies: mx.array
    states: mx.array
    residuals: mx.array
    iterations: int
    converged: bool


def lanczos(
    H: Any,
    k: int = 1,
    *,
    v0: mx.array | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    seed: int = 0,
) -> LanczosResult:
    r"""Return the ``k`` lowest eigenvalues and eigenvectors of a Hermitian matrix.

    Band Lanczos with full reorthogonalisation and thick restarts. The Krylov space grows from ``k``
    vectors, so an eigenvalue of multiplicity up to ``k`` is found as often as it occurs. When the
    basis is full, the half of its Ritz vectors with the lowest values is kept: memory is that of
    ``max(32, 4 k) + k`` vectors, however many products it takes. Every step evaluates its
    coefficients: to know when to stop, the host diagonalises the small projected matrix in float64.

    A. Ruhe, Mathematics of Computation 33 (1979) 680, for the band.
    K. Wu and H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602, for the restart.

    Args:
        H: ``(dim, dim)``, Hermitian: a CSRArray, an IsingOperator, or any object with ``shape``
            whose ``H @ x`` is an MLX array. It is applied to ``(dim,)`` vectors.
        k: Number of eigenpairs, 1 to dim. With ``k=1``, a degenerate ground level gives one of its
            states.
        v0: ``(dim,)`` start vector, random by default. With ``k=1``, only states that share its
            symmetry are found.
        tol: Residual to reach, relative to the largest energy found; 1e-5 by default, or 1e-9 in
            float64. The error of an energy is of the order of the residual squared over the gap.
        max_iter: Most products with H, at least ``k``; 1000 by default.
        seed: Seed of the random vectors.

    Returns:
        Energies, states and residuals. The dtypes of H and ``v0`` decide whether states are
        float32, complex64 or float64. If ``max_iter`` products do not reach ``tol``, or rounding
        prevents it, ``converged`` is False and a ``RuntimeWarning`` says so.

    Raises:
        TypeError: ``H`` is not such an object, or an argument is of the wrong type.
        ValueError: ``H`` is not square, not Hermitian or not finite, or too large for the memory of
            this machine; ``v0`` has the wrong shape, is zero or is not finite; or a number is out
            of range.

    Example:
        >>> result = lanczos(IsingOperator(8, 0.7), k=2)
        >>> result.energies
        array([-8.30561, -8.24608], dtype=float32)
    """
    owner = "lanczos"
    dim = check_hamiltonian(owner, H)
    k = check_size(owner, "k", k, minimum=1)
    if k > dim:
        raise ValueError(f"[{owner}] k must be in [1, {dim}], the dimension of H, got {k}")
    max_iter = 1000 if max_iter is None else check_size(owner, "max_iter", max_iter, minimum=1)
    if max_iter < k:
        raise ValueError(f"[{owner}] max_iter must be at least k = {k}, got {max_iter}")
    seed = check_seed(owner, seed)
    if v0 is not None:
        v0 = scaled(check_state(owner, "v0", v0, dim))
    dtype = work_dtype(H, v0)
    if tol is None:
        tol = 1e-9 if dtype == mx.float64 else 1e-5
    tol = check_tol(owner, tol)
    size = min(dim, _MIN_BASIS + 2 * k)
    sign = 1
    check_basis_memory(owner, size, dim, dtype)

    with mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device()):
        normals = Normals(dim, dtype, seed)
        H = check_hermitian(owner, H, normals)
        basis = Krylov(dim, size, dtype, room=2 * k)
        start = normals() if v0 is None else v0
        found = _solve(H, k, sign, start, tol, max_iter, basis, normals)
        return _result(H, k, sign, tol, found, basis.columns)


def _solve(
    H: Any,
    k: int,
    sign: int,
    start: mx.array,
    tol: float,
    max_iter: int,
    basis: Krylov,
    normals: Normals,
) -> tuple[int, float, bool]:
    """Leave the lowest k Ritz vectors of ``sign * H`` in the first columns of the basis.

    A Krylov space of one vector has each level once. So when k levels have converged they are kept,
    and another space grows from a random vector in their complement: if it has a level below the
    highest of the k, that was missed, and takes the place of the highest; and so on.

    Returns:
        The number of products, the largest energy found, and whether nothing is left to be done.
    """
    basis.extend(start)
    kept = kept_errors = np.zeros(0)  # levels of former spaces, in the first columns
    products, scale, pace = 0, 0.0, _Pace()
    while True:
        steps, norm = basis.grow(H, min(pace.steps, max_iter - products))
        products += steps
        first, done = kept.size, basis.filled - (norm > 0)
        values, vectors = basis.ritz(done, first, sign)
        border = basis.projected[done, first:done] @ vectors if norm > 0 else np.zeros(values.size)
        scale = max(scale, float(np.abs(values).max()))

        levels = np.concatenate([kept, values])
        errors = np.concatenate([kept_errors, np.abs(border)])
        lowest = np.argsort(levels, kind="stable")[:k]
        worst = errors[lowest].max() if lowest.size == k else math.inf
        goal = 0.5 * tol * scale
        finished = done == basis.dim or (k == 1 and worst <= goal)
        if first == k:
            above = values[0] - kept.max() + 30 * epsilon(basis.dtype) * scale
            if above >= 0:  # as it seems, no level is missing
                worst, goal = errors[k], max(goal, _SURE * above)
                finished = finished or worst <= goal
        if finished or products == max_iter or worst <= goal or norm == 0:
            combinations = np.eye(done)
            combinations[first:, first:] = vectors
            kept, kept_errors = levels[lowest], errors[lowest]
            basis.restart(sign * kept, combinations[:, lowest], left_out=kept_errors)
            if finished or products == max_iter:
                return products, scale, finished
            basis.extend(normals())
            pace = _Pace()
            continue
        pace.update(products, worst, goal)
        if basis.filled == basis.size < basis.dim:
            count = (values.size + max(1, k - first)) // 2
            basis.restart(
                sign * values[:count], vectors[:, :count], first=first, border=border[:count]
            )


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


def _result(
    H: Scaled, k: int, sign: int, tol: float, found: tuple[int, float, bool], columns: HostColumns
) -> LanczosResult:
    """Rotate k states to eigenvectors of H in their span, measure them, and warn if they are bad.

    ``found`` is what :func:`_solve` returned.
    """
    products, scale, finished = found
    for i in range(k):
        columns.write(k + i, H @ columns.column(i))
    overlaps, elements = (columns.overlaps(k, first, first + k) for first in (0, k))
    inverse = np.linalg.inv(np.linalg.cholesky(overlaps)).conj().T  # makes the states orthonormal
    projected = inverse.conj().T @ elements @ inverse
    energies, vectors = np.linalg.eigh((projected + projected.conj().T) / 2)
    for first in (0, k):
        columns.combine(first, inverse @ vectors)
    residuals = columns.distances(k, energies)
    worst = float(residuals.max())
    converged = bool(finished and worst <= tol * scale)
    if not converged:
        unit = 2.0**H.exponent
        reason = (
            f"the largest residual is {worst * unit:.2g}, tol asks for {tol:.2g} * "
            f"{scale * unit:.4g} = {tol * scale * unit:.2g}"
            if worst > tol * scale
            else "a level of several states may be missing some"
        )
        warnings.warn(
            f"[lanczos] not converged after {products} products: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    real = mx.float64 if columns.dtype == mx.float64 else mx.float32
    energies, residuals = (H.to_own(mx.array(a, dtype=real)) for a in (energies, residuals))
    return LanczosResult(energies, columns.columns(k), residuals, products, converged)
