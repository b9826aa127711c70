"""Sums of Pauli strings against Kronecker products of Pauli's matrices, and known energies."""

import copy
import pickle
import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spins import dense_ising, dense_strings, random_state
from support import assert_close, device_of, to_numpy

from mlx_sparse_nn import CSRArray, csr_array
from mlx_sparse_nn.physics import (
    IsingOperator,
    PauliSum,
    chain,
    evolve,
    expectation,
    lanczos,
    pauli_sum,
    ring,
    transverse_field_ising,
    triangular,
    variance,
)


def dense_of(terms, n):
    """Return the matrix of what ``pauli_sum`` takes, coefficients being numbers."""
    strings = []
    for letters, rows in terms.items():
        if isinstance(rows, tuple):
            values = np.broadcast_to(np.asarray(rows[0], float), (len(rows[1]),))
            places = [(p,) if isinstance(p, int) else p for p in rows[1]]
            rows = [(value, *place) for value, place in zip(values, places, strict=True)]
        strings += [(row[0], letters, row[1:]) for row in rows]
    return dense_strings(strings, n)


def heisenberg(bonds, delta=1.0, j=1.0):
    return {"XX": (j, bonds), "YY": (j, bonds), "ZZ": (j * delta, bonds)}


def levels(H):
    """Return all energies, by NumPy in float64."""
    matrix = to_numpy(H.todense())
    np.testing.assert_array_equal(matrix, matrix.conj().T)
    return np.linalg.eigvalsh(matrix.astype(complex))


@st.composite
def sums(draw):
    """Draw terms of up to 4 letters in any order on up to 6 sites, and the number of sites."""
    n = draw(st.integers(1, 6))
    terms = {}
    for _ in range(draw(st.integers(0, 5))):
        letters = draw(st.text("XYZ", max_size=min(4, n)))
        sites = draw(st.permutations(range(n)))[: len(letters)]
        terms.setdefault(letters, []).append((draw(st.integers(-4, 4)) / 4, *sites))
    return terms, n


