"""PyTorch on the CPU: BSR for forward products of blocks, CSR for the rest, 32-bit indices.

Training is what a user can do by hand with a fixed pattern, which is faster than its autograd:
``A @ x``, the product with a transpose whose places were sorted once, and ``sampled_addmm`` at the
stored places. It has bfloat16 in none of these on the CPU.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np

from benchmarks.peers import Task, features_first, on_host, rows_first, stored_blocks, stored_values
from benchmarks.workloads import Array, Arrays, Build, Call, Ising, Workload, rows_of

# To a type checker `import torch` is this file, where PyTorch is not installed.
torch: Any = importlib.import_module("torch")

RUNTIME = on_host
PACKAGES = ("torch", "numpy")

warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
torch.sparse.check_sparse_tensor_invariants.disable()  # its default, which it warns about


def prepare(w: Workload, arrays: Arrays) -> Task | None:
    """Return the task in float32."""
    if isinstance(w, Call):
        return None
    if isinstance(w, Build):
        return build(w, arrays)
    if isinstance(w, Array | Ising):
        parts = tuple(arrays[name] for name in ("indptr", "indices", "data"))
        return product(parts, arrays["x"], arrays.get("target"), w.step, lambda a: a)
    if w.dtype != "float32":
        return None
    blocks = w.step == "forward" and w.block_size > 1
    parts = stored_blocks(arrays) if blocks else stored_values(arrays)
    x, target = features_first(arrays["x"]), features_first(arrays["target"])
    return product(parts, x, target, w.step, rows_first)


def tensor(indptr, indices, data, size: int):
    """Return a CSR or BSR tensor."""
    make = torch.sparse_csr_tensor if data.ndim == 1 else torch.sparse_bsr_tensor
    parts = (
        a if isinstance(a, torch.Tensor) else torch.from_numpy(a.copy())
        for a in (indptr, indices, data)
    )
    return make(*parts, size=(size, size))


def product(parts, x: np.ndarray, target: np.ndarray | None, step: str, rows) -> Task:
    size, columns = x.shape[0], torch.from_numpy(x.copy())
    indptr, indices, data = parts
    A = tensor(indptr, indices, data, size)
    if step == "forward":
        return Task(lambda _: [A @ columns], lambda out: [rows(out[0].numpy())])
    order = np.lexsort((rows_of(indptr), indices))
    t_indptr = np.searchsorted(indices[order], np.arange(size + 1)).astype(np.int32)
    t_indices = rows_of(indptr)[order].astype(np.int32)
    t_indptr, t_indices, order = map(torch.from_numpy, (t_indptr, t_indices, order))
    a_indptr, a_indices = A.crow_indices(), A.col_indices()
    assert target is not None
    values, ct = torch.from_numpy(data.copy()), torch.from_numpy(target.copy())
    matrix = lambda a: a if a.ndim == 2 else a[:, None]  # noqa: E731

    def run(_):
        A = tensor(a_indptr, a_indices, values, size)
        transposed = tensor(t_indptr, t_indices, values[order], size)
        gradient = torch.sparse.sampled_addmm(A, matrix(ct), matrix(columns).T, beta=0.0)
        return [A @ columns, gradient.values(), transposed @ ct]

    def convert(out):
        y, of_data, of_x = (a.numpy() for a in out)
        return [rows(y), of_data, rows(of_x)]

    return Task(run, convert)


def build(w: Build, arrays: Arrays) -> Task:
    def parts(A):
        return [A.crow_indices(), A.col_indices(), A.values().reshape(-1)]

    def convert(out):
        return [a.numpy() for a in out]

    if w.what == "from coordinates":
        places = torch.from_numpy(np.stack([arrays["row"], arrays["col"]]).astype(np.int64))
        data, size = torch.from_numpy(arrays["data"].copy()), (w.size, w.size)
        return Task(
            lambda _: parts(torch.sparse_coo_tensor(places, data, size).to_sparse_csr()), convert
        )
    if w.what == "from dense":
        weight, block = torch.from_numpy(arrays["weight"].copy()), w.block_size
        if block == 1:
            return Task(lambda _: parts(weight.to_sparse_csr()), convert)
        return Task(lambda _: parts(weight.to_sparse_bsr((block, block))), convert)
    names = ("indptr", "indices", "data")
    indptr, indices, data = (torch.from_numpy(arrays[name].copy()) for name in names)
    make = lambda: tensor(indptr, indices, data, w.size)  # noqa: E731
    if w.what == "transpose":
        return Task(lambda A: parts(A.t().to_sparse_csr()), convert, make)
    x = torch.from_numpy(arrays["x"].copy())
    return Task(lambda _: [make() @ x], convert)
