"""The three products in plain mlx.core: the CPU path, and the oracle of the kernels.

Operands may have a leading axis V of independent matrices that share one pattern, as in ``vmap``.
Block-rows are gathered bucket by bucket (see ``Layout``) into batched dense operations. No scatter
is used, so sums have one fixed order and results are the same bit for bit from run to run.

Products are cut into steps whose intermediates stay in the cache. On the CPU, where a stream is a
thread, steps take turns on several streams. Neither changes the order of any sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from mlx_sparse_nn.core.layout import Half, Layout, buckets

_STEP = 1 << 16  # gathered values in a step of a product of blocks, on the CPU
_LARGEST_STEP = 1 << 18  # the same where operands are large
_SCALAR_STEP = 1 << 18  # the same of scalars, which take less time each
_GPU_STEP = 1 << 24  # the same on a GPU, to bound the memory
_FEW = 8  # rows of x below which each row multiplies the blocks
_SPLIT = 1 << 18  # multiplications from which a product goes to several streams
_CACHED = 1 << 18  # values up to which a transposition stays in the cache
_STREAMS = 4  # at most, and no more than there are cores

Index: TypeAlias = "mx.array | slice"


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r].

    Args:
        data: ``(n_blocks,)`` for scalars or ``(n_blocks, B, B)``; or ``(V, ...)``.
        layout: Layout of the pattern.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``, of the dtype of ``data``.
        bias: ``(n_rows,)`` of the same dtype, or None.

    Returns:
        ``(N, n_rows)`` or ``(V, N, n_rows)`` of the same dtype, accumulated in float32 at least.
    """
    return _product(data, layout.rows, x, layout.shape[0], bias, transposed=False)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; shapes as in :func:`spmm`, swapped."""
    return _product(data, layout.cols, y, layout.shape[1], None, transposed=True)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)] for every stored place j.

    Args:
        layout: Layout of the pattern.
        y: ``(N, n_rows)`` or ``(V, N, n_rows)``.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``, of the dtype of ``y``.

    Returns:
        ``(n_blocks,)`` or ``(n_blocks, B, B)``, or ``(V, ...)``, of the same dtype.
    """
    if x.ndim == 2:
        return sddmm(layout, y[None], x[None])[0]
    (n_batch, n, _), block, half = x.shape, layout.block_size, layout.rows
    shape = (n_batch, *layout.data_shape)
    if 0 in (*shape, n):
        return mx.zeros(shape, x.dtype)
    x_blocks, y_blocks = (_row_blocks(a, block) for a in (x, y))  # (V, C, N, B), (V, R, N, B)
    # Rows of equal length are taken whole, others block by block.
    n_units, width = half["row"].size or half["indptr"].size - 1, 1
    if not half["row"].size:
        width = half["indices"].size // n_units
    cols, parts = half["indices"].view(mx.uint32), []
    size = x.size + y.size + math.prod(shape)
    for place, start, stop in _cut(n_units, n_batch * width * block * n, block, size):
        with place:
            rows = half["row"][start:stop] if half["row"].size else slice(start, stop)
            y_part = mx.expand_dims(_take(y_blocks, rows), 2)  # (V, m, 1, N, B)
            x_part = _take(x_blocks, cols[start * width : stop * width])
            x_part = x_part.reshape(n_batch, stop - start, width, n, block)
            part = (x_part * y_part).sum(axis=3) if block == 1 else y_part.swapaxes(3, 4) @ x_part
            parts.append(part.reshape(n_batch, -1, *shape[2:]).astype(x.dtype))
    return _join(parts)


