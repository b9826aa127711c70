"""The products of a layer, those of its dense weight in float64, and how far apart they may be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.backends import cuda, cuda_dense, cuda_tiles, plain
from mlx_sparse_nn.core.backends.choose import choose
from mlx_sparse_nn.core.quantized import unpack
from mlx_sparse_nn.diagnostics.rounding import EPS, TF32_EPS, to_numpy, tolerance, underflow
from mlx_sparse_nn.layers.linear import QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import SparseLinear

_OPS = {"forward": "spmm", "input gradient": "spmm_t", "weight gradient": "sddmm"}
_QUANTIZED_OPS = {"forward": "qspmm", "input gradient": "qspmm_t"}
PRODUCTS = (*_OPS, "bias gradient")  # quantized layers have no weight gradient
MLX = "mlx"  # what computes a product that no backend is asked for: MLX's own operations


@dataclass(frozen=True)
class ProductCheck:
    """One product of one layer, at the element where its error is the largest part of its bound.

    Attributes:
        layer: Path of the layer in the model; its type where it was given itself.
        product: ``"forward"``, ``"input gradient"``, ``"weight gradient"`` or ``"bias gradient"``.
        backend: What computed it: ``"metal"``, ``"cuda"``, ``"cuda-dense"`` or ``"plain"``;
            ``"mlx"`` is a sum or a product of MLX's own.
        shape: Shape of the product.
        dtype: Its dtype.
        index: The element, one integer for each axis; empty if the product has no elements.
        actual: What MLX computed.
        expected: What the dense product gives in float64.
        error: ``abs(actual - expected)``.
        bound: The error that rounding explains.
        tf32: Whether the bound allows for factors rounded to TF32.
    """

    layer: str
    product: str
    backend: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    index: tuple[int, ...]
    actual: float
    expected: float
    error: float
    bound: float
    tf32: bool

    @property
    def passed(self) -> bool:
        """Whether the error is finite and within the bound."""
        return self.error <= self.bound < math.inf

    def __str__(self) -> str:
        return (
            f"{self.layer}: the {self.product} {self.shape} is {self.actual:.9g} at "
            f"{list(self.index)}, the dense one {self.expected:.9g}: error {self.error:.3g}, "
            f"bound {self.bound:.3g} for {dtype_name(self.dtype)}, computed by {self.backend}"
        )


@dataclass(frozen=True)
class DenseProducts:
    """The dense products of a layer in float64, and the errors that rounding explains.

    Attributes:
        expected: Value of each product, by name; of the weight, at the stored places.
        bounds: Errors allowed, of the same shapes.
        tf32_errors: What comes on top where factors are rounded to TF32, of the same shapes. Only
            products of float32 have it.
    """

    expected: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray]
    tf32_errors: dict[str, np.ndarray]

    def check(
        self, layer: str, product: str, backend: str, actual: mx.array, tf32: bool
    ) -> ProductCheck:
        """Return the element of ``actual`` whose error is the largest part of its bound.

        Args:
            layer: Path of the layer.
            product: One of ``PRODUCTS``.
            backend: What computed it.
            actual: What it computed.
            tf32: Whether it may have rounded float32 factors to TF32.

        Raises:
            ValueError: ``actual`` has another shape than the dense product.
        """
        expected, bound, values = self.expected[product], self.bounds[product], to_numpy(actual)
        shape, dtype = tuple(actual.shape), actual.dtype
        if shape != expected.shape:
            raise ValueError(
                f"[verify] {layer}: the {product} has shape {shape}, expected {expected.shape}"
            )
        tf32 = tf32 and product in self.tf32_errors
        if tf32:
            bound = bound + self.tf32_errors[product]
        index, at = (), (0.0, 0.0, 0.0, 0.0)
        if values.size:
            with np.errstate(invalid="ignore", divide="ignore"):
                error = np.abs(values - expected)
                part = np.where(error == 0, 0, error / bound)
            part = np.where(np.isfinite(error) & np.isfinite(bound), part, np.inf)
            index = tuple(map(int, np.unravel_index(int(np.argmax(part)), shape)))
            at = values[index], expected[index], error[index], bound[index]
        actual_at, expected_at, error_at, bound_at = map(float, at)
        return ProductCheck(
            layer=layer,
            product=product,
            backend=backend,
            shape=shape,
            dtype=dtype,
            index=index,
            actual=actual_at,
            expected=expected_at,
            error=error_at,
            bound=bound_at,
            tf32=tf32,
        )


@np.errstate(invalid="ignore", over="ignore")
def dense_products(layer: SparseLinear, x: mx.array, cotangent: mx.array) -> DenseProducts:
    """Compute output and gradients of ``layer`` from its dense weight, on the host in float64.

    Args:
        layer: Its ``indptr``, ``indices``, ``weight`` and ``bias`` are read, and ``scales`` and
            ``biases`` if it is quantized; nothing else.
        x: ``(..., input_dims)``.
        cotangent: ``(..., output_dims)``.
    """
    block_size, (weight, weight_size) = layer.block_size, _weight(layer)
    n_out, n_in = layer.output_dims, layer.input_dims
    counts = np.diff(np.array(layer.indptr))
    rows, cols = np.repeat(np.arange(counts.size), counts), np.array(layer.indices)
    grid = (-(-n_out // block_size), -(-n_in // block_size), block_size, block_size)
    whole = grid[0] * block_size, grid[1] * block_size

    def dense(values: np.ndarray) -> np.ndarray:
        out = np.zeros(grid)
        np.add.at(out, (rows, cols), values.reshape(-1, block_size, block_size))
        return out.swapaxes(1, 2).reshape(whole)[:n_out, :n_in]

    def sample(matrix: np.ndarray) -> np.ndarray:
        matrix = np.pad(matrix, ((0, whole[0] - n_out), (0, whole[1] - n_in)))
        blocks = matrix.reshape(grid[0], block_size, grid[1], block_size).swapaxes(1, 2)
        return blocks[rows, cols].reshape(weight.shape)

    a, a_size = dense(weight), dense(weight_size)
    n = math.prod(x.shape[:-1])
    x_rows, g_rows = to_numpy(x).reshape(n, n_in), to_numpy(cotangent).reshape(n, n_out)
    x_size, g_size = np.abs(x_rows), np.abs(g_rows)
    computed = mx.result_type(values_of(layer), x)
    expected, bounds, tf32_errors = {}, {}, {}

    def add(name: str, like: mx.array, value, magnitude, length) -> None:
        bound = tolerance(computed, length, magnitude)
        if like.dtype != computed:
            bound = bound + EPS[like.dtype] * magnitude
        expected[name] = value.reshape(like.shape)
        bounds[name] = (bound + underflow(like.dtype)).reshape(like.shape)
        if name in _OPS and computed == mx.float32:  # a bias gradient has no factors
            tf32_errors[name] = (2 * TF32_EPS * magnitude).reshape(like.shape)

    bias = to_numpy(layer.bias) if "bias" in layer else np.zeros(n_out)
    length = np.repeat(counts, block_size)[:n_out] * block_size + 1
    add("forward", cotangent, x_rows @ a.T + bias, x_size @ a_size.T + np.abs(bias), length)
    length = np.repeat(np.bincount(cols, minlength=grid[1]), block_size)[:n_in] * block_size
    add("input gradient", x, g_rows @ a, g_size @ a_size, length)
    if not isinstance(layer, QuantizedBlockSparseLinear):
        value, magnitude = sample(g_rows.T @ x_rows), sample(g_size.T @ x_size)
        add("weight gradient", layer.weight, value, magnitude, n)
    if "bias" in layer:
        add("bias gradient", layer.bias, g_rows.sum(0), g_size.sum(0), n)
    return DenseProducts(expected, bounds, tf32_errors)


def values_of(layer: SparseLinear) -> mx.array:
    """Return the array whose dtype is that of a layer's values."""
    return layer["scales"] if isinstance(layer, QuantizedBlockSparseLinear) else layer.weight


