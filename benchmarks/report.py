"""Tables and plots made from the results of a run."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environments import PEERS, ROOT
from benchmarks.roofline import reading
from benchmarks.styles import LINES
from benchmarks.workloads import CALLS

RESULTS = ROOT / "benchmarks/results/cpu.json"
PAGE = "benchmarks/README.md"
BLOCK_SIZES = (1, 4, 8, 16, 32, 64)
BLOCKS = (8, 16, 32, 64)  # of the aims
NATIVE = ("mlx_sparse", "scipy", "torch")  # peers in compiled code of their own
PAGE_BYTES = 1 << 14
IN_CACHE = 1 << 24  # bytes that a processor's last cache may hold
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
    """Return what the run was made on, in one sentence or two."""
    m = results["machine"]
    versions = {name: v for peer in m["peers"].values() for name, v in peer.items()}
    ours, theirs = m["peers"].get("ours", {}), m["peers"].get("mlx_sparse", {})
    parts = [f"MLX {ours.get('mlx', versions.get('mlx', 'none'))}"]
    if theirs:
        parts.append(f"mlx-sparse {theirs['mlx-sparse']} on its MLX {theirs['mlx']}")
    for name, label in (("scipy", "SciPy"), ("torch", "PyTorch")):
        if name in versions:
            parts.append(f"{label} {versions[name]}")
    if "linear_openblas" in m["peers"]:
        parts.append(m["peers"]["linear_openblas"]["blas"])
    cores = f"{m['cores']} cores"
    if m.get("used_cores", m["cores"]) != m["cores"]:
        cores = f"{m['used_cores']} of {cores}"
    sentence = (
        f"{m.get('gpu') or m['processor']}, {cores}, {m['system'].split('-with')[0]}, "
        f"Python {m['python']}; {', '.join(parts)}."
    )
    if roofline := m.get("roofline"):
        sentence += (
            f" The cores reach {roofline['gflops']:.0f} GFLOP/s in float32, and read "
            f"{roofline['read'][-1][1]:.0f} GB/s from memory."
        )
    return sentence


def label(results: Result, peer: str) -> str:
    """Return a peer's name, a dense layer's with its BLAS."""
    if peer not in PEERS:
        return peer
    says = results["machine"]["peers"].get(peer, {})
    blas = says.get("blas", "netlib" if "Linux" in results["machine"]["system"] else None)
    if peer != "linear" or blas is None or results["machine"].get("gpu"):
        return PEERS[peer].label
    return f"{PEERS[peer].label}, {blas}"


def summary(results: Result) -> str:
    """Return the table of docs/backends.md: 1024 features and 256 rows, and Ising products."""
    peers = [p for p in SUMMARY if p in results["machine"]["peers"]]
    head = ["product", *(label(results, peer) for peer in peers)]
    rows = []
    for step in ("forward", "training"):
        for block_size in BLOCKS:
            for density in (0.1, 0.5):
                key = {"block_size": block_size, "density": density, "step": step}
                for r in select(results, "layer", **base(), **key):
                    name = f"{step}, B = {block_size}, density {density:g}"
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


SUMMARY = ("linear", "linear_openblas", "mlx_sparse", "scipy", "torch")


def base() -> dict[str, Any]:
    return {"features": 1024, "rows": 256, "dtype": "float32"}


def aims(results: Result) -> str:
    """Return the table of what CPU products should reach, and what they do."""
    return markdown(["aim", "reached", "measured"], list(_aims(results)))


def _aims(results: Result) -> Iterator[list[str]]:
    layers = [r for r in select(results, "layer") if r["workload"]["dtype"] == "float32"]

    def cells(block_sizes: Sequence[int] = BLOCKS, **values: tuple) -> list[Result]:
        values = {"features": (1024, 4096), "density": (0.1, 0.5)} | values
        return [
            r
            for r in layers
            if r["workload"]["block_size"] in block_sizes
            and all(r["workload"][key] in value for key, value in values.items())
        ]

    def line(
        aim: str,
        values: list[float],
        least: float = 0.0,
        mean: float = 0.0,
        most: float = math.inf,
    ) -> list[str]:
        if not values:
            return [aim, "-", "not measured"]
        of_all = statistics.geometric_mean(values)
        kept = [v for v in values if least <= v <= most]
        measured = (
            f"{len(kept)} of {len(values)}; {number(min(values))} to {number(max(values))}, "
            f"{number(of_all)} in the geometric mean"
        )
        reached = len(kept) == len(values) and of_all >= mean
        return [aim, "yes" if reached else "no", measured]

    def times(results: list[Result], peer: str) -> list[float]:
        return [ratio(r, peer) for r in results if ratios(r, peer)]

    many = (16, 64, 256, 1024)
    for step in ("forward", "training"):
        some = cells(step=(step,), rows=many)
        aim = f"{step}, 16 rows and more: 5 times mlx-sparse in the mean, never slower"
        yield line(aim, times(some, "mlx_sparse"), 1, 5)
        aim = f"{step}, 16 rows and more: 2.5 times PyTorch in the mean, never slower"
        yield line(aim, times(some, "torch"), 1, 2.5)
        best = [v for r in cells(step=(step,), rows=(1,)) if (v := fastest_peer(r)) is not None]
        yield line(f"{step}, one row: as fast as the fastest native peer", best, 1)
    for density, least in ((0.1, 6.0), (0.5, 1.6)):
        some = cells(BLOCKS[1:], density=(density,), rows=(256,))
        aim = f"B >= 16, density {density:g}, 256 rows: {least:g} times nn.Linear with OpenBLAS"
        yield line(aim, times(some, "linear_openblas"), least)
    general = [r for r in layers if r["workload"]["block_size"] in (12, 24)]
    yield line("blocks of 12 and 24: 3 times plain MLX", times(general, "plain"), 3)
    if roofline := results["machine"].get("roofline"):
        some = cells(BLOCKS[1:], rows=many[1:])
        rates = [gflops(r) / roofline["gflops"] for r in some if "ours" in r["peers"]]
        yield line("B >= 16, 64 rows and more: 0.55 of the cores' multiply-adds", rates, 0.55)
        large = [r for r in cells(rows=(1,), step=("forward",)) if stored_bytes(r) > IN_CACHE]
        read = [reads(r, roofline) for r in large if "ours" in r["peers"]]
        yield line("one row, out of cache: at most 1.3 reads of the values", read, most=1.3)
    for dtypes, most in ((("bfloat16", "float16"), 1.3), (("float64",), 2.2)):
        for dtype in dtypes:
            aim = f"{dtype}: at most {most} times float32's time"
            yield line(aim, slower_than_float32(results, dtype), most=most)
    scalars = [r for r in [*select(results, "array"), *select(results, "ising")]]
    large = [r for r in scalars if stored_values(r["workload"]) >= 200_000]
    best = [v for r in large if (v := fastest_peer(r)) is not None]
    yield line("scalars, 200,000 values and more: 0.95 of the fastest native peer", best, 0.95)
    small = [r for r in scalars if stored_values(r["workload"]) < 200_000]
    yield line("scalars, fewer: as fast as mlx-sparse", times(small, "mlx_sparse"), 1)
    yield line("making arrays: as fast as SciPy", times(select(results, "build"), "scipy"), 1)
    calls = [microseconds(r, "ours") for r in select(results, "call", what="layer")]
    yield line("a layer's call: built in at most 12 microseconds", calls, most=12)
    for few, rows in ((False, "16 rows and more"), (True, "fewer")):
        some = [r for r in layers if (r["workload"]["rows"] < 16) == few]
        saved = [v for r in some if (v := less_memory(r)) is not None]
        aim = f"peak memory above operands and results, {rows}: plain MLX takes twice as much"
        yield line(aim, saved, 2)


def stored_values(workload: dict[str, Any]) -> int:
    """Return how many values a layer, an array or a Hamiltonian stores."""
    if workload["kind"] == "layer":
        n = workload["features"] // workload["block_size"]
        return max(1, round(workload["density"] * n * n)) * workload["block_size"] ** 2
    if workload["kind"] == "array":
        return workload["size"] * workload["per_row"]
    return (1 << workload["qubits"]) * (workload["qubits"] + 1)


def seconds(result: Result, peer: str = "ours") -> float:
    """Return the median seconds of a call."""
    return statistics.median(result["peers"][peer]["turns"])


def microseconds(result: Result, peer: str) -> float:
    """Return the median time in which one call is built."""
    return seconds(result, peer) / CALLS * 1e6


def gflops(result: Result) -> float:
    """Return the billions of multiplications and additions a second of a layer."""
    w = result["workload"]
    products = 3 if w["step"] == "training" else 1
    return 2e-9 * stored_values(w) * w["rows"] * products / seconds(result)


def stored_bytes(result: Result) -> int:
    """Return the bytes of a float32 layer's stored values."""
    return 4 * stored_values(result["workload"])


