"""A single row of x, as decoding asks for: it costs MLX a kernel, and nothing around it."""

import io
from contextlib import nullcontext

import mlx.core as mx
import pytest
from cuda_emulator import emulated
from support import assert_equal, computing, fresh_launches, integers, random_pattern

from mlx_sparse_nn import BlockSparseLinear, spmm
from mlx_sparse_nn.core import transforms
from mlx_sparse_nn.core.backends import cuda, cuda_tiles, plain
from mlx_sparse_nn.core.backends import metal as metal_backend
from mlx_sparse_nn.core.transforms import needs_rules


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("lead", [(1, 1), (1, 1, 1)])
class TestAxesOfSizeOne:
    def operands(self, block_size, dtype, lead):
        pattern = random_pattern(3, 4, block_size, density=0.7)
        data, bias = integers(pattern.data_shape, 1, dtype), integers((pattern.shape[0],), 2, dtype)
        x = integers((*lead, pattern.shape[1]), 3, dtype)
        return data, pattern, x, bias, spmm(data, pattern, x.reshape(-1), bias).reshape(*lead, -1)

    def test_on_cuda(self, lead, block_size, dtype):
        data, pattern, x, bias, expected = self.operands(block_size, dtype, lead)
        with nullcontext() if mx.cuda.is_available() else emulated():
            assert_equal(spmm(data, pattern, x, bias), expected)

    @pytest.mark.usefixtures("metal")
    def test_on_metal(self, lead, block_size, dtype):
        data, pattern, x, bias, expected = self.operands(block_size, dtype, lead)
        with computing(metal_backend, plain):
            assert_equal(spmm(data, pattern, x, bias), expected)


def derivative(f):
    return lambda x: mx.jvp(f, [x], [x])


@pytest.mark.not_emulated("needs mx.compile")
@pytest.mark.parametrize(
    ("transform", "is_derivative"),
    [
        (mx.compile, False),
        (lambda f: mx.compile(lambda x: mx.compile(f)(x)), False),
        (mx.grad, True),
        (lambda f: mx.compile(mx.grad(f)), True),
        (lambda f: mx.grad(mx.compile(f)), True),
        (derivative, True),
        (lambda f: mx.compile(derivative(f)), True),
        (lambda f: mx.grad(mx.checkpoint(f)), True),
        (lambda f: mx.grad(lambda x: mx.grad(f)(x).sum()), True),
        (lambda f: mx.vmap(lambda x: f(x)), True),  # which maps by the rule
    ],
)
def test_rules_are_for_derivatives(transform, is_derivative):
    """A GPU draws an attention otherwise there. On a CPU, all that is traced needs rules."""
    transforms.note_transforms()
    answers, on_gpu = [], mx.default_device().type is mx.gpu

    def function(x):
        answers.append(needs_rules())
        return (x * x).sum()

    assert needs_rules() is False
    transform(function)(mx.ones((3, 1)))
    assert needs_rules() is False
    assert set(answers) == {is_derivative or not on_gpu}


@pytest.mark.not_emulated("needs mx.compile")
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_call_is_one_operation(monkeypatch, bias):
    """MLX takes microseconds for each: as much as the product takes on the GPU."""

    def cuda_kernel(**_):
        def call(inputs, output_shapes, output_dtypes, **_):
            zeros = mx.zeros(output_shapes[0], output_dtypes[0])
            mx.eval(zeros)
            return [mx.depends(zeros, inputs)]

        return call

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(cuda_tiles, "architecture", lambda: "sm_90")
    monkeypatch.setattr(transforms, "_may_be_derived", lambda: False)
    layer = BlockSparseLinear(64, 64, block_size=32, density=0.5, bias=bias)
    layer.set_dtype(mx.bfloat16)
    x = mx.ones((1, 1, 64), mx.bfloat16)
    mx.eval(layer.parameters(), x)
    drawn = io.StringIO()
    with fresh_launches(), computing(cuda, plain):
        call = mx.compile(lambda x: layer(x), inputs=layer.state)
        mx.export_to_dot(drawn, call(x))
    assert drawn.getvalue().count("shape=rectangle") == 1
