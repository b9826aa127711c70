"""The work around each multiply-accumulate of the Metal kernels, beside that of MLX's dense kernel.

``python -m benchmarks.metal_counts --product forward --block-size 64 --rows 512 --dtype float16``
counts one product of a 4096 x 4096 matrix with every block stored, by the text that MLX compiles:

* On the emulator, over a few threadgroups: bytes of device and threadgroup memory and barriers a
  multiply-accumulate, loads of 8x8 matrices for each product of them, threadgroup memory.
* By clang 19 for an AMD GPU (Debian's package clang-19): registers, bytes of arrays and registers
  left in memory, instructions around a product, waits for device memory in a stage or block.

Nothing here ran on a Mac. Apple's compiler is LLVM too, but another version: the numbers compare
texts. Steel's are constants, counted from MLX's source and by a plain rewrite of its loop.

``--all`` counts everything again, and writes ``results/metal_counts.json`` and the tables of
benchmarks/README.md, beside what was counted before the kernels were rewritten.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from benchmarks.char_lm import ROOT, write_table

sys.path.insert(0, str(ROOT / "tests/emulators"))
import metal_emulator

metal_emulator.install()  # before the package builds and caches its kernels

from metal_compiler import gcn  # noqa: E402

from mlx_sparse_nn import CSRPattern, sddmm, spmm, spmm_t  # noqa: E402

RESULTS = ROOT / "benchmarks/results/metal_counts.json"
SIZE, SMALL_SIZE = 4096, 1024  # of a matrix; the smaller for blocks of less than 8
SAMPLE = 4  # threadgroups to run
PRODUCTS = {
    "forward": lambda pattern, data, x: spmm(data, pattern, x),
    "gradient of x": lambda pattern, data, x: spmm_t(data, pattern, x),
    "gradient of the weight": lambda pattern, data, x: sddmm(pattern, x, x),
}


@dataclass(frozen=True)
class Counts:
    """What a kernel does for each multiply-accumulate (MAC) or 8x8x8 product of its main loop.

    Attributes:
        kernel: Its name, and its tile in rows of x and outputs where steel is meant.
        tile: Template arguments that are tile constants, and threads of a threadgroup.
        device: Bytes of device memory read and written a MAC.
        shared_read: Bytes of threadgroup memory read a MAC.
        shared_written: Bytes of it written a MAC.
        matrix_loads: ``simdgroup_load`` a product; None where a kernel has no products.
        barriers: Of the threadgroup, in 64 Ki MACs.
        shared: Bytes of threadgroup memory of a threadgroup.
        registers: 32-bit registers of a thread. None here and below: no clang 19 is installed.
        scratch: Bytes of a thread's own memory.
        instructions: Around a product or, without products, around a scalar MAC.
        waits: For device memory, in one turn of the main loop.
        has_loops: Whether the main loop has loops inside, whose turns count once here.
    """

    kernel: str
    tile: str
    device: float
    shared_read: float
    shared_written: float
    matrix_loads: float | None
    barriers: float
    shared: int
    registers: int | None = None
    scratch: int | None = None
    instructions: float | None = None
    waits: int | None = None
    has_loops: bool = False


# MLX's dense kernel at snapshot 846d176 (22 Aug 2026), from its source, for x @ W.T: ``steel/gemm``
# and the tiles of ``matmul.cpp``. Registers, instructions and waits by clang 19 for gfx1030, of a
# plain rewrite of its loop: the audit that issue 16 names (METAL.md, section 2).
STEEL = {
    "float16": {
        "64x32x32": Counts(
            "steel", "64x32x32 2x2", 0.094, 0.188, 0.094, 0.75, 2, 7885, 53, 0, 3.6, 1
        ),
        "64x64x16": Counts(
            "steel", "64x64x16 2x2", 0.063, 0.125, 0.063, 0.50, 2, 6246, 62, 0, 2.9, 1
        ),
    },
    "float32": {
        "64x32x32": Counts(
            "steel", "64x32x32 2x2", 0.188, 0.375, 0.188, 0.75, 2, 14131, 82, 0, 2.3, 1
        ),
        "64x64x16": Counts(
            "steel", "64x64x16 2x2", 0.125, 0.250, 0.125, 0.50, 2, 10445, 78, 0, 2.0, 1
        ),
    },
}
STEEL["bfloat16"] = STEEL["float16"]


def full_pattern(block_size: int) -> CSRPattern:
    """Return the pattern of a square matrix that stores every block."""
    blocks = (SIZE if block_size >= 8 else SMALL_SIZE) // block_size
    indptr = np.arange(blocks + 1, dtype=np.int32) * blocks
    indices = np.tile(np.arange(blocks, dtype=np.int32), blocks)
    return CSRPattern(indptr, indices, (blocks * block_size,) * 2, block_size)


def count(product: str, block_size: int, rows: int, dtype: mx.Dtype) -> list[Counts]:
    """Count each launch of a product, the main one first.

    Args:
        product: One of ``PRODUCTS``.
        block_size: Side of the blocks.
        rows: Of x.
        dtype: Of all operands.
    """
    pattern = full_pattern(block_size)
    data, x = mx.zeros(pattern.data_shape, dtype), mx.zeros((rows, pattern.shape[1]), dtype)
    with metal_emulator.Emulator(schedules=("forward",), count=True, sample=SAMPLE) as emulator:
        mx.eval(PRODUCTS[product](pattern, data, x))
    return [_of_launch(launch, block_size) for launch in emulator.launches]


def _of_launch(launch: metal_emulator.Launch, block_size: int) -> Counts:
    name, c, threads = (
        launch.kernel.removeprefix("mlx_sparse_nn_"),
        launch.counts,
        launch.threadgroup,
    )
    given = ("T", "OUT", "B", "INSIDE", "TRANSPOSED", "BIAS")
    tile = ", ".join(f"{key}={value}" for key, value in launch.template if key not in given)
    macs = max(1, c.macs)
    counts = Counts(
        kernel=name,
        tile=f"{tile}; {threads[0]} threads" if tile else f"{threads[0]} threads",
        device=(c.device_read + c.device_written) / macs,
        shared_read=c.threadgroup_read / macs,
        shared_written=c.threadgroup_written / macs,
        matrix_loads=c.matrix_loads / c.matrix_products if c.matrix_products else None,
        barriers=c.barriers / macs * 65536,
        shared=c.threadgroup_memory,
    )
    if not gcn.is_available():
        return counts
    compiled = gcn.compile_for_gcn(launch.source, threads[0])
    counts = replace(counts, registers=compiled.registers, scratch=compiled.scratch)
    loop = compiled.loop
    if loop is None:
        return counts
    around = loop.instructions if loop.products else loop.instructions - loop.fmas
    return replace(
        counts,
        instructions=around / (loop.products or loop.fmas),
        waits=loop.waits,
        has_loops=loop.has_loops,
    )


def _show(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


class Cell(NamedTuple):
    """One product: its name, side of the blocks, rows of x and dtype."""

    product: str
    block_size: int
    rows: int
    dtype: str


TILED = (8, 12, 16, 24, 32, 48, 64, 96, 128)
MANY = [
    Cell(product, block_size, 512, dtype)
    for product in PRODUCTS
    for dtype in ("float16", "float32")
    for block_size in TILED
]
FEW = [
    Cell(product, block_size, rows, "float16")
    for product in ("forward", "gradient of x")
    for rows in (1, 4, 8, 16, 32)
    for block_size in (1, 4, *TILED)
]


def misses(cell: Cell, c: Counts) -> list[str]:
    """Return which aims of issue 16 a kernel does not reach, each with its number."""
    steel = STEEL[cell.dtype]["64x64x16"]
    loads = around = None
    aims: list[tuple[str, float | None, float | None]] = [("registers", c.registers, 104)]
    if cell.rows < 16:
        aims.append(("waits", c.waits, 3))
    elif cell.product == "gradient of the weight":
        loads = {16: 0.75, 32: 0.75}.get(cell.block_size)
        loads = 0.5 if cell.block_size >= 64 else loads
    elif cell.rows > 32:
        if cell.block_size >= 32:
            itemsize = 4 if cell.dtype == "float32" else 2
            rows = 64 if cell.block_size == 128 else 128
            device = itemsize * (1 / cell.block_size + 1 / rows)
            aims += [("device bytes", c.device, 1.03 * device), ("barriers", c.barriers, 2.02)]
            aims += [("waits", c.waits, 1)]
            loads, around = 0.5, steel.instructions
        elif cell.block_size == 16:
            loads, around = 1.25 * 0.5, 1.25 * (steel.instructions or 0)
        elif cell.block_size == 8:
            loads, around = 1.25, 2 * (steel.instructions or 0)
        aims.append(("KB", c.shared / 1024, 16))
    aims += [("loads", c.matrix_loads, loads), ("instructions", c.instructions, around)]
    rolled = ["loops in the main loop"] if c.has_loops and around is not None else []
    return rolled + [
        f"{name} {value:.3g} > {limit:.3g}"
        for name, value, limit in aims
        if value is not None and limit is not None and value > limit * 1.005
    ]


def table(rows: list[tuple[str, Counts, str]]) -> str:
    """Return a table of counts, each with what it is of and which aims it misses."""
    lines = [
        "| B | kernel | device B/MAC | shared read | written | loads/product | barriers/64K MAC | "
        "shared memory | registers | scratch | instructions/product | waits | short of the aims |",
        "|" + " --- |" * 13,
    ]
    for what, c, short in rows:
        around = _show(c.instructions, ".1f") + (" and loops" if c.has_loops else "")
        lines.append(
            f"| {what} | {c.kernel} | {c.device:.3f} | {c.shared_read:.3f} "
            f"| {c.shared_written:.3f} | {_show(c.matrix_loads, '.2f')} | {c.barriers:.2f} "
            f"| {c.shared / 1024:.1f} KB "
            f"| {_show(c.registers)} | {_show(c.scratch)} | {around} | {_show(c.waits)} | {short} |"
        )
    return "\n".join(lines)


def run() -> None:
    """Count every cell of the tables, and keep what was counted before the rewrite."""
    results = []
    for i, cell in enumerate(MANY + FEW, 1):
        counts = count(cell.product, cell.block_size, cell.rows, getattr(mx, cell.dtype))
        results.append({"cell": cell._asdict(), "counts": [asdict(c) for c in counts]})
        done = "#" * (40 * i // len(MANY + FEW))
        print(f"\r[{done:40}] {i} of {len(MANY + FEW)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    kept = json.loads(RESULTS.read_text())
    RESULTS.write_text(json.dumps(kept | {"now": results}, indent=1) + "\n")


def write() -> None:
    """Put the tables in benchmarks/README.md."""
    write_table("metal_counts", text(json.loads(RESULTS.read_text())), "benchmarks/README.md")


def _of_cells(results: list[dict]) -> dict[Cell, Counts]:
    """Return the counts of the first launch of each product: the others only sum."""
    return {Cell(**r["cell"]): Counts(**r["counts"][0]) for r in results}


def text(results: dict[str, list]) -> str:
    """Return the tables of benchmarks/README.md."""
    now, before = _of_cells(results["now"]), _of_cells(results["before"])
    parts = []
    for product in PRODUCTS:
        for dtype in ("float16", "float32"):
            rows = [(f"dense, {name}", counts, "") for name, counts in STEEL[dtype].items()]
            for block_size in TILED:
                cell = Cell(product, block_size, 512, dtype)
                rows.append((f"{block_size}, before", before[cell], ""))
                rows.append((f"{block_size}", now[cell], "; ".join(misses(cell, now[cell]))))
            parts.append(f"{product}, 512 rows of x, {dtype}:\n\n{table(rows)}")
    lines = [
        "| product | B | " + " | ".join(f"{n} rows" for n in (1, 4, 8, 16, 32)) + " |",
        "|" + " --- |" * 7,
    ]
    for product in ("forward", "gradient of x"):
        for block_size in (1, 4, *TILED):
            cells = [Cell(product, block_size, n, "float16") for n in (1, 4, 8, 16, 32)]
            values = [f"{_brief(now[c])}; before {_brief(before[c])}" for c in cells]
            lines.append(f"| {product} | {block_size} | " + " | ".join(values) + " |")
    few = "\n".join(lines)
    parts.append(f"Few rows, float16: registers, and waits in a block or stage:\n\n{few}")
    return "\n\n".join(parts)


def _brief(c: Counts) -> str:
    return f"{_show(c.registers)}, {_show(c.waits)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--product", choices=PRODUCTS, default="forward")
    parser.add_argument("--block-size", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", type=int, nargs="+", default=[512], help="of x")
    parser.add_argument("--dtype", choices=STEEL, default="float16")
    parser.add_argument("--all", action="store_true", help="count the tables of the README again")
    options = parser.parse_args()
    if options.all:
        run()
        write()
        return
    if not gcn.is_available():
        print(f"{gcn.COMPILER} is not installed: registers and instructions are not counted")
    lines = [(f"dense, {name}", counts, "") for name, counts in STEEL[options.dtype].items()]
    for block_size in options.block_size:
        for rows in options.rows:
            cell = Cell(options.product, block_size, rows, options.dtype)
            for c in count(options.product, block_size, rows, getattr(mx, options.dtype)):
                print(f"{block_size} x {rows} rows: {c.kernel} {c.tile}")
                lines.append((f"{block_size}, {rows} rows", c, "; ".join(misses(cell, c))))
    print(table(lines))


if __name__ == "__main__":
    main()