def todense(data: mx.array, layout: Layout) -> mx.array:
    """Return the dense ``(V, n_rows, n_cols)`` matrices; repeated entries add up in float32."""
    (n_rows, n_cols), block, n_batch = layout.shape, layout.block_size, data.shape[0]
    shape = (n_batch, n_rows // block, n_cols // block, block, block)
    blocks = mx.zeros(shape, _wide_dtype(data.dtype))
    if data.size:
        values = _widen(data).reshape(n_batch, -1, block, block)
        blocks = blocks.at[_places(layout.rows)].add(values)
    return blocks.swapaxes(2, 3).reshape(n_batch, n_rows, n_cols).astype(data.dtype)


def sample(layout: Layout, dense: mx.array) -> mx.array:
    """Return the values of ``dense (V, n_rows, n_cols)`` at the stored places: :func:`todense`'s
    transpose, of shape ``(V, n_blocks)`` or ``(V, n_blocks, B, B)``."""
    (n_rows, n_cols), block, n_batch = layout.shape, layout.block_size, dense.shape[0]
    shape = (n_batch, *layout.data_shape)
    if 0 in shape:
        return mx.zeros(shape, dense.dtype)
    blocks = dense.reshape(n_batch, n_rows // block, block, n_cols // block, block)
    return blocks.swapaxes(2, 3)[_places(layout.rows)].reshape(shape)


def _product(
    data: mx.array, half: Half, x: mx.array, n_out: int, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Return the product over the block-rows of ``half``, with blocks transposed or not."""
    shape = (*x.shape[:-1], n_out)
    if 0 in (*shape, data.size):
        y = mx.zeros(shape, x.dtype)
        return y if bias is None else y + bias
    if x.shape[-2] == 1 and data.ndim < 3:
        data = data.reshape(-1, data.shape[-1])
        y = _vector_product(_widen(data), half, _widen(x).reshape(-1, x.shape[-1]))
        y = y if bias is None else y + _widen(bias)
        return y.astype(x.dtype).reshape(shape)
    if x.ndim == 2:
        return _product(data[None], half, x[None], n_out, bias, transposed)[0]
    (n_batch, n, _), block = x.shape, 1 if data.ndim == 2 else data.shape[-1]
    few = block > 1 and n < _FEW
    values, padded = _widen(data), any(padded for _, _, padded in buckets(half))
    if block > 1 and not transposed:
        values = values.swapaxes(2, 3)  # blocks as x multiplies them: (V, n_blocks, in, out)
        values = values if few else mx.contiguous(values)
    x_blocks = _row_blocks(x, block) if few else _column_blocks(x, block)
    if padded:
        values, x_blocks = _append_zero(values), _append_zero(x_blocks)
    if bias is not None:
        bias = _widen(bias).reshape(1, -1, *((1, block) if few else (block, 1)))
    parts = []
    size = data.size + x.size + n_batch * n * n_out
    for step in _steps(half, n_batch * block * n, block, size):
        with step.place:
            m, width = step.shape
            if not width:
                part = mx.zeros((n_batch, m, *x_blocks.shape[2:]), values.dtype)
            elif block == 1:
                part = _take(values, step.stored).reshape(n_batch, m * width, 1, 1)
                part = (part * _take(x_blocks, step.cols)).reshape(n_batch, m, width, 1, n)
                part = part.sum(axis=2)
            elif few:
                part = _take(x_blocks, step.cols) @ _take(values, step.stored)
                part = part.reshape(n_batch, m, width, n, block).sum(axis=2)
            else:
                weights = _take(values, step.stored).reshape(n_batch, m, width * block, block)
                gathered = _take(x_blocks, step.cols).reshape(n_batch, m, width * block, n)
                part = weights.swapaxes(2, 3) @ gathered
            if bias is not None:
                part = part + _take(bias, step.rows)
            parts.append(part.astype(x.dtype))  # (V, m, B, N), or (V, m, N, B) for few rows
    y = _join(parts)
    if half["order"].size:
        y = mx.take(y, half["order"], axis=1)
    return (y.transpose(0, 2, 1, 3) if few else y.transpose(0, 3, 1, 2)).reshape(shape)


def _vector_product(data: mx.array, half: Half, x: mx.array) -> mx.array:
    """Return A_v x[v]: ``(V, n_rows)``, of ``data (V, nnz)`` and ``x (V, n_cols)``."""
    if any(padded for _, _, padded in buckets(half)):
        data, x = _append_zero(data), _append_zero(x)
    parts = []
    for step in _steps(half, x.shape[0], 1, data.size):
        with step.place:
            part = _take(data, step.stored) * _take(x, step.cols)
            parts.append(part.reshape(-1, *step.shape).sum(axis=2))  # (V, m)
    y = _join(parts)
    return _take(y, half["order"]) if half["order"].size else y


class _Step(NamedTuple):
    """What a step of a product takes: ``m`` block-rows of ``K`` blocks each."""

    place: AbstractContextManager  # the stream to compute it on
    shape: tuple[int, int]  # (m, K)
    rows: Index  # (m,) block-rows
    stored: Index  # (m * K,) places of their blocks in data
    cols: mx.array  # (m * K,) columns of their blocks


def _steps(half: Half, gathered: int, block: int, size: int) -> Iterator[_Step]:
    """Yield the steps of a product; each block gathers ``gathered`` values."""
    uniform = not half["slots"].size
    slots = half["indices" if uniform else "slots"].view(mx.uint32)
    places = half["perm" if uniform else "stored"].view(mx.uint32)
    first_row = first_slot = 0
    for n_rows, width, _ in buckets(half):
        for place, start, stop in _cut(n_rows, width * gathered, block, size):
            rows: Index = slice(first_row + start, first_row + stop)
            stored: Index = slice(first_slot + start * width, first_slot + stop * width)
            cols = slots[stored]
            if not uniform:
                rows = half["rows"][rows]
            if places.size:
                stored = places[stored]
            yield _Step(place, (stop - start, width), rows, stored, cols)
        first_row += n_rows
        first_slot += n_rows * width


def _cut(
    count: int, values: int, block: int, size: int
) -> Iterator[tuple[AbstractContextManager, int, int]]:
    """Yield the place, start and stop of each step over ``count`` units that gather ``values``.

    ``size`` is that of the operands and the result: a product may take some multiple of it. The
    first step stays on the stream in use.
    """
    streams, step = [None], _GPU_STEP
    if mx.default_device().type == mx.cpu:
        step = _SCALAR_STEP if block == 1 else min(_LARGEST_STEP, max(_STEP, size // 16))
        if count * values * block >= _SPLIT:
            streams += _more_streams()
    n_steps = max(1, -(-count * values // step))
    n_steps = min(count, -(-n_steps // len(streams)) * len(streams))
    for i in range(n_steps):
        stream = streams[i % len(streams)]
        place = nullcontext() if stream is None else mx.stream(stream)
        yield place, count * i // n_steps, count * (i + 1) // n_steps


@cache
def _more_streams() -> list:
    """Return the streams that help the one in use; MLX gives each Python thread its own of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(min(_STREAMS, cores or 1) - 1)]


def _row_blocks(x: mx.array, block: int) -> mx.array:
    """Return ``(V, N, C * B)`` as ``(V, C, N, B)``, widened."""
    n_batch, n, width = x.shape
    if n == 1:
        return _widen(x).reshape(n_batch, width // block, 1, block)
    x = x.reshape(n_batch, n, width // block, block).swapaxes(1, 2)
    return _widen(mx.contiguous(x))


def _column_blocks(x: mx.array, block: int) -> mx.array:
    """Return ``(V, N, C * B)`` as ``(V, C, B, N)``, widened."""
    n_batch, n, width = x.shape
    if n == 1:
        return _widen(x).reshape(n_batch, width // block, block, 1)
    if x.size > _CACHED and block > 1:
        # Strides of whole rows of x would miss the cache: first by blocks, then within each.
        return mx.contiguous(_row_blocks(x, block).swapaxes(2, 3))
    x = x.swapaxes(1, 2).reshape(n_batch, width // block, block, n)
    return _widen(mx.contiguous(x))


def _take(values: mx.array, index: Index) -> mx.array:
    """Return ``values[:, index]`` of an index with one axis."""
    if isinstance(index, slice):
        return values[:, index]
    if math.prod(values.shape[2:]) > 1:
        return mx.take(values, index, axis=1)
    # Single elements: take_along_axis is some forty times faster on the CPU than take.
    index = mx.broadcast_to(index[None], (values.shape[0], index.size))
    flat = values.reshape(values.shape[:2])
    out = mx.take_along_axis(flat, index, axis=1)
    return out if values.ndim == 2 else out.reshape(*index.shape, *values.shape[2:])


def _append_zero(values: mx.array) -> mx.array:
    """Return ``values (V, n, ...)`` and one zero past the end, for the padding to take."""
    zero = mx.zeros((values.shape[0], 1, *values.shape[2:]), values.dtype)
    return mx.concatenate([values, zero], axis=1)


def _join(parts: list[mx.array]) -> mx.array:
    """Join the ``(V, m, ...)`` of all steps."""
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _places(half: Half) -> tuple:
    """Return the index of the stored blocks in ``(V, R, C, ...)``."""
    n_rows, n_blocks = half["indptr"].size - 1, half["indices"].size
    row = half["row"]
    if not row.size:
        row = mx.broadcast_to(mx.arange(n_rows)[:, None], (n_rows, n_blocks // n_rows)).flatten()
    return slice(None), row, half["indices"]


def _wide_dtype(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype


def _widen(x: mx.array) -> mx.array:
    return x.astype(_wide_dtype(x.dtype))
