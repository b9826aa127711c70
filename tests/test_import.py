"""What ``import mlx_sparse_nn`` brings into a process: time that every user pays, at each start."""

import os
import subprocess
import sys

import pytest
from support import ROOT

# With all that these import. A name more costs each user milliseconds: hashlib, scipy.sparse and
# matplotlib are imported by the functions that need them.
ALLOWED = (
    "mlx.core, mlx.nn, mlx.optimizers, numpy, "
    "copy, dataclasses, html, json, pathlib, threading, warnings, weakref"
)

SCRIPT = f"""
import sys, {ALLOWED}
before = set(sys.modules)
import mlx_sparse_nn
print(*(name for name in set(sys.modules) - before if name.split(".")[0] != "mlx_sparse_nn"))
"""


def test_the_package_imports_little_beside_mlx_and_numpy():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            "libmlx.so: cannot open shared object file",
            "MLX has no backend here: pip",
        ),
        ("something else", "ImportError: something else"),
    ],
)
def test_mlx_without_its_library_is_one_sentence(broken, said, tmp_path):
    """As on Linux without an extra; any other error is MLX's to explain."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/__init__.py").touch()
    (tmp_path / "mlx/core.py").write_text(f"raise ImportError({broken!r})")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import mlx_sparse_nn"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
