"""Surgery on whole models: dense linear layers become block-sparse ones, and back, in place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_sparse_nn.core.checks import (
    check_model,
    check_name,
)
from mlx_sparse_nn.core.moments import InputMoments
from mlx_sparse_nn.core.relative_error import relative_error
from mlx_sparse_nn.core.scores import (
    Balance,
    BlockPlaces,
    Score,
    blocks_for,
    check_choice,
    grid_scores,
    share_by_score,
)
from mlx_sparse_nn.layers.dense_twin import dense_twin
from mlx_sparse_nn.layers.linear import BlockSparseLinear, QuantizedBlockSparseLinear, write_values
from mlx_sparse_nn.layers.lora import LoRABlockSparseLinear, SparseLinear
from mlx_sparse_nn.layers.parameters import counts_of, density_of
from mlx_sparse_nn.surgery.densities import Density, check_one_budget
from mlx_sparse_nn.surgery.moment_fits import MomentFits, moment_fits
from mlx_sparse_nn.surgery.optimizer_state import reshape_moments
from mlx_sparse_nn.surgery.selection import (
    LINEAR,
    leaves_of,
    nothing_around,
    replace_leaves,
    why_not_sparsified,
)
from mlx_sparse_nn.surgery.sparsify_report import ErrorOf, SparsifyReport
from mlx_sparse_nn.surgery.targets import Options, Predicate, Target, find_targets

Scope: TypeAlias = Literal["layer", "global", "erdos-renyi"]

_SCOPES = ("layer", "global", "erdos-renyi")


def sparsify(
    model: nn.Module,
    *,
    block_size: int = 32,
    density: Density = 0.1,
    predicate: Predicate | None = None,
    score: Score | None = None,
    balance: Balance = "row",
    scope: Scope = "layer",
    moments: Mapping[str, InputMoments] | None = None,
    damping: float | None = None,
    optimizer: optim.Optimizer | None = None,
) -> SparsifyReport:
    """Replace the linear layers of a model by block-sparse ones that keep their strongest blocks.

    The model is changed in place, as by ``nn.quantize``; after an error it is as it was. A layer
    that the model holds at several paths stays one layer. Biases, dtypes, training mode and what is
    frozen stay.

    Args:
        model: The model. Its layers are looked for where ``model.leaf_modules()`` finds them.
        block_size: Side of the blocks.
        density: Stored fraction, in (0, 1], of each layer or of all together (see ``scope``). Each
            layer keeps at least one block, also where the density asks for fewer. Or a mapping from
            paths to such fractions: layers that it does not name, or gives a 1, stay ``nn.Linear``,
            and those that it names become sparse whatever their dims. A layer that the model holds
            at several paths is named by any of them.
        predicate: Called with ``(path, module)`` for each ``nn.Linear``. Returns ``False`` to leave
            it dense, ``True`` to make it sparse, or a dict of options of its own: ``block_size``,
            ``density``, ``score``, ``balance``, or ``pattern`` alone, which takes the place of
            these. Its own ``density`` or ``pattern`` goes before a ``density`` by path. By default
            every layer is made sparse whose dims are at least ``block_size``.
        score, balance: As in :meth:`BlockSparseLinear.from_linear`. A function of two positional
            arguments gets the blocks of one layer and their :class:`BlockPlaces`, which tell the
            layer's path, and each block's row and column; one of one gets the blocks alone.
            Parameters with a default do not count.
        scope: How many blocks each layer keeps:

            - ``"layer"``: ``density`` of each layer.
            - ``"global"``: as many as it has among the strongest blocks of all layers.
            - ``"erdos-renyi"``: in proportion to ``input_dims + output_dims``, at most all. Its
              density is then proportional to (n_in + n_out) / (n_in n_out), as in "Scalable
              training of artificial neural networks with adaptive sparse connectivity" (Mocanu et
              al., 2018) and "Rigging the lottery" (Evci et al., 2020): small layers are denser.

            The last two share out ``round(density * places)`` blocks, where ``places`` counts the
            blocks of all layers, among layers of one block size. A layer to which the predicate
            gives a ``density`` or a ``pattern`` has that, outside the shared budget. They share out
            one number: a ``density`` by path is for ``"layer"``.
        moments: Of what goes into each layer that is made sparse, by path, as
            :func:`layer_moments` returns them. The ``score`` is then ``"obs"`` by default, as in
            :meth:`BlockSparseLinear.from_linear`, and relative to the squares of all outputs of its
            layer. Values and biases are fitted to the dense layer's outputs, each layer by itself.
        damping: How much the fit holds on to the dense values, 0.01 by default. For ``moments``.
        optimizer: The optimizer that updates ``model``. Its moments are kept for the blocks that
            stay. Needed once it has been used, since its state would not fit.

    Returns:
        The new layers, and the layers left alone with the reason for each: those that the
        predicate, the density or, without these, the block size leaves out, those whose weight a
        module around them reads, as adapters do, and what is not an ``nn.Linear`` itself:
        subclasses, quantized and sparse layers, embeddings, convolutions and the experts of a
        ``SwitchLinear``.

    Raises:
        TypeError: An argument or option has the wrong type, the predicate returns neither a bool
            nor a dict, or ``model`` is itself a linear layer, with no module around it.
        ValueError: An option is unknown, out of range or does not fit its layer; ``density`` names
            a path at which there is no ``nn.Linear`` to make sparse; a weight is not finite; the
            predicate or ``density`` wants different things of one layer at two paths; layers that
            share a budget differ in ``block_size`` or, under ``"global"``, in ``score``; or a state
            of the optimizer cannot follow.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> sparsify(model, density=0.25)
        1 layer made sparse, 1 skipped: density 0.25 there, 0.281 in all
        layer      out x in  block  blocks  density  error
        layers.0  512 x 256     32      32     0.25  0.861
        layers.2 skipped (3.8% of the model): output_dims 10 is less than block_size 32
        ...
    """
    check_model("sparsify", model)
    if isinstance(model, LINEAR):
        reason = why_not_sparsified(model, [], {})
        raise nothing_around("sparsify", model, reason or "use BlockSparseLinear.from_linear")
    check_name("sparsify", "scope", scope, _SCOPES)
    by_path = isinstance(density, Mapping)
    one_density = 1.0 if by_path else density  # 1 stands for nothing where each has its own
    fits = moment_fits("sparsify", moments, damping)
    has_moments = fits is not None
    if score is None:
        score = "obs" if has_moments else "l2"
    check_choice("sparsify", block_size, one_density, score, balance, has_moments=has_moments)
    check_one_budget("sparsify", density, scope)
    shared = scope != "layer"
    defaults = Options(block_size, one_density, None, score, balance, shared, has_moments)
    targets, skipped = find_targets("sparsify", model, predicate, density, defaults)
    if fits is not None:
        for target in targets:
            fits.of(target.paths, target.linear.weight.shape[1])
    _count_blocks(targets, scope, one_density, fits)
    made = [_to_sparse(target, fits) for target in targets]
    layers = [layer for layer, _ in made]
    old = [target.linear for target in targets]
    shares = _shares(model, skipped)
    states = reshape_moments("sparsify", optimizer, model, old, layers)
    replace_leaves(model, old, layers)
    # The dense weights need not be kept for the blocks, nor the moments for theirs.
    mx.eval([layer.weight for layer in layers], states.put())
    new = {path: pair for target, pair in zip(targets, made, strict=True) for path in target.paths}
    sparse = {path: layer for path, (layer, _) in new.items()}
    patterns = {path: layer.pattern for path, layer in sparse.items()}
    errors = {path: error for path, (_, error) in new.items()}
    of: ErrorOf = "outputs" if has_moments else "weights"
    return SparsifyReport(sparse, patterns, skipped, shares, errors, of, density_of(model))


def densify(model: nn.Module, *, optimizer: optim.Optimizer | None = None) -> list[str]:
    """Replace the block-sparse layers of a model by dense ones of the same product.

    A BlockSparseLinear becomes an ``nn.Linear``, a quantized one the ``nn.QuantizedLinear`` of the
    same packed values. The model is changed in place; after an error it is as it was. A layer that
    the model holds at several paths stays one layer. Biases, dtypes, training mode and what is
    frozen stay.

    Args:
        model: The model. Its layers are looked for where ``model.leaf_modules()`` finds them.
        optimizer: The optimizer that updates ``model``. Its moments stay those of the blocks, and
            are zero elsewhere. Needed once it has been used, since its state would not fit.

    Returns:
        The paths of the layers that were replaced.

    Raises:
        TypeError: ``model`` is not a module, or itself a block-sparse layer; or ``optimizer`` is
            not an optimizer.
        ValueError: A layer lies under adapters or is of a subclass, or a state of the optimizer
            cannot follow.
    """
    check_model("densify", model)
    if isinstance(model, SparseLinear):
        raise nothing_around("densify", model, "use its to_linear()")
    for path, module in model.named_modules():
        if isinstance(module, LoRABlockSparseLinear):
            raise ValueError(
                f"[densify {path}".rstrip() + "] LoRABlockSparseLinear lies over a block-sparse "
                "layer: put its fuse() in its place first, which is dense"
            )
    found = [(paths, m) for paths, m in leaves_of(model) if isinstance(m, SparseLinear)]
    old = [layer for _, layer in found]
    for paths, layer in found:
        if type(layer) not in (BlockSparseLinear, QuantizedBlockSparseLinear):
            raise ValueError(
                f"[densify {paths[0]}] {type(layer).__name__} is a subclass, which may compute "
                "something else: put a dense layer of your own in its place first"
            )
    new = [dense_twin(layer) for layer in old]
    moments = reshape_moments("densify", optimizer, model, old, new)
    replace_leaves(model, old, new)
    moments.put()
    return [path for paths, _ in found for path in paths]


def _to_sparse(target: Target, fits: MomentFits | None) -> tuple[BlockSparseLinear, float]:
    """Return the sparse layer and its relative error, which it notes."""
    linear, pattern = target.linear, target.chosen_pattern()
    layer = BlockSparseLinear.from_linear(linear, pattern=pattern)
    if fits is None:
        layer.weight_error = error = relative_error(linear.weight, layer.todense())
        return layer, error
    fit = fits.fit(target.paths, linear.weight, linear.get("bias"), pattern)
    write_values(layer, fit.weight, fit.bias)
    layer.output_error = fit.error_after
    return layer, fit.error_after


def _count_blocks(
    targets: list[Target], scope: Scope, density: float, fits: MomentFits | None
) -> None:
    """Score the blocks of each target and set how many of them it keeps."""
    scored = [target for target in targets if target.options.pattern is None]
    shared = [target for target in scored if target.options.shared]
    _check_comparable(shared, ("block_size", "score") if scope == "global" else ("block_size",))
    for target in scored:
        options = target.options
        target.scores = _scores(target, fits)
        target.n_blocks = blocks_for(options.density, target.scores.size)
    if not shared:
        return
    budget = max(len(shared), round(density * sum(target.scores.size for target in shared)))
    share_out = share_by_score if scope == "global" else _share_by_erdos_renyi
    counts = share_out([target.scores for target in shared], budget)
    for target, count in zip(shared, counts.tolist(), strict=True):
        target.n_blocks = count


def _scores(target: Target, fits: MomentFits | None) -> np.ndarray:
    """Return how strong each block of a dense layer is, on its grid."""
    linear, options, paths = target.linear, target.options, target.paths
    weight, size = linear.weight, options.block_size
    if fits is not None and options.score == "obs":
        return fits.scores(paths, weight, "bias" in linear, size)
    moments = None if fits is None else fits.of(paths, weight.shape[1])
    places = partial(BlockPlaces.of_grid, paths[0], weight.shape, size, moments=moments)
    return grid_scores(weight, size, options.score, places, owner=f"sparsify {paths[0]}")


def _check_comparable(shared: list[Target], names: tuple[str, ...]) -> None:
    """Raise unless layers that share a budget have these options in common."""
    for target in shared[1:]:
        for name in names:
            value, first = (getattr(t.options, name) for t in (target, shared[0]))
            if value != first:
                raise ValueError(
                    f"[sparsify {target.paths[0]}] {name} is {value!r}, but {first!r} in "
                    f"{shared[0].paths[0]}, with which it shares a budget; give it a density of "
                    "its own" + ", or both one function of (blocks, places)" * callable(value)
                )


def _share_by_erdos_renyi(scores: list[np.ndarray], budget: int) -> np.ndarray:
    """Return ``budget`` blocks shared out in proportion to block-rows plus block-columns.

    Each layer gets at least one block and at most all; what full layers cannot take goes to the
    others. The exact shares are rounded down, and the layers that lose most by it get one more.
    """
    sides = np.array([sum(grid.shape) for grid in scores])
    places = np.array([grid.size for grid in scores])
    # The total is piecewise linear in the scale; it bends where a layer leaves 1 or becomes full.
    scales = np.sort(np.concatenate([1 / sides, places / sides]))
    totals = [np.clip(scale * sides, 1, places).sum() for scale in scales]
    shares = np.clip(np.interp(budget, totals, scales) * sides, 1, places)
    counts = np.floor(shares).astype(np.int64)
    most_lost = np.argsort(counts - shares, kind="stable")
    counts[most_lost[: budget - counts.sum()]] += 1
    return counts


def _shares(model: nn.Module, skipped: dict[str, str]) -> dict[str, float]:
    """Return which fraction of the parameters, if all were dense, each of these layers holds."""
    modules, counts = dict(model.named_modules()), counts_of(model)
    n_dense = {id(modules[path]): count.dense for path, count in counts.items()}
    total = max(1, sum(n_dense.values()))
    first = {id(modules[path]): path for path in reversed(skipped)}
    of = {path: n_dense.get(module, 0) / total for module, path in first.items()}
    return {path: of[path] for path in skipped if path in of}
