"""Quantized blocks on CUDA, on the emulator: equal to the oracle, in any order of warps and copies.

Values are whole numbers, so that sums are exact. The cases cover all bits, group sizes, block
sizes, numbers of rows and dtypes, and many pairs of them, but not their product.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    assert_close,
    assert_equal,
    integers,
    outside,
    pattern_of,
    random_pattern,
    to_numpy,
    trimmed,
)
from test_quantized_products import whole_blocks

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, qspmm, qspmm_t
from mlx_sparse_nn.core import edges
from mlx_sparse_nn.core.backends import cuda as kernels
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.core.quantized import BITS, unpack
from mlx_sparse_nn.diagnostics.verify import MismatchError, verify

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
FORMATS = [(32, 32), (64, 32), (64, 64), (96, 32), (128, 32), (128, 64), (128, 128)]
ROWS = (1, 3, 8, 9, 33, 70)

Matrix = tuple[mx.array, mx.array, mx.array]


def spoiled(pattern: CSRPattern, matrix: Matrix) -> Matrix:
    """Put nans where whole groups lie outside the matrix."""
    packed, scales, biases = matrix
    beyond = mx.array(outside(pattern)).reshape(*scales.shape, -1).all(axis=-1)
    nan = mx.array(np.nan, scales.dtype)
    return packed, mx.where(beyond, nan, scales), mx.where(beyond, nan, biases)


def check(pattern, matrix, n, dtype, lead=(), **settings):
    """Assert that both products are the oracle's, and return the names of the kernels."""
    x, y = (integers((*lead, n, size), i, dtype) for i, size in enumerate(pattern.shape[::-1]))
    bias = None if lead else integers(pattern.shape[:1], 4, dtype)
    with emulated(**settings) as emulation:
        if lead:  # no public product takes an axis of matrices: vmap gives one
            found = mx.vmap(lambda p, s, b, x: qspmm(p, s, b, pattern, x))(*matrix, x)
            found_t = mx.vmap(lambda p, s, b, y: qspmm_t(p, s, b, pattern, y))(*matrix, y)
        else:
            found, found_t = qspmm(*matrix, pattern, x, bias), qspmm_t(*matrix, pattern, y)
        mx.eval(found, found_t)
    assert_equal(found, naive.qspmm(*matrix, pattern, x, bias))
    assert_equal(found_t, naive.qspmm_t(*matrix, pattern, y))
    assert emulation.conflicts == 0
    assert emulation.names
    return emulation.names


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("block_size", "group_size"), FORMATS)
def test_every_packing(block_size, group_size, bits):
    at = BITS.index(bits) + 2 * FORMATS.index((block_size, group_size))
    n, dtype = ROWS[at % len(ROWS)], DTYPES[at % 4 % 3]
    pattern = random_pattern(3, 4, block_size, density=0.6, seed=bits)
    if at % 2:
        pattern = trimmed(pattern, 7, block_size - 13)
    matrix = spoiled(pattern, whole_blocks(pattern, group_size, bits, (), dtype, bits))
    check(pattern, matrix, n, dtype, offset=at % 2, seed=at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 8, 16, 20, 40, 70, 300])
def test_every_kernel(n, dtype):
    """Every number of rows and dtype, with an empty block-row and a block-column twice in one."""
    pattern = pattern_of([[1, 0], [], [2, 1, 1], [2]], 3, 64)
    names = check(pattern, whole_blocks(pattern, 64, 4, (), dtype, n), n, dtype)
    by_packed = n <= 16 or (n <= 128 and dtype != mx.float32)
    assert ("dequantize" in names) is not by_packed


def test_blocks_without_tiles():
    """Larger blocks than tensor cores have tiles for, and true float32: few rows need none."""
    pattern = pattern_of([[1, 0], [1]], 2, 160)
    for n, dtype in ((3, mx.float32), (40, mx.bfloat16)):
        check(pattern, whole_blocks(pattern, 32, 4, (), dtype), n, dtype, tf32=False)


def test_long_block_rows():
    """Warps take several turns, of which the last is not full."""
    pattern = pattern_of([range(23), [5], range(9, 20)], 23, 32)
    for n, dtype in ((1, mx.bfloat16), (5, mx.float32), (40, mx.float16)):
        check(pattern, whole_blocks(pattern, 32, 4, (), dtype), n, dtype)


