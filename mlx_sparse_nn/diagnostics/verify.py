"""verify: are a model's sparse products, on this device, those of the dense weights?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.backends.choose import choose
from mlx_sparse_nn.core.checks import check_seed
from mlx_sparse_nn.core.table import text_table
from mlx_sparse_nn.diagnostics.rounding import EPS, to_numpy, tolerance
from mlx_sparse_nn.layers.layer_calls import sparse_layers, watched
from mlx_sparse_nn.layers.linear import BlockSparseLinear

# The absolute error of a result that is too small for its dtype, or that a device flushes to zero.
_UNDERFLOW = {mx.float16: 2.0**-24, mx.float64: 0.0}
_TF32_EPS = 2.0**-10

PRODUCTS = ("forward", "input gradient", "weight gradient", "bias gradient")


@dataclass(frozen=True)
class Check:
    """One product of one layer, at the element where its error is the largest part of its bound.

    Attributes:
        layer: Path of the layer in the model; its type where it was given itself.
        product: ``"forward"``, ``"input gradient"``, ``"weight gradient"`` or ``"bias gradient"``.
        shape: Shape of the product.
        dtype: Its dtype.
        index: The element, one integer for each axis; empty if the product has no elements.
        actual: What MLX computed.
        expected: What the dense product gives in float64.
        error: ``abs(actual - expected)``.
        bound: The error that rounding explains.
    """

    layer: str
    product: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    index: tuple[int, ...]
    actual: float
    expected: float
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is finite and within the bound."""
        return self.error <= self.bound < math.inf

    def __str__(self) -> str:
        return (
            f"{self.layer}: the {self.product} {self.shape} is {self.actual:.9g} at "
            f"{list(self.index)}, the dense one {self.expected:.9g}: error {self.error:.3g}, "
            f"bound {self.bound:.3g} for {_name(self.dtype)}"
        )


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """What :func:`verify` compared. Printed, it is a table of ``error / bound``.

    Attributes:
        checks: One for each layer and product, in the order of the model.
        not_reached: Paths of the layers that the model did not call.
        device: The device that computed.
        backend: ``"metal"``, ``"cuda"`` or ``"plain"``.
        tf32: Whether MLX rounds the factors of float32 products to TF32 there, which the bounds of
            float32 blocks then allow for.
    """

    checks: tuple[Check, ...]
    not_reached: tuple[str, ...]
    device: str
    backend: str
    tf32: bool

    @property
    def passed(self) -> bool:
        """Whether every product is within its bound."""
        return all(check.passed for check in self.checks)

    def __repr__(self) -> str:
        layers: dict[str, dict[str, Check]] = {}
        for check in self.checks:
            layers.setdefault(check.layer, {})[check.product] = check
        rows = [
            [
                name,
                " x ".join(map(str, checks["forward"].shape)),
                _name(checks["forward"].dtype),
                *(_cell(checks.get(product)) for product in PRODUCTS),
            ]
            for name, checks in layers.items()
        ]
        state = "within their bounds" if self.passed else "NOT within their bounds"
        lines = [
            f"{len(layers)} sparse layer{'s' * (len(layers) != 1)} on {self.device} "
            f"({self.backend}): errors {state}",
            text_table(["layer", "output", "dtype", *PRODUCTS], rows),
        ]
        if self.tf32:
            lines.append("MLX uses TF32 for float32 here: MLX_ENABLE_TF32=0 checks full float32")
        if self.not_reached:
            lines.append(f"not reached by this input: {', '.join(self.not_reached)}")
        return "\n".join(lines)


class MismatchError(ArithmeticError):
    """A sparse product differs from the dense one by more than rounding.

    Attributes:
        report: The :class:`VerifyReport`.
    """

    def __init__(self, report: VerifyReport):
        wrong = [str(check) for check in report.checks if not check.passed]
        where = f"{report.device} ({report.backend})"
        super().__init__("\n  ".join([f"[verify] on {where}, wrong products:", *wrong]))
        self.report = report