def _weight(layer: SparseLinear) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored values, and the sizes of what they are sums of."""
    weight = layer.weight
    if not isinstance(layer, QuantizedBlockSparseLinear):
        values = to_numpy(weight)
        return values, np.abs(values)
    repeat = lambda a: np.repeat(to_numpy(a), layer.group_size, axis=-1)  # noqa: E731
    scales, biases = repeat(layer.scales), repeat(layer.biases)
    scaled = scales * (unpack(weight) if weight.size else 0)
    return scaled + biases, np.abs(scaled) + np.abs(biases)


def backends_of(layer: SparseLinear, n_x: int, dtype: mx.Dtype) -> dict[str, str]:
    """Return what computes each product of a layer on the default device, by the product's name.

    Args:
        layer: The layer.
        n_x: Rows of x.
        dtype: Of x.

    Returns:
        ``"metal"``, ``"cuda"``, ``"cuda-dense"`` or ``"plain"``; ``"mlx"`` for the bias gradient,
        if there is a bias: MLX's own sum.
    """
    computed, layout = mx.result_type(values_of(layer), dtype), layer.pattern.layout
    ops, bits = _OPS, 0
    if isinstance(layer, QuantizedBlockSparseLinear):
        ops, bits = _QUANTIZED_OPS, layer.bits
    names = {
        product: choose(op, layout, n_x, computed, bits=bits).NAME for product, op in ops.items()
    }
    return names | ({"bias gradient": MLX} if "bias" in layer else {})


def cotangent_of(y: mx.array, seed: int) -> mx.array:
    """Return a random cotangent for ``y``: eighths between -1 and 1, exact in every dtype."""
    eighths = np.random.default_rng(seed).integers(-8, 9, y.shape) / 8
    return mx.array(eighths.astype(np.float32)).astype(y.dtype)


def products_of(
    layer: nn.Module, has_weight_gradient: bool
) -> Callable[[mx.array, mx.array], list[mx.array]]:
    """Return the function of x and a cotangent that gives what ``PRODUCTS`` names, of one layer.

    Frozen parameters have gradients too. Without a bias, the last product is missing; without a
    gradient to the weight, which quantized layers do not have, the third.
    """
    twin = copy.copy(layer)  # takes other arrays as its weights; the layer keeps its own
    names = ["weight"] * has_weight_gradient + ["bias"] * ("bias" in layer)

    def apply(x, *parameters):
        for name, value in zip(names, parameters, strict=True):
            twin[name] = value
        return twin(x)

    def products(x, cotangent):
        operands = [x, *(layer[name] for name in names)]
        outputs, gradients = mx.vjp(apply, operands, [cotangent])
        return [*outputs, *gradients]

    return products


def matmul_uses_tf32() -> bool:
    """Return whether MLX's float32 matmul rounds its factors to TF32 on the default device."""
    beyond = 1 + 2.0**-12  # TF32 keeps 10 binary digits
    product = mx.full((256, 256), beyond) @ mx.ones((256, 256))
    return product[0, 0].item() != 256 * beyond


def may_round(backend: str, layer: SparseLinear, n_x: int, dtype: mx.Dtype) -> bool:
    """Return whether a product may round float32 factors to TF32, where MLX's own products do.

    Args:
        backend: What computes it, as :func:`backends_of` says.
        layer: The layer.
        n_x: Rows of x.
        dtype: Of x.
    """
    return rounds_factors(
        backend, layer.pattern.block_size, n_x, mx.result_type(values_of(layer), dtype)
    )


def rounds_factors(backend: str, block_size: int, n_x: int, dtype: mx.Dtype) -> bool:
    """Return the same of a product with blocks of a size, computed in ``dtype``."""
    if backend == cuda.NAME:
        return cuda_tiles.has_tiles(block_size, n_x, dtype)
    return backend in (cuda_dense.NAME, plain.NAME, MLX)


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the name of a dtype without its module: ``"float32"``."""
    return str(dtype).rpartition(".")[2]
