"""Low-rank adapters over block-sparse layers: values, what trains, and what they fuse into."""

from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import assert_equal, flatten, integers, random_pattern, to_numpy, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear


def make_layer(block_size=8, bias=True, dtype=mx.float32):
    """A layer of whole numbers with uneven and empty rows, ``(3 B -> 5 B)``."""
    pattern = random_pattern(5, 3, block_size)
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=bias)
    layer.weight = integers(pattern.data_shape, 1, dtype)
    if bias:
        layer.bias = integers((pattern.shape[0],), 2, dtype)
    return layer


def make_adapted(scale=2.0, **options):
    adapted = make_layer(**options).to_lora(r=4, scale=scale)
    adapted.lora_a = integers(adapted.lora_a.shape, 3)
    adapted.lora_b = integers(adapted.lora_b.shape, 4)
    return adapted


def dense_of_adapted(adapted):
    """The dense weight, ``(output_dims, input_dims)``, by NumPy."""
    update = to_numpy(adapted.lora_a) @ to_numpy(adapted.lora_b) * adapted.scale
    return to_numpy(adapted.linear.todense()) + update.T


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_it_adds_the_low_rank_update(block_size, bias):
    adapted = make_adapted(block_size=block_size, bias=bias)
    x = integers((2, 7, 3 * block_size), 5)
    expected = to_numpy(x) @ dense_of_adapted(adapted).T
    if bias:
        expected = expected + to_numpy(adapted.linear.bias)
    assert_equal(adapted(x), mx.array(expected.astype(np.float32)))


def test_it_starts_as_the_layer_itself():
    layer = make_layer()
    adapted = layer.to_lora(r=3)
    assert adapted.lora_a.shape == (24, 3)
    assert adapted.lora_b.shape == (3, 40)
    assert 0 < float(mx.abs(adapted.lora_a).max()) <= 1 / 24**0.5
    x = integers((2, 24))
    assert_equal(adapted(x), layer(x))
    assert adapted.scale == 20.0


def test_the_output_has_the_dtype_of_x():
    adapted = make_adapted(dtype=mx.bfloat16)
    assert adapted(integers((2, 24), dtype=mx.bfloat16)).dtype == mx.bfloat16


def test_dropout_is_of_the_adapters_alone_and_in_training_alone():
    layer = make_layer()
    adapted = layer.to_lora(dropout=0.5)
    x = integers((4, 24))
    assert_equal(adapted(x), layer(x))  # lora_b is zero
    adapted.lora_b = integers(adapted.lora_b.shape, 1)
    assert not mx.array_equal(adapted(x), adapted(x))
    adapted.eval()
    assert_equal(adapted(x), adapted(x))


