"""The library that makes MLX primitives of kernels, as Python calls it.

An ``mx.array`` is a nanobind object: behind Python's header lies the offset of the C++ array in it.
That is checked before any C++ reads an array, so that an MLX laid out otherwise is refused.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core.layout import Side

_MLX_VERSION: str = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
_HEADER = object.__basicsize__
_OBJECT = ctypes.py_object
# nanobind's flags of an object: two bits of state, 2 for ready; whether the C++ object lies at the
# offset itself; whether within this object.
_READY, _DIRECT = 2, 4


class LayoutError(RuntimeError):
    """Python or MLX lays out its objects in a way that is not known here."""


class Kernel:
    """A kernel of a library, as C++ takes it.

    Attributes:
        address: Of two pointers: the kernel, and what says how much scratch it takes.
    """

    def __init__(self, library: ctypes.CDLL, name: str):
        pointers = (library[name], library[f"{name}_scratch"])
        addresses = [ctypes.cast(pointer, ctypes.c_void_p).value for pointer in pointers]
        self._pointers = (ctypes.c_void_p * 2)(*addresses)
        self.address = ctypes.addressof(self._pointers)


class Binding:
    """The loaded library. It is called with Python's lock held: hence PyDLL.

    Args:
        path: The library.
        n_threads: Threads that kernels may use.

    Raises:
        LayoutError: Arrays do not lie as it reads them, or it was built for another MLX.
        OSError: It cannot be loaded.
    """

    def __init__(self, path: Path, n_threads: int):
        check_layout(mx.array([1.0]))
        library = ctypes.PyDLL(str(path))
        library.mlx_version.restype = ctypes.c_char_p
        if (version := library.mlx_version().decode()) != _MLX_VERSION:
            raise LayoutError(f"the library is of MLX {version}, this is {_MLX_VERSION}")
        library.set_up.argtypes = [ctypes.c_size_t, _OBJECT, ctypes.c_int]
        library.set_up(_HEADER, None, n_threads)
        _check_probe(library)
        self.is_tracer = library.is_tracer
        self.is_tracer.argtypes, self.is_tracer.restype = [_OBJECT], ctypes.c_bool
        self._make_indices = library.make_indices
        self._make_indices.argtypes, self._make_indices.restype = [_OBJECT, ctypes.c_int], None
        self._spmm = _function(library, "make_spmm", 6)
        self._spmm_t = _function(library, "make_spmm_t", 4)
        self._qspmm = _function(library, "make_qspmm", 8)
        self._sddmm = _function(library, "make_sddmm", 4)
        self._pauli_product = _function(library, "make_pauli_product", 4, n_sizes=0)
        self._pauli_moments = _function(library, "make_pauli_moments", 3, n_sizes=0)
        self._spgemm = _function(library, "make_spgemm", 8, n_sizes=2)

    def indices(self, n: int) -> mx.array:
        """Return ``(n,)`` int32 that nobody has written yet."""
        out = mx.array(0)  # C++ writes the array into it
        self._make_indices(out, n)
        return out

    def spmm(
        self,
        kernel: Kernel,
        data: mx.array,
        side: Side,
        n_rows: int,
        x: mx.array,
        bias: mx.array | None,
    ) -> mx.array:
        """Return the product with a side of the matrix, of ``n_rows`` rows, not computed yet."""
        arrays = data, side.indptr, side.indices, side.perm, x, bias
        return _made(self._spmm, kernel, *arrays, n_rows)

    def spmm_t(self, kernel: Kernel, data: mx.array, rows: Side, y: mx.array) -> mx.array:
        """Return the product of the transpose of scalars with one row, not computed yet."""
        return _made(self._spmm_t, kernel, data, rows.indptr, rows.indices, y, rows.n_block_cols)

    def qspmm(
        self,
        kernel: Kernel,
        packed: mx.array,
        scales: mx.array,
        biases: mx.array,
        side: Side,
        n_rows: int,
        x: mx.array,
        bias: mx.array | None,
    ) -> mx.array:
        """Return the product with a side of a matrix of quantized blocks, not computed yet."""
        matrix = packed, scales, biases, side.indptr, side.indices, side.perm
        return _made(self._qspmm, kernel, *matrix, x, bias, n_rows)

    def sddmm(
        self, kernel: Kernel, rows: Side, block_size: int, y: mx.array, x: mx.array
    ) -> mx.array:
        """Return the sampled product, not computed yet."""
        return _made(self._sddmm, kernel, rows.indptr, rows.indices, y, x, block_size)

    def pauli_product(
        self,
        kernel: Kernel,
        terms: mx.array,
        coefficients: mx.array,
        diagonal: mx.array | None,
        x: mx.array,
    ) -> mx.array:
        """Return the product of sums of Pauli strings and states, not computed yet."""
        return _made(self._pauli_product, kernel, terms, coefficients, x, diagonal)

    def pauli_moments(self, kernel: Kernel, terms: mx.array, u: mx.array, x: mx.array) -> mx.array:
        """Return the moments of Pauli strings between states, not computed yet."""
        return _made(self._pauli_moments, kernel, terms, u, x)

    def spgemm(
        self, kernel: Kernel, which: int, sides: tuple[Side, Side, Side], *operands: mx.array
    ) -> mx.array:
        """Return the values of one of three matrices, ``c = a b``, not computed yet.

        Args:
            kernel: That of this one.
            which: 0, 1 or 2.
            sides: Their rows.
            operands: The values of the other two, ``(V, n_blocks, ...)``.
        """
        a, b, c = sides
        arrays = *operands, b.indptr, b.indices, c.indptr, c.indices
        return _made(self._spgemm, kernel, a.indptr, a.indices, *arrays, which, c.n_block_cols)


def check_layout(array: mx.array) -> None:
    """Raise unless an array lies in its Python object as the library reads it."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise LayoutError("this Python runs without its global lock")
    if type(array).__basicsize__ < _HEADER + 8 + ctypes.sizeof(ctypes.c_void_p):
        raise LayoutError(f"mx.array takes {type(array).__basicsize__} bytes")
    start = id(array) + _HEADER
    offset = ctypes.c_int32.from_address(start).value
    flags = ctypes.c_uint8.from_address(start + 4).value
    if offset != _HEADER + 8 or flags & 3 != _READY or not flags & _DIRECT:
        raise LayoutError(f"mx.array has offset {offset} and flags {flags}")


