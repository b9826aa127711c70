"""The CPU path: several streams, steps, threads, buckets of rows, and the memory that it takes."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import assert_equal, dense_of, integers, pattern_of, random_pattern

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core import layout as layouts
from mlx_sparse_nn.core.backends import schedule as steps


@pytest.fixture(autouse=True)
def _on_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def split(monkeypatch):
    """Cut even small products into many steps, over three streams."""
    streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(2)]
    monkeypatch.setattr(steps, "_SPLIT", 0)
    monkeypatch.setattr(steps, "_more_streams", lambda: streams)
    monkeypatch.setattr(steps, "_STEP", 1024)


def products(pattern, n, seed=0, lead=()):
    """The three products of random numbers, evaluated."""
    mx.random.seed(seed)
    data = mx.random.normal(pattern.data_shape)
    x, y = (mx.random.normal((*lead, n, size)) for size in pattern.shape[::-1])
    results = spmm(data, pattern, x), spmm_t(data, pattern, y), sddmm(pattern, y, x)
    mx.eval(results)
    return results


EVEN = CSRPattern(np.arange(13) * 3, np.arange(36) * 5 % 12, (96, 96), 8)
PATTERNS = {
    "even blocks": EVEN,
    "blocks": random_pattern(12, 10, 8, seed=1),
    "even scalars": CSRPattern(np.arange(41) * 5, np.arange(200) * 7 % 50, (40, 50)),
    "scalars": random_pattern(40, 50, 1, seed=2),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@every_pattern
@pytest.mark.parametrize("n", [1, 3, 40])
def test_streams_and_steps_change_no_bit(pattern, n, request):
    whole = products(pattern, n)
    request.getfixturevalue("split")
    for _ in range(5):
        for a, b in zip(products(pattern, n), whole, strict=True):
            assert_equal(a, b)


@every_pattern
@pytest.mark.usefixtures("split")
def test_every_transform_over_several_streams(pattern):
    data, xs = integers(pattern.data_shape, 1), integers((4, 5, pattern.shape[1]), 2)
    dense = dense_of(pattern, data)
    f = lambda data, x: (spmm(data, pattern, x) ** 2).sum()
    for step in (mx.grad(f, argnums=1), mx.compile(mx.grad(f, argnums=1))):
        assert_equal(step(data, xs), 2 * (xs @ dense.T) @ dense)
    mapped = mx.vmap(lambda x: mx.grad(f, argnums=1)(data, x))(xs)
    assert_equal(mapped, 2 * (xs @ dense.T) @ dense)


@pytest.mark.usefixtures("split")
def test_each_python_thread_may_multiply():
    """MLX's streams belong to the thread that made them; those that help must too."""
    expected, results = products(EVEN, 40), {}
    expected_ids = range(3)

    def work(i):
        data, x = integers(EVEN.data_shape, i), integers((40, 96), i + 10)
        y = spmm(data, EVEN, x)
        mx.eval(y)
        results[i] = (y, x @ dense_of(EVEN, data).T)
        mx.eval(results[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in expected_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(expected_ids)
    for actual, dense in results.values():
        assert_equal(actual, dense)
    for a, b in zip(products(EVEN, 40), expected, strict=True):
        assert_equal(a, b)


@pytest.mark.usefixtures("split")
def test_a_stream_of_the_user_is_respected():
    plain = products(EVEN, 40)
    with mx.stream(mx.new_stream(mx.cpu)):
        mine = products(EVEN, 40)
    for a, b in zip(mine, plain, strict=True):
        assert_equal(a, b)


def test_small_products_stay_on_one_stream(monkeypatch):
    """To wait for another thread takes longer than a small product."""
    monkeypatch.setattr(steps, "_more_streams", lambda: pytest.fail("split"))
    products(EVEN, 4)


def even_pattern(size, block_size, density):
    """A random pattern of a square matrix whose rows are of one length, or two that differ by 1."""
    n, rng = size // block_size, np.random.default_rng(0)
    low, more = divmod(max(n, round(density * n * n)), n)
    columns = [rng.permutation(n)[: low + (row < more)] for row in range(n)]
    return pattern_of(columns, n, block_size)


def layout_bytes(pattern):
    return sum(a.nbytes for half in pattern.layout.state().values() for a in half.values())


def memory(run, pattern, *inputs):
    """Bytes that pattern, inputs and results hold, and the peak of memory with them."""
    mx.eval(inputs, run())  # a pattern is laid out when it is first used
    peaks, held = [], layout_bytes(pattern) + sum(a.nbytes for a in inputs)
    for _ in range(3):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        results = run()
        mx.eval(results)
        peaks.append(mx.get_peak_memory() - before)
    return held + sum(a.nbytes for a in results), held + min(peaks)


def assert_memory(held, peak):
    """The bound that ``core/steps.py`` states."""
    most = 4 * max(held, 2**19)
    assert peak < most, f"{peak / 2**20:.1f} MB where {held / 2**20:.2f} MB are held"


LAYERS = [  # size, block_size, density, rows
    (1024, 1, 0.01, 256),
    (1024, 1, 0.1, 64),
    (1024, 1, 0.25, 16),
    (1024, 1, 0.5, 1),
    (1024, 4, 0.05, 256),
    (1024, 8, 0.5, 1),
    (1024, 16, 0.01, 1024),
    (1024, 32, 0.01, 256),
    (1024, 32, 0.1, 16),
    (1024, 64, 0.1, 256),
    (1024, 64, 0.5, 16),
    (1024, 64, 0.5, 256),
    (4096, 8, 0.1, 1),
    (4096, 32, 0.01, 1),
    (4096, 64, 0.1, 16),
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "block_size", "density", "rows"), LAYERS)
def test_memory_of_layers(size, block_size, density, rows, dtype):
    """What is gathered, and widened, is many times the operands; it must not be there at once."""
    pattern = even_pattern(size, block_size, density)
    layer = BlockSparseLinear(size, size, pattern, bias=False)
    weight = mx.zeros(pattern.data_shape, dtype)
    x, target = (mx.zeros((rows, size), dtype) for _ in range(2))
    layer.weight = weight
    assert_memory(*memory(lambda: [layer(x)], pattern, weight, x))

    def loss(weight, x):
        layer.weight = weight
        return (layer(x) * target).sum()

    step = mx.grad(loss, argnums=(0, 1))
    held, peak = memory(lambda: step(weight, x), pattern, weight, x, target)
    assert_memory(held + x.nbytes, peak)  # the output, which is as large as x, is not returned


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("n_products", [1, 2, 6])
def test_memory_of_wide_products(block_size, dtype, n_products):
    """What is gathered is several times the operands here, without the layout among them."""
    n_blocks = 512 // block_size
    mask = np.random.default_rng(0).random((n_blocks, n_blocks)) < 0.25
    pattern = pattern_of(map(np.flatnonzero, mask), n_blocks, block_size)
    data = [mx.zeros(pattern.data_shape, dtype) for _ in range(n_products)]
    x = [mx.zeros((1024, 512), dtype) for _ in range(n_products)]
    run = lambda: [spmm(data, pattern, x) for data, x in zip(data, x, strict=True)]
    held, peak = memory(run, pattern, *data, *x)
    layout = layout_bytes(pattern)
    assert peak - layout < 4 * (held - layout)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 12))
def test_buckets_pad_least(lengths, bucket):
    """Against every way to cut the sorted lengths."""
    lengths = np.array(lengths)
    groups = layouts._group(lengths, bucket)
    assert sorted(np.concatenate(groups)) == list(range(lengths.size))
    cost = lambda parts: sum(max(part) * len(part) + bucket for part in parts)
    ordered = sorted(lengths)
    cuts = [
        np.split(ordered, [i + 1 for i in range(len(ordered) - 1) if bits >> i & 1])
        for bits in range(2 ** (len(ordered) - 1))
    ]
    assert cost([lengths[group] for group in groups]) == min(map(cost, cuts))


def test_buckets_of_many_lengths():
    """Thousands of lengths are laid out in bounded time, with little padding."""
    lengths = np.random.default_rng(0).permutation(3000)
    groups = layouts._group(lengths, 4096)
    assert sorted(np.concatenate(groups)) == list(range(3000))
    padded = sum(lengths[group].max() * group.size for group in groups)
    assert padded < 1.1 * lengths.sum()
