"""Surgery on whole models: dense linear layers become block-sparse ones, and back, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_sparse_nn.core.checks import (
    check_absent,
    check_dims,
    check_model,
    check_name,
)
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.scores import (
    Balance,
    Score,
    blocks_for,
    check_choice,
    grid_scores,
    share_by_score,
    strongest_pattern,
)
from mlx_sparse_nn.core.table import NOT_MEASURED, Report, Table, fold
from mlx_sparse_nn.layers.linear import PATTERN_DECIDES, BlockSparseLinear, why_not_linear
from mlx_sparse_nn.layers.pattern_module import check_layer_pattern

Scope: TypeAlias = Literal["layer", "global", "erdos-renyi"]
Predicate: TypeAlias = Callable[[str, nn.Module], "bool | np.bool_ | dict[str, Any]"]
_Kinds: TypeAlias = "type | tuple[type, ...]"

_SCOPES = ("layer", "global", "erdos-renyi")
_LINEAR = (nn.Linear, nn.QuantizedLinear, nn.QQLinear, BlockSparseLinear)


@dataclass(frozen=True, eq=False, repr=False)
class SparsifyReport(Report):
    """What :func:`sparsify` did to the linear layers of a model; ``print`` it for a table.

    Attributes:
        sparse: The new layer at each path that was made sparse. A layer that the model holds at
            several paths is here at each of them, and is one object.
        n_blocks: How many blocks :func:`sparsify` left each of them, by path.
        skipped: Why each other linear layer was left alone, by path.
    """

    sparse: dict[str, BlockSparseLinear]
    n_blocks: dict[str, int]
    skipped: dict[str, str]

    @property
    def density(self) -> float:
        """Stored fraction of all weights that were made sparse; 0 if there are none."""
        first_path = {id(layer): path for path, layer in self.sparse.items()}.values()
        layers = {path: self.sparse[path] for path in first_path}
        places = sum(layer.input_dims * layer.output_dims for layer in layers.values())
        nnz = sum(self.n_blocks[path] * layer.block_size**2 for path, layer in layers.items())
        return nnz / max(1, places)

    def _table(self) -> Table:
        first_path: dict[int, str] = {}
        for path, layer in self.sparse.items():
            first_path.setdefault(id(layer), path)
        new = list(first_path.values())
        cells = [_cells(self.sparse[path], self.n_blocks[path]) for path in new]
        shared = {
            path: first
            for path, layer in self.sparse.items()
            if (first := first_path[id(layer)]) != path
        }
        lines = fold(new, [tuple(line) for line in cells])
        notes = []
        if len(lines) < len(new):
            notes.append("x n: n layers alike, with the numbers of each")
        for paths, first in _folded(shared):
            notes.append(f"{paths}: the layer of {first}")
        for paths, why in _folded(self.skipped):
            notes.append(f"{paths} skipped: {why}")
        if self.sparse:
            notes.append(NOT_MEASURED)
        state = f", density {self.density:.3g} in all" if self.sparse else ""
        n_layers = len(self.sparse) + len(self.skipped)
        return Table(
            caption=f"{len(self.sparse)} of {n_layers} linear layers made sparse{state}",
            header=["layer", "out x in", "block", "blocks", "density"],
            rows=[[path, *cells[places[0]]] for path, places in lines],
            notes=notes,
        )


def sparsify(
    model: nn.Module,
    *,
    block_size: int = 32,
    density: float = 0.1,
    predicate: Predicate | None = None,
    score: Score = "l2",
    balance: Balance = "row",
    scope: Scope = "layer",
) -> SparsifyReport:
    """Replace the linear layers of a model by block-sparse ones that keep their strongest blocks.

    The model is changed in place, as by ``nn.quantize``; after an error it is as it was. A layer
    that the model holds at several paths stays one layer. Biases, dtypes, training mode and what is
    frozen stay. An optimizer has to be made, or its ``init`` called, after this.

    Args:
        model: The model. Its layers are looked for where ``model.leaf_modules()`` finds them.
        block_size: Side of the blocks.
        density: Stored fraction, in (0, 1], of each layer or of all together (see ``scope``). Each
            layer keeps at least one block, also where the density asks for fewer.
        predicate: Called with ``(path, module)`` for each ``nn.Linear``. Returns ``False`` to leave
            it dense, ``True`` to make it sparse, or a dict of options of its own: ``block_size``,
            ``density``, ``score``, ``balance``, or ``pattern`` alone, which takes the place of
            these. By default every layer is made sparse whose dims are multiples of
            ``block_size``.
        score, balance: As in :meth:`BlockSparseLinear.from_linear`.
        scope: How many blocks each layer keeps:

            - ``"layer"``: ``density`` of each layer.
            - ``"global"``: as many as it has among the strongest blocks of all layers.
            - ``"erdos-renyi"``: in proportion to ``input_dims + output_dims``, at most all. Its
              density is then proportional to (n_in + n_out) / (n_in n_out), as in "Scalable
              training of artificial neural networks with adaptive sparse connectivity" (Mocanu et
              al., 2018) and "Rigging the lottery" (Evci et al., 2020): small layers are denser.

            The last two share out ``round(density * places)`` blocks, where ``places`` counts the
            blocks of all layers, among layers of one block size. A layer to which the predicate
            gives a ``density`` or a ``pattern`` has that, outside the shared budget.

    Returns:
        The new layers, and the linear layers left alone with the reason for each: those that the
        predicate or, without one, the block size leaves out, and what is not an ``nn.Linear``
        itself: subclasses, quantized layers, layers that are sparse already.

    Raises:
        TypeError: An argument or option has the wrong type, the predicate returns neither a bool
            nor a dict, or ``model`` is itself a linear layer, with no module around it.
        ValueError: An option is unknown, out of range or does not fit its layer; a weight is not
            finite; the predicate wants different things of one layer at two paths; or layers that
            share a budget differ in ``block_size`` or, under ``"global"``, in ``score``.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> sparsify(model, density=0.25)
        1 of 2 linear layers made sparse, density 0.25 in all
        layer      out x in  block  blocks  density
        layers.0  512 x 256     32      32    25.0%
        layers.2 skipped: output_dims 10 is less than block_size 32
        ...
    """
    _check_model("sparsify", model, _LINEAR, "BlockSparseLinear.from_linear")
    check_name("sparsify", "scope", scope, _SCOPES)
    check_choice("sparsify", block_size, density, score, balance)
    defaults = _Options(block_size, density, None, score, balance, shared=scope != "layer")
    targets, skipped = _targets(model, predicate, defaults)
    _count_blocks(targets, scope, density)
    layers = [target.to_sparse() for target in targets]
    mx.eval([layer.weight for layer in layers])  # the dense weights need not be kept for them
    _replace(model, [target.linear for target in targets], layers)
    pairs = zip(targets, layers, strict=True)
    sparse = {path: layer for target, layer in pairs for path in target.paths}
    n_blocks = {path: layer.pattern.n_blocks for path, layer in sparse.items()}
    return SparsifyReport(sparse, n_blocks, skipped)


def densify(model: nn.Module) -> list[str]:
    """Replace every BlockSparseLinear of a model by the ``nn.Linear`` of the same product.

    The model is changed in place. A layer that it holds at several paths stays one layer. Biases,
    dtypes, training mode and what is frozen stay. Quantized block-sparse layers are left alone.

    Args:
        model: The model. Its layers are looked for where ``model.leaf_modules()`` finds them.

    Returns:
        The paths of the layers that were replaced.

    Raises:
        TypeError: ``model`` is not a module, or itself a BlockSparseLinear.
    """
    _check_model("densify", model, BlockSparseLinear, "its to_linear()")
    found = _leaves(model, BlockSparseLinear)
    layers = [layer for _, layer in found]
    _replace(model, layers, [layer.to_linear() for layer in layers])
    return [path for paths, _ in found for path in paths]


@dataclass(frozen=True)
class _Options:
    """What is wanted of one layer."""

    block_size: int
    density: float
    pattern: CSRPattern | None
    score: Score
    balance: Balance
    shared: bool  # its number of blocks comes out of one budget, not from its own density

    def updated(self, owner: str, own: dict[str, Any]) -> _Options:
        """Return these options with those that the predicate gives to one layer."""
        if unknown := [key for key in own if key not in _OPTION_NAMES]:
            raise ValueError(
                f"[{owner}] unknown option {unknown[0]!r}; the options are {_OPTION_NAMES}"
            )
        others = {key: value for key, value in own.items() if key != "pattern"}
        has_pattern = own.get("pattern") is not None
        if has_pattern:
            check_absent(owner, PATTERN_DECIDES, **others)
        shared = self.shared and "density" not in own and not has_pattern
        return replace(self, **own, shared=shared)

    def check(self, owner: str, shape: Sequence[int]) -> None:
        """Raise unless they fit a weight ``(output_dims, input_dims)``."""
        check_choice(owner, self.block_size, self.density, self.score, self.balance)
        if self.pattern is None:
            check_dims(owner, shape)
        else:
            check_layer_pattern(owner, self.pattern, shape)
            self.pattern.check_unique(owner)


_OPTION_NAMES = ("block_size", "density", "pattern", "score", "balance")


@dataclass
class _Target:
    """A dense layer that is to become sparse, and all its paths in the model."""

    paths: list[str]
    linear: nn.Linear
    options: _Options
    scores: np.ndarray = field(init=False)  # (R, C) of all blocks, unless the pattern is given
    n_blocks: int = field(init=False)

    def to_sparse(self) -> BlockSparseLinear:
        options, pattern = self.options, self.options.pattern
        if pattern is None:
            pattern = strongest_pattern(
                self.scores,
                self.n_blocks,
                self.linear.weight.shape,
                options.block_size,
                options.balance,
            )
        return BlockSparseLinear.from_linear(self.linear, pattern=pattern)


def _targets(
    model: nn.Module, predicate: Predicate | None, defaults: _Options
) -> tuple[list[_Target], dict[str, str]]:
    """Return the layers to make sparse, and why each other linear layer is not one of them."""
    targets: list[_Target] = []
    skipped: dict[str, str] = {}
    for paths, module in _leaves(model, _LINEAR):
        options, *others = [_decide(path, module, predicate, defaults) for path in paths]
        if any(other != options for other in others):
            raise ValueError(
                f"[sparsify] {' and '.join(paths)} are one layer, "
                "of which the predicate wants different things"
            )
        if isinstance(options, str):
            skipped.update(dict.fromkeys(paths, options))
        else:
            targets.append(_Target(paths, module, options))
    return targets, skipped


def _decide(
    path: str, module: Any, predicate: Predicate | None, defaults: _Options
) -> _Options | str:
    """Return what is wanted of a linear layer, or in words why it is left alone."""
    if reason := why_not_linear(module):
        return reason
    if predicate is None:
        return _why_too_small(module.weight.shape, defaults.block_size) or defaults
    answer, owner = predicate(path, module), f"sparsify {path}"
    if not isinstance(answer, bool | np.bool_ | dict):
        raise TypeError(f"[{owner}] predicate must return a bool or a dict, got {answer!r}")
    if isinstance(answer, dict):
        options = defaults.updated(owner, answer)
    elif answer:
        options = defaults
    else:
        return "the predicate returned False"
    options.check(owner, module.weight.shape)
    return options


def _why_too_small(shape: Sequence[int], block_size: int) -> str | None:
    """Return in words why a weight ``(output_dims, input_dims)`` fills no block, or None."""
    for name, size in zip(("output_dims", "input_dims"), shape, strict=True):
        if size < block_size:
            return f"{name} {size} is less than block_size {block_size}"
    return None


def _count_blocks(targets: list[_Target], scope: Scope, density: float) -> None:
    """Score the blocks of each target and set how many of them it keeps."""
    scored = [target for target in targets if target.options.pattern is None]
    shared = [target for target in scored if target.options.shared]
    _check_comparable(shared, ("block_size", "score") if scope == "global" else ("block_size",))
    for target in scored:
        options, owner = target.options, f"sparsify {target.paths[0]}"
        target.scores = grid_scores(
            target.linear.weight, options.block_size, options.score, owner=owner
        )
        target.n_blocks = blocks_for(options.density, target.scores.size)
    if not shared:
        return
    budget = max(len(shared), round(density * sum(target.scores.size for target in shared)))
    share_out = share_by_score if scope == "global" else _share_by_erdos_renyi
    counts = share_out([target.scores for target in shared], budget)
    for target, count in zip(shared, counts.tolist(), strict=True):
        target.n_blocks = count


def _check_comparable(shared: list[_Target], names: tuple[str, ...]) -> None:
    """Raise unless layers that share a budget have these options in common."""
    for target in shared[1:]:
        for name in names:
            value, first = (getattr(t.options, name) for t in (target, shared[0]))
            if value != first:
                raise ValueError(
                    f"[sparsify {target.paths[0]}] {name} is {value!r}, but {first!r} in "
                    f"{shared[0].paths[0]}, with which it shares a budget; give it a density of "
                    "its own"
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


def _check_model(owner: str, model: nn.Module, kinds: _Kinds, instead: str) -> None:
    """Raise unless ``model`` is a module in which layers of these kinds can be replaced."""
    check_model(owner, model)
    if isinstance(model, kinds):
        raise TypeError(
            f"[{owner}] model is itself a {type(model).__name__}, which nothing can replace in "
            f"place; use {instead}"
        )


def _leaves(model: nn.Module, kinds: _Kinds) -> list[tuple[list[str], Any]]:
    """Return each leaf module of these kinds once, with all its paths."""
    found: dict[int, tuple[list[str], Any]] = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if isinstance(module, kinds):
            found.setdefault(id(module), ([], module))[0].append(path)
    return list(found.values())


def _replace(model: nn.Module, old: Sequence[nn.Module], new: Sequence[nn.Module]) -> None:
    """Put each of ``new`` wherever the model holds that of ``old``."""
    other = {id(module): replacement for module, replacement in zip(old, new, strict=True)}
    leaves = tree_map(
        lambda m: other.get(id(m), m), model.leaf_modules(), is_leaf=nn.Module.is_module
    )
    model.update_modules(leaves)


def _cells(layer: BlockSparseLinear, n_blocks: int) -> list[str]:
    n_out, n_in, block_size = layer.output_dims, layer.input_dims, layer.block_size
    density = n_blocks * block_size**2 / (n_out * n_in)
    return [f"{n_out} x {n_in}", str(block_size), f"{n_blocks:,}", f"{density:.1%}"]


def _folded(said: dict[str, str]) -> list[tuple[str, str]]:
    """Return what is said of layers, once for those of whom the same is said."""
    texts = list(said.values())
    return [(paths, texts[places[0]]) for paths, places in fold(list(said), texts)]
