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


def sign_table(n, masks):
    """Return the sign of each string in each state, ``(strings, 2**n)``: a product of z's."""
    z = 2.0 * ((np.arange(2**n) >> np.arange(n)[:, None]) & 1) - 1
    return np.array([np.prod(z[bits_of(mask)], axis=0) for mask in masks]).reshape(-1, 2**n)


def bits_of(mask):
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


# Up to 11 sites: the first 8 are computed at once, and each more by doubling.
MASKS = st.integers(1, 11).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, 2**n - 1), max_size=40))
)


@given(MASKS, st.sampled_from([mx.float32, mx.complex64]))
def test_diagonal_is_the_sum_of_its_strings(case, dtype):
    n, masks = case
    table = sign_table(n, masks)
    c = integers((len(masks),), 1, dtype)
    actual = pauli_diagonal(n, tuple(masks), c, dtype)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, to_numpy(c) @ table)


@given(MASKS)
def test_gradient_of_a_diagonal_is_its_transpose(case):
    n, masks = case
    weights = integers((2**n,), 2)

    def weighted(c):
        return (weights * pauli_diagonal(n, tuple(masks), c, mx.float32)).sum()

    slopes = mx.grad(weighted)(mx.zeros(len(masks))) if masks else mx.zeros(0)
    np.testing.assert_array_equal(slopes, sign_table(n, masks) @ to_numpy(weights))


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
