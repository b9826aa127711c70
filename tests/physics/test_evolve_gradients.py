"""Gradients of evolve against differences of dense matrix exponentials, in float64."""

import math
import tracemalloc
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import scipy.linalg
from spins import dense_ising
from support import to_numpy, untyped

from mlx_sparse_nn import CSRArray, from_dense
from mlx_sparse_nn.core.backends import choose, pauli_plain
from mlx_sparse_nn.core.transforms import tracing
from mlx_sparse_nn.physics import (
    IsingOperator,
    adjoint,
    evolve,
    expectation,
    flow,
    magnetization,
    pauli_sum,
    recurrence,
    transverse_field_ising,
)

N, DIM = 5, 32
RNG = np.random.default_rng(3)
H0, J0, G0 = RNG.normal(size=N), RNG.normal(size=N), RNG.normal(size=N)
PSI = RNG.normal(size=DIM) + 1j * RNG.normal(size=DIM)
DIRECTION = RNG.normal(size=DIM) + 1j * RNG.normal(size=DIM)
TARGET = RNG.normal(size=(3, DIM)) + 1j * RNG.normal(size=(3, DIM))
TIMES = [1.3, -0.6, 0.0]


def exact(parameters, psi, times, imaginary):
    """Return the states ``(K, DIM)`` in float64."""
    H = dense_ising(N, *parameters, periodic=True)
    states = []
    for t in times:
        state = scipy.linalg.expm((-1 if imaginary else -1j) * t * H) @ psi
        states.append(state / np.linalg.norm(state) if imaginary else state)
    return np.array(states)


def loss(states):
    """Return a real number that depends on all amplitudes and their phases."""
    if isinstance(states, np.ndarray):
        return (np.abs(states - TARGET[: len(states)]) ** 2).sum()
    return mx.abs(states - mx.array(TARGET[: len(states)].astype(np.complex64))).square().sum()


def operator(h, j, g):
    return IsingOperator(N, h, coupling=j, longitudinal=g, periodic=True)


def stored(h, j, g):
    return transverse_field_ising(N, h, coupling=j, longitudinal=g, periodic=True)


def dense(h, j, g):
    return stored(h, j, g).todense()


def difference(f, x, direction, step=1e-5):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


FORMS = pytest.mark.parametrize("form", [operator, stored, dense])
KINDS = pytest.mark.parametrize("imaginary", [False, True])


def as_mlx(a):
    return mx.array(a.astype(np.complex64 if np.iscomplexobj(a) else np.float32))


@FORMS
@KINDS
class TestByParameters:
    def test_reverse(self, form, imaginary):
        def f(h, j, g):
            return loss(evolve(form(h, j, g), as_mlx(PSI), TIMES, imaginary=imaginary))

        values = [H0, J0, G0]
        slopes = mx.grad(f, argnums=(0, 1, 2))(*map(as_mlx, values))
        for i, slope in enumerate(slopes):
            for site in range(N):

                def g(x, i=i):
                    changed = [*values[:i], x, *values[i + 1 :]]
                    return loss(exact(changed, PSI, TIMES, imaginary))

                expected = difference(g, values[i], np.eye(N)[site])
                assert slope[site].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)

    def test_forward(self, form, imaginary):
        moves = list(np.random.default_rng(7).normal(size=(3, N)))

        def f(h, j, g):
            return evolve(form(h, j, g), as_mlx(PSI), TIMES, imaginary=imaginary)

        values = [H0, J0, G0]
        _, (tangent,) = mx.jvp(f, list(map(as_mlx, values)), list(map(as_mlx, moves)))
        expected = difference(
            lambda x: exact(x, PSI, TIMES, imaginary), np.array(values), np.array(moves)
        )
        np.testing.assert_allclose(to_numpy(tangent), expected, atol=2e-5 * np.abs(expected).max())


