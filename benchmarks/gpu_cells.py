"""Measure CUDA kernels between the points that ``gpu.py`` has: many sizes, dtypes, shapes and rows.

Several processes compile and check kernels at once, which takes most of the time; one at a time
measures. All times are milliseconds in which the GPU is at work, as ``gpu.kernel_ms`` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, NamedTuple

SIZE = 4096
ROWS = (17, 64, 128, 256, 512, 1024, 2048)
BSR_BLOCKS = (16, 32, 64, 128)
ALL_BLOCKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SOME_BLOCKS = (8, 16, 32, 64, 128)
ALL_ROWS = (17, 64, 256, 1024, 4096)
SOME_ROWS = (64, 1024, 4096)
SHAPES = ((11008, 4096), (4096, 11008), (1024, 8000))  # outputs, inputs
QUANTIZED_ROWS = (1, 4, 8, 17, 64, 256, 4096)
PRODUCTS = ("forward", "gradient of x", "gradient of the weight")


class Task(NamedTuple):
    """What one process measures: a pattern in a dtype, times several numbers of rows of x."""

    kind: str  # "rows", "blocks" or "quantized"
    dtype: str  # "float32 (TF32)" and "float32" are MLX with and without MLX_ENABLE_TF32
    shape: tuple[int, int]  # outputs, inputs
    block_size: int
    density: float
    rows: tuple[int, ...]
    bits: int = 0  # of quantized blocks


def rows_tasks() -> list[Task]:
    """Return those beside PyTorch's BSR, from a few rows to many."""
    return [
        Task("rows", "bfloat16", (SIZE, SIZE), block_size, density, ROWS)
        for block_size in BSR_BLOCKS
        for density in (0.1, 0.5)
    ]


def blocks_tasks() -> list[Task]:
    """Return those of every block size, dtype and product at density 0.1, beside the dense one."""
    square = (SIZE, SIZE)
    every = [
        Task("blocks", dtype, square, block_size, 0.1, ALL_ROWS)
        for dtype in ("bfloat16", "float32 (TF32)")
        for block_size in ALL_BLOCKS
    ]
    others = [
        Task("blocks", dtype, square, block_size, 0.1, SOME_ROWS)
        for dtype in ("float32", "float16")
        for block_size in SOME_BLOCKS
    ]
    shapes = [
        Task("blocks", dtype, shape, block_size, 0.1, (64, 4096))
        for dtype in ("bfloat16", "float32 (TF32)")
        for shape in SHAPES
        for block_size in SOME_BLOCKS
    ]
    return every + others + shapes


def quantized_tasks() -> list[Task]:
    """Return those of quantized blocks, beside blocks of bfloat16 and MLX's dense layer."""
    return [
        Task("quantized", "bfloat16", (SIZE, SIZE), block_size, density, QUANTIZED_ROWS, bits)
        for block_size in (32, 64, 128)
        for density in (0.1, 0.5)
        for bits in (4, 8)
    ]


def measure(tasks: list[Task], jobs: int) -> list[dict]:
    """Return a cell for each task and number of rows; ``jobs`` processes compile at once.

    Raises:
        SystemExit: A product is wrong. All others have been printed.
    """
    cells: list[dict] = []
    for true_float32 in (False, True):
        mine = [task for task in tasks if (task.dtype == "float32") == true_float32]
        os.environ["MLX_ENABLE_TF32"] = str(int(not true_float32))  # read by the processes' MLX
        context = get_context("spawn")
        with context.Pool(jobs, _begin, [context.Lock()], maxtasksperchild=4) as pool:
            for found in pool.imap_unordered(_measure, mine):
                cells += found
                for cell in found:
                    print(cell, flush=True)
    if wrong := [cell for cell in cells if cell["wrong"]]:
        raise SystemExit("\n".join(f"{_task_of(c)}, {c['rows']} rows: {c['wrong']}" for c in wrong))
    order = [task._replace(rows=()) for task in tasks]
    return sorted(cells, key=lambda cell: (order.index(_task_of(cell)), cell["rows"]))


def _task_of(cell: dict) -> Task:
    fields = {name: cell[name] for name in Task._fields}
    return Task(**fields | {"shape": tuple(cell["shape"]), "rows": ()})


_lock: Any = None


def _begin(lock: Any) -> None:
    global _lock
    _lock = lock


def _measure(task: Task) -> list[dict]:
    import mlx.core as mx

    from mlx_sparse_nn import patterns

    pattern = patterns.random(*task.shape, task.density, task.block_size, seed=1)
    dtype = getattr(mx, task.dtype.split()[0])
    run = {"rows": _rows, "blocks": _blocks, "quantized": _quantized}[task.kind]
    cells = []
    for n, wrong, timed in run(task, pattern, dtype):
        cell = task._asdict() | {"rows": n, "wrong": wrong}
        for name, f, x in timed:  # each is compiled here, before anybody waits for its times
            try:
                f(x)
            except RuntimeError as error:  # MLX's own kernels may not compile on a machine
                cell[name] = None
                print(f"{task}, {n} rows: {name}: {str(error)[:200]}", flush=True)
        with _lock:
            for name, f, x in timed:
                if name not in cell:
                    cell[name] = _busy_ms(f, x)
        cells.append(cell)
    return cells


