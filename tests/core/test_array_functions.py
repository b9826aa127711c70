"""Parts, reductions, functions, assembly and files of sparse arrays, against NumPy and SciPy."""

import operator
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    computing,
    computing_by_kernels,
    dense_of,
    device_of,
    integers,
    patterns,
    random_pattern,
    spoiled,
    to_numpy,
    untyped,
)

import mlx_sparse_nn as sparse
from mlx_sparse_nn import COOArray, CSRArray, SparseParameter, csr_array, from_dense, from_scipy
from mlx_sparse_nn.core.backends import plain

FUNCTIONS = (
    *("sqrt", "sign", "sin", "tan", "arcsin", "arctan", "sinh", "tanh", "arcsinh", "arctanh"),
    *("expm1", "log1p", "floor", "ceil", "rint", "trunc", "deg2rad", "rad2deg", "abs"),
)


@st.composite
def arrays(draw, dtype=mx.float32, fewest=0):
    """Draw blocks or scalars, unsorted and repeated, with nans outside the matrix."""
    pattern = draw(patterns(fewest=fewest))
    data = integers(pattern.data_shape, draw(st.integers(0, 9)), dtype)
    return CSRArray(spoiled(pattern, data), pattern)


def dense(a: CSRArray) -> np.ndarray:
    return to_numpy(dense_of(a.pattern, a.data))


def same(found: CSRArray | COOArray | mx.array, expected: np.ndarray) -> None:
    found = found if isinstance(found, mx.array) else found.todense()
    assert tuple(found.shape) == expected.shape
    assert np.array_equal(to_numpy(found), expected, equal_nan=True)


def keys(size: int):
    index = st.integers(-size, size - 1) if size else st.nothing()
    array = st.lists(index, max_size=5 if size else 0).map(lambda a: np.array(a, np.int64))
    mask = st.lists(st.booleans(), min_size=size, max_size=size).map(lambda a: np.array(a, bool))
    return st.one_of(st.slices(size), array, mask, *([index] if size else []))


@given(st.data())
def test_rows_and_columns(data):
    a = data.draw(arrays())
    rows, cols = (data.draw(keys(n)) for n in a.shape)
    expected = dense(a)
    same(a[rows], expected[rows])
    same(a[rows, :], expected[rows, :])
    same(a[:, cols], expected[:, cols])
    if any(isinstance(key, int | slice) for key in (rows, cols)):
        same(a[rows, cols], expected[rows, cols])


@given(st.data())
def test_entries(data):
    a = data.draw(arrays(fewest=1))
    if not all(a.shape):
        return
    expected = dense(a)
    count = data.draw(st.integers(0, 6))
    rows, cols = (
        np.array(data.draw(st.lists(st.integers(-n, n - 1), min_size=count, max_size=count)), int)
        for n in a.shape
    )
    same(a[rows, cols], expected[rows, cols])
    same(a[mx.array(rows), mx.array(cols)], expected[rows, cols])
    same(a[-1, 0], expected[-1, 0])
    same(a[expected > 0], expected[expected > 0])
    same(a[mx.array((expected > 0).tolist())], expected[expected > 0])


@pytest.mark.parametrize(
    "key",
    [
        *(5, -6, (0, 7), ([0, 9],), (slice(None), -8), (0, 0, 0), 1.5, "row", [0.5]),
        *(np.ones(3, bool), np.ones((5, 6), bool), np.ones((5, 7))),
        *([[0, 1]], (slice(None), [[0, 1]]), ([[0, 1]], 1), (1, [[0, 1]]), [[]]),
        *(mx.array([[0, 1]]), np.array([[0, 1]])),
    ],
    ids=repr,
)
def test_what_is_no_index_is_refused(key):
    with pytest.raises(IndexError, match=r"^\[A\[...\]\] "):
        _ = from_dense(np.ones((5, 7)))[key]


@given(arrays(), st.integers(-7, 7))
def test_diagonals_and_triangles(a, k):
    expected = dense(a)
    inside = -a.shape[0] < k < a.shape[1]
    same(a.diagonal(k), np.diag(expected, k) if inside else np.zeros(0))
    same(a.tril(k), np.tril(expected, k))
    same(a.triu(k), np.triu(expected, k))
    same(a.trace(), np.trace(expected))


@given(arrays(fewest=1), st.sampled_from([None, 0, 1, -1, -2]), st.booleans())
def test_reductions(a, axis, keepdims):
    if not all(a.shape):
        return
    expected = dense(a)
    for name in ("sum", "max", "min"):
        found = getattr(a, name)(axis, keepdims=keepdims)
        same(found, np.asarray(getattr(expected, name)(axis=axis, keepdims=keepdims)))
    mean = to_numpy(a.mean(axis, keepdims=keepdims))
    assert np.allclose(mean, expected.mean(axis=axis, keepdims=keepdims), atol=1e-6)
    same(a.count_nonzero(axis), np.asarray(np.count_nonzero(expected, axis=axis)))


@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.uint8, mx.bool_], ids=str)
@pytest.mark.parametrize("block_size", [1, 2])
def test_reductions_of_integers(dtype, block_size):
    pattern = random_pattern(3, 4, block_size, seed=1)
    a = CSRArray(mx.abs(integers(pattern.data_shape)).astype(dtype), pattern)
    expected = dense(a)
    for axis in (None, 0, 1):
        same(a.max(axis), np.asarray(expected.max(axis)))
        same(a.min(axis), np.asarray(expected.min(axis)))
        assert a.max(axis).dtype == dtype
        assert np.allclose(to_numpy(a.mean(axis)), expected.mean(axis))


