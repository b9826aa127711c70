"""The moments of what goes into the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.calibration.progress import progress_bar
from mlx_sparse_nn.calibration.samples import Call, Rows, Samples, evaluating
from mlx_sparse_nn.core.moments import DenseInputs, InputMoments, MomentSum
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
        The moments by path; layers that were not called are missing. A model that is itself a layer
        has the path ``""``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no batch or no such layer, none is called, ``rows`` does not fit, or
            what goes into a layer is not finite.

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
    leaves = leaves_of(model) or [([""], model)]  # it may itself be a layer
    found = {
        tuple(paths): layer
        for paths, layer in leaves
        if type(layer) in (nn.Linear, BlockSparseLinear)
        and (predicate is None or predicate(paths[0], layer))
    }
    if not found:
        raise ValueError(f"[{owner}] the model has no linear layer to observe")
    layers = {paths[0]: layer for paths, layer in found.items()}
    recorder = Recorder(samples)
    with evaluating(model), progress_bar(len(samples), "batch", progress) as bar:
        for number in range(len(samples)):
            recorder.add(number, layer_inputs(owner, layers, partial(samples.run, number)))
            bar.update()
    seen = recorder.result()
    check_reached(owner, seen)
    return {path: seen[paths[0]].moments for paths in found for path in paths if paths[0] in seen}


class Recorded(NamedTuple):
    """What went into a layer.

    Attributes:
        moments: Of its inputs.
        dense: What these were in the dense model, where they may be others.
    """

    moments: InputMoments
    dense: DenseInputs | None


Inputs: TypeAlias = "list[tuple[mx.array, tuple[str, ...]]]"  # arrays, and the layers they go into


def layer_inputs(
    owner: str, layers: Mapping[str, nn.Module], call: Callable[[], Any], first: bool = False
) -> Inputs:
    """Return what goes into layers while ``call`` computes, in that order, evaluated.

    What follows the last of these inputs is never computed. With ``first`` only the first is
    computed and returned.
    """
    seen: dict[int, tuple[mx.array, list[str]]] = {}

    def observe(path: str, x: mx.array, y: mx.array) -> mx.array:
        paths = seen.setdefault(id(x), (x, []))[1]  # x is held: no other can get its id
        if path not in paths:
            paths.append(path)
        return y

    with observed(layers, observe):
        call()
    found = [(x, tuple(paths)) for x, paths in seen.values()][: 1 if first else None]
    try:
        mx.eval([x for x, _ in found])
    except (RuntimeError, ValueError) as error:
        if "Attempting to eval an array" not in str(error):
            raise
        raise ValueError(
            f"[{owner}] call must run the layers itself, not through mx.compile or mx.vmap"
        ) from error
    return found


def check_reached(owner: str, seen: Collection[str]) -> None:
    """Raise if nothing went into any layer."""
    if not seen:
        raise ValueError(
            f"[{owner}] call must run the layers on tokens that count, but nothing went into any: "
            "does it call the model, and not a function compiled before?"
        )


class Recorder:
    """Adds up the moments of what goes into layers, one matrix for each distinct input.

    Args:
        samples: Whose rows count, and for whom errors speak.
    """

    def __init__(self, samples: Samples):
        self._samples = samples
        self._sums: dict[tuple[str, ...], MomentSum] = {}
        self._unpaired: set[tuple[str, ...]] = set()

    def add(self, number: int, inputs: Inputs, dense: Inputs | None = None) -> None:
        """Add what went into the layers for batch ``number``.

        Args:
            number: Of the batch.
            inputs: As :func:`layer_inputs` returns them.
            dense: The same of the dense model. A layer into which that sent other tokens, as a
                router may, goes without.
        """
        pairs = dict(enumerate(dense or []))
        for place, (x, paths) in enumerate(inputs):
            other, of_other = pairs.get(place, (x, paths))
            if (other.shape, of_other) != (x.shape, paths):
                other = x
                self._unpaired.add(paths)
            if paths not in self._sums:
                self._sums[paths] = MomentSum(x.shape[-1], dense is not None)
            total = self._sums[paths]
            total.add(
                self._samples.of_batch(number, x, paths[0]),
                None if dense is None else self._samples.of_batch(number, other, paths[0]),
            )
            if not total.is_finite:
                raise ValueError(
                    f"[{self._samples.owner} {paths[0]}] what goes into this layer must be finite, "
                    f"got nan or infinity in batch {number}"
                )

    def result(self) -> dict[str, Recorded]:
        """Return what went into each layer that was called on a token that counts, by path."""
        of_layer: dict[str, list[tuple[str, ...]]] = {}
        for paths, total in self._sums.items():
            for path in paths if total.n else ():
                of_layer.setdefault(path, []).append(paths)
        results = {
            groups: self._together(groups) for groups in {tuple(g) for g in of_layer.values()}
        }
        return {path: results[tuple(groups)] for path, groups in of_layer.items()}

    def _together(self, groups: tuple[tuple[str, ...], ...]) -> Recorded:
        """Return what went into layers that are called with several arrays, or with one."""
        totals = [self._sums[paths] for paths in groups]
        moments = [total.result() for total in totals]
        if len(moments) > 1:
            second, sums = (sum_of([getattr(m, name) for m in moments]) for name in _SUMS)
            moments = [InputMoments(second, sums, sum(m.n for m in moments))]
        dense = [total.dense() for total in totals]
        found = [inputs for inputs in dense if inputs is not None]
        if len(found) < len(dense) or not self._unpaired.isdisjoint(groups):
            return Recorded(moments[0], None)
        cross, sums = sum_of([d.cross for d in found]), sum_of([d.total for d in found])
        return Recorded(moments[0], DenseInputs(cross, sums))


_SUMS = ("second", "total")


def sum_of(arrays: list[np.ndarray]) -> np.ndarray:
    """Return the sum of arrays of one shape; the only one itself."""
    return arrays[0] if len(arrays) == 1 else np.sum(arrays, axis=0)
