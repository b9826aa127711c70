"""The three products in plain mlx.core: the CPU path, and the oracle of the kernels.

Data has a leading axis V of independent matrices that share one pattern (1 unless under ``vmap``).
Block-rows are gathered bucket by bucket (see ``Layout``) into batched dense operations. No scatter
is used, so sums have one fixed order and results are the same bit for bit from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import mlx.core as mx

from mlx_sparse_nn.core.layout import Half, Layout, buckets

# Gathered values per step: 2 MB of float32 stay in the cache and bound the memory of wide products.
_STEP = 1 << 19

Index: TypeAlias = "mx.array | slice"


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r].

    Args:
        data: ``(V, n_blocks)`` for scalars or ``(V, n_blocks, B, B)``.
        layout: Layout of the pattern.
        x: ``(V, N, n_cols)`` of the dtype of ``data``.
        bias: ``(n_rows,)`` of the same dtype, or None.

    Returns:
        ``(V, N, n_rows)`` of the same dtype, accumulated in float32 at least.
    """
    y = _product(data, layout.rows, x, layout.shape[0], transposed=False)
    return (y if bias is None else y + _widen(bias)).astype(x.dtype)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; shapes as in :func:`spmm`, swapped."""
    return _product(data, layout.cols, y, layout.shape[1], transposed=True).astype(y.dtype)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)] for every stored place j.

    Args:
        layout: Layout of the pattern.
        y: ``(V, N, n_rows)``.
        x: ``(V, N, n_cols)`` of the dtype of ``y``.

    Returns:
        ``(V, n_blocks)`` or ``(V, n_blocks, B, B)`` of the same dtype.
    """
    (n_batch, n, _), block, half = x.shape, layout.block_size, layout.rows
    shape = (n_batch, *layout.data_shape)
    if 0 in (*shape, n):
        return mx.zeros(shape, x.dtype)
    x_rows = _feature_blocks(x, block)  # (V, C, B * N)
    y_rows = _widen(y).reshape(n_batch, n, -1, block).swapaxes(1, 2)  # (V, R, N, B)
    parts = []
    for rows, _, cols, _ in _steps(half, n_batch * block * n):
        m, width = cols.shape
        x_part = _take(x_rows, cols).reshape(n_batch, m, width * block, n)
        y_part = _take(y_rows, rows)
        if block == 1:
            part = (x_part * y_part.swapaxes(2, 3)).sum(axis=-1)
        else:
            part = (x_part @ y_part).reshape(n_batch, m, width, block, block).swapaxes(3, 4)
        parts.append(part.reshape(n_batch, m * width, *shape[2:]))
    return _in_stored_order(parts, half).astype(x.dtype)


