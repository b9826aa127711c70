"""Build the transverse-field Ising Hamiltonian, apply it, and find its ground state and transition.

H = -sum Z_i Z_{i+1} - field * sum X_i, on an open chain or a ring. The energies of the uniform and
of a random state stand beside the exact ground-state energy, which no state can be below. With
--ground-state the lowest two states are found by Lanczos' method and measured; with --sweep this is
done over a range of fields, across the transition at field 1. Exact values stand beside all of it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from _common import Parser, add_common_arguments, check_plot, start
from tqdm import tqdm

from mlx_sparse_nn.physics import (
    IsingOperator,
    LanczosResult,
    correlation,
    entanglement_entropy,
    exact_ground_energy,
    expectation,
    lanczos,
    magnetization,
    transverse_field_ising,
)


class Ground(NamedTuple):
    """What is measured in a ground state."""

    energy: float
    gap: float
    x: float  # mean <X_i>
    zz: float  # <Z_i Z_j> across half the chain


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
    parser.add_argument(
        "--ground-state", action="store_true", help="find and measure the ground state"
    )
    parser.add_argument(
        "--sweep",
        type=fields_of,
        metavar="MIN:MAX:POINTS",
        help="find the ground state at so many fields instead, such as 0.1:2:20",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the energy, gap and magnetisation of --sweep",
    )
    add_common_arguments(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check(parser, args)
    start(parser, args)
    try:
        sweep(args) if args.sweep is not None else describe(args)
    except (ValueError, MemoryError) as error:
        parser.error(str(error))


def describe(args: argparse.Namespace) -> None:
    """Build H at one field and print what it is and what energies states have."""
    n = args.qubits
    began = time.perf_counter()
    H = transverse_field_ising(n, args.field, periodic=args.periodic)
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
    if not args.ground_state:
        return

    began = time.perf_counter()
    result = lanczos(H, 2)
    seconds = time.perf_counter() - began
    psi = result.states[:, 0]
    print(f"lanczos          E_0 = {per_site(float(result.energies[0]), n)}, {seconds:.3g} s")
    state = "converged" if result.converged else "not converged"
    worst = float(result.residuals.max())
    print(f"                 {result.iterations} products, residual {worst:.1e}, {state}")
    measured, exact = measure(n, result), exact_ground(n, args.field, args.periodic)
    print(f"gap              {measured.gap:.5f}, exact {exact.gap:.5f}")
    print(f"magnetisation    <X> = {measured.x:.5f} per site, exact {exact.x:.5f}")
    i, j = ends(n)
    print(f"correlation      <Z_{i} Z_{j}> = {measured.zz:.5f}, exact {exact.zz:.5f}")
    print(f"entanglement     {float(entanglement_entropy(psi, n // 2)):.5f} nats across the middle")


def sweep(args: argparse.Namespace) -> None:
    """Find and measure the ground state at each field, print a table and draw it."""
    n = args.qubits
    chain = f"{'ring' if args.periodic else 'open chain'} of {n} sites"
    found, exact = [], []
    for field in tqdm(args.sweep, desc=chain, unit="field"):
        result = lanczos(IsingOperator(n, float(field), periodic=args.periodic), 2)
        found.append(measure(n, result))
        exact.append(exact_ground(n, float(field), args.periodic))
    measured, exact = np.array(found).T, np.array(exact).T  # (4, fields)
    print(f"{chain}, on {device_name()}: by Lanczos | exact")
    print("field   energy per site       gap                 <X> per site        <Z Z> at n / 2")
    for row, field in enumerate(args.sweep):
        cells = [
            f"{ours[row] / scale:9.5f} | {theirs[row] / scale:8.5f}"
            for ours, theirs, scale in zip(measured, exact, (n, 1, 1, 1), strict=True)
        ]
        print(f"{field:<6.4g} " + " ".join(cells))
    for name, ours, theirs in zip(Ground._fields, measured, exact, strict=True):
        print(f"largest error    {name:<7} {np.abs(ours - theirs).max():.1e}")
    if args.plot:
        fine = np.linspace(args.sweep[0], args.sweep[-1], 200)
        curve = np.array([exact_ground(n, field, args.periodic) for field in fine]).T
        draw(args.plot, chain, n, args.sweep, measured, fine, curve)
        print(f"plot             {args.plot}")


def measure(n: int, result: LanczosResult) -> Ground:
    """Measure the ground state that :func:`lanczos` found, beside one more state for the gap."""
    psi, energies = result.states[:, 0], np.array(result.energies).astype(float)
    x, zz = float(magnetization(psi, "x").mean()), float(correlation(psi, *ends(n)))
    return Ground(float(energies[0]), float(energies[1] - energies[0]), x, zz)


def ends(n: int) -> tuple[int, int]:
    """Return two sites half a chain apart, as far from its ends as they can be."""
    return (n - n // 2) // 2, (n - n // 2) // 2 + n // 2


def exact_ground(n: int, h: float, periodic: bool) -> Ground:
    """Return the exact values at J = 1 and h >= 0, from free fermions.

    H is quadratic in fermions with the matrix M: h on the diagonal, 1 above it, and on a ring -1 in
    the corner, for the even number of fermions in the ground state. M = U S V^T gives the
    excitations 2 S, E_0 = -tr S, and with G = U V^T the means <X_i> = G_ii and <Z_i Z_j> =
    det G[i:j, i+1:j+1] (Lieb, Schultz and Mattis, Annals of Physics 16 (1961) 407). The lowest
    state of odd number on a ring has the momenta 2 pi m / n, of which 0 counts h - 1.
    """
    M = np.diag(np.full(n, h)) + np.diag(np.ones(n - 1), 1)
    if periodic:
        M[-1, 0] = -1.0
    U, S, Vt = np.linalg.svd(M)
    G = U @ Vt
    gap = 2 * S[-1]
    if periodic:
        k = 2 * np.pi * np.arange(1, n) / n
        gap = S.sum() - np.hypot(h - np.cos(k), np.sin(k)).sum() + h - 1
    i, j = ends(n)
    zz = float(np.linalg.det(G[i:j, i + 1 : j + 1]))
    return Ground(-float(S.sum()), float(gap), float(np.trace(G)) / n, zz)


def draw(
    path: Path,
    chain: str,
    n: int,
    fields: np.ndarray,
    measured: np.ndarray,
    fine: np.ndarray,
    exact: np.ndarray,
) -> None:
    """Draw measured points on exact curves, rows as the fields of :class:`Ground`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (energy, gap, order) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
    energy.plot(fine, exact[0] / n, color="tab:gray", label="exact")
    energy.plot(fields, measured[0] / n, color="tab:blue", label="Lanczos", **dots)
    energy.set_title("ground-state energy per site")
    gap.plot(fine, exact[1], color="tab:gray", label="exact")
    gap.plot(fields, measured[1], color="tab:blue", label="Lanczos", **dots)
    gap.set_title("gap to the next state")
    for name, color, ours, theirs in (
        (r"$\langle X\rangle$", "tab:orange", measured[2], exact[2]),
        (r"$\langle Z_i Z_{i+n/2}\rangle^{1/2}$", "tab:green", root(measured[3]), root(exact[3])),
    ):
        order.plot(fine, theirs, color="tab:gray")
        order.plot(fields, ours, color=color, label=name, **dots)
    infinite = np.maximum(0, 1 - fine**2) ** 0.125
    order.plot(fine, infinite, color="tab:green", linestyle=":", label="infinite chain")
    order.set_title("magnetisation")
    for axis in (energy, gap, order):
        axis.set_xlabel("transverse field h / J")
        axis.axvline(1, color="lightgray", linewidth=1, zorder=0)
    energy.legend()
    gap.legend(loc="upper left")
    order.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside: the curves fill the axes
    figure.suptitle(chain)
    figure.savefig(path, dpi=110)


