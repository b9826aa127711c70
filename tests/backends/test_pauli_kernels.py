"""Sums of Pauli strings by every backend, against the definition in NumPy, in complex128."""

from contextlib import contextmanager
from itertools import product as all_pairs

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import emulated
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, computing_strings, device_of, integers, to_numpy, untyped

from mlx_sparse_nn.core import pauli, tuned
from mlx_sparse_nn.core.backends import (
    choose,
    pauli_cpu,
    pauli_cuda,
    pauli_launch,
    pauli_metal,
    pauli_plain,
)
from mlx_sparse_nn.core.pauli import PauliTerms, pauli_product

LOW_BITS = 4  # of a tile, so that small states have several


@contextmanager
def on_metal():
    mx.disable_compile()
    with (
        metal_emulator.Emulator(schedules=("forward", "random")) as metal,
        computing_strings(pauli_metal, pauli_plain),
    ):
        yield metal
    mx.enable_compile()


CONTEXTS = {
    "plain": lambda: computing_strings(pauli_plain),
    "cpu": lambda: computing_strings(pauli_cpu, pauli_plain),
    "cuda": lambda: emulated(offset=1),
    "metal": on_metal,
}


@pytest.fixture(params=CONTEXTS)
def backend(request, monkeypatch):
    """The name of what computes, under which it does."""
    for name in ("CUDA_PAULI_BITS", "METAL_PAULI_BITS"):
        monkeypatch.setattr(tuned, name, LOW_BITS)
    if request.param == "cpu" and pauli_cpu.cpu.why_not():
        pytest.skip("kernels of the CPU are for Linux")
    with CONTEXTS[request.param]():
        yield request.param


@st.composite
def strings(draw, most_qubits=13):
    n = draw(st.integers(1, most_qubits))
    size = draw(st.integers(0, 8))
    masks = st.one_of(st.integers(1, 2**n - 1), st.integers(0, n - 1).map(lambda bit: 1 << bit))
    flips = draw(st.lists(masks, min_size=size, max_size=size))
    signs = st.integers(0, 2**n - 1) if draw(st.booleans()) else st.just(0)
    return PauliTerms(n, tuple(flips), tuple(draw(signs) for _ in range(size)))


def some_strings(n, seed=0, size=7, signed=True):
    rng = np.random.default_rng(seed)
    flips = [1 << int(bit) for bit in rng.integers(0, n, 3)]
    flips += [int(mask) for mask in rng.integers(1, 2**n, size - 3)]
    signs = rng.integers(0, 2**n, size) if signed else np.zeros(size, int)
    return PauliTerms(n, tuple(flips), tuple(map(int, signs)))


def moved(terms, x):
    """Return each string applied to ``(..., 2**n)``, the slow way."""
    for flip, mask in zip(terms.flips, terms.signs, strict=True):
        places = [i ^ flip for i in range(1 << terms.n_qubits)]
        yield x[..., places] * np.array([(-1) ** (~j & mask).bit_count() for j in places])


def multiplied(terms, c, d, x):
    """Return the product of ``c (n_terms,)``, ``d (2**n,)`` or None and ``x (..., 2**n)``."""
    c, x = (to_numpy(a).astype(complex) for a in (c, x))
    y = np.zeros(x.shape, complex) if d is None else to_numpy(d) * x
    return sum((c[t] * term for t, term in enumerate(moved(terms, x))), y)


def check(terms, c, d, x):
    """Whole numbers: sums are exact, whatever their order."""
    y = pauli_product(terms, c, d, x)
    expected = multiplied(terms, c, d, x)
    assert y.shape == x.shape
    if mx.complex64 not in (x.dtype, c.dtype):
        expected = np.real(expected)
    np.testing.assert_array_equal(to_numpy(y), expected)


DTYPES = [(mx.float32, mx.float32), (mx.float32, mx.complex64), (mx.complex64, mx.complex64)]


