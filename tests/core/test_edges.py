"""Blocks that reach past the matrix: whatever a weight holds there, nobody reads it."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    dense_of,
    integers,
    outside,
    pattern_of,
    random_pattern,
    spoiled,
    to_numpy,
    trimmed,
)

import mlx_sparse_nn as sparse
from mlx_sparse_nn import (
    BlockSparseLinear,
    CSRArray,
    CSRPattern,
    qspmm,
    qspmm_t,
    sddmm,
    spmm,
    spmm_t,
)
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.core.quantized import BITS
from mlx_sparse_nn.core.scores import BlockPlaces, block_scores

pytestmark = pytest.mark.usefixtures("each_backend")

PATTERN = trimmed(random_pattern(4, 3, 32, density=0.9, seed=3), 5, 22)  # 123 x 74


def spoiled_layer(bias: bool = True) -> BlockSparseLinear:
    layer = BlockSparseLinear(PATTERN.shape[1], PATTERN.shape[0], PATTERN, bias=bias)
    layer.weight = spoiled(PATTERN, integers(PATTERN.data_shape, 1))
    return layer


def twin_of(layer: BlockSparseLinear) -> nn.Linear:
    """Return the dense layer by a loop over the blocks."""
    n_out, n_in = layer.pattern.shape
    linear = nn.Linear(n_in, n_out, bias="bias" in layer)
    linear.weight = dense_of(layer.pattern, layer.weight)
    if "bias" in layer:
        linear.bias = layer.bias
    return linear


SHAPES = [(784, 100), (784, 10), (3, 2), (1, 33)]
LAYERS = [((1000, 50257), 32), *((shape, size) for shape in SHAPES for size in (8, 12, 32))]


@pytest.mark.parametrize(("shape", "block_size"), LAYERS)
def test_a_layer_of_any_dims_is_its_dense_twin(shape, block_size):
    layer = BlockSparseLinear(*shape, block_size=block_size, density=0.05)
    layer.weight, layer.bias = integers(layer.weight.shape, 1), integers(shape[1:], 2)
    x = integers((2, shape[0]), 3)
    assert_equal(layer(x), twin_of(layer)(x))
    assert layer.todense().shape == shape[::-1]
    assert (layer.input_dims, layer.output_dims) == shape


def test_a_new_layer_is_as_wide_as_its_inputs_say():
    """Values within 1 / sqrt(stored inputs), of which the last block has fewer."""
    full = BlockSparseLinear(40, 33, block_size=32, density=1.0)
    assert mx.abs(full.weight).max().item() <= 1 / np.sqrt(40)
    assert mx.abs(full.weight).max().item() > 0.95 / np.sqrt(40)
    assert full.bias.shape == (33,)
    assert not np.any(to_numpy(full.weight)[outside(full.pattern)])


def test_training_is_that_of_the_dense_twin():
    """Also where the optimizer's step ends up outside: gradients there are zeros."""
    layer = BlockSparseLinear(50, 30, block_size=16, density=1.0)
    twin = twin_of(layer)
    x, y = mx.random.normal((8, 50)), mx.random.normal((8, 30))
    for module in (layer, twin):
        optimizer = optim.AdamW(1e-2)
        step = nn.value_and_grad(module, lambda m, x, y: ((m(x) - y) ** 2).mean())
        for _ in range(5):
            _, gradients = step(module, x, y)
            optimizer.update(module, gradients)
    assert mx.allclose(layer.todense(), twin.weight, atol=1e-5)
    assert not np.any(to_numpy(layer.weight)[outside(layer.pattern)])


def test_every_transform_and_second_order():
    data, (n_rows, n_cols) = spoiled(PATTERN, integers(PATTERN.data_shape, 1)), PATTERN.shape
    x, bias = integers((3, n_cols), 2), integers((n_rows,), 3)
    dense, d_data = dense_of(PATTERN, data), spoiled(PATTERN, integers(PATTERN.data_shape, 4))
    d_dense = dense_of(PATTERN, d_data)
    sparse_loss = lambda data, x, bias: mx.square(spmm(data, PATTERN, x, bias)).sum()
    dense_loss = lambda dense, x, bias: mx.square(x @ dense.T + bias).sum()
    found = mx.grad(sparse_loss, argnums=(0, 1, 2))(data, x, bias)
    expected = mx.grad(dense_loss, argnums=(0, 1, 2))(dense, x, bias)
    assert_equal(found[1], expected[1])
    assert_equal(found[2], expected[2])
    assert_equal(dense_of(PATTERN, found[0]), mx.where(PATTERN.tomask(), expected[0], 0))
    assert not np.any(to_numpy(found[0])[outside(PATTERN)])
    _, (tangent,) = mx.jvp(lambda data: spmm(data, PATTERN, x), [data], [d_data])
    assert_equal(tangent, x @ d_dense.T)
    second = lambda loss, a, d_a: mx.jvp(
        lambda a: mx.grad(loss, argnums=1)(a, x, bias), [a], [d_a]
    )[1][0]
    assert_equal(second(sparse_loss, data, d_data), second(dense_loss, dense, d_dense))
    mapped = mx.vmap(lambda data, x: spmm(data, PATTERN, x))(
        mx.stack([data, d_data]), mx.stack([x, x])
    )
    assert_equal(mapped, mx.stack([x @ dense.T, x @ d_dense.T]))
    assert_equal(mx.compile(lambda x: spmm(data, PATTERN, x, bias))(x), x @ dense.T + bias)


