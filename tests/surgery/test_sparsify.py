"""Surgery: dense layers to sparse ones and back, alone and in whole models."""

import copy
import re
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support import (
    ROOT,
    assert_equal,
    flatten,
    integers,
    random_pattern,
    to_numpy,
    tolerance,
    untyped,
)

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, patterns
from mlx_sparse_nn.surgery.sparsify import densify, sparsify

SCORES = {
    "l1": lambda b: np.abs(b).sum(),
    "l2": lambda b: (b**2).sum(),  # its square root orders blocks alike
    "max": lambda b: np.abs(b).max(),
    "function": lambda b: -b[0, 0],
}
BALANCES = ("row", "global")
SCOPES = ("layer", "global", "erdos-renyi")


def score_option(score):
    return (lambda blocks: -blocks[:, 0, 0]) if score == "function" else score


def make_linear(input_dims, output_dims, bias=True, dtype=mx.float32, seed=0):
    """A linear layer of small whole numbers: products and sums of it are exact."""
    linear = nn.Linear(input_dims, output_dims, bias=bias)
    linear.weight = integers((output_dims, input_dims), seed, dtype)
    if bias:
        linear.bias = integers((output_dims,), seed + 1, dtype)
    return linear


def masked(linear, pattern):
    return mx.where(pattern.tomask(), linear.weight, mx.zeros((), linear.weight.dtype))


def kept_by_hand(weight, block, count, score, balance):
    """Return the (row, column) of the blocks to keep, by plain loops."""
    rows, cols = weight.shape[0] // block, weight.shape[1] // block
    strength = {
        (r, c): SCORES[score](weight[r * block : (r + 1) * block, c * block : (c + 1) * block])
        for r in range(rows)
        for c in range(cols)
    }
    best_first = sorted(strength, key=lambda place: (-strength[place], place))
    if balance == "global":
        return sorted(best_first[:count])
    queues = [[place for place in best_first if place[0] == r] for r in range(rows)]
    rounds = (sorted(heads, key=best_first.index) for heads in zip(*queues, strict=True))
    return sorted([place for heads in rounds for place in heads][:count])


def places_of(pattern):
    return list(zip(pattern.row_indices.tolist(), pattern.indices.tolist(), strict=True))


class TestFromLinear:
    @given(
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.sampled_from([1, 3, 4]),
        st.floats(0.001, 1),
        st.sampled_from(list(SCORES)),
        st.sampled_from(BALANCES),
        st.booleans(),
        st.integers(0, 99),
    )
    def test_it_keeps_the_strongest_blocks(self, grid, block, density, score, balance, bias, seed):
        linear = make_linear(grid[1] * block, grid[0] * block, bias, seed=seed)
        layer = BlockSparseLinear.from_linear(
            linear, block_size=block, density=density, score=score_option(score), balance=balance
        )
        count = max(1, round(density * grid[0] * grid[1]))
        expected = kept_by_hand(to_numpy(linear.weight), block, count, score, balance)
        assert places_of(layer.pattern) == expected
        assert_equal(layer.todense(), masked(linear, layer.pattern))
        x = integers((3, grid[1] * block), seed + 2)
        y = x @ masked(linear, layer.pattern).T
        assert_equal(layer(x), y + linear.bias if bias else y)
        assert ("bias" in layer) == bias

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    @pytest.mark.parametrize("balance", BALANCES)
    @pytest.mark.parametrize("block", [1, 4, 32])
    def test_values_and_dtype_stay(self, block, balance, dtype):
        linear = nn.Linear(96, 160)
        linear.set_dtype(dtype)
        layer = BlockSparseLinear.from_linear(linear, block_size=block, balance=balance)
        assert layer.pattern.n_blocks == round(0.1 * 96 * 160 / block**2)
        assert_equal(layer.todense(), masked(linear, layer.pattern))
        assert_equal(layer.bias, linear.bias)
        assert_equal(layer.to_linear().weight, masked(linear, layer.pattern))

    @given(st.integers(0, 4), st.sampled_from([1, 4]), st.integers(0, 99))
    def test_a_given_pattern_is_taken_as_it_is(self, n_rows, block, seed):
        """Also unsorted, also without any block, and whatever the values are."""
        pattern = random_pattern(n_rows + 1, 4, block, seed=seed)
        backwards = [
            pattern.indices[start:stop][::-1]
            for start, stop in zip(pattern.indptr[:-1], pattern.indptr[1:], strict=True)
        ]
        pattern = CSRPattern(pattern.indptr, np.concatenate(backwards), pattern.shape, block)
        linear = make_linear(pattern.shape[1], pattern.shape[0], seed=seed)
        linear.weight[0, 0] = mx.nan if not pattern.tomask()[0, 0].item() else 1
        layer = BlockSparseLinear.from_linear(linear, pattern=pattern)
        assert layer.pattern == pattern
        assert_equal(layer.todense(), masked(linear, pattern))

    def test_the_density_is_rounded_to_at_least_one_block(self):
        layer = BlockSparseLinear.from_linear(nn.Linear(64, 64), density=1e-6)
        assert layer.pattern.n_blocks == 1

    def test_a_subclass_makes_its_own_kind(self):
        class Named(BlockSparseLinear):
            pass

        assert type(Named.from_linear(nn.Linear(32, 32))) is Named
        with pytest.raises(ValueError, match=r"\[Named.from_linear\] density"):
            Named.from_linear(nn.Linear(32, 32), density=2)

    def test_the_dense_layer_is_left_alone(self):
        linear = make_linear(64, 64)
        before = mx.array(linear.weight)
        layer = BlockSparseLinear.from_linear(linear, density=0.5)
        layer.weight = layer.weight * 2
        layer.bias = layer.bias * 2
        assert_equal(linear.weight, before)
        assert_equal(linear.bias, integers((64,), 1))