@pytest.mark.parametrize("name", ["max", "min"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_derivatives_of_extremes(name, axis):
    pattern = random_pattern(5, 6, 1, 0.8, seed=2)
    data, tangent = integers(pattern.data_shape, 1), integers(pattern.data_shape, 2)
    weight = integers((), 3) if axis is None else integers((pattern.shape[1 - axis],), 3)

    def of_sparse(data):
        return (getattr(CSRArray(data, pattern), name)(axis) * weight).sum()

    def of_dense(data):
        return (getattr(CSRArray(data, pattern).todense(), name)(axis) * weight).sum()

    assert mx.allclose(mx.grad(of_sparse)(data), mx.grad(of_dense)(data))
    batch = mx.stack([data, -data])
    assert_equal(mx.vmap(of_sparse)(batch), mx.stack([of_dense(data), of_dense(-data)]))
    assert mx.allclose(mx.compile(mx.grad(of_sparse))(data), mx.grad(of_dense)(data))
    (found,) = mx.jvp(of_sparse, [data], [tangent])[1]
    assert mx.allclose(found, (mx.grad(of_dense)(data) * tangent).sum(), atol=1e-5)
    # Where no two values are equal: dense MLX counts ties otherwise in these.
    n = pattern.n_blocks
    data = mx.array(np.random.default_rng(0).permutation(n) - n / 2 + 0.25)
    found, expected = (
        mx.jvp(mx.grad(lambda data, f=f: f(data) ** 2), [data], [tangent])[1][0]
        for f in (of_sparse, of_dense)
    )
    assert mx.allclose(found, expected, atol=1e-4)
    batch = mx.stack([data, -data])
    with computing_by_kernels():
        for change in (
            lambda f: mx.vmap(mx.grad(f))(batch),
            lambda f: mx.grad(lambda batch: (mx.vmap(f)(batch) ** 2).sum())(batch),
            lambda f: mx.grad(lambda batch: (mx.vmap(f, 1)(batch.T) ** 2).sum())(batch),
            lambda f: mx.jvp(mx.vmap(f), [batch], [batch + 1])[1][0],
            lambda f: mx.vmap(mx.vmap(f))(mx.stack([batch, batch + 1])),
        ):
            assert mx.allclose(change(of_sparse), change(of_dense), atol=1e-4)


@given(arrays(), st.sampled_from(FUNCTIONS))
def test_functions_of_each_value(a, name):
    with np.errstate(all="ignore"):
        expected = getattr(np, name)(dense(a).astype(np.float32))
    found = to_numpy(getattr(a, name)().todense())
    assert np.allclose(found, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@given(arrays())
def test_powers_and_shapes(a):
    expected = dense(a)
    same(a**2, expected**2)
    same(a.power(3), expected**3)
    n_rows, n_cols = a.shape
    same(a.reshape((n_cols, n_rows)), expected.reshape(n_cols, n_rows))
    same(a.copy(), expected)
    same(+a, expected)


def test_complex_parts():
    a = CSRArray(integers((3,), 1, mx.complex64), sparse.CSRPattern([0, 2, 3], [0, 1, 1], (2, 2)))
    expected = dense(a)
    same(a.conj(), np.conj(expected))
    same(a.real, np.real(expected))
    same(a.imag, np.imag(expected))
    same(abs(a), np.abs(expected).astype(np.float32))
    real = from_dense(np.eye(2))
    same(real.real, np.eye(2))
    same(real.imag, np.zeros((2, 2)))
    with pytest.raises(TypeError, match=r"\[CSRArray.max\] complex numbers have no order"):
        a.max()


@given(st.lists(arrays(), min_size=1, max_size=3))
def test_block_diagonal(parts):
    expected = sp.block_diag([sp.coo_array(dense(a)) for a in parts])
    same(sparse.block_diag(parts), expected.toarray())


@given(arrays(), st.integers(0, 5), st.integers(0, 5))
def test_stacks(a, n_rows, n_cols):
    below, beside = from_dense(integers((n_rows, a.shape[1]))), integers((a.shape[0], n_cols))
    same(sparse.vstack([a, below.tocoo()]), np.vstack([dense(a), dense(below)]))
    same(sparse.hstack([beside, a]), np.hstack([to_numpy(beside), dense(a)]))
    twice = sparse.vstack([a, a])
    same(twice, np.vstack([dense(a)] * 2))
    if a.shape[0] % a.block_size == 0:
        assert twice.block_size == a.block_size


@given(arrays(), arrays())
def test_kronecker_products(a, b):
    same(sparse.kron(a, b), np.kron(dense(a), dense(b)))


def test_derivatives_of_assembly():
    pattern = random_pattern(3, 3, 1, seed=1)
    data, other = integers(pattern.data_shape, 1), from_dense(integers((3, 3), 2))

    def f(assemble):
        return lambda data: (assemble(CSRArray(data, pattern)).todense() ** 3).sum()

    def kron(a):
        return mx.kron(a.todense(), other.todense())

    for found, expected in (
        (lambda a: sparse.vstack([a, other, a]), lambda a: mx.concatenate([a.todense()] * 2)),
        (lambda a: sparse.kron(a, other), kron),
        (lambda a: a[[0, 2, 2], :], lambda a: a.todense()[mx.array([0, 2, 2])]),
        (lambda a: a.tril(), lambda a: mx.tril(a.todense())),
    ):
        of_dense = lambda data, g=expected: (g(CSRArray(data, pattern)) ** 3).sum()
        assert_equal(mx.grad(f(found))(data), mx.grad(of_dense)(data))


def test_diagonals_have_gradients():
    def f(d):
        return (sparse.diags([d, d[:3]], [0, 1]).todense() ** 2).sum()

    assert_equal(mx.grad(f)(mx.array([1.0, 2, 3, 4])), mx.array([4.0, 8, 12, 8]))


def test_random_is_what_was_asked():
    a = sparse.random(30, 40, density=0.25, seed=3, dtype=mx.float16)
    assert (a.nnz, a.dtype, a.shape) == (300, mx.float16, (30, 40))
    assert a.pattern == sparse.random(30, 40, density=0.25, seed=3).pattern
    assert a.pattern != sparse.random(30, 40, density=0.25, seed=4).pattern
    assert sparse.random(3, 4, 0).nnz == 0


@given(arrays())
def test_softmax_of_stored_values(a):
    a = a.tocsr().canonical()
    found = sparse.softmax(a)
    stored = np.array(a.pattern.tomask())
    with np.errstate(all="ignore"):
        weights = np.where(stored, np.exp(dense(a)), 0)
        weights = weights / weights.sum(1, keepdims=True)
    assert np.allclose(to_numpy(found.todense()), np.where(stored, weights, 0), atol=1e-6)


def test_softmax_is_stable_and_differentiates():
    pattern = random_pattern(5, 6, 1, seed=1)
    data = integers(pattern.data_shape) * 100
    mask = pattern.tomask()

    def of_sparse(data):
        return (sparse.softmax(CSRArray(data, pattern)).todense() ** 2).sum()

    def of_dense(data):
        scores = mx.where(mask, CSRArray(data, pattern).todense(), -1e30)
        return (mx.where(mask, mx.softmax(scores, axis=1), 0) ** 2).sum()

    assert mx.allclose(of_sparse(data), of_dense(data))
    small = data / 100
    assert mx.allclose(mx.grad(of_sparse)(small), mx.grad(of_dense)(small), atol=1e-6)
    second = [
        mx.grad(lambda d, f=f: (mx.grad(f)(d) ** 2).sum())(small) for f in (of_sparse, of_dense)
    ]
    assert mx.allclose(*second, atol=1e-5)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_every_format_of_scipy(kind):
    a = sp.random_array((6, 8), density=0.4, rng=np.random.default_rng(0))
    found = from_scipy(
        sp.bsr_array(a.tocsr(), blocksize=(2, 2)) if kind == "bsr" else a.asformat(kind)
    )
    assert np.allclose(to_numpy(found.todense()), a.toarray(), atol=1e-6)
    assert found.dtype == mx.float32
    kept = from_scipy(a.asformat("csr"), dtype=mx.float64)
    assert np.array_equal(np.array(kept.data), a.tocsr().data)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.astype(">f4"),
        lambda a: a.astype(">f8"),
        lambda a: a.astype(">i2"),
        lambda a: a[:, ::-1],
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a.tolist(),
        lambda a: mx.array(a),
    ],
)
def test_dense_arrays_of_any_making(change):
    a = np.array(integers((4, 5), 1))
    expected = np.asarray(change(a))
    for make in (csr_array, from_dense, sparse.coo_array):
        same(make(change(a)), expected.astype(np.float32))
    data = change(a[:1])
    values = np.asarray(data).reshape(-1)
    if not isinstance(data, list | mx.array):
        same(csr_array((values, np.arange(5), [0, 5]), (1, 5)), values[None].astype(np.float32))


def test_shapes_are_found():
    assert csr_array(([1.0], [4], [0, 0, 1])).shape == (2, 5)
    assert csr_array(([1.0], ([3], [1]))).shape == (4, 2)
    assert csr_array((2, 3)).nnz == 0
    assert csr_array((2, 3), dtype=mx.float16).dtype == mx.float16
    assert csr_array(from_dense(mx.ones((4, 4)), 2)).block_size == 1


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr"])
def test_files_of_scipy(kind, tmp_path: Path):
    a = sp.random_array((6, 8), density=0.4, rng=np.random.default_rng(0), dtype=np.float32)
    a = sp.bsr_array(a.tocsr(), blocksize=(2, 2)) if kind == "bsr" else a.asformat(kind)
    sp.save_npz(tmp_path / "theirs.npz", a)
    found = sparse.load_npz(tmp_path / "theirs.npz")
    same(found, a.toarray())
    sparse.save_npz(tmp_path / "ours.npz", found, compressed=False)
    back = sp.load_npz(tmp_path / "ours.npz")
    assert back.format == ("csr" if kind == "csc" else kind)
    assert np.array_equal(back.toarray(), a.toarray())


@given(arrays(dtype=mx.bfloat16))
def test_safetensors_keep_everything(a):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sparse.save_safetensors(f"{folder}/a.safetensors", a)
        back = sparse.load_safetensors(f"{folder}/a.safetensors")
        assert back.pattern == a.pattern
        assert_equal(back.data, a.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([0, 9])}, r"indices\[1\] is 9, outside"),
        ({"indices": np.array([0, -1])}, r"indices\[1\] is -1, outside"),
        ({"indptr": np.array([0, 1, 7])}, "indptr must end at 2"),
        ({"shape": np.array([2])}, "must hold a matrix"),
        ({"format": b"dia"}, "got 'dia'"),
        ({"data": np.ones(3)}, "data has shape"),
        ({"indices": None}, "has no array 'indices'"),
    ],
)
def test_files_that_describe_no_matrix_are_refused(change, message, tmp_path: Path):
    parts = {"format": b"csr", "shape": np.array([2, 3]), "data": np.ones(2)}
    parts |= {"indices": np.array([0, 1]), "indptr": np.array([0, 1, 2])} | change
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in parts.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        sparse.load_npz(tmp_path / "bad.npz")
    arrays = {"data": mx.ones(2), "indices": mx.array([0, 9]), "indptr": mx.array([0, 1, 2])}
    sizes = {"n_rows": "2", "n_cols": "3", "block_size": "1"}
    mx.save_safetensors(str(tmp_path / "bad.safetensors"), arrays, sizes)
    with pytest.raises(ValueError, match=r"indices\[1\] is 9"):
        sparse.load_safetensors(tmp_path / "bad.safetensors")


