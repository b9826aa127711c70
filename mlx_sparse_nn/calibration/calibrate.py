"""Surgery on whole models by what goes through them: which blocks stay, and with which values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_sparse_nn.calibration.block_chain import BlockChain
from mlx_sparse_nn.calibration.model_fit import ModelFit
from mlx_sparse_nn.calibration.progress import progress_bar
from mlx_sparse_nn.calibration.record import check_reached
from mlx_sparse_nn.calibration.report import CalibrationReport
from mlx_sparse_nn.calibration.resume import FinishedStages
from mlx_sparse_nn.calibration.samples import Call, Rows, Samples, evaluating
from mlx_sparse_nn.calibration.selection import check_any, inside, layers_to_fit, plan_of
from mlx_sparse_nn.core.fit import DAMPING
from mlx_sparse_nn.core.moments import check_damping
from mlx_sparse_nn.core.scores import Balance
from mlx_sparse_nn.layers.parameters import density_of
from mlx_sparse_nn.surgery.densities import Density
from mlx_sparse_nn.surgery.targets import Predicate

NOTHING_WENT_IN = "no token that counts went into it, or only zeros"


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

    With ``blocks`` layers are fitted in the order in which they are called, on the inputs that the
    sparse layers before them give. The target is three quarters what the dense layer makes of these
    inputs, and one quarter what it gave in the dense model, which makes up for earlier errors. What
    goes into one block is held at a time, and one matrix
    ``(n_in, n_in)`` of float64. Without ``blocks`` all layers are fitted to what goes into them in
    the dense model, from one pass: one such matrix is then held for each distinct input. The dense
    weights are held to the end either way. An optimizer that has been used does not know the new
    shapes: make it afterwards.

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
    targets, skipped = layers_to_fit(owner, model, predicate, density, block_size, balance)
    training = {target.paths[0]: target.linear.training for target in targets}
    with evaluating(model):
        chain = None if blocks is None else BlockChain(samples, blocks)
        if chain is not None:
            named = density if isinstance(density, Mapping) else ()
            targets = inside(owner, model, chain.blocks, targets, skipped, named)
        check_any(owner, targets, skipped)
        plan = {} if resume is None else plan_of(samples, targets, damping, chain)
        finished = FinishedStages(owner, resume, plan)
        with progress_bar(len(targets), "layer", progress) as bar:
            fit = ModelFit(samples, targets, damping, finished, bar)
            with fit.undone_on_error():
                if chain is None:
                    fit.fit_all()
                else:
                    fit.fit_in_order(chain)
    check_reached(owner, fit.layers)
    for path, layer in fit.layers.items():
        layer.train(training[path])
        layer.output_error = fit.quality[path].error_fitted  # for summary
    for target in targets:
        if target.paths[0] not in fit.layers:
            skipped |= dict.fromkeys(target.paths, NOTHING_WENT_IN)
    patterns = {path: layer.pattern for path, layer in fit.layers.items()}
    return CalibrationReport(fit.layers, patterns, fit.quality, skipped, density_of(model))
