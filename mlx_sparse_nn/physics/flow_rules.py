"""An evolution as a function of arrays, with the rules of its first derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.physics.adjoint import (
    Slope,
    Weighted,
    added,
    backwards,
    dot,
    orthogonal,
    replayed,
    weighted,
)
from mlx_sparse_nn.physics.flow import Flow
from mlx_sparse_nn.physics.parameters import Rebuild, detached, listed, read, ruled
from mlx_sparse_nn.physics.precision import largest_part
from mlx_sparse_nn.physics.recurrence import Product, Row
from mlx_sparse_nn.physics.tangent import tangents
from mlx_sparse_nn.physics.units import Scaled


class FlowRules:
    """The states ``(K, dim)`` as a function of psi, of the arrays of H, and, where it is one, of t.

    It is differentiable once. All of its derivatives are found on the host, by numbers.

    Args:
        flow: The evolution.
        rebuild: Makes H of its arrays.
        n_arrays: How many there are.
    """

    def __init__(self, flow: Flow, rebuild: Rebuild, n_arrays: int):
        self.flow, self.rebuild, self.n_arrays = flow, rebuild, n_arrays

    def __call__(self, operands: Sequence[mx.array]) -> mx.array:
        """Return the states, differentiable by the operands ``(psi, *arrays)`` or one more, t."""

        def value(*operands: mx.array) -> mx.array:
            psi, arrays, _ = self._split(operands)
            read(self.flow.owner, "psi", psi)
            read(self.flow.owner, "H", *arrays)
            psi, *arrays = detached([psi, *arrays])
            return detached([self.flow.states(self._product(arrays), psi)])[0]

        def vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
            def compute(*inner: mx.array) -> tuple[mx.array, ...]:
                read(self.flow.owner, "the gradient by its states", *inner)
                return tuple(detached(self.gradients(*detached(inner))))

            return self._ruled(compute)(cotangent, output, *listed(primals))

        def jvp(primals: Any, tangents: Any) -> mx.array:
            primals, tangents = listed(primals), listed(tangents)
            tangents = [
                mx.zeros_like(p) if d is None else d for p, d in zip(primals, tangents, strict=True)
            ]
            n = len(primals)

            def compute(*inner: mx.array) -> mx.array:
                read(self.flow.owner, "the tangent of an argument", *inner)
                return detached([self.derivative(detached(inner[:n]), detached(inner[n:]))])[0]

            return self._ruled(compute)(*primals, *tangents)

        return self._ruled(value, vjp=vjp, jvp=jvp)(*operands)

    def gradients(
        self, cotangent: mx.array, output: mx.array, *operands: mx.array
    ) -> list[mx.array]:
        """Return the gradients by all operands, of that by the states."""
        flow, (psi, arrays, t) = self.flow, self._split(operands)
        self._check_finite("the gradient by its states", cotangent)
        with mx.stream(flow.device):
            product = self._product(arrays)
            unit, norm = flow.unit(product, psi)
            rows = [flow.unit(product, y)[0] for y in output]
            # Relative to the largest, so that sums are of ordinary size.
            largest = float(largest_part(cotangent)) or 1.0
            cotangents = [weighted(product.from_array(c / largest)) for c in cotangent]
            slope = Slope(arrays, self.rebuild)
            total: Weighted = None
            for i in np.flatnonzero(flow.times == 0):
                total = added(total, cotangents[i])
            for factor, order, distances in flow.sides(product):
                slope.factor = factor
                states, some = [rows[i] for i in order], [cotangents[i] for i in order]
                if flow.imaginary:
                    steps = flow.steps(product, factor, distances)
                    part = replayed(unit, states, some, distances, steps, slope)
                else:
                    steps = flow.steps(product, factor.conjugate(), distances)
                    part = backwards(states, some, distances, steps, slope)
                total = added(total, part)
            grown = largest * (1.0 if flow.imaginary else norm)
            out = [self._gradient_by_state(product, total, unit, norm, largest)]
            out += slope.gradients(math.ldexp(grown, -product.H.exponent))
            if t is not None:
                rates = [
                    0.0 if c is None else c[1] * dot(c[0], self._rate(product, row))
                    for c, row in zip(cotangents, rows, strict=True)
                ]
                grown = math.ldexp(grown, product.H.exponent)
                out.append(mx.array([r * grown for r in rates], dtype=t.dtype).reshape(t.shape))
            return out

    def derivative(self, operands: Sequence[mx.array], moves: Sequence[mx.array]) -> mx.array:
        """Return the derivative of the states along tangents of the operands, ``(K, dim)``."""
        flow, (psi, arrays, _) = self.flow, self._split(operands)
        d_psi, d_arrays, d_t = self._split(moves)
        self._check_finite("the tangent of an argument", *moves)
        with mx.stream(flow.device):
            product = self._product(arrays)
            unit, norm = flow.unit(product, psi)
            zero = unit * 0.0
            # H is linear in its arrays: its derivative is the H of their tangents.
            slope = product.of(Scaled(self.rebuild(d_arrays), product.H.exponent))
            begin = weighted(product.from_array(d_psi), 1 / norm)
            if flow.imaginary:  # the norm of psi does not count
                begin = orthogonal(begin, unit)
            pairs = [(zero if begin is None else begin[0] * begin[1], unit)] * flow.times.size
            for factor, order, distances in flow.sides(product):
                turned = weighted(slope(unit), distances[-1]) if arrays else None
                scale = max((v[1] for v in (begin, turned) if v is not None), default=1.0)
                first = zero if begin is None else begin[0] * (begin[1] / scale)
                way = tangents(
                    product,
                    lambda row, scale=scale: slope(row) / scale if arrays else zero,
                    (first, unit),
                    distances,
                    factor,
                    flow.tol / distances[-1],
                )
                for i, (tangent, state) in zip(order, way, strict=True):
                    pairs[i] = (tangent * scale, state)
            if d_t is not None:
                moved = [math.ldexp(float(d), product.H.exponent) for d in d_t.reshape(-1)]
                pairs = [
                    (tangent + self._rate(product, state) * d, state)
                    for (tangent, state), d in zip(pairs, moved, strict=True)
                ]
            return mx.stack([flow.array(product, tangent, norm) for tangent, _ in pairs])

    def _gradient_by_state(
        self, product: Product, total: Weighted, unit: Row, norm: float, scale: float
    ) -> mx.array:
        """Return the gradient by psi, of that by the state at time 0 over ``scale``."""
        flow = self.flow
        if flow.imaginary:  # the norm of psi does not count
            total, scale = orthogonal(total, unit), scale / norm
        if total is None:
            return mx.zeros(flow.dim, flow.dtype)
        return product.to_array(total[0]).astype(flow.dtype) * (total[1] * scale)

    def _rate(self, product: Product, row: Row) -> Row:
        """Return the derivative of a state of norm 1 by time, in units of H."""
        rate = product(row)
        if not self.flow.imaginary:
            return product.scaled(rate, -1j)
        return row * dot(row, rate) - rate

    def _check_finite(self, name: str, *arrays: mx.array) -> None:
        if not all(math.isfinite(float(largest_part(a))) for a in arrays if a.size):
            raise ValueError(f"[{self.flow.owner}] {name} must be finite")

    def _product(self, arrays: Sequence[mx.array]) -> Product:
        return self.flow.product(self.rebuild(arrays))

    def _split(
        self, operands: Sequence[mx.array]
    ) -> tuple[mx.array, list[mx.array], mx.array | None]:
        """Return the state, the arrays of H, and t if it is an operand."""
        psi, *others = operands
        t = others[self.n_arrays] if len(others) > self.n_arrays else None
        return psi, others[: self.n_arrays], t

    def _ruled(self, function: Callable, **rules: Callable) -> Callable:
        refusal = (
            f"[{self.flow.owner}] psi, H and t have first derivatives alone, and no vmap; take "
            "differences of first derivatives, and call it once for each state"
        )
        return ruled(function, refusal, **rules)
