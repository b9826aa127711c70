"""sparsify and densify with an optimizer that has been used: its moments follow the blocks."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from support import assert_equal, integers
from test_prune import ELEMENTWISE, Masked, dense_state, name_of, train_step

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.surgery.sparsify import densify, sparsify

ADAFACTORS = [lambda: optim.Adafactor(1e-2), lambda: optim.Adafactor(1e-2, beta_1=0.9)]


def make_model():
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))


class TestSparsify:
    @pytest.mark.parametrize("make", ELEMENTWISE, ids=name_of)
    @pytest.mark.parametrize("block", [1, 8])
    def test_training_goes_on_as_that_of_the_masked_dense_layer(self, make, block):
        """Weights and every moment, bit for bit."""
        model, optimizer = nn.Sequential(nn.Linear(32, 32)), make()
        dense, dense_optimizer = Masked(model.layers[0].weight, model.layers[0].bias), make()
        for step in range(2):
            train_step(model, optimizer, step)
            train_step(dense, dense_optimizer, step)
        sparsify(model, block_size=block, density=0.4, optimizer=optimizer)
        layer, state = model.layers[0], optimizer.state["layers"][0]["weight"]
        mask = layer.pattern.tomask()
        dense.mask(mask, dense_optimizer)
        for step in range(2, 5):
            assert_equal(layer.todense(), dense.weight)
            assert_equal(layer.bias, dense.bias)
            assert state.keys() == dense_optimizer.state["weight"].keys()
            for name, value in dense_optimizer.state["weight"].items():
                assert_equal(dense_state(layer, state[name]), value)
            train_step(model, optimizer, step)
            train_step(dense, dense_optimizer, step, mask)
        assert optimizer.step.item() == dense_optimizer.step.item() == 5

    @pytest.mark.parametrize("make", [*ELEMENTWISE[1:2], lambda: optim.Muon(1e-2)], ids=name_of)
    def test_the_moments_are_those_of_the_blocks(self, make):
        model, optimizer = make_model(), make()
        train_step(model, optimizer, 0)
        before = {k: mx.array(v) for k, v in optimizer.state["layers"][2]["weight"].items()}
        done = sparsify(model, block_size=8, density=0.5, optimizer=optimizer)
        pattern = done.sparse["layers.2"].pattern
        assert before
        for name, value in optimizer.state["layers"][2]["weight"].items():
            for j, (r, c) in enumerate(zip(pattern.row_indices, pattern.indices, strict=True)):
                place = slice(8 * r, 8 * r + 8), slice(8 * c, 8 * c + 8)
                assert_equal(value[j], before[name][place])
        train_step(model, optimizer, 1)
        assert mx.isfinite(model.layers[2].weight).all().item()

    @pytest.mark.parametrize("make", ADAFACTORS, ids=name_of)
    @pytest.mark.parametrize("used", [True, False])
    def test_means_over_rows_and_columns_are_refused(self, make, used):
        model, optimizer = make_model(), make()
        if not used:  # then there is nothing to follow
            sparsify(model, block_size=8, density=0.5, optimizer=optimizer)
            train_step(model, optimizer, 0)
            return
        train_step(model, optimizer, 0)
        kinds = [type(layer) for layer in model.layers]
        message = (
            r"\[sparsify\] optimizer.state of layers.0.weight holds exp_avg_sq_row of shape "
            r"\(32,\), not the weight's \(32, 32\): it cannot follow; make the optimizer after"
        )
        with pytest.raises(ValueError, match=message):
            sparsify(model, block_size=8, optimizer=optimizer)
        assert [type(layer) for layer in model.layers] == kinds
        train_step(model, optimizer, 1)
        sparsify(model, block_size=8)
        train_step(model, make(), 2)

    def test_a_skipped_layer_keeps_its_state_and_a_frozen_one_has_none(self):
        model, optimizer = make_model(), optim.Adam(1e-2)
        model.layers[0].freeze()
        train_step(model, optimizer, 0)
        before = optimizer.state["layers"][2]["weight"]["m"]
        keep = lambda path, _: path != "layers.2"
        assert list(sparsify(model, block_size=8, predicate=keep, optimizer=optimizer).sparse) == [
            "layers.0"
        ]
        assert optimizer.state["layers"][2]["weight"]["m"] is before
        train_step(model, optimizer, 1)

    def test_the_schedule_and_a_number_for_the_whole_weight_go_on(self):
        schedule = optim.linear_schedule(1e-2, 1e-3, 10)
        model, optimizer = make_model(), optim.Adam(schedule)
        for step in range(3):
            train_step(model, optimizer, step)
        state: Any = optimizer.state["layers"][0]["weight"]
        state["count"] = mx.array(3)
        sparsify(model, block_size=8, optimizer=optimizer)
        assert state["count"].item() == 3
        train_step(model, optimizer, 3)
        assert optimizer.learning_rate.item() == pytest.approx(schedule(mx.array(3)).item())

    def test_an_optimizer_of_another_model_is_refused(self):
        model, other, optimizer = make_model(), make_model(), optim.Adam(1e-2)
        wrapped: Any = nn.Module()
        wrapped.inner = other
        loss = lambda x: wrapped.inner(x).sum()
        optimizer.update(wrapped, nn.value_and_grad(wrapped, loss)(integers((6, 32)))[1])
        with pytest.raises(
            ValueError, match=r"\[sparsify\] optimizer.state has nothing for layers"
        ):
            sparsify(model, block_size=8, optimizer=optimizer)
        assert type(model.layers[0]) is nn.Linear

    def test_a_compiled_step_goes_on(self):
        model, optimizer = make_model(), optim.Adam(1e-2)
        optimizer.init(model.trainable_parameters())
        twin, twin_optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
        state = [model.state, optimizer.state]

        def step(x):
            loss, grads = nn.value_and_grad(model, lambda x: ((model(x) - x) ** 2).mean())(x)
            optimizer.update(model, grads)
            return loss

        compiled = mx.compile(step, inputs=state, outputs=state)
        x = mx.random.normal((8, 32))
        losses, expected = [], []
        for i in range(8):
            losses.append(compiled(x).item())
            loss = lambda x: ((twin(x) - x) ** 2).mean()
            value, grads = nn.value_and_grad(twin, loss)(x)
            twin_optimizer.update(twin, grads)
            expected.append(value.item())
            if i == 3:
                sparsify(model, block_size=8, density=0.5, optimizer=optimizer)
                sparsify(twin, block_size=8, density=0.5, optimizer=twin_optimizer)
            if i == 5:
                densify(model, optimizer=optimizer)
                densify(twin, optimizer=twin_optimizer)
        assert losses == pytest.approx(expected, rel=1e-4)


class Named(nn.Module):
    """MLX 0.32.4 itself fails to merge a MultiOptimizer's updates of layers in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def __call__(self, x):
        return self.last(nn.relu(self.first(x)))


