"""Measure products on this machine beside dense layers and native peers.

    python -m benchmarks                              the default set, 15 minutes on two cores
    python -m benchmarks --quick                      a minute
    python -m benchmarks layers --features 1024 --rows 256 --dtype float32
    python -m benchmarks ising --qubits 16 20 --peers ours mlx_sparse
    python -m benchmarks --output benchmarks/results/cpu.json && python -m benchmarks report

Every peer is a process in an environment of its own, made under ``.bench/`` when it is first
needed. Results are compared with an oracle, for equality, before any time is taken. Only ratios
within one run mean something.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import roofline, workloads
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
        choices=["all", *SETS, "sweep", "report"],
        help="layers: BlockSparseLinear; arrays: unstructured A @ x; ising: the Hamiltonian "
        "times a vector; build: making arrays; calls: what the host does for a call; sweep: one "
        "picture of the whole; report: tables and plots of --results",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="all of the device if not given")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer workloads and turns")
    parser.add_argument(
        "--full", action="store_true", help="the whole grid, which takes many hours"
    )
    parser.add_argument("--turns", type=int, help=f"of each peer: {TURNS}, or 3 with --quick")
    parser.add_argument("--seconds", type=float, default=0.03, help="what a turn takes")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of one peer's turns")
    parser.add_argument("--against", type=Path, help="another checkout of the package, as a peer")
    parser.add_argument("--output", type=Path, default=CACHE / "latest.json")
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


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results so far, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(result) for result in results["results"])
    described = json.dumps(results["machine"], indent=1)
    path.write_text(f'{{"machine": {described},\n"results": [\n{rows}\n]}}\n')


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.what == "report":
        write(json.loads(args.results.read_text()))
        return
    names = args.peers or default_peers(args.device)
    for name in names:
        if args.device not in PEERS[name].devices:
            sys.exit(f"[benchmarks] {name} does not run on {args.device}: leave it out of --peers")
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
            save(results, args.output)
    print(tables(results), machine(results), sep="\n\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
