"""The products in C++, on the CPU; names, arguments and results as in ``plain``.

``build`` compiles the kernels of a dtype and block size when they are first asked for.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core import index
from mlx_sparse_nn.core.backends import build
from mlx_sparse_nn.core.backends.binding import Binding, Kernel, LayoutError
from mlx_sparse_nn.core.cores import n_cores
from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.quantized import bits_of
from mlx_sparse_nn.core.transforms import ask_directly

NAME = "cpu"
PACKAGE = __name__.partition(".")[0]
TAKES_EDGES = True  # sizes are those of the matrix, past which the last blocks may reach
TAKES_AXES = False  # of size 1 before a single row of x
ELEMENTS = {
    mx.float32: "float",
    mx.bfloat16: "bfloat16",
    mx.float16: "float16",
    mx.float64: "double",
    mx.complex64: "complex64",
}
# Block sizes that have a library of their own, and some of all others, which share one.
OWN_KERNELS = (2, 4, 8, 16, 32, 64, 128)
SPGEMM_DTYPES = (mx.float32, mx.float64, mx.complex64)
TESTED_SIZES = ("3", "20", "48")
_FAILURES = (build.BuildError, LayoutError, OSError)


class Kernels(NamedTuple):
    """The kernels of a dtype and block size.

    Args:
        spmm_t: Of scalars alone, for a single row: it spreads the rows of the matrix, and needs no
            transpose. ``spmm`` takes one in all other cases.
    """

    spmm: Kernel
    sddmm: Kernel
    spmm_t: Kernel | None


@cache
def is_available() -> bool:
    """Return whether kernels can be had here; warn, once, if they should be and are not."""
    return platform.system() == "Linux" and has(binding)


def why_not() -> str | None:
    """Return why kernels cannot be had here, or None."""
    if platform.system() != "Linux":
        return "C++ kernels are for Linux: nobody has measured them beside Accelerate yet"
    try:
        binding()
    except _FAILURES as error:
        return str(error)
    return None


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product: for all but empty ones."""
    if layout.data_shape[0] * n_x * n_matrices == 0:
        return False
    if bits:
        return has(_quantized_kernel, dtype, bits)
    return has(_kernels, dtype, layout.block_size)


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    kernel = _kernels(x.dtype, layout.block_size).spmm
    return binding().spmm(kernel, data, layout.rows, layout.shape[0], x, bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    kernels = _kernels(y.dtype, layout.block_size)
    if kernels.spmm_t is not None and y.shape[-2] == 1:
        return binding().spmm_t(kernels.spmm_t, data, layout.rows, y)
    return binding().spmm(kernels.spmm, data, layout.cols, layout.shape[1], y, None)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    kernel = _kernels(x.dtype, layout.block_size).sddmm
    return binding().sddmm(kernel, layout.rows, layout.block_size, y, x)


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks; see ``plain.qspmm``."""
    kernel = _quantized_kernel(x.dtype, bits_of(packed))
    matrix = packed, scales, biases
    return binding().qspmm(kernel, *matrix, layout.rows, layout.shape[0], x, bias)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, layout: Layout, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks; see ``plain.qspmm_t``."""
    kernel = _quantized_kernel(y.dtype, bits_of(packed))
    matrix = packed, scales, biases
    return binding().qspmm(kernel, *matrix, layout.cols, layout.shape[1], y, None)


def takes_spgemm(dtype: mx.Dtype) -> bool:
    """Return whether there is a kernel for the product of two sparse matrices of a dtype."""
    return dtype in SPGEMM_DTYPES and has(_spgemm_kernels, dtype)


def spgemm(which: int, layouts: tuple[Layout, Layout, Layout], *operands: mx.array) -> mx.array:
    """Return the values of one of three matrices, ``c = a b``, of those of the other two.

    Args:
        which: 0, 1 or 2.
        layouts: Of a, b and c.
        operands: ``(V, n_blocks, ...)``, of one dtype.
    """
    a, b, c = (layout.rows for layout in layouts)
    kernel = _spgemm_kernels(operands[0].dtype)[which]
    return binding().spgemm(kernel, which, (a, b, c), *operands)


def library(dtype: mx.Dtype, block_size: int) -> Path:
    """Return the library of the products of a dtype and block size, built if need be.

    Raises:
        BuildError: It cannot be had.
    """
    element, name = ELEMENTS[dtype], str(dtype).removeprefix("mlx.core.")
    if block_size == 1:
        return build.kernels("scalars", [name, "1"], ELEMENT=element)
    if block_size in OWN_KERNELS:
        return build.kernels("blocks", [name, str(block_size)], ELEMENT=element, BLOCK=block_size)
    return build.kernels("blocks", [name, *TESTED_SIZES], ELEMENT=element, BLOCK=0)


def quantized_library(dtype: mx.Dtype, bits: int) -> Path:
    """Return the library of the products of a dtype by quantized blocks, built if need be.

    Raises:
        BuildError: It cannot be had.
    """
    element, name = ELEMENTS[dtype], str(dtype).removeprefix("mlx.core.")
    return build.kernels("quantized", [name, f"bits={bits}"], ELEMENT=element, BITS=bits)


@cache
def _quantized_kernel(dtype: mx.Dtype, bits: int) -> Kernel:
    """Return the kernel of a dtype and a number of bits, built if need be.

    Raises:
        BuildError, OSError: It cannot be had.
    """
    return Kernel(ctypes.CDLL(str(quantized_library(dtype, bits))), "qspmm")


@cache
def _kernels(dtype: mx.Dtype, block_size: int) -> Kernels:
    """Return the kernels of a dtype and block size, built if need be.

    Raises:
        BuildError, OSError: They cannot be had.
    """
    loaded = ctypes.CDLL(str(library(dtype, block_size)))
    spmm_t = Kernel(loaded, "spmm_t") if block_size == 1 else None
    return Kernels(Kernel(loaded, "spmm"), Kernel(loaded, "sddmm"), spmm_t)


@cache
def _spgemm_kernels(dtype: mx.Dtype) -> tuple[Kernel, Kernel, Kernel]:
    """Return the kernels of the product of two sparse matrices, built if need be.

    Raises:
        BuildError, OSError: They cannot be had.
    """
    name = str(dtype).removeprefix("mlx.core.")
    path = build.kernels("spgemm", [name, "spgemm"], ELEMENT=ELEMENTS[dtype])
    library = ctypes.CDLL(str(path))
    a, b, c = (Kernel(library, name) for name in ("spgemm_a", "spgemm_b", "spgemm"))
    return a, b, c


@cache
def binding() -> Binding:
    """Return the library that makes primitives, built if need be.

    Raises:
        BuildError, LayoutError, OSError: It cannot be had.
    """
    binding = Binding(build.primitive(), n_cores())
    ask_directly(binding.is_tracer)
    index.allocate_by(binding.indices)
    # Patterns use theirs from here on. NumPy does without it.
    with suppress(*_FAILURES):
        build.index()
        index.native.cache_clear()
    return binding


@cache
def has(get: Callable, *arguments: object) -> bool:
    """Return whether something can be had; warn, once, if it cannot."""
    try:
        get(*arguments)
    except _FAILURES as error:
        _warn(error)
        return False
    return True


_has_warned = False


def _warn(error: Exception) -> None:
    """Warn of the first failure; ``python -m mlx_sparse_nn info`` tells of all."""
    global _has_warned
    if not _has_warned:
        warnings.warn(
            f"[mlx_sparse_nn] products on the CPU run in plain MLX, several times slower: {error}",
            RuntimeWarning,
            stacklevel=_level_of_the_caller(),
        )
        _has_warned = True


def _level_of_the_caller() -> int:
    """Return the stack level, for a warning of the caller, of a line outside of MLX and ours."""
    level, frame = 1, sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("mlx", PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
