"""summary: what each layer of a model stores, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.checks import check_model, check_size
from mlx_sparse_nn.core.relative_error import relative_error
from mlx_sparse_nn.core.table import Report, Table, fold
from mlx_sparse_nn.layers.checkpoints import modules_of
from mlx_sparse_nn.layers.lora import SparseLinear
from mlx_sparse_nn.layers.parameters import (
    count,
    linear_shape,
    modules_with_arrays,
    why_always_dense,
)
from mlx_sparse_nn.layers.pattern_module import PatternModule

ErrorOf: TypeAlias = Literal["weights", "outputs"]

_AMOUNTS = ("weights", "index", "dead", "share")


@dataclass(frozen=True)
class LayerSummary:
    """One layer. What does not apply to its type is None.

    Attributes:
        path: Where it lies in the model; empty for the model itself.
        type: Name of its class.
        shape: ``(output_dims, input_dims)`` of a linear layer.
        block_size: Side of the blocks of a sparse layer.
        density: Stored fraction of the weight of a linear layer.
        parameters: Stored values, weight and bias. Indices are not counted.
        dense_parameters: What they would be if the weight were dense.
        weight_bytes: Bytes of the parameters.
        index_bytes: Bytes of the pattern: ``indptr`` and ``indices``, those of its transpose, and
            what plain MLX has derived of them, where it has computed.
        optimizer_bytes: Bytes of the optimizer's state; frozen parameters have none.
        macs: Multiply-accumulates of the forward product of a linear layer for each row of x.
        dead_inputs: Inputs that no stored block reads.
        dead_outputs: Outputs that no stored block writes: their bias, or 0.
        share: Fraction of the model's parameters.
        error: Relative error of a sparse layer: of its weight, against that of the dense model, or
            what surgery noted when it made the layer. None where neither is known.
        error_of: Whose error it is: "weights" or "outputs", the latter as noted by calibration.
        always_dense: Why :func:`sparsify` has no sparse form for its weight: an embedding, a
            convolution, the experts of a ``SwitchLinear``.
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
    error: float | None = None
    error_of: ErrorOf | None = None
    always_dense: str | None = None


