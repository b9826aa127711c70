"""The transverse-field Ising chain: its Hamiltonian as a CSRArray, and its exact ground energy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import CSRArray
from mlx_sparse_nn.core.checks import check_size
from mlx_sparse_nn.core.pattern import CSRPattern

Values: TypeAlias = "float | Sequence[float] | np.ndarray | mx.array"

_MAX_QUBITS = 26  # 2**26 * 27 stored values fit 32-bit indices, 2**27 * 28 do not
_Z = np.array([-1.0, 1.0])  # z of a clear bit, of a set bit


def transverse_field_ising(
    n_qubits: int,
    field: Values,
    *,
    coupling: Values = 1.0,
    longitudinal: Values = 0.0,
    periodic: bool = False,
    dtype: mx.Dtype = mx.float32,
) -> CSRArray:
    r"""Build the Hamiltonian of the transverse-field Ising chain as a sparse array.

    .. math:: H = -\sum_i J_i Z_i Z_{i+1} - \sum_i h_i X_i - \sum_i g_i Z_i

    with Pauli matrices X and Z. Bit ``i`` of the basis index is site ``i``; a set bit means
    z = +1. At g = 0, H does not depend on that choice. The array is real, symmetric and canonical:
    each row holds its ``n_qubits`` single flips and its diagonal, zeros included, by rising column.

    The uniform superposition of all basis states has energy exactly -h per site at g = 0. The
    ground state of the uniform chain with J = 1, h = 0.7 and 8 sites has -1.0382 per site (open) or
    -1.1280 (ring); the often-quoted -1.27 is -4 / pi, the infinite critical chain at h = 1. See
    :func:`exact_ground_energy`.

    Args:
        n_qubits: Number of sites, 1 to 26.
        field: Transverse field h, a number or one per site, in units of energy.
        coupling: Coupling J, a number or one per bond. Bond ``i`` joins sites ``i`` and ``i + 1``;
            there are ``n_qubits - 1``, and on a ring one more, from the last site to site 0.
        longitudinal: Longitudinal field g, a number or one per site.
        periodic: Whether the chain is a ring, which takes at least 3 sites.
        dtype: Floating type or complex64 of the stored values.

    Returns:
        ``(2**n_qubits, 2**n_qubits)`` with ``2**n_qubits * (n_qubits + 1)`` stored values.

    Raises:
        TypeError: ``n_qubits`` is not an integer, a parameter is not real numbers, or ``dtype`` is
            not a floating type or complex64.
        ValueError: ``n_qubits`` is out of range or too small for a ring, a parameter is not finite
            or has the wrong number of values, or the energies overflow ``dtype``.

    Example:
        >>> transverse_field_ising(8, 0.7)
        CSRArray(256 x 256, mlx.core.float32, 2304 stored values, density 0.0352)
    """
    owner = "transverse_field_ising"
    n_qubits = check_chain(owner, n_qubits, periodic)
    if n_qubits > _MAX_QUBITS:
        raise ValueError(
            f"[{owner}] n_qubits {n_qubits} needs 2**{n_qubits} * {n_qubits + 1} stored values; "
            f"at most 2**31 - 1, those of n_qubits {_MAX_QUBITS}, fit 32-bit indices"
        )
    h = check_values(owner, "field", field, n_qubits, "sites")
    n_bonds = n_qubits if periodic else n_qubits - 1
    j = check_values(owner, "coupling", coupling, n_bonds, "bonds")
    g = check_values(owner, "longitudinal", longitudinal, n_qubits, "sites")
    check_dtype(owner, dtype)
    check_energies(owner, h, j, g, dtype)
    # Values and indices, each twice while they are built and copied, as measured.
    n_bytes = (1 << n_qubits) * (n_qubits + 1) * 2 * (max(4, dtype.size) + 4)
    check_memory(owner, f"n_qubits {n_qubits}", n_bytes)

    indices = _flips_and_diagonal(n_qubits)
    n_rows, width = indices.shape
    data = np.empty(indices.shape, dtype=np.float64 if dtype == mx.float64 else np.float32)
    for site, flip in enumerate(0.0 - h):  # not -h, which would store -0.0
        half = 1 << site
        data[half : 2 * half, 1 : site + 2] = data[:half, : site + 1]
        data[half : 2 * half, 0] = data[:half, site + 1] = flip
    data[indices == np.arange(n_rows, dtype=np.int32)[:, None]] = _diagonal(n_qubits, j, g)
    indptr = np.arange(n_rows + 1) * width
    pattern = CSRPattern(indptr, indices.reshape(-1), (n_rows, n_rows))
    return CSRArray(mx.array(data.reshape(-1), dtype=dtype), pattern)


def exact_ground_energy(
    n_qubits: int, field: float, *, coupling: float = 1.0, periodic: bool = False
) -> float:
    r"""Return the lowest eigenvalue of the uniform chain, open or a ring, from free fermions.

    This is the lowest eigenvalue of ``transverse_field_ising(n_qubits, field, ...)`` at g = 0, for
    any sign of h and J. The Jordan-Wigner transformation makes H quadratic in fermions:
    :math:`H = \sum_q \epsilon_q (n_q - 1/2)` with occupations :math:`n_q` of 0 or 1.

    Open chain (Lieb, Schultz and Mattis, section II): :math:`\epsilon_q` is twice a singular value
    of the ``(n, n)`` bidiagonal matrix with h on its diagonal and J above it, and

    .. math:: E_0 = -\frac{1}{2} \sum_q \epsilon_q.

    Ring (Pfeuty): :math:`\epsilon_k = 2 \sqrt{h^2 + J^2 - 2 h J \cos k}`, except that the unpaired
    momenta have a sign, :math:`\epsilon_0 = 2 (h - J)` and :math:`\epsilon_\pi = 2 (h + J)`. States
    of even fermion number live on :math:`k = (2m + 1) \pi / n`, those of odd number on
    :math:`k = 2 m \pi / n`. In either sector

    .. math:: E_0 = -\frac{1}{2} \sum_k |\epsilon_k| + \Delta

    where :math:`\Delta` is 0 if filling the negative :math:`\epsilon_k` gives a number of the
    sector's parity, else the smallest :math:`|\epsilon_k|`, the cost of correcting it. The ground
    energy is the lower of the two sectors, for h, J > 0 the even one.

    E. Lieb, T. Schultz and D. Mattis, Annals of Physics 16 (1961) 407.
    P. Pfeuty, Annals of Physics 57 (1970) 79.

    Args:
        n_qubits: Number of sites. The open chain takes O(n^3) time and O(n^2) memory, the ring
            O(n) of both.
        field: Transverse field h, in units of energy.
        coupling: Coupling J.
        periodic: Whether the chain is a ring, which takes at least 3 sites.

    Returns:
        The energy of the whole chain, accurate to float64 rounding.

    Raises:
        TypeError: ``n_qubits`` is not an integer, or ``field`` or ``coupling`` not a real number.
        ValueError: ``n_qubits`` is below 1, or below 3 for a ring; or a number is not finite.

    Example:
        >>> exact_ground_energy(8, 0.7)
        -8.305610965881469
    """
    owner = "exact_ground_energy"
    n_qubits = check_chain(owner, n_qubits, periodic)
    h = float(check_values(owner, "field", field)[0])
    j = float(check_values(owner, "coupling", coupling)[0])
    if periodic:
        return min(_ring_energy(n_qubits, h, j, parity) for parity in (0, 1))
    bidiagonal = np.diag(np.full(n_qubits, h)) + np.diag(np.full(n_qubits - 1, j), 1)
    return -float(np.linalg.svd(bidiagonal, compute_uv=False).sum())


def _ring_energy(n_qubits: int, h: float, j: float, parity: int) -> float:
    """Return the lowest energy of a ring among the states of even (0) or odd (1) fermion number."""
    steps = 2 * np.arange(n_qubits) + 1 - parity  # k = steps * pi / n
    k = steps * (np.pi / n_qubits)
    half_energies = np.hypot(h - j * np.cos(k), j * np.sin(k))
    filled = (0 in steps and h < j) + (n_qubits in steps and h < -j)
    correction = 0.0 if filled % 2 == parity else 2 * half_energies.min()
    return float(correction - half_energies.sum())


def _flips_and_diagonal(n_qubits: int) -> np.ndarray:
    """Return the sorted columns of all rows, ``(2**n, n + 1)`` int32: the single flips and itself.

    The corner ``[: 2**s, : s + 1]`` is the same table of ``s`` sites. One more site doubles its
    rows: where the new bit is clear, flipping it gives the last column; where it is set, the first.
    """
    indices = np.zeros((1 << n_qubits, n_qubits + 1), dtype=np.int32)
    for site in range(n_qubits):
        half = 1 << site
        rows = np.arange(half, dtype=np.int32)
        np.add(indices[:half, : site + 1], half, out=indices[half : 2 * half, 1 : site + 2])
        indices[half : 2 * half, 0] = rows
        indices[:half, site + 1] = rows + half
    return indices


def _diagonal(n_qubits: int, j: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Return ``-sum J_i z_i z_{i+1} - sum g_i z_i`` of all basis states, ``(2**n,)`` float64."""
    energies = np.zeros(1 << n_qubits)
    zz = np.outer(_Z, _Z)
    for site in range(n_qubits):
        by_bit = energies.reshape(-1, 2, 1 << site)
        by_bit -= g[site] * _Z[:, None]
    for site in range(n_qubits - 1):
        by_bits = energies.reshape(-1, 2, 2, 1 << site)
        by_bits -= j[site] * zz[:, :, None]
    if j.size == n_qubits:
        by_ends = energies.reshape(2, -1, 2)
        by_ends -= j[-1] * zz[:, None, :]
    return energies


