"""Tables and plots made from the results of a run."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environments import PEERS, ROOT
from benchmarks.workloads import from_json

RESULTS = ROOT / "benchmarks/results/cpu.json"
PAGE = "benchmarks/README.md"
BLOCK_SIZES = (1, 4, 8, 16, 32, 64)
Result = dict[str, Any]


def ratios(result: Result, peer: str) -> list[float]:
    """Return how many times as long a peer takes as mlx_sparse_nn, turn by turn."""
    peers = result["peers"]
    if peer not in peers or "ours" not in peers:
        return []
    pairs = zip(peers[peer]["turns"], peers["ours"]["turns"], strict=False)
    return [theirs / ours for theirs, ours in pairs]


def ratio(result: Result, peer: str) -> float:
    """Return the median of :func:`ratios`."""
    return statistics.median(ratios(result, peer))


def memory(result: Result, peer: str = "ours") -> float | None:
    """Return the peak of memory over the bytes of operands, of what the peer keeps of the pattern,
    of results and of gradients."""
    of_peer = result["peers"].get(peer, {})
    if "peak" not in of_peer or result["made"] is None:
        return None
    return of_peer["peak"] / (of_peer["kept"] + result["made"])


def memory_of_csr(result: Result) -> float:
    """Return the peak of memory over the bytes of operands, CSR indices, results and gradients."""
    return result["peers"]["ours"]["peak"] / result["held"]


def select(results: Result, kind: str, **values: Any) -> list[Result]:
    """Return the results of a kind of workload with the values given, or one of each tuple, by
    rising size."""

    def fits(workload: dict[str, Any]) -> bool:
        return workload["kind"] == kind and all(
            workload[key] in (value if isinstance(value, tuple) else (value,))
            for key, value in values.items()
        )

    fitting = [result for result in results["results"] if fits(result["workload"])]
    return sorted(fitting, key=lambda result: list(result["workload"].values()))


def number(value: float) -> str:
    """Return two digits, or all before the point."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def cell(result: Result, peer: str, spread: bool = True) -> str:
    """Return the median ratio and its quartiles."""
    values = ratios(result, peer)
    if not values:
        return "-"
    text = number(statistics.median(values))
    if spread and len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        text += f" ({number(low)} to {number(high)})"
    return text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(results: Result) -> str:
    """Return what the run was made on, in one sentence."""
    m = results["machine"]
    versions = {name: v for peer in m["peers"].values() for name, v in peer.items()}
    ours, theirs = m["peers"].get("ours", {}), m["peers"].get("mlx_sparse", {})
    parts = [f"MLX {ours.get('mlx', versions.get('mlx', 'none'))}"]
    if theirs:
        parts.append(f"mlx-sparse {theirs['mlx-sparse']} on its MLX {theirs['mlx']}")
    for name, label in (("scipy", "SciPy"), ("torch", "PyTorch")):
        if name in versions:
            parts.append(f"{label} {versions[name]}")
    return (
        f"{m.get('gpu') or m['processor']}, {m['cores']} cores, {m['system'].split('-with')[0]}, "
        f"Python {m['python']}; {', '.join(parts)}."
    )


def summary(results: Result) -> str:
    """Return the README's table: ratios at 1024 features and 256 rows, and of Ising products."""
    head = ["product", "nn.Linear", "mlx-sparse", "SciPy", "PyTorch"]
    peers = ("linear", "mlx_sparse", "scipy", "torch")
    rows = []
    for step in ("forward", "training"):
        for block_size in (8, 16, 32, 64):
            for density in (0.1, 0.5):
                key = {"block_size": block_size, "density": density, "step": step}
                for r in select(results, "layer", **base(), **key):
                    name = f"{step}, B = {block_size}, {density:.0%}"
                    rows.append([name, *(cell(r, peer, spread=False) for peer in peers)])
    for r in select(results, "ising", qubits=(8, 12, 16, 20, 22)):
        name = f"Ising, n = {r['workload']['qubits']}"
        rows.append([name, *(cell(r, peer, spread=False) for peer in peers)])
    return (
        markdown(head, rows)
        + "\n\nHow many times as long each peer takes, in one run: above 1 mlx_sparse_nn is "
        + "faster. 1024 x 1024 weight, 256 rows of x, float32. "
        + machine(results)
    )


def base() -> dict[str, Any]:
    return {"features": 1024, "rows": 256, "dtype": "float32"}


