"""The CPU's kernels as MLX meets them: the oracle, laziness, streams, threads, memory, and exit.

What every backend must do (derivatives, vmap, compile) is in ``tests/core``, which runs on these
kernels where they are.
"""

import io
import os
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    ROOT,
    assert_equal,
    check_products,
    computing,
    dense_of,
    integers,
    outside,
    patterns,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import CSRArray, CSRPattern, qspmm, qspmm_t, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.backends import choose, cpu, naive, plain
from mlx_sparse_nn.core.quantized import BITS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="C++ kernels are for Linux")

not_with_cuda = pytest.mark.skipif(
    mx.cuda.is_available(),
    reason="MLX for CUDA counts memory otherwise, and survives no fork and no exit with work",
)
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@pytest.fixture(autouse=True)
def _on_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with computing(cpu):  # nothing else may compute here
        yield
    mx.set_default_device(before)


def operands(pattern, n, dtype=mx.float32, v=()):
    shapes = [pattern.data_shape, (n, pattern.shape[1]), (n, pattern.shape[0])]
    return [integers((*v, *shape), seed, dtype) for seed, shape in enumerate(shapes)]


@given(
    patterns(block_sizes=(1, 2, 3, 8, 20), whole=True),
    st.integers(1, 70),
    st.sampled_from([*FLOATS, mx.float64, mx.complex64]),
    st.sampled_from([(), (3,)]),
)
def test_kernels_are_the_oracle(pattern, n, dtype, v):
    """Every number of rows, and matrices that share a pattern."""
    if pattern.n_blocks == 0 or (dtype == mx.complex64 and pattern.block_size > 1):
        return
    data, x, y = operands(pattern, n, dtype, v)
    bias, layout, stored = integers(pattern.shape[:1], 4, dtype), pattern.layout, data
    if layout.has_edges:
        stored = spoiled(pattern, data)
    assert_equal(cpu.spmm(stored, layout, x, bias), naive.spmm(data, pattern, x, bias))
    assert_equal(cpu.spmm(stored, layout, x), naive.spmm(data, pattern, x))
    assert_equal(cpu.spmm_t(stored, layout, y), naive.spmm_t(data, pattern, y))
    assert_equal(cpu.sddmm(layout, y, x), naive.sddmm(pattern, y, x))


@pytest.mark.parametrize("dtype", [*FLOATS, mx.float64], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 12, 16, 32, 48, 64, 128])
def test_every_block_size_and_number_of_rows(block_size, dtype):
    n_blocks = 4 if block_size < 32 else 2  # the oracle is dense, by MLX's scalar BLAS
    pattern = random_pattern(n_blocks, 3, block_size, density=0.7)
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 129, 260):
        data, x, y = operands(pattern, n, dtype)
        check_products(pattern, data, x, y, integers(pattern.shape[:1], 4, dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, mx.float64], ids=str)
