"""set_pattern, schedules and prune: against dense weights that are trained under masks."""

import copy
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import assert_equal, flatten, integers, patterns, random_pattern, to_numpy, trimmed

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.patterns import block_diagonal
from mlx_sparse_nn.surgery.prune import cubic_density, prune
from mlx_sparse_nn.surgery.sparsify import sparsify

ELEMENTWISE = [
    lambda: optim.SGD(0.25, momentum=0.5, weight_decay=0.125),
    lambda: optim.Adam(1e-2),
    lambda: optim.AdamW(1e-2, bias_correction=True),
    lambda: optim.Adamax(1e-2),
    lambda: optim.Adagrad(1e-2),
    lambda: optim.AdaDelta(1e-1),
    lambda: optim.RMSprop(1e-2),
    lambda: optim.Lion(1e-3),
]
OTHERS = [lambda: optim.Adafactor(1e-2, beta_1=0.9), lambda: optim.Muon(1e-2)]


def name_of(make):
    return type(make()).__name__


def layer_of(pattern, seed=0):
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern)
    layer.weight = integers(pattern.data_shape, seed)
    return layer


def dense_layers(block_sizes=(4, 8), bias=True):
    """A model whose layers store every block, with random weights."""
    dims, layers = 32, []
    for block in block_sizes:
        n = dims // block
        full = CSRPattern(np.arange(n + 1) * n, np.tile(np.arange(n), n), (dims, dims), block)
        layers += [BlockSparseLinear(dims, dims, full, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def masks_of(model):
    return [layer.pattern.tomask() for layer in model.layers if "indptr" in layer]


class TestSetPattern:
    @given(st.data())
    def test_common_blocks_keep_their_values_and_new_ones_are_zero(self, data):
        old = data.draw(patterns(fewest=1).filter(lambda p: p.is_canonical))
        new = random_pattern(
            old.grid[0], old.grid[1], old.block_size, seed=data.draw(st.integers(0, 99))
        )
        new = trimmed(new, -old.shape[0], -old.shape[1])
        layer = layer_of(old)
        before = layer.todense()
        source = layer.set_pattern(new)
        assert layer.pattern == new
        assert layer.weight.shape == new.data_shape
        assert layer.indptr.tolist() == new.indptr.tolist()
        assert layer.indices.tolist() == new.indices.tolist()
        assert_equal(layer.todense(), mx.where(new.tomask(), before, 0))
        assert source.shape == (new.n_blocks,)
        for j, i in enumerate(source):
            place = new.row_indices[j], new.indices[j]
            stored = np.flatnonzero((old.row_indices == place[0]) & (old.indices == place[1]))
            assert stored.tolist() == ([] if i < 0 else [i])

    def test_columns_in_any_order(self):
        layer = layer_of(CSRPattern([0, 2, 3], [1, 0, 1], (8, 8), 4))
        before = layer.todense()
        assert layer.set_pattern(CSRPattern([0, 2, 4], [0, 1, 1, 0], (8, 8), 4)).tolist() == [
            1,
            0,
            2,
            -1,
        ]
        assert_equal(layer.todense(), before)

    def test_the_dtype_stays_and_the_indices_stay_frozen(self):
        layer = layer_of(block_diagonal(16, 4))
        layer.set_dtype(mx.bfloat16)
        layer.set_pattern(random_pattern(4, 4, 4))
        layer.unfreeze()
        assert layer.weight.dtype == mx.bfloat16
        assert layer.indptr.dtype == layer.indices.dtype == mx.int32
        assert set(layer.trainable_parameters()) == {"weight", "bias"}

    def test_what_comes_after_it(self):
        """Gradients, checkpoints, copies and refused assignments see the new pattern."""
        layer = layer_of(block_diagonal(16, 4))
        new = random_pattern(4, 4, 4, seed=2)
        layer.set_pattern(new)
        layer.weight = integers(new.data_shape, 1)
        x = integers((3, 16), 2)
        assert_equal(layer(x), x @ layer.todense().T + layer.bias)
        assert_equal(copy.deepcopy(layer)(x), layer(x))
        with pytest.raises(ValueError, match=r"\[BlockSparseLinear\] weight"):
            layer.update({"weight": mx.zeros((1, 4, 4))})
        twin = BlockSparseLinear(16, 16, random_pattern(4, 4, 4, seed=2))
        twin.load_weights(flatten(layer.parameters()))
        assert_equal(twin(x), layer(x))

    @pytest.mark.parametrize(
        ("pattern", "error", "message"),
        [
            ("dense", TypeError, "pattern must be a CSRPattern, got str"),
            (random_pattern(4, 3, 4), ValueError, r"shape \(16, 12\) and block_size 4, expected"),
            (random_pattern(8, 8, 2), ValueError, r"block_size 2, expected \(16, 16\) and 4"),
            (
                CSRPattern([0, 2, 2, 2, 2], [1, 1], (16, 16), 4),
                ValueError,
                r"the pattern stores block \(0, 1\) more than once",
            ),
        ],
    )
    def test_bad_patterns_are_refused(self, pattern, error, message):
        layer = layer_of(block_diagonal(16, 4))
        with pytest.raises(error, match=r"\[BlockSparseLinear\] .*" + message):
            layer.set_pattern(pattern)
        assert layer.pattern == block_diagonal(16, 4)

    @pytest.mark.not_emulated("needs mx.compile")
    def test_a_compiled_step_follows_without_being_compiled_again(self):
        """The same shapes everywhere: one block per row and column, in another order."""
        layer, x = layer_of(block_diagonal(16, 4)), integers((3, 16), 2)
        traces = []

        def forward(x):
            traces.append(1)
            return layer(x), mx.grad(lambda x: (layer(x) ** 2).sum())(x)

        compiled = mx.compile(forward, inputs=layer.state)
        compiled(x)
        for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
            layer.set_pattern(CSRPattern(np.arange(5), order, (16, 16), 4))
            layer.weight = integers(layer.weight.shape, order[0])
            dense = to_numpy(layer.todense())
            y, grad = compiled(x)
            exact = to_numpy(x) @ dense.T + to_numpy(layer.bias)
            np.testing.assert_allclose(to_numpy(y), exact, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(to_numpy(grad), 2 * exact @ dense, rtol=1e-5, atol=1e-5)
        assert len(traces) == 1


class TestCubicDensity:
    def test_values(self):
        schedule = cubic_density(1.0, 0.25, steps=100, start=10)
        expected = [1.0, 1.0, 0.25 + 0.75 / 8, 0.25, 0.25]
        assert [schedule(step) for step in (0, 10, 60, 110, 10**6)] == expected
        assert schedule(mx.array(60, mx.uint64)) == expected[2]
        densities = [schedule(step) for step in range(130)]
        assert densities == sorted(densities, reverse=True)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((2, 0.1, 10), ValueError, r"init must be in \(0, 1\], got 2"),
            ((1, 0, 10), ValueError, r"end must be in \(0, 1\], got 0"),
            ((0.1, 0.2, 10), ValueError, "end must be at most init = 0.1, got 0.2"),
            ((1, 0.1, 0), ValueError, "steps must be in"),
            ((1, 0.1, 1.5), TypeError, "steps must be an integer, got 1.5"),
            ((1, 0.1, 10, -1), ValueError, "start must be in"),
            (("1", 0.1, 10), TypeError, "init must be a number, got '1'"),
        ],
    )
    def test_bad_arguments(self, arguments, error, message):
        with pytest.raises(error, match=r"\[cubic_density\] " + message):
            cubic_density(*arguments)


def keep_largest(weight, block, count, balance):
    """The mask of the blocks to keep, by NumPy: per row, or all together."""
    n_rows, n_cols = weight.shape[0] // block, weight.shape[1] // block
    blocks = np.array(weight).reshape(n_rows, block, n_cols, block)
    scores = np.sqrt((blocks**2).sum(axis=(1, 3)))
    kept = np.zeros((n_rows, n_cols), dtype=bool)
    if balance == "row":
        assert count % n_rows == 0
        for row in range(n_rows):
            kept[row, np.argsort(-scores[row], kind="stable")[: count // n_rows]] = True
    else:
        kept.reshape(-1)[np.argsort(-scores.reshape(-1), kind="stable")[:count]] = True
    return mx.array(np.kron(kept, np.ones((block, block))).astype(bool))


class TestPrune:
    @pytest.mark.parametrize("balance", ["row", "global"])
    def test_it_keeps_the_strongest_blocks(self, balance):
        model = dense_layers()
        before = [layer.todense() for layer in (model.layers[0], model.layers[2])]
        done = prune(model, 0.25, balance=balance)
        for layer, dense in zip((model.layers[0], model.layers[2]), before, strict=True):
            count = layer.pattern.n_blocks
            assert count == 0.25 * (32 // layer.block_size) ** 2
            mask = keep_largest(dense, layer.block_size, count, balance)
            assert_equal(layer.todense(), mx.where(mask, dense, 0))
        assert done.before == {"layers.0": 64, "layers.2": 16}
        assert done.after == {"layers.0": 16, "layers.2": 4}
        assert done.density == 0.25
        for (path, error), dense in zip(done.errors.items(), before, strict=True):
            after = model.layers[int(path[-1])].todense()
            lost, whole = (np.linalg.norm(np.array(a)) for a in (dense - after, dense))
            assert error == pytest.approx(lost / whole, rel=1e-5)
        first, second = (f"{error:.3f}" for error in done.errors.values())
        assert repr(done).splitlines() == [
            "blocks stored: density 0.25 there, 0.273 in all",
            "layer     before  now   kept  error",
            f"layers.0      64   16  25.0%  {first}",
            f"layers.2      16    4  25.0%  {second}",
            "total         80   20  25.0%",
            "error: of the weights, against what they were before",
            "The model's quality is not measured here: evaluate it, and calibrate or fine-tune it.",
        ]

    def test_global_scope_shares_one_budget(self):
        model = dense_layers((8, 8))
        first, second = model.layers[0], model.layers[2]
        first.weight = mx.random.uniform(2, 3, first.weight.shape)
        second.weight = mx.random.uniform(0, 1, second.weight.shape)
        done = prune(model, 0.5, scope="global")
        assert done.after == {"layers.0": 15, "layers.2": 1}  # one is left to the weak layer
        assert done.density == 0.5

    def test_global_scope_is_for_one_block_size(self):
        with pytest.raises(ValueError, match=r"\[prune\] scope 'global' .* one size, got \[4, 8\]"):
            prune(dense_layers((4, 8)), 0.5, scope="global")

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_it_ends_where_sparsify_would(self, scope):
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        twin = copy.deepcopy(model)
        sparsify(model, block_size=8, density=1.0)
        sparsify(twin, block_size=8, density=0.3, scope=scope)
        prune(model, 0.3, scope=scope)
        for layer, other in zip(model.layers[::2], twin.layers[::2], strict=True):
            assert_equal(layer.todense(), other.todense())

    def test_a_layer_never_becomes_denser(self):
        model = nn.Sequential(layer_of(block_diagonal(32, 8)), layer_of(random_pattern(8, 8, 4)))
        weights = [layer.weight for layer in model.layers]
        held = [layer.pattern for layer in model.layers]
        for scope in ("layer", "global"):
            done = prune(model, 1.0, scope=scope)
            assert done.before == done.after
            assert set(done.errors.values()) == {0.0}
        assert [layer.pattern for layer in model.layers] == held
        assert all(
            layer.weight is weight for layer, weight in zip(model.layers, weights, strict=True)
        )
        assert prune(model, 1e-6).after == {"layers.0": 1, "layers.1": 1}

    def test_a_shared_layer_is_pruned_once(self):
        layer = layer_of(block_diagonal(32, 8))
        done = prune(nn.Sequential(layer, nn.ReLU(), layer), 0.05)
        assert list(done.after.values()) == [3]

    def test_scores_by_function_and_name(self):
        layer = layer_of(block_diagonal(16, 4))
        layer.weight = mx.array([1.0, 4, 2, 3])[:, None, None] * mx.ones((4, 4, 4))
        other = copy.deepcopy(layer)
        prune(layer, 0.125, score="max", balance="global")
        assert layer.pattern.row_indices.tolist() == [1, 3]
        prune(other, 0.125, score=lambda blocks: -blocks[:, 0, 0], balance="global")
        assert other.pattern.row_indices.tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"density": 0}, ValueError, r"density must be in \(0, 1\], got 0"),
            ({"density": 1.5}, ValueError, r"density must be in \(0, 1\], got 1.5"),
            ({"density": "all"}, TypeError, "density must be a number, got 'all'"),
            ({"score": "l3"}, ValueError, "score must be one of .* got 'l3'"),
            (
                {"scope": "model"},
                ValueError,
                r"scope must be one of \('layer', 'global'\), got 'model'",
            ),
            ({"balance": "column"}, ValueError, "balance must be one of .* got 'column'"),
            ({"model": nn.Linear(4, 4)}, ValueError, "the model has no BlockSparseLinear"),
            ({"model": "model"}, TypeError, "model must be an nn.Module, got str"),
            ({"optimizer": "adam"}, TypeError, "optimizer must be an mlx Optimizer, got str"),
        ],
    )
    def test_bad_arguments(self, options, error, message):
        options = {"model": dense_layers(), "density": 0.5, **options}
        with pytest.raises(error, match=r"\[prune\] " + message):
            prune(**options)

    def test_nothing_changes_when_a_layer_is_refused(self):
        model = dense_layers()
        model.layers[2].weight = model.layers[2].weight * float("nan")
        before = model.layers[0].pattern
        with pytest.raises(ValueError, match=r"\[prune layers.2\] weights must be finite"):
            prune(model, 0.5)
        repeated = layer_of(CSRPattern([0, 2, 2, 2, 2], [1, 1], (16, 16), 4))
        with pytest.raises(ValueError, match=r"\[prune layers.1\] .* block \(0, 1\) more than"):
            prune(nn.Sequential(model.layers[0], repeated), 0.01)
        assert model.layers[0].pattern == before


