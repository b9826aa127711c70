"""Plain MLX on the CPU: streams, steps, threads, buckets of rows, and the memory that it takes."""

import itertools
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    computing,
    dense_of,
    integers,
    pattern_of,
    patterns,
    random_pattern,
)

import mlx_sparse_nn
from mlx_sparse_nn import BlockSparseLinear, CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import plain, schedule
from mlx_sparse_nn.core.backends.buckets import buckets_of
from mlx_sparse_nn.core.layout import group_lengths


@pytest.fixture(autouse=True)
def _on_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    with computing(plain):
        yield
    mx.set_default_device(before)


@pytest.fixture
def split(monkeypatch):
    """Cut even small products into many steps, over three streams."""
    streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(2)]
    monkeypatch.setattr(tuned, "MIN_PARALLEL_MULTIPLIES", 0)
    monkeypatch.setattr(schedule, "_more_streams", lambda: streams)
    monkeypatch.setattr(tuned, "CPU_STEP_BYTES", 1024)


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
    monkeypatch.setattr(schedule, "_more_streams", lambda: pytest.fail("split"))
    products(EVEN, 4)


def even_pattern(size, block_size, density):
    """A random pattern of a square matrix whose rows are of one length, or two that differ by 1."""
    n, rng = size // block_size, np.random.default_rng(0)
    low, more = divmod(max(n, round(density * n * n)), n)
    columns = [rng.permutation(n)[: low + (row < more)] for row in range(n)]
    return pattern_of(columns, n, block_size)


def layout_bytes(pattern):
    """Bytes of all index arrays of a pattern, with what plain MLX derives of them."""
    sides = pattern.layout.rows, pattern.layout.cols
    derived = [side.keep(buckets_of) for side in sides]
    derived.append([sides[0].row_of_block])
    arrays = [a for group in derived for a in group if a is not None]
    return sum(side.nbytes for side in sides) + sum(a.nbytes for a in arrays)


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
    """The bound that ``core/backends/schedule.py`` states."""
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
def test_groups_pad_least(lengths, overhead):
    """Against every way to cut the sorted lengths."""
    groups = group_lengths(np.array(lengths), overhead)
    ordered, cuts = sorted(lengths), np.cumsum([0, *(group.n_block_rows for group in groups)])
    parts = [ordered[a:b] for a, b in itertools.pairwise(cuts)]
    assert cuts[-1] == len(lengths)
    assert [(g.longest, g.is_even) for g in groups] == [(max(p), min(p) == max(p)) for p in parts]
    cost = lambda parts: sum(max(part) * len(part) + overhead for part in parts)
    every = [
        np.split(ordered, [i + 1 for i in range(len(ordered) - 1) if bits >> i & 1])
        for bits in range(2 ** (len(ordered) - 1))
    ]
    assert cost(parts) == min(map(cost, every))


def test_groups_of_many_lengths():
    """Thousands of lengths are laid out in bounded time, with little padding."""
    lengths = np.random.default_rng(0).permutation(3000)
    groups = group_lengths(lengths, 4096)
    assert sum(group.n_block_rows for group in groups) == 3000
    assert sum(group.longest * group.n_block_rows for group in groups) < 1.1 * lengths.sum()


@given(patterns(block_sizes=(1, 8)), st.booleans())
def test_buckets_hold_every_block_once(pattern, transposed):
    """Each slot names a block and its column, or is empty; block-rows keep theirs together."""
    side = pattern.layout.cols if transposed else pattern.layout.rows
    whole = pattern.T if transposed else pattern
    buckets = side.keep(buckets_of)
    perm = np.arange(side.n_blocks) if side.perm is None else np.array(side.perm)
    columns = np.array(buckets.columns)
    blocks = perm if buckets.blocks is None else np.array(buckets.blocks)
    rows = np.arange(side.n_block_rows) if buckets.rows is None else np.array(buckets.rows)
    assert sorted(rows) == list(range(side.n_block_rows))
    slot = first_row = 0
    for n_rows, width, _ in side.groups:
        for row in rows[first_row : first_row + n_rows]:
            begin, end = whole.indptr[row], whole.indptr[row + 1]
            filled = slice(slot, slot + end - begin)
            assert columns[filled].tolist() == whole.indices[begin:end].tolist()
            assert blocks[filled].tolist() == perm[begin:end].tolist()
            empty = slice(filled.stop, slot + width)
            assert (columns[empty] == side.n_block_cols).all()
            assert (blocks[empty] == side.n_blocks).all()
            slot += width
        first_row += n_rows
    assert slot == columns.size


def test_a_forward_call_is_a_short_walk(monkeypatch):
    """Calls inside the package, and changes of file, of a default layer: what a reader follows."""
    package, calls = str(Path(mlx_sparse_nn.__file__).parent), []

    def note(frame, event, arg):
        code = frame.f_code  # operators of MLX defer to sparse arrays, once there was one
        is_ours = code.co_filename.startswith(package) and code.co_name != "deferring"
        if event == "call" and is_ours:
            calls.append(code.co_filename)

    helper = [mx.new_thread_local_stream(mx.cpu)]
    monkeypatch.setattr(schedule, "_n_streams", lambda: 2)  # on any machine
    monkeypatch.setattr(schedule, "_more_streams", lambda: helper)
    layer, x = BlockSparseLinear(256, 256, block_size=16), mx.ones((64, 256))
    mx.eval(layer(x), layer(x))
    sys.setprofile(note)
    layer(x)
    sys.setprofile(None)
    assert 20 < len(calls) <= 60
    assert sum(a != b for a, b in itertools.pairwise(calls)) <= 30
