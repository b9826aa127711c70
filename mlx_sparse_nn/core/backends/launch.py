"""What the backends of kernels share: what they take, and how a kernel is built and launched.

This module is the only user of ``mx.fast``. ``metal`` and ``cuda`` choose the kernel and its tile,
from shapes and from the sizes of the layout, on the host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.layout import Layout, Side
from mlx_sparse_nn.core.transforms import tracing

_PACKAGE = Path(__file__).parents[2]
_INCLUDE = re.compile(r'#include "(.+)"\n')  # a body names the headers that it needs
# MLX writes a kernel's signature: the word that it begins with brings the number of threads, by
# which the compiler shares out registers.
_BOUND = """#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({bounds})
"""
INPUTS = {
    "spmm": ("data", "indptr", "indices", "perm", "x", "bias"),
    "spmm_in_pieces": ("data", "indptr", "indices", "perm", "x", "bias", "partial"),
    "spmm_of_tiles": ("data", "indptr", "indices", "perm", "x", "bias", "partial", "tiles"),
    "qspmm": ("packed", "scales", "biases", "indptr", "indices", "perm", "x", "bias"),
    "dequantize": ("packed", "scales", "biases"),
    "sddmm": ("y", "x", "indptr", "indices", "step"),
    "sddmm_places": ("y", "x", "rows", "indices"),
    "sum": ("partial",),
    "resize": ("blocks",),
    "expand": ("data", "indptr", "indices", "sizes"),
    "sample": ("matrix", "indptr", "indices", "sizes"),
    "pauli": ("coefficients", "diagonal", "x", "terms"),
    "pauli_moments": ("u", "x", "terms"),
    "recur_dot": ("y", "w", "before", "squares"),
    "recur_rest": ("y", "w", "before", "squares", "dots"),
    "basis_overlaps": ("basis", "x", "z", "counts"),
    "basis_subtract": ("basis", "x", "z", "overlaps"),
    "basis_combine": ("basis", "factors", "counts"),
}
# Whose argument a launch is of, where its inputs' name does not say it.
_OWNERS = {
    "sum": "sddmm",
    "resize": "spmm",
    "dequantize": "qspmm",
    "expand": "spmm",
    "sample": "sddmm",
    "pauli": "pauli_product",
    "pauli_moments": "pauli_product",
    "recur_dot": "lanczos",
    "recur_rest": "lanczos",
    "basis_overlaps": "lanczos",
    "basis_subtract": "lanczos",
    "basis_combine": "lanczos",
}
SCRATCH = {"spmm_boxes": ["scratch"]}  # integers that a kernel writes for itself, by its name
# What a kernel gives besides its first output, all of one dtype.
MORE_OUTPUTS = {
    "recur_rest": ["x", "parts", "numbers"],
    "basis_subtract": ["last", "parts", "of_last"],
}
MAX_THREADS = 2**31 - tuned.GROUP_THREADS  # of a grid's side, which is an int, in whole groups
MAX_GROUPS = 2**16 - 1  # of CUDA, along a grid's second and third side


def takes(layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int) -> bool:
    """Return whether kernels can compute a product with ``n_x`` rows of x, of operands of a dtype.

    They can for float32, float16 and bfloat16, every block size, and every shape and pattern with
    at least one element, unless what MLX traces refuses kernels.
    """
    if dtype not in tuned.KERNEL_DTYPES or tracing.refuses_kernels:
        return False
    return layout.data_shape[0] * n_x * n_matrices > 0


def lanes_per_row(side: Side, block_size: int) -> int:
    """Threads that share a scalar row: one for every two values of the mean row, 32 at most.

    There are fewer where the grid of all rows would be too large.
    """
    mean = side.n_blocks * block_size / side.n_block_rows
    lanes = min(32, power_of_two(int(mean) // 2))
    while lanes > 1 and side.n_block_rows * block_size * lanes > MAX_THREADS:
        lanes //= 2
    return lanes


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value`` and 1."""
    return 1 << max(0, value - 1).bit_length()


class Kernel(NamedTuple):
    """A kernel that computes a product, and how it is launched."""

    name: str
    template: dict[str, Any]  # of what it takes but dtypes: tile constants
    grid: tuple[int, int, int]  # in threads
    threads: int  # of a thread block
    shared_memory: int = 0  # bytes of a thread block, where the kernel does not say it itself
    scratch: int = 0  # integers of SCRATCH
    splits: int = 0  # parts whose sums are added up by another kernel, of one that takes any