def test_what_does_not_fit_the_memory_raises():
    with pytest.raises(ValueError, match=r"a dense 1000000 x 1000000 array .* takes 3,725 GiB"):
        csr_array((10**6, 10**6)).todense()


COMPARISONS = {
    "A > 1": lambda a, b, d: a > 1,
    "A >= 2": lambda a, b, d: a >= mx.array(2.0),
    "A < -1": lambda a, b, d: a < -1,
    "A != 0": lambda a, b, d: a != 0,
    "A == 2": lambda a, b, d: a == np.float64(2),
    "0 < A": lambda a, b, d: operator.lt(0, a),
    "A > B": lambda a, b, d: a > b,
    "A != B": lambda a, b, d: a != b,
    "A < A": lambda a, b, d: a < a,
    "A == D": lambda a, b, d: a == d,
    "D == A": lambda a, b, d: d == a,
    "D >= A": lambda a, b, d: d >= a,
    "A < D": lambda a, b, d: a < d,
}


@pytest.mark.parametrize("name", COMPARISONS)
@given(a=arrays(), seed=st.integers(0, 3))
def test_comparisons(name, a, seed):
    d = integers(a.shape, seed)
    b = from_dense(integers(a.shape, seed + 1))
    found = COMPARISONS[name](a, b, d)
    assert found.dtype == mx.bool_
    same(found, COMPARISONS[name](dense(a), dense(b), to_numpy(d)))
    assert sparse.issparse(found) == ("D" not in name)


