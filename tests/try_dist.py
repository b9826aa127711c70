"""Try what would be published: ``make dist`` runs this on ``dist/``.

The wheel goes into an environment of its own, with the backend of this machine. There the package
says who computes, and README's code runs in an empty folder. What an index shows of the README has
no link within the repository. The sdist is unpacked, and what its README names is there; its quick
tests run with the wheel.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

QUICK = ("tests/test_import.py", "tests/core/test_pattern.py", "tests/core/test_products.py")


def run(*command: object, folder: Path) -> None:
    """Run a command that knows nothing of this checkout, and end if it fails."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    print("$", *command, flush=True)
    subprocess.run([*map(str, command)], cwd=folder, env=clean, check=True)


def shown(wheel: Path) -> str:
    """Return what an index shows of a wheel: the README as the build rewrote it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return str(message_from_bytes(archive.read(name)).get_payload())


def missing(root: Path) -> list[str]:
    """Return what the README links to and the folder lacks."""
    text = (root / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [t for t in targets if "://" not in t and not (root / t).exists()]


def main() -> None:
    (wheel,), (sdist,) = (sorted(Path("dist").resolve().glob(kind)) for kind in ("*.whl", "*.gz"))
    if lost := [t for t in re.findall(r"\]\(([^)]*)\)", shown(wheel)) if "://" not in t]:
        sys.exit(f"an index would show links that lead nowhere: {', '.join(lost)}")
    extra = "" if sys.platform == "darwin" else "[cpu]"
    with tempfile.TemporaryDirectory() as folder:
        home, empty = Path(folder) / "env", Path(folder) / "empty"
        empty.mkdir()
        venv.create(home, with_pip=True)
        tools = ["hypothesis", "matplotlib", "networkx", "pytest", "scipy", "ziglang"]
        run(home / "bin/pip", "install", "-q", f"{wheel}{extra}", *tools, folder=empty)
        run(home / "bin/python", "-m", "mlx_sparse_nn", "info", folder=empty)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (root,) = Path(folder).glob("mlx_sparse_nn-*")
        if lacking := missing(root):
            sys.exit(f"the sdist lacks {', '.join(lacking)}, which its README names")
        readme = (root / "README.md").read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
        run(home / "bin/python", "-c", code, folder=empty)
        run(home / "bin/pytest", "-q", *QUICK, folder=root)


if __name__ == "__main__":
    main()
