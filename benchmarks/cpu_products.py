"""Measure products on the CPU beside dense layers and native peers, in one run on one machine.

Every contender is a process of its own, in the environment that it needs, and makes the same data.
Results are compared before any time is taken. Contenders then take turns, so that what the machine
does besides slows all of them; times are minima and medians over the turns. Only ratios within one
run mean something. Processor time, summed over threads, depends least on what else runs.

    python benchmarks/cpu_products.py --peer mlx_sparse=/path/to/its/python

``--against PATH`` adds another checkout of this package, to compare two versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


def layer(
    size: int, block_size: int, density: float, rows: int, step: str, dtype: str = "float32"
) -> dict[str, Any]:
    """A ``size x size`` layer: ``step`` is "forward" or "training" (forward and both gradients)."""
    return {
        "kind": "layer",
        "size": size,
        "block_size": block_size,
        "density": density,
        "rows": rows,
        "step": step,
        "dtype": dtype,
    }


def ising(qubits: int) -> dict[str, Any]:
    """The transverse-field Ising Hamiltonian times a vector, float32."""
    return {"kind": "ising", "qubits": qubits}


def name(workload: dict[str, Any]) -> str:
    """Return one line that says which workload this is."""
    if workload["kind"] == "ising":
        return f"Ising n = {workload['qubits']}"
    w = workload
    dtype = "" if w["dtype"] == "float32" else f" {w['dtype']}"
    return (
        f"{w['step']} {w['size']}, B = {w['block_size']}, {w['density']:.0%}, {w['rows']} rows"
        + dtype
    )


LAYERS = [
    layer(1024, block_size, density, rows, step)
    for step in ("forward", "training")
    for block_size, density, rows in (
        (8, 0.1, 256),
        (16, 0.1, 1),
        (16, 0.1, 16),
        (16, 0.1, 256),
        (16, 0.5, 256),
        (32, 0.1, 1),
        (32, 0.1, 256),
        (32, 0.01, 256),
        (32, 0.5, 256),
        (32, 0.1, 1024),
        (64, 0.1, 256),
        (64, 0.5, 256),
    )
] + [layer(4096, 32, 0.1, 64, "forward"), layer(4096, 32, 0.1, 64, "training")]
ISING = [ising(n) for n in range(8, 23, 2)]
SUITES = {"layers": LAYERS, "ising": ISING}


# The data of a workload, alike in every process: whole numbers, so that results are equal bit for
# bit whatever the order of a sum.


def pattern_mask(size: int, block_size: int, density: float) -> np.ndarray:
    """Return which blocks are stored, ``(size / B, size / B)``; rows differ by one at most."""
    n = size // block_size
    rng = np.random.default_rng(1)
    counts = np.full(n, int(density * n))
    rest = round(density * n * n) - counts.sum()
    counts[:rest] += 1
    mask = np.zeros((n, n), bool)
    for row, count in enumerate(rng.permutation(counts)):
        mask[row, rng.permutation(n)[: max(1, count)]] = True
    return mask


def layer_data(w: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return ``mask``, ``dense (size, size)``, ``x`` and ``target (rows, size)``."""
    rng = np.random.default_rng(2)
    mask = pattern_mask(w["size"], w["block_size"], w["density"])
    ones = np.ones((w["block_size"], w["block_size"]), bool)
    draw = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)  # noqa: E731
    dense = draw(w["size"], w["size"])
    dense[dense == 0] = 1
    return {
        "mask": mask,
        "dense": dense * np.kron(mask, ones),
        "x": draw(w["rows"], w["size"]),
        "target": draw(w["rows"], w["size"]),
    }


