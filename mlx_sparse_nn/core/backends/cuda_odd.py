"""Blocks of 16 bits whose side is no multiple of 8, on CUDA: filled up for the tensor cores.

Some rows of x are multiplied by a kernel that fills blocks up on their way to shared memory. For
many, and for weight gradients, operands are copied on the device, with zeros behind each block, and
results lose these again: a pass over data, x and y. In between, blocks are those of the next
multiple of 8. float32 of such sizes goes by ``cuda_float``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, prepare, round_up


def takes(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether there are kernels for such blocks."""
    is_odd = block_size % 8 > 0 and 8 < block_size < tuned.MAX_TILED_BLOCK
    return is_odd and n_x > tuned.CUDA_FEW_ROWS and dtype in (mx.bfloat16, mx.float16)


def padded_size(op: str, block_size: int, n_x: int, dtype: mx.Dtype) -> int:
    """Return the size to which blocks are filled up on the device; 0 where they go as they are."""
    is_padded = op == "sddmm" or n_x >= tuned.PADDED_ROWS
    return round_up(block_size, 8) if is_padded and takes(block_size, n_x, dtype) else 0


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


def product(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: tuple[int, int],
    n_block_rows: int,
    transposed: bool,
) -> Kernel:
    """Return ``spmm_odd``, in thread blocks enough to fill a GPU."""
    tile = _tile(block_size, n_x)
    return spmm_kernel(n_x, n_matrices, block_size, inside, n_block_rows, transposed, tile)


def spmm_kernel(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: tuple[int, int],
    n_block_rows: int,
    transposed: bool,
    tile: tuned.OddTile,
) -> Kernel:
    """Return ``spmm_odd`` by thread blocks of a tile."""
    rows, width, warps_n, slices, depth, stages = tile
    chunks, w_rows = (width // 8, depth) if transposed else (depth // 8, width)
    stage = 2 * (rows * depth + 8 * w_rows * cuda_tiles.stride(chunks, False))
    shared_memory = max(stages * stage, 4 * slices * rows * (width + 4))
    threads = 32 * warps_n * slices
    template = {"B": block_size, "INSIDE": inside[1], "LAST": inside[0]}
    template |= {"ROWS": rows, "WIDTH": width}
    template |= {"WARPS_N": warps_n, "WARPS_O": 1, "SLICES": slices}
    template |= {"DEPTH": depth, "STAGES": stages, "TRANSPOSED": int(transposed)}
    grid = n_block_rows * -(-block_size // width) * threads, -(-n_x // rows), n_matrices
    return Kernel("spmm_odd", template, grid, threads, shared_memory)


def _tile(block_size: int, n_x: int) -> tuned.OddTile:
    """Return the tile of a thread block; a block is shared out evenly where it is wide."""
    strips = -(-block_size // (40 if n_x <= 128 else 56))
    width = round_up(-(-block_size // strips), 8)
    if n_x <= 32:
        return tuned.OddTile(32, width, 2, 4, 64, 3)
    if n_x <= 64:
        return tuned.OddTile(64, width, 4, 2, 64, 3)
    return tuned.OddTile(128, width, 4, 2, 64, 3)
