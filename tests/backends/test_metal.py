"""The Metal path on the emulator, every launch in three schedules, against the oracle."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    assert_equal,
    check_products,
    computing,
    flatten,
    integers,
    pattern_of,
    spoiled,
    trimmed,
)

# The same tests of every transform, which run here on the kernels.
from test_transforms import TestBias, TestOneProduct  # noqa: F401

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core import edges
from mlx_sparse_nn.core.backends import choose, cpu, naive, plain

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BLOCK_SIZES = (1, 2, 3, 4, 8, 16, 32, 64, 128)
ODD_SIZES = (12, 24, 33, 48, 96, 136)  # filled up with zeros, stages of their own, strips


@pytest.fixture(autouse=True)
def _on_metal(metal):
    yield
    assert metal.launches, "the test launched no kernel"


@st.composite
def cases(draw):
    """Draw a pattern (empty rows, repeats), a number of rows of x around every tile, a dtype."""
    block = draw(st.sampled_from(BLOCK_SIZES + ODD_SIZES))
    limit = 8 if block < 8 else 4 if block < 64 else 2
    n_rows, n_cols = draw(st.integers(1, limit)), draw(st.integers(1, limit))
    row = st.lists(st.integers(0, n_cols - 1), max_size=n_cols + 1)
    rows = draw(st.lists(row, min_size=n_rows, max_size=n_rows).filter(any))
    # Edges are always at the same place: each other is one more compilation.
    below, behind = (draw(st.sampled_from([0, block // 2 | 1])) for _ in range(2))
    pattern = trimmed(pattern_of(rows, n_cols, block), below, behind)
    n = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 129])))
    return pattern, n, draw(st.sampled_from(DTYPES))


@settings(max_examples=4 * settings().max_examples)
@given(cases(), st.booleans())
def test_forward_gradients_and_second_order(metal, case, with_bias):
    pattern, n, dtype = case
    small = lambda shape, seed: mx.clip(integers(shape, seed), -1, 1).astype(dtype)
    shapes = [pattern.data_shape, (n, pattern.shape[1])]
    shapes += [(pattern.shape[0],)] * with_bias
    primals = [small(shape, i) for i, shape in enumerate(shapes)]
    primals[0] = spoiled(pattern, primals[0])
    tangents = [small(shape, i + 5) for i, shape in enumerate(shapes)]
    weights = small((n, pattern.shape[0]), 9)

    f = lambda data, x, *bias: spmm(data, pattern, x, *bias)
    loss = lambda *args: (f(*args) * weights).sum()
    grad = mx.grad(loss, argnums=tuple(range(len(primals))))
    grads, second = mx.jvp(grad, primals, tangents)
    transposed = spmm_t(primals[0], pattern, weights)
    (data, x), (d_data, d_x) = primals[:2], tangents[:2]
    expected = [
        naive.spmm(data, pattern, *primals[1:]),
        naive.spmm_t(data, pattern, weights),
        *(naive.sddmm(pattern, weights, x), naive.spmm_t(data, pattern, weights)),
        *[weights.sum(axis=0)] * with_bias,
        *(naive.sddmm(pattern, weights, d_x), naive.spmm_t(d_data, pattern, weights)),
        *[mx.zeros(shape, dtype) for shape in shapes[2:]],
    ]
    for actual, value in zip([f(*primals), transposed, *grads, *second], expected, strict=True):
        assert_equal(actual, value)


@pytest.mark.parametrize(
    ("block_size", "dtype"),
    [
        *((size, dtype) for size in BLOCK_SIZES for dtype in DTYPES),
        *((size, DTYPES[i % 3]) for i, size in enumerate(ODD_SIZES)),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 5, 12, 70])
def test_every_kernel(block_size, n, dtype):
    """Every block size, dtype and number of rows, whatever Hypothesis happens to draw."""
    pattern = CSRPattern(
        [0, 2, 2, 5, 6], [1, 0, 2, 1, 1, 2], (4 * block_size, 3 * block_size), block_size
    )
    data, x = integers(pattern.data_shape, 1, dtype), integers((n, pattern.shape[1]), 2, dtype)
    y, bias = integers((n, pattern.shape[0]), 3, dtype), integers((pattern.shape[0],), 4, dtype)
    check_products(pattern, data, x, y, bias)


@pytest.mark.parametrize("cut", [1, -1])
@pytest.mark.parametrize("block_size", [2, 3, 4, 8, 12, 16, 24, 33, 64, 136])
@pytest.mark.parametrize("n", [1, 5, 12, 70])
def test_what_lies_outside_is_masked(metal, monkeypatch, block_size, n, cut):
    """Whatever the weight holds there, be it a nan; and it is not copied for that."""
    pattern = CSRPattern(
        [0, 2, 2, 5, 6], [1, 0, 2, 1, 1, 2], (4 * block_size, 3 * block_size), block_size
    )
    pattern = trimmed(pattern, cut, -cut)
    data = spoiled(pattern, integers(pattern.data_shape, 1))
    x, y = (integers((n, size), i) for i, size in enumerate(reversed(pattern.shape), 2))
    expected = naive.spmm(data, pattern, x), naive.spmm_t(data, pattern, y)
    for name in ("clear_cols", "clear_rows"):
        monkeypatch.delattr(edges, name)
    for actual, value in zip(
        (spmm(data, pattern, x), spmm_t(data, pattern, y)), expected, strict=True
    ):
        assert_equal(actual, value)
    assert [dict(launch.template)["INSIDE"] for launch in metal.launches] == [
        size % block_size for size in reversed(pattern.shape)
    ]


@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
def test_a_heavy_row_is_shared(metal, block_size):
    """One row of thousands of values among short ones and empty ones."""
    heavy = 2500 // block_size
    indptr = np.array([0, 1, 1 + heavy, 1 + heavy, 2 + heavy])
    indices = np.concatenate([[3], np.arange(heavy), [heavy - 1]])
    pattern = CSRPattern(indptr, indices, (4 * block_size, heavy * block_size), block_size)
    data, x = integers(pattern.data_shape, 1), integers((2, pattern.shape[1]), 2)
    assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    names = dict(metal.launches[-1].template)
    assert names.get("LONG", 1) == 1
    assert names.get("GROUPS", 8) == 8


@pytest.mark.parametrize("block_size", [1, 16])
def test_many_rows_are_split_and_summed_in_order(metal, block_size):
    pattern = CSRPattern([0, 1, 3], [1, 0, 1], (2 * block_size, 2 * block_size), block_size)
    n = 1030
    y, x = integers((n, pattern.shape[0]), 1), integers((n, pattern.shape[1]), 2)
    assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))
    assert [launch.kernel for launch in metal.launches][-1].endswith("sum_splits")


def test_random_numbers_are_within_rounding(metal):
    from test_products import check_rounding

    for dtype in DTYPES:
        for block_size in (1, 4, 16, 64):
            check_rounding(block_size, dtype)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_vmap_runs_kernels(metal, in_axes):
    """The mapped product is a kernel's, and a constant product in a mapped function is right."""
    pattern = CSRPattern([0, 2, 3], [1, 0, 1], (32, 32), 16)
    data, x = integers((3, *pattern.data_shape), 1), integers((3, 5, 32), 2)
    args = [a if axis == 0 else a[0] for a, axis in zip((data, x), in_axes, strict=True)]
    constant = spmm(data[1], pattern, x[1])
    before = len(metal.launches)
    product = lambda d, z: spmm(d, pattern, z) + spmm(data[1], pattern, x[1])
    out = mx.vmap(product, in_axes)(*args)
    mx.eval(out)
    assert len(metal.launches) > before
    for i in range(3):
        pick = [a[i] if axis == 0 else a for a, axis in zip(args, in_axes, strict=True)]
        assert_equal(out[i], spmm(pick[0], pattern, pick[1]) + constant)