@KINDS
class TestByTheState:
    def test_reverse(self, imaginary):
        H = operator(H0, J0, G0)

        def f(psi):
            return loss(evolve(H, psi, TIMES, imaginary=imaginary))

        def g(psi):
            return loss(exact((H0, J0, G0), psi, TIMES, imaginary))

        slope = to_numpy(mx.grad(f)(as_mlx(PSI)))
        for direction in (DIRECTION, 1j * DIRECTION, PSI):
            expected = difference(g, PSI, direction)
            actual = np.vdot(slope, direction).real  # MLX's gradient: dL = Re <slope|d psi>
            assert actual == pytest.approx(expected, rel=1e-4, abs=1e-3)

    def test_forward(self, imaginary):
        H = operator(H0, J0, G0)
        _, (tangent,) = mx.jvp(
            lambda psi: evolve(H, psi, TIMES, imaginary=imaginary),
            [as_mlx(PSI)],
            [as_mlx(DIRECTION)],
        )
        expected = difference(lambda x: exact((H0, J0, G0), x, TIMES, imaginary), PSI, DIRECTION)
        np.testing.assert_allclose(to_numpy(tangent), expected, atol=1e-5 * np.abs(expected).max())

    def test_a_real_state_has_a_real_gradient(self, imaginary):
        psi = PSI.real
        slope = mx.grad(
            lambda psi: loss(evolve(operator(H0, J0, G0), psi, TIMES[:2], imaginary=imaginary) + 0j)
        )(as_mlx(psi))
        assert slope.dtype == mx.float32
        expected = difference(
            lambda x: loss(exact((H0, J0, G0), x, TIMES[:2], imaginary)), psi, DIRECTION.real
        )
        actual = float(to_numpy(slope) @ DIRECTION.real)
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-3)


@KINDS
class TestByTime:
    def test_reverse_and_forward(self, imaginary):
        H = operator(H0, J0, G0)

        def f(t):
            return loss(evolve(H, as_mlx(PSI), t, imaginary=imaginary))

        def g(t):
            return loss(exact((H0, J0, G0), PSI, t, imaginary))

        t = np.array(TIMES)
        slope = mx.grad(f)(as_mlx(t))
        _, (tangent,) = mx.jvp(f, [as_mlx(t)], [as_mlx(np.ones(3))])
        expected = [difference(g, t, unit) for unit in np.eye(3)]
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-3)
        assert tangent.item() == pytest.approx(sum(expected), rel=1e-4, abs=1e-3)

    def test_one_time(self, imaginary):
        H = operator(H0, J0, G0)

        def f(t):
            return loss(evolve(H, as_mlx(PSI), t, imaginary=imaginary)[None])

        expected = difference(lambda t: loss(exact((H0, J0, G0), PSI, [t], imaginary)), 0.9, 1.0)
        assert mx.grad(f)(mx.array(0.9)).item() == pytest.approx(expected, rel=1e-4)


class TestComplexHamiltonians:
    """Of H with imaginary parts: strings with one Y, and stored values."""

    @KINDS
    def test_by_coefficients(self, imaginary):
        c = np.array([0.4, -1.1, 0.8])

        def model(c):
            odd = {"XY": [(c[0], 0, 1)], "YX": [(c[1], 1, 3)]}
            return pauli_sum({**odd, "ZZ": [(c[2], 0, 4)], "X": [(1, 2)]}, N)

        parts = [model(row).todense() for row in (*np.eye(3).tolist(), [0.0, 0.0, 0.0])]
        rest = to_numpy(parts.pop()).astype(np.complex128)
        parts = [to_numpy(part) - rest for part in parts]

        def f(*c):
            return loss(evolve(model(c), as_mlx(PSI), [1.3], imaginary=imaginary))

        def g(c):
            H = rest + sum(a * part for a, part in zip(c, parts, strict=True))
            state = scipy.linalg.expm((-1.3 if imaginary else -1.3j) * H) @ PSI
            return loss((state / np.linalg.norm(state) if imaginary else state)[None])

        slopes = mx.grad(f, argnums=(0, 1, 2))(*map(mx.array, c.tolist()))
        expected = [difference(g, c, unit) for unit in np.eye(3)]
        np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("stores", [True, False])
    @KINDS
    def test_by_values(self, imaginary, stores):
        rng = np.random.default_rng(1)
        H, move = rng.normal(size=(2, DIM, DIM)) + 1j * rng.normal(size=(2, DIM, DIM))
        H, move = (H + H.conj().T) / 8, move + move.conj().T
        form = from_dense(as_mlx(H))

        def f(data):
            A = CSRArray(data, form.pattern) if stores else data
            return loss(evolve(A, as_mlx(PSI), [0.8], imaginary=imaginary))

        def g(H):
            state = scipy.linalg.expm((-0.8 if imaginary else -0.8j) * H) @ PSI
            return loss((state / np.linalg.norm(state) if imaginary else state)[None])

        slope = to_numpy(mx.grad(f)(form.data if stores else as_mlx(H))).reshape(DIM, DIM)
        expected = difference(g, H, move)
        assert np.vdot(slope, move).real == pytest.approx(expected, rel=1e-4, abs=1e-3)


