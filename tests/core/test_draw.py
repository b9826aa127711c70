"""Pictures of patterns: what is filled is what is stored, to scale, whatever the size."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import patterns, untyped

from mlx_sparse_nn import BlockSparseLinear, CSRPattern
from mlx_sparse_nn import patterns as builders

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SVG = "{http://www.w3.org/2000/svg}"
WIDE = builders.random(40 * 2, 700 * 2, 0.05, 2, seed=3)  # 40 x 700 blocks: merged by 6
TALL = builders.random(3000, 5, 0.01, 1, seed=4)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def stored_blocks(pattern) -> np.ndarray:
    """Return the bool array of stored blocks, at least 1 x 1."""
    block = pattern.block_size
    mask = np.array(pattern.tomask())[::block, ::block]
    return mask if mask.size else np.zeros(np.maximum(1, mask.shape), bool)


def downsampled(pattern, merge):
    """Return the stored fraction of cells of ``merge x merge`` blocks, the slow, obvious way."""
    mask = stored_blocks(pattern)
    rows, cols = (range(0, n, merge) for n in mask.shape)
    return np.array([[mask[r : r + merge, c : c + merge].mean() for c in cols] for r in rows])


def child(root, tag) -> ElementTree.Element:
    """Return the child of an SVG element, which must be there."""
    found = root.find(SVG + tag)
    assert found is not None
    return found


def shown_in(ax) -> np.ma.MaskedArray:
    """Return the values that an image on matplotlib's axes shows."""
    shown = ax.images[0].get_array()
    assert isinstance(shown, np.ma.MaskedArray)
    return shown


def drawn(text):
    """Return the opacity at each block of an SVG picture, 0 where nothing is drawn."""
    picture = child(ElementTree.fromstring(text), "svg")
    _, _, n_cols, n_rows = map(int, picture.attrib["viewBox"].split())
    opacity = np.zeros((n_rows, n_cols))
    for path in picture.iter(f"{SVG}path"):
        d = path.attrib["d"]
        runs = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)H(\d+)z", d)
        assert "".join("M{} {}h{}v{}H{}z".format(*run) for run in runs) == d
        for x, y, w, h, back in (map(int, run) for run in runs):
            assert back == x
            assert not opacity[y : y + h, x : x + w].any()  # nothing is drawn twice
            assert opacity[y : y + h, x : x + w].shape == (h, w)  # nor outside
            opacity[y : y + h, x : x + w] = float(path.attrib["fill-opacity"])
    return opacity


