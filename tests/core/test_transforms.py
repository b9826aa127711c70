"""grad, jvp, vmap, compile and their compositions, each against the same thing done dense.

Data are small whole numbers and every function is a polynomial, so sums are exact in float32 and
the comparison is for equality.
"""

import subprocess
import sys
from functools import partial
from io import StringIO

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    computing_by_kernels,
    dense_weight,
    integers,
    patterns,
    random_pattern,
)

from mlx_sparse_nn import CSRArray, CSRPattern, csr_array, hstack, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.pauli import PauliTerms, pauli_product


def sparse_products(pattern):
    """The three products as functions of two dense arrays."""
    return {
        "spmm": lambda data, x: spmm(data, pattern, x),
        "spmm_t": lambda data, y: spmm_t(data, pattern, y),
        "sddmm": lambda y, x: sddmm(pattern, y, x),
    }


def dense_products(pattern):
    """The same functions in dense MLX: the oracle."""
    ones = mx.ones(pattern.data_shape)

    def sample(y, x):
        outer = y.reshape(-1, pattern.shape[0]).T @ x.reshape(-1, pattern.shape[1])
        return mx.grad(lambda data: (dense_weight(pattern, data) * outer).sum())(ones)

    return {
        "spmm": lambda data, x: x @ dense_weight(pattern, data).T,
        "spmm_t": lambda data, y: y @ dense_weight(pattern, data),
        "sddmm": sample,
    }


def operands(pattern, name, seed=0, batch=()):
    """Two operands of a product, with ``batch`` axes before those that it takes."""
    n = 3
    data, x, y = pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0])
    shapes = {"spmm": (data, x), "spmm_t": (data, y), "sddmm": (y, x)}[name]
    return tuple(integers((*batch, *shape), seed + i) for i, shape in enumerate(shapes))


