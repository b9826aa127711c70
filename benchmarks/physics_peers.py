"""A solver's process in ``python -m benchmarks physics``: it answers one request a line.

    python -m benchmarks.physics_peers NAME DEVICE

NAME is ``operator`` or ``stored``, the two forms of H in mlx_sparse_nn, ``scipy``, ``qutip``, or
``cupy`` on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from benchmarks.physics_cases import TOLERANCES, Case, diagonal, spins
from benchmarks.server import answer, versions_of

CHAINED = 16  # products under one synchronise, on a GPU
Result = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]  # what is timed; its numbers


class Solver:
    """What a solver answers. Subclasses say how each part is computed.

    ``products`` counts H times a vector, where the solver says it.
    """

    packages: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.run: Callable[[], Any] = lambda: None
        self.products: int | None = None

    def versions(self) -> dict[str, str]:
        """Return the version of each package."""
        return versions_of(self.packages)

    def gpu(self) -> str | None:
        """Return the name of the GPU, where one is used."""
        return None

    def prepare(self, case: dict[str, Any], result: str) -> dict[str, Any] | None:
        """Compute a case once, write its numbers to a file, and return seconds and products."""
        wanted = Case(**case)
        self.products = None
        made = getattr(self, wanted.part)(wanted)
        if made is None:
            return None
        self.run, numbers = made
        began = time.perf_counter()
        found = self.run()
        seconds = time.perf_counter() - began
        np.save(result, numbers(found))
        return {"seconds": seconds, "products": self.products}

    def time(self, calls: int) -> dict[str, float]:
        """Return the seconds of a call: of all cores together, and on the clock."""
        began, spent = time.perf_counter(), time.process_time()
        for _ in range(calls):
            self.run()
        wall, cpu = time.perf_counter() - began, time.process_time() - spent
        return {"cpu": cpu / calls, "wall": wall / calls}

    def drop(self) -> None:
        """Forget the case."""
        self.run = lambda: None

    def lanczos(self, case: Case) -> Result | None:
        return None

    def evolve(self, case: Case) -> Result | None:
        return None

    def quench(self, case: Case) -> Result | None:
        return None

    def product(self, case: Case) -> Result | None:
        return None


class Ours(Solver):
    """mlx_sparse_nn, with H as an IsingOperator or as a stored matrix."""

    packages = ("mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "numpy")

    def __init__(self, form: str, device: str):
        import mlx.core as mx

        from mlx_sparse_nn import physics

        super().__init__()
        self.chained = 1  # products of a call, each of what the one before gave
        self.device, self.mx, self.physics = device, mx, physics
        self.build = {
            "operator": physics.IsingOperator,
            "stored": physics.transverse_field_ising,
        }[form]
        mx.set_default_device(mx.Device(getattr(mx, device)))

    def prepare(self, case: dict[str, Any], result: str) -> dict[str, Any] | None:
        self.chained = 1
        prepared = super().prepare(case, result)
        if self.device == "gpu" and case["part"] == "product":
            self.chained = CHAINED
        return prepared

    def time(self, calls: int) -> dict[str, float]:
        return {clock: t / self.chained for clock, t in super().time(calls).items()}

    def gpu(self) -> str | None:
        return str(self.mx.device_info().get("device_name")) if self.device == "gpu" else None

    def hamiltonian(self, case: Case) -> Any:
        return self.build(case.qubits, 1.0, periodic=True, dtype=getattr(self.mx, case.dtype))

    def up(self, case: Case) -> Any:
        return self.mx.zeros(1 << case.qubits).at[-1].add(1.0)

    def lanczos(self, case: Case) -> Result:
        H, tol = self.hamiltonian(case), TOLERANCES[case.dtype]

        def run():
            result = self.physics.lanczos(H, case.k, tol=tol)
            self.mx.eval(result.energies, result.states, result.residuals)
            self.products = result.iterations
            return result.energies

        return run, lambda energies: np.array(energies, np.float64)

    def evolve(self, case: Case) -> Result:
        H, psi = self.hamiltonian(case), self.up(case)

        def run():
            state = self.physics.evolve(H, psi, case.time)
            self.mx.eval(state)
            return state

        return run, lambda state: np.array(state, np.complex128)

    def quench(self, case: Case) -> Result:
        H, psi, times = self.hamiltonian(case), self.up(case), case.times()
        z = self.mx.array(mean_spin(case))

        def run():
            means = self.mx.abs(self.physics.evolve(H, psi, times)).square() @ z
            self.mx.eval(means)
            return means

        return run, lambda means: np.array(means, np.float64)

    def product(self, case: Case) -> Result:
        H, x = self.hamiltonian(case), self.mx.array(case.vector())

        def run():
            y = x
            for _ in range(self.chained):
                y = H @ y
            self.mx.eval(y)
            return y

        return run, np.array


class SciPy(Solver):
    """eigsh, expm_multiply and csr_array."""

    packages = ("scipy", "numpy")

    def lanczos(self, case: Case) -> Result:
        from scipy.sparse.linalg import LinearOperator, eigsh

        H, tol = ring(case), TOLERANCES[case.dtype]

        def count(x: np.ndarray) -> np.ndarray:
            self.products = (self.products or 0) + 1
            return H @ x.reshape(-1)

        # SciPy's annotations know no tolerance but 0, and one way to make an operator.
        counted = cast(Any, LinearOperator)(H.shape, count, dtype=H.dtype)
        solve = cast(Any, eigsh)

        def run():
            self.products = 0
            return solve(counted, k=case.k, which="SA", tol=tol)[0]

        return run, lambda energies: np.sort(energies.astype(np.float64))

    def evolve(self, case: Case) -> Result:
        from scipy.sparse.linalg import expm_multiply

        A = ring(case).astype(np.complex64) * np.complex64(-1j * case.time)
        psi = up(case, np.complex64)
        return lambda: expm_multiply(A, psi, traceA=0), lambda state: state.astype(np.complex128)

    def quench(self, case: Case) -> Result:
        from scipy.sparse.linalg import expm_multiply

        A = ring(case).astype(np.complex64) * np.complex64(-1j)
        psi, z = up(case, np.complex64), mean_spin(case)
        end, points = case.time, case.points

        def run():
            states = expm_multiply(A, psi, start=0, stop=end, num=points, traceA=0)
            return np.abs(states) ** 2 @ z

        return run, lambda means: means.astype(np.float64)

    def product(self, case: Case) -> Result:
        H, x = ring(case), case.vector()
        return lambda: H @ x, lambda y: y


class CuPy(Solver):
    """eigsh and csr_matrix on a GPU."""

    packages = ("cupy", "cupy-cuda12x", "cupy-cuda13x", "numpy")

    def gpu(self) -> str | None:
        import cupy  # pyright: ignore[reportMissingImports]

        return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()

    def stored(self, case: Case) -> Any:
        import cupyx.scipy.sparse  # pyright: ignore[reportMissingImports]

        return cupyx.scipy.sparse.csr_matrix(ring(case))

    def lanczos(self, case: Case) -> Result:
        import cupy  # pyright: ignore[reportMissingImports]
        from cupyx.scipy.sparse.linalg import (  # pyright: ignore[reportMissingImports]
            LinearOperator,
            eigsh,
        )

        H, tol = self.stored(case), TOLERANCES[case.dtype]

        def count(x: Any) -> Any:
            self.products = (self.products or 0) + 1
            return H @ x

        eigsh(LinearOperator(H.shape, count, dtype=H.dtype), k=case.k, which="SA", tol=tol)
        counted = self.products

        def run():
            energies = eigsh(H, k=case.k, which="SA", tol=tol)[0]
            cupy.cuda.Device().synchronize()
            self.products = counted
            return energies

        return run, lambda energies: np.sort(cupy.asnumpy(energies).astype(np.float64))


class QuTiP(Solver):
    """sesolve."""

    packages = ("qutip", "scipy", "numpy")

    def quench(self, case: Case) -> Result:
        import qutip  # pyright: ignore[reportMissingImports]
        from scipy import sparse

        H = qutip.Qobj(sparse.csr_matrix(ring(case), dtype=np.complex128))
        Z = qutip.Qobj(sparse.diags_array(mean_spin(case)).tocsr())
        psi = qutip.Qobj(up(case, np.complex128))

        def run():
            return qutip.sesolve(H, psi, case.times(), e_ops=[Z]).expect[0]

        return run, lambda means: np.array(means, np.float64)


def ring(case: Case) -> Any:
    """Return H as SciPy's CSR."""
    from scipy import sparse

    n, size = case.qubits, 1 << case.qubits
    states = np.arange(size, dtype=np.int32)
    columns = np.empty((size, n + 1), np.int32)
    columns[:, 0] = states
    for site in range(n):
        columns[:, site + 1] = states ^ (1 << site)
    values = np.full((size, n + 1), -1, case.dtype)
    values[:, 0] = diagonal(n)
    rows = np.arange(size + 1, dtype=np.int32) * np.int32(n + 1)
    H = sparse.csr_array((values.reshape(-1), columns.reshape(-1), rows), shape=(size, size))
    H.sort_indices()
    return H


def up(case: Case, dtype: type) -> np.ndarray:
    """Return the state of all spins up."""
    psi = np.zeros(1 << case.qubits, dtype)
    psi[-1] = 1
    return psi


def mean_spin(case: Case) -> np.ndarray:
    """Return the mean of z over the sites, ``(2**n,)`` float32."""
    return spins(case.qubits).mean(axis=0, dtype=np.float32)


def solver(name: str, device: str) -> Solver:
    """Return a solver by its name."""
    peers: dict[str, type[Solver]] = {"scipy": SciPy, "qutip": QuTiP, "cupy": CuPy}
    return peers[name]() if name in peers else Ours(name, device)


if __name__ == "__main__":
    answer(lambda: solver(*sys.argv[1:]))
