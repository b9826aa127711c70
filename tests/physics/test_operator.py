"""IsingOperator against the CSR matrix: values, derivatives, transforms, time and memory."""

import subprocess
import sys
import time
from itertools import combinations, product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spins import dense_ising, dense_strings
from support import to_numpy, untyped

from mlx_sparse_nn.physics import (
    IsingOperator,
    chain,
    expectation,
    lanczos,
    magnetization,
    ring,
    square,
    transverse_field_ising,
    triangular,
)

ARGUMENTS = [
    (1, {"longitudinal": 0.5}),
    (1, {"coupling": []}),
    (2, {"coupling": 1.5}),
    (3, {"periodic": True}),
    (5, {"longitudinal": -0.25}),
    (6, {"periodic": True, "coupling": -1.0}),
]


def parameters(n_qubits, periodic=False, seed=0):
    """Return J, h and g, one per bond or site."""
    rng = np.random.default_rng(seed)
    sizes = (n_qubits if periodic else n_qubits - 1, n_qubits, n_qubits)
    return [mx.array(rng.normal(size=size).astype(np.float32)) for size in sizes]


def states(*shape, seed=1):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def dense(n_qubits, field, **arguments):
    return to_numpy(transverse_field_ising(n_qubits, field, **arguments).todense())


class TestProduct:
    @pytest.mark.parametrize(("n_qubits", "arguments"), ARGUMENTS)
    def test_equals_the_matrix(self, n_qubits, arguments):
        H = IsingOperator(n_qubits, 0.7, **arguments)
        expected = dense(n_qubits, 0.7, **arguments)
        assert H.shape == expected.shape
        np.testing.assert_allclose(H @ mx.eye(2**n_qubits), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(H.diagonal(), expected.diagonal(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("periodic", [False, True])
    @pytest.mark.parametrize("kind", [list, tuple, np.array, mx.array])
    def test_one_value_per_bond_and_site(self, kind, periodic):
        j, h, g = (kind(a.tolist()) for a in parameters(5, periodic))
        arguments = {"coupling": j, "longitudinal": g, "periodic": periodic}
        actual = IsingOperator(5, h, **arguments) @ mx.eye(32)
        np.testing.assert_allclose(actual, dense(5, h, **arguments), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", [(64,), (64, 1), (64, 3), (2, 64, 3), (2, 0, 64, 3)])
    def test_shapes(self, shape):
        x = states(*shape)
        H, C = IsingOperator(6, 0.7), transverse_field_ising(6, 0.7)
        assert (H @ x).shape == shape
        np.testing.assert_allclose(H @ x, C @ x, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("dtype", "rtol"),
        [
            (mx.float16, 2e-3),
            (mx.bfloat16, 2e-2),
            (mx.float32, 1e-6),
            (mx.float64, 1e-14),
            (mx.complex64, 1e-6),
        ],
    )
    def test_dtypes(self, dtype, rtol):
        with mx.stream(mx.cpu):
            H = IsingOperator(8, 0.7, longitudinal=1 / 3, periodic=True, dtype=dtype)
            x = states(256).astype(dtype)
            y = H @ x
            expected = dense(8, 0.7, longitudinal=1 / 3, periodic=True, dtype=mx.float64)
            assert (H.dtype, y.dtype, H.diagonal().dtype) == (dtype, dtype, dtype)
            expected = expected @ to_numpy(x)
            np.testing.assert_allclose(to_numpy(y), expected, rtol=rtol, atol=8 * rtol)

    def test_promotes_like_the_matrix(self):
        z = states(16) + 1j * states(16, seed=2)
        assert (IsingOperator(4, 0.7) @ z).dtype == mx.complex64
        assert (IsingOperator(4, 0.7, dtype=mx.float16) @ states(16)).dtype == mx.float32
        assert (IsingOperator(4, 0.7) @ np.ones(16, np.float32)).dtype == mx.float32
        np.testing.assert_allclose(
            IsingOperator(4, 0.7) @ z, dense(4, 0.7) @ np.array(z), rtol=1e-5, atol=1e-5
        )

    def test_expectation_takes_it(self):
        assert expectation(IsingOperator(8, 0.7), mx.ones(256)).item() == pytest.approx(-5.6)

    def test_repr(self):
        assert repr(IsingOperator(4, 0.7)) == (
            "IsingOperator(16 x 16, mlx.core.float32, open chain of 4 sites)"
        )
        assert "ring of 4 sites" in repr(IsingOperator(4, 0.7, periodic=True))
        assert IsingOperator(4, 0.7).ndim == 2


class TestTransforms:
    """The operator is plain MLX; the oracle is a dense matrix that is linear in J, h and g."""

    @pytest.fixture(params=[False, True], ids=["open", "ring"])
    def case(self, request):
        n, periodic = 4, request.param
        j, h, g = parameters(n, periodic)
        bases = []  # the derivative of the dense matrix by every parameter
        for name, count in (("coupling", j.size), ("field", n), ("longitudinal", n)):
            for unit in np.eye(count):
                zeros = {"coupling": 0.0, "field": 0.0, "longitudinal": 0.0}
                bases.append(dense(n, periodic=periodic, **(zeros | {name: unit})))
        bases = mx.array(np.array(bases).astype(np.float32))

        def matrix(j, h, g):
            return (mx.concatenate([j, h, g])[:, None, None] * bases).sum(axis=0)

        def apply(j, h, g, x):
            return IsingOperator(n, h, coupling=j, longitudinal=g, periodic=periodic) @ x

        def oracle(j, h, g, x):
            return (matrix(j, h, g) * x).sum(axis=1)

        return apply, oracle, [j, h, g, states(16)]

    def test_gradients(self, case):
        apply, oracle, primals = case
        weights = states(16, seed=5)
        actual, expected = (
            mx.grad(lambda *a, f=f: (weights * f(*a) ** 2).sum(), argnums=(0, 1, 2, 3))(*primals)
            for f in (apply, oracle)
        )
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)

    def test_gradient_of_numbers(self):
        def energy(j, h, g):
            return expectation(IsingOperator(4, h, coupling=j, longitudinal=g), x)

        x = states(16)
        actual = mx.grad(energy, argnums=(0, 1, 2))(mx.array(1.0), mx.array(0.7), mx.array(0.3))
        psi = np.array(x) / np.linalg.norm(x)
        for value, name in zip(actual, ("coupling", "field", "longitudinal"), strict=True):
            zeros = {"coupling": 0.0, "field": 0.0, "longitudinal": 0.0}
            expected = psi @ dense(4, **(zeros | {name: 1.0})) @ psi
            assert value.shape == ()
            assert value.item() == pytest.approx(expected, rel=1e-4)

    def test_jvp(self, case):
        apply, oracle, primals = case
        tangents = [mx.array(np.random.default_rng(7).normal(size=p.shape)) for p in primals]
        tangents = [t.astype(mx.float32) for t in tangents]
        (actual,), (expected,) = (mx.jvp(f, primals, tangents)[1] for f in (apply, oracle))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    def test_second_order(self, case):
        apply, oracle, primals = case
        tangents = [mx.cos(p) for p in primals]

        def slope(f):
            return mx.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2, 3))

        def curvature(f):
            return mx.grad(
                lambda *a: sum((g * t).sum() for g, t in zip(slope(f)(*a), tangents, strict=True)),
                argnums=(0, 1, 2, 3),
            )(*primals)

        forward = [mx.jvp(slope(f), primals, tangents)[1] for f in (apply, oracle)]
        for pair in (forward, [curvature(apply), curvature(oracle)]):
            for a, e in zip(*pair, strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("axis", range(4))
    def test_vmap(self, case, axis):
        apply, _, primals = case
        many = mx.stack([primals[axis] * scale for scale in (1.0, -0.5, 2.0)])
        axes = tuple(0 if i == axis else None for i in range(4))
        expected = mx.stack(
            [apply(*(row if i == axis else p for i, p in enumerate(primals))) for row in many]
        )
        mapped = [many if i == axis else p for i, p in enumerate(primals)]
        np.testing.assert_allclose(
            mx.vmap(apply, in_axes=axes)(*mapped), expected, rtol=1e-5, atol=1e-5
        )

    def test_vmap_of_gradients(self, case):
        apply, _, (j, h, g, x) = case
        slope = mx.grad(lambda h, x: (apply(j, h, g, x) ** 2).sum(), argnums=(0, 1))
        fields, many = mx.stack([h, 2 * h]), mx.stack([x, -x + 1])
        mapped = mx.vmap(slope)(fields, many)
        for row in range(2):
            for m, e in zip(mapped, slope(fields[row], many[row]), strict=True):
                np.testing.assert_allclose(m[row], e, rtol=1e-4, atol=1e-4)

    def test_compile(self, case):
        apply, _, primals = case
        slope = mx.grad(lambda *a: apply(*a).square().sum(), argnums=(0, 1, 2, 3))
        np.testing.assert_allclose(mx.compile(apply)(*primals), apply(*primals), rtol=1e-5)
        for a, e in zip(mx.compile(slope)(*primals), slope(*primals), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)

    def test_gradient_to_a_complex_state(self):
        z = states(16) + 1j * states(16, seed=2)
        H, C = IsingOperator(4, 0.7), transverse_field_ising(4, 0.7)
        actual, expected = (mx.grad(lambda z, A=A: expectation(A, z))(z) for A in (H, C))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_recovers_site_dependent_fields_from_measured_energies():
    """Energies of known states are linear in h: gradient descent by h finds every h_i."""
    n, true = 4, [0.4, 0.9, 1.3, 0.7]
    probes = states(12, 2**n)
    measured = mx.stack([expectation(IsingOperator(n, true), psi) for psi in probes])

    def loss(h):
        energies = mx.vmap(lambda psi: expectation(IsingOperator(n, h), psi))(probes)
        return ((energies - measured) ** 2).mean()

    h, step = mx.ones(n), mx.compile(mx.grad(loss))
    for _ in range(400):
        h = h - 2.0 * step(h)
    np.testing.assert_allclose(h, true, atol=1e-3)


class TestCost:
    @pytest.fixture
    def on_cpu(self):
        device = mx.default_device()
        mx.set_default_device(mx.cpu)
        yield
        mx.set_default_device(device)

    @pytest.mark.usefixtures("on_cpu")
    def test_is_faster_than_the_matrix_at_20_sites(self):
        x = states(2**20)
        H, C = (make(20, 0.7) for make in (IsingOperator, transverse_field_ising))
        np.testing.assert_allclose(H @ x, C @ x, rtol=1e-4, atol=1e-4)
        # In turns, and the fastest of several: other work on the machine slows both.
        times = [(seconds(H, x), seconds(C, x)) for _ in range(10)]
        by_operator, by_matrix = zip(*times, strict=True)
        assert min(by_operator) < min(by_matrix)

    def test_24_sites_take_less_than_4_gb(self):
        script = """
import re, resource, sys, mlx.core as mx
from mlx_sparse_nn.physics import IsingOperator, expectation
mx.set_default_device(mx.cpu)
energy = expectation(IsingOperator(24, 0.7), mx.ones(2**24) / 4096)
value, n_bytes = energy.item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.platform == "linux":  # where that begins with what the process that started this one had
    n_bytes = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(value, n_bytes)
"""
        command = [sys.executable, "-W", "error", "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        energy, n_bytes = map(float, result.stdout.split())
        assert energy == pytest.approx(-0.7 * 24, rel=1e-5)
        assert n_bytes < 4e9


def seconds(H, x):
    began = time.perf_counter()
    mx.eval(H @ x)
    return time.perf_counter() - began


@st.composite
def graphs(draw):
    """Draw bonds on up to 8 sites, in any order, and a coupling for each."""
    n = draw(st.integers(1, 8))
    pairs = list(combinations(range(n), 2))
    bonds = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=12)) if pairs else []
    bonds = [bond[::-1] if draw(st.booleans()) else bond for bond in bonds]
    return n, bonds, [draw(st.integers(-4, 4)) / 4 for _ in bonds]


class TestGraphs:
    @settings(max_examples=30)
    @given(graphs())
    def test_any_graph(self, case):
        n, bonds, j = case
        H = IsingOperator(n, 0.75, coupling=j, longitudinal=0.25, bonds=bonds)
        strings = [(-c, "ZZ", bond) for c, bond in zip(j, bonds, strict=True)]
        expected = dense_strings(strings, n) + dense_ising(n, 0.75, 0.0, 0.25)
        np.testing.assert_array_equal(H @ mx.eye(2**n), expected)  # quarters add up exactly

    @pytest.mark.parametrize("periodic", [False, True])
    def test_a_chain_is_one_of_them(self, periodic):
        bonds = (ring if periodic else chain)(5)
        for pairs in (bonds, np.array(bonds), tuple(bonds)):
            H = IsingOperator(5, 0.7, coupling=np.arange(len(bonds)), bonds=pairs)
            K = IsingOperator(5, 0.7, coupling=np.arange(len(bonds)), periodic=periodic)
            assert H.bonds == K.bonds == bonds
            assert mx.array_equal(H @ states(32), K @ states(32)).item()

    def test_repr(self):
        H = IsingOperator(4, 0.7, bonds=[(0, 3), (1, 2)])
        assert repr(H) == "IsingOperator(16 x 16, mlx.core.float32, 2 bonds of 4 sites)"

    def test_degeneracy_of_frustrated_triangles(self):
        """Of three spins that would all be opposite, one pair is not: 6 of 8 states share -J."""
        H = IsingOperator(3, 0.0, coupling=-1.0, bonds=ring(3))
        np.testing.assert_array_equal(np.sort(H.diagonal()), [-1] * 6 + [3] * 2)
        bonds = triangular(2, 2)
        H = IsingOperator(4, 0.0, coupling=-1.0, bonds=bonds)
        energies = [sum(z[i] * z[j] for i, j in bonds) for z in product([-1, 1], repeat=4)]
        np.testing.assert_array_equal(np.sort(H.diagonal()), np.sort(energies))
        found = lanczos(IsingOperator(3, 0.1, coupling=-1.0, bonds=ring(3)), k=6).energies
        dense = dense_ising(3, 0.1, -1.0, periodic=True)
        np.testing.assert_allclose(found, np.linalg.eigvalsh(dense)[:6], rtol=1e-5)

    def test_square_lattice_has_its_symmetry(self):
        """A torus of 3 x 3 is the same from every site: all of <X_i> are equal."""
        H = IsingOperator(9, 2.0, bonds=square(3, 3, periodic=True))
        x = magnetization(lanczos(H).states[:, 0], "x")
        np.testing.assert_allclose(x, x[0].item(), rtol=1e-4)

    def test_gradients_by_every_coupling(self):
        bonds, j = [(0, 2), (1, 2), (3, 0)], mx.array([0.5, -1.0, 2.0])
        x = states(16)

        def energy(j):
            return expectation(IsingOperator(4, 0.7, coupling=j, bonds=bonds), x)

        psi = np.array(x, float) / np.linalg.norm(x)
        expected = [-psi @ np.real(dense_strings([(1, "ZZ", bond)], 4)) @ psi for bond in bonds]
        np.testing.assert_allclose(mx.grad(energy)(j), expected, rtol=1e-4, atol=1e-6)


class TestScalarsOfMLX:
    """A list of them is one parameter: NumPy would read them, and their gradients be 0."""

    @pytest.mark.parametrize("name", ["field", "coupling", "longitudinal"])
    def test_gradients(self, name):
        n, x = 4, states(16)
        size = 3 if name == "coupling" else 4

        def energy(a, b, by_list):
            values = [a, b, *[0.5] * (size - 2)]
            if not by_list:
                values = mx.concatenate([mx.stack([a, b]), mx.full(size - 2, 0.5)])
            arguments = {"field": 0.7, "coupling": 1.0, "longitudinal": 0.0} | {name: values}
            return expectation(IsingOperator(n, arguments.pop("field"), **untyped(arguments)), x)

        a, b = mx.array(0.3), mx.array(1.1)
        slopes = [mx.grad(energy, argnums=(0, 1))(a, b, by_list) for by_list in (True, False)]
        np.testing.assert_allclose(*slopes, rtol=1e-6)
        assert all(abs(slope.item()) > 1e-3 for slope in slopes[0])
        tangent = mx.jvp(lambda a: energy(a, b, True), [a], [mx.array(1.0)])[1][0]
        np.testing.assert_allclose(tangent, slopes[0][0], rtol=1e-5)
        compiled = mx.compile(lambda a: energy(a, b, True))(a)
        np.testing.assert_allclose(compiled, energy(a, b, True), rtol=1e-6)

    def test_the_same_scalar_for_every_site(self):
        """The energy of the uniform state is -h a site."""
        slope = mx.grad(lambda h: expectation(IsingOperator(4, [h, h, h, h]), mx.ones(16)))
        assert slope(mx.array(0.7)).item() == pytest.approx(-4)

    def test_float64_keeps_its_digits(self):
        with mx.stream(mx.cpu):
            third = mx.array(1 / 3, dtype=mx.float64)
            H = IsingOperator(2, [third, 1 / 3], dtype=mx.float64)
            assert H.field.tolist() == [1 / 3, 1 / 3]
