"""The test of a library that was just built, run in a process of its own.

``python -m mlx_sparse_nn.core.backends.self_test PRIMITIVE [KERNELS DTYPE BLOCK_SIZE ...]`` ends
with 0 if all is right. The oracle is ``naive``, on whole numbers, so that all results are equal.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import mlx.core as mx

from mlx_sparse_nn.core.backends import naive
from mlx_sparse_nn.core.backends.binding import Binding, Kernel
from mlx_sparse_nn.core.pattern import CSRPattern

# Block-rows with a repeated and unsorted columns, with none, and with one; 5 block-columns.
_INDPTR, _INDICES = [0, 4, 4, 5, 7], [3, 0, 4, 0, 2, 1, 3]
_ROWS = (1, 2, 3, 7, 21, 45)


def main(arguments: list[str]) -> None:
    """Test a library of primitives, or one of kernels through it."""
    mx.set_default_device(mx.cpu)
    binding = Binding(Path(arguments[0]), n_threads=2)
    if len(arguments) > 1:
        path, dtype, *block_sizes = arguments[1:]
        for block_size in block_sizes:
            _test_products(binding, ctypes.CDLL(path), getattr(mx, dtype), int(block_size))


def _test_products(
    binding: Binding, library: ctypes.CDLL, dtype: mx.Dtype, block_size: int
) -> None:
    """Compare the three products, of several numbers of rows, with the oracle's."""
    spmm, sddmm = Kernel(library, "spmm"), Kernel(library, "sddmm")
    shape = (4 * block_size, 5 * block_size)
    pattern = CSRPattern(_INDPTR, _INDICES, shape, block_size)
    data, bias = _numbers(pattern.data_shape, dtype), _numbers(shape[:1], dtype)
    rows, cols = pattern.layout.rows, pattern.layout.cols
    for n in _ROWS:
        x, y = _numbers((n, shape[1]), dtype), _numbers((n, shape[0]), dtype)
        _same(binding.spmm(spmm, data, rows, x, bias), naive.spmm(data, pattern, x, bias))
        _same(binding.spmm(spmm, data, cols, y, None), naive.spmm_t(data, pattern, y))
        _same(binding.sddmm(sddmm, rows, y, x), naive.sddmm(pattern, y, x))


def _numbers(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return whole numbers from -2 to 2, whose sums of products are exact in every dtype."""
    size = mx.zeros(shape).size
    return ((mx.arange(size) * 7 + mx.arange(size) // 3) % 5 - 2).reshape(shape).astype(dtype)


def _same(found: mx.array, expected: mx.array) -> None:
    if found.dtype != expected.dtype or not mx.array_equal(found, expected):
        raise AssertionError(f"a product of shape {found.shape} is wrong")


if __name__ == "__main__":
    main(sys.argv[1:])
