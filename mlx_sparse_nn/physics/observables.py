"""Observables of a state: energy, magnetisation, correlation, entanglement and fidelity.

A state that is zero or not finite raises. A transform, such as mx.grad or mx.compile, traces states
whose numbers are not known yet: there, everything stays lazy and such a state gives nan.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sparse_nn.physics.checks import (
    check_axis,
    check_hamiltonian,
    check_index,
    check_state,
    check_state_of_sites,
)
from mlx_sparse_nn.physics.precision import pairwise_sum

_TINY = 1e-300  # replaces smaller eigenvalues, so that the logarithm of 0 is finite


def expectation(H: Any, psi: mx.array) -> mx.array:
    r"""Return the energy :math:`\langle\psi|H|\psi\rangle / \langle\psi|\psi\rangle` of a state.

    Differentiable in ``psi`` and in the parameters of H: ``H.data``, or J, h and g.

    Args:
        H: ``(n, n)``, Hermitian: a CSRArray, an IsingOperator, or any object with ``shape`` whose
            ``H @ psi`` is an MLX array. Any other matrix gives the real part.
        psi: ``(n,)`` amplitudes, real or complex64, of any norm but 0.

    Returns:
        A real scalar: float64 if ``H`` or ``psi`` is, else float32.

    Raises:
        TypeError: ``H`` is not such an object, or ``psi`` is not an array.
        ValueError: ``H`` is not square, or ``psi`` does not have shape ``(n,)``, is empty, zero or
            not finite.
    """
    psi = check_state("expectation", "psi", psi, check_hamiltonian("expectation", H))
    bra = _conj(psi)
    return pairwise_sum(mx.real(bra * (H @ psi))) / pairwise_sum(mx.real(bra * psi))


def variance(H: Any, psi: mx.array) -> mx.array:
    r"""Return :math:`\langle H^2\rangle - \langle H\rangle^2`, which is 0 in an eigenstate.

    It is computed as :math:`\|(H - E)\psi\|^2 / \|\psi\|^2` with :math:`E = \langle H\rangle`:
    the difference would cancel, and could be negative. Differentiable in the same arguments as
    :func:`expectation`.

    Args:
        H: ``(n, n)``, Hermitian, as in :func:`expectation`.
        psi: ``(n,)`` amplitudes, real or complex64, of any norm but 0.

    Returns:
        A real scalar in units of energy squared.

    Raises:
        TypeError, ValueError: As in :func:`expectation`.
    """
    psi = check_state("variance", "psi", psi, check_hamiltonian("variance", H))
    product, weight = H @ psi, _weights(psi)
    norm = pairwise_sum(weight)
    energy = pairwise_sum(mx.real(_conj(psi) * product)) / norm
    return pairwise_sum(_weights(product - energy * psi)) / norm


def magnetization(psi: mx.array, axis: str = "z") -> mx.array:
    r"""Return :math:`\langle Z_i\rangle` or :math:`\langle X_i\rangle` of every site.

    Differentiable to any order. The mean over the sites is ``magnetization(psi).mean()``.

    Args:
        psi: ``(2**n,)`` amplitudes of n >= 1 sites, of any norm but 0.
        axis: ``"z"`` or ``"x"``.

    Returns:
        ``(n,)`` real numbers in [-1, 1], site 0 first.

    Raises:
        TypeError: ``psi`` is not an array.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or not finite, or ``axis`` is
            neither ``"z"`` nor ``"x"``.
    """
    psi, n = check_state_of_sites("magnetization", psi)
    check_axis("magnetization", axis)
    norm = pairwise_sum(_weights(psi))
    if axis == "x":
        by_bit = [psi.reshape(-1, 2, 1 << site) for site in range(n)]
        flips = [mx.real(_conj(pairs[:, 0]) * pairs[:, 1]).reshape(-1) for pairs in by_bit]
        return 2 * mx.stack([pairwise_sum(flip) for flip in flips]) / norm
    means = []
    weights = _weights(psi)
    for _ in range(n):  # from the last site down: measure it, then sum it out
        down, up = weights.reshape(2, -1)
        means.append(pairwise_sum(up - down))
        weights = down + up
    return mx.stack(means[::-1]) / norm


def correlation(psi: mx.array, i: int, j: int) -> mx.array:
    r"""Return :math:`\langle Z_i Z_j\rangle`, without subtracting the product of the means.

    Differentiable to any order.

    Args:
        psi: ``(2**n,)`` amplitudes, of any norm but 0.
        i: A site, 0 to n - 1.
        j: A site, 0 to n - 1.

    Returns:
        A real scalar in [-1, 1].

    Raises:
        TypeError: ``psi`` is not an array, or a site is not an integer.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or not finite, or a site is
            out of range.
    """
    psi, n = check_state_of_sites("correlation", psi)
    low, high = sorted(
        check_index("correlation", name, site, n - 1) for name, site in (("i", i), ("j", j))
    )
    weights = _weights(psi)
    norm = pairwise_sum(weights)
    if low == high:
        return norm / norm
    w = weights.reshape(-1, 2, 1 << (high - low - 1), 2, 1 << low)
    aligned, opposed = w[:, 0, :, 0] + w[:, 1, :, 1], w[:, 0, :, 1] + w[:, 1, :, 0]
    return pairwise_sum((aligned - opposed).reshape(-1)) / norm


def entanglement_entropy(psi: mx.array, cut: int) -> mx.array:
    r"""Return the von Neumann entropy between sites ``0 .. cut - 1`` and the others, in nats.

    .. math:: S = -\sum_a \lambda_a \ln \lambda_a

    The :math:`\lambda_a` are the eigenvalues of the reduced density matrix of the smaller side,
    computed in float64 on the CPU. Differentiable once, in reverse and in forward mode. At an
    eigenvalue of 0, the derivative of S in it is infinite, but in ``psi`` it is 0.

    Args:
        psi: ``(2**n,)`` amplitudes, of any norm but 0.
        cut: Number of sites on one side, 0 to n; 0 and n have entropy 0. The time is
            O(8^min(cut, n - cut)).

    Returns:
        A real scalar in [0, min(cut, n - cut) ln 2].

    Raises:
        TypeError: ``psi`` is not an array, or ``cut`` is not an integer.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or not finite, or ``cut`` is
            out of range.
    """
    psi, n = check_state_of_sites("entanglement_entropy", psi)
    cut = check_index("entanglement_entropy", "cut", cut, n)
    dtype = mx.float64 if psi.dtype == mx.float64 else mx.float32
    with mx.stream(mx.cpu):  # MLX has eigh and float64 there only
        m = psi.reshape(-1, 1 << cut)
        m = m if m.shape[0] <= m.shape[1] else m.T
        if psi.dtype == mx.complex64:
            # The real matrix [[Re, -Im], [Im, Re]] has each eigenvalue of Re + i Im twice.
            a, b = mx.real(m).astype(mx.float64), mx.imag(m).astype(mx.float64)
            re, im = a @ a.T + b @ b.T, b @ a.T - a @ b.T
            rho = mx.concatenate(
                [mx.concatenate([re, -im], axis=1), mx.concatenate([im, re], axis=1)]
            )
            copies = 2
        else:
            m = m.astype(mx.float64)
            rho = m @ m.T
            copies = 1
        trace = mx.diag(rho).sum() / copies
        return (_entropy(rho / trace) / copies).astype(dtype)


def fidelity(a: mx.array, b: mx.array) -> mx.array:
    r"""Return :math:`|\langle a|b\rangle|^2 / (\langle a|a\rangle \langle b|b\rangle)`.

    Differentiable to any order.

    Args:
        a: ``(n,)`` amplitudes, real or complex64, of any norm but 0.
        b: ``(n,)``.

    Returns:
        A real scalar in [0, 1], to rounding.

    Raises:
        TypeError: A state is not an array.
        ValueError: A state is not one-dimensional, or is empty, zero or not finite, or the lengths
            of the states differ.
    """
    a = check_state("fidelity", "a", a)
    b = check_state("fidelity", "b", b)
    if a.size != b.size:
        raise ValueError(f"[fidelity] a has {a.size} amplitudes, b has {b.size}")
    overlap = _conj(a) * b
    squared = pairwise_sum(mx.real(overlap)) ** 2
    if overlap.dtype == mx.complex64:
        squared = squared + pairwise_sum(mx.imag(overlap)) ** 2
    return squared / (pairwise_sum(_weights(a)) * pairwise_sum(_weights(b)))


def _weights(psi: mx.array) -> mx.array:
    """Return ``|psi|**2``, element by element."""
    if psi.dtype == mx.complex64:
        return mx.real(psi).square() + mx.imag(psi).square()
    return psi.square()


def _conj(psi: mx.array) -> mx.array:
    """Return the complex conjugate; a real array is its own."""
    return mx.conjugate(psi) if psi.dtype == mx.complex64 else psi


def _entropy(rho: mx.array) -> mx.array:
    """Return ``-tr(rho ln rho)`` of symmetric ``(..., d, d)``, as ``(...,)``.

    MLX cannot differentiate its eigh, but ``d tr f(rho) = tr(f'(rho) d rho)`` needs only the
    eigenvectors themselves.
    """

    @mx.custom_function
    def entropy(rho):
        with mx.stream(mx.cpu):
            values = mx.maximum(_eigh(rho)[0], _TINY)
            return -(values * mx.log(values)).sum(axis=-1)

    @entropy.vjp
    def vjp(rho, cotangent, output):
        with mx.stream(mx.cpu):
            return cotangent[..., None, None] * _entropy_gradient(rho)

    @entropy.jvp
    def jvp(rho, tangent):
        with mx.stream(mx.cpu):
            return (_entropy_gradient(rho) * tangent).sum(axis=(-2, -1))

    @entropy.vmap
    def vmap(rho, axis):
        with mx.stream(mx.cpu):
            return (_entropy(mx.moveaxis(rho, axis, 0)),), (0,)

    return entropy(rho)  # pyright: ignore[reportReturnType]


def _entropy_gradient(rho: mx.array) -> mx.array:
    """Return ``-(ln rho + 1)``, with eigenvalues of at least ``_TINY``."""
    values, vectors = _eigh(rho)
    slopes = -(mx.log(mx.maximum(values, _TINY)) + 1)
    return (vectors * slopes[..., None, :]) @ vectors.swapaxes(-1, -2)


def _eigh(rho: mx.array) -> tuple[mx.array, mx.array]:
    """Return eigenvalues and eigenvectors; MLX raises if a matrix is not finite, this gives nan."""
    finite = mx.isfinite(rho).all(axis=(-2, -1), keepdims=True)
    values, vectors = mx.linalg.eigh(mx.stop_gradient(mx.where(finite, rho, 0)))
    return mx.where(finite[..., 0], values, mx.nan), vectors
