"""``python -m mlx_sparse_nn check`` on the Metal kernels, which the emulator runs."""

import re

import devices
import metal_emulator
import mlx.core as mx
import pytest
from support import ROOT, apple_gpu, fresh_launches, pattern_of

from mlx_sparse_nn import qspmm, qspmm_t, sddmm, spmm, spmm_t
from mlx_sparse_nn.__main__ import main
from mlx_sparse_nn.core.backends import launch, naive
from mlx_sparse_nn.core.backends import metal as kernels
from mlx_sparse_nn.diagnostics import check, check_columns, check_speed, check_strings
from mlx_sparse_nn.diagnostics.check_cases import DTYPES, PACKINGS, all_cases, compute, operands_of

FEW = "spmm-16-float16-7-edges-bias"
TILES = "spmm_t-32-bfloat16-30-edges"
SAMPLED = "sddmm-8-float32-5-edges"
SCALARS = "spmm-3-float32-3-edges-bias"
COLUMNS = tuple(case.name for case in check_columns.columns_cases() if case.n_panels < 100)
STRINGS = "pauli_product-complex64-8-diagonal", "pauli_moments-float32-12-signs"


@pytest.fixture
def emulated(metal):
    """The device as on a Mac, where the CPU can be chosen for the oracle."""
    with devices.emulated_metal():
        yield


def plant(monkeypatch, name, **constants):
    """Let one variant of one kernel give a wrong element."""
    run = launch.KernelLaunch.__call__

    def call(self, arrays, shape):
        y = run(self, arrays, shape)
        if self.name != name or not constants.items() <= dict(self.template).items():
            return y
        flat = y.reshape(-1)
        flat[flat.size // 2] += 1
        return flat.reshape(y.shape)

    monkeypatch.setattr(launch.KernelLaunch, "__call__", call)


def test_right_kernels_pass_and_are_counted(emulated, capsys):
    assert main(["check", "--only", FEW, TILES, SAMPLED, SCALARS]) == 0
    out = capsys.readouterr().out
    assert "| products | 4, of which none wrong" in out
    assert re.search(r"computed by \| \*\*metal\*\* 4 by 4 variants of [34] kernels", out)
    assert re.search(r"\| `spmm` \| metal/spmm_\w+ \| 1 \| 1 \| 0 \| 0\.\d\d \|", out)


def test_sums_of_strings_are_by_kernels(emulated, monkeypatch, capsys):
    assert main(["check", "--only", *STRINGS]) == 0
    assert "computed by | **metal** 2 by 2 variants of 2 kernels" in capsys.readouterr().out
    plant(monkeypatch, "metal/pauli", PARTS=2)
    assert main(["check", "--only", *STRINGS]) == 1
    assert f"check --only {STRINGS[0]}\n" in capsys.readouterr().err


def test_columns_of_a_basis_are_by_kernels(emulated, monkeypatch, capsys):
    assert main(["check", "--only", *COLUMNS]) == 0
    assert re.search(r"\*\*metal\*\* 9 by \d+ variants of 5 kernels", capsys.readouterr().out)
    plant(monkeypatch, "metal/basis_combine")
    assert main(["check", "--only", *COLUMNS]) == 1
    assert "check --only combine-float32-1-32\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", [FEW, TILES, SAMPLED, SCALARS])
def test_a_wrong_kernel_is_caught_and_named(emulated, monkeypatch, capsys, name):
    """Of all products, that of the wrong variant alone."""
    (case,) = (case for case in all_cases() if case.name == name)
    (kernel,) = check.check_case(case).kernels
    constants = {"B": case.block_size, "T": DTYPES[case.dtype]}
    plant(monkeypatch, kernel.partition("(")[0], **constants)
    assert main(["check", "--only", FEW, TILES, SAMPLED, SCALARS]) == 1
    err = capsys.readouterr().err
    assert "[check] 1 of 4 products wrong on " in err
    assert f"  {case.product}, block_size {case.block_size}, {case.dtype}, {case.rows} rows" in err
    assert f"  by {kernel}\n" in err
    assert "; 1 of " in err
    assert f"check --only {name}\n" in err


