"""Index arrays in C++: bit for bit NumPy's, the same errors, and no waiting for a compiler."""

import os
import subprocess
import sys
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, pattern_of, patterns, random_pattern

from mlx_sparse_nn import CSRPattern, coo_array, from_dense
from mlx_sparse_nn.core import index
from mlx_sparse_nn.core.backends import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="C++ is compiled on Linux")

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(scope="module")
def library():
    return index.Native(build.index())


@pytest.fixture
def both(library):
    """Compare what C++ and NumPy make of the same, errors included."""

    def both(make):
        results = []
        for native in (library, None):
            with mock.patch.object(index, "native", return_value=native):
                try:
                    results.append(make())
                except (TypeError, ValueError) as error:
                    results.append(f"{type(error).__name__}: {error}")
        found, expected = results
        same(found, expected)
        return found

    return both


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    elif isinstance(found, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def entries(n_rows, n_cols, n, seed, skewed=False):
    """Return entries in any order, some of them several times; or most in the first columns."""
    rng = np.random.default_rng(seed)
    power = 6 if skewed else 1
    rows, cols = ((rng.random(n) ** power * size).astype(np.int32) for size in (n_rows, n_cols))
    return rows, cols


# On both sides of each choice: few and many entries, rows and columns, and more rows than can be
# packed beside a column.
SIZES = [
    (0, 0, 0),
    (0, 7, 0),
    (7, 0, 0),
    (1, 1, 1),
    (5, 9, 40),
    (9000, 3, 20_000),
    (3, 9000, 20_000),
    (20_000, 70_000, 60_000),
    (70_000, 20_000, 60_000),
    (1_000_000, 3_000_000, 9000),
]


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("n_rows", "n_cols", "n"), SIZES)
def test_sorted_entries(both, n_rows, n_cols, n, skewed):
    rows, cols = entries(n_rows, n_cols, n, n, skewed)
    shape = (n_rows, n_cols)
    indptr, indices, places = both(lambda: index.sort_rows(rows, cols, shape))
    np.testing.assert_array_equal(places, np.argsort(rows, kind="stable"))
    np.testing.assert_array_equal(indices, cols[places])
    np.testing.assert_array_equal(both(lambda: index.rows_of(indptr)), rows[places])
    starts, _, perm = both(lambda: index.transpose(indptr, indices, n_cols))
    np.testing.assert_array_equal(perm, np.argsort(indices, kind="stable"))
    counts = np.bincount(indices, minlength=n_cols)
    np.testing.assert_array_equal(starts, np.concatenate([[0], np.cumsum(counts)]))
    _, _, places = both(lambda: index.sort_coordinates(rows, cols, shape))
    np.testing.assert_array_equal(places, np.lexsort((cols, rows)))


@given(patterns((1, 2)))
def test_patterns(both, pattern):
    """Repeated and unsorted columns, empty rows, no rows, no columns."""
    arrays, n_cols = (pattern.indptr, pattern.indices), pattern.grid[1]
    both(lambda: index.transpose(*arrays, n_cols))
    both(lambda: index.rows_of(pattern.indptr))
    canonical = all(
        np.all(np.diff(row) > 0) for row in np.split(pattern.indices, pattern.indptr[1:-1])
    )
    assert both(lambda: index.ascends(*arrays)) == canonical
    back = both(lambda: CSRPattern(*arrays, pattern.shape, pattern.block_size).T.T.host.transpose)
    same(back, pattern.host.transpose)
    inverse = both(lambda: CSRPattern(*arrays, pattern.shape, pattern.block_size).T.transpose_perm)
    np.testing.assert_array_equal(inverse[pattern.transpose_perm], np.arange(pattern.n_blocks))


@given(st.lists(INT32, max_size=9), st.lists(INT32, max_size=9), st.integers(0, 9))
def test_any_int32(both, indptr, indices, limit):
    indptr, indices = (np.array(values, np.int32) for values in ([0, *indptr], indices))
    both(lambda: index.rises(indptr, indices.size))
    both(lambda: index.in_range(indices, limit))
    both(lambda: CSRPattern(indptr, indices, (indptr.size - 1, limit)))


@given(
    st.lists(st.integers(0, 4), max_size=5),
    st.lists(st.integers(-1, 4), max_size=9),
    st.integers(0, 4),
    st.sampled_from([np.int8, np.int32, np.int64, ">i4", ">i8"]),
)
def test_nearly_right(both, steps, indices, limit, dtype):
    indptr = np.cumsum([0, *steps]).astype(dtype)
    indices = np.array(indices).astype(dtype)
    both(lambda: CSRPattern(indptr, indices, (indptr.size - 1, limit)))


@given(st.lists(INT64, max_size=5))
def test_any_int64(both, values):
    array = np.array(values, np.int64)
    both(lambda: index.copy_in_range(array))
    both(lambda: index.copy_in_range(np.repeat(array, 2)[::2]))
    both(lambda: CSRPattern([0, array.size], array, (1, 2**31 - 1)))
    both(lambda: coo_array((np.ones(array.size), (array, array)), (2**31 - 1, 2**31 - 1)).row)


