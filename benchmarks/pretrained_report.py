"""Tables of pretrained models made sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.report import PAGE, markdown

MIB = 1 << 20
DISTURBED = 1.25  # of the least time of the dense model: above it, other work was going on
WAYS = {
    "dense": "dense",
    "magnitude": "`sparsify`",
    "one pass": "`calibrate`",
    "calibrated": "`calibrate`, `blocks`",
    "sensitivity": "`calibrate`, `blocks`, `sensitivity`",
    "distilled": "`calibrate`, `blocks`, `sensitivity`, distilled",
}
AIMED = {
    "calibrated": "`calibrate`",
    "sensitivity": "with `sensitivity`",
    "distilled": "ten minutes of distillation",
}
HEADS = {
    "minilm": ("Sp", "cosine", "Sp, general", "acc@1"),
    "smollm": ("topics, nats", "docstrings, nats"),
}
Results = dict[str, Any]


class Aim(NamedTuple):
    """What a cell must reach.

    Args:
        model: Of the cell.
        way: Of the cell.
        density: Of the cell.
        measure: Name of the measure.
        bound: The least it may be; for nats, the most.
    """

    model: str
    way: str
    density: float
    measure: str
    bound: float

    @property
    def is_loss(self) -> bool:
        return self.model == "smollm"

    def is_met(self, value: float) -> bool:
        """Return whether a value is good enough."""
        return value <= self.bound if self.is_loss else value >= self.bound


AIMS = (
    Aim("minilm", "calibrated", 0.75, "spearman", 0.79),
    Aim("minilm", "calibrated", 0.75, "cosine", 0.73),
    Aim("minilm", "sensitivity", 0.75, "spearman", 0.80),
    Aim("minilm", "sensitivity", 0.75, "cosine", 0.80),
    Aim("minilm", "sensitivity", 0.5, "spearman", 0.64),
    Aim("minilm", "sensitivity", 0.5, "cosine", 0.61),
    Aim("minilm", "distilled", 0.5, "spearman", 0.80),
    Aim("smollm", "calibrated", 0.9, "docstrings", 3.6),
    Aim("smollm", "calibrated", 0.75, "docstrings", 4.8),
    Aim("smollm", "calibrated", 0.5, "docstrings", 6.5),
)
NAMES = {"minilm": "MiniLM", "smollm": "SmolLM2"}
MEASURES = {"spearman": "Sp", "cosine": "cosine", "docstrings": "nats of docstrings"}


def of_model(results: Results, model: str) -> list[dict[str, Any]]:
    """Return the results of a model, by falling density and in the order of WAYS."""
    found = [result for result in results["results"] if result["cell"]["model"] == model]
    order = [*WAYS]
    return sorted(found, key=lambda r: (-r["cell"]["density"], order.index(r["cell"]["way"])))


def aims(results: Results) -> str:
    """Return the table of what should be reached, and what is."""
    return markdown(["aim", "met", "measured"], list(_aims(results)))


def _aims(results: Results) -> Iterator[list[str]]:
    by_cell = {
        (r["cell"]["model"], r["cell"]["way"], r["cell"]["density"]): r["quality"]
        for r in results["results"]
    }
    for aim in AIMS:
        limit = "at most" if aim.is_loss else "at least"
        name = f"{NAMES[aim.model]}, {AIMED[aim.way]}, density {aim.density:g}"
        text = f"{name}: {MEASURES[aim.measure]} {limit} {aim.bound:g}"
        measured = by_cell.get((aim.model, aim.way, aim.density))
        if measured is None:
            yield [text, "-", "not measured"]
            continue
        value = measured[aim.measure]
        yield [text, "yes" if aim.is_met(value) else "no", f"{value:.3f}"]


def quality_cells(model: str, quality: dict[str, float]) -> list[str]:
    """Return the measures of a row, as HEADS names them."""
    if model == "smollm":
        return [f"{quality[name]:.2f}" for name in ("topics", "docstrings")]
    measures = [f"{quality[name]:.3f}" for name in ("spearman", "cosine", "general")]
    return [*measures, f"{quality['accuracy']:.2f} ± {quality['accuracy_error']:.2f}"]


def table(results: Results, model: str) -> str:
    """Return the table of a model: quality, bytes, seconds and speed of each cell."""
    head = ["density", "by", *HEADS[model], "error", "linear, MiB", "all, MiB", "seconds", "speed"]
    rows = []
    found = of_model(results, model)
    undisturbed = DISTURBED * min(r["forward"]["dense"] for r in found)
    for r in found:
        way, times = r["cell"]["way"], r["forward"]
        is_dense = way == "dense"
        error = r.get("mean_error")
        rows.append(
            [
                f"{r['density']:.3g}",
                WAYS[way],
                *quality_cells(model, r["quality"]),
                "-" if error is None else f"{error:.3f}",
                f"{r['linear_bytes'] / MIB:.1f}",
                f"{r['bytes'] / MIB:.1f}",
                "-" if is_dense else f"{r['seconds']:.0f}",
                speed(times, undisturbed) if not is_dense else "1",
            ]
        )
    return markdown(head, rows)


def speed(times: dict[str, float], undisturbed: float) -> str:
    """Return how many times as fast as dense, unless other work slowed the dense model down."""
    if times["dense"] > undisturbed:
        return "-"
    return f"{times['dense'] / times['sparse']:.2f}"


def machine(results: Results) -> str:
    """Return what the run was made on."""
    m = results["machine"]
    versions = m["versions"]
    dense = [r for r in results["results"] if r["cell"]["way"] == "dense"]
    times = ", ".join(
        f"{NAMES[r['cell']['model']]} {r['forward']['dense'] * 1e3:.0f} ms" for r in dense
    )
    samples = {r["cell"]["model"]: r["cell"]["samples"] for r in results["results"]}
    later = [(r["cell"]["way"], r["commit"]) for r in results["results"] if "commit" in r]
    others = "".join(f', "{way}" at commit {commit}' for way, commit in later)
    return (
        f"{m['processor']}, threads: {m['used_cores']}, Python {m['python']}, MLX "
        f"{versions['mlx']}, mlx-lm {versions['mlx-lm']}, NumPy {versions['numpy']}, SciPy "
        f"{versions['scipy']}, commit {m['commit']}{others}; dense products by "
        f"{versions['blas']}. A dense pass: {times}. "
        f"Calibrated on {samples.get('minilm', 0)} texts and {samples.get('smollm', 0):,} tokens."
    )


def tables(results: Results) -> str:
    """Return the tables of both models, and what they were measured on."""
    measured = [model for model in NAMES if of_model(results, model)]
    found = [f"### {NAMES[model]}\n\n{table(results, model)}" for model in measured]
    return "\n\n".join([*found, machine(results)])


MARKS: dict[tuple[str, str], Callable[[Results], str]] = {
    (PAGE, "pretrained_aims"): aims,
    (PAGE, "pretrained"): tables,
}
