"""Matrices that packages ship, used as a SciPy user would: every step beside SciPy's own."""

import ast
from io import StringIO
from pathlib import Path
from typing import Any

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


def example(name: str) -> Any:
    return sp.csr_array(pyamg.gallery.load_example(name)["A"]).astype(np.float64)


def interpolation(a: Any, **options: Any) -> Any:
    """Return pyamg's interpolation from its first coarse grid."""
    solver: Any = pyamg.ruge_stuben_solver(a, **options)
    return sp.csr_array(solver.levels[0].P)


def close(found, expected, tolerance: float = 1e-12) -> None:
    expected = expected.toarray() if sp.issparse(expected) else expected
    found = np.array(found.todense() if sparse.issparse(found) else found)
    assert found.shape == expected.shape
    if expected.dtype == bool:
        assert np.array_equal(found, expected)
    else:
        scale = max(1.0, np.abs(expected).max(initial=0))
        assert np.abs(found - expected).max(initial=0) <= tolerance * scale


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
    a: Any = sp.csr_array(pyamg.gallery.poisson((24, 24), format="csr"))
    p = interpolation(a)
    b = np.random.default_rng(0).standard_normal(a.shape[0])
    expected = two_grid(lambda c, r: sp.linalg.spsolve(c.tocsc(), r), a, p, b, 8)
    A, P = (sparse.from_scipy(m, dtype=mx.float64) for m in (a, p))

    def solve(coarse, residual):
        return mx.linalg.solve(coarse.todense(), residual[:, None], stream=mx.cpu)[:, 0]

    found = two_grid(solve, A, P, mx.array(b, mx.float64), 8)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < 1e-4 * found[0]


def test_a_galerkin_product_has_gradients():
    a: Any = sp.csr_array(pyamg.gallery.poisson((6, 6), format="csr"))
    p = interpolation(a, max_coarse=2)
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


# What SciPy tests itself with, from the wheel that is installed.
SCIPY = Path(scipy.__path__[0])


def texts_of(file: str) -> dict[str, str]:
    """Return the texts that one of SciPy's test files names, without running it."""
    tree = ast.parse((SCIPY / file).read_text(encoding="utf-8"))
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


MARKET = {
    name: text for name, text in texts_of("io/tests/test_mmio.py").items() if "MatrixMarket" in text
}
BOEING = texts_of("io/_harwell_boeing/tests/test_hb.py")["SIMPLE"]
MATLAB = sorted((SCIPY / "io/matlab/tests/data").glob("*sparse*.mat"))
ARCHIVES = sorted((SCIPY / "sparse/tests/data").glob("*.npz"))


def matrices_of_scipy():
    """Return (name, matrix) of all that SciPy's reader makes a sparse matrix of."""
    for name, text in MARKET.items():
        if "over64bit" in name:  # which SciPy itself refuses
            continue
        read = scipy.io.mmread(StringIO(text))
        yield name, sp.csr_array(read)
    yield "harwell_boeing", scipy.io.hb_read(StringIO(BOEING), spmatrix=False)
    for file in MATLAB:
        for name, value in scipy.io.loadmat(file, spmatrix=False).items():
            if sp.issparse(value):
                yield f"{file.stem}:{name}", value
    for file in ARCHIVES:
        yield file.stem, sp.load_npz(file)
    # A matrix of least squares, and one of magnetohydrodynamics.
    with np.load(SCIPY / "sparse/linalg/tests/propack_test_data.npz", allow_pickle=True) as found:
        for name in ("A_real", "A_complex"):
            yield name, sp.csr_array(found[name].item())[:500, :400]


THEIRS = list(matrices_of_scipy())


def test_scipys_wheel_holds_its_matrices():
    assert len(MARKET) >= 10
    assert len(MATLAB) >= 10
    assert len(ARCHIVES) >= 2
    assert len(THEIRS) >= 25


