"""The oracle of Pauli strings: the definition, string after string, in NumPy on the host.

No rule chooses it. Names and arguments are as in ``pauli_plain``, of NumPy's arrays.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlx_sparse_nn.core.strings import PauliTerms


def product(
    terms: PauliTerms, coefficients: np.ndarray, diagonal: np.ndarray | None, x: np.ndarray
) -> np.ndarray:
    """Return ``(V, N, 2**n)``, of V sums of strings."""
    y = np.zeros_like(x) if diagonal is None else diagonal[:, None] * x
    for t, moved in enumerate(_strings_times(terms, x)):
        y = y + coefficients[:, t, None, None] * moved
    return y


def moments(terms: PauliTerms, u: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``(V, n_terms)``; of complex states, complex."""
    return np.stack([(u * moved).sum(axis=(1, 2)) for moved in _strings_times(terms, x)], axis=-1)


def _strings_times(terms: PauliTerms, x: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each string applied to ``x (..., 2**n)``."""
    for flip, sign in zip(terms.flips, terms.signs, strict=True):
        places = np.arange(1 << terms.n_qubits) ^ flip
        clear = np.array([(~int(place) & sign).bit_count() for place in places])
        yield x[..., places] * (1 - 2 * (clear % 2)).astype(np.real(x).dtype)
