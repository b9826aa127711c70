"""Observables against dense matrices, and their derivatives against differences in float64."""

import doctest
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from spins import PAULI_X, PAULI_Z, dense_ising, on_site, random_state
from support import assert_equal, device_of, to_numpy

from mlx_sparse_nn import CSRArray, csr_array, from_scipy, physics
from mlx_sparse_nn.physics import (
    IsingOperator,
    chain,
    correlation,
    entanglement_entropy,
    evolve,
    exact_ground_energy,
    expectation,
    fidelity,
    from_kron_order,
    lanczos,
    magnetization,
    pauli_sum,
    to_kron_order,
    transverse_field_ising,
    variance,
)

DTYPES = [mx.float16, mx.float32, mx.float64, mx.complex64]
PAULI = {"z": PAULI_Z, "x": PAULI_X, "y": 1j * PAULI_X @ PAULI_Z}


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
        for axis, pauli in PAULI.items():
            expected = [mean(on_site(pauli, site, 5), state) for site in range(5)]
            actual = magnetization(psi, axis)
            assert actual.shape == (5,)
            assert actual.dtype == (mx.float64 if psi.dtype == mx.float64 else mx.float32)
            np.testing.assert_allclose(to_numpy(actual), expected, rtol=rtol(psi), atol=rtol(psi))

    @pytest.mark.parametrize("axis", PAULI)
    def test_correlation(self, psi, axis):
        state = to_numpy(psi)
        spins = [on_site(PAULI[axis], site, 5) for site in range(5)]
        expected = [[mean(a @ b, state) for a in spins] for b in spins]
        pairs = correlation(psi, axis)
        assert pairs.shape == (5, 5)
        assert pairs.dtype == (mx.float64 if psi.dtype == mx.float64 else mx.float32)
        np.testing.assert_allclose(to_numpy(pairs), expected, rtol=rtol(psi), atol=rtol(psi))
        np.testing.assert_array_equal(to_numpy(pairs), to_numpy(pairs).T)
        np.testing.assert_array_equal(to_numpy(mx.diag(pairs)), np.ones(5))
        for i in range(5):
            for j in range(5):
                actual = correlation(psi, axis, i, j).item()
                assert actual == pytest.approx(expected[i][j], rel=rtol(psi), abs=rtol(psi))

    @pytest.mark.parametrize("n", [1, 2, 3])
    @pytest.mark.parametrize("axis", PAULI)
    def test_few_sites(self, n, axis):
        psi = random_state(n, mx.complex64)
        spins = [on_site(PAULI[axis], site, n) for site in range(n)]
        expected = [[mean(a @ b, to_numpy(psi)) for a in spins] for b in spins]
        np.testing.assert_allclose(correlation(psi, axis), expected, rtol=1e-5, atol=1e-5)
        expected = [mean(spin, to_numpy(psi)) for spin in spins]
        np.testing.assert_allclose(magnetization(psi, axis), expected, rtol=1e-5, atol=1e-5)

    def test_real_states_have_no_y(self):
        for dtype in (mx.float32, mx.complex64):
            y = magnetization(random_state(6).astype(dtype), "y")
            np.testing.assert_array_equal(y, np.zeros(6))

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
        assert correlation(cat, "z", 0, 3).item() == pytest.approx(1)
        for cut in (1, 2, 3):
            assert entanglement_entropy(cat, cut).item() == pytest.approx(np.log(2), rel=1e-6)
            assert entanglement_entropy(mx.ones(16), cut).item() == pytest.approx(0, abs=1e-6)
            assert entanglement_entropy(cat * 1j, cut).item() == pytest.approx(np.log(2), rel=1e-6)

    @pytest.mark.parametrize("axis", PAULI)
    def test_axes_are_those_of_pauli_strings(self, axis):
        """A Dzyaloshinskii-Moriya chain winds its spins, which shows both signs of Y."""
        n, name = 5, axis.upper()
        bonds = [(i, i + 1) for i in range(n - 1)]
        moriya = pauli_sum({"XY": (1.0, bonds), "YX": (-1.0, bonds), "X": (0.3, range(n))}, n)
        psi = lanczos(moriya).states[:, 0]
        spins = [expectation(pauli_sum({name: [(1.0, i)]}, n), psi).item() for i in range(n)]
        np.testing.assert_allclose(magnetization(psi, axis), spins, atol=1e-5)
        pairs = correlation(psi, axis)
        for i, j in [(0, 1), (1, 2), (4, 2)]:
            expected = expectation(pauli_sum({2 * name: [(1.0, i, j)]}, n), psi).item()
            assert pairs[i, j].item() == pytest.approx(expected, abs=1e-5)

    def test_spins_that_point_along_an_axis(self):
        """A spin in a field along y turns into x: the sign of Y is what the precession sees."""
        for axis, spin in (("x", [1, 1]), ("y", [1, -1j])):  # amplitudes of clear, set
            psi = mx.array(np.kron(spin, spin).astype(np.complex64))
            np.testing.assert_allclose(magnetization(psi, axis), [1, 1])
            np.testing.assert_allclose(correlation(psi, axis), np.ones((2, 2)))
            np.testing.assert_allclose(magnetization(psi.conj(), "y"), [-(axis == "y")] * 2)

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


