"""spmm, spmm_t and sddmm against dense products, in every dtype and at every odd size."""

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_close,
    assert_equal,
    dense_of,
    device_of,
    integers,
    pattern_of,
    patterns,
    random_pattern,
    spoiled,
    to_numpy,
    untyped,
)

from mlx_sparse_nn import CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import plain
from mlx_sparse_nn.core.ops import todense

pytestmark = pytest.mark.usefixtures("each_backend")

leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)
REAL = (mx.float32, mx.float16, mx.bfloat16, mx.float64)


@given(patterns(), leading, st.sampled_from(REAL))
def test_products_of_whole_numbers_are_exact(pattern, lead, dtype):
    """Sums in float32 of small whole numbers are exact; a 16-bit result is rounded once."""
    with device_of(dtype):
        check_exact(pattern, lead, dtype)


def check_exact(pattern, lead, dtype):
    data = spoiled(pattern, integers(pattern.data_shape, 1, dtype))
    x = integers((*lead, pattern.shape[1]), 2, dtype)
    y = integers((*lead, pattern.shape[0]), 3, dtype)
    dense = to_numpy(dense_of(pattern, data))
    assert_equal(spmm(data, pattern, x), rounded(to_numpy(x) @ dense.T, dtype))
    assert_equal(spmm_t(data, pattern, y), rounded(to_numpy(y) @ dense, dtype))
    outer = outer_sum(to_numpy(y), to_numpy(x))
    assert_equal(sddmm(pattern, y, x), rounded(sample(pattern, outer), dtype))


def rounded(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(a.astype(np.float32)).astype(dtype)


def outer_sum(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    products = y[..., :, None] * x[..., None, :]
    return products.sum(axis=tuple(range(products.ndim - 2)))


def sample(pattern: CSRPattern, dense: np.ndarray) -> np.ndarray:
    """Return the blocks of a dense matrix at the pattern's places, by a loop."""
    block = pattern.block_size
    n_block_rows, n_block_cols = pattern.grid
    whole = np.zeros((n_block_rows * block, n_block_cols * block), dense.dtype)
    whole[: dense.shape[0], : dense.shape[1]] = dense
    blocks = whole.reshape(n_block_rows, block, n_block_cols, block).swapaxes(1, 2)
    return blocks[pattern.row_indices, pattern.indices].reshape(pattern.data_shape)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.float64])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_products_of_random_numbers_are_within_rounding(block_size, dtype):
    with device_of(dtype):
        check_rounding(block_size, dtype)


def check_rounding(block_size, dtype):
    pattern = random_pattern(5, 7, block_size, density=0.5, seed=block_size)
    rng = np.random.default_rng(block_size)
    draw = lambda *shape: mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)
    data, x, y = draw(*pattern.data_shape), draw(3, pattern.shape[1]), draw(3, pattern.shape[0])
    dense = to_numpy(dense_of(pattern, data))
    x64, y64 = to_numpy(x), to_numpy(y)
    length = max(pattern.shape)
    assert_close(spmm(data, pattern, x), x64 @ dense.T, length, abs(x64) @ abs(dense.T))
    assert_close(spmm_t(data, pattern, y), y64 @ dense, length, abs(y64) @ abs(dense))
    expected, magnitude = (sample(pattern, f(y64).T @ f(x64)) for f in (np.array, np.abs))
    assert_close(sddmm(pattern, y, x), expected, 3, magnitude)


