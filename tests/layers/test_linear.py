"""BlockSparseLinear as an mlx.nn module: values, gradients, freezing, copies, compiled training."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from support import assert_equal, dense_of, integers, patterns, to_numpy, tolerance, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn import patterns as builders

SHAPES = {"blocks": (64, 96, 16), "scalars": (12, 20, 1)}


def make_layer(kind="blocks", **options):
    input_dims, output_dims, block_size = SHAPES[kind]
    return BlockSparseLinear(input_dims, output_dims, block_size=block_size, density=0.3, **options)


def make_model():
    return nn.Sequential(
        BlockSparseLinear(32, 64, block_size=8, density=0.3),
        nn.ReLU(),
        BlockSparseLinear(64, 32, block_size=16, density=0.4, bias=False),
        nn.Linear(32, 4),
    )


@given(patterns(fewest=1), st.lists(st.integers(0, 3), max_size=3).map(tuple), st.booleans())
def test_it_is_a_linear_layer(pattern, leading, bias):
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=bias)
    layer.weight = integers(pattern.data_shape, 1)
    x = integers((*leading, pattern.shape[1]), 2)
    expected = x @ layer.todense().T
    if bias:
        layer.bias = integers((pattern.shape[0],), 3)
        expected = expected + layer.bias
    assert_equal(layer(x), expected)


@pytest.mark.parametrize("kind", SHAPES)
def test_default_pattern_is_balanced_and_covers_everything(kind):
    layer = make_layer(kind)
    for lengths in (np.diff(layer.pattern.indptr), np.diff(layer.pattern.T.indptr)):
        assert lengths.min() > 0
        assert np.ptp(lengths) <= 1
    assert layer.weight.shape == layer.pattern.data_shape
    mx.random.seed(3)
    a = make_layer(kind)
    mx.random.seed(3)
    b = make_layer(kind)
    assert a.pattern == b.pattern
    assert_equal(a.weight, b.weight)
    assert make_layer(kind).pattern != a.pattern


def test_output_variance_is_that_of_a_dense_layer():
    """Also where rows store very different numbers of inputs."""
    x = mx.random.normal((4096, 256))
    dense = mx.var(nn.Linear(256, 512, bias=False)(x)).item()
    uneven = builders.banded(512, 256, 6, 16)
    assert np.ptp(np.diff(uneven.indptr)) > 5
    for layer in (
        BlockSparseLinear(256, 512, block_size=16, density=0.2, bias=False),
        BlockSparseLinear(256, 512, uneven, bias=False),
    ):
        rows = np.diff(layer.pattern.indptr).repeat(16) > 0
        per_row = np.array(mx.var(layer(x), axis=0))[rows]
        assert per_row.mean() == pytest.approx(dense, rel=0.1)
        few = np.diff(layer.pattern.indptr).repeat(16)[rows] <= 4
        if few.any():
            assert per_row[few].mean() == pytest.approx(dense, rel=0.15)
    bound = 1 / np.sqrt(np.diff(uneven.indptr)[uneven.row_indices] * 16)
    assert (np.abs(np.array(layer.weight)).max(axis=(1, 2)) <= bound + 1e-6).all()


def test_gradients_are_those_of_the_masked_dense_weight():
    layer, x = make_layer(), mx.random.normal((5, 64))
    loss = lambda layer, x: (layer(x) ** 2).mean()
    grads = nn.value_and_grad(layer, loss)(layer, x)[1]
    assert set(grads) == {"weight", "bias"}
    rows, bias = to_numpy(x), to_numpy(layer.bias)
    y = rows @ to_numpy(layer.todense()).T + bias
    dense = 2 / y.size * y.T @ rows
    sampled = BlockSparseLinear(64, 96, layer.pattern, bias=False)
    sampled.weight = grads["weight"]
    masked = np.where(np.array(layer.pattern.tomask()), dense, 0)
    error = np.abs(to_numpy(sampled.todense()) - masked).max()
    assert error <= tolerance(mx.float32, 64 + 5, np.abs(dense).max() * 5)


class TestThePatternStays:
    """Nothing that users do to a module trains the pattern, casts it, or loses it."""

    def check(self, model, pattern):
        layer = model.layers[0]
        assert layer.pattern == pattern
        assert layer.indices.dtype == layer.indptr.dtype == mx.int32
        assert layer.indices.tolist() == pattern.indices.tolist()
        assert layer.indptr.tolist() == pattern.indptr.tolist()
        trainable = dict(tree_flatten(model.trainable_parameters()))
        assert not any("ind" in name for name in trainable)
        layer.weight = integers(pattern.data_shape, 1, layer.weight.dtype)
        layer.bias = integers((layer.output_dims,), 2, layer.bias.dtype)
        x = integers((2, 32), 3)
        dense = dense_of(pattern, layer.weight)
        assert_equal(layer(x), x @ dense.T + layer.bias.astype(mx.float32))

    @pytest.mark.parametrize(
        "act",
        [
            lambda m: m.freeze(),
            lambda m: m.unfreeze(),
            lambda m: m.freeze().unfreeze(),
            lambda m: m.unfreeze(keys=["indices", "indptr", "weight"]),
            lambda m: m.layers[0].unfreeze(recurse=False),
            lambda m: m.layers[0].unfreeze(keys="indices", strict=True),
            lambda m: m.train().eval(),
            lambda m: m.set_dtype(mx.float16),
            lambda m: m.set_dtype(mx.bfloat16, predicate=lambda _: True),
            lambda m: m.apply(lambda p: p.astype(mx.bfloat16)),
            lambda m: m.apply(lambda p: p.astype(mx.float16)).apply(lambda p: p * 1),
            lambda m: m.apply(nn.init.normal(), nn.Module.trainable_parameter_filter),
            lambda m: m.update(m.parameters()),
            lambda m: m.update(tree_map(lambda p: p + 0, m.parameters())),
            lambda m: m.load_weights(tree_flatten(m.parameters())),
        ],
    )
    def test_through(self, act):
        model = make_model()
        pattern = model.layers[0].pattern
        act(model)
        self.check(model, pattern)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_through_copies(self, copied):
        model = make_model()
        model.update(tree_map(lambda p: p * 2, model.trainable_parameters()))
        twin = copied(model)
        x = mx.random.normal((3, 32))
        assert_equal(twin(x), model(x))
        self.check(twin, model.layers[0].pattern)
        twin.unfreeze()
        self.check(twin, model.layers[0].pattern)
        twin.layers[0].weight = twin.layers[0].weight * 0
        assert mx.abs(model.layers[0].weight).sum() > 0

    @pytest.mark.parametrize(
        "optimizer",
        [
            optim.SGD(0.1, momentum=0.9, weight_decay=0.1),
            optim.Adam(1e-2),
            optim.AdamW(1e-2),
            optim.Adamax(1e-2),
            optim.Adagrad(1e-2),
            optim.AdaDelta(1e-1),
            optim.RMSprop(1e-2),
            optim.Lion(1e-3),
            optim.Adafactor(1e-2),
            optim.Muon(1e-2),
        ],
        ids=lambda optimizer: type(optimizer).__name__,
    )
    def test_through_every_optimizer(self, optimizer):
        model = make_model()
        model.unfreeze()
        pattern = model.layers[0].pattern
        before = mx.array(model.layers[0].weight)
        x = mx.random.normal((8, 32))
        for _ in range(3):
            grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)[1]
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state)
        self.check(model, pattern)
        assert not mx.array_equal(model.layers[0].weight, before)

    @pytest.mark.parametrize("name", ["indptr", "indices"])
    @pytest.mark.parametrize(
        ("value", "error"),
        [
            (lambda a: a * 0 - 1, ValueError),
            (lambda a: a + 1000, ValueError),
            (lambda a: a[:-1], ValueError),
            (lambda a: (a + 1).astype(mx.float32), TypeError),
            (lambda a: a.tolist(), TypeError),
        ],
    )
    def test_bad_assignments_are_refused(self, name, value, error):
        model = make_model()
        pattern = model.layers[0].pattern
        value = value(model.layers[0][name])
        with pytest.raises(error, match=rf"\[BlockSparseLinear\] {name}"):
            model.layers[0].update({name: value}, strict=False)
        self.check(model, pattern)


class TestCompiledTraining:
    def training(self, compiled):
        mx.random.seed(1)
        model, optimizer = make_model(), optim.AdamW(1e-2)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state, mx.random.state]
        traces = []

        def step(x):
            traces.append(1)
            loss, grads = nn.value_and_grad(model, lambda x: ((model(x) - 1) ** 2).mean())(x)
            optimizer.update(model, grads)
            return loss

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        losses = []
        for i in range(5):
            losses.append(step(mx.random.normal((8, 32), key=mx.random.key(i))))
            mx.eval(state, losses)
        return [loss.item() for loss in losses], model, len(traces)

    @pytest.mark.not_emulated("needs mx.compile")
    def test_it_gives_the_losses_of_eager_training_and_compiles_once(self):
        eager, model_a, _ = self.training(compiled=False)
        compiled, model_b, traces = self.training(compiled=True)
        assert compiled == pytest.approx(eager, rel=1e-5)
        assert traces == 1
        assert eager[-1] < eager[0]
        assert model_a.layers[0].pattern == model_b.layers[0].pattern
        assert model_b.layers[0].indices.tolist() == model_b.layers[0].pattern.indices.tolist()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_layer_that_was_called_follows_its_own_pattern(kind):
    layer = make_layer(kind)
    x = integers((3, layer.input_dims), 1)

    def follows(layer, pattern):
        assert layer.pattern == pattern
        layer.weight = integers(pattern.data_shape, 2)
        layer.bias = integers((layer.output_dims,), 3)
        assert_equal(layer(x), x @ mx.array(dense_of(pattern, layer.weight)).T + layer.bias)

    old, new = layer.pattern, make_layer(kind).pattern
    follows(layer, old)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    state = [layer.state]
    step = mx.compile(lambda x: layer(x), inputs=state, outputs=state)
    assert_equal(step(x), layer(x))
    for pattern in (new, old, new):
        layer.set_pattern(pattern)
        assert_equal(step(x), layer(x))
        follows(layer, pattern)
        assert_equal(step(x), layer(x))
    layer.load_weights(list(twins[0].parameters().items()))
    follows(layer, old)
    for twin in twins:
        follows(twin, old)


@pytest.mark.parametrize("weight", [mx.float32, mx.float16, mx.bfloat16, mx.int32], ids=str)
@pytest.mark.parametrize("x", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.bool_], ids=str)
@pytest.mark.parametrize("bias", [None, mx.float32, mx.bfloat16], ids=str)
def test_dtypes_promote_as_in_a_dense_layer(weight, x, bias):
    layer = make_layer(bias=bias is not None)
    layer.weight = integers(layer.weight.shape, 1, weight)
    if bias is not None:
        layer.bias = integers((layer.output_dims,), 2, bias)
    rows = integers((3, layer.input_dims), 3).astype(x)
    if mx.issubdtype(mx.result_type(weight, x), mx.integer):
        with pytest.raises(
            TypeError, match=r"\[BlockSparseLinear\] data .*int32 and x .* cast one to a float"
        ):
            layer(rows)
        return
    y = layer(rows)
    assert y.dtype == mx.result_type(weight, x, *([] if bias is None else [bias]))


def test_repr_and_properties():
    layer = BlockSparseLinear(64, 128, block_size=32, density=0.5)
    assert repr(layer) == (
        "BlockSparseLinear(input_dims=64, output_dims=128, block_size=32, "
        "density=0.5, blocks=4, bias=True)"
    )
    assert (layer.input_dims, layer.output_dims, layer.block_size) == (64, 128, 32)
    assert layer.density == layer.pattern.density == 0.5
    assert "bias=False" in repr(BlockSparseLinear(64, 64, bias=False))


def test_the_pattern_sets_the_block_size():
    layer = BlockSparseLinear(12, 12, builders.block_diagonal(12, 3))
    assert layer.weight.shape == (3, 4, 4)


def test_vmap_over_an_ensemble_of_weights():
    layer, x = make_layer(bias=False), integers((5, 64))
    weights = integers((3, *layer.weight.shape), 1)

    def f(weight, x):
        layer.weight = weight
        return layer(x)

    out = mx.vmap(f, in_axes=(0, None))(weights, x)
    for i in range(3):
        assert_equal(out[i], f(weights[i], x))


BAD = [
    (lambda: BlockSparseLinear(64, 64, block_size=0), ValueError, r"block_size must be in \[1"),
    (
        lambda: BlockSparseLinear(untyped(64.0), 64),
        TypeError,
        "input_dims must be an integer, got 64.0",
    ),
    (
        lambda: BlockSparseLinear(64, 64, density=0),
        ValueError,
        r"density must be in \(0, 1\], got 0",
    ),
    (lambda: BlockSparseLinear(64, 64, density=10), ValueError, "density must be in .* got 10"),
    (
        lambda: BlockSparseLinear(64, 64, untyped("dense")),
        TypeError,
        "pattern must be a CSRPattern, got str",
    ),
    (
        lambda: BlockSparseLinear(64, 32, CSRPattern([0] * 3, [], (64, 32), 32)),
        ValueError,
        r"pattern has shape \(64, 32\), expected \(output_dims, input_dims\) = \(32, 64\)",
    ),
    (lambda: make_layer()(mx.ones((2, 63))), ValueError, r"x has shape \(2, 63\).*input_dims = 64"),
    (lambda: make_layer()(mx.array(1.0)), ValueError, r"x has shape \(\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[BlockSparseLinear\] " + message):
        call()


def test_writing_into_index_arrays_reaches_no_product():
    """``layer.indices[0] = ...`` is no way to a read outside a buffer, compiled or not."""
    layer, x = BlockSparseLinear(32, 32, block_size=8, density=0.5), mx.ones((3, 32))
    y, state = layer(x), [layer.state]
    step = mx.compile(lambda x: layer(x), inputs=state, outputs=state)
    layer.indices[0] = 10**6
    layer.indptr[1] = 10**6
    assert_equal(layer(x), y)
    assert_equal(step(x), y)
    assert layer.indices.tolist() == layer.pattern.indices.tolist()


@pytest.mark.parametrize("value", [10**8, -(10**8)])
@pytest.mark.parametrize("name", ["indices", "indptr"])
@pytest.mark.parametrize("block_size", [1, 8])
def test_a_write_past_the_checks_changes_no_product(block_size, name, value):
    """Arrays of the state, written into: calls ignore it, eager ones and compiled ones."""
    layer, x = BlockSparseLinear(64, 64, block_size=block_size, density=0.3), mx.ones((20, 64))
    y = layer(x)
    step = mx.compile(mx.grad(lambda x: (layer(x) ** 2).sum()), inputs=layer.state)
    gradient = step(x)
    mx.eval(y, gradient)
    layer.parameters()[name][1] = value
    assert_equal(layer(x), y)
    assert_equal(step(x), gradient)
