"""Try what would be published: ``make dist`` runs this on ``dist/``.

The wheel goes into an environment of its own, with the backend of this machine. There the package
says who computes, and README's code runs in an empty folder. The sdist is unpacked, and what its
README names is there; its quick tests run with the wheel.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

QUICK = ("tests/test_import.py", "tests/core/test_pattern.py", "tests/core/test_products.py")


def run(*command: object, folder: Path) -> None:
    """Run a command that knows nothing of this checkout, and end if it fails."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    print("$", *command, flush=True)
    subprocess.run([*map(str, command)], cwd=folder, env=clean, check=True)


def missing(root: Path) -> list[str]:
    """Return what the README links to and the folder lacks."""
    text = (root / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [t for t in targets if "://" not in t and not (root / t).exists()]


def main() -> None:
    (wheel,), (sdist,) = (sorted(Path("dist").resolve().glob(kind)) for kind in ("*.whl", "*.gz"))
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
