"""What the tests share: exact data, one tolerance, and Hypothesis strategies for patterns."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_sparse_nn import CSRPattern, sddmm, spmm, spmm_t
from mlx_sparse_nn.core.backends import (
    choose,
    cuda,
    cuda_dense,
    cuda_gradients,
    cuda_graphs,
    cuda_odd,
    cuda_quantized,
    cuda_small,
    few_rows,
    launch,
    naive,
    pauli_launch,
    plain,
    scalars,
)
from mlx_sparse_nn.core.transforms import tracing
from mlx_sparse_nn.diagnostics.rounding import to_numpy, tolerance

ROOT = Path(__file__).parents[1]  # of the repository
TINY_LLM = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}  # of models of mlx-lm


def own_folder(name: str) -> str:
    """Return the ``TMPDIR`` of one of the processes that run at once.

    MLX writes there what it compiles for the CPU, and loads what it finds there, be it half written
    by another process.
    """
    folder = Path(tempfile.gettempdir(), f"mlx_sparse_nn-{getpass.getuser()}", name)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def untyped(value: Any) -> Any:
    """Return ``value`` without its type, where a test does on purpose what pyright refuses."""
    return value


def flatten(tree: Any) -> list[tuple[str, mx.array]]:
    """Return the arrays of a tree by path, as ``tree_flatten`` does.

    Its own type says a dict as well, which it returns only where it is given one.
    """
    return tree_flatten(tree)  # pyright: ignore[reportReturnType]


def device_of(dtype: mx.Dtype) -> AbstractContextManager:
    """Return the context in which a dtype can be computed: MLX has float64 on the CPU only."""
    return mx.stream(mx.cpu) if dtype == mx.float64 else nullcontext()


def backend(op: str, block_size: int = 8, n_x: int = 1, bits: int = 0) -> ModuleType:
    """Return the module that computes a product of float32 blocks here, to spoil it."""
    pattern = CSRPattern([0, 1], [0], (block_size, block_size), block_size)
    return choose.choose(op, pattern.layout, n_x, mx.float32, bits=bits)


@contextmanager
def computing(*backends: ModuleType, devices: tuple[str, str] = ("CPU", "GPU")) -> Iterator[None]:
    """Let these backends compute, the first that takes a product, as if their device were there."""
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(mock.patch.object(choose, device, backends))
        for backend in backends:
            stack.enter_context(mock.patch.object(backend, "is_available", return_value=True))
        yield


@contextmanager
def computing_by_kernels() -> Iterator[list[str]]:
    """Let plain MLX compute as kernels of a GPU do: MLX raises where it has to map one.

    Gives the names of the products that they compute.
    """
    kernels: Any = ModuleType("kernels")
    kernels.TAKES_EDGES = kernels.TAKES_AXES = False
    kernels.is_available = lambda: True
    kernels.takes = lambda *_: not tracing.refuses_kernels
    computed = []

    def refuse(*_: Any) -> Any:
        raise ValueError("[Primitive::vmap] Not implemented for CustomKernel.")

    def product(name: str, *operands: Any) -> mx.array:
        computed.append(name)
        launched: Any = mx.custom_function(lambda out: out)
        launched.vmap(refuse)
        return launched(getattr(plain, name)(*operands))

    for name in ("spmm", "spmm_t", "sddmm"):
        setattr(kernels, name, partial(product, name))
    with computing(kernels, plain):
        yield computed


@contextmanager
def apple_gpu(architecture: str = "applegpu_g17s", macos: str = "26.2") -> Iterator[None]:
    """Let MLX and Python say that this is such a GPU: by default an M5 that has tensor units."""
    info = {"architecture": architecture, "device_name": "Apple"}
    with (
        mock.patch.object(mx, "device_info", return_value=info),
        mock.patch("platform.mac_ver", return_value=(macos, ("", "", ""), "arm64")),
    ):
        yield


@contextmanager
def fresh_launches() -> Iterator[None]:
    """Forget the kernels and launches that are kept, before and after."""
    caches = (
        launch._function,
        launch._prepared_sum,
        cuda._prepared,
        cuda_dense._expansion,
        cuda_dense._sampling,
        cuda_gradients._tile,
        cuda_odd._prepared,
        cuda_graphs._streaming,
        cuda_graphs._launches,
        cuda_graphs._sampling,
        cuda_quantized._of_blocks,
        cuda_quantized._of_packed,
        cuda_small._launch,
        few_rows._launches,
        pauli_launch._prepared,
        scalars._launches,
    )
    for kept in caches:
        kept.cache_clear()
    yield
    for kept in caches:
        kept.cache_clear()


def computing_strings(*backends: ModuleType) -> AbstractContextManager[None]:
    """Let these backends compute with Pauli strings, as :func:`computing` does."""
    return computing(*backends, devices=("PAULI_CPU", "PAULI_GPU"))


def assert_close(
    actual: mx.array, expected: np.ndarray, length: int, magnitude: np.ndarray | float
) -> None:
    """Assert that ``actual`` has the shape of ``expected`` and lies within :func:`tolerance`."""
    assert tuple(actual.shape) == np.shape(expected)
    error = np.abs(to_numpy(actual) - expected)
    allowed = tolerance(actual.dtype, length, magnitude)
    assert np.all(error <= allowed), f"error {np.max(error - allowed)} above tolerance"


def assert_equal(actual: mx.array, expected: mx.array) -> None:
    """Assert equality bit for bit, dtype and shape included."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert mx.array_equal(actual, expected, equal_nan=True).item()


