"""The pattern travels with the weights, and nothing runs on half of a checkpoint."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from checkpoint_model import make_input, make_model
from support import assert_equal, flatten

from mlx_sparse_nn import BlockSparseLinear, CSRPattern

LOADS = {
    "eager": "predict = model",
    "compiled before any eager call": "predict = mx.compile(model, inputs=model.state)",
    "called once before": "mx.eval(model(x)); predict = model",
    "compiled and called once before": (
        "predict = mx.compile(model, inputs=model.state, outputs=model.state); mx.eval(predict(x))"
    ),
}
SCRIPT = """
import sys
import mlx.core as mx
from checkpoint_model import make_input, make_model

model, x = make_model(seed=1), make_input()
{load}
model.load_weights(sys.argv[1], strict=True)
mx.save(sys.argv[2], predict(x))
"""


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_another_process_with_another_pattern_gives_identical_outputs(tmp_path, load):
    model = make_model(seed=0)
    weights, outputs = str(tmp_path / "m.safetensors"), str(tmp_path / "y.npy")
    model.save_weights(weights)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT.format(load=load), weights, outputs],
        cwd=Path(__file__).parent,
        check=True,
        timeout=60,
    )
    written = mx.load(outputs)
    assert isinstance(written, mx.array)
    assert_equal(written, model(make_input()))


def test_a_compiled_step_follows_the_pattern_that_a_load_brings():
    """Patterns of other row lengths too, whose layout has arrays of other shapes."""
    x = mx.random.normal((4, 6))
    lengths = [[2, 2, 2], [1, 2, 3], [3, 3, 0], [0, 0, 6], [2, 2, 2]]
    layers = []
    for lens in lengths:
        starts = [0, *(sum(lens[: i + 1]) for i in range(3))]
        cols = [c % 6 for n in lens for c in range(n)]
        layers.append(BlockSparseLinear(6, 3, CSRPattern(starts, cols, (3, 6))))
    layer = BlockSparseLinear(6, 3, layers[0].pattern)
    optimizer = optim.SGD(0.0)
    state = [layer.state, optimizer.state]

    def step(x):
        loss, grads = nn.value_and_grad(layer, lambda x: (layer(x) ** 2).sum())(x)
        optimizer.update(layer, grads)
        return loss, grads["weight"]

    compiled = mx.compile(step, inputs=state, outputs=state)
    for source in layers:
        layer.load_weights(flatten(source.parameters()))
        loss, grad = compiled(x)
        assert loss.item() == pytest.approx((source(x) ** 2).sum().item(), rel=1e-5)
        expected = nn.value_and_grad(source, lambda x: (source(x) ** 2).sum())(x)[1]["weight"]  # noqa: B023
        assert mx.allclose(grad, expected, rtol=1e-5)


def spoil(name, change):
    def spoiled(weights):
        weights[name] = change(weights[name])
        return weights

    return spoiled


BAD = {
    "index out of range": spoil("layers.0.indices", lambda a: a + 4),
    "negative index": spoil("layers.0.indices", lambda a: a - 4),
    "indptr past the end": spoil("layers.0.indptr", lambda a: a + 1),
    "indptr decreases": spoil(
        "layers.0.indptr", lambda a: a[mx.array([0, 2, 1, 3, 4, 5, 6, 7, 8])]
    ),
    "other number of blocks": spoil("layers.0.indices", lambda a: a[:-1]),
    "weight of another shape": spoil("layers.0.weight", lambda a: a[:-1]),
    "bias of another shape": spoil("layers.0.bias", lambda a: a[:-1]),
    "indices cast to a float": spoil("layers.0.indices", lambda a: (3 - a).astype(mx.bfloat16)),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("spoiled", BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused_and_changes_nothing(spoiled, order):
    model, other = make_model(seed=0), make_model(seed=1)
    layer, pattern = model.layers[0], model.layers[0].pattern
    before = [mx.array(a) for _, a in flatten(layer.parameters())]
    x = mx.random.normal((3, 32))
    y = layer(x)
    weights = list(spoiled(dict(flatten(other.parameters()))).items())[::order]
    with pytest.raises((ValueError, TypeError), match=r"layers\.0|BlockSparseLinear"):
        model.load_weights(weights)
    for a, (_, b) in zip(before, flatten(layer.parameters()), strict=True):
        assert_equal(b, a)
    assert layer.pattern == pattern
    assert_equal(layer(x), y)


def test_training_then_a_bad_checkpoint_keeps_the_trained_weights():
    """What is put back is what the load replaced, not weights of some earlier step."""
    model, other = make_model(seed=0), make_model(seed=1)
    layer = model.layers[0]
    untrained = layer.weight
    optimizer = optim.SGD(0.1)
    loss = lambda x: (model(x) ** 2).mean()
    grads = nn.value_and_grad(model, loss)(mx.ones((2, 32)))[1]
    optimizer.update(model, grads)
    trained = mx.array(layer.weight)
    assert not mx.array_equal(trained, untrained)
    weights = spoil("layers.0.indices", lambda a: a + 4)(dict(flatten(other.parameters())))
    for order in (1, -1):
        with pytest.raises(ValueError, match="indices"):
            model.load_weights(list(weights.items())[::order])
        assert_equal(layer.weight, trained)


def test_shapes_are_checked_even_when_loading_is_not_strict():
    model, other = make_model(seed=0), make_model(seed=1)
    weights = dict(flatten(other.parameters()))
    weights["layers.0.weight"] = mx.zeros((1000, 8, 8))
    with pytest.raises(ValueError, match=r"\[BlockSparseLinear\] weight must be.*\(1000, 8, 8\)"):
        model.load_weights(list(weights.items()), strict=False)


@pytest.mark.parametrize("dtype", [mx.int64, mx.uint32, mx.int16])
def test_other_integer_types_are_read(dtype):
    model, other = make_model(seed=0), make_model(seed=1)
    weights = {
        name: array.astype(dtype) if "ind" in name else array
        for name, array in flatten(other.parameters())
    }
    model.load_weights(list(weights.items()))
    x = mx.random.normal((3, 32))
    assert_equal(model(x), other(x))
    assert model.layers[0].indices.dtype == mx.int32


def test_indices_that_are_traced_are_refused():
    """A functional update under compile would pair new weights with the old layout."""
    model = make_model(seed=0)

    def predict(parameters, x):
        model.update(parameters)
        return model(x)

    with pytest.raises(ValueError, match="eval"):
        mx.compile(predict)(model.parameters(), mx.ones((2, 32)))
