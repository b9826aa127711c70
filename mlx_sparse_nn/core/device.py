"""Choosing the device that MLX runs on."""

from __future__ import annotations

import mlx.core as mx


def use_cpu() -> None:
    """Make the CPU MLX's default device."""
    use_device("cpu")


def use_gpu() -> None:
    """Make the GPU MLX's default device.

    Raises:
        RuntimeError: This MLX has no GPU backend, or the machine has no GPU.
    """
    use_device("gpu")


def use_device(device: str | mx.Device | mx.DeviceType) -> None:
    """Make ``device`` MLX's default device, as ``mx.set_default_device`` does, but checked.

    Args:
        device: ``"cpu"`` or ``mx.cpu``, ``"gpu"`` or ``mx.gpu``, or an ``mx.Device``.

    Raises:
        RuntimeError: It is a GPU and there is none.
        TypeError: It is neither a string nor a device.
        ValueError: It is another string.
    """
    if isinstance(device, str):
        if device not in ("cpu", "gpu"):
            raise ValueError(f"[use_device] device must be 'cpu' or 'gpu', got {device!r}")
        device = mx.Device(mx.cpu if device == "cpu" else mx.gpu)
    elif isinstance(device, mx.DeviceType):
        device = mx.Device(device)
    if not isinstance(device, mx.Device):
        raise TypeError(f"[use_device] device must be 'cpu', 'gpu' or an mx.Device, got {device!r}")
    if device.type == mx.gpu and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise RuntimeError(
            "[use_device] no GPU is available to MLX. On Linux with an NVIDIA GPU install "
            "'mlx[cuda13]' (or mlx[cuda12]) in place of mlx[cpu]; a Mac needs Apple silicon"
        )
    mx.set_default_device(device)
