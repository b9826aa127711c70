"""Cross-compile the CPU's C++ for a Mac, and link it against MLX's library of the macOS wheel.

``make test-macos`` runs this on any machine. It shows that the sources stay compilable there; they
are not run, and not used on a Mac.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlx_sparse_nn.core.backends import build

TARGET, PLATFORM = "aarch64-macos.14.0", "macosx_14_0_arm64"
KERNELS = {
    "blocks": ["-DELEMENT=bfloat16", "-DBLOCK=16"],
    "scalars": ["-DELEMENT=float16"],
    "quantized": ["-DELEMENT=float", "-DBITS=5"],
    "pauli": ["-DELEMENT=float"],
    "spgemm": ["-DELEMENT=complex64"],
    "index": [],
}


def wheels(folder: Path) -> Path:
    """Download MLX's wheels for a Mac, unpack them, and return the folder of the package."""
    names = [f"{name}=={build.MLX_VERSION}" for name in ("mlx", "mlx-metal")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--platform", PLATFORM, "--python-version", "3.11"]
    subprocess.run([*command, "--dest", str(folder), *names], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder / "mlx"


def link(source: str, flags: list[str], folder: Path) -> None:
    """Compile and link one source."""
    out = folder / f"{source}.dylib"
    file = str(build.SOURCES / f"{source}.cpp")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", TARGET, f"-I{build.SOURCES}"]
    subprocess.run([*command, file, *flags, "-o", str(out)], check=True)
    print(f"{source}: {out.stat().st_size} bytes for {TARGET}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mlx = wheels(folder)
        flags = [f"-I{mlx / 'include'}", f"-L{mlx / 'lib'}", "-lmlx"]
        link("primitive", [*build.PRIMITIVE_FLAGS, *flags], folder)
        for source, defines in KERNELS.items():
            link(source, [*build.KERNEL_FLAGS, *defines], folder)


if __name__ == "__main__":
    main()
