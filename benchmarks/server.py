"""A peer's process: it answers one request a line, as JSON, on its standard output.

    python -m benchmarks.server NAME DEVICE PACKAGE

PACKAGE is the checkout of mlx_sparse_nn to measure. A workload stays ready until it is dropped.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import Task
from benchmarks.workloads import from_json


class Server:
    """What a peer answers, request by request."""

    def __init__(self, name: str, device: str):
        self.peer: Any = importlib.import_module(f"benchmarks.peers.{name}")
        self.runtime: Any = self.peer.RUNTIME
        self.runtime.start(device)
        self.device = device
        self.counts_memory = hasattr(self.runtime, "peak_memory")
        self.tasks: dict[int, Task] = {}
        self.kept: dict[int, int] = {}  # bytes that a workload holds between calls

    def versions(self) -> dict[str, str]:
        """Return the version of each package that the peer is made of, and what else it says."""
        says = self.peer.describe() if hasattr(self.peer, "describe") else {}
        return versions_of(self.peer.PACKAGES) | says

    def gpu(self) -> str | None:
        """Return the name of the GPU, where the peer uses one."""
        return self.runtime.gpu() if self.device == "gpu" else None

    def prepare(self, key: int, workload: dict[str, Any], folder: str) -> float | None:
        """Run a workload once, write its results into the folder, and return its seconds."""
        before = self._active()
        path, w = Path(folder), from_json(workload)
        arrays = {file.stem: np.load(file) for file in path.glob("*.npy")}
        task = self.peer.prepare(w, arrays)
        if task is None:
            return None
        operands = task.setup()
        began = time.perf_counter()
        out = task.run(operands)
        self.runtime.ready(out)
        seconds = time.perf_counter() - began
        np.savez(path / "out.npz", *task.convert(out))
        del out, operands
        self.tasks[key], self.kept[key] = task, self._active() - before
        return seconds

    def time(self, key: int, calls: int) -> dict[str, Any]:
        """Return seconds of each call, processor seconds of all, and bytes.

        ``kept`` is what lies there between calls, operands and what was made of the pattern;
        ``peak`` is the peak of memory with that.
        """
        task, wall, busy = self.tasks[key], [], 0.0
        before = self._active()
        if self.counts_memory:
            self.runtime.reset_peak()
        for _ in range(calls):
            operands = task.setup()
            began, spent = time.perf_counter(), time.process_time()
            self.runtime.ready(task.run(operands))
            wall.append(time.perf_counter() - began)
            busy += time.process_time() - spent
        answer = {"wall": wall, "busy": busy}
        if self.counts_memory:
            kept = self.kept[key]
            answer |= {"kept": kept, "peak": kept + self.runtime.peak_memory() - before}
        return answer

    def drop(self) -> None:
        """Forget all workloads."""
        self.tasks.clear()
        self.kept.clear()
        gc.collect()

    def _active(self) -> int:
        return self.runtime.active_memory() if self.counts_memory else 0


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def answer(make: Callable[[], object]) -> None:
    """Answer each request by a method of what ``make`` returns, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    server = make()
    for line in sys.stdin:
        request, arguments = json.loads(line)
        print(json.dumps(getattr(server, request)(**arguments)), file=answers, flush=True)


def main(name: str, device: str, package: str) -> None:
    sys.path.insert(0, package)
    answer(lambda: Server(name, device))


if __name__ == "__main__":
    main(*sys.argv[1:])
