"""lanczos against dense diagonalisation and the free-fermion energies."""

import time
import tracemalloc
import warnings
from dataclasses import FrozenInstanceError

import mlx.core as mx
import numpy as np
import pytest
from support import device_of, to_numpy, untyped

from mlx_sparse_nn.physics import (
    IsingOperator,
    device_columns,
    exact_ground_energy,
    krylov,
    lanczos,
    transverse_field_ising,
)

CHAINS = [
    (n, h, periodic) for n in (8, 12) for h in (0.3, 0.7, 1.0, 1.5) for periodic in (False, True)
]
PAIRS = [(i, j) for i in range(8) for j in range(i)]


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

    @pytest.mark.parametrize("seed", range(3))
    def test_energies_have_all_digits_of_float32(self, seed):
        """Deep in the ordered phase a few amplitudes are large, and a sum loses the small ones."""
        result = lanczos(IsingOperator(14, 0.3, periodic=True), k=2, seed=seed)
        exact = exact_ground_energy(14, 0.3, periodic=True)
        rtol = np.sqrt(64) * 2.0**-23  # of 64 terms one after another
        np.testing.assert_allclose(result.energies, [exact] * 2, rtol=rtol)
        norms = np.square(np.array(result.states, dtype=np.float64)).sum(axis=0)
        np.testing.assert_allclose(norms, 1, atol=rtol)

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

    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64, mx.float64])
    def test_the_highest_levels_are_minus_the_lowest_of_minus_h(self, dtype):
        values = hermitian(60, is_complex=dtype == mx.complex64)
        with device_of(dtype):
            H = mx.array(values).astype(dtype) if dtype != mx.float64 else mx.array(values, dtype)
            result = lanczos(H, k=3, which="largest")
        expected = np.linalg.eigvalsh(values)[-3:]
        np.testing.assert_allclose(to_numpy(result.energies), expected, rtol=1e-5)
        assert_eigenpairs(values, result, dtype)

    def test_the_result_unpacks_like_that_of_eigsh(self):
        result = lanczos(IsingOperator(6, 0.7), k=2)
        energies, states = result
        assert energies is result.energies
        assert states is result.states


class TestCopies:
    """Levels of many states, as often as they occur; of one space, each would come once."""

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float64])
    @pytest.mark.parametrize("k", [2, 5, 10])
    @pytest.mark.parametrize(
        "lattice",
        [
            {"periodic": True, "field": 1.0},  # momenta +-k
            {"periodic": True, "field": 0.3},
            {"periodic": True, "field": 0.0},  # 2 states, then 132 in one level
            {"bonds": PAIRS, "field": 0.7},  # every permutation of sites is a symmetry
            {"bonds": PAIRS, "field": 0.0},
            {"bonds": PAIRS, "field": 0.4, "coupling": -1.0},  # frustrated
        ],
        ids=["ring", "ordered", "J-only", "all-to-all", "all-to-all-J", "frustrated"],
    )
    def test_levels_of_symmetric_lattices(self, lattice, k, dtype):
        with device_of(dtype):
            H = IsingOperator(8, dtype=dtype, **lattice)
            dense = to_numpy(H.todense())
            result = lanczos(H, k)
            expected = np.linalg.eigvalsh(dense)[:k]
            atol = (1e-5 if dtype == mx.float32 else 1e-10) * np.abs(dense).max()
            np.testing.assert_allclose(to_numpy(result.energies), expected, atol=atol)
            assert_eigenpairs(dense, result, dtype)

    @pytest.mark.parametrize("seed", range(20))
    def test_no_copy_is_missed_whatever_the_seed(self, seed):
        values = np.repeat([-3.0, -2.9, -2.5, 0.0], [2, 3, 2, 1])
        values = np.concatenate([values, np.linspace(0.1, 5, 292)])
        result = lanczos(mx.diag(mx.array(values.astype(np.float32))), k=8, seed=seed)
        np.testing.assert_allclose(result.energies, values[:8], atol=1e-4)

    def test_ten_levels_of_15_sites_converge(self):
        """They took more than 1,000 products."""
        result = lanczos(IsingOperator(15, 1.0), k=10)
        assert result.converged
        assert result.iterations < 400


