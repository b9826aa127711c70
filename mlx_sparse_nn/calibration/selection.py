"""Which layers calibration fits, and all that its results depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.nn as nn

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.record import layer_inputs
from mlx_sparse_nn.calibration.resume import fingerprint
from mlx_sparse_nn.calibration.samples import Samples
from mlx_sparse_nn.core.scores import Balance, check_choice
from mlx_sparse_nn.surgery.densities import Density
from mlx_sparse_nn.surgery.selection import LINEAR, nothing_around
from mlx_sparse_nn.surgery.targets import Options, Predicate, Target, find_targets

OUTSIDE = "it is outside the blocks"
ALSO_OUTSIDE = "it is called outside the blocks too"


def layers_to_fit(
    owner: str,
    model: nn.Module,
    predicate: Predicate | None,
    density: Density,
    block_size: int,
    balance: Balance,
) -> tuple[list[Target], dict[str, str]]:
    """Return the layers to make sparse, and why each other that holds a matrix is left alone."""
    if isinstance(model, LINEAR):
        raise nothing_around(owner, model, "use BlockSparseLinear.from_linear with moments")
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
    model: nn.Module,
    blocks: Sequence[nn.Module],
    targets: Sequence[Target],
    skipped: dict[str, str],
    named: Collection[str],
) -> list[Target]:
    """Return the targets that lie in a block, and say of the others why they are skipped.

    Raises:
        ValueError: Two blocks hold one layer, or a density is named for a layer outside.
    """
    position = {id(block): number for number, block in enumerate(blocks)}
    paths = {path: position[id(m)] for path, m in model.named_modules() if id(m) in position}
    found = []
    for target in targets:
        around = [_around(path, paths) for path in target.paths]
        holders = sorted({number for number in around if number is not None})
        if len(holders) > 1:
            raise ValueError(
                f"[{owner}] blocks {holders[0]} and {holders[1]} hold the same layer, "
                f"{target.paths[0]}: leave blocks out"
            )
        if None not in around:
            found.append(target)
            continue
        reason = ALSO_OUTSIDE if holders else OUTSIDE
        if not set(named).isdisjoint(target.paths):
            raise ValueError(f"[{owner} {target.paths[0]}] density names it, but {reason}")
        skipped |= dict.fromkeys(target.paths, reason)
    return found


def _around(path: str, blocks: Mapping[str, int]) -> int | None:
    """Return which block is at a path or around it."""
    parts = path.split(".")
    heads = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
    return next((blocks[head] for head in heads if head in blocks), None)


def plan_of(
    samples: Samples, targets: Sequence[Target], damping: float, chain: BlockChain | None
) -> dict[str, Any]:
    """Return all that the results depend on, as JSON has it."""
    options = {target.paths[0]: target.options for target in targets}
    return {
        "function": samples.owner,
        "blocks": None if chain is None else len(chain.blocks),
        "batches": fingerprint([_what_goes_in(samples, targets, chain), samples.counted]),
        "weights": fingerprint(samples.model.parameters()),
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


def _what_goes_in(
    samples: Samples, targets: Sequence[Target], chain: BlockChain | None
) -> list[Any]:
    """Return what goes into the first block, or the first of these layers, for each batch.

    A batch may be anything; this is what is made of it.
    """
    if chain is not None:
        return chain.inputs
    layers = {target.paths[0]: target.linear for target in targets}
    runs = (partial(samples.run, number) for number in range(len(samples)))
    return [layer_inputs(samples.owner, layers, run, first=True) for run in runs]


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