@st.composite
def cases(draw):
    """Draw a pattern (empty rows, repeats, edges), a number of rows of x, a packing, an axis V."""
    block_size, bits, dtype = draw(
        st.sampled_from([(32, 3, mx.float32), (64, 4, mx.bfloat16), (96, 6, mx.float16)])
    )
    n_rows, n_cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    row = st.lists(st.integers(0, n_cols - 1), max_size=n_cols + 1)
    rows = draw(st.lists(row, min_size=n_rows, max_size=n_rows).filter(any))
    # Edges are always at the same place: each other is one more compilation.
    past = draw(st.sampled_from([0, block_size // 2 | 1]))
    pattern = trimmed(pattern_of(rows, n_cols, block_size), past, past)
    return pattern, bits, dtype, draw(st.sampled_from(ROWS)), draw(st.sampled_from([(), (3,)]))


@settings(max_examples=settings().max_examples // 4)
@given(cases())
def test_patterns_edges_and_matrices_that_share_one(case):
    pattern, bits, dtype, n, lead = case
    matrix = whole_blocks(pattern, 32, bits, lead, dtype)
    if not lead:
        matrix = spoiled(pattern, matrix)
    check(pattern, matrix, n, dtype, lead)


@pytest.mark.parametrize("n", [1, 33, 300])
@pytest.mark.parametrize("cut", [1, -1])
def test_what_lies_outside_is_masked(monkeypatch, n, cut):
    """Whatever groups outside hold, be it a nan, and what overflows beside the last column."""
    pattern = pattern_of([[1, 0], [0, 2, 1], [1, 2]], 3, 64)
    pattern = trimmed(pattern, cut, -cut)
    packed, scales, biases = spoiled(pattern, whole_blocks(pattern, 32, 8, (), mx.float16))
    # The group in which the matrix ends: integers outside are 255, inside 0.
    inside = pattern.shape[1] % 64
    integer = np.where(outside(pattern), 255, unpack(packed) if inside % 32 == 0 else 0)
    words = np.ascontiguousarray(integer.astype(np.uint8)).view(np.uint32)
    matrix = mx.array(words), mx.where(mx.isnan(scales), scales, 1000), biases
    for name in ("clear_quantized_cols", "clear_quantized_rows"):
        monkeypatch.delattr(edges, name)
    check(pattern, matrix, n, mx.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "bits"), [(4, 2), (16, 8), (32, 5), (300, 4)])
def test_quantized_weights_are_within_rounding(n, bits, dtype):
    """What ``mx.quantize`` makes of normal numbers, beside NumPy in float64."""
    pattern = random_pattern(3, 4, 64, density=0.8)
    quantized = mx.quantize(mx.random.normal(pattern.data_shape).astype(dtype), 64, bits)
    scaled = np.repeat(to_numpy(quantized[1]), 64, axis=-1) * unpack(quantized[0])
    added = np.repeat(to_numpy(quantized[2]), 64, axis=-1)
    weight, size = (dense(pattern, a) for a in (scaled + added, abs(scaled) + abs(added)))
    x, y = (mx.random.normal((n, size)).astype(dtype) for size in pattern.shape[::-1])
    x64, y64 = to_numpy(x), to_numpy(y)
    length = max(pattern.shape)
    with emulated(tf32=False):
        found, found_t = qspmm(*quantized, pattern, x), qspmm_t(*quantized, pattern, y)
        mx.eval(found, found_t)
    assert_close(found, x64 @ weight.T, length, abs(x64) @ size.T)
    assert_close(found_t, y64 @ weight, length, abs(y64) @ size)


def dense(pattern: CSRPattern, blocks: np.ndarray) -> np.ndarray:
    """Return the dense matrix by a loop over the blocks."""
    out, B = np.zeros(pattern.shape), pattern.block_size
    for j, (r, c) in enumerate(zip(pattern.row_indices, pattern.indices, strict=True)):
        out[r * B : (r + 1) * B, c * B : (c + 1) * B] += blocks[j]
    return out


@pytest.mark.parametrize("n", [1, 16, 64])
def test_the_layer_is_one_launch(n):
    layer = BlockSparseLinear(64, 96, density=0.5).to_quantized(bits=4)
    layer.set_dtype(mx.bfloat16)
    x = integers((n, 64), 1, mx.bfloat16)
    expected = naive.qspmm(layer.weight, layer.scales, layer.biases, layer.pattern, x, layer.bias)
    with emulated() as emulation:
        y = layer(x)
        mx.eval(y)
    assert len(emulation.names) == 1
    assert mx.allclose(y, expected, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_are_verified(dtype):
    model = nn.Sequential(
        BlockSparseLinear(64, 128, block_size=64, density=0.5),
        nn.ReLU(),
        BlockSparseLinear(128, 64, bias=False, density=0.5),
    )
    nn.quantize(model, bits=4, group_size=32)
    model.set_dtype(dtype)
    with emulated():
        report = verify(model, mx.random.normal((2, 5, 64)).astype(dtype))
    assert [check.backend for check in report.checks] == ["cuda", "cuda", "mlx", "cuda", "cuda"]


@pytest.mark.parametrize("op", ["qspmm", "qspmm_t"])
def test_a_wrong_kernel_is_caught(monkeypatch, op):
    right = getattr(kernels, op)
    monkeypatch.setattr(kernels, op, lambda *args: right(*args) * (1 + 2.0**-12))
    layer = BlockSparseLinear(32, 32, density=1.0).to_quantized()
    with emulated(), pytest.raises(MismatchError, match=r"wrong[^$]* by cuda"):
        verify(layer, mx.random.normal((3, 32)))


FAULTS = [
    ("qspmm_few", 3, "__syncthreads();", ""),
    ("qspmm_few", 3, "__byte_perm(a.x, a.z, 0x7632)", "a.x"),
    ("qspmm_rows", 40, "__syncthreads();", ""),
    ("qspmm_rows", 40, "__byte_perm(a.x, a.z, 0x7632)", "a.x"),
    ("qspmm_rows", 40, "wait_copies<STAGES - 1>();", ""),
]


@pytest.mark.parametrize(("kernel", "n", "text", "instead"), FAULTS)
def test_faults_are_found(kernel, n, text, instead):
    """A barrier less, or a wrong place, does not pass."""
    pattern = random_pattern(2, 8, 64, density=1.0)
    matrix = whole_blocks(pattern, 64, 4, (), mx.bfloat16)
    x = integers((n, pattern.shape[1]), 1, mx.bfloat16)
    expected = naive.qspmm(*matrix, pattern, x)
    with emulated(edit=(text, instead)) as emulation:
        try:
            y = qspmm(*matrix, pattern, x)
            mx.eval(y)
        except CudaFault:
            y = None
    assert emulation.names == [kernel]
    assert y is None or not mx.array_equal(y, expected)
