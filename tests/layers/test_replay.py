"""A layer's eager call of few rows on a GPU: traced once, and the same call all the same."""

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from support import assert_equal, flatten, integers, random_pattern, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.core import ops
from mlx_sparse_nn.layers import pattern_module

pytestmark = pytest.mark.not_emulated("needs mx.compile")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Note the calls that Python computes, as if MLX's default device were a GPU."""
    noted, multiply = [], ops.multiply

    def noting(*arguments):
        noted.append(arguments)
        return multiply(*arguments)

    monkeypatch.setattr(ops, "multiply", noting)
    monkeypatch.setattr(pattern_module, "_on_gpu", lambda: True)
    return noted


def make(bias=True, block_size=8, seed=0) -> BlockSparseLinear:
    """A layer of whole numbers, whose results are exact."""
    pattern = random_pattern(5, 6, block_size, seed=seed)
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=bias)
    layer.weight = integers(pattern.data_shape, 1)
    if bias:
        layer.bias = integers((pattern.shape[0],), 2)
    return layer


def expected(layer: BlockSparseLinear, x: mx.array) -> mx.array:
    y = x @ layer.todense().T
    return y + layer.bias if "bias" in layer else y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (16,), (2, 3), (2, 2, 2)])
def test_it_is_the_product(calls, lead, block_size, bias):
    layer = make(bias, block_size)
    for seed in range(3):
        x = integers((*lead, layer.input_dims), seed)
        assert_equal(layer(x), expected(layer, x))
    assert len(calls) == 1


def test_many_rows_go_the_usual_way(calls):
    layer = make()
    for _ in range(2):
        layer(integers((17, layer.input_dims)))
    assert len(calls) == 2


def test_what_has_no_kernel_goes_the_usual_way(calls):
    """MLX fuses its own operations, and on CUDA divides by zero where their arrays are empty."""
    empty = BlockSparseLinear(48, 40, CSRPattern([0] * 6, [], (40, 48), 8))
    scalars = make(block_size=1)
    scalars.weight = scalars.weight.astype(mx.complex64)
    for layer, shape in ((make(), (0, 48)), (empty, (2, 48)), (scalars, (2, scalars.input_dims))):
        for _ in range(2):
            x = integers(shape)
            assert_equal(layer(x), expected(layer, x))
    assert len(calls) == 6


def test_each_shape_and_dtype_is_traced(calls):
    layer = make()
    for _ in range(2):
        for shape in ((layer.input_dims,), (3, layer.input_dims)):
            for dtype in (mx.float32, mx.float16):
                layer.set_dtype(dtype)
                x = integers(shape, dtype=dtype)
                assert_equal(layer(x), expected(layer, x))
    assert len(calls) == 4


def test_it_follows_what_is_written():
    layer, x = make(), integers((2, 48), 3)
    layer(x)
    layer.weight = integers(layer.weight.shape, 7)
    assert_equal(layer(x), expected(layer, x))
    layer.bias = untyped(None)
    assert_equal(layer(x), expected(layer, x))
    layer.set_pattern(random_pattern(5, 6, 8, seed=4))
    layer.weight = integers(layer.weight.shape, 8)
    assert_equal(layer(x), expected(layer, x))
    other = make(bias=False)
    layer.set_pattern(other.pattern)
    layer.load_weights(flatten(other.parameters()))
    assert_equal(layer(x), expected(other, x))
    layer.weight = mx.array([])
    with pytest.raises(ValueError, match="the layer was emptied"):
        layer(x)


def loss(layer, x):
    return (layer(x) ** 2).sum()


