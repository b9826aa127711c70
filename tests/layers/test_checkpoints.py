"""The pattern travels with the weights, and nothing runs on half of a checkpoint."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from checkpoint_model import make_input, make_model
from mlx.utils import tree_map
from support import assert_equal, flatten, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, prune, restore

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
@pytest.mark.not_emulated("runs another process")
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


class Mixed(nn.Module):
    """Dense layers before and after sparse ones, so that each is written before another fails."""

    def __init__(self, seed):
        super().__init__()
        mx.random.seed(seed)
        self.layers = [
            nn.Linear(32, 32),
            BlockSparseLinear(32, 32, block_size=8, density=0.5),
            nn.QuantizedLinear(32, 32, group_size=32),
            BlockSparseLinear(32, 64, density=0.5).to_quantized(),
            BlockSparseLinear(64, 32, block_size=8, density=0.5).to_lora(),
            nn.BatchNorm(32),
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


MUTATIONS = {
    "outside": lambda a: a + 1000,
    "negative": lambda a: a - 1000,
    "reversed": lambda a: a[::-1],
    "nan": lambda a: mx.full(a.shape, float("nan")),
    "halves": lambda a: a / 2,
    "floats": lambda a: a.astype(mx.float32) + 1,
    "shorter": lambda a: a[:-1],
    "complex": lambda a: a.astype(mx.complex64),
    "another rank": lambda a: a[None],
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_refused_load_leaves_the_whole_model_as_it_was(mutation, order, strict):
    model, other = untyped(Mixed(0).eval()), Mixed(1)
    x = mx.random.normal((4, 32))
    before, y = dict(flatten(model.parameters())), model(x)
    patterns = [model.layers[1].pattern, model.layers[3].pattern]
    weights, refused = dict(flatten(other.parameters())), 0
    for name in weights:
        if "layers.1" not in name and "layers.3" not in name and "linear" not in name:
            continue
        spoiled = list((weights | {name: mutation(weights[name])}).items())[::order]
        try:
            model.load_weights(spoiled, strict=strict)
        except (TypeError, ValueError):
            refused += 1
        else:
            model = untyped(
                Mixed(0).eval()
            )  # a valid pattern, such as one with two columns exchanged
        after = dict(flatten(model.parameters()))
        assert after.keys() == before.keys()
        assert all(mx.array_equal(after[key], array) for key, array in before.items())
        assert [model.layers[1].pattern, model.layers[3].pattern] == patterns
    assert_equal(model(x), y)
    assert refused > 2


def test_models_without_sparse_layers_load_as_ever(tmp_path):
    model, path = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4)), str(tmp_path / "m.safetensors")
    model.save_weights(path)
    assert untyped(mx.load(path, return_metadata=True))[1] == {}
    assert model.load_weights(path) is model
    with pytest.raises(ValueError, match=r"Missing 1 parameters: \nlayers\.0\.bias\.$"):
        model.load_weights([("layers.0.weight", mx.ones((4, 4))), *flatten(model.parameters())[2:]])


class TestAnotherNumberOfBlocks:
    """As after prune: the errors name restore, and restore works."""

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("as_file", [True, False])
    def test_the_error_names_restore(self, tmp_path, strict, as_file):
        model, pruned, path = make_model(0), make_model(0), str(tmp_path / "m.safetensors")
        prune(pruned, 0.2)
        pruned.save_weights(path)
        weights = path if as_file else flatten(pruned.parameters())
        with pytest.raises(ValueError, match=r"\(mlx_sparse_nn\.restore\(model, weights\)"):
            model.load_weights(weights, strict=strict)
        x = mx.random.normal((3, 32))
        assert_equal(restore(model, path)(x), pruned(x))

    def test_so_does_one_of_the_layer_itself(self):
        layer, pruned = make_model(0).layers[0], make_model(0).layers[0]
        prune(pruned, 0.2)
        with pytest.raises(ValueError, match=r"parameter \w+ \(mlx_sparse_nn\.restore"):
            layer.load_weights(flatten(pruned.parameters()))

    def test_and_that_of_a_dense_layer_beside_sparse_ones(self):
        model = nn.Sequential(nn.Linear(32, 32), BlockSparseLinear(32, 32))
        saved = nn.Sequential(BlockSparseLinear(32, 32), BlockSparseLinear(32, 32))
        with pytest.raises(ValueError, match=r"not in model(?s:.*)\(mlx_sparse_nn\.restore"):
            model.load_weights(flatten(saved.parameters()))

    def test_other_shapes_do_not(self):
        model = nn.Sequential(nn.Linear(32, 32), BlockSparseLinear(32, 32))
        weights = dict(flatten(model.parameters())) | {"layers.0.bias": mx.ones(3)}
        with pytest.raises(ValueError, match=r"parameter layers\.0\.bias$"):
            model.load_weights(list(weights.items()))

    def test_an_emptied_layer_says_how_it_is_loaded(self):
        for model in (make_model(0), Mixed(0)):
            weights = flatten(model.parameters())
            model.update(tree_map(lambda _: mx.array([]), model.parameters()))
            with pytest.raises(ValueError, match=r"was emptied: load with strict=False"):
                model.load_weights(weights)
            model.load_weights(weights, strict=False)
            model(mx.ones((2, 32)))


class TestFingerprints:
    def save(self, tmp_path, model, keep=lambda name: True):
        """Save some of the arrays of a model, with what save_weights says of its patterns."""
        path = str(tmp_path / "m.safetensors")
        model.save_weights(path)
        arrays, metadata = untyped(mx.load(path, return_metadata=True))
        arrays = {name: array for name, array in arrays.items() if keep(name)}
        mx.eval(arrays)
        mx.save_safetensors(path, arrays, metadata)
        return path

    def test_the_whole_model_is_loaded_with_its_patterns(self, tmp_path):
        model, other = make_model(0), make_model(1)
        x = mx.random.normal((3, 32))
        assert_equal(other.load_weights(self.save(tmp_path, model))(x), model(x))

    def test_values_of_another_pattern_are_refused(self, tmp_path):
        model, other = make_model(0), make_model(1)
        path = self.save(tmp_path, model, lambda name: "ind" not in name)
        before = dict(flatten(other.parameters()))
        with pytest.raises(ValueError, match=r"\[load_weights\] layers\.\d was saved with another"):
            other.load_weights(path, strict=False)
        for name, array in flatten(other.parameters()):
            assert_equal(array, before[name])
        twin = make_model(0)
        twin.load_weights(path, strict=False)

    def test_files_without_one_are_loaded(self, tmp_path):
        model, other, path = make_model(0), make_model(1), str(tmp_path / "m.safetensors")
        mx.save_safetensors(path, dict(flatten(model.trainable_parameters())), {"format": "mlx"})
        other.load_weights(path, strict=False)
        assert_equal(other.layers[0].weight, model.layers[0].weight)

    def test_a_dense_layer_in_the_place_of_a_sparse_one(self, tmp_path):
        path = self.save(tmp_path, make_model(0))
        model = make_model(0)
        model.layers[0] = model.layers[0].to_linear()
        with pytest.raises(ValueError, match=r"layers\.0 is sparse in the file, a Linear in"):
            model.load_weights(path, strict=False)
        assert model.layers[0].weight.ndim == 2

    @pytest.mark.parametrize("text", ["{", "[]", '{"layers.0": 3}', '{"layers.0": {}}', "null"])
    def test_metadata_that_cannot_be_read(self, tmp_path, text):
        model, path = make_model(0), str(tmp_path / "m.safetensors")
        arrays = dict(flatten(model.parameters()))
        mx.save_safetensors(path, arrays, {"mlx_sparse_nn.patterns": text})
        with pytest.raises(ValueError, match=r"\[load_weights\] .* cannot be read"):
            model.load_weights(path)

    def test_other_metadata_is_none_of_ours(self, tmp_path):
        model, path = make_model(0), str(tmp_path / "m.safetensors")
        model.save_weights(path)
        assert untyped(mx.load(path, return_metadata=True))[1]["format"] == "mlx"
        model.layers[0].save_weights(path)
        make_model(1).layers[0].load_weights(path)


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


@pytest.mark.parametrize("first", ["indptr", "indices"])
def test_half_of_a_pattern_never_stays(first):
    """By update, where nobody holds what was replaced."""
    layer = BlockSparseLinear(48, 16, CSRPattern([0, 1, 4], [0, 1, 2, 3], (16, 48), 8))
    pattern = layer.pattern
    good = {"indptr": mx.array([0, 2, 4]), "indices": mx.array([5, 4, 1, 0])}
    bad = {name: good[name] + 10 * (name != first) for name in sorted(good, key=first.__ne__)}
    with pytest.raises(ValueError, match="ind"):
        layer.update(bad)
    assert layer.pattern == pattern
    assert layer.indptr.tolist() == [0, 1, 4]
    assert layer.indices.tolist() == [0, 1, 2, 3]
    layer.update(good)
    assert layer.pattern.indices.tolist() == [5, 4, 1, 0]


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


@pytest.mark.not_emulated("needs mx.compile")
def test_indices_that_are_traced_are_refused():
    """A functional update under compile would pair new weights with the old layout."""
    model = make_model(seed=0)

    def predict(parameters, x):
        model.update(parameters)
        return model(x)

    with pytest.raises(ValueError, match=r"\] indptr cannot be read while a transform"):
        mx.compile(predict)(model.parameters(), mx.ones((2, 32)))


@pytest.mark.not_emulated("needs mx.compile")
def test_averages_of_traced_indices_are_refused():
    model, other = make_model(seed=0), make_model(seed=0)

    def average():
        model.update(tree_map(lambda a, b: (a + b) / 2, model.parameters(), other.parameters()))

    with pytest.raises(ValueError, match=r"\] indptr cannot be read while a transform"):
        mx.compile(average, inputs=[model.state, other.state])()


def test_a_refused_array_is_said_of_its_layer():
    model = nn.Sequential(*(BlockSparseLinear(64, 64, block_size=16) for _ in range(3)))
    weights = dict(flatten(model.parameters()))
    weights["layers.1.indices"] = weights["layers.1.indices"] + 4
    words = r"^\[load_weights\] layers\.1: \[BlockSparseLinear\] indices\[0\] is \d, outside"
    with pytest.raises(ValueError, match=words):
        model.load_weights(list(weights.items()))
    with pytest.raises(
        ValueError, match=r"^\[load_weights\] layers\.2: .* weight must be an array"
    ):
        model.load_weights([("layers.2.weight", mx.ones(3))], strict=False)


@pytest.mark.parametrize(("given", "other"), [("indptr", "indices"), ("indices", "indptr")])
def test_half_of_another_pattern_is_refused(given, other):
    """Not strict: values would go to other places without an error."""
    mine = CSRPattern([0, 1, 4], [0, 0, 1, 2], (8, 16), 4)
    others = CSRPattern([0, 3, 4], [0, 1, 2, 3], (8, 16), 4)
    model, source = (nn.Sequential(BlockSparseLinear(16, 8, p)) for p in (mine, others))
    weight, arrays = model.layers[0].weight, dict(flatten(source.parameters()))
    del arrays[f"layers.0.{other}"]
    with pytest.raises(ValueError, match=rf"layers\.0 gets {given} of another .* its {other}"):
        model.load_weights(list(arrays.items()), strict=False)
    assert model.layers[0].pattern == mine
    assert_equal(model.layers[0].weight, weight)
    arrays[f"layers.0.{given}"] = model.layers[0][given]
    model.load_weights(list(arrays.items()), strict=False)  # of the model's own pattern


def test_another_pattern_without_its_values_is_refused():
    """Not strict: the model's own values would stand at other places."""
    mine = CSRPattern([0, 1, 4], [0, 0, 1, 2], (8, 16), 4)
    others = CSRPattern([0, 3, 4], [0, 1, 2, 3], (8, 16), 4)
    model, source = (nn.Sequential(BlockSparseLinear(16, 8, p)) for p in (mine, others))
    weight, arrays = model.layers[0].weight, dict(flatten(source.parameters()))
    del arrays["layers.0.weight"]
    with pytest.raises(ValueError, match=r"layers\.0 gets another pattern without its weight"):
        model.load_weights(list(arrays.items()), strict=False)
    assert model.layers[0].pattern == mine
    assert_equal(model.layers[0].weight, weight)
