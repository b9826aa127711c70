"""The rule that chooses a backend: what it looks at, and that a layer follows it at every call."""

import types

import mlx.core as mx
import mlx.nn as nn
import pytest
from support import assert_equal, computing, flatten, integers, pattern_of, random_pattern, trimmed

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.backends import choose, cuda, cuda_tiles, metal, naive, plain

OPS = ("spmm", "spmm_t", "sddmm")


def name_of(op, block_size, n_x, dtype, n_blocks=1, bits=0):
    pattern = CSRPattern([0, n_blocks], [0] * n_blocks, (block_size, block_size), block_size)
    return choose.choose(op, pattern.layout, n_x, dtype, bits=bits).NAME


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("block_size", "n_x", "dtype", "name"),
    [
        (1, 1, mx.float32, "cuda"),
        (4, 4096, mx.float32, "cuda"),
        (8, 16, mx.float32, "cuda"),
        (8, 17, mx.float32, "cuda"),
        (33, 64, mx.float32, "cuda"),
        (128, 64, mx.float32, "cuda"),
        (136, 17, mx.float32, "plain"),
        (64, 64, mx.bfloat16, "cuda"),
        (16, 0, mx.bfloat16, "plain"),
        (1, 8, mx.complex64, "plain"),
        (1, 8, mx.float64, "plain"),
    ],
)
def test_cuda_takes_what_it_has_kernels_for(op, block_size, n_x, dtype, name):
    with computing(cuda, plain):
        assert name_of(op, block_size, n_x, dtype) == name


@pytest.mark.parametrize("op", OPS)
def test_float32_blocks_go_to_tensor_cores_where_mlx_allows_tf32(monkeypatch, op):
    monkeypatch.setattr(cuda_tiles, "allows_tf32", lambda: True)
    with computing(cuda, plain):
        for block_size, name in ((8, "cuda"), (12, "cuda"), (48, "cuda"), (136, "plain")):
            assert name_of(op, block_size, 17, mx.float32) == name


def test_gradients_of_16_bit_blocks_need_a_kernel_of_their_size():
    with computing(cuda, plain):
        for block_size, name in ((8, "cuda"), (12, "cuda"), (48, "cuda"), (136, "plain")):
            assert name_of("sddmm", block_size, 64, mx.float16) == name
            assert name_of("spmm", block_size, 64, mx.float16) == "cuda"


@pytest.mark.parametrize("op", OPS)
def test_metal_takes_its_dtypes_and_whatever_has_elements(op):
    with computing(metal, plain):
        for block_size in (1, 3, 8, 48, 128):
            for dtype in (mx.float32, mx.float16, mx.bfloat16):
                assert name_of(op, block_size, 100, dtype) == "metal"
        assert name_of(op, 1, 5, mx.complex64) == "plain"
        assert name_of(op, 8, 0, mx.float32) == "plain"


@pytest.mark.parametrize("op", OPS)
def test_metal_takes_no_tiles_of_x_whose_places_overflow(op):
    wide = CSRPattern([0, 1], [3], (8, 2**25), 8)
    with computing(metal, plain):
        assert choose.choose(op, wide.layout, 100, mx.float32).NAME == "plain"
        assert name_of(op, 8, 5, mx.float32, n_blocks=0) == "plain"


@pytest.mark.parametrize("op", ["qspmm", "qspmm_t"])
def test_quantized_blocks_have_kernels(op):
    for backend, name in ((metal, "metal"), (cuda, "cuda")):
        with computing(backend, plain):
            for n_x in (1, 100):
                assert name_of(op, 96, n_x, mx.bfloat16, bits=4) == name
            assert name_of(op, 32, 0, mx.bfloat16, bits=4) == "plain"
            assert name_of(op, 32, 4, mx.bfloat16, n_blocks=0, bits=4) == "plain"


def test_a_kernel_is_not_chosen_while_vmap_traces():
    seen = []

    def f(x):
        seen.append(name_of("spmm", 8, 5, mx.float32))
        return x

    with computing(cuda, plain):
        mx.vmap(f)(mx.ones((2, 3)))
        f(mx.ones(3))
    assert seen == ["plain", "cuda"]


def test_a_fifth_backend_is_a_module_in_the_list():
    """It needs no more than this: a name, what it takes, and three products."""
    pattern, calls = trimmed(random_pattern(3, 4, 8, density=0.8), 3, 5), []
    data, x = integers(pattern.data_shape, 1), integers((5, pattern.shape[1]), 2)
    y = integers((5, pattern.shape[0]), 3)

    def counted(op):
        return lambda *args: calls.append(op) or getattr(plain, op)(*args)

    fifth = types.ModuleType("fifth")
    fifth.__dict__.update(
        NAME="fifth",
        TAKES_EDGES=False,
        is_available=lambda: True,
        takes=lambda op, layout, n_x, dtype, n_matrices, bits: op != "sddmm",
        **{op: counted(op) for op in OPS},
    )
    with computing(fifth, plain):
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
        assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))
        assert [name_of(op, 8, 5, mx.float32) for op in OPS] == ["fifth", "fifth", "plain"]
    assert calls == ["spmm", "spmm_t"]


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.not_emulated("needs mx.compile")
def test_a_step_compiled_before_a_load_uses_the_buckets_of_the_new_pattern(block_size, n):
    """Of the same sizes, so that MLX runs the graph that it traced for the old one."""
    lists = [[0, 1, 2], [3], [], [1, 2]]
    patterns = [
        pattern_of(rows, 4, block_size) for rows in (lists, lists[::-1], [*lists[2:], *lists[:2]])
    ]
    size, traces = 4 * block_size, []
    layer = BlockSparseLinear(size, size, patterns[0])
    x, g = integers((n, size), 1), integers((n, size), 2)

    def step(x):
        traces.append(x)
        loss = lambda x: (layer(x) * g).sum()
        value, grads = nn.value_and_grad(layer, loss)(x)
        return value, grads["weight"], mx.grad(loss)(x)

    state = [layer.state]
    compiled = mx.compile(step, inputs=state, outputs=state)
    for i, pattern in enumerate(patterns * 2):
        source = BlockSparseLinear(size, size, pattern)
        source.weight, source.bias = integers(pattern.data_shape, i), integers((size,), i + 9)
        layer.load_weights(flatten(source.parameters()))
        value, d_weight, d_x = compiled(x)
        y = naive.spmm(source.weight, pattern, x, source.bias)
        assert_equal(value, (y * g).sum())
        assert_equal(d_weight, naive.sddmm(pattern, g, x))
        assert_equal(d_x, naive.spmm_t(source.weight, pattern, g))
        assert_equal(layer(x), y)
    assert len(traces) == 1
