"""CSRPattern: what it accepts, what it says of itself, and what it refuses."""

import copy
import gc
import pickle
import weakref
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import dense_of, integers, outside, patterns, untyped

from mlx_sparse_nn import CSRPattern, spmm, spmm_t

VALID: dict[str, Any] = dict(indptr=[0, 2, 3], indices=[0, 1, 1], shape=(4, 6), block_size=2)


@given(patterns())
def test_transpose_moves_every_block_and_back(pattern):
    data = integers(pattern.data_shape)
    moved = data[mx.array(pattern.transpose_perm)]
    moved = moved if pattern.block_size == 1 else moved.swapaxes(1, 2)
    assert mx.array_equal(dense_of(pattern.T, moved), dense_of(pattern, data).T)
    assert pattern.T.T is pattern
    back = pattern.transpose_perm[pattern.T.transpose_perm]
    assert np.array_equal(back, np.arange(pattern.n_blocks))


@given(patterns())
def test_counts_and_mask(pattern):
    mask = np.array(pattern.tomask())
    expected = np.array(dense_of(pattern, mx.ones(pattern.data_shape))) != 0
    assert np.array_equal(mask, expected)
    assert pattern.nnz == np.count_nonzero(~outside(pattern))
    assert pattern.is_canonical == (
        pattern.nnz == mask.sum() and all(np.all(np.diff(r) > 0) for r in _rows(pattern))
    )
    if pattern.is_canonical and mask.size:
        assert pattern.density == pytest.approx(mask.mean())


