"""Layout: the device arrays that the products read, derived on the host from one pattern."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from mlx_sparse_nn.core.pattern import CSRPattern

Half = dict[str, mx.array]


class HostIndex:
    """The CSR index arrays of a pattern on the host, and those of its transpose, made once."""

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, n_cols: int):
        self.indptr = indptr
        self.indices = indices
        self.n_cols = n_cols

    @cached_property
    def rows(self) -> np.ndarray:
        """Row of each stored entry, ``(n,)`` int32."""
        return np.repeat(np.arange(self.indptr.size - 1, dtype=np.int32), np.diff(self.indptr))

    @cached_property
    def transpose(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``indptr`` and ``indices`` of the transpose, and where its entries lie here."""
        perm = np.argsort(self.indices, kind="stable").astype(np.int32)
        counts = np.bincount(self.indices, minlength=self.n_cols)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return indptr, self.rows[perm], perm


class Layout:
    """What ``spmm``, ``spmm_t`` and ``sddmm`` read of a pattern: two halves of int32 arrays.

    ``rows`` walks the matrix by block-rows, ``cols`` by block-columns; ``cols`` is made when first
    asked for, so that a forward product alone never pays for the transpose. Each half is a dict of
    arrays that a layer can hold in its module's state, where they are inputs of compiled graphs:

    - ``indptr``, ``indices``: CSR of the pattern (``rows``) or of its transpose (``cols``).
    - ``perm``: where the blocks of the transpose lie in ``data``; empty in ``rows``.
    - ``rows``: block-rows grouped into buckets of similar length, for batched dense operations.
    - ``order``: the place in ``rows`` of each block-row; empty ones share one past the end.
    - ``slots``: the place of each stored block among the bucketed, padded ones; empty in ``cols``.
    - ``plan``: an empty array whose shape says how many rows, of what width, each bucket has (see
      :func:`buckets`). Compiled graphs are keyed by the shapes of their inputs, so sizes that
      travel as a shape can never meet the arrays of another pattern.

    Where all rows are equally long they are one bucket in stored order, and ``rows``, ``order`` and
    ``slots`` are empty.
    """

    def __init__(self, pattern: CSRPattern, halves: dict[str, Half] | None = None):
        """Lay out ``pattern``, or take over ``halves`` that :meth:`state` gave for one alike."""
        self.shape = pattern.shape
        self.block_size = pattern.block_size
        if halves is None:
            # Not the pattern, which owns this layout: in a cycle, the arrays of a dropped pattern
            # would wait for Python's next collection.
            self._host = pattern.host
        else:
            self.__dict__.update(halves)

    @cached_property
    def rows(self) -> Half:
        return _half(self._host.indptr, self._host.indices)

    @cached_property
    def cols(self) -> Half:
        return _half(*self._host.transpose)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the values: ``(nnz,)`` or ``(n_blocks, B, B)``."""
        n_blocks = self.rows["indices"].size
        block = self.block_size
        return (n_blocks,) if block == 1 else (n_blocks, block, block)

    def state(self) -> dict[str, Half]:
        """Return both halves, for a module to hold."""
        return {"rows": self.rows, "cols": self.cols}


def buckets(half: Half) -> Iterator[tuple[int, int, bool]]:
    """Yield ``(rows, width, padded)`` of each bucket; ``padded`` if some row is shorter."""
    sizes = half["plan"].shape[1:]
    for rows, width, padded in zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True):
        yield rows, width, bool(padded)


def _half(indptr: np.ndarray, indices: np.ndarray, perm: np.ndarray | None = None) -> Half:
    lengths = np.diff(indptr)
    groups = _group(lengths)
    plan = [(rows.size, lengths[rows].max(), np.ptp(lengths[rows]) > 0) for rows in groups]
    rows = order = slots = np.zeros(0, dtype=np.int32)
    if plan != [(lengths.size, lengths.max(initial=0), False)]:
        rows = np.concatenate([rows, *groups]).astype(np.int32)
        order = np.full(lengths.size, rows.size, dtype=np.int32)
        order[rows] = np.arange(rows.size)
        if perm is None:
            slots = _slots(groups, indptr)
    return {
        "indptr": mx.array(indptr),
        "indices": mx.array(indices),
        "perm": mx.array(np.zeros(0, dtype=np.int32) if perm is None else perm),
        "rows": mx.array(rows),
        "order": mx.array(order),
        "slots": mx.array(slots),
        "plan": mx.zeros((0, *(int(size) for bucket in plan for size in bucket)), mx.int32),
    }


def _group(lengths: np.ndarray) -> list[np.ndarray]:
    """Group the rows that are not empty by length, short ones first.

    Lengths that share their two leading binary digits go together, so that padding a group to its
    longest row adds less than half, whatever the pattern, and nothing when all its rows are equal.
    """
    used = np.flatnonzero(lengths)
    exponent = np.floor(np.log2(lengths[used])).astype(np.int64)
    key = 2 * exponent + (2 * lengths[used] >= 3 * 2**exponent)
    return [used[key == k] for k in np.unique(key)]


def _slots(groups: list[np.ndarray], indptr: np.ndarray) -> np.ndarray:
    """Return each stored block's place among the bucketed, padded ones."""
    slots = np.empty(indptr[-1], dtype=np.int32)
    first = 0
    for rows in groups:
        stored = indptr[rows, None] + np.arange((indptr[rows + 1] - indptr[rows]).max())
        place = first + np.arange(stored.size).reshape(stored.shape)
        valid = stored < indptr[rows + 1, None]
        slots[stored[valid]] = place[valid]
        first += stored.size
    return slots
