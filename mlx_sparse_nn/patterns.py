"""Builders of sparsity patterns. Each returns a canonical :class:`CSRPattern`."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import (
    ArrayLike,
    check_absent,
    check_data,
    check_density,
    check_fraction,
    check_matrix,
    check_rectangular,
    check_seed,
    check_shape,
    check_size,
)
from mlx_sparse_nn.core.pattern import CSRPattern, check_stored, grid_of
from mlx_sparse_nn.core.scores import Balance, blocks_for, check_balance, strongest_pattern


def block_diagonal(features: int, blocks: int) -> CSRPattern:
    """Return ``blocks`` dense square blocks along the diagonal.

    Args:
        features: Rows and columns.
        blocks: Number of blocks; it divides ``features``, and the block size is the quotient.

    Raises:
        ValueError: ``blocks`` does not divide ``features``.
    """
    size = _block_of("patterns.block_diagonal", features, blocks)
    return CSRPattern(np.arange(blocks + 1), np.arange(blocks), (features, features), size)


def bidiagonal_blocks(features: int, blocks: int) -> CSRPattern:
    """Return scalars on the diagonal and just above it, within each of ``blocks`` diagonal blocks.

    Args:
        features: Rows and columns.
        blocks: Number of blocks; it divides ``features``.

    Raises:
        ValueError: ``blocks`` does not divide ``features``.
    """
    size = _block_of("patterns.bidiagonal_blocks", features, blocks)
    rows = np.arange(features)[:, None]
    cols = rows + np.arange(2)  # (features, 2)
    inside = rows // size == cols // size
    indptr = np.concatenate([[0], np.cumsum(inside.sum(axis=1))])
    return CSRPattern(indptr, cols[inside], (features, features))


def banded(n_rows: int, n_cols: int, bandwidth: int, block_size: int = 32) -> CSRPattern:
    """Return the blocks ``(i, j)`` with ``|i - j| <= bandwidth``.

    Args:
        n_rows, n_cols: Shape in scalars.
        bandwidth: Block-diagonals on each side of the main one; 0 keeps the diagonal alone.
        block_size: Side of the blocks.

    Raises:
        ValueError: A size or ``bandwidth`` is negative.
    """
    shape, n_block_rows, n_block_cols = _grid("patterns.banded", n_rows, n_cols, block_size)
    bandwidth = check_size("patterns.banded", "bandwidth", bandwidth)
    rows = np.arange(n_block_rows)
    first = np.minimum(np.maximum(rows - bandwidth, 0), n_block_cols)
    counts = np.minimum(rows + bandwidth + 1, n_block_cols) - first
    counts = np.maximum(counts, 0)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    check_stored("patterns.banded", int(indptr[-1]), block_size)
    cols = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts) + np.repeat(first, counts)
    return CSRPattern(indptr, cols, shape, block_size)


def butterfly(n: int, block_size: int = 32) -> CSRPattern:
    """Return the flat block butterfly: block ``i`` meets ``i`` and ``i`` with one bit flipped.

    The union of the factors of a butterfly matrix, as in "Pixelated Butterfly" (Chen et al.,
    2022): ``log2(n / block_size) + 1`` blocks a row connect any two blocks within that many
    products.

    Args:
        n: Rows and columns.
        block_size: Side of the blocks; ``n / block_size``, rounded up, is a power of two.

    Raises:
        ValueError: It is not.
    """
    shape, size, _ = _grid("patterns.butterfly", n, n, block_size)
    if size == 0 or size & (size - 1):
        raise ValueError(
            "[patterns.butterfly] n / block_size must be a power of two, "
            f"got {n} / {block_size} = {size}"
        )
    flips = np.concatenate([[0], 1 << np.arange(size.bit_length() - 1)])
    cols = np.sort(np.arange(size)[:, None] ^ flips, axis=1)
    indptr = np.arange(size + 1) * flips.size
    return CSRPattern(indptr, cols.reshape(-1), shape, block_size)


def random(
    n_rows: int, n_cols: int, density: float = 0.1, block_size: int = 32, seed: int = 0
) -> CSRPattern:
    """Return a balanced random pattern of exactly ``round(density * number of places)`` blocks.

    The numbers of blocks of any two block-rows differ by at most one, and so do those of any two
    block-columns.

    Args:
        n_rows, n_cols: Shape in scalars.
        density: Fraction of the blocks to store, in [0, 1].
        block_size: Side of the blocks.
        seed: Seed of the generator; equal seeds give equal patterns.

    Raises:
        TypeError: ``density`` is not a number, or another argument not an integer.
        ValueError: A size or ``seed`` is negative, ``density`` is not in [0, 1], or more than
            2**31 - 1 values would be stored.
    """
    shape, n_block_rows, n_block_cols = _grid("patterns.random", n_rows, n_cols, block_size)
    check_fraction("patterns.random", "density", density)
    seed = check_seed("patterns.random", seed)
    n_blocks = round(density * n_block_rows * n_block_cols)
    check_stored("patterns.random", n_blocks, block_size)
    return _balanced(shape, block_size, n_blocks, np.random.default_rng(seed))


def covering(
    n_rows: int, n_cols: int, density: float = 0.1, block_size: int = 32, seed: int = 0
) -> CSRPattern:
    """Return :func:`random`, with at least one block in every block-row and every block-column.

    Where ``density`` asks for fewer blocks than that takes, the pattern is denser than asked for.
    This is what ``BlockSparseLinear`` uses: no input is ignored and no output is constant.

    Raises:
        TypeError, ValueError: As :func:`random`; ``density`` is in (0, 1] here.
    """
    shape, n_block_rows, n_block_cols = _grid("patterns.covering", n_rows, n_cols, block_size)
    check_density("patterns.covering", density)
    seed = check_seed("patterns.covering", seed)
    n_blocks = round(density * n_block_rows * n_block_cols)
    if n_block_rows and n_block_cols:
        n_blocks = max(n_blocks, n_block_rows, n_block_cols)
    check_stored("patterns.covering", n_blocks, block_size)
    return _balanced(shape, block_size, n_blocks, np.random.default_rng(seed))


def from_mask(mask: ArrayLike, block_size: int = 32) -> CSRPattern:
    """Return the blocks in which any entry of ``mask`` is true.

    Args:
        mask: ``(n_rows, n_cols)`` bool.
        block_size: Side of the blocks.

    Raises:
        ValueError: ``mask`` is not a matrix.
    """
    owner = "patterns.from_mask"
    mask = check_rectangular(owner, "mask", mask)
    check_matrix(owner, "mask", mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"[{owner}] mask must be bool, got {mask.dtype}; use from_dense for values")
    return _where(owner, mask, block_size)


def from_dense(w: ArrayLike, block_size: int = 1) -> CSRPattern:
    """Return the blocks of ``w`` ``(n_rows, n_cols)`` that hold a nonzero: scalars by default, as
    the array that ``mlx_sparse_nn.from_dense`` makes of it.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: ``w`` is not a matrix.
    """
    owner = "patterns.from_dense"
    w = check_data(owner, w, "w")
    check_matrix(owner, "w", w)
    return _where(owner, np.array(w != mx.zeros((), w.dtype)), block_size)


def strongest(
    scores: ArrayLike,
    density: float | None = None,
    block_size: int = 32,
    *,
    n_blocks: int | None = None,
    balance: Balance = "row",
    shape: Sequence[int] | None = None,
) -> CSRPattern:
    """Return the blocks of the highest scores: those that ``sparsify`` keeps of such scores.

    Args:
        scores: ``(n_block_rows, n_block_cols)`` finite numbers, one for each block of the matrix.
        density: Stored fraction of the blocks, in (0, 1], rounded to at least one block.
        block_size: Side of the blocks.
        n_blocks: How many blocks to store, in place of ``density``.
        balance: ``"row"`` keeps the same number of blocks in every block-row, give or take one;
            ``"global"`` keeps the strongest wherever they lie.
        shape: ``(n_rows, n_cols)`` in scalars, where the last blocks reach past the matrix. By
            default all blocks lie within it.

    Raises:
        TypeError: ``scores`` are no real numbers, or another argument has the wrong type.
        ValueError: ``scores`` are no matrix or not finite, a number is out of its range, or
            ``shape`` has other blocks.

    Example:
        >>> strongest([[3, 1], [2, 4]], density=0.5, block_size=16)
        CSRPattern(32 x 32, block_size=16, 2 blocks, density 0.5)
    """
    owner = "patterns.strongest"
    block_size = check_size(owner, "block_size", block_size, minimum=1)
    check_balance(owner, balance)
    grid = _scores(owner, scores)
    if n_blocks is None:
        if density is None:
            raise TypeError(f"[{owner}] density must be a number, got None; or give n_blocks")
        check_density(owner, density)  # type: ignore[arg-type]
        count = min(grid.size, blocks_for(density, grid.size))  # type: ignore[arg-type]
    else:
        check_absent(owner, "n_blocks says how many are stored", density=density)
        count = check_size(owner, "n_blocks", n_blocks)
        if count > grid.size:
            raise ValueError(f"[{owner}] n_blocks must be in [0, {grid.size}], got {count}")
    sizes = check_shape(owner, [n * block_size for n in grid.shape] if shape is None else shape)
    if grid_of(sizes, block_size) != grid.shape:
        raise ValueError(
            f"[{owner}] shape {sizes} has {grid_of(sizes, block_size)} blocks of {block_size}, "
            f"but scores are {grid.shape}"
        )
    check_stored(owner, count, block_size)
    return strongest_pattern(grid, count, sizes, block_size, balance)


def _scores(owner: str, scores: ArrayLike) -> np.ndarray:
    """Return scores ``(R, C)`` as float64, or raise."""
    if isinstance(scores, mx.array) and scores.dtype == mx.bfloat16:  # which NumPy has not
        scores = scores.astype(mx.float32)
    grid = check_rectangular(owner, "scores", scores)
    check_matrix(owner, "scores", grid)
    if grid.dtype.kind not in "biuf":
        raise TypeError(f"[{owner}] scores must be real numbers, got {grid.dtype}")
    grid = grid.astype(np.float64)
    if not np.isfinite(grid).all():
        row, col = np.argwhere(~np.isfinite(grid))[0]
        raise ValueError(f"[{owner}] scores must be finite, got {grid[row, col]} at ({row}, {col})")
    return grid


def _where(owner: str, mask: np.ndarray, block_size: int) -> CSRPattern:
    """Return the blocks in which any entry of a bool matrix is true."""
    n_rows, n_cols = mask.shape
    shape, n_block_rows, n_block_cols = _grid(owner, n_rows, n_cols, block_size)
    missing = [(0, -size % block_size) for size in shape]
    whole = np.pad(mask, missing)
    blocks = whole.reshape(n_block_rows, block_size, n_block_cols, block_size).any(axis=(1, 3))
    return CSRPattern.from_places(np.flatnonzero(blocks), shape, block_size)


def _balanced(
    shape: tuple[int, int], block_size: int, n_blocks: int, rng: np.random.Generator
) -> CSRPattern:
    """Deal columns to rows from shuffled decks that hold each column once.

    A row takes consecutive cards, so decks used up one after the other keep columns balanced. Where
    a row goes on from one deck into the next, the next one is dealt with the row's own columns kept
    back, so that none comes twice.
    """
    n_block_rows, n_block_cols = grid_of(shape, block_size)
    counts = np.full(n_block_rows, n_blocks // max(1, n_block_rows))
    counts[rng.permutation(n_block_rows)[: n_blocks - counts.sum()]] += 1
    rows, deck = [], np.zeros(0, dtype=np.int64)
    for count in counts:
        row, deck = deck[:count], deck[count:]
        if missing := count - row.size:
            deck = rng.permutation(n_block_cols)
            taken = np.isin(deck, row)
            fresh = deck[~taken][:missing]
            row = np.concatenate([row, fresh])
            deck = deck[~np.isin(deck, fresh)]
        rows.append(np.sort(row))
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return CSRPattern(indptr, np.concatenate([deck[:0], *rows]), shape, block_size)


def _block_of(owner: str, features: int, blocks: int) -> int:
    """Return the size of ``blocks`` equal blocks, or raise."""
    features = check_size(owner, "features", features)
    blocks = check_size(owner, "blocks", blocks, minimum=1)
    if features % blocks or features == 0:
        raise ValueError(f"[{owner}] features {features} is not a multiple of blocks {blocks}")
    return features // blocks


def _grid(
    owner: str, n_rows: int, n_cols: int, block_size: int
) -> tuple[tuple[int, int], int, int]:
    block_size = check_size(owner, "block_size", block_size, minimum=1)
    shape = check_shape(owner, (n_rows, n_cols))
    return shape, *grid_of(shape, block_size)
