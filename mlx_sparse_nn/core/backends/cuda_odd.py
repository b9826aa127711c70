"""Blocks of 16 bits whose side is no multiple of 8, on CUDA: filled up for the tensor cores.

Operands are copied on the device, with zeros behind each block, and results lose these again: a
pass over data, x and y. In between, blocks are those of the next multiple of 8. float32 of such
sizes goes by ``cuda_float``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, prepare, round_up


def takes(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether there are kernels for such blocks."""
    is_odd = block_size % 8 > 0 and 8 < block_size < tuned.MAX_TILED_BLOCK
    return is_odd and n_x > tuned.CUDA_FEW_ROWS and dtype in (mx.bfloat16, mx.float16)


def padded_size(block_size: int, n_x: int, dtype: mx.Dtype) -> int:
    """Return the size to which blocks are filled up; 0 where they go as they are."""
    return round_up(block_size, 8) if takes(block_size, n_x, dtype) else 0


def resize_blocks(blocks: mx.array, size: int) -> mx.array:
    """Return blocks ``(..., B, B)`` as ``(..., size, size)``: cut, or filled up with zeros."""
    side = blocks.shape[-1]
    return _resized(blocks, (side, side), (size, size), size)


def resize_features(a: mx.array, block_size: int, size: int, last: int = 0) -> mx.array:
    """Return the last axis of ``a``, in blocks of one size, as as many blocks of another.

    Args:
        a: ``(..., n)``; the last block may end early.
        block_size: Of ``a``.
        size: Of the result.
        last: Elements of its last block; 0 for all.
    """
    return _resized(a, (1, block_size), (1, size), last or size)


def _resized(a: mx.array, before: tuple[int, int], after: tuple[int, int], last: int) -> mx.array:
    (h_in, w_in), (h_out, w_out) = before, after
    *others, width = a.shape
    width = -(-width // w_in) * w_out - w_out + last
    if h_in > 1:
        others[-1] = others[-1] // h_in * h_out
    n_threads = round_up(math.prod(others) * -(-width // 8), 256)
    return _prepared(a.dtype, before, after, last, n_threads)([a], (*others, width))


@lru_cache(4096)
def _prepared(
    dtype: mx.Dtype, before: tuple[int, int], after: tuple[int, int], last: int, n_threads: int
) -> KernelLaunch:
    template = {"H_IN": before[0], "W_IN": before[1], "H_OUT": after[0], "W_OUT": after[1]}
    kernel = Kernel("resize_blocks", template | {"LAST": last}, (n_threads, 1, 1), 256)
    return prepare("cuda", "resize", kernel, dtype, T=dtype)
