"""Dense spin operators and random states: the slow, obvious way."""

import mlx.core as mx
import numpy as np

PAULI_X = np.array([[0.0, 1.0], [1.0, 0.0]])
PAULI_Z = np.array([[-1.0, 0.0], [0.0, 1.0]])  # basis state 1, a set bit, has z = +1
# Textbooks write the matrices for (up, down), and here the clear bit, down, comes first.
_UP_DOWN = {
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.array([[1, 0], [0, -1]]),
}
PAULI = {letter: matrix[::-1, ::-1] for letter, matrix in _UP_DOWN.items()}


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


def dense_strings(strings, n_qubits):
    """Return the sum of ``(coefficient, letters, sites)``, complex, from Pauli's own matrices."""
    H = np.zeros((2**n_qubits, 2**n_qubits), complex)
    for coefficient, letters, sites in strings:
        term = np.eye(2**n_qubits)
        for letter, site in zip(letters, sites, strict=True):
            term = term @ on_site(PAULI[letter], site, n_qubits)
        H += coefficient * term
    return H
