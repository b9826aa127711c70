"""The products as Metal kernels; names, arguments and results as in ``plain``."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import few_rows, launch, metal_tiles, scalars
from mlx_sparse_nn.core.backends.launch import launch_sddmm, launch_spmm, prepare
from mlx_sparse_nn.core.layout import Layout, Side
from mlx_sparse_nn.core.quantized import bits_of

NAME = "metal"
TAKES_EDGES = False  # sizes are those of whole blocks: derivatives.py pads and crops
TAKES_AXES = True  # of size 1 before a single row of x
_tensor_units = False  # whether products may use them: off until a run on an M5 is recorded


def is_available() -> bool:
    """Return whether MLX has a Metal GPU."""
    return mx.metal.is_available()


def has_tensor_units() -> bool:
    """Return whether this GPU has tensor units that MLX's own products would use.

    They are those of the M5 and later, and of phones one generation on, from macOS 26.2.
    """
    if not is_available():
        return False
    found = re.fullmatch(r".*?(\d+)([a-z])", str(mx.device_info()["architecture"]))
    if found is None:
        return False
    generation, kind = found.groups()
    major, minor = [int(part) for part in f"{platform.mac_ver()[0] or 0}.0".split(".")[:2]]
    major = 26 if major == 16 else major  # what Python is told that was built before macOS 26
    return int(generation) >= (18 if kind == "p" else 17) and (major, minor) >= (26, 2)


def tensor_units() -> AbstractContextManager[None]:
    """Return a context in which products of many rows use the tensor units, in this process alone.

    Each product chooses anew, but what ``mx.compile`` has traced keeps the kernel that it chose.

    Raises:
        RuntimeError: If this machine has none.
    """
    if not has_tensor_units():
        raise RuntimeError(
            "[tensor_units] this machine must have a GPU of the M5 or later, and macOS 26.2 or "
            f"later, got {mx.device_info()['architecture']} and macOS "
            f"{platform.mac_ver()[0] or 'none'}; leave the tensor units off"
        )
    return _using_tensor_units()


@contextmanager
def _using_tensor_units() -> Iterator[None]:
    global _tensor_units
    before, _tensor_units = _tensor_units, True
    try:
        yield
    finally:
        _tensor_units = before


def takes(op: str, layout: Layout, n_x: int, dtype: mx.Dtype, n_matrices: int, bits: int) -> bool:
    """Return whether there is a kernel for a product.

    There is for all that kernels can do, but blocks of a matrix so wide that the places of a tile
    of x would not fit 32 bits.
    """
    if layout.block_size > 1 and max(layout.full_shape) >= tuned.METAL_MAX_COLUMNS:
        return False
    return launch.takes(layout, n_x, dtype, n_matrices)


def spmm(data: mx.array, layout: Layout, x: mx.array, bias: mx.array | None = None) -> mx.array:
    """Return y[v, n, r] = sum_c A_v[r, c] x[v, n, c] + bias[r]; see ``plain.spmm``."""
    return _product(data, layout.rows, x, layout.full_shape[0], layout.inside[1], bias)


def spmm_t(data: mx.array, layout: Layout, y: mx.array) -> mx.array:
    """Return x[v, n, c] = sum_r A_v[r, c] y[v, n, r]; see ``plain.spmm_t``."""
    return _product(data, layout.cols, y, layout.full_shape[1], layout.inside[0], None)


def sddmm(layout: Layout, y: mx.array, x: mx.array) -> mx.array:
    """Return data[v, j] = sum_n y[v, n, row(j)] x[v, n, col(j)]; see ``plain.sddmm``."""
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    if layout.block_size < 8:
        kernel = metal_tiles.sampled_scalars(layout, n_x, n_matrices)
    else:
        kernel = metal_tiles.sampled_tiles(layout, n_matrices, x.itemsize)
    # Few groups and many rows: split the rows, so that the whole GPU has work, and sum in order.
    groups = kernel.grid[0] // kernel.threads * n_matrices
    n_splits = max(1, min(tuned.METAL_GRADIENT_GROUPS // groups, n_x // tuned.METAL_ROWS_PER_SPLIT))
    by_columns = kernel.template.get("WIDTH", 1) > 1
    return launch_sddmm(NAME, kernel, layout, y, x, n_splits, by_columns)


def _product(
    data: mx.array, side: Side, x: mx.array, n_out: int, inside: int, bias: mx.array | None
) -> mx.array:
    """Launch the kernel of a product with a side of the matrix.

    Of the last block-column, as many columns as ``inside`` says lie in the matrix.
    """
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block_size = data.shape[-1] if data.ndim > 2 else 1
    # MLX passes fewer than 8 elements in constant memory, where scalars alone are loaded.
    if block_size < tuned.METAL_SMALLEST_TILED or x.size < 8:
        by_columns = n_x >= tuned.COLUMNS_OF_SCALARS
        return scalars.product(NAME, data, side, x, n_out, inside, bias, by_columns, block_size)
    if n_x <= tuned.METAL_FEW_ROWS:
        return few_rows.product(NAME, data, side, x, n_out, inside, bias)
    sizes = block_size, n_x, n_out, n_matrices
    if _tensor_units and _suits_tensor_units(block_size, n_x, x.dtype):
        kernel = metal_tiles.tensor_unit_tiles(*sizes)
    else:
        kernel = metal_tiles.product_tiles(*sizes, x.itemsize)
    options = {
        "T": x.dtype,
        "B": block_size,
        "INSIDE": inside,
        "TRANSPOSED": int(side.perm is not None),
        "BIAS": int(bias is not None),
    }
    launched = prepare(NAME, "spmm", kernel, x.dtype, **options)
    return launch_spmm(launched, data, side, x, n_out, bias)


def _suits_tensor_units(block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether the tensor units compute a product: of 16 bits, blocks and many rows of x."""
    suits = block_size % 16 == 0 and 16 <= block_size <= 128 and dtype.size == 2
    return suits and n_x >= tuned.METAL_TENSOR_ROWS