def linear_loss(model, x, targets):
    """Linear in the outputs: gradients are exact sums of whole numbers, whatever the weights."""
    return (model(x) * targets).sum()


class Masked(nn.Module):
    """A dense layer and its mask: what a block-sparse one computes, the slow way."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        return x @ self.weight.T + self.bias

    def mask(self, mask, optimizer):
        self.weight = mx.where(mask, self.weight, 0)
        for name, value in optimizer.state["weight"].items():
            optimizer.state["weight"][name] = mx.where(mask, value, 0)


def train_step(model, optimizer, step, mask=None):
    x, targets = integers((6, 32), 10 + step), integers((6, 32), 20 + step)
    grads = nn.value_and_grad(model, linear_loss)(model, x, targets)[1]
    if mask is not None:
        grads["weight"] = mx.where(mask, grads["weight"], 0)
    optimizer.update(model, grads)
    mx.eval(model.parameters(), optimizer.state)


def dense_state(layer, value):
    """Scatter one optimizer state of the weight to the dense shape."""
    twin = BlockSparseLinear(layer.input_dims, layer.output_dims, layer.pattern, bias=False)
    twin.weight = value
    return twin.todense()


class TestOptimizerState:
    @pytest.mark.parametrize("make", ELEMENTWISE, ids=name_of)
    @pytest.mark.parametrize("block", [1, 8])
    def test_training_is_that_of_a_masked_dense_layer(self, make, block):
        """Weights and every moment, bit for bit, through three prunings."""
        n = 32 // block
        full = CSRPattern(np.arange(n + 1) * n, np.tile(np.arange(n), n), (32, 32), block)
        layer, optimizer = BlockSparseLinear(32, 32, full), make()
        dense, dense_optimizer = Masked(layer.todense(), layer.bias), make()
        mask = full.tomask()
        for step, density in enumerate([1.0, 0.75, 0.5, 0.5, 0.25]):
            train_step(layer, optimizer, step)
            train_step(dense, dense_optimizer, step, mask)
            prune(layer, density, optimizer=optimizer)
            assert layer.density == density
            mask = mx.logical_and(
                mask, keep_largest(dense.weight, block, round(density * n * n), "row")
            )
            dense.mask(mask, dense_optimizer)
            assert_equal(layer.pattern.tomask(), mask)
            assert_equal(layer.todense(), dense.weight)
            assert_equal(layer.bias, dense.bias)
            for name, value in optimizer.state["weight"].items():
                assert_equal(dense_state(layer, value), dense_optimizer.state["weight"][name])

    @pytest.mark.parametrize("make", ELEMENTWISE + OTHERS, ids=name_of)
    def test_states_of_every_kind_follow_the_blocks(self, make):
        model, optimizer = dense_layers(), make()
        train_step(model, optimizer, 0)
        layer, state = model.layers[2], optimizer.state["layers"][2]["weight"]
        before = {name: np.array(value) for name, value in state.items()}
        assert before
        places = (layer.pattern.row_indices * 4 + layer.pattern.indices).tolist()
        prune(model, 0.5, optimizer=optimizer)
        kept = [
            places.index(place) for place in layer.pattern.row_indices * 4 + layer.pattern.indices
        ]
        assert state is optimizer.state["layers"][2]["weight"]
        for name, value in state.items():
            np.testing.assert_array_equal(np.array(value), before[name][kept])
        train_step(model, optimizer, 1)
        assert mx.isfinite(layer.weight).all().item()

    def test_an_optimizer_of_several_optimizers(self):
        # MLX 0.32.4 itself fails to merge the updates of layers in a list.
        model: Any = nn.Module()
        model.first, _, model.last = dense_layers().layers
        sgd, lion, adam = parts = optim.SGD(0.1, momentum=0.9), optim.Lion(1e-3), optim.Adam(1e-2)
        filters = [
            lambda path, _: path.endswith("bias"),
            lambda path, _: path.startswith("first"),
        ]
        optimizer = optim.MultiOptimizer(list(parts), filters)

        def step():
            loss = lambda x: model.last(model.first(x)).sum()
            optimizer.update(model, nn.value_and_grad(model, loss)(integers((6, 32)))[1])

        step()
        prune(model, 0.25, optimizer=optimizer)
        assert set(sgd.state["first"]) == {"bias"}
        assert lion.state["first"]["weight"]["m"].shape == (16, 4, 4)
        assert adam.state["last"]["weight"]["v"].shape == (4, 8, 8)
        step()
        mx.eval(model.parameters())

    def test_an_optimizer_that_has_not_been_used(self):
        model, optimizer = dense_layers(), optim.Adam(1e-2)
        prune(model, 0.5, optimizer=optimizer)
        train_step(model, optimizer, 0)
        assert optimizer.state["layers"][0]["weight"]["m"].shape == (32, 4, 4)

    def test_a_frozen_layer_has_no_state_to_move(self):
        model, optimizer = dense_layers(), optim.Adam(1e-2)
        model.layers[0].freeze()
        train_step(model, optimizer, 0)
        assert prune(model, 0.5, optimizer=optimizer).after["layers.0"] == 32
        train_step(model, optimizer, 1)

    def test_states_that_cannot_follow_are_named_and_nothing_changes(self):
        model, optimizer = dense_layers(), optim.Adam(1e-2)
        train_step(model, optimizer, 0)
        before = model.layers[0].pattern
        with pytest.raises(
            ValueError, match=r"\[prune\] .* nothing for weight: pass the optimizer"
        ):
            prune(model.layers[0], 0.5, optimizer=optimizer)
        state: Any = optimizer.state["layers"][2]["weight"]
        state["rows"] = mx.zeros((32,))
        message = r"layers.2.weight holds rows of shape \(32,\).* not run over the 16 blocks"
        with pytest.raises(ValueError, match=message):
            prune(model, 0.5, optimizer=optimizer)
        del state["rows"]
        state["count"] = mx.array(3)  # a number for the whole weight stays as it is
        assert model.layers[0].pattern == before
        prune(model, 0.5, optimizer=optimizer)
        assert state["count"].item() == 3

    @pytest.mark.parametrize("compiled", [False, True])
    def test_gradual_pruning_in_a_training_loop(self, compiled):
        """The compiled loop gives the losses of the plain one, and the model still learns."""
        losses, model = self.loop(compiled)
        expected, other = self.loop(False)
        assert losses == pytest.approx(expected, rel=1e-4)
        for a, b in zip(masks_of(model), masks_of(other), strict=True):
            assert_equal(a, b)
        assert losses[-1] < 0.9 * losses[0]
        assert [layer.density for layer in (model.layers[0], model.layers[2])] == [0.25, 0.25]

    def loop(self, compiled):
        mx.random.seed(1)
        model, optimizer = dense_layers(), optim.Adam(3e-3)
        schedule = cubic_density(1.0, 0.25, steps=20, start=2)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def step(x):
            loss, grads = nn.value_and_grad(model, lambda x: ((model(x) - x) ** 2).mean())(x)
            optimizer.update(model, grads)
            return loss

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        losses = []
        for i in range(40):
            losses.append(step(mx.random.normal((16, 32), key=mx.random.key(i))))
            mx.eval(state, losses)
            if i % 4 == 0:
                prune(model, schedule(i), optimizer=optimizer)
        return [loss.item() for loss in losses], model


def test_the_page_on_pruning(capsys):
    """Its code runs, and prints what its comments say."""
    page = (Path(__file__).parents[2] / "docs" / "sparsify.md").read_text(encoding="utf-8")
    section = page[page.index("## Pruning while training") :]
    blocks, names = re.findall(r"```python\n(.*?)```", section, re.DOTALL), {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert len(blocks) == 2
    for said in (
        "blocks stored: density 0.75 there, 0.753 in all\nlayer     before  now   kept  error\n",
        "layers.0      32   24  75.0%  0.",
        "layers.2      32   24  75.0%  0.",
        "total         64   48  75.0%\n",
        "4 of 16 blocks dropped, and as many grown\n"
        "layer     stored  kept  dropped  grown\n"
        "layers.0       8     6        2      2\n"
        "layers.2       8     6        2      2\n"
        "total         16    12        4      4\n",
    ):
        assert said in printed
        for line in said.splitlines():
            assert line in section
    for picture in re.findall(r"\]\((\w+\.png)\)", section):
        assert (Path(__file__).parents[2] / "docs" / picture).is_file()
