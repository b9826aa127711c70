"""Functions written to a file by mx.export_function, read again, and traced for every shape.

Data are small whole numbers, so that sums are exact and the comparison is for equality.
"""

import re
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_unflatten
from support import (
    ROOT,
    assert_close,
    assert_equal,
    backend,
    computing,
    device_of,
    flatten,
    fresh_launches,
    integers,
    random_pattern,
    spoiled,
    to_numpy,
    trimmed,
    untyped,
)

from mlx_sparse_nn import BlockSparseLinear, CSRArray, densify, sddmm, sparsify, spmm, spmm_t
from mlx_sparse_nn.core.backends import choose, cpu, dense, metal, plain
from mlx_sparse_nn.core.transforms import tracing

BLOCK_SIZES = (1, 8, 32)
every_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "function.mlxfn")


def whole_layer(block_size, dims=(96, 64), dtype=mx.float32):
    """A layer of whole numbers."""
    n_rows, n_cols = (dim // block_size for dim in dims)
    pattern = random_pattern(n_rows, n_cols, block_size, seed=block_size)
    layer = BlockSparseLinear(dims[1], dims[0], pattern=pattern)
    layer.weight, layer.bias = integers(pattern.data_shape), integers(dims[:1], 1)
    layer.set_dtype(dtype)
    return layer


def read(file, fun, *args, **kwargs) -> Any:
    """Export a function with these operands, and return what the file holds."""
    mx.export_function(file, fun, *args, **kwargs)
    return mx.import_function(file)


def check(file, fun, *args, **kwargs):
    """Assert that a file gives what the function gives."""
    actual, expected = read(file, fun, *args, **kwargs)(*args, **kwargs), fun(*args, **kwargs)
    expected = [expected] if isinstance(expected, mx.array) else expected
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)


def check_close(file, fun, *args, atol=1e-5):
    """Assert the same within rounding."""
    expected = fun(*args)
    expected = [expected] if isinstance(expected, mx.array) else expected
    for a, b in zip(read(file, fun, *args)(*args), expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert mx.allclose(a, b, atol=atol).item()


def operations(fun, *args, **kwargs):
    """Return the names of the operations that a file of the function holds."""
    names = []

    def note(part):
        if part["type"] == "primitive":
            names.append(part["name"])

    mx.export_function(note, fun, *args, **kwargs)
    return names


def gradients(model, x):
    """The loss of a model, and its gradients to all that it trains."""
    loss, grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).sum())(x)
    return [loss, *(grad for _, grad in sorted(flatten(grads)))]


