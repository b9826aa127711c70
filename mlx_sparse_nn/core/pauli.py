"""Sums of Pauli strings times states: products without a matrix, and their diagonals.

Derivatives are the product again, and moments: both are functions that MLX differentiates, maps
and compiles, to any order, as those of ``derivatives``. Coefficients are ``(V, n_terms)``,
diagonals ``(V, 2**n)`` and states ``(V, N, 2**n)``: V sums of the same strings.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends.choose import choose_pauli
from mlx_sparse_nn.core.derivatives import promoted, with_rules
from mlx_sparse_nn.core.strings import PauliTerms
from mlx_sparse_nn.core.transforms import needs_rules

# What MLX passes to a rule and gets back: one array or axis, or a list of them.
Arrays = Any
Axes = Any

_LOW_BITS = 8  # of a diagonal, whose states are computed at once


def pauli_product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    r"""Return the product of a sum of Pauli strings and states.

    .. math:: y_i = d_i x_i + \sum_t c_t s_t(i \oplus m_t)\, x_{i \oplus m_t}

    with :math:`s_t(k) = (-1)` to the number of clear bits of k among those of :math:`z_t`. It is
    differentiable to any order in all operands, in ``vmap`` and ``compile``.

    Args:
        terms: The strings: :math:`m_t` and :math:`z_t`.
        coefficients: :math:`c_t`, ``(n_terms,)``, real or complex64.
        diagonal: d, ``(2**n,)``, or None for zeros.
        x: ``(..., 2**n)``.

    Returns:
        ``(..., 2**n)`` of the promoted dtype, at least float32.
    """
    operands = [x, coefficients] + ([] if diagonal is None else [diagonal])
    dtype = mx.result_type(*operands, mx.float32)
    real = mx.float32 if dtype == mx.complex64 else dtype
    by_complex = coefficients.dtype == mx.complex64
    coefficients = coefficients.astype(dtype if by_complex else real)
    x = promoted(x, dtype)
    if diagonal is not None and diagonal.dtype == mx.complex64:
        return diagonal * x + pauli_product(terms, coefficients, None, x)
    operands = [coefficients] + ([] if diagonal is None else [diagonal.astype(real)])
    if not needs_rules():
        return _compute_product(terms, *operands, x)
    states = x.reshape(1, -1 if x.size else 0, x.shape[-1])
    return _product(terms, *_three([*(a[None] for a in operands), states])).reshape(x.shape)


def pauli_diagonal(
    n_qubits: int, signs: tuple[int, ...], coefficients: mx.array, dtype: mx.Dtype
) -> mx.array:
    """Return the diagonal of a sum of strings of Z, ``(2**n_qubits,)``.

    One bit more doubles the energies: they rise or fall by what the strings with that bit make of
    the bits below. So strings of up to k letters take O(k 2**n) time, however many they are.

    Args:
        n_qubits: n, at least 1.
        signs: The bits of Z of every string, in [0, 2**n), each string once.
        coefficients: ``(n_strings,)``, real; or complex, if ``dtype`` is.
        dtype: Of the diagonal.
    """
    strings = dict(zip(signs, parts(promoted(coefficients, dtype)), strict=True))
    return _repeated(_energies(strings, n_qubits, dtype), 1 << n_qubits)


def parts(values: mx.array) -> list[mx.array]:
    """Return the elements, ``(1,)`` each. Indexing would gather, which has no second derivative."""
    return list(mx.split(values, values.size)) if values.size else []


def _energies(strings: dict[int, mx.array], n_bits: int, dtype: mx.Dtype) -> mx.array:
    """Return the sum of strings for every value of the lowest bits, ``(2**n_bits,)`` or ``(1,)``.

    ``(1,)`` is that of all values, where no string has a bit.
    """
    n_low = min(n_bits, _LOW_BITS)
    energies = _low_energies({s: c for s, c in strings.items() if s < 1 << n_low}, n_low, dtype)
    for bit in range(n_low, n_bits):
        above = {s ^ 1 << bit: c for s, c in strings.items() if s >> bit == 1}
        if above:
            change = _energies(above, bit, dtype)
            energies, change = _repeated(energies, 1 << bit), _repeated(change, 1 << bit)
            energies = mx.concatenate([energies - change, energies + change])
        elif energies.size > 1:
            energies = mx.concatenate([energies, energies])
    return energies


def _low_energies(strings: dict[int, mx.array], n_bits: int, dtype: mx.Dtype) -> mx.array:
    """Return the same of a few bits, all strings at once."""
    if not any(strings):
        return strings.get(0, mx.zeros(1, dtype))
    signs = mx.array(_walsh()[list(strings), : 1 << n_bits], dtype=dtype)  # (strings, states)
    energies = mx.concatenate(list(strings.values()))[:, None] * signs
    # MLX (0.32.4) ends the process where it traces the sum of one row for every shape.
    return energies.sum(axis=0) if len(strings) > 1 else energies.reshape(-1)


@cache
def _walsh() -> np.ndarray:
    """Return the sign of every string of few bits, its row, in every state, its column."""
    signs = np.ones((1, 1), np.float32)
    for _ in range(_LOW_BITS):
        signs = np.kron([[1, 1], [-1, 1]], signs)
    return signs


def _repeated(value: mx.array, size: int) -> mx.array:
    """Return ``(size,)`` of ``(1,)`` or of ``(size,)``, of powers of 2.

    Some at a time: so a gradient adds up as many terms at a time, not all one after another.
    """
    while value.size < size:
        times = min(1 << _LOW_BITS, size // value.size)
        value = mx.broadcast_to(value[:, None], (value.size, times)).reshape(-1)
    return value


# The product and the moments, with their rules.


def _product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    """Return ``(V, N, 2**n)``."""
    operands = (coefficients, x) if diagonal is None else (coefficients, diagonal, x)
    if not needs_rules():
        return _compute_product(terms, *operands)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        coefficients, diagonal, x = _three(primals)
        d_c = moments(terms, cotangent, _conj(x), coefficients.dtype != mx.complex64)
        d_x = _product(terms, _turned(terms, _conj(coefficients)), diagonal, cotangent)
        if diagonal is None:
            return d_c, d_x
        return d_c, _real((cotangent * _conj(x)).sum(axis=1)), d_x

    def jvp(primals: Arrays, tangents: Arrays) -> mx.array:
        coefficients, diagonal, x = _three(primals)
        d_coefficients, d_diagonal, d_x = _three(tangents)
        parts = []
        if d_coefficients is not None:
            parts.append(_product(terms, d_coefficients, None, x))
        if d_diagonal is not None:
            parts.append(d_diagonal[:, None] * x)
        if d_x is not None:
            parts.append(_product(terms, coefficients, diagonal, d_x))
        return sum(parts[1:], parts[0])

    def vmap(operands: Arrays, axes: Axes) -> Arrays:
        def product(*operands: mx.array) -> mx.array:
            return _product(terms, *_three(operands))

        (*sums, x), (*sums_axes, x_axis) = operands, axes
        if any(axis is not None for axis in sums_axes):
            return _mapped(product, operands, axes), 0
        x = mx.moveaxis(x, x_axis, 1)  # (V, M, N, 2**n): more states
        return mx.unflatten(product(*sums, mx.flatten(x, 1, 2)), 1, x.shape[1:3]), 1

    return with_rules(_compute_product, terms, vjp, jvp, vmap)(*operands)


def moments(terms: PauliTerms, u: mx.array, x: mx.array, real: bool) -> mx.array:
    """Return the moments ``(V, n_terms)`` of states, or their real parts."""
    if not needs_rules():
        return _compute_moments((terms, real), u, x)

    def vjp(primals: Arrays, cotangent: mx.array, output: mx.array) -> Arrays:
        u, x = primals
        d_u = _product(terms, cotangent, None, _conj(x))
        return d_u, _product(terms, _turned(terms, cotangent), None, _conj(u))

    def jvp(primals: Arrays, tangents: Arrays) -> mx.array:
        (u, x), (d_u, d_x) = primals, tangents
        if d_u is None:
            return moments(terms, u, d_x, real)
        if d_x is None:
            return moments(terms, d_u, x, real)
        return moments(terms, d_u, x, real) + moments(terms, u, d_x, real)

    def vmap(operands: Arrays, axes: Axes) -> Arrays:
        return _mapped(lambda u, x: moments(terms, u, x, real), operands, axes), 0

    return with_rules(_compute_moments, (terms, real), vjp, jvp, vmap)(u, x)


def _compute_product(terms: PauliTerms, *operands: mx.array) -> mx.array:
    coefficients, diagonal, x = _three(operands)
    backend = choose_pauli("product", terms, x.size >> terms.n_qubits, x.dtype)
    return backend.product(terms, coefficients, diagonal, x)


def _compute_moments(by: tuple[PauliTerms, bool], u: mx.array, x: mx.array) -> mx.array:
    terms, real = by
    backend = choose_pauli("moments", terms, x.size >> terms.n_qubits, x.dtype)
    return backend.moments(terms, u, x, real)


def _three(operands: Arrays) -> Arrays:
    """Return coefficients, diagonal and states; the diagonal may be left out, and is None then."""
    coefficients, *diagonal, x = operands
    return coefficients, diagonal[0] if diagonal else None, x


def _mapped(product: Any, operands: Arrays, axes: Axes) -> mx.array:
    """Map a product over an axis of any operands, which becomes one of more sums of strings."""
    sizes = [a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None]
    stacked = [
        mx.broadcast_to(a, (sizes[0], *a.shape)) if axis is None else mx.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    ]
    out = product(*(mx.flatten(a, 0, 1) for a in stacked))
    return mx.unflatten(out, 0, stacked[-1].shape[:2])


def _turned(terms: PauliTerms, coefficients: mx.array) -> mx.array:
    """Return the coefficients of the transposed sum of the same strings."""
    if min(terms.parity, default=1) > 0:
        return coefficients
    return coefficients * mx.array(terms.parity, dtype=coefficients.dtype)


def _conj(a: mx.array) -> mx.array:
    """Conjugate: MLX's gradients of complex products are by the conjugate of the other factor."""
    return mx.conjugate(a) if a.dtype == mx.complex64 else a


def _real(a: mx.array) -> mx.array:
    return mx.real(a) if a.dtype == mx.complex64 else a
