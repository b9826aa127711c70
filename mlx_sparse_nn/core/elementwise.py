"""The functions of each value that leave zero at zero, by SciPy's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Elementwise:
    """What sparse arrays have of them: each gives an array of the same places."""

    def map_values(self, function: Callable[[mx.array], mx.array]) -> Any:
        """Return a matrix of what ``function`` makes of the stored values, repeated ones summed."""
        raise NotImplementedError

    def abs(self) -> Any:
        """Return absolute values; of complex numbers, real ones."""
        return self.map_values(mx.abs)

    __abs__ = abs

    def sqrt(self) -> Any:
        """Return square roots."""
        return self.map_values(mx.sqrt)

    def sign(self) -> Any:
        """Return signs: -1, 0 or 1."""
        return self.map_values(mx.sign)

    def sin(self) -> Any:
        """Return sines."""
        return self.map_values(mx.sin)

    def tan(self) -> Any:
        """Return tangents."""
        return self.map_values(mx.tan)

    def arcsin(self) -> Any:
        """Return inverse sines."""
        return self.map_values(mx.arcsin)

    def arctan(self) -> Any:
        """Return inverse tangents."""
        return self.map_values(mx.arctan)

    def sinh(self) -> Any:
        """Return hyperbolic sines."""
        return self.map_values(mx.sinh)

    def tanh(self) -> Any:
        """Return hyperbolic tangents."""
        return self.map_values(mx.tanh)

    def arcsinh(self) -> Any:
        """Return inverse hyperbolic sines."""
        return self.map_values(mx.arcsinh)

    def arctanh(self) -> Any:
        """Return inverse hyperbolic tangents."""
        return self.map_values(mx.arctanh)

    def expm1(self) -> Any:
        """Return ``exp(x) - 1``, precise near 0; of complex numbers, too."""
        return self.map_values(_expm1)

    def log1p(self) -> Any:
        """Return ``log(1 + x)``."""
        return self.map_values(mx.log1p)

    def floor(self) -> Any:
        """Return values rounded down."""
        return self.map_values(mx.floor)

    def ceil(self) -> Any:
        """Return values rounded up."""
        return self.map_values(mx.ceil)

    def rint(self) -> Any:
        """Return values rounded to the nearest whole number."""
        return self.map_values(mx.round)

    def __round__(self, decimals: int = 0) -> Any:
        """Return values rounded to so many decimals."""
        return self.map_values(lambda a: mx.round(a, decimals))

    def trunc(self) -> Any:
        """Return values rounded towards zero."""
        return self.map_values(lambda a: mx.sign(a) * mx.floor(mx.abs(a)))

    def deg2rad(self) -> Any:
        """Return degrees as radians."""
        return self.map_values(mx.radians)

    def rad2deg(self) -> Any:
        """Return radians as degrees."""
        return self.map_values(mx.degrees)


def _expm1(z: mx.array) -> mx.array:
    """Return ``exp(z) - 1``: MLX's own (0.32.4) is wrong for complex numbers."""
    if z.dtype != mx.complex64:
        return mx.expm1(z)
    x, y = mx.real(z), mx.imag(z)
    # cos(y) - 1 = -2 sin(y / 2)^2
    return mx.expm1(x) * mx.cos(y) - 2 * mx.sin(y / 2) ** 2 + 1j * (mx.exp(x) * mx.sin(y))