class TestSvg:
    @given(patterns())
    def test_it_fills_the_stored_blocks(self, pattern):
        opacity = drawn(pattern._repr_svg_())
        assert np.array_equal(opacity, stored_blocks(pattern))

    @pytest.mark.parametrize("pattern", [WIDE, TALL])
    def test_large_patterns_are_merged_by_density(self, pattern):
        shape = stored_blocks(pattern).shape
        merge = -(-max(shape) // 128)
        assert merge > 1
        density = downsampled(pattern, merge)
        expected = 0.2 + 0.8 * np.ceil(16 * density / density.max()) / 16
        expected = np.kron(np.where(density > 0, expected, 0), np.ones((merge, merge)))
        opacity = drawn(pattern._repr_svg_())
        assert opacity == pytest.approx(expected[: shape[0], : shape[1]], rel=0.01)
        assert len(np.unique(opacity)) > 3

    @pytest.mark.parametrize("pattern", [WIDE, TALL, builders.butterfly(64, 8)])
    def test_it_is_to_scale(self, pattern):
        root = ElementTree.fromstring(pattern._repr_svg_())
        picture = child(root, "svg")
        width, height = (float(picture.attrib[name]) for name in ("width", "height"))
        n_rows, n_cols = pattern.shape
        assert max(width, height) == 256
        assert min(width, height) == pytest.approx(
            max(1, 256 * min(n_rows / n_cols, n_cols / n_rows)), rel=1e-5
        )
        assert (width > height) == (n_cols > n_rows)
        assert float(root.attrib["width"]) >= width + 2
        assert float(root.attrib["height"]) >= height + 2

    def test_its_size_is_bounded(self):
        worst = builders.random(128 * 30, 128 * 30, 0.004, 1, seed=1)
        assert len(worst._repr_svg_()) < 400_000

    def test_it_says_what_it_is_and_needs_nothing_else(self):
        pattern = builders.butterfly(64, 8)
        text = pattern._repr_svg_()
        assert child(ElementTree.fromstring(text), "text").text == repr(pattern)
        assert not re.search("href|url|style|script|class", text)

    def test_a_layer_is_shaded_by_its_values_and_named(self):
        layer = BlockSparseLinear(16, 12, builders.banded(12, 16, 1, 4))
        layer.weight = mx.random.normal(layer.weight.shape) * mx.arange(8)[:, None, None]
        opacity = drawn(layer._repr_svg_())
        size = np.sqrt(np.square(np.array(layer.weight)).mean(axis=(1, 2)))
        expected = 0.2 + 0.8 * np.maximum(1, np.ceil(16 * size / size.max())) / 16
        pattern = layer.pattern
        found = opacity[pattern.row_indices, pattern.indices]
        assert found == pytest.approx(expected, rel=0.01)
        assert (opacity > 0).sum() == 8  # a block of zeros is drawn too
        caption = child(ElementTree.fromstring(layer._repr_svg_()), "text").text
        assert caption == "BlockSparseLinear(16 to 12, block_size=4, density 0.667)"

    def test_a_quantized_layer_is_named(self):
        layer = BlockSparseLinear(64, 64, block_size=32, density=1.0).to_quantized()
        assert ">QuantizedBlockSparseLinear(64 to 64, block_size=32, dens" in layer._repr_svg_()


class TestSpy:
    def test_a_small_pattern(self):
        mask = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]], bool)
        pattern = builders.from_mask(mask.repeat(4, 0).repeat(4, 1), 4)
        assert pattern.spy().splitlines() == [
            "┌───┐",
            "│█ ▀│",
            "│ ▄ │",
            "│▀▀▀│",
            "└───┘",
            "CSRPattern(20 x 12, block_size=4, 7 blocks, density 0.467)",
        ]
        assert BlockSparseLinear(12, 20, pattern).spy(3) == pattern.spy(3)
        assert pattern.spy(2).splitlines()[:3] == ["┌──┐", "│█▀│", "│▀▀│"]
        assert pattern.spy(2).splitlines()[-1].endswith("density 0.467); a cell is 2 x 2 blocks")

    def test_nothing_stored(self):
        assert CSRPattern([0], [], (0, 0)).spy().splitlines()[:3] == ["┌─┐", "│ │", "└─┘"]

    @given(patterns(), st.integers(1, 8))
    def test_a_cell_is_filled_where_anything_is_stored(self, pattern, width):
        n_rows, n_cols = stored_blocks(pattern).shape
        merge = max(-(-n_cols // width), -(-n_rows // (2 * width)))
        expected = downsampled(pattern, merge) > 0
        *picture, last = pattern.spy(width).splitlines()
        lines = [line[1:-1] for line in picture[1:-1]]
        assert all(len(line) == expected.shape[1] <= width for line in lines)
        halves = [[[c in "▀█" for c in line], [c in "▄█" for c in line]] for line in lines]
        found = np.array(halves).reshape(-1, expected.shape[1])
        assert np.array_equal(found[: len(expected)], expected)
        assert not found[len(expected) :].any()
        assert len(found) - len(expected) in (0, 1)
        assert last.startswith(repr(pattern))

    def test_a_million_rows_are_drawn_at_once(self):
        pattern = builders.bidiagonal_blocks(1_000_000, 1000)
        lines = pattern.spy(10).splitlines()
        assert lines[1] == "│▀▄        │"
        assert lines[-1].endswith("a cell is 100000 x 100000 blocks")


class TestPlot:
    @given(patterns())
    def test_it_shows_the_stored_blocks_to_scale(self, pattern):
        ax = pattern.plot()
        shown = shown_in(ax)
        assert np.array_equal(~np.ma.getmaskarray(shown), stored_blocks(pattern))
        assert ax.get_xlim() == (0, max(1, pattern.shape[1]))
        assert ax.get_ylim() == (max(1, pattern.shape[0]), 0)
        assert ax.get_aspect() == 1
        if pattern.nnz:
            height, width = (size * pattern.block_size for size in pattern.grid)
            assert ax.images[0].get_extent() == [0, width, height, 0]
        plt.close(ax.figure)

    def test_it_draws_on_the_given_axes(self):
        _, axes = plt.subplots(1, 2)
        assert builders.butterfly(64, 8).plot(axes[1], cmap="Greys") is axes[1]
        assert not axes[0].images
        assert axes[1].images[0].get_cmap().name == "Greys"
        assert (axes[1].get_xlabel(), axes[1].get_ylabel()) == ("columns", "rows")

    def test_large_patterns_are_merged_by_density(self):
        pattern = builders.random(2100, 1500, 0.001, 1, seed=2)
        ax = pattern.plot()
        np.testing.assert_array_equal(shown_in(ax).filled(0), downsampled(pattern, 3))
        assert ax.images[0].get_extent() == [0, 1500, 2100, 0]
        odd = builders.random(2101, 1500, 0.001, 1, seed=2).plot()
        assert odd.images[0].get_extent() == [0, 1500, 2103, 0]
        assert odd.get_ylim() == (2101, 0)

    def test_a_layer_is_shaded_by_the_size_of_its_values(self):
        layer = BlockSparseLinear(16, 12, builders.banded(12, 16, 1, 4))
        layer.weight = mx.random.normal(layer.weight.shape) * mx.arange(8)[:, None, None]
        ax = layer.plot()
        shown = shown_in(ax)
        expected = np.sqrt(np.square(np.array(layer.weight)).mean(axis=(1, 2)))
        pattern = layer.pattern
        np.testing.assert_allclose(shown[pattern.row_indices, pattern.indices], expected, rtol=1e-6)
        assert np.ma.getmaskarray(shown).sum() == 12 - 8
        colours = ax.images[0].to_rgba(shown).sum(axis=-1)[pattern.row_indices, pattern.indices]
        assert (np.argsort(colours) == np.argsort(-expected)).all()  # larger is darker
        assert colours.max() < 3.9  # and none is white
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("inputs", "outputs")
        low, high = ax.images[0].get_clim()  # a colour bar's
        assert low == 0
        assert high == pytest.approx(expected.max())

    def test_merged_blocks_are_shaded_by_their_stored_values(self):
        pattern = CSRPattern([0, 2, 3] + [3] * 1998, [0, 1, 1], (2000, 2))
        layer = BlockSparseLinear(2, 2000, pattern)
        layer.weight = mx.array([1.0, 2.0, 5.0])
        shown = shown_in(layer.plot())
        assert shown.shape == (1000, 1)
        assert shown[0, 0] == pytest.approx(np.sqrt(30 / 3))

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
    def test_any_values_can_be_drawn(self, value, dtype):
        layer = BlockSparseLinear(64, 64, builders.block_diagonal(64, 2))
        layer.weight = (layer.weight * 0 + value).astype(dtype)
        layer.plot().figure.canvas.draw()
        assert (drawn(layer._repr_svg_()) > 0).sum() == 2

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"\[plot\] needs matplotlib: pip install .*examples"):
            builders.butterfly(64, 8).plot()

    def test_importing_the_package_does_not_import_matplotlib(self):
        code = "import sys, mlx_sparse_nn; sys.exit('matplotlib' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_gallery_shows_every_builder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    import make_pictures

    shown = " ".join(make_pictures.gallery())
    for name, builder in vars(builders).items():
        if getattr(builder, "__module__", None) == builders.__name__ and name[0] != "_":
            assert f"{name}(" in shown
    monkeypatch.setattr(make_pictures, "PICTURE", tmp_path / "patterns.png")
    make_pictures.main()
    assert (tmp_path / "patterns.png").stat().st_size > 10_000


BAD = [
    (lambda: builders.butterfly(64, 8).spy(0), ValueError, r"width must be in \[1"),
    (
        lambda: builders.butterfly(64, 8).spy(untyped(4.5)),
        TypeError,
        "width must be an integer, got 4.5",
    ),
    (
        lambda: BlockSparseLinear(64, 64).spy(untyped("wide")),
        TypeError,
        "width must be an integer, got 'wi",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=r"\[CSRPattern.spy\] " + message):
        call()
