"""The sparse products: operands are checked here, once.

Features are the last axis, as in ``mlx.nn.Linear``. ``derivatives`` has their rules.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_sparse_nn.core import derivatives, tuned
from mlx_sparse_nn.core.checks import (
    check_array,
    check_block_dtype,
    check_features,
    check_memory,
)
from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.pattern import CSRPattern, check_pattern
from mlx_sparse_nn.core.quantized import check_quantized
from mlx_sparse_nn.core.transforms import tracing


def spmm(
    data: mx.array, pattern: CSRPattern, x: mx.array, bias: mx.array | None = None
) -> mx.array:
    """Multiply by a sparse matrix: ``y[..., r] = sum_c A[r, c] x[..., c] + bias[r]``.

    Args:
        data: Stored values of A, ``(nnz,)`` (real or complex) or ``(n_blocks, B, B)`` (real).
        pattern: Where they lie.
        x: ``(..., n_cols)``.
        bias: ``(n_rows,)``, or None.

    Returns:
        ``(..., n_rows)`` of the promoted dtype. 16-bit types accumulate in float32.

    Raises:
        TypeError: An operand is not an array, or the promoted dtype has no product.
        ValueError: A shape does not fit the pattern.
    """
    check_pattern("spmm", pattern)
    return multiply(data, pattern.layout, x, bias)


def multiply(
    data: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
    owner: str = "spmm",
    width: str = "n_cols",
) -> mx.array:
    """Return :func:`spmm` by a layout. Layers call this: their layout may hold tracers.

    Args:
        data, x, bias: As in :func:`spmm`.
        layout: Layout of the pattern.
        owner: Name shown in error messages.
        width: What ``owner`` calls the size of the last axis of ``x``.
    """
    n_rows, n_cols = layout.shape
    _check_shape(owner, "data", data, layout.data_shape)
    check_features(owner, "x", x, width, n_cols)
    if bias is not None:
        _check_shape(owner, "bias", bias, (n_rows,))
    data, x = _promote(owner, layout, ("data", "x"), data, x)
    if x.ndim != 2 and x.size == n_cols and (bias is None or bias.dtype == x.dtype):
        y = derivatives.spmm_of_row(layout, data, x, bias)
        if y is not None:
            return y
    rows = _merge(x)
    if bias is None:
        y = derivatives.spmm(layout, data, rows)
    elif bias.dtype == x.dtype:
        y = derivatives.spmm_bias(layout, data, rows, bias)
    else:
        y = derivatives.spmm(layout, data, rows) + bias
    return y if rows is x else y.reshape(*x.shape[:-1], n_rows)


def spmm_t(data: mx.array, pattern: CSRPattern, y: mx.array) -> mx.array:
    """Multiply by the transpose: ``x[..., c] = sum_r A[r, c] y[..., r]``.

    Args:
        data: Stored values of A, ``(nnz,)`` or ``(n_blocks, B, B)``.
        pattern: Where they lie in A.
        y: ``(..., n_rows)``.

    Returns:
        ``(..., n_cols)`` of the promoted dtype.

    Raises:
        TypeError, ValueError: As :func:`spmm`.
    """
    check_pattern("spmm_t", pattern)
    layout = pattern.layout
    _check_shape("spmm_t", "data", data, layout.data_shape)
    check_features("spmm_t", "y", y, "n_rows", layout.shape[0])
    data, y = _promote("spmm_t", layout, ("data", "y"), data, y)
    rows = _merge(y)
    x = derivatives.spmm_t(layout, data, rows)
    return x if rows is y else x.reshape(*y.shape[:-1], layout.shape[1])


def sddmm(pattern: CSRPattern, y: mx.array, x: mx.array) -> mx.array:
    """Sample the product of two dense matrices: ``data[j] = sum y[..., row(j)] x[..., col(j)]``.

    The sum runs over all leading axes. This is the gradient of :func:`spmm` to its data.

    Args:
        pattern: The places to compute.
        y: ``(..., n_rows)``.
        x: ``(..., n_cols)`` with the leading axes of ``y``.

    Returns:
        ``(nnz,)`` or ``(n_blocks, B, B)`` of the promoted dtype.

    Raises:
        TypeError, ValueError: As :func:`spmm`.
    """
    check_pattern("sddmm", pattern)
    layout = pattern.layout
    check_features("sddmm", "y", y, "n_rows", layout.shape[0])
    check_features("sddmm", "x", x, "n_cols", layout.shape[1])
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"[sddmm] leading axes differ: y {y.shape[:-1]}, x {x.shape[:-1]}")
    y, x = _promote("sddmm", layout, ("y", "x"), y, x)
    return derivatives.sddmm(layout, _merge(y), _merge(x))


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    pattern: CSRPattern,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Multiply by a sparse matrix of quantized blocks: :func:`spmm` of what they stand for.

    The packing is that of ``mx.quantize(data, group_size, bits)`` in its affine mode, for data
    ``(n_blocks, B, B)``: 2, 3, 4, 5, 6 or 8 bits, and groups of 32, 64 or 128 along the rows of a
    block. Both follow from the shapes.

    Args:
        packed: ``(n_blocks, B, B * bits / 32)`` uint32. It has no gradient.
        scales, biases: ``(n_blocks, B, B / group_size)``; they have gradients.
        pattern: Where the blocks lie.
        x: ``(..., n_cols)``.
        bias: ``(n_rows,)``, or None.

    Returns:
        ``(..., n_rows)`` of the dtype that scales, biases and x are promoted to, as by
        ``mx.quantized_matmul``: float32, float16 or bfloat16. 16-bit types accumulate in float32.

    Raises:
        TypeError: An operand is not an array, ``packed`` is not uint32, or the promoted dtype has
            no quantized product.
        ValueError: A shape does not fit the pattern, or its blocks have no such packing.

    Example:
        >>> quantized = mx.quantize(data, group_size=32, bits=4)
        >>> y = qspmm(*quantized, pattern, x)
    """
    check_pattern("qspmm", pattern)
    return multiply_quantized(packed, scales, biases, pattern.layout, x, bias)


