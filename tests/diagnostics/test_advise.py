"""advise: what it times, that it checks first, and what it says."""

import importlib
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import backend, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.core.backends import cuda
from mlx_sparse_nn.diagnostics.advise import AdviceReport, MethodTiming, advise
from mlx_sparse_nn.layers.dense_twin import dense_twin

ADVISE = importlib.import_module("mlx_sparse_nn.diagnostics.advise")
PRODUCTS = ["forward", "input gradient", "weight gradient", "bias gradient"]
METHODS = ["sparse", "mx.block_masked_mm", "dense"]
QUANTIZED_METHODS = ["sparse", "nn.QuantizedLinear", "dense"]


def advice(**seconds):
    """Return an AdviceReport of made-up times: ``task_rows=(sparse, masked, dense)``."""
    timings = [
        MethodTiming(task.replace("step", "training step"), int(rows), method, s, s, s, 1)
        for key, times in seconds.items()
        for task, rows in [key.split("_")]
        for method, s in zip(METHODS, times, strict=True)
        if s is not None
    ]
    cuda, plain = ["cuda"] * 3, ["cuda", "cuda", "plain"]
    backends = {
        n: dict(zip(PRODUCTS, [*computed, "mlx"], strict=True))
        for n, computed in ((1, cuda), (64, cuda), (256, plain))
    }
    left_out = {"16 rows": "1 s were over"}
    return AdviceReport("layer", "Device(cpu, 0)", backends, tuple(timings), left_out)


def unwrapped(lines):
    """Return sentences that the report has wrapped as one line."""
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("bias", [False, True])
def test_it_times_three_methods_at_two_tasks(bias):
    layer = BlockSparseLinear(64, 96, density=0.5, bias=bias)
    before = dict(layer)
    began = time.perf_counter()
    found = advise(layer, (3, 1), seconds=60)  # a GPU compiles its kernels in that time
    took = time.perf_counter() - began
    assert [(t.task, t.rows, t.method) for t in found.timings] == [
        (task, rows, method)
        for task in ("forward", "training step")
        for rows in (3, 1)
        for method in METHODS
    ]
    for timing in found.timings:
        assert 0 < timing.fastest <= timing.seconds <= timing.slowest < took
        assert timing.samples in range(1, 10)
    assert found.left_out == {}
    times = found.seconds("forward", 3)
    assert sorted(times) == sorted(METHODS)
    assert list(times.values()) == sorted(times.values())
    assert dict(layer).keys() == before.keys()
    assert all(dict(layer)[name] is value for name, value in before.items())
    lines = repr(found).splitlines()
    assert lines[0].startswith("BlockSparseLinear(input_dims=64, output_dims=96")
    (at,) = [i for i, line in enumerate(lines) if line.startswith("task")]
    assert lines[at].split() == ["task", "rows", *METHODS, "fastest"]
    assert [line[:7] for line in lines[at + 1 : at + 5]] == ["forward"] * 2 + ["trainin"] * 2
    assert unwrapped(lines[at + 5 :]).startswith(
        " ".join([*found.sentences(), "sparse at 3 and 1 rows: forward, "])
    )
    assert set(found.backends) == {3, 1}
    assert all(list(found.backends[n]) == PRODUCTS[: 3 + bias] for n in (3, 1))


