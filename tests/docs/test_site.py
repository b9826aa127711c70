"""The site: its API pages have every public name, each on the page where one looks for it."""

import doctest
import inspect
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from support import ROOT

import mlx_sparse_nn
from mlx_sparse_nn import patterns, physics

sys.path.insert(0, str(ROOT / "docs/site"))

import api_pages

NAMES = api_pages.public_names()


def test_every_name_of_the_packages_has_a_page():
    expected = {f"mlx_sparse_nn.{name}" for name in mlx_sparse_nn.__all__}
    expected -= {"mlx_sparse_nn.patterns", "mlx_sparse_nn.physics"}
    expected |= {f"mlx_sparse_nn.physics.{name}" for name in physics.__all__}
    assert expected <= NAMES.keys()
    rest = NAMES.keys() - expected
    assert {name.rpartition(".")[0] for name in rest} == {patterns.__name__}
    builders = {"block_diagonal", "banded", "butterfly", "random", "covering", "from_mask"}
    assert {f"{patterns.__name__}.{name}" for name in builders} <= rest


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_described_where_one_looks_for_it(name):
    value = NAMES[name]
    key = api_pages.page_of(value)
    page = api_pages.text(key, {name: value})
    assert f":: {name}\n" in page
    first = (inspect.getdoc(value) or "").partition("\n")[0]
    assert len(first) > 20
    assert not first.startswith(f"{type(value).__name__}(")  # what dataclass writes by itself


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("BlockSparseLinear", "layers"),
        ("CSRPattern", "patterns"),
        ("patterns.banded", "patterns"),
        ("sparsify", "surgery"),
        ("BlockPlaces", "surgery"),
        ("InputMoments", "calibration"),
        ("verify", "diagnostics"),
        ("csr_array", "arrays"),
        ("kron", "arrays"),
        ("spmm", "products"),
        ("use_cpu", "products"),
        ("physics.lanczos", "physics"),
    ],
)
def test_pages_are_those_of_the_rooms(name, key):
    assert api_pages.page_of(NAMES[f"mlx_sparse_nn.{name}"]) == key


MORE = api_pages.examples()


@pytest.mark.parametrize("name", MORE)
def test_an_example_runs(name, tmp_path, monkeypatch):
    assert name in NAMES
    assert ">>>" not in (inspect.getdoc(NAMES[name]) or "")  # a docstring's own is enough
    monkeypatch.chdir(tmp_path)  # some write a file
    names = {"mx": mx, "nn": nn, "np": np, "optim": optim}
    device = mx.default_device()
    try:
        exec(compile(api_pages.imports(MORE[name]) + MORE[name], name, "exec"), names)
    finally:
        mx.set_default_device(device)


# What stands before the example of a docstring, in the words of its reader: "model" is theirs.
STAGE = {
    "advise": "",
    "calibrate": "model, batches = encoder, inputs",
    "layer_moments": "model, tokens = Model(), rows",
    "qspmm": "pattern = patterns.banded(64, 64, 1, 32); data = mx.ones(pattern.data_shape); "
    "x = mx.ones((3, 64))",
    "refit": "dense, model, batches = Model(), Model(), [rows]; sparsify(model, density=0.5)",
    "restore": "made = nn.Sequential(nn.Linear(64, 64)); sparsify(made, density=0.5); "
    "made.save_weights('sparse.safetensors'); model = nn.Sequential(nn.Linear(64, 64))",
    "save_trainable": "model = mlp; sparsify(model, density=0.5)",
    "sensitivity": "model, batches = encoder, inputs",
    "shard_boundaries": "mlp = nn.Module(); up, down = nn.Linear(64, 96), nn.Linear(96, 64); "
    "mlp.up, mlp.down = map(BlockSparseLinear.from_linear, (up, down))",
    "sparsify": "",
    "summary": "model = mlp",
    "verify": "model = mlp; sparsify(model, density=0.5); model = model.layers[0]",
}
SETTING = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Module()]
        self.layers[0].up = nn.Linear(64, 64)

    def __call__(self, x):
        return self.layers[0].up(x)


mx.random.seed(0)
encoder = nn.TransformerEncoder(num_layers=2, dims=64, num_heads=4)
inputs = [(mx.random.normal((2, 32, 64)), None)]
mlp = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64))
rows = mx.random.normal((64, 64))
"""


def examples_of(name):
    """Return the examples of a docstring, and those of the methods of a class."""
    value = NAMES[name]
    module = sys.modules[value.__module__]
    names = vars(module) | {k: getattr(mlx_sparse_nn, k) for k in mlx_sparse_nn.__all__}
    names |= {k: getattr(physics, k) for k in physics.__all__ if "physics" in name}
    names |= {"mx": mx, "nn": nn, "np": np}
    found = doctest.DocTestFinder().find(value, name, module=module, globs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [name for name in NAMES if examples_of(name)])
def test_the_example_of_a_docstring_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    short = name.removeprefix("mlx_sparse_nn.")
    for test in examples_of(name):
        if short in STAGE:  # what it prints depends on the machine, or on what is drawn
            exec(SETTING + STAGE[short], test.globs)
            for example in test.examples:
                exec(example.source, test.globs)
        else:
            assert doctest.DocTestRunner(optionflags=flags).run(test).failed == 0, test.name


def test_every_name_has_an_example():
    documented = {name for name, value in NAMES.items() if ">>>" in (inspect.getdoc(value) or "")}
    missing = sorted(NAMES.keys() - documented - MORE.keys())
    assert not missing, f"an Example in its docstring, or in docs/site/examples.md: {missing}"


def test_pages_are_written_once(tmp_path):
    api_pages.write(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(api_pages.PAGES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    api_pages.write(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
