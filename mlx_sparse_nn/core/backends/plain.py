"""The three products in plain mlx.core: the CPU path, and the oracle of the kernels.

Operands may have a leading axis V of independent matrices that share one pattern, as in ``vmap``.
Block-rows are gathered bucket by bucket (see ``Layout``) into batched dense operations. No scatter
is used, so sums have one fixed order and results are the same bit for bit from run to run.

Products are cut into steps (see ``steps``), and 16-bit values are not widened, or step by step.
"""

from __future__ import annotations

import itertools
import math

import mlx.core as mx

from mlx_sparse_nn.core.backends.schedule import Index, after, cut, in_turn, put, step_bytes, steps
from mlx_sparse_nn.core.layout import Half, Layout, buckets

NAME = "plain"
_FEW = 8  # rows of x below which blocks are multiplied one by one, where they are of twice the side
_CACHED = 1 << 18  # values up to which a transposition stays in the cache


def is_available() -> bool:
    """Return True: plain MLX runs on every device."""
    return True


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int) -> bool:
    """Return True: plain MLX takes every product."""
    return True


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
    return _product(data, layout, x, bias, transposed=False)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; shapes as in :func:`spmm`, swapped."""
    return _product(data, layout, y, None, transposed=True)


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
    x_blocks, y_blocks = (_row_blocks(a, block) for a in (x, y))  # (V * C, N, B), ...
    if block == 1:
        x_blocks, y_blocks = _widen(x_blocks), _widen(y_blocks)
    indices, row = half["indices"].view(mx.uint32), half["row"]
    held = x.nbytes + y.nbytes + math.prod(shape) * x.itemsize
    unit = n_batch * block * x_blocks.itemsize * n
    work = n_batch * n * block**2 if n > 1 else 0  # one row takes less than to put steps together
    size = step_bytes(half, indices.size * unit, held, x_blocks.nbytes + y_blocks.nbytes)
    # Rows of equal length are taken whole, or in equal pieces if too wide; others block by block.
    width = 1 if row.size else indices.size // (half["indptr"].size - 1)
    least = max(1, min(width, -(-width * unit // size)))
    pieces = next(k for k in range(least, width + 1) if width % k == 0)
    width //= pieces
    parts, out = [], None
    for place, start, stop in cut(indices.size // width, width * unit, width * work, size):
        with place:
            rows = row[start:stop] if row.size else slice(start, stop)
            if pieces > 1:
                rows = mx.arange(start, stop) // pieces
            cols = in_turn(indices[start * width : stop * width], parts)
            y_part = _take(y_blocks, rows, n_batch).reshape(-1, 1, n, block)
            x_part = _take(x_blocks, cols, n_batch).reshape(-1, width, n, block)
            if block == 1:
                part = (x_part * y_part).sum(axis=2)
            else:
                y_part = y_part.swapaxes(2, 3)
                part = y_part * x_part if n == 1 else y_part @ x_part
            parts.append(part.reshape(-1, *layout.data_shape[1:]).astype(x.dtype))
        out = put(out, parts[-1], start * width, indices.size, n_batch)
    assert out is not None
    return out.reshape(shape)


def _product(
    data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Return the product with the matrix, or with its transpose."""
    n, block, n_out = x.shape[-2], layout.block_size, layout.shape[1 if transposed else 0]
    shape = (*x.shape[:-1], n_out)
    if 0 in (*shape, data.size):
        y = mx.zeros(shape, x.dtype)
        return y if bias is None else y + bias
    half = layout.cols if transposed else layout.rows
    if block * n == 1:
        return _vector_product(data, half, x, bias).reshape(shape)
    data = data.reshape(-1, block, block)
    if n < _FEW and 2 * n <= block:
        return _few_product(data, layout, x, bias, transposed).reshape(shape)
    return _many_product(data, half, x, bias, transposed).reshape(shape)