def verify(model: nn.Module, *inputs: Any, seed: int = 0) -> VerifyReport:
    """Compare every :class:`BlockSparseLinear` with the dense product, on MLX's default device.

    The model runs once, in evaluation mode, to find the input of each layer. Each layer then
    computes its output and, for random cotangents, its gradients to input, weight and bias, and
    these are compared with dense float64 products on the host. The error may be what rounding
    explains for the dtype and the length of the sums (``core.rounding.tolerance``); anything
    not finite is wrong. The model is left as it was.

    The dense weights take ``16 * input_dims * output_dims`` bytes, one layer at a time.

    Args:
        model: A model, or one layer.
        *inputs: What the model is called with. A layer that it calls more than once is checked with
            its first input.
        seed: Seed of the cotangents.

    Returns:
        The errors and their bounds.

    Raises:
        TypeError: ``model`` is not a module, or a layer computes in another dtype than float16,
            bfloat16, float32 or float64.
        ValueError: The model has no BlockSparseLinear, calls none with these inputs or only within
            compiled functions, a layer's input is empty, or a product has a wrong shape.
        MismatchError: A product is wrong. The message names the layer, the product and its worst
            element.

    Example:
        >>> verify(model, mx.random.normal((64, 256)))
        2 sparse layers on Device(cpu, 0) (plain): errors within their bounds
        ...
    """
    seed = check_seed("verify", seed)
    layers = {
        path or type(layer).__name__: layer
        for path, layer in sparse_layers("verify", model).items()
    }
    recorded = _record(model, layers, inputs)
    if not recorded:
        raise ValueError(f"[verify] the model called none of {', '.join(layers)} with these inputs")
    # On CUDA some float32 products of blocks are MLX's own matmul.
    tf32 = mx.cuda.is_available() and matmul_uses_tf32()
    checks = []
    for path, layer in layers.items():
        if path in recorded:
            x = _concrete(path, recorded[path])
            checks += _check_layer(path, layer, x, seed, tf32)
    report = VerifyReport(
        checks=tuple(checks),
        not_reached=tuple(path for path in layers if path not in recorded),
        device=str(mx.default_device()),
        backend=choose("spmm", layers[next(iter(layers))].pattern.layout, 1, mx.float32).NAME,
        tf32=tf32,
    )
    if not report.passed:
        raise MismatchError(report)
    return report


