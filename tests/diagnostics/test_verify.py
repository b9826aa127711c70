"""verify: right products pass in every dtype, and each wrong one is caught and named."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support import backend, device_of, patterns, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn import patterns as builders
from mlx_sparse_nn.core.backends import choose, cuda, cuda_tiles, plain
from mlx_sparse_nn.core.quantized import BITS
from mlx_sparse_nn.diagnostics.verify import MismatchError, verify

VERIFY = importlib.import_module("mlx_sparse_nn.diagnostics.verify")
PRODUCTS = ["forward", "input gradient", "weight gradient", "bias gradient"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = BlockSparseLinear(32, 64, block_size=8, density=0.3)
        self.blocks = [nn.BatchNorm(64), {"down": BlockSparseLinear(64, 32, bias=False)}]
        self.dropout = nn.Dropout(0.5)
        self.spare = BlockSparseLinear(32, 32)

    def __call__(self, x, scale=1.0):
        return self.blocks[1]["down"](self.dropout(self.blocks[0](self.up(x * scale))))


@given(
    patterns(fewest=1),
    st.lists(st.integers(1, 3), max_size=3).map(tuple),
    st.booleans(),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.floats(1e-6, 1e3),
)
def test_right_products_pass(pattern, leading, bias, dtype, x_dtype, scale):
    """Also with mixed dtypes, repeated blocks, and values that float16 can hardly hold."""
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=bias)
    layer.set_dtype(dtype)
    x = (mx.random.normal((*leading, pattern.shape[1])) * scale).astype(x_dtype)
    report = verify(layer, x)
    assert report.passed
    assert [check.product for check in report.checks] == PRODUCTS[: 3 + bias]
    assert report.not_reached == ()
    assert all(check.error <= check.bound for check in report.checks)


def test_float64_is_compared_as_float64():
    with device_of(mx.float64):
        layer = BlockSparseLinear(64, 64, density=0.5)
        layer.set_dtype(mx.float64)
        report = verify(layer, mx.random.normal((5, 64)).astype(mx.float64))
    forward = report.checks[0]
    assert forward.dtype == mx.float64
    assert forward.bound < 1e-12


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_quantized_layers_are_verified(bits, dtype):
    """Also under adapters, as LoRA puts them on."""
    model = nn.Sequential(
        BlockSparseLinear(64, 128, block_size=64, density=0.5),
        BlockSparseLinear(128, 64, bias=False),
    )
    nn.quantize(model, bits=bits)
    model.layers[1] = model.layers[1].to_lora()
    model.set_dtype(dtype)
    report = verify(model, mx.random.normal((2, 5, 64)).astype(dtype))
    assert [(check.layer, check.product) for check in report.checks] == [
        ("layers.0", "forward"),
        ("layers.0", "input gradient"),
        ("layers.0", "bias gradient"),
        ("layers.1.linear", "forward"),
        ("layers.1.linear", "input gradient"),
    ]
    layout = model.layers[0].pattern.layout
    by = [choose.choose(op, layout, 10, dtype, bits=bits).NAME for op in ("qspmm", "qspmm_t")]
    assert [check.backend for check in report.checks] == [*by, "mlx", *by]
    assert report.passed


@pytest.mark.parametrize(("op", "product"), [("qspmm", "forward"), ("qspmm_t", "input gradient")])
def test_each_wrong_quantized_product_is_named(monkeypatch, op, product):
    module = backend(op, 32, bits=4)
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: right(*args).at[1, 7].add(2e-3))
    layer = BlockSparseLinear(32, 64, density=0.5).to_quantized()
    with pytest.raises(MismatchError) as caught:
        verify(layer, mx.random.normal((4, 32)))
    (check,) = [check for check in caught.value.report.checks if not check.passed]
    assert (check.product, check.index) == (product, (1, 7))


def test_bounds_are_those_of_the_dtype():
    """A correct layer's float32 error fits a float32 bound, far below what bfloat16 may show."""
    layer = BlockSparseLinear(64, 64, density=0.5)
    x = mx.random.normal((5, 64))
    exact = verify(layer, x).checks[0]
    layer.set_dtype(mx.bfloat16)
    rounded = verify(layer, x.astype(mx.bfloat16)).checks[0]
    assert exact.bound < 1e-3 < rounded.bound
    assert exact.bound < rounded.error


