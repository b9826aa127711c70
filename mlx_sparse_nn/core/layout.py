"""Layout: the device arrays that every backend reads, and the sizes by which it chooses."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_sparse_nn.core import index, tuned
from mlx_sparse_nn.core.transforms import transforming

_T = TypeVar("_T")


class HostIndex:
    """The CSR index arrays of a pattern on the host, and those of its transpose, made once.

    Args:
        indptr: ``(n_rows + 1,)`` int32.
        indices: ``(n,)`` int32.
        n_cols: Number of columns.
        transposed: Those of the pattern of which this one is the transpose.
    """

    def __init__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        n_cols: int,
        transposed: HostIndex | None = None,
    ):
        self.indptr = indptr
        self.indices = indices
        self.n_cols = n_cols
        self._transposed = transposed

    @cached_property
    def rows(self) -> np.ndarray:
        """Row of each stored entry, ``(n,)`` int32."""
        return index.rows_of(self.indptr)

    @cached_property
    def transpose(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``indptr`` and ``indices`` of the transpose, and where its entries lie here."""
        if self._transposed is None:
            made = index.transpose(self.indptr, self.indices, self.n_cols)
            indptr, indices, perm = map(index.locked, made)  # what products read may lie there
            return indptr, indices, perm
        perm = self._transposed.transpose[2]
        inverse = np.empty_like(perm)
        inverse[perm] = np.arange(perm.size, dtype=np.int32)
        return self._transposed.indptr, self._transposed.indices, inverse


class RowGroup(NamedTuple):
    """Block-rows of similar length."""

    n_block_rows: int
    longest: int  # blocks in the longest of them
    is_even: bool  # whether all are equally long


class Side:
    """CSR of a matrix by block-rows, or of its transpose: int32 arrays on the device.

    Attributes:
        indptr: ``(n_block_rows + 1,)``, where each block-row begins.
        indices: ``(n_blocks,)``, the block-column of each block.
        perm: ``(n_blocks,)``, where each block lies in the stored data; None for the matrix itself.
        static_sizes: An empty array whose shape holds the two below. Compiled graphs are keyed by
            the shapes of their inputs, so a graph can never meet the sizes of another pattern.
        n_block_cols: Number of block-columns.
        groups: The block-rows by length, the shortest first; each is in one group.
        is_in_order: Whether the columns of every block-row ascend, and none repeats; False for
            scalars of so sparse a matrix that nobody asks.
        longest_row: Number of blocks in the longest block-row.
        is_padded: Whether a group holds block-rows of several lengths.
        is_uniform: Whether all block-rows are equally long.
        is_constant: Whether the arrays are numbers for good, and no tracers.
        nbytes: Bytes of the index arrays.
    """

    def __init__(
        self,
        indptr: mx.array,
        indices: mx.array,
        perm: mx.array | None,
        static_sizes: mx.array | Callable[[], mx.array],
        n_block_cols: int,
        is_constant: bool = False,
    ):
        self.indptr = indptr
        self.indices = indices
        self.perm = perm
        self.n_block_cols = n_block_cols
        self.n_block_rows = indptr.size - 1
        self.n_blocks = indices.size
        self._static_sizes = static_sizes
        self.is_constant = is_constant
        self._kept: dict[Callable, object] = {}

    @cached_property
    def static_sizes(self) -> mx.array:
        sizes = self._static_sizes
        return sizes if isinstance(sizes, mx.array) else sizes()

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        sizes = self.static_sizes.shape[2:]
        return tuple(
            RowGroup(n_rows, longest, even == 1)
            for n_rows, longest, even in zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True)
        )

    @cached_property
    def is_in_order(self) -> bool:
        return self.static_sizes.shape[1] == 1

    @cached_property
    def longest_row(self) -> int:
        return max((group.longest for group in self.groups), default=0)

    @cached_property
    def is_padded(self) -> bool:
        return not all(group.is_even for group in self.groups)

    @cached_property
    def is_uniform(self) -> bool:
        return len(self.groups) <= 1 and not self.is_padded

    @cached_property
    def nbytes(self) -> int:
        arrays = (self.indptr, self.indices, self.perm)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def row_of_block(self) -> mx.array:
        """Block-row of each block, ``(n_blocks,)`` uint32."""
        return self.keep(row_of_block)

    @property
    def derived_bytes(self) -> int:
        """Bytes of what backends have derived from them so far."""
        kept = [array for _, array in tree_flatten(list(self._kept.values()))]
        return sum(array.nbytes for array in kept if isinstance(array, mx.array))

    def keep(self, make: Callable[[Side], _T]) -> _T:
        """Return what ``make`` derives from the index arrays, made once for this side.

        The result is an array or a tuple of arrays and None. Where the index arrays are constant,
        it is evaluated at once: MLX cannot evaluate a graph in another thread than it was made in.
        """
        if make not in self._kept:
            made = make(self)
            if self.is_constant:
                mx.eval(made)
                if transforming():  # or else they are traced for good, and all that reads them
                    made = _untraced(made)
            self._kept[make] = made  # not before: another thread may ask at the same time
        return self._kept[make]  # type: ignore[return-value]


