"""Scores of blocks and the choice of the strongest, against NumPy and a plain loop."""

import functools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import integers, patterns, to_numpy, tolerance, untyped

from mlx_sparse_nn.core.scores import (
    BlockPlaces,
    block_scores,
    blocks_for,
    grid_scores,
    share_by_score,
    split_blocks,
    strongest_pattern,
    strongest_positions,
)


def scores_of(blocks, score: Any = "l2", **options):
    """Scores of blocks that lie in one block-row."""
    n_blocks, size = blocks.shape[0], blocks.shape[-1] if blocks.ndim == 3 else 1
    places = lambda: BlockPlaces.of_grid("here", (size, n_blocks * size), size)
    return block_scores(blocks, score, places, **options)


NUMPY = {
    "l1": lambda b: np.abs(b).sum(axis=(1, 2)),
    "l2": lambda b: np.sqrt((b**2).sum(axis=(1, 2))),
    "max": lambda b: np.abs(b).max(axis=(1, 2)),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("score", NUMPY)
@pytest.mark.parametrize("block", [1, 3, 8])
def test_norms_are_numpys(score, block, dtype):
    blocks = mx.random.normal((7, block, block)).astype(dtype)
    expected = NUMPY[score](to_numpy(blocks))
    actual = scores_of(blocks, score)
    assert actual.dtype == np.float64
    assert np.all(np.abs(actual - expected) <= tolerance(mx.float32, block**2, expected))
    if block == 1:
        assert np.array_equal(scores_of(blocks.reshape(-1), score), actual)


def test_16_bit_blocks_do_not_overflow():
    """The sum of squares of a float16 block of 300 is above 65504."""
    assert scores_of(mx.full((2, 4, 4), 300, mx.float16)).tolist() == [1200, 1200]


def test_a_function_sees_float32_blocks_and_may_be_numpys():
    blocks = integers((5, 2, 2), 1, mx.bfloat16)
    seen = []

    def corner(b):
        seen.append((b.shape, b.dtype))
        return b[:, 0, 0].astype(mx.bfloat16)

    assert scores_of(blocks, corner).tolist() == to_numpy(blocks)[:, 0, 0].tolist()
    assert seen == [((5, 2, 2), mx.float32)]
    assert scores_of(blocks, lambda b: np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert scores_of(mx.zeros((3,)), lambda b: b.sum(axis=(1, 2))).shape == (3,)


def test_no_blocks_have_no_scores():
    assert scores_of(mx.zeros((0, 4, 4)), "max").shape == (0,)


def test_the_grid_is_that_of_the_weight():
    weight = integers((6, 10), 2)
    blocks = split_blocks(weight, 2)
    assert blocks.shape == (3, 5, 2, 2)
    assert blocks[2, 1].tolist() == weight[4:6, 2:4].tolist()
    places = lambda: BlockPlaces.of_grid("", weight.shape, 2)
    assert grid_scores(weight, 2, "l1", places)[2, 1] == mx.abs(weight[4:6, 2:4]).sum().item()


@st.composite
def candidates(draw):
    rows = sorted(draw(st.lists(st.integers(0, 5), max_size=20)))
    scores = [draw(st.integers(-2, 3)) for _ in rows]  # few values: many ties
    return np.array(scores, dtype=np.float64), np.array(rows, dtype=np.int64)


@given(candidates(), st.data())
def test_strongest_is_what_a_plain_loop_takes(candidates, data):
    scores, rows = candidates
    count = data.draw(st.integers(0, scores.size))
    best_first = sorted(range(scores.size), key=lambda j: (-scores[j], j))
    assert strongest_positions(scores, rows, count, "global").tolist() == sorted(best_first[:count])

    queues = {row: [j for j in best_first if rows[j] == row] for row in set(rows.tolist())}
    kept = []
    while len(kept) < count:
        heads = sorted((q.pop(0) for q in queues.values() if q), key=lambda j: (-scores[j], j))
        kept += heads[: count - len(kept)]
    assert strongest_positions(scores, rows, count, "row").tolist() == sorted(kept)


@given(st.integers(1, 6), st.integers(1, 6), st.data(), st.integers(0, 99))
def test_rows_of_a_full_grid_are_balanced(n_rows, n_cols, data, seed):
    scores = np.random.default_rng(seed).random((n_rows, n_cols))
    count = data.draw(st.integers(0, n_rows * n_cols))
    shape = (4 * n_rows - min(n_rows, 1), 4 * n_cols)
    pattern = strongest_pattern(scores, count, shape, 4)
    assert pattern.shape == shape
    assert pattern.n_blocks == count
    assert pattern.is_canonical
    assert np.ptp(np.diff(pattern.indptr)) <= 1
    kept = np.zeros_like(scores, dtype=bool)
    kept[pattern.row_indices, pattern.indices] = True
    for row, keep in zip(scores, kept, strict=True):
        assert keep.all() or not keep.any() or row[keep].min() > row[~keep].max()


def test_extra_blocks_go_to_the_rows_with_the_strongest_next_one():
    scores = np.array([[9.0, 1.0], [8.0, 3.0], [7.0, 2.0]])
    pattern = strongest_pattern(scores, 4, (3, 2), 1)
    assert np.diff(pattern.indptr).tolist() == [1, 2, 1]


def test_ties_keep_the_lowest_positions():
    rows = np.repeat(np.arange(3), 3)
    assert strongest_positions(np.zeros(9), rows, 4, "global").tolist() == [0, 1, 2, 3]
    assert strongest_positions(np.zeros(9), rows, 4, "row").tolist() == [0, 1, 3, 6]


def test_a_row_or_column_may_get_nothing_under_global():
    scores = np.array([[5.0, 4.0, 0.0], [1.0, 0.0, 0.0]])
    pattern = strongest_pattern(scores, 2, (4, 6), 2, "global")
    assert pattern.indptr.tolist() == [0, 2, 2]
    assert pattern.indices.tolist() == [0, 1]


@pytest.mark.parametrize(("density", "places", "count"), [(0.1, 100, 10), (0.01, 4, 1), (1, 7, 7)])
def test_a_density_keeps_at_least_one_block(density, places, count):
    assert blocks_for(density, places) == count


class TestPlaces:
    """A score of two arguments learns which layer the blocks are of, and where they lie."""

    def test_it_is_told_by_what_the_function_needs(self):
        blocks, seen = mx.ones((3, 2, 2)), []

        def score(blocks, places, power=1):
            seen.append(places)
            return places.cols**power

        assert scores_of(blocks, score).tolist() == [0, 1, 2]
        assert (seen[0].path, seen[0].shape, seen[0].block_size) == ("here", (2, 6), 2)
        assert seen[0].rows.tolist() == [0, 0, 0]
        assert scores_of(blocks, functools.partial(score, power=2)).tolist() == [0, 1, 4]
        alone = lambda blocks, scale=3: scale * blocks[:, 0, 0]  # as closures in loops are written
        assert scores_of(blocks, alone).tolist() == [3, 3, 3]

    @given(patterns(fewest=1))
    def test_the_places_of_a_pattern_and_of_a_grid(self, pattern):
        places = BlockPlaces.of_pattern("a", pattern)
        width = pattern.grid[1]
        assert (places.rows * width + places.cols).tolist() == pattern.places.tolist()
        grid = BlockPlaces.of_grid("a", pattern.shape, pattern.block_size)
        assert (grid.rows * width + grid.cols).tolist() == list(range(pattern.n_places))
        some = BlockPlaces.of_grid("a", pattern.shape, pattern.block_size, range(1, 99))
        assert some.rows.tolist() == grid.rows[width:].tolist()
        assert some.cols.tolist() == grid.cols[width:].tolist()

    @pytest.mark.parametrize(
        ("score", "message"),
        [
            (lambda: 1, r"or of \(blocks, places\), got one of \(\)"),
            (lambda a, b, c: a, r"got one of \(a, b, c\)"),
            (lambda *, blocks: blocks, r"got one of \(\*, blocks\)"),
            (max, "whose parameters Python cannot tell; put it into a lambda"),
        ],
    )
    def test_other_functions_are_refused(self, score, message):
        with pytest.raises(
            TypeError, match=r"\[block_scores\] score must be a function of.*" + message
        ):
            scores_of(mx.ones((3, 2, 2)), score)


BLOCKS = mx.ones((3, 2, 2))
SCORES, ROWS = np.arange(4.0), np.array([0, 0, 1, 1])
BAD = [
    (
        lambda: scores_of(BLOCKS, untyped("l3")),
        ValueError,
        "score must be one of .*'l2'.* got 'l3'",
    ),
    (
        lambda: scores_of(BLOCKS, untyped(2)),
        TypeError,
        "score must be one of .*function.* got 2",
    ),
    (
        lambda: block_scores(untyped([1.0]), "l2", untyped(None)),
        TypeError,
        "weights must be a floating mx.array, got list",
    ),
    (lambda: scores_of(mx.ones((3,), mx.int32)), TypeError, "floating mx.array, got .*int32"),
    (lambda: scores_of(mx.ones((3,), mx.complex64)), TypeError, "floating mx.array, got .*comp"),
    (lambda: scores_of(mx.ones((3, 2))), ValueError, r"blocks must be .* got shape \(3, 2\)"),
    (
        lambda: scores_of(mx.array([1.0, mx.nan])),
        ValueError,
        "weights must be finite, got a nan or an infinity in block 1",
    ),
    (lambda: scores_of(mx.array([mx.inf, 1])), ValueError, "weights must be finite.*block 0"),
    (lambda: scores_of(mx.array([1, 1e30])), ValueError, "score must be finite, got inf for bl"),
    (lambda: scores_of(BLOCKS, lambda b: b), ValueError, r"return shape \(3,\), got \(3, 2, 2"),
    (lambda: scores_of(BLOCKS, lambda b: b.sum()), ValueError, r"shape \(3,\), got \(\)"),
    (
        lambda: scores_of(BLOCKS, lambda b: untyped([1, 2, 3])),
        TypeError,
        "array of real numbers, got li",
    ),
    (
        lambda: scores_of(BLOCKS, lambda b: mx.ones((3,), mx.complex64)),
        TypeError,
        "array of real numbers, got complex64",
    ),
    (
        lambda: scores_of(BLOCKS, lambda b: mx.array([1, mx.nan, 2])),
        ValueError,
        "score must be finite, got nan for block 1",
    ),
    (lambda: strongest_positions(SCORES, ROWS, 5), ValueError, r"count must be in \[0, 4\], got 5"),
    (
        lambda: strongest_positions(SCORES, ROWS, -1),
        ValueError,
        r"count must be in \[0, 4\], got -1",
    ),
    (
        lambda: strongest_positions(SCORES, ROWS, 2, untyped("column")),
        ValueError,
        "balance must be one of.*'column'",
    ),
    (
        lambda: strongest_positions(SCORES, ROWS, 2, untyped(None)),
        TypeError,
        "balance must be one of.*got None",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[(block_scores|strongest_positions)\] .*" + message):
        call()


def test_errors_speak_for_the_caller():
    with pytest.raises(ValueError, match=r"^\[sparsify layers.0\] score"):
        scores_of(BLOCKS, untyped("l3"), owner="sparsify layers.0")


def test_layers_share_a_budget_by_score():
    weak, strong, empty = np.array([1.0, 2.0]), np.array([9.0, 8.0, 7.0]), np.zeros(0)
    assert share_by_score([weak, strong], 2).tolist() == [1, 1]  # one each, however weak
    assert share_by_score([weak, strong], 3).tolist() == [1, 2]
    assert share_by_score([weak, empty, strong], 5).tolist() == [2, 0, 3]
    assert weak.tolist() == [1, 2]
