"""evolve against dense matrix exponentials."""

import mlx.core as mx
import numpy as np
import pytest
import scipy.linalg
from spins import random_state
from support import device_of, to_numpy

from mlx_sparse_nn.physics import (
    IsingOperator,
    evolve,
    exact_ground_energy,
    expectation,
    fidelity,
    lanczos,
    transverse_field_ising,
)

TIMES = [0, 1e-3, 0.5, -2.5, 10.0]


def norm(psi):
    return np.linalg.norm(to_numpy(psi))


class TestRealTime:
    @pytest.mark.parametrize("t", TIMES)
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64])
    @pytest.mark.parametrize("periodic", [False, True])
    def test_equals_expm(self, t, dtype, periodic):
        H = transverse_field_ising(8, 0.7, longitudinal=0.1, periodic=periodic)
        psi = random_state(8, dtype)
        expected = scipy.linalg.expm(-1j * t * to_numpy(H.todense())) @ to_numpy(psi)
        for A in (H, IsingOperator(8, 0.7, longitudinal=0.1, periodic=periodic)):
            actual = evolve(A, psi, t)
            assert actual.dtype == mx.complex64
            assert np.linalg.norm(to_numpy(actual) - expected) < 1e-5 * np.linalg.norm(expected)

    def test_norm_and_energy_are_kept_over_a_long_time(self):
        H = IsingOperator(10, 0.7, periodic=True)
        psi = random_state(10, mx.complex64)
        later = evolve(H, psi, 100.0)
        assert norm(later) == pytest.approx(norm(psi), rel=1e-5)
        assert abs(expectation(H, later).item() - expectation(H, psi).item()) < 1e-4
        assert fidelity(later, psi) < 0.1

    def test_and_back(self):
        H = IsingOperator(9, 1.0)
        psi = random_state(9, mx.complex64)
        back = evolve(H, evolve(H, psi, 3.0), -3.0)
        np.testing.assert_allclose(back, psi, atol=1e-4)

    def test_an_eigenstate_turns_its_phase(self):
        H = IsingOperator(8, 0.7)
        result = lanczos(H)
        state = result.states[:, 0]
        expected = np.exp(-2j * result.energies.item()) * np.array(state)
        np.testing.assert_allclose(evolve(H, state, 2.0), expected, atol=1e-4)

    @pytest.mark.parametrize("size", [1, 2, 3, 29, 30, 31, 32])
    def test_hermitian_matrices_of_any_size(self, size):
        rng = np.random.default_rng(0)
        a = rng.normal(size=(size, size)) + 1j * rng.normal(size=(size, size))
        H = (a + a.conj().T) / 2
        psi = rng.normal(size=size).astype(np.float32)
        expected = scipy.linalg.expm(-0.7j * H) @ psi
        actual = evolve(mx.array(H.astype(np.complex64)), mx.array(psi), 0.7)
        np.testing.assert_allclose(actual, expected, atol=2e-5)

    def test_a_looser_tolerance_takes_fewer_products(self):
        class Counted:
            shape, dtype, products = (256, 256), mx.float32, 0

            def __matmul__(self, x):
                self.products += 1
                return IsingOperator(8, 0.7) @ x

        counts, psi = [], random_state(8, mx.float32)
        for tol in (1e-2, 1e-6):
            H = Counted()
            later = evolve(H, psi, 5.0, tol=tol)
            counts.append(H.products)
            expected = scipy.linalg.expm(
                -5j * to_numpy(transverse_field_ising(8, 0.7).todense())
            ) @ to_numpy(psi)
            error = np.linalg.norm(to_numpy(later) - expected) / np.linalg.norm(expected)
            assert error < tol + 1e-5
        assert counts[0] < counts[1]

    def test_zero_and_huge_hamiltonians(self):
        psi = random_state(6, mx.complex64)
        np.testing.assert_allclose(evolve(mx.zeros((64, 64)), psi, 1e6), psi, rtol=1e-5)
        H = IsingOperator(6, 700.0, coupling=1000.0)
        expected = evolve(IsingOperator(6, 0.7), psi, 2.0)
        np.testing.assert_allclose(evolve(H, psi, 2e-3), expected, atol=1e-4)


class TestImaginaryTime:
    @pytest.mark.parametrize("t", TIMES)
    @pytest.mark.parametrize(
        ("dtype", "atol"), [(mx.float32, 1e-5), (mx.complex64, 1e-5), (mx.float64, 1e-9)]
    )
    def test_equals_expm(self, t, dtype, atol):
        with device_of(dtype):
            real = mx.float64 if dtype == mx.float64 else mx.float32
            H = transverse_field_ising(8, 0.7, dtype=real)
            psi = random_state(8, dtype)
            dense = to_numpy(H.todense())
            shifted = dense - np.eye(256) * np.linalg.eigvalsh(dense)[0 if t > 0 else -1]
            expected = scipy.linalg.expm(-t * shifted) @ to_numpy(psi)
            expected /= np.linalg.norm(expected)
            actual = evolve(H, psi, t, imaginary=True)
            assert actual.dtype == dtype
            assert np.linalg.norm(to_numpy(actual) - expected) < atol

    def test_reaches_the_ground_state(self):
        H = IsingOperator(12, 1.0, periodic=True)
        psi = evolve(H, mx.ones(2**12), 30.0, imaginary=True)
        assert norm(psi) == pytest.approx(1, rel=1e-6)
        exact = exact_ground_energy(12, 1.0, periodic=True)
        assert expectation(H, psi).item() == pytest.approx(exact, rel=1e-5)
