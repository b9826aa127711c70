"""The products of 16-bit blocks with some rows of x, on Hopper: by clusters of thread blocks."""

from __future__ import annotations

from mlx_sparse_nn.core.backends.launch import Kernel


def clusters(
    n_x: int,
    n_matrices: int,
    block_size: int,
    inside: int,
    n_out: int,
    transposed: bool,
    tile: tuple[int, int, int, int, int],
) -> Kernel:
    """Return the kernel of a product; ``tile`` is rows, width, cluster, stages, ring."""
    rows, width, cluster, stages, ring = tile
    threads = 2 * width + 128
    template = {"B": block_size, "INSIDE": inside, "ROWS": rows, "WIDTH": width}
    template |= {"CLUSTER": cluster, "STAGES": stages, "RING": ring}
    template["TRANSPOSED"] = int(transposed)
    grid = (-(-n_out // width) * cluster * threads, -(-n_x // rows), n_matrices)
    shared_memory = stages * rows * max(128, block_size) * 2 + width // 16 * ring * 2
    return Kernel("spmm_clusters", template, grid, threads, shared_memory, cluster)


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
