"""A CUDA backend without a GPU."""

import mlx.core as mx
import pytest
from support import computing

from mlx_sparse_nn.core.backends import cuda, cuda_tiles, plain


@pytest.fixture
def cuda_calls(monkeypatch):
    """Let CUDA's kernels take what they take on a GPU, and return the ops that they are given.

    Plain MLX computes in their place, on the CPU: a GPU's would round float32 to TF32, as they may
    not.
    """
    calls = []

    def recorded(op):
        right = getattr(plain, op)

        def call(*args):
            calls.append(op)
            with mx.stream(mx.cpu):
                return right(*args)

        return call

    for op in ("spmm", "spmm_t", "sddmm"):
        monkeypatch.setattr(cuda, op, recorded(op))
    monkeypatch.setattr(cuda, "takes_edges", lambda *_: plain.TAKES_EDGES)
    monkeypatch.setattr(cuda_tiles, "allows_tf32", lambda: True)
    with computing(cuda, plain):
        yield calls
