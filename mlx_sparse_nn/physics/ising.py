"""The transverse-field Ising model: its Hamiltonian as a CSRArray, and its exact ground energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import CSRArray
from mlx_sparse_nn.core.checks import check_size
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.transforms import transforming
from mlx_sparse_nn.physics.checks import (
    Pairs,
    Values,
    check_chain,
    check_dtype,
    check_energies,
    check_memory,
    check_number,
    check_parameter,
    check_scalar,
    check_values,
    has_arrays,
)
from mlx_sparse_nn.physics.lattices import Bonds
from mlx_sparse_nn.physics.operator import IsingOperator, bonds_of
from mlx_sparse_nn.physics.parameters import read, ruled

_MAX_QUBITS = 26  # 2**26 * 27 stored values fit 32-bit indices, 2**27 * 28 do not
_Z = np.array([-1.0, 1.0])  # z of a clear bit, of a set bit


def transverse_field_ising(
    n_qubits: int,
    field: Values,
    *,
    coupling: Values = 1.0,
    longitudinal: Values = 0.0,
    periodic: bool = False,
    bonds: Pairs | None = None,
    dtype: mx.Dtype = mx.float32,
) -> CSRArray:
    r"""Build the Hamiltonian of the transverse-field Ising model as a sparse array.

    .. math:: H = -\sum_{(i, j)} J_{ij} Z_i Z_j - \sum_i h_i X_i - \sum_i g_i Z_i

    with Pauli matrices X and Z. Bit ``i`` of the basis index is site ``i``; a set bit means
    z = +1. At g = 0, H does not depend on that choice. The array is real, symmetric and canonical:
    each row stores its ``n_qubits`` single flips and its diagonal, zeros included, in ascending
    order of columns.

    At g = 0, the uniform superposition of all basis states has energy exactly -h per site. The
    ground state of the uniform chain of 8 sites with J = 1 and h = 0.7 has -1.0382 per site (open)
    or -1.1280 (ring). The often-quoted -1.27 is -4 / pi, of the infinite critical chain at h = 1:
    see :func:`exact_ground_energy`.

    Args:
        n_qubits: Number of sites, 1 to 26.
        field: Transverse field h, a number or one per site, in units of energy.
        coupling: Coupling J, a number or one per bond. Bond ``i`` joins sites ``i`` and ``i + 1``.
            An open chain has ``n_qubits - 1`` bonds; a ring has one more, from the last site to
            site 0.
        longitudinal: Longitudinal field g, a number or one per site.
        periodic: Whether the chain is a ring, which takes at least 3 sites.
        bonds: Pairs of different sites, each once, in place of those of a chain, as
            :class:`IsingOperator` takes them.
        dtype: Floating type or complex64 of the stored values.

    Returns:
        ``(2**n_qubits, 2**n_qubits)`` with ``2**n_qubits * (n_qubits + 1)`` stored values.

    Raises:
        TypeError: ``n_qubits`` or a site is not an integer, a parameter is not real numbers, or
            ``dtype`` is not a floating type or complex64.
        ValueError: ``n_qubits`` is out of range or too small for a ring; ``bonds`` are given for a
            ring too, one is given twice, or its sites are equal or out of range; a parameter is not
            finite or has the wrong number of values; or the energies overflow ``dtype``. What MLX
            arrays hold is not checked while a transform is running.

    Example:
        >>> transverse_field_ising(8, 0.7)
        CSRArray(256 x 256, mlx.core.float32, 2304 stored values, density 0.0352)
    """
    owner = "transverse_field_ising"
    n_qubits = check_size(owner, "n_qubits", n_qubits, minimum=1)
    check_dtype(owner, dtype)
    if n_qubits > _MAX_QUBITS:
        raise ValueError(
            f"[{owner}] n_qubits {n_qubits} needs 2**{n_qubits} * {n_qubits + 1} stored values; "
            f"at most 2**31 - 1, those of n_qubits {_MAX_QUBITS}, fit 32-bit indices"
        )
    pairs = bonds_of(owner, n_qubits, periodic, bonds)
    parameters = [
        ("field", field, n_qubits, "sites"),
        ("coupling", coupling, len(pairs), "bonds"),
        ("longitudinal", longitudinal, n_qubits, "sites"),
    ]
    by_mlx = any(has_arrays(values) for _, values, _, _ in parameters)
    if by_mlx:
        real = mx.float64 if dtype == mx.float64 else mx.float32
        lazy = [check_parameter(owner, *parameter, real) for parameter in parameters]
    if not by_mlx or not transforming():
        h, j, g = (check_values(owner, *parameter) for parameter in parameters)
        check_energies(owner, h, j, g, dtype)
    # Values and indices; building and copying holds each twice, as measured.
    n_bytes = (1 << n_qubits) * (n_qubits + 1) * 2 * (max(4, dtype.size) + 4)
    check_memory(owner, f"n_qubits {n_qubits}", n_bytes)
    if by_mlx:
        h, j, g = lazy
        model = IsingOperator(n_qubits, h, coupling=j, longitudinal=g, bonds=pairs, dtype=dtype)
        return model.tocsr()

    indices = _flips_and_diagonal(n_qubits)
    n_rows, width = indices.shape
    data = np.empty(indices.shape, dtype=np.float64 if dtype == mx.float64 else np.float32)
    for site, flip in enumerate(np.subtract(0.0, h)):  # not -h, which would store -0.0
        bit = 1 << site
        data[bit : 2 * bit, 1 : site + 2] = data[:bit, : site + 1]
        data[bit : 2 * bit, 0] = data[:bit, site + 1] = flip
    data[indices == np.arange(n_rows, dtype=np.int32)[:, None]] = _diagonal(n_qubits, pairs, j, g)
    indptr = np.arange(n_rows + 1) * width
    pattern = CSRPattern(indptr, indices.reshape(-1), (n_rows, n_rows))
    return CSRArray(mx.array(data.reshape(-1), dtype=dtype), pattern)


@overload
def exact_ground_energy(
    n_qubits: int, field: float, *, coupling: float = ..., periodic: bool = ...
) -> float: ...


@overload
def exact_ground_energy(
    n_qubits: int,
    field: float | mx.array,
    *,
    coupling: float | mx.array = ...,
    periodic: bool = ...,
) -> mx.array: ...


def exact_ground_energy(
    n_qubits: int,
    field: float | mx.array,
    *,
    coupling: float | mx.array = 1.0,
    periodic: bool = False,
) -> float | mx.array:
    r"""Return the lowest eigenvalue of the uniform chain, open or a ring, from free fermions.

    It is that of ``transverse_field_ising(n_qubits, field, ...)`` at g = 0, for any sign of h and
    J. The Jordan-Wigner transformation makes H quadratic in fermions:
    :math:`H = \sum_q \epsilon_q (n_q - 1/2)` with occupations :math:`n_q` of 0 or 1.

    Open chain (Lieb, Schultz and Mattis, section II): :math:`\epsilon_q` is twice a singular value
    of the ``(n, n)`` bidiagonal matrix with h on its diagonal and J above it, and

    .. math:: E_0 = -\frac{1}{2} \sum_q \epsilon_q.

    Ring (Pfeuty): :math:`\epsilon_k = 2 \sqrt{h^2 + J^2 - 2 h J \cos k}`, except that the unpaired
    momenta have a sign, :math:`\epsilon_0 = 2 (h - J)` and :math:`\epsilon_\pi = 2 (h + J)`. States
    of even fermion number live on :math:`k = (2m + 1) \pi / n`, those of odd number on
    :math:`k = 2 m \pi / n`. In either sector

    .. math:: E_0 = -\frac{1}{2} \sum_k |\epsilon_k| + \Delta

    where :math:`\Delta` is 0 if the number of negative :math:`\epsilon_k` has the sector's parity.
    Otherwise it is the smallest :math:`|\epsilon_k|`, the cost of one fermion more or less. The
    ground energy is the lower one of the two sectors: for h, J > 0 the even one.

    E. Lieb, T. Schultz and D. Mattis, Annals of Physics 16 (1961) 407.
    P. Pfeuty, Annals of Physics 57 (1970) 79.

    Args:
        n_qubits: Number of sites. The open chain takes O(n^3) time and O(n^2) memory, the ring
            O(n) of both.
        field: Transverse field h, in units of energy.
        coupling: Coupling J.
        periodic: Whether the chain is a ring, which takes at least 3 sites.

    Returns:
        The energy of the whole chain, accurate to float64 rounding. If h or J is an MLX scalar, an
        MLX scalar, differentiable once: by h, it is minus the sum of all <X_i>. Where two levels
        cross, it has the derivative of one of them.

    Raises:
        TypeError: ``n_qubits`` is not an integer, or ``field`` or ``coupling`` not a real number.
        ValueError: ``n_qubits`` is below 1, or below 3 for a ring; a number is not finite; or it is
            mapped by ``mx.vmap``, compiled by ``mx.compile``, or differentiated twice.

    Example:
        >>> exact_ground_energy(8, 0.7)
        -8.305610965881469
    """
    owner = "exact_ground_energy"
    n_qubits, _ = check_chain(owner, n_qubits, periodic)
    numbers = {"field": field, "coupling": coupling}
    energy = _ring_energy if periodic else _open_energy
    if not any(isinstance(value, mx.array) for value in numbers.values()):
        h, j = (check_number(owner, name, value) for name, value in numbers.items())
        return energy(n_qubits, h, j)[0]

    def compute(h: mx.array, j: mx.array) -> tuple[float, float, float]:
        for name, value in zip(numbers, (h, j), strict=True):
            read(owner, name, value)
        host = (check_number(owner, *pair) for pair in zip(numbers, (h, j), strict=True))
        return energy(n_qubits, *host)

    operands = [check_scalar(owner, name, value, mx.float32) for name, value in numbers.items()]
    return _once_differentiable(owner, compute)(*map(mx.array, operands))


def _once_differentiable(
    owner: str, compute: Callable[[mx.array, mx.array], tuple[float, float, float]]
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return the first number of ``compute`` as a function of two scalars, whose slopes are the
    others."""

    refusal = f"[{owner}] field and coupling have first derivatives alone, and no vmap"
    slopes = ruled(lambda h, j: mx.array(compute(h, j)[1:]), refusal)

    def vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        by_h, by_j = mx.split(cotangent * slopes(*primals), 2)
        return by_h.reshape(()), by_j.reshape(())

    def jvp(primals: Any, tangents: Any) -> mx.array:
        moves = [mx.zeros(()) if tangent is None else tangent for tangent in tangents]
        return (slopes(*primals) * mx.stack(moves)).sum()

    return ruled(lambda h, j: mx.array(compute(h, j)[0]), refusal, vjp=vjp, jvp=jvp)