class TestValues:
    @given(strings(), st.sampled_from([*DTYPES, (mx.float64, mx.float64)]), st.booleans())
    def test_drawn_strings(self, terms, dtypes, has_diagonal):
        """By what computes here; plain MLX and the kernels of the CPU see the same cases."""
        c_dtype, dtype = dtypes
        size = 1 << terms.n_qubits
        with device_of(dtype):
            c = integers((len(terms),), 1).astype(c_dtype)
            d = integers((size,), 2).astype(mx.float64 if dtype == mx.float64 else mx.float32)
            x = integers((3, size), 3, mx.complex64 if dtype == mx.complex64 else mx.float32)
            for name in ("plain", "cpu"):
                with CONTEXTS[name]():
                    check(terms, c, d if has_diagonal else None, x.astype(dtype))

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize(("c_dtype", "dtype"), DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    def test_every_kernel(self, backend, n, c_dtype, dtype, signed):
        """States of less than a tile, of one, and of several; with a diagonal and without."""
        terms, size = some_strings(n, n, signed=signed), 1 << n
        c, d, x = integers((7,), 1, c_dtype), integers((size,), 2), integers((2, size), 3, dtype)
        check(terms, c, d, x)
        check(terms, c, None, x[0])

    def test_states_lie_anywhere(self, backend):
        """Slices at odd places, every other row, and columns: none is what a kernel reads."""
        terms, c, d = some_strings(6), integers((7,), 1), integers((64,), 2)
        wide = integers((5, 67), 3)
        for x in (wide[:, 1:65], wide[::2, 3:], wide[:, 1:65][1], integers((64, 5), 3).T):
            check(terms, c, d, x)
        whole = integers((130,), 4)
        check(terms, c, whole[1:65], whole[3:67])
        check(terms, whole[5:12], whole[::2][:64], whole[:64][::-1])

    def test_axes_before_the_last_are_states(self, backend):
        terms, c, d = some_strings(4), integers((7,), 1), integers((16,), 2)
        for shape in ((16,), (1, 16), (2, 3, 16), (2, 1, 3, 16)):
            check(terms, c, d, integers(shape, 3))
        empty = pauli_product(terms, c, d, mx.zeros((0, 16)))
        assert empty.shape == (0, 16)

    def test_a_sum_without_strings_is_the_diagonal(self, backend):
        terms, d, x = PauliTerms(4, (), ()), integers((16,), 2), integers((3, 16), 3)
        check(terms, mx.zeros(0), d, x)
        check(terms, mx.zeros(0), None, x)

    def test_a_complex_diagonal(self, backend):
        terms, c, x = some_strings(5), integers((7,), 1), integers((3, 32), 3)
        d = integers((32,), 2, mx.complex64)
        y = pauli_product(terms, c, d, x)
        np.testing.assert_array_equal(to_numpy(y), multiplied(terms, c, d, x))

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
    def test_16_bits_are_computed_in_float32(self, backend, dtype):
        terms, c = some_strings(5), integers((7,), 1, dtype)
        x = integers((32,), 3, dtype)
        y = pauli_product(terms, c, None, x)
        assert y.dtype == mx.float32
        np.testing.assert_array_equal(to_numpy(y), np.real(multiplied(terms, c, None, x)))

    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
    def test_repeats_are_equal_bit_for_bit(self, backend, dtype):
        """Products and moments; on the CPU by as many threads as there are."""
        n = 17 if backend == "cpu" else 9
        terms = some_strings(n)
        c, x = mx.random.normal((7,)), mx.random.normal((1 << n,)).astype(dtype)
        first = pauli_product(terms, c, mx.real(x), x)
        moments = pauli.moments(terms, x[None, None], first[None, None], False)
        for _ in range(3):
            again = pauli_product(terms, c, mx.real(x), x)
            assert mx.array_equal(first, again)
            assert mx.array_equal(
                moments, pauli.moments(terms, x[None, None], again[None, None], False)
            )


class TestMoments:
    @given(strings(), st.sampled_from([mx.float32, mx.complex64, mx.float64]), st.booleans())
    def test_drawn_strings(self, terms, dtype, real):
        size = 1 << terms.n_qubits
        with device_of(dtype):
            kind = mx.complex64 if dtype == mx.complex64 else mx.float32
            u, x = (integers((2, 2, size), seed, kind).astype(dtype) for seed in (1, 2))
            for name in ("plain", "cpu"):
                with CONTEXTS[name]():
                    self.check(terms, u, x, real)

    def test_every_backend(self, backend):
        for dtype, real in all_pairs((mx.float32, mx.complex64), (False, True)):
            u, x = (integers((2, 3, 64), seed, dtype) for seed in (1, 2))
            self.check(some_strings(6), u, x, real)

    def check(self, terms, u, x, real):
        found = pauli.moments(terms, u, x, real)
        u, x = (to_numpy(a).astype(complex) for a in (u, x))
        expected = [(u * term).sum(axis=(1, 2)) for term in moved(terms, x)]
        expected = np.stack(expected, axis=-1) if expected else np.zeros((2, 0))
        is_complex = found.dtype == mx.complex64
        np.testing.assert_array_equal(
            to_numpy(found), expected if is_complex else np.real(expected)
        )

    def test_a_long_sum_keeps_its_digits(self):
        """2^16 equal terms: float32 added one by one would lose the last four digits."""
        terms = PauliTerms(16, (1, 1 << 15), (0, 0))
        x = mx.full((1, 1, 1 << 16), 0.1)
        expected = np.full(2, (1 << 16) * float(np.float32(0.1)) ** 2)
        found = pauli.moments(terms, x, x, False)
        np.testing.assert_allclose(to_numpy(found)[0], expected, rtol=1e-6)


# Axes of coefficients, diagonal and states that vmap maps.
MAPPED = [(None, None, 0), (None, None, 1), (0, None, None), (None, 0, 1), (1, 1, 0)]


def dense(terms, dtype):
    """Return the matrix of each string, ``(n_terms, 2**n, 2**n)``."""
    units = np.stack([*moved(terms, np.eye(1 << terms.n_qubits))])
    return mx.array(units.swapaxes(1, 2).astype(np.float32)).astype(dtype)


class TestTransforms:
    """Whatever MLX derives of a product, to any order, it derives of a dense one too."""

    TERMS = PauliTerms(5, (1, 16, 6, 25, 6), (0, 0, 3, 9, 6))

    def operands(self, c_dtype, dtype):
        c, d = integers((5,), 1, c_dtype) * 0.25, integers((32,), 2) * 0.125
        return c, d, integers((3, 32), 3, dtype) * 0.5

    def functions(self, c_dtype, dtype):
        units = dense(self.TERMS, mx.float32)

        def by_strings(c, d, x):
            return pauli_product(self.TERMS, c, d, x)

        def by_matrix(c, d, x):
            # Elementwise: complex matrix products have no second derivative everywhere.
            matrix = (c[:, None, None] * units).sum(axis=0)
            return (matrix * x[..., None, :]).sum(axis=-1) + d * x

        return by_strings, by_matrix

    def same(self, found, expected):
        for a, e in zip(found, expected, strict=True):
            assert a.dtype == e.dtype
            e = to_numpy(e)
            assert_close(a, e, 2000, np.abs(e).max() + 1)

    @pytest.mark.parametrize(("c_dtype", "dtype"), DTYPES, ids=str)
    @pytest.mark.parametrize("order", [1, 2])
    def test_gradients(self, backend, c_dtype, dtype, order):
        operands = self.operands(c_dtype, dtype)

        def slopes(f):
            return mx.grad(lambda *a: (mx.abs(f(*a)) ** 2).sum(), argnums=(0, 1, 2))

        def of_order(f):
            if order == 1:
                return slopes(f)
            squares = lambda *a: sum((mx.abs(g) ** 2).sum() for g in slopes(f)(*a))
            return mx.grad(squares, argnums=(0, 1, 2))

        by_strings, by_matrix = self.functions(c_dtype, dtype)
        self.same(of_order(by_strings)(*operands), of_order(by_matrix)(*operands))

    @pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
    def test_jvp(self, backend, dtype, moving):
        operands = self.operands(mx.float32, dtype)
        tangents = [operands[i] + 1 for i in moving]

        def derivative(f):
            def moved(*some):
                every = list(operands)
                for i, a in zip(moving, some, strict=True):
                    every[i] = a
                return f(*every)

            (y,), (dy,) = mx.jvp(moved, [operands[i] for i in moving], tangents)
            return y, dy

        by_strings, by_matrix = self.functions(mx.float32, dtype)
        self.same(derivative(by_strings), derivative(by_matrix))

    @pytest.mark.parametrize("axes", MAPPED, ids=str)
    @pytest.mark.parametrize("has_diagonal", [True, False])
    def test_vmap(self, backend, axes, has_diagonal):
        """Of products, of gradients, and of a mapped function: equal to a loop."""
        shapes = [(5,), (32,), (3, 32)]
        operands = []
        for seed, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
            stacked = integers((4, *shape), seed)
            operands.append(stacked[0] if axis is None else mx.moveaxis(stacked, 0, axis))
        if not has_diagonal:
            if axes[0] is None and axes[2] is None:
                return
            operands[1], axes = mx.zeros(32), (axes[0], None, axes[2])

        def product(c, d, x):
            return pauli_product(self.TERMS, c, d if has_diagonal else None, x)

        def gradient(c, d, x):
            return mx.grad(lambda c, x: (product(c, d, x) ** 2).sum(), argnums=(0, 1))(c, x)

        def one(i):
            return [
                a if axis is None else mx.moveaxis(a, axis, 0)[i]
                for a, axis in zip(operands, axes, strict=True)
            ]

        mapped = mx.vmap(product, in_axes=axes)(*operands)
        np.testing.assert_array_equal(mapped, mx.stack([product(*one(i)) for i in range(4)]))
        found = mx.vmap(gradient, in_axes=axes)(*operands)
        loop = [gradient(*one(i)) for i in range(4)]
        expected = [mx.stack([row[k] for row in loop]) for k in range(2)]
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, e)

    @pytest.mark.parametrize("axes", MAPPED, ids=str)
    def test_vmap_of_what_is_traced_already(self, axes):
        """As inside of mx.checkpoint: there MLX maps the graph by the primitive's own rule."""
        shapes = [(5,), (32,), (3, 32)]
        operands = []
        for seed, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
            stacked = integers((4, *shape), seed)
            operands.append(stacked[0] if axis is None else mx.moveaxis(stacked, 0, axis))

        def product(c, d, x):
            return pauli_product(self.TERMS, c, d, x)

        mapped = mx.vmap(mx.checkpoint(product), in_axes=axes)(*operands)
        np.testing.assert_array_equal(mapped, mx.vmap(product, in_axes=axes)(*operands))

    def test_vmap_twice(self, backend):
        c, d, x = integers((2, 5), 1), integers((32,), 2), integers((3, 2, 32), 3)

        def product(c, x):
            return pauli_product(self.TERMS, c, d, x)

        inner = mx.vmap(product, in_axes=(None, 0))
        found = mx.vmap(mx.vmap(inner, in_axes=(0, None)), in_axes=(None, 0))(c, x)
        expected = mx.stack([mx.stack([product(row, states) for row in c]) for states in x])
        np.testing.assert_array_equal(found, expected)

    def test_compile(self):
        c, d, x = self.operands(mx.float32, mx.complex64)

        def loss(c, d, x):
            return (mx.abs(pauli_product(self.TERMS, c, d, x)) ** 2).sum()

        value, grads = mx.compile(mx.value_and_grad(loss, argnums=(0, 1, 2)))(c, d, x)
        expected, slopes = mx.value_and_grad(loss, argnums=(0, 1, 2))(c, d, x)
        self.same([value, *grads], [expected, *slopes])

    def test_export(self, tmp_path):
        """A file holds plain MLX, which MLX derives by itself."""
        c, d, x = self.operands(mx.float32, mx.float32)
        path = str(tmp_path / "product.mlxfn")
        mx.export_function(path, lambda c, d, x: pauli_product(self.TERMS, c, d, x), c, d, x)
        (found,) = untyped(mx.import_function(path))(c, d, x)
        self.same([found], [pauli_product(self.TERMS, c, d, x)])

    def test_a_trace_for_every_shape_is_refused(self, tmp_path):
        c, d, x = self.operands(mx.float32, mx.float32)
        product = lambda x: pauli_product(self.TERMS, c, d, x)
        with pytest.raises(ValueError, match=r"\[H @ x\] .* shapeless=True; leave that out"):
            mx.compile(product, shapeless=True)(x)
        with pytest.raises(ValueError, match=r"\[H @ x\] .* shapeless=True; leave that out"):
            mx.export_function(str(tmp_path / "a.mlxfn"), product, x, shapeless=True)


