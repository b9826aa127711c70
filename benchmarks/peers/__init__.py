"""What each peer runs. A module of a peer is imported in that peer's own process and environment.

Each has ``prepare(workload, arrays)``, which returns a :class:`Task`, or None where the peer has no
such operation; ``RUNTIME``, the module that starts a device and waits for results; and
``PACKAGES``, whose versions are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """One workload as one peer runs it.

    Args:
        run: What is timed: takes what ``setup`` returned and returns arrays.
        convert: Turns them into NumPy arrays as ``workload.expected`` has them.
        setup: Makes new operands before each call, untimed.
    """

    run: Callable[[Any], list]
    convert: Callable[[list], list[np.ndarray]]
    setup: Callable[[], Any] = lambda: None


def stored_blocks(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``indptr``, ``indices`` and blocks ``(n_blocks, B, B)`` of a layer's weight."""
    mask, weight = arrays["mask"], arrays["weight"]
    row, col = np.nonzero(mask)
    n = mask.shape[0]
    block = weight.shape[0] // n
    blocks = weight.reshape(n, block, n, block).swapaxes(1, 2)[row, col]
    return np.searchsorted(row, np.arange(n + 1)).astype(np.int32), col.astype(np.int32), blocks


def stored_values(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``indptr``, ``indices`` and values ``(nnz,)`` of a layer's weight."""
    weight = arrays["weight"]
    row, col = np.nonzero(weight)
    indptr = np.searchsorted(row, np.arange(weight.shape[0] + 1))
    return indptr.astype(np.int32), col.astype(np.int32), weight[row, col]


def features_first(a: np.ndarray) -> np.ndarray:
    """Return ``(rows, features)`` as libraries of ``A @ x`` take it, a single row as a vector."""
    return np.ascontiguousarray(a.T) if a.shape[0] > 1 else a[0]


def rows_first(a: np.ndarray) -> np.ndarray:
    """Return the inverse of :func:`features_first`."""
    return a.T if a.ndim > 1 else a[None]
