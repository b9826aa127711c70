"""The CPU's kernels without MLX: small programs that run drawn cases against naive loops.

They are built for other processors than this one, which an emulator runs, and with sanitizers,
which see what no result shows: memory that is not the kernel's, and threads that race.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_sparse_nn.core.backends import build

DRIVERS = Path(__file__).parent / "cpu_driver"
DRIVER_OF = {"quantized": "quantized_products.cpp", "pauli": "pauli_products.cpp"}
CASES, EMULATED_CASES = 40, 12

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="needs the compilers and the emulator of Linux on x86-64; CI has them",
)


class Kernel(NamedTuple):
    """What is tested: a source, as it is compiled for users."""

    source: str
    element: str
    size: int  # of a block, 0 for any at run time; or the bits of quantized ones

    def __str__(self) -> str:
        return f"{self.source}-{self.element}-{self.size}"


FLOATS = Kernel("scalars", "float", 1)
COMPLEX = Kernel("scalars", "complex64", 1)
BLOCKS = Kernel("blocks", "float", 8)
ANY_SIDE = Kernel("blocks", "float", 0)
NARROW = Kernel("blocks", "bfloat16", 16)
FOUR_BITS = Kernel("quantized", "float", 4)
FIVE_BITS = Kernel("quantized", "bfloat16", 5)
HALF = Kernel("blocks", "float16", 4)
STRINGS = Kernel("pauli", "float", 0)
SOME = [FLOATS, COMPLEX, BLOCKS, ANY_SIDE, NARROW, FOUR_BITS, FIVE_BITS, STRINGS]
KERNELS = [
    *SOME,
    HALF,
    Kernel("quantized", "float16", 2),
    Kernel("quantized", "float", 3),
    Kernel("quantized", "float", 6),
    Kernel("quantized", "bfloat16", 8),
    Kernel("scalars", "float16", 1),
    Kernel("blocks", "float", 32),
    Kernel("blocks", "double", 8),
    Kernel("pauli", "double", 0),
]


class Tools(NamedTuple):
    """How a program is compiled and run, and what installs what that takes."""

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    run: tuple[str, ...] = ()
    package: str = "g++"


GCC = ("g++",)
STRICT = ("-O2", "-Wall", "-Wextra", "-Werror")
NATIVE = Tools(GCC, (*STRICT, "-march=native"))
NO_AVX = Tools(GCC, (*STRICT, "-march=x86-64-v2"))
AVX2 = Tools(GCC, (*STRICT, "-march=x86-64-v3"))
CLANG = Tools(
    (sys.executable, "-m", "ziglang", "c++"),
    (*STRICT, "-target", "x86_64-linux-gnu", "-mcpu=native"),
)
# Sanitizers make GCC warn of what is not there.
SANITIZED = ("-O1", "-march=native", "-fno-sanitize-recover")
ADDRESS = Tools(GCC, (*SANITIZED, "-fsanitize=address,undefined"))
THREAD = Tools(GCC, (*SANITIZED, "-fsanitize=thread"))
ARM = Tools(
    ("aarch64-linux-gnu-g++",),
    (*STRICT, "-static"),
    ("qemu-aarch64",),
    "g++-aarch64-linux-gnu qemu-user",
)


def command(tools: Tools, program: tuple[str, ...]) -> list[str]:
    """Return a command of which the first word is a file that is there."""
    path = shutil.which(program[0])
    if path is None:
        pytest.fail(f"{program[0]} is missing: apt-get install {tools.package}")
    return [path, *program[1:]]


def compile_(words: list[str]) -> None:
    """Run a compiler, and fail with what it says."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(words)}\n{done.stderr[-4000:]}")


def drive(kernel: Kernel, tools: Tools, folder: Path, sources: Path = build.SOURCES):
    """Compile a kernel and its driver, run it, and return what became of it."""
    driver = DRIVER_OF.get(kernel.source, "products.cpp")
    size = f"-D{'BITS' if kernel.source == 'quantized' else 'BLOCK'}={kernel.size}"
    defines = [f"-DELEMENT={kernel.element}", size, f"-I{sources}"]
    compiler = command(tools, tools.compiler)
    objects = []
    for source in (DRIVERS / driver, sources / f"{kernel.source}.cpp"):
        objects.append(str(folder / f"{source.stem}.o"))
        words = [*compiler, "-std=c++17", *tools.flags, *defines, "-c", str(source)]
        compile_([*words, "-o", objects[-1]])
    # Zig would build a C++ library to link with, which nothing here needs.
    linker = command(NATIVE, GCC) if tools is CLANG else [*compiler, *tools.flags]
    program = str(folder / "driver")
    compile_([*linker, *objects, "-pthread", "-o", program])
    runner = command(tools, tools.run) if tools.run else []
    cases = str(EMULATED_CASES if runner else CASES)
    return subprocess.run(
        [*runner, program, cases, "1"], capture_output=True, text=True, timeout=300
    )


