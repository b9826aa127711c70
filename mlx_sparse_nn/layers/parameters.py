"""The parameters of a model: how many are stored, and which stay dense whatever is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sparse_nn.layers.pattern_module import PatternModule

_INDICES = ("indptr", "indices")
_LINEAR = (nn.Linear, nn.QuantizedLinear, nn.QQLinear, PatternModule)
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_CONVOLUTIONS = tuple(
    getattr(nn, f"Conv{kind}{n}d") for kind in ("", "Transpose") for n in (1, 2, 3)
)


@dataclass(frozen=True)
class Count:
    """How many parameters a module holds itself.

    Attributes:
        stored: Values that are stored; of packed ones, those that they stand for.
        dense: What they would be if the weight were dense.
    """

    stored: int
    dense: int


def modules_with_arrays(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, dict[str, mx.array]]]:
    """Yield path, module and own arrays of each module that has some, in the order of the model.

    Modules and arrays that the model holds at several places come once, at the first. The indices
    of patterns are left out.
    """
    seen: set[int] = set()
    for path, module in reversed(model.named_modules()):
        arrays = {
            name: array
            for name, array in _own_arrays(module).items()
            if not (id(array) in seen or seen.add(id(array)))
            and not (isinstance(module, PatternModule) and name in _INDICES)
        }
        if arrays:
            yield path, module, arrays


def count(module: nn.Module, arrays: dict[str, mx.array]) -> Count:
    """Return how many parameters these arrays of a module are."""
    stored = sum(_values(module, name, array) for name, array in arrays.items())
    if not isinstance(module, PatternModule):
        return Count(stored, stored)
    pattern = module.pattern
    return Count(stored, stored + pattern.shape[0] * pattern.shape[1] - pattern.nnz)


def counts_of(model: nn.Module) -> dict[str, Count]:
    """Return the count of each module that holds parameters, by its first path."""
    return {path: count(module, arrays) for path, module, arrays in modules_with_arrays(model)}


def density_of(model: nn.Module) -> float:
    """Return the stored fraction of all parameters of a model, biases and embeddings included."""
    counts = counts_of(model).values()
    return sum(c.stored for c in counts) / max(1, sum(c.dense for c in counts))


def why_always_dense(module: nn.Module) -> str | None:
    """Return in words why a module without children has no block-sparse form.

    None for the linear layers, which have one, and for what holds no matrix.
    """
    if isinstance(module, _LINEAR) or tree_flatten(module.children()):
        return None
    if all(array.ndim < 2 for array in _own_arrays(module).values()):
        return None
    kind = type(module).__name__
    if isinstance(module, _EMBEDDINGS):
        return f"{kind} looks rows up; embeddings stay dense"
    if isinstance(module, _CONVOLUTIONS):
        return f"{kind} is a convolution, which stays dense"
    if hasattr(module, "num_experts"):
        return f"{kind} holds {module.num_experts} experts, which stay dense"
    return f"{kind} is not an nn.Linear"


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(output_dims, input_dims)`` of MLX's own linear layers, None for other modules."""
    if isinstance(module, nn.Linear):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.QuantizedLinear):
        return module.weight.shape[0], module.weight.shape[1] * 32 // module.bits
    return None


def _own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return the arrays of ``module`` by name, without those of the modules in it."""
    tree = module.filter_and_map(
        nn.Module.valid_parameter_filter,
        is_leaf_fn=lambda module, key, value: (
            nn.Module.is_module(value) or not isinstance(value, dict | list)
        ),
    )
    leaves = tree_flatten(tree, is_leaf=nn.Module.is_module)
    return {name: array for name, array in leaves if isinstance(array, mx.array)}


def _values(module: nn.Module, name: str, array: mx.array) -> int:
    """Return how many parameters an array stands for: of a quantized layer, those it packs."""
    if name == "weight" and isinstance(module, PatternModule):
        return module.pattern.nnz
    bits = getattr(module, "bits", None)
    if bits is None:
        return array.size
    if name == "weight":
        return array.size * 32 // bits
    return 0 if name in ("scales", "biases") else array.size