@pytest.mark.parametrize("product", [spmm, spmm_t, qspmm, qspmm_t])
def test_the_file_of_a_gradient(tmp_path, product):
    """MLX derives it from the product, and a zero cotangent times nan is nan."""
    file = str(tmp_path / "function.mlxfn")
    stored = [spoiled(PATTERN, integers(PATTERN.data_shape, 1))]
    if product in (qspmm, qspmm_t):
        packed, *scales = mx.quantize(integers(PATTERN.data_shape, 1), 32, 8)
        nan = mx.array(float("nan"))
        stored = [packed, *(spoiled_where_alone(PATTERN, a, nan) for a in scales)]
    width = PATTERN.shape[0 if product in (spmm_t, qspmm_t) else 1]
    gradient = mx.grad(lambda x: mx.square(product(*stored, PATTERN, x)).sum())
    x = integers((3, width), 2)
    mx.eval(stored)
    mx.export_function(file, gradient, x)
    imported: Any = mx.import_function(file)
    assert mx.allclose(imported(x)[0], gradient(x), rtol=1e-3, atol=0.1).item()


def test_every_shape(tmp_path):
    """Traced for every shape, a product is dense, and has no blocks that reach past it."""
    file, (n_rows, n_cols) = str(tmp_path / "function.mlxfn"), PATTERN.shape
    layer = spoiled_layer()
    A = CSRArray(layer.weight, PATTERN)
    wide = integers((n_cols, n_rows), 7)
    mx.eval(layer.parameters(), wide)
    functions: list[tuple[Any, int]] = [
        (layer, n_cols),
        (layer.to_quantized(32, 8), n_cols),
        (mx.grad(lambda x: mx.square(layer(x)).sum()), n_cols),
        (lambda y: y @ A, n_rows),
        (lambda x: sddmm(PATTERN, x @ wide, x), n_cols),
    ]
    for fun, width in functions:
        x, other = integers((4, width), 5), integers((9, width), 6)
        compiled = mx.compile(fun, shapeless=True)
        mx.export_function(file, fun, x, shapeless=True)
        imported: Any = mx.import_function(file)
        for operand in (x, other):
            expected = fun(operand)
            close(compiled(operand), expected)
            close(imported(operand)[0], expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("block_size", "group_size"), [(32, 32), (128, 32), (128, 64)])
def test_quantized_blocks(block_size, group_size, bits):
    """Groups that lie outside, and the one in which the matrix ends, at every place of it."""
    whole = random_pattern(3, 2, block_size, density=0.9, seed=1)
    for below, behind in [(0, 1), (1, 0), (7, 31), (5, 33), (40, 90), (100, 127)]:
        pattern = trimmed(whole, below, behind)
        data = mx.where(mx.array(outside(pattern)), 1e30, mx.random.normal(pattern.data_shape))
        inside = mx.where(mx.array(outside(pattern)), 0, data)
        packed, scales, biases = mx.quantize(inside, group_size, bits)
        # Garbage wherever a whole word, scale or bias lies outside.
        nan = mx.array(np.nan)
        scales, biases = (spoiled_where_alone(pattern, a, nan) for a in (scales, biases))
        if 32 % bits == 0:
            packed = spoiled_where_alone(pattern, packed, mx.array(2**32 - 1, mx.uint32))
        n_rows, n_cols = pattern.shape
        clean = mx.quantize(inside, group_size, bits)
        for n in (1, 3, 20):
            x, y = mx.random.normal((n, n_cols)), mx.random.normal((n, n_rows))
            found = qspmm(packed, scales, biases, pattern, x)
            close(found, naive.qspmm(*clean, pattern, x))
            close(qspmm_t(packed, scales, biases, pattern, y), naive.qspmm_t(*clean, pattern, y))


def spoiled_where_alone(pattern: CSRPattern, a: mx.array, value: mx.array) -> mx.array:
    """Return quantized ``a`` with ``value`` for what stands for nothing inside the matrix."""
    alone = mx.array(outside(pattern)).reshape(*a.shape, -1).all(axis=-1)
    return mx.where(alone, value, a)


def close(actual: mx.array, expected: mx.array) -> None:
    assert actual.shape == expected.shape
    assert mx.allclose(actual, expected, rtol=1e-4, atol=1e-3).item()


def test_a_quantized_layer_of_any_dims():
    layer = spoiled_layer()
    quantized = layer.to_quantized(group_size=32, bits=8)
    clean = BlockSparseLinear(PATTERN.shape[1], PATTERN.shape[0], PATTERN)
    clean.weight = mx.where(mx.array(outside(PATTERN)), 0, layer.weight)
    expected = clean.to_quantized(group_size=32, bits=8)
    for name in ("weight", "scales", "biases"):
        assert_equal(quantized[name], expected[name])
    x = mx.random.normal((4, PATTERN.shape[1]))
    assert mx.allclose(quantized(x), layer(x), atol=0.5).item()
    assert quantized.todense().shape == PATTERN.shape
    assert sparse.verify(quantized, x).passed
    gradient = mx.grad(lambda x: quantized(x).sum())(x)
    assert mx.isfinite(gradient).all().item()