@pytest.mark.parametrize(
    ("op", "product", "at"),
    [
        ("spmm", "forward", (2, 5)),
        ("spmm_t", "input gradient", (1, 31)),
        ("sddmm", "weight gradient", (3, 7, 2)),
    ],
)
@pytest.mark.parametrize("wrong", [2e-3, float("nan"), float("inf")])
def test_each_wrong_product_is_named(monkeypatch, op, product, at, wrong):
    layer = BlockSparseLinear(32, 64, block_size=8, density=0.3)
    right = getattr(backend(op), op)

    def spoiled(*args):
        out = right(*args)
        return out.at[at].add(wrong)

    monkeypatch.setattr(backend(op), op, spoiled)
    with pytest.raises(MismatchError) as caught:
        verify(nn.Sequential(nn.ReLU(), layer), mx.random.normal((4, 32)))
    (check,) = [check for check in caught.value.report.checks if not check.passed]
    assert (check.layer, check.product, check.index) == ("layers.1", product, at)
    message = str(caught.value)
    assert message.startswith("[verify] on Device(")
    assert f"layers.1: the {product} {check.shape} is" in message
    assert f"at {list(at)}" in message
    assert f"error {check.error:.3g}, bound {check.bound:.3g} for float32" in message
    assert "NOT within their bounds" in repr(caught.value.report)
    if np.isfinite(wrong):
        assert check.error == pytest.approx(wrong, rel=0.01)
        assert check.actual == pytest.approx(check.expected + wrong, rel=1e-3)


def test_a_product_of_wrong_shape_is_named(monkeypatch):
    monkeypatch.setattr(backend("sddmm"), "sddmm", lambda *_: mx.zeros((5, 8, 8)))
    with pytest.raises(
        ValueError, match=r"Linear: the weight gradient has shape \(5, 8, 8\), expe"
    ):
        verify(BlockSparseLinear(32, 64, block_size=8, density=0.3), mx.ones((4, 32)))


def test_a_wrong_bias_gradient_is_named():
    class Wrong(BlockSparseLinear):
        def __call__(self, x):
            return super().__call__(x) + 0.5 * (self.bias - mx.stop_gradient(self.bias))

    with pytest.raises(MismatchError, match="Wrong: the bias gradient") as caught:
        verify(Wrong(32, 32), mx.random.normal((4, 32)))
    assert [check.passed for check in caught.value.report.checks] == [True, True, True, False]


def test_only_the_wrong_layer_is_named():
    """A layer whose device arrays are not those of its pattern, as after a bad surgery."""
    model = nn.Sequential(BlockSparseLinear(64, 64), BlockSparseLinear(64, 64, density=0.5))
    other = builders.from_mask(~np.array(model.layers[1].pattern.tomask()))
    model.layers[1].pattern.__dict__["layout"] = other.layout
    with pytest.raises(MismatchError) as caught:
        verify(model, mx.random.normal((4, 64)))
    assert {c.layer for c in caught.value.report.checks if not c.passed} == {"layers.1"}
    assert "layers.0" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_no_product_is_called_wrong(value):
    x = mx.random.normal((4, 32))
    model = nn.Sequential(BlockSparseLinear(32, 32), nn.ReLU(), BlockSparseLinear(32, 32))
    with pytest.raises(ValueError, match=r"\[verify\] layers.0 has nan or infinity in its input: "):
        verify(model, x.at[1, 3].add(value))
    layer = model.layers[2]
    for name in ("weight", "bias"):
        before = layer[name]
        layer[name] = before.at[(0,) * before.ndim].add(value)
        with pytest.raises(ValueError, match=f"layers.2 has nan or infinity in its {name}: "):
            verify(model, x)
        layer[name] = before
    assert verify(model, x).passed
    quantized = layer.to_quantized()
    quantized.scales = quantized.scales.at[0, 0, 0].add(value)
    with pytest.raises(ValueError, match=r"QuantizedBlockSparseLinear has nan .* in its weight"):
        verify(quantized, x)


def test_a_wrong_layer_is_named_before_the_ones_that_get_its_nan(monkeypatch):
    right = backend("spmm").spmm
    spoiled = lambda *args: right(*args).at[0, 0].add(float("nan"))
    monkeypatch.setattr(backend("spmm"), "spmm", spoiled)
    model = nn.Sequential(BlockSparseLinear(32, 32), BlockSparseLinear(32, 32))
    with pytest.raises(MismatchError) as caught:
        verify(model, mx.random.normal((4, 32)))
    assert {check.layer for check in caught.value.report.checks} == {"layers.0"}


def test_a_sum_that_overflows_is_wrong():
    layer = BlockSparseLinear(32, 32, bias=False)
    layer.set_dtype(mx.float16)
    layer.weight = mx.full((1, 32, 32), 100, mx.float16)
    with pytest.raises(MismatchError, match=r"forward .* is inf"):
        verify(layer, mx.full((4, 32), 100, mx.float16))


