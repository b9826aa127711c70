"""Derivatives of energies and states, against differences of dense diagonalisation in float64."""

import re

import mlx.core as mx
import numpy as np
import pytest
from spins import dense_ising
from support import device_of, to_numpy

from mlx_sparse_nn import CSRArray
from mlx_sparse_nn.physics import (
    IsingOperator,
    chain,
    lanczos,
    pauli_sum,
    transverse_field_ising,
)

N = 4
FIELDS = (0.7, 1.1, 0.3)  # h, J, g
STEP = 1e-5
WEIGHTS = np.random.default_rng(0).normal(size=(2**N, 4))
FORMS = ["operator", "sum", "csr", "dense", "data"]
DTYPES = [(mx.float32, 2e-4), (mx.float64, 1e-6)]


def hamiltonian(form, h, j, g):
    if form == "operator":
        return IsingOperator(N, h, coupling=j, longitudinal=g, dtype=h.dtype)
    if form == "sum":
        sites = [(i,) for i in range(N)]
        strings = {"ZZ": (-j, chain(N)), "X": (-h, sites), "Z": (-g, sites)}
        return pauli_sum(strings, N, dtype=h.dtype)
    H = transverse_field_ising(N, h, coupling=j, longitudinal=g, dtype=h.dtype)
    if form == "data":  # linear in h and J: of what is stored, not of the builder
        parts = [
            transverse_field_ising(N, a, coupling=b, longitudinal=c).data.astype(h.dtype)
            for a, b, c in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
        ]
        return CSRArray(h * parts[0] + j * parts[1] + g * parts[2], H.pattern)
    return H.todense() if form == "dense" else H


def loss_of(energies, states, weights):
    """Depends on no sign of a state."""
    return energies.sum() + ((states * weights).sum(axis=0) ** 2).sum()


def exact(k, sign, *fields):
    values, vectors = np.linalg.eigh(dense_ising(N, *fields))
    some = slice(0, k) if sign > 0 else slice(2**N - k, None)
    return loss_of(values[some], vectors[:, some], WEIGHTS[:, :k])


def differences(function, fields=FIELDS):
    slopes = []
    for i in range(len(fields)):
        up, down = ([x + s * STEP * (i == at) for at, x in enumerate(fields)] for s in (1, -1))
        slopes.append((function(*up) - function(*down)) / (2 * STEP))
    return slopes


