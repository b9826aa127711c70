"""The oracle, and what it is for: it notices a fault in what all backends read."""

import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    check_products,
    computing,
    dense_of,
    integers,
    pattern_of,
    patterns,
    to_numpy,
)

from mlx_sparse_nn import CSRPattern, qspmm, qspmm_t
from mlx_sparse_nn.core import layout
from mlx_sparse_nn.core.backends import cpu, naive, plain

DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.complex64)


@given(patterns(), st.integers(0, 5), st.sampled_from(DTYPES), st.sampled_from([(), (3,)]))
def test_the_oracle_is_a_loop_over_blocks(pattern, n, dtype, v):
    """Against NumPy, a matrix at a time: with empty rows, repeated blocks and an axis V."""
    shapes = [pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0])]
    data, x, y = (integers((*v, *shape), i, dtype) for i, shape in enumerate(shapes))
    results = naive.spmm(data, pattern, x), naive.spmm_t(data, pattern, y)
    sampled = naive.sddmm(pattern, y, x)
    for i in range(*v) if v else [...]:
        a, xs, ys = to_numpy(dense_of(pattern, data[i])), to_numpy(x[i]), to_numpy(y[i])
        assert np.array_equal(to_numpy(results[0][i]), xs @ a.T)
        assert np.array_equal(to_numpy(results[1][i]), ys @ a)
        ones = np.array(pattern.tomask())
        outer, blocks = (ys.T @ xs) * ones, to_numpy(naive.dense(sampled[i], pattern))
        times = to_numpy(naive.dense(mx.ones(pattern.data_shape), pattern))
        assert np.array_equal(blocks, outer * times)


def test_the_oracle_reads_nothing_that_a_backend_reads():
    """Of a pattern, its index arrays and sizes alone."""

    class Bare:
        indptr, indices = np.array([0, 2, 3], np.int32), np.array([1, 0, 1], np.int32)
        shape, block_size, data_shape = (4, 4), 2, (3, 2, 2)

    data, x = integers((3, 2, 2), 1), integers((5, 4), 2)
    whole = CSRPattern(Bare.indptr, Bare.indices, Bare.shape, Bare.block_size)
    check = lambda pattern: [
        naive.spmm(data, pattern, x),
        naive.spmm_t(data, pattern, x),
        naive.sddmm(pattern, x, x),
    ]
    for a, b in zip(check(Bare), check(whole), strict=True):
        assert mx.array_equal(a, b)


# Faults in what every backend reads. Each one is noticed on each backend.


def reversed_perm(monkeypatch):
    transpose = layout.HostIndex.transpose.func

    def wrong(self):
        indptr, indices, perm = transpose(self)
        return indptr, indices, perm[::-1].copy()

    monkeypatch.setattr(layout.HostIndex, "transpose", property(wrong))


def columns_of_the_next_block(monkeypatch):
    side = layout._side
    monkeypatch.setattr(
        layout,
        "_side",
        lambda indptr, indices, *rest: side(indptr, np.roll(indices, 1), *rest),
    )


def a_row_too_early(monkeypatch):
    side = layout._side

    def wrong(indptr, *rest):
        indptr = indptr.copy()
        indptr[2] -= 1
        return side(indptr, *rest)

    monkeypatch.setattr(layout, "_side", wrong)


def products(n, block_size, dtype=mx.float32):
    pattern = pattern_of([[0, 1, 3], [1, 2], [0, 2, 3, 4], [4, 0]], 5, block_size)
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    check_products(pattern, data, x, y, bias)


def quantized_products(n):
    pattern = pattern_of([[0, 1, 3], [1, 2], [0, 2, 3, 4], [4, 0]], 5, 32)
    packed = np.random.default_rng(0).integers(0, 2**32, (11, 32, 4), dtype=np.uint32)
    matrix = mx.array(packed), integers((11, 32, 1), 1), integers((11, 32, 1), 2)
    x, y = (integers((n, size), 3) for size in pattern.shape[::-1])
    assert_equal(qspmm(*matrix, pattern, x), naive.qspmm(*matrix, pattern, x))
    assert_equal(qspmm_t(*matrix, pattern, y), naive.qspmm_t(*matrix, pattern, y))


@pytest.mark.parametrize("n", [1, 5, 12, 40])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("fault", [reversed_perm, columns_of_the_next_block, a_row_too_early])
class TestFaultsAreNoticed:
    def test_on_plain_mlx(self, monkeypatch, fault, block_size, n):
        with computing(plain):
            products(n, block_size)
            fault(monkeypatch)
            with pytest.raises(AssertionError):
                products(n, block_size)

    def test_on_what_computes_here(self, monkeypatch, fault, block_size, n):
        products(n, block_size)
        fault(monkeypatch)
        on_cpu = mx.default_device().type == mx.cpu and cpu.is_available()
        if on_cpu and fault is reversed_perm and block_size * n == 1:
            products(n, block_size)  # it walks the rows there, and reads no transpose
            return
        with pytest.raises(AssertionError):
            products(n, block_size)

    def test_on_metal(self, metal, monkeypatch, fault, block_size, n):
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            products(n, block_size)
        assert metal.launches

    @pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")
    @pytest.mark.needs("ziglang")
    def test_on_cuda(self, monkeypatch, fault, block_size, n):
        from cuda_emulator import emulated

        fault(monkeypatch)
        with emulated() as emulation, pytest.raises(AssertionError):
            products(n, block_size, mx.bfloat16)
        assert emulation.names


@pytest.mark.parametrize("n", [1, 12])
@pytest.mark.parametrize("fault", [reversed_perm, columns_of_the_next_block, a_row_too_early])
class TestFaultsAreNoticedByQuantizedBlocks:
    def test_on_the_chosen_backend(self, monkeypatch, fault, n):
        quantized_products(n)
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            quantized_products(n)

    def test_on_metal(self, metal, monkeypatch, fault, n):
        fault(monkeypatch)
        with pytest.raises(AssertionError):
            quantized_products(n)
        assert metal.launches


@given(
    patterns(whole=True), st.integers(0, 40), st.sampled_from(DTYPES), st.sampled_from([(), (3,)])
)
def test_plain_mlx_is_the_oracle(pattern, n, dtype, v):
    """Every algorithm, of whichever number of rows, and matrices that share a pattern."""
    if dtype == mx.complex64 and pattern.block_size > 1:
        return
    shapes = [pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0])]
    data, x, y = (integers((*v, *shape), i, dtype) for i, shape in enumerate(shapes))
    bias, layout = integers(pattern.shape[:1], 4, dtype), pattern.layout
    assert_equal(plain.spmm(data, layout, x, bias), naive.spmm(data, pattern, x, bias))
    assert_equal(plain.spmm(data, layout, x), naive.spmm(data, pattern, x))
    assert_equal(plain.spmm_t(data, layout, y), naive.spmm_t(data, pattern, y))
    assert_equal(plain.sddmm(layout, y, x), naive.sddmm(pattern, y, x))
