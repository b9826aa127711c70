"""IsingOperator: the transverse-field Ising Hamiltonian, applied without being stored."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_sparse_nn.physics.checks import (
    Pairs,
    Values,
    check_bonds,
    check_chain,
    check_flag,
    check_parameter,
    check_total,
    known_numbers,
)
from mlx_sparse_nn.physics.lattices import Bonds, chain, ring
from mlx_sparse_nn.physics.pauli import PauliSum, check_operator_size, coefficient_dtype


class IsingOperator(PauliSum):
    r"""The transverse-field Ising Hamiltonian as a linear map: ``H @ psi``, no matrix stored.

    .. math:: H = -\sum_{(i, j)} J_{ij} Z_i Z_j - \sum_i h_i X_i - \sum_i g_i Z_i

    This is the matrix of :func:`transverse_field_ising`, to rounding, in O(2^n) memory instead of
    O(n 2^n): it stores the diagonal, and flips bits. The product is differentiable to any order in
    the state, and in J, h and g if they are MLX arrays. It works in ``vmap`` and ``compile``, on
    any device. Sums with other operators, and multiples, are a :class:`PauliSum`.

    Args:
        n_qubits: Number of sites, 1 to 30.
        field: Transverse field h, a number or one per site, in units of energy.
        coupling: Coupling J, a number or one per bond, in their order.
        longitudinal: Longitudinal field g, a number or one per site.
        periodic: Whether the chain is a ring, which takes at least 3 sites.
        bonds: Pairs of different sites, each once, in place of those of a chain: ``ladder(4)``,
            ``square(3, 3)``, or any list.
        dtype: Floating type or complex64 of the matrix. J, h and g are stored in float64 if
            ``dtype`` is float64, and in float32 otherwise.

    Attributes:
        field: h, ``()`` or ``(n_qubits,)``.
        coupling: J, ``()`` or one per bond.
        longitudinal: g, ``()`` or ``(n_qubits,)``.
        bonds: Pairs of sites.

    Raises:
        TypeError: ``n_qubits`` or a site is not an integer, a parameter is not real numbers, or
            ``dtype`` is not a floating type or complex64.
        ValueError: ``n_qubits`` is out of range, too small for a ring or too large for the memory
            of this machine; ``bonds`` are given for a ring too, one is given twice, or its sites
            are equal or out of range; or a parameter has the wrong number of values, is not finite,
            or all add up to what overflows ``dtype``. The values of MLX arrays are not checked:
            they may be tracers.

    Example:
        >>> H = IsingOperator(8, 0.7)
        >>> expectation(H, mx.ones(256))
        array(-5.6, dtype=float32)
        >>> lanczos(IsingOperator(3, 0.0, coupling=-1.0, bonds=ring(3)), k=6).energies
        array([-1, -1, -1, -1, -1, -1], dtype=float32)
    """

    def __init__(
        self,
        n_qubits: int,
        field: Values,
        *,
        coupling: Values = 1.0,
        longitudinal: Values = 0.0,
        periodic: bool = False,
        bonds: Pairs | None = None,
        dtype: mx.Dtype = mx.float32,
    ):
        owner = "IsingOperator"
        n_qubits = check_operator_size(owner, n_qubits, dtype)
        self.periodic = bool(periodic)
        self.bonds = bonds_of(owner, n_qubits, periodic, bonds)
        n_bonds = len(self.bonds)
        real = coefficient_dtype(dtype)
        self.field = check_parameter(owner, "field", field, n_qubits, "sites", real)
        self.coupling = check_parameter(owner, "coupling", coupling, n_bonds, "bonds", real)
        self.longitudinal = check_parameter(
            owner, "longitudinal", longitudinal, n_qubits, "sites", real
        )
        numbers = known_numbers(field, n_qubits) + known_numbers(coupling, n_bonds)
        check_total(owner, numbers + known_numbers(longitudinal, n_qubits), dtype)
        sites = [1 << site for site in range(n_qubits)]
        strings = [
            *((0, 1 << i | 1 << j) for i, j in self.bonds),
            *((0, z) for z in sites),
            *((x, 0) for x in sites),
        ]
        coefficients = [
            mx.broadcast_to(0 - values, (size,))  # not -values, which makes -0.0
            for values, size in (
                (self.coupling, n_bonds),
                (self.longitudinal, n_qubits),
                (self.field, n_qubits),
            )
        ]
        self._set(n_qubits, strings, mx.concatenate(coefficients), dtype)

    def __repr__(self) -> str:
        lattice = "ring" if self.periodic else "open chain"
        if not self.periodic and self.bonds != chain(self.n_qubits):
            lattice = f"{len(self.bonds)} bonds"
        return (
            f"IsingOperator({self.shape[0]} x {self.shape[1]}, {self.dtype}, "
            f"{lattice} of {self.n_qubits} sites)"
        )

    def _arrays(self) -> list[mx.array]:
        """Return h, J and g: what the operator depends on."""
        return [self.field, self.coupling, self.longitudinal]

    def _with_arrays(self, arrays: Sequence[mx.array]) -> IsingOperator:
        """Return the same operator with other h, J and g, of the same shapes."""
        field, coupling, longitudinal = arrays
        return IsingOperator(
            self.n_qubits,
            field,
            coupling=coupling,
            longitudinal=longitudinal,
            periodic=self.periodic,
            bonds=None if self.periodic else self.bonds,
            dtype=self._dtype,
        )


def bonds_of(owner: str, n_qubits: int, periodic: bool, bonds: Pairs | None) -> Bonds:
    """Return the bonds of an open chain, of a ring, or those given, or raise."""
    check_flag(owner, "periodic", periodic)
    if bonds is None:
        check_chain(owner, n_qubits, periodic)
        return ring(n_qubits) if periodic else chain(n_qubits)
    if periodic:
        raise ValueError(
            f"[{owner}] periodic must be False where bonds are given, got {periodic!r}; ring(n) "
            "gives those of a ring"
        )
    return check_bonds(owner, bonds, n_qubits)
