"""The fit of a layer, beside ``numpy.linalg.lstsq`` on the samples themselves."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import correlated, relative_error

from mlx_sparse_nn import BlockSparseLinear, InputMoments, layer_moments, patterns, refit
from mlx_sparse_nn.core.least_squares import LeastSquares

# Moments are float32 products, summed in float64: the fit is as exact as the condition of the
# samples lets it be.
TOLERANCE = 2e-3


def best(x, wanted, columns, has_bias):
    """Return weight (n_in,) and bias of the best affine function of some columns, by lstsq."""
    chosen = np.concatenate([x[:, columns], np.ones((len(x), int(has_bias)))], axis=1)
    solution = np.linalg.lstsq(chosen, wanted, rcond=None)[0]
    weight = np.zeros(x.shape[1])
    weight[columns] = solution[: columns.sum()]
    return weight, solution[-1] if has_bias else 0.0


def oracle(linear, pattern, x):
    """Return the dense weight and bias that lstsq finds for the columns that each row keeps."""
    x = x.astype(np.float64)
    weight = np.array(linear.weight, np.float64)
    has_bias = "bias" in linear
    bias = np.array(linear.bias, np.float64) if has_bias else np.zeros(len(weight))
    mask = np.array(pattern.tomask())
    rows = [best(x, x @ weight[row] + bias[row], mask[row], has_bias) for row in range(len(weight))]
    return np.array([w for w, _ in rows]), np.array([b for _, b in rows])


@given(
    n_out=st.integers(1, 24),
    n_in=st.integers(2, 24),
    block_size=st.sampled_from([1, 3, 4, 8, 16]),
    density=st.floats(0.1, 1),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_bias_are_those_of_lstsq(n_out, n_in, block_size, density, bias, seed):
    mx.random.seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias)
    x = correlated(8 * n_in, n_in, seed)
    pattern = patterns.random(n_out, n_in, density, block_size, seed)
    layer = BlockSparseLinear.from_linear(
        linear, pattern=pattern, moments=InputMoments.of(mx.array(x)), damping=0
    )
    weight, best_bias = oracle(linear, pattern, x)
    missing = np.array(layer(mx.array(x)), np.float64) - (x @ weight.T + best_bias)
    assert np.linalg.norm(missing) <= TOLERANCE * np.linalg.norm(np.array(linear(mx.array(x))))
    assert not np.array(layer.todense())[~np.array(pattern.tomask())].any()


def test_a_fit_loses_less_than_the_values_kept():
    linear, x = nn.Linear(48, 32), mx.array(correlated(500, 48))
    moments = InputMoments.of(x)
    y = linear(x)
    for density in (0.25, 0.5, 0.75):
        options: dict[str, Any] = dict(block_size=8, density=density)
        cut = BlockSparseLinear.from_linear(linear, **options)
        same = BlockSparseLinear.from_linear(linear, **options, moments=moments, score="l2")
        fitted = BlockSparseLinear.from_linear(linear, **options, moments=moments)
        errors = [relative_error(layer(x), y) for layer in (cut, same, fitted)]
        assert same.pattern == cut.pattern
        assert max(errors[1:]) < 0.7 * errors[0], errors


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("n_in", "block_size"), [(24, 8), (22, 8), (9, 1)])
def test_scores_are_what_the_loss_of_a_block_costs(n_in, block_size, has_bias):
    mx.random.seed(1)
    linear = nn.Linear(n_in, 13, bias=has_bias)
    x = correlated(300, n_in)
    problem = LeastSquares(InputMoments.of(mx.array(x)), 0.0, has_bias)
    scores = problem.scores(np.array(linear.weight, np.float64), block_size)
    whole = np.ones(scores.shape, bool)
    y = np.array(linear(mx.array(x)), np.float64)
    for row, col in np.ndindex(*scores.shape):
        kept = whole.copy()
        kept[row, col] = False
        mask = np.kron(kept, np.ones((block_size, block_size), bool))[:13, :n_in]
        weight, bias = oracle(linear, patterns.from_mask(mask, block_size), x)
        # Other block-rows lose nothing.
        cost = np.square(x.astype(np.float64) @ weight.T + bias - y).sum()
        assert scores[row, col] == pytest.approx(cost, rel=1e-2, abs=1e-4 * np.square(y).sum())


def test_either_side_of_the_system_gives_the_same():
    """More than half kept, and less, are solved by different systems."""
    x = correlated(400, 32)
    weight = np.random.default_rng(0).normal(size=(4, 32))  # one block-row
    problem = LeastSquares(InputMoments.of(mx.array(x)), 0.01, True)
    gram = problem._gram
    for n_kept in range(1, 8):
        kept = np.zeros((1, 8), bool)
        kept[0, :n_kept] = True
        columns = np.repeat(kept[0], 4)
        fitted = problem.fit(weight, kept, 4)[:, columns]
        direct = np.linalg.solve(gram[columns][:, columns], gram[columns] @ weight.T).T
        assert relative_error(fitted, direct) < 1e-9


def test_few_samples_need_damping_and_the_error_says_so():
    linear, x = nn.Linear(64, 16), mx.array(correlated(10, 64))
    moments = InputMoments.of(x)
    layer = BlockSparseLinear.from_linear(linear, block_size=16, density=0.5, moments=moments)
    assert np.isfinite(np.array(layer.weight)).all()
    with pytest.raises(ValueError, match=r"10 samples of 64 features.*more samples, or more damp"):
        BlockSparseLinear.from_linear(
            linear, block_size=16, density=0.5, moments=moments, damping=0
        )


def test_inputs_that_are_all_zero_are_said_to_be_so():
    moments = InputMoments.of(mx.zeros((9, 16)))
    with pytest.raises(ValueError, match="all zero: leave the layer out"):
        BlockSparseLinear.from_linear(nn.Linear(16, 16), block_size=8, moments=moments)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_layer_keeps_its_dtype_mode_and_what_is_frozen(dtype):
    linear = nn.Linear(32, 32)
    linear.set_dtype(dtype)
    linear.eval()
    linear.freeze(keys="bias")
    x = mx.array(correlated(200, 32)).astype(dtype)
    layer = BlockSparseLinear.from_linear(
        linear, block_size=8, density=0.5, moments=InputMoments.of(x)
    )
    assert (layer.weight.dtype, layer.bias.dtype, layer.training) == (dtype, dtype, False)
    assert set(layer.trainable_parameters()) == {"weight"}
    assert relative_error(layer(x).astype(mx.float32), linear(x).astype(mx.float32)) < 0.5


def test_refit_changes_a_layer_in_place():
    mx.random.seed(0)
    linear, x = nn.Linear(32, 24), mx.array(correlated(300, 32))
    layer = BlockSparseLinear.from_linear(linear, block_size=8, density=0.5)
    before = relative_error(layer(x), linear(x))
    pattern, model = layer.pattern, nn.Sequential(layer)
    found = refit(layer, linear, layer_moments(model, [x], progress=False)["layers.0"])
    after = relative_error(layer(x), linear(x))
    assert model.layers[0].pattern == pattern
    assert after < 0.7 * before
    size = np.linalg.norm(np.array(linear(x))) / np.linalg.norm(np.array(x @ linear.weight.T))
    assert found.error_kept == pytest.approx(before * size, rel=1e-3)
    assert found.error_fitted == pytest.approx(after * size, rel=1e-3)


def test_refit_says_what_the_stored_values_do():
    linear, x = nn.Linear(32, 32), mx.array(correlated(300, 32))
    layer = BlockSparseLinear.from_linear(linear, block_size=8, density=1.0)
    layer.set_dtype(mx.bfloat16)
    found = refit(layer, linear, InputMoments.of(x))
    layer.set_dtype(mx.float32)
    size = np.linalg.norm(np.array(linear(x))) / np.linalg.norm(np.array(x @ linear.weight.T))
    error = relative_error(layer(x), linear(x)) * size
    assert error > 0
    assert found.error_fitted == pytest.approx(error, rel=0.05)


def test_values_that_overflow_are_refused():
    linear = nn.Linear(32, 32)
    layer = BlockSparseLinear.from_linear(linear, block_size=8, density=1.0)
    layer.set_dtype(mx.float16)
    linear.weight = linear.weight * 1e8
    before = np.array(layer.weight)
    with pytest.raises(ValueError, match=r"\[refit\] the values that fit overflow .*float16"):
        refit(layer, linear, InputMoments.of(mx.array(correlated(300, 32))))
    assert (np.array(layer.weight) == before).all()
