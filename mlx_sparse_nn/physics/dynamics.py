"""Evolution of a state in real and in imaginary time, by Krylov exponentials."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.ground_states import (
    Krylov,
    Normals,
    check_hermitian,
    check_tol,
    check_vector,
    work_dtype,
)
from mlx_sparse_nn.physics.ising import check_memory
from mlx_sparse_nn.physics.observables import check_hamiltonian, sum_halves

_BASIS = 30  # vectors of one step
_GRID = 256  # times at which the error of a step is looked at


def evolve(
    H: Any, psi: mx.array, t: float, *, imaginary: bool = False, tol: float | None = None
) -> mx.array:
    r"""Return :math:`e^{-iHt}\psi`, or in imaginary time the normalised :math:`e^{-Ht}\psi`.

    In units of hbar = 1: ``t`` counts the inverse of the unit of energy. Each step projects H on
    the Krylov space of the state, of 30 vectors at most, and takes the exponential there. The step
    is as long as the error bound allows,

    .. math:: \beta_{m+1} \int_0^\tau |(e^{-iTs})_{m1}|\, ds \le \mathrm{tol}\, \tau / t

    with the projected matrix T and the norm :math:`\beta_{m+1}` of what it leaves out. In real time
    the state keeps its norm exactly but for rounding, which is taken out after each step. The small
    matrix is evaluated at each step, for its exponential on the host: no gradient passes.

    Y. Saad, SIAM J. Numer. Anal. 29 (1992) 209, section 4, for the method and the bound.

    Args:
        H: ``(dim, dim)``, Hermitian, as in :func:`lanczos`.
        psi: ``(dim,)`` amplitudes, real or complex64, of any norm but 0.
        t: Time, of either sign.
        imaginary: Whether to evolve in imaginary time: for ``t > 0`` towards the ground state.
        tol: Error to allow over the whole time, as the norm of the difference to the exact state
            over the norm of the state; 1e-6 by default, or 1e-10 where the result is float64.
            Rounding adds to it, about 1e-7 a product in complex64 and float32.

    Returns:
        ``(dim,)``: in real time complex64, of the norm of ``psi``; in imaginary time of the dtype
        of ``H @ psi`` and norm 1.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``H`` is not square, not Hermitian or not finite, or too large for the memory of
            this machine; ``psi`` has the wrong shape, is zero or is not finite; or ``t`` is not
            finite or ``tol`` not in [1e-14, 1).

    Example:
        >>> psi = evolve(IsingOperator(8, 0.7), mx.ones(256) / 16, 2.0)
        >>> psi.dtype
        mlx.core.complex64
    """
    owner = "evolve"
    dim = check_hamiltonian(owner, H)
    state = check_vector(owner, "psi", psi, dim)
    if isinstance(t, bool) or not isinstance(t, int | float | np.integer | np.floating):
        raise TypeError(f"[{owner}] t must be a number, got {t!r}")
    if not math.isfinite(t):
        raise ValueError(f"[{owner}] t must be finite, got {t}")
    dtype = work_dtype(H, state) if imaginary else mx.complex64
    if tol is None:
        tol = 1e-10 if dtype == mx.float64 else 1e-6
    check_tol(owner, tol, 1e-14)
    size = min(dim, _BASIS + 1)
    check_memory(owner, f"a basis of {size} vectors of {dim}", (size + 8) * dim * dtype.size)

    with mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device()):
        # The check is of H alone, so any fixed seed will do.
        check_hermitian(owner, H, Normals(dim, work_dtype(H, None), seed=0))
        norm = 1.0 if imaginary else _norm(psi)
        state = _unit(state.astype(dtype))
        remaining, total = abs(float(t)), abs(float(t))
        while remaining > 0:
            state, step = _step(H, state, remaining, math.copysign(1, t), imaginary, tol / total)
            remaining -= step
        return state * norm


def _step(
    H: Any, state: mx.array, remaining: float, sign: float, imaginary: bool, rate: float
) -> tuple[mx.array, float]:
    """Evolve a state of norm 1 by at most ``remaining``, with an error of ``rate`` per time.

    Returns:
        The state, of norm 1, and the time it went on by.
    """
    dim = state.size
    basis = Krylov(dim, min(dim, _BASIS + 1), state.dtype)
    w, _, norm = basis.orthogonalise(state)
    basis.append(w, norm)
    done = 0
    while True:
        done += 1
        w, coefficients, norm = basis.multiply(H, done - 1)
        basis.projected[:, done - 1] = coefficients
        invariant = done == dim or norm <= basis.negligible(coefficients)
        values, vectors = np.linalg.eigh(basis.projected[:done, :done])  # reads its lower half
        exponents = -sign * (values - values[0 if sign > 0 else -1]) + 0j
        exponents = exponents if imaginary else -1j * sign * values
        left = 0.0 if invariant else norm
        last = done == basis.size - (dim > _BASIS) or invariant
        step = _longest(exponents, vectors, left, remaining, rate, shrink=last)
        if step or last:
            break
        basis.projected[done, done - 1] = norm
        basis.append(w, norm)
    amplitudes = vectors @ (np.exp(exponents * step) * vectors[0].conj())
    if basis.dtype != mx.complex64:
        amplitudes = amplitudes.real
    return _unit(basis.combine(amplitudes[:, None])[0]), step


def _longest(
    exponents: np.ndarray,
    vectors: np.ndarray,
    left: float,
    remaining: float,
    rate: float,
    shrink: bool,
) -> float:
    """Return the longest step whose error bound is kept: all that remains, or 0 unless ``shrink``.

    Args:
        exponents: ``(m,)``, -i or -1 times the eigenvalues of the projected matrix.
        vectors: ``(m, m)``, its eigenvectors.
        left: Norm of what the projected matrix leaves out.
        remaining: The longest step wanted.
        rate: Error allowed per time.
        shrink: Whether a shorter step will do.
    """
    if left == 0:
        return remaining
    spread = np.abs(exponents[:, None] - exponents).max()
    span = remaining
    resolved = 4 * exponents.size / spread if spread > 0 else remaining  # the grid sees each period
    if span > resolved:
        if not shrink:
            return 0.0
        span = resolved
    while True:
        times = np.linspace(0, span, _GRID + 1)
        powers = np.exp(exponents[:, None] * times)  # (m, times)
        first = vectors[0].conj()[:, None] * powers
        lost = np.abs(vectors[-1] @ first)
        kept = np.linalg.norm(first, axis=0)  # of the state: below 1 in imaginary time
        bound = left * np.concatenate([[0], np.cumsum((lost[1:] + lost[:-1]) / 2)]) * times[1]
        good = np.flatnonzero(bound <= rate * times * kept)[-1]
        if good == _GRID:
            return span
        if not shrink:
            return 0.0
        if good:
            return float(times[good])
        span /= 8


def _norm(psi: mx.array) -> float:
    """Return the norm of a finite state, whose squares may overflow float32."""
    largest = mx.abs(psi).max()
    return float(largest * mx.sqrt(sum_halves(mx.abs(psi / largest).square())))


def _unit(psi: mx.array) -> mx.array:
    psi = psi / mx.sqrt(sum_halves(mx.abs(psi).square()))
    mx.eval(psi)  # what it was made of can go
    return psi
