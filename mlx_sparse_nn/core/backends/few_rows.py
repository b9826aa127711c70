"""The product of blocks and up to 8 rows of x on Metal: how it is shared, and rows lie in pieces.

It is bound by reading the stored values. The kernel is ``spmm_few``, whose header says what its
template arguments mean.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import (
    MAX_THREADS,
    Kernel,
    KernelLaunch,
    Launches,
    launch_in_pieces,
    power_of_two,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Side


def product(
    backend: str,
    data: mx.array,
    side: Side,
    x: mx.array,
    n_out: int,
    inside: int,
    bias: mx.array | None,
) -> mx.array:
    """Return the product with a side of the matrix, ``(..., N, n_out)``.

    Args:
        backend: The folder of the kernel.
        data: Stored values, ``(..., n_blocks, B, B)``, B at least 4.
        side: The matrix, or its transpose.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``, N at most 8.
        n_out: Rows of the side, in scalars.
        inside: How many columns of the last block-column lie in the matrix.
        bias: ``(n_out,)``, or None.
    """
    shape = x.shape
    launches = _launches(
        backend,
        x.dtype,
        (data.shape[-1], inside, side.perm is not None, bias is not None),
        (shape[-2], shape[0] if len(shape) == 3 else 1),
        (side.n_block_rows, side.n_blocks, side.longest_row),
    )
    return launch_in_pieces(launches, data, side, x, bias, (*shape[:-1], n_out))


@lru_cache(4096)
def _launches(
    backend: str,
    dtype: mx.Dtype,
    blocks: tuple[int, int, bool, bool],
    x_sizes: tuple[int, int],
    side_sizes: tuple[int, int, int],
) -> Launches:
    """Return the launches of these sizes, kept: to choose takes longer than to launch."""
    (block_size, inside, transposed, has_bias), (n_x, n_matrices) = blocks, x_sizes
    n_block_rows, n_blocks, longest = side_sizes
    strip, steps = _strip(block_size, dtype.size, transposed)
    strips = -(-block_size // strip)
    piece = _piece(block_size, n_block_rows, n_blocks, longest, strips * n_matrices)
    vectors = min(longest, piece) * -(-block_size // 4)  # in what a threadgroup walks
    # One simdgroup for every 32 of them, 8 at most.
    simdgroups = min(8, power_of_two(-(-vectors // 32)))
    while simdgroups > 1 and n_block_rows * strips * 32 * simdgroups > MAX_THREADS:
        simdgroups //= 2
    template = {"B": block_size, "INSIDE": inside, "TRANSPOSED": int(transposed)}
    template |= {"ROWS": 1 if n_x == 1 else 8, "STRIP": strip, "STEPS": steps if vectors > 8 else 1}
    template |= {"GROUPS": simdgroups, "PIECE": piece, "LONG": int(longest > piece)}

    def launch(n_units: int, out: mx.Dtype, **options: int) -> KernelLaunch:
        threads = 32 * simdgroups
        grid = (n_units * strips * threads, 1, n_matrices)
        kernel = Kernel("spmm_few", template | options, grid, threads)
        return prepare(backend, "spmm_in_pieces", kernel, out, T=dtype, OUT=out)

    of_rows = launch(n_block_rows, dtype, OF_PIECES=0, BIAS=int(has_bias))
    of_pieces, n_pieces = None, 0
    if longest > piece:
        n_pieces = -(-n_blocks // piece)
        of_pieces = launch(2 * n_pieces, mx.float32, OF_PIECES=1, BIAS=0)
    return Launches(of_rows, of_pieces, (n_pieces, 2, n_x, block_size))


def _strip(block_size: int, itemsize: int, transposed: bool) -> tuple[int, int]:
    """Return the outputs of a threadgroup, a multiple of 8, and the steps that it loads at once.

    Both as large as a lane's 104 registers allow, by the counts of clang's amdgcn output.
    """
    strips = -(-block_size // (40 if itemsize == 4 else 48))
    strip = 32 if block_size % 32 == 0 else round_up(-(-block_size // strips), 8)
    loads = strip // 4 if not transposed else max(4, round_up(strip, 16) // 4)  # of a step
    most = 4 if itemsize == 4 or block_size % 4 else 8
    return strip, 2 if loads <= most else 1


def _piece(
    block_size: int, n_block_rows: int, n_blocks: int, longest: int, groups_per_row: int
) -> int:
    """Return how many blocks a piece of a long block-row has; 1 << 30 where none is cut.

    Args:
        block_size: Side of the blocks.
        n_block_rows, n_blocks, longest: Of the side; ``longest`` in blocks.
        groups_per_row: Threadgroups of a block-row, for all matrices.
    """
    work = n_blocks * groups_per_row
    piece = work / tuned.METAL_FEW_GROUPS  # of as many threadgroups as fill a GPU
    if n_block_rows * groups_per_row >= tuned.METAL_FEW_GROUPS:
        piece = tuned.METAL_FEW_LONG * n_blocks / n_block_rows
    least = max(tuned.METAL_FEW_PIECE // -(-block_size // 4), longest // 256)
    # A power of two, since each is one more variant to compile.
    piece = power_of_two(max(1, least, int(piece)))
    return piece if longest >= 2 * piece else 1 << 30