def check_products(
    pattern: CSRPattern, data: mx.array, x: mx.array, y: mx.array, bias: mx.array
) -> None:
    """Assert that the products of whole numbers are the oracle's, bit for bit."""
    assert_equal(spmm(data, pattern, x, bias), naive.spmm(data, pattern, x, bias))
    assert_equal(spmm(data, pattern, x), naive.spmm(data, pattern, x))
    assert_equal(spmm_t(data, pattern, y), naive.spmm_t(data, pattern, y))
    assert_equal(sddmm(pattern, y, x), naive.sddmm(pattern, y, x))


def integers(shape: tuple[int, ...], seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return small whole numbers: sums of their products are exact, so tests ask for equality."""
    if 0 in shape:
        return mx.zeros(shape, dtype)  # MLX may hang in sums of empty arrays that NumPy made
    values = np.random.default_rng(seed).integers(-3, 4, size=shape).astype(np.float32)
    if dtype == mx.complex64:
        imaginary = np.random.default_rng(seed + 1).integers(-3, 4, size=shape)
        return mx.array((values + 1j * imaginary).astype(np.complex64))
    return mx.array(values).astype(dtype)


def pattern_of(
    rows: Iterable[Sequence[int] | np.ndarray], n_cols: int, block_size: int
) -> CSRPattern:
    """Return the pattern of ``n_cols`` block-columns whose block-rows have blocks in these."""
    columns = [np.asarray(row, dtype=np.int32) for row in rows]
    indptr = np.cumsum([0, *(row.size for row in columns)])
    indices = np.concatenate([np.zeros(0, np.int32), *columns])
    shape = (len(columns) * block_size, n_cols * block_size)
    return CSRPattern(indptr, indices, shape, block_size)


def random_pattern(
    n_rows: int, n_cols: int, block_size: int, density: float = 0.4, seed: int = 0
) -> CSRPattern:
    """Return a pattern of ``n_rows x n_cols`` blocks with uneven, possibly empty rows."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n_rows, n_cols)) < density * rng.random((n_rows, 1)) * 2
    return pattern_of(map(np.flatnonzero, mask), n_cols, block_size)


def dense_of(pattern: CSRPattern, data: mx.array) -> mx.array:
    """Return the dense matrix by a NumPy loop over the stored blocks: the slow, obvious way."""
    block, (n_rows, n_cols) = pattern.block_size, pattern.shape
    dense = np.zeros([size * block for size in pattern.grid], dtype=to_numpy(data).dtype)
    blocks = to_numpy(data).reshape(-1, block, block)
    for j, (row, col) in enumerate(zip(pattern.row_indices, pattern.indices, strict=True)):
        dense[row * block : (row + 1) * block, col * block : (col + 1) * block] += blocks[j]
    dense = dense[:n_rows, :n_cols]
    return mx.array(dense.astype(np.complex64 if data.dtype == mx.complex64 else np.float32))


def dense_weight(pattern: CSRPattern, data: mx.array) -> mx.array:
    """Return the dense matrix as a differentiable MLX expression: data times one-hot selectors."""
    block, (n_block_rows, n_block_cols) = pattern.block_size, pattern.grid
    rows = mx.array(np.eye(n_block_rows)[pattern.row_indices].astype(np.float32))
    cols = mx.array(np.eye(n_block_cols)[pattern.indices].astype(np.float32))
    inside = mx.where(mx.array(outside(pattern)), mx.zeros((), data.dtype), data)
    blocks = inside.reshape(pattern.n_blocks, block * block)
    places = (rows[:, :, None] * cols[:, None, :]).reshape(pattern.n_blocks, -1)
    dense = (places.astype(data.dtype).T @ blocks).reshape(n_block_rows, n_block_cols, block, block)
    dense = dense.swapaxes(1, 2).reshape(n_block_rows * block, n_block_cols * block)
    return dense[: pattern.shape[0], : pattern.shape[1]]


def outside(pattern: CSRPattern) -> np.ndarray:
    """Return which stored values lie outside the matrix, bool of ``pattern.data_shape``."""
    block = pattern.block_size
    row, col = (
        stored[:, None] * block + np.arange(block)
        for stored in (pattern.row_indices, pattern.indices)
    )
    beyond = (row >= pattern.shape[0])[:, :, None] | (col >= pattern.shape[1])[:, None, :]
    return beyond.reshape(pattern.data_shape)


def spoiled(pattern: CSRPattern, data: mx.array) -> mx.array:
    """Return ``data`` with nans where it lies outside the matrix: nobody may read them."""
    return mx.where(mx.array(outside(pattern)), mx.array(np.nan, data.dtype), data)


def trimmed(pattern: CSRPattern, below: int, behind: int) -> CSRPattern:
    """Return a pattern of so many fewer rows and columns, whose last blocks reach past it."""
    (n_rows, n_cols), block = pattern.shape, pattern.block_size
    shape = (max(0, n_rows - below % block), max(0, n_cols - behind % block))
    return CSRPattern(pattern.indptr, pattern.indices, shape, block)


@st.composite
def patterns(
    draw: st.DrawFn,
    block_sizes: tuple[int, ...] = (1, 2, 4, 8),
    fewest: int = 0,
    whole: bool = False,
) -> CSRPattern:
    """Draw any valid pattern: unsorted and repeated columns, empty rows, 0 rows or columns, last
    blocks that reach past the matrix.

    ``fewest`` is the smallest number of block-rows and of block-columns: a layer has 1. With
    ``whole``, no block reaches past the matrix.
    """
    block = draw(st.sampled_from(block_sizes))
    n_rows, n_cols = draw(st.integers(fewest, 6)), draw(st.integers(fewest, 6))
    column = st.integers(0, max(0, n_cols - 1))
    row = st.lists(column, max_size=9 if n_cols else 0)
    rows = draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    past = st.just(0) if whole else st.integers(0, block - 1)
    return trimmed(pattern_of(rows, n_cols, block), draw(past), draw(past))
