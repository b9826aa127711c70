"""Which arrays of a kernel stay in memory, by the clang of the ziglang wheel for this processor.

A GPU's registers have no addresses. An array that each thread owns is in registers only if every
index into it is known when the kernel is compiled, so each loop over it has to be unrolled. This
compiler unrolls what ``#pragma unroll`` says and nothing else: the answer hangs on the text, not on
what a loop costs by the thresholds of one version of LLVM.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ziglang
from metal_emulator.compile import cache_folder

from .translate import CompileError, Translation, translate

AT_ONCE = 50  # variants in one run of the compiler: each costs 30 ms, and a run half a second
SHIM = Path(__file__).parent / "shim"
FLAGS = [
    *("-std=c++23", "-O2", "-g0", "-w", "-S", "-emit-llvm", "-fno-exceptions", "-fno-rtti"),
    *("-nostdinc", "-nostdinc++", "-fno-vectorize", "-fno-slp-vectorize", "-ffp-contract=off"),
    "-fno-unroll-loops",  # but those that `#pragma unroll` names
]
FUNCTION = re.compile(r"^define [^\n]*@variant_(\d+)\(.*?^}", re.MULTILINE | re.DOTALL)
ALLOCA = re.compile(r"= alloca ([^\n]*?), align")


@dataclass(frozen=True)
class Variant:
    """A kernel with template arguments, as MLX would compile it.

    Attributes:
        name: the kernel's.
        source: the text that MLX generates.
        template: the template arguments, to tell variants apart in messages.
    """

    name: str
    source: str
    template: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(f'{n}={v}' for n, v in self.template)}>"


def arrays_in_memory(variants: Sequence[Variant]) -> dict[Variant, list[str]]:
    """Compiles variants, on all cores, and returns those with arrays left in memory.

    Args:
        variants: of any kernels. Those of one kernel are compiled together, if they are neighbours.

    Returns:
        LLVM's types of the arrays, and of the structs and vectors, that stay in a thread's own
        memory. Variants that leave none are left out.

    Raises:
        CompileError: with the compiler's diagnostics.
    """
    kernels: dict[str, list[Variant]] = {}
    for variant in variants:
        kernels.setdefault(variant.name, []).append(variant)
    units = [
        same[first : first + AT_ONCE]
        for same in kernels.values()
        for first in range(0, len(same), AT_ONCE)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [pair for pairs in pool.map(_of_unit, units) for pair in pairs]
    return {variant: arrays for variant, arrays in found if arrays}


def _of_unit(variants: Sequence[Variant]) -> list[tuple[Variant, list[str]]]:
    llvm = compile_to_llvm(_unit(variants))
    found = {int(m.group(1)): ALLOCA.findall(m.group()) for m in FUNCTION.finditer(llvm)}
    if set(found) != set(range(len(variants))):
        raise CompileError("the compiler's output lacks some of the variants")
    return [(variant, found[n]) for n, variant in enumerate(variants)]


def _unit(variants: Sequence[Variant]) -> str:
    """One translation unit of all variants; texts that are alike are there once."""
    spaces: dict[str, int] = {}
    entries = []
    for number, variant in enumerate(variants):
        t = translate(variant.source)
        space = spaces.setdefault(t.text, len(spaces))
        entries.append(_entry(t, f"text_{space}", number))
    texts = [f"namespace text_{n} {{\n{text}\n}}\n" for text, n in spaces.items()]
    return '#include "metal.h"\n' + "".join(texts) + "\n".join(entries) + "\n"


def _entry(t: Translation, space: str, number: int) -> str:
    arguments = ", ".join(
        f"plain::Argument{{buffers[{i}]}}" if p.is_buffer else f"attributes->{p.name}"
        for i, p in enumerate(t.signature.parameters)
    )
    return (
        f'extern "C" __attribute__((flatten)) void variant_{number}('
        "const void* const* buffers, const plain::Attributes* attributes) "
        f"{{ {space}::{t.signature.instance}({arguments}); }}"
    )


def compile_to_llvm(unit: str) -> str:
    """Compiles C++ to LLVM IR, once."""
    shim = (SHIM / "metal.h").read_text()
    key = "\0".join([unit, shim, version("ziglang"), *FLAGS])
    output = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.ll"
    if not output.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            path, made = Path(folder, "kernels.cpp"), Path(folder, "kernels.ll")
            path.write_text(unit)
            compiler = Path(ziglang.__file__).with_name("zig")
            zig = str(cache_folder() / "zig")
            result = subprocess.run(
                [str(compiler), "c++", *FLAGS, "-I", str(SHIM), "-o", str(made), str(path)],
                env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig},
                capture_output=True,
                text=True,
            )
            if result.returncode:
                raise CompileError(result.stderr[:4000])
            os.replace(made, output)
    return output.read_text()
