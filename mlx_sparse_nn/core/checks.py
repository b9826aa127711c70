"""The rules about arguments, each once: every public function refuses the same in the same words.

``owner`` is the public name that the user called. Messages begin with it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Real
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core import index

ArrayLike: TypeAlias = "mx.array | np.ndarray | Sequence"

INT32_MAX = 2**31 - 1
SEED_MAX = 2**64 - 1  # of mx.random.key


def shown(value: Any) -> str:
    """Return the repr of a value for an error, or its type where a transform traces an array.

    A tracer has no numbers to show, and MLX says only that it may not be evaluated.
    """
    try:
        return repr(value)
    except ValueError:
        return f"{type(value).__name__} traced by a transform"


def check_size(owner: str, name: str, value: int, minimum: int = 0) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise."""
    value = _check_integer(owner, name, value)
    if not minimum <= value <= INT32_MAX:
        raise ValueError(f"[{owner}] {name} must be in [{minimum}, 2**31 - 1], got {value}")
    return value


def check_seed(owner: str, seed: int) -> int:
    """Return ``seed`` as an int that NumPy and MLX take, or raise."""
    seed = _check_integer(owner, "seed", seed)
    if not 0 <= seed <= SEED_MAX:
        raise ValueError(f"[{owner}] seed must be in [0, 2**64 - 1], got {seed}")
    return seed


def check_number(owner: str, name: str, value: float) -> None:
    """Raise unless ``value`` is a real number of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"[{owner}] {name} must be a number, got {shown(value)}")


def check_density(owner: str, density: float, name: str = "density") -> None:
    """Raise unless ``density`` is a number in (0, 1]."""
    check_number(owner, name, density)
    if not 0 < density <= 1:
        raise ValueError(f"[{owner}] {name} must be in (0, 1], got {density}")


def check_fraction(owner: str, name: str, value: float) -> None:
    """Raise unless ``value`` is a number in [0, 1]."""
    check_number(owner, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"[{owner}] {name} must be in [0, 1], got {value}")


def check_name(
    owner: str, name: str, value: object, known: Sequence[str], or_else: str = ""
) -> None:
    """Raise unless ``value`` is one of the ``known`` words."""
    message = f"[{owner}] {name} must be one of {tuple(known)}{or_else}, got {shown(value)}"
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in known:
        raise ValueError(message)


def check_absent(owner: str, why: str, **arguments: object) -> None:
    """Raise unless all ``arguments`` are None: ``why`` says what leaves them no meaning."""
    for name, value in arguments.items():
        if value is not None:
            got = type(value).__name__ if isinstance(value, mx.array) else repr(value)
            raise ValueError(f"[{owner}] {name} must be left out, got {got}: {why}")


def check_shape(owner: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a matrix as two ints, or raise."""
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ValueError(f"[{owner}] shape must be (n_rows, n_cols), got {shape!r}")
    return check_size(owner, "n_rows", shape[0]), check_size(owner, "n_cols", shape[1])


def check_dims(owner: str, shape: Sequence[int]) -> None:
    """Raise unless a weight ``(output_dims, input_dims)`` has at least one value."""
    for name, size in zip(("output_dims", "input_dims"), shape, strict=True):
        if check_size(owner, name, size) == 0:
            raise ValueError(
                f"[{owner}] {name} is 0: a layer has at least one block-row and one block-column"
            )


