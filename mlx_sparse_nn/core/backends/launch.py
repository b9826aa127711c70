"""What the backends of kernels share: what they take, and how a kernel is built and launched.

This module is the only user of ``mx.fast``. ``metal`` and ``cuda`` choose the kernel and its tile,
from shapes and from the sizes of the layout, on the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core.layout import Half, Layout, buckets
from mlx_sparse_nn.core.transforms import vmapping

_PACKAGE = Path(__file__).parents[2]
_INCLUDE = re.compile(r'#include "(.+)"\n')  # a body names the headers that it needs
DTYPES = (mx.bfloat16, mx.float32, mx.float16)  # what comes first is found first
TILED = (8, 16, 32, 64, 128)  # block sizes with kernels of their own; the others go by scalars
# MLX writes a kernel's signature: the word that it begins with brings the number of threads, by
# which the compiler shares out registers.
_BOUND = """#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({bounds})
"""
_HALF = 113 * 1024  # bytes of shared memory: of a thread block with more, an SM has one at a time
GROUP = 256  # threads of a group, where the kernel leaves it open
INPUTS = {
    "spmm": ("data", "indptr", "indices", "perm", "x", "bias"),
    "sddmm": ("y", "x", "indptr", "indices", "step"),
    "sum": ("partial",),
}


def takes(layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int) -> bool:
    """Return whether kernels can compute a product with ``n_x`` rows of x, of operands of a dtype.

    They can for float32, float16 and bfloat16, every block size, and every shape and pattern with
    at least one element, where ``mx.vmap`` is not tracing.
    """
    if dtype not in DTYPES or vmapping():
        return False
    return layout.data_shape[0] * n_x * n_matrices > 0


def longest_row(half: Half) -> int:
    """Return the number of blocks in the longest block-row, or a little more."""
    return max(width for _, width, _ in buckets(half))


def lanes_per_row(half: Half, block: int) -> int:
    """Threads that share a scalar row: one for every two values of the mean row, 32 at most.

    Where the longest row would keep one simdgroup at work for more than 64 rounds, a whole
    threadgroup takes each row.
    """
    n_rows = half["indptr"].size - 1
    mean = half["indices"].size * block / n_rows
    longest = longest_row(half) * block
    lanes = min(32, power_of_two(int(mean) // 2))
    return GROUP if longest > 64 * 32 else lanes


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value`` and 1."""
    return 1 << max(0, value - 1).bit_length()


class Launch(NamedTuple):
    """A kernel and all that it is launched with, as ``mx.fast`` takes it, but the arrays."""

    kernel: Callable[..., list[mx.array]]
    template: list[tuple[str, Any]]
    dtypes: list[mx.Dtype]
    grid: tuple[int, int, int]
    group: tuple[int, int, int]

    def __call__(self, arrays: list[mx.array], shape: tuple[int, ...]) -> mx.array:
        kernel, template, dtypes, grid, group = self
        (out,) = kernel(
            inputs=arrays,
            template=template,
            output_shapes=[shape],
            output_dtypes=dtypes,
            grid=grid,
            threadgroup=group,
        )
        return out


def prepare(
    backend: str,
    name: str,
    inputs: str,
    template: dict[str, Any],
    dtype: mx.Dtype,
    grid: tuple[int, int, int],
    threads: int,
    shared_memory: int = 0,
) -> Launch:
    """Return the kernel ``<backend>/<name>``, to be launched; ``grid`` counts threads."""
    kernel = _kernel(backend, name, inputs, threads, shared_memory)
    return Launch(kernel, list(template.items()), [dtype], grid, (threads, 1, 1))


def launch_spmm(
    prepared: Launch,
    data: mx.array,
    half: Half,
    x: mx.array,
    n_out: int,
    bias: mx.array | None,
    transposed: bool,
) -> mx.array:
    """Launch a kernel of ``spmm`` or ``spmm_t``; inputs that it does not read are stand-ins."""
    indices = half["indices"]
    perm = half["perm"] if transposed else indices
    arrays = [data, half["indptr"], indices, perm, x, x if bias is None else bias]
    return prepared(arrays, (*x.shape[:-1], n_out))


def launch_sddmm(
    backend: str,
    name: str,
    template: dict[str, Any],
    y: mx.array,
    x: mx.array,
    layout: Layout,
    n_threads: int,
    threads: int,
    splits: int,
    shared_memory: int = 0,
) -> mx.array:
    """Launch a kernel of ``sddmm`` over about ``splits`` parts of the rows, summed in order."""
    n, n_batch = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    half = layout.rows
    step = -(-n // splits)
    splits = -(-n // step)
    shape = (*x.shape[:-2], *layout.data_shape)
    dtype = x.dtype if splits == 1 else mx.float32
    arrays = [y, x, half["indptr"], half["indices"], mx.array([step], dtype=mx.int32)]
    template = {"T": x.dtype, "OUT": dtype, **template}
    grid = (n_threads, splits, n_batch)
    product = prepare(backend, name, "sddmm", template, dtype, grid, threads, shared_memory)
    out = product(arrays, (splits, *shape))
    if splits == 1:
        return out.reshape(shape)
    partial = out.reshape(splits, -1)
    grid = (-(-partial.shape[1] // GROUP) * GROUP, 1, 1)
    summed = prepare(backend, "sum_splits", "sum", {"T": x.dtype}, x.dtype, grid, GROUP)
    return summed([partial], shape)


@cache
def _kernel(backend: str, name: str, inputs: str, threads: int, shared_memory: int) -> Any:
    """Return the kernel of ``<backend>/<name>``, built when it is first launched."""
    folder = _PACKAGE / backend
    suffix = "metal" if backend == "metal" else "cu"
    source = (folder / f"{name}.{suffix}").read_text(encoding="utf-8")
    headers = [(folder / file).read_text(encoding="utf-8") for file in _INCLUDE.findall(source)]
    options: dict[str, Any] = {
        "name": f"mlx_sparse_nn_{name}",
        "input_names": list(INPUTS[inputs]),
        "output_names": ["y" if inputs == "spmm" else "out"],
        "header": _short("".join(headers)),
        "source": _short(_INCLUDE.sub("", source)),
    }
    if backend == "metal":
        return mx.fast.metal_kernel(**options)
    bounds = f"{threads}, 1" if shared_memory > _HALF else threads
    options["header"] += _BOUND.format(bounds=bounds)
    return mx.fast.cuda_kernel(shared_memory=shared_memory, **options)


def _short(code: str) -> str:
    """Return code without comments and indentation: MLX copies and hashes it at every launch."""
    lines = (line.strip() for line in re.sub(r"//.*", "", code).splitlines())
    return "".join(f"{line}\n" for line in lines if line)