def test_no_report_score_or_surgery_reads_it():
    layer, x = spoiled_layer(), mx.random.normal((4, PATTERN.shape[1]))
    assert sparse.verify(layer, x).passed
    assert layer.pattern.nnz == np.count_nonzero(~outside(PATTERN))
    (row,) = sparse.summary(layer).rows
    assert row.parameters == PATTERN.nnz + PATTERN.shape[0]
    assert row.dense_parameters == PATTERN.shape[0] * (PATTERN.shape[1] + 1)
    sparse.prune(model := nn.Sequential(layer), 0.4)
    assert model.layers[0].pattern.n_blocks == round(0.4 * PATTERN.n_places)
    close(layer(x), x @ layer.todense().T + layer.bias)
    shown = spoiled_layer().plot().images[0].get_array()
    assert np.isfinite(np.ma.masked_array(shown).compressed()).all()


def test_scores_of_a_dense_weight_are_those_of_its_parts():
    """The strongest block of a matrix may be one that ends within it."""
    linear = nn.Linear(40, 20, bias=False)
    linear.weight = mx.zeros((20, 40)).at[18:, 36:].add(1.0)
    layer = BlockSparseLinear.from_linear(linear, block_size=16, density=0.2)
    assert layer.pattern == CSRPattern([0, 0, 1], [2], (20, 40), 16)
    assert_equal(layer.todense(), linear.weight)
    places = lambda: BlockPlaces.of_pattern("", layer.pattern)
    assert block_scores(layer.weight, "l1", places).tolist() == [8.0]


def test_whole_models():
    """A model of MNIST's shapes, and what is too small for a block."""
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    dense = [layer.weight for layer in model.layers[::2]]
    report = sparse.sparsify(model, block_size=32, density=1.0)
    assert report.skipped == {"layers.2": "output_dims 10 is less than block_size 32"}
    assert report.sparse["layers.0"].density == 1
    assert_equal(model.layers[0].todense(), dense[0])
    sparse.densify(model)
    assert_equal(model.layers[0].weight, dense[0])


def test_a_checkpoint_with_anything_outside(tmp_path):
    model = nn.Sequential(spoiled_layer())
    model.save_weights(str(tmp_path / "model.safetensors"))
    other = nn.Sequential(nn.Linear(PATTERN.shape[1], PATTERN.shape[0]))
    sparse.restore(other, tmp_path / "model.safetensors")
    x = integers((3, PATTERN.shape[1]), 5)
    assert_equal(other(x), model(x))
    assert mx.isfinite(other(x)).all().item()


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 4, 7, 16]), st.integers(0, 9))
def test_arrays_of_any_shape(n_rows, n_cols, block_size, seed):
    rng = np.random.default_rng(seed)
    w = np.where(rng.random((n_rows, n_cols)) < 0.3, rng.integers(-3, 4, (n_rows, n_cols)), 0)
    w = w.astype(np.float32)
    A = sparse.from_dense(w, block_size)
    A = CSRArray(spoiled(A.pattern, A.data), A.pattern)
    assert np.array_equal(A.todense(), w)
    assert np.array_equal(A.T.todense(), w.T)
    assert A.sum().item() == w.sum()
    assert np.array_equal(A.sum(0), w.sum(0))
    assert np.array_equal(A.sum(1), w.sum(1))
    assert np.array_equal(A.diagonal(), np.diagonal(w))
    assert np.array_equal(sparse.to_scipy(A.tocsr()).toarray(), w)
    assert np.array_equal(A.tocoo().todense(), w)
    assert A.nnz == np.count_nonzero(~outside(A.pattern))
    gradient = mx.grad(lambda data: CSRArray(data, A.pattern).tocsr().data.sum())(A.data)
    assert np.array_equal(gradient, ~outside(A.pattern))


def test_every_builder_takes_any_shape():
    build = sparse.patterns
    mask = np.zeros((10, 7), bool)
    mask[9, 6] = True
    for pattern in (
        build.banded(10, 7, 1, 4),
        build.butterfly(13, 4),
        build.random(10, 7, 0.5, 4),
        build.covering(10, 7, 0.5, 4),
        build.from_mask(mask, 4),
        build.from_dense(mask.astype(np.float32), 4),
    ):
        assert pattern.grid == tuple(-(-size // 4) for size in pattern.shape)
        assert 0 < pattern.density <= 1
    assert build.from_mask(mask, 4) == CSRPattern([0, 0, 0, 1], [1], (10, 7), 4)
    assert build.covering(10, 7, 1.0, 4).density == 1
    assert "density 1" in repr(build.covering(10, 7, 1.0, 4))
    assert pattern_of([[0]], 1, 4).T.shape == (4, 4)
