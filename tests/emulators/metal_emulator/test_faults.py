"""Each fault that the emulator must catch, caught: small wrong kernels and what is said of them."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import CompileError, Emulator, EmulatorError, MetalFault

TO_OUT = "uint i = thread_position_in_grid.x;\n"


@pytest.fixture
def metal() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def launch(source: str, *, threads: int = 64, group: int = 64, **options: Any) -> np.ndarray:
    """Runs `source` on inputs x (64 floats) and n (64 ints, 0 to 63), output y (64 floats)."""
    inputs = {"x": mx.arange(64, dtype=mx.float32), "n": mx.arange(64)}
    inputs |= options.pop("inputs", {})
    call = {
        "inputs": list(inputs.values()),
        "output_shapes": [(64,)],
        "output_dtypes": [mx.float32],
        "grid": (threads, 1, 1),
        "threadgroup": (group, 1, 1),
    } | options
    kernel: Any = mx.fast.metal_kernel(
        name="wrong", input_names=list(inputs), output_names=["y"], source=TO_OUT + source
    )
    return np.array(kernel(**call)[0])


def caught(source: str, **options: Any) -> MetalFault:
    with pytest.raises(MetalFault) as info:
        launch(source, **options)
    assert info.value.kernel == "wrong"
    assert str(info.value).startswith("[wrong] " + info.value.kind)
    return info.value


def body_line(text: str, n: int) -> int:
    """The line in the generated source of the n-th line of `text`."""
    with Emulator() as emulator:
        launch(text)
    lines = emulator.launches[0].source.splitlines()
    return lines.index(text.splitlines()[n]) + 1


# Device memory


def test_read_outside_a_buffer(metal: Emulator) -> None:
    fault = caught("y[i] = x[i + 1];")
    assert (fault.kind, fault.buffer, fault.index) == ("out of bounds", "x", 64)
    assert fault.thread == (63, 0, 0)
    assert "x[64]: reads 4 bytes at element 64, outside its 64 elements" in str(fault)


def test_read_before_a_buffer(metal: Emulator) -> None:
    fault = caught("y[i] = *(x + n[i] - 1);")
    assert (fault.kind, fault.buffer, fault.index, fault.thread) == (
        "out of bounds",
        "x",
        -1,
        (0, 0, 0),
    )


def test_fault_names_the_line(metal: Emulator) -> None:
    fault = caught("float v = 1;\ny[i] = v + x[i + 1];")
    assert fault.line == body_line("float v = 1;\ny[i] = v + x[i];", 1)


def test_write_outside_a_buffer(metal: Emulator) -> None:
    fault = caught("y[2 * i] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("out of bounds", "y", 64)
    assert fault.thread == (32, 0, 0)


def test_vector_read_over_the_end(metal: Emulator) -> None:
    fault = caught("y[i] = ((const device float4*)x)[i / 3].x;")
    assert (fault.kind, fault.buffer, fault.index) == ("out of bounds", "x", 64)


def test_write_to_an_input(metal: Emulator) -> None:
    fault = caught("((device float*)x)[i] = 0.0f; y[i] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("read-only", "x", 0)


def test_unwritten_output(metal: Emulator) -> None:
    fault = caught("if (i != 5 && i != 7) y[i] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("unwritten", "y", 5)
    assert "2 of 64 elements" in str(fault)


def test_init_value_is_not_unwritten(metal: Emulator) -> None:
    y = launch("if (i != 5) y[i] += 1.0f;", init_value=2.0)
    assert y[5] == 2
    assert (np.delete(y, 5) == 3).all()


def test_output_written_by_two_threads(metal: Emulator) -> None:
    fault = caught("y[i / 2] = 0.0f; y[32 + i / 2] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("written twice", "y", 0)
    metal.single_writer = False
    launch("y[i / 2] = 0.0f; y[32 + i / 2] = 0.0f;")


def test_output_written_twice_by_one_thread_is_fine(metal: Emulator) -> None:
    assert (launch("y[i] = 1.0f; y[i] += 1.0f;") == 2).all()


def test_output_read_before_written(metal: Emulator) -> None:
    fault = caught("y[i] += 1.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("uninitialised", "y", 0)


def test_output_read_across_threads_needs_a_device_barrier(metal: Emulator) -> None:
    source = "y[i] = x[i]; threadgroup_barrier(mem_flags::{}); y[i] += 0.0f * y[63 - i];"
    fault = caught(source.format("mem_threadgroup"))
    assert (fault.kind, fault.buffer) == ("race", "y")


def test_output_read_across_threadgroups(metal: Emulator) -> None:
    source = """
    y[i] = x[i];
    threadgroup_barrier(mem_flags::mem_device);
    float v = y[{}];
    if (v < 0.0f) y[i] = v;"""
    launch(source.format("i ^ 1"), group=32)
    fault = caught(source.format("i ^ 32"), group=32)
    assert (fault.kind, fault.buffer) in (("race", "y"), ("uninitialised", "y"))


def test_misaligned_threadgroup_store(metal: Emulator) -> None:
    fault = caught("threadgroup half t[64]; *(threadgroup half4*)(t + 2) = half4(0); y[i] = 0;")
    assert (fault.kind, fault.buffer, fault.index) == ("misaligned", "t", 2)


@pytest.mark.parametrize("source", ["x + 1", "(x + 2)"])
def test_misaligned_vector_load(metal: Emulator, source: str) -> None:
    fault = caught(f"y[i] = (*(const device float4*)({source})).x;")
    assert (fault.kind, fault.buffer) == ("misaligned", "x")
    assert fault.index == int(source.strip("()")[-1])


def test_misaligned_slice(metal: Emulator) -> None:
    """MLX hands a row-contiguous slice to the kernel uncopied, at its own address."""
    source = "y[i] = ((const device float4*)x)[i / 4].x;"
    launch(source)
    launch(source, inputs={"x": mx.arange(68, dtype=mx.float32)[4:]})
    fault = caught(source, inputs={"x": mx.arange(65, dtype=mx.float32)[1:]})
    assert (fault.kind, fault.buffer, fault.index) == ("misaligned", "x", 0)
    assert "slice" in str(fault)


def test_strided_input_is_copied(metal: Emulator) -> None:
    """ensure_row_contiguous, MLX's default."""
    x = mx.arange(128, dtype=mx.float32)[::2]
    assert (launch("y[i] = x[i];", inputs={"x": x}) == np.arange(0, 128, 2)).all()


