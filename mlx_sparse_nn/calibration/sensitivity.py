"""How much a model's outputs change as single layers become sparse, and densities by that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.model_fit import LayerFits
from mlx_sparse_nn.calibration.progress import progress_bar
from mlx_sparse_nn.calibration.record import Recorded, Recorder, check_reached, layer_inputs
from mlx_sparse_nn.calibration.resume import FinishedStages, fingerprint
from mlx_sparse_nn.calibration.samples import Call, Rows, Samples, evaluating
from mlx_sparse_nn.calibration.selection import check_any, inside, layers_to_fit, plan_of
from mlx_sparse_nn.core.checks import check_density
from mlx_sparse_nn.core.fit import DAMPING
from mlx_sparse_nn.core.moments import check_damping
from mlx_sparse_nn.core.pattern import grid_of
from mlx_sparse_nn.core.scores import Balance, blocks_for
from mlx_sparse_nn.core.table import Report, Table
from mlx_sparse_nn.surgery.selection import replace_leaves
from mlx_sparse_nn.surgery.targets import Predicate, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from tqdm import tqdm

LEVELS = (0.125, 0.25, 0.5, 0.75)
STEP = 1 / 32  # of the densities between them
WORST = 1e6  # stands for all larger errors
MEASURING = 4  # batches at most, and one of so many


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Report, Mapping[str, float]):
    """Densities by path, as :func:`sensitivity` measured them; ``print`` it for a table.

    A mapping from paths to densities, as :func:`calibrate` and :func:`sparsify` take it.

    Attributes:
        densities: The density of each layer by path; 1 is dense.
        errors: For each layer, the relative error of the model's outputs with this layer alone
            sparse, by density.
        shapes: ``(output_dims, input_dims)`` of each.
        n_places: How many blocks each has when it is dense.
    """

    densities: dict[str, float]
    errors: dict[str, dict[float, float]]
    shapes: dict[str, tuple[int, int]]
    n_places: dict[str, int]

    def __getitem__(self, path: str) -> float:
        return self.densities[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.densities)

    def __len__(self) -> int:
        return len(self.densities)

    @property
    def density(self) -> float:
        """Stored fraction of the weights of all these layers."""
        sizes = {path: n_out * n_in for path, (n_out, n_in) in self.shapes.items()}
        return sum(self[path] * sizes[path] for path in self) / sum(sizes.values())

    def at(self, density: float) -> Sensitivity:
        """Share out another density, by the same measurements.

        Args:
            density: As in :func:`sensitivity`.

        Raises:
            TypeError: ``density`` is not a number.
            ValueError: It is not in (0, 1], or less than all levels that were measured.
        """
        owner = "Sensitivity.at"
        check_density(owner, density)
        _check_reached(owner, density, min(min(levels) for levels in self.errors.values()))
        shared = share_out(self.errors, self.shapes, self.n_places, density)
        return Sensitivity(shared, self.errors, self.shapes, self.n_places)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density of each layer over its place in the model, on matplotlib's axes.

        Layers of one name, such as ``mlp.down_proj``, are one line.

        Args:
            ax: Where to draw; by default new axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            ax = plt.subplots()[1]
        kinds: dict[str, list[tuple[int, float]]] = {}
        for path, density in self.densities.items():
            numbers = [int(part) for part in path.split(".") if part.isdecimal()]
            kind = path.split(f".{numbers[0]}.", 1)[-1] if numbers else path
            kinds.setdefault(kind, []).append((numbers[0] if numbers else 0, density))
        for number, (kind, points) in enumerate(kinds.items()):
            ax.plot(*zip(*points, strict=True), "osD^v<>"[number % 7] + "-", label=kind)
        ax.set(xlabel="block of the model", ylabel="density", ylim=(0, 1.05))
        ax.axhline(self.density, color="tab:gray", linewidth=1, label="all together")
        ax.legend(fontsize="small")
        return ax

    def _table(self) -> Table:
        levels = sorted({level for errors in self.errors.values() for level in errors})
        return Table(
            caption=f"densities of {len(self)} layers, {self.density:.3g} together, by the "
            "relative error of the model's outputs with one layer sparse",
            header=["layer", "out x in", *(f"at {level:.3g}" for level in levels), "density"],
            rows=[
                [
                    path,
                    "{} x {}".format(*self.shapes[path]),
                    *(f"{self.errors[path][level]:.3g}" for level in levels),
                    f"{density:.3g}",
                ]
                for path, density in self.densities.items()
            ],
        )


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    density: float,
    blocks: Sequence[nn.Module] | None = None,
    block_size: int = 16,
    call: Call | None = None,
    rows: Rows | None = None,
    predicate: Predicate | None = None,
    damping: float = DAMPING,
    balance: Balance = "row",
    levels: Sequence[float] = LEVELS,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Share out one density among the layers of a model, by what each costs its outputs.

    One layer at a time is made sparse as by :func:`calibrate`, at a few densities, and the model's
    outputs are compared with the dense model's. Then the squared errors of single layers, between
    these densities taken from the line through their roots, are taken to add up: layers give up
    values where that costs least for each.

    Every fourth batch, but at most four of all, is kept out of the fits, and measures: a layer that
    is fitted to few tokens seems to lose little on those. A single batch does both. The model stays
    as it is. It runs on the batches that measure once for each layer and level, from the layer's
    block on where there are ``blocks``. Their dense outputs are held.

    Args:
        model, batches, blocks, block_size, call, rows, predicate, damping, balance, progress: As in
            :func:`calibrate`. ``call`` returns an array, or a tuple that begins with one. Where
            its leading axes are those of ``rows``, only tokens that count do so here.
        density: Stored fraction of the weights of all these layers together.
        levels: The densities at which a layer is measured; none gets less than the least.
        resume: As in :func:`calibrate`; each layer that was measured is kept, for any ``density``.

    Returns:
        The densities by path: ``print`` it for a table, ``plot`` it for a picture.

    Raises:
        TypeError, ValueError: As :func:`calibrate`; or a level is no density below 1, ``density``
            is less than all levels, or the model's output is no array.

    Example:
        >>> densities = sensitivity(model, batches, blocks=model.layers, density=0.5)
        >>> calibrate(model, batches, blocks=model.layers, density=densities)
    """
    owner = "sensitivity"
    samples = Samples(owner, model, batches, call, rows)
    check_damping(owner, damping)
    check_density(owner, density)
    steps = _checked(owner, levels, density)
    targets, skipped = layers_to_fit(owner, model, predicate, density, block_size, balance)
    with evaluating(model):
        chain = None if blocks is None else BlockChain(samples, blocks)
        if chain is not None:
            targets = inside(owner, model, chain.blocks, targets, skipped, ())
        check_any(owner, targets, skipped)
        plan = {} if resume is None else plan_of(samples, targets, damping, chain)
        measuring = _Measuring(samples, damping, steps)
        if resume is not None:
            del plan["densities"]  # every one is shared out by the same measurements
            plan |= {"levels": steps, "outputs": measuring.fingerprint()}
        measuring.finished = FinishedStages(owner, resume, plan)
        with progress_bar(len(targets), "layer", progress) as bar:
            if chain is None:
                measuring.all(targets, bar)
            else:
                measuring.in_order(targets, chain, bar)
    check_reached(owner, measuring.errors)
    shapes, n_places = {}, {}
    for target in targets:
        if (path := target.paths[0]) in measuring.errors:
            n_out, n_in = target.linear.weight.shape
            shapes[path] = n_out, n_in
            n_block_rows, n_block_cols = grid_of((n_out, n_in), target.options.block_size)
            n_places[path] = n_block_rows * n_block_cols
    errors = {path: measuring.errors[path] for path in shapes}
    return Sensitivity(share_out(errors, shapes, n_places, density), errors, shapes, n_places)


