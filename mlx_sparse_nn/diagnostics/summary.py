"""summary: what each layer of a model stores, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_sparse_nn.core.checks import check_model, check_size
from mlx_sparse_nn.core.table import text_table
from mlx_sparse_nn.layers.pattern_module import PatternModule

_INDICES = ("indptr", "indices")


@dataclass(frozen=True)
class LayerSummary:
    """One layer. What does not apply to its type is None.

    Attributes:
        path: Where it lies in the model; empty for the model itself.
        type: Name of its class.
        shape: ``(output_dims, input_dims)`` of a linear layer.
        block_size: Side of the blocks of a sparse layer.
        density: Stored fraction of the weight of a linear layer.
        parameters: Stored values, weight and bias. Indices are none.
        dense_parameters: What they would be if the weight were dense.
        weight_bytes: Bytes of the parameters.
        index_bytes: Bytes of the pattern: ``indptr`` and ``indices``, and what the products read.
        optimizer_bytes: Bytes of the optimizer's state; frozen parameters have none.
        macs: Multiply-accumulates of the forward product of a linear layer for each row of x.
        dead_inputs: Inputs that no stored block reads.
        dead_outputs: Outputs that no stored block writes: their bias, or 0.
        share: Fraction of the model's parameters.
    """

    path: str
    type: str
    shape: tuple[int, int] | None
    block_size: int | None
    density: float | None
    parameters: int
    dense_parameters: int
    weight_bytes: int
    index_bytes: int
    optimizer_bytes: int
    macs: int | None
    dead_inputs: int | None
    dead_outputs: int | None
    share: float


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` found. Printed, it is a table.

    Attributes:
        rows: One for each module that holds parameters itself, in the order of the model.
        optimizer_arrays: Arrays of the optimizer's state for each trainable one.
    """

    rows: tuple[LayerSummary, ...]
    optimizer_arrays: int

    @property
    def parameters(self) -> int:
        """Stored values of the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def dense_parameters(self) -> int:
        """What they would be if all weights were dense."""
        return sum(row.dense_parameters for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(row.weight_bytes for row in self.rows)

    @property
    def index_bytes(self) -> int:
        """Bytes of the patterns."""
        return sum(row.index_bytes for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(row.optimizer_bytes for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the linear layers for each row of x."""
        return sum(row.macs or 0 for row in self.rows)

    def __repr__(self) -> str:
        total = [
            "total",
            *["", "", "", ""],
            f"{self.parameters:,}",
            f"{self.dense_parameters:,}",
            _bytes(self.weight_bytes),
            _bytes(self.index_bytes),
            _bytes(self.optimizer_bytes),
            f"{self.macs:,}",
            *["", ""],
            f"{sum(row.share for row in self.rows):.1%}",
        ]
        table = text_table(_HEADER, [*map(_cells, self.rows), total], left=2)
        arrays = f"{self.optimizer_arrays} array{'s' * (self.optimizer_arrays != 1)}"
        return f"{table}\noptimizer: {arrays} of state for each trainable one (Adam 2, SGD 0)"


def summary(model: nn.Module, *, optimizer_arrays: int = 2) -> Summary:
    """Return a table of what each layer of ``model`` stores and costs.

    Every module that holds parameters of its own has a row, so that the shares add up to the whole
    model. Layers and arrays that a model uses in several places are counted where they come first.
    Arrays that are never trained count too, as in ``model.parameters()``, the
    indices of patterns aside. Of a quantized layer, the values that its packed weight stands for
    count. Nothing is evaluated.

    Args:
        model: A model, or one layer.
        optimizer_arrays: Arrays of the optimizer's state for each trainable one, of its size and
            dtype: 2 for Adam and its kin, 1 for SGD with momentum and Lion, 0 for plain SGD.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer_arrays`` not an integer.
        ValueError: ``optimizer_arrays`` is negative.

    Example:
        >>> print(summary(model))
    """
    check_model("summary", model)
    check_size("summary", "optimizer_arrays", optimizer_arrays)
    counted: set[int] = set()
    rows = []
    for path, module in reversed(model.named_modules()):
        arrays = {
            name: array
            for name, array in _own_arrays(module).items()
            if not (id(array) in counted or counted.add(id(array)))
        }
        if arrays:
            rows.append(_row(path, module, arrays, optimizer_arrays))
    total = max(1, sum(row["parameters"] for row in rows))
    return Summary(
        tuple(LayerSummary(**row, share=row["parameters"] / total) for row in rows),
        optimizer_arrays,
    )


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


