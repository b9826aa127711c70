"""mlx_sparse_nn."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from benchmarks.peers import Task, on_mlx, stored_blocks
from benchmarks.workloads import Array, Arrays, Build, Call, Ising, Layer, Workload
from mlx_sparse_nn import BlockSparseLinear, CSRArray, CSRPattern, coo_array, csr_array, from_dense
from mlx_sparse_nn.core.backends import choose

RUNTIME = on_mlx
PACKAGES = ("mlx-sparse-nn", *on_mlx.PACKAGES)


def describe() -> dict[str, str]:
    """Name the backends that compute, the first one first."""
    on_gpu = mx.default_device().type == mx.gpu
    backends = choose.GPU if on_gpu else choose.CPU
    return {"backends": ", ".join(b.NAME for b in backends if b.is_available())}


def prepare(w: Workload, arrays: Arrays) -> Task:
    """Return the task: every workload has one."""
    if isinstance(w, Call):
        return on_mlx.calls(call(w, arrays), arrays)
    if isinstance(w, Layer):
        return layer(w, arrays)
    if isinstance(w, Array | Ising):
        pattern = scalars(arrays)
        return on_mlx.csr_product(arrays, w.step, lambda data, x: CSRArray(data, pattern) @ x)
    return build(w, arrays)


def scalars(arrays: Arrays) -> CSRPattern:
    shape = (arrays["indptr"].size - 1,) * 2
    return CSRPattern(arrays["indptr"], arrays["indices"], shape)


def call(w: Call, arrays: Arrays) -> Callable[[mx.array], mx.array]:
    """Return what is called: a layer, or ``A @ x``."""
    of = w.operands
    if isinstance(of, Layer):
        size = (of.features, of.features)
        return BlockSparseLinear(*size, CSRPattern(*stored_blocks(arrays)[:2], size, of.block_size))
    A = CSRArray(mx.array(arrays["data"]), scalars(arrays))
    return lambda x: A @ x


def layer(w: Layer, arrays: Arrays) -> Task:
    indptr, indices, blocks = stored_blocks(arrays)
    size = (w.features, w.features)
    pattern = CSRPattern(indptr, indices, size, w.block_size)
    module = BlockSparseLinear(*size, pattern, bias=False)

    def hold(weight):
        module.weight = weight
        return module

    def stored(gradient):
        dense = np.zeros(size, np.float32)
        n, block = w.features // w.block_size, w.block_size
        view = dense.reshape(n, block, n, block).swapaxes(1, 2)
        view[np.nonzero(arrays["mask"])] = gradient.reshape(-1, block, block)
        return dense[arrays["weight"] != 0]

    return on_mlx.layer(w, arrays, hold, blocks.reshape(pattern.data_shape), stored)


def build(w: Build, arrays: Arrays) -> Task:
    def parts(A):
        return [A.pattern.indptr, A.pattern.indices, A.data]

    def convert(out):
        return [on_mlx.numpy(a).reshape(-1) for a in out]

    if w.what == "from coordinates":
        data, row, col = (arrays[name] for name in ("data", "row", "col"))
        shape = (w.size, w.size)
        return Task(lambda _: parts(coo_array((data, (row, col)), shape).tocsr()), convert)
    if w.what == "from dense":
        weight = mx.array(arrays["weight"])
        return Task(lambda _: parts(from_dense(weight, w.block_size)), convert)

    def make():
        csr = arrays["data"], arrays["indices"], arrays["indptr"]
        return csr_array(csr, shape=(w.size, w.size))

    if w.what == "transpose":
        return Task(lambda A: parts(A.T), convert, make)
    x = mx.array(arrays["x"])
    return Task(lambda _: [make() @ x], convert)
