"""The Metal language as the shim and the rewrite take it, and what they refuse."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import CompileError, Emulator, MetalFault, RewriteError


@pytest.fixture
def metal() -> Iterator[Emulator]:
    with Emulator(count=True) as emulator:
        yield emulator


def run(source: str, inputs: dict[str, mx.array] | None = None, **options: Any) -> np.ndarray:
    """Runs 64 threads of `source` with y, 64 floats, as the output."""
    inputs = {"x": mx.arange(64, dtype=mx.float32)} if inputs is None else inputs
    header = options.pop("header", "")
    call = {
        "inputs": list(inputs.values()),
        "output_shapes": [(64,)],
        "output_dtypes": [mx.float32],
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
    } | options
    kernel: Any = mx.fast.metal_kernel(
        name="language",
        input_names=list(inputs),
        output_names=["y"],
        source="uint i = thread_position_in_grid.x;\n" + source,
        header=header,
    )
    y = kernel(**call)[0]
    return np.array(y.astype(mx.float32))


X = np.arange(64, dtype=np.float32)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Pointers and casts.
        ("const device float* p = x + i; y[i] = *p;", X),
        ("const device auto* p = x; y[i] = p[i];", X),
        ("auto p = x + 63; p -= i; y[i] = p[0];", X[::-1]),
        ("const device float* p = x; for (uint k = 0; k < i; k++) p++; y[i] = *p;", X),
        ("y[i] = (reinterpret_cast<const device float4*>(x) + i / 4)[0][i % 4];", X),
        ("float4 v = *(const device float4*)(x + i / 4 * 4); y[i] = v[i % 4];", X),
        ("y[i] = ((const device packed_float3*)(x + 1))[i / 32].y;", np.repeat([2, 5], 32)),
        ("device float& out = y[i]; out = 1; out += x[i];", X + 1),
        ("const device float& in = x[i]; y[i] = in;", X),
        ("device float* const q = &y[i]; *q = 3;", 3),
        ("y[i] = as_type<float>(as_type<uint>(x[i]) ^ 0x80000000u);", -X),
        # Threadgroup memory.
        (
            """threadgroup float a[2][4][8];
            a[i / 32][i / 8 % 4][i % 8] = x[i];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            threadgroup float* p = &a[0][0][0];
            y[i] = p[63 - i];""",
            X[::-1],
        ),
        (
            """threadgroup float4 a[16];
            if (i < 16) a[i] = ((const device float4*)x)[i];
            threadgroup_barrier(mem_flags::mem_threadgroup);
            float4 v = a[i / 4];
            y[i] = v[i % 4];""",
            X,
        ),
        (
            """threadgroup float total;
            if (i == 0) total = 5.0f;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            y[i] = total;""",
            5,
        ),
        (
            """threadgroup half a[64];
            *(threadgroup half2*)(a + i / 2 * 2) = half2(1.0h, half(i / 2));
            threadgroup_barrier(mem_flags::mem_none);
            y[i] = i;""",
            None,
        ),
        # A thread's own memory.
        ("float v[4] = {1, 2, 3, 4}; thread float* p = v + 1; y[i] = p[i % 2];", X % 2 + 2),
        ("float v = 2; thread float& r = v; r *= 3; y[i] = v;", 6),
        # Literals are float: 1.0 / 3 in double would round to another float.
        ("float a = 16777216; y[i] = a + 1.0 - a;", 0),
        ("y[i] = 1e-1 * 2.;", np.float32(0.1) * 2),
        # Comments hold no declarations; threadgroup float fake[4];
        ("/* device float* q; */ y[i] = x[i]; // threadgroup float t[4];", X),
        # Functions.
        ("y[i] = fma(x[i], 2.0f, 1.0f);", 2 * X + 1),
        ("y[i] = dot(float4(x[i]), float4(1, 2, 3, 4));", 10 * X),
        ("y[i] = metal::max(x[i], 5.0f) + metal::min(i, 3u);", np.maximum(X, 5) + X.clip(0, 3)),
        ("y[i] = clamp(int(i), 3, 60);", X.clip(3, 60)),
        ("y[i] = select(1.0f, 2.0f, i > 5);", np.where(X > 5, 2, 1)),
        ("float4 v = float4(half4(float4(x[i]))) * 2; y[i] = (v + 1).w;", 2 * X + 1),
        ("int4 v = int4(7) / 2 + int4(1, 2, 3, 4); y[i] = v.z;", 6),
        # Simdgroups.
        ("y[i] = simd_sum(x[i]);", np.repeat([496, 1520], 32)),
        ("y[i] = simd_max(int(i)) - simd_min(i);", 31),
        ("y[i] = simd_shuffle(x[i], 31 - thread_index_in_simdgroup);", X.reshape(2, 32)[:, ::-1]),
        ("y[i] = simd_shuffle_xor(x[i], 1);", X.reshape(-1, 2)[:, ::-1]),
        ("y[i] = simd_broadcast(x[i], 3);", np.repeat([3, 35], 32)),
        ("y[i] = simd_shuffle_down(x[i], 30);", np.where(X % 32 < 2, X + 30, X)),
        ("y[i] = simd_shuffle_up(x[i], 30);", np.where(X % 32 < 30, X, X - 30)),
        ("y[i] = simd_prefix_inclusive_sum(1.0f);", X % 32 + 1),
        ("y[i] = simd_sum(float2(x[i], 1)).y;", 32),
        ("y[i] = simd_any(i == 40) + 2 * simd_all(i < 32);", np.repeat([2, 1], 32)),
    ],
)
def test_text(metal: Emulator, source: str, expected: np.ndarray | int | None) -> None:
    if expected is None:
        with pytest.raises(Exception, match="race"):
            run(source)
    else:
        expected = np.broadcast_to(np.ravel(expected).astype(np.float32), 64)
        np.testing.assert_array_equal(run(source), expected)


def test_attributes_of_partial_threadgroups(metal: Emulator) -> None:
    """dispatchThreads: the grid counts threads, the last threadgroups have fewer."""
    kernel: Any = mx.fast.metal_kernel(
        name="attributes",
        input_names=[],
        output_names=["y"],
        source="""
        uint3 g = threads_per_grid, p = thread_position_in_grid;
        device uint* out = y + 12 * (p.x + g.x * (p.y + g.y * p.z));
        out[0] = p.x; out[1] = p.y; out[2] = p.z;
        out[3] = threadgroup_position_in_grid.x; out[4] = thread_position_in_threadgroup.x;
        out[5] = threads_per_threadgroup.x; out[6] = threads_per_threadgroup.y;
        out[7] = dispatch_threads_per_threadgroup.x; out[8] = threadgroups_per_grid.x;
        out[9] = thread_index_in_threadgroup; out[10] = simdgroup_index_in_threadgroup;
        out[11] = thread_index_in_simdgroup;""",
    )
    nx, ny, nz, tx, ty = 70, 3, 2, 32, 2
    y = kernel(
        inputs=[],
        output_shapes=[(nz, ny, nx, 12)],
        output_dtypes=[mx.uint32],
        grid=(nx, ny, nz),
        threadgroup=(tx, ty, 1),
    )[0]
    z, row, x = np.meshgrid(np.arange(nz), np.arange(ny), np.arange(nx), indexing="ij")
    width = np.minimum(tx, nx - x // tx * tx)
    height = np.minimum(ty, ny - row // ty * ty)
    index = x % tx + width * (row % ty)
    full = np.full_like(x, tx)
    expected = [x, row, z, x // tx, x % tx, width, height, full, full * 0 + 3]
    expected += [index, index // 32, index % 32]
    np.testing.assert_array_equal(np.array(y), np.stack(expected, axis=-1))
    assert metal.launches[0].threadgroup == (tx, ty, 1)


def test_threadgroup_is_clamped_to_the_grid(metal: Emulator) -> None:
    y = run("y[i] = threads_per_threadgroup.x;", threadgroup=(256, 1, 1))
    assert (y == 64).all()
    assert metal.launches[0].threadgroup == (64, 1, 1)


def test_shape_strides_ndim_and_scalar_arguments(metal: Emulator) -> None:
    inputs = {"a": mx.zeros((2, 3, 5)), "s": mx.array(7.0), "c": mx.array([1.0, 2.0]).reshape(2, 1)}
    source = """int v[8] = {a_shape[0], a_shape[2], (int)a_strides[0], a_ndim, (int)s, c_ndim,
                (int)c[1], 0};
    y[i] = v[i % 8];"""
    assert run(source, inputs)[:8].tolist() == [2, 5, 15, 3, 7, 2, 2, 0]
    source = metal.launches[0].source
    assert "const constant float& s" in source
    assert "const constant float* c" in source
    # Only device memory counts, not the shapes; the scalar is read once a simdgroup.
    counts = metal.launches[0].counts
    assert counts.read == {"a": 0, "s": 8, "c": 8, "y": 0}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("space", ["device", "threadgroup"])
def test_simdgroup_matrix(metal: Emulator, dtype: mx.Dtype, transpose: bool, space: str) -> None:
    """Load and store with a stride, an offset and transposed; products in float32."""
    a = mx.random.normal((16, 24), key=mx.random.key(0)).astype(dtype)
    b = mx.random.normal((8, 8), key=mx.random.key(1)).astype(dtype)
    flag = "true" if transpose else "false"
    if space == "device":
        load = f"simdgroup_load(ma, a + 8 * 24 + 16, 24, ulong2(0, 0), {flag});"
    else:
        load = f"""threadgroup T tile[8 * 12];
        for (int k = i; k < 64; k += 32)
          tile[k / 8 * 12 + k % 8] = a[(8 + k / 8) * 24 + 16 + k % 8];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(ma, tile, 12, ulong2(0), {flag});"""
    source = f"""simdgroup_matrix<T, 8, 8> ma, mb;
    {load}
    simdgroup_load(mb, b);
    simdgroup_float8x8 acc = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_multiply_accumulate(acc, ma, mb, acc);
    acc.thread_elements()[0] += 0.5f;
    acc.thread_elements()[1] += 0.5f;
    simdgroup_store(acc, y, 8, ulong2(0, 0), true);"""
    y = run(
        source,
        {"a": a, "b": b},
        template=[("T", dtype)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    left = np.array(a.astype(mx.float32))[8:, 16:]
    expected = (left.T if transpose else left) @ np.array(b.astype(mx.float32)) + 1.5
    np.testing.assert_allclose(y.reshape(8, 8).T, expected, rtol=1e-5, atol=1e-5)
    counts = metal.launches[0].counts
    assert counts.read == {"a": 64 * dtype.size, "b": 64 * dtype.size, "y": 0}
    assert counts.macs == 512


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_rounding(metal: Emulator, dtype: mx.Dtype) -> None:
    """Arithmetic in 16 bits rounds after each operation, as MLX's own does."""
    x = mx.random.normal((64,), key=mx.random.key(2)).astype(dtype)
    z = mx.random.normal((64,), key=mx.random.key(3)).astype(dtype)
    source = "y[i] = x[i] * z[i] + x[i];"
    y = run(source, {"x": x, "z": z}, output_dtypes=[dtype])
    np.testing.assert_array_equal(y, np.array((x * z + x).astype(mx.float32)))
    bits = mx.arange(1 << 16, dtype=mx.uint32).astype(mx.uint16).view(dtype)
    kernel: Any = mx.fast.metal_kernel(
        name="round_trip",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = T(float(x[i]));",
    )
    y = kernel(
        inputs=[bits],
        output_shapes=[bits.shape],
        output_dtypes=[dtype],
        grid=(bits.size, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("T", dtype)],
    )[0]
    assert mx.array_equal(y, bits, equal_nan=True)


