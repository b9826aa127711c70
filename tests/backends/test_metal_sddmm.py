"""Weight gradients on Metal, on the emulator in three schedules: every block size, every edge."""

import mlx.core as mx
import numpy as np
import pytest
from support import (
    assert_close,
    assert_equal,
    integers,
    outside,
    pattern_of,
    random_pattern,
    trimmed,
)

from mlx_sparse_nn import sddmm
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.diagnostics.rounding import to_numpy

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SMALL = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 20, 24, 32)
BLOCK_SIZES = (*SMALL, 40, 48, 56, 64, 96, 128, 136)
# A short block-row, an empty one, repeats out of order, and more than any threadgroup takes.
UNEVEN = [[1, 0], [], [2, 1, 1], [0, 1, 2, 2, 0, 1] * 4, [], [2]]


@pytest.fixture(autouse=True)
def _on_metal(metal):
    yield
    assert metal.launches, "the test launched no kernel"


def operands(pattern, n, dtype=mx.float32, seed=1):
    return (integers((n, size), seed + i, dtype) for i, size in enumerate(pattern.shape))


def check(pattern, n, dtype=mx.float32):
    y, x = operands(pattern, n, dtype)
    assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(block_size, dtype):
    """Block-rows of every length, and rows of x on both sides of a stage's end."""
    rows = UNEVEN if block_size in SMALL else [[1, 0], [], [0, 1, 1, 0, 1]]
    pattern = pattern_of(rows, 3, block_size)
    for n in (1, 5, 31, 33):
        check(pattern, n, dtype)


@pytest.mark.parametrize("block_size", [8, 12, 64, 136])
def test_block_rows_of_one_length_need_no_search(metal, block_size):
    pattern = pattern_of([[1, 0, 2], [0, 2, 1], [1, 1, 0]], 3, block_size)
    check(pattern, 18)
    assert dict(metal.launches[-1].template)["EVEN"] == 1


def test_every_simdgroup_works_where_block_rows_are_short(metal):
    """Four blocks of 8 are one for each simdgroup, not all for the first."""
    check(pattern_of([[0, 1, 2, 3], [1]], 4, 8), 9)
    assert dict(metal.launches[-1].template)["STRIPS"] == 1


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_every_block_finds_its_row_among_many(block_size):
    """More than 1,024 block-rows for scalars, so that the search takes three rounds; many empty."""
    n_rows = 1100 if block_size == 1 else 70
    check(random_pattern(n_rows, 9, block_size, density=0.2), 2)
    check(random_pattern(n_rows, 9, block_size, density=0.05), 9)


@pytest.mark.parametrize("block_size", [3, 12, 24, 64])
def test_last_blocks_may_reach_past_the_matrix(block_size):
    pattern = trimmed(pattern_of([[1, 0], [2, 1]], 3, block_size), block_size // 2, 1)
    check(pattern, 9)
    y, x = operands(pattern, 9)
    assert not np.any(to_numpy(sddmm(pattern, y, x))[outside(pattern)])


@pytest.mark.parametrize("block_size", [1, 3, 12, 32])
def test_matrices_of_one_pattern_are_one_launch(metal, block_size):
    pattern = pattern_of([[1, 0], [1]], 2, block_size)
    y, x = (integers((3, 10, size), i) for i, size in enumerate(pattern.shape))
    out = mx.vmap(lambda y, x: sddmm(pattern, y, x))(y, x)
    mx.eval(out)
    assert metal.launches[-1].grid[2] == 3
    for v in range(3):
        assert_equal(out[v], naive.sddmm(pattern, y[v], x[v]))


@pytest.mark.parametrize("block_size", [1, 4, 9, 12, 16])
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_arrays_may_begin_anywhere_in_their_buffer(block_size, offset):
    """A slice arrives uncopied, at an address that no vector load may assume."""
    pattern = pattern_of([[1, 0], [1]], 2, block_size)
    for n in (3, 9):
        y, x = (
            integers((n * size + offset,), i, mx.float16)[offset:].reshape(n, size)
            for i, size in enumerate(pattern.shape)
        )
        assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))