def ising_data(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ``indptr``, ``indices``, ``data`` of the open chain with J = 1, h = 0.5; a vector."""
    size = 2**n
    state = np.arange(size, dtype=np.int64)
    spins = 1 - 2 * ((state[:, None] >> np.arange(n)) & 1)
    columns = np.concatenate([state[:, None], state[:, None] ^ (1 << np.arange(n))], axis=1)
    values = np.full(columns.shape, -0.5, np.float32)
    values[:, 0] = -(spins[:, :-1] * spins[:, 1:]).sum(axis=1)
    order = np.argsort(columns, axis=1)
    columns = np.take_along_axis(columns, order, 1).astype(np.int32)
    values = np.take_along_axis(values, order, 1)
    x = np.random.default_rng(3).integers(-2, 3, size).astype(np.float32)
    indptr = (np.arange(size + 1) * (n + 1)).astype(np.int32)
    return indptr, columns.reshape(-1), values.reshape(-1), x


# What each contender runs: a function of a workload that returns a function without arguments,
# whose call does one unit of work and returns arrays that NumPy can read.


def ours(w: dict[str, Any]) -> Callable[[], list]:
    import mlx.core as mx

    from mlx_sparse_nn import BlockSparseLinear, CSRPattern, csr_array

    if w["kind"] == "ising":
        indptr, indices, data, vector = ising_data(w["qubits"])
        H = csr_array((data, indices, indptr), shape=(vector.size, vector.size))
        psi = mx.array(vector)
        return lambda: [H @ psi]
    data = layer_data(w)
    rows, cols = np.nonzero(data["mask"])
    indptr = np.concatenate([[0], np.cumsum(data["mask"].sum(axis=1))])
    size, block = w["size"], w["block_size"]
    blocks = data["dense"].reshape(size // block, block, -1, block).swapaxes(1, 2)[rows, cols]
    module = BlockSparseLinear(
        size, size, CSRPattern(indptr, cols, (size, size), block), bias=False
    )
    module.weight = mx.array(blocks.reshape(module.weight.shape))
    return _module_step(w, module, data)


def dense(w: dict[str, Any]) -> Callable[[], list]:
    import mlx.core as mx
    import mlx.nn as nn

    data = layer_data(w)
    module = nn.Linear(w["size"], w["size"], bias=False)
    module.weight = mx.array(data["dense"])
    return _module_step(w, module, data)


def _module_step(w: dict[str, Any], module: Any, data: dict[str, np.ndarray]) -> Callable[[], list]:
    import mlx.core as mx

    dtype = getattr(mx, w["dtype"])
    x, target = mx.array(data["x"]).astype(dtype), mx.array(data["target"]).astype(dtype)
    module.set_dtype(dtype)
    mx.eval(module.parameters(), x, target)
    if w["step"] == "forward":
        return lambda: [module(x)]

    def loss(weight, x):
        module.weight = weight
        return (module(x) * target).sum()

    grad, weight = mx.value_and_grad(loss, argnums=(0, 1)), module.weight

    def step():
        value, grads = grad(weight, x)
        return [value, *grads]

    return step


def mlx_sparse(w: dict[str, Any]) -> Callable[[], list]:
    import mlx.core as mx
    import mlx_sparse as ms

    ms.use_cpu()
    if w["kind"] == "ising":
        indptr, indices, data, vector = ising_data(w["qubits"])
        H = ms.csr_array((data, indices, indptr), (vector.size, vector.size), canonical=True)
        psi = mx.array(vector)
        return lambda: [H @ psi]
    data = layer_data(w)
    A = data["dense"]
    rows, cols = np.nonzero(A)
    indptr = mx.array(np.concatenate([[0], np.cumsum((A != 0).sum(axis=1))]).astype(np.int32))
    indices = mx.array(cols.astype(np.int32))
    values = mx.array(A[rows, cols])
    # Its products take features first: it gets them so, without transposing.
    x, target = mx.array(data["x"].T.copy()), mx.array(data["target"].T.copy())
    multiply = lambda v, x: ms.csr_array((v, indices, indptr), A.shape, canonical=True) @ x  # noqa: E731
    if w["step"] == "forward":
        matrix = ms.csr_array((values, indices, indptr), A.shape, canonical=True)
        return lambda: [matrix @ x]
    grad = mx.value_and_grad(lambda v, x: (multiply(v, x) * target).sum(), argnums=(0, 1))

    def step():
        value, grads = grad(values, x)
        return [value, *grads]

    return step


def scipy(w: dict[str, Any]) -> Callable[[], list]:
    from scipy import sparse

    if w["kind"] == "ising":
        indptr, indices, data, vector = ising_data(w["qubits"])
        H = sparse.csr_array((data, indices, indptr), shape=(vector.size, vector.size))
        return lambda: [H @ vector]
    data, block = layer_data(w), w["block_size"]
    A = sparse.bsr_array(data["dense"], blocksize=(block, block))
    x = np.ascontiguousarray(data["x"].T)
    return lambda: [A @ x]


def torch(w: dict[str, Any]) -> Callable[[], list]:
    import torch

    if w["kind"] == "ising":
        indptr, indices, data, vector = ising_data(w["qubits"])
        arrays = [torch.from_numpy(a) for a in (indptr, indices, data)]
        H = torch.sparse_csr_tensor(*arrays, size=(vector.size, vector.size))
        psi = torch.from_numpy(vector)
        return lambda: [H @ psi]
    data = layer_data(w)
    A = torch.from_numpy(data["dense"]).to_sparse_csr()
    x = torch.from_numpy(np.ascontiguousarray(data["x"].T))
    return lambda: [A @ x]


CONTENDERS = {f.__name__: f for f in (ours, dense, mlx_sparse, scipy, torch)}


def takes(contender: str, w: dict[str, Any]) -> bool:
    """Return whether a contender has the workload."""
    if contender == "dense":
        return w["kind"] == "layer"
    if contender in ("scipy", "torch"):
        return w["kind"] == "ising" or (w["step"] == "forward" and w["dtype"] == "float32")
    return contender != "mlx_sparse" or w.get("dtype", "float32") == "float32"


def serve(contender: str) -> None:
    """Answer requests, one JSON object a line: a workload, or how many units of work to time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    run: Callable[[], list] = list
    ready: Callable[[list], Any] = list
    if contender not in ("scipy", "torch"):
        import mlx.core as mx

        mx.set_default_device(mx.cpu)
        ready = mx.eval
    for line in sys.stdin:
        request = json.loads(line)
        if "workload" in request:
            run = CONTENDERS[contender](request["workload"])
            out = run()
            ready(out)
            answer: Any = summary(out)
        elif "peak" in request:
            mx.synchronize()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            out = run()
            ready(out)
            answer = {"before": before, "peak": mx.get_peak_memory()}
            del out
        else:
            times = []
            for _ in range(request["calls"]):
                began, busy = time.perf_counter(), time.process_time()
                ready(run())
                times.append((time.perf_counter() - began, time.process_time() - busy))
            answer = times
        print(json.dumps(answer), file=answers, flush=True)


def summary(arrays: list) -> list[list[float]]:
    """Return sums of each result that do not depend on the order or storage of its elements."""
    import numpy as np

    def numbers(a):
        if hasattr(a, "astype") and not isinstance(a, np.ndarray):
            import mlx.core as mx

            a = a.astype(mx.float32)
        a = np.asarray(a).astype(np.float64)
        return [float(a.sum()), float((a * a).sum())]

    return [numbers(a) for a in arrays]


class Contender:
    """A process that holds one workload at a time."""

    def __init__(self, label: str, contender: str, python: str, package: Path = ROOT):
        self.label, self.contender = label, contender
        self.process = subprocess.Popen(
            [python, __file__, "--serve", contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(package)},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Return the answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.label} stopped at {request}")
        return json.loads(answer)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    contenders: list[Contender], workload: dict[str, Any], turns: int, seconds: float
) -> dict[str, Any]:
    """Return minimum and median seconds of each contender, after ``turns`` turns of each.

    A turn takes about ``seconds`` or one call, whichever is longer.
    """
    result: dict[str, Any] = {"workload": workload}
    playing = [c for c in contenders if takes(c.contender, workload)]
    expected = None
    for c in playing:
        out = c.ask({"workload": workload})
        expected = expected or out
        close = len(out) == len(expected) and np.allclose(out, expected[: len(out)], rtol=1e-4)
        if c.contender != "dense" and workload.get("dtype", "float32") == "float32" and not close:
            # The dense layer's weight gradient has all places.
            raise SystemExit(f"{name(workload)}: {c.label} gives {out}, expected {expected}")
    calls = {}
    for c in playing:
        took = min(wall for wall, _ in c.ask({"calls": 2}))
        calls[c.label] = max(1, min(1000, int(seconds / took)))
    times: dict[str, list[tuple[float, float]]] = {c.label: [] for c in playing}
    for _ in range(turns):
        for c in playing:
            times[c.label] += c.ask({"calls": calls[c.label]})
    for c in playing:
        wall, busy = zip(*times[c.label], strict=True)
        result[c.label] = {
            "min": min(wall),
            "median": statistics.median(wall),
            "processor": statistics.median(busy),
        }
        if c.contender not in ("scipy", "torch"):
            result[c.label]["memory"] = c.ask({"peak": True})
    return result


