"""Observables against dense matrices, and their derivatives against differences in float64."""

import math
import re
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from support import device_of, to_numpy
from test_ising import PAULI_X, PAULI_Z, dense_ising, on_site

from mlx_sparse_nn.physics import (
    IsingOperator,
    correlation,
    entanglement_entropy,
    evolve,
    expectation,
    fidelity,
    lanczos,
    magnetization,
    transverse_field_ising,
    variance,
)

DTYPES = [mx.float16, mx.float32, mx.float64, mx.complex64]


def random_state(n, dtype=mx.float32, seed=0):
    """Return a state that is not normalised."""
    rng = np.random.default_rng(seed)
    psi = rng.normal(size=2**n) + 1j * rng.normal(size=2**n)
    return (
        mx.array(psi.astype(np.complex64))
        if dtype == mx.complex64
        else mx.array(psi.real, dtype=dtype)
    )


def mean(operator, psi):
    return (psi.conj() @ operator @ psi).real / (psi.conj() @ psi).real


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


H = transverse_field_ising(3, 0.7)
OBSERVABLES = {
    "expectation": lambda psi: expectation(H, psi),
    "variance": lambda psi: variance(H, psi),
    "magnetization": magnetization,
    "correlation": lambda psi: correlation(psi, 0, 2),
    "entanglement_entropy": lambda psi: entanglement_entropy(psi, 1),
    "fidelity": lambda psi: fidelity(psi, mx.ones(8)),
}


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
        assert variance(H, result.states[:, 0]).item() < 1e-8
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
        psi = lanczos(IsingOperator(n, h.item())).states[:, 0]
        energy, slope = mx.value_and_grad(lambda h, x=psi: expectation(IsingOperator(n, h), x))(h)
        h = h - 0.02 * (energy - target) * slope
    assert h.item() == pytest.approx(true, abs=1e-3)


class TestBadInput:
    @pytest.mark.parametrize(
        ("function", "error", "message"),
        [
            (lambda: variance(np.eye(4), mx.ones(4)), TypeError, "[variance] H must be a CSRArray"),
            (
                lambda: variance(mx.ones((2, 4)), mx.ones(4)),
                ValueError,
                "[variance] H must be square, got shape (2, 4)",
            ),
            (
                lambda: variance(mx.eye(4), mx.ones(3)),
                ValueError,
                "[variance] psi has shape (3,), H needs (4,)",
            ),
            (
                lambda: magnetization(mx.ones(6)),
                ValueError,
                "[magnetization] psi has shape (6,), expected (2**n,) with n >= 1",
            ),
            (
                lambda: magnetization(mx.ones(1)),
                ValueError,
                "[magnetization] psi has shape (1,), expected (2**n,) with n >= 1",
            ),
            (
                lambda: magnetization(mx.ones((4, 4))),
                ValueError,
                "[magnetization] psi has shape (4, 4), expected (2**n,) with n >= 1",
            ),
            (
                lambda: magnetization(np.ones(4)),
                TypeError,
                "[magnetization] psi must be an mx.array, got ndarray",
            ),
            (
                lambda: magnetization(mx.ones(4), "y"),
                ValueError,
                "[magnetization] axis must be 'z' or 'x', got 'y'",
            ),
            (
                lambda: correlation(mx.ones(4), 0, 2),
                ValueError,
                "[correlation] j must be in [0, 1], got 2",
            ),
            (
                lambda: correlation(mx.ones(4), -1, 0),
                ValueError,
                "[correlation] i must be in [0, 1], got -1",
            ),
            (
                lambda: correlation(mx.ones(4), 0, 1.0),
                TypeError,
                "[correlation] j must be an integer, got 1.0",
            ),
            (
                lambda: entanglement_entropy(mx.ones(4), 3),
                ValueError,
                "[entanglement_entropy] cut must be in [0, 2], got 3",
            ),
            (
                lambda: entanglement_entropy(mx.ones(4), None),
                TypeError,
                "[entanglement_entropy] cut must be an integer, got None",
            ),
            (
                lambda: entanglement_entropy(mx.zeros(0), 0),
                ValueError,
                "[entanglement_entropy] psi has shape (0,), expected (2**n,) with n >= 1",
            ),
            (
                lambda: fidelity(mx.ones(4), mx.ones(8)),
                ValueError,
                "[fidelity] a has 4 amplitudes, b has 8",
            ),
            (
                lambda: fidelity(mx.ones((4, 1)), mx.ones(4)),
                ValueError,
                "[fidelity] a has shape (4, 1), expected one axis",
            ),
            (
                lambda: fidelity(mx.ones(4), [1.0] * 4),
                TypeError,
                "[fidelity] b must be an mx.array, got list",
            ),
        ],
    )
    def test_arguments(self, function, error, message):
        with pytest.raises(error, match=re.escape(message)):
            function()

    @pytest.mark.parametrize("observable", OBSERVABLES, ids=str)
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (0.0, "must not be zero"),
            (math.nan, "must be finite, its largest magnitude is nan"),
            (math.inf, "must be finite, its largest magnitude is inf"),
        ],
    )
    def test_states_without_a_norm(self, observable, value, message):
        function = OBSERVABLES[observable]
        psi = mx.zeros(8)
        psi[3] = value
        with pytest.raises(ValueError, match=rf"\[{observable}\] (psi|a) {message}"):
            function(psi)
        with pytest.raises(ValueError, match=rf"\[{observable}\] (psi|a) {message}"):
            function(psi.astype(mx.complex64))
        # Nothing is evaluated under a transform: what is traced has no numbers yet.
        assert mx.isnan(mx.compile(function)(psi)).any().item()
        assert mx.isnan(mx.vmap(function)(psi[None])).any().item()
        value, _ = mx.value_and_grad(lambda a: function(a).sum())(psi)
        assert mx.isnan(value).item()

    def test_states_in_a_new_thread(self):
        """Where MLX traces a compiled function for the first time."""
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="must not be zero"):
            pool.submit(lambda: magnetization(mx.zeros(8))).result()
