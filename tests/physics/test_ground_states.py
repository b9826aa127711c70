"""lanczos against dense diagonalisation and the free-fermion energies."""

import time
import warnings
from dataclasses import FrozenInstanceError

import mlx.core as mx
import numpy as np
import pytest
from support import device_of, to_numpy, untyped

from mlx_sparse_nn.physics import (
    IsingOperator,
    exact_ground_energy,
    lanczos,
    transverse_field_ising,
)
from mlx_sparse_nn.physics.krylov import Krylov

CHAINS = [
    (n, h, periodic) for n in (8, 12) for h in (0.3, 0.7, 1.0, 1.5) for periodic in (False, True)
]


def hermitian(n, seed=0, is_complex=False):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, n)) + (1j * rng.normal(size=(n, n)) if is_complex else 0)
    return (a + a.conj().T) / 2


def assert_eigenpairs(H, result, dtype):
    """Check the states themselves, in float64: orthonormal, and of the residuals reported."""
    tol = 1e-9 if dtype == mx.float64 else 1e-5
    states, energies = to_numpy(result.states), to_numpy(result.energies)
    k = energies.size
    assert result.converged
    assert result.energies.shape == result.residuals.shape == (k,)
    assert result.states.shape == (H.shape[0], k)
    overlaps = states.conj().T @ states
    np.testing.assert_allclose(overlaps, np.eye(k), atol=1e-10 if dtype == mx.float64 else 1e-5)
    assert (np.diff(energies) >= 0).all()
    scale = np.abs(np.linalg.eigvalsh(H)).max()
    residuals = np.linalg.norm(H @ states - states * energies, axis=0)
    np.testing.assert_allclose(to_numpy(result.residuals), residuals, atol=1e-6 * scale)
    assert (residuals <= 1.1 * tol * scale).all()


class TestIsing:
    @pytest.mark.parametrize(("dtype", "rtol"), [(mx.float32, 1e-5), (mx.float64, 1e-10)])
    @pytest.mark.parametrize(("n", "h", "periodic"), CHAINS)
    def test_energy_of_free_fermions(self, n, h, periodic, dtype, rtol):
        with device_of(dtype):
            result = lanczos(IsingOperator(n, h, periodic=periodic, dtype=dtype))
        exact = exact_ground_energy(n, h, periodic=periodic)
        assert result.converged
        assert result.energies.dtype == result.states.dtype == dtype
        assert result.energies.item() == pytest.approx(exact, rel=rtol)

    @pytest.mark.parametrize(("dtype", "rtol"), [(mx.float32, 1e-5), (mx.float64, 1e-10)])
    def test_18_sites_in_less_than_a_minute(self, dtype, rtol):
        began = time.perf_counter()
        with device_of(dtype):
            result = lanczos(IsingOperator(18, 1.0, periodic=True, dtype=dtype))
        assert time.perf_counter() - began < 60
        exact = exact_ground_energy(18, 1.0, periodic=True)
        assert result.converged
        assert result.energies.item() == pytest.approx(exact, rel=rtol)

    @pytest.mark.parametrize(("dtype", "rtol"), [(mx.float32, 1e-5), (mx.float64, 1e-10)])
    @pytest.mark.parametrize("h", [0.0, 1e-4, 0.1, 0.3, 0.5, 0.9])
    def test_pairs_of_the_ring(self, h, dtype, rtol):
        """The two lowest energies differ by about h**n."""
        with device_of(dtype):
            H = transverse_field_ising(8, h, periodic=True, dtype=dtype)
            result = lanczos(H, k=2)
            dense = to_numpy(H.todense())
            expected = np.linalg.eigvalsh(dense)[:2]
            np.testing.assert_allclose(to_numpy(result.energies), expected, rtol=rtol)
            assert_eigenpairs(dense, result, dtype)

    @pytest.mark.parametrize("seed", range(5))
    def test_exactly_degenerate_ground_level_whatever_the_seed(self, seed):
        """Without a field all up and all down have energy -n; the next level is n states wide."""
        result = lanczos(IsingOperator(10, 0.0, periodic=True), k=3, seed=seed)
        np.testing.assert_allclose(result.energies, [-10, -10, -6], rtol=1e-5)
        weights = np.square(np.array(result.states))
        assert weights[[0, -1], :2].sum() == pytest.approx(2, rel=1e-4)

    def test_triple_level_of_an_antiferromagnetic_ring(self):
        """Three sites, J = -1, no field: one bond of three is broken, in six states."""
        result = lanczos(IsingOperator(3, 0.0, coupling=-1.0, periodic=True), k=8)
        np.testing.assert_allclose(result.energies, [-1] * 6 + [3] * 2, rtol=1e-5)

    def test_many_levels_of_the_open_chain(self):
        H = transverse_field_ising(9, 0.8, longitudinal=0.1)
        dense = to_numpy(H.todense())
        result = lanczos(H, k=6)
        np.testing.assert_allclose(result.energies, np.linalg.eigvalsh(dense)[:6], rtol=1e-5)
        assert_eigenpairs(dense, result, mx.float32)