@pytest.mark.parametrize("is_called_first", [False, True])
def test_transforms_see_the_product_and_its_rules(is_called_first):
    layer, x = make(), integers((2, 48), 3)
    if is_called_first:
        layer(x)
    values: Any = layer.trainable_parameters()
    weight, y = layer.todense(), expected(layer, x)
    assert_equal(mx.grad(lambda x: loss(layer, x))(x), 2 * y @ weight)

    def of(weight):
        layer.weight = weight
        return loss(layer, x)

    by_weight = mx.grad(of)(values["weight"])
    layer.update(values)
    sampled = BlockSparseLinear(48, 40, layer.pattern, bias=False)
    sampled.weight = by_weight
    outside = sampled.todense() - 2 * y.T @ x
    assert_equal(mx.where(weight == 0, 0, outside), mx.zeros_like(weight))
    gradients = nn.value_and_grad(layer, lambda x: loss(layer, x))(x)[1]
    assert_equal(gradients["weight"], by_weight)
    assert_equal(gradients["bias"], 2 * y.sum(0))
    assert_equal(mx.vmap(layer)(x[:, None]), y[:, None])
    assert_equal(mx.jvp(layer, [x], [x])[1][0], x @ weight.T)
    second = mx.grad(lambda x: mx.grad(lambda x: loss(layer, x))(x).sum())(x)
    assert_equal(second, mx.broadcast_to((2 * weight.T @ weight).sum(0), (2, 48)))
    compiled = mx.compile(lambda x: layer(x) + 1, inputs=layer.state)
    assert_equal(compiled(x), y + 1)
    layer.weight = 2 * values["weight"]
    assert_equal(compiled(x), expected(layer, x) + 1)


def test_what_no_transform_traces_is_the_product_all_the_same(tmp_path):
    """Constants in a traced function."""
    layer, x, scale = make(), integers((2, 48), 3), mx.array(3.0)
    y = layer(x)
    assert_equal(mx.grad(lambda s: (s * layer(x)).sum())(scale), y.sum())
    assert_equal(mx.compile(lambda s: s * layer(x))(scale), 3 * y)
    assert_equal(mx.vmap(lambda s: s * layer(x))(scale[None]), 3 * y[None])
    path = str(tmp_path / "call.mlxfn")
    mx.export_function(path, lambda s: s * layer(x), scale)
    assert_equal(untyped(mx.import_function(path))(scale)[0], 3 * y)


def test_a_compiled_step_between_calls():
    layer, x = make(), integers((2, 48), 3)
    layer(x)

    def step(x):
        gradients = nn.value_and_grad(layer, lambda x: loss(layer, x))(x)[1]
        layer.update({name: layer[name] - g for name, g in gradients.items()})

    mx.compile(step, inputs=layer.state, outputs=layer.state)(x)
    assert_equal(layer(x), expected(layer, x))


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (mx.ones((2, 47)), r"x has shape \(2, 47\)"),
        (mx.ones((2, 48), mx.int32), None),
        ("x", "x must be an mx.array"),
        ([1.0] * 48, "x must be an mx.array"),
        (mx.array(1.0), "x has shape"),
    ],
    ids=str,
)
def test_errors_are_those_of_every_call(x, error):
    layer = make()
    for _ in range(2):
        if error is None:
            assert layer(x).dtype == mx.float32
            continue
        with pytest.raises((TypeError, ValueError), match=rf"\[BlockSparseLinear\] {error}"):
            layer(x)


def test_a_copy_has_graphs_of_its_own():
    layer, x = make(), integers((2, 48), 3)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other(x), y)
        other.set_pattern(random_pattern(5, 6, 8, seed=4))
        assert_equal(other(x), expected(other, x))
    assert_equal(layer(x), y)


def test_threads_have_graphs_of_their_own():
    layer, x, found = make(), integers((2, 48), 3), []
    y = layer(x)

    def work():
        found.append(layer(integers((2, 48), 3)).tolist())

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [y.tolist()] * 3


def test_a_thread_may_end_with_the_program():
    """What MLX has compiled in a thread waits for Python when the thread ends."""
    script = """
import threading
from typing import Any
import mlx.core as mx
from mlx_sparse_nn import BlockSparseLinear
from mlx_sparse_nn.layers import pattern_module

pattern_module._on_gpu = lambda: True
layer, x = BlockSparseLinear(64, 64), mx.ones((2, 64))
mx.eval(layer(x), layer.parameters())
thread = threading.Thread(target=lambda: mx.eval(layer(x)))
thread.start()
thread.join()
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
