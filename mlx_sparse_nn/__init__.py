"""Block-sparse layers, sparse arrays and sparse Hamiltonians for MLX."""

from mlx_sparse_nn import patterns, physics
from mlx_sparse_nn.core import (
    COOArray,
    CSRArray,
    CSRPattern,
    bsr_array,
    coo_array,
    csr_array,
    csr_matmul,
    from_dense,
    from_scipy,
    sddmm,
    spmm,
    spmm_t,
    to_scipy,
    use_cpu,
    use_device,
    use_gpu,
)
from mlx_sparse_nn.layers import BlockSparseLinear

__version__ = "0.1.0"

__all__ = [
    "BlockSparseLinear",
    "COOArray",
    "CSRArray",
    "CSRPattern",
    "bsr_array",
    "coo_array",
    "csr_array",
    "csr_matmul",
    "from_dense",
    "from_scipy",
    "patterns",
    "physics",
    "sddmm",
    "spmm",
    "spmm_t",
    "to_scipy",
    "use_cpu",
    "use_device",
    "use_gpu",
]
