"""How far a sparse weight is from the dense one, or a pruned one from what it was."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def relative_error(before: mx.array, after: mx.array) -> float:
    r"""Return :math:`\lVert W - A \rVert_F / \lVert W \rVert_F` of two arrays of one shape.

    Differences are float32, their sum float64. It is 0 where both are zero, and infinite where only
    W is.

    Args:
        before: W, of any floating dtype.
        after: A.
    """
    if before.size == 0:
        return 0.0
    before, after = (a.astype(mx.float32).reshape(a.shape[0], -1) for a in (before, after))
    scale = mx.maximum(mx.abs(before).max(), mx.abs(after).max())  # so that no square overflows
    lost, whole = (_sum_of_squares(a / scale) for a in (before - after, before))
    if scale.item() == 0:
        return 0.0
    return float(np.sqrt(lost / whole)) if whole else np.inf


def _sum_of_squares(rows: mx.array) -> float:
    return float(np.array(mx.square(rows).sum(axis=1)).sum(dtype=np.float64))
