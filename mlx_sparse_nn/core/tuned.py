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
# Scalars: from one value in so many on, it is asked whether columns are in order, for products that
# write the matrix dense; of graphs it would take longer than all else of a layout.
SPARSEST_ORDERED = 1024

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

# Kernels on a GPU. Block sizes that have kernels of few rows of x on CUDA, and of many by panels or
# warpgroups; MAX_TILED_BLOCK says which have tiles.
TILED_BLOCKS = (8, 16, 32, 64, 128)
MAX_TILED_BLOCK = 128  # of CUDA's tiles, which take every multiple of 8
MAX_EMPTY_GROUPS = 1 << 20  # thread blocks that may be without work
GROUP_THREADS = 256  # of a thread block, where the kernel leaves it open
# Up to this many rows of x, reading the stored values is what bounds a product of blocks.
METAL_FEW_ROWS = 8
CUDA_FEW_ROWS = 16
REPLAYED_ROWS = 16  # of a layer's call outside of transforms: there, the host takes longest
# Scalars. Values that a lane takes one after the other; a row of more is long, and cut into pieces.
# A piece of MIN_PIECE values is worth the search for its row. Where rows are even and fill a GPU, a
# second launch gains nothing: up to twice the mean row, there may be four times as many rounds, or
# MAX_EVEN_PIECE values where all lanes lie along rows of x. Where they do not, pieces shall.
MAX_ROUNDS = 64
MIN_PIECE = 256
MAX_EVEN_PIECE = 1024
THREADS_TO_FILL_GPU = 1 << 17
PIECES_TO_FILL_GPU = 1 << 13
# Rows of x from which lanes lie along them, and x by columns: a value then reads one cache line of
# x for up to 32 rows, not one for each. Blocks of 8 and more read whole lines along a row of x too.
# On an H200, 2^20 columns and 16 rows of x: 0.68 ms against 1.85. On CUDA, lines of an x of fewer
# columns than NARROW_COLUMNS stay in the cache: 1,024 columns and 16 rows take 9.4 microseconds
# against 5.7, and 4,096 columns and 64 rows 79 against 86.
COLUMNS_OF_SCALARS = 4
COLUMNS_OF_NARROW = 64
COLUMNS_OF_BLOCKS = 17
NARROW_COLUMNS = 2**16
# Threadgroups of few rows of x that fill a GPU: four a core of 40. Where there are fewer, or a
# block-row is this many times as long as the mean, long ones are cut into pieces, of no fewer
# vectors of four values than two turns of 8 simdgroups.
METAL_FEW_GROUPS = 160
METAL_FEW_LONG = 4
METAL_FEW_PIECE = 256
# Metal: threadgroups that keep a GPU busy with a weight gradient, and rows of x that each sums.
METAL_GRADIENT_GROUPS = 256
METAL_ROWS_PER_SPLIT = 256
# Metal's tensor units: fewest rows of x, where a tile of 32 is half full, and most threads of a
# threadgroup, as in MLX's own tiles. Never timed.
METAL_TENSOR_ROWS = 17
METAL_TENSOR_THREADS = 512
# Metal: the smallest blocks that 8 x 8 products take, filled up with zeros, and the most outputs of
# a block that a threadgroup has.
METAL_SMALLEST_TILED = 4
METAL_MAX_WIDTH = 128
METAL_MAX_COLUMNS = 2**25  # of x, 128 rows of which are a tile: 32 bits count the elements
METAL_WIDE = 96  # outputs up to which it has 128 rows of x, and above 64
# Up to this many rows of x, reading blocks is what a product by tiles waits for.
METAL_SOME_ROWS = 32
# Bytes of a row of a stage, and the most values of one: 15 KB in 16 bits, of 60 that a core has.
METAL_DEPTH_BYTES = 64
METAL_STAGE_VALUES = 7680
# Blocks of one block-row whose gradients a thread sums, by block size: it holds up to 49 sums. From
# so many rows of x on, 8 threads share them, and read x and y by columns.
METAL_SAMPLED_BLOCKS = {1: 4, 2: 4, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1}
METAL_SAMPLED_COLUMNS = 8
# Metal, quantized blocks. Up to so many rows of x by scalar products: 8 x 8 products would take as
# long as 8 rows, 1.4 times the time of reading 4 bits.
METAL_QUANTIZED_FEW_ROWS = 4
# Up to so many, factors go from device memory to registers, and blocks are read once.
METAL_QUANTIZED_ROWS = 32
# For more, threadgroups that keep a GPU busy: four for each of 40 cores.
METAL_QUANTIZED_GROUPS = 160
# CUDA, the same for gradients by scalars.
CUDA_GRADIENT_GROUPS = 1024
CUDA_ROWS_PER_SPLIT = 64
# CUDA, quantized blocks, x of 16 bits: up to so many rows of x, values are computed in registers. 4
# bits, B = 64, 50%: 17 microseconds with 128 rows, where bfloat16 blocks take 16 and to dequantize
# takes 5; with 256 rows 33, 17 and 5. Packs of eight values that a thread dequantizes: 5.3
# microseconds with four, 5.5 with eight.
CUDA_QUANTIZED_ROWS = 128
CUDA_DEQUANTIZED_TURNS = 4
# Kernels whose thread blocks may take all registers of a multiprocessor: the compiler would put off
# their loads to save some.
ALL_REGISTERS = ("qspmm_few", "qspmm_rows")

