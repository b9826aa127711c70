"""Gradients of evolve against differences of dense matrix exponentials, in float64."""

import mlx.core as mx
import numpy as np
import pytest
import scipy.linalg
from spins import dense_ising
from support import to_numpy

from mlx_sparse_nn.physics import IsingOperator, evolve, transverse_field_ising

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
        moves = [RNG.normal(size=N) for _ in range(3)]

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