def test_a_text_with_a_fault_is_caught(emulated, monkeypatch, capsys):
    """A kernel whose text is wrong: it reads what its column index does not say."""
    right = launch._short

    def spoiled(code):
        return right(code).replace("indices[j]", "indices[j ^ 1]")

    monkeypatch.setattr(launch, "_short", spoiled)
    with fresh_launches():
        assert main(["check", "--only", FEW]) == 1
    assert "[check] 1 of 1 products wrong" in capsys.readouterr().err


def test_plain_mlx_in_place_of_a_kernel_is_an_error(emulated, monkeypatch, capsys):
    """Its products are right: without a word, a Mac would be slow and nobody would know."""
    monkeypatch.setattr(kernels, "takes", lambda *args: False)
    assert main(["check", "--only", TILES]) == 1
    out, err = capsys.readouterr()
    assert "right, but computed by plain, though metal has a kernel for it" in err
    assert "**plain** 1" in out


def test_a_kernel_that_is_not_launched_is_an_error(emulated, monkeypatch, capsys):
    for op in ("spmm", "spmm_t", "sddmm"):
        stand_in = getattr(check.plain, op)
        monkeypatch.setattr(kernels, op, stand_in)
    assert main(["check", "--only", SAMPLED]) == 1
    assert "no kernel of metal was launched for it" in capsys.readouterr().err


def test_the_oracle_computes_on_the_cpu(emulated, monkeypatch):
    used = []

    def noting(right):
        def call(*args):
            used.append(mx.default_device().type)
            return right(*args)

        return call

    for op in ("spmm", "spmm_t", "sddmm"):
        monkeypatch.setattr(naive, op, noting(getattr(naive, op)))
    assert main(["check", "--only", FEW, TILES, SAMPLED]) == 0
    assert mx.default_device().type == mx.gpu
    assert used
    assert all(device == mx.cpu for device in used)


# Constants that follow from the lengths of block-rows: each value is tried at some block size.
OF_LENGTHS = ("GROUPS", "STEPS", "EVEN", "STRIPS", "LONG", "OF_PIECES")


def constants_of(launched):
    """Return each kernel with each of its constants, by block size; of quantized ones at any."""
    found = set()
    for kernel in launched:
        for name, value in kernel.template:
            if name not in ("INSIDE", "LANES", "PIECE"):  # which take many values
                at_any = name in OF_LENGTHS or "/qspmm" in kernel.name
                size = "any" if at_any else str(dict(kernel.template).get("B"))
                found.add((kernel.name, size, name, str(value)))
    return found


@pytest.fixture
def reached(monkeypatch):
    """What would be launched; nothing is computed."""
    launched = []

    def outputs(self, arrays, shapes):
        launched.append(self)
        return [mx.zeros(*pair) for pair in zip([*shapes, *self.scratch], self.dtypes, strict=True)]

    monkeypatch.setattr(launch.KernelLaunch, "outputs", outputs)
    with metal_emulator.metal_available():
        yield launched


