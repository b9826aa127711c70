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

_STEP = 1 << 15  # gathered values in a step of a product of blocks, on the CPU
_LARGEST_STEP = 1 << 18  # the same where operands are large
_SCALAR_STEP = 1 << 18  # the same of scalars, which take less time each
_GPU_STEP = 1 << 24  # the same on a GPU, to bound the memory
_FEW = 8  # rows of x below which each row multiplies the blocks
_SPLIT = 1 << 18  # multiplications from which a product goes to several streams
_CACHED = 1 << 18  # values up to which a transposition stays in the cache
_STREAMS = 4  # at most, and no more than there are cores
_AHEAD = 4  # steps that may gather before the first of them is done

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
    n, block, half = x.shape[-2], layout.block_size, layout.rows
    n_batch, shape = math.prod(x.shape[:-2]), (*x.shape[:-2], *layout.data_shape)
    if 0 in (*shape, n):
        return mx.zeros(shape, x.dtype)
    x_blocks, y_blocks = (_row_blocks(a, block) for a in (x, y))  # (V * C, N, B), (V * R, N, B)
    # Rows of equal length are taken whole, others block by block.
    n_units, width = half["row"].size or half["indptr"].size - 1, 1
    if not half["row"].size:
        width = half["indices"].size // n_units
    indices, parts, out = half["indices"].view(mx.uint32), [], None
    size = x.nbytes + y.nbytes + math.prod(shape) * x.itemsize
    size = size if x.dtype == _wide_dtype(x.dtype) else size // 2  # widened copies come on top
    for place, start, stop in _cut(n_units, n_batch * width * block * n, block, size):
        with place:
            rows = half["row"][start:stop] if half["row"].size else slice(start, stop)
            y_part = _widen(_take(y_blocks, rows, n_batch)).reshape(-1, 1, n, block)
            cols = _in_turn(indices[start * width : stop * width], parts)
            x_part = _take(x_blocks, cols, n_batch)
            x_part = _widen(x_part).reshape(-1, width, n, block)
            part = (x_part * y_part).sum(axis=2) if block == 1 else y_part.swapaxes(2, 3) @ x_part
            parts.append(part.reshape(-1, *layout.data_shape[1:]).astype(x.dtype))
        out = _put(out, parts[-1], start * width, half["indices"].size, n_batch)
    assert out is not None
    return out.reshape(shape)


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
    n, block = x.shape[-2], data.shape[-1] if data.ndim > x.ndim else 1
    n_batch, shape = math.prod(x.shape[:-2]), (*x.shape[:-1], n_out)
    if 0 in (*shape, data.size):
        y = mx.zeros(shape, x.dtype)
        return y if bias is None else y + bias
    # One product of vectors, few rows of x times blocks, or blocks times many rows.
    vector, few = block * n == 1, block > 1 and n < _FEW
    values = data.reshape(-1, *((block, block) if block > 1 else ()))  # (V * n_blocks, ...)
    if vector:
        x_blocks = x.reshape(-1)
    else:
        x_blocks = _row_blocks(x, block) if few else _column_blocks(x, block)
    if any(padded for _, _, padded in buckets(half)):
        values, x_blocks = _append_zero(values, n_batch), _append_zero(x_blocks, n_batch)
    if block > 1 and not (few or transposed):
        values = mx.contiguous(values.swapaxes(1, 2))  # as x multiplies them: (in, out)
    if bias is not None:
        axes = () if vector else (1, block) if few else (block, 1)
        bias = mx.concatenate([_widen(bias).reshape(-1, *axes)] * n_batch)  # as the parts below
    parts, y = [], None
    size = data.nbytes + x.nbytes + math.prod(shape) * x.itemsize
    size = size if x.dtype == _wide_dtype(x.dtype) else size // 2  # widened copies come on top
    for step in _steps(half, n_batch * block * n, block, size):
        with step.place:
            (m, width), weights = step.shape, _widen(_take(values, step.stored, n_batch))
            cols = step.cols if vector else _in_turn(step.cols, parts)
            gathered = _widen(_take(x_blocks, cols, n_batch))
            if not width:
                part = mx.zeros((n_batch * m, *x_blocks.shape[1:]), weights.dtype)
            elif few:
                part = gathered @ (weights if transposed else weights.swapaxes(1, 2))
                part = part.reshape(-1, width, n, block).sum(axis=1)  # (V * m, N, B)
            elif block > 1:
                weights = weights.reshape(-1, width * block, block).swapaxes(1, 2)
                part = weights @ gathered.reshape(-1, width * block, n)  # (V * m, B, N)
            elif vector:
                part = (weights * gathered).reshape(-1, width).sum(axis=1)  # (V * m,)
            else:
                part = weights.reshape(-1, 1, 1) * gathered
                part = part.reshape(-1, width, 1, n).sum(axis=1)
            if bias is not None:
                part = part + _take(bias, step.rows, n_batch)
            parts.append(part.astype(x.dtype))
        y = _put(y, parts[-1], step.start, n_out // block, n_batch)
    assert y is not None
    if half["order"].size:
        y = _take(y, half["order"], n_batch)
    if vector:
        return y.reshape(shape)
    if few:
        return y.reshape(*shape[:-2], -1, n, block).swapaxes(-3, -2).reshape(shape)
    return y.reshape(*shape[:-2], n_out, n).swapaxes(-1, -2)


class _Step(NamedTuple):
    """What a step of a product takes: ``m`` block-rows of ``K`` blocks each."""

    place: AbstractContextManager  # the stream to compute it on
    start: int  # place of its first row among all, bucket by bucket
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
            yield _Step(place, first_row + start, (stop - start, width), rows, stored, cols)
        first_row += n_rows
        first_slot += n_rows * width


def _cut(
    count: int, values: int, block: int, size: int
) -> Iterator[tuple[AbstractContextManager, int, int]]:
    """Yield the place, start and stop of each step over ``count`` units that gather ``values``.

    ``size`` is bytes of the operands and the result: a product may take some multiple of it. The
    first step stays on the stream in use.
    """
    streams, step = [None], _GPU_STEP
    if mx.default_device().type == mx.cpu:
        step = _SCALAR_STEP if block == 1 else min(_LARGEST_STEP, max(_STEP, size // 32))
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
    """Return ``(V, N, C * B)`` as ``(V * C, N, B)``."""
    n, width = x.shape[-2:]
    if n > 1:
        x = mx.contiguous(x.reshape(-1, n, width // block, block).swapaxes(1, 2))
    return x.reshape(-1, n, block)


def _column_blocks(x: mx.array, block: int) -> mx.array:
    """Return ``(V, N, C * B)`` as ``(V * C, B, N)``."""
    n = x.shape[-2]
    if x.size > _CACHED and block > 1:
        # Strides of whole rows of x would miss the cache: first by blocks, then within each.
        return mx.contiguous(_row_blocks(x, block).swapaxes(1, 2))
    return mx.contiguous(x.swapaxes(-1, -2)).reshape(-1, block, n)


def _take(values: mx.array, index: Index, n_batch: int) -> mx.array:
    """Return ``(V * m, ...)``: what ``index (m,)`` names of each of V parts of ``(V * n, ...)``."""
    if n_batch > 1:
        n = values.shape[0] // n_batch
        if isinstance(index, slice):
            index = mx.arange(index.start, index.stop)
        index = (index + n * mx.arange(n_batch, dtype=index.dtype)[:, None]).reshape(-1)
    if isinstance(index, slice):
        return values[index]
    if values.size > values.shape[0]:
        return mx.take(values, index, axis=0)
    # Single elements: take_along_axis is some forty times faster on the CPU than take.
    out = mx.take_along_axis(values.reshape(-1), index, axis=0)
    return out if values.ndim == 1 else out.reshape(-1, *values.shape[1:])


def _append_zero(values: mx.array, n_batch: int) -> mx.array:
    """Return ``(V * n, ...)`` with a zero past the end of each of V parts, for padding to take."""
    values = values.reshape(n_batch, -1, *values.shape[1:])
    zero = mx.zeros((n_batch, 1, *values.shape[2:]), values.dtype)
    return mx.concatenate([values, zero], axis=1).reshape(-1, *values.shape[2:])


def _in_turn(index: mx.array, parts: list[mx.array]) -> mx.array:
    """Return ``index``, to be there once the part ``_AHEAD`` steps before is.

    MLX evaluates a graph level by level and would hold what all steps gather at once.
    ``mx.depends`` says the same as the selection here, but cannot be mapped.
    """
    if len(parts) < _AHEAD:
        return index
    return mx.where(parts[-_AHEAD].reshape(-1)[:1] == 0, index, index)


def _put(rows: mx.array | None, part: mx.array, start: int, n: int, n_batch: int) -> mx.array:
    """Return ``rows (V * n, ...)`` with ``part (V * m, ...)`` at ``start`` of each of V parts.

    In place, since nothing else holds ``rows``.
    """
    m, shape = part.shape[0] // n_batch, part.shape[1:]
    if m == n:
        return part
    if rows is None:
        rows = mx.zeros((n_batch * n, *shape), part.dtype)
    if n_batch == 1:
        rows[start : start + m] = part
        return rows
    rows = rows.reshape(n_batch, n, *shape)
    rows[:, start : start + m] = part.reshape(n_batch, m, *shape)
    return rows.reshape(-1, *shape)


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