@given(patterns(), st.randoms(use_true_random=False))
def test_places_number_the_blocks_of_the_grid(pattern, random):
    """A pattern comes back from its places, and a shuffled grid is stored row by row."""
    filled = np.array(pattern.tomask())[:: pattern.block_size, :: pattern.block_size]
    assert pattern.grid == filled.shape
    assert pattern.n_places == filled.size
    assert np.array_equal(np.unique(pattern.places), np.flatnonzero(filled))
    assert pattern.places.dtype == np.int64
    sizes = pattern.shape, pattern.block_size
    assert CSRPattern.from_places(pattern.places, *sizes) == pattern
    places = pattern.places.tolist()
    random.shuffle(places)
    shuffled = CSRPattern.from_places(places, *sizes)
    assert np.array_equal(shuffled.indptr, pattern.indptr)
    n_cols = max(1, pattern.grid[1])
    in_order = [p % n_cols for row in range(pattern.grid[0]) for p in places if p // n_cols == row]
    assert shuffled.indices.tolist() == in_order
    assert CSRPattern.from_places(np.flatnonzero(filled), *sizes).is_canonical


def test_places_of_a_grid_past_32_bits():
    pattern = CSRPattern.from_places([2**40 + 3], (2**21, 2**21))
    assert (pattern.row_indices.tolist()[0], pattern.indices.tolist()[0]) == (2**19, 3)
    assert pattern.places.tolist() == [2**40 + 3]


@given(patterns())
def test_a_repeated_block_is_named(pattern):
    places = pattern.places.tolist()
    repeated = [j for j, place in enumerate(places) if place in places[:j]]
    if not repeated:
        pattern.check_unique("prune")
        return
    block = pattern.row_indices[repeated[0]], pattern.indices[repeated[0]]
    message = rf"^\[prune\] the pattern stores block \({block[0]}, {block[1]}\) more than once$"
    with pytest.raises(ValueError, match=message):
        pattern.check_unique("prune")


def _rows(pattern):
    return np.split(pattern.indices, pattern.indptr[1:-1])


@given(patterns(), patterns())
def test_equality_hash_and_pickle(a, b):
    assert a == pickle.loads(pickle.dumps(a))
    assert copy.deepcopy(a) is a
    assert hash(a) == hash(CSRPattern(a.indptr, a.indices, a.shape, a.block_size))
    same = (a.shape, a.block_size) == (b.shape, b.block_size) and (
        a.indptr.tolist() == b.indptr.tolist() and a.indices.tolist() == b.indices.tolist()
    )
    assert (a == b) is same
    assert a != "a pattern"


def test_it_cannot_be_changed():
    indices = np.array([0, 1, 1], dtype=np.int32)
    pattern = CSRPattern([0, 2, 3], indices, (4, 6), 2)
    indices[0] = 2
    assert pattern.indices[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        pattern.indices[0] = 2
    for held in (pattern.indices, pattern.indptr, pattern.T.indices, pattern.layout.cols.perm):
        if isinstance(held, np.ndarray):
            with pytest.raises(ValueError, match="WRITEABLE"):
                held.setflags(write=True)  # a product would read where it says
    with pytest.raises(AttributeError, match="shape"):
        untyped(pattern).shape = (2, 2)


@pytest.mark.parametrize("kind", [list, np.array, mx.array])
def test_indices_may_be_lists_numpy_or_mlx(kind):
    pattern = CSRPattern(kind([0, 2, 3]), kind([0, 1, 1]), (4, 6), 2)
    assert pattern == CSRPattern(**VALID)
    assert pattern.indices.dtype == pattern.indptr.dtype == np.int32


def test_a_dropped_pattern_goes_at_once():
    """No cycle keeps its arrays until Python's next collection: loops that build matrices would
    fill the memory."""
    gc.disable()
    try:
        pattern = CSRPattern([0, 2, 3], [0, 1, 1], (2, 2))
        data = mx.ones(3)
        mx.eval(mx.grad(lambda d, p=pattern: (spmm(d, p, mx.ones(2)) ** 2).sum())(data))
        mx.eval(spmm_t(data, pattern, mx.ones(2)), spmm(data, pattern.T, mx.ones(2)))
        gone = weakref.ref(pattern), weakref.ref(pattern.T), weakref.ref(pattern.layout)
        transposed = pattern.T
        del pattern
        assert gone[0]() is None
        assert CSRPattern([0, 2, 3], [0, 1, 1], (2, 2)) == transposed.T
        del transposed
        assert [reference() for reference in gone] == [None, None, None]
    finally:
        gc.enable()


def test_repr_tells_what_matters():
    assert repr(CSRPattern(**VALID)) == "CSRPattern(4 x 6, block_size=2, 3 blocks, density 0.5)"


def test_union_and_intersection():
    a = CSRPattern([0, 2, 2], [2, 0], (2, 3))
    b = CSRPattern([0, 1, 2], [2, 1], (2, 3))
    assert (a | b) == CSRPattern([0, 2, 3], [0, 2, 1], (2, 3))
    assert (a & b) == CSRPattern([0, 1, 1], [2], (2, 3))
    with pytest.raises(ValueError, match="sizes differ"):
        _ = a | CSRPattern(**VALID)


@given(patterns())
def test_union_with_itself_is_canonical(pattern):
    assert (pattern | pattern).is_canonical
    assert (pattern & pattern) == (pattern | pattern)
    assert mx.array_equal((pattern | pattern).tomask(), pattern.tomask())


BIG = np.broadcast_to(np.int32(0), (2**31,))  # one value seen 2**31 times: takes no memory

BAD = [
    (dict(indptr=[1, 2, 3]), ValueError, r"indptr must start at 0, got 1"),
    (dict(indptr=[0, 3, 2]), ValueError, r"indptr decreases from 3 to 2 at row 1"),
    (dict(indptr=[0, 2, 4]), ValueError, r"indptr must end at 3.* got 4"),
    (dict(indptr=[0, 3]), ValueError, r"indptr has 2 entries, expected 3"),
    (dict(indptr=[[0, 2, 3]] * 3), ValueError, r"indptr must be one-dimensional"),
    (dict(indptr=[0.0, 2.0, 3.0]), TypeError, r"indptr must be integers, got float64"),
    (dict(indices=[0, -1, 1]), ValueError, r"indices\[1\] is -1, outside \[0, 3\)"),
    (dict(indices=[0, 1, 3]), ValueError, r"indices\[2\] is 3, outside \[0, 3\)"),
    (dict(indices=[0.0, 1.0, 1.0]), TypeError, r"indices must be integers, got float64"),
    (dict(indices=[True, False, True]), TypeError, r"indices must be integers, got bool"),
    (dict(indices=[0, 2**31, 1]), ValueError, r"indices holds 2147483648.* 32 bits"),
    (dict(indices=np.array([0, 2**32, 1])), ValueError, r"indices holds 4294967296"),
    (dict(indices=np.array([2**63], dtype=np.uint64), indptr=[0, 1, 1]), ValueError, "32 bits"),
    (dict(indices=BIG), ValueError, r"2147483648 blocks of 2 x 2 .* at most 2\*\*31 - 1"),
    (dict(indices=BIG[: 2**30]), ValueError, r"at most 2\*\*31 - 1"),
    (dict(shape=(5, 6)), ValueError, "indptr has 3 entries, expected 4"),
    (dict(shape=(3, 1)), ValueError, r"indices\[1\] is 1, outside \[0, 1\)"),
    (dict(shape=(4, -6)), ValueError, r"n_cols must be in \[0, 2\*\*31 - 1\], got -6"),
    (dict(shape=(4, 2**31)), ValueError, r"n_cols must be in"),
    (dict(shape=(4.0, 6)), TypeError, r"n_rows must be an integer, got 4.0"),
    (dict(shape=(4, 6, 1)), ValueError, r"shape must be \(n_rows, n_cols\)"),
    (dict(shape=4), ValueError, r"shape must be \(n_rows, n_cols\), got 4"),
    (dict(block_size=0), ValueError, r"block_size must be in \[1"),
    (dict(block_size=2.0), TypeError, r"block_size must be an integer, got 2.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_patterns_are_refused(change, error, message):
    with pytest.raises(error, match=r"^\[CSRPattern\] .*" + message):
        CSRPattern(**{**VALID, **change})


BAD_PLACES = [
    ([0, 6], ValueError, r"places\[1\] is 6, outside \[0, 6\)"),
    ([-1], ValueError, r"places\[0\] is -1, outside \[0, 6\)"),
    ([0.0], TypeError, "places must be integers, got float64"),
    ([[0]], ValueError, r"places must be one-dimensional, got shape \(1, 1\)"),
    (np.array([2**63], np.uint64), ValueError, "places holds 9223372036854775808.* 64 bits"),
]


@pytest.mark.parametrize(("places", "error", "message"), BAD_PLACES)
def test_bad_places_are_refused(places, error, message):
    with pytest.raises(error, match=r"^\[CSRPattern.from_places\] " + message):
        CSRPattern.from_places(places, (4, 6), 2)
