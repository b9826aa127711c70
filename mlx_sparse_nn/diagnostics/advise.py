"""advise: is a layer faster sparse or dense, on this machine and at these batch sizes?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.blocks import sample
from mlx_sparse_nn.core.checks import check_number, check_seed, check_size
from mlx_sparse_nn.core.table import Report, Table, fold
from mlx_sparse_nn.diagnostics.products import (
    MLX,
    backends_of,
    cotangent_of,
    dense_products,
    matmul_uses_tf32,
    may_round,
    products_of,
    values_of,
)
from mlx_sparse_nn.diagnostics.timing import time_in_turns
from mlx_sparse_nn.layers.dense_twin import dense_twin, why_not_quantized
from mlx_sparse_nn.layers.linear import BlockSparseLinear, QuantizedBlockSparseLinear
from mlx_sparse_nn.layers.lora import SparseLinear

METHODS = ("sparse", "mx.block_masked_mm", "nn.QuantizedLinear", "dense")
SPARSE, MASKED, QUANTIZED, DENSE = METHODS
TASKS = ("forward", "training step")

_EVEN = 1.05  # two methods are even where neither is faster by more than this


@dataclass(frozen=True)
class MethodTiming:
    """What one method took.

    Attributes:
        task: ``"forward"``, or ``"training step"``: that, and the gradients to input, weight and
            bias; of a quantized layer, to input and bias.
        rows: Rows of x.
        method: ``"sparse"``, ``"mx.block_masked_mm"``, ``"nn.QuantizedLinear"`` or ``"dense"``.
        seconds: Of one call, the median of the samples.
        fastest, slowest: Of the samples.
        samples: How many there are.
    """

    task: str
    rows: int
    method: str
    seconds: float
    fastest: float
    slowest: float
    samples: int


@dataclass(frozen=True, repr=False)
class AdviceReport(Report):
    """What :func:`advise` measured; ``print`` it for a table and what follows from it.

    Attributes:
        layer: The layer, in words.
        device: The device that computed.
        backends: What computed the products of the sparse layer, by rows of x and product:
            ``report.backends[16]["weight gradient"]`` is ``"metal"``, ``"cuda"``,
            ``"cuda-dense"``, which is MLX's product with the dense matrix, or ``"plain"``;
            ``"mlx"`` is MLX's own sum, of the bias gradient.
        timings: One for each task, batch size and method, in this order.
        left_out: Why a method or a batch size was not timed, by its name.
    """

    layer: str
    device: str
    backends: dict[int, dict[str, str]]
    timings: tuple[MethodTiming, ...]
    left_out: dict[str, str]

    def seconds(self, task: str, rows: int) -> dict[str, float]:
        """Return the median time of each method, the fastest first."""
        found = [t for t in self.timings if (t.task, t.rows) == (task, rows)]
        return {t.method: t.seconds for t in sorted(found, key=lambda t: t.seconds)}

    def sentences(self) -> list[str]:
        """Return which method wins where, one sentence for each task."""
        return [f"{task}: {self._verdict(task)}." for task in TASKS]

    def _verdict(self, task: str) -> str:
        won: dict[str, list[tuple[int, float]]] = {}
        for rows in dict.fromkeys(t.rows for t in self.timings):
            (first, best), (_, next_best), *_ = (times := self.seconds(task, rows)).items()
            if next_best <= _EVEN * best:
                won.setdefault("", []).append((rows, 1.0))
            else:
                other = next_best if first == SPARSE else times[SPARSE]
                won.setdefault(first, []).append((rows, other / best))
        parts = []
        for method, cells in won.items():
            rows = _rows([rows for rows, _ in cells])
            if not method:
                parts.append(f"no clear winner at {rows}")
                continue
            low, high = min(r for _, r in cells), max(r for _, r in cells)
            ratio = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
            other = "the next" if method == SPARSE else SPARSE
            parts.append(f"{method} wins at {rows}, {ratio} times as fast as {other}")
        return "; ".join(parts)

    def _table(self) -> Table:
        methods = [m for m in METHODS if any(t.method == m for t in self.timings)]
        rows = []
        for task in TASKS:
            for n in dict.fromkeys(t.rows for t in self.timings):
                times = self.seconds(task, n)
                cells = [_time(times[method]) if method in times else "-" for method in methods]
                rows.append([task, str(n), *cells, next(iter(times))])
        return Table(
            caption=f"{self.layer} on {self.device}",
            header=["task", "rows", *methods, "fastest"],
            rows=rows,
            notes=[
                *self.sentences(),
                *self._who_computed(),
                *(f"Not timed: {name}, since {reason}." for name, reason in self.left_out.items()),
            ],
        )

    def _who_computed(self) -> list[str]:
        """Return what computed the sparse products, one sentence for batch sizes that agree."""
        alike: dict[str, list[int]] = {}
        for n, products in self.backends.items():
            by: dict[str, list[str]] = {}
            for product, backend in products.items():
                by.setdefault(backend, []).append(product)
            text = "; ".join(f"{_enumerate(names)} by {backend}" for backend, names in by.items())
            alike.setdefault(text, []).append(n)
        return [f"sparse at {_rows(sizes)}: {text}." for text, sizes in alike.items()]


def advise(
    layer: BlockSparseLinear | QuantizedBlockSparseLinear,
    batch_sizes: Sequence[int] = (1, 16, 256),
    *,
    seconds: float = 10.0,
    seed: int = 0,
) -> AdviceReport:
    """Time a layer beside its dense twins on MLX's default device, and say which is fastest where.

    The layer is compared with ``nn.Linear`` of the same weight, and with ``mx.block_masked_mm``
    where that takes its block size and dtype; a quantized layer with ``nn.QuantizedLinear`` of the
    same packed blocks, and with ``nn.Linear`` of what they stand for. Output and gradients of each
    are compared with dense float64 products before it is timed. The methods take turns; each has a
    call to warm up and up to 9 samples, each of some milliseconds. Results are evaluated in every
    sample.

    Args:
        layer: The layer. It is not changed.
        batch_sizes: Rows of x to time.
        seconds: When to stop: no batch size is begun later than this, and the first always is. A
            batch size that has begun is finished, with fewer samples where time is short.
        seed: Seed of the inputs.

    Raises:
        TypeError: ``layer`` is not a block-sparse layer, or a batch size is not an integer.
        ValueError: A batch size is less than 1 or there is none, ``seconds`` is not positive, or
            ``seed`` is negative.
        ArithmeticError: The result of the layer, or of ``nn.Linear``, is wrong.

    Example:
        >>> advise(BlockSparseLinear(1024, 1024, density=0.1), (1, 64))
    """
    if not isinstance(layer, BlockSparseLinear | QuantizedBlockSparseLinear):
        raise TypeError(
            "[advise] layer must be a BlockSparseLinear or a QuantizedBlockSparseLinear, "
            f"got {type(layer).__name__}{_held_by(layer)}"
        )
    if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Sequence):
        raise TypeError(f"[advise] batch_sizes must be integers, got {batch_sizes!r}")
    sizes = [check_size("advise", "batch_sizes", n, minimum=1) for n in batch_sizes]
    if not sizes:
        raise ValueError("[advise] batch_sizes is empty")
    check_number("advise", "seconds", seconds)
    if not seconds > 0:
        raise ValueError(f"[advise] seconds must be positive, got {seconds}")
    seed = check_seed("advise", seed)
    end = time.perf_counter() + seconds
    contestants: dict[str, nn.Module] = {SPARSE: layer}
    left_out = {}
    if isinstance(layer, QuantizedBlockSparseLinear):
        if reason := why_not_quantized(layer):
            left_out[QUANTIZED] = reason
        else:
            contestants[QUANTIZED] = dense_twin(layer)
    elif reason := _why_not_masked(layer):
        left_out[MASKED] = reason
    else:
        contestants[MASKED] = _MaskedLinear(layer)
    contestants[DENSE] = layer.to_linear()
    timings: list[MethodTiming] = []
    for i, n in enumerate(sizes):
        if i and time.perf_counter() > end:
            left_out[f"{n} rows"] = f"{seconds:g} s were over"
            continue
        calls = _calls(layer, contestants, n, seed, left_out)
        for j, task in enumerate(TASKS):
            left = max(0.0, end - time.perf_counter())
            until = time.perf_counter() + left / (len(TASKS) * (len(sizes) - i) - j)
            timings += [
                MethodTiming(task, n, method, float(np.median(s)), min(s), max(s), len(s))
                for method, s in time_in_turns(calls[task], until).items()
            ]
    return AdviceReport(
        layer=repr(layer),
        device=str(mx.default_device()),
        backends={t.rows: backends_of(layer, t.rows, values_of(layer).dtype) for t in timings},
        timings=tuple(sorted(timings, key=lambda t: TASKS.index(t.task))),
        left_out=left_out,
    )


def _held_by(model: object) -> str:
    """Return in words which layers could be given in place of the model that holds them."""
    if not isinstance(model, nn.Module):
        return ""
    paths = [path for path, m in reversed(model.named_modules()) if isinstance(m, SparseLinear)]
    folded = [path for path, _ in fold(paths, [None] * len(paths))]
    return f"; give one of its layers: {', '.join(folded)}" if paths else ""


class _MaskedLinear(nn.Module):
    """``nn.Linear`` by ``mx.block_masked_mm``: a dense weight, and a mask of its blocks."""

    def __init__(self, layer: BlockSparseLinear):
        super().__init__()
        self.weight = layer.todense()
        if "bias" in layer:
            self.bias = layer.bias
        self.mask = layer.pattern.tomask()[:: layer.block_size, :: layer.block_size].T
        self.block_size = layer.block_size

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.block_masked_mm(x, self.weight.T, self.block_size, None, None, self.mask)
        return y + self.bias if "bias" in self else y


def _why_not_masked(layer: BlockSparseLinear) -> str | None:
    """Return why ``mx.block_masked_mm`` cannot do what the layer does, if it cannot."""
    if layer.block_size not in (32, 64):
        return f"it takes block_size 32 and 64, not {layer.block_size}"
    if mx.default_device().type == mx.cpu and layer.weight.dtype != mx.float32:
        return f"on the CPU it takes float32, not {layer.weight.dtype}"
    return None


def _calls(
    layer: SparseLinear,
    contestants: dict[str, nn.Module],
    n: int,
    seed: int,
    left_out: dict[str, str],
) -> dict[str, dict[str, Callable[[], list[mx.array]]]]:
    """Return what to time, by task and method, once every result has been found right."""
    x = mx.random.normal((n, layer.input_dims), key=mx.random.key(seed))
    x = x.astype(values_of(layer).dtype)
    cotangent = cotangent_of(layer(x), seed)
    expected, tf32 = dense_products(layer, x, cotangent), matmul_uses_tf32()
    by_sparse = backends_of(layer, n, x.dtype)
    has_weight_gradient = "weight gradient" in by_sparse

    def forward(module: nn.Module) -> Callable[[], list[mx.array]]:
        return lambda: [module(x)]

    def step(module: nn.Module) -> Callable[[], list[mx.array]]:
        products = products_of(module, has_weight_gradient)
        return lambda: products(x, cotangent)

    for method, module in list(contestants.items()):
        results = step(module)()
        if (
            has_weight_gradient and module is not layer
        ):  # its weight is dense: compare the stored places
            results[2] = sample(layer.pattern.layout, results[2][None])[0]
        backends = by_sparse if module is layer else dict.fromkeys(by_sparse, MLX)
        checks = [
            expected.check(
                method, product, backend, actual, tf32 and may_round(backend, layer, n, x.dtype)
            )
            for (product, backend), actual in zip(backends.items(), results, strict=True)
        ]
        wrong = [str(check) for check in checks if not check.passed]
        if wrong and method in (SPARSE, DENSE):
            raise ArithmeticError(f"[advise] wrong result: {wrong[0]}")
        if wrong:
            left_out[method] = f"its result is wrong: {wrong[0]}"
            del contestants[method]
    return {
        task: {method: call(module) for method, module in contestants.items()}
        for task, call in zip(TASKS, (forward, step), strict=True)
    }


def _enumerate(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _rows(sizes: list[int]) -> str:
    return f"{_enumerate([str(n) for n in sizes])} row{'s' * (sizes != [1])}"


def _time(seconds: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"