@pytest.mark.parametrize("block_size", [2, 4, 12, 16, 32, 48, 64, 128])
def test_blocks_may_reach_past_the_matrix(block_size, dtype):
    """Nobody reads what a weight holds there, and what is written has its true shape."""
    n_blocks = 4 if block_size < 32 else 2
    whole = random_pattern(n_blocks, 3, block_size, density=0.7)
    for below, behind in ((0, 1), (1, 0), (block_size // 2 + 1, block_size // 3), (-1, -1)):
        pattern = trimmed(whole, below, behind)
        for n in (1, 2, 4, 7, 21, 130):
            data, x, y = operands(pattern, n, dtype)
            bias = integers(pattern.shape[:1], 4, dtype)
            check_products(pattern, spoiled(pattern, data), x, y, bias)


@pytest.mark.parametrize("block_size", [2, 20, 32])
def test_gradients_are_zero_past_the_matrix(block_size):
    """Where y and x are not finite, too."""
    pattern = trimmed(random_pattern(4, 3, block_size, density=0.7), 1, 1)
    past = mx.array(outside(pattern))
    for dtype in FLOATS:
        for n in (1, 20, 300):
            shapes = [(n, size) for size in pattern.shape]
            y, x = (mx.full(shape, float("nan"), dtype) for shape in shapes)
            found = sddmm(pattern, y, x)
            assert_equal(mx.isnan(found), ~past)
            assert_equal(mx.where(past, found, 0), mx.zeros_like(found))


def test_results_are_contiguous_past_which_blocks_reach():
    pattern = trimmed(random_pattern(4, 3, 16, density=0.7), 5, 7)
    data, x, y = operands(pattern, 20)
    for result in (spmm(data, pattern, x), spmm_t(data, pattern, y)):
        assert np.array(result, copy=False).flags.c_contiguous
    columns = spmm(data, pattern, mx.contiguous(x.T).T)
    assert np.array(columns.T, copy=False).flags.c_contiguous


@not_with_cuda
def test_no_weight_is_copied_where_blocks_reach_past_the_matrix():
    pattern = trimmed(random_pattern(32, 32, 32, density=1), 9, 9)
    data, x, y = operands(pattern, 8)
    packed, scales, biases = mx.quantize(data, 32, 4)
    products = (
        lambda: spmm(data, pattern, x),
        lambda: spmm_t(data, pattern, y),
        lambda: qspmm(packed, scales, biases, pattern, x),
        lambda: qspmm_t(packed, scales, biases, pattern, y),
    )
    mx.eval(packed, scales, biases, [product() for product in products])
    for product in products:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(product())
        assert mx.get_peak_memory() - before < packed.nbytes / 2


VIEWS = {
    "a transpose": lambda a: mx.contiguous(a.T).T,
    "every second row": lambda a: mx.repeat(a, 2, axis=0)[::2],
    "every second column": lambda a: mx.repeat(a, 2, axis=1)[:, ::2],
    "at an offset": lambda a: mx.concatenate([mx.zeros_like(a[:1]), a])[1:],
    "within a row": lambda a: mx.concatenate([mx.zeros_like(a[:, :3]), a], axis=1)[:, 3:],
    "backwards": lambda a: mx.contiguous(a[::-1, ::-1])[::-1, ::-1],
    "one row for all": lambda a: mx.broadcast_to(a[:1], a.shape),
    "one column for all": lambda a: mx.broadcast_to(a[:, :1], a.shape),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("block_size", [1, 8, 12])
@pytest.mark.parametrize("n", [1, 5, 40])
def test_operands_lie_anyhow(view, block_size, n):
    whole = random_pattern(5, 4, block_size, density=0.6)
    for pattern in (whole, trimmed(whole, 3, 5)):
        for dtype in (mx.float32, mx.bfloat16):
            data, x, y = operands(pattern, n, dtype)
            x, y = view(x), view(y)
            mx.eval(x, y)
            check_products(pattern, data, x, y, integers(pattern.shape[:1], 4, dtype))


def test_stored_values_lie_anyhow():
    pattern = random_pattern(5, 4, 8, density=0.6)
    data, x, y = operands(pattern, 9)
    for view in (
        lambda a: mx.contiguous(a.swapaxes(1, 2)).swapaxes(1, 2),
        lambda a: mx.concatenate([a[:1], a])[1:],
        lambda a: mx.broadcast_to(a[:1], a.shape),
    ):
        seen = view(data)
        mx.eval(seen)
        check_products(pattern, seen, x, y, integers((2 * pattern.shape[0],), 4)[::2])


QUANTIZED = [(32, 32), (64, 32), (64, 64), (96, 32), (128, 128), (160, 32)]


def quantized(
    pattern: CSRPattern, bits: int, group_size: int, dtype=mx.float32
) -> tuple[mx.array, mx.array, mx.array]:
    """Packed integers of all bits; scales and biases that make them whole numbers, and nans where
    their groups lie past the matrix."""
    lead = (pattern.n_blocks, pattern.block_size)
    words = np.random.default_rng(bits).integers(
        0, 2**32, (*lead, pattern.block_size * bits // 32), dtype=np.uint32
    )
    scales = mx.sign(integers((*lead, pattern.block_size // group_size), bits, dtype))
    past = mx.array(outside(pattern)).reshape(*scales.shape, group_size).all(axis=-1)
    scales = mx.where(past, mx.array(np.nan, dtype), scales)
    return mx.array(words), scales, -scales


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("block_size", "group_size"), QUANTIZED)
def test_quantized_blocks_of_every_size_and_number_of_rows(block_size, group_size, bits, dtype):
    whole = random_pattern(3, 4, block_size, density=0.7, seed=bits)
    for pattern in (whole, trimmed(whole, block_size - 7, 1), trimmed(whole, 5, block_size - 1)):
        matrix, layout = quantized(pattern, bits, group_size, dtype), pattern.layout
        for n in (1, 2, 3, 5, 8, 9, 17, 24, 25, 33, 140):
            _, x, y = operands(pattern, n, dtype)
            bias = integers(pattern.shape[:1], 4, dtype)
            found = cpu.qspmm(*matrix, layout, x, bias)
            assert_equal(found, naive.qspmm(*matrix, pattern, x, bias))
            assert_equal(cpu.qspmm_t(*matrix, layout, y), naive.qspmm_t(*matrix, pattern, y))


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("n", [1, 5, 40])
def test_operands_of_quantized_blocks_lie_anyhow(view, n):
    pattern = trimmed(random_pattern(5, 4, 32, density=0.6), 9, 21)
    for dtype in (mx.float32, mx.bfloat16):
        packed, *affine = (mx.repeat(a, 2, axis=0)[::2] for a in quantized(pattern, 4, 32, dtype))
        matrix = packed, affine[0], affine[1]
        x, y = map(view, operands(pattern, n, dtype)[1:])
        bias = integers((2 * pattern.shape[0],), 4, dtype)[::2]
        mx.eval(matrix, x, y, bias)
        found = qspmm(*matrix, pattern, x, bias)
        assert_equal(found, naive.qspmm(*matrix, pattern, x, bias))
        assert_equal(qspmm_t(*matrix, pattern, y), naive.qspmm_t(*matrix, pattern, y))


@pytest.mark.parametrize("n", [1, 6, 40])
def test_quantized_products_are_bit_for_bit_the_same(n):
    """From run to run: on one thread or several, work is cut in whole block-rows."""
    pattern = trimmed(random_pattern(24, 24, 64, density=0.6), 3, 30)
    data = mx.random.normal(pattern.data_shape)
    packed, scales, biases = mx.quantize(data, 32, 5)
    y, x = (mx.random.normal((n, size)) for size in pattern.shape)
    first = qspmm(packed, scales, biases, pattern, x), qspmm_t(packed, scales, biases, pattern, y)
    for _ in range(5):
        assert_equal(qspmm(packed, scales, biases, pattern, x), first[0])
        assert_equal(qspmm_t(packed, scales, biases, pattern, y), first[1])


def test_results_have_the_order_of_x():
    """A @ X of sparse arrays: X by rows, which is x by columns, makes A @ X by rows."""
    pattern = random_pattern(30, 20, 1)
    data, x, _ = operands(pattern, 6)
    columns = mx.contiguous(x.T)
    y = spmm(data, pattern, columns.T)
    mx.eval(y)
    assert_equal(mx.contiguous(y), naive.spmm(data, pattern, x))
    assert_equal(y.T * 2, 2 * naive.spmm(data, pattern, x).T)
    assert np.array(y.T, copy=False).flags.c_contiguous


def test_the_transpose_of_one_row_needs_no_transpose():
    pattern = random_pattern(40, 30, 1)
    data, _, y = operands(pattern, 1)
    assert_equal(cpu.spmm_t(data, pattern.layout, y), naive.spmm_t(data, pattern, y))
    assert "cols" not in vars(pattern.layout)


@pytest.mark.parametrize("block_size", [1, 32])
def test_a_call_computes_nothing(block_size):
    """A product of a second and a half in plain MLX is made in microseconds."""
    n = 4096 // block_size
    pattern = random_pattern(n, n, block_size, density=0.3)
    data, x, y = operands(pattern, 256)
    mx.eval(data, x, y, spmm(data, pattern, x[:2]), spmm_t(data, pattern, y[:2]))
    mx.eval(sddmm(pattern, y[:2], x[:2]))
    start = time.perf_counter()
    results = [spmm(data, pattern, x), spmm_t(data, pattern, y), sddmm(pattern, y, x)]
    made = time.perf_counter() - start
    mx.async_eval(results)
    returned = time.perf_counter() - start
    mx.eval(results)
    assert made < 0.002
    assert returned < (time.perf_counter() - start) / 2


def test_streams_and_threads():
    """Products on several streams, one after another across them, and from threads of Python."""
    pattern = random_pattern(12, 12, 16, density=0.5)
    data, x, _ = operands(pattern, 50)
    expected = naive.spmm(data, pattern, x)
    mx.eval(data, x, expected)
    streams = [mx.new_stream(mx.cpu) for _ in range(4)]
    outs = []
    for _ in range(20):
        for stream in streams:
            with mx.stream(stream):
                outs.append(spmm(data, pattern, x))
    mx.eval(outs)
    for out in outs:
        assert_equal(out, expected)
    with mx.stream(streams[0]):
        first = spmm(data, pattern, x)
    with mx.stream(streams[1]):
        second = spmm_t(data, pattern, first)
    assert_equal(second, naive.spmm_t(data, pattern, expected))


THREADS = """
import threading, mlx.core as mx, numpy as np
from mlx_sparse_nn import patterns, spmm
from mlx_sparse_nn.core.backends import naive
mx.set_default_device(mx.cpu)
pattern = patterns.random(256, 256, 0.5, 16, seed=0)
data, x = mx.ones(pattern.data_shape), mx.ones((50, 256))
expected = np.array(naive.spmm(data, pattern, x))
mx.eval(data, x, spmm(data, pattern, x))
right = []

def work(i):
    with mx.stream(mx.new_stream(mx.cpu)):
        y = [spmm(data * i, pattern, x) for _ in range(50)]
        mx.eval(y)
        right.append(np.array_equal(np.array(y[-1]), expected * i))

threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(right)
"""
PENDING = """
import mlx.core as mx, sys
from mlx_sparse_nn import patterns, spmm
mx.set_default_device(mx.cpu)
pattern = patterns.random(2048, 2048, 0.5, 32, seed=0)
y = spmm(mx.ones(pattern.data_shape), pattern, mx.ones((2048, 2048)))
mx.async_eval(y)
print("begun", flush=True)
"""
INTERRUPTED = """
import mlx.core as mx, os, signal, threading
from mlx_sparse_nn import patterns, spmm
mx.set_default_device(mx.cpu)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
pattern = patterns.random(2048, 2048, 0.5, 32, seed=0)
data = mx.ones(pattern.data_shape)
mx.eval(spmm(data, pattern, mx.ones((1, 2048))))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        mx.eval(spmm(data, pattern, mx.ones((512, 2048))))
except KeyboardInterrupt:
    print("interrupted", spmm(data, pattern, mx.ones((1, 2048))).sum().item() > 0)
"""
FORKED = """
import mlx.core as mx, os
from mlx_sparse_nn import patterns, spmm
from mlx_sparse_nn.core.backends import cpu
mx.set_default_device(mx.cpu)
pattern = patterns.random(256, 256, 0.5, 16, seed=0)
data, x = mx.ones(pattern.data_shape), mx.ones((500, 256))
expected = spmm(data, pattern, x).sum().item()
child = os.fork()
if child == 0:
    with mx.stream(mx.new_stream(mx.cpu)):  # MLX's own thread stayed behind
        os._exit(0 if spmm(data, pattern, x).sum().item() == expected else 1)
print(os.waitpid(child, 0)[1])
"""
BITS = """
import mlx.core as mx, hashlib, sys
from mlx_sparse_nn import patterns, spmm, spmm_t, sddmm
mx.set_default_device(mx.cpu)
mx.random.seed(0)
digest = hashlib.sha256()
for block_size in (1, 16, 48):
    for size in (768, 763):
        pattern = patterns.random(size, size, 0.3, block_size, seed=1)
        data = mx.random.normal(pattern.data_shape)
        for n in (1, 3, 20, 300):
            x = mx.random.normal((n, size))
            for y in (spmm(data, pattern, x), spmm_t(data, pattern, x), sddmm(pattern, x, x)):
                digest.update(memoryview(y).tobytes())
print(digest.hexdigest())
"""


def run(code, cores=None):
    """Run Python anew; return the exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def test_threads_of_python():
    assert run(THREADS)[:2] == (0, "[True, True, True, True]\n")


@not_with_cuda
@pytest.mark.parametrize("end", ["", "sys.exit(3)", "import os; os._exit(4)"])
def test_exit_with_work_pending(end):
    status, out, errors = run(PENDING + end)
    assert (status, out, errors) == ({"": 0}.get(end, 3 if "sys" in end else 4), "begun\n", "")


def test_an_interrupt():
    assert run(INTERRUPTED) == (0, "interrupted True\n", "")


@not_with_cuda
def test_a_fork():
    """The pool's threads stay behind: the child makes its own."""
    assert run(FORKED)[:2] == (0, "0\n")


def test_the_same_bits_for_any_number_of_threads():
    cores = sorted(os.sched_getaffinity(0))
    results = [run(BITS, cores[:n]) for n in (1, len(cores))] + [run(BITS)]
    assert results[0][0] == 0, results[0][2]
    assert len({out for _, out, _ in results}) == 1


def test_the_same_bits_in_every_run():
    pattern = random_pattern(16, 16, 16, density=0.5)
    data = mx.random.normal(pattern.data_shape)
    x = mx.random.normal((100, pattern.shape[1]))
    first = spmm(data, pattern, x), spmm_t(data, pattern, x), sddmm(pattern, x, x)
    for _ in range(50):
        again = spmm(data, pattern, x), spmm_t(data, pattern, x), sddmm(pattern, x, x)
        for a, b in zip(first, again, strict=True):
            assert_equal(a, b)


MEMORY = """
import sys
import mlx.core as mx
from mlx_sparse_nn import patterns
from mlx_sparse_nn.core.backends import cpu, plain
mx.set_default_device(mx.cpu)

def peak(product, backend):
    mx.eval(product(backend))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = product(backend)
    mx.eval(result)
    return mx.get_peak_memory() - before - result.nbytes

for dtype in (mx.float32, mx.bfloat16):
    for block_size in (1, 8, 32, 48):
        pattern = patterns.random(768, 768, 0.25, block_size, seed=0)
        data = mx.ones(pattern.data_shape, dtype)
        for n in (1, 4, 16, 256, 2048):
            x = mx.ones((n, 768), dtype)
            mx.eval(data, x, pattern.layout.cols.indptr)
            products = {
                "spmm": lambda backend: backend.spmm(data, pattern.layout, x),
                "spmm_t": lambda backend: backend.spmm_t(data, pattern.layout, x),
                "sddmm": lambda backend: backend.sddmm(pattern.layout, x, x),
            }
            for name, product in products.items():
                ours, theirs = peak(product, cpu), peak(product, plain)
                if ours > max(theirs / 2, LEAST):
                    print(name, dtype, block_size, n, ours, theirs)
"""
LEAST = 64 * 1024  # bytes, up to which no peak is of interest


@not_with_cuda
def test_memory_is_at_most_half_of_plain_mlx():
    """Above operands and results, on two cores: each thread has scratch of its own."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert run(MEMORY.replace("LEAST", str(LEAST)), cores) == (0, "", "")


def test_nothing_is_left_behind():
    pattern = random_pattern(8, 8, 16, density=0.5)
    data, x, _ = operands(pattern, 64)
    mx.eval(spmm(data, pattern, x))
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(50):
        mx.eval(spmm(data, pattern, x))
    assert mx.get_active_memory() <= before


@pytest.mark.parametrize("block_size", [1, 8, 12])
@pytest.mark.parametrize("rows", [(20, 7, 1), (1, 20, 7)])
def test_shapeless_compile(block_size, rows):
    """One graph for all numbers of rows, whichever it was traced with."""
    pattern = trimmed(random_pattern(6, 5, block_size), 3, 2)
    data, x, y = operands(pattern, 20)
    layout = pattern.layout
    product = mx.compile(lambda x: cpu.spmm(data, layout, x * 2), shapeless=True)
    transposed = mx.compile(lambda y: cpu.spmm_t(data, layout, y), shapeless=True)
    sample = mx.compile(lambda y, x: cpu.sddmm(layout, y, x), shapeless=True)
    for n in rows:
        assert_equal(product(x[:n]), 2 * naive.spmm(data, pattern, x[:n]))
        assert_equal(transposed(y[:n]), naive.spmm_t(data, pattern, y[:n]))
        assert_equal(sample(y[:n], x[:n]), naive.sddmm(pattern, y[:n], x[:n]))


def test_compiled_products_that_are_the_same_are_one():
    """And those that differ in one operand, kernel or side are not."""
    pattern = random_pattern(5, 5, 8, density=0.5)
    data, x, _ = operands(pattern, 20)
    bias, layout = integers(pattern.shape[:1], 4), pattern.layout

    @mx.compile
    def products(data, x, bias):
        same = cpu.spmm(data, layout, x) - cpu.spmm(data, layout, x)
        return (
            same,
            cpu.spmm(data, layout, x),
            cpu.spmm(data, layout, x, bias),
            cpu.spmm_t(data, layout, x),
        )

    same, product, biased, transposed = products(data, x, bias)
    assert_equal(same, mx.zeros_like(same))
    assert_equal(product, naive.spmm(data, pattern, x))
    assert_equal(biased, naive.spmm(data, pattern, x, bias))
    assert_equal(transposed, naive.spmm_t(data, pattern, x))


def test_what_cannot_be_computed_is_left_to_plain_mlx():
    with computing(cpu, plain):
        pattern = random_pattern(3, 3, 8)
        assert choose.choose("spmm", pattern.layout, 4, mx.float32).NAME == "cpu"
        assert choose.choose("spmm", pattern.layout, 0, mx.float32).NAME == "plain"
        empty = CSRPattern([0, 0], [], (8, 8), 8)
        assert choose.choose("spmm", empty.layout, 4, mx.float32).NAME == "plain"


@pytest.mark.parametrize("axes", [(0, 0, None), (None, 1, None), (0, None, 0), (None, None, 0)])
@pytest.mark.parametrize("v", [(), (2,)])
@pytest.mark.parametrize("block_size", [1, 8])
def test_primitives_are_mapped(axes, v, block_size):
    """As MLX maps what it has traced, without the products' own rule: mx.checkpoint's graph."""
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), 3, 2)
    layout, m = pattern.layout, 3
    shapes = [(*v, *pattern.data_shape), (*v, 5, pattern.shape[1]), pattern.shape[:1]]
    mapped = lambda shape, axis: shape if axis is None else (*shape[:axis], m, *shape[axis:])
    data, x, bias = (
        integers(mapped(shape, axis), seed)
        for seed, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    )
    one = lambda a, axis, i: a if axis is None else mx.take(a, i, axis=axis)
    y = mx.vmap(lambda data, x, bias: cpu.spmm(data, layout, x, bias), axes)(data, x, bias)
    for i in range(m):
        each = [one(a, axis, i) for a, axis in zip((data, x, bias), axes, strict=True)]
        assert_equal(y[i], naive.spmm(each[0], pattern, *each[1:]))
    if axes[1] is not None:
        g = integers((*v, 5, pattern.shape[0]), 9)
        samples = mx.vmap(lambda x: cpu.sddmm(layout, g, x), axes[1])(x)
        for i in range(m):
            assert_equal(samples[i], naive.sddmm(pattern, g, one(x, axes[1], i)))


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize(
    "axes", [(0, None, None), (None, 0, None), (None, 1, 0), (1, 0, None), (0, 1, 1), (None, 0, 1)]
)
def test_the_primitive_of_a_vector_is_mapped(axes, block_size):
    """A vector is a row without the axis of rows: to MLX, and in what is mapped."""
    pattern, m = random_pattern(3, 4, block_size, density=0.7), 3
    shapes = [pattern.data_shape, pattern.shape[1:], pattern.shape[:1]]
    operands = [
        integers(shape if axis is None else (*shape[:axis], m, *shape[axis:]), seed)
        for seed, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    ]
    y = mx.vmap(lambda data, x, bias: cpu.spmm(data, pattern.layout, x, bias), axes)(*operands)
    assert y.shape == (m, pattern.shape[0])
    for i in range(m):
        data, x, bias = (
            a if axis is None else mx.take(a, i, axis=axis)
            for a, axis in zip(operands, axes, strict=True)
        )
        assert_equal(y[i], naive.spmm(data, pattern, x[None], bias).squeeze(0))


@pytest.mark.parametrize("dtype", [*FLOATS, mx.float64, mx.complex64], ids=str)
def test_a_vector_is_one_operation(dtype):
    """MLX takes microseconds for each: two views of it took as long as a small product."""
    pattern = random_pattern(40, 70, 1, density=0.1)
    data, x = integers(pattern.data_shape, 0, dtype), integers((70,), 1, dtype)
    mx.eval(data, x)
    y, drawn = CSRArray(data, pattern) @ x, io.StringIO()
    mx.export_to_dot(drawn, y)
    assert drawn.getvalue().count("shape=rectangle") == 1
    assert_equal(y, naive.spmm(data, pattern, x[None]).squeeze(0))
    strided = mx.stack([x, -x, x], axis=1)[:, 2]
    assert_equal(CSRArray(data, pattern) @ strided, y)


def test_a_checkpoint_is_mapped():
    pattern = random_pattern(3, 4, 8, density=0.7)
    data, x, _ = operands(pattern, 5)
    xs = mx.stack([x, 2 * x, -x])
    loss = mx.checkpoint(lambda x: spmm(data, pattern, x))
    assert_equal(mx.vmap(loss)(xs), naive.spmm(data, pattern, xs))
    gradient = mx.vmap(mx.grad(lambda x: (loss(x) ** 2).sum()))(xs)
    assert_equal(gradient, 2 * naive.spmm_t(data, pattern, naive.spmm(data, pattern, xs)))


def test_values_that_are_not_finite():
    """A nan reaches the rows that meet it, and no others."""
    for block_size in (1, 8, 32):
        pattern = random_pattern(4, 4, block_size, density=0.5)
        for n in (1, 20, 40):
            data, x, _ = operands(pattern, n)
            x[0, 0] = float("nan")
            data[0] = float("inf")
            dense = np.array(dense_of(pattern, data))
            with np.errstate(invalid="ignore"):
                touched = (dense != 0)[:, 0]
            y = np.array(spmm(data, pattern, x))
            assert np.isnan(y[0][touched]).all()
            clean = (dense != 0) & ~np.isinf(dense)
            rows = clean.any(axis=1) & ~np.isinf(dense).any(axis=1) & ~touched
            assert np.isfinite(y[:, rows]).all()
