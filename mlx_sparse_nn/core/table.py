"""Reports as tables: plain text where they are printed, HTML in notebooks."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

WIDTH = 100  # columns of text
NOT_MEASURED = (
    "The model's quality is not measured here: evaluate it, and calibrate or fine-tune it."
)
LARGEST = "x n: n layers alike, with the numbers of each, and their largest error"


@dataclass(frozen=True)
class Table:
    """What a report shows, as text and as HTML.

    Attributes:
        caption: What the table is about.
        header: Names of the columns.
        rows: The cells of each row, one for each column.
        total: A last row for all others together, or None.
        notes: Sentences below.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] | None = None
    notes: Sequence[str] = ()

    @property
    def lines(self) -> list[Sequence[str]]:
        """The rows, and the total if there is one."""
        return [*self.rows, *([] if self.total is None else [self.total])]


class Report:
    """What a function found or did: a table, printed as text and shown by notebooks as HTML."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        return text_table(self._table())

    def _repr_html_(self) -> str:
        return html_table(self._table())


def text_table(table: Table) -> str:
    """Return a table as text: the first column to the left, the others to the right.

    A name that would make the table wider than ``WIDTH`` stands on a line of its own, above its
    cells. Caption and notes are wrapped.
    """
    lines = _aligned([table.header, *table.lines]) if table.lines else []
    return "\n".join([_wrapped(table.caption), *lines, *map(_wrapped, table.notes)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    names, *columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    room = WIDTH - sum(2 + width for width in widths)
    name_width = max((len(name) for name in names if len(name) <= room), default=0)
    lines = []
    for name, *cells in rows:
        if len(name) > name_width:
            lines.append(name)
            name = ""
        right = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([name.ljust(name_width), *right]).rstrip())
    return lines


def _wrapped(sentence: str) -> str:
    return textwrap.fill(
        sentence,
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def html_table(table: Table) -> str:
    """Return a table as HTML, aligned as by :func:`text_table`; all texts are escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        aligned = ["left", *["right"] * (len(cells) - 1)]
        return "<tr>{}</tr>".format(
            "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(aligned, cells, strict=True)
            )
        )

    parts = [f'<caption style="text-align: left">{html.escape(table.caption)}</caption>']
    if table.lines:
        parts.append(f"<thead>{row(table.header, 'th')}</thead>")
        parts.append(f"<tbody>{''.join(row(cells, 'td') for cells in table.rows)}</tbody>")
    if table.total is not None:
        parts.append(f"<tfoot>{row(table.total, 'th')}</tfoot>")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    return f"<div><table>{''.join(parts)}</table>{notes}</div>"


def fold(paths: Sequence[str], alike: Sequence[Hashable]) -> list[tuple[str, list[int]]]:
    """Give layers of one kind one line, whatever their order in the model.

    Layers share a line if their paths differ in one integer, which counts up by one from each to
    the next, and ``alike`` is equal for them. Lines are then joined in the same way:
    ``layers.0-1.experts.0-7.up x 16``.

    Args:
        paths: Path of each layer.
        alike: For each layer, what has to be equal.

    Returns:
        For each line, in the order of their first layers: the path with its ranges and ``x`` the
        number of layers, such as ``layers.0-31.mlp.up_proj x 32``, and the places of these layers
        in ``paths``.
    """
    lines = [_Line(path.split("."), [place]) for place, path in enumerate(paths)]
    while len(folded := _fold_once(lines, alike)) < len(lines):
        lines = folded
    return [(line.name(), line.places) for line in lines]


@dataclass
class _Line:
    """Layers that share a line of a table.

    Attributes:
        parts: The path of the first, split at its dots, or with the ranges of all.
        places: Where the layers lie in the list.
        counter: Which part counts up from layer to layer, once there are several.
        last: The integer that this part has come to.
    """

    parts: list[str]
    places: list[int]
    counter: int | None = None
    last: int = 0

    def name(self) -> str:
        path = ".".join(self.parts) or "(itself)"
        return path if len(self.places) == 1 else f"{path} x {len(self.places)}"


def _fold_once(lines: Sequence[_Line], alike: Sequence[Hashable]) -> list[_Line]:
    """Join the lines that differ in one integer of their paths; ranges are no integers."""
    folded: list[_Line] = []
    open_lines: dict[Hashable, _Line] = {}  # by what the next of their layers would be
    for line in lines:
        keys = {}
        for i, part in enumerate(line.parts):
            if part.isdecimal():
                others = (*line.parts[:i], None, *line.parts[i + 1 :])
                keys[i] = (others, len(line.places), alike[line.places[0]])
        for i, key in keys.items():
            number = int(line.parts[i])
            earlier = open_lines.get((key, number))
            if earlier is not None and earlier.counter in (None, i):
                earlier.counter, earlier.last = i, number
                earlier.places += line.places
                open_lines[key, number + 1] = earlier
                break
        else:
            folded.append(_Line(list(line.parts), list(line.places)))
            for i, key in keys.items():
                open_lines[key, int(line.parts[i]) + 1] = folded[-1]
    for line in folded:
        if line.counter is not None:
            line.parts[line.counter] += f"-{line.last}"
    return folded
