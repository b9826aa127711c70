"""Find an OpenBLAS for MLX on a Linux CPU, whose wheel multiplies by the reference BLAS.

    LD_PRELOAD=$(python benchmarks/openblas.py) python train.py

Prints what to load before MLX: the system's library, or else the one that ``pip install
scipy-openblas32`` brings, under the names that MLX calls (``openblas.c``, compiled into
``.bench/``). Where there is neither, it prints an empty line; on stderr, it says which it is. It
needs nothing but Python, and a C compiler for the second.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RENAMED = HERE.parent / ".bench/libopenblas_for_mlx.so"


def installed() -> str:
    """Return the library to load before MLX, or an empty string."""
    if sys.platform != "linux":
        return ""
    if library := ctypes.util.find_library("openblas"):
        return library
    found = importlib.util.find_spec("scipy_openblas32")
    if found is None or found.origin is None:
        return ""
    if " " in str(RENAMED):
        print(f"[openblas] LD_PRELOAD takes no path with a space: {RENAMED}", file=sys.stderr)
        return ""
    return str(renamed(Path(found.origin).parent / "lib", RENAMED) or "")


def renamed(folder: Path, target: Path) -> Path | None:
    """Return the library of scipy-openblas32 under the names that MLX calls.

    Args:
        folder: Where its library lies.
        target: Where the new one goes, which loads it from there.

    Returns:
        ``target``, or None where there is no C compiler.

    Raises:
        subprocess.CalledProcessError: The compiler fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.so")
    command = [*shlex.split(compiler), "-O2", "-shared", "-fPIC", str(HERE / "openblas.c")]
    library = [f"-L{folder}", "-l:libscipy_openblas.so", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-o", str(unfinished), *library], check=True)
    os.replace(unfinished, target)
    return target


if __name__ == "__main__":
    found = installed()
    if sys.platform == "linux":
        by = found or "MLX's own BLAS; docs/backends.md, MLX on a Linux CPU, has a faster one"
        print(f"dense products on the CPU by {by}", file=sys.stderr)
    print(found)
