"""The values of one sparse layer, fitted anew to a dense one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from mlx_sparse_nn.core.fit import DAMPING, fit_pattern
from mlx_sparse_nn.core.least_squares import LeastSquares
from mlx_sparse_nn.core.moments import InputMoments, check_damping, check_moments
from mlx_sparse_nn.layers.linear import BlockSparseLinear, why_not_linear, write_values


@dataclass(frozen=True)
class Refit:
    """What :func:`refit` did.

    Attributes:
        error_kept: Relative error of the layer's outputs over the samples with the dense layer's
            values in the stored blocks: the norm of what is missing over that of the outputs
            without a bias.
        error_fitted: The same with the values that are there now.
    """

    error_kept: float
    error_fitted: float


def refit(
    layer: BlockSparseLinear, linear: nn.Linear, moments: InputMoments, *, damping: float = DAMPING
) -> Refit:
    """Give a sparse layer the values and the bias whose outputs are closest to a dense layer's.

    The pattern stays, and so does what the layer computed in training: it is written over. An
    optimizer's moments of the weight have no meaning afterwards.

    Args:
        layer: Changed in place.
        linear: The dense layer, of the same dims, with a bias if ``layer`` has one.
        moments: Of their inputs, as :func:`layer_moments` returns them.
        damping: How much the fit holds on to the dense values, as a fraction of the mean square of
            the inputs.

    Returns:
        The relative errors of the outputs over the samples, with the dense layer's values in the
        stored blocks and with those that are there now.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Dims or biases differ, a block is repeated, a weight is not finite, ``damping``
            is negative, or the moments are not positive definite.

    Example:
        >>> found = layer_moments(dense, batches)
        >>> refit(model.layers[0].up, dense.layers[0].up, found["layers.0.up"])
        Refit(error_kept=0.31, error_fitted=0.12)
    """
    owner = "refit"
    if not isinstance(layer, BlockSparseLinear):
        kind = type(layer).__name__
        raise TypeError(f"[{owner}] layer must be a BlockSparseLinear, got {kind}")
    if reason := why_not_linear(linear):
        raise TypeError(f"[{owner}] linear must be an nn.Linear: {reason}")
    if layer.pattern.shape != tuple(linear.weight.shape):
        raise ValueError(
            f"[{owner}] layer is {layer.pattern.shape}, but linear {tuple(linear.weight.shape)}"
        )
    if ("bias" in layer) != ("bias" in linear):
        raise ValueError(f"[{owner}] layer and linear must both have a bias, or none of them")
    check_moments(owner, moments, layer.input_dims)
    check_damping(owner, damping)
    layer.pattern.check_unique(owner)
    bias = linear.get("bias")
    problem = LeastSquares(moments, damping, bias is not None)
    dtype = layer.weight.dtype
    fit = fit_pattern(owner, linear.weight, bias, layer.pattern, problem, dtype)
    write_values(layer, fit.weight, fit.bias)
    layer.output_error = fit.error_after  # for summary
    return Refit(fit.error_before, fit.error_after)