class TestClosedForms:
    def test_a_spin_that_turns(self):
        """<Z(t)> = cos 2 h t of a spin that points up: its slope by h is -2 t sin 2 h t."""

        def up(h, t):
            return magnetization(evolve(IsingOperator(1, h), mx.array([0.0, 1.0]), t)).sum()

        slopes = mx.grad(up, argnums=(0, 1))(mx.array(0.7), mx.array(1.0))
        np.testing.assert_allclose(slopes, [-2 * np.sin(1.4), -1.4 * np.sin(1.4)], rtol=1e-5)

    def test_a_long_time(self):
        """The slope grows with time, and its phase goes on."""

        def up(h):
            return magnetization(evolve(IsingOperator(1, h), mx.array([0.0, 1.0]), 50.0)).sum()

        slope = mx.grad(up)(mx.array(0.7)).item()
        assert slope == pytest.approx(-100 * np.sin(2 * float(np.float32(0.7)) * 50), rel=1e-4)

    def test_imaginary_time_goes_to_the_ground_state_of_one_spin(self):
        """<Z> = -g / sqrt(h^2 + g^2) of the ground state of -hX - gZ has the slope h^2 / r^3."""

        def up(g):
            H = IsingOperator(1, 0.7, longitudinal=g)
            return magnetization(evolve(H, mx.array([0.3, 1.0]), 40.0, imaginary=True)).sum()

        slope = mx.grad(up)(mx.array(0.5)).item()
        assert slope == pytest.approx(0.49 / (0.49 + 0.25) ** 1.5, rel=1e-4)


@pytest.fixture
def short_steps(monkeypatch):
    """Let steps have few products, as those of long times and large systems do."""
    monkeypatch.setattr(flow, "_FEWEST", 12)
    monkeypatch.setattr(flow, "_MOST", 12)
    monkeypatch.setattr(recurrence, "_MOST", 1)


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize(
    ("form", "on_host"), [(operator, True), (stored, True), (dense, True), (operator, False)]
)
@KINDS
class TestManySteps:
    """Time goes over dozens of steps, on a CPU and as on a GPU: states are found again."""

    TIMES = (3.0, -2.0)

    def place(self, monkeypatch, on_host):
        monkeypatch.setattr(flow, "_is_on_host", lambda dtype: on_host)

    def test_reverse(self, form, imaginary, on_host, monkeypatch):
        self.place(monkeypatch, on_host)

        def f(h, j, psi):
            return loss(evolve(form(h, j, G0), psi, self.TIMES, imaginary=imaginary))

        values = [H0, J0, PSI]
        slopes = mx.grad(f, argnums=(0, 1, 2))(*map(as_mlx, values))
        moves = [*np.random.default_rng(7).normal(size=(2, N)), DIRECTION]
        for i, (slope, move) in enumerate(zip(slopes, moves, strict=True)):

            def g(x, i=i):
                h, j, psi = [*values[:i], x, *values[i + 1 :]]
                return loss(exact((h, j, G0), psi, self.TIMES, imaginary))

            expected = difference(g, values[i], move)
            assert np.vdot(to_numpy(slope), move).real == pytest.approx(expected, rel=5e-4)

    def test_forward(self, form, imaginary, on_host, monkeypatch):
        self.place(monkeypatch, on_host)

        def f(h, psi):
            return evolve(form(h, J0, G0), psi, self.TIMES, imaginary=imaginary)

        move = np.random.default_rng(7).normal(size=N)
        primals, moves = [as_mlx(H0), as_mlx(PSI)], [as_mlx(move), as_mlx(DIRECTION)]
        _, (tangent,) = mx.jvp(f, primals, moves)

        def g(s):
            return exact((H0 + s * move, J0, G0), PSI + s * DIRECTION, self.TIMES, imaginary)

        expected = difference(g, 0.0, 1.0)
        np.testing.assert_allclose(to_numpy(tangent), expected, atol=1e-4 * np.abs(expected).max())


class Counted:
    """A state that is a number, and says how many are alive."""

    alive = most = 0

    def __init__(self, value):
        self.value = value
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


class CountingSteps:
    """Steps of length 1, each of which adds 1."""

    taken = 0

    def step(self, state, remaining):
        self.taken += 1
        self.state, self.length = state, min(1.0, remaining)
        return self

    def states(self, times):
        return [Counted(self.state.value + 1) for _ in times]


