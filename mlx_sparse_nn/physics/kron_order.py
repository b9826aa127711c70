"""States in the order of QuTiP, QuSpin, and Kronecker products by hand.

Here, site 0 is the lowest bit of the index, and a set bit is a spin up. There, site 0 is the first
factor of a Kronecker product, so the highest bit, and (1, 0) is up, so that a clear bit is.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_sparse_nn.physics.checks import check_columns_of_sites

_BITS = 4  # moved in one pass; six axes fit the kernels of every GPU


def to_kron_order(psi: mx.array) -> mx.array:
    """Return states in the order of ``np.kron(site_0, np.kron(site_1, ...))``, with (1, 0) up.

    This is the order of QuTiP's ``tensor`` and of QuSpin's ``spin_basis_1d``. Amplitudes only
    change places, so norms, energies and observables stay, and derivatives of every order pass.

    Args:
        psi: ``(2**n,)`` amplitudes, or ``(2**n, k)``, a state in each column.

    Returns:
        An array of the shape and dtype of ``psi``.

    Raises:
        TypeError: ``psi`` is not an array.
        ValueError: ``psi`` has another shape.

    Example:
        >>> up_down = mx.array([0.0, 1, 0, 0])  # index 0b01: site 0 is up, site 1 down
        >>> to_kron_order(up_down)  # np.kron([1, 0], [0, 1])
        array([0, 1, 0, 0], dtype=float32)
    """
    return _reordered(*check_columns_of_sites("to_kron_order", psi))


def from_kron_order(psi: mx.array) -> mx.array:
    """Return states that are in the order of :func:`to_kron_order` in that of this package.

    Args:
        psi: ``(2**n,)`` amplitudes, or ``(2**n, k)``, a state in each column. From QuTiP:
            ``mx.array(state.full())``.

    Returns:
        An array of the shape and dtype of ``psi``.

    Raises:
        TypeError, ValueError: As in :func:`to_kron_order`.

    Example:
        >>> up, down = [1.0, 0.0], [0.0, 1.0]
        >>> psi = from_kron_order(mx.array(np.kron(up, down)))  # site 0 is up, site 1 down
        >>> magnetization(psi)
        array([1, -1], dtype=float32)
    """
    return _reordered(*check_columns_of_sites("from_kron_order", psi))


def _reordered(psi: mx.array, n: int) -> mx.array:
    """Return amplitudes with the bits of their index reversed and flipped, which undoes itself."""
    moved = psi.reshape(1 << n, -1)
    while n:
        bits = min(n, _BITS)
        n -= bits
        # (the highest bits, bits that wait, those reversed already)
        split = moved.reshape(*[2] * bits, 1 << n, -1)
        moved = split.transpose(bits, *reversed(range(bits)), bits + 1)
    return moved.reshape(psi.shape)[::-1]
