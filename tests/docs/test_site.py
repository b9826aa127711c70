"""The site: its API pages have every public name, each on the page where one looks for it."""

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
