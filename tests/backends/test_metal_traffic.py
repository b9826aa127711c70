"""What the Metal kernels read: the counts in the repository are those of today's kernels."""

import json
import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import metal_counts, metal_holes, metal_traffic
from benchmarks.metal_holes import Cell


def results():
    return json.loads(metal_traffic.RESULTS.read_text())


def test_the_table_covers_what_it_should_and_keeps_its_limits():
    rows = results()
    places = {(r["block_size"], r["density"], r["rows"]) for r in rows}
    assert places == {(b, d, n) for b in (16, 32, 64) for d in (0.1, 0.5) for n in (1, 8, 64, 512)}
    for r in rows:
        # The last step of a short block-row of few rows of x reads its last vectors again, and
        # multiplies zeros.
        few = r["rows"] <= 8
        assert r["read"] <= (1.15 if few else 1.05) * r["expected"]
        assert r["macs"] <= (1.3 if few else 1) * r["macs_needed"]
        if r["rows"] == 1:
            assert r["read"] <= 1.1 * r["once"]


@pytest.mark.parametrize(
    ("density", "block_size", "n"), [(0.1, 16, 1), (0.1, 32, 8), (0.1, 64, 64)]
)
def test_counting_again_gives_the_same_numbers(density, block_size, n):
    key = (block_size, density, n)
    (kept,) = (r for r in results() if (r["block_size"], r["density"], r["rows"]) == key)
    assert metal_traffic.measure(density, block_size, n) == kept


def test_no_block_size_falls_into_a_hole():
    kept = json.loads(metal_holes.RESULTS.read_text())["now"]
    assert [Cell(**r["cell"]) for r in kept] == metal_holes.CELLS
    ratio, cell, other = metal_holes.holes(kept)[0]
    assert ratio <= metal_holes.MOST, f"{cell} moves {ratio:.2f} times what {other} does"


@pytest.mark.parametrize(
    "cell",
    [
        Cell("forward", 48, 9, "float16"),
        Cell("gradient of x", 12, 64, "float32"),
        Cell("gradient of the weight", 24, 17, "bfloat16"),
    ],
)
def test_cells_counted_again_are_the_same(cell):
    kept = json.loads(metal_holes.RESULTS.read_text())["now"]
    (expected,) = (r for r in kept if r["cell"] == cell._asdict())
    counted = metal_holes.count(cell)
    assert counted["kernels"] == expected["kernels"]
    for name in ("bytes_per_mac", "bytes_per_value", "macs_over_needed"):
        assert counted[name] == pytest.approx(expected[name])


def test_a_hole_is_found():
    cells = [Cell("forward", b, 64, "float16") for b in metal_holes.BLOCK_SIZES]
    moved = {cell: metal_holes.law(cell) for cell in cells}
    as_results = lambda: [{"cell": c._asdict(), "bytes_per_mac": m} for c, m in moved.items()]
    assert metal_holes.holes(as_results())[0][0] == pytest.approx(1)
    hole = cells[8]
    moved[hole] *= 1.6
    found = metal_holes.holes(as_results())
    assert [(c, o.block_size) for ratio, c, o in found if ratio > 1.5] == [(hole, 64)]
    moved[hole] *= 100
    found = metal_holes.holes(as_results())
    assert {(c, o.block_size) for ratio, c, o in found if ratio > 1.5} == {(hole, 64), (hole, 32)}


def test_counts_need_clang_for_registers_alone():
    (counted,) = metal_counts.count("forward", 64, 512, metal_counts.mx.float16)
    kept = json.loads(metal_counts.RESULTS.read_text())["now"]
    cell = metal_counts.Cell("forward", 64, 512, "float16")._asdict()
    (expected,) = (r["counts"][0] for r in kept if r["cell"] == cell)
    for name in ("device", "shared_read", "matrix_loads", "barriers", "shared"):
        assert getattr(counted, name) == pytest.approx(expected[name])
