"""One launch of a compiled kernel on host memory: the runtime's structures, counts and faults."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .compile import load_kernel, runtime

SCHEDULES = ("forward", "backward", "random")
FAULTS = (
    "none",
    "out of bounds",
    "misaligned",
    "read-only",
    "uninitialised",
    "written twice",
    "race",
    "divergence",
    "undefined lane",
    "threadgroup memory",
    "arithmetic",
    "not modelled",
    "execution scope",
)
INPUT, OUTPUT = 0, 1

_U32, _I64, _Triple = ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint32 * 3


class MetalFault(Exception):
    """A kernel did what is undefined, or an error, on a GPU.

    Attributes:
        kind: one of `FAULTS`, or "unwritten", "schedule".
        kernel: the kernel's name.
        buffer: the buffer's or threadgroup array's name; "" where none is to blame.
        index: the element of it, or None.
        thread: thread_position_in_grid, or None.
        line: the line of the generated Metal source, 0 if unknown.
    """

    def __init__(
        self,
        kind: str,
        kernel: str,
        message: str,
        *,
        buffer: str = "",
        index: int | None = None,
        thread: tuple[int, ...] | None = None,
        line: int = 0,
    ):
        self.kind, self.kernel, self.buffer, self.index = kind, kernel, buffer, index
        self.thread, self.line = thread, line
        place = buffer + ("" if index is None else f"[{index}]")
        who = "" if thread is None else f", thread {thread}"
        where = f", line {line}" if line else ""
        super().__init__(f"[{kernel}] {kind}: {place + ': ' if place else ''}{message}{who}{where}")


@dataclass
class Counts:
    """What one launch moved and computed.

    Attributes:
        read: bytes read from device memory, for each input and output. Lanes of a simdgroup that
            touch an element at the same execution of the same place count once.
        written: bytes written to device memory, likewise.
        threadgroup_read: bytes read from threadgroup memory, summed over threads.
        threadgroup_written: bytes written to it.
        macs: multiply-accumulates: 512 for each 8x8x8 product, 1 for each scalar `fma`, N for each
            `dot` or `fma` of N components.
        matrix_loads: simdgroup_load from threadgroup memory or device memory, once a simdgroup.
        matrix_products: 8x8x8 products, once a simdgroup.
        barriers: threadgroup barriers, once for each threadgroup that passes one.
        simd_barriers: simdgroup barriers, once for each simdgroup.
        simd_operations: reductions, shuffles and matrix products, once for each simdgroup.
        threadgroup_memory: bytes of threadgroup memory of one threadgroup.
    """

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    macs: int = 0
    matrix_loads: int = 0
    matrix_products: int = 0
    barriers: int = 0
    simd_barriers: int = 0
    simd_operations: int = 0
    threadgroup_memory: int = 0

    @property
    def device_read(self) -> int:
        """Bytes read from device memory."""
        return sum(self.read.values())

    @property
    def device_written(self) -> int:
        """Bytes written to device memory."""
        return sum(self.written.values())


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("size", _I64),
        ("item", _U32),
        ("shift", _U32),
        ("kind", _U32),
        ("skew", _U32),
        ("initialised", _U32),
        ("shadow", ctypes.c_void_p),
        ("read", _I64),
        ("written", _I64),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", _U32),
        ("line", ctypes.c_int32),
        ("index", _I64),
        ("thread", _Triple),
        ("buffer", ctypes.c_char * 64),
        ("message", ctypes.c_char * 384),
    ]


_COUNTED = (
    "threadgroup_read",
    "threadgroup_written",
    "macs",
    "matrix_loads",
    "matrix_products",
    "barriers",
    "simd_barriers",
    "simd_operations",
    "threadgroup_memory",
)


class _Counts(ctypes.Structure):
    _fields_ = [(name, _I64) for name in _COUNTED]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
        ("grid", _Triple),
        ("threadgroup", _Triple),
        ("schedule", _U32),
        ("seed", _U32),
        ("count", _U32),
        ("single_writer", _U32),
        ("sample", _U32),
        ("fault", _Fault),
        ("counts", _Counts),
    ]


@dataclass
class HostBuffer:
    """An argument of a kernel in host memory.

    Attributes:
        name: the parameter's name.
        array: its memory. 16-bit floats that NumPy lacks come as uint16.
        kind: `INPUT` or `OUTPUT`.
        skew: the address modulo 16 that the buffer would have on the GPU.
        size: bytes that may be accessed.
        argument: a shape, strides or ndim argument, which is not device memory.
        initialised: an output that `init_value` filled.
    """

    name: str
    array: npt.NDArray[np.generic]
    kind: int
    skew: int
    size: int
    argument: bool = False
    initialised: bool = False


def run(
    kernel: str,
    source: str,
    buffers: Sequence[HostBuffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    schedule: str,
    seed: int,
    count: bool,
    single_writer: bool,
    sample: int = 0,
) -> Counts:
    """Runs one launch in one schedule and writes the outputs' memory.

    Args:
        kernel: the name that faults give.
        source: the rewritten kernel.
        buffers: the arguments, in the order of the signature.
        grid: threads in each dimension, all positive.
        threadgroup: threads of a full threadgroup, no larger than the grid.
        schedule: one of `SCHEDULES`.
        seed: seeds the random schedule.
        count: count bytes of device memory, which costs time.
        single_writer: an element written by two threads is a fault.
        sample: run this many threadgroups, or all if 0.

    Returns:
        The launch's counts; `read` and `written` are empty unless `count`.

    Raises:
        MetalFault: for whatever the emulator catches, unwritten outputs included.
    """
    structures = [_Buffer() for _ in buffers]
    marks: list[npt.NDArray[np.uint32]] = []
    for s, b in zip(structures, buffers, strict=True):
        item = b.array.dtype.itemsize
        s.name, s.base, s.size = b.name.encode(), b.array.ctypes.data, b.size
        s.item, s.shift, s.kind, s.skew = item, item.bit_length() - 1, b.kind, b.skew
        if b.kind == OUTPUT:
            marks.append(np.zeros((b.array.size, 2), np.uint32))
            s.shadow, s.initialised = marks[-1].ctypes.data, b.initialised
    pointers = (ctypes.POINTER(_Buffer) * max(1, len(structures)))(*map(ctypes.pointer, structures))
    launch = _Launch(
        ctypes.cast(load_kernel(kernel, source).emu_entry, ctypes.c_void_p),
        pointers,
        _Triple(*grid),
        _Triple(*threadgroup),
        SCHEDULES.index(schedule),
        seed,
        count,
        single_writer,
        sample,
    )
    runtime().emu_run(ctypes.byref(launch))

    fault = launch.fault
    if fault.kind:
        raise MetalFault(
            FAULTS[fault.kind],
            kernel,
            fault.message.decode(),
            buffer=fault.buffer.decode(),
            index=None if fault.index < 0 and not fault.buffer else fault.index,
            thread=tuple(fault.thread),
            line=fault.line,
        )
    outputs = [b for b in buffers if b.kind == OUTPUT]
    for b, mark in zip(outputs, marks, strict=True):
        unwritten = np.flatnonzero(mark[:, 0] == 0)
        if unwritten.size and not b.initialised and not sample:
            message = f"{unwritten.size} of {len(mark)} elements were never written, this one first"
            index = int(unwritten[0])
            raise MetalFault("unwritten", kernel, message, buffer=b.name, index=index)
    counts = Counts(**{name: getattr(launch.counts, name) for name in _COUNTED})
    if count:
        moved = [(b.name, s) for b, s in zip(buffers, structures, strict=True) if not b.argument]
        counts.read = {name: s.read for name, s in moved}
        counts.written = {name: s.written for name, s in moved}
    return counts
