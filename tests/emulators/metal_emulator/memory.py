"""MLX arrays as host memory and back."""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .launch import INPUT, OUTPUT, HostBuffer

# Outputs start as this byte, so that a stale one is seen: NaN in every float type.
POISON = 0xFF
_NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.bfloat16: np.uint16,  # its bits
}


def _numpy_dtype(dtype: mx.Dtype) -> npt.DTypeLike:
    if dtype not in _NUMPY:
        raise TypeError(f"the emulator has no {dtype}")
    return _NUMPY[dtype]


def to_mlx(array: npt.NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """Copies host memory to an MLX array; bfloat16 comes as its bits."""
    x = mx.array(array)
    return x.view(dtype) if dtype == mx.bfloat16 else x


def to_numpy(x: mx.array) -> npt.NDArray[np.generic]:
    """An array's own memory, evaluated; bfloat16 as its bits.

    Raises:
        RuntimeError: under `mx.compile` and `mx.vmap`, which cannot evaluate.
    """
    _numpy_dtype(x.dtype)
    try:
        if x.dtype == mx.bfloat16:
            x = x.view(mx.uint16)
        mx.eval(x)
    except ValueError as error:
        raise RuntimeError(
            "the Metal emulator runs kernels eagerly: it needs the values of its inputs, which "
            "mx.compile and mx.vmap do not have (use mx.disable_compile)"
        ) from error
    # An array is a buffer, which the stubs of MLX do not say.
    return np.asarray(memoryview(x))  # pyright: ignore[reportArgumentType]


@functools.cache
def _allocator_skew() -> int:
    """The address modulo 16 of MLX's own allocations on the CPU; on Metal it is 0."""
    return to_numpy(mx.zeros(64)).ctypes.data % 16


def input_buffers(
    kernel: str, name: str, x: mx.array, body: str, ensure_row_contiguous: bool
) -> list[HostBuffer]:
    """An input and those of its shape, strides and ndim that the kernel's text mentions.

    Args:
        kernel: the kernel's name, for errors.
        name: the input's name.
        x: the input, any dtype but complex64.
        body: the kernel's body, which MLX searches for `<name>_shape` and the like.
        ensure_row_contiguous: copy the input if it is not row contiguous, as MLX does.
    """
    array = to_numpy(x)
    skew = (array.ctypes.data - _allocator_skew()) % 16
    if ensure_row_contiguous and not array.flags.c_contiguous:
        array, skew = np.ascontiguousarray(array), 0
    if min(array.strides, default=0) < 0:
        raise NotImplementedError(f"[{kernel}] {name} has negative strides")
    reach = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
    size = reach + array.itemsize if array.size else 0
    buffers = [HostBuffer(name, array, INPUT, skew, size)]
    if x.ndim:
        strides = [s // array.itemsize for s in array.strides]
        for suffix, value in (
            ("_shape", np.array(x.shape, np.int32)),
            ("_strides", np.array(strides, np.int64)),
            ("_ndim", np.array([x.ndim], np.int32)),
        ):
            if name + suffix in body:
                buffers.append(
                    HostBuffer(name + suffix, value, INPUT, 0, value.nbytes, argument=True)
                )
    return buffers


def output_buffer(
    name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None
) -> HostBuffer:
    """An output, poisoned or filled with `init_value`."""
    array = np.empty(tuple(shape), _numpy_dtype(dtype))
    if init_value is None:
        array.reshape(-1).view(np.uint8)[:] = POISON
    else:
        array[...] = to_numpy(mx.array(init_value).astype(dtype))
    return HostBuffer(name, array, OUTPUT, 0, array.nbytes, initialised=init_value is not None)