def check_indices(
    owner: str,
    name: str,
    values: ArrayLike,
    dtype: type[np.signedinteger] = np.int32,
    copy: Callable[[np.ndarray], np.ndarray] = np.copy,
) -> np.ndarray:
    """Return ``values`` as a new one-dimensional NumPy array of ``dtype``, or raise.

    ``copy`` says how what has that dtype is copied.
    """
    array = check_rectangular(owner, name, values)
    if array.ndim != 1:
        raise ValueError(f"[{owner}] {name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, dtype)
    if array.dtype.kind not in "iu":
        raise TypeError(f"[{owner}] {name} must be integers, got {array.dtype}")
    if array.dtype == dtype:
        return copy(array)
    if dtype is np.int32 and array.dtype == np.int64:
        narrowed = index.copy_in_range(array)
        if narrowed is not None:
            return narrowed
    if not np.can_cast(array.dtype, dtype):
        low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            worst = high if high > limits.max else low
            raise ValueError(
                f"[{owner}] {name} holds {worst}, which does not fit {limits.bits} bits"
            )
    return array.astype(dtype)


def check_columns(owner: str, name: str, values: ArrayLike, limit: int) -> np.ndarray:
    """Return :func:`check_indices` of indices in ``[0, limit)``; in one pass, if it can."""
    array = check_rectangular(owner, name, values)
    if array.ndim == 1 and array.size and array.dtype in (np.int32, np.int64):
        copied = index.copy_in_range(array, limit)
        if copied is not None:
            return copied
    indices = check_indices(owner, name, array, copy=index.share)
    check_range(owner, name, indices, limit)
    return indices


def check_indptr(owner: str, indptr: np.ndarray, n_blocks: int) -> None:
    """Raise unless ``indptr`` rises from 0 to ``n_blocks``."""
    if index.rises(indptr, n_blocks):
        return
    if indptr[0] != 0:
        raise ValueError(f"[{owner}] indptr must start at 0, got {indptr[0]}")
    falls = indptr[1:] < indptr[:-1]
    if falls.any():
        row = int(np.argmax(falls))
        raise ValueError(
            f"[{owner}] indptr decreases from {indptr[row]} to {indptr[row + 1]} at row {row}"
        )
    raise ValueError(
        f"[{owner}] indptr must end at {n_blocks}, the number of stored blocks, got {indptr[-1]}"
    )


def check_range(owner: str, name: str, indices: np.ndarray, limit: int) -> None:
    """Raise unless every index lies in ``[0, limit)``."""
    if index.in_range(indices, limit):
        return
    position = int(np.argmax((indices < 0) | (indices >= limit)))
    raise ValueError(f"[{owner}] {name}[{position}] is {indices[position]}, outside [0, {limit})")


def check_array(owner: str, name: str, value: object) -> None:
    """Raise unless ``value`` is an MLX array."""
    if not isinstance(value, mx.array):
        makes = isinstance(value, list | tuple | np.ndarray | np.generic | Real)
        hint = f"; mx.array({name}) makes one" if makes and name.isidentifier() else ""
        raise TypeError(f"[{owner}] {name} must be an mx.array, got {type(value).__name__}{hint}")


def check_block_dtype(owner: str, dtype: mx.Dtype, block_size: int) -> None:
    """Raise for complex blocks: complex values are for scalars."""
    if dtype == mx.complex64 and block_size > 1:
        raise TypeError(
            f"[{owner}] complex64 is for block_size 1, got block_size {block_size}; blocks are real"
        )


def check_floating(owner: str, name: str, value: object) -> None:
    """Raise unless ``value`` is an MLX array of real floating numbers."""
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        kind = value.dtype if isinstance(value, mx.array) else type(value).__name__
        raise TypeError(f"[{owner}] {name} must be a floating mx.array, got {kind}")


def check_features(owner: str, name: str, value: mx.array, label: str, size: int) -> None:
    """Raise unless ``value`` is an MLX array whose last axis has ``size`` elements."""
    if isinstance(value, mx.array) and value.shape[-1:] == (size,):
        return
    check_array(owner, name, value)
    raise ValueError(
        f"[{owner}] {name} has shape {value.shape}, its last axis must be {label} = {size}"
    )


def check_memory(owner: str, shape: Sequence[int], dtype: mx.Dtype) -> None:
    """Raise unless a dense array fits into the memory: MLX would end the process."""
    n_bytes = math.prod(shape) * dtype.size
    if n_bytes > _memory():
        size = " x ".join(map(str, shape))
        raise ValueError(
            f"[{owner}] a dense {size} array of {dtype} takes {n_bytes / 2**30:,.0f} GiB, and this "
            f"machine has {_memory() / 2**30:,.0f}"
        )


@cache
def _memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_data(
    owner: str, data: ArrayLike, name: str = "data", dtype: mx.Dtype | None = None
) -> mx.array:
    """Return ``data`` as an MLX array, or raise if it is not numeric.

    NumPy arrays may have any byte order and strides. ``dtype`` casts; without it, 64-bit floats
    become 32-bit ones, as by ``mx.array``.
    """
    if isinstance(data, mx.array):
        return data if dtype is None else data.astype(dtype)
    array = check_rectangular(owner, name, data)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"[{owner}] {name} must be numeric, got {array.dtype}")
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        raise TypeError(f"[{owner}] {name} is {array.dtype}, which MLX has not; cast it by astype")
    if not isinstance(data, list | tuple):
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    values = mx.array(data) if dtype is None else mx.array(data, dtype)
    return values if values.size else mx.zeros(array.shape, values.dtype)


def check_matrix(owner: str, name: str, value: Any) -> None:
    """Raise unless an array has two axes."""
    if value.ndim != 2:
        raise ValueError(f"[{owner}] {name} must be a matrix, got shape {tuple(value.shape)}")


def check_model(owner: str, model: object) -> None:
    """Raise unless ``model`` is a module of MLX."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"[{owner}] model must be an nn.Module, got {type(model).__name__}")


def check_rectangular(owner: str, name: str, values: ArrayLike) -> np.ndarray:
    """Return ``values`` as a NumPy array, or raise where rows of a list differ in length."""
    if not isinstance(values, list | tuple):
        return np.asarray(values)
    try:
        return np.asarray(values)
    except ValueError as error:
        kind = type(values).__name__
        raise ValueError(f"[{owner}] {name} must be rectangular, got a ragged {kind}") from error


def _check_integer(owner: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"[{owner}] {name} must be an integer, got {shown(value)}")
    return int(value)
