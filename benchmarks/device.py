"""Run the tests on this machine's GPU, then time the layer there beside ``nn.Linear``.

Up to eight processes share the tests, and the GPU. The distributed layers are tested through NCCL
where there are two GPUs. Arguments go to pytest. Fails where MLX finds no GPU, where a test fails,
and where the tests ran no kernel; what ran is printed below them. The times are those of many calls
under one evaluation, the median of several, in microseconds a call. Writes
``benchmarks/results/device.json``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_sparse_nn import BlockSparseLinear

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/device.json"
PROCESSES = 8  # of pytest: each compiles its own kernels
SIZE = 2048
CALLS = 50


def microseconds(layer: Callable[[mx.array], mx.array], x: mx.array) -> float:
    """Return the time of one call: the median over 7 evaluations of ``CALLS`` calls each."""
    inputs = [x * (1 + i / CALLS) for i in range(CALLS)]
    mx.eval(inputs)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        mx.eval([layer(x) for x in inputs])
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    return statistics.median(times[1:])


def measure() -> list[dict]:
    """Time forward calls of dense and sparse layers of ``SIZE x SIZE``, float16."""
    results = []
    cells = [(b, d, n) for b in (16, 32, 64, 128) for d in (0.1, 0.25) for n in (1, 16, 512)]
    for block_size, density, n in tqdm(cells):
        sparse = BlockSparseLinear(SIZE, SIZE, block_size=block_size, density=density)
        dense = nn.Linear(SIZE, SIZE)
        for layer in (sparse, dense):
            layer.set_dtype(mx.float16)
        x = mx.random.normal((n, SIZE)).astype(mx.float16)
        expected = x @ sparse.todense().T + sparse.bias
        worst = float(mx.abs(sparse(x) - expected).max())
        if not worst < 0.05:
            sys.exit(f"wrong by {worst} at block_size {block_size}, density {density}, {n} rows")
        results.append(
            {
                "block_size": block_size,
                "density": density,
                "rows": n,
                "sparse": microseconds(sparse, x),
                "dense": microseconds(dense, x),
            }
        )
    return results


def main() -> None:
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        sys.exit("benchmarks/device.py: MLX finds no GPU on this machine")
    mx.set_default_device(mx.Device(mx.gpu))
    # What runs on emulators needs no GPU, and counts are those of the CPU's operations.
    others = ["tests/emulators", "tests/backends/test_cuda.py", "tests/backends/test_counts.py"]
    ignored = [*(f"--ignore={path}" for path in others), "--ignore-glob=*/test_metal*"]
    count = max(1, min(PROCESSES, (os.cpu_count() or 1) // 2))
    processes = ["--numprocesses", str(count), "--dist", "loadscope"]
    command = [sys.executable, "-m", "pytest", "--device", "gpu", "tests", *ignored, *processes]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command += sys.argv[1:]
    failed = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    results = measure()
    device = mx.device_info()
    RESULTS.write_text(json.dumps({"device": device, "results": results}, indent=2) + "\n")
    print(
        f"{SIZE} x {SIZE}, float16, microseconds a call on {device.get('device_name', 'this GPU')}"
    )
    print("B    density  rows     sparse      dense   dense / sparse")
    for r in results:
        ratio = r["dense"] / r["sparse"]
        print(
            f"{r['block_size']:<4} {r['density']:7g} {r['rows']:5} {r['sparse']:10.1f} "
            f"{r['dense']:10.1f} {ratio:8.2f}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
