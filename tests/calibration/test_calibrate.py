"""Whole models made sparse by what goes through them."""

import copy
import tracemalloc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from networks import Block, Network, batches, relative_error

from mlx_sparse_nn import BlockSparseLinear, calibrate, layer_moments, sparsify, verify
from mlx_sparse_nn.core.least_squares import DENSE_SHARE

OPTIONS: dict[str, Any] = dict(density=0.5, block_size=8, progress=False)


@pytest.fixture
def model():
    mx.random.seed(0)
    return Network()


def weights(model):
    return dict(tree_flatten(model.parameters()))


def assert_equal(model, other):
    """Assert that two models hold the same bits."""
    a, b = weights(model), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert mx.array_equal(a[name], b[name]), name


def affine(x, wanted):
    """Return weight (n_out, n_in) and bias of the best affine function, by lstsq."""
    ones = np.ones((len(x), 1))
    solution = np.linalg.lstsq(np.concatenate([x, ones], axis=1), wanted, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def test_two_layers_are_those_of_lstsq_one_after_the_other():
    """The second is fitted to what the sparse first gives, and partly to the dense outputs."""
    mx.random.seed(3)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 16))
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2000, 24)) @ (np.eye(24) + 0.3 * rng.normal(size=(24, 24)))).astype("f4")
    data = [mx.array(part) for part in np.split(x, 4)]
    first, second = (
        (np.array(layer.weight, np.float64), np.array(layer.bias, np.float64))
        for layer in model.layers
    )
    calibrate(model, data, blocks=model.layers, damping=0, **OPTIONS)
    x = x.astype(np.float64)
    given, dense = x, x
    for (weight, bias), layer in zip((first, second), model.layers, strict=True):
        wanted = ((1 - DENSE_SHARE) * given + DENSE_SHARE * dense) @ weight.T + bias
        found = np.array(layer.todense(), np.float64), np.array(layer.bias, np.float64)
        best = np.zeros_like(weight), np.zeros_like(bias)
        mask = np.array(layer.pattern.tomask())
        for row in range(len(weight)):
            kept, values = affine(given[:, mask[row]], wanted[:, row : row + 1])
            best[0][row, mask[row]], best[1][row] = kept[0], values[0]
        outputs = given @ best[0].T + best[1]
        assert relative_error(given @ found[0].T + found[1], outputs) < 1e-3
        given, dense = outputs, dense @ weight.T + bias


@pytest.mark.parametrize("in_blocks", [True, False])
def test_a_calibrated_model_computes_almost_what_the_dense_one_does(model, in_blocks):
    data, cut = batches(), copy.deepcopy(model)
    only_layers = lambda path, _: path.startswith("layers")
    sparsify(cut, block_size=8, density=0.5, predicate=only_layers)
    sparse = copy.deepcopy(model)
    blocks = sparse.layers if in_blocks else None
    report = calibrate(sparse, data, blocks=blocks, predicate=only_layers, **OPTIONS)
    new = batches(1, seed=0)[0]
    errors = [relative_error(other(new), model(new)) for other in (cut, sparse)]
    assert errors[1] < 0.5 * errors[0], errors
    assert report.density == pytest.approx(0.5)
    assert len(report.sparse) == 12
    assert all(type(layer) is BlockSparseLinear for layer in report.sparse.values())
    for quality in report.quality.values():
        assert quality.error_fitted < quality.error_kept
        assert quality.n_samples == 600
    assert verify(sparse, new).passed


def test_the_report_says_what_was_done_and_what_was_not(model):
    report = calibrate(model, batches(), blocks=model.layers, **OPTIONS)
    text = str(report)
    assert text.startswith("12 layers made sparse in ")
    assert "density 0.5 there" in text
    assert "layers.0.query  " in text
    assert report.skipped == {
        "first": "it is outside the blocks",
        "last": "output_dims 5 is less than block_size 8",
    }
    assert "first skipped: it is outside the blocks" in text
    few = calibrate(Network(), batches(1, (2, 5, 8)), **OPTIONS)
    assert "had fewer samples than inputs: give more batches" in str(few).replace("\n  ", " ")


