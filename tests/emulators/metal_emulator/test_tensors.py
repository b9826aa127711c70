"""Tensors of Metal 4 and their products: what the specification says, and what it leaves open."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import SCHEDULES, CompileError, Emulator, MetalFault, RewriteError

HEADER = """#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace mpp::tensor_ops;
"""
# C (32 x 16) = A (32 x 24) B (24 x 16), in float16.
PRODUCT = """
auto left = tensor((device half*)a, dextents<int, 2>(24, 32), array<int, 2>{1, 24});
auto right = tensor((device half*)b, dextents<int, 2>(16, 24), array<int, 2>{1, 16});
constexpr auto form = matmul2d_descriptor(32, 16, static_cast<int>(dynamic_extent));
matmul2d<form, execution_simdgroup> product;
auto acc = product.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
"""
RUN = "product.run(left, right, acc);\n"
STORE = """
for (ushort i = 0; i < acc.get_capacity(); i++) {
  if (acc.is_valid_element(i)) {
    auto at = acc.get_multidimensional_index(i);
    y[at[1] * 16 + at[0]] = acc[i];
  }
}"""
SIMDGROUP = "simdgroup_index_in_threadgroup"


@pytest.fixture
def metal() -> Iterator[Emulator]:
    with Emulator(count=True) as emulator:
        yield emulator


def operands(dtype: mx.Dtype = mx.float16) -> dict[str, mx.array]:
    rng = np.random.default_rng(0)
    shapes = {"a": (32, 24), "b": (24, 16)}
    return {
        name: mx.array(rng.integers(-3, 4, shape).astype(np.float32)).astype(dtype)
        for name, shape in shapes.items()
    }


def launch(
    source: str,
    threads: int = 32,
    header: str = HEADER,
    shape: tuple[int, ...] = (32, 16),
    **options: Any,
) -> np.ndarray:
    """Runs one threadgroup on a (32 x 24) and b (24 x 16), output y (32 x 16) of float32."""
    inputs = options.pop("inputs", None) or operands()
    kernel: Any = mx.fast.metal_kernel(
        name="tensors",
        input_names=list(inputs),
        output_names=["y"],
        source=source,
        header=header,
    )
    call = {
        "inputs": list(inputs.values()),
        "output_shapes": [shape],
        "output_dtypes": [mx.float32],
        "grid": (threads, 1, 1),
        "threadgroup": (threads, 1, 1),
    } | options
    return np.array(kernel(**call)[0])


def caught(source: str, **options: Any) -> MetalFault:
    with pytest.raises(MetalFault) as info:
        launch(source, **options)
    return info.value


def expected() -> np.ndarray:
    a, b = (np.array(x.astype(mx.float32)) for x in operands().values())
    return a @ b


def test_product(metal: Emulator) -> None:
    np.testing.assert_array_equal(launch(PRODUCT + RUN + STORE), expected())
    counts = metal.launches[0].counts
    assert (counts.read["a"], counts.read["b"]) == (2 * 32 * 24, 2 * 24 * 16)  # each once
    assert counts.macs == 32 * 16 * 24
    assert counts.simd_operations == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_transposed_operands_of_every_type(
    metal: Emulator, dtype: mx.Dtype, left: bool, right: bool
) -> None:
    """A template as MLX makes it: members of what depends on T are named with `template`."""
    flag = {False: "false", True: "true"}
    source = f"""
    typedef tensor<device T, dextents<int, 2>, tensor_inline> Operand;
    Operand left((device T*)a, dextents<int, 2>({"32, 24" if left else "24, 32"}));
    Operand right((device T*)b, dextents<int, 2>({"24, 16" if right else "16, 24"}));
    constexpr auto form = mpp::tensor_ops::matmul2d_descriptor(
        32, 16, static_cast<int>(dynamic_extent), {flag[left]}, {flag[right]}, false,
        mpp::tensor_ops::matmul2d_descriptor::mode::multiply);
    mpp::tensor_ops::matmul2d<form, execution_simdgroup> product;
    auto acc = product.template get_destination_cooperative_tensor<Operand, Operand, float>();
    {RUN}{STORE}"""
    inputs = operands(dtype)
    inputs["a"] = mx.contiguous(inputs["a"].T) if left else inputs["a"]
    inputs["b"] = mx.contiguous(inputs["b"].T) if right else inputs["b"]
    y = launch(source, inputs=inputs, template=[("T", dtype)])
    np.testing.assert_array_equal(y, expected())


ACCUMULATE = PRODUCT.replace(
    "dynamic_extent))",
    "dynamic_extent), false, false, false, matmul2d_descriptor::mode::multiply_accumulate)",
)
ZERO = """
#pragma unroll
for (ushort i = 0; i < acc.get_capacity(); i++) {
  if (acc.is_valid_element(i)) acc[i] = 1.0f;
}
"""


def test_products_add_up(metal: Emulator) -> None:
    y = launch(ACCUMULATE + ZERO + RUN + RUN + STORE)
    np.testing.assert_array_equal(y, 2 * expected() + 1)


def test_sums_begin_unwritten(metal: Emulator) -> None:
    assert caught(ACCUMULATE + RUN + STORE).kind == "uninitialised"


def test_slices_of_tensors_and_of_threadgroup_memory(metal: Emulator) -> None:
    """The product of a's rows 16 to 31 and columns 8 to 23, by two roads."""
    source = """
    threadgroup half tile[16 * 16];
    for (uint i = thread_index_in_threadgroup; i < 256; i += 32) {
      tile[i] = b[8 * 16 + i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    auto whole = tensor((device half*)a, dextents<int, 2>(24, 32));
    auto left = whole.slice(8, 16);
    auto right = tensor(tile, dextents<int, 2>(16, 16));
    constexpr auto form = matmul2d_descriptor(16, 16, 16);
    matmul2d<form, execution_simdgroup> product;
    auto acc = product.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
    """
    a, b = (np.array(x.astype(mx.float32)) for x in operands().values())
    y = launch(source + RUN + STORE, shape=(16, 16))
    np.testing.assert_array_equal(y, a[16:, 8:] @ b[8:])
    static = source.replace("whole.slice(8, 16)", "whole.slice<16, 16>(8, 16)")
    np.testing.assert_array_equal(launch(static + RUN + STORE, shape=(16, 16)), y)
    fault = caught(source.replace("(8, 16);", "(8, 33);", 1) + RUN + STORE, shape=(16, 16))
    assert (fault.kind, fault.buffer) == ("out of bounds", "a")
    fault = caught(static.replace("(8, 16);", "(9, 16);", 1) + RUN + STORE, shape=(16, 16))
    assert (fault.kind, fault.buffer) == ("out of bounds", "a")


