"""The lowest eigenvalues and eigenvectors of a Hamiltonian, by Lanczos' method."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_seed, check_size
from mlx_sparse_nn.physics.ising import check_memory
from mlx_sparse_nn.physics.observables import check_hamiltonian, check_state, sum_halves

_PANEL = 256  # elements that one product may add one after another
_BASIS = 32  # columns kept at least, beyond the k that wait for their product


@dataclass(frozen=True)
class LanczosResult:
    """What :func:`lanczos` found.

    Attributes:
        energies: ``(k,)`` Rayleigh quotients of the states, rising.
        states: ``(dim, k)`` orthonormal columns.
        residuals: ``(k,)`` norms of ``H x - E x``, computed from the states themselves. Within
            that distance of E there is an eigenvalue.
        iterations: Number of products with H, those that check the result not counted.
        converged: Whether all residuals are at most ``tol`` times the largest energy found.
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
    vectors, so that an eigenvalue of multiplicity up to ``k`` is found as often as it occurs. When
    the basis is full, the lower half of its Ritz vectors is kept: memory is that of ``max(32, 4 k)
    + k`` vectors, however many products it takes. Coefficients are evaluated at each step, since
    the small projected matrix is diagonalised on the host, in float64, to know when to stop.

    A. Ruhe, Mathematics of Computation 33 (1979) 680, for the band.
    K. Wu and H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000) 602, for the restart.

    Args:
        H: ``(dim, dim)``, Hermitian: a CSRArray, an IsingOperator, or any object with ``shape``
            whose ``H @ x`` is an MLX array. It is applied to ``(dim,)`` vectors.
        k: Number of eigenpairs, 1 to dim. With ``k=1`` one of the states of a degenerate ground
            level is returned.
        v0: ``(dim,)`` start vector, random by default. If ``k`` is 1, states of other symmetry than
            its own are not found.
        tol: Residual to reach, relative to the largest energy found; 1e-5 by default, or 1e-9 in
            float64. The error of an energy is of the order of the residual squared over the gap.
        max_iter: Most products with H, at least ``k``; 1000 by default.
        seed: Of the random vectors.

    Returns:
        Energies, states and residuals, in float32, complex64 or float64 by the dtypes of H and
        ``v0``. If the residuals are not reached in ``max_iter`` products or cannot be for rounding,
        ``converged`` is False and a ``RuntimeWarning`` says so.

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
        v0 = check_vector(owner, "v0", v0, dim)
    dtype = work_dtype(H, v0)
    if tol is None:
        tol = 1e-9 if dtype == mx.float64 else 1e-5
    check_tol(owner, tol)
    size = min(dim, max(_BASIS, 4 * k) + k)
    check_memory(owner, f"a basis of {size} vectors of {dim}", (size + 8) * dim * dtype.size)

    with mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device()):
        normals = Normals(dim, dtype, seed)
        check_hermitian(owner, H, normals)
        return _solve(H, k, v0, float(tol), max_iter, Krylov(dim, size, dtype), normals)


def _solve(
    H: Any,
    k: int,
    v0: mx.array | None,
    tol: float,
    max_iter: int,
    basis: Krylov,
    normals: Normals,
) -> LanczosResult:
    size, dim = basis.size, basis.dim
    for start in range(k):
        w, _, norm = basis.orthogonalise(
            normals() if start or v0 is None else v0.astype(basis.dtype)
        )
        basis.append(w, norm)
    done = iterations = 0  # columns multiplied by H so far; products
    while True:
        w, coefficients, norm = basis.multiply(H, done)
        iterations += 1
        basis.projected[:, done] = coefficients
        if basis.filled < dim:
            if norm > basis.negligible(coefficients):
                basis.projected[basis.filled, done] = norm
            else:  # the space is invariant: go on in a new direction, to find its other copies
                w, _, norm = basis.orthogonalise(normals())
            basis.append(w, norm)
        done += 1
        filled = basis.filled
        values, vectors = np.linalg.eigh(basis.projected[:done, :done])  # reads its lower half
        estimates = np.linalg.norm(basis.projected[done:filled, :done] @ vectors[:, :k], axis=0)
        scale = float(np.abs(values).max())
        reached = done >= k and (estimates <= 0.5 * tol * scale).all()
        if reached or iterations >= max_iter or done == dim:
            break
        if filled == size < dim:
            kept = (done + k) // 2
            basis.restart(values[:kept], vectors[:, :kept])
            done = kept

    return _result(H, basis.combine(vectors[:, :k]), tol, scale, iterations)


