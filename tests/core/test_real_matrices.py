"""Matrices that packages ship, used as a SciPy user would: every step beside SciPy's own."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pyamg
import pytest
import scipy.io
import scipy.sparse as sp
import scipy.sparse.linalg
from support import device_of, to_numpy

import mlx_sparse_nn as sparse

EXAMPLES = ("airfoil", "bar", "knot", "unit_cube", "recirc_flow")


@pytest.fixture
def on_cpu():
    """Float64 is the CPU's."""
    with device_of(mx.float64):
        yield


def example(name: str) -> sp.csr_array:
    return sp.csr_array(pyamg.gallery.load_example(name)["A"]).astype(np.float64)


def close(found, expected) -> None:
    expected = expected.toarray() if sp.issparse(expected) else expected
    found = found.todense() if sparse.issparse(found) else found
    scale = max(1.0, np.abs(expected).max())
    assert found.shape == expected.shape
    assert np.abs(np.array(found) - expected).max() <= 1e-12 * scale


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("read", ["array", "market", "npz"])
def test_matrices_of_pyamg(name, read, tmp_path: Path, on_cpu):
    a = example(name)[:300, :300]
    if read == "market":
        scipy.io.mmwrite(tmp_path / "a.mtx", a)
        A = sparse.from_scipy(scipy.io.mmread(tmp_path / "a.mtx"), dtype=mx.float64)
    elif read == "npz":
        sp.save_npz(tmp_path / "a.npz", a)
        A = sparse.load_npz(tmp_path / "a.npz", dtype=mx.float64)
    else:
        A = sparse.from_scipy(a, dtype=mx.float64)
    n, d = a.shape[0], a.diagonal()
    close(A + A.T, a + a.T)
    close(A - 2 * A, a - 2 * a)
    close(A @ A, a @ a)
    close(A.T @ A, a.T @ a)
    close(A * A.T, a * a.T)
    close(A.multiply(mx.array(d, mx.float64)[:, None]), a.multiply(d[:, None]))
    close(A[5:50, ::3], a[5:50, ::3])
    close(A[[3, 1, 7]], a[[3, 1, 7]])
    close(sparse.vstack([A, A[:7]]), sp.vstack([a, a[:7]]))
    close(sparse.hstack([A, A[:, 2:9]]), sp.hstack([a, a[:, 2:9]]))
    close(A.diagonal(), d)
    close(A.sum(1), a.sum(1))
    close(abs(A).max(0), abs(a).max(0).toarray())
    close(A @ mx.ones(n, mx.float64), a @ np.ones(n))


def two_grid(solve, A, P, b, n_cycles: int):
    """Return the residual norms of two-grid cycles, in words that SciPy and this package share.

    Weighted Jacobi smooths, and the Galerkin product is the matrix of the coarse grid.
    """
    coarse = P.T @ A @ P
    inverse = 2 / 3 / A.diagonal()
    x, norms = 0 * b, []
    for _ in range(n_cycles):
        x = x + inverse * (b - A @ x)
        x = x + P @ solve(coarse, P.T @ (b - A @ x))
        x = x + inverse * (b - A @ x)
        norms.append(float(((b - A @ x) ** 2).sum()) ** 0.5)
    return norms


def test_two_grid_solver_converges_as_with_scipy(on_cpu):
    a = sp.csr_array(pyamg.gallery.poisson((24, 24), format="csr"))
    p = sp.csr_array(pyamg.ruge_stuben_solver(sp.csr_array(a)).levels[0].P)
    b = np.random.default_rng(0).standard_normal(a.shape[0])
    expected = two_grid(lambda c, r: sp.linalg.spsolve(c.tocsc(), r), a, p, b, 8)
    A, P = (sparse.from_scipy(m, dtype=mx.float64) for m in (a, p))

    def solve(coarse, residual):
        return mx.linalg.solve(coarse.todense(), residual[:, None], stream=mx.cpu)[:, 0]

    found = two_grid(solve, A, P, mx.array(b, mx.float64), 8)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < 1e-4 * found[0]


def test_a_galerkin_product_has_gradients():
    a = sp.csr_array(pyamg.gallery.poisson((6, 6), format="csr"))
    p = sp.csr_array(pyamg.ruge_stuben_solver(a, max_coarse=2).levels[0].P)
    A, P = (sparse.from_scipy(m) for m in (a, p))
    x = mx.array(np.random.default_rng(0).standard_normal(p.shape[1]).astype(np.float32))

    def energy(values):
        Q = sparse.CSRArray(values, P.pattern)
        return x @ ((Q.T @ A @ Q) @ x)

    def dense(values):
        Q = sparse.CSRArray(values, P.pattern).todense()
        return x @ (Q.T @ A.todense() @ Q @ x)

    assert mx.allclose(energy(P.data), dense(P.data), rtol=1e-4)
    found, expected = mx.grad(energy)(P.data), mx.grad(dense)(P.data)
    assert np.allclose(to_numpy(found), to_numpy(expected), rtol=1e-4, atol=1e-4)
