"""How precisely states are computed: their dtype, rounding and range, and the order of sums."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core.transforms import transforming


def work_dtype(H: Any, v: mx.array | None = None) -> mx.Dtype:
    """Return the dtype of ``H @ v``, at least float32."""
    dtype = getattr(H, "dtype", mx.float32)
    if not isinstance(dtype, mx.Dtype):
        dtype = mx.float32
    operands = [mx.zeros(0, dtype)] + ([] if v is None else [v])
    return mx.result_type(*operands, mx.float32)


def epsilon(dtype: mx.Dtype) -> float:
    """Return the relative rounding of float64, or of float32 for every other dtype."""
    return 2.0**-52 if dtype == mx.float64 else 2.0**-23


def identity(n: int, dtype: mx.Dtype) -> mx.array:
    """Return ``mx.eye(n, dtype=dtype)``, of which MLX (0.32.4) makes no complex one on a GPU."""
    return mx.eye(n).astype(dtype)


def parts_of(x: mx.array) -> list[mx.array]:
    """Return the real part, and the imaginary one of a complex array."""
    return [mx.real(x), mx.imag(x)] if x.dtype == mx.complex64 else [x]


def largest_part(x: mx.array) -> mx.array:
    """Return the largest magnitude of real and imaginary parts, ``()``.

    That of a complex number is a root of squares, which some GPUs lose at 1e-30.
    """
    return mx.stack([mx.abs(part).max() for part in parts_of(x)]).max()


def power_of_two(largest: mx.array) -> mx.array:
    """Return the power of two that brings a magnitude, ``()``, to [1/2, 1); for 0, it is 1.

    Products with it are exact. Neither it nor its inverse leaves the normal numbers, so what is
    nearly too large or too small for the dtype ends in [2**-23, 4). Transforms take it for a
    constant.
    """
    wide = largest.dtype == mx.float64
    integer, mantissa, last = (mx.int64, 52, 0x7FF) if wide else (mx.int32, 23, 0xFF)
    shift = mx.array(mantissa, integer)
    exponent = mx.right_shift(mx.view(mx.stop_gradient(largest), integer), shift)
    inverse = mx.clip(last - 2 - exponent, 1, last - 2).astype(integer)
    power = mx.view(mx.left_shift(inverse, shift), largest.dtype)
    return mx.where(largest == 0, mx.array(1, largest.dtype), power)


def times_real(x: mx.array, factor: mx.array) -> mx.array:
    """Return an array times a real number, ``()``.

    Where no rule for derivatives is needed, a complex array is taken for one of twice as many real
    numbers: on the CPU, MLX (0.32.4) needs 20 times as long for complex products.
    """
    if x.dtype == mx.complex64 and not transforming():
        return mx.view(mx.view(x, mx.float32) * factor, mx.complex64)
    return x * factor


def pairwise_sum(terms: mx.array) -> mx.array:
    """Return the sum of ``(n, ...)`` terms over the first axis, by pairwise summation.

    On the CPU, MLX's own sum adds one term after another: 2**18 terms may leave an error of 2e-3.
    """
    while terms.shape[0] > 8:
        if terms.shape[0] % 2:
            terms = mx.pad(terms, [(0, 1)] + [(0, 0)] * (terms.ndim - 1))
        terms = terms.reshape(2, -1, *terms.shape[1:]).sum(axis=0)
    return terms.sum(axis=0)
