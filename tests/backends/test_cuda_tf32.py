"""The CUDA kernels of float32 blocks by TF32, and of the sizes between the powers of two, on the
emulator: equal to the oracle, in any order of warps and copies."""

import mlx.core as mx
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


@pytest.fixture
def by_fragments(monkeypatch):
    """Let the kernels of this file take every block, and a little work fill a GPU."""
    all_sizes = {(itemsize, b): 17 for itemsize in (2, 4) for b in range(16, 129, 8)}
    monkeypatch.setattr(tuned, "FRAGMENT_ROWS", all_sizes)
    monkeypatch.setattr(tuned, "GRADIENT_FRAGMENT_ROWS", all_sizes)
    monkeypatch.setattr(tuned, "FLOAT_PANEL_DENSITY", {})
    monkeypatch.setattr(tuned, "PANEL_DENSITY", {})
    monkeypatch.setattr(tuned, "GRADIENT_PANELS", ())
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)


@pytest.mark.parametrize(
    ("block_size", "dtype", "n", "cut", "offset"),
    [
        (16, mx.float32, 70, 0, 0),
        (24, mx.float32, 300, 5, 0),
        (24, mx.bfloat16, 70, 0, 1),
        (48, mx.float32, 70, 0, 1),
        (48, mx.float16, 600, 5, 0),
        (64, mx.float32, 300, 5, 0),
        (96, mx.float32, 300, 0, 0),
        (96, mx.bfloat16, 300, 5, 0),
        (120, mx.float32, 70, 0, 1),
        (128, mx.float32, 70, 5, 0),
    ],
)
def test_fragments(by_fragments, block_size, dtype, n, cut, offset):
    """Stages begin and end in the middle of a block, and a block does not fill its products."""
    pattern = trimmed(random_pattern(2, 3, block_size, density=0.8), cut, -cut)
    check(pattern, n, dtype, ["spmm_fragments", "sddmm_fragments"], offset=offset)


@pytest.mark.parametrize(
    ("block_size", "cut", "dtype"),
    [(24, 5, mx.bfloat16), (64, 0, mx.float32), (96, 8, mx.float32), (96, 0, mx.bfloat16)],
)
def test_thread_blocks_share_block_rows(monkeypatch, by_fragments, block_size, cut, dtype):
    """Some of them have fewer stages than thread blocks, or none."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 12)
    pattern = trimmed(pattern_of([[0, 1, 3], [], [2]], 4, block_size), cut, -cut)
    check(pattern, 60, dtype, ["spmm_fragments", "sum_splits"])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [24, 128])
def test_gradients_in_parts(monkeypatch, by_fragments, block_size, dtype, parts):
    monkeypatch.setattr(cuda_fragments, "_splits", lambda *_: parts)
    pattern = random_pattern(2, 600 // block_size, block_size, 0.8)
    x, y = (integers((290, size), i, dtype) for i, size in enumerate(reversed(pattern.shape)))
    with emulated() as emulation:
        assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))
    assert emulation.names == ["sddmm_fragments", "sum_splits"][: 1 if parts == 1 else 2]


@pytest.mark.parametrize(("block_size", "dtype"), [(48, mx.float32), (96, mx.bfloat16)])
def test_several_matrices_of_one_pattern(by_fragments, block_size, dtype):
    pattern = random_pattern(2, 3, block_size, density=0.7)
    shapes = [pattern.data_shape, (70, pattern.shape[1]), (70, pattern.shape[0])]
    data, x, y = (integers((2, *shape), i, dtype) for i, shape in enumerate(shapes))
    with emulated():
        product = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        gradient = mx.vmap(lambda y, x: sddmm(pattern, y, x))(y, x)
    assert_equal(product, naive.spmm(data, pattern, x))
    assert_equal(gradient, naive.sddmm(pattern, y, x))


@pytest.mark.parametrize(
    ("block_size", "dtype", "offset"),
    [(24, mx.float32, 0), (24, mx.bfloat16, 1), (48, mx.bfloat16, 0), (96, mx.float32, 1)],
)
def test_a_matrix_that_ends_within_blocks_needs_no_copy_of_x(
    monkeypatch, by_fragments, block_size, dtype, offset
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


@pytest.mark.parametrize(("cut", "offset"), [(0, 1), (5, 0)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_panels_of_float32(monkeypatch, block_size, cut, offset):
    """Stages, chunks and fragments are those of 4 bytes, and gradients may be added up in parts."""
    monkeypatch.setattr(tuned, "FLOAT_PANEL_DENSITY", {block_size: 0.0})
    monkeypatch.setattr(tuned, "GRADIENT_PANEL_ROWS", 64)
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)
    pattern = trimmed(random_pattern(600 // block_size, 320 // block_size, block_size, 0.3), cut, 0)
    check(pattern, 200, mx.float32, ["spmm_panels", "sddmm_panels"], offset=offset)
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 128)
    x, y = (integers((200, size), i) for i, size in enumerate(reversed(pattern.shape)))
    with emulated() as emulation:
        assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))
    assert emulation.names == ["sddmm_panels", "sum_splits"]


FAULTS = {
    "spmm_fragments": [
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("wait_products<0>();", ""),
        ("round_factors<T>(xs[s][tn]);", "xs[s][tn][0] = 0;"),
    ],
    "sddmm_fragments": [
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("wait_copies<RAW - 1>();", ""),
        ("wait_barrier(empty + ring.buffer, ring.parity ^ 1);", ""),
    ],
}


@pytest.mark.parametrize(("kernel", "edit"), [(k, e) for k, edits in FAULTS.items() for e in edits])
def test_faults_are_found(by_fragments, kernel, edit):
    """A barrier less, or a wrong place, does not pass."""
    pattern = random_pattern(3, 8, 64, density=1.0)
    x, y = (integers((300, size), i) for i, size in enumerate(reversed(pattern.shape)))
    data = integers(pattern.data_shape, 2)
    product, expected = {
        "spmm_fragments": (lambda: spmm(data, pattern, x), naive.spmm(data, pattern, x)),
        "sddmm_fragments": (lambda: sddmm(pattern, y, x), naive.sddmm(pattern, y, x)),
    }[kernel]
    with emulated(edit=edit):
        try:
            result = product()
        except CudaFault:
            result = None
    assert result is None or not mx.array_equal(result, expected)
