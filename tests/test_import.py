"""What ``import mlx_sparse_nn`` brings into a process: time that every user pays, at each start."""

import subprocess
import sys

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