def aims(results: Result) -> str:
    """Return the table of what CPU products should reach, and what they do."""
    layers = select(results, "layer")
    blocks = [r for r in layers if r["workload"]["block_size"] >= 8]
    sparse = [r for r in layers if r["workload"]["density"] <= 0.5]

    def count(results: list[Result], peer: str) -> str:
        values = [ratio(r, peer) for r in results if peer in r["peers"]]
        if not values:
            return "not measured"
        return (
            f"{sum(v >= 1 for v in values)} of {len(values)}; "
            f"{number(min(values))} to {number(max(values))} times, "
            f"{number(statistics.geometric_mean(values))} in the geometric mean"
        )

    rows = []
    for step in ("forward", "training"):
        of_step = [r for r in blocks if r["workload"]["step"] == step]
        rows.append(
            [f"{step}, B >= 8: at least as fast as mlx-sparse", count(of_step, "mlx_sparse")]
        )
    for step in ("forward", "training"):
        for name, few in (("B >= 8", False), ("B = 1 and 4", True)):
            of_step = [
                r
                for r in sparse
                if r["workload"]["step"] == step and (r["workload"]["block_size"] < 8) == few
            ]
            rows.append(
                [f"{step}, {name}, up to 50%: faster than nn.Linear", count(of_step, "linear")]
            )
    ising = select(results, "ising")
    rows.append(["Ising: at least as fast as mlx-sparse", count(ising, "mlx_sparse")])
    counted = [r for r in results["results"] if memory(r) is not None]
    measures = {
        "operands, layout of the pattern, results and gradients": memory,
        "the same without the layout, but for its CSR indices": memory_of_csr,
    }
    for name, of in measures.items() if counted else ():
        peaks = [(of(r), from_json(r["workload"]).name) for r in counted]
        most, workload = max(peaks)
        kept = f"{sum(peak <= 4 for peak, _ in peaks)} of {len(peaks)}"
        rows.append(
            [
                f"peak memory: at most four times {name}",
                f"{kept}; the most is {number(most)}: {workload}",
            ]
        )
    return markdown(["aim", "measured"], rows)


def tables(results: Result) -> str:
    """Return a table for each kind of workload, with the quartiles of every ratio."""
    parts = []
    for heading, columns, rows in (
        (
            "Layers, {}",
            {
                "features": lambda w: str(w["features"]),
                "B": lambda w: str(w["block_size"]),
                "density": lambda w: f"{w['density']:.0%}",
                "rows": lambda w: str(w["rows"]),
                "dtype": lambda w: w["dtype"],
            },
            select(results, "layer"),
        ),
        (
            "Unstructured arrays, {}",
            {
                "size": lambda w: str(w["size"]),
                "rows of A": lambda w: w["lengths"],
                "columns of x": lambda w: str(w["columns"]),
            },
            select(results, "array"),
        ),
        ("Ising Hamiltonian", {"n": lambda w: str(w["qubits"])}, select(results, "ising")),
        (
            "Making arrays",
            {
                "what": lambda w: w["what"],
                "size": lambda w: str(w["size"]),
                "values a row": lambda w: str(w["per_row"]),
                "B": lambda w: str(w["block_size"]),
            },
            select(results, "build"),
        ),
    ):
        for step in ("forward", "training"):
            of_step = [r for r in rows if r["workload"].get("step", "forward") == step]
            if of_step:
                parts.append(f"### {heading.format(step)}\n\n{_table(columns, of_step)}")
    return "\n\n".join(parts)


def _table(columns: dict[str, Callable[[dict], str]], rows: list[Result]) -> str:
    """Return one table: what the workload is, ratios to peers, peak of memory."""
    names = {name for r in rows for name in r["peers"]} - {"ours"}
    peers = [name for name in [*PEERS, "against"] if name in names]
    with_memory = any(memory(r) is not None for r in rows)
    head = [*columns, *(PEERS[p].label if p in PEERS else p for p in peers)]
    lines = []
    for r in rows:
        line = [column(r["workload"]) for column in columns.values()]
        line += [cell(r, peer) for peer in peers]
        if with_memory:
            peak = memory(r)
            line.append("-" if peak is None else number(peak))
        lines.append(line)
    return markdown([*head, "memory"] if with_memory else head, lines)


# Cost as the work grows.


def growth(results: Result) -> list[tuple[str, str, list[tuple[float, Result]]]]:
    """Return title, unit and points ``(amount of work, result)`` of each line of growth."""
    key = {**base(), "block_size": 32, "step": "training"}
    density = [(r["workload"]["density"] * 100, r) for r in select(results, "layer", **key)]
    key = {**key, "density": 0.1}
    del key["rows"]
    rows = [(r["workload"]["rows"], r) for r in select(results, "layer", **key)]
    ising = [
        ((1 << r["workload"]["qubits"]) * (r["workload"]["qubits"] + 1), r)
        for r in select(results, "ising")
    ]
    return [
        ("Ising product, n = 8 to 22", "stored values", ising),
        ("training, 1024, B = 32, 256 rows", "density, %", density),
        ("training, 1024, B = 32, 10%", "rows of x", rows),
    ]


