"""The oracle: the products through a dense matrix, with which every backend is compared.

It reads ``indptr`` and ``indices`` of a pattern, and nothing that a backend reads. No rule chooses
it: it takes the memory of the dense matrix.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.quantized import unpack


def spmm(
    data: mx.array, pattern: CSRPattern, x: mx.array, bias: mx.array | None = None
) -> mx.array:
    """Return y[..., r] = sum_c A[r, c] x[..., c] + bias[r]; data and x may have an axis V."""
    y = _matmul(_wide(x), dense(_wide(data), pattern).swapaxes(-1, -2))
    return (y if bias is None else y + _wide(bias)).astype(x.dtype)


def spmm_t(data: mx.array, pattern: CSRPattern, y: mx.array) -> mx.array:
    """Return x[..., c] = sum_r A[r, c] y[..., r]; data and y may have an axis V."""
    return _matmul(_wide(y), dense(_wide(data), pattern)).astype(y.dtype)


def sddmm(pattern: CSRPattern, y: mx.array, x: mx.array) -> mx.array:
    """Return data[j] = sum_n y[n, row(j)] x[n, col(j)]; y and x may have an axis V."""
    shape = (*x.shape[:-2], *pattern.data_shape)
    if 0 in shape:
        return mx.zeros(shape, x.dtype)
    outer = _wide(y).swapaxes(-1, -2) @ _wide(x)  # (..., n_rows, n_cols)
    (R, B, C, _), (n_rows, n_cols) = _grid(pattern), pattern.shape
    whole = mx.zeros((*outer.shape[:-2], R * B, C * B), outer.dtype)
    whole[..., :n_rows, :n_cols] = outer
    grid = whole.reshape(-1, R, B, C, B).swapaxes(2, 3)
    return grid[_places(pattern)].reshape(shape).astype(x.dtype)


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    pattern: CSRPattern,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks, which NumPy unpacks bit by bit."""
    y = spmm(
        _values(packed, scales, biases), pattern, _wide(x), None if bias is None else _wide(bias)
    )
    return y.astype(x.dtype)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, pattern: CSRPattern, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks."""
    return spmm_t(_values(packed, scales, biases), pattern, _wide(y)).astype(y.dtype)


def dense(data: mx.array, pattern: CSRPattern) -> mx.array:
    """Return the matrices ``(n_rows, n_cols)`` or ``(V, n_rows, n_cols)``; repeated blocks add."""
    lead, (R, B, C, _) = data.shape[: data.ndim - len(pattern.data_shape)], _grid(pattern)
    grid = mx.zeros((*(lead or (1,)), R, C, B, B), data.dtype)
    if data.size:
        grid = grid.at[_places(pattern)].add(data.reshape(*(lead or (1,)), -1, B, B))
    n_rows, n_cols = pattern.shape  # the last blocks may reach past it
    return grid.swapaxes(2, 3).reshape(*lead, R * B, C * B)[..., :n_rows, :n_cols]


def _matmul(a: mx.array, b: mx.array) -> mx.array:
    """Return ``a @ b``.

    On CUDA, MLX (0.32.4) gives an empty product no buffer, and ends the process where NumPy reads
    it.
    """
    shape = (*a.shape[:-1], b.shape[-1])
    return mx.zeros(shape, a.dtype) if 0 in shape else a @ b


def _grid(pattern: CSRPattern) -> tuple[int, int, int, int]:
    B = pattern.block_size
    return -(-pattern.shape[0] // B), B, -(-pattern.shape[1] // B), B


def _places(pattern: CSRPattern) -> tuple:
    rows = np.repeat(np.arange(pattern.indptr.size - 1), np.diff(pattern.indptr))
    return slice(None), mx.array(rows.astype(np.int32)), mx.array(pattern.indices)


def _values(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """Return the values of quantized blocks, ``(..., B, B)`` float32."""
    if packed.size == 0:
        return mx.zeros((*packed.shape[:-1], packed.shape[-2]))
    group_size = packed.shape[-2] // scales.shape[-1]
    scales, biases = (mx.repeat(_wide(a), group_size, axis=-1) for a in (scales, biases))
    return scales * mx.array(unpack(packed).astype(np.float32)) + biases


def _wide(a: mx.array) -> mx.array:
    return a.astype(mx.float32) if a.dtype in (mx.float16, mx.bfloat16) else a
