"""Tests of products run on what the rule chooses, and once more in plain MLX on the CPU."""

import mlx.core as mx
import pytest
from support import computing

from mlx_sparse_nn.core.backends import plain


@pytest.fixture(params=["chosen", "plain"])
def each_backend(request):
    if request.param == "chosen":
        yield
        return
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with computing(plain):
        yield
    mx.set_default_device(before)
