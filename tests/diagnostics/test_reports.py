"""Reports: one scheme of names, and tables of a deep model that people can read."""

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_sparse_nn
from mlx_sparse_nn import BlockSparseLinear, advise, prune, regrow, sparsify, summary, verify

NAMES = ["AdviceReport", "PruneReport", "RegrowReport", "SparsifyReport", "SummaryReport"]
NAMES += ["VerifyReport"]
PARTS = ["LayerSummary", "MethodTiming", "ProductCheck"]
PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
FOLDED = [f"model.layers.0-31.{name} x 32" for name in PROJECTIONS]
NORMS = [f"model.layers.0-31.{name}_layernorm x 32" for name in ("input", "post_attention")]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)
        self.o_proj = nn.Linear(16, 16, bias=False)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(16, 32, bias=False)
        self.down_proj = nn.Linear(32, 16, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(16), nn.RMSNorm(16)

    def __call__(self, x):
        x = x + self.self_attn.o_proj(self.self_attn.q_proj(self.input_layernorm(x)))
        return x + self.mlp.down_proj(self.mlp.gate_proj(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Block() for _ in range(32)]


class Llama(nn.Module):
    """The paths of a Llama of 32 layers, with small weights."""

    def __init__(self):
        super().__init__()
        self.model = Decoder()
        self.lm_head = nn.Linear(16, 24, bias=False)

    def __call__(self, x):
        for block in self.model.layers:
            x = block(x)
        return self.lm_head(x)


def reports(model):
    """Return a report of each function on a model whose linear layers are dense."""
    made = sparsify(model, block_size=4, density=0.5, predicate=lambda path, _: path != "lm_head")
    x = mx.random.normal((3, 16))
    layer = model.model.layers[0].mlp.gate_proj
    return {
        "sparsify": made,
        "summary": summary(model),
        "verify": verify(model, x),
        "prune": prune(model, 0.25),
        "advise": advise(layer, (1, 2), seconds=0.01),
        "regrow": regrow(layer, 0.5, "random", seed=0),
    }


@pytest.fixture(scope="module")
def deep():
    mx.random.seed(0)
    model = Llama()
    return model, reports(model)


def names_in(report):
    """Return the first cells of the lines of a table, by its text."""
    return [line.split("  ")[0] for line in repr(report).splitlines()]


def test_one_scheme_and_all_of_it_exported(deep):
    _, found = deep
    assert sorted(type(report).__name__ for report in found.values()) == sorted(NAMES)
    for function, report in found.items():
        assert type(report).__name__.lower().startswith(function[:4])
        assert type(report) is getattr(mlx_sparse_nn, type(report).__name__)
    for name in (*NAMES, *PARTS):
        assert name in mlx_sparse_nn.__all__
        kind = getattr(mlx_sparse_nn, name)
        assert dataclasses.is_dataclass(kind)
        assert vars(kind)["__dataclass_params__"].frozen


@pytest.mark.parametrize("function", ["sparsify", "summary", "verify", "prune", "advise", "regrow"])
def test_text_fits_and_html_has_its_cells(deep, function):
    report = deep[1][function]
    assert max(map(len, repr(report).splitlines())) <= 100
    text = report._repr_html_()
    assert text.startswith("<div><table><caption")
    table = report._table()
    for cell in [*table.header, *(cell for row in table.rows for cell in row)]:
        assert f">{cell.replace('<', '&lt;')}</t" in text


@pytest.mark.parametrize("function", ["sparsify", "summary", "verify", "prune"])
def test_layers_that_are_alike_share_a_line(deep, function):
    names = [name for name in names_in(deep[1][function]) if name.startswith("model.")]
    expected = [*FOLDED, *NORMS] if function == "summary" else FOLDED
    assert sorted(names) == sorted(expected)


def test_what_is_of_each_layer_and_what_of_all(deep):
    """Numbers of a line with x 32: each layer stores 8 of 16 blocks of 4 x 4, as float32."""
    found = deep[1]
    rows = {row[0]: row[1:] for row in found["sparsify"]._table().rows}
    of_q = [e for path, e in found["sparsify"].errors.items() if path.endswith("q_proj")]
    assert rows[FOLDED[0]] == ["16 x 16", "4", "8", "0.5", f"{max(of_q):.3f}"]
    assert max(of_q) > min(of_q)
    rows = {row[0]: row[1:] for row in found["prune"]._table().rows}
    assert rows[FOLDED[0]][:3] == ["8", "4", "50.0%"]
    assert found["prune"]._table().total == ["total", f"{32 * 48:,}", f"{32 * 24}", "50.0%", ""]
    report = found["summary"]
    table = report._table()
    rows = {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}
    of_q = [row for row in report.rows if row.path.endswith("q_proj")]
    total = 32 * (8 * 16 * 6 + 2 * 16) + 24 * 16
    assert table.caption.startswith(f"{total:,} parameters, ")
    assert table.caption.endswith("in KiB")
    assert rows[FOLDED[0]]["weights"] == "0.50"  # of each
    assert rows[FOLDED[0]]["share"] == f"{32 * 8 * 16 / total:.1%}"  # of all
    dead = [sum(getattr(row, f"dead_{side}") for row in of_q) for side in ("inputs", "outputs")]
    assert rows[FOLDED[0]]["dead"] == f"{dead[0]}/{dead[1]}"
    assert table.total[5] == f"{4 * total / 1024:.0f}"
    for function in ("sparsify", "prune", "summary"):
        assert "x n: n layers alike" in repr(found[function])


def test_one_layer_that_differs_stands_apart():
    model = Llama()
    dense = {"model.layers.7.mlp.gate_proj": 1.0}
    predicate = lambda path, _: path != "lm_head" and {"density": dense.get(path, 0.5)}
    made = sparsify(model, block_size=4, predicate=predicate)
    apart = [
        "model.layers.0-6.mlp.gate_proj x 7",
        "model.layers.7.mlp.gate_proj",
        "model.layers.8-31.mlp.gate_proj x 24",
    ]
    reports = [made, summary(model), prune(model, 0.75)]
    for report in reports:
        names = names_in(report)
        assert [name for name in names if "gate_proj" in name] == apart
        assert FOLDED[0] in names
        assert max(map(len, repr(report).splitlines())) <= 100
    attention: Any = model.model.layers[3].self_attn
    attention.q_proj = BlockSparseLinear(16, 16, block_size=4, bias=True)
    report = verify(model, mx.random.normal((3, 16)))
    assert [name for name in names_in(report) if "q_proj" in name] == [
        "model.layers.0-2.self_attn.q_proj x 3",
        "model.layers.3.self_attn.q_proj",
        "model.layers.4-31.self_attn.q_proj x 28",
    ]
    assert "model.layers.0-31.mlp.gate_proj x 32" in names_in(report)


def test_a_report_says_what_was_done_whatever_comes_after():
    model = Llama()
    made = sparsify(model, block_size=4, density=0.5)
    before = repr(made)
    prune(model, 0.25)
    assert (repr(made), made.density) == (before, 0.5)


def test_the_largest_error_of_a_line_is_shown(deep):
    report = deep[1]["verify"]
    (row,) = [row for row in report._table().rows if row[0] == FOLDED[0]]
    parts = [
        check.error / check.bound
        for check in report.checks
        if check.layer.endswith("q_proj") and check.product == "weight gradient"
    ]
    assert max(parts) > min(parts)
    assert row[5].endswith(f" {max(parts):.0%}")


def test_a_wrong_layer_stands_apart():
    class Wrong(BlockSparseLinear):
        def __call__(self, x):
            return super().__call__(x) + 1

    model = nn.Sequential(*(BlockSparseLinear(32, 32) for _ in range(4)))
    model.layers[2] = Wrong(32, 32)
    with pytest.raises(mlx_sparse_nn.MismatchError) as caught:
        verify(model, mx.random.normal((3, 32)))
    lines = {line.split("  ")[0]: line for line in repr(caught.value.report).splitlines()}
    assert "WRONG" in lines["layers.2"]
    assert "WRONG" not in lines["layers.0-1 x 2"] + lines["layers.3"]


def test_what_is_said_of_many_layers_is_said_once():
    model = Llama()
    said = repr(sparsify(model, block_size=4, predicate=lambda path, _: "down_proj" not in path))
    assert (
        "model.layers.0-31.mlp.down_proj x 32 skipped (32.4% of the model): the predicate" in said
    )
    first = nn.Linear(16, 16)
    shared = nn.Sequential(*[first] * 8)
    assert "layers.1-7 x 7: the layer of layers.0" in repr(sparsify(shared, block_size=4))
    model = Llama()
    sparsify(model, block_size=4)
    model.head = BlockSparseLinear(16, 16, block_size=4)
    model.unused = [BlockSparseLinear(16, 16, block_size=4) for _ in range(9)]
    report = verify(model, mx.random.normal((3, 16)))
    assert len(report.not_reached) == 10
    assert "not reached by this input: head, unused.0-8 x 9" in repr(report)


@pytest.mark.parametrize("function", ["sparsify", "prune", "regrow", "verify"])
def test_reports_claim_nothing_of_quality(deep, function):
    assert "the model's quality" in repr(deep[1][function]).lower()
