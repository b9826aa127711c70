"""What sparsify did, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.table import LARGEST, NOT_MEASURED, Report, Table, fold
from mlx_sparse_nn.layers.linear import BlockSparseLinear

ErrorOf: TypeAlias = Literal["weights", "outputs"]
ERROR = {
    "weights": "error: ||W - A|| / ||W||; calibrate keeps that of the outputs small",
    "outputs": "output error: of each layer by itself, over the samples of calibration",
}
ERROR_COLUMN = {"weights": "error", "outputs": "output error"}


@dataclass(frozen=True, eq=False, repr=False)
class SparsifyReport(Report):
    """What :func:`sparsify` did to a model; ``print`` it for a table.

    Attributes:
        sparse: The new layer at each path that was made sparse. A layer that the model holds at
            several paths is here at each of them, and is one object.
        patterns: Which blocks :func:`sparsify` left each of them, by path.
        skipped: Why each other layer that holds a matrix was left alone, by path: linear layers,
            embeddings, convolutions, experts.
        shares: Fraction of the dense model's parameters that each layer in ``skipped`` holds, by
            the first of its paths.
        errors: Relative error of each new layer's weight, ``||W - A|| / ||W||`` of the values that
            are lost, by path. Of values that were fitted to moments, ``error_of`` "outputs": that
            of the layer's outputs over the samples of calibration.
        error_of: "weights" or "outputs".
        model_density: Stored fraction of all parameters of the model, what was skipped included.
    """

    sparse: dict[str, BlockSparseLinear]
    patterns: dict[str, CSRPattern]
    skipped: dict[str, str]
    shares: dict[str, float]
    errors: dict[str, float]
    error_of: ErrorOf
    model_density: float

    @property
    def density(self) -> float:
        """Stored fraction of all weights that were made sparse; 0 if there are none."""
        patterns = [self.patterns[path] for path in self._first_paths()]
        values = sum(pattern.shape[0] * pattern.shape[1] for pattern in patterns)
        return sum(pattern.nnz for pattern in patterns) / max(1, values)

    def _first_paths(self) -> list[str]:
        """Return the first path of each layer that was made sparse."""
        first: dict[int, str] = {}
        for path, layer in self.sparse.items():
            first.setdefault(id(layer), path)
        return list(first.values())

    def _table(self) -> Table:
        new = self._first_paths()
        cells = [_cells(self.patterns[path]) for path in new]
        first_path = {id(self.sparse[path]): path for path in new}
        shared = {
            path: first
            for path, layer in self.sparse.items()
            if (first := first_path[id(layer)]) != path
        }
        lines = fold(new, [tuple(line) for line in cells])
        notes = []
        if len(lines) < len(new):
            notes.append(LARGEST)
        for path, places in fold(list(shared), list(shared.values())):
            notes.append(f"{path}: the layer of {shared[list(shared)[places[0]]]}")
        notes += self._said_of_skipped()
        if self.sparse:
            notes += [*self._said_of_dead(), ERROR[self.error_of], NOT_MEASURED]
        made = f"{len(new)} layer{'s' * (len(new) != 1)} made sparse, {len(self.shares)} skipped"
        state = f": density {self.density:.3g} there, {self.model_density:.3g} in all"
        return Table(
            caption=made + state * bool(self.sparse),
            header=["layer", "out x in", "block", "blocks", "density", ERROR_COLUMN[self.error_of]],
            rows=[
                [path, *cells[places[0]], largest([self.errors[new[i]] for i in places])]
                for path, places in lines
            ],
            notes=notes,
        )

    def _said_of_dead(self) -> list[str]:
        """Return a sentence on outputs without a block, if there are some."""
        patterns = [self.patterns[path] for path in self._first_paths()]
        dead = sum(_n_dead_outputs(pattern) for pattern in patterns)
        outputs = sum(pattern.shape[0] for pattern in patterns)
        where = 'see "Which blocks are kept" in docs/sparsify.md'
        return [f"{dead:,} of {outputs:,} outputs have no block: {where}"] if dead else []

    def _said_of_skipped(self) -> list[str]:
        """Return a sentence on the layers left alone for one reason, those with most first."""
        alike: dict[str, list[str]] = {}
        for path in self.shares:
            alike.setdefault(self.skipped[path], []).append(path)
        shares = {why: sum(self.shares[path] for path in paths) for why, paths in alike.items()}
        return [
            f"{_names(alike[why])} skipped ({shares[why]:.1%} of the model): {why}"
            for why in sorted(alike, key=lambda why: -shares[why])
        ]


def largest(errors: Sequence[float]) -> str:
    """Return the largest error of some layers, for a table."""
    return f"{max(errors):.3f}"


def _n_dead_outputs(pattern: CSRPattern) -> int:
    """Return how many outputs no stored block writes."""
    ends = np.minimum(np.arange(1, pattern.grid[0] + 1) * pattern.block_size, pattern.shape[0])
    sizes = np.diff(ends, prepend=0)
    return int(sizes[np.diff(pattern.indptr) == 0].sum())


def _names(paths: list[str]) -> str:
    return ", ".join(name for name, _ in fold(paths, [None] * len(paths)))


def _cells(pattern: CSRPattern) -> list[str]:
    n_out, n_in = pattern.shape
    density = f"{pattern.density:.3g}"
    return [f"{n_out} x {n_in}", str(pattern.block_size), f"{pattern.n_blocks:,}", density]
