"""Scores of blocks, and the choice of the strongest, for surgery and pruning.

All of this runs on the host, once for each change of a pattern, and never on a forward path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.blocks import split_blocks
from mlx_sparse_nn.core.checks import (
    check_density,
    check_dims,
    check_floating,
    check_name,
    check_size,
)
from mlx_sparse_nn.core.moments import InputMoments
from mlx_sparse_nn.core.pattern import CSRPattern, grid_of

Balance: TypeAlias = Literal["row", "global"]


@dataclass(frozen=True, eq=False)
class BlockPlaces:
    """Where the blocks lie that a score function gets, as its second argument.

    Attributes:
        path: Of their layer in the model; empty where the layer stands alone.
        rows: ``(n_blocks,)`` int32, the block-row of each.
        cols: ``(n_blocks,)`` int32, the block-column of each.
        shape: ``(output_dims, input_dims)`` of the layer's weight.
        block_size: Side of the blocks.
        moments: Of the layer's inputs, where they were given.
    """

    path: str
    rows: np.ndarray
    cols: np.ndarray
    shape: tuple[int, int]
    block_size: int
    moments: InputMoments | None = None

    @classmethod
    def of_pattern(
        cls, path: str, pattern: CSRPattern, *, moments: InputMoments | None = None
    ) -> BlockPlaces:
        """Return those of the blocks that a pattern stores."""
        rows, cols = pattern.row_indices, pattern.indices
        return cls(path, rows, cols, pattern.shape, pattern.block_size, moments)

    @classmethod
    def of_grid(
        cls,
        path: str,
        shape: Sequence[int],
        block_size: int,
        block_rows: range | None = None,
        *,
        moments: InputMoments | None = None,
    ) -> BlockPlaces:
        """Return those of all blocks of a dense weight, or of some of its block-rows."""
        n_block_rows, n_block_cols = grid_of(shape, block_size)
        chosen = np.arange(n_block_rows, dtype=np.int32)
        if block_rows is not None:
            chosen = chosen[block_rows.start : block_rows.stop]
        rows = np.repeat(chosen, n_block_cols)
        cols = np.tile(np.arange(n_block_cols, dtype=np.int32), chosen.size)
        return cls(path, rows, cols, (shape[0], shape[1]), block_size, moments)


Score: TypeAlias = (
    Literal["l1", "l2", "max", "obs"]
    | Callable[[mx.array], mx.array | np.ndarray]
    | Callable[[mx.array, BlockPlaces], mx.array | np.ndarray]
)

_NORMS: dict[str, Callable[[mx.array], mx.array]] = {
    "l1": lambda blocks: mx.abs(blocks).sum(axis=(1, 2)),
    "l2": lambda blocks: mx.sqrt(mx.square(blocks).sum(axis=(1, 2))),
    "max": lambda blocks: mx.abs(blocks).max(axis=(1, 2)),
}
_OBS = "obs"  # chosen by moments, in core/fit.py
_BALANCES = ("row", "global")


def block_scores(
    blocks: mx.array,
    score: Score,
    places: Callable[[], BlockPlaces],
    *,
    owner: str = "block_scores",
) -> np.ndarray:
    """Return how strong each block is: the larger, the more worth keeping.

    Args:
        blocks: ``(n_blocks, B, B)``, or ``(nnz,)`` for block size 1, of any floating dtype.
        score: ``"l1"``, ``"l2"`` or ``"max"``, the norm of a block's entries; or a function of
            blocks, ``(n_blocks, B, B)`` float32, or of blocks and their places, that returns
            ``(n_blocks,)`` finite numbers.
        places: Returns where they lie; called if the score takes it.
        owner: Name shown in error messages.

    Returns:
        ``(n_blocks,)`` float64 on the host; norms are computed in float32.

    Raises:
        TypeError: ``blocks`` is no floating array, or ``score`` neither a name nor such a function.
        ValueError: ``blocks`` has another shape or holds a nan or an infinity, ``score`` is an
            unknown name, or its result has another shape or is not finite.
    """
    check_score(owner, score)
    check_floating(owner, "weights", blocks)
    if blocks.ndim == 1:
        blocks = blocks.reshape(-1, 1, 1)
    if blocks.ndim != 3:
        raise ValueError(
            f"[{owner}] blocks must be (n_blocks, B, B) or (nnz,), got shape {blocks.shape}"
        )
    n_blocks = blocks.shape[0]
    if n_blocks == 0:
        return np.zeros(0)
    finite = np.array(mx.isfinite(blocks).all(axis=(1, 2)))
    if not finite.all():
        raise ValueError(
            f"[{owner}] weights must be finite, got a nan or an infinity in block {finite.argmin()}"
        )
    function: Callable[..., Any] = score if callable(score) else _NORMS[score]
    where = [places()] if callable(score) and _takes_places(owner, score) else []
    scores = _on_host(owner, function(blocks.astype(mx.float32), *where))
    if scores.shape != (n_blocks,):
        raise ValueError(f"[{owner}] score must return shape {(n_blocks,)}, got {scores.shape}")
    if not (finite := np.isfinite(scores)).all():
        block = int(finite.argmin())
        raise ValueError(f"[{owner}] score must be finite, got {scores[block]} for block {block}")
    return scores


def grid_scores(
    weight: mx.array,
    block_size: int,
    score: Score,
    places: Callable[[], BlockPlaces],
    *,
    owner: str = "grid_scores",
) -> np.ndarray:
    """Return :func:`block_scores` of all blocks of a dense weight, on its grid.

    Args:
        weight: ``(n_rows, n_cols)``.
        block_size: Side of the blocks; what the last ones reach past the weight counts as zeros.
        score, places, owner: As in :func:`block_scores`.

    Returns:
        ``(n_block_rows, n_block_cols)`` float64 on the host.

    Raises:
        TypeError, ValueError: As :func:`block_scores`.
    """
    blocks = split_blocks(weight, block_size)
    scores = block_scores(blocks.reshape(-1, block_size, block_size), score, places, owner=owner)
    return scores.reshape(blocks.shape[:2])


def strongest_positions(
    scores: np.ndarray, rows: np.ndarray, count: int, balance: Balance = "row"
) -> np.ndarray:
    """Return the positions of the ``count`` strongest blocks, in rising order.

    With ``balance="row"`` every block-row keeps the same number of blocks, give or take one. Blocks
    are taken in rounds: the strongest of each row, then the second of each, and so on. If the last
    round cannot take one of every row, it takes the strongest of them. A row that has fewer blocks
    than its share keeps all, and the others share the rest. With ``balance="global"`` the strongest
    blocks are kept wherever they lie. Either way a block-row or a block-column may be left without
    blocks: its outputs are then the bias alone, or its inputs are ignored.

    Of equally strong blocks, those that come first are kept.

    Args:
        scores: ``(n,)`` of all candidates, finite.
        rows: ``(n,)`` integers, the block-row of each.
        count: How many to keep, in [0, n].
        balance: ``"row"`` or ``"global"``.

    Raises:
        ValueError: ``count`` is not in [0, n], or ``balance`` is unknown.
    """
    check_balance("strongest_positions", balance)
    if not 0 <= count <= scores.size:
        raise ValueError(f"[strongest_positions] count must be in [0, {scores.size}], got {count}")
    rounds = np.zeros(scores.size, dtype=np.int64)
    if balance == "row":
        by_row = np.lexsort((-scores, rows))  # stable: by row, then strongest, then position
        lengths = np.bincount(rows)
        starts = np.cumsum(lengths) - lengths
        rounds[by_row] = np.arange(scores.size) - starts[rows[by_row]]
    order = np.lexsort((-scores, rounds))
    return np.sort(order[:count])


def strongest_pattern(
    scores: np.ndarray,
    count: int,
    shape: Sequence[int],
    block_size: int,
    balance: Balance = "row",
) -> CSRPattern:
    """Return the pattern of the :func:`strongest_positions` of a grid of scores ``(R, C)``."""
    n_block_rows, n_block_cols = scores.shape
    rows = np.repeat(np.arange(n_block_rows), n_block_cols)
    kept = strongest_positions(scores.reshape(-1), rows, count, balance)
    return CSRPattern.from_places(kept, shape, block_size)


def choose_blocks(
    owner: str,
    weight: mx.array,
    block_size: int,
    density: float,
    score: Score,
    balance: Balance,
    moments: InputMoments | None = None,
) -> CSRPattern:
    """Return the pattern of the strongest blocks of a dense weight, or raise.

    Args:
        owner: Name shown in error messages.
        weight: ``(output_dims, input_dims)``.
        block_size, density, score, balance: As in ``BlockSparseLinear.from_linear``.
        moments: Of the layer's inputs, for a function that looks at them.
    """
    check_choice(owner, block_size, density, score, balance)
    check_dims(owner, weight.shape)
    places = partial(BlockPlaces.of_grid, "", weight.shape, block_size, moments=moments)
    scores = grid_scores(weight, block_size, score, places, owner=owner)
    count = blocks_for(density, scores.size)
    return strongest_pattern(scores, count, weight.shape, block_size, balance)


def share_by_score(scores: Sequence[np.ndarray], budget: int) -> np.ndarray:
    """Return how many of the ``budget`` strongest blocks of all layers lie in each.

    The best block of a layer always counts as one of them.

    Args:
        scores: Of each layer's candidates, in any shape.
        budget: Blocks in all, at least one a layer and at most all.
    """
    flat = [layer_scores.flatten() for layer_scores in scores]
    for layer_scores in flat:
        if layer_scores.size:
            layer_scores[layer_scores.argmax()] = np.inf  # each layer's best block comes first
    layers = np.repeat(np.arange(len(flat)), [layer_scores.size for layer_scores in flat])
    kept = strongest_positions(np.concatenate(flat), layers, budget, "global")
    return np.bincount(layers[kept], minlength=len(flat))


def blocks_for(density: float, places: int) -> int:
    """Return how many of ``places`` blocks a density in (0, 1] keeps: rounded, and at least 1."""
    return max(1, round(float(density) * places))  # float16 would not hold the product


def check_choice(
    owner: str,
    block_size: int,
    density: float,
    score: Score,
    balance: Balance,
    *,
    has_moments: bool = False,
) -> None:
    """Raise unless each of the options by which blocks are chosen is valid by itself."""
    check_size(owner, "block_size", block_size, minimum=1)
    check_density(owner, density)
    check_score(owner, score, has_moments=has_moments)
    check_balance(owner, balance)


def check_score(owner: str, score: Score, *, has_moments: bool = False) -> None:
    """Raise unless ``score`` is a known name, or a function of blocks or of blocks and places."""
    if callable(score):
        _takes_places(owner, score)
        return
    check_name(owner, "score", score, (*_NORMS, _OBS), " or be a function of blocks")
    if score == _OBS and not has_moments:
        raise ValueError(
            f"[{owner}] score 'obs' needs moments: layer_moments(model, batches) returns them"
        )


def _takes_places(owner: str, score: Callable[..., Any]) -> bool:
    """Return whether a function is one of blocks and places: it needs two positional arguments.

    Raises:
        TypeError: It needs none, or more, or Python cannot tell.
    """
    wanted = "score must be a function of blocks, or of (blocks, places)"
    try:
        signature = inspect.signature(score)
    except ValueError as error:
        raise TypeError(
            f"[{owner}] {wanted}, got {score!r}, whose parameters Python cannot tell; "
            "put it into a lambda"
        ) from error
    for n_arguments in (1, 2):
        try:
            signature.bind(*[None] * n_arguments)
        except TypeError:
            continue
        return n_arguments == 2
    raise TypeError(f"[{owner}] {wanted}, got one of {signature}")


def check_balance(owner: str, balance: Balance) -> None:
    """Raise unless ``balance`` is a known name."""
    check_name(owner, "balance", balance, _BALANCES)


def _on_host(owner: str, scores: object) -> np.ndarray:
    if isinstance(scores, mx.array):
        scores = np.array(scores.astype(mx.float32) if scores.dtype == mx.bfloat16 else scores)
    if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "biuf":
        kind = scores.dtype if isinstance(scores, np.ndarray) else type(scores).__name__
        raise TypeError(f"[{owner}] score must return an array of real numbers, got {kind}")
    return scores.astype(np.float64)
