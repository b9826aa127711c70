"""What goes into the layers of a model, beside inputs that are known."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from networks import Network, batches, relative_error

from mlx_sparse_nn import BlockSparseLinear, InputMoments, layer_moments, sparsify


def check(moments, x):
    """Assert that moments are those of samples ``(n, n_in)``."""
    x = np.array(x, np.float64).reshape(-1, x.shape[-1])
    assert moments.n == len(x)
    assert relative_error(moments.second, x.T @ x) < 1e-5
    assert relative_error(moments.total, x.sum(axis=0)) < 1e-5


def test_moments_are_those_of_what_goes_in():
    model, inputs = Network(), batches()
    found = layer_moments(model, inputs, progress=False)
    x = mx.concatenate(inputs)
    check(found["first"], x)
    hidden = model.first(x)
    check(found["layers.0.query"], hidden)
    hidden = hidden + model.layers[0].query(hidden) * mx.tanh(model.layers[0].key(hidden))
    check(found["layers.0.up"], hidden)
    check(found["layers.0.down"], nn.gelu(model.layers[0].up(hidden)))
    assert set(found) == {
        "first",
        "last",
        *(f"layers.{i}.{name}" for i in range(3) for name in ("query", "key", "up", "down")),
    }


def test_layers_called_with_one_array_share_one_matrix():
    found = layer_moments(Network(), batches(), progress=False)
    assert found["layers.0.query"] is found["layers.0.key"]
    assert found["layers.0.query"] is not found["layers.1.query"]


class Parallel(nn.Module):
    """As GPT-J: attention and feed-forward net side by side, other calls in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def __call__(self, x):
        return self.c(x) + self.b(self.a(x))


def test_layers_far_apart_share_too():
    found = layer_moments(Parallel(), batches(), progress=False)
    assert found["a"] is found["c"]
    assert found["b"] is not found["a"]


class Twice(nn.Module):
    """A layer that is called twice, once with what another gets too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def __call__(self, x):
        return self.a(x) + self.b(x) + self.a(2 * x)


def test_a_layer_called_twice_sees_both_inputs():
    (x,) = batches(1)
    found = layer_moments(Twice(), [x], progress=False)
    check(found["b"], x)
    check(found["a"], mx.concatenate([x, 2 * x]))
    assert "unused" not in found


def test_a_layer_at_two_paths_is_one():
    model = Parallel()
    model.b = model.a
    (x,) = batches(1)
    found = layer_moments(model, [x], progress=False)
    assert found["a"] is found["b"]
    check(found["a"], mx.concatenate([x, model.a(x)]))


def test_rows_say_what_counts():
    model, inputs = Network(), batches()
    keep = np.random.default_rng(0).random((4, 25)) < 0.6
    for rows in (
        lambda batch: keep,
        lambda batch: mx.array(keep.tolist()),
        lambda batch: keep.reshape(-1),
    ):
        found = layer_moments(model, inputs, rows=rows, progress=False)
        check(
            found["first"],
            mx.concatenate(
                [x[mx.array(np.nonzero(keep)[0]), mx.array(np.nonzero(keep)[1])] for x in inputs]
            ),
        )


def test_sparse_layers_and_other_calls_are_observed():
    model = Network()
    sparsify(model, block_size=8, density=0.5)
    assert isinstance(model.layers[0].up, BlockSparseLinear)
    inputs = [(x, mx.array(2.0)) for x in batches()]
    found = layer_moments(model, inputs, progress=False)
    as_dicts = [{"x": x, "scale": scale} for x, scale in inputs]
    same = layer_moments(model, as_dicts, call=lambda m, b: m(**b), progress=False)
    assert found.keys() == same.keys()
    assert all((found[path].second == same[path].second).all() for path in found)
    check(found["first"], mx.concatenate([x for x, _ in inputs]))


def test_the_model_runs_as_in_evaluation_and_stays_as_it_was():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
    model.layers[2].eval()
    (x,) = batches(1)
    check(layer_moments(model, [x], progress=False)["layers.1"], x)
    assert [layer.training for layer in model.layers] == [True, True, False]
    assert type(model.layers[1]) is nn.Linear


def test_the_predicate_chooses():
    found = layer_moments(
        Network(), batches(), predicate=lambda path, layer: path.endswith("up"), progress=False
    )
    assert set(found) == {f"layers.{i}.up" for i in range(3)}


def test_errors_leave_the_model_as_it_was():
    model, (x,) = Network(), batches(1)
    model.layers[1].query.weight = model.layers[1].query.weight * float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.up\] what goes into this layer must be fini"):
        layer_moments(model, [x], predicate=lambda path, _: path == "layers.1.up", progress=False)
    assert type(model.layers[1].up) is nn.Linear
    assert model.training


def test_moments_of_an_array():
    (x,) = batches(1)
    check(InputMoments.of(x), x)
    check(InputMoments.of(x.astype(mx.float16)), x.astype(mx.float16).astype(mx.float32))


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_moments_are_symmetric_whatever_the_mean(mean):
    x = mx.random.normal((500, 64)) * mx.exp(mx.arange(-32, 32) * 0.1) + mean
    second = InputMoments.of(x).second
    assert (second == second.T).all()
    eigenvalues = np.linalg.eigvalsh(InputMoments.of(x).centred)
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]
