"""Bytes that every Metal product moves, over all block sizes: a search for holes between them.

A hole is a cell that moves more than 1.5 times the bytes of the next smaller block size, or of the
next larger one scaled by the law: blocks of side B and tiles of ROWS rows of x need 1/B + 1/ROWS
elements a multiply-accumulate (a weight gradient 2/B), so that smaller blocks share less.

``python -m benchmarks.metal_holes`` counts each cell on the emulator, over a few threadgroups of a
3072 x 3072 matrix with a quarter of the blocks stored, and writes ``results/metal_holes.json``,
the tables of benchmarks/README.md and ``docs/metal_holes.png``. It takes about ten minutes on two
cores. A run that was stopped goes on where it stopped; ``--again`` begins anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from benchmarks.char_lm import ROOT, write_table

sys.path.insert(0, str(ROOT / "tests/emulators"))
import metal_emulator

metal_emulator.install()  # before the package builds and caches its kernels

from mlx_sparse_nn import CSRPattern, sddmm, spmm, spmm_t  # noqa: E402

RESULTS = ROOT / "benchmarks/results/metal_holes.json"
PICTURE = ROOT / "docs/metal_holes.png"
SIZE = 3072  # of rows and columns: a multiple of every block size
DENSITY = 0.25
SAMPLE, SAMPLE_MACS = 16, 2_000_000  # threadgroups of a launch, and their multiply-accumulates
MOST = 1.5  # times the bytes of a neighbour
PRODUCTS = {
    "forward": lambda pattern, data, x: spmm(data, pattern, x),
    "gradient of x": lambda pattern, data, x: spmm_t(data, pattern, x),
    "gradient of the weight": lambda pattern, data, x: sddmm(pattern, x, x),
}
BLOCK_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
ROWS = (1, 4, 9, 17, 64, 512)
DTYPES = ("float16", "bfloat16", "float32")


class Cell(NamedTuple):
    """One product: its name, side of the blocks, rows of x and dtype."""

    product: str
    block_size: int
    rows: int
    dtype: str


CELLS = [
    Cell(product, block_size, rows, dtype)
    for block_size, product, rows, dtype in itertools.product(BLOCK_SIZES, PRODUCTS, ROWS, DTYPES)
]


@cache
def pattern_of(block_size: int) -> CSRPattern:
    """Return a pattern whose block-rows and block-columns all have the same number of blocks."""
    n = SIZE // block_size
    steps = np.sort(np.random.default_rng(1).choice(n, round(n * DENSITY), replace=False))
    columns = np.sort((np.arange(n)[:, None] + steps) % n, axis=1)
    indptr = np.arange(n + 1) * steps.size
    return CSRPattern(indptr, columns.reshape(-1), (SIZE, SIZE), block_size)


def count(cell: Cell) -> dict[str, Any]:
    """Run some threadgroups of a product and return what all of them move.

    Returns:
        The kernels, bytes of device memory read and written a multiply-accumulate that is needed,
        those a stored value, and multiply-accumulates computed over those needed.
    """
    pattern, dtype = pattern_of(cell.block_size), getattr(mx, cell.dtype)
    data, x = mx.zeros(pattern.data_shape, dtype), mx.zeros((cell.rows, SIZE), dtype)
    needed = pattern.nnz * cell.rows
    with metal_emulator.Emulator(schedules=(), count=True) as emulator:
        mx.eval(PRODUCTS[cell.product](pattern, data, x))
        most = max(_groups(launch) for launch in emulator.launches)
        sample = max(2, min(SAMPLE, SAMPLE_MACS * most // needed))
        emulator.schedules, emulator.sample, emulator.launches = ("forward",), sample, []
        mx.eval(PRODUCTS[cell.product](pattern, data, x))
    moved = macs = 0.0
    for launch in emulator.launches:
        share = _groups(launch) / min(_groups(launch), sample)
        moved += (launch.counts.device_read + launch.counts.device_written) * share
        macs += launch.counts.macs * share
    return {
        "cell": cell._asdict(),
        "kernels": [launch.kernel.removeprefix("mlx_sparse_nn_") for launch in emulator.launches],
        "bytes_per_mac": moved / needed,
        "bytes_per_value": moved / pattern.nnz,
        "macs_over_needed": macs / needed,
    }


def _groups(launch: metal_emulator.Launch) -> int:
    sizes = zip(launch.grid, launch.threadgroup, strict=True)
    return math.prod(-(-grid // group) for grid, group in sizes)


def law(cell: Cell) -> float:
    """Bytes a multiply-accumulate that tiles of blocks need: operands, results and indices.

    Rows are shared by 128 at most, and the sides of a block by 64 outputs at most.
    """
    side, rows = min(cell.block_size, 64), min(cell.rows, 128)
    itemsize = mx.zeros(0, getattr(mx, cell.dtype)).itemsize
    per_row = SIZE * DENSITY  # values of a row
    if cell.product == "gradient of the weight":
        elements = 2 / side + 1 / cell.rows
        index = 4 / (cell.block_size**2 * cell.rows)
    else:
        elements = 1 / side + 1 / rows + 1 / per_row
        index = 4 / (cell.block_size**2 * rows)
        index *= 2 if cell.product == "gradient of x" else 1
    return itemsize * elements + index


def holes(results: list[dict[str, Any]]) -> list[tuple[float, Cell, Cell]]:
    """Return the ratio of each cell's bytes to what a neighbour allows, the worst first."""
    moved = {Cell(**r["cell"]): r["bytes_per_mac"] for r in results}
    found = []
    for small, large in itertools.pairwise(BLOCK_SIZES):
        for cell in moved:
            other = cell._replace(block_size=large)
            if cell.block_size == small and other in moved:
                less = max(1.0, law(cell) / law(other))
                found.append((moved[cell] / (moved[other] * less), cell, other))
                found.append((moved[other] / moved[cell], other, cell))
    return sorted(found, reverse=True)


