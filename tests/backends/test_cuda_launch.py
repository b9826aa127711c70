"""The host side of the CUDA backend, without a GPU: every launch is one that the card accepts,
costs MLX few operations, and follows all transforms although MLX knows no rule for a kernel.

The kernels themselves run on an emulator in ``test_cuda.py``, and on an NVIDIA GPU in
``make test-device``.
"""

import math
import re
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import in_full
from support import (
    ROOT,
    assert_equal,
    computing,
    computing_strings,
    dense_weight,
    fresh_launches,
    integers,
    pattern_of,
    random_pattern,
)

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, qspmm, qspmm_t, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.backends import (
    cuda,
    cuda_dense,
    cuda_tiles,
    pauli_cuda,
    pauli_plain,
    plain,
)
from mlx_sparse_nn.core.pauli import PauliTerms, pauli_product
from mlx_sparse_nn.core.transforms import transforming

# Bytes of shared memory that a thread block may have, by raising the limit.
SHARED_MEMORY = {"sm_90": 227 * 1024, "sm_80": 163 * 1024, "sm_89": 99 * 1024}


@pytest.fixture(params=["sm_90", "sm_80", "sm_89"])
def architecture(request):
    return request.param


@pytest.fixture
def launches(monkeypatch, architecture):
    """Record launches in place of ``mx.fast.cuda_kernel``, which needs a GPU."""
    recorded = []

    def cuda_kernel(name, input_names, output_names, source, header, shared_memory):
        assert len(source + header) < 1000  # MLX hashes it at every launch
        named = set(re.findall(r"\w+_(?:shape|strides|ndim)", source))
        source = in_full(source)
        of_inputs = rf"\b(?:{'|'.join(input_names)})_(?:shape|strides|ndim)\b"
        assert named == set(re.findall(of_inputs, source))  # MLX gives a kernel what it sees named

        def call(inputs, template, output_shapes, output_dtypes, grid, threadgroup):
            recorded.append((name, dict(template), grid, threadgroup, shared_memory, source))
            assert len(inputs) == len(input_names)
            assert "cluster_dims" not in header  # MLX replays graphs of clusters wrongly
            zeros = mx.zeros(output_shapes[0], output_dtypes[0])
            mx.eval(zeros)
            return [mx.depends(zeros, inputs)]  # one operation, as a launch is

        return call

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(cuda_tiles, "architecture", lambda: architecture)
    monkeypatch.setattr(cuda_tiles, "allows_tf32", lambda: True)
    with (
        fresh_launches(),
        computing(cuda, plain),
        computing_strings(pauli_cuda, pauli_plain),
    ):
        yield recorded


@pytest.mark.parametrize(
    "path", sorted((ROOT / "mlx_sparse_nn/cuda").glob("*.h")), ids=lambda path: path.name
)
def test_headers_are_read_once(path):
    """A kernel's body, which MLX puts into a function, names its headers a second time."""
    assert path.read_text().startswith("#pragma once\n")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8, 12, 16, 24, 32, 56, 64, 72, 80, 120, 128])
@pytest.mark.parametrize("n", [1, 7, 16, 40, 300, 5000])
def test_launches_are_valid(launches, architecture, block_size, dtype, n):
    pattern = CSRPattern(
        [0, 2, 2, 5], [1, 0, 2, 1, 0], (3 * block_size, 3 * block_size), block_size
    )
    data, x = mx.ones(pattern.data_shape, dtype), mx.ones((n, 3 * block_size), dtype)
    bias = mx.ones(3 * block_size, dtype)
    results = {
        "spmm": spmm(data, pattern, x, bias),
        "spmm_t": spmm_t(data, pattern, x),
        "sddmm": sddmm(pattern, x, x),
    }
    shapes = {"spmm": x.shape, "spmm_t": x.shape, "sddmm": pattern.data_shape}
    for name, result in results.items():
        assert tuple(result.shape) == tuple(shapes[name])
        assert result.dtype == dtype
    _check_launches(launches, architecture)
    assert launches


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 96, 128, 160])
@pytest.mark.parametrize("n", [1, 9, 17, 40, 300, 5000])
def test_quantized_launches_are_valid(launches, architecture, block_size, dtype, n):
    size = 3 * block_size
    pattern = CSRPattern([0, 2, 2, 5], [1, 0, 2, 1, 0], (size, size), block_size)
    matrix = mx.quantize(mx.ones(pattern.data_shape, dtype), 32, 4)
    x, bias = mx.ones((n, size), dtype), mx.ones(size, dtype)
    for y in (qspmm(*matrix, pattern, x, bias), qspmm_t(*matrix, pattern, x)):
        assert (y.shape, y.dtype) == (x.shape, dtype)
    _check_launches(launches, architecture)
    by_mlx = dtype == mx.float32 and block_size > 128 and n > 16
    assert bool(launches) is not by_mlx