# Threadgroup memory


def test_threadgroup_read_before_written(metal: Emulator) -> None:
    fault = caught(
        """threadgroup float tile[65];
        tile[i] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        y[i] = tile[i + 1];"""
    )
    assert (fault.kind, fault.buffer, fault.index) == ("uninitialised", "tile", 64)


def test_threadgroup_memory_of_the_last_group_is_gone(metal: Emulator) -> None:
    fault = caught(
        """threadgroup float tile[32];
        if (i < 32) tile[i % 32] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        y[i] = tile[i % 32];""",
        group=32,
    )
    assert (fault.kind, fault.buffer) == ("uninitialised", "tile")


@pytest.mark.parametrize("index", ["64", "-1"])
def test_outside_a_threadgroup_array(metal: Emulator, index: str) -> None:
    fault = caught(f"threadgroup float tile[64]; tile[i] = x[i]; tile[{index}] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("out of bounds", "tile", int(index))


def test_outside_an_inner_dimension(metal: Emulator) -> None:
    fault = caught("threadgroup float tile[8][8]; tile[i / 8][i % 8 + 1] = x[i]; y[i] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("out of bounds", "tile", 8)


MISSING = """threadgroup float tile[64];
tile[i] = x[i];
{}
y[i] = tile[63 - i];"""


@pytest.mark.parametrize(
    "barrier",
    [
        "",
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "threadgroup_barrier(mem_flags::mem_none);",
        "threadgroup_barrier(mem_flags::mem_device);",
    ],
)
def test_missing_barrier(metal: Emulator, barrier: str) -> None:
    fault = caught(MISSING.format(barrier))
    assert (fault.kind, fault.buffer) in (("race", "tile"), ("uninitialised", "tile"))
    launch(MISSING.format("threadgroup_barrier(mem_flags::mem_threadgroup);"))


@pytest.mark.parametrize("schedule", ["forward", "backward", "random"])
def test_missing_second_barrier(metal: Emulator, schedule: str) -> None:
    """Reusing memory needs a barrier after the reads too; each schedule alone sees the race."""
    metal.schedules = [schedule]
    source = """threadgroup float tile[64];
    float sum = 0;
    for (int k = 0; k < 2; k++) {{
      tile[i] = x[i] + k;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      sum += tile[63 - i];
      {}
    }}
    y[i] = sum;"""
    fault = caught(source.format(""))
    assert (fault.kind, fault.buffer) == ("race", "tile")
    assert "with no barrier in between" in str(fault)
    launch(source.format("threadgroup_barrier(mem_flags::mem_threadgroup);"))


def test_two_writers_of_threadgroup_memory(metal: Emulator) -> None:
    fault = caught("threadgroup float tile[32]; tile[i / 2] = x[i]; y[i] = 0.0f;")
    assert (fault.kind, fault.buffer, fault.index) == ("race", "tile", 0)
    assert fault.thread == (1, 0, 0)


def test_simdgroup_barrier_orders_its_lanes(metal: Emulator) -> None:
    source = """threadgroup float tile[64];
    tile[i] = x[i];
    {}
    y[i] = tile[i ^ 31];"""
    launch(source.format("simdgroup_barrier(mem_flags::mem_threadgroup);"))
    fault = caught(source.format("simdgroup_barrier(mem_flags::mem_none);"))
    assert (fault.kind, fault.buffer) in (("race", "tile"), ("uninitialised", "tile"))


def test_schedules_disagree(metal: Emulator) -> None:
    """Which thread writes last decides: seen without the single-writer check."""
    metal.single_writer = False
    fault = caught("y[i] = 0.0f; y[(i + 1) % 64] = x[i];")
    assert (fault.kind, fault.buffer) == ("schedule", "y")
    assert "backward order gives another result than forward" in str(fault)


def test_threadgroup_memory_over_32_kb(metal: Emulator) -> None:
    source = "threadgroup float a[{}]; threadgroup float b[192]; a[i] = b[i] = 0.0f; y[i] = 0.0f;"
    launch(source.format(8000))
    fault = caught(source.format(8001))
    assert (fault.kind, fault.buffer) == ("threadgroup memory", "b")
    assert "over 32768" in str(fault)


# Divergent flow

REDUCE = "y[i] = simd_sum(x[i]);"
BARRIER = "threadgroup_barrier(mem_flags::mem_none);"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (f"y[i] = 0.0f; if (i < 32) {BARRIER}", "threadgroup_barrier"),
        (f"y[i] = 0.0f; if (i < 5) {BARRIER}", "threadgroup_barrier"),
        (f"y[i] = 0.0f; if (i == 7) return; {BARRIER}", "threadgroup_barrier"),
        (f"y[i] = 0.0f; if (i < 32) {{ {BARRIER} }} else {{ {BARRIER} }}", "threadgroup_barrier"),
        (f"y[i] = 0.0f; for (uint k = 0; k < i / 32; k++) {BARRIER}", "threadgroup_barrier"),
        (f"if (i % 2) {{ {REDUCE} }} else {{ {REDUCE} }}", "simd_sum"),
        (f"if (i % 2) {{ {REDUCE} }} else y[i] = 0.0f;", "simd_sum"),
        ("y[i] = i < 40 ? simd_shuffle(x[i], 0) : 0.0f;", "simd_shuffle"),
        ("y[i] = 0.0f; if (i < 3) simdgroup_barrier(mem_flags::mem_none);", "simdgroup_barrier"),
        (f"y[i] = 0.0f; if (i < 3) {BARRIER} else simd_sum(x[i]);", ""),
        (
            "y[i] = 0.0f; simdgroup_float8x8 m; if (i % 32) simdgroup_load(m, x, 8);",
            "simdgroup_load",
        ),
        (
            """simdgroup_float8x8 m(1.0f); y[i] = 0.0f;
            if (i % 32) simdgroup_load(m, x, 8);
            simdgroup_multiply_accumulate(m, m, m, m);""",
            "simdgroup_load",
        ),
        (
            """simdgroup_float8x8 m(1.0f); y[i] = 0.0f;
            if (i % 32 < 16) simdgroup_multiply_accumulate(m, m, m, m);""",
            "simdgroup_multiply_accumulate",
        ),
    ],
)
def test_divergent_flow(metal: Emulator, source: str, what: str) -> None:
    fault = caught(source)
    assert fault.kind == "divergence"
    assert what in str(fault)