class TestMatrix:
    @given(sums())
    def test_is_that_of_kronecker_products(self, case):
        terms, n = case
        H, expected = pauli_sum(terms, n), dense_of(*case)
        has_imaginary = any(letters.count("Y") % 2 for letters in terms)
        assert H.dtype == (mx.complex64 if has_imaginary else mx.float32)
        assert H.shape == expected.shape
        # Quarters add up exactly.
        for actual in (H.todense(), H @ mx.eye(2**n), H.tocsr().todense()):
            assert actual.dtype == H.dtype
            np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(H.diagonal(), expected.diagonal())
        np.testing.assert_array_equal(H.T.todense(), expected.T)
        np.testing.assert_array_equal(H.conj().todense(), expected.conj())
        np.testing.assert_array_equal(H.H.todense(), expected.conj().T)
        np.testing.assert_array_equal(mx.eye(2**n) @ H, expected)

    def test_of_a_gpu_whose_mlx_makes_no_complex_identity(self, monkeypatch):
        def eye(n, dtype=mx.float32):
            assert dtype != mx.complex64, "[scatter] GPU scatter does not yet support complex64"
            return make_eye(n, dtype=dtype)

        make_eye, H = mx.eye, pauli_sum({"XY": [(0.5, 0, 1)], "Z": [(2.0, 2)]}, 3)
        monkeypatch.setattr(mx, "eye", eye)
        expected = dense_of({"XY": [(0.5, 0, 1)], "Z": [(2.0, 2)]}, 3)
        np.testing.assert_array_equal(H.todense(), expected)
        psi = random_state(3, mx.complex64)
        later = evolve(H, psi, 0.3)  # of few states, by the whole spectrum
        assert later.shape == (8,)

    def test_y_takes_up_to_i_times_down(self):
        """Y = i X Z, a set bit is up: ``Y|up> = i|down>`` and ``Y|down> = -i|up>``."""
        Y, X, Z = (pauli_sum({letter: [(1.0, 0)]}, 1) for letter in "YXZ")
        up, down = mx.array([0.0, 1.0]), mx.array([1.0, 0.0])
        assert (Y @ up).tolist() == [1j, 0]
        assert (Y @ down).tolist() == [0, -1j]
        psi = random_state(1, mx.complex64)
        np.testing.assert_allclose(Y @ psi, 1j * (X @ (Z @ psi)), rtol=1e-6)
        # X Y = i Z, and so around: the algebra of spins, not of their mirror image.
        np.testing.assert_allclose(X @ (Y @ psi), 1j * (Z @ psi), rtol=1e-6)

    def test_two_forms_of_terms(self):
        bonds = [(0, 1), (2, 1)]
        by_rows = pauli_sum({"XY": [[0.5, 0, 1], (0.25, 2, 1)], "Z": [(2, 2), (2, 0)]}, 3)
        scalars = [mx.array(0.5), 0.25]
        for values in ([0.5, 0.25], np.array([0.5, 0.25]), mx.array([0.5, 0.25]), scalars):
            for places in (bonds, np.array(bonds)):
                by_places = pauli_sum({"XY": (values, places), "Z": (2, range(0, 3, 2))}, 3)
                assert by_places.strings == by_rows.strings
                np.testing.assert_array_equal(by_places.todense(), by_rows.todense())

    def test_equal_strings_add_up_whatever_the_order_of_letters(self):
        H = pauli_sum({"XZ": [(1.0, 0, 2), (0.5, 0, 2)], "ZX": [(mx.array(0.25), 2, 0)]}, 3)
        assert H.strings == [("XZ", (0, 2))]
        assert H.coefficients.tolist() == [1.75]

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.float64])
    def test_dtypes(self, dtype):
        terms, n = heisenberg(ring(6), 1 / 3), 6
        with device_of(dtype):
            H, x = pauli_sum(terms, n, dtype=dtype), random_state(n, dtype)
            dense = np.real(dense_of(terms, n))
            expected = dense @ to_numpy(x).astype(float)
            magnitude = np.abs(dense) @ np.abs(to_numpy(x).astype(float))
            assert H.dtype == H.diagonal().dtype == H.tocsr().dtype == dtype
            assert_close(H @ x, expected, 19, magnitude)

    def test_promotes_like_the_matrix(self):
        real, imaginary = pauli_sum({"X": [(1.0, 0)]}, 2), pauli_sum({"Y": [(1.0, 0)]}, 2)
        assert (real @ mx.ones(4)).dtype == mx.float32
        assert (real @ mx.ones(4, mx.complex64)).dtype == mx.complex64
        assert (imaginary @ mx.ones(4)).dtype == mx.complex64
        assert (real + imaginary).dtype == mx.complex64
        assert pauli_sum({"X": [(1.0, 0)]}, 2, dtype=mx.complex64).dtype == mx.complex64
        assert (real @ np.ones(4)).dtype == mx.float32

    @pytest.mark.parametrize("shape", [(16,), (16, 1), (16, 3), (2, 16, 3), (2, 0, 16, 3)])
    def test_shapes(self, shape):
        H = pauli_sum({"XY": [(0.5, 0, 2)], "Z": [(1.0, 1)]}, 4)
        x = mx.random.normal(shape, key=mx.random.key(0))
        expected = to_numpy(H.todense()) @ to_numpy(x)
        np.testing.assert_allclose(H @ x, expected, rtol=1e-6, atol=1e-6)
        if len(shape) > 1:
            rows = x.swapaxes(-1, -2)
            expected = to_numpy(rows) @ to_numpy(H.todense())
            np.testing.assert_allclose(rows @ H, expected, rtol=1e-6, atol=1e-6)

    def test_left_operands_have_its_size(self):
        H = pauli_sum({"X": [(1.0, 0)]}, 2)
        with pytest.raises(ValueError, match=re.escape("[x @ H] x has shape (3,), H is (4, 4)")):
            _ = mx.ones(3) @ H


