"""Measure the product of two sparse matrices beside SciPy's, the first time and later.

    python -m benchmarks.sparse_products [--rounds 9] [--scale 1.0] [--write]

Both use one core, and take turns; each number is the least processor time of the rounds. "First" is
with patterns that nobody has multiplied before, so that the pattern of the product is found;
"later" has the same patterns and other values. SciPy finds the pattern each time. Values are
float32, and results are compared before any time is taken. With ``--write``, the table goes into
docs/arrays.md and the numbers into ``results/sparse_products.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from functools import reduce
from operator import matmul
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import scipy.sparse as sp

from mlx_sparse_nn import CSRArray, CSRPattern, from_scipy, to_scipy
from mlx_sparse_nn.core.backends import cpu

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/sparse_products.json"
PAGE = ROOT / "docs/arrays.md"
MARK = "<!-- products -->"
END = "<!-- end -->"


def stencil(side: int, n_axes: int) -> Any:
    """Return the matrix of a grid in which each point has its neighbours, diagonal ones too."""
    ones: Any = [np.ones(side - 1), np.ones(side), np.ones(side - 1)]
    offsets: Any = [-1, 0, 1]
    line = sp.diags_array(ones, offsets=offsets)
    return sp.csr_array(reduce(sp.kron, [line] * n_axes))


def aggregation(n: int, size: int) -> Any:
    """Return the interpolation from groups of so many neighbours."""
    shape = (n, -(-n // size))
    return sp.csr_array((np.ones(n), (np.arange(n), np.arange(n) // size)), shape)


def power_law(n: int, mean: float, rng: np.random.Generator) -> Any:
    """Return a graph of few nodes with many neighbours, and many with few."""
    degrees = np.minimum((rng.pareto(1.5, n) + 1) * mean / 3, n // 10).astype(int)
    cols = (rng.random(degrees.sum()) ** 2 * n).astype(int)
    return sp.csr_array((np.ones(cols.size), (np.repeat(np.arange(n), degrees), cols)), (n, n))


def products(scale: float) -> dict[str, list[Any]]:
    """Return names and factors; there are some 10^6 stored values where ``scale`` is 1."""
    rng = np.random.default_rng(0)

    def size(n: int, n_axes: int = 1) -> int:
        return max(8, round(n * scale ** (1 / n_axes)))

    n = size(100_000)
    random = sp.random_array((n, n), density=10 / n, rng=rng, format="csr")
    wide = sp.random_array((size(3000), 2 * n), density=320 / (2 * n), rng=rng, format="csr")
    solid = stencil(size(36, 3), 3)
    blocks = sp.kron(stencil(size(84, 2), 2), np.ones((4, 4)))
    return {
        "random, 10 in a row, A @ A": [random, random],
        "graph, power law, A @ A": [power_law(n, 10, rng)] * 2,
        "finite elements in 2D, A @ A": [stencil(size(330, 2), 2)] * 2,
        "finite elements in 3D, A @ A": [solid] * 2,
        "multigrid in 3D, P.T @ A @ P": [aggregation(solid.shape[0], 8), solid],
        "few long rows, A @ A.T": [wide, sp.csr_array(wide.T)],
        "blocks of 4, finite elements in 2D, A @ A": [sp.bsr_array(blocks, blocksize=(4, 4))] * 2,
    }


def measure(name: str, factors: list[Any], rounds: int) -> dict[str, float]:
    """Return milliseconds, of SciPy, and of the first and later products here."""
    rng = np.random.default_rng(1)
    theirs = []
    for factor in factors:
        a = factor.astype(np.float32)
        a.data[...] = rng.random(a.data.shape)
        a.sort_indices()
        theirs.append(a)
    ours = [from_scipy(a) for a in theirs]
    is_galerkin = "P.T" in name

    def product(arrays: list[Any]) -> Any:
        if is_galerkin:
            p, a = arrays
            return p.T @ a @ p
        return reduce(matmul, arrays)

    def fresh() -> list[CSRArray]:
        made: dict[int, CSRPattern] = {}  # A @ A has one pattern
        out = []
        for original, array in zip(factors, ours, strict=True):
            pattern = made.get(id(original))
            if pattern is None:
                p = array.pattern
                pattern = CSRPattern(p.indptr, p.indices, p.shape, p.block_size)
                made[id(original)] = pattern
            out.append(CSRArray(array.data * 1, pattern))
            mx.eval(out[-1].data)
        return out

    expected = product(theirs)
    error = abs(to_scipy(product(ours)).tocsr() - expected.tocsr()).max()
    if not error <= 1e-4 * abs(expected).max():
        raise SystemExit(f"{name}: the product is wrong by {error}")
    times: dict[str, list[float]] = {"scipy": [], "first": [], "later": []}
    for _ in range(rounds):
        times["scipy"].append(processor_ms(lambda: product(theirs)))
        arrays = fresh()
        times["first"].append(processor_ms(lambda arrays=arrays: mx.eval(product(arrays).data)))
        times["later"].append(processor_ms(lambda arrays=arrays: mx.eval(product(arrays).data)))
    stored = sum(
        a.data.size for a in {id(f): a for f, a in zip(factors, theirs, strict=True)}.values()
    )
    return {"stored": stored, **{key: min(values) for key, values in times.items()}}


def processor_ms(call: Callable[[], object]) -> float:
    gc.collect()
    begin = time.process_time()
    call()
    return (time.process_time() - begin) * 1e3


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the results as a table of Markdown."""
    lines = [
        "| product | stored values | SciPy, ms | first | later |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        speeds = (f"{row['scipy'] / row[key]:.2f}" for key in ("first", "later"))
        lines.append(f"| {name} | {row['stored']:,} | {row['scipy']:.1f} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="how often each is measured")
    parser.add_argument("--scale", type=float, default=1.0, help="of the matrices' sizes")
    parser.add_argument("--write", action="store_true", help="keep the numbers and the table")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    mx.set_default_device(mx.cpu)
    if not cpu.is_available():
        raise SystemExit(f"C++ kernels cannot be had: {cpu.why_not()}")
    found = products(args.scale)
    results = {name: measure(name, factors, args.rounds) for name, factors in found.items()}
    print(table(results))
    if args.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(MARK)
        after = rest.split(END, 1)[1]
        PAGE.write_text(f"{before}{MARK}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