@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("which", ["smallest", "largest"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_energies_and_states(form, k, which, dtype, rtol):
    with device_of(dtype):
        weights = mx.array(WEIGHTS[:, :k], dtype=dtype)

        def loss(*fields):
            energies, states = lanczos(hamiltonian(form, *fields), k, which=which)
            return loss_of(energies, states, weights)

        fields = [mx.array(x, dtype=dtype) for x in FIELDS]
        gradients = mx.grad(loss, argnums=(0, 1, 2))(*fields)
        expected = differences(lambda *f: exact(k, 1 if which == "smallest" else -1, *f))
        largest = max(map(abs, expected))
        np.testing.assert_allclose([to_numpy(g) for g in gradients], expected, atol=rtol * largest)

        move = [mx.array(x, dtype=dtype) for x in (0.5, -1.0, 2.0)]
        _, (along,) = mx.jvp(loss, fields, move)
        total = float(np.dot([0.5, -1.0, 2.0], expected))
        assert to_numpy(along).item() == pytest.approx(total, abs=5 * rtol * largest)


def test_one_spin_as_in_the_issue():
    """H = -h X - g Z at g = 0.5: the energy has the derivative -h / sqrt(h^2 + g^2), which has
    -g^2 / (h^2 + g^2)^(3/2): -0.3927 at h = 0.7."""

    def energy(h):
        return lanczos(IsingOperator(1, h, longitudinal=0.5)).energies[0]

    h = mx.array(0.7)
    assert mx.grad(energy)(h).item() == pytest.approx(-0.7 / np.hypot(0.7, 0.5), rel=1e-5)
    assert mx.grad(mx.grad(energy))(h).item() == pytest.approx(-0.392728, rel=1e-4)

    def magnetization(h):
        state = lanczos(IsingOperator(1, h, longitudinal=0.5)).states[:, 0]
        return state[1] ** 2 - state[0] ** 2

    exact = -0.5 * 0.7 / np.hypot(0.7, 0.5) ** 3
    assert mx.grad(magnetization)(h).item() == pytest.approx(exact, rel=1e-4)


def test_second_derivatives_of_energies():
    def energy(*fields):
        return lanczos(hamiltonian("operator", *fields)).energies[0]

    fields = [mx.array(x) for x in FIELDS]

    def slope_of_dense(*f):
        _, vectors = np.linalg.eigh(dense_ising(N, *f))
        return vectors[:, 0] @ dense_ising(N, 1.0, 0.0) @ vectors[:, 0]

    expected = differences(slope_of_dense)
    slopes = mx.grad(mx.grad(energy), argnums=(0, 1, 2))(*fields)
    np.testing.assert_allclose([g.item() for g in slopes], expected, rtol=2e-3, atol=1e-4)
    _, (along,) = mx.jvp(mx.grad(energy), fields, [mx.array(1.0), mx.array(0.0), mx.array(0.0)])
    assert along.item() == pytest.approx(expected[0], rel=2e-3)


@pytest.mark.parametrize("form", ["operator", "csr"])
def test_derivatives_of_a_tangent_and_of_the_value_beside_it(form):
    """MLX forgets what is evaluated in a forward rule, and finds zero there."""
    h, one = mx.array(0.7), mx.array(1.0)

    def energy(h):
        return lanczos(hamiltonian(form, h, mx.array(1.1), mx.array(0.3))).energies[0]

    def weight(h):
        return lanczos(IsingOperator(N, h)).states[0, 0] ** 2

    def exact(h):
        return np.linalg.eigvalsh(dense_ising(N, h, *FIELDS[1:]))[0]

    def forward(f, i):
        return lambda h: mx.jvp(f, [h], [one])[i][0]

    (slope,) = differences(exact, FIELDS[:1])
    second = (exact(0.7 + 1e-4) - 2 * exact(0.7) + exact(0.7 - 1e-4)) / 1e-8
    of_weight = mx.grad(weight)(h).item()
    for derived in (mx.grad, lambda f: forward(f, 1)):
        assert derived(forward(energy, 0))(h).item() == pytest.approx(slope, rel=1e-4)
        assert derived(forward(energy, 1))(h).item() == pytest.approx(second, rel=2e-3)
        assert derived(forward(weight, 0))(h).item() == pytest.approx(of_weight, rel=1e-3)
        with pytest.raises(ValueError, match=r"^\[lanczos\] states have first derivatives alone"):
            derived(forward(weight, 1))(h)


def test_gradients_of_a_complex_matrix():
    rng = np.random.default_rng(3)
    a, b, w = (rng.normal(size=(6, 6)) + 1j * rng.normal(size=(6, 6)) for _ in range(3))
    a, b, w = a + a.conj().T, b + b.conj().T, w[:, 0]

    def exact(t):
        values, vectors = np.linalg.eigh(a + t * b)
        return values[0] + abs(w.conj() @ vectors[:, 0]) ** 2

    def loss(t):
        H = mx.array(a.astype(np.complex64)) + t * mx.array(b.astype(np.complex64))
        energies, states = lanczos(H)
        overlap = (mx.array(w.conj().astype(np.complex64)) * states[:, 0]).sum()
        return energies[0] + mx.abs(overlap).square()

    expected = (exact(0.3 + STEP) - exact(0.3 - STEP)) / (2 * STEP)
    assert mx.grad(loss)(mx.array(0.3)).item() == pytest.approx(expected, rel=1e-3)
    _, (along,) = mx.jvp(loss, [mx.array(0.3)], [mx.array(1.0)])
    assert along.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e18, 1e30])
def test_derivatives_in_any_unit(unit):
    """Energies by h have no unit; states have the inverse one."""

    def state(h):
        _, states = lanczos(IsingOperator(N, h, coupling=unit, longitudinal=0.3 * unit))
        return (states[:, 0] * mx.array(WEIGHTS[:, 0].astype(np.float32))).sum() ** 2

    def energy(h):
        return lanczos(IsingOperator(N, h, coupling=unit, longitudinal=0.3 * unit)).energies[0]

    def exact(h):
        values, vectors = np.linalg.eigh(dense_ising(N, h, 1.0, 0.3))
        return np.array([values[0], (vectors[:, 0] @ WEIGHTS[:, 0]) ** 2])

    expected = (exact(0.7 + STEP) - exact(0.7 - STEP)) / (2 * STEP)
    h = mx.array(0.7 * unit)
    assert mx.grad(energy)(h).item() == pytest.approx(expected[0], rel=1e-5)
    assert mx.grad(state)(h).item() * unit == pytest.approx(expected[1], rel=1e-3)