# CUDA. Thread blocks that keep an H200 busy (132 multiprocessors).
BLOCKS_TO_FILL_GPU = 128
MULTIPROCESSORS = 132  # of an H100 and of an H200
MAX_STREAMED_ROW = 64  # values of a row up to which one thread adds them up: Ising, n = 20 and 24
# Bytes of shared memory above which one thread block fits on a multiprocessor.
MAX_SHARED_OF_TWO = 113 * 1024
LARGE_SHARED_MEMORY = ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103")  # 160 KB a thread block
MAX_SHARED = 227 * 1024  # bytes that a thread block of Hopper may have
HOPPER = "sm_90"
WGMMA_STAGES = {64: {256: 5, 128: 8}, 128: {256: 4, 128: 6}}  # by block size and rows of a tile
# Some rows of x on Hopper, by thread blocks that share rows (cuda_rows.py), beside spmm_tiles and
# spmm_wgmma. The most rows of x for which they share a block-row, by block size; of blocks of 64
# and more than 128 rows, only where a tile of 256 would have at most so many. Microseconds at 10,
# 20 and 50% on an H100: B = 32, 256 rows 8.8, 13.4, 28 against 9.4, 15, 33, and 384 rows 16, 22, 45
# against 16, 28, 64; B = 64, 128 rows 5.7, 8.1, 15 against 6.3, 8.4, 16, and 384 rows 8.4, 13, 27
# against 9.6, 15, 33; B = 128, 256 rows 6.8, 9.8, 18.7 against 7.4, 10.4, 19.6.
SHARED_ROWS = {16: 128, 32: 384, 64: 384, 128: 256}
SHARED_OF_256 = 192
SHARES = (1, 2, 4)  # thread blocks of a block-row


class SharesCost(NamedTuple):
    """Microseconds of ``spmm_shares``, for its tile and number: not to be added to others' times.

    Set so that of 179 products on an H100 (4096 x 4096, 11008 x 4096, 2048 x 2048, 10 to 50%, both
    directions) the choice by it takes 0.3% longer than the best, in the mean, and 7% at most.
    """

    round: float = 3.1  # of thread blocks, two a multiprocessor
    stage: float = 0.27  # of the longest block-row
    byte: float = 3.9e-6  # that a multiprocessor copies
    second: float = 1.5  # kernel, which adds up the sums
    sum: float = 2.0e-6  # of each thread block


