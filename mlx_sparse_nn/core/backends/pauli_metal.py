"""Sums of Pauli strings times states as Metal kernels; see ``pauli_plain`` and ``pauli_launch``."""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import pauli_launch
from mlx_sparse_nn.core.backends.pauli_launch import Tile
from mlx_sparse_nn.core.strings import PauliTerms

NAME = "metal"


def is_available() -> bool:
    """Return whether MLX has a Metal GPU."""
    return mx.metal.is_available()


def takes(op: str, terms: PauliTerms, n_states: int, dtype: mx.Dtype) -> bool:
    """Return whether there is a kernel."""
    return pauli_launch.takes(op, tile_of, terms, n_states, dtype)


def product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    """Return the product, of the shape of x; see ``pauli_plain.product``."""
    return pauli_launch.product(NAME, tile_of, terms, coefficients, diagonal, x)


def moments(terms: PauliTerms, u: mx.array, x: mx.array, real: bool) -> mx.array:
    """Return ``(V, n_terms)``; see ``pauli_plain.moments``."""
    return pauli_launch.moments(NAME, tile_of, terms, u, x, real)


def tile_of(n_bits: int) -> Tile:
    """Return the tile of a state of so many bits."""
    low = min(n_bits, tuned.METAL_PAULI_BITS)
    return Tile(low, min(tuned.GROUP_THREADS, 1 << low), 0)
