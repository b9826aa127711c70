"""Tables and the plot of what ``python -m benchmarks physics`` measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.environments import ROOT
from benchmarks.report import fill, markdown, number, pyplot

FOLDER = ROOT / "benchmarks/results"
PAGE = "docs/physics.md"
PLOT = "docs/physics_speed.png"
LABELS = {
    "operator": "IsingOperator",
    "stored": "stored matrix",
    "scipy": "SciPy",
    "qutip": "QuTiP",
}
COLOURS = {"operator": "#0072B2", "stored": "#E69F00", "scipy": "#000000"}  # Okabe and Ito's
MARKERS = {"operator": "o", "stored": "s", "scipy": "^"}
GPU_SOLVERS = ("operator", "stored", "cupy")
Results = dict[str, Any]
Result = dict[str, Any]


def of_part(results: Results, *parts: str) -> list[Result]:
    """Return the results of parts, by rising size."""
    found = [result for result in results["results"] if result["case"]["part"] in parts]
    return sorted(found, key=lambda r: (parts.index(r["case"]["part"]), *_order(r["case"])))


def _order(case: dict[str, Any]) -> tuple:
    return tuple(case.get(key, 0) for key in ("dtype", "qubits", "ring", "field", "k", "seed"))


def wrong(results: Results) -> list[str]:
    """Return what was wrong, a line each."""
    return [
        f"{case['part']}, n = {case['qubits']}: {name}: {found['wrong']}"
        for case, solvers in ((r["case"], r["solvers"]) for r in results["results"])
        for name, found in solvers.items()
        if "wrong" in found
    ]


def seconds(result: Result, solver: str, clock: str = "cpu") -> float | None:
    """Return the median of a solver's turns, or None where it took none."""
    times = result["solvers"].get(solver, {}).get(clock)
    return statistics.median(times) if times else None


