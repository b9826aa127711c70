"""Dynamic sparse training: dropping the weakest blocks of layers and growing as many elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_sparse_nn.core.checks import (
    check_absent,
    check_features,
    check_floating,
    check_fraction,
    check_name,
    check_seed,
)
from mlx_sparse_nn.core.edges import clear
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.scores import (
    BlockPlaces,
    Score,
    block_scores,
    check_score,
    grid_scores,
    strongest_positions,
)
from mlx_sparse_nn.core.table import NOT_MEASURED, Report, Table, fold
from mlx_sparse_nn.layers.layer_calls import observed, sparse_layers
from mlx_sparse_nn.layers.linear import BlockSparseLinear
from mlx_sparse_nn.surgery.optimizer_state import change_pattern, moments_of
from mlx_sparse_nn.surgery.selection import blocks_of_floats

Criterion: TypeAlias = Literal["gradient", "random"]
Activations: TypeAlias = Mapping[str, tuple[mx.array, mx.array]]  # by path: inputs, cotangents

TILE = 2**20  # values of the dense gradient that are computed at a time


@dataclass(frozen=True, eq=False, repr=False)
class RegrowReport(Report):
    """What :func:`regrow` did; ``print`` it for a table.

    Attributes:
        dropped: By path of the layer, ``(n, 2)`` int64: block-row and block-column of each block
            dropped.
        grown: Those of each new block.
        n_blocks: Blocks that the layer stores, before as after.
        not_reached: Paths of the layers that were left alone, since the loss does not depend on
            them.
    """

    dropped: dict[str, np.ndarray]
    grown: dict[str, np.ndarray]
    n_blocks: dict[str, int]
    not_reached: tuple[str, ...]

    def _table(self) -> Table:
        counts = {path: len(grown) for path, grown in self.grown.items()}
        cells = [_cells(self.n_blocks[path], count) for path, count in counts.items()]
        lines = fold(list(counts), [tuple(line) for line in cells])
        n_blocks, n_grown = sum(self.n_blocks.values()), sum(counts.values())
        notes = [NOT_MEASURED]
        if self.not_reached:
            paths = fold(self.not_reached, [None] * len(self.not_reached))
            notes.insert(0, f"not reached by the loss: {', '.join(path for path, _ in paths)}")
        if len(lines) < len(cells):
            notes.insert(0, "x n: n layers alike, with the numbers of each; the total is of all")
        return Table(
            caption=f"{n_grown:,} of {n_blocks:,} blocks dropped, and as many grown",
            header=["layer", "stored", "kept", "dropped", "grown"],
            rows=[[path, *cells[places[0]]] for path, places in lines],
            total=["total", *_cells(n_blocks, n_grown)],
            notes=notes,
        )


def regrow(
    model: nn.Module,
    fraction: float,
    criterion: Criterion = "gradient",
    *,
    activations: Activations | None = None,
    optimizer: optim.Optimizer | None = None,
    score: Score = "l2",
    seed: int | None = None,
) -> RegrowReport:
    """Drop the weakest blocks of every BlockSparseLinear and grow as many in empty places.

    With ``criterion="gradient"`` blocks grow where the gradient of the loss to the dense weight is
    largest, as in "Rigging the Lottery" (RigL; Evci et al., 2020); with ``"random"`` anywhere, as
    in sparse evolutionary training (SET; Mocanu et al., 2018). New blocks start at zero, and so do
    the optimizer's moments for them. A block that was just dropped does not grow again at once.

    Call it between training steps, compiled or not: all shapes of weights stay.

        found = activations(model, loss_fn, inputs, targets)
        regrow(model, 0.3, activations=found, optimizer=optimizer)

    Args:
        model: Changed in place; it may itself be a layer.
        fraction: Of the blocks that each layer stores, in [0, 1]. Fewer are exchanged where it has
            fewer empty places.
        criterion: ``"gradient"``, which needs ``activations``, or ``"random"``.
        activations: What :func:`activations` returns for this model: by path of a layer, inputs
            ``(..., input_dims)`` and the gradient of the loss to its outputs,
            ``(..., output_dims)``. Layers that it does not name are left alone.
        optimizer: The optimizer that updates ``model``. Its moments, of whatever kind, follow the
            blocks. Needed once it has been used, since its moments would belong to other blocks.
        score: What makes a block of weights or of gradients strong: ``"l1"``, ``"l2"``, ``"max"``,
            or a function of blocks ``(n, B, B)``, or of these and their :class:`BlockPlaces`, that
            returns ``(n,)`` numbers.
        seed: Of the random criterion; drawn with MLX's random seed by default.

    Returns:
        The blocks dropped and grown; ``print`` it for a table.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, is missing, or does not fit the criterion or
            a layer; the model has no BlockSparseLinear or a quantized one; a number is not finite;
            or a state of the optimizer cannot follow. Nothing is changed then.
    """
    check_fraction("regrow", "fraction", fraction)
    check_name("regrow", "criterion", criterion, ("gradient", "random"))
    check_score("regrow", score)
    by_gradient = criterion == "gradient"
    if not by_gradient and activations is not None:
        raise ValueError("[regrow] activations must be left out: they are for criterion 'gradient'")
    if by_gradient:
        check_absent("regrow", "it is for criterion 'random'", seed=seed)
    elif seed is not None:
        check_seed("regrow", seed)
    layers = blocks_of_floats("regrow", model)
    found: Activations = _checked(layers, activations) if by_gradient else {}
    chosen = {path: layer for path, layer in layers.items() if path in found or not by_gradient}
    rng = np.random.default_rng(_drawn() if seed is None and not by_gradient else seed)
    moments = {
        path: moments_of("regrow", optimizer, model, layer) for path, layer in chosen.items()
    }
    exchanges: dict[str, _Exchange] = {}
    for path, layer in chosen.items():
        pattern, stored = layer.pattern, layer.pattern.places
        strength = _strength(path, layer, score)
        count = min(round(fraction * stored.size), pattern.n_places - stored.size)
        kept = strongest_positions(strength, pattern.row_indices, stored.size - count, "global")
        if by_gradient:
            x, cotangent = found[path]
            grown = _steepest_places(path, pattern, count, x, cotangent, score)
        else:
            grown = _random_places(pattern, count, rng)
        exchanges[path] = _Exchange(stored[kept], np.sort(np.delete(stored, kept)), np.sort(grown))
    patterns = {path: layer.pattern for path, layer in chosen.items()}
    for path, done in exchanges.items():
        if done.grown.size:
            places = np.sort(np.concatenate([done.kept, done.grown]))
            old = patterns[path]
            new = CSRPattern.from_places(places, old.shape, old.block_size)
            change_pattern(chosen[path], new, moments[path])
    return RegrowReport(
        dropped={p: _coordinates(done.dropped, patterns[p]) for p, done in exchanges.items()},
        grown={p: _coordinates(done.grown, patterns[p]) for p, done in exchanges.items()},
        n_blocks={path: pattern.n_blocks for path, pattern in patterns.items()},
        not_reached=tuple(path for path in layers if path not in chosen),
    )


@dataclass(frozen=True)
class _Exchange:
    """Places of a layer: those kept, dropped and grown; the last two in order."""

    kept: np.ndarray
    dropped: np.ndarray
    grown: np.ndarray


def activations(
    model: nn.Module, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, tuple[mx.array, mx.array]]:
    """Return what the gradient criterion of :func:`regrow` needs, from one evaluation of a loss.

    Args:
        model: Whose block-sparse layers to observe; it may itself be one.
        loss_fn: The loss, as for ``nn.value_and_grad(model, loss_fn)``: a function of ``args`` and
            ``kwargs`` that calls the model and returns a scalar, or a tuple that begins with one.
            It calls the layers itself, not through ``mx.compile`` or ``mx.vmap``.
        args, kwargs: What ``loss_fn`` takes.

    Returns:
        For each block-sparse layer that the loss depends on, by its path in the model: its inputs
        ``(rows, input_dims)`` and the gradient of the loss to its outputs ``(rows, output_dims)``,
        evaluated. Rows of all leading axes and of all uses of the layer follow one another.

    Raises:
        TypeError: ``model`` is not a module, or the loss not an array.
        ValueError: The model has no BlockSparseLinear, the loss depends on none, or is no scalar.
    """
    layers = sparse_layers("activations", model)
    found: dict[str, list[tuple[mx.array, mx.array]]] = {path: [] for path in layers}
    probes: list[mx.array] = []

    def observe(path: str, x: mx.array, y: mx.array) -> Any:
        @mx.custom_function
        def identity(y, probe):
            return mx.stop_gradient(y)

        @identity.vjp
        def vjp(primals, cotangent, output):
            pair = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
            found[path].append(pair)
            return cotangent, mx.zeros_like(probes[0])

        return identity(y, probes[0])

    def loss(parameters: dict[str, Any], probe: mx.array) -> Any:
        model.update(parameters)
        probes.append(probe)
        value = loss_fn(*args, **kwargs)
        _check_loss(value)
        return value

    # Every output depends on the probe, so each cotangent comes by, of frozen layers as well. The
    # parameters are there for gradient checkpointing, which knows no other inputs.
    parameters = model.trainable_parameters()
    try:
        with observed(layers, observe):
            mx.value_and_grad(loss, argnums=(0, 1))(parameters, mx.zeros(()))
    finally:
        model.update(parameters)
    pairs = {
        path: (
            mx.concatenate([x for x, _ in reversed(uses)]),  # the last use comes by first
            mx.concatenate([cotangent for _, cotangent in reversed(uses)]),
        )
        for path, uses in found.items()
        if uses
    }
    if not pairs:
        raise ValueError(
            "[activations] the loss depends on no BlockSparseLinear of the model; "
            "is loss_fn compiled?"
        )
    mx.eval(pairs)
    return pairs


def _checked(layers: dict[str, BlockSparseLinear], activations: Activations | None) -> Activations:
    """Return the activations, or raise unless they are of these layers."""
    how = "activations(model, loss_fn, ...) returns it"
    if activations is None:
        raise ValueError(f"[regrow] criterion 'gradient' needs activations; {how}")
    if not isinstance(activations, Mapping):
        kind = type(activations).__name__
        raise TypeError(f"[regrow] activations must be a dict by path, got {kind}; {how}")
    for path, pair in activations.items():
        if path not in layers:
            raise ValueError(
                f"[regrow] activations name {path!r}, which is no BlockSparseLinear of the model"
            )
        owner, layer = _owner(path), layers[path]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"[{owner}] activations must be (x, cotangent), got {type(pair).__name__}"
            )
        x, cotangent = pair
        for name, value, label, size in (
            ("x", x, "input_dims", layer.input_dims),
            ("cotangent", cotangent, "output_dims", layer.output_dims),
        ):
            check_floating(owner, name, value)
            check_features(owner, name, value, label, size)
        if x.shape[:-1] != cotangent.shape[:-1]:
            raise ValueError(
                f"[{owner}] leading axes differ: x {x.shape[:-1]}, cotangent {cotangent.shape[:-1]}"
            )
    return activations


def _owner(path: str) -> str:
    return f"regrow {path}".rstrip()


def _drawn() -> int:
    """Draw a seed with MLX's random seed."""
    return int(mx.random.randint(0, 2**31 - 1).item())  # type: ignore[arg-type]