def slopes(results: Result) -> str:
    """Return the table of how cost grows: slopes of its logarithm over the larger half."""
    lines = []
    for name, unit, points in growth(results):
        points = [(work, r) for work, r in points if "ours" in r["peers"]]
        points = points[len(points) // 2 - 1 :]
        if len(points) < 2:
            continue
        work = np.log([work for work, _ in points])
        seconds = [statistics.median(r["peers"]["ours"]["turns"]) for _, r in points]
        peaks = [r["peers"]["ours"]["peak"] for _, r in points]
        span = f"{points[0][0]:,.0f} to {points[-1][0]:,.0f} {unit}"
        line = [name, span]
        line += [f"{np.polyfit(work, np.log(values), 1)[0]:.2f}" for values in (seconds, peaks)]
        lines.append(line)
    return markdown(["work", "from, to", "time", "memory"], lines)


def plot_layers(results: Result, path: Path) -> None:
    """Draw the speed relative to ``nn.Linear`` against density, one line a block size."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axis, step in zip(axes, ("forward", "training"), strict=True):
        key = {**base(), "step": step, "density": (0.01, 0.05, 0.1, 0.25, 0.5)}
        for block_size in BLOCK_SIZES:
            points = select(results, "layer", **key, block_size=block_size)
            points = [r for r in points if "linear" in r["peers"]]
            axis.plot(
                [r["workload"]["density"] * 100 for r in points],
                [ratio(r, "linear") for r in points],
                marker="o",
                label=f"B = {block_size}",
            )
        points = select(results, "layer", **key, block_size=32)
        for peer, style in (("mlx_sparse", "--"), ("torch", ":")):
            both = [r for r in points if peer in r["peers"] and "linear" in r["peers"]]
            axis.plot(
                [r["workload"]["density"] * 100 for r in both],
                [ratio(r, "linear") / ratio(r, peer) for r in both],
                style,
                color="black",
                label=f"{PEERS[peer].label}, B = 32",
            )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=step, xlabel="density, %", xscale="log", yscale="log")
        axis.set_xticks([1, 5, 10, 25, 50], labels=["1", "5", "10", "25", "50"])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed relative to nn.Linear")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_growth(results: Result, path: Path) -> None:
    """Draw time and memory against the amount of work, beside lines of slope 1."""
    plt = _pyplot()
    lines = growth(results)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex="col")
    for column, (name, unit, points) in enumerate(lines):
        points = [(work, r) for work, r in points if "ours" in r["peers"]]
        largest = statistics.median(points[-1][1]["peers"]["ours"]["turns"])
        time, memory = axes[:, column]
        for peer in ("ours", "mlx_sparse"):
            shown = [(work, r["peers"][peer]) for work, r in points if peer in r["peers"]]
            work = [work for work, _ in shown]
            times = [statistics.median(p["turns"]) / largest for _, p in shown]
            time.plot(work, times, marker="o", label=PEERS[peer].label)
            memory.plot(work, [p["peak"] / 1e6 for _, p in shown], marker="o")
        work = np.array([work for work, _ in points])
        peak = points[-1][1]["peers"]["ours"]["peak"] / 1e6
        for axis, last in ((time, 1.0), (memory, peak)):
            axis.plot(work, last * work / work[-1], color="grey", linewidth=0.8, label="slope 1")
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        time.set_title(name, fontsize="medium")
        memory.set_xlabel(unit)
    axes[0, 0].set_ylabel("time / mlx_sparse_nn's at the largest")
    axes[1, 0].set_ylabel("peak of memory, MB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


MARKS: dict[tuple[str, str], Callable[[Result], str]] = {  # page, mark: what is between the marks
    ("README.md", "cpu"): summary,
    (PAGE, "cpu_aims"): aims,
    (PAGE, "cpu_slopes"): slopes,
    (PAGE, "cpu_tables"): lambda results: tables(results) + "\n\n" + machine(results),
}


def between(mark: str, text: str) -> str | None:
    """Return what a page has between ``<!-- mark -->`` and the next ``<!-- end -->``."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    return found.group(1) if found else None


def write(results: Result, root: Path = ROOT) -> None:
    """Put the tables into the pages that have their marks, and draw the plots."""
    for (page, mark), table in MARKS.items():
        path = root / page
        text = path.read_text(encoding="utf-8")
        old = between(mark, text)
        if old is None:
            print(f"{page} has no mark <!-- {mark} -->: left as it is")
            continue
        path.write_text(
            text.replace(f"<!-- {mark} -->\n{old}\n", f"<!-- {mark} -->\n{table(results)}\n"),
            encoding="utf-8",
        )
    plot_layers(results, root / "docs/cpu.png")
    plot_growth(results, root / "docs/scaling.png")
