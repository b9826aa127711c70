"""The products in plain MLX: what computes where no kernel does.

Operands may have a leading axis V of independent matrices that share one pattern, as in ``vmap``;
inside, their blocks follow one another: ``(V * n_blocks, B, B)``. Block-rows are gathered, group by
group of similar length (see ``buckets``), into batched dense products. No scatter is used, so sums
have one fixed order and results are the same bit for bit from run to run.

Products go in steps (see ``schedule``). 16-bit values are not widened, or step by step.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import edges, tuned
from mlx_sparse_nn.core.backends import schedule
from mlx_sparse_nn.core.backends.buckets import Buckets, buckets_of
from mlx_sparse_nn.core.backends.schedule import Index, Result, Step, depend_on
from mlx_sparse_nn.core.backends.stored import Stored, in_rows
from mlx_sparse_nn.core.layout import Layout, Side
from mlx_sparse_nn.core.quantized import dequantize
from mlx_sparse_nn.core.transforms import tracing

NAME = "plain"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops
TAKES_AXES = False  # of size 1 before a single row of x
_NARROW = (mx.bfloat16, mx.float16)


def is_available() -> bool:
    """Return True: plain MLX runs on every device."""
    return True


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return True: plain MLX takes every product."""
    return True


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r].

    Sizes are those of whole blocks, ``layout.full_shape``. Where these reach past the matrix, x has
    zeros, and ``data`` anything.

    Args:
        data: ``(n_blocks,)`` for scalars or ``(n_blocks, B, B)``; or ``(V, ...)``.
        layout: Layout of the pattern.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``, of the dtype of ``data``.
        bias: ``(n_rows,)`` of the same dtype, or None.

    Returns:
        ``(N, n_rows)`` or ``(V, N, n_rows)`` of the same dtype, accumulated in float32 at least.
    """
    return _product((data,), layout, x, bias, transposed=False)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; shapes as in :func:`spmm`, swapped."""
    return _product((data,), layout, y, None, transposed=True)


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks, which are dequantized step by step.

    Args:
        packed: ``(n_blocks, B, B * bits / 32)`` uint32; or ``(V, ...)``.
        scales, biases: ``(n_blocks, B, B / group_size)`` of the dtype of ``x``; or ``(V, ...)``.
        layout, x, bias: As in :func:`spmm`.
    """
    return _product((packed, scales, biases), layout, x, bias, transposed=False)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, layout: Layout, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks; shapes as in :func:`qspmm`, swapped."""
    return _product((packed, scales, biases), layout, y, None, transposed=True)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)] for every stored place j.

    Args:
        layout: Layout of the pattern.
        y: ``(N, n_rows)`` or ``(V, N, n_rows)``.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``, of the dtype of ``y``.

    Returns:
        ``(n_blocks,)`` or ``(n_blocks, B, B)``, or ``(V, ...)``, of the same dtype.
    """
    side, block_size, n_matrices = layout.rows, layout.block_size, _n_matrices(x)
    shape = (*x.shape[:-2], *layout.data_shape)
    if 0 in (*shape, x.shape[-2]):
        return mx.zeros(shape, x.dtype)
    dtype = x.dtype if block_size > 1 else _wide(x.dtype)
    ys, xs = (_row_blocks(a, block_size).astype(dtype) for a in (y, x))
    rows, columns = side.row_of_block, side.indices.view(mx.uint32)
    cost = schedule.sampled(side, y, x, dtype, block_size)
    data = Result(side.n_blocks, n_matrices)
    for cut in schedule.cut(side.n_blocks, 1, cost):
        blocks = slice(cut.start, cut.stop)
        with cut.stream:
            part = _outer(
                _take(ys, rows[blocks], n_matrices),
                _take(xs, data.wait(columns[blocks]), n_matrices),
            )
            part = in_rows(part, *layout.data_shape[1:]).astype(x.dtype)
        data.write(cut.start, part)
    return data.rows.reshape(shape)


def _cleared(
    layout: Layout, stored: tuple[mx.array, ...], transposed: bool
) -> tuple[mx.array, ...]:
    """Return blocks with zeros past the matrix, along the axis over which whole ones are summed.

    What MLX derives itself, it sums along the other one too.
    """
    derived = tracing.graph is not None
    if len(stored) == 1:
        (data,) = stored
        data = data if transposed and not derived else edges.clear_cols(layout, data)
        return (edges.clear_rows(layout, data) if transposed or derived else data,)
    if derived or not transposed:
        stored = edges.clear_quantized_cols(layout, *stored)
    return edges.clear_quantized_rows(layout, *stored) if derived or transposed else stored


def _product(
    stored: tuple[mx.array, ...],
    layout: Layout,
    x: mx.array,
    bias: mx.array | None,
    transposed: bool,
) -> mx.array:
    """Return the product with the matrix, or with its transpose."""
    n_x, block_size = x.shape[-2], layout.block_size
    shape = (*x.shape[:-1], layout.full_shape[1 if transposed else 0])
    if 0 in (*shape, stored[0].size):
        y = mx.zeros(shape, x.dtype)
        return y if bias is None else y + bias
    if layout.has_edges:
        stored = _cleared(layout, stored, transposed)
    data = Stored.of(stored, block_size)
    if block_size * n_x == 1 or (n_x < tuned.PLAIN_FEW_ROWS and 2 * n_x <= block_size):
        return _few_rows(data, layout, x, bias, transposed).reshape(shape)
    return _many_rows(data, layout.cols if transposed else layout.rows, x, bias, transposed)


def _many_rows(
    data: Stored, side: Side, x: mx.array, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Multiply all blocks of a block-row, side by side, by the columns of x that they meet.

    16-bit blocks need not be widened: MLX's product of these types accumulates in float32 and
    rounds once. Scalars are, since it is made for tiles.

    Returns:
        ``(N, n_rows)`` or ``(V, N, n_rows)``.
    """
    n_x, block_size, n_matrices = x.shape[-2], data.block_size, _n_matrices(x)
    dtype = x.dtype if block_size > 1 else _wide(x.dtype)
    cost = schedule.many_rows(side, data, x, dtype, n_matrices)
    if bias is not None and dtype in _NARROW:
        x = depend_on(x, bias)  # MLX (0.32.4) cannot map addmm by its first argument alone
    if (n_pieces := schedule.n_pieces(side, cost, n_x, block_size)) > 1:
        return _in_pieces(n_pieces, data, side, x, bias, transposed)
    buckets = side.keep(buckets_of)
    columns = _column_blocks(x, block_size).astype(dtype)
    *arrays, columns = _with_zeros(side, n_matrices, *data.arrays, columns)
    blocks = data._replace(arrays=arrays)
    added = None if bias is None else _bias_blocks(bias, buckets.rows, (block_size, 1), n_matrices)
    y = Result(side.n_block_rows, n_matrices)
    for step in schedule.steps(side, buckets, cost):
        with step.stream:
            a = _take_blocks(blocks, step.blocks, n_matrices, dtype)
            a = _side_by_side(a, step, n_matrices, transposed)  # (V * m, B, width * B)
            xs = _take(columns, y.wait(step.columns), n_matrices)
            xs = xs.reshape(a.shape[0], a.shape[2], n_x)
            part = _multiply_add(a, xs, added, step, n_matrices).astype(x.dtype)  # (V * m, B, N)
        y.write(step.rows.start, part)
    y = _in_matrix_order(y, buckets, n_matrices)
    return y.reshape(*x.shape[:-2], side.n_block_rows * block_size, n_x).swapaxes(-1, -2)


