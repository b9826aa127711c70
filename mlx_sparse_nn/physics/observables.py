"""Observables of a state: energy, magnetisation, correlation, entanglement and fidelity.

A state that is zero or not finite raises, and so does what does not fit its dtype, as the square of
an energy of 1e-23 in float32. A transform, such as mx.grad or mx.compile, traces states whose
numbers are not known yet: there, everything stays lazy and such a state gives nan.

States and products with H are first multiplied by powers of two, so that no square is too large or
too small. A derivative by ``psi`` is divided by the norm of ``psi``, to the power of its order.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.derivatives import with_rules
from mlx_sparse_nn.core.transforms import is_traced, tracing, transforming
from mlx_sparse_nn.physics.checks import (
    check_axis,
    check_hamiltonian,
    check_index,
    check_product,
    check_sized_state,
    check_state_of_sites,
)
from mlx_sparse_nn.physics.precision import (
    epsilon,
    largest_part,
    pairwise_sum,
    parts_of,
    power_of_two,
    times_real,
)

_TINY = 1e-300  # replaces smaller eigenvalues, so that the logarithm of 0 is finite


def expectation(H: Any, psi: mx.array) -> mx.array:
    r"""Return the energy :math:`\langle\psi|H|\psi\rangle / \langle\psi|\psi\rangle` of a state.

    Differentiable in ``psi`` and in the parameters of H: ``H.data``, or J, h and g.

    Args:
        H: ``(n, n)``, Hermitian: a CSRArray, an IsingOperator, or any object with ``shape`` whose
            ``H @ psi`` MLX computes. Any other matrix gives the real part. Any unit of energy.
        psi: ``(n,)`` amplitudes, real or complex64, of any norm but 0.

    Returns:
        A real scalar: float64 if ``H`` or ``psi`` is, else float32.

    Raises:
        TypeError: ``H`` is not such an object, or ``psi`` is not an array.
        ValueError: ``H`` is not square, ``psi`` does not have shape ``(n,)``, is empty, zero or not
            finite, or the energy does not fit its dtype.
    """
    _, _, _, energy, unit = _energy("expectation", H, psi)
    return _with_unit("expectation", "energy", energy, unit, 1, epsilon(energy.dtype))


def variance(H: Any, psi: mx.array) -> mx.array:
    r"""Return :math:`\langle H^2\rangle - \langle H\rangle^2`, which is 0 in an eigenstate.

    It is computed as :math:`\|(H - E)\psi\|^2 / \|\psi\|^2` with :math:`E = \langle H\rangle`:
    the difference would cancel, and could be negative. Differentiable in the same arguments as
    :func:`expectation`.

    Args:
        H: ``(n, n)``, Hermitian, as in :func:`expectation`. In float32, the square of an energy
            fits between 1e-38 and 1e38 only.
        psi: ``(n,)`` amplitudes, real or complex64, of any norm but 0.

    Returns:
        A real scalar in units of energy squared.

    Raises:
        TypeError, ValueError: As in :func:`expectation`.
    """
    state, norm, product, energy, unit = _energy("variance", H, psi)
    rest = [h - energy * x for h, x in zip_longest(product, state, fillvalue=0)]
    factor = power_of_two(mx.stack([largest_part(part) for part in rest]).max())
    factor = mx.minimum(factor, 2.0**40)  # below that is rounding, or the 0 of an eigenstate
    rest = [part * factor for part in rest]
    squared = _dot(rest, rest) / norm
    rounding = (8 * epsilon(energy.dtype) * energy * factor).square()  # all that an eigenstate has
    return _with_unit("variance", "variance", squared, unit / factor, 2, rounding)


def magnetization(psi: mx.array, axis: str = "z") -> mx.array:
    r"""Return :math:`\langle Z_i\rangle`, :math:`\langle X_i\rangle` or :math:`\langle Y_i\rangle`.

    It is that of every site. Y = i X Z, with +1 for a set bit in Z: it takes a clear bit to -i
    times a set one, and is 0 in every real state. Differentiable to any order. The mean over the
    sites is ``magnetization(psi).mean()``.

    Args:
        psi: ``(2**n,)`` amplitudes of n >= 1 sites, of any norm but 0.
        axis: ``"z"``, ``"x"`` or ``"y"``.

    Returns:
        ``(n,)`` real numbers in [-1, 1], site 0 first.

    Raises:
        TypeError: ``psi`` is not an array.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or not finite, or ``axis`` is
            none of these.

    Example:
        >>> magnetization(mx.array([1.0, -1j]), "y")  # one site, along y
        array([1], dtype=float32)
    """
    psi, largest, n = check_state_of_sites("magnetization", psi)
    check_axis("magnetization", axis)
    norm, spins = _moments(_probabilities(psi, largest, axis, range(n)), 1)
    return spins / norm


def correlation(
    psi: mx.array, axis: str = "z", i: int | None = None, j: int | None = None
) -> mx.array:
    r"""Return :math:`\langle Z_i Z_j\rangle` of all pairs of sites, or of one.

    The product of the means is not subtracted. All pairs are summed together, in about three times
    the time of one along z; along x and y, a pass over the state for each site turns them there
    before. Differentiable to any order.

    Args:
        psi: ``(2**n,)`` amplitudes, of any norm but 0.
        axis: ``"z"``, ``"x"`` or ``"y"``, of both sites, as in :func:`magnetization`.
        i: A site, 0 to n - 1, or None for all.
        j: A site if ``i`` is one, else None.

    Returns:
        ``(n, n)`` real numbers in [-1, 1], with 1 on the diagonal, or the scalar of one pair.

    Raises:
        TypeError: ``psi`` is not an array, a site is not an integer, or just one is None.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or not finite, a site is out of
            range, or ``axis`` is none of these.

    Example:
        >>> up_up_down = mx.zeros(8).at[0b011].add(1.0)
        >>> correlation(up_up_down)
        array([[1, 1, -1],
               [1, 1, -1],
               [-1, -1, 1]], dtype=float32)
        >>> correlation(up_up_down, "z", 0, 2)
        array(-1, dtype=float32)
    """
    owner = "correlation"
    psi, largest, n = check_state_of_sites(owner, psi)
    check_axis(owner, axis)
    if i is None and j is None:
        return _all_pairs(_probabilities(psi, largest, axis, range(n)), n)
    if i is None or j is None:
        alone, missing = ("i", "j") if j is None else ("j", "i")
        raise TypeError(
            f"[{owner}] {missing} must be a site as {alone} is, got None; "
            "correlation(psi, axis)[i] is that of a site with all"
        )
    low, high = sorted(check_index(owner, name, site, n - 1) for name, site in (("i", i), ("j", j)))
    weights = _probabilities(psi, largest, axis, {low, high})
    if low == high:
        norm = pairwise_sum(weights)
        return mx.stop_gradient(norm / norm)
    w = weights.reshape(-1, 2, 1 << (high - low - 1), 2, 1 << low)
    aligned, opposed = w[:, 0, :, 0] + w[:, 1, :, 1], w[:, 0, :, 1] + w[:, 1, :, 0]
    aligned, opposed = (pairwise_sum(part.reshape(-1)) for part in (aligned, opposed))
    return (aligned - opposed) / (aligned + opposed)


def entanglement_entropy(psi: mx.array, cut: int) -> mx.array:
    r"""Return the von Neumann entropy between sites ``0 .. cut - 1`` and the others, in nats.

    .. math:: S = -\sum_a \lambda_a \ln \lambda_a

    The :math:`\lambda_a` are the eigenvalues of the reduced density matrix of the smaller side,
    computed in float64 on the CPU. Differentiable once, in reverse and in forward mode; a second
    derivative raises. At an eigenvalue of 0, the derivative of S in it is infinite, but in ``psi``
    it is 0.

    The states of a degenerate level have different entropies: of what :func:`lanczos` finds there,
    this is the entropy of one vector of many, and another seed gives another.

    Args:
        psi: ``(2**n,)`` amplitudes, of any norm but 0.
        cut: Number of sites on one side, 0 to n; 0 and n have entropy 0. The time is
            O(8^min(cut, n - cut)).

    Returns:
        A real scalar in [0, min(cut, n - cut) ln 2].

    Raises:
        TypeError: ``psi`` is not an array, or ``cut`` is not an integer.
        ValueError: ``psi`` does not have shape ``(2**n,)``, is zero or not finite, ``cut`` is out
            of range, or ``psi`` is traced by ``mx.export_function``.
    """
    psi, largest, n = check_state_of_sites("entanglement_entropy", psi)
    cut = check_index("entanglement_entropy", "cut", cut, n)
    if tracing.graph == "exported" and is_traced(psi):
        raise ValueError(
            "[entanglement_entropy] psi must not be traced for a file, which cannot hold the "
            "derivative of eigenvalues; export the state, and take its entropy outside"
        )
    return _entropy(cut, mx.stack(_scaled_parts(psi, largest)))


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
    a, largest_a = check_sized_state("fidelity", "a", a)
    b, largest_b = check_sized_state("fidelity", "b", b)
    if a.size != b.size:
        raise ValueError(f"[fidelity] a has {a.size} amplitudes, b has {b.size}")
    x, y = _scaled_parts(a, largest_a), _scaled_parts(b, largest_b)
    norms = _dot(x, x) * _dot(y, y)
    if len(x) == len(y) == 1:
        return pairwise_sum(x[0] * y[0]).square() / norms
    x, y = ([*parts, mx.zeros(1)][:2] for parts in (x, y))  # beside a complex state
    overlap = [x[0] * y[0] + x[1] * y[1], x[0] * y[1] - x[1] * y[0]]
    squared = _total([pairwise_sum(part).square() for part in overlap])
    return squared / norms


def _scaled_parts(psi: mx.array, largest: mx.array) -> list[mx.array]:
    """Return the parts of a state, times the power of two that keeps squares in range.

    No observable depends on that factor, so derivatives of every order are right if it is taken for
    a constant.
    """
    factor = power_of_two(largest)
    return [part * factor for part in parts_of(psi)]


def _dot(a: list[mx.array], b: list[mx.array]) -> mx.array:
    """Return the real part of ``<a|b>``."""
    return pairwise_sum(_total([x * y for x, y in zip(a, b, strict=False)]))


def _total(terms: list[mx.array]) -> mx.array:
    """Return the sum of one or two arrays."""
    return terms[0] + terms[1] if len(terms) == 2 else terms[0]


class _Energy(NamedTuple):
    """The energy of a scaled state, in a unit that is a power of two."""

    state: list[mx.array]  # its parts
    norm: mx.array  # squared, between 1 / dim and dim, and mostly near 1
    product: list[mx.array]  # the parts of H times the state, in the unit
    energy: mx.array  # in the unit
    unit: mx.array  # in that of H; transforms take it for a constant


def _energy(owner: str, H: Any, psi: mx.array) -> _Energy:
    """Return the energy of a state, and of what it is made."""
    dim = check_hamiltonian(owner, H)
    psi, largest = check_sized_state(owner, "psi", psi, dim)
    factor = power_of_two(largest) * 2.0 ** -(dim.bit_length() // 2)
    psi = times_real(psi, mx.maximum(factor, mx.finfo(factor.dtype).smallest_normal))
    product = check_product(owner, H, psi)
    factor = power_of_two(largest_part(product))
    state, product = parts_of(psi), [part * factor for part in parts_of(product)]
    norm = _dot(state, state)
    return _Energy(state, norm, product, _dot(state, product) / norm, 1 / factor)


def _with_unit(
    owner: str,
    name: str,
    value: mx.array,
    unit: mx.array,
    power: int,
    rounding: mx.array | float,
) -> mx.array:
    """Return ``value * unit**power``, or raise if that does not fit the dtype.

    A value of 0 to ``rounding`` may get too small for all its digits. Under a transform, whose
    numbers are not known, what does not fit is nan or infinite.
    """
    result = value
    for _ in range(power):
        result = result * unit
    tiny = mx.finfo(result.dtype).smallest_normal
    lost = (mx.abs(value) > rounding) & (mx.abs(result) < tiny)
    result = result * mx.where(lost, mx.array(mx.nan, result.dtype), mx.array(1, result.dtype))
    if not transforming() and not mx.isfinite(result).item():
        raise ValueError(
            f"[{owner}] the {name} is not finite, or does not fit {result.dtype}: check that H is "
            "finite, and divide it by a unit of energy"
        )
    return result


def _probabilities(psi: mx.array, largest: mx.array, axis: str, sites: Iterable[int]) -> mx.array:
    """Return ``(2**n,)`` of how likely ``sites`` point along ``axis``, where their bits are set.

    The others are measured along z. The sum is not 1.
    """
    parts = _scaled_parts(psi, largest)
    if axis == "y" and len(parts) == 1:
        parts.append(mx.zeros_like(psi))
    signs = mx.array([[-1.0], [1.0]], dtype=parts[0].dtype)
    for site in sites if axis != "z" else ():
        # Amplitudes along the axis, but for a norm and phases.
        parts = [part.reshape(-1, 2, 1 << site) for part in parts]
        flipped = [part[:, ::-1] for part in parts]
        if axis == "x":
            parts = [other + signs * part for other, part in zip(flipped, parts, strict=True)]
        else:
            parts = [flipped[0] - parts[1], flipped[1] + parts[0]]
    return _total([part.square() for part in parts]).reshape(-1)


def _moments(weights: mx.array, order: int) -> list[mx.array]:
    """Return the sums of w, of w z_i, and for order 2 of w z_i z_j with i < j, flat.

    Sites are summed out from the last one down, so that each has half the work of the one before.
    """
    levels = [weights[None]]
    while levels[0].size > 1:
        halves = [level.reshape(level.shape[0], 2, -1) for level in levels]
        sums = [[half[:, 0] + half[:, 1]] for half in halves]
        # This site with those above it, which follow in their order.
        of_site = [[half[:, 1] - half[:, 0]] for half in halves]
        rows = zip_longest([[], *of_site], sums, fillvalue=[])
        levels = [mx.concatenate([*new, *old]) for new, old in rows][: order + 1]
    return [level.reshape(-1) for level in levels]


def _all_pairs(weights: mx.array, n: int) -> mx.array:
    """Return the means of z_i z_j, ``(n, n)``."""
    norm, _, *pairs = _moments(weights, 2)
    diagonal = mx.eye(n, dtype=weights.dtype) * mx.stop_gradient(norm / norm)
    if n == 1:
        return diagonal
    lengths = np.arange(n - 1, 0, -1)  # of the rows above the diagonal
    rows = mx.split(pairs[0] / norm, np.cumsum(lengths)[:-1].tolist())
    upper = mx.stack([mx.pad(row, (n - row.size, 0)) for row in rows])
    upper = mx.pad(upper, [(0, 1), (0, 0)])
    return upper + upper.T + diagonal


def _entropy(cut: int, parts: mx.array) -> mx.array:
    """Return the entropies of states, ``(...,)``, by their real and imaginary parts ``(..., 1 or 2,
    2**n)``."""

    def vjp(parts: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return cotangent[..., None, None] * _slopes(cut, parts)

    def jvp(parts: mx.array, tangent: mx.array) -> mx.array:
        return (_slopes(cut, parts) * tangent).sum(axis=(-2, -1))

    def vmap(parts: mx.array, axis: int) -> tuple[mx.array, int]:
        return _entropy(cut, mx.moveaxis(parts, axis, 0)), 0

    return with_rules(_compute_entropy, cut, vjp, jvp, vmap)(parts)


def _slopes(cut: int, parts: mx.array) -> mx.array:
    """Return the gradients of :func:`_entropy`, which have no derivative themselves."""

    def refuse(*_: Any) -> mx.array:
        raise ValueError(
            "[entanglement_entropy] psi has been differentiated twice: the entropy has a first "
            "derivative only"
        )

    def vmap(parts: mx.array, axis: int) -> tuple[mx.array, int]:
        return _slopes(cut, mx.moveaxis(parts, axis, 0)), 0

    return with_rules(_compute_slopes, cut, refuse, refuse, vmap)(parts)


def _compute_entropy(cut: int, parts: mx.array) -> mx.array:
    """Return ``-tr(rho ln rho)``, in float64 on the way."""
    with mx.stream(mx.cpu):  # MLX has eigh and float64 there only
        values = mx.maximum(_eigh(_density(cut, parts))[0], _TINY)
        sums = -(values * mx.log(values)).sum(axis=-1)
        return (sums / parts.shape[-2]).astype(parts.dtype)


def _compute_slopes(cut: int, parts: mx.array) -> mx.array:
    """Return the gradients: ``d tr f(rho) = tr(f'(rho) d rho)`` needs no derivative of eigh."""
    with mx.stream(mx.cpu):
        values, vectors = _eigh(_density(cut, parts))
        slopes = -(mx.log(mx.maximum(values, _TINY)) + 1) / parts.shape[-2]
        of_rho = (vectors * slopes[..., None, :]) @ vectors.swapaxes(-1, -2)
        return mx.vjp(partial(_density, cut), [parts], [of_rho])[1][0]


def _density(cut: int, parts: mx.array) -> mx.array:
    """Return the density matrices of one side, ``(..., d, d)`` in float64: of complex states the
    real matrices [[Re, -Im], [Im, Re]], which have each eigenvalue twice."""
    copies = parts.shape[-2]
    cuts = parts.reshape(*parts.shape[:-1], -1, 1 << cut).astype(mx.float64)
    if cuts.shape[-2] > cuts.shape[-1]:
        cuts = cuts.swapaxes(-1, -2)
    a, turned_a = cuts[..., 0, :, :], cuts[..., 0, :, :].swapaxes(-1, -2)
    rho = a @ turned_a
    if copies == 2:
        b, turned_b = cuts[..., 1, :, :], cuts[..., 1, :, :].swapaxes(-1, -2)
        re, im = rho + b @ turned_b, b @ turned_a - a @ turned_b
        rows = [mx.concatenate(row, axis=-1) for row in ([re, -im], [im, re])]
        rho = mx.concatenate(rows, axis=-2)
    trace = mx.diagonal(rho, axis1=-2, axis2=-1).sum(axis=-1) / copies
    return rho / trace[..., None, None]


def _eigh(rho: mx.array) -> tuple[mx.array, mx.array]:
    """Return eigenvalues and eigenvectors; MLX raises if a matrix is not finite, this gives nan."""
    finite = mx.isfinite(rho).all(axis=(-2, -1), keepdims=True)
    values, vectors = mx.linalg.eigh(mx.stop_gradient(mx.where(finite, rho, 0)))
    return mx.where(finite[..., 0], values, mx.nan), vectors
