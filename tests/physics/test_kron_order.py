"""States in the order of Kronecker products by hand, with the standard Pauli matrices."""

from functools import reduce

import mlx.core as mx
import numpy as np
import pytest
from spins import dense_ising, random_state
from support import assert_equal, device_of, to_numpy

from mlx_sparse_nn.physics import (
    IsingOperator,
    correlation,
    evolve,
    expectation,
    from_kron_order,
    lanczos,
    magnetization,
    to_kron_order,
)

# As in every textbook, and in QuTiP: (1, 0) is up.
STANDARD = {
    "x": np.array([[0, 1], [1, 0]]),
    "y": np.array([[0, -1j], [1j, 0]]),
    "z": np.array([[1, 0], [0, -1]]),
}


def by_hand(n, factors):
    """Return a product of operators, site 0 first, as QuTiP's tensor has it."""
    return reduce(np.kron, [factors.get(site, np.eye(2)) for site in range(n)])


def ising_by_hand(field, longitudinal):
    n = len(field)
    x, z = STANDARD["x"], STANDARD["z"]
    bonds = [by_hand(n, {i: z, i + 1: z}) for i in range(n - 1)]
    sites = [by_hand(n, {i: h * x + longitudinal * z}) for i, h in enumerate(field)]
    return -np.sum(bonds + sites, axis=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_a_product_state(n):
    spins = np.random.default_rng(n).normal(size=(n, 2))  # up, down of each site
    there = reduce(np.kron, spins)
    here = reduce(np.kron, spins[::-1, ::-1].copy())  # the last site first, and down before up
    np.testing.assert_array_equal(to_kron_order(mx.array(here)), there.astype(np.float32))
    np.testing.assert_array_equal(from_kron_order(mx.array(there)), here.astype(np.float32))


@pytest.mark.parametrize("axis", STANDARD)
def test_every_observable_is_that_of_the_standard_matrices(axis):
    n, psi = 5, random_state(5, mx.complex64)
    state = to_numpy(to_kron_order(psi))
    state /= np.linalg.norm(state)
    mean = lambda factors: np.vdot(state, by_hand(n, factors) @ state).real
    one = STANDARD[axis]
    expected = [mean({site: one}) for site in range(n)]
    np.testing.assert_allclose(magnetization(psi, axis), expected, atol=1e-5)
    expected = [[mean({i: one, j: one}) if i != j else 1.0 for i in range(n)] for j in range(n)]
    np.testing.assert_allclose(correlation(psi, axis), np.array(expected), atol=1e-5)


def test_ground_state_and_evolution_are_those_of_the_matrix_by_hand():
    n, field = 5, [0.3, 0.5, 0.7, 0.9, 1.1]
    values, vectors = np.linalg.eigh(ising_by_hand(field, 0.2))
    operator = IsingOperator(n, field, longitudinal=0.2)
    ground = to_numpy(to_kron_order(lanczos(operator).states))[:, 0]
    assert abs(ground @ vectors[:, 0]) == pytest.approx(1, abs=1e-5)

    start = random_state(n, mx.complex64, seed=3)
    expected = vectors @ (np.exp(-0.7j * values) * (vectors.T @ to_numpy(to_kron_order(start))))
    later = to_numpy(to_kron_order(evolve(operator, start, 0.7)))
    np.testing.assert_allclose(later, expected, atol=1e-4)


def test_a_matrix_is_brought_over_by_its_columns():
    """Both sides of the dense matrix: H_there = P H_here P."""
    here = mx.array(dense_ising(4, 0.7, longitudinal=0.2), dtype=mx.float32)
    there = to_kron_order(to_kron_order(here).T).T
    np.testing.assert_allclose(there, ising_by_hand([0.7] * 4, 0.2), atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32, mx.float64, mx.complex64, mx.int32])
@pytest.mark.parametrize("shape", [(2,), (512,), (8, 1), (32, 3), (2, 0)])
def test_back_is_the_same_bit_for_bit(dtype, shape):
    with device_of(dtype):
        psi = (mx.random.normal(shape) * 50).astype(dtype)
        moved = to_kron_order(psi)
        assert moved.shape == shape
        assert moved.dtype == dtype
        assert_equal(from_kron_order(moved), psi)
        for column in range(shape[1] if len(shape) > 1 else 0):
            assert_equal(to_kron_order(psi[:, column]), moved[:, column])


@pytest.mark.parametrize("order", [to_kron_order, from_kron_order])
def test_derivatives_and_transforms(order):
    psi, weights = random_state(7), random_state(7, seed=1)
    cube = lambda psi: (order(psi) ** 3 * weights).sum()
    back = order(weights)  # the permutation is its own inverse
    np.testing.assert_allclose(mx.grad(cube)(psi), 3 * psi.square() * back, rtol=1e-5)
    twice = mx.grad(lambda psi: mx.grad(cube)(psi).sum())(psi)
    np.testing.assert_allclose(twice, 6 * psi * back, rtol=1e-5)
    assert_equal(mx.jvp(order, [psi], [weights])[1][0], order(weights))
    assert_equal(mx.compile(order)(psi), order(psi))
    many = mx.stack([psi, weights])
    assert_equal(mx.vmap(order)(many), mx.stack([order(psi), order(weights)]))
    assert_equal(mx.vmap(order, in_axes=1, out_axes=1)(many.T), order(many.T))


def test_a_column_of_complex128_comes_from_numpy():
    """As ``state.full()`` of QuTiP is."""
    column = np.array([[0], [1j], [0], [0]], dtype=np.complex128)  # up, down
    psi = from_kron_order(mx.array(column))
    assert psi.dtype == mx.complex64
    np.testing.assert_array_equal(magnetization(psi[:, 0]), [1, -1])
    H = IsingOperator(2, 0.0, longitudinal=[1.0, 3.0])
    assert expectation(H, psi[:, 0]).item() == pytest.approx(1 - 1 + 3)
