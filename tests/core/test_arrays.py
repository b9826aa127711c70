"""CSRArray and COOArray: construction, SciPy's behaviour, products, conversions."""

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    dense_of,
    device_of,
    integers,
    patterns,
    spoiled,
    to_numpy,
    untyped,
)

from mlx_sparse_nn import (
    COOArray,
    CSRArray,
    CSRPattern,
    bsr_array,
    coo_array,
    csr_array,
    csr_matmul,
    from_dense,
    from_scipy,
    to_scipy,
)

leading = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@st.composite
def arrays(draw, dtype=mx.float32):
    pattern = draw(patterns())
    data = integers(pattern.data_shape, draw(st.integers(0, 9)), dtype)
    return CSRArray(spoiled(pattern, data), pattern)


@given(arrays(), leading, st.integers(0, 3))
def test_matmul_of_any_rank(A: CSRArray, lead, p):
    dense = dense_of(A.pattern, A.data)
    x = integers((*lead, A.shape[1], p), 1)
    assert_equal(A @ x, dense @ x)
    assert_equal(csr_matmul(A, x), dense @ x)
    column = integers((A.shape[1],), 4)
    assert_equal(A @ column, dense @ column)
    y = integers((*lead, p, A.shape[0]), 2)
    assert_equal(y @ A, y @ dense)
    v = integers((A.shape[0],), 3)
    assert_equal(v @ A, v @ dense)


def test_a_batch_is_one_call(monkeypatch):
    from mlx_sparse_nn.core import derivatives

    calls = []
    backend = derivatives._backend
    monkeypatch.setattr(derivatives, "_backend", lambda *args: calls.append(args) or backend(*args))
    A = from_dense(integers((4, 6), 1), 2)
    assert (A @ mx.ones((5, 7, 6, 3))).shape == (5, 7, 4, 3)
    assert len(calls) == 1


def test_dense_matmul_is_as_it_was():
    """Teaching mx.array to defer to A leaves dense products and their errors alone."""
    a = integers((3, 3))
    assert_equal(a @ a, mx.matmul(a, a))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _ = a @ untyped("text")


@given(arrays())
def test_views_and_sums(A: CSRArray):
    dense = to_numpy(dense_of(A.pattern, A.data))
    assert np.array_equal(to_numpy(A.todense()), dense)
    assert np.array_equal(to_numpy(A.T.todense()), dense.T)
    assert np.array_equal(to_numpy(A.tocsr().todense()), dense)
    assert np.array_equal(to_numpy(A.tocoo().todense()), dense)
    assert np.array_equal(to_numpy(A.tocoo().tocsr().todense()), dense)
    assert A.tocoo().tocsr(canonical=True).pattern.is_canonical
    assert np.array_equal(to_numpy(A.diagonal()), np.diagonal(dense))
    assert A.sum().item() == dense.sum()
    for axis in (0, 1, -1, -2):
        assert np.array_equal(to_numpy(A.sum(axis=axis)), dense.sum(axis=axis))
    assert np.array_equal(to_numpy((A * 2).todense()), dense * 2)
    assert np.array_equal(to_numpy((-A * mx.array(0.5)).todense()), -dense / 2)
    assert np.array_equal(to_numpy((np.float32(3) * A).todense()), dense * 3)
    rows = [to_numpy(row.todense())[None] for row in A]
    assert np.array_equal(np.concatenate([np.zeros((0, A.shape[1])), *rows]), dense)


@pytest.mark.parametrize("dtype", [mx.bool_, mx.int8, mx.uint8, mx.int32, mx.int64, mx.uint64])
@pytest.mark.parametrize("block_size", [1, 2])
def test_sums_of_integers(dtype, block_size):
    dense = (mx.abs(integers((5, 3))) * 50).astype(dtype)
    for w in (dense, mx.zeros((5, 3), dtype)):
        for axis in (None, 0, 1, -1, -2):
            assert_equal(from_dense(w, block_size).sum(axis), w.sum(axis))


