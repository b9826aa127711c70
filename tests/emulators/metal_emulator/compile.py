"""Compiles the emulator's runtime and the rewritten kernels with the clang in the ziglang wheel.

One compiler everywhere, so that a text compiles the same on every machine. Libraries are kept under
the system's temporary folder, named by a hash of all that goes into them.
"""

import ctypes
import functools
import getpass
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import ziglang

SHIM = Path(__file__).parent / "shim"
TARGETS = {
    "x86_64": ["-target", "x86_64-linux-gnu", "-mcpu=x86_64_v3"],
    "aarch64": ["-target", "aarch64-linux-gnu"],
}
# No C++ library: building it would take most of a minute, and nothing here needs it. Nor the C
# library or its headers: symbols are found in the Python process.
FLAGS = [
    *("-std=c++23", "-g0", "-shared", "-fPIC", "-nostdlib"),
    *("-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-fno-math-errno"),
    *("-ffp-contract=off", "-Xclang", "-ffloat16-excess-precision=none"),
    "-Wno-user-defined-literals",
]
RUNTIME_FLAGS = ["-O2", "-fvisibility=hidden"]
KERNEL_FLAGS = [
    "-O1",
    "-fno-unroll-loops",
    # A tail call would hide where it was made from, by which the runtime knows a place.
    "-fno-optimize-sibling-calls",
    # Out-of-range indices of a thread's own arrays and divisions by zero call back as faults.
    "-fsanitize=array-bounds,integer-divide-by-zero",
    "-fsanitize-minimal-runtime",
]


class CompileError(Exception):
    """The compiler rejected a kernel; the message has its diagnostics."""


@functools.cache
def cache_folder() -> Path:
    """The folder of compiled libraries, made if it is missing."""
    folder = Path(tempfile.gettempdir()) / f"metal_emulator-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _shim_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(SHIM.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def build(source: str, flags: list[str]) -> Path:
    """Compiles C++ into a shared library, once.

    Args:
        source: a C++ translation unit.
        flags: compiler flags beyond `FLAGS`.

    Returns:
        The library's path.

    Raises:
        CompileError: with the compiler's diagnostics.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in TARGETS:
        raise RuntimeError(f"the emulator runs on Linux, x86_64 or aarch64, not on {machine}")
    flags = [*FLAGS, *TARGETS[machine], *flags]
    key = "\0".join([source, _shim_hash(), version("ziglang"), *flags])
    library = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        path = Path(folder, "kernel.cpp")
        path.write_text(source)
        output = Path(folder, library.name)
        compiler = Path(ziglang.__file__).with_name("zig")
        command = [str(compiler), "c++", *flags, "-I", str(SHIM)]
        zig = str(cache_folder() / "zig")
        result = subprocess.run(
            [*command, "-o", str(output), str(path)],
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise CompileError(result.stderr)
        os.replace(output, library)
    return library


@functools.cache
def runtime() -> ctypes.CDLL:
    """The scheduler and the checks, loaded so that kernels find its symbols."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    path = build('#include "runtime.cpp"\n', RUNTIME_FLAGS)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def load_kernel(name: str, source: str) -> ctypes.CDLL:
    """Compiles and loads a rewritten kernel; errors name it."""
    runtime()
    try:
        return ctypes.CDLL(str(build(source, KERNEL_FLAGS)))
    except CompileError as error:
        raise CompileError(f"[{name}] does not compile:\n{error}") from None
