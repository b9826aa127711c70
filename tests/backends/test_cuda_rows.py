"""Products of 16-bit blocks with some rows of x on Hopper, where thread blocks work in clusters."""

import mlx.core as mx
import pytest
from cuda_emulator import CudaFault, emulated
from support import assert_equal, integers, pattern_of, random_pattern, spoiled, trimmed

from mlx_sparse_nn import spmm, spmm_t
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


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 1)])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_what_lies_outside_is_masked(block_size, cut, offset):
    """Whatever the weight holds there; inputs may begin anywhere."""
    pattern = trimmed(random_pattern(3, 5, block_size, density=0.9), cut, -cut)
    check(pattern, 40, offset=offset)


@pytest.mark.parametrize("block_size", [16, 64])
def test_blocks_in_any_order(block_size):
    """A block-column may come twice."""
    check(pattern_of([[4, 1, 3], [2, 2], [], [0, 5, 1, 5, 2]], 6, block_size), 20)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("block_size", [32, 64])
def test_long_block_rows(monkeypatch, block_size, seed):
    """There are more stages than a ring has."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 2)
    pattern = random_pattern(2, 1600 // block_size, block_size, density=0.9)
    check(pattern, 20, seed=seed)


@pytest.mark.parametrize("n", [20, 140])
def test_several_matrices_of_one_pattern(n):
    pattern = random_pattern(3, 4, 32, density=0.7)
    data, x = (
        integers((2, *shape), i, mx.bfloat16)
        for i, shape in enumerate([pattern.data_shape, (n, pattern.shape[1])])
    )
    with emulated() as emulation:
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))
    assert emulation.names == [KERNEL]


@pytest.mark.parametrize("n", [1, 16])
def test_gradients_of_few_rows(n):
    """Kernels of few rows do not multiply by a transpose: it had the time of 64 rows."""
    pattern = random_pattern(3, 4, 64, density=0.7)
    data, y = integers(pattern.data_shape, 1, mx.bfloat16), integers((n, 192), 2, mx.bfloat16)
    with emulated() as emulation:
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    assert emulation.names == [KERNEL]


FAULTS = [
    ("wait_barrier(full + ring.buffer, ring.parity);", ""),
    ("wait_products<1>();", ""),
    ("copier.end();", "copier.ring.advance();"),
    ("describe(x_tile + tn * 64 * DEPTH + k, 16)", "describe(x_tile + tn * 64 * DEPTH, 16)"),
    ("sync_cluster();\nstore_sums", "store_sums"),
]


@pytest.mark.parametrize("edit", FAULTS, ids=str)
def test_faults_are_found(monkeypatch, edit):
    """A barrier less, or a wrong place, does not pass."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 4)
    pattern = random_pattern(2, 60, 32, density=1.0)
    data = integers(pattern.data_shape, 0, mx.bfloat16)
    x = integers((20, pattern.shape[1]), 1, mx.bfloat16)
    expected = naive.spmm(data, pattern, x)
    with emulated(edit=edit) as emulation:
        try:
            y = spmm(data, pattern, x)
        except CudaFault:
            y = None
    assert emulation.names == [KERNEL]
    assert y is None or not mx.array_equal(y, expected)