@pytest.mark.parametrize("value", [-1, 5000, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("place", [0, 1023, 1024, 2047, 2999])
def test_one_wrong_value_of_many(both, value, place):
    """Loops look at many values at a time."""
    indices = np.full(3000, 4999, np.int64)
    assert both(lambda: CSRPattern([0, 3000], indices, (1, 5000))).n_blocks == 3000
    indices[place] = value
    assert str(value) in both(lambda: CSRPattern([0, 3000], indices, (1, 5000)))
    if -(2**31) <= value < 2**31:
        narrow = indices.astype(np.int32)
        assert f"indices[{place}]" in both(lambda: CSRPattern([0, 3000], narrow, (1, 5000)))


@pytest.mark.parametrize("row", [0, 1023, 1024, 2500])
def test_one_row_that_ends_before_it_begins(both, row):
    indptr = np.arange(3001, dtype=np.int32)
    indptr[row + 1] = row - 1 if row else -1
    error = both(lambda: CSRPattern(indptr, np.zeros(3000, np.int32), (3000, 1)))
    assert f"at row {row}" in error


def test_arrays(both):
    """What is made of patterns: merged, transposed, transposed back, and scalars of blocks."""
    rows, cols = entries(300, 200, 4000, 0)
    data = np.arange(4000, dtype=np.float32)

    def parts(A):
        return A.pattern.indptr, A.pattern.indices, np.array(A.data)

    def make():
        A = coo_array((data, (rows, cols)), (300, 200)).tocsr()
        unsorted = coo_array((data, (rows, cols)), (300, 200)).tocsr(canonical=False)
        blocks = from_dense(A.todense(), 10)
        return parts(A), parts(A.T), parts(A.T.T), parts(unsorted.T), parts(blocks.tocsr())

    indptr, indices, values = both(make)[0]
    dense = np.zeros((300, 200), np.float32)
    np.add.at(dense, (rows, cols), data)
    stored = np.repeat(np.arange(300), np.diff(indptr)), indices
    np.testing.assert_array_equal(values, dense[stored])
    assert dense.sum() == values.sum()


def test_a_pattern_has_arrays_of_its_own():
    """Nobody who writes into an array reaches the indices that products read."""
    for dtype in (np.int32, np.int64):
        indptr, indices = np.array([0, 2, 3], dtype), np.array([0, 2, 1], dtype)
        pattern = CSRPattern(indptr, indices, (2, 3))
        indptr[:] = indices[:] = 7
        assert pattern == CSRPattern([0, 2, 3], [0, 2, 1], (2, 3))
    device = pattern.layout.rows.indices
    device[0] = 9
    assert pattern.indices.tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match="read-only"):
        pattern.indices[0] = 5


def test_host_and_device_share_memory():
    pattern = pattern_of([[0, 2], [1]], 3, 1)
    shared = np.asarray(pattern.layout.rows.indices)
    assert np.shares_memory(shared, pattern.indices) == (not mx.cuda.is_available())


PATTERNS = """
import numpy as np
from mlx_sparse_nn import BlockSparseLinear, coo_array
from mlx_sparse_nn.core import index
A = coo_array((np.ones(3), ([1, 0, 1], [2, 1, 0])), (2, 3)).tocsr()
print(A.T.pattern.indices, A.T.data.tolist(), index.native())
BlockSparseLinear(64, 64)
"""


@pytest.mark.parametrize("cxx", ["false", "no-such-compiler", ""])
def test_a_pattern_waits_for_no_compiler(tmp_path, cxx):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PATTERNS],
        capture_output=True,
        text=True,
        env={**environment, "CXX": cxx},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[1 0 1] [1.0, 1.0, 1.0] None\n"
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_that_cannot_be_made():
    """Then there is no library, and no error."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME="/proc/none"):
        assert build.built_index() is None


@given(patterns(block_sizes=(1,)), st.integers(0, 7), st.integers(0, 5))
def test_unions_and_products_are_numpys(library, a, n_cols, seed):
    """The places and the order of what adds up, bit for bit."""
    same = random_pattern(a.shape[0], a.shape[1], 1, seed=seed)
    right = random_pattern(a.shape[1], n_cols, 1, seed=seed)
    found = []
    for native in (library, None):
        with mock.patch.object(index, "native", return_value=native):
            operand = a.indptr, a.indices
            united = index.unite(operand, (same.indptr, same.indices), a.shape[1])
            other = right.indptr, right.indices
            n_pairs = index.n_pairs(operand, other)
            product = index.multiply(operand, other, n_cols, n_pairs)
            pairs = index.pairs(operand, other, product, n_cols, n_pairs)
        assert pairs[1].size == pairs[2].size == n_pairs
        found.append([*united[0], united[1], *product, *pairs])
    for by_library, by_numpy in zip(*found, strict=True):
        assert by_library.dtype == by_numpy.dtype == np.int32
        assert np.array_equal(by_library, by_numpy)
