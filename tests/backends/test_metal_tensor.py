"""The kernel for the tensor units of an M5: right on the emulator, and off wherever it must be.

No M5 has run it. The emulator follows Apple's specification, and scatters what it leaves open.
"""

import ast
import re
import shutil

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ROOT,
    apple_gpu,
    assert_close,
    assert_equal,
    dense_of,
    fresh_launches,
    integers,
    pattern_of,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import CSRPattern, spmm, spmm_t
from mlx_sparse_nn.core.backends import launch, naive
from mlx_sparse_nn.core.backends import metal as backend
from mlx_sparse_nn.diagnostics.rounding import to_numpy

KERNEL = "mlx_sparse_nn_spmm_tensor"
DTYPES = (mx.float16, mx.bfloat16)
BLOCK_SIZES = (16, 32, 48, 64, 96, 128)
ROWS = [[1, 0], [], [2, 1, 1], [2]]  # of blocks: an empty row, a block that repeats, out of order


@pytest.fixture
def m5(metal):
    """An emulated M5 whose tensor units are on."""
    with apple_gpu(), backend.tensor_units():
        yield metal


def normal(shape, seed, dtype):
    values = np.random.default_rng(seed).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


def kernels(metal):
    return {launch.kernel for launch in metal.launches}


def check(pattern, data, x, bias=None, product=spmm):
    """Assert that a product is what float64 says, nothing of what lies outside being part of it."""
    actual = product(data, pattern, x) if bias is None else product(data, pattern, x, bias)
    assert_product(actual, pattern, data, x, bias, product)


