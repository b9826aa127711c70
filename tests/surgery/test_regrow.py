"""regrow and activations: against the full dense gradient, and dense training under masks."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.nn.utils import checkpoint
from support import assert_equal, integers, random_pattern
from test_prune import (
    ELEMENTWISE,
    OTHERS,
    Masked,
    dense_state,
    layer_of,
    linear_loss,
    name_of,
    train_step,
)

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.patterns import block_diagonal, random
from mlx_sparse_nn.surgery import regrow as regrow_module
from mlx_sparse_nn.surgery.regrow import activations, regrow


def ordered_places(pattern):
    return list(zip(pattern.row_indices.tolist(), pattern.indices.tolist(), strict=True))


def places_of(pattern):
    return set(ordered_places(pattern))


def block_norms(dense, block, order=2):
    n_rows, n_cols = dense.shape[0] // block, dense.shape[1] // block
    blocks = np.array(dense).reshape(n_rows, block, n_cols, block)
    powers = np.abs(blocks) ** order
    return powers.sum(axis=(1, 3)) ** (1 / order)


def expected_change(layer, gradient, count, order=2):
    """The places to drop and to grow by full sorts of the dense weight and the dense gradient."""
    block, stored = layer.block_size, sorted(places_of(layer.pattern))
    strength = block_norms(layer.todense(), block, order)
    slope = block_norms(gradient, block, order)
    last_first = sorted(stored, key=lambda place: (strength[place], [-k for k in place]))
    every = [(r, c) for r in range(slope.shape[0]) for c in range(slope.shape[1])]
    empty = [place for place in every if place not in stored]
    steepest = sorted(empty, key=lambda place: (-slope[place], place))
    return set(last_first[:count]), set(steepest[:count])


def as_set(coordinates):
    assert coordinates.shape == (len(coordinates), 2)
    return {(int(r), int(c)) for r, c in coordinates}


@pytest.mark.parametrize("tile", [1, 200, 2**20])
@pytest.mark.parametrize(("order", "score"), [(1, "l1"), (2, "l2")])
@pytest.mark.parametrize(("n_rows", "n_cols", "block"), [(5, 7, 4), (9, 6, 1), (3, 4, 16)])
def test_blocks_grow_where_the_dense_gradient_is_largest(
    n_rows, n_cols, block, order, score, tile, monkeypatch
):
    """Whatever the tile: ties included, since whole-number gradients have many."""
    monkeypatch.setattr(regrow_module, "TILE", tile)
    layer = layer_of(random_pattern(n_rows, n_cols, block, seed=3))
    x, cotangent = integers((2, 3, n_cols * block), 1), integers((2, 3, n_rows * block), 2)
    before, held = layer.todense(), places_of(layer.pattern)
    gradient = mx.grad(lambda w: ((x @ w.T) * cotangent).sum())(before)
    count = round(0.3 * len(held))
    dropped, grown = expected_change(layer, gradient, count, order)
    done = regrow(layer, 0.3, activations={"": (x, cotangent)}, score=score)
    assert count > 0
    assert as_set(done.dropped[""]) == dropped
    assert as_set(done.grown[""]) == grown
    assert places_of(layer.pattern) == (held - dropped) | grown
    assert layer.pattern.n_blocks == len(held) == done.n_blocks[""]
    assert layer.pattern.is_canonical
    kept = np.array(before)
    for r, c in dropped:
        kept[r * block : (r + 1) * block, c * block : (c + 1) * block] = 0
    assert_equal(layer.todense(), mx.array(kept))
    said, header, numbers, total, _ = repr(done).splitlines()
    assert numbers.split()[1:] == total.split()[1:]
    assert said == f"{count} of {len(held)} blocks dropped, and as many grown"
    assert dict(zip(header.split()[1:], map(int, numbers.split()[1:]), strict=True)) == {
        "stored": len(held),
        "kept": len(held) - count,
        "dropped": count,
        "grown": count,
    }


def test_among_equals_the_first_place_wins_across_tiles(monkeypatch):
    """The second row's gradient is larger; the rest is taken from the first row, from its start."""
    monkeypatch.setattr(regrow_module, "TILE", 1)
    layer = layer_of(CSRPattern([0, 2, 4, 6], [0, 3] * 3, (3, 6), 1))
    cotangent = mx.array([[1.0, 2.0, 1.0]])
    done = regrow(layer, 1.0, activations={"": (mx.ones((1, 6)), cotangent)})
    assert as_set(done.grown[""]) == {(1, 1), (1, 2), (1, 4), (1, 5), (0, 1), (0, 2)}