def qspmm(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    layout: Layout,
    x: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    """Return :func:`spmm` by quantized blocks; see ``plain.qspmm``."""
    matrix, n_out, inside = (packed, scales, biases), layout.full_shape[0], layout.inside[1]
    return _quantized_product(matrix, layout.rows, x, n_out, inside, bias)


def qspmm_t(
    packed: mx.array, scales: mx.array, biases: mx.array, layout: Layout, y: mx.array
) -> mx.array:
    """Return :func:`spmm_t` by quantized blocks; see ``plain.qspmm_t``."""
    matrix, n_out, inside = (packed, scales, biases), layout.full_shape[1], layout.inside[0]
    return _quantized_product(matrix, layout.cols, y, n_out, inside, None)


def _quantized_product(
    matrix: tuple[mx.array, mx.array, mx.array],
    side: Side,
    x: mx.array,
    n_out: int,
    inside: int,
    bias: mx.array | None,
) -> mx.array:
    """Launch the kernel of a quantized product with a side of the matrix, as ``_product`` does."""
    packed, scales, _ = matrix
    n_x, n_matrices = x.shape[-2], x.shape[0] if x.ndim == 3 else 1
    block_size, group_size = packed.shape[-2], packed.shape[-2] // scales.shape[-1]
    sizes = block_size, group_size, x.dtype.size, n_x, n_out, n_matrices
    kernel = metal_tiles.quantized_product(side, *sizes)
    options = {
        "T": x.dtype,
        "BITS": bits_of(packed),
        "GROUP_SIZE": group_size,
        "B": block_size,
        "INSIDE": inside,
        "TRANSPOSED": int(side.perm is not None),
        "BIAS": int(bias is not None),
    }
    perm = side.indices if side.perm is None else side.perm
    arrays = [*matrix, side.indptr, side.indices, perm, x, x if bias is None else bias]
    return prepare(NAME, "qspmm", kernel, x.dtype, **options)(arrays, (*x.shape[:-1], n_out))
