"""qspmm and qspmm_t: quantized blocks beside the oracle, and every transform beside dense MLX.

Scales are -1, 0 or 1 and biases take the integers towards zero, so that every value is a whole
number that bfloat16 holds. Sums are then exact, and the comparison is for equality.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_close,
    assert_equal,
    dense_weight,
    integers,
    pattern_of,
    random_pattern,
    to_numpy,
)

from mlx_sparse_nn import CSRPattern, qspmm, qspmm_t
from mlx_sparse_nn.core.backends import choose, naive, plain
from mlx_sparse_nn.core.quantized import BITS, GROUP_SIZES, dequantize, unpack

FORMATS = [(32, 32), (64, 32), (64, 64), (96, 32), (128, 32), (128, 128)]


Matrix = tuple[mx.array, mx.array, mx.array]


def whole_blocks(
    pattern: CSRPattern, group_size: int, bits: int, lead=(), dtype=mx.float32, seed=0
) -> Matrix:
    """Return packed, scales and biases of random whole numbers, ``(*lead, n_blocks, ...)``."""
    rng, size = np.random.default_rng(seed), pattern.block_size
    shape = (*lead, pattern.n_blocks, size)
    if 0 in shape:
        affine = mx.zeros((*shape, size // group_size), dtype)
        return mx.zeros((*shape, size * bits // 32), mx.uint32), affine, affine
    packed = rng.integers(0, 2**32, (*shape, size * bits // 32), dtype=np.uint32)
    scales = rng.integers(-1, 2, (*shape, size // group_size)).astype(np.float32)
    biases = -scales * rng.integers(0, 4, scales.shape)
    return mx.array(packed), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)


@st.composite
def patterns(draw):
    """Unsorted and repeated columns, empty rows, 0 rows or columns, of blocks with a packing."""
    block_size, group_size = draw(st.sampled_from([f for f in FORMATS if f[0] <= 96]))
    n_rows, n_cols = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    row = st.lists(st.integers(0, max(0, n_cols - 1)), max_size=6 if n_cols else 0)
    rows = draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    return pattern_of(rows, n_cols, block_size), group_size


@given(
    patterns(),
    st.sampled_from(BITS),
    st.integers(0, 40),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.sampled_from([(), (3,)]),
)
def test_every_backend_is_the_oracle(drawn, bits, n, dtype, v):
    pattern, group_size = drawn
    matrix = whole_blocks(pattern, group_size, bits, v, dtype)
    x, y = (integers((*v, n, size), i, dtype) for i, size in enumerate(pattern.shape[::-1]))
    bias, layout = integers(pattern.shape[:1], 4, dtype), pattern.layout
    chosen = choose.choose("qspmm", layout, n, dtype, *v, bits=bits)
    for backend in {plain, chosen}:
        y_of = backend.qspmm
        assert_equal(y_of(*matrix, layout, x, bias), naive.qspmm(*matrix, pattern, x, bias))
        assert_equal(y_of(*matrix, layout, x), naive.qspmm(*matrix, pattern, x))
        x_found = backend.qspmm_t(*matrix, layout, y)
        assert_equal(x_found, naive.qspmm_t(*matrix, pattern, y))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("block_size", "group_size"), FORMATS)
@pytest.mark.parametrize("n", [1, 2, 5, 9, 33])
def test_the_products_are_the_oracle_s(block_size, group_size, bits, n):
    pattern = random_pattern(5, 4, block_size, seed=block_size)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        matrix = whole_blocks(pattern, group_size, bits, (), dtype, bits)
        x, y = (integers((n, size), i, dtype) for i, size in enumerate(pattern.shape[::-1]))
        bias = integers(pattern.shape[:1], 4, dtype)
        assert_equal(qspmm(*matrix, pattern, x, bias), naive.qspmm(*matrix, pattern, x, bias))
        assert_equal(qspmm(*matrix, pattern, x), naive.qspmm(*matrix, pattern, x))
        assert_equal(qspmm_t(*matrix, pattern, y), naive.qspmm_t(*matrix, pattern, y))


@pytest.mark.parametrize("bits", BITS)
def test_numpy_unpacks_what_mlx_packs(bits):
    """The oracle's own reading of the format, beside ``mx.dequantize``."""
    w = mx.random.normal((3, 64, 64))
    for group_size in GROUP_SIZES[:2]:
        packed, scales, biases = mx.quantize(w, group_size, bits)
        zeros, ones = mx.zeros(scales.shape), mx.ones(scales.shape)
        assert (unpack(packed) == np.array(dequantize(packed, ones, zeros))).all()
        assert (np.array(dequantize(packed, scales, biases)) != 0).any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("n", [1, 4, 40])