class TestSparse:
    def test_stores_what_strings_reach_whatever_their_coefficients(self):
        H = pauli_sum({"XX": [(0.0, 0, 1)], "YY": [(0.0, 0, 1)], "Z": [(0.0, 2)]}, 3)
        A = H.tocsr()
        assert isinstance(A, CSRArray)
        assert A.nnz == 8 * 2  # XX and YY share a place of each row, Z has the diagonal
        assert all(np.all(np.diff(row) > 0) for row in A.indices.reshape(8, 2))

    @pytest.mark.parametrize("n", [1, 3, 5])
    def test_of_ising_is_the_stored_hamiltonian(self, n):
        A = IsingOperator(n, 0.75, longitudinal=0.5).tocsr()
        B = transverse_field_ising(n, 0.75, longitudinal=0.5)
        np.testing.assert_array_equal(A.indptr, B.indptr)
        np.testing.assert_array_equal(A.indices, B.indices)
        np.testing.assert_array_equal(A.data, B.data)

    def test_of_nothing(self):
        H = pauli_sum({}, 2)
        assert len(H) == H.tocsr().nnz == 0
        assert (H.tocsr() @ mx.ones(4)).tolist() == [0] * 4
        assert not mx.any(H @ mx.ones(4)).item()
        assert not mx.any(H.diagonal()).item()

    def test_derivatives_by_coefficients(self):
        def energy(c, by_csr):
            H = pauli_sum({"XY": (c, chain(3)), "ZZ": (c * c, chain(3))}, 3)
            return expectation(H.tocsr() if by_csr else H, psi)

        psi, c = random_state(3, mx.complex64), mx.array([0.5, -0.25])
        for derive in (mx.grad, lambda f, **k: mx.grad(lambda c, b: (mx.grad(f)(c, b) ** 2).sum())):
            by_csr, by_strings = (derive(energy)(c, by) for by in (True, False))
            np.testing.assert_allclose(by_csr, by_strings, rtol=1e-5, atol=1e-6)