def test_a_whole_threadgroup(metal: Emulator) -> None:
    source = (PRODUCT + RUN + STORE).replace("execution_simdgroup>", "execution_simdgroups<2>>")
    np.testing.assert_array_equal(launch(source, threads=64), expected())
    assert metal.launches[0].counts.read["a"] == 2 * 32 * 24
    for threads in (32, 128):
        fault = caught(source, threads=threads)
        assert fault.kind == "execution scope"
        assert f"of 2 simdgroups in a threadgroup of {threads // 32}" in str(fault)


def test_simdgroups_may_part(metal: Emulator) -> None:
    """Each simdgroup multiplies for itself: others need not come along."""
    source = PRODUCT + f"if ({SIMDGROUP} == 1) {{" + RUN + STORE + "}"
    np.testing.assert_array_equal(launch(source, threads=96), expected())


@pytest.mark.parametrize(
    ("source", "threads"),
    [
        (PRODUCT + "if (thread_index_in_simdgroup < 9) " + RUN + STORE, 32),
        (PRODUCT + "if (thread_index_in_simdgroup == 9) return;\n" + RUN + STORE, 32),
        (
            PRODUCT.replace("execution_simdgroup>", "execution_simdgroups<2>>")
            + f"if ({SIMDGROUP} == 1) {{ {RUN} }}"
            + STORE,
            64,
        ),
    ],
)
def test_divergent_run(metal: Emulator, source: str, threads: int) -> None:
    fault = caught(source, threads=threads)
    assert fault.kind == "divergence"
    assert "matmul2d in divergent flow" in str(fault)


def test_lanes_multiply_the_same_tensors(metal: Emulator) -> None:
    source = PRODUCT.replace("(device half*)b", "(device half*)b + thread_index_in_simdgroup / 31")
    fault = caught(source + RUN + STORE)
    assert fault.kind == "divergence"
    assert "multiplies other tensors" in str(fault)


def test_a_partial_simdgroup(metal: Emulator) -> None:
    assert caught(PRODUCT + RUN + STORE, threads=20).kind == "undefined lane"


@pytest.mark.parametrize(
    ("old", "new", "buffer"),
    [
        ("(24, 32)", "(24, 33)", None),  # rows that the operation leaves out
        ("(24, 32)", "(25, 32)", "b"),  # K of both must agree
        ("(16, 24)", "(16, 20)", "b"),
        ("(half*)b", "(half*)b + 1", "b"),  # past the end of the array
        ("array<int, 2>{1, 24}", "array<int, 2>{1, 1 << 20}", "a"),
        ("array<int, 2>{1, 24}", "array<int, 2>{1, 25}", "a"),
        ("dextents<int, 2>(24, 32)", "dextents<int, 2>(-1, 32)", "a"),
    ],
)
def test_extents(metal: Emulator, old: str, new: str, buffer: str | None) -> None:
    source = (PRODUCT + RUN + STORE).replace(
        old.replace("(half", "(device half"), new.replace("(half", "(device half")
    )
    if buffer is None:
        np.testing.assert_array_equal(launch(source), expected())
    else:
        fault = caught(source)
        assert (fault.kind, fault.buffer) == ("out of bounds", buffer)


