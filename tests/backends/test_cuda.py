"""The CUDA kernels, run on the emulator: equal to the oracle, in any order of warps and copies."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import CudaFault, emulated
from hypothesis import given
from hypothesis import strategies as st
from support import (
    assert_equal,
    check_products,
    integers,
    pattern_of,
    patterns,
    random_pattern,
    spoiled,
    trimmed,
)

from mlx_sparse_nn import CSRPattern, spmm, spmm_t
from mlx_sparse_nn.core import edges, tuned
from mlx_sparse_nn.core.backends import naive


def check(pattern, n, dtype, least=(), **settings):
    """Compare the three products with the oracle's, and return the names of the kernels."""
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i, dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, data)
    with emulated(**settings) as emulation:
        check_products(pattern, data, x, y, bias)
    assert emulation.conflicts == 0
    assert set(least) <= set(emulation.names)
    return emulation.names


@pytest.fixture
def filled(monkeypatch):
    """Let a little work count as enough to keep a GPU busy."""
    monkeypatch.setattr(tuned, "BLOCKS_TO_FILL_GPU", 1)
    monkeypatch.setattr(tuned, "PANEL_GROUPS", 1)
    monkeypatch.setattr(tuned, "SHARED_ROWS", {})


@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 4, 8, 16, 32, 64, 128])
def test_products(block_size, dtype, n):
    pattern = random_pattern(3, 4, block_size, density=0.7)
    check(pattern, n, dtype)


def cut_alike(pattern):
    """Return a pattern with edges always at the same place: each other is one more compilation."""
    block = pattern.block_size
    whole = tuple(n * block for n in pattern.grid)
    cuts = (block // 2 | 1 if a < b else 0 for a, b in zip(pattern.shape, whole, strict=True))
    return trimmed(CSRPattern(pattern.indptr, pattern.indices, whole, block), *cuts)


@given(
    pattern=patterns(block_sizes=(1, 4, 8, 16)).map(cut_alike),
    n=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_drawn_patterns(pattern, n, seed):
    if pattern.n_blocks:  # plain MLX takes the others
        check(pattern, n, mx.bfloat16, seed=seed)


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (-5, 1)])
@pytest.mark.parametrize(("n", "architecture"), [(1, "sm_90"), (17, "sm_90"), (70, "sm_80")])
@pytest.mark.parametrize("block_size", [3, 4, 8, 16, 32, 64, 128])
def test_what_lies_outside_is_masked(block_size, n, architecture, cut, offset):
    """Whatever the weight holds there, be it a nan, in the kernels of few rows and of tiles."""
    pattern = trimmed(random_pattern(3, 3, block_size, density=0.9), cut, -cut)
    check(pattern, n, mx.bfloat16, architecture=architecture, offset=offset)


@pytest.mark.parametrize("block_size", [3, 8, 16, 64])
def test_what_lies_outside_is_masked_by_scalars(block_size):
    pattern = trimmed(random_pattern(3, 3, block_size, density=0.9), 1, -1)
    check(pattern, 5, mx.float32, ["spmm_csr"])


@pytest.mark.parametrize(("cut", "offset"), [(1, 0), (37, 0), (-5, 1)])
@pytest.mark.parametrize("block_size", [64, 128])
def test_what_lies_outside_is_masked_by_warpgroups(filled, block_size, cut, offset):
    pattern = trimmed(random_pattern(2, 3, block_size, density=0.9), cut, -cut)
    check(pattern, 140, mx.bfloat16, ["spmm_wgmma"], offset=offset)


@pytest.mark.parametrize("n", [1, 16, 40, 150])
def test_a_weight_with_edges_is_not_copied(monkeypatch, n):
    pattern = trimmed(random_pattern(3, 3, 64, density=0.9), 5, 9)
    data = spoiled(pattern, integers(pattern.data_shape, 1, mx.bfloat16))
    x, y = (integers((n, size), i, mx.bfloat16) for i, size in enumerate(reversed(pattern.shape)))
    expected = naive.spmm(data, pattern, x), naive.spmm_t(data, pattern, y)
    for name in ("clear_cols", "clear_rows"):
        monkeypatch.delattr(edges, name)
    with emulated():
        products = spmm(data, pattern, x), spmm_t(data, pattern, y)
        for actual, value in zip(products, expected, strict=True):
            assert_equal(actual, value)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "sm_89"])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_tiles(block_size, architecture, offset):
    """Of many rows: the last tile is not full, and inputs may begin anywhere."""
    pattern = random_pattern(3, 4, block_size, density=0.7)
    check(pattern, 150, mx.bfloat16, architecture=architecture, offset=offset)