def test_uniform_flow_is_fine(metal: Emulator) -> None:
    """Whole simdgroups may part at simdgroup operations, whole threadgroups at barriers."""
    y = launch(f"float v = x[i]; if (i < 32) v = simd_sum(v); {BARRIER} y[i] = v;")
    assert (y[:32] == 496).all()
    launch(f"y[i] = 0.0f; if (i >= 32) {BARRIER}", group=32)


@pytest.mark.parametrize(
    "source",
    [
        "y[i] = simd_shuffle(x[i], 40);",
        "y[i] = simd_shuffle_xor(x[i], 32);",
    ],
)
def test_lane_that_does_not_exist(metal: Emulator, source: str) -> None:
    assert caught(source).kind == "undefined lane"


def test_partial_simdgroup(metal: Emulator) -> None:
    call = {"threads": 40, "output_shapes": [(40,)]}
    y = launch("y[i] = simd_sum(1.0f);", **call)
    assert y.tolist() == [32.0] * 32 + [8.0] * 8
    assert caught("y[i] = simd_shuffle_xor(x[i], 16);", **call).kind == "undefined lane"
    source = "simdgroup_float8x8 m(1.0f); simdgroup_multiply(m, m, m); y[i] = 0.0f;"
    assert caught(source, **call).kind == "undefined lane"


