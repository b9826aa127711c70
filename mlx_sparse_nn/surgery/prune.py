"""Gradual pruning: a schedule of densities, and dropping the weakest blocks between two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_sparse_nn.core.checks import check_density, check_name, check_size
from mlx_sparse_nn.core.edges import clear
from mlx_sparse_nn.core.fit import Fit
from mlx_sparse_nn.core.moments import InputMoments
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.relative_error import relative_error
from mlx_sparse_nn.core.scores import (
    Balance,
    BlockPlaces,
    Score,
    block_scores,
    blocks_for,
    check_balance,
    check_score,
    share_by_score,
    strongest_positions,
)
from mlx_sparse_nn.core.table import LARGEST, NOT_MEASURED, Report, Table, fold
from mlx_sparse_nn.layers.linear import BlockSparseLinear, write_values
from mlx_sparse_nn.layers.parameters import density_of
from mlx_sparse_nn.surgery.densities import Density, check_one_budget, density_by_path
from mlx_sparse_nn.surgery.moment_fits import MomentFits, moment_fits
from mlx_sparse_nn.surgery.optimizer_state import change_pattern, moments_of
from mlx_sparse_nn.surgery.selection import blocks_of_floats
from mlx_sparse_nn.surgery.sparsify_report import ERROR_COLUMN, ErrorOf, largest

Scope: TypeAlias = Literal["layer", "global"]


def cubic_density(
    init: float, end: float, steps: int, start: int = 0
) -> Callable[[int | mx.array], float]:
    r"""Make a schedule of densities that falls fast, then ever more slowly.

    .. math::

        d_t = d_{end} + (d_{init} - d_{end}) \left(1 - \frac{t - t_{start}}{steps}\right)^3

    from step ``start`` to step ``start + steps``, and constant before and after: the schedule of
    "To prune, or not to prune" (Zhu and Gupta, 2017), which states it for the fraction of zeros.

    Args:
        init: Density up to step ``start``, in (0, 1].
        end: Density from step ``start + steps`` on, in (0, ``init``].
        steps: Steps from one to the other, at least 1.
        start: The step at which it begins to fall.

    Returns:
        A function of the step, as the schedules of ``mlx.optimizers`` are. It returns a Python
        float, which :func:`prune` takes.

    Raises:
        TypeError: A density is not a number, or ``steps`` or ``start`` not an integer.
        ValueError: A number is out of its range.

    Example:
        >>> schedule = cubic_density(1.0, 0.1, steps=1000)
        >>> [round(schedule(step), 4) for step in (0, 500, 1000)]
        [1.0, 0.2125, 0.1]
    """
    owner = "cubic_density"
    check_density(owner, init, "init")
    check_density(owner, end, "end")
    if end > init:
        raise ValueError(f"[{owner}] end must be at most init = {init}, got {end}")
    check_size(owner, "steps", steps, minimum=1)
    check_size(owner, "start", start)

    def schedule(step: int | mx.array) -> float:
        left = 1 - min(max(int(step) - start, 0), steps) / steps
        return end + (init - end) * left**3

    return schedule


@dataclass(frozen=True, eq=False, repr=False)
class PruneReport(Report):
    """What :func:`prune` did; ``print`` it for a table.

    Attributes:
        before: Number of blocks that each layer stored before, by path.
        after: Number of blocks that it stores now.
        errors: Relative error of each layer's weight against what it was before, by path; where
            values were fitted to moments, ``error_of`` "outputs": of its outputs.
        error_of: "weights" or "outputs".
        density: Stored fraction of all these weights now.
        model_density: Stored fraction of all parameters of the model, dense ones included.
    """

    before: dict[str, int]
    after: dict[str, int]
    errors: dict[str, float]
    error_of: ErrorOf
    density: float
    model_density: float

    def _table(self) -> Table:
        paths = list(self.before)
        cells = [_cells(before, self.after[path]) for path, before in self.before.items()]
        lines = fold(paths, [tuple(line) for line in cells])
        notes = [f"error: of the {self.error_of}, against what they were before", NOT_MEASURED]
        if len(lines) < len(cells):
            notes.insert(0, f"{LARGEST}; the total is of all")
        return Table(
            caption=f"blocks stored: density {self.density:.3g} there, "
            f"{self.model_density:.3g} in all",
            header=["layer", "before", "now", "kept", ERROR_COLUMN[self.error_of]],
            rows=[
                [path, *cells[places[0]], largest([self.errors[paths[i]] for i in places])]
                for path, places in lines
            ],
            total=["total", *_cells(sum(self.before.values()), sum(self.after.values())), ""],
            notes=notes,
        )


def prune(
    model: nn.Module,
    density: Density,
    *,
    optimizer: optim.Optimizer | None = None,
    score: Score | None = None,
    scope: Scope = "layer",
    balance: Balance = "row",
    moments: Mapping[str, InputMoments] | None = None,
    damping: float | None = None,
) -> PruneReport:
    """Drop the weakest stored blocks of every BlockSparseLinear, down to a density.

    Call it between training steps, compiled or not. A model that starts dense is one whose layers
    have density 1: ``sparsify(model, density=1.0)``. No layer becomes denser: where fewer blocks
    are stored than ``density`` asks for, they stay as they are. ::

        schedule = cubic_density(1.0, 0.1, steps=1000)
        for step in range(2000):
            train_step(...)
            if step % 100 == 0:
                prune(model, schedule(step), optimizer=optimizer)

    Args:
        model: Changed in place; it may itself be a layer.
        density: Stored fraction to come down to, in (0, 1]; a layer keeps one block at least. Or a
            mapping from paths to such fractions: layers that it does not name stay as they are. A
            layer that the model holds at several paths is named by any of them.
        optimizer: The optimizer that updates ``model``. Its moments, of whatever kind, are kept for
            the blocks that stay. Needed once it has been used, since its state would not fit.
        score: What makes a block strong: ``"l1"``, ``"l2"`` (the default), ``"max"``, or a function
            of the stored blocks ``(n_blocks, B, B)``, or of these and their :class:`BlockPlaces`,
            that returns ``(n_blocks,)`` numbers.
        scope: ``"layer"`` brings each layer to the density; ``"global"`` brings the layers together
            to it: as many blocks stay in each as it has among the strongest of all. They must be
            of one size, and ``density`` is one number then.
        balance: Within a layer, as in ``BlockSparseLinear.from_linear``: ``"row"`` keeps the same
            number of blocks in every block-row, give or take one, as far as they are stored;
            ``"global"`` keeps the strongest wherever they lie.
        moments: Of what goes into each layer to prune, by path, as :func:`layer_moments` returns
            them. The ``score`` is then ``"obs"`` by default: what the outputs lose without a block
            when the others that are stored are fitted anew, relative to all outputs of the layer.
            The values and the biases of the layers that lose blocks are so fitted.
        damping: How much the fit holds on to the present values, 0.01 by default. For ``moments``.

    Returns:
        What was done; ``print`` it for a table.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``density``, ``score``, ``scope`` or ``balance`` is out of its range,
            ``density`` names a path at which there is no BlockSparseLinear, the model has none or a
            quantized one, a weight is not finite, block sizes differ under ``"global"``, or a state
            of the optimizer cannot follow. Nothing is changed then.
    """
    if not isinstance(density, Mapping):
        check_density("prune", density)
    fits = moment_fits("prune", moments, damping)
    if score is None:
        score = "l2" if fits is None else "obs"
    check_score("prune", score, has_moments=fits is not None)
    check_balance("prune", balance)
    check_name("prune", "scope", scope, ("layer", "global"))
    check_one_budget("prune", density, scope)
    layers = blocks_of_floats("prune", model)
    before = {path: layer.pattern.n_blocks for path, layer in layers.items()}
    paths = _paths(model, layers)
    densities = density_by_path("prune", density, "BlockSparseLinear", list(paths.values()))
    chosen = {path: layer for path, layer in layers.items() if path in densities}
    states = {path: moments_of("prune", optimizer, model, layer) for path, layer in chosen.items()}
    if fits is not None:
        for path, layer in chosen.items():
            fits.of(paths[path], layer.input_dims)
    scores = {path: _scores(paths[path], layer, score, fits) for path, layer in chosen.items()}
    if isinstance(density, Mapping) or scope == "layer":
        counts = {
            path: min(before[path], blocks_for(densities[path], layer.pattern.n_places))
            for path, layer in chosen.items()
        }
    else:
        counts = _global_counts(layers, scores, density)
    patterns = {
        path: _subpattern(layer.pattern, scores[path], counts[path], balance)
        for path, layer in chosen.items()
    }
    pruned = {path: chosen[path] for path, count in counts.items() if count < before[path]}
    fitted = {}
    if fits is not None:
        fitted = {
            path: fits.fit(paths[path], layer.todense(), layer.get("bias"), patterns[path])
            for path, layer in pruned.items()
        }
    errors = dict.fromkeys(layers, 0.0)
    for path, layer in pruned.items():
        errors[path] = _prune_layer(layer, patterns[path], states[path], fitted.get(path))
    of: ErrorOf = "weights" if fits is None else "outputs"
    return PruneReport(before, before | counts, errors, of, _density(layers), density_of(model))


def _paths(model: nn.Module, layers: dict[str, BlockSparseLinear]) -> dict[str, list[str]]:
    """Return all paths of each layer, by the first."""
    found: dict[int, list[str]] = {id(layer): [] for layer in layers.values()}
    for path, module in reversed(model.named_modules()):
        if id(module) in found:
            found[id(module)].append(path)
    return {path: found[id(layer)] for path, layer in layers.items()}


def _scores(
    paths: list[str], layer: BlockSparseLinear, score: Score, fits: MomentFits | None
) -> np.ndarray:
    """Return how strong each stored block of a layer is."""
    pattern = layer.pattern
    if fits is not None and score == "obs":
        weight, has_bias = layer.todense(), "bias" in layer
        grid = fits.scores(paths, weight, has_bias, pattern.block_size, pattern)
        return grid[pattern.row_indices, pattern.indices]
    moments = None if fits is None else fits.of(paths, layer.input_dims)
    blocks = clear(pattern.layout, layer.weight)
    places = partial(BlockPlaces.of_pattern, paths[0], pattern, moments=moments)
    return block_scores(blocks, score, places, owner=f"prune {paths[0]}".rstrip())


def _global_counts(
    layers: dict[str, BlockSparseLinear], scores: dict[str, np.ndarray], density: float
) -> dict[str, int]:
    """Return how many of the strongest blocks of all layers lie in each, at least 1 each."""
    sizes = {layer.block_size for layer in layers.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"[prune] scope 'global' compares blocks of one size, got {sorted(sizes)}; "
            "prune the layers one by one"
        )
    n_stored = sum(layer_scores.size for layer_scores in scores.values())
    places = sum(layer.pattern.n_places for layer in layers.values())
    budget = min(n_stored, max(len(layers), blocks_for(density, places)))
    counts = share_by_score(list(scores.values()), budget)
    return dict(zip(layers, counts.tolist(), strict=True))


def _subpattern(
    pattern: CSRPattern, scores: np.ndarray, count: int, balance: Balance
) -> CSRPattern:
    """Return the ``count`` strongest blocks of a pattern, in their order."""
    kept = strongest_positions(scores, pattern.row_indices, count, balance)
    return CSRPattern.from_places(pattern.places[kept], pattern.shape, pattern.block_size)


def _prune_layer(
    layer: BlockSparseLinear, pattern: CSRPattern, states: list[dict[str, Any]], fit: Fit | None
) -> float:
    """Give a layer another pattern, and fitted values if there are some; return its error."""
    before = clear(layer.pattern.layout, layer.weight)
    source = change_pattern(layer, pattern, states)
    if fit is not None:
        write_values(layer, fit.weight, fit.bias)
        return fit.error_after
    kept = np.zeros((len(before), *[1] * (before.ndim - 1)), dtype=bool)
    kept[source] = True
    return relative_error(before, mx.where(mx.array(kept), before, mx.zeros((), before.dtype)))


def _density(layers: dict[str, BlockSparseLinear]) -> float:
    places = sum(layer.input_dims * layer.output_dims for layer in layers.values())
    return sum(layer.pattern.nnz for layer in layers.values()) / max(1, places)


def _cells(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{after / max(1, before):.1%}"]
