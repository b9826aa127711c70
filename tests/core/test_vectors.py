"""Sparse vectors, ``A[i]``: each expression beside SciPy's, derivatives beside dense MLX."""

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from support import assert_equal, dense_of, integers, patterns, random_pattern, spoiled, to_numpy

import mlx_sparse_nn as sparse
from mlx_sparse_nn import CSRArray, SparseVector, csr_array, from_scipy

# What a SciPy user does with a row: v and w of 4, A (3, 4), B (4, 5), S (4, 4); others are dense.
EXPRESSIONS = """
A[1] | A[-1] | A[1, :] | A[1, ...] | A[..., 1] | A[1, 1:3] | A[:, 1] | A[::2, 1] | A[1, [0, 2, 2]]
A[[2, 0], 1] | A[1, ::-1] | A[1, w > 1] | A[1, mask] | A[1:, -1] | A[np.int64(1)] | B.tocoo()[1]
A[np.array(1)] | A[:, np.array(1)]
v.shape | v.ndim | v.nnz | v.toarray() | v.todense() | v.coords[0] | v.T | v.conj() | v.copy()
v.sum() | v.sum(0) | v.sum(axis=-1) | v.mean() | v.max() | v.min(axis=0) | v.argmax() | v.argmin()
v.count_nonzero() | v.nonzero()[0] | list(v)
v @ x | v @ D | v @ B | v @ w | A @ v | E @ v | x @ v | v @ stack | v.dot(x) | S @ v | v @ S @ w
v * x | x * v | v * 2 | 2 * v | v / 2 | v / (x * x + 1) | v * w | v * A | A * v | A.multiply(v)
v.multiply(x) | v * E | E * v | v.multiply(w) | np.float32(2) * v | v.dot(3)
v + w | v - w | v + x | x + v | x - v | v - x | v + 0 | sum([v, w]) | -v | abs(v) | v ** 2
v.power(2) | abs(v).sqrt() | v.sin() | v.maximum(w) | v.minimum(w) | v.maximum(-1) | round(v)
v[1] | v[-1] | v[1:3] | v[[0, 1]] | v[mask] | v[::-1] | v[None] | v[...] | v[v > 0].max()
v.reshape(2, 2) | v.reshape((1, -1)) | v.reshape(4) | v.reshape((2, 2))
v > 1 | v < -1 | v != 0 | v != w | v > w | v == 2 | v < x | v.astype(np.float32)
sparse.vstack([v, w]) | sparse.block_diag([v, w]) | sparse.hstack([v, w])
A.reshape(12) | A.reshape(-1) | A.reshape((12,))
"""
CASES = [e.strip() for line in EXPRESSIONS.splitlines() for e in line.split("|") if e.strip()]


def whole(m, n, seed):
    array = sp.random_array((m, n), density=0.6, rng=np.random.default_rng(seed), format="csr")
    array.data = np.round(array.data * 8 - 4)
    return array.astype(np.float32)


def names():
    rng = np.random.default_rng(5)
    out = {"A": whole(3, 4, 0), "B": whole(4, 5, 1), "S": whole(4, 4, 2)}
    shapes = {"D": (4, 5), "E": (3, 4), "x": 4, "stack": (2, 4, 3)}
    out |= {k: rng.integers(-3, 4, shape).astype(np.float32) for k, shape in shapes.items()}
    return out | {"v": out["A"][1], "w": out["A"][2], "mask": rng.random(4) < 0.5}


def ours(value):
    if sp.issparse(value):
        return from_scipy(value)
    return mx.array(value) if getattr(value, "dtype", None) == np.float32 else value


def dense(value):
    if sparse.issparse(value):
        return to_numpy(value.todense())
    if sp.issparse(value):
        return value.toarray()
    if isinstance(value, list):
        return np.array([dense(v) for v in value])
    return to_numpy(value) if isinstance(value, mx.array) else np.asarray(value)


def of_scipy(expression, there):
    """Return what SciPy gives; its coo arrays have had an index since 1.16 alone."""
    modules = {"np": np, "sparse": sp}
    try:
        return eval(expression, there | modules)
    except TypeError as error:
        if "not subscriptable" not in str(error):
            raise
        there = {k: v.tocsr() if sp.issparse(v) else v for k, v in there.items()}
        return eval(expression.replace(".tocoo()", ""), there | modules)


@pytest.mark.parametrize("expression", CASES)
def test_as_scipy(expression):
    there = names()
    here = {k: ours(v) for k, v in there.items()}
    expected = of_scipy(expression, there)
    found = eval(
        expression.replace("np.float32)", "mx.float32)"),
        here | {"np": np, "mx": mx, "sparse": sparse},
    )
    assert sparse.issparse(found) == sp.issparse(expected)
    assert dense(found).shape == dense(expected).shape
    assert np.allclose(dense(found), dense(expected), atol=1e-6)
    if sparse.issparse(found) and np.ndim(dense(found)) == 1:
        assert isinstance(found, SparseVector)
        assert found.dtype == (mx.bool_ if expected.dtype == bool else mx.float32)


@st.composite
def arrays(draw):
    pattern = draw(patterns(fewest=1))
    data = integers(pattern.data_shape, draw(st.integers(0, 9)))
    return CSRArray(spoiled(pattern, data), pattern)


