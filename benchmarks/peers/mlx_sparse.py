"""mlx-sparse: native CSR of scalars. Its products take features first; it gets them so."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.peers import Task, features_first, on_mlx, rows_first, stored_values
from benchmarks.workloads import Array, Arrays, Build, Call, Ising, Layer, Workload

# To a type checker `import mlx_sparse` is this file, where mlx-sparse is not installed.
ms: Any = importlib.import_module("mlx_sparse")

RUNTIME = on_mlx
PACKAGES = ("mlx-sparse", *on_mlx.PACKAGES)
DTYPES = ("float32", "bfloat16", "float16")


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task, but of blocks."""
    (ms.use_cpu if mx.default_device().type == mx.cpu else ms.use_gpu)()
    if isinstance(w, Call):
        return None if isinstance(w.operands, Layer) else call(arrays)
    if isinstance(w, Layer):
        return layer(w, arrays) if w.dtype in DTYPES else None
    if isinstance(w, Array | Ising):
        of = matrix(arrays["indptr"], arrays["indices"], arrays["indptr"].size - 1)
        return on_mlx.csr_product(arrays, w.step, lambda data, x: of(data) @ x)
    return build(w, arrays)


def call(arrays: Arrays) -> Task:
    parts = tuple(mx.array(arrays[name]) for name in ("data", "indices", "indptr"))
    mx.eval(parts)
    A = ms.csr_array(parts, (arrays["x"].shape[0],) * 2, canonical=True)
    return on_mlx.calls(lambda x: A @ x, arrays)


def matrix(indptr: np.ndarray, indices: np.ndarray, size: int):
    """Return A as a function of stored values."""
    parts = mx.array(indices), mx.array(indptr)
    mx.eval(parts)
    return lambda data: ms.csr_array((data, *parts), (size, size), canonical=True)


def layer(w: Layer, arrays: Arrays) -> Task:
    indptr, indices, values = stored_values(arrays)
    first = {name: features_first(arrays[name]) for name in ("x", "target")}
    of = matrix(indptr, indices, w.features)

    def hold(data):
        A = of(data)
        return lambda x: A @ x

    task = on_mlx.layer(w, first, hold, values, lambda gradient: gradient)

    def convert(out):
        y, *gradients = task.convert(out)
        return [rows_first(y), *gradients[:1], *(rows_first(a) for a in gradients[1:])]

    return Task(task.run, convert)


def build(w: Build, arrays: Arrays) -> Task | None:
    shape = (w.size, w.size)

    def parts(A):
        return [A.indptr, A.indices, A.data]

    def convert(out):
        return [on_mlx.numpy(a) for a in out]

    if w.what == "from coordinates":
        data, row, col = (arrays[name] for name in ("data", "row", "col"))

        def make_coo(_):
            return parts(ms.coo_array((data, (row, col)), shape).tocsr(canonical=True))

        return Task(make_coo, convert)
    if w.what == "from dense":
        if w.block_size > 1:
            return None
        weight = mx.array(arrays["weight"])
        return Task(lambda _: parts(ms.from_dense(weight)), convert)

    def make():
        csr = tuple(arrays[name] for name in ("data", "indices", "indptr"))
        return ms.csr_array(csr, shape, canonical=True)

    if w.what == "transpose":
        return Task(lambda A: parts(A.T), convert, make)
    x = mx.array(arrays["x"])
    return Task(lambda _: [make() @ x], convert)
