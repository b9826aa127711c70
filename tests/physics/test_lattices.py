"""Bonds of lattices against neighbours that are found by their distance."""

from itertools import combinations, product

import pytest

from mlx_sparse_nn.physics import IsingOperator, chain, ladder, ring, square, triangular

NEAREST = {(1, 0), (0, 1)}


def neighbours(lx, ly, steps, periodic=(False, False)):
    """Return all pairs of sites that a step apart, up to the lengths of closed directions."""
    sites = {x + lx * y: (x, y) for x, y in product(range(lx), range(ly))}
    found = set()
    for a, b in combinations(sites, 2):
        for sign in (1, -1):
            dx, dy = (sign * (q - p) for p, q in zip(sites[a], sites[b], strict=True))
            dx, dy = (dx % lx if periodic[0] else dx), (dy % ly if periodic[1] else dy)
            if (dx, dy) in steps:
                found.add(frozenset((a, b)))
    return found


def as_set(bonds):
    """Return bonds without their order, each of them once."""
    assert len({frozenset(bond) for bond in bonds}) == len(bonds)
    return {frozenset(bond) for bond in bonds}


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_chain_and_ring(n):
    assert chain(n) == [(i, i + 1) for i in range(n - 1)]
    if n > 2:
        assert ring(n) == [*chain(n), (n - 1, 0)]


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize(("lx", "ly"), [(3, 3), (4, 3), (3, 5), (5, 4)])
def test_grids(lx, ly, periodic):
    wrap = (periodic, periodic)
    assert as_set(square(lx, ly, periodic=periodic)) == neighbours(lx, ly, NEAREST, wrap)
    bonds = triangular(lx, ly, periodic=periodic)
    assert as_set(bonds) == neighbours(lx, ly, NEAREST | {(1, 1)}, wrap)
    if periodic:
        assert (len(square(lx, ly, periodic=True)), len(bonds)) == (2 * lx * ly, 3 * lx * ly)


@pytest.mark.parametrize(("lx", "ly"), [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_thin_grids_are_open(lx, ly):
    assert as_set(square(lx, ly)) == neighbours(lx, ly, NEAREST)
    assert as_set(triangular(lx, ly)) == neighbours(lx, ly, NEAREST | {(1, 1)})


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ladder(n):
    assert as_set(ladder(n)) == neighbours(2, n, NEAREST)
    assert set(ladder(n)) >= {(2 * r, 2 * r + 1) for r in range(n)}  # the rungs
    if n > 2:
        closed = as_set(ladder(n, periodic=True))
        assert closed == neighbours(2, n, NEAREST, (False, True))
        assert len(closed) == 3 * n


def test_the_order_is_that_of_couplings():
    """As docstrings say: so an array of couplings can be written down."""
    assert ladder(2) == [(0, 1), (0, 2), (1, 3), (2, 3)] == square(2, 2)
    assert triangular(2, 2) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert square(3, 3, periodic=True)[:4] == [(0, 1), (0, 3), (1, 2), (1, 4)]
    assert IsingOperator(4, 1.0, bonds=ladder(2)).bonds == ladder(2)
