"""Every kernel text that the Metal backend chooses: products are launched and nothing is run."""

import itertools
from collections.abc import Sequence

import metal_emulator
import mlx.core as mx
import numpy as np
from metal_compiler import Variant

from mlx_sparse_nn import CSRPattern, qspmm, qspmm_t, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.backends import columns, pauli_metal
from mlx_sparse_nn.core.pauli import PauliTerms, pauli_product

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BLOCK_SIZES = (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 69, 96, 128, 136)
ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 65, 129, 512)
# M5's tensor units: their text is Metal 4, which the emulator's tensors check.
EXCLUDED = frozenset({"spmm_tensor", "tensor_units"})


def even(block_size: int) -> CSRPattern:
    """Few block-rows, of four blocks each: many threadgroups have to share one."""
    return _pattern([range(4)] * 9, 9, block_size)


def skewed(block_size: int) -> CSRPattern:
    """One block-row of more than 2,048 values, and of 40 blocks at least, among short ones."""
    longest = max(40, -(-2500 // block_size))
    return _pattern([[0], range(longest), [], [1, 2], *[[0]] * 5], longest, block_size)


def large(block_size: int) -> CSRPattern:
    """As many block-rows as fill a GPU."""
    rows = max(64, 4096 // block_size)
    return _pattern([range(8)] * rows, 8, block_size)


def with_edges(block_size: int) -> CSRPattern:
    """The last blocks reach past the matrix."""
    whole = even(block_size)
    n_rows, n_cols = (size - block_size // 2 for size in whole.shape)
    return CSRPattern(whole.indptr, whole.indices, (n_rows, n_cols), block_size)


def _pattern(rows: Sequence[Sequence[int]], n_cols: int, block_size: int) -> CSRPattern:
    columns = [np.asarray(row, np.int32) for row in rows]
    indptr = np.cumsum([0, *(row.size for row in columns)])
    shape = (len(columns) * block_size, n_cols * block_size)
    return CSRPattern(indptr, np.concatenate(columns), shape, block_size)


def launch_products() -> None:
    """Launch products of all block sizes, dtypes and rows of x."""
    for block_size in BLOCK_SIZES:
        patterns = [(even, ROWS), (skewed, (1, 40)), (large, (1, 8, 40, 512))]
        patterns += [(with_edges, (1, 12, 129))] if block_size > 1 else []
        for make, all_rows in patterns:
            pattern = make(block_size)
            for dtype in DTYPES:
                data = mx.zeros(pattern.data_shape, dtype)
                bias = mx.zeros(pattern.shape[0], dtype)
                for rows in all_rows:
                    x, y = (mx.zeros((rows, size), dtype) for size in reversed(pattern.shape))
                    spmm(data, pattern, x, bias if make is even else None)
                    spmm_t(data, pattern, y)
                    if make is not with_edges:
                        sddmm(pattern, y, x)
    scalar = even(1)
    sddmm(scalar, mx.zeros((2048, 9)), mx.zeros((2048, 9)))  # enough rows to be summed apart


def launch_quantized_products() -> None:
    """Launch products of quantized blocks, of all bits, groups, dtypes and rows of x."""
    for block_size, group_size in itertools.product((32, 64, 96, 128), (32, 64, 128)):
        if block_size % group_size:
            continue
        for make in (even, with_edges, skewed):
            pattern = make(block_size)
            kinds = [(mx.float16, bits) for bits in (2, 3, 4, 5, 6, 8)]
            kinds = [*kinds, (mx.bfloat16, 4), (mx.float32, 4)] if make is even else kinds[2:4]
            for dtype, bits in kinds:
                matrix = mx.quantize(mx.zeros(pattern.data_shape, dtype), group_size, bits)
                for rows in (1, 4, 8, 12, 40, 129):
                    x, y = (mx.zeros((rows, size), dtype) for size in reversed(pattern.shape))
                    bias = mx.zeros(pattern.shape[0], dtype) if make is even else None
                    qspmm(*matrix, pattern, x, bias)
                    qspmm_t(*matrix, pattern, y)


def launch_columns() -> None:
    """Launch the kernels of Krylov columns, of vectors of less than a panel and of many."""
    for panels, width in ((1, 32), (2, 96), (300, 1024)):
        x, basis, square = mx.ones((panels, 1, width)), mx.ones((panels, 100, width)), mx.ones(1)
        dots = columns.recur_dot("metal", x, x, x, square)
        columns.recur_rest("metal", x, x, x, square, dots)
        for count in (1, 100):
            columns.without("metal", basis, count, x, x)
        columns.combine("metal", basis, 0, mx.ones((9, 20)))


def launch_pauli_products() -> None:
    """Launch sums of Pauli strings, and moments: of small and large states, real and complex."""
    for n, dtype, sign in itertools.product((1, 4, 14), (mx.float32, mx.complex64), (0, 1)):
        terms = PauliTerms(n, (1, 1 << n - 1), (sign, 0))
        x, c = mx.zeros((2, 1 << n), dtype), mx.ones(2)
        pauli_product(terms, c, mx.ones(1 << n), x)
        pauli_product(terms, c, None, x)
        pauli_metal.moments(terms, x[None], x[None], real=False)


def variants() -> list[Variant]:
    """Return every kernel text that is launched, once, without those of ``EXCLUDED``."""
    with metal_emulator.Emulator(schedules=()) as emulator:
        launch_products()
        launch_quantized_products()
        launch_pauli_products()
        launch_columns()
    found = {
        launch.source: Variant(
            launch.kernel.removeprefix("mlx_sparse_nn_"), launch.source, tuple(launch.template)
        )
        for launch in emulator.launches
    }
    return [variant for variant in found.values() if variant.name not in EXCLUDED]