def _row(path: str, module: nn.Module, arrays: dict[str, mx.array], optimizer_arrays: int) -> dict:
    """Return the fields of a :class:`LayerSummary`, less ``share``."""
    index_bytes, block, dead_inputs, dead_outputs = 0, None, None, None
    if isinstance(module, PatternModule):
        pattern = module.pattern
        layout = [array for _, array in tree_flatten(module["_layout"])]
        index_bytes = sum(a.nbytes for a in [*layout, *(module[name] for name in _INDICES)])
        arrays = {name: array for name, array in arrays.items() if name not in _INDICES}
        shape, block, density, macs = (
            pattern.shape,
            pattern.block_size,
            pattern.density,
            pattern.nnz,
        )
        lengths = np.diff(pattern.indptr), np.diff(pattern.T.indptr)
        dead_outputs, dead_inputs = (block * np.count_nonzero(counts == 0) for counts in lengths)
        unstored = shape[0] * shape[1] - macs
    else:
        shape, unstored = _linear_shape(module), 0
        density, macs = (None, None) if shape is None else (1.0, shape[0] * shape[1])
    parameters = sum(_values(module, name, array) for name, array in arrays.items())
    trainable = [a for name, a in arrays.items() if name.partition(".")[0] not in module._no_grad]
    return {
        "path": path,
        "type": type(module).__name__,
        "shape": shape,
        "block_size": block,
        "density": density,
        "parameters": parameters,
        "dense_parameters": parameters + unstored,
        "weight_bytes": sum(array.nbytes for array in arrays.values()),
        "index_bytes": index_bytes,
        "optimizer_bytes": optimizer_arrays * sum(array.nbytes for array in trainable),
        "macs": macs,
        "dead_inputs": dead_inputs,
        "dead_outputs": dead_outputs,
    }


def _values(module: nn.Module, name: str, array: mx.array) -> int:
    """Return how many parameters an array stands for: of a quantized layer, those it packs."""
    bits = getattr(module, "bits", None)
    if bits is None:
        return array.size
    if name == "weight":
        return array.size * 32 // bits
    return 0 if name in ("scales", "biases") else array.size


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(output_dims, input_dims)`` of MLX's own linear layers, None for other modules."""
    if isinstance(module, nn.Linear):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.QuantizedLinear):
        return module.weight.shape[0], module.weight.shape[1] * 32 // module.bits
    return None


_HEADER = (
    "layer",
    "type",
    "out x in",
    "block",
    "density",
    "stored",
    "dense",
    "weights",
    "indices",
    "optimizer",
    "MACs/row",
    "dead in",
    "dead out",
    "share",
)


def _cells(row: LayerSummary) -> list[str]:
    return [
        row.path or "(itself)",
        row.type,
        "-" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}",
        "-" if row.block_size is None else str(row.block_size),
        "-" if row.density is None else f"{row.density:.1%}",
        f"{row.parameters:,}",
        f"{row.dense_parameters:,}",
        _bytes(row.weight_bytes),
        _bytes(row.index_bytes) if row.index_bytes else "-",
        _bytes(row.optimizer_bytes),
        *("-" if n is None else f"{n:,}" for n in (row.macs, row.dead_inputs, row.dead_outputs)),
        f"{row.share:.1%}",
    ]


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} GiB"
