r"""Derivatives of an evolution along tangents: state and tangent evolved as one vector.

The pair of tangent and state follows

.. math:: \begin{pmatrix} \dot\psi \\ \psi \end{pmatrix}' =
    c \begin{pmatrix} H & \dot H \\ 0 & H \end{pmatrix} \begin{pmatrix} \dot\psi \\ \psi
    \end{pmatrix}

This matrix is not Hermitian, so that Arnoldi's method takes the place of Lanczos'. The bound of a
step is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.adjoint import dot
from mlx_sparse_nn.physics.recurrence import Product, Row
from mlx_sparse_nn.physics.steps import ROUNDED

_SIZE = 48  # most products in one step
_GRID = 64  # intervals on which the error of a step is integrated

Pair = tuple[Row, Row]  # tangent, state


def tangents(
    product: Product,
    slope: Callable[[Row], Row],
    pair: Pair,
    times: Sequence[float],
    factor: complex,
    rate: float,
) -> Iterator[Pair]:
    """Yield tangent and state at ascending times >= 0.

    In imaginary time, both are divided by the norm of the state after each step, and the tangent
    loses its real part along the state: what is left is the derivative of the normalised state.

    Args:
        product: Multiplies by H.
        slope: Multiplies by the derivative of H.
        pair: Tangent and state at 0; the state has norm 1, and the tangent about 1 at most.
        times: When.
        factor: c.
        rate: Error of the pair allowed per unit of time.
    """
    now = 0.0
    for time in times:
        while now < time:
            pair, length = _step(product, slope, pair, time - now, factor, rate)
            tangent, state = pair
            if factor.real:
                norm = math.sqrt(dot(state, state))
                tangent, state = tangent / norm, state / norm
                tangent = tangent - state * dot(tangent, state)
            pair, now = (tangent, state), now + length
            if time - now < 1e-14 * time:
                now = time
        yield pair


def _step(
    product: Product,
    slope: Callable[[Row], Row],
    pair: Pair,
    remaining: float,
    factor: complex,
    rate: float,
) -> tuple[Pair, float]:
    """Return the pair after at most ``remaining``, not normalised, and how long that was."""
    size = min(_SIZE, 2 * product.length)
    vectors, norm = _Vectors(product, size), math.sqrt(sum(dot(row, row) for row in pair))
    vectors.append(tuple(row / norm for row in pair))
    projected = np.zeros((size + 1, size))
    while True:
        done = vectors.filled
        tangent, state = vectors.last()
        rest, projected[:done, done - 1] = vectors.orthogonalised(
            (product(tangent) + slope(state), product(state))
        )
        left_out = math.sqrt(sum(dot(row, row) for row in rest))
        if left_out <= 30 * product.epsilon * np.abs(projected).max():
            left_out = 0.0
        length, amplitudes = _longest(
            projected[:done, :done],
            left_out,
            factor,
            remaining,
            rate,
            may_shorten=done == size or left_out == 0,
        )
        if length:
            return vectors.combined(norm * amplitudes), length
        projected[done, done - 1] = left_out
        vectors.append(tuple(row / left_out for row in rest))


class _Vectors:
    """Orthonormal pairs: on a CPU, rows of one NumPy array.

    Args:
        product: Says what rows are.
        size: Most pairs.
    """

    def __init__(self, product: Product, size: int):
        self.product, self.filled = product, 0
        self.pairs: list[Pair] = []
        if product.on_host:
            dtype = np.float64 if product.dtype == mx.float64 else np.float32
            self.rows = np.empty((size, 2, product.length), dtype)

    def append(self, pair: Pair) -> None:
        """Make a pair the next one."""
        if self.product.on_host:
            self.rows[self.filled] = pair
        else:
            self.pairs.append(pair)
        self.filled += 1

    def last(self) -> Pair:
        """Return the last pair."""
        tangent, state = self.rows[self.filled - 1] if self.product.on_host else self.pairs[-1]
        return tangent, state

    def orthogonalised(self, pair: Pair) -> tuple[Pair, np.ndarray]:
        """Return a pair without its part in all others, and the coefficients of that part."""
        if self.product.on_host:
            known, row = self.rows[: self.filled].reshape(self.filled, -1), np.concatenate(pair)
            coefficients = known @ row
            tangent, state = (row - coefficients @ known).reshape(2, -1)
            return (tangent, state), coefficients
        coefficients, (tangent, state) = [], pair
        for a, b in self.pairs:
            part = dot(a, tangent) + dot(b, state)
            tangent, state = tangent - a * part, state - b * part
            coefficients.append(part)
        return (tangent, state), np.array(coefficients)

    def combined(self, amplitudes: np.ndarray) -> Pair:
        """Return the sum of all pairs times complex amplitudes."""
        tangent, state = (
            sum(
                self.product.scaled(pair[i], complex(c))
                for pair, c in zip(
                    self.rows if self.product.on_host else self.pairs, amplitudes, strict=False
                )
            )
            for i in (0, 1)
        )
        return tangent, state


def _longest(
    projected: np.ndarray,
    left_out: float,
    factor: complex,
    remaining: float,
    rate: float,
    may_shorten: bool,
) -> tuple[float, np.ndarray]:
    """Return the longest time within the error bound, and the amplitudes then.

    The time is 0 if the bound does not allow ``remaining``, and no shorter time will do.
    """
    m = projected.shape[0]
    if factor.real:  # relative to what grows fastest, so that nothing overflows
        values = np.linalg.eigvalsh((projected + projected.T) / 2)
        projected = projected - np.eye(m) * values[0 if factor.real < 0 else -1]
    generator = factor * projected
    first = np.eye(m)[:, 0]
    if left_out == 0:
        return remaining, _exp(generator * remaining) @ first
    span = min(remaining, m / max(np.linalg.norm(projected, 2), 1e-300))
    if span < remaining and not may_shorten:
        return 0.0, first
    while True:
        once = _exp(generator * (span / _GRID))
        amplitudes = [first]
        for _ in range(_GRID):
            amplitudes.append(once @ amplitudes[-1])
        norms = np.linalg.norm(amplitudes, axis=1)
        lost = np.abs([a[-1] for a in amplitudes])
        lost = np.where(lost > ROUNDED * norms, lost, 0)
        integral = np.concatenate([[0], np.cumsum((lost[1:] + lost[:-1]) / 2)]) * (span / _GRID)
        times = np.linspace(0, span, _GRID + 1)
        longest = int(np.flatnonzero(left_out * integral <= rate * times * norms)[-1])
        if longest == _GRID or (longest and may_shorten):
            return float(times[longest]), amplitudes[longest]
        if not may_shorten:
            return 0.0, first
        span /= 8


def _exp(matrix: np.ndarray) -> np.ndarray:
    """Return the exponential of a small matrix, by scaling, Taylor's series and squaring."""
    norm = float(np.linalg.norm(matrix, 1))
    halvings = max(0, math.ceil(math.log2(norm)) + 1) if norm > 0 else 0
    matrix = matrix / 2**halvings
    out = term = np.eye(matrix.shape[0], dtype=matrix.dtype)
    for k in range(1, 18):  # 0.5**18 / 18! is below the rounding of float64
        term = term @ matrix / k
        out = out + term
    for _ in range(halvings):
        out = out @ out
    return out
