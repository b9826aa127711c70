"""The Ising Hamiltonian and its exact energies, against dense matrices and the table."""

import time

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse.linalg
from spins import PAULI_X, PAULI_Z, dense_ising, on_site, random_state
from support import to_numpy

from mlx_sparse_nn import CSRArray
from mlx_sparse_nn.physics import (
    exact_ground_energy,
    expectation,
    ring,
    square,
    transverse_field_ising,
)

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


LATTICES = {"open": {}, "ring": {"periodic": True}, "square": {"bonds": square(2, 2)}}


def energy_by(lattice, psi):
    """Return <psi|H|psi>, of both fields and the coupling, as MLX finds it."""

    def energy(h, j, g):
        H = transverse_field_ising(4, h, coupling=j, longitudinal=g, **LATTICES[lattice])
        return (psi * (H @ psi)).sum()

    return energy


def dense_energies(lattice, psi):
    """Return <psi|P|psi> of every term of H, by dense matrices: its slopes by h, J and g."""
    bonds = LATTICES[lattice].get("bonds") or [(i, (i + 1) % 4) for i in range(4)]
    bonds = bonds[:3] if lattice == "open" else bonds
    x, z = ([on_site(a, site, 4) for site in range(4)] for a in (PAULI_X, PAULI_Z))
    zz = [z[a] @ z[b] for a, b in bonds]
    return [-np.array([psi @ P @ psi for P in terms]) for terms in (x, zz, z)]


