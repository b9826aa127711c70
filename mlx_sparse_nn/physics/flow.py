"""An evolution: its times, its precision, and how its states are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.adjoint import weighted
from mlx_sparse_nn.physics.checks import (
    check_hermitian,
    check_magnitude,
    check_memory,
    check_tol,
)
from mlx_sparse_nn.physics.krylov import Normals
from mlx_sparse_nn.physics.parameters import parameters, reading
from mlx_sparse_nn.physics.precision import work_dtype
from mlx_sparse_nn.physics.recurrence import Product, Row
from mlx_sparse_nn.physics.steps import Steps
from mlx_sparse_nn.physics.units import times_power

_FOR_LESS = "; give H in float64, on the CPU, for more digits"
_FEWEST, _MOST = 30, 96  # vectors of a Krylov space; between them, as many as fit into
_SMALL = 512  # dimension: float64 then takes hardly longer on a CPU, and keeps all phases
_BASIS = 2**28  # bytes
_NOTHING = 0.8  # error of a state of which rounding leaves nothing


class Flow:
    """The states at some times, of a Hamiltonian and a state to be given.

    Args:
        owner: The public function, for errors.
        H: ``(dim, dim)``.
        psi: ``(dim,)``.
        times: ``(K,)`` float64, in any order.
        imaginary: Whether time is.
        tol: Error allowed, or None for 1e-6, or 1e-10 in float64.

    Attributes:
        dtype: Of the states: complex64 in real time.
        times: As given.
        imaginary: As given.
    """

    def __init__(
        self,
        owner: str,
        H: Any,
        psi: mx.array,
        times: np.ndarray,
        imaginary: bool,
        tol: float | None,
    ):
        self.owner, self.dim, self.times, self.imaginary = owner, psi.size, times, imaginary
        self.dtype = work_dtype(H, psi) if imaginary else mx.complex64
        self._is_complex = self.dtype == mx.complex64
        # A user's object may take no float64, or give none.
        known = bool(parameters(H)[0])
        wide = self.dtype == mx.float64 or (known and work_dtype(H) == mx.float64)
        is_small = known and self.dim <= _SMALL and work_dtype(H) == mx.float32
        in_float64 = wide or (is_small and _is_on_host(mx.float32))
        self._real = mx.float64 if in_float64 else mx.float32
        self._on_host = _is_on_host(self._real)
        self.device = mx.cpu if self._on_host else mx.default_device()
        self._is_asked = tol is not None
        self.tol = check_tol(owner, (1e-10 if wide else 1e-6) if tol is None else tol, 1e-14)
        row = self._real.size * (1 + self._is_complex) * self.dim  # bytes
        self._size = min(self.dim, max(_FEWEST, min(_MOST, _BASIS // row)))
        what = f"a basis of {self._size + 1} vectors of {self.dim}"
        check_memory(owner, what, (self._size + 8 + times.size) * row)

    def product(self, H: Any) -> Product:
        """Return what multiplies rows by H, in its own unit, or raise unless it is Hermitian."""
        with mx.stream(self.device), reading(self.owner, "H"):
            # Only H is checked, so any fixed seed will do.
            scaled = check_hermitian(self.owner, H, Normals(self.dim, work_dtype(H), seed=0))
            return Product(scaled, self._is_complex, self._real, self._on_host)

    def states(self, product: Product, psi: mx.array) -> mx.array:
        """Return the states, ``(K, dim)``."""
        with mx.stream(self.device):
            unit, norm = self.unit(product, psi)
            rows: list[Row] = [unit] * self.times.size
            for factor, order, distances in self.sides(product):
                steps = self.steps(product, factor, distances)
                some = steps.through(unit, distances, self.tol if self._is_asked else _NOTHING)
                for i, row in zip(order, some, strict=False):
                    rows[i] = row
                self._check_rounding(steps.rounding())
            return mx.stack([self.array(product, row, norm) for row in rows])

    def unit(self, product: Product, psi: mx.array) -> tuple[Row, float]:
        """Return a state as a row of norm 1, and its norm, or raise if it is 0 or not finite."""
        check_magnitude(self.owner, "psi", psi)
        vector = weighted(product.from_array(psi))
        assert vector is not None
        return vector

    def array(self, product: Product, row: Row, norm: float) -> mx.array:
        """Return a row as a state ``(dim,)``, in real time times the norm that it began with."""
        out = product.to_array(row).astype(self.dtype)
        if self.imaginary:
            return out
        fraction, power = math.frexp(norm)
        return times_power(out * fraction, power)

    def sides(self, product: Product) -> Iterator[tuple[complex, list[int], list[float]]]:
        """Yield, of positive and of negative times, the factor c of ``psi' = c H psi``, which times
        these are, by their distance from 0, and that distance in the inverse unit of H."""
        for sign in (1, -1):
            some = np.flatnonzero(sign * self.times > 0)
            if some.size:
                order = some[np.argsort(np.abs(self.times[some]), kind="stable")].tolist()
                distances = [
                    math.ldexp(abs(float(self.times[i])), product.H.exponent) for i in order
                ]
                yield (-sign + 0j if self.imaginary else -1j * sign), order, distances

    def steps(self, product: Product, factor: complex, distances: Sequence[float]) -> Steps:
        """Return what takes steps as far as ``distances`` go."""
        return Steps(product, factor, self.tol, distances[-1], self._size)

    def _check_rounding(self, least: float) -> None:
        """Raise if a smaller error was asked for than rounding leaves, or if that is everything."""
        wide = self._real == mx.float64
        dtype, more = (mx.float64, "") if wide else (self.dtype, _FOR_LESS)
        if least > _NOTHING:
            longest = float(np.abs(self.times).max())
            raise ValueError(
                f"[{self.owner}] t must be shorter, got {longest:.3g}: over this time, {dtype} "
                f"rounds off the whole state{more}"
            )
        if self._is_asked and self.tol < least:
            least = max(1e-14, 1.25 * least)  # more than steps with another tol will see
            digit = 10.0 ** (math.floor(math.log10(least)) - 1)
            least = math.ceil(least / digit) * digit
            raise ValueError(
                f"[{self.owner}] tol must be at least {least:.2g}, which {dtype} rounds off "
                f"over this time, got {self.tol}{more}"
            )


def _is_on_host(dtype: mx.Dtype) -> bool:
    """Return whether rows of a dtype are NumPy's."""
    return dtype == mx.float64 or mx.default_device().type == mx.cpu
