"""Measure ground states, evolution, products and the neural state beside SciPy and QuTiP.

    python -m benchmarks physics --quick              a minute
    python -m benchmarks physics --pages              all, and the tables of docs/physics.md
    python -m benchmarks physics --parts lanczos      others stay as they were measured before
    python -m benchmarks physics --device gpu         beside CuPy, where it is installed

Solvers are processes that take turns on one core; their times are of the processor, on a GPU of the
clock. Every result is compared with free fermions or NumPy's float64 before any time is taken.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import physics_report
from benchmarks.environments import CACHE, ROOT, environment, python_of, variables
from benchmarks.measure import PAUSE, Child, describe_machine
from benchmarks.physics_cases import Case, cases, expected, judge
from benchmarks.sweep import save

PARTS = ("lanczos", "evolve", "quench", "product", "neural")
QUTIP = ("qutip==5.3.1", "numpy", "scipy")
TURNS, QUICK_TURNS, FEWEST = 7, 3, 2
SECONDS = 0.05  # of a turn, or one call where that is longer
LIMIT = 20.0  # seconds after which a solver takes no more turns, but FEWEST in any case
NEURAL = "examples/neural_quantum_state.py"


class Entry:
    """A case at a solver."""

    def __init__(self, process: Child, prepared: dict[str, Any], judged: dict[str, Any]):
        self.process, self.took, self.spent = process, prepared["seconds"], 0.0
        self.result: dict[str, Any] = {"products": prepared["products"], **judged}
        self.result |= {"cpu": [], "wall": []}

    def turn(self) -> None:
        """Take one turn, unless the solver has had its time."""
        if len(self.result["wall"]) >= FEWEST and self.spent > LIMIT:
            return
        calls = max(1, min(1000, int(SECONDS / self.took)))
        times = self.process.ask("time", calls=calls)
        self.took = min(self.took, times["wall"])  # the first call was a cold one
        self.spent += times["wall"] * calls
        for clock in ("cpu", "wall"):
            self.result[clock].append(float(f"{times[clock]:.4g}"))
        time.sleep(PAUSE)


def measure(
    wanted: list[Case], solvers: dict[str, Child], turns: int = TURNS
) -> Iterator[dict[str, Any]]:
    """Yield the result of each case: ``case`` and ``solvers``, of each what :func:`judge` says,
    ``products`` with H, and seconds a call in each turn, or ``wrong``, why there are none."""
    with tqdm(wanted, unit="case") as bar:
        for case in bar:
            bar.set_description(case.name)
            right, found, entries = expected(case), {}, []
            for name, process in solvers.items():
                with tempfile.TemporaryDirectory() as folder:
                    path = str(Path(folder) / "result.npy")
                    prepared = process.ask("prepare", case=case.to_json(), result=path)
                    if prepared is None:
                        continue
                    try:
                        judged = judge(case, np.load(path), right)
                    except ValueError as error:
                        found[name] = {"wrong": str(error)}
                        continue
                entries.append(Entry(process, prepared, judged))
                found[name] = entries[-1].result
            for turn in range(turns):
                first = turn % max(1, len(entries))
                for entry in entries[first:] + entries[:first]:
                    entry.turn()
            for process in solvers.values():
                process.ask("drop")
            yield {"case": case.to_json(), "solvers": found}


def measure_neural(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the error and the processor's seconds of the neural state's script, seed by seed."""
    chains = [
        {"qubits": qubits, "field": field, "ring": ring, "seed": seed}
        for qubits, seeds in (((8, 1),) if quick else ((10, 3), (12, 3), (14, 1)))
        for field in (0.2, 0.5, 1.0)
        for ring in (False, True)
        for seed in range(seeds)
    ]
    for chain in tqdm(chains, desc="neural state", unit="chain"):
        yield {"case": {"part": "neural", **chain}, "solvers": train(**chain)}


def train(qubits: int, field: float, ring: bool, seed: int) -> dict[str, Any]:
    """Return what the neural state's script reached, and how long all of it took."""
    command = [sys.executable, NEURAL, "--device", "cpu"]
    command += ["--qubits", str(qubits), "--field", str(field), "--seed", str(seed)]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [*command, "--periodic"] if ring else command,
        cwd=ROOT,
        env={**variables(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(f"[benchmarks] {' '.join(command)} failed: {ran.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (error,) = re.findall(r"^error +(\S+) relative", ran.stdout, re.MULTILINE)
    wall = time.perf_counter() - began
    return {"network": {"error": float(error), "cpu": [round(cpu, 2)], "wall": [round(wall, 2)]}}


def pythons(device: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the Python of each solver, and why one is missing."""
    ours = {"operator": Path(sys.executable), "stored": Path(sys.executable)}
    if device == "gpu":
        if find_spec("cupy"):
            return {**ours, "cupy": Path(sys.executable)}, {}
        return ours, {"cupy": "this Python has no cupy"}
    found = {**ours, "scipy": python_of("scipy")}
    try:
        return {**found, "qutip": environment("qutip", QUTIP)}, {}
    except SystemExit as error:
        return found, {"qutip": str(error)}


def main(
    device: str = "cpu",
    quick: bool = False,
    parts: list[str] | None = None,
    output: Path | None = None,
    pages: bool = False,
) -> None:
    """Measure, save as JSON, and print the tables.

    Args:
        device: "cpu", or "gpu", where CuPy is the peer if it is installed.
        quick: Whether to take small cases, in a minute.
        parts: Which of ``PARTS``; all by default. Others in ``output`` stay.
        output: The file; by default under ``.bench/``, or ``results/`` with ``pages``.
        pages: Whether to put the tables into the pages.

    Raises:
        SystemExit: A result was wrong, or a solver's environment cannot be made.
    """
    parts = parts or [part for part in PARTS if device == "cpu" or part != "neural"]
    name = "physics.json" if device == "cpu" else "physics_gpu.json"
    output = output or (physics_report.FOLDER if pages else CACHE) / name
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found, missing = pythons(device)
    with ExitStack() as stack:
        solvers = {
            solver: stack.enter_context(
                Child(
                    solver,
                    [str(python), "-m", "benchmarks.physics_peers", solver, device],
                    variables(),
                )
            )
            for solver, python in found.items()
        }
        machine = describe_machine(device) | {
            "gpu": solvers["operator"].ask("gpu"),
            "versions": {name: process.ask("versions") for name, process in solvers.items()},
            "missing": missing,
        }
        before = json.loads(output.read_text())["results"] if output.exists() else []
        kept = [result for result in before if result["case"]["part"] not in parts]
        results: dict[str, Any] = {"machine": machine, "results": kept}
        wanted = [case for case in cases(device, quick) if case.part in parts]
        for result in measure(wanted, solvers, QUICK_TURNS if quick else TURNS):
            results["results"].append({**result, "commit": machine["commit"]})
            save(results, output)
    if "neural" in parts:
        for result in measure_neural(quick):
            results["results"].append({**result, "commit": machine["commit"]})
            save(results, output)
    print(json.dumps(results) if device == "gpu" else physics_report.text(results))
    print(f"written to {output}", file=sys.stderr)
    if pages:
        physics_report.write()
    wrong = physics_report.wrong(results)
    if wrong:
        sys.exit("\n".join(f"[benchmarks] {line}" for line in wrong))
