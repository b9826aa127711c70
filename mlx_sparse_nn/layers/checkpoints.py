"""What a file says of its patterns, and loads that change all of a model or nothing.

A checkpoint holds the index arrays of its layers, but not their dims, and part of one may hold
values alone. Values on another pattern compute without an error. So ``save_weights`` writes dims
and a fingerprint of each pattern into the metadata of a safetensors file, and whatever reads one
compares. Files of others have none, and are loaded as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.transforms import wrap_module_method

BLOCKWISE = ("weight", "scales", "biases", "indices")  # their first axis is the stored blocks

KEY = "mlx_sparse_nn.patterns"  # in the metadata of a file

Arrays: TypeAlias = "dict[str, mx.array]"
Described: TypeAlias = "dict[str, dict[str, Any]]"


def sha256(data: bytes) -> bytes:
    """Return the digest of some bytes."""
    import hashlib  # loads OpenSSL, which several ranks and files need and no other user

    return hashlib.sha256(data).digest()


def fingerprint(pattern: CSRPattern) -> str:
    """Return a digest of which blocks are stored, and in which order."""
    return sha256(pattern.indptr.tobytes() + pattern.indices.tobytes()).hex()


def describe(pattern: CSRPattern) -> dict[str, Any]:
    """Return what a file says of a pattern."""
    return {
        "shape": list(pattern.shape),
        "block_size": pattern.block_size,
        "sha256": fingerprint(pattern),
    }


def save_arrays(file: str, arrays: Arrays, patterns: Mapping[str, CSRPattern]) -> None:
    """Write arrays, and in the metadata what their patterns are, by path of the layer."""
    described = {path: describe(pattern) for path, pattern in patterns.items()}
    mx.save_safetensors(file, arrays, {"format": "mlx", KEY: json.dumps(described)})


def load_arrays(owner: str, file: str | Path) -> tuple[Arrays, Described]:
    """Read the arrays of a file, and what it says of their patterns: nothing, if it is another's.

    Raises:
        TypeError: The file is no dict of arrays.
        ValueError: What it says of patterns cannot be read.
    """
    metadata: Any = {}
    if Path(file).suffix == ".safetensors":
        arrays, metadata = mx.load(str(file), return_metadata=True)
    else:
        arrays = mx.load(str(file))
    if not isinstance(arrays, dict):
        raise TypeError(f"[{owner}] {file} holds an array without a name")
    try:
        described = json.loads(metadata.get(KEY, "{}"))
        for of_layer in described.values():
            _ = of_layer["shape"], of_layer["block_size"], of_layer["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"[{owner}] {file} has metadata {KEY!r} that cannot be read") from error
    return arrays, described


def check_described(owner: str, path: str, saved: Mapping[str, Any], pattern: CSRPattern) -> None:
    """Raise unless a layer has the pattern that the file names for it."""
    present = describe(pattern)
    for name, what in (("shape", "(output_dims, input_dims)"), ("block_size", "block_size")):
        if saved[name] != present[name]:
            raise ValueError(
                f"[{owner}] {path or 'the layer'} was saved with {what} {saved[name]}, "
                f"the model's has {present[name]}"
            )
    if saved["sha256"] != present["sha256"]:
        raise ValueError(
            f"[{owner}] {path or 'the layer'} was saved with another pattern than {pattern!r}: "
            "load the pattern with the values, as save_trainable and save_weights write them"
        )


def check_patterns(owner: str, model: nn.Module, described: Described, kind: type) -> None:
    """Raise unless the layers of a model have the patterns that a file names for them."""
    modules = dict(model.named_modules())
    for path, saved in described.items():
        if path not in modules:
            continue
        if not isinstance(modules[path], kind):
            raise ValueError(
                f"[{owner}] {path} is sparse in the file, a {type(modules[path]).__name__} in the "
                f"model {RESTORE}"
            )
        check_described(owner, path, saved, modules[path].pattern)


def guard(kind: type) -> None:
    """Let loads of a model with modules of this kind change all or nothing, and check patterns."""
    wrap_module_method("load_weights", _load_weights, kind)
    wrap_module_method("save_weights", _save_weights, kind)


def _load_weights(
    load: Callable, kind: type, self: nn.Module, file_or_weights: Any, strict: bool = True
) -> nn.Module:
    layers = modules_of(self, kind)
    if not layers:
        return load(self, file_or_weights, strict)
    weights, described = file_or_weights, {}
    if isinstance(weights, str):
        arrays, described = load_arrays("load_weights", weights)
        weights = list(arrays.items())
    before = self.parameters()
    emptied = {path for path, layer in layers.items() if layer._emptied}
    patterns = {path: layer.pattern for path, layer in layers.items() if path not in emptied}
    try:
        load(self, weights, strict)
        for path, layer in layers.items():
            if layer._emptied and path not in emptied:
                raise ValueError(
                    f"[load_weights] {path or 'the layer'} is empty in the checkpoint, as after "
                    "mlx_lm.utils.save: save a model that holds its arrays"
                )
        for path, pattern in patterns.items():
            if layers[path].pattern != pattern:
                _check_all(path, layers[path], dict(weights))
        check_patterns("load_weights", self, described, kind)
    except Exception as error:
        # MLX checks names and shapes before it writes. What a layer refuses, it does when it is
        # written, and others have been written by then.
        self.update(before)
        message = str(error)
        if (path := _refusing(weights, layers, message)) is not None:
            message = f"[load_weights] {path or 'the layer'}: {message}"
        if hint := _hint(message, layers):
            message = f"{message} {hint}"
        if message != str(error):
            error.args = (message,)
        raise
    for path in {name.rpartition(".")[0] for name in dict(weights)} & set(layers):
        layers[path].forget_errors()
    return self


def _check_all(path: str, layer: nn.Module, weights: Arrays) -> None:
    """Raise if a file changes a part of a layer's pattern, or all without the values, so that
    values go to other places."""
    prefix, name = f"{path}." if path else "", path or "the layer"
    given = {key for key in layer if f"{prefix}{key}" in weights}
    for here, other in (("indptr", "indices"), ("indices", "indptr")):
        if here in given and other not in given:
            raise ValueError(
                f"[load_weights] {name} gets {here} of another pattern without its {other}: load "
                "both at once"
            )
    if missing := [key for key in BLOCKWISE if key in layer and key not in given]:
        raise ValueError(
            f"[load_weights] {name} gets another pattern without its {missing[0]}: load both at "
            "once"
        )


def _refusing(weights: Any, layers: Mapping[str, Any], message: str) -> str | None:
    """Return the path of the layer that refuses an array of a checkpoint in these words, if any."""
    for name, array in weights if isinstance(weights, list | tuple) else ():
        path, _, key = name.rpartition(".")
        if path in layers and key in layers[path] and message.startswith("["):
            try:
                layers[path]._checked(key, array, layers[path][key].shape)
            except (TypeError, ValueError) as error:
                if str(error) == message:
                    return path
    return None


def _hint(message: str, layers: Mapping[str, Any]) -> str:
    """Say what helps where names or shapes are refused because of the number of blocks."""
    if "Expected shape (0,)" in message and any(layer._emptied for layer in layers.values()):
        return "(the model was emptied: load with strict=False)"
    named = message.rsplit("for parameter ", 1)[-1] if "Expected shape" in message else ""
    path, _, name = named.rpartition(".")
    of_blocks = path in layers and name in layers[path]
    of_names = message.startswith(("Received ", "Missing ")) and ".indptr" in message
    return RESTORE if of_blocks or of_names or "the number of stored blocks" in message else ""


RESTORE = "(mlx_sparse_nn.restore(model, weights) takes layers of any pattern)"


def _save_weights(save: Callable, kind: type, self: nn.Module, file: str) -> None:
    patterns = {path: layer.pattern for path, layer in modules_of(self, kind).items()}
    if patterns and file.endswith(".safetensors"):
        arrays: Arrays = tree_flatten(self.parameters(), destination={})  # type: ignore[assignment]
        save_arrays(file, arrays, patterns)
    else:
        save(self, file)


def modules_of(model: nn.Module, kind: type) -> dict[str, Any]:
    """Return the modules of a kind, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}