@given(arrays(), st.data())
def test_rows_and_columns_of_any_pattern(a, data):
    """Unsorted, repeated, empty; blocks that reach past the matrix."""
    if not all(a.shape):
        return
    full = to_numpy(dense_of(a.pattern, a.data))
    i, j = (data.draw(st.integers(-n, n - 1)) for n in a.shape)
    for found, expected in ((a[i], full[i]), (a[:, j], full[:, j]), (a.tocoo()[i], full[i])):
        assert isinstance(found, SparseVector)
        assert np.array_equal(to_numpy(found.todense()), expected)
        assert found.max().item() == expected.max()
        assert found.argmin().item() == expected.argmin()
        assert (found @ mx.ones(found.shape)).item() == expected.sum()
        assert np.array_equal(found.nonzero()[0], np.flatnonzero(expected))


FUNCTIONS = {
    "v @ x": lambda v, x, D: v @ x,
    "x @ v": lambda v, x, D: x @ v,
    "v @ D": lambda v, x, D: (v @ D) ** 2,
    "D @ v": lambda v, x, D: (D @ v) ** 2,
    "v * x": lambda v, x, D: ((v * x) ** 2).sum(),
    "v - x": lambda v, x, D: (v - x) ** 3,
    "v[1:3]": lambda v, x, D: (v[1:5] ** 2) @ x[1:5],
    "v[i]": lambda v, x, D: v[2] * v[0] ** 2,
    "v / x": lambda v, x, D: (v / (x * x + 1)).sum(),
    "v.max()": lambda v, x, D: v.max() * x.sum(),
    "abs(v)": lambda v, x, D: abs(v) @ x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("key", [1, (slice(None), 2)], ids=["row", "column"])
def test_derivatives(name, key):
    pattern = random_pattern(6, 6, 1, 0.8, seed=4)
    a, x, D = integers(pattern.data_shape, 1), integers((6,), 2), integers((6, 6), 3)

    def of_sparse(a, x):
        return FUNCTIONS[name](CSRArray(a, pattern)[key], x, D).sum()

    def of_dense(a, x):
        return FUNCTIONS[name](CSRArray(a, pattern).todense()[key], x, D).sum()

    def second(f):
        return mx.grad(lambda a, x: (mx.grad(f, 1)(a, x) * x).sum() + (mx.grad(f)(a, x) * a).sum())

    assert mx.allclose(of_sparse(a, x), of_dense(a, x))
    for change in (
        lambda f: mx.grad(f)(a, x),
        lambda f: mx.grad(f, 1)(a, x),
        lambda f: second(f)(a, x),
        lambda f: mx.jvp(f, [a, x], [a + 1, x + 2])[1][0],
        lambda f: mx.vmap(f, (0, None))(mx.stack([a, 2 * a]), x),
        lambda f: mx.vmap(mx.grad(f), (None, 0))(a, mx.stack([x, x + 1])),
        lambda f: mx.compile(mx.grad(f))(a, x),
    ):
        assert mx.allclose(change(of_sparse), change(of_dense), atol=1e-5)


def test_vectors_to_scipy_and_back():
    v = csr_array([[0.0, 2.0, 3.0]])[0]
    S = sparse.to_scipy(v)
    assert (S.format, S.shape) == ("coo", (3,))
    back = from_scipy(S)
    assert isinstance(back, SparseVector)
    assert_equal(back.todense(), v.todense())
    assert_equal(csr_array(v).todense(), v.todense()[None])
    assert repr(v) == "SparseVector(3, mlx.core.float32, 2 stored values, density 0.667)"
    assert v.eval() is v


V = csr_array([[0.0, 2.0, 3.0], [1.0, 0.0, 0.0]])[0]
A = csr_array([[0.0, 2.0, 3.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: V[3], IndexError, "column 3 is outside a matrix of 3 columns"),
        (lambda: csr_array([1.0, 0.0]), ValueError, r"csr_array\(\[x\]\)\[0\] is a sparse vector"),
        (lambda: V[0, 1], IndexError, "a vector has one axis, got 2 indices"),
        (lambda: V @ mx.ones(2), ValueError, "inner sizes differ"),
        (lambda: V @ A, ValueError, r"\[A @ B\] A is \(1, 3\), B is \(2, 3\): inner sizes differ"),
        (lambda: V + 1, TypeError, "plus a scalar is dense"),
        (lambda: V + A, ValueError, "shapes differ"),
        (lambda: A + V, ValueError, "shapes differ"),
        (lambda: V + A[:, 0], ValueError, "shapes differ"),
        (lambda: V.sum(1), ValueError, "axis must be None or 0, got 1"),
        (lambda: V == V, TypeError, r"\[A == B\] sparse arrays have no == that is true where"),
        (lambda: V < 1, TypeError, r"use A.todense\(\) < B"),
        (lambda: V.__setitem__(0, 1.0), TypeError, "a SparseVector cannot be written to"),
        (lambda: V.diagonal(), AttributeError, "no attribute 'diagonal'"),
        (lambda: V.tocsc(), AttributeError, "A.T has the columns of A as rows"),
        (lambda: len(V), TypeError, "length is ambiguous"),
        (lambda: bool(V), ValueError, "truth value"),
        (lambda: sparse.save_npz("none", V), TypeError, r"v\[None\] is the matrix of one row"),
        (lambda: sparse.SparseParameter(V), TypeError, "CSRArray or COOArray, got SparseVector"),
    ],
)
def test_what_is_not_there(call, error, message):
    with pytest.raises(error, match=message):
        call()