@pytest.mark.parametrize(
    ("block_size", "dtype", "reason"),
    [
        (16, mx.float32, "it takes block_size 32 and 64, not 16"),
        (32, mx.bfloat16, "on the CPU it takes float32, not mlx.core.bfloat16"),
        (32, mx.float64, "on the CPU it takes float32, not mlx.core.float64"),
    ],
)
def test_where_masks_do_not_fit_it_says_why(block_size, dtype, reason):
    with mx.stream(mx.cpu):
        layer = BlockSparseLinear(64, 64, block_size=block_size, density=0.5)
        layer.set_dtype(dtype)
        found = advise(layer, [2], seconds=0.1)
    assert found.left_out == {"mx.block_masked_mm": reason}
    assert {t.method for t in found.timings} == {"sparse", "dense"}
    assert repr(found).endswith(f"Not timed: mx.block_masked_mm, since {reason}.")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_quantized_layer_beside_the_dense_quantized_one(dtype):
    layer = BlockSparseLinear(64, 96, density=0.5).to_quantized(bits=8)
    layer.set_dtype(dtype)
    found = advise(layer, [4], seconds=60)
    not_timed = set(found.left_out)
    assert not_timed <= ({"nn.QuantizedLinear"} if dtype != mx.float32 else set())
    assert [(t.task, t.method) for t in found.timings] == [
        (task, method)
        for task in ("forward", "training step")
        for method in QUANTIZED_METHODS
        if method not in not_timed
    ]
    assert list(found.backends[4]) == ["forward", "input gradient", "bias gradient"]


def test_the_dense_quantized_twin_holds_the_same_weight():
    layer = BlockSparseLinear(64, 96, density=0.5).to_quantized(bits=3)
    twin: Any = dense_twin(layer)
    parameters = twin.weight, twin.scales, twin.biases
    weight = mx.dequantize(*parameters, twin.group_size, twin.bits)
    assert mx.array_equal(weight, layer.todense())
    assert twin.bias is layer.bias


def test_repeated_quantized_blocks_have_no_dense_twin():
    pattern = CSRPattern([0, 2], [0, 0], (32, 32), 32)
    layer = BlockSparseLinear(32, 32, pattern).to_quantized()
    found = advise(layer, [2], seconds=0.1)
    assert found.left_out == {"nn.QuantizedLinear": "the pattern stores a block more than once"}


def test_when_the_time_is_over_it_stops():
    found = advise(BlockSparseLinear(64, 64), (4, 8, 16), seconds=1e-9)
    assert {t.rows for t in found.timings} == {4}
    assert {t.samples for t in found.timings} == {1}
    assert found.left_out == {"8 rows": "1e-09 s were over", "16 rows": "1e-09 s were over"}


def test_it_says_what_computed_the_sparse_products_of_each_batch(cuda_calls):
    layer = BlockSparseLinear(64, 64, block_size=136, density=0.5)
    found = advise(layer, (8, 64), seconds=60)  # a GPU compiles its kernels in that time
    assert found.backends == {
        n: dict(zip(PRODUCTS, [name, name, name, "mlx"], strict=True))
        for n, name in ((8, "cuda"), (64, "plain"))
    }
    assert set(cuda_calls) == {"spmm", "spmm_t", "sddmm"}


def test_dense_methods_may_round_to_tf32_and_kernels_may_not(cuda_calls, monkeypatch):
    """nn.Linear is MLX's matmul whatever computes the sparse products."""
    off = 1 + 2.0**-12  # what TF32 cannot tell from 1
    monkeypatch.setattr(ADVISE, "matmul_uses_tf32", lambda: True)
    linear, kernel = nn.Linear.__call__, cuda.spmm
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: linear(self, x * off))
    layer = BlockSparseLinear(64, 64, block_size=8, density=0.5)
    assert "dense" in advise(layer, [4], seconds=0.1).seconds("forward", 4)
    monkeypatch.setattr(cuda, "spmm", lambda *args: kernel(*args) * off)
    with pytest.raises(ArithmeticError, match=r"sparse: the forward .* computed by cuda"):
        advise(layer, [4], seconds=0.1)
    monkeypatch.setattr(cuda, "spmm", kernel)
    monkeypatch.setattr(ADVISE, "matmul_uses_tf32", lambda: False)
    with pytest.raises(ArithmeticError, match=r"dense: the forward .* computed by mlx"):
        advise(layer, [4], seconds=0.1)


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
def test_a_wrong_layer_is_not_timed(monkeypatch, op):
    right = getattr(backend(op), op)
    monkeypatch.setattr(backend(op), op, lambda *args: right(*args) * 1.01)
    with pytest.raises(ArithmeticError, match=r"\[advise\] wrong result: sparse: the"):
        advise(BlockSparseLinear(64, 64, density=0.5), [4])