def _busy_ms(f: Callable, x: Any) -> float:
    from gpu import kernel_ms

    def run(calls: int) -> None:
        for _ in range(calls):
            f(x)

    return kernel_ms(run, lambda: None, 8)


def _evaluated(f: Callable) -> Callable:
    """Return an MLX function that computes before it returns."""
    import mlx.core as mx

    def run(x):
        mx.eval(f(x))
        mx.synchronize()

    return run


def _off(found: Any, expected: Any) -> list[float]:
    """Return by how much a product is off, if it is wrong."""
    import mlx.core as mx

    worst = float(mx.abs(found.astype(mx.float32) - expected.astype(mx.float32)).max())
    return [] if worst < 0.1 else [worst]  # both round factors to TF32, or sums to 16 bits


def _data(pattern: Any, dtype: Any) -> Any:
    """Return values so that the products of x have about its size."""
    import mlx.core as mx

    length = max(1.0, pattern.nnz / pattern.shape[0])
    return (mx.random.normal(pattern.data_shape) / length**0.5).astype(dtype)


def _blocks(task: Task, pattern: Any, dtype: Any):
    import mlx.core as mx

    from mlx_sparse_nn import CSRArray, sddmm, spmm, spmm_t

    data = _data(pattern, dtype)
    w = CSRArray(data, pattern).todense()
    n_out, n_in = task.shape
    for n in task.rows:
        x, y = (mx.random.normal((n, size)).astype(dtype) for size in (n_in, n_out))
        mx.eval(x, y, w)
        wrong = _off(spmm(data, pattern, x), x @ w.T) + _off(spmm_t(data, pattern, y), y @ w)
        scaled = y * n**-0.5
        dense = CSRArray(sddmm(pattern, scaled, x), pattern).todense()
        wrong += _off(dense, mx.where(w == 0, 0, scaled.T @ x))
        yield (
            n,
            wrong,
            [
                ("dense " + PRODUCTS[0], _evaluated(lambda x: x @ w.T), x),
                ("dense " + PRODUCTS[1], _evaluated(lambda y: y @ w), y),
                ("dense " + PRODUCTS[2], _evaluated(lambda x: y.T @ x), x),  # noqa: B023
                (PRODUCTS[0], _evaluated(lambda x: spmm(data, pattern, x)), x),
                (PRODUCTS[1], _evaluated(lambda y: spmm_t(data, pattern, y)), y),
                (PRODUCTS[2], _evaluated(lambda x: sddmm(pattern, y, x)), x),  # noqa: B023
            ],
        )


def _rows(task: Task, pattern: Any, dtype: Any):
    import mlx.core as mx
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    from mlx_sparse_nn import CSRArray, spmm

    data = _data(pattern, dtype)
    w = CSRArray(data, pattern).todense()
    bsr = torch.sparse_bsr_tensor(
        torch.from_numpy(pattern.indptr.astype(np.int64)),
        torch.from_numpy(pattern.indices.astype(np.int64)),
        torch.from_numpy(np.array(data.astype(mx.float32))).to(torch.bfloat16),
        size=task.shape,
    ).cuda()

    def multiply(x):
        F.linear(x, bsr)
        torch.cuda.synchronize()

    for n in task.rows:
        x = mx.random.normal((n, task.shape[1])).astype(dtype)
        mx.eval(x, w)
        yield (
            n,
            _off(spmm(data, pattern, x), x @ w.T),
            [
                ("dense", _evaluated(lambda x: x @ w.T), x),
                ("bsr", multiply, torch.randn(*x.shape, device="cuda", dtype=torch.bfloat16)),
                ("ours", _evaluated(lambda x: spmm(data, pattern, x)), x),
            ],
        )


def _quantized(task: Task, pattern: Any, dtype: Any):
    import mlx.core as mx

    from mlx_sparse_nn import CSRArray, qspmm, spmm

    group_size = min(64, task.block_size)
    data = _data(pattern, dtype)
    stored = mx.quantize(data, group_size=group_size, bits=task.bits)
    data = mx.dequantize(*stored, group_size=group_size, bits=task.bits)
    w = CSRArray(data, pattern).todense()
    dense = mx.quantize(w, group_size=64, bits=task.bits)

    def dense_layer(x):
        return mx.quantized_matmul(x, *dense, group_size=64, bits=task.bits)

    for n in task.rows:
        x = mx.random.normal((n, task.shape[1])).astype(dtype)
        mx.eval(x, w, stored, dense)
        yield (
            n,
            _off(qspmm(*stored, pattern, x), x @ w.T),
            [
                ("dense", _evaluated(dense_layer), x),
                ("blocks", _evaluated(lambda x: spmm(data, pattern, x)), x),
                ("ours", _evaluated(lambda x: qspmm(*stored, pattern, x)), x),
            ],
        )
