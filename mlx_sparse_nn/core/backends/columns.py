"""Vectors and a basis of them by kernels, of both GPUs: the recurrence of Lanczos, and columns.

A vector of ``dim`` float32 is cut into P panels of W elements, ``(P, 1, W)``, and filled up with
zeros; a basis of S columns is ``(P, S, W)``. What is summed over places comes as parts, up to
``tuned.GROUP_THREADS`` of them, which the next kernel adds up in order.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends.launch import Kernel, KernelLaunch, power_of_two, prepare, small

WIDTH = 1024  # most elements of a panel: four of every thread of a group
MOST_COLUMNS = 2048  # of two factors each, which a group holds
_ROWS = 8  # columns that a group takes at once
_FEWEST = 64  # columns for which basis_subtract has room

Four = tuple[mx.array, mx.array, mx.array, mx.array]


def recur_dot(
    backend: str, y: mx.array, w: mx.array, before: mx.array, squares: mx.array
) -> mx.array:
    """Return parts of the coefficient of ``x = w / norm`` in ``H x - norm * before``.

    Args:
        backend: ``"cuda"`` or ``"metal"``.
        y: ``H w``, ``(P, 1, W)``, like ``w`` and ``before``.
        w: A column, times its norm.
        before: What is known of ``H x``, over the norm.
        squares: Parts of the square of the norm.
    """
    launch, n_groups = _prepared(backend, "recur_dot", *_sizes(w))
    return launch([y, w, before, squares], (n_groups,))


def recur_rest(
    backend: str,
    y: mx.array,
    w: mx.array,
    before: mx.array,
    squares: mx.array,
    dots: mx.array,
) -> Four:
    """Return the rest of ``H x`` without ``x`` and what is known, and other things.

    Args:
        backend: ``"cuda"`` or ``"metal"``.
        y: ``H w``, like ``w``, ``before`` and ``squares`` as in :func:`recur_dot`.
        w: See there.
        before: See there.
        squares: See there.
        dots: What :func:`recur_dot` returned.

    Returns:
        The rest and ``x``, ``(P, 1, W)``; parts of the square of the rest's norm; and the
        coefficient of x and the norm of w, ``(2,)``. MLX (0.32.4) has 8 bytes where the host reads
        them at once; more would take 120 microseconds.
    """
    launch, n_groups = _prepared(backend, "recur_rest", *_sizes(w))
    shapes = [w.shape, w.shape, (n_groups,), (2,)]
    rest, x, parts, numbers = launch.outputs([y, w, before, squares, dots], shapes)
    return rest, x, parts, numbers


def without(backend: str, basis: mx.array, count: int, x: mx.array, z: mx.array) -> Four:
    """Return two vectors less their parts along the first columns, and z less that along x.

    What is left of x and of z is nearly orthogonal if what was taken away is small: the part of z
    along x is judged before.

    Args:
        backend: ``"cuda"`` or ``"metal"``.
        basis: ``(P, S, W)``, of at most ``MOST_COLUMNS``.
        count: Number of columns.
        x: ``(P, 1, W)``, normalised.
        z: ``(P, 1, W)``.

    Returns:
        Both, and parts of the squares of their norms.
    """
    n_panels, width = _sizes(x)
    rows = max(1, -(-count // _ROWS))
    launch, n_groups = _prepared(backend, "basis_overlaps", n_panels, width, ("ROWS", _ROWS), rows)
    overlaps = launch([basis, x, z, small(count)], (2 * count + 1, n_groups))
    room = ("MOST", max(_FEWEST, power_of_two(count)))
    launch, n_groups = _prepared(backend, "basis_subtract", n_panels, width, room)
    shapes = [x.shape, x.shape, (n_groups,), (n_groups,)]
    x, z, of_x, of_z = launch.outputs([basis, x, z, overlaps], shapes)
    return x, z, of_x, of_z


def combine(backend: str, basis: mx.array, first: int, factors: mx.array) -> mx.array:
    """Return R combinations of M columns from ``first`` on, ``(P, R, W)``; factors ``(R, M)``."""
    n_panels, _, width = basis.shape
    rows = factors.shape[0]
    launch, _ = _prepared(
        backend, "basis_combine", n_panels, width, ("ROWS", _ROWS), -(-rows // _ROWS), n_panels
    )
    return launch([basis, factors, small(first)], (n_panels, rows, width))


def _sizes(x: mx.array) -> tuple[int, int]:
    return x.shape[0], x.shape[2]


@lru_cache(1024)
def _prepared(
    backend: str,
    name: str,
    n_panels: int,
    width: int,
    extra: tuple[str, int] | None = None,
    rows: int = 1,
    most_groups: int = tuned.GROUP_THREADS,
) -> tuple[KernelLaunch, int]:
    """Return a launch, and how many groups share the panels."""
    threads = tuned.GROUP_THREADS
    n_groups = min(n_panels, most_groups)
    template = {"WIDTH": width, "THREADS": threads, **dict([extra] if extra else [])}
    kernel = Kernel(name, template, (n_groups * threads, rows, 1), threads)
    return prepare(backend, name, kernel, mx.float32), n_groups
