"""Products of 16-bit blocks with some rows of x on Hopper, where thread blocks share rows."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from support import assert_equal, integers, pattern_of, random_pattern, spoiled, trimmed

from mlx_sparse_nn import patterns, spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_rows, naive

SHARES, SLICES = "spmm_shares", "spmm_slices"


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Let two thread blocks share every number of rows that a test has, of every block size."""
    monkeypatch.setattr(tuned, "SHARES", (2,))
    monkeypatch.setattr(tuned, "SHARED_ROWS", dict.fromkeys((16, 32, 64, 128), 256))
    monkeypatch.setattr(tuned, "SLICED", 2.0)  # of all blocks: never


@pytest.fixture
def sliced(monkeypatch):
    """Let thread blocks share a panel's columns, however few blocks it has."""
    monkeypatch.setattr(tuned, "SLICED", 0.0)


def check(pattern, n, dtype=mx.bfloat16, kernel=SHARES, **settings):
    """Compare both products with the oracle's, and return the emulation."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, data)
    with emulated(**settings) as emulation:
        assert_equal(spmm(data, pattern, x, bias), naive.spmm(data, pattern, x, bias))
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    assert emulation.conflicts == 0
    assert set(emulation.names) - {"sum_splits"} == {kernel}
    return emulation


@pytest.mark.parametrize(("n", "dtype"), [(17, mx.float16), (150, mx.bfloat16)])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_products(block_size, n, dtype):
    """The last tile is not full; block-rows have fewer blocks than thread blocks."""
    check(random_pattern(3, 5, block_size, density=0.7), n, dtype)


@pytest.mark.parametrize("filling", [1, 128])
@pytest.mark.parametrize("shares", [1, 2, 4])
@pytest.mark.parametrize("block_size", [16, 128])
def test_every_number_of_shares(monkeypatch, block_size, shares, filling):
    """Each share of a block-row may end in the middle of a stage, or hold nothing."""
    monkeypatch.setattr(tuned, "SHARES", (shares,))
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", filling)
    lengths = [0, 1, 9, 3]
    check(pattern_of([range(length) for length in lengths], 9, block_size), 40)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 1)])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_what_lies_outside_is_masked(block_size, cut, offset):
    """Whatever the weight holds there; inputs may begin anywhere."""
    pattern = trimmed(random_pattern(3, 5, block_size, density=0.9), cut, -cut)
    check(pattern, 40, offset=offset)


@pytest.mark.parametrize("block_size", [16, 64])
def test_blocks_in_any_order(block_size):
    """A block-column may come twice."""
    check(pattern_of([[4, 1, 3], [2, 2], [], [0, 5, 1, 5, 2]], 6, block_size), 20)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("block_size", [32, 64])
def test_long_block_rows(monkeypatch, block_size, seed):
    """There are more stages than a ring has."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 2)
    pattern = random_pattern(2, 1600 // block_size, block_size, density=0.9)
    check(pattern, 20, seed=seed)


def panel_pattern(kind):
    """Return a pattern of panels, of which the last one is not full, and of an odd number of
    stages."""
    rng = np.random.default_rng(3)
    mask = rng.random((25, 36)) < 0.5
    if kind == "uneven":
        mask[5], mask[6], mask[:, 20:30] = True, False, False
    if kind == "diagonal":
        mask = np.eye(25, 36, dtype=bool)
    return pattern_of(map(np.flatnonzero, mask), mask.shape[1], 16)


@pytest.mark.parametrize("n", [17, 70, 300])
@pytest.mark.parametrize("kind", ["even", "uneven", "diagonal"])
def test_slices(sliced, kind, n):
    check(panel_pattern(kind), n, kernel=SLICES)


@pytest.mark.parametrize(
    ("cut", "settings"), [(1, {}), (-5, {"offset": 1}), (0, {"offset": 1}), (0, {"seed": 2})]
)
def test_slices_of_any_input(sliced, cut, settings):
    """The weight holds anything outside of the matrix; inputs may begin anywhere."""
    check(trimmed(panel_pattern("even"), cut, -cut), 40, mx.float16, SLICES, **settings)


def test_slices_are_of_blocks_in_order(sliced):
    """They walk the columns once, and would leave out what comes too late."""
    check(pattern_of([[4, 1, 3], [2, 2]], 6, 16), 20, kernel=SHARES)


@pytest.mark.parametrize("n", [20, 140])
def test_several_matrices_of_one_pattern(n):
    pattern = random_pattern(3, 4, 32, density=0.7)
    data, x = (
        integers((2, *shape), i, mx.bfloat16)
        for i, shape in enumerate([pattern.data_shape, (n, pattern.shape[1])])
    )
    with emulated() as emulation:
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))
    assert emulation.names == [SHARES, "sum_splits"]