@given(arrays())
def test_masks_that_are_sparse(a):
    expected = dense(a)
    same(a[a > 1], expected[expected > 1])
    same(a[(a != 0).tocoo()], expected[expected != 0])
    for found, places in zip(a.nonzero(), np.nonzero(expected), strict=True):
        assert np.array_equal(found, places)


@pytest.mark.parametrize(
    "compare",
    [lambda a: a == a, lambda a: a == 0, lambda a: a < 1, lambda a: a >= a, lambda a: a != 2],
)
def test_comparisons_that_are_true_nearly_everywhere_are_refused(compare):
    a = from_dense(np.eye(2))
    with pytest.raises(TypeError, match="true where nothing is stored"):
        compare(a)
    assert len({a, a.copy()}) == 2
    assert (a == "a") is False
    with pytest.raises(TypeError, match="a number that MLX traces cannot decide"):
        mx.compile(lambda s: (a > s).data)(mx.array(1.0))


@given(arrays(fewest=1), st.sampled_from([None, 0, 1, -1]), st.integers(0, 2))
def test_places_of_extremes(a, axis, seed):
    if not all(a.shape):
        return
    expected = dense(a)
    same(a.argmax(axis), np.asarray(expected.argmax(axis)))
    same(a.argmin(axis), np.asarray(expected.argmin(axis)))
    same(a.tocoo().argmax(axis), np.asarray(expected.argmax(axis)))


def test_extremes_of_more_places_than_32_bits_count():
    i = np.array([3, 70_000])
    a = csr_array((mx.array([-1.0, 5.0]), (i, i)), shape=(100_000, 100_000))
    assert (a.max().item(), a.min().item()) == (5, -1)
    assert a.argmax().item() == 70_000 * 100_001
    assert a.argmin().item() == 3 * 100_001
    assert mx.grad(lambda d: CSRArray(d, a.pattern).max())(a.data).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"\[CSRArray.reshape\] a size must be in"):
        a.reshape(-1)


@given(arrays(), st.integers(0, 3))
def test_larger_and_smaller(a, seed):
    b, d = from_dense(integers(a.shape, seed)), integers(a.shape, seed)
    for name in ("maximum", "minimum"):
        function, own = getattr(np, name), getattr(a, name)
        same(own(b), function(dense(a), dense(b)))
        same(own(d), function(dense(a), to_numpy(d)))
        same(own(0), function(dense(a), 0))
    same(a.maximum(-1.5), np.maximum(dense(a), -1.5))
    same(a.astype(mx.int32).maximum(-1.5), np.maximum(dense(a), -1.5))
    with pytest.raises(TypeError, match=r"use mx.maximum\(A.todense\(\), 1\)"):
        a.maximum(1)