def test_16_bit_gradients_are_summed_in_float32():
    """Of 2048 and 2049 the second is larger; float16 rounds it to 2048, and the first would win."""
    layer = BlockSparseLinear(3, 1, CSRPattern([0, 1], [0], (1, 3), 1))
    x = mx.zeros((4096, 3), mx.float16)
    x[:2048, 1], x[:2049, 2] = 1, 1
    done = regrow(layer, 1.0, activations={"": (x, mx.ones((4096, 1), mx.float16))})
    assert as_set(done.grown[""]) == {(0, 2)}


def test_the_dense_gradient_is_never_formed():
    pattern = random(4096, 4096, 0.02, block_size=32)
    layer = BlockSparseLinear(4096, 4096, pattern, bias=False)
    x, cotangent = mx.random.normal((8, 4096)), mx.random.normal((8, 4096))
    mx.eval(layer.parameters(), x, cotangent)
    dense = 4 * 4096 * 4096  # bytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    regrow(layer, 0.3, activations={"": (x, cotangent)})
    assert mx.get_peak_memory() - before < dense / 2


class TestRandom:
    def test_equal_seeds_grow_equal_blocks(self):
        grown = []
        for seed in (1, 1, 2):
            layer = layer_of(random_pattern(8, 8, 4, seed=3))
            held = places_of(layer.pattern)
            done = regrow(layer, 0.5, "random", seed=seed)
            grown.append(as_set(done.grown[""]))
            assert len(grown[-1]) == round(0.5 * len(held)) == len(as_set(done.dropped[""]))
            assert not grown[-1] & held
        assert grown[0] == grown[1] != grown[2]

    def test_the_default_seed_is_drawn_from_mlx(self):
        grown = []
        for seed in (1, 1, 2):
            layer = layer_of(random_pattern(8, 8, 4, seed=3))
            mx.random.seed(seed)
            grown.append(as_set(regrow(layer, 0.5, "random").grown[""]))
        assert grown[0] == grown[1] != grown[2]

    def test_every_empty_place_is_equally_likely(self):
        counts = np.zeros((4, 4))
        for seed in range(600):
            layer = layer_of(block_diagonal(8, 4))
            for place in as_set(regrow(layer, 0.5, "random", seed=seed).grown[""]):
                counts[place] += 1
        empty = counts[~np.eye(4, dtype=bool)]
        assert counts.diagonal().sum() == 0
        assert empty.sum() == 1200
        assert abs(empty - 100).max() < 5 * np.sqrt(100)


def test_no_more_blocks_move_than_there_are_empty_places():
    pattern = CSRPattern([0, 3, 6, 8], [0, 1, 2, 0, 1, 2, 0, 1], (12, 12), 4)
    layer = layer_of(pattern)
    done = regrow(layer, 0.9, "random")
    assert as_set(done.grown[""]) == {(2, 2)}
    full = layer_of(CSRPattern([0, 2, 4], [0, 1, 0, 1], (8, 8), 4))
    before = full.weight
    for fraction in (0, 1):
        done = regrow(full, fraction, "random")
        assert done.grown[""].shape == done.dropped[""].shape == (0, 2)
    assert full.weight is before