@dataclass(frozen=True, repr=False)
class SummaryReport(Report):
    """What :func:`summary` found; ``print`` it for a table. Its attributes have more than that.

    Attributes:
        rows: One for each module that holds parameters itself, in the order of the model.
        optimizer_arrays: Arrays of the optimizer's state for each trainable one.
        against_dense: Whether errors are against a dense model, or as surgery noted them.
    """

    rows: tuple[LayerSummary, ...]
    optimizer_arrays: int
    against_dense: bool = False

    @property
    def parameters(self) -> int:
        """Stored values of the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def dense_parameters(self) -> int:
        """What they would be if all weights were dense."""
        return sum(row.dense_parameters for row in self.rows)

    @property
    def density(self) -> float:
        """Stored fraction of all parameters, those of dense layers and embeddings included."""
        return self.parameters / max(1, self.dense_parameters)

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

    def _table(self) -> Table:
        unit, scale = _unit(max((row.weight_bytes for row in self.rows), default=0))
        lines = fold([row.path for row in self.rows], [_kind(row) for row in self.rows])
        notes = []
        if len(lines) < len(self.rows):
            notes.append(
                "x n: n layers alike; weights of each, largest error, mean of index, dead and "
                "share of all"
            )
        arrays = f"{self.optimizer_arrays} array{'s' * (self.optimizer_arrays != 1)}"
        unit_of_state, scale_of_state = _unit(self.optimizer_bytes)
        return Table(
            caption=f"{self.parameters:,} parameters, {self.dense_parameters:,} if dense; "
            f"weights and index in {unit}",
            header=[*["layer", "out x in", "block", "density", "error"], *_AMOUNTS],
            rows=[[path, *_cells([self.rows[i] for i in places], scale)] for path, places in lines],
            total=[
                "total",
                *["", "", f"{self.density:.3g}", ""],
                _size(self.weight_bytes, scale),
                _size(self.index_bytes, scale),
                _dead(self.rows),
                f"{sum(row.share for row in self.rows):.1%}",
            ],
            notes=[
                *notes,
                *self._always_dense(),
                *self._said_of_errors(),
                "dead: inputs that no block reads / outputs that no block writes",
                f"MACs of the linear layers: {self.macs:,} for each row of x",
                f"optimizer state: {_size(self.optimizer_bytes, scale_of_state)} {unit_of_state}, "
                f"{arrays} for each trainable one (Adam 2, SGD 0)",
            ],
        )

    def _said_of_errors(self) -> list[str]:
        """Return what the errors are of, if there are sparse layers."""
        sparse = [row for row in self.rows if row.block_size is not None]
        kinds = {row.error_of for row in sparse}
        since = "when surgery made the layer; training since then is not in it"
        of_now = "||W - A|| / ||W||, where W is the dense model's; of the model it tells little"
        notes = {
            "weights": f"error: {of_now if self.against_dense else 'of the weight, ' + since}",
            "outputs": f"error, out: of the outputs over the samples of calibration, {since}",
            None: "error ?: not known; summary(model, dense=...) measures it",
        }
        return [note for kind, note in notes.items() if kind in kinds]

    def _always_dense(self) -> list[str]:
        """Return a sentence on the types of layers that have no sparse form, if there are some."""
        shares: dict[str, float] = {}
        for row in self.rows:
            if row.always_dense:
                shares[row.type] = shares.get(row.type, 0.0) + row.share
        of_each = [f"{kind} {share:.1%}" for kind, share in shares.items()]
        return [f"always dense, of all parameters: {', '.join(of_each)}"] if of_each else []


def summary(
    model: nn.Module, *, dense: nn.Module | None = None, optimizer_arrays: int = 2
) -> SummaryReport:
    """Return a table of what each layer of ``model`` stores and costs.

    Every module that holds parameters of its own has a row, so that the shares add up to the whole
    model. Layers and arrays that a model uses in several places are counted where they come first.
    Arrays that are never trained count too, as in ``model.parameters()``, the
    indices of patterns aside. Of a quantized layer, the values that its packed weight stands for
    count. Nothing is evaluated, unless ``dense`` is given.

    Args:
        model: A model, or one layer.
        dense: The dense model of which it was made, to measure the relative error of each sparse
            layer's weight as it is now. Without it, errors are those that surgery noted.
        optimizer_arrays: Arrays of the optimizer's state for each trainable one, of its size and
            dtype: 2 for Adam and its kin, 1 for SGD with momentum and Lion, 0 for plain SGD.

    Raises:
        TypeError: ``model`` or ``dense`` is not a module, or ``optimizer_arrays`` not an integer.
        ValueError: ``optimizer_arrays`` is negative, or ``dense`` has no ``nn.Linear`` of the same
            shape at the path of a sparse layer.

    Example:
        >>> print(summary(model))
    """
    check_model("summary", model)
    if dense is not None and not isinstance(dense, nn.Module):
        raise TypeError(f"[summary] dense must be an nn.Module, got {type(dense).__name__}")
    optimizer_arrays = check_size("summary", "optimizer_arrays", optimizer_arrays)
    rows = [
        _row(path, module, arrays, optimizer_arrays)
        for path, module, arrays in modules_with_arrays(model)
    ]
    total = max(1, sum(row["parameters"] for row in rows))
    errors = _errors(model, dense)
    for row in rows:
        row["share"] = row["parameters"] / total
        row["error"], row["error_of"] = errors.get(row["path"], (None, None))
    return SummaryReport(
        tuple(LayerSummary(**row) for row in rows), optimizer_arrays, dense is not None
    )


def _errors(
    model: nn.Module, dense: nn.Module | None
) -> dict[str, tuple[float | None, ErrorOf | None]]:
    """Return the relative error of each sparse layer by path, and whose it is."""
    layers = dict(reversed(modules_of(model, SparseLinear).items()))  # as the model has them
    if dense is None:
        return {path: _noted(layer) for path, layer in layers.items()}
    twins = dict(dense.named_modules())
    weights = {path: _dense_weight(path, layer, twins.get(path)) for path, layer in layers.items()}
    return {
        path: (relative_error(weights[path], layer.todense()), "weights")
        for path, layer in layers.items()
    }


def _noted(layer: SparseLinear) -> tuple[float | None, ErrorOf | None]:
    """Return the error that surgery noted in a layer."""
    if layer.output_error is not None:
        return layer.output_error, "outputs"
    return layer.weight_error, None if layer.weight_error is None else "weights"


def _dense_weight(path: str, layer: SparseLinear, twin: nn.Module | None) -> mx.array:
    """Return the dense weight of which a layer was made, or raise if there is none."""
    owner = f"summary {path}".rstrip()
    if not isinstance(twin, nn.Linear):
        kind = "nothing" if twin is None else f"a {type(twin).__name__}"
        raise ValueError(
            f"[{owner}] dense has {kind} there, not an nn.Linear: pass the model of which this one "
            "was made"
        )
    shape = layer.output_dims, layer.input_dims
    if twin.weight.shape != shape:
        raise ValueError(f"[{owner}] dense has a weight of {twin.weight.shape}, expected {shape}")
    return twin.weight


def _row(path: str, module: nn.Module, arrays: dict[str, mx.array], optimizer_arrays: int) -> dict:
    """Return the fields of a :class:`LayerSummary`, less ``share`` and its error."""
    index_bytes, block_size, dead_inputs, dead_outputs = 0, None, None, None
    if isinstance(module, PatternModule):
        pattern = module.pattern
        # The module's own index arrays share their memory with these.
        index_bytes = sum(array.nbytes for array in module["_layout"].values())
        index_bytes += pattern.layout.derived_bytes
        shape, block_size, density, macs = (
            pattern.shape,
            pattern.block_size,
            pattern.density,
            pattern.nnz,
        )
        lengths = np.diff(pattern.indptr), np.diff(pattern.T.indptr)
        dead_outputs, dead_inputs = (
            _n_in_blocks(counts == 0, block_size, size)
            for counts, size in zip(lengths, shape, strict=True)
        )
    else:
        shape = linear_shape(module)
        density, macs = (None, None) if shape is None else (1.0, shape[0] * shape[1])
    parameters = count(module, arrays)
    trainable = [a for name, a in arrays.items() if name.partition(".")[0] not in module._no_grad]
    return {
        "path": path,
        "type": type(module).__name__,
        "shape": shape,
        "block_size": block_size,
        "density": density,
        "parameters": parameters.stored,
        "dense_parameters": parameters.dense,
        "weight_bytes": sum(array.nbytes for array in arrays.values()),
        "index_bytes": index_bytes,
        "optimizer_bytes": optimizer_arrays * sum(array.nbytes for array in trainable),
        "macs": macs,
        "dead_inputs": dead_inputs,
        "dead_outputs": dead_outputs,
        "always_dense": why_always_dense(module),
    }


def _n_in_blocks(chosen: np.ndarray, block_size: int, size: int) -> int:
    """Return how many of ``size`` features lie in the chosen blocks of them."""
    sizes = np.full(chosen.size, block_size)
    sizes[-1:] -= chosen.size * block_size - size
    return int(sizes[chosen].sum())


def _kind(row: LayerSummary) -> tuple:
    """Return what has to be equal for layers to share a line: all but what their patterns draw."""
    return row.type, row.shape, row.block_size, row.parameters, row.weight_bytes, row.error_of


def _dead(rows: Sequence[LayerSummary]) -> str:
    inputs, outputs = (
        (row.dead_inputs or 0 for row in rows),
        (row.dead_outputs or 0 for row in rows),
    )
    return f"{sum(inputs):,}/{sum(outputs):,}"


def _error(rows: Sequence[LayerSummary]) -> str:
    """Return the largest error of layers of one kind, whose errors are all known or all not."""
    if rows[0].block_size is None:
        return "-"
    known = [row.error for row in rows if row.error is not None]
    return f"{max(known):.3f}{' out' * (rows[0].error_of == 'outputs')}" if known else "?"


def _cells(rows: list[LayerSummary], scale: int) -> list[str]:
    """Return the cells of layers of one kind, less their path; ``scale`` is bytes of the unit."""
    row, index_bytes = rows[0], sum(row.index_bytes for row in rows) / len(rows)
    return [
        "-" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}",
        "-" if row.block_size is None else str(row.block_size),
        "-" if row.density is None else f"{row.density:.3g}",
        _error(rows),
        _size(row.weight_bytes, scale),
        _size(index_bytes, scale) if index_bytes else "-",
        "-" if row.dead_inputs is None else _dead(rows),
        f"{sum(row.share for row in rows):.1%}",
    ]


def _unit(size: int) -> tuple[str, int]:
    """Return the largest unit of bytes that is not above ``size``, and how many bytes it has."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min(max(0, size.bit_length() - 1) // 10, len(units) - 1)
    return units[power], 1024**power


def _size(size: float, scale: int) -> str:
    """Return bytes in units of ``scale``, to three digits where that takes decimals."""
    amount = size / scale
    if 0 < amount < 0.01:
        return "<0.01"
    decimals = 0 if scale == 1 or amount >= 100 else 1 if amount >= 10 else 2
    return f"{amount:,.{decimals}f}"
