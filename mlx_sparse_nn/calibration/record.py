"""The moments of what goes into the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_sparse_nn.calibration.samples import Call, Rows, Samples, evaluating
from mlx_sparse_nn.core.moments import InputMoments, MomentSum
from mlx_sparse_nn.layers.layer_calls import observed
from mlx_sparse_nn.layers.linear import BlockSparseLinear
from mlx_sparse_nn.surgery.selection import leaves_of


def layer_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    rows: Rows | None = None,
    predicate: Callable[[str, nn.Module], bool] | None = None,
    progress: bool = True,
) -> dict[str, InputMoments]:
    """Return the second moments of what goes into the linear layers of a model, dense or sparse.

    Layers that are called with the same array, as the projections of attention are, share one
    object. The model runs as in evaluation, without dropout. One matrix ``(n_in, n_in)`` of float64
    is held for each distinct input, and what goes into all these layers for one batch.

    Args:
        model: Run, and not changed.
        batches: What it takes.
        call: ``call(model, batch)`` runs it; by default ``model(batch)``, or ``model(*batch)`` for
            a tuple. It calls the layers itself, not through ``mx.compile``.
        rows: ``rows(batch)`` says which tokens count: bools over the leading axes of what goes into
            the layers, flattened. Padding should not. By default all do.
        predicate: ``predicate(path, layer)`` says whether to observe a layer; by default each
            ``nn.Linear`` and ``BlockSparseLinear`` is.
        progress: Whether to show a bar.

    Returns:
        The moments by path; layers that were not called are missing.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no batch or no such layer, ``rows`` does not fit, or what goes into a
            layer is not finite.

    Example:
        >>> moments = layer_moments(model, [tokens])
        >>> layer = BlockSparseLinear.from_linear(
        ...     model.layers[0].up, density=0.5, moments=moments["layers.0.up"]
        ... )
    """
    owner = "layer_moments"
    samples = Samples(owner, model, batches, call, rows)
    if predicate is not None and not callable(predicate):
        raise TypeError(f"[{owner}] predicate must be a function of (path, layer)")
    found = {
        tuple(paths): layer
        for paths, layer in leaves_of(model)
        if type(layer) in (nn.Linear, BlockSparseLinear)
        and (predicate is None or predicate(paths[0], layer))
    }
    if not found:
        raise ValueError(f"[{owner}] the model has no linear layer to observe")
    recorder = Recorder(samples, {paths[0]: layer for paths, layer in found.items()})
    with evaluating(model):
        for number in tqdm(range(len(samples)), unit="batch", disable=not progress):
            recorder.run(number, lambda number=number: samples.run(number))
    moments = recorder.moments()
    return {path: moments[paths[0]] for paths in found for path in paths if paths[0] in moments}


class Recorder:
    """Adds up the moments of what goes into some layers, one matrix for each distinct input.

    Args:
        samples: Whose rows count, and for whom errors speak.
        layers: By path.
    """

    def __init__(self, samples: Samples, layers: Mapping[str, nn.Module]):
        self._samples, self._layers = samples, layers
        self._sums: dict[tuple[str, ...], MomentSum] = {}

    def run(self, number: int, call: Callable[[], Any]) -> None:
        """Add what goes into the layers while ``call`` computes batch ``number``."""
        seen: dict[int, tuple[mx.array, list[str]]] = {}

        def observe(path: str, x: mx.array, y: mx.array) -> mx.array:
            paths = seen.setdefault(id(x), (x, []))[1]  # x is held: no other can get its id
            if path not in paths:
                paths.append(path)
            return y

        with observed(self._layers, observe):
            call()
        # What follows the last of these inputs is never computed.
        mx.eval([x for x, _ in seen.values()])
        for x, paths in seen.values():
            x = self._samples.of_batch(number, x, paths[0])
            total = self._sums.setdefault(tuple(paths), MomentSum(x.shape[1]))
            total.add(x)
            if not total.is_finite:
                raise ValueError(
                    f"[{self._samples.owner} {paths[0]}] what goes into this layer must be finite, "
                    f"got nan or infinity in batch {number}"
                )

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The layers that share their inputs, in the order in which they were called."""
        return list(self._sums)

    def moments(self) -> dict[str, InputMoments]:
        """Return the moments of each layer that was called on a token that counts, by path."""
        of_layer: dict[str, list[MomentSum]] = {}
        for paths, total in self._sums.items():
            for path in paths:
                of_layer.setdefault(path, []).append(total)
        results: dict[tuple[int, ...], InputMoments] = {}
        found = {}
        for path, totals in of_layer.items():
            key = tuple(map(id, totals))
            if key not in results and (total := _together(totals)).n:
                results[key] = total.result()
            if key in results:
                found[path] = results[key]
        return found


def _together(totals: list[MomentSum]) -> MomentSum:
    """Return the sum of several, or the only one."""
    if len(totals) == 1:
        return totals[0]
    whole = MomentSum(totals[0].n_in)
    for total in totals:
        whole.include(total)
    return whole
