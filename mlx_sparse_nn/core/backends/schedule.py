"""Steps of a product in plain MLX: how many, and on which streams.

A product is cut into steps whose intermediates stay in the cache. On the CPU, where a stream is a
thread, steps take turns on several streams. Neither changes the order of any sum.

A CPU product may use up to four times the memory of its operands, layout and result.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.buckets import Buckets
from mlx_sparse_nn.core.backends.stored import Stored, in_rows
from mlx_sparse_nn.core.cores import n_cores
from mlx_sparse_nn.core.layout import Side
from mlx_sparse_nn.core.transforms import tracing

Index: TypeAlias = "mx.array | slice"


class Cost(NamedTuple):
    """What the steps of a product may take."""

    bytes_per_block: int  # that a step takes for each of its blocks
    multiplies_per_block: int
    bytes_per_step: int


class Cut(NamedTuple):
    """A range of units, and the stream that computes it."""

    stream: AbstractContextManager
    start: int
    stop: int


class Step(NamedTuple):
    """Some block-rows of one width, and what they read."""

    stream: AbstractContextManager
    rows: slice  # their positions among all, group by group
    n_rows: int
    width: int  # slots of a row
    columns: mx.array  # (n_rows * width,) block-columns
    blocks: Index  # (n_rows * width,) where the blocks lie in the stored data


class Result:
    """A result that steps write part by part: n rows of each of V matrices.

    Attributes:
        rows: What has been written, ``(V * n, ...)``.
    """

    rows: mx.array

    def __init__(self, n: int, n_matrices: int):
        self.n = n
        self.n_matrices = n_matrices
        self.parts: list[mx.array] = []
        self._steps_ahead = max(2, _n_streams())

    def wait(self, index: mx.array) -> mx.array:
        """Return ``index``, made to wait for the step that started one round of all streams
        earlier: MLX would otherwise gather for all steps at once."""
        if len(self.parts) < self._steps_ahead:
            return index
        return depend_on(index, self.parts[-self._steps_ahead])

    def write(self, start: int, part: mx.array) -> None:
        """Write a part ``(V * m, ...)`` at row ``start`` of each matrix."""
        self.parts.append(part)
        n_matrices, m, shape = self.n_matrices, part.shape[0] // self.n_matrices, part.shape[1:]
        if m == self.n:
            self.rows = part
            return
        if len(self.parts) == 1:
            self.rows = mx.zeros((n_matrices * self.n, *shape), part.dtype)
        # In place, since nothing else holds the rows.
        if n_matrices == 1:
            self.rows[start : start + m] = part
            return
        rows = self.rows.reshape(n_matrices, self.n, *shape)
        rows[:, start : start + m] = part.reshape(n_matrices, m, *shape)
        self.rows = in_rows(rows, *shape)


def depend_on(a: mx.array, other: mx.array) -> mx.array:
    """Return ``a``, to be there once ``other`` is; ``mx.depends`` cannot be mapped."""
    other = in_rows(other)[:1]
    if tracing.graph is not None:  # MLX derives this, and fails at conditions and indices
        other = mx.stop_gradient(other)
    return mx.where(other, a, a)


def steps(side: Side, buckets: Buckets, cost: Cost) -> list[Step]:
    """Return the steps of a product with the block-rows of a side."""
    found, first_row, first_slot = [], 0, 0
    for n_rows, width, _ in side.groups:
        for stream, start, stop in cut(n_rows, width, cost):
            slots = slice(first_slot + start * width, first_slot + stop * width)
            with stream:
                columns = buckets.columns[slots]
                blocks = slots if buckets.blocks is None else buckets.blocks[slots]
            rows = slice(first_row + start, first_row + stop)
            found.append(Step(stream, rows, stop - start, width, columns, blocks))
        first_row += n_rows
        first_slot += n_rows * width
    return found


def cut(count: int, width: int, cost: Cost) -> list[Cut]:
    """Cut ``count`` units of ``width`` blocks into steps; the first stays on the stream in use."""
    streams: list = [None]
    multiplies = count * width * cost.multiplies_per_block
    if mx.default_device().type is mx.cpu and multiplies >= tuned.MIN_PARALLEL_MULTIPLIES:
        streams += _more_streams()
    n_steps = max(1, -(-count * width * cost.bytes_per_block // cost.bytes_per_step))
    n_steps = min(count, -(-n_steps // len(streams)) * len(streams))
    cuts = []
    for i in range(n_steps):
        stream = streams[i % len(streams)]
        context = nullcontext() if stream is None else mx.stream(stream)
        cuts.append(Cut(context, count * i // n_steps, count * (i + 1) // n_steps))
    return cuts


def n_pieces(side: Side, cost: Cost, n_x: int, block_size: int) -> int:
    """Return into how many pieces x is cut: more than one if a block-row alone exceeds a step."""
    widest = side.longest_row * cost.bytes_per_block
    most = max(1, n_x // max(block_size, tuned.PLAIN_FEW_ROWS))
    return min(-(-widest // cost.bytes_per_step), most)


# The cost of each algorithm of ``plain``, with V matrices, n_x rows of x, and block side B.


def many_rows(side: Side, data: Stored, x: mx.array, dtype: mx.Dtype, n_matrices: int) -> Cost:
    """Return the cost of gathering blocks, which are rearranged, and the columns of x they meet."""
    n_x, block_size = x.shape[-2], data.block_size
    gathered = n_x + block_size if block_size > 1 else n_x
    bytes_per_block = n_matrices * gathered * block_size * dtype.size
    bytes_per_block += n_matrices * data.unpacked_bytes(dtype)
    y_bytes = n_matrices * n_x * side.n_block_rows * block_size * x.itemsize
    copied = x.size * dtype.size + (0 if side.is_uniform else y_bytes)
    copied += data.nbytes if side.is_padded else 0
    operand_bytes = data.nbytes + x.nbytes + y_bytes
    total = side.n_blocks * bytes_per_block
    bytes_per_step = _bytes_per_step(side, total, operand_bytes, copied)
    return Cost(bytes_per_block, n_matrices * n_x * block_size**2, bytes_per_step)


def few_rows(side: Side, data: Stored, x: mx.array, dtype: mx.Dtype, n_matrices: int) -> Cost:
    """Return the cost of multiplying each block where it lies by few rows of x."""
    n_x, block_size = x.shape[-2], data.block_size
    product_bytes = n_matrices * n_x * block_size * dtype.size
    bytes_per_block = 2 * product_bytes + n_matrices * data.unpacked_bytes(dtype)
    if (n_x == 1 and block_size < tuned.MIN_MATMUL_BLOCK) or x.dtype != dtype:
        bytes_per_block += n_matrices * block_size**2 * dtype.size  # what is as large as a block
    operand_bytes = data.nbytes + x.nbytes + side.n_block_rows * product_bytes
    total = side.n_blocks * bytes_per_block * 2 // 3  # other steps take little at the same time
    bytes_per_step = _bytes_per_step(side, total, operand_bytes, 2 * side.n_blocks * product_bytes)
    return Cost(bytes_per_block, n_matrices * n_x * block_size**2, bytes_per_step)


def scalars(side: Side, data: Stored, x: mx.array, dtype: mx.Dtype, n_matrices: int) -> Cost:
    """Return the cost of multiplying scalars by one row of x, of which as many are gathered."""
    in_place = side.is_uniform and side.perm is None  # data is: then there is room for all of x
    bytes_per_value = n_matrices * dtype.size * (1 if in_place else 3)
    operand_bytes = data.nbytes + x.nbytes + n_matrices * side.n_block_rows * x.itemsize
    total = 0 if in_place else side.n_blocks * bytes_per_value
    copied = data.nbytes if side.is_padded else 0
    bytes_per_step = _bytes_per_step(side, total, operand_bytes, copied)
    return Cost(bytes_per_value, n_matrices, bytes_per_step)


def sampled(side: Side, y: mx.array, x: mx.array, dtype: mx.Dtype, block_size: int) -> Cost:
    """Return the cost of gathering, for each block, the blocks of y and x whose product it is."""
    n_x, n_matrices = x.shape[-2], x.size // max(1, x.shape[-2] * x.shape[-1])
    bytes_per_block = n_matrices * block_size * dtype.size * n_x
    operand_bytes = x.nbytes + y.nbytes + n_matrices * side.n_blocks * block_size**2 * x.itemsize
    copied = (x.size + y.size) * dtype.size
    total = side.n_blocks * bytes_per_block
    multiplies = n_matrices * n_x * block_size**2 if n_x > 1 else 0  # one row: streams do not pay
    return Cost(bytes_per_block, multiplies, _bytes_per_step(side, total, operand_bytes, copied))


def _bytes_per_step(side: Side, total: int, operand_bytes: int, copied: int) -> int:
    """Return the bytes of a step.

    Args:
        side: Its arrays count as operands.
        total: Bytes of all steps together.
        operand_bytes: Bytes of operands and result.
        copied: Bytes of copies of them that are there throughout.
    """
    if mx.default_device().type is not mx.cpu:
        return tuned.GPU_STEP_BYTES
    operand_bytes += side.nbytes * (1 if side.is_uniform else 3)  # with its buckets
    room = 4 * max(operand_bytes, tuned.MIN_OPERAND_BYTES) - operand_bytes - copied
    if total <= room // 2:
        return tuned.CPU_STEP_BYTES
    share = room // (_n_streams() + tuned.STEPS_IN_FLIGHT)
    return max(tuned.MIN_STEP_BYTES, min(tuned.CPU_STEP_BYTES, share))


def _n_streams() -> int:
    return min(tuned.MAX_STREAMS, n_cores())


@cache
def _more_streams() -> list:
    """Return the streams that help the one in use; MLX gives each Python thread its own of them."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(_n_streams() - 1)]
