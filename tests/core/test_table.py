"""Tables: what folds, what stays apart, and that text and HTML show the same."""

from html.parser import HTMLParser

import pytest

from mlx_sparse_nn.core.table import WIDTH, Table, fold, html_table, text_table

NAMES = ["q_proj", "k_proj", "post_attention_layernorm"]
INTERLEAVED = [f"model.layers.{i}.{name}" for i in range(32) for name in NAMES]


class Cells(HTMLParser):
    """The texts of an HTML table by row, with the style of each, and the tags of other texts."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.styles, self.others, self.tags = [], [], [], []
        self.feed(text)
        assert self.tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.styles.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.styles[-1].append(dict(attrs)["style"])

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if self.tags[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        else:
            self.others.append((self.tags[-1], data))


@pytest.mark.parametrize(
    ("paths", "alike", "expected"),
    [
        (INTERLEAVED, None, [f"model.layers.0-31.{name} x 32" for name in NAMES]),
        (["a", "b"], None, ["a", "b"]),
        (["a.0", "a.1", "b.0"], None, ["a.0-1 x 2", "b.0"]),
        (["a.0", "a.1", "a.2", "a.3"], "xxyx", ["a.0-1 x 2", "a.2", "a.3"]),
        (["a.0", "a.1", "a.2", "a.3"], "xyyx", ["a.0", "a.1-2 x 2", "a.3"]),
        (["a.0", "a.2", "a.4"], None, ["a.0", "a.2", "a.4"]),  # 0-4 would say five
        (["a.9", "a.10", "a.11"], None, ["a.9-11 x 3"]),
        (["a.1", "a.0"], None, ["a.1", "a.0"]),
        (["0.a.0", "1.a.1"], None, ["0.a.0", "1.a.1"]),  # two integers differ
        (
            [f"{i}.experts.{j}.up" for i in range(2) for j in range(3)],
            None,
            ["0-1.experts.0-2.up x 6"],
        ),
        (
            [f"{i}.experts.{j}.up" for i in range(2) for j in range(3)],
            "xxxxxy",
            ["0.experts.0-2.up x 3", "1.experts.0-1.up x 2", "1.experts.2.up"],
        ),
        (["a.0.b", "c", "a.1.b"], None, ["a.0-1.b x 2", "c"]),
        (["a0", "a1"], None, ["a0", "a1"]),  # names, not places in a list
        (["", "0"], None, ["(itself)", "0"]),
        ([], None, []),
    ],
)
def test_what_folds(paths, alike, expected):
    lines = fold(paths, alike or [None] * len(paths))
    assert [name for name, _ in lines] == expected
    places = [place for _, places in lines for place in places]
    assert sorted(places) == list(range(len(paths)))
    assert [places[0] for _, places in lines] == sorted(places[0] for _, places in lines)


def test_one_layer_that_differs_stands_apart():
    alike = ["odd" if path == "model.layers.7.k_proj" else "even" for path in INTERLEAVED]
    lines = dict(fold(INTERLEAVED, alike))
    assert list(lines) == [
        "model.layers.0-31.q_proj x 32",
        "model.layers.0-6.k_proj x 7",
        "model.layers.0-31.post_attention_layernorm x 32",
        "model.layers.7.k_proj",
        "model.layers.8-31.k_proj x 24",
    ]
    assert [INTERLEAVED[i] for i in lines["model.layers.0-6.k_proj x 7"]] == [
        f"model.layers.{i}.k_proj" for i in range(7)
    ]


TABLE = Table(
    caption="sizes of <layers> & more",
    header=["layer", "n", "size"],
    rows=[["a", "1", "10"], ["<b> & 'c'", "200", "3"]],
    total=["total", "201", "13"],
    notes=["n < size", "a & b"],
)


def test_the_text():
    assert text_table(TABLE).splitlines() == [
        "sizes of <layers> & more",
        "layer        n  size",
        "a            1    10",
        "<b> & 'c'  200     3",
        "total      201    13",
        "n < size",
        "a & b",
    ]


def test_html_has_the_cells_of_the_text_escaped_and_aligned():
    found = Cells(html_table(TABLE))
    assert found.rows == [list(TABLE.header), *TABLE.rows, TABLE.total]
    sides = ["text-align: left", "text-align: right", "text-align: right"]
    assert found.styles == [sides] * 4
    assert found.others == [("caption", TABLE.caption), *(("p", note) for note in TABLE.notes)]
    assert "<b>" not in html_table(TABLE)


def test_a_table_without_rows_is_its_caption():
    empty = Table("nothing found", ["layer", "n"], [])
    assert text_table(empty) == "nothing found"
    assert Cells(html_table(empty)).rows == []


def test_names_too_long_for_the_width_stand_above_their_cells():
    long = "vision_tower." + "encoder." * 9 + "q_proj"
    table = Table(
        caption=" ".join(["word"] * 30),
        header=["layer", "first", "second"],
        rows=[["a.b", "1" * 10, "2" * 10], [long, "3", "4"]],
        notes=[f"{long} is long " * 2],
    )
    lines = text_table(table).splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    at = lines.index(long)
    assert lines[at + 1] == f"{'3':>15}  {'4':>10}".rjust(len(lines[at - 1]))
    assert lines[at - 1] == f"a.b    {'1' * 10}  {'2' * 10}"
    assert Cells(html_table(table)).rows[2][0] == long