def test_the_cases_reach_every_kernel(reached):
    """And every tile that any number of rows, block size and length of row chooses."""
    for case in all_cases():
        compute(case, operands_of(case))
    for case in check_strings.strings_cases():
        check_strings.compute(case, check_strings.operands_of(case))
    for case in check_columns.columns_cases():
        check_columns.compute(case, check_columns.operands_of(case), "metal")
    checked = constants_of(reached)
    reached.clear()
    folder = ROOT / "mlx_sparse_nn/metal"
    files = {f"metal/{path.stem}" for path in folder.glob("*.metal")} - {"metal/spmm_tensor"}
    missing = files - {kernel[0] for kernel in checked}
    assert not missing

    rows = [*range(1, 40), 48, 49, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 512, 1000]
    for block_size in sorted({case.block_size for case in all_cases()}):
        for length in (1, 5, 9, 17, 40):
            pattern = pattern_of([range(length), [0]], length, block_size)
            data = mx.zeros(pattern.data_shape)
            for n in rows:
                x, y = (mx.zeros((n, size)) for size in reversed(pattern.shape))
                for dtype in (mx.float32, mx.float16):
                    typed = [a.astype(dtype) for a in (data, x, y)]
                    spmm(typed[0], pattern, typed[1])
                    spmm_t(typed[0], pattern, typed[2])
                    sddmm(pattern, typed[2], typed[1])
    for block_size, group_size in PACKINGS:
        for length in (1, 5, 40):
            pattern = pattern_of([range(length), [0]], length, block_size)
            packed, *scaling = mx.quantize(mx.zeros(pattern.data_shape), group_size, 4)
            for n in rows:
                x, y = (mx.zeros((n, size)) for size in reversed(pattern.shape))
                for dtype in (mx.float32, mx.float16):
                    scales, biases = (a.astype(dtype) for a in scaling)
                    qspmm(packed, scales, biases, pattern, x.astype(dtype))
                    qspmm_t(packed, scales, biases, pattern, y.astype(dtype))
    unchecked = constants_of(reached) - checked
    assert not unchecked, "\n".join(map(str, sorted(unchecked)))


UNITS = "spmm-64-float16-30-edges-bias"


def test_tensor_units_are_compared_with_the_other_kernels(emulated, monkeypatch, capsys):
    monkeypatch.setattr(check_speed, "SECONDS", 0.0)
    with apple_gpu():
        assert main(["check", "--tensor-units", "--only", UNITS]) == 0
        assert not kernels._tensor_units
    out = capsys.readouterr().out
    assert "| `spmm` | metal/spmm_tensor | 1 | 1 | 0 | 0." in out
    assert "| `spmm` | metal/spmm_tiles | 1 | 1 | 0 | 0." in out


def test_a_wrong_tensor_unit_is_named(emulated, monkeypatch, capsys):
    plant(monkeypatch, "metal/spmm_tensor")
    with apple_gpu():
        assert main(["check", "--tensor-units", "--only", UNITS]) == 1
    err = capsys.readouterr().err
    assert "[check] 1 of 2 products wrong" in err
    assert "  by metal/spmm_tensor(" in err
    assert f"check --tensor-units --only {UNITS}\n" in err


def test_tensor_units_that_compute_nothing_are_an_error(emulated, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_suits_tensor_units", lambda *args: False)
    with apple_gpu():
        assert main(["check", "--tensor-units", "--only", UNITS]) == 1
    assert "right, but not computed by the tensor units" in capsys.readouterr().err


def test_without_tensor_units_it_is_one_sentence_and_status_2(emulated, capsys):
    with apple_gpu("applegpu_g15s"):
        assert main(["check", "--tensor-units"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("[tensor_units] this machine must have a GPU of the M5 or later")


def test_times_with_and_without_tensor_units_stand_side_by_side(emulated, monkeypatch, capsys):
    monkeypatch.setattr(check_speed, "SECONDS", 0.0)
    monkeypatch.setattr(check_speed, "LAYERS", ((16, 0.5),))
    monkeypatch.setattr(check, "ON_TENSOR_UNITS", check_speed.Sizes(32, ("float16",), (17,)))
    monkeypatch.setattr(check, "all_cases", lambda: [c for c in all_cases() if c.name == UNITS])
    with apple_gpu():
        assert main(["check", "--tensor-units"]) == 0
    out = capsys.readouterr().out
    head = "forward | training | forward by tensor units | training by tensor units |"
    assert f"| B | density | dtype | rows | {head}" in out
    assert re.search(
        r"\| 16 \| 0\.5 \| float16 \| 17 (\| [\d.,]+ / [\d.,]+ \([\d.,]+\) ){4}\|", out
    )
