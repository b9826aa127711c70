"""Make the tables and the plot of CUDA kernels from what ``gpu.py`` measured, for each card."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import ranks
from char_lm import ROOT, write_table
from gpu_cells import ALL_BLOCKS, PRODUCTS, ROWS
from styles import LINES

FOLDER = ROOT / "benchmarks/results"
RESULTS = FOLDER / "gpu_h200.json"  # of the card whose numbers docs/backends.md shows
PLOT = ROOT / "docs/gpu.png"
CARDS = ("h200", "h100")


def results_of(card: str) -> Path:
    """Return the file of a card, such as ``NVIDIA H200``."""
    return FOLDER / f"gpu_{card.split()[1].lower()}.json"


def write() -> None:
    """Write all tables, and the plot."""
    results = json.loads(RESULTS.read_text())
    write_table("gpu", table(results), "docs/backends.md")
    plot(results)
    page = "benchmarks/README.md"
    for name, text in PARTS.items():
        write_table(f"gpu_{name}", of_cards(text), page)
    write_table("gpu_ranks", of_cards(parallel), "docs/distributed.md")


def of_cards(text: Callable[[dict], str]) -> str:
    """Return a table for each card that was measured."""
    parts = []
    for card in CARDS:
        path = FOLDER / f"gpu_{card}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        if found := text(results):
            parts.append(f"{results['device']}:\n\n{found}")
    return "\n\n".join(parts)


def rows(results: dict) -> str:
    """Return the table of few to many rows of x, in microseconds."""
    cells = results.get("rows", [])
    if not cells:
        return ""
    lines = [
        "| B | density | " + " | ".join(f"{n:,} rows" for n in ROWS) + " |",
        "| --- | --- |" + " --- |" * len(ROWS),
    ]
    dense = {n: statistics.median(c["dense"] for c in cells if c["rows"] == n) for n in ROWS}
    lines.append("| MLX dense | | " + " | ".join(f"{dense[n] * 1e3:.1f}" for n in ROWS) + " |")
    kinds = dict.fromkeys((c["block_size"], c["density"]) for c in cells)
    for block_size, density in kinds:
        mine = {
            c["rows"]: f"{c['ours'] * 1e3:.1f}, {c['bsr'] * 1e3:.1f}"
            for c in cells
            if (c["block_size"], c["density"]) == (block_size, density)
        }
        row = " | ".join(mine[n] for n in ROWS)
        lines.append(f"| {block_size} | {density:g} | {row} |")
    return "\n".join(lines)


def blocks(results: dict) -> str:
    """Return the table of block sizes: how many times as fast as the dense products."""
    cells = results.get("blocks", [])
    if not cells:
        return ""
    lines = [
        "| dtype | outputs, inputs | rows of x | "
        + " | ".join(f"B = {b}" for b in ALL_BLOCKS)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(ALL_BLOCKS),
    ]
    kinds = dict.fromkeys((c["dtype"], tuple(c["shape"]), c["rows"]) for c in cells)
    for dtype, shape, n in kinds:
        mine = {
            c["block_size"]: c
            for c in cells
            if (c["dtype"], tuple(c["shape"]), c["rows"]) == (dtype, shape, n)
        }
        row = [_speeds(mine[b]) if b in mine else "" for b in ALL_BLOCKS]
        lines.append(f"| {dtype} | {shape[0]}, {shape[1]} | {n:,} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _speeds(cell: dict) -> str:
    """Return the speed-up of the forward product, and of all three."""
    dense, ours = (sum(cell[start + p] for p in PRODUCTS) for start in ("dense ", ""))
    forward = PRODUCTS[0]
    return f"{cell['dense ' + forward] / cell[forward]:.2f}, {dense / ours:.2f}"


def quantized(results: dict) -> str:
    """Return the table of quantized blocks, in microseconds."""
    cells = results.get("quantized", [])
    if not cells:
        return ""
    counts = sorted({c["rows"] for c in cells})
    lines = [
        "| B | density | bits | " + " | ".join(f"{n:,} rows" for n in counts) + " |",
        "| --- | --- | --- |" + " --- |" * len(counts),
    ]
    for block_size, density, bits in dict.fromkeys(
        (c["block_size"], c["density"], c["bits"]) for c in cells
    ):
        mine = {
            c["rows"]: ", ".join(
                "-" if c[name] is None else f"{c[name] * 1e3:.1f}"
                for name in ("ours", "blocks", "dense")
            )
            for c in cells
            if (c["block_size"], c["density"], c["bits"]) == (block_size, density, bits)
        }
        row = " | ".join(mine[n] for n in counts)
        lines.append(f"| {block_size} | {density:g} | {bits} | {row} |")
    return "\n".join(lines)


def graphs(results: dict) -> str:
    """Return the table of graphs."""
    cells = results.get("graphs", [])
    if not cells:
        return ""
    lines = [
        "| graph | longest row | columns | forward, ms | cuSPARSE | and gradients | cuSPARSE |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = ("ours", "cusparse", "ours, gradients", "cusparse, gradients")
    for c in cells:
        times = " | ".join(f"{c[kind]['kernel']:.3f}" for kind in kinds)
        lines.append(
            f"| {c['graph']}, {c['rows']:,} rows, {c['nnz'] / c['rows']:.0f} values a row "
            f"| {c['longest']:,} | {c['columns']} | {times} |"
        )
    return "\n".join(lines)


def parallel(results: dict) -> str:
    """Return the table of tensor parallel FFNs."""
    return ranks.table(results["ranks"]) if "ranks" in results else ""


def table(results: dict) -> str:
    """Return the table of docs/backends.md."""
    lines = [
        "| B | density | kernel, ms | MLX dense | PyTorch BSR | layer call, ms | MLX dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cells = [c for c in results["layers"] if c["rows"] == 4096]
    dense = cells[0]["mlx dense"]
    for c in cells[1:]:
        lines.append(
            f"| {c['block_size']} | {c['density']:g} | {c['ours']['kernel']:.3f} "
            f"| {dense['kernel']:.3f} | {c['torch bsr']['kernel']:.3f} | {c['ours']['call']:.3f} "
            f"| {dense['call']:.3f} |"
        )
    lines.append(f"\n{results['device']}, bfloat16, 4096 x 4096 weight, 4096 rows of x.")
    return "\n".join(lines)


def aims(results: dict) -> str:
    """Return the table of what the kernels should reach, and what they do."""
    if "layers" not in results:
        return ""

    def cells(n):
        return [c for c in results["layers"] if c["rows"] == n and "block_size" in c]

    def dense(n):
        return next(c["mlx dense"] for c in results["layers"] if c["rows"] == n)

    def ratio(c):
        return c["torch bsr"]["kernel"] / c["ours"]["kernel"]

    many = {(c["block_size"], c["density"]): c for c in cells(4096)}
    ratios = [ratio(c) for c in many.values()]
    few = {
        n: [c for c in cells(n) if c["block_size"] >= 32 and c["density"] in (0.1, 0.2)]
        for n in (1, 16)
    }
    few_ratios = [ratio(c) for n in few for c in few[n]]
    own, trained = dense(4096)["kernel"], results["training"][0]
    forward = {
        (c["block_size"], c["density"]): c["forward"]["kernel"] for c in results["training"][1:]
    }
    rows = [
        (
            "4096 rows, kernel: 1.7 times PyTorch's BSR in the geometric mean, no cell slower",
            f"{statistics.geometric_mean(ratios):.2f}; {sum(r < 1 for r in ratios)} of "
            f"{len(ratios)} cells slower, the least at {min(ratios):.2f}",
        ),
        *(
            (
                f"4096 rows, kernel: faster than MLX dense at B = {b}, density {d:g}",
                f"{forward[b, d]:.3f} ms, dense {own:.3f}",
            )
            for b, d in ((16, 0.1), (32, 0.2), (64, 0.35), (128, 0.5))
        ),
        (
            "4096 rows, kernel: 3.5 times faster than MLX dense at B = 64, density 0.1",
            f"{own / forward[64, 0.1]:.2f}",
        ),
        (
            "1 and 16 rows, B >= 32, densities 0.1 and 0.2, kernel: 3 times PyTorch's BSR",
            f"{min(few_ratios):.1f} to {max(few_ratios):.1f}",
        ),
        *(
            (
                f"the same, {n} row{'s' * (n > 1)}: layer call below MLX dense's, in turns",
                f"{sum(c['ours']['call'] < c['dense call'] for c in few[n])} of {len(few[n])}; "
                f"{min(c['ours']['call'] for c in few[n]) * 1e3:.0f} to "
                f"{max(c['ours']['call'] for c in few[n]) * 1e3:.0f} us, "
                f"dense {min(c['dense call'] for c in few[n]) * 1e3:.0f} to "
                f"{max(c['dense call'] for c in few[n]) * 1e3:.0f}",
            )
            for n in few
        ),
        *(
            (
                f"training, B = {c['block_size']}, density {c['density']:g}, kernels: "
                "within 3.2 forwards, below dense",
                f"{c['training']['kernel'] / c['forward']['kernel']:.2f} forwards, "
                f"{c['training']['kernel']:.3f} ms, dense {trained['training']['kernel']:.3f} "
                f"(whole steps {c['step']['kernel']:.3f}, dense {trained['step']['kernel']:.3f})",
            )
            for c in results["training"][1:]
        ),
        *(
            (
                f"Ising n = {c['qubits']}, kernel: 1.3 times cuSPARSE",
                f"{c['cusparse']['kernel'] / c['ours']['kernel']:.2f}; "
                f"{c['ours']['kernel']:.4f} ms",
            )
            for c in results["ising"]
        ),
    ]
    return "\n".join(["| aim | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def plot(results: dict) -> None:
    """Draw the speed-up over the dense layer against density, one line per block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    cells = [c for c in results["layers"] if c["rows"] == 4096]
    dense = cells[0]["mlx dense"]["kernel"]
    for axis, key, title in (
        (axes[0], "ours", "mlx_sparse_nn"),
        (axes[1], "torch bsr", "PyTorch's block-sparse product"),
    ):
        for block_size, style in zip((16, 32, 64, 128), LINES, strict=False):
            line = [c for c in cells[1:] if c["block_size"] == block_size]
            axis.plot(
                [c["density"] for c in line],
                [dense / c[key]["kernel"] for c in line],
                label=f"blocks of {block_size}",
                **style,
            )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="density", xscale="log", yscale="log")
        axis.set_xticks([0.05, 0.1, 0.2, 0.5], labels=["0.05", "0.1", "0.2", "0.5"])
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], labels=["0.1", "0.2", "0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times as fast as MLX's dense kernel")
    axes[0].legend()
    figure.suptitle(
        f"{results['device']}: bfloat16, weight 4096 x 4096, 4,096 rows; the dense one by cuBLAS",
        fontsize="medium",
    )
    figure.savefig(PLOT, dpi=110)


PARTS: dict[str, Callable[[dict], str]] = {
    "aims": aims,
    "rows": rows,
    "blocks": blocks,
    "quantized": quantized,
    "graphs": graphs,
}
