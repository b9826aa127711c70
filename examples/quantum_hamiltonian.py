"""The quantum Ising chain as a sparse matrix: its ground state, its transition, and a quench.

H = -sum Z_i Z_{i+1} - field * sum X_i, on an open chain or a ring. It teaches how a Hamiltonian is
built and applied, how Lanczos' method finds its lowest states, how a state evolves, and how all are
measured. Exact values, of free fermions, stand beside everything.

Alone, it prints the energies of two simple states and the exact one below them, in a second. With
--ground-state it finds the two lowest states (a second at 12 sites, a minute or two at 20); with
--sweep it does so over a range of fields, across the transition at field 1; with --quench the field
changes at once, and the ground state of the first evolves under the second. Each of these takes
seconds at 12 sites.

  python examples/quantum_hamiltonian.py --qubits 12 --ground-state
  python examples/quantum_hamiltonian.py --qubits 12 --sweep 0.1:2:20 --plot phase.png
  python examples/quantum_hamiltonian.py --qubits 12 --quench 0.3:1.5 --plot quench.png
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
    evolve,
    exact_ground_energy,
    expectation,
    fidelity,
    lanczos,
    magnetization,
    transverse_field_ising,
)

GRAY, BLUE, RED, GREEN = "#555555", "#0072B2", "#D55E00", "#009E73"  # told apart by everybody
DOTS: dict[str, Any] = {"linestyle": "none", "markersize": 4}


class Ground(NamedTuple):
    """What is measured in a ground state."""

    energy: float
    gap: float
    x: float  # mean <X_i>
    zz: float  # <Z_i Z_j> across half the chain


class Quenched(NamedTuple):
    """What is measured at each time after a quench, ``(times,)``."""

    x: np.ndarray  # mean <X_i>
    zz: np.ndarray  # <Z_i Z_j> across half the chain
    entropy: np.ndarray  # across the middle, in nats
    back: np.ndarray  # the probability to be in the first state


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
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
        metavar="H",
        help="transverse field in units of the coupling (default: 0.7)",
    )
    parser.add_argument("--periodic", action="store_true", help="close the chain to a ring")
    parser.add_argument(
        "--ground-state", action="store_true", help="find and measure the ground state"
    )
    parser.add_argument(
        "--sweep",
        type=points_of,
        metavar="MIN:MAX:POINTS",
        help="find the ground state at so many fields instead, such as 0.1:2:20",
    )
    parser.add_argument(
        "--quench",
        type=quench_of,
        metavar="FROM:TO",
        help="evolve the ground state of one field under another instead, such as 0.3:1.5",
    )
    parser.add_argument(
        "--times",
        type=points_of,
        metavar="MIN:MAX:POINTS",
        help="times of --quench, in units of 1 / coupling (default: 0:6:61)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw what --sweep or --quench measures",
    )
    add_common_arguments(parser)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check(parser, args)
    start(parser, args)
    try:
        if args.sweep is not None:
            sweep(args)
        elif args.quench is not None:
            quench(args)
        else:
            describe(args)
    except (ValueError, MemoryError) as error:
        parser.error(str(error))


def describe(args: argparse.Namespace) -> None:
    """Build H at one field and print what it is and what energies states have."""
    n, field = args.qubits, 0.7 if args.field is None else args.field
    began = time.perf_counter()
    H = transverse_field_ising(n, field, periodic=args.periodic)
    seconds = time.perf_counter() - began

    print(f"chain            {chain_name(args)}, field {field:g}, on {device_name()}")
    print(f"size             {H.shape[0]} x {H.shape[1]}, built in {seconds:.3g} s")
    print(f"nnz              {H.nnz} stored values, density {H.density:.3g}")

    states = {
        "uniform state": mx.ones(H.shape[1]),
        "random state": mx.random.normal(H.shape[1:]),
    }
    for name, psi in states.items():
        energy = float(expectation(H, psi))
        length = np.linalg.norm(H @ psi) / np.linalg.norm(psi)
        print(f"{name:<16} <H> = {per_site(energy, n)}, ||H psi|| / ||psi|| = {length:.5f}")

    ground = exact_ground_energy(n, field, periodic=args.periodic)
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
    measured, exact = measure(n, result), exact_ground(n, field, args.periodic)
    print(f"gap              {measured.gap:.5f}, exact {exact.gap:.5f}")
    print(f"magnetisation    <X> = {measured.x:.5f} per site, exact {exact.x:.5f}")
    i, j = ends(n)
    print(f"correlation      <Z_{i} Z_{j}> = {measured.zz:.5f}, exact {exact.zz:.5f}")
    entropy = float(entanglement_entropy(psi, n // 2))
    print(f"entanglement     {entropy:.5f} nats across the middle{of_one_vector(result)}")


def sweep(args: argparse.Namespace) -> None:
    """Find and measure the ground state at each field, print a table and draw it."""
    n = args.qubits
    chain = chain_name(args)
    IsingOperator(n, float(args.sweep[-1]))  # raises before the work begins, if one does
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
    x, zz = float(magnetization(psi, "x").mean()), float(correlation(psi, "z", *ends(n)))
    return Ground(float(energies[0]), float(energies[1] - energies[0]), x, zz)


def of_one_vector(result: LanczosResult) -> str:
    """Return what has to be said of the entropy of a level of several states."""
    low, high = np.array(result.energies).astype(float)
    if high - low > 1e-5 * max(1.0, abs(low)):  # as float32 tells levels apart
        return ""
    return ", of one vector of several: the level is degenerate, and others have other entropies"


def quench(args: argparse.Namespace) -> None:
    """Let the ground state of one field evolve under another, print a table and draw it."""
    n, (before, after) = args.qubits, args.quench
    times = np.linspace(0, 6, 61) if args.times is None else args.times
    first, second = (IsingOperator(n, field, periodic=args.periodic) for field in args.quench)
    # The uniform state is even under the flip of all spins, so this is the even ground state.
    start = lanczos(first, v0=mx.ones(2**n)).states[:, 0]
    began = time.perf_counter()
    measured = measure_quench(n, second, start, times)
    seconds = time.perf_counter() - began
    exact = exact_quench(n, before, after, times, args.periodic)

    title = f"{chain_name(args)}, field {before:g} to {after:g}"
    print(f"{title}, on {device_name()}: evolved in {seconds:.3g} s | exact")
    print("time    <X> per site          <Z Z> at n / 2        entropy, nats         return")
    for row, t in enumerate(times):
        cells = [
            f"{ours[row]:9.5f} | {theirs[row]:8.5f}"
            for ours, theirs in zip(measured, exact, strict=True)
        ]
        print(f"{t:<6.4g} " + "  ".join(cells))
    for name, ours, theirs in zip(Quenched._fields, measured, exact, strict=True):
        print(f"largest error    {name:<7} {np.abs(ours - theirs).max():.1e}")
    if args.plot:
        fine = np.linspace(times[0], times[-1], 400)
        curve = exact_quench(n, before, after, fine, args.periodic)
        draw_quench(args.plot, title, times, measured, fine, curve)
        print(f"plot             {args.plot}")


def measure_quench(n: int, H: IsingOperator, start: mx.array, times: np.ndarray) -> Quenched:
    """Evolve a state to some times, a few at once, and measure it at each."""
    rows, psi, reached = [], start, 0.0
    with tqdm(total=len(times), desc="evolve", unit="time") as bar:
        for some in np.array_split(times, -(-len(times) // 8)):
            states = evolve(H, psi, some - reached)
            psi, reached = states[-1], some[-1]
            for state in states:
                row = magnetization(state, "x").mean(), correlation(state, "z", *ends(n))
                rows.append([*row, entanglement_entropy(state, n // 2), fidelity(start, state)])
            bar.update(len(some))
    return Quenched(*np.array(rows, dtype=float).T)


def ends(n: int) -> tuple[int, int]:
    """Return two sites half a chain apart, as far from its ends as they can be."""
    return (n - n // 2) // 2, (n - n // 2) // 2 + n // 2


def fermions(n: int, h: float, periodic: bool) -> np.ndarray:
    """Return N, ``(n, n)``, with which H = -i sum N_ij a_i b_j at J = 1 and h >= 0.

    The a and b are Majorana fermions, a_i = Z_i and b_i = Y_i, each after X on all sites before.
    N has h on the diagonal, -1 below it, and on a ring 1 in the corner: there, the states are even
    under the flip of all spins, as the ground state is.
    """
    N = np.diag(np.full(n, h)) - np.diag(np.ones(n - 1), -1)
    if periodic:
        N[0, -1] = 1.0
    return N


def exact_ground(n: int, h: float, periodic: bool) -> Ground:
    """Return the exact values at J = 1 and h >= 0, from free fermions.

    N = U S V^T gives the excitations 2 S, E_0 = -tr S, and with G = U V^T the means <X_i> = G_ii
    and <Z_i Z_j> = det -G[i+1:j+1, i:j] (Lieb, Schultz and Mattis, Annals of Physics 16 (1961)
    407). The lowest odd state on a ring has the momenta 2 pi m / n, of which 0 counts h - 1.
    """
    U, S, Vt = np.linalg.svd(fermions(n, h, periodic))
    G = U @ Vt
    gap = 2 * S[-1]
    if periodic:
        k = 2 * np.pi * np.arange(1, n) / n
        gap = S.sum() - np.hypot(h - np.cos(k), np.sin(k)).sum() + h - 1
    i, j = ends(n)
    zz = float(np.linalg.det(-G[i + 1 : j + 1, i:j]))
    return Ground(-float(S.sum()), float(gap), float(np.trace(G)) / n, zz)


def exact_quench(
    n: int, before: float, after: float, times: np.ndarray, periodic: bool
) -> Quenched:
    """Return the exact values after a quench, from free fermions.

    The state is known by the correlations C_kl = i <c_k c_l> of all Majorana fermions c, first the
    a, then the b. They turn into one another: C(t) = R C R^T with R = exp(A t), where A has -2 N
    above and 2 N^T below its diagonal. Strings of fermions are Pfaffians (Wick), so is the overlap
    of two states, and the entropy is that of the modes inside (Vidal, Latorre, Rico and Kitaev,
    Physical Review Letters 90 (2003) 227902).
    """
    zero = np.zeros((n, n))
    U, _, Vt = np.linalg.svd(fermions(n, before, periodic))
    U[:, -1] *= np.sign(np.linalg.det(U @ Vt))  # even, where rounding has hidden it
    C0 = np.block([[zero, U @ Vt], [-(U @ Vt).T, zero]])
    N = fermions(n, after, periodic)
    energies, modes = np.linalg.eigh(1j * np.block([[zero, -2 * N], [2 * N.T, zero]]))
    i, j = ends(n)
    string = np.array([(n + k, k + 1) for k in range(i, j)]).ravel()  # b_i a_i+1 b_i+1 ... a_j
    inside = np.r_[: n // 2, n : n + n // 2]
    rows = []
    for t in times:
        R = ((modes * np.exp(-1j * energies * t)) @ modes.conj().T).real
        C = R @ C0 @ R.T
        x = np.trace(C[:n, n:]) / n
        zz = pfaffian(C[np.ix_(string, string)])
        p = (
            1 + np.linalg.eigvalsh(1j * C[np.ix_(inside, inside)])
        ) / 2  # modes, and one minus them
        p = p[p > 1e-15]
        entropy = -(p * np.log(p)).sum()
        back = np.sqrt(abs(np.linalg.det((C0 + C) / 2)))
        rows.append([x, zz, entropy, back])
    return Quenched(*np.array(rows).T)


def pfaffian(A: np.ndarray) -> float:
    """Return the Pfaffian of an antisymmetric matrix, by Gaussian elimination of pairs."""
    A, result = A.copy(), 1.0
    for k in range(0, len(A), 2):
        pivot = k + 1 + int(np.abs(A[k, k + 1 :]).argmax())
        if pivot != k + 1:
            A[[k + 1, pivot]] = A[[pivot, k + 1]]
            A[:, [k + 1, pivot]] = A[:, [pivot, k + 1]]
            result = -result
        result *= A[k, k + 1]
        if result == 0:
            break
        rest = np.outer(A[k, k + 2 :] / A[k, k + 1], A[k + 1, k + 2 :])
        A[k + 2 :, k + 2 :] += rest.T - rest
    return float(result)


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
    plt = pyplot()
    figure, (energy, gap, order) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    energy.plot(fine, exact[0] / n, color=GRAY, label="exact")
    energy.plot(fields, measured[0] / n, color=BLUE, marker="o", label="Lanczos", **DOTS)
    energy.set_title("Ground-state energy per site")
    gap.plot(fine, exact[1], color=GRAY, label="exact")
    gap.plot(fields, measured[1], color=BLUE, marker="o", label="Lanczos", **DOTS)
    gap.set_title("Gap to the next state")
    for name, color, marker, ours, theirs in (
        (r"Lanczos: $\langle X\rangle$", RED, "s", measured[2], exact[2]),
        (
            r"Lanczos: $\langle Z_i Z_{i+n/2}\rangle^{1/2}$",
            GREEN,
            "o",
            root(measured[3]),
            root(exact[3]),
        ),
    ):
        order.plot(fields, ours, color=color, marker=marker, label=name, **DOTS)
        order.plot(fine, theirs, color=GRAY, zorder=1)
    order.plot([], [], color=GRAY, label="exact")
    infinite = np.maximum(0, 1 - fine**2) ** 0.125
    order.plot(fine, infinite, color=GREEN, linestyle=":", label="exact, infinite chain")
    order.set_title("Magnetisation per site")
    for axis in (energy, gap, order):
        axis.set_xlabel("transverse field / coupling")
        axis.axvline(1, color="lightgray", linewidth=1, zorder=0)
    energy.set_ylabel("in units of the coupling")
    energy.legend()
    gap.legend(loc="upper left")
    order.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside: the curves fill the axes
    figure.suptitle(chain.capitalize())
    figure.savefig(path, dpi=110)


def draw_quench(
    path: Path,
    title: str,
    times: np.ndarray,
    measured: Quenched,
    fine: np.ndarray,
    exact: Quenched,
) -> None:
    """Draw what was measured at each time on exact curves."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    names = (
        r"Magnetisation $\langle X\rangle$ per site",
        r"Correlation $\langle Z_i Z_{i+n/2}\rangle$ across half the chain",
        "Entanglement entropy across the middle, nats",
        "Probability to be in the first state",
    )
    for axis, name, ours, theirs in zip(axes.flat, names, measured, exact, strict=True):
        axis.plot(fine, theirs, color=GRAY, label="exact")
        axis.plot(times, ours, color=BLUE, marker="o", label="evolved", **DOTS)
        axis.set_title(name, fontsize="medium")
    for axis in axes[1]:
        axis.set_xlabel("time, in units of 1 / coupling")
    axes[0, 0].legend()
    figure.suptitle(title.capitalize())
    figure.savefig(path, dpi=110)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def root(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(0, values))