def _open_energy(n_qubits: int, h: float, j: float) -> tuple[float, float, float]:
    """Return the lowest energy of an open chain, and its slopes by h and J."""
    u, s, vt = np.linalg.svd(np.diag(np.full(n_qubits, h)) + np.diag(np.full(n_qubits - 1, j), 1))
    green = u @ vt  # the derivative of the sum of s by the matrix
    return -float(s.sum()), -float(green.trace()), -float(green.trace(1))


def _ring_energy(n_qubits: int, h: float, j: float) -> tuple[float, float, float]:
    """Return the lowest energy of a ring, and its slopes by h and J."""
    return min(_sector(n_qubits, h, j, parity) for parity in (0, 1))


def _sector(n_qubits: int, h: float, j: float, parity: int) -> tuple[float, float, float]:
    """Return the lowest energy of a ring among the states of even (0) or odd (1) fermion number,
    and its slopes by h and J."""
    steps = 2 * np.arange(n_qubits) + 1 - parity  # k = steps * pi / n
    k = steps * (np.pi / n_qubits)
    energies = np.hypot(h - j * np.cos(k), j * np.sin(k))  # |epsilon_k| / 2
    # Only the unpaired momenta, k = 0 and pi, can have a negative epsilon_k.
    filled = (0 in steps and h < j) + (n_qubits in steps and h < -j)
    weights = -np.ones(n_qubits)
    if filled % 2 != parity:
        weights[energies.argmin()] += 2
    with np.errstate(invalid="ignore"):  # at 0 there is a kink
        by_h = np.nan_to_num((h - j * np.cos(k)) / energies)
        by_j = np.nan_to_num((j - h * np.cos(k)) / energies)
    return float(weights @ energies), float(weights @ by_h), float(weights @ by_j)


