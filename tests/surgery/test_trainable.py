"""save_trainable and load_trainable: blocks arrive at the places that they were trained for."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from support import assert_equal, flatten, untyped

from mlx_sparse_nn import (
    BlockSparseLinear,
    check_same_pattern,
    load_trainable,
    prune,
    save_trainable,
    shard_block_sparse,
)

X = mx.random.normal((3, 64), key=mx.random.key(0))


def make(seed: int = 0, density: float = 0.5) -> Any:
    """A frozen dense layer, a frozen sparse one, and two trainable ones: bias alone, and whole."""
    mx.random.seed(seed)
    sparse = [BlockSparseLinear(64, 64, block_size=16, density=density) for _ in range(3)]
    model = nn.Sequential(nn.Linear(64, 64), *sparse, nn.Linear(64, 4))
    model.freeze()
    model.layers[2].unfreeze(keys="bias")
    model.layers[3].unfreeze()
    model.layers[4].unfreeze(keys="weight")
    return model


def frozen_alike(model: Any, other: Any) -> Any:
    """Give a model what is frozen in another, as a base that both were loaded from."""
    model.layers[:3] = other.layers[:3]
    model.layers[4].bias = other.layers[4].bias
    return model


def state(model):
    return dict(flatten(model.parameters())), [layer.pattern for layer in model.layers[1:4]]


def unchanged(model, before):
    arrays, patterns = state(model)
    return patterns == before[1] and all(
        mx.array_equal(array, before[0][name]) for name, array in arrays.items()
    )


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "trainable.safetensors")


def rewrite(file, change, metadata=None):
    """Write the file anew, its arrays changed, and its metadata unless others are given."""
    arrays, kept = untyped(mx.load(file, return_metadata=True))
    mx.eval(arrays)
    mx.save_safetensors(file, change(arrays), kept if metadata is None else metadata)


@pytest.mark.parametrize("density", [0.5, 0.9, 0.1])
@pytest.mark.parametrize("path", [str, Path])
def test_a_model_of_another_pattern_takes_both(file, density, path):
    saved = make(0)
    model = frozen_alike(make(1, density), saved)
    assert model.layers[3].pattern != saved.layers[3].pattern
    save_trainable(saved, path(file))
    assert load_trainable(model, path(file)) is model
    assert_equal(model(X), saved(X))
    assert model.layers[3].pattern == saved.layers[3].pattern
    check_same_pattern(model)


def test_dims_that_are_no_multiple_of_the_block(file):
    def digits(density):
        return nn.Sequential(BlockSparseLinear(784, 100, density=density), nn.Linear(100, 10))

    saved, model = digits(0.5), digits(0.9)
    save_trainable(saved, file)
    x = mx.random.normal((2, 784))
    assert_equal(load_trainable(model, file)(x), saved(x))
    wider = nn.Sequential(BlockSparseLinear(800, 100), nn.Linear(100, 10))  # as many blocks a row
    message = r"\(output_dims, input_dims\) \[100, 784\], the model's has \[100, 800\]"
    with pytest.raises(ValueError, match=message):
        load_trainable(wider, file)


def test_what_is_in_the_file(file):
    save_trainable(make(), file)
    arrays, metadata = untyped(mx.load(file, return_metadata=True))
    trained = {"weight", "bias", "indptr", "indices"}
    assert set(arrays) == {f"layers.3.{name}" for name in trained} | {
        "layers.2.bias",
        "layers.4.weight",
    }
    assert metadata["format"] == "mlx"
    assert metadata["mlx_sparse_nn.patterns"].count("sha256") == 3


def test_after_pruning_while_training(file):
    model, optimizer = make(), optim.Adam(1e-2)
    for _ in range(2):
        _, grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(X)
        optimizer.update(model, grads)
    base = make()
    prune(model.layers[3], 0.2)
    save_trainable(model, file)
    assert_equal(load_trainable(base, file)(X), model(X))


def test_a_compiled_step_goes_on_with_the_pattern_that_came(file):
    saved = make(0)
    model = frozen_alike(make(1, 0.9), saved)
    step = mx.compile(lambda x: model(x), inputs=model.state)
    mx.eval(step(X))
    save_trainable(saved, file)
    load_trainable(model, file)
    assert mx.allclose(step(X), saved(X), atol=1e-6)


def test_a_frozen_layer_of_another_pattern_is_refused(file):
    saved, model = make(0), make(1)
    save_trainable(saved, file)
    before = state(model)
    message = r"^\[load_trainable\] layers\.[12] was saved with another pattern than CSRPattern"
    with pytest.raises(ValueError, match=message):
        load_trainable(model, file)
    assert unchanged(model, before)


def test_load_weights_reads_the_fingerprint_too(file):
    saved, model = make(0), make(1)
    save_trainable(saved, file)
    with pytest.raises(ValueError, match=r"^\[load_weights\] layers\.[12] was saved with another"):
        model.load_weights(file, strict=False)
    twin = frozen_alike(make(1), saved)
    twin.load_weights(file, strict=False)
    assert_equal(twin(X), saved(X))


def test_files_of_others_are_loaded(file):
    saved, model = make(0), make(0)
    saved.layers[3].weight = saved.layers[3].weight * 2
    mx.save_safetensors(file, dict(flatten(saved.trainable_parameters())))
    assert_equal(load_trainable(model, file)(X), saved(X))
    mx.savez(file[:-11] + "npz", **dict(flatten(saved.trainable_parameters())))
    assert_equal(load_trainable(make(0), file[:-11] + "npz")(X), saved(X))


def test_adapters_over_a_sparse_layer(file):
    def adapted(seed):
        mx.random.seed(seed)
        model: Any = nn.Sequential(BlockSparseLinear(64, 64, block_size=16, density=0.5).to_lora())
        return model

    saved, model = adapted(0), adapted(0)
    saved.layers[0].lora_b = mx.random.normal(saved.layers[0].lora_b.shape)
    save_trainable(saved, file)
    assert {name.rpartition(".")[2] for name in untyped(mx.load(file))} == {"lora_a", "lora_b"}
    assert_equal(load_trainable(model, file)(X), saved(X))
    with pytest.raises(ValueError, match=r"layers\.0\.linear was saved with another pattern"):
        load_trainable(adapted(1), file)


def test_a_layer_alone_a_shared_one_and_a_shard(file):
    layer, other = (BlockSparseLinear(64, 64, density=d) for d in (0.5, 0.9))
    save_trainable(layer, file)
    assert_equal(load_trainable(other, file)(X), layer(X))
    saved, model = (nn.Sequential(m, m) for m in (layer, BlockSparseLinear(64, 64, density=0.9)))
    save_trainable(saved, file)
    assert_equal(load_trainable(model, file)(X), saved(X))
    parts = [shard_block_sparse(m, "all-to-sharded") for m in (layer, BlockSparseLinear(64, 64))]
    save_trainable(parts[0], file)
    assert_equal(load_trainable(parts[1], file)(X), parts[0](X))


def without(*names):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


def put(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


BAD = {
    "another name": (lambda arrays: arrays | {"x": X, "y": X}, "the file has x and 1 more, which"),
    "no bias": (without("layers.2.bias"), r"no layers\.2\.bias, which the model trains"),
    "no indptr": (without("layers.3.indptr"), r"one of layers\.3\.indptr and layers\.3\.indices"),
    "no weight": (without("layers.3.weight"), r"no layers\.3\.weight, which"),
    "outside": (put("layers.3.indices", lambda a: a + 9), r"layers\.3: \[CSRPattern\] .*outside"),
    "floats": (put("layers.3.indices", lambda a: a * 1.0), r"layers\.3: .*must be integers"),
    "nan": (put("layers.3.indptr", lambda a: a * float("nan")), r"layers\.3: .*must be integers"),
    "other indices": (put("layers.3.indices", lambda a: 3 - a), r"layers\.3 was saved with anoth"),
    "no blocks": (put("layers.3.weight", lambda a: a[:-1]), r"layers\.3\.weight has shape"),
    "other bias": (put("layers.2.bias", lambda a: a[:-1]), r"layers\.2\.bias has shape \(63,\)"),
    "whole numbers": (put("layers.3.weight", lambda a: a.astype(mx.int32)), "has dtype"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("density", [0.5, 0.9])
def test_a_bad_file_is_refused_and_changes_nothing(file, change, message, density):
    saved = make(0)
    model = frozen_alike(make(1, density), saved)
    save_trainable(saved, file)
    rewrite(file, change)
    before, y = state(model), model(X)
    with pytest.raises((ValueError, TypeError), match=rf"^\[load_trainable\] .*{message}"):
        load_trainable(model, file)
    assert unchanged(model, before)
    assert_equal(model(X), y)


def test_a_pattern_without_its_values_is_refused(file):
    saved = make(0)
    model = frozen_alike(make(1), saved).freeze()
    save_trainable(saved, file)
    rewrite(file, without("layers.3.weight"))
    with pytest.raises(ValueError, match=r"another pattern for layers\.3\.weight and no values"):
        load_trainable(model, file)


def test_a_dense_layer_in_the_place_of_a_sparse_one(file):
    for place in (1, 3):
        model = make(0)
        save_trainable(model, file)
        model.layers[place] = model.layers[place].to_linear()
        with pytest.raises(ValueError, match=rf"layers\.{place} is sparse in the file, and not"):
            load_trainable(model, file)


def test_what_cannot_be_saved(file):
    with pytest.raises(ValueError, match=r"^\[save_trainable\] nothing in the model is trainable"):
        save_trainable(make().freeze(), file)
    model = make()
    model.layers[1].weight = mx.array([])
    with pytest.raises(ValueError, match="the layer was emptied"):
        save_trainable(model, file)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers.3": {}}'])
def test_metadata_that_cannot_be_read(file, text):
    save_trainable(make(), file)
    rewrite(file, dict, {"mlx_sparse_nn.patterns": text})
    with pytest.raises(ValueError, match=r"^\[load_trainable\] .* cannot be read"):
        load_trainable(make(), file)


def test_one_layer_at_two_paths_takes_one_pattern(file):
    layers = [BlockSparseLinear(256, 256) for _ in range(3)]
    save_trainable(nn.Sequential(*layers[:2]), file)
    model = nn.Sequential(layers[2], layers[2])
    before = flatten(model.parameters())
    with pytest.raises(ValueError, match=r"layers\.\d are one layer in the model, .* two patterns"):
        load_trainable(model, file)
    for (_, now), (_, then) in zip(flatten(model.parameters()), before, strict=True):
        assert_equal(now, then)
