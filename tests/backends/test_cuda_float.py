"""CUDA's products in true float32, and those of blocks that are filled up: on the emulator."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from support import (
    assert_close,
    assert_equal,
    check_products,
    dense_of,
    integers,
    pattern_of,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import sddmm, spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_float, naive


def check(pattern, n, dtype=mx.float32, **settings):
    """Compare the three products with the oracle's, and return the names of the kernels."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation:
        check_products(pattern, spoiled(pattern, data), x, y, bias)
    return emulation.names


@pytest.mark.parametrize("block_size", [8, 9, 12, 16, 20, 24, 32, 33, 50, 64, 96, 100, 127, 128])
@pytest.mark.parametrize("filled", [False, True])
def test_true_float32_of_every_block_size(monkeypatch, block_size, filled):
    """Rows of x fill no tile, block-rows are uneven or empty."""
    if filled:
        monkeypatch.setattr(tuned, "FLOAT_THREADS", 0)
    n = 300 if filled and block_size <= 32 else 150
    names = check(random_pattern(3, 4, block_size, density=0.7), n, tf32=False)
    assert set(names) == {"spmm_float", "sddmm_float"}


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 0), (5, 1)])
@pytest.mark.parametrize("block_size", [8, 20, 33, 64])
def test_true_float32_of_matrices_that_end_within_a_block(block_size, cut, offset):
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    names = check(pattern, 20, tf32=False, offset=offset)
    assert set(names) == {"spmm_float", "sddmm_float"}


@pytest.mark.parametrize("block_size", [12, 32])
def test_true_float32_is_as_exact_as_float32(block_size):
    """TF32 would be wrong by a thousandth."""
    pattern, n = random_pattern(3, 4, block_size, density=0.9), 70
    shapes = [pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0])]
    rng = np.random.default_rng(0)
    data, x, y = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
    with emulated(tf32=False):
        actual = spmm(data, pattern, x), spmm_t(data, pattern, y), sddmm(pattern, y, x)
    a, x, y = (np.array(m).astype(np.float64) for m in (dense_of(pattern, data), x, y))
    length = 4 * block_size
    assert_close(actual[0], x @ a.T, length, np.abs(x) @ np.abs(a).T)
    assert_close(actual[1], y @ a, length, np.abs(y) @ np.abs(a))
    blocks = [
        m.reshape(*pattern.grid[:1], block_size, pattern.grid[1], block_size).swapaxes(1, 2)
        for m in (y.T @ x, np.abs(y).T @ np.abs(x))
    ]
    stored = pattern.row_indices, pattern.indices
    assert_close(actual[2], blocks[0][stored], n, blocks[1][stored])


def test_gradients_of_many_rows_are_summed_in_parts():
    assert "sum_splits" in check(random_pattern(2, 3, 16, density=0.9), 530, tf32=False)


@pytest.mark.parametrize(("block_size", "dtype"), [(16, mx.float32), (12, mx.bfloat16)])
def test_several_matrices_of_one_pattern(block_size, dtype):
    pattern = random_pattern(3, 4, block_size, density=0.7)
    shapes = [pattern.data_shape, (40, pattern.shape[1]), (40, pattern.shape[0])]
    data, x, y = (integers((2, *shape), i, dtype) for i, shape in enumerate(shapes))
    with emulated(tf32=False):
        products = (
            mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x),
            mx.vmap(lambda data, y: spmm_t(data, pattern, y))(data, y),
            mx.vmap(lambda y, x: sddmm(pattern, y, x))(y, x),
        )
    assert_equal(products[0], naive.spmm(data, pattern, x))
    assert_equal(products[1], naive.spmm_t(data, pattern, y))
    assert_equal(products[2], naive.sddmm(pattern, y, x))


def test_gradients_of_a_long_block_row_go_by_scalars(monkeypatch):
    monkeypatch.setattr(tuned, "MAX_EMPTY_GROUPS", 100)
    rows = [[0], range(60), [], *[[1]] * 60]
    assert check(pattern_of(rows, 60, 8), 17, tf32=False)[-1] == "sddmm_csr"


@pytest.mark.parametrize("n", [17, 70, 600, 5000])
@pytest.mark.parametrize("block_size", range(8, 129))
def test_every_tile_fits_a_multiprocessor(block_size, n):
    """Of any architecture that runs the kernels: 99 KB of shared memory, 1024 threads."""
    pattern = random_pattern(9, 9, block_size, density=0.9)
    kernels = [
        cuda_float.product(n, 1, block_size, (block_size, block_size), 9, transposed)
        for transposed in (False, True)
    ]
    kernels.append(cuda_float.gradients(pattern.layout, n, 1)[0])
    for kernel in kernels:
        assert kernel.threads <= 512
        assert kernel.shared_memory <= 99 * 1024


@pytest.mark.parametrize(
    "edit",
    [("wait_copies<STAGES - 2>();", ""), ("__syncthreads();", "")],
    ids=["copies", "threads"],
)
@pytest.mark.parametrize("kernel", ["spmm_float", "sddmm_float"])
def test_faults_are_found(kernel, edit):
    pattern = random_pattern(2, 8, 16, density=1.0)
    data, x, y = integers(pattern.data_shape, 0), integers((200, 128), 1), integers((200, 32), 2)
    with emulated(tf32=False, edit=edit) as emulation:
        try:
            out = spmm(data, pattern, x) if kernel == "spmm_float" else sddmm(pattern, y, x)
        except CudaFault:
            out = None
    assert emulation.names[0] == kernel
    right = naive.spmm(data, pattern, x) if kernel == "spmm_float" else naive.sddmm(pattern, y, x)
    assert out is None or not mx.array_equal(out, right)