class TestModels:
    """Energies that papers and textbooks know, in units of Pauli matrices: 4 times those of S.S."""

    def test_heisenberg_rings(self):
        # -2 in S.S for n = 4, where H = ((S_0 + S_1 + S_2 + S_3)^2 - (S_0 + S_2)^2 - ...) / 2.
        assert levels(pauli_sum(heisenberg(ring(4)), 4))[0] == pytest.approx(-8, abs=1e-5)
        triangle = levels(pauli_sum(heisenberg(ring(3)), 3))
        np.testing.assert_allclose(triangle, [-3] * 4 + [3] * 4, atol=1e-5)
        # All pairs of 4: (S(S + 1) - 3) / 2 in S.S; S = 0 occurs 2 times, 1 nine and 2 five times.
        pairs = [(i, j) for i in range(4) for j in range(i)]
        expected = [2 * s * (s + 1) - 6 for s in (0, 0, *[1] * 9, *[2] * 5)]
        actual = levels(pauli_sum(heisenberg(pairs), 4))
        np.testing.assert_allclose(actual, np.sort(expected), atol=1e-5)

    @pytest.mark.parametrize("delta", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    @pytest.mark.parametrize("bonds", [chain(5), ring(6), triangular(2, 3)])
    def test_xxz(self, bonds, delta):
        n = 1 + max(map(max, bonds))
        terms = heisenberg(bonds, delta)
        expected = np.linalg.eigvalsh(dense_of(terms, n))
        np.testing.assert_allclose(levels(pauli_sum(terms, n)), expected, atol=1e-4)

    def test_xx_chain_is_of_free_fermions(self):
        """XX + YY on an open chain hops: levels are sums of 4 cos(pi k / (n + 1))."""
        n = 6
        modes = 4 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))
        E = lanczos(pauli_sum({"XX": (1.0, chain(n)), "YY": (1.0, chain(n))}, n)).energies[0]
        assert E.item() == pytest.approx(modes[modes < 0].sum(), rel=1e-5)

    def test_ferromagnet_of_xxz(self):
        """At delta = -1 all states of largest spin are ground states, n + 1 of them."""
        n = 5
        energies = levels(pauli_sum(heisenberg(ring(n), 1.0, -1.0), n))
        np.testing.assert_allclose(energies[: n + 1], -n, atol=1e-4)
        assert energies[n + 1] > -n + 0.1

    @pytest.mark.parametrize("d", [0.75, -0.75])
    def test_dzyaloshinskii_moriya_chain(self, d):
        """D z.(S_i x S_j): a spin at an angle of t to the last has J cos t + D sin t.

        The sign of Y decides which way that is. A rotation of each spin makes it an XX chain of
        sqrt(J^2 + D^2), whose levels it shares.
        """
        n, t = 6, 0.4
        bonds = chain(n)
        H = pauli_sum(
            {"XX": (1.0, bonds), "YY": (1.0, bonds), "XY": (d, bonds), "YX": (-d, bonds)}, n
        )
        assert H.dtype == mx.complex64
        spiral = np.ones(1)
        for site in range(n):  # up + exp(i angle) down points along (cos, sin): up is the set bit
            spiral = np.kron([np.exp(1j * t * site), 1], spiral)
        energy = expectation(H, mx.array(spiral.astype(np.complex64)))
        assert energy.item() == pytest.approx((n - 1) * (np.cos(t) + d * np.sin(t)), rel=1e-5)
        xx = pauli_sum({letters: (np.hypot(1, d), bonds) for letters in ("XX", "YY")}, n)
        np.testing.assert_allclose(levels(H), levels(xx), atol=1e-4)

    def test_cluster_model_has_a_stabiliser_state(self):
        """Z X Z on a ring commute: the ground state has -n, its gap is 2, and it is one."""
        n = 6
        rows = [(-1.0, i, (i + 1) % n, (i + 2) % n) for i in range(n)]
        energies = levels(pauli_sum({"ZXZ": rows}, n))
        np.testing.assert_allclose(energies[:2], [-n, -n + 2], atol=1e-5)

    def test_three_spin_chirality(self):
        """S.(S x S) on a triangle: two doublets of opposite handedness, at 2 sqrt(3), and zeros."""
        terms = {s: [(1.0, 0, 1, 2)] for s in ("XYZ", "YZX", "ZXY")}
        terms |= {s: [(-1.0, 0, 1, 2)] for s in ("XZY", "YXZ", "ZYX")}
        E = np.sqrt(12)
        np.testing.assert_allclose(
            levels(pauli_sum(terms, 3)), [-E, -E, 0, 0, 0, 0, E, E], atol=1e-5
        )

    def test_ising_is_a_sum_of_strings(self):
        n = 4
        H = pauli_sum({"ZZ": (-0.5, ring(n)), "X": (-0.7, range(n)), "Z": (-0.2, range(n))}, n)
        expected = dense_ising(n, 0.7, 0.5, 0.2, periodic=True)
        np.testing.assert_allclose(H.todense(), expected, atol=1e-6)

    def test_a_constant_shifts_all_levels(self):
        H = pauli_sum({"X": [(1.0, 0)], "": [(2.5,)]}, 1)
        np.testing.assert_allclose(levels(H), [1.5, 3.5])

    def test_solvers_and_observables_take_it(self):
        n = 6
        terms = heisenberg(chain(n), 0.5) | {"XY": (0.3, chain(n)), "Y": (0.2, range(n))}
        H, dense = pauli_sum(terms, n), dense_of(terms, n)
        found, expected = lanczos(H, k=2), np.linalg.eigvalsh(dense)[:2]
        np.testing.assert_allclose(found.energies, expected, rtol=1e-5)
        assert variance(H, found.states[:, 0]).item() == pytest.approx(0, abs=1e-5)
        psi = random_state(n, mx.complex64)
        values, vectors = np.linalg.eigh(dense)
        later = vectors @ (np.exp(-1.5j * values) * (vectors.conj().T @ np.array(psi)))
        np.testing.assert_allclose(evolve(H, psi, 1.5), later, atol=2e-4)
        energy = np.vdot(psi, dense @ np.array(psi)).real / np.vdot(psi, psi).real
        assert expectation(H, psi).item() == pytest.approx(energy, rel=1e-5)


