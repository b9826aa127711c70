"""Hamiltonians in any unit: what is squared on the way neither over- nor underflows."""

import mlx.core as mx
import numpy as np
import pytest
from support import device_of, to_numpy

from mlx_sparse_nn.physics import IsingOperator, transverse_field_ising
from mlx_sparse_nn.physics.checks import check_hermitian
from mlx_sparse_nn.physics.krylov import Normals
from mlx_sparse_nn.physics.precision import work_dtype
from mlx_sparse_nn.physics.units import Scaled, in_own_unit, times_power

DTYPES = [mx.float32, mx.complex64, mx.float64]
UNITS = [1e-37, 1e-30, 1.38e-23, 1e-10, 1.0, 1e10, 1e18, 1e30, 1e36]
X = np.random.default_rng(0).normal(size=64)


class Own:
    """A user's object: a product and a shape."""

    shape = (64, 64)

    def __init__(self, unit, dtype):
        self.diagonal = mx.array(np.linspace(-1, 2, 64) * unit, dtype=dtype)

    def __matmul__(self, x):
        return self.diagonal * x


def hamiltonians(unit, dtype):
    matrix = transverse_field_ising(6, 0.7 * unit, coupling=unit, dtype=dtype)
    operator = IsingOperator(6, 0.7 * unit, coupling=unit, dtype=dtype)
    return {"csr": matrix, "operator": operator, "dense": matrix.todense(), "own": Own(unit, dtype)}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["csr", "operator", "dense", "own"])
def test_a_product_in_its_own_unit(form, dtype, unit):
    with device_of(dtype):
        x = mx.array(X, dtype=dtype)
        H, product = in_own_unit("test", hamiltonians(unit, dtype)[form], x)
        again = H @ x
        largest = float(mx.abs(product).max())
        expected = to_numpy(hamiltonians(1.0, dtype)[form] @ x)
        assert mx.array_equal(product, again)
    assert 2.0**-17 < largest < 2.0**17
    # In units of 2**exponent; 1e-37 has lost digits of its smallest values when it was stored.
    expected = expected * (unit / 2.0**H.exponent)
    eps = 2.0**-52 if dtype == mx.float64 else 2.0**-23
    scale = np.abs(expected).max()
    np.testing.assert_allclose(to_numpy(product), expected, atol=20 * eps * scale)


@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_a_power_of_two_changes_no_digit(power):
    unit = 2.0**power
    x = mx.array(X, dtype=mx.float32)
    H, product = in_own_unit("test", IsingOperator(6, 0.7 * unit, coupling=unit), x)
    assert H.exponent - power == 3  # the largest number of the product is 4 to 8
    assert mx.array_equal(times_power(product, H.exponent - power), IsingOperator(6, 0.7) @ x)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["csr", "operator", "dense", "own"])
def test_hermitian_in_every_unit(form, dtype, unit):
    """1e-30 was "not Hermitian", 1e18 "not finite"."""
    with device_of(dtype):
        H = hamiltonians(unit, dtype)[form]
        check_hermitian("test", H, Normals(64, work_dtype(H), seed=0))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_hermitian_in_every_unit(dtype, unit):
    with device_of(dtype):
        upper = mx.array(np.triu(np.ones((16, 16))) * unit, dtype=dtype)
        with pytest.raises(ValueError, match=r"\[test\] H is not Hermitian"):
            check_hermitian("test", upper, Normals(16, dtype, seed=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"\[test\] H @ x is not finite"):
        in_own_unit("test", mx.full((64, 64), value), mx.array(X, dtype=mx.float32))


def test_zero_keeps_its_unit():
    H, product = in_own_unit("test", mx.zeros((64, 64)), mx.array(X, dtype=mx.float32))
    assert H.exponent == 0
    assert not product.any().item()


@pytest.mark.parametrize("exponent", [-140, -100, 0, 101, 127])
def test_energies_return_to_the_unit_of_the_user(exponent):
    energy = Scaled(mx.eye(2), exponent).to_own(mx.array([1.0, -0.75]))
    np.testing.assert_array_equal(to_numpy(energy), np.ldexp([1.0, -0.75], exponent))
