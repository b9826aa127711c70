"""Spin Hamiltonians as sparse arrays."""

from mlx_sparse_nn.physics.ising import exact_ground_energy, expectation, transverse_field_ising

__all__ = ["exact_ground_energy", "expectation", "transverse_field_ising"]
