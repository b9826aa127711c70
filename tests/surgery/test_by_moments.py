"""Surgery by the moments of inputs, against NumPy's least squares on the inputs themselves."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from support import assert_equal, to_numpy, untyped

from mlx_sparse_nn import BlockSparseLinear, prune, sparsify
from mlx_sparse_nn.core.moments import InputMoments

SIZE, N = 4, 400
EXACT: Any = {"damping": 0.0}  # as NumPy's least squares


def samples(n_in, seed):
    """Inputs that are correlated, and not centred."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(N, n_in)) @ rng.normal(size=(n_in, n_in)) / np.sqrt(n_in)
    return (mixed + rng.normal(size=n_in)).astype(np.float32)


def make_model(bias=True):
    mx.random.seed(3)
    model = nn.Sequential(nn.Linear(18, 12, bias=bias), nn.Linear(12, 10, bias=bias))
    inputs = {"layers.0": samples(18, 0), "layers.1": samples(12, 1)}
    moments = {path: InputMoments.of(mx.array(x)) for path, x in inputs.items()}
    return model, inputs, moments


def best(x, weight, columns, bias):
    """Return the residual of the best outputs from some columns of x, and their weights."""
    design = x[:, columns].astype(np.float64)
    if bias:
        design = np.concatenate([design, np.ones((len(x), 1))], axis=1)
    target = x.astype(np.float64) @ weight.T
    found = np.zeros((0, target.shape[1]))
    if design.size:
        found = np.linalg.lstsq(design, target, rcond=None)[0]
    return target - design @ found, found.T


def rises(x, weight, mask, bias):
    """Return how much the squares of the residual rise without each block, for the mask (R, C)."""
    energy, rise = np.sum((x.astype(np.float64) @ weight.T) ** 2), np.full(mask.shape, np.nan)
    columns_of = lambda stay: np.flatnonzero(np.repeat(stay, SIZE)[: x.shape[1]])
    for r, row in enumerate(mask):
        rows = weight[r * SIZE : (r + 1) * SIZE]
        now = np.sum(best(x, rows, columns_of(row), bias)[0] ** 2)
        for c in np.flatnonzero(row):
            less = row & (np.arange(len(row)) != c)
            rise[r, c] = (np.sum(best(x, rows, columns_of(less), bias)[0] ** 2) - now) / energy
    return rise


def stored(layer):
    mask = np.zeros(layer.pattern.grid, bool)
    mask[layer.pattern.row_indices, layer.pattern.indices] = True
    return mask


def check_fitted(layer, x, weight, old_bias):
    """Its values are those of NumPy's least squares on the columns that each row keeps."""
    bias, dense, found = old_bias is not None, to_numpy(layer.todense()), []
    for r, row in enumerate(stored(layer)):
        columns = np.flatnonzero(np.repeat(row, SIZE)[: x.shape[1]])
        rows = slice(r * SIZE, (r + 1) * SIZE)
        residual, expected = best(x, weight[rows], columns, bias)
        np.testing.assert_allclose(dense[rows, columns], expected[:, : columns.size], atol=2e-4)
        if bias:
            change = to_numpy(layer.bias)[rows] - old_bias[rows]
            np.testing.assert_allclose(change, expected[:, -1], atol=2e-4)
        found.append(residual)
    lost = np.linalg.norm(np.concatenate(found, axis=1))
    return lost / np.linalg.norm(x.astype(np.float64) @ weight.T)