def line(result: dict[str, Any], labels: list[str]) -> str:
    """Return one line of text: milliseconds, minimum and median, of each contender."""
    cells = []
    for label in labels:
        cell = result.get(label)
        text = " " * 26
        if cell:
            text = " ".join(f"{cell[key] * 1e3:8.3f}" for key in ("min", "median", "processor"))
        if cell and "memory" in cell and label.startswith("ours"):
            text += f" {cell['memory']['peak'] / 2**20:7.1f}M"
        cells.append(text)
    return f"{name(result['workload']):46}" + " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--suite", choices=SUITES, action="append")
    parser.add_argument("--only", default="", help="workloads whose name holds this text")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--against", type=Path, action="append", default=[])
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="seconds a turn")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    contenders = [Contender("ours", "ours", sys.executable)]
    for i, package in enumerate(args.against):
        contenders.append(Contender(f"ours{i}", "ours", sys.executable, package.resolve()))
    if not args.no_dense:
        contenders.append(Contender("dense", "dense", sys.executable))
    for peer in args.peer:
        label, _, python = peer.partition("=")
        contenders.append(Contender(label, label, python))
    labels = [c.label for c in contenders]
    print(f"{'ms: minimum, median, processor':46}" + " | ".join(f"{x:>26}" for x in labels))
    results = []
    for suite in args.suite or SUITES:
        for workload in SUITES[suite]:
            if args.only in name(workload):
                results.append(compare(contenders, workload, args.turns, args.seconds))
                print(line(results[-1], labels), flush=True)
    for contender in contenders:
        contender.stop()
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