def test_a_wrong_masked_product_is_left_out(monkeypatch):
    right = mx.block_masked_mm
    monkeypatch.setattr(mx, "block_masked_mm", lambda *args: right(*args) * 1.001)
    found = advise(BlockSparseLinear(64, 64, density=0.5), [4, 2], seconds=0.1)
    assert "its result is wrong: mx.block_masked_mm: the " in found.left_out["mx.block_masked_mm"]
    assert {t.method for t in found.timings} == {"sparse", "dense"}


def test_what_it_says():
    found = advice(
        forward_1=(1.3e-5, 9e-5, 1e-5),
        forward_64=(1e-3, 6e-3, 3e-3),
        forward_256=(2e-3, 7e-3, 9e-3),
        step_1=(1e-4, 1.04e-4, 2e-4),
        step_64=(4e-3, 2e-3, 3e-3),
        step_256=(2.0, 1.0, None),
    )
    assert found.sentences() == [
        "forward: dense wins at 1 row, 1.3 times as fast as sparse; "
        "sparse wins at 64 and 256 rows, 3.0 to 3.5 times as fast as the next.",
        "training step: no clear winner at 1 row; "
        "mx.block_masked_mm wins at 64 and 256 rows, 2.0 times as fast as sparse.",
    ]
    lines = repr(found).splitlines()
    assert lines[:8] == [
        "layer on Device(cpu, 0)",
        "task           rows  sparse  mx.block_masked_mm   dense             fastest",
        "forward           1   13 us               90 us   10 us               dense",
        "forward          64    1 ms                6 ms    3 ms              sparse",
        "forward         256    2 ms                7 ms    9 ms              sparse",
        "training step     1  100 us              104 us  200 us              sparse",
        "training step    64    4 ms                2 ms    3 ms  mx.block_masked_mm",
        "training step   256     2 s                 1 s       -  mx.block_masked_mm",
    ]
    assert all(len(line) <= 100 for line in lines)
    assert unwrapped(lines[8:]) == " ".join(
        [
            *found.sentences(),
            "sparse at 1 and 64 rows: forward, input gradient and weight gradient by cuda;",
            "bias gradient by mlx.",
            "sparse at 256 rows: forward and input gradient by cuda; weight gradient by plain;",
            "bias gradient by mlx.",
            "Not timed: 16 rows, since 1 s were over.",
        ]
    )


def test_numpy_integers_are_batch_sizes():
    found = advise(BlockSparseLinear(64, 64), list(np.array([2])), seconds=0.1)
    assert {t.rows for t in found.timings} == {2}


LAYER = BlockSparseLinear(64, 64)
BAD = [
    (
        lambda: advise(untyped(mx.ones(3))),
        TypeError,
        "layer must be a BlockSparseLinear or a QuantizedBlockSparseLinear, got array",
    ),
    (lambda: advise(LAYER, untyped(16)), TypeError, "batch_sizes must be integers, got 16"),
    (lambda: advise(LAYER, untyped("16")), TypeError, "batch_sizes must be integers, got '16'"),
    (lambda: advise(LAYER, untyped([1.5])), TypeError, "batch_sizes must be an integer, got 1.5"),
    (lambda: advise(LAYER, [4, 0]), ValueError, r"batch_sizes must be in \[1.*got 0"),
    (lambda: advise(LAYER, []), ValueError, "batch_sizes is empty"),
    (lambda: advise(LAYER, seconds=0), ValueError, "seconds must be positive, got 0"),
    (lambda: advise(LAYER, seconds=float("nan")), ValueError, "seconds must be positive, got nan"),
    (lambda: advise(LAYER, seconds=untyped("1")), TypeError, "seconds must be a number, got '1'"),
    (lambda: advise(LAYER, seed=-1), ValueError, r"seed must be in \[0"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[advise\] " + message):
        call()
