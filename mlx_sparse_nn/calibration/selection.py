"""Which layers calibration fits, and all that its results depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mlx.nn as nn

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.resume import fingerprint
from mlx_sparse_nn.calibration.samples import Samples
from mlx_sparse_nn.core.scores import Balance, check_choice
from mlx_sparse_nn.surgery.densities import Density
from mlx_sparse_nn.surgery.selection import leaves_of
from mlx_sparse_nn.surgery.targets import Options, Predicate, Target, find_targets

OUTSIDE = "it is outside the blocks"


def layers_to_fit(
    owner: str,
    model: nn.Module,
    predicate: Predicate | None,
    density: Density,
    block_size: int,
    balance: Balance,
) -> tuple[list[Target], dict[str, str]]:
    """Return the layers to make sparse, and why each other that holds a matrix is left alone."""
    one_density = 1.0 if isinstance(density, Mapping) else density
    check_choice(owner, block_size, one_density, "obs", balance, has_moments=True)
    options = Options(block_size, one_density, None, "obs", balance, shared=False, has_moments=True)
    targets, skipped = find_targets(owner, model, predicate, density, options)
    for target in targets:
        if target.options.score != "obs":
            raise ValueError(
                f"[{owner} {target.paths[0]}] score must be left out, got "
                f"{target.options.score!r}: blocks are scored by what the outputs lose"
            )
    return targets, skipped


def inside(
    owner: str,
    blocks: Sequence[nn.Module],
    targets: Sequence[Target],
    skipped: dict[str, str],
    named: Collection[str],
) -> list[Target]:
    """Return the targets that lie in a block, and say of the others why they are skipped.

    Raises:
        ValueError: Two blocks hold one layer, or a density is named for a layer outside.
    """
    block_of: dict[int, int] = {}
    for position, block in enumerate(blocks):
        for _, module in [*leaves_of(block), ([], block)]:
            first = block_of.setdefault(id(module), position)
            if first != position and any(target.linear is module for target in targets):
                raise ValueError(
                    f"[{owner}] blocks {first} and {position} hold the same layer: leave blocks out"
                )
    for target in targets:
        if id(target.linear) not in block_of:
            if not set(named).isdisjoint(target.paths):
                raise ValueError(f"[{owner} {target.paths[0]}] density names it, but {OUTSIDE}")
            skipped |= dict.fromkeys(target.paths, OUTSIDE)
    return [target for target in targets if id(target.linear) in block_of]


def plan_of(
    samples: Samples, targets: Sequence[Target], damping: float, chain: BlockChain | None
) -> dict[str, Any]:
    """Return all that the results depend on, as JSON has it."""
    options = {target.paths[0]: target.options for target in targets}
    return {
        "batches": fingerprint([samples.batches, samples.counted]),
        "weights": fingerprint(samples.model.parameters()),
        "blocks": None if chain is None else len(chain.blocks),
        "densities": {path: of_layer.density for path, of_layer in options.items()},
        "block sizes": {path: of_layer.block_size for path, of_layer in options.items()},
        "balances": {path: of_layer.balance for path, of_layer in options.items()},
        "patterns": {
            path: fingerprint([of_layer.pattern.indptr, of_layer.pattern.indices])
            for path, of_layer in options.items()
            if of_layer.pattern is not None
        },
        "damping": damping,
    }


def check_any(owner: str, targets: Sequence[Target], skipped: Mapping[str, str]) -> None:
    """Raise unless there is a layer to fit, and say why others are skipped."""
    if targets:
        return
    first: dict[str, str] = {}
    for path, reason in skipped.items():
        first.setdefault(reason, path)
    reasons = [f"{path}: {reason}" for reason, path in first.items()]
    raise ValueError(
        f"[{owner}] there is no layer to make sparse: "
        + ("; ".join(reasons) or "the model has no nn.Linear")
    )