def _check_probe(library: ctypes.PyDLL) -> None:
    library.probe.argtypes = [_OBJECT, ctypes.POINTER(ctypes.c_int64)]
    for array in (mx.array([[1.0, 2.0, 3.0]]), mx.zeros((4, 5, 6), mx.float16)):
        check_layout(array)
        found = (ctypes.c_int64 * 3)()
        library.probe(array, found)
        if tuple(found) != (array.ndim, array.size, array.itemsize):
            raise LayoutError(f"an array of shape {array.shape} was read as {tuple(found)}")


def _made(function: Any, kernel: Kernel, *operands: Any) -> mx.array:
    """Return the array that a function of the library makes of operands."""
    out = mx.array(0)  # C++ writes the product into it
    error = function(out, kernel.address, *operands)
    if error is not None:
        raise RuntimeError(f"[mlx_sparse_nn] {error.decode()}")
    return out


def _function(library: ctypes.PyDLL, name: str, n_arrays: int, n_sizes: int = 1) -> Any:
    """Return a function of an array to write to, a kernel, arrays or None, and sizes."""
    function = library[name]
    arrays, sizes = [_OBJECT] * n_arrays, [ctypes.c_int] * n_sizes
    function.argtypes = [_OBJECT, ctypes.c_void_p, *arrays, *sizes]
    function.restype = ctypes.c_char_p
    return function