class TestMemory:
    @pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 100, 1000])
    def test_imaginary_time_keeps_about_the_root_of_its_steps(self, n_steps):
        Counted.most = Counted.alive = 0
        steps = CountingSteps()
        begun = [
            (state.value, length)
            for state, length in adjoint._steps_backwards(untyped(steps), Counted(0), n_steps - 0.5)
        ]
        assert begun == [(n_steps - 1, 0.5), *((i, 1.0) for i in reversed(range(n_steps - 1)))]
        assert Counted.most <= 3.5 * np.sqrt(n_steps) + 5
        assert steps.taken <= 2 * n_steps

    @pytest.mark.usefixtures("short_steps")
    @pytest.mark.parametrize("on_host", [True, False])
    def test_real_time_keeps_no_states(self, on_host, monkeypatch):
        monkeypatch.setattr(flow, "_is_on_host", lambda dtype: on_host)
        H0 = IsingOperator(8, 1.5)

        def peak(t):
            def f(h):
                return expectation(H0, evolve(IsingOperator(8, h), mx.ones(256), t))

            mx.eval(mx.grad(f)(mx.array(0.7)))  # once before: what is made at first use
            mx.reset_peak_memory()
            tracemalloc.start()
            mx.eval(mx.grad(f)(mx.array(0.7)))
            host = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return host + mx.get_peak_memory()

        assert peak(4.0) < 1.2 * peak(1.0)  # four times as many steps


class TestUnits:
    @pytest.mark.parametrize("unit", [1e-30, 1.38e-23, 1e5, 1e30])
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    @KINDS
    def test_slopes_in_any_unit_and_of_any_norm(self, unit, scale, imaginary):
        def slopes(unit, scale):
            def f(h, psi, t):
                H = IsingOperator(N, h, coupling=unit)
                states = evolve(H, psi, t, imaginary=imaginary)
                return mx.real(states * mx.array(TARGET[:1].astype(np.complex64))).sum()

            h, psi, t = mx.array(0.7 * unit), as_mlx(PSI) * scale, mx.array([1.5 / unit])
            moves = [mx.array(0.3 * unit), psi * mx.array(0.2j), mx.array([0.1 / unit])]
            _, (along,) = mx.jvp(f, [h, psi, t], moves)
            return *mx.grad(f, argnums=(0, 1, 2))(h, psi, t), along

        by_h, by_psi, by_t, along = slopes(unit, scale)
        expected = slopes(1.0, 1.0)
        norm = 1.0 if imaginary else scale  # of the states
        assert by_h.item() * unit / norm == pytest.approx(expected[0].item(), rel=1e-4)
        by_psi = to_numpy(by_psi) * (scale / norm)
        np.testing.assert_allclose(by_psi, to_numpy(expected[1]), atol=1e-4)
        assert by_t.item() / unit / norm == pytest.approx(expected[2].item(), rel=1e-4)
        assert along.item() / norm == pytest.approx(expected[3].item(), rel=1e-4)


class Opaque:
    """A user's object: a product and a shape."""

    shape, dtype = (DIM, DIM), mx.float32

    def __init__(self, field):
        self.field = field

    def __matmul__(self, x):
        return IsingOperator(N, self.field) @ x