def test_conjugate_transpose():
    A = csr_array((mx.array([1 + 2j, 3j]), [1, 0], [0, 1, 2]), shape=(2, 3))
    assert A.H.todense().tolist() == np.array(A.todense()).conj().T.tolist()
    assert A.astype(mx.complex64).H.shape == (3, 2)
    B = from_dense(mx.ones((2, 3)))
    assert_equal(B.H.todense(), B.T.todense())


@given(arrays())
def test_scipy_and_back(A):
    if A.pattern.layout.has_edges:
        A = A.tocsr()
    S = to_scipy(A)
    assert S.format == ("csr" if A.block_size == 1 else "bsr")
    assert np.array_equal(S.toarray(), to_numpy(A.todense()))
    back = from_scipy(S)
    assert isinstance(back, CSRArray)
    assert back.pattern == A.pattern
    assert_equal(back.data, A.data)
    coo = A.tocoo()
    assert np.array_equal(to_scipy(coo).toarray(), S.toarray())
    assert_equal(from_scipy(to_scipy(coo)).todense(), A.todense())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("block_size", [1, 2])
def test_scipy_has_no_16_bit_floats(dtype, block_size):
    A = from_dense(integers((4, 6)).astype(dtype), block_size)
    for array in (A, A.tocoo()):
        S = to_scipy(array)
        assert S.dtype == np.float32
        assert np.array_equal(S.toarray(), to_numpy(A.todense()))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="it is float64 here")
@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble])
def test_long_doubles_are_refused(dtype):
    with pytest.raises(TypeError, match=r"^\[from_dense\] w is (float|complex)\d+, .*; cast it by"):
        from_dense(np.eye(3, dtype=dtype))


@given(arrays())
def test_from_dense_keeps_the_blocks_that_hold_a_nonzero(A):
    dense = A.todense()
    for block_size in {1, A.block_size}:
        B = from_dense(dense, block_size)
        assert_equal(B.todense(), dense)
        assert B.pattern.is_canonical
        if block_size == 1:
            assert B.nnz == np.count_nonzero(np.array(dense))
        else:
            assert (np.array(B.data) != 0).any(axis=(1, 2)).all()


def test_canonical_sorts_and_adds_up():
    A = csr_array(([1.0, 2.0, 3.0, 4.0], [2, 0, 2, 1], [0, 3, 4]), shape=(2, 3), canonical=True)
    assert A.pattern == CSRPattern([0, 2, 3], [0, 2, 1], (2, 3))
    assert A.data.tolist() == [2, 4, 4]
    coo = coo_array(([1, 2, 3], ([1, 0, 1], [0, 1, 0])), shape=(2, 2))
    assert coo.tocsr().data.tolist() == [2, 4]
    assert coo.tocsr().dtype == mx.int32
    assert coo.tocsr(canonical=False).nnz == 3


def test_repeats_in_16_bits_add_up_in_float32():
    n = 4096
    coo = coo_array((mx.ones(n, mx.bfloat16), ([0] * n, [0] * n)), shape=(1, 1))
    assert coo.tocsr().data.tolist() == [n]
    assert coo.tocsr(canonical=False).todense().item() == n


@pytest.mark.parametrize("kind", [list, np.array, mx.array])
def test_data_may_be_lists_numpy_or_mlx(kind):
    A = csr_array((kind([1.0, 2.0]), kind([0, 1]), kind([0, 1, 2])), shape=(2, 2))
    assert A.dtype == mx.float32
    assert (A @ kind([3.0, 4.0])).tolist() == [3.0, 8.0]
    blocks = bsr_array((kind([[[1.0, 2.0], [3.0, 4.0]]]), kind([0]), kind([0, 1])), shape=(2, 2))
    assert blocks.todense().tolist() == [[1, 2], [3, 4]]
    assert (kind([1.0, 1.0]) @ blocks).tolist() == [4, 6] if kind is not list else True


