r"""Levels as a function of what H depends on, with the derivatives of perturbation theory.

.. math:: dE_i = \langle x_i | dH | x_i \rangle, \qquad dx_i = (E_i - H)^+ dH\, x_i

The pseudo-inverse is a sum over the other states that were found, and conjugate gradients in the
complement of all of them, where H has no energy beyond theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.krylov import Krylov, Normals
from mlx_sparse_nn.physics.levels import Levels, Search, device_of, next_level
from mlx_sparse_nn.physics.parameters import (
    Rebuild,
    detached,
    listed,
    parameters,
    read,
    reading,
    refuse_derivatives,
    ruled,
)
from mlx_sparse_nn.physics.precision import epsilon, pairwise_sum, work_dtype
from mlx_sparse_nn.physics.units import Scaled, in_own_unit, times_power


def traced_levels(search: Search, H: Any, v0: mx.array | None) -> Levels:
    """Return what the search finds while a transform is running, with rules for its derivatives."""
    owner, start = search.owner, v0
    if v0 is not None:
        read(owner, "v0", v0)
        (start,) = detached([v0])
    arrays, rebuild = parameters(H)
    zero = mx.zeros(())
    if arrays:
        levels = LevelRules(search, rebuild, start)(arrays)
    else:
        with reading(owner, "H"):
            levels = search.run(H, start)
            probe = H @ mx.ones(H.shape[0], work_dtype(H, v0))
        zero = zero + refuse_derivatives(owner, "H, which only gives products", probe)
    if v0 is not None:
        zero = zero + refuse_derivatives(owner, "v0", v0)
    zero = zero.astype(levels.energies.dtype)
    return replace(
        levels,
        energies=levels.energies + zero,
        states=levels.states + zero,
        residuals=levels.residuals + zero,
    )


class LevelRules:
    """Energies, states and residuals as a function of the arrays of H.

    Args:
        search: How they are found.
        rebuild: Makes H of its arrays.
        v0: What the search begins with, or None.
    """

    def __init__(self, search: Search, rebuild: Rebuild, v0: mx.array | None):
        self.search, self.rebuild, self.v0 = search, rebuild, v0
        self._found: tuple[list[mx.array], Levels] | None = None  # of which arrays, what

    def __call__(self, arrays: Sequence[mx.array]) -> Levels:
        """Return the levels, differentiable by the arrays."""
        function = self._ruled(self._values, vjp=self._vjp, jvp=self._jvp)
        energies, states, residuals = function(*arrays)
        assert self._found is not None
        return replace(self._found[1], energies=energies, states=states, residuals=residuals)

    def _values(self, *arrays: mx.array) -> list[mx.array]:
        read(self.search.owner, "H", *arrays)
        arrays = tuple(detached(arrays))
        if self._found is None or not all(map(mx.array_equal, arrays, self._found[0])):
            levels = self.search.run(self.rebuild(arrays), self.v0, precise=True)
            self._found = list(arrays), levels
        levels = self._found[1]
        return [levels.energies, levels.states, levels.residuals]

    def _vjp(self, primals: Any, cotangents: Any, outputs: Any) -> Any:
        arrays = listed(primals)
        (energies, states, _), (by_energy, by_state, by_residual) = outputs, cotangents
        read(self.search.owner, "the gradient by its result", *cotangents)
        if _is_not_zero(by_residual):
            raise ValueError(f"[{self.search.owner}] residuals have no derivative by H")
        weights = states * by_energy
        if _is_not_zero(by_state):
            weights = weights + self._ruled(self._turned)(by_state, energies, states, *arrays)
        else:
            weights = weights + refuse_derivatives(self.search.owner, "states twice", by_state)
        _, gradients = mx.vjp(lambda *a: self.rebuild(a) @ states, arrays, [weights])
        return gradients

    def _jvp(self, primals: Any, tangents: Any) -> list[mx.array]:
        arrays = listed(primals)
        moves = [
            mx.zeros_like(a) if d is None else d
            for a, d in zip(arrays, listed(tangents), strict=True)
        ]
        levels = self(arrays)
        states = levels.states
        _, (pushed,) = mx.jvp(lambda *a: self.rebuild(a) @ states, arrays, moves)
        turned = self._ruled(self._turned_or_nan)(pushed, levels.energies, states, *arrays)
        energies = pairwise_sum(mx.real(mx.conjugate(states) * pushed))
        return [energies, turned, mx.full(energies.shape, float("nan"), energies.dtype)]

    def _turned(
        self, pushes: mx.array, energies: mx.array, states: mx.array, *arrays: mx.array
    ) -> mx.array:
        """Return ``(E_i - H)^+`` of each push, ``(dim, k)``, or raise where there is no such."""
        turns, refusals = self._responses(pushes, energies, states, arrays)
        if refusals:
            raise ValueError(refusals[0])
        return turns

    def _turned_or_nan(
        self, pushes: mx.array, energies: mx.array, states: mx.array, *arrays: mx.array
    ) -> mx.array:
        """Return the same, with nan where there is no such: it may not be needed."""
        return self._responses(pushes, energies, states, arrays)[0]

    def _responses(
        self, pushes: mx.array, energies: mx.array, states: mx.array, arrays: Sequence[mx.array]
    ) -> tuple[mx.array, list[str]]:
        """Return the responses, and why there is none of some states, which then are nan."""
        owner, k = self.search.owner, self.search.k
        read(owner, "the tangent of H", pushes, *arrays)
        pushes, energies, states, *arrays = detached([pushes, energies, states, *arrays])
        dim, dtype = states.shape[0], states.dtype
        with device_of(dtype):
            normals = Normals(dim, dtype, self.search.seed + 1)
            H, _ = in_own_unit(owner, self.rebuild(arrays), normals())
            levels = np.ldexp(np.array(energies, dtype=np.float64), -H.exponent)
            others = np.append(levels, self._next(H, levels, states, normals))
            turns, refusals = [], []
            for i in range(k):
                push = pushes[:, i].astype(dtype)
                largest = float(mx.abs(push).max())
                if largest == 0:
                    turns.append(mx.zeros(dim, dtype))
                    continue
                gaps = np.abs(np.delete(others, i) - levels[i])
                if gaps.size and gaps.min() <= 1000 * epsilon(dtype) * np.abs(others[:-1]).max():
                    turns.append(mx.full(dim, float("nan"), dtype))
                    gap = np.ldexp(gaps.min(), H.exponent)
                    refusals.append(
                        f"[{owner}] state {i} has no derivative by H: its energy is only {gap:.2g} "
                        "from another one; energies of a degenerate level have first derivatives "
                        "alone"
                    )
                    continue
                turn = self._response(H, levels, states, i, push / largest)
                turns.append(times_power(turn, -H.exponent) * largest)
            return mx.stack(turns, axis=1), refusals

    def _next(self, H: Scaled, levels: np.ndarray, states: mx.array, normals: Normals) -> float:
        """Return the level next to those found, or infinity."""
        dim, k = states.shape
        if k == dim:
            return np.inf
        basis = Krylov(dim, min(dim, 20 + 2 * k), states.dtype)
        basis.begin(states, levels)
        return next_level(H, self.search.sign, basis, normals, self.search.max_iter)

    def _response(
        self, H: Scaled, levels: np.ndarray, states: mx.array, i: int, push: mx.array
    ) -> mx.array:
        """Return ``(E_i - H)^+`` of a push, ``(dim,)``."""
        amplitudes = mx.conjugate(pairwise_sum(mx.conjugate(push)[:, None] * states))
        factors = np.zeros(levels.size)
        factors[np.arange(levels.size) != i] = 1 / (levels[i] - np.delete(levels, i))
        among = (states * (amplitudes * mx.array(factors).astype(push.dtype))).sum(axis=1)
        rest = _without(states, push)
        return among - self.search.sign * self._inverse(H, float(levels[i]), states, i, rest)

    def _inverse(self, H: Scaled, energy: float, states: mx.array, i: int, b: mx.array) -> mx.array:
        """Return ``(sign (H - energy))^-1 b`` in the complement of the states, by conjugate
        gradients."""
        x, r, p = mx.zeros_like(b), b, b
        square = begin = _square(b)
        goal = epsilon(b.dtype) ** 1.6 * begin
        for _ in range(10 * self.search.max_iter):
            if square <= goal:
                break
            Ap = _without(states, self.search.sign * ((H @ p).astype(b.dtype) - energy * p))
            step = square / float(pairwise_sum(mx.real(mx.conjugate(p) * Ap)))
            x, r = x + step * p, r - step * Ap
            before, square = square, _square(r)
            p = r + (square / before) * p
            mx.eval(x, p)
        if square > epsilon(b.dtype) * begin:
            raise ValueError(
                f"[{self.search.owner}] state {i} has no derivative by H that converges: its "
                "energy is too near to another one"
            )
        return x

    def _ruled(self, function: Callable, **rules: Callable) -> Callable:
        refusal = (
            f"[{self.search.owner}] states have first derivatives alone by H, and no vmap; take "
            "differences of first derivatives, and call it once for each H"
        )
        return ruled(function, refusal, **rules)


def _is_not_zero(a: mx.array) -> bool:
    return bool((a != 0).any())


def _square(x: mx.array) -> float:
    return float(pairwise_sum(mx.abs(x).square()))


def _without(states: mx.array, x: mx.array) -> mx.array:
    """Return ``(dim,)`` without its parts along the states, ``(dim, k)``."""
    for _ in range(2):
        amplitudes = mx.conjugate(pairwise_sum(mx.conjugate(x)[:, None] * states))
        x = x - (states * amplitudes).sum(axis=1)
    return x
