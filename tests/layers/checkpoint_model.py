"""The model that the checkpoint tests build in two processes."""

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn import BlockSparseLinear


def make_model(seed: int) -> nn.Sequential:
    mx.random.seed(seed)
    return nn.Sequential(
        BlockSparseLinear(32, 64, block_size=8, density=0.3),
        nn.ReLU(),
        BlockSparseLinear(64, 20, block_size=4, density=0.2),
        BlockSparseLinear(20, 10, block_size=1, density=0.4, bias=False),
    )


def make_input() -> mx.array:
    return mx.random.normal((7, 32), key=mx.random.key(5))
