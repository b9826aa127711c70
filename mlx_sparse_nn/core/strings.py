"""Pauli strings as masks of bits, known on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache


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

    @cached_property
    def parity(self) -> tuple[int, ...]:
        """What a transposed string is multiplied by: -1 for an odd number of bits in both masks."""
        pairs = zip(self.flips, self.signs, strict=True)
        return tuple(-1 if (flip & sign).bit_count() % 2 else 1 for flip, sign in pairs)

    def __len__(self) -> int:
        return len(self.flips)


@lru_cache(1024)
def of_parts(terms: PauliTerms, by_complex: bool) -> PauliTerms:
    """Return strings that act on complex states as on vectors of floats: their parts in turn.

    Bit 0 of such a place says which part it is, clear for the real one. Complex coefficients count
    as twice as many: their real parts, and then their imaginary parts, which turn real parts into
    imaginary ones, and these into real ones, times -1.

    Args:
        terms: The strings.
        by_complex: Whether coefficients are complex.
    """
    flips, signs = ([mask << 1 for mask in masks] for masks in (terms.flips, terms.signs))
    if by_complex:
        # i (re + i im) = -im + i re: a part moves to the other; what comes from im, a place with
        # bit 0 set, gets -1. The sign of a string is of clear bits: so the coefficient is -im.
        flips += [flip | 1 for flip in flips]
        signs += [sign | 1 for sign in signs]
    return PauliTerms(terms.n_qubits + 1, tuple(flips), tuple(signs))
