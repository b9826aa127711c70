"""How precisely states are computed: their dtype, its rounding, and the order of sums."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


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


def pairwise_sum(terms: mx.array) -> mx.array:
    """Return the sum of ``(n, ...)`` terms over the first axis, by pairwise summation.

    On the CPU, MLX's own sum adds one term after another: 2**18 terms may leave an error of 2e-3.
    """
    while terms.shape[0] > 8:
        if terms.shape[0] % 2:
            terms = mx.pad(terms, [(0, 1)] + [(0, 0)] * (terms.ndim - 1))
        terms = terms.reshape(2, -1, *terms.shape[1:]).sum(axis=0)
    return terms.sum(axis=0)
