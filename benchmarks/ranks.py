"""Measure tensor parallel FFNs on the GPUs of this machine, one process each, through NCCL.

An FFN of 4096 x 16384 with 8,192 rows of x, bfloat16: output and all gradients, compiled, dense by
MLX's ``shard_linear`` and sparse by ``shard_block_sparse``, beside the whole one on one of these
GPUs. Outputs and gradients of the parts are compared with those of the whole first. Times are
medians, in turns. ``benchmarks/gpu.py --ranks 2`` runs this.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from mlx_sparse_nn import BlockSparseLinear, shard_block_sparse, shard_boundaries

ROWS, WIDTH, HIDDEN = 8192, 4096, 16384
CONFIGURATIONS = ((0, 1.0), (64, 0.1), (64, 0.25), (128, 0.1), (128, 0.25))  # block size, density
ROUNDS = 15


class FFN(nn.Module):
    """Two linear layers, dense where the block size is 0."""

    def __init__(self, block_size: int, density: float):
        super().__init__()
        self.up: Any = _linear(WIDTH, HIDDEN, block_size, density)
        self.down: Any = _linear(HIDDEN, WIDTH, block_size, density)
        self.set_dtype(mx.bfloat16)

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``(rows, WIDTH)`` of the same."""
        return self.down(nn.gelu_approx(self.up(x)))


def _linear(inputs: int, outputs: int, block_size: int, density: float) -> nn.Module:
    if block_size == 0:
        return nn.Linear(inputs, outputs, bias=False)
    return BlockSparseLinear(inputs, outputs, block_size=block_size, density=density, bias=False)


def sharded(whole: FFN, group: mx.distributed.Group) -> tuple[FFN, Callable[[FFN], FFN]]:
    """Return this rank's part of an FFN, and what shards another one in the same way."""
    sparse = isinstance(whole.up, BlockSparseLinear)
    cuts = shard_boundaries([whole.up], [whole.down], group=group) if sparse else None

    def shard(ffn: FFN) -> FFN:
        part = FFN.__new__(FFN)
        nn.Module.__init__(part)
        if sparse:
            options: Any = {"boundaries": cuts, "group": group}
            part.up = shard_block_sparse(ffn.up, "all-to-sharded", **options)
            part.down = shard_block_sparse(ffn.down, "sharded-to-all", **options)
        else:
            part.up = shard_linear(ffn.up, "all-to-sharded", group=group)
            part.down = shard_linear(ffn.down, "sharded-to-all", group=group)
        return part

    return shard(whole), shard


def gradients(ffn: FFN) -> Callable[[mx.array, mx.array], tuple[mx.array, dict, mx.array]]:
    """Return what computes output and gradients of ``sum((ffn(x) - c)**2) / 2``, compiled."""

    def loss(parameters: dict, x: mx.array, c: mx.array) -> tuple[mx.array, mx.array]:
        ffn.update(parameters)
        y = ffn(x)
        return mx.square(y - c).sum() / 2, y

    def run(x: mx.array, c: mx.array) -> tuple[mx.array, dict, mx.array]:
        parameters = ffn.trainable_parameters()
        (_, y), (d_parameters, d_x) = mx.value_and_grad(loss, argnums=(0, 1))(parameters, x, c)
        ffn.update(parameters)
        return y, d_parameters, d_x

    return mx.compile(run, inputs=ffn.state)


def check(whole: FFN, part: FFN, shard: Callable[[FFN], FFN], x: mx.array, c: mx.array) -> None:
    """Compare the parts' output and gradients with the whole FFN's, or exit."""
    y, d_whole, d_x = gradients(whole)(x, c)
    part_y, d_part, part_d_x = gradients(part)(x, c)
    values = whole.trainable_parameters()
    whole.update(d_whole)
    expected = shard(whole)  # the parts of the gradients
    whole.update(values)
    pairs = [("y", part_y, y), ("x", part_d_x, d_x)]
    pairs += [(name, d_part[name]["weight"], expected[name].weight) for name in ("up", "down")]
    for name, found, right in pairs:
        difference = float(mx.abs(found.astype(mx.float32) - right.astype(mx.float32)).max())
        scale = float(mx.abs(right).max())
        if not difference <= 2**-6 * scale:  # parts are rounded before they are added
            sys.exit(f"benchmarks/ranks.py: {name} is off by {difference} of {scale}")


def measure() -> dict[str, Any]:
    """Return milliseconds of each FFN on one GPU and on all ranks' GPUs. Every rank calls this."""
    group = mx.distributed.init(strict=True, backend="nccl")
    cells = []
    for block_size, density in CONFIGURATIONS:
        mx.random.seed(0)  # the same FFN everywhere
        whole = FFN(block_size, density)
        x, c = (mx.random.normal((ROWS, WIDTH)).astype(mx.bfloat16) for _ in range(2))
        part, shard = sharded(whole, group)
        mx.eval(whole.state, part.state, x, c)
        check(whole, part, shard, x, c)
        runs = {1: gradients(whole), group.size(): gradients(part)}
        times: dict[int, list[float]] = {n: [] for n in runs}
        for _ in range(ROUNDS):
            for n, run in runs.items():
                mx.eval(mx.distributed.all_sum(mx.array(0), group=group))  # all begin together
                began = time.perf_counter()
                mx.eval(run(x, c))
                times[n].append((time.perf_counter() - began) * 1e3)
        cell: dict[str, Any] = {"block_size": block_size, "density": density}
        cell["ms"] = {str(n): statistics.median(own[3:]) for n, own in times.items()}
        cells.append(cell)
    return {"device": mx.device_info()["device_name"], "ffn": cells}


def run_on(n_ranks: int, script: Path, *arguments: str) -> None:
    """Run a script of this folder in ``n_ranks`` processes, each on a GPU of its own, or exit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_WORLD_SIZE": str(n_ranks),
                "NCCL_HOST_IP": "127.0.0.1",
                "NCCL_PORT": str(port),
                "CUDA_VISIBLE_DEVICES": str(rank),
            },
        )
        for rank in range(n_ranks)
    ]
    if any([process.wait() for process in processes]):
        sys.exit(f"{script.name}: a rank failed")


def measure_on(n_ranks: int) -> dict[str, Any]:
    """Return what :func:`measure` says on ``n_ranks`` GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "ranks.json")
        run_on(n_ranks, Path(__file__), str(output))
        return json.loads(output.read_text())


def table(cells: list[dict]) -> str:
    """Return the table of the cells of :func:`measure`."""
    counts = list(cells[0]["ms"])
    times = " | ".join(f"{n} GPU{'s' * (n != '1')}, ms" for n in counts)
    lines = [f"| B | density | {times} | ratio |", f"|{' --- |' * (len(counts) + 3)}"]
    for cell in cells:
        milliseconds = [cell["ms"][n] for n in counts]
        shown = " | ".join(f"{ms:.2f}" for ms in milliseconds)
        ratio = milliseconds[0] / milliseconds[-1]
        size = cell["block_size"] or "dense"
        lines.append(f"| {size} | {cell['density']:g} | {shown} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    mx.set_default_device(mx.Device(mx.gpu))
    measured = measure()
    if mx.distributed.init().rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(measured))
