"""The tuned numbers: each with its unit, and the measurement that set it.

Where a benchmark is named, ``benchmarks/README.md`` has its numbers. CPU numbers were set on two
cores of an Intel Xeon with MLX's Linux wheel; CUDA numbers on an H200, in bfloat16, 4096 x 4096;
Metal numbers by the counts of the emulator, never on a Mac.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

# Layouts. One more group of block-rows takes plain MLX as long as this many values of padding.
GROUP_VALUES = 4096
# Distinct lengths of rows above which lengths are rounded before they are grouped: else it takes
# longer than a product to group them (3,000 lengths of a power-law pattern).
MAX_EXACT_LENGTHS = 256

# Plain MLX. Below this many rows of x, blocks of at least twice that side are multiplied where they
# lie: 0.4 to 0.9 of the time of gathering them (1 to 7 rows, B = 8 to 64).
PLAIN_FEW_ROWS = 8
# Smaller blocks times one row of x are multiplied by elements. MLX's matmul calls sgemm once a
# block (1 ns a multiply-add at B = 8, more below).
MIN_MATMUL_BLOCK = 8
# Values up to which a transposition stays in the cache; above it, x is first cut into blocks.
MAX_CACHED_VALUES = 1 << 18
# Bytes of a step on the CPU, which stay in the cache, and of one on a GPU, which bound the memory:
# 1.9 to 2.5 times as fast as one step, with STREAMS.
CPU_STEP_BYTES = 1 << 21
GPU_STEP_BYTES = 1 << 26
# Each step takes some time of its own. So the bound on memory never makes steps smaller than this,
# and operands count as at least this many bytes.
MIN_STEP_BYTES = CPU_STEP_BYTES // 64
MIN_OPERAND_BYTES = 1 << 17
# Steps that MLX holds at once besides one for each stream, as peaks of memory showed.
STEPS_IN_FLIGHT = 8
# The most CPU streams, and the fewest multiplications for which a product takes more than one:
# with fewer, waiting for another thread takes longer than the product.
MAX_STREAMS = 4
MIN_PARALLEL_MULTIPLIES = 1 << 18

# Kernels on a GPU. Block sizes that have kernels of their own; others are read as scalars.
TILED_BLOCKS = (8, 16, 32, 64, 128)
MAX_TILED_BLOCK = 128  # of CUDA's tiles, which take every multiple of 8
GROUP_THREADS = 256  # of a thread block, where the kernel leaves it open
# Up to this many rows of x, reading the stored values is what bounds a product of blocks.
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


# By block size: for over 64 rows of x where a thread block may have 160 KB of shared memory, and
# for all else, within 48 KB.
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
