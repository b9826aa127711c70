"""CSRPattern: which entries of a sparse matrix are stored, validated once on the host."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import draw, index
from mlx_sparse_nn.core.checks import (
    INT32_MAX,
    ArrayLike,
    check_columns,
    check_indices,
    check_indptr,
    check_range,
    check_shape,
    check_size,
)
from mlx_sparse_nn.core.layout import HostIndex, Layout
from mlx_sparse_nn.core.transforms import note_transforms

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class CSRPattern:
    """The immutable structure of a sparse matrix: CSR over scalars or over square blocks.

    Block-row ``r`` stores the blocks ``indptr[r]`` to ``indptr[r + 1] - 1``; stored block ``j``
    lies in block-column ``indices[j]``. With ``block_size=1`` this is plain CSR. Columns may be
    unsorted and may repeat: duplicates add up, as in SciPy.

    There are ``ceil(n_rows / block_size)`` block-rows and as many block-columns as ``n_cols`` asks
    for: where ``block_size`` does not divide the shape, the last blocks reach past the matrix. What
    values lie outside is never read.

    Args:
        indptr: ``(n_block_rows + 1,)`` integers, from 0, never decreasing, to ``n_blocks``.
        indices: ``(n_blocks,)`` integers in ``[0, n_block_cols)``.
        shape: ``(n_rows, n_cols)`` in scalars.
        block_size: Side of the square blocks.

    Attributes:
        indptr: Read-only NumPy int32 array on the host.
        indices: Read-only NumPy int32 array on the host.

    Raises:
        TypeError: ``indptr``, ``indices``, ``shape`` or ``block_size`` are not integers.
        ValueError: The numbers do not describe a matrix of that shape, or more than 2**31 - 1
            values would be stored.

    Example:
        >>> CSRPattern([0, 2, 3], [0, 1, 1], shape=(64, 64), block_size=32)
        CSRPattern(64 x 64, block_size=32, 3 blocks, density 0.75)
    """

    indptr: np.ndarray
    indices: np.ndarray
    shape: tuple[int, int]
    block_size: int = 1

    if TYPE_CHECKING:

        def __init__(
            self,
            indptr: ArrayLike,
            indices: ArrayLike,
            shape: Sequence[int],
            block_size: int = 1,
        ) -> None: ...

    def __post_init__(self) -> None:
        block_size = check_size("CSRPattern", "block_size", self.block_size, minimum=1)
        shape = check_shape("CSRPattern", self.shape)
        n_block_rows, n_block_cols = grid_of(shape, block_size)
        check_stored("CSRPattern", _length(self.indices), block_size)
        if (length := _length(self.indptr)) != n_block_rows + 1:
            raise ValueError(
                f"[CSRPattern] indptr has {length} entries, expected {n_block_rows + 1}: "
                f"one more than the {n_block_rows} rows of blocks"
            )
        indptr = check_indices("CSRPattern", "indptr", self.indptr, copy=index.share)
        indices = check_columns("CSRPattern", "indices", self.indices, n_block_cols)
        check_indptr("CSRPattern", indptr, indices.size)
        self._hold(indptr, indices, shape, block_size)

    def _hold(
        self, indptr: np.ndarray, indices: np.ndarray, shape: tuple[int, int], block_size: int
    ) -> None:
        """Take over what is right, and int32."""
        note_transforms()
        indptr, indices = index.locked(indptr), index.locked(indices)
        # Not by attribute, which a frozen dataclass refuses.
        self.__dict__.update(indptr=indptr, indices=indices, shape=shape, block_size=block_size)

    @classmethod
    def _of(
        cls, indptr: np.ndarray, indices: np.ndarray, shape: tuple[int, int], block_size: int = 1
    ) -> CSRPattern:
        """Return the pattern of arrays that were made right, and that nobody else writes to."""
        pattern = cls.__new__(cls)
        pattern._hold(indptr, indices, shape, block_size)
        return pattern

    @classmethod
    def from_places(
        cls, places: ArrayLike, shape: Sequence[int], block_size: int = 1
    ) -> CSRPattern:
        """Return the pattern that stores the blocks at these places, numbered as in :attr:`places`.

        Blocks are stored row by row. Those of one block-row keep the order in which they are given,
        so sorted places make a canonical pattern; a place that comes twice is stored twice.

        Args:
            places: ``(n_blocks,)`` integers in ``[0, n_places)``, in any order.
            shape: ``(n_rows, n_cols)`` in scalars.
            block_size: Side of the square blocks.

        Raises:
            TypeError, ValueError: As for the class.

        Example:
            >>> CSRPattern.from_places([0, 1, 3], (64, 64), 32).indices
            array([0, 1, 1], dtype=int32)
        """
        owner = "CSRPattern.from_places"
        block_size = check_size(owner, "block_size", block_size, minimum=1)
        n_rows, n_cols = check_shape(owner, shape)
        n_block_rows, n_block_cols = grid_of((n_rows, n_cols), block_size)
        places = check_indices(owner, "places", places, np.int64)
        check_range(owner, "places", places, n_block_rows * n_block_cols)
        check_stored(owner, places.size, block_size)
        rows, cols = np.divmod(places, max(1, n_block_cols))
        indptr, indices, _ = index.sort_rows(
            rows.astype(np.int32), cols.astype(np.int32), (n_block_rows, n_block_cols)
        )
        return cls._of(indptr, indices, (n_rows, n_cols), block_size)

    @property
    def grid(self) -> tuple[int, int]:
        """``(n_block_rows, n_block_cols)``: the shape of the matrix in blocks."""
        return grid_of(self.shape, self.block_size)

    @property
    def n_places(self) -> int:
        """Number of blocks that the dense matrix has."""
        n_block_rows, n_block_cols = self.grid
        return n_block_rows * n_block_cols

    @property
    def places(self) -> np.ndarray:
        """``row * n_block_cols + column`` of each stored block: ``(n_blocks,)`` int64."""
        return self._places

    @cached_property
    def _places(self) -> np.ndarray:
        places = self.row_indices.astype(np.int64) * self.grid[1] + self.indices
        places.flags.writeable = False
        return places

    def check_unique(self, owner: str) -> None:
        """Raise if a block is stored more than once.

        Args:
            owner: Name shown in the error message.

        Raises:
            ValueError: One is. Names the first.
        """
        if self.is_canonical:
            return
        unique, first = np.unique(self.places, return_index=True)
        if unique.size < self.n_blocks:
            repeated = np.setdiff1d(np.arange(self.n_blocks), first)[0]
            block = int(self.row_indices[repeated]), int(self.indices[repeated])
            raise ValueError(f"[{owner}] the pattern stores block {block} more than once")

    @property
    def n_blocks(self) -> int:
        """Number of stored blocks (for ``block_size=1``, of stored values)."""
        return self.indices.size

    @cached_property
    def nnz(self) -> int:
        """Number of stored values that lie in the matrix."""
        block_size, total = self.block_size, self.n_blocks * self.block_size**2
        below, behind = (-size % block_size for size in self.shape)
        if not below and not behind:
            return total
        last_row, last_col = self.grid[0] - 1, self.grid[1] - 1
        in_last_row = self.indices[self.indptr[last_row] :]
        n_corners = int(np.count_nonzero(in_last_row == last_col))
        n_last_col = int(np.count_nonzero(self.indices == last_col))
        outside = in_last_row.size * below + n_last_col * behind
        return total - outside * block_size + n_corners * below * behind

    @property
    def density(self) -> float:
        """Stored fraction of the matrix, in [0, 1] unless entries repeat; 0 for an empty matrix."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the values that fill this pattern: ``(nnz,)`` or ``(n_blocks, B, B)``."""
        block_size = self.block_size
        return (self.n_blocks,) if block_size == 1 else (self.n_blocks, block_size, block_size)

    @cached_property
    def host(self) -> HostIndex:
        """The index arrays, and those of the transpose, which the layout shares."""
        return HostIndex(self.indptr, self.indices, self.grid[1])

    @property
    def row_indices(self) -> np.ndarray:
        """Block-row of each stored block, ``(n_blocks,)`` int32."""
        return self.host.rows

    @cached_property
    def is_canonical(self) -> bool:
        """Whether the columns of every row are sorted and none repeats."""
        return index.ascends(self.indptr, self.indices)

    @property
    def transpose_perm(self) -> np.ndarray:
        """Order of the stored blocks in the transposed pattern, ``(n_blocks,)`` int32.

        ``pattern.T`` stores as its block ``j`` the transpose of block ``transpose_perm[j]``.
        """
        return self.host.transpose[2]

    @property
    def T(self) -> CSRPattern:
        """The transposed pattern, made once. Its own ``T`` is this one again."""
        origin = self.__dict__.get("_origin")
        alive = origin() if origin is not None else None
        return self._transposed if alive is None else alive

    @cached_property
    def _transposed(self) -> CSRPattern:
        indptr, indices, _ = self.host.transpose
        n_rows, n_cols = self.shape
        transposed = CSRPattern._of(indptr, indices, (n_cols, n_rows), self.block_size)
        host = HostIndex(indptr, indices, self.grid[0], transposed=self.host)
        transposed.__dict__["host"] = host
        transposed.__dict__["_origin"] = weakref.ref(self)  # weak: no cycle
        return transposed

    @cached_property
    def layout(self) -> Layout:
        """The arrays that the products read, made once."""
        return Layout(self.host, self.shape, self.block_size)

    def tomask(self) -> mx.array:
        """Return the ``(n_rows, n_cols)`` bool array that is true where a value is stored."""
        block_size = self.block_size
        mask = np.zeros(self.grid, dtype=bool)
        mask[self.row_indices, self.indices] = True
        whole = np.kron(mask, np.ones((block_size, block_size), dtype=bool)).astype(bool)
        return mx.array(whole[: self.shape[0], : self.shape[1]])

    def plot(self, ax: Axes | None = None, *, cmap: str = "Blues") -> Axes:
        """Draw the pattern on matplotlib's axes, to scale, and return them.

        Beyond 1024 blocks a side, cells merge several blocks and are coloured by their density.

        Args:
            ax: Where to draw; by default new axes.
            cmap: Name of a colour map, light for what is not stored.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw.plot(self, ax, cmap=cmap)

    def spy(self, width: int = 64) -> str:
        """Return the pattern drawn in characters, for ``print``; its last line says what it is.

        A character shows two cells, one above the other. A cell is a block. If there are more than
        ``width`` block-columns or ``2 * width`` block-rows, it merges several blocks. It is filled
        if any of them is stored.

        Args:
            width: Characters of the longest line, without the frame.

        Raises:
            TypeError: ``width`` is not an integer.
            ValueError: ``width`` is less than 1.
        """
        return draw.spy(self, check_size("CSRPattern.spy", "width", width, minimum=1))

    def _repr_svg_(self) -> str:
        return draw.svg(self)

    def __or__(self, other: CSRPattern) -> CSRPattern:
        """Return the canonical pattern that stores what either one stores."""
        return self._combine(other, np.union1d, "|")

    def __and__(self, other: CSRPattern) -> CSRPattern:
        """Return the canonical pattern that stores what both store."""
        return self._combine(other, np.intersect1d, "&")

    def _combine(self, other: CSRPattern, combine, symbol: str) -> CSRPattern:
        if not isinstance(other, CSRPattern):
            return NotImplemented
        if (self.shape, self.block_size) != (other.shape, other.block_size):
            raise ValueError(f"[CSRPattern] {self!r} {symbol} {other!r}: sizes differ")
        places = combine(self.places, other.places)
        return CSRPattern.from_places(places, self.shape, self.block_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CSRPattern):
            return NotImplemented
        return self is other or (
            self.shape == other.shape
            and self.block_size == other.block_size
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
        )

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.block_size, self.indptr.tobytes(), self.indices.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self):
        return CSRPattern, (self.indptr, self.indices, self.shape, self.block_size)

    def __deepcopy__(self, memo: dict) -> CSRPattern:
        return self

    def __repr__(self) -> str:
        noun = "block" if self.block_size > 1 else "value"
        return (
            f"CSRPattern({self.shape[0]} x {self.shape[1]}, block_size={self.block_size}, "
            f"{self.n_blocks} {noun}{'s' * (self.n_blocks != 1)}, density {self.density:.3g})"
        )


def grid_of(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """Return the shape of a matrix in blocks, of which the last may reach past it."""
    return -(-shape[0] // block_size), -(-shape[1] // block_size)


def check_pattern(owner: str, pattern: object) -> None:
    """Raise unless ``pattern`` is a :class:`CSRPattern`."""
    if not isinstance(pattern, CSRPattern):
        raise TypeError(f"[{owner}] pattern must be a CSRPattern, got {type(pattern).__name__}")


def check_stored(owner: str, n_blocks: int, block_size: int) -> None:
    """Raise if places in the data would not fit 32 bits."""
    if (n_values := n_blocks * block_size**2) > INT32_MAX:
        raise ValueError(
            f"[{owner}] {n_blocks} blocks of {block_size} x {block_size} are "
            f"{n_values} stored values; at most 2**31 - 1 fit 32-bit indices"
        )


def _length(values: ArrayLike) -> int:
    """Return the length of a sequence or array; scalars count as 1 and fail later, by rank."""
    shape = getattr(values, "shape", None)
    if shape is None:
        return len(values) if hasattr(values, "__len__") else 1
    return shape[0] if len(shape) else 1
