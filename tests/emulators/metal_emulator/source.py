"""The exact Metal source that MLX compiles for a call of a kernel, on any machine.

While a function is traced by `mx.export_function`, MLX accepts a Metal kernel without a GPU, and
`verbose=True` prints what it would compile. That text comes from C++, so it is caught at the level
of the file descriptor.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

SMALL = 8  # MLX passes inputs of fewer elements in the constant address space


def stand_in(x: mx.array) -> mx.array:
    """The smallest array that MLX declares like `x` in a kernel's signature."""
    small = x.size < SMALL
    return mx.zeros((1 if small else SMALL,) + (1,) * (x.ndim - 1) if x.ndim else (), x.dtype)


def signature_key(inputs: Sequence[mx.array]) -> tuple[object, ...]:
    """What the generated source depends on: dtype, scalar or not, small or not."""
    return tuple((x.dtype, x.ndim == 0, x.size < SMALL) for x in inputs)


def trace_source(kernel: Callable[..., list[mx.array]], call: dict[str, Any]) -> str:
    """Prints and catches the source of one call of MLX's own kernel.

    Args:
        kernel: what MLX's own `mx.fast.metal_kernel` returned.
        call: the keywords of the call; `inputs` are arrays.

    Returns:
        Header, signature and body as MLX joins them, without its utilities.
    """
    call = {**call, "verbose": True}
    inputs = [stand_in(x) for x in call.pop("inputs")]

    def traced(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), **call)

    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "stdout")
        descriptor = os.open(printed, os.O_RDWR | os.O_CREAT)
        try:
            os.dup2(descriptor, 1)
            mx.export_function(str(Path(folder, "kernel.mlxfn")), traced, *inputs)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            os.close(descriptor)
        text = printed.read_text()
    match = re.search(r"Generated source code for `.*?`:\n```\n(.*)\n```\n", text, re.DOTALL)
    if match is None:
        raise RuntimeError(f"MLX printed no source, but {text!r}")
    return match.group(1)