class TestRefused:
    def test_an_object_of_which_only_products_are_known(self):
        def f(h, psi):
            return loss(evolve(Opaque(h), psi, [1.0]))

        def linear(h, psi):
            return mx.real(evolve(Opaque(h), psi, 1.0)).sum()

        h, psi = mx.array(0.7), as_mlx(PSI)
        slope = mx.grad(f, argnums=1)(h, psi)
        known = mx.grad(lambda psi: loss(evolve(IsingOperator(N, 0.7), psi, [1.0])))(psi)
        np.testing.assert_allclose(to_numpy(slope), to_numpy(known), atol=1e-4)
        for derivative in (
            lambda: mx.grad(f)(h, psi),
            lambda: mx.jvp(lambda h: f(h, psi), [h], [h]),
            lambda: mx.grad(lambda h: mx.abs(mx.grad(linear, argnums=1)(h, psi)).sum())(h),
        ):
            with pytest.raises(ValueError, match=r"^\[evolve\] (has no deri|psi, H and)"):
                derivative()

    @pytest.mark.parametrize("form", [stored, operator, Opaque])
    @pytest.mark.parametrize("name", ["psi", "H", "t"])
    @pytest.mark.parametrize("transform", ["vmap", "compile"])
    def test_what_is_mapped_or_compiled(self, form, name, transform):
        def f(changed):
            h, psi, t = H0[0], as_mlx(PSI), 1.0
            if name == "psi":
                psi = changed
            elif name == "t":
                t = changed
            else:
                h = changed
            return evolve(form(h) if form is Opaque else form(h, 1.0, 0.0), psi, t)

        of = {"psi": as_mlx(PSI), "H": mx.array(0.7), "t": mx.array(1.0)}[name]
        for function in (f, lambda x: mx.grad(lambda y: mx.real(f(y)).sum())(x)):
            with pytest.raises(ValueError, match=rf"^\[evolve\] {name} must hold numbers"):
                getattr(mx, transform)(function)(mx.stack([of, of]) if transform == "vmap" else of)

    @pytest.mark.parametrize("name", ["vmap", "compile"])
    @pytest.mark.not_emulated("needs mx.compile")
    def test_tangents_and_cotangents_mapped_or_compiled(self, name):
        def f(h):
            return loss(evolve(IsingOperator(N, h), as_mlx(PSI), [1.0]))

        h, of = mx.array(0.7), mx.ones(2) if name == "vmap" else mx.array(1.0)
        transform = getattr(mx, name)
        with pytest.raises(ValueError, match=r"^\[evolve\] the tangent of an argument must hold"):
            transform(lambda d: mx.jvp(f, [h], [d])[1][0])(of)
        with pytest.raises(ValueError, match=r"^\[evolve\] the gradient by its states must hold"):
            transform(lambda c: mx.vjp(f, [h], [c])[1][0])(of)

    def test_what_is_not_finite(self):
        def f(h):
            return loss(evolve(IsingOperator(N, h), as_mlx(PSI), [1.0])) * math.inf

        h = mx.array(0.7)
        with pytest.raises(ValueError, match=r"^\[evolve\] the gradient by its states must be fin"):
            mx.grad(f)(h)
        with pytest.raises(ValueError, match=r"^\[evolve\] the tangent of an argument must be fin"):
            mx.jvp(f, [h], [h * math.nan])

    def test_the_value_beside_a_tangent_has_a_derivative(self):
        def f(h):
            return loss(evolve(IsingOperator(N, h), as_mlx(PSI), [1.0]))

        h = mx.array(0.7)
        slope = mx.grad(lambda h: mx.jvp(f, [h], [h])[0][0])(h)
        assert slope.item() == pytest.approx(mx.grad(f)(h).item(), rel=1e-4)

    def test_second_derivatives(self):
        def f(h):
            return loss(evolve(IsingOperator(N, h), as_mlx(PSI), [1.0]))

        h = mx.array(0.7)
        for derivative in (
            lambda: mx.grad(mx.grad(f))(h),
            lambda: mx.jvp(mx.grad(f), [h], [h]),
            lambda: mx.grad(lambda h: mx.jvp(f, [h], [h])[1][0])(h),
        ):
            with pytest.raises(ValueError, match=r"^\[evolve\] psi, H and t have first "):
                derivative()

    def test_what_does_not_depend_on_the_mapped_is_a_constant(self):
        psi = evolve(IsingOperator(N, 0.7), as_mlx(PSI), 1.0)

        def f(a):
            return a * evolve(IsingOperator(N, 0.7), as_mlx(PSI), 1.0)

        for transform in (mx.vmap, mx.compile):
            assert mx.array_equal(transform(f)(mx.ones(1))[..., :DIM].reshape(-1)[:DIM], psi)

    def test_kernels_compute_a_constant_too(self, monkeypatch):
        """Plain MLX, which is what ``mx.vmap`` can map, gives other digits."""
        kernels: Any = ModuleType("kernels")
        kernels.is_available, kernels.takes = lambda: True, lambda *_: not tracing.refuses_kernels
        kernels.product = lambda *operands: pauli_plain.product(*operands) * (1 + 2.0**-20)
        for device in ("PAULI_CPU", "PAULI_GPU"):
            monkeypatch.setattr(choose, device, (kernels, pauli_plain))
        H, psi = IsingOperator(N, 0.7), as_mlx(PSI)
        mapped = mx.vmap(lambda a: a * evolve(H, psi, 1.0))(mx.ones(1))
        assert mx.array_equal(mapped[0], evolve(H, psi, 1.0))