PATTERNS = {
    "scalars": random_pattern(5, 6, 1, seed=1),
    "blocks": random_pattern(4, 3, 4, seed=2),
    "even rows": CSRPattern([0, 2, 4], [0, 2, 1, 2], (4, 6), 2),
    "repeats": CSRPattern([0, 3, 3, 4], [1, 1, 0, 1], (6, 4), 2),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
every_product = pytest.mark.parametrize("name", ["spmm", "spmm_t", "sddmm"])


def pair(pattern, name):
    return sparse_products(pattern)[name], dense_products(pattern)[name]


def check(transform, sparse, dense, *args):
    """Assert that a transform of both functions gives the same arrays, plain and compiled."""
    expected = flat(transform(dense)(*args))
    for f in (transform(sparse), mx.compile(transform(sparse))):
        actual = flat(f(*args))
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_equal(a, b)


def flat(tree):
    return [tree] if isinstance(tree, mx.array) else [a for branch in tree for a in flat(branch)]


@every_pattern
@every_product
class TestOneProduct:
    def test_forward(self, pattern, name):
        check(lambda f: f, *pair(pattern, name), *operands(pattern, name))

    @pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
    def test_grad_and_value(self, pattern, name, argnums):
        loss = lambda f: lambda a, b: (f(a, b) ** 2).sum()
        grad = lambda f: mx.value_and_grad(loss(f), argnums=argnums)
        check(grad, *pair(pattern, name), *operands(pattern, name))

    @pytest.mark.parametrize("which", ["first", "second", "both"])
    def test_jvp(self, pattern, name, which):
        a, b = operands(pattern, name)
        da, db = operands(pattern, name, seed=5)

        def jvp(f):
            if which == "first":
                return lambda a, b, da, db: mx.jvp(lambda a: f(a, b), [a], [da])
            if which == "second":
                return lambda a, b, da, db: mx.jvp(lambda b: f(a, b), [b], [db])
            return lambda a, b, da, db: mx.jvp(f, [a, b], [da, db])

        check(jvp, *pair(pattern, name), a, b, da, db)

    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    @pytest.mark.parametrize("which", ["first", "second", "both"])
    def test_vmap_over_any_axis(self, pattern, name, which, axis):
        a, b = operands(pattern, name, batch=(2,))
        in_axes = {"first": (axis, None), "second": (None, axis), "both": (axis, axis)}[which]
        if name != "sddmm" and pattern.block_size == 1 and in_axes[0] == 2:
            in_axes = (1, in_axes[1])  # mapped scalar data has two axes
        args = [
            array[0] if at is None else mx.moveaxis(array, 0, at)
            for array, at in zip((a, b), in_axes, strict=True)
        ]
        for out_axes in (0, 1):
            check(lambda f: mx.vmap(f, in_axes, out_axes), *pair(pattern, name), *args)  # noqa: B023

    @pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
    def test_vmap_of_grad_and_grad_of_vmap(self, pattern, name, in_axes):
        a, b = operands(pattern, name, batch=(2,))
        args = [array if at == 0 else array[0] for array, at in zip((a, b), in_axes, strict=True)]
        loss = lambda f: lambda a, b: (f(a, b) ** 2).sum()
        check(
            lambda f: mx.vmap(mx.grad(loss(f), argnums=(0, 1)), in_axes),
            *pair(pattern, name),
            *args,
        )
        check(
            lambda f: mx.grad(lambda a, b: (mx.vmap(f, in_axes)(a, b) ** 2).sum(), argnums=(0, 1)),
            *pair(pattern, name),
            *args,
        )

    def test_nested_vmap(self, pattern, name):
        a, b = operands(pattern, name, batch=(2, 2))
        check(lambda f: mx.vmap(mx.vmap(f)), *pair(pattern, name), a, b)
        check(lambda f: mx.vmap(mx.vmap(f, (0, None)), (None, 0)), *pair(pattern, name), a[0], b[0])

    def test_second_order(self, pattern, name):
        """Hessian-vector products forward over reverse and reverse over reverse, of a cubic."""
        a, b = operands(pattern, name)
        da, db = operands(pattern, name, seed=5)

        def loss(f):
            return lambda a, b: (f(a, b) * f(a, b)).sum()

        def forward_over_reverse(f):
            grad = mx.grad(loss(f), argnums=(0, 1))
            return lambda a, b, da, db: mx.jvp(grad, [a, b], [da, db])

        def reverse_over_reverse(f):
            grad = mx.grad(loss(f), argnums=(0, 1))

            def along(a, b, da, db):
                ga, gb = grad(a, b)
                return (ga * da).sum() + (gb * db).sum()

            return mx.grad(along, argnums=(0, 1))

        check(forward_over_reverse, *pair(pattern, name), a, b, da, db)
        check(reverse_over_reverse, *pair(pattern, name), a, b, da, db)


@given(patterns(), st.sampled_from(["spmm", "spmm_t", "sddmm"]))
def test_gradients_on_any_pattern(pattern, name):
    a, b = operands(pattern, name)
    sparse, dense = pair(pattern, name)
    if not pattern.n_blocks:
        grads = mx.grad(lambda a, b: (sparse(a, b) ** 2).sum(), argnums=(0, 1))(a, b)
        for array, grad in zip((a, b), grads, strict=True):
            assert_equal(grad, mx.zeros_like(array))
        return
    loss = lambda f: mx.grad(lambda a, b: (f(a, b) ** 2).sum(), argnums=(0, 1))
    for actual, expected in zip(loss(sparse)(a, b), loss(dense)(a, b), strict=True):
        assert_equal(actual, expected)


def test_complex_gradients_follow_mlx():
    """The same loss through MLX's own complex product gives the same gradients."""
    pattern = PATTERNS["scalars"]
    data = integers(pattern.data_shape, 1, mx.complex64)
    x = integers((3, pattern.shape[1]), 2, mx.complex64)

    def dense(data, x):
        # MLX has no complex scatter gradient to rely on: multiply by real selectors.
        weight = dense_weight(pattern, data)
        return (x[:, None, :] * weight[None]).sum(axis=-1)

    def grads(f):
        def loss(data, x):
            y = f(data, x)
            return (mx.real(y) ** 2 + 2 * mx.imag(y)).sum()

        return mx.grad(loss, argnums=(0, 1))(data, x)

    for actual, expected in zip(grads(sparse_products(pattern)["spmm"]), grads(dense), strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_gradients_keep_the_dtype_of_their_operand(dtype):
    pattern = PATTERNS["blocks"]
    data = integers(pattern.data_shape, 1, dtype)
    x = integers((3, pattern.shape[1]), 2)
    grad_data, grad_x = mx.grad(lambda d, x: spmm(d, pattern, x).sum(), argnums=(0, 1))(data, x)
    assert grad_data.dtype == dtype
    assert grad_x.dtype == mx.float32


@every_pattern
class TestBias:
    def functions(self, pattern):
        dense = dense_products(pattern)["spmm"]
        return (
            lambda data, x, bias: spmm(data, pattern, x, bias),
            lambda data, x, bias: dense(data, x) + bias,
        )

    def operands(self, pattern, seed=0, batch=()):
        bias = integers((*batch, pattern.shape[0]), seed + 2)
        return *operands(pattern, "spmm", seed, batch), bias

    def test_grad_jvp_and_second_order(self, pattern):
        primals, tangents = self.operands(pattern), self.operands(pattern, seed=5)
        grad = lambda f: mx.grad(lambda *args: (f(*args) ** 2).sum(), argnums=(0, 1, 2))
        check(lambda f: f, *self.functions(pattern), *primals)
        check(grad, *self.functions(pattern), *primals)
        for f in (lambda f: f, grad):
            jvp = lambda g: lambda *args: mx.jvp(f(g), list(args), list(tangents))  # noqa: B023
            check(jvp, *self.functions(pattern), *primals)
        along_bias = lambda f: (
            lambda *args: mx.jvp(lambda bias: f(*args[:2], bias), [args[2]], [tangents[2]])
        )
        check(along_bias, *self.functions(pattern), *primals)

    @pytest.mark.parametrize(
        "mapped", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str
    )
    def test_vmap(self, pattern, mapped):
        batched, single = self.operands(pattern, batch=(2,)), self.operands(pattern)
        args = [batched[i] if i in mapped else single[i] for i in range(3)]
        in_axes = tuple(0 if i in mapped else None for i in range(3))
        check(lambda f: mx.vmap(f, in_axes, 1), *self.functions(pattern), *args)


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_a_mapped_product_adds_its_bias_before_it_is_rounded(in_axes):
    """257 + 1: bfloat16 has 256 or 258, and rounds 257 to 256."""
    pattern = CSRPattern([0, 1], [0], (8, 8), 8)
    data, bias = mx.ones((1, 8, 8), mx.bfloat16), mx.ones(8, mx.bfloat16)
    x = mx.array([[32.0] * 7 + [33.0]]).astype(mx.bfloat16)
    args = [a[None] if axis == 0 else a for a, axis in zip((data, x), in_axes, strict=True)]
    mapped = mx.vmap(lambda data, x: spmm(data, pattern, x, bias), in_axes)(*args)
    assert_equal(mapped[0], mx.full((1, 8), 258.0, mx.bfloat16))


def test_bias_of_a_wider_dtype_promotes():
    pattern = PATTERNS["blocks"]
    data, x = (a.astype(mx.bfloat16) for a in operands(pattern, "spmm"))
    bias = integers((pattern.shape[0],), 9)
    assert_equal(spmm(data, pattern, x, bias), spmm(data, pattern, x) + bias)


def test_an_array_can_be_built_inside_transformed_functions():
    """csr_array with a tracer for data: under grad, jvp, vmap and compile."""
    indices, indptr = [1, 0, 2, 2], [0, 2, 4]
    x = mx.array([1.0, 2.0, 3.0])

    def f(data, x):
        return csr_array((data, indices, indptr), shape=(2, 3), canonical=True) @ x

    def dense(data, x):
        row0, row1 = data[0] * x[1] + data[1] * x[0], (data[2] + data[3]) * x[2]
        return mx.stack([row0, row1])

    data = mx.array([1.0, 2.0, 3.0, 4.0])
    grad = lambda f: mx.grad(lambda data, x: (f(data, x) ** 2).sum(), argnums=(0, 1))
    check(lambda f: f, f, dense, data, x)
    check(grad, f, dense, data, x)
    check(lambda f: mx.vmap(f, (0, None)), f, dense, mx.stack([data, -data]), x)
    check(lambda f: lambda d, x: mx.jvp(f, [d, x], [d, x]), f, dense, data, x)


LINEAR = {
    "todense": lambda array: array.todense(),
    "T": lambda array: array.T.todense(),
    "tocsr": lambda array: array.tocsr().data,
    "canonical": lambda array: array.tocoo().tocsr().data,
    "diagonal": lambda array: array.diagonal(),
    "sum": lambda array: array.sum(axis=0),
}


@every_pattern
@pytest.mark.parametrize("name", LINEAR)
def test_what_arrays_do_is_differentiable_to_second_order(pattern, name):
    """The cubic sum of f(d)^3, forward over reverse, against f's matrix taken column by column."""
    data, tangent = integers(pattern.data_shape, 1), integers(pattern.data_shape, 2)
    f = lambda data: LINEAR[name](CSRArray(data, pattern))
    basis = mx.eye(data.size).reshape(-1, *data.shape)
    matrix = mx.stack([f(column).reshape(-1) for column in basis])

    def hvp(f):
        grad = mx.grad(lambda data: (f(data) ** 3).sum())
        return lambda data, tangent: mx.jvp(grad, [data], [tangent])

    check(hvp, f, lambda data: data.reshape(-1) @ matrix, data, tangent)
    mapped = mx.vmap(f)(mx.stack([data, tangent]))
    assert_equal(mapped, mx.stack([f(data), f(tangent)]))


def test_checkpointed_functions():
    pattern = PATTERNS["blocks"]
    data, x = operands(pattern, "spmm")
    f = lambda data, x: (spmm(data, pattern, x) ** 2).sum()
    for actual, expected in zip(
        mx.grad(mx.checkpoint(f), argnums=(0, 1))(data, x),
        mx.grad(f, argnums=(0, 1))(data, x),
        strict=True,
    ):
        assert_equal(actual, expected)


def without_rule(f):
    """A function of the user's own for MLX, with a rule for derivatives and none for mx.vmap."""
    function = mx.custom_function(f)
    function.vjp(lambda primals, cotangent, _: mx.vjp(f, primals, [cotangent])[1])
    return function


@pytest.mark.parametrize("wrapped", [lambda f: f, mx.checkpoint, without_rule])
@pytest.mark.parametrize("name", ["spmm", "spmm_t", "sddmm"])
def test_kernels_compute_what_is_mapped(name, wrapped):
    """MLX maps no kernel, and traces what has no rule for it a second time."""
    pattern = PATTERNS["blocks"]
    a, b = operands(pattern, name, batch=(2, 3))
    with computing_by_kernels() as computed:
        sparse, dense = pair(pattern, name)
        wrapped_sparse = wrapped(sparse)
        functions = lambda a, b: wrapped_sparse(a, b), dense
        squares = lambda f: lambda a, b: (f(a, b) ** 2).sum()
        check(mx.vmap, *functions, a[0], b[0])
        assert name in computed
        check(lambda f: mx.vmap(mx.vmap(f)), *functions, a, b)
        check(lambda f: mx.grad(squares(mx.vmap(f)), (0, 1)), *functions, a[0], b[0])
        if wrapped is not mx.checkpoint:  # whose gradient MLX maps of no function
            check(lambda f: mx.vmap(mx.grad(squares(f), (0, 1))), *functions, a[0], b[0])


SCALARS = PATTERNS["scalars"]
OF_REAL = {
    "data": lambda a, b: spmm(a, SCALARS, b),
    "x": lambda a, b: spmm_t(b, SCALARS, a),
    "sum": lambda a, b: (CSRArray(a, SCALARS) + CSRArray(b, SCALARS)).data,
    "union": lambda a, b: (CSRArray(a, SCALARS) + CSRArray(b, SCALARS).tocoo().T.T).data,
    "product": lambda a, b: (CSRArray(a, SCALARS) @ CSRArray(b, SCALARS).T).data,
    "assembly": lambda a, b: hstack([CSRArray(a, SCALARS), CSRArray(b, SCALARS)]).data,
    "strings": lambda a, b: pauli_product(PauliTerms(2, (1, 2), (0, 3)), a, None, b),
    "state": lambda a, b: pauli_product(PauliTerms(2, (1, 2), (0, 3)), b, None, a),
}


@pytest.mark.parametrize("name", OF_REAL)
def test_the_gradient_to_a_real_operand_casts_nothing(name):
    """MLX's compiler for CUDA cannot cast complex numbers to real ones where it fuses that."""
    nnz, (n_rows, n_cols) = SCALARS.n_blocks, SCALARS.shape
    n, other = {
        "data": (nnz, n_cols),
        "x": (n_rows, nnz),
        "strings": (2, 4),
        "state": (4, 2),
    }.get(name, (nnz, nnz))
    f = partial(OF_REAL[name], b=integers((other,), 2, mx.complex64))
    a, out = integers((n,), 1), f(integers((n,), 1))
    assert out.dtype == mx.complex64
    cotangent, drawn = integers(out.shape, 3, mx.complex64), StringIO()
    (slope,) = mx.vjp(f, [a], [cotangent])[1]
    mx.export_to_dot(drawn, slope)
    assert "AsType" not in drawn.getvalue()
    (expected,) = mx.vjp(f, [a.astype(mx.complex64)], [cotangent])[1]
    assert_equal(slope, mx.real(expected))


@pytest.mark.not_emulated("needs mx.compile")
def test_products_stay_lazy(monkeypatch):
    """No evaluation on the way: a function traced for export needs no values."""
    pattern = PATTERNS["blocks"]
    data, x = operands(pattern, "spmm")
    step = mx.grad(lambda data, x: (spmm(data, pattern, x) ** 2).sum(), argnums=(0, 1))
    monkeypatch.setattr(mx, "eval", lambda *args: pytest.fail("mx.eval on a forward path"))
    mx.compile(step)(data, x)


UNTOUCHED = """
import mlx.core as mx
before = mx.vmap, mx.array.__matmul__, mx.array.__mul__
import mlx_sparse_nn
from mlx_sparse_nn import physics, patterns
assert (mx.vmap, mx.array.__matmul__, mx.array.__mul__) == before
pattern = patterns.banded(8, 8, 1, 4)
mlx_sparse_nn.spmm(mx.ones(pattern.data_shape), pattern, mx.ones(8))
assert mx.vmap is not before[0]
assert (mx.array.__matmul__, mx.array.__mul__) == before[1:]
A = mlx_sparse_nn.from_dense(mx.ones((2, 2)))
assert (mx.ones(2) @ A).tolist() == [2, 2]
assert (mx.array(2.0) * A).data.tolist() == [2, 2, 2, 2]
methods = mx.array.__matmul__, mx.array.__mul__
mlx_sparse_nn.from_dense(mx.ones((2, 2)))
assert (mx.array.__matmul__, mx.array.__mul__) == methods
"""


def test_importing_changes_nothing_in_mlx():
    """Nothing that a dense model pays for: sparse arrays replace methods once they need it."""
    subprocess.run([sys.executable, "-W", "error", "-c", UNTOUCHED], check=True, timeout=60)
