"""The commands of ``python -m mlx_sparse_nn``: ``info``, ``check``, ``build``, ``calibrate``."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from mlx_sparse_nn import __version__
from mlx_sparse_nn.calibration import command as calibration
from mlx_sparse_nn.core.backends import build, cpu, cuda, metal, pauli_cpu
from mlx_sparse_nn.core.cores import n_cores
from mlx_sparse_nn.core.quantized import BITS
from mlx_sparse_nn.diagnostics import check

_DTYPES = {name: getattr(mx, name) for name in ("float32", "bfloat16", "float16", "float64")}
_SIZES = (*cpu.OWN_KERNELS, 3)  # 3 stands for all other sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlx_sparse_nn")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "say which backend computes on each device, and why"
    commands.add_parser("info", help=about, description=about)
    checking = commands.add_parser("check", help="are the kernels right here, and fast?")
    check.add_options(checking)
    about = "compile the CPU's kernels now, not at first use"
    building = commands.add_parser("build", help=about, description=about)
    building.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=list(_DTYPES), help="(default: all)"
    )
    calibrating = commands.add_parser("calibrate", help="make a model of mlx-lm sparse, by text")
    calibration.add_options(calibrating)
    options = parser.parse_args(arguments)
    if options.command == "calibrate":
        return calibration.run(options)
    if options.command == "check":
        return check.run(options, __version__)
    return print_info() if options.command == "info" else build_all(options.dtypes)


def print_info() -> int:
    """Print which backend computes on each device, and why."""
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    print(f"mlx_sparse_nn {__version__}, MLX {build.MLX_VERSION}, {python}")
    if reason := cpu.why_not():
        print(f"CPU: plain, MLX's own operations ({reason})")
    else:
        print(f"CPU: cpu, C++ kernels on {n_cores()} threads")
        print(f"     compiled at first use into {build.cache_folder()}")
        for bad in sorted(build.cache_folder().rglob("*.bad")):
            print(f"     plain for one: {bad.read_text(encoding='utf-8')} ({bad}; delete to retry)")
    gpus = [backend.NAME for backend in (metal, cuda) if backend.is_available()]
    print(f"GPU: {gpus[0]}, and plain for what has no kernel" if gpus else "GPU: none in this MLX")
    return 0


def build_all(dtypes: Sequence[str]) -> int:
    """Compile the kernels of some dtypes, several at once, and print what was done."""
    start = time.perf_counter()
    wanted = [(_DTYPES[name], size) for name in dtypes for size in (1, *_SIZES)]
    if "float32" in dtypes:
        wanted.append((mx.complex64, 1))
    quantized = [(_DTYPES[name], bits) for name in dtypes if name != "float64" for bits in BITS]
    elements = [pauli_cpu.ELEMENTS[_DTYPES[name]] for name in dtypes if name.endswith(("32", "64"))]
    threads = ThreadPoolExecutor(n_cores())
    try:
        paths = [build.primitive(), build.index()]
        products = threads.map(lambda kind: cpu.library(*kind), wanted)
        packed = threads.map(lambda kind: cpu.quantized_library(*kind), quantized)
        strings = threads.map(pauli_cpu.library, elements)
        paths += [*products, *packed, *strings]
    except build.BuildError as error:
        print(f"[mlx_sparse_nn] {error}", file=sys.stderr)
        return 1
    finally:
        threads.shutdown(cancel_futures=True)
    size, seconds = sum(path.stat().st_size for path in paths) / 1e6, time.perf_counter() - start
    print(f"{len(paths)} libraries ({size:.1f} MB) lie in {build.cache_folder()}: {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