@pytest.mark.parametrize(
    ("kind", "dtype"), [("f4", mx.float32), ("c8", mx.complex64), ("i4", mx.int32)]
)
def test_an_array_without_entries_keeps_its_dtype(kind, dtype):
    A = from_scipy(sp.csr_array((2, 3), dtype=kind))
    assert isinstance(A, CSRArray)
    assert A.dtype == dtype
    assert A.sum().item() == 0


def test_float64_on_the_cpu():
    with device_of(mx.float64):
        A = csr_array((mx.array([1 / 3], mx.float64), [0], [0, 1]), shape=(1, 1))
        assert (A @ mx.array([3.0], mx.float64)).dtype == mx.float64
        assert A.todense().item() == 1 / 3


class TestAsSciPy:
    """len, bool and iteration do what SciPy's sparse arrays do."""

    ARRAYS = (
        (
            csr_array(([1.0], [0], [0, 1, 1]), shape=(2, 2)),
            sp.csr_array(([1.0], [0], [0, 1, 1]), (2, 2)),
        ),
        (coo_array(([1.0], ([0], [0])), shape=(2, 2)), sp.coo_array(([1.0], ([0], [0])), (2, 2))),
        (csr_array(([2.0], [0], [0, 1]), shape=(1, 1)), sp.csr_array([[2.0]])),
        (csr_array(([], [], [0, 0]), shape=(1, 1)), sp.csr_array((1, 1))),
    )

    @pytest.mark.parametrize("pair", ARRAYS)
    @pytest.mark.parametrize("function", [len, bool])
    def test_len_and_bool(self, pair, function):
        outcomes = []
        for array in pair:
            try:
                outcomes.append(function(array))
            except (TypeError, ValueError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]

    def test_iteration_yields_rows(self):
        ours, theirs = self.ARRAYS[0]
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(np.array(a.todense()), untyped(b).toarray())


def test_repr():
    A = csr_array(([1.0], [0], [0, 1, 1]), shape=(2, 2))
    assert repr(A) == "CSRArray(2 x 2, mlx.core.float32, 1 stored values, density 0.25)"
    assert "block_size=2" in repr(from_dense(mx.ones((2, 4)), 2))
    assert repr(A.tocoo()).startswith("COOArray(2 x 2, mlx.core.float32, 1 stored")


