"""Scalars and long rows: ``spmm_csr`` on the emulator, and its launches without a GPU."""

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
    assert_equal,
    check_products,
    computing,
    fresh_launches,
    integers,
    pattern_of,
    spoiled,
    trimmed,
    untyped,
)

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, spmm, spmm_t
from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import launch, metal, naive, plain, scalars
from mlx_sparse_nn.core.backends.launch import MAX_GROUPS, MAX_THREADS, Kernel


def skewed(kind, block_size=1):
    """Return a pattern with long rows, beside which rows are short or empty."""
    heavy, n_cols = 700 // block_size + 1, 720 // block_size
    lengths = np.random.default_rng(0).integers(0, 5, 200)
    if kind == "heavy":
        lengths[7], lengths[150] = heavy, heavy - 13
    if kind == "neighbours":  # which meet within a piece, an empty row between them
        lengths[40:44] = heavy, 0, heavy, heavy
    if kind == "ends":
        lengths[[0, -1]] = heavy
    if kind == "all":
        lengths = np.array([n_cols] * 5)
    if kind == "one":
        lengths = np.array([n_cols])
    rng = np.random.default_rng(1)
    return pattern_of([rng.permutation(n_cols)[:m] for m in lengths], n_cols, block_size)


def check(pattern, n, dtype=mx.float32):
    n_rows, n_cols = pattern.shape
    shapes = [pattern.data_shape, (n, n_cols), (n, n_rows), (n_rows,)]
    data, x, y, bias = (integers(shape, i).astype(dtype) for i, shape in enumerate(shapes))
    data = spoiled(pattern, data)
    assert_equal(spmm(data, pattern, x, bias), naive.spmm(data, pattern, x, bias))
    assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))


def templates(metal):
    return [dict(launched.template) for launched in metal.launches]


@pytest.fixture
def short_pieces(monkeypatch):
    """Cut pieces so short that small patterns have many."""
    monkeypatch.setattr(tuned, "MIN_PIECE", 32)
    monkeypatch.setattr(tuned, "MAX_EVEN_PIECE", 32)
    monkeypatch.setattr(tuned, "MAX_ROUNDS", 2)
    with fresh_launches():
        yield


