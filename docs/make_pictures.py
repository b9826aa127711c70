"""Draw the README's picture of patterns: ``pip install matplotlib``, then run this file."""

from pathlib import Path

import matplotlib
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sparse_nn import BlockSparseLinear, CSRPattern, patterns

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).with_name("patterns.png")


def ring(n: int) -> np.ndarray:
    """Return the ``(n, n)`` bool array that is true between two circles."""
    y, x = np.indices((n, n)) - (n - 1) / 2
    radius = np.hypot(x, y)
    return (radius > 0.3 * n) & (radius < 0.47 * n)


def wavy_linear(n: int) -> nn.Linear:
    """Return a dense layer whose weights are large in some regions and small in others."""
    i, j = np.indices((n, n)) / n
    scale = np.exp(2 * np.sin(14 * i + 4 * j) * np.cos(9 * j - 4 * i))
    linear = nn.Linear(n, n)
    linear.weight = mx.array(scale * np.random.default_rng(0).standard_normal((n, n)))
    return linear


def gallery() -> dict[str, CSRPattern | BlockSparseLinear]:
    """Return what the picture shows, under the code that makes it."""
    mask, w, linear = ring(512), np.tril(np.ones((512, 512))), wavy_linear(512)
    i, j = np.indices((32, 32))
    scores = np.cos(i / 3) * np.sin(j / 2)
    return {
        "block_diagonal(512, 8)": patterns.block_diagonal(512, 8),
        "bidiagonal_blocks(24, 3)": patterns.bidiagonal_blocks(24, 3),
        "banded(512, 512, 1)": patterns.banded(512, 512, 1),
        "butterfly(512)": patterns.butterfly(512),
        "banded(...) | butterfly(...)": patterns.banded(512, 512, 1, 16)
        | patterns.butterfly(512, 16),
        "random(512, 256, 0.125)": patterns.random(512, 256, 0.125),
        "covering(512, 512, 0.01)": patterns.covering(512, 512, 0.01),
        "from_mask(mask, 16)": patterns.from_mask(mask, 16),
        "from_dense(w, 32)": patterns.from_dense(w, 32),
        "strongest(scores, 0.3, 16)": patterns.strongest(scores, 0.3, 16),
        "from_linear(l, density=0.3)": BlockSparseLinear.from_linear(linear, density=0.3),
    }


def main() -> None:
    figure, axes = plt.subplots(2, 6, figsize=(14, 5.5))
    figure.subplots_adjust(0.005, 0.05, 0.995, 0.95, wspace=0.06, hspace=0.26)
    *places, last = axes.flat
    for axis, (title, item) in zip(places, gallery().items(), strict=True):
        pattern = item.pattern if isinstance(item, BlockSparseLinear) else item
        item.plot(axis)
        axis.set_title(title, family="monospace", fontsize=9)
        n_rows, n_cols = pattern.shape
        axis.set_xlabel(f"{n_rows} x {n_cols}, density {pattern.density:.3g}", fontsize=9)
        axis.set(ylabel=None, xticks=[], yticks=[])
    last.set_axis_off()
    shaded = places[-1].images[0]
    bar = figure.colorbar(shaded, cax=last.inset_axes((0.02, 0, 0.09, 1)))
    bar.set_label("values in a block of the layer,\nroot mean square", fontsize=9)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