class TestOnlyTheAdaptersTrain:
    @pytest.mark.parametrize(
        "act",
        [
            lambda m: None,
            lambda m: m.freeze().unfreeze(keys=["lora_a", "lora_b"]),
            lambda m: m.train(),
            lambda m: m.layers[0].linear.unfreeze(keys=["indptr", "indices"]),
        ],
    )
    def test_after(self, act):
        model = nn.Sequential(make_adapted(), nn.ReLU())
        act(model)
        names = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert names == {"layers.0.lora_a", "layers.0.lora_b"}

    def test_a_base_that_is_unfrozen_trains_without_its_pattern(self):
        adapted = make_adapted().unfreeze()
        names = {name for name, _ in tree_flatten(adapted.trainable_parameters())}
        assert names == {"lora_a", "lora_b", "linear.weight", "linear.bias"}

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_step_changes_them_and_nothing_else(self, compiled):
        adapted = make_layer().to_lora(r=2)
        before = {k: mx.array(v) for k, v in flatten(adapted.parameters())}
        optimizer = optim.SGD(0.1)
        optimizer.init(adapted.trainable_parameters())
        state = [adapted.state, optimizer.state]

        def step(x):
            loss, grads = nn.value_and_grad(adapted, lambda x: (adapted(x) ** 2).mean())(x)
            optimizer.update(adapted, grads)
            return loss

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        x = mx.random.normal((8, 24))
        for _ in range(2):  # lora_a has no gradient while lora_b is zero
            mx.eval(step(x), state)
        for name, value in flatten(adapted.parameters()):
            assert mx.array_equal(value, before[name]).item() == ("lora" not in name), name

    def test_gradients_are_those_of_the_dense_product(self):
        adapted, x = make_adapted(), integers((5, 24), 6)
        grads = nn.value_and_grad(adapted, lambda x: (adapted(x) * adapted(x)).sum() / 2)(x)[1]
        grads = dict(tree_flatten(grads))
        weight, scale = dense_of_adapted(adapted), adapted.scale
        y = to_numpy(x) @ weight.T + to_numpy(adapted.linear.bias)
        dw = scale * to_numpy(x).T @ y  # (input_dims, output_dims)
        assert set(grads) == {"lora_a", "lora_b"}
        assert_equal(
            grads["lora_a"], mx.array((dw @ to_numpy(adapted.lora_b).T).astype(np.float32))
        )
        assert_equal(
            grads["lora_b"], mx.array((to_numpy(adapted.lora_a).T @ dw).astype(np.float32))
        )


class TestFuse:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("block_size", [1, 8])
    def test_exactly_into_a_dense_layer(self, block_size, bias):
        adapted = make_adapted(block_size=block_size, bias=bias)
        fused = adapted.fuse(dequantize=False)
        assert type(fused) is nn.Linear
        assert ("bias" in fused) == bias
        assert_equal(fused.weight, mx.array(dense_of_adapted(adapted).astype(np.float32)))
        x = integers((3, 3 * block_size), 7)
        assert_equal(fused(x), adapted(x))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("block_size", [1, 8])
    def test_into_the_pattern(self, block_size, bias):
        adapted = make_adapted(block_size=block_size, bias=bias)
        fused = adapted.fuse(keep_pattern=True)
        pattern = adapted.linear.pattern
        assert type(fused) is BlockSparseLinear
        assert fused.pattern == pattern
        expected = dense_of_adapted(adapted) * np.array(pattern.tomask())
        assert_equal(fused.todense(), mx.array(expected.astype(np.float32)))
        if bias:
            assert_equal(fused.bias, adapted.linear.bias)
        else:
            assert "bias" not in fused

    @pytest.mark.parametrize("keep_pattern", [False, True])
    def test_it_keeps_the_dtype_of_the_weight(self, keep_pattern):
        fused = make_adapted(dtype=mx.bfloat16).fuse(keep_pattern=keep_pattern)
        assert isinstance(fused, BlockSparseLinear if keep_pattern else nn.Linear)
        assert fused.weight.dtype == fused.bias.dtype == mx.bfloat16

    def test_a_full_pattern_loses_nothing(self):
        layer = BlockSparseLinear(16, 24, block_size=8, density=1.0)
        adapted = layer.to_lora()
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
        fused = adapted.fuse(keep_pattern=True)
        assert isinstance(fused, BlockSparseLinear)
        assert np.abs(to_numpy(fused.todense()) - dense_of_adapted(adapted)).max() <= 1e-5

    def test_repeated_blocks_are_refused_by_the_pattern_and_exact_when_dense(self):
        pattern = CSRPattern([0, 2], [0, 0], (8, 8), 8)
        layer = BlockSparseLinear(8, 8, pattern)
        layer.weight, layer.bias = integers(pattern.data_shape, 1), integers((8,), 2)
        adapted = layer.to_lora()
        with pytest.raises(ValueError, match=r"\[LoRABlockSparseLinear.fuse\].*more than once"):
            adapted.fuse(keep_pattern=True)
        x = integers((2, 8))
        assert_equal(adapted.fuse()(x), adapted(x))


