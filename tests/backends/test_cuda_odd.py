"""CUDA's products of blocks whose side is no multiple of 8, on the emulator."""

import mlx.core as mx
import pytest
from cuda_emulator import emulated
from support import (
    assert_equal,
    check_products,
    integers,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import spmm
from mlx_sparse_nn.core.backends import naive


def check(pattern, n, dtype=mx.bfloat16, **settings):
    """Compare the three products with the oracle's, and return the names of the kernels."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation:
        check_products(pattern, spoiled(pattern, data), x, y, bias)
    assert emulation.conflicts == 0
    return set(emulation.names)


@pytest.mark.parametrize(
    ("n", "cut", "offset", "dtype"),
    [(20, 0, 0, mx.bfloat16), (150, 5, 1, mx.float16), (50, -5, 0, mx.bfloat16)],
)
@pytest.mark.parametrize("block_size", [9, 12, 20, 33, 50, 100, 127])
def test_blocks_are_filled_up(block_size, n, cut, offset, dtype):
    """They are multiplied as those of the next multiple of 8, whatever lies outside the matrix."""
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    names = check(pattern, n, dtype, offset=offset)
    assert "resize_blocks" in names
    assert len(names) > 1


def test_float32_is_not_rounded_to_tf32():
    pattern = random_pattern(3, 4, 12, density=0.7)
    assert check(pattern, 70, mx.float32, tf32=True) == {"spmm_float", "sddmm_float"}


@pytest.mark.parametrize("n_matrices", [1, 2])
def test_gradients_and_several_matrices(n_matrices):
    pattern = random_pattern(3, 4, 12, density=0.7)
    shapes = [pattern.data_shape, (20, 48), (20, 36)]
    data, x, y = (integers((n_matrices, *shape), i, mx.bfloat16) for i, shape in enumerate(shapes))
    with emulated():
        product = mx.vmap(lambda data, x: spmm(data, pattern, x))
        (out,), gradients = mx.vjp(product, [data, x], [y])
    assert_equal(out, naive.spmm(data, pattern, x))
    assert_equal(gradients[0], naive.sddmm(pattern, y, x))
    assert_equal(gradients[1], naive.spmm_t(data, pattern, y))
