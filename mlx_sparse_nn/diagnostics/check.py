"""The command ``python -m mlx_sparse_nn check``: are this machine's kernels right, and fast?

It needs nothing but the package. Every kernel of the GPU, or of the CPU where there is none, is
compared with the oracle, which computes on the CPU in float64.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_sparse_nn.core.backends import cpu, cuda, launch, metal, plain
from mlx_sparse_nn.core.backends.choose import choose, choose_columns, choose_pauli
from mlx_sparse_nn.core.device import use_device
from mlx_sparse_nn.diagnostics import check_columns, check_strings
from mlx_sparse_nn.diagnostics.check_cases import (
    DTYPES,
    Case,
    Expected,
    all_cases,
    compute,
    expected,
    operands_of,
    quick_cases,
)
from mlx_sparse_nn.diagnostics.check_columns import ColumnsCase, columns_cases
from mlx_sparse_nn.diagnostics.check_report import (
    AnyCase,
    Outcome,
    complaint,
    markdown,
    markdown_times,
)
from mlx_sparse_nn.diagnostics.check_speed import (
    ON_CPU,
    ON_GPU,
    ON_TENSOR_UNITS,
    LayerTiming,
    Sizes,
    time_layers,
)
from mlx_sparse_nn.diagnostics.check_strings import StringsCase, strings_cases
from mlx_sparse_nn.diagnostics.products import dtype_name, matmul_uses_tf32, rounds_factors
from mlx_sparse_nn.diagnostics.rounding import to_numpy


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say which options the command has."""
    parser.description = (
        "Compare the kernels of this machine's GPU, or of its CPU where there is none, with an "
        "oracle that computes on the CPU in float64, then time the layer beside nn.Linear. Ends "
        "with a table to paste into an issue. Exits 1 if a product is wrong. CUDA compiles each "
        "kernel at its first launch, one after the other, which takes minutes. A Linux CPU "
        "compiles as well, what `build` has not: a minute more."
    )
    add = parser.add_argument
    add("--device", choices=("gpu", "cpu"), help="(default: the GPU, where there is one)")
    add("--quick", action="store_true", help="a third of the products, and no times")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these products alone, such as spmm-16-float32-30-edges-bias",
    )
    add(
        "--tensor-units",
        action="store_true",
        help="turn on the tensor units of an M5 here alone, compare and time them; exits 2 without",
    )


def run(options: argparse.Namespace, version: str) -> int:
    """Run the command; return the exit status: 0, 1 if a product is wrong, 2 if it cannot run.

    Args:
        options: What was typed.
        version: Of this package, for the table.
    """
    before = mx.default_device()
    kind = options.device or ("gpu" if metal.is_available() or cuda.is_available() else "cpu")
    try:
        cases = _chosen(options, kind)
        if before.type != getattr(mx, kind):
            use_device(kind)
        if options.tensor_units:
            with metal.tensor_units():  # or an error that says why not
                pass
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    timed = not (options.quick or options.only)
    try:
        run_all = _check_tensor_units if options.tensor_units else _check
        return run_all(cases, timed, version)
    except KeyboardInterrupt:
        print("[check] stopped; --quick takes less long", file=sys.stderr)
        return 130
    finally:
        if mx.default_device() != before:
            mx.set_default_device(before)


def _chosen(options: argparse.Namespace, kind: str) -> list[AnyCase]:
    """Return the products that the options ask for.

    Raises:
        ValueError: There is none.
    """
    if options.tensor_units and options.device == "cpu":
        raise ValueError("[check] --tensor-units must be checked on a GPU, got --device cpu")
    others = [*strings_cases(), *(columns_cases() if kind == "gpu" else [])]
    cases = [*(quick_cases() if options.quick else all_cases()), *others]
    if options.only:
        by_name = {case.name: case for case in [*all_cases(), *others]}
        for name in options.only:
            if name not in by_name:
                like = cases[0].name
                raise ValueError(f"[check] --only must name products as {like}, got {name!r}")
        cases = [by_name[name] for name in options.only]
    if options.tensor_units:
        cases = [case for case in cases if _is_for_tensor_units(case)]
        if not cases:
            raise ValueError("[check] --only must name products of blocks in 16 bits, and 17 rows")
    return cases


