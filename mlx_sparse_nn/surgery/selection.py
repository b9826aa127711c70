"""Which layers of a model surgery may change, and how they are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_sparse_nn.layers.layer_calls import all_sparse_layers
from mlx_sparse_nn.layers.linear import BlockSparseLinear, why_not_linear
from mlx_sparse_nn.layers.parameters import why_always_dense
from mlx_sparse_nn.layers.pattern_module import PatternModule
from mlx_sparse_nn.surgery.weight_readers import who_reads_weight

LINEAR = (nn.Linear, nn.QuantizedLinear, nn.QQLinear, PatternModule)


def leaves_of(model: nn.Module) -> list[tuple[list[str], Any]]:
    """Return each module without modules in it once, with all its paths."""
    found: dict[int, tuple[list[str], Any]] = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        found.setdefault(id(module), ([], module))[0].append(path)
    return list(found.values())


def replace_leaves(model: nn.Module, old: Sequence[nn.Module], new: Sequence[nn.Module]) -> None:
    """Put each of ``new`` wherever the model holds that of ``old``."""
    other = {id(module): replacement for module, replacement in zip(old, new, strict=True)}
    leaves = tree_map(
        lambda m: other.get(id(m), m), model.leaf_modules(), is_leaf=nn.Module.is_module
    )
    model.update_modules(leaves)


def why_not_sparsified(
    module: nn.Module, paths: Sequence[str], modules: dict[str, nn.Module]
) -> str | None:
    """Return in words why :func:`sparsify` leaves a module alone whatever its size.

    None for an ``nn.Linear`` that is only called, and for what holds no matrix.

    Args:
        module: A module without modules in it.
        paths: Its paths in the model.
        modules: Every module of the model by path.
    """
    kind = type(module).__name__
    if isinstance(module, BlockSparseLinear):
        return f"{kind} is sparse already; prune lowers its density"
    if isinstance(module, PatternModule):
        return f"{kind} is sparse already"
    if reason := why_always_dense(module):
        return reason
    if not isinstance(module, LINEAR):
        return None
    if reason := why_not_linear(module):
        return reason
    for path in paths:
        if reader := who_reads_weight(path, modules):
            adapts = hasattr(reader.kind, "fuse")  # what mlx-lm looks for
            hint = ": fuse adapters first, or put them on afterwards" if adapts else ""
            return f"{reader} reads its weight{hint}"
    return None


def blocks_of_floats(owner: str, model: nn.Module) -> dict[str, BlockSparseLinear]:
    """Return the block-sparse layers of a model by path, to change which blocks they store.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is none, one is quantized, or one stores a block more than once.
    """
    found: dict[str, BlockSparseLinear] = {}
    for path, layer in all_sparse_layers(owner, model).items():
        name = f"{owner} {path}".rstrip()
        if not isinstance(layer, BlockSparseLinear):
            raise ValueError(
                f"[{name}] {type(layer).__name__} keeps its blocks: {owner} before "
                "nn.quantize, or put its to_block_sparse() in its place"
            )
        layer.pattern.check_unique(name)
        found[path] = layer
    return found


def nothing_around(owner: str, model: nn.Module, way_out: str) -> TypeError:
    """Return the error where a model is itself a layer that is to be replaced."""
    return TypeError(
        f"[{owner}] model is itself a {type(model).__name__}, with no module around it in which to "
        f"replace it: {way_out}"
    )
