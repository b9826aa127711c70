"""The host side of the CUDA backend, without a GPU: every launch is one that the card accepts.

The kernels themselves run in ``make test-device``, on a machine with an NVIDIA GPU.
"""

import re

import mlx.core as mx
import pytest

from mlx_sparse_nn import CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core import kernels

SHARED_MEMORY = 227 * 1024  # bytes a thread block may have on Hopper, by raising the limit


@pytest.fixture
def launches(monkeypatch):
    """Record launches in place of ``mx.fast.cuda_kernel``, which needs a GPU."""
    recorded = []

    def cuda_kernel(name, input_names, output_names, source, header, shared_memory):
        def call(inputs, template, output_shapes, output_dtypes, grid, threadgroup):
            recorded.append((name, dict(template), grid, threadgroup, shared_memory, source))
            assert len(inputs) == len(input_names)
            return [mx.zeros(output_shapes[0], output_dtypes[0])]

        return call

    monkeypatch.setattr(kernels, "backend", lambda: "cuda")
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    kernels._kernel.cache_clear()
    yield recorded
    kernels._kernel.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("n", [1, 7, 16, 40, 300])
def test_launches_are_valid(launches, block_size, dtype, n):
    pattern = CSRPattern(
        [0, 2, 2, 5], [1, 0, 2, 1, 0], (3 * block_size, 3 * block_size), block_size
    )
    data, x = mx.ones(pattern.data_shape, dtype), mx.ones((n, 3 * block_size), dtype)
    bias = mx.ones(3 * block_size, dtype)
    results = {
        "spmm": spmm(data, pattern, x, bias),
        "spmm_t": spmm_t(data, pattern, x),
        "sddmm": sddmm(pattern, x, x),
    }
    shapes = {"spmm": x.shape, "spmm_t": x.shape, "sddmm": pattern.data_shape}
    for name, result in results.items():
        assert tuple(result.shape) == tuple(shapes[name])
        assert result.dtype == dtype
    for name, template, grid, group, shared_memory, source in launches:
        assert all(g > 0 and g % t == 0 for g, t in zip(grid, group, strict=True)), name
        assert group[0] <= 1024
        assert shared_memory <= SHARED_MEMORY, name
        used = set(re.findall(r"\b[A-Z][A-Z_]+\b|\bT\b|\bB\b", _code(source)))
        assert set(template) <= used, f"{name} is given {set(template) - used} and reads none of it"
    by_mlx = dtype == mx.float32 and block_size >= 8 and n > 16
    assert bool(launches) is not by_mlx


def _code(source):
    return re.sub(r"//.*", "", source)
