"""The products that ``python -m mlx_sparse_nn check`` computes, and what they have to be."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import ops
from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.quantized import BITS, unpack
from mlx_sparse_nn.diagnostics.rounding import (
    ACCUMULATOR,
    EPS,
    TF32_EPS,
    to_numpy,
    tolerance,
    underflow,
)

PRODUCTS = ("spmm", "spmm_t", "sddmm", "qspmm", "qspmm_t")
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
BLOCK_SIZES = (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Rows of x with a pattern, so that every tile meets edges, and few rows a long block-row.
ROWS = ((1, "long"), (3, "whole"), (7, "edges"), (12, "long"), (30, "edges"), (64, "whole"))
ROWS = (*ROWS, (150, "edges"))
SCALAR_ROWS = ((1, "edges"), (2, "whole"), (3, "edges"), (4, "whole"), (7, "edges"), (12, "whole"))
SCALAR_ROWS = (*SCALAR_ROWS, (30, "edges"), (40, "whole"), (90, "edges"), (120, "whole"))
QUANTIZED_TILES = (  # block size, group, rows of x: some fill a GPU, some are one simdgroup's
    (32, 32, 3, "even"),
    (32, 32, 20, "even"),
    (128, 128, 640, "narrow"),
    (64, 64, 1280, "narrow"),
    (64, 32, 640, "narrow"),
    (32, 32, 1280, "narrow"),
)
SCALAR_BLOCKS = (1, 2, 3)
SAMPLED_ROWS = ((5, "edges"), (20, "even"), (600, "whole"))  # the last are summed in parts
QUANTIZED_ROWS = ((1, "long"), (2, "even"), (4, "edges"), (7, "whole"), (12, "long"), (30, "edges"))
QUANTIZED_ROWS = (*QUANTIZED_ROWS, (50, "whole"), (150, "edges"))
PACKINGS = ((32, 32), (64, 32), (64, 64), (128, 32), (128, 64), (128, 128), (96, 32))  # B, group
HEAVY = {1: 20_000, 3: 2_500, 16: 2_500}  # values in the longest row, by block size


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        product: One of ``PRODUCTS``.
        block_size: Side of the blocks.
        dtype: Of all operands.
        rows: Rows of x.
        pattern: ``"whole"``, ``"edges"`` (the last blocks reach past the matrix, and hold nan
            there), ``"one"`` (block alone), ``"even"`` (3 blocks in each block-row), ``"narrow"``
            (one block-column), ``"long"`` (20 blocks in one block-row), or ``"heavy"`` (thousands
            of values in one).
        bias: Whether a bias is added.
        bits, group_size: Of quantized blocks; 0 of others.
    """

    product: str
    block_size: int
    dtype: str
    rows: int
    pattern: str
    bias: bool = False
    bits: int = 0
    group_size: int = 0

    @property
    def name(self) -> str:
        """What ``--only`` takes: ``spmm-64-float16-12-edges-bias``."""
        parts = [self.product, self.block_size, self.dtype, self.rows, self.pattern]
        if self.bits:
            parts += [f"{self.bits}bits", f"group{self.group_size}"]
        return "-".join(map(str, parts + ["bias"] * self.bias))

    @property
    def words(self) -> str:
        """What it is, for people."""
        quantized = f", {self.bits} bits in groups of {self.group_size}" if self.bits else ""
        return (
            f"{self.product}, block_size {self.block_size}, {self.dtype}{quantized}, {self.rows} "
            f"row{'s' * (self.rows > 1)} of x, pattern {self.pattern}{', bias' * self.bias}"
        )

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Operands:
    """What a product is computed from, on the CPU.

    Attributes:
        pattern: The pattern.
        data: Stored values, or what they are packed into: packed, scales and biases.
        x: ``(rows, n_cols)``; the operand of ``spmm_t`` too, which has ``n_rows``.
        y: The other operand of ``sddmm``, or None.
        bias: ``(n_rows,)`` or None.
    """

    pattern: CSRPattern
    data: tuple[mx.array, ...]
    x: mx.array
    y: mx.array | None
    bias: mx.array | None


