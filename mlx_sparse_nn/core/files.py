"""Sparse arrays in files: SciPy's ``.npz``, both ways, and safetensors.

What a file holds is checked as everything else is that describes a matrix.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.arrays import COOArray, CSRArray, is_sparse
from mlx_sparse_nn.core.construct import bsr_array, coo_array, csr_array
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.sparse import SparseArray, check_dtype

_FORMATS = ("csr", "csc", "bsr", "coo")


def save_npz(file: str | PathLike, A: CSRArray | COOArray, compressed: bool = True) -> None:
    """Write a sparse array as SciPy's ``save_npz`` does, which ``scipy.sparse.load_npz`` reads.

    NumPy has no bfloat16: such values are written as float32. SciPy computes nothing of float16,
    which is written as it is.

    Args:
        file: Its name; ``.npz`` is added where it is missing.
        A: The array: csr, coo, or bsr if it has blocks.
        compressed: Whether to compress it.

    Raises:
        TypeError: ``A`` is not a sparse array of this package.
        ValueError: Its last blocks reach past the matrix, which SciPy's bsr cannot hold.
    """
    _check("save_npz", A)
    values = A.data.astype(mx.float32) if A.dtype == mx.bfloat16 else A.data
    parts: dict[str, Any] = {"data": np.array(values), "shape": np.array(A.shape)}
    if isinstance(A, COOArray):
        parts |= {"format": b"coo", "row": A.row, "col": A.col}
    else:
        if A.pattern.layout.has_edges:
            raise ValueError(
                f"[save_npz] SciPy's bsr holds whole blocks, and block_size {A.block_size} does "
                f"not divide the shape {A.shape}; use save_npz(file, A.tocsr()) or save_safetensors"
            )
        parts["format"] = b"csr" if A.block_size == 1 else b"bsr"
        parts |= {"indices": A.indices, "indptr": A.indptr}
    save = np.savez_compressed if compressed else np.savez
    save(file, _is_array=np.array(True), **parts)


def load_npz(file: str | PathLike, dtype: mx.Dtype | None = None) -> CSRArray | COOArray:
    """Read a sparse array that SciPy's ``save_npz`` has written, or this package's.

    csc becomes csr. For dia, convert with ``.tocsr()`` in SciPy.

    Args:
        file: Its name.
        dtype: Of the values. By default float64 becomes float32 and complex128 complex64; others,
            64-bit integers among them, stay what they are.

    Raises:
        TypeError: ``dtype`` is none of MLX, or the values are not numeric.
        ValueError: The file holds no sparse array, one in another format, or one whose indices
            describe no matrix.
    """
    from zipfile import BadZipFile  # takes a while to import
    from zlib import error as BadStream

    check_dtype("load_npz", dtype)
    broken = ValueError, BadZipFile, AttributeError, EOFError, NotImplementedError, TypeError
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as found:
            parts = {name: found[name] for name in found.files}
    except (*broken, BadStream) as error:
        raise ValueError(f"[load_npz] {file} is no npz file of arrays: {error}") from error
    kind = bytes(parts.get("format", np.array(b""))).rstrip(b"\0").decode("ascii", "replace")
    kind = kind.replace("\0", "")  # where the name was written as text
    if kind not in _FORMATS:
        raise ValueError(
            f"[load_npz] {file} must hold a sparse array as {', '.join(_FORMATS)}, got {kind!r}"
        )
    needed = ("row", "col") if kind == "coo" else ("indices", "indptr")
    if missing := [name for name in ("data", "shape", *needed) if name not in parts]:
        raise ValueError(f"[load_npz] {file} has no array {missing[0]!r}")
    shape = _shape("load_npz", file, parts["shape"])
    try:
        return _of_parts(kind, parts, shape, dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[load_npz] {file} holds no matrix: {error}") from error


def _of_parts(
    kind: str, parts: dict[str, np.ndarray], shape: tuple[int, int], dtype: mx.Dtype | None
) -> CSRArray | COOArray:
    data = parts["data"]
    if kind == "coo":
        return coo_array((data, (parts["row"], parts["col"])), shape, dtype)
    entries = (data, parts["indices"], parts["indptr"])
    if kind == "bsr":
        return bsr_array(entries, shape, dtype)
    if kind == "csc":
        return csr_array(entries, (shape[1], shape[0]), dtype).T
    return csr_array(entries, shape, dtype)


def save_safetensors(file: str | PathLike, A: CSRArray | COOArray) -> None:
    """Write a sparse array as safetensors: ``data``, ``indices``, ``indptr``, and its shape.

    Every dtype but float64, and every size of blocks, stays what it is. :func:`load_safetensors`
    reads it.

    Args:
        file: Its name, which ends in ``.safetensors``.
        A: The array; coordinates are written as csr.

    Raises:
        TypeError: ``A`` is not a sparse array of this package, or of float64.
    """
    _check("save_safetensors", A)
    if A.dtype == mx.float64:
        raise TypeError("[save_safetensors] MLX writes no float64 there; use save_npz, or astype")
    A = A.tocsr(canonical=False) if isinstance(A, COOArray) else A
    arrays = {"data": A.data, "indices": mx.array(A.indices), "indptr": mx.array(A.indptr)}
    sizes = {"n_rows": A.shape[0], "n_cols": A.shape[1], "block_size": A.block_size}
    mx.save_safetensors(str(file), arrays, {name: str(size) for name, size in sizes.items()})


def load_safetensors(file: str | PathLike) -> CSRArray:
    """Read a sparse array that :func:`save_safetensors` has written.

    Raises:
        ValueError: The file holds none, or one whose indices describe no matrix.
    """
    try:
        found: Any = mx.load(str(file), return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"[load_safetensors] {file} cannot be read: {error}") from error
    arrays, about = found
    sizes = [about.get(name, "") for name in ("n_rows", "n_cols", "block_size")]
    if set(arrays) != {"data", "indices", "indptr"} or not all(s.isdigit() for s in sizes):
        raise ValueError(
            f"[load_safetensors] {file} must hold data, indices and indptr, and n_rows, n_cols and "
            f"block_size as metadata, got {sorted(arrays)} and {sorted(about)}"
        )
    n_rows, n_cols, block_size = map(int, sizes)
    pattern = CSRPattern(arrays["indptr"], arrays["indices"], (n_rows, n_cols), block_size)
    return CSRArray(arrays["data"], pattern)


def _check(owner: str, A: object) -> None:
    if not is_sparse(A):
        hint = "; v[None] is the matrix of one row" if isinstance(A, SparseArray) else ""
        kind = type(A).__name__
        raise TypeError(f"[{owner}] A must be a CSRArray or COOArray, got {kind}{hint}")


def _shape(owner: str, file: Any, shape: np.ndarray) -> tuple[int, int]:
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise ValueError(f"[{owner}] {file} must hold a matrix, got shape {shape.tolist()}")
    return int(shape[0]), int(shape[1])