class TestOverAQuantizedLayer:
    def adapted(self):
        layer = BlockSparseLinear(64, 96, block_size=32, density=0.5).to_quantized(bits=8)
        adapted = layer.to_lora(r=4, scale=2.0)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
        return adapted

    def test_only_the_adapters_train(self):
        adapted = self.adapted().unfreeze()
        names = {name for name, _ in tree_flatten(adapted.trainable_parameters())}
        assert names == {"lora_a", "lora_b", "linear.bias"}

    @pytest.mark.parametrize(
        ("dequantize", "keep_pattern", "kind"),
        [
            (False, False, nn.QuantizedLinear),
            (True, False, nn.Linear),
            (False, True, QuantizedBlockSparseLinear),
            (True, True, BlockSparseLinear),
        ],
    )
    def test_fuse(self, dequantize, keep_pattern, kind):
        with mx.stream(mx.cpu):  # a GPU may round dense factors to TF32
            self.check_fuse(dequantize, keep_pattern, kind)

    def check_fuse(self, dequantize, keep_pattern, kind):
        adapted = self.adapted()
        rounds = "rounded to 8 bits again, .*; dequantize=True keeps it"
        with nullcontext() if dequantize else pytest.warns(UserWarning, match=rounds) as warned:
            fused: Any = adapted.fuse(dequantize, keep_pattern=keep_pattern)
        assert dequantize or untyped(warned)[0].filename == __file__
        assert type(fused) is kind
        expected = dense_of_adapted(adapted)
        if keep_pattern:
            expected = expected * np.array(adapted.linear.pattern.tomask())
        x = mx.random.normal((3, 64))
        expected = to_numpy(x) @ expected.T + to_numpy(adapted.linear.bias)
        # Half a step of 8 bits: the range of a group is below 16.
        rounding = 0 if dequantize else 16 / 255 / 2 * mx.abs(x).sum(axis=1).max().item()
        assert np.abs(to_numpy(fused(x)) - expected).max() <= rounding + 1e-4
        if not dequantize:
            assert (fused.group_size, fused.bits) == (32, 8)

    def test_an_update_below_a_step_of_the_rounding_is_lost(self):
        """What the warning is about."""
        layer = BlockSparseLinear(64, 64, density=0.5).to_quantized(bits=4)
        adapted = layer.to_lora(r=1, scale=1e-4)
        adapted.lora_b = mx.ones(adapted.lora_b.shape)
        with pytest.warns(UserWarning, match=r"^\[LoRABlockSparseLinear\.fuse\] .* 4 bits"):
            rounded: Any = adapted.fuse(keep_pattern=True)
        kept: Any = adapted.fuse(True, keep_pattern=True)
        update = mx.abs(kept.weight - layer.dequantized_weight()).sum()
        assert update > 0
        assert mx.abs(rounded.dequantized_weight() - kept.weight).sum() > 0.5 * update


BAD = [
    (lambda: make_layer().to_lora(scale=untyped("abc")), TypeError, "scale must be a number"),
    (lambda: make_layer().to_lora(scale=untyped(None)), TypeError, "scale must be a number"),
    (lambda: make_layer().to_lora(dropout=untyped("0")), TypeError, "dropout must be a number"),
    (lambda: make_layer().to_lora(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1"),
    (lambda: make_layer().to_lora(dropout=-0.1), ValueError, r"dropout must be in \[0, 1\)"),
    (lambda: make_layer().to_lora(r=0), ValueError, r"r must be in \[1"),
    (lambda: make_layer().to_lora(r=untyped(2.5)), TypeError, r"r must be an integer, got 2.5"),
    (
        lambda: LoRABlockSparseLinear(untyped(nn.Linear(4, 4))),
        TypeError,
        "linear must be a BlockSparseLinear .* got Linear",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[LoRABlockSparseLinear\] " + message):
        call()


def test_repr_names_rank_and_scale():
    assert "r=4, scale=2.0" in repr(make_adapted())
