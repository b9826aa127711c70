"""Spin Hamiltonians, their ground states and dynamics, and observables of a state."""

from mlx_sparse_nn.physics.dynamics import evolve
from mlx_sparse_nn.physics.ground_states import LanczosResult, lanczos
from mlx_sparse_nn.physics.ising import exact_ground_energy, transverse_field_ising
from mlx_sparse_nn.physics.kron_order import from_kron_order, to_kron_order
from mlx_sparse_nn.physics.observables import (
    correlation,
    entanglement_entropy,
    expectation,
    fidelity,
    magnetization,
    variance,
)
from mlx_sparse_nn.physics.operator import IsingOperator

__all__ = [
    "IsingOperator",
    "LanczosResult",
    "correlation",
    "entanglement_entropy",
    "evolve",
    "exact_ground_energy",
    "expectation",
    "fidelity",
    "from_kron_order",
    "lanczos",
    "magnetization",
    "to_kron_order",
    "transverse_field_ising",
    "variance",
]
