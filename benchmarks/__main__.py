"""Measure products on this machine beside dense layers and native peers.

    python -m benchmarks                              the default set, 15 minutes on two cores
    python -m benchmarks --quick                      a minute
    python -m benchmarks layers --features 1024 --rows 256 --dtype float32
    python -m benchmarks ising --qubits 16 20 --peers ours mlx_sparse
    python -m benchmarks --output benchmarks/results/cpu.json && python -m benchmarks report
    python -m benchmarks sweep --device cpu           every block size, dtype and number of rows
    python -m benchmarks sweep --device cpu --quick   two minutes of it
    python -m benchmarks physics --pages              solvers beside SciPy and QuTiP, on one core

Every peer is a process in an environment of its own, made under ``.bench/`` when it is first
needed. Results are compared with an oracle, for equality, before any time is taken. Only ratios
within one run mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import physics, physics_report, roofline, sweep, sweep_report, workloads
from benchmarks.environments import CACHE, PEERS, default_peers
from benchmarks.measure import TURNS, Process, describe, measure
from benchmarks.report import RESULTS, machine, tables, write

SETS = ("layers", "arrays", "ising", "build", "calls")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__, formatter_class=form)
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=["all", *SETS, "sweep", "physics", "report"],
        help="layers: BlockSparseLinear; arrays: unstructured A @ x; ising: the Hamiltonian "
        "times a vector; build: making arrays; calls: what the host does for a call; sweep: one "
        "picture of the whole; physics: ground states, evolution and the neural state; report: "
        "tables and plots of --results, and of physics",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="all of the device if not given")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer workloads and turns")
    parser.add_argument(
        "--full", action="store_true", help="the whole grid, which takes many hours"
    )
    parser.add_argument("--turns", type=int, help=f"of each peer: {TURNS}, or 3 with --quick")
    parser.add_argument("--seconds", type=float, default=0.03, help="what a turn takes")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds of one peer's turns")
    parser.add_argument("--cores", type=int, help="of those at hand, for all peers alike")
    parser.add_argument("--against", type=Path, help="another checkout of the package, as a peer")
    parser.add_argument("--output", type=Path, help="default: .bench/latest.json, or a sweep's")
    parser.add_argument("--parts", nargs="+", choices=physics.PARTS, help="of physics; or all")
    parser.add_argument("--pages", action="store_true", help="put the tables of physics into docs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what to report")
    choices = parser.add_argument_group("workloads", "each choice takes all others of the grid")
    for name, values in workloads.AXES.items():
        flag, known = "--" + name.replace("_", "-"), ", ".join(map(str, values))
        choices.add_argument(flag, nargs="+", type=type(values[0]), help=f"of layers: {known}")
    choices.add_argument("--columns", nargs="+", type=int, help="of x in A @ x: 1, 16, 256")
    choices.add_argument("--qubits", nargs="+", type=int, help="of the Ising chain: 8, 10, ..., 22")
    return parser


def chosen(args: argparse.Namespace) -> list[workloads.Workload]:
    """Return the workloads that the command line asks for."""
    axes = {name: getattr(args, name) for name in workloads.AXES}
    columns, qubits = args.columns, args.qubits
    if args.full or any(axes.values()):
        layers = workloads.layers(**axes)
    else:
        layers = workloads.quick_layers() if args.quick else workloads.default_layers()
    if args.quick:
        columns, qubits = columns or [1], qubits or [8, 14]
    for w in layers:
        if isinstance(w, workloads.Layer) and w.features % w.block_size:
            sys.exit(f"[benchmarks] --features {w.features} has no blocks of {w.block_size}")
    sets = {
        "layers": layers,
        "arrays": workloads.arrays(columns),
        "ising": workloads.ising(qubits),
        "build": workloads.build(),
        "calls": workloads.calls(),
    }
    return [w for name in SETS if args.what in ("all", name) for w in sets[name]]


def sweep_all(args: argparse.Namespace) -> None:
    """Measure the sweep's cells, print the worst, and draw all beside the file of results."""
    name = f"sweep-{args.device}{'-quick' if args.quick else ''}.json"
    output = args.output or CACHE / name
    axes = {name: getattr(args, name) for name in sweep.AXES if name != "shape"}
    if args.features:
        axes["shape"] = [s for s in sweep.AXES["shape"] if {*s} <= {*args.features}]
    for name, values in sweep.AXES.items():
        known = set(values) if name != "shape" else {size for shape in values for size in shape}
        wanted = args.features if name == "shape" else axes[name]
        if unknown := set(wanted or ()) - known:
            sys.exit(f"[benchmarks] a sweep has no {name} {sorted(unknown)}, but {sorted(known)}")
    cells = sweep.grid(args.device, args.quick, **axes)
    try:
        results = sweep.run(cells, args.device, output, args.quick)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")
    picture = output.with_suffix(".png")
    sweep_report.draw(results, picture)
    print(sweep_report.text(results))
    print(f"written to {output} and {picture}")
    if any(map(sweep_report.wrong, results["results"])):
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if args.what == "report":
        write(json.loads(args.results.read_text()))
        physics_report.write()
        return
    if args.what == "physics":
        physics.main(args.device, args.quick, args.parts, args.output, args.pages)
        return
    if args.what == "sweep":
        sweep_all(args)
        return
    names = args.peers or default_peers(args.device)
    for name in names:
        if args.device not in PEERS[name].devices:
            sys.exit(f"[benchmarks] {name} does not run on {args.device}: leave it out of --peers")
    output = args.output or CACHE / "latest.json"
    turns = args.turns or (3 if args.quick else TURNS)
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(name, name, args.device)) for name in names]
        if args.against:
            other = Process("against", "ours", args.device, args.against.resolve())
            processes.append(stack.enter_context(other))
        described = describe(processes, args.device)
        if args.device == "cpu":
            described["roofline"] = roofline.measure()
        results: dict[str, Any] = {"machine": described, "results": []}
        for result in measure(chosen(args), processes, turns, args.seconds, args.limit):
            results["results"].append(result)
            sweep.save(results, output)
        if before := described.get("roofline"):
            described["roofline"] = roofline.better(before, roofline.measure() or before)
            sweep.save(results, output)
    print(tables(results), machine(results), sep="\n\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