A = csr_array(([1.0, 2.0], [0, 1], [0, 1, 2]), shape=(2, 3))
BAD = [
    (lambda: A @ mx.ones(2), ValueError, r"A is \(2, 3\), x has shape \(2,\): inner sizes differ"),
    (lambda: A @ mx.ones((4, 2, 3)), ValueError, r"x has shape \(4, 2, 3\): inner sizes differ"),
    (lambda: A @ mx.array(1.0), ValueError, r"x has shape \(\)"),
    (lambda: untyped(A) @ A, ValueError, r"\[A @ B\] A is \(2, 3\), B is \(2, 3\): inner sizes"),
    (lambda: A @ "x", TypeError, r"x must be a dense array, got str"),
    (lambda: A @ mx.ones(5), ValueError, r"\[A @ x\] A is \(2, 3\), x has shape \(5,\)"),
    (lambda: csr_matmul(A, mx.ones(5)), ValueError, r"\[csr_matmul\] A is \(2, 3\), x has shape"),
    (lambda: csr_matmul(A, "x"), TypeError, r"\[csr_matmul\] x must be a dense array, got str"),
    (lambda: from_scipy(np.eye(2)), TypeError, "got ndarray; use from_dense"),
    (lambda: from_dense([[1], [2, 3]]), ValueError, r"\[from_dense\] .* got a ragged list"),
    (lambda: CSRPattern([[0], [1, 2]], [0], (1, 1)), ValueError, "indptr must be rectangular"),
    (lambda: CSRPattern(untyped(None), [0], (1, 1)), ValueError, "indptr"),
    (lambda: mx.ones(3) @ A, ValueError, r"\[x @ A\] x has shape \(3,\), A is \(2, 3\)"),
    (lambda: csr_matmul(untyped(mx.ones((2, 2))), mx.ones(2)), TypeError, r"A must be a CSRArray"),
    (lambda: A * mx.ones(2), ValueError, r"A is \(2, 3\), and shape \(2,\) does not broadcast"),
    (lambda: A * untyped("2"), TypeError, r"\[A.multiply\] x must be a dense array, got str"),
    (lambda: A.sum(axis=2), ValueError, r"axis must be None, 0 or 1, got 2"),
    (lambda: csr_array((["a"], [0], [0, 1]), shape=(1, 1)), TypeError, r"data must be numeric"),
    (lambda: csr_array(([None], [0], [0, 1]), shape=(1, 1)), TypeError, r"data must be numeric"),
    (lambda: csr_array(([1.0, 2.0], [0], [0, 1]), shape=(1, 1)), ValueError, r"data has shape"),
    (lambda: csr_array(([[1.0]], [0], [0, 1]), shape=(1, 1)), ValueError, r"data has shape \(1, 1"),
    (lambda: csr_array(([1.0], [1], [0, 1]), shape=(1, 1)), ValueError, r"indices\[0\] is 1"),
    (lambda: csr_array(mx.ones((2, 2)), (2, 3)), ValueError, r"shape is \(2, 3\), but the matrix"),
    (lambda: csr_array("matrix"), TypeError, r"takes \(data, indices, indptr\), .*, got str"),
    (lambda: csr_array(([1.0], [0], [0, 1], 3)), TypeError, r"takes \(data, indices, indptr\)"),
    (lambda: csr_array((-1, 2)), ValueError, r"n_rows must be in \[0"),
    (lambda: coo_array(([1.0], ([0], [5])), shape=(2, 2)), ValueError, r"col\[0\] is 5, outside"),
    (lambda: coo_array(([1.0], ([-1], [0])), shape=(2, 2)), ValueError, r"row\[0\] is -1, outside"),
    (lambda: coo_array(([1.0], ([0.5], [0])), shape=(2, 2)), TypeError, r"row must be integers"),
    (lambda: coo_array(([1.0], ([0, 1], [0])), shape=(2, 2)), ValueError, r"be of one length"),
    (lambda: coo_array(([1.0], [0]), shape=(2, 2)), TypeError, r"takes \(row, col\)"),
    (lambda: bsr_array((mx.ones((1, 2, 3)), [0], [0, 1]), (2, 2)), ValueError, r"blocks must be"),
    (lambda: bsr_array((mx.ones((1, 2, 2)), [0], [0, 1]), (3, 3)), ValueError, "indptr has 2"),
    (
        lambda: to_scipy(bsr_array((mx.ones((1, 2, 2)), [1], [0, 1]), (2, 3))),
        ValueError,
        r"block_size 2 does not divide the shape \(2, 3\); use to_scipy\(A.tocsr\(\)\)",
    ),
    (lambda: from_dense(mx.ones(4)), ValueError, r"w must be a matrix, got shape \(4,\)"),
    (lambda: from_scipy(np.ones(2)), TypeError, r"got ndarray"),
    (lambda: to_scipy(untyped(mx.ones(2))), TypeError, r"takes a CSRArray or COOArray, got array"),
    (
        lambda: CSRArray(mx.ones(1), untyped("pattern")),
        TypeError,
        r"pattern must be a CSRPattern, got str",
    ),
    (
        lambda: COOArray([1.0], [0], [0], shape=untyped(3)),
        ValueError,
        r"shape must be \(n_rows, n_cols\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_from_scipy_refuses_indices_past_32_bits():
    S = sp.csr_array((np.ones(1), np.array([2**40]), np.array([0, 1])), shape=(1, 2**41))
    with pytest.raises(ValueError, match="n_cols must be in"):
        from_scipy(S)