def points_of(text: str) -> np.ndarray:
    """Return the numbers of ``MIN:MAX:POINTS``."""
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


def quench_of(text: str) -> tuple[float, float]:
    """Return the two fields of ``FROM:TO``."""
    try:
        before, after = (float(part) for part in text.split(":"))
    except ValueError:
        before = after = -1.0
    if not (0 < before < math.inf and 0 <= after < math.inf):
        raise argparse.ArgumentTypeError(
            f"must be FROM:TO, two fields with FROM above 0 and TO of at least 0, got {text!r}"
        )
    return before, after


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a one-line error unless the arguments go together."""
    several = [name for name in ("sweep", "quench") if getattr(args, name) is not None]
    several += ["ground-state"] if args.ground_state else []
    if len(several) > 1:
        parser.error(f"--{several[0]} and --{several[1]} do not go together")
    for name in several:
        if args.qubits == 1:
            parser.error(f"--{name} needs at least 2 qubits, got 1")
        if name != "ground-state" and args.field is not None:
            parser.error(f"--{name} says its fields: leave out --field")
    if args.ground_state and args.field is not None and not args.field >= 0:
        parser.error("--ground-state needs a field of at least 0")
    if args.times is not None and args.quench is None:
        parser.error("--times needs --quench")
    if args.plot is not None and args.sweep is None and args.quench is None:
        parser.error("--plot needs --sweep or --quench")
    check_plot(parser, args.plot)


def chain_name(args: argparse.Namespace) -> str:
    return f"{'ring' if args.periodic else 'open chain'} of {args.qubits} sites"


def per_site(energy: float, n: int) -> str:
    return f"{energy:.5f} ({energy / n:.5f} per site)"


def device_name() -> str:
    return "GPU" if mx.default_device().type == mx.gpu else "CPU"


if __name__ == "__main__":
    main()