class TestTransforms:
    N = 3

    def energy(self, j, d, h, psi):
        bonds = chain(self.N)
        H = pauli_sum(
            {
                "ZZ": (j, bonds),
                "XY": [(d, 0, 1)],
                "YX": [(-d, 0, 1), (0.5, 1, 2)],
                "X": [(h, 0), (h * h, 1), (0.25, 2), (h, 0)],
            },
            self.N,
        )
        y = H @ psi
        return (mx.real(y) ** 2 + mx.imag(y) ** 2).sum()  # MLX (0.32.4) derives abs twice wrongly

    def oracle(self, j, d, h, psi):
        """The same by a dense matrix of MLX that is linear in every coefficient."""
        strings = [("ZZ", b) for b in chain(self.N)] + [("XY", (0, 1)), ("YX", (0, 1))]
        strings += [("YX", (1, 2)), ("X", (0,)), ("X", (1,)), ("X", (2,))]
        units = np.array([dense_strings([(1, *s)], self.N) for s in strings])
        c = mx.concatenate([j, mx.stack([d, -d, mx.array(0.5), 2 * h, h * h, mx.array(0.25)])])
        real, imaginary = (mx.array(f(units).astype(np.float32)) for f in (np.real, np.imag))
        a, b = ((c[:, None, None] * u).sum(axis=0) for u in (real, imaginary))
        x, y = mx.real(psi), mx.imag(psi)
        re = (a * x).sum(axis=1) - (b * y).sum(axis=1)
        im = (a * y).sum(axis=1) + (b * x).sum(axis=1)
        return (re**2 + im**2).sum()

    @pytest.fixture
    def primals(self):
        psi = random_state(self.N, mx.complex64)
        return mx.array([0.5, -1.5]), mx.array(0.75), mx.array(-0.3), psi

    def check(self, derive, *arguments):
        actual, expected = derive(self.energy)(*arguments), derive(self.oracle)(*arguments)
        if isinstance(actual, mx.array):
            actual, expected = [actual], [expected]
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-3)

    def test_values_and_first_derivatives(self, primals):
        self.check(lambda f: f, *primals)
        self.check(lambda f: mx.grad(f, argnums=(0, 1, 2, 3)), *primals)

    def test_second_derivatives(self, primals):
        def curvature(f):
            def slope(*a):
                return sum((g * (i + 1)).sum() for i, g in enumerate(mx.grad(f, (0, 1, 2))(*a)))

            return mx.grad(slope, argnums=(0, 1, 2))

        self.check(curvature, *primals)

    def test_jvp(self, primals):
        tangents = [mx.ones_like(p) for p in primals[:3]]

        def forward(f):
            return lambda j, d, h, psi: mx.jvp(
                lambda j, d, h: f(j, d, h, psi), [j, d, h], tangents
            )[1]

        self.check(forward, *primals)

    def test_vmap_over_coefficients_and_states(self, primals):
        j, d, h, psi = primals
        many = [mx.stack([p, 2 * p, -p]) for p in (j, d, h, psi)]
        mapped = mx.vmap(mx.grad(self.energy, argnums=(0, 1, 2)))(*many)
        for row in range(3):
            one = mx.grad(self.energy, argnums=(0, 1, 2))(*(m[row] for m in many))
            for m, o in zip(mapped, one, strict=True):
                np.testing.assert_allclose(m[row], o, rtol=1e-4, atol=1e-4)

    def test_compile(self, primals):
        slope = mx.grad(self.energy, argnums=(0, 1, 2))
        for a, e in zip(mx.compile(slope)(*primals), slope(*primals), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)

    def test_algebra_passes_gradients(self, primals):
        """By factors and sums as by coefficients."""
        _, d, h, psi = primals
        K = pauli_sum({"XY": [(1.0, 0, 1)]}, self.N)

        def by_factors(d, h):
            H = IsingOperator(self.N, [h, h, h])
            return expectation(d * K + H / h - K, psi)

        def by_terms(d, h):
            n = self.N
            terms = {"XY": [(d - 1, 0, 1)], "ZZ": (-1 / h, chain(n)), "X": (-1.0, range(n))}
            return expectation(pauli_sum(terms, n), psi)

        for a, e in zip(
            *(mx.grad(f, argnums=(0, 1))(d, h) for f in (by_factors, by_terms)), strict=True
        ):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)

    def test_gradients_of_an_evolution(self):
        """By the coefficient of an imaginary string and by J, against finite differences."""
        n, psi = 3, random_state(3, mx.complex64)
        Z = pauli_sum({"Z": [(1.0, 0)]}, n)

        def magnetization(d, j):
            H = IsingOperator(n, [j, 0.5, j]) + pauli_sum({"XY": (d, chain(n))}, n)
            return expectation(Z, evolve(H, psi, 0.8))

        def exact(d, j):
            terms = {"ZZ": (-1.0, chain(n)), "X": (-np.array([j, 0.5, j]), range(n))}
            values, vectors = np.linalg.eigh(dense_of(terms | {"XY": (d, chain(n))}, n))
            start = vectors.conj().T @ np.array(psi, complex)
            later = vectors @ (np.exp(-0.8j * values) * start)
            z = np.real(np.diag(dense_strings([(1.0, "Z", (0,))], n)))
            return (np.abs(later) ** 2 @ z) / np.vdot(later, later).real

        step = 1e-4
        expected = [
            (exact(*(0.3 + e, 0.7 + f)) - exact(*(0.3 - e, 0.7 - f))) / (2 * step)
            for e, f in ((step, 0), (0, step))
        ]
        actual = mx.grad(magnetization, argnums=(0, 1))(mx.array(0.3), mx.array(0.7))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    def test_gradients_add_up_in_float32(self):
        """Of a million amplitudes with a bias: one after another they would lose four digits."""
        n = 18
        z = mx.array(np.linspace(0.9, 1.1, 2**n).astype(np.float32))

        def energy(j, h):
            return expectation(pauli_sum({"ZZ": (j, [(n - 2, n - 1)]), "Z": [(h, n - 1)]}, n), z)

        actual = mx.grad(energy, argnums=(0, 1))(mx.array(1.0), mx.array(1.0))
        weights = np.asarray(z, float).reshape(4, -1) ** 2
        weights = weights.sum(axis=1) / weights.sum()  # of the two last bits
        expected = weights @ np.array([[1, -1], [-1, -1], [-1, 1], [1, 1]])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-7)


