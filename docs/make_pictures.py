"""Draw the README's gallery of patterns: ``pip install matplotlib``, then run this file."""

from pathlib import Path

import matplotlib
import numpy as np

from mlx_sparse_nn import patterns

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GALLERY = {
    "random(density=0.125)": patterns.random(512, 512, 0.125, 32, seed=1),
    "block_diagonal(512, 8)": patterns.block_diagonal(512, 8),
    "banded(bandwidth=1)": patterns.banded(512, 512, 1, 32),
    "butterfly": patterns.butterfly(512, 32),
}


def main() -> None:
    figure, axes = plt.subplots(1, len(GALLERY), figsize=(11, 3.1), layout="constrained")
    for axis, (title, pattern) in zip(axes, GALLERY.items(), strict=True):
        axis.imshow(np.array(pattern.tomask()), cmap="Blues", vmin=0, vmax=1.4)
        axis.set_title(title, family="monospace", fontsize=10)
        axis.set_xlabel(f"{pattern.density:.1%} stored", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(Path(__file__).with_name("patterns.png"), dpi=110)


if __name__ == "__main__":
    main()
