"""An empty array empties a layer, as mlx-lm empties what it saves; whole arrays fill it again."""

import copy
import gc
import pickle
import weakref
from itertools import permutations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from support import assert_equal, flatten

import mlx_sparse_nn as sparse
from mlx_sparse_nn import BlockSparseLinear, CSRPattern, patterns

X = mx.random.normal((3, 64), key=mx.random.key(0))
EMPTIED = r"\] the layer was emptied: mx\.array\(\[\]\) was written into it, .*; write .* again"
MAKE = {
    "blocks": lambda: BlockSparseLinear(64, 64, density=0.5),
    "edges": lambda: BlockSparseLinear(64, 50, block_size=24, density=0.5),
    "scalars": lambda: BlockSparseLinear(64, 64, block_size=1, bias=False),
    "quantized": lambda: BlockSparseLinear(64, 64, density=0.5).to_quantized(),
    "LoRA": lambda: BlockSparseLinear(64, 64, density=0.5).to_lora(),
    "rows": lambda: sparse.shard_block_sparse(MAKE["blocks"](), "all-to-sharded"),
    "columns": lambda: sparse.shard_block_sparse(MAKE["blocks"](), "sharded-to-all"),
}


def empty(module):
    """What mlx_lm.utils.save does with the model that it saves."""
    module.update(tree_map(lambda _: mx.array([]), module.parameters()))
    return module


def emptied():
    return empty(BlockSparseLinear(64, 64, density=0.5))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("order", [1, -1])
def test_whole_arrays_fill_a_layer_again(make, order):
    model = nn.Sequential(make())
    y, weights = model(X), flatten(model.parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match=EMPTIED):
            empty(model)(X)
        assert all(array.shape == (0,) for _, array in flatten(model.parameters()))
        model.load_weights(weights[::order], strict=False)
        assert_equal(model(X), y)
        for (name, array), (_, again) in zip(weights, flatten(model.parameters()), strict=True):
            assert_equal(again, array)
            assert again.size > 0, name


@pytest.mark.parametrize("name", ["weight", "bias", "indptr", "indices"])
def test_one_empty_array_is_enough(name):
    layer = BlockSparseLinear(64, 64, density=0.5)
    y, array = layer(X), layer[name]
    both = {key: layer[key] for key in ("indptr", "indices")}
    setattr(layer, name, mx.array([]))
    with pytest.raises(ValueError, match=EMPTIED + "|" + name):
        layer(X)
    layer.update(both if name in both else {name: array})
    assert_equal(layer(X), y)


@pytest.mark.parametrize("name", ["scales", "biases"])
def test_the_scales_of_quantized_blocks_too(name):
    layer = MAKE["quantized"]()
    y, array = layer(X), layer[name]
    setattr(layer, name, mx.array([]))
    with pytest.raises(ValueError, match=rf"\[QuantizedBlockSparseLinear{EMPTIED}"):
        layer.dequantized_weight()
    setattr(layer, name, array)
    assert_equal(layer(X), y)


def test_the_memory_is_released():
    layer = BlockSparseLinear(64, 64, block_size=1, density=0.5)
    mx.eval(layer(X), mx.grad(lambda x: layer(x).sum())(X))
    pattern = layer.pattern
    held = [layer["weight"], layer["indptr"], layer["indices"], *layer["_layout"].values()]
    held += [pattern.layout.rows.indices, pattern.layout.cols.indices]
    references = [weakref.ref(thing) for thing in (*held, pattern)]
    del held, pattern
    empty(layer)
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


