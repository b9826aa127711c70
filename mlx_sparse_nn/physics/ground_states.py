"""The lowest eigenvalues and eigenvectors of a Hamiltonian, by Lanczos' method."""

from __future__ import annotations

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
from mlx_sparse_nn.physics.precision import pairwise_sum, work_dtype

_MIN_BASIS = 32  # columns before a restart, at least, beyond the k that wait for their product


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
    size = min(dim, max(_MIN_BASIS, 4 * k) + k)
    check_basis_memory(owner, size, dim, dtype)

    with mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device()):
        normals = Normals(dim, dtype, seed)
        check_hermitian(owner, H, normals)
        return _solve(H, k, v0, tol, max_iter, Krylov(dim, size, dtype), normals)


def _solve(
    H: Any,
    k: int,
    v0: mx.array | None,
    tol: float,
    max_iter: int,
    basis: Krylov,
    normals: Normals,
) -> LanczosResult:
    """Grow the basis from ``k`` vectors until ``k`` Ritz pairs are good enough.

    What a product adds to the basis becomes its next column: ``k`` columns wait for their product.
    """
    for start in range(k):
        basis.extend(normals() if start or v0 is None else v0.astype(basis.dtype))
    done = iterations = 0  # columns multiplied by H so far; products
    while True:
        rest, norm = basis.multiply(H, done)
        iterations += 1
        if basis.filled < basis.dim:
            if norm > 0:
                basis.projected[basis.filled, done] = norm
                basis.append(rest, norm)
            else:  # the space is invariant: go on in a new direction, to find its other copies
                basis.extend(normals())
        done += 1
        values, vectors = basis.ritz(done)
        border = basis.projected[done : basis.filled, :done]
        estimates = np.linalg.norm(border @ vectors[:, :k], axis=0)
        scale = float(np.abs(values).max())
        reached = done >= k and (estimates <= 0.5 * tol * scale).all()
        if reached or iterations >= max_iter or done == basis.dim:
            break
        if basis.filled == basis.size < basis.dim:
            kept = (done + k) // 2
            basis.restart(values[:kept], vectors[:, :kept])
            done = kept

    return _result(H, basis.combine(vectors[:, :k]), tol, scale, iterations)


def _result(
    H: Any, states: list[mx.array], tol: float, scale: float, iterations: int
) -> LanczosResult:
    """Measure the energies and residuals of the states, and warn if they are not good enough."""
    energies, residuals = [], []
    for x in states:
        product = H @ x
        norm = pairwise_sum(mx.abs(x).square())
        energy = pairwise_sum(mx.real(mx.conjugate(x) * product)) / norm
        error = pairwise_sum(mx.abs(product - energy * x).square()) / norm
        mx.eval(energy, error)  # one product at a time in memory
        energies.append(energy)
        residuals.append(mx.sqrt(error))
    order = np.argsort([float(energy) for energy in energies], kind="stable")
    energies, residuals, states = ([a[i] for i in order] for a in (energies, residuals, states))
    worst = max(float(residual) for residual in residuals)
    converged = bool(worst <= tol * scale)
    if not converged:
        warnings.warn(
            f"[lanczos] not converged after {iterations} products: the largest residual is "
            f"{worst:.2g}, tol asks for {tol:.2g} * {scale:.4g} = {tol * scale:.2g}",
            RuntimeWarning,
            stacklevel=4,
        )
    return LanczosResult(
        mx.stack(energies), mx.stack(states, axis=1), mx.stack(residuals), iterations, converged
    )
