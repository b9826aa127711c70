"""The sums of Pauli strings that ``python -m mlx_sparse_nn check`` computes."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core import pauli
from mlx_sparse_nn.core.backends import pauli_naive
from mlx_sparse_nn.core.pauli import PauliTerms, pauli_product
from mlx_sparse_nn.diagnostics.check_cases import Expected
from mlx_sparse_nn.diagnostics.rounding import tolerance, underflow

PRODUCTS = ("pauli_product", "pauli_moments")
DTYPES = {"float32": mx.float32, "complex64": mx.complex64}
# Less than a tile of every kernel, one, and several.
QUBITS = (1, 3, 8, 12, 14)
N_STATES = 2
LONGEST_SUM = 1024  # of products one after another: long sums are sums of sums


@dataclass(frozen=True)
class StringsCase:
    """One product, or its moments.

    Attributes:
        product: One of ``PRODUCTS``.
        dtype: Of the states.
        n_qubits: Of a state.
        strings: ``"flips"`` of single bits, ``"signs"``, of any bits and with signs, or
            ``"diagonal"``, the same and a diagonal.
    """

    product: str
    dtype: str
    n_qubits: int
    strings: str

    @property
    def name(self) -> str:
        """What ``--only`` takes: ``pauli_product-float32-12-signs``."""
        return f"{self.product}-{self.dtype}-{self.n_qubits}-{self.strings}"

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"{self.product}, {self.dtype}, n_qubits {self.n_qubits}, strings {self.strings}"

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


class Operands(NamedTuple):
    """What a case is computed from, on the CPU.

    Attributes:
        terms: The strings.
        coefficients: ``(n_terms,)`` float32.
        diagonal: ``(2**n,)`` float32, or None.
        u: ``(N, 2**n)``, the other states of moments.
        x: ``(N, 2**n)``.
    """

    terms: PauliTerms
    coefficients: mx.array
    diagonal: mx.array | None
    u: mx.array
    x: mx.array


def strings_cases() -> list[StringsCase]:
    """Return what reaches every kernel of Pauli strings."""
    found = []
    for dtype, n in itertools.product(DTYPES, QUBITS):
        found += [StringsCase("pauli_product", dtype, n, s) for s in ("flips", "signs", "diagonal")]
        found += [StringsCase("pauli_moments", dtype, n, s) for s in ("flips", "signs")]
    return found


def operands_of(case: StringsCase) -> Operands:
    """Draw the operands of a case, the same ones each time, by NumPy and MLX's CPU."""
    rng, n, size = np.random.default_rng(case.seed), case.n_qubits, 1 << case.n_qubits
    flips, signs = [1 << bit for bit in range(n)], [0] * n
    if case.strings != "flips":
        flips += [int(mask) for mask in rng.integers(1, size, 6)]
        signs = [int(mask) for mask in rng.integers(0, size, len(flips))]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    with mx.stream(mx.cpu):
        c, d = mx.array(normal(len(flips))), mx.array(normal(size))
        u, x = (mx.array(normal(N_STATES, size)) for _ in range(2))
        if case.dtype == "complex64":
            u, x = (a + 1j * mx.array(normal(N_STATES, size)) for a in (u, x))
        mx.eval(c, d, u, x)
    terms = PauliTerms(n, tuple(flips), tuple(signs))
    return Operands(terms, c, d if case.strings == "diagonal" else None, u, x)


def compute(case: StringsCase, given: Operands) -> mx.array:
    """Return the product or the moments, by whatever computes on MLX's default device."""
    if case.product == "pauli_product":
        return pauli_product(given.terms, given.coefficients, given.diagonal, given.x)
    return pauli.moments(given.terms, given.u[None], given.x[None], real=False)[0]


def expected(case: StringsCase, given: Operands) -> Expected:
    """Return the same by the oracle, and the error of each element that rounding explains."""
    dtype = DTYPES[case.dtype]
    with mx.stream(mx.cpu):
        c, u, x = (
            np.array(a)[None].astype(np.complex128 if dtype == mx.complex64 else np.float64)
            for a in (given.coefficients, given.u, given.x)
        )
        d = None if given.diagonal is None else np.array(given.diagonal)[None].astype(np.float64)
    unsigned = PauliTerms(case.n_qubits, given.terms.flips, (0,) * len(given.terms))
    if case.product == "pauli_product":
        value = pauli_naive.product(given.terms, c, d, x)[0]
        sizes = (np.abs(c), None if d is None else np.abs(d), np.abs(x))
        size, length = pauli_naive.product(unsigned, *sizes)[0], len(given.terms) + 1
    else:
        value = pauli_naive.moments(given.terms, u, x)[0]
        size, length = (
            pauli_naive.moments(unsigned, np.abs(u), np.abs(x))[0],
            N_STATES << case.n_qubits,
        )
    return Expected(value, tolerance(dtype, length, size) + underflow(dtype))
