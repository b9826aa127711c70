"""Block-sparse layers, sparse arrays and sparse Hamiltonians for MLX."""

try:
    from mlx import core as _mlx  # noqa: F401
except ImportError as error:  # on Linux, MLX alone has no backend: its library is a package more
    if "libmlx" not in str(error):
        raise
    raise ImportError(
        '[mlx_sparse_nn] MLX has no backend here: pip install "mlx[cpu]", or on an NVIDIA GPU '
        '"mlx[cuda13]" ("mlx[cuda12]" with a driver before 580)'
    ) from error

from mlx_sparse_nn import patterns, physics
from mlx_sparse_nn.calibration.calibrate import calibrate
from mlx_sparse_nn.calibration.mlx_lm_model import save_mlx_lm
from mlx_sparse_nn.calibration.record import layer_moments
from mlx_sparse_nn.calibration.refit import Refit, refit
from mlx_sparse_nn.calibration.report import CalibrationReport
from mlx_sparse_nn.calibration.sensitivity import Sensitivity, sensitivity
from mlx_sparse_nn.core import (
    COOArray,
    CSRArray,
    CSRPattern,
    SparseVector,
    block_diag,
    bsr_array,
    coo_array,
    csr_array,
    csr_matmul,
    diags,
    eye,
    from_dense,
    from_scipy,
    hstack,
    issparse,
    kron,
    kronsum,
    load_npz,
    load_safetensors,
    qspmm,
    qspmm_t,
    random,
    save_npz,
    save_safetensors,
    sddmm,
    softmax,
    spmm,
    spmm_t,
    to_scipy,
    use_cpu,
    use_device,
    use_gpu,
    vstack,
)
from mlx_sparse_nn.core.moments import InputMoments
from mlx_sparse_nn.core.scores import BlockPlaces
from mlx_sparse_nn.diagnostics.advise import AdviceReport, MethodTiming, advise
from mlx_sparse_nn.diagnostics.products import ProductCheck
from mlx_sparse_nn.diagnostics.summary import LayerSummary, SummaryReport, summary
from mlx_sparse_nn.diagnostics.verify import MismatchError, VerifyReport, verify
from mlx_sparse_nn.layers.linear import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear
from mlx_sparse_nn.layers.sharded import check_same_pattern, shard_block_sparse, shard_boundaries
from mlx_sparse_nn.layers.sparse_parameter import SparseParameter
from mlx_sparse_nn.surgery.prune import PruneReport, cubic_density, prune
from mlx_sparse_nn.surgery.regrow import RegrowReport, activations, regrow
from mlx_sparse_nn.surgery.restore import restore, restore_patterns
from mlx_sparse_nn.surgery.sparsify import SparsifyReport, densify, sparsify
from mlx_sparse_nn.surgery.trainable import load_trainable, save_trainable

__version__ = "0.1.0"

__all__ = [
    "AdviceReport",
    "BlockPlaces",
    "BlockSparseLinear",
    "COOArray",
    "CSRArray",
    "CSRPattern",
    "CalibrationReport",
    "InputMoments",
    "LayerSummary",
    "LoRABlockSparseLinear",
    "MethodTiming",
    "MismatchError",
    "ProductCheck",
    "PruneReport",
    "QuantizedBlockSparseLinear",
    "Refit",
    "RegrowReport",
    "Sensitivity",
    "SparseParameter",
    "SparseVector",
    "SparsifyReport",
    "SummaryReport",
    "VerifyReport",
    "activations",
    "advise",
    "block_diag",
    "bsr_array",
    "calibrate",
    "check_same_pattern",
    "coo_array",
    "csr_array",
    "csr_matmul",
    "cubic_density",
    "densify",
    "diags",
    "eye",
    "from_dense",
    "from_scipy",
    "hstack",
    "issparse",
    "kron",
    "kronsum",
    "layer_moments",
    "load_npz",
    "load_safetensors",
    "load_trainable",
    "patterns",
    "physics",
    "prune",
    "qspmm",
    "qspmm_t",
    "random",
    "refit",
    "regrow",
    "restore",
    "restore_patterns",
    "save_mlx_lm",
    "save_npz",
    "save_safetensors",
    "save_trainable",
    "sddmm",
    "sensitivity",
    "shard_block_sparse",
    "shard_boundaries",
    "softmax",
    "sparsify",
    "spmm",
    "spmm_t",
    "summary",
    "to_scipy",
    "use_cpu",
    "use_device",
    "use_gpu",
    "verify",
    "vstack",
]

# Names of SciPy that mean something else here, or nothing.
_INSTEAD = {
    "block_array": "stack rows of blocks: vstack([hstack(row) for row in blocks])",
    "bmat": "stack rows of blocks: vstack([hstack(row) for row in blocks])",
    "coo_matrix": "it is called coo_array",
    "csc_array": "csr_array((data, indices, indptr), (n, m)).T has these columns",
    "csr_matrix": "it is called csr_array",
    "diags_array": "it is called diags",
    "dia_array": "diags makes a csr of diagonals",
    "eye_array": "it is called eye",
    "find": "A.nonzero() has the places, A[A.nonzero()] the values",
    "identity": "it is called eye",
    "rand": "it is called random",
    "random_array": "it is called random, and takes m, n and density",
    "spdiags": "it is called diags, and takes offsets and shape",
    "tril": "it is a method, A.tril(k)",
    "triu": "it is a method, A.triu(k)",
}


def __getattr__(name: str) -> object:
    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")
