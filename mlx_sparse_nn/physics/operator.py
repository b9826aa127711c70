"""IsingOperator: the Hamiltonian of the Ising chain, applied without being stored."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import ArrayLike, check_data
from mlx_sparse_nn.physics.checks import (
    Values,
    check_chain,
    check_dtype,
    check_energies,
    check_memory,
    check_parameter,
)

_MAX_QUBITS = 30  # the length of an axis of MLX is an int32


class IsingOperator:
    r"""The transverse-field Ising Hamiltonian as a linear map: ``H @ psi``, no matrix stored.

    .. math:: H = -\sum_i J_i Z_i Z_{i+1} - \sum_i h_i X_i - \sum_i g_i Z_i

    This is the matrix of :func:`transverse_field_ising`, to rounding, in O(2^n) memory instead of
    O(n 2^n). It stores the diagonal, and applies every flip X_i as a reversed axis of length 2. All
    operations are plain lazy MLX: the product is differentiable to any order in the state, and in
    J, h and g if they are MLX arrays. It works in ``vmap`` and ``compile``, on any device.

    Args:
        n_qubits: Number of sites, 1 to 30.
        field: Transverse field h, a number or one per site, in units of energy. A number is
            faster.
        coupling: Coupling J, a number or one per bond: ``n_qubits - 1``, and one more on a ring.
        longitudinal: Longitudinal field g, a number or one per site.
        periodic: Whether the chain is a ring, which takes at least 3 sites.
        dtype: Floating type or complex64 of the matrix. J, h and g are stored in float64 if
            ``dtype`` is float64, and in float32 otherwise.

    Attributes:
        field: h, ``()`` or ``(n_qubits,)``.
        coupling: J, ``()`` or one per bond.
        longitudinal: g, ``()`` or ``(n_qubits,)``.

    Raises:
        TypeError: ``n_qubits`` is not an integer, a parameter is not real numbers, or ``dtype`` is
            not a floating type or complex64.
        ValueError: ``n_qubits`` is out of range, too small for a ring or too large for the memory
            of this machine, or a parameter has the wrong number of values, is not finite or
            overflows ``dtype``. The values of an MLX array are not checked: it may be a tracer.

    Example:
        >>> H = IsingOperator(8, 0.7)
        >>> expectation(H, mx.ones(256))
        array(-5.6, dtype=float32)
    """

    # Makes NumPy leave `x @ H` to H, which has no such product. It would loop over objects.
    __array_ufunc__ = None

    def __init__(
        self,
        n_qubits: int,
        field: Values,
        *,
        coupling: Values = 1.0,
        longitudinal: Values = 0.0,
        periodic: bool = False,
        dtype: mx.Dtype = mx.float32,
    ):
        owner = "IsingOperator"
        n_qubits, n_bonds = check_chain(owner, n_qubits, periodic)
        check_dtype(owner, dtype)
        if n_qubits > _MAX_QUBITS:
            raise ValueError(
                f"[{owner}] n_qubits {n_qubits} needs 2**{n_qubits} amplitudes of {dtype.size} "
                f"bytes; at most 2**{_MAX_QUBITS} fit an axis of MLX"
            )
        real = mx.float64 if dtype == mx.float64 else mx.float32
        # The diagonal, a state, its product, and one state in between.
        n_bytes = (1 << n_qubits) * 4 * max(real.size, dtype.size)
        check_memory(owner, f"n_qubits {n_qubits}", n_bytes)
        self.n_qubits = n_qubits
        self.periodic = bool(periodic)
        self._dtype = dtype
        self.field = check_parameter(owner, "field", field, n_qubits, "sites", real)
        self.coupling = check_parameter(owner, "coupling", coupling, n_bonds, "bonds", real)
        self.longitudinal = check_parameter(
            owner, "longitudinal", longitudinal, n_qubits, "sites", real
        )
        h, j, g = (
            _host_values(values, size)
            for values, size in ((field, n_qubits), (coupling, n_bonds), (longitudinal, n_qubits))
        )
        check_energies(owner, h, j, g, dtype)
        self._diagonal = self._make_diagonal(n_bonds)

    @property
    def shape(self) -> tuple[int, int]:
        """``(2**n_qubits, 2**n_qubits)``."""
        return (1 << self.n_qubits, 1 << self.n_qubits)

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> mx.Dtype:
        return self._dtype

    def diagonal(self) -> mx.array:
        """Return the diagonal, ``(2**n_qubits,)`` of ``dtype``."""
        return self._diagonal.astype(self._dtype)

    def __matmul__(self, x: ArrayLike) -> mx.array:
        """Return ``H @ x``.

        Args:
            x: ``(2**n,)``, ``(2**n, p)`` or any ``(..., 2**n, p)``.

        Returns:
            An array of the shape of ``x`` and the promoted dtype. 16-bit types are computed in
            float32.
        """
        x = check_data("H @ x", x)
        inner = x.shape[-1 if x.ndim == 1 else -2] if x.ndim else None
        if inner != self.shape[1]:
            raise ValueError(
                f"[H @ x] H is {self.shape}, x has shape {x.shape}: inner sizes differ"
            )
        if x.ndim == 1:
            return self._apply(x)
        return self._apply(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def _arrays(self) -> list[mx.array]:
        """Return h, J and g: what the operator depends on."""
        return [self.field, self.coupling, self.longitudinal]

    def _with_arrays(self, arrays: Sequence[mx.array]) -> IsingOperator:
        """Return the same operator with other h, J and g, of the same shapes and dtypes."""
        other = copy.copy(self)
        other.field, other.coupling, other.longitudinal = arrays
        other._diagonal = other._make_diagonal(self.n_qubits - (not self.periodic))
        return other

    def __repr__(self) -> str:
        chain = "ring" if self.periodic else "open chain"
        return (
            f"IsingOperator({self.shape[0]} x {self.shape[1]}, {self.dtype}, "
            f"{chain} of {self.n_qubits} sites)"
        )

    def _apply(self, x: mx.array) -> mx.array:
        """Return the product with ``(..., 2**n)``."""
        dtype = mx.result_type(mx.zeros(0, self._dtype), x)
        shape = x.shape
        x = x.astype(mx.result_type(mx.zeros(0, dtype), mx.float32))
        y = self._diagonal * x
        if self.field.ndim == 0:
            scaled = [self.field * x] * self.n_qubits
        else:
            scaled = [h * x for h in _parts(self.field)]
        for site, flipped in enumerate(scaled):
            by_bit = (-1, 2, 1 << site)
            y = y.reshape(by_bit) - flipped.reshape(by_bit)[:, ::-1]
        return y.reshape(shape).astype(dtype)

    def _make_diagonal(self, n_bonds: int) -> mx.array:
        """Return ``-sum J_i z_i z_{i+1} - sum g_i z_i`` of every basis state, ``(2**n,)``.

        One more site doubles the states, so all sites together cost O(2^n).
        """
        j = _parts(mx.broadcast_to(self.coupling, (n_bonds,)))
        g = _parts(mx.broadcast_to(self.longitudinal, (self.n_qubits,)))
        z = mx.array([-1.0, 1.0], dtype=self.field.dtype)  # of a clear bit, of a set bit
        zz = z[:, None] * z
        energies = 0 - g[0] * z  # not -g * z, which makes -0.0
        for site in range(1, self.n_qubits):
            added = g[site] * z[:, None] + j[site - 1] * zz  # (new bit, bit below)
            energies = (energies.reshape(1, 2, -1) - added[:, :, None]).reshape(-1)
        if self.periodic:
            ends = j[self.n_qubits - 1] * zz[:, None, :]
            energies = (energies.reshape(2, -1, 2) - ends).reshape(-1)
        return energies


def _parts(values: mx.array) -> list[mx.array]:
    """Return the elements, ``(1,)`` each. Indexing would gather, which has no second derivative."""
    return list(mx.split(values, values.size)) if values.size else []


def _host_values(values: Values, size: int) -> np.ndarray:
    """Return values as ``(size,)`` float64. An MLX array may be a tracer and counts as zeros."""
    host = 0.0 if isinstance(values, mx.array) else values
    return np.broadcast_to(np.asarray(host, dtype=np.float64), (size,))
