"""Pauli strings as masks of bits, known on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx

from mlx_sparse_nn.core.transforms import note_transforms


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

    def __post_init__(self):
        note_transforms()

    @cached_property
    def parity(self) -> tuple[int, ...]:
        """What a transposed string is multiplied by: -1 for an odd number of bits in both masks."""
        pairs = zip(self.flips, self.signs, strict=True)
        return tuple(-1 if (flip & sign).bit_count() % 2 else 1 for flip, sign in pairs)

    def __len__(self) -> int:
        return len(self.flips)


@lru_cache(1024)
def by_parts(terms: PauliTerms, by_complex: bool) -> PauliTerms:
    """Return strings that act on complex states as on vectors of floats: their parts in turn.

    Bit 0 of such a place says which part it is, clear for the real one. Complex coefficients count
    as twice as many, by :func:`real_coefficients`: their real parts, then their imaginary parts.

    Args:
        terms: The strings.
        by_complex: Whether coefficients are complex.
    """
    flips, signs = ([mask << 1 for mask in masks] for masks in (terms.flips, terms.signs))
    if by_complex:
        # i (re + i im) = -im + i re: each part comes from the other, and -1 goes to one of them.
        flips += [flip | 1 for flip in flips]
        signs += [sign | 1 for sign in signs]
    return PauliTerms(terms.n_qubits + 1, tuple(flips), tuple(signs))


def real_coefficients(coefficients: mx.array) -> mx.array:
    """Return those of :func:`by_parts`: what comes from an imaginary part has bit 0 set, and so
    keeps its sign, which is to be -1."""
    if coefficients.dtype != mx.complex64:
        return coefficients
    return mx.concatenate([mx.real(coefficients), -mx.imag(coefficients)], axis=-1)


def moments_by_parts(
    moments: Callable[[PauliTerms, mx.array, mx.array], mx.array],
    terms: PauliTerms,
    u: mx.array,
    x: mx.array,
    real: bool,
) -> mx.array:
    """Return moments ``(V, n_terms)`` by a function that takes real states alone.

    Args:
        moments: Returns ``(V, n_terms)`` of strings and real states.
        terms: The strings.
        u: ``(V, N, 2**n)``.
        x: ``(V, N, 2**n)``.
        real: Whether only real parts are wanted.
    """
    if x.dtype != mx.complex64:
        return moments(terms, u, x)
    found = moments(_of_products(terms, real), u.view(mx.float32), x.view(mx.float32))
    if real:
        return -found
    re, im = mx.split(found, 2, axis=-1)
    return 1j * im - re


@lru_cache(1024)
def _of_products(terms: PauliTerms, real: bool) -> PauliTerms:
    """Return strings whose moments are minus real parts, and imaginary parts, of products.

    (a + i b) (c + i d) = a c - b d + i (a d + b c): a clear bit 0 among those of a sign gives -1.
    """
    flips, signs = ([mask << 1 for mask in masks] for masks in (terms.flips, terms.signs))
    if not real:
        flips += [flip | 1 for flip in flips]
    signs = [sign | 1 for sign in signs] + ([] if real else signs)
    return PauliTerms(terms.n_qubits + 1, tuple(flips), tuple(signs))