class Layout:
    """What ``spmm``, ``spmm_t`` and ``sddmm`` read of a pattern: CSR of it, and of its transpose.

    The transpose is made when it is first asked for, so that a forward product alone never pays for
    it. A backend keeps with a side what it derives from it (:meth:`Side.keep`).

    Attributes:
        shape: ``(n_rows, n_cols)`` in scalars.
        full_shape: That of whole blocks.
        has_edges: Whether the last of them reach past the matrix.
        inside: How many rows and how many columns of the last ones lie in the matrix.
        block_size: Side of the blocks.
        data_shape: Shape of the stored values, ``(nnz,)`` or ``(n_blocks, B, B)``.
    """

    def __init__(self, index: HostIndex, shape: tuple[int, int], block_size: int):
        """Lay out a pattern, given by its index arrays."""
        n_blocks = index.indices.size
        self.shape = shape
        self.full_shape = (index.indptr.size - 1) * block_size, index.n_cols * block_size
        self.has_edges = self.full_shape != tuple(shape)
        past = tuple(full - size for full, size in zip(self.full_shape, shape, strict=True))
        self.inside = block_size - past[0], block_size - past[1]
        self.block_size = block_size
        self.data_shape = (n_blocks,) if block_size == 1 else (n_blocks, block_size, block_size)
        # Not the pattern, which owns this layout: in a cycle, the arrays of a dropped pattern would
        # wait for Python's next collection.
        self._index = index

    @cached_property
    def rows(self) -> Side:
        """The matrix by block-rows."""
        index = self._index
        return _side(index.indptr, index.indices, None, index.n_cols, self.block_size)

    @cached_property
    def cols(self) -> Side:
        """The matrix by block-columns: the rows of its transpose."""
        indptr, indices, perm = self._index.transpose
        return _side(indptr, indices, perm, self._index.indptr.size - 1, self.block_size)

    @property
    def derived_bytes(self) -> int:
        """Bytes of what backends have derived from the index arrays so far."""
        sides = [self.__dict__[name] for name in ("rows", "cols") if name in self.__dict__]
        return sum(side.derived_bytes for side in sides)

    def state(self) -> dict[str, mx.array]:
        """Return all arrays, for a module to hold."""
        rows, cols = self.rows, self.cols
        assert cols.perm is not None
        return {
            "indptr": rows.indptr,
            "indices": rows.indices,
            "static_sizes": rows.static_sizes,
            "cols_indptr": cols.indptr,
            "cols_indices": cols.indices,
            "cols_perm": cols.perm,
            "cols_static_sizes": cols.static_sizes,
        }

    def resized(self, block_size: int) -> Layout:
        """Return the layout of blocks of a larger size at the same places.

        The last blocks reach past the matrix as far as they do here.
        """
        (n_rows, n_cols), (below, behind) = self.full_shape, self.inside
        grid = n_rows // self.block_size, n_cols // self.block_size
        inside = (block_size if n == self.block_size else n for n in (below, behind))
        shape = [(n - 1) * block_size + last for n, last in zip(grid, inside, strict=True)]
        layout = Layout(self._index, (shape[0], shape[1]), block_size)
        layout.__dict__["rows"] = self.rows
        return layout

    def with_arrays(self, state: dict[str, mx.array]) -> Layout:
        """Return the layout that reads these arrays, which may be tracers, in place of its own.

        Args:
            state: What :meth:`state` gives. Nobody may have written into these arrays: a wrong
                index would lead outside a buffer.
        """
        rows, cols = self.rows, self.cols
        layout = Layout(self._index, self.shape, self.block_size)
        layout.__dict__["rows"] = Side(
            state["indptr"], state["indices"], None, state["static_sizes"], rows.n_block_cols
        )
        layout.__dict__["cols"] = Side(
            state["cols_indptr"],
            state["cols_indices"],
            state["cols_perm"],
            state["cols_static_sizes"],
            cols.n_block_cols,
        )
        return layout

    def waiting_for(self, array: mx.array) -> Layout:
        """Return the same layout, by whose rows no kernel starts before ``array`` is there.

        MLX's kernels run side by side unless one reads what another wrote; ``mx.depends`` says on
        the host alone what comes first.
        """
        if array.size == 0:
            return self
        zero = array.reshape(-1)[:1].view(mx.uint8)[:1].astype(mx.int32) * 0
        layout, rows = copy(self), copy(self.rows)
        rows.indptr = rows.indptr + zero
        layout.__dict__["rows"] = rows
        return layout


