"""The three sparse products: checked once, dispatched, and differentiable to any order.

Features are the last axis, as in ``mlx.nn.Linear``. Each product is bilinear and each one's
derivative is another of the three, so vjp and jvp are a line each and higher orders follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core import cuda, kernels, metal, reference
from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.pattern import CSRPattern

_BACKENDS = {"metal": metal, "cuda": cuda, "reference": reference}


def spmm(
    data: mx.array, pattern: CSRPattern | Layout, x: mx.array, bias: mx.array | None = None
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
    layout = _layout("spmm", pattern)
    n_rows, n_cols = layout.shape
    _check_shape("spmm", "data", data, layout.data_shape)
    _check_features("spmm", "x", x, "n_cols", n_cols)
    if bias is not None:
        _check_shape("spmm", "bias", bias, (n_rows,))
    data, x = _promote("spmm", layout, ("data", "x"), data, x)
    rows = _merge(x)
    if bias is None:
        y = _spmm(layout, data, rows)
    elif bias.dtype == x.dtype:
        y = _affine(layout, data, rows, bias)
    else:
        y = _spmm(layout, data, rows) + bias
    return y if rows is x else y.reshape(*x.shape[:-1], n_rows)


def spmm_t(data: mx.array, pattern: CSRPattern | Layout, y: mx.array) -> mx.array:
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
    layout = _layout("spmm_t", pattern)
    _check_shape("spmm_t", "data", data, layout.data_shape)
    _check_features("spmm_t", "y", y, "n_rows", layout.shape[0])
    data, y = _promote("spmm_t", layout, ("data", "y"), data, y)
    return _spmm_t(layout, data, _merge(y)).reshape(*y.shape[:-1], layout.shape[1])


def sddmm(pattern: CSRPattern | Layout, y: mx.array, x: mx.array) -> mx.array:
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
    layout = _layout("sddmm", pattern)
    _check_features("sddmm", "y", y, "n_rows", layout.shape[0])
    _check_features("sddmm", "x", x, "n_cols", layout.shape[1])
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"[sddmm] leading axes differ: y {y.shape[:-1]}, x {x.shape[:-1]}")
    y, x = _promote("sddmm", layout, ("y", "x"), y, x)
    return _sddmm(layout, _merge(y), _merge(x))


def todense(data: mx.array, pattern: CSRPattern | Layout) -> mx.array:
    """Return the dense ``(n_rows, n_cols)`` matrix; repeated entries add up.

    Args:
        data: Stored values, ``(nnz,)`` or ``(n_blocks, B, B)``.
        pattern: Where they lie.

    Raises:
        TypeError, ValueError: As :func:`spmm`.
    """
    layout = _layout("todense", pattern)
    _check_shape("todense", "data", data, layout.data_shape)
    return _todense(layout, data[None]).reshape(layout.shape)


# The products proper: data (n_blocks, ...), x (N, n_cols), y (N, n_rows); or with a leading axis V
# of matrices that share the pattern. The layout is captured, not an operand: nothing is
# differentiated by it, and its transpose is made only when a gradient asks for it.


def _product(compute: Callable[..., mx.array]) -> Callable[[Callable], Callable[..., mx.array]]:
    """Make ``compute(layout, *operands)`` follow the rules that the decorated function adds to it.

    The custom function is made where a transform may ask for its rules, since to make it takes more
    time than a launch, and anew at each call: kept with the layout, the two would be a cycle. What
    computes the value sees its operands through stop_gradient: MLX would differentiate that graph
    too, for nothing, and fail where an operation in it has no jvp.
    """

    def decorate(add_rules: Callable) -> Callable[..., mx.array]:
        def product(layout: Layout, *operands: mx.array) -> mx.array:
            if not kernels.transforming():
                return compute(layout, *operands)
            guarded = lambda *a: compute(layout, *map(mx.stop_gradient, a))  # noqa: E731
            function: Any = mx.custom_function(guarded)
            add_rules(function, layout)
            return function(*operands)

        return product

    return decorate


@_product(lambda layout, data, x: _backend(layout, x).spmm(data, layout, x))
def _spmm(product, layout):
    @product.vjp
    def vjp(primals, cotangent, output):
        data, x = primals
        return _sddmm(layout, cotangent, _conj(x)), _spmm_t(layout, _conj(data), cotangent)

    @product.jvp
    def jvp(primals, tangents):
        return _bilinear_jvp(lambda data, x: _spmm(layout, data, x), primals, tangents)

    @product.vmap
    def vmap(operands, axes):
        return _map_matrix(lambda data, x: _spmm(layout, data, x), operands, axes)


@_product(lambda layout, data, x, bias: _backend(layout, x).spmm(data, layout, x, bias))
def _affine(product, layout):
    """``_spmm`` plus bias ``(n_rows,)``, in one kernel where there is one."""

    @product.vjp
    def vjp(primals, cotangent, output):
        data, x, _ = primals
        grads = _sddmm(layout, cotangent, _conj(x)), _spmm_t(layout, _conj(data), cotangent)
        return *grads, cotangent.sum(axis=tuple(range(cotangent.ndim - 1)))

    @product.jvp
    def jvp(primals, tangents):
        (data, x, _), (d_data, d_x, d_bias) = primals, tangents
        shape = (*x.shape[:-1], layout.shape[0])
        out = mx.zeros(shape, x.dtype) if d_bias is None else mx.broadcast_to(d_bias, shape)
        if d_data is None and d_x is None:
            return out
        multiply = lambda data, x: _spmm(layout, data, x)  # noqa: E731
        return out + _bilinear_jvp(multiply, (data, x), (d_data, d_x))

    @product.vmap
    def vmap(operands, axes):
        (data, x, bias), (data_axis, x_axis, bias_axis) = operands, axes
        multiply = lambda data, x: _spmm(layout, data, x)  # noqa: E731
        if data_axis is None and x_axis is None:
            y, axis = multiply(data, x)[None], 0
        else:
            y, axis = _map_matrix(multiply, (data, x), (data_axis, x_axis))
        if bias_axis is None:
            return y + bias, axis
        bias = mx.moveaxis(bias, bias_axis, 0)  # (M, n_rows)
        return y + mx.expand_dims(bias, tuple(range(1, y.ndim - 1 - axis))), axis


@_product(lambda layout, data, y: _backend(layout, y).spmm_t(data, layout, y))
def _spmm_t(product, layout):
    @product.vjp
    def vjp(primals, cotangent, output):
        data, y = primals
        return _sddmm(layout, _conj(y), cotangent), _spmm(layout, _conj(data), cotangent)

    @product.jvp
    def jvp(primals, tangents):
        return _bilinear_jvp(lambda data, y: _spmm_t(layout, data, y), primals, tangents)

    @product.vmap
    def vmap(operands, axes):
        return _map_matrix(lambda data, y: _spmm_t(layout, data, y), operands, axes)


@_product(lambda layout, y, x: _backend(layout, x).sddmm(layout, y, x))
def _sddmm(product, layout):
    @product.vjp
    def vjp(primals, cotangent, output):
        y, x = primals
        return _spmm(layout, cotangent, _conj(x)), _spmm_t(layout, cotangent, _conj(y))

    @product.jvp
    def jvp(primals, tangents):
        return _bilinear_jvp(lambda y, x: _sddmm(layout, y, x), primals, tangents)

    @product.vmap
    def vmap(operands, axes):
        multiply = lambda y, x: _sddmm(layout, y, x)  # noqa: E731
        return _map_matrices(multiply, operands, axes), 0


@_product(lambda layout, data: reference.todense(data, layout))
def _todense(product, layout):
    _add_linear_rules(product, layout, _todense, _sample)


@_product(lambda layout, dense: reference.sample(layout, dense))
def _sample(product, layout):
    _add_linear_rules(product, layout, _sample, _todense)


def _add_linear_rules(product, layout, itself, transpose):
    """Add the rules of a linear function of ``(V, ...)``, given with its transpose."""

    @product.vjp
    def vjp(primal, cotangent, output):
        return transpose(layout, cotangent)

    @product.jvp
    def jvp(primal, tangent):
        return itself(layout, tangent)

    @product.vmap
    def vmap(operand, axis):
        operand = mx.moveaxis(operand, axis, 0)  # (M, V, ...)
        out = itself(layout, mx.flatten(operand, 0, 1))
        return (mx.unflatten(out, 0, operand.shape[:2]),), (0,)


def _bilinear_jvp(product, primals, tangents):
    (a, b), (da, db) = primals, tangents
    if da is None:
        return product(a, db)
    if db is None:
        return product(da, b)
    return product(da, b) + product(a, db)


def _map_matrix(product, operands, axes):
    """Map a product ``(data, x)`` over an axis of either or both: one call, whatever is mapped."""
    (data, x), (data_axis, x_axis) = operands, axes
    if data_axis is not None:
        return _map_matrices(product, operands, axes), 0
    # One matrix for all: the mapped axis is more rows of x.
    at = x.ndim - 3
    x = mx.moveaxis(x, x_axis, at)  # (M, N, n) or (V, M, N, n)
    out = product(data, mx.flatten(x, at, at + 1))
    return mx.unflatten(out, at, x.shape[at:-1]), at


def _map_matrices(product, operands, axes):
    """Map a product over operands of as many matrices more; a mapped axis comes first."""
    sizes = [a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None]
    stacked = [
        mx.broadcast_to(a, (sizes[0], *a.shape)) if axis is None else mx.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    ]
    if stacked[1].ndim == 3:  # x, with no axis of matrices so far
        return product(*stacked)
    return mx.unflatten(product(*(mx.flatten(a, 0, 1) for a in stacked)), 0, (sizes[0], -1))


def _conj(a: mx.array) -> mx.array:
    """Conjugate: MLX's gradients of complex products are by the conjugate of the other factor."""
    return mx.conjugate(a) if a.dtype == mx.complex64 else a