def test_layers_of_a_block_see_what_the_sparse_ones_before_them_give(model):
    data = batches()
    calibrate(model, data, blocks=model.layers, **OPTIONS)
    seen = layer_moments(model, data, progress=False)
    assert seen["layers.2.down"].n == 600
    x = mx.concatenate(data)
    assert np.isfinite(np.array(model(x))).all()


@pytest.mark.parametrize("in_blocks", [True, False])
def test_an_interrupted_calibration_goes_on_to_the_same_bits(
    model, tmp_path, in_blocks, monkeypatch
):
    data, whole = batches(), copy.deepcopy(model)
    blocks_of = lambda m: m.layers if in_blocks else None
    expected = calibrate(whole, data, blocks=blocks_of(whole), **OPTIONS)
    before = copy.deepcopy(model)
    from mlx_sparse_nn.calibration import model_fit

    fits, real = [], model_fit.fit_pattern

    def interrupted(*args):
        fits.append(args)
        if len(fits) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(model_fit, "fit_pattern", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, data, blocks=blocks_of(model), resume=tmp_path / "run", **OPTIONS)
    assert_equal(model, before)
    assert model.training
    found = calibrate(model, data, blocks=blocks_of(model), resume=tmp_path / "run", **OPTIONS)
    assert_equal(model, whole)
    n_all = len(expected.sparse)
    assert len(fits) - 7 == n_all - (4 if in_blocks else 6)
    assert list(found.sparse) == list(expected.sparse)
    for path, quality in found.quality.items():
        assert quality.error_fitted == expected.quality[path].error_fitted
    again = copy.deepcopy(before)
    calibrate(again, data, blocks=blocks_of(again), resume=tmp_path / "run", **OPTIONS)
    assert_equal(again, whole)
    assert len(fits) - 7 == n_all - (4 if in_blocks else 6)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(density=0.25), "densities"),
        (dict(block_size=16), "block sizes"),
        (dict(damping=0.1), "damping"),
        (dict(balance="global"), "balances"),
        (dict(blocks=None), "blocks"),
        (dict(batches=batches(seed=5)), "batches"),
    ],
)
def test_a_folder_is_of_one_calibration(model, tmp_path, change, name):
    before = copy.deepcopy(model)

    def calibrated(**change):
        dense = copy.deepcopy(before)
        options: dict[str, Any] = dict(blocks=dense.layers, resume=tmp_path, **OPTIONS) | change
        only = lambda path, _: path.startswith("layers")
        try:
            calibrate(dense, options.pop("batches", batches()), predicate=only, **options)
        except ValueError:
            assert_equal(dense, before)
            raise

    calibrated()
    with pytest.raises(ValueError, match=f"was begun with other {name}: give another folder"):
        calibrated(**change)


def test_a_folder_with_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="holds something else"):
        calibrate(model, batches(), resume=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="is a file"):
        calibrate(model, batches(), resume=tmp_path / "thesis.tex", **OPTIONS)


def test_padding_does_not_count(model):
    """Whatever stands in rows that do not count, the result is the same."""
    data = batches()
    keep = np.random.default_rng(0).random((4, 25)) < 0.7
    results = []
    for noise in (0.0, 100.0):
        padded = [mx.where(mx.array(keep[..., None].tolist()), x, noise) for x in data]
        other = copy.deepcopy(model)
        calibrate(other, padded, blocks=other.layers, rows=lambda batch: keep, **OPTIONS)
        results.append(other)
    assert_equal(*results)