def _flips_and_diagonal(n_qubits: int) -> np.ndarray:
    """Return the sorted columns of every row, ``(2**n, n + 1)`` int32: its flips and itself.

    The corner ``[: 2**s, : s + 1]`` is the table of ``s`` sites. One more site doubles its rows.
    Flipping the new bit gives the last column where the bit is clear, and the first where it is
    set.
    """
    indices = np.zeros((1 << n_qubits, n_qubits + 1), dtype=np.int32)
    for site in range(n_qubits):
        bit = 1 << site  # its value, and the number of states of the sites before
        rows = np.arange(bit, dtype=np.int32)
        np.add(indices[:bit, : site + 1], bit, out=indices[bit : 2 * bit, 1 : site + 2])
        indices[bit : 2 * bit, 0] = rows
        indices[:bit, site + 1] = rows + bit
    return indices


def _diagonal(n_qubits: int, bonds: Bonds, j: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return ``-sum J_b z_i z_j - sum g_i z_i`` of all basis states, ``(2**n,)`` float64."""
    energies = np.zeros(1 << n_qubits)
    zz = np.outer(_Z, _Z)[:, None, :, None]
    for site in range(n_qubits):
        by_bit = energies.reshape(-1, 2, 1 << site)
        by_bit -= g[site] * _Z[:, None]
    for bond, (low, high) in enumerate(map(sorted, bonds)):
        by_bits = energies.reshape(-1, 2, 1 << (high - low - 1), 2, 1 << low)
        by_bits -= j[bond] * zz
    return energies
