"""The products on CUDA through the dense matrix: what the kernels write and take, on the emulator,
and that transforms of MLX go through."""

import mlx.core as mx
import pytest
from cuda_emulator import emulated
from support import (
    assert_equal,
    check_products,
    computing,
    dense_weight,
    integers,
    pattern_of,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import sddmm, spmm, spmm_t
from mlx_sparse_nn.core import blocks, tuned
from mlx_sparse_nn.core.backends import cuda, cuda_dense, cuda_small, cuda_tiles, naive, plain


def check(pattern, n, dtype, **settings):
    """Compare the three products with the oracle's, with nans outside of the matrix."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation, computing(cuda_dense, cuda, plain):
        check_products(pattern, spoiled(pattern, data), x, y, bias)
    assert set(emulation.names) == {"expand", "sample"}


@pytest.fixture(autouse=True)
def _all_products(monkeypatch):
    """Let every product with more rows than a few go through the dense matrix."""
    monkeypatch.setattr(cuda_dense, "_least_density", lambda *_: 0.0)
    monkeypatch.setattr(cuda_small, "takes", lambda *_: False)
    monkeypatch.setattr(tuned, "DENSE_LEAST_STRIP", 0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8, 12, 16, 24, 40])
def test_products(block_size, dtype, offset):
    pattern = random_pattern(4, 5, block_size, density=0.7)
    check(pattern, 17, dtype, offset=offset)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 1), (4, 0)])
@pytest.mark.parametrize("block_size", [3, 4, 8, 12, 40])
def test_a_matrix_may_end_within_its_blocks(block_size, cut, offset):
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.9), cut, -cut)
    check(pattern, 20, mx.bfloat16, offset=offset)


@pytest.mark.parametrize("block_size", [1, 4, 24])
def test_a_strip_may_hold_a_part_of_the_columns(monkeypatch, block_size):
    """Of wide matrices: blocks reach from one part into the next."""
    monkeypatch.setattr(tuned, "DENSE_STRIP_BYTES", 64)
    check(random_pattern(3, 30, block_size, density=0.7), 17, mx.bfloat16)
    check(trimmed(random_pattern(3, 30, block_size, density=0.7), 1, 1), 17, mx.float32)


def test_blocks_of_long_rows_are_shared(monkeypatch):
    monkeypatch.setattr(tuned, "DENSE_SAMPLING_GROUPS", 10**6)
    check(random_pattern(3, 200, 8, density=0.7), 17, mx.float16)


def test_several_matrices_of_one_pattern():
    """A bias is added before a sum is rounded, in 16 bits too."""
    pattern = random_pattern(3, 4, 4, density=0.7)
    shapes = pattern.data_shape, (20, pattern.shape[1]), (20, pattern.shape[0])
    data, x, y = (integers((2, *shape), i, mx.bfloat16) for i, shape in enumerate(shapes))
    bias = mx.full(pattern.shape[:1], 2.0**-9, mx.bfloat16)
    with emulated(), computing(cuda_dense, plain):
        for product, operands in ((spmm, (data, x)), (spmm_t, (data, y))):
            mapped = mx.vmap(lambda data, x, f=product: f(data, pattern, x))(*operands)
            assert_equal(
                mapped, getattr(naive, product.__name__)(operands[0], pattern, operands[1])
            )
        mapped = mx.vmap(lambda y, x: sddmm(pattern, y, x))(y, x)
        assert_equal(mapped, naive.sddmm(pattern, y, x))
        mapped = mx.vmap(lambda data, x: spmm(data, pattern, x, bias))(data, x)
        assert_equal(mapped, naive.spmm(data, pattern, x, bias))


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("transform", ["grad", "compile", "vmap", "grad of grad"])
@pytest.mark.not_emulated("needs mx.compile")
def test_transforms(monkeypatch, transform, block_size):
    pattern = random_pattern(5, 6, block_size, density=0.7)

    def expand(layout, data):
        lead = data.reshape(-1, *layout.data_shape)
        dense = blocks.todense(layout, lead)
        return dense.reshape(*data.shape[: data.ndim - len(layout.data_shape)], *layout.shape)

    def sample(layout, matrix):
        taken = blocks.sample(layout, matrix.reshape(-1, *layout.shape))
        return taken.reshape(*matrix.shape[:-2], *layout.data_shape)

    monkeypatch.setattr(cuda_dense, "expand", expand)
    monkeypatch.setattr(cuda_dense, "sample", sample)
    data, x = integers(pattern.data_shape, 2), integers((18, pattern.shape[1]), 3)
    bias = integers(pattern.shape[:1], 4)

    def sparse(data, x):
        return spmm(data, pattern, x, bias)

    def dense(data, x):
        return x @ dense_weight(pattern, data).T + bias

    def of(f):
        grads = mx.grad(lambda data, x: (f(data, x) ** 2).sum(), argnums=(0, 1))
        if transform == "grad of grad":
            return mx.grad(lambda data, x: sum((g**2).sum() for g in grads(data, x)))
        return {"grad": grads, "compile": mx.compile(grads), "vmap": mx.vmap(f)}[transform]

    if transform == "vmap":
        data, x = mx.stack([data, -data]), mx.stack([x, x + 1])
    with computing(cuda_dense, plain):
        actual = of(sparse)(data, x)
    expected = of(dense)(data, x)
    pairs = (
        zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    )
    for a, b in pairs:
        assert_equal(a, b)


@pytest.mark.parametrize(
    ("row", "taken"), [([1, 3, 5], True), ([1, 5, 3], False), ([1, 3, 3], False)]
)
@pytest.mark.parametrize("block_size", [1, 4])
def test_blocks_are_in_order_and_stored_once(block_size, row, taken):
    """Two of one place would be written by two threads at once."""
    layout = pattern_of([row] * 4, 8, block_size).layout
    assert cuda_dense.takes("spmm", layout, 64, mx.bfloat16, 1, 0) is taken


def test_the_dense_matrix_is_bounded(monkeypatch):
    layout = random_pattern(8, 8, 4).layout
    monkeypatch.setattr(tuned, "DENSE_BYTES", 32 * 32 * 2)
    assert cuda_dense.takes("spmm", layout, 64, mx.bfloat16, 1, 0)
    assert not cuda_dense.takes("spmm", layout, 64, mx.float32, 1, 0)
    assert not cuda_dense.takes("spmm", layout, 64, mx.bfloat16, 2, 0)


@pytest.mark.parametrize(
    ("op", "block_size", "density", "n", "dtype", "taken"),
    [
        ("spmm", 1, 0.1, 15, mx.bfloat16, False),
        ("spmm", 1, 0.1, 17, mx.bfloat16, True),
        ("spmm", 4, 0.01, 64, mx.bfloat16, False),
        ("spmm", 4, 0.02, 4096, mx.float32, True),
        ("spmm", 12, 0.1, 17, mx.float32, False),
        ("spmm", 12, 0.1, 4096, mx.float32, True),
        ("spmm", 33, 0.1, 64, mx.bfloat16, False),
        ("spmm", 33, 0.1, 1024, mx.bfloat16, True),
        ("sddmm", 12, 0.1, 17, mx.bfloat16, True),
        ("spmm_t", 8, 0.1, 64, mx.bfloat16, False),
        ("spmm_t", 8, 0.1, 256, mx.bfloat16, True),
        ("spmm", 64, 0.1, 4096, mx.bfloat16, False),
        ("spmm", 16, 0.5, 4096, mx.bfloat16, True),
    ],
)
def test_who_goes_through_the_dense_matrix(monkeypatch, op, block_size, density, n, dtype, taken):
    """Where kernels of stored blocks took many times the dense layer's time."""
    monkeypatch.undo()
    monkeypatch.setattr(cuda_tiles, "allows_tf32", lambda: True)
    columns = range(round(600 * density) + 1)
    layout = pattern_of([columns] * 20, 600, block_size).layout
    monkeypatch.setattr(cuda_small, "takes", lambda *_: False)
    assert cuda_dense.takes(op, layout, n, dtype, 1, 0) is taken


def test_narrow_and_tall_matrices_go_by_stored_values(monkeypatch):
    """A thread block for each of their rows would have little to write, and a grid is bounded."""
    monkeypatch.undo()
    for n_rows, n_cols in ((8, 500), (2**23, 16)):
        pattern = pattern_of([range(n_cols)] * 8, n_cols, 1)
        pattern.layout.full_shape = (n_rows, n_cols)
        assert not cuda_dense._has_strips(pattern.layout)
