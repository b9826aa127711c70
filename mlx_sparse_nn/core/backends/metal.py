"""The three products as Metal kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import launch, scalars
from mlx_sparse_nn.core.backends.launch import (
    Kernel,
    launch_sddmm,
    launch_spmm,
    power_of_two,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Layout, Side

NAME = "metal"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops


def is_available() -> bool:
    """Return whether MLX has a Metal GPU."""
    return mx.metal.is_available()


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product: for all that kernels can do."""
    return launch.takes(layout, n_x, dtype, n_matrices, bits)


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
        kernel = _sampling_by_tiles(layout, n_matrices)
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


def _sampling_by_tiles(layout: Layout, n_matrices: int) -> Kernel:
    """Return the kernel of ``sddmm`` for blocks of 8 and more, by 8 x 8 products of simdgroups."""
    block_size, side = layout.block_size, layout.rows
    tile = _sampling_tile(block_size, side.longest_row)
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


def _sampling_tile(block_size: int, longest_row: int) -> tuned.SamplingTile:
    """Return the tile of ``sddmm`` for a block size of at least 8.

    Larger blocks than 64 are cut into equal parts. Small ones share a simdgroup only where there
    are more than enough for four.
    """
    tiles = -(-block_size // 8)
    tile = tuned.METAL_SAMPLING_TILES[-(-tiles // -(-tiles // 8))]
    return tile._replace(strips=min(tile.strips, power_of_two(-(-longest_row // 4))))


def _product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Launch the kernel of a product with a side of the matrix.

    Of the last block-column, as many columns as ``inside`` says lie in the matrix.
    """
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block_size = data.shape[-1] if data.ndim > 2 else 1
    if block_size not in tuned.TILED_BLOCKS:
        return scalars.product(NAME, data, side, x, n_out, inside, bias)
    kernel = _product_kernel(side, block_size, n_x, n_out, n_matrices)
    options = {
        "T": x.dtype,
        "B": block_size,
        "INSIDE": inside,
        "TRANSPOSED": int(side.perm is not None),
        "BIAS": int(bias is not None),
    }
    launched = prepare(NAME, "spmm", kernel, x.dtype, **options)
    return launch_spmm(launched, data, side, x, n_out, bias)


def _product_kernel(side: Side, block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Choose the kernel of ``spmm`` or ``spmm_t`` for blocks: of few rows of x, or by tiles."""
    sizes = side, block_size, n_x, n_out, n_matrices
    return _of_few_rows(*sizes) if n_x <= tuned.METAL_FEW_ROWS else _by_tiles(*sizes)


def _of_few_rows(side: Side, block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Return the kernel of blocks and few rows of x, which is bound by reading the blocks."""
    # One simdgroup for every four blocks of the longest block-row, 8 at most.
    rows, simdgroups = power_of_two(n_x), min(8, power_of_two(-(-side.longest_row // 4)))
    threads = 32 * simdgroups
    grid = (n_out // min(block_size, 16) * threads, -(-n_x // rows), n_matrices)
    return Kernel("spmm_few", {"ROWS": rows, "GROUPS": simdgroups}, grid, threads)


def _by_tiles(side: Side, block_size: int, n_x: int, n_out: int, n_matrices: int) -> Kernel:
    """Return the kernel of blocks and many rows of x, by 8 x 8 products of simdgroups."""
    rows = 16 if n_x <= 16 else 32 if n_x <= 32 or block_size == 128 else 64
    threads = 64 if block_size == 8 else 128
    grid = (n_out // block_size * threads, -(-n_x // rows), n_matrices)
    return Kernel("spmm_tiles", {"ROWS": rows}, grid, threads)
