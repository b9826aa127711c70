"""Measure workloads with peers that take turns, in processes of their own.

A turn is some calls of one peer. Peers take turns in an order that rotates, so that what the
machine does besides slows all of them. A ratio is taken turn by turn: two peers' medians of one
round.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.environments import PEERS, ROOT, cores, python_of, variables
from benchmarks.workloads import Layer, Workload, to_json

TURNS = 7
FEWEST = 3  # turns of what is slow
PAUSE = 0.005  # seconds between turns, in which the threads of a peer go to sleep
# OpenBLAS's threads spin for 2 to this power of cycles before they sleep: less than the pause.
SLEEPS = {"OPENBLAS_THREAD_TIMEOUT": "20"}
DENSE = ("linear", "linear_openblas")  # peers whose cost no pattern changes


class Stopped(SystemExit):
    """A process ended without an answer."""


class Child(AbstractContextManager):
    """A process that answers requests.

    Args:
        label: Name in errors.
        command: What to run; ``server.answer`` is how it answers.
        variables: Its environment variables.
    """

    def __init__(self, label: str, command: list[str], variables: dict[str, str]):
        self.label = label
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=variables,
        )

    def ask(self, request: str, **arguments: Any) -> Any:
        """Return the answer to a request, a method of what the process serves.

        Raises:
            Stopped: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([request, arguments]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Stopped(f"[benchmarks] {self.label} stopped at {request} {arguments}")
        return json.loads(answer)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it ended before
            self._process.communicate()


class Process(Child):
    """A peer's process.

    Args:
        label: Name in the results.
        name: Module of the peer.
        device: "cpu" or "gpu".
        package: Checkout of mlx_sparse_nn to measure.
    """

    def __init__(self, label: str, name: str, device: str = "cpu", package: Path = ROOT):
        self.name = name
        server = ["-m", "benchmarks.server", name, device, str(package)]
        pinned = {**variables(PEERS[name].openblas), **SLEEPS}
        super().__init__(label, [str(python_of(name)), *server], pinned)


def measure(
    workloads: Iterable[Workload],
    processes: list[Process],
    turns: int = TURNS,
    seconds: float = 0.03,
    limit: float = 5.0,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each workload: ``workload``, ``held`` and ``made`` bytes, and ``peers``.

    Of each peer: ``turns``, the median seconds of a call in each turn; ``calls`` in all;
    ``processor``, the mean seconds of a call over all threads; where the peer can say, ``kept``,
    bytes of operands and what was made of the pattern, and ``peak``, bytes of these, results and
    what lies between.

    Args:
        workloads: What to measure. Layers that one dense layer stands for are measured together.
        processes: The peers.
        turns: Turns of each peer.
        seconds: What a turn takes, or one call where that is longer.
        limit: Seconds after which a peer takes no more turns, but ``FEWEST`` in any case.

    Raises:
        SystemExit: A result is wrong.
    """
    groups: dict[Any, list[Workload]] = {}
    for w in dict.fromkeys(workloads):
        groups.setdefault(w.dense if isinstance(w, Layer) else w, []).append(w)
    with tqdm(total=sum(map(len, groups.values())), unit="workload") as bar:
        for group in groups.values():
            bar.set_description(group[0].name)
            results, entries = _prepare(group, processes)
            _take_turns(entries, turns, seconds, limit)
            for process in processes:
                process.ask("drop")
            yield from results
            bar.update(len(group))


class _Entry:
    """A workload at a peer."""

    def __init__(self, process: Process, key: int, took: float):
        self.process, self.key, self.took = process, key, took
        self.spent, self.calls, self.busy = 0.0, 0, 0.0
        self.result: dict[str, Any] = {"turns": []}

    def turn(self, seconds: float) -> None:
        calls = max(1, min(1000, int(seconds / self.took)))
        answer = self.process.ask("time", key=self.key, calls=calls)
        median = statistics.median(answer["wall"])
        self.took = min(self.took, median)  # the first call was a cold one
        self.spent += sum(answer["wall"])
        self.calls += calls
        self.busy += answer["busy"]
        self.result["turns"].append(_round(median))
        self.result["calls"] = self.calls
        self.result["processor"] = _round(self.busy / self.calls)
        if "peak" in answer:
            self.result["kept"] = answer["kept"]
            self.result["peak"] = max(answer["peak"], self.result.get("peak", 0))


def _prepare(
    group: list[Workload], processes: list[Process]
) -> tuple[list[dict[str, Any]], list[_Entry]]:
    """Run each workload once at each peer and compare; a dense layer stands for all of a group."""
    results, entries = [], []
    dense: dict[str, _Entry] = {}
    for key, w in enumerate(group):
        arrays = w.arrays()
        expected = w.expected(arrays)
        peers: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, array in arrays.items():
                np.save(Path(folder) / f"{name}.npy", array)
            for process in processes:
                if process.name in dense:
                    peers[process.label] = dense[process.name].result
                    continue
                took = process.ask("prepare", key=key, workload=to_json(w), folder=folder)
                if took is None:
                    continue
                with np.load(Path(folder) / "out.npz") as out:
                    check(w, process.label, list(out.values()), expected)
                entry = _Entry(process, key, took)
                entries.append(entry)
                peers[process.label] = entry.result
                if process.name in DENSE:
                    dense[process.name] = entry
        sizes = {"held": w.held(arrays), "made": w.made(arrays)}
        results.append({"workload": to_json(w), **sizes, "peers": peers})
    return results, entries


def check(w: Workload, label: str, out: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Raise SystemExit unless results are equal."""
    if len(out) != len(expected):
        raise SystemExit(f"[benchmarks] {w.name}: {label} gives {len(out)} results")
    for i, (a, b) in enumerate(zip(out, expected, strict=True)):
        if a.shape != b.shape or not np.array_equal(a, b):
            where = f"of shape {a.shape}, expected {b.shape}"
            if a.shape == b.shape:
                j = tuple(np.argwhere(a != b)[0])
                where = f"{a[j]} at {[int(k) for k in j]}, expected {b[j]}"
            raise SystemExit(f"[benchmarks] {w.name}: result {i} of {label} is {where}")


def _take_turns(entries: list[_Entry], turns: int, seconds: float, limit: float) -> None:
    for turn in range(turns):
        first = turn % len(entries)
        for entry in entries[first:] + entries[:first]:
            if turn < FEWEST or entry.spent < limit:
                entry.turn(seconds)
                time.sleep(PAUSE)


def describe(processes: list[Process], device: str) -> dict[str, Any]:
    """Return what the machine and its software are."""
    return {
        "gpu": processes[0].ask("gpu"),
        **describe_machine(device),
        "peers": {p.label: p.ask("versions") for p in processes},
    }


def describe_machine(device: str) -> dict[str, Any]:
    """Return what the machine is, and the commit."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    commit = ["git", "describe", "--always", "--dirty"]
    found_commit = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": device,
        "processor": found.group(1) if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "used_cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": found_commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "load": _round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else None,
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")
