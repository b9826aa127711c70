"""The Ising Hamiltonian, expectations and exact energies, against dense matrices and the table."""

import re
import time

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse.linalg

from mlx_sparse_nn import CSRArray, csr_array
from mlx_sparse_nn.physics import exact_ground_energy, expectation, transverse_field_ising

PAULI_X = np.array([[0.0, 1.0], [1.0, 0.0]])
PAULI_Z = np.array([[-1.0, 0.0], [0.0, 1.0]])  # basis state 1, a set bit, has z = +1

# (n_qubits, field, periodic, energy), by exact diagonalisation
TABLE = [
    (8, 0.5, False, -7.640592553590082),
    (8, 0.7, False, -8.305610965881469),
    (8, 1.0, False, -9.837951447459405),
    (8, 1.5, False, -13.19140495218888),
    (8, 0.5, True, -8.509082235140268),
    (8, 0.7, True, -9.023734141383011),
    (8, 1.0, True, -10.251661790966008),
    (8, 1.5, True, -13.385005233150757),
    (12, 0.7, False, -12.7926160298358),
    (12, 0.7, True, -13.523686903200275),
]


def chains(*sizes):
    """Return the open chains and the rings of these sizes, as (n_qubits, periodic)."""
    return [(n, periodic) for n in sizes for periodic in (False, True) if n > 2 or not periodic]


def on_site(operator, site, n_qubits):
    """Return the operator on one site; site 0 is bit 0, the last factor of the product."""
    left, right = np.eye(2 ** (n_qubits - 1 - site)), np.eye(2**site)
    return np.kron(np.kron(left, operator), right)


def dense_ising(n_qubits, field, coupling=1.0, longitudinal=0.0, periodic=False):
    n_bonds = n_qubits if periodic else n_qubits - 1
    h, j, g = (
        np.broadcast_to(np.asarray(values, dtype=float), (size,))
        for values, size in ((field, n_qubits), (coupling, n_bonds), (longitudinal, n_qubits))
    )
    x = [on_site(PAULI_X, site, n_qubits) for site in range(n_qubits)]
    z = [on_site(PAULI_Z, site, n_qubits) for site in range(n_qubits)]
    H = np.zeros((2**n_qubits, 2**n_qubits))
    for site in range(n_qubits):
        H -= h[site] * x[site] + g[site] * z[site]
    for bond in range(n_bonds):
        H -= j[bond] * z[bond] @ z[(bond + 1) % n_qubits]
    return H


def todense(H):
    return np.array(H.todense())


