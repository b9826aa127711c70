"""Evolution of a state in real and in imaginary time, by Krylov exponentials."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.checks import (
    check_basis_memory,
    check_hamiltonian,
    check_hermitian,
    check_state,
    check_time,
    check_tol,
)
from mlx_sparse_nn.physics.krylov import Krylov, Normals, scaled
from mlx_sparse_nn.physics.precision import pairwise_sum, work_dtype

_MAX_PRODUCTS = 30  # with H, in one step
_GRID = 256  # intervals on which the error of a step is integrated


def evolve(
    H: Any, psi: mx.array, t: float, *, imaginary: bool = False, tol: float | None = None
) -> mx.array:
    r"""Return :math:`e^{-iHt}\psi`, or in imaginary time the normalised :math:`e^{-Ht}\psi`.

    With hbar = 1, ``t`` is in inverse units of energy. Each step projects H on the Krylov space of
    the state, of at most 30 vectors, and takes the exponential there. It is as long as the error
    bound allows,

    .. math:: \beta_{m+1} \int_0^\tau |(e^{-iTs})_{m1}|\, ds \le \mathrm{tol}\, \tau / t

    with the projected matrix T and the norm :math:`\beta_{m+1}` of what T leaves out. Evolution in
    real time keeps the norm; each step rescales the state, to remove rounding. Every step evaluates
    the small matrix and takes its exponential on the host, so no gradient passes.

    Y. Saad, SIAM J. Numer. Anal. 29 (1992) 209, section 4, for the method and the bound.

    Args:
        H: ``(dim, dim)``, Hermitian, as in :func:`lanczos`.
        psi: ``(dim,)`` amplitudes, real or complex64, of any norm but 0.
        t: Time, positive or negative.
        imaginary: Whether to evolve in imaginary time, towards the ground state if ``t > 0``.
        tol: Error allowed over the whole time: the norm of the difference from the exact state,
            over the norm of the state. 1e-6 by default, or 1e-10 if the result is float64. Rounding
            adds about 1e-7 a product in complex64 and float32.

    Returns:
        ``(dim,)``: in real time complex64, with the norm of ``psi``; in imaginary time of the dtype
        of ``H @ psi``, with norm 1.

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
    state = scaled(check_state(owner, "psi", psi, dim))
    t = check_time(owner, t)
    dtype = work_dtype(H, state) if imaginary else mx.complex64
    if tol is None:
        tol = 1e-10 if dtype == mx.float64 else 1e-6
    tol = check_tol(owner, tol, 1e-14)
    check_basis_memory(owner, min(dim, _MAX_PRODUCTS + 1), dim, dtype)

    with mx.stream(mx.cpu if dtype == mx.float64 else mx.default_device()):
        # Only H is checked, so any fixed seed will do.
        check_hermitian(owner, H, Normals(dim, work_dtype(H), seed=0))
        norm = 1.0 if imaginary else _norm(psi)
        state = _normalised(state.astype(dtype))
        remaining = total = abs(t)
        while remaining > 0:
            state, step = _step(H, state, remaining, math.copysign(1, t), imaginary, tol / total)
            remaining -= step
        return state * norm


def _step(
    H: Any, state: mx.array, remaining: float, sign: float, imaginary: bool, rate: float
) -> tuple[mx.array, float]:
    """Evolve a state of norm 1 by at most ``remaining``, with an error of ``rate`` per time.

    The basis grows until the whole time is within the error bound. When it is full, the step is
    shorter instead.

    Returns:
        The state, of norm 1, and the length of the step.
    """
    dim = state.size
    basis = Krylov(dim, min(dim, _MAX_PRODUCTS + 1), state.dtype)
    basis.extend(state)
    done = 0  # columns multiplied by H so far
    while True:
        norm = basis.multiply(H)
        done += 1
        left_out = 0.0 if done == dim else norm
        values, vectors = basis.ritz(done)
        if imaginary:  # relative to the value that grows fastest, so that nothing overflows
            exponents = -sign * (values - values[0 if sign > 0 else -1]) + 0j
        else:
            exponents = -1j * sign * values
        last = done == min(dim, _MAX_PRODUCTS) or left_out == 0
        step = _longest_step(exponents, vectors, left_out, remaining, rate, may_shorten=last)
        if step or last:
            break
        basis.append(norm)
    amplitudes = vectors @ (np.exp(exponents * step) * vectors[0].conj())
    if basis.dtype != mx.complex64:
        amplitudes = amplitudes.real
    return _normalised(basis.combine(amplitudes[:, None])[0]), step


def _longest_step(
    exponents: np.ndarray,
    vectors: np.ndarray,
    left_out: float,
    remaining: float,
    rate: float,
    may_shorten: bool,
) -> float:
    """Return the longest step within the error bound, or 0 if it may not be that short.

    Args:
        exponents: ``(m,)``, -i or -1 times the eigenvalues of the projected matrix.
        vectors: ``(m, m)``, its eigenvectors.
        left_out: Norm of what the projected matrix leaves out.
        remaining: The longest step wanted.
        rate: Error allowed per unit of time.
        may_shorten: Whether a shorter step than ``remaining`` will do.
    """
    if left_out == 0:
        return remaining
    spread = np.abs(exponents[:, None] - exponents).max()
    span = remaining
    resolved = 4 * exponents.size / spread if spread > 0 else remaining  # the grid sees each period
    if span > resolved:
        if not may_shorten:
            return 0.0
        span = resolved
    while True:
        times = np.linspace(0, span, _GRID + 1)
        powers = np.exp(exponents[:, None] * times)  # (m, times)
        first = vectors[0].conj()[:, None] * powers
        lost = np.abs(vectors[-1] @ first)  # |exp(T s)_{m1}|
        norms = np.linalg.norm(first, axis=0)  # of the state: below 1 in imaginary time
        integral = np.concatenate([[0], np.cumsum((lost[1:] + lost[:-1]) / 2)])
        bound = left_out * integral * times[1]
        longest = np.flatnonzero(bound <= rate * times * norms)[-1]  # index of a time
        if longest == _GRID:
            return span
        if not may_shorten:
            return 0.0
        if longest:
            return float(times[longest])
        span /= 8


def _norm(psi: mx.array) -> float:
    """Return the norm of a finite state, whose squares may overflow float32."""
    largest = mx.abs(psi).max()
    return float(largest * mx.sqrt(pairwise_sum(mx.abs(psi / largest).square())))


def _normalised(psi: mx.array) -> mx.array:
    """Return a state over its norm, evaluated."""
    psi = psi / mx.sqrt(pairwise_sum(mx.abs(psi).square()))
    mx.eval(psi)  # frees what it was made of
    return psi
