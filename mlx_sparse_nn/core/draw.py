"""Pictures of a pattern: on matplotlib's axes, in a terminal, and as SVG in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLOT_CELLS = 1024  # a side, at most
_SVG_CELLS = 128
_SVG_SIDE = 256  # pixels of the longer side
_SVG_LEVELS = 16  # of opacity
_BLUE = "#3b7dd8"  # legible on white and on black, as is the grey
_GREY = "#808080"
# The part of a colour map that is used: neither the palest, since what is not stored is white, nor
# the darkest.
_FIRST, _LAST = 0.29, 0.86


class Drawable(Protocol):
    """What drawing reads of a :class:`CSRPattern`, whose repr is the caption."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def block_size(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def row_indices(self) -> np.ndarray: ...
    @property
    def indices(self) -> np.ndarray: ...
    @property
    def places(self) -> np.ndarray: ...


def plot(
    pattern: Drawable,
    ax: Axes | None = None,
    *,
    cmap: str = "Blues",
    values: mx.array | None = None,
    labels: tuple[str, str] = ("columns", "rows"),
) -> Axes:
    """Draw a pattern on matplotlib's axes, to scale; see :meth:`CSRPattern.plot`.

    Args:
        pattern: What to draw. Beyond 1024 blocks a side, neighbours are merged.
        ax: Where; by default new axes.
        cmap: Name of a colour map.
        values: Stored values, ``pattern.data_shape``. Cells are then coloured by the root mean
            square of the values in them, else by their density.
        labels: Names of the horizontal and of the vertical axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes: Axes = _pyplot().subplots()[1] if ax is None else ax
    merge = _merge(pattern, _PLOT_CELLS, _PLOT_CELLS)
    density = local_density(pattern, merge)
    shown = density if values is None else _root_mean_square(pattern, merge, values)
    height, width = (cells * merge * pattern.block_size for cells in shown.shape)
    axes.imshow(
        np.ma.masked_array(shown, density == 0),
        cmap=_colours(cmap),
        vmin=0,
        vmax=_peak(shown),
        extent=(0, width, height, 0),
    )
    axes.set(
        xlim=(0, max(1, pattern.shape[1])),
        ylim=(max(1, pattern.shape[0]), 0),
        xlabel=labels[0],
        ylabel=labels[1],
    )
    return axes


def spy(pattern: Drawable, width: int) -> str:
    """Return a pattern drawn in half blocks, two cells to a character; see
    :meth:`CSRPattern.spy`."""
    merge = _merge(pattern, 2 * width, width)
    filled = local_density(pattern, merge) > 0
    filled = np.pad(filled, ((0, len(filled) % 2), (0, 0)))
    lines = [
        "".join(" ▀▄█"[t + 2 * b] for t, b in zip(*pair, strict=True)) for pair in _pairs(filled)
    ]
    bar = "─" * filled.shape[1]
    scale = f"; a cell is {merge} x {merge} blocks" if merge > 1 else ""
    return "\n".join(
        [f"┌{bar}┐", *(f"│{line}│" for line in lines), f"└{bar}┘", f"{pattern!r}{scale}"]
    )


def svg(pattern: Drawable, values: mx.array | None = None, caption: str | None = None) -> str:
    """Return a pattern as an SVG document of at most 128 x 128 cells, to scale.

    A cell is more opaque the denser it is, or the larger its values are. One path holds the cells
    of one opacity; its coordinates are in blocks.

    Args:
        pattern: What to draw.
        values: Stored values, ``pattern.data_shape``, whose root mean square shades the cells.
        caption: What stands below, in place of the pattern's repr.
    """
    merge = _merge(pattern, _SVG_CELLS, _SVG_CELLS)
    density = local_density(pattern, merge)
    n_rows, n_cols = (max(1, n) for n in pattern.grid)
    shown = density if values is None else _root_mean_square(pattern, merge, values)
    parts = np.nan_to_num(shown / _peak(shown), nan=1.0, posinf=1.0)
    level = np.clip(np.ceil(parts * _SVG_LEVELS), density > 0, _SVG_LEVELS).astype(int)
    paths = []
    for value in np.unique(level[level > 0]):
        opacity = 0.2 + 0.8 * value / _SVG_LEVELS
        runs = "".join(
            f"M{x} {y}h{min(x + w, n_cols) - x}v{min(y + merge, n_rows) - y}H{x}z"
            for y, x, w in merge * _runs(level == value)
        )
        paths.append(f'<path fill-opacity="{opacity:.3g}" d="{runs}"/>')
    side = _SVG_SIDE / max(n_rows, n_cols)
    width, height = max(1.0, n_cols * side), max(1.0, n_rows * side)
    caption = repr(pattern) if caption is None else caption
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 7 * len(caption)) + 2:.6g}" '
        f'height="{height + 20:.6g}">'
        f'<svg x="1" y="1" width="{width:.6g}" height="{height:.6g}" '
        f'viewBox="0 0 {n_cols} {n_rows}" preserveAspectRatio="none">'
        f'<g fill="{_BLUE}" shape-rendering="crispEdges">{"".join(paths)}</g></svg>'
        f'<rect x="0.5" y="0.5" width="{width + 1:.6g}" height="{height + 1:.6g}" '
        f'fill="none" stroke="{_GREY}"/>'
        f'<text x="1" y="{height + 15:.6g}" font-family="monospace" font-size="11" '
        f'fill="{_GREY}">{escape(caption)}</text></svg>'
    )


def local_density(pattern: Drawable, merge: int) -> np.ndarray:
    """Return the stored fraction of each cell of ``merge x merge`` blocks; at least one cell."""
    places = np.unique(pattern.places)  # a block that comes twice covers its place once
    counts = _sum_cells(pattern, merge, *np.divmod(places, max(1, pattern.grid[1])))
    rows, cols = (
        np.clip(n - merge * np.arange(cells), 1, merge)
        for n, cells in zip(pattern.grid, counts.shape, strict=True)
    )
    return counts / (rows[:, None] * cols)


def _root_mean_square(pattern: Drawable, merge: int, values: mx.array) -> np.ndarray:
    """Return the root mean square of the stored values in each cell, 0 where there is none.

    Values outside the matrix are zeros, and do not count.
    """
    blocks = values.astype(mx.float32).reshape(pattern.n_blocks, pattern.block_size**2)
    squares = np.array(mx.square(blocks).sum(axis=1))
    stored = pattern.row_indices, pattern.indices
    counts = np.ones(pattern.n_blocks)
    for size, blocks_along in zip(pattern.shape, stored, strict=True):
        counts *= np.minimum(pattern.block_size, size - blocks_along * pattern.block_size)
    sums = _sum_cells(pattern, merge, *stored, weights=squares)
    return np.sqrt(sums / np.maximum(1, _sum_cells(pattern, merge, *stored, weights=counts)))


def _peak(shown: np.ndarray) -> float:
    """Return the largest of what is shown, or 1 where that is no scale."""
    peak = float(shown.max())
    return peak if 0 < peak < np.inf else 1.0


def _colours(name: str) -> Any:
    """Return the middle part of a colour map, so that a scale begins at 0 with a visible colour."""
    _pyplot()  # says what to install
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](np.linspace(_FIRST, _LAST, 256)), name)


def _sum_cells(pattern: Drawable, merge: int, rows, cols, weights=None) -> np.ndarray:
    height, width = (max(1, -(-n // merge)) for n in pattern.grid)
    cell = (rows // merge).astype(np.int64) * width + cols // merge
    return np.bincount(cell, weights, minlength=height * width).reshape(height, width)


def _merge(pattern: Drawable, most_rows: int, most_cols: int) -> int:
    """Return how many blocks go into a cell a side, so that there are no more cells than these."""
    n_rows, n_cols = pattern.grid
    return max(1, -(-n_rows // most_rows), -(-n_cols // most_cols))


def _pairs(filled: np.ndarray):
    return zip(filled[::2].astype(int), filled[1::2].astype(int), strict=True)


def _runs(mask: np.ndarray) -> np.ndarray:
    """Return ``(row, first column, length)`` of each horizontal run of true cells, ``(n, 3)``."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    return np.stack([rows, starts, ends - starts], axis=1)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "[plot] needs matplotlib: pip install matplotlib, or this package with [examples]"
        ) from error
    return pyplot