class TestChoice:
    @pytest.mark.parametrize("dtype", [mx.float32, mx.complex64, mx.float64], ids=str)
    def test_the_cpu_has_kernels(self, dtype):
        if pauli_cpu.cpu.why_not():
            pytest.skip("kernels of the CPU are for Linux")
        terms = some_strings(5)
        with mx.stream(mx.cpu):
            for op in ("product", "moments"):
                assert choose.choose_pauli(op, terms, 1, dtype) is pauli_cpu
                assert choose.choose_pauli(op, terms, 0, dtype) is pauli_plain
                assert choose.choose_pauli(op, PauliTerms(5, (), ()), 1, dtype) is pauli_plain

    def test_a_gpu_takes_what_its_kernels_can(self):
        terms = some_strings(5)
        for backend in (pauli_cuda, pauli_metal):
            assert backend.takes("product", terms, 7, mx.complex64)
            assert not backend.takes("product", terms, 7, mx.float64)
            assert not backend.takes("product", terms, 0, mx.float32)
            assert not backend.takes("product", PauliTerms(30, (1,), (0,)), 1, mx.complex64)

    def test_a_launch_fits_the_card(self):
        """Thread blocks of at most 1,024 threads, and a tile within the memory that they share."""
        for n in range(1, 31):
            low, threads, shared_memory = pauli_cuda.tile_of(n)
            assert low <= n
            assert threads <= 1024
            assert shared_memory == 4 << low <= 99 * 1024
            low, threads, _ = pauli_metal.tile_of(n)
            assert threads <= 1 << low <= 8 * 1024

    def test_strings_are_prepared_once(self):
        terms = some_strings(6)
        with emulated():
            for _ in range(3):
                pauli_product(terms, mx.ones(7), None, mx.ones(64))
            assert pauli_launch._prepared.cache_info().misses == 1