def table(results: list[dict[str, Any]], product: str, dtype: str = "float16") -> str:
    """Return bytes a multiply-accumulate of one product, by block size and rows of x."""
    moved = {Cell(**r["cell"]): r["bytes_per_mac"] for r in results}
    lines = ["| B | " + " | ".join(f"{n} rows" for n in ROWS) + " |", "|" + " --- |" * 7]
    for block_size in BLOCK_SIZES:
        values = [moved[Cell(product, block_size, rows, dtype)] for rows in ROWS]
        lines.append(f"| {block_size} | " + " | ".join(f"{value:.3g}" for value in values) + " |")
    return "\n".join(lines)


def text(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return what benchmarks/README.md says of the search."""
    now = results["now"]
    parts = [f"{product}, float16:\n\n{table(now, product)}" for product in PRODUCTS]
    found = [pair for pair in holes(now) if pair[0] > MOST]
    summary = f"{_count(now)}; before the kernels were rewritten {_count(results['before'])}."
    listed = [f"- {r:.2f}: {_name(c)}, beside B = {o.block_size}" for r, c, o in found]
    return "\n\n".join([*parts, summary, *(["\n".join(listed)] if listed else [])])


def _count(results: list[dict[str, Any]]) -> str:
    worst = holes(results)
    found = {cell for ratio, cell, _ in worst if ratio > MOST}
    ratio, cell, other = worst[0]
    worst_is = f"the worst ratio is {ratio:.2f}, {_name(cell)}, beside B = {other.block_size}"
    return f"{len(found)} of {len(CELLS)} cells are holes, and {worst_is}"


def _name(cell: Cell) -> str:
    return f"{cell.product}, B = {cell.block_size}, {cell.rows} rows, {cell.dtype}"


def draw(results: list[dict[str, Any]]) -> None:
    """Draw bytes over the law, for each product and dtype by block size and rows of x."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    moved = {Cell(**r["cell"]): r["bytes_per_mac"] for r in results}
    figure, axes = plt.subplots(3, 3, figsize=(9.5, 11), sharex=True, sharey=True)
    for line, product in zip(axes, PRODUCTS, strict=True):
        for axis, dtype in zip(line, DTYPES, strict=True):
            cells = [[Cell(product, b, n, dtype) for n in ROWS] for b in BLOCK_SIZES]
            over = np.array([[moved[c] / law(c) for c in row] for row in cells])
            image = axis.imshow(over, norm=LogNorm(0.8, 8), cmap="viridis", aspect="auto")
            for (i, j), value in np.ndenumerate(over):
                color = "black" if value > 3 else "white"
                axis.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=7)
            axis.set_title(f"{product}, {dtype}", fontsize=8)
            axis.set_xticks(range(len(ROWS)), [str(n) for n in ROWS])
            axis.set_yticks(range(len(BLOCK_SIZES)), [str(b) for b in BLOCK_SIZES])
    for axis in axes[-1]:
        axis.set_xlabel("rows of x")
    for axis in axes[:, 0]:
        axis.set_ylabel("block size")
    bar = figure.colorbar(image, ax=axes, ticks=[1, 2, 4, 8], format="%g", shrink=0.6)
    bar.set_label("device bytes over those of the law")
    bar.ax.minorticks_off()
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight")
    plt.close(figure)


def run(again: bool = False) -> None:
    """Count every cell that the results lack, and keep them from time to time."""
    kept = json.loads(RESULTS.read_text())
    results = {} if again else {Cell(**r["cell"]): r for r in kept["now"]}
    todo = [cell for cell in CELLS if cell not in results]
    for i, cell in enumerate(todo, 1):
        results[cell] = count(cell)
        if i % 20 == 0 or i == len(todo):
            kept["now"] = [results[c] for c in CELLS if c in results]
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        done = "#" * (40 * i // len(todo))
        end = "\n" if i == len(todo) else ""
        print(f"\r[{done:40}] {i} of {len(todo)}", end=end, file=sys.stderr, flush=True)


def write() -> None:
    """Put the tables in benchmarks/README.md, and draw."""
    results = json.loads(RESULTS.read_text())
    write_table("metal_holes", text(results), "benchmarks/README.md")
    draw(results["now"])
    for ratio, cell, other in holes(results["now"])[:10]:
        print(f"{ratio:.2f} {_name(cell)}, beside B = {other.block_size}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="forget the cells counted before")
    run(parser.parse_args().again)
    write()


if __name__ == "__main__":
    main()
