"""The CUDA kernels of float32 blocks by TF32, and of the sizes between the powers of two, on the
emulator: equal to the oracle, in any order of warps and copies."""

import mlx.core as mx
import pytest
from cuda_emulator import emulated
from support import assert_equal, check_products, integers, random_pattern, spoiled, trimmed

from mlx_sparse_nn import sddmm, spmm, spmm_t
from mlx_sparse_nn.core import edges, tuned
from mlx_sparse_nn.core.backends import cuda_fragments, naive


def check(pattern, n, dtype, least=(), **settings):
    """Compare the three products with the oracle's, and return the names of the kernels."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, data)
    with emulated(**settings) as emulation:
        check_products(pattern, data, x, y, bias)
    assert emulation.conflicts == 0
    assert set(least) <= set(emulation.names)
    return emulation.names


@pytest.mark.parametrize(("n", "cut", "offset"), [(70, 0, 1), (300, 5, 0)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("block_size", [24, 48, 64, 96, 120])
def test_fragments(monkeypatch, block_size, dtype, n, cut, offset):
    """A stage begins and ends in the middle of a block, and outputs do not fill a warpgroup."""
    monkeypatch.setattr(tuned, "FRAGMENT_ROWS", {(dtype.size, block_size): 17})
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    check(pattern, n, dtype, ["spmm_fragments"], offset=offset)


@pytest.mark.parametrize(("n", "cut", "offset", "in_parts"), [(300, 0, 1, True), (290, 5, 0, False)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_gradients_by_panels(monkeypatch, block_size, n, cut, offset, in_parts):
    """Of float32: stages, chunks and fragments are those of 4 bytes."""
    monkeypatch.setattr(tuned, "GRADIENT_PANEL_ROWS", 64)
    if not in_parts:
        monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)
    pattern = trimmed(random_pattern(600 // block_size, 400 // block_size, block_size, 0.3), cut, 0)
    names = check(pattern, n, mx.float32, ["sddmm_panels"], offset=offset)
    assert ("sum_splits" in names) is in_parts


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [24, 48, 96])
def test_a_matrix_that_ends_within_blocks_needs_no_copy_of_x(
    monkeypatch, block_size, dtype, offset
):
    """At a multiple of 16 bytes, as sizes are that the block size does not divide."""
    pattern = trimmed(random_pattern(3, 3, block_size, density=0.9), 8, -16)
    shapes = [(130, pattern.shape[1]), (130, pattern.shape[0]), pattern.shape[:1]]
    x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, integers(pattern.data_shape, 3, dtype))
    expected = naive.spmm(data, pattern, x, bias), naive.spmm_t(data, pattern, y)
    expected = *expected, naive.sddmm(pattern, y, x)
    monkeypatch.delattr(edges, "pad")
    with emulated(offset=offset) as emulation:
        products = spmm(data, pattern, x, bias), spmm_t(data, pattern, y), sddmm(pattern, y, x)
        for actual, value in zip(products, expected, strict=True):
            assert_equal(actual, value)
    assert emulation.names == ["spmm_fragments"] * 2 + ["sddmm_fragments"]


@pytest.mark.parametrize(("n", "cut", "offset", "parts"), [(150, 0, 1, 1), (290, 5, 0, 2)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [24, 48, 64, 96, 128])
def test_gradients_by_fragments(monkeypatch, block_size, dtype, n, cut, offset, parts):
    """Columns of a warpgroup begin and end in the middle of a block, and rows do not fill one."""
    monkeypatch.setattr(cuda_fragments, "_splits", lambda *_: parts)
    monkeypatch.setattr(tuned, "GRADIENT_FRAGMENT_ROWS", {(dtype.size, block_size): 17})
    monkeypatch.setattr(tuned, "GRADIENT_PANELS", ())
    pattern = trimmed(random_pattern(2, 900 // block_size, block_size, 0.6), cut, 0)
    check(pattern, n, dtype, ["sddmm_fragments"], offset=offset)
