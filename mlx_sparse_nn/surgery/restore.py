"""Rebuild the sparse layers of a model from a checkpoint: the checkpoint carries the patterns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_sparse_nn.core.checks import check_array, check_model
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.layers.checkpoints import Described, check_described, load_arrays
from mlx_sparse_nn.layers.linear import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear, SparseLinear
from mlx_sparse_nn.layers.parameters import linear_shape
from mlx_sparse_nn.layers.pattern_module import carry_mode

Weights: TypeAlias = "str | Path | dict[str, mx.array]"

_Model = TypeVar("_Model", bound=nn.Module)

# Modes of MLX that have scales alone, by group size and bits.
_SCALED_MODES = {(32, 4): "mxfp4", (32, 8): "mxfp8", (16, 4): "nvfp4"}
_NAMES = ("weight", "scales", "biases", "bias", "indptr", "indices")


def restore(model: _Model, weights: Weights) -> _Model:
    """Load a checkpoint into a model, making those layers sparse that are sparse in the checkpoint.

    ``load_weights`` alone needs a model whose layers are sparse already, with as many blocks. This
    takes the model as its class builds it, dense. Everything that is read is checked; after an
    error the model is as it was. Other layers that are quantized in the checkpoint are quantized.

    A file of ``save_weights`` says of which dims a layer is. In others that is not said: a layer of
    fewer inputs then fits a wider one of the model.

    Args:
        model: The model, changed in place. Where the checkpoint has a sparse layer it has an
            ``nn.Linear``, quantized or not, or a block-sparse layer of any pattern, of the same
            dims, with a bias if the checkpoint has one. Where the checkpoint has adapters they are
            in the model: their scale is not saved.
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
    arrays, described = _read("restore", weights)
    _check_sparse_places("restore", model, arrays)
    replaced = _replace("restore", model, arrays, described, quantize=True)
    try:
        model.load_weights(list(arrays.items()))
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
    _replace("restore_patterns", model, *_read("restore_patterns", weights))
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


def _read(owner: str, weights: Weights) -> tuple[dict[str, mx.array], Described]:
    """Return the arrays of a checkpoint, and what it says of their patterns."""
    described: Described = {}
    if isinstance(weights, str | Path):
        path = Path(weights)
        files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"[{owner}] no model*.safetensors in {path}")
        weights = {}
        for file in files:
            arrays, of_file = load_arrays(owner, file)
            weights |= arrays
            described |= of_file
    if not isinstance(weights, dict):
        raise TypeError(f"[{owner}] weights must be a path or a dict, got {type(weights).__name__}")
    for name, array in weights.items():
        if not isinstance(name, str):
            raise TypeError(f"[{owner}] names must be strings, got {name!r}")
        check_array(owner, name, array)
    return weights, described


