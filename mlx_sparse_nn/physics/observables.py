"""What is measured in a state: energies, magnetisation, correlation, entanglement, fidelity.

A state that is zero or not finite raises. Under a transform, such as mx.grad or mx.compile, there
is no number to look at yet: everything stays lazy then, and the result of such a state is nan.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.transforms import transforming

_TINY = 1e-300  # of an eigenvalue: its logarithm is finite, and 0 times that


def expectation(H: Any, psi: mx.array) -> mx.array:
    r"""Return the energy :math:`\langle\psi|H|\psi\rangle / \langle\psi|\psi\rangle` of a state.

    Differentiable in ``psi`` and in what H is made of: ``H.data``, or J, h and g.

    Args:
        H: ``(n, n)``, Hermitian; of any other matrix, this is the real part. A CSRArray, an
            IsingOperator, or any object with ``shape`` whose ``H @ psi`` is an MLX array.
        psi: ``(n,)`` amplitudes, real or complex64, of any norm but 0.

    Returns:
        A real scalar: float32, or float64 where ``H`` or ``psi`` are.

    Raises:
        TypeError: ``H`` is not such an object or ``psi`` not an array.
        ValueError: ``H`` is not square; or ``psi`` has another shape than ``(n,)``, is zero or is
            not finite.
    """
    psi = check_state("expectation", "psi", psi, check_hamiltonian("expectation", H))
    bra = _conj(psi)
    return sum_halves(mx.real(bra * (H @ psi))) / sum_halves(mx.real(bra * psi))


def variance(H: Any, psi: mx.array) -> mx.array:
    r"""Return :math:`\langle H^2\rangle - \langle H\rangle^2`, which is 0 in an eigenstate.

    It is computed as :math:`\|(H - E)\psi\|^2 / \|\psi\|^2` with :math:`E = \langle H\rangle`,
    never negative, and without the cancellation of the difference. Differentiable as
    :func:`expectation`.

    Args:
        H: ``(n, n)``, Hermitian, as in :func:`expectation`.
        psi: ``(n,)`` amplitudes, real or complex64, of any norm but 0.

    Returns:
        A real scalar in units of energy squared.

    Raises:
        TypeError, ValueError: As :func:`expectation`.
    """
    psi = check_state("variance", "psi", psi, check_hamiltonian("variance", H))
    product, weight = H @ psi, _weights(psi)
    norm = sum_halves(weight)
    energy = sum_halves(mx.real(_conj(psi) * product)) / norm
    return sum_halves(_weights(product - energy * psi)) / norm


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
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or is not finite; or
            ``axis`` is neither.
    """
    psi, n = _check_sites("magnetization", psi)
    if axis not in ("z", "x"):
        raise ValueError(f"[magnetization] axis must be 'z' or 'x', got {axis!r}")
    norm = sum_halves(_weights(psi))
    if axis == "x":
        halves = [psi.reshape(-1, 2, 1 << site) for site in range(n)]
        flips = [mx.real(_conj(half[:, 0]) * half[:, 1]).reshape(-1) for half in halves]
        return 2 * mx.stack([sum_halves(flip) for flip in flips]) / norm
    means = []
    weights = _weights(psi)
    for _ in range(n):  # from the last site down: measure it, then sum it out
        down, up = weights.reshape(2, -1)
        means.append(sum_halves(up - down))
        weights = down + up
    return mx.stack(means[::-1]) / norm


def correlation(psi: mx.array, i: int, j: int) -> mx.array:
    r"""Return :math:`\langle Z_i Z_j\rangle`, not connected: subtract the product of the means.

    Differentiable to any order.

    Args:
        psi: ``(2**n,)`` amplitudes, of any norm but 0.
        i: A site, 0 to n - 1.
        j: A site, 0 to n - 1.

    Returns:
        A real scalar in [-1, 1].

    Raises:
        TypeError: ``psi`` is not an array, or a site is not an integer.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or is not finite; or
            a site is out of range.
    """
    psi, n = _check_sites("correlation", psi)
    low, high = sorted(
        _check_site("correlation", name, site, n) for name, site in (("i", i), ("j", j))
    )
    weights = _weights(psi)
    norm = sum_halves(weights)
    if low == high:
        return norm / norm
    w = weights.reshape(-1, 2, 1 << (high - low - 1), 2, 1 << low)
    aligned, opposed = w[:, 0, :, 0] + w[:, 1, :, 1], w[:, 0, :, 1] + w[:, 1, :, 0]
    return sum_halves((aligned - opposed).reshape(-1)) / norm