def test_an_offset_slice_is_read_where_it_begins():
    """x[1:] of a flat buffer arrives uncopied, at an address no vector load may assume."""
    pattern = CSRPattern([0, 2, 3], [1, 0, 1], (32, 32), 16)
    data = integers((3 * 256 + 1,), 1)[1:].reshape(3, 16, 16)
    for n in (2, 12):
        x = integers((n * 32 + 3,), 2)[3:].reshape(n, 32)
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))


def test_the_layer_is_one_launch(metal):
    layer = BlockSparseLinear(64, 96, block_size=16, density=0.3)
    mx.eval(layer(mx.ones((4, 64))))
    assert [launch.kernel for launch in metal.launches] == ["mlx_sparse_nn_spmm_few"]


def test_what_no_kernel_takes_goes_to_plain_mlx(metal):
    pattern = CSRPattern([0, 1], [0], (1, 1))
    for x in (mx.ones((2, 1), mx.complex64), mx.zeros((0, 1))):
        spmm(mx.ones(1), pattern, x)
    empty = CSRPattern([0, 0, 0], [], (2, 3))
    assert sddmm(empty, mx.ones((4, 2)), mx.ones((4, 3))).shape == (0,)
    assert_equal(spmm(mx.zeros(0), empty, mx.ones((4, 3))), mx.zeros((4, 2)))
    assert not metal.launches
    spmm(mx.ones(1), pattern, mx.ones(1))


