"""verify: are a model's sparse products, on this device, those of the dense weights?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.core.checks import check_seed
from mlx_sparse_nn.core.table import Report, Table, fold
from mlx_sparse_nn.diagnostics.products import (
    MLX,
    PRODUCTS,
    ProductCheck,
    backends_of,
    cotangent_of,
    dense_products,
    dtype_name,
    matmul_uses_tf32,
    may_round,
    products_of,
    values_of,
)
from mlx_sparse_nn.layers.layer_calls import all_sparse_layers, observed
from mlx_sparse_nn.layers.lora import SparseLinear


@dataclass(frozen=True, repr=False)
class VerifyReport(Report):
    """What :func:`verify` compared; ``print`` it for a table.

    The table says of each product what computed it, and the error as a part of its bound. Layers
    that are alike but for their errors share a line, with the largest.

    Attributes:
        checks: One for each layer and product, in the order of the model.
        not_reached: Paths of the layers that the model did not call.
        device: The device that computed.
    """

    checks: tuple[ProductCheck, ...]
    not_reached: tuple[str, ...]
    device: str

    @property
    def passed(self) -> bool:
        """Whether every product is within its bound."""
        return all(check.passed for check in self.checks)

    @property
    def tf32(self) -> bool:
        """Whether a bound allows for factors rounded to TF32."""
        return any(check.tf32 for check in self.checks)

    def _table(self) -> Table:
        layers: dict[str, dict[str, ProductCheck]] = {}
        for check in self.checks:
            layers.setdefault(check.layer, {})[check.product] = check
        checks = list(layers.values())
        lines = fold(list(layers), [_kind(of_layer) for of_layer in checks])
        notes = ["d: gradient to; each product with what computed it, and its error"]
        if len(lines) < len(checks):
            notes.append("x n: n layers alike, with the largest of their errors")
        if self.tf32:
            notes.append("float32 products use TF32 here: MLX_ENABLE_TF32=0 checks full float32")
        if self.not_reached:
            paths = fold(self.not_reached, [None] * len(self.not_reached))
            notes.append(f"not reached by this input: {', '.join(path for path, _ in paths)}")
        notes.append("This checks the products, not the model's quality.")
        state = "within their bounds" if self.passed else "NOT within their bounds"
        return Table(
            caption=f"{len(layers)} sparse layer{'s' * (len(layers) != 1)} on {self.device}: "
            f"errors {state}, in % of the bounds",
            header=["layer", "rows", "dtype", "forward", "d input", "d weight", "d bias"],
            rows=[[path, *_cells([checks[i] for i in places])] for path, places in lines],
            notes=notes,
        )


class MismatchError(ArithmeticError):
    """A sparse product differs from the dense one by more than rounding.

    Attributes:
        report: The :class:`VerifyReport`.
    """

    def __init__(self, report: VerifyReport):
        wrong = [str(check) for check in report.checks if not check.passed]
        super().__init__("\n  ".join([f"[verify] on {report.device}, wrong products:", *wrong]))
        self.report = report


def verify(model: nn.Module, *inputs: Any, seed: int = 0) -> VerifyReport:
    """Compare every block-sparse layer with its dense product, on MLX's default device.

    The model runs once, in evaluation mode, to find the input of each layer. Each layer then
    computes its output and, for random cotangents, its gradients to input, weight and bias, and
    these are compared with dense float64 products on the host. A quantized layer has no gradient to
    its weight, which the host unpacks by itself. The error may be what rounding explains for the
    dtype and the length of the sums (``diagnostics.rounding.tolerance``), and for TF32 where
    float32 products round so; a product of finite numbers that is not finite
    is wrong. The model is left as it was. Right products say nothing of the model's quality.

    The dense weights take ``16 * input_dims * output_dims`` bytes, one layer at a time.

    Args:
        model: A model, or one layer.
        *inputs: What the model is called with. A layer that it calls more than once is checked with
            its first input.
        seed: Seed of the cotangents.

    Returns:
        The errors, their bounds, and what computed each product.

    Raises:
        TypeError: ``model`` is not a module, no input is given, or a layer computes in another
            dtype than float16, bfloat16, float32 or float64.
        ValueError: The model has no block-sparse layer, calls none with these inputs or only within
            compiled functions, a layer's input is empty, its input or weight holds nan or infinity,
            or a product has a wrong shape.
        MismatchError: A product is wrong. The message names the device, the layer, the product,
            its worst element and what computed it.

    Example:
        >>> verify(model, mx.random.normal((64, 256)))
        2 sparse layers on Device(cpu, 0): errors within their bounds, in % of the bounds
        ...
    """
    seed = check_seed("verify", seed)
    layers = {
        path or type(layer).__name__: layer
        for path, layer in all_sparse_layers("verify", model).items()
    }
    if not inputs:
        raise TypeError("[verify] inputs are missing: give what the model is called with")
    recorded = _record(model, layers, inputs)
    if not recorded:
        raise ValueError(f"[verify] the model called none of {', '.join(layers)} with these inputs")
    tf32 = matmul_uses_tf32()
    checks, not_finite = [], []
    for path, layer in layers.items():
        if path in recorded:
            x = _concrete(path, recorded[path])
            if name := _not_finite(layer, x):
                not_finite.append(f"{path} has nan or infinity in its {name}")
            else:
                checks += _check_layer(path, layer, x, seed, tf32)
    report = VerifyReport(
        checks=tuple(checks),
        not_reached=tuple(path for path in layers if path not in recorded),
        device=str(mx.default_device()),
    )
    if not report.passed:
        raise MismatchError(report)  # which may be why a later layer gets nan
    if not_finite:
        raise ValueError(f"[verify] {not_finite[0]}: products with that cannot be compared")
    return report


def _not_finite(layer: SparseLinear, x: mx.array) -> str | None:
    """Return the name of an operand of a layer that holds what is not finite, if one does."""
    operands = {"input": x, "weight": layer.todense()}
    if "bias" in layer:
        operands["bias"] = layer.bias
    for name, a in operands.items():
        if mx.issubdtype(a.dtype, mx.inexact) and not mx.isfinite(a).all().item():
            return name
    return None


def _check_layer(
    path: str, layer: SparseLinear, x: mx.array, seed: int, tf32: bool
) -> Iterator[ProductCheck]:
    for name, a in (("input", x), ("weight", values_of(layer))):
        if not mx.issubdtype(a.dtype, mx.floating):
            raise TypeError(f"[verify] {path}: its {name} must be real floating, got {a.dtype}")
    if not x.size:
        raise ValueError(f"[verify] {path}: its input {x.shape} has no elements")
    y = layer(x)
    cotangent = cotangent_of(y, seed)
    backends = backends_of(layer, math.prod(x.shape[:-1]), x.dtype)
    gradients = products_of(layer, "weight gradient" in backends)(x, cotangent)[1:]
    mx.eval(y, gradients)
    dense = dense_products(layer, x, cotangent)
    n_x = math.prod(x.shape[:-1])
    for (product, backend), actual in zip(backends.items(), [y, *gradients], strict=True):
        rounded = tf32 and backend != MLX and may_round(backend, layer, n_x, x.dtype)
        yield dense.check(path, product, backend, actual, rounded)


def _record(
    model: nn.Module, layers: dict[str, SparseLinear], inputs: tuple
) -> dict[str, mx.array]:
    """Run ``model`` and return the first input of each layer that it calls, by path."""
    recorded: dict[str, mx.array] = {}

    def keep(path: str, x: mx.array, y: mx.array) -> mx.array:
        recorded.setdefault(path, x)
        return y

    training = [(module, module.training) for _, module in model.named_modules()]
    try:
        model.eval()
        with observed(layers, keep):
            model(*inputs)
    finally:
        for module, mode in training:  # parents come before their children
            module.train(mode)
    return recorded


def _concrete(path: str, x: mx.array) -> mx.array:
    """Return ``x`` evaluated, or raise if it was traced in a compiled function."""
    try:
        mx.eval(x)
    except RuntimeError as error:
        if "without a primitive" not in str(error):
            raise
        raise ValueError(
            f"[verify] {path} is called in a compiled function: give the model before mx.compile"
        ) from error
    return x


def _kind(checks: dict[str, ProductCheck]) -> tuple:
    """Return what has to be equal for layers to share a line: all but the errors that passed."""
    forward = checks["forward"]
    products = [(check.product, check.backend, check.passed) for check in checks.values()]
    return math.prod(forward.shape[:-1]), forward.dtype, *products


def _cells(layers: list[dict[str, ProductCheck]]) -> list[str]:
    """Return the cells of layers of one kind, less their path."""
    forward = layers[0]["forward"]
    cells = [f"{math.prod(forward.shape[:-1]):,}", dtype_name(forward.dtype)]
    for product in PRODUCTS:
        checks = [checks[product] for checks in layers if product in checks]
        cells.append(f"{checks[0].backend} {_error(checks)}" if checks else "-")
    return cells


def _error(checks: list[ProductCheck]) -> str:
    if not all(check.passed for check in checks):
        return "WRONG"
    part = max(check.error / check.bound if check.error else 0.0 for check in checks)
    return "<1%" if 0 < part < 0.01 else f"{part:.0%}"
