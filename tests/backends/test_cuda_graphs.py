"""The CUDA kernels of large graphs, on the emulator: equal to the oracle, be rows what they may."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import emulated
from hypothesis import given
from hypothesis import strategies as st
from support import assert_equal, check_products, integers, pattern_of, patterns

from mlx_sparse_nn import CSRPattern, physics, sddmm, spmm
from mlx_sparse_nn.core import ops, tuned
from mlx_sparse_nn.core.backends import cuda_graphs, naive


def check(pattern, n, dtype=mx.float32, **settings):
    """Compare the three products with the oracle's, and return the names of the kernels."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    with emulated(**settings) as emulation:
        check_products(pattern, data, x, y, bias)
    return emulation.names


SMALL = tuned.GraphTile(items=64, row=4, piece=32)


@pytest.fixture
def small_is_large(monkeypatch):
    """Let a few values be a large graph, of many tiles, in which nobody looks for diagonals."""
    monkeypatch.setattr(tuned, "GRAPH_VALUES", 1)
    monkeypatch.setattr(tuned, "GATHERED_TILE", SMALL)
    monkeypatch.setattr(tuned, "COLUMNS_TILE", SMALL)
    monkeypatch.setattr(tuned, "NARROW_COLUMNS", 0)
    monkeypatch.setattr(tuned, "MAX_DIAGONALS", 0)


@pytest.fixture
def by_diagonals(small_is_large, monkeypatch):
    monkeypatch.setattr(tuned, "MAX_DIAGONALS", 300)


N_COLS = 190
RANDOM = np.random.default_rng(1)
LENGTHS = {
    "equal": np.full(75, 5),
    "uneven": RANDOM.integers(0, 33, 60),  # up to the longest that is not long
    "long": np.where(RANDOM.random(60) < 0.1, 150, RANDOM.integers(0, 9, 60)),
    "neighbours": np.array([0, 33, 32, 150, 0, 64, 100, 1, 0, 0]),
    "empty": np.r_[np.zeros(300, int), 3, np.zeros(300, int), 40, np.zeros(20, int)],
    "one": np.array([170]),
}
LONG = ("long", "neighbours", "empty", "one")


def with_lengths(kind):
    """Return a pattern of rows of these lengths: columns in no order, of which some repeat."""
    return pattern_of([RANDOM.integers(0, N_COLS, m) for m in LENGTHS[kind]], N_COLS, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 33, 64, 132])
@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_of_rows(small_is_large, kind, n):
    names = check(with_lengths(kind), n)
    assert ("spmm_columns" if n > tuned.GATHERED_COLUMNS else "spmm_gathered") in names
    assert ("spmm_pieces" in names) is (kind in LONG)
    assert names[-1] == "sddmm_places"


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 8, 24, 264])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_dtypes_and_places_in_memory(small_is_large, dtype, n, offset):
    """Vectors of values are loaded at once where they lie on a multiple of their bytes."""
    check(with_lengths("long"), n, dtype, offset=offset)