def _check_sparse_places(owner: str, model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Raise where a sparse layer of the model stays, and is another one in the checkpoint."""
    for path, module in model.named_modules():
        prefix, layer = (f"{path}.", path) if path else ("", "the layer")
        weight = weights.get(f"{prefix}weight")
        if not isinstance(module, SparseLinear) or weight is None:
            continue
        if f"{prefix}indptr" not in weights and f"{prefix}indices" not in weights:
            of_values = weight.ndim != 2
            helps = "load_trainable takes values alone" if of_values else "densify the model first"
            raise ValueError(
                f"[{owner}] {layer} is sparse in the model, and has no pattern in the checkpoint: "
                f"{helps}"
            )
    if "indptr" in weights and "indices" in weights and isinstance(model, SparseLinear | nn.Linear):
        held = model.indices.shape if isinstance(model, SparseLinear) else None
        if weights["indices"].shape != held:
            raise ValueError(
                f"[{owner}] the model is itself a {type(model).__name__}, in whose place no other "
                "layer can be put: call it on a module around the layer"
            )


def _replace(
    owner: str,
    model: nn.Module,
    weights: dict[str, mx.array],
    described: Described,
    quantize: bool = False,
) -> dict[str, nn.Module]:
    """Put the sparse layers of a checkpoint into a model, and return those that were there."""
    modules = dict(model.named_modules())
    layers: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}  # a layer that the model holds at several paths stays one layer
    for path in _paths_with(weights, "indptr", "indices"):
        try:
            layer = _sparse_layer(_at(path, modules, weights), _arrays(path, weights))
            place, layer = _under_adapters(path, layer, modules)
        except (TypeError, ValueError) as error:
            raise type(error)(f"[{owner}] {path} is sparse in the checkpoint: {error}") from error
        if path in described:
            check_described(owner, path, described[path], _pattern_of(layer))
        layers[place] = made.setdefault(id(modules[place]), layer)
        if _pattern_of(layers[place]) != _pattern_of(layer):
            first = next(other for other in layers if layers[other] is layers[place])
            raise ValueError(
                f"[{owner}] {first} and {place} are one layer in the model, and have two patterns "
                "in the checkpoint"
            )
    for path in _paths_with(weights, "weight", "scales") if quantize else ():
        module = modules.get(path)
        if isinstance(module, SparseLinear) or not hasattr(module, "to_quantized"):
            continue  # load_weights says what is wrong, if anything is
        if path not in layers:
            layer = _quantized(owner, path, module, _arrays(path, weights))
            layers[path] = made.setdefault(id(module), layer)
    _update(model, layers)
    return {path: modules[path] for path in layers}


def _update(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    model.update_modules(tree_unflatten(list(layers.items())))


def _paths_with(weights: dict[str, mx.array], *names: str) -> list[str]:
    """Return the paths under which the checkpoint has all these arrays."""
    first, *others = names
    paths = [name.removesuffix(f".{first}") for name in weights if name.endswith(f".{first}")]
    return [path for path in paths if all(f"{path}.{name}" in weights for name in others)]


def _arrays(path: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: weights[f"{path}.{name}"] for name in _NAMES if f"{path}.{name}" in weights}


def _at(path: str, modules: dict[str, nn.Module], weights: dict[str, mx.array]) -> nn.Module:
    """Return the module that a sparse layer replaces, or raise."""
    if path in modules:
        return modules[path]
    parent = path.rpartition(".")[0]
    if f"{parent}.lora_a" in weights:
        raise ValueError(
            f"{parent} has adapters, the model has none: put them on first, with their scale, "
            "which is not in the checkpoint"
        )
    raise ValueError("the model has no such layer")


def _under_adapters(
    path: str, layer: SparseLinear, modules: dict[str, nn.Module]
) -> tuple[str, nn.Module]:
    """Return where a sparse layer goes: into its place, or with adapters like those over it."""
    parent, _, name = path.rpartition(".")
    adapters: Any = modules[parent] if name == "linear" else None
    if adapters is None or isinstance(adapters, LoRABlockSparseLinear) or "lora_a" not in adapters:
        return path, layer
    if "m" in adapters:
        raise ValueError(f"{type(adapters).__name__} needs a dense layer")
    adapted = LoRABlockSparseLinear(layer, adapters.lora_a.shape[-1], scale=adapters.scale)
    adapted.lora_a, adapted.lora_b = adapters.lora_a, adapters.lora_b
    adapted.dropout = adapters.dropout
    adapted.freeze(recurse=False, keys=sorted(adapters._no_grad)).train(adapters.training)
    return parent, adapted


def _pattern_of(layer: Any) -> CSRPattern:
    return layer.pattern if isinstance(layer, SparseLinear) else layer.linear.pattern


def _quantized(owner: str, path: str, module: Any, arrays: dict[str, mx.array]) -> nn.Module:
    """Return a layer that is quantized as ``arrays`` are. Its values are never computed."""
    width, packed, scales = module.weight.shape[-1], arrays["weight"], arrays["scales"]
    group_size = width // max(1, math.prod(scales.shape[-1:]))
    bits = math.prod(packed.shape[-1:]) * 32 // width
    mode = "affine" if "biases" in arrays else _SCALED_MODES.get((group_size, bits), "affine")
    try:
        return module.to_quantized(group_size=group_size, bits=bits, mode=mode)
    except (TypeError, ValueError) as error:
        raise ValueError(f"[{owner}] {path} is quantized in the checkpoint: {error}") from error


def _sparse_layer(module: nn.Module, arrays: dict[str, mx.array]) -> SparseLinear:
    """Return a layer of the dims of ``module`` that can load ``arrays``, or raise."""
    shape = _weight_shape(module)
    if ("bias" in arrays) != ("bias" in module):
        owner = "checkpoint" if "bias" in arrays else "model"
        raise ValueError(f"the {owner} alone has a bias")
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
        if type(module) not in (BlockSparseLinear, QuantizedBlockSparseLinear):
            raise ValueError(
                f"{type(module).__name__} is a subclass, which may compute something else: "
                "load_weights keeps it, and takes as many blocks"
            )
        return module.output_dims, module.input_dims
    shape = linear_shape(module)
    if shape is not None and type(module) in (nn.Linear, nn.QuantizedLinear):
        return shape
    raise ValueError(f"expected an nn.Linear in the model, got {type(module).__name__}")
