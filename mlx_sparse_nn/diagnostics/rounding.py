"""How far rounding may take a sum of products from its exact value."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

EPS = {
    mx.float16: 2.0**-10,
    mx.bfloat16: 2.0**-7,
    mx.float32: 2.0**-23,
    mx.complex64: 2.0**-23,
    mx.float64: 2.0**-52,
}
TF32_EPS = 2.0**-10  # of the factors of a product
ACCUMULATOR = {mx.float16: mx.float32, mx.bfloat16: mx.float32}


def tolerance(dtype: mx.Dtype, length, magnitude):
    """Return the error allowed in a sum of ``length`` products whose absolute values sum to
    ``magnitude``: that of the accumulation, plus one rounding to ``dtype``.

    The bound of Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1, for sums
    in any order. Complex products count four real ones.

    Args:
        dtype: Of the result.
        length: Number of products, or an array of them.
        magnitude: Number or array, of a shape that goes with that of ``length``.
    """
    terms = (4 if dtype == mx.complex64 else 1) * (length + 2)
    return (terms * EPS[ACCUMULATOR.get(dtype, dtype)] + EPS[dtype]) * magnitude


def underflow(dtype: mx.Dtype) -> float:
    """Return the error of a result that is too small for its dtype, or that a device flushes to
    zero."""
    return {mx.float16: 2.0**-24, mx.float64: 0.0}.get(dtype, 2.0**-126)


def to_numpy(a: mx.array) -> np.ndarray:
    """Return a float64 (or complex128) copy; NumPy has no bfloat16."""
    if a.dtype == mx.complex64:
        return np.array(a).astype(np.complex128)
    return np.array(a.astype(mx.float32) if a.dtype != mx.float64 else a).astype(np.float64)
