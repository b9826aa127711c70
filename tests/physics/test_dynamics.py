"""evolve against dense matrix exponentials."""

import math
from functools import cache
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import scipy.linalg
from spins import random_state
from support import device_of, to_numpy

from mlx_sparse_nn.physics import (
    IsingOperator,
    chain,
    evolve,
    exact_ground_energy,
    expectation,
    fidelity,
    flow,
    lanczos,
    pauli_sum,
    transverse_field_ising,
)

TIMES = [0, 1e-3, 0.5, -2.5, 10.0]
UNITS = [1e-30, 1.38e-23, 1e-5, 1e5, 1e18, 1e30]
# Rows in NumPy's memory, as on a CPU, and in MLX's, as on a GPU.
PLACES = pytest.mark.parametrize("on_host", [True, False])


@pytest.fixture(autouse=True)
def place(monkeypatch, request):
    """Let rows be where the test says."""
    if not getattr(request.node, "callspec", None) or "on_host" not in request.node.callspec.params:
        return
    on_host = request.node.callspec.params["on_host"]
    monkeypatch.setattr(flow, "_is_on_host", lambda dtype: on_host or dtype == mx.float64)


class Counting:
    """A Hamiltonian that counts its products."""

    def __init__(self, H):
        self.H, self.shape, self.products = H, H.shape, 0

    def __matmul__(self, x):
        self.products += 1
        return self.H @ x


def norm(psi):
    return np.linalg.norm(to_numpy(psi))


@cache
def spectrum(matrix):
    """Return the eigenvalues and eigenvectors of a real matrix, by its bytes."""
    matrix = np.frombuffer(matrix)
    return np.linalg.eigh(matrix.reshape(2 * [math.isqrt(matrix.size)]))


def exact(H, psi, t, imaginary=False):
    """Return the state by the spectrum of a dense matrix, in float64."""
    dense, psi = to_numpy(H.todense()).astype(np.float64), to_numpy(psi).astype(np.complex128)
    values, vectors = spectrum(dense.tobytes())
    shift = values[0 if t > 0 else -1]
    exponents = -t * (values - shift) if imaginary else -1j * t * values
    state = vectors @ (np.exp(exponents) * (vectors.conj().T @ psi))
    return state / np.linalg.norm(state) if imaginary else state


def error(actual, expected):
    return np.linalg.norm(to_numpy(actual) - expected) / np.linalg.norm(expected)


class TestTimes:
    @PLACES
    @pytest.mark.parametrize("kind", [list, tuple, np.array, mx.array])
    @pytest.mark.parametrize("imaginary", [False, True])
    def test_in_any_order_and_of_any_sign(self, kind, imaginary, on_host):
        H, psi = transverse_field_ising(9, 0.7), random_state(9, mx.complex64)
        times = [2.0, -0.3, 0.0, 0.5, 7.5, 0.5, -11.0]
        states = evolve(H, psi, kind(times), imaginary=imaginary)
        assert states.shape == (7, 512)
        for t, state in zip(times, states, strict=True):
            expected = exact(H, psi, t, imaginary)
            if t == 0 and imaginary:
                expected = to_numpy(psi) / norm(psi)
            assert error(state, expected) < 5e-6

    def test_one_time_in_a_list_has_an_axis_and_a_number_none(self):
        H, psi = IsingOperator(4, 0.7), random_state(4)
        assert evolve(H, psi, [1.0]).shape == (1, 16)
        assert evolve(H, psi, mx.array(1.0)).shape == (16,)
        assert mx.array_equal(evolve(H, psi, [1.0])[0], evolve(H, psi, 1.0))

    def test_a_curve_takes_the_products_of_its_last_time(self):
        class Counted:
            shape, dtype, products = (512, 512), mx.float32, 0

            def __matmul__(self, x):
                self.products += 1
                return IsingOperator(9, 0.7) @ x

        counts = []
        for times in (10.0, np.linspace(0, 10, 51)):
            H = Counted()
            evolve(H, random_state(9), times)
            counts.append(H.products)
        assert counts[0] == counts[1]


