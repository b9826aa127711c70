"""Compiling the C++ of ``cpu/`` at first use, and keeping what was compiled.

A library is compiled against the MLX that is installed and for the processor that runs, into the
user's cache. It is tested there in a process of its own before anybody loads it, since a library
that is wrong could take a process down. What has been built once is found again in milliseconds.

Several processes may build at once: each builds in a folder of its own, and renames the result.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from threading import Lock

import mlx.core as mx

SOURCES = Path(__file__).parents[2] / "cpu"
COMPILERS = ("g++", "clang++", "c++")
KERNEL_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
PRIMITIVE_FLAGS = ("-std=c++20", *KERNEL_FLAGS[1:], "-pthread")
SELF_TEST = "mlx_sparse_nn.core.backends.self_test"
SELF_TEST_SECONDS = 120  # far more than it takes, on any machine
MLX_VERSION: str = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
_FAULTS = ("SIGILL", "SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV")  # by which a library ends a process
_LAST_LINES = 12  # of what a compiler says

_locks: defaultdict[Path, Lock] = defaultdict(Lock)  # one for each library


class BuildError(RuntimeError):
    """A library cannot be built, and why."""


def primitive() -> Path:
    """Return the library that makes MLX primitives of kernels, built if need be.

    Raises:
        BuildError: It cannot be built, or failed its test.
    """
    mlx = Path(mx.__file__).parent
    links = ("-L", str(mlx / "lib"), "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}")
    flags = (*PRIMITIVE_FLAGS, f"-I{mlx / 'include'}")
    return _library("primitive", "primitive", (*flags, *links), _mlx_identity())


def kernels(source: str, test: Sequence[str], **defines: str | int) -> Path:
    """Return the library of some kernels, built if need be.

    Args:
        source: Name of a file in ``cpu/``, without its suffix.
        test: What ``self_test`` takes after the two libraries.
        defines: What it is compiled for.

    Raises:
        BuildError: It cannot be built, or failed its test.
    """
    name = "-".join(map(str, (source, *defines.values()))).lower()
    flags = (*KERNEL_FLAGS, *_processor_flags(), *(f"-D{key}={defines[key]}" for key in defines))
    # It is tested through the primitives, and so lies beside those of the same MLX.
    return _library(name, source, flags, _mlx_identity(), (str(primitive()), *test))


def index() -> Path:
    """Return the library of loops over index arrays, built if need be.

    Raises:
        BuildError: It cannot be built, or failed its test.
    """
    flags = (*KERNEL_FLAGS, *_processor_flags())
    return _library("index", "index", flags, _mlx_identity(), ("index",))


def built_index() -> Path | None:
    """Return the same if it has been built: nothing is compiled."""
    try:
        path = _path("index", (*KERNEL_FLAGS, *_processor_flags()), _mlx_identity())
        return path if path.exists() else None
    except (BuildError, OSError):
        return None


def cache_folder() -> Path:
    """Return the folder of all libraries, made if need be, which nobody else may write to.

    Raises:
        BuildError: It cannot be made, or others may write to it: they could put code there.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base.absolute() / "mlx_sparse_nn"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError) as error:
        raise BuildError(f"the cache folder cannot be made: {error}") from error
    if state.st_uid not in (0, os.getuid()) or state.st_mode & 0o022:
        raise BuildError(f"others may write to {folder}: chmod 700 it, or set XDG_CACHE_HOME")
    return folder


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, else the first that is found.

    Raises:
        BuildError: None is found.
    """
    import shlex
    import shutil

    wanted = os.environ.get("CXX")
    try:
        commands = [shlex.split(wanted)] if wanted else [[name] for name in COMPILERS]
    except ValueError as error:
        raise BuildError(f"CXX={wanted} is no command: {error}") from error
    for command in commands:
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    looked = f"CXX={wanted}" if wanted else ", ".join(COMPILERS)
    raise BuildError(
        f"no C++ compiler was found (looked for {looked}). Install one, as by "
        "'apt-get install g++', or name it in CXX"
    )


def _library(
    name: str, source: str, flags: Sequence[str], identity: str, test: Sequence[str] = ()
) -> Path:
    """Return the library of a source and flags; built, tested and renamed if it is not there."""
    try:
        path = _path(name, flags, identity)
        if path.exists():
            return path
    except OSError as error:
        raise BuildError(f"{name} cannot be read: {error}") from error
    import tempfile

    with _locks[path]:
        if path.exists():
            return path
        bad = path.with_suffix(".bad")
        if bad.exists():
            reason = bad.read_text(encoding="utf-8")
            raise BuildError(f"{reason} (noted in {bad}; delete that file to try again)")
        command = compiler()
        _say(f"compiling {name} for this CPU with {Path(command[0]).name}, once")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
                made = Path(folder) / path.name
                file = str(SOURCES / f"{source}.cpp")
                _compile([*command, f"-I{SOURCES}", file, *flags, "-o", str(made)])
                if not made.exists():
                    raise BuildError(f"{' '.join(command)} made no {path.name}")
                failure, is_final = _self_test([*test[:1], str(made), *test[1:]], folder)
                if failure:
                    reason = f"{name} failed its test: {failure}"
                    if is_final:
                        bad.write_text(reason, encoding="utf-8")
                    raise BuildError(reason)
                made.replace(path)
        except OSError as error:
            raise BuildError(f"{name} cannot be built: {error}") from error
    return path


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # who closed stderr wants to hear nothing
        print(f"[mlx_sparse_nn] {text}", file=sys.stderr, flush=True)


def _compile(command: list[str]) -> None:
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise BuildError(f"{' '.join(command)} failed:\n{last}")


def _self_test(arguments: Sequence[str], folder: str) -> tuple[str, bool]:
    """Test a library in a process of its own.

    Returns:
        What went wrong, or an empty string; and whether that is the library's fault. A process may
        also be ended by somebody else, as by Ctrl-C.
    """
    import signal
    import subprocess

    command = [sys.executable, "-m", SELF_TEST, *arguments]
    paths = os.pathsep.join(str(path) or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            env=environment,
            timeout=SELF_TEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {SELF_TEST_SECONDS} s", False
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"it was ended by {name}", name in _FAULTS
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return lines[-1], True
    return "", False


def _path(name: str, flags: Sequence[str], identity: str) -> Path:
    """Return where a library lies: by all that it depends on, and by what it is compiled for.

    The compiler has a level of its own. Where there is none, as in the image of a container, a
    library counts that any compiler made.
    """
    common = [flag for flag in flags if not flag.startswith("-D")]
    folder = cache_folder() / _key([*_sources(), *common, _processor(), identity])
    try:
        return folder / _key(_compiler_identity()) / f"{name}.so"
    except BuildError:
        made = sorted(folder.glob(f"*/{name}.so"))
        if not made:
            raise
        return made[0]


def _key(parts: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _sources() -> tuple[str, ...]:
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return tuple(file.read_text(encoding="utf-8") for file in files)


def _compiler_identity() -> list[str]:
    """Return the compiler's command, and what changes when another version is installed."""
    command = compiler()
    file = Path(command[0]).resolve()
    return [*command, str(file), *_stamp(file)]


@cache
def _mlx_identity() -> str:
    lib = Path(mx.__file__).parent / "lib"
    found = sorted(lib.glob("libmlx.*"))
    if not found:
        raise BuildError(f"MLX has no library in {lib}")
    return " ".join([MLX_VERSION, str(found[0]), *_stamp(found[0])])


def _stamp(file: Path) -> tuple[str, str]:
    state = file.stat()
    return str(state.st_size), str(state.st_mtime_ns)


@cache
def _processor() -> str:
    """Return what ``-march=native`` stands for: the features of the first core."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            core = list(takewhile(str.strip, file))
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "CPU implementer", "CPU part", "vendor_id", "cpu family", "model")
    return "".join(line for line in core if line.split("\t")[0].split(":")[0].strip() in names)


def _processor_flags() -> tuple[str, ...]:
    return ("-mcpu=native",) if platform.machine() == "aarch64" else ("-march=native",)
