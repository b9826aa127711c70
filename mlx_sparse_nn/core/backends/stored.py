"""Stored blocks as plain MLX reads them: values, or what they are quantized to."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import mlx.core as mx


class Stored(NamedTuple):
    """Blocks of V matrices, one after the other.

    Attributes:
        arrays: ``(V * n_blocks, B, B)`` alone; or packed, scales and biases, each as many blocks.
        block_size: B.
        n_blocks: Of all matrices.
        nbytes: Of all arrays.
    """

    arrays: list[mx.array]
    block_size: int
    n_blocks: int
    nbytes: int

    @classmethod
    def of(cls, arrays: tuple[mx.array, ...], block_size: int) -> Stored:
        """Return the blocks of arrays ``(n_blocks, ...)`` or ``(V, n_blocks, ...)``."""
        found, nbytes = [], 0
        for a in arrays:
            found.append(in_rows(a, block_size, a.shape[-1] if block_size > 1 else 1))
            nbytes += a.nbytes
        return cls(found, block_size, found[0].shape[0], nbytes)

    def unpacked_bytes(self, dtype: mx.Dtype) -> int:
        """Return the bytes that it takes to dequantize a block and to round it to ``dtype``."""
        if len(self.arrays) == 1:
            return 0
        return self.block_size**2 * (4 if dtype == mx.float32 else 4 + dtype.size)


def in_rows(a: mx.array, *shape: int) -> mx.array:
    """Return ``a`` as ``(m, *shape)``: not by -1, which MLX (0.32.4) cannot map to a batch of
    none."""
    return a.reshape(a.size // prod(shape), *shape)
