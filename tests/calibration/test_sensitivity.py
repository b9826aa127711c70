"""Densities by what each layer costs the model's outputs."""

import copy
import itertools
from typing import Any

import matplotlib
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from networks import Network, batches, relative_error

from mlx_sparse_nn import (
    BlockSparseLinear,
    Sensitivity,
    calibrate,
    layer_moments,
    sensitivity,
    sparsify,
)
from mlx_sparse_nn.calibration.sensitivity import share_out

matplotlib.use("Agg")
OPTIONS: dict[str, Any] = dict(block_size=8, progress=False)


@pytest.fixture
def model():
    mx.random.seed(0)
    return Network()


def test_errors_are_those_of_the_model_with_one_layer_sparse(model):
    """Fitted to three batches of four, measured on the first."""
    data = batches(4)
    found = sensitivity(model, data, density=0.5, blocks=model.layers, **OPTIONS)
    moments = layer_moments(model, data[1:], progress=False)
    for path in ("layers.0.up", "layers.2.key"):
        for level in (0.25, 0.75):
            other = copy.deepcopy(model)
            _, number, name = path.split(".")
            block = other.layers[int(number)]
            sparse = BlockSparseLinear.from_linear(
                block[name], block_size=8, density=level, moments=moments[path]
            )
            block[name] = sparse
            error = relative_error(other(data[0]), model(data[0]))
            assert found.errors[path][level] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [0]), (2, [0]), (4, [0]), (5, [0, 4]), (20, [0, 5, 10, 15])]
)
def test_some_batches_measure_and_the_others_are_fitted_to(model, n, expected):
    runs = []

    def call(model, batch):
        runs.append(batch[1])
        return model(batch[0])

    data = [(x, number) for number, x in enumerate(batches(n, (1, 5, 8)))]
    only = lambda path, _: path == "layers.0.up"
    sensitivity(model, data, density=0.5, call=call, predicate=only, levels=(0.5,), **OPTIONS)
    fitted = [number for number in range(n) if number not in expected] or [0]
    # The dense model, the inputs of the layer, and the model with the sparse layer.
    assert runs == expected + fitted + expected


def test_with_blocks_and_without_the_numbers_are_the_same(model):
    data, only = batches(), lambda path, _: path.startswith("layers")
    found = sensitivity(model, data, density=0.4, blocks=model.layers, **OPTIONS)
    same = sensitivity(model, data, density=0.4, predicate=only, **OPTIONS)
    assert dict(found) == pytest.approx(dict(same), abs=1e-3)


def test_the_budget_is_met_and_the_model_stays(model):
    before = {path: id(module) for path, module in model.named_modules()}
    for density in (0.125, 0.3, 0.5, 0.9, 1.0):
        found = sensitivity(
            model, batches(2), density=density, blocks=model.layers, levels=(0.125, 0.5), **OPTIONS
        )
        assert isinstance(found, Sensitivity)
        assert density - 1e-9 <= found.density <= density + 64 / 18432 + 1e-9  # by a block at most
        assert all(0.125 <= value <= 1 for value in found.values())
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert model.training


def test_one_measurement_serves_every_density(model):
    found = sensitivity(model, batches(), density=0.5, blocks=model.layers, **OPTIONS)
    for density in (0.125, 0.3, 0.5, 1.0):
        other = found.at(density)
        assert density - 1e-9 <= other.density <= density + 64 / 18432
        assert other.errors is found.errors
    assert dict(found.at(0.5)) == dict(found)
    with pytest.raises(ValueError, match=r"\[Sensitivity\.at\] density must be at least the least"):
        found.at(0.1)


def test_layers_that_matter_more_get_more(model):
    model.layers[1].down.weight = 8 * model.layers[1].down.weight
    found = sensitivity(model, batches(), density=0.5, blocks=model.layers, **OPTIONS)
    assert found["layers.1.down"] > max(found["layers.0.down"], found["layers.2.down"])
    even = copy.deepcopy(model)
    calibrate(even, batches(), density=0.5, blocks=even.layers, **OPTIONS)
    report = calibrate(model, batches(), density=found, blocks=model.layers, **OPTIONS)
    assert report.density == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