def test_other_arguments_of_blocks_are_kept(model):
    """The scale of each batch reaches the blocks: with none, outputs would be others."""
    data = [(x, mx.array(float(i))) for i, x in enumerate(batches())]
    sparse = copy.deepcopy(model)
    calibrate(sparse, data, blocks=sparse.layers, **OPTIONS)
    by_hand = copy.deepcopy(model)
    calibrate(by_hand, data, blocks=by_hand.layers, call=lambda m, b: m(b[0], b[1]), **OPTIONS)
    assert_equal(sparse, by_hand)
    for x, scale in data[:2]:
        assert relative_error(sparse(x, scale), model(x, scale)) < 0.3


class GivesTuples(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def __call__(self, x, scale=None):
        return self.block(x, scale), {"weights": None}


class WithTuples(Network):
    def __init__(self):
        super().__init__()
        self.layers = [GivesTuples(layer) for layer in self.layers]

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)[0]
        return self.last(x)


def test_blocks_may_give_tuples(model):
    mx.random.seed(0)
    other = WithTuples()
    data = batches()
    calibrate(model, data, blocks=model.layers, **OPTIONS)
    calibrate(other, data, blocks=other.layers, **OPTIONS)
    for layer, wrapped in zip(model.layers, other.layers, strict=True):
        assert_equal(layer, wrapped.block)


def test_densities_by_path(model):
    densities = {"layers.0.up": 0.25, "layers.1.down": 0.75, "layers.2.up": 1.0}
    report = calibrate(
        model, batches(), blocks=model.layers, density=densities, block_size=8, progress=False
    )
    assert {path: p.density for path, p in report.patterns.items()} == {
        "layers.0.up": 0.25,
        "layers.1.down": 0.75,
    }
    assert type(model.layers[2].up) is type(model.layers[0].query) is nn.Linear
    assert "density does not name it" in report.skipped["layers.0.query"]
    assert "its density is 1" in report.skipped["layers.2.up"]
    with pytest.raises(ValueError, match=r"\[calibrate first\] density names it.*outside the blo"):
        calibrate(model, batches(), blocks=model.layers, density={"first": 0.5}, progress=False)
    with pytest.raises(ValueError, match=r"closest is 'layers\.0\.query'"):
        calibrate(model, batches(), density={"layers.0.qeury": 0.5}, progress=False)


def test_modes_dtypes_and_what_is_frozen_stay(model):
    model.set_dtype(mx.bfloat16)
    model.layers[0].up.eval()
    model.layers[0].down.freeze()
    data = [x.astype(mx.bfloat16) for x in batches()]
    calibrate(model, data, blocks=model.layers, **OPTIONS)
    assert model.layers[0].up.weight.dtype == mx.bfloat16
    assert [model.layers[0].up.training, model.layers[0].query.training] == [False, True]
    assert not model.layers[0].down.trainable_parameters()
    assert model.layers[0].up.trainable_parameters()


def test_a_generator_of_batches_and_a_layer_at_two_paths():
    mx.random.seed(0)
    model = Network()
    model.layers[0].key = model.layers[0].query
    report = calibrate(model, (x for x in batches()), blocks=model.layers, **OPTIONS)
    assert model.layers[0].key is model.layers[0].query
    assert len(report.sparse) == 11
    assert "layers.0.key" in {path for path, _ in model.named_modules()}


def test_a_layer_that_nothing_reaches_stays_dense():
    mx.random.seed(0)
    model = Network()
    model.layers[1].spare = nn.Linear(32, 32)
    for blocks in (model.layers, None):
        other = copy.deepcopy(model)
        blocks = other.layers if blocks else None
        report = calibrate(other, batches(), blocks=blocks, **OPTIONS)
        assert report.skipped["layers.1.spare"].startswith("no token that counts went into")
        assert type(other.layers[1].spare) is nn.Linear


def test_a_layer_that_gets_only_zeros_stays_dense(model):
    model.layers[1].up.weight, model.layers[1].up.bias = mx.zeros((64, 32)), mx.zeros((64,))
    for blocks in (True, False):
        other = copy.deepcopy(model)
        report = calibrate(other, batches(), blocks=other.layers if blocks else None, **OPTIONS)
        assert report.skipped["layers.1.down"].endswith("or only zeros")
        assert "layers.2.down" in report.sparse


