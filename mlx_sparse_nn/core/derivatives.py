"""The products as functions that MLX differentiates, maps and compiles, to any order.

Each product is bilinear, and each one's derivative is another of the three: vjp and jvp are a line
each, and higher orders follow. Operands are data ``(n_blocks, ...)``, x ``(N, n_cols)`` and
y ``(N, n_rows)`` of one dtype; or each has a leading axis V of matrices that share the pattern.

Quantized products are linear in scales and biases together. Their packed integers are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core import blocks, edges, quantized
from mlx_sparse_nn.core.backends import cpu, cuda
from mlx_sparse_nn.core.backends.choose import choose
from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.transforms import needs_rules, of_mapped, tracing

# What MLX passes to a rule and gets back: one array or axis, or a list of them.
Arrays = Any
Axes = Any
Layouts = tuple[Layout, Layout, Layout]


def spmm(layout: Layout, data: mx.array, x: mx.array) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c]."""
    if not needs_rules():
        return _spmm(layout, data, x)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        data, x = primals
        return sddmm(layout, cotangent, _conj(x)), spmm_t(layout, _conj(data), cotangent)

    def jvp(primals: Arrays, tangents: Arrays) -> mx.array:
        return _bilinear_jvp(spmm, layout, primals, tangents)

    def vmap(operands: Arrays, axes: Axes) -> Arrays:
        return _map_matrix(spmm, layout, operands, axes)

    return with_rules(_spmm, layout, vjp, jvp, vmap)(data, x)


def spmm_of_row(
    layout: Layout, data: mx.array, x: mx.array, bias: mx.array | None
) -> mx.array | None:
    """Return the product with a single row, x ``(n_cols,)`` or ``(1, ..., 1, n_cols)`` as it is:
    two views less, each of which takes MLX as long as a small product.

    None where a transform may need rules, or the backend an x of two axes.
    """
    if layout.has_edges or needs_rules():
        return None
    backend = choose("spmm", layout, 1, x.dtype)
    takes = backend is cpu if x.ndim == 1 else backend.TAKES_AXES
    return backend.spmm(data, layout, x, bias) if takes else None


def spmm_bias(layout: Layout, data: mx.array, x: mx.array, bias: mx.array) -> mx.array:
    """Return ``spmm(layout, data, x) + bias``, rounded once; bias ``(n_rows,)``."""
    if not needs_rules():
        return _spmm(layout, data, x, bias)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        data, x, _ = primals
        d_data, d_x = sddmm(layout, cotangent, _conj(x)), spmm_t(layout, _conj(data), cotangent)
        return d_data, d_x, _sum_rows(cotangent)

    jvp = partial(_bias_jvp, spmm, _bilinear_jvp, layout)
    vmap = partial(_map_with_bias, spmm, spmm_bias, layout)
    return with_rules(_spmm, layout, vjp, jvp, vmap)(data, x, bias)


def spmm_t(layout: Layout, data: mx.array, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]."""
    if not needs_rules():
        return _spmm_t(layout, data, y)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        data, y = primals
        return sddmm(layout, _conj(y), cotangent), spmm(layout, _conj(data), cotangent)

    def jvp(primals: Arrays, tangents: Arrays) -> mx.array:
        return _bilinear_jvp(spmm_t, layout, primals, tangents)

    def vmap(operands: Arrays, axes: Axes) -> Arrays:
        return _map_matrix(spmm_t, layout, operands, axes)

    return with_rules(_spmm_t, layout, vjp, jvp, vmap)(data, y)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]."""
    if not needs_rules():
        return _sddmm(layout, y, x)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        y, x = primals
        return spmm(layout, cotangent, _conj(x)), spmm_t(layout, cotangent, _conj(y))

    def jvp(primals: Arrays, tangents: Arrays) -> mx.array:
        return _bilinear_jvp(sddmm, layout, primals, tangents)

    def vmap(operands: Arrays, axes: Axes) -> Arrays:
        return _map_matrices(sddmm, layout, operands, axes), 0

    return with_rules(_sddmm, layout, vjp, jvp, vmap)(y, x)