def _check(cases: Sequence[AnyCase], timed: bool, version: str) -> int:
    """Compute the products, print what is wrong and the tables, and return the exit status."""
    began = time.perf_counter()
    outcomes = _outcomes(cases)
    seconds = time.perf_counter() - began
    print(markdown(outcomes, seconds, version))
    if any(outcome.wrong for outcome in outcomes):
        print(complaint(outcomes), file=sys.stderr)
        return 1
    if timed:
        sizes = ON_GPU if mx.default_device().type == mx.gpu else ON_CPU
        print(f"\n{markdown_times(sizes.features, {'': _times(sizes)})}")
    return 0


def _check_tensor_units(cases: Sequence[AnyCase], timed: bool, version: str) -> int:
    """Do the same by the tensor units of an M5, and by the kernels that compute without them."""
    began = time.perf_counter()
    with metal.tensor_units():
        outcomes = [_by_tensor_units(outcome) for outcome in _outcomes(cases)]
    outcomes += _outcomes(cases)
    seconds = time.perf_counter() - began
    print(markdown(outcomes, seconds, version))
    if any(outcome.wrong for outcome in outcomes):
        print(complaint(outcomes, "--tensor-units "), file=sys.stderr)
        return 1
    if timed:
        timings = {"": _times(ON_TENSOR_UNITS)}
        with metal.tensor_units():
            timings[" by tensor units"] = _times(ON_TENSOR_UNITS)
        print(f"\n{markdown_times(ON_TENSOR_UNITS.features, timings)}")
    return 0


def _is_for_tensor_units(case: AnyCase) -> bool:
    if not isinstance(case, Case):
        return False
    is_dense_enough = case.rows > 16 and case.block_size % 16 == 0
    return case.product in ("spmm", "spmm_t") and case.dtype != "float32" and is_dense_enough


def _by_tensor_units(outcome: Outcome) -> Outcome:
    """Return an outcome that is wrong if no tensor unit had a part in it."""
    if outcome.wrong or any("/spmm_tensor(" in kernel for kernel in outcome.kernels):
        return outcome
    return replace(outcome, wrong="right, but not computed by the tensor units")


def _outcomes(cases: Sequence[AnyCase]) -> list[Outcome]:
    from tqdm import tqdm

    tf32, outcomes = matmul_uses_tf32(), []
    with tqdm(cases, unit=" products", disable=None) as bar:
        for case in bar:
            bar.set_description(case.name)  # which a GPU that hangs would leave on the screen
            outcomes.append(check_case(case, tf32))
    return outcomes


def _times(sizes: Sizes) -> list[LayerTiming]:
    from tqdm import tqdm

    total = len(sizes.dtypes) * len(sizes.rows)
    with tqdm(total=total, desc="times", unit=" sizes", disable=None) as bar:
        return time_layers(sizes, bar.update)


