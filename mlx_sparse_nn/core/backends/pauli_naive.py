"""The oracle of Pauli strings: the definition, string after string, by index arrays of the host.

No rule chooses it. Names and arguments are as in ``pauli_plain``.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.strings import PauliTerms


def product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    """Return ``(V, N, 2**n)``, of V sums of strings."""
    y = mx.zeros_like(x) if diagonal is None else diagonal[:, None] * x
    for t, moved in enumerate(_strings_times(terms, x)):
        y = y + coefficients[:, t, None, None] * moved
    return y


def moments(terms: PauliTerms, u: mx.array, x: mx.array) -> mx.array:
    """Return ``(V, n_terms)``; of complex states, complex."""
    return mx.stack([(u * moved).sum(axis=(1, 2)) for moved in _strings_times(terms, x)], axis=-1)


def _strings_times(terms: PauliTerms, x: mx.array) -> Iterator[mx.array]:
    """Yield each string applied to ``x (..., 2**n)``."""
    for flip, sign in zip(terms.flips, terms.signs, strict=True):
        places = np.arange(1 << terms.n_qubits) ^ flip
        clear = np.array([(~int(place) & sign).bit_count() for place in places])
        yield x[..., mx.array(places)] * mx.array(1 - 2 * (clear % 2)).astype(x.dtype)
