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

Adds what it measured to ``benchmarks/results/gpu_<card>.json`` (or ``--output``); with ``--readme``
alone it makes tables and the plot from these files. ``--ranks 2`` adds tensor parallel FFNs on two
GPUs, and measures nothing else; see ``ranks.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cells
import gpu_report
import ranks

SIZE = 4096
ROWS = (1, 16, 4096)
BLOCK_SIZES = (16, 32, 64, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.5)
QUBITS = (16, 20, 24)
COLUMNS = (1, 4, 16, 64)  # of X, beside a graph


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="only make tables and the plot")
    parser.add_argument("--output", type=Path, help="default: results/gpu_<card>.json")
    parser.add_argument("--only", choices=list(PARTS), action="append", default=[])
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="only tensor parallel FFNs, on N GPUs"
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile at once")
    args = parser.parse_args()
    if args.readme:
        gpu_report.write()
        return
    if args.ranks:
        found = ranks.measure_on(args.ranks)
        output = args.output or gpu_report.results_of(found["device"])
        results = json.loads(output.read_text()) if output.exists() else {}
        results |= {"device": found["device"], "ranks": found["ffn"]}
        output.write_text(json.dumps(results, indent=1) + "\n")
        return
    import torch  # pyright: ignore[reportMissingImports]

    card = torch.cuda.get_device_name()
    output = args.output or gpu_report.results_of(card)
    results = json.loads(output.read_text()) if output.exists() else {}
    results["device"] = card
    for name in args.only or PARTS:
        results[name] = PARTS[name](args.jobs)
        output.write_text(json.dumps(results, indent=1) + "\n")


PARTS: dict[str, Callable[[int], list[dict]]] = {
    "layers": lambda _: measure_layers(),
    "training": lambda _: measure_training(),
    "ising": lambda _: measure_ising(),
    "graphs": lambda _: measure_graphs(),
    "rows": lambda jobs: gpu_cells.measure(gpu_cells.rows_tasks(), jobs),
    "blocks": lambda jobs: gpu_cells.measure(gpu_cells.blocks_tasks(), jobs),
    "quantized": lambda jobs: gpu_cells.measure(gpu_cells.quantized_tasks(), jobs),
}


if __name__ == "__main__":
    main()
