"""A density for each layer by its path, in sparsify and prune."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import assert_equal, untyped

from mlx_sparse_nn import BlockSparseLinear, patterns, prune, sparsify


def make_model():
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))


class Measured(Mapping):
    """A mapping that is no dict, as sensitivity returns one."""

    def __init__(self, densities):
        self.densities = densities

    def __getitem__(self, path):
        return self.densities[path]

    def __iter__(self):
        return iter(self.densities)

    def __len__(self):
        return len(self.densities)


class TestSparsify:
    def test_each_layer_gets_its_own(self):
        model, twin = make_model(), make_model()
        twin.update(model.parameters())
        by_path = {"layers.0": 0.25, "layers.2": np.float16(0.5), "layers.3": 1.0}
        done = sparsify(model, block_size=4, density=Measured(by_path))
        assert {path: layer.density for path, layer in done.sparse.items()} == {
            "layers.0": 0.25,
            "layers.2": 0.5,
        }
        assert done.skipped == {
            "layers.1": "density does not name it",
            "layers.3": "its density is 1",
        }
        assert type(model.layers[1]) is type(model.layers[3]) is nn.Linear
        for i, density in ((0, 0.25), (2, 0.5)):
            alone = BlockSparseLinear.from_linear(twin.layers[i], block_size=4, density=density)
            assert_equal(model.layers[i].todense(), alone.todense())

    def test_a_named_layer_becomes_sparse_whatever_its_dims(self):
        model = nn.Sequential(nn.Linear(10, 12))
        assert list(sparsify(model, density={"layers.0": 0.5}).sparse) == ["layers.0"]

    def test_what_the_predicate_says_goes_first(self):
        own = {
            "layers.0": False,
            "layers.1": {"density": 1.0},
            "layers.2": {"block_size": 8},
            "layers.3": {"pattern": patterns.banded(32, 32, 0, 16)},
        }
        by_path = {"layers.0": 0.5, "layers.1": 0.25, "layers.2": 0.25}
        done = sparsify(
            make_model(), block_size=4, density=by_path, predicate=lambda path, _: own[path]
        )
        assert done.skipped == {"layers.0": "the predicate returned False"}
        assert {p: (x.density, x.block_size) for p, x in done.sparse.items()} == {
            "layers.1": (1.0, 4),
            "layers.2": (0.25, 8),
            "layers.3": (0.5, 16),
        }

    def test_the_predicate_makes_no_layer_sparse_that_has_no_density(self):
        done = sparsify(
            make_model(), block_size=4, density={"layers.1": 0.5}, predicate=lambda *_: True
        )
        assert list(done.sparse) == ["layers.1"]
        assert done.skipped["layers.0"] == "density does not name it"

    def test_a_shared_layer_is_named_by_any_of_its_paths(self):
        shared = nn.Linear(32, 32)
        model = nn.Sequential(shared, nn.ReLU(), shared)
        done = sparsify(model, block_size=4, density={"layers.2": 0.25})
        assert list(done.sparse) == ["layers.0", "layers.2"]
        assert done.density == 0.25
        assert model.layers[0] is model.layers[2]


class TestPrune:
    def make(self):
        model = make_model()
        sparsify(model, block_size=4, density=1.0)
        return model

    def test_layers_without_a_name_stay_as_they_are(self):
        model = self.make()
        model.layers[1].weight = model.layers[1].weight * float("nan")
        held = model.layers[1].pattern
        done = prune(model, Measured({"layers.0": 0.25, "layers.2": 0.5, "layers.3": 1}))
        assert done.after == {"layers.0": 16, "layers.1": 64, "layers.2": 32, "layers.3": 64}
        assert model.layers[1].pattern is held
        assert done.density == (16 + 64 + 32 + 64) / 256

    def test_a_layer_by_itself_has_the_empty_path(self):
        layer = self.make().layers[0]
        prune(layer, {"": 0.5})
        assert layer.density == 0.5

    def test_a_shared_layer_is_named_by_any_of_its_paths(self):
        layer = self.make().layers[0]
        model = nn.Sequential(layer, nn.ReLU(), layer)
        assert list(prune(model, {"layers.2": 0.25}).after.values()) == [16]


def sparsified(density, **options):
    model = make_model()
    model.layers.append(nn.Embedding(4, 32))
    model.layers.append(model.layers[0])
    kinds = [type(layer) for layer in model.layers]
    try:
        sparsify(model, block_size=4, density=density, **options)
    finally:
        assert [type(layer) for layer in model.layers] == kinds


def pruned(density, **options):
    model = nn.Sequential(*(BlockSparseLinear(32, 32, block_size=4) for _ in range(4)))
    model.layers += [nn.Embedding(4, 32), model.layers[0]]
    held = [layer.pattern for layer in model.layers[:4]]
    try:
        prune(model, density, **options)
    finally:
        assert all(a.pattern is b for a, b in zip(model.layers[:4], held, strict=True))


BAD = [
    ({}, ValueError, r"\] density must name a layer, got an empty dict"),
    ({"layers.1": 0}, ValueError, r" layers\.1\] density must be in \(0, 1\], got 0"),
    ({"layers.1": 1.5}, ValueError, r" layers\.1\] density must be in \(0, 1\], got 1.5"),
    ({"layers.1": None}, TypeError, r" layers\.1\] density must be a number, got None"),
    ({"layers.1": mx.array(0.5)}, TypeError, r" layers\.1\] density must be a number"),
    (
        {"layers.1": 0.5, "layer.2": 0.5},
        ValueError,
        r"\] density names 'layer\.2', which is no \w+\.?\w* of the model; the closest is "
        r"'layers\.2'",
    ),
    ({3: 0.5}, ValueError, r"\] density names 3, which is no .*; the closest is 'layers\.3'"),
    ({"layers.0": 0.5, "layers.5": 0.25}, ValueError, r"\] layers\.0 and layers\.5 are one layer"),
]


@pytest.mark.parametrize(("owner", "call"), [("sparsify", sparsified), ("prune", pruned)])
@pytest.mark.parametrize(("density", "error", "message"), BAD)
def test_bad_densities_are_refused_and_change_nothing(owner, call, density, error, message):
    with pytest.raises(error, match=rf"^\[{owner}" + message):
        call(untyped(density))


@pytest.mark.parametrize(("owner", "call"), [("sparsify", sparsified), ("prune", pruned)])
def test_a_budget_is_one_number(owner, call):
    with pytest.raises(ValueError, match=rf"\[{owner}\] scope must be 'layer' with a density by"):
        call({"layers.1": 0.5}, scope="global")


def test_a_layer_that_stays_dense_says_why():
    message = r"\[sparsify layers\.4\] density names it, but Embedding looks rows up"
    with pytest.raises(ValueError, match=message):
        sparsified({"layers.4": 0.5})
    model = nn.Sequential(BlockSparseLinear(32, 32))
    with pytest.raises(ValueError, match=r"density names it, but .* prune lowers its density"):
        sparsify(model, density={"layers.0": 0.5})
    with pytest.raises(
        ValueError, match=r"density names 'a', which is no nn\.Linear of the model$"
    ):
        sparsify(model, density={"a": 0.5})
