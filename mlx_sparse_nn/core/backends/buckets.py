"""Buckets: block-rows padded to equal lengths, as batched dense products of plain MLX need them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core.layout import Side


class Buckets(NamedTuple):
    """The block-rows of a side, one group of similar length after another.

    A slot is a place for one block; every row of a group has as many as the longest needs. Index
    arrays are viewed as uint32, here and in ``plain``: in signed ones, MLX first looks for negative
    numbers, before it gathers.

    Attributes:
        rows: ``(n_block_rows,)``, the block-rows in the order of the groups; None where that is the
            matrix's own.
        position_of_row: ``(n_block_rows,)``, where each block-row lies among ``rows``; None there.
        columns: ``(n_slots,)``, the block-column of each slot; one past the last where it is empty.
        blocks: ``(n_slots,)``, where its block lies in the stored data; one past the last where it
            is empty; None where slot j holds block j.
    """

    rows: mx.array | None
    position_of_row: mx.array | None
    columns: mx.array
    blocks: mx.array | None


def buckets_of(side: Side) -> Buckets:
    """Return the buckets of a side, by operations on its arrays: they may be tracers."""
    indices, perm = side.indices.view(mx.uint32), side.perm
    if side.is_uniform:
        return Buckets(None, None, indices, None if perm is None else perm.view(mx.uint32))
    lengths = side.indptr[1:] - side.indptr[:-1]
    rows = mx.argsort(lengths)
    starts, lengths = (mx.take_along_axis(a, rows, axis=0) for a in (side.indptr[:-1], lengths))
    slots, first = [], 0
    for n_rows, longest, _ in side.groups:
        group, slot = slice(first, first + n_rows), mx.arange(longest)
        stored = mx.where(slot < lengths[group, None], starts[group, None] + slot, side.n_blocks)
        slots.append(stored.reshape(-1))
        first += n_rows
    stored = mx.concatenate(slots).view(mx.uint32)
    columns = mx.take_along_axis(_append(indices, side.n_block_cols), stored, axis=0)
    if perm is not None:
        stored = mx.take_along_axis(_append(perm.view(mx.uint32), side.n_blocks), stored, axis=0)
    return Buckets(rows, mx.argsort(rows), columns, stored)


def _append(a: mx.array, value: int) -> mx.array:
    return mx.concatenate([a, mx.array([value], a.dtype)])
