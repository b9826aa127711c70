"""The test of a library that was just built, run in a process of its own.

``python -m mlx_sparse_nn.core.backends.self_test PRIMITIVE [KERNELS DTYPE WHAT ...]`` ends with 0
if all is right. The oracle is ``naive``, on whole numbers, so that all results are equal.
With ``index INDEX``, it is that of index arrays, and NumPy is the oracle.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import index
from mlx_sparse_nn.core.backends import naive, pauli_naive
from mlx_sparse_nn.core.backends.binding import Binding, Kernel
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.strings import PauliTerms, by_parts

# Block-rows with a repeated and unsorted columns, with none, and with one; 5 block-columns.
_INDPTR, _INDICES = [0, 4, 4, 5, 7], [3, 0, 4, 0, 2, 1, 3]
_ROWS = (1, 2, 3, 7, 21, 45)


def main(arguments: list[str]) -> None:
    """Test a library of primitives, or one of kernels through it; or that of index arrays."""
    if arguments[0] == "index":
        return _test_index(Path(arguments[1]))
    mx.set_default_device(mx.cpu)
    binding = Binding(Path(arguments[0]), n_threads=2)
    if len(arguments) > 1:
        path, dtype, *tested = arguments[1:]
        if tested == ["pauli"]:
            return _test_pauli(binding, ctypes.CDLL(path), getattr(mx, dtype))
        if tested == ["spgemm"]:
            return _test_spgemm(binding, ctypes.CDLL(path), getattr(mx, dtype))
        for what in tested:  # block sizes, or bits=4
            bits = what.removeprefix("bits=")
            test = _test_products if bits == what else _test_quantized
            for edges in (0, 1):  # blocks that lie in the matrix, then some that reach past it
                test(binding, ctypes.CDLL(path), getattr(mx, dtype), int(bits), edges)


def _test_products(
    binding: Binding, library: ctypes.CDLL, dtype: mx.Dtype, block_size: int, edges: int
) -> None:
    """Compare the three products, of several numbers of rows, with the oracle's."""
    spmm, sddmm = Kernel(library, "spmm"), Kernel(library, "sddmm")
    pattern = _pattern(block_size, edges)
    shape, layout = pattern.shape, pattern.layout
    rows, cols = layout.rows, layout.cols
    data, bias = _numbers(pattern.data_shape, dtype), _numbers(shape[:1], dtype)
    stored = _spoiled(pattern, data)
    for n in _ROWS:
        x, y = _numbers((n, shape[1]), dtype), _numbers((n, shape[0]), dtype)
        found = binding.spmm(spmm, stored, rows, shape[0], x, bias)
        _same(found, naive.spmm(data, pattern, x, bias))
        found = binding.spmm(spmm, stored, cols, shape[1], y, None)
        _same(found, naive.spmm_t(data, pattern, y))
        found = binding.sddmm(sddmm, rows, block_size, y, x)
        _same(found, naive.sddmm(pattern, y, x))
        if n == block_size == 1:
            spmm_t = Kernel(library, "spmm_t")
            _same(binding.spmm_t(spmm_t, data, rows, y), naive.spmm_t(data, pattern, y))