A = {"XX": (0.5, chain(3)), "XY": [(0.25, 0, 2)]}
B = {"ZZ": (1.5, chain(3)), "XY": [(0.5, 0, 2)], "Z": [(1.0, 1)]}


class TestAlgebra:
    @pytest.fixture
    def pair(self):
        return pauli_sum(A, 3), IsingOperator(3, 0.5, bonds=[(0, 2)]), dense_of(A, 3)

    def test_sums_and_multiples(self, pair):
        H, ising, dense = pair
        other = dense_ising(3, 0.5, 0.0) - dense_strings([(1, "ZZ", (0, 2))], 3)
        K, dense_K = pauli_sum(B, 3), dense_of(B, 3)
        for actual, expected in (
            (H + K, dense + dense_K),
            (H - K, dense - dense_K),
            (H + ising, dense + other),
            (ising + H, dense + other),
            (ising - H, other - dense),
            (ising + ising, 2 * other),
            (2 * H, 2 * dense),
            (H * np.float64(0.5), 0.5 * dense),
            (np.array(0.5) * H, 0.5 * dense),
            (mx.array(2.0) * H, 2 * dense),
            (H * mx.array(2.0), 2 * dense),
            (ising / 2, other / 2),
            (H / mx.array(4.0), dense / 4),
            (-ising, -other),
            (+H, dense),
            (sum([H, K, ising]), dense + dense_K + other),
            (0 - H, -dense),
            (H - 0, dense),
        ):
            assert isinstance(actual, PauliSum)
            np.testing.assert_array_equal(actual.todense(), expected)

    def test_a_difference_with_itself_is_zero(self, pair):
        H, _, _ = pair
        zero = H - H
        assert len(zero) == len(H)  # strings stay: coefficients may be tracers
        assert not mx.any(zero @ mx.ones(8)).item()

    def test_float64_stays(self):
        with mx.stream(mx.cpu):
            H = pauli_sum({"Z": [(0.1, 0)]}, 1, dtype=mx.float64)
            for K in (H + H, H * 3, H / 3, -H, H + pauli_sum({"X": [(0.0, 0)]}, 1), H - H / 7):
                assert K.dtype == K.coefficients.dtype == mx.float64
            assert (H / 3).coefficients.item() == 0.1 / 3
            assert pickle.loads(pickle.dumps(H)).coefficients.item() == 0.1

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda H: H == H, TypeError, "[H == K] operators are not compared; compare H.todense"),
            (lambda H: H != 0, TypeError, "[H != K] operators are not compared; compare H.todense"),
            (
                lambda H: H + 1,
                TypeError,
                "[H + K] K must be a PauliSum or an IsingOperator, got int",
            ),
            (
                lambda H: 1 - H,
                TypeError,
                "[K - H] K must be a PauliSum or an IsingOperator, got int",
            ),
            (
                lambda H: H - mx.eye(4),
                TypeError,
                "[H - K] K must be a PauliSum or an IsingOperator",
            ),
            (
                lambda H: mx.eye(4) + H,
                TypeError,
                "[H + K] K must be a PauliSum or an IsingOperator",
            ),
            (lambda H: H + csr_array(mx.eye(4)), TypeError, "[H + K] K must be a PauliSum"),
            (
                lambda H: H + pauli_sum({}, 3),
                ValueError,
                "[H + K] operators must have equally many sites, got 2 and 3",
            ),
            (lambda H: 1j * H, TypeError, "[c * H] c must be real numbers, got 1j"),
            (lambda H: H * True, TypeError, "[c * H] c must be real numbers, got True"),
            (lambda H: H * mx.array(1j), TypeError, "[c * H] c must be real numbers, got mlx.core"),
            (lambda H: H * H, TypeError, "[c * H] c must be a real number, got PauliSum; the"),
            (
                lambda H: H * mx.ones(4),
                TypeError,
                "[c * H] c must be a real number, got shape (4,)",
            ),
            (
                lambda H: np.ones(4) * H,
                TypeError,
                "[c * H] c must be a real number, got shape (4,)",
            ),
            (lambda H: H * float("nan"), ValueError, "[c * H] c must be finite, got nan"),
            (
                lambda H: H * 1e39,
                ValueError,
                "[c * H] energies of up to 1e+39 overflow mlx.core.fl",
            ),
            (lambda H: H / 1e-39, ValueError, "[H / c] energies of at most 1e-39 vanish in mlx.c"),
            (lambda H: H / 0, ValueError, "[H / c] c must not be 0"),
            (lambda H: H @ H, TypeError, "[H @ x] x is an operator; apply one after the other"),
            (lambda H: H.tocsr() @ H, TypeError, "[A @ x]"),
            (
                lambda H: H + pauli_sum({"Z": [(1.0, 0)]}, 2, dtype=mx.float64),
                ValueError,
                "[H + K] operators are mlx.core.complex64 and mlx.core.float64, and MLX has no",
            ),
        ],
    )
    def test_what_is_refused(self, call, error, message):
        with mx.stream(mx.cpu), pytest.raises(error, match=re.escape(message)):  # has float64
            call(pauli_sum({"Y": [(1.0, 0)]}, 2))