class TestSparsify:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scope", ["layer", "global", "erdos-renyi"])
    def test_it_keeps_what_outputs_need_and_fits_it(self, scope, bias):
        model, inputs, moments = make_model(bias)
        dense = copy.deepcopy(model)
        done = sparsify(
            model,
            block_size=SIZE,
            density=0.5,
            scope=scope,
            balance="global",
            moments=moments,
            **EXACT,
        )
        kept, lost = [], []
        for i, (path, x) in enumerate(inputs.items()):
            layer, linear = model.layers[i], dense.layers[i]
            weight, old_bias = to_numpy(linear.weight), to_numpy(linear.bias) if bias else None
            mask = stored(layer)
            rise = rises(x, weight, np.ones_like(mask), bias)
            assert rise[mask].min() > rise[~mask].max()
            kept.append(rise[mask].min())
            lost.append(rise[~mask].max())
            error = check_fitted(layer, x, weight, old_bias)
            assert done.errors[path] == pytest.approx(error, rel=1e-3)
            assert layer.output_error == done.errors[path]
            assert layer.weight_error is None
        if scope == "global":
            assert min(kept) > max(lost)

    def test_it_is_from_linear_layer_by_layer(self):
        model, _, moments = make_model()
        dense = copy.deepcopy(model)
        sparsify(model, block_size=SIZE, density=0.5, moments=moments)
        for layer, linear, of_layer in zip(
            model.layers, dense.layers, moments.values(), strict=True
        ):
            alone = BlockSparseLinear.from_linear(
                linear, block_size=SIZE, density=0.5, moments=of_layer
            )
            assert alone.pattern == layer.pattern
            assert_equal(alone.weight, layer.weight)
            assert_equal(alone.bias, layer.bias)
            assert alone.output_error == layer.output_error

    def test_the_header_says_that_errors_are_of_outputs(self):
        model, _, moments = make_model()
        lines = repr(sparsify(model, block_size=SIZE, density=0.5, moments=moments)).splitlines()
        assert lines[1].endswith("output error")
        assert "output error: of each layer by itself, over the samples of calibration" in lines

    def test_fitted_values_lose_less_than_kept_ones(self):
        model, inputs, moments = make_model()
        plain = copy.deepcopy(model)
        dense = copy.deepcopy(model)
        sparsify(plain, block_size=SIZE, density=0.5)
        done = sparsify(model, block_size=SIZE, density=0.5, score="l2", moments=moments)
        for i, (path, x) in enumerate(inputs.items()):
            assert model.layers[i].pattern == plain.layers[i].pattern
            y = dense.layers[i](mx.array(x)) - dense.layers[i].bias
            lost = plain.layers[i](mx.array(x)) - dense.layers[i](mx.array(x))
            assert done.errors[path] < 0.9 * np.linalg.norm(lost) / np.linalg.norm(y)

    def test_a_score_of_ones_own_sees_the_moments(self):
        model, _, moments = make_model()
        seen = {}

        def wanda(blocks, places):
            seen[places.path] = places.moments
            return mx.abs(blocks).sum(axis=(1, 2))

        sparsify(model, block_size=SIZE, score=wanda, scope="global", moments=moments)
        prune(model, 0.05, score=wanda, moments=moments)
        assert seen == moments

    def test_only_layers_that_become_sparse_need_moments(self):
        model, _, moments = make_model()
        one = {"layers.1": moments["layers.1"]}
        message = r"\[sparsify layers\.0\] moments has nothing for it.*: leave it out"
        with pytest.raises(ValueError, match=message):
            sparsify(model, block_size=SIZE, moments=one)
        done = sparsify(model, block_size=SIZE, density={"layers.1": 0.5}, moments=one)
        assert list(done.sparse) == ["layers.1"]

    def test_a_shared_layer_has_them_at_any_path(self):
        shared = nn.Linear(12, 12)
        model = nn.Sequential(shared, shared)
        moments = {"layers.1": InputMoments.of(mx.array(samples(12, 1)))}
        done = sparsify(model, block_size=SIZE, density=0.5, moments=moments)
        assert done.errors["layers.0"] == done.errors["layers.1"] > 0
        assert prune(model, 0.3, moments=moments).errors["layers.0"] > 0


