"""The relative error of a weight, against NumPy in float64."""

import mlx.core as mx
import numpy as np
import pytest
from support import to_numpy

from mlx_sparse_nn.core.relative_error import relative_error


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(50, 70), (9, 4, 4), (33,)])
def test_it_is_numpys(shape, dtype):
    before, after = (mx.random.normal(shape).astype(dtype) for _ in range(2))
    whole, other = (to_numpy(a).astype(np.float64) for a in (before, after))
    expected = np.linalg.norm(whole - other) / np.linalg.norm(whole)
    assert relative_error(before, after) == pytest.approx(expected, rel=1e-5)


def test_nothing_lost_is_exactly_zero():
    weight = mx.random.normal((300, 200))
    assert relative_error(weight, weight * 1) == 0
    assert relative_error(weight, mx.zeros_like(weight)) == 1


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_large_and_small_values_have_squares_too(scale):
    weight = mx.array([[3.0, 4.0]]) * scale
    assert relative_error(weight, mx.array([[3.0, 0.0]]) * scale) == pytest.approx(0.8)


def test_weights_of_zeros_and_of_nothing():
    zeros = mx.zeros((3, 3))
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, zeros + 1) == np.inf
    assert relative_error(mx.zeros((0, 4, 4)), mx.zeros((0, 4, 4))) == 0
    assert np.isnan(relative_error(zeros + mx.nan, zeros))
