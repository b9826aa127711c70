"""Products of up to 8 rows of x on Metal: every block size from 4 on, each value read once."""

import mlx.core as mx
import numpy as np
import pytest
from support import (
    assert_close,
    assert_equal,
    dense_of,
    integers,
    pattern_of,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import spmm, spmm_t
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.diagnostics.rounding import to_numpy

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BLOCK_SIZES = (4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 136)
# Empty rows, one in the middle and one at the end; columns that repeat, and do not ascend; a row of
# several steps of each simdgroup.
ROWS = [[1, 0], [], [2, 1, 1], [2, 0, 1, 2, 0, 0, 1], []]
# Rows of x by block size: all of them, where they are quick.
SOME = {block: (1, 2, 3, 4, 5, 6, 7, 8) for block in (5, 8, 16)} | {48: (1, 2, 8), 136: (1, 7)}


@pytest.fixture(autouse=True)
def _by_few_rows(metal):
    """Every launch is one of this kernel."""
    yield
    assert {launch.kernel for launch in metal.launches} == {"mlx_sparse_nn_spmm_few"}


def operands(pattern, n, dtype):
    """Return stored values with nans outside the matrix, and x, y and a bias of whole numbers."""
    data = spoiled(pattern, integers(pattern.data_shape, 1, dtype))
    x, y = (integers((n, size), i, dtype) for i, size in enumerate(reversed(pattern.shape), 2))
    return data, x, y, integers((pattern.shape[0],), 4, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_both_products_are_exact(block_size, dtype):
    pattern = pattern_of(ROWS, 3, block_size)
    for n in SOME.get(block_size, (1, 5)):
        data, x, y, bias = operands(pattern, n, dtype)
        assert_equal(spmm(data, pattern, x, bias), naive.spmm(data, pattern, x, bias))
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("block_size", [*BLOCK_SIZES, 6, 7, 9, 33])
def test_nothing_outside_the_matrix_counts(block_size, n):
    """The last blocks reach past it, and hold nans there."""
    below, behind = (1, block_size - 1) if n == 1 else (block_size - 1, 2)
    pattern = trimmed(pattern_of(ROWS, 3, block_size), below, behind)
    data, x, y, _ = operands(pattern, n, mx.float32)
    assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("block_size", [4, 5, 16, 31, 48])
def test_an_infinite_value_stays_one(block_size, n):
    """What a lane reads a second time is no product of infinity and zero."""
    pattern = pattern_of([[0, 1, 1], [1]], 2, block_size)
    data = mx.ones(pattern.data_shape)
    data[2, -1, -1] = data[3, 0, -2] = np.inf
    x, y = mx.ones((n, pattern.shape[1])), mx.ones((n, pattern.shape[0]))
    assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    x[:, -1] = np.inf
    assert_equal(spmm(mx.ones(pattern.data_shape), pattern, x), mx.full((n, y.shape[1]), np.inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [5, 8, 24])
def test_matrices_that_share_a_pattern(block_size, dtype):
    pattern = pattern_of(ROWS, 3, block_size)
    for n in (1, 3):
        data = integers((3, *pattern.data_shape), 1, dtype)
        x, y = (integers((3, n, size), i, dtype) for i, size in enumerate(reversed(pattern.shape)))
        forward = mx.vmap(lambda d, z: spmm(d, pattern, z))(data, x)
        backward = mx.vmap(lambda d, z: spmm_t(d, pattern, z))(data, y)
        for v in range(3):
            assert_equal(forward[v], naive.spmm(data[v], pattern, x[v]))
            assert_equal(backward[v], naive.spmm_t(data[v], pattern, y[v]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [4, 9, 16])
def test_operands_that_begin_at_any_element(block_size, dtype):
    """A slice arrives uncopied, at an address that no vector load may assume."""
    pattern = pattern_of(ROWS, 3, block_size)
    size = int(np.prod(pattern.data_shape))
    for n, offset in ((1, 1), (6, 3)):
        data = integers((size + offset,), 1, dtype)[offset:].reshape(pattern.data_shape)
        x, y = (
            integers((n * length + offset,), i, dtype)[offset:].reshape(n, length)
            for i, length in enumerate(reversed(pattern.shape))
        )
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [5, 16, 64])
def test_random_numbers_are_within_rounding(block_size, dtype):
    pattern = random_pattern(4, 5, block_size, density=0.6)
    data = mx.random.normal(pattern.data_shape).astype(dtype)
    dense = to_numpy(dense_of(pattern, data)).astype(np.float64)
    for n in (1, 5):
        x = mx.random.normal((n, pattern.shape[1])).astype(dtype)
        exact = to_numpy(x).astype(np.float64)
        magnitude = np.abs(exact) @ np.abs(dense.T)
        assert_close(spmm(data, pattern, x), exact @ dense.T, pattern.shape[1], magnitude)


def long_rows(block_size, lengths):
    """Return a pattern of such block-rows, and its transpose, whose columns are as long."""
    n_cols = max(lengths)
    pattern = pattern_of([range(n_cols - length, n_cols) for length in lengths], n_cols, block_size)
    columns = [np.flatnonzero(n_cols - np.array(lengths) <= c) for c in range(n_cols)]
    return pattern, pattern_of(columns, len(lengths), block_size)


@pytest.mark.parametrize(
    ("block_size", "lengths"),
    [
        (4, [2, 600, 0, 513, 1, 0]),  # a piece ends one long block-row, and begins another
        (16, [130, 150, 128]),  # all are long: there are too few to fill a GPU
        (17, [1] * 200 + [300]),  # one of 100 times the mean
        (128, [16, 0, 1]),
    ],
)
def test_long_block_rows_are_cut_into_pieces(metal, block_size, lengths):
    for pattern in long_rows(block_size, lengths):
        pattern = trimmed(pattern, 1, 2)
        data, x, y, bias = operands(pattern, 1 if block_size == 17 else 3, mx.float32)
        actual = spmm(data, pattern, x, bias), spmm_t(data, pattern, y)
        expected = naive.spmm(data, pattern, x, bias), naive.spmm_t(data, pattern, y)
        assert_equal(actual[0], expected[0])
        assert_equal(actual[1], expected[1])
    cut = [dict(launch.template)["OF_PIECES"] for launch in metal.launches]
    assert sum(cut) >= 2  # for each of the sides that are long


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_matrices_that_share_a_pattern(dtype):
    pattern, _ = long_rows(16, [3, 150, 1, 140])
    for n in (1, 8):
        data, x = integers((2, *pattern.data_shape), 1), integers((2, n, pattern.shape[1]), 2)
        data, x = (mx.clip(a, -1, 1).astype(dtype) for a in (data, x))
        y = mx.vmap(lambda d, z: spmm(d, pattern, z))(data, x)
        for v in range(2):
            assert_equal(y[v], naive.spmm(data[v], pattern, x[v]))


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("block_size", [4, 5, 6, 9, 12, 16, 20, 33, 48, 64, 136])
def test_each_stored_value_is_read_once(metal, block_size, n):
    """However many rows x has; and x once for every strip of outputs, indices once a block."""
    metal.count, metal.schedules = True, ("forward",)
    blocks = max(3, 160 // block_size)
    pattern = random_pattern(blocks, blocks, block_size, density=0.5)
    strips, vectors = -(-block_size // 32), -(-block_size // 4)
    for dtype in (mx.float32, mx.bfloat16):
        data, x, y, _ = operands(pattern, n, dtype)
        mx.eval(spmm(data, pattern, x), spmm_t(data, pattern, y))
        for launch in metal.launches[-2:]:
            read = launch.counts.read
            assert read["data"] <= 1.2 * data.nbytes
            assert read["x"] <= 1.15 * pattern.n_blocks * 4 * vectors * n * strips * dtype.size
            assert read["indices"] + read["perm"] <= 0.15 * data.nbytes + 12 * pattern.n_blocks
