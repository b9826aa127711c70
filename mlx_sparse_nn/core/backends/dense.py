"""The products through the dense matrix, while MLX traces a function for every shape of x.

There, MLX has to tell the shape of all that it traces from the shapes of x, and of most operations
that a sparse product takes it cannot. So the matrix is made dense once, while tracing, and is a
constant of the graph. It cannot be if its stored values are traced themselves.

x and y have any number of leading axes: there is no axis V, since ``mx.vmap`` maps what is inside.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core import blocks, quantized
from mlx_sparse_nn.core.layout import Layout

NAME = "dense"
TAKES_EDGES = True
TAKES_AXES = False  # of size 1 before a single row of x


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[..., r] = sum_c A[r, c] x[..., c] + bias[r]; see ``plain.spmm``."""
    return _multiply(_constant("spmm", layout, data), x, bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[..., c] = sum_r A[r, c] y[..., r]; see ``plain.spmm_t``."""
    return y @ _constant("spmm_t", layout, data)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[j] = sum y[..., row(j)] x[..., col(j)]; see ``plain.sddmm``."""
    y, x = (mx.flatten(a, 0, -2) for a in (y, x))
    return blocks.sample(layout, (y.T @ x)[None]).squeeze(0)


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks; see ``plain.qspmm``."""
    return _multiply(_constant("qspmm", layout, packed, scales, biases), x, bias)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, layout: Layout, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks; see ``plain.qspmm_t``."""
    return y @ _constant("qspmm_t", layout, packed, scales, biases)


def _multiply(matrix: mx.array, x: mx.array, bias: mx.array | None) -> mx.array:
    y = x @ matrix.T
    return y if bias is None else y + bias  # MLX's addmm (0.32.4) goes wrong for other shapes of x


def _constant(op: str, layout: Layout, *stored: mx.array) -> mx.array:
    """Return the matrix ``(n_rows, n_cols)`` of stored values, or of quantized ones, evaluated."""
    refusal = ValueError(
        f"[{op}] with shapeless=True, the stored values of a sparse matrix must be constants: MLX "
        "cannot infer shapes where they are inputs or have a gradient; trace without "
        "shapeless=True, or make the layers dense by densify(model)"
    )

    def matrix(*stored: mx.array) -> mx.array:
        data = stored[0]
        if len(stored) > 1:
            packed, *scales = stored
            data = quantized.dequantize(packed, *(a.astype(mx.float32) for a in scales))
            data = data.astype(scales[0].dtype)
        return mx.contiguous(blocks.todense(layout, data[None]).squeeze(0))  # as a file can hold it

    def refuse(*_: Any) -> Any:
        raise refusal

    function: Any = mx.custom_function(matrix)
    for rule in (function.vjp, function.jvp, function.vmap):
        rule(refuse)
    dense = function(*stored)
    try:
        mx.eval(dense)  # once, while tracing: a file holds a constant's numbers
    except ValueError:  # they are traced: MLX evaluates nothing of that
        raise refusal from None
    return dense