SHARES_COST = SharesCost()
# Bytes of stages: 128 thread blocks take 4.5 microseconds for no work with 97 KB each, and 7.8 with
# 193 KB.
SHARED_OF_TWO = 108 * 1024
SHARED_OF_ONE = 216 * 1024
MAX_SHARED_STAGES = 8
# Blocks of 16 of which so much is stored, up to so many rows: thread blocks share a panel's
# columns. Microseconds at 10, 20 and 50% on an H100: 64 rows 11, 11.9, 15.4 against 8.9, 13, 26;
# 256 rows 23, 26, 32 against 17.7, 30, 58.
SLICED_BLOCK = 16
SLICED_ROWS = 512
SLICED = 0.15
# spmm_boxes: stages by block size, and the multiply-adds, the share of stored values, and the part
# of the GPU's rounds that is filled from which it is faster than spmm_wgmma. Microseconds at 10, 20
# and 50% on an H100: B = 64, 4,096 rows 44, 71, 140 against 44, 75, 167, transposed 41, 64 against
# 45, 73; 1,024 rows 15, 21, 38 against 13, 20, 43, and 1,280, which fill 0.6, 24, 38, 77 against
# 18, 29, 63. B = 128, 4,096 rows 39, 55, 108 against 37, 54, 118; 768 rows 12, 16, 28 against 12,
# 18, 37.
BOX_STAGES = {64: 3, 128: 4}
BOX_PRODUCTS = 6.4e9
BOXES_FROM = {64: (0.0, 0.9), 128: (0.3, 0.55)}
PANEL_DENSITY = {16: 0.025}  # from which spmm_panels is faster than spmm_tiles
# Thread blocks from which it is for B = 16, though it takes as long for fewer rows: 512 rows and
# 10% take an H100 27 microseconds as 1,024 do, by tiles 32.
PANEL_GROUPS = 40
FLOAT_PANEL_DENSITY = {16: 0.08}  # the same of float32: 230 us at 10%, spmm_tiles 293
MAX_PANEL_COLUMNS = 2**20
# By bytes of an element and block size: rows of x from which spmm_fragments takes a product. On an
# H200, 4,096 rows, 10%: float32 of 32, 64, 128 takes 112, 87, 68 us (spmm_tiles 191, 165, 180,
# MLX's dense 334); 3072 x 3072, 24 in float32 117 (dense 199), 48 and 96 in bfloat16 39 and 26
# (dense 99). 256 rows of 64 and 128 in float32 take 8.5 and 7.5 us, 64 rows 7.4 (spmm_tiles 16, 24
# and 17). Of 32 in bfloat16, what thread blocks do not share: 512, 1,024 and 4,096 rows, 10%, take
# an H100 13.5, 22 and 78 us (spmm_tiles 16.6, 30, 94), 20% 19, 34 and 130 (28, 52, 166, spmm_panels
# 38, 41, 160).
FRAGMENT_ROWS = {(4, block_size): 17 for block_size in range(16, 129, 8)}
FRAGMENT_ROWS |= {
    (2, block_size): 17 for block_size in range(24, 129, 8) if block_size not in (64, 128)
}
# The same of sddmm_fragments: 3072 x 3072, 96 in bfloat16 takes 44 us (dense 99).
GRADIENT_FRAGMENT_ROWS = {
    (itemsize, block_size): 256
    for itemsize, block_size in FRAGMENT_ROWS
    if (itemsize, block_size) not in ((4, 16), (2, 32))
}
GRADIENT_PANELS = (16, 32)  # block sizes of sddmm_panels
GRADIENT_PANEL_SHARED = 204_800  # bytes
GRADIENT_PANEL_ROWS = 256  # rows of x from which it pays to find the blocks of a panel

# CUDA, through the dense matrix. Bytes of the largest that is written, for all V together.
DENSE_BYTES = 2**29
DENSE_LEAST_ROWS = 16  # of x
DENSE_STRIP_BYTES = 16_384  # of shared memory, in which rows of it are put together
DENSE_LEAST_STRIP = 512  # values of a block-row, or of 16 rows of it: a thread block writes them
DENSE_SAMPLING_GROUPS = 1024  # thread blocks that keep a GPU busy with taking its stored places


class DenseFrom(NamedTuple):
    """From which share of stored values on a product goes through the dense matrix."""

    density: float  # of very many rows of x
    per_row: float  # of n rows more, by this over n


# CUDA, true float32. Threads of large tiles from which they are faster than those that share the
# depth: with 256 rows, B = 32 and 10%, 26 microseconds against 37.
FLOAT_THREADS = 2**14


class Tile(NamedTuple):
    """A thread block of ``spmm_tiles``."""

    rows: int  # of x
    warps_n: int  # along them
    warps_o: int  # along the outputs
    depth: int  # of a stage, in inputs
    stages: int


class SmallTile(NamedTuple):
    """A thread block of ``spmm_small``."""

    rows: int  # of x
    warps: int  # that multiply, two block-rows each
    depth: int  # of a stage, in inputs
    stages: int


class SimdTile(NamedTuple):
    """How the simdgroups of Metal's ``spmm_tiles`` share the outputs of a block."""

    tiles_n: int  # 8 x 8 products of a simdgroup along the rows of x
    simds_o: int  # simdgroups along the outputs
    tiles_o: int  # products of each of them along the outputs


