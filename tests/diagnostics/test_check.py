"""``python -m mlx_sparse_nn check``: it finds a wrong product, and names it."""

import os
import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from support import dense_of

from mlx_sparse_nn import CSRPattern
from mlx_sparse_nn.__main__ import main
from mlx_sparse_nn.core.backends import choose, cpu
from mlx_sparse_nn.diagnostics import check, check_speed, check_strings
from mlx_sparse_nn.diagnostics.check_cases import (
    DTYPES,
    all_cases,
    expected,
    operands_of,
    quick_cases,
)
from mlx_sparse_nn.diagnostics.check_strings import strings_cases
from mlx_sparse_nn.diagnostics.rounding import to_numpy

NAMES = [
    "spmm-8-float32-1-long-bias",
    "spmm_t-16-float16-30-edges",
    "sddmm-3-bfloat16-1-heavy",
    "qspmm-32-float32-1-long-2bits-group32",
    "qspmm_t-32-float32-1-long-2bits-group32",
]


def test_right_products_end_with_a_table_to_paste(capsys):
    assert main(["check", "--only", *NAMES]) == 0
    out, err = capsys.readouterr()
    assert "wrong" not in err
    lines = out.splitlines()
    for line in lines:
        assert not line or re.fullmatch(r"\| .* \|", line)
    for fact in ("machine", "software", "products", "computed by", "worst error"):
        assert any(line.startswith(f"| {fact} | ") for line in lines), fact
    assert "| products | 5, of which none wrong, in " in out
    for name in NAMES:
        assert any(line.startswith(f"| `{name.partition('-')[0]}` | ") for line in lines)


