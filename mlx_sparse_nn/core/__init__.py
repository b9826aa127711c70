"""The sparse core: patterns, sparse arrays, and the products."""

from mlx_sparse_nn.core.arrays import COOArray, CSRArray, csr_matmul
from mlx_sparse_nn.core.assemble import (
    block_diag,
    diags,
    eye,
    hstack,
    issparse,
    kron,
    kronsum,
    random,
    softmax,
    vstack,
)
from mlx_sparse_nn.core.construct import (
    bsr_array,
    coo_array,
    csr_array,
    from_dense,
    from_scipy,
    to_scipy,
)
from mlx_sparse_nn.core.device import use_cpu, use_device, use_gpu
from mlx_sparse_nn.core.files import load_npz, load_safetensors, save_npz, save_safetensors
from mlx_sparse_nn.core.ops import qspmm, qspmm_t, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.vector import SparseVector

__all__ = [
    "COOArray",
    "CSRArray",
    "CSRPattern",
    "SparseVector",
    "block_diag",
    "bsr_array",
    "coo_array",
    "csr_array",
    "csr_matmul",
    "diags",
    "eye",
    "from_dense",
    "from_scipy",
    "hstack",
    "issparse",
    "kron",
    "kronsum",
    "load_npz",
    "load_safetensors",
    "qspmm",
    "qspmm_t",
    "random",
    "save_npz",
    "save_safetensors",
    "sddmm",
    "softmax",
    "spmm",
    "spmm_t",
    "to_scipy",
    "use_cpu",
    "use_device",
    "use_gpu",
    "vstack",
]