def _result(
    H: Any, states: list[mx.array], tol: float, scale: float, iterations: int
) -> LanczosResult:
    """Measure the states and say how good they are."""
    energies, residuals = [], []
    for x in states:
        product = H @ x
        norm = sum_halves(mx.abs(x).square())
        energy = sum_halves(mx.real(mx.conjugate(x) * product)) / norm
        error = sum_halves(mx.abs(product - energy * x).square()) / norm
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


class Krylov:
    """An orthonormal basis that grows by products with H, and H projected on it.

    The vectors are held as ``(panels, size, width)``, a vector cut into panels, so that a product
    with all of them is a batch of small ones: each adds few terms one after another, and the batch
    is added in halves. Columns not filled yet are zero, so that shapes never change.

    Args:
        dim: Length of the vectors.
        size: Most columns.
        dtype: float32, float64 or complex64.
    """

    def __init__(self, dim: int, size: int, dtype: mx.Dtype):
        self.dim, self.size, self.dtype = dim, size, dtype
        self.width = min(dim, _PANEL)
        self.filled = 0
        self.vectors = mx.zeros((-(-dim // self.width), size, self.width), dtype)
        host = np.complex128 if dtype == mx.complex64 else np.float64
        self.projected = np.zeros((size, size), host)
        # A GPU may round the factors of a float32 matmul to 10 bits (TF32), but not these products.
        self._by_matmul = mx.default_device().type == mx.cpu or dtype == mx.float64

    def orthogonalise(self, w: mx.array) -> tuple[mx.array, np.ndarray, float]:
        """Subtract from ``(dim,)`` its part in the basis.

        Returns:
            The rest, ``(panels, 1, width)``, the coefficients, ``(size,)``, and the rest's norm.
        """
        length = self.vectors.shape[0] * self.width
        w = mx.pad(w, (0, length - self.dim)).reshape(-1, 1, self.width)
        total = mx.zeros(self.size, self.dtype)
        for _ in range(2):  # "twice is enough": once leaves what rounding adds
            if self._by_matmul:
                parts = mx.conjugate(w) @ self.vectors.swapaxes(1, 2)
                c = mx.conjugate(sum_halves(parts)).reshape(-1)
                w = w - c[None] @ self.vectors
            else:
                c = sum_halves((mx.conjugate(self.vectors) * w).sum(axis=2))
                w = w - (c[:, None] * self.vectors).sum(axis=1, keepdims=True)
            total = total + c
        norm = mx.sqrt(sum_halves(mx.abs(w).square().sum(axis=(1, 2))))
        mx.eval(w, total, norm)
        return w, np.array(total), float(norm)

    def append(self, w: mx.array, norm: float) -> None:
        """Take ``w``, from :meth:`orthogonalise`, of that norm, as the next column."""
        self.vectors[:, self.filled : self.filled + 1] = w * (1 / norm)
        self.filled += 1

    def multiply(self, H: Any, column: int) -> tuple[mx.array, np.ndarray, float]:
        """Return what :meth:`orthogonalise` makes of ``H`` times a column."""
        x = self.vectors[:, column].reshape(-1)[: self.dim]
        return self.orthogonalise((H @ x).astype(self.dtype))

    def negligible(self, coefficients: np.ndarray) -> float:
        """Return the norm below which the rest of a product is rounding."""
        eps = 2.0**-52 if self.dtype == mx.float64 else 2.0**-23
        return 30 * eps * float(max(np.linalg.norm(coefficients), np.abs(self.projected).max()))

    def combine(self, coefficients: np.ndarray) -> list[mx.array]:
        """Return p combinations of the first m columns, ``(dim,)``; coefficients ``(m, p)``."""
        return [self._combination(c).reshape(-1)[: self.dim] for c in coefficients.T]

    def restart(self, values: np.ndarray, vectors: np.ndarray) -> None:
        """Keep some Ritz vectors, ``(done, kept)``, and the columns not multiplied by H yet."""
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
        row = mx.array(np.pad(c, (0, self.size - c.size)), dtype=self.dtype)
        if self._by_matmul:
            return row[None] @ self.vectors
        return (row[:, None] * self.vectors).sum(axis=1, keepdims=True)


class Normals:
    """Normal vectors of ``(dim,)``, a new one at each call."""

    def __init__(self, dim: int, dtype: mx.Dtype, seed: int):
        self.dim, self.dtype, self.key = dim, dtype, mx.random.key(seed)

    def __call__(self) -> mx.array:
        self.key, *keys = mx.random.split(self.key, 3)
        real, imaginary = (mx.random.normal((self.dim,), key=key) for key in keys)
        if self.dtype == mx.complex64:
            return real + imaginary * mx.array(1j)
        return real.astype(self.dtype)


def check_hermitian(owner: str, H: Any, normals: Any) -> None:
    """Raise unless ``<u|H v> = <H u|v>`` for two random vectors, to rounding."""
    u, v = normals(), normals()
    Hu, Hv = H @ u, H @ v
    for product in (Hu, Hv):
        if not isinstance(product, mx.array):
            raise TypeError(f"[{owner}] H @ x must be an mx.array, got {type(product).__name__}")
        if product.shape != u.shape:
            raise ValueError(f"[{owner}] H @ x has shape {product.shape}, x has {u.shape}")
    difference = mx.abs(sum_halves(mx.conjugate(u) * Hv) - sum_halves(mx.conjugate(Hu) * v))
    norms = [mx.sqrt(sum_halves(mx.abs(a).square())) for a in (u, Hv)]
    difference, *norms = (float(a) for a in (difference, *norms))
    if not np.isfinite([difference, *norms]).all():
        raise ValueError(f"[{owner}] H @ x is not finite")
    eps = 2.0**-52 if Hv.dtype == mx.float64 else 2.0**-23
    if difference > 100 * eps * norms[0] * norms[1]:
        raise ValueError(
            f"[{owner}] H is not Hermitian: <u|Hv> and <Hu|v> differ by {difference:.3g} "
            "for random u and v"
        )


def check_vector(owner: str, name: str, v: mx.array, dim: int) -> mx.array:
    """Return a state of ``(dim,)`` that is finite and not zero, or raise."""
    if isinstance(v, mx.array) and v.shape != (dim,):
        raise ValueError(f"[{owner}] {name} has shape {v.shape}, expected ({dim},)")
    v = check_state(owner, name, v, dim)
    return v / float(mx.abs(v).max())  # whose square cannot overflow


def check_tol(owner: str, tol: float, minimum: float = 0.0) -> None:
    """Raise unless ``tol`` is a positive number in [minimum, 1)."""
    if isinstance(tol, bool) or not isinstance(tol, int | float | np.floating):
        raise TypeError(f"[{owner}] tol must be a number, got {tol!r}")
    if not (minimum <= tol < 1 and tol > 0):
        interval = f"[{minimum:g}, 1)" if minimum else "(0, 1)"
        raise ValueError(f"[{owner}] tol must be in {interval}, got {tol}")


def work_dtype(H: Any, v: mx.array | None) -> mx.Dtype:
    """Return the dtype of ``H @ v``, at least float32."""
    dtype = getattr(H, "dtype", mx.float32)
    if not isinstance(dtype, mx.Dtype):
        dtype = mx.float32
    operands = [mx.zeros(0, dtype)] + ([] if v is None else [v])
    return mx.result_type(*operands, mx.float32)