# Of a state of four sites, each independent of its norm.
OF_STATE = {
    "expectation": lambda psi: expectation(ising(psi), psi),
    "variance": lambda psi: variance(ising(psi), psi),
    "z": magnetization,
    "x": lambda psi: magnetization(psi, "x"),
    "y": lambda psi: magnetization(psi, "y"),
    "zz": correlation,
    "xx": lambda psi: correlation(psi, "x"),
    "yy": lambda psi: correlation(psi, "y"),
    "pair": lambda psi: correlation(psi, "z", 3, 1),
    "entropy": lambda psi: entanglement_entropy(psi, 1),
    "fidelity": lambda psi: fidelity(psi, random_state(4, psi.dtype, seed=9)),
    "fidelity of two": lambda psi: fidelity(psi, psi[::-1]),
    "fidelity of two dtypes": lambda psi: fidelity(random_state(4, mx.complex64, seed=9), psi),
}


def ising(psi, unit=1.0):
    dtype = mx.float64 if psi.dtype == mx.float64 else mx.float32
    return IsingOperator(4, 0.7 * unit, coupling=unit, longitudinal=0.2 * unit, dtype=dtype)


def scaled(psi, power):
    """Return a state times 2**power, which is exact, where MLX has no such scalar too."""
    if power < -1000:
        return scaled(psi, -1000) * 2.0 ** (power + 1000)
    return to_mlx(to_numpy(psi) * 2.0**power, psi.dtype)


def to_mlx(array, dtype):
    return mx.array(array.astype(np.complex64) if dtype == mx.complex64 else array, dtype=dtype)