def reads(result: Result, roofline: dict[str, Any]) -> float:
    """Return a call's time over that of reading as many bytes as the stored values have.

    Peers take turns: what the last cache does not hold beside theirs is read from memory.
    """
    n_bytes = stored_bytes(result)
    cached = n_bytes <= IN_CACHE
    rate = reading(roofline, n_bytes) if cached else roofline["read"][-1][1] * 1e9
    return seconds(result) / (n_bytes / rate)


def fastest_peer(result: Result) -> float | None:
    """Return the ratio to the fastest of the native peers, or None where there is none."""
    values = [ratio(result, peer) for peer in NATIVE if ratios(result, peer)]
    return min(values) if values else None


def slower_than_float32(results: Result, dtype: str) -> list[float]:
    """Return the time of each layer of a dtype over that of the same one in float32."""
    of_float32 = {}
    for r in select(results, "layer", dtype="float32"):
        of_float32[tuple({**r["workload"], "dtype": dtype}.values())] = r
    pairs = [
        (r, of_float32.get(tuple(r["workload"].values())))
        for r in select(results, "layer", dtype=dtype)
    ]
    return [seconds(r) / seconds(other) for r, other in pairs if other is not None]


def less_memory(result: Result) -> float | None:
    """Return the peak above operands and results, a page at least, in plain MLX over ours."""
    peers = [result["peers"].get(name, {}) for name in ("plain", "ours")]
    if result["made"] is None or not all("peak" in peer for peer in peers):
        return None
    plain, ours = (max(p["peak"] - p["kept"] - result["made"], PAGE_BYTES) for p in peers)
    return plain / ours