def test_derivatives_of_larger():
    pattern, other = random_pattern(5, 6, 1, 0.6, seed=1), random_pattern(5, 6, 1, 0.6, seed=2)
    a, b = integers(pattern.data_shape, 1) * 2 + 1, integers(other.data_shape, 2) * 2
    weight = integers((5, 6), 3)

    def of_sparse(a, b):
        return (CSRArray(a, pattern).maximum(CSRArray(b, other)) ** 3 * weight).sum()

    def of_dense(a, b):
        a, b = (CSRArray(v, p).todense() for v, p in ((a, pattern), (b, other)))
        return (mx.maximum(a, b) ** 3 * weight).sum()

    for argnum in (0, 1):
        assert mx.allclose(mx.grad(of_sparse, argnum)(a, b), mx.grad(of_dense, argnum)(a, b))
    found, expected = (
        mx.grad(lambda a, b, f=f: (mx.grad(f)(a, b) * a).sum())(a, b) for f in (of_sparse, of_dense)
    )
    assert mx.allclose(found, expected)


@pytest.mark.parametrize(
    "dtypes", [(mx.int32, mx.int32), (mx.int8, mx.int16), (mx.bool_, mx.bool_)]
)
@pytest.mark.parametrize("block_size", [1, 2])
def test_products_of_integers(dtypes, block_size):
    pattern = random_pattern(4, 3, block_size, seed=1)
    a = CSRArray(integers(pattern.data_shape, 1, dtypes[0]), pattern)
    full = np.array(dense_of(pattern, a.data)).astype(np.int32)
    for shape in ((a.shape[1],), (a.shape[1], 5), (2, 3, a.shape[1], 5), (1, a.shape[1], 1)):
        x = integers(shape, 2, dtypes[1])
        expected = full @ np.array(x).astype(np.int32)
        expected = expected != 0 if dtypes[0] == mx.bool_ else expected
        found = a @ x
        assert found.dtype == mx.result_type(a.data, x)
        same(found, expected)
        assert_equal(mx.compile(lambda x: a @ x)(x), found)
    for shape in ((a.shape[0],), (5, a.shape[0]), (2, 3, a.shape[0])):
        x = integers(shape, 2, dtypes[1])
        expected = np.array(x).astype(np.int32) @ full
        same(x @ a, expected != 0 if dtypes[0] == mx.bool_ else expected)


@given(arrays(fewest=1), st.integers(0, 5))
def test_one_row_or_column_is_repeated(a, seed):
    if not all(a.shape):
        return
    expected, d = dense(a), integers(a.shape, seed)
    row, column = a[[0]], a[:, [0]]
    same(column * row, expected[:, [0]] * expected[[0]])
    same(row * column, expected[:, [0]] * expected[[0]])
    same(a * row, expected * expected[[0]])
    same(column * a, expected * expected[:, [0]])
    same(row * d, expected[[0]] * to_numpy(d))
    same(d * column, expected[:, [0]] * to_numpy(d))


@pytest.mark.parametrize(
    "shape", [(-1, 2), (6, -1), (-1,), (12,), (3, 4), (2, 2, 3), (-1, -1), (5, -1), (0, -1)]
)
def test_shapes_with_one_size_left_out(shape):
    a = from_dense(integers((3, 4), 1))
    try:
        expected = dense(a).reshape(shape) if len(shape) < 3 else None
    except ValueError:
        expected = None
    if expected is not None:
        same(a.reshape(shape), expected)
        same(a.reshape(*shape), expected)
        same(a.tocoo().reshape(list(shape)), expected)
        return
    for call in (lambda: a.reshape(shape), lambda: a.reshape(*shape)):
        with pytest.raises(ValueError, match=r"^\[CSRArray.reshape\] "):
            call()


def test_float64_of_numpy_stays_beside_float64():
    third = np.array([[1 / 3]])
    with device_of(mx.float64):
        one = sparse.eye(1, dtype=mx.float64)
        for found in (
            sparse.kron(one, third),
            sparse.kronsum(third, one) - one,
            sparse.vstack([one, third])[[1]],
            sparse.hstack([third, one])[:, [0]],
            sparse.block_diag([one, third])[[1], 1:],
            sparse.kron(one, third.tolist()),
        ):
            assert found.dtype == mx.float64
            assert found.todense().item() == pytest.approx(1 / 3, abs=1e-16)
    assert sparse.kron(sparse.eye(1), third).dtype == mx.float32


def test_scipy_beside_our_own_names_what_to_do():
    a, b = sparse.eye(2), untyped(sp.eye_array(2, format="csr"))
    operations = "a @ b, b @ a, a + b, b + a, a - b, b - a, a * b, b * a, a > b, a.maximum(b)"
    for operation in operations.split(", "):
        with pytest.raises(TypeError, match=r"from_scipy\(x\) makes it one of this package"):
            eval(operation, {"a": a, "b": b})
    for function in (lambda: sparse.kron(a, b), lambda: sparse.vstack([a, b])):
        with pytest.raises(TypeError, match=r"from_scipy\(x\) makes one of it"):
            function()


