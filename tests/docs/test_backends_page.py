"""docs/backends.md: every cell of its tables is true, and measured tables are of their files."""

import importlib
import json
import re
import tempfile

import mlx.core as mx
import pytest
from support import ROOT, device_of, integers, random_pattern, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRArray, qspmm, qspmm_t, sddmm, spmm, spmm_t
from mlx_sparse_nn.core import tuned

PAGE = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
DTYPES = {
    "float32": [mx.float32],
    "float16, bfloat16": [mx.float16, mx.bfloat16],
    "float64": [mx.float64],
    "complex64": [mx.complex64],
}


def table() -> dict[str, dict[str, str]]:
    rows = re.findall(r"\| operation .*?\n\n", PAGE, re.DOTALL)[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def operation(name: str, dtype: mx.Dtype):
    """Return the operation of a row as a function of two arrays, and two arrays for it."""
    block_size = 1 if "scalars" in name or "@" in name else 32 if "quantized" in name else 4
    pattern = random_pattern(4, 5, block_size, seed=1)
    data = integers(pattern.data_shape, 1, dtype)
    x, y = integers((3, pattern.shape[1]), 2, dtype), integers((3, pattern.shape[0]), 3, dtype)
    if name.startswith("`spmm`"):
        return lambda data, x: spmm(data, pattern, x), data, x
    if name.startswith("`spmm_t`"):
        return lambda data, y: spmm_t(data, pattern, y), data, y
    if name.startswith("`sddmm`"):
        return lambda y, x: sddmm(pattern, y, x), y, x
    if name.startswith("`qspmm"):
        packed = mx.full((pattern.n_blocks, 32, 4), 0x21032103, mx.uint32)
        scales, product, operand = data[..., :1], qspmm, x
        if name.startswith("`qspmm_t`"):
            product, operand = qspmm_t, y
        return lambda scales, x: product(packed, scales, scales, pattern, x), scales, operand
    if name == "`A @ x`, `x @ A`":

        def both(data, x):
            A = CSRArray(data, pattern)
            return (A @ x.T).T @ A

        return both, data, x
    assert name == "`BlockSparseLinear`"
    layer = BlockSparseLinear(pattern.shape[1], pattern.shape[0], pattern, bias=False)

    def apply(weight, x):
        layer.weight = weight
        return layer(x)

    return apply, data, x


def exported(f, a, b):
    """Return what a file gives that holds f and its gradients."""
    both = lambda a, b: [f(a, b), *mx.grad(lambda a, b: f(a, b).sum(), argnums=(0, 1))(a, b)]
    with tempfile.NamedTemporaryFile(suffix=".mlxfn") as file:
        mx.export_function(file.name, both, a, b)
        out = untyped(mx.import_function(file.name))(a, b)
        mx.eval(out)
    return out


TRANSFORMS = {
    "grad": lambda f, a, b: mx.grad(lambda a, b: f(a, b).sum(), argnums=(0, 1))(a, b),
    "jvp": lambda f, a, b: mx.jvp(f, [a, b], [a, b])[1],
    "vmap": lambda f, a, b: mx.vmap(f)(mx.stack([a, a]), mx.stack([b, b])),
    "compile": lambda f, a, b: mx.compile(f)(a, b),
    "second order": lambda f, a, b: mx.jvp(
        mx.grad(lambda a, b: (f(a, b) ** 2).sum(), argnums=(0, 1)), [a, b], [a, b]
    )[1],
    "export": exported,
}
CELLS = [(row, column, text) for row, cells in table().items() for column, text in cells.items()]


@pytest.mark.parametrize(("row", "column", "text"), CELLS)
def test_every_cell_of_the_table_is_true(row, column, text):
    assert text in ("yes", "no")
    if column in DTYPES:
        for dtype in DTYPES[column]:
            with device_of(dtype):
                f, a, b = operation(row, dtype)
                if text == "yes":
                    out = f(a, b)
                    mx.eval(out)
                    assert out.dtype == dtype
                else:
                    with pytest.raises(TypeError, match=str(dtype).rpartition(".")[2]):
                        f(a, b)
    else:
        assert text == "yes"
        mx.eval(TRANSFORMS[column](*operation(row, mx.float32)))


def test_the_table_of_backends_is_true():
    (row,) = re.findall(r"\| Metal kernels .*", PAGE)
    _, _, _, dtypes, blocks, _ = row.split("|")
    assert sorted(dtypes.strip().split(", ")) == sorted(
        str(d).rpartition(".")[2] for d in tuned.KERNEL_DTYPES
    )
    assert re.findall(r"all: (.*) by tiles", blocks)[0] == "4 and more"
    assert tuned.METAL_SMALLEST_TILED == 4
    (row,) = re.findall(r"\| CUDA kernels .*", PAGE)
    assert f"with over {tuned.CUDA_FEW_ROWS} rows of x" in row
    assert f"multiples of 8 up to {tuned.MAX_TILED_BLOCK} by tiles" in row


@pytest.mark.parametrize(
    ("script", "function", "mark", "page"),
    [
        ("char_lm", "table", "char_lm", "docs/examples.md"),
        ("gpu_report", "table", "gpu", "docs/backends.md"),
        ("gpt", "table", "gpt", "docs/backends.md"),
        ("benchmarks.metal_traffic", "table", "metal_traffic", "benchmarks/README.md"),
        ("benchmarks.metal_counts", "text", "metal_counts", "benchmarks/README.md"),
        ("benchmarks.metal_holes", "text", "metal_holes", "benchmarks/README.md"),
    ],
)
def test_measured_tables_are_made_from_their_files(script, function, mark, page, monkeypatch):
    for folder in (ROOT, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module(script)
    table = getattr(module, function)(json.loads(module.RESULTS.read_text()))
    assert f"<!-- {mark} -->\n{table}\n<!-- end -->" in (ROOT / page).read_text()


@pytest.mark.parametrize("part", ["aims", "rows", "blocks", "quantized", "graphs"])
def test_tables_of_every_card_are_made_from_their_files(part, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("gpu_report")
    table = report.of_cards(report.PARTS[part])
    page = (ROOT / "benchmarks/README.md").read_text()
    assert f"<!-- gpu_{part} -->\n{table}\n<!-- end -->" in page
