"""Train the character model dense and sparse, one after the other, and put the table in a page.

Each run is ``examples/train_char_lm.py`` with its defaults and the arguments below, on this
machine's CPU. Writes ``benchmarks/results/char_lm.json``; with ``--readme`` alone it only makes the
table of docs/examples.md again from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/char_lm.json"
RUNS = {
    "dense": ["--dense"],
    "feed-forward sparse (the default)": [],
    "feed-forward and attention sparse": ["--sparse-attention"],
}


def measure() -> dict:
    """Run all three and return what their summaries say."""
    results = {}
    for name, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            output = subprocess.run(
                [
                    *(sys.executable, "examples/train_char_lm.py", *arguments),
                    *("--device", "cpu", "--sample", "0", "--checkpoint", folder),
                ],
                cwd=ROOT,
                env={**os.environ, "LD_PRELOAD": ""},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
        summary = dict(re.findall(r"^(\w+(?: \w+)?)  +([\d.]+)", output, re.MULTILINE))
        results[name] = {key: float(value) for key, value in summary.items()}
        print(name, results[name], flush=True)
    return {"machine": describe(), "mlx": metadata.version("mlx"), "runs": results}


def describe() -> str:
    """Name the processor and the number of cores."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else platform.processor()
    model = re.search(r"model name\s*: (.*)", text)
    return f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} cores"


def table(results: dict) -> str:
    """Return the table of docs/examples.md."""
    lines = [
        "| model | trained parameters | density | seconds | validation loss, nats/character |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, run in results["runs"].items():
        lines.append(
            f"| {name} | {run['parameters']:,.0f} | {run['density']:.2f} | {run['seconds']:.0f} "
            f"| {run['validation loss']:.3f} |"
        )
    lines.append(
        f"\n{results['machine']}; MLX {results['mlx']}, float32, dense products by the BLAS of its "
        "wheel, netlib's. A bigram model has 2.316."
    )
    return "\n".join(lines)


def write_table(name: str, table: str, page: str) -> None:
    """Put a table between its marks in a page."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    marked = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
    text = re.sub(marked, lambda m: m.group(1) + table + m.group(2), text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing, only write the table"
    )
    if not parser.parse_args().readme:
        RESULTS.write_text(json.dumps(measure(), indent=2) + "\n")
    write_table("char_lm", table(json.loads(RESULTS.read_text())), "docs/examples.md")


if __name__ == "__main__":
    main()
