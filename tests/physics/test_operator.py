"""IsingOperator against the CSR matrix: values, derivatives, transforms, time and memory."""

import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from support import to_numpy

from mlx_sparse_nn.physics import IsingOperator, expectation, transverse_field_ising

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
