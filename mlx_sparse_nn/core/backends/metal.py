"""The three products as Metal kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import few_rows, launch, scalars
from mlx_sparse_nn.core.backends.launch import (
    Kernel,
    launch_sddmm,
    launch_spmm,
    power_of_two,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Layout, Side
from mlx_sparse_nn.core.quantized import bits_of

NAME = "metal"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops
_tensor_units = False  # whether products may use them: off until a run on an M5 is recorded


def is_available() -> bool:
    """Return whether MLX has a Metal GPU."""
    return mx.metal.is_available()


def has_tensor_units() -> bool:
    """Return whether this GPU has tensor units that MLX's own products would use.

    They are those of the M5 and later, and of phones one generation on, from macOS 26.2.
    """
    if not is_available():
        return False
    found = re.fullmatch(r".*?(\d+)([a-z])", str(mx.device_info()["architecture"]))
    if found is None:
        return False
    generation, kind = found.groups()
    major, minor = [int(part) for part in f"{platform.mac_ver()[0] or 0}.0".split(".")[:2]]
    major = 26 if major == 16 else major  # what Python is told that was built before macOS 26
    return int(generation) >= (18 if kind == "p" else 17) and (major, minor) >= (26, 2)


def tensor_units() -> AbstractContextManager[None]:
    """Return a context in which products of many rows use the tensor units, in this process alone.

    Each product chooses anew, but what ``mx.compile`` has traced keeps the kernel that it chose.

    Raises:
        RuntimeError: If this machine has none.
    """
    if not has_tensor_units():
        raise RuntimeError(
            "[tensor_units] this machine must have a GPU of the M5 or later, and macOS 26.2 or "
            f"later, got {mx.device_info()['architecture']} and macOS "
            f"{platform.mac_ver()[0] or 'none'}; leave the tensor units off"
        )
    return _using_tensor_units()


@contextmanager
def _using_tensor_units() -> Iterator[None]:
    global _tensor_units
    before, _tensor_units = _tensor_units, True
    try:
        yield
    finally:
        _tensor_units = before


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product: for all that kernels can do."""
    return launch.takes(layout, n_x, dtype, n_matrices)


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    return _product(data, layout.rows, x, layout.full_shape[0], layout.inside[1], bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    return _product(data, layout.cols, y, layout.full_shape[1], layout.inside[0], None)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    if layout.block_size < 8:
        kernel = _sampling_by_scalars(layout, n_x, n_matrices)
    else:
        kernel = _sampling_by_tiles(layout, n_matrices, x.itemsize)
    # Few groups and many rows: split the rows, so that the whole GPU has work, and sum in order.
    groups = kernel.grid[0] // kernel.threads * n_matrices
    n_splits = max(1, min(tuned.METAL_GRADIENT_GROUPS // groups, n_x // tuned.METAL_ROWS_PER_SPLIT))
    by_columns = kernel.template.get("WIDTH", 1) > 1
    return launch_sddmm(NAME, kernel, layout, y, x, n_splits, by_columns)


def _sampling_by_scalars(layout: Layout, n_x: int, n_matrices: int) -> Kernel:
    """Return the kernel of ``sddmm`` for scalars and blocks of less than 8, summed one by one."""
    block_size, side = layout.block_size, layout.rows
    blocks = tuned.METAL_SAMPLED_BLOCKS[block_size]
    width = 1 if n_x < tuned.METAL_SAMPLED_COLUMNS else 8
    threads = tuned.GROUP_THREADS
    grid = (round_up((side.n_block_rows + side.n_blocks // blocks) * width, threads), 1, n_matrices)
    template = {"B": block_size, "BLOCKS": blocks, "WIDTH": width}
    return Kernel("sddmm_csr", template, grid, threads)


def _sampling_by_tiles(layout: Layout, n_matrices: int, itemsize: int) -> Kernel:
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


def _product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Launch the kernel of a product with a side of the matrix.

    Of the last block-column, as many columns as ``inside`` says lie in the matrix.
    """
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block_size = data.shape[-1] if data.ndim > 2 else 1
    # MLX passes fewer than 8 elements in constant memory, where scalars alone are loaded.
    if block_size < tuned.METAL_SMALLEST_TILED or x.size < 8:
        return scalars.product(NAME, data, side, x, n_out, inside, bias)
    if n_x <= tuned.METAL_FEW_ROWS:
        return few_rows.product(NAME, data, side, x, n_out, inside, bias)
    sizes = block_size, n_x, n_out, n_matrices
    if _tensor_units and _suits_tensor_units(block_size, n_x, x.dtype):
        kernel = _by_tensor_units(*sizes)
    else:
        kernel = _by_tiles(*sizes, x.itemsize)
    options = {
        "T": x.dtype,
        "B": block_size,
        "INSIDE": inside,
        "TRANSPOSED": int(side.perm is not None),
        "BIAS": int(bias is not None),
    }
    launched = prepare(NAME, "spmm", kernel, x.dtype, **options)
    return launch_spmm(launched, data, side, x, n_out, bias)


def _by_tiles(block_size: int, n_x: int, n_out: int, n_matrices: int, itemsize: int) -> Kernel:
    """Return the kernel of blocks and many rows of x, by 8 x 8 products of simdgroups."""
    template = _tile(block_size, n_x, itemsize)
    threads = 32 * template["SIMD_N"] * template["SIMD_O"] * template["SIMD_K"]
    strips = -(-block_size // template["WIDTH"])
    width = n_out // block_size * strips * threads
    grid = (width, -(-n_x // template["ROWS"]), n_matrices)
    return Kernel("spmm_tiles", template, grid, threads)


def _tile(block_size: int, n_x: int, itemsize: int) -> dict[str, int]:
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


def _suits_tensor_units(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether the tensor units compute a product: of 16 bits, blocks and many rows of x."""
    suits = block_size % 16 == 0 and 16 <= block_size <= 128 and dtype.size == 2
    return suits and n_x >= tuned.METAL_TENSOR_ROWS


def _by_tensor_units(block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
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


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks; see ``plain.qspmm``."""
    matrix, n_out, inside = (packed, scales, biases), layout.full_shape[0], layout.inside[1]
    return _quantized_product(matrix, layout.rows, x, n_out, inside, bias)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, layout: Layout, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks; see ``plain.qspmm_t``."""
    matrix, n_out, inside = (packed, scales, biases), layout.full_shape[1], layout.inside[0]
    return _quantized_product(matrix, layout.cols, y, n_out, inside, None)


def _quantized_product(
    matrix: tuple[mx.array, mx.array, mx.array],
    side: Side,
    x: mx.array,
    n_out: int,
    inside: int,
    bias: mx.array | None,
) -> mx.array:
    """Launch the kernel of a quantized product with a side of the matrix, as ``_product`` does."""
    packed, scales, _ = matrix
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block_size, group_size = packed.shape[-2], packed.shape[-2] // scales.shape[-1]
    sizes = block_size, group_size, x.dtype.size, n_x, n_out, n_matrices
    kernel = _quantized_kernel(side, *sizes)
    options = {
        "T": x.dtype,
        "BITS": bits_of(packed),
        "GROUP_SIZE": group_size,
        "B": block_size,
        "INSIDE": inside,
        "TRANSPOSED": int(side.perm is not None),
        "BIAS": int(bias is not None),
    }
    perm = side.indices if side.perm is None else side.perm
    arrays = [*matrix, side.indptr, side.indices, perm, x, x if bias is None else bias]
    return prepare(NAME, "qspmm", kernel, x.dtype, **options)(arrays, (*x.shape[:-1], n_out))


def _quantized_kernel(
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