def all_cases() -> list[Case]:
    """Return what reaches every kernel and tile of Metal: in float32, and in a 16-bit dtype.

    Of CUDA, it leaves out the panels, which take large products alone.
    """
    found = []
    for size in BLOCK_SIZES:
        for product in ("spmm", "spmm_t", "sddmm"):
            for rows, pattern in _rows(product, size):
                bias = product == "spmm" and pattern != "whole"
                drawn = ("float16", "bfloat16")[zlib.crc32(f"{product}{size}{rows}".encode()) % 2]
                for dtype in DTYPES if product == "sddmm" else ("float32", drawn):
                    found.append(Case(product, size, dtype, rows, pattern, bias))
    packings, dtypes = cycle(PACKINGS), cycle(DTYPES)
    sizes = [(bits, *next(packings), *row) for bits in BITS for row in QUANTIZED_ROWS]
    sizes += [(bits, *more) for bits, more in zip(BITS, QUANTIZED_TILES, strict=True)]
    for bits, size, group_size, rows, pattern in sizes:
        dtype = next(dtypes)
        for product in ("qspmm", "qspmm_t"):
            bias = product == "qspmm" and pattern == "edges"
            found.append(Case(product, size, dtype, rows, pattern, bias, bits, group_size))
    return found


def quick_cases() -> list[Case]:
    """Return about a third of :func:`all_cases`, drawn, the same ones each time."""
    draw = random.Random(0)
    return [case for case in all_cases() if draw.random() < 1 / 3]


def _rows(product: str, block_size: int) -> Iterator[tuple[int, str]]:
    if product == "sddmm":
        yield from SAMPLED_ROWS
    else:
        yield from SCALAR_ROWS if block_size in SCALAR_BLOCKS else ROWS
    if block_size < 8:
        yield 1, "one"
    if block_size in HEAVY:
        yield from ((1, "heavy"), (6, "heavy"))


def operands_of(case: Case) -> Operands:
    """Draw the operands of a case, the same ones each time, by NumPy and MLX's CPU."""
    rng = np.random.default_rng(case.seed)
    dtype, pattern = DTYPES[case.dtype], _pattern(case, rng)
    n_rows, n_cols = pattern.shape

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    with mx.stream(mx.cpu):
        if case.bits:
            blocks = mx.array(normal(*pattern.data_shape))
            packed, *scaling = mx.quantize(blocks, case.group_size, case.bits)
            data = (packed, *(a.astype(dtype) for a in scaling))
        else:
            values = normal(*pattern.data_shape)
            values[_outside(pattern)] = np.nan
            data = (mx.array(values).astype(dtype),)
        x = mx.array(normal(case.rows, n_rows if case.product.endswith("_t") else n_cols))
        y = mx.array(normal(case.rows, n_rows)).astype(dtype) if case.product == "sddmm" else None
        bias = mx.array(normal(n_rows)).astype(dtype) if case.bias else None
        operands = Operands(pattern, data, x.astype(dtype), y, bias)
        mx.eval(*data, operands.x, *(a for a in (y, bias) if a is not None))
    return operands


def compute(case: Case, given: Operands) -> mx.array:
    """Return the product, by whatever computes it on MLX's default device."""
    if given.y is not None:
        return ops.sddmm(given.pattern, given.y, given.x)
    product = getattr(ops, case.product)
    bias = () if given.bias is None else (given.bias,)
    return product(*given.data, given.pattern, given.x, *bias)


def expected(case: Case, given: Operands, by_plain: bool = False, tf32: bool = False) -> Expected:
    """Return the product by the oracle in float64 on the CPU, and the error of each element that
    rounding explains.

    Args:
        case: The case.
        given: Its operands.
        by_plain: Whether plain MLX computes it, which rounds on the way. Kernels round sums once.
        tf32: Whether its float32 factors are rounded to TF32.
    """
    dtype = DTYPES[case.dtype]
    with mx.stream(mx.cpu):
        values, parts = _values(given)
        value = to_numpy(_oracle(case, given, values, sizes=False))
        size = to_numpy(_oracle(case, given, mx.abs(values), sizes=True))
        # Sums of what quantized values are sums of: a scaled integer, and a bias.
        wide = size if parts is values else to_numpy(_oracle(case, given, parts, sizes=True))
    accumulated = tolerance(ACCUMULATOR.get(dtype, dtype), _terms(case, given.pattern), wide)
    bound = accumulated + EPS[dtype] * np.abs(value) + underflow(dtype)
    if case.bits:  # a value may be rounded to 16 bits before it is multiplied
        bound += EPS[dtype] * size
    if by_plain:
        bound += EPS[dtype] * wide
    if tf32 and dtype == mx.float32:
        bound += 2 * TF32_EPS * size
    return Expected(value, bound)


