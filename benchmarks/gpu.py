"""Measure the CUDA kernels beside dense layers and the peers, in one run on one NVIDIA GPU.

Needs MLX for CUDA and PyTorch in one environment. Results are compared with dense ones in float32
before any time is taken. Two times are measured:

- call: what one call costs, many under one synchronise, the median of several rounds. PyTorch's are
  replays of a CUDA graph. An MLX operation costs some 10 microseconds to launch, whatever it does.
  Calls of few rows, which the host bounds, are timed in turns with the dense layer's.
- kernel: how long the GPU is at work for it, from CUPTI's trace (``torch.profiler``, which sees the
  kernels of MLX in the same process), the mean of many.

Every call of MLX's takes what the call before it gave, as the layers of a model do: calls that do
not wait for one another would share the GPU, and their times would overlap.

Writes ``benchmarks/results/gpu.json`` (or ``--output``); with ``--readme`` alone it makes the
README's table and plot from that file. ``--ranks 2`` measures tensor parallel FFNs alone, on two
GPUs, and adds them to the file; see ``ranks.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
from char_lm import ROOT, write_table

RESULTS = ROOT / "benchmarks/results/gpu.json"
PLOT = ROOT / "docs/gpu.png"
SIZE = 4096
ROWS = (1, 16, 4096)
BLOCK_SIZES = (16, 32, 64, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.5)
QUBITS = (16, 20, 24)
COLUMNS = (1, 4, 16, 64)  # of X, beside a graph
ALL_BLOCKS = (8, 16, 24, 32, 48, 64, 96, 128)
SOME_ROWS = (64, 256, 1024, 4096)


def call_ms(run: Callable[[int], Any], synchronize: Callable[[], None], calls: int) -> float:
    """Return milliseconds a call of ``run(calls)``: the median of five rounds."""
    run(3)
    synchronize()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run(calls)
        synchronize()
        times.append((time.perf_counter() - began) / calls * 1e3)
    return statistics.median(times)


def calls_in_turns(functions: list[Callable], x: Any) -> list[float]:
    """Return milliseconds a call of each MLX function: medians of rounds that alternate."""
    import mlx.core as mx

    times: list[list[float]] = [[] for _ in functions]
    for _ in range(21):
        for f, own in zip(functions, times, strict=True):
            began = time.perf_counter()
            y = x
            for _ in range(100):
                y = f(y)
            mx.eval(y)
            own.append((time.perf_counter() - began) / 100 * 1e3)
    return [statistics.median(own[1:]) for own in times]


def kernel_ms(run: Callable[[int], Any], synchronize: Callable[[], None], calls: int) -> float:
    """Return milliseconds a call in which the GPU is at work, whatever runs there side by side."""
    import torch  # pyright: ignore[reportMissingImports]

    run(3)
    synchronize()
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profile:
        run(calls)
        synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [e.time_range for e in events if "Memcpy" not in e.name]
    busy, until = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy / calls / 1e3


def chained(f: Callable, x: Any, following: Callable) -> Callable[[int], None]:
    """Return what calls an MLX function so many times, each on ``following`` of what it returned:
    MLX runs calls that do not wait for one another side by side."""
    import mlx.core as mx

    def run(calls: int) -> None:
        results, argument = [], x
        for _ in range(calls):
            results.append(f(argument))
            argument = following(results[-1])
        mx.eval(results)

    return run


def mlx_times(f: Callable, x: Any, following: Callable = lambda y: y) -> dict[str, float]:
    """Return the call and kernel times of an MLX function; ``following`` as in :func:`chained`."""
    import mlx.core as mx

    run = chained(f, x, following)
    calls = 100 if x.size < 2**20 else 16
    return {
        "call": call_ms(run, mx.synchronize, calls),
        "kernel": kernel_ms(run, mx.synchronize, calls),
    }


def torch_times(f: Callable, inputs: list, replay: bool = True) -> dict[str, float]:
    """Return the replay and kernel times of a PyTorch function over ready inputs, one by one.

    Without ``replay``, its plain calls: where kernels take so long that launches do not count.
    """
    import torch  # pyright: ignore[reportMissingImports]

    calls = 100 if inputs[0].numel() < 2**20 else 16
    f(inputs[0])
    torch.cuda.synchronize()
    if not replay:

        def plain(calls):
            for i in range(calls):
                f(inputs[i % len(inputs)])

        return {
            "call": call_ms(plain, torch.cuda.synchronize, calls),
            "kernel": kernel_ms(plain, torch.cuda.synchronize, calls),
        }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            f(inputs[i % len(inputs)])
    run = lambda _: graph.replay()  # noqa: E731
    return {
        "call": call_ms(run, torch.cuda.synchronize, 1) / calls,
        "kernel": kernel_ms(run, torch.cuda.synchronize, 1) / calls,
    }


def measure_layers() -> list[dict]:
    """Time forward products of a ``SIZE x SIZE`` weight in bfloat16."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    from mlx_sparse_nn import BlockSparseLinear, patterns

    results = []
    dense = nn.Linear(SIZE, SIZE)
    dense.set_dtype(mx.bfloat16)
    for n in ROWS:
        x = mx.random.normal((n, SIZE)).astype(mx.bfloat16)
        mx.eval(x, dense.parameters())
        txs = [torch.randn(n, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        tw = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
        row = {"rows": n, "mlx dense": mlx_times(dense, x)}
        row["torch dense"] = torch_times(lambda x: F.linear(x, tw), txs)  # noqa: B023
        results.append(row)
        print(row, flush=True)
        for block_size in BLOCK_SIZES:
            for density in DENSITIES:
                pattern = patterns.random(SIZE, SIZE, density, block_size, seed=1)
                layer = BlockSparseLinear(SIZE, SIZE, pattern)
                layer.set_dtype(mx.bfloat16)
                weight = layer.todense().astype(mx.float32)
                bias = layer.bias.astype(mx.float32)
                with mx.stream(mx.cpu if n == 1 else mx.gpu):
                    expected = x.astype(mx.float32) @ weight.T + bias
                worst = float(mx.abs(layer(x).astype(mx.float32) - expected).max())
                if not worst < 0.05:
                    raise SystemExit(f"wrong by {worst} at {n} rows, B = {block_size}, {density}")
                cell = {"rows": n, "block_size": block_size, "density": density, "error": worst}
                cell["ours"] = mlx_times(layer, x)
                if n < 4096:
                    cell["ours"]["call"], cell["dense call"] = calls_in_turns([layer, dense], x)
                if block_size in (32, 64) and density in (0.1, 0.5):
                    mask = pattern.tomask()[::block_size, ::block_size]
                    masked = layer.todense().T
                    if n >= block_size:
                        cell["mlx block_masked_mm"] = mlx_times(
                            lambda x: mx.block_masked_mm(x, masked, block_size, mask_rhs=mask.T),  # noqa: B023
                            x,
                        )
                blocks = torch.from_numpy(np.array(layer.weight.astype(mx.float32)))
                bsr = torch.sparse_bsr_tensor(
                    torch.from_numpy(pattern.indptr.astype(np.int64)),
                    torch.from_numpy(pattern.indices.astype(np.int64)),
                    blocks.to(torch.bfloat16),
                    size=(SIZE, SIZE),
                ).cuda()
                cell["torch bsr"] = torch_times(lambda x: F.linear(x, bsr), txs)  # noqa: B023
                results.append(cell)
                print(cell, flush=True)
    return results


def measure_training() -> list[dict]:
    """Time forward and both gradients at 4096 rows, dense and sparse.

    ``training`` is the three products: y, and the gradients of weight and x for a given one of y.
    ``step`` adds a loss and the gradient of the bias.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_sparse_nn import BlockSparseLinear, patterns

    x = mx.random.normal((4096, SIZE)).astype(mx.bfloat16)
    target = mx.random.normal((4096, SIZE)).astype(mx.bfloat16)
    mx.eval(x, target)

    def products(layer):
        weight = layer.weight

        def apply(weight, x):
            layer.weight = weight
            return layer(x)

        def run(x):
            outputs, gradients = mx.vjp(apply, [weight, x], [target])
            layer.weight = weight
            return *outputs, *gradients

        return run

    def step(layer):
        names = ["weight", "bias"]

        def loss(parameters, x):
            layer.update(parameters)
            return (layer(x) * target).sum()

        parameters = {name: layer[name] for name in names}
        loss_and_grads = mx.value_and_grad(loss, argnums=(0, 1))

        def run(x):
            results = loss_and_grads(parameters, x)
            layer.update(parameters)
            return results

        return run

    results = []
    layers: list[tuple[dict, Any]] = [({"layer": "dense"}, nn.Linear(SIZE, SIZE))]
    for block_size, density in ((16, 0.1), (32, 0.2), (64, 0.35), (128, 0.5), (64, 0.1)):
        pattern = patterns.random(SIZE, SIZE, density, block_size, seed=1)
        key = {"layer": "sparse", "block_size": block_size, "density": density}
        layers.append((key, BlockSparseLinear(SIZE, SIZE, pattern)))
    for key, layer in layers:
        layer.set_dtype(mx.bfloat16)
        mx.eval(layer.parameters())
        result = {
            **key,
            "forward": mlx_times(layer, x),
            "training": mlx_times(products(layer), x, following=lambda results: results[2]),
            "step": mlx_times(step(layer), x, following=lambda results: results[1][1]),
        }
        results.append(result)
        print(result, flush=True)
    return results


def measure_ising() -> list[dict]:
    """Time the Ising Hamiltonian times a vector, float32, beside cuSPARSE."""
    import mlx.core as mx
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]

    from mlx_sparse_nn import physics

    results = []
    for n in QUBITS:
        H = physics.transverse_field_ising(n, 0.7 / n, coupling=1 / n)  # |H| < 2
        psi = mx.random.normal((2**n,))
        mx.eval(psi, H.data)
        sparse = torch.sparse_csr_tensor(
            torch.from_numpy(H.pattern.indptr.copy()),
            torch.from_numpy(H.pattern.indices.copy()),
            torch.from_numpy(np.array(H.data)),
            size=H.shape,
        ).cuda()
        vectors = [torch.from_numpy(np.array(psi)).cuda()]
        error = np.abs(np.array(H @ psi) - (sparse @ vectors[0]).cpu().numpy()).max()
        if not error < 1e-3:
            raise SystemExit(f"Ising n = {n}: wrong by {error}")
        cell = {"qubits": n, "ours": mlx_times(lambda x: H @ x, psi)}  # noqa: B023
        cell["cusparse"] = torch_times(lambda x: sparse @ x, vectors)  # noqa: B023
        results.append(cell)
        print(cell, flush=True)
    return results


def graph(kind: str) -> tuple[Any, Any]:
    """Return ``indptr`` and ``indices`` of a square matrix: rows of equal lengths, or a power law.

    Of the power law, half of 10^6 rows have one value or two, the mean 7, and the longest 10^5.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    if kind == "equal":
        lengths = np.full(2**20, 16)
    else:
        n = 10**6
        lengths = rng.permutation(np.maximum(1, 1e5 / np.arange(1, n + 1) ** 0.8).astype(np.int64))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    columns = rng.integers(0, lengths.size, indptr[-1])
    order = np.argsort(np.repeat(np.arange(lengths.size), lengths) * lengths.size + columns)
    return indptr, columns[order]


def measure_graphs() -> list[dict]:
    """Time float32 graphs times columns, forward and with both gradients, beside cuSPARSE."""
    import mlx.core as mx
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]

    from mlx_sparse_nn import CSRPattern, spmm

    results = []
    for kind in ("equal", "power law"):
        indptr, indices = graph(kind)
        n, nnz = indptr.size - 1, indices.size
        pattern = CSRPattern(indptr, indices, (n, n))
        means = np.repeat(np.diff(indptr), np.diff(indptr))  # so that no product overflows
        values = (np.random.default_rng(1).random(nnz) / means).astype(np.float32)
        data = mx.array(values)
        rows, columns = (torch.from_numpy(a.astype(np.int32)) for a in (indptr, indices))
        sparse = torch.sparse_csr_tensor(rows, columns, torch.from_numpy(values), (n, n)).cuda()
        turned = sparse.to_sparse_coo().t().coalesce().to_sparse_csr()
        parts = turned.crow_indices().int(), turned.col_indices().int(), turned.values()
        transposed = torch.sparse_csr_tensor(*parts, (n, n))
        for p in COLUMNS:
            X, G = mx.random.normal((n, p)), mx.random.normal((n, p))
            mx.eval(X, G, data)
            tX, tG = (torch.from_numpy(np.array(a)).cuda() for a in (X, G))

            def product(data, X):
                return spmm(data, pattern, X.T).T  # noqa: B023

            def gradients(X):
                outputs, found = mx.vjp(product, [data, X], [G])  # noqa: B023
                return *outputs, *found

            def torch_gradients(X):
                y, d_X = sparse @ X, transposed @ tG  # noqa: B023
                return y, torch.sparse.sampled_addmm(sparse, tG, X.t(), beta=0.0), d_X  # noqa: B023

            y, d_data, d_X = (np.array(a) for a in gradients(X))
            ty, td_data, td_X = torch_gradients(tX)
            for ours, theirs in ((y, ty), (d_data, td_data.values()), (d_X, td_X)):
                error = np.abs(ours - theirs.cpu().numpy()).max()
                if not error < 1e-3:
                    raise SystemExit(f"{kind}, {p} columns: wrong by {error}")
            cell = {"graph": kind, "rows": n, "nnz": nnz, "longest": int(np.diff(indptr).max())}
            cell |= {"columns": p, "ours": mlx_times(lambda X: product(data, X), X)}  # noqa: B023
            cell["cusparse"] = torch_times(lambda X: sparse @ X, [tX], replay=False)  # noqa: B023
            cell["ours, gradients"] = mlx_times(gradients, X, following=lambda found: found[2])
            cell["cusparse, gradients"] = torch_times(torch_gradients, [tX], replay=False)
            results.append(cell)
            print(cell, flush=True)
    return results


def measure_blocks() -> list[dict]:
    """Time the three products of a ``SIZE x SIZE`` weight at 10%, of every block size that has
    tiles, beside the dense product: float32 by TF32, as MLX's own, and bfloat16."""
    import mlx.core as mx

    from mlx_sparse_nn import CSRArray, patterns, sddmm, spmm, spmm_t

    results = []
    for dtype in (mx.float32, mx.bfloat16):
        for n in SOME_ROWS:
            x = mx.random.normal((n, SIZE)).astype(dtype)
            w = (mx.random.normal((SIZE, SIZE)) / SIZE**0.5).astype(dtype)
            mx.eval(x, w)
            row = {"dtype": str(dtype).rpartition(".")[2], "rows": n}
            row["dense"] = busy_ms(lambda x: x @ w.T, x)  # noqa: B023
            for block_size in ALL_BLOCKS:
                pattern = patterns.random(SIZE, SIZE, 0.1, block_size, seed=1)
                data = mx.random.normal(pattern.data_shape) / (0.1 * SIZE) ** 0.5
                data = data.astype(dtype)
                masked = CSRArray(data, pattern).todense()
                products = {
                    "forward": lambda a: spmm(data, pattern, a),  # noqa: B023
                    "gradient of x": lambda a: spmm_t(data, pattern, a),  # noqa: B023
                }
                for name, weight in (("forward", masked.T), ("gradient of x", masked)):
                    difference = float(mx.abs(products[name](x) - x @ weight).max())
                    if not difference < 0.1:  # both round factors to TF32, or sums to bfloat16
                        raise SystemExit(f"{row}, B = {block_size}: {name} off by {difference}")
                times = {name: busy_ms(f, x) for name, f in products.items()}
                times["gradient of the weight"] = busy_ms(
                    lambda y: sddmm(pattern, y, x),  # noqa: B023
                    x,
                    following=lambda _: x,  # noqa: B023
                )
                row[str(block_size)] = times
            results.append(row)
            print(row, flush=True)
    return results


def busy_ms(f: Callable, x: Any, following: Callable = lambda y: y) -> float:
    """Return milliseconds a call of an MLX function in which the GPU is at work."""
    import mlx.core as mx

    return kernel_ms(chained(f, x, following), mx.synchronize, 8)


def blocks(rows: list[dict]) -> str:
    """Return the table of block sizes: how many times as fast as the dense product."""
    lines = [
        "| dtype | rows of x | MLX dense, ms | "
        + " | ".join(f"B = {b}" for b in ALL_BLOCKS)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(ALL_BLOCKS),
    ]
    for row in rows:
        cells = []
        for block_size in ALL_BLOCKS:
            times = row[str(block_size)]
            forward, mean = times["forward"], sum(times.values()) / 3
            cells.append(f"{row['dense'] / forward:.2f}, {row['dense'] / mean:.2f}")
        start = f"| {row['dtype']} | {row['rows']:,} | {row['dense']:.3f} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


def graphs(cells: list[dict]) -> str:
    """Return the table of graphs."""
    lines = [
        "| graph | longest row | columns | forward, ms | cuSPARSE | and gradients | cuSPARSE |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = ("ours", "cusparse", "ours, gradients", "cusparse, gradients")
    for c in cells:
        times = " | ".join(f"{c[kind]['kernel']:.3f}" for kind in kinds)
        lines.append(
            f"| {c['graph']}, {c['rows']:,} rows, {c['nnz'] / c['rows']:.0f} values a row "
            f"| {c['longest']:,} | {c['columns']} | {times} |"
        )
    return "\n".join(lines)


def table(results: dict) -> str:
    """Return the README's table."""
    lines = [
        "| B | density | kernel, ms | MLX dense | PyTorch BSR | layer call, ms | MLX dense |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cells = [c for c in results["layers"] if c["rows"] == 4096]
    dense = cells[0]["mlx dense"]
    for c in cells[1:]:
        lines.append(
            f"| {c['block_size']} | {c['density']:.0%} | {c['ours']['kernel']:.3f} "
            f"| {dense['kernel']:.3f} | {c['torch bsr']['kernel']:.3f} | {c['ours']['call']:.3f} "
            f"| {dense['call']:.3f} |"
        )
    lines.append(f"\n{results['device']}, bfloat16, 4096 x 4096 weight, 4096 rows of x.")
    return "\n".join(lines)


def aims(results: dict) -> str:
    """Return the table of what the kernels should reach, and what they do."""

    def cells(n):
        return [c for c in results["layers"] if c["rows"] == n and "block_size" in c]

    def dense(n):
        return next(c["mlx dense"] for c in results["layers"] if c["rows"] == n)

    def ratio(c):
        return c["torch bsr"]["kernel"] / c["ours"]["kernel"]

    many = {(c["block_size"], c["density"]): c for c in cells(4096)}
    ratios = [ratio(c) for c in many.values()]
    few = {
        n: [c for c in cells(n) if c["block_size"] >= 32 and c["density"] in (0.1, 0.2)]
        for n in (1, 16)
    }
    few_ratios = [ratio(c) for n in few for c in few[n]]
    own, trained = dense(4096)["kernel"], results["training"][0]
    forward = {
        (c["block_size"], c["density"]): c["forward"]["kernel"] for c in results["training"][1:]
    }
    rows = [
        (
            "4096 rows, kernel: 1.7 times PyTorch's BSR in the geometric mean, no cell slower",
            f"{statistics.geometric_mean(ratios):.2f}; {sum(r < 1 for r in ratios)} of "
            f"{len(ratios)} cells slower, the least at {min(ratios):.2f}",
        ),
        *(
            (
                f"4096 rows, kernel: faster than MLX dense at B = {b}, {d:.0%}",
                f"{forward[b, d]:.3f} ms, dense {own:.3f}",
            )
            for b, d in ((16, 0.1), (32, 0.2), (64, 0.35), (128, 0.5))
        ),
        (
            "4096 rows, kernel: 3.5 times faster than MLX dense at B = 64, 10%",
            f"{own / forward[64, 0.1]:.2f}",
        ),
        (
            "1 and 16 rows, B >= 32, 10 and 20%, kernel: 3 times PyTorch's BSR",
            f"{min(few_ratios):.1f} to {max(few_ratios):.1f}",
        ),
        *(
            (
                f"the same, {n} row{'s' * (n > 1)}: layer call below MLX dense's, in turns",
                f"{sum(c['ours']['call'] < c['dense call'] for c in few[n])} of {len(few[n])}; "
                f"{min(c['ours']['call'] for c in few[n]) * 1e3:.0f} to "
                f"{max(c['ours']['call'] for c in few[n]) * 1e3:.0f} us, "
                f"dense {min(c['dense call'] for c in few[n]) * 1e3:.0f} to "
                f"{max(c['dense call'] for c in few[n]) * 1e3:.0f}",
            )
            for n in few
        ),
        *(
            (
                f"training, B = {c['block_size']}, {c['density']:.0%}, kernels: "
                "within 3.2 forwards, below dense",
                f"{c['training']['kernel'] / c['forward']['kernel']:.2f} forwards, "
                f"{c['training']['kernel']:.3f} ms, dense {trained['training']['kernel']:.3f} "
                f"(whole steps {c['step']['kernel']:.3f}, dense {trained['step']['kernel']:.3f})",
            )
            for c in results["training"][1:]
        ),
        *(
            (
                f"Ising n = {c['qubits']}, kernel: 1.3 times cuSPARSE",
                f"{c['cusparse']['kernel'] / c['ours']['kernel']:.2f}; "
                f"{c['ours']['kernel']:.4f} ms",
            )
            for c in results["ising"]
        ),
    ]
    return "\n".join(["| aim | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def plot(results: dict) -> None:
    """Draw the speed-up over the dense layer against density, one line per block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    cells = [c for c in results["layers"] if c["rows"] == 4096]
    dense = cells[0]["mlx dense"]["kernel"]
    for axis, key, title in (
        (axes[0], "ours", "mlx_sparse_nn"),
        (axes[1], "torch bsr", "PyTorch BSR"),
    ):
        for block_size in BLOCK_SIZES:
            line = [c for c in cells[1:] if c["block_size"] == block_size]
            axis.plot(
                [c["density"] * 100 for c in line],
                [dense / c[key]["kernel"] for c in line],
                marker="o",
                label=f"B = {block_size}",
            )
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="density, %", xscale="log", yscale="log")
        axis.set_xticks([5, 10, 20, 50], labels=["5", "10", "20", "50"])
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], labels=["0.1", "0.2", "0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed-up over MLX dense (kernel)")
    axes[0].legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="only make table and plot")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="only tensor parallel FFNs, on N GPUs"
    )
    parser.add_argument(
        "--only", choices=["layers", "training", "ising", "graphs", "blocks"], action="append"
    )
    args = parser.parse_args()
    if args.readme:
        results = json.loads(RESULTS.read_text())
        write_table("gpu", table(results))
        write_table("gpu_aims", aims(results), "benchmarks/README.md")
        write_table("gpu_graphs", graphs(results.get("graphs", [])), "benchmarks/README.md")
        write_table("gpu_blocks", blocks(results.get("blocks", [])), "benchmarks/README.md")
        if "ranks" in results:
            write_table("gpu_ranks", ranks.table(results["ranks"]), "docs/distributed.md")
        plot(results)
        return
    if args.ranks:
        results = json.loads(args.output.read_text()) if args.output.exists() else {}
        results["ranks"] = ranks.measure_on(args.ranks)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        return
    import torch  # pyright: ignore[reportMissingImports]

    parts = {
        "layers": measure_layers,
        "training": measure_training,
        "ising": measure_ising,
        "graphs": measure_graphs,
        "blocks": measure_blocks,
    }
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, measure in parts.items():
        if args.only is None or name in args.only:
            results[name] = measure()
            args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