def root(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(0, values))


def fields_of(text: str) -> np.ndarray:
    """Return the fields of ``MIN:MAX:POINTS``."""
    parts = text.split(":")
    try:
        low, high, points = float(parts[0]), float(parts[1]), int(parts[2])
    except (ValueError, IndexError):
        points = 0
        low = high = 0.0
    if len(parts) != 3 or not 0 <= low < high < math.inf or not 2 <= points <= 10_000:
        raise argparse.ArgumentTypeError(
            f"must be MIN:MAX:POINTS with 0 <= MIN < MAX and 2 to 10000 points, got {text!r}"
        )
    return np.linspace(low, high, points)


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the arguments go together."""
    if args.sweep is not None and args.qubits == 1:
        parser.error("--sweep needs at least 2 qubits, got 1")
    if args.ground_state and (args.qubits == 1 or not args.field >= 0):
        parser.error("--ground-state needs at least 2 qubits and a field of at least 0")
    if args.plot is not None and args.sweep is None:
        parser.error("--plot needs --sweep")
    check_plot(parser, args.plot)


def per_site(energy: float, n: int) -> str:
    return f"{energy:.5f} ({energy / n:.5f} per site)"


def device_name() -> str:
    return "GPU" if mx.default_device().type == mx.gpu else "CPU"


if __name__ == "__main__":
    main()