def test_names_of_scipy_say_what_to_do():
    a = sparse.eye(3)
    for array in (a, a.tocoo(), a[0]):
        for name in ("tocsc", "asformat", "setdiag", "eliminate_zeros", "getrow", "conjugate"):
            with pytest.raises(AttributeError, match=f"no attribute {name!r}; "):
                getattr(array, name)
            assert not hasattr(array, name)
        with pytest.raises(TypeError, match=r"cannot be written to.*csr_array\(\(x"):
            array[0] = 1.0
    for name in ("eye_array", "diags_array", "random_array", "csc_array", "find", "spdiags"):
        with pytest.raises(AttributeError, match=f"no attribute {name!r}; "):
            getattr(sparse, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = untyped(sparse).nothing


def test_indices_that_are_traced_are_refused():
    a = sparse.eye(3)
    for call in (
        lambda i: a[i].sum(),
        lambda i: a[i > 0].sum(),
        lambda i: CSRArray(i, a.pattern)[CSRArray(i, a.pattern) > 0].sum(),
        lambda i: mx.array(CSRArray(i, a.pattern).nonzero()[0]).sum(),
    ):
        with pytest.raises(TypeError, match="places depend on these values, which MLX traces"):
            mx.compile(call)(mx.array([0, 1, 2]))


def test_a_parameter_trains_casts_and_is_saved(tmp_path: Path):
    import mlx.optimizers as optim

    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.graph = SparseParameter(sparse.random(5, 6, 0.5, seed=seed))
            self.out = nn.Linear(2, 3)

        def __call__(self, x):
            return self.out(self.graph.array @ x)

    model, x = Model(1), mx.ones((6, 2))
    before = model.graph.array.data
    _, grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).sum())(x)
    optim.SGD(0.1).update(model, grads)
    assert set(grads["graph"]) == {"weight"}
    assert not mx.array_equal(model.graph.array.data, before)
    model.save_weights(str(tmp_path / "model.safetensors"))
    other = Model(2)
    other.load_weights(str(tmp_path / "model.safetensors"))
    assert other.graph.pattern == model.graph.pattern
    assert_equal(other(x), model(x))
    other.set_dtype(mx.float16)
    assert other.graph.array.dtype == mx.float16
    assert "SparseParameter(5 x 6" in repr(other)


def test_drawings_and_names():
    a = COOArray([1.0, 2.0], [0, 1], [1, 0], (2, 2)).tocsr()
    assert a.spy() == a.pattern.spy()
    assert a._repr_svg_() == a.pattern._repr_svg_()
    assert a.plot().images
    assert a.eval() is a
    assert a.nbytes == a.data.nbytes + a.indices.nbytes + a.indptr.nbytes
    assert not a.indices.flags.writeable


@pytest.mark.parametrize(
    "function",
    [
        lambda a, d: a / d,
        lambda a, d: a.sqrt(),
        lambda a, d: a**0.5,
        lambda a, d: a.multiply(d[:, :1]),
    ],
)
def test_gradients_are_finite_where_blocks_reach_past_the_matrix(function):
    whole = from_dense(mx.ones((3, 3)), 2)
    data, d = spoiled(whole.pattern, whole.data), mx.ones((3, 3)) * 2

    def loss(data, d):
        return function(CSRArray(data, whole.pattern), d).todense().sum()

    for found in mx.grad(loss, argnums=(0, 1))(data, d):
        assert mx.isfinite(found).all()
    assert loss(data, d) == function(from_dense(mx.ones((3, 3))), d).todense().sum()


@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint32], ids=str)
def test_unsigned_values_are_promoted_before_they_are_subtracted(dtype):
    a = csr_array(mx.array([[3, 0], [0, 5]], dtype=dtype))
    expected = -np.array([[3, 0], [0, 5]])
    same(mx.zeros((2, 2)) - a, expected)
    same(sparse.eye(2) - a, np.eye(2) + expected)
    same(sparse.eye(2) - mx.full((2, 2), 1, dtype), np.eye(2) - 1)
    with pytest.raises(TypeError, match=r"\[A - B\] bool has no difference"):
        _ = a.astype(mx.bool_) - a.astype(mx.bool_)


def test_means_of_many_places_in_16_bits():
    i = np.arange(1000)
    a = csr_array((mx.full((1000,), 50.0, mx.float16), (i, i)), shape=(1000, 1000))
    assert a.mean().dtype == mx.float16
    assert a.mean().item() == pytest.approx(0.05, rel=1e-3)


def test_extremes_pass_on_nan():
    a = csr_array(mx.array([[float("nan"), 1.0], [-1.0, -2.0]]))
    for name in ("max", "min"):
        for axis in (None, 0, 1):
            expected = getattr(np.array(a.todense()), name)(axis=axis)
            same(getattr(a, name)(axis), np.asarray(expected))


def test_float64_stays_what_it_is():
    with device_of(mx.float64):
        one, tenth = sparse.eye(1, dtype=mx.float64), np.array([[0.1]])
        for found in (one @ tenth, tenth @ one, (one * tenth).data, one + tenth):
            assert found.dtype == mx.float64
            assert found.reshape(-1)[0].item() in (0.1, 1.1)
        assert sparse.diags([0.1], [0], (1, 1), mx.float64).data.item() == 0.1
        with pytest.raises(TypeError, match="no float64 there; use save_npz"):
            sparse.save_safetensors("none.safetensors", one)


def test_coordinates_cannot_be_written():
    a = sparse.coo_array((mx.ones(3), ([0, 1, 2], [0, 1, 2])), shape=(3, 3))
    with pytest.raises(ValueError, match="read-only"):
        a.col[0] = 10**9
    for name in ("row", "col", "shape"):
        with pytest.raises(AttributeError):
            setattr(a, name, None)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint64])
def test_indices_of_any_width(dtype):
    a = sparse.eye(70000)
    for found in (a[np.array([5], dtype)], a[mx.array(np.array([5], dtype))], a[:, [dtype(5)]].T):
        assert found.indices.tolist() == [5]
    assert a[np.array([5], dtype), np.array([5], dtype)].item() == 1
    with pytest.raises(IndexError, match="row 18446744073709551615 is outside"):
        a[np.array([2**64 - 1], np.uint64)]
    with pytest.raises(IndexError, match="do not broadcast"):
        a[[0, 1], [0, 1, 2]]
    assert a[()].shape == a.shape


