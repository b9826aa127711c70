"""Registers, instructions and waits of a kernel, as clang 19 compiles its text for an AMD GPU.

Nobody outside Apple sees what Apple's compiler makes of a kernel. It is LLVM, as clang is: clang's
output for gfx1030, whose simdgroups have 32 lanes too, shows what LLVM may do with the text. It is
compared with that of other texts, not with a measurement.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import pairwise

from .host import SHIM
from .translate import CompileError, translate

COMPILER = "clang-19"
FLAGS = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-O3", "-w", "-S"]
CXX_FLAGS = [
    *("-x", "c++", "-std=c++23", "-nostdinc", "-nostdinc++", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-emit-llvm", "-Xclang", "-disable-llvm-passes"),
]
# Where a thread is, in AMD's words.
ATTRIBUTES = {
    "threadgroup_position_in_grid": "uint3{__builtin_amdgcn_workgroup_id_x(), "
    "__builtin_amdgcn_workgroup_id_y(), __builtin_amdgcn_workgroup_id_z()}",
    "threadgroups_per_grid": "uint3{groups_x, groups_y, groups_z}",
    "thread_index_in_threadgroup": "__builtin_amdgcn_workitem_id_x()",
    "thread_index_in_simdgroup": "lane()",
    "simdgroup_index_in_threadgroup": "uint(__builtin_amdgcn_readfirstlane("
    "__builtin_amdgcn_workitem_id_x() / 32))",
}
LABEL = re.compile(r"^(?:\.LBB\d+_\d+|; %bb\.\d+):", re.MULTILINE)
PRODUCT = re.compile(r"; PRODUCT")
DEVICE_LOAD = re.compile(r"^(global_load|flat_load|buffer_load|s_load|s_buffer_load)")
FMA = re.compile(r"^v_(pk_)?(fma|mac|fmac|mad|dot)\w*_f(16|32)|^v_fma_mix|^v_dual_fmac")


@dataclass(frozen=True)
class Loop:
    """The innermost loop that reads device memory and multiplies: a stage, or a stored block.

    Attributes:
        products: 8x8x8 products; 0 for kernels of scalars.
        instructions: all others, of one turn; loops inside count once.
        fmas: scalar multiply-accumulates of the instructions.
        loads: from device memory.
        waits: how often a thread waits for device memory: runs of loads that a wait ends.
        has_loops: whether loops inside it are left, whose turns no compiler knows.
    """

    products: int
    instructions: int
    fmas: int
    loads: int
    waits: int
    has_loops: bool


@dataclass(frozen=True)
class Compiled:
    """What clang says of one kernel.

    Attributes:
        registers: 32-bit vector registers of a thread.
        scratch: bytes of a thread's own memory, where arrays and spilled registers are.
        threadgroup_memory: bytes.
        loop: where the kernel spends its time, or None where it has no such loop.
        assembly: clang's output.
    """

    registers: int
    scratch: int
    threadgroup_memory: int
    loop: Loop | None
    assembly: str


def is_available() -> bool:
    """Whether clang 19 is installed: `apt install clang-19` on Debian and Ubuntu."""
    return shutil.which(COMPILER) is not None


def compile_for_gcn(source: str, threads: int) -> Compiled:
    """Compiles the Metal source that MLX generated for one call.

    Args:
        source: header, signature and body.
        threads: of a threadgroup, which bound the registers.

    Raises:
        FileNotFoundError: without clang 19.
        CompileError: with the compiler's diagnostics.
    """
    if not is_available():
        raise FileNotFoundError(
            f"[metal_compiler] {COMPILER} must be installed, got none; "
            "on Debian and Ubuntu: apt install clang-19"
        )
    llvm = _clang(_unit(source), *CXX_FLAGS, "-I", str(SHIM))
    # C++ has no word for the size of a threadgroup, by which registers are shared out.
    (number,) = re.findall(r"amdgpu_kernel void @variant\(.*\) #(\d+)", llvm)
    group = f"attributes #{number} = {{ "
    bounds = f'"amdgpu-flat-work-group-size"="{threads},{threads}" '
    text = _clang(llvm.replace(group, group + bounds), "-x", "ir")
    value = lambda name: int(re.findall(rf"; {name}: (\d+)", text)[-1])
    return Compiled(
        value("NumVgprs"), value("ScratchSize"), value("LDSByteSize"), _main_loop(text), text
    )


def _clang(text: str, *flags: str) -> str:
    """Compiles text from the standard input to text."""
    command = [COMPILER, *FLAGS, *flags, "-", "-o", "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(result.stderr[:4000])
    return result.stdout


def _unit(source: str) -> str:
    t = translate(source)
    parameters, arguments = [], []
    for i, p in enumerate(t.signature.parameters):
        if p.is_buffer:
            space = 4 if p.name in t.constants else 1
            parameters.append(f"const ADDRESS_SPACE({space}) void* buffer_{i}")
            arguments.append(f"plain::Argument{{(const void*)buffer_{i}}}")
        else:
            arguments.append(ATTRIBUTES[p.name])
    parameters += ["uint groups_x", "uint groups_y", "uint groups_z"]
    return (
        f'#include "metal.h"\n{t.text}\nextern "C" __attribute__((amdgpu_kernel, flatten)) '
        f"void variant({', '.join(parameters)}) "
        f"{{ {t.signature.instance}({', '.join(arguments)}); }}\n"
    )


@dataclass
class _Block:
    """A basic block: its instructions, the loops that it is in, and the one it begins, if any."""

    code: list[str]
    loops: set[str]
    begins: str | None


def _blocks(text: str) -> list[_Block]:
    body = text[text.index("\nvariant:") : text.rindex("s_endpgm")]
    starts = [*[m.start() for m in LABEL.finditer(body)], len(body)]
    blocks = []
    for start, end in pairwise(starts):
        # The comment names the innermost loop; that of a loop's first block, all loops around it.
        label, _, code = body[start:end].partition("\n\t")
        loops = set(re.findall(r"(?:Parent Loop |Header=)(BB\d+_\d+)", label))
        begins = label[2 : label.index(":")] if "Loop Header" in label else None
        lines = [line.strip() for line in ("\t" + code).splitlines() if line.startswith("\t")]
        code = [line for line in lines if PRODUCT.match(line) or not line.startswith((";", "."))]
        blocks.append(_Block(code, loops | ({begins} if begins else set()), begins))
    around = {block.begins: block.loops for block in blocks if block.begins}
    for block in blocks:
        block.loops = block.loops.union(*(around[loop] for loop in block.loops))
    return blocks


def _main_loop(text: str) -> Loop | None:
    """Returns the smallest loop that reads device memory and multiplies, matrices if any does."""
    blocks = _blocks(text)
    names = {block.begins for block in blocks if block.begins}
    loops = [[block for block in blocks if name in block.loops] for name in names]
    code = lambda loop: [line for block in loop for line in block.code]
    reads = lambda loop: any(DEVICE_LOAD.match(line) for line in code(loop))
    for multiplies in (PRODUCT, FMA):
        found = [loop for loop in loops if reads(loop) and any(map(multiplies.match, code(loop)))]
        if found:
            loop = min(found, key=lambda loop: len(code(loop)))
            return _count(code(loop), sum(block.begins is not None for block in loop) > 1)
    return None


def _count(code: list[str], has_loops: bool) -> Loop:
    count = lambda pattern: sum(bool(pattern.match(line)) for line in code)
    products = count(PRODUCT)
    return Loop(
        products=products,
        instructions=len(code) - products,
        fmas=count(FMA),
        loads=count(DEVICE_LOAD),
        waits=_waits(code),
        has_loops=has_loops,
    )


def _waits(code: list[str]) -> int:
    """Counts the runs of loads that a wait ends, in one turn of a loop, the second.

    Loads that are waited for after products cost nothing: they were on their way meanwhile.
    """
    waits = 0
    vector = scalar = False  # loads are on their way
    for _ in range(2):
        waits = 0
        for line in code:
            if DEVICE_LOAD.match(line):
                scalar |= line.startswith("s_")
                vector |= not line.startswith("s_")
            elif PRODUCT.match(line):
                vector = scalar = False
            elif line.startswith("s_waitcnt"):
                for_vector = vector and "vmcnt" in line
                for_scalar = scalar and "lgkmcnt(0)" in line
                waits += for_vector or for_scalar
                vector, scalar = vector and not for_vector, scalar and not for_scalar
    return waits
