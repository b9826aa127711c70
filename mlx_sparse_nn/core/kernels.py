"""Launches of the Metal kernels: the only user of ``mx.fast``.

The functions have the names, arguments and results of those in ``reference``. Which kernel runs,
and with what tile, follows from shapes and from the plan of the layout, on the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core.layout import Half, Layout, buckets

_SOURCES = Path(__file__).parents[1] / "metal"
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_TILED = (8, 16, 32, 64, 128)  # block sizes with kernels of their own; the others go by scalars
_FEW = 8  # rows of x up to which a product is bound by reading the stored values
_GROUP = 256  # threads of a threadgroup, where the kernel leaves it open
_INPUTS = {
    "spmm": ("data", "indptr", "indices", "perm", "x", "bias"),
    "sddmm": ("y", "x", "indptr", "indices", "step"),
    "sum": ("partial",),
}


def backend() -> str:
    """Return what computes the products on MLX's default device: ``"metal"`` or ``"reference"``."""
    on_gpu = mx.default_device().type == mx.gpu
    return "metal" if on_gpu and mx.metal.is_available() else "reference"


def takes(*operands: mx.array) -> bool:
    """Return whether there are kernels for the operands.

    There are for float32, float16 and bfloat16, every block size and every shape with at least one
    element. All else goes to the reference; so does what a function under ``mx.vmap`` computes
    while it is traced, since MLX cannot map a kernel. The products' own rule for ``vmap`` then
    computes the mapped ones, by kernels.
    """
    return not _tracing.vmaps and all(a.dtype in _DTYPES and a.size for a in operands)


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``reference.spmm``."""
    return _product(data, layout.rows, x, layout.shape[0], bias, transposed=False)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``reference.spmm_t``."""
    return _product(data, layout.cols, y, layout.shape[1], None, transposed=True)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``reference.sddmm``."""
    (n_batch, n, _), block, half = x.shape, layout.block_size, layout.rows
    n_blocks = half["indices"].size
    shape = (n_batch, *layout.data_shape)
    if block in _TILED:
        side = min(block, 64)
        width = n_blocks * (block // side) ** 2
        threads = 32 if side == 8 else 128
        name, template = "sddmm_tiles", {"B": block, "SIDE": side}
    else:
        lanes = min(32, _lanes(half, block))
        width = -(-layout.shape[0] * lanes // _GROUP)
        threads = _GROUP
        name, template = "sddmm_csr", {"B": block, "LANES": lanes}
    # Few groups and many rows: split the rows, so that the whole GPU has work, and sum in order.
    splits = max(1, min(256 // (width * n_batch), n // 256))
    step = -(-n // splits)
    splits = -(-n // step)
    out_dtype = x.dtype if splits == 1 else mx.float32
    out = _launch(
        name,
        "sddmm",
        [y, x, half["indptr"], half["indices"], mx.array([step], dtype=mx.int32)],
        {"T": x.dtype, "OUT": out_dtype, **template},
        (splits, *shape),
        out_dtype,
        (width * threads, splits, n_batch),
        threads,
    )
    if splits == 1:
        return out.reshape(shape)
    size = out.size // splits
    partial = out.reshape(splits, size)
    grid = (size, 1, 1)
    return _launch("sum_splits", "sum", [partial], {"T": x.dtype}, shape, x.dtype, grid, _GROUP)


def _product(
    data: mx.array, half: Half, x: mx.array, n_out: int, bias: mx.array | None, transposed: bool
) -> mx.array:
    (n_batch, n, _), block = x.shape, 1 if data.ndim == 2 else data.shape[-1]
    template = {
        "T": x.dtype,
        "B": block,
        "TRANSPOSED": int(transposed),
        "BIAS": int(bias is not None),
    }
    if block not in _TILED:
        rows = 1 if n == 1 else 4
        lanes = _lanes(half, block)
        name, threads = "spmm_csr", _GROUP
        template |= {"ROWS": rows, "LANES": lanes}
        groups = -(-n_out * lanes // _GROUP)
    elif n <= _FEW:
        rows = 1 << (n - 1).bit_length()
        simdgroups = _simdgroups(half)
        name, threads = "spmm_few", 32 * simdgroups
        template |= {"ROWS": rows, "GROUPS": simdgroups}
        groups = n_out // min(block, 16)
    else:
        rows = 16 if n <= 16 else 32 if n <= 32 or block == 128 else 64
        name, threads = "spmm_tiles", 64 if block == 8 else 128
        template |= {"ROWS": rows}
        groups = n_out // block
    perm = half["perm"] if transposed else half["indices"]
    return _launch(
        name,
        "spmm",
        [data, half["indptr"], half["indices"], perm, x, x if bias is None else bias],
        template,
        (n_batch, n, n_out),
        x.dtype,
        (groups * threads, -(-n // rows), n_batch),
        threads,
    )


def _simdgroups(half: Half) -> int:
    """Simdgroups that share a block-row: one for every four blocks of the longest, 8 at most."""
    longest = max(width for _, width, _ in buckets(half))
    return min(8, _power_of_two(-(-longest // 4)))


def _lanes(half: Half, block: int) -> int:
    """Threads that share a scalar row: one for every two values of the mean row, 32 at most.

    Where the longest row would keep one simdgroup at work for more than 64 rounds, a whole
    threadgroup takes each row.
    """
    n_rows = half["indptr"].size - 1
    mean = half["indices"].size * block / n_rows
    longest = max(width for _, width, _ in buckets(half)) * block
    lanes = min(32, _power_of_two(int(mean) // 2))
    return _GROUP if longest > 64 * 32 else lanes


def _power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value`` and 1."""
    return 1 << max(0, value - 1).bit_length()


def _launch(
    name: str,
    inputs: str,
    arrays: list[mx.array],
    template: dict[str, Any],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    grid: tuple[int, int, int],
    threads: int,
) -> mx.array:
    (out,) = _kernel(name, inputs)(
        inputs=arrays,
        template=list(template.items()),
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=grid,
        threadgroup=(threads, 1, 1),
    )
    return out


@cache
def _kernel(name: str, inputs: str) -> Any:
    """Return the kernel of ``metal/<name>.metal``, built when it is first launched."""
    return mx.fast.metal_kernel(
        name=f"mlx_sparse_nn_{name}",
        input_names=list(_INPUTS[inputs]),
        output_names=["y" if inputs == "spmm" else "out"],
        source=(_SOURCES / f"{name}.metal").read_text(encoding="utf-8"),
        header=(_SOURCES / "common.h").read_text(encoding="utf-8"),
    )


class _Tracing(threading.local):
    vmaps = 0  # calls of mx.vmap that are tracing their function in this thread


_tracing = _Tracing()


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
