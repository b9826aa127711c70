"""What the backends of kernels share: which one runs, what it takes, and how it is launched.

This module is the only user of ``mx.fast``. ``metal`` and ``cuda`` choose the kernel and its tile,
from shapes and from the plan of the layout, on the host.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core.layout import Half, Layout, buckets

_PACKAGE = Path(__file__).parents[1]
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


def backend() -> str:
    """Return what computes products on MLX's default device: "metal", "cuda" or "reference"."""
    if mx.default_device().type is not mx.gpu:  # "!=" of these enums takes longer
        return "reference"
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else "reference"


def takes(layout: Layout, x: mx.array) -> bool:
    """Return whether there are kernels for a product with rows ``x``, all of the dtype of ``x``.

    There are for float32, float16 and bfloat16, every block size, and every shape and pattern with
    at least one element. All else goes to the reference; so does what a function under
    ``mx.vmap`` computes while it is traced, since MLX cannot map a kernel. The products' own rule
    for ``vmap`` then computes the mapped ones, by kernels.
    """
    return not _tracing.vmaps and layout.data_shape[0] > 0 and x.size > 0 and x.dtype in DTYPES


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
    name: str,
    inputs: str,
    template: dict[str, Any],
    dtype: mx.Dtype,
    grid: tuple[int, int, int],
    threads: int,
    shared_memory: int = 0,
) -> Launch:
    """Return the kernel ``name`` of the backend in use, to be launched; ``grid`` counts threads."""
    kernel = _kernel(backend(), name, inputs, threads, shared_memory)
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
    product = prepare(name, "sddmm", template, dtype, grid, threads, shared_memory)
    out = product(arrays, (splits, *shape))
    if splits == 1:
        return out.reshape(shape)
    partial = out.reshape(splits, -1)
    grid = (-(-partial.shape[1] // GROUP) * GROUP, 1, 1)
    return prepare("sum_splits", "sum", {"T": x.dtype}, x.dtype, grid, GROUP)([partial], shape)


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


class _Tracing(threading.local):
    def __init__(self):
        self.vmaps = 0  # calls of mx.vmap that are tracing their function in this thread
        # A probe of each thread's own: what MLX has compiled in a thread has to go before the
        # thread ends, since MLX would wait for Python where the interpreter may be shutting down.
        seen: list[mx.array] = []  # what the probe's Python was called with
        self.probe = mx.compile(seen.append), seen


_tracing = _Tracing()


def transforming() -> bool:
    """Return whether a transform of MLX is running in this thread: mx.grad, mx.compile, or alike.

    MLX does not say so. But it calls the Python of a compiled function again only for tracers, and
    an array kept from a trace is one as long as any transform is running. The first time in a
    thread or on a device it calls it anyway: hence twice. Where compilation is disabled the answer
    is always True.
    """
    probe, seen = _tracing.probe
    seen.clear()
    probe(_tracer())
    if seen:
        seen.clear()
        probe(_tracer())
    return bool(seen)


@cache
def _tracer() -> mx.array:
    """Return an array kept from a trace."""
    kept = []
    mx.vjp(lambda a: kept.append(-a) or a, [mx.array(0.0)], [mx.array(0.0)])
    return kept[0]


def _note_vmaps() -> None:
    """Make ``mx.vmap`` note when it traces.

    MLX maps every operation that a mapped function traces, those inside a ``custom_function``
    included, and raises at a kernel, although it then uses the custom rule alone.
    """
    mlx_vmap = mx.vmap

    @wraps(mlx_vmap)
    def vmap(fun: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
        def traced(*args):
            _tracing.vmaps += 1
            try:
                return fun(*args)
            finally:
                _tracing.vmaps -= 1

        return mlx_vmap(traced, in_axes, out_axes)

    mx.vmap = vmap


_note_vmaps()
