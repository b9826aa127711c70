"""Observables against dense matrices, and their derivatives against differences in float64."""

import mlx.core as mx
import numpy as np
import pytest
from spins import PAULI_X, PAULI_Z, dense_ising, on_site, random_state
from support import device_of, to_numpy

from mlx_sparse_nn import CSRArray, csr_array
from mlx_sparse_nn.physics import (
    IsingOperator,
    correlation,
    entanglement_entropy,
    evolve,
    exact_ground_energy,
    expectation,
    fidelity,
    lanczos,
    magnetization,
    transverse_field_ising,
    variance,
)

DTYPES = [mx.float16, mx.float32, mx.float64, mx.complex64]


def mean(operator, psi):
    return (psi.conj() @ operator @ psi).real / np.vdot(psi, psi).real


def entropy(psi, cut):
    values = np.linalg.svd(psi.reshape(-1, 2**cut), compute_uv=False) ** 2
    values = values[values > 0] / values.sum()
    return -(values * np.log(values)).sum()


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).split(".")[-1])
def psi(request):
    with device_of(request.param):
        yield random_state(5, request.param)


def rtol(psi):
    return 1e-12 if psi.dtype == mx.float64 else 1e-5


class TestValues:
    @pytest.mark.parametrize("make", [IsingOperator, transverse_field_ising])
    def test_expectation_and_variance(self, psi, make):
        dtype = mx.float64 if psi.dtype == mx.float64 else mx.float32
        H = make(5, 0.7, longitudinal=0.2, periodic=True, dtype=dtype)
        dense, state = dense_ising(5, 0.7, 1, 0.2, True), to_numpy(psi)
        energy = mean(dense, state)
        assert expectation(H, psi).item() == pytest.approx(energy, rel=rtol(psi))
        squared = mean(dense @ dense, state) - energy**2
        assert variance(H, psi).item() == pytest.approx(squared, rel=10 * rtol(psi))

    def test_magnetization(self, psi):
        state = to_numpy(psi)
        for axis, pauli in (("z", PAULI_Z), ("x", PAULI_X)):
            expected = [mean(on_site(pauli, site, 5), state) for site in range(5)]
            actual = magnetization(psi, axis)
            assert actual.shape == (5,)
            assert actual.dtype == (mx.float64 if psi.dtype == mx.float64 else mx.float32)
            np.testing.assert_allclose(to_numpy(actual), expected, rtol=rtol(psi), atol=rtol(psi))

    def test_correlation(self, psi):
        state = to_numpy(psi)
        z = [on_site(PAULI_Z, site, 5) for site in range(5)]
        for i in range(5):
            for j in range(5):
                expected = mean(z[i] @ z[j], state)
                actual = correlation(psi, i, j).item()
                assert actual == pytest.approx(expected, rel=rtol(psi), abs=rtol(psi))

    def test_entanglement_entropy(self, psi):
        for cut in range(6):
            actual = entanglement_entropy(psi, cut)
            assert actual.shape == ()
            expected = entropy(to_numpy(psi), cut)
            assert actual.item() == pytest.approx(expected, rel=rtol(psi), abs=rtol(psi))

    def test_fidelity(self, psi):
        other = random_state(5, psi.dtype, seed=1)
        a, b = to_numpy(psi), to_numpy(other)
        expected = abs(a.conj() @ b) ** 2 / (np.linalg.norm(a) * np.linalg.norm(b)) ** 2
        assert fidelity(psi, other).item() == pytest.approx(expected, rel=10 * rtol(psi))
        assert fidelity(psi, psi).item() == pytest.approx(1, rel=rtol(psi))

    def test_fidelity_of_a_real_and_a_complex_state(self):
        a, b = random_state(5), random_state(5, mx.complex64, seed=2)
        x, y = to_numpy(a), to_numpy(b)
        expected = abs(x @ y) ** 2 / (np.linalg.norm(x) * np.linalg.norm(y)) ** 2
        assert fidelity(a, b).item() == pytest.approx(expected, rel=1e-5)
        assert fidelity(b, a).item() == pytest.approx(expected, rel=1e-5)

    def test_states_known_in_closed_form(self):
        up = mx.zeros(16) + (mx.arange(16) == 15)
        np.testing.assert_array_equal(magnetization(up), np.ones(4))
        np.testing.assert_array_equal(magnetization(up, "x"), np.zeros(4))
        np.testing.assert_allclose(magnetization(mx.ones(16), "x"), np.ones(4), rtol=1e-6)
        one_up = mx.zeros(16) + (mx.arange(16) == 0b0100)
        np.testing.assert_array_equal(magnetization(one_up), [-1, -1, 1, -1])
        cat = up + mx.zeros(16) + (mx.arange(16) == 0)
        assert correlation(cat, 0, 3).item() == pytest.approx(1)
        for cut in (1, 2, 3):
            assert entanglement_entropy(cat, cut).item() == pytest.approx(np.log(2), rel=1e-6)
            assert entanglement_entropy(mx.ones(16), cut).item() == pytest.approx(0, abs=1e-6)
            assert entanglement_entropy(cat * 1j, cut).item() == pytest.approx(np.log(2), rel=1e-6)

    def test_an_eigenstate_has_no_variance(self):
        H = IsingOperator(8, 0.7)
        result = lanczos(H)
        assert variance(H, result.states[:, 0]) < 1e-8
        assert variance(H, mx.ones(256)).item() == pytest.approx(7, rel=1e-5)  # sum of J_i**2

    def test_sums_of_many_terms_are_exact_enough(self):
        np.testing.assert_allclose(magnetization(mx.ones(2**18), "x"), np.ones(18), rtol=1e-6)
        assert fidelity(mx.ones(2**18), mx.ones(2**18)).item() == pytest.approx(1, rel=1e-6)

    def test_evolution_moves_them(self):
        """Without coupling, every spin turns about x: <Z> = cos(2 h t)."""
        H = IsingOperator(3, [0.5, 1.0, 1.5], coupling=0.0)
        up = mx.zeros(8) + (mx.arange(8) == 7)
        psi = evolve(H, up, 0.8)
        expected = np.cos(2 * 0.8 * np.array([0.5, 1.0, 1.5]))
        np.testing.assert_allclose(magnetization(psi), expected, atol=1e-5)
        assert entanglement_entropy(psi, 1).item() == pytest.approx(0, abs=1e-5)


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
        psi = np.array(random_state(6, mx.complex64, seed=2))
        dense = dense_ising(6, 0.7, longitudinal=0.4)
        H = transverse_field_ising(6, 0.7, longitudinal=0.4)
        expected = (psi.conj() @ dense @ psi).real / np.vdot(psi, psi).real
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

    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64])
    def test_gradient_in_the_state(self, dtype):
        psi = np.array(random_state(5, dtype, seed=3))
        dense = dense_ising(5, 0.7, longitudinal=0.2)
        H = transverse_field_ising(5, 0.7, longitudinal=0.2)
        norm = np.vdot(psi, psi).real
        energy = (psi.conj() @ dense @ psi).real / norm
        gradient = mx.grad(lambda psi: expectation(H, psi))(mx.array(psi))
        expected = 2 * (dense @ psi - energy * psi) / norm
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)

    def test_gradient_in_the_stored_values(self):
        psi = np.array(random_state(4, seed=4))
        H = transverse_field_ising(4, 0.7)
        gradient = mx.grad(lambda data: expectation(CSRArray(data, H.pattern), mx.array(psi)))(
            H.data
        )
        expected = np.outer(psi, psi)[H.pattern.row_indices, H.pattern.indices] / (psi @ psi)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_compile_and_vmap(self):
        H = transverse_field_ising(5, 0.7)
        psi = mx.stack([random_state(5, seed=seed) for seed in range(3)])
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


