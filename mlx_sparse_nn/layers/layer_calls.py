"""The block-sparse layers of a model, and what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.core.checks import check_model
from mlx_sparse_nn.layers.linear import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import SparseLinear


def sparse_layers(owner: str, model: nn.Module) -> dict[str, BlockSparseLinear]:
    """Return the block-sparse layers of a model by path; one that is used at several paths, once.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is none.
    """
    return _layers(owner, model, BlockSparseLinear)


def all_sparse_layers(owner: str, model: nn.Module) -> dict[str, SparseLinear]:
    """Return the same with quantized layers among them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is none.
    """
    return _layers(owner, model, BlockSparseLinear, QuantizedBlockSparseLinear)


def _layers(owner: str, model: nn.Module, *kinds: type) -> dict[str, Any]:
    check_model(owner, model)
    layers, seen = {}, set()
    for path, module in reversed(model.named_modules()):
        if isinstance(module, kinds) and id(module) not in seen:
            seen.add(id(module))
            layers[path] = module
    if not layers:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"[{owner}] the model has no {names} layer")
    return layers


@contextmanager
def observed(layers: Mapping[str, nn.Module], observe: Callable) -> Iterator[None]:
    """Call ``observe(path, x, y)`` for each call of a layer, which returns what that returns."""
    paths = list(layers)

    def call(number: int, layer: nn.Module, run: Callable, x: mx.array) -> mx.array:
        return observe(paths[number], x, run(layer, x))

    with intercepted(list(layers.values()), call):
        yield


@contextmanager
def intercepted(modules: Sequence[nn.Module], call: Callable) -> Iterator[None]:
    """Let ``call(number, module, run, *args, **kwargs)`` answer for modules that are called.

    ``number`` is the module's place among ``modules``, and ``run(module, *args, **kwargs)`` its own
    answer. Python looks ``__call__`` up in the class, so each module gets a subclass of its own for
    a while: it stays the same object, wherever the model refers to it.
    """
    classes = [type(module) for module in modules]

    def answering(number: int, kind: type[nn.Module]) -> type[nn.Module]:
        def answer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(number, module, kind.__call__, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__call__": answer})

    try:
        for number, module in enumerate(modules):
            object.__setattr__(module, "__class__", answering(number, classes[number]))
        yield
    finally:
        for module, kind in zip(modules, classes, strict=True):
            object.__setattr__(module, "__class__", kind)
