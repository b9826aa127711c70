"""Rebuild the sparse layers of a model from a checkpoint: the checkpoint carries the patterns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_sparse_nn.core.checks import check_array, check_model
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.linear import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import SparseLinear
from mlx_sparse_nn.layers.pattern_module import carry_mode

Weights: TypeAlias = "str | Path | dict[str, mx.array]"

_Model = TypeVar("_Model", bound=nn.Module)

_NAMES = ("weight", "scales", "biases", "bias", "indptr", "indices")


def restore(model: _Model, weights: Weights) -> _Model:
    """Load a checkpoint into a model, making those layers sparse that are sparse in the checkpoint.

    ``load_weights`` alone needs a model whose layers are sparse already, with as many blocks. This
    takes the model as its class builds it, dense. Everything that is read is checked; after an
    error the model is as it was.

    Args:
        model: The model, changed in place. Where the checkpoint has a sparse layer it has an
            ``nn.Linear``, or a block-sparse layer of any pattern, of the same dims.
        weights: A file that ``mx.load`` reads, a directory of ``model*.safetensors`` as mlx-lm
            saves it, or a dict of arrays by name. The names are those of ``model.parameters()``.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: A directory holds no ``model*.safetensors``.
        TypeError: ``model`` is not a module, an array has the wrong dtype, or the file is not a
            dict of arrays.
        ValueError: A sparse layer of the checkpoint does not fit the model or itself, or a name is
            missing or left over.

    Example:
        >>> restore(model, "sparse.safetensors")  # saved by model.save_weights
    """
    check_model("restore", model)
    weights = _read("restore", weights)
    replaced = _replace("restore", model, weights)
    try:
        model.load_weights(list(weights.items()))
    except Exception:
        _update(model, replaced)
        raise
    return model


def restore_patterns(model: _Model, weights: Weights) -> _Model:
    """Make layers sparse as :func:`restore` does, and leave all values to be loaded.

    For a loader that calls ``load_weights`` itself, such as ``mlx_lm.load``. A directory whose
    ``config.json`` names a quantization is of a loader that quantizes layers too: those that are
    sparse are left to it unquantized.

    Args, Returns, Raises: As :func:`restore`.
    """
    check_model("restore_patterns", model)
    _replace("restore_patterns", model, _read("restore_patterns", weights))
    if _loader_quantizes(weights):
        layers: dict[str, nn.Module] = {
            path: module.to_block_sparse()
            for path, module in model.named_modules()
            if isinstance(module, QuantizedBlockSparseLinear)
        }
        _update(model, layers)
    return model


def _loader_quantizes(weights: Weights) -> bool:
    """Return whether mlx-lm, which loads these weights, quantizes the layers before it does so."""
    if not isinstance(weights, str | Path) or not (file := Path(weights) / "config.json").is_file():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8")).get("quantization"))


def _read(owner: str, weights: Weights) -> dict[str, mx.array]:
    if isinstance(weights, str | Path):
        path = Path(weights)
        files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"[{owner}] no model*.safetensors in {path}")
        weights = {}
        for file in files:
            arrays = mx.load(str(file))
            if not isinstance(arrays, dict):
                raise TypeError(f"[{owner}] {file} holds an array without a name")
            weights |= arrays
    if not isinstance(weights, dict):
        raise TypeError(f"[{owner}] weights must be a path or a dict, got {type(weights).__name__}")
    for name, array in weights.items():
        check_array(owner, name, array)
    return weights


def _replace(owner: str, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, nn.Module]:
    """Put the sparse layers of a checkpoint into a model, and return those that were there."""
    modules = dict(model.named_modules())
    layers: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}  # a layer that the model holds at several paths stays one layer
    for path in _sparse_paths(weights):
        arrays = {name: weights[f"{path}.{name}"] for name in _NAMES if f"{path}.{name}" in weights}
        try:
            if path not in modules:
                raise ValueError("the model has no such layer")
            layer = _sparse_layer(modules[path], arrays)
        except (TypeError, ValueError) as error:
            raise type(error)(f"[{owner}] {path} is sparse in the checkpoint: {error}") from error
        layers[path] = made.setdefault(id(modules[path]), layer)
    _update(model, layers)
    return {path: modules[path] for path in layers}


def _update(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    model.update_modules(tree_unflatten(list(layers.items())))


def _sparse_paths(weights: dict[str, mx.array]) -> list[str]:
    """Return the paths under which the checkpoint has both index arrays."""
    paths = [name.removesuffix(".indptr") for name in weights if name.endswith(".indptr")]
    return [path for path in paths if f"{path}.indices" in weights]


def _sparse_layer(module: nn.Module, arrays: dict[str, mx.array]) -> nn.Module:
    """Return a layer of the dims of ``module`` that can load ``arrays``, or raise."""
    shape = _weight_shape(module)
    quantized = "scales" in arrays
    for name in ("weight", "scales", "biases") if quantized else ("weight",):
        if name not in arrays:
            raise ValueError(f"{name} is missing")
    size = arrays["weight"].shape
    if len(size) not in (1, 3) or 0 in size[1:]:
        raise ValueError(f"weight has shape {size}, expected blocks (n, B, B) or values (n,)")
    block_size = size[1] if len(size) == 3 else 1
    pattern = CSRPattern(arrays["indptr"], arrays["indices"], shape, block_size)
    if quantized:
        groups = arrays["scales"].shape[-1] if arrays["scales"].ndim else 0
        layer = QuantizedBlockSparseLinear(
            pattern,
            bias="bias" in arrays,
            group_size=block_size // max(1, groups),
            bits=size[-1] * 32 // block_size,
        )
    else:
        layer = BlockSparseLinear(shape[1], shape[0], pattern, bias="bias" in arrays)
    for name, array in arrays.items():
        expected = layer[name]
        if array.shape != expected.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {expected.shape}")
        if mx.issubdtype(expected.dtype, mx.floating) != mx.issubdtype(array.dtype, mx.inexact):
            raise TypeError(f"{name} has dtype {array.dtype}, expected {expected.dtype}")
    return carry_mode(module, layer)


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return ``(output_dims, input_dims)`` of a linear layer, dense or block-sparse."""
    if isinstance(module, SparseLinear):
        return module.pattern.shape
    if type(module) is nn.Linear:
        output_dims, input_dims = module.weight.shape
        return output_dims, input_dims
    raise ValueError(f"expected an nn.Linear in the model, got {type(module).__name__}")