def slice_of_integers(shape, offset):
    """Return whole numbers that begin ``offset`` elements after the start of an array."""
    flat = integers((int(np.prod(shape)) + offset,), len(shape), mx.bfloat16)
    return flat[offset:].reshape(shape)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [3, 70, 600])
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 64, 128])
def test_many_rows_and_slices_that_begin_anywhere(block_size, n, offset):
    """Kernels copy 16 bytes at a time, and go by stages and tiles of rows."""
    blocks = max(4, 96 // block_size)
    pattern = random_pattern(blocks, blocks + 1, block_size, density=0.7)
    shapes = [pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0])]
    data, x, y = (slice_of_integers(shape, offset) for shape in shapes)
    dense = to_numpy(dense_of(pattern, data.astype(mx.float32)))
    x64, y64 = to_numpy(x), to_numpy(y)
    with mlx_takes_slices():
        assert_equal(spmm(data, pattern, x), rounded(x64 @ dense.T, mx.bfloat16))
        assert_equal(spmm_t(data, pattern, y), rounded(y64 @ dense, mx.bfloat16))
        assert_equal(sddmm(pattern, y, x), rounded(sample(pattern, y64.T @ x64), mx.bfloat16))


@contextmanager
def mlx_takes_slices():
    """Skip where a product goes dense and MLX (0.32.4) cannot multiply what begins at an odd place:
    cuBLAS refuses it, in ``nn.Linear`` as well."""
    try:
        yield
    except RuntimeError as error:
        if "cublasLtMatmul" not in str(error):
            raise
        pytest.skip("MLX's own product of these slices fails")