def test_features_whose_mean_is_large_lose_nothing():
    """Temperatures in kelvin, years: what varies is a thousandth of what is there."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
    rng = np.random.default_rng(0)
    mean, spread = np.array([300, 1013, 2026, 50] * 4), np.array([3, 5, 0.5, 2] * 4)
    data = [mx.array((mean + spread * rng.normal(size=(512, 16))).astype("f4")) for _ in range(4)]
    sparse, cut = copy.deepcopy(model), copy.deepcopy(model)
    calibrate(sparse, data, density=0.5, block_size=8, progress=False)
    sparsify(cut, density=0.5, block_size=8)
    wanted = np.array(model(data[0]), np.float64)
    varying = np.linalg.norm(wanted - wanted.mean(axis=0))
    errors = [np.linalg.norm(np.array(m(data[0])) - wanted) / varying for m in (sparse, cut)]
    assert errors[0] < 0.8 < 5 < errors[1], errors


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e20])
def test_the_unit_of_the_inputs_changes_no_digit(size):
    mx.random.seed(0)
    linear = nn.Linear(32, 32)
    model = nn.Sequential(linear)
    x = batches(1, (1, 200, 32))[0]
    results = []
    for unit in (1.0, size):
        other = copy.deepcopy(model)
        calibrate(other, [x * unit], **OPTIONS)
        results.append(other.layers[0])
    assert results[0].pattern == results[1].pattern
    assert relative_error(results[1].weight, results[0].weight) < 1e-3


def test_one_token_keeps_the_values_and_moves_the_bias():
    mx.random.seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32)), mx.random.normal((1, 32))
    sparse = copy.deepcopy(model)
    calibrate(sparse, [x], **OPTIONS)
    same = BlockSparseLinear.from_linear(model.layers[0], pattern=sparse.layers[0].pattern)
    assert relative_error(sparse.layers[0].weight, same.weight) < 1e-5
    assert relative_error(sparse(x), model(x)) < 1e-5


def test_a_layer_that_is_called_outside_the_blocks_too_stays_dense(model):
    model.twin = model.layers[0].up
    report = calibrate(model, batches(), blocks=model.layers, **OPTIONS)
    assert report.skipped["layers.0.up"] == "it is called outside the blocks too"
    assert type(model.twin) is nn.Linear
    assert "layers.0.down" in report.sparse


class Anything:
    """A batch of the user's own kind."""

    def __init__(self, x):
        self.x = x


def test_other_data_in_objects_of_any_kind_are_seen(model, tmp_path):
    for blocks in (True, False):
        folder = tmp_path / str(blocks)
        for seed, refused in ((0, False), (0, False), (5, True)):
            other = copy.deepcopy(model)
            data = [Anything(x) for x in batches(seed=seed)]
            blocks_of = other.layers if blocks else None
            options: dict[str, Any] = dict(blocks=blocks_of, resume=folder, **OPTIONS)
            run = lambda other=other, data=data, options=options: calibrate(
                other, data, call=lambda m, batch: m(batch.x), **options
            )
            if refused:
                with pytest.raises(ValueError, match="was begun with other batches"):
                    run()
            else:
                run()


def test_a_damaged_folder_names_the_file(model, tmp_path):
    options: dict[str, Any] = dict(blocks=model.layers, resume=tmp_path, **OPTIONS)
    options["blocks"] = None
    calibrate(copy.deepcopy(model), batches(), **options)
    (tmp_path / "stage-0001.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"resume cannot read .*stage-0001.safetensors: delete it"):
        calibrate(model, batches(), **options)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"resume cannot read .*plan.json: delete it"):
        calibrate(model, batches(), **options)


