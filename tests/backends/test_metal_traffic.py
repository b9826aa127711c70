"""What the Metal kernels read: the counts in the repository are those of today's kernels."""

import importlib
import json

import pytest
from support import ROOT


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("metal_traffic")


def results(traffic):
    return json.loads(traffic.RESULTS.read_text())


def test_the_table_covers_what_it_should_and_keeps_its_limits(traffic):
    rows = results(traffic)
    places = {(r["block_size"], r["density"], r["rows"]) for r in rows}
    assert places == {(b, d, n) for b in (16, 32, 64) for d in (0.1, 0.5) for n in (1, 8, 64, 512)}
    for r in rows:
        assert r["read"] <= 1.05 * r["expected"]
        assert r["macs"] == r["macs_needed"]
        if r["rows"] == 1:
            assert r["read"] <= 1.1 * r["once"]


@pytest.mark.parametrize(
    ("density", "block_size", "n"), [(0.1, 16, 1), (0.1, 32, 8), (0.1, 64, 64)]
)
def test_counting_again_gives_the_same_numbers(traffic, density, block_size, n):
    key = (block_size, density, n)
    (kept,) = (r for r in results(traffic) if (r["block_size"], r["density"], r["rows"]) == key)
    assert traffic.measure(density, block_size, n) == kept
