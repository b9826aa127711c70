"""The one rule: which backend computes a product."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx

from mlx_sparse_nn.core.backends import (
    columns,
    cpu,
    cuda,
    cuda_dense,
    dense,
    metal,
    pauli_cpu,
    pauli_cuda,
    pauli_metal,
    pauli_plain,
    plain,
)
from mlx_sparse_nn.core.layout import Layout
from mlx_sparse_nn.core.strings import PauliTerms
from mlx_sparse_nn.core.transforms import tracing

# By kind of device, the first one that is available and takes a product computes it.
GPU = (metal, cuda_dense, cuda, plain)
CPU = (cpu, plain)
# The same of sums of Pauli strings.
PAULI_GPU = (pauli_metal, pauli_cuda, pauli_plain)
PAULI_CPU = (pauli_cpu, pauli_plain)
# The same of vectors in panels and bases of them: there are kernels of GPUs alone.
COLUMNS_GPU = (metal, cuda)
COLUMNS_CPU = ()


def choose(
    op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int = 1, bits: int = 0
) -> ModuleType:
    """Return the backend that computes a product on MLX's default device.

    It is asked anew at each call, and depends on nothing but its arguments, that device, and
    what MLX is tracing: ``mx.vmap`` cannot map a launched kernel, the file of an exported function
    cannot hold those of a CPU, and a function of every shape can hold dense products alone.

    Args:
        op: ``"spmm"``, ``"spmm_t"``, ``"sddmm"``, ``"qspmm"`` or ``"qspmm_t"``.
        layout: Layout of the pattern.
        n_x: Rows of x, for each matrix.
        dtype: Of all operands.
        n_matrices: Matrices that share the pattern.
        bits: Of the integers of quantized blocks.
    """
    on_gpu = mx.default_device().type is mx.gpu  # "==" of these enums takes longer
    backends = GPU if on_gpu else CPU
    if tracing.graph is not None:
        if tracing.graph == "shapeless":
            return dense
        backends = [backend for backend in backends if backend is not cpu]
    for backend in backends:
        if backend.is_available() and backend.takes(op, layout, n_x, dtype, n_matrices, bits):
            return backend
    raise AssertionError("plain MLX takes every product")


def choose_pauli(op: str, terms: PauliTerms, n_states: int, dtype: mx.Dtype) -> ModuleType:
    """Return the backend that computes with Pauli strings on MLX's default device, by that rule.

    Args:
        op: ``"product"`` or ``"moments"``.
        terms: The strings.
        n_states: States, of all sums of strings.
        dtype: Of the states.

    Raises:
        ValueError: MLX is tracing for every shape: plain MLX splits and reshapes, which it then
            cannot.
    """
    backends = PAULI_GPU if mx.default_device().type is mx.gpu else PAULI_CPU
    if tracing.graph is not None:
        if tracing.graph == "shapeless":
            raise ValueError(
                "[H @ x] a product with Pauli strings must be traced for one shape of x, got "
                "shapeless=True; leave that out, and trace it again for another shape"
            )
        backends = [backend for backend in backends if backend is not pauli_cpu]
    for backend in backends:
        if backend.is_available() and backend.takes(op, terms, n_states, dtype):
            return backend
    raise AssertionError("plain MLX takes every product")


def choose_columns(size: int, dtype: mx.Dtype) -> str | None:
    """Return whose kernels compute with a basis of so many columns on MLX's default device, or None
    where it takes plain MLX.

    Args:
        size: Most columns.
        dtype: Of them.
    """
    if dtype != mx.float32 or size > columns.MOST_COLUMNS or tracing.refuses_kernels:
        return None
    backends = COLUMNS_GPU if mx.default_device().type is mx.gpu else COLUMNS_CPU
    return next((backend.NAME for backend in backends if backend.is_available()), None)


def takes_spgemm(dtype: mx.Dtype) -> bool:
    """Return whether C++ multiplies two sparse matrices of a dtype on MLX's default device.

    It has no kernel of a GPU, and a file or a function of every shape cannot hold it.
    """
    on_cpu = mx.default_device().type is not mx.gpu and tracing.graph is None
    return on_cpu and cpu.is_available() and cpu.takes_spgemm(dtype)