def tables(results: Result) -> str:
    """Return a table for each kind of workload, with the quartiles of every ratio."""
    parts = []
    for heading, columns, rows in (
        (
            "Layers, {}",
            {
                "features": lambda w: str(w["features"]),
                "B": lambda w: str(w["block_size"]),
                "density": lambda w: f"{w['density']:g}",
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
                table = _table(results, columns, of_step)
                parts.append(f"### {heading.format(step)}\n\n{table}")
    return "\n\n".join([*parts, *_calls(results)])


def _calls(results: Result) -> list[str]:
    """Return the table of microseconds in which calls are built, if any was."""
    rows = select(results, "call")
    names = {name for r in rows for name in r["peers"]}
    peers = [name for name in [*PEERS, "against"] if name in names]
    table = [
        [r["workload"]["what"], str(r["workload"]["rows"])]
        + [number(microseconds(r, p)) if p in r["peers"] else "-" for p in peers]
        for r in rows
    ]
    head = ["call", "rows of x", *(label(results, p) for p in peers)]
    return [f"### Building a call, microseconds\n\n{markdown(head, table)}"] if rows else []


def _table(results: Result, columns: dict[str, Callable[[dict], str]], rows: list[Result]) -> str:
    """Return one table: what the workload is, ratios to peers, and what the core was used for."""
    names = {name for r in rows for name in r["peers"]} - {"ours"}
    shown: dict[str, Callable[[Result], str]] = {}
    for peer in [*PEERS, "against"]:
        if peer in names:
            shown[label(results, peer)] = lambda r, peer=peer: cell(r, peer)
    if len(names & {*NATIVE}) > 1:
        shown["fastest native"] = lambda r: _shown(fastest_peer(r))
    roofline = results["machine"].get("roofline")
    if rows[0]["workload"]["kind"] == "layer" and any("ours" in r["peers"] for r in rows):
        shown["GFLOP/s"] = lambda r: number(gflops(r))
        if roofline:
            shown["of the cores'"] = lambda r: _of_peak(r, roofline)
            shown["reads"] = lambda r: _reads(r, roofline)
    if any(memory(r) is not None for r in rows):
        shown["memory"] = lambda r: _shown(memory(r))
    lines = [
        [*(f(r["workload"]) for f in columns.values()), *(f(r) for f in shown.values())]
        for r in rows
    ]
    return markdown([*columns, *shown], lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else number(value)


def _of_peak(result: Result, roofline: dict[str, Any]) -> str:
    """Return the part of the float32 multiply-add rate that a layer reaches."""
    return f"{gflops(result) / roofline['gflops']:.0%}"


def _reads(result: Result, roofline: dict[str, Any]) -> str:
    """Return how many reads of its stored values a forward call of one row takes."""
    w = result["workload"]
    one_read = w["rows"] == 1 and w["step"] == "forward" and w["dtype"] == "float32"
    return number(reads(result, roofline)) if one_read else "-"


# Cost as the work grows.


def growth(results: Result) -> list[tuple[str, str, list[tuple[float, Result]]]]:
    """Return title, unit and points ``(amount of work, result)`` of each line of growth."""
    key = {**base(), "block_size": 32, "step": "training"}
    density = [(r["workload"]["density"], r) for r in select(results, "layer", **key)]
    key = {**key, "density": 0.1}
    del key["rows"]
    rows = [(r["workload"]["rows"], r) for r in select(results, "layer", **key)]
    ising = [
        ((1 << r["workload"]["qubits"]) * (r["workload"]["qubits"] + 1), r)
        for r in select(results, "ising")
    ]
    return [
        ("Ising product, n = 8 to 22", "stored values", ising),
        ("training, 1024, B = 32, 256 rows", "density", density),
        ("training, 1024, B = 32, density 0.1", "rows of x", rows),
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
        span = " to ".join(f"{points[i][0]:,.12g}" for i in (0, -1)) + f" {unit}"
        line = [name, span]
        line += [f"{np.polyfit(work, np.log(values), 1)[0]:.2f}" for values in (seconds, peaks)]
        lines.append(line)
    return markdown(["work", "from, to", "time", "memory"], lines)


def plot_layers(results: Result, path: Path) -> None:
    """Draw the speed relative to ``nn.Linear`` against density, one line a block size.

    The dense layer is the one with OpenBLAS, where it was measured.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    dense = "linear_openblas" if "linear_openblas" in results["machine"]["peers"] else "linear"
    for axis, step in zip(axes, ("forward", "training"), strict=True):
        key = {**base(), "step": step, "density": (0.01, 0.05, 0.1, 0.25, 0.5)}
        for block_size, line in zip(BLOCK_SIZES, LINES, strict=True):
            points = select(results, "layer", **key, block_size=block_size)
            points = [r for r in points if dense in r["peers"]]
            axis.plot(
                [r["workload"]["density"] for r in points],
                [ratio(r, dense) for r in points],
                label=f"blocks of {block_size}",
                **line,
            )
        points = select(results, "layer", **key, block_size=32)
        for peer, style in (("mlx_sparse", "--"), ("torch", ":")):
            both = [r for r in points if peer in r["peers"] and dense in r["peers"]]
            axis.plot(
                [r["workload"]["density"] for r in both],
                [ratio(r, dense) / ratio(r, peer) for r in both],
                style,
                color="black",
                label=f"{PEERS[peer].label}, blocks of 32",
            )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=STEPS[step], xlabel="density", xscale="log", yscale="log")
        densities = (0.01, 0.05, 0.1, 0.25, 0.5)
        axis.set_xticks(densities, labels=[f"{density:g}" for density in densities])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times as fast as nn.Linear")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    m = results["machine"]
    blas = m["peers"].get(dense, {}).get("blas", "netlib").split(".")[0].removesuffix(" 0")
    figure.suptitle(
        f"{m.get('gpu') or m['processor']}, {_cores(m)}: float32, "
        f"weight 1024 x 1024, 256 rows; nn.Linear by {blas}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


TITLES = {
    "Ising product, n = 8 to 22": "Ising chain times a state, 8 to 22 sites",
    "training, 1024, B = 32, 256 rows": "layer of 1024 x 1024, training, 256 rows",
    "training, 1024, B = 32, density 0.1": "layer of 1024 x 1024, training, density 0.1",
}
STEPS = {"forward": "forward", "training": "forward, and gradients of weight and input"}


def _cores(machine: dict[str, Any]) -> str:
    n = machine.get("used_cores", machine["cores"])
    return f"{n} core{'s' * (n != 1)}"


def plot_growth(results: Result, path: Path) -> None:
    """Draw time and memory against the amount of work, beside what grows in proportion to it."""
    plt = pyplot()
    lines = growth(results)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex="col")
    for column, (name, unit, points) in enumerate(lines):
        points = [(work, r) for work, r in points if "ours" in r["peers"]]
        largest = statistics.median(points[-1][1]["peers"]["ours"]["turns"]) * 1e3
        time, memory = axes[:, column]
        for peer, line in zip(("ours", "mlx_sparse"), LINES, strict=False):
            shown = [(work, r["peers"][peer]) for work, r in points if peer in r["peers"]]
            work = [work for work, _ in shown]
            times = [statistics.median(p["turns"]) * 1e3 for _, p in shown]
            time.plot(work, times, label=PEERS[peer].label, **line)
            memory.plot(work, [p["peak"] / 1e6 for _, p in shown], **line)
        work = np.array([work for work, _ in points])
        peak = points[-1][1]["peers"]["ours"]["peak"] / 1e6
        for axis, last in ((time, largest), (memory, peak)):
            axis.plot(work, last * work / work[-1], color="grey", ls="--", label="in proportion")
            axis.set(xscale="log", yscale="log")
            axis.yaxis.set_major_formatter("{x:g}")
            if work[-1] <= 10_000:
                axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
        time.set_title(TITLES[name], fontsize="medium")
        memory.set_xlabel(unit)
    axes[0, 0].set_ylabel("milliseconds a call")
    axes[1, 0].set_ylabel("peak of memory, MB")
    axes[0, 0].legend()
    m = results["machine"]
    figure.suptitle(f"{m.get('gpu') or m['processor']}, {_cores(m)}, float32", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


MARKS: dict[tuple[str, str], Callable[[Result], str]] = {  # page, mark: what is between the marks
    ("docs/backends.md", "cpu"): summary,
    (PAGE, "cpu_aims"): aims,
    (PAGE, "cpu_slopes"): slopes,
    (PAGE, "cpu_tables"): lambda results: tables(results) + "\n\n" + machine(results),
}


def between(mark: str, text: str) -> str | None:
    """Return what a page has between ``<!-- mark -->`` and the next ``<!-- end -->``."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    return found.group(1) if found else None


def fill(tables: dict[tuple[str, str], str], root: Path = ROOT) -> None:
    """Put tables, by page and mark, between their marks."""
    for (page, mark), table in tables.items():
        path = root / page
        text = path.read_text(encoding="utf-8")
        old = between(mark, text)
        if old is None:
            print(f"{page} has no mark <!-- {mark} -->: left as it is")
            continue
        path.write_text(
            text.replace(f"<!-- {mark} -->\n{old}\n", f"<!-- {mark} -->\n{table}\n"),
            encoding="utf-8",
        )


def write(results: Result, root: Path = ROOT) -> None:
    """Put the tables into the pages that have their marks, and draw the plots."""
    fill({key: table(results) for key, table in MARKS.items()}, root)
    plot_layers(results, root / "docs/cpu.png")
    plot_growth(results, root / "docs/scaling.png")
