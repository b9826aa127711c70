"""Dense spin operators and random states: the slow, obvious way."""

import mlx.core as mx
import numpy as np

PAULI_X = np.array([[0.0, 1.0], [1.0, 0.0]])
PAULI_Z = np.array([[-1.0, 0.0], [0.0, 1.0]])  # basis state 1, a set bit, has z = +1


def on_site(operator, site, n_qubits):
    """Return the operator on one site; site 0 is bit 0, the last factor of the product."""
    left, right = np.eye(2 ** (n_qubits - 1 - site)), np.eye(2**site)
    return np.kron(np.kron(left, operator), right)


def dense_ising(n_qubits, field, coupling=1.0, longitudinal=0.0, periodic=False):
    n_bonds = n_qubits if periodic else n_qubits - 1
    h, j, g = (
        np.broadcast_to(np.asarray(values, dtype=float), (size,))
        for values, size in ((field, n_qubits), (coupling, n_bonds), (longitudinal, n_qubits))
    )
    x = [on_site(PAULI_X, site, n_qubits) for site in range(n_qubits)]
    z = [on_site(PAULI_Z, site, n_qubits) for site in range(n_qubits)]
    H = np.zeros((2**n_qubits, 2**n_qubits))
    for site in range(n_qubits):
        H -= h[site] * x[site] + g[site] * z[site]
    for bond in range(n_bonds):
        H -= j[bond] * z[bond] @ z[(bond + 1) % n_qubits]
    return H


def random_state(n, dtype=mx.float32, seed=0):
    """Return a state that is not normalised."""
    rng = np.random.default_rng(seed)
    psi = rng.normal(size=2**n) + 1j * rng.normal(size=2**n)
    return (
        mx.array(psi.astype(np.complex64))
        if dtype == mx.complex64
        else mx.array(psi.real, dtype=dtype)
    )
