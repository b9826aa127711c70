"""What the package changes in MLX, and why; and what it asks MLX while a transform is running.

Importing the package changes nothing. Some functions are replaced later, when each is first needed,
since MLX (0.32.4) has no other way:

- ``mx.vmap`` notes when it traces, from the first layout on (:func:`note_vmap`). MLX maps every
  operation that a mapped function traces, those inside a ``custom_function`` included, and raises
  at a kernel, although it then uses the function's own rule alone.
- ``mx.array.__matmul__`` and ``mx.array.__mul__`` return ``NotImplemented`` for a sparse array, as
  Python's protocol asks, from the first sparse array on (:func:`defer_to`). MLX's raise instead, so
  that Python would never try ``A.__rmatmul__`` or ``A.__rmul__``.
- ``nn.Module.load_weights`` and ``save_weights`` know of patterns, from the first layer on
  (:func:`wrap_module_method`). A load writes array by array: what a layer refuses, it refuses when
  others have been written, and only who called it can put those back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _State(threading.local):
    """What is known of the transforms of one thread."""

    # Whether MLX takes an array for a tracer, if there is somebody to ask; of all threads.
    is_tracer: Callable[[mx.array], bool] | None = None

    def __init__(self):
        self.vmaps = 0  # calls of mx.vmap that are tracing their function
        # A probe of each thread's own: what MLX has compiled in a thread has to go before the
        # thread ends, since MLX would wait for Python where the interpreter may be shutting down.
        seen: list[mx.array] = []  # what the probe's Python was called with
        self.probe = mx.compile(seen.append), seen


_state = _State()


def transforming() -> bool:
    """Return whether a transform of MLX is running in this thread: mx.grad, mx.compile, or alike.

    An array kept from a trace counts as a tracer while any transform is running. C++ can ask MLX
    whether it does (:func:`ask_directly`). Python cannot, but MLX runs the Python of a compiled
    function again only for tracers. The first call in a thread or on a device always runs it: hence
    the second call. Where compilation is disabled, this answer is always True.
    """
    if _state.is_tracer is not None:
        return _state.is_tracer(_tracer())
    probe, seen = _state.probe
    seen.clear()
    probe(_tracer())
    if seen:
        seen.clear()
        probe(_tracer())
    return bool(seen)


def ask_directly(is_tracer: Callable[[mx.array], bool]) -> None:
    """Let :func:`transforming` ask by a function that says whether MLX takes an array for a tracer.

    It must not be a Python function, which would become a method.
    """
    _State.is_tracer = is_tracer


def vmapping() -> bool:
    """Return whether ``mx.vmap`` is tracing a function in this thread, so that no kernel may run.

    The products' own rule for ``vmap`` then computes the mapped ones, by kernels.
    """
    return _state.vmaps > 0


@cache
def note_vmap() -> None:
    """Make ``mx.vmap`` note when it traces."""
    mlx_vmap = mx.vmap

    @wraps(mlx_vmap)
    def vmap(fun: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
        def traced(*args):
            _state.vmaps += 1
            try:
                return fun(*args)
            finally:
                _state.vmaps -= 1

        return mlx_vmap(traced, in_axes, out_axes)

    mx.vmap = vmap


@cache
def defer_to(sparse: type) -> None:
    """Make ``x @ A`` and ``x * A`` ask ``A``, of the class ``sparse``, where x is an MLX array."""
    for name in ("__matmul__", "__mul__"):
        setattr(mx.array, name, _deferring(getattr(mx.array, name), sparse))


def _deferring(method: Callable, sparse: type) -> Callable:
    @wraps(method)
    def deferring(self: mx.array, other: Any) -> Any:
        return NotImplemented if isinstance(other, sparse) else method(self, other)

    return deferring


@cache
def wrap_module_method(name: str, wrapper: Callable, *arguments: Any) -> None:
    """Make a method of all modules call ``wrapper(method, *arguments, module, ...)``."""
    method = getattr(nn.Module, name)

    @wraps(method)
    def wrapped(self: nn.Module, *args, **kwargs):
        return wrapper(method, *arguments, self, *args, **kwargs)

    setattr(nn.Module, name, wrapped)


@cache
def _tracer() -> mx.array:
    """Return an array kept from a trace."""
    kept = []
    mx.vjp(lambda a: kept.append(-a) or a, [mx.array(0.0)], [mx.array(0.0)])
    return kept[0]
