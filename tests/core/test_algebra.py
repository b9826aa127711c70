"""Sums and products of sparse arrays: values against SciPy, derivatives against dense MLX."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    dense_of,
    integers,
    patterns,
    random_pattern,
    spoiled,
    to_numpy,
    untyped,
)

from mlx_sparse_nn import (
    COOArray,
    CSRArray,
    CSRPattern,
    coo_array,
    csr_array,
    from_dense,
    from_scipy,
    sddmm,
    to_scipy,
)
from mlx_sparse_nn.core import algebra
from mlx_sparse_nn.core.backends import choose

DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.complex64, mx.int32, mx.bool_)


@st.composite
def arrays(draw, shape=None, dtype=mx.float32, block_sizes=(1, 2, 4)):
    pattern = draw(patterns(block_sizes=block_sizes))
    if shape is not None:  # the same entries, folded into the shape
        block = draw(st.sampled_from(block_sizes))
        grid = [-(-n // block) for n in shape]
        count = draw(st.integers(0, 9)) if all(grid) else 0
        places = draw(
            st.lists(st.integers(0, max(0, grid[0] * grid[1] - 1)), min_size=count, max_size=count)
        )
        pattern = CSRPattern.from_places(places, shape, block)
    data = integers(pattern.data_shape, draw(st.integers(0, 9)), dtype)
    return CSRArray(spoiled(pattern, data) if mx.issubdtype(dtype, mx.inexact) else data, pattern)


@st.composite
def pairs(draw, product=False):
    a = draw(arrays())
    shape = (a.shape[1], draw(st.integers(0, 9))) if product else a.shape
    return a, draw(arrays(shape))


def dense(a) -> np.ndarray:
    return to_numpy(dense_of(a.pattern, a.data))


def same(a: CSRArray, expected: np.ndarray) -> None:
    assert np.array_equal(to_numpy(a.todense()), expected)


@given(pairs())
def test_sums_and_differences(ab):
    a, b = ab
    for found, expected in (
        (a + b, dense(a) + dense(b)),
        (a - b, dense(a) - dense(b)),
        (b + a, dense(b) + dense(a)),
        (sum([a, b, a]), 2 * dense(a) + dense(b)),
        (+a - b.tocoo(), dense(a) - dense(b)),
        (b.tocoo() - a, dense(b) - dense(a)),
    ):
        assert isinstance(found, CSRArray)
        same(found, expected)


@given(pairs())
def test_elementwise_products(ab):
    a, b = ab
    same(a * b, dense(a) * dense(b))
    same(a.multiply(b.tocoo()), dense(a) * dense(b))
    same(a.tocoo() * b, dense(a) * dense(b))


@contextmanager
def multiplied_by(kind):
    """By C++, which takes the product of two sparse matrices on a CPU, or by MLX's operations."""
    with (
        nullcontext()
        if kind == "C++"
        else mock.patch.object(choose, "takes_spgemm", return_value=False)
    ):
        yield


KINDS = pytest.mark.parametrize("kind", ["C++", "MLX"])


@KINDS
@given(ab=pairs(product=True))
def test_products_of_two_sparse_matrices(kind, ab):
    a, b = ab
    with multiplied_by(kind):
        product = a @ b
        same(product, dense(a) @ dense(b))
        same(a.tocoo() @ b.tocoo(), dense(a) @ dense(b))
    assert isinstance(product, CSRArray)
    assert product.pattern.is_canonical


@given(arrays(), st.integers(0, 3))
def test_dense_arrays_broadcast(a, seed):
    n_rows, n_cols = a.shape
    for shape in ((n_rows, n_cols), (n_rows, 1), (1, n_cols), (n_cols,), (1, 1)):
        d = integers(shape, seed)
        divisor = 2.0**d  # quotients are exact
        same(a * d, dense(a) * to_numpy(d))
        same(d * a, dense(a) * to_numpy(d))
        same(to_numpy(d) * a, dense(a) * to_numpy(d))
        same(a / divisor, dense(a) / to_numpy(divisor))
    d = integers((n_rows, n_cols), seed)
    for found, expected in (
        (a + d, dense(a) + to_numpy(d)),
        (d + a, dense(a) + to_numpy(d)),
        (d - a, to_numpy(d) - dense(a)),
        (to_numpy(d) - a, to_numpy(d) - dense(a)),
        (a - d, dense(a) - to_numpy(d)),
    ):
        assert isinstance(found, mx.array)
        assert np.array_equal(to_numpy(found), expected)


