"""Quantized blocks: the values of MLX's own quantized layers, and a checkpointable module."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.utils import checkpoint
from mlx.utils import tree_flatten, tree_map
from support import assert_close, assert_equal, integers, random_pattern, to_numpy, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.core.quantized import BITS, dequantize
from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear


def make_layer(block_size=32, bias=True, dtype=mx.float32):
    """A layer with uneven and empty rows, ``(3 B -> 5 B)``."""
    pattern = random_pattern(5, 3, block_size)
    assert 0 in np.diff(pattern.indptr)
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=bias)
    layer.set_dtype(dtype)
    return layer


def check_product(layer, x, dtype):
    """Output and gradient by x are those of the dequantized dense matrix, in float64."""
    wide = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    dense = to_numpy(naive.dense(dequantize(layer.weight, *wide), layer.pattern))
    bias = to_numpy(layer.bias) if "bias" in layer else 0
    length = x.shape[-1]
    expected = to_numpy(x) @ dense.T + bias
    magnitude = np.abs(to_numpy(x)) @ np.abs(dense).T + np.abs(bias)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, expected, length, magnitude)
    cotangent = integers(y.shape, 9, dtype)
    (gradient,) = mx.vjp(layer, [x], [cotangent])[1]
    expected = to_numpy(cotangent) @ dense
    magnitude = np.abs(to_numpy(cotangent)) @ np.abs(dense)
    assert_close(gradient, expected, layer.output_dims, magnitude)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("block_size", "group_size"), [(32, 32), (64, 32), (64, 64), (96, 32), (128, 128)]
)
def test_it_holds_what_mlx_holds_for_the_masked_dense_layer(block_size, group_size, bits):
    layer = make_layer(block_size)
    quantized = layer.to_quantized(group_size, bits)
    dense = nn.Linear(layer.input_dims, layer.output_dims)
    dense.weight, dense.bias = layer.todense(), layer.bias
    expected = dense.to_quantized(group_size, bits)
    expected = mx.dequantize(expected.weight, expected.scales, expected.biases, group_size, bits)
    mask = layer.pattern.tomask()
    assert_equal(quantized.todense(), mx.where(mask, expected, 0))
    step = 2 * float(mx.abs(layer.weight).max()) / (2**bits - 1)
    error = float(mx.abs(quantized.todense() - layer.todense()).max())
    assert 0 < error <= step * 1.01
    assert quantized.weight.nbytes * 32 == layer.weight.nbytes * bits
    check_product(quantized, mx.random.normal((4, layer.input_dims)), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
def test_the_product_in_every_dtype(dtype, bias, leading):
    quantized = make_layer(bias=bias, dtype=dtype).to_quantized()
    assert quantized.scales.dtype == dtype
    check_product(quantized, mx.random.normal((*leading, 96)).astype(dtype), dtype)


def test_group_size_and_bits_default_to_what_fits():
    """``nn.quantize(model)`` asks for neither."""
    for block_size, group_size in [(32, 32), (64, 64), (96, 32), (128, 64)]:
        quantized = make_layer(block_size).to_quantized()
        assert (quantized.group_size, quantized.bits) == (group_size, 4)


def test_the_mapped_and_the_compiled_product():
    quantized = make_layer().to_quantized()
    x = mx.random.normal((3, 2, 96))
    assert mx.allclose(mx.vmap(quantized)(x), quantized(x), atol=1e-6)
    compiled = mx.compile(quantized, inputs=quantized.state)
    assert mx.allclose(compiled(x), quantized(x), atol=1e-6)
    tangent = mx.random.normal(x.shape)
    ((dy,)) = mx.jvp(quantized, [x], [tangent])[1]
    assert mx.allclose(dy, quantized(tangent) - quantized.bias, atol=1e-5)


def test_adapters_over_quantized_blocks_train_and_pass_gradients_on():
    """LoRA: the gradient to x goes through the quantized blocks."""
    first, second = make_layer().to_quantized(), BlockSparseLinear(160, 64).to_quantized()
    model = nn.Sequential(first.to_lora(r=4), nn.ReLU(), second.to_lora(r=4))
    for adapted in (model.layers[0], model.layers[2]):
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
    x = mx.random.normal((3, 96))
    dense = nn.Sequential(first.to_linear(), nn.ReLU(), second.to_linear())

    def loss_of_dense(adapters):
        h = x
        for layer, pair in zip(dense.layers[::2], adapters, strict=True):
            h = layer(h) + 20.0 * (h @ pair["lora_a"]) @ pair["lora_b"]
            h = mx.maximum(h, 0) if layer is dense.layers[0] else h
        return (h**2).mean()

    grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)[1]["layers"]
    adapters = [model.layers[i].trainable_parameters() for i in (0, 2)]
    expected = mx.grad(loss_of_dense)(adapters)
    for i, pair in zip((0, 2), expected, strict=True):
        for name in ("lora_a", "lora_b"):
            value = pair[name]
            assert mx.allclose(
                grads[i][name], value, rtol=1e-3, atol=1e-3 * float(mx.abs(value).max())
            )


def test_a_checkpointed_layer():
    """MLX differentiates by all that ``checkpoint`` is given."""
    quantized, x = make_layer().to_quantized(), mx.random.normal((3, 96))
    quantized.unfreeze()
    loss = lambda call: nn.value_and_grad(quantized, lambda x: (call(x) ** 2).sum())(x)[1]["bias"]
    checkpointed = checkpoint(quantized)
    assert mx.allclose(loss(checkpointed), loss(quantized), rtol=1e-5)


def test_a_pattern_without_blocks():
    layer = BlockSparseLinear(64, 32, CSRPattern([0, 0], [], (32, 64), 32))
    quantized = layer.to_quantized()
    assert_equal(quantized(mx.ones((2, 64))), mx.broadcast_to(layer.bias, (2, 32)))


class TestInAModel:
    def make_model(self):
        return nn.Sequential(
            BlockSparseLinear(256, 128, block_size=32, density=0.5),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Sequential(BlockSparseLinear(64, 64, block_size=64, density=1.0, bias=False)),
        )

    def test_nn_quantize(self):
        model = self.make_model()
        nn.quantize(model, group_size=32, bits=8)
        kinds = [type(layer) for layer in (*model.layers, *model.layers[3].layers)]
        assert kinds[0] is kinds[4] is QuantizedBlockSparseLinear
        assert kinds[2] is nn.QuantizedLinear
        first = model.layers[0]
        nn.quantize(model)  # once more changes nothing
        assert model.layers[0] is first

    def test_nn_quantize_with_a_predicate(self):
        model = self.make_model()
        sparse = lambda path, m: isinstance(m, BlockSparseLinear) and {"group_size": 32, "bits": 3}
        nn.quantize(model, class_predicate=sparse)
        assert (model.layers[0].group_size, model.layers[0].bits) == (32, 3)
        assert type(model.layers[2]) is nn.Linear

    def test_outputs_stay_near(self):
        model = self.make_model()
        x = mx.random.normal((16, 256))
        y = model(x)
        nn.quantize(model, bits=8)
        assert mx.abs(model(x) - y).max() <= 0.02 * mx.abs(y).max()

    def test_nothing_but_the_bias_ever_trains(self):
        model = self.make_model()
        nn.quantize(model)
        trainable = lambda m: {name for name, _ in tree_flatten(m.trainable_parameters())}
        layer = model.layers[0]
        assert trainable(layer) == set()
        for act in (
            lambda: model.unfreeze(),
            lambda: model.freeze().unfreeze(keys=["weight", "scales", "biases", "bias"]),
            lambda: layer.unfreeze(recurse=False),
        ):
            act()
            assert trainable(layer) == {"bias"}
        grads = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(mx.ones((2, 256)))[1]
        expected = 4 * to_numpy(layer(mx.ones((256,))))
        assert_close(
            grads["bias"], expected, 256, 4 * np.abs(to_numpy(layer.todense())).sum(axis=1)
        )

    def test_a_checkpoint_brings_pattern_and_weights(self, tmp_path):
        path = str(tmp_path / "m.safetensors")
        models = [self.make_model() for _ in range(2)]
        for model in models:
            nn.quantize(model, bits=8)
        a, b = models
        assert a.layers[0].pattern != b.layers[0].pattern
        a.save_weights(path)
        b.load_weights(path)
        x = mx.random.normal((3, 256))
        assert_equal(b(x), a(x))
        assert b.layers[0].pattern == a.layers[0].pattern

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, copied):
        model = self.make_model()
        nn.quantize(model)
        twin, x = copied(model), mx.random.normal((3, 256))
        assert_equal(twin(x), model(x))
        twin.unfreeze()
        assert set(tree_flatten(twin.layers[0].trainable_parameters(), destination={})) == {"bias"}

    @pytest.mark.parametrize("name", ["weight", "scales", "biases", "bias", "indptr", "indices"])
    def test_an_array_of_another_shape_is_refused(self, name):
        model = self.make_model()
        nn.quantize(model)
        layer = model.layers[0]
        before = dict(tree_flatten(layer.parameters()))
        with pytest.raises(ValueError, match=rf"\[QuantizedBlockSparseLinear\] {name} must be an"):
            layer.load_weights([(name, layer[name][:-1])], strict=False)
        for key, value in before.items():
            assert_equal(layer[key], value)

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("indices", lambda a: a + 2, ValueError),
            ("indptr", lambda a: a - 1, ValueError),
            ("weight", lambda a: a.astype(mx.float32), TypeError),
            ("weight", lambda a: a.astype(mx.int32), TypeError),
        ],
    )
    def test_bad_arrays_are_refused_and_change_nothing(self, name, value, error):
        quantized = self.make_model().layers[0].to_quantized()
        x = mx.random.normal((3, 256))
        y = quantized(x)
        items = {key: array * 2 for key, array in tree_flatten(quantized.parameters())}
        items |= {key: quantized[key] for key in ("indptr", "indices")}
        items[name] = value(quantized[name])
        for order in (1, -1):
            with pytest.raises(error, match=rf"\[QuantizedBlockSparseLinear\] {name}"):
                quantized.load_weights(list(items.items())[::order])
            assert_equal(quantized(x), y)

    def test_casting_the_model_leaves_packed_weights_and_pattern_alone(self):
        model = self.make_model()
        nn.quantize(model, bits=8)
        y = model(mx.ones((2, 256)))
        model.set_dtype(mx.bfloat16)
        model.update(tree_map(lambda p: p, model.parameters()))
        layer = model.layers[0]
        assert (layer.weight.dtype, layer.scales.dtype) == (mx.uint32, mx.bfloat16)
        assert layer.indices.dtype == mx.int32
        assert mx.allclose(model(mx.ones((2, 256), mx.bfloat16)), y, atol=0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_is_the_dequantized_dense_layer(bias):
    quantized = make_layer(bias=bias).to_quantized()
    quantized.eval()
    linear = quantized.to_linear()
    assert type(linear) is nn.Linear
    assert not linear.training
    assert ("bias" in linear) == bias
    assert_equal(linear.weight, quantized.todense())
    x = mx.random.normal((3, 96))
    with mx.stream(mx.cpu):  # a GPU may round the dense layer's factors to TF32
        expected = linear(x)
    assert mx.allclose(expected, quantized(x), atol=1e-5)


def test_repr_names_the_format():
    assert repr(BlockSparseLinear(64, 64, density=0.5).to_quantized(bits=3)) == (
        "QuantizedBlockSparseLinear(input_dims=64, output_dims=64, block_size=32, density=0.5, "
        "blocks=2, bias=True, group_size=32, bits=3)"
    )


BAD = [
    (lambda: make_layer(16).to_quantized(), "block_size 16 is not a multiple of 32.*predicate"),
    (lambda: make_layer(1).to_quantized(), "block_size 1 is not a multiple of 32"),
    (
        lambda: make_layer(32).to_quantized(64),
        "group_size 64 does not divide block_size 32; it can be 32",
    ),
    (
        lambda: make_layer(64).to_quantized(128),
        "group_size 128 does not divide block_size 64; it can be 32 or 64",
    ),
    (lambda: make_layer(64).to_quantized(16), "group_size must be 32, 64 or 128, got 16"),
    (lambda: make_layer(64).to_quantized(bits=7), "bits must be one of .* got 7"),
    (lambda: make_layer(64).to_quantized(mode="mxfp4"), "mode must be 'affine', got 'mxfp4'"),
    (
        lambda: make_layer().to_quantized()(mx.ones((2, 95))),
        r"x has shape \(2, 95\).*input_dims = 96",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=r"\[QuantizedBlockSparseLinear\] " + message):
        call()


def test_a_pattern_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"\] pattern must be a CSRPattern, got BlockSparseLinear"):
        QuantizedBlockSparseLinear(untyped(make_layer()))