@given(pattern=patterns(block_sizes=(1,), fewest=1), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_drawn_patterns(small_is_large, pattern, n, seed):
    if pattern.n_blocks:
        check(pattern, n, seed=seed)


@pytest.mark.parametrize("n", [1, 5])
def test_several_matrices_of_one_pattern(small_is_large, n):
    pattern = with_lengths("long")
    data, x = integers((2, pattern.n_blocks), 1), integers((2, n, N_COLS), 2)
    y = integers((2, n, pattern.shape[0]), 3)
    with emulated() as emulation:
        found = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(found, naive.spmm(data, pattern, x))
        sampled = mx.vmap(lambda y, x: sddmm(pattern, y, x))(y, x)
        assert_equal(sampled, naive.sddmm(pattern, y, x))
    assert {"spmm_pieces", "sddmm_places"} <= set(emulation.names)


@pytest.mark.parametrize("kind", LENGTHS)
def test_every_value_lies_in_one_tile_or_piece(kind):
    pattern = with_lengths(kind)
    tiles, pieces = cuda_graphs.cut(pattern.indptr, SMALL)
    first, rows, begin, count, piece, end_piece = tiles.T
    assert np.array_equal(
        np.repeat(first, rows) + places_within(rows), np.arange(len(LENGTHS[kind]))
    )
    assert rows.max() <= SMALL.items / SMALL.row
    assert count.max() <= SMALL.items + SMALL.piece
    values = np.repeat(begin, count) + places_within(count)
    parts = np.repeat(pieces[:, 0], pieces[:, 1]) + places_within(pieces[:, 1])
    assert np.array_equal(np.sort(np.r_[values, parts]), np.arange(pattern.n_blocks))
    assert np.array_equal(
        np.sort(np.repeat(piece, end_piece - piece) + places_within(end_piece - piece)),
        np.arange(len(pieces)),
    )


def places_within(counts):
    """Return 0, 1, ... within each of runs of these lengths."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def test_index_arrays_that_may_be_tracers_are_not_looked_at(small_is_large):
    pattern = with_lengths("long")
    layout = pattern.layout.with_arrays(pattern.layout.rows.indices, pattern.layout.state())
    data, x = integers(pattern.data_shape, 1), integers((5, N_COLS), 2)
    with emulated() as emulation:
        assert_equal(ops.multiply(data, layout, x), naive.spmm(data, pattern, x))
    assert set(emulation.names) == {"spmm_csr"}


def test_tiles_fit_a_thread_block():
    """It has 256 threads, one for each row, and 48 KB of shared memory that nobody asks for."""
    for sizes in (tuned.GATHERED_TILE, tuned.COLUMNS_TILE):
        assert sizes.items <= 256 * sizes.row
        assert (sizes.items + sizes.piece) % 32 == 0
        assert sizes.items >= sizes.piece
    held = tuned.GATHERED_TILE.items + tuned.GATHERED_TILE.piece
    assert tuned.GATHERED_COLUMNS * held // 32 * 33 * 4 <= 48 * 1024


def banded(n_rows, n_cols, distances):
    """Return the pattern of these diagonals, as far as they lie in the matrix."""
    rows = [[r + d for d in distances if 0 <= r + d < n_cols] for r in range(n_rows)]
    return pattern_of(rows, n_cols, 1)


BANDS = {
    "tridiagonal": banded(200, 200, (-1, 0, 1)),
    "wide": banded(130, 333, (-70, 0, 201, 3, 3)),  # not in order, and one value twice
    "tall": banded(333, 130, (-201, -3, 0)),  # with empty rows
    "row": banded(1, 60, range(0, 60, 2)),
    "ising": physics.transverse_field_ising(7, 0.7).pattern,
}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", BANDS.values(), ids=BANDS)
def test_few_diagonals(by_diagonals, pattern, dtype, offset):
    assert "spmm_stream" in check(pattern, 1, dtype, offset=offset)
    assert cuda_graphs.diagonals(pattern.layout.rows) is not None


@pytest.mark.parametrize("n_diagonals", [1, 256, 257, 301])
def test_a_byte_names_a_diagonal(by_diagonals, n_diagonals):
    rng = np.random.default_rng(0)
    distances = rng.permutation(n_diagonals) - n_diagonals // 2
    rows = [[300 + r + d] for r, d in enumerate(distances)]
    pattern = pattern_of(rows, 900, 1)
    found = cuda_graphs.diagonals(pattern.layout.rows)
    assert (found is None) is (n_diagonals > 300)
    if found is not None and n_diagonals <= 256:
        ahead = np.array(found.ahead)[np.array(found.codes)]
        assert np.array_equal(pattern.row_indices + ahead, pattern.indices)
    elif found is not None:
        assert found.codes is None
    kernel = "spmm_gathered" if found is None else "spmm_stream"
    assert check(pattern, 1)[0] == kernel


def test_diagonals_of_several_matrices(by_diagonals):
    pattern = BANDS["wide"]
    data, x = integers((2, pattern.n_blocks), 1), integers((2, 1, pattern.shape[1]), 2)
    with emulated():
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))


@pytest.mark.not_emulated("needs mx.compile")
def test_diagonals_are_found_inside_of_a_transform(by_diagonals):
    pattern = CSRPattern(
        *(getattr(BANDS["ising"], name) for name in ("indptr", "indices", "shape"))
    )
    data, x = integers(pattern.data_shape, 1), integers((1, pattern.shape[1]), 2)
    found = []

    def product(x):
        found.append(cuda_graphs.diagonals(pattern.layout.rows))
        return x * 2

    mx.eval(mx.compile(product)(x), mx.grad(lambda x: product(x).sum())(x))
    assert found[0] is found[1]
    with emulated() as emulation:
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    assert emulation.names == ["spmm_stream"]