class TestEveryNormAndUnit:
    """float32 has no square of 1e-22 and none of 1e22."""

    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64, mx.float64], ids=str)
    @pytest.mark.parametrize("name", OF_STATE)
    def test_a_norm_changes_no_bit(self, name, dtype):
        with device_of(dtype):
            function, psi = OF_STATE[name], random_state(4, dtype)
            expected = function(psi)
            for power in (-100, -73, -40, 33, 100) + (-960, 960) * (dtype == mx.float64):
                assert_equal(function(scaled(psi, power)), expected)

    @pytest.mark.parametrize("name", OF_STATE)
    def test_denormal_amplitudes(self, name):
        """1 and 2 times 2**-149 are the smallest numbers of float32; zeros stay zeros."""
        amplitudes = np.random.default_rng(0).integers(-2, 3, 16)
        expected = OF_STATE[name](mx.array(amplitudes, dtype=mx.float32))
        smallest = amplitudes * 2.0**-149
        assert_equal(OF_STATE[name](mx.array(smallest, dtype=mx.float32)), expected)
        largest = amplitudes * 2.0**126
        assert_equal(OF_STATE[name](mx.array(largest, dtype=mx.float32)), expected)

    @pytest.mark.parametrize("norm", [1e-30, 1e-22, 1e-12, 1e10, 1e30])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
    def test_the_values_of_the_issue(self, norm, dtype):
        H = IsingOperator(8, 0.7)
        psi = (lanczos(H).states[:, 0] * norm).astype(dtype)
        assert expectation(H, psi).item() == pytest.approx(-8.305610965881469, rel=1e-5)
        assert fidelity(psi, psi).item() == pytest.approx(1, rel=1e-5)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
    @pytest.mark.parametrize("name", OF_STATE)
    def test_gradients_have_all_their_digits(self, name, dtype):
        """The gradient is inverse to the norm. The factors are powers of two, so bits are equal."""
        psi, direction = random_state(4, dtype), random_state(4, dtype, seed=1)
        slope = mx.grad(lambda psi: OF_STATE[name](psi).sum())
        forward = lambda psi, d: mx.jvp(OF_STATE[name], [psi], [d])[1][0]
        expected, expected_forward = slope(psi), forward(psi, direction)
        assert mx.abs(expected).max() > 0 or (name == "y" and dtype == mx.float32)
        for power in (-100, 33, 90):
            large = scaled(psi, power)
            assert_equal(slope(large), scaled(expected, -power))
            assert_equal(mx.compile(slope)(large), scaled(mx.compile(slope)(psi), -power))
            assert_equal(
                mx.vmap(slope)(large[None])[0], scaled(mx.vmap(slope)(psi[None])[0], -power)
            )
            actual = forward(large, scaled(direction, power))
            np.testing.assert_allclose(actual, expected_forward, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", [name for name in OF_STATE if name != "entropy"])
    def test_second_derivatives(self, name):
        psi, direction = random_state(4), random_state(4, seed=1)
        slope = mx.grad(lambda psi: OF_STATE[name](psi).sum())
        curvature = lambda psi: mx.grad(lambda psi: (slope(psi) * direction).sum())(psi)
        expected = curvature(psi)
        for power in (-60, 45):
            assert_equal(curvature(scaled(psi, power)), scaled(expected, -2 * power))

    @pytest.mark.parametrize("norm", [-100, 0, 100])
    @pytest.mark.parametrize("unit", [-100, -40, 40, 100])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
    def test_a_unit_of_energy_changes_no_bit(self, unit, norm, dtype):
        psi = random_state(4, dtype)
        state = scaled(psi, norm)
        H, one = ising(psi, 2.0**unit), ising(psi)
        energy, slope = mx.value_and_grad(lambda psi: expectation(H, psi))(state)
        expected, expected_slope = mx.value_and_grad(lambda psi: expectation(one, psi))(psi)
        assert_equal(energy, scaled(expected, unit))
        assert_equal(expectation(H, state), scaled(expectation(one, psi), unit))
        if abs(unit - norm) < 110:  # float32 has such a slope
            assert_equal(slope, scaled(expected_slope, unit - norm))
        if abs(unit) == 40:
            assert_equal(variance(H, state), scaled(variance(one, psi), 2 * unit))

    def test_float64_has_the_square_of_every_unit(self):
        with mx.stream(mx.cpu):
            psi = random_state(4, mx.float64)
            for unit in (1.380649e-23, 1e-30, 1e30):
                actual = variance(ising(psi, unit), psi).item()
                expected = variance(ising(psi), psi).item() * unit**2
                assert actual == pytest.approx(expected, rel=1e-13)

    def test_gradients_to_the_fields_in_joules(self):
        psi, kelvin = random_state(4), 1.380649e-23
        dense = mean(sum(on_site(PAULI_X, site, 4) for site in range(4)), to_numpy(psi))
        slope = mx.grad(lambda h: expectation(IsingOperator(4, h, coupling=kelvin), psi))
        assert slope(mx.array(0.7 * kelvin)).item() == pytest.approx(-dense, rel=1e-5)

    @pytest.mark.parametrize("unit", [1.380649e-23, 1e-30, 1e20])
    @pytest.mark.not_emulated("needs mx.compile")
    def test_a_variance_that_float32_has_not(self, unit):
        psi = random_state(4)
        H = ising(psi, unit)
        message = r"\[variance\] the variance is not finite, or does not fit mlx.core.float32"
        with pytest.raises(ValueError, match=message):
            variance(H, psi)
        for traced in (mx.compile, lambda f: lambda psi: mx.vmap(f)(psi[None])):
            assert not mx.isfinite(traced(lambda psi: variance(H, psi))(psi)).item()
        value, slope = mx.value_and_grad(lambda psi: variance(H, psi))(psi)
        assert not mx.isfinite(value).item()
        assert not mx.isfinite(slope).any().item()

    @pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e12])
    def test_an_eigenstate_has_no_variance_in_any_unit(self, unit):
        """What rounding leaves of it may be too small for float32, and is none."""
        up = mx.zeros(16) + (mx.arange(16) == 15)
        assert variance(IsingOperator(4, 0.0, coupling=unit), up).item() == 0
        uniform = mx.full(16, 0.3)
        rest = variance(IsingOperator(4, unit, coupling=0.0), uniform).item()
        assert rest == pytest.approx(0, abs=(1e-5 * unit) ** 2)

    def test_the_curvature_of_the_variance_at_an_eigenstate(self):
        """The variance is 0 there and its gradient too, but 2 (H - E)^2 / <psi|psi> is not."""
        H = mx.diag(mx.array([1.0, 2.0, 4.0, 8.0]))
        psi, direction = mx.array([0, 3.0, 0, 0]), mx.array([1.0, 1, 1, 1])
        slope = mx.grad(lambda psi: variance(H, psi))
        np.testing.assert_array_equal(slope(psi), np.zeros(4))
        curvature = mx.jvp(slope, [psi], [direction])[1][0]
        np.testing.assert_allclose(curvature, 2 / 9 * np.array([1.0, 0, 4, 36]), rtol=1e-6)

    def test_gradients_to_couplings_that_are_zero(self):
        """H is 0 there: its unit must not be the smallest one, in which slopes lose digits."""
        psi = mx.array([1.0, 1e-4, 1e-6, 0.5])
        slopes = mx.grad(lambda h, g: expectation(IsingOperator(2, h, coupling=g), psi), (0, 1))
        by_h, by_g = slopes(mx.array(0.0), mx.array(0.0))
        state = to_numpy(psi).astype(np.float64)
        x = on_site(PAULI_X, 0, 2) + on_site(PAULI_X, 1, 2)
        assert by_h.item() == pytest.approx(-mean(x, state), rel=1e-6)
        zz = on_site(PAULI_Z, 0, 2) @ on_site(PAULI_Z, 1, 2)
        assert by_g.item() == pytest.approx(-mean(zz, state), rel=1e-6)

    @pytest.mark.parametrize("unit", [1e-30, 1e30])
    def test_an_energy_of_0_in_any_unit(self, unit):
        """By symmetry; what rounding leaves of it is too small for float32, and no error."""
        psi = random_state(4)
        odd = psi - psi[::-1]  # the flip of all spins changes its sign, and that of Z
        H = IsingOperator(4, 0.0, coupling=0.0, longitudinal=[0.3 * unit, 1.1 * unit, unit, unit])
        assert expectation(H, odd).item() == pytest.approx(0, abs=1e-6 * unit)

    def test_an_energy_that_float32_has_not(self):
        H = mx.full((4, 4), 3e38)
        message = r"\[expectation\] the energy is not finite, or does not fit mlx.core.float32"
        for matrix in (H, mx.full((4, 4), 1e-39), mx.full((4, 4), mx.nan)):
            with pytest.raises(ValueError, match=message):
                expectation(matrix, mx.ones(4))

    def test_one_amplitude_is_far_above_the_others(self):
        """The square of 1e-25 is 0 beside 1, but its gradient is there."""
        psi = mx.array([1.0, 1e-25, 0, 0])
        slope = mx.grad(lambda psi: magnetization(psi)[0])(psi)
        np.testing.assert_allclose(slope, [0, 4e-25, 0, 0], rtol=1e-6)