def test_layers_see_the_inputs_that_the_model_gives_them():
    seen = []

    class Watched(BlockSparseLinear):
        def __call__(self, x):
            seen.append(x)
            return super().__call__(x)

    model = Model()
    model.blocks[1]["down"] = Watched(64, 32, bias=False)
    model.eval()
    x = mx.random.normal((6, 32))
    expected = model.blocks[0](model.up(x * 3.0))
    seen.clear()
    report = verify(model, x, 3.0)
    assert mx.array_equal(seen[0], expected).item()
    assert [check.layer for check in report.checks] == ["up"] * 4 + ["blocks.1.down"] * 3
    assert report.not_reached == ("spare",)
    assert "not reached by this input: spare" in repr(report)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Model()
    model.dropout.eval()
    before = dict(tree_flatten(model.parameters()))
    types = [(path, type(m), m.training) for path, m in model.named_modules()]
    if fails:
        with pytest.raises(ValueError, match="input_dims = 32"):
            verify(model, mx.ones((4, 31)))
    else:
        verify(model, mx.random.normal((4, 32)))
    assert [(path, type(m), m.training) for path, m in model.named_modules()] == types
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is before[name] for name in before)
    assert after.keys() == before.keys()


def test_a_shared_layer_is_checked_once_with_its_first_input():
    layer = BlockSparseLinear(32, 32)
    report = verify(nn.Sequential(layer, layer), mx.random.normal((4, 32)))
    assert {check.layer for check in report.checks} == {"layers.0"}
    assert report.not_reached == ()


