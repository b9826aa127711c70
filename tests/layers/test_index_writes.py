"""What is done to all parameters at once, and what becomes of the pattern among them."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from support import assert_equal, flatten, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, patterns, shard_block_sparse

TRAINABLE = nn.Module.trainable_parameter_filter


def wide(seed: int = 0) -> CSRPattern:
    """A pattern whose indices have no exact value in 16 bits."""
    cols = np.sort(np.random.default_rng(seed).choice(5000, (8, 700)))
    return CSRPattern(np.arange(9) * 700, np.sort(cols, 1).reshape(-1), (8, 5000))


# Even and odd numbers of blocks a row: a half of these is whole, or is not.
PATTERNS = {
    "one block": CSRPattern([0, 1], [0], (8, 8), 8),
    "even": CSRPattern([0, 2, 4], [0, 2, 2, 4], (16, 48), 8),
    "odd": CSRPattern([0, 1, 4], [1, 0, 2, 5], (16, 48), 8),
    "all in the first column": CSRPattern([0, 2, 4], [0, 0, 0, 0], (16, 48), 8),
    "wide": wide(),
}


@pytest.fixture(params=list(PATTERNS.values()), ids=list(PATTERNS))
def pattern(request):
    return request.param


def make(pattern: CSRPattern) -> Any:
    n_rows, n_cols = pattern.shape
    return nn.Sequential(BlockSparseLinear(n_cols, n_rows, pattern), nn.Linear(n_rows, 4))


def shift(pattern: CSRPattern) -> CSRPattern:
    """Return a pattern of the same sizes and other places."""
    indices = (pattern.indices + 1) % max(1, pattern.grid[1])
    return CSRPattern(pattern.indptr, indices, pattern.shape, pattern.block_size)


FUNCTIONS = {
    "half": lambda p: p * 0.5,
    "double, in floats": lambda p: p * 2.0,
    "zeros": lambda p: mx.zeros(p.shape),
    "uniform": nn.init.uniform(),
    "normal": nn.init.normal(),
    "noise": lambda p: p + 0.01 * mx.random.normal(p.shape),
    "nan": lambda p: p * float("nan"),
    "infinite": lambda p: mx.full(p.shape, float("inf")),
    "next": lambda p: p + 1.0,
    "sign": lambda p: -1.0 * p,
    "complex": lambda p: p * 1j,
    "half of 16 bits": lambda p: p.astype(mx.bfloat16) / 2,
}
REAL = {name: function for name, function in FUNCTIONS.items() if name != "complex"}  # as blocks


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
class TestOtherFloats:
    def test_a_parents_apply_is_refused_whatever_the_pattern(self, function, pattern):
        model = make(pattern)
        layer = model.layers[0]
        weight = layer.weight
        with pytest.raises(TypeError, match=r"\[BlockSparseLinear\] ind\w+ must be integers, got "):
            model.apply(function)
        assert layer.pattern == pattern
        assert_equal(layer.weight, weight)

    def test_so_is_a_parents_update(self, function, pattern):
        model = make(pattern)
        with pytest.raises(TypeError, match=r"model\.apply\(f, nn\.Module\.trainable_parameter_f"):
            model.update(tree_map(function, model.parameters()))


@pytest.mark.parametrize("function", REAL.values(), ids=REAL)
class TestFloatsOfValuesAlone:
    def test_the_layers_own_apply_leaves_the_pattern_out(self, function, pattern):
        layer = make(pattern).layers[0]
        weight = layer.weight
        assert layer.apply(function) is layer
        assert layer.pattern == pattern
        assert layer.indices.tolist() == pattern.indices.tolist()
        assert layer.weight.shape == weight.shape
        assert not mx.array_equal(layer.weight, weight)

    def test_the_named_filter_does_what_is_meant(self, function, pattern):
        for model in (make(pattern), make(pattern).unfreeze()):
            model.apply(function, TRAINABLE)
            model.update(tree_map(function, model.trainable_parameters()))
            assert model.layers[0].pattern == pattern


CASTS = {
    "float16": lambda p: p.astype(mx.float16),
    "bfloat16": lambda p: p.astype(mx.bfloat16),
    "float32": lambda p: p.astype(mx.float32),
    "there and back": lambda p: p.astype(mx.bfloat16).astype(mx.float32),
    "int64": lambda p: p.astype(mx.int64) if p.dtype == mx.int32 else p,
    "times one": lambda p: p * 1.0,
    "a copy": lambda p: p + 0,
    "mean with itself": lambda p: (p + p) / 2,
    "mean of three": lambda p: (p + p + p) / 3,
    "moving average": lambda p: 0.999 * p + 0.001 * p,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_and_averages_of_one_pattern_keep_it(cast, pattern):
    for change in (
        lambda model: model.apply(cast),
        lambda model: model.update(tree_map(cast, model.parameters())),
        lambda model: model.load_weights(flatten(tree_map(cast, model.parameters()))),
        lambda model: model.apply(cast).apply(lambda p: p.astype(mx.float32)),
    ):
        model = make(pattern)
        change(model)
        layer = model.layers[0]
        assert layer.pattern == pattern
        assert layer.indices.dtype == layer.indptr.dtype == mx.int32
        assert layer.indices.tolist() == pattern.indices.tolist()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("predicate", [None, lambda _: True])
def test_set_dtype(dtype, predicate, pattern):
    options = {} if predicate is None else {"predicate": predicate}
    model = make(pattern)
    model.set_dtype(dtype, **options)
    model.layers[0].set_dtype(dtype, **options)
    assert model.layers[0].weight.dtype == dtype
    assert model.layers[0].pattern == pattern


def test_complex_scalars_keep_the_pattern():
    model = make(PATTERNS["wide"]).apply(lambda p: p.astype(mx.complex64))
    assert model.layers[0].weight.dtype == mx.complex64
    assert model.layers[0].pattern == PATTERNS["wide"]


class TestAverages:
    @pytest.mark.parametrize("weight", [0.5, 0.9, 0.999])
    @pytest.mark.parametrize("pattern", list(PATTERNS.values())[1:])  # of more than one column
    def test_of_two_patterns_are_refused(self, weight, pattern):
        model, other = make(pattern), make(shift(pattern))
        mean = tree_map(
            lambda a, b: weight * a + (1 - weight) * b, model.parameters(), other.parameters()
        )
        for change in (model.update, lambda mean: model.load_weights(flatten(mean))):
            with pytest.raises(TypeError, match=r"must be integers, .* leave the pattern out"):
                change(mean)
            assert model.layers[0].pattern == pattern

    def test_of_many_models_of_one_pattern(self, pattern):
        models = [make(pattern) for _ in range(7)]
        total = tree_map(lambda *arrays: sum(arrays) / 7, *[m.parameters() for m in models])
        mean = make(pattern)
        mean.update(total)
        expected = mx.mean(mx.stack([model.layers[0].weight for model in models]), axis=0)
        assert mx.allclose(mean.layers[0].weight, expected, atol=1e-6)
        assert mean.layers[0].pattern == pattern

    @pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
    def test_a_running_average_kept_as_a_tree(self, decay, pattern):
        model = make(pattern)
        average = model.parameters()
        for _ in range(300):
            average = tree_map(
                lambda a, p: decay * a + (1 - decay) * p, average, model.parameters()
            )
            mx.eval(average)
        mean = make(pattern)
        mean.update(average)
        assert mean.layers[0].pattern == pattern

    def test_a_running_average_of_trainable_parameters(self, pattern):
        model, mean = make(pattern), make(pattern)
        for _ in range(3):
            mean.update(
                tree_map(
                    lambda a, p: 0.9 * a + 0.1 * p,
                    mean.trainable_parameters(),
                    model.trainable_parameters(),
                )
            )
        assert mean.layers[0].pattern == pattern


@pytest.mark.parametrize("name", ["indptr", "indices"])
def test_a_checkpoint_whose_indices_are_nan_is_refused(name):
    model = make(PATTERNS["odd"])
    weights = dict(flatten(make(PATTERNS["odd"]).parameters()))
    weights[f"layers.0.{name}"] = mx.full(weights[f"layers.0.{name}"].shape, float("nan"))
    with pytest.raises(TypeError, match=rf"\[BlockSparseLinear\] {name} must be integers"):
        model.load_weights(list(weights.items()))


def test_adapters_and_sharded_layers_leave_the_pattern_out_of_their_apply():
    pattern = PATTERNS["odd"]
    layer = make(pattern).layers[0]
    sharded = shard_block_sparse(layer, "all-to-sharded").apply(lambda p: p * 0.5)
    assert sharded.pattern == pattern
    adapted = layer.to_lora()
    adapted.apply(lambda p: p * 0.5)
    assert adapted.linear.pattern == pattern
    adapted.apply(lambda p: mx.ones(p.shape), TRAINABLE)
    assert_equal(adapted.lora_b, mx.ones(adapted.lora_b.shape))


def test_a_filter_of_the_users_own_still_decides():
    layer = BlockSparseLinear(64, 64)
    weight = layer.weight
    layer.apply(lambda p: p * 0, lambda module, key, value: key in ("bias", "indices"))
    assert_equal(layer.weight, weight)
    assert_equal(layer.bias, mx.zeros(64))


class TestAssignment:
    @pytest.mark.parametrize("name", ["weight", "bias", "indptr", "indices"])
    @pytest.mark.parametrize(
        ("value", "hint"),
        [
            (np.zeros(3, np.float32), "; mx.array"),
            ([0, 1], "; mx.array"),
            ((0, 1), "; mx.array"),
            (1.0, "; mx.array"),
            ("zeros", "$"),
            ({}, "$"),
            (nn.Linear(2, 2), "$"),
            (None, "$"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_what_is_no_array_is_refused(self, name, value, hint):
        layer, x = BlockSparseLinear(64, 64), mx.ones((2, 64))
        y = layer(x)
        if name == "bias" and value is None:
            layer.bias = untyped(None)  # as for nn.Linear: a layer without a bias
            assert "bias" not in layer.parameters()
            layer(x)
            return
        kind = type(value).__name__
        with pytest.raises(
            TypeError,
            match=rf"^\[BlockSparseLinear\] {name} must be an mx\.array, got {kind}{hint}",
        ):
            setattr(layer, name, value)
        assert_equal(layer(x), y)

    def test_other_attributes_are_the_users(self):
        layer = BlockSparseLinear(64, 64)
        layer.note, layer.extra = "mine", mx.ones(2)
        layer.note = None
        with pytest.raises(TypeError, match=r"extra must be an mx\.array, got NoneType"):
            layer.extra = None
        del layer.extra
        layer.weight = layer.weight * 2


class TestComplexBlocks:
    def test_are_refused_where_they_are_made(self):
        linear = nn.Linear(64, 64)
        linear.weight = linear.weight.astype(mx.complex64)
        layer = BlockSparseLinear(64, 64)
        message = r"^\[BlockSparseLinear\] complex64 is for block_size 1, got block_size 32"
        for make_complex in (
            lambda: BlockSparseLinear.from_linear(linear, pattern=layer.pattern),
            lambda: setattr(layer, "weight", layer.weight.astype(mx.complex64)),
            lambda: layer.set_dtype(mx.complex64),
            lambda: nn.Sequential(layer).apply(lambda p: p.astype(mx.complex64)),
        ):
            with pytest.raises(TypeError, match=message):
                make_complex()
        assert layer.weight.dtype == mx.float32

    def test_complex_scalars_are_taken(self):
        linear = nn.Linear(64, 64)
        linear.weight = linear.weight.astype(mx.complex64)
        layer = BlockSparseLinear.from_linear(linear, pattern=patterns.banded(64, 64, 1, 1))
        assert layer(mx.ones((2, 64))).dtype == mx.complex64


def test_a_bias_stays_when_a_later_array_is_refused():
    layer = BlockSparseLinear(16, 16, block_size=8)
    old, new = layer.bias, mx.ones(16)
    layer.bias = new
    with pytest.raises(ValueError, match="weight must be an array of shape"):
        layer.weight = mx.ones(3)
    assert_equal(layer.bias, new)
    assert old is not layer.bias