@pytest.mark.parametrize("n", [1, 16])
def test_gradients_of_few_rows(n):
    """Kernels of few rows do not multiply by a transpose: it had the time of 64 rows."""
    pattern = random_pattern(3, 4, 64, density=0.7)
    data, y = integers(pattern.data_shape, 1, mx.bfloat16), integers((n, 192), 2, mx.bfloat16)
    with emulated() as emulation:
        assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    assert emulation.names == [SHARES, "sum_splits"]


# Block size, rows of x and density, then rows of a tile and thread blocks of a block-row, which
# took an H100 the least time, or 7% more.
CHOICES = [
    ((16, 17, 0.1), (64, 1)),
    ((32, 128, 0.1), (128, 1)),
    ((32, 64, 0.5), (64, 2)),
    ((64, 64, 0.1), (64, 1)),
    ((64, 17, 0.5), (64, 4)),
    ((64, 96, 0.5), (128, 4)),
    ((64, 384, 0.2), (128, 1)),
    ((128, 64, 0.2), (64, 4)),
    ((128, 256, 0.5), (64, 1)),
]


@pytest.mark.parametrize(("sizes", "tile"), CHOICES)
def test_the_tile_of_the_least_time(monkeypatch, sizes, tile):
    """64 rows at 10%, B = 64, took 7.5 microseconds where one thread block takes 5.9."""
    monkeypatch.undo()
    block_size, n, density = sizes
    side = patterns.random(4096, 4096, density, block_size, seed=1).layout.rows
    some = block_size, block_size, 4096, False, side.n_blocks, side.longest_row
    kernel = cuda_rows.shares(n, 1, *some)
    assert (kernel.template["ROWS"], kernel.splits) == tile
    groups = kernel.grid[0] // kernel.threads * kernel.grid[1]
    if groups > 132:
        assert 2 * (kernel.shared_memory + 1024) < 228 * 1024  # two on a multiprocessor


FAULTS = {
    SHARES: [
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("wait_products<1>();", ""),
        ("copier.end();", "copier.ring.advance();"),
        ("describe(x_tile + tn * 64 * DEPTH + k, 16)", "describe(x_tile + tn * 64 * DEPTH, 16)"),
        ("(split + 1) / splits);", "split / splits);"),
    ],
    SLICES: [
        ("wait_copies<RING_PARTS - 1>();", ""),
        ("wait_barrier(empty + ring.buffer, ring.parity ^ 1);", ""),
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("BIAS && split == 0", "BIAS"),
    ],
}


@pytest.mark.parametrize(("kernel", "edit"), [(k, e) for k, edits in FAULTS.items() for e in edits])
def test_faults_are_found(monkeypatch, kernel, edit):
    """A barrier less, or a wrong place, does not pass."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 2)
    monkeypatch.setattr(tuned, "SLICED", 0.0 if kernel == SLICES else 2.0)
    block_size = 16 if kernel == SLICES else 32
    pattern = random_pattern(2, 1920 // block_size, block_size, density=1.0)
    data = integers(pattern.data_shape, 0, mx.bfloat16)
    x = integers((20, pattern.shape[1]), 1, mx.bfloat16)
    bias = integers((pattern.shape[0],), 2, mx.bfloat16)
    expected = naive.spmm(data, pattern, x, bias)
    with emulated(edit=edit) as emulation:
        try:
            y = spmm(data, pattern, x, bias)
        except CudaFault:
            y = None
    assert emulation.names[0] == kernel
    assert y is None or not mx.array_equal(y, expected)
