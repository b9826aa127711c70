"""Which layers :func:`sparsify` changes, and what is wanted of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.checks import check_absent, check_dims
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.scores import Balance, Score, check_choice, strongest_pattern
from mlx_sparse_nn.layers.linear import PATTERN_DECIDES
from mlx_sparse_nn.layers.pattern_module import check_layer_pattern
from mlx_sparse_nn.surgery.densities import Density, density_by_path
from mlx_sparse_nn.surgery.selection import leaves_of, why_not_sparsified

Predicate: TypeAlias = Callable[[str, nn.Module], "bool | np.bool_ | dict[str, Any]"]


@dataclass(frozen=True)
class Options:
    """What is wanted of one layer."""

    block_size: int
    density: float
    pattern: CSRPattern | None
    score: Score
    balance: Balance
    shared: bool  # its number of blocks comes out of one budget, not from its own density
    has_moments: bool = False  # of its inputs

    def updated(self, owner: str, own: dict[str, Any]) -> Options:
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

    def checked(self, owner: str, shape: Sequence[int]) -> Options:
        """Return them, or raise unless they fit a weight ``(output_dims, input_dims)``."""
        check_choice(
            owner,
            self.block_size,
            self.density,
            self.score,
            self.balance,
            has_moments=self.has_moments,
        )
        if self.pattern is None:
            check_dims(owner, shape)
        else:
            check_layer_pattern(owner, self.pattern, shape)
            self.pattern.check_unique(owner)
        return self


_OPTION_NAMES = ("block_size", "density", "pattern", "score", "balance")


@dataclass
class Target:
    """A dense layer that is to become sparse, and all its paths in the model."""

    paths: list[str]
    linear: nn.Linear
    options: Options
    scores: np.ndarray = field(init=False)  # (R, C) of all blocks, unless the pattern is given
    n_blocks: int = field(init=False)

    def chosen_pattern(self) -> CSRPattern:
        """Return the given pattern, or that of the strongest blocks."""
        options = self.options
        if options.pattern is not None:
            return options.pattern
        shape = self.linear.weight.shape
        return strongest_pattern(
            self.scores, self.n_blocks, shape, options.block_size, options.balance
        )


def find_targets(
    owner: str, model: nn.Module, predicate: Predicate | None, density: Density, defaults: Options
) -> tuple[list[Target], dict[str, str]]:
    """Return the layers to make sparse, and why each other that holds a matrix is left alone."""
    if predicate is not None and not callable(predicate):
        raise TypeError(
            f"[{owner}] predicate must be a function of (path, module), got {predicate!r}"
        )
    found, skipped = _linear_layers(model)
    all_paths = [paths for paths, _ in found]
    densities = density_by_path(owner, density, "nn.Linear", all_paths, skipped)
    by_path = isinstance(density, Mapping)
    targets: list[Target] = []
    for paths, linear in found:
        wanted = densities.get(paths[0])
        of_layer = defaults if wanted is None else replace(defaults, density=wanted)
        dense = _why_dense(wanted) if by_path else None
        if predicate is not None:
            answers = [
                _ask(f"{owner} {path}", path, linear, predicate, of_layer, dense) for path in paths
            ]
        elif by_path:
            answers = [dense or of_layer.checked(f"{owner} {paths[0]}", linear.weight.shape)]
        else:
            answers = [_why_too_small(linear.weight.shape, defaults.block_size) or of_layer]
        options, *others = answers
        if any(other != options for other in others):
            raise ValueError(
                f"[{owner}] {' and '.join(paths)} are one layer, "
                "of which the predicate wants different things"
            )
        if isinstance(options, str):
            skipped.update(dict.fromkeys(paths, options))
        else:
            targets.append(Target(paths, linear, options))
    return targets, skipped


def _linear_layers(model: nn.Module) -> tuple[list[tuple[list[str], nn.Linear]], dict[str, str]]:
    """Return the layers that may become sparse, with their paths, and why others may not."""
    found: list[tuple[list[str], nn.Linear]] = []
    refused: dict[str, str] = {}
    modules = dict(model.named_modules())
    for paths, module in leaves_of(model):
        if reason := why_not_sparsified(module, paths, modules):
            refused.update(dict.fromkeys(paths, reason))
        elif isinstance(module, nn.Linear):  # others hold no matrix
            found.append((paths, module))
    return found, refused


def _ask(
    owner: str,
    path: str,
    linear: nn.Linear,
    predicate: Predicate,
    options: Options,
    dense: str | None,
) -> Options | str:
    """Return what the predicate wants of a layer, or in words why it is left alone.

    Args:
        owner: Who errors speak for.
        path, linear: The layer.
        predicate: The user's.
        options: What it has where the predicate says nothing else.
        dense: Why it has no density, if the predicate gives it none.
    """
    answer = predicate(path, linear)
    if not isinstance(answer, bool | np.bool_ | dict):
        raise TypeError(f"[{owner}] predicate must return a bool or a dict, got {answer!r}")
    if isinstance(answer, dict):
        options = options.updated(owner, answer)
    elif not answer:
        return "the predicate returned False"
    options = options.checked(owner, linear.weight.shape)
    if dense and options.pattern is None and not (isinstance(answer, dict) and "density" in answer):
        return dense
    return options


def _why_dense(density: float | None) -> str | None:
    """Return in words why a density by path leaves a layer dense, or None."""
    if density is None:
        return "density does not name it"
    return "its density is 1" if density == 1 else None


def _why_too_small(shape: Sequence[int], block_size: int) -> str | None:
    """Return in words why a weight ``(output_dims, input_dims)`` fills no block, or None."""
    for name, size in zip(("output_dims", "input_dims"), shape, strict=True):
        if size < block_size:
            return f"{name} {size} is less than block_size {block_size}"
    return None