class TestBuiltByMLX:
    def test_gradient_of_the_issue(self):
        def energy(h):
            return expectation(transverse_field_ising(4, h), mx.ones(16))

        assert mx.grad(energy)(mx.array(0.7)).item() == pytest.approx(-4, rel=1e-6)

    @pytest.mark.parametrize("lattice", LATTICES)
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64])
    def test_slopes_of_every_parameter(self, lattice, dtype):
        psi = random_state(4)
        expected = dense_energies(lattice, to_numpy(psi))
        h, j, g = (mx.array(np.linspace(0.3, 1.2, slopes.size), mx.float32) for slopes in expected)

        def energy(h, j, g):
            H = transverse_field_ising(
                4, h, coupling=j, longitudinal=g, dtype=dtype, **LATTICES[lattice]
            )
            return mx.real(psi * (H @ psi)).sum()

        actual = mx.grad(energy, argnums=(0, 1, 2))(h, j, g)
        for slope, slopes in zip(actual, expected, strict=True):
            np.testing.assert_allclose(slope, slopes, rtol=1e-5, atol=1e-5)
        _, (along,) = mx.jvp(energy, [h, j, g], [mx.ones_like(a) for a in (h, j, g)])
        assert along.item() == pytest.approx(sum(s.sum() for s in expected), rel=1e-5)

    @pytest.mark.parametrize("lattice", LATTICES)
    def test_lists_of_mlx_scalars_and_numbers(self, lattice):
        psi = random_state(4)
        energy = energy_by(lattice, psi)
        expected = dense_energies(lattice, to_numpy(psi))[0]
        slope = mx.grad(lambda h: energy([h, 0.5, 2 * h, mx.array(1.0)], 1.0, 0.0))(mx.array(0.7))
        assert slope.item() == pytest.approx(expected[0] + 2 * expected[2], rel=1e-5)

    def test_every_form_has_the_same_values(self):
        h, j, g = [0.3, 0.5, 0.7, 1.1], [1.0, -0.5, 0.25], [0.1, 0.0, -0.2, 0.4]
        expected = transverse_field_ising(4, h, coupling=j, longitudinal=g)
        by_arrays = transverse_field_ising(
            4, mx.array(h), coupling=[mx.array(a) for a in j], longitudinal=tuple(map(mx.array, g))
        )
        assert by_arrays.pattern == expected.pattern
        np.testing.assert_allclose(by_arrays.data, expected.data, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("lattice", LATTICES)
    def test_second_order_vmap_and_compile(self, lattice):
        psi = random_state(4)
        energy = energy_by(lattice, psi)
        terms = dense_energies(lattice, to_numpy(psi))

        def squared(h):
            return energy(h, mx.array(1.0), mx.array(0.5)) ** 2

        h = mx.array([0.3, 0.7, 1.1])
        value = terms[0].sum() * np.array(h) + terms[1].sum() + 0.5 * terms[2].sum()
        second = mx.vmap(mx.grad(mx.grad(squared)))(h)
        np.testing.assert_allclose(second, np.full(3, 2 * terms[0].sum() ** 2), rtol=1e-5)
        np.testing.assert_allclose(mx.vmap(squared)(h), value**2, rtol=1e-5)
        np.testing.assert_allclose(
            mx.compile(mx.grad(squared))(h[1]), 2 * value[1] * terms[0].sum(), rtol=1e-5
        )

    def test_numbers_that_an_mlx_array_holds_are_checked_where_they_can_be(self):
        with pytest.raises(ValueError, match=r"^\[transverse_field_ising\] field must be finite"):
            transverse_field_ising(4, mx.array([1.0, 2.0, float("nan"), 1.0]))

    @pytest.mark.parametrize("bonds", [ring(5), [(0, 4), (3, 1), (2, 0)], [(4, 0)], []])
    def test_bonds_of_any_graph(self, bonds):
        rng = np.random.default_rng(0)
        j = rng.normal(size=len(bonds))
        z = [on_site(PAULI_Z, site, 5) for site in range(5)]
        expected = dense_ising(5, 0.7, 0.0, 0.2) - sum(
            (c * z[a] @ z[b] for c, (a, b) in zip(j, bonds, strict=True)), np.zeros((32, 32))
        )
        for coupling in (j.tolist(), mx.array(j.astype(np.float32))):
            H = transverse_field_ising(
                5, 0.7, coupling=coupling if bonds else 1.0, longitudinal=0.2, bonds=bonds
            )
            np.testing.assert_allclose(todense(H), expected, rtol=1e-5, atol=1e-5)


class TestExactGroundEnergy:
    @pytest.mark.parametrize(("n_qubits", "periodic"), chains(1, 2, 3, 4, 5, 6))
    def test_slopes(self, n_qubits, periodic):
        bonds, flips = dense_ising(n_qubits, 0, 1, 0, periodic), dense_ising(n_qubits, 1, 0)

        def energy(h, j):
            return exact_ground_energy(n_qubits, h, coupling=j, periodic=periodic)

        for j, h in ((1.0, 0.7), (1.0, 1.5), (-0.8, 0.4), (0.6, -0.9), (-0.5, -1.3)):
            state = np.linalg.eigh(j * bonds + h * flips)[1][:, 0]
            expected = [state @ flips @ state, state @ bonds @ state]  # Hellmann and Feynman
            slopes = mx.grad(energy, argnums=(0, 1))(mx.array(h), mx.array(j))
            np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-5)
            _, (along,) = mx.jvp(lambda h, j=j: energy(h, j), [mx.array(h)], [mx.array(2.0)])
            assert along.item() == pytest.approx(2 * expected[0], rel=1e-5, abs=1e-5)
            assert energy(mx.array(h), j).item() == pytest.approx(energy(h, j), rel=1e-6)

    def test_what_has_no_rule_is_refused(self):
        def energy(h):
            return exact_ground_energy(4, h)

        h = mx.array(0.7)
        for transformed in (mx.grad(mx.grad(energy)), mx.compile(energy)):
            with pytest.raises(ValueError, match=r"^\[exact_ground_energy\] field "):
                transformed(h)
        with pytest.raises(ValueError, match=r"^\[exact_ground_energy\] field "):
            mx.vmap(energy)(mx.array([0.5, 0.7]))

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
