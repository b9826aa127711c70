"""The product of blocks of 8 on CUDA, run on the emulator."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from support import assert_equal, integers, pattern_of, spoiled, trimmed

from mlx_sparse_nn import spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_small, naive


@pytest.fixture(autouse=True)
def _any_density(monkeypatch):
    monkeypatch.setattr(tuned, "SMALL_DENSITY", {False: (0.0, 1.0), True: (0.0, 1.0)})
    monkeypatch.setattr(tuned, "SMALL_FILLED", 0.0)
    monkeypatch.setattr(tuned, "SMALL_LEAST_ROWS", 17)
    cuda_small._fills.cache_clear()
    yield
    cuda_small._fills.cache_clear()


def uneven(n_rows, n_cols, density=0.15):
    """A pattern with a full block-row and an empty one, that ends where no tile does."""
    mask = np.random.default_rng(8).random((n_rows, n_cols)) < density
    mask[1], mask[2] = True, False
    return pattern_of(map(np.flatnonzero, mask), n_cols, 8)


def check(pattern, n, dtype=mx.bfloat16, **settings):
    """Compare the product with the oracle's, with nans outside of the matrix."""
    shapes = [pattern.data_shape, (n, pattern.shape[1]), pattern.shape[:1]]
    data, x, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, data)
    with emulated(**settings) as emulation:
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
        assert_equal(spmm(data, pattern, x, bias), naive.spmm(data, pattern, x, bias))
    assert emulation.conflicts == 0
    assert emulation.names.count("spmm_small") == 2
    return emulation.names


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("n", "dtype"), [(17, mx.float16), (300, mx.bfloat16)])
def test_products(n, dtype, offset):
    check(uneven(42, 30), n, dtype, offset=offset)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("n", [150, 300])
def test_stages_follow_one_another(monkeypatch, n, seed):
    """More of them than the ring holds, and from one tile of rows into the next."""
    monkeypatch.setattr(tuned, "MULTIPROCESSORS", 1)
    check(uneven(10, 120, 0.3), n, seed=seed)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-3, 1)])
@pytest.mark.parametrize("n", [40, 300])
def test_what_lies_outside_is_masked(n, cut, offset):
    check(trimmed(uneven(30, 42, 0.4), cut, -cut), n, offset=offset)


def test_columns_in_parts():
    """Sums over parts of the columns are added up in order, with the bias in the first."""
    assert "sum_splits" in check(uneven(10, 150, 0.1), 20)


def test_several_matrices_of_one_pattern():
    pattern = uneven(10, 150)
    shapes = pattern.data_shape, (20, pattern.shape[1])
    data, x = (integers((2, *shape), i, mx.bfloat16) for i, shape in enumerate(shapes))
    with emulated() as emulation:
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))
    assert set(emulation.names) == {"spmm_small", "sum_splits"}


@pytest.mark.parametrize(
    ("product", "dtype", "architecture"),
    [
        (spmm, mx.float32, "sm_90"),
        (spmm, mx.bfloat16, "sm_80"),
        (spmm_t, mx.bfloat16, "sm_90"),
    ],
)
def test_other_products_keep_their_kernels(product, dtype, architecture):
    pattern = uneven(12, 12)
    data, x = integers(pattern.data_shape, 0, dtype), integers((40, 96), 1, dtype)
    with emulated(architecture) as emulation:
        assert_equal(product(data, pattern, x), getattr(naive, product.__name__)(data, pattern, x))
    assert emulation.names == ["spmm_tiles"]


def test_blocks_that_are_not_in_order_keep_theirs():
    """The kernel walks the columns once."""
    pattern = pattern_of([[3, 1], [2, 2]], 5, 8)
    data, x = integers(pattern.data_shape, 0, mx.bfloat16), integers((40, 40), 1, mx.bfloat16)
    with emulated() as emulation:
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    assert emulation.names == ["spmm_tiles"]


@pytest.mark.parametrize(
    ("n", "n_rows", "fills"),
    [(300, 4096, False), (1024, 4096, True), (1100, 4096, False), (4096, 11008, True)],
)
def test_many_rows_fill_a_gpu(monkeypatch, n, n_rows, fills):
    """Or else some of its multiprocessors would have a tile more than others, and these wait."""
    monkeypatch.setattr(tuned, "SMALL_FILLED", 0.85)
    assert cuda_small._fills(n, n_rows // 8) is fills


@pytest.mark.parametrize(
    "edit",
    [
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("wait_barrier(empty + ring.buffer, ring.parity ^ 1);", ""),
        ("row.next < row.end", "row.next + 1 < row.end"),
        ("const int k = lane % 4 * 2;", "const int k = lane % 4;"),
    ],
)
def test_faults_are_found(monkeypatch, edit):
    """A barrier less, a block that is left out, or a wrong place, does not pass."""
    monkeypatch.setattr(tuned, "MULTIPROCESSORS", 1)
    pattern = uneven(34, 140, 0.1)
    data, x = integers(pattern.data_shape, 0, mx.bfloat16), integers((70, 1120), 1, mx.bfloat16)
    expected = naive.spmm(data, pattern, x)
    with emulated(edit=edit):
        try:
            y = spmm(data, pattern, x)
        except CudaFault:
            y = None
    assert y is None or not mx.array_equal(y, expected)