class TestUnits:
    @PLACES
    @pytest.mark.parametrize("unit", UNITS)
    @pytest.mark.parametrize("form", [IsingOperator, transverse_field_ising])
    @pytest.mark.parametrize("imaginary", [False, True])
    def test_any_unit_gives_the_same_digits(self, unit, form, imaginary, on_host):
        psi = random_state(8, mx.complex64)
        H = form(8, 0.7 * unit, coupling=unit)
        expected = exact(transverse_field_ising(8, 0.7), psi, 2.0, imaginary)
        assert error(evolve(H, psi, 2.0 / unit, imaginary=imaginary), expected) < 2e-6

    @pytest.mark.parametrize("power", [-100, -60, 60, 99])
    def test_powers_of_two_change_no_digit(self, power):
        psi, unit = random_state(8, mx.complex64), 2.0**power
        states, again = (
            evolve(IsingOperator(8, 0.7 * u, coupling=u), psi, [1.0 / u, 3.0 / u])
            for u in (unit, 4 * unit)
        )
        assert mx.array_equal(states, again)

    @PLACES
    @pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e10, 1e30])
    def test_any_norm(self, scale, on_host):
        H, psi = IsingOperator(8, 0.7), random_state(8, mx.complex64)
        expected = exact(transverse_field_ising(8, 0.7), psi, 2.0)
        assert error(evolve(H, psi * scale, 2.0) * (1 / scale), expected) < 2e-6
        expected = exact(transverse_field_ising(8, 0.7), psi, 2.0, imaginary=True)
        assert error(evolve(H, psi * scale, 2.0, imaginary=True), expected) < 2e-6