class TestAFile:
    @every_block_size
    @pytest.mark.parametrize("shape", [(), (1,), (3,), (40,), (2, 5)])
    def test_of_a_layer(self, file, block_size, shape):
        check(file, whole_layer(block_size), integers((*shape, 64)))

    @every_block_size
    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_of_a_16_bit_layer(self, file, block_size, dtype):
        for n_x in (1, 40):
            check(file, whole_layer(block_size, dtype=dtype), integers((n_x, 64), dtype=dtype))

    @pytest.mark.parametrize("dtype", [mx.float64, mx.complex64])
    def test_of_scalars_of_every_dtype(self, file, dtype):
        pattern = random_pattern(9, 7, 1)
        with device_of(dtype):
            data, x = integers(pattern.data_shape, dtype=dtype), integers((3, 7), 1, dtype)
            check(file, lambda x: spmm(data, pattern, x), x)
            if dtype == mx.complex64:
                loss = lambda x: mx.abs(spmm(data, pattern, x)).sum()
                check_close(file, mx.grad(loss), x)

    @every_block_size
    def test_of_more_than_one_step(self, file, block_size):
        layer = BlockSparseLinear(1024, 512, block_size=block_size, density=0.2)
        check_close(file, layer, mx.random.normal((256, 1024)), atol=1e-4)

    @every_block_size
    def test_of_products_and_arrays(self, file, block_size):
        layer = whole_layer(block_size)
        pattern, data = layer.pattern, layer.weight
        A, x, y = CSRArray(data, pattern), integers((5, 64)), integers((5, 96), 1)
        check(file, lambda data, x: spmm(data, pattern, x), data, x)
        check(file, lambda data, y: spmm_t(data, pattern, y), data, y)
        check(file, lambda y, x: sddmm(pattern, y, x), y, x)
        check(file, lambda x: A @ x.T, x)
        check(file, lambda x: x @ A.T, x)
        check(file, lambda y: y @ A, y)
        check(file, lambda y: y @ (2 * A), y)
        check(file, lambda data: CSRArray(data, pattern).todense(), data)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32])
    @pytest.mark.parametrize("axis", [None, 0, 1])
    @pytest.mark.parametrize("name", ["max", "min"])
    def test_of_extremes(self, file, dtype, axis, name):
        pattern = random_pattern(9, 7, 1)
        data = integers(pattern.data_shape, dtype=dtype)  # with ties
        extreme = lambda data: getattr(CSRArray(data, pattern), name)(axis)
        check(file, extreme, data)
        if dtype != mx.int32:
            infinite = data.at[3].add(mx.array(-mx.inf, dtype))
            check(file, extreme, infinite)
            check(file, mx.grad(lambda data: (extreme(data) ** 2).sum()), data)
            direction = integers(data.shape, 1, dtype)
            check(file, lambda a, b: mx.jvp(extreme, [a], [b])[1][0], data, direction)

    @every_block_size
    def test_of_vmap(self, file, block_size):
        layer = whole_layer(block_size)
        pattern, data = layer.pattern, mx.stack([layer.weight, 2 * layer.weight])
        check(file, mx.vmap(layer), integers((2, 40, 64)))
        check(file, mx.vmap(lambda data, x: spmm(data, pattern, x)), data, integers((2, 3, 64)))

    @every_block_size
    @pytest.mark.parametrize("n_x", [1, 3, 40])
    def test_of_gradients(self, file, block_size, n_x):
        layer, x = whole_layer(block_size), integers((n_x, 64))
        loss = lambda x: (layer(x) ** 2).sum()
        check(file, mx.grad(loss), x)
        check(file, partial(gradients, layer), x)
        check(file, lambda x: mx.jvp(layer, [x], [x])[1], x)
        check(file, lambda x: mx.grad(lambda x: (mx.grad(loss)(x) ** 2).sum())(x) / 4, x)

    def test_of_16_bit_gradients(self, file):
        layer = whole_layer(8, dtype=mx.bfloat16)
        found = read(file, partial(gradients, layer), mx.ones((40, 64), mx.bfloat16))
        assert [a.dtype for a in found(mx.ones((40, 64), mx.bfloat16))] == [mx.bfloat16] * 3

    def test_of_quantized_layers_and_adapters(self, file):
        model = nn.Sequential(whole_layer(32), nn.ReLU(), whole_layer(32, (64, 96)))
        nn.quantize(model, group_size=32)
        first = model.layers[0] = model.layers[0].to_lora(r=4)
        first.lora_b = mx.random.normal(first.lora_b.shape)
        x = mx.random.normal((8, 64))
        check_close(file, model, x, atol=1e-2)
        model.freeze()
        first.unfreeze(keys=["lora_a", "lora_b"])
        expected = gradients(model, x)
        for a, b in zip(read(file, partial(gradients, model), x)(x), expected, strict=True):
            assert_close(a, to_numpy(b), 3 * 96 + 8, float(mx.abs(b).max()))  # three products, rows

    def test_of_a_transformer(self, file):
        block = nn.TransformerEncoderLayer(64, 4, 128)
        block.linear1 = untyped(BlockSparseLinear(64, 128, block_size=16, density=0.5))
        block.attention.query_proj = untyped(BlockSparseLinear(64, 64, block_size=1, density=0.5))
        mx.eval(block.parameters())
        check_close(file, lambda x: block.eval()(x, None), mx.random.normal((2, 7, 64)))

    def test_of_a_model_of_mlx_lm(self, file):
        llama = pytest.importorskip("mlx_lm.models.llama")
        config = {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-5,
            "vocab_size": 50,
        }
        model = llama.Model(llama.ModelArgs.from_dict(config))
        sparsify(model, density=0.5)
        mx.eval(model.parameters())
        check_close(file, model, mx.array([[3, 1, 4, 1]]), atol=1e-4)

    @pytest.mark.parametrize("training", [False, True])
    def test_of_a_compiled_function(self, file, training):
        model = nn.Sequential(whole_layer(8), nn.GELU(), whole_layer(1, (64, 96)))
        model.train(training)
        x = mx.random.normal((5, 64))
        compiled = mx.compile(model, inputs=model.state)
        check_close(file, compiled, x, atol=1e-4)
        assert mx.allclose(compiled(x), model(x), atol=1e-4).item()

    def test_of_a_training_step(self, file):
        """It takes the parameters and gives them, and so trains where no Python is."""
        model = nn.Sequential(BlockSparseLinear(64, 96, block_size=8), nn.ReLU(), whole_layer(32))
        model.layers[2] = BlockSparseLinear(96, 4, block_size=1, density=0.5)
        optimizer = optim.SGD(0.1)

        def step(x, **parameters):
            model.update(tree_unflatten(list(parameters.items())))
            loss, grads = nn.value_and_grad(model, lambda x: (model(x) ** 2).mean())(x)
            new = optimizer.apply_gradients(grads, model.trainable_parameters())
            return [loss, *(array for _, array in sorted(flatten(new)))]

        x, parameters = mx.random.normal((8, 64)), dict(flatten(model.trainable_parameters()))
        imported, losses = read(file, step, x, **parameters), []
        for _ in range(3):
            expected = step(x, **parameters)
            loss, *new = imported(x, **parameters)
            for a, b in zip([loss, *new], expected, strict=True):
                assert mx.allclose(a, b, atol=1e-5).item()
            parameters = dict(zip(sorted(parameters), new, strict=True))
            losses.append(loss.item())
        assert losses[2] < losses[0]

    def test_of_several_traces_holds_the_weights_once(self, file, tmp_path):
        layer = BlockSparseLinear(256, 256, block_size=32, density=0.5)
        with mx.exporter(file, layer) as exporter:
            for n_x in (1, 8, 40):
                exporter(mx.zeros((n_x, 256)))
        imported = untyped(mx.import_function(file))
        for n_x in (1, 8, 40):
            x = mx.random.normal((n_x, 256))
            assert mx.allclose(imported(x)[0], layer(x), atol=1e-5).item()
        assert (tmp_path / "function.mlxfn").stat().st_size < 1.5 * layer.weight.nbytes

    def test_of_weights_that_are_not_loaded_yet_or_lie_with_gaps(self, file, tmp_path):
        layer, x = whole_layer(8), integers((5, 64))
        layer.save_weights(str(tmp_path / "weights.safetensors"))
        layer.load_weights(str(tmp_path / "weights.safetensors"))
        check(file, layer, x)
        data = mx.contiguous(layer.weight.swapaxes(1, 2)).swapaxes(1, 2)
        check(file, lambda x: spmm(data, layer.pattern, x), x)

    def test_holds_operations_of_mlx_alone(self):
        """As another language reads it, which knows neither our C++ nor our rules."""
        layer, x = whole_layer(8), integers((40, 64))
        names = {*operations(layer, x), *operations(partial(gradients, layer), x)}
        assert not {"SparseProduct", "SampledSparseProduct", "CustomTransforms"} & names
        assert "Matmul" in names

    def test_is_of_plain_mlx_on_a_cpu_and_nothing_else_changes(self, file):
        layer, x, seen = whole_layer(8), integers((40, 64)), []

        def noting(x):
            seen.append(backend("spmm"))
            return layer(x)

        before = backend("spmm")
        mx.export_function(file, noting, x)
        with mx.exporter(file, noting) as exporter:
            exporter(x)
        if mx.default_device() == mx.cpu:
            assert seen == [plain, plain]
        with pytest.raises(ZeroDivisionError):
            mx.export_function(file, lambda x: x / (1 // 0), x)
        assert (backend("spmm"), tracing.graph) == (before, None)

    def test_of_a_product_that_was_made_before(self, file):
        layer = whole_layer(8)
        if backend("spmm") is not cpu:
            pytest.skip("no product here is an operation of ours")
        found, x = layer(integers((3, 64))), mx.ones((3, 96))
        for export in (mx.export_function, lambda file, fun, x: mx.exporter(file, fun)(x)):
            with pytest.raises(ValueError, match=r"^\[export_function\] .* call mx.eval on it"):
                export(file, lambda x: x + found, x)
        mx.eval(found)
        check(file, lambda x: x + found, x)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL
    ):
        exec(compile(code, "export.md", "exec"), names)
    assert names["loss"].item() < (names["model"](names["x"]) ** 2).mean().item()
    assert names["y"].shape == (100, 64)


class TestAFileOfKernels:
    """Metal kernels, which MLX writes to a file without running them."""

    @pytest.fixture(autouse=True)
    def on_metal(self):
        with computing(metal, plain), fresh_launches():
            yield

    @every_block_size
    def test_holds_them(self, block_size):
        assert "CustomKernel" in operations(whole_layer(block_size), integers((8, 64)))

    @every_block_size
    def test_holds_none_where_mlx_derives_or_maps_them(self, block_size):
        layer, x = whole_layer(block_size), integers((8, 64))
        loss = lambda x: layer(x).sum()
        for fun in (mx.grad(loss), partial(gradients, layer), mx.vmap(layer)):
            assert "CustomKernel" not in operations(fun, mx.stack([x]))
        assert "CustomKernel" in operations(layer, x)


def check_shapes(fun, *shapes, exact=True):
    """Assert that a function traced for every shape, at the first one, gives the same at others."""
    arrays = [integers(shape, i) for i, shape in enumerate(shapes)]
    compiled = mx.compile(fun, shapeless=True)
    compiled(arrays[0])
    for x in arrays:
        if exact:
            assert_equal(compiled(x), fun(x))
        assert mx.allclose(compiled(x), fun(x), rtol=1e-3, atol=1e-2).item()


class TestEveryShape:
    @every_block_size
    def test_of_a_compiled_layer(self, block_size):
        layer = whole_layer(block_size)
        check_shapes(layer, (4, 64), (1, 64), (9, 64))
        check_shapes(layer, (2, 4, 64), (3, 1, 64))
        check_shapes(layer, (64,))
        check_shapes(mx.grad(lambda x: (layer(x) ** 2).sum()), (4, 64), (9, 64))

    @every_block_size
    @pytest.mark.parametrize("shapes", [((4, 64), (9, 64)), ((2, 4, 64), (3, 1, 64))])
    def test_of_a_file(self, file, block_size, shapes):
        layer = whole_layer(block_size)
        x, other = map(integers, shapes)
        imported = read(file, layer, x, shapeless=True)
        assert_equal(imported(x)[0], layer(x))
        assert_equal(imported(other)[0], layer(other))

    @every_block_size
    def test_of_products(self, block_size):
        layer = whole_layer(block_size)
        pattern, data = layer.pattern, layer.weight
        A = CSRArray(data, pattern)
        check_shapes(lambda x: spmm(data, pattern, x), (4, 64), (9, 64))
        check_shapes(lambda y: spmm_t(data, pattern, y), (4, 96), (9, 96))
        check_shapes(lambda y: spmm_t(data, pattern, y), (2, 4, 96), (3, 9, 96))
        wide = mx.concatenate([mx.eye(64), mx.eye(64, 32)], axis=1)
        mx.eval(wide)
        check_shapes(lambda x: sddmm(pattern, x @ wide, x), (4, 64), (9, 64))
        check_shapes(lambda x: sddmm(pattern, x @ wide, x), (2, 4, 64), (3, 9, 64))
        check_shapes(lambda x: x @ A.T, (4, 64), (9, 64))
        check_shapes(lambda y: y @ A, (4, 96), (9, 96))

    def test_of_quantized_layers_and_adapters(self):
        layer = whole_layer(32).to_quantized(group_size=32, bits=4)
        adapted = layer.to_lora(r=4)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
        mx.eval(adapted.parameters())
        for module in (layer, adapted):
            check_shapes(module, (4, 64), (9, 64), exact=False)

    def test_of_metal_kernels_is_dense(self):
        with computing(metal, plain):
            names = operations(whole_layer(8), integers((8, 64)), shapeless=True)
        assert "Matmul" in names
        assert "CustomKernel" not in names

    @every_block_size
    def test_inside_of_another_trace_is_of_its_shapes(self, block_size):
        """A function of every shape in a training step: the step's shapes are known."""
        layer, x, seen = whole_layer(block_size), integers((5, 64)), []

        @partial(mx.compile, shapeless=True)
        def loss(x):
            seen.append(choose.choose("spmm", layer.pattern.layout, 5, mx.float32))
            return (layer(x) ** 2).sum()

        expected = gradients(layer, x)
        step = lambda x: nn.value_and_grad(layer, loss)(x)
        for f in (step, mx.compile(step, inputs=layer.state, outputs=layer.state)):
            value, grads = f(x)
            for a, b in zip([value, grads["bias"], grads["weight"]], expected, strict=True):
                assert_equal(a, b)
        assert dense not in seen

    @pytest.mark.not_emulated("needs mx.compile")
    def test_of_values_that_are_no_constants(self, file):
        layer, x = whole_layer(8), integers((4, 64))
        says = r"^\[spmm\] with shapeless=True, .* constants.* densify\(model\)"
        with pytest.raises(ValueError, match=says):
            mx.compile(partial(gradients, layer), shapeless=True)(x)
        product = lambda data, x: spmm(data, layer.pattern, x)
        with pytest.raises(ValueError, match=says):
            mx.compile(product, shapeless=True)(layer.weight, x)
        with pytest.raises(ValueError, match=says):
            mx.export_function(file, product, layer.weight, x, shapeless=True)
        assert_equal(mx.compile(product)(layer.weight, x), product(layer.weight, x))
        model = nn.Sequential(whole_layer(8))
        expected = gradients(model, x)
        densify(model)
        mx.eval(model.parameters())
        step = mx.compile(lambda x: gradients(model, x)[0], shapeless=True)
        assert_equal(step(x), expected[0])

    @pytest.mark.not_emulated("needs mx.compile")
    def test_notes_it_in_this_thread_and_trace_alone(self):
        seen = []
        mx.compile(lambda x: seen.append(tracing.graph) or x, shapeless=True)(mx.ones(3))
        mx.compile(lambda x: seen.append(tracing.graph) or x)(mx.ones(3))
        assert (seen, tracing.graph) == (["shapeless", None], None)


def test_a_layer_that_was_first_called_in_a_gradient(file):
    """What a backend keeps with the pattern is no part of that trace."""
    for transform in (mx.grad, mx.compile, mx.vmap):
        layer, x = BlockSparseLinear(96, 64, block_size=8, density=0.5), integers((40, 96))
        with computing(plain):
            mx.eval(transform(lambda x, layer=layer: (layer(x) ** 2).sum())(x))
            mx.export_function(file, layer, x, shapeless=True)
            assert mx.allclose(untyped(mx.import_function(file))(x)[0], layer(x), atol=1e-4)


class TestEdges:
    """Layers whose last blocks reach past the weight, with nans there."""

    def layer(self):
        pattern = trimmed(random_pattern(4, 3, 32, density=0.8, seed=2), 9, 22)  # 119 x 74
        layer = BlockSparseLinear(74, 119, pattern)
        layer.weight = spoiled(pattern, integers(pattern.data_shape, 1))
        layer.bias = integers((119,), 2)
        return layer

    @pytest.mark.parametrize("n", [1, 3, 40])
    def test_in_a_file(self, file, n):
        layer, x = self.layer(), integers((n, 74), 3)
        check(file, layer, x)
        check(file, mx.grad(lambda x: (layer(x) ** 2).sum()), x)
        check(file, lambda x: gradients(layer, x), x)
        check_close(file, layer.to_quantized(group_size=32, bits=4), x, atol=1e-3)

    def test_of_every_shape(self, file):
        layer, x = self.layer(), integers((40, 74), 4)
        expected = layer(x)
        assert_equal(mx.compile(layer, shapeless=True)(x), expected)
        mx.export_function(file, layer, integers((2, 74)), shapeless=True)
        assert_equal(untyped(mx.import_function(file))(x)[0], expected)
        loss = lambda x: (layer(x) ** 2).sum()
        gradient = mx.grad(loss)
        assert_equal(mx.compile(gradient, shapeless=True)(x), gradient(x))