class TestOptimizerState:
    @pytest.mark.parametrize("make", ELEMENTWISE, ids=name_of)
    @pytest.mark.parametrize("criterion", ["gradient", "random"])
    def test_training_is_that_of_a_masked_dense_layer(self, make, criterion):
        """Weights and every moment, bit for bit, through three exchanges of blocks."""
        pattern = random_pattern(8, 8, 4, seed=5)
        layer, optimizer = layer_of(pattern), make()
        dense, dense_optimizer = Masked(layer.todense(), layer.bias), make()
        mask = pattern.tomask()
        for step in range(4):
            train_step(layer, optimizer, step)
            train_step(dense, dense_optimizer, step, mask)
            held = layer.pattern
            if criterion == "gradient":
                x, targets = integers((6, 32), 30 + step), integers((6, 32), 40 + step)
                found = activations(layer, linear_loss, layer, x, targets)
                options: dict[str, Any] = {"activations": found}
            else:
                options = {"seed": step}
            regrow(layer, 0.4, criterion, optimizer=optimizer, **options)
            assert layer.pattern != held
            # What was dropped is zero in the dense twin, too; what grew begins with zeros there.
            mask = layer.pattern.tomask()
            dense.mask(mx.logical_and(mask, held.tomask()), dense_optimizer)
            assert_equal(layer.todense(), dense.weight)
            for name, value in optimizer.state["weight"].items():
                assert_equal(dense_state(layer, value), dense_optimizer.state["weight"][name])

    @pytest.mark.parametrize("make", ELEMENTWISE + OTHERS, ids=name_of)
    def test_states_of_every_kind_follow(self, make):
        model, optimizer = (
            nn.Sequential(nn.Linear(32, 32), layer_of(random(32, 32, 0.4, 8))),
            make(),
        )
        train_step(model, optimizer, 0)
        layer, state = model.layers[1], optimizer.state["layers"][1]["weight"]
        before = {name: np.array(value) for name, value in state.items()}
        order = ordered_places(layer.pattern)
        regrow(model, 0.3, "random", optimizer=optimizer)
        assert before
        for j, place in enumerate(ordered_places(layer.pattern)):
            for name, value in state.items():
                old = before[name][order.index(place)] if place in order else 0 * before[name][0]
                np.testing.assert_array_equal(np.array(value[j]), old)
        for step in range(1, 4):
            train_step(model, optimizer, step)
        assert mx.isfinite(layer.weight).all().item()


class TestCompiledTraining:
    @pytest.mark.parametrize("criterion", ["gradient", "random"])
    def test_a_compiled_loop_is_the_plain_loop(self, criterion):
        compiled, model = self.loop(criterion, True)
        plain, other = self.loop(criterion, False)
        assert compiled == pytest.approx(plain, rel=1e-4)
        assert plain[-1] < 0.9 * plain[0]
        for a, b in zip(model.layers[::2], other.layers[::2], strict=True):
            assert a.pattern == b.pattern

    def loop(self, criterion, compiled):
        mx.random.seed(1)
        make = lambda: BlockSparseLinear(32, 32, block_size=4, density=0.3)
        model, optimizer = nn.Sequential(make(), nn.ReLU(), make()), optim.Adam(3e-3)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def loss_fn(x):
            return ((model(x) - x) ** 2).mean()

        def step(x):
            loss, grads = nn.value_and_grad(model, loss_fn)(x)
            optimizer.update(model, grads)
            return loss

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        losses = []
        for i in range(40):
            x = mx.random.normal((16, 32), key=mx.random.key(i))
            losses.append(step(x))
            mx.eval(state, losses)
            if i % 5 == 4 and i < 30:
                options: dict[str, Any] = {"seed": i}
                if criterion == "gradient":
                    options = {"activations": activations(model, loss_fn, x)}
                regrow(model, 0.3, criterion, optimizer=optimizer, **options)
        return [loss.item() for loss in losses], model


class Tied(nn.Module):
    """Uses one layer twice, another in a list, and one not at all."""

    def __init__(self):
        super().__init__()
        self.twice = layer_of(random_pattern(4, 4, 4, seed=1), 1)
        self.parts = [nn.ReLU(), {"last": layer_of(random_pattern(3, 4, 4, seed=2), 2)}]
        self.unused = layer_of(block_diagonal(16, 4))

    def __call__(self, x):
        h = self.twice(self.parts[0](self.twice(x)))
        return self.parts[1]["last"](h)