class TestLongRows:
    @pytest.mark.parametrize("n", [1, 3, 6, 33])
    @pytest.mark.parametrize("kind", ["heavy", "neighbours", "ends", "all", "one"])
    def test_wherever_they_lie(self, metal, short_pieces, kind, n):
        check(skewed(kind), n)
        assert any(t["OF_PIECES"] for t in templates(metal))

    @pytest.mark.parametrize("n", [1, 2, 9, 40])
    @pytest.mark.parametrize("block_size", [2, 3])
    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
    def test_of_small_blocks_that_reach_past_the_matrix(
        self, metal, short_pieces, block_size, dtype, n
    ):
        pattern = trimmed(skewed("neighbours", block_size), 1, 1)
        check(pattern, n, dtype)
        assert any(t["OF_PIECES"] for t in templates(metal))

    @pytest.mark.parametrize("n", [1, 40])
    def test_a_heavy_column(self, metal, short_pieces, n):
        """It is a long row of the transpose, whose values lie apart."""
        mask = np.zeros((700, 60), bool)
        mask[:, 31] = True
        mask[::9, 32] = True
        mask[5, 3:9] = True
        check(pattern_of(map(np.flatnonzero, mask), 60, 1), n)
        assert [t["TRANSPOSED"] for t in templates(metal) if t["OF_PIECES"]] == [1]

    @pytest.mark.parametrize("n", [1, 5])
    def test_as_they_are_chosen(self, metal, n):
        """With the numbers of ``tuned``; the first launch takes 32 lanes for each piece."""
        pattern = skewed("heavy")
        data, x = integers(pattern.data_shape, 1), integers((n, pattern.shape[1]), 2)
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
        pieces, rows = templates(metal)
        assert (pieces["OF_PIECES"], rows["OF_PIECES"]) == (1, 0)
        assert pieces["PIECE"] == rows["PIECE"] == 256
        assert metal.launches[0].grid[0] == launch.round_up(-(-pattern.n_blocks // 256) * 32, 256)

    def test_no_value_is_multiplied_twice(self, metal):
        """Of a piece, only what is long: the rows in which it begins and ends may be short."""
        lengths = np.zeros(504, int)
        lengths[10:30], lengths[31] = 200, 300
        pattern = pattern_of([np.arange(m) for m in lengths], 300, 1)
        spmm(integers(pattern.data_shape, 1), pattern, integers((1, 300), 2))
        assert [launched.counts.macs for launched in metal.launches] == [300, 4000]

    @pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
    @pytest.mark.parametrize("n", [1, 5])
    @pytest.mark.parametrize("block_size", [1, 3])
    def test_vmap(self, metal, short_pieces, block_size, in_axes, n):
        pattern = skewed("heavy", block_size)
        data = integers((2, *pattern.data_shape), 1)
        x = integers((2, n, pattern.shape[1]), 2)
        args = [a if axis == 0 else a[0] for a, axis in zip((data, x), in_axes, strict=True)]
        y = mx.vmap(lambda d, z: spmm(d, pattern, z), in_axes)(*args)
        for i in range(2):
            d, z = (a[i] if axis == 0 else a for a, axis in zip(args, in_axes, strict=True))
            assert_equal(y[i], naive.spmm(d, pattern, z))

    @pytest.mark.parametrize("n", [1, 5])
    def test_grad(self, metal, short_pieces, n):
        pattern = skewed("heavy")
        data, x = integers(pattern.data_shape, 1), integers((n, pattern.shape[1]), 2)
        w = integers((n, pattern.shape[0]), 3)
        grads = mx.grad(lambda d, z: (spmm(d, pattern, z) * w).sum(), argnums=(0, 1))(data, x)
        assert_equal(grads[0], naive.sddmm(pattern, w, x))
        assert_equal(grads[1], naive.spmm_t(data, pattern, w))

    @pytest.mark.parametrize("n", [1, 5])
    @pytest.mark.parametrize("block_size", [1, 2])
    def test_results_are_the_same_bit_for_bit(self, metal, short_pieces, block_size, n):
        """In the three schedules of each launch on the emulator, and from call to call."""
        pattern = skewed("neighbours", block_size)
        data, x = mx.random.normal(pattern.data_shape), mx.random.normal((n, pattern.shape[1]))
        y = spmm(data, pattern, x)
        assert_equal(spmm(data, pattern, x), y)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=12).filter(any),
    n=st.sampled_from([1, 3, 4, 40]),
    transposed=st.booleans(),
)
def test_drawn_lengths(metal, lengths, n, transposed):
    """Pieces begin and end at, before and behind the ends of rows, empty ones too."""
    rng = np.random.default_rng(sum(lengths))
    pattern = pattern_of([rng.integers(0, 50, m) for m in lengths], 50, 1)
    with pytest.MonkeyPatch.context() as patch, fresh_launches():
        patch.setattr(tuned, "MIN_PIECE", 8)
        patch.setattr(tuned, "MAX_EVEN_PIECE", 8)
        patch.setattr(tuned, "MAX_ROUNDS", 1)
        data = integers(pattern.data_shape, 1)
        x = integers((n, pattern.shape[transposed ^ 1]), 2)
        product, oracle = (spmm_t, naive.spmm_t) if transposed else (spmm, naive.spmm)
        assert_equal(product(data, pattern, x), oracle(data, pattern, x))


class TestManyRowsOfX:
    @pytest.mark.parametrize("n", [2, 3, 4, 5, 17, 31, 32, 33, 65, 100, 129])
    @pytest.mark.parametrize("block_size", [1, 2, 3])
    def test_every_width(self, metal, block_size, n):
        pattern = pattern_of([[1, 0], [], [2, 1, 1], [0]], 3, block_size)
        check(pattern, n)

    @pytest.mark.parametrize("n", [32, 64, 96, 128])
    @pytest.mark.parametrize("block_size", [1, 2, 3])
    def test_a_value_is_read_once(self, metal, block_size, n):
        """For all of them, and each of x for all rows of a block: it is a neighbour of the last."""
        pattern = skewed("none", block_size)
        data, x = integers(pattern.data_shape, 1), integers((n, pattern.shape[1]), 2)
        metal.count = True
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
        read = metal.launches[-1].counts.read
        assert read["data"] == data.nbytes
        assert read["x"] == 4 * n * pattern.n_blocks * block_size

    @pytest.mark.parametrize("block_size", [2, 3])
    def test_one_row_is_read_once_for_all_rows_of_a_block(self, metal, block_size):
        pattern = pattern_of([range(64)] * 4, 64, block_size)
        data, x = integers(pattern.data_shape, 1), integers((1, pattern.shape[1]), 2)
        metal.count = True
        assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
        read = metal.launches[-1].counts.read
        assert read["data"] == data.nbytes
        assert read["x"] == 4 * pattern.n_blocks * block_size

    def test_columns_are_not_copied(self, metal):
        """``A @ X`` of a sparse array: X and the result lie as the kernel reads and writes them."""
        from mlx_sparse_nn import csr_array

        pattern = skewed("none")
        A = csr_array(
            (integers(pattern.data_shape, 1), pattern.indices, pattern.indptr), pattern.shape
        )
        X = integers((pattern.shape[1], 40), 2)
        Y = A @ X
        assert memoryview(untyped(Y)).c_contiguous
        assert_equal(Y, naive.spmm(A.data, pattern, X.T).T)


