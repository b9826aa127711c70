"""Sums of Pauli strings times states: products without a matrix, and their diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class PauliTerms:
    """Strings that are not diagonal, as masks of bits of the basis index. Known on the host.

    String ``t`` takes the amplitude of index ``k`` to index ``k ^ flips[t]``, times -1 for every
    bit of ``signs[t]`` that is clear in ``k``: a set bit has z = +1. It is the product of X on the
    bits of ``flips[t]`` after Z on those of ``signs[t]``.

    Attributes:
        n_qubits: n, at least 1.
        flips: m_t of every string, in (0, 2**n).
        signs: z_t of every string, in [0, 2**n).
    """

    n_qubits: int
    flips: tuple[int, ...]
    signs: tuple[int, ...]


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
    x = x.astype(dtype)
    y = mx.zeros_like(x) if diagonal is None else diagonal * x
    by_flip: dict[int, mx.array] = {}  # what each flip moves
    for c, flip, sign in zip(parts(coefficients), terms.flips, terms.signs, strict=True):
        scaled = c * _signed(x, sign, terms.n_qubits)
        by_flip[flip] = by_flip[flip] + scaled if flip in by_flip else scaled
    for flip, scaled in by_flip.items():
        y = y + _flipped(scaled, flip, terms.n_qubits)
    return y


def pauli_diagonal(
    n_qubits: int, signs: tuple[int, ...], coefficients: mx.array, dtype: mx.Dtype
) -> mx.array:
    """Return the diagonal of a sum of strings of Z, ``(2**n_qubits,)``.

    One bit more doubles the energies: they rise or fall by what the strings with that bit make of
    the bits below. So strings of up to k letters take O(k 2**n) time, however many they are.

    Args:
        n_qubits: n, at least 1.
        signs: The bits of Z of every string, in [0, 2**n), each string once.
        coefficients: ``(n_strings,)``, real.
        dtype: Of the diagonal.
    """
    strings = dict(zip(signs, parts(coefficients.astype(dtype)), strict=True))
    return mx.broadcast_to(_energies(strings, n_qubits, dtype), (1 << n_qubits,))


def parts(values: mx.array) -> list[mx.array]:
    """Return the elements, ``(1,)`` each. Indexing would gather, which has no second derivative."""
    return list(mx.split(values, values.size)) if values.size else []


def _energies(strings: dict[int, mx.array], n_bits: int, dtype: mx.Dtype) -> mx.array:
    """Return the sum of strings for every value of the lowest bits, ``(2**n_bits,)`` or ``(1,)``.

    ``(1,)`` is that of all values, where no string has a bit.
    """
    energies = strings.get(0, mx.zeros(1, dtype))
    for bit in range(n_bits):
        above = {s ^ 1 << bit: c for s, c in strings.items() if s >> bit == 1}
        if above:
            change = _energies(above, bit, dtype)
            energies = mx.concatenate(
                [mx.broadcast_to(e, (1 << bit,)) for e in (energies - change, energies + change)]
            )
        elif energies.size > 1:
            energies = mx.concatenate([energies, energies])
    return energies


def _signed(x: mx.array, mask: int, n_qubits: int) -> mx.array:
    """Return ``(..., 2**n)`` times -1 for every clear bit of the index among those of a mask."""
    shape = x.shape
    for low, length in _runs(mask):
        signs = mx.ones(1, x.dtype)
        for _ in range(length):
            signs = mx.concatenate([-signs, signs])
        x = x.reshape(*shape[:-1], 1 << (n_qubits - low - length), 1 << length, 1 << low)
        x = x * signs[:, None]
    return x.reshape(shape)


def _flipped(x: mx.array, mask: int, n_qubits: int) -> mx.array:
    """Return ``(..., 2**n)`` with the bits of a mask flipped in its index."""
    shape = x.shape
    for low, length in _runs(mask):
        x = x.reshape(*shape[:-1], 1 << (n_qubits - low - length), 1 << length, 1 << low)
        x = x[..., ::-1, :]  # flips all bits of the run
    return x.reshape(shape)


def _runs(mask: int) -> list[tuple[int, int]]:
    """Return the runs of set bits, each as its lowest bit and its length."""
    runs, low = [], 0
    while mask >> low:
        length = 0
        while mask >> (low + length) & 1:
            length += 1
        if length:
            runs.append((low, length))
        low += length + 1
    return runs
