"""Evolution of a state in real and in imaginary time, by Krylov exponentials."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sparse_nn.core.transforms import transforming
from mlx_sparse_nn.physics.checks import Values, check_hamiltonian, check_state, check_times
from mlx_sparse_nn.physics.flow import Flow
from mlx_sparse_nn.physics.flow_rules import FlowRules
from mlx_sparse_nn.physics.parameters import parameters, reading, refuse_derivatives


def evolve(
    H: Any, psi: mx.array, t: Values, *, imaginary: bool = False, tol: float | None = None
) -> mx.array:
    r"""Return :math:`e^{-iHt}\psi`, or in imaginary time the normalised :math:`e^{-Ht}\psi`.

    With hbar = 1, ``t`` is in inverse units of energy. H is put in a unit near its norm, and
    ``psi`` over its norm, so that any unit and any norm give the same digits. Each step takes the
    exponential of H in the Krylov space of the state, of at most 96 vectors. It is as long as the
    error bound allows,

    .. math:: b_{m+1} \int_0^\tau |(e^{-iTs})_{m1}|\, ds \le \mathrm{tol}\, \tau / t

    with the projected matrix T and the norm :math:`b_{m+1}` of what T leaves out. All times within
    a step are read from its space: a curve costs about as much as its last time. On a CPU, if H has
    at most 256 rows and the time takes several steps, or at most 1024 rows and a sixteenth as many
    steps, its whole spectrum takes their place, for any time. Evolution in real time keeps the
    norm.

    It is differentiable once, in reverse and forward: by ``psi``; by the values of a sparse or
    dense H, or the couplings and fields of an operator of this package; and by ``t``, if it is an
    MLX array. Gradients evolve the adjoint state back beside the state. In real time they keep no
    other states, in imaginary time about the root of their number of steps. All that is computed
    on the host by numbers: second derivatives, ``mx.vmap`` and ``mx.compile`` are refused.

    Y. Saad, SIAM J. Numer. Anal. 29 (1992) 209, section 4, for the method and the bound.
    V. Druskin and L. Knizhnerman, Numer. Linear Algebra Appl. 2 (1995) 205: rounding that leaves
    Lanczos' vectors not orthogonal does not hurt the exponential.

    Args:
        H: ``(dim, dim)``, Hermitian, as in :func:`lanczos`. Of any other object than those of this
            package, only products are known: gradients go to ``psi`` and ``t`` alone, and are
            refused where it depends on an array that is differentiated.
        psi: ``(dim,)`` amplitudes, real or complex64, of any norm but 0.
        t: A time, or ``(K,)`` times as a list, a NumPy or an MLX array: positive or negative, in
            any order.
        imaginary: Whether to evolve in imaginary time, towards the ground state if ``t > 0``.
        tol: Error allowed over the whole time: the norm of the difference from the exact state,
            over the norm of the state. By default 1e-6, or 1e-10 if H or the result is float64. In
            imaginary time an error counts when it is made: it grows as fast as what the state comes
            to, so that a state with a part of 1e-3 there loses up to three digits.
            Rounding adds about :math:`10^{-7} \sqrt{t \Delta E / 2}` in complex64, where
            :math:`\Delta E` is the spread of H's energies, and about :math:`4 \times 10^{-7} E t`
            to an eigenstate or a sum of a few, whose phases have one rounding each; a smaller
            ``tol`` is refused. On the CPU, H in float64, and any real H of at most 512 rows but a
            user's own object, is computed in float64, and rounded to complex64 in the end.

    Returns:
        ``(dim,)`` for one time, ``(K, dim)`` for K: in real time complex64, with the norm of
        ``psi``; in imaginary time of the dtype of ``H @ psi``, with norm 1.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``H`` is not square, not Hermitian or not finite, or too large for the memory of
            this machine; ``psi`` has the wrong shape, is zero or is not finite; ``t`` is empty, not
            finite, of more than one axis, or so long that rounding leaves nothing; ``tol`` is not
            in [1e-14, 1), or less than rounding;
            or a transform asks for what has no rule.

    Example:
        >>> psi = evolve(IsingOperator(8, 0.7), mx.ones(256) / 16, 2.0)
        >>> psi.dtype
        mlx.core.complex64
        >>> evolve(IsingOperator(8, 0.7), psi, [0.0, 0.5, 1.0]).shape
        (3, 256)
    """
    owner = "evolve"
    dim = check_hamiltonian(owner, H)
    psi = check_state(owner, "psi", psi, dim)
    times, is_list = check_times(owner, t)
    if not isinstance(imaginary, bool):
        raise TypeError(f"[{owner}] imaginary must be True or False, got {imaginary!r}")
    arrays, rebuild = parameters(H)
    flow = Flow(owner, H, psi, times, imaginary, tol)
    psi = psi.astype(flow.dtype)
    if transforming():
        if not arrays:
            with reading(owner, "H"):
                probe = H @ mx.ones(dim, flow.dtype)
                mx.eval(probe)
            zero = refuse_derivatives(owner, "H, which only gives products", probe)
            psi = psi + zero.astype(flow.dtype)  # all that is derived of it depends on H then
        operands = [psi, *arrays] + ([t] if isinstance(t, mx.array) else [])
        out = FlowRules(flow, rebuild, len(arrays))(operands)
    else:
        out = flow.states(flow.product(H), psi)
    return out if is_list else out.reshape(dim)
