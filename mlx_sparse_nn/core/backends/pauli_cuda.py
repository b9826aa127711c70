"""Sums of Pauli strings times states as CUDA kernels; names and arguments as in ``pauli_plain``."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import MAX_THREADS, Kernel, KernelLaunch, prepare
from mlx_sparse_nn.core.strings import PauliTerms, by_parts, real_coefficients
from mlx_sparse_nn.core.transforms import tracing

NAME = "cuda"


class Tile(NamedTuple):
    """What a thread block owns of a state: the places of some low and high bits.

    Attributes:
        low: Low bits.
        high: High bits.
        threads: Of the thread block.
    """

    low: int
    high: int
    threads: int


class Prepared(NamedTuple):
    """A product, to be launched.

    Attributes:
        launch: The kernel.
        terms: ``(n_terms + 1, 4)`` int32, as the kernel reads strings.
    """

    launch: KernelLaunch
    terms: mx.array


def is_available() -> bool:
    """Return whether MLX has a CUDA GPU."""
    return mx.cuda.is_available()


def takes(op: str, terms: PauliTerms, n_states: int, dtype: mx.Dtype) -> bool:
    """Return whether there is a kernel: for float32 and complex64, where an axis holds all parts.

    Args:
        op: ``"product"``; plain MLX computes moments.
        terms: The strings.
        n_states: States, of all sums of strings.
        dtype: Of the states.
    """
    if op != "product" or tracing.refuses_kernels or n_states == 0:
        return False
    if dtype not in (mx.float32, mx.complex64):
        return False
    n_bits = terms.n_qubits + (dtype == mx.complex64)
    low, _, threads = tile_of(n_bits)
    return n_bits <= 30 and (n_states << (n_bits - low)) * threads <= MAX_THREADS


def product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    """Return the product, of the shape of x; see ``pauli_plain.product``."""
    dtype = x.dtype
    if dtype == mx.complex64:
        terms = by_parts(terms, coefficients.dtype == mx.complex64)
        coefficients, x = real_coefficients(coefficients), x.view(mx.float32)
    n_states = x.size >> terms.n_qubits
    parts = 2 if dtype == mx.complex64 else 1
    tile = tile_of(terms.n_qubits)
    launch, strings = _prepared(terms, n_states, parts, diagonal is not None, tile)
    start = coefficients if diagonal is None else diagonal
    return launch([coefficients, start, x, strings], x.shape).view(dtype)


def tile_of(n_bits: int) -> Tile:
    """Return the tile of a state of so many bits."""
    low = min(n_bits, 12)
    return Tile(low, 0, max(32, min(tuned.GROUP_THREADS, (1 << low) // 4)))


@lru_cache(1024)
def _prepared(
    terms: PauliTerms, n_states: int, parts: int, has_diagonal: bool, tile: Tile
) -> Prepared:
    low, high, threads = tile
    template = {
        "LOW": low,
        "HIGH": high,
        "THREADS": threads,
        "PARTS": parts,
        "START": int(has_diagonal),
        "SIGNED": int(any(terms.signs)),
        "STREAM": 0,
        "TOGETHER": 2,
    }
    n_blocks = n_states << (terms.n_qubits - low - high)
    bytes_of_tile = 4 << (low + high)
    kernel = Kernel("pauli", template, (n_blocks * threads, 1, 1), threads, bytes_of_tile)
    launch = prepare(NAME, "pauli", kernel, mx.float32)
    return Prepared(launch, strings_of(terms, low, high))


def strings_of(terms: PauliTerms, low: int, high: int) -> mx.array:
    """Return strings as the kernel reads them: those first that flip no bit between."""
    n_bits = terms.n_qubits
    middle = (1 << (n_bits - high)) - (1 << low)
    rows = [(m, z, t, 0) for t, (m, z) in enumerate(zip(terms.flips, terms.signs, strict=True))]
    near, far = ([row for row in rows if bool(row[0] & middle) == is_far] for is_far in (0, 1))
    strings = mx.array([(len(near), 0, 0, 0), *near, *far], dtype=mx.int32)
    mx.eval(strings)
    return strings
