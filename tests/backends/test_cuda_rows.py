"""Products of 16-bit blocks with some rows of x on Hopper, where thread blocks work in clusters."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from support import assert_equal, integers, pattern_of, random_pattern, spoiled, trimmed

from mlx_sparse_nn import CSRPattern, spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import naive

KERNEL = "spmm_shares"


def check(pattern, n, dtype=mx.bfloat16, **settings):
    """Compare both products with the oracle's, and return the emulation."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, data)
    with emulated(**settings) as emulation:
        assert_equal(spmm(data, pattern, x, bias), naive.spmm(data, pattern, x, bias))
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    assert emulation.conflicts == 0
    assert set(emulation.names) == {KERNEL}
    return emulation


@pytest.mark.parametrize("n", [17, 70, 150])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_products(block_size, dtype, n):
    """The last tile is not full; block-rows have fewer blocks than a cluster has thread blocks."""
    check(random_pattern(3, 5, block_size, density=0.7), n, dtype)


@pytest.mark.parametrize("filling", [1, 4, 8, 16])
@pytest.mark.parametrize("block_size", [16, 128])
def test_clusters_of_every_size(monkeypatch, block_size, filling):
    """Each share of a block-row may end in the middle of a stage, or hold nothing."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", filling)
    lengths = [0, 1, 9, 3]
    check(pattern_of([range(length) for length in lengths], 9, block_size), 40)