def group_lengths(lengths: np.ndarray, overhead: int) -> list[RowGroup]:
    """Group block-rows by length, short ones first, so that padding them costs least.

    Rows are padded to the longest of their group, and a group costs as much as ``overhead`` blocks.
    The cheapest partition is found by dynamic programming over the distinct lengths. If there are
    many of these, they are first rounded up to five binary digits.

    Args:
        lengths: ``(n_block_rows,)``, blocks in each.
        overhead: In blocks.
    """
    key = lengths
    if np.unique(key).size > tuned.MAX_EXACT_LENGTHS:
        unit = 2 ** np.maximum(0, np.floor(np.log2(np.maximum(1, key))).astype(np.int64) - 4)
        key = -(-key // unit) * unit
    widths, counts = np.unique(key, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    cost, first = np.zeros(widths.size + 1), np.zeros(widths.size + 1, dtype=np.int64)
    for j in range(1, widths.size + 1):
        options = cost[:j] + widths[j - 1] * (total[j] - total[:j])
        first[j] = np.argmin(options)
        cost[j] = options[first[j]] + overhead
    groups, j = [], widths.size
    while j:
        members = lengths[(key >= widths[first[j]]) & (key <= widths[j - 1])]
        groups.append(RowGroup(members.size, int(members.max()), int(np.ptp(members)) == 0))
        j = first[j]
    return groups[::-1]


def _untraced(made: Any) -> Any:
    """Return new arrays of the same numbers, in the same places."""
    if isinstance(made, mx.array):
        return mx.array(np.array(made))
    if isinstance(made, tuple):
        parts = [_untraced(part) for part in made]
        return type(made)(*parts) if hasattr(made, "_fields") else tuple(parts)
    return made


def _side(
    indptr: np.ndarray, indices: np.ndarray, perm: np.ndarray | None, n_cols: int, block_size: int
) -> Side:
    """Copy one side of a pattern to the device."""

    def static_sizes() -> mx.array:
        groups = group_lengths(np.diff(indptr), max(1, tuned.GROUP_VALUES // block_size**2))
        size = (indptr.size - 1) * n_cols
        asked = block_size > 1 or indices.size * tuned.SPARSEST_ORDERED >= size
        in_order = asked and index.ascends(indptr, indices)
        sizes = [int(in_order), *(int(size) for group in groups for size in group)]
        return mx.zeros((0, *sizes), mx.int32)

    return Side(
        index.on_device(indptr),
        index.on_device(indices),
        None if perm is None else index.on_device(perm),
        static_sizes,
        n_cols,
        is_constant=True,
    )


def row_of_block(side: Side) -> mx.array:
    """Return :attr:`Side.row_of_block`, to be forgotten."""
    if side.is_uniform:
        return mx.arange(side.n_blocks, dtype=mx.uint32) // max(1, side.longest_row)
    begins = mx.zeros(side.n_blocks + 1, mx.uint32).at[side.indptr[1:-1]].add(1)
    return mx.cumsum(begins)[:-1]