def test_one_diagonal_without_offsets():
    v = mx.array([1.0, 2.0, 3.0])
    for found in (sparse.diags(v), sparse.diags([v]), sparse.diags([np.array(v)])):
        same(found, np.diag([1, 2, 3]))
    assert_equal(mx.compile(lambda v: sparse.diags([v]).sum())(v), v.sum())
    for call in (
        lambda: sparse.eye(3, k=untyped(1.5)),
        lambda: sparse.diags([1.0], [untyped(0.5)]),
    ):
        with pytest.raises(TypeError, match="k must be an integer, got"):
            call()


def test_a_parameter_trains_in_a_compiled_step():
    import mlx.optimizers as optim

    array = sparse.eye(5)
    parameter, optimizer = SparseParameter(array), optim.SGD(0.1)
    state = [parameter.state, optimizer.state]

    def step(x):
        grads = nn.value_and_grad(parameter, lambda x: (parameter(x) - array @ x * 2).sum())(x)[1]
        optimizer.update(parameter, grads)

    x = mx.ones((5,))
    compiled = mx.compile(step, inputs=state, outputs=state)
    for _ in range(3):
        compiled(x)
        mx.eval(state)
    assert mx.allclose(parameter.weight, mx.full((5,), 0.7), atol=1e-5)


