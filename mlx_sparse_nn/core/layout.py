"""Layout: the device arrays that the products read, derived on the host from one pattern."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.transforms import note_vmap

if TYPE_CHECKING:
    from mlx_sparse_nn.core.pattern import CSRPattern

Half = dict[str, mx.array]

_BUCKET = 4096  # padded values that take as long as the operations of one more bucket
_DISTINCT = 256  # row lengths up to which buckets may begin at each


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
    asked for, so that a forward product alone never pays for the transpose. ``data_shape`` is the
    shape of the values, ``(nnz,)`` or ``(n_blocks, B, B)``. Each half is a dict of arrays that a
    layer can hold in its module's state, where they are inputs of compiled graphs:

    - ``indptr``, ``indices``: CSR of the pattern (``rows``) or of its transpose (``cols``).
    - ``perm``: where the blocks of the transpose lie in ``data``; empty in ``rows``.

    These are all that kernels read. Plain MLX takes block-rows in buckets of similar length, padded
    to the longest, for batched dense operations:

    - ``rows``: the block-rows, bucket by bucket; ``order``: the place of each one in ``rows``.
    - ``slots``: column of each block of these rows; one past the last column where padded.
    - ``stored``: its place in ``data``; one past the last block where padded.
    - ``row``: the block-row of each stored block; empty in ``cols``.
    - ``plan``: an empty array whose shape says how many rows, of what width, each bucket has (see
      :func:`buckets`), and whether blocks are in order (see :func:`in_order`). Compiled graphs are
      keyed by the shapes of their inputs, so sizes that travel as a shape can never meet the arrays
      of another pattern.

    Where all rows are equally long they are one bucket in stored order, and ``rows``, ``order``,
    ``slots``, ``stored`` and ``row`` are empty: ``indices`` and ``perm`` serve as they are.
    """

    def __init__(self, pattern: CSRPattern, halves: dict[str, Half] | None = None):
        """Lay out ``pattern``, or take over ``halves`` that :meth:`state` gave for one alike."""
        note_vmap()
        self.shape = pattern.shape
        self.block_size = pattern.block_size
        self.data_shape = pattern.data_shape
        if halves is None:
            # Not the pattern, which owns this layout: in a cycle, the arrays of a dropped pattern
            # would wait for Python's next collection.
            self._host = pattern.host
        else:
            self.rows, self.cols = halves["rows"], halves["cols"]

    @cached_property
    def rows(self) -> Half:
        host = self._host
        return _half(host.indptr, host.indices, host.n_cols, self.block_size, row=host.rows)

    @cached_property
    def cols(self) -> Half:
        indptr, indices, perm = self._host.transpose
        n_rows = self._host.indptr.size - 1
        return _half(indptr, indices, n_rows, self.block_size, perm=perm)

    def state(self) -> dict[str, Half]:
        """Return both halves, for a module to hold."""
        return {"rows": self.rows, "cols": self.cols}


def buckets(half: Half) -> Iterator[tuple[int, int, bool]]:
    """Yield ``(rows, width, padded)`` of each bucket; ``padded`` if some row is shorter."""
    sizes = half["plan"].shape[2:]
    for rows, width, padded in zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True):
        yield rows, width, bool(padded)


def in_order(half: Half) -> bool:
    """Return whether the columns of every block-row ascend, and none repeats; False of scalars."""
    return half["plan"].shape[1] == 1


def ascend(indptr: np.ndarray, indices: np.ndarray) -> bool:
    """Return whether the indices of every row ascend, and none repeats."""
    rises = indices[1:] > indices[:-1]
    starts = indptr[(indptr > 0) & (indptr < indices.size)]
    rises[starts - 1] = True
    return bool(rises.all())


def _half(
    indptr: np.ndarray,
    indices: np.ndarray,
    n_cols: int,
    block_size: int,
    perm: np.ndarray | None = None,
    row: np.ndarray | None = None,
) -> Half:
    lengths = np.diff(indptr)
    groups = _group(lengths, max(1, _BUCKET // block_size**2))
    plan = [(rows.size, lengths[rows].max(), np.ptp(lengths[rows]) > 0) for rows in groups]
    none = np.zeros(0, dtype=np.int32)
    names = ("rows", "order", "slots", "stored", "row")
    half: dict[str, np.ndarray] = dict.fromkeys(names, none)
    if plan != [(lengths.size, lengths.max(initial=0), False)]:
        half["rows"] = np.concatenate([none, *groups])
        half["order"] = np.argsort(half["rows"], kind="stable")
        stored = [_padded(indptr, rows, indices.size) for rows in groups]
        half["stored"] = np.concatenate([none, *stored])
        half["slots"] = np.append(indices, n_cols)[half["stored"]]
        if perm is not None:
            half["stored"] = np.append(perm, perm.size)[half["stored"]]
        if row is not None:
            half["row"] = row
    half |= {"indptr": indptr, "indices": indices, "perm": none if perm is None else perm}
    ordered = block_size > 1 and ascend(indptr, indices)
    sizes = int(ordered), *(int(size) for bucket in plan for size in bucket)
    return {
        **{name: mx.array(array.astype(np.int32)) for name, array in half.items()},
        "plan": mx.zeros((0, *sizes), mx.int32),
    }


def _group(lengths: np.ndarray, bucket: int) -> list[np.ndarray]:
    """Group rows by length, short ones first, so that the padding costs least.

    Rows are padded to the longest of their group, and a group costs as much as ``bucket`` blocks.
    The best cut of the sorted lengths, by dynamic programming over the distinct ones. Where these
    are many, they are first rounded up to five binary digits.
    """
    key = lengths
    if np.unique(key).size > _DISTINCT:
        unit = 2 ** np.maximum(0, np.floor(np.log2(np.maximum(1, key))).astype(np.int64) - 4)
        key = -(-key // unit) * unit
    widths, counts = np.unique(key, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    cost, first = np.zeros(widths.size + 1), np.zeros(widths.size + 1, dtype=np.int64)
    for j in range(1, widths.size + 1):
        options = cost[:j] + widths[j - 1] * (total[j] - total[:j])
        first[j] = np.argmin(options)
        cost[j] = options[first[j]] + bucket
    groups, j = [], widths.size
    while j:
        groups.append(np.flatnonzero((key >= widths[first[j]]) & (key <= widths[j - 1])))
        j = first[j]
    return groups[::-1]


def _padded(indptr: np.ndarray, rows: np.ndarray, padding: int) -> np.ndarray:
    """Return where the blocks of ``rows`` lie, row by row, with ``padding`` after the short."""
    lengths = indptr[rows + 1] - indptr[rows]
    place = np.arange(lengths.max())
    stored = indptr[rows, None] + place
    return np.where(place < lengths[:, None], stored, padding).reshape(-1)
