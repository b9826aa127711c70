"""SciPy: BSR for blocks, CSR for the rest. It has no product for the gradient of stored values."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from benchmarks.peers import Task, features_first, on_host, rows_first, stored_blocks
from benchmarks.workloads import Arrays, Build, Call, Layer, Workload

RUNTIME = on_host
PACKAGES = ("scipy", "numpy")


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task of a forward product in float32, or of building."""
    if isinstance(w, Call):
        return None
    if isinstance(w, Build):
        return build(w, arrays)
    if w.step != "forward":
        return None
    if not isinstance(w, Layer):
        A = csr(arrays)
        return Task(lambda _: [A @ arrays["x"]], lambda out: out)
    if w.dtype != "float32":
        return None
    if w.block_size == 1:
        A = sparse.csr_array(arrays["weight"])
    else:
        indptr, indices, blocks = stored_blocks(arrays)
        A = sparse.bsr_array((blocks, indices, indptr), shape=arrays["weight"].shape)
    x = features_first(arrays["x"])
    return Task(lambda _: [A @ x], lambda out: [rows_first(out[0])])


def csr(arrays: Arrays):
    parts = tuple(arrays[name] for name in ("data", "indices", "indptr"))
    return sparse.csr_array(parts, shape=(arrays["indptr"].size - 1,) * 2)


def build(w: Build, arrays: Arrays) -> Task:
    def parts(A):
        A.sort_indices()
        return [A.indptr, A.indices, A.data.reshape(-1)]

    def convert(out):
        return [np.asarray(a) for a in out]

    if w.what == "from coordinates":
        triplets = (arrays["data"], (arrays["row"], arrays["col"]))
        shape = (w.size, w.size)
        return Task(lambda _: parts(sparse.coo_array(triplets, shape=shape).tocsr()), convert)
    if w.what == "from dense":
        weight, block = arrays["weight"], w.block_size
        if block == 1:
            return Task(lambda _: parts(sparse.csr_array(weight)), convert)
        return Task(lambda _: parts(sparse.bsr_array(weight, blocksize=(block, block))), convert)
    if w.what == "transpose":
        return Task(lambda A: parts(A.T.tocsr()), convert, lambda: csr(arrays))
    return Task(lambda _: [csr(arrays) @ arrays["x"]], convert)