class TestAnyMatrix:
    @pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 100, 257, 300])
    @pytest.mark.parametrize("is_complex", [False, True])
    def test_dense_matrices_of_any_size(self, n, is_complex):
        H = hermitian(n, is_complex=is_complex)
        dtype = mx.complex64 if is_complex else mx.float32
        k = min(n, 3)
        result = lanczos(mx.array(H).astype(dtype), k=k)
        assert result.states.dtype == dtype
        scale = np.abs(np.linalg.eigvalsh(H)).max()
        np.testing.assert_allclose(
            to_numpy(result.energies), np.linalg.eigvalsh(H)[:k], atol=1e-5 * scale
        )
        assert_eigenpairs(H, result, dtype)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float64])
    def test_high_multiplicity(self, dtype):
        values = np.repeat([-3.0, -1.0, 2.0], [4, 30, 66])
        q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))
        H = (q * values) @ q.T
        with device_of(dtype):
            result = lanczos(mx.array(H, dtype=dtype), k=5)
            np.testing.assert_allclose(to_numpy(result.energies), [-3, -3, -3, -3, -1], rtol=1e-5)
            assert_eigenpairs((H + H.T) / 2, result, dtype)

    def test_zero_and_identity(self):
        for scale in (0.0, 1.0, -2.0):
            result = lanczos(scale * mx.eye(50), k=3)
            assert result.converged
            np.testing.assert_allclose(result.energies, [scale] * 3, rtol=1e-5)

    def test_an_object_with_a_product_and_a_shape_is_enough(self):
        class Shift:
            shape = (40, 40)

            def __matmul__(self, x):
                return mx.arange(40) * x

        np.testing.assert_allclose(lanczos(Shift(), k=2).energies, [0, 1], atol=4e-4)

    def test_16_bit_matrices_are_solved_in_float32(self):
        result = lanczos(IsingOperator(6, 0.7, dtype=mx.bfloat16))
        assert result.energies.dtype == mx.float32

    def test_a_start_vector_keeps_its_symmetry(self):
        """The uniform state is even under flipping all sites; the ground state of the ring too."""
        H = IsingOperator(8, 0.5, periodic=True)
        result = lanczos(H, v0=mx.ones(256))
        state = np.array(result.states[:, 0])
        np.testing.assert_allclose(state, state[::-1], atol=1e-4)
        near = lanczos(H, v0=result.states[:, 0])
        assert near.iterations < result.iterations
        assert near.energies.item() == pytest.approx(result.energies.item(), rel=1e-6)

    def test_one_seed_gives_one_result(self):
        H = IsingOperator(8, 0.7)
        first, second, other = (lanczos(H, seed=seed).states for seed in (1, 1, 2))
        assert mx.array_equal(first, second)
        assert not mx.array_equal(first, other)

    def test_products_that_avoid_matmul_agree(self):
        """The path of a GPU, whose matmul may round to TF32."""
        rng = np.random.default_rng(0)
        w = mx.array(rng.normal(size=700).astype(np.float32))
        results = []
        for by_matmul in (True, False):
            basis = Krylov(700, 5, mx.float32)
            basis._by_matmul = by_matmul
            for column in mx.random.normal((3, 700), key=mx.random.key(0)):
                rest, _, norm = basis.orthogonalise(column)
                basis.append(rest, norm)
            rest, coefficients, norm = basis.orthogonalise(w)
            results.append([np.array(rest), coefficients, norm, *basis.combine(np.eye(3))])
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class TestConvergence:
    def test_says_so_when_it_has_not_converged(self):
        H = IsingOperator(10, 1.0)
        with pytest.warns(RuntimeWarning, match=r"\[lanczos\] not converged after 7 products"):
            result = lanczos(H, max_iter=7)
        assert result.converged is False
        assert result.iterations == 7
        state = result.states[:, 0]
        error = np.linalg.norm(H @ state - result.energies * state)
        assert result.residuals.item() == pytest.approx(error, rel=1e-3)
        assert result.residuals > 1e-3

    def test_a_tolerance_below_rounding_is_not_called_reached(self):
        with pytest.warns(RuntimeWarning, match="tol asks for 1e-12"):
            result = lanczos(IsingOperator(8, 1.0), tol=1e-12, max_iter=200)
        assert not result.converged
        assert result.residuals < 1e-4

    def test_a_looser_tolerance_takes_fewer_products(self):
        H = IsingOperator(10, 1.0)
        assert lanczos(H, tol=1e-2).iterations < lanczos(H, tol=1e-5).iterations

    def test_the_result_is_frozen(self):
        result = lanczos(mx.eye(3))
        with pytest.raises(FrozenInstanceError):
            untyped(result).energies = mx.zeros(1)

    def test_a_result_that_converged_does_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lanczos(IsingOperator(8, 0.7), k=2)