class TestMultiOptimizer:
    def step(self, model, optimizer):
        loss = lambda x: model(x).square().mean()
        optimizer.update(model, nn.value_and_grad(model, loss)(integers((6, 32)))[1])
        mx.eval(model.parameters(), optimizer.state)

    def test_each_part_follows(self):
        model, (lion, adam) = Named(), (optim.Lion(1e-3), optim.Adam(1e-2))
        optimizer = optim.MultiOptimizer([lion, adam], [lambda path, _: "first" in path])
        self.step(model, optimizer)
        sparsify(model, block_size=8, density=0.25, optimizer=optimizer)
        assert lion.state["first"]["weight"]["m"].shape == (4, 8, 8)
        assert adam.state["last"]["weight"]["v"].shape == (4, 8, 8)
        self.step(model, optimizer)
        densify(model, optimizer=optimizer)
        assert adam.state["last"]["weight"]["v"].shape == (32, 32)
        self.step(model, optimizer)

    def test_a_filter_by_axes_is_refused(self):
        """The usual one: Muon for matrices, Adam for the rest."""
        model = Named()
        optimizer = optim.MultiOptimizer(
            [optim.Muon(1e-2), optim.Adam(1e-2)], [lambda _, weight: weight.ndim == 2]
        )
        self.step(model, optimizer)
        message = (
            r"\[sparsify\] a filter of the MultiOptimizer gives first.weight of shape \(4, 8, 8\) "
            r"to another optimizer than of shape \(32, 32\)"
        )
        with pytest.raises(ValueError, match=message):
            sparsify(model, block_size=8, density=0.25, optimizer=optimizer)
        assert type(model.first) is nn.Linear
        self.step(model, optimizer)


class TestDensify:
    @pytest.mark.parametrize("make", ELEMENTWISE, ids=name_of)
    @pytest.mark.parametrize("block", [1, 8])
    def test_training_goes_on_with_zeros_where_nothing_was_stored(self, make, block):
        model, optimizer = make_model(), make()
        sparsify(model, block_size=block, density=0.4)
        train_step(model, optimizer, 0)
        layers = [model.layers[0], model.layers[2]]
        expected = [
            {name: dense_state(layer, value) for name, value in state["weight"].items()}
            for layer, state in zip(layers, optimizer.state["layers"][::2], strict=True)
        ]
        densify(model, optimizer=optimizer)
        for of_layer, state in zip(expected, optimizer.state["layers"][::2], strict=True):
            assert state["weight"].keys() == of_layer.keys()
            for name, value in of_layer.items():
                assert_equal(state["weight"][name], value)
        train_step(model, optimizer, 1)
        assert all(mx.isfinite(layer.weight).all().item() for layer in model.layers[::2])

    def test_there_and_back_with_all_blocks_changes_nothing(self):
        model, optimizer = make_model(), optim.AdamW(1e-2)
        train_step(model, optimizer, 0)
        twin, twin_optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
        sparsify(model, block_size=8, density=1.0, optimizer=optimizer)
        densify(model, optimizer=optimizer)
        for step in (1, 2):
            train_step(model, optimizer, step)
            train_step(twin, twin_optimizer, step)
        assert_equal(model.layers[0].weight, twin.layers[0].weight)

    def test_repeated_blocks_are_refused(self):
        pattern = CSRPattern([0, 2, 2], [1, 1], (32, 32), 16)
        model, optimizer = nn.Sequential(BlockSparseLinear(32, 32, pattern)), optim.Adam(1e-2)
        train_step(model, optimizer, 0)
        with pytest.raises(ValueError, match=r"\[densify\] .* block \(0, 1\) more than once"):
            densify(model, optimizer=optimizer)
        assert type(model.layers[0]) is BlockSparseLinear
        densify(model)

    @pytest.mark.parametrize("call", [sparsify, densify])
    def test_what_is_no_optimizer_is_refused(self, call):
        model = nn.Sequential(nn.Linear(32, 32), BlockSparseLinear(32, 32))
        with pytest.raises(TypeError, match="optimizer must be an mlx Optimizer, got str"):
            call(model, optimizer="adam")