def _in_pieces(
    n: int, data: Stored, side: Side, x: mx.array, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Return :func:`_many_rows` of n pieces of x, one after the other."""
    n_x, ys = x.shape[-2], []
    for piece in mx.split(x, [n_x * i // n for i in range(1, n)], axis=-2):
        if ys:
            piece = depend_on(piece, ys[-1])
        ys.append(_many_rows(data, side, piece, bias, transposed))
    return mx.concatenate(ys, axis=-2)


def _few_rows(
    data: Stored, layout: Layout, x: mx.array, bias: mx.array | None, transposed: bool
) -> mx.array:
    """Multiply every block where it lies by its part of each row of x; then add up block-rows.

    So no block is moved, but only the few values that it gives. Scalars are gathered.

    Returns:
        ``(V, N, n_block_rows, B)``.
    """
    n_x, block_size, n_matrices = x.shape[-2], data.block_size, _n_matrices(x)
    side, dtype = layout.cols if transposed else layout.rows, _wide(x.dtype)
    cost_of = schedule.few_rows if block_size > 1 else schedule.scalars
    cost, buckets = cost_of(side, data, x, dtype, n_matrices), side.keep(buckets_of)
    terms, xs = data.arrays[0], _row_blocks(x, block_size)  # xs (V * C, N, B)
    if block_size > 1:
        columns = layout.rows.row_of_block if transposed else side.indices.view(mx.uint32)
        terms = _terms(data, columns, xs.astype(dtype), cost, transposed)  # (V * n_blocks, N, B)
        cost = cost._replace(bytes_per_block=terms.nbytes // side.n_blocks, multiplies_per_block=0)
    terms, xs = _with_zeros(side, n_matrices, terms, xs)
    added = None if bias is None else _bias_blocks(bias, buckets.rows, (1, block_size), n_matrices)
    y = Result(side.n_block_rows, n_matrices)
    for step in schedule.steps(side, buckets, cost):
        with step.stream:
            part = _take(terms, step.blocks, n_matrices).astype(dtype)
            if block_size == 1:
                in_place = isinstance(step.blocks, slice)  # then there is room for all of x
                columns = step.columns if in_place else y.wait(step.columns)
                part = part * _take(xs, columns, n_matrices).astype(dtype)
            part = part.reshape(n_matrices * step.n_rows, step.width, n_x, block_size).sum(axis=1)
            if added is not None:
                part = part + _take(added, step.rows, n_matrices)
            part = part.astype(x.dtype)  # (V * m, N, B)
        y.write(step.rows.start, part)
    y = _in_matrix_order(y, buckets, n_matrices)
    return y.reshape(n_matrices, side.n_block_rows, n_x, block_size).swapaxes(1, 2)


def _terms(
    data: Stored, columns: mx.array, xs: mx.array, cost: schedule.Cost, transposed: bool
) -> mx.array:
    """Return what each block gives for the rows of x, in stored order, ``(V * n_blocks, N, B)``.

    Args:
        data: V * n_blocks blocks.
        columns: ``(n_blocks,)``, the block of x that each one takes.
        xs: Blocks of x, ``(V * C, N, B)``.
        cost: Of the product.
        transposed: Whether blocks are read transposed.
    """
    n_blocks, (_, n_x, block_size) = columns.size, xs.shape
    terms = Result(n_blocks, data.n_blocks // n_blocks)
    for stream, start, stop in schedule.cut(n_blocks, 1, cost):
        with stream:
            a = _take_blocks(data, slice(start, stop), terms.n_matrices, xs.dtype)
            part = _take(xs, terms.wait(columns[start:stop]), terms.n_matrices)  # (V * m, N, B)
            if n_x == 1 and block_size < tuned.MIN_MATMUL_BLOCK:
                part = part.swapaxes(1, 2) if transposed else part
                part = in_rows((part * a).sum(axis=1 if transposed else 2), 1, block_size)
            else:
                part = part @ (a if transposed else a.swapaxes(1, 2))
        terms.write(start, part)
    return terms.rows


def _side_by_side(a: mx.array, step: Step, n_matrices: int, transposed: bool) -> mx.array:
    """Return blocks ``(V * m * width, B, B)``, those of a block-row side by side:
    ``(V * m, B, width * B)``."""
    block_size = a.shape[-1]
    if block_size > 1 and not transposed:
        a = _contiguous(a.swapaxes(1, 2))  # (in, out), as they lie in the transpose
    a = a.reshape(n_matrices * step.n_rows, step.width * block_size, block_size)
    return a.swapaxes(1, 2)


def _outer(ys: mx.array, xs: mx.array) -> mx.array:
    """Return the sums of ``ys (m, N, B)`` times ``xs (m, N, B)`` over the N rows, ``(m, B, B)``."""
    _, n_x, block_size = xs.shape
    if n_x == 1:
        return ys.swapaxes(1, 2) * xs
    return (ys * xs).sum(axis=1) if block_size == 1 else ys.swapaxes(1, 2) @ xs


def _multiply_add(
    a: mx.array, xs: mx.array, added: mx.array | None, step: Step, n_matrices: int
) -> mx.array:
    """Return ``a @ xs`` plus the bias of a step, rounded once."""
    if added is None:
        return a @ xs
    added = _take(added, step.rows, n_matrices)
    if a.dtype not in _NARROW:
        return a @ xs + added
    if mx.default_device().type is not mx.gpu or not mx.cuda.is_available():
        return mx.addmm(added, a, xs)
    # MLX (0.32.4) rounds a batched addmm twice on CUDA. float32 holds 16-bit products exactly, and
    # so does TF32.
    return a.astype(mx.float32) @ xs.astype(mx.float32) + added.astype(mx.float32)


def _in_matrix_order(y: Result, buckets: Buckets, n_matrices: int) -> mx.array:
    """Return the block-rows of all groups, ``(V * n_block_rows, ...)``, in the matrix's order."""
    if buckets.position_of_row is None:
        return y.rows
    return _take(y.rows, buckets.position_of_row, n_matrices)


def _contiguous(a: mx.array) -> mx.array:
    """Return ``a`` without gaps between its rows, but not in a file, which cannot hold this."""
    return mx.contiguous(a) if tracing.graph is None else a


def _n_matrices(x: mx.array) -> int:
    return x.shape[0] if x.ndim == 3 else 1


def _wide(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if dtype in _NARROW else dtype


def _row_blocks(x: mx.array, block_size: int) -> mx.array:
    """Return ``(V, N, C * B)`` as ``(V * C, N, B)``."""
    n_x, width = x.shape[-2:]
    if n_x > 1:
        x = _contiguous(in_rows(x, n_x, width // block_size, block_size).swapaxes(1, 2))
    return in_rows(x, n_x, block_size)


def _column_blocks(x: mx.array, block_size: int) -> mx.array:
    """Return ``(V, N, C * B)`` as ``(V * C, B, N)``."""
    n_x = x.shape[-2]
    if x.size > tuned.MAX_CACHED_VALUES and block_size > 1:
        # Strides of whole rows of x would miss the cache: first by blocks, then within each.
        return _contiguous(_row_blocks(x, block_size).swapaxes(1, 2))
    return in_rows(_contiguous(x.swapaxes(-1, -2)), block_size, n_x)


def _bias_blocks(
    bias: mx.array, rows: mx.array | None, shape: tuple[int, int], n_matrices: int
) -> mx.array:
    """Return the bias of the block-rows, group by group, ``(V * n_block_rows, *shape)``."""
    blocks = in_rows(bias, *shape)
    return mx.concatenate([blocks if rows is None else _take(blocks, rows, 1)] * n_matrices)


def _with_zeros(side: Side, n_matrices: int, *arrays: mx.array) -> list[mx.array]:
    """Return each ``(V * n, ...)`` with a zero after each of V parts, for slots that are empty."""
    if not side.is_padded:
        return list(arrays)
    parts = [a.reshape(n_matrices, a.shape[0] // n_matrices, *a.shape[1:]) for a in arrays]
    parts = [mx.concatenate([a, mx.zeros_like(a[:, :1])], axis=1) for a in parts]
    return [in_rows(a, *a.shape[2:]) for a in parts]


def _take_blocks(data: Stored, index: Index, n_matrices: int, dtype: mx.Dtype) -> mx.array:
    """Return the blocks ``(V * m, B, B)`` that ``index (m,)`` names, of a dtype.

    Quantized ones are computed in float32 and rounded once.
    """
    if len(data.arrays) == 1:
        return _take(data.arrays[0], index, n_matrices).astype(dtype)
    packed, scales, biases = (_take(a, index, n_matrices) for a in data.arrays)
    return dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32)).astype(dtype)


def _take(values: mx.array, index: Index, n_matrices: int) -> mx.array:
    """Return ``(V * m, ...)``: what ``index (m,)`` names of each of V parts of ``(V * n, ...)``."""
    if n_matrices > 1:
        n_each = values.shape[0] // n_matrices
        if isinstance(index, slice):
            index = mx.arange(index.start, index.stop)
        index = (index + n_each * mx.arange(n_matrices, dtype=index.dtype)[:, None]).reshape(-1)
    if isinstance(index, slice):
        return values[index]
    if values.size > values.shape[0]:
        return mx.take(values, index, axis=0)
    # Single elements: take_along_axis is some forty times faster on the CPU than take.
    elements = mx.take_along_axis(in_rows(values), index, axis=0)
    return in_rows(elements, *values.shape[1:])
