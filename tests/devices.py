"""The emulated Metal GPU as MLX's default device, for tests that know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import metal_emulator
import mlx.core as mx

from mlx_sparse_nn.core.backends import cpu

GPU, CPU = mx.Device(mx.gpu), mx.Device(mx.cpu)


@contextmanager
def emulated_metal() -> Iterator[None]:
    """Let MLX look as if its default device were a Mac's GPU, whose kernels the emulator runs.

    The CPU can be chosen as on a Mac. What is no kernel is computed by MLX on the CPU all the same.
    Nothing is compiled by ``mx.compile``: the emulator runs kernels on values.
    """
    devices = [GPU]
    use_stream = mx.stream

    def default_device() -> mx.Device:
        return devices[-1]

    def set_default_device(device: mx.Device | mx.DeviceType) -> None:
        devices[-1] = GPU if device in (GPU, mx.gpu) else CPU

    class StreamContext:
        """What ``mx.stream`` returns, which may be entered again and again."""

        def __init__(self, where: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType):
            self.device = GPU if where in (GPU, mx.gpu) else CPU
            self.context = use_stream(mx.cpu if self.device == GPU else where)

        def __enter__(self) -> None:
            devices.append(self.device)
            self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)
            devices.pop()

    cpu.is_available()  # loads the C++ that knows a tracer: Python cannot where nothing is compiled
    mx.disable_compile()
    try:
        with (
            metal_emulator.Emulator(schedules=("forward",)),
            mock.patch.object(mx, "default_device", default_device),
            mock.patch.object(mx, "set_default_device", set_default_device),
            mock.patch.object(mx, "stream", StreamContext),
        ):
            yield
    finally:
        mx.enable_compile()
