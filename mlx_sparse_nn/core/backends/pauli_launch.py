"""What the Metal and the CUDA kernel of Pauli strings share: what they take, and their launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core.backends.launch import MAX_THREADS, Kernel, KernelLaunch, prepare
from mlx_sparse_nn.core.strings import PauliTerms, by_parts, moments_by_parts, real_coefficients
from mlx_sparse_nn.core.transforms import tracing

MAX_BITS = 30  # the length of an axis of MLX is an int32


class Tile(NamedTuple):
    """What a thread block owns of a state: the places that agree in all but their low bits.

    Attributes:
        low: Low bits.
        threads: Of the thread block.
        shared_memory: Its bytes, where the kernel does not say them itself.
    """

    low: int
    threads: int
    shared_memory: int


class Prepared(NamedTuple):
    """A product, to be launched.

    Attributes:
        launch: The kernel.
        strings: ``(n_terms + 1, 4)`` int32, as the kernel reads them.
    """

    launch: KernelLaunch
    strings: mx.array


def takes(
    op: str, tile_of: Callable[[int], Tile], terms: PauliTerms, n_states: int, dtype: mx.Dtype
) -> bool:
    """Return whether there is a kernel: for float32 and complex64, unless what MLX traces refuses.

    Args:
        op: ``"product"`` or ``"moments"``; of no strings there are no moments.
        tile_of: Returns the tile of a state of so many bits.
        terms: The strings.
        n_states: States, of all sums of strings.
        dtype: Of the states.
    """
    if tracing.refuses_kernels or dtype not in (mx.float32, mx.complex64):
        return False
    if op == "moments" and not terms.flips:
        return False
    n_bits = terms.n_qubits + (dtype == mx.complex64)
    low, threads, _ = tile_of(n_bits)
    n_threads = (n_states << (n_bits - low)) * max(32, threads)
    return n_bits <= MAX_BITS and 0 < n_threads <= MAX_THREADS


def product(
    backend: str,
    tile_of: Callable[[int], Tile],
    terms: PauliTerms,
    coefficients: mx.array,
    diagonal: mx.array | None,
    x: mx.array,
) -> mx.array:
    """Return the product, of the shape of x; see ``pauli_plain.product``."""
    dtype = x.dtype
    if dtype == mx.complex64:
        terms = by_parts(terms, coefficients.dtype == mx.complex64)
        coefficients, x = real_coefficients(coefficients), x.view(mx.float32)
    n_states, parts = x.size >> terms.n_qubits, 2 if dtype == mx.complex64 else 1
    tile = tile_of(terms.n_qubits)
    launch, strings = _prepared(backend, terms, n_states, parts, diagonal is not None, tile)
    start = coefficients if diagonal is None else diagonal
    out = launch([coefficients, start, x, strings], x.shape)
    return out.view(dtype) if parts == 2 else out


def moments(
    backend: str,
    tile_of: Callable[[int], Tile],
    terms: PauliTerms,
    u: mx.array,
    x: mx.array,
    real: bool,
) -> mx.array:
    """Return ``(V, n_terms)``; see ``pauli_plain.moments``."""

    def of_floats(terms: PauliTerms, u: mx.array, x: mx.array) -> mx.array:
        n_sums, n_states, size = x.shape
        low, threads, shared_memory = tile_of(terms.n_qubits)
        threads = max(32, threads)  # whole warps, which add up
        n_blocks = n_sums * n_states * (size >> low)
        template = {"LOW": low, "THREADS": threads, "SIGNED": int(any(terms.signs))}
        kernel = Kernel("pauli_moments", template, (n_blocks * threads, 1, 1), threads)
        kernel = kernel._replace(shared_memory=shared_memory)
        launch = prepare(backend, "pauli_moments", kernel, mx.float32)
        shape = (n_sums, n_blocks // n_sums * (threads // 32), len(terms))
        return launch([u, x, _strings(terms, low)], shape).sum(axis=1)

    return moments_by_parts(of_floats, terms, u, x, real)


@lru_cache(1024)
def _prepared(
    backend: str, terms: PauliTerms, n_states: int, parts: int, has_diagonal: bool, tile: Tile
) -> Prepared:
    low, threads, shared_memory = tile
    template = {
        "LOW": low,
        "THREADS": threads,
        "PARTS": parts,
        "START": int(has_diagonal),
        "SIGNED": int(any(terms.signs)),
    }
    n_blocks = n_states << (terms.n_qubits - low)
    kernel = Kernel("pauli", template, (n_blocks * threads, 1, 1), threads, shared_memory)
    return Prepared(prepare(backend, "pauli", kernel, mx.float32), _strings(terms, low))


@lru_cache(1024)
def _strings(terms: PauliTerms, low: int) -> mx.array:
    """Return strings as kernels read them, those first that flip low bits alone."""
    rows = [(m, z, t, 0) for t, (m, z) in enumerate(zip(terms.flips, terms.signs, strict=True))]
    near, far = ([row for row in rows if (row[0] >> low > 0) == is_far] for is_far in (False, True))
    strings = mx.array([(len(near), 0, 0, 0), *near, *far], dtype=mx.int32)
    mx.eval(strings)
    return strings