@pytest.mark.parametrize(
    "scalar", [2, 2.0, np.float32(2), np.float64(2), np.array(2.0), mx.array(2.0)], ids=repr
)
def test_scalars_of_every_kind(scalar):
    pattern = random_pattern(4, 4, 1, seed=1)
    a = CSRArray(integers(pattern.data_shape, 1), pattern)
    for found in (a * scalar, scalar * a, a.multiply(scalar)):
        assert found.dtype == mx.float32
        same(found, dense(a) * 2)
    same(a / scalar, dense(a) / 2)
    half = a.astype(mx.float16)
    if not isinstance(scalar, mx.array):  # whose dtype counts
        assert (half * scalar).dtype == (half / scalar).dtype == mx.float16


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [(dtype, block) for dtype in DTYPES for block in (1, 2) if dtype != mx.complex64 or block == 1],
    ids=str,
)
def test_every_dtype(dtype, block_size):
    a, b = (
        CSRArray(integers(p.data_shape, i, dtype), p)
        for i, p in enumerate(random_pattern(4, 4, block_size, seed=i) for i in (1, 2))
    )
    for found, expected in ((a + b, dense(a) + dense(b)), (a * b, dense(a) * dense(b))):
        assert found.dtype == dtype
        same(found, expected.astype(bool) if dtype == mx.bool_ else expected)
    product = a @ b
    assert product.dtype == dtype
    expected = dense(a) @ dense(b)
    same(product, expected.astype(bool) if dtype == mx.bool_ else expected)


def test_dtypes_are_promoted():
    pattern, other = (random_pattern(3, 3, 1, seed=i) for i in (1, 2))
    a = CSRArray(integers(pattern.data_shape, 1, mx.float16), pattern)
    b = CSRArray(integers(other.data_shape, 2, mx.float32), other)
    assert (a + b).dtype == (a * b).dtype == (a @ b).dtype == mx.float32


def test_half_precision_adds_up_in_float32():
    row = csr_array(([1.0] + [2.0**-10] * 64, np.arange(65), [0, 65]), shape=(1, 65))
    ones = csr_array((np.ones(65), np.zeros(65, int), np.arange(66)), shape=(65, 1))
    product = row.astype(mx.float16) @ ones.astype(mx.float16)
    assert product.todense().item() == 1 + 64 * 2.0**-10


def second_order(f, argnum, a, b):
    def directional(a, b):
        return (mx.grad(f, argnum)(a, b) * (a, b)[argnum]).sum()

    return mx.grad(directional, argnum)(a, b)


OPERATIONS = {
    "A + B": (lambda a, b: a + b, lambda a, b: a + b),
    "A - B": (lambda a, b: a - b, lambda a, b: a - b),
    "A * B": (lambda a, b: a * b, lambda a, b: a * b),
    "A @ B": (lambda a, b: a @ b, lambda a, b: a @ b),
    "A.T @ A": (lambda a, b: a.T @ a + b, lambda a, b: a.T @ a + b),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "C++") for name in OPERATIONS] + [("A @ B", "MLX"), ("A.T @ A", "MLX")],
)
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_derivatives_of_every_order(name, kind, block_size):
    with multiplied_by(kind):
        check_derivatives(name, block_size)


def check_derivatives(name, block_size):
    patterns = [random_pattern(4, 4, block_size, seed=i) for i in (1, 2)]
    a, b = (integers(p.data_shape, i) for i, p in enumerate(patterns))
    of_sparse, of_dense = OPERATIONS[name]
    weight = integers((4 * block_size, 4 * block_size), 3)

    def sparse_loss(a, b):
        return (
            (of_sparse(CSRArray(a, patterns[0]), CSRArray(b, patterns[1]))).todense() ** 2 * weight
        ).sum()

    def dense_loss(a, b):
        a, b = (CSRArray(v, p).todense() for v, p in zip((a, b), patterns, strict=True))
        return (of_dense(a, b) ** 2 * weight).sum()

    assert_equal(sparse_loss(a, b), dense_loss(a, b))
    for argnum in (0, 1):
        found, expected = (mx.grad(f, argnum)(a, b) for f in (sparse_loss, dense_loss))
        assert_equal(found, expected)
        assert_equal(*(second_order(f, argnum, a, b) for f in (sparse_loss, dense_loss)))
    tangents = [integers(v.shape, 7 + i) for i, v in enumerate((a, b))]
    found, expected = (mx.jvp(f, [a, b], tangents)[1][0] for f in (sparse_loss, dense_loss))
    assert_equal(found, expected)
    batch = mx.stack([a, 2 * a])
    found, expected = (mx.vmap(f, (0, None))(batch, b) for f in (sparse_loss, dense_loss))
    assert_equal(found, expected)
    assert_equal(mx.compile(sparse_loss)(a, b), dense_loss(a, b))
    assert_equal(mx.compile(mx.grad(sparse_loss))(a, b), mx.grad(dense_loss)(a, b))


