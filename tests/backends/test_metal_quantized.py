"""Quantized blocks on the Metal path: on the emulator, every launch in three schedules.

Values are whole numbers that bfloat16 holds, so that sums are exact and the comparison with the
oracle is for equality. A variant takes half a second to compile: the cases cover all bits, group
sizes, block sizes, numbers of rows and dtypes, and many pairs of them, but not their product.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
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

# The same tests of every transform, which run here on the kernels.
from test_quantized_products import TestTransforms, whole_blocks  # noqa: F401

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, qspmm, qspmm_t
from mlx_sparse_nn.core import edges, tuned
from mlx_sparse_nn.core.backends import metal as kernels
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.core.quantized import BITS, unpack
from mlx_sparse_nn.diagnostics.verify import MismatchError, verify

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
FORMATS = [(32, 32), (64, 32), (64, 64), (96, 32), (128, 32), (128, 64), (128, 128)]
ROWS = (1, 3, 8, 9, 33, 70)
KERNELS = {1: "few", 3: "few", 8: "rows", 9: "rows", 33: "tiles", 70: "tiles"}

Matrix = tuple[mx.array, mx.array, mx.array]


@pytest.fixture(autouse=True)
def _on_metal(metal):
    yield
    assert any("qspmm" in launch.kernel for launch in metal.launches), "no kernel was launched"


@pytest.fixture
def each_backend():
    """The backend of these tests is the one that is chosen, with the emulator in place."""


def spoiled(pattern: CSRPattern, matrix: Matrix) -> Matrix:
    """Put nans where whole groups lie outside the matrix."""
    packed, scales, biases = matrix
    beyond = mx.array(outside(pattern)).reshape(*scales.shape, -1).all(axis=-1)
    nan = mx.array(np.nan, scales.dtype)
    return packed, mx.where(beyond, nan, scales), mx.where(beyond, nan, biases)


def check(pattern: CSRPattern, matrix: Matrix, n: int, dtype: mx.Dtype, lead=()) -> None:
    """Assert that both products of whole numbers are the oracle's, bit for bit."""
    x, y = (integers((*lead, n, size), i, dtype) for i, size in enumerate(pattern.shape[::-1]))
    if lead:  # no public product takes an axis of matrices: vmap gives one, and adds a bias later
        found = mx.vmap(lambda p, s, b, x: qspmm(p, s, b, pattern, x))(*matrix, x)
        found_t = mx.vmap(lambda p, s, b, y: qspmm_t(p, s, b, pattern, y))(*matrix, y)
        bias = None
    else:
        bias = integers(pattern.shape[:1], 4, dtype)
        found, found_t = qspmm(*matrix, pattern, x, bias), qspmm_t(*matrix, pattern, y)
    assert_equal(found, naive.qspmm(*matrix, pattern, x, bias))
    assert_equal(found_t, naive.qspmm_t(*matrix, pattern, y))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("block_size", "group_size"), FORMATS)
def test_every_packing(metal, block_size, group_size, bits):
    at = BITS.index(bits) + 2 * FORMATS.index((block_size, group_size))
    n, dtype = ROWS[at % len(ROWS)], DTYPES[at % 4 % 3]
    pattern = random_pattern(3, 4, block_size, density=0.6, seed=bits)
    if at % 2:
        pattern = trimmed(pattern, 7, block_size - 13)
    matrix = spoiled(pattern, whole_blocks(pattern, group_size, bits, (), dtype, bits))
    check(pattern, matrix, n, dtype)
    assert {launch.kernel for launch in metal.launches} == {f"mlx_sparse_nn_qspmm_{KERNELS[n]}"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 40, 70])
def test_every_kernel(n, dtype):
    """Every number of rows and dtype, with an empty block-row and a block-column twice in one."""
    pattern = pattern_of([[1, 0], [], [2, 1, 1], [2]], 3, 64)
    check(pattern, whole_blocks(pattern, 64, 4, (), dtype, n), n, dtype)


@pytest.mark.parametrize(("n", "block_size", "side"), [(40, 64, 64), (70, 64, 64), (40, 128, 128)])
def test_large_tiles(metal, monkeypatch, n, block_size, side):
    """Those of layers that keep a GPU busy, which take the emulator long."""
    monkeypatch.setattr(tuned, "METAL_QUANTIZED_GROUPS", 1)
    pattern = trimmed(pattern_of([[1, 0], [], [2, 1, 1]], 3, block_size), 33, 17)
    matrix = spoiled(pattern, whole_blocks(pattern, 32, 5, (), mx.bfloat16, n))
    check(pattern, matrix, n, mx.bfloat16)
    assert {dict(launch.template)["SIDE"] for launch in metal.launches} == {side}


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