def test_transposed_load_with_an_origin(metal: Emulator) -> None:
    fault = caught("simdgroup_float8x8 m; simdgroup_load(m, x, 8, ulong2(1, 0), true); y[i] = 0;")
    assert fault.kind == "not modelled"


# A thread's own memory and arithmetic


def test_outside_a_thread_array(metal: Emulator) -> None:
    fault = caught("float v[4] = {0, 1, 2, 3}; y[i] = v[n[i]];")
    assert (fault.kind, fault.thread) == ("out of bounds", (4, 0, 0))


def test_division_by_zero(metal: Emulator) -> None:
    assert caught("y[i] = 4 / n[i];").kind == "arithmetic"


# The call


def test_over_1024_threads(metal: Emulator) -> None:
    with pytest.raises(EmulatorError, match=r"\[wrong\] threadgroup \(1025, 1, 1\).* over"):
        launch("y[i] = 0.0f;", group=1025)
    launch("y[i] = 0.0f;", group=1024)


@pytest.mark.parametrize("grid", [(0, 1, 1), (64, 1), (64, -1, 1)])
def test_wrong_grid(metal: Emulator, grid: tuple[int, ...]) -> None:
    with pytest.raises(EmulatorError, match="grid"):
        launch("y[i] = 0.0f;", grid=grid)


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_shapes": [(64,), (64,)]},
        {"output_dtypes": []},
        {"inputs": {"x": 1.0, "n": "text"}},
        {"output_dtypes": [np.float32]},
        {"template": [("T", 1.5)]},
        {"stream": mx.cpu},
        {"unknown": 1},
    ],
)
def test_wrong_arguments(metal: Emulator, wrong: dict[str, Any]) -> None:
    with pytest.raises((EmulatorError, TypeError, ValueError)):
        launch("y[i] = 0.0f;", **wrong)


def test_wrong_dtype_does_not_compile(metal: Emulator) -> None:
    with pytest.raises(CompileError, match=r"\[wrong\] does not compile"):
        launch("const device int* p = x; y[i] = p[i];")


def test_compile_and_vmap_say_why(metal: Emulator) -> None:
    x = mx.zeros(64)
    for transform in (mx.compile, mx.vmap):
        with pytest.raises(RuntimeError, match="eagerly"):
            transform(lambda x: launch("y[i] = x[i];", inputs={"x": x}))(x)


def test_grad_runs(metal: Emulator) -> None:
    @mx.custom_function
    def double(x: mx.array) -> mx.array:
        return mx.array(launch("y[i] = 2 * x[i];", inputs={"x": x}))

    @double.vjp
    def double_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return mx.array(launch("y[i] = 2 * x[i];", inputs={"x": cotangent}))

    x = mx.arange(64, dtype=mx.float32)
    value, gradient = mx.value_and_grad(lambda x: (double(x) * x).sum())(x)
    assert value.item() == 2 * (np.arange(64.0) ** 2).sum()
    assert (np.array(gradient) == 4 * np.arange(64.0)).all()