def share_out(
    errors: Mapping[str, Mapping[float, float]],
    shapes: Mapping[str, tuple[int, int]],
    n_places: Mapping[str, int],
    density: float,
) -> dict[str, float]:
    """Return densities by path whose squared errors together are least, under one budget.

    They are of whole blocks, and together at least ``density``.

    Args:
        errors: For each layer, relative errors by density.
        shapes: Of the layers' weights.
        n_places: Blocks of each that is dense.
        density: Of all their values together; not less than the least of each layer.
    """
    sizes = {path: n_out * n_in / n_places[path] for path, (n_out, n_in) in shapes.items()}
    # Steps down from dense: what each costs for a value, and how many blocks it saves.
    steps: list[tuple[float, int, str, int]] = []
    for number, (path, of_layer) in enumerate(errors.items()):
        places = n_places[path]
        known = {blocks_for(level, places): error for level, error in sorted(of_layer.items())}
        known[places] = 0.0
        least, step = min(known), max(1, round(places * STEP))
        grid = np.append(np.arange(least, places, step), places)
        squares = np.interp(grid, list(known), list(known.values())) ** 2
        for low, high in pairwise(_lower_hull(grid, squares)):
            width = int(grid[high] - grid[low])
            cost = (squares[low] - squares[high]) / (width * sizes[path])
            steps.append((cost, -number, path, width))
    kept = {path: n_places[path] for path in errors}
    left = (1 - density) * sum(n_out * n_in for n_out, n_in in shapes.values())
    for _, _, path, width in sorted(steps):
        taken = min(width, int(left / sizes[path] + 1e-9))
        kept[path] -= taken
        left -= taken * sizes[path]
    return {path: kept[path] / n_places[path] for path in errors}


