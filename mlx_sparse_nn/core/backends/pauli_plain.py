"""Sums of Pauli strings times states in plain MLX: on every device, of every dtype."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core.strings import PauliTerms

NAME = "plain"


def is_available() -> bool:
    return True


def takes(op: str, terms: PauliTerms, n_states: int, dtype: mx.Dtype) -> bool:
    return True


def product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    """Return the product of a sum of strings and states, or of V sums and N states each.

    Args:
        terms: The strings.
        coefficients: ``(n_terms,)`` or ``(V, n_terms)``, real or complex64.
        diagonal: ``(2**n,)`` or ``(V, 2**n)``, real, or None.
        x: ``(..., 2**n)`` or ``(V, N, 2**n)``; complex64 if the coefficients are.
    """
    if coefficients.ndim == 2:  # along N
        coefficients = coefficients[:, None]
        diagonal = None if diagonal is None else diagonal[:, None]
    y = mx.zeros_like(x) if diagonal is None else diagonal * x
    by_flip: dict[int, mx.array] = {}  # what each flip moves
    for t, c in enumerate(_columns(coefficients)):
        flip = terms.flips[t]
        scaled = c * _signed(x, terms.signs[t], terms.n_qubits)
        by_flip[flip] = by_flip[flip] + scaled if flip in by_flip else scaled
    for flip, scaled in by_flip.items():
        y = y + _flipped(scaled, flip, terms.n_qubits)
    return y


def moments(terms: PauliTerms, u: mx.array, x: mx.array, real: bool) -> mx.array:
    """Return the sums over states and places of u times each string applied to x.

    Args:
        terms: The strings.
        u: ``(V, N, 2**n)``.
        x: ``(V, N, 2**n)`` of the same dtype.
        real: Whether only their real parts are wanted.

    Returns:
        ``(V, n_terms)``.
    """
    n = terms.n_qubits
    found = []
    for flip, sign in zip(terms.flips, terms.signs, strict=True):
        found.append((u * _flipped(_signed(x, sign, n), flip, n)).sum(axis=-1).sum(axis=-1))
    out = mx.stack(found, axis=-1) if found else mx.zeros((x.shape[0], 0), x.dtype)
    return mx.real(out) if real and x.dtype == mx.complex64 else out


def _columns(values: mx.array) -> list[mx.array]:
    """Return the columns ``(..., 1)`` of ``(..., n)``. Indexing would gather, which has no second
    derivative."""
    return list(mx.split(values, values.shape[-1], axis=-1)) if values.shape[-1] else []


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
