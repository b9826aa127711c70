"""Runs the CUDA kernels on a CPU: a stand-in for ``mx.fast.cuda_kernel`` that runs their source.

See ``cuda.h`` for what is modelled, and README.md for what is not.
"""

from .emulator import CudaFault, emulated, in_full

__all__ = ["CudaFault", "emulated", "in_full"]