class GraphTile(NamedTuple):
    """What a thread block of 256 has of a graph."""

    items: int  # a value is one
    row: int  # items that a row counts as besides; at least a 256th of them, a thread for each row
    piece: int  # values of a piece of a long row


class GradientTile(NamedTuple):
    """A thread block of ``sddmm_tiles``."""

    group: int  # blocks
    warps_i: int  # along the rows of a block
    warps_k: int  # along the rows of x
    depth: int  # of a stage, in rows of x
    stages: int


class FloatTile(NamedTuple):
    """A thread block of ``spmm_float``."""

    rows: int  # of x
    width: int  # outputs
    held: int  # rows of a thread
    outputs: int  # of a thread
    slices: int  # parts of the depth
    depth: int  # of a stage, in inputs
    stages: int


class FloatGradientTile(NamedTuple):
    """A thread block of ``sddmm_float``."""

    group: int  # blocks
    rows: int  # of a block, of a thread
    cols: int  # of the group, of a thread
    slices: int  # parts of the depth
    depth: int  # of a stage, in rows of x
    stages: int


class SamplingTile(NamedTuple):
    """A threadgroup of Metal's ``sddmm_tiles``, of 4 simdgroups."""

    simds_i: int  # simdgroups along the rows of a block
    tiles_i: int  # 8 x 8 tiles of a simdgroup along them
    tiles_k: int  # and along a strip: some columns of a block
    strips: int  # of a simdgroup


class QuantizedTile(NamedTuple):
    """A threadgroup of ``qspmm_tiles``."""

    side: int  # outputs
    rows: int  # of x
    across: int  # simdgroups along the outputs
    simdgroups: int


# CUDA, graphs of at least so many stored values: 2^20 rows of 16 values, and a power law of 10^6
# rows, 7 values on average and the longest 10^5, on an H200, microseconds. One column, by tiles of
# 1,024 items and pieces of 256: 133 and 84; of 2,048 and 1,024: 127 and 65 (cuSPARSE 131 and 62).
# 64 columns of the power law, pieces of 256, 512 and 1,024: 540, 594 and 668 (cuSPARSE 900).
GRAPH_VALUES = 1 << 18
GATHERED_TILE = GraphTile(2048, 8, 1024)
COLUMNS_TILE = GraphTile(1024, 4, 256)
# Columns of x up to which products go through shared memory: 4 columns of equal rows took 230 so,
# and 128 by rows; 2 and 3 take 125 and 164.
GATHERED_COLUMNS = 3
# Diagonals up to which neighbouring rows ask for neighbouring places of x: the Ising Hamiltonian
# has 41 at n = 20, and takes 61 with a thread for each row, 48 by a byte for each column, and 453
# through shared memory, where the values of a row all ask for few lines of the cache.
MAX_DIAGONALS = 4096


class QuantizedStrip(NamedTuple):
    """A thread block of CUDA's ``qspmm_few`` or ``qspmm_rows``."""

    strip: int  # outputs
    rows: int  # of x
    warps: int
    steps: int  # of 32 k, that a warp loads at once, or that x is copied ahead


# Of qspmm_rows, by the most rows of x. 4 bits, B = 64, 50%, microseconds: 17 rows 11.4, 64 rows
# 12.8 (16.4 with 64 outputs), 128 rows 17.2 (24.0 with 32). Up to 16 rows, which only the transpose
# has, nothing else was measured.
QUANTIZED_STRIPS = {
    8: QuantizedStrip(64, 8, 16, 3),
    16: QuantizedStrip(64, 16, 8, 3),
    32: QuantizedStrip(64, 32, 8, 3),
    64: QuantizedStrip(32, 64, 8, 3),
    128: QuantizedStrip(64, 64, 8, 3),
}
# Of qspmm_few: 3.8 microseconds with one row and 4.3 with eight, where bfloat16 blocks take 6.4.
FEW_QUANTIZED_STRIP = QuantizedStrip(32, 8, 16, 2)

# The largest first. A simdgroup has 32 x 32 sums, half a load from threadgroup memory for a product
# of 8 x 8, and 100 registers a lane; in the last one 16 x 32, and three quarters of a load.
METAL_QUANTIZED_TILES = (
    QuantizedTile(128, 64, 4, 8),
    QuantizedTile(64, 128, 2, 8),
    QuantizedTile(64, 64, 2, 4),
    QuantizedTile(32, 128, 1, 4),
    QuantizedTile(32, 64, 1, 4),
)