def _merge(a: mx.array) -> mx.array:
    """Return ``(..., n)`` as ``(N, n)``."""
    return a if a.ndim == 2 else a.reshape(math.prod(a.shape[:-1]), a.shape[-1])


def _backend(layout: Layout, x: mx.array) -> ModuleType:
    """Return the module that computes a product with rows ``x`` on MLX's default device."""
    return _BACKENDS[kernels.backend()] if kernels.takes(layout, x) else reference


def _layout(op: str, pattern: CSRPattern | Layout) -> Layout:
    if isinstance(pattern, Layout):
        return pattern
    if isinstance(pattern, CSRPattern):
        return pattern.layout
    raise TypeError(f"[{op}] pattern must be a CSRPattern, got {type(pattern).__name__}")


def _check_array(op: str, name: str, a: mx.array) -> None:
    if not isinstance(a, mx.array):
        raise TypeError(f"[{op}] {name} must be an mx.array, got {type(a).__name__}")


def _check_shape(op: str, name: str, a: mx.array, shape: tuple[int, ...]) -> None:
    if isinstance(a, mx.array) and a.shape == shape:
        return
    _check_array(op, name, a)
    raise ValueError(f"[{op}] {name} has shape {a.shape}, the pattern needs {shape}")


def _check_features(op: str, name: str, a: mx.array, label: str, size: int) -> None:
    if isinstance(a, mx.array) and a.shape[-1:] == (size,):
        return
    _check_array(op, name, a)
    raise ValueError(f"[{op}] {name} has shape {a.shape}, its last axis must be {label} = {size}")


def _promote(
    op: str, layout: Layout, names: tuple[str, str], a: mx.array, b: mx.array
) -> tuple[mx.array, mx.array]:
    """Cast both operands to the dtype that MLX promotes them to, if it has a product."""
    dtype = a.dtype
    if dtype == b.dtype and dtype in kernels.DTYPES:  # as it is in nearly every call
        return a, b
    dtype = mx.result_type(a, b)
    if not mx.issubdtype(dtype, mx.inexact):
        operands = f"{names[0]} {a.dtype} and {names[1]} {b.dtype}"
        raise TypeError(f"[{op}] {operands} give {dtype}; cast one to a floating type with astype")
    if dtype == mx.complex64 and layout.block_size > 1:
        raise TypeError(f"[{op}] complex64 is for block_size 1, got block_size {layout.block_size}")
    return a.astype(dtype), b.astype(dtype)