def test_quantized_weights_are_within_rounding(n, dtype):
    """What ``mx.quantize`` makes of normal numbers, in every number of bits."""
    pattern = random_pattern(5, 4, 64, density=0.8)
    data = mx.random.normal(pattern.data_shape).astype(dtype)
    x = mx.random.normal((n, pattern.shape[1])).astype(dtype)
    y = mx.random.normal((n, pattern.shape[0])).astype(dtype)
    x64, y64 = to_numpy(x), to_numpy(y)
    for bits in BITS:
        packed, scales, biases = mx.quantize(data, 32, bits)
        repeat = lambda a: np.repeat(to_numpy(a), 32, axis=-1)
        scaled, added = repeat(scales) * unpack(packed), repeat(biases)
        dense, size = (
            to_numpy(naive.dense(mx.array(a.astype(np.float32)), pattern))
            for a in (scaled + added, abs(scaled) + abs(added))
        )
        length = max(pattern.shape)
        y_found = qspmm(packed, scales, biases, pattern, x)
        assert_close(y_found, x64 @ dense.T, length, abs(x64) @ size.T)
        x_found = qspmm_t(packed, scales, biases, pattern, y)
        assert_close(x_found, y64 @ dense, length, abs(y64) @ size)


@pytest.mark.parametrize(
    ("scales", "x", "result"),
    [
        (mx.float32, mx.bfloat16, mx.float32),
        (mx.float16, mx.float32, mx.float32),
        (mx.bfloat16, mx.float16, mx.float32),
        (mx.float16, mx.int32, mx.float16),
        (mx.bfloat16, mx.bfloat16, mx.bfloat16),
    ],
)
def test_dtypes_promote_as_in_mlx_s_quantized_matmul(scales, x, result):
    pattern = CSRPattern([0, 1], [0], (32, 32), 32)
    packed, scale, bias = mx.quantize(mx.random.normal((1, 32, 32)), 32, 4)
    scale, bias = scale.astype(scales), bias.astype(scales)
    x = integers((3, 32), 1).astype(x)
    y = qspmm(packed, scale, bias, pattern, x)
    assert y.dtype == result
    assert qspmm_t(packed, scale, bias, pattern, x).dtype == result
    by_mlx = mx.quantized_matmul(x, packed[0], scale[0], bias[0], group_size=32, bits=4)
    assert by_mlx.dtype == result
    assert mx.allclose(y, by_mlx, rtol=2e-2, atol=0.3)  # it sums in 16 bits on the CPU


def test_a_bias_of_a_wider_dtype_promotes():
    pattern = random_pattern(2, 2, 32, density=1.0)
    matrix = whole_blocks(pattern, 32, 4, dtype=mx.bfloat16)
    x, bias = integers((3, 64), 1, mx.bfloat16), integers((64,), 2)
    y = qspmm(*matrix, pattern, x, bias)
    assert y.dtype == mx.float32
    assert_equal(y, qspmm(*matrix, pattern, x) + bias)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (2, 0, 3)])
def test_leading_axes(leading):
    pattern = random_pattern(3, 2, 32, density=0.8)
    matrix = whole_blocks(pattern, 32, 5)
    x, y = (integers((*leading, size), 1) for size in pattern.shape[::-1])
    assert_equal(qspmm(*matrix, pattern, x), naive.qspmm(*matrix, pattern, x))
    assert_equal(qspmm_t(*matrix, pattern, y), naive.qspmm_t(*matrix, pattern, y))


