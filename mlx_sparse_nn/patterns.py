"""Builders of sparsity patterns. Each returns a canonical :class:`CSRPattern`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import (
    ArrayLike,
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


def from_dense(w: ArrayLike, block_size: int = 32) -> CSRPattern:
    """Return the blocks of ``w`` ``(n_rows, n_cols)`` that hold a nonzero.

    Raises:
        TypeError: ``w`` is not numeric.
        ValueError: ``w`` is not a matrix.
    """
    owner = "patterns.from_dense"
    w = check_data(owner, w, "w")
    check_matrix(owner, "w", w)
    return _where(owner, np.array(w != mx.zeros((), w.dtype)), block_size)


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
