"""Steps of a product in plain mlx.core: how many, on which streams, and in which order.

Products are cut into steps whose intermediates stay in the cache. On the CPU, where a stream is a
thread, steps take turns on several streams. Neither changes the order of any sum.

With its operands, the layout among them, and its result, a product on the CPU takes at most four
times the memory that these hold, or 2 MB where that is less: a step takes a part of that
(see ``step_bytes``), and steps gather in turn (see ``in_turn``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from mlx_sparse_nn.core.layout import Half, buckets

_STEP = 1 << 21  # bytes that a step takes at most on the CPU, to stay in the cache
_GPU_STEP = 1 << 26  # the same on a GPU, to bound the memory
_LEAST = 1 << 17  # bytes that operands and result count as at least: steps take time of their own
_HELD = 8  # steps that MLX may hold at once, beyond one for each stream
_SPLIT = 1 << 18  # multiplications from which a product goes to several streams
_STREAMS = 4  # at most, and no more than there are cores

Index: TypeAlias = "mx.array | slice"


class Step(NamedTuple):
    """What a step of a product takes: ``m`` block-rows of ``K`` blocks each."""

    place: AbstractContextManager  # the stream to compute it on
    start: int  # place of its first row among all, bucket by bucket
    shape: tuple[int, int]  # (m, K)
    rows: Index  # (m,) block-rows
    stored: Index  # (m * K,) places of their blocks in data
    cols: mx.array  # (m * K,) columns of their blocks


def steps(half: Half, unit: int, work: int, size: int) -> Iterator[Step]:
    """Yield the steps of a product, each of ``size`` bytes at ``unit`` a block; see :func:`cut`."""
    uniform = not half["slots"].size
    slots = half["indices" if uniform else "slots"].view(mx.uint32)
    places = half["perm" if uniform else "stored"].view(mx.uint32)
    first_row = first_slot = 0
    for n_rows, width, _ in buckets(half):
        for place, start, stop in cut(n_rows, width * unit, width * work, size):
            rows: Index = slice(first_row + start, first_row + stop)
            stored: Index = slice(first_slot + start * width, first_slot + stop * width)
            with place:
                cols = slots[stored]
                if not uniform:
                    rows = half["rows"][rows]
                if places.size:
                    stored = places[stored]
            yield Step(place, first_row + start, (stop - start, width), rows, stored, cols)
        first_row += n_rows
        first_slot += n_rows * width


def cut(
    count: int, unit: int, work: int, size: int
) -> Iterator[tuple[AbstractContextManager, int, int]]:
    """Yield the place, start and stop of each step over ``count`` units, of about ``size`` bytes.

    A unit takes ``unit`` bytes and ``work`` multiplications. The first step stays on the stream in
    use.
    """
    streams = [None]
    if mx.default_device().type == mx.cpu and count * work >= _SPLIT:
        streams += _more_streams()
    n_steps = max(1, -(-count * unit // size))
    n_steps = min(count, -(-n_steps // len(streams)) * len(streams))
    for i in range(n_steps):
        stream = streams[i % len(streams)]
        place = nullcontext() if stream is None else mx.stream(stream)
        yield place, count * i // n_steps, count * (i + 1) // n_steps


def step_bytes(half: Half, total: int, held: int, copied: int) -> int:
    """Return bytes of a step of a product that takes ``total`` in all its steps.

    ``held`` is bytes of the operands and the result, ``copied`` of copies of them that are there
    throughout. These, and the steps that MLX holds at once, shall be at most four times what is
    held, the layout included.
    """
    if mx.default_device().type != mx.cpu:
        return _GPU_STEP
    held += sum(a.nbytes for a in half.values())
    room = 4 * max(held, _LEAST) - held - copied
    if total <= room // 2:
        return _STEP
    return max(_STEP // 64, min(_STEP, room // (_n_streams() + _HELD)))


@cache
def _n_streams() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_STREAMS, cores or 1)


@cache
def _more_streams() -> list:
    """Return the streams that help the one in use; MLX gives each Python thread its own of them."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(_n_streams() - 1)]


def in_turn(index: mx.array, parts: list[mx.array], n_pieces: int = 1) -> mx.array:
    """Return ``index``, to be there once the part is that was begun a turn of all streams before.

    MLX evaluates a graph level by level and would hold what all steps gather at once.
    """
    ahead = max(2, _n_streams()) * n_pieces
    return index if len(parts) < ahead else after(index, parts[-ahead])


def after(index: mx.array, array: mx.array) -> mx.array:
    """Return ``index``, to be there once ``array`` is; ``mx.depends`` cannot be mapped."""
    return mx.where(array.reshape(-1)[:1], index, index)


def put(rows: mx.array | None, part: mx.array, start: int, n: int, n_batch: int) -> mx.array:
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