def test_outputs_that_cannot_be_compared_are_refused(model, bad):
    masked = lambda m, x: mx.where(mx.arange(5) < 3, bad, m(x))
    with pytest.raises(ValueError, match="call must return finite outputs, got nan or infinity in"):
        sensitivity(model, batches(), density=0.5, call=masked, **OPTIONS)
    with pytest.raises(ValueError, match="outputs that are not all 0"):
        sensitivity(model, batches(), density=0.5, call=lambda m, x: 0 * m(x), **OPTIONS)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_unit_of_the_outputs_changes_no_digit(model, size):
    only = lambda path, _: path.endswith(("0.up", "1.down"))
    options: dict[str, Any] = dict(density=0.5, predicate=only, **OPTIONS)
    found = sensitivity(model, batches(), **options)
    scaled = sensitivity(model, batches(), call=lambda m, x: size * m(x), **options)
    for path in found:
        for level, error in found.errors[path].items():
            assert scaled.errors[path][level] == pytest.approx(error, rel=1e-4)


def test_batches_without_a_token_that_counts_do_not_measure(model):
    data = [(x, np.full((4, 25), number > 0)) for number, x in enumerate(batches())]
    options: dict[str, Any] = dict(density=0.5, call=lambda m, batch: m(batch[0]), **OPTIONS)
    found = sensitivity(model, data, rows=lambda batch: batch[1], **options)
    same = sensitivity(model, data[1:], rows=lambda batch: batch[1], **options)
    assert found.errors == same.errors


@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_densities_are_of_whole_blocks(model, block_size):
    options: dict[str, Any] = dict(block_size=block_size, blocks=model.layers, progress=False)
    found = sensitivity(model, batches(), density=0.5, **options)
    for path, density in found.items():
        assert density * found.n_places[path] == pytest.approx(
            round(density * found.n_places[path])
        )
    report = calibrate(model, batches(), density=found, **options)
    kept = {path: 1.0 for path in found} | {p: q.density for p, q in report.patterns.items()}
    assert kept == pytest.approx(dict(found))


def test_a_folder_is_of_one_function(model, tmp_path):
    options: dict[str, Any] = dict(density=0.5, blocks=model.layers, resume=tmp_path, **OPTIONS)
    sensitivity(model, batches(), **options)
    with pytest.raises(ValueError, match="was begun with other function"):
        calibrate(model, batches(), **options)


def test_sparsify_takes_it_too(model):
    found = sensitivity(model, batches(), density=0.5, blocks=model.layers, **OPTIONS)
    report = sparsify(model, block_size=8, density=found)
    for path, pattern in report.patterns.items():
        assert pattern.density == pytest.approx(found[path], abs=0.05)


def test_few_and_many_layers_share_out_as_an_exhaustive_search_does():
    rng = np.random.default_rng(0)
    levels = (0.25, 0.5, 0.75)
    for _ in range(20):
        roots = np.sort(rng.random((3, 3)), axis=1)[:, ::-1]
        errors = {str(i): dict(zip(levels, roots[i], strict=True)) for i in range(3)}
        shapes = {str(i): (int(rng.integers(1, 4)) * 8, 16) for i in range(3)}
        n_places = {path: n_out * n_in for path, (n_out, n_in) in shapes.items()}
        found = share_out(errors, shapes, n_places, 0.6)
        sizes = np.array([shapes[path][0] * 16 for path in errors])
        assert np.dot(list(found.values()), sizes) == pytest.approx(0.6 * sizes.sum(), abs=1)

        def cost(densities, roots=roots):
            known = [0.25, 0.5, 0.75, 1.0]
            return sum(
                np.interp(density, known, [*root, 0.0]) ** 2
                for density, root in zip(densities, roots, strict=True)
            )

        grid = np.linspace(0.25, 1, 25)
        best = min(
            cost(densities)
            for densities in itertools.product(grid, repeat=3)
            if np.dot(densities, sizes) <= 0.6 * sizes.sum() + 1e-9
        )
        # The search is over the lower hull: what lies above a line is passed over.
        assert cost(list(found.values())) <= best * 1.3 + 1e-3


