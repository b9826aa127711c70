"""Bonds of common lattices, as lists of pairs of sites."""

from __future__ import annotations

from mlx_sparse_nn.core.checks import check_size
from mlx_sparse_nn.physics.checks import check_flag

Bonds = list[tuple[int, int]]


def chain(n: int) -> Bonds:
    """Return the ``n - 1`` bonds of an open chain of n sites: bond i joins i and i + 1.

    Raises:
        TypeError: ``n`` is not an integer.
        ValueError: ``n`` is below 1.

    Example:
        >>> chain(4)
        [(0, 1), (1, 2), (2, 3)]
    """
    n = check_size("chain", "n", n, minimum=1)
    return [(i, i + 1) for i in range(n - 1)]


def ring(n: int) -> Bonds:
    """Return the ``n`` bonds of a ring: those of :func:`chain`, and (n - 1, 0).

    Raises:
        TypeError: ``n`` is not an integer.
        ValueError: ``n`` is below 3: a ring of 2 has one bond, which is a chain's.

    Example:
        >>> ring(3)
        [(0, 1), (1, 2), (2, 0)]
    """
    n = _check_closed("ring", "n", n)
    return [*chain(n), (n - 1, 0)]


def ladder(n_rungs: int, *, periodic: bool = False) -> Bonds:
    """Return the bonds of two chains side by side: rung r joins sites 2 r and 2 r + 1.

    This is ``square(2, n_rungs)``. Its bonds go by site: the rung first, then the leg.

    Args:
        n_rungs: Number of rungs, half the number of sites.
        periodic: Whether each leg is a ring, which takes at least 3 rungs.

    Raises:
        TypeError: ``n_rungs`` is not an integer, or ``periodic`` neither true nor false.
        ValueError: ``n_rungs`` is below 1, or below 3 for a periodic ladder.

    Example:
        >>> ladder(2)
        [(0, 1), (0, 2), (1, 3), (2, 3)]
    """
    check_flag("ladder", "periodic", periodic)
    check = _check_closed if periodic else _check_open
    n_rungs = check("ladder", "n_rungs", n_rungs)
    return _grid(2, n_rungs, [(1, 0), (0, 1)], closed=(False, periodic))


def square(lx: int, ly: int, *, periodic: bool = False) -> Bonds:
    """Return the bonds of a square lattice of ``lx * ly`` sites.

    Site ``x + lx * y`` lies at (x, y). Its bonds go by site: first to x + 1, then to y + 1.

    Args:
        lx: Sites along x.
        ly: Sites along y.
        periodic: Whether it is a torus, which takes at least 3 sites each way.

    Raises:
        TypeError: A length is not an integer, or ``periodic`` neither true nor false.
        ValueError: A length is below 1, or below 3 for a torus.

    Example:
        >>> square(2, 2)
        [(0, 1), (0, 2), (1, 3), (2, 3)]
    """
    return _lattice("square", lx, ly, periodic, [(1, 0), (0, 1)])


def triangular(lx: int, ly: int, *, periodic: bool = False) -> Bonds:
    """Return the bonds of a triangular lattice: those of :func:`square`, and a diagonal each.

    The diagonals join (x, y) and (x + 1, y + 1). Each site's comes after its two others.

    Args:
        lx: Sites along x.
        ly: Sites along y.
        periodic: Whether it is a torus, which takes at least 3 sites each way.

    Raises:
        TypeError: A length is not an integer, or ``periodic`` neither true nor false.
        ValueError: A length is below 1, or below 3 for a torus.

    Example:
        >>> triangular(2, 2)
        [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    """
    return _lattice("triangular", lx, ly, periodic, [(1, 0), (0, 1), (1, 1)])


def _lattice(owner: str, lx: int, ly: int, periodic: bool, steps: list[tuple[int, int]]) -> Bonds:
    check_flag(owner, "periodic", periodic)
    check = _check_closed if periodic else _check_open
    lx, ly = (check(owner, name, length) for name, length in (("lx", lx), ("ly", ly)))
    return _grid(lx, ly, steps, closed=(periodic, periodic))


def _grid(lx: int, ly: int, steps: list[tuple[int, int]], closed: tuple[bool, bool]) -> Bonds:
    """Return a bond from every site by every step that leads to another one."""
    bonds = []
    for site in range(lx * ly):
        y, x = divmod(site, lx)
        for dx, dy in steps:
            inside = (closed[0] or x + dx < lx) and (closed[1] or y + dy < ly)
            if inside:
                bonds.append((site, (x + dx) % lx + lx * ((y + dy) % ly)))
    return bonds


def _check_open(owner: str, name: str, length: int) -> int:
    return check_size(owner, name, length, minimum=1)


def _check_closed(owner: str, name: str, length: int) -> int:
    """Return a length that may be closed to a ring, or raise: shorter ones would repeat a bond."""
    length = check_size(owner, name, length)
    if length < 3:
        raise ValueError(f"[{owner}] {name} must be at least 3 to close a ring, got {length}")
    return length
