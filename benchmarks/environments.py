"""The peers, and the virtual environment of each, made when it is first needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".bench"


class Peer(NamedTuple):
    """Somebody who runs workloads.

    Args:
        label: Name in tables and plots.
        requirements: What its environment holds; nothing for the one that runs the benchmark.
        devices: Where it can run.
    """

    label: str
    requirements: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "gpu")


PEERS = {  # by the name of its module in benchmarks/peers
    "ours": Peer("mlx_sparse_nn"),
    "linear": Peer("nn.Linear"),
    "block_masked_mm": Peer("block_masked_mm"),
    "mlx_sparse": Peer("mlx-sparse", ("mlx-sparse==0.0.6b0", "numpy")),
    "scipy": Peer("SciPy", ("scipy", "numpy"), ("cpu",)),
    "torch": Peer("PyTorch", ("torch==2.13.0", "numpy"), ("cpu",)),
}


def python_of(name: str) -> Path:
    """Return the Python of a peer's environment, which is made under ``.bench/`` when missing.

    Raises:
        SystemExit: It cannot be installed.
    """
    requirements = PEERS[name].requirements
    if not requirements:
        return Path(sys.executable)
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
            f"[benchmarks] could not install {', '.join(requirements)} for {PEERS[name].label}: "
            f"name the other peers with --peers to leave it out ({error})"
        ) from None
    installed.write_text(wanted)
    return python