OPERATORS = [
    pauli_sum(A, 3),
    pauli_sum({}, 2),
    IsingOperator(3, 0.7, periodic=True, dtype=mx.float16),
    IsingOperator(4, [0.1, 0.2, 0.3, 0.4], coupling=[1.0, 2.0], bonds=[(0, 3), (2, 1)]),
]


class TestObject:
    @pytest.mark.parametrize("H", OPERATORS, ids=repr)
    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, lambda H: pickle.loads(pickle.dumps(H))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies(self, H, duplicate):
        other = duplicate(H)
        assert (type(other), repr(other), other.strings) == (type(H), repr(H), H.strings)
        assert mx.array_equal(other.todense(), H.todense()).item()
        for a, b in zip(other._arrays(), H._arrays(), strict=True):
            assert a.dtype == b.dtype
            assert mx.array_equal(a, b).item()

    def test_deepcopy_is_not_changed_with_the_original(self):
        H = IsingOperator(2, mx.array([1.0, 2.0]))
        other = copy.deepcopy(H)
        H.field[0] = 5.0
        assert other.field.tolist() == [1.0, 2.0]

    def test_repr(self):
        assert repr(pauli_sum(A, 3)) == (
            "PauliSum(8 x 8, mlx.core.complex64, 3 strings on 3 sites: 2 XX, 1 XY)"
        )
        assert repr(pauli_sum({"": [(1.0,)]}, 1)) == (
            "PauliSum(2 x 2, mlx.core.float32, 1 string on 1 site: 1 constant)"
        )
        assert repr(pauli_sum({}, 1)) == "PauliSum(2 x 2, mlx.core.float32, 0 strings on 1 site)"

    def test_says_its_strings_and_their_number(self):
        H = pauli_sum({"ZX": [(2.0, 2, 0)], "Y": [(3.0, 1)]}, 3)
        assert len(H) == 2
        assert H
        assert H.strings == [("XZ", (0, 2)), ("Y", (1,))]
        assert H.coefficients.tolist() == [2.0, 3.0]

    def test_is_a_key(self):
        H = pauli_sum(A, 3)
        assert {H: 1}[H] == 1


