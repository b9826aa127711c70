"""What ``python -m benchmarks physics`` measures, and the right results, in NumPy's float64.

All cases are of the ring at J = h = 1, where most levels above the ground state come in pairs.
States are numbered as in ``mlx_sparse_nn.physics``: site i is bit i, and z = +1 where it is set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}  # of lanczos and of eigsh, and of their energies
STATES = 1e-3  # how far a state or a curve may be off: QuTiP's default tolerances leave 2e-4


@dataclass(frozen=True)
class Case:
    """One thing to compute.

    Args:
        part: "lanczos": the k lowest levels; "evolve": a state at a time, from all spins up;
            "quench": the mean of <Z> at so many times from 0 on; "product": H times a vector.
        qubits: Sites of the ring.
        k: Levels.
        dtype: Of H and of vectors.
        time: The last, in units of 1 / J.
        points: Times of a quench.
    """

    part: str
    qubits: int
    k: int = 1
    dtype: str = "float32"
    time: float = 0.0
    points: int = 1

    @property
    def name(self) -> str:
        extra = {
            "lanczos": f", k = {self.k}, {self.dtype}",
            "evolve": f", t = {self.time:g}",
            "quench": f", {self.points} points",
            "product": "",
        }
        return f"{self.part}, n = {self.qubits}{extra[self.part]}"

    def times(self) -> np.ndarray:
        """Return the times of a quench, ``(points,)``."""
        return np.linspace(0, self.time, self.points)

    def vector(self) -> np.ndarray:
        """Return the whole numbers that H is multiplied with, ``(2**n,)`` float32."""
        generator = np.random.default_rng(self.qubits)
        return generator.integers(-2, 3, 1 << self.qubits).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cases(device: str, quick: bool) -> list[Case]:
    """Return what is measured on a device."""
    return list(_gpu_cases(quick) if device == "gpu" else _cpu_cases(quick))


def _cpu_cases(quick: bool) -> Iterator[Case]:
    for dtype in TOLERANCES:
        for n in (12,) if quick else (15, 16, 17, 18, 19, 20):
            for k in (1, 5) if quick else (1, 5, 10):
                if n % 2 == 0 or (dtype == "float32" and (k == 1 or n == 15)):
                    yield Case("lanczos", n, k, dtype)
    yield Case("evolve", 8, time=100.0)
    for n in (12,) if quick else (14, 18):
        yield Case("evolve", n, time=5.0)
    yield Case("quench", 10, time=10.0, points=51)
    for n in (14, 18) if quick else (14, 16, 18, 20, 22, 24):
        yield Case("product", n)


def _gpu_cases(quick: bool) -> Iterator[Case]:
    for n in (16,) if quick else (16, 20, 24):
        yield Case("product", n)
    for n in (14,) if quick else (16, 20):
        for k in (1, 5):
            yield Case("lanczos", n, k)
    for n in (12,) if quick else (14, 18):
        yield Case("evolve", n, time=5.0)
    yield Case("quench", 10, time=10.0, points=51)


def spins(n: int) -> np.ndarray:
    """Return z of every site in every basis state, ``(n, 2**n)`` int8."""
    states = np.arange(1 << n)
    return np.stack([(2 * (states >> site & 1) - 1).astype(np.int8) for site in range(n)])


def diagonal(n: int) -> np.ndarray:
    """Return ``-sum z_i z_{i+1}``, ``(2**n,)`` int8."""
    z = spins(n)
    return -(z * np.roll(z, -1, axis=0)).sum(axis=0, dtype=np.int8)


def multiply(energies: np.ndarray, x: np.ndarray, field: float = 1) -> np.ndarray:
    """Return the diagonal times x, less ``field`` times every flip of x."""
    y = energies * x
    for site in range(x.size.bit_length() - 1):
        by_bit = x.reshape(-1, 2, 1 << site)
        y.reshape(by_bit.shape)[:] -= field * by_bit[:, ::-1]
    return y


def levels(n: int, k: int) -> np.ndarray:
    """Return the k lowest levels of the ring, as often as they occur, from free fermions.

    P. Pfeuty, Annals of Physics 57 (1970) 79: with an even number of fermions the momenta are odd
    multiples of pi / n, with an odd number even ones, of which 0 has the energy 2 (h - J) = 0.
    """
    found = []
    for parity in (0, 1):
        momenta = (2 * np.arange(n) + 1 - parity) * (math.pi / n)
        energies = 4 * np.abs(np.sin(momenta / 2))  # 2 sqrt(2 - 2 cos k)
        sums, odd = np.full(1, -energies.sum() / 2), np.zeros(1, bool)
        for energy in energies:  # one momentum after another, empty or filled
            sums, odd = np.concatenate([sums, sums + energy]), np.concatenate([odd, ~odd])
        found.append(np.sort(sums[odd == bool(parity)])[:k])
    return np.sort(np.concatenate(found))[:k]


def evolved(n: int, time: float) -> np.ndarray:
    """Return exp(-iHt) of all spins up, by Chebyshev's series: H = 2 n cos(angle), bounded so."""
    energies = diagonal(n) / (2.0 * n)
    reach = 2 * n * time
    terms = int(reach + 10 * reach ** (1 / 3)) + 60
    angles = np.arange(4 * terms) * (2 * np.pi / (4 * terms))
    series = np.fft.fft(np.exp(-1j * reach * np.cos(angles)))[:terms] / (2 * terms)
    series[0] /= 2
    before, last = np.zeros((2, 1 << n))
    last[-1] = 1
    psi = series[0] * last
    for order in range(1, terms):
        product = multiply(energies, last, 1 / (2 * n))
        before, last = last, product if order == 1 else 2 * product - before
        psi += series[order] * last
    return psi