def test_the_package_alone_is_enough():
    """No SciPy, no tests: what ``pip install`` brings."""
    script = """
import sys
for name in ("scipy", "pytest", "hypothesis", "matplotlib", "mlx_lm", "support"):
    sys.modules[name] = None
from mlx_sparse_nn import CSRPattern
from mlx_sparse_nn.__main__ import main
from mlx_sparse_nn.core.backends import cpu
sys.exit(main(["check", "--quick"]))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wrong, in" in done.stdout


PRODUCTS = [  # with a case, and a module's function that computes it
    ("spmm", "spmm-16-float32-12-long-bias"),
    ("spmm_t", "spmm_t-64-float32-64-whole"),
    ("sddmm", "sddmm-8-float32-5-edges"),
    ("qspmm", "qspmm-32-float32-1-long-2bits-group32"),
]


def case_of(name):
    return next(case for case in all_cases() if case.name == name)


def spoil(monkeypatch, op, name, change):
    case = case_of(name)
    layout, dtype = operands_of(case).pattern.layout, DTYPES[case.dtype]
    module = choose.choose(op, layout, case.rows, dtype, bits=case.bits)
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: change(right(*args)))


@pytest.mark.parametrize(("op", "name"), PRODUCTS)
def test_a_wrong_product_is_named(monkeypatch, capsys, op, name):
    spoil(monkeypatch, op, name, lambda y: y * (1 + 2.0**-10))
    case = case_of(name)
    others = [other for other in NAMES if not other.startswith(f"{op}-")]
    assert main(["check", "--only", *others, name]) == 1
    out, err = capsys.readouterr()
    quantized = ", 2 bits in groups of 32" if case.bits else ""
    assert f"  {op}, block_size {case.block_size}, float32{quantized}, {case.rows} row" in err
    assert f"  again: python -m mlx_sparse_nn check --only {name}\n" in err
    assert re.search(r"it is \S+ at \[.*\], and should be \S+: error \S+, bound \S+; \d+ of", err)
    (worst,) = re.findall(r"worst error \| ([\d.]+) of its bound", out)
    assert float(worst) > 1
    monkeypatch.undo()
    assert main(["check", "--only", name]) == 0


def test_all_that_is_wrong_is_counted_and_some_of_it_named(monkeypatch, capsys):
    """The first in full, in the order of the cases; a report of hundreds helps nobody."""
    cases = [case for case in all_cases() if case.product == "spmm" and case.block_size == 2]
    monkeypatch.setattr(check, "all_cases", lambda: [*cases, case_of(NAMES[2])])
    right = check.compute
    spoil = lambda y: 2 * y + 1  # whatever y is, and however it is rounded
    wrong = lambda case, y: (spoil if case.product == "spmm" else mx.array)(right(case, y))
    monkeypatch.setattr(check, "compute", wrong)
    assert main(["check", "--only", *(case.name for case in cases), NAMES[2]]) == 1
    err = capsys.readouterr().err
    assert f"[check] {len(cases)} of {len(cases) + 1} products wrong on " in err
    named = ", ".join(case.name for case in cases[1:11])
    assert f"  also wrong: {named} and {len(cases) - 11} more\n" in err
    assert NAMES[2] not in err


def test_one_element_is_enough(monkeypatch, capsys):
    def change(y):
        y[3, 17] = np.nan
        return y

    spoil(monkeypatch, "spmm", PRODUCTS[0][1], change)
    assert main(["check", "--only", PRODUCTS[0][1]]) == 1
    assert "it is nan at [3, 17]" in capsys.readouterr().err


def test_a_product_that_changes_from_run_to_run_is_wrong(monkeypatch, capsys):
    """Right each time, within rounding: two threads add in an order that nobody fixed."""
    turns = iter([1.0, 1 + 2.0**-23] * 2)
    spoil(monkeypatch, "spmm", PRODUCTS[0][1], lambda y: y * next(turns))
    assert main(["check", "--only", PRODUCTS[0][1]]) == 1
    assert "differs from run to run" in capsys.readouterr().err


def test_what_does_not_compile_is_reported_and_the_rest_is_checked(monkeypatch, capsys):
    def refuse(y):
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    spoil(monkeypatch, "spmm", PRODUCTS[0][1], refuse)
    assert main(["check", "--only", PRODUCTS[0][1], NAMES[2]]) == 1
    out, err = capsys.readouterr()
    assert "raised RuntimeError: [metal::Device] Unable to build" in err
    assert "| products | 2, of which 1 wrong" in out


@pytest.mark.parametrize(
    "change", [lambda y: y.astype(mx.float16), lambda y: y[:1]], ids=["dtype", "shape"]
)
def test_another_shape_or_dtype_is_wrong(monkeypatch, change):
    right = check.compute
    monkeypatch.setattr(check, "compute", lambda *args: change(right(*args)))
    outcome = check.check_case(case_of(PRODUCTS[0][1]))
    assert re.match(r"is \(\d+, \d+\) float\d+, not \(12, \d+\) float32", outcome.wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "spmm"], r"\[check\] --only must name products as spmm-1-\S+, got 'spmm'"),
        (["--tensor-units"], r"\[tensor_units\] this machine must have a GPU of the M5"),
        (["--tensor-units", "--device", "cpu"], r"\[check\] --tensor-units must be checked on a"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence_and_status_2(capsys, arguments, message):
    if check.metal.has_tensor_units() and arguments == ["--tensor-units"]:
        pytest.skip("this machine has tensor units")
    before = mx.default_device()
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match(message, err)
    assert mx.default_device() == before


def test_no_gpu_is_said(capsys, monkeypatch):
    for gpu in (mx.metal, mx.cuda):
        monkeypatch.setattr(gpu, "is_available", lambda: False)
    before = mx.default_device()
    if before.type == mx.gpu:
        mx.set_default_device(mx.cpu)
    try:
        assert main(["check", "--device", "gpu"]) == 2
    finally:
        mx.set_default_device(before)
    assert "no GPU is available" in capsys.readouterr().err


STRINGS = [
    "pauli_product-float32-8-signs",
    "pauli_product-complex64-12-diagonal",
    "pauli_moments-float32-14-flips",
    "pauli_moments-complex64-3-signs",
]


def test_sums_of_pauli_strings_are_checked_too(capsys):
    assert main(["check", "--only", *STRINGS]) == 0
    out = capsys.readouterr().out
    assert "| products | 4, of which none wrong, in " in out
    assert "| `pauli_product` | " in out
    assert "| `pauli_moments` | " in out


@pytest.mark.parametrize("name", STRINGS)
def test_a_wrong_sum_of_strings_is_named(monkeypatch, capsys, name):
    case = next(case for case in strings_cases() if case.name == name)
    op = case.product.removeprefix("pauli_")
    terms = check_strings.operands_of(case).terms
    module = choose.choose_pauli(op, terms, 2, check_strings.DTYPES[case.dtype])
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args: right(*args) * 1.5)
    assert main(["check", "--only", name]) == 1
    err = capsys.readouterr().err
    assert f"  {case.words}\n" in err
    assert f"--only {name}" in err


SMALL_STRINGS = [case for case in strings_cases() if case.n_qubits <= 8]


@pytest.mark.parametrize("case", SMALL_STRINGS, ids=lambda case: case.name)
def test_the_oracle_of_strings_and_its_bounds(case):
    """By a dense matrix."""
    given = check_strings.operands_of(case)
    size, x = 1 << case.n_qubits, to_numpy(given.x)
    units = np.zeros((len(given.terms), size, size))
    for t, (flip, sign) in enumerate(zip(given.terms.flips, given.terms.signs, strict=True)):
        for j in range(size):
            units[t, j ^ flip, j] = (-1) ** (~j & sign).bit_count()
    matrix = np.tensordot(to_numpy(given.coefficients), units, 1)
    if given.diagonal is not None:
        matrix += np.diag(to_numpy(given.diagonal))
    exact = x @ matrix.T
    if case.product == "pauli_moments":
        exact = np.einsum("ni,tij,nj->t", to_numpy(given.u), units, x)
    value, bound = check_strings.expected(case, given)
    np.testing.assert_allclose(value, exact, rtol=1e-12, atol=1e-12 * size)
    assert value.shape == bound.shape
    assert (bound < 1e-2 * (1 + np.abs(exact).max())).all()


def test_the_device_is_given_back():
    before = mx.default_device()
    assert main(["check", "--device", "cpu", "--only", NAMES[0]]) == 0
    assert mx.default_device() == before


SMALL = [
    case
    for case in all_cases()
    if case.block_size == 4 or (case.bits and case.block_size == 32 and case.rows < 40)
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_oracle_and_its_bounds(case):
    """By loops of NumPy over the stored blocks, in float64; the bound is that of each element."""
    given = operands_of(case)
    pattern, n = given.pattern, case.rows
    data = given.data[0]
    if case.bits:
        scales, biases = (a.astype(mx.float32) for a in given.data[1:])
        data = mx.dequantize(data, scales, biases, case.group_size, case.bits, stream=mx.cpu)
    dense = to_numpy(dense_of(pattern, mx.nan_to_num(data.astype(mx.float32), 0.0)))
    assert case.pattern != "edges" or case.bits or mx.isnan(data).any().item()
    x = to_numpy(given.x)
    value, bound = expected(case, given)
    if given.y is not None:
        whole = np.zeros([size * case.block_size for size in pattern.grid])
        whole[: pattern.shape[0], : pattern.shape[1]] = to_numpy(given.y).T @ x
        stored = [
            whole[r * 4 : r * 4 + 4, c * 4 : c * 4 + 4]
            for r, c in zip(pattern.row_indices, pattern.indices, strict=True)
        ]
        np.testing.assert_allclose(value, stored, rtol=1e-12, atol=1e-12)
        assert value.shape == bound.shape
        return
    exact = x @ (dense if case.product.endswith("_t") else dense.T)
    if given.bias is not None:
        exact = exact + to_numpy(given.bias)
    np.testing.assert_allclose(value, exact, rtol=1e-5 if case.bits else 1e-12, atol=1e-5)
    assert bound.shape == exact.shape == (n, exact.shape[1])
    assert (bound < 0.1 * (1 + np.abs(exact).max())).all()


def test_cases_have_names_of_their_own_and_the_same_operands_each_time():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    kinds = {(case.product, case.dtype) for case in quick_cases()}
    assert kinds == {(case.product, case.dtype) for case in cases}
    assert 0.3 < len(quick_cases()) / len(cases) < 0.36
    first, again = operands_of(cases[0]), operands_of(cases[0])
    assert mx.array_equal(first.x, again.x).item()
    assert not mx.array_equal(first.x, operands_of(cases[1]).x.astype(first.x.dtype)).item()


def test_times_are_those_of_both_layers(monkeypatch):
    monkeypatch.setattr(check_speed, "SECONDS", 0.0)
    monkeypatch.setattr(check_speed, "LAYERS", ((16, 0.5), (32, 1.0)))
    done = []
    sizes = check_speed.Sizes(64, ("float32", "float16"), (1, 3))
    timings = check_speed.time_layers(sizes, lambda: done.append(1))
    assert len(done) == 4
    assert [(t.block_size, t.dtype, t.rows) for t in timings] == [
        (size, dtype, rows) for dtype in sizes.dtypes for rows in sizes.rows for size in (16, 32)
    ]
    assert all(0 < t < 10 for timing in timings for t in (*timing.forward, *timing.training))


def test_a_full_check_prints_times(monkeypatch, capsys):
    monkeypatch.setattr(check_speed, "SECONDS", 0.0)
    small = check_speed.Sizes(128, ("float32",), (2,))
    monkeypatch.setattr(check, "ON_CPU", small)
    monkeypatch.setattr(check, "ON_GPU", small)
    monkeypatch.setattr(check, "all_cases", lambda: [case_of(NAMES[0])])
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "| B | density | dtype | rows | forward | training |" in out
    assert len(re.findall(r"^\| \d+ \| 0\.\d+ \| float32 \| 2 \|", out, re.M)) == 5
    assert "Microseconds a call, medians" in out
    assert "128 x 128" in out


def test_plain_mlx_in_place_of_a_broken_kernel_is_wrong(monkeypatch, capsys):
    """The C++ kernel failed its own test: a right result does not make it right."""
    if check.choose("spmm", one_block().layout, 1, mx.float32) is not cpu:
        pytest.skip("the C++ kernels do not compute here")
    monkeypatch.setattr(cpu, "takes", lambda *_: False)
    assert main(["check", "--device", "cpu", "--only", NAMES[0]]) == 1
    assert "the C++ kernel was not built, or failed its own test" in capsys.readouterr().err


def one_block():
    return CSRPattern([0, 1], [0], (8, 8), 8)


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_case", interrupted)
    assert main(["check", "--only", NAMES[0]]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("[check] stopped")


@pytest.mark.skipif(not mx.cuda.is_available(), reason="an NVIDIA GPU rounds to TF32")
def test_products_by_tf32_are_checked_on_a_gpu():
    """The other tests have ``MLX_ENABLE_TF32=0``, and so never launch these kernels there."""
    names = [case.name for case in all_cases() if case.dtype == "float32" and case.rows > 16]
    blocks = [name for name in names if int(name.split("-")[1]) in (8, 16, 48, 64, 128)]
    command = [sys.executable, "-m", "mlx_sparse_nn", "check", "--only", *blocks]
    environment = {**os.environ, "MLX_ENABLE_TF32": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
