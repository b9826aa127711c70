"""What calibrate did, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_sparse_nn.calibration.model_fit import Quality
from mlx_sparse_nn.core.pattern import CSRPattern
from mlx_sparse_nn.core.table import Report, Table, fold
from mlx_sparse_nn.layers.linear import BlockSparseLinear

NOT_THE_MODEL = (
    "Errors are of each layer's outputs, over the samples of calibration. What the model loses, "
    "its loss on other texts tells."
)


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationReport(Report):
    """What :func:`calibrate` did to a model; ``print`` it for a table.

    Attributes:
        sparse: The new layers, by the first path of each.
        patterns: Which blocks :func:`calibrate` left each of them, by path.
        quality: How well each was fitted, by path.
        skipped: Why each other layer that holds a matrix was left alone, by path.
        model_density: Stored fraction of all parameters of the model, what was skipped included.
    """

    sparse: dict[str, BlockSparseLinear]
    patterns: dict[str, CSRPattern]
    quality: dict[str, Quality]
    skipped: dict[str, str]
    model_density: float

    @property
    def density(self) -> float:
        """Stored fraction of all weights that were made sparse; 0 if there are none."""
        values = sum(pattern.shape[0] * pattern.shape[1] for pattern in self.patterns.values())
        return sum(pattern.nnz for pattern in self.patterns.values()) / max(1, values)

    def _table(self) -> Table:
        seconds, n = sum(quality.seconds for quality in self.quality.values()), len(self.sparse)
        made = f"{n} layer{'s' * (n != 1)} made sparse in {seconds:.1f} s"
        notes = [NOT_THE_MODEL]
        few = [p for p, pattern in self.patterns.items() if self._has_few_samples(p, pattern)]
        if few:
            notes.append(f"{_names(few)} had fewer samples than inputs: give more batches")
        reasons: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(path)
        notes += [f"{_names(paths)} skipped: {reason}" for reason, paths in reasons.items()]
        return Table(
            caption=f"{made}: density {self.density:.3g} there, {self.model_density:.3g} in all",
            header=["layer", "out x in", "block", "density", "error kept", "fitted", "seconds"],
            rows=[[path, *self._cells(path)] for path in self.sparse],
            notes=notes,
        )

    def _has_few_samples(self, path: str, pattern: CSRPattern) -> bool:
        return self.quality[path].n_samples < pattern.shape[1]

    def _cells(self, path: str) -> list[str]:
        pattern, quality = self.patterns[path], self.quality[path]
        return [
            f"{pattern.shape[0]} x {pattern.shape[1]}",
            str(pattern.block_size),
            f"{pattern.density:.3g}",
            f"{quality.error_kept:.3f}",
            f"{quality.error_fitted:.3f}",
            f"{quality.seconds:.2f}",
        ]


def _names(paths: list[str]) -> str:
    return ", ".join(name for name, _ in fold(paths, [None] * len(paths)))