def entanglement_entropy(psi: mx.array, cut: int) -> mx.array:
    r"""Return the von Neumann entropy between sites ``0 .. cut - 1`` and the others, in nats.

    .. math:: S = -\sum_a \lambda_a \ln \lambda_a

    with the eigenvalues of the reduced density matrix of the smaller side, found in float64 on the
    CPU. Differentiable once, in reverse and in forward mode. Where an eigenvalue is 0, the
    derivative of S by it is infinite; by ``psi`` it is 0.

    Args:
        psi: ``(2**n,)`` amplitudes, of any norm but 0. Costs O(8^min(cut, n - cut)) time.
        cut: Number of sites on one side, 0 to n; 0 and n have entropy 0.

    Returns:
        A real scalar in [0, min(cut, n - cut) ln 2].

    Raises:
        TypeError: ``psi`` is not an array, or ``cut`` not an integer.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or is not finite; or
            ``cut`` is out of range.
    """
    psi, n = _check_sites("entanglement_entropy", psi)
    if isinstance(cut, bool) or not isinstance(cut, int | np.integer):
        raise TypeError(f"[entanglement_entropy] cut must be an integer, got {cut!r}")
    if not 0 <= cut <= n:
        raise ValueError(f"[entanglement_entropy] cut must be in [0, {n}], got {cut}")
    dtype = mx.float64 if psi.dtype == mx.float64 else mx.float32
    with mx.stream(mx.cpu):  # MLX has eigh and float64 there only
        m = psi.reshape(-1, 1 << int(cut))
        m = m if m.shape[0] <= m.shape[1] else m.T
        if psi.dtype == mx.complex64:
            # [[Re, -Im], [Im, Re]] of a Hermitian matrix has each of its eigenvalues twice.
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
        ValueError: A state is not one-dimensional, zero or not finite, or their lengths differ.
    """
    a = check_state("fidelity", "a", a)
    b = check_state("fidelity", "b", b)
    if a.size != b.size:
        raise ValueError(f"[fidelity] a has {a.size} amplitudes, b has {b.size}")
    overlap = _conj(a) * b
    squared = sum_halves(mx.real(overlap)) ** 2
    if overlap.dtype == mx.complex64:
        squared = squared + sum_halves(mx.imag(overlap)) ** 2
    return squared / (sum_halves(_weights(a)) * sum_halves(_weights(b)))


def sum_halves(terms: mx.array) -> mx.array:
    """Return the sum over the first axis of ``(n, ...)`` terms, added in halves.

    On the CPU, MLX's own sum adds one after another: 2**18 terms may leave an error of 2e-3.
    """
    while terms.shape[0] > 8:
        if terms.shape[0] % 2:
            terms = mx.pad(terms, [(0, 1)] + [(0, 0)] * (terms.ndim - 1))
        terms = terms.reshape(2, -1, *terms.shape[1:]).sum(axis=0)
    return terms.sum(axis=0)


def check_hamiltonian(owner: str, H: Any) -> int:
    """Return the dimension of a square Hamiltonian, or raise."""
    if isinstance(H, np.ndarray) or not (hasattr(H, "shape") and hasattr(H, "__matmul__")):
        raise TypeError(
            f"[{owner}] H must be a CSRArray, got {type(H).__name__}; an IsingOperator, an "
            "mx.array or any object with shape whose product H @ psi is an mx.array will also do"
        )
    shape = tuple(H.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"[{owner}] H must be square, got shape {shape}")
    return shape[0]


def check_state(owner: str, name: str, psi: mx.array, size: int | None = None) -> mx.array:
    """Return a state as float32, float64 or complex64, or raise unless its shape is ``(size,)``.

    16-bit sums are in float32. The numbers are checked too, where they are there to look at.
    """
    if not isinstance(psi, mx.array):
        raise TypeError(f"[{owner}] {name} must be an mx.array, got {type(psi).__name__}")
    if psi.ndim != 1 or psi.size != (psi.size if size is None else size):
        needs = "expected one axis" if size is None else f"H needs ({size},)"
        raise ValueError(f"[{owner}] {name} has shape {psi.shape}, {needs}")
    return _check_numbers(owner, name, psi.astype(mx.result_type(psi, mx.float32)))


def _check_sites(owner: str, psi: mx.array) -> tuple[mx.array, int]:
    """Return a state of ``(2**n,)`` amplitudes and n, or raise."""
    if not isinstance(psi, mx.array):
        raise TypeError(f"[{owner}] psi must be an mx.array, got {type(psi).__name__}")
    n = psi.size.bit_length() - 1
    if psi.ndim != 1 or n < 1 or psi.size != 1 << n:
        raise ValueError(f"[{owner}] psi has shape {psi.shape}, expected (2**n,) with n >= 1")
    return _check_numbers(owner, "psi", psi.astype(mx.result_type(psi, mx.float32))), n


def _check_numbers(owner: str, name: str, psi: mx.array) -> mx.array:
    """Return a state, or raise if it is zero or not finite and no transform is running."""
    if psi.size and not transforming():
        largest = float(mx.abs(psi).max())
        if not math.isfinite(largest):
            raise ValueError(f"[{owner}] {name} must be finite, its largest magnitude is {largest}")
        if largest == 0:
            raise ValueError(f"[{owner}] {name} must not be zero")
    return psi


def _check_site(owner: str, name: str, site: int, n: int) -> int:
    if isinstance(site, bool) or not isinstance(site, int | np.integer):
        raise TypeError(f"[{owner}] {name} must be an integer, got {site!r}")
    if not 0 <= site < n:
        raise ValueError(f"[{owner}] {name} must be in [0, {n - 1}], got {site}")
    return int(site)


def _weights(psi: mx.array) -> mx.array:
    """Return ``|psi|**2``, element by element."""
    if psi.dtype == mx.complex64:
        return mx.real(psi).square() + mx.imag(psi).square()
    return psi.square()


def _conj(psi: mx.array) -> mx.array:
    return mx.conjugate(psi) if psi.dtype == mx.complex64 else psi


def _entropy(rho: mx.array) -> mx.array:
    """Return ``-tr(rho ln rho)`` of symmetric ``(..., d, d)``, as ``(...,)``.

    MLX cannot differentiate its eigh, but ``d tr f(rho) = tr(f'(rho) d rho)`` needs no more than
    the eigenvectors themselves.
    """

    @mx.custom_function
    def entropy(rho):
        with mx.stream(mx.cpu):
            values = mx.maximum(mx.linalg.eigh(mx.stop_gradient(rho))[0], _TINY)
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
    """Return ``-(ln rho + 1)``, with eigenvalues of 0 and below taken as the smallest positive."""
    values, vectors = mx.linalg.eigh(mx.stop_gradient(rho))
    slopes = -(mx.log(mx.maximum(values, _TINY)) + 1)
    return (vectors * slopes[..., None, :]) @ vectors.swapaxes(-1, -2)
