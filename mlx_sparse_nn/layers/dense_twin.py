"""The dense layer of the same product: what a block-sparse one was, or is compared with."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import SparseLinear


def dense_twin(layer: SparseLinear) -> nn.Linear | nn.QuantizedLinear:
    """Return the dense layer that computes what ``layer`` does, in the same mode.

    Of a quantized layer it has the same packed values, with zeros where none is stored; it is an
    ``nn.Linear`` of what they stand for where the pattern stores a block more than once.
    """
    pattern = layer.pattern
    if not isinstance(layer, QuantizedBlockSparseLinear):
        return layer.to_linear()
    if np.unique(pattern.places).size < pattern.n_blocks:
        return layer.to_linear()
    places = mx.array(pattern.row_indices), mx.array(pattern.indices)
    linear = nn.QuantizedLinear.__new__(nn.QuantizedLinear)  # its own would draw random numbers
    nn.Module.__init__(linear)
    linear.group_size, linear.bits, linear.mode = layer.group_size, layer.bits, "affine"
    for name in ("weight", "scales", "biases"):
        blocks = layer[name]
        grid = mx.zeros((*pattern.grid, *blocks.shape[1:]), blocks.dtype)
        grid[places] = blocks
        linear[name] = grid.swapaxes(1, 2).reshape(layer.output_dims, -1)
    if "bias" in layer:
        linear.bias = layer.bias
    linear.freeze(keys=list(layer._no_grad & set(linear)))
    linear.train(layer.training)
    return linear