@pytest.mark.parametrize("shape", [(6, 8), (6, 1), (1, 8)])
@pytest.mark.parametrize("block_size", [1, 2])
def test_derivatives_by_a_dense_factor(shape, block_size):
    pattern = random_pattern(6 // block_size, 8 // block_size, block_size, seed=3)
    a, d = integers(pattern.data_shape, 1), integers(shape, 2)

    def sparse_loss(a, d):
        return ((CSRArray(a, pattern) * d).todense() ** 3).sum()

    def dense_loss(a, d):
        return ((CSRArray(a, pattern).todense() * d) ** 3).sum()

    for argnum in (0, 1):
        found, expected = (mx.grad(f, argnum)(a, d) for f in (sparse_loss, dense_loss))
        assert_equal(found, expected)
    assert_equal(*(second_order(f, 1, a, d) for f in (sparse_loss, dense_loss)))


def test_plans_are_kept_and_let_go():
    a, b = (
        CSRArray(integers(p.data_shape), p)
        for p in (random_pattern(5, 5, 1, seed=i) for i in (1, 2))
    )
    assert (a @ b).pattern is (a @ b).pattern
    assert (a + b).pattern is (a + b).pattern
    kept = algebra._pairs(a.pattern, b.pattern)
    del a, b
    gc.collect()
    assert len(gc.get_referrers(kept)) <= 1  # this function's own


@pytest.mark.parametrize(
    "use",
    [
        lambda a: a + a.T,
        lambda a: a @ a,
        lambda a: a * a.T,
        lambda a: a.max(),
        lambda a: a.argmax(1),
        lambda a: a.sum(0),
        lambda a: a.maximum(a.T),
        lambda a: a[1] @ a,
        lambda a: a[a > 0],
        lambda a: a.tril().reshape(-1),
        lambda a: a.tocsr().canonical().T,
        lambda a: mx.grad(lambda data: (CSRArray(data, a.pattern) @ a).sum())(a.data),
    ],
)
def test_no_plan_keeps_a_pattern_alive(use):
    pattern = random_pattern(5, 5, 2, seed=1)
    use(CSRArray(integers(pattern.data_shape), pattern))
    alive = weakref.ref(pattern)
    del pattern
    gc.collect()
    assert alive() is None


def test_galerkin_product_and_powers():
    rng = np.random.default_rng(0)
    a = sp.random_array((40, 40), density=0.1, rng=rng, dtype=np.float32, format="csr")
    p = sp.random_array((40, 10), density=0.2, rng=rng, dtype=np.float32, format="csr")
    A, P = from_scipy(a), from_scipy(p)
    expected = (p.T @ a @ p).toarray()
    assert np.allclose(to_numpy((P.T @ A @ P).todense()), expected, atol=1e-5)
    assert np.allclose(to_numpy((A @ A @ A).todense()), (a @ a @ a).toarray(), atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4])
def test_products_that_are_shared_by_threads(block_size):
    """And their gradients, of rows that are much longer than others."""
    rng, n = np.random.default_rng(0), 3000 // block_size
    counts = np.where(np.arange(n) % 50 == 0, 200, 8)
    rows = np.repeat(np.arange(n), counts)
    places = np.unique(rows * np.int64(n) + rng.integers(0, n, rows.size))
    pattern = CSRPattern.from_places(places, (n * block_size,) * 2, block_size)
    a, b = (integers(pattern.data_shape, i) for i in (1, 2))
    A, B = (to_scipy(CSRArray(v, pattern)).tocsr() for v in (a, b))
    product = CSRArray(a, pattern) @ CSRArray(b, pattern)
    assert abs(to_scipy(product).tocsr() - A @ B).max() == 0

    def loss(a, b):
        return (CSRArray(a, pattern) @ CSRArray(b, pattern)).sum()

    d_a, d_b = mx.grad(loss, argnums=(0, 1))(a, b)
    ones = np.ones((pattern.shape[0], 1), np.float32)
    expected = sparse_at(pattern, ones, B @ ones), sparse_at(pattern, A.T @ ones, ones)
    assert np.array_equal(np.array(d_a), expected[0])
    assert np.array_equal(np.array(d_b), expected[1])


