"""The Ising Hamiltonian and its exact energies, against dense matrices and the table."""

import time

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse.linalg
from spins import dense_ising

from mlx_sparse_nn import CSRArray
from mlx_sparse_nn.physics import exact_ground_energy, transverse_field_ising

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
