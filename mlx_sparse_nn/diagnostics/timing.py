"""How long calls take, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import mlx.core as mx

_ROUNDS = 9
_SAMPLE = 2e-3  # seconds that a sample takes at least, in several calls where one is shorter
_CALLS = 50

Call = Callable[[], list[mx.array]]
Key = TypeVar("Key", bound=Hashable)


def time_in_turns(calls: Mapping[Key, Call], until: float) -> dict[Key, list[float]]:
    """Time calls in turns, until all have had 9 or the time is over.

    Each has a call to warm up. MLX computes when it is asked to, and on a GPU beside Python: a
    sample ends when its results are there.

    Args:
        calls: What to time, by name. Nothing that they return may have been evaluated before.
        until: When to stop, as ``time.perf_counter`` counts. The first round is always finished.

    Returns:
        The samples of each, in seconds a call.
    """
    repeats: dict[Key, int] = {}
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        _seconds(call, 1)
        repeats[name] = max(1, min(_CALLS, int(_SAMPLE / _seconds(call, 1))))
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            samples[name].append(_seconds(call, repeats[name]))
        if time.perf_counter() > until:
            break
    return samples


def _seconds(call: Call, repeats: int) -> float:
    """Return the time of one of ``repeats`` calls that are evaluated together."""
    began = time.perf_counter()
    mx.eval([call() for _ in range(repeats)])
    return (time.perf_counter() - began) / repeats