class Expected(NamedTuple):
    """A product, and the errors that it may have, in float64."""

    value: np.ndarray
    bound: np.ndarray


def _oracle(case: Case, given: Operands, values: mx.array, sizes: bool) -> mx.array:
    """Return the product by the oracle, of these values; or of the sizes of all operands."""
    operands = (given.x, given.y, given.bias)
    x, y, bias = (None if a is None else a.astype(mx.float64) for a in operands)
    if sizes:
        x, y, bias = (None if a is None else mx.abs(a) for a in (x, y, bias))
    assert x is not None
    if y is not None:
        return naive.sddmm(given.pattern, y, x)
    if case.product.endswith("_t"):
        return naive.spmm_t(values, given.pattern, x)
    return naive.spmm(values, given.pattern, x, bias)


def _values(given: Operands) -> tuple[mx.array, mx.array]:
    """Return the stored values in float64, and the sizes of what they are sums of."""
    if len(given.data) == 1:
        values = given.data[0].astype(mx.float64)
        return values, values
    packed, *scaling = given.data
    integers = mx.array(unpack(packed).astype(np.float64), mx.float64)
    group_size = packed.shape[-2] // scaling[0].shape[-1]
    scales, biases = (mx.repeat(a.astype(mx.float64), group_size, axis=-1) for a in scaling)
    return scales * integers + biases, mx.abs(scales * integers) + mx.abs(biases)


def _terms(case: Case, pattern: CSRPattern) -> np.ndarray | int:
    """Return how many products each element sums up, and one for a bias."""
    if case.product == "sddmm":
        return case.rows
    if case.product.endswith("_t"):
        return _lengths(pattern.indices, pattern.grid[1], pattern, pattern.shape[1])
    return _lengths(pattern.row_indices, pattern.grid[0], pattern, pattern.shape[0]) + 1


def _lengths(places: np.ndarray, n: int, pattern: CSRPattern, size: int) -> np.ndarray:
    """Return how many stored values lie in each row, by the block-row of each block."""
    counts = np.bincount(places, minlength=n) * pattern.block_size
    return np.repeat(counts, pattern.block_size)[:size]


def _pattern(case: Case, rng: np.random.Generator) -> CSRPattern:
    """Return a pattern with columns out of order, and unless it is even, an empty block-row and a
    repeated block."""
    size = case.block_size
    rows: list[Any]
    if case.pattern == "heavy":
        n = HEAVY[size] // size
        rows = [rng.permutation(n), [3, 0], [], *([int(i)] for i in rng.integers(0, n, 9))]
    elif case.pattern == "one":
        rows, n = [[0]], 1
    elif case.pattern == "narrow":
        rows, n = [[0]] * 16, 1
    elif case.pattern == "long":
        rows = [[1, 23], rng.permutation(24)[:20], [], [5, 0, 5]]
        n = 24
    else:
        n = max(12, 48 // size)
        rows = [rng.permutation(n)[: 2 + i % 3] for i in range(max(4, 24 // size))]
        rows[0] = rng.permutation(n)[: 10 if case.pattern == "whole" else 6]
        rows[1], rows[2] = [], [n - 1, 0, n - 1]
    if case.pattern == "even":
        rows = [rng.permutation(n)[:3] for _ in rows]
    row = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    col = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
    shape = [len(rows) * size, n * size]
    if case.product.endswith("_t"):  # what is long is then a block-column
        order = np.argsort(col, kind="stable")
        row, col, shape = col[order], row[order], shape[::-1]
    if case.pattern == "edges":
        shape = [shape[0] - size // 2, shape[1] - (size - 1) // 2]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=-(-shape[0] // size)))])
    return CSRPattern(indptr, col, (shape[0], shape[1]), size)


def _outside(pattern: CSRPattern) -> np.ndarray:
    """Return which stored values lie outside the matrix."""
    size = pattern.block_size
    row, col = (
        stored[:, None] * size + np.arange(size)
        for stored in (pattern.row_indices, pattern.indices)
    )
    beyond = (row >= pattern.shape[0])[:, :, None] | (col >= pattern.shape[1])[:, None, :]
    return beyond.reshape(pattern.data_shape)
