"""Train a block-sparse network to be the ground state of the transverse-field Ising chain.

The network reads the spins of a basis state s and answers log psi(s). All 2**N basis states are one
batch, H is a sparse array, and the energy <psi|H|psi> / <psi|psi> is minimised through the sparse
product: no sampling, and an exact energy to compare with.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from _common import Parser, add_common_arguments, check_plot, start
from tqdm import tqdm

from mlx_sparse_nn import BlockSparseLinear
from mlx_sparse_nn.physics import exact_ground_energy, expectation, transverse_field_ising


class NeuralState(nn.Module):
    """log psi of spins, ``(..., n_qubits)`` of -1 and 1 -> ``(...,)``, by three sparse layers."""

    def __init__(self, n_qubits: int, width: int, density: float):
        super().__init__()
        self.inputs = 16 * math.ceil(n_qubits / 16)  # whole blocks; the rest of a row is zero
        self.first = BlockSparseLinear(self.inputs, width, block_size=4, density=0.5)
        self.second = BlockSparseLinear(width, width, block_size=16, density=density)
        self.last = BlockSparseLinear(width, 16, block_size=16, density=0.5)

    def __call__(self, spins: mx.array) -> mx.array:
        x = mx.pad(spins, [(0, 0)] * (spins.ndim - 1) + [(0, self.inputs - spins.shape[-1])])
        x = nn.silu(self.first(x))
        x = nn.silu(self.second(x))
        return self.last(x).mean(axis=-1)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--qubits", type=int, default=12, metavar="N", help="sites, 3 to 16 (default: %(default)s)"
    )
    parser.add_argument(
        "--field",
        type=float,
        default=1.0,
        metavar="H",
        help="transverse field in units of the coupling, above 0 (default: %(default)s, critical)",
    )
    parser.add_argument("--periodic", action="store_true", help="close the chain to a ring")
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of Adam (default: %(default)s)"
    )
    parser.add_argument(
        "--lr", type=float, default=1e-2, help="first learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=64, help="hidden features, multiple of 16 (default: 64)"
    )
    parser.add_argument(
        "--density", type=float, default=0.25, help="of the hidden layer (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the energy error against the step"
    )
    add_common_arguments(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    start(parser, args)
    n = args.qubits
    check(parser, args)
    try:
        bonds = transverse_field_ising(n, 0.0, periodic=args.periodic)
        flips = transverse_field_ising(n, 1.0, coupling=0.0, periodic=args.periodic)
        model = NeuralState(n, args.width, args.density)
    except ValueError as error:
        parser.error(str(error))
    exact = exact_ground_energy(n, args.field, periodic=args.periodic)

    bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    spins = mx.array((2 * bits - 1).astype(np.float32))  # (2**n, n)

    def energies_of(model: NeuralState) -> tuple[mx.array, mx.array]:
        log_psi = model(spins)
        psi = mx.exp(log_psi - mx.stop_gradient(log_psi.max()))
        return expectation(bonds, psi), expectation(flips, psi)

    def loss(model: NeuralState, field: float) -> tuple[mx.array, mx.array]:
        bond, flip = energies_of(model)
        return bond + field * flip, bond + args.field * flip

    loss_and_grad = nn.value_and_grad(model, loss)
    optimizer = optim.Adam(optim.cosine_decay(args.lr, args.steps, args.lr / 100))

    began = time.perf_counter()
    energies = []
    with tqdm(range(args.steps), desc=f"{n} sites", unit="step") as bar:
        for step in bar:
            (_, energy), grads = loss_and_grad(model, annealed(args.field, step / args.steps))
            optimizer.update(model, grads)
            mx.eval(energy, model.state, optimizer.state)
            energies.append(float(energy))
            error = relative(energies[-1], exact)
            bar.set_postfix_str(f"energy {energies[-1]:.5f}, error {error:.1e}")
    energies.append(float(loss(model, args.field)[1]))
    seconds = time.perf_counter() - began

    chain = "ring" if args.periodic else "open chain"
    stored = sum(layer.weight.size for layer in (model.first, model.second, model.last))
    print(f"chain     {chain} of {n} sites, field {args.field:g}, {2**n} basis states")
    print(f"network   {stored} stored weights, hidden layer {model.second.density:.1%} dense")
    print(f"energy    {energies[-1]:.6f} after {args.steps} steps in {seconds:.1f} s")
    print(f"exact     {exact:.6f}")
    print(f"error     {relative(energies[-1], exact):.2e} relative")
    if args.plot:
        errors = [relative(energy, exact) for energy in energies]
        draw(args.plot, errors, f"{chain} of {n} sites, field {args.field:g}")
        print(f"plot      {args.plot}")


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the arguments make sense."""
    if not 3 <= args.qubits <= 16:
        parser.error(f"--qubits must be in [3, 16], got {args.qubits}")
    if not (math.isfinite(args.field) and args.field > 0):
        parser.error(f"--field must be above 0, so that psi > 0, got {args.field}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not (math.isfinite(args.lr) and args.lr > 0):
        parser.error(f"--lr must be above 0, got {args.lr}")
    if args.width < 16 or args.width % 16:
        parser.error(f"--width must be a multiple of 16, got {args.width}")
    check_plot(parser, args.plot)


def annealed(field: float, progress: float) -> float:
    """Return the field of a step: from above the transition, down to ``field`` in half the steps.

    Deep in the ordered phase a random network falls into a state with a domain wall, and stays.
    """
    return field + max(0.0, 2.0 - field) * max(0.0, 1 - 2 * progress)


def relative(energy: float, exact: float) -> float:
    return abs((energy - exact) / exact)


def draw(path: Path, errors: list[float], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.semilogy(errors, color="tab:blue", label="network")
    axis.axhline(1e-3, color="tab:gray", linestyle="--", linewidth=1, label="1e-3")
    axis.set(xlabel="step", ylabel="relative error of the energy", title=title)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
