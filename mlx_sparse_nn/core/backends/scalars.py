"""The product by scalars, for Metal and CUDA alike: how lanes share rows, and rows lie in pieces.

Scalars are the blocks of B = 1, and those of every size that has no tiles. The kernel is
``spmm_csr`` of each backend, which says what its template arguments mean. On CUDA a lane has one
scalar row, on Metal, where blocks are small, all rows of a block.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import (
    MAX_THREADS,
    Kernel,
    KernelLaunch,
    Launches,
    lanes_per_row,
    launch_in_pieces,
    power_of_two,
    prepare,
    round_up,
)
from mlx_sparse_nn.core.layout import Side
from mlx_sparse_nn.core.transforms import tracing


class Sharing(NamedTuple):
    """How the threads of ``spmm_csr`` share the work.

    Attributes:
        rows: Rows of x that a group of lanes takes.
        width: How many of them lie side by side, x by columns; 1 where x lies by rows.
        lanes: Lanes that share the values of a row, for each of these.
        piece: Blocks above which a row is long, and which a piece of it has; 0 where none is.
    """

    rows: int
    width: int
    lanes: int
    piece: int


def product(
    backend: str,
    data: mx.array,
    side: Side,
    x: mx.array,
    n_out: int,
    inside: int,
    bias: mx.array | None,
    by_columns: bool,
    outputs: int = 1,
) -> mx.array:
    """Return the product with a side of the matrix, ``(..., N, n_out)``.

    Args:
        backend: The folder of the kernel.
        data: Stored values.
        side: The matrix, or its transpose.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``.
        n_out: Rows of the side, in scalars.
        inside: How many columns of the last block-column lie in the matrix.
        bias: ``(n_out,)``, or None.
        by_columns: Whether lanes lie along rows of x, and x by columns: a value then reads one
            cache line of x for up to 32 rows, not one for each.
        outputs: Rows of a block that a lane of this backend's kernel has: 1, or all of them.
    """
    shape, block_size = x.shape, data.shape[-1] if data.ndim > 2 else 1
    launches, by_columns = _launches(
        backend,
        x.dtype,
        (block_size, inside, side.perm is not None, bias is not None),
        (shape[-2], shape[0] if len(shape) == 3 else 1),
        (side.n_block_rows, side.n_blocks, side.longest_row),
        lanes_per_row(side, block_size),
        by_columns,
        outputs,
    )
    if by_columns:
        x = x.swapaxes(-1, -2)
        # MLX copies what has gaps before each launch, and for each input of it.
        x = x if tracing.graph is not None or launches.of_pieces is None else mx.contiguous(x)
        shape = (*shape[:-2], n_out, shape[-2])
        return launch_in_pieces(launches, data, side, x, bias, shape).swapaxes(-1, -2)
    return launch_in_pieces(launches, data, side, x, bias, (*shape[:-1], n_out))


@lru_cache(4096)
def _launches(
    backend: str,
    dtype: mx.Dtype,
    blocks: tuple[int, int, bool, bool],
    x_sizes: tuple[int, int],
    side_sizes: tuple[int, int, int],
    lanes: int,
    by_columns: bool,
    outputs: int,
) -> tuple[Launches, bool]:
    """Return the launches of these sizes, and whether x lies by columns after all.

    They are kept: to choose takes longer than to launch.
    """
    (block_size, inside, transposed, has_bias), (n_x, n_matrices) = blocks, x_sizes
    n_block_rows, n_blocks, longest = side_sizes
    how = share(n_x, block_size, n_block_rows, n_blocks, longest, lanes, by_columns, outputs)
    template = {"B": block_size, "INSIDE": inside, "TRANSPOSED": int(transposed)}
    template |= {"ROWS": how.rows, "WIDTH": how.width, "PIECE": max(1, how.piece)}
    template["LONG"] = int(how.piece > 0)

    def launch(n_units: int, lanes: int, out: mx.Dtype, **options: int) -> KernelLaunch:
        n_owned, threads = n_units * block_size // outputs, tuned.GROUP_THREADS
        grid = (round_up(n_owned * lanes * how.width, threads), -(-n_x // how.rows), n_matrices)
        kernel = Kernel("spmm_csr", template | options | {"LANES": lanes}, grid, threads)
        return prepare(backend, "spmm_in_pieces", kernel, out, T=dtype, OUT=out)

    of_rows = launch(n_block_rows, how.lanes, dtype, OF_PIECES=0, BIAS=int(has_bias))
    of_pieces, n_pieces = None, 0
    if how.piece:
        n_pieces = -(-n_blocks // how.piece)
        of_pieces = launch(n_pieces, 32 // how.width, mx.float32, OF_PIECES=1, BIAS=0)
    return Launches(of_rows, of_pieces, (n_pieces, 2, block_size, n_x)), how.width > 1


def share(
    n_x: int,
    block_size: int,
    n_block_rows: int,
    n_blocks: int,
    longest: int,
    lanes: int,
    by_columns: bool,
    outputs: int = 1,
) -> Sharing:
    """Return how threads share a product.

    Args:
        n_x: Rows of x.
        block_size: Side of the blocks.
        n_block_rows: Of the side.
        n_blocks: Blocks of the side.
        longest: Those of its longest block-row.
        lanes: As many as the mean row asks for.
        by_columns: Whether lanes lie along rows of x.
        outputs: Rows of a block that a lane has.
    """
    width = min(32, power_of_two(n_x)) if by_columns else 1
    # Each lane holds up to 4 rows of x, evenly.
    held = -(-n_x // (width * -(-n_x // (4 * width)))) if width > 1 else min(4, n_x)
    # As long a piece as the square root of a row leaves as many partial sums as it has values.
    root = power_of_two(isqrt(longest * block_size) + 1) // 2
    n_owned = n_block_rows * block_size // outputs
    if longest * block_size > tuned.MAX_ROUNDS * lanes:
        lanes = max(lanes, tuned.MIN_PIECE // tuned.MAX_ROUNDS, root // tuned.MAX_ROUNDS)
    lanes = min(32 // width, lanes)
    while n_owned * lanes * width > MAX_THREADS and lanes * width > 1:
        lanes, width = (lanes // 2, width) if lanes > 1 else (lanes, width // 2)
    rows = held * width
    limit = max(tuned.MIN_PIECE, tuned.MAX_ROUNDS * lanes, root)
    if n_owned * lanes * width * -(-n_x // rows) >= tuned.THREADS_TO_FILL_GPU:
        # Even rows may be longer: no lane waits for others.
        even = max(tuned.MAX_EVEN_PIECE, 4 * tuned.MAX_ROUNDS * lanes)
        twice_mean = power_of_two(2 * n_blocks // n_block_rows * block_size)
        piece = limit = max(limit, min(even, twice_mean))
    else:
        filling = power_of_two(n_blocks * block_size**2 // outputs // tuned.PIECES_TO_FILL_GPU)
        piece = min(limit, max(tuned.MIN_PIECE, filling, root))
    is_long = longest * block_size > limit
    return Sharing(rows, width, lanes, max(1, piece // block_size) if is_long else 0)