FUNCTIONS = {
    "expectation": lambda psi: expectation(IsingOperator(4, 0.7, dtype=mx.float64), psi),
    "variance": lambda psi: variance(IsingOperator(4, 0.7, dtype=mx.float64), psi),
    "z": lambda psi: (magnetization(psi) * mx.arange(1, 5)).sum(),
    "x": lambda psi: (magnetization(psi, "x") * mx.arange(1, 5)).sum(),
    "correlation": lambda psi: correlation(psi, 3, 1),
    "entropy": lambda psi: entanglement_entropy(psi, 1),
    "fidelity": lambda psi: fidelity(psi, random_state(4, psi.dtype, seed=9)),
}


class TestDerivatives:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_gradient_and_jvp(self, name):
        with mx.stream(mx.cpu):
            function = FUNCTIONS[name]
            psi, direction = (random_state(4, mx.float64, seed) for seed in (0, 1))
            step = 1e-5
            ahead, behind = (function(psi + s * direction).item() for s in (step, -step))
            expected = (ahead - behind) / (2 * step)
            gradient = mx.grad(function)(psi)
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6)
            slope = mx.jvp(function, [psi], [direction])[1][0]
            assert slope.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_gradient_to_a_complex_state(self, name):
        function = FUNCTIONS[name]
        if name in ("expectation", "variance"):
            function = {"expectation": expectation, "variance": variance}[name]
            H = IsingOperator(4, 0.7)
            function = lambda psi, f=function: f(H, psi)
        z = random_state(4, mx.complex64)
        x, y = mx.real(z), mx.imag(z)
        by_parts = mx.grad(lambda x, y: function(x + y * mx.array(1j)), argnums=(0, 1))(x, y)
        dx, dy = (random_state(4, seed=seed) for seed in (3, 4))
        step = 1e-2
        ahead, behind = (function(z + s * (dx + 1j * dy)).item() for s in (step, -step))
        expected = (ahead - behind) / (2 * step)
        actual = ((by_parts[0] * dx).sum() + (by_parts[1] * dy).sum()).item()
        assert actual == pytest.approx(expected, rel=2e-2, abs=2e-3)

    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "entropy"])
    def test_second_derivative(self, name):
        with mx.stream(mx.cpu):
            gradient = mx.grad(FUNCTIONS[name])
            psi, direction = (random_state(4, mx.float64, seed) for seed in (0, 1))
            actual = mx.jvp(gradient, [psi], [direction])[1][0]
            ahead, behind = (gradient(psi + s * direction) for s in (1e-5, -1e-5))
            expected = (to_numpy(ahead) - to_numpy(behind)) / 2e-5
            np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_vmap_and_compile(self, name):
        with mx.stream(mx.cpu):
            function = FUNCTIONS[name]
            many = mx.stack([random_state(4, mx.float64, seed) for seed in range(3)])
            expected = [function(psi).item() for psi in many]
            np.testing.assert_allclose(mx.vmap(function)(many).tolist(), expected, rtol=1e-9)
            slopes = mx.vmap(mx.grad(function))(many)
            for slope, psi in zip(slopes, many, strict=True):
                np.testing.assert_allclose(
                    to_numpy(slope), to_numpy(mx.grad(function)(psi)), rtol=1e-6, atol=1e-12
                )
            assert mx.compile(function)(many[0]).item() == pytest.approx(expected[0], rel=1e-9)

    def test_entropy_of_a_product_state_has_gradient_zero(self):
        gradient = mx.grad(lambda psi: entanglement_entropy(psi, 2))(mx.ones(16))
        np.testing.assert_allclose(gradient, np.zeros(16), atol=1e-5)


