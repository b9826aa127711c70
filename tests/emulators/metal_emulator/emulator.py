"""The stand-in for `mx.fast.metal_kernel`, and the context manager that puts it in place."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from . import memory
from .launch import SCHEDULES, Counts, MetalFault, run
from .rewrite import rewrite
from .source import signature_key, trace_source

MAX_THREADS = 1024
real_metal_kernel = mx.fast.metal_kernel


class EmulatorError(Exception):
    """A call that MLX would refuse, or that the emulator cannot run."""


@dataclass
class Launch:
    """What is known of one launch.

    Attributes:
        kernel: the name given to `mx.fast.metal_kernel`.
        source: the Metal source that MLX generated for this call.
        grid: threads in each dimension.
        threadgroup: threads of a full threadgroup, clamped to the grid.
        template: the template arguments.
        schedules: the orders that it ran in.
        counts: what it moved and computed, in the first schedule; device bytes only with `count`.
        seconds: time taken, compilation included.
    """

    kernel: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: list[tuple[str, Any]]
    schedules: tuple[str, ...]
    counts: Counts
    seconds: float


@dataclass
class Emulator:
    """While entered, runs Metal kernels on the CPU and makes MLX look like it had a GPU.

    Options may be changed between launches.

    Attributes:
        schedules: the orders to run each launch in; their outputs must agree bit for bit. Where
            there are none, launches are only recorded, and outputs are zeros.
        count: count bytes of device memory (slower).
        single_writer: an output element that two threads write is a fault.
        seed: seeds the random schedule.
        sample: run this many threadgroups of each launch, far apart, in one schedule, to count what
            they move; all if 0. What the others would write is undefined.
        metal_version: the language that kernels are compiled as, 400 for Metal 4.0.
        launches: a record of each launch.
    """

    schedules: Sequence[str] = SCHEDULES
    count: bool = False
    single_writer: bool = True
    seed: int = 0
    sample: int = 0
    metal_version: int = 400
    launches: list[Launch] = field(default_factory=list)

    def __enter__(self) -> "Emulator":
        install()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(metal_available(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


# Entered emulators, the innermost last; None for `metal_available` without one.
_active: list[Emulator | None] = []


@contextlib.contextmanager
def metal_available(emulator: Emulator | None = None) -> Iterator[None]:
    """Makes MLX look as if it had a Metal GPU, by default in use.

    Args:
        emulator: what runs kernels. Without one they are MLX's own, which serves to trace a Metal
            path by `mx.export_function`: there they work without a GPU.
    """

    def is_available() -> bool:
        return True

    def default_device() -> mx.Device:
        return mx.Device(mx.DeviceType.gpu, 0)

    with (
        mock.patch.object(mx.metal, "is_available", is_available),
        mock.patch.object(mx, "default_device", default_device),
    ):
        _active.append(emulator)
        try:
            yield
        finally:
            _active.pop()


def install() -> None:
    """Replaces `mx.fast.metal_kernel` for good.

    Kernels made from then on run on the emulator while one is entered and are MLX's own otherwise,
    so that a package may keep them in a cache.
    """
    mx.fast.metal_kernel = MetalKernel


def _as_arrays(inputs: Sequence[Any]) -> list[mx.array]:
    """Turns Python scalars into arrays; `mx.array` of an array would copy it, and align a slice."""
    return [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]


class MetalKernel:
    """A kernel with the constructor and the call of `mx.fast.metal_kernel`."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: dict[str, str] | None = None,
    ):
        self.name = name
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.body = source
        self.ensure_row_contiguous, self.atomic_outputs = ensure_row_contiguous, atomic_outputs
        self.real: Any = real_metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            **({"compile_options": compile_options} if compile_options else {}),
        )
        self._sources: dict[object, str] = {}
        self._rewritten: dict[tuple[str, int], str] = {}

    def __call__(self, **call: Any) -> list[mx.array]:
        """Runs the kernel, with the keywords of MLX's; see `mx.fast.metal_kernel`."""
        emulator = _active[-1] if _active else None
        if emulator is None:
            return self.real(**call)
        return self._launch(emulator, **call)

    def exported_source(self, **call: Any) -> str:
        """The Metal source that MLX compiles for a call with these keywords."""
        call["inputs"] = _as_arrays(call["inputs"])
        call.pop("verbose", None)
        key = (
            signature_key(call["inputs"]),
            tuple(call["output_dtypes"]),
            len(call["output_shapes"]),
            tuple((name, type(value), value) for name, value in call.get("template") or ()),
            str(call.get("stream")),
        )
        if key not in self._sources:
            self._sources[key] = trace_source(self.real, call)
        return self._sources[key]

    def _launch(
        self,
        emulator: Emulator,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: list[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        start = time.perf_counter()
        if self.atomic_outputs:
            raise EmulatorError(f"[{self.name}] atomic_outputs is not modelled")
        inputs = _as_arrays(inputs)
        self._check("inputs", inputs, self.input_names)
        self._check("output_shapes", output_shapes, self.output_names)
        self._check("output_dtypes", output_dtypes, self.output_names)
        grid, threadgroup = self._check_grid(grid, threadgroup)
        source = self.exported_source(
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
            init_value=init_value,
            stream=stream,
        )
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{source}\n```")
        known = self.name, source, grid, threadgroup, list(template or ())
        if not emulator.schedules:
            emulator.launches.append(Launch(*known, (), Counts(), time.perf_counter() - start))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        text = source, emulator.metal_version
        if text not in self._rewritten:
            self._rewritten[text] = rewrite(*text)

        arguments = []
        for name, x in zip(self.input_names, inputs, strict=True):
            arguments += memory.input_buffers(
                self.name, name, x, self.body, self.ensure_row_contiguous
            )
        results: list[list[np.ndarray]] = []
        counts = []
        for schedule in emulator.schedules:
            outputs = [
                memory.output_buffer(name, shape, dtype, init_value)
                for name, shape, dtype in zip(
                    self.output_names, output_shapes, output_dtypes, strict=True
                )
            ]
            counts.append(
                run(
                    self.name,
                    self._rewritten[text],
                    arguments + outputs,
                    grid,
                    threadgroup,
                    schedule=schedule,
                    seed=emulator.seed,
                    count=emulator.count and not counts,
                    single_writer=emulator.single_writer,
                    sample=emulator.sample,
                )
            )
            results.append([b.array for b in outputs])
            self._compare(emulator.schedules[0], results[0], schedule, results[-1])
        emulator.launches.append(
            Launch(*known, tuple(emulator.schedules), counts[0], time.perf_counter() - start)
        )
        return [
            memory.to_mlx(array, dtype)
            for array, dtype in zip(results[0], output_dtypes, strict=True)
        ]

    def _check(self, what: str, given: Sequence[object], names: list[str]) -> None:
        if len(given) != len(names):
            raise EmulatorError(
                f"[{self.name}] expected {len(names)} {what} ({', '.join(names)}), got {len(given)}"
            )

    def _check_grid(
        self, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Applies MLX's rules: 1024 threads at most, then clamps the threadgroup to the grid."""
        for what, size in (("grid", grid), ("threadgroup", threadgroup)):
            if len(size) != 3 or min(size) < 1 or math.prod(size) >= 2**32:
                raise EmulatorError(f"[{self.name}] {what} {size} is not three positive numbers")
        threads = math.prod(threadgroup)
        if threads > MAX_THREADS:
            raise EmulatorError(
                f"[{self.name}] threadgroup {threadgroup} has {threads} threads, "
                f"over the maximum of {MAX_THREADS}"
            )
        x, y, z = map(int, grid)
        tx, ty, tz = map(int, threadgroup)
        return (x, y, z), (min(tx, x), min(ty, y), min(tz, z))

    def _compare(
        self, first: str, expected: list[np.ndarray], schedule: str, results: list[np.ndarray]
    ) -> None:
        """Outputs of two schedules must agree bit for bit."""
        for name, a, b in zip(self.output_names, expected, results, strict=True):
            different = np.flatnonzero(
                (a.reshape(-1, 1).view(np.uint8) != b.reshape(-1, 1).view(np.uint8)).any(axis=1)
            )
            if different.size:
                raise MetalFault(
                    "schedule",
                    self.name,
                    f"{schedule} order gives another result than {first}: a barrier is missing",
                    buffer=name,
                    index=int(different[0]),
                )