def check_case(case: AnyCase, tf32: bool = False) -> Outcome:
    """Compute a product twice on MLX's default device, and compare it with the oracle.

    Args:
        case: The product.
        tf32: Whether MLX's own products round float32 factors to TF32.
    """
    if isinstance(case, ColumnsCase):
        given = check_columns.operands_of(case)
        by = choose_columns(check_columns.COLUMNS, mx.float32)
        assert by is not None, "every GPU of MLX's has these kernels"
        return _outcome(
            *(case, by, mx.float32),
            lambda: check_columns.compute(case, given, by),
            lambda: check_columns.expected(case, given),
        )
    if isinstance(case, StringsCase):
        strings, dtype = check_strings.operands_of(case), check_strings.DTYPES[case.dtype]
        op = case.product.removeprefix("pauli_")
        backend = choose_pauli(op, strings.terms, check_strings.N_STATES, dtype).NAME
        return _outcome(
            *(case, backend, dtype),
            lambda: check_strings.compute(case, strings),
            lambda: check_strings.expected(case, strings),
        )
    given, dtype = operands_of(case), DTYPES[case.dtype]
    backend = choose(case.product, given.pattern.layout, case.rows, dtype, bits=case.bits).NAME
    rounds = tf32 and rounds_factors(backend, case.block_size, case.rows, dtype)
    return _outcome(
        *(case, backend, dtype),
        lambda: compute(case, given),
        lambda: expected(case, given, backend == plain.NAME, rounds),
    )


def _outcome(
    case: AnyCase,
    backend: str,
    dtype: mx.Dtype,
    compute: Callable[[], mx.array],
    expect: Callable[[], Expected],
) -> Outcome:
    """Return what becomes of a product that ``compute`` makes."""
    launched: dict[str, None] = {}
    try:
        with launch.observed(lambda kernel: launched.setdefault(_described(kernel))):
            results = [compute() for _ in range(2)]
            mx.eval(results)
        with mx.stream(mx.cpu):
            values, again = (to_numpy(result) for result in results)
    except Exception as error:  # whatever MLX and its compilers raise is about this kernel
        wrong = f"raised {type(error).__name__}: {error}"
        return Outcome(case, backend, tuple(launched), math.inf, wrong)
    exact, bound = expect()
    found = results[0].shape, results[0].dtype
    if found != (exact.shape, dtype):
        wrong = f"is {found[0]} {dtype_name(found[1])}, not {exact.shape} {case.dtype}"
        return Outcome(case, backend, tuple(launched), math.inf, wrong)
    part, wrong = _compared(values, exact, bound)
    if not wrong and not np.array_equal(values, again):
        wrong = "differs from run to run"
    if not wrong:
        wrong = _not_by_kernels(backend, launched)
    return Outcome(case, backend, tuple(launched), part, wrong)


def _compared(values: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> tuple[float, str]:
    """Return the largest part of its bound that an error is, and what is wrong with it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(values - exact)
        part = np.where(error == 0, 0, error / bound)
    part = np.where(np.isnan(part), np.inf, part)
    at = np.unravel_index(int(np.argmax(part)), part.shape)
    worst = float(part[at])
    if worst <= 1:
        return worst, ""
    n_beyond = int((part > 1).sum())
    return worst, (
        f"it is {values[at]:.9g} at {[int(i) for i in at]}, and should be {exact[at]:.9g}: error "
        f"{error[at]:.3g}, bound {bound[at]:.3g}; {n_beyond} of {part.size} elements are beyond it"
    )


def _not_by_kernels(backend: str, launched: Collection[str]) -> str:
    """Return in words that another backend computed a product than should have, if one did."""
    if backend in (metal.NAME, cuda.NAME) and not launched:
        return f"right, but no kernel of {backend} was launched for it"
    on_gpu = mx.default_device().type == mx.gpu
    if on_gpu and metal.is_available() and backend != metal.NAME:  # it has kernels for all cases
        return f"right, but computed by {backend}, though {metal.NAME} has a kernel for it"
    if not on_gpu and cpu.is_available() and backend == plain.NAME:
        return (
            f"right, but computed by {backend}: the C++ kernel was not built, or failed its own "
            "test; python -m mlx_sparse_nn info says which, and why"
        )
    return ""


def _described(kernel: launch.KernelLaunch) -> str:
    """Return a kernel with its constants: ``metal/spmm_few(T=float16, B=16, ...)``."""
    values = (
        f"{name}={dtype_name(value) if isinstance(value, mx.Dtype) else value}"
        for name, value in kernel.template
    )
    return f"{kernel.name}({', '.join(values)})"
