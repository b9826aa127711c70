"""Sums of Pauli strings times states in C++; names and arguments as in ``pauli_plain``."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_sparse_nn.core.backends import build, cpu
from mlx_sparse_nn.core.backends.binding import Kernel
from mlx_sparse_nn.core.strings import PauliTerms, by_parts, moments_by_parts, real_coefficients

NAME = "cpu"
ELEMENTS = {mx.float32: "float", mx.complex64: "float", mx.float64: "double"}
is_available = cpu.is_available


class Kernels(NamedTuple):
    """The kernels of an element."""

    product: Kernel
    moments: Kernel


def takes(op: str, terms: PauliTerms, n_states: int, dtype: mx.Dtype) -> bool:
    """Return whether there is a kernel: for all but empty products of 30 bits at most."""
    n_bits = terms.n_qubits + (dtype == mx.complex64)
    if n_bits > 30 or n_states * len(terms) == 0 or dtype not in ELEMENTS:
        return False
    return cpu.has(_kernels, ELEMENTS[dtype])


def product(
    terms: PauliTerms, coefficients: mx.array, diagonal: mx.array | None, x: mx.array
) -> mx.array:
    """Return the product, of the shape of x; see ``pauli_plain.product``."""
    if x.dtype == mx.complex64:
        terms = by_parts(terms, coefficients.dtype == mx.complex64)
        coefficients = real_coefficients(coefficients)
    kernel = _kernels(ELEMENTS[x.dtype]).product
    return cpu.binding().pauli_product(kernel, _strings(terms), coefficients, diagonal, x)


def moments(terms: PauliTerms, u: mx.array, x: mx.array, real: bool) -> mx.array:
    """Return ``(V, n_terms)``; see ``pauli_plain.moments``."""
    return moments_by_parts(_moments, terms, u, x, real)


def library(element: str) -> Path:
    """Return the library of an element, built if need be.

    Raises:
        BuildError: It cannot be had.
    """
    dtype = {"float": "float32", "double": "float64"}[element]
    return build.kernels("pauli", [dtype, "pauli"], ELEMENT=element)


def _moments(terms: PauliTerms, u: mx.array, x: mx.array) -> mx.array:
    kernel = _kernels(ELEMENTS[x.dtype]).moments
    return cpu.binding().pauli_moments(kernel, _strings(terms), u, x)


@cache
def _kernels(element: str) -> Kernels:
    """Return the kernels of an element, built if need be.

    Raises:
        BuildError, OSError: They cannot be had.
    """
    loaded = ctypes.CDLL(str(library(element)))
    return Kernels(Kernel(loaded, "pauli_product"), Kernel(loaded, "pauli_moments"))


@lru_cache(1024)
def _strings(terms: PauliTerms) -> mx.array:
    """Return strings as kernels read them, ``(n_terms, 2)`` int32."""
    strings = mx.array([*zip(terms.flips, terms.signs, strict=True)], dtype=mx.int32)
    mx.eval(strings)
    return strings
