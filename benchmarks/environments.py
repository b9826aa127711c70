"""The peers, and the virtual environment of each, made when it is first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.openblas import renamed

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".bench"


class Peer(NamedTuple):
    """Somebody who runs workloads.

    Args:
        label: Name in tables and plots.
        requirements: What its environment holds; nothing for the one that runs the benchmark.
        devices: Where it can run.
        openblas: Whether OpenBLAS is loaded before it, in place of MLX's own BLAS.
        by_default: Whether it is measured when no peer is named.
    """

    label: str
    requirements: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "gpu")
    openblas: bool = False
    by_default: bool = True


PEERS = {  # by the name of its module in benchmarks/peers
    "ours": Peer("mlx_sparse_nn"),
    "plain": Peer("plain MLX", devices=("cpu",)),
    "linear": Peer("nn.Linear"),
    "linear_openblas": Peer("nn.Linear, OpenBLAS", devices=("cpu",), openblas=True),
    "block_masked_mm": Peer("block_masked_mm", by_default=False),
    "mlx_sparse": Peer("mlx-sparse", ("mlx-sparse==0.0.6b0", "numpy")),
    "scipy": Peer("SciPy", ("scipy", "numpy"), ("cpu",)),
    "torch": Peer("PyTorch", ("torch==2.13.0", "numpy"), ("cpu",)),
}
OPENBLAS = "scipy-openblas32==0.3.34.481.3"
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_peers(device: str) -> list[str]:
    """Return the peers that are measured on a device when none is named."""
    return [
        name
        for name, peer in PEERS.items()
        if device in peer.devices
        and peer.by_default
        and (sys.platform == "linux" or not peer.openblas)
    ]


def cores() -> int:
    """Return how many cores this process, and what it starts, may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def python_of(name: str) -> Path:
    """Return the Python of a peer's environment, which is made under ``.bench/`` when missing.

    Raises:
        SystemExit: It cannot be installed.
    """
    requirements = PEERS[name].requirements
    return environment(name, requirements) if requirements else Path(sys.executable)


def variables(openblas: bool = False) -> dict[str, str]:
    """Return the environment variables of a process that is measured: as many threads of each
    library as there are cores to use, and OpenBLAS before MLX, or nothing.

    Raises:
        SystemExit: OpenBLAS cannot be installed.
    """
    pinned = {**os.environ, **dict.fromkeys(THREADS, str(cores()))}
    pinned.pop("LD_PRELOAD", None)
    return {**pinned, "LD_PRELOAD": str(openblas_library())} if openblas else pinned


def openblas_library() -> Path:
    """Return the OpenBLAS to load before MLX, of an environment of its own.

    Raises:
        SystemExit: It cannot be installed, or there is no C compiler.
    """
    python = environment("openblas", (OPENBLAS,))
    where = "import scipy_openblas32 as s; print(s.get_lib_dir())"
    answer = subprocess.run([str(python), "-c", where], check=True, capture_output=True, text=True)
    library = renamed(Path(answer.stdout.strip()), CACHE / "openblas/libopenblas_for_mlx.so")
    if library is None:
        raise SystemExit("[benchmarks] OpenBLAS behind MLX needs a C compiler: cc or gcc")
    return library


def environment(name: str, requirements: tuple[str, ...]) -> Path:
    """Return the Python of ``.bench/name``, which is made when it does not hold these.

    Raises:
        SystemExit: It cannot be installed.
    """
    folder = CACHE / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    installed = folder / "installed.txt"
    wanted = "\n".join([sys.version, *requirements])
    if installed.exists() and installed.read_text() == wanted:
        return python
    print(f"making {folder.relative_to(ROOT)} with {', '.join(requirements)}", file=sys.stderr)
    pip = [str(python), "-m", "pip", "install", "--quiet", *requirements]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run(pip, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"[benchmarks] could not install {', '.join(requirements)}: "
            f"name the other peers with --peers to leave {name} out ({error})"
        ) from None
    installed.write_text(wanted)
    return python
