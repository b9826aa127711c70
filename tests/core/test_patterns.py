"""The pattern builders: exact counts, balance, and where the blocks lie."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import untyped

from mlx_sparse_nn import CSRPattern, patterns, sparsify


def test_block_diagonal():
    mask = np.array(patterns.block_diagonal(12, 3).tomask())
    assert np.array_equal(mask, np.kron(np.eye(3), np.ones((4, 4))).astype(bool))


def test_bidiagonal_blocks():
    pattern = patterns.bidiagonal_blocks(64, 8)
    block = np.eye(8) + np.eye(8, k=1)
    assert np.array_equal(np.array(pattern.tomask()), np.kron(np.eye(8), block).astype(bool))
    assert pattern.nnz == 120


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 8))
def test_banded(n_rows, n_cols, bandwidth):
    pattern = patterns.banded(2 * n_rows, 2 * n_cols, bandwidth, 2)
    i, j = np.indices((n_rows, n_cols))
    expected = np.kron(abs(i - j) <= bandwidth, np.ones((2, 2), bool)).astype(bool)
    assert np.array_equal(np.array(pattern.tomask()), expected)
    assert pattern.is_canonical


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_butterfly_connects_every_pair_of_blocks(size):
    pattern = patterns.butterfly(size * 4, 4)
    factors = size.bit_length() - 1
    assert pattern.n_blocks == size * (factors + 1)
    mask = np.array(pattern.tomask())[::4, ::4].astype(int)
    assert (np.linalg.matrix_power(mask, max(1, factors)) > 0).all()


@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.floats(0, 1),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 99),
)
def test_random_is_balanced_and_of_exact_count(n_rows, n_cols, density, block, seed):
    pattern = patterns.random(n_rows * block, n_cols * block, density, block, seed)
    assert pattern.n_blocks == round(density * n_rows * n_cols)
    assert pattern.is_canonical
    for lengths in (np.diff(pattern.indptr), np.diff(pattern.T.indptr)):
        assert lengths.size == 0 or np.ptp(lengths) <= 1
    again = patterns.random(n_rows * block, n_cols * block, density, block, seed)
    assert pattern == again


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.001, 1), st.integers(0, 99))
def test_covering_uses_every_row_and_column(n_rows, n_cols, density, seed):
    pattern = patterns.covering(n_rows * 4, n_cols * 4, density, 4, seed)
    assert pattern.n_blocks == max(round(density * n_rows * n_cols), n_rows, n_cols)
    for lengths in (np.diff(pattern.indptr), np.diff(pattern.T.indptr)):
        assert lengths.min() > 0
        assert np.ptp(lengths) <= 1


def test_random_depends_on_the_seed():
    a, b = (patterns.random(256, 256, 0.2, 8, seed) for seed in (0, 1))
    assert a != b


def test_from_mask_and_from_dense():
    w = np.zeros((4, 6), dtype=np.float32)
    w[1, 5] = w[2, 0] = -1.0
    expected = CSRPattern([0, 1, 2], [2, 0], (4, 6), 2)
    assert patterns.from_mask(w != 0, 2) == expected
    assert patterns.from_mask(mx.array(w) != 0, 2) == expected
    assert patterns.from_dense(w, 2) == patterns.from_dense(mx.array(w), 2) == expected


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 4),
    st.floats(0.01, 1),
    st.sampled_from(["row", "global"]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 99),
)
def test_strongest_keeps_what_sparsify_keeps(grid, block, density, balance, missing, seed):
    """A grid of scores makes the pattern that a layer with these scores gets."""
    scores = np.random.default_rng(seed).integers(0, 5, grid)  # few values: many ties
    shape = [n * block - min(cut, block - 1) for n, cut in zip(grid, missing, strict=True)]
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    sparsify(
        model,
        block_size=block,
        density=density,
        balance=balance,
        score=lambda blocks: scores.reshape(-1),
        predicate=lambda *_: True,
    )
    expected = model.layers[0].pattern
    found = patterns.strongest(scores, density, block, balance=balance, shape=shape)
    assert found == expected
    count = expected.n_blocks
    assert found == patterns.strongest(
        scores, n_blocks=count, block_size=block, balance=balance, shape=shape
    )


@pytest.mark.parametrize("make", [np.array, mx.array, list])
def test_strongest_takes_a_grid_of_any_kind(make):
    pattern = patterns.strongest(make([[3, 1], [2, 4]]), 0.5, 16)
    assert pattern == CSRPattern([0, 1, 2], [0, 1], (32, 32), 16)
    brain = patterns.strongest(mx.array([[3.0, 1.0]], mx.bfloat16), n_blocks=1)
    assert brain == CSRPattern([0, 1], [0], (32, 64), 32)


def test_strongest_of_nothing():
    assert patterns.strongest(np.ones((2, 3)), n_blocks=0).n_blocks == 0
    assert patterns.strongest(np.zeros((0, 3)), 0.5).shape == (0, 96)
    assert patterns.strongest(np.zeros((2, 3)), 1e-9).n_blocks == 1


BAD = [
    (lambda: patterns.from_mask([[True], [True, False]]), ValueError, "mask must be rectangular"),
    (
        lambda: patterns.block_diagonal(10, 3),
        ValueError,
        "features 10 is not a multiple of blocks 3",
    ),
    (lambda: patterns.block_diagonal(8, 0), ValueError, r"blocks must be in \[1"),
    (lambda: patterns.bidiagonal_blocks(10, 4), ValueError, "features 10 is not a multiple"),
    (
        lambda: patterns.bidiagonal_blocks(untyped(10.0), 5),
        TypeError,
        "features must be an integer",
    ),
    (lambda: patterns.banded(8, 8, -1, 4), ValueError, "bandwidth must be in"),
    (lambda: patterns.butterfly(96, 32), ValueError, "power of two, got 96 / 32 = 3"),
    (lambda: patterns.random(8, 8, 1.5, 4), ValueError, r"density must be in \[0, 1\], got 1.5"),
    (lambda: patterns.random(8, 8, float("nan"), 4), ValueError, "density must be in"),
    (lambda: patterns.covering(8, 8, 0.0, 4), ValueError, r"density must be in \(0, 1\], got 0.0"),
    (
        lambda: patterns.random(2**20, 2**20, 0.5, 1),
        ValueError,
        r"^\[patterns.random\] 5\d+ blocks",
    ),
    (lambda: patterns.covering(2**20, 2**20, 0.5, 1), ValueError, "stored values; at most"),
    (lambda: patterns.banded(2**20, 2**20, 2**12, 1), ValueError, "stored values; at most"),
    (lambda: patterns.from_mask(np.ones(4, bool), 2), ValueError, "mask must be a matrix"),
    (lambda: patterns.from_mask(np.ones((4, 4)), 2), TypeError, "mask must be bool, got float64"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
