"""What a sweep found: the worst cells first, and a picture of all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import markdown, number, pyplot
from benchmarks.sweep import AXES, Cell

WORST = 40  # cells in the printed report
RANGE = 16.0  # the picture's ends: so many times faster or slower than dense


def ratios(results: dict[str, Any]) -> list[tuple[float | None, dict[str, Any]]]:
    """Return each cell's time over ``nn.Linear``'s, or None where one is not there, and the cell.

    A dense layer's time is the least of those beside all the cells that it stands for, which is put
    in the place of each.
    """
    least: dict[tuple, float] = {}
    for r in results["results"]:
        key, seconds = Cell(**r["cell"]).dense, r["dense"]["seconds"]
        if seconds is not None:
            least[key] = min(seconds, least.get(key, seconds))
    pairs = []
    for r in results["results"]:
        dense = least.get(Cell(**r["cell"]).dense)
        sparse = r["sparse"]["seconds"]
        value = sparse / dense if sparse and dense else None
        pairs.append((value, {**r, "dense": {**r["dense"], "seconds": dense}}))
    return pairs


def wrong(result: dict[str, Any]) -> str | None:
    """Return what is wrong with a cell's results, or None."""
    return result["sparse"].get("wrong")


def text(results: dict[str, Any]) -> str:
    """Return wrong cells, the worst cells, and what each dtype and step comes to."""
    parts = []
    false = [r for r in results["results"] if wrong(r)]
    if false:
        lines = [[*_words(r), str(wrong(r))] for r in false]
        parts.append(f"### Wrong\n\n{markdown([*HEAD, 'what'], lines)}")
    measured = [(value, r) for value, r in ratios(results) if value is not None]
    measured.sort(key=lambda pair: -pair[0])
    lines = [
        [*_words(r), _milliseconds(r, "sparse"), _milliseconds(r, "dense"), number(value)]
        for value, r in measured[:WORST]
    ]
    head = [*HEAD, "ms", "nn.Linear's", "ratio"]
    parts.append(f"### The worst cells\n\n{markdown(head, lines)}")
    head = ["dtype", "step", "density", "cells", "slower", "worst", "geometric mean", "no ratio"]
    parts.append(f"### All cells\n\n{markdown(head, list(_totals(results)))}")
    return "\n\n".join([*parts, dense_text(results)])


HEAD = ["outputs", "inputs", "B", "density", "dtype", "step", "rows", "by"]


def dense_text(results: dict[str, Any]) -> str:
    """Return what a ratio is, and what the dense layer was computed by."""
    machine, versions = results["machine"], results["machine"]["versions"]
    where = versions.get("gpu") or f"{machine['processor']}, cores: {machine['used_cores']}"
    blas = f"; dense float32 and float64 by {versions['blas']}" if "blas" in versions else ""
    loops = ", 16-bit dtypes by MLX's own loops" if blas else ""
    return (
        f"Ratio: this package's time over nn.Linear's. {where}, MLX {versions['mlx']}{blas}{loops}."
    )


def _words(result: dict[str, Any]) -> list[str]:
    cell, by = result["cell"], result["sparse"].get("backends", {})
    words = {**cell, "density": f"{cell['density']:g}", "by": ", ".join(sorted({*by.values()}))}
    return [str(word) for word in words.values()]


def _milliseconds(result: dict[str, Any], name: str) -> str:
    return f"{result[name]['seconds'] * 1e3:.3g}"


def _totals(results: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a line for each dtype, step and density."""
    keys = ("dtype", "step", "density")
    groups: dict[tuple, list[float | None]] = {}
    for value, r in ratios(results):
        groups.setdefault(tuple(r["cell"][key] for key in keys), []).append(value)
    for (dtype, step, density), group in groups.items():
        values = [value for value in group if value is not None]
        slower = str(sum(v > 1 for v in values))
        worst, mean = ("-", "-")
        if values:
            worst, mean = number(max(values)), number(statistics.geometric_mean(values))
        missing = str(len(group) - len(values))
        yield [dtype, step, f"{density:g}", str(len(group)), slower, worst, mean, missing]


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a panel of block sizes by rows for each dtype, step, shape and density.

    Blue is faster than dense, red slower; grey was not measured, and a cross is wrong.
    """
    plt = pyplot()
    by_cell = {Cell(**r["cell"]): (value, r) for value, r in ratios(results)}
    found = {axis: _in_order(by_cell, axis) for axis in AXES}
    columns = [(shape, density) for shape in found["shape"] for density in found["density"]]
    lines = [(dtype, step) for dtype in found["dtype"] for step in found["step"]]
    size = (1.2 + 2.6 * len(columns), 1 + 2.6 * len(lines))
    figure, axes = plt.subplots(
        len(lines), len(columns), figsize=size, layout="constrained", squeeze=False
    )
    colors = plt.get_cmap("RdBu_r").with_extremes(bad="lightgrey")
    end, image = np.log2(RANGE), None
    for i, (dtype, step) in enumerate(lines):
        for j, ((outputs, inputs), density) in enumerate(columns):
            values = np.full((len(found["block_size"]), len(found["rows"])), np.nan)
            axis = axes[i][j]
            for k, block_size in enumerate(found["block_size"]):
                for m, rows in enumerate(found["rows"]):
                    cell = Cell(outputs, inputs, block_size, density, dtype, step, rows)
                    value, r = by_cell.get(cell, (None, None))
                    if value is not None:
                        values[k, m] = np.log2(value)
                    if r is not None and wrong(r):
                        axis.plot(m, k, "kx")
            image = axis.imshow(values, cmap=colors, vmin=-end, vmax=end, aspect="auto")
            axis.set_xticks(range(len(found["rows"])), found["rows"], rotation=90, fontsize=6)
            axis.set_yticks(range(len(found["block_size"])), found["block_size"], fontsize=6)
            axis.set_title(f"{dtype}, {step}\n{outputs} x {inputs}, {density:g}", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("block size", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("rows of x", fontsize=8)
    if image is not None:
        ticks = np.arange(-end, end + 1)
        bar = figure.colorbar(image, ax=axes, fraction=0.03, aspect=40, ticks=ticks)
        bar.ax.set_yticklabels([f"{2.0**tick:g}" for tick in ticks])
        bar.set_label("time over nn.Linear's")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _in_order(cells: dict[Cell, Any], axis: str) -> list[Any]:
    """Return the values of an axis that occur, in the order of the axis, then any others."""
    occur = {getattr(cell, axis) for cell in cells}
    return [v for v in AXES[axis] if v in occur] + sorted(occur - {*AXES[axis]})