def test_static_depth_is_not_cut(metal: Emulator) -> None:
    """Undefined in Metal: values behind the tensor, a nan among them, become part of the sum."""
    source = (PRODUCT + RUN + STORE).replace("static_cast<int>(dynamic_extent)", "32")
    fault = caught(source)
    assert fault.kind == "out of bounds"
    assert "K = 24 and 24" in str(fault)


def test_rows_past_the_last_are_not_read_and_mean_nothing(metal: Emulator) -> None:
    """The operation looks at the extents; what it leaves in the rest of the tile is anything."""
    source = (PRODUCT + RUN + STORE).replace("(24, 32)", "(24, 30)")
    y = launch(source)
    np.testing.assert_array_equal(y[:30], expected()[:30])
    assert np.isnan(y[30:]).all()
    assert metal.launches[0].counts.read["a"] == 2 * 30 * 24
    static = source.replace("dextents<int, 2>(24, 30)", "extents<int, 24, 30>()")
    fault = caught(static)
    assert (fault.kind, fault.buffer) == ("out of bounds", "a")
    assert "static extent of 30" in str(fault)


def test_layouts_are_nobodys_business(metal: Emulator) -> None:
    """Each schedule scatters the elements otherwise: text that takes a place for granted fails."""
    source = (
        PRODUCT
        + """uint n = 0, first = 0;
        for (ushort i = acc.get_capacity(); i-- > 0;) {
          if (acc.is_valid_element(i)) {
            n++;
            first = acc.get_multidimensional_index(i)[1];
          }
        }
        y[2 * thread_index_in_simdgroup] = n;
        y[2 * thread_index_in_simdgroup + 1] = first;"""
    )
    metal.schedules = SCHEDULES[:1]
    n, first = launch(source, shape=(32, 2)).T
    assert n.sum() == 32 * 16
    assert len(set(n)) > 1
    assert (np.diff(first) < 0).any()
    metal.schedules = SCHEDULES
    assert caught(source, shape=(32, 2)).kind == "schedule"


@pytest.mark.parametrize(
    "text", ["y[i] = acc[i];", "y[i] = acc.get_multidimensional_index(i)[0];", "acc[i] = 0.0f;"]
)
def test_slots_that_hold_nothing(metal: Emulator, text: str) -> None:
    source = f"for (ushort i = 0; i < acc.get_capacity(); i++) {{ {text} }}"
    fault = caught(PRODUCT + RUN + source)
    assert fault.kind == "out of bounds"
    assert "is not valid" in str(fault)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PRODUCT.replace("(32, 16,", "(24, 8,"), "multiple of 16"),
        (PRODUCT.replace("(32, 16,", "(32, 12,"), "multiple of 8"),
        (PRODUCT.replace("static_cast<int>(dynamic_extent)", "24"), "K must be dynamic or"),
        (PRODUCT.replace("(device half*)a", "a") + RUN, "not const"),
        (PRODUCT.replace("(device half*)a", "(device bfloat*)a") + RUN, "element types are"),
        (
            PRODUCT
            + """constexpr auto other_form = matmul2d_descriptor(32, 16, 32);
            matmul2d<other_form, execution_simdgroup> other;
            other.run(left, right, acc);""",
            "of another operation",
        ),
        (PRODUCT + "product.run(left, tensor(right), acc);", "no matching member function"),
        (
            "tensor<device half, dextents<int, 2>> t((device half*)a, dextents<int, 2>(1, 1));",
            "inline tensors only|no matching constructor",
        ),
    ],
)
def test_refused_by_the_compiler(metal: Emulator, source: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        launch(source)


def test_the_headers_must_be_there(metal: Emulator) -> None:
    with pytest.raises(CompileError):
        launch(PRODUCT + RUN + STORE, header="")


def test_metal_3_has_no_tensors(metal: Emulator) -> None:
    metal.metal_version = 320
    with pytest.raises(CompileError, match="tensors need Metal 4"):
        launch(PRODUCT + RUN + STORE)
    guarded = f"#if __METAL_VERSION__ >= 400\n{HEADER}#endif\n"
    y = launch("y[thread_index_in_simdgroup] = __METAL_VERSION__;", header=guarded, shape=(32,))
    assert (y == 320).all()


def test_strides_between_elements_are_not_modelled(metal: Emulator) -> None:
    fault = caught(PRODUCT.replace("{1, 16}", "{2, 16}") + RUN + STORE)
    assert fault.kind == "not modelled"


def test_an_address_space_alone_is_no_declaration(metal: Emulator) -> None:
    with pytest.raises(RewriteError, match="neither a pointer nor a reference"):
        launch("device half t; y[0] = 0;")
