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
from mlx_sparse_nn.layers.linear import BlockSparseLinear
from mlx_sparse_nn.layers.parameters import density_of
from mlx_sparse_nn.surgery.densities import Density, check_one_budget, density_by_path
from mlx_sparse_nn.surgery.optimizer_state import change_pattern, moments_of
from mlx_sparse_nn.surgery.selection import blocks_of_floats
from mlx_sparse_nn.surgery.sparsify_report import largest

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
        errors: Relative error of each layer's weight against what it was before, by path.
        density: Stored fraction of all these weights now.
        model_density: Stored fraction of all parameters of the model, dense ones included.
    """

    before: dict[str, int]
    after: dict[str, int]
    errors: dict[str, float]
    density: float
    model_density: float

    def _table(self) -> Table:
        paths = list(self.before)
        cells = [_cells(before, self.after[path]) for path, before in self.before.items()]
        lines = fold(paths, [tuple(line) for line in cells])
        notes = ["error: of the weights, against what they were before", NOT_MEASURED]
        if len(lines) < len(cells):
            notes.insert(0, f"{LARGEST}; the total is of all")
        return Table(
            caption=f"blocks stored: density {self.density:.3g} there, "
            f"{self.model_density:.3g} in all",
            header=["layer", "before", "now", "kept", "error"],
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
    score: Score = "l2",
    scope: Scope = "layer",
    balance: Balance = "row",
) -> PruneReport:
    """Drop the weakest stored blocks of every BlockSparseLinear, down to a density.

    Call it between training steps, compiled or not. A model that starts dense is one whose layers
    have density 1: ``sparsify(model, density=1.0)``. No layer becomes denser: where fewer blocks
    are stored than ``density`` asks for, they stay as they are.

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
        score: What makes a block strong: ``"l1"``, ``"l2"``, ``"max"``, or a function of the stored
            blocks ``(n_blocks, B, B)``, or of these and their :class:`BlockPlaces`, that returns
            ``(n_blocks,)`` numbers.
        scope: ``"layer"`` brings each layer to the density; ``"global"`` brings the layers together
            to it: as many blocks stay in each as it has among the strongest of all. They must be
            of one size, and ``density`` is one number then.
        balance: Within a layer, as in ``BlockSparseLinear.from_linear``: ``"row"`` keeps the same
            number of blocks in every block-row, give or take one, as far as they are stored;
            ``"global"`` keeps the strongest wherever they lie.

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
    check_score("prune", score)
    check_balance("prune", balance)
    check_name("prune", "scope", scope, ("layer", "global"))
    check_one_budget("prune", density, scope)
    layers = blocks_of_floats("prune", model)
    before = {path: layer.pattern.n_blocks for path, layer in layers.items()}
    densities = density_by_path("prune", density, "BlockSparseLinear", _paths(model, layers))
    chosen = {path: layer for path, layer in layers.items() if path in densities}
    moments = {path: moments_of("prune", optimizer, model, layer) for path, layer in chosen.items()}
    scores = {path: _scores(path, layer, score) for path, layer in chosen.items()}
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
    errors = dict.fromkeys(layers, 0.0)
    for path, layer in chosen.items():
        if counts[path] < before[path]:
            errors[path] = _prune_layer(layer, patterns[path], moments[path])
    return PruneReport(before, before | counts, errors, _density(layers), density_of(model))


def _paths(model: nn.Module, layers: dict[str, BlockSparseLinear]) -> list[list[str]]:
    """Return all paths of each layer."""
    found: dict[int, list[str]] = {id(layer): [] for layer in layers.values()}
    for path, module in reversed(model.named_modules()):
        if id(module) in found:
            found[id(module)].append(path)
    return list(found.values())


def _scores(path: str, layer: BlockSparseLinear, score: Score) -> np.ndarray:
    """Return how strong each stored block of a layer is."""
    pattern = layer.pattern
    blocks = clear(pattern.layout, layer.weight)
    places = partial(BlockPlaces.of_pattern, path, pattern)
    return block_scores(blocks, score, places, owner=f"prune {path}".rstrip())


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
    layer: BlockSparseLinear, pattern: CSRPattern, moments: list[dict[str, Any]]
) -> float:
    """Give a layer another pattern, and return the relative error of its weight."""
    before = clear(layer.pattern.layout, layer.weight)
    kept = np.zeros((len(before), *[1] * (before.ndim - 1)), dtype=bool)
    kept[change_pattern(layer, pattern, moments)] = True
    return relative_error(before, mx.where(mx.array(kept), before, mx.zeros((), before.dtype)))


def _density(layers: dict[str, BlockSparseLinear]) -> float:
    places = sum(layer.input_dims * layer.output_dims for layer in layers.values())
    return sum(layer.pattern.nnz for layer in layers.values()) / max(1, places)


def _cells(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{after / max(1, before):.1%}"]
