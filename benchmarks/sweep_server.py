"""The process that a sweep measures: sparse layers and ``nn.Linear``, checked as they go.

    python -m benchmarks.sweep_server DEVICE

It answers requests as ``server`` does. Operands are whole numbers, so small that sums are exact in
every dtype, and the oracle is NumPy's dense product: results are compared for equality. What cells
share is kept from one to the next: a pattern's products have all rows, of which a cell takes the
first.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.environments import cores
from benchmarks.measure import PAUSE
from benchmarks.peers import on_mlx, ours
from benchmarks.server import answer, versions_of
from benchmarks.workloads import draw_mask
from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn.core.backends.choose import choose

PRODUCTS = {"forward": ("spmm",), "training": ("spmm", "spmm_t", "sddmm")}
MOST_CALLS = 200
SLOW = 1.0  # seconds of a call that is not repeated


class Operands:
    """What all patterns of one shape share: x, target, and a weight's gradient for so many rows.

    Args:
        outputs: Rows of the weight.
        inputs: Columns of the weight.
        rows: The most rows of x.
    """

    def __init__(self, outputs: int, inputs: int, rows: int):
        rng = np.random.default_rng(5)
        values = np.array([-1, 0, 0, 1], np.float32)  # bfloat16 has whole numbers to 256
        self.x, self.target = (rng.choice(values, (rows, n)) for n in (inputs, outputs))
        self._gradients: dict[int, np.ndarray] = {}

    def gradient(self, rows: int) -> np.ndarray:
        """Return the dense weight's gradient for the first rows of x."""
        if rows not in self._gradients:
            product = self.target[:rows].T @ self.x[:rows]
            self._gradients[rows] = product.astype(np.int16)  # a quarter of a float64's room
        return self._gradients[rows]


