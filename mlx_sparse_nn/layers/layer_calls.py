"""The block-sparse layers of a model, and what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.core.checks import check_model
from mlx_sparse_nn.layers.linear import BlockSparseLinear


def sparse_layers(owner: str, model: nn.Module) -> dict[str, BlockSparseLinear]:
    """Return the block-sparse layers of a model by path; one that is used at several paths, once.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is none.
    """
    check_model(owner, model)
    layers, seen = {}, set()
    for path, module in reversed(model.named_modules()):
        if isinstance(module, BlockSparseLinear) and id(module) not in seen:
            seen.add(id(module))
            layers[path] = module
    if not layers:
        raise ValueError(f"[{owner}] the model has no BlockSparseLinear layer")
    return layers


@contextmanager
def observed(layers: dict[str, BlockSparseLinear], observe: Callable) -> Iterator[None]:
    """Call ``observe(path, x, y)`` for each call of a layer, which returns what that returns.

    Python looks ``__call__`` up in the class, so each layer gets a subclass of its own for a while:
    it stays the same object, wherever the model refers to it.
    """
    classes = {path: type(layer) for path, layer in layers.items()}

    def observing(path: str, kind: type[BlockSparseLinear]) -> type[BlockSparseLinear]:
        def call(layer: BlockSparseLinear, x: mx.array) -> mx.array:
            return observe(path, x, kind.__call__(layer, x))

        return type(kind.__name__, (kind,), {"__call__": call})

    try:
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", observing(path, classes[path]))
        yield
    finally:
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", classes[path])