class TestTolerance:
    @pytest.mark.parametrize(
        ("t", "tol"),
        [(0.5, 1e-3), (0.5, 5e-7), (5.0, 1e-4), (5.0, 1.5e-6), (60.0, 1e-3), (60.0, 5e-6)],
    )
    def test_is_reached_in_complex64(self, t, tol):
        H, psi = transverse_field_ising(9, 0.7, longitudinal=0.3), random_state(9, mx.complex64)
        assert error(evolve(H, psi, t, tol=tol), exact(H, psi, t)) < tol

    def test_below_what_complex64_gives_is_refused(self):
        H, psi = IsingOperator(10, 0.7), random_state(10, mx.complex64)
        with pytest.raises(ValueError, match=r"^\[evolve\] tol must be at least .* float64"):
            evolve(H, psi, 5.0, tol=1e-12)

    @pytest.mark.parametrize(
        ("n", "h", "t", "tol"), [(1, 1.5, 1e4, 2e-5), (3, 0.7, 100.0, 3e-6), (9, 1.5, 10.0, 2e-6)]
    )
    def test_is_reached_by_symmetric_states(self, n, h, t, tol):
        """Of few levels: nothing cancels what rounding does to their phases."""
        periodic, psi = n > 2, mx.ones(2**n)
        H = IsingOperator(n, h, periodic=periodic)
        expected = exact(transverse_field_ising(n, h, periodic=periodic), psi, t)
        if mx.default_device().type == mx.gpu:
            pytest.skip("a GPU has no float64, and refuses such a tol")
        assert error(evolve(H, psi, t, tol=tol), expected) < tol

    def test_of_an_eigenstate_is_reached_or_refused(self):
        large = IsingOperator(11, 1.0, periodic=True)
        with pytest.raises(ValueError, match=r"^\[evolve\] tol must be at least"):
            evolve(large, lanczos(large).states[:, 0], 100.0, tol=2e-5)
        H = transverse_field_ising(10, 1.0, periodic=True)
        dense = to_numpy(H.todense()).astype(np.float64)
        psi = mx.array(np.linalg.eigh(dense)[1][:, 0].astype(np.float32))
        expected = exact(H, psi, 100.0)
        assert error(evolve(H, psi, 100.0, tol=2e-3), expected) < 2e-3
        if mx.default_device().type == mx.gpu:
            pytest.skip("a GPU takes no spectrum, and refuses such a tol")
        assert error(evolve(H, psi, 100.0, tol=2e-5), expected) < 2e-5

    @pytest.mark.parametrize("n", [3, 8, 9])
    @pytest.mark.parametrize("t", [-0.3, 20.0])
    @pytest.mark.parametrize(
        ("start", "on_host"),
        [
            *product(["random", "uniform"], [True, False]),
            ("ground", True),
        ],
    )
    def test_the_least_that_is_named_is_accepted(self, n, t, start, on_host):
        """Complex, so that small ones are not computed in float64."""
        moriya = {"XY": (0.3, chain(n)), "YX": (-0.3, chain(n)), "Z": (0.7, range(n))}
        H = pauli_sum(moriya, n) + IsingOperator(n, 0.9)
        psi = {"random": random_state(n), "uniform": mx.ones(2**n)}.get(start)
        psi = lanczos(H).states[:, 0] if psi is None else psi
        with pytest.raises(ValueError, match=r"tol must be at least [0-9.e-]+, which") as refusal:
            evolve(H, psi, t, tol=2e-14)
        least = float(str(refusal.value).split("at least ")[1].split(",")[0])
        assert error(evolve(H, psi, t, tol=least), evolve(H, psi, t)) < 10 * least

    def test_a_long_time_takes_the_products_of_a_spectrum(self):
        """Of 512 rows: t = 3000 took 30,000 products, and t = 1e5 would have taken a million."""
        H, psi = IsingOperator(9, 0.7, longitudinal=0.3), random_state(9)
        for t in (3000.0, -1e5):
            assert error(evolve(H, psi, t), exact(H, psi, t)) < 1e-6
        few: Any = Counting(H)
        few._arrays, few._with_arrays = H._arrays, lambda arrays: few  # as of this package
        evolve(few, psi, 1e5)
        assert few.products < 200

    @PLACES
    def test_far_below_rounding_is_refused_at_once(self, on_host):
        """No amplitude of a step is ever smaller than rounding, however short the step."""
        H = Counting(IsingOperator(10, 0.7, longitudinal=0.3))
        with pytest.raises(ValueError, match=r"^\[evolve\] tol must be at least"):
            evolve(H, random_state(10), 1e4, tol=1e-14)
        assert H.products < 120

    def test_imaginary_time_of_any_length_ends(self):
        H = IsingOperator(9, 0.7, longitudinal=0.3, dtype=mx.float64)
        dense = to_numpy(H.todense())
        with mx.stream(mx.cpu):
            psi = random_state(9, mx.float64)
            ground = evolve(H, psi, 1e6, imaginary=True, tol=1e-14)
        assert abs(abs(to_numpy(ground) @ np.linalg.eigh(dense)[1][:, 0]) - 1) < 1e-14

    @pytest.mark.parametrize("n", [1, 4, 9, 10])
    @pytest.mark.parametrize("tol", [None, 1e-3])
    def test_a_time_after_which_nothing_is_left(self, n, tol):
        with pytest.raises(ValueError, match=r"^\[evolve\] t must be shorter, got 1e\+30"):
            evolve(IsingOperator(n, 0.7), mx.ones(2**n), [1.0, 1e30], tol=tol)

    @pytest.mark.parametrize("form", [transverse_field_ising, IsingOperator])
    def test_float64_goes_on_in_real_time_and_is_rounded_once(self, form):
        with mx.stream(mx.cpu):
            psi = random_state(9, mx.complex64)
            H = form(9, 0.7, dtype=mx.float64)
            state = evolve(H, psi, 60.0, tol=1e-12)
            expected = exact(transverse_field_ising(9, 0.7, dtype=mx.float64), psi, 60.0)
            assert state.dtype == mx.complex64
            assert error(state, expected) < 6e-8

    def test_float64_in_imaginary_time(self):
        with mx.stream(mx.cpu):
            H = transverse_field_ising(9, 0.7, dtype=mx.float64)
            psi = random_state(9, mx.float64)
            state = evolve(H, psi, 3.0, imaginary=True, tol=1e-13)
            assert error(state, exact(H, psi, 3.0, imaginary=True)) < 1e-13


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "message", "t", "flags"),
        [
            (TypeError, "imaginary must be True or False", 1.0, {"imaginary": "no"}),
            (ValueError, "t must be rectangular, got a ragged list", [[1, 2], 3], {}),
            (ValueError, "t must be small enough for float64", 10**400, {}),
        ],
        ids=["flag", "ragged", "huge"],
    )
    def test_bad_arguments(self, kind, message, t, flags):
        with pytest.raises(kind, match=rf"^\[evolve\] {message}"):
            evolve(IsingOperator(2, 0.7), mx.ones(4), t, **flags)


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
        for tol in (1e-2, 2e-6):
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
