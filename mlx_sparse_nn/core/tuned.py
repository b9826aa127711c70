"""The tuned numbers: each with its unit, and the measurement that set it.

Where a benchmark is named, ``benchmarks/README.md`` has its numbers. CPU numbers were set on two
cores of an Intel Xeon with MLX's Linux wheel; CUDA numbers on an H200, in bfloat16, 4096 x 4096;
Metal numbers by the counts of the emulator, never on a Mac.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

# Layouts. Values of padding that take plain MLX as long as the operations of one more group of
# block-rows, and distinct lengths of rows up to which groups may begin at each: with more, to find
# the groups takes longer than a product (3,000 lengths of a power-law pattern).
GROUP_VALUES = 4096
MAX_EXACT_LENGTHS = 256

# Plain MLX. Rows of x below which each block is multiplied where it lies, if it has twice the side:
# 0.4 to 0.9 of the time of gathering blocks (1 to 7 rows, B = 8 to 64).
PLAIN_FEW_ROWS = 8
# Blocks with a smaller side times one row of x go by elements, not by MLX's matmul, which calls
# sgemm once a block (1 ns a multiply-add at B = 8, more below).
MIN_MATMUL_BLOCK = 8
# Values up to which a transposition stays in the cache; above it, x is first cut into blocks.
MAX_CACHED_VALUES = 1 << 18
# Bytes of a step on the CPU, which stay in the cache, and of one on a GPU, which bound the memory:
# 1.9 to 2.5 times as fast as one step, with STREAMS.
CPU_STEP_BYTES = 1 << 21
GPU_STEP_BYTES = 1 << 26
# A step takes time of its own: one is never cut below this part of CPU_STEP_BYTES, and operands
# count as at least so many bytes.
MIN_STEP_BYTES = CPU_STEP_BYTES // 64
MIN_OPERAND_BYTES = 1 << 17
# Steps that MLX was seen to hold at once, beyond one for each stream (peaks of memory).
STEPS_IN_FLIGHT = 8
# CPU streams at most, and multiplications from which a product goes to more than one: below, to
# wait for another thread takes longer than the product.
MAX_STREAMS = 4
MIN_PARALLEL_MULTIPLIES = 1 << 18

# Kernels on a GPU. Block sizes with kernels of their own; the others go by scalars.
TILED_BLOCKS = (8, 16, 32, 64, 128)
GROUP_THREADS = 256  # of a thread block, where the kernel leaves it open
# Blocks times this many rows of x are bound by reading the stored values: Metal, CUDA.
METAL_FEW_ROWS = 8
CUDA_FEW_ROWS = 16
# Rounds of 32 values after which a long row of values is shared by a whole thread block.
MAX_ROUNDS = 64
# Metal: threadgroups that keep a GPU busy with a weight gradient, and rows of x that each sums.
METAL_GRADIENT_GROUPS = 256
METAL_ROWS_PER_SPLIT = 256
# CUDA, the same for gradients by scalars.
CUDA_GRADIENT_GROUPS = 1024
CUDA_ROWS_PER_SPLIT = 64

# CUDA. Thread blocks that keep an H200 busy (132 multiprocessors).
BLOCKS_TO_FILL_GPU = 128
MAX_STREAMED_ROW = 64  # values of a row up to which one thread adds them up: Ising, n = 20 and 24
# Bytes of shared memory above which one thread block fits on a multiprocessor.
MAX_SHARED_OF_TWO = 113 * 1024
LARGE_SHARED_MEMORY = ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103")  # 160 KB a thread block
HOPPER = "sm_90"
WGMMA_STAGES = {64: {256: 5, 128: 8}, 128: {256: 4, 128: 6}}  # by block size and rows of a tile
PANEL_DENSITY = {16: 0.025, 32: 0.15}  # from which spmm_panels is faster than spmm_tiles
MAX_PANEL_COLUMNS = 2**20
GRADIENT_PANELS = (16, 32)  # block sizes of sddmm_panels
GRADIENT_PANEL_SHARED = 204_800  # bytes
GRADIENT_PANEL_ROWS = 256  # rows of x from which it pays to find the blocks of a panel


class Tile(NamedTuple):
    """A thread block of ``spmm_tiles``."""

    rows: int  # of x
    warps_n: int  # along them
    warps_o: int  # along the outputs
    depth: int  # of a stage, in inputs
    stages: int


class GradientTile(NamedTuple):
    """A thread block of ``sddmm_tiles``."""

    group: int  # blocks
    warps_i: int  # along the rows of a block
    warps_k: int  # along the rows of x
    depth: int  # of a stage, in rows of x
    stages: int


# By block size: with many rows of x, where a thread block may have 160 KB of shared memory, and
# with up to 64 rows or 48 KB.
MANY_ROWS_TILES = {
    8: Tile(256, 8, 1, 64, 3),
    16: Tile(256, 8, 1, 64, 3),
    32: Tile(256, 8, 1, 64, 3),
    64: Tile(128, 4, 1, 64, 3),
    128: Tile(128, 2, 4, 64, 3),
}
SOME_ROWS_TILES = {
    8: Tile(128, 4, 1, 32, 4),
    16: Tile(64, 4, 1, 32, 4),
    32: Tile(64, 4, 1, 32, 4),
    64: Tile(64, 2, 2, 32, 4),
    128: Tile(64, 2, 4, 32, 4),
}
GRADIENT_TILES = {
    16: GradientTile(8, 1, 4, 64, 3),
    32: GradientTile(4, 1, 4, 32, 4),
    64: GradientTile(2, 2, 2, 64, 3),
    128: GradientTile(1, 2, 4, 32, 4),
}

# The dtypes of kernels, ordered by use: membership is tested at every call.
KERNEL_DTYPES = (mx.bfloat16, mx.float32, mx.float16)
