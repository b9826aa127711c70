"""The README's table of what a newcomer weighs, made of the files of measurements.

python docs/facts.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MARK = "<!-- facts -->\n", "<!-- end -->"
SPARSE_GPT = "FFN, B = 64, density 0.1"
MIB = 1 << 20


def read(path: Path) -> Any:
    """Return what a file of measurements holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def on_gpu() -> list[str]:
    """Return the whole GPT on a GPU."""
    ((gpu, models),) = list(read(RESULTS / "gpt.json").items())[:1]
    cells = []
    for name in ("dense", SPARSE_GPT):
        m = models[name]
        cells.append(
            f"{m['step']:.1f} ms a training step, {m['forward']:.1f} ms forward, "
            f"{m['decode compiled']:.2f} ms a token"
        )
    size = f"{models['dense']['parameters'] / 1e6:.0f} M parameters"
    return [f"a GPT of {size}, {gpu}; FFN in blocks of 64 at density 0.1", *cells]


def on_cpu() -> list[str]:
    """Return the small Transformer on a CPU."""
    results = read(RESULTS / "models.json")
    machine = f"{results['machine']['processor']}, {results['machine']['used_cores']} cores"
    cells = []
    for name in ("dense_training", "sparse_training"):
        t = results["times"][name]
        cells.append(f"{t['openblas']:.1f} s with OpenBLAS, {t['own']:.1f} s with MLX's own BLAS")
    steps = results["steps"]
    return [f"{steps} steps of a small Transformer, {machine}; FFN at density 0.25", *cells]


def pretrained(what: str) -> dict[float, float]:
    """Return a measure of MiniLM for each density: dense, and distilled after calibration."""
    return {
        row["density"]: row["quality"][what] if what in row["quality"] else row[what]
        for row in read(ROOT / "docs/pretrained.json")["rows"]
        if row["method"] in ("dense", "distilled")
    }


def at_densities(values: dict[float, float], form: str) -> str:
    """Return the values of a sparse model, from the densest down."""
    return ", ".join(f"{values[d]:{form}}" for d in sorted(values, reverse=True) if d < 1)


def quality() -> list[str]:
    """Return how often MiniLM finds the text that a sentence belongs to."""
    values = pretrained("accuracy")
    densities = ", ".join(f"{d:g}" for d in sorted(values, reverse=True) if d < 1)
    what = f"MiniLM at densities {densities}: how often a sentence finds its text, of 150"
    return [what, f"{values[1.0]:.2f}", at_densities(values, ".2f")]


def size() -> list[str]:
    """Return the bytes of its linear layers."""
    values = {density: n / MIB for density, n in pretrained("linear_bytes").items()}
    return [
        "its linear layers, at these densities, MiB",
        f"{values[1.0]:.1f}",
        at_densities(values, ".1f"),
    ]


def has_run() -> list[str]:
    """Return the machines that measurements are of; no file is of a Mac yet."""
    gpus = {read(path)["device"] for path in sorted(RESULTS.glob("gpu_*.json"))}
    here = f"Linux on x86-64, {', '.join(sorted(gpus | set(read(RESULTS / 'gpt.json'))))}"
    return ["where it has run", here, "on emulators alone: ARM, and Metal (never on a Mac)"]


def table() -> str:
    """Return the table, with its marks around it."""
    rows = [
        ["", "dense", "sparse"],
        ["---"] * 3,
        *(on_gpu(), on_cpu(), quality(), size()),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    what, here, emulated = has_run()
    return "\n".join([*lines, f"| {what} | {here} | {emulated} |"]) + "\n"


def main() -> None:
    """Write the table into the README."""
    page = ROOT / "README.md"
    before, rest = page.read_text(encoding="utf-8").split(MARK[0])
    after = rest.partition(MARK[1])[2]
    page.write_text(before + MARK[0] + table() + MARK[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