def _many_product(
    data: mx.array, half: Half, x: mx.array, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Return :func:`_product` of blocks and many rows of x, as ``(V, N, n_rows * B)``.

    The blocks of a row, side by side, are one operand of a matrix product. That of 16-bit types
    accumulates in float32 and rounds once, so that blocks of them need not be widened. Scalars are,
    since it is made for tiles.
    """
    n, block = x.shape[-2], data.shape[-1]
    n_batch, n_rows = math.prod(x.shape[:-2]), half["indptr"].size - 1
    dtype = _wide_dtype(x.dtype) if block == 1 else x.dtype
    gathered = n + block if block > 1 else n  # blocks are rearranged, too
    unit, work = n_batch * gathered * block * dtype.size, n_batch * n * block**2
    y_bytes = n_batch * n * n_rows * block * x.itemsize
    copied = x.size * dtype.size + y_bytes * bool(half["order"].size) + data.nbytes * _padded(half)
    size = step_bytes(half, _n_slots(half) * unit, data.nbytes + x.nbytes + y_bytes, copied)
    # Block-rows that are too wide for a step multiply some rows of x after the other.
    widest = unit * max(width for _, width, _ in buckets(half))
    n_pieces = min(-(-widest // size), max(1, n // max(block, _FEW)))
    bounds = [n * i // n_pieces for i in range(n_pieces + 1)]
    pieces = [x[..., a:b, :] for a, b in itertools.pairwise(bounds)] if n_pieces > 1 else [x]
    pieces = [_column_blocks(a, block).astype(dtype) for a in pieces]
    data, *pieces = _with_zeros(half, n_batch, data, *pieces)
    narrow = dtype != _wide_dtype(dtype)  # then the bias has to be added before the one rounding
    if bias is not None:
        if narrow:  # MLX (0.32.4) cannot map addmm where its first argument alone is mapped
            index = "slots" if half["slots"].size else "indices"
            half = half | {index: after(half[index], bias)}
        bias = mx.concatenate([bias.astype(dtype).reshape(-1, block, 1)] * n_batch)
    parts: list[mx.array] = []
    ys: dict[int, mx.array] = {}
    for step in steps(half, unit, work, size):
        m, width = step.shape
        with step.place:
            weights = _take(data, step.stored, n_batch).astype(dtype)
            if block > 1 and not transposed:
                weights = mx.contiguous(weights.swapaxes(1, 2))  # as x multiplies them: (in, out)
            weights = weights.reshape(n_batch * m, width * block, block).swapaxes(1, 2)
            added = None if bias is None else _take(bias, step.rows, n_batch)
        for i, piece in enumerate(pieces):
            with step.place:
                xs = _take(piece, in_turn(step.cols, parts, n_pieces), n_batch)
                xs = xs.reshape(n_batch * m, width * block, piece.shape[-1])
                if not width:
                    part = mx.zeros((n_batch * m, *piece.shape[1:]), dtype)
                elif narrow and added is not None:
                    part = mx.addmm(added, weights, xs)
                else:
                    part = weights @ xs
                if added is not None and not (narrow and width):
                    part = part + added
                parts.append(part.astype(x.dtype))  # (V * m, B, N)
            ys[i] = put(ys.get(i), parts[-1], step.start, n_rows, n_batch)
    results = [_in_order(y, half, n_batch) for y in ys.values()]
    y = results[0] if n_pieces == 1 else mx.concatenate(results, axis=-1)
    return y.reshape(n_batch, n_rows * block, n).swapaxes(1, 2)


def _few_product(
    data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Return :func:`_product` of blocks and few rows of x, as ``(V, N, n_rows, B)``.

    Every block multiplies its part of each row of x, in stored order, so that blocks are not moved;
    then the few values that this gives are added up by block-rows.
    """
    half = layout.cols if transposed else layout.rows
    n, block, n_blocks = x.shape[-2], data.shape[-1], half["indices"].size
    n_batch, n_rows = math.prod(x.shape[:-2]), half["indptr"].size - 1
    held = data.nbytes + x.nbytes + n_batch * n * n_rows * block * x.itemsize
    x_blocks, work = _widen(_row_blocks(x, block)), n_batch * n * block**2  # x_blocks (V * C, N, B)
    of_block = n_batch * n * block * x_blocks.itemsize  # bytes of its product, and of what it takes
    unit = 2 * of_block
    by_elements = n == 1 and block < 8  # MLX calls sgemm once a block
    if by_elements or x.dtype != x_blocks.dtype:  # then something is as large as the blocks
        unit += n_batch * block**2 * x_blocks.itemsize
    total = n_blocks * unit * 2 // 3  # other products of so few rows take little at the same time
    size = step_bytes(half, total, held, 2 * n_blocks * of_block)
    index = _row_of_each(layout.rows) if transposed else layout.rows["indices"]
    index = index.view(mx.uint32)  # block of x that each stored block takes
    parts, products, y = [], None, None
    for place, start, stop in cut(n_blocks, unit, work, size):
        with place:
            weights = _widen(_take(data, slice(start, stop), n_batch))
            xs = _take(x_blocks, in_turn(index[start:stop], parts), n_batch)
            if by_elements:
                xs = xs.swapaxes(1, 2) if transposed else xs
                part = (xs * weights).sum(axis=1 if transposed else 2).reshape(-1, 1, block)
            else:
                part = xs @ (weights if transposed else weights.swapaxes(1, 2))
            parts.append(part)
        products = put(products, parts[-1], start, n_blocks, n_batch)  # (V * n_blocks, N, B)
    assert products is not None
    (products,) = _with_zeros(half, n_batch, products)
    if bias is not None:
        bias = mx.concatenate([_widen(bias).reshape(-1, 1, block)] * n_batch)
    for step in steps(half, of_block, 0, size):
        m, width = step.shape
        if width:
            part = _take(products, step.stored, n_batch)
            part = part.reshape(n_batch * m, width, n, block).sum(axis=1)
        else:
            part = mx.zeros((n_batch * m, n, block), x_blocks.dtype)
        if bias is not None:
            part = part + _take(bias, step.rows, n_batch)
        y = put(y, part.astype(x.dtype), step.start, n_rows, n_batch)  # (V * n_rows, N, B)
    assert y is not None
    return _in_order(y, half, n_batch).reshape(n_batch, n_rows, n, block).swapaxes(1, 2)


def _vector_product(data: mx.array, half: Half, x: mx.array, bias: mx.array | None) -> mx.array:
    """Return :func:`_product` of scalars and one row of x, as ``(V * n_rows,)``."""
    n_batch, n_rows = math.prod(x.shape[:-2]), half["indptr"].size - 1
    held = x.nbytes + data.nbytes + n_batch * n_rows * x.itemsize
    # Where data is read as it lies, no more is gathered than it holds: there is room for all.
    is_wide = x.dtype == _wide_dtype(x.dtype)
    direct = is_wide and not (half["stored"].size or half["perm"].size)
    unit = n_batch * (x.itemsize if is_wide else 5)  # widened they take 4, and 2 more until then
    unit = unit if direct else 2 * unit + 4  # values of both, and an index
    total = 0 if direct else _n_slots(half) * unit
    size = step_bytes(half, total, held, data.nbytes * _padded(half))
    data, x = _with_zeros(half, n_batch, data.reshape(-1), x.reshape(-1))
    if bias is not None:
        bias = _widen(mx.concatenate([bias] * n_batch))
    parts, y = [], None
    for step in steps(half, unit, n_batch, size):
        with step.place:
            m, width = step.shape
            cols = step.cols if direct else in_turn(step.cols, parts)
            part = _widen(_take(data, step.stored, n_batch)) * _widen(_take(x, cols, n_batch))
            part = part.reshape(n_batch * m, width)
            part = part.sum(axis=1) if width else mx.zeros(n_batch * m, part.dtype)
            if bias is not None:
                part = part + _take(bias, step.rows, n_batch)
            parts.append(part.astype(x.dtype))  # (V * m,)
        y = put(y, parts[-1], step.start, n_rows, n_batch)
    assert y is not None
    return _in_order(y, half, n_batch)


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
    if values.ndim == 1:
        return mx.take_along_axis(values, index, axis=0)
    return mx.take_along_axis(values.reshape(-1), index, axis=0).reshape(-1, *values.shape[1:])


def _n_slots(half: Half) -> int:
    return half["slots"].size or half["indices"].size


def _padded(half: Half) -> bool:
    return any(padded for _, _, padded in buckets(half))


def _in_order(y: mx.array, half: Half, n_batch: int) -> mx.array:
    """Return the block-rows ``y (V * n, ...)`` of the buckets in the order of the matrix."""
    return _take(y, half["order"], n_batch) if half["order"].size else y


def _with_zeros(half: Half, n_batch: int, *arrays: mx.array) -> list[mx.array]:
    """Return each ``(V * n, ...)`` with a zero after each of V parts, if padding takes it."""
    if not _padded(half):
        return list(arrays)
    parts = [a.reshape(n_batch, -1, *a.shape[1:]) for a in arrays]
    parts = [mx.concatenate([a, mx.zeros_like(a[:, :1])], axis=1) for a in parts]
    return [a.reshape(-1, *a.shape[2:]) for a in parts]


def _row_of_each(half: Half) -> mx.array:
    """Return the block-row of each stored block, ``(n_blocks,)``."""
    n_rows, n_blocks = half["indptr"].size - 1, half["indices"].size
    if half["row"].size:
        return half["row"]
    return mx.broadcast_to(mx.arange(n_rows)[:, None], (n_rows, n_blocks // n_rows)).flatten()


def _wide_dtype(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype


def _widen(x: mx.array) -> mx.array:
    return x.astype(_wide_dtype(x.dtype))
