"""Sums of Pauli strings times states, against the definition: a loop over rows and strings."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, integers, to_numpy

from mlx_sparse_nn.core.pauli import PauliTerms, pauli_diagonal, pauli_product


def sign(index, mask):
    return (-1) ** (~index & mask).bit_count()


def matrix(terms, coefficients, diagonal):
    size = 1 << terms.n_qubits
    dense = np.diag(diagonal).astype(complex)
    for c, flip, mask in zip(coefficients, terms.flips, terms.signs, strict=True):
        for row in range(size):
            dense[row, row ^ flip] += c * sign(row ^ flip, mask)
    return dense


@st.composite
def strings(draw):
    n = draw(st.integers(1, 5))
    size = draw(st.integers(0, 6))
    flips = draw(st.lists(st.integers(1, 2**n - 1), min_size=size, max_size=size))
    signs = draw(st.lists(st.integers(0, 2**n - 1), min_size=size, max_size=size))
    return PauliTerms(n, tuple(flips), tuple(signs))


@given(strings(), st.sampled_from([mx.float32, mx.complex64]), st.booleans())
def test_product_is_that_of_the_matrix(terms, dtype, has_diagonal):
    size = 1 << terms.n_qubits
    coefficients = integers((len(terms.flips),), 1, dtype)
    diagonal = integers((size,), 2) if has_diagonal else None
    x = integers((2, 3, size), 3)
    dense = matrix(
        terms, to_numpy(coefficients), np.zeros(size) if diagonal is None else to_numpy(diagonal)
    )
    y = pauli_product(terms, coefficients, diagonal, x)
    np.testing.assert_array_equal(y, to_numpy(x) @ dense.T)


@given(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, 2**n - 1))))
)
def test_diagonal_is_the_sum_of_its_strings(case):
    n, signs = case
    signs = tuple(sorted(signs))
    coefficients = integers((len(signs),))
    expected = [
        sum(c * sign(i, mask) for c, mask in zip(to_numpy(coefficients), signs, strict=True))
        for i in range(1 << n)
    ]
    actual = pauli_diagonal(n, signs, coefficients, mx.float32)
    np.testing.assert_array_equal(actual, np.array(expected))


@pytest.mark.parametrize("dtype", [mx.float32, mx.complex64])
def test_derivatives_of_both_orders_and_vmap(dtype):
    """The product is bilinear: a dense matrix that is linear in c and d has the same ones."""
    terms = PauliTerms(3, (1, 5, 5, 7), (0, 1, 5, 2))
    c, d, x = integers((4,), 1, dtype), integers((8,), 2), integers((8,), 3, dtype)
    units = [matrix(terms, row, np.zeros(8)) for row in np.eye(4)]
    units = mx.array(np.real(units).astype(np.float32))

    def product(c, d, x):
        return pauli_product(terms, c, d, x)

    def oracle(c, d, x):
        return ((c[:, None, None] * units).sum(axis=0) * x).sum(axis=1) + d * x

    def slopes(f):
        return mx.grad(lambda *a: (mx.abs(f(*a)) ** 2).sum(), argnums=(0, 1, 2))

    def curvatures(f):
        return mx.grad(
            lambda *a: sum((mx.abs(g) ** 2).sum() for g in slopes(f)(*a)), argnums=(0, 1, 2)
        )

    for derive in (slopes, curvatures):
        for a, e in zip(derive(product)(c, d, x), derive(oracle)(c, d, x), strict=True):
            assert_close(a, to_numpy(e), 64, np.abs(to_numpy(e)).max())
    many = mx.stack([c, 2 * c])
    mapped = mx.vmap(product, in_axes=(0, None, None))(many, d, x)
    np.testing.assert_array_equal(mapped, mx.stack([product(row, d, x) for row in many]))
