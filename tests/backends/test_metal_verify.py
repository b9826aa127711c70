"""verify on the Metal kernels, which the emulator runs."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_sparse_nn import BlockSparseLinear
from mlx_sparse_nn.core.backends import metal as kernels
from mlx_sparse_nn.diagnostics.verify import MismatchError, verify


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_the_kernels_pass(metal, block_size, dtype):
    model = nn.Sequential(
        BlockSparseLinear(64, 96, block_size=block_size, density=0.3),
        nn.ReLU(),
        BlockSparseLinear(96, 64, block_size=block_size, density=0.4, bias=False),
    )
    model.set_dtype(dtype)
    report = verify(model, mx.random.normal((20, 64)).astype(dtype))
    assert {c.backend for c in report.checks if c.product != "bias gradient"} == {"metal"}
    assert report.device == "Device(gpu, 0)"
    assert len(report.checks) == 7
    assert metal.launches


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
def test_a_wrong_kernel_is_caught(metal, monkeypatch, op):
    right = getattr(kernels, op)
    monkeypatch.setattr(kernels, op, lambda *args: right(*args) * (1 + 2.0**-12))
    with pytest.raises(MismatchError, match=r"on Device\(gpu, 0\), wrong[^$]* by metal"):
        verify(BlockSparseLinear(32, 32, block_size=8, density=0.5), mx.random.normal((3, 32)))
