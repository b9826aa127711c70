"""The text that is compiled is the one MLX generates."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_emulator import Emulator, install, metal_available


@pytest.fixture
def metal() -> Iterator[Emulator]:
    with Emulator(schedules=["forward"]) as emulator:
        yield emulator


def add_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="add",
        input_names=["a", "b"],
        output_names=["y"],
        header="constant constexpr int ONE = 1;\n",
        source="uint i = thread_position_in_grid.x; y[i] = T(a[i]) + T(b[i % N]) * ONE;",
    )


def call_of(a: mx.array, b: mx.array, n: int = 1) -> dict[str, Any]:
    return {
        "inputs": [a, b],
        "output_shapes": [a.shape],
        "output_dtypes": [a.dtype],
        "grid": (a.size, 1, 1),
        "threadgroup": (32, 1, 1),
        "template": [("T", a.dtype), ("N", n)],
    }


def test_source_is_header_signature_and_body(metal: Emulator) -> None:
    call = call_of(mx.zeros(16, mx.float16), mx.zeros(7))
    kernel = add_kernel()
    source = kernel.exported_source(**call)
    assert source.startswith("constant constexpr int ONE = 1;\ntemplate <typename T, int N>\n")
    assert "const device float16_t* a [[buffer(0)]]" in source
    assert "const constant float* b [[buffer(1)]]" in source
    assert "device float16_t* y [[buffer(2)]]" in source
    assert "uint3 thread_position_in_grid [[thread_position_in_grid]]) {" in source
    kernel(**call)
    assert metal.launches[0].source == source


def test_each_signature_has_its_own_source(metal: Emulator) -> None:
    kernel = add_kernel()
    large, small, scalar = mx.zeros(64), mx.zeros(7), mx.array([3.0])
    for a, b in ((large, large), (large, small), (small, scalar), (large.astype(mx.int32), small)):
        kernel(**call_of(a, b, b.size))
    kernel(**call_of(mx.zeros(100), mx.zeros(64), 64))
    sources = [launch.source for launch in metal.launches]
    assert len(set(sources)) == 4
    assert sources[0] == sources[4]


def test_source_does_not_reach_the_terminal(
    metal: Emulator, capfd: pytest.CaptureFixture[str]
) -> None:
    call = call_of(mx.zeros(16), mx.zeros(16))
    add_kernel()(**call)
    assert capfd.readouterr().out == ""
    add_kernel()(**call, verbose=True)
    assert capfd.readouterr().out.startswith("Generated source code for `add`:\n```\n")
    os.write(1, b"still there")
    assert capfd.readouterr().out == "still there"


def test_mlx_is_itself_again_afterwards() -> None:
    install()
    kernel, call = add_kernel(), call_of(mx.zeros(16), mx.zeros(16))
    with Emulator() as metal:
        assert mx.metal.is_available()
        assert mx.default_device() == mx.gpu
        kernel(**call)
    assert len(metal.launches) == 1
    assert mx.metal.is_available() == (mx.default_device() == mx.gpu)
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        kernel(**call)


def test_tracing_uses_the_real_kernel(tmp_path: Path) -> None:
    """A kernel made by the emulator, or cached before it, can still be traced and exported."""
    install()
    kernel = add_kernel()

    def twice(a: mx.array) -> mx.array:
        return kernel(**call_of(kernel(**call_of(a, a))[0], a))[0]

    with Emulator() as metal:
        twice(mx.zeros(16))
        with metal_available():
            mx.export_function(str(tmp_path / "twice.mlxfn"), twice, mx.zeros(16))
        assert len(metal.launches) == 2
    assert (tmp_path / "twice.mlxfn").stat().st_size > 0


@pytest.mark.parametrize("transform", [mx.grad, lambda f: lambda x: mx.jvp(f, [x], [x])[1][0]])
def test_runs_under_derivatives(metal: Emulator, transform: Callable[..., Any]) -> None:
    kernel = add_kernel()

    @mx.custom_function
    def double(a: mx.array) -> mx.array:
        return kernel(**call_of(a, a, 16))[0]

    run: Any = double  # in the stubs of MLX its call returns an object

    @double.vjp
    def _(a: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        return run(cotangent)

    @double.jvp
    def _(a: mx.array, tangent: mx.array) -> mx.array:
        return run(tangent)

    x = mx.arange(16, dtype=mx.float32)
    result = transform(lambda x: (run(x) ** 2).sum())(x)
    expected = 8 * np.arange(16.0)
    expected = expected if result.ndim else (expected * np.arange(16.0)).sum()
    np.testing.assert_array_equal(np.array(result), expected)