def ratio(result: Result, solver: str, peer: str) -> float | None:
    """Return how many times as long as a peer a solver takes: the median, turn by turn."""
    ours, theirs = (result["solvers"].get(name, {}).get("cpu", []) for name in (solver, peer))
    pairs = list(zip(ours, theirs, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def shown(value: float | None, scale: float = 1, text: Callable[[float], str] = number) -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else text(value * scale)


def digits(value: float) -> str:
    """Return two digits of a time."""
    return f"{value:.2g}" if value < 9.95 else f"{value:.0f}"


def says(result: Result, key: str, *solvers: str) -> str:
    """Return what is said of a result by each solver, such as its error."""
    values = [result["solvers"].get(solver, {}).get(key) for solver in solvers]
    texts = ["-" if v is None else f"{v:.0e}" if key == "error" and v else f"{v:g}" for v in values]
    return ", ".join(texts)


def lanczos(results: Results) -> str:
    """Return the table of the lowest levels beside eigsh."""
    head = ["dtype", "n", "k", "eigsh, s", "operator", "stored", "products", "missed", "error"]
    rows = []
    for r in of_part(results, "lanczos"):
        case = r["case"]
        times = [shown(ratio(r, form, "scipy")) for form in ("operator", "stored")]
        both = [says(r, key, "operator", "scipy") for key in ("products", "missed", "error")]
        first = [case["dtype"], str(case["qubits"]), str(case["k"])]
        rows.append([*first, shown(seconds(r, "scipy"), text=digits), *times, *both])
    return markdown(head, rows)


def evolution(results: Results) -> str:
    """Return the table of evolved states and quenches, in seconds."""
    head = ["what", *LABELS.values(), "over the fastest peer", "errors"]
    rows = []
    for r in of_part(results, "evolve", "quench"):
        case = r["case"]
        is_quench = case["part"] == "quench"
        what = f"{case['points']} points to t" if is_quench else "t"
        times = [shown(seconds(r, solver), text=digits) for solver in LABELS]
        present = [solver for solver in LABELS if solver in r["solvers"]]
        name = f"n = {case['qubits']}, {what} = {case['time']:g}"
        errors = says(r, "error", *present)
        rows.append([name, *times, shown(over_peers(r)), errors])
    return markdown(head, rows)


def over_peers(result: Result) -> float | None:
    """Return the operator's time over that of the fastest of SciPy and QuTiP."""
    found = [ratio(result, "operator", peer) for peer in ("scipy", "qutip")]
    return max((value for value in found if value is not None), default=None)


def product(results: Results) -> str:
    """Return the table of H times a vector, in milliseconds."""
    solvers = ("operator", "stored", "scipy")
    head = ["n", *(f"{LABELS[solver]}, ms" for solver in solvers)]
    rows = [
        [str(r["case"]["qubits"]), *(shown(seconds(r, s), 1e3, digits) for s in solvers)]
        for r in of_part(results, "product")
    ]
    return markdown(head, rows)


def neural(results: Results) -> str:
    """Return the table of the neural state: the worst seed of each chain."""
    groups: dict[tuple, list[Result]] = {}
    for r in of_part(results, "neural"):
        case = r["case"]
        groups.setdefault((case["qubits"], case["ring"], case["field"]), []).append(r)
    rows = []
    for (qubits, ring, field), group in groups.items():
        worst = max(r["solvers"]["network"]["error"] for r in group)
        spent = max(seconds(r, "network") or 0 for r in group)
        chain = "ring" if ring else "open"
        rows.append(
            [str(qubits), chain, f"{field:g}", str(len(group)), f"{worst:.1e}", digits(spent)]
        )
    return markdown(["n", "chain", "h", "seeds", "largest error", "seconds, at most"], rows)


def aims(results: Results) -> str:
    """Return the table of what should be reached, and what is."""
    rows = []
    for aim, bound, values in _aims(results):
        if not values:
            rows.append([aim, "-", "not measured"])
            continue
        met = sum(value <= bound for value in values)
        spread = f"{min(values):.2g} to {max(values):.2g}"
        is_met = "yes" if met == len(values) else "no"
        rows.append([aim, is_met, f"{met} of {len(values)}; {spread}"])
    return markdown(["aim", "reached", "measured"], rows)


def _aims(results: Results) -> Iterator[tuple[str, float, list[float]]]:
    def values(found: list[Result], value: Callable[[Result], float | None]) -> list[float]:
        return [v for v in map(value, found) if v is not None]

    def over_eigsh(r: Result) -> float | None:
        return ratio(r, "operator", "scipy")

    levels = of_part(results, "lanczos")
    one = [r for r in levels if r["case"]["k"] == 1 and r["case"]["qubits"] >= 16]
    more = [r for r in levels if r["case"]["k"] > 1]
    yield "one level, n = 16 and more: at most eigsh's time", 1.0, values(one, over_eigsh)
    yield "5 and 10 levels: at most 1.5 times eigsh's time", 1.5, values(more, over_eigsh)
    missed = values(more, lambda r: r["solvers"].get("operator", {}).get("missed"))
    yield "copies of degenerate levels: none missed", 0.0, missed
    long = [r for r in of_part(results, "evolve") if r["case"]["qubits"] >= 14]
    over_expm = values(long, lambda r: ratio(r, "operator", "scipy"))
    yield "evolution, n = 14 and 18: at most expm_multiply's time", 1.0, over_expm
    quenches = values(of_part(results, "quench"), lambda r: ratio(r, "operator", "qutip"))
    yield "a quench of 51 points: at most QuTiP's time", 1.0, quenches
    states = [r for r in of_part(results, "neural") if r["case"]["qubits"] == 12]
    errors = [r["solvers"]["network"]["error"] for r in states]
    yield "neural state, n = 12: an error of at most 1e-5", 1e-5, errors
    spent = values(states, lambda r: seconds(r, "network"))
    yield "neural state, n = 12: in at most 120 s of one core", 120.0, spent


def machine(results: Results) -> str:
    """Return what the run was made on."""
    m = results["machine"]
    versions = {name: v for solver in m["versions"].values() for name, v in solver.items()}
    names = {"mlx": "MLX", "scipy": "SciPy", "qutip": "QuTiP", "numpy": "NumPy"}
    parts = [f"{label} {versions[name]}" for name, label in names.items() if name in versions]
    commits = dict.fromkeys(result["commit"] for result in results["results"])
    where = m["gpu"] or f"{m['processor']}, {m['used_cores']} of {m['cores']} cores"
    labels = {**LABELS, "cupy": "CuPy"}
    missing = "".join(f" {labels[name]} is missing: {why}." for name, why in m["missing"].items())
    return (
        f"{where}, Python {m['python']}, {', '.join(parts)}, "
        f"commit {', '.join(commits)}, {m['date']}.{missing}"
    )


def gpu(_: Results) -> str:
    """Return the table of a GPU, in milliseconds, from a file of its own."""
    path = FOLDER / "physics_gpu.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    rows = []
    for r in of_part(results, "product", "lanczos", "evolve", "quench"):
        times = [shown(seconds(r, s, "wall"), 1e3, digits) for s in GPU_SOLVERS]
        case = r["case"]
        detail = {
            "product": "H psi",
            "lanczos": f"lanczos, k = {case['k']}",
            "evolve": f"evolve, t = {case['time']:g}",
            "quench": f"quench, {case['points']} points",
        }
        products = says(r, "products", *(s for s in ("operator", "cupy") if s in r["solvers"]))
        errors = says(r, "error", *(s for s in GPU_SOLVERS if s in r["solvers"]))
        rows.append([detail[case["part"]], str(case["qubits"]), *times, products, errors])
    head = ["what", "n", "operator, ms", "stored, ms", "CuPy, ms", "products", "errors"]
    return f"{markdown(head, rows)}\n\n{machine(results)}"


def text(results: Results) -> str:
    """Return all tables."""
    tables = (aims, lanczos, evolution, product, neural, machine)
    return "\n\n".join(table(results) for table in tables)


def plot(results: Results, path: Path) -> None:
    """Draw the time of one and of ten levels, and of a product, against the number of sites."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    levels = [r for r in of_part(results, "lanczos") if r["case"]["dtype"] == "float32"]
    panels = {
        "the lowest level": [r for r in levels if r["case"]["k"] == 1],
        "the ten lowest levels": [r for r in levels if r["case"]["k"] == 10],
        "the Hamiltonian times a vector": of_part(results, "product"),
    }
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        for solver, colour in COLOURS.items():
            points = [(r["case"]["qubits"], seconds(r, solver)) for r in found]
            drawn = [(n, t) for n, t in points if t is not None]
            style = {"color": colour, "marker": MARKERS[solver], "label": LABELS[solver]}
            axis.plot([n for n, _ in drawn], [t for _, t in drawn], **style)
        axis.set(title=title, xlabel="sites", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("processor time of one core, seconds")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


MARKS: dict[str, Callable[[Results], str]] = {  # mark on the page: what is between it and the end
    "physics_aims": aims,
    "physics_lanczos": lanczos,
    "physics_evolution": evolution,
    "physics_product": product,
    "physics_neural": neural,
    "physics_machine": machine,
    "physics_gpu": gpu,
}


def write(root: Path = ROOT) -> None:
    """Put the tables of ``results/physics.json`` into the page, and draw the plot."""
    path = FOLDER / "physics.json"
    if not path.exists():
        return
    results = json.loads(path.read_text())
    fill({(PAGE, mark): table(results) for mark, table in MARKS.items()}, root)
    plot(results, root / PLOT)
