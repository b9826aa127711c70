"""``mlx.nn.Linear`` with OpenBLAS in place of the BLAS of MLX's Linux wheel."""

from benchmarks.peers.linear import PACKAGES, RUNTIME, describe, prepare

__all__ = ["PACKAGES", "RUNTIME", "describe", "prepare"]