class KernelLaunch(NamedTuple):
    """A kernel and all that ``mx.fast`` takes with it, but the arrays."""

    function: Callable[..., list[mx.array]]
    template: list[tuple[str, Any]]
    dtypes: list[mx.Dtype]
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    name: str  # "metal/spmm_few"
    scratch: tuple[tuple[int], ...] = ()  # its shape, where there is one
    splits: int = 1  # of partial sums, where there are several

    def __call__(self, arrays: list[mx.array], shape: tuple[int, ...]) -> mx.array:
        return self.outputs(arrays, [shape])[0]

    def outputs(self, arrays: list[mx.array], shapes: list[tuple[int, ...]]) -> list[mx.array]:
        """Launch a kernel that has as many outputs as there are shapes, besides ``scratch``."""
        function, template, dtypes, grid, group, _, scratch, _ = self
        return function(
            inputs=arrays,
            template=template,
            output_shapes=[*shapes, *scratch],
            output_dtypes=dtypes,
            grid=grid,
            threadgroup=group,
        )


class Launches(NamedTuple):
    """The launches of one product: that of the rows, and before it that of pieces, or None."""

    of_rows: KernelLaunch
    of_pieces: KernelLaunch | None
    partial_shape: tuple[int, ...]


def prepare(
    backend: str, inputs: str, kernel: Kernel, dtype: mx.Dtype, **types: mx.Dtype | int
) -> KernelLaunch:
    """Return a kernel of ``<backend>/``, to be launched.

    Args:
        backend: The folder of its source.
        inputs: Which ``INPUTS`` it takes.
        kernel: The kernel.
        dtype: Of its output.
        types: Further template arguments, dtypes first.

    Raises:
        ValueError: The grid is larger than a launch can be.
    """
    _check_grid(backend, inputs, kernel.grid)
    function = _function(backend, kernel.name, inputs, kernel.threads, kernel.shared_memory)
    if kernel.splits > 1:
        dtype = mx.float32
    if kernel.splits:
        types = {"T": types.pop("T"), "OUT": dtype} | types
    template = list((types | kernel.template).items())
    group, name = (kernel.threads, 1, 1), f"{backend}/{kernel.name}"
    launched = KernelLaunch(
        function, template, [dtype], kernel.grid, group, name, splits=max(1, kernel.splits)
    )
    more = len(MORE_OUTPUTS.get(kernel.name, ()))
    if more:
        return launched._replace(dtypes=[dtype] * (1 + more))
    if not kernel.scratch:
        return launched
    return launched._replace(dtypes=[dtype, mx.int32], scratch=((kernel.scratch,),))


@contextmanager
def observed(see: Callable[[KernelLaunch], None]) -> Iterator[None]:
    """Show ``see`` each kernel that is launched. Nobody else pays for it."""
    run = KernelLaunch.outputs

    def shown(
        self: KernelLaunch, arrays: list[mx.array], shapes: list[tuple[int, ...]]
    ) -> list[mx.array]:
        see(self)
        return run(self, arrays, shapes)

    KernelLaunch.outputs = shown
    try:
        yield
    finally:
        KernelLaunch.outputs = run


def _check_grid(backend: str, inputs: str, grid: tuple[int, int, int]) -> None:
    """Refuse a grid that does not fit: MLX says nothing of it, or that a type is wrong."""
    others = MAX_THREADS if backend == "metal" else MAX_GROUPS
    if grid[0] <= MAX_THREADS and max(grid[1:]) <= others:
        return
    owner = _OWNERS.get(inputs, inputs.split("_")[0])
    raise ValueError(
        f"[{owner}] a launch must have at most {MAX_THREADS} x {others} x {others} threads, got "
        f"{' x '.join(map(str, grid))}; multiply by fewer rows of x or of the matrix at a time"
    )


def launch_spmm(
    launch: KernelLaunch,
    data: mx.array,
    side: Side,
    x: mx.array,
    n_out: int,
    bias: mx.array | None,
) -> mx.array:
    """Launch a kernel of ``spmm`` or ``spmm_t``; inputs that it does not read are stand-ins."""
    perm = side.indices if side.perm is None else side.perm
    arrays = [data, side.indptr, side.indices, perm, x, x if bias is None else bias]
    shape = (*x.shape[:-1], n_out)
    if launch.splits == 1:
        return launch(arrays, shape)
    partial = launch(arrays, (launch.splits, prod(shape)))
    return sum_splits(launch.name.split("/")[0], partial, x.dtype, shape)


def launch_in_pieces(
    launches: Launches,
    data: mx.array,
    side: Side,
    x: mx.array,
    bias: mx.array | None,
    shape: tuple[int, ...],
) -> mx.array:
    """Launch kernels of ``spmm`` or ``spmm_t``, of which the first, if any, sums long rows."""
    unread = side.indptr
    perm = unread if side.perm is None else side.perm
    arrays = [data, side.indptr, side.indices, perm, x, unread if bias is None else bias, unread]
    if launches.of_pieces is not None:
        arrays[-1] = launches.of_pieces(arrays, (*x.shape[:-2], *launches.partial_shape))
    return launches.of_rows(arrays, shape)