def qspmm(
    layout: Layout, packed: mx.array, scales: mx.array, biases: mx.array, x: mx.array
) -> mx.array:
    """Return :func:`spmm` by the blocks that packed, scales and biases stand for."""
    if not needs_rules():
        return _qspmm(layout, packed, scales, biases, x)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        packed, scales, biases, x = primals
        d_x = qspmm_t(layout, packed, scales, biases, cotangent)
        return *_matrix_vjp(layout, packed, scales, cotangent, x), d_x

    jvp, vmap = partial(_quantized_jvp, qspmm, layout), partial(_map_matrix, qspmm, layout)
    function = with_rules(_qspmm, layout, vjp, jvp, vmap)
    return function(_constant(packed), scales, biases, x)


def qspmm_bias(
    layout: Layout,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    x: mx.array,
    bias: mx.array,
) -> mx.array:
    """Return ``qspmm(...) + bias``, rounded once; bias ``(n_rows,)``."""
    if not needs_rules():
        return _qspmm(layout, packed, scales, biases, x, bias)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        packed, scales, biases, x, _ = primals
        d_x = qspmm_t(layout, packed, scales, biases, cotangent)
        return *_matrix_vjp(layout, packed, scales, cotangent, x), d_x, _sum_rows(cotangent)

    jvp = partial(_bias_jvp, qspmm, _quantized_jvp, layout)
    vmap = partial(_map_with_bias, qspmm, qspmm_bias, layout)
    function = with_rules(_qspmm, layout, vjp, jvp, vmap)
    return function(_constant(packed), scales, biases, x, bias)