def test_the_default_device_decides_at_each_call(metal):
    pattern = CSRPattern([0, 1], [0], (8, 8), 8)
    mx.eval(spmm(mx.ones((1, 8, 8)), pattern, mx.ones(8)))
    assert choose.choose("spmm", pattern.layout, 5, mx.float32).NAME == "metal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
        computes = choose.choose("spmm", pattern.layout, 5, mx.float32)
        assert computes is (cpu if cpu.is_available() else plain)


def test_a_layer_may_change_device_and_pattern(metal):
    """What plain MLX derives of the index arrays is that of the pattern at hand."""
    patterns = [
        pattern_of(lists, 4, 16) for lists in ([[0, 1], [2], [3, 0, 1]], [[3], [1, 2], [0, 2, 3]])
    ]
    layer = BlockSparseLinear(64, 48, patterns[0])
    twin = BlockSparseLinear(64, 48, patterns[1])
    x = integers((3, 64), 1)
    layer.weight, twin.weight = (integers(p.data_shape, i) for i, p in enumerate(patterns))
    layer.bias, twin.bias = integers((48,), 5), integers((48,), 6)

    def on_both(layer, pattern):
        expected = naive.spmm(layer.weight, pattern, x, layer.bias)
        launched = len(metal.launches)
        assert_equal(layer(x), expected)
        assert len(metal.launches) == launched + 1
        with computing(plain):
            assert_equal(layer(x), expected)
        assert len(metal.launches) == launched + 1

    on_both(layer, patterns[0])
    layer.load_weights(flatten(twin.parameters()))
    on_both(layer, patterns[1])
    layer.set_pattern(patterns[0])
    on_both(layer, patterns[0])


@pytest.mark.parametrize("block_size", [4, 7])
def test_a_row_of_x_of_fewer_than_8_elements(block_size):
    """MLX passes an input that small in constant memory, where no kernel may load a vector."""
    pattern = CSRPattern([0, 1, 2], [0, 0], (2 * block_size, block_size), block_size)
    for dtype in DTYPES:
        data, x = integers(pattern.data_shape, 1, dtype), integers((1, block_size), 2, dtype)
        y, bias = (integers((2 * block_size,), i, dtype) for i in (3, 4))
        check_products(pattern, data, x, y[None], bias)