class TestHamiltonian:
    @pytest.mark.parametrize(("n_qubits", "periodic"), chains(1, 2, 3, 4, 5, 8))
    def test_equals_the_dense_matrix(self, n_qubits, periodic):
        H = transverse_field_ising(
            n_qubits, 0.7, coupling=1.25, longitudinal=-0.5, periodic=periodic
        )
        expected = dense_ising(n_qubits, 0.7, 1.25, -0.5, periodic)
        np.testing.assert_allclose(todense(H), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("periodic", [False, True])
    @pytest.mark.parametrize("kind", [list, tuple, np.array, mx.array])
    def test_one_value_per_bond_and_site(self, kind, periodic):
        rng = np.random.default_rng(0)
        n_qubits, n_bonds = 5, 5 if periodic else 4
        h, j, g = (rng.normal(size=size).tolist() for size in (n_qubits, n_bonds, n_qubits))
        H = transverse_field_ising(
            n_qubits, kind(h), coupling=kind(j), longitudinal=kind(g), periodic=periodic
        )
        expected = dense_ising(n_qubits, h, j, g, periodic)
        np.testing.assert_allclose(todense(H), expected, rtol=1e-5, atol=1e-5)

    def test_one_site_has_no_bonds(self):
        H = transverse_field_ising(1, 2.0, coupling=[], longitudinal=3.0)
        np.testing.assert_array_equal(todense(H), [[3.0, -2.0], [-2.0, -3.0]])

    def test_set_bits_are_up_and_bit_i_is_site_i(self):
        diagonal = np.array(transverse_field_ising(3, 0.0, longitudinal=[1, 10, 100]).diagonal())
        assert diagonal[0b111] == -2 - 111
        assert diagonal[0b000] == -2 + 111
        assert diagonal[0b001] == 0 - 1 + 110  # site 0 up: one bond broken

    def test_without_longitudinal_field_flipping_every_site_changes_nothing(self):
        H = todense(transverse_field_ising(6, 0.7, coupling=[1, 2, 3, 4, 5]))
        np.testing.assert_array_equal(H, H[::-1, ::-1])

    @pytest.mark.parametrize(("n_qubits", "periodic"), chains(1, 2, 3, 4, 9, 12))
    def test_is_canonical_and_symmetric_with_its_zeros_stored(self, n_qubits, periodic):
        H = transverse_field_ising(n_qubits, 0.3, periodic=periodic)
        n_rows = 2**n_qubits
        assert isinstance(H, CSRArray)
        assert H.shape == (n_rows, n_rows)
        assert H.nnz == n_rows * (n_qubits + 1)
        assert H.pattern.is_canonical
        rows, cols = np.arange(n_rows), H.pattern.indices.reshape(n_rows, -1)
        flips = rows[:, None] ^ np.append(0, 1 << np.arange(n_qubits))
        np.testing.assert_array_equal(cols, np.sort(flips, axis=1))
        assert H.T.pattern == H.pattern
        assert mx.array_equal(H.T.data, H.data)

    def test_zero_parameters_are_stored(self):
        H = transverse_field_ising(4, 0.0, coupling=0.0)
        assert H.nnz == 16 * 5
        np.testing.assert_array_equal(H.data, np.zeros(80))
        assert not np.signbit(H.data).any()

    def test_size_of_the_readme(self):
        H = transverse_field_ising(8, 0.7)
        assert (H.shape, H.nnz) == ((256, 256), 2304)

    @pytest.mark.parametrize(
        ("dtype", "rtol"),
        [
            (mx.float16, 1e-3),
            (mx.bfloat16, 1e-2),
            (mx.float32, 1e-7),
            (mx.float64, 1e-16),
            (mx.complex64, 1e-7),
        ],
    )
    def test_dtypes(self, dtype, rtol):
        with mx.stream(mx.cpu):
            H = transverse_field_ising(4, 0.7, longitudinal=1 / 3, dtype=dtype)
            values = np.array(H.data.astype(mx.float32) if dtype == mx.bfloat16 else H.data)
        assert H.dtype == dtype
        expected = dense_ising(4, 0.7, longitudinal=1 / 3)
        expected = expected[H.pattern.row_indices, H.pattern.indices]
        np.testing.assert_allclose(values, expected, rtol=rtol, atol=4 * rtol)

    def test_products_with_vectors_and_batches(self):
        rng = np.random.default_rng(1)
        H, dense = transverse_field_ising(6, 0.7), dense_ising(6, 0.7)
        psi = rng.normal(size=(3, 64, 2)).astype(np.float32)
        np.testing.assert_allclose(H @ mx.array(psi), dense @ psi, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            H @ mx.array(psi[0, :, 0]), dense @ psi[0, :, 0], rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize(("n_qubits", "seconds"), [(16, 2), (18, 8)])
    def test_is_built_fast(self, n_qubits, seconds):
        began = time.perf_counter()
        mx.eval(transverse_field_ising(n_qubits, 0.7).data)
        assert time.perf_counter() - began < seconds

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"n_qubits": 0}, ValueError, "n_qubits must be in [1, 2**31 - 1], got 0"),
            ({"n_qubits": -3}, ValueError, "n_qubits must be in [1, 2**31 - 1], got -3"),
            ({"n_qubits": 2.0}, TypeError, "n_qubits must be an integer, got 2.0"),
            ({"n_qubits": True}, TypeError, "n_qubits must be an integer, got True"),
            (
                {"n_qubits": 2, "periodic": True},
                ValueError,
                "n_qubits must be at least 3 for a ring, got 2",
            ),
            ({"n_qubits": 27}, ValueError, "n_qubits 27 needs 2**27 * 28 stored values"),
            ({"n_qubits": 10**6}, ValueError, "n_qubits 1000000 needs 2**1000000"),
            (
                {"coupling": [1.0] * 4},
                ValueError,
                "coupling must be a number or one for each of 3 bonds, got shape (4,)",
            ),
            (
                {"coupling": [1.0] * 3, "periodic": True},
                ValueError,
                "coupling must be a number or one for each of 4 bonds, got shape (3,)",
            ),
            (
                {"field": [0.5] * 3},
                ValueError,
                "field must be a number or one for each of 4 sites, got shape (3,)",
            ),
            (
                {"longitudinal": np.ones((4, 1))},
                ValueError,
                "longitudinal must be a number or one for each of 4 sites, got shape (4, 1)",
            ),
            ({"field": float("nan")}, ValueError, "field must be finite, got nan"),
            ({"coupling": [1, 2, float("inf")]}, ValueError, "coupling must be finite, got [1, 2,"),
            ({"field": "0.7"}, TypeError, "field must be real numbers, got '0.7'"),
            ({"field": None}, TypeError, "field must be real numbers, got None"),
            ({"field": True}, TypeError, "field must be real numbers, got True"),
            ({"coupling": 1j}, TypeError, "coupling must be real numbers, got 1j"),
            (
                {"dtype": mx.int32},
                TypeError,
                "dtype must be a floating type or complex64, got mlx.core.int32",
            ),
            (
                {"dtype": "float32"},
                TypeError,
                "dtype must be a floating type or complex64, got 'float32'",
            ),
            ({"field": 1e39}, ValueError, "energies of up to 1e+39 overflow mlx.core.float32"),
            (
                {"coupling": 3e4, "dtype": mx.float16},
                ValueError,
                "energies of up to 9e+04 overflow mlx.core.float16",
            ),
            ({"longitudinal": 1e308, "dtype": mx.float64}, ValueError, "energies of up to inf"),
        ],
    )
    def test_bad_input(self, arguments, error, message):
        arguments = {"n_qubits": 4, "field": 0.7, **arguments}
        with pytest.raises(error, match=re.escape(f"[transverse_field_ising] {message}")):
            transverse_field_ising(**arguments)