SHAPELESS = """
import mlx.core as mx
from mlx_sparse_nn.physics import pauli_sum

for letter in "XYZ":
    H = pauli_sum({letter: [(1.0, 0)]}, 1)
    y = mx.compile(lambda psi: H.tocsr() @ psi, shapeless=True)(mx.ones(2))
    assert mx.array_equal(y, H @ mx.ones(2)).item(), letter
    psi = mx.array([1.0, 2.0])
    y = mx.compile(lambda psi: H.diagonal() * psi, shapeless=True)(psi)
    assert mx.array_equal(y, H.diagonal() * psi).item(), letter
"""


@pytest.mark.not_emulated("needs mx.compile")
def test_one_string_in_a_trace_for_every_shape():
    """MLX would end the process at the sum of one row."""
    command = [sys.executable, "-c", SHAPELESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


class TestArithmeticThatDoesNotFit:
    @pytest.mark.parametrize(
        ("compute", "message"),
        [
            (lambda H: H * 1e-30 * 1e-30, r"\[c \* H\] energies of .* vanish in .*float32"),
            (lambda H: H * 1e30 * 1e30, r"\[c \* H\] energies of .* overflow .*float32"),
            (lambda H: H * mx.array(1e30) * mx.array(1e30), r"\[c \* H\] energies .* overflow"),
            (lambda H: H / 1e30 / 1e30, r"\[H / c\] energies of .* vanish"),
            (lambda H: H / 1e-30 / 1e-30, r"\[H / c\] energies of .* overflow"),
            (lambda H: H * 1e38 + H * 1e38 + H * 1e38 + H * 1e38, r"\[H \+ K\] .* overflow"),
            (lambda H: H * 1e38 - H * -1e38 - H * -1e38 - H * -1e38, r"\[H - K\] .* overflow"),
            (lambda H: H / mx.array(0.0), r"\[H / c\] c must not be 0"),
            (lambda H: H * mx.array(float("nan")), r"\[c \* H\] c must be finite"),
        ],
    )
    def test_raises(self, compute, message):
        with pytest.raises(ValueError, match=message):
            compute(pauli_sum({"X": [(1.0, 0)]}, 1))

    @pytest.mark.parametrize(("factor", "word"), [(1e200, "overflow"), (1e-200, "vanish")])
    def test_raises_in_float64(self, factor, word):
        with mx.stream(mx.cpu):
            H = pauli_sum({"X": [(1.0, 0)]}, 1, dtype=mx.float64)
            with pytest.raises(ValueError, match=word):
                _ = H * factor * factor

    def test_takes_what_fits(self):
        H = pauli_sum({"X": [(2e38, 0)]}, 1)
        assert (H - H).coefficients.tolist() == [0]
        assert (H * 0).coefficients.tolist() == [0]
        assert (H * 0 * 5).coefficients.tolist() == [0]
        assert (H * 1e-36 * 1e36).coefficients.item() == pytest.approx(2e38)

    @pytest.mark.not_emulated("needs mx.compile")
    def test_does_not_look_at_what_is_traced(self):
        H = pauli_sum({"X": [(1.0, 0)]}, 1)
        energy = lambda c: ((H * c + H / c) @ mx.ones(2)).sum()
        c = mx.array(4.0)
        assert mx.grad(energy)(c).item() == pytest.approx(2 - 2 / 16)
        assert mx.compile(energy)(c).item() == pytest.approx(8.5)
        assert mx.vmap(energy)(c[None]).tolist() == pytest.approx([8.5])
        assert mx.isinf(mx.compile(energy)(mx.array(0.0))).item()
