"""Layers of a model scored and fitted by the moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.checks import check_absent
from mlx_sparse_nn.core.fit import DAMPING, Fit, fit_pattern, scores_by_moments
from mlx_sparse_nn.core.least_squares import LastProblem
from mlx_sparse_nn.core.moments import InputMoments, check_damping, check_moments
from mlx_sparse_nn.core.pattern import CSRPattern


class MomentFits:
    """What the moments of its inputs make of each layer.

    The least-squares problem of the last layer is kept for the next one: those that share their
    moments follow one another.

    Args:
        owner: Who errors speak for.
        moments: By path.
        damping: As in :meth:`BlockSparseLinear.from_linear`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``damping`` is out of its range.
    """

    def __init__(self, owner: str, moments: Mapping[str, InputMoments], damping: float | None):
        if not isinstance(moments, Mapping):
            kind = type(moments).__name__
            raise TypeError(
                f"[{owner}] moments must be a mapping of InputMoments by path, got {kind}; "
                "layer_moments(model, batches) returns it"
            )
        damping = DAMPING if damping is None else damping
        check_damping(owner, damping)
        self._owner, self._moments = owner, moments
        self._problem = LastProblem(damping)

    def of(self, paths: Sequence[str], input_dims: int) -> InputMoments:
        """Return the moments of the layer at these paths, or raise."""
        owner = f"{self._owner} {paths[0]}".rstrip()
        for path in paths:
            if path in self._moments:
                check_moments(owner, self._moments[path], input_dims)
                return self._moments[path]
        raise ValueError(
            f"[{owner}] moments has nothing for it, as where nothing went into the layer: leave it "
            "out, or give moments of more batches"
        )

    def scores(
        self,
        paths: Sequence[str],
        weight: mx.array,
        has_bias: bool,
        block_size: int,
        pattern: CSRPattern | None = None,
    ) -> np.ndarray:
        """Return how much the outputs lose without each block: :func:`scores_by_moments`."""
        problem = self._problem.of(self.of(paths, weight.shape[1]), has_bias)
        owner = f"{self._owner} {paths[0]}".rstrip()
        return scores_by_moments(owner, weight, problem, block_size, pattern)

    def fit(
        self, paths: Sequence[str], weight: mx.array, bias: mx.array | None, pattern: CSRPattern
    ) -> Fit:
        """Return the values and the bias that are best with a pattern: :func:`fit_pattern`."""
        problem = self._problem.of(self.of(paths, weight.shape[1]), bias is not None)
        return fit_pattern(f"{self._owner} {paths[0]}".rstrip(), weight, bias, pattern, problem)


def moment_fits(
    owner: str, moments: Mapping[str, InputMoments] | None, damping: float | None
) -> MomentFits | None:
    """Return the fits by ``moments``, None without them, or raise."""
    if moments is None:
        check_absent(owner, "it is for moments", damping=damping)
        return None
    return MomentFits(owner, moments, damping)
