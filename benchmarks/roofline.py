"""Measure what the cores can do at most: multiply-adds a second, and bytes read a second.

    python -m benchmarks.roofline

Prints JSON: ``gflops``, two for each multiply-add of float32, and ``read``, pairs of bytes and GB/s
of reading so many bytes over and over. ``roofline.cpp`` is compiled as the package's kernels are.
All cores that the process may use work at once. Each number is the best of many short runs.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environments import ROOT, cores, variables
from mlx_sparse_nn.core.backends.build import KERNEL_FLAGS, BuildError, compiler

SOURCE = ROOT / "benchmarks/roofline.cpp"
NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
SIZES = [1 << bits for bits in range(16, 29, 2)]  # 64 KB to 256 MB
RUNS = 40
ROUNDS = 2_000_000  # of multiply-adds in a run: some milliseconds


def measure() -> dict[str, Any] | None:
    """Return what a process of its own prints, or None where there is no compiler."""
    try:
        compiler()
    except BuildError:
        return None
    command = [sys.executable, "-m", "benchmarks.roofline"]
    answer = subprocess.run(
        command, cwd=ROOT, env=variables(), check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(answer.stdout)


def better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return the higher rates of two measurements: what the machine does besides lowers them."""
    pairs = zip(a["read"], b["read"], strict=True)
    read = [[size, max(rate, other)] for (size, rate), (_, other) in pairs]
    return {**a, "gflops": max(a["gflops"], b["gflops"]), "read": read}


def reading(roofline: dict[str, Any], n_bytes: float) -> float:
    """Return the bytes a second of reading ``n_bytes`` over and over, between those measured."""
    sizes, rates = zip(*roofline["read"], strict=True)
    return float(np.interp(math.log(n_bytes), np.log(sizes), rates)) * 1e9


def build(folder: Path) -> ctypes.CDLL:
    """Compile and load ``roofline.cpp``."""
    library = folder / "roofline.so"
    include = ["-I", str(ROOT / "mlx_sparse_nn/cpu")]
    command = [*compiler(), *KERNEL_FLAGS, NATIVE, *include, str(SOURCE)]
    subprocess.run([*command, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_float]
    loaded.read_floats.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


def fastest(work: Callable[[int], object], runs: int = RUNS) -> float:
    """Return the least seconds from the first core's begin to the last one's end of ``work(core)``,
    which all cores do at once."""
    n = cores()
    spans = np.zeros((runs, n, 2))
    together = threading.Barrier(n)

    def repeat(core: int) -> None:
        for span in spans[:, core]:
            together.wait()
            span[0] = time.perf_counter()
            work(core)
            span[1] = time.perf_counter()

    threads = [threading.Thread(target=repeat, args=[core]) for core in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float((spans[:, :, 1].max(axis=1) - spans[:, :, 0].min(axis=1)).min())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
    n = cores()
    flops = 2 * n * ROUNDS * library.multiply_adds_a_round()
    gflops = flops / fastest(lambda _: library.multiply_adds(ROUNDS, 0.5, 1.0)) / 1e9
    memory, read = np.ones(SIZES[-1] // 4, np.float32), []
    for size in SIZES:
        # Small ones several times in a run, in which the library holds no lock of Python's.
        share, times = size // 4 // n // 1024 * 1024, max(1, (1 << 26) // size)

        def walk(core: int, share: int = share, times: int = times) -> None:
            at = memory.ctypes.data + 4 * core * share
            for _ in range(times):
                library.read_floats(at, share)

        runs = RUNS if size < 1 << 26 else RUNS // 4
        read.append([size, 4 * share * n * times / fastest(walk, runs) / 1e9])
    print(json.dumps({"cores": n, "gflops": gflops, "read": read}))


if __name__ == "__main__":
    main()
