"""Spin Hamiltonians, their ground states and dynamics, and observables of a state."""

from mlx_sparse_nn.physics.dynamics import evolve
from mlx_sparse_nn.physics.ground_states import LanczosResult, lanczos
from mlx_sparse_nn.physics.ising import exact_ground_energy, transverse_field_ising
from mlx_sparse_nn.physics.kron_order import from_kron_order, to_kron_order
from mlx_sparse_nn.physics.lattices import chain, ladder, ring, square, triangular
from mlx_sparse_nn.physics.models import pauli_sum
from mlx_sparse_nn.physics.observables import (
    correlation,
    entanglement_entropy,
    expectation,
    fidelity,
    magnetization,
    variance,
)
from mlx_sparse_nn.physics.operator import IsingOperator
from mlx_sparse_nn.physics.pauli import PauliSum

__all__ = [
    "IsingOperator",
    "LanczosResult",
    "PauliSum",
    "chain",
    "correlation",
    "entanglement_entropy",
    "evolve",
    "exact_ground_energy",
    "expectation",
    "fidelity",
    "from_kron_order",
    "ladder",
    "lanczos",
    "magnetization",
    "pauli_sum",
    "ring",
    "square",
    "to_kron_order",
    "transverse_field_ising",
    "triangular",
    "variance",
]
