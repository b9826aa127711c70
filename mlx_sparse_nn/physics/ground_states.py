"""The lowest or highest eigenvalues and eigenvectors of a Hamiltonian, by Lanczos' method."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core.checks import check_seed, check_size
from mlx_sparse_nn.core.transforms import transforming
from mlx_sparse_nn.physics.checks import check_hamiltonian, check_state, check_tol
from mlx_sparse_nn.physics.level_rules import traced_levels
from mlx_sparse_nn.physics.levels import Search
from mlx_sparse_nn.physics.precision import work_dtype


@dataclass(frozen=True)
class LanczosResult:
    """What :func:`lanczos` found: ``energies, states = lanczos(H, k)``, and more by name.

    Attributes:
        energies: ``(k,)`` eigenvalues of H in the span of the states, in ascending order.
        states: ``(dim, k)`` orthonormal columns.
        residuals: ``(k,)`` norms of ``H x - E x``, computed from the states themselves. H has an
            eigenvalue within that distance of E.
        iterations: Number of products with H, without those that check H and the result.
        converged: Whether every residual is at most ``tol`` times the largest energy found, and the
            search for missed levels has come to its end.
    """

    energies: mx.array
    states: mx.array
    residuals: mx.array
    iterations: int
    converged: bool

    def __iter__(self) -> Iterator[mx.array]:
        """Give the energies and the states, as ``scipy.sparse.linalg.eigsh`` does."""
        return iter((self.energies, self.states))


def lanczos(
    H: Any,
    k: int = 1,
    *,
    which: str = "smallest",
    v0: mx.array | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    seed: int = 0,
) -> LanczosResult:
    r"""Return the ``k`` lowest eigenvalues and eigenvectors of a Hermitian matrix, or the highest.

    Lanczos' method with thick restarts: when the basis of ``20 + 2 k`` vectors is full, the lowest
    ``k`` of its Ritz vectors and a quarter of the others are kept. The vectors are orthogonalised
    against one another only where rounding would make the result wrong.

    With ``k > 1``, an eigenvalue is found as often as it occurs. The space of one vector has each
    once; so, when ``k`` have converged, another one grows from a random vector that is orthogonal
    to their states. If it has a lower one, that takes the place of the highest, and so on. The last
    search ends when the residual of its own lowest eigenvalue is 1/100 of the distance to the ``k``
    ones, or ``tol / 20`` where they are equal. A level is missed only if the random vector has less
    than 1/100 of what it has on average of that level, in below 1% of cases.

    Energies may be in any unit: H is scaled by a power of two before anything is squared. Memory is
    that of ``35 + 5 k`` vectors, or ``40 + 5 k`` on a GPU, with that of the product, however many
    products it takes. On a GPU it is more where a vector has at most 2^18 elements.

    Under mx.grad and mx.jvp, energies and states have the derivatives of perturbation theory, by
    what H depends on: ``H.data``, a dense ``H``, J, h and g, or the coefficients of a sum. Those of
    energies can be derived again. A state has one only where its energy is further from all others
    than 1000 roundings of the largest, 1e-4 of it in float32; that of a complex one, whose phase is
    arbitrary, is orthogonal to it. Forward, a state without one gets nan, and so do residuals.

    C. Lanczos, J. Res. Natl. Bur. Stand. 45 (1950) 255.
    K. Wu and H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602, for the restart.
    H. Simon, Mathematics of Computation 42 (1984) 115, for the orthogonalisation.

    Args:
        H: ``(dim, dim)``, Hermitian: a CSRArray, an IsingOperator, or any object with ``shape``
            whose ``H @ x`` is an MLX array. It is applied to ``(dim,)`` vectors.
        k: Number of eigenpairs, 1 to dim. With ``k=1``, a degenerate level gives one of its states.
        which: ``"smallest"`` or ``"largest"`` eigenvalues.
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
            this machine; ``v0`` has the wrong shape, is zero or is not finite; a number is out of
            range; or a derivative is asked for that there is not: of residuals, of a state of a
            degenerate level, or by an object that only gives products. mx.vmap and mx.compile of
            ``H`` or ``v0`` are refused too.

    Example:
        >>> energies, states = lanczos(IsingOperator(8, 0.7), k=2)
        >>> [round(energy, 4) for energy in energies.tolist()]
        [-8.3056, -8.2461]
    """
    owner = "lanczos"
    dim = check_hamiltonian(owner, H)
    k = check_size(owner, "k", k, minimum=1)
    if k > dim:
        raise ValueError(f"[{owner}] k must be in [1, {dim}], the dimension of H, got {k}")
    if which not in ("smallest", "largest"):
        raise ValueError(f"[{owner}] which must be 'smallest' or 'largest', got {which!r}")
    max_iter = 1000 if max_iter is None else check_size(owner, "max_iter", max_iter, minimum=1)
    if max_iter < k:
        raise ValueError(f"[{owner}] max_iter must be at least k = {k}, got {max_iter}")
    seed = check_seed(owner, seed)
    if v0 is not None:
        v0 = check_state(owner, "v0", v0, dim)
    dtype = work_dtype(H, v0)
    if tol is None:
        tol = 1e-9 if dtype == mx.float64 else 1e-5
    sign = 1 if which == "smallest" else -1
    search = Search(owner, k, sign, check_tol(owner, tol), max_iter, seed)
    levels = traced_levels(search, H, v0) if transforming() else search.run(H, v0)
    if levels.complaint:
        warnings.warn(
            f"[{owner}] not converged after {levels.products} products: {levels.complaint}",
            RuntimeWarning,
            stacklevel=2,
        )
    return LanczosResult(
        levels.energies, levels.states, levels.residuals, levels.products, not levels.complaint
    )
