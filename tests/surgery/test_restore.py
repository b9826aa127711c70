"""restore: a dense model becomes the sparse one that was saved, or stays as it was."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from support import assert_equal, untyped

from mlx_sparse_nn import BlockSparseLinear, LoRABlockSparseLinear
from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.patterns import covering
from mlx_sparse_nn.surgery.restore import restore, restore_patterns


class Block(nn.Module):
    # Linear layers, dense or sparse.
    up: Any
    down: Any

    def __init__(self, dims):
        super().__init__()
        self.up, self.down = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims, bias=False)
        self.norm = nn.RMSNorm(dims)

    def __call__(self, x):
        return self.norm(x + self.down(nn.relu(self.up(x))))


class Model(nn.Module):
    """A dense model, with layers in a list, in children, and left dense."""

    blocks: Any
    head: Any

    def __init__(self, dims=64):
        super().__init__()
        self.blocks = [Block(dims) for _ in range(3)]
        self.head = nn.Linear(dims, 5)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_sparse(quantized=False):
    """Sparse in blocks of 32, of 8 and of scalars; the second block of layers stays dense."""
    model = Model()
    first, last = model.blocks[0], model.blocks[2]
    first.up = BlockSparseLinear.from_linear(first.up, block_size=32, density=0.5)
    first.down = BlockSparseLinear.from_linear(first.down, block_size=32, density=0.3)
    if quantized:
        first.up, first.down = first.up.to_quantized(bits=8), first.down.to_quantized(bits=3)
    last.up = BlockSparseLinear.from_linear(last.up, block_size=8, density=0.1, balance="global")
    last.down = BlockSparseLinear.from_linear(last.down, block_size=1, density=0.05)
    return model


def arrays(model):
    return dict(tree_flatten(model.parameters()))


X = mx.random.normal((3, 64), key=mx.random.key(7))


class TestRestore:
    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("source", ["file", "path", "directory", "dict"])
    def test_the_saved_model_comes_back(self, tmp_path, source, quantized):
        saved = make_sparse(quantized)
        path = tmp_path / "model.safetensors"
        saved.save_weights(str(path))
        weights = {
            "file": str(path),
            "path": path,
            "directory": tmp_path,
            "dict": arrays(saved),
        }[source]
        model = restore(Model(), weights)
        assert_equal(model(X), saved(X))
        kind = QuantizedBlockSparseLinear if quantized else BlockSparseLinear
        assert type(model.blocks[0].up) is type(model.blocks[0].down) is kind
        assert type(model.blocks[1].up) is type(model.head) is nn.Linear
        assert [type(block.down) for block in model.blocks[1:]] == [nn.Linear, BlockSparseLinear]
        assert [name for name, _ in tree_flatten(model.trainable_parameters())] == [
            name for name, _ in tree_flatten(saved.trainable_parameters())
        ]

    def test_files_in_parts_as_mlx_lm_saves_large_models(self, tmp_path):
        saved = make_sparse()
        names = sorted(arrays(saved))
        for part, some in enumerate((names[::2], names[1::2])):
            mx.save_safetensors(
                str(tmp_path / f"model-0000{part}-of-00002.safetensors"),
                {name: arrays(saved)[name] for name in some},
            )
        assert_equal(restore(Model(), tmp_path)(X), saved(X))

    def test_into_a_model_that_is_sparse_already_with_other_numbers_of_blocks(self):
        saved, model = make_sparse(), make_sparse(quantized=True)
        model.blocks[2].up = BlockSparseLinear(64, 128, block_size=16, density=0.9)
        assert_equal(restore(model, arrays(saved))(X), saved(X))
        assert_equal(restore(model, arrays(model))(X), saved(X))

    def test_patterns_alone_leave_the_values_to_load_weights(self):
        saved = make_sparse()
        model = restore_patterns(Model(), arrays(saved))
        assert model.blocks[0].up.pattern == saved.blocks[0].up.pattern
        assert not mx.array_equal(model.blocks[0].up.weight, saved.blocks[0].up.weight)
        model.load_weights(list(arrays(saved).items()))
        assert_equal(model(X), saved(X))

    def test_a_layer_at_two_paths_stays_one_layer(self):
        models = [Model() for _ in range(2)]
        for model in models:
            model.blocks[1].up = model.blocks[0].up
        saved, model = models
        saved.blocks[0].up = BlockSparseLinear.from_linear(saved.blocks[0].up)
        saved.blocks[1].up = saved.blocks[0].up
        restore(model, arrays(saved))
        assert model.blocks[1].up is model.blocks[0].up
        assert_equal(model(X), saved(X))

    def test_a_dense_checkpoint_is_loaded_as_ever(self):
        saved = Model()
        assert_equal(restore(Model(), arrays(saved))(X), saved(X))

    def test_what_was_frozen_and_the_mode_stay(self):
        model = Model()
        restore(model.freeze().eval(), arrays(make_sparse()))
        assert not tree_flatten(model.trainable_parameters())
        assert not model.blocks[0].up.training

    def test_other_integer_types_are_read(self):
        saved = make_sparse()
        weights = {
            name: array.astype(mx.int64) if name.endswith(("indptr", "indices")) else array
            for name, array in arrays(saved).items()
        }
        assert_equal(restore(Model(), weights)(X), saved(X))


class TestQuantizedNeighbours:
    @pytest.mark.parametrize(
        "options", [{}, {"group_size": 32, "bits": 8}, {"group_size": 32, "mode": "mxfp4"}]
    )
    def test_they_are_quantized_as_in_the_checkpoint(self, tmp_path, options):
        saved, model = make_sparse(), Model()
        for m in (saved, model):
            m.head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5))
        nn.quantize(saved.head, **options)
        path = str(tmp_path / "model.safetensors")
        saved.save_weights(path)
        restore(model, path)
        assert type(model.head.layers[0]) is nn.QuantizedLinear
        restored = arrays(model)
        for name, array in arrays(saved).items():
            assert_equal(restored[name], array)

    def test_embeddings_too(self):
        saved = nn.Sequential(nn.Embedding(10, 64), BlockSparseLinear(64, 64))
        model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
        saved.layers[0] = saved.layers[0].to_quantized(32, 4)
        tokens = mx.array([[1, 2, 9]])
        assert_equal(restore(model, arrays(saved))(tokens), saved(tokens))

    def test_a_model_that_is_quantized_already(self):
        """Beside the sparse layers, and in their place."""
        saved, model = make_sparse(quantized=True), Model()
        nn.quantize(saved.blocks[1], group_size=32)
        nn.quantize(model.blocks[1], group_size=32)
        nn.quantize(model.blocks[0], group_size=32)
        restore(model, arrays(saved))
        assert_equal(model(X), saved(X))
        assert type(model.blocks[0].up) is QuantizedBlockSparseLinear
        assert type(model.blocks[1].up) is nn.QuantizedLinear

    @pytest.mark.parametrize("shape", [(5, 7), (5, 0), (), (5, 2, 2)])
    def test_packing_that_does_not_fit_is_refused(self, shape):
        saved, model = make_sparse(), Model()
        nn.quantize(saved.blocks[1], group_size=32)
        weights, before = arrays(saved), arrays(model)
        weights["blocks.1.up.scales"] = mx.ones(shape)
        with pytest.raises(ValueError, match=r"quantized in the checkpoint|Expected shape"):
            restore(model, weights)
        assert all(mx.array_equal(before[name], array) for name, array in arrays(model).items())
        assert type(model.blocks[0].up) is type(model.blocks[1].up) is nn.Linear


class TestAdapters:
    def adapted(self, quantized=False):
        saved = make_sparse(quantized)
        for name in ("up", "down"):
            lora = getattr(saved.blocks[0], name).to_lora(r=4, scale=3.0)
            lora.lora_b = mx.random.normal(lora.lora_b.shape)
            setattr(saved.blocks[0], name, lora)
        return saved

    @pytest.mark.parametrize("quantized", [False, True])
    def test_over_a_sparse_layer_of_another_pattern(self, quantized):
        saved, model = self.adapted(quantized), self.adapted()
        model.blocks[0].up.linear.set_pattern(covering(128, 64, 0.9, 32, seed=5))
        restore(model, arrays(saved))
        assert_equal(model(X), saved(X))
        assert type(model.blocks[0].up) is LoRABlockSparseLinear
        names = [name for name, _ in tree_flatten(model.trainable_parameters())]
        assert names == [name for name, _ in tree_flatten(saved.trainable_parameters())]

    def test_mlx_lms_adapters_over_a_dense_layer_become_ours(self):
        LoRALinear = pytest.importorskip("mlx_lm.tuner.lora").LoRALinear
        saved, model = self.adapted(), Model()
        model.freeze()
        for name in ("up", "down"):
            dense = getattr(model.blocks[0], name)
            setattr(model.blocks[0], name, LoRALinear.from_base(dense, r=4, dropout=0.5, scale=3.0))
        restore(model, arrays(saved))
        up = untyped(model.eval()).blocks[0].up
        assert type(up) is LoRABlockSparseLinear
        assert (up.scale, up.dropout._p_1) == (3.0, 0.5)
        assert_equal(model(X), saved.eval()(X))
        names = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert names == {f"blocks.0.{n}.lora_{k}" for n in ("up", "down") for k in "ab"}

    def test_dora_needs_a_dense_layer(self):
        DoRALinear = pytest.importorskip("mlx_lm.tuner.dora").DoRALinear
        model = Model()
        model.blocks[0].up = DoRALinear.from_base(model.blocks[0].up, r=4)
        with pytest.raises(ValueError, match=r"blocks\.0\.up\.linear .*DoRALinear needs a dense"):
            restore(model, arrays(self.adapted()))
        assert type(model.blocks[0].up) is DoRALinear

    def test_a_model_without_them_is_refused(self):
        with pytest.raises(ValueError, match=r"blocks\.0\.\w+ has adapters, the model has none"):
            restore(Model(), arrays(self.adapted()))


class TestWhatTheModelSays:
    def test_another_width_whose_indices_fit_is_refused(self, tmp_path):
        path = str(tmp_path / "model.safetensors")
        nn.Sequential(BlockSparseLinear(64, 96)).save_weights(path)
        model = nn.Sequential(nn.Linear(128, 96))
        message = (
            r"^\[restore\] layers\.0 was saved with \(output_dims, input_dims\) \[96, 64\], "
            r"the model's has \[96, 128\]"
        )
        with pytest.raises(ValueError, match=message):
            restore(model, path)
        with pytest.raises(ValueError, match="restore_patterns"):
            restore_patterns(model, path)
        assert type(model.layers[0]) is nn.Linear

    def test_so_is_a_file_whose_indices_are_not_those_of_its_fingerprint(self, tmp_path):
        path = str(tmp_path / "model.safetensors")
        saved = nn.Sequential(BlockSparseLinear(64, 96, density=0.5))
        saved.save_weights(path)
        weights, metadata = untyped(mx.load(path, return_metadata=True))
        weights = weights | {"layers.0.indices": 1 - weights["layers.0.indices"]}
        mx.save_safetensors(str(tmp_path / "other.safetensors"), weights, metadata)
        with pytest.raises(ValueError, match=r"layers\.0 was saved with another pattern"):
            restore(nn.Sequential(nn.Linear(64, 96)), tmp_path / "other.safetensors")

    @pytest.mark.parametrize(("here", "there"), [(True, False), (False, True)])
    @pytest.mark.parametrize("sparse", [True, False])
    def test_a_bias_that_only_one_of_them_has_is_refused(self, here, there, sparse):
        model = nn.Sequential(nn.Linear(64, 64, bias=here))
        if sparse:
            model = nn.Sequential(BlockSparseLinear(64, 64, bias=here))
        saved = nn.Sequential(BlockSparseLinear(64, 64, bias=there))
        owner = "checkpoint" if there else "model"
        with pytest.raises(ValueError, match=rf"layers\.0 is .* the {owner} alone has a bias"):
            restore(model, arrays(saved))

    def test_an_emptied_layer_is_filled(self):
        saved, model = make_sparse(), make_sparse()
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
        with pytest.raises(ValueError, match="shape"):  # the dense ones are empty too
            restore(model, arrays(saved))
        model = nn.Sequential(BlockSparseLinear(64, 64), nn.ReLU())
        other = nn.Sequential(BlockSparseLinear(64, 64, density=0.9))
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
        assert_equal(restore(model, arrays(other))(X), nn.relu(other(X)))


UP, DOWN, LAST = "blocks.0.up.", "blocks.0.down.", "blocks.2.down."


def put(name, change):
    return lambda weights: weights | {name: change(weights[name])}


def without(name):
    return lambda weights: {key: array for key, array in weights.items() if key != name}


BAD = {
    "index past the end": (put(UP + "indices", lambda a: a + 2), ValueError, "outside"),
    "huge index": (put(UP + "indices", lambda a: a * 0 + (2**31 - 1)), ValueError, "outside"),
    "index of 64 bits": (
        put(UP + "indices", lambda a: a.astype(mx.int64) + 2**32),
        ValueError,
        "does not fit 32 bits",
    ),
    "negative index": (put(LAST + "indices", lambda a: a - 100), ValueError, "outside"),
    "indptr past the end": (put(UP + "indptr", lambda a: a + 1), ValueError, "start at 0"),
    "indptr decreases": (
        put(UP + "indptr", lambda a: mx.array([0, 9, 2, 4, a[-1].item()])),
        ValueError,
        "decreases",
    ),
    "short indptr": (put(UP + "indptr", lambda a: a[:-1]), ValueError, "indptr has 4 entries"),
    "empty indptr": (put(UP + "indptr", lambda a: a[:0]), ValueError, "indptr has 0 entries"),
    "two-dimensional indices": (put(UP + "indices", lambda a: a[None]), ValueError, "indices must"),
    "floating indices": (
        put(UP + "indices", lambda a: a.astype(mx.float32)),
        TypeError,
        "must be integers",
    ),
    "fewer weights than indices": (put(UP + "weight", lambda a: a[1:]), ValueError, "weight has"),
    "more weights than indices": (
        put(LAST + "weight", lambda a: mx.concatenate([a, a])),
        ValueError,
        "weight has",
    ),
    "blocks that are not square": (
        put(UP + "weight", lambda a: a[:, :, 1:]),
        ValueError,
        "weight has",
    ),
    "blocks of another size": (
        put(UP + "weight", lambda a: mx.zeros((a.shape[0], 48, 48))),
        ValueError,
        "indptr has",
    ),
    "blocks of nothing": (put(UP + "weight", lambda a: a[:, :0, :0]), ValueError, "weight has"),
    "a matrix for a weight": (put(UP + "weight", lambda a: a[0]), ValueError, "weight has"),
    "a scalar for a weight": (put(UP + "weight", lambda a: a[0, 0, 0]), ValueError, "weight has"),
    "integer weights": (
        put(UP + "weight", lambda a: a.astype(mx.int32)),
        TypeError,
        "weight has dtype",
    ),
    "another bias": (put(UP + "bias", lambda a: a[1:]), ValueError, "bias has shape"),
    "no weight": (without(UP + "weight"), ValueError, "weight is missing"),
    "no indptr": (without(UP + "indptr"), ValueError, "1 parameters"),
    "no norm": (without("blocks.1.norm.weight"), ValueError, "Missing 1 parameters"),
    "another norm": (put("blocks.1.norm.weight", lambda a: a[1:]), ValueError, "shape"),
    "a NumPy array": (put("head.weight", lambda a: np.array(a)), TypeError, "must be an mx.array"),
}
BAD_QUANTIZED = {
    "no biases": (without(UP + "biases"), ValueError, "biases is missing"),
    "scales of another shape": (put(UP + "scales", lambda a: a[1:]), ValueError, "scales has"),
    "biases of another shape": (put(UP + "biases", lambda a: a[1:]), ValueError, "biases has"),
    "no groups": (put(UP + "scales", lambda a: a[:, :, :0]), ValueError, "scales has shape"),
    "scales without an axis": (put(UP + "scales", lambda a: a[0, 0, 0]), ValueError, "scales has"),
    "packed to 7 bits": (put(UP + "weight", lambda a: a[:, :, :7]), ValueError, "bits must be"),
    "groups of 16": (
        put(UP + "scales", lambda a: mx.concatenate([a, a], -1)),
        ValueError,
        "group_size must be",
    ),
    "floating weight": (
        put(UP + "weight", lambda a: a.astype(mx.float32)),
        TypeError,
        "weight has dtype",
    ),
    "signed weight": (put(UP + "weight", lambda a: a.astype(mx.int32)), TypeError, "stay uint32"),
    "integer scales": (put(UP + "scales", lambda a: a.astype(mx.uint8)), TypeError, "scales has"),
    "index past the end": (put(DOWN + "indices", lambda a: a + 4), ValueError, "outside"),
}
CASES = [
    pytest.param(quantized, *case, id=("quantized, " if quantized else "") + name)
    for quantized, table in ((False, BAD), (True, BAD_QUANTIZED))
    for name, case in table.items()
]


@pytest.mark.parametrize("make_model", [Model, make_sparse])
@pytest.mark.parametrize(("quantized", "spoil", "error", "message"), CASES)
def test_a_bad_checkpoint_is_refused_and_changes_nothing(
    make_model, quantized, spoil, error, message
):
    model = make_model()
    before, y = arrays(model), model(X)
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        restore(model, spoil(arrays(make_sparse(quantized))))
    after = arrays(model)
    assert after.keys() == before.keys()
    for name, array in before.items():
        assert_equal(after[name], array)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert_equal(model(X), y)


def embed(model):
    model.blocks[0].up = nn.Embedding(128, 64)
    return model


def shorten(model):
    model.blocks = model.blocks[:2]
    return model


def narrow(_):
    return Model(dims=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (embed, r"blocks\.0\.up is sparse .* expected an nn\.Linear in the model, got Embedding"),
        (shorten, r"blocks\.2\.\w+ is sparse .* no such layer"),
        (narrow, r"blocks\.0\.\w+ is sparse"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=r"\[restore\] " + message):
        restore(change(Model()), arrays(make_sparse()))


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\[restore\] no model\*\.safetensors"):
        restore(Model(), tmp_path)
    mx.save(str(tmp_path / "a.npy"), mx.ones(3))
    with pytest.raises(TypeError, match=r"\[restore\] .*a\.npy holds an array without a name"):
        restore(Model(), tmp_path / "a.npy")
    with pytest.raises(TypeError, match=r"\[restore\] weights must be a path or a dict, got list"):
        restore(Model(), untyped([("a", mx.ones(3))]))


def test_a_subclass_of_a_sparse_layer_is_not_replaced():
    class Doubled(BlockSparseLinear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    weights = arrays(nn.Sequential(BlockSparseLinear(64, 64)))
    model = nn.Sequential(Doubled(64, 64))
    with pytest.raises(ValueError, match=r"\[restore\] layers\.0 is .* Doubled is a subclass"):
        restore(model, weights)
    assert type(model.layers[0]) is Doubled


@pytest.mark.parametrize("make_layer", [nn.Linear, BlockSparseLinear])
def test_one_layer_at_two_paths_takes_one_pattern(make_layer):
    weights = arrays(nn.Sequential(*(BlockSparseLinear(256, 256) for _ in range(2))))
    layer = make_layer(256, 256)
    model = nn.Sequential(layer, layer)
    with pytest.raises(ValueError, match=r"layers\.\d are one layer in the model, .* two patterns"):
        restore(model, weights)
    assert model.layers[0] is layer is model.layers[1]


def test_a_sparse_layer_without_a_pattern_in_the_checkpoint():
    weights = arrays(Model())
    with pytest.raises(ValueError, match=r"\[restore\] \S+ is sparse .* densify the model first$"):
        restore(make_sparse(), weights)
    values = {name: a for name, a in arrays(make_sparse()).items() if ".ind" not in name}
    with pytest.raises(ValueError, match=r"\[restore\] \S+ is sparse .* load_trainable takes"):
        restore(make_sparse(), values)


def test_a_model_that_is_one_layer():
    sparse = BlockSparseLinear(64, 64, block_size=16, density=0.5)
    weights = arrays(sparse)
    same = BlockSparseLinear(64, 64, block_size=16, density=0.5)
    assert_equal(restore(same, weights)(X), sparse(X))
    for model in (nn.Linear(64, 64), BlockSparseLinear(64, 64, block_size=16, density=1.0)):
        with pytest.raises(ValueError, match=r"\[restore\] the model is itself a \w*Linear"):
            restore(model, weights)


def test_names_are_strings():
    with pytest.raises(TypeError, match=r"\[restore\] names must be strings, got 1"):
        restore(Model(), untyped({1: mx.ones(3)}))
