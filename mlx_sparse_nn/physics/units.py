"""Hamiltonians in a unit near their norm, so that no square over- or underflows."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.physics.precision import largest_part

_ORDINARY = 16  # a norm of 2**-16 to 2**16 needs no other unit: its fourth power fits float32


class Scaled:
    """``H / 2**exponent``, which has a norm near 1.

    Powers of two change no digit. The vector takes one half of the power and the product the other:
    with H at 1e30, a vector over 1e30 would have amplitudes too small for float32.

    Args:
        H: ``(dim, dim)``, as of :func:`in_own_unit`.
        exponent: The unit is ``2**exponent``, in that of H.

    Attributes:
        H: As given.
        exponent: As given.
        shape: ``(dim, dim)``.
    """

    def __init__(self, H: Any, exponent: int):
        self.H, self.exponent = H, exponent
        self.shape = tuple(H.shape)

    @property
    def dtype(self) -> mx.Dtype:
        """That of H, or float32 where it says none."""
        dtype = getattr(self.H, "dtype", None)
        return dtype if isinstance(dtype, mx.Dtype) else mx.float32

    def __matmul__(self, x: mx.array) -> mx.array:
        """Return the product with ``(dim,)``."""
        before = -(self.exponent // 2)
        return times_power(self.H @ times_power(x, before), -self.exponent - before)

    def to_own(self, energy: mx.array) -> mx.array:
        """Return an energy of this unit in that of H."""
        half = self.exponent // 2  # 2**exponent itself may not fit float32
        return times_power(times_power(energy, half), self.exponent - half)


def in_own_unit(owner: str, H: Any, x: mx.array) -> tuple[Scaled, mx.array]:
    """Return H in a unit near its norm, judged by its product with one vector, and that product.

    Args:
        owner: The public function, for errors.
        H: ``(dim, dim)``: any object whose ``H @ x`` is an MLX array.
        x: ``(dim,)`` random numbers of about 1.

    Returns:
        H in that unit, and what it makes of ``x``, ``(dim,)``.

    Raises:
        TypeError: ``H @ x`` is not an MLX array.
        ValueError: ``H @ x`` has another shape than ``x``, or is not finite.
    """
    step = 512 if x.dtype == mx.float64 else 64  # half of the powers that numbers have
    power = 0
    product, largest = _product(owner, H, x)
    if not math.isfinite(largest):
        power = -step
    elif largest < 2.0**-step:
        power = step
    if power:  # what was lost in the product is there in that of a scaled vector
        product, largest = _product(owner, H, times_power(x, power))
    if not math.isfinite(largest):
        raise ValueError(f"[{owner}] H @ x is not finite")
    exponent = math.frexp(largest)[1] - power if largest else 0  # frexp: largest < 2**exponent
    exponent = 0 if abs(exponent) <= _ORDINARY else exponent
    return Scaled(H, exponent), times_power(product, -exponent - power)


def _product(owner: str, H: Any, x: mx.array) -> tuple[mx.array, float]:
    """Return ``H @ x``, checked, and its largest magnitude, which may be infinite or nan."""
    product = H @ x
    if not isinstance(product, mx.array):
        raise TypeError(f"[{owner}] H @ x must be an mx.array, got {type(product).__name__}")
    if product.shape != x.shape:
        raise ValueError(f"[{owner}] H @ x has shape {product.shape}, x has {x.shape}")
    return product, float(largest_part(product))


def times_power(x: mx.array, power: int) -> mx.array:
    """Return ``x * 2**power``, exactly if the result fits its dtype."""
    if not power:
        return x
    real = mx.float64 if x.dtype == mx.float64 else mx.float32
    return x * mx.array(2.0**power, dtype=real)
