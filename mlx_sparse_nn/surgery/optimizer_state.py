"""What an optimizer keeps for the blocks of a layer, and how it follows a new pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_sparse_nn.core.blocks import move_blocks, sample, todense
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
    found, weight = _states_of(owner, optimizer, model, layer)
    for state in found:
        for name, value in state.items():
            shape = getattr(value, "shape", None)
            if shape is None or (shape and shape[0] != layer.pattern.n_blocks):
                raise ValueError(
                    f"[{owner}] optimizer.state of {weight} holds {name} of shape {shape}, "
                    f"whose first axis does not run over the {layer.pattern.n_blocks} blocks: "
                    "it cannot follow the new pattern"
                )
    return found


@dataclass(frozen=True)
class NewMoments:
    """Moments for the weights of new layers, and where they belong in an optimizer's state."""

    arrays: list[tuple[dict[str, Any], str, mx.array]]

    def put(self) -> list[mx.array]:
        """Write them into the state, and return them."""
        for state, name, array in self.arrays:
            state[name] = array
        return [array for _, _, array in self.arrays]


def reshape_moments(
    owner: str,
    optimizer: optim.Optimizer | None,
    model: nn.Module,
    old: Sequence[nn.Module],
    new: Sequence[nn.Module],
) -> NewMoments:
    """Return what ``optimizer`` keeps for dense weights as it is for their blocks, or vice versa.

    Args:
        owner: Who errors speak for.
        optimizer: The optimizer that updates ``model``.
        model: Holds the layers ``old``.
        old, new: Each layer, and the one that takes its place: one of both is block-sparse.

    Raises:
        TypeError: ``optimizer`` is not an Optimizer.
        ValueError: It has been used, but not for a layer in this model; it keeps an array that is
            not of the weight's shape; or a MultiOptimizer would give the new weight to another.
    """
    arrays = []
    before: Any
    after: Any
    for before, after in zip(old, new, strict=True):
        states, weight = _states_of(owner, optimizer, model, before)
        if states:
            _check_same_part(owner, optimizer, weight, before.weight, after.weight)
        for state in states:
            for name, value in state.items():
                shape = getattr(value, "shape", None)
                if shape == ():  # a number for the whole weight stays as it is
                    continue
                if shape != before.weight.shape:
                    raise ValueError(
                        f"[{owner}] optimizer.state of {weight} holds {name} of shape {shape}, not "
                        f"the weight's {before.weight.shape}: it cannot follow; make the optimizer "
                        f"after {owner}"
                    )
                arrays.append((state, name, _reshaped(owner, value, before, after)))
    return NewMoments(arrays)


def _reshaped(owner: str, value: mx.array, before: Any, after: Any) -> mx.array:
    """Return an array of the shape of one weight as it is for the other."""
    if isinstance(after, BlockSparseLinear):
        return sample(after.pattern.layout, value[None])[0]
    before.pattern.check_unique(owner)  # whose moments would those of two equal blocks be?
    return todense(before.pattern.layout, value[None])[0]


def _states_of(
    owner: str, optimizer: optim.Optimizer | None, model: nn.Module, layer: nn.Module
) -> tuple[list[dict[str, Any]], str]:
    """Return the dicts in an optimizer's own state for the weight of a layer, and its first path.

    Raises:
        TypeError: ``optimizer`` is not an Optimizer.
        ValueError: It has been used, but not for this layer in this model.
    """
    if optimizer is None:
        return [], ""
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
    return found, weights[0]


def change_pattern(
    layer: BlockSparseLinear, pattern: CSRPattern, moments: list[dict[str, Any]]
) -> np.ndarray:
    """Give ``layer`` another pattern, and move the arrays of :func:`moments_of` along, in place.

    Returns:
        What :meth:`BlockSparseLinear.set_pattern` returns.
    """
    source = layer.set_pattern(pattern)
    for state in moments:
        for name, value in state.items():
            if value.ndim:
                state[name] = move_blocks(value, source)
    return source


def _check_same_part(
    owner: str, optimizer: Any, path: str, before: mx.array, after: mx.array
) -> None:
    """Raise if the filters of a MultiOptimizer send a weight elsewhere in its new shape."""
    if _part(optimizer, path, before) != _part(optimizer, path, after):
        raise ValueError(
            f"[{owner}] a filter of the MultiOptimizer gives {path} of shape {after.shape} to "
            f"another optimizer than of shape {before.shape}: its state cannot follow; make the "
            f"optimizer after {owner}"
        )


def _part(optimizer: optim.Optimizer, path: str, weight: mx.array) -> tuple[int, ...]:
    """Return which optimizer in a MultiOptimizer takes a weight: its place at each level."""
    if not isinstance(optimizer, optim.MultiOptimizer):
        return ()
    i = next(i for i, takes in enumerate(optimizer.filters) if takes(path, weight))
    return i, *_part(optimizer.optimizers[i], path, weight)


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
