"""What an optimizer keeps for the blocks of a layer, and how it follows a new pattern."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_sparse_nn.core.blocks import move_blocks
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.linear import BlockSparseLinear


def moments_of(
    owner: str, optimizer: optim.Optimizer | None, model: nn.Module, layer: BlockSparseLinear
) -> list[dict[str, Any]]:
    """Return what ``optimizer`` keeps for the weight of ``layer``: the dicts in its own state.

    All optimizers of MLX keep arrays whose first axis runs over the blocks: of the weight's shape,
    or, for Adafactor, its means over an axis of each block.

    Raises:
        TypeError: ``optimizer`` is not an Optimizer.
        ValueError: It has been used, but not for this layer in this model, or it keeps an array
            that does not run over the blocks.
    """
    if optimizer is None:
        return []
    if not isinstance(optimizer, optim.Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"[{owner}] optimizer must be an mlx Optimizer, got {kind}")
    paths = [path for path, module in model.named_modules() if module is layer]
    weights = [f"{path}.weight".lstrip(".") for path in paths]
    trees = list(_states(optimizer))
    found = [leaf for tree in trees for weight in weights if (leaf := _at(tree, weight))]
    used = any(isinstance(value, dict | list) for tree in trees for value in tree.values())
    if used and not found and "weight" in layer.trainable_parameters():
        raise ValueError(
            f"[{owner}] optimizer.state has nothing for {weights[0]}: "
            "pass the optimizer that updates this model"
        )
    for state in found:
        for name, value in state.items():
            shape = getattr(value, "shape", None)
            if shape is None or (shape and shape[0] != layer.pattern.n_blocks):
                raise ValueError(
                    f"[{owner}] optimizer.state of {weights[0]} holds {name} of shape {shape}, "
                    f"whose first axis does not run over the {layer.pattern.n_blocks} blocks: "
                    "it cannot follow the new pattern"
                )
    return found


def change_pattern(
    layer: BlockSparseLinear, pattern: CSRPattern, moments: list[dict[str, Any]]
) -> None:
    """Give ``layer`` another pattern, and move the arrays of :func:`moments_of` along, in place."""
    source = layer.set_pattern(pattern)
    for state in moments:
        for name, value in state.items():
            if value.ndim:
                state[name] = move_blocks(value, source)


def _states(optimizer: optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Yield the states of an optimizer, or of all those that a MultiOptimizer is made of."""
    if isinstance(optimizer, optim.MultiOptimizer):
        for part in optimizer.optimizers:
            yield from _states(part)
    else:
        yield optimizer.state


def _at(tree: Any, path: str) -> dict[str, Any] | None:
    """Return what lies at a dotted path of dicts and lists; None if nothing does."""
    for key in path.split("."):
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, list | tuple):
            tree = tree[int(key)] if int(key) < len(tree) else None
        else:
            return None
    return tree
