"""What the package changes in MLX, and why; and what it asks MLX while a transform is running.

Importing the package changes nothing. Some functions are replaced later, when each is first needed,
since MLX (0.32.4) has no other way:

- ``mx.vmap`` notes when it maps, from the first pattern on (:func:`note_transforms`). MLX maps
  every operation that a mapped function traces, those inside a ``custom_function`` included, and
  raises at a kernel, although it then uses the function's own rule alone. Where there is no such
  rule, as of ``mx.checkpoint``, it traces the function once more.
- ``mx.export_function`` and ``mx.exporter`` note when they trace, from then on too: a file can hold
  neither a ``custom_function`` nor an operation that is not MLX's own, and MLX keeps to itself
  whether it is exporting. They and ``mx.FunctionExporter`` explain where they find one.
- ``mx.compile`` notes when it traces for every shape (``shapeless=True``), from then on too. There,
  MLX cannot tell the shape of what a ``custom_function`` gives.
- The operators ``@ * + - / == != < <= > >=`` of ``mx.array`` return ``NotImplemented`` for a
  sparse array, as Python's protocol asks, from the first sparse array on (:func:`defer_to`). MLX's
  raise instead, or say that the two differ, so that Python would never try ``A.__rmatmul__`` and
  its like.
- ``nn.Module.load_weights`` and ``save_weights`` know of patterns, from the first layer on
  (:func:`wrap_module_method`). A load writes array by array: what a layer refuses, it refuses when
  others have been written, and only who called it can put those back.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import cache, wraps
from io import StringIO
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn


class Tracing(threading.local):
    """What MLX is tracing in this thread, as far as the package has noted it.

    Attributes:
        graph: What the graph has to be: ``"exported"``, then MLX derives and maps what is inside of
            the products, and a file holds that; or ``"shapeless"``, for every shape of the
            operands, in a file or not; or None.
        refuses_kernels: Whether it can hold no kernel of a GPU: while ``mx.vmap`` is mapping, but
            for rules of our own, which compute the mapped products by kernels (:func:`of_mapped`);
            or where an exported function takes derivatives.
        refused_kernels: The same before the innermost ``mx.vmap`` that is mapping.
    """

    # Whether MLX takes an array for a tracer, if there is somebody to ask; of all threads.
    is_tracer: Callable[[mx.array], bool] | None = None

    def __init__(self):
        self.graph: Literal["exported", "shapeless"] | None = None
        self.refuses_kernels = self.refused_kernels = False
        self.is_replay = False
        # A probe of each thread's own: what MLX has compiled in a thread has to go before the
        # thread ends, since MLX would wait for Python where the interpreter may be shutting down.
        seen: list[mx.array] = []  # what the probe's Python was called with
        self.probe = mx.compile(seen.append), seen


tracing = Tracing()


def transforming() -> bool:
    """Return whether a transform of MLX is running in this thread: mx.grad, mx.compile, or alike.

    An array kept from a trace counts as a tracer while any transform is running. C++ can ask MLX
    whether it does (:func:`ask_directly`). Python cannot, but MLX runs the Python of a compiled
    function again only for tracers. The first call in a thread or on a device always runs it: hence
    the second call. Where compilation is disabled, this answer is always True.
    """
    return _is_tracer(_tracer())


def is_traced(array: mx.array) -> bool:
    """Return whether a transform that is running follows this array: its operand, or made of it.

    As of :func:`transforming`: where compilation is disabled, the answer may be True of any array.
    """
    return _is_tracer(array.reshape(-1)[:1])  # of one shape: the probe is compiled for each


def _is_tracer(array: mx.array) -> bool:
    if tracing.is_tracer is not None:
        return tracing.is_tracer(array)
    probe, seen = tracing.probe
    seen.clear()
    probe(array)
    if seen:
        seen.clear()
        probe(array)
    return bool(seen)


def needs_rules() -> bool:
    """Return whether a transform may ask for the rules of a product that is computed now.

    What ``mx.compile`` alone traces needs none: each would be an operation that computes nothing,
    and takes MLX as long as a view at every call.
    """
    if tracing.is_replay or not transforming():
        return False
    if tracing.refuses_kernels or tracing.graph is not None:
        return True
    return _may_be_derived()


def _may_be_derived() -> bool:
    """Return whether derivatives may be taken of what is traced now.

    On a GPU, MLX's drawing of an attention is another one while they are, which MLX (0.32.4) tells
    nobody otherwise. On a CPU it is not; and to draw it takes as long as a small product.
    """
    device = mx.default_device().type
    return device is mx.cpu or _draw_attention() == _attention_in_derivatives(str(device))


def _draw_attention() -> str:
    drawn, operand = StringIO(), _operand()
    attention = mx.fast.scaled_dot_product_attention(operand, operand, operand, scale=1.0)
    mx.export_to_dot(drawn, attention)
    return re.sub(r"\d+", "", drawn.getvalue())  # without addresses


@cache
def _attention_in_derivatives(device: str) -> str:
    drawings = []
    mx.vjp(lambda a: drawings.append(_draw_attention()) or a, [mx.array(0.0)], [mx.array(0.0)])
    return drawings[0]


@cache
def _operand() -> mx.array:
    """Return queries, keys and values for which MLX has kernels of both kinds."""
    operand = mx.zeros((1, 1, 128, 64), mx.float16)
    mx.eval(operand)
    return operand


def traces_every_shape() -> bool:
    """Return whether MLX traces for every shape now, noted or not: what was compiled before the
    first pattern or operator notes nothing."""
    if tracing.graph is not None:
        return tracing.graph == "shapeless"
    return transforming() and _shapes_are_open()


def replayed(fun: Callable) -> Callable:
    """Return a function during which no product needs rules: its graph is for calls without."""
    return _noted(fun, is_replay=True)


def of_mapped(rule: Callable) -> Callable:
    """Return a rule for ``mx.vmap``: its operands are none that this ``mx.vmap`` maps any more."""

    @wraps(rule, updated=())
    def noted(*args):
        return _noted(rule, refuses_kernels=tracing.refused_kernels)(*args)

    return noted


def of_numbers(function: Callable) -> Callable:
    """Return a function that reads its arrays, which ``mx.vmap`` does not map then."""
    return _noted(function, refuses_kernels=False)


def ask_directly(is_tracer: Callable[[mx.array], bool]) -> None:
    """Let :func:`transforming` ask by a function that says whether MLX takes an array for a tracer.

    It must not be a Python function, which would become a method.
    """
    Tracing.is_tracer = is_tracer


@cache
def note_transforms() -> None:
    """Make ``mx.vmap``, ``mx.compile`` and the functions that export note when they trace."""
    vmap, compile_, export, exporter = mx.vmap, mx.compile, mx.export_function, mx.exporter

    @wraps(vmap)
    def noting_vmap(fun: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
        mapped = vmap(fun, in_axes, out_axes)

        @wraps(fun, updated=())
        def noting(*args, **kwargs):
            refused = tracing.refuses_kernels
            return _noted(mapped, refuses_kernels=True, refused_kernels=refused)(*args, **kwargs)

        return noting

    @wraps(compile_)
    def noting_compile(
        fun: Callable, inputs: Any = None, outputs: Any = None, shapeless: bool = False
    ) -> Callable:
        return compile_(_shapeless(fun) if shapeless else fun, inputs, outputs, shapeless)

    @wraps(export)
    @_explaining
    def noting_export(file: Any, fun: Callable, *args, shapeless: bool = False, **others) -> None:
        export(file, _exported(fun, shapeless), *args, shapeless=shapeless, **others)

    @wraps(exporter)
    def noting_exporter(file: str, fun: Callable, *, shapeless: bool = False, **others) -> Any:
        return exporter(file, _exported(fun, shapeless), shapeless=shapeless, **others)

    mx.vmap, mx.compile = noting_vmap, noting_compile
    mx.export_function, mx.exporter = noting_export, noting_exporter
    mx.FunctionExporter.__call__ = _explaining(mx.FunctionExporter.__call__)


def _shapeless(fun: Callable) -> Callable:
    """Return a function that notes that it is being traced for every shape.

    Called inside of another trace it is not: that one's shapes are known, if it is not shapeless.
    """
    noted = _noted(fun, graph="shapeless")

    @wraps(fun, updated=())
    def traced(*args, **kwargs):
        return (noted if _shapes_are_open() else fun)(*args, **kwargs)

    return traced


def _shapes_are_open() -> bool:
    """Return whether MLX is tracing for every shape: it then broadcasts what has one shape too."""
    one, drawn = mx.array(1.0), StringIO()
    mx.export_to_dot(drawn, mx.broadcast_arrays(one, one)[0])
    return "Broadcast" in drawn.getvalue()


def _exported(fun: Callable, shapeless: bool) -> Callable:
    """Return a function that notes that it is being traced for a file."""
    noted = _noted(fun, graph="shapeless" if shapeless else "exported")
    without_kernels = _noted(noted, refuses_kernels=True)

    @wraps(fun, updated=())
    def traced(*args, **kwargs):
        try:
            return noted(*args, **kwargs)
        except ValueError as error:
            if "Not implemented for CustomKernel" not in str(error):
                raise
        # MLX has no derivative of a kernel, and cannot write ours to a file: without kernels then.
        return without_kernels(*args, **kwargs)

    return traced


def _explaining(export: Callable) -> Callable:
    """Return what exports a function, with an error that says what to do about a product of ours
    that the function has not made, but found: an operation that no file can hold."""

    @wraps(export)
    def explaining(*args, **kwargs):
        try:
            return export(*args, **kwargs)
        except ValueError as error:
            if "SparseProduct" not in str(error):  # as the primitives of C++ are called
                raise
        raise ValueError(
            "[export_function] the function reads a sparse product that was made before and is not "
            "computed yet: call mx.eval on it first"
        )

    return explaining


def _noted(fun: Callable, **notes: Any) -> Callable:
    """Return a function during which ``tracing`` has these attributes."""

    @wraps(fun, updated=())
    def noted(*args, **kwargs):
        before = {name: getattr(tracing, name) for name in notes}
        vars(tracing).update(notes)
        try:
            return fun(*args, **kwargs)
        finally:
            vars(tracing).update(before)

    return noted


@cache
def defer_to(sparse: type) -> None:
    """Make operators of an MLX array and a sparse one, of the class ``sparse``, ask that one."""
    comparisons = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
    for name in ("__matmul__", "__mul__", "__add__", "__sub__", "__truediv__", *comparisons):
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