def assert_product(actual, pattern, data, x, bias, product):
    dense = to_numpy(dense_of(pattern, data))
    dense = dense.T if product is spmm_t else dense
    x, bias = to_numpy(x), 0 if bias is None else to_numpy(bias)
    expected = x @ dense.T + bias
    longest = max(np.diff(pattern.indptr).max(), np.bincount(pattern.indices).max())
    magnitude = np.abs(x) @ np.abs(dense.T) + np.abs(bias)
    assert_close(actual, expected, int(longest) * pattern.block_size + 1, magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("n", [17, 64, 129])
def test_products(m5, block_size, n, dtype):
    pattern = pattern_of(ROWS, 3, block_size)
    data = normal(pattern.data_shape, 1, dtype)
    x, y = normal((n, pattern.shape[1]), 2, dtype), normal((n, pattern.shape[0]), 3, dtype)
    check(pattern, data, x, normal((pattern.shape[0],), 4, dtype))
    check(pattern, data, y, product=spmm_t)
    assert kernels(m5) == {KERNEL}
    assert m5.launches[0].schedules == metal_emulator.SCHEDULES


@st.composite
def cases(draw):
    """Draw a pattern (empty rows, repeats), a number of rows of x around every tile, a dtype."""
    block = draw(st.sampled_from((16, 32, 48, 96)))
    n_rows, n_cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, n_cols - 1), max_size=n_cols + 1)
    rows = draw(st.lists(row, min_size=n_rows, max_size=n_rows).filter(any))
    # Edges are always at the same place: each other is one more compilation.
    below, behind = (draw(st.sampled_from([0, block // 2 | 1])) for _ in range(2))
    n = draw(st.sampled_from([17, 31, 32, 33, 64, 65, 96, 97, 128, 130]))
    return trimmed(pattern_of(rows, n_cols, block), below, behind), n, draw(st.sampled_from(DTYPES))


@settings(max_examples=max(20, settings().max_examples // 2))
@given(cases(), st.booleans())
def test_drawn_products(m5, case, with_bias):
    """Of small whole numbers, whose sums are exact: bit for bit."""
    pattern, n, dtype = case
    shapes = (pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0]), pattern.shape[:1])
    small = (mx.clip(integers(shape, i), -1, 1).astype(dtype) for i, shape in enumerate(shapes))
    data, x, y, bias = small
    data = spoiled(pattern, data)
    rest = (bias,) * with_bias
    assert_equal(spmm(data, pattern, x, *rest), naive.spmm(data, pattern, x, *rest))
    assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    assert kernels(m5) == {KERNEL}


@pytest.mark.parametrize("block_size", [80, 112])
def test_sizes_that_32_does_not_divide(m5, block_size):
    pattern = pattern_of(ROWS, 3, block_size)
    data, x = (
        normal(shape, 1, mx.bfloat16) for shape in (pattern.data_shape, (70, 3 * block_size))
    )
    check(pattern, data, x)
    assert kernels(m5) == {KERNEL}


@pytest.mark.parametrize("cut", [1, 7, -1])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_lies_outside_is_not_read(m5, block_size, cut):
    """Be it a nan: zero times that would be a nan in rows that the user sees."""
    pattern = trimmed(pattern_of(ROWS, 3, block_size), cut, -cut)
    data = spoiled(pattern, normal(pattern.data_shape, 1, mx.float16))
    x, y = (normal((40, size), i, mx.float16) for i, size in enumerate(reversed(pattern.shape)))
    check(pattern, data, x, normal((pattern.shape[0],), 4, mx.float16))
    check(pattern, data, y, product=spmm_t)
    assert kernels(m5) == {KERNEL}


@pytest.mark.parametrize("skip", [1, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_that_begin_at_any_element(m5, dtype, skip):
    """MLX hands slices over uncopied: none is aligned to more than an element."""
    pattern = pattern_of(ROWS, 3, 32)

    def placed(shape, seed):
        return normal((skip + np.prod(shape),), seed, dtype)[skip:].reshape(shape)

    data, bias = placed(pattern.data_shape, 1), placed((pattern.shape[0],), 4)
    check(pattern, data, placed((40, pattern.shape[1]), 2), bias)
    check(pattern, data, placed((40, pattern.shape[0]), 3), product=spmm_t)
    assert kernels(m5) == {KERNEL}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_that_share_a_pattern(m5, dtype):
    pattern = trimmed(pattern_of(ROWS, 3, 32), 3, 5)
    data = mx.stack([integers(pattern.data_shape, i, dtype) for i in range(3)])
    x, y = (integers((3, 33, size), i, dtype) for i, size in enumerate(reversed(pattern.shape)))
    for product, operand in ((spmm, x), (spmm_t, y)):
        actual = mx.vmap(lambda d, z, f=product: f(d, pattern, z))(data, operand)
        oracle = getattr(naive, product.__name__)
        for v in range(3):
            assert_equal(actual[v], oracle(data[v], pattern, operand[v]))
    assert kernels(m5) == {KERNEL}
    assert m5.launches[0].grid[2] == 3


def test_gradients(m5):
    """A training step asks for the transpose; sddmm is not for the tensor units."""
    pattern = random_pattern(4, 3, 16, seed=1)
    data, x = (
        integers(shape, i, mx.float16) for i, shape in enumerate((pattern.data_shape, (40, 48)))
    )
    weights = integers((40, 64), 3, mx.float16)
    loss = lambda data, x: (spmm(data, pattern, x) * weights).sum()
    d_data, d_x = mx.grad(loss, argnums=(0, 1))(data, x)
    assert_equal(d_data, naive.sddmm(pattern, weights, x))
    assert_equal(d_x, naive.spmm_t(data, pattern, weights))
    assert {name for name in kernels(m5) if "spmm" in name} == {KERNEL}


def test_bytes_of_a_product(m5):
    """A simdgroup reads each part once: .125 bytes a multiply-accumulate, as MLX's own tiles do."""
    m5.count = True
    pattern = pattern_of([[0, 1]], 2, 64)
    data, x = mx.ones(pattern.data_shape, mx.float16), mx.ones((64, 128), mx.float16)
    mx.eval(spmm(data, pattern, x))
    counts = m5.launches[-1].counts
    assert counts.read["data"] == 2 * data.nbytes  # for each 32 rows
    assert counts.read["x"] == 2 * x.nbytes  # for each 32 outputs
    assert counts.macs == 64 * 64 * 128
    assert counts.barriers == counts.threadgroup_memory == 0


FAULTS = {
    "columns outside are multiplied": ("min(B, n_inside - col)", "B"),
    "K is static": ("static_cast<int>(DEPTH)", "B"),
    "all tiles are taken for whole": ("WHOLE ? TILE : dynamic_extent", "TILE"),
    "sums begin with anything": ("acc[i] = 0.0f;", ""),
    "sums begin anew": ("mode::multiply_accumulate", "mode::multiply"),
    "rows past the last are stored": ("n < N)", "n < N + 1)"),
    "simdgroups past the last row go on": ("if (n0 >= N)", "if (n0 > N + B)"),
    "outputs and rows change places": ("at[0];", "at[1];"),
    "the elements of a thread are taken for a row": (
        "const int n = n0 + at[1];",
        "const int n = n0 + (at[1] & 0) + thread_index_in_simdgroup;",
    ),
    "slots that hold nothing are read": ("if (acc.is_valid_element(i)) {", "{"),
    "blocks are not transposed": ("!TRANSPOSED, false,", "false, false,"),
    "the second simdgroup takes the first one's outputs": ("(TRANSPOSED ? o0 : o0 * B)", "0"),
    "rows of x are those of the last matrix": (
        "(size_t)v * N + n0) * n_cols",
        "size_t(n0)) * n_cols",
    ),
    "all simdgroups at once": ("form, execution_simdgroup>", "form, execution_simdgroups<3>>"),
    "some lanes alone": ("  product.run(", "  if (thread_index_in_simdgroup < 31) product.run("),
    "each lane its own rows": (
        "(x_panel + col)",
        "(x_panel + col + thread_index_in_simdgroup % 2)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(m5, monkeypatch, tmp_path, fault):
    """What a slip of the pen would break is seen here, since no M5 is."""
    old, new = FAULTS[fault]
    shutil.copytree(ROOT / "mlx_sparse_nn" / "metal", tmp_path / "metal")
    file = tmp_path / "metal" / "spmm_tensor.metal"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    pattern = trimmed(pattern_of(ROWS, 3, 96), 3, 5)
    data = spoiled(pattern, normal(pattern.data_shape, 1, mx.float16))
    data = mx.stack([mx.zeros_like(data), data])
    x, y = (normal((2, 70, size), i, mx.float16) for i, size in enumerate(reversed(pattern.shape)))

    def products():
        for product, z in ((spmm, x), (spmm_t, y)):
            actual = mx.vmap(lambda d, z, f=product: f(d, pattern, z))(data, z)
            assert_product(actual[1], pattern, data[1], z[1], None, product)

    with fresh_launches(), monkeypatch.context() as patch:
        patch.setattr(launch, "_PACKAGE", tmp_path)
        with pytest.raises((metal_emulator.MetalFault, AssertionError)):
            products()


# Where it is chosen


def product_of(n=40, block_size=16, dtype=mx.float16):
    pattern = CSRPattern([0, 1], [0], (block_size, block_size), block_size)
    x = mx.ones((n, block_size), dtype)
    mx.eval(spmm(mx.ones(pattern.data_shape, dtype), pattern, x))


def test_off_by_default(metal):
    with apple_gpu():
        product_of()
    assert KERNEL not in kernels(metal)


@pytest.mark.parametrize(
    ("architecture", "macos", "has"),
    [
        ("applegpu_g17g", "26.2", True),  # M5
        ("applegpu_g17s", "26.4.1", True),
        ("applegpu_g18d", "27.0", True),
        ("applegpu_g17s", "16.2", True),  # what a Python of before macOS 26 is told of 26.2
        ("applegpu_g17s", "26.1", False),
        ("applegpu_g17s", "26", False),
        ("applegpu_g17s", "15.7", False),
        ("applegpu_g17s", "", False),
        ("applegpu_g16s", "26.2", False),  # M4
        ("applegpu_g17p", "26.2", False),  # of a phone
        ("applegpu_g18p", "26.2", True),
        ("x86_64", "26.2", False),
    ],
)
def test_machines(metal, architecture, macos, has):
    """As MLX decides for its own products."""
    with apple_gpu(architecture, macos):
        assert backend.has_tensor_units() is has
        if not has:
            with pytest.raises(RuntimeError, match=r"\[tensor_units\].*M5 or later.*macOS 26\.2"):
                backend.tensor_units()
            product_of()
            assert KERNEL not in kernels(metal)
            return
        with backend.tensor_units():
            product_of()
        assert KERNEL in kernels(metal)
        metal.launches.clear()
        product_of()  # off again
        assert KERNEL not in kernels(metal)


def test_without_metal_there_are_none():
    with apple_gpu():
        assert not backend.has_tensor_units()


@pytest.mark.parametrize(
    ("suits", "kwargs"),
    [
        (True, {"n": 17}),
        (False, {"n": 16}),
        (False, {"dtype": mx.float32}),  # the tensor units would round it to TF32
        (False, {"block_size": 8}),
        (False, {"block_size": 24}),
        (False, {"block_size": 144}),
        (True, {"block_size": 128, "dtype": mx.bfloat16}),
    ],
)
def test_products_that_suit(m5, suits, kwargs):
    product_of(**kwargs)
    assert (KERNEL in kernels(m5)) is suits


def test_no_more_threads_than_a_threadgroup_may_have(m5):
    for block_size in range(16, 129, 16):
        product_of(n=200, block_size=block_size)
        threads = m5.launches[-1].threadgroup[0]
        assert threads % 32 == 0
        assert threads <= 512


def test_older_systems_say_what_is_missing(m5):
    """Were it ever chosen there: an error of the compiler, not wrong numbers."""
    m5.metal_version = 320
    with pytest.raises(metal_emulator.CompileError, match="tensor units need Metal 4"):
        product_of()


def test_only_the_check_turns_them_on():
    """Nothing else in the package enters the context, and no result says yet that it may."""
    callers = []
    for path in (ROOT / "mlx_sparse_nn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("tensor_units"):
                name = re.sub(r".*\.", "", ast.unparse(node.func))
                callers += [path.stem] * (name == "tensor_units")
    assert set(callers) <= {"check"}
    assert not backend._tensor_units