class _Measuring:
    """Measures the model's outputs with one layer sparse.

    Attributes:
        errors: Relative errors by path and density.
        finished: Where those of each layer are kept.
    """

    def __init__(self, samples: Samples, damping: float, levels: list[float]):
        self.errors: dict[str, dict[float, float]] = {}
        self.finished = FinishedStages(samples.owner, None, {})
        self._samples, self._levels = samples, levels
        self._fits = LayerFits(samples.owner, damping)
        numbers = [number for number in range(len(samples)) if samples.counts(number)]
        measuring = numbers[:: max(MEASURING, -(-len(numbers) // MEASURING))]
        self._fitting = [number for number in numbers if number not in measuring] or numbers
        self._wanted = {n: self._output(n, samples.run(n)) for n in measuring}
        self._scale = self._largest()

    def fingerprint(self) -> str:
        """Return a hash of the dense model's outputs."""
        return fingerprint(self._wanted)

    def _largest(self) -> float:
        """Return the largest of all outputs, or raise unless they can be compared."""
        largest = {n: float(np.array(mx.abs(out).max())) for n, out in self._wanted.items()}
        for number, value in largest.items():
            if not np.isfinite(value):
                raise ValueError(
                    f"[{self._samples.owner}] call must return finite outputs, got nan or infinity "
                    f"in batch {number}: return what comes before a mask"
                )
        if not any(largest.values()):
            raise ValueError(f"[{self._samples.owner}] call must return outputs that are not all 0")
        return max(largest.values())

    def all(self, targets: list[Target], bar: tqdm) -> None:
        """Measure all layers, from one pass through the dense model."""
        left = self._left(0, targets, bar)
        recorder = Recorder(self._samples)
        for number in self._fitting if left else ():
            recorder.add(
                number, layer_inputs(self._samples.owner, left, partial(self._samples.run, number))
            )
        self._measure(0, targets, recorder.result(), self._samples.run, bar)

    def in_order(self, targets: list[Target], chain: BlockChain, bar: tqdm) -> None:
        """Measure the layers of one block after another, of the dense model all."""
        first = 0
        for stage in range(len(chain.blocks)):
            here = inside(
                self._samples.owner, self._samples.model, [chain.blocks[stage]], targets, {}, ()
            )
            left = self._left(first, here, bar)
            recorder = Recorder(self._samples)
            for number in self._fitting if left else ():
                recorder.add(
                    number, layer_inputs(self._samples.owner, left, partial(chain.run, number))
                )
            self._measure(first, here, recorder.result(), chain.run_rest, bar, chain)
            first += len(here)
            if stage + 1 < len(chain.blocks):
                chain.advance()

    def _left(self, first: int, targets: list[Target], bar: tqdm) -> dict[str, nn.Linear]:
        """Return the layers that were not measured before, and take over those that were."""
        left = {}
        for stage, target in enumerate(targets, first):
            found = self.finished.load(stage)
            if found is None:
                left[target.paths[0]] = target.linear
            else:
                errors = dict(zip(self._levels, found[1], strict=True))
                self.errors[target.paths[0]] = errors
                bar.update()
        return left

    def _measure(
        self,
        first: int,
        targets: list[Target],
        inputs: dict[str, Recorded],
        run: Any,
        bar: tqdm,
        chain: BlockChain | None = None,
    ) -> None:
        for stage, target in enumerate(targets, first):
            path = target.paths[0]
            if path in self.errors:
                continue
            if path in inputs and inputs[path].moments.second.any():
                bar.set_description(path)
                errors = [
                    self._error(self._fitted(target, inputs[path], level), target, run, chain)
                    for level in self._levels
                ]
                self.errors[path] = dict(zip(self._levels, errors, strict=True))
                self.finished.save(stage, {}, errors)
            bar.update()

    def _fitted(self, target: Target, inputs: Recorded, level: float) -> nn.Module:
        options = replace(target.options, density=level)
        return self._fits.fit(Target(target.paths, target.linear, options), inputs)[0]

    def _error(self, layer: nn.Module, target: Target, run: Any, chain: BlockChain | None) -> float:
        """Return the relative error of the model's outputs with ``layer`` in place."""
        try:
            self._put(target.linear, layer, chain)
            squares, whole = 0.0, 0.0
            for number, wanted in self._wanted.items():
                got = self._output(number, run(number))
                squares += float(np.array(mx.square((got - wanted) / self._scale).sum()))
                whole += float(np.array(mx.square(wanted / self._scale).sum()))
        finally:
            self._put(layer, target.linear, chain)
        error = float(np.sqrt(squares / whole))
        return error if error < WORST else WORST  # of outputs that are not finite, too

    def _put(self, old: nn.Module, new: nn.Module, chain: BlockChain | None) -> None:
        replace_leaves(self._samples.model, [old], [new])
        if chain is not None:
            chain.replace([old], [new])

    def _output(self, number: int, output: Any) -> mx.array:
        """Return what the model gave for the tokens that count, in float32."""
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, mx.array) or first.ndim == 0:
            kind = "a scalar" if isinstance(first, mx.array) else type(first).__name__
            raise TypeError(
                f"[{self._samples.owner}] call must return the model's outputs, an array or a "
                f"tuple that begins with one, got {kind}"
            )
        counted = self._samples.counted[number]
        if counted is not None and counted.size == first.size // first.shape[-1]:
            first = self._samples.of_batch(number, first, "output")
        return first.astype(mx.float32)


def _checked(owner: str, levels: Sequence[float], density: float) -> list[float]:
    """Return the levels in rising order, or raise."""
    if not isinstance(levels, Sequence | np.ndarray) or len(levels) == 0:
        raise TypeError(f"[{owner}] levels must be a list of densities, got {levels!r}")
    for level in levels:
        check_density(owner, level, "levels")
        if level == 1:
            raise ValueError(f"[{owner}] levels must be below 1, where nothing is lost, got 1")
    steps = sorted({float(level) for level in levels})
    _check_reached(owner, density, steps[0])
    return steps


def _check_reached(owner: str, density: float, least: float) -> None:
    """Raise if a density is below all that was measured."""
    if density < least:
        raise ValueError(
            f"[{owner}] density must be at least the least of levels, {least:g}, got {density}: "
            "give a lower level"
        )


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Return which points are corners of the lower convex hull, from left to right."""
    hull: list[int] = []
    for point in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[point] - x[a]) < (y[point] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(point)
    return hull