class TestRefusals:
    def test_states_of_a_degenerate_level(self):
        """All up and all down: whatever lanczos returns is as good as any mixture."""

        def states(h):
            return lanczos(IsingOperator(N, h, coupling=1.0, periodic=True), k=2).states.sum()

        message = r"\[lanczos\] state 0 has no derivative by H: its energy is only .* from another"
        with pytest.raises(ValueError, match=message):
            mx.grad(states)(mx.array(0.0))

    def test_a_degenerate_level_of_which_one_state_was_asked_for(self):
        def state(h):
            return lanczos(IsingOperator(N, h, periodic=True)).states[0, 0]

        with pytest.raises(ValueError, match=r"\[lanczos\] state 0 has no derivative by H"):
            mx.grad(state)(mx.array(0.0))

    def test_a_tangent_of_such_states_is_nan(self):
        """A rule does not know which of its results count."""

        def levels(h):
            return list(lanczos(IsingOperator(N, h, longitudinal=1e-9, periodic=True), k=2))

        _, (energies, states) = mx.jvp(levels, [mx.array(0.0)], [mx.array(1.0)])
        np.testing.assert_allclose(energies, [0, 0], atol=1e-5)
        assert mx.isnan(states).all().item()

    def test_energies_of_a_degenerate_level_have_a_gradient(self):
        def energies(j):
            return lanczos(IsingOperator(N, 0.0, coupling=j, periodic=True), k=2).energies.sum()

        assert mx.grad(energies)(mx.array(1.0)).item() == pytest.approx(-2 * N, rel=1e-5)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (
                lambda h: lanczos(IsingOperator(N, h)).residuals.sum(),
                "residuals have no derivative",
            ),
            (
                lambda h: mx.grad(lambda x: lanczos(IsingOperator(N, x)).states[0, 0] ** 3)(h),
                "states have first derivatives alone by H",
            ),
            (
                lambda h: lanczos(IsingOperator(N, 0.7), v0=h * mx.ones(2**N)).energies.sum(),
                "has no derivative by v0",
            ),
        ],
        ids=["residuals", "states twice", "v0"],
    )
    def test_what_has_no_derivative(self, function, message):
        with pytest.raises(ValueError, match=re.escape(f"[lanczos] {message}")):
            mx.grad(function)(mx.array(0.7))

    def test_a_second_derivative_where_the_first_is_zero(self):
        """The gradient by states is 0 at a minimum, but not its own derivative."""

        def loss(h, target):
            return (lanczos(IsingOperator(N, h)).states[0, 0] - target) ** 2

        h = mx.array(0.7)
        target = lanczos(IsingOperator(N, h)).states[0, 0]
        precise = mx.grad(lambda h: lanczos(IsingOperator(N, h)).states[0, 0])  # under a transform
        assert abs(precise(h).item()) > 0.01
        with pytest.raises(ValueError, match=r"\[lanczos\]"):
            mx.grad(mx.grad(loss))(h, target)

    @pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "compile"])
    @pytest.mark.parametrize("form", ["operator", "own"])
    @pytest.mark.not_emulated("needs mx.compile")
    def test_transforms_of_what_is_hidden(self, form, transform):
        class Own:
            shape = (2**N, 2**N)

            def __init__(self, h):
                self.H = IsingOperator(N, h)

            def __matmul__(self, x):
                return self.H @ x

        def energy(h):
            return lanczos(Own(h) if form == "own" else IsingOperator(N, h)).energies[0]

        h = mx.array(0.7)
        calls = {
            "grad": lambda: mx.grad(energy)(h),
            "jvp": lambda: mx.jvp(energy, [h], [h]),
            "vmap": lambda: mx.vmap(energy)(mx.stack([h, h])),
            "compile": lambda: mx.compile(energy)(h),
        }
        if form == "operator" and transform in ("grad", "jvp"):
            calls[transform]()  # the rules are tested above
            return
        with pytest.raises(ValueError, match=r"^\[lanczos\] (H must hold|has no derivative by H)"):
            calls[transform]()

    def test_a_second_derivative_of_a_degenerate_level(self):
        def energies(j):
            return lanczos(IsingOperator(N, 0.0, coupling=j, periodic=True), k=2).energies.sum()

        message = "energies of a degenerate level have first derivatives alone"
        with pytest.raises(ValueError, match=message):
            mx.grad(mx.grad(energies))(mx.array(1.0))

    @pytest.mark.parametrize("result", ["energies", "states"])
    @pytest.mark.parametrize("name", ["vmap", "compile"])
    @pytest.mark.not_emulated("needs mx.compile")
    def test_transforms_of_tangents_and_cotangents(self, name, result):
        def f(h):
            return getattr(lanczos(IsingOperator(N, h)), result).sum()

        h, of = mx.array(0.7), mx.ones(2) if name == "vmap" else mx.array(1.0)
        transform = getattr(mx, name)
        with pytest.raises(ValueError, match=r"^\[lanczos\] the tangent of H must hold numbers"):
            transform(lambda d: mx.jvp(f, [h], [d])[1][0])(of)
        with pytest.raises(ValueError, match=r"^\[lanczos\] the gradient by its result must hold"):
            transform(lambda c: mx.vjp(f, [h], [c])[1][0])(of)

    @pytest.mark.not_emulated("needs mx.compile")
    def test_transforms_of_the_start_vector(self):
        def energy(v0):
            return lanczos(IsingOperator(N, 0.7), v0=v0).energies[0]

        with pytest.raises(ValueError, match=r"\[lanczos\] v0 must hold numbers"):
            mx.vmap(energy)(mx.ones((2, 2**N)))
        with pytest.raises(ValueError, match=r"\[lanczos\] v0 must hold numbers"):
            mx.compile(energy)(mx.ones(2**N))


def test_a_transform_of_something_else_changes_nothing():
    H = IsingOperator(N, 0.7)
    expected = lanczos(H, 2)

    def f(x):
        energies, states = lanczos(H, 2)
        return x * energies[0] + (x * states[:, 1]).sum() * 0

    assert mx.grad(f)(mx.array(2.0)).item() == pytest.approx(expected.energies[0].item(), rel=1e-6)