@pytest.mark.parametrize(("n", "cut", "offset"), [(20, 0, 1), (150, 5, 0)])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_tiles_of_float32(block_size, n, cut, offset):
    """Whole numbers are exact in TF32; stages, strides and fragments are those of 4 bytes."""
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    names = check(pattern, n, mx.float32, architecture="sm_80", offset=offset)
    assert set(names) == {"spmm_tiles", "sddmm_tiles"}


@pytest.mark.parametrize(("n", "cut"), [(20, 5), (150, 0)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [24, 40, 48, 72, 96, 120])
def test_tiles_between_the_powers_of_two(block_size, dtype, n, cut):
    """A stage begins and ends in the middle of a block."""
    pattern = trimmed(random_pattern(3, 4, block_size, density=0.7), cut, -cut)
    names = check(pattern, n, dtype, architecture="sm_80")
    assert set(names) == {"spmm_tiles", "sddmm_tiles"}


def test_float32_is_rounded_to_the_nearest_tf32():
    """Tensor cores would cut off what they do not read: all errors on one side."""
    pattern = CSRPattern([0, 1], [0], (16, 16), 16)
    data = mx.eye(16)[None]
    x = mx.broadcast_to(1 + mx.array([3, 5]).reshape(2, 1) * 2.0**-12, (2, 16))
    x = mx.repeat(x, 16, axis=0)
    with emulated():
        y = spmm(data, pattern, x)
    assert_equal(y, mx.repeat(1 + mx.array([[1.0], [1.0]]) * 2.0**-10, 16, axis=0) + mx.zeros(16))


@pytest.mark.parametrize("size", [16, 48])
def test_the_check_allows_for_tf32_where_kernels_round_to_it(size):
    from mlx_sparse_nn.diagnostics.check import all_cases, check_case

    case = next(c for c in all_cases() if c.name == f"spmm-{size}-float32-30-edges-bias")
    with emulated("sm_80") as emulation:
        assert check_case(case, tf32=True).wrong == ""
        assert "beyond it" in check_case(case, tf32=False).wrong
    assert set(emulation.names) == {"spmm_tiles"}


def test_weight_gradients_of_a_long_block_row_go_by_scalars(monkeypatch):
    """A grid of tiles would have as many thread blocks for each block-row as the longest needs."""
    monkeypatch.setattr(tuned, "MAX_EMPTY_GROUPS", 100)
    rows = [[0], range(60), [], *[[1]] * 60]
    names = check(pattern_of(rows, 60, 8), 3, mx.float16)
    assert names[-1] == "sddmm_csr"


@pytest.mark.parametrize("tf32", [False, True])
def test_large_blocks_of_float32_go_to_plain_mlx(tf32):
    assert not check(random_pattern(3, 4, 136, density=0.7), 20, mx.float32, tf32=tf32)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("block_size", [64, 128])
def test_warpgroups_take_tiles_in_turn(filled, block_size, dtype, seed):
    """Copies run ahead through several tiles and more stages than the ring has."""
    pattern = random_pattern(2, 4, block_size, density=1.0)
    check(pattern, 600, dtype, ["spmm_wgmma", "sddmm_wgmma"], seed=seed)


def panel_pattern(block_size, kind):
    rng = np.random.default_rng(3)
    mask = rng.random((700 // block_size, 400 // block_size)) < 0.3
    if kind == "uneven":
        mask[5] = True
        mask[256 // block_size : 512 // block_size] = False
        mask[:, -1] = False
    if kind == "diagonal":
        mask = np.eye(640 // block_size, dtype=bool)
    return pattern_of(map(np.flatnonzero, mask), mask.shape[1], block_size)


@pytest.mark.parametrize(
    ("kind", "cut", "settings"),
    [
        ("even", 0, {}),
        ("even", 0, {"seed": 2}),
        ("even", 0, {"offset": 1}),
        ("even", 1, {}),
        ("even", -5, {"offset": 1}),
        ("uneven", 0, {}),
        ("diagonal", 0, {}),
    ],
)
def test_panels(filled, monkeypatch, kind, cut, settings):
    monkeypatch.setattr(tuned, "PANEL_DENSITY", {16: 0.0})
    monkeypatch.setattr(tuned, "SLICED_ROWS", 0)
    pattern = trimmed(panel_pattern(16, kind), cut, -cut)
    check(pattern, 300, mx.bfloat16, ["spmm_panels", "sddmm_panels"], **settings)


def test_gradients_in_parts(monkeypatch):
    """Sums over parts of the rows are added up in order, whatever part is the last."""
    monkeypatch.setattr(tuned, "GRADIENT_PANEL_ROWS", 64)
    pattern = panel_pattern(16, "even")
    assert "sum_splits" in check(pattern, 300, mx.float16, ["sddmm_panels"])


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_several_matrices_of_one_pattern(filled, block_size):
    pattern = random_pattern(3, 4, block_size, density=0.7)
    data, x = (
        integers((2, *shape), i, mx.bfloat16)
        for i, shape in enumerate([pattern.data_shape, (70, pattern.shape[1])])
    )
    with emulated():
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))


@pytest.fixture
def short_pieces(monkeypatch):
    """Cut pieces so short that small patterns have many."""
    monkeypatch.setattr(tuned, "MIN_PIECE", 32)
    monkeypatch.setattr(tuned, "MAX_EVEN_PIECE", 32)
    monkeypatch.setattr(tuned, "MAX_ROUNDS", 2)
    monkeypatch.setattr(tuned, "NARROW_COLUMNS", 0)  # x by columns, as of large matrices


def skewed(kind, block_size=1):
    """Return a pattern with long rows, beside which rows are short or empty."""
    heavy, n_cols = 330 // block_size + 1, 340 // block_size
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 5, 60)
    if kind == "heavy":
        lengths[7], lengths[50] = heavy, heavy - 13
    if kind == "neighbours":  # which meet within a piece, an empty row between them
        lengths[30:34] = heavy, 0, heavy, heavy
    if kind == "all":
        lengths = np.array([n_cols] * 5)
    if kind == "one":
        lengths = np.array([n_cols])
    return pattern_of([rng.permutation(n_cols)[:m] for m in lengths], n_cols, block_size)


@pytest.mark.parametrize("n", [1, 3, 6, 33])
@pytest.mark.parametrize("kind", ["heavy", "neighbours", "all", "one"])
def test_long_rows(short_pieces, kind, n):
    """They are summed in pieces, wherever these are cut; their columns, transposed, too."""
    pattern = skewed(kind)
    assert check(pattern, n, mx.float32).count("spmm_csr") >= 4  # with a bias, and without
    check(pattern.T, n, mx.bfloat16)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("block_size", [3, 8])
def test_long_rows_of_blocks_that_reach_past_the_matrix(short_pieces, block_size, n):
    pattern = trimmed(skewed("neighbours", block_size), 1, 1)
    assert check(pattern, n, mx.float32).count("spmm_csr") >= 4


@pytest.mark.parametrize("n", [4, 31, 32, 33, 65, 100, 129])
@pytest.mark.parametrize("block_size", [1, 3, 7])
def test_many_rows_of_x_by_scalars(block_size, n):
    """Lanes lie along them: their last ones may have none, and x may begin anywhere."""
    pattern = random_pattern(3, 4, block_size, density=0.7)
    check(pattern, n, mx.float16, ["spmm_csr"], offset=1)


def test_long_rows_of_several_matrices(short_pieces):
    pattern = skewed("heavy")
    data, x = integers((2, pattern.n_blocks), 1), integers((2, 5, pattern.shape[1]), 2)
    with emulated() as emulation:
        y = mx.vmap(lambda data, x: spmm(data, pattern, x))(data, x)
        assert_equal(y, naive.spmm(data, pattern, x))
    assert emulation.names == ["spmm_csr", "spmm_csr"]


FAULTS = {
    "spmm_tiles": [("wait_copies<STAGES - 2>();", ""), ("__syncthreads();", "")],
    "spmm_wgmma": [
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("wait_products<1>();", ""),
        ("copier.end();", "copier.ring.advance();"),
        ("describe(x_tile + tn * 64 * DEPTH + k, 16)", "describe(x_tile + tn * 64 * DEPTH, 16)"),
    ],
    "spmm_panels": [
        ("wait_copies<RING_PARTS - 1>();", ""),
        ("wait_barrier(empty + ring.buffer, ring.parity ^ 1);", ""),
        ("wait_barrier(full + ring.buffer, ring.parity);", ""),
        ("swizzle<CHUNKS>(lane % 16, chunk + 2 * tk)", "swizzle<CHUNKS>(lane % 16, 2 * tk)"),
    ],
}


@pytest.mark.parametrize(("kernel", "edit"), [(k, e) for k, edits in FAULTS.items() for e in edits])
def test_faults_are_found(filled, monkeypatch, kernel, edit):
    """A barrier less, or a wrong place, does not pass."""
    monkeypatch.setattr(tuned, "SLICED_ROWS", 0)
    block_size = {"spmm_tiles": 16, "spmm_wgmma": 64, "spmm_panels": 16}[kernel]
    pattern = random_pattern(256 // block_size, 512 // block_size, block_size, density=1.0)
    data, x = integers(pattern.data_shape, 0, mx.bfloat16), integers((300, 512), 1, mx.bfloat16)
    expected = naive.spmm(data, pattern, x)
    architecture = "sm_80" if kernel == "spmm_tiles" else "sm_90"
    with emulated(architecture, edit=edit) as emulation:
        try:
            y = spmm(data, pattern, x)
        except CudaFault:
            y = None
    assert emulation.names == [kernel]
    assert y is None or not mx.array_equal(y, expected)