def sparse_at(pattern, column, row):
    """Return ``column @ row.T`` at the stored places."""
    return np.array(sddmm(pattern, mx.array(column.T), mx.array(row.T)))


def test_products_in_files_and_for_every_shape(tmp_path):
    pattern = random_pattern(5, 5, 1, seed=1)
    a = integers(pattern.data_shape, 1)

    def f(a):
        return (CSRArray(a, pattern) @ CSRArray(a, pattern).T).todense()

    mx.export_function(str(tmp_path / "f.mlxfn"), f, a)
    imported = untyped(mx.import_function(str(tmp_path / "f.mlxfn")))
    assert_equal(imported(2 * a)[0], f(2 * a))

    def values(a):  # MLX has no dense result for every shape
        return (CSRArray(a, pattern) @ CSRArray(a, pattern)).data

    assert_equal(mx.compile(values, shapeless=True)(a), values(a))


def test_products_are_mapped_without_python():
    pattern = random_pattern(5, 5, 1, seed=1)
    a = integers(pattern.data_shape, 1)

    def f(a):
        return (CSRArray(a, pattern) @ CSRArray(a, pattern)).data.sum()

    batch = mx.stack([a, 2 * a, -a])
    found = mx.vmap(mx.checkpoint(f))(batch)
    assert_equal(found, mx.stack([f(v) for v in batch]))
    found = mx.grad(lambda batch: mx.vmap(mx.checkpoint(f))(batch).sum())(batch)
    assert_equal(found, mx.stack([mx.grad(f)(v) for v in batch]))


EYE = coo_array(([1.0, 1.0], ([0, 1], [0, 1])), shape=(2, 2)).tocsr()
WIDE = from_dense(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EYE + WIDE, ValueError, r"\[A \+ B\] A is \(2, 2\), B is \(2, 3\): shapes differ"),
        (lambda: EYE - WIDE, ValueError, "shapes differ"),
        (lambda: EYE @ WIDE.T, ValueError, r"\[A @ B\] A is \(2, 2\), B is \(3, 2\): inner sizes"),
        (lambda: EYE + 1, TypeError, "plus a scalar is dense; use A.todense"),
        (lambda: EYE + mx.array(1.0), TypeError, "plus a scalar is dense"),
        (lambda: EYE - 1, TypeError, "plus a scalar is dense"),
        (lambda: EYE / untyped(WIDE), TypeError, r"\[A / B\] has no value where B stores nothing"),
        (lambda: EYE * mx.ones((3, 2)), ValueError, r"shape \(3, 2\) does not broadcast to it"),
        (lambda: EYE * mx.ones((1, 2, 2)), ValueError, "does not broadcast"),
        (
            lambda: EYE + mx.ones((3, 2)),
            ValueError,
            r"\[A \+ D\] A is \(2, 2\), and shape \(3, 2\)",
        ),
        (lambda: EYE * "two", TypeError, "must be a dense array, got str"),
        (lambda: EYE.multiply(WIDE), ValueError, "does not broadcast"),
    ],
)
def test_bad_operands_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_coordinates_compute_by_their_csr():
    a = COOArray(mx.array([1.0, 2.0, 3.0]), [0, 1, 1], [1, 0, 0], (2, 2))
    full = np.array([[0, 1], [5, 0]], np.float32)
    x = mx.array([1.0, 2.0])
    assert np.array_equal(to_numpy(a @ x), full @ to_numpy(x))
    assert np.array_equal(to_numpy(x @ a), to_numpy(x) @ full)
    assert np.array_equal(to_numpy(a.T.todense()), full.T)
    assert np.array_equal(to_numpy((2 * a / 2).todense()), full)
    assert np.array_equal(to_numpy((-a).todense()), -full)
    assert np.array_equal(to_numpy(a.sum(0)), full.sum(0))
    assert np.array_equal(to_numpy(a.diagonal()), np.diag(full))
    assert a.astype(mx.float16).dtype == mx.float16
    assert a.tocoo() is a
    assert np.array_equal(to_numpy(a.max(1)), full.max(1))
    assert np.array_equal(to_numpy(abs(-a).todense()), full)
    assert np.array_equal(to_numpy((a**2).todense()), full**2)
    assert a[1, 0].item() == 5
    for name in ("indices", "indptr", "no_such_thing", "_sum"):
        assert not hasattr(a, name)