@settings(max_examples=settings().max_examples // 2)
@given(cases())
def test_patterns_edges_and_matrices_that_share_one(case):
    pattern, bits, dtype, n, lead = case
    matrix = whole_blocks(pattern, 32, bits, lead, dtype)
    if not lead:
        matrix = spoiled(pattern, matrix)
    check(pattern, matrix, n, dtype, lead)


@pytest.mark.parametrize("n", [1, 8, 33])
@pytest.mark.parametrize("cut", [1, -1])
def test_what_lies_outside_is_masked(metal, monkeypatch, n, cut):
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
    assert [dict(launch.template)["INSIDE"] for launch in metal.launches] == [
        size % 64 for size in reversed(pattern.shape)
    ]


@pytest.mark.parametrize("n", [1, 8, 33])
def test_slices_are_read_where_they_begin(n):
    """Operands behind others in one buffer arrive uncopied, where vectors do not begin."""
    pattern = pattern_of([[1, 0], [1]], 2, 32)

    def behind(a, count):
        flat = mx.concatenate([mx.zeros((count,), a.dtype), a.flatten()])
        return flat[count:].reshape(a.shape)

    packed, scales, biases = whole_blocks(pattern, 32, 3, (), mx.bfloat16)
    matrix = behind(packed, 1), behind(scales, 3), behind(biases, 5)
    x = behind(integers((n, 64), 1, mx.bfloat16), 3)
    assert_equal(qspmm(*matrix, pattern, x), naive.qspmm(*matrix, pattern, x))
    assert_equal(qspmm_t(*matrix, pattern, x), naive.qspmm_t(*matrix, pattern, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "bits"), [(4, 2), (32, 5), (40, 8)])
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
    found, found_t = qspmm(*quantized, pattern, x), qspmm_t(*quantized, pattern, y)
    assert_close(found, x64 @ weight.T, length, abs(x64) @ size.T)
    assert_close(found_t, y64 @ weight, length, abs(y64) @ size)


def dense(pattern: CSRPattern, blocks: np.ndarray) -> np.ndarray:
    """Return the dense matrix by a loop over the blocks."""
    out, B = np.zeros(pattern.shape), pattern.block_size
    for j, (r, c) in enumerate(zip(pattern.row_indices, pattern.indices, strict=True)):
        out[r * B : (r + 1) * B, c * B : (c + 1) * B] += blocks[j]
    return out


@pytest.mark.parametrize(("block_size", "group_size"), [(32, 32), (64, 64), (128, 128)])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_what_is_stored_is_read_once(metal, n, block_size, group_size):
    """Up to 8 rows of x: reading the packed values, scales and biases is what takes the time."""
    pattern = random_pattern(4, 5, block_size, density=0.6)
    matrix = whole_blocks(pattern, group_size, 4, (), mx.bfloat16)
    x, y = (mx.ones((n, size), mx.bfloat16) for size in pattern.shape[::-1])
    metal.count = True
    mx.eval(qspmm(*matrix, pattern, x), qspmm_t(*matrix, pattern, y))
    stored = sum(a.nbytes for a in matrix)
    for launch in metal.launches:
        read = launch.counts.read
        assert sum(read[name] for name in ("packed", "scales", "biases")) <= 1.1 * stored
        assert read["packed"] == matrix[0].nbytes


def test_the_layer_is_one_launch(metal):
    layer = BlockSparseLinear(64, 96, density=0.5).to_quantized(bits=4)
    expected = mx.ones((4, 64)) @ layer.todense().T + layer.bias
    mx.eval(layer(mx.ones((4, 64))))
    assert [launch.kernel for launch in metal.launches] == ["mlx_sparse_nn_qspmm_few"]
    assert mx.allclose(layer(mx.ones((4, 64))), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_are_verified(dtype):
    model = nn.Sequential(
        BlockSparseLinear(64, 128, block_size=64, density=0.5),
        nn.ReLU(),
        BlockSparseLinear(128, 64, bias=False, density=0.5),
    )
    nn.quantize(model, bits=4, group_size=32)
    model.set_dtype(dtype)
    report = verify(model, mx.random.normal((2, 5, 64)).astype(dtype))
    assert [check.backend for check in report.checks] == ["metal", "metal", "mlx", "metal", "metal"]


@pytest.mark.parametrize("op", ["qspmm", "qspmm_t"])
def test_a_wrong_kernel_is_caught(monkeypatch, op):
    right = getattr(kernels, op)
    monkeypatch.setattr(kernels, op, lambda *args: right(*args) * (1 + 2.0**-12))
    layer = BlockSparseLinear(32, 32, density=1.0).to_quantized()
    with pytest.raises(MismatchError, match=r"on Device\(gpu, 0\), wrong[^$]* by metal"):
        verify(layer, mx.random.normal((3, 32)))