class TestActivations:
    def test_they_give_the_dense_gradient_of_every_layer(self):
        model, x, targets = Tied(), integers((2, 3, 16), 5), integers((2, 3, 12), 6)

        def dense_loss(twice, last):
            h = nn.relu(x @ twice.T + model.twice.bias) @ twice.T + model.twice.bias
            y = h @ last.T + model.parts[1]["last"].bias
            return (y * targets).sum()

        weights = model.twice.todense(), model.parts[1]["last"].todense()
        model.twice.bias, model.parts[1]["last"].bias = mx.zeros(16), mx.zeros(12)
        gradients = mx.grad(dense_loss, argnums=(0, 1))(*weights)
        found = activations(model, linear_loss, model, x, targets)
        assert list(found) == ["twice", "parts.1.last"]
        for (inputs, cotangent), gradient in zip(found.values(), gradients, strict=True):
            assert_equal(cotangent.T @ inputs, gradient)
        assert found["twice"][0].shape == (12, 16)  # 6 rows for each use
        assert_equal(found["twice"][0][:6], x.reshape(6, 16))

    def test_frozen_layers_and_a_loss_with_more_results(self):
        model = nn.Sequential(layer_of(block_diagonal(16, 4)), layer_of(block_diagonal(16, 4)))
        model.freeze()
        x = integers((3, 16), 1)
        found = activations(model, lambda x, scale: ((y := model(x)).sum() * scale, y), x, scale=2)
        assert_equal(found["layers.1"][1], mx.full((3, 16), 2.0))
        assert_equal(found["layers.0"][0], x)

    def test_uses_that_the_loss_does_not_depend_on_are_left_out(self):
        model = nn.Sequential(layer_of(block_diagonal(16, 4)), layer_of(block_diagonal(16, 4)))

        def loss(x):
            model.layers[0](x)
            return mx.stop_gradient(model.layers[1](2 * x)).sum() + model.layers[1](x).sum()

        found = activations(model, loss, mx.ones((2, 16)))
        assert list(found) == ["layers.1"]
        for array in found["layers.1"]:
            assert_equal(array, mx.ones((2, 16)))

    def test_gradient_checkpointing(self):
        """It calls the model a second time, in the backward pass; that is one use."""
        model = nn.Sequential(
            layer_of(block_diagonal(16, 4)), nn.ReLU(), layer_of(random(8, 16, 0.5, 4))
        )
        x = integers((3, 16))
        plain = activations(model, lambda x: model(x).square().sum(), x)
        again = activations(model, lambda x: checkpoint(model)(x).square().sum(), x)
        assert list(plain) == list(again) == ["layers.0", "layers.2"]
        for path, pair in plain.items():
            for a, b in zip(pair, again[path], strict=True):
                assert_equal(a, b)

    @pytest.mark.not_emulated("needs mx.compile")
    def test_a_compiled_loss_is_refused(self):
        model = layer_of(block_diagonal(16, 4))
        loss = mx.compile(lambda x: model(x).sum())
        mx.eval(loss(mx.ones((2, 16))))
        with pytest.raises(ValueError, match=r"\[activations\] .* is loss_fn compiled?"):
            activations(model, loss, mx.ones((2, 16)))

    def test_the_loss_is_evaluated_once(self):
        """Dropout and normalisation see one step, as in training."""
        model = nn.Sequential(layer_of(block_diagonal(16, 4)), nn.BatchNorm(16))
        calls = []

        def loss(x):
            calls.append(1)
            return model(x).square().sum()

        twin = nn.BatchNorm(16)
        x = mx.random.normal((8, 16))
        twin(model.layers[0](x))
        activations(model, loss, x)
        assert len(calls) == 1
        assert mx.allclose(model.layers[1].running_mean, twin.running_mean).item()

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_model_is_left_as_it_was(self, fails):
        model = Tied()
        layer, x = model.twice, integers((2, 16))
        before = model(x)

        def loss(x):
            y = model(x)
            assert isinstance(model.twice, BlockSparseLinear)
            if fails:
                raise RuntimeError("out of data")
            return y.sum()

        if fails:
            with pytest.raises(RuntimeError, match="out of data"):
                activations(model, loss, x)
        else:
            activations(model, loss, x)
        assert model.twice is layer
        assert type(layer) is type(model.unused) is BlockSparseLinear
        assert_equal(model(x), before)

    def test_subclasses_keep_their_own_product(self):
        class Doubled(BlockSparseLinear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        layer = Doubled(16, 16, block_diagonal(16, 4))
        x = integers((2, 16))
        ((inputs, cotangent),) = activations(layer, lambda x: layer(x).sum(), x).values()
        assert type(layer) is Doubled
        assert_equal(inputs, x)
        assert_equal(cotangent, mx.ones((2, 16)))

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            (nn.Linear(4, 4), ValueError, "the model has no BlockSparseLinear"),
            ("model", TypeError, "model must be an nn.Module, got str"),
        ],
    )
    def test_bad_models(self, model, error, message):
        with pytest.raises(error, match=r"\[activations\] " + message):
            activations(model, lambda: mx.array(0.0))

    @pytest.mark.parametrize(
        ("of", "error", "got"),
        [
            (lambda y: y, ValueError, r"shape \(2, 12\); take its mean"),
            (lambda y: (y.sum(axis=1), y), ValueError, r"shape \(2,\)"),
            (lambda y: None, TypeError, "NoneType"),
            (lambda y: [y.sum()], TypeError, "list"),
        ],
    )
    def test_what_is_no_loss_is_refused(self, of, error, got):
        layer = BlockSparseLinear(16, 12, block_size=4, density=0.5)
        before = layer.weight
        with pytest.raises(error, match=r"^\[activations\] loss_fn must return .*, got " + got):
            activations(layer, lambda x: of(layer(x)), mx.ones((2, 16)))
        assert_equal(layer.weight, before)