@pytest.fixture
def launches():
    """Note the launches of kernels, and let MLX compute in their place."""
    noted = []

    def kernel(backend, name, inputs, threads, shared_memory):
        def call(inputs, template, output_shapes, output_dtypes, grid, threadgroup):
            noted.append((name, dict(template), grid))
            return [stand_in(inputs, dict(template), output_shapes[0], output_dtypes[0])]

        return call

    with (
        fresh_launches(),
        mock.patch.object(launch, "_function", kernel),
        computing(metal, plain),
    ):
        yield noted


def stand_in(inputs, template, shape, dtype):
    """Return what ``spmm_csr`` gives for scalars, by operations of MLX that it may trace."""
    if len(inputs) < 7:  # a weight gradient, which nobody asked for
        return mx.zeros(shape, dtype)
    data, indptr, indices, perm, x, bias, partial = inputs
    if template["OF_PIECES"]:
        return mx.broadcast_to((x.sum() * 0).astype(dtype), shape)
    assert template["LONG"] == (partial.dtype == mx.float32 and partial.ndim > 1)
    begins = mx.zeros(indices.size + 1, mx.int32).at[indptr[1:-1]].add(1)
    rows, values = mx.cumsum(begins)[:-1], data[perm] if template["TRANSPOSED"] else data
    columns = x if template["WIDTH"] > 1 else x.T
    y = (
        mx.zeros((indptr.size - 1, columns.shape[1]))
        .at[rows]
        .add(values[:, None] * columns[indices])
    )
    y = y + bias[:, None] if template["BIAS"] else y
    return (y if template["WIDTH"] > 1 else y.T).astype(dtype)


class TestLaunches:
    @pytest.mark.parametrize("n", [1, 5])
    def test_a_compiled_step_with_long_rows(self, launches, n):
        """The index arrays are tracers: what is launched follows from sizes alone."""
        pattern = skewed("neighbours")
        layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern)
        layer.weight, layer.bias = integers(pattern.data_shape, 1), integers(pattern.shape[:1], 2)
        x = integers((n, pattern.shape[1]), 3)
        expected = naive.spmm(layer.weight, pattern, x, layer.bias)
        step = mx.compile(lambda x: layer(x), inputs=layer.state)
        assert_equal(step(x), expected)
        noted = [template["OF_PIECES"] for _, template, _ in launches]
        assert noted == [1, 0]
        other = pattern_of(
            [np.roll(row, 3) for row in np.split(pattern.indices, pattern.indptr[1:-1])],
            pattern.shape[1],
            1,
        )
        layer.set_pattern(other)
        layer.weight = integers(pattern.data_shape, 4)
        assert_equal(step(x), naive.spmm(layer.weight, other, x, layer.bias))

    @pytest.mark.parametrize("n", [1, 5])
    def test_compiled_gradients_with_long_rows(self, launches, n):
        pattern = skewed("neighbours").T
        data, x = integers(pattern.data_shape, 1), integers((n, pattern.shape[1]), 2)
        f = lambda x: (spmm(data, pattern, x) ** 2).sum()
        y = naive.spmm(data, pattern, x)
        assert_equal(mx.compile(mx.grad(f))(x), naive.spmm_t(data, pattern, 2 * y))
        assert any(template.get("OF_PIECES") for _, template, _ in launches)

    @pytest.mark.parametrize("n", [1, 16, 64])
    def test_a_power_law_graph(self, launches, n):
        """10^6 rows, the longest of 10^5: threads follow the stored values, not the longest row."""
        pattern = power_law(1_000_000, 100_000)
        data, x = mx.ones(pattern.data_shape), mx.zeros((n, pattern.shape[1]))
        spmm(data, pattern, x)
        threads = sum(np.prod(grid, dtype=np.int64) for *_, grid in launches)
        assert threads <= 2 * pattern.n_blocks * min(n, 32)
        assert [template["OF_PIECES"] for _, template, _ in launches] == [1, 0]
        for _, template, _ in launches:
            assert template["PIECE"] <= tuned.MAX_ROUNDS * 32

    def test_one_long_row_changes_no_other(self, launches):
        """Rows of three values had 256 threads each where one of 3,000 had 2,049."""
        threads = []
        for longest in (2048, 2049):
            lengths = np.full(3000, 3)
            lengths[7] = longest
            pattern = pattern_of([np.arange(m) for m in lengths], 4096, 1)
            spmm(mx.ones(pattern.data_shape), pattern, mx.ones((1, 4096)))
            threads.append(sum(np.prod(grid) for *_, grid in launches))
            launches.clear()
        assert threads[0] == threads[1] <= 3 * pattern.n_blocks

    def test_from_8_million_rows_on_the_grid_fits(self, launches):
        """It was a TypeError of MLX's."""
        indptr = np.zeros(2**23 + 1, np.int32)
        indptr[6:] = 2049
        pattern = CSRPattern(indptr, np.arange(2049, dtype=np.int32), (2**23, 4096), 1)
        spmm(mx.ones(2049), pattern, mx.zeros((1, 4096)))
        assert all(max(grid) <= MAX_THREADS for *_, grid in launches)

    @pytest.mark.parametrize("backend", ["metal", "cuda"])
    def test_a_grid_that_does_not_fit_is_refused(self, backend):
        with pytest.raises(ValueError, match=r"\[spmm\] a launch must have at most 2147483392 x"):
            launch.prepare(backend, "spmm", Kernel("spmm_csr", {}, (2**31, 1, 1), 256), mx.float32)
        with pytest.raises(ValueError, match=r"\[sddmm\] .* got 256 x 1 x 2147483648;"):
            launch.prepare(backend, "sddmm", Kernel("", {}, (256, 1, 2**31), 256), mx.float32)
        kernel = Kernel("spmm_csr", {}, (256, MAX_GROUPS + 1, 1), 256)
        if backend == "cuda":
            with pytest.raises(ValueError, match="x 65535 threads, got 256 x 65536 x 1"):
                launch.prepare(backend, "spmm", kernel, mx.float32)
        else:
            launch.prepare(backend, "spmm", kernel, mx.float32)


