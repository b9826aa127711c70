"""Runs the example scripts: in a process of their own, as users do, or sooner, in this one."""

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from support import ROOT

EXAMPLES = ROOT / "examples"


def command(script: str, *arguments: object) -> list[str]:
    """Return the command line of a script, for which a warning is an error, as it is in tests."""
    return [sys.executable, "-W", "error", str(EXAMPLES / script), *map(str, arguments)]


def run_alone(
    script: str, *arguments: object, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, in ``folder``."""
    return subprocess.run(
        command(script, *arguments), cwd=folder, capture_output=True, text=True, timeout=120
    )


def run_here(
    script: str, *arguments: object, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in this process, which has imported already what it imports.

    What it leaves behind is what it printed and its files: the default device, ``sys.argv``, the
    path and the folder are put back.
    """
    argv = [str(EXAMPLES / script), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    device, before = mx.default_device(), os.getcwd()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        os.chdir(folder or before)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.chdir(before)
            mx.set_default_device(device)
    if isinstance(code, str):  # Python would print it
        err.write(f"{code}\n")
        code = 1
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