class TestUnits:
    """Energies, residuals and warnings are in the unit of H, whatever it is."""

    @pytest.mark.parametrize("unit", [1e-30, 1.38e-23, 1e-6, 1e8, 1e18, 1e30])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64, mx.float64])
    @pytest.mark.parametrize("form", ["operator", "csr", "dense", "own"])
    def test_any_unit_gives_the_same_digits(self, form, dtype, unit):
        class Own:
            shape = (256, 256)

            def __init__(self, H):
                self.H = H

            def __matmul__(self, x):
                return self.H @ x

        with device_of(dtype):
            if form in ("operator", "own"):
                H = IsingOperator(8, unit, coupling=unit, dtype=dtype)
                H = Own(H) if form == "own" else H
            else:
                H = transverse_field_ising(8, unit, coupling=unit, dtype=dtype)
                H = H.todense() if form == "dense" else H
            result = lanczos(H, 2, v0=mx.ones(256, dtype) if form == "own" else None)
            energies, residuals = to_numpy(result.energies), to_numpy(result.residuals)
        assert result.converged
        rtol = 1e-12 if dtype == mx.float64 else 1e-6
        expected = exact_ground_energy(8, 1.0)
        assert energies[0] / unit == pytest.approx(expected, rel=rtol)
        assert 0 < residuals.max() / unit < 2e-4

    @pytest.mark.parametrize("power", [-100, -50, 50, 100])
    def test_a_power_of_two_changes_no_bit(self, power):
        unit = 2.0**power
        base = lanczos(IsingOperator(8, 1.0), 3)
        scaled = lanczos(IsingOperator(8, unit, coupling=unit), 3)
        assert scaled.iterations == base.iterations
        np.testing.assert_array_equal(np.array(scaled.states), np.array(base.states))
        exact = np.ldexp(np.array(base.energies, dtype=np.float64), power)
        np.testing.assert_array_equal(np.array(scaled.energies, dtype=np.float64), exact)

    def test_the_warning_is_in_the_unit_of_h(self):
        with pytest.warns(RuntimeWarning, match=r"the largest residual is \d\.?\d?e-2[0-9]"):
            result = lanczos(IsingOperator(10, 1e-23, coupling=1e-23), max_iter=7)
        assert 1e-24 < float(result.residuals[0]) < 1e-22


class TestColumns:
    """What a GPU computes with; here on a CPU."""

    @pytest.fixture(autouse=True)
    def on_device(self, monkeypatch):
        monkeypatch.setattr(krylov, "_on_host", lambda dtype: False)

    @pytest.mark.parametrize("k", [1, 2, 5])
    @pytest.mark.parametrize("periodic", [False, True])
    def test_levels_of_the_chain(self, k, periodic):
        H = IsingOperator(10, 0.8, periodic=periodic)
        dense = to_numpy(H.todense())
        result = lanczos(H, k)
        expected = np.linalg.eigvalsh(dense)[:k]
        np.testing.assert_allclose(result.energies, expected, rtol=1e-5)
        assert_eigenpairs(dense, result, mx.float32)

    @pytest.mark.parametrize("n", [1, 2, 3, 31, 100, 257, 1025])
    @pytest.mark.parametrize("is_complex", [False, True])
    def test_dense_matrices_of_any_size(self, n, is_complex):
        H = hermitian(n, is_complex=is_complex)
        k = min(n, 3)
        result = lanczos(mx.array(H).astype(mx.complex64 if is_complex else mx.float32), k=k)
        assert_eigenpairs(H, result, mx.float32)
        expected = np.linalg.eigvalsh(H)[:k]
        np.testing.assert_allclose(result.energies, expected, atol=1e-5 * np.abs(expected).max())

    def test_high_multiplicity_ends_a_space_within_a_run(self):
        values = mx.array(np.repeat([-3.0, -1.0, 2.0], [4, 30, 66]).astype(np.float32))
        result = lanczos(mx.diag(values), k=6)
        assert result.converged
        np.testing.assert_allclose(result.energies, [-3, -3, -3, -3, -1, -1], rtol=1e-5)

    def test_a_loss_of_orthogonality_within_a_run_is_taken_back(self):
        """Two levels far from all others: the recurrence loses orthogonality in three steps."""
        values = np.concatenate([[-1000.0, -900.0], np.linspace(0, 1, 598)]).astype(np.float32)
        result = lanczos(mx.diag(mx.array(values)), k=2)
        assert result.converged
        np.testing.assert_allclose(result.energies, [-1000, -900], rtol=1e-5)


class TestMemory:
    """As the docstring says and ``check_memory`` counts: 35 + 5 k vectors, on a GPU 40 + 5 k."""

    N = 17  # sites: a vector is 512 KiB

    @pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
    @pytest.mark.parametrize("k", [1, 2, 5])
    @pytest.mark.not_emulated("counts the memory of MLX and of NumPy")
    def test_peak(self, monkeypatch, k, on_host):
        """MLX's own count, and NumPy's, which ``tracemalloc`` traces; both peaks at once."""
        monkeypatch.setattr(krylov, "_on_host", lambda dtype: on_host)
        monkeypatch.setattr(device_columns, "_LARGE", 2 ** (self.N - 1))
        H = IsingOperator(self.N, 1.0)
        mx.eval(H @ mx.ones(2**self.N))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tracemalloc.start()
        try:
            result = lanczos(H, k, tol=1e-3)
            mx.eval(result.states)
            of_numpy = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        of_mlx = mx.get_peak_memory() - before
        vectors = (of_numpy + of_mlx) / (4 * 2**self.N)
        assert vectors <= (35 if on_host else 40) + 5 * k
        assert krylov.vectors_of_search(k, mx.float32) == (35 if on_host else 40) + 5 * k
        assert vectors <= 45 + 13 * (k - 1)


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

    def test_a_search_that_is_cut_short_is_not_called_converged(self):
        """Both levels are there, but a copy of the first may be missing."""
        H = IsingOperator(10, 1.0)
        needed = next(m for m in range(20, 200, 5) if _worst(H, m) < 1e-4)
        with pytest.warns(RuntimeWarning, match="the search for missed levels has not come to"):
            assert not lanczos(H, 2, max_iter=needed).converged

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


def _worst(H, max_iter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(lanczos(H, 2, max_iter=max_iter).residuals.max())
