"""The products on CUDA through the dense matrix: what the kernels write and take, on the emulator,
and which products go that way."""

import mlx.core as mx
import pytest
from cuda_emulator import emulated
from support import assert_equal, check_products, computing, integers, random_pattern, spoiled, trimmed

from mlx_sparse_nn import spmm
from mlx_sparse_nn.core.backends import cuda, cuda_dense, naive, plain


def check(pattern, n, dtype, **settings):
    """Compare the three products with the oracle's, with nans outside of the matrix."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation, computing(cuda_dense, cuda, plain):
        check_products(pattern, spoiled(pattern, data), x, y, bias)
    assert set(emulation.names) == {"expand", "sample"}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8, 12, 16, 24, 40])
def test_products(block_size, dtype, offset):
    pattern = random_pattern(4, 5, block_size, density=0.7)
    check(pattern, 17, dtype, offset=offset)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 1), (4, 0)])
@pytest.mark.parametrize("block_size", [3, 4, 8, 12, 40])
def test_a_matrix_may_end_within_its_blocks(block_size, cut, offset):
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.9), cut, -cut)
    check(pattern, 20, mx.bfloat16, offset=offset)
