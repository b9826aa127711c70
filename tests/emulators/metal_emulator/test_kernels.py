"""Whole kernels on the emulator: results against NumPy, counts against counts made by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse

from metal_emulator import Emulator, MetalFault

KERNELS = Path(__file__).parent / "kernels"
GEMM_TILE = 32


@pytest.fixture
def metal() -> Iterator[Emulator]:
    with Emulator(count=True) as emulator:
        yield emulator


def kernel(name: str, inputs: list[str], output: str, header: str = "", source: str = "") -> Any:
    """Builds a kernel from its file, as a package would."""
    source = source or (KERNELS / f"{name}.metal").read_text()
    return mx.fast.metal_kernel(
        name=name, input_names=inputs, output_names=[output], source=source, header=header
    )


def gemm(a: mx.array, b: mx.array, source: str = "") -> mx.array:
    m, n = a.shape[0], b.shape[1]
    header = (KERNELS / "helpers.metal").read_text()
    return kernel("gemm", ["a", "b"], "c", header, source)(
        inputs=[a, b],
        output_shapes=[(m, n)],
        output_dtypes=[a.dtype],
        grid=(n // GEMM_TILE * 128, -(-m // GEMM_TILE), 1),
        threadgroup=(128, 1, 1),
        template=[("T", a.dtype)],
    )[0]


def row_sum(x: mx.array) -> mx.array:
    return kernel("row_sum", ["x"], "y")(
        inputs=[x],
        output_shapes=[x.shape[:1]],
        output_dtypes=[mx.float32],
        grid=(32 * x.shape[0], 1, 1),
        threadgroup=(64, 1, 1),
        template=[("T", x.dtype)],
    )[0]


def spmv(matrix: Any, x: mx.array) -> mx.array:
    return kernel("spmv", ["data", "indices", "indptr", "x"], "y")(
        inputs=[mx.array(matrix.data), mx.array(matrix.indices), mx.array(matrix.indptr), x],
        output_shapes=[matrix.shape[:1]],
        output_dtypes=[mx.float32],
        grid=(32 * matrix.shape[0], 1, 1),
        threadgroup=(128, 1, 1),
    )[0]


def normal(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    generator = np.random.default_rng(0)
    return mx.array(generator.standard_normal(shape).astype(np.float32)).astype(dtype)


def as_float(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


@pytest.mark.parametrize(
    ("dtype", "eps"), [(mx.float32, 1e-6), (mx.float16, 1e-3), (mx.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("m", [32, 64, 40, 1])
def test_gemm(metal: Emulator, dtype: mx.Dtype, eps: float, m: int) -> None:
    k, n = 48, 64
    a, b = normal((m, k), dtype), normal((k, n), dtype)
    c = gemm(a, b)
    expected = as_float(a) @ as_float(b)
    assert c.dtype == dtype
    np.testing.assert_allclose(as_float(c), expected, atol=eps * np.abs(expected).max())

    counts, rows = metal.launches[0].counts, -(-m // GEMM_TILE)
    # Each tile of c reads its rows of a and columns of b once.
    assert counts.read["a"] == m * k * dtype.size * (n // GEMM_TILE)
    assert counts.read["b"] == k * n * dtype.size * rows
    assert counts.device_written == counts.written["c"] == m * n * dtype.size
    assert counts.macs == rows * GEMM_TILE * k * n
    tiles = rows * (n // GEMM_TILE)
    assert counts.barriers == tiles * (2 * (k // 16) + 1)
    # a_tile and b_tile are written once a step, c_tile once.
    step = (32 * 16 + 16 * 32) * dtype.size
    assert counts.threadgroup_written == tiles * (step * (k // 16) + 32 * 32 * 4)
    # Each of the 4 simdgroups reads 2 + 2 matrices for each 8 of k.
    step = 4 * (2 + 2) * 64 * dtype.size * 2
    assert counts.threadgroup_read == tiles * step * (k // 16) + m * n * 4
    assert counts.threadgroup_memory == (32 * 20 + 16 * 36) * dtype.size + 32 * 32 * 4


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_gemm_without_one_of_its_barriers(metal: Emulator, missing: int) -> None:
    source = (KERNELS / "gemm.metal").read_text()
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    parts = source.split(barrier)
    assert len(parts) == 4
    parts[missing : missing + 2] = [parts[missing] + parts[missing + 1]]
    a = normal((32, 32), mx.float16)
    with pytest.raises(MetalFault) as info:
        gemm(a, a, barrier.join(parts))
    assert info.value.kind in ("race", "uninitialised")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (3, 128), (70, 516)])
def test_row_sum(metal: Emulator, dtype: mx.Dtype, rows: int, columns: int) -> None:
    x = normal((rows, columns), dtype)
    y = row_sum(x)
    np.testing.assert_allclose(np.array(y), as_float(x).sum(axis=1), rtol=1e-4, atol=1e-4)
    counts = metal.launches[0].counts
    assert counts.device_read == x.nbytes
    assert counts.device_written == 4 * rows
    assert counts.simd_operations == rows


def test_spmv(metal: Emulator) -> None:
    matrix = scipy.sparse.random_array(
        (100, 90), density=0.3, format="csr", dtype=np.float32, rng=np.random.default_rng(0)
    )
    x = normal((90,), mx.float32)
    y = spmv(matrix, x)
    np.testing.assert_allclose(np.array(y), matrix @ np.array(x), rtol=1e-5, atol=1e-5)
    counts = metal.launches[0].counts
    # Each row reads two entries of indptr, for all its lanes at once.
    assert counts.read == {
        "data": 4 * matrix.nnz,
        "indices": 4 * matrix.nnz,
        "indptr": 2 * 4 * 100,
        "x": 4 * matrix.nnz,
        "y": 0,
    }
    assert counts.macs == matrix.nnz


def test_broadcast_counts_once_per_simdgroup(metal: Emulator) -> None:
    x = mx.arange(8, dtype=mx.float32)
    run: Any = mx.fast.metal_kernel(
        name="broadcast",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[0] + x[i / 16] + x[0];",
    )
    run(
        inputs=[x],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )
    counts = metal.launches[0].counts
    # Two simdgroups: x[0] at two places, and two elements of x[i / 16] each.
    assert counts.read["x"] == 2 * (4 + 8 + 4)
    assert counts.written["y"] == 64 * 4
