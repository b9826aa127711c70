"""Dynamic sparse training: dropping the weakest blocks of a layer and growing as many elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from mlx_sparse_nn.core.scores import Score, block_scores, check_score, grid_scores, strongest
from mlx_sparse_nn.core.table import NOT_MEASURED, Report, Table
from mlx_sparse_nn.layers.layer_calls import observed, sparse_layers
from mlx_sparse_nn.layers.linear import BlockSparseLinear, check_layer
from mlx_sparse_nn.surgery.optimizer_state import change_pattern, moments_of

Criterion: TypeAlias = Literal["gradient", "random"]

TILE = 2**20  # values of the dense gradient that are computed at a time


@dataclass(frozen=True, eq=False, repr=False)
class RegrowReport(Report):
    """What :func:`regrow` did; ``print`` it for a table.

    Attributes:
        dropped: ``(n, 2)`` int64, block-row and block-column of each block dropped.
        grown: ``(n, 2)`` int64, those of each new block.
        n_blocks: Blocks that the layer stores, before as after.
    """

    dropped: np.ndarray
    grown: np.ndarray
    n_blocks: int

    def _table(self) -> Table:
        count = len(self.grown)
        cells = [self.n_blocks, self.n_blocks - count, len(self.dropped), count]
        return Table(
            caption=f"{count} of {self.n_blocks} blocks dropped, and as many grown",
            header=["", "stored", "kept", "dropped", "grown"],
            rows=[["blocks", *(f"{cell:,}" for cell in cells)]],
            notes=[NOT_MEASURED],
        )


def regrow(
    layer: BlockSparseLinear,
    fraction: float,
    criterion: Criterion = "gradient",
    *,
    x: mx.array | None = None,
    cotangent: mx.array | None = None,
    seed: int | None = None,
    score: Score = "l2",
    model: nn.Module | None = None,
    optimizer: optim.Optimizer | None = None,
) -> RegrowReport:
    """Drop the weakest blocks of a layer and grow as many in places that were empty.

    With ``criterion="gradient"`` blocks grow where the gradient of the loss to the dense weight is
    largest, as in "Rigging the Lottery" (RigL; Evci et al., 2020); with ``"random"`` anywhere, as
    in sparse evolutionary training (SET; Mocanu et al., 2018). New blocks start at zero, and so do
    the optimizer's moments for them. A block that was just dropped does not grow again at once.

    Call it between training steps, compiled or not: all shapes of weights stay.

        for path, (x, cotangent) in activations(model, loss_fn, inputs, targets).items():
            regrow(layers[path], 0.3, x=x, cotangent=cotangent, model=model, optimizer=optimizer)

    Args:
        layer: Changed in place.
        fraction: Of the stored blocks, in [0, 1]. Fewer are exchanged where the layer has fewer
            empty places.
        criterion: ``"gradient"``, which needs ``x`` and ``cotangent``, or ``"random"``.
        x: ``(..., input_dims)``, inputs of the layer; :func:`activations` gives both.
        cotangent: ``(..., output_dims)``, the gradient of the loss to the layer's outputs for them.
        seed: Of the random criterion; drawn with MLX's random seed by default.
        score: What makes a block of weights or of gradients strong: ``"l1"``, ``"l2"``, ``"max"``,
            or a function from ``(n, B, B)`` to ``(n,)``.
        model: The model that ``optimizer`` updates. It tells where in the optimizer's state the
            layer lies; pass both or neither.
        optimizer: Its moments follow the blocks, of whatever kind they are. Needed once it has been
            used, since its moments would belong to other blocks.

    Returns:
        The blocks dropped and grown.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, is missing, or does not fit the criterion or
            the layer; a number is not finite; the layer is not in the model; or a state of the
            optimizer cannot follow. Nothing is changed then.
    """
    _check(layer, fraction, criterion, x, cotangent, seed)
    check_score("regrow", score)
    moments = _moments(layer, model, optimizer)
    pattern = layer.pattern
    pattern.check_unique("regrow")
    stored = pattern.places
    strength = block_scores(clear(pattern.layout, layer.weight), score, owner="regrow")
    count = min(round(fraction * stored.size), pattern.n_places - stored.size)
    if criterion == "random":
        grown = _random_places(pattern, np.sort(stored), count, seed)
    else:
        grown = _steepest_places(pattern, stored, count, x, cotangent, score)  # type: ignore[arg-type]
    kept = strongest(strength, pattern.row_indices, stored.size - count, "global")
    if count:
        places = np.sort(np.concatenate([stored[kept], grown]))
        new = CSRPattern.from_places(places, pattern.shape, pattern.block_size)
        change_pattern(layer, new, moments)
    dropped = np.sort(np.delete(stored, kept))
    return RegrowReport(
        _coordinates(dropped, pattern), _coordinates(np.sort(grown), pattern), stored.size
    )


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
        TypeError: ``model`` is not a module.
        ValueError: It has no BlockSparseLinear, or the loss depends on none.
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
        return loss_fn(*args, **kwargs)

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


def _check(layer, fraction, criterion, x, cotangent, seed) -> None:
    check_layer("regrow", layer)
    check_fraction("regrow", "fraction", fraction)
    check_name("regrow", "criterion", criterion, ("gradient", "random"))
    if criterion == "random":
        check_absent("regrow", "it is for criterion 'gradient'", x=x, cotangent=cotangent)
        if seed is not None:
            check_seed("regrow", seed)
        return
    check_absent("regrow", "it is for criterion 'random'", seed=seed)
    for name, value, label, size in (
        ("x", x, "input_dims", layer.input_dims),
        ("cotangent", cotangent, "output_dims", layer.output_dims),
    ):
        if value is None:
            raise ValueError(
                f"[regrow] criterion 'gradient' needs {name}; activations(model, loss_fn, ...) "
                "gives x and cotangent of each layer"
            )
        check_floating("regrow", name, value)
        check_features("regrow", name, value, label, size)
    if x.shape[:-1] != cotangent.shape[:-1]:
        raise ValueError(
            f"[regrow] leading axes differ: x {x.shape[:-1]}, cotangent {cotangent.shape[:-1]}"
        )


def _moments(
    layer: BlockSparseLinear, model: nn.Module | None, optimizer: optim.Optimizer | None
) -> list[dict[str, Any]]:
    if (model is None) != (optimizer is None):
        raise ValueError("[regrow] pass both model and optimizer, or neither")
    if model is None:
        return []
    if all(layer is not other for other in sparse_layers("regrow", model).values()):
        raise ValueError(f"[regrow] the model does not contain the layer {layer}")
    return moments_of("regrow", optimizer, model, layer)


def _random_places(
    pattern: CSRPattern, stored: np.ndarray, count: int, seed: int | None
) -> np.ndarray:
    """Draw ``count`` places, given the sorted ones that are stored."""
    if seed is None:
        seed = int(mx.random.randint(0, 2**31 - 1).item())  # type: ignore[arg-type]
    n_free = pattern.n_places - stored.size
    drawn = np.random.default_rng(seed).choice(n_free, count, replace=False)
    free_before = stored - np.arange(stored.size)  # empty places before each stored one
    return drawn + np.searchsorted(free_before, drawn, side="right")


def _steepest_places(
    pattern: CSRPattern,
    stored: np.ndarray,
    count: int,
    x: mx.array,
    cotangent: mx.array,
    score: Score,
) -> np.ndarray:
    """Return the ``count`` empty places where the dense gradient ``cotangentᵀ x`` is strongest.

    It is computed some block-rows at a time, and of each tile only the places that may still be
    chosen are kept. Among equals the first place wins.
    """
    block_size, n_block_cols = pattern.block_size, pattern.grid[1]
    dtype = mx.result_type(x, cotangent, mx.float32)  # 16-bit types accumulate in float32
    x = x.reshape(-1, x.shape[-1]).astype(dtype)
    cotangent = cotangent.reshape(-1, cotangent.shape[-1])
    rows = max(1, TILE // max(1, block_size * pattern.shape[1])) * block_size
    best, best_scores = np.zeros(0, dtype=np.int64), np.zeros(0)
    for first in range(0, pattern.shape[0], rows):
        gradient = cotangent[:, first : first + rows].T.astype(dtype) @ x
        if not mx.isfinite(gradient).all().item():
            raise ValueError(
                "[regrow] the gradient cotangentᵀ x must be finite, got nan or infinity"
            )
        scores = grid_scores(gradient, block_size, score, owner="regrow").reshape(-1)
        begin = first // block_size * n_block_cols
        free = np.setdiff1d(np.arange(begin, begin + scores.size), stored, assume_unique=True)
        places = np.concatenate([best, free])
        strengths = np.concatenate([best_scores, scores[free - begin]])
        # Those kept so far come first and lie in order of place among equals.
        chosen = np.argsort(-strengths, kind="stable")[:count]
        best, best_scores = places[chosen], strengths[chosen]
    return best


def _coordinates(places: np.ndarray, pattern: CSRPattern) -> np.ndarray:
    """Return block-row and block-column of each place, ``(n, 2)``."""
    return np.stack(np.divmod(places, pattern.grid[1]), axis=1)