D = np.array([[1.0, 0, 2, 0], [0, 0, 0, 3], [0, 4, 0, 0]])
A = csr_array(D)
KINDS = {"csr": A, "coo": A.tocoo(), "vector": A[0], "blocks": from_dense(D, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_another_shape_cannot_be_assigned(kind):
    a = KINDS[kind].copy()
    name, whole = type(a).__name__, a.data[:]
    with pytest.raises(ValueError, match=rf"^\[{name}\] data has shape \(1,\), the .* needs? "):
        a.data = mx.ones(1)
    with pytest.raises(TypeError, match=rf"^\[{name}\] data must be an mx.array, got list"):
        a.data = untyped([1.0])
    if kind == "blocks":
        with pytest.raises(TypeError, match="blocks are real"):
            a.data = whole.astype(mx.complex64)
    assert mx.array_equal(a.data, whole)
    with pytest.raises(ValueError, match="data has shape"):
        a.data += mx.ones((5, *whole.shape))
    with pytest.raises(ValueError, match="data has shape"):  # which MLX has added in place
        _ = a.data
    a.data = mx.ones(whole.shape)
    assert mx.array_equal(a.data, mx.ones(whole.shape))
    for fixed in ("row", "col") if kind == "coo" else ("pattern",):
        with pytest.raises(AttributeError):
            setattr(a, fixed, None)


def test_tracers_are_assigned():
    def total(values):
        a = A.copy()
        a.data = values * 2
        return (a @ a.T).data.sum()

    def expected(values):
        a = CSRArray(values * 2, A.pattern)
        return (a.todense() @ a.todense().T).sum()

    values = mx.stack([A.data, -2 * A.data])
    for transform in (mx.grad, lambda f: mx.compile(mx.grad(f))):
        assert_equal(transform(total)(A.data), transform(expected)(A.data))
    assert_equal(mx.vmap(total)(values), mx.vmap(expected)(values))
    assert mx.array_equal(A.data, csr_array(D).data)


COPIES = "A[:]; A[...]; A[:, :]; +A; A + 0; A.copy(); A.conj(); A.canonical(); A.tocoo()"


@pytest.mark.parametrize("copy", COPIES.split("; "))
def test_copies_have_values_of_their_own(copy):
    a = A.copy()
    untyped(eval(copy.replace("A", "a"), {"a": a})).data[0] = 99
    assert a.data[0].item() == 1
    v = a[0]
    v[None].data[0] = 99
    assert v.data[0].item() == 1


IN_BATCHES = (
    *("todense()", "tocsr().T.data", "sum(1)", "max()", "max(1)", "argmax(0)", "mean(1)"),
    *("diagonal()", "tril().data", "multiply(mx.ones((3, 1))).data", "reshape(4, 3).data"),
    *("count_nonzero(1)", "astype(mx.int32) @ mx.ones((4, 2), mx.int32)", "__add__(D)"),
    *("__matmul__(A.T).data", "__matmul__(mx.ones(4))", "__getitem__((1, 2))", "maximum(A).data"),
    *("__getitem__(1).todense()", "__getitem__(slice(1, 3)).data"),
)


@pytest.mark.parametrize("backend", [None, plain], ids=["here", "plain"])
@pytest.mark.parametrize("kind", ["csr", "blocks"])
def test_batches_of_none(kind, backend):
    a, names = KINDS[kind], {"mx": mx, "A": A, "D": mx.array(D.tolist()), "sparse": sparse}
    functions = [f"X.{expression}" for expression in IN_BATCHES]
    functions += [f"sparse.{name}([X, A]).data" for name in ("vstack", "hstack", "block_diag")]
    functions += ["sparse.kron(X, A).data", "sparse.softmax(X).data"]
    with computing(backend) if backend else nullcontext():
        for expression in functions:
            of_array = eval(f"lambda X: {expression}", names)
            found = mx.vmap(lambda v, of=of_array: of(CSRArray(v, a.pattern)))(
                mx.zeros((0, *a.data.shape))
            )
            one = of_array(a)
            assert (found.shape, found.dtype) == ((0, *one.shape), one.dtype), expression
            mx.eval(found)


def test_nothing_to_reduce_or_multiply():
    a = A.astype(mx.int32)
    assert (a @ mx.zeros((4, 0), mx.int32)).shape == (3, 0)
    assert (a @ mx.zeros((0, 4, 2), mx.int32)).shape == (0, 3, 2)
    assert (mx.zeros((0, 3), mx.int32) @ a).shape == (0, 4)
    for name in ("max", "min", "argmax", "argmin"):
        assert getattr(csr_array((0, 17)), name)(1).shape == (0,)
        assert getattr(csr_array((17, 0)), name)(0).shape == (0,)
        with pytest.raises(ValueError, match="without places"):
            getattr(csr_array((0, 17)), name)(0)


def test_axes_as_tuples():
    assert_equal(A.sum((0,)), mx.array(D.sum(0).tolist()))
    assert_equal(A.sum((-1,)), mx.array(D.sum(1).tolist()))
    assert A[0].sum((0,)).item() == 3
    for a in (A, A.tocoo()):
        same(a.transpose((1, 0)), D.T)
        with pytest.raises(ValueError, match=r"axes must be None or \(1, 0\), got \(0, 1\)"):
            a.transpose((0, 1))


def test_expm1_of_complex_numbers():
    z = np.array([1e-4 + 2e-4j, 1 + 2j, -3 + 0.5j, 1e-8j, 1j * np.pi], np.complex64)
    pattern = csr_array(z[None]).pattern
    found, expected = (
        np.array(CSRArray(z, pattern).expm1().data),
        np.expm1(z.astype(np.complex128)),
    )
    assert np.all(np.abs(found - expected) <= 8 * np.finfo(np.float32).eps * np.abs(expected))
    weights = mx.array([1, 2j, 3, 1 - 1j, 1])

    def slope(function):
        return mx.grad(lambda data: mx.real((function(data) * weights).sum()))(mx.array(z))

    expected = slope(lambda data: mx.exp(data) - 1)
    assert mx.allclose(slope(lambda d: CSRArray(d, pattern).expm1().data), expected, rtol=1e-5)


WIDE = csr_array(([1.0], ([0], [0])), (1, 2**30))
MISTAKES = [
    *(
        (call, TypeError, rf"^\[{owner}\] dtype must be one of MLX, as mx.float32")
        for owner, call in {
            "csr_array": lambda: csr_array(D, dtype=untyped(np.float32)),
            "coo_array": lambda: sparse.coo_array(D, dtype=untyped(np.float32)),
            "bsr_array": lambda: sparse.bsr_array(
                (np.ones((1, 2, 2)), [0], [0, 1]), (2, 2), untyped(np.float32)
            ),
            "from_scipy": lambda: from_scipy(sp.csr_array(D), untyped(np.float32)),
            "load_npz": lambda: sparse.load_npz("none.npz", untyped(np.float32)),
            "eye": lambda: sparse.eye(2, dtype=untyped(np.float32)),
            "diags": lambda: sparse.diags([[1.0]], [0], dtype=untyped(np.float32)),
            "random": lambda: sparse.random(2, 2, dtype=untyped(np.float32)),
        }.items()
    ),
    (lambda: csr_array((2**31 - 1, 2**31 - 1)), ValueError, r"^\[csr_array\] n_rows must be below"),
    (lambda: sparse.hstack([WIDE, WIDE]), ValueError, r"^\[hstack\] n_cols must be in"),
    (lambda: sparse.vstack([WIDE.T, WIDE.T]), ValueError, r"^\[vstack\] n_rows must be in"),
    (lambda: sparse.kron(WIDE, WIDE), ValueError, r"^\[kron\] n_cols must be in"),
    (lambda: A.map_values(untyped(3)), TypeError, r"^\[A.map_values\] function must be callable"),
    (lambda: sparse.diags(untyped(5)), TypeError, r"^\[diags\] diagonals must be a sequence"),
    (lambda: sparse.diags([1.0], untyped(None)), TypeError, r"^\[diags\] offsets must be a seq"),
    (lambda: sparse.vstack(untyped(3)), TypeError, r"^\[vstack\] arrays must be a sequence"),
    (lambda: sparse.hstack([A, untyped(None)]), TypeError, r"^\[hstack\] an array must be .*None"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_mistakes_name_their_owner(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_broken_files_are_named(tmp_path: Path):
    file = tmp_path / "broken.npz"
    sparse.save_npz(file, A)
    whole = file.read_bytes()
    for content in (b"", whole[:10], whole[:-1], whole[:60] + b"0" * 9 + whole[69:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"^\[load_npz\] .*broken.npz "):
            sparse.load_npz(file)
    parts = {"data": np.ones(2), "indices": [0, 7], "indptr": [0, 1, 2], "shape": [2, 2]}
    np.savez(file, format=b"csr", **untyped({name: np.array(a) for name, a in parts.items()}))
    with pytest.raises(ValueError, match=r"^\[load_npz\] .*broken.npz .*indices\[1\] is 7"):
        sparse.load_npz(file)


def test_files_of_wide_and_narrow_numbers(tmp_path: Path):
    file = tmp_path / "a.npz"
    for there, here in ((np.int64, mx.int64), (np.uint64, mx.uint64), (np.float64, mx.float32)):
        sp.save_npz(file, sp.csr_array(D.astype(there)))
        assert sparse.load_npz(file).dtype == here
    sparse.save_npz(file, A.astype(mx.bfloat16))
    assert sparse.load_npz(file).dtype == mx.float32
