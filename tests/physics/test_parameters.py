"""The arrays that a Hamiltonian depends on, and the Hamiltonian made of others."""

import mlx.core as mx
import numpy as np
import pytest
from spins import dense_ising, random_state

from mlx_sparse_nn.physics import IsingOperator, transverse_field_ising
from mlx_sparse_nn.physics.parameters import parameters, read, refuse_derivatives


class Opaque:
    shape, dtype = (16, 16), mx.float32

    def __init__(self, matrix):
        self.matrix = matrix

    def __matmul__(self, x):
        return self.matrix @ x


HAMILTONIANS = {
    "CSRArray": transverse_field_ising(4, 0.7, periodic=True),
    "COOArray": transverse_field_ising(4, 0.7, periodic=True).tocoo(),
    "dense": transverse_field_ising(4, 0.7, periodic=True).todense(),
    "operator": IsingOperator(4, 0.7, periodic=True),
    "opaque": Opaque(transverse_field_ising(4, 0.7, periodic=True)),
}


@pytest.mark.parametrize("kind", HAMILTONIANS)
def test_rebuilt_of_its_own_arrays_it_is_the_same(kind):
    H, x = HAMILTONIANS[kind], random_state(4)
    arrays, rebuild = parameters(H)
    assert len(arrays) == {"operator": 3, "opaque": 0}.get(kind, 1)
    np.testing.assert_array_equal(rebuild(arrays) @ x, H @ x)


@pytest.mark.parametrize("kind", ["CSRArray", "COOArray", "dense", "operator"])
def test_rebuilt_of_twice_its_arrays_it_is_twice_as_large(kind):
    H, x = HAMILTONIANS[kind], random_state(4)
    arrays, rebuild = parameters(H)
    np.testing.assert_allclose(rebuild([2 * a for a in arrays]) @ x, 2 * (H @ x), rtol=1e-6)


def test_an_operator_is_differentiated_by_its_arrays():
    H, x, y = IsingOperator(4, 0.7, coupling=1.25, longitudinal=0.5), random_state(4), mx.ones(16)
    arrays, rebuild = parameters(H)
    _, (h, j, g) = mx.vjp(lambda *a: rebuild(a) @ x, arrays, [y])
    for slope, unit in ((h, (1, 0, 0)), (j, (0, 1, 0)), (g, (0, 0, 1))):
        expected = np.ones(16) @ dense_ising(4, *unit) @ np.array(x)
        np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_tracers_of_vmap_and_compile_are_refused_by_name():
    def f(x):
        read("solver", "psi", 2 * x)
        return x

    read("solver", "psi", mx.ones(3))
    mx.grad(lambda x: f(x).sum())(mx.ones(3))
    for transform in (mx.vmap, mx.compile):
        with pytest.raises(ValueError, match=r"^\[solver\] psi must hold numbers"):
            transform(f)(mx.ones(3))


def test_a_derivative_that_is_not_known_is_refused_and_no_other():
    def f(x, y):
        return x.sum() + refuse_derivatives("solver", "H", y)

    one = mx.ones(3)
    np.testing.assert_array_equal(mx.grad(f)(one, one), one)
    for derivative in (
        lambda: mx.grad(f, argnums=1)(one, one),
        lambda: mx.jvp(lambda y: f(one, y), [one], [one]),
        lambda: mx.vmap(lambda y: f(one, y))(one),
    ):
        with pytest.raises(ValueError, match=r"^\[solver\] has no derivative by H"):
            derivative()