@pytest.mark.parametrize(
    ("block_size", "dtype", "n", "expected"),
    [
        (32, mx.float32, 64, ["cuda", "cuda", "cuda"]),
        (12, mx.float32, 64, ["cuda", "cuda", "cuda"]),
        (136, mx.float32, 64, ["plain", "plain", "plain"]),
        (32, mx.float32, 8, ["cuda", "cuda", "cuda"]),
        (32, mx.bfloat16, 64, ["cuda", "cuda", "cuda"]),
        (8, mx.bfloat16, 64, ["cuda", "cuda", "cuda"]),
        (12, mx.bfloat16, 64, ["cuda", "cuda", "cuda"]),
        (136, mx.bfloat16, 64, ["cuda", "cuda", "plain"]),
        (1, mx.float32, 64, ["cuda", "cuda", "cuda"]),
        (32, mx.float64, 8, ["plain", "plain", "plain"]),
    ],
)
def test_it_says_what_computed_each_product(cuda_calls, block_size, dtype, n, expected):
    """And it is true: the kernels named are the ones that ran."""
    with device_of(dtype):
        layer = BlockSparseLinear(64, 64, block_size=block_size, density=0.5)
        layer.set_dtype(dtype)
        report = verify(layer, mx.random.normal((2, n // 2, 64)).astype(dtype))
    assert [check.backend for check in report.checks] == [*expected, "mlx"]
    ops = ["spmm", "spmm_t", "sddmm"]
    launched = {op for op, name in zip(ops, expected, strict=True) if name == "cuda"}
    assert set(cuda_calls) == launched
    line = repr(report).splitlines()[2].split()
    assert line[1:3] == [str(n), str(dtype).rpartition(".")[2]]
    assert line[3::2] == [*expected, "mlx"]


def test_wrong_products_are_named_with_what_computed_them(cuda_calls, monkeypatch):
    """The forward product by a kernel, the weight gradient by plain MLX."""
    layer = BlockSparseLinear(64, 64, block_size=136, density=0.5)
    layer.set_dtype(mx.bfloat16)
    for module, op in ((cuda, "spmm"), (plain, "sddmm")):
        right = getattr(module, op)
        monkeypatch.setattr(module, op, lambda *args, right=right: right(*args) + 1)
    with pytest.raises(MismatchError) as caught:
        verify(layer, mx.random.normal((64, 64)).astype(mx.bfloat16))
    first, *wrong = str(caught.value).splitlines()
    assert first == f"[verify] on {mx.default_device()}, wrong products:"
    assert [(line.split("the ")[1].split(" (")[0], line.split()[-1]) for line in wrong] == [
        ("forward", "cuda"),
        ("weight gradient", "plain"),
    ]


def test_tf32_is_allowed_for_where_float32_products_may_round(cuda_calls, monkeypatch):
    layer, scalar = BlockSparseLinear(64, 64), BlockSparseLinear(64, 64, block_size=1)
    x = mx.random.normal((64, 64))
    uses = lambda tf32: monkeypatch.setattr(VERIFY, "matmul_uses_tf32", lambda: tf32)
    uses(False)
    exact, exact_few = verify(layer, x), verify(layer, x[:8])
    uses(True)
    report, few = verify(layer, x), verify(layer, x[:8])
    assert [check.tf32 for check in report.checks] == [True, True, True, False]
    assert (exact.tf32, report.tf32) == (False, True)
    assert all(report.checks[i].bound > 20 * exact.checks[i].bound for i in range(3))
    assert report.checks[3].bound == exact.checks[3].bound  # a sum has no factors
    assert "MLX_ENABLE_TF32=0" in repr(report)
    assert few == exact_few  # by kernels, which do not round to TF32
    assert verify(scalar, x).checks[0].bound < 1e-3
    layer.set_dtype(mx.bfloat16)
    x = x.astype(mx.bfloat16)
    monkeypatch.setattr(cuda, "takes", lambda *_: False)
    rounded = verify(layer, x)
    assert {check.backend for check in rounded.checks[:3]} == {"plain"}
    uses(False)
    assert verify(layer, x) == rounded


@pytest.mark.parametrize(
    ("block_size", "allowed", "rounded"),
    [(32, True, True), (32, False, False), (12, True, False), (12, False, False)],
)
def test_kernels_of_true_float32_are_judged_by_its_bound(
    cuda_calls, monkeypatch, block_size, allowed, rounded
):
    monkeypatch.setattr(cuda_tiles, "allows_tf32", lambda: allowed)
    monkeypatch.setattr(VERIFY, "matmul_uses_tf32", lambda: True)
    report = verify(BlockSparseLinear(64, 64, block_size=block_size), mx.random.normal((64, 64)))
    assert [(check.backend, check.tf32) for check in report.checks[:3]] == [("cuda", rounded)] * 3


def test_tf32_is_found_by_what_matmul_gives(monkeypatch):
    """MLX's setting cannot be asked for; what it does can be seen."""
    with mx.stream(mx.cpu):
        assert not VERIFY.matmul_uses_tf32()
        full = mx.full
        monkeypatch.setattr(mx, "full", lambda shape, a: full(shape, round(a * 1024) / 1024))
        assert VERIFY.matmul_uses_tf32()


def test_repr():
    layer = BlockSparseLinear(4, 4, CSRPattern([0, 1], [0], (4, 4), 4), bias=False)
    layer.weight = mx.ones((1, 4, 4))
    report = verify(layer, mx.ones((2, 4)))
    lines = repr(report).splitlines()
    assert lines[0].startswith("1 sparse layer on Device(")
    assert lines[0].endswith("errors within their bounds, in % of the bounds")
    assert lines[1].split()[:4] == ["layer", "rows", "dtype", "forward"]
    computed = report.checks[0].backend
    assert lines[2].split()[:5] == ["BlockSparseLinear", "2", "float32", computed, "0%"]
    assert lines[2].endswith("-")
    assert lines[-1] == "This checks the products, not the model's quality."


def compiled_model():
    layer = BlockSparseLinear(32, 32)
    model = nn.Sequential(layer)
    model.layers.append(mx.compile(lambda x: layer(x)))
    model.layers[0] = nn.ReLU()
    model.hidden = layer
    return model


BAD = [
    (lambda: verify(BlockSparseLinear(64, 64)), TypeError, "inputs are missing"),
    (
        lambda: verify(untyped(lambda x: x), mx.ones(3)),
        TypeError,
        "model must be an nn.Module, got func",
    ),
    (
        lambda: verify(nn.Linear(3, 3), mx.ones(3)),
        ValueError,
        "the model has no BlockSparseLinear or QuantizedBlockSparseLinear layer",
    ),
    (
        lambda: verify(Uncalled(), mx.ones(3)),
        ValueError,
        "the model called none of hidden with these inputs",
    ),
    pytest.param(
        lambda: verify(compiled_model(), mx.ones((2, 32))),
        ValueError,
        "hidden is called in a compiled function",
        marks=pytest.mark.not_emulated("needs mx.compile"),
    ),
    (
        lambda: verify(BlockSparseLinear(32, 32), mx.zeros((0, 32))),
        ValueError,
        r"BlockSparseLinear: its input \(0, 32\) has no elements",
    ),
    (
        lambda: verify(BlockSparseLinear(32, 32), mx.ones((2, 32), mx.int32)),
        TypeError,
        "BlockSparseLinear: its input must be real floating, got mlx.core.int32",
    ),
]


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = BlockSparseLinear(32, 32)

    def __call__(self, x):
        return x


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[verify\] " + message):
        call()