@pytest.mark.parametrize("kind", ["even", "uneven", "shuffled", "repeated", "sliced"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_enough_work_for_panels(block_size, kind):
    """Kernels that share x among many block-rows walk the columns in order: a pattern need not."""
    rng = np.random.default_rng(0)
    mask = rng.random((2000 // block_size, 1056 // block_size)) < 0.2
    if kind == "uneven":
        mask[7] = True
        mask[256 // block_size : 600 // block_size] = False
        mask[:, -1] = False
    lists = [np.flatnonzero(row) for row in mask]
    if kind == "shuffled":
        lists = [rng.permutation(row) for row in lists]
    if kind == "repeated":
        lists = [np.sort(np.concatenate([row, row[:2]])) for row in lists]
    pattern = pattern_of(lists, mask.shape[1], block_size)
    n = 3400 if mx.cuda.is_available() else 340  # that fills a GPU
    (n_rows, n_cols), offset = pattern.shape, int(kind == "sliced")
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (slice_of_integers(shape, offset) for shape in shapes)
    dense = to_numpy(dense_of(pattern, data.astype(mx.float32)))
    x64, y64 = to_numpy(x), to_numpy(y)
    affine = x64 @ dense.T + to_numpy(bias)
    assert_equal(spmm(data, pattern, x, bias), rounded(affine, mx.bfloat16))
    assert_equal(spmm_t(data, pattern, y), rounded(y64 @ dense, mx.bfloat16))
    assert_equal(sddmm(pattern, y, x), rounded(sample(pattern, y64.T @ x64), mx.bfloat16))


@pytest.mark.parametrize("n", [1, 16, 40, 300])
@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_products_err_no_more_than_dense_ones(dtype, block_size, n):
    """Against float64, on whichever device runs the tests: the same rounding, once, at the end."""
    blocks = max(3, 128 // block_size)
    pattern = random_pattern(blocks, blocks, block_size, density=0.8)
    size = blocks * block_size
    rng = np.random.default_rng(0)
    draw = lambda *shape: mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    data, x, y = draw(*pattern.data_shape), draw(n, size), draw(n, size)
    bias = 10 * draw(size)  # about as large as what it is added to
    dense = todense(data, pattern.layout)
    stored = pattern.tomask()
    results = {
        "spmm": (spmm(data, pattern, x), x @ dense.T, x, dense.T),
        "affine": (spmm(data, pattern, x, bias), mx.addmm(bias, x, dense.T), x, dense.T),
        "spmm_t": (spmm_t(data, pattern, y), y @ dense, y, dense),
        "sddmm": (
            todense(sddmm(pattern, y, x), pattern.layout),
            mx.where(stored, y.T @ x, 0),
            y.T,
            x,
        ),
    }
    for name, (actual, by_mlx, a, b) in results.items():
        expected = to_numpy(a) @ to_numpy(b)
        if name == "sddmm":
            expected = np.where(np.array(stored), expected, 0)
        if name == "affine":
            expected = expected + to_numpy(bias)
        error, error_of_dense = (
            np.sqrt(np.mean((to_numpy(result) - expected) ** 2)) for result in (actual, by_mlx)
        )
        assert error <= 1.01 * error_of_dense, name


@given(patterns(block_sizes=(1,)), leading)
def test_complex_products(pattern, lead):
    data = integers(pattern.data_shape, 1, mx.complex64)
    x = integers((*lead, pattern.shape[1]), 2, mx.complex64)
    y = integers((*lead, pattern.shape[0]), 3, mx.complex64)
    dense = to_numpy(dense_of(pattern, data))
    assert np.array_equal(to_numpy(spmm(data, pattern, x)), to_numpy(x) @ dense.T)
    assert np.array_equal(to_numpy(spmm_t(data, pattern, y)), to_numpy(y) @ dense)
    outer = outer_sum(to_numpy(y), to_numpy(x))
    assert np.array_equal(to_numpy(sddmm(pattern, y, x)), sample(pattern, outer))


@pytest.mark.parametrize("block_size", [1, 4])
def test_one_heavy_row(block_size):
    """A row that holds everything, among rows of one block and rows of none."""
    indptr = [0, 1, 1, 801, 802, 802]
    indices = np.concatenate([[3], np.arange(800), [799]])
    pattern = CSRPattern(indptr, indices, (5 * block_size, 800 * block_size), block_size)
    data, x = integers(pattern.data_shape, 1), integers((2, pattern.shape[1]), 2)
    dense = dense_of(pattern, data)
    assert_equal(spmm(data, pattern, x), x @ dense.T)
    y = integers((2, pattern.shape[0]), 3)
    assert_equal(spmm_t(data, pattern, y), y @ dense)


def test_padding_does_not_let_infinities_through():
    """A row must not see an infinity or NaN of a column that it does not store, nor other data."""
    pattern = CSRPattern([0, 4, 9], [1, 2, 3, 4, 0, 1, 2, 3, 4], (2, 5))
    x = mx.array([float("inf"), 1, 1, 1, 1])
    assert spmm(mx.ones(9), pattern, x).tolist() == [4.0, float("inf")]
    data = mx.array([float("nan")] + [1.0] * 8)
    swapped = CSRPattern([0, 5, 9], [0, 1, 2, 3, 4, 1, 2, 3, 4], (2, 5))
    assert spmm(data, swapped, mx.ones(5))[1].item() == 4.0
    blocks = CSRPattern([0, 4, 9], [1, 2, 3, 4, 0, 1, 2, 3, 4], (4, 10), 2)
    x = mx.array([float("inf")] * 2 + [1.0] * 8)
    assert spmm(mx.ones((9, 2, 2)), blocks, x)[:2].tolist() == [8.0, 8.0]


def test_wide_sums_in_16_bits_accumulate_in_float32():
    """4096 ones add up in float16 and bfloat16, where a 16-bit sum would stop at 2048 or 256."""
    pattern = CSRPattern([0, 4096], np.arange(4096), (1, 4096))
    for dtype in (mx.float16, mx.bfloat16):
        assert spmm(mx.ones(4096, dtype), pattern, mx.ones(4096, dtype)).item() == 4096


@pytest.mark.parametrize("n", [1, 300])
def test_steps_agree_with_one_step(n, monkeypatch):
    """Cutting the rows into steps, as plain MLX does with wide products, changes no bit."""
    for block_size in (1, 8):
        pattern = random_pattern(40, 30, block_size, seed=4)
        uniform = CSRPattern(np.arange(41) * 3, np.arange(120) % 30, pattern.shape, block_size)
        for p in (pattern, uniform):
            with mx.stream(mx.cpu):
                whole = all_products(p, n)
                monkeypatch.setattr(tuned, "CPU_STEP_BYTES", 5000)
                for a, b in zip(all_products(p, n), whole, strict=True):
                    assert_equal(a, b)
                monkeypatch.undo()


def all_products(pattern, n):
    mx.random.seed(n)
    data = mx.random.normal((1, *pattern.data_shape))
    x, y = mx.random.normal((1, n, pattern.shape[1])), mx.random.normal((1, n, pattern.shape[0]))
    products = (
        plain.spmm(data, pattern.layout, x),
        plain.spmm_t(data, pattern.layout, y),
        plain.sddmm(pattern.layout, y, x),
    )
    mx.eval(products)
    return products


def test_results_are_reproducible_bit_for_bit():
    pattern = random_pattern(20, 30, 16)
    data, x = mx.random.normal(pattern.data_shape), mx.random.normal((64, pattern.shape[1]))
    grad = mx.grad(lambda data, x: (spmm(data, pattern, x) ** 2).sum(), argnums=(0, 1))
    for a, b in zip(grad(data, x), grad(data, x), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize(
    ("data", "x", "result"),
    [
        (mx.float16, mx.float32, mx.float32),
        (mx.bfloat16, mx.float16, mx.float32),
        (mx.int32, mx.float16, mx.float16),
        (mx.float32, mx.complex64, mx.complex64),
        (mx.bool_, mx.float32, mx.float32),
    ],
)
def test_mixed_dtypes_promote_as_mlx_promotes(data, x, result):
    pattern = CSRPattern([0, 1, 2], [1, 0], (2, 2))
    out = spmm(mx.array([1, 1]).astype(data), pattern, mx.array([2, 3]).astype(x))
    assert out.dtype == result == mx.result_type(data, x)
    assert out.tolist() == [3, 2]


def test_bias_is_added():
    pattern = random_pattern(3, 4, 2)
    data, x, bias = integers(pattern.data_shape), integers((5, 8)), integers((6,), 7)
    assert_equal(spmm(data, pattern, x, bias), spmm(data, pattern, x) + bias)


P = CSRPattern([0, 1, 2], [1, 0], (4, 4), 2)
BLOCKS, ROW = mx.ones((2, 2, 2)), mx.ones((3, 4))
BAD = [
    (
        lambda: spmm(BLOCKS, untyped("P"), ROW),
        TypeError,
        r"\[spmm\] pattern must be a CSRPattern, got str",
    ),
    (
        lambda: spmm(untyped(BLOCKS.tolist()), P, ROW),
        TypeError,
        r"\[spmm\] data must be an mx.array",
    ),
    (lambda: spmm(mx.ones(8), P, ROW), ValueError, r"\[spmm\] data has shape \(8,\).*\(2, 2, 2\)"),
    (lambda: spmm(BLOCKS, P, mx.ones((3, 5))), ValueError, r"x has shape \(3, 5\).*n_cols = 4"),
    (lambda: spmm(BLOCKS, P, mx.array(1.0)), ValueError, r"\[spmm\] x has shape \(\)"),
    (lambda: spmm(BLOCKS, P, ROW, mx.ones(3)), ValueError, r"\[spmm\] bias has shape \(3,\)"),
    (lambda: spmm_t(BLOCKS, P, mx.ones(2)), ValueError, r"\[spmm_t\] y has shape \(2,\).*n_rows"),
    (lambda: sddmm(P, ROW, mx.ones((2, 4))), ValueError, r"\[sddmm\] leading axes differ"),
    (lambda: sddmm(P, mx.ones(5), ROW), ValueError, r"\[sddmm\] y has shape \(5,\)"),
    (
        lambda: spmm(BLOCKS.astype(mx.int32), P, ROW.astype(mx.int32)),
        TypeError,
        r"\[spmm\] data .*int32 and x .*int32 .* cast one to a floating type",
    ),
    (
        lambda: spmm(BLOCKS.astype(mx.complex64), P, ROW),
        TypeError,
        r"\[spmm\] complex64 is for block_size 1, got block_size 2",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_operands_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
