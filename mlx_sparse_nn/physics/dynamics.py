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

    With hbar = 1, ``t`` is in inverse units of energy. Each step projects H on the Krylov space of
    the state, of at most 30 vectors, and takes the exponential there. It is as long as the error
    bound allows,

    .. math:: \beta_{m+1} \int_0^\tau |(e^{-iTs})_{m1}|\, ds \le \mathrm{tol}\, \tau / t

    with the projected matrix T and the norm :math:`\beta_{m+1}` of what T leaves out. Evolution in
    real time keeps the norm; each step rescales the state, to remove rounding. Every step evaluates
    the small matrix and takes its exponential on the host, so no gradient passes.

    Y. Saad, SIAM J. Numer. Anal. 29 (1992) 209, section 4, for the method and the bound.

    Args:
        H: ``(dim, dim)``, Hermitian, as in :func:`lanczos`.
        psi: ``(dim,)`` amplitudes, real or complex64, of any norm but 0.
        t: Time, positive or negative.
        imaginary: Whether to evolve in imaginary time, towards the ground state if ``t > 0``.
        tol: Error allowed over the whole time: the norm of the difference from the exact state,
            over the norm of the state. 1e-6 by default, or 1e-10 if the result is float64. Rounding
            adds about 1e-7 a product in complex64 and float32.

    Returns:
        ``(dim,)``: in real time complex64, with the norm of ``psi``; in imaginary time of the dtype
        of ``H @ psi``, with norm 1.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``H`` is not square, not Hermitian or not finite, or too large for the memory of
            this machine; ``psi`` has the wrong shape, is zero or is not finite; or ``t`` is not
            finite or ``tol`` not in [1e-14, 1).

    Example:
        >>> psi = evolve(IsingOperator(8, 0.7), mx.ones(256) / 16, 2.0)
        >>> psi.dtype
        mlx.core.complex64
    """
    owner = "evolve"
    dim = check_hamiltonian(owner, H)
    psi = check_state(owner, "psi", psi, dim)
    times, is_list = check_times(owner, t)
    arrays, rebuild = parameters(H)
    flow = Flow(owner, H, psi, times, imaginary, tol)
    psi = psi.astype(flow.dtype)
    if transforming():
        operands = [psi, *arrays] + ([t] if isinstance(t, mx.array) else [])
        out = FlowRules(flow, rebuild, len(arrays))(operands)
        if not arrays:
            with reading(owner, "H"):
                probe = H @ mx.ones(dim, flow.dtype)
            out = out + refuse_derivatives(owner, "H, which only gives products", probe)
    else:
        out = flow.states(flow.product(H), psi)
    return out if is_list else out.reshape(dim)