@pytest.mark.parametrize("dtype", [mx.float32, mx.complex64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 13, 20])
def test_launches_of_pauli_strings_are_valid(launches, architecture, dtype, n):
    terms = PauliTerms(n, (1, 1 << n - 1), (0, 1))
    x, d = mx.ones((2, 1 << n), dtype), mx.ones(1 << n)
    for diagonal in (d, None):
        y = pauli_product(terms, mx.ones(2), diagonal, x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
    _check_launches(launches, architecture)
    assert len(launches) == 2


def _check_launches(launches, architecture):
    for name, template, grid, group, shared_memory, source in launches:
        assert all(g > 0 and g % t == 0 for g, t in zip(grid, group, strict=True)), name
        assert group[0] <= 1024
        assert shared_memory <= SHARED_MEMORY[architecture], name
        assert not re.search("wgmma|shares|slices", name) or architecture == "sm_90"
        used = set(re.findall(r"\b[A-Z][A-Z_]+\b|\bT\b|\bB\b", _code(source)))
        assert set(template) <= used, f"{name} is given {set(template) - used} and reads none of it"


@pytest.mark.parametrize("shape", [(512, 40), (4096, 11008), (11008, 4096), (8000, 1024)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 8, 12, 24, 128, 1000])
def test_launches_through_the_dense_matrix_are_valid(launches, block_size, dtype, shape):
    n_rows, n_cols = shape
    grid = -(-n_rows // block_size), -(-n_cols // block_size)
    layout = CSRPattern(
        np.minimum(3 * np.arange(grid[0] + 1), 3), np.zeros(3, np.int32), shape, block_size
    ).layout
    data = mx.ones(layout.data_shape, dtype)
    matrix = cuda_dense.expand(layout, data)
    assert matrix.shape == shape
    assert cuda_dense.sample(layout, matrix).shape == data.shape
    for name, template, grid, group, shared_memory, source in launches:
        assert all(g > 0 and g % t == 0 for g, t in zip(grid, group, strict=True)), name
        assert grid[1] < 2**16
        assert shared_memory <= 48 * 1024
        assert 1 <= template["HEIGHT"] <= block_size
        used = set(re.findall(r"\b[A-Z][A-Z_]+\b|\bT\b|\bB\b", _code(source)))
        assert set(template) <= used


def _code(source):
    return re.sub(r"//.*", "", source)


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.not_emulated("needs mx.compile")
def test_a_layer_call_is_few_operations(launches, tmp_path, n):
    """MLX takes microseconds for each: as much as a product of few rows takes on the GPU."""
    layer = BlockSparseLinear(64, 64, block_size=32, density=1.0)
    layer.set_dtype(mx.bfloat16)
    x = mx.ones((n, 64), mx.bfloat16)
    mx.eval(layer.parameters(), layer(x))
    graph = tmp_path / "call.dot"
    mx.export_to_dot(str(graph), layer(x))
    assert graph.read_text().count("shape=rectangle") == 1
    assert len(launches) == (1 if mx.default_device().type is mx.gpu else 2)  # where it is replayed


def test_a_launch_is_that_of_its_own_call(launches):
    """Launches are kept for each shape and dtype: no call may be given that of another."""
    calls = [
        (n, dtype, bias)
        for n in (1, 16, 17, 40, 300)
        for dtype in (mx.float16, mx.bfloat16)
        for bias in (None, mx.ones(64, dtype))
    ]
    pattern = CSRPattern([0, 1, 2], [0, 1], (64, 64), 32)
    for n, dtype, bias in calls * 2:
        y = spmm(mx.ones(pattern.data_shape, dtype), pattern, mx.ones((n, 64), dtype), bias)
        assert y.shape == (n, 64)
        assert y.dtype == dtype
        name, template, grid, *_ = next(launch for launch in launches[::-1] if "spmm" in launch[0])
        assert (template["T"], template["BIAS"]) == (dtype, bias is not None)
        assert (name == "mlx_sparse_nn_spmm_few") is (n <= 16)
        rows = template.get("ROWS", 16)
        assert (grid[1] - 1) * rows < n
    half = len(launches) // 2
    assert launches[:half] == launches[half:]


@pytest.mark.parametrize(
    ("row", "ordered"),
    [([1, 5, 9], True), ([1, 9, 5], False), ([1, 5, 5], False)],
    ids=["in order", "not in order", "repeated"],
)
def test_panels_are_for_blocks_in_order(launches, architecture, row, ordered):
    """Their kernels walk the columns once, and give each block of a column a place of its own."""
    pattern = pattern_of([row] * 128, 16, 16)
    data, x = mx.ones(pattern.data_shape, mx.bfloat16), mx.ones((2048, 256), mx.bfloat16)
    spmm(data, pattern, x)
    sddmm(pattern, mx.ones((2048, 2048), mx.bfloat16), x)
    panels = ordered and architecture == "sm_90"
    assert ["panels" in launch[0] for launch in launches][:2] == [panels, panels]


@pytest.mark.parametrize("full", [0, 1, 16, 64])
@pytest.mark.parametrize("architecture", ["sm_90"], indirect=True)
def test_a_panel_has_room_for_its_blocks(launches, full):
    """A thread block holds 128 blocks of 16 x 16: what is beyond them would be written anywhere."""
    lists = [[3]] * (64 - full) + [list(range(16))] * full
    pattern = pattern_of(lists, 16, 16)
    sddmm(pattern, mx.ones((512, 1024), mx.bfloat16), mx.ones((512, 256), mx.bfloat16))
    name, _, grid, group, *_ = launches[0]
    assert name == "mlx_sparse_nn_sddmm_panels"
    shares = grid[0] // group[0] // 4  # thread blocks of each of the 4 panels
    assert shares * 128 >= max(sum(map(len, lists[i : i + 16])) for i in range(0, 64, 16))


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("architecture", ["sm_90"], indirect=True)
def test_threads_follow_the_stored_values_of_a_graph(launches, n):
    """A power law: the longest of 10^6 rows, of 10^5 values, does not decide for the others."""
    lengths = np.maximum(1, 1e5 / np.arange(1, 10**6 + 1) ** 0.7).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.random.default_rng(0).integers(0, 10**6, indptr[-1], dtype=np.int32)
    pattern = CSRPattern(indptr, indices, (10**6, 10**6), 1)
    data, x = mx.ones(pattern.data_shape), mx.zeros((n, 10**6))
    for product in (lambda: spmm(data, pattern, x), lambda: sddmm(pattern, x, x)):
        launches.clear()
        product()
        assert sum(math.prod(launch[2]) for launch in launches) <= 2 * pattern.n_blocks * n


@pytest.mark.parametrize("architecture", ["sm_90"], indirect=True)
def test_a_long_row_among_8_million_fits_the_grid(launches):
    """Its 256 threads for each row made a TypeError of MLX's."""
    indptr = np.zeros(2**23 + 1, np.int32)
    indptr[6:] = 2049
    pattern = CSRPattern(indptr, np.arange(2049, dtype=np.int32), (2**23, 4096), 1)
    spmm(mx.ones(2049), pattern, mx.zeros((1, 4096)))
    sddmm(pattern, mx.zeros((1, 2**23)), mx.zeros((1, 4096)))
    assert len(launches) == 3
    assert all(max(launch[2]) < 2**31 for launch in launches)


@pytest.fixture
def opaque(monkeypatch):
    """Right products that MLX can neither differentiate nor map by itself, as kernels are."""

    def hidden(product):
        def compute(*operands):
            y = product(*operands)
            rows = mx.stack([mx.ones_like(y), y], axis=-1)[..., None, :]
            lu, _ = mx.linalg.lu_factor(rows, stream=mx.cpu)  # of a row that starts with 1: itself
            return lu[..., 0, 1]

        return compute

    for name in ("spmm", "spmm_t", "sddmm"):
        monkeypatch.setattr(cuda, name, hidden(getattr(plain, name)))
    with computing(cuda, plain):
        yield


def square(f):
    return lambda data, x: (f(data, x) ** 2).sum()


def grads(f):
    return mx.grad(square(f), argnums=(0, 1))


def tangents(f):
    return lambda data, x: mx.jvp(f, [data, x], [data + 1, x - 2])[1]


def compiled(f):
    """``f`` compiled, and called before a transform sees it."""
    compiled_f = mx.compile(f)
    return lambda data, x: compiled_f(data, x)


def after_inner_grad(f):
    """Call ``f`` when an inner transform has captured ``data`` and is over: MLX no longer marks
    ``data`` as traced, but the outer one goes on."""

    def loss(data, x):
        inner = mx.grad(lambda x: (f(data, x) ** 2).sum())(x)
        return (inner * x).sum() + (f(data, x) ** 2).sum()

    return mx.grad(loss, argnums=(0, 1))


TRANSFORMS = {
    "grad": grads,
    "jvp": tangents,
    "vmap of data": lambda f: lambda data, x: mx.vmap(f, (0, None))(mx.stack([data, -data]), x),
    "vmap of x": lambda f: lambda data, x: mx.vmap(f, (None, 0))(data, mx.stack([x, -x])),
    "grad of vmap": lambda f: grads(TRANSFORMS["vmap of x"](f)),
    "jvp of grad": lambda f: lambda data, x: mx.jvp(grads(f), [data, x], [data + 1, x - 2]),
    "grad of jvp": lambda f: (
        lambda data, x: mx.grad(lambda data: (TRANSFORMS["jvp"](f)(data, x)[0] ** 2).sum())(data)
    ),
    "grad of grad": lambda f: mx.grad(lambda d, x: sum((g**2).sum() for g in grads(f)(d, x))),
    "compile of grad": lambda f: mx.compile(grads(f)),
    "grad of checkpoint": lambda f: mx.grad(mx.checkpoint(square(f)), argnums=(0, 1)),
    "grad after inner grad": after_inner_grad,
}


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("first", [lambda f: f, compiled], ids=["plain", "compiled before"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_products_without_rules(opaque, name, first, block_size):
    pattern = random_pattern(3, 4, block_size, seed=1)
    data, x = integers(pattern.data_shape, 2), integers((2, pattern.shape[1]), 3)
    bias = integers(pattern.shape[:1], 4)

    def dense(data, x):
        return x @ dense_weight(pattern, data).T + bias

    f = first(lambda data, x: spmm(data, pattern, x, bias))
    assert_equal(f(data, x), dense(data, x))
    actual, expected = TRANSFORMS[name](f)(data, x), TRANSFORMS[name](dense)(data, x)
    for a, b in zip(flat(actual), flat(expected), strict=True):
        assert_equal(a, b)


def flat(tree):
    return [tree] if isinstance(tree, mx.array) else [a for branch in tree for a in flat(branch)]


@pytest.mark.not_emulated("needs mx.compile")
def test_transforming_is_of_this_thread_and_now():
    seen = []

    def note(x):
        seen.append(transforming())
        other = threading.Thread(target=lambda: seen.append(second_answer()))
        other.start()
        other.join()
        return x.sum()

    def second_answer():
        transforming()  # True in a thread that asks for the first time
        return transforming()

    x = mx.ones(3)
    assert second_answer() is False
    for transform in (mx.grad(note), mx.vmap(note), mx.compile(note)):
        transform(mx.stack([x, x]))
    mx.jvp(note, [x], [x])
    assert seen == [True, False] * 4
    assert transforming() is False
    with pytest.raises(ZeroDivisionError):
        mx.grad(lambda x: x / 0 if transforming() is False else 1 / 0)(x)
    assert transforming() is False


def test_a_thread_may_end_with_the_program():
    """What MLX has compiled in a thread waits for Python when the thread ends, and aborts where the
    interpreter is shutting down: a thread that called a layer must leave nothing behind."""
    script = """
import threading
import mlx.core as mx
from mlx_sparse_nn import BlockSparseLinear

layer, x = BlockSparseLinear(64, 64), mx.ones((2, 64))
mx.eval(layer(x), layer.parameters())
thread = threading.Thread(target=lambda: mx.eval(layer(x)))
thread.start()
thread.join()
"""
    for _ in range(5):
        subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("n_cols", "n", "by_columns"), [(64, 16, 0), (64, 64, 1), (2**16, 4, 1)])
def test_wide_rows_of_x_are_read_by_columns(launches, n_cols, n, by_columns):
    """A narrow x stays in the cache, and few rows of it are not worth a transposed copy."""
    pattern = CSRPattern([0, 1], [3], (1, n_cols))
    spmm(mx.ones(1), pattern, mx.ones((n, n_cols)))
    sddmm(pattern, mx.ones((n, 1)), mx.ones((n, n_cols)))
    assert [template["WIDTH"] > 1 for _, template, *_ in launches] == [by_columns] * 2


def test_weight_gradients_of_power_laws_fit_the_grid(launches):
    lengths = np.ones(100_000, np.int64)
    lengths[7] = 3000
    indptr, indices = np.r_[0, lengths.cumsum()], np.zeros(lengths.sum(), np.int64)
    indices[indptr[7] : indptr[8]] = range(3000)
    pattern = CSRPattern(indptr, indices, (800_000, 24_000), 8)
    sddmm(pattern, mx.zeros((17, 800_000)), mx.zeros((17, 24_000)))
    (_, _, grid, *_), *_ = launches
    assert grid[0] <= 64 * pattern.n_blocks * 8


@pytest.mark.parametrize(
    ("value", "allows"),
    [(None, True), ("1", True), (" 2", True), ("0", False), ("", False), ("off", False)],
)
def test_tf32_is_allowed_as_mlx_reads_its_variable(monkeypatch, value, allows):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if value is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", value)
    assert cuda_tiles.allows_tf32.__wrapped__() is allows
