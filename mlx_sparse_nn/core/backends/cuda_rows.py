"""The products of 16-bit blocks with some rows of x, on Hopper: by clusters of thread blocks."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda_tiles
from mlx_sparse_nn.core.backends.launch import Kernel


def takes(block_size: int, n_x: int, dtype: mx.Dtype, transposed: bool) -> bool:
    """Return whether thread blocks work in clusters: few of x's rows are left to other kernels.

    Those of few rows do not multiply by a transpose.
    """
    if dtype == mx.float32 or n_x > tuned.SHARED_ROWS.get(block_size, 0):
        return False
    return (transposed or n_x > tuned.CUDA_FEW_ROWS) and cuda_tiles.architecture() == tuned.HOPPER


def shares(
    n_x: int, n_matrices: int, block_size: int, inside: int, n_out: int, transposed: bool
) -> Kernel:
    """Return the kernel in which a cluster shares the blocks of a block-row.

    A cluster is as large as it takes to fill the GPU, and a thread block has as many stages as
    leave room for a second one on its multiprocessor.
    """
    rows = 64 if n_x <= 64 else 128
    groups = n_out // block_size * -(-n_x // rows) * n_matrices
    cluster = 1
    while cluster < tuned.MAX_CLUSTER and groups * cluster < tuned.BLOCKS_TO_FILL_GPU:
        cluster *= 2
    stage = (rows + block_size) * 128
    stages = min(tuned.MAX_SHARED_STAGES, (tuned.MAX_SHARED_OF_TWO - 1024) // stage)
    return warpgroups(
        n_x, n_matrices, block_size, inside, n_out, transposed, (rows, cluster, stages)
    )


def clusters(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    transposed: bool,
    tile: tuple,
    name: str = "spmm_clusters",
) -> Kernel:
    """Return the kernel of a product; ``tile`` is rows, width, cluster, stages, ring."""
    rows, width, cluster, stages, ring = tile
    threads = 2 * width + 128
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows, "WIDTH": width}
    template |= {"CLUSTER": cluster, "STAGES": stages, "RING": ring}
    template["TRANSPOSED"] = int(transposed)
    grid = (-(-n_out // width) * cluster * threads, -(-n_x // rows), n_matrices)
    shared_memory = stages * rows * max(128, block_size) * 2 + width // 16 * ring * 2
    return Kernel(name, template, grid, threads, shared_memory, cluster)


def warpgroups(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    transposed: bool,
    tile: tuple[int, int, int],
) -> Kernel:
    """Return the kernel of a product; ``tile`` is rows, cluster, stages."""
    rows, cluster, stages = tile
    threads = 256 if rows == 64 else 384
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows, "CLUSTER": cluster}
    template |= {"STAGES": stages, "TRANSPOSED": int(transposed)}
    grid = (n_out // block_size * cluster * threads, -(-n_x // rows), n_matrices)
    shared_memory = stages * (rows + block_size) * 128 + 1024
    return Kernel("spmm_shares", template, grid, threads, shared_memory, cluster)