@pytest.mark.not_emulated("needs mx.compile")
def test_a_call_that_does_not_call_the_layers_says_so(model):
    for call in (lambda m, x: x, mx.compile(lambda m, x: x)):
        with pytest.raises(ValueError, match="call must run the layers on tokens that count"):
            calibrate(model, batches(), call=call, **OPTIONS)
    compiled = mx.compile(lambda x: model(x))
    with pytest.raises(ValueError, match=r"not through mx\.compile"):
        layer_moments(model, batches(), call=lambda m, x: compiled(x), progress=False)


def test_results_are_evaluated(model):
    """They may be read in another thread than that of the calibration."""
    import threading

    data = batches()
    mx.eval(model.parameters(), data)
    thread = threading.Thread(target=lambda: calibrate(model, data, **OPTIONS))
    thread.start()
    thread.join()
    assert np.isfinite(np.array(model.layers[0].up.weight)).all()


def test_an_error_on_the_way_leaves_the_model_as_it_was(model):
    model.layers[2].up.weight = model.layers[2].up.weight * float("inf")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"\[calibrate layers\.2\.up\] weight must be finite"):
        calibrate(model, batches(), blocks=model.layers, **OPTIONS)
    assert_equal(model, before)
    assert all(type(layer.up) is nn.Linear for layer in model.layers)


def test_few_samples_without_damping_name_the_layer(model):
    with pytest.raises(ValueError, match=r"layers\.0\.\w+\] moments are not positive definite, of"):
        calibrate(model, batches(1, (1, 5, 8)), blocks=model.layers, damping=0, **OPTIONS)


class Branching(Network):
    """Blocks that do not run one after another."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __call__(self, x):
        x = self.first(x)
        if self.kind == "scaled between":
            for layer in self.layers:
                x = 2 * layer(x)
        elif self.kind == "side by side":
            x = mx.stack([layer(x) for layer in self.layers]).sum(axis=0)
        elif self.kind == "backwards":
            for layer in reversed(self.layers):
                x = layer(x)
        elif self.kind == "twice":
            x = self.layers[0](self.layers[0](x))
        elif self.kind == "by name":
            for layer in self.layers:
                x = layer(x=x)
        elif self.kind == "a cache":
            for layer in self.layers:
                x = layer(x, Cache())
        else:
            x = self.layers[0](x)
        return self.last(x)


class Cache:
    def update_and_fetch(self):
        return None


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("scaled between", "block 1 is not called with what block 0 gives"),
        ("side by side", "block 1 is not called with what block 0 gives"),
        ("backwards", "block 2 is called where block 0 should be"),
        ("twice", "block 0 is called where block 1 should be"),
        ("by name", "block 0 is called with x by name"),
        ("a cache", "called with a Cache: let call run the model without a cache"),
        ("not all", "called 1 of 3 for batch 0"),
    ],
)
def test_blocks_that_are_no_chain_are_refused(kind, error):
    model = Branching(kind)
    with pytest.raises((TypeError, ValueError), match=error):
        calibrate(model, batches(), blocks=model.layers, **OPTIONS)
    assert all(type(layer) is Block for layer in model.layers)


def test_memory_does_not_grow_with_the_number_of_blocks():
    """One block's inputs for all batches, twice, and one pair of matrices: whatever the depth."""

    def peaks(n_blocks):
        mx.random.seed(0)
        model, data = Network(256, n_blocks), batches(4, (2, 64, 8))
        mx.eval(model.parameters())
        only = lambda path, _: path.endswith(("up", "down"))
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        tracemalloc.start()
        calibrate(model, data, blocks=model.layers, predicate=only, **OPTIONS)
        host = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return host, mx.get_peak_memory() - held

    (host, device), (host_deep, device_deep) = peaks(2), peaks(6)
    new_weights = 4 * 4 * 256 * 512 * 2 * 0.5  # of four blocks more, two layers each, in bytes
    assert host_deep < 1.2 * host
    assert device_deep < device + 1.3 * new_weights
    matrix = 8 * 512**2  # of the inputs of down
    assert host < 14 * matrix
