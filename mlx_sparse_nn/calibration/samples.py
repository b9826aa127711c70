"""What a user gives for calibration: batches, how a model takes them, which rows of them count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn.core.checks import check_model

Call: TypeAlias = Callable[[nn.Module, Any], Any]
Rows: TypeAlias = Callable[[Any], "mx.array | np.ndarray"]


class Samples:
    """The batches of a calibration, checked.

    Args:
        owner: Who errors speak for.
        model: The model that takes them.
        batches: What it takes; gone through once, to the end, and kept.
        call: ``call(model, batch)`` runs the model; by default ``model(batch)``, or
            ``model(*batch)`` for a tuple.
        rows: ``rows(batch)`` says which tokens count, as bools over the leading axes; by default
            all.

    Attributes:
        counted: For each batch, ``(tokens,)`` bool, or None where all count.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no batch, or no token that counts.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        batches: Iterable[Any],
        call: Call | None,
        rows: Rows | None,
    ):
        check_model(owner, model)
        for name, value, takes in (("call", call, "model, batch"), ("rows", rows, "batch")):
            if value is not None and not callable(value):
                raise TypeError(f"[{owner}] {name} must be a function of ({takes}), got {value!r}")
        if isinstance(batches, mx.array | np.ndarray | str | bytes | Mapping) or not isinstance(
            batches, Iterable
        ):
            kind = type(batches).__name__
            raise TypeError(f"[{owner}] batches must be a list of batches, got one {kind}")
        self.owner, self.model = owner, model
        self.batches = list(batches)
        self._call = call or _default_call
        if call is None and any(isinstance(batch, np.ndarray) for batch in self.batches):
            raise TypeError(
                f"[{owner}] batches must be of MLX arrays, got NumPy's: let call make of a batch "
                "what the model takes, as lambda model, batch: model(mx.array(batch))"
            )
        if not self.batches:
            raise ValueError(f"[{owner}] batches must hold a batch, got none")
        self.counted = [None if rows is None else self._counted(rows, b) for b in self.batches]
        if not any(map(self.counts, range(len(self.batches)))):
            raise ValueError(f"[{owner}] rows must be True for a token, got False for all of them")

    def __len__(self) -> int:
        return len(self.batches)

    def counts(self, number: int) -> bool:
        """Return whether any token of a batch counts."""
        counted = self.counted[number]
        return counted is None or bool(counted.any())

    def run(self, number: int) -> Any:
        """Return what the model makes of a batch."""
        return self._call(self.model, self.batches[number])

    def of_batch(self, number: int, x: mx.array, path: str) -> mx.array:
        """Return the rows ``(n, features)`` of ``x`` that count, or raise if they do not fit."""
        x, counted = x.reshape(-1, x.shape[-1]), self.counted[number]
        if counted is None:
            return x
        if counted.size != x.shape[0]:
            raise ValueError(
                f"[{self.owner} {path}] rows gives {counted.size} bools for batch {number}, but "
                f"{x.shape[0]} tokens go into this layer: leave it out by the predicate, or give "
                "no rows"
            )
        return x[mx.array(np.flatnonzero(counted).astype(np.int32))]

    def _counted(self, rows: Rows, batch: Any) -> np.ndarray:
        counted = rows(batch)
        if isinstance(counted, mx.array):
            counted = np.array(counted)
        if not isinstance(counted, np.ndarray) or counted.dtype != np.bool_:
            kind = counted.dtype if isinstance(counted, np.ndarray) else type(counted).__name__
            raise TypeError(f"[{self.owner}] rows must return an array of bools, got {kind}")
        return counted.reshape(-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch what differs in training, such as dropout, off for a while."""
    training = [module for _, module in model.named_modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module._set_training_mode(True)


def _default_call(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple) else model(batch)