def qspmm_t(
    layout: Layout, packed: mx.array, scales: mx.array, biases: mx.array, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by the blocks that packed, scales and biases stand for."""
    if not needs_rules():
        return _qspmm_t(layout, packed, scales, biases, y)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        packed, scales, biases, y = primals
        d_y = qspmm(layout, packed, scales, biases, cotangent)
        return *_matrix_vjp(layout, packed, scales, y, cotangent), d_y

    jvp, vmap = partial(_quantized_jvp, qspmm_t, layout), partial(_map_matrix, qspmm_t, layout)
    function = with_rules(_qspmm_t, layout, vjp, jvp, vmap)
    return function(_constant(packed), scales, biases, y)


def spgemm(which: int, layouts: Layouts, first: mx.array, second: mx.array) -> mx.array:
    """Return the values of one of three sparse matrices, ``c = a b``, of those of the other two.

    The derivative of one to another is the third: all are sums of products of the same pairs.

    Args:
        which: 0, 1 or 2, of a, b and c; the first two are sums at the places that they store.
        layouts: Of the three. That of c stores all that may not be zero.
        first, second: ``(V, n_blocks, ...)`` of the other two, in this order.
    """
    if not needs_rules():
        return cpu.spgemm(which, layouts, first, second)
    of_first, of_second = (i for i in range(3) if i != which)

    def gradient(wanted: int, other: int, values: mx.array, cotangent: mx.array) -> mx.array:
        operands = (_conj(values), cotangent) if other < which else (cotangent, _conj(values))
        return spgemm(wanted, layouts, *operands)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        first, second = primals
        d_first = gradient(of_first, of_second, second, cotangent)
        return d_first, gradient(of_second, of_first, first, cotangent)

    def product(layouts: Layouts, first: mx.array, second: mx.array) -> mx.array:
        return spgemm(which, layouts, first, second)

    def jvp(primals: Arrays, tangents: Arrays) -> mx.array:
        return _bilinear_jvp(product, layouts, primals, tangents)

    def vmap(operands: Arrays, axes: Axes) -> Arrays:
        mapped = zip(operands, axes, strict=True)
        size = next(a.shape[axis] for a, axis in mapped if axis is not None)
        first, second = (
            mx.broadcast_to(a, (size, *a.shape)) if axis is None else mx.moveaxis(a, axis, 0)
            for a, axis in zip(operands, axes, strict=True)
        )
        out = product(layouts, mx.flatten(first, 0, 1), mx.flatten(second, 0, 1))
        return mx.unflatten(out, 0, first.shape[:2]), 0

    return with_rules(partial(cpu.spgemm, which), layouts, vjp, jvp, vmap)(first, second)


def todense(layout: Layout, data: mx.array) -> mx.array:
    """Return the dense matrices ``(V, n_rows, n_cols)`` of ``data (V, n_blocks, ...)``."""
    return linear(blocks.todense, blocks.sample, layout, data)


def sample(layout: Layout, dense: mx.array) -> mx.array:
    """Return of dense matrices ``(V, n_rows, n_cols)`` what is stored, ``(V, n_blocks, ...)``."""
    return linear(blocks.sample, blocks.todense, layout, dense)


def linear(itself: Callable, transpose: Callable, by: Any, operand: mx.array) -> mx.array:
    """Return ``itself(by, operand)``, a linear function of ``(V, ...)``, with the rules that follow
    from its transpose."""
    if not needs_rules():
        return itself(by, operand)

    def vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return linear(transpose, itself, by, cotangent)

    def jvp(primal: mx.array, tangent: mx.array) -> mx.array:
        return linear(itself, transpose, by, tangent)

    def vmap(operand: mx.array, axis: int) -> Arrays:
        operand = mx.moveaxis(operand, axis, 0)  # (M, V, ...)
        out = linear(itself, transpose, by, mx.flatten(operand, 0, 1))
        return (mx.unflatten(out, 0, operand.shape[:2]),), (0,)

    return with_rules(itself, by, vjp, jvp, vmap)(operand)


def promoted(a: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return ``a.astype(dtype)``, of a dtype that ``a`` is promoted to.

    The gradient to a real array is the real part of that to a complex one. MLX's own rule casts it,
    which its compiler for CUDA (0.32.4) cannot once the cast is fused with what is around it.
    """
    if dtype != mx.complex64 or a.dtype == dtype or not mx.issubdtype(a.dtype, mx.inexact):
        return a.astype(dtype)
    return linear(_as_complex, _real_part, a.dtype, a[None]).squeeze(0)


def _as_complex(dtype: mx.Dtype, a: mx.array) -> mx.array:
    return a.astype(mx.complex64)


def _real_part(dtype: mx.Dtype, a: mx.array) -> mx.array:
    return mx.real(a).astype(dtype)


# The values, by the backend that computes them.


def _spmm(layout: Layout, data: mx.array, x: mx.array, bias: mx.array | None = None) -> mx.array:
    backend = _backend("spmm", layout, x)
    if not layout.has_edges or _takes_edges(backend, "spmm", layout, x):
        return backend.spmm(data, layout, x, bias)
    return _crop(layout, 0, backend.spmm(data, layout, *_padded(layout, x, bias)))


def _spmm_t(layout: Layout, data: mx.array, y: mx.array) -> mx.array:
    backend = _backend("spmm_t", layout, y)
    if not layout.has_edges or _takes_edges(backend, "spmm_t", layout, y):
        return backend.spmm_t(data, layout, y)
    return _crop(layout, 1, backend.spmm_t(data, layout, edges.pad(y, layout.full_shape[0])))


def _sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    backend = _backend("sddmm", layout, x)
    if not layout.has_edges or _takes_edges(backend, "sddmm", layout, x):
        return backend.sddmm(layout, y, x)
    n_rows, n_cols = layout.full_shape
    return backend.sddmm(layout, edges.pad(y, n_rows), edges.pad(x, n_cols))


def _qspmm(
    layout: Layout,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    backend = _backend("qspmm", layout, x, quantized.bits_of(packed))
    if not layout.has_edges or backend.TAKES_EDGES:
        return backend.qspmm(packed, scales, biases, layout, x, bias)
    y = backend.qspmm(packed, scales, biases, layout, *_padded(layout, x, bias))
    return _crop(layout, 0, y)


def _qspmm_t(
    layout: Layout, packed: mx.array, scales: mx.array, biases: mx.array, y: mx.array
) -> mx.array:
    backend = _backend("qspmm_t", layout, y, quantized.bits_of(packed))
    if not layout.has_edges or backend.TAKES_EDGES:
        return backend.qspmm_t(packed, scales, biases, layout, y)
    y = edges.pad(y, layout.full_shape[0])
    return _crop(layout, 1, backend.qspmm_t(packed, scales, biases, layout, y))


def _takes_edges(backend: ModuleType, op: str, layout: Layout, x: mx.array) -> bool:
    """Return whether a backend multiplies x as it is, by blocks that reach past the matrix."""
    return backend.TAKES_EDGES or (backend is cuda and cuda.takes_edges(op, layout, x))


def _padded(layout: Layout, x: mx.array, bias: mx.array | None) -> tuple[mx.array, mx.array | None]:
    """Return the operands of a product with whole blocks."""
    n_rows, n_cols = layout.full_shape
    return edges.pad(x, n_cols), None if bias is None else edges.pad(bias, n_rows)


def _crop(layout: Layout, axis: int, out: mx.array) -> mx.array:
    """Return of a product with whole blocks what lies in the matrix."""
    return out[..., : layout.shape[axis]]


def _backend(op: str, layout: Layout, x: mx.array, bits: int = 0) -> ModuleType:
    n_matrices = x.shape[0] if x.ndim == 3 else 1
    return choose(op, layout, x.shape[-2], x.dtype, n_matrices, bits)


def with_rules(
    compute: Callable[..., mx.array], by: Any, vjp: Callable, jvp: Callable, vmap: Callable
) -> Callable[..., mx.array]:
    """Return ``compute`` by a layout as a function of its operands that follows these rules.

    It is made anew at each call: kept with the layout, the two would be a cycle. ``compute`` gets
    its operands through stop_gradient: MLX would differentiate its graph too, for nothing, and fail
    where an operation in it has no jvp. MLX's own rules have to do for a file, which cannot hold
    others, and for every shape, where MLX cannot tell that of a ``custom_function``.
    """
    if tracing.graph is not None:
        return lambda *operands: compute(by, *map(_writable, operands))

    def guarded(*operands: mx.array) -> mx.array:
        return compute(by, *map(mx.stop_gradient, operands))

    function: Any = mx.custom_function(guarded)
    function.vjp(vjp)
    function.jvp(jvp)
    function.vmap(of_mapped(vmap))
    return function


def _constant(packed: mx.array) -> mx.array:
    """Return ``packed``, with an error in place of a derivative."""
    if tracing.graph is not None:
        return packed

    def refuse(*_: Arrays) -> Arrays:
        raise ValueError(
            "[qspmm] packed has no derivative: it holds integers; scales, biases, x and bias do"
        )

    function: Any = mx.custom_function(mx.stop_gradient)
    function.vjp(refuse)
    function.jvp(refuse)
    function.vmap(lambda packed, axis: (packed, axis))
    return function(packed)


def _writable(operand: Any) -> mx.array:
    """Return an operand as a file can hold it: unless it is traced, evaluated and without gaps.

    MLX (0.32.4) cannot write one that is still to be loaded, and writes one with gaps wrongly.
    """
    try:
        without_gaps = memoryview(operand).c_contiguous
    except RuntimeError:  # it is traced
        return operand
    if without_gaps:
        return operand
    operand = mx.contiguous(operand)
    mx.eval(operand)
    return operand


def _bilinear_jvp(product: Callable, layout: Any, primals: Arrays, tangents: Arrays) -> mx.array:
    """Return the derivative of a product along tangents, None where an operand is constant."""
    (a, b), (d_a, d_b) = primals, tangents
    if d_a is None:
        return product(layout, a, d_b)
    if d_b is None:
        return product(layout, d_a, b)
    return product(layout, d_a, b) + product(layout, a, d_b)


def _quantized_jvp(
    product: Callable, layout: Layout, primals: Arrays, tangents: Arrays
) -> mx.array:
    """Return the same of a quantized product."""
    (packed, scales, biases, x), (_, d_scales, d_biases, d_x) = primals, tangents
    parts = []
    if d_scales is not None or d_biases is not None:
        d_scales = mx.zeros_like(scales) if d_scales is None else d_scales
        d_biases = mx.zeros_like(biases) if d_biases is None else d_biases
        parts.append(product(layout, packed, d_scales, d_biases, x))
    if d_x is not None:
        parts.append(product(layout, packed, scales, biases, d_x))
    return sum(parts[1:], parts[0])


def _bias_jvp(
    product: Callable, jvp: Callable, layout: Layout, primals: Arrays, tangents: Arrays
) -> mx.array:
    """Return the derivative of a product plus a bias; ``jvp`` is the product's own."""
    (*operands, _), (*d_operands, d_bias) = primals, tangents
    shape, dtype = (*operands[-1].shape[:-1], layout.shape[0]), operands[-1].dtype
    out = mx.zeros(shape, dtype) if d_bias is None else mx.broadcast_to(d_bias, shape)
    if all(tangent is None for tangent in d_operands):
        return out
    return out + jvp(product, layout, operands, d_operands)


def _sum_rows(cotangent: mx.array) -> mx.array:
    """Return the gradient to a bias."""
    return cotangent.sum(axis=tuple(range(cotangent.ndim - 1)))


def _matrix_vjp(
    layout: Layout, packed: mx.array, scales: mx.array, y: mx.array, x: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients to packed, which nobody gets, and to scales and biases."""
    return mx.zeros_like(packed), *quantized.gradients(packed, scales, sddmm(layout, y, x))


def _map_matrix(product: Callable, layout: Layout, operands: Arrays, axes: Axes) -> Arrays:
    """Map a product of ``(*matrix, x)`` over an axis of any of them: one call in every case."""
    (*matrix, x), (*matrix_axes, x_axis) = operands, axes
    if any(axis is not None for axis in matrix_axes):
        return _map_matrices(product, layout, operands, axes), 0
    # One matrix for all: the mapped axis is more rows of x.
    at = x.ndim - 3
    x = mx.moveaxis(x, x_axis, at)  # (M, N, n) or (V, M, N, n)
    out = product(layout, *matrix, mx.flatten(x, at, at + 1))
    return mx.unflatten(out, at, x.shape[at:-1]), at


def _map_matrices(product: Callable, layout: Layout, operands: Arrays, axes: Axes) -> mx.array:
    """Map a product by a leading axis of matrices, which operands get or which grows longer."""
    sizes = [a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None]
    stacked = [
        mx.broadcast_to(a, (sizes[0], *a.shape)) if axis is None else mx.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    ]
    if stacked[-1].ndim == 3:  # x, with no axis of matrices so far
        return product(layout, *stacked)
    out = product(layout, *(mx.flatten(a, 0, 1) for a in stacked))
    return mx.unflatten(out, 0, stacked[-1].shape[:2])


def _map_with_bias(
    product: Callable, with_bias: Callable, layout: Layout, operands: Arrays, axes: Axes
) -> Arrays:
    """Map a product plus a bias, whatever is mapped. One that is mapped is added to what has been
    rounded."""
    (*operands, bias), (*axes, bias_axis) = operands, axes
    if bias_axis is None:
        return _map_matrix(lambda *all_but: with_bias(*all_but, bias), layout, operands, axes)
    if all(axis is None for axis in axes):
        y, axis = product(layout, *operands)[None], 0
    else:
        y, axis = _map_matrix(product, layout, operands, axes)
    bias = mx.moveaxis(bias, bias_axis, 0)  # (M, n_rows)
    return y + mx.expand_dims(bias, tuple(range(1, y.ndim - 1 - axis))), axis


def _conj(a: mx.array) -> mx.array:
    """Conjugate: MLX's gradients of complex products are by the conjugate of the other factor."""
    return mx.conjugate(a) if a.dtype == mx.complex64 else a
