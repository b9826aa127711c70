"""Products that are asked for again and again: MLX holds their graph, and no Python leads to it.

A launch outside of ``mx.compile`` passes MLX its template and its source anew each time, after the
Python that chose it. For few rows of x that takes longer than the kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from mlx_sparse_nn.core.transforms import replayed, tracing


class Replay(threading.local):
    """A function of arrays that is traced once for each of their shapes and dtypes.

    Each thread has graphs of its own, which go before it ends; see ``Tracing.probe``.

    Args:
        function: Returns an array, and nothing else depends on what it reads but its arguments.
    """

    def __init__(self, function: Callable[..., mx.array]):
        noted = replayed(function)

        def run(witness: mx.array, *arrays: mx.array) -> mx.array | None:
            return noted(*arrays) if _is_traced(witness) else None

        self._run = mx.compile(run)

    def __call__(self, *arrays: mx.array) -> mx.array | None:
        """Return the function's result, or None where a transform traces one of the arrays: it has
        to see the function itself, and the rules of its derivatives."""
        if tracing.graph is not None or tracing.refuses_kernels:
            return None
        return self._run(_witness(), *arrays)


def _is_traced(witness: mx.array) -> bool:
    """Return whether MLX traces all arguments, and not only some of them for another transform."""
    try:
        memoryview(witness)
    except RuntimeError:
        return True
    return False


@cache
def _witness() -> mx.array:
    return mx.array(0.0)