TRANSFORMS = {
    "none": lambda f, psi: f(psi),
    "grad": lambda f, psi: mx.grad(f)(psi),
    "jvp": lambda f, psi: mx.jvp(f, [psi], [psi]),
    "vmap": lambda f, psi: mx.vmap(f)(psi[None]),
    "compile": lambda f, psi: mx.compile(f)(psi),
    "second order": lambda f, psi: mx.grad(lambda psi: mx.grad(f)(psi).sum())(psi),
}


class OnTheHost:
    """A Hamiltonian whose product leaves MLX and comes back."""

    def __init__(self, multiply):
        self.shape, self.multiply = (16, 16), multiply

    def __matmul__(self, x):
        return self.multiply(x)


class TestHamiltoniansThatMLXCannotFollow:
    """Their gradient by psi would be wrong without a word."""

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("function", [expectation, variance])
    @pytest.mark.parametrize(
        ("H", "advice"),
        [
            (scipy.sparse.csr_matrix(np.eye(16)), r"from_scipy\(H\) makes a CSRArray"),
            (scipy.sparse.coo_array(np.eye(16)), r"from_scipy\(H\) makes a CSRArray"),
            (scipy.sparse.linalg.aslinearoperator(np.eye(16)), "from_scipy"),
            (np.eye(16), r"mx.array\(H\) makes one"),
            (np.asmatrix(np.eye(16)), r"mx.array\(H\) makes one"),
        ],
    )
    def test_is_refused(self, function, transform, H, advice):
        message = rf"\[{function.__name__}\] H must be .*, got {type(H).__name__}; .*{advice}"
        with pytest.raises(TypeError, match=message):
            TRANSFORMS[transform](lambda psi: function(H, psi), mx.ones(16))

    @pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "none"])
    @pytest.mark.parametrize("function", [expectation, variance])
    @pytest.mark.not_emulated("needs mx.compile")
    def test_a_product_by_numpy_is_refused(self, function, transform):
        H = OnTheHost(lambda x: mx.array(np.array(x) * 2))
        message = rf"\[{function.__name__}\] H @ psi must be computed by MLX from psi"
        with pytest.raises(TypeError, match=message):
            TRANSFORMS[transform](lambda psi: function(H, psi), mx.ones(16))
        assert function(H, mx.ones(16)).item() == pytest.approx(2 * (function is expectation))

    @pytest.mark.parametrize(
        ("product", "error", "message"),
        [
            (lambda x: np.array(x), TypeError, r"H @ psi must be an mx.array, got ndarray"),
            (lambda x: x[:3], ValueError, r"H @ psi has shape \(3,\), psi has \(16,\)"),
        ],
    )
    def test_a_product_of_another_kind(self, product, error, message):
        for function in (expectation, variance):
            with pytest.raises(error, match=rf"\[{function.__name__}\] {message}"):
                function(OnTheHost(product), mx.ones(16))

    @pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_, mx.float16], ids=str)
    def test_whole_numbers_are_taken(self, dtype):
        matrix = np.eye(16, k=1) + np.eye(16, k=-1)
        psi = random_state(4)
        dense = mx.array(matrix).astype(dtype)
        slope = mx.grad(lambda psi: expectation(dense, psi))(psi)
        expected = mx.grad(lambda psi: expectation(mx.array(matrix, dtype=mx.float32), psi))(psi)
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)
        stored = from_scipy(scipy.sparse.csr_matrix(matrix.astype(np.int32)))
        assert expectation(stored, psi).item() == pytest.approx(expectation(dense, psi).item())
        slope = mx.grad(lambda psi: expectation(stored, psi))(psi)
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


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
    "correlation": lambda psi: correlation(psi, "z", 3, 1),
    "correlation x": lambda psi: correlation(psi, "x", 0, 2),
    "pairs z": lambda psi: (correlation(psi) * mx.arange(16).reshape(4, 4)).sum(),
    "pairs x": lambda psi: (correlation(psi, "x") * mx.arange(16).reshape(4, 4)).sum(),
    "pairs y": lambda psi: (correlation(psi, "y") * mx.arange(16).reshape(4, 4)).sum(),
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

    @pytest.mark.parametrize("name", [*FUNCTIONS, "y"])
    def test_gradient_to_a_complex_state(self, name):
        y = lambda psi: (magnetization(psi, "y") * mx.arange(1, 5)).sum()
        function = {**FUNCTIONS, "y": y}[name]
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

    @pytest.mark.parametrize("name", ["expectation", "variance", "fidelity", *PAULI, "pairs y"])
    def test_second_derivative_at_a_complex_state(self, name):
        """MLX's own second derivative of the magnitude of a complex number is wrong."""
        moriya = {"XY": (0.5, chain(4)), "YX": (-0.5, chain(4)), "Z": (0.3, range(4))}
        H, other = pauli_sum(moriya, 4), random_state(4, mx.complex64, seed=9)
        dense, pauli = to_numpy(H.todense()), PAULI.get(name, PAULI["y"])
        sites = [on_site(pauli, site, 4) for site in range(4)]
        projector = np.outer(to_numpy(other), to_numpy(other).conj()) / np.linalg.norm(other) ** 2
        of_psi, exact = {
            "expectation": (lambda psi: expectation(H, psi), lambda x: mean(dense, x)),
            "variance": (
                lambda psi: variance(H, psi),
                lambda x: mean(dense @ dense, x) - mean(dense, x) ** 2,
            ),
            "fidelity": (lambda psi: fidelity(other, psi), lambda x: mean(projector, x)),
            "pairs y": (
                lambda psi: correlation(psi, "y").sum(),
                lambda x: mean(np.sum(sites, axis=0) @ np.sum(sites, axis=0), x),
            ),
        }.get(name, (lambda psi: magnetization(psi, name)[2], lambda x: mean(sites[2], x)))
        states = [random_state(4, mx.complex64, seed=seed) for seed in range(3)]
        psi, dx, dy = map(to_numpy, states)
        curve = lambda a, b: of_psi(states[0] + a * states[1] + b * states[2])
        mixed = mx.grad(lambda b: mx.grad(curve)(mx.zeros(()), b))(mx.zeros(()))
        twice = mx.grad(mx.grad(lambda a: curve(a, 0.0)))(mx.zeros(()))
        step = 1e-3
        at = lambda a, b: exact(psi + step * (a * dx + b * dy))
        expected = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / (4 * step**2)
        assert mixed.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
        expected = (at(1, 0) - 2 * at(0, 0) + at(-1, 0)) / step**2
        assert twice.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)

    @pytest.mark.not_emulated("needs mx.compile")
    def test_of_a_file(self, tmp_path):
        file, psi = str(tmp_path / "observables"), random_state(4, mx.complex64)

        def observables(psi):
            return [magnetization(psi, "y"), correlation(psi, "x"), variance(H, psi)]

        H = IsingOperator(4, 0.7)
        mx.export_function(file, observables, psi)
        imported: Any = mx.import_function(file)
        for actual, expected in zip(imported(psi), observables(psi), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"^\[entanglement_entropy\] psi must not be traced"):
            mx.export_function(file, lambda psi: entanglement_entropy(psi, 2), psi)

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

    @pytest.mark.parametrize("name", ["grad of grad", "jvp of grad", "grad of jvp", "jvp of jvp"])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
    def test_a_second_derivative_of_the_entropy_is_refused(self, name, dtype):
        entropy = lambda psi: entanglement_entropy(psi, 2)
        psi, direction = random_state(4, dtype), random_state(4, dtype, seed=1)
        outer, inner = name.split(" of ")
        derivative = {
            "grad": lambda f: lambda psi: mx.real(mx.grad(f)(psi) * direction).sum(),
            "jvp": lambda f: lambda psi: mx.jvp(f, [psi], [direction])[1][0],
        }
        for transform in (lambda f: f, mx.compile, lambda f: lambda psi: mx.vmap(f)(psi[None])):
            once = transform(derivative[inner](entropy))
            assert mx.isfinite(once(psi)).all().item()
            twice = transform(derivative[outer](derivative[inner](entropy)))
            with pytest.raises(ValueError, match=r"\[entanglement_entropy\] psi has been diff"):
                mx.eval(twice(psi))


@pytest.mark.parametrize(
    "function",
    [magnetization, correlation, to_kron_order, from_kron_order],
    ids=lambda f: f.__name__,
)
def test_the_example_of_a_docstring(function):
    names = {**vars(physics), "mx": mx, "np": np}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs=names)
    assert len(example.examples) > 1 or function is magnetization
    assert doctest.DocTestRunner().run(example).failed == 0


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
