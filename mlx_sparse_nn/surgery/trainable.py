"""Trainable parameters in a file of their own, with the patterns that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sparse_nn.core.checks import check_model
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.checkpoints import (
    Arrays,
    check_described,
    load_arrays,
    modules_of,
    save_arrays,
)
from mlx_sparse_nn.layers.pattern_module import BLOCKWISE, PatternModule

_Model = TypeVar("_Model", bound=nn.Module)


def save_trainable(model: nn.Module, file: str | Path) -> None:
    """Save the trainable parameters of a model, and the patterns of what is sparse among them.

    Trained blocks belong to the places of their pattern, which is not trainable and so not among
    ``model.trainable_parameters()``. The metadata of the file names the patterns of frozen layers
    too: what was trained beside them fits no others.

    Args:
        model: The model.
        file: Where to write, ending in ``.safetensors``.

    Raises:
        TypeError: ``model`` is not a module, or ``file`` is no path.
        ValueError: Nothing is trainable, a layer was emptied, or the file has another ending.

    Example:
        >>> model.freeze()
        >>> model.layers[2].unfreeze()
        >>> save_trainable(model, "head.safetensors")
        >>> load_trainable(model, "head.safetensors")  # into the same model, built anew
    """
    owner = "save_trainable"
    check_model(owner, model)
    name = _name(owner, file)
    if not name.endswith(".safetensors"):
        raise ValueError(f"[{owner}] file must end in .safetensors, got {name!r}")
    arrays = _flat(model.trainable_parameters())
    if not arrays:
        raise ValueError(f"[{owner}] nothing in the model is trainable")
    layers = modules_of(model, PatternModule)
    patterns = {path: layer.pattern for path, layer in layers.items()}
    for path, layer in layers.items():
        prefix = f"{path}." if path else ""
        if f"{prefix}weight" in arrays:
            arrays |= {f"{prefix}indptr": layer["indptr"], f"{prefix}indices": layer["indices"]}
    save_arrays(name, arrays, patterns)


def load_trainable(model: _Model, file: str | Path) -> _Model:
    """Load what :func:`save_trainable` saved. Layers take over their patterns, of any density.

    Everything is checked first; after an error the model is as it was. A file that somebody else
    wrote is loaded too. If it holds no pattern, the values go to the places of the model's.

    Args:
        model: The model, changed in place. Layers that are sparse in the file are sparse in it.
        file: A file that ``mx.load`` reads.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, ``file`` is no path, or the file is not a dict of
            arrays or holds one of the wrong dtype.
        ValueError: The file has a name that the model has not, or lacks a trainable one, an array
            does not fit, or a layer that the file says nothing else of has another pattern.
    """
    owner = "load_trainable"
    check_model(owner, model)
    arrays, described = load_arrays(owner, _name(owner, file))
    current, layers = _flat(model.parameters()), modules_of(model, PatternModule)
    for path in described:
        if path not in layers:
            raise ValueError(f"[{owner}] {path} is sparse in the file, and not in the model")
    if unknown := sorted(arrays.keys() - current.keys()):
        raise ValueError(f"[{owner}] the file has {_some(unknown)}, which the model has not")
    if missing := sorted(_flat(model.trainable_parameters()).keys() - arrays.keys()):
        raise ValueError(f"[{owner}] the file has no {_some(missing)}, which the model trains")
    patterns = {path: _pattern(owner, path, layer, arrays) for path, layer in layers.items()}
    for path, saved in described.items():
        check_described(owner, path, saved, patterns[path])
    _check_shared(owner, layers, patterns)
    _check_arrays(owner, arrays, current, patterns)
    changed = [path for path, pattern in patterns.items() if pattern != layers[path].pattern]
    before = model.parameters()
    try:
        for path in changed:
            for key in ("indptr", *BLOCKWISE):
                if key in layers[path]:
                    layers[path][key] = mx.array([])  # then it takes any number of blocks
        model.load_weights(list(arrays.items()), strict=False)
    except Exception:
        model.update(before)
        raise
    return model


def _pattern(owner: str, path: str, layer: PatternModule, arrays: Arrays) -> CSRPattern:
    """Return the pattern that a layer has after a load: the file's, if there is one."""
    prefix = f"{path}." if path else ""
    held = [f"{prefix}{name}" in arrays for name in ("indptr", "indices")]
    if not any(held):
        return layer.pattern
    if not all(held):
        raise ValueError(f"[{owner}] the file has one of {prefix}indptr and {prefix}indices alone")
    sizes = layer.pattern.shape, layer.block_size
    try:
        pattern = CSRPattern(arrays[f"{prefix}indptr"], arrays[f"{prefix}indices"], *sizes)
    except (TypeError, ValueError) as error:
        raise type(error)(f"[{owner}] {path or 'the layer'}: {error}") from error
    names = [prefix + key for key in BLOCKWISE if key in layer]
    if pattern != layer.pattern and (missing := [name for name in names if name not in arrays]):
        raise ValueError(
            f"[{owner}] the file has another pattern for {_some(missing)} and no values"
        )
    return pattern


def _check_shared(
    owner: str, layers: dict[str, PatternModule], patterns: dict[str, CSRPattern]
) -> None:
    """Raise if the file has two patterns for a layer that the model holds at two paths."""
    first: dict[int, str] = {}
    for path, layer in layers.items():
        other = first.setdefault(id(layer), path)
        if patterns[path] != patterns[other]:
            raise ValueError(
                f"[{owner}] {other} and {path} are one layer in the model, and have two patterns "
                "in the file"
            )


def _check_arrays(
    owner: str, arrays: Arrays, current: Arrays, patterns: dict[str, CSRPattern]
) -> None:
    """Raise unless each array fits the parameter of its name, with the blocks of these patterns."""
    for name, array in arrays.items():
        path, _, key = name.rpartition(".")
        expected = current[name].shape
        if path in patterns and key in BLOCKWISE:
            expected = (patterns[path].n_blocks, *expected[1:])
        if array.shape != expected:
            raise ValueError(f"[{owner}] {name} has shape {array.shape}, expected {expected}")
        kinds = [mx.issubdtype(a.dtype, mx.inexact) for a in (array, current[name])]
        if kinds[0] != kinds[1]:
            raise TypeError(
                f"[{owner}] {name} has dtype {array.dtype}, expected {current[name].dtype}"
            )


def _flat(tree: object) -> Arrays:
    return tree_flatten(tree, destination={})  # type: ignore[return-value]


def _name(owner: str, file: str | Path) -> str:
    if not isinstance(file, str | Path):
        raise TypeError(f"[{owner}] file must be a path, got {type(file).__name__}")
    return str(file)


def _some(names: list[str]) -> str:
    """Return the first of some names, and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