class TestPrune:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scope", ["layer", "global"])
    @pytest.mark.parametrize("density", [0.8, 0.4])  # most inputs are stored, or few
    def test_it_drops_what_the_other_stored_blocks_make_up_for(self, density, scope, bias):
        model, inputs, moments = make_model(bias)
        sparsify(model, block_size=SIZE, density=density, balance="global")
        before = copy.deepcopy(model)
        done = prune(model, density / 2, balance="global", scope=scope, moments=moments, **EXACT)
        kept, lost = [], []
        for i, (path, x) in enumerate(inputs.items()):
            old, layer = before.layers[i], model.layers[i]
            weight, old_bias = to_numpy(old.todense()), to_numpy(old.bias) if bias else None
            rise, mask = rises(x, weight, stored(old), bias), stored(layer)
            dropped = stored(old) & ~mask
            assert not (mask & ~stored(old)).any()
            assert rise[mask].min() > rise[dropped].max(initial=0)
            kept.append(rise[mask].min())
            lost.append(rise[dropped].max(initial=0))
            error = check_fitted(layer, x, weight, old_bias)
            assert done.errors[path] == pytest.approx(error, rel=1e-3)
            assert layer.output_error is None  # it would be against what was there before
        if scope == "global":
            assert min(kept) > max(lost)
        assert done.error_of == "outputs"
        lines = repr(done).splitlines()
        assert lines[1].endswith("output error")
        assert "error: of the outputs, against what they were before" in lines

    def test_from_all_blocks_it_ends_where_sparsify_does(self):
        model, _, moments = make_model()
        other = copy.deepcopy(model)
        sparsify(other, block_size=SIZE, density=0.4, moments=moments)
        sparsify(model, block_size=SIZE, density=1.0)
        prune(model, 0.4, moments=moments)
        for a, b in zip(model.layers, other.layers, strict=True):
            assert a.pattern == b.pattern
            assert_equal(a.weight, b.weight)
            assert_equal(a.bias, b.bias)

    def test_layers_that_lose_nothing_keep_their_values(self):
        model, _, moments = make_model()
        sparsify(model, block_size=SIZE, density=0.5)
        weights = [layer.weight for layer in model.layers]
        done = prune(model, {"layers.0": 0.25}, moments={"layers.0": moments["layers.0"]})
        assert model.layers[1].weight is weights[1]
        assert done.errors["layers.1"] == 0

    def test_the_optimizer_follows(self):
        model, inputs, moments = make_model()
        sparsify(model, block_size=SIZE, density=0.8)
        optimizer = optim.Adam(1e-3)
        x = mx.array(inputs["layers.0"])
        step = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())
        optimizer.update(model, step(x)[1])
        prune(model, 0.4, moments=moments, optimizer=optimizer)
        optimizer.update(model, step(x)[1])
        mx.eval(model.parameters())
        assert optimizer.state["layers"][0]["weight"]["m"].shape == model.layers[0].weight.shape

    def test_scalars(self):
        layer = BlockSparseLinear.from_linear(nn.Linear(18, 5), block_size=1, density=0.8)
        moments = {"": InputMoments.of(mx.array(samples(18, 0)))}
        error = prune(layer, 0.5, moments=moments).errors[""]
        assert 0 < error < 1
        assert layer.weight.shape == (45,)


def prepared():
    model, _, moments = make_model()
    sparse = copy.deepcopy(model)
    sparsify(sparse, block_size=SIZE, density=0.5)
    return {"sparsify": model, "prune": sparse}, moments


def call(owner, model, **options):
    if owner == "sparsify":
        return sparsify(model, block_size=SIZE, density=0.3, **options)
    return prune(model, 0.3, **options)


SINGULAR = InputMoments(np.ones((18, 18)), np.ones(18), 1)
BAD = [
    (
        {"moments": [1]},
        TypeError,
        r"\] moments must be a mapping of Inp.* got list",
    ),
    ({"moments": {}}, ValueError, r" layers\.0\] moments has nothing for it"),
    (
        {"moments": {"layers.0": 1}},
        TypeError,
        r" layers\.0\] moments must be Inp.* got int",
    ),
    ({"damping": 0.1}, ValueError, r"\] damping must be left out, got 0.1: it is for moments"),
    ({"score": "obs"}, ValueError, r"\] score 'obs' needs moments: layer_moments\(model, b"),
    ({"moments": {}, "damping": -1}, ValueError, r"\] damping must be at least 0"),
    ({"moments": {}, "score": "l3"}, ValueError, r"\] score must be one of .* got 'l3'"),
]


@pytest.mark.parametrize("owner", ["sparsify", "prune"])
@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments_are_refused(owner, options, error, message):
    with pytest.raises(error, match=rf"^\[{owner}" + message):
        call(owner, prepared()[0][owner], **untyped(options))


@pytest.mark.parametrize("owner", ["sparsify", "prune"])
def test_moments_that_do_not_fit_change_nothing(owner):
    """The second layer is wrong; the first could have been changed by then."""
    models, moments = prepared()
    model, held = models[owner], list(models[owner].layers)
    weights = [layer.weight for layer in held]
    wrong = {**moments, "layers.1": moments["layers.0"]}
    with pytest.raises(ValueError, match=r"layers\.1\] moments are of 18 features, but input_di"):
        call(owner, model, moments=wrong)
    none = {**moments, "layers.1": InputMoments(np.zeros((12, 12)), np.zeros(12), 1)}
    with pytest.raises(ValueError, match=r"layers\.1\] moments are of inputs that are all zero"):
        call(owner, model, moments=none)
    with pytest.raises(ValueError, match=r"layers\.0\] moments are not positive definite"):
        call(owner, model, moments={**moments, "layers.0": SINGULAR}, damping=0.0)
    assert all(a is b for a, b in zip(model.layers, held, strict=True))
    assert all(layer.weight is w for layer, w in zip(held, weights, strict=True))
