"""Build the transverse-field Ising Hamiltonian as a sparse array and apply it to two states.

H = -sum Z_i Z_{i+1} - field * sum X_i, on an open chain or a ring. The energies of the uniform and
of a random state stand beside the exact ground-state energy, which no state can be below.
"""

from __future__ import annotations

import argparse
import time

import mlx.core as mx
import numpy as np
from _common import Parser, add_common_arguments, start

from mlx_sparse_nn.physics import exact_ground_energy, expectation, transverse_field_ising


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--qubits",
        type=int,
        default=8,
        metavar="N",
        help="number of sites; H is 2**N x 2**N (default: %(default)s)",
    )
    parser.add_argument(
        "--field",
        type=float,
        default=0.7,
        metavar="H",
        help="transverse field in units of the coupling (default: %(default)s)",
    )
    parser.add_argument("--periodic", action="store_true", help="close the chain to a ring")
    add_common_arguments(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    start(parser, args)
    n = args.qubits

    began = time.perf_counter()
    try:
        H = transverse_field_ising(n, args.field, periodic=args.periodic)
    except (ValueError, MemoryError) as error:
        parser.error(str(error))
    seconds = time.perf_counter() - began

    shape = "ring" if args.periodic else "open chain"
    print(f"chain            {shape} of {n} sites, field {args.field:g}, on {device_name()}")
    print(f"size             {H.shape[0]} x {H.shape[1]}, built in {seconds:.3g} s")
    print(f"nnz              {H.nnz} stored values, density {H.density:.3%}")

    states = {
        "uniform state": mx.ones(H.shape[1]),
        "random state": mx.random.normal(H.shape[1:]),
    }
    for name, psi in states.items():
        energy = float(expectation(H, psi))
        length = np.linalg.norm(H @ psi) / np.linalg.norm(psi)
        print(f"{name:<16} <H> = {per_site(energy, n)}, ||H psi|| / ||psi|| = {length:.5f}")

    ground = exact_ground_energy(n, args.field, periodic=args.periodic)
    print(f"ground state     E_0 = {per_site(ground, n)}, exact")


def per_site(energy: float, n: int) -> str:
    return f"{energy:.5f} ({energy / n:.5f} per site)"


def device_name() -> str:
    return "GPU" if mx.default_device().type == mx.gpu else "CPU"


if __name__ == "__main__":
    main()