# By block size: for over 64 rows of x where a thread block may have 160 KB of shared memory, and
# for all else, within 50 KB.
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
# By dtype (float32 as TF32, or true), product, and block size. "tiles" are the other multiples of 8
# up to MAX_TILED_BLOCK, "odd" all other sizes from 9 on; "scalars" what goes by scalars; "large"
# what plain MLX takes above it. A rule is where the time of stored blocks, which grows with their
# number, meets that of writing and multiplying the dense matrix: 1, 10 and 50%, 16 to 4,096 rows,
# 3072 x 3072 and 4096 x 4096, on an H200. To write 4096 x 4096 in 16 bits takes 11 microseconds, to
# take 10% of it 6. At 64 and 1,024 rows, 3072 x 3072, 10%, B = 1, stored blocks take 46 and 460
# microseconds, the dense matrix 14 and 33, nn.Linear 7.7 and 26; their gradients 70 and 1011, 12
# and 32, 7.8 and 29. True float32 and odd sizes: from 10%, 4096 x 4096. In true float32, 4,096
# rows, B = 32 takes 397 microseconds, B = 8 881, nn.Linear 2,695; gradients 561, 1,133 and 2,587.
# In bfloat16, 256 rows, B = 33 takes 26, the dense matrix 27. B = 16 and 32, 50%: 19 and 12 with 64
# rows, 26 and 26 with 128, 40 and 34 with 256, the dense matrix 26, 30 and 32.
DENSE_FROM: dict[str, dict[str, dict[int | str, DenseFrom]]] = {
    "16 bits": {
        "spmm": {
            "scalars": DenseFrom(0.005, 1.4),
            8: DenseFrom(0.02, 9.0),
            16: DenseFrom(0.3, 60.0),
            32: DenseFrom(0.35, 48.0),
            64: DenseFrom(0.6, 4.0),
            128: DenseFrom(0.7, 4.0),
            24: DenseFrom(0.09, 6.0),
            40: DenseFrom(0.18, 5.0),
            "tiles": DenseFrom(0.23, 4.0),
            96: DenseFrom(0.35, 4.0),
            "odd": DenseFrom(0.05, 13.0),
        },
        "sddmm": {
            "scalars": DenseFrom(0.002, 0.5),
            8: DenseFrom(0.02, 6.5),
            16: DenseFrom(0.25, 4.0),
            32: DenseFrom(0.35, 4.0),
            64: DenseFrom(0.6, 4.0),
            128: DenseFrom(0.7, 4.0),
            24: DenseFrom(0.085, 6.0),
            40: DenseFrom(0.12, 5.0),
            "tiles": DenseFrom(0.15, 4.0),
            96: DenseFrom(0.2, 4.0),
            "odd": DenseFrom(0.002, 0.5),
            "large": DenseFrom(0.1, 4.0),
        },
    },
    "tf32": {
        "spmm": {
            "scalars": DenseFrom(0.011, 3.4),
            8: DenseFrom(0.042, 17.0),
            16: DenseFrom(0.13, 12.0),
            24: DenseFrom(0.15, 12.0),
            32: DenseFrom(0.27, 12.0),
            64: DenseFrom(0.35, 12.0),
            128: DenseFrom(0.44, 12.0),
            "tiles": DenseFrom(0.27, 12.0),
            "odd": DenseFrom(0.06, 25.0),
            "large": DenseFrom(0.05, 4.0),
        },
        "sddmm": {
            "scalars": DenseFrom(0.008, 1.4),
            8: DenseFrom(0.052, 10.0),
            16: DenseFrom(0.085, 12.0),
            24: DenseFrom(0.12, 12.0),
            32: DenseFrom(0.15, 12.0),
            64: DenseFrom(0.18, 12.0),
            128: DenseFrom(0.24, 12.0),
            "tiles": DenseFrom(0.15, 12.0),
            "odd": DenseFrom(0.08, 4.0),
            "large": DenseFrom(0.05, 4.0),
        },
    },
    "float32": {
        "spmm": {
            "scalars": DenseFrom(0.1, 4.0),
            8: DenseFrom(0.28, 2.0),
            16: DenseFrom(0.45, 2.0),
            "tiles": DenseFrom(0.6, 2.0),
            "odd": DenseFrom(0.35, 2.0),
            "large": DenseFrom(0.3, 4.0),
        },
        "sddmm": {
            "scalars": DenseFrom(0.1, 4.0),
            8: DenseFrom(0.2, 1.0),
            16: DenseFrom(0.33, 1.0),
            "tiles": DenseFrom(0.43, 1.0),
            "odd": DenseFrom(0.3, 1.0),
            "large": DenseFrom(0.3, 4.0),
        },
    },
}
# CUDA, blocks of 8 in 16 bits: from SMALL_LEAST_ROWS on. Whether there are more than SMALL_FEW_ROWS
# decides for the tile, and for the least and the largest share of stored values. Microseconds at
# 10%, 4096 x 4096, beside spmm_tiles and nn.Linear: 64 rows 9.4 (15.5, 8.5), 128 rows 13.7 (25,
# 13.7), 256 rows 20.4 (48, 15.3), 1,024 rows 44.9 (181, 43.3), 4,096 rows 151 (707, 158). The tile
# of many rows has to fill so much of the GPU: it takes 40.3 for 512 rows, where the dense matrix
# takes 36.
SMALL_LEAST_ROWS = 33
SMALL_FEW_ROWS = 256
SMALL_FILLED = 0.85
SMALL_DENSITY = {False: (0.04, 0.15), True: (0.01, 0.11)}
SMALL_TILES = {False: SmallTile(64, 8, 128, 6), True: SmallTile(128, 16, 128, 6)}
GRADIENT_TILES = {
    16: GradientTile(8, 1, 4, 64, 3),
    32: GradientTile(4, 1, 4, 32, 4),
    64: GradientTile(2, 2, 2, 64, 3),
    128: GradientTile(1, 2, 4, 32, 4),
}
# By the outputs of a block over 8: at most 24 products a simdgroup, which bounds its registers, and
# at most .5 loads a product from 48 outputs on, as in MLX's dense kernel.
METAL_TILES = {
    1: SimdTile(8, 1, 1),
    2: SimdTile(8, 1, 2),
    3: SimdTile(4, 1, 3),
    4: SimdTile(4, 1, 4),
    5: SimdTile(4, 1, 5),
    6: SimdTile(8, 2, 3),
    7: SimdTile(4, 2, 4),
    8: SimdTile(4, 2, 4),
    9: SimdTile(8, 3, 3),
    10: SimdTile(4, 2, 5),
    11: SimdTile(4, 3, 4),
    12: SimdTile(4, 3, 4),
    13: SimdTile(4, 3, 5),
    14: SimdTile(4, 3, 5),
    15: SimdTile(4, 3, 5),
    16: SimdTile(4, 4, 4),
}
# Metal, by block size over 8, rounded up; larger blocks are cut. As many tiles for each load as
# leave a thread within 104 registers and a threadgroup within 16 KB.
METAL_SAMPLING_TILES = {
    1: SamplingTile(1, 1, 1, 4),
    2: SamplingTile(1, 2, 2, 2),
    3: SamplingTile(1, 3, 3, 1),
    4: SamplingTile(1, 4, 4, 1),
    5: SamplingTile(1, 5, 5, 1),
    6: SamplingTile(2, 3, 6, 1),
    7: SamplingTile(2, 4, 7, 1),
    8: SamplingTile(2, 4, 4, 1),
}
# In float32, where tiles and what is staged take twice the registers.
METAL_FLOAT_SAMPLING_TILES = METAL_SAMPLING_TILES | {
    5: SamplingTile(1, 5, 3, 1),
    7: SamplingTile(1, 7, 2, 1),
}

# The dtypes of kernels, ordered by use: membership is tested at every call.
KERNEL_DTYPES = (mx.bfloat16, mx.float32, mx.float16)

# Bits of the places of a state that a thread block owns, in sums of Pauli strings. On an H100, 24
# flips of 2^24 floats took 213 microseconds with 10 or 11 bits, 225 to 235 with 12 and 270 with 13.
CUDA_PAULI_BITS = 11
# As few where a state has fewer than 2^8 tiles otherwise: 2^16 floats took 17 microseconds with 8
# bits, 24 with 10 and 27 with 12, most of it a launch.
CUDA_PAULI_FEWEST_BITS = 8
# The same on Metal, by its 32 KB of threadgroup memory: nobody has measured it on a Mac.
METAL_PAULI_BITS = 11
