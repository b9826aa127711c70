"""What standard workloads cost in counts, which no machine changes: a check against regressions.

``counts.json`` holds, for each workload: the operations in the graph of plain MLX on the CPU, the
peak of memory there in kilobytes, and the kernels launched on a GPU. After a change that is meant,
``PYTHONPATH=tests MLX_ENABLE_TF32=0 python tests/backends/test_counts.py`` writes it again, and its
diff shows what the change does. A peak is written when it has changed by a quarter: it is a median,
since it depends on when MLX's threads come to free memory.
"""

import io
import json
import re
import statistics
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from support import computing, fresh_launches, pattern_of

from mlx_sparse_nn import BlockSparseLinear, csr_array, physics
from mlx_sparse_nn.core.backends import cuda, cuda_tiles, launch, metal, plain, schedule

RECORD = Path(__file__).with_name("counts.json")
SLACK = 1.25  # of the peak
LEAST = 200  # kilobytes, up to which no peak is of interest


def layer(block_size, rows, dtype=mx.float32, training=False, size=512):
    """A layer's forward product, or that and all gradients; block-rows of two lengths."""
    n = size // block_size
    rng = np.random.default_rng(0)
    columns = [np.sort(rng.permutation(n)[: max(1, n // 8) + row % 2]) for row in range(n)]
    module = BlockSparseLinear(size, size, pattern_of(columns, n, block_size))
    module.set_dtype(dtype)
    x = mx.ones((rows, size), dtype)
    mx.eval(module.parameters(), module.state, x)
    if not training:
        return lambda: [module(x)]

    def loss(parameters, x):
        module.update(parameters)
        return module(x).sum()

    parameters = module.trainable_parameters()
    step = mx.grad(loss, argnums=(0, 1))

    def run():
        gradients, of_x = step(parameters, x)
        module.update(parameters)
        return [*gradients.values(), of_x]

    return run


def array(rows):
    """An unstructured sparse array times dense columns."""
    rng = np.random.default_rng(1)
    dense = (rng.random((300, 200)) < 0.1 * rng.random((300, 1)) * 2).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum((dense != 0).sum(axis=1))])
    A = csr_array((dense[dense != 0], np.nonzero(dense)[1], indptr), shape=dense.shape)
    x = mx.ones((200, rows))
    mx.eval(A.data, x)
    return lambda: [A @ x]


def ising(n):
    """The Ising Hamiltonian times a state."""
    H, psi = physics.transverse_field_ising(n, 0.7), mx.ones(2**n)
    mx.eval(H.data, psi)
    return lambda: [H @ psi]


WORKLOADS = {
    "layer, blocks of 32, 1 row": lambda: layer(32, 1),
    "layer, blocks of 32, 256 rows": lambda: layer(32, 256),
    "layer, blocks of 32, 256 rows, bfloat16": lambda: layer(32, 256, mx.bfloat16),
    "layer, blocks of 32, 256 rows, training": lambda: layer(32, 256, training=True),
    "layer, blocks of 32, 256 rows, training, bfloat16": lambda: layer(
        32, 256, mx.bfloat16, training=True
    ),
    "layer, blocks of 8, 64 rows, training": lambda: layer(8, 64, training=True),
    "layer, scalars, 64 rows, training": lambda: layer(1, 64, training=True, size=128),
    "array, 1 column": lambda: array(1),
    "array, 16 columns": lambda: array(16),
    "Ising, 8 sites": lambda: ising(8),
    "Ising, 16 sites": lambda: ising(16),
}


def count(workload):
    """Return what ``counts.json`` holds of a workload."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    helper = [mx.new_thread_local_stream(mx.cpu)]
    try:
        with ExitStack() as stack:  # two streams, on any machine
            stack.enter_context(computing(plain))
            stack.enter_context(mock.patch.object(schedule, "_n_streams", return_value=2))
            stack.enter_context(mock.patch.object(schedule, "_more_streams", return_value=helper))
            run = workload()
            for _ in range(3):
                mx.eval(run())  # a pattern is laid out when it is first used
            text = io.StringIO()
            mx.export_to_dot(text, *run())
            operations = len(re.findall("shape=rectangle", text.getvalue()))
            peaks = [peak_memory(run, helper) for _ in range(15)]
        launches = {backend: launched(backend, run) for backend in ("metal", "cuda")}
    finally:
        mx.set_default_device(before)
    return {"operations": operations, "peak_kB": statistics.median(peaks) // 1000, **launches}


def peak_memory(run, streams):
    """Return bytes that one call takes beyond what is there before it."""
    mx.synchronize()
    for stream in streams:
        mx.synchronize(stream)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


def launched(backend, run):
    """Return how often a call launches each kernel of a backend that is not there."""
    with no_gpu(backend) as names:
        run()
    return dict(sorted(Counter(names).items()))


@contextmanager
def no_gpu(backend):
    """Note the name of each kernel that is launched, and launch nothing."""
    names = []

    def kernel(backend, name, *others):
        def call(inputs, template, output_shapes, output_dtypes, grid, threadgroup):
            names.append(name)
            return [mx.zeros(output_shapes[0], output_dtypes[0])]

        return call

    with ExitStack() as stack:
        stack.enter_context(fresh_launches())
        stack.enter_context(computing({"metal": metal, "cuda": cuda}[backend], plain))
        stack.enter_context(mock.patch.object(launch, "_function", kernel))
        stack.enter_context(mock.patch.object(cuda_tiles, "architecture", return_value="sm_90"))
        yield names


@cache
def counted(name):
    return count(WORKLOADS[name])


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_workload_takes_other_operations(name):
    entries = counted(name), json.loads(RECORD.read_text())[name]
    actual, expected = ({**entry, "peak_kB": None} for entry in entries)
    assert actual == expected, "if this change is meant, this file says how to note it"


@pytest.mark.skipif(
    mx.cuda.is_available(), reason="MLX for CUDA counts whole pages of memory, on the CPU too"
)
@pytest.mark.parametrize("name", WORKLOADS)
def test_no_workload_takes_more_memory(name):
    peak, before = (
        entry["peak_kB"] for entry in (counted(name), json.loads(RECORD.read_text())[name])
    )
    assert peak <= max(LEAST, SLACK * before), f"{name} takes {peak} kB of memory, {before} before"


def test_every_workload_is_recorded():
    assert list(json.loads(RECORD.read_text())) == list(WORKLOADS)


def renew():
    """Write ``counts.json``, and leave the peaks that are about what they were."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    counts = {name: count(workload) for name, workload in WORKLOADS.items()}
    for name, entry in counts.items():
        before = record.get(name, {}).get("peak_kB", 0)
        if before / SLACK < entry["peak_kB"] < before * SLACK:
            entry["peak_kB"] = before
    RECORD.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    renew()
