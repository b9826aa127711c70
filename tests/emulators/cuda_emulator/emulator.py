"""A stand-in for ``mx.fast.cuda_kernel``: compiles a kernel against ``cuda.h``, and runs it."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import metal_emulator.compile as compiler
import mlx.core as mx
import numpy as np
from support import computing, computing_strings, fresh_launches

from mlx_sparse_nn.core import tuned
from mlx_sparse_nn.core.backends import cuda, cuda_tiles, launch, pauli_cuda, pauli_plain, plain

MODEL = Path(__file__).with_name("cuda.h")
FLAGS = ["-O1", "-Wno-everything"]
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint8: "unsigned char",
    mx.uint32: "unsigned",
}
SHARED = '__attribute__((visibility("default")))'  # with Python


class CudaFault(Exception):
    """A kernel did what is undefined, or waited for ever."""


@dataclass
class Emulation:
    """How kernels are run, and what they did.

    Attributes:
        seed: Of the order in which warps run and copies land.
        offset: Elements by which floating inputs lie off a 16-byte boundary.
        tf32: Whether MLX's own float32 products round to TF32, as they do by default.
        edit: A text of a kernel's body and what to replace it by, to see a fault found: in each
            kernel that has it, and one has to.
        is_edited: Whether one had.
        names: The kernels that were launched.
        conflicts: Of banks of shared memory, in ldmatrix.
    """

    seed: int = 1
    offset: int = 0
    tf32: bool = True
    edit: tuple[str, str] | None = None
    is_edited: bool = False
    names: list[str] = field(default_factory=list)
    conflicts: int = 0


@contextmanager
def emulated(architecture: str = "sm_90", **settings: Any) -> Iterator[Emulation]:
    """Run the CUDA kernels of all products on the emulator, as a GPU of that architecture.

    The settings are those of :class:`Emulation`.
    """
    emulation = Emulation(**settings)
    with (
        fresh_launches(),
        computing(cuda, plain),
        computing_strings(pauli_cuda, pauli_plain),
        mock.patch.object(mx.fast, "cuda_kernel", functools.partial(_Kernel, emulation)),
        mock.patch.object(cuda_tiles, "architecture", return_value=architecture),
        mock.patch.object(cuda_tiles, "allows_tf32", return_value=emulation.tf32),
    ):
        yield emulation
    if emulation.edit and not emulation.is_edited:
        raise ValueError(f"{emulation.names} have no text {emulation.edit[0]!r}")


class _Buffer(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_int),
        ("shared_memory", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("n_buffers", ctypes.c_int),
        ("buffers", _Buffer * 8),
        ("conflicts", ctypes.c_long),
        ("fault", ctypes.c_char * 256),
    )


@dataclass
class _Kernel:
    """What ``mx.fast.cuda_kernel`` returns."""

    emulation: Emulation
    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str
    shared_memory: int

    def __post_init__(self) -> None:
        self.source, self.header = in_full(self.source), in_full(self.header)

    def __call__(
        self,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]:
        emulation = self.emulation
        emulation.names.append(self.name.removeprefix("mlx_sparse_nn_"))
        library = _compiled(self.name, self._text(inputs, output_dtypes, template))
        launch = _Launch(
            seed=emulation.seed, threads=threadgroup[0], shared_memory=self.shared_memory
        )
        launch.grid[:] = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
        launch.n_buffers = len(inputs)
        kept = []
        for i, (name, array) in enumerate(zip(self.input_names, inputs, strict=True)):
            host = _placed(array, emulation.offset if array.dtype in tuned.KERNEL_DTYPES else 0)
            kept.append(host)
            begin = host.ctypes.data
            launch.buffers[i] = _Buffer(begin, begin + host.nbytes)
            ctypes.c_void_p.in_dll(library, f"in_{name}").value = begin
            (ctypes.c_int * 8).in_dll(library, f"{name}_shape")[: array.ndim] = array.shape
            ctypes.c_int.in_dll(library, f"{name}_ndim").value = array.ndim
        outputs = []
        for name, shape, dtype in zip(self.output_names, output_shapes, output_dtypes, strict=True):
            bits = {2: np.uint16, 4: np.uint32}[dtype.size]
            outputs.append(np.full(shape, np.iinfo(bits).max, bits))  # NaN
            ctypes.c_void_p.in_dll(library, f"out_{name}").value = outputs[-1].ctypes.data
        library.run(ctypes.byref(launch))
        if launch.fault:
            raise CudaFault(f"[{self.name}] {launch.fault.decode()}")
        emulation.conflicts += launch.conflicts
        return [mx.array(a).view(dtype) for a, dtype in zip(outputs, output_dtypes, strict=True)]

    def _text(
        self,
        inputs: list[mx.array],
        output_dtypes: list[mx.Dtype],
        template: list[tuple[str, Any]],
    ) -> str:
        """Return a translation unit with the kernel as the function ``body``."""
        lines = [MODEL.read_text(encoding="utf-8"), _without_ptx(self.header), 'extern "C" {']
        for name, array in zip(self.input_names, inputs, strict=True):
            lines.append(f"{SHARED} const {TYPES[array.dtype]}* in_{name};")
            lines.append(f"{SHARED} int {name}_shape[8], {name}_ndim;")
        for name, dtype in zip(self.output_names, output_dtypes, strict=True):
            lines.append(f"{SHARED} {TYPES[dtype]}* out_{name};")
        lines += ["}", "static void body() {"]
        lines += [f"auto* const {name} = in_{name};" for name in self.input_names]
        lines += [f"auto* const {name} = out_{name};" for name in self.output_names]
        for key, value in template:
            of_type = isinstance(value, mx.Dtype)
            lines.append(
                f"using {key} = {TYPES[value]};" if of_type else f"const int {key} = {value};"
            )
        body = re.sub(r"extern __shared__ .*\n", "", self.source)
        if self.emulation.edit and self.emulation.edit[0] in body:
            self.emulation.is_edited = True
            body = body.replace(*self.emulation.edit)
        return "\n".join([*lines, body, "}", ""])


def _placed(array: mx.array, offset: int) -> np.ndarray:
    """Return a copy of ``array`` as bits, ``offset`` elements after a 16-byte boundary."""
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.itemsize]
    host = np.array(mx.contiguous(array).view(bits)).reshape(-1)
    space = np.empty(host.nbytes + 64, np.uint8)
    begin = -space.ctypes.data % 16 + offset * host.itemsize
    placed = space[begin : begin + host.nbytes].view(host.dtype)
    placed[:] = host
    return placed


def in_full(code: str) -> str:
    """Return code with the files of the package that it includes, each without comments."""

    def text(match: re.Match) -> str:
        included = Path(match[1]).read_text(encoding="utf-8")
        return launch._short(re.sub(r'#include ".+"\n|#pragma once\n', "", included))

    return re.sub(r'#include "(/.+)"\n', text, code)


def _without_ptx(header: str) -> str:
    """Return headers without what is written in PTX, for which ``cuda.h`` has a model."""
    header = re.sub(r"#(include|undef|define __global__).*\n", "", header)
    header = re.sub(r"#define (?:.*\\\n)*.*\n|^WARPGROUP_\d.*\n", "", header, flags=re.MULTILINE)
    kept, at = [], 0
    for match in re.finditer(r"(template <[^\n]*>\n)?__device__ __forceinline__ [^;{]*\{", header):
        if match.start() < at:
            continue
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(header[end], 0)
            end += 1
        kept.append(header[at : match.start()])
        if "asm" not in (function := header[match.start() : end]):
            kept.append(function)
        at = end
    return "".join([*kept, header[at:]])


@functools.cache
def _compiled(name: str, text: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(compiler.build(text, FLAGS)))
    except compiler.CompileError as error:
        raise compiler.CompileError(f"[{name}] does not compile:\n{error}") from None
