"""pauli_sum: any model of spins 1/2 from its strings, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.pauli import parts
from mlx_sparse_nn.physics.checks import (
    Values,
    check_parameter,
    check_scalar,
    check_sites,
    check_total,
    known_numbers,
)
from mlx_sparse_nn.physics.pauli import PauliSum, check_operator_size, coefficient_dtype
from mlx_sparse_nn.physics.strings import String, count_y, letters_of, merged, string_of

Rows: TypeAlias = "Sequence[Sequence[Any]] | tuple[Values, Sequence[Any] | np.ndarray]"


def pauli_sum(
    terms: Mapping[str, Rows], n_qubits: int, *, dtype: mx.Dtype = mx.float32
) -> PauliSum:
    r"""Build a Hamiltonian of Pauli strings as a linear map: ``H @ psi``, no matrix stored.

    .. math:: H = \sum_t c_t P_t, \qquad \text{such as } c\, Z_0 Z_1 \text{ or } c\, X_0 Y_1 Z_2

    Coefficients have their own sign: unlike :func:`transverse_field_ising`, no minus is put before.
    Bit i of the basis index is site i, and a set bit means z = +1. X exchanges a set and a clear
    bit, and Y = i X Z: on a set bit it gives i times the clear one, on a clear bit -i times the set
    one. These are the Pauli matrices of textbooks, whose first state, up, is the set bit here.

    Strings with an odd number of Y are imaginary. Where there are any, the operator is complex64;
    else it is real.

    Args:
        terms: Strings by their letters, X, Y and Z, as a list of ``(coefficient, site, ...)`` with
            a site for each letter; or as a pair ``(coefficients, places)``: a number or an array of
            one for each place, and a list of sites or of tuples of sites, such as the bonds of
            :func:`ring`. ``""`` has no sites, and is a constant. Coefficients are real, in units of
            energy: numbers, or scalars of MLX, which may be tracers. Equal strings add up.
        n_qubits: Number of sites, 1 to 30.
        dtype: Floating type or complex64. Coefficients are stored in float64 if it is float64, and
            in float32 otherwise. With an odd number of Y it becomes complex64.

    Returns:
        The :class:`PauliSum`. It is Hermitian.

    Raises:
        TypeError: ``terms`` is not such a mapping, a coefficient is not a real number, a site is
            not an integer, or ``dtype`` is not a floating type or complex64.
        ValueError: A letter is unknown; a string has too few or too many sites, or one of them
            twice or out of range; ``n_qubits`` is out of range or too large for the memory of this
            machine; coefficients are not finite, or add up to what overflows ``dtype``; or
            ``dtype`` is float64 and a string imaginary. The values of MLX arrays are not checked:
            they may be tracers.

    Example:
        >>> bonds = ring(4)
        >>> H = pauli_sum({"XX": (1.0, bonds), "YY": (1.0, bonds), "ZZ": (1.0, bonds)}, 4)
        >>> lanczos(H).energies
        array([-8], dtype=float32)
        >>> pauli_sum({"XY": [(0.5, 0, 1)], "YX": [(-0.5, 0, 1)]}, 2)
        PauliSum(4 x 4, mlx.core.complex64, 2 strings on 2 sites: 1 YX, 1 XY)
    """
    owner = "pauli_sum"
    n_qubits = check_operator_size(owner, n_qubits, dtype)
    if not isinstance(terms, Mapping):
        raise TypeError(
            f'[{owner}] terms must be a dict such as {{"ZZ": [(J, 0, 1)], "X": [(h, 0)]}}, got '
            f"{type(terms).__name__}"
        )
    real = coefficient_dtype(dtype)
    found = [
        (string, value)
        for letters, rows in terms.items()
        for string, value in _strings(owner, letters, rows, n_qubits, real)
    ]
    check_total(owner, [c for _, c in found if isinstance(c, float)], dtype)
    imaginary = next((string for string, _ in found if count_y(string) % 2), None)
    if imaginary is not None:
        if dtype == mx.float64:
            raise ValueError(
                f"[{owner}] dtype must be complex64 for {letters_of(imaginary)} strings, which are "
                "imaginary, got float64, which MLX has no complex type of"
            )
        dtype = mx.complex64
    return PauliSum._of(n_qubits, *merged(found, real), dtype)


def _strings(
    owner: str, letters: Any, rows: Any, n_qubits: int, dtype: mx.Dtype
) -> Iterator[tuple[String, float | mx.array]]:
    """Yield every string of such letters with its coefficient: a number or a ``(1,)`` array."""
    if not isinstance(letters, str) or set(letters) - set("XYZ"):
        raise ValueError(
            f"[{owner}] terms must have keys of the letters X, Y and Z, got {letters!r}; sites "
            'without a letter are left out, and "" is a constant'
        )
    name, size = f"terms[{letters!r}]", len(letters)
    if isinstance(rows, list):
        found = _of_rows(owner, name, rows, size, n_qubits, dtype)
    elif isinstance(rows, tuple) and len(rows) == 2 and hasattr(rows[1], "__len__"):
        found = _at_places(owner, name, *rows, size, n_qubits, dtype)
    else:
        raise TypeError(
            f"[{owner}] {name} must be a list of (coefficient, site, ...), or a tuple of "
            f"coefficients and a list of places, got {rows!r}"
        )
    for sites, number in found:
        yield string_of(letters, sites), number


def _of_rows(
    owner: str, name: str, rows: list, size: int, n_qubits: int, dtype: mx.Dtype
) -> Iterator[tuple[tuple[int, ...], float | mx.array]]:
    """Yield the sites and the coefficient of each ``(coefficient, site, ...)``."""
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) != 1 + size:
            sites = "1 site" if size == 1 else f"{size} sites"
            raise ValueError(
                f"[{owner}] {name}[{i}] must be a coefficient and {sites}, got {row!r}"
            )
        sites = check_sites(owner, f"{name}[{i}]", row[1:], size, n_qubits)
        number = check_scalar(owner, f"{name}[{i}][0]", row[0], dtype)
        yield sites, number.reshape(1) if isinstance(number, mx.array) else number


def _at_places(
    owner: str, name: str, values: Values, places: Any, size: int, n_qubits: int, dtype: mx.Dtype
) -> Iterator[tuple[tuple[int, ...], float | mx.array]]:
    """Yield the sites of each place, and one coefficient for all or one each."""
    if not isinstance(places, list | range | np.ndarray):  # not rows in a tuple
        raise TypeError(f"[{owner}] {name}[1] must be a list of places, got {places!r}")
    n = len(places)
    array = check_parameter(owner, f"{name}[0]", values, n, "places", dtype)
    known = known_numbers(values, n)
    numbers = known if len(known) == n else parts(mx.broadcast_to(array, (n,)))
    for i, (place, number) in enumerate(zip(places, numbers, strict=True)):
        sites = (place,) if isinstance(place, int | np.integer) else place
        yield check_sites(owner, f"{name}[1][{i}]", sites, size, n_qubits), number
