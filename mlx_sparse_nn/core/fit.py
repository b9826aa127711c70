"""A dense weight fitted to the blocks of a pattern: from MLX arrays, and back to them."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.blocks import blocks_of
from mlx_sparse_nn.core.checks import check_dims
from mlx_sparse_nn.core.least_squares import (
    LeastSquares,
    NotDefiniteError,
    output_energy,
    output_error,
)
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.scores import Balance, blocks_for, check_choice, strongest_pattern

DAMPING = 0.01  # the default; quality depends little on it from 0.001 to 0.1


@dataclass(frozen=True)
class Fit:
    """What a least-squares fit gave.

    Attributes:
        weight: The stored values, ``pattern.data_shape``, of the dtype of the dense weight.
        bias: ``(output_dims,)``, if there is one.
        error_before: Relative error of the outputs with the dense layer's values and bias: beside
            those of the dense weight that was aimed at, which is the layer's own in a dense model.
        error_after: The same with these.
    """

    weight: mx.array
    bias: mx.array | None
    error_before: float
    error_after: float


def choose_by_moments(
    owner: str,
    weight: mx.array,
    problem: LeastSquares,
    block_size: int,
    density: float,
    balance: Balance,
) -> CSRPattern:
    """Return the pattern of the blocks of a dense weight whose loss would cost most.

    Args:
        owner: Name shown in error messages.
        weight: ``(output_dims, input_dims)`` of any floating dtype.
        problem: Of the layer's inputs.
        block_size, density, balance: As in ``BlockSparseLinear.from_linear``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range, the weight is not finite, or the moments are not
            positive definite.
    """
    check_choice(owner, block_size, density, "l2", balance)
    check_dims(owner, weight.shape)
    scores = scores_by_moments(owner, weight, problem, block_size)
    count = blocks_for(density, scores.size)
    return strongest_pattern(scores, count, weight.shape, block_size, balance)


def scores_by_moments(
    owner: str,
    weight: mx.array,
    problem: LeastSquares,
    block_size: int,
    pattern: CSRPattern | None = None,
) -> np.ndarray:
    """Return how much the outputs lose without each block, the others refitted.

    Args:
        owner: Name shown in error messages.
        weight: ``(output_dims, input_dims)`` of any floating dtype.
        problem: Of the layer's inputs.
        block_size: Side of the blocks.
        pattern: The blocks that there are, by default all.

    Returns:
        ``(R, C)`` float64: squares, relative to those of all outputs, so that layers compare.

    Raises:
        ValueError: The weight is not finite, or the moments are not positive definite.
    """
    kept = None if pattern is None else _stored(pattern)
    try:
        aim, _ = problem.aim(_on_host(owner, "weight", weight))
        scores = problem.scores(aim, block_size, kept)
    except NotDefiniteError as error:
        raise _not_definite(owner, problem) from error
    return scores / (output_energy(problem.moments, aim) or 1.0)


def fit_pattern(
    owner: str,
    weight: mx.array,
    bias: mx.array | None,
    pattern: CSRPattern,
    problem: LeastSquares,
    dtype: mx.Dtype | None = None,
) -> Fit:
    """Return the values and the bias of a sparse layer that are closest to a dense layer's outputs.

    Args:
        owner: Name shown in error messages.
        weight: ``(output_dims, input_dims)``, the dense one, of any floating dtype.
        bias: ``(output_dims,)``, the dense layer's, if it has one.
        pattern: The blocks, none of them repeated.
        problem: Of the layer's inputs; with a bias if there is one.
        dtype: Of the values, by default that of the dense weight.

    Raises:
        ValueError: The weight is not finite, the moments are not positive definite, or the values
            that are best overflow the dtype.
    """
    dense, block_size = _on_host(owner, "weight", weight), pattern.block_size
    kept = _stored(pattern)
    try:
        aim, more = problem.aim(dense)
        fitted = problem.fit(aim, kept, block_size)
    except NotDefiniteError as error:
        raise _not_definite(owner, problem) from error
    stored, new_bias, change = mx.array(fitted, dtype or weight.dtype), bias, more
    _check_fits(owner, stored)
    if bias is not None:
        old = _on_host(owner, "bias", bias)
        wanted = old + more + problem.bias_change(aim, fitted)
        new_bias = mx.array(wanted, dtype or bias.dtype)
        _check_fits(owner, new_bias)
        change = _on_host(owner, "bias", new_bias) - old - more
    columns = np.repeat(np.repeat(kept, block_size, axis=0), block_size, axis=1)
    cut = np.where(columns[: len(dense), : dense.shape[1]], dense, 0)
    return Fit(
        blocks_of(stored, pattern),
        new_bias,
        output_error(problem.moments, aim, cut, -more),
        output_error(problem.moments, aim, _on_host(owner, "weight", stored), change),
    )


def _stored(pattern: CSRPattern) -> np.ndarray:
    """Return which blocks a pattern stores, ``(R, C)`` bool."""
    kept = np.zeros(pattern.grid, dtype=bool)
    kept[pattern.row_indices, pattern.indices] = True
    return kept


def _on_host(owner: str, name: str, array: mx.array) -> np.ndarray:
    """Return an array of a layer in float64, or raise if it is not finite."""
    wide = array if array.dtype == mx.float64 else array.astype(mx.float32)
    values = np.array(wide).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"[{owner}] {name} must be finite, got a nan or an infinity")
    return values


def _check_fits(owner: str, fitted: mx.array) -> None:
    """Raise if fitted values are not finite."""
    if not np.array(mx.isfinite(fitted).all()):
        raise ValueError(
            f"[{owner}] the values that fit overflow {fitted.dtype}: give more damping, or cast "
            "the layer to float32"
        )


def _not_definite(owner: str, problem: LeastSquares) -> ValueError:
    moments = problem.moments
    if not moments.second.any():
        return ValueError(f"[{owner}] moments are of inputs that are all zero: leave the layer out")
    return ValueError(
        f"[{owner}] moments are not positive definite, of {moments.n} samples of {moments.n_in} "
        f"features with damping {problem.damping:g}: give more samples, or more damping, as "
        f"{max(0.01, 10 * problem.damping):g}"
    )