class Weight:
    """A pattern, its weight with all zeros, and the oracle's products.

    Args:
        operands: Of its shape.
        block_size: Side of the blocks.
        density: Stored fraction.
    """

    def __init__(self, operands: Operands, block_size: int, density: float):
        self.operands, self.block_size = operands, block_size
        shape = operands.target.shape[1], operands.x.shape[1]
        rng = np.random.default_rng(6)
        grid = (shape[0] // block_size, shape[1] // block_size)
        self.mask = draw_mask(rng, grid, density)
        self.dense = rng.choice(np.array([-1, 1], np.float32), shape)
        self._blocks_of(self.dense)[~self.mask] = 0
        row, col = np.nonzero(self.mask)
        indptr = np.searchsorted(row, np.arange(grid[0] + 1)).astype(np.int32)
        self.pattern = CSRPattern(indptr, col.astype(np.int32), shape, block_size)
        self._products: dict[str, np.ndarray] = {}

    def stored(self, dense: np.ndarray) -> np.ndarray:
        """Return the stored values of a dense array, as the package's layers have them."""
        return self._blocks_of(dense)[self.mask].reshape(self.pattern.data_shape)

    def expected(self, step: str, rows: int, of_dense: bool) -> list[np.ndarray]:
        """Return the product, and of training also the gradients of the weight and of x."""
        y = self._product("y", lambda: self.operands.x @ self.dense.T)[:rows]
        if step == "forward":
            return [y]
        gradient = self.operands.gradient(rows)
        of_x = self._product("x", lambda: self.operands.target @ self.dense)[:rows]
        return [y, gradient if of_dense else self.stored(gradient), of_x]

    def _blocks_of(self, dense: np.ndarray) -> np.ndarray:
        (n_rows, n_cols), block = self.mask.shape, self.block_size
        return dense.reshape(n_rows, block, n_cols, block).swapaxes(1, 2)

    def _product(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        if name not in self._products:
            self._products[name] = compute()
        return self._products[name]


class SweepServer:
    """What the process answers, request by request.

    Args:
        device: "cpu" or "gpu".
    """

    def __init__(self, device: str):
        on_mlx.start(device)
        self._device = device
        self._made: dict[str, tuple[Any, Any]] = {}  # the last of each kind, and what it is of
        self._rates: dict[str, float] = {}  # dense multiply-adds a second, by dtype
        on_cpu = device == "cpu" and sys.platform == "linux"
        self._set_threads = on_mlx.openblas("set_num_threads") if on_cpu else None

    def versions(self) -> dict[str, str]:
        """Return what the packages are, who computes, and the dense layer's BLAS."""
        blas = {"blas": on_mlx.blas()} if self._device == "cpu" else {"gpu": on_mlx.gpu()}
        return versions_of(ours.PACKAGES) | ours.describe() | blas

    def sparse(self, cell: dict[str, Any], most_rows: int, seconds: float) -> dict[str, Any]:
        """Return the seconds of a cell's layer, what is wrong with its results, and who computes.

        Args:
            cell: A ``sweep.Cell``.
            most_rows: The most rows of any cell.
            seconds: How long to measure.
        """
        weight = self._weight(cell, most_rows)
        pattern, dtype = weight.pattern, getattr(mx, cell["dtype"])
        layer = BlockSparseLinear(cell["inputs"], cell["outputs"], pattern, bias=False)
        values = self._last(
            "values",
            (*_pattern(cell), cell["dtype"]),
            lambda: _array(weight.stored(weight.dense), dtype),
        )
        run = self._run(cell, weight, layer, values)
        expected = weight.expected(cell["step"], cell["rows"], of_dense=False)
        took, wrong = _checked(run, expected)
        layout, n = pattern.layout, cell["rows"]
        backends = {op: choose(op, layout, n, dtype).NAME for op in PRODUCTS[cell["step"]]}
        if took > SLOW:
            times = {"seconds": took if took < math.inf else None, "calls": 1}
        else:
            times = _fastest(run, seconds)
        return {"wrong": wrong, "backends": backends, **times}

    def dense(
        self, cell: dict[str, Any], most_rows: int, seconds: float, limit: float
    ) -> dict[str, Any]:
        """Return the seconds of the dense layer, or None where one call would take too long.

        Args:
            cell: A ``sweep.Cell``.
            most_rows: The most rows of any cell.
            seconds: How long to measure.
            limit: Seconds of a call that is not made.
        """
        work = cell["outputs"] * cell["inputs"] * cell["rows"] * len(PRODUCTS[cell["step"]])
        would_take = work / self._rates.get(cell["dtype"], float("inf"))
        if would_take > limit:
            return {"seconds": None, "why": f"a call would take {would_take:.0f} s"}
        weight = self._weight(cell, most_rows)
        layer = nn.Linear(cell["inputs"], cell["outputs"], bias=False)
        run = self._run(cell, weight, layer, _array(weight.dense, getattr(mx, cell["dtype"])))
        took, wrong = _checked(run, weight.expected(cell["step"], cell["rows"], of_dense=True))
        answer = {"seconds": took, "calls": 1} if took > SLOW else self._fastest(run, seconds)
        self._rates[cell["dtype"]] = work / answer["seconds"]
        return {**answer, "wrong": wrong}

    def _fastest(self, run: Callable[[], list[mx.array]], seconds: float) -> dict[str, Any]:
        """Return what :func:`_fastest` does, with the better of all threads of OpenBLAS and one.

        Where cores have other work, its threads wait long for one another.
        """
        answer = _fastest(run, seconds)
        if self._set_threads is None or cores() == 1:
            return answer
        self._set_threads(1)
        alone = _fastest(run, seconds)
        self._set_threads(cores())
        return min(answer, alone, key=lambda times: times["seconds"])

    def _weight(self, cell: dict[str, Any], most_rows: int) -> Weight:
        shape = (cell["outputs"], cell["inputs"], most_rows)
        operands = self._last("operands", shape, lambda: Operands(*shape))
        make = lambda: Weight(operands, cell["block_size"], cell["density"])  # noqa: E731
        return self._last("weight", (*_pattern(cell), most_rows), make)

    def _run(
        self, cell: dict[str, Any], weight: Weight, layer: Any, values: mx.array
    ) -> Callable[[], list[mx.array]]:
        """Return the function that is timed: a layer's call, or it and both gradients."""
        dtype, key = getattr(mx, cell["dtype"]), (cell["outputs"], cell["inputs"], cell["dtype"])
        of = weight.operands
        x_all = self._last("x", key, lambda: _array(of.x, dtype))
        x = mx.contiguous(x_all[: cell["rows"]])
        layer.weight = values
        mx.eval(x)
        if cell["step"] == "forward":
            return lambda: [layer(x)]
        target_all = self._last("target", key, lambda: _array(of.target, dtype))
        target = mx.contiguous(target_all[: cell["rows"]])
        mx.eval(target)

        def apply(values: mx.array, x: mx.array) -> mx.array:
            layer.weight = values
            return layer(x)

        def train() -> list[mx.array]:
            y, gradients = mx.vjp(apply, [values, x], [target])
            return [*y, *gradients]

        return train

    def _last(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made last for the same key, or make it."""
        if kind not in self._made or self._made[kind][0] != key:
            self._made.pop(kind, None)  # its memory first
            self._made[kind] = (key, make())
        return self._made[kind][1]


def _pattern(cell: dict[str, Any]) -> tuple:
    return tuple(cell[name] for name in ("outputs", "inputs", "block_size", "density"))


def _array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(values).astype(dtype)
    mx.eval(array)
    return array


def _checked(
    run: Callable[[], list[mx.array]], expected: list[np.ndarray]
) -> tuple[float, str | None]:
    """Return the seconds of the first call, and what is wrong with its results."""
    began = time.perf_counter()
    try:
        results = run()
        mx.eval(results)
    except Exception as error:  # what a product raises is a finding, too
        return math.inf, f"{type(error).__name__}: {error}"
    took = time.perf_counter() - began
    names = ("y", "the weight's gradient", "the gradient of x")
    for name, a, b in zip(names, map(on_mlx.numpy, results), expected, strict=False):
        if a.shape != b.shape:
            return took, f"{name} is of shape {a.shape}, expected {b.shape}"
        if not np.array_equal(a, b):
            at = tuple(np.argwhere(a != b)[0])
            return took, f"{name} is {a[at]:g} at {[int(i) for i in at]}, expected {b[at]:g}"
    return took, None


def _fastest(run: Callable[[], list[mx.array]], seconds: float) -> dict[str, Any]:
    """Return the least seconds of calls that take ``seconds`` in all, or of one that is slow."""
    times: list[float] = []
    time.sleep(PAUSE)
    while len(times) < MOST_CALLS and (not times or sum(times) < seconds):
        began = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - began)
    return {"seconds": float(f"{min(times):.4g}"), "calls": len(times)}


if __name__ == "__main__":
    answer(lambda: SweepServer(sys.argv[1]))