@pytest.mark.parametrize(("name", "a"), THEIRS, ids=[name for name, _ in THEIRS])
def test_matrices_of_scipys_own_tests(name, a, tmp_path: Path, on_cpu):
    a = sp.csr_array(a)
    kind, dtype = (np.complex64, mx.complex64) if a.dtype.kind == "c" else (np.float64, mx.float64)
    a = a.astype(kind)
    check_all(sparse.from_scipy(a, dtype=dtype), a, tmp_path)


def check_all(A, a, folder: Path) -> None:
    """Add, multiply, slice, reduce, stack, save."""
    m, n = a.shape
    tolerance = 1e-6 if a.dtype == np.complex64 else 1e-12
    for found, expected in (
        (A, a),
        (A.T, a.T),
        (A.H, a.T.conj()),
        (A + 2 * A, a + 2 * a),
        (A - A, a - a),
        (A @ A.T, a @ a.T),
        (A.T @ A, a.T @ a),
        (A * A, a * a),
        (A[: m // 2 + 1, ::2], a[: m // 2 + 1, ::2]),
        (A[::-1], a[::-1]),
        (A[m - 1], a[m - 1]),
        (A[:, n // 2], a[:, n // 2]),
        (A[m - 1] @ A.T, a[m - 1] @ a.T),
        (sparse.vstack([A, A[:1]]), sp.vstack([a, a[:1]])),
        (sparse.hstack([A, A[:, :1]]), sp.hstack([a, a[:, :1]])),
        (sparse.block_diag([A, A]), sp.block_diag([a, a])),
        (sparse.kron(A[:2, :2], A), sp.kron(a[:2, :2], a)),
        (A.sum(0), a.sum(0)),
        (A.diagonal(), a.diagonal()),
        (abs(A).max(1), abs(a).max(1)),
        (A != 0, a != 0),
        (A @ mx.ones((n, 2), A.dtype), a @ np.ones((n, 2), a.dtype)),
    ):
        close(found, expected, tolerance)
    sparse.save_npz(folder / "ours.npz", A)
    assert np.array_equal(sp.load_npz(folder / "ours.npz").toarray(), a.toarray())
    sp.save_npz(folder / "theirs.npz", a)
    close(sparse.load_npz(folder / "theirs.npz", dtype=A.dtype), a, tolerance)


FIELDS = ("real", "complex", "integer", "pattern")
SYMMETRIES = ("general", "symmetric", "skew-symmetric", "hermitian")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_matrix_market_of_every_field_and_symmetry(field, symmetry, tmp_path: Path, on_cpu):
    if symmetry == "hermitian" and field != "complex":
        symmetry = "symmetric"  # which it is, where values are real
    if symmetry == "skew-symmetric" and field == "pattern":
        symmetry = "symmetric"  # a pattern has no signs
    rng = np.random.default_rng(3)
    a = np.round(sp.random_array((9, 9), density=0.3, rng=rng).toarray() * 8 - 3)
    a = a * (rng.random((9, 9)) < 0.3) + 0j
    a = a + 1j * a.T if field == "complex" else a
    other = {"general": 0, "symmetric": a.T, "skew-symmetric": -a.T, "hermitian": a.conj().T}
    a = a + other[symmetry]
    a = a if field == "complex" else a.real
    a = (a != 0).astype(int) if field == "pattern" else a.astype(int) if field == "integer" else a
    file = tmp_path / "a.mtx"
    scipy.io.mmwrite(file, sp.coo_array(a), field=field, symmetry=symmetry)
    assert f"coordinate {field} {symmetry}" in file.read_text().splitlines()[0]
    read = scipy.io.mmread(file, spmatrix=False)
    dtype = mx.complex64 if field == "complex" else mx.float64
    A = sparse.from_scipy(read, dtype=dtype)
    assert np.array_equal(np.array(A.todense()), a.astype(np.array(A.todense()).dtype))
    kind = np.complex64 if field == "complex" else np.float64
    check_all(A.tocsr(), sp.csr_array(a.astype(kind)), tmp_path)
