"""summary: numbers counted by hand, and shares that add up to the whole model."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from support import computing, flatten, patterns, untyped

from mlx_sparse_nn import (
    BlockSparseLinear,
    CSRPattern,
    InputMoments,
    calibrate,
    load_trainable,
    prune,
    refit,
    restore,
    save_trainable,
    sparsify,
)
from mlx_sparse_nn.core.backends import plain
from mlx_sparse_nn.diagnostics.summary import LayerSummary, summary

# 4 x 3 blocks of 8: block-rows 0 and 3 are empty, block-columns 0 and 1 are used.
PATTERN = CSRPattern([0, 0, 2, 3, 3], [0, 1, 1], (32, 24), 8)


class Scaled(nn.Module):
    """Parameters of its own beside a layer, in a list, and a private array."""

    def __init__(self, layer):
        super().__init__()
        self.scales = [mx.ones(5), {"last": mx.ones((2, 3))}]
        self._cache = mx.zeros(100)
        self.inner = layer


def row_of(model, path, **options):
    (row,) = [row for row in summary(model, **options).rows if row.path == path]
    return row


def test_a_sparse_layer_counted_by_hand():
    model = nn.Sequential(nn.ReLU(), BlockSparseLinear(24, 32, PATTERN), nn.Linear(32, 10))
    stored = 3 * 64 + 32
    # 5 row pointers, 3 indices; of the transpose 4 pointers, 3 indices and a permutation (3).
    indices = 4 * ((5 + 3) + (4 + 3 + 3))
    assert row_of(model, "layers.1") == LayerSummary(
        path="layers.1",
        type="BlockSparseLinear",
        shape=(32, 24),
        block_size=8,
        density=0.25,
        parameters=stored,
        dense_parameters=24 * 32 + 32,
        weight_bytes=4 * stored,
        index_bytes=indices,
        optimizer_bytes=8 * stored,
        macs=192,
        dead_inputs=8,
        dead_outputs=16,
        share=stored / (stored + 330),
    )
    assert row_of(model, "layers.2") == LayerSummary(
        path="layers.2",
        type="Linear",
        shape=(10, 32),
        block_size=None,
        density=1.0,
        parameters=330,
        dense_parameters=330,
        weight_bytes=4 * 330,
        index_bytes=0,
        optimizer_bytes=8 * 330,
        macs=320,
        dead_inputs=None,
        dead_outputs=None,
        share=330 / (stored + 330),
    )
    found = summary(model)
    assert found.parameters == stored + 330
    assert found.dense_parameters == 800 + 330
    assert found.weight_bytes == 4 * (stored + 330)
    assert found.index_bytes == indices
    assert found.optimizer_bytes == 8 * (stored + 330)
    assert found.macs == 192 + 320


def test_every_parameter_of_the_model_is_counted_once():
    layer = BlockSparseLinear(24, 32, PATTERN)
    model = nn.Sequential(Scaled(layer), layer, nn.BatchNorm(32), nn.Conv1d(4, 6, 3), layer)
    model.tied = model.layers[3].weight
    rows = summary(model).rows
    assert [(row.path, row.type, row.parameters) for row in rows] == [
        ("layers.0.inner", "BlockSparseLinear", 224),
        ("layers.0", "Scaled", 11),
        ("layers.2", "BatchNorm", 128),
        ("layers.3", "Conv1d", 78),
    ]
    assert sum(row.share for row in rows) == pytest.approx(1)
    arrays = {id(a): a for k, a in flatten(model.parameters()) if "ind" not in k}
    assert sum(row.parameters for row in rows) == sum(a.size for a in arrays.values())
    assert all(row.shape is None and row.macs is None for row in rows[1:])


@given(patterns(fewest=1))
def test_dead_features_are_those_without_a_value(pattern):
    (row,) = summary(BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern)).rows
    mask = np.array(pattern.tomask())
    assert row.dead_outputs == (~mask.any(axis=1)).sum()
    assert row.dead_inputs == (~mask.any(axis=0)).sum()
    assert row.macs == pattern.nnz
    assert row.density == pattern.density


def test_only_what_trains_has_optimizer_state():
    model = nn.Sequential(BlockSparseLinear(24, 32, PATTERN), nn.BatchNorm(32))
    assert summary(model).optimizer_bytes == 2 * 4 * (224 + 64)  # running statistics are frozen
    assert summary(model, optimizer_arrays=0).optimizer_bytes == 0
    assert summary(model, optimizer_arrays=1).optimizer_bytes == 4 * (224 + 64)
    model.layers[0].freeze(keys="weight")
    assert summary(model).optimizer_bytes == 2 * 4 * (32 + 64)
    model.set_dtype(mx.bfloat16)
    assert summary(model).optimizer_bytes == 2 * 2 * (32 + 64)
    assert summary(model).weight_bytes == 2 * (224 + 128)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_count_as_the_values_that_they_stand_for(bits):
    model = nn.Sequential(nn.Linear(64, 32))
    dense = summary(model).rows[0]
    nn.quantize(model, 32, bits)
    (row,) = summary(model).rows
    assert (row.parameters, row.shape, row.macs) == (dense.parameters, (32, 64), dense.macs)
    assert row.weight_bytes == 64 * 32 * bits // 8 + 2 * 4 * 64 + 4 * 32
    assert row.optimizer_bytes == 2 * 4 * 32  # MLX leaves the bias trainable


def test_quantized_blocks_and_adapters():
    layer = BlockSparseLinear(64, 64, density=0.5)
    quantized = row_of(nn.Sequential(layer.to_quantized(bits=4)), "layers.0")
    assert (quantized.parameters, quantized.dense_parameters) == (2048 + 64, 4096 + 64)
    assert (quantized.macs, quantized.block_size, quantized.density) == (2048, 32, 0.5)
    assert quantized.weight_bytes == 2048 // 2 + 2 * 4 * 64 + 4 * 64
    assert quantized.index_bytes == row_of(layer, "").index_bytes
    rows = summary(nn.Sequential(layer.to_lora(r=4))).rows
    assert [(row.path, row.parameters, row.optimizer_bytes) for row in rows] == [
        ("layers.0.linear", 2112, 0),  # frozen under the adapters
        ("layers.0", 512, 2 * 4 * 512),
    ]


def test_what_stays_dense_is_said_with_its_share():
    experts = pytest.importorskip("mlx_lm.models.switch_layers").SwitchLinear
    model = nn.Sequential(
        nn.Embedding(32, 32),
        experts(32, 32, 8, bias=False),
        BlockSparseLinear(32, 32, density=0.5, block_size=16, bias=False),
        nn.Linear(32, 32, bias=False),
        nn.LayerNorm(32, affine=False),
    )
    found = summary(model)
    stored, dense = (1 + 8 + 0.5 + 1) * 1024, (1 + 8 + 1 + 1) * 1024
    assert (found.parameters, found.dense_parameters) == (stored, dense)
    assert found.density == stored / dense
    assert [row.always_dense for row in found.rows] == [
        "Embedding looks rows up; embeddings stay dense",
        "SwitchLinear holds 8 experts, which stay dense",
        None,
        None,
    ]
    lines = repr(found).splitlines()
    assert "always dense, of all parameters: Embedding 9.5%, SwitchLinear 76.2%" in lines
    (total,) = [line for line in lines if line.startswith("total")]
    assert total.split()[1] == "0.955"
    assert "always dense" not in repr(summary(nn.Linear(4, 4)))


def test_the_table():
    layer = BlockSparseLinear(1024, 2048, block_size=64, density=0.25, bias=False)
    model = nn.Sequential(nn.Linear(4, 1024, bias=False), layer)
    lines = repr(summary(model, optimizer_arrays=1)).splitlines()
    assert lines[0] == "528,384 parameters, 2,101,248 if dense; weights and index in MiB"
    assert len({len(line) for line in lines[1:5]}) == 1
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "layer out x in block density error weights index dead share",
        "layers.0 1024 x 4 - 1 - 0.02 - - 0.8%",
        "layers.1 2048 x 1024 64 0.25 ? 2.00 <0.01 0/0 99.2%",
        "total 0.251 2.02 <0.01 0/0 100.0%",
        "error ?: not known; summary(model, dense=...) measures it",
        "dead: inputs that no block reads / outputs that no block writes",
        "MACs of the linear layers: 528,384 for each row of x",
        "optimizer state: 2.02 MiB, 1 array for each trainable one (Adam 2, SGD 0)",
    ]
    assert repr(summary(layer)).splitlines()[2].startswith("(itself)  2048 x 1024")
    assert summary(nn.ReLU()).rows == ()
    assert repr(summary(nn.ReLU())).splitlines()[2].split() == [
        "total",
        "0",
        "0",
        "0",
        "0/0",
        "0.0%",
    ]


@pytest.mark.parametrize(
    ("n", "unit", "shown"),
    [(25, "B", "100"), (25_600, "KiB", "100"), (2_600_000, "MiB", "9.92"), (26_000, "KiB", "102")],
)
def test_sizes_have_one_unit_and_three_digits(n, unit, shown):
    model = nn.Module()
    model.a = mx.zeros(n)
    caption, _, row, *_ = repr(summary(model)).splitlines()
    assert caption.endswith(f"in {unit}")
    assert row.split()[5] == shown


class TestErrors:
    """How far each layer is from the dense one, or that nobody knows."""

    def make(self):
        dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))
        model = copy.deepcopy(dense)
        sparsify(model, block_size=8, density=0.5)
        return model, dense

    def by_hand(self, model, dense, i):
        whole = np.array(dense.layers[i].weight, dtype=np.float64)
        lost = whole - np.array(model.layers[i].todense(), dtype=np.float64)
        return np.linalg.norm(lost) / np.linalg.norm(whole)

    def errors(self, model, **options) -> dict[str, Any]:
        return {row.path: row.error for row in summary(model, **options).rows}

    def cells(self, model, **options):
        lines = [line.split() for line in repr(summary(model, **options)).splitlines()]
        return {line[0]: line[6] for line in lines if line[0].startswith("layers")}

    def test_what_surgery_noted_is_said_to_be_of_that_moment(self):
        model, dense = self.make()
        model.layers[0].weight = 3 * model.layers[0].weight  # as training changes it
        expected = self.by_hand(copy.deepcopy(model), dense, 2)
        errors = self.errors(model)
        assert errors["layers.2"] == pytest.approx(expected, rel=1e-5)
        assert 0 < errors["layers.0"] < 1
        assert errors["layers.3"] is None
        cells = self.cells(model)
        assert cells["layers.2"] == f"{expected:.3f}"
        assert cells["layers.3"] == "-"
        assert "training since then is not in it" in repr(summary(model))
        assert "measures it" not in repr(summary(model))

    def test_the_dense_model_tells_what_is_so_now(self):
        model, dense = self.make()
        model.layers[0].weight = 3 * model.layers[0].weight
        prune(model, {"layers.2": 0.25})
        errors = self.errors(model, dense=dense)
        for i in (0, 2):
            expected = self.by_hand(model, dense, i)
            assert errors[f"layers.{i}"] == pytest.approx(expected, rel=1e-5)
        assert errors["layers.0"] > 1
        said = repr(summary(model, dense=dense))
        assert "where W is the dense model's" in said
        assert "training since" not in said

    def test_quantized_layers_are_compared_as_they_compute(self):
        dense = nn.Sequential(nn.Linear(64, 64))
        model = copy.deepcopy(dense)
        sparsify(model, density=1.0)
        nn.quantize(model, 32, 4)
        assert self.errors(model) == {"layers.0": None}
        error = self.errors(model, dense=dense)["layers.0"]
        assert error == pytest.approx(self.by_hand(model, dense, 0), rel=1e-5)
        assert 0.01 < error < 0.2

    @pytest.mark.parametrize("how", ["pattern", "prune", "load", "restore", "trainable"])
    def test_other_blocks_or_values_are_not_what_surgery_noted(self, how, tmp_path):
        model, _ = self.make()
        other, _ = self.make()
        if how == "pattern":
            model.layers[0].set_pattern(other.layers[0].pattern)
        elif how == "prune":
            prune(model, {"layers.0": 0.25})
        elif how == "load":
            name = str(tmp_path / "other.safetensors")
            other.save_weights(name)
            model.load_weights(name)
        elif how == "restore":
            restore(model, flatten_dict(other))
        else:
            save_trainable(other, tmp_path / "other.safetensors")
            load_trainable(model, tmp_path / "other.safetensors")
        assert model.layers[0].weight_error is None
        cells = self.cells(model)
        assert cells["layers.0"] == "?"
        assert "error ?: not known; summary(model, dense=...) measures it" in repr(summary(model))
        if how in ("pattern", "prune"):
            assert cells["layers.2"] != "?"

    def test_training_and_refused_loads_keep_it(self):
        model, _ = self.make()
        noted = model.layers[0].weight_error
        optimizer = optim.SGD(0.1)
        grads = nn.value_and_grad(model, lambda x: model(x).sum())(mx.ones((2, 64)))[1]
        optimizer.update(model, grads)
        assert model.layers[0].weight_error == noted
        assert copy.deepcopy(model).layers[0].weight_error == noted
        with pytest.raises(ValueError, match="weight"):
            model.load_weights([("layers.0.weight", mx.ones((3, 8, 8)))], strict=False)
        model.load_weights([("layers.2.bias", mx.ones(64))], strict=False)
        assert model.layers[0].weight_error == noted
        assert model.layers[2].weight_error is None

    def test_layers_whose_error_is_known_and_others_stand_apart(self):
        model, _ = self.make()
        both = nn.Sequential(model.layers[0], model.layers[2])
        both.layers[1].forget_errors()
        assert set(self.cells(both)) == {"layers.0", "layers.1"}

    def test_errors_of_outputs_are_marked(self):
        model, _ = self.make()
        model.layers[0].output_error = 0.125
        row = row_of(model, "layers.0")
        assert (row.error, row.error_of) == (0.125, "outputs")
        assert "  0.125 out  " in repr(summary(model))
        assert "error, out: of the outputs over the samples of cal" in repr(summary(model))

    def test_calibrated_layers_say_what_they_were_fitted_to(self):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        x = mx.random.normal((200, 32))
        report = calibrate(model, [x], density=0.5, block_size=8, progress=False)
        for path, quality in report.quality.items():
            row = row_of(model, path)
            assert (row.error, row.error_of) == (quality.error_fitted, "outputs")
        linear, layer = nn.Linear(32, 32), model.layers[0]
        done = refit(layer, linear, InputMoments.of(x))
        assert row_of(model, "layers.0").error == done.error_fitted

    def test_a_dense_model_that_does_not_fit_is_refused(self):
        model, dense = self.make()
        with pytest.raises(TypeError, match=r"\[summary\] dense must be an nn.Module, got str"):
            summary(model, dense=untyped("dense"))
        dense.layers[0] = nn.Linear(32, 64)
        message = r"\[summary layers\.0\] dense has a weight of \(64, 32\), expected \(64, 64\)"
        with pytest.raises(ValueError, match=message):
            summary(model, dense=dense)
        message = r"\[summary layers\.0\] dense has a BlockSparseLinear there, not an nn.Linear"
        with pytest.raises(ValueError, match=message):
            summary(model, dense=model)
        with pytest.raises(ValueError, match=r"layers\.0\] dense has nothing there"):
            summary(model, dense=nn.Linear(64, 64))


def flatten_dict(model):
    return dict(flatten(model.parameters()))


BAD = [
    (lambda: summary(untyped(mx.ones(3))), TypeError, "model must be an nn.Module, got array"),
    (
        lambda: summary(nn.ReLU(), optimizer_arrays=untyped(1.5)),
        TypeError,
        "optimizer_arrays must be an integer, got 1.5",
    ),
    (
        lambda: summary(nn.ReLU(), optimizer_arrays=-1),
        ValueError,
        r"optimizer_arrays must be in \[0",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[summary\] " + message):
        call()


def test_index_bytes_are_three_integers_a_value_and_grow_where_plain_mlx_computes():
    layer = BlockSparseLinear(1024, 1024, block_size=1, density=0.1)
    bytes_of = lambda: row_of(layer, "").index_bytes
    assert bytes_of() <= 3.1 * layer.weight.nbytes
    before = bytes_of()
    with computing(plain):
        layer(mx.ones((2, 1024)))
    assert bytes_of() > before
