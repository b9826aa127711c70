"""Count what the Metal kernels move, on the emulator, and put the tables in benchmarks/README.md.

``python -m benchmarks.metal_traffic`` makes all tables of Metal: this one, those of
``benchmarks.metal_counts`` and of ``benchmarks.metal_holes``.

For ``BlockSparseLinear``'s forward product with a 512 x 512 weight in float32: bytes read from
device memory over the bytes that must be read once (stored values, indices, x, bias), what the
tile should read over the same, measured over expected, and multiply-accumulates over those needed.
Writes ``benchmarks/results/metal_traffic.json``; with ``--readme`` alone it only makes the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import mlx.core as mx

from benchmarks import metal_counts, metal_holes
from benchmarks.char_lm import ROOT, write_table

sys.path.insert(0, str(ROOT / "tests/emulators"))
import metal_emulator

metal_emulator.install()  # before the package builds and caches its kernels

from mlx_sparse_nn import patterns, spmm  # noqa: E402

RESULTS = ROOT / "benchmarks/results/metal_traffic.json"
SIZE = 512
DENSITIES = (0.1, 0.5)
BLOCK_SIZES = (16, 32, 64)
ROWS = (1, 8, 64, 512)


def measure(density: float, block_size: int, n: int) -> dict[str, Any]:
    """Run one product with counting on, and return its counts beside those that it should have."""
    pattern = patterns.random(SIZE, SIZE, density, block_size, seed=1)
    data = mx.random.normal(pattern.data_shape)
    x, bias = mx.random.normal((n, SIZE)), mx.random.normal((SIZE,))
    with metal_emulator.Emulator(schedules=("forward",), count=True) as emulator:
        mx.eval(spmm(data, pattern, x, bias))
    (launch,) = emulator.launches
    template = dict(launch.template)
    rows = template["ROWS"]
    few = launch.kernel.endswith("few")
    row_tiles = math.ceil(n / rows)
    # Outputs that a threadgroup owns: by the kernel's template, or a block-row's.
    width = template.get("STRIP", template.get("WIDTH", 16 if few else block_size))
    strips = -(-block_size // width)
    expected = (
        data.nbytes * row_tiles
        + x.itemsize * pattern.n_blocks * block_size * n * strips
        + (pattern.indices.nbytes + pattern.indptr.nbytes + bias.nbytes) * row_tiles
    )
    once = data.nbytes + pattern.indices.nbytes + pattern.indptr.nbytes + x.nbytes + bias.nbytes
    return {
        "block_size": block_size,
        "density": density,
        "rows": n,
        "tile": f"{rows} x {block_size // strips}",
        "read": launch.counts.device_read,
        "expected": expected,
        "once": once,
        "macs": launch.counts.macs,
        "macs_needed": pattern.nnz * n,
    }


def table(results: list[dict]) -> str:
    """Return the table of benchmarks/README.md."""
    lines = [
        "| B | density | rows of x | tile (rows x outputs) | read / once | the tile's own | "
        "measured / expected | MACs issued / needed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        once = r["once"]
        lines.append(
            f"| {r['block_size']} | {r['density']:g} | {r['rows']} | {r['tile']} "
            f"| {r['read'] / once:.2f} | {r['expected'] / once:.2f} "
            f"| {r['read'] / r['expected']:.3f} | {r['macs'] / r['macs_needed']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--readme", action="store_true", help="count nothing, only write the tables"
    )
    if not parser.parse_args().readme:
        results = [measure(d, b, n) for b in BLOCK_SIZES for d in DENSITIES for n in ROWS]
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        metal_counts.run()
        metal_holes.run(again=True)
    write_table("metal_traffic", table(json.loads(RESULTS.read_text())), "benchmarks/README.md")
    metal_counts.write()
    metal_holes.write()


if __name__ == "__main__":
    main()
