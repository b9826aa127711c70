"""What the peers that use MLX have in common."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.peers import Task
from benchmarks.workloads import CALLS, Arrays, Layer

PACKAGES = ("mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "numpy")


def start(device: str) -> None:
    """Make ``device`` the default."""
    mx.set_default_device(mx.Device(getattr(mx, device)))


def gpu() -> str:
    """Return the GPU's name."""
    return str(mx.device_info().get("device_name"))


def blas() -> str:
    """Return the name of the BLAS that multiplies dense float32 matrices on the CPU."""
    if sys.platform != "linux":
        return "Accelerate" if sys.platform == "darwin" else "MLX's own"
    if (config := openblas("get_config")) is not None:
        config.restype = ctypes.c_char_p
        return " ".join(config().decode().split()[:2])
    return "netlib"  # what the wheel brings: Fortran's reference, scalar code


def openblas(name: str) -> Any:
    """Return a function of the OpenBLAS that was loaded before MLX, or None."""
    loaded_first = ctypes.CDLL(None)
    names = (f"openblas_{name}", f"scipy_openblas_{name}")
    return next(filter(None, (getattr(loaded_first, n, None) for n in names)), None)


def ready(results: list) -> None:
    """Evaluate what is MLX's."""
    mx.eval([a for a in results if isinstance(a, mx.array)])


def numpy(a: Any) -> np.ndarray:
    """Return a NumPy array; bfloat16, which NumPy has not, as float32."""
    if isinstance(a, mx.array) and a.dtype == mx.bfloat16:
        a = a.astype(mx.float32)
    return np.array(a)


def active_memory() -> int:
    """Return the bytes that MLX holds."""
    mx.synchronize()
    return mx.get_active_memory()


def reset_peak() -> None:
    mx.synchronize()
    mx.reset_peak_memory()


def peak_memory() -> int:
    mx.synchronize()
    return mx.get_peak_memory()


def layer(
    w: Layer,
    arrays: Arrays,
    hold: Callable[[mx.array], Callable[[mx.array], mx.array]],
    weight: np.ndarray,
    stored: Callable[[np.ndarray], np.ndarray],
) -> Task:
    """Return the task of ``hold(weight)(x)``; ``stored`` picks a gradient's stored values.

    A forward call finds the weight held, as with peers outside of MLX.
    """
    dtype = getattr(mx, w.dtype)
    values, x = (mx.array(a).astype(dtype) for a in (weight, arrays["x"]))
    mx.eval(values, x)
    if w.step == "forward":
        multiply = hold(values)
        return Task(lambda _: [multiply(x)], lambda out: [numpy(out[0])])
    target = mx.array(arrays["target"]).astype(dtype)
    mx.eval(target)

    def run(_):
        y, gradients = mx.vjp(lambda weight, x: hold(weight)(x), [values, x], [target])
        return [*y, *gradients]

    def convert(out):
        y, of_weight, of_x = map(numpy, out)
        return [y, stored(of_weight), of_x]

    return Task(run, convert)


def calls(call: Callable[[mx.array], mx.array], arrays: Arrays) -> Task:
    """Return the task that builds calls of x and evaluates none."""
    x = mx.array(arrays["x"])
    mx.eval(x)

    def build(_):
        for _ in range(CALLS):
            call(x)
        return []

    return Task(build, lambda out: out)


def csr_product(
    arrays: Arrays, step: str, multiply: Callable[[mx.array, mx.array], mx.array]
) -> Task:
    """Return the task of ``multiply(data, x)``, or of it and both gradients."""
    data, x = mx.array(arrays["data"]), mx.array(arrays["x"])
    mx.eval(data, x)
    if step == "forward":
        return Task(lambda _: [multiply(data, x)], lambda out: [numpy(out[0])])
    target = mx.array(arrays["target"])
    mx.eval(target)

    def run(_):
        y, gradients = mx.vjp(multiply, [data, x], [target])
        return [*y, *gradients]

    return Task(run, lambda out: [numpy(a) for a in out])