@pytest.mark.parametrize("block_size", [1, 3, 12, 20, 40, 64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_column(block_size, value):
    """Neither a neighbouring block's columns nor rows past the last one get into a sum."""
    pattern = pattern_of([[0, 1], [2, 1]], 3, block_size)
    y, x = (to_numpy(array) for array in operands(pattern, 13))
    y[12, block_size:] = x[12, block_size] = value
    actual = to_numpy(sddmm(pattern, mx.array(y, mx.float32), mx.array(x, mx.float32)))
    y[12, block_size:] = x[12, block_size] = 0
    clean = to_numpy(naive.sddmm(pattern, mx.array(y, mx.float32), mx.array(x, mx.float32)))
    # Of blocks (0, 0), (0, 1), (1, 2), (1, 1): row 1 is spoiled, and the first column of column 1.
    actual, clean = (a.reshape(4, block_size, block_size) for a in (actual, clean))
    assert np.array_equal(actual[0], clean[0])
    assert np.array_equal(actual[1][:, 1:], clean[1][:, 1:])
    assert not np.any(np.isfinite(actual[1][:, 0]))


def test_a_heavy_row_is_shared_by_as_many_threads_as_it_has_values(metal):
    heavy = 100_000
    rows = [[3], np.arange(heavy), [], [heavy - 1]]
    pattern = pattern_of(rows, heavy, 1)
    metal.schedules = ("forward",)
    check(pattern, 2)
    (launch,) = metal.launches
    assert np.prod(launch.grid) >= heavy / tuned.METAL_SAMPLED_BLOCKS[1]


@pytest.mark.parametrize("block_size", [1, 12, 32])
def test_many_rows_are_split_and_summed_in_order(metal, block_size):
    pattern = pattern_of([[1], [0, 1]], 2, block_size)
    check(pattern, 1030)
    kernels = [launch.kernel for launch in metal.launches]
    assert kernels[-1].endswith("sum_splits")
    assert metal.launches[-2].grid[1] == 4
    rng = np.random.default_rng(0)
    y, x = (mx.array(rng.normal(size=(1030, size)), mx.float32) for size in pattern.shape)
    first = sddmm(pattern, y, x)
    assert_equal(first, sddmm(pattern, y, x))
    dense = to_numpy(y).astype(np.float64).T @ to_numpy(x).astype(np.float64)
    blocks = dense.reshape(2, block_size, 2, block_size).swapaxes(1, 2)
    expected = blocks[[0, 1, 1], [1, 0, 1]].reshape(pattern.data_shape)
    assert_close(first, expected, 1030, 4.0)


# Of 16 bits, 64 rows of x and long block-rows: bytes of x and y for each multiply-accumulate, and
# matrix loads for each 512 of them. Bytes fall as 1 / B, without a jump between block sizes.
MOVED = {
    1: (2.25, 0),
    2: (1.1, 0),
    4: (0.6, 0),
    7: (0.4, 0),
    8: (0.27, 1.25),
    12: (0.2, 1.25 * 0.75 * 16**2 / 12**2),
    16: (0.15, 0.75),
    24: (0.12, 0.67),
    32: (0.08, 0.5),
    40: (0.08, 0.4),
    48: (0.07, 0.5),
    56: (0.06, 0.45),
    64: (0.063, 0.5),
    96: (0.063, 0.5),
    128: (0.063, 0.5),
}


@pytest.mark.parametrize("block_size", MOVED)
def test_what_a_product_moves(metal, block_size):
    n_blocks = max(2, 256 // block_size if block_size > 7 else 96 // block_size)
    pattern = pattern_of([np.arange(n_blocks)] * 2, n_blocks, block_size)
    metal.count, metal.schedules = True, ("forward",)
    mx.eval(sddmm(pattern, *operands(pattern, 64, mx.float16)))
    (launch,) = metal.launches
    products, counts = pattern.nnz * 64, launch.counts
    moved, loads = MOVED[block_size]
    assert counts.read["x"] + counts.read["y"] <= moved * products
    assert counts.threadgroup_read <= loads * products * 128 / 512 * 1.01
    assert counts.threadgroup_memory <= 16 * 1024
