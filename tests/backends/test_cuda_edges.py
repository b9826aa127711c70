"""Matrices that end within a block, on this machine's device: on an NVIDIA GPU, by every kernel.

The other tests of products there have whole blocks where those are large.
"""

import mlx.core as mx
import numpy as np
import pytest
from support import check_products, integers, pattern_of, random_pattern, spoiled, trimmed


def check(pattern, n, dtype, offset):
    """Compare the three products with the oracle's, with nans outside the matrix."""
    n_rows, n_cols = pattern.shape
    data = spoiled(pattern, integers(pattern.data_shape, 0, dtype))
    shapes = [(n, n_cols), (n, n_rows), (n_rows,)]
    x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes, 1))
    data = mx.concatenate([mx.zeros(offset, dtype), data.reshape(-1)])[offset:]
    check_products(pattern, data.reshape(pattern.data_shape), x, y, bias)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (5, 0), (-5, 1)])
@pytest.mark.parametrize("n", [1, 5, 16, 40, 70, 600])
@pytest.mark.parametrize("block_size", [3, 8, 16, 32, 64, 128])
def test_products(block_size, n, cut, offset):
    blocks = max(4, 96 // block_size)
    pattern = random_pattern(blocks, blocks + 1, block_size, density=0.7)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        check(trimmed(pattern, cut, -cut), n, dtype, offset)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 0), (5, 1)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_enough_work_for_panels(block_size, cut, offset):
    mask = np.random.default_rng(0).random((2000 // block_size, 1056 // block_size)) < 0.2
    pattern = pattern_of(map(np.flatnonzero, mask), mask.shape[1], block_size)
    n = 3400 if mx.cuda.is_available() else 34  # that fills a GPU
    check(trimmed(pattern, cut, -cut), n, mx.bfloat16, offset)
