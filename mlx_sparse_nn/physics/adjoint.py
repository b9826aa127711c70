r"""Gradients of an evolution: the adjoint state, evolved backwards beside the state.

A state with :math:`\psi' = c H \psi` and a loss L have the adjoint :math:`a' = -c^* H a`, the
gradient of L by the state on the way, and

.. math:: dL = \operatorname{Re} \int \langle a(s) | c\, dH | \psi(s) \rangle\, ds

Within a step both are combinations of a few vectors, :math:`\psi(s) = \sum_k c_k(s) v_k` and
:math:`a(s) = \sum_j d_j(s) w_j`, whose amplitudes are sums of exponentials: the integrals
:math:`\int d_j^* c_k\, ds` are exact. They form a matrix of low rank, each term of which is one
derivative of a product with H. Gauss' quadrature to the same error takes a third more terms in real
time (47 nodes where the rank is 31, of steps of 96 products on 14 sites), and six times as many in
imaginary time (39 where it is 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.parameters import Rebuild
from mlx_sparse_nn.physics.precision import pairwise_sum
from mlx_sparse_nn.physics.recurrence import Row, normalised
from mlx_sparse_nn.physics.steps import Step, Steps

# A row of norm 1 and the norm that it stands for, or None for zero.
Weighted: TypeAlias = "tuple[Row, float] | None"
_AT_ONCE = 16  # derivatives of products in one call


class Slope:
    """The gradient by the arrays of H, summed up over steps.

    Args:
        arrays: What H depends on.
        rebuild: Makes H of such arrays.

    Attributes:
        factor: c.
    """

    def __init__(self, arrays: Sequence[mx.array], rebuild: Rebuild):
        self.arrays, self.rebuild, self.factor = list(arrays), rebuild, 0j
        # On the host: MLX, in a rule, keeps all that an array was made of as long as that array.
        self.sums: list[Any] = [0.0] * len(self.arrays)

    def add(self, state: Step, adjoint: Step, integrals: np.ndarray) -> None:
        """Add the part of a step.

        Args:
            state: The step of the state.
            adjoint: The step of its adjoint.
            integrals: ``(m', m)`` of their amplitudes, conjugate those of the adjoint.
        """
        if not self.arrays:
            return
        product = state.space.product
        u, weights, v = np.linalg.svd(self.factor * integrals)
        rank = int((weights > 0.1 * product.epsilon * weights[0]).sum())
        roots = np.sqrt(weights[:rank, None])
        lefts, rights = u.T[:rank].conj() * roots, v[:rank] * roots
        for first in range(0, rank, _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            x = product.to_columns(state.space.combine(rights[some]))
            y = product.to_columns(adjoint.space.combine(lefts[some]))
            _, slopes = mx.vjp(lambda *arrays, x=x: self.rebuild(arrays) @ x, self.arrays, [y])
            self.sums = [s + _to_numpy(d) for s, d in zip(self.sums, slopes, strict=True)]

    def gradients(self, scale: float) -> list[mx.array]:
        """Return the sums times a number, in the dtypes of the arrays."""
        return [
            mx.broadcast_to(mx.array(s * scale, dtype=a.dtype), a.shape)
            for s, a in zip(self.sums, self.arrays, strict=True)
        ]


def through_step(
    state: Step, steps: Steps, adjoint: Row, weight: float, slope: Slope, backwards: bool
) -> tuple[Row, float]:
    """Take the adjoint from the end of a step to its begin.

    Args:
        state: The step of the state: as it went, or taken back from its end.
        steps: Takes steps of the adjoint.
        adjoint: At the end, of norm 1.
        weight: Its norm.
        slope: Gets the part of this step.
        backwards: Whether ``state`` is the step taken back.

    Returns:
        The adjoint at the begin, of norm 1, and its norm.
    """
    done = 0.0
    while done < state.length:
        step = steps.step(adjoint, state.length - done)
        shifted = steps.factor * (step.energies - state.shift)  # relative to the state's energy
        first, direction = (done, 1) if backwards else (state.length - done, -1)
        time = _time_integrals(shifted, state.exponents, first, direction, step.length)
        weighted = step.overlaps.conj()[:, None] * time * state.overlaps
        slope.add(state, step, weight * (step.vectors.conj() @ weighted @ state.vectors.T))
        (adjoint,), (norm,) = step.states_and_norms([step.length])
        shift = steps.factor.real * (step.shift - state.shift)
        weight *= norm * math.exp(shift * step.length)
        done += step.length
    return adjoint, weight


def _time_integrals(
    adjoint: np.ndarray, state: np.ndarray, first: float, direction: int, length: float
) -> np.ndarray:
    """Return the integrals of ``exp(adjoint* r + state (first +- r))`` over r, 0 to ``length``.

    Args:
        adjoint: ``(m',)`` exponents.
        state: ``(m,)`` exponents.
        first: Time of the state at r = 0.
        direction: 1 or -1.
        length: The interval.
    """
    rates = (adjoint.conj()[:, None] + direction * state) * length
    grows = rates.real > 0
    # (exp(z) - 1) / z, from its larger end: nothing overflows on the way.
    below = np.where(grows, -rates, rates)
    zero = below == 0
    below[zero] = 1
    fraction = np.where(zero, 1, np.expm1(below) / below)
    return np.exp(state * first + np.where(grows, rates, 0)) * fraction * length


def backwards(
    states: Sequence[Row],
    cotangents: Sequence[Weighted],
    times: Sequence[float],
    steps: Steps,
    slope: Slope,
) -> Weighted:
    """Return the gradient of real time by the state at 0; the state is taken back on the way.

    Args:
        states: At the times, of norm 1.
        cotangents: Gradients by each.
        times: Ascending, >= 0.
        steps: Takes states, and their adjoints, back.
        slope: Gets the gradient by H.
    """
    adjoints = Steps(steps.product, steps.factor, steps.tol, steps.length, steps.size)
    adjoint: Weighted = None
    for i in reversed(range(len(times))):
        adjoint = added(adjoint, cotangents[i])
        state, left = states[i], times[i] - (times[i - 1] if i else 0.0)
        while left > 0 and adjoint is not None:
            step = steps.step(state, left)
            adjoint = through_step(step, adjoints, *adjoint, slope, backwards=True)
            left -= step.length
            if left > 0:
                (state,) = step.states([step.length])
    return adjoint


def replayed(
    start: Row,
    states: Sequence[Row],
    cotangents: Sequence[Weighted],
    times: Sequence[float],
    steps: Steps,
    slope: Slope,
) -> Weighted:
    """Return the gradient of imaginary time by the state at 0, of norm 1, as of its direction.

    The way back would amplify rounding, so each step begins with a state that was kept, or that
    is found again from one that was.

    Args:
        start: The state at 0, of norm 1. The other arguments are those of :func:`backwards`, but
            ``steps`` takes states forwards.
    """
    adjoints = Steps(steps.product, steps.factor, steps.tol, steps.length, steps.size)
    adjoint: Weighted = None
    for i in reversed(range(len(times))):
        adjoint = added(adjoint, cotangents[i])
        first, began = (states[i - 1], times[i - 1]) if i else (start, 0.0)
        if adjoint is None:
            continue
        for state, length in _steps_backwards(steps, first, times[i] - began):
            step = steps.step(state, length)
            step.length = length
            (end,), (norm,) = step.states_and_norms([length])
            adjoint = orthogonal(adjoint, end)
            if adjoint is None:
                break
            adjoint = through_step(
                step, adjoints, adjoint[0], adjoint[1] / norm, slope, backwards=False
            )
    return orthogonal(adjoint, start)


def _steps_backwards(steps: Steps, state: Row, span: float) -> Iterator[tuple[Row, float]]:
    """Yield where each step over ``span`` begins, and its length, the last one first.

    Of N steps, about 2 sqrt(N) states are kept; the others are found again from these.
    """
    kept, every, lengths = [state], 1, []
    left = span
    while left > 0:
        step = steps.step(state, left)
        left -= step.length
        lengths.append(step.length)
        (state,) = step.states([step.length])
        if len(lengths) % every == 0:
            kept.append(state)
            if len(kept) > 2 * math.sqrt(len(lengths)) + 2:
                kept, every = kept[::2], 2 * every
    for mark in reversed(range(len(kept))):
        some = lengths[mark * every : (mark + 1) * every]
        segment = [kept.pop()]
        for length in some[:-1]:
            segment += steps.step(segment[-1], length).states([length])
        for length in reversed(some):
            yield segment.pop(), length


def added(a: Weighted, b: Weighted) -> Weighted:
    """Return the sum of two vectors."""
    if a is None or b is None:
        return b if a is None else a
    largest = max(a[1], b[1])
    return weighted(a[0] * (a[1] / largest) + b[0] * (b[1] / largest), largest)


def orthogonal(a: Weighted, state: Row) -> Weighted:
    """Return a vector without its real part along a state of norm 1: what normalising leaves."""
    if a is None:
        return None
    return weighted(a[0] - state * dot(a[0], state), a[1])


def weighted(row: Row, weight: float = 1.0) -> Weighted:
    """Return ``weight * row`` as a row of norm 1 and its norm, or None if it is zero."""
    largest = float(abs(row).max())
    if largest == 0:
        return None
    row, norm = normalised(row / largest)
    return row, norm * largest * weight


def dot(a: Row, b: Row) -> float:
    """Return the sum of products of two rows: of states, the real part of ``<a|b>``."""
    product = a * b
    return float(product.sum() if isinstance(a, np.ndarray) else pairwise_sum(product))


def _to_numpy(a: mx.array) -> np.ndarray:
    """Return an array of at least float32."""
    return np.array(a.astype(mx.result_type(a, mx.float32)))