class TestModels:
    def make(self):
        mx.random.seed(3)
        pattern = lambda seed: random_pattern(6, 6, 4, seed=seed)
        return nn.Sequential(
            layer_of(pattern(1)), nn.ReLU(), nn.Linear(24, 24), layer_of(pattern(2), 1)
        )

    def test_each_layer_changes_as_it_would_alone(self):
        model, x = self.make(), integers((5, 24))
        alone = copy.deepcopy(model)
        found = activations(model, lambda x: model(x).square().sum(), x)
        done = regrow(model, 0.5, activations=found)
        assert list(done.grown) == ["layers.0", "layers.3"]
        for path, pair in found.items():
            layer = dict(alone.named_modules())[path]
            one = regrow(layer, 0.5, activations={"": pair})
            assert dict(model.named_modules())[path].pattern == layer.pattern
            np.testing.assert_array_equal(one.grown[""], done.grown[path])

    def test_layers_differ_though_one_seed_draws_for_all(self):
        layer = lambda: layer_of(random_pattern(8, 8, 4, seed=3))
        model = nn.Sequential(layer(), layer())
        done = regrow(model, 0.5, "random", seed=0)
        assert as_set(done.grown["layers.0"]) != as_set(done.grown["layers.1"])
        again = nn.Sequential(layer(), layer())
        regrow(again, 0.5, "random", seed=0)
        assert [a.pattern for a in again.layers] == [b.pattern for b in model.layers]

    def test_a_layer_that_the_loss_does_not_reach_is_left_alone_and_named(self):
        model = Tied()
        held = model.unused.pattern
        found = activations(model, lambda x: model(x).sum(), integers((2, 16)))
        done = regrow(model, 0.5, activations=found)
        assert done.not_reached == ("unused",)
        assert model.unused.pattern == held
        assert "not reached by the loss: unused" in repr(done)

    def test_layers_alike_share_a_line_and_the_total_is_of_all(self):
        model = nn.Sequential(*[layer_of(random_pattern(6, 6, 4, seed=3)) for _ in range(4)])
        n = model.layers[0].pattern.n_blocks
        lines = repr(regrow(model, 0.5, "random", seed=1)).splitlines()
        moved = round(0.5 * n)
        assert lines[0] == f"{4 * moved} of {4 * n} blocks dropped, and as many grown"
        cells = lambda k: [str(k * v) for v in (n, n - moved, moved, moved)]
        assert lines[2].split() == ["layers.0-3", "x", "4", *cells(1)]
        assert lines[3].split() == ["total", *cells(4)]

    def test_a_shared_layer_changes_once(self):
        layer = layer_of(random_pattern(6, 6, 4, seed=3))
        model = nn.Sequential(layer, nn.ReLU(), layer)
        done = regrow(model, 0.5, "random", seed=1)
        assert len(done.grown) == 1

    @pytest.mark.parametrize("criterion", ["gradient", "random"])
    def test_nothing_changes_when_a_later_layer_is_refused(self, criterion):
        model = self.make()
        held = [model.layers[0].pattern, model.layers[3].pattern]
        found = activations(model, lambda x: model(x).sum(), mx.ones((2, 24)))
        options: dict[str, Any] = {"activations": found} if criterion == "gradient" else {}
        model.layers[3].weight = model.layers[3].weight * float("nan")
        with pytest.raises(ValueError, match=r"\[regrow layers.3\] weights must be finite"):
            regrow(model, 0.5, criterion, **options)
        assert [model.layers[0].pattern, model.layers[3].pattern] == held

    def test_quantized_layers_are_refused_with_the_way_out(self):
        model = nn.Sequential(BlockSparseLinear(64, 64), BlockSparseLinear(64, 64).to_quantized())
        held = model.layers[0].pattern
        with pytest.raises(ValueError, match=r"\[regrow layers.1\] QuantizedBlock.* regrow before"):
            regrow(model, 0.5, "random")
        assert model.layers[0].pattern == held
        model.layers[1] = model.layers[1].to_block_sparse()
        regrow(model, 0.5, "random")


