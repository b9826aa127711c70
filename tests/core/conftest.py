"""Tests of products run on what the rule chooses, and once more in plain MLX."""

import pytest
from support import computing

from mlx_sparse_nn.core.backends import plain


@pytest.fixture(params=["chosen", "plain"])
def each_backend(request):
    if request.param == "chosen":
        yield
        return
    with computing(plain):
        yield
