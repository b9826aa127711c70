"""CUDA's products of blocks whose side is no multiple of 8, on the emulator."""

import mlx.core as mx
import pytest
from cuda_emulator import CudaFault, emulated
from support import (
    assert_equal,
    check_products,
    integers,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import spmm
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_odd, naive


def check(pattern, n, dtype=mx.bfloat16, **settings):
    """Compare the three products with the oracle's, and return the names of the kernels."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation:
        check_products(pattern, spoiled(pattern, data), x, y, bias)
    assert emulation.conflicts == 0
    return set(emulation.names)


@pytest.fixture
def padded(monkeypatch):
    """Let few rows of x be enough to fill blocks up on the device."""
    monkeypatch.setattr(tuned, "PADDED_ROWS", 17)


@pytest.mark.parametrize(
    ("n", "cut", "offset", "dtype"),
    [(20, 0, 0, mx.bfloat16), (150, 5, 1, mx.float16), (50, -5, 0, mx.bfloat16)],
)
@pytest.mark.parametrize("block_size", [9, 12, 20, 33, 50, 100, 127])
def test_some_rows(block_size, n, cut, offset, dtype):
    """Blocks are filled up in shared memory, whatever lies outside of the matrix."""
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    names = check(pattern, n, dtype, offset=offset)
    assert names - {"sddmm_tiles", "sddmm_wgmma"} == {"spmm_odd", "resize_blocks"}


@pytest.mark.parametrize(("cut", "offset"), [(0, 0), (5, 1)])
@pytest.mark.parametrize(
    ("block_size", "dtype"), [(12, mx.bfloat16), (33, mx.bfloat16), (100, mx.float16)]
)
def test_many_rows(padded, block_size, dtype, cut, offset):
    """Blocks are filled up on the device, and multiplied as those of the next multiple of 8."""
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    names = check(pattern, 70, dtype, offset=offset)
    assert names == {"resize_blocks", "spmm_tiles", "sddmm_tiles"}


def test_float32_is_not_rounded_to_tf32(padded):
    pattern = random_pattern(3, 4, 12, density=0.7)
    assert check(pattern, 70, mx.float32, tf32=True) == {"spmm_float", "sddmm_float"}


@pytest.mark.parametrize("n_matrices", [1, 2])
@pytest.mark.parametrize("rows", [17, 512])
def test_gradients_and_several_matrices(monkeypatch, rows, n_matrices):
    monkeypatch.setattr(tuned, "PADDED_ROWS", rows)
    pattern = random_pattern(3, 4, 12, density=0.7)
    shapes = [pattern.data_shape, (20, 48), (20, 36)]
    data, x, y = (integers((n_matrices, *shape), i, mx.bfloat16) for i, shape in enumerate(shapes))
    with emulated():
        product = mx.vmap(lambda data, x: spmm(data, pattern, x))
        (out,), gradients = mx.vjp(product, [data, x], [y])
    assert_equal(out, naive.spmm(data, pattern, x))
    assert_equal(gradients[0], naive.sddmm(pattern, y, x))
    assert_equal(gradients[1], naive.spmm_t(data, pattern, y))


@pytest.mark.parametrize("n", [17, 50, 600])
@pytest.mark.parametrize("block_size", range(9, 128))
def test_every_tile_fits_a_multiprocessor(block_size, n):
    for transposed in (False, True):
        inside = block_size, block_size
        kernel = cuda_odd.product(n, 1, block_size, inside, 9, transposed)
        assert kernel.threads <= 512
        assert kernel.shared_memory <= 99 * 1024


@pytest.mark.parametrize("edit", ["wait_copies<STAGES - 2>();", "__syncthreads();"])
def test_faults_are_found(edit):
    pattern = random_pattern(2, 12, 12, density=1.0)
    data, x = integers(pattern.data_shape, 0, mx.bfloat16), integers((60, 144), 1, mx.bfloat16)
    with emulated(edit=(edit, "")) as emulation:
        try:
            y = spmm(data, pattern, x)
        except CudaFault:
            y = None
    assert emulation.names == ["spmm_odd"]
    assert y is None or not mx.array_equal(y, naive.spmm(data, pattern, x))
