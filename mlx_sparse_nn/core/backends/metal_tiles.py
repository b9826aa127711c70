"""Which Metal kernel computes a product, and its tile: from sizes alone.

The numbers are in ``tuned``. They were set by counts, on the emulator and in clang's output.
"""

from __future__ import annotations

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import Kernel, power_of_two, round_up
from mlx_sparse_nn.core.layout import Layout, Side


def product_tiles(block_size: int, n_x: int, n_out: int, n_matrices: int, itemsize: int) -> Kernel:
    """Return the kernel of blocks and many rows of x, by 8 x 8 products of simdgroups."""
    template = product_tile(block_size, n_x, itemsize)
    threads = 32 * template["SIMD_N"] * template["SIMD_O"] * template["SIMD_K"]
    strips = -(-block_size // template["WIDTH"])
    width = n_out // block_size * strips * threads
    grid = (width, -(-n_x // template["ROWS"]), n_matrices)
    return Kernel("spmm_tiles", template, grid, threads)


def product_tile(block_size: int, n_x: int, itemsize: int) -> dict[str, int]:
    """Return the tile of ``spmm_tiles``: how rows of x, outputs and k are shared."""
    filled = round_up(block_size, 8)
    tile = tuned.METAL_TILES[-(-filled // 8 // -(-filled // tuned.METAL_MAX_WIDTH))]
    # Where rows are few, each simdgroup's outputs are a threadgroup's, whose simdgroups share k.
    few = n_x <= tuned.METAL_SOME_ROWS
    simds_o = 1 if few else tile.simds_o
    width = 8 * tile.tiles_o * simds_o
    most = 64 if width > tuned.METAL_WIDE else 128
    rows = next((rows for rows in (16, 32, 64) if n_x <= rows), most)
    simds_n = max(1, rows // (8 * tile.tiles_n))
    simds_k = max(1, 4 // (simds_n * simds_o))
    threads = 32 * simds_n * simds_o * simds_k
    return {
        "ROWS": rows,
        "WIDTH": width,
        "DEPTH": _depth(filled, rows + width, threads, itemsize, few),
        "SIMD_N": simds_n,
        "SIMD_O": simds_o,
        "SIMD_K": simds_k,
    }


def _depth(filled: int, height: int, threads: int, itemsize: int, few: bool) -> int:
    """Return how many k a stage has, of ``height`` rows of x and outputs.

    Several whole blocks, or a divisor of a block that all threads can share, or what makes the
    fewest stages of a block.
    """
    most = tuned.METAL_DEPTH_BYTES * (2 if few else 1) // itemsize
    most = min(most, tuned.METAL_STAGE_VALUES // height // 8 * 8 - 8)
    if 2 * filled <= most:
        return filled * (power_of_two(most // filled + 1) // 2)
    for depth in range(most, max(16, most // 2) - 1, -8):
        if filled % depth == 0 and (few or threads % (depth // 8) == 0):
            return depth
    return round_up(-(-filled // -(-filled // most)), 8)


def tensor_unit_tiles(block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Return the kernel of blocks and many rows of x, by the tensor units of the M5 and later."""
    # A simdgroup takes 32 rows of x, and 32 outputs where they divide the block: as MLX's own do.
    cols = next(cols for cols in (32, 48, 16) if block_size % cols == 0)
    rows = 32 if n_x <= 32 else 64 if n_x <= 64 else 128
    while rows * block_size // cols > tuned.METAL_TENSOR_THREADS:
        rows //= 2
    threads = rows * block_size // cols
    grid = (n_out // block_size * threads, -(-n_x // rows), n_matrices)
    template = {"ROWS": rows, "WHOLE": int(n_x % 32 == 0), "COLS": cols}
    return Kernel("spmm_tensor", template, grid, threads)


def sampled_scalars(layout: Layout, n_x: int, n_matrices: int) -> Kernel:
    """Return the kernel of ``sddmm`` for scalars and blocks of less than 8, summed one by one."""
    block_size, side = layout.block_size, layout.rows
    blocks = tuned.METAL_SAMPLED_BLOCKS[block_size]
    width = 1 if n_x < tuned.METAL_SAMPLED_COLUMNS else 8
    threads = tuned.GROUP_THREADS
    grid = (round_up((side.n_block_rows + side.n_blocks // blocks) * width, threads), 1, n_matrices)
    template = {"B": block_size, "BLOCKS": blocks, "WIDTH": width}
    return Kernel("sddmm_csr", template, grid, threads)


def sampled_tiles(layout: Layout, n_matrices: int, itemsize: int) -> Kernel:
    """Return the kernel of ``sddmm`` for blocks of 8 and more, by 8 x 8 products of simdgroups."""
    block_size, side = layout.block_size, layout.rows
    tile = _sampling_tile(block_size, side.longest_row, itemsize)
    # Of a block: how many parts along its rows, and how many strips.
    parts = -(-block_size // (8 * tile.simds_i * tile.tiles_i))
    cuts = -(-block_size // (8 * tile.tiles_k))
    share = tile.strips * 4 // tile.simds_i  # strips of a group
    if side.is_uniform:
        groups = side.n_block_rows * -(-side.longest_row * cuts // share)
    else:
        groups = side.n_block_rows + side.n_blocks * cuts // share
    template = {"B": block_size, "EVEN": int(side.is_uniform), **tile._asdict()}
    template = {name.upper(): value for name, value in template.items()}
    return Kernel("sddmm_tiles", template, (groups * parts * 128, 1, n_matrices), 128)


def _sampling_tile(block_size: int, longest_row: int, itemsize: int) -> tuned.SamplingTile:
    """Return the tile of ``sddmm`` for a block size of at least 8.

    Larger blocks than 64 are cut into equal parts. Small ones share a simdgroup only where there
    are more than enough for four.
    """
    tiles = -(-block_size // 8)
    table = tuned.METAL_FLOAT_SAMPLING_TILES if itemsize == 4 else tuned.METAL_SAMPLING_TILES
    tile = table[-(-tiles // -(-tiles // 8))]
    return tile._replace(strips=min(tile.strips, power_of_two(-(-longest_row // 4))))


def quantized_product(
    side: Side,
    block_size: int,
    group_size: int,
    itemsize: int,
    n_x: int,
    n_out: int,
    n_matrices: int,
) -> Kernel:
    """Choose the kernel of ``qspmm`` or ``qspmm_t``: of few rows of x, of some, or of many."""
    if n_x > tuned.METAL_QUANTIZED_ROWS:
        return _by_quantized_tiles(block_size, n_x, n_out, n_matrices)
    # 32 rows of float32 would take more registers than there are.
    rows, strip = min(power_of_two(n_x), 64 // itemsize), 32
    if side.perm is not None and rows <= tuned.METAL_FEW_ROWS:
        strip = min(group_size, 512 // rows)  # no scale is read twice, as far as sums fit
    # One simdgroup for every four slices of 32 columns of the longest block-row. There are 8 at
    # most, whose sums take 16 KB at most.
    slices = side.longest_row * block_size // 32
    simdgroups = min(8, power_of_two(-(-slices // 4)), 4096 // (rows * strip))
    threads = 32 * simdgroups
    grid = (n_out // strip * threads, -(-n_x // rows), n_matrices)
    name = "qspmm_few" if rows <= tuned.METAL_QUANTIZED_FEW_ROWS else "qspmm_rows"
    return Kernel(name, {"STRIP": strip, "ROWS": rows, "GROUPS": simdgroups}, grid, threads)


def _by_quantized_tiles(block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Return the kernel of quantized blocks and many rows of x, by tiles in threadgroup memory."""
    fitting = [
        tile
        for tile in tuned.METAL_QUANTIZED_TILES
        if block_size % tile.side == 0 and (n_x > 64 or tile.rows == 64)
    ]

    def n_groups(tile: tuned.QuantizedTile) -> int:
        return n_out // tile.side * -(-n_x // tile.rows) * n_matrices

    # The largest that keeps the GPU busy.
    enough = (tile for tile in fitting if n_groups(tile) >= tuned.METAL_QUANTIZED_GROUPS)
    tile = next(enough, fitting[-1])
    threads = 32 * tile.simdgroups
    grid = (n_out // tile.side * threads, -(-n_x // tile.rows), n_matrices)
    template = {
        "SIDE": tile.side,
        "ROWS": tile.rows,
        "ACROSS": tile.across,
        "GROUPS": tile.simdgroups,
    }
    return Kernel("qspmm_tiles", template, grid, threads)
