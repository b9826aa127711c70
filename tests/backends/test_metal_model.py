"""A model on the Metal path: it trains on the emulator, and MLX traces its step lazily."""

import inspect
from pathlib import Path

import metal_emulator
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from support import apple_gpu, computing
from test_metal import BLOCK_SIZES, DTYPES

import mlx_sparse_nn
from mlx_sparse_nn import (
    BlockSparseLinear,
    CSRPattern,
    physics,
    qspmm,
    qspmm_t,
    sddmm,
    spmm,
    spmm_t,
)
from mlx_sparse_nn.core.backends import columns, metal_tiles, plain
from mlx_sparse_nn.core.backends import metal as backend
from mlx_sparse_nn.core.quantized import BITS


def make_model():
    return nn.Sequential(
        BlockSparseLinear(32, 64, block_size=16, density=0.4),
        nn.ReLU(),
        BlockSparseLinear(64, 32, block_size=8, density=0.3, bias=False),
        nn.RMSNorm(32),
        BlockSparseLinear(32, 8, block_size=4, density=0.5),
        BlockSparseLinear(8, 4, block_size=1, density=0.5),
    )


def train(steps=3):
    mx.random.seed(7)
    model, optimizer = make_model(), optim.AdamW(1e-2)
    x, target = mx.random.normal((20, 32)), mx.random.normal((20, 4))
    loss_and_grad = nn.value_and_grad(model, lambda x: ((model(x) - target) ** 2).mean())
    losses = []
    for _ in range(steps):
        loss, grads = loss_and_grad(x)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    return losses


def test_training_on_the_emulator_gives_the_losses_of_the_cpu(metal):
    on_metal = train()
    names = {launch.kernel for launch in metal.launches}
    with computing(plain):
        assert on_metal == pytest.approx(train(), rel=1e-5)
    assert len(names) == 4  # tiles and scalars, forward and weight gradient
    assert on_metal[-1] < on_metal[0]


def test_a_training_step_is_traced_through_mlx_without_values(tmp_path):
    """Loss and gradients, traced with MLX's own metal_kernel: nothing evaluates or needs the host.

    MLX's own export_function traces the whole step, and only then refuses to export it: it knows no
    state of a custom_function.
    """
    graph = tmp_path / "step.dot"
    with metal_emulator.metal_available():
        model = make_model()

        def step(x):
            value, grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
            outputs = [value, *(grad for _, grad in tree_flatten(grads))]
            mx.export_to_dot(str(graph), *outputs)
            return outputs

        with pytest.raises(ValueError, match="Unable to get state for primitive CustomTransforms"):
            inspect.unwrap(mx.export_function)(lambda _: None, step, mx.ones((20, 32)))
    # Four layers: forward and weight gradient of each, input gradient of all but the first.
    assert graph.read_text().count("CustomKernel") == 4 + 4 + 3


def test_a_step_through_a_quantized_layer_is_traced_too(tmp_path):
    graph = tmp_path / "step.dot"
    with metal_emulator.metal_available():
        layer = BlockSparseLinear(64, 96, density=0.5).to_quantized()

        def step(x):
            outputs = mx.value_and_grad(lambda x: (layer(x) ** 2).sum())(x)
            mx.export_to_dot(str(graph), *outputs)
            return outputs

        with pytest.raises(ValueError, match="Unable to get state for primitive CustomTransforms"):
            inspect.unwrap(mx.export_function)(lambda _: None, step, mx.ones((20, 64)))
    assert graph.read_text().count("CustomKernel") == 2


def quantized_products():
    """Every bits, dtype and kernel; test_metal_quantized.py compiles many more."""
    pattern = CSRPattern([0, 1, 3], [1, 0, 1], (64, 64), 32)
    for bits in BITS:
        for dtype, n in zip(DTYPES, (1, 8, 40), strict=True):
            matrix = mx.quantize(mx.ones(pattern.data_shape, dtype), 32, bits)
            x = mx.ones((n, 64), dtype)
            mx.eval(qspmm(*matrix, pattern, x, x[0]), qspmm_t(*matrix, pattern, x))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("n", [9, 17, 33, 65])
def test_every_block_size_has_a_tile_that_fits(n, itemsize):
    """Else a layer of that size would not compile on a Mac, or miss outputs."""
    for block_size in range(4, 400):
        tile = metal_tiles.product_tile(block_size, n, itemsize)
        rows, width, depth, simds_n, simds_o, simds_k = tile.values()
        filled = -(-block_size // 8) * 8
        threads = 32 * simds_n * simds_o * simds_k
        blocks = max(1, depth // filled)
        assert rows % (8 * simds_n) == width % (8 * simds_o) == depth % 8 == 0
        assert depth == blocks * filled or depth < filled
        assert threads % blocks == 0
        assert threads // blocks >= max(width, depth // blocks) // 8, "some columns go uncopied"
        assert (rows + width) * (depth + 8) <= 8192  # 16 KB in 16 bits
        # Partial sums of one row of 8 x 8 products lie where the stage did.
        stage = min(width * (depth + 8), depth * (width + 8)) + rows * (depth + 8)
        assert (simds_k - 1) * simds_n * width * 32 <= stage * itemsize


def test_every_variant_compiles_from_the_source_that_mlx_would_compile(metal):
    """Each launch compiles MLX's own text: signature, attributes and template arguments."""
    seen = set()
    for dtype in DTYPES:
        for block_size in BLOCK_SIZES:
            for n in (1, 12) if block_size > 32 else (1, 3, 12, 20, 40):
                pattern = CSRPattern(
                    [0, 1, 3], [1, 0, 1], (2 * block_size, 2 * block_size), block_size
                )
                x = mx.ones((n, 2 * block_size), dtype)
                data, bias = mx.ones(pattern.data_shape, dtype), mx.ones(2 * block_size, dtype)
                mx.eval(
                    spmm(data, pattern, x, bias),
                    spmm(data, pattern, x),
                    spmm_t(data, pattern, x),
                    sddmm(pattern, x, x),
                )
    mx.eval(sddmm(CSRPattern([0, 1], [0], (1, 1)), mx.ones((1030, 1)), mx.ones((1030, 1))))
    pattern = CSRPattern([0, 1], [0], (16, 16), 16)
    with apple_gpu(), backend.tensor_units():
        mx.eval(
            spmm(mx.ones(pattern.data_shape, mx.float16), pattern, mx.ones((17, 16), mx.float16))
        )
    quantized_products()
    energy = lambda field: physics.IsingOperator(4, field) @ mx.ones(16)
    mx.eval(mx.vjp(energy, [mx.ones(4)], [mx.ones(16)]))
    basis, x, square = mx.ones((1, 2, 32)), mx.ones((1, 1, 32)), mx.ones(1)
    dots = columns.recur_dot("metal", x, x, x, square)
    mx.eval(
        *columns.recur_rest("metal", x, x, x, square, dots),
        *columns.without("metal", basis, 2, x, x),
        columns.combine("metal", basis, 1, mx.ones((1, 1))),
    )
    for launch in metal.launches:
        assert f"void custom_kernel_{launch.kernel}" in launch.source
        assert "[[kernel]]" in launch.source
        seen.add(launch.kernel.removeprefix("mlx_sparse_nn_"))
    folder = Path(mlx_sparse_nn.__file__).parent / "metal"
    assert seen == {path.stem for path in folder.glob("*.metal")}
