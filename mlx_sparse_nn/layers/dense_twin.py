"""The dense layer of the same product: what a block-sparse one was, or is compared with."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import SparseLinear


def dense_twin(layer: SparseLinear) -> nn.Linear | nn.QuantizedLinear:
    """Return the dense layer that computes what ``layer`` does, in the same mode.

    Of a quantized layer it has the same packed values, with zeros where none is stored. It is an
    ``nn.Linear`` of what they stand for where an ``nn.QuantizedLinear`` cannot hold them.
    """
    if not isinstance(layer, QuantizedBlockSparseLinear) or why_not_quantized(layer):
        return layer.to_linear()
    pattern, (n_out, n_in) = layer.pattern, layer.pattern.shape
    places = mx.array(pattern.row_indices), mx.array(pattern.indices)
    linear = nn.QuantizedLinear.__new__(nn.QuantizedLinear)  # its own would draw random numbers
    nn.Module.__init__(linear)
    linear.group_size, linear.bits, linear.mode = layer.group_size, layer.bits, "affine"
    widths = {"weight": n_in * layer.bits // 32} | dict.fromkeys(
        ("scales", "biases"), n_in // layer.group_size
    )
    for name, width in widths.items():
        blocks = layer[name]
        grid = mx.zeros((*pattern.grid, *blocks.shape[1:]), blocks.dtype)
        grid[places] = blocks
        rows = grid.swapaxes(1, 2).reshape(pattern.grid[0] * pattern.block_size, -1)
        linear[name] = rows[:n_out, :width]
    if "bias" in layer:
        linear.bias = layer.bias
    linear.freeze(keys=list(layer._no_grad & set(linear)))
    linear.train(layer.training)
    return linear


def why_not_quantized(layer: QuantizedBlockSparseLinear) -> str | None:
    """Return in words why no ``nn.QuantizedLinear`` has the packed values of a layer, or None."""
    if np.unique(layer.pattern.places).size < layer.pattern.n_blocks:
        return "the pattern stores a block more than once"
    if layer.input_dims % layer.group_size:
        return f"its groups are of {layer.group_size} whole inputs"
    return None
