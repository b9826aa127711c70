"""Blocks of a size that is no multiple of 8, filled up to the next one that tensor cores multiply.

Operands are copied on the device, with zeros behind each block, and results lose these again: a
pass over data, x and y.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, prepare, round_up


def padded_size(block_size: int, n_x: int, dtype: mx.Dtype) -> int:
    """Return the size to which blocks are filled up; 0 where they go as they are."""
    size = round_up(block_size, 8)
    many = block_size > 8 and n_x > tuned.CUDA_FEW_ROWS
    is_padded = many and size != block_size and cuda_tiles.has_tiles(size, n_x, dtype)
    return size if is_padded else 0


def resize_blocks(blocks: mx.array, size: int) -> mx.array:
    """Return blocks ``(..., B, B)`` as ``(..., size, size)``: cut, or with zeros behind."""
    side = blocks.shape[-1]
    shape = (*blocks.shape[:-2], size, size)
    return _resized(blocks, (side, side), (size, size), shape)


def resize_features(a: mx.array, block_size: int, size: int) -> mx.array:
    """Return ``a (..., C block_size)`` as ``(..., C size)``, the blocks of each row resized."""
    shape = (*a.shape[:-1], a.shape[-1] // block_size * size)
    return _resized(a, (1, block_size), (1, size), shape)


def _resized(
    a: mx.array, before: tuple[int, int], after: tuple[int, int], shape: tuple[int, ...]
) -> mx.array:
    n_threads = round_up(-(-math.prod(shape) // 8), 256)
    return _prepared(a.dtype, before, after, n_threads)([a], shape)


@lru_cache(4096)
def _prepared(
    dtype: mx.Dtype, before: tuple[int, int], after: tuple[int, int], n_threads: int
) -> KernelLaunch:
    template = {"H_IN": before[0], "W_IN": before[1], "H_OUT": after[0], "W_OUT": after[1]}
    kernel = Kernel("resize_blocks", template, (n_threads, 1, 1), 256)
    return prepare("cuda", "resize", kernel, dtype, T=dtype)