def test_rows_that_do_not_count_do_not_measure(model):
    keep = np.random.default_rng(0).random((4, 25)) < 0.7
    results = []
    for noise in (0.0, 3.0):
        padded = [mx.where(mx.array(keep[..., None].tolist()), x, noise) for x in batches()]
        found = sensitivity(
            model, padded, density=0.5, blocks=model.layers, rows=lambda _: keep, **OPTIONS
        )
        results.append(dict(found))
    assert results[0] == results[1]


def test_an_interrupted_measurement_goes_on(model, tmp_path, monkeypatch):
    from mlx_sparse_nn.calibration import model_fit

    options: dict[str, Any] = dict(density=0.5, blocks=model.layers, **OPTIONS)
    whole = sensitivity(model, batches(), **options)
    fits, real = [], model_fit.fit_pattern

    def interrupted(*args):
        fits.append(args)
        if len(fits) == 18:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(model_fit, "fit_pattern", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, batches(), resume=tmp_path, **options)
    found = sensitivity(model, batches(), resume=tmp_path, **options)
    assert found.errors == whole.errors
    assert len(fits) == 18 + 4 * (12 - 4)
    other = sensitivity(
        model, batches(), density=0.3, blocks=model.layers, resume=tmp_path, **OPTIONS
    )
    assert dict(other) == dict(found.at(0.3))
    assert len(fits) == 18 + 4 * (12 - 4)
    with pytest.raises(ValueError, match="was begun with other levels"):
        sensitivity(model, batches(), resume=tmp_path, levels=(0.5,), **options)


def test_it_is_printed_and_drawn(model):
    found = sensitivity(model, batches(), density=0.5, blocks=model.layers, **OPTIONS)
    text = str(found)
    assert "densities of 12 layers, 0.5 together" in text
    assert "at 0.125" in text
    assert f"{found['layers.0.up']:.3g}" in text
    ax = found.plot()
    labels = [line.get_label() for line in ax.get_lines()]
    assert labels == ["query", "key", "up", "down", "all together"]
    line = ax.get_lines()[2]
    assert np.array(line.get_ydata()).tolist() == [found[f"layers.{i}.up"] for i in range(3)]


def test_a_model_without_numbers_in_its_paths_is_drawn():
    model = nn.Module()
    model.inner = nn.Linear(8, 8)
    found = sensitivity(model, batches(), density=0.5, call=lambda m, x: m["inner"](x), **OPTIONS)
    assert len(found.plot().get_lines()) == 2


@pytest.mark.parametrize(
    ("change", "kind", "error"),
    [
        (dict(density=0.1), ValueError, "at least the least of levels, 0.125, got 0.1"),
        (dict(density={"layers.0.up": 0.5}), TypeError, "density must be a number"),
        (dict(levels=()), TypeError, "levels must be a list of densities"),
        (dict(levels=0.5), TypeError, "levels must be a list of densities"),
        (dict(levels=(0.5, 1)), ValueError, "levels must be below 1"),
        (dict(levels=(0.5, "a")), TypeError, "levels must be a number"),
        (dict(call=lambda m, x: None), TypeError, "an array or a tuple that begins with one"),
        (dict(call=lambda m, x: m(x).sum()), TypeError, "got a scalar"),
    ],
)
def test_bad_arguments(model, change, kind, error):
    with pytest.raises(kind, match=error):
        sensitivity(model, batches(), **dict(density=0.5, progress=False) | change)