def _test_quantized(
    binding: Binding, library: ctypes.CDLL, dtype: mx.Dtype, bits: int, edges: int
) -> None:
    """Compare both products by quantized blocks with the oracle's."""
    qspmm = Kernel(library, "qspmm")
    for block_size, group_size in ((32, 32), (64, 32), (128, 128)):
        pattern = _pattern(block_size, edges * (block_size // 2 + 3))
        shape, rows, cols = pattern.shape, pattern.layout.rows, pattern.layout.cols
        lead = (pattern.n_blocks, block_size)
        packed = _words((*lead, block_size * bits // 32))
        scales = _numbers((*lead, block_size // group_size), dtype)
        matrix, bias = (packed, scales, -scales), _numbers(shape[:1], dtype)
        for n in _ROWS:
            x, y = _numbers((n, shape[1]), dtype), _numbers((n, shape[0]), dtype)
            found = binding.qspmm(qspmm, *matrix, rows, shape[0], x, bias)
            _same(found, naive.qspmm(*matrix, pattern, x, bias))
            found = binding.qspmm(qspmm, *matrix, cols, shape[1], y, None)
            _same(found, naive.qspmm_t(*matrix, pattern, y))


def _test_pauli(binding: Binding, library: ctypes.CDLL, dtype: mx.Dtype) -> None:
    """Compare sums of Pauli strings, and their moments, with the definition."""
    product, moments = Kernel(library, "pauli_product"), Kernel(library, "pauli_moments")
    for n in (1, 4, 9, 13):
        masks = [1 + k * 2654435769 % (2**n - 1) for k in range(20)] + [1 << k for k in range(n)]
        terms = PauliTerms(n, tuple(masks), tuple(k % 3 * k % 2**n for k in range(len(masks))))
        strings = mx.array([*zip(terms.flips, terms.signs, strict=True)], dtype=mx.int32)
        for n_sums, n_states in ((1, 1), (2, 3)):
            u, x = (_numbers((n_sums, n_states, 2**n), dtype), _numbers((2**n,), dtype))
            x = x - u
            c, d = _numbers((n_sums, len(terms)), dtype), _numbers((n_sums, 2**n), dtype)
            for diagonal in (d, None):
                found = binding.pauli_product(product, strings, c, diagonal, x)
                _same(found, _by_naive(pauli_naive.product, terms, c, diagonal, x))
            found = binding.pauli_moments(moments, strings, u, x)
            _same(found, _by_naive(pauli_naive.moments, terms, u, x))
    if dtype == mx.float32:  # and complex states, two floats each
        x = _numbers((2, 3, 2**9), dtype) + 1j * _numbers((2**9,), dtype)
        terms, c, d = PauliTerms(9, (1, 256, 85), (0, 3, 40)), c[:, :3], _numbers((2, 2**9), dtype)
        parts = by_parts(terms, False)
        strings = mx.array([*zip(parts.flips, parts.signs, strict=True)], dtype=mx.int32)
        for diagonal in (d, None):
            found = binding.pauli_product(product, strings, c, diagonal, x)
            _same(found, _by_naive(pauli_naive.product, terms, c, diagonal, x))


def _by_naive(product: Callable, terms: PauliTerms, *arrays: mx.array | None) -> mx.array:
    """Return what the oracle gives of MLX arrays."""
    result = product(terms, *(None if a is None else np.array(a) for a in arrays))
    return mx.array(result, next(a.dtype for a in reversed(arrays) if a is not None))


def _test_spgemm(binding: Binding, library: ctypes.CDLL, dtype: mx.Dtype) -> None:
    """Compare the product of two sparse matrices, and its gradients, with dense ones."""
    of_a, of_b, of_c = (Kernel(library, name) for name in ("spgemm_a", "spgemm_b", "spgemm"))
    for block_size in (1,) if dtype == mx.complex64 else (1, 2, 3, 4, 8, 16):
        a = _pattern(block_size, 0)
        c = CSRPattern.from_places(np.arange(16), (a.shape[0],) * 2, block_size)
        patterns = (a, a.T, c)
        data = [_numbers((2, *p.data_shape), dtype) for p in patterns]
        dense = [naive.dense(values, p) for values, p in zip(data, patterns, strict=True)]
        of_left, of_right = (x.swapaxes(-1, -2) for x in dense[1:])
        sides = (a.layout.rows, a.T.layout.rows, c.layout.rows)
        found = binding.spgemm(of_c, 2, sides, data[0], data[1])
        _same(naive.dense(found, c), dense[0] @ dense[1])
        found = binding.spgemm(of_a, 0, sides, data[1], data[2])
        _same(found, naive.sddmm(a, of_right, of_left))
        found = binding.spgemm(of_b, 1, sides, data[0], data[2])
        _same(found, naive.sddmm(a.T, dense[0], dense[2]))


def _pattern(block_size: int, missing: int) -> CSRPattern:
    """Return a pattern whose matrix has so many rows and columns less than its blocks."""
    missing = min(missing, block_size - 1)
    shape = (4 * block_size - missing, 5 * block_size - missing)
    return CSRPattern(_INDPTR, _INDICES, shape, block_size)


def _spoiled(pattern: CSRPattern, data: mx.array) -> mx.array:
    """Return values with nans where they lie outside the matrix."""
    if not pattern.layout.has_edges:
        return data
    ones = [mx.ones((1, size), data.dtype) for size in pattern.shape]
    inside = naive.sddmm(pattern, *ones) == 1
    return mx.where(inside, data, mx.array(float("nan"), data.dtype))


def _words(shape: tuple[int, ...]) -> mx.array:
    """Return words of mixed bits."""
    size = mx.zeros(shape).size
    return (mx.arange(size, dtype=mx.uint32) * 2654435769 + 12345).reshape(shape)


def _test_index(path: Path) -> None:
    """Compare what is made of index arrays with NumPy's, on both sides of each choice in C++."""
    found, expected = (_index_arrays(library) for library in (index.Native(path), None))
    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise AssertionError("arrays of a pattern are wrong")


def _index_arrays(library: index.Native | None) -> list[Any]:
    """Return what a library, or NumPy, makes of some index arrays."""
    with mock.patch.object(index, "native", return_value=library):
        made = []
        for n_rows, n_cols in ((300, 500), (2000, 9000), (9000, 100_000)):
            shape, numbers = (n_rows, n_cols), np.arange(20_000)
            rows, cols = numbers * 7919 % n_rows, numbers * 31 % n_cols
            made += index.sort_coordinates(rows.astype(np.int32), cols.astype(np.int32), shape)
            indptr, indices, _ = made[-3:]
            made += [*index.transpose(indptr, indices, n_cols), index.copy_in_range(cols)]
            made += [index.copy_in_range(cols.astype(np.int32), n_cols), index.copy_in_range(-cols)]
            made += [index.ascends(indptr, indices), index.in_range(indices, n_cols - 1)]
            made += [index.rises(indptr, 20_000), index.rises(indptr[::-1].copy(), 0)]
            other = index.transpose(indptr, indices, n_cols)[:2]
            n_pairs = index.n_pairs((indptr, indices), other)
            product = index.multiply((indptr, indices), other, n_rows, n_pairs)
            made += [*product, *index.pairs((indptr, indices), other, product, n_rows, n_pairs)]
    return made


def _numbers(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return whole numbers from -2 to 2, whose sums of products are exact in every dtype."""
    size = mx.zeros(shape).size
    return ((mx.arange(size) * 7 + mx.arange(size) // 3) % 5 - 2).reshape(shape).astype(dtype)


def _same(found: mx.array, expected: mx.array) -> None:
    if found.dtype != expected.dtype or not mx.array_equal(found, expected):
        raise AssertionError(f"a product of shape {found.shape} is wrong")


if __name__ == "__main__":
    main(sys.argv[1:])