def launch_sddmm(
    backend: str,
    kernel: Kernel,
    layout: Layout,
    y: mx.array,
    x: mx.array,
    n_splits: int,
    by_columns: bool = False,
) -> mx.array:
    """Launch a kernel of ``sddmm`` over about ``n_splits`` parts of the rows, summed in order.

    Args:
        backend: The folder of its source.
        kernel: The kernel; its grid's second size is set here.
        layout: Layout of the pattern.
        y: ``(N, n_rows)`` or ``(V, N, n_rows)``.
        x: ``(N, n_cols)`` or ``(V, N, n_cols)``.
        n_splits: Parts that the N rows are cut into.
        by_columns: Whether the kernel reads y and x transposed.
    """
    n_x, side, dtype = x.shape[-2], layout.rows, x.dtype
    rows_per_split = -(-n_x // n_splits)
    n_splits = -(-n_x // rows_per_split)
    shape = (*x.shape[:-2], *layout.data_shape)
    out_dtype = dtype if n_splits == 1 else mx.float32
    kernel = kernel._replace(grid=(kernel.grid[0], n_splits, kernel.grid[2]))
    launch = prepare(backend, "sddmm", kernel, out_dtype, T=dtype, OUT=out_dtype)
    if by_columns:
        y, x = y.swapaxes(-1, -2), x.swapaxes(-1, -2)
    arrays = [y, x, side.indptr, side.indices, small(rows_per_split)]
    out = launch(arrays, (n_splits, *shape))
    if n_splits == 1:
        return out.reshape(shape)
    return sum_splits(backend, out.reshape(n_splits, -1), dtype, shape)


def sum_splits(
    backend: str, partial: mx.array, dtype: mx.Dtype, shape: tuple[int, ...]
) -> mx.array:
    """Return the sum of float32 ``(splits, size)`` over the splits, as an array of a shape."""
    return _prepared_sum(backend, partial.shape[1], dtype)([partial], shape)


@lru_cache(4096)
def _prepared_sum(backend: str, size: int, dtype: mx.Dtype) -> KernelLaunch:
    threads = tuned.GROUP_THREADS
    kernel = Kernel("sum_splits", {}, (round_up(size, threads), 1, 1), threads)
    return prepare(backend, "sum", kernel, dtype, T=dtype)


@lru_cache(4096)
def small(value: int) -> mx.array:
    """Return a size for a kernel, kept. On CUDA, MLX (0.32.4) leaves arrays of up to 8 bytes on the
    host, from where a kernel reads them for 10 microseconds; a new one of more bytes has to move
    first, which takes 150."""
    return mx.array([value, 0, 0], dtype=mx.int32)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple that is at least ``value``."""
    return -(-value // multiple) * multiple


@cache
def _function(backend: str, name: str, inputs: str, threads: int, shared_memory: int) -> Any:
    """Return MLX's function of the kernel ``<backend>/<name>``, built when it is first launched."""
    options: dict[str, Any] = {
        "name": f"mlx_sparse_nn_{name}",
        "input_names": list(INPUTS[inputs]),
        "output_names": [
            "y" if "spmm" in inputs else "out",
            *SCRATCH.get(name, MORE_OUTPUTS.get(name, [])),
        ],
    }
    if backend == "metal":
        header, source = _texts(_PACKAGE / "metal" / f"{name}.metal")
        return mx.fast.metal_kernel(header=header, source=source, **options)
    alone = shared_memory > tuned.MAX_SHARED_OF_TWO or name in tuned.ALL_REGISTERS
    bounds = f"{threads}, 1" if alone else threads
    header, source = _by_path(_PACKAGE / "cuda" / f"{name}.cu", options["input_names"])
    header += _BOUND.format(bounds=bounds)
    return mx.fast.cuda_kernel(header=header, source=source, shared_memory=shared_memory, **options)


def _texts(path: Path) -> tuple[str, str]:
    """Return a kernel's headers and its body, short: MLX copies and hashes them at every launch."""
    body = path.read_text(encoding="utf-8")
    headers = [(path.parent / file).read_text(encoding="utf-8") for file in _INCLUDE.findall(body)]
    return _short("".join(headers)), _short(_INCLUDE.sub("", body))


def _by_path(path: Path, inputs: list[str]) -> tuple[str, str]:
    """Return lines that include a kernel's headers and its body: CUDA's compiler reads the files.

    MLX hashes its text at every launch, in a compiled graph too: 6 KB take 2 microseconds, 17 take
    4. It looks for names such as ``x_shape`` in the text, and keeps compiled kernels by it.
    """
    from hashlib import sha256  # takes a while to import

    texts = _texts(path)
    digest = sha256("".join(texts).encode()).hexdigest()[:16]
    sizes = rf"\b(?:{'|'.join(inputs)})_(?:shape|strides|ndim)\b"
    names = " ".join(sorted(set(re.findall(sizes, texts[1]))))
    files = _INCLUDE.findall(path.read_text(encoding="utf-8"))
    header = "".join(f'#include "{path.parent / file}"\n' for file in files)
    return header, f'// {digest} {names}\n#include "{path}"\n'


def _short(code: str) -> str:
    """Return code without comments and indentation."""
    lines = (line.strip() for line in re.sub(r"//.*", "", code).splitlines())
    return "".join(f"{line}\n" for line in lines if line)