class TestExpectation:
    @pytest.mark.parametrize("periodic", [False, True])
    @pytest.mark.parametrize("n_qubits", [3, 8, 16])
    def test_uniform_superposition_has_minus_field_per_site(self, n_qubits, periodic):
        H = transverse_field_ising(n_qubits, 0.7, periodic=periodic)
        energy = expectation(H, mx.ones(2**n_qubits))
        assert energy.shape == ()
        assert energy.dtype == mx.float32
        assert energy.item() == pytest.approx(-0.7 * n_qubits, rel=1e-6)

    def test_every_eigenstate_has_its_eigenvalue(self):
        energies, states = np.linalg.eigh(dense_ising(5, 0.7, periodic=True))
        H = transverse_field_ising(5, 0.7, periodic=True)
        actual = [expectation(H, mx.array(psi.astype(np.float32))).item() for psi in states.T]
        np.testing.assert_allclose(actual, energies, rtol=1e-5, atol=1e-5)

    def test_complex_state_of_any_norm(self):
        psi = random_state(6, seed=2)
        dense = dense_ising(6, 0.7, longitudinal=0.4)
        H = transverse_field_ising(6, 0.7, longitudinal=0.4)
        expected = (psi.conj() @ dense @ psi).real / (psi.conj() @ psi).real
        for factor in (1, 1e-3, 40j):
            energy = expectation(H, mx.array(factor * psi))
            assert energy.dtype == mx.float32
            assert energy.item() == pytest.approx(expected, rel=1e-5)

    def test_complex_hermitian_matrix(self):
        pauli_y = csr_array(([1j, -1j], [1, 0], [0, 1, 2]), shape=(2, 2))
        assert expectation(pauli_y, mx.array([1.0, -1j])).item() == pytest.approx(1.0)
        assert expectation(pauli_y, mx.array([1.0, 1.0])).item() == pytest.approx(0.0)

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.int32])
    def test_narrow_states_are_summed_in_float32(self, dtype):
        H = transverse_field_ising(12, 1.0)
        energy = expectation(H, mx.full(4096, 4, dtype))
        assert energy.dtype == mx.float32
        assert energy.item() == pytest.approx(-12, rel=1e-6)

    def test_float64_on_the_cpu(self):
        with mx.stream(mx.cpu):
            H = transverse_field_ising(8, 0.7, dtype=mx.float64)
            energy, state = np.linalg.eigh(dense_ising(8, 0.7))
            actual = expectation(H, mx.array(state[:, 0], dtype=mx.float64))
            assert actual.dtype == mx.float64
            assert actual.item() == pytest.approx(energy[0], rel=1e-14)

    def test_size_that_is_no_power_of_two(self):
        A = csr_array((np.arange(1, 12.0), np.arange(11), np.arange(12)), shape=(11, 11))
        assert expectation(A, mx.ones(11)).item() == pytest.approx(6)

    @pytest.mark.parametrize("dtype", [np.float32, np.complex64])
    def test_gradient_in_the_state(self, dtype):
        psi = random_state(5, seed=3)
        psi = psi if dtype == np.complex64 else psi.real
        dense = dense_ising(5, 0.7, longitudinal=0.2)
        H = transverse_field_ising(5, 0.7, longitudinal=0.2)
        norm = (psi.conj() @ psi).real
        energy = (psi.conj() @ dense @ psi).real / norm
        gradient = mx.grad(lambda psi: expectation(H, psi))(mx.array(psi))
        expected = 2 * (dense @ psi - energy * psi) / norm
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    def test_gradient_in_the_stored_values(self):
        psi = random_state(4, seed=4).real
        H = transverse_field_ising(4, 0.7)
        gradient = mx.grad(lambda data: expectation(CSRArray(data, H.pattern), mx.array(psi)))(
            H.data
        )
        expected = np.outer(psi, psi)[H.pattern.row_indices, H.pattern.indices] / (psi @ psi)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_compile_and_vmap(self):
        H = transverse_field_ising(5, 0.7)
        psi = mx.array(np.stack([random_state(5, seed).real for seed in range(3)]))
        expected = mx.stack([expectation(H, row) for row in psi])
        mapped = mx.vmap(lambda psi: expectation(H, psi))(psi)
        compiled = mx.compile(lambda psi: expectation(H, psi))(psi[0])
        np.testing.assert_allclose(mapped, expected, rtol=1e-6)
        np.testing.assert_allclose(compiled, expected[0], rtol=1e-6)

    def test_descent_reaches_the_ground_state(self):
        H = transverse_field_ising(6, 0.7, periodic=True)
        step = mx.grad(lambda psi: expectation(H, psi))
        psi = mx.ones(64) / 8
        for _ in range(200):
            psi = psi - 0.05 * step(psi)
        exact = exact_ground_energy(6, 0.7, periodic=True)
        assert expectation(H, psi).item() == pytest.approx(exact, rel=1e-5)

    @pytest.mark.parametrize(
        ("H", "psi", "error", "message"),
        [
            (np.eye(4), mx.ones(4), TypeError, "H must be a CSRArray, got ndarray"),
            (None, np.ones(16), TypeError, "psi must be an mx.array, got ndarray"),
            (None, mx.ones(8), ValueError, "psi has shape (8,), H needs (16,)"),
            (None, mx.ones((16, 1)), ValueError, "psi has shape (16, 1), H needs (16,)"),
            (None, mx.array(1.0), ValueError, "psi has shape (), H needs (16,)"),
            (
                csr_array(([1.0], [0], [0, 1]), shape=(1, 4)),
                mx.ones(4),
                ValueError,
                "H must be square, got shape (1, 4)",
            ),
        ],
    )
    def test_bad_input(self, H, psi, error, message):
        H = transverse_field_ising(4, 0.7) if H is None else H
        with pytest.raises(error, match=re.escape(f"[expectation] {message}")):
            expectation(H, psi)