def curve(case: Case) -> np.ndarray:
    """Return the mean of <Z> at each time of a quench, from the dense matrix's eigenvectors."""
    n = case.qubits
    columns = [multiply(diagonal(n).astype(np.float64), row) for row in np.eye(1 << n)]
    values, vectors = np.linalg.eigh(np.stack(columns))
    phases = np.exp(-1j * np.outer(values, case.times()))  # (2**n, points)
    states = vectors @ (vectors[-1][:, None] * phases)
    return spins(n).mean(axis=0) @ np.abs(states) ** 2


def expected(case: Case) -> np.ndarray:
    """Return the right result of a case."""
    if case.part == "lanczos":
        return levels(case.qubits, case.k)
    if case.part == "evolve":
        return evolved(case.qubits, case.time)
    if case.part == "quench":
        return curve(case)
    return multiply(diagonal(case.qubits).astype(np.float32), case.vector())


def judge(case: Case, got: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Return how good a result is: ``error``, and of levels ``missed``, how many there should be.

    Raises:
        ValueError: It is wrong. A level that is missing is not: it is counted.
    """
    if got.shape != right.shape or not np.isfinite(got).all():
        raise ValueError(f"result of shape {got.shape}, finite: {np.isfinite(got).all()}")
    if case.part == "product":
        if not np.array_equal(got, right):
            raise ValueError(f"{(got != right).sum()} amplitudes are wrong")
        return {"error": 0.0}
    if case.part != "lanczos":
        error = float(np.linalg.norm(got - right) / np.linalg.norm(right))
        if error > STATES:
            raise ValueError(f"it is off by {error:.1e}")
        return {"error": error}
    bound = TOLERANCES[case.dtype] * abs(right[0])
    known = levels(case.qubits, 3 * case.k + 4)
    left, missed, error = list(known), 0, 0.0
    for energy in np.sort(got):
        distances = np.abs(np.array(left) - energy)
        nearest = int(distances.argmin())
        if distances[nearest] > bound:
            raise ValueError(f"{energy} is no level: the nearest is {left[nearest]}")
        error = max(error, float(distances[nearest] / abs(right[0])))
        del left[nearest]
    missed = sum(level < right[-1] + bound for level in left) - sum(
        level < right[-1] + bound for level in known[case.k :]
    )
    return {"error": error, "missed": int(missed)}