@dataclass(frozen=True)
class DenseProducts:
    """The dense products of a layer in float64, and the errors that rounding explains.

    Attributes:
        expected: Value of each product, by name; of the weight, at the stored places.
        bounds: Errors allowed, of the same shapes.
    """

    expected: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray]

    def check(self, layer: str, product: str, actual: mx.array) -> Check:
        """Return the element of ``actual`` whose error is the largest part of its bound."""
        expected, bound, values = self.expected[product], self.bounds[product], to_numpy(actual)
        shape, dtype = tuple(actual.shape), actual.dtype
        if shape != expected.shape:
            raise ValueError(
                f"[verify] {layer}: the {product} has shape {shape}, expected {expected.shape}"
            )
        if not values.size:
            return Check(layer, product, shape, dtype, (), 0.0, 0.0, 0.0, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.abs(values - expected)
            part = np.where(error == 0, 0, error / bound)
        part = np.where(np.isfinite(error) & np.isfinite(bound), part, np.inf)
        index = np.unravel_index(int(np.argmax(part)), shape)
        at = [float(a[index]) for a in (values, expected, error, bound)]
        return Check(layer, product, shape, dtype, tuple(map(int, index)), *at)


@np.errstate(invalid="ignore", over="ignore")
def dense_products(
    layer: BlockSparseLinear, x: mx.array, cotangent: mx.array, tf32: bool = False
) -> DenseProducts:
    """Compute output and gradients of ``layer`` from its dense weight, on the host in float64.

    Args:
        layer: Its ``indptr``, ``indices``, ``weight`` and ``bias`` are read, nothing else.
        x: ``(..., input_dims)``.
        cotangent: ``(..., output_dims)``.
        tf32: Whether the bounds allow for factors rounded to TF32, where they are float32.
    """
    block, weight = layer.block_size, to_numpy(layer.weight)
    n_out, n_in = layer.output_dims, layer.input_dims
    counts = np.diff(np.array(layer.indptr))
    rows, cols = np.repeat(np.arange(counts.size), counts), np.array(layer.indices)
    grid = (n_out // block, n_in // block, block, block)

    def dense(values: np.ndarray) -> np.ndarray:
        out = np.zeros(grid)
        np.add.at(out, (rows, cols), values.reshape(-1, block, block))
        return out.swapaxes(1, 2).reshape(n_out, n_in)

    def sample(matrix: np.ndarray) -> np.ndarray:
        blocks = matrix.reshape(grid[0], block, grid[1], block).swapaxes(1, 2)
        return blocks[rows, cols].reshape(weight.shape)

    a, a_size = dense(weight), dense(np.abs(weight))
    n = math.prod(x.shape[:-1])
    x_rows, g_rows = to_numpy(x).reshape(n, n_in), to_numpy(cotangent).reshape(n, n_out)
    x_size, g_size = np.abs(x_rows), np.abs(g_rows)
    computed = mx.result_type(layer.weight, x)
    factors = 2 * _TF32_EPS if tf32 and computed == mx.float32 else 0.0
    expected, bounds = {}, {}

    def add(name: str, like: mx.array, value, magnitude, length, factors=factors) -> None:
        bound = tolerance(computed, length, magnitude) + factors * magnitude
        if like.dtype != computed:
            bound = bound + EPS[like.dtype] * magnitude
        expected[name] = value.reshape(like.shape)
        bounds[name] = (bound + _UNDERFLOW.get(like.dtype, 2.0**-126)).reshape(like.shape)

    bias = to_numpy(layer.bias) if "bias" in layer else np.zeros(n_out)
    length = np.repeat(counts, block) * block + 1
    add("forward", cotangent, x_rows @ a.T + bias, x_size @ a_size.T + np.abs(bias), length)
    length = np.repeat(np.bincount(cols, minlength=grid[1]), block) * block
    add("input gradient", x, g_rows @ a, g_size @ a_size, length)
    value, magnitude = sample(g_rows.T @ x_rows), sample(g_size.T @ x_size)
    add("weight gradient", layer.weight, value, magnitude, n)
    if "bias" in layer:
        add("bias gradient", layer.bias, g_rows.sum(0), g_size.sum(0), n, factors=0.0)
    return DenseProducts(expected, bounds)


def cotangent_of(y: mx.array, seed: int) -> mx.array:
    """Return a random cotangent for ``y``: eighths between -1 and 1, exact in every dtype."""
    eighths = np.random.default_rng(seed).integers(-8, 9, y.shape) / 8
    return mx.array(eighths.astype(np.float32)).astype(y.dtype)


def products_of(layer: nn.Module) -> Callable[[mx.array, mx.array], list[mx.array]]:
    """Return the function of x and a cotangent that gives what ``PRODUCTS`` names, of one layer.

    Frozen parameters have gradients too; without a bias, the last product is missing.
    """
    twin = copy.copy(layer)  # takes other arrays as its weights; the layer keeps its own

    def apply(x, weight, bias=None):
        twin.weight = weight
        if bias is not None:
            twin.bias = bias
        return twin(x)

    def products(x, cotangent):
        operands = [x, layer.weight, *([layer.bias] if "bias" in layer else [])]
        outputs, gradients = mx.vjp(apply, operands, [cotangent])
        return [*outputs, *gradients]

    return products


def matmul_uses_tf32() -> bool:
    """Return whether MLX's float32 matmul rounds its factors to TF32 on the default device."""
    beyond = 1 + 2.0**-12  # TF32 keeps 10 binary digits
    product = mx.full((256, 256), beyond) @ mx.ones((256, 256))
    return product[0, 0].item() != 256 * beyond


def _check_layer(
    path: str, layer: BlockSparseLinear, x: mx.array, seed: int, tf32: bool
) -> Iterator[Check]:
    for name, a in (("input", x), ("weight", layer.weight)):
        if not mx.issubdtype(a.dtype, mx.floating):
            raise TypeError(f"[verify] {path}: its {name} must be real floating, got {a.dtype}")
    if not x.size:
        raise ValueError(f"[verify] {path}: its input {x.shape} has no elements")
    y = layer(x)
    cotangent = cotangent_of(y, seed)
    gradients = products_of(layer)(x, cotangent)[1:]
    mx.eval(y, gradients)
    dense = dense_products(layer, x, cotangent, tf32 and layer.block_size > 1)
    for name, actual in zip(PRODUCTS, [y, *gradients], strict=False):
        yield dense.check(path, name, actual)


def _record(
    model: nn.Module, layers: dict[str, BlockSparseLinear], inputs: tuple
) -> dict[str, mx.array]:
    """Run ``model`` and return the first input of each layer that it calls, by path."""
    recorded: dict[str, mx.array] = {}

    def keep(path: str, x: mx.array, y: mx.array) -> mx.array:
        recorded.setdefault(path, x)
        return y

    training = [(module, module.training) for _, module in model.named_modules()]
    try:
        model.eval()
        with watched(layers, keep):
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


def _cell(check: Check | None) -> str:
    return "-" if check is None else f"{check.error:.1e} / {check.bound:.1e}"


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
