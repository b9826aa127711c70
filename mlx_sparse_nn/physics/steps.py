"""Steps of an evolution: each as long as its error bound allows, in one Krylov space."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mlx_sparse_nn.physics.recurrence import (
    Product,
    Recurrence,
    Row,
    Spectrum,
    normalised,
    recurrence,
)

_SMALL = 256  # dimension: the spectrum of H then takes as long as some hundred products
_FEW = 8  # products before the bound is looked at for the first time
ROUNDED = 2.0**-50  # amplitudes of a step that may be rounding alone, however short it is


class Steps:
    """The flow ``exp(c H s)`` of rows of norm 1, normalised, with s > 0 and c of norm 1.

    Args:
        product: Multiplies rows by H.
        factor: c: imaginary in real time, real in imaginary time.
        tol: Error allowed over all steps.
        length: Their length in all.
        size: Most products in one step.
    """

    def __init__(self, product: Product, factor: complex, tol: float, length: float, size: int):
        self.product, self.factor, self.size = product, factor, size
        self.tol, self.length = tol, length
        self.rate = tol / length  # error allowed per unit of s
        self.space = recurrence(product, size)
        self.spread = 0.0  # of energies, as far as steps have seen
        self.drift = 0.0  # error of phases per unit of s, as far as steps have seen
        self.full = math.inf  # length of the last step that needed all products

    def step(self, state: Row, remaining: float) -> Step:
        """Return a step of at most ``remaining``; it is there until the next one is taken."""
        space = self.space
        space.start(state)
        count = self.size if remaining >= self.full else min(self.size, _FEW)
        while True:
            space.grow(count)
            step = Step(space, self.factor)
            exact = space.b[-1] == 0
            may_shorten = exact or space.done == self.size
            length, missing = step.longest(remaining, self.rate, may_shorten)
            if length or may_shorten:
                break
            count = min(self.size, space.done + missing)
        if length < remaining:
            self.full = length
        # A larger spectrum takes as long as tens of steps.
        few = 1 if self.product.dim <= _SMALL else self.product.dim / 16
        is_long = few * length < remaining and space.done == self.size
        drift, spread = step.drift(), float(step.energies[-1] - step.energies[0])
        drifts = drift > 0 and self._rounding(spread, drift) > self.tol
        if (is_long or drifts) and self.product.may_be_stored and not isinstance(space, Spectrum):
            self.space, self.full = Spectrum(self.product), math.inf
            return self.step(state, remaining)
        step.length = length
        self.drift, self.spread = max(self.drift, drift), max(self.spread, spread)
        return step

    def rounding(self) -> float:
        """Return about what error rounding leaves in the end, as far as steps have seen."""
        return self._rounding(self.spread, self.drift)

    def _rounding(self, spread: float, drift: float) -> float:
        """Return that error, as measured, of a spread of energies and a drift of phases."""
        epsilon = self.product.epsilon
        if self.factor.real:  # what is lost on the way decays
            return 4 * epsilon
        of_time = 2.0**-52 * spread  # times are float64
        of_steps = 1.5 * epsilon * math.sqrt(1 + spread * self.length / 2)
        return of_steps + (drift + of_time) * self.length

    def through(self, state: Row, times: Sequence[float], most: float) -> Iterator[Row]:
        """Yield the states at ascending times >= 0, of norm 1.

        All times within one step are read from its Krylov space. There are no more states once
        rounding leaves an error of more than ``most`` in the end.
        """
        now, done = 0.0, 0
        while done < len(times):
            if times[done] <= now:
                yield state
                done += 1
                continue
            step = self.step(state, times[-1] - now)
            if self.rounding() > most:
                return
            is_last = step.length >= times[-1] - now
            ahead = [t for t in times[done:] if is_last or t < now + step.length]
            states = step.states([*(min(t - now, step.length) for t in ahead), step.length])
            yield from states[:-1]
            state, now, done = states[-1], now + step.length, done + len(ahead)


class Step:
    """The flow of one state, within its Krylov space.

    Attributes:
        energies: ``(m,)``, ascending, of H in the space.
        vectors: ``(m, m)``, its eigenvectors as columns.
        overlaps: ``(m,)``, of each of them with the state.
        shift: The energy that exponents are relative to: 0 in real time.
        exponents: ``(m,)``: c times the energies.
        length: How long it is.
    """

    def __init__(self, space: Recurrence, factor: complex):
        self.space, self.factor = space, factor
        self.energies, self.vectors, self.overlaps = space.ritz()
        self.left_out = space.b[-1]
        self.length = 0.0
        # In imaginary time relative to what grows fastest, so that nothing overflows.
        self.shift = float(self.energies[0 if factor.real < 0 else -1]) if factor.real else 0.0
        self.exponents = factor * (self.energies - self.shift)

    def drift(self) -> float:
        r"""Return about how fast rounding turns phases, if no vector is left out: 4 roundings of

        .. math:: \sum_k |c_k|^2 |E_k| \sum_j V_{jk}^4

        with overlaps c. Each number of the recurrence has a rounding of its own, and an energy that
        depends on many of them, by V, has their mean. An eigenstate has that of one. Where vectors
        are left out, steps are so many that their roundings cancel.
        """
        if self.factor.real or self.left_out:
            return 0.0
        weights = np.abs(self.overlaps) ** 2
        if isinstance(self.space, Spectrum):  # in float64, of no recurrence
            return 4 * 2.0**-52 * float(weights @ np.abs(self.energies))
        weights = weights * (np.abs(self.vectors) ** 4).sum(axis=0)
        return 4 * self.space.epsilon * float(weights @ np.abs(self.energies))

    def amplitudes(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return ``(K, m)`` amplitudes of the vectors of the space, not normalised."""
        powers = np.exp(np.asarray(times)[:, None] * self.exponents)
        return (powers * self.overlaps) @ self.vectors.T

    def states(self, times: Sequence[float]) -> list[Row]:
        """Return the states at these times, of norm 1."""
        return self.states_and_norms(times)[0]

    def states_and_norms(self, times: Sequence[float]) -> tuple[list[Row], list[float]]:
        """Return the states at these times, of norm 1, and what norms they had."""
        amplitudes = self.amplitudes(times)
        norms = np.linalg.norm(amplitudes, axis=1)
        rows = self.space.combine(amplitudes / norms[:, None])
        return [normalised(row)[0] for row in rows], norms.tolist()

    def longest(self, remaining: float, rate: float, may_shorten: bool) -> tuple[float, int]:
        r"""Return the longest time within the error bound, or 0 if it may not be that short.

        The bound is :math:`b_{m+1} \int_0^s |(e^{cTs'})_{m1}|\, ds' \le \mathrm{rate}\, s\,
        |e^{cTs} e_1|`, with the projected matrix T.

        Returns:
            The time, and about how many more products ``remaining`` takes.
        """
        m = self.energies.size
        if self.left_out == 0:
            return remaining, 0
        spread = float(self.energies[-1] - self.energies[0])
        # As far as m vectors can reach: half a period each in real time.
        reach = (4 if self.factor.real else 2) * m / spread if spread > 0 else remaining
        span = min(remaining, reach)
        if span < remaining and not may_shorten:
            more = 8 if self.factor.real else math.ceil(m * (remaining / reach - 1))
            return 0.0, max(4, more)
        grid = 4 * m if self.factor.real else 64
        while True:
            times = np.linspace(0, span, grid + 1)
            first = np.exp(self.exponents[:, None] * times) * self.overlaps[:, None]
            lost = np.abs(self.vectors[-1] @ first)  # |exp(c T s)_{m1}|
            norms = np.linalg.norm(first, axis=0) if self.factor.real else 1.0
            lost = np.where(lost > ROUNDED * norms, lost, 0)
            integral = np.concatenate([[0], np.cumsum((lost[1:] + lost[:-1]) / 2)])
            bound, allowed = self.left_out * integral * times[1], rate * times * norms
            longest = np.flatnonzero(bound <= allowed)[-1]  # index of a time
            if longest == grid:
                return span, 0
            if not may_shorten:
                return 0.0, self._missing(span, bound[-1] / allowed[-1])
            if longest:
                return float(times[longest]), 0
            span /= 8

    def _missing(self, span: float, excess: float) -> int:
        """Return how many more products lower the bound by a factor of about ``excess``.

        Components decay like Bessel functions J_m(z), by about z / 2m each.
        """
        m = self.energies.size
        z = span * float(self.energies[-1] - self.energies[0]) / 2
        decay = math.log(max(2.0, 2 * m / max(z, 1e-30)))
        return min(16, max(1, math.ceil(math.log(excess) / decay)))