def test_recovers_the_field_from_measured_magnetisation():
    """h by gradient descent: the state that the trial field makes must show what was measured.

    The state is exp(-H) of the uniform one by a Taylor series, all plain differentiable MLX.
    """
    n, true = 4, 0.8

    def measured(h):
        H = IsingOperator(n, h, longitudinal=0.3)
        psi = term = mx.ones(2**n) / 2 ** (n / 2)
        for order in range(1, 25):
            term = (H @ term) * (-1 / order)
            psi = psi + term
        return mx.concatenate([magnetization(psi, "z"), magnetization(psi, "x")])

    target = measured(mx.array(true))
    slope = mx.grad(lambda h: (measured(h) - target).square().sum())
    h = mx.array(1.5)
    for _ in range(100):
        h = h - 0.3 * slope(h)
    assert h.item() == pytest.approx(true, abs=1e-3)


def test_recovers_the_field_from_the_ground_energy():
    """Hellmann and Feynman: dE/dh is the expectation of dH/dh in the ground state."""
    n, true = 8, 0.7
    target = lanczos(IsingOperator(n, true)).energies.item()
    h = mx.array(1.2)
    for _ in range(30):
        psi = lanczos(IsingOperator(n, float(h))).states[:, 0]
        energy, slope = mx.value_and_grad(lambda h, x=psi: expectation(IsingOperator(n, h), x))(h)
        h = h - 0.02 * (energy - target) * slope
    assert h.item() == pytest.approx(true, abs=1e-3)