def check_chain(owner: str, n_qubits: int, periodic: bool) -> int:
    """Return the number of sites of an open chain or a ring as an int, or raise."""
    n_qubits = check_size(owner, "n_qubits", n_qubits, minimum=1)
    if periodic and n_qubits < 3:
        raise ValueError(f"[{owner}] n_qubits must be at least 3 for a ring, got {n_qubits}")
    return n_qubits


def check_dtype(owner: str, dtype: mx.Dtype) -> None:
    """Raise unless ``dtype`` is a floating type or complex64."""
    if not isinstance(dtype, mx.Dtype) or not mx.issubdtype(dtype, mx.inexact):
        raise TypeError(f"[{owner}] dtype must be a floating type or complex64, got {dtype!r}")


def check_energies(
    owner: str, h: np.ndarray, j: np.ndarray, g: np.ndarray, dtype: mx.Dtype
) -> None:
    """Raise unless the stored values of H fit ``dtype``."""
    # Python's sum goes to infinity without the warning of NumPy's.
    largest = max(np.abs(h).max(), sum(np.abs(np.concatenate([j, g])).tolist()))
    limit = mx.finfo(mx.float32 if dtype == mx.complex64 else dtype).max
    if largest > limit:
        raise ValueError(f"[{owner}] energies of up to {largest:.3g} overflow {dtype}")


def check_memory(owner: str, what: str, n_bytes: int) -> None:
    """Raise if ``n_bytes`` are more than the memory of this machine."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > available:
        raise ValueError(
            f"[{owner}] {what} needs {n_bytes / 2**30:,.2f} GiB, "
            f"this machine has {available / 2**30:,.2f} GiB"
        )


def check_values(
    owner: str, name: str, values: Values, size: int | None = None, of: str = ""
) -> np.ndarray:
    """Return ``values`` as ``(size,)`` float64, a number repeated, or raise; no size: a number."""
    array = np.asarray(values.tolist() if isinstance(values, mx.array) else values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"[{owner}] {name} must be real numbers, got {values!r}")
    if array.ndim and array.shape != (size,):
        expected = "a number" if size is None else f"a number or one for each of {size} {of}"
        raise ValueError(f"[{owner}] {name} must be {expected}, got shape {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"[{owner}] {name} must be finite, got {values!r}")
    return np.broadcast_to(array, (1 if size is None else size,))