def _random_places(pattern: CSRPattern, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` of the empty places."""
    stored = np.sort(pattern.places)
    n_free = pattern.n_places - stored.size
    drawn = rng.choice(n_free, count, replace=False)
    free_before = stored - np.arange(stored.size)  # empty places before each stored one
    return drawn + np.searchsorted(free_before, drawn, side="right")


def _strength(path: str, layer: BlockSparseLinear, score: Score) -> np.ndarray:
    """Return how strong each stored block of a layer is."""
    pattern = layer.pattern
    blocks = clear(pattern.layout, layer.weight)
    places = partial(BlockPlaces.of_pattern, path, pattern)
    return block_scores(blocks, score, places, owner=_owner(path))


def _steepest_places(
    path: str,
    pattern: CSRPattern,
    count: int,
    x: mx.array,
    cotangent: mx.array,
    score: Score,
) -> np.ndarray:
    """Return the ``count`` empty places where the dense gradient ``cotangentᵀ x`` is strongest.

    It is computed some block-rows at a time, and of each tile only the places that may still be
    chosen are kept. Among equals the first place wins.
    """
    owner, block_size, stored = _owner(path), pattern.block_size, pattern.places
    n_block_cols = pattern.grid[1]
    dtype = mx.result_type(x, cotangent, mx.float32)  # 16-bit types accumulate in float32
    x = x.reshape(-1, x.shape[-1]).astype(dtype)
    cotangent = cotangent.reshape(-1, cotangent.shape[-1])
    rows = max(1, TILE // max(1, block_size * pattern.shape[1])) * block_size
    best, best_scores = np.zeros(0, dtype=np.int64), np.zeros(0)
    for first in range(0, pattern.shape[0], rows):
        gradient = cotangent[:, first : first + rows].T.astype(dtype) @ x
        if not mx.isfinite(gradient).all().item():
            raise ValueError(
                f"[{owner}] the gradient cotangentᵀ x must be finite, got nan or infinity"
            )
        block_rows = range(first // block_size, (first + rows) // block_size)
        scores = _tile_scores(path, pattern, gradient, block_rows, score)
        begin = block_rows.start * n_block_cols
        free = np.setdiff1d(np.arange(begin, begin + scores.size), stored, assume_unique=True)
        places = np.concatenate([best, free])
        strengths = np.concatenate([best_scores, scores[free - begin]])
        # Those kept so far come first and lie in order of place among equals.
        chosen = np.argsort(-strengths, kind="stable")[:count]
        best, best_scores = places[chosen], strengths[chosen]
    return best


def _tile_scores(
    path: str, pattern: CSRPattern, gradient: mx.array, block_rows: range, score: Score
) -> np.ndarray:
    """Return how strong each block of some block-rows of the gradient is."""
    block_size = pattern.block_size
    places = partial(BlockPlaces.of_grid, path, pattern.shape, block_size, block_rows)
    return grid_scores(gradient, block_size, score, places, owner=_owner(path)).reshape(-1)


def _coordinates(places: np.ndarray, pattern: CSRPattern) -> np.ndarray:
    """Return block-row and block-column of each place, ``(n, 2)``."""
    return np.stack(np.divmod(places, pattern.grid[1]), axis=1)


def _cells(n_blocks: int, count: int) -> list[str]:
    return [f"{cell:,}" for cell in (n_blocks, n_blocks - count, count, count)]


def _check_loss(value: Any) -> None:
    """Raise unless a function returned a loss, or a tuple that begins with one."""
    loss = value[0] if isinstance(value, tuple) and value else value
    wants = "[activations] loss_fn must return a scalar, or a tuple that begins with one"
    if not isinstance(loss, mx.array):
        raise TypeError(f"{wants}, got {type(loss).__name__}")
    if loss.ndim:
        raise ValueError(f"{wants}, got shape {loss.shape}; take its mean")