def todense(data: mx.array, layout: Layout) -> mx.array:
    """Return the dense ``(V, n_rows, n_cols)`` matrices; repeated entries add up in float32."""
    (n_rows, n_cols), block, n_batch = layout.shape, layout.block_size, data.shape[0]
    shape = (n_batch, n_rows // block, n_cols // block, block, block)
    blocks = mx.zeros(shape, _wide_dtype(data.dtype))
    values = _widen(data).reshape(n_batch, -1, block, block)
    for rows, stored, cols, valid in _steps(layout.rows, block * block):
        part = _take(values, stored).reshape(n_batch, *cols.shape, block, block)
        places = (slice(None), _expand(rows, cols.shape), cols)
        blocks = blocks.at[places].add(_mask(part, valid))
    return blocks.swapaxes(2, 3).reshape(n_batch, n_rows, n_cols).astype(data.dtype)


def sample(layout: Layout, dense: mx.array) -> mx.array:
    """Return the values of ``dense (V, n_rows, n_cols)`` at the stored places: :func:`todense`'s
    transpose, of shape ``(V, n_blocks)`` or ``(V, n_blocks, B, B)``."""
    (n_rows, n_cols), block, n_batch = layout.shape, layout.block_size, dense.shape[0]
    blocks = dense.reshape(n_batch, n_rows // block, block, n_cols // block, block)
    blocks = blocks.swapaxes(2, 3)
    parts = [
        blocks[:, _expand(rows, cols.shape), cols].reshape(n_batch, -1, block, block)
        for rows, _, cols, _ in _steps(layout.rows, block * block)
    ]
    shape = (n_batch, *layout.data_shape)
    return _in_stored_order(parts, layout.rows).reshape(shape) if parts else mx.zeros(shape)


def _product(data: mx.array, half: Half, x: mx.array, n_out: int, transposed: bool) -> mx.array:
    """Return the product over the block-rows of ``half``, blocks transposed or not, in float32."""
    (n_batch, n, _), block = x.shape, 1 if data.ndim == 2 else data.shape[-1]
    shape = (n_batch, n, n_out)
    if 0 in (*shape, data.shape[1]):
        return mx.zeros(shape, _wide_dtype(x.dtype))
    values = _widen(data)
    x_rows = _feature_blocks(x, block)  # (V, C, B * N)
    parts = []
    for _, stored, cols, valid in _steps(half, n_batch * block * n):
        m, width = cols.shape
        weights = _take(values, stored)  # (V, m * width, ...)
        if block == 1:
            weights = weights.reshape(n_batch, m, width, 1)
            products = weights * _take(x_rows, cols).reshape(n_batch, m, width, n)
            parts.append(_mask(products, valid).sum(axis=2, keepdims=True))
        else:
            axes = (0, 1, 4, 2, 3) if transposed else (0, 1, 3, 2, 4)
            weights = weights.reshape(n_batch, m, width, block, block)
            weights = _mask(weights, valid).transpose(axes).reshape(n_batch, m, block, -1)
            gathered = _take(x_rows, cols).reshape(n_batch, m, width, block * n)
            gathered = _mask(gathered, valid).reshape(n_batch, m, width * block, n)
            parts.append(weights @ gathered)  # (V, m, B, N)
    if half["order"].size:
        parts.append(mx.zeros((n_batch, 1, block, n), parts[0].dtype))  # rows without blocks
    out = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    if half["order"].size:
        out = mx.take(out, half["order"], axis=1)
    return out.reshape(n_batch, n_out, n).swapaxes(1, 2)


def _steps(half: Half, size: int) -> Iterator[tuple[Index, Index, mx.array, mx.array | None]]:
    """Yield ``rows (m,)``, ``stored (m, K)``, ``cols (m, K)`` and ``valid (m, K)`` of each step.

    ``stored`` says where in ``data`` the blocks of the step lie. ``rows`` and ``stored`` are slices
    where they lie side by side, and ``valid`` is None where no row is padded. Each block gathers
    ``size`` values, and a step is as many rows as keep that near ``_STEP``.
    """
    indptr, indices = half["indptr"], half["indices"]
    uniform, first = half["order"].size == 0, 0
    for n_rows, width, padded in buckets(half):
        step = max(1, _STEP // (width * size))
        for start in range(first, first + n_rows, step):
            stop = min(start + step, first + n_rows)
            rows: Index = slice(start, stop)
            stored: Index = slice(start * width, stop * width)
            valid = None
            if not uniform:
                rows = half["rows"][start:stop]
                stored = indptr[rows][:, None] + mx.arange(width)
                if padded:
                    valid = stored < indptr[rows + 1][:, None]
                    stored = mx.where(valid, stored, 0)
            cols = _take(indices[None], stored).reshape(stop - start, width)
            if half["perm"].size:
                stored = _take(half["perm"][None], stored).reshape(stop - start, width)
            yield rows, stored, cols, valid
        first += n_rows


def _in_stored_order(parts: list[mx.array], half: Half) -> mx.array:
    """Join ``(V, m * K, ...)`` of all steps and drop the padding: ``(V, n_blocks, ...)``."""
    data = mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return _take(data, half["slots"]) if half["slots"].size else data


def _expand(rows: Index, shape: tuple[int, ...]) -> mx.array:
    """Return the rows ``(m,)`` of a step repeated over its ``(m, K)`` places."""
    if isinstance(rows, slice):
        rows = mx.arange(rows.start, rows.stop)
    return mx.broadcast_to(rows[:, None], shape)


def _take(values: mx.array, index: Index) -> mx.array:
    """Return ``values[:, index]``, with the index flattened."""
    if isinstance(index, slice):
        return values[:, index]
    index = index.reshape(-1)
    if values.size > values.shape[0] * values.shape[1]:
        return mx.take(values, index, axis=1)
    # Single elements: take_along_axis is some forty times faster on the CPU than take.
    flat = values.reshape(values.shape[:2])
    index = mx.broadcast_to(index, (values.shape[0], index.size))
    return mx.take_along_axis(flat, index, axis=1).reshape(*index.shape, *values.shape[2:])


def _mask(values: mx.array, valid: mx.array | None) -> mx.array:
    """Return ``values (V, m, K, ...)`` with zeros where ``valid (m, K)`` is false."""
    if valid is None:
        return values
    valid = valid.reshape(*valid.shape, *(1,) * (values.ndim - 3))
    return mx.where(valid, values, mx.zeros((), values.dtype))


def _feature_blocks(x: mx.array, block: int) -> mx.array:
    """Return ``(V, N, C * B)`` as ``(V, C, B * N)``: one row per block of features, widened."""
    n_batch, n, width = x.shape
    return _widen(x).swapaxes(1, 2).reshape(n_batch, width // block, block * n)


def _wide_dtype(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype


def _widen(x: mx.array) -> mx.array:
    return x.astype(_wide_dtype(x.dtype))
