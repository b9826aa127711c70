"""Surgery on whole models by what goes through them: which blocks stay, and with which values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.model_fit import ModelFit
from mlx_sparse_nn.calibration.report import CalibrationReport
from mlx_sparse_nn.calibration.resume import FinishedStages, fingerprint
from mlx_sparse_nn.calibration.samples import Call, Rows, Samples, evaluating
from mlx_sparse_nn.core.fit import DAMPING
from mlx_sparse_nn.core.moments import check_damping
from mlx_sparse_nn.core.scores import Balance, check_choice
from mlx_sparse_nn.layers.parameters import density_of
from mlx_sparse_nn.surgery.densities import Density
from mlx_sparse_nn.surgery.selection import leaves_of
from mlx_sparse_nn.surgery.targets import Options, Predicate, Target, find_targets

OUTSIDE = "it is outside the blocks"
NOT_CALLED = "no token that counts went into it"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: Sequence[nn.Module] | None = None,
    density: Density,
    block_size: int = 16,
    call: Call | None = None,
    rows: Rows | None = None,
    predicate: Predicate | None = None,
    damping: float = DAMPING,
    balance: Balance = "row",
    resume: str | Path | None = None,
    progress: bool = True,
) -> CalibrationReport:
    r"""Make the linear layers of a trained model block-sparse, fitted to what goes through them.

    Each layer keeps the blocks whose loss would change its outputs most, and their values and the
    bias are fitted by least squares to what the dense layer gives on the same inputs. No gradient
    is computed. The model is changed in place; after an error it is as it was.

    With ``blocks`` layers are fitted in the order in which they are called, each to the inputs that
    the sparse layers before it give. What goes into one block is held at a time, and one matrix
    ``(n_in, n_in)`` of float64. Without ``blocks`` all layers are fitted to what goes into them in
    the dense model, from one pass: one such matrix is then held for each distinct input. The dense
    weights are held to the end either way.

    Args:
        model: The model. Its layers are looked for where ``model.leaf_modules()`` finds them.
        batches: What it takes: some thousands of tokens of the texts that it is for. What they do
            not show, the sparse model forgets.
        blocks: Modules of the model that run one after another, each on what the last one gave, as
            ``model.layers`` of a Transformer. Layers outside stay dense. A block's other arguments
            are those of its first call for each batch.
        density: Stored fraction, in (0, 1], of each layer, or a mapping from paths to fractions, as
            :func:`sensitivity` measures it. Layers that it does not name stay dense.
        block_size: Side of the blocks.
        call: ``call(model, batch)`` runs the model; by default ``model(batch)``, or
            ``model(*batch)`` for a tuple. Not through ``mx.compile``.
        rows: ``rows(batch)`` says which tokens count: bools over the leading axes of what goes into
            the layers, flattened. Padding should not. By default all do.
        predicate: As in :func:`sparsify`; a ``score`` has no meaning here.
        damping: How much the fit holds on to the dense values, as a fraction of the mean square of
            the inputs. More of it is needed for few samples.
        balance: As in :func:`sparsify`. ``"global"`` leaves outputs without a block, and loses
            most of what calibration brings.
        resume: A folder in which finished blocks are kept. The same call goes on from there after
            an interruption, on the same dense model, and ends with the same bits.
        progress: Whether to show a bar.

    Returns:
        What was made of each layer; ``print`` it for a table.

    Raises:
        TypeError: An argument or option has the wrong type.
        ValueError: An argument is out of its range or does not fit the model, no layer is left to
            be made sparse, what goes into a layer is not finite, its moments are not positive
            definite, or ``resume`` is of another calibration.

    Example:
        >>> report = calibrate(model, batches, blocks=model.layers, density=0.75)
        >>> print(report)
    """
    owner = "calibrate"
    samples = Samples(owner, model, batches, call, rows)
    check_damping(owner, damping)
    by_path = isinstance(density, Mapping)
    one_density = 1.0 if by_path else density
    check_choice(owner, block_size, one_density, "l2", balance)
    options = Options(block_size, one_density, None, "l2", balance, shared=False)
    targets, skipped = find_targets(owner, model, predicate, density, options)
    training = {target.paths[0]: target.linear.training for target in targets}
    with evaluating(model):
        chain = None if blocks is None else BlockChain(samples, blocks)
        if chain is not None:
            targets = _inside(owner, chain.blocks, targets, skipped, by_path)
        if not targets:
            raise ValueError(f"[{owner}] there is no layer to make sparse: {_reasons(skipped)}")
        plan = {} if resume is None else _plan(samples, targets, damping, chain)
        finished = FinishedStages(owner, resume, plan)
        with tqdm(total=len(targets), unit="layer", disable=not progress) as bar:
            fit = ModelFit(samples, targets, damping, finished, bar)
            with fit.undone_on_error():
                if chain is None:
                    fit.fit_all()
                else:
                    fit.fit_in_order(chain)
    for path, layer in fit.layers.items():
        layer.train(training[path])
        layer.output_error = fit.quality[path].error_fitted  # for summary
    for target in targets:
        if target.paths[0] not in fit.layers:
            skipped |= dict.fromkeys(target.paths, NOT_CALLED)
    patterns = {path: layer.pattern for path, layer in fit.layers.items()}
    return CalibrationReport(fit.layers, patterns, fit.quality, skipped, density_of(model))


def _inside(
    owner: str,
    blocks: Sequence[nn.Module],
    targets: Sequence[Target],
    skipped: dict[str, str],
    by_path: bool,
) -> list[Target]:
    """Return the targets that lie in a block, and say of the others why they are skipped."""
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
            if by_path:
                raise ValueError(f"[{owner} {target.paths[0]}] density names it, but {OUTSIDE}")
            skipped |= dict.fromkeys(target.paths, OUTSIDE)
    return [target for target in targets if id(target.linear) in block_of]


def _plan(
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


def _reasons(skipped: Mapping[str, str]) -> str:
    """Return why layers are skipped, the first of each reason."""
    first: dict[str, str] = {}
    for path, reason in skipped.items():
        first.setdefault(reason, path)
    reasons = [f"{path}: {reason}" for reason, path in first.items()]
    return "; ".join(reasons) or "the model has no nn.Linear"