def test_16_bits_accumulate_in_float32():
    pattern = CSRPattern([0, 32], np.arange(32), (32, 1024), 32)
    packed = mx.full((32, 32, 4), 0x11111111, mx.uint32)  # ones of 4 bits
    for dtype in (mx.float16, mx.bfloat16):
        scales = mx.ones((32, 32, 1), dtype)
        x = mx.ones((1, 1024), dtype)
        assert (qspmm(packed, scales, 0 * scales, pattern, x) == 1024).all()


# Transforms. Functions of scales, biases, x and bias; packed is a constant.

PATTERN = random_pattern(3, 2, 32, density=0.8, seed=3)
PACKED = whole_blocks(PATTERN, 32, 3)[0]


def dense_matrix(scales, biases):
    """The dense matrix by MLX's own dequantization."""
    return dense_weight(PATTERN, mx.dequantize(PACKED, scales, biases, 32, 3))


FUNCTIONS = {
    "qspmm": (
        lambda s, b, x: qspmm(PACKED, s, b, PATTERN, x),
        lambda s, b, x: x @ dense_matrix(s, b).T,
    ),
    "qspmm_t": (
        lambda s, b, y: qspmm_t(PACKED, s, b, PATTERN, y),
        lambda s, b, y: y @ dense_matrix(s, b),
    ),
    "bias": (
        lambda s, b, x, bias: qspmm(PACKED, s, b, PATTERN, x, bias),
        lambda s, b, x, bias: x @ dense_matrix(s, b).T + bias,
    ),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def operands(name, seed=0, batch=()):
    width = PATTERN.shape[0 if name == "qspmm_t" else 1]
    shape = (*batch, PATTERN.n_blocks, 32, 1)
    found = [
        integers(shape, seed),
        integers(shape, seed + 1),
        integers((*batch, 3, width), seed + 2),
    ]
    return found + ([integers((*batch, PATTERN.shape[0]), seed + 3)] if name == "bias" else [])


def check(transform, name, *args):
    """Assert that a transform gives the arrays of dense MLX, plain and compiled."""
    ours, dense = FUNCTIONS[name]
    expected = flat(transform(dense)(*args))
    for f in (transform(ours), mx.compile(transform(ours))):
        actual = flat(f(*args))
        for a, b in zip(actual, expected, strict=True):
            assert_equal(a, b)


def flat(tree):
    return [tree] if isinstance(tree, mx.array) else [a for branch in tree for a in flat(branch)]


@every_function
@pytest.mark.usefixtures("each_backend")
class TestTransforms:
    def test_grad(self, name):
        args = operands(name)
        loss = lambda f: lambda *args: (f(*args) ** 2).sum()
        for argnums in (*range(len(args)), tuple(range(len(args)))):
            check(lambda f, n=argnums: mx.value_and_grad(loss(f), argnums=n), name, *args)

    def test_jvp(self, name):
        args, tangents = operands(name), operands(name, seed=5)
        check(lambda f: lambda *a: mx.jvp(f, list(a), tangents), name, *args)
        for i in range(len(args)):

            def along(f, i=i):
                def jvp(*args):
                    one = lambda a: f(*args[:i], a, *args[i + 1 :])
                    return mx.jvp(one, [args[i]], [tangents[i]])

                return jvp

            check(along, name, *args)

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_vmap(self, name, axis):
        batched, single = operands(name, batch=(2,)), operands(name)
        n = len(batched)
        for mapped in [(i,) for i in range(n)] + [(0, 1), (0, 2), (2, n - 1), tuple(range(n))]:
            args = [
                mx.moveaxis(batched[i], 0, axis) if i in mapped else single[i] for i in range(n)
            ]
            in_axes = tuple(axis if i in mapped else None for i in range(n))
            check(lambda f, axes=in_axes: mx.vmap(f, axes, 1), name, *args)

    def test_vmap_of_grad_grad_of_vmap_and_nested_vmap(self, name):
        args, n = operands(name, batch=(2,)), len(operands(name))
        loss = lambda f: lambda *args: (f(*args) ** 2).sum()
        every = tuple(range(n))
        check(lambda f: mx.vmap(mx.grad(loss(f), argnums=every)), name, *args)
        check(lambda f: mx.grad(loss(mx.vmap(f)), argnums=every), name, *args)
        check(lambda f: mx.vmap(mx.vmap(f)), name, *operands(name, batch=(2, 2)))

    def test_second_order(self, name):
        args, tangents = operands(name), operands(name, seed=5)
        every = tuple(range(len(args)))
        grad = lambda f: mx.grad(lambda *args: (f(*args) ** 2).sum(), argnums=every)
        check(lambda f: lambda *args: mx.jvp(grad(f), list(args), tangents), name, *args)

        def along(f):
            def inner(*args):
                return sum(
                    ((g * t).sum() for g, t in zip(grad(f)(*args), tangents, strict=True)),
                    mx.array(0),
                )

            return mx.grad(inner, argnums=every)

        check(along, name, *args)

    def test_gradients_have_the_dtypes_of_their_operands(self, name):
        args = [a.astype(mx.bfloat16) if i < 2 else a for i, a in enumerate(operands(name))]
        loss = lambda *args: FUNCTIONS[name][0](*args).sum()
        grads = mx.grad(loss, argnums=tuple(range(len(args))))(*args)
        assert [g.dtype for g in grads] == [a.dtype for a in args]


def test_packed_integers_are_mapped_too():
    packed, scales, biases = whole_blocks(PATTERN, 32, 6, (2,))
    x = integers((3, PATTERN.shape[1]), 1)
    y = mx.vmap(lambda p, s, b: qspmm(p, s, b, PATTERN, x))(packed, scales, biases)
    for i in range(2):
        assert_equal(y[i], qspmm(packed[i], scales[i], biases[i], PATTERN, x))


@pytest.mark.parametrize("product", [qspmm, qspmm_t])
def test_packed_integers_have_no_derivative(product):
    """``mx.quantized_matmul`` raises there as well."""
    packed, scales, biases = whole_blocks(PATTERN, 32, 3)
    x = mx.ones((2, PATTERN.shape[0 if product is qspmm_t else 1]))
    f = lambda packed: product(packed, scales, biases, PATTERN, x).sum()
    with pytest.raises(ValueError, match=r"\[qspmm\] packed has no derivative"):
        mx.grad(f)(packed)
    with pytest.raises(ValueError, match=r"\[qspmm\] packed has no derivative"):
        mx.jvp(f, [packed], [packed])


def test_a_pattern_without_blocks_has_gradients():
    pattern = CSRPattern([0, 0], [], (32, 64), 32)
    packed, scales, biases = whole_blocks(pattern, 32, 4)
    f = lambda s, b, x, bias: (qspmm(packed, s, b, pattern, x, bias) ** 2).sum()
    args = scales, biases, mx.ones((2, 64)), mx.ones(32)
    grads = mx.grad(f, argnums=(0, 1, 2, 3))(*args)
    for grad, value in zip(
        grads, (scales, biases, mx.zeros((2, 64)), mx.full(32, 4.0)), strict=True
    ):
        assert_equal(grad, value)


def test_the_peak_of_memory_is_far_below_the_dequantized_blocks():
    """A step at a time: never all blocks in float32."""
    pattern = CSRPattern(
        np.arange(33) * 16, np.tile(np.arange(16), 32), (2048, 1024), 64
    )  # 8 MB in float32
    matrix = whole_blocks(pattern, 64, 4)
    with mx.stream(mx.cpu):
        for n in (1, 16):
            x = integers((n, 1024), 1)
            mx.eval(matrix, x, qspmm(*matrix, pattern, x))
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(qspmm(*matrix, pattern, x))
            assert mx.get_peak_memory() - before < 6e6