X, CT = mx.ones((3, 16)), mx.ones((3, 16))
HOW = r"; activations\(model, loss_fn, ...\) returns it"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(4, 4)}, ValueError, "the model has no BlockSparseLinear"),
        ({"fraction": -0.1}, ValueError, r"fraction must be in \[0, 1\], got -0.1"),
        ({"fraction": 1.1}, ValueError, r"fraction must be in \[0, 1\], got 1.1"),
        ({"fraction": "0.3"}, TypeError, "fraction must be a number, got '0.3'"),
        ({"fraction": True}, TypeError, "fraction must be a number, got True"),
        ({"criterion": "momentum"}, ValueError, "criterion must be one of .*, got 'momentum'"),
        ({"score": "l3"}, ValueError, "score must be one of .* got 'l3'"),
        (
            {"activations": None},
            ValueError,
            "criterion 'gradient' needs activations" + HOW,
        ),
        ({"activations": X}, TypeError, "activations must be a dict by path, got array" + HOW),
        (
            {"activations": {"layers.0": (X, CT)}},
            ValueError,
            "activations name 'layers.0', which is no BlockSparseLinear of the model",
        ),
        (
            {"activations": {"": X}},
            TypeError,
            r"activations must be \(x, cotangent\), got array",
        ),
        (
            {"activations": {"": (mx.ones((3, 8)), CT)}},
            ValueError,
            r"x has shape \(3, 8\), its last axis must be input_dims = 16",
        ),
        (
            {"activations": {"": (X, mx.array(1.0))}},
            ValueError,
            r"cotangent has shape \(\), its last axis",
        ),
        (
            {"activations": {"": (mx.ones((4, 16)), CT)}},
            ValueError,
            r"leading axes differ: x \(4,\), cotangent \(3,\)",
        ),
        (
            {"activations": {"": ([1.0] * 16, CT)}},
            TypeError,
            "x must be a floating mx.array, got list",
        ),
        (
            {"activations": {"": (mx.ones((3, 16), mx.int32), CT)}},
            TypeError,
            "x must be a floating mx.array, got .*int32",
        ),
        (
            {"activations": {"": (X * float("nan"), CT)}},
            ValueError,
            "the gradient .* must be finite",
        ),
        ({"seed": 1}, ValueError, "seed must be left out, got 1: it is for criterion 'random'"),
        (
            {"criterion": "random"},
            ValueError,
            "activations must be left out: they are for criterion 'gradient'",
        ),
        (
            {"criterion": "random", "activations": None, "seed": -1},
            ValueError,
            "seed must be in",
        ),
        ({"optimizer": "adam"}, TypeError, "optimizer must be an mlx Optimizer, got str"),
    ],
)
def test_bad_arguments(change, error, message):
    layer = layer_of(block_diagonal(16, 4), 1)
    options = {"model": layer, "fraction": 0.5, "activations": {"": (X, CT)}, **change}
    with pytest.raises(error, match=r"\[regrow\] " + message):
        regrow(**options)
    assert layer.pattern == block_diagonal(16, 4)


def test_an_optimizer_of_another_model_is_refused():
    layer, other, optimizer = layer_of(block_diagonal(32, 8)), nn.Linear(32, 32), optim.Adam(0.1)
    train_step(nn.Sequential(other), optimizer, 0)
    with pytest.raises(ValueError, match=r"\[regrow\] optimizer.state has nothing for weight"):
        regrow(layer, 0.5, "random", optimizer=optimizer)