def check(kernel: Kernel, tools: Tools, folder: Path) -> None:
    done = drive(kernel, tools, folder)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


class TestOnThisProcessor:
    @pytest.mark.parametrize(
        "kernel",
        [FLOATS, COMPLEX, BLOCKS, ANY_SIDE, NARROW, FOUR_BITS, FIVE_BITS, STRINGS],
        ids=str,
    )
    def test_memory(self, kernel, tmp_path):
        check(kernel, ADDRESS, tmp_path)

    @pytest.mark.parametrize("kernel", [FLOATS, BLOCKS, NARROW, FOUR_BITS, STRINGS], ids=str)
    def test_threads(self, kernel, tmp_path):
        check(kernel, THREAD, tmp_path)

    @pytest.mark.needs("ziglang")
    @pytest.mark.parametrize("kernel", [FLOATS, BLOCKS, FIVE_BITS, STRINGS], ids=str)
    def test_another_compiler(self, kernel, tmp_path):
        check(kernel, CLANG, tmp_path)


class TestOnOtherProcessors:
    @pytest.mark.parametrize("kernel", [*SOME, HALF], ids=str)
    def test_without_avx(self, kernel, tmp_path):
        check(kernel, NO_AVX, tmp_path)

    @pytest.mark.skipif("avx2" not in build._processor(), reason="this processor has no AVX2")
    @pytest.mark.parametrize("kernel", [FLOATS, NARROW, FOUR_BITS, FIVE_BITS, STRINGS], ids=str)
    def test_avx2(self, kernel, tmp_path):
        check(kernel, AVX2, tmp_path)

    @pytest.mark.needs("aarch64-linux-gnu-g++", "qemu-aarch64")
    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    def test_arm(self, kernel, tmp_path):
        check(kernel, ARM, tmp_path)


@pytest.mark.parametrize("tools", [THREAD, ADDRESS], ids=["threads", "memory"])
def test_the_pool(tmp_path, tools):
    """Several threads use it at once, awake and asleep."""
    program = str(tmp_path / "driver")
    words = [*command(tools, tools.compiler), "-std=c++17", *tools.flags, f"-I{build.SOURCES}"]
    source = str(DRIVERS / "pool_users.cpp")
    compile_([*words, source, "-pthread", "-o", program])
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("file", "right", "wrong", "kernel", "tools", "says"),
    [
        ("scalars.cpp", "() < Bits(end - j)", "() <=Bits(end - j)", FLOATS, NATIVE, "is"),
        (
            "scalars.cpp",
            "end + G <= n_blocks",
            "end + 0 <= n_blocks",
            FLOATS,
            ADDRESS,
            "AddressSanitizer",
        ),
        ("share.h", "cut(i + 1)", "cut(i + 0)", BLOCKS, NATIVE, "gave other bits"),
        ("quantized.cpp", "LANE * BITS % 8", "LANE * BITS % 9", FIVE_BITS, NATIVE, "is"),
        ("vectors.h", "bits + 0x7FFF", "bits + 0x8000", NARROW, NO_AVX, "is"),
        (
            "blocks.cpp",
            "s + SLICE, n_cols",
            "s + SLICE, whole",
            BLOCKS,
            ADDRESS,
            "AddressSanitizer",
        ),
        ("blocks.cpp", "(before == 0)", "(before < 0)", BLOCKS, NATIVE, "is"),
        ("copy.h", "n - T);", "n - 1);", BLOCKS, ADDRESS, "AddressSanitizer"),
        ("pauli.cpp", "~(lane ^ lanes)", "~(lane | lanes)", STRINGS, NATIVE, "is"),
        ("pauli.cpp", "p.size >= SPAN", "p.size >= 1", STRINGS, ADDRESS, "AddressSanitizer"),
    ],
    ids=[
        "a term too many",
        "memory of others",
        "a piece too few",
        "a wrong shift",
        "rounding to odd",
        "x past the matrix",
        "a weight past the matrix",
        "a tile past the last",
        "the sign of another lane",
        "a state smaller than a span",
    ],
)
def test_a_fault_is_found(tmp_path, file, right, wrong, kernel, tools, says):
    sources = tmp_path / "cpu"
    shutil.copytree(build.SOURCES, sources)
    text = (sources / file).read_text(encoding="utf-8")
    assert right in text
    (sources / file).write_text(text.replace(right, wrong), encoding="utf-8")
    done = drive(kernel, tools, tmp_path, sources)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