HELPERS = """#include <metal_stdlib>
using namespace metal;
constant constexpr int SCALE = 2;
template <typename T, int N>
struct Tile {
  const device T* src;
  threadgroup T* dst;
  METAL_FUNC void load(uint i) {
    #pragma unroll
    for (int k = 0; k < N; k++) dst[i * N + k] = src[i * N + k] * T(SCALE);
  }
};
template <typename T>
METAL_FUNC T last(const threadgroup T* p, int n) { return p[n - 1]; }
template <typename P>
METAL_FUNC float first(P p) { return p[0]; }
METAL_FUNC void add(thread float (&v)[2], const float by) { v[0] += by; v[1] += by; }
"""


def test_templated_helpers(metal: Emulator) -> None:
    source = """threadgroup float memory[128];
    Tile<float, 2> tile;
    tile.src = x;
    tile.dst = memory;
    if (i < 32) tile.load(i);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float v[2] = {last(memory, 64), first(x) + first(memory)};
    add(v, 1.0);
    y[i] = v[0] + v[1];"""
    assert (run(source, header=HELPERS) == 126 + 2).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("float* p = nullptr; y[i] = *p;", "`float\\*` needs an address space"),
        ("float v = 1; float& r = v; y[i] = r;", "`float&` needs an address space"),
        ("vec<float, 4> v; vec<float, 4>& r = v; y[i] = 1;", "`>&` needs an address space"),
        ("simdgroup_float8x8 m; simdgroup_float8x8& r = m;", "needs an address space"),
        ("double v = 1; y[i] = v;", "`double` is not Metal"),
        ("y[i] = std::max(x[i], 1.0f);", "`std` is not Metal"),
        ("auto f = [&]() { return 1; }; y[i] = f();", "no lambda"),
        ("threadgroup float a[4], b[4]; y[i] = 0;", "one declaration a line"),
        ("device float v = 1; y[i] = v;", "neither a pointer nor a reference"),
    ],
)
def test_refused_by_the_rewrite(metal: Emulator, source: str, message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        run(source)


def test_threadgroup_variable_in_a_function(metal: Emulator) -> None:
    header = "METAL_FUNC float f() { threadgroup float v[4]; return v[0]; }\n"
    with pytest.raises(RewriteError, match="line 1: threadgroup variables"):
        run("y[i] = f();", header=header)


@pytest.mark.parametrize(
    "source",
    [
        "bfloat b = 1.0f; y[i] = b;",
        "bfloat b = bfloat(1.0f); b = x[i]; y[i] = b;",
        "bfloat b = i > 3 ? bfloat(1.0f) : 0.0f; y[i] = b;",
        "bfloat b = bfloat(1.0f); y[i] = clamp(b, b, b);",
        "y[i] = max(x[i], 0);",
        "x[i] = 1.0f; y[i] = 0;",
        "const threadgroup auto* p = x; y[i] = p[0];",
        "threadgroup float t[64]; device float* p = t; y[i] = p[0];",
        "const device float* p = (threadgroup float*)x; y[i] = p[0];",
        "const device half* h = x; y[i] = h[0];",
        "auto v = y[i]; v += 1;",
        "simdgroup_half8x8 m; simdgroup_load(m, x, 8); y[i] = 0;",
    ],
)
def test_refused_by_the_compiler(metal: Emulator, source: str) -> None:
    with pytest.raises(CompileError, match=r"\[language\] does not compile"):
        run(source)


def test_empty_input(metal: Emulator) -> None:
    inputs = {"a": mx.zeros((0, 4)), "x": mx.arange(64, dtype=mx.float32)}
    assert run("y[i] = x[i] + a_shape[0] + a_shape[1];", inputs)[0] == 4
    with pytest.raises(MetalFault, match=r"a\[0\]: reads 4 bytes .* outside its 0 elements"):
        run("y[i] = a[i];", inputs)


def test_strides_of_an_input_that_is_not_contiguous(metal: Emulator) -> None:
    """ensure_row_contiguous=False: the kernel gets the array's own strides."""
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8)
    kernel: Any = mx.fast.metal_kernel(
        name="strided",
        input_names=["x"],
        output_names=["y"],
        source="""uint i = thread_position_in_grid.x;
        y[i] = x[i / 8 * x_strides[0] + i % 8 * x_strides[1]];""",
        ensure_row_contiguous=False,
    )
    y = kernel(
        inputs=[x.T],
        output_shapes=[(8, 8)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )[0]
    assert mx.array_equal(y, x.T)
