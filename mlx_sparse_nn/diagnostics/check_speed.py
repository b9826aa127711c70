"""The times of ``python -m mlx_sparse_nn check``: the layer beside ``nn.Linear``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_sparse_nn.diagnostics.check_cases import DTYPES
from mlx_sparse_nn.diagnostics.products import cotangent_of, products_of
from mlx_sparse_nn.diagnostics.timing import Call, Key, time_in_turns
from mlx_sparse_nn.layers.linear import BlockSparseLinear

LAYERS = ((16, 0.1), (32, 0.1), (64, 0.1), (64, 0.5), (128, 0.25))  # block size, density
DENSE = (0, 1.0)  # stands for nn.Linear
SECONDS = 0.5  # of the layers of a size, dtype and number of rows


@dataclass(frozen=True)
class Sizes:
    """What is timed on a device.

    Attributes:
        features: Of input and output.
        dtypes: Of the layers.
        rows: Of x.
    """

    features: int
    dtypes: tuple[str, ...]
    rows: tuple[int, ...]


ON_GPU = Sizes(2048, ("float16", "float32"), (1, 16, 512))
ON_TENSOR_UNITS = Sizes(2048, ("float16", "bfloat16"), (64, 512))
ON_CPU = Sizes(1024, ("float32",), (1, 16, 128))  # MLX's 16-bit dense products take seconds there


@dataclass(frozen=True)
class LayerTiming:
    """The times of a layer and of the dense one, in seconds a call, medians.

    Attributes:
        block_size, density: Of the layer.
        dtype: Of values and x.
        rows: Of x.
        forward, training: Sparse and dense; training is the output, and the gradients to input,
            weight and bias.
    """

    block_size: int
    density: float
    dtype: str
    rows: int
    forward: tuple[float, float]
    training: tuple[float, float]


def time_layers(sizes: Sizes, advance: Callable[[], object]) -> list[LayerTiming]:
    """Time the layers on MLX's default device.

    Args:
        sizes: What to time.
        advance: Called after each of ``len(sizes.dtypes) * len(sizes.rows)`` parts.
    """
    timings = []
    for dtype in sizes.dtypes:
        everyone = {**_layers(sizes.features, dtype), DENSE: _dense(sizes.features, dtype)}
        for rows in sizes.rows:
            x, cotangent = _inputs(sizes.features, rows, dtype)
            forward = {key: partial(_forward, layer, x) for key, layer in everyone.items()}
            training = {
                key: partial(products_of(layer, has_weight_gradient=True), x, cotangent)
                for key, layer in everyone.items()
            }
            medians = _medians(forward), _medians(training)
            for key in LAYERS:
                pairs = ((times[key], times[DENSE]) for times in medians)
                timings.append(LayerTiming(*key, dtype, rows, *pairs))
            advance()
    return timings


def _layers(features: int, dtype: str) -> dict[tuple[int, float], nn.Module]:
    return {
        (block_size, density): _typed(
            BlockSparseLinear(features, features, block_size=block_size, density=density), dtype
        )
        for block_size, density in LAYERS
    }


def _dense(features: int, dtype: str) -> nn.Module:
    return _typed(nn.Linear(features, features), dtype)


def _typed(layer: nn.Module, dtype: str) -> nn.Module:
    layer.set_dtype(DTYPES[dtype])
    mx.eval(layer.parameters())
    return layer


def _inputs(features: int, rows: int, dtype: str) -> tuple[mx.array, mx.array]:
    x = mx.random.normal((rows, features)).astype(DTYPES[dtype])
    cotangent = cotangent_of(x, seed=0)
    mx.eval(x, cotangent)
    return x, cotangent


def _forward(layer: nn.Module, x: mx.array) -> list[mx.array]:
    return [layer(x)]


def _medians(calls: Mapping[Key, Call]) -> dict[Key, float]:
    mx.synchronize()  # what was asked for before is no part of it
    samples = time_in_turns(calls, time.perf_counter() + SECONDS)
    return {key: statistics.median(times) for key, times in samples.items()}