class TestToLinear:
    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("block", [1, 8])
    def test_it_is_exact(self, block, bias, dtype):
        layer = BlockSparseLinear(48, 32, block_size=block, density=0.3, bias=bias)
        layer.set_dtype(dtype)
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert_equal(linear.weight, layer.todense())
        assert set(linear) == ({"weight", "bias"} if bias else {"weight"})
        if bias:
            assert_equal(linear.bias, layer.bias)
        back = BlockSparseLinear.from_linear(linear, pattern=layer.pattern)
        assert_equal(back.weight, layer.weight)
        assert repr(back) == repr(layer)

    def test_repeated_blocks_add_up(self):
        layer = BlockSparseLinear(4, 4, CSRPattern([0, 2, 2], [1, 1], (4, 4), 2), bias=False)
        layer.weight = integers((2, 2, 2), 1)
        assert_equal(layer.to_linear().weight[:2, 2:], layer.weight[0] + layer.weight[1])


@pytest.mark.parametrize("frozen", [[], ["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("training", [True, False])
def test_mode_and_frozen_parameters_carry_over_both_ways(frozen, training):
    linear = nn.Linear(64, 32)
    linear.train(training)
    linear.freeze(keys=frozen)
    layer = BlockSparseLinear.from_linear(linear)
    for module in (layer, layer.to_linear()):
        assert module.training == training
        assert set(module.trainable_parameters()) == {"weight", "bias"} - set(frozen)
        module.unfreeze()
        assert set(module.trainable_parameters()) == {"weight", "bias"}


def test_no_random_numbers_are_drawn():
    model = make_mlp()
    before = untyped(mx.random.state)[0].tolist()
    for scope in SCOPES:
        sparsify(model, block_size=4, scope=scope)
        densify(model)
    assert untyped(mx.random.state)[0].tolist() == before


def make_mlp(*dims, seed=0):
    dims = dims or (16, 32, 24, 8)
    layers = []
    for i, (input_dims, output_dims) in enumerate(pairwise(dims)):
        layers += [make_linear(input_dims, output_dims, i % 2 == 0, seed=seed + i), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Nested(nn.Module):
    """Linear layers in lists, dicts and modules within each other."""

    def __init__(self):
        super().__init__()
        self.first = make_linear(8, 8)
        self.branches = {"a": [make_linear(8, 16, seed=2), nn.ReLU()], "b": {"c": make_mlp(8, 12)}}
        self.listed = [[make_linear(16, 4, seed=3)], nn.Dropout(0.1)]
        self.table = mx.zeros((3,))
        self.numbers = [1, 2]
        self.name = "nested"

    def __call__(self, x):
        x = self.first(x)
        linear, activation = self.branches["a"]
        return self.listed[0][0](activation(linear(x))), self.branches["b"]["c"](x)


def state_of(model):
    """Everything that surgery could change: the modules themselves, and their arrays."""
    modules = [(path, id(module), type(module)) for path, module in model.named_modules()]
    arrays = [(path, array.tolist()) for path, array in flatten(model.parameters())]
    trainable = [path for path, _ in tree_flatten(model.trainable_parameters())]
    return modules, arrays, trainable


class TestSparsify:
    def test_every_layer_that_divides_becomes_sparse_in_place(self):
        model, dense = Nested(), Nested()
        lists = model.listed, model.listed[0], model.branches["a"], model.branches["b"]["c"].layers
        done = sparsify(model, block_size=4, density=0.5)
        assert lists[0] is model.listed
        assert lists[1] is model.listed[0]
        assert lists[2] is model.branches["a"]
        assert lists[3] is model.branches["b"]["c"].layers
        paths = ["first", "branches.a.0", "branches.b.c.layers.0", "listed.0.0"]
        assert sorted(done.sparse) == sorted(paths)
        assert done.skipped == {}
        modules = dict(model.named_modules())
        for path in paths:
            assert modules[path] is done.sparse[path]
            assert modules[path].density == 0.5
            linear = dict(dense.named_modules())[path]
            linear.weight = masked(linear, modules[path].pattern)
        x = integers((5, 8), 9)
        for actual, expected in zip(model(x), dense(x), strict=True):
            assert_equal(actual, expected)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_transformer_goes_on_working(self, scope):
        model, dense = (nn.TransformerEncoderLayer(64, 4).eval() for _ in range(2))
        dense.update(model.parameters())
        done = sparsify(model, block_size=16, density=0.4, scope=scope)
        assert len(done.sparse) == 6
        for path, linear in dense.named_modules():
            if path in done.sparse:
                linear.weight = masked(linear, done.sparse[path].pattern)
                assert_equal(done.sparse[path].todense(), linear.weight)
        x = mx.random.normal((2, 10, 64))
        actual, expected = model(x, mask=None), dense(x, mask=None)
        error = float(mx.abs(actual - expected).max())
        assert error <= tolerance(mx.float32, 6 * 256, float(mx.abs(expected).max()))
        assert densify(model) == list(done.sparse)
        assert_equal(model(x, mask=None), expected)

    def test_mode_and_frozen_parameters_stay(self):
        model = make_mlp()
        model.eval()
        model.freeze()
        model.layers[2].unfreeze()
        sparsify(model, block_size=4)
        assert not any(module.training for module in model.modules())
        assert [path for path, _ in tree_flatten(model.trainable_parameters())] == [
            "layers.2.weight"
        ]
        densify(model)
        assert not any(module.training for module in model.modules())
        assert [path for path, _ in tree_flatten(model.trainable_parameters())] == [
            "layers.2.weight"
        ]

    def test_what_is_skipped_comes_with_its_reason(self):
        class Scaled(nn.Linear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        model = nn.Sequential(
            nn.Linear(32, 10),
            nn.Linear(10, 32),
            Scaled(32, 32),
            nn.Linear(64, 64).to_quantized(),
            BlockSparseLinear(32, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 32),
        )
        before = list(model.layers)
        done = sparsify(model, block_size=32)
        assert list(done.sparse) == ["layers.6"]
        assert done.skipped == {
            "layers.0": "output_dims 10 is less than block_size 32",
            "layers.1": "input_dims 10 is less than block_size 32",
            "layers.2": "Scaled, a subclass of nn.Linear, may compute something else",
            "layers.3": "QuantizedLinear holds a packed weight; dequantize it first",
            "layers.4": "BlockSparseLinear is sparse already; prune lowers its density",
        }
        assert all(a is b for a, b in zip(before[:6], model.layers, strict=False))

    def test_the_result_prints_as_a_table(self):
        shared = nn.Linear(64, 64)
        model = nn.Sequential(shared, nn.Linear(64, 10), shared)
        done = sparsify(model, density=0.5)
        kept, whole = model.layers[0].todense(), shared.weight
        error = np.linalg.norm(to_numpy(whole - kept)) / np.linalg.norm(to_numpy(whole))
        assert repr(done).splitlines() == [
            "1 layer made sparse, 1 skipped: density 0.5 there, 0.574 in all",
            "layer     out x in  block  blocks  density  error",
            f"layers.0   64 x 64     32       2      0.5  {error:.3f}",
            "layers.2: the layer of layers.0",
            "layers.1 skipped (13.5% of the model): output_dims 10 is less than block_size 32",
            "error: ||W - A|| / ||W||; calibrate keeps that of the outputs small",
            "The model's quality is not measured here: evaluate it, and calibrate or fine-tune it.",
        ]
        assert repr(sparsify(nn.Sequential(nn.ReLU()))) == "0 layers made sparse, 0 skipped"

    def test_a_second_time_changes_nothing(self):
        model = make_mlp()
        sparsify(model, block_size=4)
        before = state_of(model)
        done = sparsify(model, block_size=4, density=0.5)
        assert not done.sparse
        assert len(done.skipped) == 3
        assert state_of(model) == before


class TestPredicate:
    def test_it_is_asked_for_each_linear_layer_and_chooses(self):
        model, asked = Nested(), []

        def predicate(path, module):
            asked.append(path)
            assert type(module) is nn.Linear
            return "branches" in path

        done = sparsify(model, block_size=4, predicate=predicate)
        assert sorted(asked) == ["branches.a.0", "branches.b.c.layers.0", "first", "listed.0.0"]
        assert sorted(done.sparse) == ["branches.a.0", "branches.b.c.layers.0"]
        assert done.skipped == dict.fromkeys(
            ["first", "listed.0.0"], "the predicate returned False"
        )
        assert type(model.first) is nn.Linear

    def test_a_dict_sets_options_of_one_layer(self):
        model = make_mlp(16, 16, 16, 16, 16)
        weights = [to_numpy(model.layers[i].weight) for i in (0, 2, 4, 6)]
        pattern = patterns.banded(16, 16, 0, 8)
        own = {
            "layers.0": {"block_size": 2, "density": 0.25},
            "layers.2": {"pattern": pattern},
            "layers.4": {"score": lambda b: -b[:, 0, 0], "balance": "global"},
            "layers.6": {},
        }
        done = sparsify(model, block_size=4, density=0.5, predicate=lambda path, _: own[path])
        a, b, c, d = (done.sparse[path].pattern for path in own)
        assert (a.block_size, a.n_blocks) == (2, 16)
        assert b == pattern
        assert places_of(c) == kept_by_hand(weights[2], 4, 8, "function", "global")
        assert places_of(d) == kept_by_hand(weights[3], 4, 8, "l2", "row")

    def test_numpy_bools_are_bools(self):
        done = sparsify(make_mlp(8, 8), block_size=4, predicate=lambda *_: np.bool_(True))
        assert len(done.sparse) == 1

    def test_an_empty_pattern_asks_for_no_blocks(self):
        empty = CSRPattern([0] * 3, [], (8, 8), 4)
        model = make_mlp(8, 8)
        done = sparsify(model, predicate=lambda *_: {"pattern": empty})
        assert done.density == 0
        assert_equal(model(mx.ones((2, 8))), mx.broadcast_to(model.layers[0].bias, (2, 8)))


GRIDS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5)


def model_of(grids, seed=0):
    """Layers of ``(R, C)`` scalars, which blocks of size 1 tile. Not meant to be called."""
    return nn.Sequential(*(make_linear(c, r, seed=seed + i) for i, (r, c) in enumerate(grids)))


class TestScope:
    @given(GRIDS, st.floats(0.001, 1), st.sampled_from(SCOPES), st.sampled_from(BALANCES))
    def test_budgets_are_exact(self, grids, density, scope, balance):
        done = sparsify(
            model_of(grids), block_size=1, density=density, scope=scope, balance=balance
        )
        counts = [layer.pattern.n_blocks for layer in done.sparse.values()]
        places = [r * c for r, c in grids]
        assert all(1 <= count <= size for count, size in zip(counts, places, strict=True))
        if scope == "layer":
            assert counts == [max(1, round(density * size)) for size in places]
        else:
            assert sum(counts) == max(len(grids), round(density * sum(places)))
        assert done.density == sum(counts) / sum(places)

    @given(GRIDS, st.floats(0.1, 1), st.integers(0, 99))
    def test_global_keeps_the_strongest_of_all(self, grids, density, seed):
        model = model_of(grids, seed)
        weights = [np.abs(to_numpy(layer.weight)).reshape(-1) for layer in model.layers]
        best = [(i, int(w.argmax())) for i, w in enumerate(weights)]
        rest = [(i, j) for i, w in enumerate(weights) for j in range(w.size) if (i, j) not in best]
        rest.sort(key=lambda place: (-weights[place[0]][place[1]], place))
        budget = max(len(grids), round(density * sum(w.size for w in weights)))
        expected = sorted(best + rest[: budget - len(best)])
        done = sparsify(model, block_size=1, density=density, scope="global", balance="global")
        assert expected == [
            (i, row * grids[i][1] + col)
            for i, layer in enumerate(done.sparse.values())
            for row, col in places_of(layer.pattern)
        ]

    def test_global_counts_go_into_balanced_rows(self):
        model = nn.Sequential(make_linear(32, 32), make_linear(32, 32))
        model.layers[1].weight = 10 * model.layers[1].weight
        done = sparsify(model, block_size=4, density=0.3, scope="global")
        weak, strong = (layer.pattern for layer in done.sparse.values())
        assert weak.n_blocks < strong.n_blocks
        assert np.ptp(np.diff(strong.indptr)) <= 1

    @given(GRIDS, st.floats(0.001, 1))
    def test_erdos_renyi_is_proportional_to_inputs_plus_outputs(self, grids, density):
        done = sparsify(model_of(grids), block_size=1, density=density, scope="erdos-renyi")
        counts = [layer.pattern.n_blocks for layer in done.sparse.values()]
        low, high = 0.0, 50.0
        share = lambda scale: [min(max(1, scale * (r + c)), r * c) for r, c in grids]
        for _ in range(100):  # by bisection: the scale at which the shares add up
            middle = (low + high) / 2
            low, high = (middle, high) if sum(share(middle)) < sum(counts) else (low, middle)
        for count, exact in zip(counts, share(high), strict=True):
            assert abs(count - exact) < 1 + 1e-6

    def test_erdos_renyi_fills_small_layers_and_gives_the_rest_to_large_ones(self):
        model = nn.Sequential(nn.Linear(128, 128), nn.Linear(512, 512), nn.Linear(32, 32))
        done = sparsify(model, density=0.5, scope="erdos-renyi")
        # 16 + 256 + 1 places, half of them 136. In proportion to 8 : 32 : 2 blocks the first and
        # the last would get 26 and 6: they are full, and the second takes what they leave.
        assert [layer.pattern.n_blocks for layer in done.sparse.values()] == [16, 119, 1]

    @pytest.mark.parametrize("scope", SCOPES)
    def test_the_smallest_density_leaves_one_block_each(self, scope):
        done = sparsify(make_mlp(), block_size=4, density=1e-9, scope=scope)
        assert [layer.pattern.n_blocks for layer in done.sparse.values()] == [1, 1, 1]

    @pytest.mark.parametrize("scope", SCOPES)
    def test_density_one_is_the_dense_model(self, scope):
        model = make_mlp()
        x = integers((3, 16))
        expected = model(x)
        assert sparsify(model, block_size=8, density=1, scope=scope).density == 1
        assert_equal(model(x), expected)

    @pytest.mark.parametrize("scope", ["global", "erdos-renyi"])
    def test_layers_with_their_own_density_or_pattern_are_outside_the_budget(self, scope):
        model = make_mlp(16, 16, 16, 16, 16)
        own = {
            "layers.0": {"density": 1.0, "block_size": 8, "score": "l1"},
            "layers.2": {"pattern": patterns.banded(16, 16, 0, 2)},
        }
        done = sparsify(
            model,
            block_size=4,
            density=0.25,
            scope=scope,
            predicate=lambda path, _: own.get(path, True),
        )
        counts = [layer.pattern.n_blocks for layer in done.sparse.values()]
        assert counts[:2] == [4, 8]
        assert sum(counts[2:]) == 8


class TestSharedLayers:
    def make(self):
        shared, block = make_linear(16, 16), make_mlp(16, 16, 16, seed=5)
        return nn.Sequential(shared, block, make_linear(16, 16, seed=9), shared, block)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_they_stay_shared_and_count_once(self, scope):
        model = self.make()
        done = sparsify(model, block_size=4, density=0.25, scope=scope)
        assert model.layers[0] is model.layers[3]
        assert model.layers[1] is model.layers[4]
        assert done.sparse["layers.0"] is done.sparse["layers.3"] is model.layers[0]
        assert done.sparse["layers.1.layers.2"] is done.sparse["layers.4.layers.2"]
        assert len(done.sparse) == 7
        counts = {id(layer): layer.pattern.n_blocks for layer in done.sparse.values()}
        assert sum(counts.values()) == 16
        assert done.density == 0.25
        assert len(densify(model)) == 7
        assert type(model.layers[0]) is nn.Linear
        assert model.layers[0] is model.layers[3]

    @pytest.mark.parametrize(
        "answer", [False, {"density": 0.5}, {"pattern": patterns.banded(16, 16, 0, 4)}]
    )
    def test_a_predicate_must_want_the_same_of_them_at_every_path(self, answer):
        model = self.make()
        before = state_of(model)
        with pytest.raises(ValueError, match=r"layers\.0 and layers\.3 are one layer"):
            sparsify(
                model,
                block_size=4,
                predicate=lambda path, _: answer if path == "layers.3" else True,
            )
        assert state_of(model) == before
        same = lambda path, _: {"density": 0.5} if path in ("layers.0", "layers.3") else False
        assert list(sparsify(model, block_size=4, predicate=same).sparse) == [
            "layers.0",
            "layers.3",
        ]


class TestTraining:
    def test_gradients_are_those_of_the_masked_dense_model(self):
        model = make_mlp()
        dense = copy.deepcopy(model)
        done = sparsify(model, block_size=4, density=0.4)
        for path, linear in dense.named_modules():
            if path in done.sparse:
                linear.weight = masked(linear, done.sparse[path].pattern)
        x = integers((2, 16), 3)
        loss = lambda model: lambda x: model(x).sum()
        value, grads = nn.value_and_grad(model, loss(model))(x)
        dense_value, dense_grads = nn.value_and_grad(dense, loss(dense))(x)
        assert_equal(value, dense_value)
        for i in (0, 2, 4):
            layer, dense_grad = model.layers[i], dense_grads["layers"][i]
            probe = BlockSparseLinear.from_linear(dense.layers[i], pattern=layer.pattern)
            probe.weight = grads["layers"][i]["weight"]
            expected = mx.where(layer.pattern.tomask(), dense_grad["weight"], 0)
            assert_equal(probe.todense(), expected)
            if "bias" in layer:
                assert_equal(grads["layers"][i]["bias"], dense_grad["bias"])

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_optimizer_trains_it_and_the_pattern_stays(self, compiled):
        mx.random.seed(1)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        done = sparsify(model, block_size=8, density=0.3)
        before = [layer.pattern for layer in done.sparse.values()]
        optimizer = optim.Adam(1e-2)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        x = mx.random.normal((16, 32))

        def step(x):
            loss, grads = nn.value_and_grad(model, lambda x: ((model(x) - x) ** 2).mean())(x)
            optimizer.update(model, grads)
            return loss

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        losses = []
        for _ in range(10):
            losses.append(step(x))
            mx.eval(state, losses)
        assert losses[-1].item() < 0.9 * losses[0].item()
        assert [layer.pattern for layer in done.sparse.values()] == before

    def test_a_saved_model_loads_into_another_sparsified_alike(self, tmp_path):
        """Its layers kept other blocks, since its weights were others."""
        model, other = make_mlp(), make_mlp(seed=50)
        done, other_done = (sparsify(m, block_size=4, density=0.25) for m in (model, other))
        assert any(
            a.pattern != b.pattern
            for a, b in zip(done.sparse.values(), other_done.sparse.values(), strict=True)
        )
        path = str(tmp_path / "model.safetensors")
        model.save_weights(path)
        other.load_weights(path)
        x = integers((3, 16), 4)
        assert_equal(other(x), model(x))
        assert [a.pattern for a in other_done.sparse.values()] == [
            a.pattern for a in done.sparse.values()
        ]


class TestDensify:
    def test_it_brings_back_the_dense_model_with_its_parameters(self):
        model = make_mlp()
        names = [(path, a.shape, a.dtype) for path, a in flatten(model.parameters())]
        repr_before, layers = repr(model), model.layers
        done = sparsify(model, block_size=4, density=0.5)
        x = integers((3, 16), 2)
        expected = model(x)
        assert densify(model) == list(done.sparse)
        assert repr(model) == repr_before
        assert model.layers is layers
        assert [(p, a.shape, a.dtype) for p, a in flatten(model.parameters())] == names
        assert_equal(model(x), expected)
        assert densify(model) == []

    def test_layers_built_sparse_become_dense_too(self):
        model = nn.Sequential(BlockSparseLinear(64, 32), nn.ReLU())
        weight = model.layers[0].todense()
        assert densify(model) == ["layers.0"]
        assert_equal(model.layers[0].weight, weight)


def nan_in(index):
    model = make_mlp(16, 16, 16)
    model.layers[index].weight[0, 0] = mx.nan
    return model


def ask(answer):
    """Predicate that fails at the second layer, after a first one that could be made sparse."""
    return {"predicate": lambda path, _: answer if path == "layers.2" else True}


OTHER_SHAPE = patterns.banded(16, 32, 0, 4)
REPEATED = CSRPattern([0, 2, 2, 2, 2], [1, 1], (16, 16), 4)
SECOND = r"\[sparsify layers\.2\] "
BAD = [
    ({"density": 0}, ValueError, r"\[sparsify\] density must be in \(0, 1\], got 0"),
    ({"density": 1.5}, ValueError, r"density must be in \(0, 1\], got 1.5"),
    ({"density": "half"}, TypeError, "density must be a number, got 'half'"),
    ({"block_size": 0}, ValueError, r"block_size must be in \[1"),
    ({"block_size": 4.0}, TypeError, "block_size must be an integer, got 4.0"),
    ({"score": "l0"}, ValueError, "score must be one of .*'l0'"),
    ({"score": 2}, TypeError, "score must be one of .* got 2"),
    ({"score": "obs"}, ValueError, r"\[sparsify\] score 'obs' needs moments: layer_moments\(model"),
    (ask({"score": "obs"}), ValueError, SECOND + "score 'obs' needs moments"),
    ({"damping": 0.1}, ValueError, "damping must be left out, got 0.1: it is for moments"),
    ({"balance": "column"}, ValueError, "balance must be one of .*'column'"),
    ({"scope": "model"}, ValueError, "scope must be one of .*'erdos-renyi'.* got 'model'"),
    ({"scope": None}, TypeError, "scope must be one of .* got None"),
    (ask(None), TypeError, SECOND + "predicate must return a bool or a dict, got None"),
    (ask("yes"), TypeError, SECOND + "predicate must return a bool or a dict, got 'yes'"),
    (ask({"sparsity": 0.9}), ValueError, SECOND + "unknown option 'sparsity'; the options are"),
    (ask({"shared": True}), ValueError, SECOND + "unknown option 'shared'"),
    (ask({"density": 2}), ValueError, SECOND + r"density must be in \(0, 1\], got 2"),
    (ask({"density": None}), TypeError, SECOND + "density must be a number, got None"),
    (ask({"score": "l0"}), ValueError, SECOND + "score must be one of"),
    (ask({"score": lambda b: b}), ValueError, SECOND + r"score must return shape \(16,\)"),
    (ask({"balance": "all"}), ValueError, SECOND + "balance must be one of"),
    (ask({"pattern": "banded"}), TypeError, SECOND + "pattern must be a CSRPattern, got str"),
    (
        ask({"pattern": OTHER_SHAPE}),
        ValueError,
        SECOND + r"pattern has shape \(16, 32\), expected .* = \(16, 16\)",
    ),
    (
        ask({"pattern": REPEATED}),
        ValueError,
        SECOND + r"the pattern stores block \(0, 1\) more than once",
    ),
    (
        {"scope": "global", **ask({"block_size": 8})},
        ValueError,
        SECOND + "block_size is 8, but 4 in layers.0, with which it shares a budget",
    ),
    (
        {"scope": "erdos-renyi", **ask({"block_size": 8})},
        ValueError,
        SECOND + "block_size is 8, but 4 in layers.0",
    ),
    (
        {"scope": "global", **ask({"score": "l1"})},
        ValueError,
        SECOND + "score is 'l1', but 'l2' in layers.0",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_are_refused_and_change_nothing(options, error, message):
    model = make_mlp(16, 16, 16)
    before = state_of(model)
    with pytest.raises(error, match=message):
        sparsify(model, **{"block_size": 4, **options})
    assert state_of(model) == before


@pytest.mark.parametrize("scope", SCOPES)
def test_a_weight_that_is_not_finite_is_refused_and_changes_nothing(scope):
    model = nan_in(2)
    kinds = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match=SECOND + "weights must be finite"):
        sparsify(model, block_size=4, scope=scope)
    assert [type(layer) for layer in model.layers] == kinds


ALONE = [
    (lambda: sparsify(nn.Linear(32, 32)), r"\[sparsify\] .* itself a Linear.*from_linear"),
    (lambda: sparsify(BlockSparseLinear(32, 32)), "itself a BlockSparseLinear"),
    (lambda: sparsify(untyped({"a": nn.Linear(32, 32)})), "model must be an nn.Module, got dict"),
    (lambda: densify(BlockSparseLinear(32, 32)), r"\[densify\] .*itself a Block.*to_linear"),
    (lambda: densify(untyped([nn.ReLU()])), "model must be an nn.Module, got list"),
]


@pytest.mark.parametrize(("call", "message"), ALONE)
def test_what_cannot_be_changed_in_place_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_subclass_of_a_sparse_layer_does_not_become_dense():
    class Doubled(BlockSparseLinear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = nn.Sequential(BlockSparseLinear(32, 32), Doubled(32, 32))
    layers = list(model.layers)
    with pytest.raises(ValueError, match=r"\[densify layers\.1\] Doubled is a subclass"):
        densify(model)
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))


LINEAR = nn.Linear(64, 32)
BAD_FROM_LINEAR = [
    ((nn.ReLU(),), {}, TypeError, "linear must be an nn.Linear: got ReLU"),
    ((nn.Linear(64, 64).to_quantized(),), {}, TypeError, "QuantizedLinear holds a packed weight"),
    ((BlockSparseLinear(32, 32),), {}, TypeError, "BlockSparseLinear is sparse already"),
    ((LINEAR,), {"block_size": True}, TypeError, "block_size must be an integer, got True"),
    ((nn.Linear(4, 0),), {}, ValueError, "output_dims is 0"),
    ((LINEAR,), {"density": -0.1}, ValueError, r"density must be in \(0, 1\], got -0.1"),
    ((LINEAR,), {"score": "magnitude"}, ValueError, "score must be one of"),
    ((LINEAR,), {"balance": "rows"}, ValueError, "balance must be one of"),
    ((LINEAR,), {"pattern": 32}, TypeError, "pattern must be a CSRPattern, got int"),
    ((LINEAR,), {"pattern": OTHER_SHAPE}, ValueError, r"shape \(16, 32\), expected .*\(32, 64\)"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_FROM_LINEAR)
def test_bad_arguments_of_from_linear_are_refused(args, options, error, message):
    with pytest.raises(error, match=r"\[BlockSparseLinear.from_linear\] .*" + message):
        BlockSparseLinear.from_linear(*args, **options)


def test_the_page_on_surgery(capsys, monkeypatch, tmp_path):
    """It prints the tables that it shows, but for the last digits of errors."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sparsify.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page[: page.index("### Saving and")], re.DOTALL)
    names, shown = {}, []
    for block in code:
        exec(block, names)
        shown += re.findall(r"^# (.*)$", block, re.MULTILINE)
    without_errors = lambda line: re.sub(r" 0\.\d\d\d$", " 0.", line)
    printed = [without_errors(line) for line in capsys.readouterr().out.splitlines()]
    assert [without_errors(line) for line in shown] == [line for line in printed if line[0] != "["]
