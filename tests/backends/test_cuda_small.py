"""Products of blocks of 8 and 12 on CUDA, run on the emulator."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from support import (
    assert_equal,
    check_products,
    integers,
    pattern_of,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import sddmm, spmm
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import naive

SIZES = sorted(tuned.SMALL_DENSITY)
CASES = [(8, mx.float32), (8, mx.bfloat16), (12, mx.float16)]


@pytest.fixture(autouse=True)
def _any_density(monkeypatch):
    monkeypatch.setattr(tuned, "SMALL_DENSITY", dict.fromkeys(SIZES, 1.0))


def uneven(block_size, n_rows, n_cols, density):
    """A pattern with a full block-row and an empty one, that ends where no tile does."""
    mask = np.random.default_rng(block_size).random((n_rows, n_cols)) < density
    mask[1], mask[2] = True, False
    return pattern_of(map(np.flatnonzero, mask), n_cols, block_size)


def check(pattern, n, dtype, **settings):
    """Compare the three products with the oracle's, with nans outside of the matrix."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation:
        check_products(pattern, spoiled(pattern, data), x, y, bias)
    assert emulation.conflicts == 0
    assert emulation.names.count("spmm_small") == 3
    assert dtype == mx.float32 or "sddmm_small" in emulation.names
    return emulation.names


@pytest.mark.parametrize(("n", "offset"), [(17, 0), (150, 1)])
@pytest.mark.parametrize(("block_size", "dtype"), CASES, ids=str)
def test_products(block_size, dtype, n, offset):
    check(uneven(block_size, 42, 30, 0.15), n, dtype, offset=offset)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("block_size", SIZES)
def test_stages_follow_one_another(monkeypatch, block_size, seed):
    """More of them than the ring holds, and from one tile of rows into the next."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)
    check(uneven(block_size, 10, 120, 0.3), 300, mx.bfloat16, seed=seed)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-3, 1)])
@pytest.mark.parametrize(("block_size", "dtype"), CASES, ids=str)
def test_what_lies_outside_is_masked(block_size, dtype, cut, offset):
    pattern = trimmed(uneven(block_size, 30, 42, 0.4), cut, -cut)
    check(pattern, 40, dtype, offset=offset)


@pytest.mark.parametrize("block_size", SIZES)
def test_columns_in_parts(block_size):
    """Sums over parts of the columns are added up in order, with the bias in the first."""
    assert "sum_splits" in check(uneven(block_size, 10, 150, 0.1), 20, mx.bfloat16)


@pytest.mark.parametrize("block_size", SIZES)
def test_several_matrices_of_one_pattern(block_size):
    pattern = uneven(block_size, 10, 30, 0.1)
    shapes = pattern.data_shape, (20, pattern.shape[1])
    data, x = (integers((2, *shape), i, mx.bfloat16) for i, shape in enumerate(shapes))
    with emulated() as emulation:
        mapped = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(mapped, naive.spmm(data, pattern, x))
    assert "spmm_small" in emulation.names


@pytest.mark.parametrize("block_size", SIZES)
def test_more_blocks_than_a_group_holds(block_size):
    """Weight gradients of a full matrix, of which stages are read again."""
    pattern = pattern_of([range(50)] * 10, 50, block_size)
    y, x = (integers((40, size), i, mx.float16) for i, size in enumerate(pattern.shape))
    with emulated() as emulation:
        assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))
    assert emulation.names == ["sddmm_small"]


@pytest.mark.parametrize("settings", [{"architecture": "sm_80"}, {"tf32": False}], ids=str)
def test_other_gpus_and_true_float32_keep_their_kernels(settings):
    pattern = random_pattern(8, 8, 8, density=0.5)
    data, x = integers(pattern.data_shape), integers((40, 64), 1)
    with emulated(**settings) as emulation:
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    assert "spmm_small" not in emulation.names


@pytest.mark.parametrize(
    "edit",
    [
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("wait_barrier(empty + ring.buffer, ring.parity ^ 1);", ""),
        ("row.next < row.end", "row.next + 1 < row.end"),
        ("lane % 4 * PAIR", "lane % 4"),
    ],
)
def test_faults_are_found(monkeypatch, edit):
    """A barrier less, a block that is left out, or a wrong place, does not pass."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)
    pattern = uneven(8, 34, 140, 0.1)
    data, x = integers(pattern.data_shape, 0, mx.bfloat16), integers((70, 1120), 1, mx.bfloat16)
    expected = naive.spmm(data, pattern, x)
    with emulated(edit=edit):
        try:
            y = spmm(data, pattern, x)
        except CudaFault:
            y = None
    assert y is None or not mx.array_equal(y, expected)