CALLS = {
    "todense": lambda layer: layer.todense(),
    "to_linear": lambda layer: layer.to_linear(),
    "to_block_sparse": lambda layer: layer.to_block_sparse(),
    "to_lora": lambda layer: layer.to_lora(),
    "to_quantized": lambda layer: layer.to_quantized(),
    "nn.quantize": lambda layer: nn.quantize(nn.Sequential(layer), group_size=32),
    "set_pattern": lambda layer: layer.set_pattern(patterns.banded(64, 64, 0)),
    "pattern": lambda layer: layer.pattern,
    "density": lambda layer: layer.density,
    "spy": lambda layer: layer.spy(),
    "plot": lambda layer: layer.plot(),
    "svg": lambda layer: layer._repr_svg_(),
    "grad": lambda layer: nn.value_and_grad(layer, lambda x: layer(x).sum())(X),
    "compile": lambda layer: mx.compile(lambda x: layer(x), inputs=layer.state)(X),
    "densify": lambda layer: sparse.densify(nn.Sequential(layer)),
    "prune": lambda layer: sparse.prune(layer, 0.1),
    "regrow": lambda layer: sparse.regrow(layer, 0.5, "random"),
    "verify": lambda layer: sparse.verify(layer, X),
    "advise": lambda layer: sparse.advise(layer, [1], seconds=1e-3),
    "summary": lambda layer: sparse.summary(layer),
    "shard_block_sparse": lambda layer: sparse.shard_block_sparse(layer, "all-to-sharded"),
    "shard_boundaries": lambda layer: sparse.shard_boundaries([layer]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_whatever_needs_the_layer_says_what_happened(call):
    with pytest.raises(ValueError, match=rf"^\[BlockSparseLinear{EMPTIED}"):
        call(emptied())


def test_adapters_over_an_emptied_layer():
    for fused in (lambda layer: layer.fuse(), lambda layer: layer.fuse(keep_pattern=True)):
        with pytest.raises(ValueError, match=EMPTIED):
            fused(empty(MAKE["LoRA"]()))


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_adapters_alone(name):
    adapted = MAKE["LoRA"]()
    y, array = adapted(X), adapted[name]
    setattr(adapted, name, mx.array([]))
    assert "scale" in repr(adapted)
    for call in (lambda: adapted(X), lambda: adapted.fuse()):
        with pytest.raises(ValueError, match=r"^\[LoRABlockSparseLinear\] the adapters were empt"):
            call()
    setattr(adapted, name, array)
    assert_equal(adapted(X), y)


def test_a_compiled_step_and_its_refilled_layer():
    layer = BlockSparseLinear(64, 64, density=0.5)
    step = mx.compile(lambda x: layer(x), inputs=layer.state, outputs=layer.state)
    y, weights = step(X), layer.parameters()
    with pytest.raises(ValueError, match=EMPTIED):
        mx.eval(empty(layer)(X))
    with pytest.raises(ValueError, match=EMPTIED):
        step(X)
    layer.update(weights)
    assert mx.allclose(step(X), y, atol=1e-6)


def test_what_can_still_be_read():
    layer = emptied()
    assert (layer.input_dims, layer.output_dims, layer.block_size) == (64, 64, 32)
    assert "block_size=32, emptied, bias=True" in repr(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(ValueError, match=EMPTIED):
            copied(X)
        source = BlockSparseLinear(64, 64)
        copied.load_weights(flatten(source.parameters()), strict=False)
        assert_equal(copied(X), source(X))


def test_what_goes_over_all_parameters_leaves_it_empty():
    layer, other = emptied(), BlockSparseLinear(64, 64)
    layer.weight = other.weight
    model = empty(nn.Sequential(layer))
    model.set_dtype(mx.bfloat16)
    model.apply(lambda p: p * 2)
    model.update(tree_map(lambda p: p + 1, model.parameters()))
    empty(model).update(model.parameters())
    with pytest.raises(ValueError, match=EMPTIED):
        model(X)
    layer.update(other.parameters())
    assert_equal(model(X), other(X))


@pytest.mark.parametrize("order", list(permutations(["weight", "bias", "indptr", "indices"]))[::5])
def test_any_pattern_of_these_dims_fills_it(order):
    layer, other = emptied(), BlockSparseLinear(64, 64, density=0.75)
    for name in order:
        with pytest.raises(ValueError, match=name):  # is still waited for
            layer(X)
        setattr(layer, name, other[name])
    assert layer.pattern == other.pattern
    assert_equal(layer(X), other(X))
    other.set_pattern(CSRPattern([0, 1, 1], [0], (64, 64), 32))
    empty(layer).update(other.parameters())
    assert_equal(layer(X), other(X))


GOOD = dict(flatten(BlockSparseLinear(64, 64, density=0.75).parameters()))
BAD = {
    "index past the end": ("indices", GOOD["indices"] + 1, "outside"),
    "indptr decreases": ("indptr", mx.array([0, 2, 1]), "decreases"),
    "indptr begins late": ("indptr", GOOD["indptr"] + 1, "start at 0"),
    "too many rows": ("indptr", mx.array([0, 1, 2, 3]), r"shape \(3,\), got \(4,\)"),
    "too few blocks": ("weight", GOOD["weight"][1:], "weight has 2 blocks, indices has 3"),
    "too few indices": ("indices", GOOD["indices"][1:], "indptr must end at 2"),
    "other blocks": ("weight", mx.zeros((3, 16, 16)), r"must be an array of shape \(3, 32, 32\)"),
    "floats": ("indices", GOOD["indices"] * 1.0, "must be integers"),
    "a scalar": ("weight", mx.array(1.0), "must be an array of shape"),
}


@pytest.mark.parametrize(("name", "value", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("order", [1, -1])
def test_arrays_that_do_not_go_together_leave_it_empty(name, value, message, order):
    layer = emptied()
    with pytest.raises((ValueError, TypeError), match=rf"^\[BlockSparseLinear\] .*{message}"):
        layer.load_weights(list((GOOD | {name: value}).items())[::order], strict=False)
    with pytest.raises(ValueError, match=EMPTIED):
        layer(X)
    layer.load_weights(list(GOOD.items())[::order], strict=False)
    assert_equal(layer.indices, GOOD["indices"])


def test_what_is_left_whole_keeps_its_checks():
    layer = BlockSparseLinear(64, 64, density=0.5)
    layer.indices = mx.array([])
    with pytest.raises(ValueError, match=r"bias must be an array of shape \(64,\), got \(63,\)"):
        layer.bias = mx.zeros(63)
    layer.bias = mx.ones(64)
    with pytest.raises(ValueError, match="weight has 2 blocks, indices has 3"):
        layer.update({"indptr": GOOD["indptr"], "indices": GOOD["indices"]})
    layer.update({"indptr": mx.array([0, 1, 2]), "indices": mx.array([1, 1])})
    assert_equal(layer.bias, mx.ones(64))
    assert layer.pattern.indices.tolist() == [1, 1]


def test_other_empty_arrays_are_of_a_wrong_shape():
    layer = BlockSparseLinear(64, 64, density=0.5)
    for value in (mx.zeros((0, 32, 32)), mx.zeros((0, 0))):
        with pytest.raises(ValueError, match="weight must be an array of shape"):
            layer.weight = value
    layer(X)


def test_a_layer_without_blocks():
    for block_size in (1, 32):
        none = CSRPattern([0] * (64 // block_size + 1), [], (64, 64), block_size)
        layer = BlockSparseLinear(64, 64, none)
        weights = layer.parameters()
        with pytest.raises(ValueError, match=EMPTIED):
            empty(layer)(X)
        layer.update(weights)
        assert_equal(layer(X), mx.broadcast_to(layer.bias, (3, 64)))


def test_a_file_of_an_emptied_model_loads_nowhere(tmp_path):
    path = str(tmp_path / "model.safetensors")
    for file in (path, str(tmp_path / "model.npz")):
        with pytest.raises(ValueError, match=EMPTIED):
            nn.Sequential(emptied()).save_weights(file)
    mx.save_safetensors(path, dict(flatten(nn.Sequential(emptied()).parameters())))
    whole = nn.Sequential(BlockSparseLinear(64, 64))
    y = whole(X)
    with pytest.raises(ValueError, match="shape"):
        whole.load_weights(path)
    with pytest.raises(ValueError, match=r"\[restore\]"):
        sparse.restore(whole, path)
    with pytest.raises(ValueError, match=r"\[load_weights\] layers\.0 is empty in the checkpoint"):
        whole.load_weights(path, strict=False)
    assert_equal(whole(X), y)