def multiply_quantized(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
    owner: str = "qspmm",
    width: str = "n_cols",
) -> mx.array:
    """Return :func:`qspmm` by a layout. Layers call this: their layout may hold tracers.

    Args:
        packed, scales, biases, x, bias: As in :func:`qspmm`.
        layout, owner, width: As in :func:`multiply`.
    """
    n_rows, n_cols = layout.shape
    check_quantized(owner, packed, scales, biases, layout.data_shape)
    check_features(owner, "x", x, width, n_cols)
    if bias is not None:
        _check_shape(owner, "bias", bias, (n_rows,))
    scales, biases, x = _promote_quantized(owner, "x", scales, biases, x)
    rows = _merge(x)
    if bias is None:
        y = derivatives.qspmm(layout, packed, scales, biases, rows)
    elif bias.dtype == x.dtype:
        y = derivatives.qspmm_bias(layout, packed, scales, biases, rows, bias)
    else:
        y = derivatives.qspmm(layout, packed, scales, biases, rows) + bias
    return y if rows is x else y.reshape(*x.shape[:-1], n_rows)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, pattern: CSRPattern, y: mx.array
) -> mx.array:
    """Multiply by the transpose of a matrix of quantized blocks: :func:`spmm_t` of them.

    Args:
        packed, scales, biases: As in :func:`qspmm`.
        pattern: Where the blocks lie in A.
        y: ``(..., n_rows)``.

    Returns:
        ``(..., n_cols)`` of the dtype that scales, biases and y are promoted to.

    Raises:
        TypeError, ValueError: As :func:`qspmm`.
    """
    check_pattern("qspmm_t", pattern)
    layout = pattern.layout
    check_quantized("qspmm_t", packed, scales, biases, layout.data_shape)
    check_features("qspmm_t", "y", y, "n_rows", layout.shape[0])
    scales, biases, y = _promote_quantized("qspmm_t", "y", scales, biases, y)
    rows = _merge(y)
    x = derivatives.qspmm_t(layout, packed, scales, biases, rows)
    return x if rows is y else x.reshape(*y.shape[:-1], layout.shape[1])


def todense(data: mx.array, layout: Layout) -> mx.array:
    """Return the dense ``(n_rows, n_cols)`` matrix; repeated entries add up.

    Args:
        data: Stored values, ``(nnz,)`` or ``(n_blocks, B, B)``.
        layout: Layout of the pattern.

    Raises:
        TypeError: As :func:`spmm`.
        ValueError: A shape does not fit, or the dense matrix is larger than the memory.
    """
    _check_shape("todense", "data", data, layout.data_shape)
    check_memory("todense", layout.shape, data.dtype)
    return derivatives.todense(layout, data[None]).reshape(layout.shape)


def _merge(a: mx.array) -> mx.array:
    """Return ``(..., n)`` as ``(N, n)``; as it is while no shape is known."""
    if a.ndim == 2 or (a.ndim > 2 and tracing.graph == "shapeless"):
        return a
    return a.reshape(1 if a.ndim == 1 else math.prod(a.shape[:-1]), a.shape[-1])


def _check_shape(op: str, name: str, a: mx.array, shape: tuple[int, ...]) -> None:
    if isinstance(a, mx.array) and a.shape == shape:
        return
    check_array(op, name, a)
    raise ValueError(f"[{op}] {name} has shape {a.shape}, the pattern needs {shape}")


def _promote(
    op: str, layout: Layout, names: tuple[str, str], a: mx.array, b: mx.array
) -> tuple[mx.array, mx.array]:
    """Cast both operands to the dtype that MLX promotes them to, if it has a product."""
    dtype = a.dtype
    if dtype == b.dtype and dtype in tuned.KERNEL_DTYPES:  # as it is in nearly every call
        return a, b
    dtype = mx.result_type(a, b)
    if not mx.issubdtype(dtype, mx.inexact):
        operands = f"{names[0]} {a.dtype} and {names[1]} {b.dtype}"
        raise TypeError(f"[{op}] {operands} give {dtype}; cast one to a floating type with astype")
    check_block_dtype(op, dtype, layout.block_size)
    return derivatives.promoted(a, dtype), derivatives.promoted(b, dtype)


def _promote_quantized(
    op: str, name: str, scales: mx.array, biases: mx.array, x: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Cast all three to the dtype that MLX promotes them to, if it has a quantized product."""
    dtype = x.dtype
    if not (dtype == scales.dtype == biases.dtype):
        dtype = mx.result_type(scales, biases, x)
    if dtype not in tuned.KERNEL_DTYPES:
        raise TypeError(
            f"[{op}] scales {scales.dtype}, biases {biases.dtype} and {name} {x.dtype} give "
            f"{dtype}; quantized blocks are for float32, float16 and bfloat16"
        )
    return scales.astype(dtype), biases.astype(dtype), x.astype(dtype)