@given(
    n_x=st.sampled_from([1, 2, 4, 7, 16, 31, 32, 64, 100, 128, 129, 4096]),
    block_size=st.sampled_from([1, 2, 3, 12, 48, 96]),
    n_rows=st.integers(0, 30).map(lambda bits: 2**bits),
    mean=st.integers(0, 12).map(lambda bits: 2**bits),
    skew=st.integers(0, 20).map(lambda bits: 2**bits),
    has_blocks=st.booleans(),
)
@example(n_x=31, block_size=1, n_rows=256, mean=4096, skew=256, has_blocks=False)
def test_no_lane_works_long_and_every_grid_fits(n_x, block_size, n_rows, mean, skew, has_blocks):
    """Up to a longest row of 4 million values; beyond, what a lane takes grows as its root."""
    n_block_rows = -(-n_rows // block_size)
    n_rows = n_block_rows * block_size
    n_blocks = min(n_block_rows * mean, 2**31 // block_size)
    longest = min(n_blocks, mean * skew, 2**22 // block_size)
    lanes = min(32, launch.power_of_two(n_blocks * block_size // n_block_rows // 2))
    by_columns = n_x >= tuned.COLUMNS_OF_SCALARS
    outputs = block_size if has_blocks and block_size < tuned.METAL_SMALLEST_TILED else 1
    how = scalars.share(
        n_x, block_size, n_block_rows, n_blocks, longest, lanes, by_columns, outputs
    )
    rows_of_a_lane, rest = divmod(how.rows, how.width)
    assert rest == 0
    assert 1 <= rows_of_a_lane <= 4
    sharing = how.lanes * how.width
    assert sharing <= 32
    assert launch.round_up(n_rows // outputs * sharing, 256) < 2**31
    if n_rows // outputs > 2**25:  # then there are fewer lanes than are wanted
        return
    assert how.rows >= min(n_x, 32) or how.width == 1
    walked = (how.piece or longest) * block_size  # values of a short row, or of a piece
    rounds = 64 if walked > 4 * n_blocks * block_size / n_block_rows else 256
    assert walked <= max(rounds * how.lanes, 256, block_size) or how.width > 1
    assert walked <= max(256 * how.lanes, 2048, block_size)
    if how.piece:  # partial sums, which are read side by side
        assert longest / (how.piece * how.lanes) <= 64 + 3 * (longest * block_size) ** 0.5


def power_law(n_rows, longest):
    """Return a graph whose n-th heaviest row has about longest / n^0.7 values, at least 1."""
    lengths = np.maximum(1, longest / np.arange(1, n_rows + 1) ** 0.7).astype(np.int64)
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(rng.permutation(lengths))])
    indices = rng.integers(0, n_rows, indptr[-1], dtype=np.int32)
    return CSRPattern(indptr, indices, (n_rows, n_rows), 1)


def test_all_products_of_a_graph(metal):
    """At a size that an emulator can run."""
    graph = power_law(300, 400)
    n_rows, n_cols = graph.shape
    data, x = integers(graph.data_shape, 1), integers((2, n_cols), 2)
    check_products(graph, data, x, integers((2, n_rows), 3), integers((n_rows,), 4))