class TestExactGroundEnergy:
    @pytest.mark.parametrize(("n_qubits", "field", "periodic", "energy"), TABLE)
    def test_table(self, n_qubits, field, periodic, energy):
        actual = exact_ground_energy(n_qubits, field, periodic=periodic)
        assert isinstance(actual, float)
        assert actual == pytest.approx(energy, rel=1e-13)

    @pytest.mark.parametrize(("n_qubits", "periodic"), chains(1, 2, 3, 4, 5, 6, 7))
    def test_equals_dense_diagonalisation_for_every_sign(self, n_qubits, periodic):
        bonds, flips = dense_ising(n_qubits, 0, 1, 0, periodic), dense_ising(n_qubits, 1, 0)
        for coupling in (-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0):
            for field in (-1.5, -1.0, -0.7, -0.05, 0.0, 0.05, 0.7, 1.0, 1.5):
                lowest = np.linalg.eigvalsh(coupling * bonds + field * flips)[0]
                actual = exact_ground_energy(n_qubits, field, coupling=coupling, periodic=periodic)
                assert actual == pytest.approx(lowest, rel=1e-12, abs=1e-12), (coupling, field)

    def test_equals_the_lowest_eigenvalue_of_the_sparse_array(self):
        for n_qubits, field, periodic, energy in TABLE:
            with mx.stream(mx.cpu):
                H = transverse_field_ising(n_qubits, field, periodic=periodic, dtype=mx.float64)
                parts = (np.array(H.data), H.pattern.indices, H.pattern.indptr)
            matrix = scipy.sparse.csr_array(parts, shape=H.shape)
            lowest = scipy.sparse.linalg.eigsh(matrix, k=1, which="SA")[0][0]
            assert lowest == pytest.approx(energy, rel=1e-12)

    def test_energies_per_site_that_the_docs_quote(self):
        assert exact_ground_energy(8, 0.7) / 8 == pytest.approx(-1.0382, abs=5e-5)
        assert exact_ground_energy(8, 0.7, periodic=True) / 8 == pytest.approx(-1.1280, abs=5e-5)
        long = 100_000
        critical = exact_ground_energy(long, 1.0, periodic=True) / long
        assert critical == pytest.approx(-4 / np.pi, rel=1e-9)
        assert exact_ground_energy(long, 0.7, periodic=True) / long == pytest.approx(
            -1.12683, abs=5e-6
        )

    def test_frustrated_ring_without_field_breaks_one_bond(self):
        assert exact_ground_energy(9, 0.0, coupling=-1.0, periodic=True) == pytest.approx(-7)
        assert exact_ground_energy(8, 0.0, coupling=-1.0, periodic=True) == pytest.approx(-8)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"n_qubits": 0}, ValueError, "n_qubits must be in [1, 2**31 - 1], got 0"),
            ({"n_qubits": 8.0}, TypeError, "n_qubits must be an integer, got 8.0"),
            (
                {"n_qubits": 2, "periodic": True},
                ValueError,
                "n_qubits must be at least 3 for a ring, got 2",
            ),
            ({"field": [0.7] * 4}, ValueError, "field must be a number, got shape (4,)"),
            ({"coupling": [1.0] * 3}, ValueError, "coupling must be a number, got shape (3,)"),
            ({"field": float("inf")}, ValueError, "field must be finite, got inf"),
            ({"coupling": "1"}, TypeError, "coupling must be real numbers, got '1'"),
        ],
    )
    def test_bad_input(self, arguments, error, message):
        arguments = {"n_qubits": 4, "field": 0.7, **arguments}
        with pytest.raises(error, match=re.escape(f"[exact_ground_energy] {message}")):
            exact_ground_energy(**arguments)


def random_state(n_qubits, seed):
    rng = np.random.default_rng(seed)
    real, imaginary = rng.normal(size=(2, 2**n_qubits))
    return (real + 1j * imaginary).astype(np.complex64)
